"""Optimizers that are captured and built anew go on in the same bits, for every class that torch has."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from splitfed.accumulator import optimizer as optimizers
from splitfed.accumulator.settings import Groups, OptimizerFactory, SchedulerFactory
from splitfed.errors import InputError, UnsupportedError
from splitfed.protocol import pytree
from splitfed.protocol.packing import pack_tree

BEFORE, AFTER = 5, 7


def net(dtype: torch.dtype = torch.float32, *, matrices: bool = False) -> nn.Module:
    """A small net with the same weights each time; with only 2-D parameters if `matrices`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=not matrices), nn.Tanh(), nn.Linear(4, 2, bias=not matrices)).to(dtype)


def train(module: nn.Module, built: tuple[Optimizer, LRScheduler | None], steps: range) -> list[list[float]]:
    """Take steps whose gradients depend on the step's number alone; return the learning rates after each."""
    optimizer, scheduler = built
    rates = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.grad = torch.empty_like(parameter).copy_(noise)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return rates


def through_json(state: object) -> object:
    """A captured state as it comes back from the store."""
    spec, tensors = pytree.flatten(state)
    return pytree.unflatten(json.loads(json.dumps(spec, allow_nan=False)), [t.contiguous().clone() for t in tensors])


def check_round_trip(
    make: Callable[[], nn.Module],
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None = None,
    groups: Groups | None = None,
) -> None:
    """Train without a stop, and with one that goes through JSON into a fresh build; compare bits and rates."""
    straight = make()
    built = optimizers.build(straight, optimizer, scheduler, groups)
    train(straight, built, range(BEFORE))
    state = through_json(optimizers.capture(*built))
    resumed = make()
    resumed.load_state_dict(straight.state_dict())
    expected_rates = train(straight, built, range(BEFORE, BEFORE + AFTER))

    rebuilt = optimizers.build(resumed, optimizer, scheduler, groups)
    optimizers.restore(*rebuilt, state)
    assert train(resumed, rebuilt, range(BEFORE, BEFORE + AFTER)) == expected_rates
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert same(optimizers.capture(*rebuilt), optimizers.capture(*built))


def same(a: Any, b: Any) -> bool:
    """Whether two trees agree in types, keys, dtypes and values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"maximize": True, "weight_decay": 0.1}],
    "Adafactor": [{}],
    "Adagrad": [{"initial_accumulator_value": 0.5, "lr_decay": 0.1}],
    "Adam": [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.01)}],
    "AdamW": [{}, {"betas": (0.8, 0.95)}],
    "Adamax": [{}],
    "ASGD": [{"t0": 3, "lambd": 0.01}],
    "Muon": [{}, {"ns_steps": 2}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
    "Rprop": [{}],
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"fused": True}],
}
REFUSED_OPTIMIZERS = {"LBFGS", "SparseAdam"}


def all_classes(module: object, base: type) -> set[str]:
    """The public subclasses of `base` in a module of torch's."""
    return {
        name
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base and not name.startswith("_")
    }


def test_every_optimizer_of_torch_is_tested_or_refused() -> None:
    """A class that a later torch brings fails here until somebody has looked at its state."""
    assert all_classes(optim, Optimizer) <= OPTIMIZERS.keys() | REFUSED_OPTIMIZERS
    assert all_classes(lr_scheduler, LRScheduler) <= SCHEDULERS.keys() | REFUSED_SCHEDULERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, all_settings in OPTIMIZERS.items() for s in all_settings])
def test_optimizers_go_on_in_the_same_bits(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """N steps, a round trip through JSON into a fresh optimizer, and M steps equal N + M steps without a stop."""
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")
    check_round_trip(
        lambda: net(dtype, matrices=name == "Muon"),
        lambda params: getattr(optim, name)(params, **{"lr": 0.01, **copy.deepcopy(settings)}),
    )


def growth(step: int) -> float:
    """A factor as a plain function."""
    return 1 / (1 + step)


class Decay:
    """A factor as an object with state, which torch stores."""

    def __init__(self) -> None:
        self.calls = {"seen": 0}

    def __call__(self, step: int) -> float:
        """Count the calls."""
        self.calls["seen"] += 1
        return 0.9 ** self.calls["seen"]


def warm_up(steps: int, optimizer: Optimizer) -> LRScheduler:
    """A linear warm-up, then a cosine."""
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps), lr_scheduler.CosineAnnealingLR(optimizer, 20)]
    return lr_scheduler.SequentialLR(optimizer, parts, [steps])


