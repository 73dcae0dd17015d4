"""`rediffuse init`."""

from pathlib import Path

import click


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
        click.echo(file)
    click.echo(f"\nput images into {folder / 'data'}, then\n  cd {folder}")
    click.echo("  rediffuse train experiment=mine")
