"""What `study.py` is made of: the data and rates of the study, what it is compared with, and its pictures."""
