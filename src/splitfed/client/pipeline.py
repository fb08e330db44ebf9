"""A training loop in which the forward of a batch is under way while another is in its backward.

A batch costs two requests, and a client that waits for each in turn waits twice. Here it waits for
both at once. One batch runs its backward, in a thread of its own, beside the forward of the batch
that is in_flight - 1 later; then the optimizer steps; then the caller gets the result. Nothing is
under way while the caller's code runs, so a loop may evaluate, schedule or stop as it always could.

What each forward sees is settled by numbers and never by timing: forward i runs on the half after
step i - in_flight. So the half is in_flight - 1 steps older than in a plain loop, and the run is as
reproducible as one. Where no step comes in between, all bits are those of the plain loop: forwards
draw from torch's generator in the same order, batches get the same numbers, and each begins with
the buffers that it would have begun with.

The trap is that two forwards are never made at once, however many batches are in flight: the second
draws from the generator after the first, which only knows what its body drew once it has its
answer. So two in flight overlap all that can overlap; more make the half older.
"""

from __future__ import annotations

import contextvars
import inspect
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.checks import at_least
from splitfed.client.alternation import Alternation, HandsOver, Line
from splitfed.client.backward import Passes
from splitfed.client.connection import Connection
from splitfed.client.stash import WeightStash
from splitfed.errors import InputError, UnsupportedError
from splitfed.model.rng import has_compute_lock


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """What became of one batch, once its backward has run and its step was taken."""

    number: int
    """Its place in the loader, from 0."""
    batch: Any
    """The item of the loader."""
    outputs: Any
    """What the client returned."""
    loss: Tensor
    """The loss, detached."""


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """How a batch is trained on; the arguments of `SplitClient.pipeline`."""

    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Any = None
    backward: Callable[[Tensor], None] | None = None
    step: Callable[[BatchResult], None] | None = None
    num_samples: Callable[[Any], float] | None = None

    def __post_init__(self) -> None:
        """Check what was given.

        Raises:
            InputError: it isn't what it should be.
        """
        for name in ("loss_fn", "backward", "step", "num_samples"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "loss_fn"):
                raise InputError(f"{name} is {value!r:.80}: expected a function")
        if self.optimizer is not None:
            if self.step is not None:
                raise InputError(
                    "optimizer and step were given, and step is called in place of the "
                    "optimizer's: pass None as the optimizer, and call its step() and zero_grad() "
                    "in yours"
                )
            if not all(callable(getattr(self.optimizer, n, None)) for n in ("step", "zero_grad")):
                raise InputError(
                    f"optimizer is {self.optimizer!r:.80}: expected one of torch.optim, or None "
                    "for a half that doesn't step by itself"
                )


@dataclass(slots=True, eq=False)
class _Ahead:
    """A batch whose forward has been made, or has failed."""

    number: int
    batch: Any = None
    outputs: Any = None
    loss: Tensor | None = None
    error: Exception | None = None