SCHEDULERS: dict[str, list[SchedulerFactory]] = {
    "LambdaLR": [
        lambda o: lr_scheduler.LambdaLR(o, growth),
        lambda o: lr_scheduler.LambdaLR(o, Decay()),
        lambda o: lr_scheduler.LambdaLR(o, partial(math.pow, 0.9)),
    ],
    "MultiplicativeLR": [lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 + step / 100)],
    "StepLR": [lambda o: lr_scheduler.StepLR(o, 2, 0.5)],
    "MultiStepLR": [lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 6, 9], 0.5)],
    "ConstantLR": [lambda o: lr_scheduler.ConstantLR(o, 0.5, 7)],
    "LinearLR": [lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8)],
    "ExponentialLR": [lambda o: lr_scheduler.ExponentialLR(o, 0.9)],
    "SequentialLR": [partial(warm_up, milestone) for milestone in (3, BEFORE, 8)],
    "ChainedScheduler": [
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.MultiStepLR(o, [6], 0.1)]
        )
    ],
    "PolynomialLR": [lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0)],
    "CosineAnnealingLR": [lambda o: lr_scheduler.CosineAnnealingLR(o, 8, 1e-4)],
    "CosineAnnealingWarmRestarts": [lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2)],
    "CyclicLR": [
        lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, mode="triangular2"),
        lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, mode="exp_range", gamma=0.9),
        lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 3, scale_fn=lambda x: 0.9**x),
    ],
    "OneCycleLR": [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20, three_phase=True, anneal_strategy="linear"),
    ],
    "SWALR": [lambda o: SWALR(o, 0.001, anneal_epochs=6)],
}
REFUSED_SCHEDULERS = {"ReduceLROnPlateau"}


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "scheduler",
    [pytest.param(make, id=f"{name}-{i}") for name, all_ in SCHEDULERS.items() for i, make in enumerate(all_)],
)
def test_schedulers_go_on_at_the_same_rates(scheduler: SchedulerFactory, rate: float | Tensor) -> None:
    """The rates and the parameters of a schedule that was rebuilt halfway equal those of one that wasn't."""
    check_round_trip(net, lambda params: optim.SGD(params, copy.deepcopy(rate), momentum=0.9), scheduler)


def test_schedulers_drive_adams_betas_through_a_restore() -> None:
    """OneCycleLR moves beta1 too, which lives in the optimizer's groups."""
    check_round_trip(net, optim.Adam, lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20))


def test_parameter_groups_keep_their_own_rates_and_settings() -> None:
    """Two groups with their own rates, decay and a name of the user's come back as they were."""

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        first, last = module[0], module[2]
        return [
            {"params": list(first.parameters()), "lr": 0.5, "name": "first"},
            {"params": [last.weight], "weight_decay": 0.3},
        ]

    check_round_trip(
        net, lambda params: optim.AdamW(params, lr=0.1), lambda o: lr_scheduler.LambdaLR(o, [growth, Decay()]), groups
    )


def test_a_state_captured_before_the_first_step_restores() -> None:
    """An optimizer without any state yet goes on from the beginning, without a warning about the order of calls."""
    module = net()
    built = optimizers.build(module, optim.Adam, lambda o: lr_scheduler.StepLR(o, 1))
    again = optimizers.build(module, optim.Adam, lambda o: lr_scheduler.StepLR(o, 1))
    optimizers.restore(*again, through_json(optimizers.capture(*built)))
    assert [rate for (rate,) in train(module, again, range(2))] == pytest.approx([1e-4, 1e-5])


def test_a_parameter_that_no_batch_reached_has_no_state() -> None:
    """A None gradient leaves no entry, and the states of the others still find their parameters."""
    module, twin = net(), net()
    built = optimizers.build(module, partial(optim.SGD, lr=0.1, momentum=0.9))
    module[2].weight.grad = torch.ones_like(module[2].weight)
    built[0].step()
    again = optimizers.build(twin, partial(optim.SGD, lr=0.1, momentum=0.9))
    optimizers.restore(*again, through_json(optimizers.capture(*built)))
    assert list(again[0].state) == [twin[2].weight]


