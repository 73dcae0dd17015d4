"""Two runs side by side: how they were set, where they ran, how well they did, what they draw.

Images are paired: number j starts from the same noise and is of the same class in both, so what
differs comes of the runs and of how each of them samples.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from rediffuse import drift, outputs, tables
from rediffuse.api import sample
from rediffuse.config.compose import leaves
from rediffuse.config.schema import Config
from rediffuse.errors import CheckpointError, ConfigError, RunError
from rediffuse.gallery import Options, wanted
from rediffuse.launch import load_config
from rediffuse.models import find, load
from rediffuse.overview import brief
from rediffuse.pictures import Pixels, columns_for, grid, save_png
from rediffuse.processes import alone
from rediffuse.progress import Progress
from rediffuse.report import comparison, page
from rediffuse.runs import Run
from rediffuse.tracking.journal import is_clocked
from rediffuse.tracking.jsonl import read_metrics, write_atomically
from rediffuse.tracking.tracker import Row
from rediffuse.words import json_text, plain, say

Facts = dict[str, Any]
_FILES = ("comparison.json", "grid.png")


class Side(NamedTuple):
    """One of the two runs, as far as it can be read without its weights."""

    run: Run
    config: Config
    environment: Facts
    rows: list[Row]

    @property
    def images(self) -> int:
        """How many images it had seen at its last row of metrics."""
        return _last_images(self.rows)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes it was trained with, if any."""
        return drift.class_names(self.environment)


