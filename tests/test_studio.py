"""The studio: its fields mean what `sample` means, its walks end when told to, and it does no harm.

The last part drives the page in a real browser, on a run that was really trained.
"""

import asyncio
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browsing import CHROMIUM, chromium
from cli import TINY
from PIL import Image

from rediffuse import launch
from rediffuse.api import load, sample
from rediffuse.cli import rediffuse as cli
from rediffuse.config.compose import compose
from rediffuse.config.schema import Part
from rediffuse.drawing import states
from rediffuse.errors import ConfigError, DataError, RediffuseError
from rediffuse.models import Model
from rediffuse.runs import Run, list_runs
from rediffuse.studio import acts, shelf, showing
from rediffuse.studio.asking import (
    Asked,
    Edit,
    command,
    drawing,
    mask_of,
    options_of,
)
from rediffuse.studio.desk import Desk
from rediffuse.studio.frames import Frame, frames, paced, together

EVIL = """<script>alert(1)</script>"'<img src=http://x.example/ onerror=alert(1)>{{7*7}}${7*7}"""
SQUARE = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    often = [f"training.{what}_every_images=96" for what in ("log", "preview", "checkpoint")]
    launch.train(compose([*TINY, *often, "training.images=288", "name=tiny"]), root=root)
    return root, list_runs(root)[0].id


@pytest.fixture(scope="module")
def model(trained: tuple[Path, str]) -> Model:
    return load(trained[1], root=trained[0])


@pytest.fixture
def desk(trained: tuple[Path, str]) -> Desk:
    return Desk(trained[0])


@pytest.fixture
def spoilt(trained: tuple[Path, str], tmp_path: Path) -> Run:
    """A copy, to be changed."""
    return Run(shutil.copytree(trained[0], tmp_path / "root") / trained[1])


def asked(trained: tuple[Path, str], **fields: Any) -> Asked:
    checkpoint = shelf.card(*trained).checkpoints[0][1]
    return Asked(**{"run": trained[1], "checkpoint": checkpoint, "seeds": "0-3", **fields})


def never() -> bool:
    return False


def last(sheets: Iterator[acts.Sheet]) -> acts.Sheet:
    *_, sheet = sheets
    return sheet


# Fields


def test_fields_left_alone_draw_what_sample_draws(trained, model):
    of = drawing(model, asked(trained))
    *_, frame = frames(of, never)
    assert frame.end == "done"
    assert np.array_equal(frame.x_t, sample(model, 4))
    assert of.facts["run"] == trained[1]


def test_every_field_means_the_option_of_its_name(trained, model):
    fields = asked(trained, solver="heun churn=10", steps=4, guidance=2, class_name="7", seed=5)
    *_, frame = frames(drawing(model, fields), never)
    how = {"solver": "heun churn=10", "steps": 4, "guidance": 2.0, "class_name": "7", "seed": 5}
    assert np.array_equal(frame.x_0, sample(model, 4, **how))


def test_a_field_that_says_what_the_run_says_keeps_the_run_s_own_arguments(model):
    own = model.config.sampling.model_copy(update={"solver": Part(name="heun", churn=40)})
    scale = own.guidance.arguments["scale"]
    assert options_of(Asked(solver="heun", guidance=scale), own).solver is None
    assert options_of(Asked(solver="heun", guidance=scale), own).guidance is None
    assert options_of(Asked(solver="heun churn=1"), own).solver == "heun churn=1"


