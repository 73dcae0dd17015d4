"""A figure that is a mean over subsets or splits, and how much it varies."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """Mean and standard deviation (not of the mean) over subsets or splits.

    `standard_error` is that of the mean, over other samples of the same model; None where the
    samples were not dealt into groups.
    """

    mean: float
    sd: float
    standard_error: float | None = None
