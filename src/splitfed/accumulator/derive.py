"""Deriving: a gradient computed again from its recipes, bit for bit.

In a log a batch is acknowledged on its recipes, and whoever commits it computes its gradient from
them and the weights that it ran at. A replay does the same with what was kept. The trap is the
order: shares are added in the order of the recipes, as autograd reached the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from splitfed.errors import FormatError
from splitfed.model.attributes import Habits
from splitfed.model.execution import Model
from splitfed.model.recipes import follow
from splitfed.model.skeleton import Template
from splitfed.protocol.messages import GradientRecord
from splitfed.store.batches import sum_of
from splitfed.store.cache import Bounded

_MODELS = 2


class Deriver:
    """Computes gradients from recipes.

    Args:
        template: The body's structure.
        states: The tensors of a version by first name.
        device: Where to compute.
        numerics: The short name of this process's numerics class.
    """

    def __init__(
        self,
        template: Template,
        states: Callable[[int], Mapping[str, Tensor]],
        device: torch.device,
        numerics: str,
    ) -> None:
        self._template = template
        self._states = states
        self._device = device
        self._numerics = numerics
        self._models: Bounded[int, Model] = Bounded(_MODELS)
        self._habits = Habits()

    def gradient(self, record: GradientRecord) -> GradientRecord:
        """A record with its gradient: as it is if it holds one.

        Raises:
            ReplayError: a call gave other outputs than on record, or other gradients than were
                answered.
            ExpiredError: the weights that it ran at are gone.
            FormatError: recipes without what closed the batch.
        """
        if not record.recipes:
            return record
        if record.seal is None:
            if len(record.recipes) != 1:
                raise FormatError(
                    f"a record has {len(record.recipes)} recipes and no seal: expected one"
                )
            (recipe,) = record.recipes
            model = self._model(recipe.version)
            made = follow(model, recipe, self._numerics, record.numerics, record.num_samples)
            # A batch by itself changes the buffers once, from its version on, whatever call it has
            # continued: the second way to see it is for parts of a batch.
            return replace(made, buffers=made.buffers[:1])
        parts = {
            recipe.part: follow(
                self._model(recipe.version), recipe, self._numerics, record.numerics
            )
            for recipe in record.recipes
        }
        return sum_of(parts, record.seal, record.digest)

    def _model(self, version: int) -> Model:
        found = self._models.get(version)
        if found is None or found.is_spoilt():
            # Built under inference mode, its parameters could never record a graph.
            with torch.inference_mode(False):
                # Copies: a body that writes to its parameters mustn't write to the state's.
                state = {name: tensor.clone() for name, tensor in self._states(version).items()}
                made = Model(self._template, state, version, self._device, self._habits)
                found = self._models.put(version, made)
        return found
