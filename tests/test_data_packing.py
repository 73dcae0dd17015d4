"""A source is decoded once; what lies on the disk is whole, and the same however it was made."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from rediffuse.data import packing
from rediffuse.data.ahead import ahead
from rediffuse.data.decoding import KINDS, to_square
from rediffuse.data.packing import FACTS, differing, open_packed, pack, verify
from rediffuse.data.sources import ArrayExamples, Example, LateSource, Source
from rediffuse.data.sources.folder import folder
from rediffuse.data.splits import split
from rediffuse.errors import DataError

AS = {"image_size": 8, "channels": 3}


def noise(count, size=10, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def source(count=150, seed=0, identity="noise"):
    labels = np.arange(count) % 3
    parts = {"train": ArrayExamples(noise(count, seed=seed), labels, "train")}
    parts["test"] = ArrayExamples(noise(5, seed=seed + 1), labels[:5], "test")
    return Source(("a", "b", "c"), parts, identity)


class Unlabelled(list):
    def __getitem__(self, row):
        return Example(Image.fromarray(super().__getitem__(row)), None, str(row))


def save(place, *names):
    for seed, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(1, seed=seed)[0]).save(place / name)
    return place


def refuse_to_decode(image, **how):
    raise AssertionError("decoded again")


def test_the_arrays_hold_every_image_in_order_with_its_label(tmp_path):
    packed = pack(source(), tmp_path / "packed", **AS)
    images, labels = packed.part("train").images, packed.part("train").labels
    expected = [to_square(Image.fromarray(image), 8, 3) for image in noise(150)]
    assert np.array_equal(images, expected)
    assert np.array_equal(labels, np.arange(150) % 3)
    assert isinstance(images, np.memmap)
    assert images.flags.c_contiguous
    assert not images.flags.writeable
    assert (packed.class_names, packed.image_size, packed.channels) == (("a", "b", "c"), 8, 3)
    assert packed.facts["parts"]["train"]["per_class"] == {"a": 50, "b": 50, "c": 50}


def test_the_fingerprint_depends_on_content_alone(tmp_path):
    first = pack(source(), tmp_path / "1", **AS, workers=1).fingerprint
    assert pack(source(identity="elsewhere"), tmp_path / "2", **AS, workers=2).fingerprint == first
    renamed = Source(("a", "b", "d"), source().parts, "noise")
    relabelled = source()
    relabelled.parts["train"].labels[7] += 1
    others = [source(seed=5), source(149), renamed, relabelled]
    found = {pack(s, tmp_path / f"{k}-", **AS).fingerprint for k, s in enumerate(others)}
    assert len(found | {first}) == 5


def test_equal_bytes_in_another_shape_have_another_fingerprint(tmp_path):
    white = np.full((2, 16, 16), 255, np.uint8)
    images = Source((), {"train": Unlabelled(white)}, "white")
    grey = pack(images, tmp_path / "grey", image_size=16, channels=1)
    rgba = pack(images, tmp_path / "rgba", image_size=8, channels=4)
    assert grey.part("train").images.tobytes() == rgba.part("train").images.tobytes()
    assert grey.fingerprint != rgba.fingerprint


def test_times_of_change_move_the_identity_but_not_the_fingerprint(tmp_path):
    save(tmp_path / "images", "a/1.png", "b/2.png")
    first = pack(folder(path=tmp_path / "images"), tmp_path / "packed", **AS)
    os.utime(tmp_path / "images" / "a" / "1.png", ns=(1, 1))
    again = pack(folder(path=tmp_path / "images"), tmp_path / "packed", **AS)
    assert again.facts["identity"] != first.facts["identity"]
    assert again.fingerprint == first.fingerprint


def test_what_is_packed_is_used_again_unless_files_or_settings_change(tmp_path, monkeypatch):
    place = tmp_path / "packed"
    pack(source(), place, **AS)
    with monkeypatch.context() as patched:
        patched.setattr("rediffuse.data.packing.to_square", refuse_to_decode)
        assert pack(source(), place, **AS).image_size == 8
        for images, how in ((source(identity="changed"), AS), (source(), {**AS, "fit": "pad"})):
            with pytest.raises(AssertionError, match="decoded again"):
                pack(images, place, **how)
        assert pack(source(), place, **AS).image_size == 8  # what failed has replaced nothing
    assert pack(source(), place, image_size=6, channels=1).part("test").images.shape == (5, 1, 6, 6)
    assert sorted(os.listdir(tmp_path)) == [".packed.lock", "packed"]


def test_a_source_that_is_packed_is_not_read(tmp_path):
    first = pack(source(), tmp_path / "packed", **AS)
    unread = LateSource("noise", lambda: pytest.fail("read"))
    assert pack(unread, tmp_path / "packed", **AS).fingerprint == first.fingerprint
    read = LateSource("noise", lambda: (source().class_names, source().parts))
    assert pack(read, tmp_path / "elsewhere", **AS).fingerprint == first.fingerprint
    unreadable = LateSource("lost", lambda: (tmp_path / "lost.npy").read_bytes())
    with pytest.raises(DataError, match=r"images cannot be read: .*lost\.npy"):
        pack(unreadable, tmp_path / "packed", **AS)
    assert open_packed(tmp_path / "packed").fingerprint == first.fingerprint


def test_broken_images_are_named_and_refused_or_left_out_and_recorded(tmp_path):
    images = save(tmp_path / "images", *(f"{c}/{k}.png" for c in "ab" for k in range(70)))
    (images / "a" / "3.png").write_bytes(b"")
    (images / "b" / "9.png").unlink()
    os.mkfifo(images / "b" / "9.png")
    with pytest.raises(DataError, match=r"a/3\.png cannot be used"):
        pack(folder(path=images), tmp_path / "packed", **AS)
    assert not (tmp_path / "packed").exists()

    packed = pack(folder(path=images, on_broken="skip"), tmp_path / "packed", **AS)
    kept, facts = packed.part("train"), packed.facts["parts"]["train"]
    assert facts["skipped"] == [
        {"name": "a/3.png", "reason": f"it is not a {KINDS} image"},
        {"name": "b/9.png", "reason": "it is not a regular file"},
    ]
    assert facts["per_class"] == {"a": 69, "b": 69}
    whole = [
        e
        for e in map(folder(path=images, on_broken="skip").parts["train"].__getitem__, range(140))
        if isinstance(e, Example)
    ]
    assert np.array_equal(kept.images, [to_square(e.image, 8, 3) for e in whole])
    assert kept.labels.tolist() == [e.label for e in whole]


def test_processes_pack_what_threads_pack_and_refuse_what_they_refuse(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(600):  # three chunks
        home = tmp_path / "images" / f"class {number % 3}"
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / f"{number:03}.png")
    images = tmp_path / "images"
    threads = pack(folder(path=images), tmp_path / "threads", workers=2, **AS)
    monkeypatch.setattr(packing, "_WORTH_PROCESSES", 1)
    processes = pack(folder(path=images), tmp_path / "processes", workers=2, **AS)
    assert processes.fingerprint == threads.fingerprint
    (images / "class 1" / "301.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"301\.png cannot be used"):
        pack(folder(path=images), tmp_path / "refused", workers=2, **AS)
    left = pack(folder(path=images, on_broken="skip"), tmp_path / "left", workers=2, **AS)
    assert [broken["name"] for broken in left.facts["parts"]["train"]["skipped"]] == [
        "class 1/301.png"
    ]


def test_a_part_without_any_usable_image_is_refused(tmp_path):
    images = save(tmp_path / "images", "a.png")
    (images / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="train part has no image"):
        pack(folder(path=images, on_broken="skip"), tmp_path / "packed", **AS)


def test_images_without_classes_have_no_labels(tmp_path):
    packed = pack(folder(path=save(tmp_path / "images", "a.png")), tmp_path / "packed", **AS)
    assert packed.part("train").labels is None
    assert np.load(tmp_path / "packed" / "train" / "labels.npy").tolist() == [-1]


def test_a_class_that_is_not_there_is_refused(tmp_path):
    beyond = Source(("a", "b"), source().parts, "noise")
    with pytest.raises(DataError, match="train/2 has class 2, but there are 2 classes"):
        pack(beyond, tmp_path / "packed", **AS)


@pytest.mark.parametrize("name", ["letter.txt", FACTS + ".bak"])
def test_a_folder_that_holds_something_else_is_never_touched(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    with pytest.raises(DataError, match="holds something else than packed images"):
        pack(source(), tmp_path / "mine", **AS)
    assert (tmp_path / "mine" / name).read_text() == "precious"


def test_a_pack_that_is_killed_leaves_nothing_half_made_and_the_next_one_works(tmp_path):
    program = """