def test_the_command_that_is_told_asks_for_the_same(trained, model, tmp_path):
    fields = asked(trained, solver="heun churn=10", steps=4, guidance=2.5, class_name="7", seed=5)
    _, *words = command(fields, model.config.sampling).split()
    words = [word.strip("'") for word in words]
    at = words.index("--solver")
    words[at + 1 : at + 3] = ["heun churn=10"]  # as a shell would
    out = tmp_path / "out"
    cli.main([*words, "--root", str(trained[0]), "--output-dir", str(out)], standalone_mode=False)
    *_, frame = frames(drawing(model, fields), never)
    for j, image in enumerate(frame.x_0):
        with Image.open(out / f"{j:06d}.png") as file:
            assert np.array_equal(np.asarray(file), image[0])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seeds": "/etc/passwd"}, "seeds /etc/passwd: expected numbers and ranges"),
        ({"seeds": "0-99"}, "seeds 0-99 names 100 images, and a page shows 64"),
        ({"seeds": EVIL}, "expected numbers and ranges"),
        ({"seed": -1}, "seed -1: expected a whole number from 0"),
        ({"steps": 0}, "steps 0: expected a whole number from 1"),
        ({"steps": 2.5}, "steps 2.5: expected a whole number"),
        ({"solver": "hoin"}, "there is no solver 'hoin'; there are"),
        ({"solver": "os.system"}, "os.system"),
        ({"solver": "../../etc/passwd"}, "is not a name"),
        ({"class_name": EVIL}, "there is none; there are 0, 1"),
        ({"guidance": float("inf")}, "expected a finite number"),
        ({"checkpoint": "step-7"}, "has no checkpoint 'step-7'"),
        ({"checkpoint": "../../x"}, "has no checkpoint"),
        ({"checkpoint": None}, "has no checkpoint yet"),
        ({"run": None}, "there is no run to draw from"),
        ({"run": "../root"}, "is not a run id"),
        ({"run": "/etc"}, "is not a run id"),
        ({"weights": "pickled"}, "expected average or raw"),
    ],
)
def test_what_a_field_cannot_mean_is_one_line_and_no_image(trained, desk, fields, says):
    sheet = last(acts.draw(desk, "me", [asked(trained, **fields)]))
    assert sheet.sides is None
    assert says in re.sub("&#39;|&#34;", "'", sheet.line)
    assert sheet.line.count("<") == 2
    assert "\n" not in sheet.line


# Walks


@pytest.mark.parametrize(("solver", "evaluations"), [("ddim", 4), ("heun", 7), ("adaptive", None)])
def test_there_is_a_frame_for_every_step_and_one_of_the_images(trained, model, solver, evaluations):
    of = drawing(model, asked(trained, solver=solver, steps=4))
    *way, done = frames(of, never)
    assert [frame.step for frame in way] == list(range(1, done.step + 1))
    assert of.steps in (None, done.step)
    assert evaluations in (None, done.evaluations)
    assert all(frame.x_t.shape == frame.x_0.shape == (4, 1, 8, 8) for frame in way)
    assert [frame.end for frame in way] == [None] * len(way)


def test_it_is_told_beforehand_how_many_steps_there_will_be(trained, model):
    half = np.indices((8, 8))[0] < 4
    for edit in (
        Edit(SQUARE, strength=0.5),
        Edit(SQUARE, strength=0),
        Edit(SQUARE, strength=1),
        Edit(SQUARE, mask=half),
        Edit(SQUARE, mask=half, resamplings=3),
    ):
        of = drawing(model, asked(trained, steps=4, seeds="0"), edit)
        assert len(list(states(model, of.how, of.job))) == of.steps


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_walk_that_is_stopped_asks_the_network_no_more(trained, model, after):
    asks = 0

    def count(*_: object) -> None:
        nonlocal asks
        asks += 1

    hook = model.denoiser.network.register_forward_hook(count)
    try:
        of = drawing(model, asked(trained, solver="heun", steps=10))
        *_, frame = frames(of, lambda: asks >= after)
    finally:
        hook.remove()
    assert (frame.end, frame.evaluations, asks) == ("stopped", after, after)


@pytest.mark.parametrize("way", ["variation", "inpainting"])
def test_a_walk_from_an_image_can_be_stopped_as_well(trained, model, way):
    mask = np.indices((8, 8))[0] < 4 if way == "inpainting" else None
    of = drawing(model, asked(trained, steps=8), Edit(SQUARE, mask=mask))
    *_, frame = frames(of, lambda: True)
    assert (frame.end, frame.evaluations) == ("stopped", 1)


def frame(step: int, end: Any = None) -> Frame:
    nothing = np.zeros((1, 1, 1, 1), np.uint8)
    return Frame(step, step, nothing, nothing, end)


