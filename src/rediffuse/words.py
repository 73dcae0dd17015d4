"""Small courtesies of messages."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: str, known: Iterable[str], prefix: str = "; did you mean ") -> str:
    """The nearest known name as the end of a sentence, or nothing if none is near."""
    near = get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"{prefix}{near[0]}?" if near else ""
