"""A figure: a number that cannot be told without how it came about."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rediffuse.evaluation.card import Card


class Floor(NamedTuple):
    """The same figure of `n` real images; `what` says which, and against which."""

    value: float
    n: int
    what: str
    standard_error: float | None = None


@dataclass(frozen=True)
class Figure:
    """One number, with its card.

    `standard_error` says how much the number varies with the samples of the same model, at this n
    and against this reference; None for too few images. `floor` is the same figure of as many real
    images, against as many; None where there are not enough. `sd` is the deviation of what is
    itself a mean over subsets or splits, as papers give it for KID and IS; it is no error.
    """

    name: str
    value: float
    card: Card
    standard_error: float | None = None
    floor: Floor | None = None
    sd: float | None = None

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
            "standard_error": self.standard_error,
            "sd": self.sd,
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
            figure = cls(
                str(told["name"]),
                float(told["value"]),
                card,
                _number(told.get("standard_error")),
                told["floor"] and _floor(told["floor"]),
                _number(told["sd"]),
            )
        except (KeyError, TypeError, AttributeError) as wrong:
            raise ValueError(f"it is not a figure ({wrong})") from None
        if digest != card.digest:
            raise ValueError(f"the card of {figure.name} is not the one it was made with")
        return figure

    def __str__(self) -> str:
        floor = f", floor {shown(self.floor)} ({self.floor.what})" if self.floor else ""
        return f"{self.full_name} {shown(self)}{floor} [{self.card}]"


def _floor(told: Mapping[str, Any]) -> Floor:
    error = _number(told.get("standard_error"))
    return Floor(float(told["value"]), int(told["n"]), str(told["what"]), error)


def _number(told: Any) -> float | None:
    return None if told is None else float(told)


def shown(of: Figure | Floor) -> str:
    """`3.21 ± 0.1`: a value and its standard error, if it has one."""
    error = "" if of.standard_error is None else f" ± {of.standard_error:.2g}"
    return f"{of.value:.4g}{error}"


def with_n(name: str, n: int) -> str:
    """`fid` of 50,000 images is `fid_50k`, of 2,048 `fid_2048`."""
    return f"{name}_{short(n)}"


def short(n: int) -> str:
    """Whole thousands as `10k`, other numbers as they are."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)
