"""Files of others are read as data, and no further than they may be."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rediffuse.errors import RunError
from rediffuse.reading import LINE_BYTES, LINES_BYTES, decoded, read_bytes, read_lines, read_object
from rediffuse.tracking.jsonl import append_metrics, read_metrics
from rediffuse.training.state import Sums, UsualLoss


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


def test_a_link_is_read_only_where_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"{}")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("missing")
    for link in ("link", "nowhere"):
        with pytest.raises(ValueError, match="it is a link"):
            read_bytes(tmp_path / link, 10)
    assert read_bytes(tmp_path / "link", 10, links=True) == b"{}"
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nowhere", 10, links=True)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/"])
def test_a_device_or_a_folder_is_no_file(path: str) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        read_bytes(path, 10, links=True)


BAD_JSON = {
    "nothing": b"",
    "cut": b'{"a": 1',
    "brackets": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "101 levels": b"[" * 101 + b"]" * 101,
    "400 digits": b'{"a": ' + b"9" * 400 + b"}",
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "2^63": b'{"a": 9223372036854775808}',
    "infinity": b'{"a": Infinity}',
    "1e999": b'{"a": [1e999]}',
    "NaN": b'{"a": NaN}',
    "no UTF-8": b'{"a": "\xff"}',
    "half a character": b'{"a": "\\ud83d"}',
    "half a character in a key": b'{"\\udc00": 1}',
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_cannot_be_worked_with_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decoded(text)


def test_json_that_can_be_is_read() -> None:
    text = b"[" * 100 + b"]" * 100
    assert str(decoded(text)).encode() == text
    found = {"a": [1, -(2**63) + 1, 1e308, None, True, "\u732b \U0001f469"]}
    assert decoded(json.dumps(found).encode()) == found
    assert decoded(b'{"a": Infinity}', finite=False) == {"a": math.inf}


def test_an_object_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_object(tmp_path / "file")


def test_lines_are_bounded_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one\ntwo\nthr")
    assert list(read_lines(file)) == [(b"one\n", 4), (b"two\n", 8)]
    assert list(read_lines(file, 4)) == [(b"two\n", 8)]
    with pytest.raises(ValueError, match="more than 7 bytes"):
        list(read_lines(file, most_bytes=7))
    os.truncate(file, 2**40)  # zeros that take no room
    lines = read_lines(file, 4)
    assert next(lines) == (b"two\n", 8)
    with pytest.raises(ValueError, match=f"more than {LINE_BYTES:,} bytes"):
        next(lines)
    assert LINE_BYTES < LINES_BYTES


ROW = b'{"images": 1, "time": 1.0, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "row",
    [
        *(b'{"images": 1, "time": 1.0, "a": %b}\n' % v for v in (b"true", b"null", b'"1"', b"[]")),
        b'{"images": 1, "time": 1.0, "loss": 1' + b"0" * 400 + b"}\n",
        *(b'{"images": %b, "time": 1.0}\n' % v for v in (b"-1", b"1.5", b"true", b'"1"', b"1e999")),
        *(b'{"images": 1, "time": %b}\n' % v for v in (b"1", b"NaN", b'"nan"')),
        b"[1]\n", b"[" * 10_000 + b"\n", b"\0" * 100 + b"\n", b"\xff\n", b"\n",
    ],
)  # fmt: skip
def test_every_line_of_metrics_is_checked(tmp_path: Path, row: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(ROW + row)
    with pytest.raises(RunError, match=re.escape(f"{file}: the line before byte")):
        read_metrics(file)


def test_what_is_not_finite_is_a_metric(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_metrics(file, {"a": math.inf, "b": math.nan, "c": 2}, 3, 1.0)
    assert str(read_metrics(file)) == "[{'images': 3.0, 'time': 1.0, 'a': inf, 'b': nan, 'c': 2.0}]"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_metrics_are_a_regular_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"regular file|a link"):
        read_metrics(tmp_path / "metrics.jsonl")


WRONG = (None, 7, "text", [1.0], {"a": 1}, [[1.0]], True)


@pytest.mark.parametrize("name", ["loss", "bin_loss", "bin_images"])
@pytest.mark.parametrize("value", WRONG)
def test_sums_of_another_shape_are_refused(name: str, value: object) -> None:
    saved = Sums().as_json()
    with pytest.raises(ValueError, match=r"."):
        Sums.from_json({**saved, name: value if name != "loss" or value != 7 else "7"})
    with pytest.raises(ValueError, match=r"."):
        Sums.from_json(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", UsualLoss().as_json())
@pytest.mark.parametrize("value", [v for v in WRONG if v != 7])
def test_a_usual_loss_of_another_shape_is_refused(name: str, value: object) -> None:
    saved = UsualLoss().as_json()
    with pytest.raises(ValueError, match=r"."):
        UsualLoss.from_json({**saved, name: value})
    with pytest.raises(ValueError, match=r"."):
        UsualLoss.from_json(value)  # type: ignore[arg-type]


def test_sums_are_read_as_they_were_written() -> None:
    sums = Sums.from_json(Sums().as_json())
    assert [*map(repr, sums.tensors())] == [*map(repr, Sums().tensors())]
    assert UsualLoss.from_json(UsualLoss(steps=3).as_json()) == UsualLoss(steps=3)
