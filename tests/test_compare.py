"""`compare` names what differs between two runs and nothing else, and pairs their images."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import TINY, content, edit
from cli import rediffuse as cli
from PIL import Image

from rediffuse import compare, launch
from rediffuse.api import load, sample
from rediffuse.config.compose import compose
from rediffuse.errors import ConfigError, RunError
from rediffuse.gallery import Options
from rediffuse.runs import list_runs

A, AGAIN, OTHER = range(3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run, the same trained again, and one of another seed, rate and length."""
    root = tmp_path_factory.mktemp("root")
    short = (*TINY, "training.log_every_images=96", "training.previews=false")
    ids: list[str] = []
    for words in ((), (), ("seed=1", "training.learning_rate=0.0005", "training.images=336")):
        launch.train(compose([*short, "training.images=240", *words]), root=root)
        ids += [run.id for run in list_runs(root) if run.id not in ids]
    return root, ids


@pytest.fixture
def spoilt(trained: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "root"), trained[1]


def compared(
    runs: tuple[Path, list[str]], one: int, two: int, out: Path, **how: object
) -> dict[str, object]:
    """What `comparison.json` says of two runs."""
    root, ids = runs
    images = bool(how.pop("images", True))
    asked = Options(root, output_dir=out, **how)  # type: ignore[arg-type]
    assert compare.compare(ids[one], ids[two], asked, images=images) == 0
    return json.loads((out / "comparison.json").read_text())


def test_a_run_trained_twice_differs_in_nothing_and_neither_is_touched(trained, tmp_path):
    before = content(trained[0])
    found = compared(trained, A, AGAIN, tmp_path)
    assert (found["config"], found["environment"]) == ({}, {})
    assert {"loss", "epoch/loss", "validation/loss"} < found["metrics"].keys()
    assert {of["difference"] for of in found["metrics"].values()} == {0}
    assert all(of["images"][0] == of["images"][1] for of in found["metrics"].values())
    assert [pair["difference"] for pair in found["samples"]["pairs"]] == [0] * 16
    assert content(trained[0]) == before


def test_what_differs_is_named_with_both_values_and_nothing_else_is(trained, tmp_path):
    found = compared(trained, A, OTHER, tmp_path, images=False)
    assert found["config"] == {
        "seed": [0, 1],
        "training.images": [240, 336],
        "training.learning_rate": [0.002, 0.0005],
        "rate.horizon_images": [240, 336],
    }
    assert found["samples"] == {"none": "as asked (--no-images)"}
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"fingerprint": "', '"fingerprint": "0', "data.fingerprint"),
        ('"code_sha256": "', '"code_sha256": "0', "code_sha256"),
        ('"threads": 1', '"threads": 2', "torch.threads"),
        ('"platform": "', '"platform": "0', None),
    ],
)
def test_of_the_environment_only_what_can_decide_bits_is_named(spoilt, tmp_path, old, new, key):
    root, ids = spoilt
    edit(root / ids[AGAIN] / "environment.json", old, new)
    found = compared(spoilt, A, AGAIN, tmp_path / "out", images=False)
    assert list(found["environment"]) == ([key] if key else [])


