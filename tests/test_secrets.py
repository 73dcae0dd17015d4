"""Secrets in what is typed are masked wherever it is shown, kept or sent, and stay usable."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import TINY
from PIL import Image

from rediffuse import cli, evaluate, launch, overview, private, runs, session
from rediffuse.config.compose import compose, dump_yaml, read_yaml
from rediffuse.config.schema import Data
from rediffuse.errors import ConfigError, RunError
from rediffuse.images import of_run, relocate
from rediffuse.runs import Run
from rediffuse.words import json_text, masked_tree, masked_words

TOKEN = "hf_opensesame2001opensesame"
WORDS = (
    *(word for word in TINY if word not in ("tracking=none", "data.validation_fraction=0.85")),
    "data.image_size=8",
    "model.channel_multipliers=[1,2]",
    "model.attention_resolutions=[]",
    "model.norm.groups=8",
    "data.channels=1",
    "training.images=96",
    "training.previews=false",
    f"tracking.experiment=of-{TOKEN}",
    "tracking.trackers=[wandb]",
    f"name=run-{TOKEN}",
)


class Tracker:
    """A tracker that keeps all that it is told."""

    name = "wandb"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, *place: Any) -> "Tracker":
        self.told.append(place)
        return self

    def open(self, params: Mapping[str, Any]) -> str:
        self.told.append(dict(params))
        return "everything"

    def metrics(self, rows: Any) -> None:
        self.told.append(rows)

    def artifact(self, path: Path, name: str, images_seen: int) -> None:
        self.told.append((name, path.read_bytes()))

    def close(self, status: str) -> None:
        self.told.append(status)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / TOKEN
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def train(root: Path, pictures: Path) -> Run:
    words = [*WORDS, "data=folder", f"data.path={pictures}"]
    assert launch.train(compose(words), root=root) == 0
    (run,) = runs.list_runs(root)
    return run


def test_a_token_in_path_name_and_experiment_is_usable_and_nowhere_to_be_seen(
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(session._TRACKERS, "wandb", tracker)
    monkeypatch.setattr("sys.argv", ["rediffuse", "train", f"data.path={pictures}", "--token", "x"])
    run = train(tmp_path, pictures)
    assert launch.resume(run.id, ["training.images=192"], root=tmp_path) == 0
    model = evaluate.opened(run, evaluate.Options(tmp_path))
    assert of_run(run, model.config.data).per_epoch > 0
    cli.rediffuse.main(["show", run.id, "--root", str(tmp_path)], standalone_mode=False)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["resume", run.id, f"optimizer.name={TOKEN}", "--root", str(tmp_path)])

    said = "".join(capfd.readouterr())
    assert "optimizer.name" in said
    assert TOKEN not in said
    assert TOKEN not in repr(tracker.told)
    assert stat.S_IMODE(run.private.stat().st_mode) == 0o600
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == [run.private]
    record = run.read()
    assert record.name == "run-***"
    assert record.command[2:] == (f"data.path={pictures.parent}/***", "--token", "***")
    config = read_yaml(run.config)
    assert config["data"]["path"] == f"{pictures.parent}/***"
    assert config["tracking"]["experiment"] == "of-***"


def test_a_secret_that_is_not_there_any_more_is_asked_for_and_can_be_given_anew(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session._TRACKERS, "wandb", Tracker())
    run = train(tmp_path, pictures)
    run.private.unlink()
    with pytest.raises(RunError, match=r"data.path is '.*\*\*\*'.* give it anew"):
        launch.resume(run.id, ["training.images=192"], root=tmp_path)
    plain = pictures.parent / "plain"
    plain.symlink_to(pictures)
    for place, is_secret in ((pictures, True), (plain, False)):
        more = run.read().images_seen + 96
        words = [f"data.path={place}", f"training.images={more}"]
        assert launch.resume(run.id, words, root=tmp_path) == 0
        assert run.private.exists() == is_secret
        assert of_run(run, launch.load_config(run).data).per_epoch > 0
    relocate(run, [f"data.path={pictures}"])
    assert read_yaml(run.private) == {"path": str(pictures)}


def test_a_configuration_of_an_earlier_version_is_masked_when_the_run_goes_on(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session._TRACKERS, "wandb", Tracker())
    run = train(tmp_path, pictures)
    run.config.write_text(run.config.read_text().replace("***", TOKEN))
    run.private.unlink()
    assert TOKEN not in json_text(overview.full(run))
    page = tmp_path / "page.html"
    words = ["report", run.id, "--no-images", "--output", str(page), "--root", str(tmp_path)]
    assert cli.rediffuse.main(words, standalone_mode=False) == 0
    assert "of-***" in page.read_text()
    assert TOKEN not in page.read_text()
    assert launch.resume(run.id, ["training.images=192"], root=tmp_path) == 0
    assert TOKEN not in run.config.read_text()
    assert read_yaml(run.private) == {"path": str(pictures)}


@pytest.mark.parametrize("word", [f"device={TOKEN}", f"schedule.name={TOKEN}"])
def test_a_secret_where_no_run_needs_one_is_refused(word: str) -> None:
    config = compose([word])
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}=\*\*\* holds what looks like a secret"):
        private.check(config)
    private.check(config, before=config)  # a run of an earlier version goes on


def test_a_source_of_ones_own_keeps_its_token(tmp_path: Path) -> None:
    config = compose([])
    data = Data.model_validate({**config.data.model_dump(), "token": "abc", "path": "/a"})
    config = config.model_copy(update={"data": data})
    run = runs.create(tmp_path, files=private.files(config))
    assert "abc" not in run.config.read_text()
    kept = Data.model_validate(read_yaml(run.config)["data"])
    assert kept != data
    assert private.restored(run, kept) == data


def test_what_is_masked_is_every_string_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "open-sesame")
    facts = {"a": [1, {"b": f"x/{TOKEN}/y"}], "my_token": "abc", "c": ("open-sesame-2", None)}
    shown = {"a": [1, {"b": "x/***/y"}], "my_token": "***", "c": ["***-2", None]}
    assert masked_tree(facts) == shown
    assert json.loads(json_text(facts)) == shown
    assert masked_words(["--api-key", "abc", "--n", "3"]) == ["--api-key", "***", "--n", "3"]
    assert TOKEN not in dump_yaml(compose([f"data.path={TOKEN}", "data=folder", f"name={TOKEN}"]))
