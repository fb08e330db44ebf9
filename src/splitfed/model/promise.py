"""Promises: what the layers of a run return on the client, before anybody has computed it.

A run of layers is one request, and the model calls its layers one by one. So each stand-in but the
last returns a `Promise`, a tensor without values, and its call is only noted. A promise that is
given to the next layer says which call it continues; the last layer's call sends all. Whatever else
touches a promise (an addition, its shape, a hook that looks) has the calls sent that were made so
far, and gets the real tensor; the layers after it are another request. Outputs that the model keeps
in a list of its own while it goes on, as for all hidden states, come back with the last layer's.

A layer may return a tensor or a tuple, and the model's code takes the one or the other apart. Which
it is, is found by running the layer's skeleton where tensors have no values, once for each kind of
arguments; where its path depends on values, on zeros.

The traps: the calls are made later than the model's code says. So a promise remembers the grad mode
and autocast of its call, and what is changed in between (an argument in place, a setting) is
refused. And what passes torch's ways of asking tensors first, an autograd function of the user's
own, sees a tensor of no elements: its backward raises.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as torch_trees

from splitfed.errors import CutError, InPlaceError
from splitfed.model.layers import Kept, Layer, LayerCall, Member, Output
from splitfed.model.numerics import same_bits
from splitfed.model.recompute import checkpoint_frames, in_backward
from splitfed.model.trial import try_call
from splitfed.protocol import pytree

_get_device = vars(torch._C.TensorBase)["device"].__get__


class Mode(NamedTuple):
    """What a call depends on besides its arguments."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, leaves: Sequence[Tensor]) -> Mode:
        """The one that holds now, for tensors on these devices."""
        devices = {"cpu"} | {leaf.device.type for leaf in leaves if type(leaf) is not Promise}
        autocast = tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in sorted(devices - {"meta"})
        )
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    def fits(self, other: Mode) -> bool:
        """Whether calls in both can be sent as one."""
        known = {entry[0]: entry[1:] for entry in self.autocast}
        same = all(known.get(entry[0], entry[1:]) == entry[1:] for entry in other.autocast)
        return same and (self.grad, self.inference) == (other.grad, other.inference)

    def again(self) -> contextlib.ExitStack:
        """A context in which it holds."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(self.inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))
        for device, enabled, dtype in self.autocast:
            if enabled != torch.is_autocast_enabled(device) or enabled:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        return stack


class Promise(Tensor):
    """A tensor that a layer of a run will have returned; to be told by its class only here."""

    calls: Calls
    place: Output

    @staticmethod
    def __new__(cls, calls: Calls, place: Output) -> Promise:
        """One for an output of a call."""
        made: Promise = Tensor._make_wrapper_subclass(cls, (0,), requires_grad=calls.mode.grad)
        made.calls = calls
        made.place = place
        return made

    def __init__(self, calls: Calls, place: Output) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch is asked of a promise, it is asked of the real tensor."""
        # What a checkpoint asks of all that it is given, and a model that lies on several devices.
        if func == _get_device and type(args[0]) is Promise:
            return args[0].calls.device
        args, kwargs = settled((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what comes past `__torch_function__`, where gradients would be lost.

        Raises:
            CutError: always, but for what autograd does with a leaf.
        """
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise CutError(
            "an output of a layer that was cut out in a run is used past torch's own functions "
            f"({func}): cut such layers one by one, by a list of cuts"
        )


def settled(tree: Any) -> Any:
    """A tree with the real tensors in place of promises; itself, if there are none."""
    leaves, spec = torch_trees.tree_flatten(tree)
    if not any(type(leaf) is Promise for leaf in leaves):
        return tree
    return torch_trees.tree_unflatten([_settle(leaf) for leaf in leaves], spec)


def _settle(leaf: Any) -> Any:
    return leaf.calls.value(leaf.place) if type(leaf) is Promise else leaf


@dataclass(slots=True, eq=False)
class Noted:
    """A call that was made, and isn't answered yet."""

    member: Member
    spec: Any
    leaves: list[Tensor | Output]
    versions: list[int]
    settings: Any
    returns: str | None
    trial: list[Tensor] | None = None
    """The tensors that it returned in a trial."""
    promised: dict[int, weakref.ref[Promise]] = field(default_factory=dict)


class Calls:
    """The calls of a run so far: noted, and then sent as one.

    Args:
        caller: Who makes them.
        given: The tensors that the first is given.
    """

    def __init__(self, caller: Any, given: Sequence[Tensor]) -> None:
        self.caller = caller
        self.mode = Mode.now(given)
        # Where outputs come to.
        self.device = given[0].device if given else torch.device("cpu")
        self.noted: list[Noted] = []
        self.is_sent = False
        self.came: list[weakref.ref[Tensor]] = []
        """The tensors that promises have become."""
        self._values: dict[Output, Tensor] = {}
        self._kept: list[Output] = []
        self._is_recomputed = False

    def note(self, call: Noted) -> Any:
        """Note a call; what it returns, with promises for the tensors."""
        self.noted.append(call)
        # A checkpoint keeps what its function is given, for a recompute and not for its values.
        self._is_recomputed = self._is_recomputed or bool(checkpoint_frames())
        return self._promise(len(self.noted) - 1)

    def _promise(self, number: int) -> Any:
        call = self.noted[number]
        spec = json.loads(call.returns or "null")
        made = [Promise(self, Output(number, leaf)) for leaf in range(_count(spec))]
        call.promised = {leaf: weakref.ref(promise) for leaf, promise in enumerate(made)}
        return pytree.unflatten(spec, list(made))

    def knows(self, place: Output) -> bool:
        """Whether the real tensor is here."""
        return place in self._values

    def value(self, place: Output) -> Tensor:
        """The real tensor; the calls are sent for it if they haven't been.

        Raises:
            CutError: they were sent, and it hasn't come with the answer.
        """
        if not self.is_sent:
            self._kept = self._alive(place)
            self._send()
        if place not in self._values:
            names = [call.member.layer.name for call in self.noted]
            raise CutError(
                f"the output of {names[place.call]!r} is used after {names[-1]!r} has been called "
                f"with it: of the run {self.noted[0].member.layer.run!r} only what its last layer "
                "returns comes back. Cut such layers one by one, by a list of cuts"
            )
        return self._values[place]

    def finish(self) -> Any:
        """Send the calls, the last of which was made just now; what that returns."""
        self._kept = self._alive(None)
        return self._send()

    def _send(self) -> Any:
        first = self.noted[0].member
        self._check_as_noted()
        once = _Once()
        calls = [LayerCall(json.dumps(c.spec), once(c.leaves), c.returns) for c in self.noted]
        kwargs = {"kept": self._kept} if self._kept else {}
        members = [call.member for call in self.noted]
        self.is_sent = True
        # Inside of a backward pass it is a recompute, for which its caller is found.
        caller = None if in_backward() else self.caller
        with self.mode.again():
            answer = first.send(members, tuple(calls), kwargs, caller)
        once.check(first.layer)
        if self._kept:
            if not isinstance(answer, Kept):
                raise CutError(
                    f"the model keeps outputs of layers within {first.layer.run!r} besides what "
                    "the last one returns: that needs a client(...) call, and isn't a loss"
                )
            self._values = dict(zip(self._kept, answer.kept, strict=True))
            answer = answer.outputs
        last = len(self.noted) - 1
        for leaf, tensor in enumerate(pytree.flatten(answer)[1]):
            self._values[Output(last, leaf)] = tensor
        self.came += map(weakref.ref, self._values.values())
        return answer

    def _check_as_noted(self) -> None:
        """Refuse to send calls of which something is otherwise than when they were made."""
        for call in self.noted:
            found = versions_of(call.leaves)
            if found != call.versions:
                raise InPlaceError(
                    f"an argument of {call.member.layer.name!r} was changed in place after the "
                    f"call: the layers of the run {call.member.layer.run!r} are sent together "
                    "later. Change a clone() of it, or cut the layers one by one"
                )
            if call.member.settings() != call.settings:
                raise CutError(
                    f"a setting of {call.member.layer.name!r} was changed after its call: the "
                    f"layers of the run {call.member.layer.run!r} are sent together later. "
                    "Set it before the loop, or cut the layers one by one"
                )

    def _alive(self, asked: Output | None) -> list[Output]:
        """The outputs that the model holds, besides those of the last call.

        What the last call was given is still in a variable of the loop that made it, so it is kept
        only if others are.

        Args:
            asked: The output that was touched; `None` if the last layer was called.
        """
        alive = [
            Output(number, leaf)
            for number, call in enumerate(self.noted[:-1])
            for leaf, promise in call.promised.items()
            if promise() is not None
        ]
        if self._is_recomputed:
            return [place for place in alive if place == asked]
        given = {leaf.call for leaf in self.noted[-1].leaves if isinstance(leaf, Output)}
        if asked is not None or any(place.call not in given for place in alive):
            return alive
        return []

    def again(self, layer: Layer, place: Output) -> Any:
        """The call of a layer, made again inside of a backward pass by a checkpoint.

        Args:
            layer: The layer.
            place: The newest output that it is given.

        Returns:
            What it returns; `NotImplemented` if there was no such call.
        """
        for number in range(place.call + 1, len(self.noted)):
            if self.noted[number].member.layer == layer:
                is_last = number + 1 == len(self.noted)
                return self._send() if is_last else self._promise(number)
        return NotImplemented

    def on_trial(self, place: Output) -> Tensor:
        """A tensor like an output: of its shape and kind, with other values or none."""
        call = self.noted[place.call]
        if call.trial is None:
            outputs = try_call(call.member, call.spec, self.with_trials(call.leaves))
            call.trial = pytree.flatten(outputs)[1]
        return call.trial[place.leaf]

    def with_trials(self, leaves: Sequence[Tensor | Output]) -> list[Tensor]:
        """Leaves of a call, with tensors in place of what isn't known."""
        return [leaf if isinstance(leaf, Tensor) else self.on_trial(leaf) for leaf in leaves]


class _Once:
    """Finds the arguments that are equal in several calls, so that each travels once.

    As a mask is that a model makes anew for each layer, or for each kind of layers. Within one call
    two tensors stay two.
    """

    def __init__(self) -> None:
        self._known: dict[Any, list[Tensor]] = {}
        self._taken: list[tuple[Tensor, int]] = []

    def __call__(self, leaves: Sequence[Tensor | Output]) -> list[Tensor | Output]:
        """The leaves of a call, with earlier tensors in place of their equals."""
        found: list[Tensor | Output] = []
        for leaf in leaves:
            own = {id(other) for other in (*leaves, *found)} - {id(leaf)}
            found.append(leaf if isinstance(leaf, Output) else self._earlier(leaf, own))
        return found

    def _earlier(self, leaf: Tensor, own: set[int]) -> Tensor:
        if leaf.requires_grad or leaf.layout is not torch.strided or leaf.is_inference():
            return leaf
        known = self._known.setdefault((leaf.shape, leaf.dtype, leaf.stride(), leaf.device), [])
        for other in known:
            if other is leaf:
                return leaf
            if id(other) not in own and same_bits(other, leaf):
                self._taken.append((other, other._version))
                return other
        known.append(leaf)
        return leaf

    def check(self, layer: Layer) -> None:
        """Refuse that the layers have changed such an argument in place.

        Raises:
            InPlaceError: they have.
        """
        if any(tensor._version != version for tensor, version in self._taken):
            raise InPlaceError(
                f"the layers of the run {layer.run!r} change an argument in place that has the "
                "values of another one: let them change a clone() of it"
            )


def versions_of(leaves: Sequence[Tensor | Output]) -> list[int]:
    """The version counters of tensors; those made in inference mode have none."""
    return [t._version for t in leaves if isinstance(t, Tensor) and not t.is_inference()]


def _count(spec: Any) -> int:
    """How many distinct tensors a spec has."""
    if isinstance(spec, dict):
        if set(spec) == {"t"}:
            return int(spec["t"]) + 1
        return max((_count(child) for child in spec.values()), default=0)
    if isinstance(spec, list):
        return max((_count(child) for child in spec), default=0)
    return 0
