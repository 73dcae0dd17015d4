"""Which numbers an argument takes, said beside its type; `build` refuses the others."""

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """From `low` to `high`; `above` leaves out `low` itself, `finite` leaves out infinity."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    finite: bool = True

    def __contains__(self, value: float | int) -> bool:
        inside = self.low < value if self.above else self.low <= value
        return inside and value <= self.high and (math.isfinite(value) or not self.finite)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        first = f"above {self.low:g}" if self.above else f"{self.low:g}"
        last = f"to {self.high:g}" if self.high < math.inf else "" if self.above else "or more"
        return f"{first} {last}".strip()


Finite = Annotated[float, Range()]
Fraction = Annotated[float, Range(0.0, 1.0)]
Positive = Annotated[float, Range(0.0, above=True)]
NonNegative = Annotated[float, Range(0.0)]
Chain = Annotated[int, Range(1.0, 1e6)]
Limit = Annotated[float, Range(0.0, finite=False)]
