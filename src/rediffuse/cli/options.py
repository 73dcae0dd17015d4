"""Options that several commands share."""

from pathlib import Path

import click

WORDS = {"ignore_unknown_options": True, "allow_interspersed_args": True}
"""The settings of a command that takes `key=value` and `--key value`."""

words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
config_file = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="A YAML file to start from."
)
root = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where runs live; else $REDIFFUSE_ROOT, else ./runs.",
)
trust = click.option(
    "--trust",
    multiple=True,
    metavar="PACKAGE",
    help="Import parts of your own that the run names from this package.",
)
json_output = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")


def run_argument(run_id: str | None, option: str | None) -> str:
    """The run given in place or as --run-id, exactly as it was typed."""
    word = run_id or option
    if not word:
        raise click.UsageError("which run? give its id, or the first 6 digits of it")
    return word
