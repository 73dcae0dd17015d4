"""Options that several commands share."""

from pathlib import Path

import click

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
