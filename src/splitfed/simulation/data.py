"""The data of a simulation: what each client owns, its batches, and metrics on held-out data.

Data is columns, samples or a stream. Columns are a tuple or a dict of tensors (N, *) that are
indexed alike. Samples are anything with a length and items. A stream is an `IterableDataset`, which
is gone through from its beginning in each pass, and whose length may not be known.

A sample, and so a batch, has one of three forms. Of a pair (input, target) the model gets the input
as its one argument. Of a longer tuple the last part is the target, and the others are the model's
arguments in order: (ids, mask, target). Of a dict the target has a key of its own, and the others
are the model's keywords.

A `Shard` is one owner's part of a larger set: it holds indices and refers to the whole, so that a
thousand owners cost no copy of the data. A loader is a function without arguments that returns any
of these: it is called where a client trains, when it trains, so nobody else ever holds its data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from splitfed.errors import InputError
from splitfed.protocol.ids import check_client_id
from splitfed.simulation.settings import LocalTraining


class Items(Protocol):
    """Anything with a length whose items are samples, such as a torch `Dataset`."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """One sample: (input, target), a longer tuple that ends in the target, or a dict."""
        ...


Columns = tuple[Any, ...] | Mapping[str, Any]
"""Tensors (N, *) that are indexed alike; a part may be a dict or a tuple of such tensors itself."""
Data = Columns | Items | IterableDataset[Any]
Source = Data | Callable[[], Data]
"""A client's data, or its loader, which may say by a `__len__` how many examples there will be."""
Evaluation = Data | Callable[[nn.Module], Mapping[str, float]]
EVALUATION_BATCH = 500
"""Examples evaluated at once; the last bits of a mean loss depend on it."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Several samples, put together as model and loss get them."""

    args: tuple[Any, ...]
    """The arguments of the model, such as (inputs,), of shape (N, *)."""
    kwargs: Mapping[str, Any]
    """Its keywords."""
    target: Any
    """What the loss gets beside the outputs."""
    num_samples: int
    """How many samples it has, whatever the shapes say."""

    def outputs(self, model: Callable[..., Any]) -> Any:
        """What the model makes of it."""
        return model(*self.args, **self.kwargs)

    def on(self, device: torch.device | None) -> Batch:
        """The same on a device; as it is, if none is given."""
        if device is None:
            return self
        args, kwargs, target = moved((self.args, self.kwargs, self.target), device)
        return Batch(args, kwargs, target, self.num_samples)


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
        return _rows(self.data, place) if _are_columns(self.data) else _items(self.data)[place]


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


def moved(value: Any, device: torch.device | str) -> Any:
    """A value whose tensors are on a device: those in mappings, lists and tuples too."""
    if callable(getattr(value, "to", None)):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def is_loader(source: object) -> bool:
    """Whether it is a function that returns a client's data, and not the data."""
    is_data = isinstance(source, tuple | Mapping | IterableDataset)
    return callable(source) and not is_data and not hasattr(source, "__getitem__")


def load(source: Source) -> Data:
    """A client's data; its loader is called.

    Raises:
        InputError: the loader returned something else.
    """
    if not is_loader(source):
        return source  # type: ignore[return-value]
    found: Data = source()  # type: ignore[operator]
    if is_loader(found):
        raise InputError(f"a loader returned a {type(found).__name__}: expected a client's data")
    known_size(found)
    return found


def check_clients(clients: Mapping[str, Source], local: LocalTraining | None = None) -> list[str]:
    """The sorted ids of clients that can be simulated.

    Args:
        clients: Their data, by id.
        local: How batches are made of it; by default all data is used.

    Raises:
        InputError: there are none, or one of them has no examples, or too few for a batch.
        IdError: an id may not become a key.
    """
    if not isinstance(clients, Mapping) or not clients:
        raise InputError(
            f"clients is {type(clients).__name__}: "
            "expected a mapping of ids to data, with one at least"
        )
    batch_sizes = {} if local is None or isinstance(local.batch_size, int) else local.batch_size
    unknown = batch_sizes.keys() - clients.keys()
    if unknown:
        raise InputError(
            f"batch_size has a number for {min(unknown)!r}, which isn't among the clients"
        )
    for client_id, data in clients.items():
        check_client_id(client_id)
        total = known_size(data)
        if total == 0:
            raise InputError(f"client {client_id!r} has no examples: leave it out")
        own = None if local is None else local.of(client_id)
        if own is not None and total is not None and not num_batches(total, own):
            raise InputError(
                f"client {client_id!r} has {total} examples, which drop_last leaves without a "
                f"batch of {own.num_examples}: leave it out, or give a smaller batch_size"
            )
    return sorted(clients)


