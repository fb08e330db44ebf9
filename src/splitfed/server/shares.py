"""What a gradient follows from: noted while it is computed, and computed from again.

A gradient follows from the record of its forward, the gradient at the cut and the weights of its
version: whoever has the three, and the body, has the gradient, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from splitfed.model import execution
from splitfed.model.execution import Model, Run
from splitfed.protocol import safetensors
from splitfed.protocol.messages import ForwardRecord, GradientRecord, KeptCall


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
    return done.share(gradients, kept.digest, numerics, num_samples=samples, start=call.buffers)


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
    ahead = record.with_outputs(done.unfinished, crcs)
    return KeptCall(done.version, ahead, tuple(grad_outputs), None, 0, num_samples, digest)
