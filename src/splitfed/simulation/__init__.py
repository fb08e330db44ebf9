"""A whole federation in one process: real clients, servers, accumulators and rounds, in turns or in virtual time.

Leaf first: `streams` (randomness by name), `timeline` and `virtual` (a clock, and who is slow by it), `localdata` and
`evaluation` (what a client trains and is judged on), `metering` (bytes by client), `trainee` (a client while it is
active), `assembly` (all that serves), `schedule` (who does what when), `worker` and `crew` (clients in processes of
their own), `simulated` (the generator of reports), `simulating` (the function that puts these together).
"""

from splitfed.simulation.localdata import deal
from splitfed.simulation.simulated import Simulation
from splitfed.simulation.simulating import simulate
from splitfed.simulation.virtual import VirtualTime, lognormal, stragglers

__all__ = ["Simulation", "VirtualTime", "deal", "lognormal", "simulate", "stragglers"]
