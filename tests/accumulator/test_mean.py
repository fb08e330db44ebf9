"""The streaming mean: hand-worked numbers, bits, order, and what it refuses."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from splitfed.accumulator.mean import StreamingMean
from splitfed.errors import InputError, UnsupportedError
from splitfed.model import adding
from splitfed.protocol.ids import BatchId

A0, A1, B0 = BatchId("a", 0, 0), BatchId("a", 0, 1), BatchId("b", 0, 0)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal noise, the same for the same seed."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def bits(value: Tensor) -> bytes:
    """The bytes of a tensor's values."""
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return real.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_mean_is_weighted_by_samples() -> None:
    """(1·[1, 2] + 3·[5, 10]) / 4 = [4, 8]."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([1.0, 2.0])}, num_samples=1)
    mean.add(B0, {"w": torch.tensor([5.0, 10.0])}, num_samples=3)
    assert mean.mean()["w"].tolist() == [4.0, 8.0]
    assert (mean.num_batches, mean.num_samples) == (2, 4.0)


def test_staleness_damps_the_numerator_only() -> None:
    """(2·1·4 + 2·0.5·4) / (2 + 2) = 3: the denominator stays Σ nᵢ."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([4.0])}, num_samples=2)
    mean.add(A1, {"w": torch.tensor([4.0])}, num_samples=2, weight=0.5)
    assert mean.mean()["w"].tolist() == [3.0]


def test_each_loss_scale_is_divided_out() -> None:
    """(1·800/100 + 1·6/3) / 2 = 5, each batch by its own λ."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([800.0])}, num_samples=1, loss_scale=100.0)
    mean.add(A1, {"w": torch.tensor([6.0])}, num_samples=1, loss_scale=3.0)
    assert mean.mean()["w"].tolist() == [5.0]


def test_a_parameter_that_some_batch_reached_counts_zero_for_the_others() -> None:
    """The second batch of three alone reaches v: 4·6/8 = 3."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.ones(1)}, num_samples=2)
    mean.add(A1, {"w": torch.ones(1), "v": torch.full((1,), 6.0)}, num_samples=4)
    mean.add(B0, {"w": torch.ones(1)}, num_samples=2)
    assert {name: value.item() for name, value in mean.mean().items()} == {"w": 1.0, "v": 3.0}


def test_a_parameter_that_no_batch_reached_is_absent() -> None:
    """Its .grad stays None, so that an optimizer leaves it alone; batches without gradients count as samples."""
    mean = StreamingMean()
    assert mean.mean() == {}
    mean.add(A0, {}, num_samples=3)
    assert mean.mean() == {}
    mean.add(A1, {"w": torch.tensor([4.0])}, num_samples=1)
    assert mean.mean()["w"].tolist() == [1.0]


def test_a_zero_weight_silences_a_batch_without_dropping_its_samples() -> None:
    """(1·8·0 + 1·8·1) / 2 = 4."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([8.0])}, num_samples=1, weight=0.0)
    assert mean.mean()["w"].tolist() == [0.0]
    mean.add(A1, {"w": torch.tensor([8.0])}, num_samples=1)
    assert mean.mean()["w"].tolist() == [4.0]


def test_small_batches_equal_the_one_large_batch() -> None:
    """Seven unequal parts of a batch give the gradient of the whole, to float64 rounding."""
    model, loss = nn.Linear(5, 3).double(), nn.MSELoss()
    x, y = noise(40, 5, dtype=torch.float64), noise(40, 3, dtype=torch.float64, seed=1)
    parameters = dict(model.named_parameters())

    def gradients(rows: slice) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss(model(x[rows]), y[rows]), list(parameters.values()))
        return dict(zip(parameters, found, strict=True))

    mean, starts = StreamingMean(), [0, 1, 3, 6, 10, 20, 39, 40]
    for seq, (start, stop) in enumerate(itertools.pairwise(starts)):
        mean.add(BatchId("a", 0, seq), gradients(slice(start, stop)), num_samples=stop - start)
    for name, whole in gradients(slice(0, 40)).items():
        torch.testing.assert_close(mean.mean()[name], whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX)
@pytest.mark.parametrize("num_samples", [1, 3, 0.1, 7e22])
def test_one_batch_is_its_gradient_bit_for_bit(dtype: torch.dtype, num_samples: float) -> None:
    """n·g/n isn't always g in floating point, but the mean of one batch is, with its zeros' signs."""
    gradient = noise(1001, dtype=dtype)
    gradient[:3] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny], dtype=dtype)
    mean = StreamingMean()
    mean.add(A0, {"w": gradient}, num_samples=num_samples)
    assert mean.mean()["w"].dtype == dtype
    assert bits(mean.mean()["w"]) == bits(gradient)


def test_one_batch_with_a_power_of_two_scale_is_divided_exactly() -> None:
    """GradScaler's 2¹⁶ comes out without rounding, even from float64."""
    gradient = noise(1001, dtype=torch.float64)
    mean = StreamingMean()
    mean.add(A0, {"w": gradient}, num_samples=0.3, loss_scale=2.0**16)
    assert torch.equal(mean.mean()["w"], gradient / 2.0**16)


