"""`rediffuse runs` and `rediffuse show`."""

from pathlib import Path

import click

from rediffuse.cli import options
from rediffuse.words import json_text, say


@click.command()
@options.json_output
@options.root
def runs(as_json: bool, root: Path | None) -> None:
    """List the runs, newest first.

    \b
    Examples:
      rediffuse runs
      rediffuse runs --root other/runs --json
    """
    from rediffuse import overview
    from rediffuse.runs import list_runs, runs_root

    home = runs_root(root)
    rows = [overview.brief(run) for run in list_runs(home)]
    if as_json:
        click.echo(json_text(rows))
    elif rows:
        overview.print_table(rows)
    else:
        say(f"no runs in {home}; `rediffuse train` makes one")


@click.command()
@options.run
@options.run_id
@options.json_output
@options.root
def show(run_id: str | None, option: str | None, as_json: bool, root: Path | None) -> None:
    """Tell what a run is, how far it came and what it left.

    \b
    Examples:
      rediffuse show 3f2a91
      rediffuse show 3f2a91 --json
    """
    from rediffuse import overview
    from rediffuse.runs import find_run, runs_root

    facts = overview.full(find_run(runs_root(root), options.run_argument(run_id, option)))
    click.echo(json_text(facts)) if as_json else overview.print_facts(facts)
