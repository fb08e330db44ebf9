"""Execution of a body, so that it can be run again, anywhere, with the same bits.

A run depends on nothing but what is written down: the version's weights, the inputs, the seed, the
train/eval and grad mode, the autocast dtype, the settings and the buffers it starts from. Each run
gets buffers of its own, so a recompute never counts BatchNorm twice, and two runs of one version
don't see each other; what it leaves in plain attributes is put back (`attributes`). Parameters do
share memory with the version, so a body that writes to them is refused. `torch.autograd.grad`
writes no `.grad`.

The trap: a body that keeps state elsewhere, in its class or module or in generators of its own,
can't be pinned; it shows as a recompute whose outputs have another CRC.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import BodyError, InputError, ReplayError, SplitFedError, UnsupportedError
from splitfed.model.arguments import check_fit, check_unchanged, description, may_change
from splitfed.model.attributes import Attributes, Habits, buffer_slots
from splitfed.model.boundary import AS_IT_IS, enter, fresh, uncached, unhooked
from splitfed.model.fingerprint import check_kind
from splitfed.model.numerics import common_class, same_bits
from splitfed.model.rng import compute_lock, seeded
from splitfed.model.settings import apply_settings
from splitfed.model.skeleton import Template
from splitfed.model.slices import run_parts, split_names
from splitfed.protocol import pytree, safetensors
from splitfed.protocol.messages import BufferUpdate, ForwardRecord, GradientRecord

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Model:
    """A body at one version, ready to run, any number of times.

    Immutable in effect: every run starts from the version's own buffers, in memory of its own, and
    from the attributes that the body was built with, so a model that is kept for many runs is as
    good as a new one.

    Args:
        template: The body's structure.
        state: Its tensors by first name; they aren't copied.
        version: What they are the state of.
        device: Where it computes.
        habits: What is known of the body's forwards; shared by its models.
    """

    def __init__(
        self,
        template: Template,
        state: Mapping[str, Tensor],
        version: int,
        device: torch.device,
        habits: Habits | None = None,
    ) -> None:
        self.version = version
        self.device = device
        self.habits = Habits() if habits is None else habits
        self._template = template
        self._state = state
        self._build()

    def _build(self) -> None:
        template = self._template
        self.module = template.build(self._state, self.device)
        parameters = {
            name.replace("_orig_mod.", ""): parameter
            for name, parameter in self.module.named_parameters()
        }
        self.parameters = {name: parameters[name] for name in template.trainable}
        """Those that train, by first name."""
        self.buffers: dict[str, Tensor] = {}
        """The version's persistent buffers by first name: no run changes them."""
        self._slots = buffer_slots(self.module, template)
        for name, owner, leaf in self._slots:
            buffer = owner._buffers[leaf]
            if buffer is not None:
                self.buffers.setdefault(name, buffer)
        self._copies: dict[str, tuple[Tensor, int]] = {}
        """What the run under way began with, and the version counter of each."""
        self.attributes = Attributes(self.module, template.blueprint, template.modes)
        self._built: dict[bool, list[Any]] = {}
        self._mode = self.module.training
        self._is_tidy = True
        self._is_spoilt = False
        self._pinned = [
            (owner._parameters, leaf, parameter, parameter._version)
            for owner in self.attributes.owners.values()
            for leaf, parameter in owner._parameters.items()
            if parameter is not None
        ]

    def prepare(
        self,
        training: bool,
        buffers: Mapping[str, Tensor] | None,
        settings: Mapping[str, Any] | None = None,
        *,
        afresh: bool = True,
    ) -> None:
        """Set the mode and give the coming run buffers of its own.

        Args:
            training: Train or eval mode.
            buffers: What an earlier call of the same `client(...)` left in those that it changed;
                the others, and all if there is none, start as the version has them.
            settings: What the half has changed of the part.
            afresh: Whether attributes start as the body was built; if not, as the last run left
                them.

        Raises:
            InputError: a setting that the body doesn't have.
        """
        if afresh and not (self._is_tidy and self.is_as_built()):
            self._put_back()
        self._is_tidy = False
        modes = self._template.modes[training]
        for module, mode in zip(self.attributes.owners.values(), modes, strict=True):
            # One by one: train() would set a frozen submodule to train, too. A module takes long
            # to set an attribute.
            if module.training is not mode:
                module.training = mode
        start = buffers or {}
        # One copy for each distinct buffer, so that tied buffers stay tied.
        self._copies = {}
        for name, base in self.buffers.items():
            copy = fresh(start.get(name, base), self.device)
            self._copies[name] = (copy, copy._version)
        for name, owner, leaf in self._slots:
            owner._buffers[leaf] = self._copies[name][0]
        self._mode = training
        if settings:
            self.attributes.begin(apply_settings(self.attributes.owners, settings))

    def restore(self) -> None:
        """Put the attributes back as the body was built."""
        if self.habits.within or not self.attributes.restore(self.device):
            self._build()
        self._is_tidy = True

    def walk(self) -> dict[str, list[Any]] | None:
        """What can change from within an attribute; `None` where it isn't time to look."""
        self.habits.runs += 1
        # At the first runs, and then ever more seldom: 1, 2, 4, 8 and so on.
        if self.habits.runs & (self.habits.runs - 1) and not self.habits.spoils:
            return None
        self._put_back()
        return self.attributes.walk()

    def is_as_built(self) -> bool:
        """Whether all attributes are those that the module was built with."""
        held = self.attributes
        if self._mode not in self._built:
            self._built[self._mode] = held.built(self._mode)
        expected = self._built[self._mode]
        values = list(chain.from_iterable(map(dict.values, held.now)))
        if len(values) != len(expected) or not all(map(is_, values, expected)):
            return False
        return list(map(len, held.buffers)) == held.counts and (
            not held.has_more or held.is_quiet()
        )

    def _put_back(self) -> None:
        """Put back what hooks of a backward have left, or a run that failed."""
        left = self.attributes.left()
        if self._is_tidy:
            self.habits.late.update(left)
        if left or not self._is_tidy:
            self.restore()

    def tidy(
        self, written: Sequence[str], settings: Mapping[str, Any], walked: dict[str, Any] | None
    ) -> list[str]:
        """Put the attributes back after a run.

        Args:
            written: Those that are known to be otherwise.
            settings: What was set for the run.
            walked: What was in them before it.

        Returns:
            The names of further ones: objects that change from within, and what backwards set.
        """
        module = self.module
        if written or settings:
            self.restore()
        if walked is not None and module is self.module:
            now = self.attributes.walk()
            within = {name for name, found in walked.items() if now.get(name) != found}
            if not within.isdisjoint(self._template.names):
                self._is_spoilt = self.habits.spoils = True
                self.check_parameters()
            self.habits.within.update(within)
        self.habits.written.update(written)
        if self.habits.within and module is self.module:
            self.restore()
        self._is_tidy = True
        others = self.habits.within | self.habits.late
        self.habits.written.update(others)
        return sorted(others.difference(written))

    def end_buffers(self, training: bool) -> tuple[dict[str, Tensor], bool]:
        """The buffers as the last run left them, and whether it wrote to any.

        Args:
            training: Whether they are to count.

        Raises:
            UnsupportedError: the body took one away, or gave it another shape or dtype.
        """
        found: dict[str, Tensor] = {}
        moved = False
        for name, owner, leaf in self._slots:
            buffer = owner._buffers.get(leaf)
            if buffer is None:
                raise UnsupportedError(
                    f"the body takes its buffer {name!r} away in forward: "
                    "it must have a value at the end"
                )
            begun, version = self._copies[name]
            if buffer is not begun or buffer._version != version:
                moved = True
                base = self.buffers[name]
                if training and (buffer.shape, buffer.dtype) != (base.shape, base.dtype):
                    check_kind(name, base, buffer)
            found[name] = buffer.detach()
        return found, moved

    def is_spoilt(self) -> bool:
        """Whether the body wrote to its own parameters."""
        # Through `.data`, in place, which the version counter shows, or by putting another there.
        if self._is_spoilt:
            return True
        for slots, leaf, parameter, version in self._pinned:
            if slots.get(leaf) is not parameter or parameter._version != version:
                return True
        return False

    def check_parameters(self) -> None:
        """Refuse a body that wrote to its own parameters.

        Raises:
            UnsupportedError: it did.
        """
        if self.is_spoilt():
            raise UnsupportedError(
                "the body changes its own parameters in forward: keep what it changes in buffers"
            )


