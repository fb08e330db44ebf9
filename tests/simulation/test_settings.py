"""Groups of settings check themselves when they are made, and each other when they meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import toy

from splitfed.errors import InputError
from splitfed.simulation.settings import LocalTraining, Processes, RayEngine, RoundSchedule, as_engine, check_settings
from splitfed.simulation.virtual_time import VirtualTime


@pytest.mark.parametrize(
    ("group", "setting", "message"),
    [
        (LocalTraining, {"batch_size": 0}, "batch_size is 0: expected an integer of at least 1"),
        (LocalTraining, {"batch_size": {"a": 0}}, "batch_size of 'a' is 0: expected an integer of at least 1"),
        (LocalTraining, {"batch_size": {"a": 2.0}}, "batch_size of 'a' is 2.0"),
        (
            LocalTraining,
            {"batch_size": [4]},
            r"batch_size is \[4\]: expected an integer .*, or a mapping of client ids",
        ),
        (LocalTraining, {"local_passes": True}, "local_passes is True"),
        (LocalTraining, {"local_steps": 0}, "local_steps is 0: expected an integer of at least 1"),
        (LocalTraining, {"drop_last": 1}, "drop_last is 1: expected True or False"),
        (LocalTraining, {"collate_fn": "pad"}, "collate_fn is str: expected a function, such as .*default_collate"),
        (LocalTraining, {"target": None}, "target is None: expected a key, such as 'labels'"),
        (LocalTraining, {"scheduler": 0.1}, "scheduler is float: expected a function, such as .*StepLR"),
        (RoundSchedule, {"min_clients": 0}, "min_clients is 0"),
        (RoundSchedule, {"clients_per_round": 1.5}, "clients_per_round is 1.5"),
        (RoundSchedule, {"clients_per_round": 2, "min_clients": 3}, "an integer of at least min_clients=3"),
        (RoundSchedule, {"deadline": -1.0}, "deadline is -1.0: expected a finite number above 0"),
        (RoundSchedule, {"late": "drop"}, "late is 'drop': expected 'count' or 'refuse'"),
        (RoundSchedule, {"barrier": 0}, "barrier is 0: expected True, False"),
        (RoundSchedule, {"min_updates": 0}, "min_updates is 0"),
        (RoundSchedule, {"sampling": "size"}, "sampling is 'size': expected 'uniform' or 'data'"),
        (RoundSchedule, {"pacing": True}, "pacing is True: expected 'even' or 'data'"),
        (Processes, {"workers": 0}, "workers is 0"),
        (RayEngine, {"workers": 0}, "workers is 0"),
        (RayEngine, {"num_gpus": -0.5}, "num_gpus is -0.5: expected a finite number above 0"),
        (RayEngine, {"num_cpus": 0}, "a worker needs some of one, such as num_cpus=0.5"),
    ],
)
def test_a_group_refuses_a_setting_out_of_its_range(
    group: Callable[..., Any], setting: dict[str, Any], message: str
) -> None:
    """Where it is made, and so where the mistake is; not first in `simulate`."""
    with pytest.raises(InputError, match=message):
        group(**setting)


@pytest.mark.parametrize(
    ("local", "schedule", "engine", "message"),
    [
        ({"batch_size": 4}, RoundSchedule(), None, r"local is {'batch_size': 4}: expected LocalTraining\("),
        (LocalTraining(), RoundSchedule, None, r"schedule is <class .*>: expected RoundSchedule\("),
        (LocalTraining(), RoundSchedule(barrier=False), RayEngine(), r"leave barrier=False out, or engine=RayEngine"),
        (LocalTraining(), RoundSchedule(deadline=3.0), Processes(2), r"give engine=VirtualTime\(\.\.\.\) too"),
        (LocalTraining(), RoundSchedule(barrier=False), Processes(2), "leave barrier=False out"),
        (LocalTraining(), RoundSchedule(pacing="data"), Processes(2), "orders the turns .*: leave engine out"),
        (LocalTraining(), RoundSchedule(pacing="data"), VirtualTime(), r"or let VirtualTime\(compute=...\) give"),
    ],
)
def test_groups_that_dont_go_together_are_refused(local: Any, schedule: Any, engine: Any, message: str) -> None:
    """With how to mend it: another group, or another engine."""
    with pytest.raises(InputError, match=message):
        check_settings(local, schedule, engine)


def test_groups_as_they_are_meant_are_accepted() -> None:
    """A deadline by a virtual clock, rounds in worker processes, a scheduler that each client makes."""
    decay = torch.optim.lr_scheduler.ExponentialLR
    local = LocalTraining(scheduler=lambda optimizer: decay(optimizer, 0.9), keep_optimizers=True)
    check_settings(local, RoundSchedule(clients_per_round=0.1, deadline=3.0), VirtualTime())
    check_settings(local, RoundSchedule(clients_per_round=2, min_clients=2, barrier=True), Processes(1))
    check_settings(local, RoundSchedule(barrier=False, min_updates=3), None)


def test_simulate_refuses_a_group_of_another_type() -> None:
    """Before the model is cut."""
    settings = toy.grouped({"model": toy.model(), "at": "7", "clients": toy.clients()})
    with pytest.raises(InputError, match="local is"):
        toy.simulate(**{**settings, "local": 4}, loss_fn=len, optimizer=len, server_optimizer=len, rounds=1)


@pytest.mark.parametrize("engine", [4, "rey", RayEngine])
def test_what_is_no_engine_is_refused(engine: Any) -> None:
    """With those that there are; one has a name of its own."""
    with pytest.raises(InputError, match=r"engine is .*: expected a VirtualTime, .* 'ray' or RayEngine\(num_cpus=1\)"):
        as_engine(engine)
    assert as_engine("ray") == RayEngine()
    assert as_engine(None) is None
