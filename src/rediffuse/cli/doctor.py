"""`rediffuse doctor`."""

from pathlib import Path

import click

from rediffuse.cli import options


@click.command()
@click.option("--device", default="auto", show_default=True)
@options.json_output
@options.root
def doctor(device: str, as_json: bool, root: Path | None) -> int:
    """Check this machine and the place of runs: versions, device, disk, and a short training.

    Each line says ok, warn or fail, and what to do. It takes about ten seconds and leaves nothing.
    The exit code is 1 if anything fails.

    \b
    Examples:
      rediffuse doctor
      rediffuse doctor --root /data/runs --json
    """
    from rediffuse import doctor as door

    return door.doctor(root, device, as_json=as_json)
