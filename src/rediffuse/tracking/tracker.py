"""What a tracker is: a place for copies of a run, which may be slow, broken or away."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Number = int | float

Row = dict[str, float]
"""One line of `metrics.jsonl`: `images` seen so far, `time` in Unix seconds, and the metrics."""

Held = Literal["everything", "closed", "nothing"]
"""What a tracker still has of what it was given: all, all up to its last `close`, or nothing."""

Say = Callable[[str], None]
"""Takes one line for the user."""


@runtime_checkable
class Tracker(Protocol):
    """Receives copies of a run, from one background thread.

    Any method may raise; it is called again later with the same arguments, so each must bear
    repetition. Nothing is reached or written before `open`.
    """

    @property
    def name(self) -> str:
        """One word: how messages and `<run>/logs/<name>.json` call it."""

    def open(self, params: Mapping[str, Any]) -> Held:
        """Begin, or go on with, the run; `params` are its flat configuration.

        What the tracker does not hold any more is sent again.
        """

    def metrics(self, rows: Sequence[Row]) -> None:
        """Take rows; an evaluation of an old checkpoint has fewer images than rows before it."""

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        """Take a file; `name` is its path inside the run, `samples/preview-00001280.png`."""

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""


def in_one_line(failure: Exception) -> str:
    """Say what went wrong, without secrets and the pages that some libraries add."""
    return redacted(next(iter(str(failure).splitlines()), type(failure).__name__))[:300]


def redacted(text: str) -> str:
    """Put *** for what opens doors.

    That is: a user and password in an address, the value of `token=...` and the like, keys of
    well-known shapes, and the values of environment variables whose name ends like a secret's.
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<1>***", text)
    return text


_SECRET_LENGTH = 8  # what is shorter stands in other words by chance
_NAMES = (
    r"(?:token|secret|password|passwd|credentials?|authorization|(?:api|access|private)[_-]?key)"
)
_SECRET_NAME = re.compile(rf"(?i)(?:{_NAMES}|_key|passphrase)$")
_SECRETS = (
    re.compile(r"(://)[^/\s]*(?=@)"),
    re.compile(rf"(?i)({_NAMES}[\"']?\s*[=:]\s*[\"']?(?:basic |bearer )?)[^\s\"'&,;]+"),
    re.compile(r"()\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{16,}"),
)
