"""Seeds: drawn one-way from the client's generator, and generators that are always put back."""

from __future__ import annotations

import hashlib
import threading

import pytest
import torch

from splitfed.model.rng import Seed, Turns, seeded


def stream() -> list[float]:
    """The next numbers of the default generator, which it then hasn't drawn."""
    state = torch.get_rng_state()
    numbers = torch.rand(4).tolist()
    torch.set_rng_state(state)
    return numbers


def test_a_seed_is_the_hash_of_a_draw() -> None:
    """The first 8 bytes of the SHA-256 of 64 drawn bits: who sees it can't tell the generator's next number."""
    state = torch.get_rng_state()
    seed = Seed()
    torch.set_rng_state(state)
    drawn = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    assert seed.value == int.from_bytes(hashlib.sha256(drawn.to_bytes(8, "little", signed=True)).digest()[:8], "little")
    assert seed.value != drawn % 2**64


def test_each_draw_is_another_seed_and_a_seeded_run_repeats() -> None:
    """Of 200 seeds no two are equal, all fit in 64 bits, some need the highest, and the same start gives the same."""
    seeds = [Seed().value for _ in range(200)]
    assert len(set(seeds)) == 200
    assert 2**63 < max(seeds) < 2**64
    assert min(seeds) >= 0
    torch.manual_seed(0)
    assert [Seed().value for _ in range(200)] == seeds


def test_a_seed_that_wasnt_needed_is_put_back() -> None:
    """The client's stream goes on as if nothing had been drawn; without that it has moved on."""
    before = stream()
    seed = Seed()
    assert stream() != before
    seed.put_back()
    assert stream() == before


def test_a_block_runs_under_its_seed_and_leaves_no_trace() -> None:
    """Equal seeds draw equal numbers, whatever was drawn before; the generator is where it was."""
    with seeded(5):
        first = torch.rand(3)
    before = stream()
    torch.rand(7)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
    with seeded(6):
        assert not torch.equal(torch.rand(3), first)
    torch.manual_seed(0)
    assert stream() == before


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_is_taken(seed: int) -> None:
    """The whole range repeats, the ends of it too (torch's CPU generator itself tells 2³² of them apart)."""
    with seeded(seed):
        own = torch.rand(3)
    with seeded(seed):
        assert torch.equal(torch.rand(3), own)
    with seeded(seed ^ 1):
        assert not torch.equal(torch.rand(3), own)


def test_the_generator_is_put_back_also_after_an_error() -> None:
    """A body that raises costs the stream nothing."""
    before = stream()
    with pytest.raises(ZeroDivisionError), seeded(3):
        assert torch.rand(2).sum() / 0 == 1 // 0
    assert stream() == before


@pytest.mark.parametrize(
    ("draw", "drew"),
    [
        (lambda: None, False),
        (lambda: torch.ones(3).sum(), False),
        (lambda: torch.rand(0), False),
        (lambda: torch.rand(1), True),
        (lambda: torch.nn.functional.dropout(torch.ones(9), 0.5, training=True), True),
        (lambda: torch.nn.functional.dropout(torch.ones(9), 0.5, training=False), False),
        (lambda: torch.randperm(3), True),
        (lambda: torch.rand(3, generator=torch.Generator().manual_seed(1)), False),
    ],
    ids="nothing arithmetic rand_of_none rand dropout dropout_in_eval randperm own_generator".split(),
)
def test_a_block_says_whether_it_drew(draw: object, drew: bool) -> None:
    """From the default generator; another one is none of ours."""
    with seeded(11) as draws:
        draw()  # type: ignore[operator]
    assert draws.drew is drew


def test_blocks_nest() -> None:
    """An inner block costs the outer one nothing, and isn't counted as a draw of it."""
    with seeded(1):
        expected = torch.rand(2)
    with seeded(1) as outer:
        with seeded(2) as inner:
            torch.rand(5)
        assert inner.drew
        own = torch.rand(2)
    assert torch.equal(own, expected)
    assert outer.drew


def queued(turns: Turns, order: list[str], names: list[str]) -> list[threading.Thread]:
    """A thread for each name that waits for a turn of it, in this order."""
    threads = []
    for count, name in enumerate(names, 1):

        def run(name: str = name) -> None:
            with turns.of(name):
                order.append(name)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        while sum(map(len, turns._waiting.values())) < count:
            pass
    return threads


def test_clients_take_turns_and_not_their_requests() -> None:
    """Eight requests of one wait, then one each of two others: each of those waits for one of it at most."""
    turns, order = Turns(threading.RLock()), list[str]()
    with turns.of("many"):
        threads = queued(turns, order, [*["many"] * 8, "one", "two"])
    for thread in threads:
        thread.join()
    assert order == ["one", "many", "two", *["many"] * 7]


def test_a_thread_that_has_the_lock_needs_no_turn() -> None:
    """A body that calls another server, in its own turn."""
    lock = threading.RLock()
    turns = Turns(lock)
    with turns.of("a"), lock, turns.of("b"), turns.of("a"):
        assert not turns._waiting
    with turns.of("c"):
        assert turns._is_taken
    assert not turns._is_taken


def test_a_turn_ends_with_an_error() -> None:
    """The next one begins."""
    turns = Turns(threading.RLock())
    with pytest.raises(KeyError), turns.of("a"):
        raise KeyError
    with turns.of("b"):
        pass


def test_whoever_stops_waiting_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a thread that waits for its turn: the turn isn't handed to it, and the next one gets it."""

    class Gate:
        acquired = 0

        def acquire(self) -> bool:
            self.acquired += 1
            if self.acquired == 2:  # the first time its own turn closes it
                raise KeyboardInterrupt
            return True

    turns, order = Turns(threading.RLock()), list[str]()
    with turns.of("a"):
        with monkeypatch.context() as patch:
            patch.setattr(threading, "Lock", Gate)
            with pytest.raises(KeyboardInterrupt):
                turns.take("b")
        assert not turns._waiting
        threads = queued(turns, order, ["c"])
    for thread in threads:
        thread.join()
    assert order == ["c"]
