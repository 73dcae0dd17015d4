"""What README and docs tell to type is typed, page by page, and does not fail."""

import shutil
from pathlib import Path

import pytest
from documents import COMMANDS, PAGES, QUICK, blocks, relative
from reader import Reader, furnish


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, and what else a reader has."""
    folder = tmp_path_factory.mktemp("begun")
    furnish(folder)
    return folder


def test_the_pages_that_are_followed_at_once_are_there() -> None:
    assert {relative(page) for page in PAGES} >= QUICK


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for page in PAGES
        for name in [relative(page)]
        if any(b.language in (*COMMANDS, "python") and not b.excuse for b in blocks(page))
    ],
)
def test_a_page_can_be_followed(page: Path, begun: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(begun, folder)
    reader = Reader(folder)
    for block in blocks(page):
        reader.follow(block)