class HighPrecision(Optimizer):
    """Keeps float32 moments of bfloat16 parameters, in a dict and a list, and a float64 scalar of the whole."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Keep a running sum of the gradients and step by it."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(nested={"sum": torch.zeros_like(p, dtype=torch.float32)}, note="ab", pair=(1, [2.5]))
                    state["many"] = [torch.tensor(1 / 3, dtype=torch.float64)]
                state["nested"]["sum"].add_(p.grad.float(), alpha=1 / 3)
                p.sub_(state["nested"]["sum"].to(p.dtype), alpha=group["lr"])


def test_state_of_higher_precision_than_its_parameter_is_not_rounded() -> None:
    """`load_state_dict` alone would cast the float32 sum of a bfloat16 parameter, and mangle strings."""
    check_round_trip(lambda: net(torch.bfloat16), HighPrecision)
    module = net(torch.bfloat16)
    built = optimizers.build(module, HighPrecision)
    train(module, built, range(3))
    again = optimizers.build(module, HighPrecision)
    optimizers.restore(*again, optimizers.capture(*built))
    state = again[0].state[module[0].weight]
    assert (state["nested"]["sum"].dtype, state["many"][0].dtype) == (torch.float32, torch.float64)
    assert (state["note"], state["pair"]) == ("ab", (1, [2.5]))


def test_strides_of_the_state_come_back() -> None:
    """Moments of a channels_last weight stay channels_last even if they were stored contiguous."""
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    built = optimizers.build(module, optim.Adam)
    train(module, built, range(1))
    again = optimizers.build(module, optim.Adam)
    optimizers.restore(*again, through_json(optimizers.capture(*built)))
    moments, expected = again[0].state[module.weight]["exp_avg"], built[0].state[module.weight]["exp_avg"]
    assert moments.stride() == expected.stride() != moments.contiguous().stride()
    assert torch.equal(moments, expected)


def test_a_captured_state_shares_no_memory() -> None:
    """Later steps change neither a captured state nor one that was restored from."""
    module = net()
    built = optimizers.build(module, optim.Adam, lambda o: lr_scheduler.MultiStepLR(o, [2, 6]))
    train(module, built, range(3))
    state = optimizers.capture(*built)
    before = copy.deepcopy(state)
    train(module, built, range(3, 6))
    assert same(state, before)
    optimizers.restore(*built, state)
    train(module, built, range(3, 8))
    assert same(state, before)


def test_a_state_that_isnt_copied_is_stored_in_the_same_bytes() -> None:
    """To be written at once it needs no copy, whatever its strides; what has gaps is copied all the same."""
    module = net()
    built = optimizers.build(module, optim.Adam, lambda o: lr_scheduler.MultiStepLR(o, [2, 6]))
    train(module, built, range(3))
    weight, bias = (built[0].state[parameter] for parameter in module[0].parameters())
    weight["exp_avg"] = weight["exp_avg"].t().contiguous().t()
    bias["exp_avg"] = torch.arange(8.0)[::2]
    bias["exp_avg_sq"] = torch.ones(1).expand(4)
    copied, shared = (optimizers.capture(*built, copied=copied) for copied in (True, False))
    assert b"".join(pack_tree("Optimizer", shared)) == b"".join(pack_tree("Optimizer", copied))
    tensors = {tensor.data_ptr() for tensor in pytree.flatten(shared)[1]}
    assert weight["exp_avg"].data_ptr() in tensors
    assert bias["exp_avg"].data_ptr() not in tensors


def test_one_tensor_in_two_places_stays_one() -> None:
    """A learning rate that two groups share is still shared after a restore."""

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p]} for p in module.parameters()]

    rate = torch.tensor(0.1)
    built = optimizers.build(net(), lambda params: optim.SGD(params, lr=rate), param_groups=groups)
    again = optimizers.build(net(), lambda params: optim.SGD(params, lr=torch.tensor(0.5)), param_groups=groups)
    optimizers.restore(*again, through_json(optimizers.capture(*built)))
    restored = [group["lr"] for group in again[0].param_groups]
    assert all(value is restored[0] for value in restored)
    assert restored[0].item() == rate.item()
    assert restored[0] is not rate


def test_the_factory_gets_trainable_parameters_in_order_and_tied_ones_once() -> None:
    """Frozen parameters are left out; a tied weight comes at its first name."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    module[1].bias.requires_grad_(False)
    optimizer, scheduler = optimizers.build(module, lambda params: optim.SGD(params, lr=0.1))
    names = {id(p): name for name, p in module.named_parameters()}
    assert [names[id(p)] for p in optimizer.param_groups[0]["params"]] == ["0.weight", "0.bias", "1.weight", "2.bias"]
    assert scheduler is None