def test_the_grid_holds_what_sample_draws_of_each_in_turns(trained, tmp_path):
    root, ids = trained
    found = compared(trained, A, OTHER, tmp_path, count=12)
    drawn = [sample(load(ids[k], root=root), 12) for k in (A, OTHER)]
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    step, zoom = 34, 4  # 8 pixels, enlarged to 32, and a gap of 2
    top, left = picture.shape[0] - (4 * step - 2), 14
    for j in range(12):
        for k, pixels in enumerate(drawn):
            y, x = top + (2 * (j // 10) + k) * step, left + j % 10 * step
            shown = picture[y : y + 8 * zoom : zoom, x : x + 8 * zoom : zoom]
            assert np.array_equal(shown, pixels[j, 0]), (j, k)
    for j, pair in enumerate(found["samples"]["pairs"]):
        one, two = (pixels[j].astype(float) for pixels in drawn)
        assert pair == {
            "image": j,
            "class": str(j % 10),
            "difference": pytest.approx(np.abs(one - two).mean()),
        }
        assert pair["difference"] > 0


def test_shared_options_hold_for_both_and_else_each_samples_its_own_way(spoilt, tmp_path):
    root, ids = spoilt
    edit(root / ids[AGAIN] / "config.yaml", "  steps: 3\n", "  steps: 4\n")
    for asked, steps in (({}, [3, 4]), ({"steps": 2, "solver": "heun"}, [2, 2])):
        found = compared(spoilt, A, AGAIN, tmp_path / "out", count=1, **asked)
        ways = [manifest["sampling"] for manifest in found["samples"]["manifests"]]
        assert [way["steps"] for way in ways] == steps
        assert {way["solver"]["name"] for way in ways} == {asked.get("solver", "dpmpp_2m")}
        assert (found["samples"]["mean_difference"] == 0) == (steps == [2, 2])


def rows(*of: tuple[int, float]) -> list[dict[str, float]]:
    return [{"images": float(images), "time": 0.0, "loss": loss} for images, loss in of]


def test_metrics_are_compared_at_equal_images_and_the_longer_run_has_no_advantage():
    longer = rows((10, 3.0), (20, 1.0), (30, 2.0), (40, 0.5))
    shorter = rows((10, 4.0), (30, 3.5))
    for a, b, sign in ((longer, shorter, 1), (shorter, longer, -1)):
        assert compare.metrics(a, b)["loss"] == {
            "images": [30, 30],
            "last": [2.0, 3.5][::sign],
            "difference": 1.5 * sign,
            "best": [1.0, 3.5][::sign],
        }


def test_metrics_written_at_other_times_say_when_and_what_only_one_has_is_left_out():
    a = [*rows((10, 3.0), (25, 2.0)), {"images": 25.0, "time": 0.0, "fid": 9.0}]
    found = compare.metrics(a, rows((11, float("nan")), (22, 1.0)))
    assert found == {
        "loss": {"images": [10, 22], "last": [3.0, 1.0], "difference": -2.0, "best": [3.0, 1.0]}
    }
    assert compare.metrics(a, []) == {}


def other_size(run: Path) -> None:
    edit(run / "config.yaml", "image_size: 8\n", "image_size: 16\n")


def other_channels(run: Path) -> None:
    edit(run / "config.yaml", "  channels: 1\n", "  channels: 3\n")


def other_classes(run: Path) -> None:
    edit(run / "environment.json", '"9"\n', '"nine"\n')


def no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def broken_checkpoints(run: Path) -> None:
    for weights in run.glob("checkpoints/*/*.safetensors"):
        weights.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (other_size, r"not paired: the runs have other image size \(8 and 16\)"),
        (other_channels, r"not paired: the runs have other channels \(1 and 3\)"),
        (other_classes, "not paired: the runs have other classes"),
        (no_checkpoint, "run .* has no checkpoint 'latest'; it has none yet"),
        (broken_checkpoints, "no checkpoint in .* verifies"),
    ],
)
def test_runs_that_cannot_be_paired_say_why_and_are_compared_in_all_else(
    spoilt: tuple[Path, list[str]],
    tmp_path: Path,
    spoil: Callable[[Path], None],
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, ids = spoilt
    spoil(root / ids[AGAIN])
    found = compared(spoilt, A, AGAIN, tmp_path / "out")
    assert re.match(why, found["samples"]["none"])
    assert found["metrics"]["loss"]["difference"] == 0
    assert not (tmp_path / "out/grid.png").exists()
    assert len([line for line in capsys.readouterr().out.splitlines() if "samples" in line]) == 1


def test_json_is_all_that_is_printed_even_if_a_checkpoint_is_broken(spoilt):
    root, ids = spoilt
    newest = max((root / ids[OTHER] / "checkpoints").glob("step-*"))
    (newest / "model.safetensors").write_bytes(b"")
    # A path, and a beginning that is enough; what is written lies beside A.
    done = cli("compare", str(root / ids[A]), ids[OTHER][:8], "--json", "--n", "2", root=root)
    home = root / "comparisons" / f"{ids[A][:8]}-{ids[OTHER][:8]}"
    assert done.stdout == (home / "comparison.json").read_text() + "\n"
    found = json.loads(done.stdout)
    assert [run["id"] for run in found["runs"]] == [ids[A], ids[OTHER]]
    assert found["samples"]["grid"] == str(home / "grid.png")
    assert "trying the one before" in done.stderr


def test_the_terminal_shows_it_in_80_plain_columns(spoilt):
    root, ids = spoilt
    name = "[/x] " + "word " * 30 + "\\e[31m"
    edit(root / ids[AGAIN] / "config.yaml", "name: digits\nseed", f'name: "{name}"\nseed')
    done = cli("compare", ids[AGAIN], ids[OTHER], "--no-images", root=root)
    *lines, where = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert where.endswith("comparison.json")
    assert "[/x]" in done.stdout
    assert "\x1b" not in done.stdout
    assert any(re.match(r"training.learning_rate +0.002 +0.0005", line) for line in lines)
    assert any(re.match(r"validation/loss +240 ", line) for line in lines)
    assert "environment: nothing that decides bits differs" in lines


@pytest.mark.parametrize(
    ("word", "asked", "error", "says"),
    [
        ("ffffff", {}, RunError, "no run 'ffffff'"),
        ("../x", {}, RunError, "there is no folder '../x'"),
        ("", {}, RunError, "'' is not a run id"),
        (None, {"solver": "hoin"}, ConfigError, "run .*: sampling.solver: there is no solver"),
        (None, {"guidance": "nan"}, ConfigError, "run .*: --guidance nan"),
        (None, {"steps": 2000}, ConfigError, "run .*: 2000 sampling steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(
    trained, tmp_path, word, asked, error, says
):
    root, ids = trained
    out = tmp_path / "out"
    for pair in ((ids[A], word), (word, ids[A])):
        first, second = (ids[OTHER] if given is None else given for given in pair)
        with pytest.raises(error, match=says):
            compare.compare(first, second, Options(root, output_dir=out, **asked))
    assert not out.exists()


def test_a_folder_of_something_else_is_refused_and_left_alone(trained, tmp_path):
    (tmp_path / "grid.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"is not empty .*; name a new --output-dir"):
        compared(trained, A, AGAIN, tmp_path, count=1)
    assert content(tmp_path) == {"grid.png": b"mine"}


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be written .*; name another --output-dir"):
        compared(trained, A, AGAIN, tmp_path / "file/out", count=1)


@pytest.mark.parametrize("file", ["run.json", "environment.json", "config.yaml", "metrics.jsonl"])
def test_a_damaged_run_is_refused_naming_the_file(spoilt, tmp_path, file):
    root, ids = spoilt
    (root / ids[AGAIN] / file).write_bytes(b"[\n")
    with pytest.raises((RunError, ConfigError), match=re.escape(file)):
        compared(spoilt, A, AGAIN, tmp_path / "out")