def sizes(clients: Mapping[str, Source], purpose: str) -> dict[str, int]:
    """How many examples each client has.

    Args:
        clients: Their data, by id.
        purpose: The setting that needs to know, for the message.

    Raises:
        InputError: one of them is a stream of unknown length, or a loader that doesn't say it.
    """
    found = {}
    for client_id, data in sorted(clients.items()):
        total = known_size(data)
        if total is None:
            raise InputError(
                f"{purpose} needs to know how many examples each client has, and the "
                f"{type(data).__name__} of {client_id!r} has no length: "
                f"give it a __len__, or leave {purpose} out"
            )
        found[client_id] = total
    return found


def known_size(data: Source) -> int | None:
    """How many examples there are; `None` for a stream or a loader of unknown length.

    Raises:
        InputError: it isn't data, or columns differ in length.
    """
    if isinstance(data, IterableDataset) or is_loader(data):
        try:
            return len(data)  # type: ignore[arg-type]
        except TypeError:  # it has no length, or holds something that has none
            return None
    return size(data)  # type: ignore[arg-type]


def size(data: Data) -> int:
    """How many examples there are, of data that can be indexed.

    Raises:
        InputError: it isn't such data, or columns differ in length.
    """
    if _are_columns(data):
        return _columns_size(data)
    is_sequence = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset) or not is_sequence:
        raise InputError(
            f"data is a {type(data).__name__}: expected tensors, or a sequence of "
            "examples, such as loader.dataset of a DataLoader or a list of what a stream yields"
        )
    return len(_items(data))


def num_batches(total: int, local: LocalTraining) -> int:
    """How many batches a pass over so many examples has."""
    size = local.num_examples
    return total // size if local.drop_last else -(-total // size)


def _are_columns(data: object) -> bool:
    if isinstance(data, Mapping):
        # A mapping of numbers to samples is a sequence of a kind, and was one before there were
        # columns by name.
        return all(isinstance(name, str) for name in data)
    return isinstance(data, tuple)


def _items(data: Data) -> Items:
    """Data that isn't columns, as its type says only here."""
    return data  # type: ignore[return-value]


def _columns_size(data: Any) -> int:
    """The one length of all tensors."""
    if isinstance(data, tuple) and len(data) < 2:
        raise InputError(
            f"data is a tuple of {len(data)}: expected tensors, inputs (N, *) and targets (N, *)"
        )
    lengths = list(_lengths(data))
    if not lengths:
        raise InputError(f"data is a {type(data).__name__} without a tensor: expected (N, *)")
    if len(set(lengths)) > 1:
        if isinstance(data, tuple) and len(lengths) == 2:
            found = f"{lengths[0]} inputs and {lengths[1]} targets"
        else:
            found = f"tensors of {', '.join(map(str, lengths))} examples"
        raise InputError(f"{found}: expected as many")
    return lengths[0]


def _lengths(part: Any) -> Iterator[int]:
    """The length of each tensor of columns, in order."""
    if isinstance(part, Tensor) and part.dim():
        yield len(part)
    elif isinstance(part, Mapping | tuple | list):
        for value in part.values() if isinstance(part, Mapping) else part:
            yield from _lengths(value)
    else:
        found = "a scalar tensor" if isinstance(part, Tensor) else f"a {type(part).__name__}"
        raise InputError(
            f"data is a tuple or a dict, and {found} is in it: expected tensors, inputs (N, *) and "
            "targets (N, *); samples of another kind go into a list or a Dataset"
        )


