"""The documentation as a site: built, and read in a browser that reaches this machine alone."""

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import chromium, needs_chromium
from documents import ROOT

pytestmark = [pytest.mark.slow, needs_chromium]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The site, behind a server."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("width", [1366, 420])
def test_every_page_is_read_without_the_internet(address: str, width: int) -> None:
    pages = sorted(str(p.relative_to(ROOT / "docs")) for p in ROOT.glob("docs/**/*.md"))
    with chromium() as browser:
        page, heard, elsewhere = browser.new_page(viewport={"width": width, "height": 768}), [], []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda r: r.url.startswith(address) or elsewhere.append(r.url))
        for name in pages:
            page.goto(f"{address}/{Path(name).with_suffix('.html')}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, name
            sizes = page.evaluate("[...document.images].map(i => i.naturalWidth)")
            assert all(sizes), name
    assert heard == []
    assert [url for url in elsewhere if not url.startswith("data:")] == []


def test_the_search_finds_a_page_without_the_internet(address: str) -> None:
    with chromium() as browser:
        page, elsewhere = browser.new_page(), []
        page.on("request", lambda r: r.url.startswith(address) or elsewhere.append(r.url))
        page.goto(f"{address}/index.html")
        page.get_by_role("textbox", name="Search").click()
        page.keyboard.type("early stopping")
        found = page.locator(".md-search-result__item a").first
        found.wait_for()
        found.click()
        page.wait_for_load_state()
        assert "stopping" in page.inner_text("article")
    assert [url for url in elsewhere if not url.startswith("data:")] == []
