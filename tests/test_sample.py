"""Sampling needs the id and nothing else; image j is image j."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import TINY, content, rediffuse, run_id
from PIL import Image

from rediffuse import api, drawing, gallery, models, outputs, runs
from rediffuse.drawing import Job, batch_that_fits, classes_for, draw
from rediffuse.errors import CheckpointError, ConfigError, DataError, RunError
from rediffuse.gallery import Options, image_numbers, wanted
from rediffuse.models import load
from rediffuse.networks.replay import Replay
from rediffuse.pictures import columns_for, grid, save_png
from rediffuse.training import committed, memory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    return root, run_id(rediffuse("train", *TINY, "training.images=480", root=root))


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {f.name: np.asarray(Image.open(f)) for f in sorted(folder.glob("0*.png"))}


def test_from_elsewhere_a_prefix_of_the_id_is_enough(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    root, run = trained
    out = tmp_path / "out"
    words = ["--root", str(root), "--n", "12", "--film", "--output-dir", str(out)]
    done = rediffuse("sample", run[:6], *words, root=tmp_path)
    assert "12 images from average weights at step-00000010" in done.stdout
    assert len(pixels(out)) == 12
    with Image.open(out / "film.gif") as film:
        assert film.n_frames == 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["run"] == run
    assert [image["class"] for image in manifest["images"]] == [*"0123456789", "0", "1"]
    assert manifest["sampling"]["solver"]["name"] == "dpmpp_2m"
    assert manifest["sampling"]["steps"] == 3


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ancestral", "heun churn=10"])
def test_image_j_is_the_same_in_batches_of_64_7_and_1(
    trained: tuple[Path, str], tmp_path: Path, solver: str
) -> None:
    root, run = trained
    drawn = []
    for size in (64, 7, 1):
        out = tmp_path / f"{solver}-{size}"
        options = Options(
            root, seeds="0-63", batch_size=size, solver=solver, steps=2, output_dir=out
        )
        gallery.sample(run, options)
        drawn.append(pixels(out))
    few = tmp_path / "few"
    gallery.sample(run, Options(root, seeds="40,3", solver=solver, steps=2, output_dir=few))
    for other in drawn[1:]:
        assert all(np.array_equal(drawn[0][name], other[name]) for name in drawn[0])
    assert all(np.array_equal(drawn[0][name], image) for name, image in pixels(few).items())


def test_the_same_job_goes_into_its_folder_again_also_where_a_number_is_infinite(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    for _ in range(2):  # heun's churn goes up to infinity
        options = Options(trained[0], count=2, solver="heun", steps=2, output_dir=tmp_path / "out")
        assert gallery.sample(trained[1], options) == 0
    json.loads((tmp_path / "out" / "manifest.json").read_text(), parse_constant=pytest.fail)


def test_a_killed_job_goes_on_and_draws_what_is_missing(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    of_a_job = {"count": 24, "steps": 2, "class_name": "3"}
    gallery.sample(trained[1], Options(trained[0], output_dir=whole, **of_a_job))
    with monkeypatch.context() as patched:
        patched.setattr(gallery, "save_png", dying_after(20))
        with pytest.raises(KeyboardInterrupt):
            gallery.sample(trained[1], Options(trained[0], output_dir=cut, **of_a_job))
    (cut / f".000021.png.{'0' * 32}").write_bytes(b"torn")
    assert not (cut / "manifest.json").exists()
    before = {file.name: file.stat().st_mtime_ns for file in cut.glob("0*.png")}
    assert len(before) == 20
    gallery.sample(trained[1], Options(trained[0], output_dir=cut, **of_a_job))
    assert content(cut) == content(whole)
    assert not list(cut.glob(".0*")) + list(cut.glob(".job*"))
    assert all((cut / name).stat().st_mtime_ns == at for name, at in before.items())


def test_a_given_picture_that_has_changed_is_drawn_from_anew(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    out, given = tmp_path / "out", tmp_path / "given.png"
    for level, strength in ((0, 0.1), (255, 0.1)):
        Image.new("L", (8, 8), level).save(given)
        asked = Options(
            trained[0], count=1, steps=2, output_dir=out, inputs=given, strength=strength
        )
        gallery.sample(trained[1], asked)
    kept = np.asarray(Image.open(out / "000000.png")).mean()
    (out / "000000.png").unlink()
    gallery.sample(trained[1], asked)
    assert np.asarray(Image.open(out / "000000.png")).mean() == kept


def dying_after(count: int) -> Callable[..., Path]:
    """`save_png` for so many files."""
    files: list[Path] = []

    def save(pixels: np.ndarray, file: Path, *facts: object) -> Path:
        if len(files) == count:
            raise KeyboardInterrupt
        files.append(save_png(pixels, file, *facts))
        return file

    return save


def test_another_job_never_writes_into_a_folder_not_even_of_a_killed_one(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(gallery, "save_png", dying_after(1))
        with pytest.raises(KeyboardInterrupt):
            gallery.sample(trained[1], Options(trained[0], count=2, steps=2, output_dir=out))
    before = content(out)
    with pytest.raises(ConfigError, match="holds the images of another job"):
        gallery.sample(trained[1], Options(trained[0], count=2, steps=3, output_dir=out))
    assert content(out) == before


def test_two_jobs_never_write_into_a_folder_at_once(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "_LOCK_S", 0.0)
    out = tmp_path / "out"
    script = "import sys; from filelock import FileLock; l = FileLock(sys.argv[1]); l.acquire(); "
    script += "print('held', flush=True); sys.stdin.read()"
    out.mkdir()
    words = [sys.executable, "-c", script, str(out / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="in use by another process"):
            gallery.sample(trained[1], Options(trained[0], count=1, steps=1, output_dir=out))
        other.communicate()
    assert gallery.sample(trained[1], Options(trained[0], count=1, steps=1, output_dir=out)) == 0


@pytest.mark.parametrize("name", ["000000.png", "grid.png", "notes.txt"])
def test_files_that_are_no_jobs_are_never_overwritten(
    trained: tuple[Path, str], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "pictures"
    out.mkdir()
    Image.new("L", (8, 8)).save(out / name, "PNG")
    before = content(out)
    with pytest.raises(ConfigError, match="is not empty"):
        gallery.sample(trained[1], Options(trained[0], count=1, steps=1, output_dir=out))
    assert content(out) == before


def test_an_image_that_was_edited_since_is_never_overwritten(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    options = Options(trained[0], count=2, steps=1, output_dir=tmp_path / "out")
    gallery.sample(trained[1], options)
    edited = tmp_path / "out" / "000001.png"
    Image.new("L", (8, 8), 200).save(edited)
    before = edited.read_bytes()
    with pytest.raises(ConfigError, match=r"000001\.png is there and was not written"):
        gallery.sample(trained[1], options)
    assert edited.read_bytes() == before


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_png(np.zeros((8, 8, 1), np.uint8), tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "size"), [(10**12, 1024), (64 * 10**6, 32), (10 * 10**6, 4), (1, 1)]
)
def test_as_many_images_go_together_as_half_of_the_memory_holds(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, free: int, size: int
) -> None:
    model = load(trained[1], root=trained[0], device="cpu")
    monkeypatch.setattr(memory, "resident", lambda device: 0)
    monkeypatch.setattr(memory, "peak", lambda device: 8 * 10**6)  # a million bytes an image
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    job = Job(tuple(range(100)), classes_for(range(100), model.class_names))
    how = wanted(model.config.sampling, Options())
    assert batch_that_fits(model, how, job) == size
    monkeypatch.setattr(drawing, "_fixed_rows", lambda model: None)  # as on a GPU
    sizes = [len(numbers) for numbers, _ in draw(model, how, job)] if size > 1 else [1]
    assert sizes[0] == min(size, 100)


def test_what_fits_is_measured_on_the_bare_network(trained: tuple[Path, str]) -> None:
    """A network that is replayed takes no memory that anybody would see."""
    model = load(trained[1], root=trained[0], device="cpu")
    network = model.denoiser.network
    network.compile(backend="eager")
    replayed = replace(model, denoiser=replace(model.denoiser, network=Replay(network)))
    for either in (model, replayed):
        bare = drawing.uncompiled(either).denoiser.network
        assert type(bare) is type(network)
        assert bare._compiled_call_impl is None
        assert all(a is b for a, b in zip(bare.parameters(), network.parameters(), strict=True))
    assert network._compiled_call_impl is not None


@pytest.mark.parametrize(("whole", "sizes"), [(False, {16, 8}), (True, {16})])
def test_a_network_that_is_compiled_whole_meets_batches_of_one_size(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, whole: bool, sizes: set[int]
) -> None:
    model = load(trained[1], root=trained[0], device="cpu")
    monkeypatch.setattr(drawing, "_fixed_rows", lambda model: None)  # as on a GPU
    monkeypatch.setattr(drawing, "_whole", lambda model: whole)
    met = set()
    model.denoiser.network.register_forward_pre_hook(lambda module, given: met.add(len(given[0])))
    job = Job(tuple(range(20)), classes_for(range(20), model.class_names), batch_size=16)
    how = wanted(model.config.sampling, Options(steps=2, guidance="1"))
    drawn = [(len(numbers), len(pixels)) for numbers, pixels in draw(model, how, job)]
    assert drawn == [(16, 16), (4, 4)]
    assert met == sizes


def test_another_seed_another_class_and_other_weights_give_other_images(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    root, run = trained
    ways = {
        "plain": Options(root, count=8),
        "seed": Options(root, count=8, seed=1),
        "class": Options(root, count=8, class_name="3"),
        "raw": Options(root, count=8, weights="raw"),
        "guided": Options(root, count=8, guidance=3.0),
        "unconditional": Options(root, count=8, guidance=0.0),
    }
    seen = {}
    for name, options in ways.items():
        out = tmp_path / name
        gallery.sample(run, Options(**{**vars(options), "output_dir": out}))
        seen[name] = np.stack(list(pixels(out).values()))
    names = list(seen)
    for k, one in enumerate(names):
        for two in names[k + 1 :]:
            assert not np.array_equal(seen[one], seen[two]), (one, two)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (Options(class_name="cat"), ConfigError, "class 'cat': there is none; there are 0, 1"),
        (Options(checkpoint="99"), CheckpointError, "no checkpoint '99'; it has step-00000009"),
        (Options(solver="hoin"), ConfigError, "there is no solver 'hoin'"),
        (Options(solver="heun chrun=4"), ConfigError, "did you mean churn"),
        (Options(steps=2000), ConfigError, "2000 sampling steps"),
        (Options(seeds="3-"), ConfigError, "expected numbers and ranges"),
        (Options(seeds="5-3"), ConfigError, "names 0 images"),
        (Options(seeds="99999999999999999999"), ConfigError, "below 2.63"),
        (Options(count=10**11), ConfigError, "more than 10,000,000 images"),
        (Options(grid="karras rho=0"), ConfigError, "sampling.grid.rho: expected above 0"),
        (Options(guidance="thrice"), ConfigError, "there is no guidance 'thrice'"),
        (Options(guidance="nan"), ConfigError, "expected a finite number"),
        (Options(guide_by="7", guidance=2.0), CheckpointError, "no checkpoint '7'"),
        (Options(guide_by="abcdef:7", guidance=2.0), RunError, "no run 'abcdef'"),
        (Options(guide_by="9"), ConfigError, "--guide-by needs --guidance above 1"),
        (Options(strength=0.5), ConfigError, "--strength needs --input"),
        (Options(interpolate="0,10", seeds="3-5"), ConfigError, "use --n for how many"),
        (Options(jump=3), ConfigError, "are for inpainting; add --mask"),
        (Options(reconstruct=True, strength=0.5), ConfigError, "do not go together"),
        (Options(inputs=Path("/no/such.png")), DataError, r"/no/such\.png: there is no such file"),
        (Options(inputs=Path("/"), interpolate="1,2"), ConfigError, "leave --input away"),
        (Options(inputs=Path("/"), strength=1.5), ConfigError, "expected 0 .as given. to 1"),
        (Options(interpolate="1,2"), ConfigError, "of the classes 1 and 2; add --class"),
        (Options(interpolate="1,2,3"), ConfigError, "expected two numbers"),
    ],
)
def test_what_the_run_cannot_do_is_refused(
    trained: tuple[Path, str], options: Options, error: type[Exception], says: str, tmp_path: Path
) -> None:
    root, run = trained
    out = tmp_path / "out"
    with pytest.raises(error, match=says):
        gallery.sample(run, Options(**{**vars(options), "root": root, "output_dir": out}))
    assert not out.exists()


def given(trained: tuple[Path, str], folder: Path, **options: object) -> Path:
    """The folder that `rediffuse sample` fills."""
    root, run = trained
    gallery.sample(run, Options(root, steps=4, output_dir=folder, **options))  # type: ignore[arg-type]
    return folder


def test_interpolation_ends_on_the_plain_samples_whatever_the_solver(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    for solver in ("dpmpp_2m", "ancestral"):
        plain = pixels(given(trained, tmp_path / f"{solver}-a", seeds="3,13", solver=solver))
        way = pixels(
            given(trained, tmp_path / f"{solver}-b", interpolate="3,13", count=5, solver=solver)
        )
        assert np.array_equal(way["000000.png"], plain["000003.png"])
        assert np.array_equal(way["000004.png"], plain["000013.png"])
        assert len({image.tobytes() for image in way.values()}) == 5


def test_strength_goes_from_the_given_image_to_a_new_one(
    trained: tuple[Path, str], tmp_path: Path
) -> None:
    start = given(trained, tmp_path / "start", seeds="3") / "000003.png"
    more = {"inputs": start, "count": 2, "class_name": "3"}
    none = pixels(given(trained, tmp_path / "0", strength=0.0, **more))
    assert all(np.array_equal(image, np.asarray(Image.open(start))) for image in none.values())
    new = pixels(given(trained, tmp_path / "1", strength=1.0, **more))
    plain = pixels(given(trained, tmp_path / "plain", count=2, class_name="3"))
    assert all(np.array_equal(new[name], plain[name]) for name in plain)
    half = pixels(given(trained, tmp_path / "half", strength=0.5, **more))
    assert not np.array_equal(half["000000.png"], half["000001.png"])


@pytest.mark.parametrize("again", [1, 3])
def test_inpainting_keeps_every_pixel_that_the_mask_leaves_black(
    trained: tuple[Path, str], tmp_path: Path, again: int
) -> None:
    start = given(trained, tmp_path / "start", seeds="3") / "000003.png"
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    painted = pixels(
        given(
            trained,
            tmp_path / "out",
            inputs=start,
            mask=tmp_path / "mask.png",
            count=3,
            resamplings=again,
        )
    )
    before = np.asarray(Image.open(start))
    for image in painted.values():
        assert np.array_equal(image[:, :4], before[:, :4])
    assert len({image[:, 4:].tobytes() for image in painted.values()}) == 3


def test_reconstruction_walks_to_noise_and_back(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = given(trained, tmp_path / "start", count=4)
    (start / "grid.png").unlink()
    (start / "._000000.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")  # AppleDouble
    root, run = trained
    out = tmp_path / "out"
    gallery.sample(run, Options(root, inputs=start, reconstruct=True, steps=100, output_dir=out))
    assert min(json.loads((out / "manifest.json").read_text())["psnr_db"]) >= 30
    assert "PSNR" in capsys.readouterr().out


def test_a_weaker_checkpoint_guides(trained: tuple[Path, str], tmp_path: Path) -> None:
    plain = pixels(given(trained, tmp_path / "plain", count=2))
    itself = pixels(given(trained, tmp_path / "10", count=2, guide_by="10", guidance=3.0))
    weaker = pixels(given(trained, tmp_path / "9", count=2, guide_by="9", guidance=3.0))
    assert np.abs(itself["000000.png"].astype(int) - plain["000000.png"]).max() <= 1  # rounding
    assert not np.array_equal(weaker["000000.png"], plain["000000.png"])


def test_python_does_what_the_command_line_does(trained: tuple[Path, str], tmp_path: Path) -> None:
    import rediffuse as library

    root, run = trained
    drawn = pixels(given(trained, tmp_path / "cli", count=3, solver="unipc order=2", guidance=2.0))
    model = library.load(run[:8], root=root)
    array = library.sample(model, 3, solver="unipc order=2", steps=4, guidance=2.0)
    assert all(np.array_equal(array[j, 0], image) for j, image in enumerate(drawn.values()))
    by_path = library.load(root / run)
    assert np.array_equal(
        library.sample(by_path, [2], solver="unipc order=2", steps=4, guidance=2.0), array[2:]
    )
    file = library.generate_samples(run, num_images=9, output_path=tmp_path / "g.png", root=root)
    assert np.asarray(Image.open(file)).shape == (3 * 32 + 2 * 2, 3 * 32 + 2 * 2)
    x_t = torch.randn(2, 1, 8, 8)
    predicted = model.denoiser(x_t, torch.tensor(500.0).double(), torch.tensor([1, 2]))
    assert predicted.x_0.shape == x_t.shape
    with pytest.raises(ConfigError, match="weights=mean: expected average or raw"):
        library.load(run, root=root, weights="mean")


@pytest.mark.parametrize("moment", ["_check_size", "load_weights", "digest_of_weights", "facts"])
def test_a_checkpoint_that_retention_removes_while_it_is_read_gives_way_to_the_next(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = runs.Run(shutil.copytree(trained[0] / trained[1], tmp_path / trained[1]))
    *older, newest = committed.checkpoints(run.checkpoints)
    for each in older:
        shutil.rmtree(each)
    place = next(
        module for module in (models, committed, models.checkpoint) if moment in vars(module)
    )
    plain = getattr(place, moment)

    def late(*given: Any, **more: Any) -> Any:
        if newest.exists():  # the run commits another one, and removes this
            newest.rename(newest.with_name("step-00000099"))
        return plain(*given, **more)

    monkeypatch.setattr(place, moment, late)
    model = load(run.directory)
    assert model.origin
    assert model.origin["checkpoint"] == "step-00000099"


def test_numbers_of_images_may_be_ranges_and_numpys(trained: tuple[Path, str]) -> None:
    model = load(trained[1], root=trained[0])
    expected = api.sample(model, 3, steps=1)
    for images in (np.int64(3), range(3), np.arange(3), (j for j in [0, 1, 2])):
        found = api.sample(model, images, steps=np.int32(1), seed=np.uint8(0))
        assert np.array_equal(found, expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"images": "3"}, "images='3': expected a whole number"),
        ({"images": 2.0}, r"images=2\.0: expected a whole number"),
        ({"images": True}, "images=True: expected a whole number"),
        ({"images": [0, 1.5]}, r"images=1\.5: expected a whole number"),
        ({"images": np.zeros((2, 2), int)}, "expected a whole number"),
        ({"images": []}, "expected 1 or more"),
        ({"images": [-1]}, "images=-1: expected a whole number from 0"),
        ({"images": 0}, "images=0: expected a whole number from 1"),
        ({"seed": 2**32}, "seed=4294967296: expected a whole number from 0 to 4294967295"),
        ({"seed": "x"}, "seed='x': expected a whole number"),
        ({"steps": 2.5}, r"steps=2\.5: expected a whole number"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number from 1"),
        ({"solver": 3}, "solver=3: expected a name"),
        ({"class_name": 3}, "class_name=3: expected a name"),
        ({"guidance": [2]}, r"guidance=\[2\]: expected a number"),
        ({"guidance": float("nan")}, "expected a finite number"),
        ({"way": "varied"}, "way='varied': expected one of rediffuse.drawing"),
        ({"model": "3f2a91"}, "sample draws from a model, not from str"),
    ],
)
def test_an_argument_of_another_kind_is_refused_in_words(
    trained: tuple[Path, str], wrong: dict[str, object], says: str
) -> None:
    given = {"model": load(trained[1], root=trained[0]), "steps": 1, **wrong}
    with pytest.raises(ConfigError, match=says):
        api.sample(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.JPEG", "JPEG")]
)
def test_a_picture_is_what_its_name_says(
    trained: tuple[Path, str], tmp_path: Path, name: str, kind: str
) -> None:
    for images in (1, [2, 3]):  # what an earlier call wrote may be replaced
        file = api.generate_samples(
            trained[1], images, tmp_path / "new" / name, root=trained[0], steps=1
        )
        with Image.open(file) as picture:
            assert picture.format == kind
    assert [one.name for one in file.parent.iterdir()] == [name]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("x.tiff", "expected a name that ends in .png, .jpg, .jpeg"),
        ("x", "expected a name that ends in"),
        ("", "expected the path of a picture"),
        (3, "output_path=3: expected the path of a picture"),
        ("mine.png", "is there and was not written by rediffuse"),
        ("mine.jpg", "is there and was not written by rediffuse"),
        ("folder.png", "is there and was not written by rediffuse"),
        ("mine.png/x.png", "cannot be written"),
    ],
)
def test_a_picture_goes_to_no_place_of_anothers(
    trained: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for name in ("mine.png", "mine.jpg"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=says):
        api.generate_samples(trained[1], 1, path, root=trained[0], steps=1)
    assert content(tmp_path) == before


def test_a_finished_run_says_so_and_fixed_keys_are_refused_with_both_values(
    trained: tuple[Path, str],
) -> None:
    root, run = trained
    before = sorted((root / run).rglob("*"))
    done = rediffuse("resume", run[:8], root=root)
    assert f"run {run} is finished at 480 images; nothing to do" in done.stdout
    assert sorted((root / run).rglob("*")) == before
    refused = rediffuse("resume", run[:8], "model.base_channels=32", root=root, check=2)
    assert "model.base_channels is 16 in this run and cannot become 32" in refused.stderr
    refused = rediffuse("resume", run[:8], "target=eps", root=root, check=2)
    assert "target is 'v' in this run and cannot become 'eps'" in refused.stderr
    assert runs.status_now(runs.find_run(root, run)) == "FINISHED"


def test_numbers_of_images_are_read_as_people_write_them() -> None:
    assert image_numbers(None, 3) == (0, 1, 2)
    assert image_numbers("0-2, 7", None) == (0, 1, 2, 7)
    assert len(image_numbers(None, None)) == 64


def test_a_grid_holds_every_image_in_its_place() -> None:
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((6, 3, 2, 2), np.uint8)
    canvas = grid(images, columns=4, gap=1, least=2)
    assert canvas.shape == (5, 11, 3)
    assert [int(canvas[0, x, 0]) for x in (0, 3, 6, 9)] == [0, 1, 2, 3]
    assert [int(canvas[3, x, 0]) for x in (0, 3)] == [4, 5]
    assert (canvas[2] == 255).all()
    assert columns_for(40, tuple("0123456789")) == 10
    assert columns_for(9, ()) == 3
