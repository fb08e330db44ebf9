"""What a commit makes of its batches' buffers: hand-worked numbers for each rule, and real normalisation layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from splitfed.accumulator.buffers import Rule, merge_buffers
from splitfed.errors import InputError
from splitfed.model.numerics import same_bits
from splitfed.protocol.messages import BufferUpdate


class Holder(nn.Module):
    """A module with the buffers that it is given."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's buffers by name."""
    return {name: value.detach().clone() for name, value in module.named_buffers()}


def update(before: Mapping[str, Tensor], after: Mapping[str, Tensor], num_samples: float = 1) -> BufferUpdate:
    """What changed between two copies."""
    changed = [name for name in before if not same_bits(before[name], after[name])]
    return BufferUpdate({n: after[n] for n in changed}, {n: before[n] for n in changed}, num_samples)


def merge_one(head: object, *ends: object, dtype: torch.dtype, rule: Rule | None = None) -> object:
    """Merge batches of 1, 2, 3... samples that all began at the head of a single buffer `b`."""
    tensors = [torch.tensor(value, dtype=dtype) for value in (head, *ends)]
    updates = [update({"b": tensors[0]}, {"b": end}, n) for n, end in enumerate(tensors[1:], start=1)]
    merged = merge_buffers(Holder(b=tensors[0]), {"b": tensors[0]}, updates, None if rule is None else {"b": rule})
    assert merged["b"].dtype == dtype
    return merged["b"].tolist()


def norm(momentum: float | None, mean: float = 0.0, var: float = 1.0, count: int = 0) -> nn.BatchNorm1d:
    """A BatchNorm over one feature in float64, with the given statistics."""
    layer = nn.BatchNorm1d(1, momentum=momentum, dtype=torch.float64)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(var)
    layer.num_batches_tracked.fill_(count)
    return layer


