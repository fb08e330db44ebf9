"""The data of a simulation: what each client owns, its batches, and the score of a model on held-out data.

Data is a pair of tensors (N, *) that are indexed alike, or anything with a length whose items are pairs (input,
target). A `Shard` is one owner's part of a larger set: it holds indices and refers to the whole, so that a thousand
owners cost no copy of the data.
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
    """Anything with a length whose items are pairs (input, target): a torch `Dataset`, for one."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """One example: (input, target)."""
        ...


Data = tuple[Tensor, Tensor] | Items
Evaluation = Data | Callable[[nn.Module], Mapping[str, float]]
_EVALUATED_AT_ONCE = 500


class Shard:
    """One owner's examples of a larger set.

    Args:
        data: The whole set; it isn't copied.
        indices: Which examples are the owner's, int64 (N,).
    """

    def __init__(self, data: Data, indices: Tensor) -> None:
        self.data = data
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        chosen = int(self.indices[index])
        return (
            tuple(part[chosen] for part in self.data)
            if isinstance(self.data, tuple)
            else self.data[chosen]
        )


def deal(
    data: Data, parts: Sequence[Tensor | Sequence[int]], names: Sequence[str] | None = None
) -> dict[str, Shard]:
    """Make the mapping of clients that `simulate` takes, from one data set and the lists of `splitfed.partition`.

    Args:
        data: The set that the parts index.
        parts: Indices of each client's examples.
        names: The clients' ids; `client-0`, `client-1` ..., padded with zeros, if they aren't given.

    Raises:
        InputError: not as many names as parts, a part without examples or that isn't indices, or one beyond the data.
    """
    width = len(str(max(len(parts) - 1, 0)))
    ids = [f"client-{i:0{width}d}" for i in range(len(parts))] if names is None else list(names)
    if len(ids) != len(parts) or len(set(ids)) != len(ids):
        raise InputError(
            f"{len(set(ids))} distinct names for {len(parts)} parts: expected one for each"
        )
    total = size(data)
    return {
        name: Shard(data, _indices(name, part, total))
        for name, part in zip(ids, parts, strict=True)
    }


def _indices(name: str, part: Tensor | Sequence[int], total: int) -> Tensor:
    found = torch.as_tensor(part, device="cpu")
    if len(part) and (found.dtype == torch.bool or found.is_floating_point() or found.dim() != 1):
        raise InputError(
            f"the part of {name} is {found.dtype} of shape {tuple(found.shape)}: expected indices of shape (N,); those "
            "of a mask are mask.nonzero().flatten()"
        )
    if not len(found) or int(found.min()) < 0 or int(found.max()) >= total:
        raise InputError(
            f"the part of {name} is empty or exceeds the data: expected indices from 0 to {total - 1}"
        )
    return found.long()


def check(clients: Mapping[str, Data]) -> list[str]:
    """The ids of clients, sorted; all of them and their data fit to be simulated.

    Raises:
        InputError: there are none, or one of them has no examples.
        IdError: an id may not become a key.
    """
    if not isinstance(clients, Mapping) or not clients:
        raise InputError(
            f"clients is {type(clients).__name__}: expected a mapping of ids to data, with one at least"
        )
    for name, data in clients.items():
        check_client_id(name)
        if not size(data):
            raise InputError(f"client {name!r} has no examples: leave it out")
    return sorted(clients)


def size(data: Data) -> int:
    """How many examples there are.

    Raises:
        InputError: it isn't data, or the tensors of a pair differ in length.
    """
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() for part in data):
            raise InputError(
                "data is a tuple: expected two tensors, inputs (N, *) and targets (N, *)"
            )
        if len(data[0]) != len(data[1]):
            raise InputError(f"{len(data[0])} inputs and {len(data[1])} targets: expected as many")
    elif (
        isinstance(data, IterableDataset)
        or not hasattr(data, "__len__")
        or not hasattr(data, "__getitem__")
    ):
        raise InputError(
            f"data is a {type(data).__name__}: expected a pair of tensors, or a sequence of examples, such as "
            "loader.dataset of a DataLoader or a list of what a stream yields"
        )
    return len(data[0]) if isinstance(data, tuple) else len(data)


def order(data: Data, generator: torch.Generator) -> list[int]:
    """A shuffled order of the examples."""
    return torch.randperm(size(data), generator=generator, device="cpu").tolist()


def batches(data: Data, batch_size: int, indices: Iterable[int]) -> Iterator[tuple[Any, Any]]:
    """Pairs (inputs (N, *), targets (N, *)) of these examples in this order; the last one may be smaller.

    Raises:
        InputError: an example isn't a pair, or examples don't make a batch.
    """
    wanted = torch.as_tensor(list(indices), dtype=torch.int64, device="cpu")
    while isinstance(data, Shard):
        wanted = data.indices[wanted]
        data = data.data
    for part in wanted.split(batch_size):
        if isinstance(data, tuple):
            yield data[0][part], data[1][part]
        else:
            yield _collate([_pair(data, index) for index in part.tolist()])


def _pair(data: Items, index: int) -> Any:
    example = data[index]
    if not isinstance(example, tuple | list) or len(example) != 2:
        found = (
            f"{len(example)} parts"
            if isinstance(example, tuple | list)
            else f"a {type(example).__name__}"
        )
        raise InputError(
            f"example {index} of a {type(data).__name__} is {found}: expected a pair (input, target), of which either "
            "may be a dict or tuple; let the data set return that"
        )
    return example


def _collate(examples: list[Any]) -> tuple[Any, Any]:
    try:
        inputs, targets = torch.utils.data.default_collate(examples)
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(
            f"examples can't be put together in a batch ({error}): expected tensors or numbers of one shape; let the "
            "data set convert or pad them"
        ) from error
    return inputs, targets


def classes(data: Data) -> dict[str, int] | None:
    """How many examples there are of each class; `None` where targets aren't integers (N,) at hand."""
    indices = None
    while isinstance(data, Shard):
        indices = data.indices if indices is None else data.indices[indices]
        data = data.data
    if (
        not isinstance(data, tuple)
        or data[1].dim() != 1
        or data[1].is_floating_point()
        or data[1].is_complex()
    ):
        return None
    labels = data[1] if indices is None else data[1][indices]
    found, counts = labels.unique(return_counts=True)
    return {str(label): count for label, count in zip(found.tolist(), counts.tolist(), strict=True)}


