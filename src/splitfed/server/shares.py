"""What a call contributes to its batch, and the same computed again from what is on record.

A gradient follows from the record of its forward, the gradient at the cut and the weights of its
version: whoever has the three, and the body, has the gradient, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from splitfed.model import execution
from splitfed.model.execution import Model, Run
from splitfed.model.numerics import same_bits
from splitfed.protocol import safetensors
from splitfed.protocol.messages import BufferUpdate, ForwardRecord, GradientRecord, KeptCall

Buffers = Mapping[str, Tensor]


def share_of(
    done: Run,
    gradients: dict[str, Tensor],
    digest: str,
    numerics: str,
    *,
    num_samples: float = 1.0,
    start: Buffers | None = None,
) -> GradientRecord:
    """What a call contributes to its batch.

    Args:
        done: The call.
        gradients: Of its parameters.
        digest: Of the request.
        numerics: The short name of the numerics class that it ran in.
        num_samples: Its weight.
        start: The buffers that it began with, where they aren't the version's: then its update is
            there twice, as the change from the version and as that from these.
    """
    values = changed_buffers(done)
    bases = {name: done.bases[name] for name in values}
    buffers = [BufferUpdate(values, bases, num_samples)]
    if start is not None:
        own = {name: start.get(name, base) for name, base in bases.items()}
        buffers.append(BufferUpdate(values, own, num_samples))
    return GradientRecord(
        kind="gradient",
        base_version=done.version,
        num_samples=num_samples,
        loss_scale=1.0,
        digest=digest,
        numerics=numerics,
        gradients=gradients,
        buffers=buffers,
    )


def share_again(model: Model, kept: KeptCall, numerics: str) -> GradientRecord:
    """The share of a call that was kept, computed again.

    Args:
        model: The body at the version of the call.
        kept: The call.
        numerics: The short name of this process's numerics class.

    Raises:
        ReplayError: the forward gave other outputs than on record.
    """
    call = kept.forward
    done = execution.run(model, call, grad=True)
    kind = "the same" if call.numerics == numerics else "another"
    execution.check_replay(call, done, f"the forward was computed in {kind} numerics class")
    gradients = execution.backward(done, kept.grad_outputs)[1]
    samples = kept.num_samples if kept.seal is None else 1.0
    return share_of(done, gradients, kept.digest, numerics, num_samples=samples, start=call.buffers)


def with_outputs(
    record: ForwardRecord, tensors: Sequence[Tensor], crcs: Sequence[int]
) -> ForwardRecord:
    """The record of a call whose outputs are known."""
    outputs = tuple(
        (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
        for tensor in tensors
    )
    return replace(record, outputs=outputs, crcs=tuple(crcs))


def of_loss(
    record: ForwardRecord,
    done: Run,
    grad_outputs: Sequence[Tensor | None],
    num_samples: float,
    digest: str,
) -> KeptCall:
    """What a batch whose loss was computed on the server follows from: no label is in it.

    Args:
        record: What the call ran on.
        done: Its run.
        grad_outputs: The gradients of the body's own outputs.
        num_samples: Its weight.
        digest: Of the request.
    """
    crcs = [safetensors.crc32(tensor) for tensor in done.unfinished]
    ahead = with_outputs(record, done.unfinished, crcs)
    return KeptCall(done.version, ahead, tuple(grad_outputs), None, 0, num_samples, digest)


def changed_buffers(done: Run) -> dict[str, Tensor]:
    """The buffers of each submodule that changed one of its own.

    A statistic may come out of an update as it was, and still count.
    """
    return changed_of(done.buffers, done.bases)


def changed_of(buffers: Buffers, bases: Buffers) -> dict[str, Tensor]:
    """As `changed_buffers`, of the buffers at the end of a run and those of its version."""
    owners = set()
    for name, value in buffers.items():
        if not same_bits(value, bases[name]):
            owners.add(name.rpartition(".")[0])
    return {name: v for name, v in buffers.items() if name.rpartition(".")[0] in owners}
