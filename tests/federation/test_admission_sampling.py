"""Sampling is a function of seed, round and ids, and fair."""

from __future__ import annotations

import uuid
from collections import Counter

import pytest
from coalition import Coalition

from splitfed import InputError
from splitfed.federation.admission import check_sample_size, sample, sample_size

IDS = [f"c{number}" for number in range(20)]


def test_the_order_of_the_ids_is_nothing_to_it() -> None:
    """The same set gives the same sample, sorted, in every process and version of Python."""
    assert sample(IDS, 3, seed=0, number=1) == sample(reversed(IDS), 3, seed=0, number=1) == ("c15", "c2", "c6")
    assert sample(IDS, 3, seed=0, number=2) != sample(IDS, 3, seed=0, number=1) != sample(IDS, 3, seed=1, number=1)


def test_all_if_there_are_fewer() -> None:
    """Nobody is drawn twice."""
    assert sample(["b", "a", "b"], 5, seed=0, number=1) == ("a", "b")


def test_each_client_is_drawn_about_as_often_as_another() -> None:
    """Over 2,000 rounds of 5 of 20, each is in 500, give or take five standard deviations of 19."""
    drawn = Counter(name for number in range(2_000) for name in sample(IDS, 5, seed=7, number=number))
    assert sum(drawn.values()) == 10_000
    assert all(abs(drawn[name] - 500) < 100 for name in IDS)


def test_in_proportion_to_data_one_is_drawn_as_often_as_its_share() -> None:
    """Of 2,000 draws, 1 in 10, 3 in 10 and 6 in 10; of two that are drawn, the second by what is left."""
    sizes = {"a": 1, "b": 3, "c": 6}
    ones = Counter(sample(sizes, 1, seed=5, number=number, sizes=sizes)[0] for number in range(2_000))
    assert all(abs(ones[name] - 200 * size) < 5 * 22 for name, size in sizes.items())
    twos = Counter(sample(sizes, 2, seed=5, number=number, sizes=sizes) for number in range(2_000))
    # Both orders of b and c: 3/10 · 6/7 + 6/10 · 3/4.
    assert abs(twos["b", "c"] - 2_000 * (0.3 * 6 / 7 + 0.6 * 3 / 4)) < 5 * 21
    assert sample(sizes, 3, seed=5, number=1, sizes=sizes) == ("a", "b", "c")


def test_in_proportion_too_who_joins_displaces_at_most_one() -> None:
    """One that is in no list counts as the mean; the order of ids is nothing to it."""
    sizes = {name: 1 + number for number, name in enumerate(IDS)}
    for number in range(50):
        before = sample(IDS, 5, seed=0, number=number, sizes=sizes)
        assert before == sample(reversed(IDS), 5, seed=0, number=number, sizes=sizes)
        after = sample([*IDS, "new"], 5, seed=0, number=number, sizes=sizes)
        assert after == sample([*IDS, "new"], 5, seed=0, number=number, sizes={**sizes, "new": 10.5})
        assert len(set(before) - set(after)) <= 1


def test_a_federation_draws_by_the_sizes_it_is_given() -> None:
    """A mapping of ids to sizes is one of ids where nobody asks for the sizes; without sizes there is no proportion."""
    sizes = {"a": 1, "b": 10_000}
    url = f"memory://{uuid.uuid4()}"
    run = Coalition(url, clients=sizes, clients_per_round=1, sampling="data")
    plan = run.federation.open()
    assert plan is not None
    assert plan.sampled == ("b",)
    assert Coalition(f"memory://{uuid.uuid4()}", clients=sizes).federation.open() is not None
    for clients, said in (
        (["a", "b"], "sampling='data' needs to know .* a mapping of ids to numbers"),
        ({"a": 0}, "the size of client 'a' is 0: expected a finite number above 0"),
    ):
        with pytest.raises(InputError, match=said):
            Coalition(f"memory://{uuid.uuid4()}", clients=clients, sampling="data")
    with pytest.raises(InputError, match="sampling is 'size': expected one of 'uniform', 'data'"):
        Coalition(f"memory://{uuid.uuid4()}", clients=sizes, sampling="size")


def test_who_joins_displaces_at_most_one() -> None:
    """A sample of ids and one more has all but one of the sample without it."""
    for number in range(50):
        before, after = sample(IDS, 5, seed=0, number=number), sample([*IDS, "new"], 5, seed=0, number=number)
        assert len(set(before) - set(after)) <= 1


@pytest.mark.parametrize(
    ("clients_per_round", "known", "least", "expected"),
    [(None, 7, 1, 7), (3, 7, 1, 3), (30, 7, 1, 7), (0.1, 30, 1, 3), (0.1, 31, 1, 4), (0.01, 7, 2, 2), (1.0, 7, 1, 7)],
)
def test_how_many(clients_per_round: float | None, known: int, least: int, expected: int) -> None:
    """A share is rounded up, and never below the minimum; nobody is drawn who isn't there."""
    assert sample_size(clients_per_round, known, least) == expected


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.1, True, "all", 1])
def test_what_is_refused(wrong: object) -> None:
    """A number below the minimum (2 here), a share out of (0, 1], and what is neither."""
    with pytest.raises(InputError, match="clients_per_round"):
        check_sample_size(wrong, 2)  # type: ignore[arg-type]


def test_a_number_above_the_known_clients_is_said_once() -> None:
    """Clients may come later, so it is no error: the round has all that are known; one warning names both numbers."""
    run = Coalition(f"memory://{uuid.uuid4()}", clients=["a", "b"], clients_per_round=3)
    with pytest.warns(
        UserWarning, match=r"clients_per_round is 3, but only 2 clients are known.*min_clients=3"
    ) as given:
        plan = run.federation.open()
    assert plan is not None
    assert plan.sampled == ("a", "b")
    assert len(given) == 1
    assert given[0].filename == __file__
    run.federation.close()
    run.federation.open()  # said already: here a warning would be an error


def test_a_number_that_later_clients_make_good_is_not_said() -> None:
    """With as many known by the time that a round opens, and with a minimum to wait for, there is nothing to say."""
    run = Coalition(f"memory://{uuid.uuid4()}", clients=["a"], clients_per_round=2, min_clients=2)
    assert run.federation.open() is None
    run.pull("b")
    plan = run.federation.open()
    assert plan is not None
    assert plan.sampled == ("a", "b")


def test_the_warning_can_be_an_error() -> None:
    """Then no round is opened, by which clients would be bound."""
    run = Coalition(f"memory://{uuid.uuid4()}", clients=["a"], clients_per_round=2)
    with pytest.raises(UserWarning, match="clients_per_round is 2"):
        run.federation.open()
    assert run.store.rounds().newest() == 0