@torch.no_grad()
def evaluate(
    model: nn.Module, how: Evaluation, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, float]:
    """Score a model in eval mode, without gradients; it is left in eval mode.

    Args:
        model: The whole model.
        how: Held-out data, or a function of the model that returns figures by name.
        loss_fn: For held-out data; the mean over a batch.

    Returns:
        `loss`, and `accuracy` where outputs are (N, classes), two of them at least, and targets integers (N,); or what
        the function returned.

    Raises:
        InputError: the function returned no mapping, or there is no data.
    """
    model.eval()
    if callable(how):
        figures = how(model)
        if not isinstance(figures, Mapping):
            raise InputError(
                f"evaluate returned a {type(figures).__name__}: expected a mapping of figures by name"
            )
        return dict(figures)
    total = size(how)
    if not total:
        raise InputError(
            "there is no held-out data to evaluate on: give one example at least, or evaluate=None"
        )
    loss, right, classifies = 0.0, 0, True
    for number, (inputs, targets) in enumerate(batches(how, _EVALUATED_AT_ONCE, range(total))):
        outputs = model(inputs)
        loss += float(loss_fn(outputs, targets)) * min(
            _EVALUATED_AT_ONCE, total - number * _EVALUATED_AT_ONCE
        )
        found = num_right(outputs, targets)
        classifies = classifies and found is not None
        right += found or 0
    return (
        {"loss": loss / total, "accuracy": right / total} if classifies else {"loss": loss / total}
    )


def num_right(outputs: Any, targets: Any) -> int | None:
    """How many of a batch are right; `None` unless outputs are (N, classes) and targets integers (N,).

    One output for each example, as of a binary classifier with one logit, isn't a choice between classes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if (
        outputs.dim() != 2
        or outputs.shape[1] < 2
        or targets.dim() != 1
        or targets.is_floating_point()
    ):
        return None
    return int((outputs.argmax(1) == targets).sum())
