"""`rediffuse reproduce`."""

from pathlib import Path

import click

from rediffuse.cli import options


@click.command()
@options.run
@options.places
@options.run_id
@click.option("--steps", type=click.IntRange(1), help="Only so many; else as far as it has come.")
@click.option("--keep", is_flag=True, help="Keep the copy as a run of its own.")
@click.option(
    "--root-for-copy",
    "--root_for_copy",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the copy is trained; else beside the run.",
)
@options.json_output
@options.root
@options.trust
def reproduce(
    run_id: str | None,
    places: tuple[str, ...],
    option: str | None,
    steps: int | None,
    keep: bool,
    root_for_copy: Path | None,
    as_json: bool,
    root: Path | None,
    trust: tuple[str, ...],
) -> int:
    """Train a run again from what it recorded, and compare the two bit for bit.

    Says PASS, or where they part, in what, and what differs between then and now (exit code 1; also
    where training ends before the last digest).

    \b
    Examples:
      rediffuse reproduce 3f2a91 --steps 8
      rediffuse reproduce 3f2a91 --keep
    """
    from rediffuse import reproduce as again

    word = options.run_at(run_id, option, places, root, trust)
    return again.reproduce(
        word,
        steps=steps,
        keep=keep,
        root=root,
        copy_root=root_for_copy,
        trusted=trust,
        as_json=as_json,
    )