def test_two_walks_take_turns_and_who_is_done_first_waits():
    long = iter([frame(1), frame(2), frame(3), frame(3, "done")])
    short = iter([frame(1), frame(1, "done")])
    seen = [(a.step, b.step, b.end) for a, b in together(long, short)]
    assert seen == [(1, 1, None), (2, 1, "done"), (3, 1, "done"), (3, 1, "done")]


def test_when_one_of_two_walks_is_stopped_the_other_takes_no_further_step():
    stopped = iter([frame(1), frame(2, "stopped")])
    other = iter([frame(1), frame(2), frame(3), frame(3, "done")])
    assert len(list(together(stopped, other))) == 2
    assert next(other).step == 3


def test_frames_that_come_too_fast_are_left_out_but_never_the_last():
    walk = [(frame(k),) for k in range(5)]
    assert list(paced(walk, every_s=1000.0)) == [walk[0], walk[-1]]
    assert list(paced(walk, every_s=0.0)) == walk


# Given images


def test_inpainting_keeps_what_is_not_marked_to_the_last_bit(trained, model):
    mask = np.indices((8, 8))[0] < 4
    *_, drawn = frames(drawing(model, asked(trained), Edit(SQUARE, mask=mask)), never)
    assert (drawn.x_0[:, :, 4:] == SQUARE[:, 4:]).all()
    assert (drawn.x_0[:, :, :4] != SQUARE[:, :4]).any()


def test_a_mask_with_nothing_in_it_is_refused(trained, desk):
    edit = Edit(SQUARE, mask=np.zeros((8, 8), bool))
    assert "nothing is marked" in last(acts.draw(desk, "me", [asked(trained)], "x_t", edit)).line


