"""Images are found wherever they lie now, and a run remembers the place."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from rediffuse import images, launch, reproduce
from rediffuse.cli import rediffuse
from rediffuse.config.compose import compose
from rediffuse.data.packing import FACTS
from rediffuse.errors import ConfigError, DataError, RunError
from rediffuse.images import Images, of_run, prepare, relocate
from rediffuse.models import find
from rediffuse.runs import Run

TINY = (
    "data=folder",
    "data.image_size=8",
    "data.channels=1",
    "model.base_channels=8",
    "model.norm.groups=4",
    "model.channel_multipliers=[1]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
    "training.images=16",
    "training.batch_size=8",
    "training.previews=false",
    "sampling.steps=2",
    "tracking=none",
    "threads=1",
    "device=cpu",
)


def pictures(folder: Path, count: int = 12, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.bmp")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was trained on relative paths, in a directory of its own."""
    place = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("train", "held", "test")):
        pictures(place / "pictures" / name, seed=seed)
    before = Path.cwd()
    os.chdir(place)
    try:
        words = [
            "data.path=pictures/train",
            "data.validation_path=pictures/held",
            "data.test_path=./pictures/test",
        ]
        assert launch.train(compose([*TINY, *words]), root=place / "runs") == 0
    finally:
        os.chdir(before)
    return find(next((place / "runs").glob("*/run.json")).parent)


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of the run, its pictures and its root, of its own for each test."""
    shutil.copytree(trained.directory.parents[1], tmp_path / "place")
    file = tmp_path / "place/runs" / trained.id / "config.yaml"
    old, new = str(trained.directory.parents[1]), str(tmp_path / "place")
    file.write_text(file.read_text().replace(old, new))
    return Run(file.parent)


def home(run: Run) -> Path:
    return run.directory.parents[1]


def paths(run: Run) -> dict[str, str]:
    arguments = launch.load_config(run).data.arguments
    return {name: arguments[name] for name in ("path", "validation_path", "test_path")}


def seen(run: Run) -> Images:
    return of_run(run, launch.load_config(run).data)


def test_a_run_keeps_its_paths_as_absolute_ones(run: Run) -> None:
    assert paths(run) == {
        "path": str(home(run) / "pictures/train"),
        "validation_path": str(home(run) / "pictures/held"),
        "test_path": str(home(run) / "pictures/test"),
    }
    assert seen(run).per_epoch == 12


def test_what_is_packed_by_a_relative_path_is_that_of_the_absolute_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home(run))
    root = home(run) / "other"
    for path in ("pictures/train", home(run) / "pictures/train"):
        prepare(compose([*TINY, f"data.path={path}"]).data, root)
    assert len(list((root / "packed").glob(f"*/{FACTS}"))) == 1


def test_a_run_that_kept_relative_paths_finds_them_beside_its_root(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run.config.read_text()
    run.config.write_text(text.replace(f"{home(run)}/", ""))
    assert paths(run)["path"] == "pictures/train"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert seen(run).per_epoch == 12
    assert reproduce.reproduce(run.id, steps=1, root=run.directory.parent) == 0


def test_moved_images_are_named_anew_and_stay_so(run: Run) -> None:
    (home(run) / "pictures").rename(home(run) / "moved")
    with pytest.raises(DataError, match=r"no folder .*pictures/train'; give one with data\.path"):
        seen(run)
    words = [
        f"data.path={home(run)}/moved/train",
        f"validation_path={home(run)}/moved/held",
        f"--data.test_path={home(run)}/moved/test",
    ]
    relocate(run, words)
    assert {Path(path).parent.name for path in paths(run).values()} == {"moved"}
    assert seen(run).per_epoch == 12


def test_resume_of_a_finished_run_keeps_the_new_place(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (home(run) / "pictures").rename(home(run) / "moved")
    words = [
        f"data.path={home(run)}/moved/train",
        f"data.validation_path={home(run)}/moved/held",
        f"data.test_path={home(run)}/moved/test",
    ]
    assert launch.resume(run.id, words, root=run.directory.parent) == 0
    assert "is finished" in capsys.readouterr().out
    assert {Path(path).parent.name for path in paths(run).values()} == {"moved"}


@pytest.mark.parametrize("command", ["evaluate", "sweep", "memorisation", "diagnose", "reproduce"])
@pytest.mark.parametrize("by_option", [False, True])
def test_every_command_that_reads_the_images_of_a_run_takes_their_new_place(
    run: Run, command: str, by_option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    door = {"memorisation": "memorisation", "diagnose": "diagnosis"}.get(command, command)
    monkeypatch.setattr(
        f"rediffuse.{door}.{command}", lambda word, *_, **__: found.append(word) or 0
    )
    moved = (home(run) / "pictures/train").rename(home(run) / "moved")
    which = ["--run-id", run.id] if by_option else [run.id]
    words = [command, *which, f"data.path={moved}", "--root", str(run.directory.parent)]
    CliRunner().invoke(rediffuse, words, catch_exceptions=False, standalone_mode=False)
    assert found == [run.id]
    assert paths(run)["path"] == str(moved)


def test_other_images_and_other_keys_are_refused_and_nothing_is_kept(run: Run) -> None:
    before = run.config.read_bytes()
    other = pictures(home(run) / "other", seed=9)
    for word, error, why in (
        (f"data.path={other}", RunError, "the images are not those"),
        (f"data.validation_path={other}", RunError, "the images are not those"),
        ("data.validation_path=null", RunError, "the images are not those"),
        ("seed=3", ConfigError, "only the places of its images can be given"),
        ("data.image_size=16", ConfigError, "only the places of its images can be given"),
    ):
        with pytest.raises(error, match=why):
            relocate(run, [word])
    assert run.config.read_bytes() == before


def as_packed_by_format_1(run: Run, path: str) -> Path:
    """Rename the packed images as the first format did, after a path as it was typed."""
    data = launch.load_config(run).data.model_copy(
        update={"path": path, "validation_path": None, "test_path": None}
    )
    settings = data.model_dump(include={"image_size", "channels", "fit"})
    key = json.dumps({**data.source.model_dump(mode="json"), **settings}, sort_keys=True)
    (now,) = run.directory.parent.glob("packed/folder-*")
    former = now.rename(now.parent / f"folder-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    facts = json.loads((former / FACTS).read_text())
    for part in facts["parts"].values():
        del part["blocks"], part["labels_sha256"]
    (former / FACTS).write_text(json.dumps({**facts, "format": 1}))
    return former


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose images were packed by a version that read fewer kinds of files."""
    place = tmp_path / "former"
    pictures(place / "pictures")
    monkeypatch.chdir(place)
    words = [*TINY, "data.path=pictures"]
    assert launch.train(compose(words), root=place / "runs") == 0
    run = find(next((place / "runs").glob("*/run.json")).parent)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / "pictures/more.gif")
    return run


