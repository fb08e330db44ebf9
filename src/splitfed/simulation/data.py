"""The data of a simulation: what each client owns, its batches, and metrics on held-out data.

Data is a pair of tensors (N, *) that are indexed alike, or anything with a length whose items are
pairs (input, target). A `Shard` is one owner's part of a larger set: it holds indices and refers to
the whole, so that a thousand owners cost no copy of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from splitfed.errors import InputError
from splitfed.protocol.ids import check_client_id


class Items(Protocol):
    """Anything with a length whose items are pairs (input, target), such as a torch `Dataset`."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """One example: (input, target)."""
        ...


Data = tuple[Tensor, Tensor] | Items
Evaluation = Data | Callable[[nn.Module], Mapping[str, float]]
EVALUATION_BATCH = 500
"""Examples evaluated at once; the last bits of a mean loss depend on it."""


class Shard:
    """One owner's examples of a larger set.

    Args:
        data: The whole set; it isn't copied. Of another shard, its whole set is referred to.
        indices: Which examples are the owner's, int64 (N,).
    """

    def __init__(self, data: Data, indices: Tensor) -> None:
        if isinstance(data, Shard):
            indices = data.indices[indices]
            data = data.data
        self.data: Data = data
        self.indices: Tensor = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        place = int(self.indices[index])
        if isinstance(self.data, tuple):
            return tuple(part[place] for part in self.data)
        return self.data[place]


def deal(
    data: Data, parts: Sequence[Tensor | Sequence[int]], names: Sequence[str] | None = None
) -> dict[str, Shard]:
    """Make the `clients` of `simulate` from one data set and the lists of `splitfed.partition`.

    Args:
        data: The set that the parts index.
        parts: Indices of each client's examples.
        names: The clients' ids; by default `client-0`, `client-1` ..., padded with zeros.

    Raises:
        InputError: not as many names as parts, a part without examples or that isn't indices, or
            one beyond the data.
    """
    if names is None:
        width = len(str(max(len(parts) - 1, 0)))
        ids = [f"client-{number:0{width}d}" for number in range(len(parts))]
    else:
        ids = list(names)
    if len(ids) != len(parts) or len(set(ids)) != len(ids):
        raise InputError(
            f"{len(set(ids))} distinct names for {len(parts)} parts: expected one for each"
        )
    total = size(data)
    return {
        client_id: Shard(data, _checked_indices(client_id, part, total))
        for client_id, part in zip(ids, parts, strict=True)
    }


def _checked_indices(client_id: str, part: Tensor | Sequence[int], total: int) -> Tensor:
    """The indices of a part as int64 (N,)."""
    indices = torch.as_tensor(part, device="cpu")
    is_mask_or_real = indices.dtype == torch.bool or indices.is_floating_point()
    # An empty list becomes a float tensor: that it is empty is said below, not that it is float.
    if len(part) and (is_mask_or_real or indices.dim() != 1):
        raise InputError(
            f"the part of {client_id} is {indices.dtype} of shape {tuple(indices.shape)}: "
            "expected indices of shape (N,); those of a mask are mask.nonzero().flatten()"
        )
    if not len(indices) or int(indices.min()) < 0 or int(indices.max()) >= total:
        raise InputError(
            f"the part of {client_id} is empty or exceeds the data: "
            f"expected indices from 0 to {total - 1}"
        )
    return indices.long()


def check_clients(clients: Mapping[str, Data]) -> list[str]:
    """The sorted ids of clients that can be simulated.

    Raises:
        InputError: there are none, or one of them has no examples.
        IdError: an id may not become a key.
    """
    if not isinstance(clients, Mapping) or not clients:
        raise InputError(
            f"clients is {type(clients).__name__}: "
            "expected a mapping of ids to data, with one at least"
        )
    for client_id, data in clients.items():
        check_client_id(client_id)
        if not size(data):
            raise InputError(f"client {client_id!r} has no examples: leave it out")
    return sorted(clients)


def size(data: Data) -> int:
    """How many examples there are.

    Raises:
        InputError: it isn't data, or the tensors of a pair differ in length.
    """
    if isinstance(data, tuple):
        return _pair_size(data)
    is_sequence = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset) or not is_sequence:
        raise InputError(
            f"data is a {type(data).__name__}: expected a pair of tensors, or a sequence of "
            "examples, such as loader.dataset of a DataLoader or a list of what a stream yields"
        )
    return len(data)


def _pair_size(data: tuple[Any, ...]) -> int:
    if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() for part in data):
        raise InputError("data is a tuple: expected two tensors, inputs (N, *) and targets (N, *)")
    inputs, targets = data
    if len(inputs) != len(targets):
        raise InputError(f"{len(inputs)} inputs and {len(targets)} targets: expected as many")
    return len(inputs)


def order(data: Data, generator: torch.Generator) -> list[int]:
    """A shuffled order of the examples."""
    return torch.randperm(size(data), generator=generator, device="cpu").tolist()


def batches(data: Data, batch_size: int, indices: Iterable[int]) -> Iterator[tuple[Any, Any]]:
    """Pairs (inputs (N, *), targets (N, *)) of these examples in this order.

    The last batch may be smaller.

    Raises:
        InputError: an example isn't a pair, or examples don't make a batch.
    """
    wanted = torch.as_tensor(list(indices), dtype=torch.int64, device="cpu")
    if isinstance(data, Shard):
        # Of the whole set at once: a pair of tensors is then indexed by batch, not by example.
        wanted = data.indices[wanted]
        data = data.data
    for part in wanted.split(batch_size):
        if isinstance(data, tuple):
            yield data[0][part], data[1][part]
        else:
            yield _collate([_example(data, index) for index in part.tolist()])


def batch_length(total: int, batch_size: int, number: int) -> int:
    """How many examples batch `number` of `batches` has, the first being 0.

    Inputs and targets of any structure don't tell: the leading dimension of a tensor in them may be
    another one.
    """
    return min(batch_size, total - number * batch_size)


def _example(data: Items, index: int) -> Any:
    example = data[index]
    if isinstance(example, tuple | list) and len(example) == 2:
        return example
    if isinstance(example, tuple | list):
        found = f"{len(example)} parts"
    else:
        found = f"a {type(example).__name__}"
    raise InputError(
        f"example {index} of a {type(data).__name__} is {found}: expected a pair (input, target), "
        "of which either may be a dict or tuple; let the data set return that"
    )


def _collate(examples: list[Any]) -> tuple[Any, Any]:
    try:
        inputs, targets = torch.utils.data.default_collate(examples)
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(
            f"examples can't be put together in a batch ({error}): "
            "expected tensors or numbers of one shape; let the data set convert or pad them"
        ) from error
    return inputs, targets


def classes(data: Data) -> dict[str, int] | None:
    """How many examples there are of each class.

    `None` where targets aren't integers (N,) in memory: a data set isn't read for this.
    """
    indices = None
    if isinstance(data, Shard):
        indices = data.indices
        data = data.data
    if not isinstance(data, tuple) or not _are_classes(data[1]):
        return None
    labels = data[1] if indices is None else data[1][indices]
    found, counts = labels.unique(return_counts=True)
    return {str(label): count for label, count in zip(found.tolist(), counts.tolist(), strict=True)}


def _are_classes(targets: Tensor) -> bool:
    is_integer = not targets.is_floating_point() and not targets.is_complex()
    return targets.dim() == 1 and is_integer


@torch.no_grad()
def evaluate(
    model: nn.Module, evaluation: Evaluation, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, float]:
    """The metrics of a model in eval mode, without gradients; it is left in eval mode.

    Args:
        model: The whole model.
        evaluation: Held-out data, or a function of the model that returns metrics by name.
        loss_fn: For held-out data; the mean over a batch.

    Returns:
        `loss`, and `accuracy` where outputs are (N, classes), two of them at least, and targets
        integers (N,); or what the function returned.

    Raises:
        InputError: the function returned no mapping, or there is no data.
    """
    model.eval()
    if callable(evaluation):
        metrics = evaluation(model)
        if not isinstance(metrics, Mapping):
            raise InputError(
                f"evaluate returned a {type(metrics).__name__}: "
                "expected a mapping of metrics by name"
            )
        return dict(metrics)
    total = size(evaluation)
    if not total:
        raise InputError(
            "there is no held-out data to evaluate on: give one example at least, or evaluate=None"
        )
    loss_sum = 0.0
    correct = 0
    classifies = True
    for number, (inputs, targets) in enumerate(batches(evaluation, EVALUATION_BATCH, range(total))):
        outputs = model(inputs)
        mean_loss = float(loss_fn(outputs, targets))
        loss_sum += mean_loss * batch_length(total, EVALUATION_BATCH, number)
        found = num_correct(outputs, targets)
        classifies = classifies and found is not None
        correct += found or 0
    scores = {"loss": loss_sum / total}
    if classifies:
        scores["accuracy"] = correct / total
    return scores


def num_correct(outputs: Any, targets: Any) -> int | None:
    """How many examples of a batch are classified right.

    `None` unless outputs are (N, classes) and targets integers (N,). One output for each example,
    as of a binary classifier with one logit, isn't a choice between classes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        return None
    if targets.dim() != 1 or targets.is_floating_point():
        return None
    return int((outputs.argmax(1) == targets).sum())
