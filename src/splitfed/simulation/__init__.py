"""A whole federation on one machine: real servers, accumulators and rounds over virtual clients.

`launch` is `simulate`; `settings` its groups of settings; `assembly` the federation; `client` one
client's local run; `run` the rounds and their rows. `engines` let clients train: in this process
(`turns`) or in workers (`pool`), which are processes (`processes`) or actors of Ray (`actors`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "LocalTraining",
    "Processes",
    "RayEngine",
    "RoundSchedule",
    "Simulation",
    "VirtualTime",
    "deal",
    "lognormal",
    "simulate",
    "stragglers",
]

if TYPE_CHECKING:
    from splitfed.simulation.data import deal
    from splitfed.simulation.launch import simulate
    from splitfed.simulation.run import Simulation
    from splitfed.simulation.settings import LocalTraining, Processes, RayEngine, RoundSchedule
    from splitfed.simulation.virtual_time import VirtualTime, lognormal, stragglers
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "LocalTraining": "simulation.settings",
            "Processes": "simulation.settings",
            "RayEngine": "simulation.settings",
            "RoundSchedule": "simulation.settings",
            "Simulation": "simulation.run",
            "VirtualTime": "simulation.virtual_time",
            "deal": "simulation.data",
            "lognormal": "simulation.virtual_time",
            "simulate": "simulation.launch",
            "stragglers": "simulation.virtual_time",
        },
    )
