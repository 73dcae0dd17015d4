"""Small courtesies of messages."""

import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
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
    safe = masked_tree(plain(facts))
    text = json.dumps(safe, indent=1, allow_nan=False, default=lambda other: masked(str(other)))
    return text.replace("\x7f", "\\u007f")  # the one control character that JSON leaves as it is


MASK = "***"


def masked(text: str) -> str:
    """Put *** in the place of secrets: all that is printed, kept in a run or sent passes here.

    Secrets are a user and password in an address, the value of `token=...` and the like, keys of
    well-known shapes, and the values of environment variables whose name ends like a secret's.
    """
    return _masked(text, _secrets_of_environment())


def masked_tree(value: Any) -> Any:
    """Mask every string of nested mappings and lists; below a name like `token`, all of it."""
    return _masked_tree(value, _secrets_of_environment())


def masked_words(words: Sequence[str]) -> list[str]:
    """Mask the words of a command, in which a value may follow its option as a word of its own."""
    return [
        MASK if before.startswith("-") and _SECRET_NAME.search(before) else masked(word)
        for before, word in zip(("", *words), words, strict=False)
    ]


def _secrets_of_environment() -> list[str]:
    named = (value for name, value in os.environ.items() if _SECRET_NAME.search(name))
    return sorted((v for v in named if len(v) >= _SECRET_LENGTH), key=len, reverse=True)


def _masked(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def _masked_tree(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _masked(value, secrets)
    if isinstance(value, list | tuple):
        return [_masked_tree(inner, secrets) for inner in value]
    if isinstance(value, Mapping):
        return {
            key: MASK
            if isinstance(inner, str) and inner and _SECRET_NAME.search(str(key))
            else _masked_tree(inner, secrets)
            for key, inner in value.items()
        }
    return value


_SECRET_LENGTH = 8  # what is shorter stands in other words by chance
_NAMES = (
    r"(?:token|secret|password|passwd|credentials?|authorization|(?:api|access|private)[_-]?key)"
)
_SECRET_NAME = re.compile(rf"(?i)(?:{_NAMES}|_key|passphrase)$")
_SECRETS = (
    re.compile(r"(://)[^/\s]*(?=@)"),
    re.compile(rf"(?i)({_NAMES}[\"']?\s*[=:]\s*[\"']?(?:basic |bearer )?)[^\s\"'&,;]+"),
    re.compile(r"()\b(?:hf_|gh[opsu]_|AKIA)[A-Za-z0-9]{16,}"),
    re.compile(r"()\b(?:github_pat_|glpat-|xox[abp]-)[\w-]{16,}"),
    re.compile(r"()\bsk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{16,}"),  # and not sk-learn-pictures
)


def visible(text: str) -> str:
    """Mask secrets, and show control and direction characters as escapes: `\\x1b`, `\\u202e`.

    Texts of a run, names of files and values that were typed may hold characters that move a
    cursor, change colours, reverse what is read or fake a line: all that goes to a terminal passes
    here. A line break is such a character, too.
    """
    text = masked(text)
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
