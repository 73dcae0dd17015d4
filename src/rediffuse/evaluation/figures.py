"""A figure: a number that cannot be told without how it came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rediffuse.evaluation.card import Card


class Spread(NamedTuple):
    """The same figure of `blocks` disjoint blocks of `n` images each: their mean and deviation."""

    blocks: int
    n: int
    mean: float
    sd: float


class Floor(NamedTuple):
    """The same figure of `n` real images; `what` says which, and against which."""

    value: float
    n: int
    what: str


@dataclass(frozen=True)
class Figure:
    """One number, with its card.

    `sd` is the deviation of what is itself a mean over subsets or splits. `spread` is None where
    there are too few images for blocks, `floor` where no real images are left. The bias of a
    distance depends on n, so that a block's mean is not that of the whole.
    """

    name: str
    value: float
    card: Card
    sd: float | None = None
    spread: Spread | None = None
    floor: Floor | None = None

    @property
    def full_name(self) -> str:
        """The name with the number of images in it, under which it is shown and kept."""
        return with_n(self.name, self.card.n)

    def as_json(self) -> dict[str, Any]:
        """Everything, the card included."""
        return {
            "figure": self.full_name,
            "name": self.name,
            "value": self.value,
            "sd": self.sd,
            "spread": self.spread and self.spread._asdict(),
            "floor": self.floor and self.floor._asdict(),
            "card": {"digest": self.card.digest, **self.card.as_json()},
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Figure":
        """Undo `as_json`.

        Raises:
            ValueError: for what it did not write, and for a card that has been changed since.
        """
        try:
            fields = dict(told["card"])
            digest, card = fields.pop("digest"), Card(**fields)
            spread, floor = told["spread"], told["floor"]
            figure = cls(
                str(told["name"]),
                float(told["value"]),
                card,
                None if told["sd"] is None else float(told["sd"]),
                spread and Spread(*(_NUMBERS[name](spread[name]) for name in Spread._fields)),
                floor and Floor(float(floor["value"]), int(floor["n"]), str(floor["what"])),
            )
        except (KeyError, TypeError, AttributeError) as wrong:
            raise ValueError(f"it is not a figure ({wrong})") from None
        if digest != card.digest:
            raise ValueError(f"the card of {figure.name} is not the one it was made with")
        return figure

    def __str__(self) -> str:
        of = self.spread
        spread = f" ({shown_spread(of)} in {of.blocks} x {short(of.n)})" if of else ""
        floor = f", floor {self.floor.value:.4g} ({self.floor.what})" if self.floor else ""
        return f"{self.full_name} {self.value:.4g}{spread}{floor} [{self.card}]"


_NUMBERS = {"blocks": int, "n": int, "mean": float, "sd": float}


def with_n(name: str, n: int) -> str:
    """`fid` of 50,000 images is `fid_50k`, of 2,048 `fid_2048`."""
    return f"{name}_{short(n)}"


def short(n: int) -> str:
    """Whole thousands as `10k`, other numbers as they are."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


def spread_of(values: Sequence[float], n: int) -> Spread | None:
    """Mean and sample standard deviation over blocks of n images; None for less than two."""
    if len(values) < 2:
        return None
    return Spread(len(values), n, fmean(values), stdev(values))


def shown_spread(spread: Spread) -> str:
    """`3.2 ± 0.1`: the mean of the blocks, which is not the figure of all, and their deviation."""
    return f"{spread.mean:.3g} ± {spread.sd:.2g}"
