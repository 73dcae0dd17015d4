"""`rediffuse data pack` and `rediffuse data inspect`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rediffuse.cli import options

if TYPE_CHECKING:
    from rediffuse.data.packing import Packed

_WORDS = {"ignore_unknown_options": True}


@click.group()
def data() -> None:
    """Look at images and pack them, as `train` does by itself."""


@data.command(context_settings=_WORDS)
@click.argument("source")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Else in <root>/packed.")
@options.root
def pack(source: str, words: tuple[str, ...], out: Path | None, root: Path | None) -> None:
    """Decode and resize SOURCE once: a data set's name, or a folder of images.

    \b
    rediffuse data pack my/images data.image_size=64
    rediffuse data pack cifar10
    """
    packed = _packed(source, words, out, root)
    counts = ", ".join(f"{len(part.images):,} {name}" for name, part in packed.parts.items())
    click.echo(f"{counts} images of {packed.image_size} pixels: {packed.folder}")


@data.command(context_settings=_WORDS)
@click.argument("source")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
@options.json_output
@options.root
def inspect(source: str, words: tuple[str, ...], as_json: bool, root: Path | None) -> None:
    """Tell what SOURCE holds: parts, classes, counts, skipped files, and how its pixels lie."""
    from rediffuse import images, overview

    facts = images.describe(_packed(source, words, None, root))
    click.echo(json.dumps(facts, indent=1)) if as_json else overview.print_facts(facts)


def _packed(source: str, words: Sequence[str], out: Path | None, root: Path | None) -> "Packed":
    from rediffuse.config.compose import compose
    from rediffuse.images import pack_as
    from rediffuse.runs import runs_root

    is_folder = Path(source).is_dir() or any(mark in source for mark in "/.~")
    named = ["data=folder", f"data.path='{source}'"] if is_folder else [f"data={source}"]
    return pack_as(compose([*named, *words]).data, runs_root(root), out=out)