def run(layer: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """The buffers of a copy of `layer` after training forwards on `batches`."""
    layer = copy.deepcopy(layer).train()
    for batch in batches:
        layer(batch)
    return buffers(layer)


def pair(mean: float) -> Tensor:
    """A batch of two examples with the given mean and an unbiased variance of 2."""
    return torch.tensor([[mean - 1.0], [mean + 1.0]], dtype=torch.float64)


def test_no_update_leaves_the_head() -> None:
    """The result holds the same tensor objects as the head."""
    layer = norm(0.1)
    head = buffers(layer)
    merged = merge_buffers(layer, head, [])
    assert all(merged[name] is head[name] for name in head)


def test_one_update_that_began_at_the_head_is_taken_bit_for_bit() -> None:
    """Statistics, counters, flags and NaN alike; buffers that it left alone keep their objects."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3).eval())
    module.register_buffer("seen", torch.tensor(False))
    module.register_buffer("odd", torch.tensor([math.nan, -0.0]))
    head = buffers(module)
    for _ in range(3):
        module[:2](torch.randn(4, 2, 5, 5))
    module.seen.fill_(True)
    module.odd[1] = 0.0
    merged = merge_buffers(module, head, [update(head, buffers(module), 12)])
    assert all(same_bits(merged[name], value) for name, value in module.named_buffers())
    assert merged["2.running_mean"] is head["2.running_mean"]


def test_one_update_from_an_older_base_steps_from_the_head() -> None:
    """Base 0, end 1 at m = 0.5 has seen 2; a head of 4 then becomes 0.5·4 + 0.5·2 = 3."""
    layer = norm(0.5)
    stale = update(buffers(layer), run(layer, pair(2.0)))
    head = buffers(norm(0.5, mean=4.0, var=2.0, count=7))
    merged = merge_buffers(layer, head, [stale])
    assert merged["running_mean"].item() == 3.0
    assert merged["running_var"].item() == 2.0
    assert merged["num_batches_tracked"].item() == 8


def test_two_updates_are_two_steps_towards_their_weighted_mean() -> None:
    """At m = 0.5: s = 2 (1 sample) and 6 (3 samples), mean 5; from a head of 8: 0.25·8 + 0.75·5 = 5.75."""
    layer = norm(0.5, mean=8.0)
    head = buffers(layer)
    updates = [update(head, run(layer, pair(2.0)), 1), update(head, run(layer, pair(6.0)), 3)]
    assert [u.values["running_mean"].item() for u in updates] == [5.0, 7.0]
    merged = merge_buffers(layer, head, updates)
    assert merged["running_mean"].item() == 5.75
    assert merged["running_var"].item() == 0.25 * 1 + 0.75 * 2
    assert merged["num_batches_tracked"].item() == 2


def test_a_batch_of_several_calls_counts_as_several_steps() -> None:
    """Two steps at m = 0.5 from 0 to 4, then 8 end at 5, so s = 5/0.75; with one of s = 2 beside it, three follow."""
    layer = norm(0.5)
    head = buffers(layer)
    updates = [update(head, run(layer, pair(4.0), pair(8.0)), 2), update(head, run(layer, pair(2.0)), 1)]
    assert updates[0].values["running_mean"].item() == 5.0
    merged = merge_buffers(layer, head, updates)
    seen = (2 * 5 / 0.75 + 1 * 2) / 3
    assert merged["running_mean"].item() == pytest.approx((1 - 0.5**3) * seen, rel=1e-15)
    assert merged["num_batches_tracked"].item() == 3


def test_94_batches_of_mean_5_in_one_commit_are_94_steps() -> None:
    """The running mean ends within 0.05 of the sequential one, where a plain mean of end values would stand at 0.5."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 4, generator=generator) + 5 for _ in range(94)]
    layer = nn.BatchNorm1d(4)
    head = buffers(layer)
    merged = merge_buffers(layer, head, [update(head, run(layer, batch), 32) for batch in batches])
    sequential = run(layer, *batches)
    assert sequential["running_mean"].min().item() > 4.9
    torch.testing.assert_close(merged["running_mean"], sequential["running_mean"], atol=0.05, rtol=0)
    torch.testing.assert_close(merged["running_var"], sequential["running_var"], atol=0.1, rtol=0)
    assert merged["num_batches_tracked"].item() == 94


def test_equal_batches_in_one_commit_equal_the_sequential_run() -> None:
    """Where all batches see the same statistics, U steps at once are U steps one by one."""
    for momentum in (0.1, 0.9, 1.0, None):
        layer = norm(momentum, mean=1.0, var=3.0, count=5)
        head = buffers(layer)
        merged = merge_buffers(layer, head, [update(head, run(layer, pair(4.0)), n) for n in (1, 2, 3)])
        for name, value in run(layer, *[pair(4.0)] * 3).items():
            torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)


def test_momentum_none_is_the_cumulative_mean() -> None:
    """T = 2 at mean 3, one stale base T = 1 at 2: s = 5 (1 sample) and 9 (3), mean 8; (2·3 + 2·8) / 4 = 5.5."""
    head = buffers(norm(None, mean=3.0, var=2.0, count=2))
    fresh, stale = norm(None, mean=3.0, var=2.0, count=2), norm(None, mean=2.0, var=2.0, count=1)
    updates = [
        update(buffers(stale), run(stale, pair(5.0)), 1),
        update(buffers(fresh), run(fresh, pair(9.0)), 3),
    ]
    assert [u.values["running_mean"].item() for u in updates] == [3.5, 5.0]
    merged = merge_buffers(fresh, head, updates)
    assert merged["running_mean"].item() == 5.5
    assert merged["num_batches_tracked"].item() == 4


def test_momentum_none_equals_the_sequential_run_of_equal_batches() -> None:
    """With as many samples in each call, the cumulative mean over one commit is exactly that of the sequence."""
    layer = norm(None, mean=1.0, count=3)
    head = buffers(layer)
    calls = [[pair(2.0), pair(7.0)], [pair(-4.0)], [pair(1.5), pair(0.0), pair(9.0)]]
    merged = merge_buffers(layer, head, [update(head, run(layer, *c), 2 * len(c)) for c in calls])
    for name, value in run(layer, *[batch for c in calls for batch in c]).items():
        torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)


