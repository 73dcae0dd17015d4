"""`rediffuse sample`."""

import sys
from pathlib import Path

import click

from rediffuse.cli import complete, options
from rediffuse.errors import RediffuseError
from rediffuse.words import tell


@click.command()
@options.run
@options.run_id
@click.option(
    "--n", "--num-samples", "--num_samples", "count", type=click.IntRange(1), help="How many."
)
@click.option("--seeds", help="Which: 0-63, or 3,5,8. Image j is the same in every job.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Another set of images.",
)
@click.option("--class", "class_name", help="All of one class; else they take turns.")
@click.option(
    "--guidance",
    shell_complete=complete.parts("guidance"),
    help="0 unconditional, 1 conditional, above 1 guided (w + 1); or 'projected scale=3'.",
)
@click.option(
    "--guide-by",
    "--guide_by",
    metavar="[RUN:]CHECKPOINT",
    help="Guide away from a weaker model: an earlier checkpoint, or another run's.",
)
@click.option(
    "--solver",
    shell_complete=complete.parts("solver"),
    help="unipc, dpmpp_2m, heun, ancestral ...; or 'heun churn=40'.",
)
@click.option(
    "--grid",
    shell_complete=complete.parts("grid"),
    help="Where it stops: trailing, karras, log_snr ...",
)
@click.option(
    "--threshold",
    shell_complete=complete.parts("threshold"),
    help="Hold x_0 in range: clipping, dynamic_thresholding, none.",
)
@click.option("--steps", type=click.IntRange(1), help="How many stops.")
@click.option(
    "--input",
    "inputs",
    type=options.FILE,
    help="Start from an image, or from each of a folder's.",
)
@click.option("--strength", type=float, help="How much of it to make new, 0 to 1 [default: 0.6].")
@click.option("--mask", type=options.FILE, help="Paint only where this is white.")
@click.option(
    "--resamplings",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="RePaint: how often.",
)
@click.option(
    "--jump", type=click.IntRange(1), default=1, show_default=True, help="RePaint: stops at a time."
)
@click.option("--reconstruct", is_flag=True, help="Walk --input to noise and back.")
@click.option(
    "--interpolate", metavar="A,B", help="Go from one image to another: numbers, or two files."
)
@click.option(
    "--weights", type=click.Choice(["average", "raw"]), default="average", show_default=True
)
@click.option(
    "--checkpoint",
    default="latest",
    show_default=True,
    shell_complete=complete.checkpoints,
    help="latest, best, or a step's number.",
)
@click.option(
    "--batch-size", "--batch_size", type=click.IntRange(1), help="On a GPU; else as many as fit."
)
@click.option(
    "--output-dir",
    "--output_dir",
    type=options.FOLDER,
    help="Else in the run's samples/.",
)
@click.option("--film", is_flag=True, help="Also write the way from noise to image as a GIF.")
@options.compiles
@click.option("--device", default="auto", show_default=True)
@options.root
@options.trust
def sample(run_id: str | None, option: str | None, **how: object) -> int:
    """Draw images from a run: one PNG each, a grid, and a manifest that says how they were made.

    RUN_ID, or the first 6 digits of it, is all that it needs.

    \b
    Examples:
      rediffuse sample 3f2a91
      rediffuse sample 3f2a91 --n 16 --class cat --guidance 3
      rediffuse sample 3f2a91 --seeds 0-63 --solver heun --steps 18
      rediffuse sample 3f2a91 --input cat.png --mask hole.png --resamplings 10
      rediffuse sample 3f2a91 --interpolate 3,13 --n 9 --film
    """
    from rediffuse import gallery

    asked = gallery.Options(**how)  # type: ignore[arg-type]
    word = options.run_argument(run_id, option)
    code = gallery.sample(word, asked)
    _send_what_is_missing(word, asked.root)
    return code


def _send_what_is_missing(word: str, root: Path | None) -> None:
    """Send trackers what they miss of the run, with nothing imported where they miss nothing."""
    from rediffuse.config.compose import checked, read_yaml
    from rediffuse.models import find
    from rediffuse.processes import announced
    from rediffuse.tracking.journal import owes

    try:
        run = find(word, root)
        config = checked(read_yaml(run.config))
        if announced()[0] or run.read().status == "RUNNING":
            return
        if any(owes(run.directory, tracker) for tracker in config.tracking.trackers):
            from rediffuse.session import send_if_free

            send_if_free(run, config)
    except (RediffuseError, OSError) as failed:  # the images are drawn, whatever is wrong here
        tell(f"trackers were not sent what they miss: {failed}", sys.stderr)
