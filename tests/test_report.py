"""A report holds everything, loads nothing, and no word of a run can become markup."""

import base64
import hashlib
import io
import json
import re
import shutil
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import chromium, needs_chromium
from cli import TINY, content, edit
from matplotlib.text import Text
from PIL import Image

from rediffuse import compare, launch, plots
from rediffuse.api import load, sample
from rediffuse.cli import rediffuse as cli
from rediffuse.config.compose import compose
from rediffuse.config.schema import Config, Part
from rediffuse.errors import ConfigError, RunError
from rediffuse.evaluation.digests import add_digest
from rediffuse.gallery import Options, wanted
from rediffuse.pictures import film
from rediffuse.plots import Curve
from rediffuse.randomness import ImageNoise
from rediffuse.rasters import read_png
from rediffuse.report import curves, images
from rediffuse.report.evaluations import evaluations
from rediffuse.report.run import Asked, report
from rediffuse.runs import list_runs
from rediffuse.schedules import learned

EVIL = """<script>alert(1)</script>"'<img src=http://x.example/ onerror=alert(1)>{{7*7}}"""
OFTEN = ("log", "preview", "checkpoint", "validate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    often = [f"training.{what}_every_images=96" for what in OFTEN]
    launch.train(compose([*TINY, *often, "training.images=288"]), root=root)
    return root, list_runs(root)[0].id


@pytest.fixture
def spoilt(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """The directory of a copy, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "root") / trained[1]


@pytest.fixture(scope="module")
def whole(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with everything, its pictures beside it."""
    root, run = trained
    out = tmp_path_factory.mktemp("report")
    asked = Asked(root, out / "page.html", out / "pictures", solvers=("ddim", "heun"), count=2)
    assert report(run, asked) == 0
    return out / "page.html"


class Page(HTMLParser):
    """The tags of a page with their attributes, its words, and what it would load."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        self.words += data

    def values(self, *names: str) -> list[str]:
        return [of[name] for _, of in self.tags for name in names if name in of]

    @property
    def figures(self) -> list[str]:
        return [of["id"] for tag, of in self.tags if tag == "figure"]


TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "header", "section",
    "footer", "nav", "a", "h1", "h2", "h3", "p", "dl", "div", "dt", "dd", "pre", "code",
    "figure", "picture", "source", "img", "figcaption", "details", "summary", "table", "thead",
    "tr", "th", "td", "ul", "li",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "rel", "href", "class", "id", "media",
    "srcset", "src", "alt", "tabindex", "role", "aria-label", "scope",
}  # fmt: skip


def assert_harmless(page: Page) -> None:
    """Nothing but our own tags and attributes; what is loaded is inside of the page."""
    assert {tag for tag, _ in page.tags} <= TAGS
    assert {name for _, of in page.tags for name in of} <= ATTRIBUTES
    assert all(re.match(r"data:image/(svg\+xml|png|gif);", v) for v in page.values("src", "srcset"))
    assert all(value == "data:," or value[0] == "#" for value in page.values("href"))
    ids = set(page.values("id"))
    assert {value[1:] for value in page.values("href") if value[0] == "#"} <= ids


CURVES = ["loss", "held-out", "loss-by-noise", "learning-rate", "gradient-norm", "throughput"]
DRAWN = ["trajectory", "trajectory-film", "samplers"]
SCHEDULE = ["scales", "half-log-snr", "weighting"]
PREVIEWS = ["timeline", "timeline-film"]


def test_the_page_holds_every_figure_and_all_of_it_inside(whole: Path) -> None:
    page = Page(whole)
    assert page.figures == [*CURVES, *PREVIEWS, *DRAWN, *SCHEDULE]
    assert_harmless(page)
    for address in page.values("src", "srcset"):
        assert len(base64.b64decode(address.partition(",")[2], validate=True)) > 500
    for words in ("288", "schedule=discrete.cosine", "rediffuse resume", "rediffuse sample"):
        assert words in page.words
    assert "heun, 5 eval." not in page.words  # it is in a picture


def test_the_policy_lets_a_browser_load_nothing_and_run_nothing(whole: Path) -> None:
    text = whole.read_text()
    (policy,) = [v for v in Page(whole).values("content") if "default-src" in v]
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert "url(" not in style
    assert "@import" not in style


def test_no_word_of_a_run_becomes_markup(spoilt: Path) -> None:
    record = json.loads((spoilt / "run.json").read_text())
    record |= {"name": EVIL, "command": [EVIL, EVIL], "parent": EVIL}
    (spoilt / "run.json").write_text(json.dumps(record))
    environment = json.loads((spoilt / "environment.json").read_text())
    environment["packages"][EVIL] = environment["gpus"] = environment[EVIL] = EVIL
    environment["data"]["class_names"][:3] = [EVIL, r"$\frac", "猫\x1b\n"]
    (spoilt / "environment.json").write_text(json.dumps(environment))
    with open(spoilt / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"images": 288, "time": 1.0, EVIL: 1.0}) + "\n")
    change = {"images": 1, "time": 1.0, "config": {EVIL: [EVIL, 1]}, "environment": {}}
    (spoilt / "logs/drift.jsonl").write_text(json.dumps(change) + "\n")
    (spoilt / "evaluation").mkdir()
    figure = {"name": EVIL, "value": 1.0, "card": {"digest": EVIL, EVIL: EVIL}}
    (spoilt / "evaluation/a.json").write_text(json.dumps(figure))
    Image.new("L", (4, 4)).save(spoilt / "evaluation" / f"{EVIL.replace('/', '')}.png")
    assert report(spoilt.name, Asked(spoilt.parent, solvers=("ddim",))) == 0
    page = Page(spoilt / "report.html")
    assert_harmless(page)
    assert page.words.count(EVIL) > 8


def test_the_picture_of_a_sweep_is_shown(spoilt: Path) -> None:
    (spoilt / "evaluation/sweep-0123").mkdir(parents=True)
    Image.new("L", (4, 4)).save(spoilt / "evaluation/sweep-0123/sweep.png")
    assert report(spoilt.name, Asked(spoilt.parent, draws=False)) == 0
    assert "sweep-0123/sweep.png" in Page(spoilt / "report.html").words


@pytest.mark.parametrize(
    ("draws", "why"),
    [(True, "There is no checkpoint yet to draw with."), (False, "as asked (--no-images)")],
)
def test_a_run_that_has_left_nothing_gets_a_page_that_says_so(spoilt, draws, why):
    for gone in ("checkpoints", "samples"):
        shutil.rmtree(spoilt / gone)
    (spoilt / "metrics.jsonl").unlink()
    assert report(spoilt.name, Asked(spoilt.parent, draws=draws)) == 0
    page = Page(spoilt / "report.html")
    assert page.figures == SCHEDULE
    for told in (
        "No metrics have been written yet.",
        "No preview has been drawn yet.",
        "This run has not been evaluated.",
        why,
    ):
        assert told in page.words


def test_a_report_changes_nothing_of_a_run_but_its_page(spoilt: Path) -> None:
    before = content(spoilt)
    report(spoilt.name, Asked(spoilt.parent, solvers=("ddim",), count=1))
    after = content(spoilt)
    assert len(after.pop("report.html")) > 10_000
    assert after == before


def test_what_is_broken_is_named_and_the_rest_is_shown(spoilt: Path) -> None:
    first, *_ = sorted((spoilt / "samples").glob("preview-*.png"))
    first.write_bytes(b"<svg/>")
    for weights in spoilt.glob("checkpoints/*/*.safetensors"):
        weights.write_bytes(b"")
    (spoilt / "evaluation").mkdir()
    (spoilt / "evaluation/bad.json").write_text("[1")
    report(spoilt.name, Asked(spoilt.parent))
    page = Page(spoilt / "report.html")
    assert page.figures == [*CURVES, *PREVIEWS, *SCHEDULE]
    for told in (
        f"{first.name} is left out: it is not a PNG image.",
        "Not drawn: no checkpoint in",
        "bad.json cannot be read",
    ):
        assert told in page.words


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"output": "page.txt"}, ConfigError, r"page.txt: a page's name ends in \.html"),
        ({"output": "file/page.html"}, ConfigError, "cannot be written, as .*file is"),
        ({"solvers": ("hoin",)}, ConfigError, "there is no solver 'hoin'"),
        ({"checkpoint": "step-7"}, RunError, "has no checkpoint 'step-7'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    trained, tmp_path, asked, error, says
):
    (tmp_path / "file").touch()
    if "output" in asked:
        asked = {"output": tmp_path / asked["output"], "draws": False}
    with pytest.raises(error, match=says):
        report(trained[1], replace(Asked(trained[0], tmp_path / "page.html"), **asked))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_command_says_where_the_page_is(trained, tmp_path, capsys):
    root, run = trained
    file = tmp_path / "page.html"
    words = ["report", run[:8], "--root", str(root), "--no-images", "--output", str(file)]
    assert cli.main(words, standalone_mode=False) == 0
    assert re.fullmatch(rf"report    {file} \(\d\.\d MB\)\n", capsys.readouterr().out)


# What is drawn


@pytest.mark.parametrize(("solver", "evaluations"), [("ddim", 4), ("heun", 7)])
def test_a_trajectory_is_that_of_sample_from_the_same_noise(trained, solver, evaluations):
    model = load(trained[1], root=trained[0])
    how = wanted(model.config.sampling, Options(solver=solver, steps=4))
    numbers = (0, 1, 2)
    drawn = images.follow(model, how, numbers, seed=5)
    expected = sample(model, numbers, solver=solver, steps=4, seed=5)
    assert np.array_equal(drawn.images, expected)
    assert drawn.evaluations == evaluations
    assert [moment.t for moment in drawn.moments] == [1000, 750, 500, 250]
    noise = ImageNoise(5, torch.tensor(numbers))(torch.empty(3, 1, 8, 8))
    shown = ((noise + 1) * 127.5).clamp(0, 255).round().numpy()
    assert np.abs(drawn.moments[0].x_t - shown).max() <= 1  # σ is almost 1 at t_max
    assert all(moment.x_0.shape == (3, 1, 8, 8) for moment in drawn.moments)


def test_where_each_image_has_its_own_time_moments_are_counted_in_steps(trained):
    model = load(trained[1], root=trained[0])
    how = wanted(model.config.sampling, Options(solver="adaptive"))
    drawn = images.follow(model, how, (0, 1), seed=0)
    assert np.array_equal(drawn.images, sample(model, 2, solver="adaptive"))
    assert {moment.t for moment in drawn.moments} == {None}
    assert [moment.step for moment in drawn.moments][:2] == [0, 1]
    section = images.trajectories(replace(model, config=adaptive(model.config)), seed=0)
    assert [picture.name for picture in section.pictures] == ["trajectory", "trajectory-film"]


def adaptive(config: Config) -> Config:
    sampling = config.sampling.model_copy(update={"solver": Part(name="adaptive")})
    return config.model_copy(update={"sampling": sampling})


def test_a_schedule_that_learns_is_followed_and_drawn_as_well(trained):
    model = load(trained[1], root=trained[0])
    clock = learned.learned()
    model = replace(model, denoiser=replace(model.denoiser, schedule=clock))
    how = wanted(model.config.sampling, Options(solver="ddim", steps=2))
    assert len(images.follow(model, how, (0,), seed=0).moments) == 2
    config = model.config.model_copy(update={"times": Part(name="uniform")})
    section = curves.schedule(config, clock, ())
    assert section.notes[0].startswith("This schedule learns")


def test_moments_are_few_and_even_however_many_steps_there_are(trained):
    model = load(trained[1], root=trained[0])
    how = wanted(model.config.sampling, Options(solver="ddim", steps=100))
    times = [moment.t for moment in images.follow(model, how, (0,), seed=0).moments]
    assert 40 <= len(times) <= 80
    assert times == list(np.linspace(1000, 0, len(times), endpoint=False))


def test_the_timeline_has_the_first_rows_of_the_previews_pixel_by_pixel(trained):
    root, run = trained
    (picture,) = (root / run / "samples").glob("preview-*288.png")
    pixels = sample(load(run, root=root), 2)
    shown = images._first_row(images.picture_of(picture), 32)  # 8 pixels, four times as large
    assert shown.shape == (2, 1, 32, 32)  # four images are two rows of two
    assert np.array_equal(shown[:, :, ::4, ::4], pixels)


def previews(folder: Path, count: int, size: int = 64) -> None:
    for seen in range(count):
        Image.new("L", (size, size), seen).save(folder / f"preview-{seen:010d}.png")


def test_no_more_previews_are_decoded_than_a_page_has_room_for(tmp_path, monkeypatch):
    previews(tmp_path, 12)
    decoded = []
    monkeypatch.setattr(images, "_SHOWN_PIXELS", 5 * 64 * 64)
    monkeypatch.setattr(images, "read_png", lambda *a: decoded.append(a[0].name) or read_png(*a))
    shots, notes = images._previews(tmp_path, 8)
    assert [*shots] == [0, 3, 6, 8, 11]
    assert decoded == [f"preview-{seen:010d}.png" for seen in shots]
    assert notes == []


def test_a_picture_of_too_many_pixels_is_left_out_before_it_is_decoded(tmp_path, monkeypatch):
    previews(tmp_path, 3)
    head = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">IIBBBBB", 8001, 8000, 8, 0, 0, 0, 0)
    large = head + struct.pack(">I", zlib.crc32(head[12:])) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    (tmp_path / "preview-0000000009.png").write_bytes(large)
    shots, notes = images._previews(tmp_path, 8)
    assert [*shots] == [0, 1, 2]
    told = "is left out: it has more than 64 million pixels."
    assert notes == [f"preview-0000000009.png {told}"]
    monkeypatch.setattr(images, "_WRITTEN_PIXELS", 2 * 64 * 64)
    shown, notes = images.pictures_in(tmp_path)
    assert [picture.title for picture in shown] == [f"preview-000000000{n}.png" for n in (0, 1)]
    assert len(notes) == 2


def test_figures_of_evaluations_are_shown_with_their_cards_and_no_others(tmp_path):
    card = {"digest": "d1", "n": 200, "samples": {"told": "images 0-199"}}
    floor = {"value": 0.0065, "n": 200, "what": "test against train", "standard_error": 0.001}
    figure = {"figure": "fd_200", "name": "fd", "value": 0.5, "standard_error": 0.02}
    figure |= {"floor": floor}
    bare = {"name": "fid", "value": 3.0}
    whole = {"seconds": 3, "figures": [{**figure, "card": card}, bare]}
    (tmp_path / "a.json").write_text(json.dumps(add_digest(whole)))
    without = add_digest({"figures": [bare, {**bare, "card": {}}]})
    (tmp_path / "b.json").write_text(json.dumps(without))
    ((shown,), notes) = evaluations(tmp_path)
    assert shown[:7] == (
        "a.json", "fd_200", "0.5", " ± 0.02",
        "0.0065 ± 0.001 (test against train)", "d1", "images 0-199",
    )  # fmt: skip
    assert shown.card["n"] == "200"
    assert notes == ["b.json has no figure with its card, so nothing of it is shown."]


# Figures


def test_a_smoothed_curve_is_the_weighted_mean_of_what_was_measured_before_and_after():
    at, values = np.array([0.0, 10, 30, 80]), np.array([1.0, np.nan, 4, 2])
    half_life = 80 / 40
    found = plots.smoothed(Curve("", at, values))
    for k in range(4):
        weights = 2 ** -(np.abs(at - at[k]) / half_life) * np.isfinite(values)
        assert found[k] == pytest.approx((weights * np.nan_to_num(values)).sum() / weights.sum())
    assert np.isnan(plots.smoothed(Curve("", at, values * np.nan))).all()


def curve(label: str = "", n: int = 40) -> Curve:
    return Curve(label, np.arange(1.0, n + 1) * 1000, 1 / np.arange(1.0, n + 1))


pixels = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 1, 8, 8)
numbers = np.linspace(0.1, 1, 9)
FIGURES = {
    "loss": lambda: plots.loss([curve("A"), curve("B")]),
    "by noise": lambda: plots.losses_by_noise([curve(str(k)) for k in range(6)]),
    "held out": lambda: plots.held_out([curve()]),
    "one row": lambda: plots.metric([curve(n=1)], "images/s", level=1.0),
    "scales": lambda: plots.scales(numbers, numbers, numbers * 80, numbers),
    "half log-SNR": lambda: plots.half_log_snr(numbers, numbers * np.inf, numbers, numbers),
    "weights": lambda: plots.weights(numbers, numbers * np.inf, numbers),
    "table": lambda: plots.table([pixels, pixels], ["a" * 99, "b"], ["$x", "猫", "c"], "t"),
    "broad table": lambda: plots.table([pixels.repeat(10, axis=0)], ["a" * 99], ["9" * 99] * 30),
}  # fmt: skip


@pytest.mark.parametrize("style", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_fits_a_laptop_with_letters_of_9_points_and_is_the_same_every_time(name, style):
    made = []

    def draw():
        made.append(FIGURES[name]())
        return made[-1]

    first, second = (plots.svg(draw, style) for _ in range(2))
    assert first == second
    assert made[0].get_figwidth() * 96 <= 1242  # pixels, of 1366 with a page's margins
    letters = [text for text in made[0].findobj(Text) if text.get_text() and text.get_visible()]
    assert letters
    assert not [text for text in letters if re.search(r"\$.*\{", text.get_text())]
    assert min(text.get_fontsize() for text in letters) >= 9


@pytest.mark.parametrize(("channels", "width"), [(1, 8), (3, 32), (4, 28)])
def test_a_table_shows_every_pixel_as_it_is_and_nothing_between_images(channels, width):
    given = np.arange(2 * 3 * channels * 40 * width).astype(np.uint8)
    rows = given.reshape(2, 3, channels, 40, width)
    canvas, zoom = plots._laid_out([*rows]), 4 if width == 8 else 1
    for r, k in np.ndindex(2, 3):
        height, across = 40 * zoom + 2, width * zoom + 2
        cell = canvas[r * height : (r + 1) * height, k * across : (k + 1) * across]
        shown = cell[:-2:zoom, :-2:zoom].transpose(2, 0, 1)
        assert np.array_equal(shown[: 3 if channels == 1 else channels], rows[r, k].repeat(
            3 if channels == 1 else 1, axis=0
        ))  # fmt: skip
        assert channels == 4 or (shown[3] == 255).all()
        assert not cell[-2:, :, 3].any()
        assert not cell[:, -2:, 3].any()


def test_a_film_has_its_frames_a_growing_bar_and_rests_on_the_last():
    frames = [np.full((20, 30, 3), 50 * k, np.uint8) for k in range(1, 5)]
    with Image.open(io.BytesIO(film(frames))) as shown:
        assert (shown.n_frames, shown.info["loop"]) == (4, 0)
        for k, frame in enumerate(frames):
            shown.seek(k)
            seen = np.asarray(shown.convert("RGB"))
            assert np.array_equal(seen[:20], frame)
            assert (seen[-1] == 90).all(axis=1).sum() == round(30 * (k + 1) / 4)
            assert shown.info["duration"] == (1500 if k == 3 else 120)


# A browser


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1366, 800])
def test_chromium_shows_it_offline_without_a_complaint(
    whole: Path, scheme: str, width: int
) -> None:
    with chromium() as browser:
        there = browser.new_context(
            viewport={"width": width, "height": 768}, color_scheme=scheme, offline=True
        )
        page, heard, asked = there.new_page(), [], []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(whole.as_uri())
        sizes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
        sources = page.evaluate("[...document.images].map(i => i.currentSrc)")
        broad = page.evaluate("document.documentElement.scrollWidth")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert heard == []
    assert [url for url in asked if not url.startswith("data:")] == [whole.as_uri()]
    assert len(sizes) == len([*CURVES, *PREVIEWS, *DRAWN, *SCHEDULE])
    assert min(min(size) for size in sizes) > 0
    assert broad <= width
    assert paper == ("rgb(22, 25, 29)" if scheme == "dark" else "rgb(255, 255, 255)")
    dark = Page(whole).values("srcset")
    drawn = [source for source in sources if source.startswith("data:image/svg")]
    assert all((source in dark) == (scheme == "dark") for source in drawn)


# Two runs


def test_two_runs_share_one_page_with_their_curves_and_images(trained, spoilt):
    root, run = trained
    edit(spoilt / "config.yaml", "seed: 0\n", "seed: 1\n")
    edit(spoilt / "config.yaml", "name: digits\nseed", f"name: {json.dumps(EVIL)}\nseed")
    out = spoilt.parent / "out"
    for images_drawn, file in ((True, "all.html"), (False, "few.html")):
        asked = Options(output_dir=out, count=2)
        pair = str(root / run), str(spoilt)
        compare.compare(*pair, asked, images=images_drawn, html=out / file)
        page = Page(out / file)
        assert_harmless(page)
        assert (
            page.figures == [f for f in CURVES if f != "loss-by-noise"] + ["images"] * images_drawn
        )
        assert EVIL in page.words
    assert "None: as asked (--no-images)." in page.words
    with pytest.raises(ConfigError, match="a page's name ends in"):
        compare.compare(run, run, Options(root, output_dir=out), html=out / "page")


def test_only_a_page_of_ours_is_replaced(trained: tuple[Path, str], tmp_path: Path) -> None:
    root, run_id = trained
    ours, theirs = tmp_path / "ours.html", tmp_path / "theirs.html"
    theirs.write_text("<p>my own page</p>")
    for _ in range(2):
        assert report(run_id, Asked(root, output=ours, draws=False)) == 0
    with pytest.raises(ConfigError, match=r"theirs\.html is there and is no page of Rediffuse"):
        report(run_id, Asked(root, output=theirs, draws=False))
    assert theirs.read_text() == "<p>my own page</p>"


def test_pictures_go_into_a_folder_of_their_own(trained: tuple[Path, str], tmp_path: Path) -> None:
    root, run_id = trained
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for _ in range(2):
        assert report(run_id, Asked(root, tmp_path / "a.html", draws=False, pictures=ours)) == 0
    theirs.mkdir()
    (theirs / "loss.svg").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty .*; name a new --pictures"):
        report(run_id, Asked(root, tmp_path / "b.html", draws=False, pictures=theirs))
    assert content(theirs) == {"loss.svg": b"mine"}
