"""`rediffuse plan`."""

from pathlib import Path

import click

from rediffuse.cli import options
from rediffuse.words import json_text


@click.command(context_settings=options.WORDS)
@options.words
@options.config_file
@options.json_output
@options.root
def plan(words: tuple[str, ...], file: Path | None, as_json: bool, root: Path | None) -> None:
    """Tell what training would take: parameters, FLOPs, memory, images a second, hours and disk.

    Words are those of `rediffuse train`. The images are packed and a few steps are taken, about ten
    seconds of them; no run is made.

    \b
    Examples:
      rediffuse plan experiment=mnist
      rediffuse plan experiment=folder64 data.path=DIR training.batch_size=auto
    """
    from rediffuse import overview
    from rediffuse.config.compose import compose
    from rediffuse.plan import plan as planned

    facts = planned(compose(list(words), file), root=root)
    click.echo(json_text(facts)) if as_json else overview.print_facts(facts)
