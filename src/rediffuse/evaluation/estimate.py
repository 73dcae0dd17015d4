"""A figure and how much it varies."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """Mean and standard deviation (not of the mean) over subsets or splits."""

    mean: float
    sd: float
