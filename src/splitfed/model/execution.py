"""Running a body so that it can be run again, anywhere, with the same bits.

A run depends on nothing but what is written down: the version's weights, the inputs, the seed, the train/eval and
grad mode, the autocast dtype and the buffers it starts from. Each run gets buffers of its own, so a recompute never
counts BatchNorm twice, and two runs of one version don't see each other. `torch.autograd.grad` writes no `.grad`.

The trap: a body that keeps state in Python can't be pinned; it shows as a recompute whose outputs have another CRC.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitfed.errors import BodyError, InputError, ReplayError, SplitFedError, UnsupportedError
from splitfed.model.boundary import enter, uncached, unhooked
from splitfed.model.model import Model
from splitfed.model.rng import compute_lock, seeded
from splitfed.protocol import pytree, safetensors
from splitfed.protocol.messages import ForwardRecord

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    buffers: dict[str, Tensor]
    """At the end of the run."""
    bases: Mapping[str, Tensor]
    """At its version, before any call of the same `client(...)`."""
    drew: bool
    changed: dict[int, Tensor]
    crcs: tuple[int, ...]


def run(model: Model, call: ForwardRecord, *, grad: bool, finish: Callable[[Any], Any] | None = None) -> Run:
    """Run a body on what `call` has written down; its `outputs` and `crcs` aren't read.

    Args:
        model: The version.
        call: Inputs, seed, modes, buffers.
        grad: The client's grad mode.
        finish: Applied to the outputs under the same seed and autocast (the loss on the server).

    Raises:
        BodyError: the body's own code raised.
        InputError: the call doesn't fit the body.
        ContainerError: the body returned something that can't cross the cut.
    """
    parts = _parts(model.module, call.cut)
    spec, tensors = pytree.flatten(call.inputs)
    torch.get_num_threads()  # a thread that hasn't asked computes with OpenMP's count, which may have other bits
    draws = seeded(call.seed, () if model.device.type == "cpu" else (model.device,))
    with compute_lock, torch.inference_mode(False), torch.set_grad_enabled(grad):
        model.prepare(call.training, call.buffers)
        leaves, entered = _enter(tensors, call.requires_grad, model.device)
        args, kwargs = pytree.unflatten(spec, entered)
        versions = [tensor._version for tensor in entered]
        with draws, unhooked(), uncached(), _autocast(call.autocast, model.device), _as_body_error():
            outputs = parts[0](*args, **kwargs)
            for part in parts[1:]:
                outputs = part(outputs)
            outputs = outputs if finish is None else finish(outputs)
        buffers = model.end_buffers()
    model.check_parameters()
    spec, live = pytree.flatten(outputs)
    return Run(
        version=model.version,
        outputs=outputs,
        spec=spec,
        tensors=live,
        leaves=leaves,
        parameters=model.parameters,
        buffers=buffers,
        bases=model.buffers,
        drew=draws.drew,
        changed={i: t for i, (t, v) in enumerate(zip(entered, versions, strict=True)) if t._version != v},
        crcs=tuple(safetensors.crc32(tensor) for tensor in live),
    )


def check_replay(record: ForwardRecord, again: Run, hint: str) -> None:
    """Compare a recompute with its forward.

    Raises:
        ReplayError: an output has other bits.
    """
    if again.crcs != record.crcs:
        wrong = [i for i, (a, b) in enumerate(zip(again.crcs, record.crcs, strict=False)) if a != b]
        raise ReplayError(
            f"recomputing a forward at version {again.version} gave other outputs (numbers {wrong} of "
            f"{len(record.crcs)}): {hint}. "
            "A body must not keep state in Python, use generators other than torch's defaults, or depend on the time"
        )


def backward(done: Run, grad_outputs: Sequence[Tensor | None]) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """Gradients of a run's inputs and trainable parameters; frees its graph.

    Args:
        done: The run.
        grad_outputs: For each distinct output tensor, its gradient or `None`.

    Returns:
        The gradients of the inputs (`None` where there is none), and those of the parameters that were reached.

    Raises:
        BodyError: autograd raised.
    """
    pairs = [(t, g) for t, g in zip(done.tensors, grad_outputs, strict=True) if g is not None and t.requires_grad]
    targets = [*(leaf for leaf in done.leaves if leaf.requires_grad), *done.parameters.values()]
    if not pairs or not targets:
        return [None] * len(done.leaves), {}
    torch.get_num_threads()  # as in `run`
    gradients = [safetensors.canonical(g.detach().to(t.device)) for t, g in pairs]
    device = pairs[0][0].device
    with compute_lock, torch.inference_mode(False), _autocast(None, device), _as_body_error():
        found = list(torch.autograd.grad([t for t, _ in pairs], targets, gradients, allow_unused=True))
    for name, g in zip([*["an input"] * (len(targets) - len(done.parameters)), *done.parameters], found, strict=True):
        if g is not None and g.layout is not torch.strided:
            raise UnsupportedError(f"the gradient of {name!r} is sparse: build its layer with sparse=False")
    inputs = [found.pop(0) if leaf.requires_grad else None for leaf in done.leaves]
    return inputs, {name: g for name, g in zip(done.parameters, found, strict=True) if g is not None}


def _parts(module: nn.Module, cut: str) -> list[nn.Module]:
    """The submodules that a cut runs, one after another."""
    try:
        return [module.get_submodule(name) for name in cut.split(",")]
    except AttributeError:
        known = [name for name, _ in module.named_children()]
        raise InputError(
            f"the body has no part {cut[:80]!r}, which a cut point asks for; it has {known[:10]}"
        ) from None


def _enter(
    tensors: Sequence[Tensor], requires_grad: Sequence[bool], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves that the graph ends at, and the copies that the body gets."""
    if len(tensors) != len(requires_grad):
        raise InputError(
            f"expected a requires_grad flag for each of {len(tensors)} input tensors, got {len(requires_grad)}"
        )
    leaves = [tensor.to(device).detach() for tensor in tensors]
    for leaf, needed in zip(leaves, requires_grad, strict=True):
        if needed and not (leaf.is_floating_point() or leaf.is_complex()):
            raise InputError(f"an input is said to require a gradient and is {leaf.dtype}: expected a floating dtype")
        leaf.requires_grad_(needed)
    return leaves, [enter(leaf) for leaf in leaves]


def _autocast(dtype: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if dtype is None:
        on = torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
    if dtype not in AUTOCAST:
        raise InputError(f"autocast dtype {dtype[:40]!r} isn't known: expected one of {sorted(AUTOCAST)}")
    return torch.autocast(device.type, dtype=AUTOCAST[dtype])


class _as_body_error:  # noqa: N801 -- reads as the phrase that it is
    """Translate what the user's own code raises; the only place where foreign exceptions become ours."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, SplitFedError):
            raise BodyError(f"the body raised {type(error).__name__}: {error}") from error