@dataclass(slots=True, eq=False)
class Run:
    """A forward that has run, with its graph."""

    version: int
    outputs: Any
    """The tree that the body returned; live."""
    spec: Any
    """That tree without its tensors."""
    tensors: list[Tensor]
    """Its distinct tensors."""
    leaves: list[Tensor]
    """The inputs that the graph ends at."""
    parameters: dict[str, nn.Parameter]
    """Those that train."""
    buffers: dict[str, Tensor]
    """At the end of the run."""
    bases: Mapping[str, Tensor]
    """At its version, before any call of the same `client(...)`."""
    drew: bool
    """Whether the body drew random numbers."""
    changed: dict[int, Tensor]
    """The inputs that the body changed in place, by index."""
    crcs: tuple[int, ...]
    """Of `tensors`."""
    moved: bool
    """Whether it wrote to persistent buffers."""
    written: tuple[str, ...]
    """The plain attributes that it left otherwise than they were, by module and name."""
    numerics: str = ""
    """The short name of the class in which its outputs on record were computed."""
    replayed: bool = False
    """Whether it is a recompute, whose outputs were compared."""
    unfinished: tuple[Tensor, ...] = ()
    """The distinct tensors of the body's own outputs, where something was applied to them."""

    def changed_buffers(self) -> dict[str, Tensor]:
        """The buffers of each submodule that changed one of its own.

        A statistic may come out of an update as it was, and still count.
        """
        return changed_of(self.buffers, self.bases)

    def share(
        self,
        gradients: dict[str, Tensor],
        digest: str,
        numerics: str,
        *,
        num_samples: float = 1.0,
        start: Mapping[str, Tensor] | None = None,
    ) -> GradientRecord:
        """What the call contributes to its batch.

        Args:
            gradients: Of its parameters.
            digest: Of the request.
            numerics: The short name of this process's numerics class.
            num_samples: Its weight.
            start: The buffers that it began with, where they aren't the version's: then its update
                is there twice, as the change from the version and as that from these.
        """
        values = self.changed_buffers()
        bases = {name: self.bases[name] for name in values}
        buffers = [BufferUpdate(values, bases, num_samples)]
        if start is not None:
            own = {name: start.get(name, base) for name, base in bases.items()}
            buffers.append(BufferUpdate(values, own, num_samples))
        return GradientRecord(
            kind="gradient",
            base_version=self.version,
            num_samples=num_samples,
            loss_scale=1.0,
            digest=digest,
            # The client's gradients are of the outputs that it was answered, in their class.
            numerics=common_class((self.numerics, numerics)),
            gradients=gradients,
            buffers=buffers,
        )


