"""A client's random stream: its own, wherever and whenever it runs."""

from __future__ import annotations

import torch

from splitfed.simulation.rng import Stream, derive, uniform


def test_a_stream_follows_from_its_words_alone() -> None:
    """The same words draw the same, other words another; what was drawn in between by others doesn't matter."""
    drawn = []
    for words in ((0, "a"), (0, "b"), (0, "a")):
        stream = Stream(*words)
        with stream.active():
            first = torch.rand(3)
        torch.rand(5)
        with stream.active():
            drawn.append(torch.cat([first, torch.rand(3)]))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_the_caller_draws_as_if_no_stream_had_been() -> None:
    """The process's generator is put back, also if the block raises."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    try:
        with Stream("x").active():
            torch.rand(100)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.rand(2), expected)


def test_the_order_of_examples_has_a_generator_of_its_own() -> None:
    """What dropout draws doesn't change which example comes next."""
    quiet, loud = Stream(1), Stream(1)
    with loud.active():
        torch.rand(9)
    assert torch.equal(torch.randperm(20, generator=quiet.generator), torch.randperm(20, generator=loud.generator))


def test_seeds_are_63_bits_and_draws_lie_in_the_unit_interval() -> None:
    """Words are told apart, not run together: ("ab", "c") isn't ("a", "bc")."""
    assert derive("ab", "c") != derive("a", "bc")
    assert all(0 <= derive(number) < 2**63 for number in range(50))
    draws = [uniform("u", number) for number in range(1000)]
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert abs(sum(draws) / 1000 - 0.5) < 0.05
