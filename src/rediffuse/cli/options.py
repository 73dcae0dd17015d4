"""Options that several commands share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from rediffuse.cli import complete

WORDS = {"ignore_unknown_options": True, "allow_interspersed_args": True}
"""The settings of a command that takes `key=value` and `--key value`."""


class _Folder(click.ParamType):  # type: ignore[type-arg]
    """The path of a folder; an empty one, as of a shell variable that is not set, is refused."""

    name, what = "directory", "a folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not str(value):
            self.fail(f"expected the path of {self.what}, not an empty text", param, ctx)
        return Path(value)


class _File(_Folder):
    """The same of a file, or of either."""

    name, what = "path", "a file"


class _Output(_Folder):
    """The same of a folder to write into, which may not be a file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        folder = super().convert(value, param, ctx)
        if folder.is_file():
            self.fail(f"{folder} is a file; expected a folder", param, ctx)
        return folder


FOLDER, FILE, OUTPUT = _Folder(), _File(), _Output()

words = click.argument(
    "words",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[KEY=VALUE]...",
    shell_complete=complete.words,
)
places = click.argument(
    "places", nargs=-1, metavar="[data.path=FOLDER]...", shell_complete=complete.words
)
run = click.argument("run_id", required=False, shell_complete=complete.run_ids)
run_id = click.option(
    "--run-id",
    "--run_id",
    "option",
    help="The same as RUN_ID.",
    shell_complete=complete.run_ids,
)
config_file = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="A YAML file to start from."
)
root = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where runs live; else $REDIFFUSE_ROOT, else ./runs.",
)
trust = click.option(
    "--trust",
    multiple=True,
    metavar="PACKAGE",
    help="Import parts of your own that the run names from this package.",
)
compiles = click.option(
    "--compile", is_flag=True, help="Compile the network first: a GPU draws thousands sooner."
)
json_output = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")


_DRAWN = (
    click.option("--seeds", help="Which images: 0-999; image j is the same in every job."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Another set."),
    click.option("--class", "class_name", help="All of one class; else they take turns."),
    click.option("--guide-by", "--guide_by", metavar="[RUN:]CHECKPOINT", help="A weaker model."),
    click.option(
        "--grid",
        shell_complete=complete.parts("grid"),
        help="Where a solver stops; else as the run says.",
    ),
    click.option(
        "--threshold", shell_complete=complete.parts("threshold"), help="Else as the run says."
    ),
    click.option(
        "--checkpoint",
        default="latest",
        show_default=True,
        shell_complete=complete.checkpoints,
        help="Or best, or a number.",
    ),
    click.option("--batch-size", "--batch_size", type=click.IntRange(1), help="Images at a time."),
    compiles,
    click.option("--device", default="auto", show_default=True),
)
_JUDGED = (
    click.option(
        "--features",
        multiple=True,
        metavar="NAME|FOLDER",
        help="classifier (default), inception, or a folder with DINOv2 or CLIP; repeatable.",
    ),
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        metavar="NAME",
        help="Tell only fd, kd, precision ...; fid, kid, is, sfid and mifid ask for Inception.",
    ),
    click.option(
        "--against",
        default="train",
        show_default=True,
        help="Real images: train, held-out or test.",
    ),
    click.option("--allow-small-n", "--allow_small_n", is_flag=True, help="Judge fewer anyway."),
    click.option("--again", is_flag=True, help="Even what was evaluated before."),
)
JUDGED = ("features", "metrics", "against", "allow_small_n", "again", "as_json")


def drawn(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which images are drawn to be judged, and how."""
    return _all(_DRAWN, command)


def judged(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is measured of them."""
    return _all(_JUDGED, command)


def _all(several: Sequence[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(several):
        command = option(command)
    return command


def run_argument(run_id: str | None, option: str | None) -> str:
    """The run given in place or as --run-id, exactly as it was typed."""
    word = run_id or option
    if not word:
        raise click.UsageError("which run? give its id, or the first 6 digits of it")
    return word


def run_at(
    run_id: str | None,
    option: str | None,
    places: Sequence[str],
    root: Path | None,
    trusted: Sequence[str] = (),
) -> str:
    """The run given in place or as --run-id; new places of its images are kept with it first."""
    if option and run_id:  # the first place stands where the id would
        word, places = option, (run_id, *places)
    else:
        word = run_argument(run_id, option)
    if places:
        from rediffuse.images import relocate
        from rediffuse.models import find

        relocate(find(word, root), places, trusted)
    return word
