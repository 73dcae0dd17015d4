"""`rediffuse data pack`, `rediffuse data inspect` and `rediffuse data duplicates`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rediffuse.cli import complete, options
from rediffuse.words import json_text, say

if TYPE_CHECKING:
    from rediffuse.config.schema import Data
    from rediffuse.data.packing import Packed

_WORDS = {"ignore_unknown_options": True}


@click.group()
def data() -> None:
    """Look at images and pack them, as `train` does by itself.

    \b
    Examples:
      rediffuse data inspect cifar10
      rediffuse data pack my/images data.image_size=64
      rediffuse data duplicates my/images data.image_size=64
    """


@data.command(context_settings=_WORDS)
@click.argument("source", shell_complete=complete.parts("data"))
@options.words
@click.option("--out", type=click.Path(path_type=Path), help="Else in <root>/packed.")
@options.root
def pack(source: str, words: tuple[str, ...], out: Path | None, root: Path | None) -> None:
    """Decode and resize SOURCE once: a data set's name, or a folder of images.

    \b
    Examples:
      rediffuse data pack my/images data.image_size=64
      rediffuse data pack cifar10
    """
    packed = _packed(source, words, out, root)
    counts = ", ".join(f"{len(part.images):,} {name}" for name, part in packed.parts.items())
    say(f"{counts} images of {packed.image_size} pixels: {packed.folder}")


@data.command(context_settings=_WORDS)
@click.argument("source", shell_complete=complete.parts("data"))
@options.words
@options.json_output
@options.root
def inspect(source: str, words: tuple[str, ...], as_json: bool, root: Path | None) -> None:
    """Tell what SOURCE holds: parts, classes, counts, skipped files, and how its pixels lie.

    \b
    Examples:
      rediffuse data inspect my/images data.image_size=64
      rediffuse data inspect mnist --json
    """
    from rediffuse import images, overview

    facts = images.describe(_packed(source, words, None, root))
    click.echo(json_text(facts)) if as_json else overview.print_facts(facts)


@data.command(context_settings=_WORDS)
@click.argument("source", shell_complete=complete.parts("data"))
@options.words
@click.option("--no-mirrored", "--no_mirrored", is_flag=True, help="Leave mirror images alone.")
@click.option(
    "--output-dir",
    "--output_dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Else <root>/duplicates.",
)
@options.json_output
@options.root
def duplicates(
    source: str,
    words: tuple[str, ...],
    no_mirrored: bool,
    output_dir: Path | None,
    as_json: bool,
    root: Path | None,
) -> int:
    """Find images that SOURCE holds more than once: copies, mirrored, brightened, recompressed.

    Every pair is compared, after packing: the time grows with the square of the number of images.

    \b
    Examples:
      rediffuse data duplicates my/images data.image_size=64
    """
    from rediffuse import duplicates as door
    from rediffuse.runs import runs_root

    place, mirrored = runs_root(root), not no_mirrored
    return door.duplicates(
        _data(source, words), place, output_dir, mirrored=mirrored, as_json=as_json
    )


def _packed(source: str, words: Sequence[str], out: Path | None, root: Path | None) -> "Packed":
    from rediffuse.images import pack_as
    from rediffuse.runs import runs_root

    return pack_as(_data(source, words), runs_root(root), out=out)


def _data(source: str, words: Sequence[str]) -> "Data":
    from rediffuse.config.compose import compose

    is_folder = Path(source).is_dir() or any(mark in source for mark in "/.~")
    values = {"data": "folder", "data.path": source} if is_folder else {"data": source}
    return compose(words, values=values).data