class NeedsClosure(Optimizer):
    """A custom optimizer that can't do without the loss."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], float]) -> float:
        """Ask for the loss."""
        return closure()


class NeedsArgument(LRScheduler):
    """A custom scheduler that can't do without a loss."""

    def get_lr(self) -> list[float | Tensor]:
        """Keep the rates."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, *args: float) -> None:
        """Accept anything, so that construction works."""


def _step_with_loss(self: LRScheduler, loss: float) -> None:
    """Need a loss."""


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (lambda params: optim.LBFGS(params), "LBFGS.*closure.*use torch.optim.AdamW"),
        (lambda params: optim.SparseAdam(params), "SparseAdam needs sparse gradients.*use torch.optim.Adam"),
        (NeedsClosure, "NeedsClosure.*closure"),
        (lambda params: optim.SGD(net().parameters(), lr=0.1), r"group 0 of SGD.*shape \(4, 3\).*the factory is given"),
    ],
)
def test_optimizers_that_cannot_work_are_refused_with_a_way_out(factory: OptimizerFactory, says: str) -> None:
    """The message says why, and what to use instead."""
    with pytest.raises(UnsupportedError, match=says):
        optimizers.build(net(), factory)


def test_an_optimizer_of_frozen_parameters_is_refused() -> None:
    """They have no gradients, and a decay would change them nevertheless."""
    module = net()
    module[0].weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="isn't a trainable one"):
        optimizers.build(module, lambda _: optim.SGD(module.parameters(), lr=0.1))


def test_schedulers_that_need_a_metric_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReduceLROnPlateau, and any whose step() needs an argument."""
    sgd = partial(optim.SGD, lr=0.1)
    with pytest.raises(UnsupportedError, match=r"ReduceLROnPlateau needs a metric.*use StepLR"):
        optimizers.build(net(), sgd, lr_scheduler.ReduceLROnPlateau)

    def needy(optimizer: Optimizer) -> LRScheduler:
        scheduler = NeedsArgument(optimizer)
        monkeypatch.setattr(NeedsArgument, "step", _step_with_loss)
        return scheduler

    with pytest.raises(UnsupportedError, match=r"NeedsArgument.step\(\) needs arguments"):
        optimizers.build(net(), sgd, needy)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match=r"NeedsArgument.step\(\) needs arguments"):
        optimizers.build(net(), sgd, lambda o: lr_scheduler.ChainedScheduler([needy(o)]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"optimizer": lambda params: None}, "optimizer factory returned NoneType"),
        ({"optimizer": optim.SGD(net().parameters(), lr=0.1)}, "optimizer is SGD: expected a function"),
        ({"lr_scheduler": lambda o: o}, "lr_scheduler factory returned SGD"),
        ({"lr_scheduler": 0.1}, "lr_scheduler is float: expected a function"),
        ({"param_groups": []}, "param_groups is list: expected a function"),
        (
            {"lr_scheduler": lambda o: lr_scheduler.StepLR(optim.SGD(net().parameters(), lr=0.1), 1)},
            "StepLR belongs to another optimizer",
        ),
    ],
)
def test_factories_that_make_something_else_are_refused(arguments: dict[str, Any], says: str) -> None:
    """An instance in place of a factory, and a factory of something else."""
    with pytest.raises(InputError, match=says):
        optimizers.build(net(), **{"optimizer": partial(optim.SGD, lr=0.1), **arguments})


def test_a_module_without_trainable_parameters_is_refused() -> None:
    """The message says what is missing, before torch complains of an empty list."""
    with pytest.raises(InputError, match="no trainable parameter"):
        optimizers.build(net().requires_grad_(False), optim.Adam)


@pytest.mark.parametrize(
    ("put", "where"),
    [
        (lambda o: o.state[o.param_groups[0]["params"][0]].update(odd={1, 2}), r"optimizer\['state'\]\[0\]\['odd'\]"),
        (
            lambda o: o.param_groups[0].update(fn=growth),
            r"optimizer\['param_groups'\]\[0\]\['fn'\] is builtins.function",
        ),
        (lambda o: o.param_groups[0].update({(1, 2): None}), None),
    ],
)
def test_state_of_a_kind_that_cannot_be_stored_is_refused_by_name(
    put: Callable[[Optimizer], None], where: str | None
) -> None:
    """The message says where in the state the entry is; tuples as keys are no exact kind either."""
    optimizer, _ = optimizers.build(net(), optim.Adam)
    put(optimizer)
    with pytest.raises(UnsupportedError, match=where or r"key of optimizer\['param_groups'\]\[0\] is \(1, 2\)"):
        optimizers.capture(optimizer, None)


def test_plain_kinds_of_other_libraries_become_pythons_own() -> None:
    """A numpy integer among milestones or a numpy float as a rate is stored as the same number."""
    numpy = pytest.importorskip("numpy")
    check_round_trip(
        net,
        lambda params: optim.SGD(params, lr=float(numpy.float64(0.1))),
        lambda o: lr_scheduler.MultiStepLR(o, list(numpy.arange(2, 8, 3)), numpy.float64(0.5)),
    )


