"""Files of others are read as data, and no further than they may be."""

import os
from pathlib import Path

import pytest

from rediffuse.reading import read_bytes


@pytest.mark.parametrize("size", [0, 1, 9_999, 10_000])
def test_a_file_is_read_to_its_end(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(content := os.urandom(size))
    assert read_bytes(tmp_path / "file", 10_000) == content


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10_001))
    with pytest.raises(ValueError, match="more than 10,000 bytes"):
        read_bytes(tmp_path / "file", 10_000)


def test_a_file_that_has_more_than_it_says_is_read_to_its_end_or_refused() -> None:
    """Files of /proc say that they have 0 bytes."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("there is no /proc here")
    assert read_bytes("/proc/self/status", 1_000_000).count(b"\n") > 20
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_bytes("/proc/self/status", 100)


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_bytes(tmp_path / "pipe", 10)
