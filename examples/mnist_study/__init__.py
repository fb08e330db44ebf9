"""The parts of `study.py`: the data and rates of the study, its baselines, and its plots."""