import os, signal, sys
from rediffuse.data import packing
from test_data_packing import AS, source
def killed(*_): os.kill(os.getpid(), signal.SIGKILL)
packing._fingerprint = killed  # all pixels are written, the facts are not
packing.pack(source(), sys.argv[1], **AS)
"""
    place = tmp_path / "packed"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    killed = subprocess.run([sys.executable, "-c", program, place], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not place.exists()
    (left,) = tmp_path.glob(".packed.building-*")
    assert (left / "train" / "images.npy").exists()
    theirs = [tmp_path / ".packed.building", tmp_path / ".packed.old-mine"]
    for other in theirs:  # with names like ours, and without our mark
        (other / "train").mkdir(parents=True)
        (other / "train" / "images.npy").write_text("precious")
    pack(source(), place, **AS)
    found = sorted(os.listdir(tmp_path))
    assert found == [".packed.building", ".packed.lock", ".packed.old-mine", "packed"]
    assert all((other / "train" / "images.npy").read_text() == "precious" for other in theirs)


@pytest.mark.parametrize("theirs", ["notes.txt", "train/notes.txt", "validation"])
def test_packed_images_with_other_files_among_them_are_not_replaced(tmp_path, theirs):
    place = tmp_path / "packed"
    pack(source(), place, **AS)
    (place / theirs).write_text("precious")
    with pytest.raises(DataError, match="holds something else than packed images"):
        pack(source(identity="changed"), place, **AS)
    assert (place / theirs).read_text() == "precious"


def test_what_several_want_at_once_is_packed_once(tmp_path, monkeypatch):
    calls, real = [], to_square
    monkeypatch.setattr(
        "rediffuse.data.packing.to_square",
        lambda image, **how: calls.append(1) or real(image, **how),
    )
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pack(source(), tmp_path / "packed", **AS), range(4)))
    assert len(calls) == 155
    assert len({packed.fingerprint for packed in found}) == 1


SMALL_BLOCKS = {"_BLOCK_BYTES": 3 * 8 * 8 * 2, "_SAMPLED_BLOCKS": 3}  # 2 images, of 150


def flip_a_bit(place, part, row):
    file = place / part / "images.npy"
    with file.open("r+b") as out:
        out.seek(-(len(np.load(file)) - row) * 3 * 8 * 8, os.SEEK_END)
        byte = out.read(1)
        out.seek(-1, os.SEEK_CUR)
        out.write(bytes([byte[0] ^ 1]))


def test_every_block_has_a_digest_and_a_part_of_them_is_verified_on_opening(tmp_path, monkeypatch):
    for name, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(packing, name, value)
    place = tmp_path / "packed"
    pack(source(149), place, **AS)
    verify(open_packed(place))
    for row in (0, 148):  # first and last blocks are verified always, others by chance
        flip_a_bit(place, "train", row)
        with pytest.raises(DataError, match=f"train images {row - row % 2} to .* differs"):
            open_packed(place)
        flip_a_bit(place, "train", row)
    packed = open_packed(place)
    for row in range(149):
        flip_a_bit(place, "train", row)
        with pytest.raises(DataError, match=f"train images {row - row % 2} to .* differs"):
            verify(packed)
        flip_a_bit(place, "train", row)
    verify(packed)
    flip_a_bit(place, "train", 70)
    found = [refuses(open_packed, place) for _ in range(300)]
    assert 0 < sum(found) < 300  # a third block is chosen anew at each opening


def refuses(function, *given):
    try:
        function(*given)
    except DataError:
        return True
    return False


def to_format_1(place):
    """Rewrite the facts as format 1 had them: one digest per part, none of labels or blocks."""
    facts = json.loads((place / FACTS).read_text())
    facts["format"] = 1
    for part in facts["parts"].values():
        del part["blocks"], part["labels_sha256"]
    (place / FACTS).write_text(json.dumps(facts))


@pytest.mark.parametrize("damaged", [None, "images", "labels"])
def test_a_folder_of_format_1_opens_and_is_verified_by_the_digest_of_each_part(tmp_path, damaged):
    place = tmp_path / "packed"
    first = pack(source(), place, **AS)
    to_format_1(place)
    packed = open_packed(place)
    assert packed.fingerprint == first.fingerprint
    verify(packed)
    if damaged == "images":
        flip_a_bit(place, "test", 3)
    elif damaged == "labels":
        np.save(place / "test/labels.npy", np.zeros(5, np.int64))
    if damaged:
        with pytest.raises(DataError, match=r"is damaged \(the digest of test differs\)"):
            verify(open_packed(place))


def test_a_folder_of_format_2_without_digests_of_blocks_is_damaged(tmp_path):
    place = tmp_path / "packed"
    pack(source(), place, **AS)
    to_format_1(place)
    facts = json.loads((place / FACTS).read_text())
    (place / FACTS).write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(DataError, match=r"is damaged \('blocks'\)"):
        open_packed(place)


def test_a_fingerprint_that_is_not_that_of_the_parts_is_damage(tmp_path):
    place = tmp_path / "packed"
    pack(source(), place, **AS)
    facts = json.loads((place / FACTS).read_text())
    (place / FACTS).write_text(json.dumps({**facts, "fingerprint": "0" * 64}))
    with pytest.raises(DataError, match="the fingerprint is not that of the parts"):
        verify(open_packed(place))


def test_the_old_folder_is_put_back_where_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    place = tmp_path / "packed"
    first = pack(source(), place, **AS)
    real = Path.rename

    def failing(path, target):
        if "building" in path.name:
            raise PermissionError("no renaming")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DataError, match="no renaming"):
        pack(source(seed=9, identity="changed"), place, **AS)
    assert open_packed(place).fingerprint == first.fingerprint
    assert sorted(os.listdir(tmp_path)) == [".packed.lock", "packed"]
    assert sorted(os.listdir(place)) == [FACTS, "test", "train"]


@pytest.mark.parametrize("lost", ["train/images.npy", "train/labels.npy", "test/images.npy"])
@pytest.mark.parametrize("whole", [False, True])
def test_pages_that_a_power_cut_left_as_zeros_are_noticed_and_packed_again(
    tmp_path, capsys, lost, whole
):
    place = tmp_path / "packed"
    first = pack(source(), place, **AS)
    file = place / lost
    header = 128
    file.write_bytes(file.read_bytes()[:header] + bytes(file.stat().st_size - header))
    with pytest.raises(DataError, match=r"packed is damaged \(the digest of .* differs\)"):
        open_packed(place)
    assert pack(source(), place, **AS, whole=whole).fingerprint == first.fingerprint
    assert "differs); packing again" in capsys.readouterr().err
    verify(open_packed(place))


def test_what_is_written_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle):
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(old, new):
        calls.append(f"-> {Path(new).name}")
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    pack(source(), tmp_path / "packed", **AS)
    before, after = calls[: (at := calls.index("-> packed"))], calls[at + 1 :]
    parts = ["images.npy", "labels.npy", "train", "images.npy", "labels.npy", "test"]
    assert before[:7] == [*parts, "facts.json"]
    assert before[7].startswith(".packed.building-")
    assert after == [tmp_path.name]


def test_images_of_equal_names_sizes_and_times_are_told_apart(tmp_path):
    images = save(tmp_path / "images", *(f"{k:03}.bmp" for k in range(100)))
    place = tmp_path / "packed"
    first = pack(folder(path=images), place, **AS)
    assert differing(folder(path=images), first) == []
    replace_in_place(images, [37])  # one of 100, and not among those whose contents are sampled
    packed = pack(folder(path=images), place, **AS)
    assert differing(folder(path=images), packed) == ["037.bmp"]
    assert pack(folder(path=images), place, **AS, again=True).fingerprint != first.fingerprint
    replace_in_place(images, range(100))
    assert pack(folder(path=images), place, **AS).fingerprint != packed.fingerprint


def replace_in_place(images, numbers):
    """Put other pixels of equal length into files, and set their times back."""
    for number in numbers:
        file = images / f"{number:03}.bmp"
        facts = file.stat()
        Image.fromarray(noise(1, seed=1000 + number)[0]).save(file)
        assert file.stat().st_size == facts.st_size
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    images = save(tmp_path / "images", "a/0.png", "b/0.png", "b/1.png")
    for file in (images / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no image of the class 'b' can be used"):
        pack(folder(path=images, on_broken="skip"), tmp_path / "packed", **AS)


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    images = save(tmp_path / "images", "a/0.png", "a/._0.png", "@eaDir/0.png")
    (images / "a" / "notes.txt").write_text("")
    for _ in range(2):
        pack(folder(path=images), tmp_path / "packed", **AS)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "packed: left out of the train images: 1 .txt, folder @eaDir"


def damage_facts(place):
    (place / FACTS).write_text("{")


def damage_counts(place):
    facts = json.loads((place / FACTS).read_text())
    facts["parts"]["train"]["images"] += 1
    (place / FACTS).write_text(json.dumps(facts))


def truncate_images(place):
    os.truncate(place / "train" / "images.npy", 2000)


def remove_labels(place):
    (place / "test" / "labels.npy").unlink()


@pytest.mark.parametrize("damage", [damage_facts, damage_counts, truncate_images, remove_labels])
def test_damage_is_refused_on_opening_and_repaired_by_packing(tmp_path, damage):
    place = tmp_path / "packed"
    first = pack(source(), place, **AS)
    damage(place)
    with pytest.raises(DataError, match=r"packed is damaged .*; delete it and pack again"):
        open_packed(place)
    assert pack(source(), place, **AS).fingerprint == first.fingerprint
    assert open_packed(place).fingerprint == first.fingerprint


def test_code_hidden_in_an_array_is_not_run(tmp_path):
    class Hidden:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    pack(source(), tmp_path / "packed", **AS)
    hidden = np.array([Hidden()] * 150, dtype=object)
    np.save(tmp_path / "packed" / "train" / "labels.npy", hidden, allow_pickle=True)
    with pytest.raises(DataError, match="is damaged"):
        open_packed(tmp_path / "packed")
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(DataError, match="holds no packed images"):
        open_packed(tmp_path)
    with pytest.raises(DataError, match="has no validation part; it has train, test"):
        pack(source(), tmp_path / "packed", **AS).part("validation")


def test_images_stay_readable_while_they_are_packed_anew(tmp_path):
    old = pack(source(), tmp_path / "packed", **AS).part("train").images
    pack(source(seed=9, identity="changed"), tmp_path / "packed", **AS)
    shutil.rmtree(tmp_path / "packed")
    assert np.array_equal(old[0], to_square(Image.fromarray(noise(1)[0]), 8, 3))


@pytest.mark.parametrize("length", [1, 7, 1437, 60_000])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 1.0])
def test_a_split_is_disjoint_complete_and_as_large_as_asked(length, fraction):
    train, held_out = split(length, fraction)
    assert np.array_equal(np.sort(np.concatenate((train, held_out))), np.arange(length))
    wanted = max(round(length * fraction), fraction > 0)
    assert len(held_out) == (wanted if fraction == 1 else min(wanted, length - 1))
    assert np.array_equal(train, np.sort(train))


def test_a_larger_split_begins_with_a_smaller_one_and_both_are_random():
    _, some = split(60_000, 0.01)
    _, more = split(60_000, 0.1)
    assert np.array_equal(more[:600], some)
    tenths = np.bincount(more // 6_000, minlength=10)
    assert ((tenths - 600) ** 2 / 600).sum() < 27.9  # χ² with 9 degrees of freedom, p = 0.001


def test_work_ahead_keeps_its_order_and_its_bound():
    started, release = [], Event()

    def work(k):
        started.append(k)
        release.wait(10)
        return k

    with ThreadPoolExecutor(8) as pool:
        results = ahead(pool, work, iter(range(100)), 3)
        release.set()
        assert next(results) == 0
        assert max(started) <= 3
        assert list(results) == list(range(1, 100))