def test_momentum_none_without_a_counter_is_the_weighted_mean() -> None:
    """Nothing says how many updates there were: (1·2 + 3·6) / 4 = 5."""
    layer = norm(None)
    layer.num_batches_tracked = None
    head = buffers(layer)
    updates = [
        BufferUpdate(
            {"running_mean": torch.full((1,), value, dtype=torch.float64)}, {"running_mean": head["running_mean"]}, n
        )
        for value, n in ((2.0, 1), (6.0, 3))
    ]
    assert merge_buffers(layer, head, updates)["running_mean"].item() == 5.0


def test_momentum_zero_never_moves() -> None:
    """A layer that keeps its statistics keeps them through a commit; its counter goes on."""
    layer = norm(0.0, mean=3.0)
    head = buffers(layer)
    moved = dict(head, running_mean=head["running_mean"] + 1, num_batches_tracked=head["num_batches_tracked"] + 1)
    merged = merge_buffers(layer, head, [update(head, moved), update(head, moved)])
    assert merged["running_mean"] is head["running_mean"]
    assert merged["num_batches_tracked"].item() == 2


def test_a_statistic_that_a_batch_met_exactly_still_counts() -> None:
    """Running mean 0 and a batch of mean 0: unchanged, yet a step with s = 0; with s = 8 beside it: 0.75·4 = 3."""
    layer = norm(0.5)
    head = buffers(layer)
    updates = [update(head, run(layer, pair(0.0)), 1), update(head, run(layer, pair(8.0)), 1)]
    assert "running_mean" not in updates[0].values
    assert merge_buffers(layer, head, updates)["running_mean"].item() == 3.0


def test_an_unchanged_statistic_may_name_its_base() -> None:
    """A stale batch that met its base 2 exactly has s = 2, not the head's 6: 0.25·6 + 0.75·(2 + 4)/2 = 3.75."""
    layer, head = norm(0.5, mean=2.0, var=2.0), buffers(norm(0.5, mean=6.0, var=2.0, count=1))
    before = buffers(layer)
    met = BufferUpdate(run(layer, pair(2.0)), before, 1)
    assert same_bits(met.values["running_mean"], before["running_mean"])
    merged = merge_buffers(layer, head, [met, update(before, run(layer, pair(4.0)), 1)])
    assert merged["running_mean"].item() == 3.75


def test_a_layer_that_no_batch_reached_keeps_its_statistics() -> None:
    """Batches that ran only the first of two layers leave the second's tensors as they are."""
    module = nn.ModuleDict({"a": norm(0.5), "b": norm(0.5)})
    head = buffers(module)
    ends = [{**head, **{f"a.{k}": v for k, v in run(module["a"], pair(m)).items()}} for m in (2.0, 6.0)]
    merged = merge_buffers(module, head, [update(head, end) for end in ends])
    assert merged["a.running_mean"].item() == 0.75 * 4
    assert all(merged[name] is head[name] for name in head if name.startswith("b."))


def test_only_the_batches_that_reached_a_layer_count_as_steps() -> None:
    """Of three batches one ran the layer: one step towards its mean, weighted with no other."""
    module = nn.ModuleDict({"a": norm(0.5), "b": norm(0.5)})
    head = buffers(module)
    first = {**head, **{f"a.{k}": v for k, v in run(module["a"], pair(2.0)).items()}}
    other = {**head, **{f"b.{k}": v for k, v in run(module["b"], pair(6.0)).items()}}
    merged = merge_buffers(module, head, [update(head, first, 1), update(head, other, 9), update(head, other, 9)])
    assert merged["a.running_mean"].item() == 1.0
    assert merged["b.running_mean"].item() == 0.75 * 6


def test_instance_norm_counts_each_changed_update_once() -> None:
    """Its counter never moves, so each of two changes is one step: 0.75·(2 + 6)/2 = 3 at m = 0.5."""
    layer = nn.InstanceNorm1d(1, momentum=0.5, track_running_stats=True, dtype=torch.float64)
    head = buffers(layer)
    updates = [update(head, run(layer, pair(mean).t()[None])) for mean in (2.0, 6.0)]
    assert "num_batches_tracked" not in updates[0].values
    assert merge_buffers(layer, head, updates)["running_mean"].item() == 3.0