def test_one_batch_is_divided_by_its_scale_in_one_rounding() -> None:
    """A third is not a number to multiply with: g/3 is one division."""
    gradient, mean = noise(1001, dtype=torch.float64), StreamingMean()
    mean.add(A0, {"w": gradient}, num_samples=7, loss_scale=3.0)
    assert torch.equal(mean.mean()["w"], gradient / 3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_mean_is_the_exact_one_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    """1,000 float16 ones and a 2048 sum up exactly, where a float16 sum would have stopped counting at 2048."""
    mean = StreamingMean()
    for seq in range(1001):
        value = torch.tensor([2048.0 if seq == 0 else 1.0], dtype=dtype)
        mean.add(BatchId("a", 0, seq), {"w": value}, num_samples=1)
    expected = torch.tensor([float(Fraction(3048, 1001))], dtype=torch.float64).to(dtype)
    assert torch.equal(mean.mean()["w"], expected)


def test_complex_gradients_are_averaged_by_part() -> None:
    """(1·(2+4i) + 1·(4−2i)) / 2 = 3+i, from a lazily conjugated tensor too."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([2 - 4j]).conj()}, num_samples=1)
    mean.add(A1, {"w": torch.tensor([4 - 2j])}, num_samples=1)
    assert mean.mean()["w"].tolist() == [3 + 1j]


def test_the_sum_is_grouped_by_client_incarnation_and_32_batches() -> None:
    """The order is (a0 + a1 + ...) + (a32 + ...) + (b0 + ...), spelled out here as a plain loop over floats."""
    ids = [BatchId("a", 0, seq) for seq in range(40)] + [BatchId("a", 1, 0), BatchId("b", 0, 31), BatchId("b", 0, 32)]
    values = noise(len(ids), dtype=torch.float64, seed=3).tolist()
    counts = [random.Random(0).randrange(1, 50) for _ in ids]
    mean = StreamingMean()
    groups: dict[tuple[str, int, int], float] = {}
    for batch_id, value, count in zip(ids, values, counts, strict=True):
        mean.add(batch_id, {"w": torch.tensor([value], dtype=torch.float64)}, num_samples=count)
        key = (batch_id.client_id, batch_id.incarnation, batch_id.seq // 32)
        groups[key] = groups.get(key, 0.0) + value * count
    grouped, ungrouped = 0.0, 0.0
    for partial in groups.values():
        grouped += partial
    for value, count in zip(values, counts, strict=True):
        ungrouped += value * count
    assert (len(groups), grouped == ungrouped) == (5, False)
    assert mean.mean()["w"].item() == grouped / sum(counts)


def test_products_are_rounded_before_they_are_added() -> None:
    """Every element equals the unfused sum, wherever it lies in its tensor and however that is strided."""
    g, h = noise(7, 1001, dtype=torch.float64, seed=1), noise(7, 1001, dtype=torch.float64, seed=2)
    weights = torch.tensor([1 / 3, 0.7], dtype=torch.float64)
    expected = (g * weights[0] + h * weights[1]) / (weights[0] + weights[1])
    for change in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :1001]):
        mean = StreamingMean()
        mean.add(A0, {"w": change(g)}, num_samples=weights[0].item())
        mean.add(A1, {"w": change(h)}, num_samples=weights[1].item())
        assert torch.equal(mean.mean()["w"], expected)


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than a chunk comes out as one added whole, contiguous or not."""
    values = [noise(6, 5, 4, 3, dtype=torch.float64, seed=seed) for seed in range(3)]
    means = []
    for chunk in (adding.CHUNK, 7, 1):
        monkeypatch.setattr(adding, "CHUNK", chunk)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            mean = StreamingMean()
            for seq, value in enumerate(values):
                strided = value.contiguous(memory_format=memory_format)
                mean.add(BatchId("a", 0, seq), {"w": strided}, num_samples=seq + 1)
            means.append(mean.mean()["w"])
    assert all(torch.equal(means[0], other) for other in means[1:])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_any_shape_is_averaged(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scalars and empty tensors keep their shapes through one batch and through two."""
    mean, value = StreamingMean(), noise(*shape, dtype=dtype)
    mean.add(A0, {"w": value}, num_samples=1)
    assert torch.equal(mean.mean()["w"], value)
    mean.add(A1, {"w": 3 * value}, num_samples=1)
    torch.testing.assert_close(mean.mean()["w"], 2 * value)


def test_expanded_and_mixed_layouts_are_averaged() -> None:
    """The gradient of a sum is expanded from one element; another batch may bring it contiguous."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor(2.0).expand(2, 3)}, num_samples=1)
    mean.add(A1, {"w": torch.arange(6.0).view(3, 2).t()}, num_samples=1)
    mean.add(B0, {"w": torch.full((2, 3), 4.0)}, num_samples=2)
    assert mean.mean()["w"].tolist() == [[2.5, 3.0, 3.5], [2.75, 3.25, 3.75]]


@pytest.mark.parametrize("dtype", FLOATS + COMPLEX)
def test_gradients_are_never_changed_or_kept(dtype: torch.dtype) -> None:
    """Neither adding nor taking the mean writes to the caller's tensors, and the caller may write to them after."""
    first, second = noise(5, dtype=dtype), noise(5, dtype=dtype, seed=1).requires_grad_()
    before = bits(first), bits(second.detach())
    mean = StreamingMean()
    mean.add(A0, {"w": first}, num_samples=3)
    mean.mean()["w"].zero_()
    mean.add(A1, {"w": second}, num_samples=4)
    mean.mean()["w"].zero_()
    assert (bits(first), bits(second.detach())) == before
    expected = (3 * first + 4 * second.detach()) / 7
    first.zero_()
    result = mean.mean()["w"]
    assert not result.requires_grad
    torch.testing.assert_close(result, expected)


def test_overflow_of_the_cast_is_not_hidden() -> None:
    """A float16 mean beyond 65504 is infinite, as torch's own cast makes it."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([60000.0], dtype=torch.float16)}, num_samples=1, loss_scale=0.5)
    assert mean.mean()["w"].item() == math.inf


def test_non_finite_gradients_end_in_the_mean() -> None:
    """The mean hides nothing; to reject such a batch is the caller's part."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.tensor([math.nan, math.inf, 1.0])}, num_samples=1)
    mean.add(B0, {"w": torch.tensor([1.0, 1.0, 3.0])}, num_samples=1)
    assert str(mean.mean()["w"].tolist()) == "[nan, inf, 2.0]"


@settings(max_examples=40, deadline=None)
@given(
    ids=st.sets(
        st.builds(BatchId, st.sampled_from(["a", "B", "a-1"]), st.integers(0, 1), st.integers(0, 99)), min_size=1
    ),
    seed=st.integers(0, 2**16),
)
def test_the_mean_agrees_with_exact_arithmetic(ids: set[BatchId], seed: int) -> None:
    """Whatever the ids, weights and scales, float64 stays within 1e-12 of the mean in fractions."""
    rng, mean, numerator, samples = random.Random(seed), StreamingMean(), Fraction(0), Fraction(0)
    magnitude = Fraction(0)
    for batch_id in sorted(ids):
        value, weight, scale, n = rng.gauss(0, 1), rng.random(), rng.choice([1.0, 3.0, 1024.0]), rng.randrange(1, 65)
        tensor = torch.tensor([value], dtype=torch.float64)
        mean.add(batch_id, {"w": tensor}, num_samples=n, weight=weight, loss_scale=scale)
        term = n * Fraction(weight) * Fraction(value) / Fraction(scale)
        numerator, samples, magnitude = numerator + term, samples + n, magnitude + abs(term)
    assert mean.num_batches == len(ids)
    assert abs(Fraction(mean.mean()["w"].item()) - numerator / samples) <= magnitude / samples * Fraction(1, 10**12)


@pytest.mark.parametrize(("second", "says"), [(A0, "folded already"), (BatchId("Z", 9, 9), "out of order")])
def test_ids_come_sorted_and_once(second: BatchId, says: str) -> None:
    """An id that repeats or goes back is refused, and nothing of it counts."""
    mean = StreamingMean()
    mean.add(A0, {"w": torch.ones(1)}, num_samples=1)
    with pytest.raises(InputError, match=says):
        mean.add(second, {"w": torch.ones(1)}, num_samples=1)
    assert (mean.num_batches, mean.num_samples, mean.mean()["w"].item()) == (1, 1.0, 1.0)


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_samples": 0},
        {"num_samples": -1},
        {"num_samples": math.nan},
        {"num_samples": math.inf},
        {"weight": -0.5},
        {"weight": math.nan},
        {"weight": math.inf},
        {"loss_scale": 0.0},
        {"loss_scale": math.nan},
        {"loss_scale": -math.inf},
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, float]) -> None:
    """The message names the number, what it is and what it should be."""
    ((name, value),) = numbers.items()
    with pytest.raises(InputError, match=f"{name} of batch a/0/0 is {value!r}: expected a finite number"):
        StreamingMean().add(A0, {}, **{"num_samples": 1, **numbers})