class Pipeline(Iterator[BatchResult]):
    """An iterator that trains on a loader's batches, and gives each one's result in their order.

    An error is raised where the plain loop would raise it: after the results of all batches before,
    with a note of the batch it belongs to. The batch is given up as a failed one of a plain loop,
    and the next `next()` goes on with the one after it.

    Made by `SplitClient.pipeline`.

    Args:
        client: The client.
        connection: Its process, as the server sees it.
        passes: Its backward passes.
        loader: What gives batches: `(x, ..., y)` or a mapping.
        training: How a batch is trained on.
        in_flight: The most batches between the begin of their forward and the end of their step.
    """

    def __init__(
        self,
        client: nn.Module,
        connection: Connection,
        passes: Passes,
        loader: Iterable[Any],
        training: Training,
        in_flight: int,
    ) -> None:
        self.number = -1
        """The batch that the last result, or the last error, was of; -1 before the first."""
        self._in_flight = at_least("in_flight", in_flight, 1)
        self._client = client
        self._connection = connection
        self._passes = passes
        self._training = training
        self._accepted = _accepted(client)
        try:
            self._items: Iterator[Any] | None = iter(loader)
        except TypeError as error:
            raise InputError(
                f"loader is a {type(loader).__name__}: expected an iterable of batches, such as "
                "a DataLoader"
            ) from error
        self._loaded = 0
        self._ahead: deque[_Ahead] = deque()
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        steps = training.optimizer is not None or training.step is not None
        self._stash = WeightStash(client, steps=steps and in_flight > 1)

    def __iter__(self) -> Pipeline:
        return self

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __next__(self) -> BatchResult:
        """Train until the next batch is done.

        Raises:
            StopIteration: there is none.
        """
        try:
            found = self._plain() if self._in_flight == 1 else self._overlapped()
        except Exception:
            raise
        except BaseException:  # Ctrl-C: whatever was under way has ended by now
            self.close()
            raise
        if found is None:
            self.close()
            raise StopIteration
        return found

    def close(self) -> None:
        """Give up the batches whose forward has been made; nothing of them counts."""
        self._ahead.clear()
        self._items = None
        if self._passes.pipeline is not None and self._passes.pipeline() is self:
            self._passes.pipeline = None
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    @property
    def num_ahead(self) -> int:
        """How many batches have had their forward, and wait for their backward, in this process."""
        return len(self._ahead) if self._process == os.getpid() else 0

    def _claim(self) -> None:
        """Refuse a second pipeline of a client while forwards of the first are ahead, and a copy.

        Raises:
            InputError: there is another one.
            UnsupportedError: the process was forked since this one was made.
        """
        if self._process != os.getpid():
            # Its thread has stayed behind, as have the records of what is ahead.
            raise UnsupportedError(
                "this pipeline was made before the process was forked, and its forwards are the "
                "parent's: make another one in the child"
            )
        reference = self._passes.pipeline
        other = None if reference is None else reference()
        if other is not None and other is not self and other.num_ahead:
            raise InputError(
                f"another pipeline of client {self._connection.client_id!r} is "
                f"{other.num_ahead} batches ahead: exhaust it, or close() it, before the next one"
            )
        self._passes.pipeline = weakref.ref(self)

    @contextmanager
    def _batch(self, number: int) -> Iterator[None]:
        """A block whose errors belong to a batch."""
        self.number = number
        try:
            yield
        except Exception as error:
            if isinstance(error, StopIteration):  # which would end the loop, as if all were done
                # Without a cause: with it `contextmanager` would take this for its own doing.
                raise RuntimeError(f"batch {number} of a pipeline raised StopIteration") from None
            if sys.version_info >= (3, 11):
                error.add_note(f"in batch {number} of a pipeline, counted from 0")
            raise

    # ------------------------------------------------------------------------------- one at a time

    def _plain(self) -> BatchResult | None:
        """The plain loop's next batch; `None` if there is none."""
        loaded = self._load()
        if loaded is None:
            return None
        with self._batch(loaded.number):
            if loaded.error is not None:
                raise loaded.error
            self._zero_grad()
            self._call(loaded)
            self._backward(loaded)
            return self._step(loaded)

    # ------------------------------------------------------------------------------------ overlaps

    def _overlapped(self) -> BatchResult | None:
        """The next batch, beside whose backward a forward is made; `None` if there is none."""
        self._claim()
        while len(self._ahead) < self._in_flight - 1 and (loaded := self._load()) is not None:
            self._run(loaded, self._connection.next("batch") + len(self._ahead))
            self._ahead.append(loaded)
            self._stash.keep()
        if not self._ahead:
            return None
        first = self._ahead.popleft()
        with self._batch(first.number):
            if first.error is not None:
                raise first.error
            self._zero_grad()
            self._advance(first)
            return self._step(first)

    def _load(self) -> _Ahead | None:
        """The next batch; `None` if there is none, or none now."""
        # What comes after a failed batch is loaded once its error has been raised, as in the loop.
        if self._items is None or (self._ahead and self._ahead[-1].error is not None):
            return None
        loaded = _Ahead(self._loaded)
        try:
            loaded.batch = next(self._items)
        except StopIteration:
            self._items = None
            return None
        except Exception as error:  # noqa: BLE001 -- raised when this batch's turn comes
            loaded.error = error
        self._loaded += 1
        return loaded

    def _run(self, ahead: _Ahead, seq: int) -> None:
        """Make a forward, whose error is raised when its turn comes.

        Args:
            ahead: Its batch.
            seq: The number that it is going to have, once its backward comes.
        """
        if ahead.error is not None:
            return
        is_first, call = not ahead.number, self._connection.next("call")
        try:
            with self._connection.expecting(seq), self._stash.saving(check=is_first):
                self._call(ahead)
            self._passes.end_forward(call)
        except Exception as error:  # noqa: BLE001 -- as above
            ahead.error = error

    def _advance(self, first: _Ahead) -> None:
        """Run a backward beside the forward of another batch."""
        loaded = self._load()
        seq = self._connection.next("batch") + 1 + len(self._ahead)
        try:
            if loaded is None or loaded.error is not None:
                self._backward(first)
            elif has_compute_lock():
                # As in a simulation: two threads would wait for each other.
                self._backward(first)
                self._run(loaded, seq)
            else:
                self._beside(first, loaded, seq)
        finally:
            if loaded is not None:
                self._ahead.append(loaded)
            self._stash.keep()

    def _beside(self, first: _Ahead, loaded: _Ahead, seq: int) -> None:
        """Run a backward, in a thread of its own, beside a forward here."""
        turns = Alternation(2)
        backward = Line(turns, 0, locks=_stays_in_its_thread(self._client, first.loss))
        forward = Line(turns, 1, locks=True)
        connection = self._connection
        transport = connection.transport
        context, state = contextvars.copy_context(), _ThreadState()

        def run() -> None:
            with backward.computing(), state.entered():
                self._backward(first)

        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "splitfed-backward")
        connection.transport = HandsOver(transport, forward, backward)
        done = self._executor.submit(context.run, run)
        try:
            with forward.computing():
                self._run(loaded, seq)
            done.result()
        except Exception:
            raise
        except BaseException:
            # Ctrl-C: the batch in its backward is let finish, with its step, as in a plain loop,
            # where the next one's forward comes after it. Whoever can't wait interrupts again.
            if done.exception() is None:
                self._step(first)
            raise
        finally:
            connection.transport = transport

    # -------------------------------------------------------------------------------- of one batch

    def _zero_grad(self) -> None:
        if self._training.optimizer is not None:
            self._training.optimizer.zero_grad()

    def _call(self, ahead: _Ahead) -> None:
        """Run the half, and the loss."""
        args, kwargs, target = self._arguments(ahead.batch)
        weight = self._training.num_samples
        client: Any = self._client
        block = nullcontext() if weight is None else client.batch(num_samples=weight(ahead.batch))
        # In a plain loop autocast ends with each forward, and forgets the weights that it has cast.
        torch.clear_autocast_cache()
        with block:
            ahead.outputs = client(*args, **kwargs)
            ahead.loss = self._training.loss_fn(ahead.outputs, target)
        if not isinstance(ahead.loss, Tensor):
            raise InputError(
                f"loss_fn returned a {type(ahead.loss).__name__}: expected the loss, a tensor with "
                "one element"
            )

    def _arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """What the client is called with, and what the loss function gets beside its outputs."""
        if isinstance(batch, Mapping):
            given = {
                name: value
                for name, value in batch.items()
                if self._accepted is None or name in self._accepted
            }
            if not given:
                raise InputError(
                    f"the batch has the keys {[*batch]!r:.200}, and the half takes none of them: "
                    f"expected {sorted(self._accepted or ())}"
                )
            return (), given, batch
        if isinstance(batch, list | tuple) and len(batch) >= 2:
            return tuple(batch[:-1]), {}, batch[-1]
        raise InputError(
            f"the loader gave a {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, list | tuple) else ''}: expected "
            "(x, y), (x, ..., y) or a dict of the half's arguments. Make such items of yours: "
            "((x, x) for x in loader)"
        )

    def _backward(self, ahead: _Ahead) -> None:
        loss: Any = ahead.loss
        try:
            if self._training.backward is None:
                loss.backward()
            else:
                self._training.backward(loss)
        except BaseException:
            self._passes.give_up()  # here: it closes what this thread has opened
            raise

    def _step(self, ahead: _Ahead) -> BatchResult:
        """Step, and return the result."""
        loss: Any = ahead.loss
        result = BatchResult(ahead.number, ahead.batch, ahead.outputs, loss.detach())
        if self._training.step is not None:
            self._training.step(result)
        elif self._training.optimizer is not None:
            self._training.optimizer.step()
        return result


class _ThreadState:
    """What a backward depends on that torch keeps by thread: autocast, and devices."""

    def __init__(self) -> None:
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def entered(self) -> ExitStack:
        """A block in another thread that has the same."""
        torch.get_num_threads()  # else a thread's first kernel may run on another number
        stack = ExitStack()
        for device, dtype in self._autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        if self._stream is not None:
            stack.enter_context(torch.cuda.stream(self._stream))
        return stack


def _stays_in_its_thread(half: nn.Module, loss: Any) -> bool:
    """Whether autograd runs a backward in the thread that asks for it: on the CPU."""
    if torch.cuda.is_initialized() or loss.device.type != "cpu":
        return False
    return all(tensor.device.type == "cpu" for tensor in half.parameters())


def _accepted(client: nn.Module) -> frozenset[str] | None:
    """The names of the arguments that a half takes; `None` if it takes any."""
    parameters = inspect.signature(client.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in parameters if p.kind in by_name)
