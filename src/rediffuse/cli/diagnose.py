"""`rediffuse diagnose`."""

import click

from rediffuse.cli import complete, options


@click.command()
@options.run
@options.places
@options.run_id
@click.option(
    "--n", "count", type=click.IntRange(2), default=256, show_default=True, help="Held-out images."
)
@click.option(
    "--levels", type=click.IntRange(2, 1000), default=12, show_default=True, help="Noise levels."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Other noise.")
@click.option(
    "--guidance",
    shell_complete=complete.parts("guidance"),
    help="Of the samples, as in `rediffuse sample`; else the run's own.",
)
@click.option(
    "--solver", shell_complete=complete.parts("solver"), help="Of the samples; else the run's own."
)
@click.option("--steps", type=click.IntRange(1), help="Of the samples; else the run's own.")
@click.option(
    "--checkpoint",
    default="latest",
    show_default=True,
    shell_complete=complete.checkpoints,
    help="Or best, or a number.",
)
@click.option("--device", default="auto", show_default=True)
@options.json_output
@options.root
@options.trust
def diagnose(
    run_id: str | None,
    places: tuple[str, ...],
    option: str | None,
    levels: int,
    as_json: bool,
    **how: object,
) -> int:
    """Tell at which noise a model errs, whether its variance knows, and how samples come about.

    Errors are those of held-out images, each with the same noise at every level, beside those of
    the best linear denoiser. A picture shows them, and the size of samples on their way.

    \b
    Examples:
      rediffuse diagnose 3f2a91
      rediffuse diagnose 3f2a91 --n 1000 --levels 30 --solver heun
    """
    from rediffuse import diagnosis
    from rediffuse.gallery import Options

    asked = Options(**how)  # type: ignore[arg-type]
    word = options.run_at(run_id, option, places, asked.root, asked.trust)
    return diagnosis.diagnose(word, asked, level_count=levels, as_json=as_json)