def test_a_counter_that_was_reset_counts_a_change_once() -> None:
    """Where a batch ends at a count below its base, its statistics have made one step: 0.75·(2 + 6)/2 = 3."""
    layer = norm(0.5, count=5)
    head = buffers(layer)
    ends = [{**run(layer, pair(mean)), "num_batches_tracked": torch.tensor(1)} for mean in (2.0, 6.0)]
    assert merge_buffers(layer, head, [update(head, end) for end in ends])["running_mean"].item() == 3.0


def test_counts_of_any_size_do_not_overflow() -> None:
    """A foreign counter may jump from one end of its range to the other; the statistic is then the batch's alone."""
    for momentum in (0.5, None):
        layer = norm(momentum)
        before = {**buffers(layer), "num_batches_tracked": torch.tensor(-(2**63))}
        end = {**before, "running_mean": torch.full((1,), 2.0).double(), "num_batches_tracked": torch.tensor(2**63 - 1)}
        assert math.isfinite(merge_buffers(layer, buffers(layer), [update(before, end)])["running_mean"].item())


def test_changes_that_cancel_out_leave_the_heads_tensor() -> None:
    """10 + 2 − 2 is 10 again, so the head's own object is returned."""
    head = {"b": torch.tensor(10)}
    updates = [update(head, {"b": torch.tensor(end)}) for end in (12, 8)]
    assert merge_buffers(Holder(**head), head, updates)["b"] is head["b"]


@pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d]
)
def test_statistics_of_every_normalisation_layer_step(make: Callable[..., nn.Module]) -> None:
    """Base 0 and ends of 1 and 1 at m = 0.5 have seen 2 each: two steps make 1.5, where the mean would stay at 1."""
    module = nn.Sequential(make(1, momentum=0.5, track_running_stats=True))
    head = buffers(module)
    end = dict(head)
    end["0.running_mean"] = torch.ones(1)
    merged = merge_buffers(module, head, [update(head, end), update(head, end)])
    assert merged["0.running_mean"].item() == 1.5


def test_the_module_may_live_on_the_meta_device() -> None:
    """Only names, types and momenta are read from it."""
    layer = norm(0.5)
    head = buffers(layer)
    updates = [update(head, run(layer, pair(m))) for m in (2.0, 6.0)]
    assert merge_buffers(layer.to("meta"), head, updates)["running_mean"].item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_are_merged_in_float64_and_cast_back_once(dtype: torch.dtype) -> None:
    """A bfloat16 mean after two steps is the float64 result rounded, not a sum of roundings."""
    layer = nn.BatchNorm1d(1, momentum=0.1, dtype=dtype)
    base, ends = torch.tensor([1.0], dtype=dtype), [torch.tensor([v], dtype=dtype) for v in (1.1, 1.3)]
    updates = [BufferUpdate({"running_mean": end}, {"running_mean": base}, 1) for end in ends]
    merged = merge_buffers(layer, {**buffers(layer), "running_mean": base}, updates)["running_mean"]
    seen = sum((end.double() - 0.9 * 1.0) / 0.1 for end in ends) / 2
    assert merged.dtype == dtype
    assert torch.equal(merged, (0.81 * 1.0 + 0.19 * seen).to(dtype))


def test_a_variance_never_falls_below_zero() -> None:
    """Noise that took a variance from 1 to 0.4 at m = 0.5 reads as s = −0.2; three such steps would end below 0."""
    layer = norm(0.5)
    head = buffers(layer)
    noisy = {**head, "running_var": torch.full((1,), 0.4, dtype=torch.float64)}
    merged = merge_buffers(layer, head, [update(head, noisy)] * 3)
    assert merged["running_var"].item() == 0.0
    kept = {**head, "running_mean": torch.full((1,), -4.0, dtype=torch.float64)}
    assert merge_buffers(layer, head, [update(head, kept)] * 3)["running_mean"].item() == -7.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_add_their_changes(dtype: torch.dtype) -> None:
    """10 + (12−10) + (15−10) = 17, and an update that didn't change it adds nothing."""
    assert merge_one(10, 12, 15, 10, dtype=dtype) == 17


