"""`rediffuse report`."""

import click

from rediffuse.cli import complete, options


@click.command()
@options.run
@options.run_id
@click.option(
    "--output",
    type=options.FILE,
    metavar="FILE.html",
    help="Else report.html in the run's directory.",
)
@click.option(
    "--pictures",
    type=options.OUTPUT,
    metavar="FOLDER",
    help="Also write every picture as a file of its own.",
)
@click.option("--no-images", "--no_images", is_flag=True, help="Ask no network; draw curves only.")
@click.option(
    "--n",
    "count",
    type=click.IntRange(1, 32),
    default=10,
    show_default=True,
    help="Images per solver.",
)
@click.option(
    "--solver",
    "solvers",
    multiple=True,
    help="Put side by side; repeat it: 'heun churn=40'.",
    shell_complete=complete.parts("solver"),
)
@click.option("--steps", type=click.IntRange(1), help="Of the solvers; else as the run samples.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Another set of images.",
)
@click.option(
    "--checkpoint",
    default="latest",
    show_default=True,
    shell_complete=complete.checkpoints,
    help="latest, best, or a step's number.",
)
@options.root
@options.trust
def report(run_id: str | None, option: str | None, no_images: bool, **how: object) -> int:
    """Write one HTML page about a run: curves, previews, how images come to be, configuration.

    It holds everything that it shows, loads nothing and runs nothing.

    \b
    Examples:
      rediffuse report 3f2a91
      rediffuse report 3f2a91 --output page.html --no-images
      rediffuse report 3f2a91 --solver ddim --solver "heun churn=10" --steps 10
    """
    from rediffuse.report import run

    asked = run.Asked(draws=not no_images, **how)  # type: ignore[arg-type]
    return run.report(options.run_argument(run_id, option), asked)