def compare(
    first: str,
    second: str,
    options: Options,
    *,
    images: bool = True,
    as_json: bool = False,
    html: Path | None = None,
) -> int:
    """Compare two runs, write what was found and tell it; return the exit code.

    `options` say how many images are drawn of each, and how, where that is not left to the runs.
    `html` is where a page of it goes.

    Raises:
        RediffuseError: if a run cannot be read, or cannot sample as asked.
    """
    alone("compare")
    if html:
        page.check_output(html)
    a, b = (read(find(word, options.root)) for word in (first, second))
    home = a.run.directory.parent / "comparisons" / f"{a.run.id[:8]}-{b.run.id[:8]}"
    folder = options.output_dir or home
    facts: Facts = {
        "runs": [brief(side.run) | {"directory": str(side.run.directory)} for side in (a, b)],
        "config": differing(*(side.config.model_dump() for side in (a, b))),
        "environment": differing(*(_decisive(side.environment) for side in (a, b))),
        "metrics": metrics(a.rows, b.rows),
        "images_per_s": [_speed(side.rows) for side in (a, b)],
        "samples": {"none": "as asked (--no-images)"},
        "versions": {"rediffuse": version("rediffuse"), "torch": torch.__version__},
    }
    job = {"compared_runs": [a.run.id, b.run.id]}
    if options.output_dir:
        outputs.check_folder(job, folder, _FILES)
    try:
        if images:
            facts["samples"] = samples(a, b, options, folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json_text(facts)
        write_atomically(folder / "comparison.json", text.encode())
        outputs.finish(folder, job)
    except OSError as failed:
        raise RunError(
            f"{folder} cannot be written ({failed.strerror}); name another --output-dir"
        ) from None
    if html:
        comparison.write(html, plain(facts), [a.rows, b.rows])
    say(text) if as_json else _tell(facts, folder)
    if html and not as_json:
        say(f"page    {html}")
    return 0


def read(run: Run) -> Side:
    """Read what a run wrote down.

    Raises:
        RediffuseError: if its record, configuration, environment or metrics are damaged.
    """
    run.read()
    return Side(run, load_config(run), drift.began(run), read_metrics(run.metrics))


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The full keys whose values in two trees are not equal, with both; None where one has none."""
    one, two = leaves(a), leaves(b)
    pairs = {key: [one.get(key), two.get(key)] for key in dict.fromkeys((*one, *two))}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _decisive(environment: Facts) -> Facts:
    return {
        key: value
        for key, value in leaves(environment).items()
        if drift.decides(key) or key.startswith(("data.", "git."))
    }


def metrics(a: Sequence[Row], b: Sequence[Row]) -> dict[str, Facts]:
    """Last and best of every metric that both have, at the last images seen that both have it at.

    Rows after it do not count: a longer run has no advantage. Where the two never wrote a metric at
    the same images seen, it is the last of each up to the end of the shorter one. The best of what
    is no loss is None.
    """
    found = {}
    end = min(_last_images(rows) for rows in (a, b))
    names = dict.fromkeys(name for row in a for name in row)
    for name in (n for n in names if n != "epoch" and not is_clocked(n)):
        both = [
            {int(row["images"]): row[name] for row in rows if name in row and row["images"] <= end}
            for rows in (a, b)
        ]
        if not all(both):
            continue
        shared = max(both[0].keys() & both[1].keys(), default=None)
        at = [max(values) if shared is None else shared for values in both]
        last = [values[images] for values, images in zip(both, at, strict=True)]
        best = [_least(values, until) for values, until in zip(both, at, strict=True)]
        found[name] = {
            "images": at,
            "last": last,
            "difference": last[1] - last[0],
            "best": best if "loss" in name else None,
        }
    return found


def _last_images(rows: Sequence[Row]) -> int:
    """The most images of a row; an evaluation of an earlier checkpoint comes after later ones."""
    return int(max((row["images"] for row in rows), default=0))


def _least(values: Mapping[int, float], until: int) -> float | None:
    counted = (v for images, v in values.items() if images <= until and math.isfinite(v))
    return min(counted, default=None)


def _speed(rows: Sequence[Row]) -> float | None:
    """The median speed; the first row of a process has none."""
    speeds = [row["images_per_s"] for row in rows if row.get("images_per_s", 0) > 0]
    return statistics.median(speeds) if speeds else None


def samples(a: Side, b: Side, options: Options, folder: Path) -> Facts:
    """Draw the same images from both into one picture, and measure how far each pair is apart."""
    for what, one, two in (
        ("image size", a.config.data.image_size, b.config.data.image_size),
        ("channels", a.config.data.channels, b.config.data.channels),
        ("classes", a.class_names, b.class_names),
    ):
        if one != two:
            told = f" ({one} and {two})" if what != "classes" else ""
            return {"none": f"not paired: the runs have other {what}{told}"}
    try:
        (of_a, drawn_a), (of_b, drawn_b) = (_drawn(side, options) for side in (a, b))
    except CheckpointError as refused:
        return {"none": str(refused)}
    apart = np.abs(drawn_a.astype(np.int16) - drawn_b).mean(axis=(1, 2, 3)).tolist()
    columns = columns_for(len(drawn_a), a.class_names)
    picture = grid(_alternating(drawn_a, drawn_b, columns), columns)
    lines = [_caption(*named) for named in (("A", of_a), ("B", of_b))]
    save_png(_captioned(picture, lines, 2 * -(-len(drawn_a) // columns)), folder / "grid.png")
    return {
        "manifests": [of_a, of_b],
        "pairs": [
            {"image": j, "class": _turn(a.class_names, j), "difference": difference}
            for j, difference in enumerate(apart)
        ],
        "mean_difference": statistics.mean(apart),
        "grid": str(folder / "grid.png"),
    }


def _drawn(side: Side, options: Options) -> tuple[Facts, Pixels]:
    model, count = load(side.run.directory, trusted=options.trust), options.count or COUNT
    try:
        how = wanted(model.config.sampling, options)
        with Progress(count) as bar:
            pixels = sample(
                model,
                count,
                solver=options.solver,
                steps=options.steps,
                guidance=options.guidance,
                seed=options.seed,
                done=bar.move,
            )
    except ConfigError as refused:
        raise ConfigError(f"run {side.run.id}: {refused}") from None
    assert model.origin
    facts = {"seed": options.seed, "sampling": how.model_dump(), "device": str(model.device)}
    return {**model.origin, **facts}, pixels


COUNT = 16


def _turn(class_names: Sequence[str], j: int) -> str | None:
    return class_names[j % len(class_names)] if class_names else None


def _alternating(
    a: Pixels, b: Pixels, columns: int
) -> UInt8[np.ndarray, "both channels height width"]:
    """Rows of A and B in turn; the last of each is filled with white."""
    blank = np.full((-len(a) % columns, *a.shape[1:]), 255, np.uint8)
    rows = [np.concatenate((x, blank)).reshape(-1, columns, *x.shape[1:]) for x in (a, b)]
    return np.stack(rows, axis=1).reshape(-1, *a.shape[1:])


def _caption(letter: str, manifest: Facts) -> str:
    how = manifest["sampling"]
    made = f"{manifest['run'][:8]} {manifest['checkpoint']} {how['solver']['name']} {how['steps']}"
    return f"{letter}  {made}".encode("ascii", "replace").decode()  # what every font has


def _captioned(picture: np.ndarray, lines: Sequence[str], rows: int) -> np.ndarray:
    """Write lines above a grid, and A and B in turn beside its rows; no pixel of it changes."""
    (height, width, channels), font = picture.shape, ImageFont.load_default()
    top, left = _LINE * len(lines), _LINE
    widest = max(left + width, *(left + math.ceil(font.getlength(line)) for line in lines))
    words = Image.new("L", (widest, top + height), 255)
    pen = ImageDraw.Draw(words)
    for k, line in enumerate(lines):
        pen.text((2, 1 + k * _LINE), line, 0, font)
    for row in range(rows):
        pen.text((2, top + row * (height + 2) // rows), "AB"[row % 2], 0, font)
    canvas = np.full((top + height, widest, channels), 255, np.uint8)
    canvas[..., :3] = np.asarray(words)[..., None]
    canvas[top:, left : left + width] = picture
    return canvas


_LINE = 14  # pixels


# The terminal


def _tell(facts: Facts, folder: Path) -> None:
    for letter, run in zip("AB", facts["runs"], strict=True):
        named = f"{run['id']} {run['name'] or ''}".rstrip()
        told = f"{letter}  {_shown(named, 60)}, {run['status']}, {run['images']:,} images"
        tables.hanging(told, 3)
    for what in ("config", "environment"):
        if facts[what]:
            _table((what, "A", "B"), [(key, *pair) for key, pair in facts[what].items()])
        else:
            say(f"\n{what}: nothing {'that decides bits ' * (what != 'config')}differs")
    _tell_metrics(facts)
    _tell_samples(facts["samples"])
    say(f"all     {folder / 'comparison.json'}")


def _tell_metrics(facts: Facts) -> None:
    found = {n: m for n, m in facts["metrics"].items() if not n.startswith("loss/")}  # parts of it
    rows: list[Sequence[Any]] = []
    for name, of in found.items():
        at = "/".join(f"{images:,}" for images in dict.fromkeys(of["images"]))
        rows.append((name, at, *of["last"], of["difference"], *(of["best"] or ("", ""))))
    speeds = facts["images_per_s"]
    if None not in speeds:
        rows.append(("images/s", "", *speeds, speeds[1] - speeds[0], "", ""))
    if rows:
        _table(("metric", "images", "A", "B", "B - A", "best A", "best B"), rows, right=True)
    if not found:
        end = min(run["images"] for run in facts["runs"])
        say(f"\nmetrics: none that both have up to {end:,} images")


def _tell_samples(found: Facts) -> None:
    if "none" in found:
        say(f"\nsamples: none; {found['none']}")
        return
    apart = [pair["difference"] for pair in found["pairs"]]
    say("")
    told = f"samples {len(apart)} pairs of equal noise: mean pixel difference "
    told += f"{found['mean_difference']:.2f} of 255 ({min(apart):.2f} to {max(apart):.2f})"
    tables.hanging(told, 8)
    say(f"grid    {found['grid']}")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], right: bool = False) -> None:
    """Print columns; long words are folded, since they often differ at their ends."""
    say("")
    cells = [[*map(_shown, row)] for row in rows]
    tables.table(head, cells, left=head[:1], fold=head[:1] if right else head)


def _shown(value: Any, most: int = 30) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "absent" if value is None else str(value)
    return text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[-most // 2 + 2 :]}"
