"""`rediffuse evaluate`."""

from pathlib import Path

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
    help="How many images; else 10,000, or as many thousands as there are real ones.",
)
@click.option(
    "--solver",
    shell_complete=complete.parts("solver"),
    help="As in `rediffuse sample`; else the run's own.",
)
@click.option("--steps", type=click.IntRange(1), help="Else as many as the run says.")
@click.option("--guidance", shell_complete=complete.parts("guidance"), help="Else as the run says.")
@click.option(
    "--weights", type=click.Choice(["average", "raw"]), default="average", show_default=True
)
@click.option("--images", metavar="FOLDER", help="Judge these images instead of a run's.")
@click.option(
    "--reference", metavar="FOLDER", help="What --images are held against: images, or packed ones."
)
@click.option("--size", type=click.IntRange(1, 8192), help="Bring given images to this size.")
@click.option(
    "--cas",
    "accuracy_score",
    is_flag=True,
    help="Classification accuracy score: learn from samples, test on real images.",
)
@click.option(
    "--likelihood",
    type=click.IntRange(1),
    metavar="N",
    help="Bits per dimension of N held-out images, too.",
)
@options.judged
@options.drawn
@options.json_output
@options.root
@options.trust
def evaluate(
    run_id: str | None,
    places: tuple[str, ...],
    option: str | None,
    images: str | None,
    reference: str | None,
    size: int | None,
    **how: object,
) -> int:
    """Judge a run's images: how far from real ones, how real, how various, of the class asked for.

    Every figure has its card: what was drawn and how, what it was held against, through which
    network. Beside it stand its standard error over samples of the same model, and the floor: as
    many real images against the same reference. All is kept in the run's evaluation/, and what is
    there is not drawn again.

    \b
    Examples:
      rediffuse evaluate 3f2a91
      rediffuse evaluate 3f2a91 --n 1000 --solver unipc --steps 10
      rediffuse evaluate 3f2a91 --metric fid --n 50000
      rediffuse evaluate --images theirs/ --reference real/
    """
    from rediffuse import evaluate as judge
    from rediffuse.gallery import Options

    own = {name: how.pop(name) for name in (*options.JUDGED, "accuracy_score", "likelihood")}
    asked = judge.Asked(**own, device=str(how["device"]))  # type: ignore[arg-type]
    if images is not None or reference is not None:
        word = run_id or option
        if word or images is None or reference is None:
            raise click.UsageError("give a run, or both --images and --reference")
        if how["count"] or asked.accuracy_score or asked.likelihood:
            raise click.UsageError(
                "--n, --cas and --likelihood are of a run's images, not of given"
            )
        root = how["root"]
        assert root is None or isinstance(root, Path)
        return judge.evaluate_given(images, reference, size, root, asked)
    sampling = Options(**how)  # type: ignore[arg-type]
    word = options.run_at(run_id, option, places, sampling.root, sampling.trust)
    return judge.evaluate(word, sampling, asked)
