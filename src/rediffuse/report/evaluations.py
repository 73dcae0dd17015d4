"""Figures of evaluations, each with the card that says how it came about."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rediffuse.config.compose import leaves
from rediffuse.evaluation.digests import UNVERIFIED, read_report
from rediffuse.report.page import told


class Figure(NamedTuple):
    """A number, and every field of its card."""

    file: str
    name: str
    value: str
    standard_error: str
    floor: str
    digest: str
    samples: str  # the card's own line about the images
    card: dict[str, Any]


def evaluations(folder: Path) -> tuple[list[Figure], list[str]]:
    """The figures in a folder's JSON files, and why a file has none.

    A figure is an object with `name`, `value` and a `card` that has a `digest`; a number without
    its card is not shown.
    """
    found: list[Figure] = []
    notes = []
    for file in sorted(folder.glob("*.json")):
        try:
            facts, verified = read_report(file)
            figures = [_figure(file.name, of) for of in _figures(facts)]
        except (OSError, ValueError) as broken:
            why = getattr(broken, "strerror", None) or broken
            notes.append(f"{file.name} cannot be read: {why}.")
            continue
        found += figures
        if figures and not verified:
            notes.append(f"{file.name} is {UNVERIFIED}.")
        if not figures:
            notes.append(f"{file.name} has no figure with its card, so nothing of it is shown.")
    return found, notes


def _figures(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a tree that is a figure, outermost first."""
    if isinstance(value, dict):
        card = value.get("card")
        if {"name", "value"} <= value.keys() and isinstance(card, dict) and card.get("digest"):
            yield value
        else:
            for inner in value.values():
                yield from _figures(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _figures(inner)


def _figure(file: str, of: dict[str, Any]) -> Figure:
    floor, card = of.get("floor"), of["card"]
    shown_floor = ""
    samples = card.get("samples", "")
    if isinstance(floor, dict):
        value, what = (told(floor.get(name)) for name in ("value", "what"))
        shown_floor = f"{value}{_error(floor)} ({what})"
    return Figure(
        file,
        told(of.get("figure", of["name"])),  # with its n
        told(of["value"]),
        _error(of),
        shown_floor,
        told(card["digest"]),
        told(samples.get("told", "")) if isinstance(samples, dict) else told(samples),
        {name: told(value) for name, value in leaves(card).items()},
    )


def _error(of: dict[str, Any]) -> str:
    """The standard error of a number, if it has one."""
    error = of.get("standard_error")
    return "" if error is None else f" ± {told(error)}"
