"""A whole federation in one process: real clients, servers, accumulators and rounds, in turns or in virtual time.

Leaf first: `streams` (randomness by name), `timeline` and `virtual` (a clock, and who is slow by it), `localdata` and
`evaluation` (what a client trains and is judged on), `metering` (bytes by client), `trainee` (a client while it is
active), `assembly` (all that serves), `schedule` (who does what when), `worker` and `crew` (clients in processes of
their own), `simulated` (the generator of reports), `simulating` (the function that puts these together).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Simulation", "VirtualTime", "deal", "lognormal", "simulate", "stragglers"]

if TYPE_CHECKING:
    from splitfed.simulation.data import deal
    from splitfed.simulation.launch import simulate
    from splitfed.simulation.run import Simulation
    from splitfed.simulation.virtual_time import VirtualTime, lognormal, stragglers
else:
    from splitfed._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Simulation": "simulation.run",
            "VirtualTime": "simulation.virtual_time",
            "deal": "simulation.data",
            "lognormal": "simulation.virtual_time",
            "simulate": "simulation.launch",
            "stragglers": "simulation.virtual_time",
        },
    )
