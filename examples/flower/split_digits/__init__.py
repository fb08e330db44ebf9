"""Digits that stay with their owners: the body of the network is splitfed's, rounds and averages are Flower's."""