def test_large_integers_are_not_rounded() -> None:
    """2⁵³ + 1 isn't a float64; counters are added up as integers."""
    assert merge_one(2**53, 2**53 + 1, 2**53 + 2, dtype=torch.int64) == 2**53 + 3


def test_flags_are_true_if_any_batch_ended_with_true() -> None:
    """A flag that every batch cleared is cleared; a batch that left it alone ends with the head's value."""
    assert merge_one(
        [False, False, True, True], [True, False, False, False], [False, False, True, False], dtype=torch.bool
    ) == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_floats_become_the_weighted_mean(dtype: torch.dtype) -> None:
    """(1·1 + 2·4 + 3·head) / 6 with a head of 5 that the third batch left alone: 24/6 = 4."""
    assert merge_one(5.0, 1.0, 4.0, 5.0, dtype=dtype) == 4.0


def test_complex_buffers_become_the_weighted_mean() -> None:
    """(1·3i + 2·(3 + 3i)) / 3 = 2 + 3i."""
    assert merge_one(0j, 3j, 3 + 3j, dtype=torch.complex64) == 2 + 3j


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("mean", 4.0), ("sum", 4.0), ("last", 5.0), ("keep", 3.0)],
)
def test_a_rule_by_pattern_overrides_the_default(rule: Rule, expected: float) -> None:
    """Head 3, ends 2 (1 sample) and 5 (2 samples): mean 12/3, sum 3 − 1 + 2, the last, the head's."""
    assert merge_one(3.0, 2.0, 5.0, dtype=torch.float32, rule=rule) == expected


def test_the_mean_of_integers_is_rounded() -> None:
    """(1·1 + 2·4) / 3 = 3 and (1·1 + 2·2) / 3 = 1.67, which rounds to 2."""
    assert merge_one([0, 0], [1, 1], [4, 2], dtype=torch.int64, rule="mean") == [3, 2]


def test_or_joins_the_bits_of_integers() -> None:
    """1 | 4 = 5."""
    assert merge_one(0, 1, 4, dtype=torch.uint8, rule="or") == 5


def test_ema_reads_the_momentum_of_a_module_of_ones_own() -> None:
    """A module with `momentum` 0.5 and a buffer of another name steps as BatchNorm does: 0.75·(2 + 6)/2 = 3."""
    module = nn.ModuleDict({"own": Holder(average=torch.zeros(1))})
    module["own"].momentum = 0.5
    head = buffers(module)
    updates = [update(head, {"own.average": torch.tensor([value])}) for value in (1.0, 3.0)]
    assert merge_buffers(module, head, updates, {"*.average": "ema"})["own.average"].item() == 3.0


def test_a_function_is_a_rule_over_the_batches_that_changed_the_buffer() -> None:
    """It gets the head, the ends, the bases and the samples, and its result is taken as it is."""
    seen: list[object] = []

    def largest(head: Tensor, values: list[Tensor], bases: list[Tensor], num_samples: list[float]) -> Tensor:
        seen.append((head.item(), [v.item() for v in values], [b.item() for b in bases], num_samples))
        return torch.stack(values).amax(0)

    assert merge_one(3.0, 2.0, 3.0, 7.0, dtype=torch.float32, rule=largest) == 7.0
    assert seen == [(3.0, [2.0, 7.0], [3.0, 3.0], [1, 3])]
    assert merge_one(3.0, 9.0, dtype=torch.float32, rule=lambda head, *_: head) == 3.0


def test_a_function_must_return_the_buffers_shape_and_dtype() -> None:
    """A result of another kind is refused before it is published."""
    with pytest.raises(InputError, match=r"rule of buffer 'b' made torch.float64 \(\): expected torch.float32 \(\)"):
        merge_one(3.0, 2.0, dtype=torch.float32, rule=lambda head, *_: head.double())
    with pytest.raises(InputError, match="made NoneType"):
        merge_one(3.0, 2.0, dtype=torch.float32, rule=lambda *_: None)


