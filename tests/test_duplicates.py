"""What is there more than once is found, whatever was done to it, and what is not is left alone."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import rediffuse
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from rediffuse import duplicates as door
from rediffuse.config.compose import compose
from rediffuse.errors import DataError
from rediffuse.evaluation import duplicates
from rediffuse.evaluation.duplicates import SHIFT, find
from rediffuse.randomness import Stream, normal

Array = np.ndarray


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """300 smooth colour fields of 32x32 pixels."""
    coarse = normal(0, Stream.EVALUATION, torch.arange(300), (3, 6, 6)).float()
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bicubic")
    fine = normal(1, Stream.EVALUATION, torch.arange(300), (3, 32, 32)).float()
    return (128 + 50 * smooth + 6 * fine).round().clamp(0, 255).byte()


def jpeg(image: Tensor, quality: int = 80) -> Tensor:
    with io.BytesIO() as file:
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(
            file, "JPEG", quality=quality
        )
        back = np.array(Image.open(file))
    return torch.from_numpy(back.reshape(*back.shape[:2], -1)).permute(2, 0, 1)


def brighter(image: Tensor, by: int = 8) -> Tensor:
    return (image.short() + by).clamp(0, 255).byte()


WAYS = {
    "same": lambda image: image,
    "brighter": brighter,
    "darker": lambda image: brighter(image, -8),
    "jpeg": jpeg,
    "both": lambda image: jpeg(brighter(image)),
    "mirrored": lambda image: image.flip(-1),
    "mirrored jpeg": lambda image: jpeg(image.flip(-1)),
}


def test_what_brightness_cuts_off_does_not_hide_a_copy() -> None:
    wave = 160 + 40 * torch.sin(torch.arange(32) / 6)
    image = wave.round().byte().expand(1, 32, 32).clone()
    image[:, :16] = 255  # as bright as can be before and after
    assert len(find(torch.stack((image, brighter(image, SHIFT)))).groups) == 1


@pytest.mark.parametrize("way", WAYS)
def test_every_planted_duplicate_is_found_and_nothing_else(photos: Tensor, way: str) -> None:
    rows = range(0, 300, 10)
    planted = torch.stack([WAYS[way](photos[row]) for row in rows])
    found = find(torch.cat((photos, planted)))
    assert {group.rows for group in found.groups} == {(row, 300 + k) for k, row in enumerate(rows)}
    assert found.expected_false < 0.5
    kind = "mirrored" if "mirrored" in way else "same" if way == "same" else "near"
    assert {group.kind for group in found.groups} <= {kind, "near"}


def test_planted_digits_of_8_by_8_pixels_are_found_with_few_false_ones() -> None:
    images = load_digits().images
    digits = torch.from_numpy((images * (255 / 16)).round().astype(np.uint8))[:, None]
    planted = torch.stack([WAYS[way](digits[k]) for k in range(0, 700, 7) for way in ("both",)])
    found = find(torch.cat((digits, planted)), mirrored=False)
    pairs = {(7 * k, len(digits) + k) for k in range(100)}
    together = {row: k for k, group in enumerate(found.groups) for row in group.rows}
    assert all(together.get(a, -1) == together.get(b, -2) for a, b in pairs)
    false = sum(not {*group.rows} & {b for _, b in pairs} for group in found.groups)
    assert false <= 3


def test_groups_are_connected_components(photos: Tensor) -> None:
    chain = torch.stack([photos[0], brighter(photos[0], 9), brighter(photos[0], 9), photos[5]])
    groups = find(torch.cat((photos[:10], chain))).groups
    assert [group.rows for group in groups] == [(0, 10, 11, 12), (5, 13)]
    assert [group.kind for group in groups] == ["near", "same"]


def test_mirror_images_can_be_left_alone(photos: Tensor) -> None:
    both = torch.cat((photos[:20], photos[:20].flip(-1)))
    assert len(find(both).groups) == 20
    assert not find(both, mirrored=False).groups


def test_flat_images_of_one_colour_are_one_group_and_transparency_counts() -> None:
    flat = torch.full((3, 4, 16, 16), 200, dtype=torch.uint8)
    flat[2, 3, :8] = 0  # another shape of the same colour
    assert [group.rows for group in find(flat).groups] == [(0, 1)]


def test_what_is_expected_by_chance_is_what_chance_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Points in few dimensions, of which a known share has a neighbour within the tolerance."""
    z = normal(0, Stream.EVALUATION, torch.arange(4000), (6,)).float()
    up = normal(1, Stream.EVALUATION, torch.arange(6), (64,)).float() / 8
    pixels = (128 + 40 * z @ up).round().clamp(0, 255).byte().view(-1, 1, 8, 8)
    tolerance = torch.full((4000,), 1.5).double()
    monkeypatch.setattr(duplicates, "altered", lambda images: tolerance / duplicates._MARGIN)
    found = find(pixels, mirrored=False)
    in_groups = sum(len(group.rows) for group in found.groups)
    assert 20 < in_groups < 1000
    assert in_groups / 2 < found.expected_false < 2 * in_groups