@pytest.mark.parametrize("shape", [(80, 80), (83, 83), (8, 8)])
def test_a_pixel_is_painted_where_half_of_it_is_marked(shape):
    alpha = np.zeros(shape, np.uint8)
    alpha[: shape[0] // 2] = 255
    assert np.array_equal(mask_of(alpha, 8), np.indices((8, 8))[0] < 4)


def test_what_is_no_picture_is_refused_by_its_name_alone(trained, desk, tmp_path):
    (tmp_path / "x.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(DataError, match=r"^x.png cannot be used: it is not a PNG"):
        acts.take(desk, asked(trained), tmp_path / "x.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"^bomb.png .* more than 64 million pixels"):
        acts.take(desk, asked(trained), tmp_path / "bomb.png")


def test_a_picture_becomes_the_square_that_sample_would_start_from(trained, desk, tmp_path):
    Image.fromarray(SQUARE[0]).save(tmp_path / "a.png")
    given = acts.take(desk, asked(trained), tmp_path / "a.png")
    assert np.array_equal(given.square, SQUARE)
    assert given.canvas.shape == (448, 448, 3)
    assert np.array_equal(given.canvas[::56, ::56, 0], SQUARE[0])


def test_an_image_drawn_to_start_from_is_the_first_of_its_seeds(trained, desk, model):
    given = acts.first(desk, "me", asked(trained, seeds="3-9"))
    assert isinstance(given, acts.Given)
    assert np.array_equal(given.square, sample(model, [3])[0])


# What is shown


def images_in(html: str) -> list[Image.Image]:
    import base64

    found = re.findall(r'<img class="pixels" src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(of))) for of in found]


def test_a_finished_image_is_a_png_that_holds_how_it_was_made(trained, desk, model):
    fields = asked(trained, steps=4, class_name="7", seeds="2,5")
    html = last(acts.draw(desk, "me", [fields])).sides[0]
    assert html.count("download=") == 3  # and the grid
    expected = sample(model, [2, 5], steps=4, class_name="7")
    for j, image, pixels in zip((2, 5), images_in(html), expected, strict=True):
        assert np.array_equal(np.asarray(image), pixels[0])
        told = json.loads(image.text["rediffuse"])
        assert (told["run"], told["image"], told["class"]) == (trained[1], j, "7")
        assert told["sampling"]["steps"] == 4


def test_sample_writes_the_same_facts_into_its_files_but_no_paths(trained, tmp_path):
    given = tmp_path / "given.png"
    Image.fromarray(SQUARE[0]).save(given)
    words = ["sample", trained[1], "--n", "1", "--root", str(trained[0]), "--input", str(given)]
    cli.main([*words, "--output-dir", str(tmp_path / "out")], standalone_mode=False)
    with Image.open(tmp_path / "out/000000.png") as image:
        told = json.loads(image.text["rediffuse"])
    assert told["edit"] == {"input": "given.png"}
    assert told["checkpoint"].startswith("step-")


def test_no_word_of_a_run_becomes_markup(spoilt):
    record = json.loads((spoilt.directory / "run.json").read_text())
    (spoilt.directory / "run.json").write_text(json.dumps({**record, "name": EVIL}))
    environment = json.loads(spoilt.environment.read_text())
    environment["data"]["class_names"][0] = EVIL
    spoilt.environment.write_text(json.dumps(environment))
    desk = Desk(spoilt.directory.parent)
    fields = asked((spoilt.directory.parent, spoilt.id), class_name=EVIL, seeds="0")
    html = last(acts.draw(desk, "me", [fields])).sides[0]
    html += showing.training(*shelf.training(spoilt))
    html += showing.about(shelf.card(desk.root, spoilt.id))
    assert html.count("&lt;script&gt;") > 2
    assert not re.search(r"<script|<img src|onerror=alert\(1\)>\{", html.replace("&gt;", ""))
    assert set(re.findall(r"<(\w+)", html)) <= {
        "p", "div", "figure", "a", "img", "figcaption", "code", "dl", "dt", "dd", "h3", "h4",
        "picture", "source",
    }  # fmt: skip


def test_the_shelf_says_what_is_there_and_names_what_is_broken(spoilt):
    root = spoilt.directory.parent
    assert [value for _, value in shelf.run_choices(root)] == [spoilt.id]
    assert "tiny" in shelf.run_choices(root)[0][0]
    card = shelf.card(root, spoilt.id)
    assert card.checkpoints[0] == ("step 6 · 288 images · best", "step-00000006")
    assert card.class_names == tuple("0123456789")
    (spoilt.checkpoints / card.checkpoints[0][1] / "state.json").write_bytes(b"{}")
    assert "damaged" in shelf.card(root, spoilt.id).checkpoints[0][0]
    (spoilt.directory / "run.json").write_text("[")
    assert "damaged" in shelf.run_choices(root)[0][0]
    spoilt.config.write_text("- [")
    with pytest.raises(RediffuseError):
        shelf.card(root, spoilt.id)


def test_a_run_is_looked_at_again_when_it_has_something_new(spoilt):
    before = shelf.mark(spoilt)
    assert shelf.mark(spoilt) == before
    with open(spoilt.metrics, "a") as file:
        file.write(json.dumps({"images": 289, "time": 1.0, "loss": 0.5}) + "\n")
    assert shelf.mark(spoilt) != before
    facts, sections = shelf.training(spoilt)
    assert facts["loss"] == 0.5
    assert [section.title for section in sections] == ["Training", "Samples while training"]


def test_curves_that_cannot_be_read_do_not_hide_the_previews(spoilt):
    spoilt.metrics.write_text("rubbish\n")
    html = showing.training(*shelf.training(spoilt))
    assert "is damaged" in html
    assert 'id="figure-timeline"' in html


def test_a_model_is_loaded_once_and_the_last_two_are_kept(trained, desk):
    one, other = asked(trained), asked(trained, weights="raw")
    first, second = desk.model(one), desk.model(other)
    assert desk.model(one) is first
    desk.model(asked(trained, checkpoint=shelf.card(*trained).checkpoints[1][1]))
    assert desk.model(one) is first
    assert desk.model(other) is not second


# The server


@pytest.mark.parametrize(
    ("host", "origin", "ours"),
    [
        ("127.0.0.1:7", None, True),
        ("localhost:7", "http://localhost:7", True),
        ("127.0.0.1:7", "http://127.0.0.1:7", True),
        ("127.0.0.1:7", "http://127.0.0.1:8", False),  # another program of this machine
        ("127.0.0.1:7", "https://evil.example", False),
        ("127.0.0.1:7", "null", False),
        ("evil.example:7", None, False),  # a name that was led here
        ("evil.example", None, False),
        ("127.0.0.1.evil.example:7", None, False),
        (None, None, False),
    ],
)
def test_only_our_own_page_is_answered(host, origin, ours):
    serve = pytest.importorskip("rediffuse.studio.serve")
    assert serve.is_ours(host, origin) is ours


def test_without_gradio_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("rediffuse.cli.studio.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rediffuse\[studio\]'"):
        cli.main(["studio"], standalone_mode=False)


def test_the_command_line_does_not_import_gradio():
    code = "import sys, rediffuse.cli; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def served(trained: tuple[Path, str], tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The command, in a process and with a root of its own."""
    pytest.importorskip("gradio")
    root = shutil.copytree(trained[0], tmp_path_factory.mktemp("served") / "root")
    words = [sys.executable, "-m", "rediffuse", "studio", "--no-open", "--root", str(root)]
    log = root / "studio.log"
    with log.open("w") as said:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True, cwd=root)
    with process:
        try:
            assert process.stdout
            word, address = process.stdout.readline().split() or ("", log.read_text())
            assert word == "studio", address
            base, token = address.split("?token=")
            assert len(token) == 32
            yield SimpleNamespace(
                address=address, base=base, token=token, root=root, run=Run(root / trained[1])
            )
            process.send_signal(signal.SIGTERM)  # SIGINT is ignored by what a shell has put aside
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


def answer(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    host, _, port = address.removeprefix("http://").partition("/")[0].partition(":")
    there = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        there.request(method, path, headers=headers)
        said = there.getresponse()
        return said.status, said.headers, said.read()
    finally:
        there.close()


def cookie(served: SimpleNamespace) -> dict[str, str]:
    """What a browser sends after it has opened the printed address."""
    status, headers, _ = answer(served.base, f"/?token={served.token}")
    assert status == 200
    assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    return {"Cookie": headers["Set-Cookie"].partition(";")[0]}


def test_the_server_hands_out_no_file_and_answers_no_stranger(served):
    known = cookie(served)
    status, headers, body = answer(served.base, "/", **known)
    assert status == 200
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Set-Cookie" not in headers
    assert b"Rediffuse" in body
    for file in ("/etc/passwd", served.run.config, "config.yaml", f"{served.run.id}/config.yaml"):
        assert answer(served.base, f"/gradio_api/file={file}", **known)[0] in (403, 404)
    assert answer(served.base, "/", Host="evil.example", **known)[0] == 403
    for path in ("/", "/gradio_api/upload", "/gradio_api/queue/join"):
        strange = {"Origin": "http://evil.example", **known}
        assert answer(served.base, path, "POST", **strange)[0] == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/config"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/queue/data?session_hash=a"),
        ("GET", "/gradio_api/heartbeat/a"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/run/predict"),
    ],
)
def test_without_the_token_nothing_is_answered(served, method, path):
    name = cookie(served)["Cookie"].partition("=")[0]
    for wrong in ({}, {"Cookie": f"{name}=wrong"}, {"Cookie": f"{name}="}):
        status, headers, body = answer(served.base, path, method, **wrong)
        assert status == 401
        assert b"the whole address that `rediffuse studio` printed" in body
        assert "Set-Cookie" not in headers
    more = "&token=wrong" if "?" in path else "?token=wrong"
    assert answer(served.base, path + more, method)[0] == 401


def asgi_answer(token: str | None, *, app: Any, path: str = "/") -> list[dict[str, Any]]:
    """What the guard sends for a request, in process."""
    serve = pytest.importorskip("rediffuse.studio.serve")
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:7")],
        "server": ("127.0.0.1", 7),
        "scheme": "http",
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(serve.Guard(app, token)(scope, receive, send))
    return sent


async def reads_body(scope: Any, receive: Any, send: Any) -> None:
    """As Gradio's routes read what they are sent."""
    from starlette.requests import Request

    await Request(scope, receive).body()


async def empty_answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})


