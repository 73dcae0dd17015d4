"""The command line: thin doors; everything behind them can be called from Python.

Commands import what they need when they run, so that `rediffuse --help` does not wait for torch.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from rediffuse.cli import (
    compare,
    data,
    diagnose,
    evaluate,
    memorisation,
    plan,
    report,
    reproduce,
    runs,
    sample,
    sweep,
    train,
)
from rediffuse.errors import RediffuseError
from rediffuse.words import tell


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rediffuse")
def rediffuse() -> None:
    """Train, sample and reproduce diffusion models for images.

    \b
    rediffuse train                                     digits, in about a minute
    rediffuse train experiment=folder64 data.path=DIR   your own images
    rediffuse plan experiment=folder64 data.path=DIR    what that would take
    rediffuse sample ID --n 64                          ID: as `train` prints it, or 6 digits
    """


rediffuse.add_command(train.train)
rediffuse.add_command(train.resume)
rediffuse.add_command(plan.plan)
rediffuse.add_command(sample.sample)
rediffuse.add_command(evaluate.evaluate)
rediffuse.add_command(sweep.sweep)
rediffuse.add_command(reproduce.reproduce)
rediffuse.add_command(compare.compare)
rediffuse.add_command(memorisation.memorisation)
rediffuse.add_command(diagnose.diagnose)
rediffuse.add_command(report.report)
rediffuse.add_command(runs.show)
rediffuse.add_command(runs.runs)
rediffuse.add_command(data.data)


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; a refusal is one line on standard error and an exit code, no traceback."""
    arguments = [*words, *sys.argv[1:]] if words else None
    code, refused = _run(arguments)
    if refused:
        tell(f"error: {refused}", sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> tuple[int, str | None]:
    """The exit code of a command, and why it was refused."""
    try:
        code = rediffuse.main(arguments, standalone_mode=False)
    except RediffuseError as refused:
        return refused.exit_code, str(refused)
    except click.Abort:
        return 130, None
    except click.ClickException as refused:
        return refused.exit_code, " ".join(refused.format_message().split())
    except BrokenPipeError:  # whoever read our output has gone
        return 141, None
    except OSError as failed:
        return 1, f"{failed.filename or 'the system'}: {failed.strerror}"
    except (MemoryError, RuntimeError) as failed:
        if not (isinstance(failed, MemoryError) or "memory" in str(failed)):
            raise
        return 1, "there is not enough memory for this; use smaller numbers"
    return code if isinstance(code, int) else 0, None


def _flush(stream: Any) -> None:
    """Write what is left, or Python would answer an output that is full or gone with a code."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
