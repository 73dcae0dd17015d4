"""Small courtesies of messages."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any


def did_you_mean(given: str, known: Iterable[str], prefix: str = "; did you mean ") -> str:
    """The nearest known name as the end of a sentence, or nothing if none is near."""
    near = get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"{prefix}{near[0]}?" if near else ""


def plain(value: Any) -> Any:
    """What JSON has words for: what is not finite becomes a string, as in `metrics.jsonl`."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_text(facts: Any) -> str:
    """Facts for programs, in lines that people can read, too."""
    return json.dumps(plain(facts), indent=1, allow_nan=False)


def tell(line: str, stream: Any) -> None:
    """Print a line to a text stream, or nothing where that is None.

    An output that is closed, full or read by nobody is no reason to stop.
    """
    if stream is not None:
        with suppress(OSError, ValueError):
            print(line, file=stream, flush=True)
