"""Calibration: statistics of a model's keys, values and queries, and what is fitted to them."""