def test_no_token_answers_every_user_and_a_token_only_who_has_it():
    assert asgi_answer(None, app=empty_answer)[0]["status"] == 204
    assert asgi_answer("secret", app=empty_answer)[0]["status"] == 401


def test_a_client_that_goes_away_is_no_fault():
    assert asgi_answer(None, app=reads_body) == []


def test_a_client_that_goes_away_leaves_no_traceback(served):
    """`served` reads the log at the end."""
    host, port = served.base.removeprefix("http://").rstrip("/").split(":")
    for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
        with socket.create_connection((host, int(port)), 30) as there:
            lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Content-Length: 100"]
            lines += [f"Cookie: {cookie(served)['Cookie']}", "Content-Type: application/json"]
            there.sendall("\r\n".join([*lines, "", '{"data"']).encode())
    assert answer(served.base, "/", **cookie(served))[0] == 200  # it was heard, and goes on


# A browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    with chromium() as opened:
        yield opened


# Gradio's canvas calls an older PixiJS, and headless Chromium draws it without a GPU.
OF_THE_CANVAS = re.compile(r"%cPixiJS Deprecation|\s+at \w+[. ]|\[\.WebGL-\w+\]GL Driver Message")
ENDLESS = "predictor_corrector corrections=99"


@pytest.fixture
def page(browser: Any, served: SimpleNamespace) -> Iterator[Any]:
    """The page, on which nothing complains, and from which nothing goes elsewhere."""
    there = browser.new_context(viewport={"width": 1280, "height": 800})
    heard: list[str] = []
    asked: list[str] = []
    page = opened(there, served.address, heard, asked)
    yield page
    there.close()
    assert [text for text in heard if not OF_THE_CANVAS.match(text)] == []
    assert {url for url in asked if not url.startswith((served.base, "data:", "blob:"))} == set()


