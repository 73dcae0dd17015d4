"""`rediffuse studio`."""

from importlib.util import find_spec
from pathlib import Path

import click

from rediffuse.cli import options
from rediffuse.errors import ConfigError


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Of 127.0.0.1; 0 is any that is free.",
)
@click.option("--open/--no-open", "opens", default=True, help="Show it in a browser at once.")
@click.option(
    "--token/--no-token",
    "with_token",
    default=True,
    show_default=True,
    help="Answer only who has the token of the address; without it, every user of this machine.",
)
@click.option("--device", default="auto", show_default=True)
@options.root
@options.trust
def studio(
    root: Path | None,
    trust: tuple[str, ...],
    device: str,
    port: int,
    opens: bool,
    with_token: bool,
) -> int:
    """Open a page on the runs of a root: draw, watch, cancel, edit, compare, see runs train.

    It is served to this machine alone, to whoever has the address that is printed, and needs no
    network.

    \b
    Examples:
      rediffuse studio
      rediffuse studio --root elsewhere/runs --no-open --port 7860
    """
    if not find_spec("gradio"):
        raise ConfigError("the studio needs Gradio: pip install 'rediffuse[studio]'")
    from rediffuse.runs import runs_root
    from rediffuse.studio import serve
    from rediffuse.studio.desk import Desk

    return serve.studio(Desk(runs_root(root), trust, device), port, opens, with_token)