def _rows(columns: Any, index: Any) -> Any:
    """The rows of columns at an index, or at indices int64 (N,)."""
    if isinstance(columns, Tensor):
        return columns[index]
    if isinstance(columns, Mapping):
        return {name: _rows(part, index) for name, part in columns.items()}
    parts = [_rows(part, index) for part in columns]
    return parts if isinstance(columns, list) else tuple(parts)


def order(data: Data, generator: torch.Generator) -> list[int] | None:
    """A shuffled order of the examples; `None` for a stream, which has an order of its own."""
    if isinstance(data, IterableDataset):
        return None
    return torch.randperm(size(data), generator=generator, device="cpu").tolist()


def batches(
    data: Data, local: LocalTraining, indices: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Batches of these examples in this order; of all, if none is given.

    The last batch may be smaller, unless `local.drop_last` leaves it out.

    Raises:
        InputError: a sample has none of the forms, or samples don't make a batch.
    """
    for part in _parts(data, local, indices):
        found, num_samples = part
        if num_samples == local.num_examples or not local.drop_last:
            yield _batch(found, num_samples, local)


def _parts(
    data: Data, local: LocalTraining, indices: Iterable[int] | None
) -> Iterator[tuple[Any, int]]:
    """What is collated of each batch, and of how many samples."""
    if isinstance(data, IterableDataset):
        stream = iter(data)
        while samples := list(itertools.islice(stream, local.num_examples)):
            yield _collate(samples, local, type(data).__name__, 0), len(samples)
        return
    numbers = range(size(data)) if indices is None else indices
    wanted = torch.as_tensor(list(numbers), dtype=torch.int64, device="cpu")
    if isinstance(data, Shard):
        # Of the whole set at once: columns are then indexed by batch, not by example.
        wanted = data.indices[wanted]
        data = data.data
    # Of no examples torch makes one part, which would be a batch of none.
    for part in wanted.split(local.num_examples) if len(wanted) else ():
        if _are_columns(data) and local.collate_fn is None:
            yield _rows(data, part), len(part)
            continue
        if _are_columns(data):
            samples = [_rows(data, index) for index in part.tolist()]
        else:
            samples = [_items(data)[index] for index in part.tolist()]
        yield _collate(samples, local, type(data).__name__, part[0].item()), len(part)


def _collate(samples: list[Any], local: LocalTraining, source: str, first: float) -> Any:
    """Samples put together, by the user's function if there is one."""
    if local.collate_fn is not None:
        return local.collate_fn(samples)
    if _form(samples[0]) is None:
        raise InputError(
            f"example {first} of a {source} is {_named(samples[0])}: expected a pair "
            "(input, target), a longer tuple that ends in the target, or a dict with a target; "
            "let the data set return that, or LocalTraining(collate_fn=...) make it"
        )
    try:
        return torch.utils.data.default_collate(samples)
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(
            f"examples can't be put together in a batch ({error}): "
            "expected tensors or numbers of one shape; let the data set convert or pad them, "
            "or LocalTraining(collate_fn=...)"
        ) from error


def _form(found: Any) -> type | None:
    """Which of the forms of a sample or batch it has: `tuple`, `dict`, or none."""
    if isinstance(found, Mapping):
        return dict
    is_several = isinstance(found, tuple | list) and len(found) >= 2
    return tuple if is_several else None


def _named(found: Any) -> str:
    """What was found in place of a sample or a batch."""
    if isinstance(found, tuple | list):
        return f"{len(found)} parts" if len(found) != 1 else "1 part"
    return f"a {type(found).__name__}"


def _batch(found: Any, num_samples: int, local: LocalTraining) -> Batch:
    """A collated batch as model and loss get it."""
    form = _form(found)
    if form is None:
        raise InputError(
            f"collate_fn returned {_named(found)}: expected (inputs, targets), a longer tuple that "
            "ends in the targets, or a dict"
        )
    if form is tuple:
        *args, target = found
        batch = Batch(tuple(args), {}, target, num_samples)
    else:
        if local.target not in found or len(found) < 2:
            raise InputError(
                f"a batch has the keys {sorted(map(str, found))}: expected "
                f"{local.target!r}, which loss_fn gets, and others for the model; "
                "LocalTraining(target=...) names the target's key"
            )
        kwargs = {name: part for name, part in found.items() if name != local.target}
        batch = Batch((), kwargs, found[local.target], num_samples)
    if not _has_tensor((batch.args, batch.kwargs)):
        raise InputError(
            f"no tensor is among the inputs of a batch ({_kinds(found)}): "
            "expected one at least; let collate_fn or the data set make tensors"
        )
    return batch


def _has_tensor(value: Any) -> bool:
    """Whether there is a tensor in it; an object of a class of its own may hold some."""
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensor, value))
    return value is not None and not isinstance(value, str | bytes | int | float)