def opened(there: Any, address: str, heard: list[str], asked: list[str]) -> Any:
    page = there.new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda m: m.type in ("error", "warning") and heard.append(m.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("#line .said").wait_for()
    return page


def fill(page: Any, field: str, value: str) -> None:
    page.locator(f"#{field} :is(input, textarea)").fill(value)
    page.locator(f"#{field} :is(input, textarea)").press("Enter" if "solver" in field else "Tab")


def press(page: Any, button: str, then: Any) -> None:
    """Click until it has been heard: not while the walk before is still being put away."""
    for _ in range(20):
        page.locator(f"#{button}").click()
        with suppress(Exception):  # Playwright's own timeout, which is imported with it
            return then.wait_for(timeout=5000)
    pytest.fail(f"{button} is not heard: {page.locator('#tabs').inner_text()}")


def drawn(page: Any, where: str) -> list[np.ndarray]:
    """Wait for finished images, and look at them."""
    page.locator(f"#{where}-images .line.good").wait_for()
    return [np.asarray(image) for image in images_in(page.locator(f"#{where}-images").inner_html())]


def refused(page: Any, where: str) -> str:
    page.locator(f"#{where}-line .line.bad").wait_for()
    return str(page.locator(f"#{where}-line").inner_text())


def test_a_page_draws_what_sample_draws_and_an_image_downloads_with_its_settings(page, model):
    fill(page, "generate-seeds", "0-3")
    page.locator("#generate-go").click()
    assert np.array_equal(drawn(page, "generate"), sample(model, 4)[:, 0])
    with page.expect_download() as download:
        page.locator("#generate-images a[download]").nth(2).click()
    with Image.open(download.value.path()) as image:
        assert json.loads(image.text["rediffuse"])["image"] == 2
    assert download.value.suggested_filename.endswith("-step-00000006-000002.png")


def test_cancelling_ends_the_walk_and_the_next_one_begins(page):
    fill(page, "generate-solver", ENDLESS)
    fill(page, "generate-steps", "1000")
    page.locator("#generate-go").click()
    page.locator("#generate-images progress").wait_for()
    page.locator("#generate-cancel").click()
    page.get_by_text(re.compile(r"cancelled in step \d+ of 1,000, after [\d,]+ eval")).wait_for()
    fill(page, "generate-solver", "ddim")
    fill(page, "generate-steps", "2")
    # Only one walk is drawn at a time.
    press(page, "generate-go", page.get_by_text("· 2 evaluations of the network"))


def test_closing_the_page_ends_its_walk(browser, served):
    with browser.new_context() as there:
        page = opened(there, served.address, [], [])
        fill(page, "generate-solver", ENDLESS)
        fill(page, "generate-steps", "1000")
        page.locator("#generate-go").click()
        page.locator("#generate-images progress").wait_for()
        page.close()
        page = opened(there, served.address, [], [])
        page.locator("#generate-go").click()
        assert drawn(page, "generate")


def test_two_settings_are_drawn_side_by_side_from_the_same_noise(page, model):
    page.get_by_role("tab", name="Compare").click()
    fill(page, "compare-seeds", "0-1")
    fill(page, "b-steps", "5")
    page.locator("#compare-go").click()
    assert np.array_equal(drawn(page, "a"), sample(model, 2)[:, 0])
    assert np.array_equal(drawn(page, "b"), sample(model, 2, steps=5)[:, 0])


def test_what_a_mask_is_drawn_on_is_painted_anew_and_nothing_else(page, tmp_path):
    given = np.full((8, 8), 200, np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    page.get_by_role("tab", name="Start from an image").click()
    page.locator("#edit-canvas canvas").first.wait_for()
    page.locator("#edit-go").click()
    assert "give an image first" in refused(page, "edit")
    page.locator("#edit input[type=file]").first.set_input_files(tmp_path / "given.png")
    page.get_by_label("inpainting").click()
    page.get_by_text("resamplings").wait_for()
    page.locator("#edit-go").click()
    page.get_by_text("nothing is marked").wait_for()
    page.locator("#edit-canvas").get_by_label("Brush", exact=True).click()
    box = page.locator("#edit-canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 100, y)
    page.mouse.down()
    page.mouse.move(x + 100, y, steps=10)
    page.mouse.up()
    page.locator("#edit-go").click()
    for image in drawn(page, "edit"):
        changed = np.argwhere(image != given)
        assert len(changed)
        assert ((changed >= (2, 1)) & (changed <= (5, 6))).all()


@pytest.mark.slow
def test_rubbish_is_refused_in_a_line_and_the_page_goes_on(page):
    for field, typed, says in (
        ("seeds", "/etc/passwd", "expected numbers and ranges"),
        ("seeds", EVIL, "expected numbers and ranges"),
        ("solver", "../../etc/passwd", "is not a name"),
    ):
        fill(page, f"generate-{field}", typed)
        press(page, "generate-go", page.locator("#generate-line").get_by_text(says))
        fill(page, f"generate-{field}", {"seeds": "0", "solver": "ddim"}[field])
        press(page, "generate-go", page.locator("#tabs:not(:has(#generate-line .bad))"))
        assert drawn(page, "generate")


def test_an_upload_that_is_too_large_or_no_image_does_no_harm(page, tmp_path):
    page.get_by_role("tab", name="Start from an image").click()
    page.locator("#edit-canvas canvas").first.wait_for()
    upload = page.locator("#edit input[type=file]").first
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(100_000_000)
    upload.set_input_files(tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size").wait_for()
    (tmp_path / "page.png").write_text(EVIL)
    upload.set_input_files(tmp_path / "page.png")
    assert "page.png cannot be used: it is not a PNG" in refused(page, "edit")


def test_a_run_is_seen_as_it_trains_and_its_name_is_no_markup(page, served):
    record = json.loads((served.run.directory / "run.json").read_text())
    (served.run.directory / "run.json").write_text(json.dumps({**record, "name": EVIL}))
    page.get_by_role("button", name="look again").click()
    page.wait_for_function(
        "text => document.querySelector('#run input').value.includes(text)", arg=EVIL
    )
    page.get_by_role("tab", name="Training").click()
    page.locator("#figure-timeline").wait_for()
    assert page.locator("#training-shown").get_by_text(EVIL).count() == 1
    assert page.locator("#training-shown img.on-dark:visible").count() == 0
    with open(served.run.metrics, "a") as file:
        file.write(json.dumps({"images": 289, "time": 1.0, "loss": 0.125}) + "\n")
    page.locator("#training-shown").get_by_text("0.125", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_narrow_page_covers_nothing(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    title, run = (page.locator(f"#top {part}").bounding_box() for part in ("#title", ".form"))
    assert title["y"] + title["height"] <= run["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