@pytest.fixture(scope="module")
def folder(photos: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("photos")
    planted = {
        "copy of 3": photos[3],
        "mirror of 7": photos[7].flip(-1),
        "jpeg of 9": jpeg(photos[9]),
    }
    for part, images in (("train", photos[:40]), ("test", photos[200:210])):
        (home / part).mkdir()
        for k, image in enumerate(images):
            save(image, home / part / f"{k:03d}.png")
    for name, image in planted.items():
        save(image, home / ("train" if "9" not in name else "test") / f"{name}.png")
    return home


def save(image: Tensor, file: Path) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def test_the_command_names_files_and_leaks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "train"), f"data.test_path={folder / 'test'}", "data.image_size=32"]
    done = rediffuse("data", "duplicates", *words, "--json", root=tmp_path)
    facts = json.loads(done.stdout)
    named = {tuple(image["name"] for image in group["images"]) for group in facts["groups"]}
    assert named == {
        ("003.png", "copy of 3.png"),
        ("007.png", "mirror of 7.png"),
        ("009.png", "jpeg of 9.png"),
    }
    assert facts["leaks"] >= 1
    assert Path(facts["folder"], "groups.png").is_file()
    data = compose(["data=folder", f"data.path={words[0]}", *words[1:]]).data
    door.duplicates(data, tmp_path, None)
    told = capsys.readouterr().out
    assert "53 images, 6 of them in 3 groups" in told
    assert "copy of 3.png" in told
    assert max(map(len, (line for line in told.splitlines() if "/" not in line))) <= 80


def test_a_data_set_without_duplicates_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = compose(["data=folder", f"data.path={folder / 'test'}", "data.image_size=32"]).data
    door.duplicates(data, tmp_path, tmp_path / "out")
    assert "11 images, 0 of them in 0 groups" in capsys.readouterr().out
    assert (tmp_path / "out" / "groups.png").is_file()


def test_what_cannot_be_read_or_written_is_refused(folder: Path, tmp_path: Path) -> None:
    for path, out in ((tmp_path / "nowhere", None), (folder / "test", folder / "test" / "000.png")):
        data = compose(["data=folder", f"data.path={path}", "data.image_size=32"]).data
        with pytest.raises(DataError):
            door.duplicates(data, tmp_path, out)


@pytest.mark.parametrize("theirs", ["report.json", "groups.png"])
def test_files_of_something_else_are_not_replaced(
    folder: Path, tmp_path: Path, theirs: str
) -> None:
    data = compose(["data=folder", f"data.path={folder}", "data.image_size=8"]).data
    out = tmp_path / "out"
    out.mkdir()
    (out / theirs).write_text('{"precious": 1}')
    with pytest.raises(DataError, match=r"of something else; name another --output-dir"):
        door.duplicates(data, tmp_path, out)
    assert (out / theirs).read_text() == '{"precious": 1}'
    (out / theirs).unlink()
    for _ in range(2):  # its own files are replaced
        assert door.duplicates(data, tmp_path, out) == 0
