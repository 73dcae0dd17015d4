"""The command line: thin doors; everything behind them can be called from Python.

Commands import what they need when they run, so that `rediffuse --help` does not wait for torch.
"""

import sys
from collections.abc import Sequence

import click

from rediffuse.cli import data, reproduce, runs, sample, train
from rediffuse.errors import RediffuseError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rediffuse")
def rediffuse() -> None:
    """Train, sample and reproduce diffusion models for images.

    \b
    rediffuse train                                     digits, in about a minute
    rediffuse train experiment=folder64 data.path=DIR   your own images
    rediffuse sample ID --n 64                          ID: as `train` prints it, or 6 digits
    """


rediffuse.add_command(train.train)
rediffuse.add_command(train.resume)
rediffuse.add_command(sample.sample)
rediffuse.add_command(reproduce.reproduce)
rediffuse.add_command(runs.show)
rediffuse.add_command(runs.runs)
rediffuse.add_command(data.data)


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; a refusal is one line on standard error and an exit code, no traceback."""
    arguments = [*words, *sys.argv[1:]] if words else None
    try:
        code = rediffuse.main(arguments, standalone_mode=False)
    except RediffuseError as refused:
        click.echo(f"error: {refused}", err=True)
        sys.exit(refused.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as refused:
        click.echo(f"error: {refused.format_message()}", err=True)
        sys.exit(refused.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
