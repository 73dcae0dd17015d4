"""`rediffuse data pack`, `rediffuse data inspect` and `rediffuse data duplicates`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rediffuse.cli import complete, options
from rediffuse.words import json_text, say

if TYPE_CHECKING:
    from rediffuse.config.schema import Data

_WORDS = {"ignore_unknown_options": True}


@click.group()
def data() -> None:
    """Look at images and pack them, as `train` does by itself.

    \b
    Examples:
      rediffuse data inspect cifar10
      rediffuse data pack my/images data.image_size=64
      rediffuse data verify my/images data.image_size=64
      rediffuse data duplicates my/images data.image_size=64
    """


@data.command(context_settings=_WORDS)
@click.argument("source", shell_complete=complete.parts("data"))
@options.words
@click.option("--out", type=options.FOLDER, help="Else in <root>/packed.")
@click.option("--again", is_flag=True, help="Even what was packed before.")
@options.root
def pack(
    source: str, words: tuple[str, ...], out: Path | None, again: bool, root: Path | None
) -> None:
    """Decode and resize SOURCE once: a data set's name, or a folder of images.

    \b
    Examples:
      rediffuse data pack my/images data.image_size=64
      rediffuse data pack cifar10
    """
    from rediffuse.images import pack_as
    from rediffuse.runs import runs_root

    packed = pack_as(_data(source, words), runs_root(root), out=out, again=again)
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
    from rediffuse.runs import runs_root

    named = _data(source, words)
    packed = images.pack_as(named, runs_root(root))
    facts = images.describe(packed, images.source_of(named).left_out)
    click.echo(json_text(facts)) if as_json else overview.print_facts(facts)


@data.command(context_settings=_WORDS)
@click.argument("source", shell_complete=complete.parts("data"))
@options.words
@options.root
def verify(source: str, words: tuple[str, ...], root: Path | None) -> int:
    """Read all that was packed of SOURCE, decode every image again, and compare the two.

    Finds damage to packed images, and files that were replaced by others of equal names, sizes and
    times. Nothing is changed; `rediffuse data pack SOURCE --again` packs anew (exit code 1). A
    folder that `data pack` wrote is read alone.

    \b
    Examples:
      rediffuse data verify my/images data.image_size=64
      rediffuse data verify runs/packed/folder-0a1b2c3d4e5f
    """
    from rediffuse import images
    from rediffuse.data.packing import FACTS
    from rediffuse.runs import runs_root

    if (Path(source) / FACTS).is_file():
        found = images.verified(None, Path(source))
    else:
        named = _data(source, words)
        found = images.verified(named, images.packed_folder(named, runs_root(root)))
    say(found.told)
    for name in found.differing[:_NAMED]:
        say(f"  {name}")
    if len(found.differing) > _NAMED:
        say(f"  and {len(found.differing) - _NAMED:,} more")
    return int(not found.is_whole)


_NAMED = 20


@data.command(context_settings=_WORDS)
@click.argument("source", shell_complete=complete.parts("data"))
@options.words
@click.option("--no-mirrored", "--no_mirrored", is_flag=True, help="Leave mirror images alone.")
@click.option(
    "--output-dir",
    "--output_dir",
    type=options.FOLDER,
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


def _data(source: str, words: Sequence[str]) -> "Data":
    from rediffuse.config.compose import compose

    is_folder = Path(source).is_dir() or any(mark in source for mark in "/.~")
    values = {"data": "folder", "data.path": source} if is_folder else {"data": source}
    return compose(words, values=values).data
