"""A SHA-256 inside a JSON report, over everything else in it: a number changed later is noticed.

It finds damage and careless edits. It is no signature: whoever writes a file can write its digest.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rediffuse.reading import read_object
from rediffuse.words import json_text

DIGEST = "sha256"
"""The key under which a report holds the digest of all its other keys."""

UNVERIFIED = "unverified: an older version wrote it without a digest of its values"


def add_digest(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts as `json_text` writes them and JSON reads them, with their digest first."""
    content = json.loads(json_text({key: facts[key] for key in facts if key != DIGEST}))
    return {DIGEST: _digest(content), **content}


def check_digest(facts: Mapping[str, Any]) -> bool:
    """Return True if the digest fits, and False if there is none.

    Raises:
        ValueError: if there is one, and it does not fit.
    """
    if DIGEST not in facts:
        return False
    if facts[DIGEST] != _digest({key: value for key, value in facts.items() if key != DIGEST}):
        raise ValueError("it was changed after it was written: its SHA-256 differs")
    return True


def read_report(file: Path) -> tuple[dict[str, Any], bool]:
    """Read a JSON report without its digest; also return whether there was one.

    Raises:
        OSError: if the file cannot be read.
        ValueError: saying what is wrong with it, a digest that does not fit included.
    """
    facts = read_object(file)
    verified = check_digest(facts)
    facts.pop(DIGEST, None)
    return facts, verified


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