@pytest.mark.parametrize("typed", ["pictures", "{home}/pictures"])
@pytest.mark.parametrize("kept", ["pictures", "{home}/pictures"])
def test_a_run_is_used_with_the_images_that_an_earlier_version_packed(
    former: Run, typed: str, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_packed_by_format_1(former, typed.format(home=home(former)))
    text = former.config.read_text()
    former.config.write_text(
        text.replace(f"{home(former)}/pictures", kept.format(home=home(former)))
    )
    found = seen(former)
    assert (found.packed.folder, found.per_epoch) == (folder, 11)
    assert "with the images that an earlier version packed" in capsys.readouterr().err
    assert (folder / FACTS).is_file()  # and it stays, beside those of the present version
    assert len(list(folder.parent.glob(f"*/{FACTS}"))) == 2


def test_damaged_images_of_an_earlier_version_are_not_used_and_the_reason_is_said(
    former: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = as_packed_by_format_1(former, "pictures") / "train/images.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    why = "this version reads other files or pixels than the one that packed them"
    with pytest.raises(RunError, match=why):
        seen(former)
    told = capsys.readouterr().err
    assert "is damaged (the digest of train differs)\n" in told


def test_each_format_packs_into_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = compose([*TINY, f"data.path={pictures(tmp_path / 'pictures')}"]).data
    now = images.packed_folder(data, tmp_path)
    monkeypatch.setattr(images, "FORMAT", images.FORMAT + 1)
    assert images.packed_folder(data, tmp_path) != now


def replace_one(folder: Path) -> None:
    """Put other pixels of equal length into a file whose contents are not sampled."""
    file = sorted(folder.iterdir())[1]
    facts = file.stat()
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(file)
    assert file.stat().st_size == facts.st_size
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_with_verify_a_replaced_image_is_found_when_a_process_begins_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "pictures", 70)
    data = compose([*TINY, f"data.path={folder}"]).data
    first = prepare(data, tmp_path).packed.fingerprint
    replace_one(folder)
    assert prepare(data, tmp_path, whole=True).packed.fingerprint == first
    data = data.model_copy(update={"verify": True})
    assert prepare(data, tmp_path).packed.fingerprint == first
    assert prepare(data, tmp_path, whole=True).packed.fingerprint != first
    assert "01.bmp: replaced since they were packed; packing again" in capsys.readouterr().err


def verify(folder: Path, root: Path) -> tuple[int, str]:
    words = ["data", "verify", str(folder), "data.image_size=8", "data.channels=1"]
    done = CliRunner().invoke(rediffuse, [*words, "--root", str(root)], standalone_mode=False)
    return int(done.return_value or 0), done.output


def test_data_verify_tells_whole_damaged_and_replaced_images_apart(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 70)
    data = compose([*TINY, f"data.path={folder}"]).data
    packed = prepare(data, tmp_path).packed.folder
    assert verify(folder, tmp_path)[0] == 0
    assert verify(packed, tmp_path) == (0, f"70 packed images are whole: {packed}\n")
    replace_one(folder)
    code, told = verify(folder, tmp_path)
    assert (code, told.splitlines()) == (1, [f"1 images are not those in {packed}:", "  01.bmp"])
    file = packed / "train/images.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for place in (folder, packed):
        code, told = verify(place, tmp_path)
        assert code == 1
        assert f"{packed} is damaged (the digest of train images 0 to 69 differs)" in told


def test_inspect_counts_what_it_leaves_out(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 3)
    for name in ("notes.txt", "other.txt", ".hidden"):
        (folder / name).write_text("")
    data = compose([*TINY, f"data.path={folder}"]).data
    told = images.describe(images.pack_as(data, tmp_path), images.source_of(data).left_out)
    assert told["left out"] == {"train": "2 .txt, 1 hidden"}


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.99])
def test_of_few_images_one_at_least_is_left_to_train_on(
    tmp_path: Path, count: int, fraction: float
) -> None:
    folder = pictures(tmp_path / "pictures", count)
    words = [*TINY, f"data.path={folder}", f"data.validation_fraction={fraction}"]
    found = prepare(compose(words).data, tmp_path)
    assert found.per_epoch >= 1
    assert found.per_epoch + len(found.held_out_rows) == count
    assert (len(found.held_out_rows) > 0) == (fraction > 0 and count > 1)


@pytest.mark.parametrize("batch", ["8", "auto"])
def test_a_model_can_be_trained_on_one_image(tmp_path: Path, batch: str) -> None:
    folder = pictures(tmp_path / "pictures", 1)
    words = [*TINY, f"data.path={folder}", f"training.batch_size={batch}", "training.images=8"]
    assert launch.train(compose(words), root=tmp_path) == 0
    assert "FINISHED" in next(tmp_path.glob("*/run.json")).read_text()