class Shaped(LRScheduler):
    """A scheduler that keeps a function, as schedulers of other libraries do."""

    def __init__(self, optimizer: Optimizer, shape: Callable[[int], float]) -> None:
        self.shape = shape
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Shape the rates."""
        return [rate * self.shape(self.last_epoch) for rate in self.base_lrs]


@pytest.mark.parametrize("shape", [growth, partial(math.pow, 0.9), math.exp, Decay().__call__])
def test_functions_of_a_scheduler_come_from_the_factory_again(shape: Callable[[int], float]) -> None:
    """They are left out of what is captured, at any depth, and the rates go on."""

    def chained(optimizer: Optimizer) -> LRScheduler:
        return lr_scheduler.ChainedScheduler([Shaped(optimizer, shape), lr_scheduler.ExponentialLR(optimizer, 0.9)])

    check_round_trip(net, partial(optim.SGD, lr=0.1), lambda optimizer: Shaped(optimizer, growth))
    built = optimizers.build(net(), partial(optim.SGD, lr=0.1), chained)
    spec, _ = pytree.flatten(optimizers.capture(*built))
    assert "last_epoch" in json.dumps(spec)
    assert 'shape"' not in json.dumps(spec)


BUILDS: dict[str, tuple[OptimizerFactory, SchedulerFactory | None]] = {
    "optimizer Adam: expected SGD": (partial(optim.SGD, lr=0.1), lambda o: lr_scheduler.StepLR(o, 1)),
    "scheduler StepLR: expected ExponentialLR": (optim.Adam, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "scheduler StepLR: expected None": (optim.Adam, None),
    r"scheduler StepLR: expected ChainedScheduler\(StepLR\)": (
        optim.Adam,
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 1)]),
    ),
}


@pytest.mark.parametrize("says", list(BUILDS))
def test_the_state_of_something_else_is_refused(says: str) -> None:
    """Torch itself would take most such states, and fail or go wrong at the next step."""
    state = optimizers.capture(*optimizers.build(net(), optim.Adam, lambda o: lr_scheduler.StepLR(o, 1)))
    with pytest.raises(InputError, match=says):
        optimizers.restore(*optimizers.build(net(), *BUILDS[says]), state)


def test_the_state_of_other_parameters_is_refused() -> None:
    """Torch matches states to parameters by position alone, whatever their shapes."""
    state = optimizers.capture(*optimizers.build(net(), optim.Adam))
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"parameter shapes .* expected \[\[\[3, 4\], \[3\], \[2, 2\], \[2\]\]\]"):
        optimizers.restore(*optimizers.build(other, optim.Adam), state)


@pytest.mark.parametrize("state", [None, 3, "state", [], {}, {"optimizer": None, "scheduler": None, "strides": {}}])
def test_what_is_no_state_is_refused(state: object) -> None:
    """The message says what was expected."""
    with pytest.raises(InputError, match="expected what capture"):
        optimizers.restore(*optimizers.build(net(), optim.Adam), state)


def test_restoring_puts_the_captured_settings_before_the_factorys() -> None:
    """A rate that the factory changed meanwhile doesn't leak into a replay: the state holds 0.1."""
    built = optimizers.build(net(), partial(optim.SGD, lr=0.1))
    again = optimizers.build(net(), partial(optim.SGD, lr=0.7))
    optimizers.restore(*again, optimizers.capture(*built))
    assert again[0].param_groups[0]["lr"] == 0.1


def test_ordered_dicts_and_sizes_keep_their_types() -> None:
    """State of the kinds that a tree can hold comes back as those kinds."""
    module = net()
    built = optimizers.build(module, optim.Adam)
    train(module, built, range(1))
    parameter = module[0].weight
    extra = {"order": OrderedDict(b=1, a=math.nan), "size": torch.Size([2, 3]), "none": None, "flag": True}
    built[0].state[parameter].update(extra)
    again = optimizers.build(module, optim.Adam)
    optimizers.restore(*again, through_json(optimizers.capture(*built)))
    state = again[0].state[parameter]
    assert type(state["order"]) is OrderedDict
    assert (list(state["order"]), state["order"]["b"], math.isnan(state["order"]["a"])) == (["b", "a"], 1, True)
    assert (type(state["size"]), state["size"], state["none"], state["flag"]) == (torch.Size, (2, 3), None, True)