def changed_of(buffers: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `Run.changed_buffers`, of the buffers at the end of a run and those of its version."""
    owners = set()
    for name, value in buffers.items():
        if not same_bits(value, bases[name]):
            owners.add(name.rpartition(".")[0])
    return {name: v for name, v in buffers.items() if name.rpartition(".")[0] in owners}


def run(
    model: Model,
    call: ForwardRecord,
    *,
    grad: bool,
    finish: Callable[[Any], Any] | None = None,
    afresh: bool = True,
    leave: bool = False,
) -> Run:
    """Run a body on what `call` has written down; its `outputs` and `crcs` aren't read.

    Args:
        model: The version.
        call: Inputs, seed, modes, settings, buffers.
        grad: The client's grad mode.
        finish: Applied to the outputs under the same seed and autocast (the loss on the server).
        afresh: False for a run on the attributes that the last one left; see `probe`.
        leave: True for leaving the attributes as they are at the end, for the next.

    Raises:
        BodyError: the body's own code raised.
        InputError: the call doesn't fit the body.
        ContainerError: the body returned something that can't cross the cut.
        UnsupportedError: the body changes its parameters, or the kind of a buffer.
    """
    spec, tensors = pytree.flatten(call.inputs)
    # A thread that never asked computes with OpenMP's number of threads, not with torch's, and
    # another number may give other bits. Asking makes torch set it.
    torch.get_num_threads()
    draws = seeded(call.seed, () if model.device.type == "cpu" else (model.device,))
    # The lock before all else: the seed is set on the process's own generators, and the buffers in
    # the module that all runs of a version share. Inference mode off, or what is made under the
    # caller's could never be part of a graph.
    with compute_lock, _recordable(), _grad_mode(grad):
        walked = None if leave else model.walk()
        model.prepare(call.training, call.buffers, call.settings, afresh=afresh)
        # Only now, and before the model is tidied: both may build its module anew.
        parts = _parts(model.module, call.cut)
        parameters = model.parameters
        bases = model.buffers
        leaves = _leaves(tensors, call.requires_grad, model.device)
        # In the grad mode of the call: what enters must hang on the leaves and be none itself.
        entered = list(map(enter, leaves))
        args, kwargs = pytree.unflatten(spec, entered)
        watched = may_change(args, kwargs)
        versions = [tensor._version for tensor in entered]
        with (
            draws,
            unhooked(),
            uncached(),
            _autocast(call.autocast, model.device),
            _BodyErrors(parts, entered),
        ):
            outputs = run_parts(parts, args, kwargs)
            if watched:
                check_unchanged(spec, entered, (args, kwargs), outputs)
            unfinished: list[Tensor] = []
            if finish is not None:
                unfinished = pytree.flatten(outputs)[1]
                outputs = finish(outputs)
        # Still under the lock: the next run puts its own buffers into the module. And still in the
        # call's grad mode: a registered container may compute when it is flattened.
        buffers, moved = model.end_buffers(call.training)
        spec, live = pytree.flatten(outputs)
        written = [] if model.is_as_built() else model.attributes.changed()
        model.check_parameters()
        if not leave:
            written += model.tidy(written, call.settings, walked)
    check_fit("the body's output", outputs, live)
    return Run(
        version=model.version,
        outputs=outputs,
        spec=spec,
        tensors=live,
        leaves=leaves,
        parameters=parameters,
        buffers=buffers,
        bases=bases,
        drew=draws.drew,
        changed={i: t for i, t in enumerate(entered) if t._version != versions[i]},
        crcs=tuple(map(safetensors.crc32, live)),
        moved=moved,
        written=tuple(written),
        numerics=call.numerics,
        unfinished=tuple(unfinished),
    )


def check_replay(record: ForwardRecord, replayed: Run, numerics: str) -> None:
    """Compare a recompute with its forward.

    Args:
        record: The forward.
        replayed: The recompute.
        numerics: The short name of this process's numerics class.

    Raises:
        ReplayError: an output has other bits, and both ran in one numerics class. Between two this
            is rounding, and a warning, unless the outputs are of other shapes or dtypes.
    """
    if replayed.crcs == record.crcs:
        return
    is_alike = record.outputs == record.with_outputs(replayed.tensors, ()).outputs
    is_foreign = record.numerics != numerics
    if is_foreign and is_alike:
        warn_foreign("a forward gave other outputs")
        return
    pairs = zip(replayed.crcs, record.crcs, strict=False)
    wrong = [i for i, (got, expected) in enumerate(pairs) if got != expected]
    raise ReplayError(
        f"recomputing a forward at version {replayed.version} gave other outputs "
        f"(numbers {wrong} of {len(record.crcs)}): the forward was computed in "
        f"{'another' if is_foreign else 'the same'} numerics class. A body must not keep state "
        "in Python, use generators other than torch's defaults, or depend on the time"
    )


def warn_foreign(what: str) -> None:
    """Say that a recompute has other bits as it runs in another numerics class.

    Without a version or a number in it: whoever filters warnings by default gets it once.
    """
    warnings.warn(
        f"recomputing {what} than in the numerics class that it was first computed in. The batch "
        "counts, exact up to rounding; for equal bits run all replicas and accumulators on the "
        "same torch, number of threads and kind of CPU (docs/exactness.md)",
        stacklevel=3,
    )


def backward(
    done: Run, grad_outputs: Sequence[Tensor | None], *, counted: bool = True
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Gradients of a run's inputs and trainable parameters; frees its graph.

    Args:
        done: The run.
        grad_outputs: For each distinct output tensor, its gradient or `None`.
        counted: Whether those of the parameters are wanted.

    Returns:
        The gradients of the inputs (`None` where there is none), and those of the parameters that
        were reached.

    Raises:
        BodyError: autograd raised.
    """
    torch.get_num_threads()  # as in `run`
    of_inputs, of_parameters, _ = backward_within(done, grad_outputs, (), counted=counted)
    return of_inputs, of_parameters


def backward_within(
    done: Run,
    grad_outputs: Sequence[Tensor | None],
    within: Sequence[Tensor],
    *,
    counted: bool = True,
) -> tuple[list[Tensor | None], dict[str, Tensor], list[Tensor | None]]:
    """As `backward`, with the gradients of further tensors of the graph from the same pass.

    Args:
        done: The run.
        grad_outputs: For each distinct output tensor, its gradient or `None`.
        within: The further tensors.
        counted: Whether those of the parameters are wanted.

    Returns:
        What `backward` does, and the gradients of `within` (`None` where there is none).

    Raises:
        BodyError: autograd raised.
    """
    outputs, gradients = _seeds(done, grad_outputs)
    inputs = [leaf for leaf in done.leaves if leaf.requires_grad]
    parameters = done.parameters if counted else {}
    further = [tensor for tensor in within if tensor.requires_grad]
    targets = [*inputs, *parameters.values(), *further]
    if not outputs or not targets:
        return [None] * len(done.leaves), {}, [None] * len(within)
    device = outputs[0].device
    # The lock, as a hook of the body may draw, which would change what a run in another thread
    # draws under its seed. Autocast off, as what surrounds this call is written down nowhere.
    with compute_lock, _recordable(), _autocast(None, device), _BodyErrors():
        found = torch.autograd.grad(outputs, targets, gradients, allow_unused=True)
    end = len(inputs) + len(parameters)
    _check_dense([*["an input"] * len(inputs), *parameters], found[:end])
    of_inputs, of_further = iter(found), iter(found[end:])
    grad_inputs = [next(of_inputs) if leaf.requires_grad else None for leaf in done.leaves]
    of_parameters = zip(parameters, found[len(inputs) : end], strict=True)
    named = {name: gradient for name, gradient in of_parameters if gradient is not None}
    return grad_inputs, named, [next(of_further) if t.requires_grad else None for t in within]


def _parts(module: nn.Module, cut: str) -> list[nn.Module]:
    """The submodules that a cut runs, one after another."""
    try:
        return [module.get_submodule(name) for name in split_names(cut)]
    except AttributeError:
        # A cut point that was placed by hand has the name as it is, commas and all.
        if cut in dict(module.named_modules()):
            return [module.get_submodule(cut)]
        known = [name for name, _ in module.named_children()]
        raise InputError(
            f"the body has no part {cut[:80]!r}, which a cut point asks for; it has {known[:10]}"
        ) from None


def _leaves(
    tensors: Sequence[Tensor], requires_grad: Sequence[bool], device: torch.device
) -> list[Tensor]:
    """The input tensors as leaves that a graph can end at, on the body's device."""
    if len(tensors) != len(requires_grad):
        raise InputError(
            f"expected a requires_grad flag for each of {len(tensors)} input tensors, "
            f"got {len(requires_grad)}"
        )
    # Detached, as requires_grad is set on them: in one process they are the client's own tensors.
    leaves = [tensor.to(device).detach() for tensor in tensors]
    for leaf, needed in zip(leaves, requires_grad, strict=True):
        if needed and not (leaf.is_floating_point() or leaf.is_complex()):
            raise InputError(
                f"an input is said to require a gradient and is {leaf.dtype}: "
                "expected a floating dtype"
            )
        leaf.requires_grad_(needed)
    return leaves


def _seeds(done: Run, grad_outputs: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs at which a backward starts, and the gradient of each.

    The gradients have the layout that the codec gives them, also where they never crossed a wire:
    the bits of a backward may depend on strides and alignment.
    """
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for output, gradient in zip(done.tensors, grad_outputs, strict=True):
        if gradient is not None and output.requires_grad:
            outputs.append(output)
            gradients.append(safetensors.canonical(gradient.detach().to(output.device)))
    return outputs, gradients


def _check_dense(names: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
    """Refuse sparse gradients: the format has no place for them."""
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None and gradient.layout is not torch.strided:
            raise UnsupportedError(
                f"the gradient of {name!r} is sparse: build its layer with sparse=False"
            )


def _recordable() -> contextlib.AbstractContextManager[Any]:
    """Outside of inference mode: what is made within it can't be part of a graph."""
    # Entering what is on already takes longer than the question.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else AS_IT_IS


def _grad_mode(grad: bool) -> contextlib.AbstractContextManager[Any]:
    """The grad mode of a call."""
    return AS_IT_IS if torch.is_grad_enabled() is grad else torch.set_grad_enabled(grad)


def _autocast(dtype: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a dtype by name; for `None`, none, whatever surrounds the block."""
    if dtype is None:
        if torch.is_autocast_enabled(device.type):
            return torch.autocast(device.type, enabled=False)
        return AS_IT_IS
    if dtype not in AUTOCAST:
        raise InputError(
            f"autocast dtype {dtype[:40]!r} isn't known: expected one of {sorted(AUTOCAST)}"
        )
    return torch.autocast(device.type, dtype=AUTOCAST[dtype])


class _BodyErrors:
    """Translates what the user's own code raises; the only place where foreign errors become ours.

    A class, as `contextlib.contextmanager` costs more, in each forward and backward.

    Args:
        parts: The submodules that run.
        tensors: What they are given, for the message.
    """

    __slots__ = ("_parts", "_tensors")

    def __init__(self, parts: Sequence[nn.Module] = (), tensors: Sequence[Tensor] = ()) -> None:
        self._parts = parts
        self._tensors = tensors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, SplitFedError):
            text = f"the body raised {type(error).__name__}: {error}"
            if self._parts:
                text += f" ({description(self._parts, self._tensors)})"
            raise BodyError(text) from error
