"""What virtual clients own: parts of one set, and the batches made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from splitfed.errors import IdError, InputError
from splitfed.simulation import data as localdata
from splitfed.simulation import partition
from splitfed.simulation.data import Batch, Shard, batches, classes, deal, is_loader, known_size, load, order, size
from splitfed.simulation.settings import LocalTraining

PAIR = (torch.arange(10).float().view(10, 1), torch.arange(10) % 3)


def taken(data: Any, batch_size: int, indices: list[int]) -> list[list[int]]:
    """The examples of each batch, by their value."""
    local = LocalTraining(batch_size=batch_size)
    return [batch.args[0].flatten().int().tolist() for batch in batches(data, local, indices)]


@pytest.mark.parametrize("data", [PAIR, TensorDataset(*PAIR), Shard(PAIR, torch.arange(10))])
def test_batches_hold_the_examples_in_the_order_given(data: Any) -> None:
    """From tensors, a data set or a part; the last batch is what is left."""
    assert taken(data, 2, [4, 1, 3, 0, 2]) == [[4, 1], [3, 0], [2]]
    targets = [batch.target.tolist() for batch in batches(data, LocalTraining(batch_size=3), [1, 2, 5])]
    assert targets == [[1, 2, 2]]


@pytest.mark.parametrize("data", [PAIR, TensorDataset(*PAIR), Shard(PAIR, torch.arange(10))])
def test_an_example_of_a_part_is_one_of_the_whole(data: Any) -> None:
    """Without an axis for the batch, so that a `Subset` or a data set of one's own may lie over a part."""
    part = Subset(Shard(data, torch.tensor([9, 8, 7])), [1, 2])
    batch = next(batches(part, LocalTraining(batch_size=2), [0, 1]))
    assert batch.args[0].tolist() == [[8.0], [7.0]]
    assert batch.target.tolist() == [2, 1]


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
        ({"a": (PAIR[0], PAIR[1], PAIR[1][:3])}, InputError, "tensors of 10, 10, 3 examples: expected as many"),
        ({"a": (PAIR[0], 7)}, InputError, "a int is in it: expected tensors"),
        ({"a": {"x": torch.tensor(1.0)}}, InputError, "a scalar tensor is in it"),
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
        ([{"pixels": 1.0, "label": 0}], r"has the keys \['label', 'pixels'\]: expected 'labels', which loss_fn gets"),
        ([{"labels": 1}], "expected 'labels', which loss_fn gets, and others for the model"),
        ([(1.0,)], "example 0 of a list is 1 part: expected a pair"),
        ([("site-a", "site-b", 1)], r"no tensor is among the inputs of a batch \((list|tuple), \w+, Tensor\)"),
        (list(PAIR), "example 0 of a list is a Tensor: expected a pair"),
        ([(torch.ones(1), 0), (torch.ones(2), 0)], "stack expects each tensor to be equal size.* pad them"),
        ([(object(), 0)], "found <class 'object'>.* convert"),
        ([({"text": 1.0}, 0), ({"image": 1.0}, 0)], "can't be put together .*'text'"),
    ],
)
def test_what_makes_no_batch_is_refused(examples: list[Any], said: str) -> None:
    """A data set's usual dicts and triples, and examples of unlike shapes: by what was found, and how to mend it."""
    with pytest.raises(InputError, match=said):
        list(batches(examples, LocalTraining(batch_size=2), range(len(examples))))


