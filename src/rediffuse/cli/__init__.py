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
    completion,
    data,
    diagnose,
    doctor,
    evaluate,
    init,
    memorisation,
    plan,
    report,
    reproduce,
    runs,
    sample,
    studio,
    sweep,
    train,
)
from rediffuse.errors import RediffuseError
from rediffuse.words import tell, visible


class _InOrder(click.Group):
    """A group whose help lists commands in the order in which one needs them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a part for each step of the work."""
        widest = max(map(len, self.commands))
        for title, commands in _STEPS.items():
            with formatter.section(title):
                told = [(f"{c.name:{widest}}", c.get_short_help_str(120)) for c in commands]
                formatter.write_dl(told)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed or found different, 2 refused before anything was done, "
    "128 + n ended by signal n (130 Ctrl-C, 143 SIGTERM); what was trained is kept.",
)
@click.version_option(package_name="rediffuse")
def rediffuse() -> None:
    """Train, sample and reproduce diffusion models for images.

    \b
    Examples:
      rediffuse train                                     digits, in a minute
      rediffuse train experiment=folder64 data.path=DIR   your own images
      rediffuse plan experiment=folder64 data.path=DIR    what that would take
      rediffuse sample ID --n 64                          ID: its first 6 digits
    """


_STEPS: dict[str, tuple[click.Command, ...]] = {
    "Begin": (init.init, doctor.doctor, data.data, plan.plan),
    "Train": (train.train, train.resume, runs.runs, runs.show),
    "Draw": (sample.sample, studio.studio),
    "Judge": (evaluate.evaluate, sweep.sweep, memorisation.memorisation, diagnose.diagnose),
    "Tell and repeat": (report.report, compare.compare, reproduce.reproduce),
    "Shell": (completion.completion,),
}
for command in (command for commands in _STEPS.values() for command in commands):
    rediffuse.add_command(command)


def main(words: Sequence[str] | None = None) -> None:
    """Run a command; a refusal is one line on standard error and an exit code, no traceback."""
    arguments = [*words, *sys.argv[1:]] if words else None
    code, refused = _run(arguments)
    if refused:
        tell(f"error: {visible(refused)}", sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> tuple[int, str | None]:
    """The exit code of a command, and why it was refused."""
    try:
        code = rediffuse.main(arguments, "rediffuse", standalone_mode=False)
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
