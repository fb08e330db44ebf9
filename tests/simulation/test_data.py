"""What virtual clients own: parts of one set, and the batches made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from splitfed.errors import IdError, InputError
from splitfed.simulation import data as localdata
from splitfed.simulation import partition
from splitfed.simulation.data import Shard, batches, classes, deal, order, size

PAIR = (torch.arange(10).float().view(10, 1), torch.arange(10) % 3)


def taken(data: Any, batch_size: int, indices: list[int]) -> list[list[int]]:
    """The examples of each batch, by their value."""
    return [inputs.flatten().int().tolist() for inputs, _ in batches(data, batch_size, indices)]


@pytest.mark.parametrize("data", [PAIR, TensorDataset(*PAIR), Shard(PAIR, torch.arange(10))])
def test_batches_hold_the_examples_in_the_order_given(data: Any) -> None:
    """From tensors, a data set or a part; the last batch is what is left."""
    assert taken(data, 2, [4, 1, 3, 0, 2]) == [[4, 1], [3, 0], [2]]
    targets = [batch[1].tolist() for batch in batches(data, 3, [1, 2, 5])]
    assert targets == [[1, 2, 2]]


@pytest.mark.parametrize("data", [PAIR, TensorDataset(*PAIR), Shard(PAIR, torch.arange(10))])
def test_an_example_of_a_part_is_one_of_the_whole(data: Any) -> None:
    """Without an axis for the batch, so that a `Subset` or a data set of one's own may lie over a part."""
    part = Subset(Shard(data, torch.tensor([9, 8, 7])), [1, 2])
    inputs, targets = next(batches(part, 2, [0, 1]))
    assert inputs.tolist() == [[8.0], [7.0]]
    assert targets.tolist() == [2, 1]


def test_a_part_of_a_part_counts_in_its_own_indices() -> None:
    """Its second is the whole's ninth, of a pair and of a data set alike."""
    inner = Shard(PAIR, torch.tensor([9, 8, 7, 6]))
    outer = Shard(inner, torch.tensor([3, 1]))
    assert taken(outer, 2, [0, 1]) == [[6, 8]]
    assert len(outer) == size(outer) == 2
    inputs, target = outer[1]
    assert (inputs.item(), target.item()) == (8.0, 2)
    assert classes(outer) == {"0": 1, "2": 1}


def test_dealing_makes_one_client_of_each_part() -> None:
    """Names sort as numbers do; or they are one's own."""
    dealt = deal(PAIR, partition.iid(10, 10, seed=0))
    assert list(dealt) == [f"client-{number}" for number in range(10)]
    assert len(deal(PAIR, [torch.arange(1)] * 11)) == 11
    assert next(iter(deal(PAIR, [torch.arange(1)] * 11))) == "client-00"
    assert list(deal(PAIR, [torch.arange(2), torch.arange(3)], ["north", "south"])) == ["north", "south"]
    assert taken(deal(PAIR, [[3, 1]])["client-0"], 2, [0, 1]) == [[3, 1]]


@pytest.mark.parametrize(
    ("parts", "names", "said"),
    [
        ([torch.arange(2)], ["a", "b"], "2 distinct names for 1 parts"),
        ([torch.arange(2)] * 2, ["a", "a"], "1 distinct names for 2 parts"),
        ([torch.arange(0)], None, "the part of client-0 is empty"),
        ([[]], None, "the part of client-0 is empty"),
        ([torch.ones(10, dtype=torch.bool)], None, r"the part of client-0 is torch.bool .* mask.nonzero"),
        ([torch.tensor([0.0, 1.0])], None, "expected indices of shape"),
        ([torch.tensor([10])], None, "expected indices from 0 to 9"),
        ([torch.tensor([-1])], None, "expected indices from 0 to 9"),
    ],
)
def test_a_deal_that_doesnt_fit_is_refused(parts: list[torch.Tensor], names: list[str] | None, said: str) -> None:
    """Names and indices are checked before anything trains."""
    with pytest.raises(InputError, match=said):
        deal(PAIR, parts, names)


@pytest.mark.parametrize(
    ("clients", "error", "said"),
    [
        ({}, InputError, "expected a mapping of ids to data"),
        ([PAIR], InputError, "clients is list"),
        ({"a/b": PAIR}, IdError, "a/b"),
        ({"a": (PAIR[0][:0], PAIR[1][:0])}, InputError, "client 'a' has no examples"),
        ({"a": (PAIR[0], PAIR[1][:3])}, InputError, "10 inputs and 3 targets"),
        ({"a": (PAIR[0],)}, InputError, "data is a tuple"),
        ({"a": 7}, InputError, "data is a int"),
    ],
)
def test_clients_that_cant_be_simulated_are_refused(clients: Any, error: type[Exception], said: str) -> None:
    """Each with what was expected."""
    with pytest.raises(error, match=said):
        localdata.check_clients(clients)


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([{"pixels": 1.0, "label": 0}], "example 0 of a list is a dict: expected a pair"),
        ([(1.0, 0, "site-a")], "example 0 of a list is 3 parts: expected a pair"),
        (list(PAIR), "example 0 of a list is a Tensor: expected a pair"),
        ([(torch.ones(1), 0), (torch.ones(2), 0)], "stack expects each tensor to be equal size.* pad them"),
        ([(object(), 0)], "found <class 'object'>.* convert"),
        ([({"text": 1.0}, 0), ({"image": 1.0}, 0)], "can't be put together .*'text'"),
    ],
)
def test_what_makes_no_batch_is_refused(examples: list[Any], said: str) -> None:
    """A data set's usual dicts and triples, and examples of unlike shapes: by what was found, and how to mend it."""
    with pytest.raises(InputError, match=said):
        list(batches(examples, 2, range(len(examples))))


def test_a_stream_is_refused_though_it_has_a_length() -> None:
    """It can't be indexed."""

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

        def __len__(self) -> int:
            return 3

    with pytest.raises(InputError, match=r"data is a Stream: .* a list of what a stream yields"):
        localdata.check_clients({"a": Stream()})


def test_an_order_is_every_example_once() -> None:
    """It follows from the generator alone."""
    orders = [order(PAIR, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] == orders[1] != orders[2]


def test_classes_are_counted_where_there_are_any() -> None:
    """Real targets, targets of several numbers and data sets have none at hand."""
    assert classes(PAIR) == {"0": 4, "1": 3, "2": 3}
    assert classes((PAIR[0], PAIR[0].flatten())) is None
    assert classes((PAIR[0], PAIR[1].view(5, 2))) is None
    assert classes(TensorDataset(*PAIR)) is None
