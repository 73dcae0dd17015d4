"""`rediffuse memorisation`."""

import click

from rediffuse.cli import complete, options


@click.command()
@options.run
@options.places
@options.run_id
@click.option(
    "--n",
    "--num-samples",
    "--num_samples",
    "count",
    type=click.IntRange(2),
    default=1000,
    show_default=True,
    help="How many samples.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Another set.")
@click.option("--class", "class_name", help="All of one class; else they take turns.")
@click.option(
    "--guidance",
    shell_complete=complete.parts("guidance"),
    help="As in `rediffuse sample`; else the run's own.",
)
@click.option("--solver", shell_complete=complete.parts("solver"), help="Else the run's own.")
@click.option("--steps", type=click.IntRange(1), help="Else as many as the run says.")
@click.option(
    "--weights", type=click.Choice(["average", "raw"]), default="average", show_default=True
)
@click.option(
    "--checkpoint",
    default="latest",
    show_default=True,
    shell_complete=complete.checkpoints,
    help="Or best, or a number.",
)
@click.option("--batch-size", "--batch_size", type=click.IntRange(1), help="Else what fits.")
@options.compiles
@click.option("--device", default="auto", show_default=True)
@options.json_output
@options.root
@options.trust
def memorisation(
    run_id: str | None, places: tuple[str, ...], option: str | None, as_json: bool, **how: object
) -> int:
    """Look for copies: are samples nearer to training images than unseen real images are?

    Every sample's nearest training image is compared with the next ones, and that with the same of
    images that were held out. An alarm is false with a known, small probability, which is told with
    it. A picture shows the most suspicious samples above their nearest training images.

    \b
    Examples:
      rediffuse memorisation 3f2a91
      rediffuse memorisation 3f2a91 --n 5000 --checkpoint 200
    """
    from rediffuse import memorisation as door
    from rediffuse.gallery import Options

    asked = Options(**how)  # type: ignore[arg-type]
    word = options.run_at(run_id, option, places, asked.root, asked.trust)
    return door.memorisation(word, asked, as_json=as_json)
