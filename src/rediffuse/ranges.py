"""Which numbers an argument takes, said beside its type; `build` refuses the others."""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; `above` excludes `low`, `below` excludes `high`, `finite` infinity."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    finite: bool = True

    def __contains__(self, value: float | int) -> bool:
        inside = self.low < value if self.above else self.low <= value
        inside &= value < self.high if self.below else value <= self.high
        return inside and (math.isfinite(value) or not self.finite)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        first = f"above {self.low:g}" if self.above else f"{self.low:g}"
        if self.high < math.inf and not self.below:
            return f"{first} to {self.high:g}"
        low = first if self.above else f"{first} or more"
        return f"{low} and below {self.high:g}" if self.below else low


Finite = Annotated[float, Range()]
Fraction = Annotated[float, Range(0.0, 1.0)]
PositiveFraction = Annotated[float, Range(0.0, 1.0, above=True)]
BelowOne = Annotated[float, Range(0.0, 1.0, below=True)]
InsideOne = Annotated[float, Range(0.0, 1.0, above=True, below=True)]
Positive = Annotated[float, Range(0.0, above=True)]
NonNegative = Annotated[float, Range(0.0)]
Chain = Annotated[int, Range(1.0, 1e6)]
Depth = Annotated[int, Range(1.0, 1000.0)]
Width = Annotated[int, Range(1.0, 65536.0)]
Count = Annotated[int, Range(1.0, 1e6)]
ImageCount = Annotated[int, Range(0.0, 1e15)]
Limit = Annotated[float, Range(0.0, finite=False)]
