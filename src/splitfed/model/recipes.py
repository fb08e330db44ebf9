"""Recipes: what the share of a call in a gradient follows from, noted and computed from again.

A gradient is as large as the body; the record of its forward, the gradient at the cut and the
weights of its version are not, and whoever has the three, and the body, has the gradient, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from splitfed.errors import ReplayError
from splitfed.model import execution
from splitfed.model.execution import Model, Run
from splitfed.model.numerics import common_class
from splitfed.protocol import safetensors
from splitfed.protocol.messages import ForwardRecord, GradientRecord, Recipe


def recipe_of(
    record: ForwardRecord,
    done: Run,
    grad_outputs: Sequence[Tensor | None],
    answered: Sequence[Tensor | None],
    *,
    part: int,
    digest: str,
) -> Recipe:
    """The recipe of a call that has run.

    Args:
        record: What it ran on, as it is on file.
        done: Its run; where a loss was applied to its outputs, the recipe has the outputs.
        grad_outputs: The gradients of its outputs.
        answered: Those of its inputs.
        part: Its place in the batch.
        digest: Of the request.
    """
    if done.unfinished:
        crcs = [safetensors.crc32(tensor) for tensor in done.unfinished]
        record = record.with_outputs(done.unfinished, crcs)
    return Recipe(done.version, part, record, tuple(grad_outputs), _crcs(answered), digest)


def follow(
    model: Model, recipe: Recipe, numerics: str, answered_in: str, num_samples: float = 1.0
) -> GradientRecord:
    """The share of a call, computed again.

    Args:
        model: The body at the version of the call.
        recipe: The call.
        numerics: The short name of this process's numerics class.
        answered_in: That of the batch on record.
        num_samples: The weight of its change of the buffers.

    Raises:
        ReplayError: the forward gave other outputs than on record, or the backward other gradients
            than were answered, in the same numerics class; in another it is a warning.
    """
    call = recipe.forward
    done = execution.run(model, call, grad=True)
    of_inputs, gradients = execution.backward(done, recipe.grad_outputs)
    execution.check_replay(call, done, numerics)
    computed_in = common_class((call.numerics, answered_in, numerics))
    if _crcs(of_inputs) != recipe.crcs:
        if computed_in == numerics:
            raise ReplayError(
                f"recomputing a backward at version {recipe.version} gave other gradients than "
                "were answered, from the same outputs. A body must not keep state in Python that "
                "its backward uses"
            )
        execution.warn_foreign("a backward gave other gradients")
    return done.share(
        gradients, recipe.digest, computed_in, num_samples=num_samples, start=call.buffers
    )


def _crcs(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if tensor is None else safetensors.crc32(tensor) for tensor in tensors)
