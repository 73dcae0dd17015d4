"""`rediffuse runs` and `rediffuse show`."""

import json
from pathlib import Path

import click

from rediffuse.cli import options


@click.command()
@options.json_output
@options.root
def runs(as_json: bool, root: Path | None) -> None:
    """List the runs, newest first."""
    from rediffuse import overview
    from rediffuse.runs import list_runs, runs_root

    home = runs_root(root)
    rows = [overview.brief(run) for run in list_runs(home)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    elif rows:
        overview.print_table(rows)
    else:
        click.echo(f"no runs in {home}; `rediffuse train` makes one")


@click.command()
@click.argument("run_id", required=False)
@click.option("--run-id", "--run_id", "option", help="The same as RUN_ID.")
@options.json_output
@options.root
def show(run_id: str | None, option: str | None, as_json: bool, root: Path | None) -> None:
    """Tell what a run is, how far it came and what it left."""
    from rediffuse import overview
    from rediffuse.runs import find_run, runs_root

    facts = overview.full(find_run(runs_root(root), options.run_argument(run_id, option)))
    click.echo(json.dumps(facts, indent=1)) if as_json else overview.print_facts(facts)