def test_keep_and_the_first_pattern_that_fits_win() -> None:
    """Keep holds even for one update that began at the head, and a later pattern changes nothing."""
    layer = norm(0.5)
    head = buffers(layer)
    only = update(head, run(layer, pair(2.0)))
    merged = merge_buffers(layer, head, [only], {"running_*": "keep", "*mean": "last"})
    assert merged["running_mean"] is head["running_mean"]
    assert merged["num_batches_tracked"].item() == 1


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"b": "median"}, "'median' doesn't exist: expected a function or one of mean, sum, or, ema, last, keep"),
        ({"a": "mean"}, "'a' fits no buffer: expected a pattern of one of b, flag"),
        ({"b": "or"}, "'or' doesn't fit 'b', a torch.float32"),
        ({"b": "ema"}, "'b' can't be an 'ema': expected a momentum from 0 to 1, got nan"),
    ],
)
def test_rules_that_cannot_work_are_refused(rules: dict[str, Rule], says: str) -> None:
    """Even before there is anything to merge, so that a typing error shows at the first commit."""
    module = Holder(b=torch.zeros(1), flag=torch.tensor(True))
    with pytest.raises(InputError, match=says):
        merge_buffers(module, buffers(module), [], rules)


def test_a_momentum_outside_of_0_to_1_is_refused() -> None:
    """There is no step size to read off such a layer."""
    layer = norm(1.5)
    with pytest.raises(InputError, match=r"expected a momentum from 0 to 1, got 1\.5"):
        merge_buffers(layer, buffers(layer), [])


ZERO = torch.zeros(1)


@pytest.mark.parametrize(
    ("values", "bases", "num_samples", "says"),
    [
        ({"b": ZERO}, {"b": ZERO}, 0, "num_samples of an update is 0"),
        ({"b": ZERO}, {"b": ZERO}, math.nan, "num_samples of an update is nan"),
        ({"b": ZERO}, {}, 1, r"\['b'\] lack"),
        ({"c": ZERO}, {"c": ZERO}, 1, r"\['c'\] lack"),
        ({"b": torch.zeros(2)}, {"b": ZERO}, 1, r"'b' ends with torch.float32 \(2,\): expected torch.float32 \(1,\)"),
        ({"b": ZERO}, {"b": ZERO.double()}, 1, "'b' begins with torch.float64"),
    ],
)
def test_updates_that_do_not_fit_the_head_are_refused(
    values: dict[str, Tensor], bases: dict[str, Tensor], num_samples: float, says: str
) -> None:
    """They come from other machines, so names, shapes, dtypes and weights are checked."""
    with pytest.raises(InputError, match=says):
        merge_buffers(Holder(b=ZERO), {"b": ZERO}, [BufferUpdate(values, bases, num_samples)])


def test_a_head_with_a_buffer_that_the_module_lacks_is_refused() -> None:
    """The message lists what the module has."""
    with pytest.raises(InputError, match=r"no buffer 'a\.b': expected \['b'\]"):
        merge_buffers(Holder(b=ZERO), {"a.b": ZERO}, [])


def test_merging_changes_none_of_its_inputs_and_repeats_bit_for_bit() -> None:
    """Two merges of the same updates give the same bits, and heads, values and bases stay as they were."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3)
    head = buffers(layer)
    updates = [update(head, run(layer, torch.randn(8, 3)), n) for n in (8, 3, 5)]
    before = copy.deepcopy([head, *({**u.values, **u.bases} for u in updates)])
    first, second = merge_buffers(layer, head, updates), merge_buffers(layer, head, updates)
    assert all(same_bits(first[name], second[name]) for name in head)
    after = [head, *({**u.values, **u.bases} for u in updates)]
    assert all(same_bits(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor(math.nan), torch.tensor(math.nan), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.tensor(0), torch.tensor(False), False),
        (torch.zeros(2), torch.zeros(1, 2), False),
        (torch.arange(6).view(2, 3).t(), torch.tensor([[0, 3], [1, 4], [2, 5]]), True),
        (torch.tensor([1j]), torch.tensor([1j]), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_same_bits_compares_values_by_their_bytes(a: Tensor, b: Tensor, same: bool) -> None:
    """NaN equals itself and −0.0 differs from 0.0; layout doesn't matter, shape and dtype do."""
    assert same_bits(a, b) is same
