"""Small courtesies of messages."""

import json
import math
import sys
import unicodedata
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
    """Facts for programs, in ASCII lines that people can read; what is no JSON becomes a string."""
    text = json.dumps(plain(facts), indent=1, allow_nan=False, default=str)
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON leaves as it is


def visible(text: str) -> str:
    """Show control and direction characters as escapes such as `\\x1b` and `\\u202e`.

    Texts of a run, names of files and values that were typed may hold characters that move a
    cursor, change colours, reverse what is read or fake a line: all that goes to a terminal passes
    here. A line break is such a character, too.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def visible_lines(text: str) -> str:
    """The same for text whose line breaks are meant."""
    return "\n".join(map(visible, text.split("\n")))


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN and character not in _JOINERS
    return character.encode("unicode_escape").decode() if hidden else character


_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, lone surrogates, line separators
_JOINERS = "\u200c\u200d"  # letters of Persian and Hindi, and pictures of families, need them


def say(line: str) -> None:
    """Tell a line on standard output."""
    tell(line, sys.stdout)


def tell(line: str, stream: Any) -> None:
    """Print a line to a text stream, or nothing where that is None.

    An output that is closed, full or read by nobody is no reason to stop.
    """
    tell_styled(visible_lines(line), stream)


def tell_styled(line: str, stream: Any) -> None:
    """The same for a line that holds escape sequences of our own."""
    if stream is not None:
        with suppress(OSError, ValueError):
            print(encodable(line, stream), file=stream, flush=True)


def encodable(line: str, stream: Any) -> str:
    """Replace characters that a stream's encoding lacks by escapes such as `\\xfc`.

    Otherwise Python raises an error, and the whole line is lost.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return line.translate(_IN_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return line


_IN_ASCII = str.maketrans({"…": "~", "±": "~", "×": "x", "–": "-", "—": "-", "→": ">"})  # as wide
