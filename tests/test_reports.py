"""`rediffuse memorisation` and `rediffuse diagnose` on real runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import TINY, edit, rediffuse, run_id
from click.testing import CliRunner
from PIL import Image

from rediffuse import cli, diagnosis, memorisation, overview
from rediffuse.config.compose import compose
from rediffuse.data.pixels import augment
from rediffuse.errors import ConfigError, RunError
from rediffuse.gallery import Options, opened, settled
from rediffuse.images import of_run, prepare
from rediffuse.models import find, load
from rediffuse.runs import Run

Ask = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    words = [*TINY, "schedule=cosine", "learned_variance=true", "objective=hybrid"]
    return root, run_id(rediffuse("train", *words, "training.images=480", root=root))


def asked(root: Path, count: int, **how: Any) -> Options:
    return Options(root, count=count, **how)


def narrow(told: str) -> bool:
    return all(len(line) <= 80 for line in told.splitlines() if "/" not in line)


def told_as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_memorisation_tells_keeps_and_shows_what_it_found(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    memorisation.memorisation(run[:6], asked(root, 40))
    told = capsys.readouterr().out
    assert "no alarm" in told
    assert narrow(told)
    (folder,) = (root / run / "evaluation").glob("memorisation-*-3-40-*")
    facts = json.loads((folder / "report.json").read_text())
    assert facts["samples"] == 40
    assert facts["training_images"] == 216
    assert facts["held_out_images"] == 1797 - 216
    assert facts["verdict"]["expected"] == pytest.approx(15 / 1582)
    ratios = [one["ratio"] for one in facts["most_suspicious"]]
    assert ratios == sorted(ratios)
    with Image.open(folder / "neighbours.png") as picture:
        assert picture.size == (16 * 34 - 2, 5 * 34 - 2)


def test_memorisation_is_the_same_every_time_whatever_the_batch(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    told = []
    for size in (64, 7):
        memorisation.memorisation(run, asked(root, 20, batch_size=size), as_json=True)
        told.append(told_as_json(capsys))
    assert told[0] == told[1]


def test_versions_count_that_training_shows() -> None:
    rng = np.random.default_rng(0)
    training, held_out = (rng.integers(0, 256, (n, 1, 8, 8), np.uint8) for n in (60, 120))
    index, shown = torch.arange(60), torch.from_numpy(training)
    for flip, padding in ((True, 0), (False, 2), (True, 3)):
        copies = augment(shown, index, 5, flip=flip, crop_padding=padding).numpy()
        known = memorisation.Known(training, held_out, flip, padding)
        found = memorisation.compared(copies, known)
        assert found.verdict.alarm
        assert not found.samples.distance.any()
        assert np.array_equal(known.nearest(found.samples, [*range(60)]), copies)
        assert "shifted by up to" in memorisation._rule(found.verdict, known, 60) or not padding
        plain = memorisation.Known(training, held_out)
        assert (
            not memorisation.compared(copies[copies.shape[0] // 2 :], plain).verdict.alarm or flip
        )


def test_where_nothing_was_held_out_there_is_nothing_to_compare_with(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for k in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{k}.png")
    words = [f"data.path={tmp_path}", "data.image_size=8", "data.channels=1"]
    images = prepare(compose(["data=folder", *words, "data.validation_fraction=0"]).data, tmp_path)
    with pytest.raises(ConfigError, match="no image that this run was not trained on"):
        memorisation.real(images, flip=False, crop_padding=0)
    with pytest.raises(ConfigError, match="no image that this run was not trained on"):
        diagnosis.unseen(images, load(trained[1], root=trained[0]), 10)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"guidance": "2"},
    {"grid": "uniform"},
    {"solver": "ddim eta=1"},
    {"threshold": "dynamic_thresholding"},
    {"seed": 1},
    {"weights": "raw"},
    {"class_name": "3"},
]


def test_a_report_has_one_name_per_setting(trained: tuple[Path, str]) -> None:
    root, run = trained
    found = find(run, root)
    images, keys = of_run(found, load(run, root=root).config.data, ()), []
    for setting in [*SETTINGS, {}]:
        options = asked(root, 16, **{"steps": 2, "solver": "ddim"} | setting)
        model = opened(found, options)
        how, job = settled(model, options)
        keys.append(memorisation.key_of(model, how, job, images))
        for measured in ({"levels": 2}, {"levels": 3}):
            keys.append(diagnosis.key_of(model, how, job, images, measured))
    assert keys[-3:] == keys[:3]
    assert len({*keys}) == 3 * len(SETTINGS)


@pytest.mark.parametrize("ask", [memorisation.memorisation, diagnosis.diagnose])
def test_no_report_replaces_one_of_another_guidance(
    trained: tuple[Path, str], tmp_path: Path, ask: Ask
) -> None:
    root, run = trained
    shutil.copytree(root, tmp_path / "root")
    place = tmp_path / "root" / run / "evaluation"
    shutil.rmtree(place, ignore_errors=True)
    for guidance in ("1", "2"):
        ask(run, asked(tmp_path / "root", 16, steps=2, guidance=guidance))
    assert len([*place.glob("*/report.json")]) == 2


@pytest.mark.parametrize(
    ("ask", "name", "result"),
    [
        (memorisation.memorisation, "memorisation", "no alarm, p = "),
        (diagnosis.diagnose, "diagnosis", "12 noise levels"),
    ],
)
def test_a_changed_digit_of_a_report_is_noticed(
    trained: tuple[Path, str], tmp_path: Path, ask: Ask, name: str, result: str
) -> None:
    root, run = trained
    shutil.copytree(root, tmp_path / "root")
    here = Run(tmp_path / "root" / run)
    shutil.rmtree(here.directory / "evaluation", ignore_errors=True)
    ask(run, asked(tmp_path / "root", 20))
    (file,) = (here.directory / "evaluation").glob(f"{name}-*/report.json")
    assert result in str(overview.evaluations(here))
    facts = json.loads(file.read_text())
    facts["seed"] += 1
    file.write_text(json.dumps(facts))
    assert f"{file.parent.name}: damaged" in str(overview.evaluations(here))
    del facts["sha256"]
    file.write_text(json.dumps(facts))
    assert "unverified" in str(overview.evaluations(here))


@pytest.mark.parametrize("ask", [memorisation.memorisation, diagnosis.diagnose])
def test_what_cannot_be_done_is_refused(trained: tuple[Path, str], ask: Ask) -> None:
    root, run = trained
    with pytest.raises(RunError, match="no run"):
        ask("ffffff", asked(root, 16))
    with pytest.raises(ConfigError, match="more than"):
        ask(run, asked(root, 10**6))
    with pytest.raises(ConfigError, match="did you mean heun"):
        ask(run, asked(root, 16, solver="huen"))


@pytest.mark.parametrize("command", ["memorisation", "diagnose"])
def test_the_commands_want_a_run_and_explain_themselves(command: str) -> None:
    runner = CliRunner()
    assert "which run?" in runner.invoke(cli.rediffuse, [command]).output
    told = runner.invoke(cli.rediffuse, [command, "--help"])
    assert told.exit_code == 0
    assert f"rediffuse {command} 3f2a91" in told.output


def test_images_that_were_changed_are_no_measure(trained: tuple[Path, str], tmp_path: Path) -> None:
    root, run = trained
    shutil.copytree(root / run, tmp_path / run)
    edit(tmp_path / run / "environment.json", '"train_images": 216', '"train_images": 217')
    for ask in (memorisation.memorisation, diagnosis.diagnose):
        with pytest.raises(RunError, match="the images are not those"):
            ask(run, asked(tmp_path, 16))


def test_diagnose_tells_keeps_and_draws_what_it_found(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    diagnosis.diagnose(run, asked(root, 40), level_count=5)
    told = capsys.readouterr().out
    assert narrow(told)
    assert "residual" in told
    (folder,) = (root / run / "evaluation").glob("diagnosis-*")
    facts = json.loads((folder / "report.json").read_text())
    rows = facts["levels"]
    assert len(rows) == 5
    assert [row["log_snr"] for row in rows] == sorted((r["log_snr"] for r in rows), reverse=True)
    for row in rows:
        snr = np.exp(row["log_snr"])
        for name in ("average", "raw", "gaussian"):
            assert row[name]["eps"] == pytest.approx(row[name]["x_0"] * snr, rel=1e-2)
        assert row["gaussian"]["x_0"] < row["raw"]["x_0"]  # of a network that has hardly learned
    assert rows[-1]["gaussian"]["x_0"] == pytest.approx(rows[-1]["mean_image"], rel=0.1)
    assert all(row["average"]["calibration"] > 0 for row in rows[1:])
    steps = facts["trajectory"]
    assert len(steps) == 3
    assert steps[0]["x_t"] == pytest.approx(steps[0]["expected"], rel=0.05)
    with Image.open(folder / "diagnosis.png") as picture:
        assert picture.format == "PNG"


def test_diagnose_is_the_same_every_time_and_another_seed_is_another(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = trained
    told = []
    for seed in (0, 0, 1):
        diagnosis.diagnose(run, asked(root, 16, seed=seed), level_count=2, as_json=True)
        told.append(told_as_json(capsys))
    assert told[0] == told[1]
    assert told[0]["levels"] != told[2]["levels"]


@pytest.mark.slow
def test_a_model_trained_long_on_32_images_raises_the_alarm_and_on_many_it_does_not(
    tmp_path: Path,
) -> None:
    alarms = {}
    for fraction, images in ((0.97773, 60_000), (0.05, 20_000)):
        words = [f"data.validation_fraction={fraction}", f"training.images={images}"]
        small = ["training.epochs=null", "tracking=none", "threads=1", "training.previews=false"]
        run = run_id(rediffuse("train", *small, *words, root=tmp_path, timeout_s=2000))
        told = rediffuse("memorisation", run, "--n", "200", "--json", root=tmp_path)
        facts = json.loads(told.stdout)
        alarms[facts["training_images"]] = facts["alarm"]
    assert alarms == {32: True, 1366: False}
