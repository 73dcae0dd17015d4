"""`rediffuse data pack` and `rediffuse data inspect`."""

from pathlib import Path

import click

from rediffuse.cli import options

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
    from rediffuse import launch

    launch.pack_data(source, words, out=out, root=root)


@data.command(context_settings=_WORDS)
@click.argument("source")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
@options.json_output
@options.root
def inspect(source: str, words: tuple[str, ...], as_json: bool, root: Path | None) -> None:
    """Tell what SOURCE holds: parts, classes, counts, skipped files, mean and spread of its pixels."""
    from rediffuse import launch

    launch.inspect_data(source, words, as_json=as_json, root=root)