class Stream(IterableDataset[Any]):
    """So many pairs of a number and its parity, in order."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Any:
        return ((torch.tensor([float(i)]), i % 2) for i in range(self.number))


class Measured(Stream):
    """One that knows its length."""

    def __len__(self) -> int:
        return self.number


def test_a_stream_is_batched_in_its_own_order() -> None:
    """In each pass from its beginning; its length is known only if it says so."""
    for stream in (Stream(5), Measured(5)):
        assert localdata.check_clients({"a": stream}) == ["a"]
        assert order(stream, torch.Generator()) is None
        for _ in range(2):
            found = [batch.args[0].flatten().tolist() for batch in batches(stream, LocalTraining(batch_size=2))]
            assert found == [[0, 1], [2, 3], [4]]
    assert (localdata.known_size(Stream(5)), localdata.known_size(Measured(5))) == (None, 5)
    assert localdata.sizes({"a": Measured(5)}, "pacing") == {"a": 5}
    with pytest.raises(
        InputError, match=r"pacing needs to know how many .*Stream of 'a' has no length: give it a __len"
    ):
        localdata.sizes({"a": Stream(5)}, "pacing")
    with pytest.raises(InputError, match=r"data is a Stream: .* a list of what a stream yields"):
        deal(Stream(5), [[0]])


MASKED = (torch.arange(6).view(3, 2), torch.tensor([[1, 1], [1, 0], [1, 1]]), torch.tensor([1, 0, 1]))
NAMED = {"ids": MASKED[0], "extra": {"mask": MASKED[1]}, "labels": MASKED[2]}


def test_samples_of_several_parts_become_arguments_or_keywords() -> None:
    """The last part of a tuple is the target; of a dict it has a key. In memory, as a data set, and as a part."""
    rows = [tuple(part[i] for part in MASKED) for i in range(3)]
    for data in (MASKED, TensorDataset(*MASKED), rows, Shard(MASKED, torch.arange(3))):
        (batch,) = batches(data, LocalTraining(), [2, 0])
        assert [part.tolist() for part in batch.args] == [[[4, 5], [0, 1]], [[1, 1], [1, 1]]]
        assert (batch.kwargs, batch.target.tolist(), batch.num_samples) == ({}, [1, 1], 2)
    named = [{"ids": ids, "extra": {"mask": mask}, "labels": label} for ids, mask, label in rows]
    for source in (NAMED, named, Shard(NAMED, torch.arange(3)), Subset(Shard(NAMED, torch.arange(3)), [0, 1, 2])):
        (batch,) = batches(source, LocalTraining(), [2, 0])
        assert batch.args == ()
        assert batch.kwargs["ids"].tolist() == [[4, 5], [0, 1]]
        assert batch.kwargs["extra"]["mask"].tolist() == [[1, 1], [1, 1]]
        assert batch.target.tolist() == [1, 1]
    (batch,) = batches(NAMED, LocalTraining(target="ids"), [1])
    assert (sorted(batch.kwargs), batch.target.tolist()) == (["extra", "labels"], [[2, 3]])
    assert size(MASKED) == size(NAMED) == 3
    assert classes(MASKED) == classes(NAMED) == {"0": 1, "1": 2}
    assert classes(NAMED, "ids") is None


def test_a_pair_may_hold_tensors_of_its_own() -> None:
    """The model then gets the dict as its one argument, as from a data set of such pairs."""
    (batch,) = batches(({"ids": MASKED[0]}, MASKED[2]), LocalTraining(), [1])
    assert [{name: part.tolist() for name, part in arg.items()} for arg in batch.args] == [{"ids": [[2, 3]]}]


def test_a_collate_fn_makes_the_batch_of_samples_of_any_kind() -> None:
    """Of strings as of tensors in memory; what it returns is checked."""
    words = ["aa", "b", "ccc"]

    def lengths(samples: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[len(word)] for word in samples]), torch.zeros(len(samples))

    (batch,) = batches(words, LocalTraining(collate_fn=lengths), [2, 0])
    assert (batch.args[0].tolist(), batch.num_samples) == ([[3], [2]], 2)
    stacked = LocalTraining(collate_fn=lambda rows: [torch.stack(part) for part in zip(*rows, strict=True)])
    (batch,) = batches(PAIR, stacked, [4, 1])
    assert (batch.args[0].flatten().tolist(), batch.target.tolist()) == ([4.0, 1.0], [1, 1])
    for made, said in (
        (None, "collate_fn returned a NoneType: expected"),
        (torch.ones(1), "collate_fn returned a Tensor: expected"),
        ({"text": "a", "labels": 1}, "no tensor is among the inputs of a batch .text: str, labels: int"),
    ):
        with pytest.raises(InputError, match=said):
            list(batches(PAIR, LocalTraining(collate_fn=lambda _, made=made: made)))


def test_a_smaller_last_batch_can_be_left_out() -> None:
    """Of a stream too; a client that has no whole batch is refused."""
    local = LocalTraining(batch_size=4, drop_last=True)
    for data in (PAIR, TensorDataset(*PAIR), Stream(10)):
        assert [batch.num_samples for batch in batches(data, local)] == [4, 4]
    assert (localdata.num_batches(10, local), localdata.num_batches(10, LocalTraining(batch_size=4))) == (2, 3)
    with pytest.raises(InputError, match=r"client 'a' has 10 examples, which drop_last leaves without a batch of 11"):
        localdata.check_clients({"a": PAIR}, LocalTraining(batch_size=11, drop_last=True))


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


class Counted:
    """A loader that says how many examples it will bring."""

    def __len__(self) -> int:
        return 10

    def __call__(self) -> Any:
        """The examples."""
        return PAIR


def test_a_loader_is_called_for_its_data() -> None:
    """It has a length if it says so; data that could be called stays data."""
    assert load(lambda: PAIR) is load(PAIR) is load(Counted()) is PAIR
    assert (known_size(Counted()), known_size(lambda: PAIR), classes(Counted())) == (10, None, None)
    assert [is_loader(source) for source in (Counted(), PAIR, TensorDataset(*PAIR), Shard(*PAIR))] == [
        True,
        *[False] * 3,
    ]
    with pytest.raises(InputError, match="a loader returned a type: expected a client's data"):
        load(lambda: Counted)
    with pytest.raises(InputError, match="data is a NoneType"):
        load(lambda: None)


class Pair(NamedTuple):
    """A target of two parts."""

    label: torch.Tensor
    name: str


def test_a_batch_is_moved_with_all_that_it_holds() -> None:
    """Tensors in tuples, lists, dicts and named tuples; without a device it is the same object."""
    row = torch.ones(2)
    batch = Batch((row, [row]), {"mask": row}, Pair(row, "x"), 2)
    assert batch.on(None) is batch
    there = batch.on(torch.device("meta"))
    tensors = (there.args[0], there.args[1][0], there.kwargs["mask"], there.target.label)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (there.target.name, there.num_samples) == ("x", 2)