def test_numbers_whose_product_overflows_are_refused() -> None:
    """1e300 samples at a loss scale of 1e-300 are no finite factor."""
    with pytest.raises(InputError, match="is inf"):
        StreamingMean().add(A0, {}, num_samples=1e300, loss_scale=1e-300)


@pytest.mark.parametrize("other", [torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.float64)])
def test_batches_that_disagree_about_a_parameter_are_refused_whole(other: Tensor) -> None:
    """Another shape or dtype names the parameter, and the good gradients of that batch don't count either."""
    mean = StreamingMean()
    mean.add(A0, {"v": torch.ones(1), "w": torch.ones(2)}, num_samples=1)
    with pytest.raises(InputError, match=r"gradient of 'w' in batch a/0/1 is .* expected torch.float32 \(2,\)"):
        mean.add(A1, {"v": torch.ones(1), "w": other}, num_samples=1)
    assert mean.mean()["v"].item() == 1.0
    mean.add(A1, {"v": torch.full((1,), 3.0)}, num_samples=1)
    assert mean.mean()["v"].item() == 2.0


def test_integer_gradients_are_refused() -> None:
    """Autograd makes none, so one is a mistake."""
    with pytest.raises(InputError, match=r"'w'.*torch.int64: expected float or complex"):
        StreamingMean().add(A0, {"w": torch.ones(1, dtype=torch.int64)}, num_samples=1)


def test_sparse_gradients_are_refused_with_a_way_out() -> None:
    """The message says sparse=False."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that sparse checks are off by default
        sparse = torch.eye(2).to_sparse()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        StreamingMean().add(A0, {"w": sparse}, num_samples=1)
