"""The protocol card: everything that a figure depends on, and one digest of it.

A Fréchet distance without its n, its network, its reference and its sampler says nothing (Parmar
et al. 2022; Chong & Forsyth 2020). Two figures may be compared where their cards differ in nothing
but what is being compared.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rediffuse.words import masked_tree

Facts = Mapping[str, Any]
"""Plain data: what JSON can say."""


@dataclass(frozen=True)
class Card:
    """How a figure came about.

    `samples` says how the images under judgement were made or where they lie, `reference` what they
    are held against, `features` the networks that looked at both, by name, and `measure` the
    constants of what was measured.
    """

    n: int
    samples: Facts
    reference: Facts
    features: Facts
    measure: Facts
    versions: Facts

    @property
    def digest(self) -> str:
        """16 digits of the SHA-256 of every field: what a result is kept and found by."""
        return digest_of(self.as_json())

    def masked(self) -> "Card":
        """Return the card with secrets masked, as files hold it: a digest is over what is kept.

        Call this where a card is made. A card that was read must stay as it is, since what counts
        as a secret depends on the environment.
        """
        return Card(**masked_tree(self.as_json()))

    def through(self, *networks: str) -> "Card":
        """The card of a figure that only these networks had a part in."""
        return replace(self, features={name: self.features[name] for name in networks})

    def of(self, n: int) -> "Card":
        """The card of a figure that only the first `n` images had a part in."""
        return replace(self, n=n)

    def as_json(self) -> dict[str, Any]:
        """All fields, as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        seen = [f"{name} {facts['digest']}" for name, facts in self.features.items()]
        through = f", through {' and '.join(seen)}" if seen else ""
        return (
            f"card {self.digest}: {_told(self.samples)}; against {_told(self.reference)}{through}"
        )


def digest_of(facts: Any) -> str:
    """16 digits of the SHA-256 of plain data as JSON holds it, whatever the order of its keys.

    Raises:
        ValueError: for a number that is not finite.
        TypeError: for what is not plain data.
    """
    facts = json.loads(json.dumps(facts, allow_nan=False))  # integer keys become strings
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _told(facts: Facts) -> str:
    """The one line that a set of images says of itself."""
    return str(facts.get("told") or digest_of(facts))