def _kinds(found: Any) -> str:
    """The types of a batch's parts, by name if it has names."""
    if isinstance(found, Mapping):
        return ", ".join(f"{name}: {type(part).__name__}" for name, part in found.items())
    return ", ".join(type(part).__name__ for part in found)


def compute_loss(loss_fn: Callable[[Any, Any], Any], outputs: Any, batch: Batch) -> Any:
    """The loss of a batch.

    Raises:
        InputError: the function doesn't take outputs and target, or not of these types.
    """
    try:
        return loss_fn(outputs, batch.target)
    except TypeError as error:
        raise InputError(
            f"loss_fn(outputs, target) raised {type(error).__name__}: {error}. It got "
            f"a {type(outputs).__name__} and, as the target, a {type(batch.target).__name__}: "
            "the target is the last part of a sample, or in a dict that of LocalTraining(target=)"
        ) from error


def classes(data: Source, target: str = "labels") -> dict[str, int] | None:
    """How many examples there are of each class.

    `None` where targets aren't integers (N,) in memory: a data set isn't read for this, nor loaded.

    Args:
        data: The examples.
        target: The key of the targets, of columns by name.
    """
    indices = None
    if isinstance(data, Shard):
        indices = data.indices
        data = data.data
    labels = _target_column(data, target)
    if labels is None or not _are_classes(labels):
        return None
    labels = labels if indices is None else labels[indices]
    found, counts = labels.unique(return_counts=True)
    return {str(label): count for label, count in zip(found.tolist(), counts.tolist(), strict=True)}


def _target_column(data: Any, target: str) -> Tensor | None:
    """The targets of columns, if they are one tensor."""
    if not _are_columns(data):
        return None
    column = data.get(target) if isinstance(data, Mapping) else data[-1]
    return column if isinstance(column, Tensor) else None


def _are_classes(targets: Tensor) -> bool:
    is_integer = not targets.is_floating_point() and not targets.is_complex()
    return targets.dim() == 1 and is_integer


@torch.no_grad()
def evaluate(
    model: nn.Module,
    evaluation: Evaluation,
    loss_fn: Callable[[Any, Any], Tensor],
    local: LocalTraining = LocalTraining(),  # noqa: B008 -- frozen
) -> dict[str, float]:
    """The metrics of a model in eval mode, without gradients; it is left in eval mode.

    Args:
        model: The whole model.
        evaluation: Held-out data, or a function of the model that returns metrics by name.
        loss_fn: For held-out data; the mean over a batch.
        local: How the samples of a batch are put together, and where its target is. Batches have
            `EVALUATION_BATCH` examples, and all examples count.

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
    loss_sum = 0.0
    total = 0
    correct = 0
    classifies = True
    whole = replace(local, batch_size=EVALUATION_BATCH, drop_last=False)
    for batch in batches(evaluation, whole):
        outputs = batch.outputs(model)
        loss_sum += float(compute_loss(loss_fn, outputs, batch)) * batch.num_samples
        total += batch.num_samples
        found = num_correct(outputs, batch.target)
        classifies = classifies and found is not None
        correct += found or 0
    if not total:
        raise InputError(
            "there is no held-out data to evaluate on: give one example at least, or evaluate=None"
        )
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
