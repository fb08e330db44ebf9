"""What the seal of a batch says of its parts: the chains of buffers, and the weight.

Autograd reaches calls in any order; what counts here is the order of their forwards. A call that
several parts have (a retained graph, two losses of one forward) counts its examples once.
"""

from __future__ import annotations

from typing import Any

from splitfed.client.buffers import is_counted
from splitfed.protocol.messages import Chain


def chains_of(parts: list[Any]) -> tuple[tuple[Chain, ...], float]:
    """The chains of a batch, one for each `client(...)` call that it reaches, and its weight."""
    if len(parts) == 1:
        return _only_chain(parts[0].origin)
    last = _last_parts(parts)
    by_scope = _samples_by_scope(last)
    places: dict[int, dict[int, int]] = {}
    for origin, number in last:
        if origin.chain is not None and not is_counted(origin):
            places.setdefault(id(origin.chain), {})[origin.place] = number
    # Those that continue others come after them.
    if any(len(others) > 1 for others in places.values()):
        last.sort(key=lambda pair: pair[0].place)
    chains = []
    for origin, number in last:
        share = origin.num_samples
        scope = _weigher(origin)
        if scope is not None:
            # A block says what its calls count together: each gets its part of that.
            share = scope.said * origin.num_samples / by_scope[id(scope)]
        # A retained graph passes again, but its forward moved the buffers only once.
        if not is_counted(origin):
            after = None
            if origin.chain is not None:
                after = origin.chain.after(origin.place, places[id(origin.chain)])
            chains += _chain(parts, origin, share, number, after)
    total = 0.0
    for key, scope in {id(_weigher(origin)): _weigher(origin) for origin, _ in last}.items():
        total += by_scope[key] if scope is None else scope.said
    return tuple(chains), total


def _only_chain(origin: Any) -> tuple[tuple[Chain, ...], float]:
    """The same, of the ordinary batch of one part."""
    scope = _weigher(origin)
    # A float in any case: bytes and digests tell 7 from 7.0.
    samples = 0.0 + (origin.num_samples if scope is None else scope.said)
    if is_counted(origin):
        return (), samples
    after = None if origin.chain is None else origin.chain.after(origin.place, {})
    return (Chain(samples, 0, after),), samples


def _chain(
    parts: list[Any], origin: Any, share: float, number: int, after: int | None
) -> list[Chain]:
    first = min(
        (place for place, call in enumerate(parts) if call.origin is origin),
        key=lambda place: parts[place].number,
    )
    if after != -1 or first == number:
        return [Chain(share, number, after)]
    # What the last of its calls began with is the first one's end.
    return [Chain(share / 2, first, after), Chain(share / 2, number, first)]


def _last_parts(parts: list[Any]) -> list[tuple[Any, int]]:
    """Each `client(...)` call among the parts, with the part whose forward came last in it."""
    last: dict[int, tuple[Any, int]] = {}
    for number, call in enumerate(parts):
        held = last.get(id(call.origin))
        # Autograd reaches the calls in reverse, but not always: what counts is the forward order.
        if held is None or parts[held[1]].number < call.number:
            last[id(call.origin)] = (call.origin, number)
    return list(last.values())


def _weigher(origin: Any) -> Any:
    """The block that says what a call counts; `None` if it counts by itself."""
    return None if origin.scope is None else origin.scope.weigher


def _samples_by_scope(last: list[tuple[Any, int]]) -> dict[int, float]:
    """What the calls of each `client.batch(...)` block count by themselves, by the block's id."""
    samples: dict[int, float] = {}
    for origin, _ in last:
        key = id(_weigher(origin))
        samples[key] = samples.get(key, 0.0) + origin.num_samples
    return samples
