"""Whether replicas add up: measured with real processes on this machine, and in virtual time beyond its cores."""
