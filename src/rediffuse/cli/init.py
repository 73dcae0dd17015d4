"""`rediffuse init`."""

from pathlib import Path

import click

from rediffuse.words import say


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Make FOLDER for images of your own: a configuration, a place for data, a part of your own.

    Nothing that is there is overwritten. Its README.md has the commands that come next.

    \b
    Examples:
      rediffuse init my-project
    """
    from rediffuse.starting import begin

    for file in begin(folder):
        say(str(file))
    say(f"\nput images into {folder / 'data'}, then\n  cd {folder}")
    say("  rediffuse train experiment=mine")
