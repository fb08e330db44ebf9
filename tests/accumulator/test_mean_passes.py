"""Several batches in one pass of the mean, and several threads, end in the bits of one batch after the other."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from splitfed.accumulator.mean import StreamingMean
from splitfed.model import adding
from splitfed.protocol import parallel
from splitfed.protocol.ids import BatchId

SHAPES = {"w": (7, 5, 3), "v": (11,), "s": (), "c": (4, 3)}
Given = tuple[BatchId, dict[str, Tensor], dict[str, float]]


def bits(value: Tensor) -> tuple[tuple[int, ...], bytes]:
    """Strides and bytes of a tensor, so that `==` compares every bit."""
    real = torch.view_as_real(value) if value.is_complex() else value
    return value.stride(), real.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def gradient(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal noise; some of it transposed, some expanded from one element, which is -0.0."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    drawn = rng.random()
    if drawn < 0.1:
        return torch.full((1,) * len(shape), -0.0, dtype=dtype).expand(shape)
    if drawn < 0.3 and len(shape) > 1:
        value = torch.randn(shape[::-1], dtype=torch.float64, generator=generator)
        return value.permute(*range(len(shape) - 1, -1, -1)).to(dtype)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def batches(seed: int, dtype: torch.dtype) -> list[Given]:
    """Batches of several groups, of which some reach a parameter and others don't, in canonical order."""
    rng, made = random.Random(seed), []
    ids = {BatchId(rng.choice("ab"), rng.randrange(2), rng.randrange(70)) for _ in range(rng.choice([1, 2, 5, 60]))}
    for id_ in sorted(ids):
        kinds = {name: torch.complex64 if name == "c" else dtype for name in SHAPES}
        reached = [name for name in SHAPES if rng.random() < 0.75]
        gradients = {name: gradient(rng, SHAPES[name], kinds[name]) for name in reached}
        numbers = {
            "num_samples": rng.choice([1, 3, 32, 0.3]),
            "weight": rng.choice([1.0, 0.5, 0.0, 1 / 3]),
            "loss_scale": rng.choice([1.0, 65536.0, 3.0]),
        }
        made.append((id_, gradients, numbers))
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_batches_in_a_pass_ends_in_the_same_bits(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None kept, a few, or all; in chunks of any size; by one thread or two; means taken on the way change nothing."""
    if threads == 2:
        monkeypatch.setattr(parallel, "is_worth_it", lambda _: True)
    for seed in range(6):
        given = batches(seed, dtype)
        found = []
        for keeps, chunk in ((1, 1 << 14), (1, 7), (3, 100), (40, 7), (1000, 1 << 14)):
            monkeypatch.setattr(adding, "CHUNK", chunk)
            mean = StreamingMean(keeps)
            for number, (id_, gradients, numbers) in enumerate(given):
                mean.add(id_, gradients, **numbers)
                if number % 7 == keeps % 7:
                    mean.mean()
            found.append({name: bits(value) for name, value in mean.mean().items()})
        assert found[0]
        assert all(other == found[0] for other in found[1:])


def test_a_sum_equals_a_plain_loop_over_floats() -> None:
    """Python's own floats, multiplied and added one by one in canonical order, whole numbers of samples or not."""
    for counts in ([3, 32, 536_870_911], [0.1, 1 / 3, 7.7]):
        values = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        mean = StreamingMean(8)
        for seq, (value, count) in enumerate(zip(values, counts, strict=True)):
            mean.add(BatchId("a", 0, seq), {"w": value.double()}, num_samples=count)
        expected = [
            (one * counts[0] + two * counts[1] + three * counts[2]) / (counts[0] + counts[1] + counts[2])
            for one, two, three in zip(*(value.tolist() for value in values), strict=True)
        ]
        assert mean.mean()["w"].tolist() == expected


def test_gradients_that_are_kept_are_never_changed() -> None:
    """Nor are they when the mean is taken twice, and more batches follow."""
    given = batches(3, torch.float32)
    before = [{name: bits(value) for name, value in gradients.items()} for _, gradients, _ in given]
    mean = StreamingMean(1000)
    for id_, gradients, numbers in given:
        mean.add(id_, gradients, **numbers)
        mean.mean()
    assert [{name: bits(value) for name, value in gradients.items()} for _, gradients, _ in given] == before
