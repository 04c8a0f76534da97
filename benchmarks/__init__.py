"""Measurements, to be run by hand: they tell figures, and judge nothing."""
