"""Sources find every image and decode it once; what cannot be decoded is named."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
import tarfile
import unicodedata
import zlib
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image, ImageOps
from published import idx, write_idx

from rediffuse.data.decoding import header, read, to_square
from rediffuse.data.packing import pack
from rediffuse.data.published import read_idx
from rediffuse.data.sources import Example, Source
from rediffuse.data.sources.cifar10 import cifar10
from rediffuse.data.sources.digits import digits
from rediffuse.data.sources.emnist import CLASSES, emnist
from rediffuse.data.sources.fashion_mnist import fashion_mnist
from rediffuse.data.sources.folder import folder
from rediffuse.data.sources.mnist import mnist
from rediffuse.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the data sets in ../shared/data"
)


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(place, *names, size=(8, 8)):
    for seed, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size, seed=seed)).save(place / name)


def examples(part):
    return [part[row] for row in range(len(part))]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def png(levels, bits, transparent=None, colour=0):
    """A PNG of one row with so many bits per channel, and a level that is transparent."""
    width = len(levels)
    packed = "".join(f"{level:0{bits}b}" for level in np.ravel(levels))
    row = b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big")
    level = b"" if transparent is None else struct.pack(f">{len(transparent)}H", *transparent)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
        + (chunk(b"tRNS", level) if level else b"")
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )


def heavy(path):
    Image.fromarray(noise(8, 8)).save(path)
    os.truncate(path, 50_000_001)  # makes it longer; what follows a PNG's end is ignored


def truncated_jpeg(path):
    Image.fromarray(noise(64, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:900])


BROKEN = {
    "truncated.jpg": truncated_jpeg,
    "empty.png": lambda path: path.write_bytes(b""),
    "text.webp": lambda path: path.write_text("not an image"),
    "postscript.png": lambda path: Image.new("RGB", (8, 8)).save(path, "EPS"),
    "icon.png": lambda path: Image.new("RGB", (8, 8)).save(path, "ICO"),
    "float.tif": lambda path: Image.new("F", (8, 8)).save(path),
    "deep.tif": lambda path: Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(path),
    "bomb.png": lambda path: path.write_bytes(png_that_claims(65500, 65500)),
    "warned.png": lambda path: path.write_bytes(png_that_claims(10000, 10000)),
    "large.png": lambda path: path.write_bytes(png_that_claims(8001, 8000)),
    "heavy.png": heavy,
    "link.png": lambda path: path.symlink_to("nowhere"),
    "loop.png": lambda path: path.symlink_to("loop.png"),
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": lambda path: os.mkfifo(path),
}


class TestDecoding:
    @pytest.mark.parametrize("name", BROKEN)
    def test_what_is_no_usable_image_is_refused_by_name_in_one_line(self, tmp_path, name):
        save(tmp_path, "good.png")
        BROKEN[name](tmp_path / name)
        part = folder(path=tmp_path).parts["train"]
        row = sorted(["good.png", name]).index(name)
        with pytest.raises(DataError, match=rf"{name} cannot be used: .*on_broken=skip") as refused:
            part[row]
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("name", ["bomb.png", "warned.png", "large.png"])
    def test_a_size_is_refused_before_anything_is_decoded(self, tmp_path, name):
        BROKEN[name](tmp_path / name)  # there are no pixels behind these headers
        with pytest.raises(DataError, match="more than 64 million pixels"):
            read(tmp_path / name)

    @pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "tiff", "jp2"])
    def test_kinds_without_loss_keep_their_pixels(self, tmp_path, suffix):
        how = {"lossless": True} if suffix == "webp" else {}
        Image.fromarray(noise(8, 9)).save(tmp_path / f"a.{suffix}", **how)
        assert np.array_equal(read(tmp_path / f"a.{suffix}").convert("RGB"), noise(8, 9))
        assert header(tmp_path / f"a.{suffix}").size == (9, 8)

    @pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jpe", "jfif", "avif", "gif"])
    def test_kinds_with_loss_come_near_their_pixels(self, tmp_path, suffix):
        smooth = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (32, 32, 3))
        Image.fromarray(smooth).save(tmp_path / f"a.{suffix}")
        part = folder(path=tmp_path).parts["train"]
        assert len(part) == 1
        assert np.abs(np.asarray(part[0].image.convert("RGB"), int) - smooth).max() <= 8

    def test_heic_is_read_by_pillow_heif_which_is_asked_for_where_it_is_missing(
        self, tmp_path, monkeypatch
    ):
        pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
        smooth = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (32, 32, 3))
        image = pillow_heif.from_pillow(Image.fromarray(smooth))
        image.save(tmp_path / "a.heic", quality=100)
        assert np.abs(np.asarray(read(tmp_path / "a.heic"), int) - smooth).max() <= 8
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(DataError, match=r"needs pillow-heif: pip install 'rediffuse\[heif\]'"):
            read(tmp_path / "a.heic")

    def test_a_jpeg_with_a_second_picture_is_a_jpeg(self, tmp_path):
        frames = [Image.fromarray(noise(8, 8, seed=k)) for k in range(2)]
        frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / "alone.jpg")
        assert header(tmp_path / "a.jpg").format == "JPEG"
        assert np.array_equal(read(tmp_path / "a.jpg"), read(tmp_path / "alone.jpg"))

    def test_a_link_to_a_regular_file_is_followed(self, tmp_path):
        save(tmp_path, "kept/a.png")
        (tmp_path / "link.png").symlink_to("kept/a.png")
        assert np.array_equal(read(tmp_path / "link.png"), noise(8, 8))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_exif_orientation_decodes_to_the_same_upright_image(self, tmp_path, orientation):
        stored = {  # how a camera that writes this orientation lays out an upright image
            1: lambda a: a,
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: a.transpose(1, 0, 2)[::-1],
            7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
            8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        }
        exif = Image.Exif()
        exif[0x0112] = orientation
        laid_out = np.ascontiguousarray(stored[orientation](noise(6, 9)))
        Image.fromarray(laid_out).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read(tmp_path / "a.png"), noise(6, 9))

    def test_only_the_first_frame_of_an_animation_counts(self, tmp_path):
        frames = [Image.fromarray(noise(8, 8, seed=k)) for k in range(3)]
        for name in ("a.png", "a.webp"):
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
            assert np.array_equal(read(tmp_path / name).convert("RGB"), noise(8, 8, seed=0))


class TestSquare:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_what_fits_keeps_its_pixels(self, channels):
        pixels = noise(8, 8, channels)
        expected = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
        for fit in ("crop", "pad"):
            assert np.array_equal(to_square(Image.fromarray(pixels), 8, channels, fit), expected)

    @pytest.mark.parametrize("size", [(40, 64), (64, 40), (20, 12), (12, 20), (16, 16), (7, 64)])
    def test_scaled_crop_and_pad_agree_with_pillows_own(self, size):
        image = Image.fromarray(noise(*size))
        cropped = np.asarray(ImageOps.fit(image, (16, 16), Image.Resampling.LANCZOS))
        padded = np.asarray(ImageOps.pad(image, (16, 16), Image.Resampling.LANCZOS, "#777777"))
        if (size[0] - size[1]) % 2 == 0:  # else Pillow shifts by half a pixel
            assert np.array_equal(to_square(image, 16, 3), cropped.transpose(2, 0, 1))
        assert np.array_equal(to_square(image, 16, 3, "pad", fill=0x77), padded.transpose(2, 0, 1))

    @pytest.mark.parametrize(("size", "box"), [((8, 13), np.s_[:, 2:10]), ((11, 8), np.s_[1:9])])
    def test_a_crop_without_scaling_keeps_the_pixels(self, size, box):
        pixels = noise(*size, channels=4)
        square = to_square(Image.fromarray(pixels), 8, 4)
        assert np.array_equal(square, pixels[box].transpose(2, 0, 1))

    @pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (2, 3)])
    @pytest.mark.parametrize("fit", ["crop", "pad"])
    def test_any_shape_becomes_a_square(self, size, fit):
        assert to_square(Image.fromarray(noise(*size)), 16, 3, fit).shape == (3, 16, 16)

    def test_shrinking_averages_instead_of_picking(self):
        stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
        shrunk = to_square(Image.fromarray(stripes), 16, 1)
        assert np.abs(shrunk.astype(int) - 127)[:, 2:-2, 2:-2].max() <= 2

    def test_sixteen_bit_grey_is_scaled_not_clipped(self, tmp_path):
        levels = np.array([[0, 257, 1000], [32768, 60000, 65535]], np.uint16)
        Image.fromarray(levels).save(tmp_path / "a.png")
        expected = np.rint(levels / 257).astype(np.uint8)
        square = to_square(read(tmp_path / "a.png"), 3, 1, "pad")
        assert np.array_equal(square[0, :2], expected)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_transparency_shows_white(self, channels):
        rgba = np.array([[[9, 9, 9, 0], [9, 9, 9, 255]], [[0, 0, 0, 51], [255, 0, 0, 0]]], np.uint8)
        square = to_square(Image.fromarray(rgba), 2, channels)
        assert (square == np.array([[255, 9], [204, 255]], np.uint8)).all()

    def test_a_palettes_transparent_colour_shows_white(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.save(tmp_path / "a.png", transparency=1)
        square = to_square(read(tmp_path / "a.png"), 2, 3)
        white = [255, 255, 255]
        assert square.transpose(1, 2, 0).tolist() == [[[10, 20, 30], white], [white, [10, 20, 30]]]

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_the_transparent_level_of_grey_is_transparent_and_no_other(self, tmp_path, bits):
        levels = np.linspace(0, 2**bits - 1, 8).round().astype(int)
        for transparent in {*levels.tolist()}:
            (tmp_path / "a.png").write_bytes(png(levels, bits, [transparent]))
            image = read(tmp_path / "a.png")
            kept = to_square(image, 8, 4, "pad")[:, 3]
            assert kept[3].tolist() == np.where(levels == transparent, 0, 255).tolist()
            assert kept[0].tolist() == np.rint(levels * (255 / (2**bits - 1))).tolist()
            shown = to_square(image, 8, 3, "pad")[0, 3]
            assert shown.tolist() == np.where(levels == transparent, 255, kept[0]).tolist()

    def test_the_transparent_colour_of_16_bits_is_known_by_all_of_them(self, tmp_path):
        colours = np.array([[300, 300, 300], [300, 300, 301], [301, 300, 300], [9, 9, 9]] * 2)
        (tmp_path / "a.png").write_bytes(png(colours, 16, [300, 300, 300], colour=2))
        square = to_square(read(tmp_path / "a.png"), 8, 4, "pad")[:, 3]
        assert square[3].tolist() == [0, 255, 255, 255] * 2
        assert square[0].tolist() == [1, 1, 1, 0] * 2

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_white_stays_white_and_black_black_in_every_mode(self, tmp_path, mode, channels):
        for level in (0, 255):
            image = Image.new("L", (8, 8), level)
            if mode == "I;16":
                image = Image.fromarray(np.full((8, 8), level * 257, np.uint16))
            elif mode != "L":
                image = image.convert("RGB").convert(mode)
            path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
            image.save(path)
            square = to_square(read(path), 4, channels)
            assert (square[:3] == level).all()
            assert (square[3:] == 255).all()


class TestFolder:
    def test_class_folders_are_classes_in_the_order_of_their_names(self, tmp_path):
        save(tmp_path, "b/2.png", "b/1.JPG", "a/x.webp", "B/y.jpeg")
        (tmp_path / "a" / "notes.txt").write_text("not an image")
        (tmp_path / ".hidden").mkdir()
        source = folder(path=str(tmp_path))
        found = [(e.name, e.label) for e in examples(source.parts["train"])]
        assert source.class_names == ("B", "a", "b")
        assert found == [("B/y.jpeg", 0), ("a/x.webp", 1), ("b/1.JPG", 2), ("b/2.png", 2)]

    def test_a_flat_folder_has_no_classes(self, tmp_path):
        save(tmp_path, "b.png", "a.png")
        source = folder(path=tmp_path)
        assert source.class_names == ()
        assert [e.label for e in examples(source.parts["train"])] == [None, None]

    def test_parts_share_the_classes_of_training(self, tmp_path):
        save(tmp_path, "train/a/1.png", "train/b/1.png", "val/b/1.png", "test/a/1.png")
        source = folder(
            path=tmp_path / "train", validation_path=tmp_path / "val", test_path=tmp_path / "test"
        )
        labels = {part: [e.label for e in examples(x)] for part, x in source.parts.items()}
        assert labels == {"train": [0, 1], "validation": [1], "test": [0]}

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "holds no PNG, .* HEIC files$"),
            (["a.png", "b/c.png"], "holds both images .* and folders"),
            (["a/b/c.png"], "data.path=.*/a$"),
            (
                ["a/b.png", "c/d.ppm"],
                r"c is read as a class, but holds no PNG.*\(left out: 1 \.ppm\)",
            ),
        ],
    )
    def test_a_folder_that_cannot_be_understood_is_refused(self, tmp_path, files, message):
        save(tmp_path, *files)
        with pytest.raises(DataError, match=message):
            folder(path=tmp_path)

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"no folder .*nowhere'; give one with data\.path"):
            folder(path=tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("train", "validation", "message"),
        [
            (
                "a/1.png",
                "b/1.png",
                "given for validation, has the class b, but training has only a",
            ),
            ("a/1.png", "1.png", "has images without classes, but training has only a"),
            ("1.png", "a/1.png", "has the class a, but training has no classes"),
        ],
    )
    def test_parts_of_other_classes_are_refused(self, tmp_path, train, validation, message):
        save(tmp_path / "train", train)
        save(tmp_path / "val", validation)
        with pytest.raises(DataError, match=message):
            folder(path=tmp_path / "train", validation_path=tmp_path / "val")

    def test_folders_of_systems_and_hidden_files_are_left_out_and_counted(self, tmp_path):
        save(tmp_path, "cat/0.png", "dog/1.png")
        left_out = ("@eaDir/0.png/thumb.jpg", "__MACOSX/cat/._0.png", ".ipynb_checkpoints/0.png")
        save(tmp_path, *left_out, "$RECYCLE.BIN/2.png", "cat/@eaDir/3.png", "cat/._0.png")
        (tmp_path / "System Volume Information").mkdir()
        for name in ("Thumbs.db", "cat/desktop.ini", "cat/NOTES", "cat/.DS_Store"):
            (tmp_path / name).write_bytes(b"\0")
        source = folder(path=tmp_path)
        assert source.class_names == ("cat", "dog")
        assert [e.name for e in examples(source.parts["train"])] == ["cat/0.png", "dog/1.png"]
        assert source.left_out["train"] == {
            "folder @eaDir": 2,
            "folder __MACOSX": 1,
            "folder .ipynb_checkpoints": 1,
            "folder $RECYCLE.BIN": 1,
            "folder System Volume Information": 1,
            "hidden": 2,
            ".db": 1,
            ".ini": 1,
            "without suffix": 1,
        }

    def test_a_loop_of_links_is_one_broken_image_and_no_end_of_the_others(self, tmp_path):
        save(tmp_path, "a.png")
        (tmp_path / "b.png").symlink_to("b.png")
        (tmp_path / "c").symlink_to("c")
        good, loop = examples(folder(path=tmp_path, on_broken="skip").parts["train"])
        assert (good.name, loop.name) == ("a.png", "b.png")
        assert loop.reason == "it cannot be read (Too many levels of symbolic links)"

    def test_class_names_are_equal_however_a_system_writes_their_accents(self, tmp_path):
        for form in ("NFC", "NFD"):
            for name in ("café", "tea"):
                save(tmp_path / form, f"{unicodedata.normalize(form, name)}/0.png")
        source = folder(path=tmp_path / "NFD", validation_path=tmp_path / "NFC")
        assert source.class_names == ("caf\u00e9", "tea")
        for part in source.parts.values():
            assert [e.label for e in examples(part)] == [0, 1]
        save(tmp_path / "NFD", "caf\u00e9/0.png")
        with pytest.raises(DataError, match=r"two folders named 'café', .*NFC and NFD"):
            folder(path=tmp_path / "NFD")

    def test_a_class_name_that_is_not_utf_8_is_refused_and_a_file_name_is_not(self, tmp_path):
        save(tmp_path, "a/0.png")
        (tmp_path / "a/0.png").rename(os.fsdecode(bytes(tmp_path) + b"/a/\xe9.png"))
        assert len(examples(folder(path=tmp_path).parts["train"])) == 1
        (tmp_path / "a" / "z.png").symlink_to(os.fsdecode(b"\xe9.png"))
        (tmp_path / "a" / os.fsdecode(b"\xe8.png")).write_bytes(b"")
        packed = pack(
            folder(path=tmp_path, on_broken="skip"),
            tmp_path.parent / f"{tmp_path.name}-packed",
            image_size=8,
            channels=3,
        )
        (skipped,) = packed.facts["parts"]["train"]["skipped"]
        assert skipped["name"] == r"a/\xe8.png"
        (tmp_path / "a").rename(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
        with pytest.raises(DataError, match=r"caf\\xe9': the name of a class has to be UTF-8"):
            folder(path=tmp_path)

    def test_identity_changes_with_the_files_and_only_then(self, tmp_path):
        save(tmp_path, "a.png", "b.png")
        before = folder(path=tmp_path).identity
        assert folder(path=tmp_path).identity == before
        assert folder(path=tmp_path, on_broken="skip").identity != before
        os.utime(tmp_path / "a.png", ns=(0, 1))
        assert folder(path=tmp_path).identity != before


class TestPublished:
    @pytest.mark.parametrize("compress", [False, True])
    def test_idx_files_are_read_plain_or_gzipped_and_test_may_be_missing(self, tmp_path, compress):
        images, labels = noise(5, 7, 4).transpose(2, 0, 1).copy(), np.array([3, 1, 0, 9], np.uint8)
        write_idx(tmp_path / "MNIST" / "raw", "train", images, labels, compress=compress)
        source = mnist(root=tmp_path)
        assert list(source.parts) == ["train"]
        for row, (image, label, _) in enumerate(examples(source.parts["train"])):
            assert np.array_equal(image, images[row])
            assert label == labels[row]

    def test_emnist_is_upright_and_its_letters_count_from_0(self, tmp_path):
        images, labels = noise(6, 6, 2).transpose(2, 0, 1).copy(), np.array([1, 26], np.uint8)
        write_idx(tmp_path / "EMNIST" / "raw", "emnist-letters-train", images, labels)
        source = emnist(root=tmp_path, split="letters")
        first, last = examples(source.parts["train"])
        assert np.array_equal(first.image, images[0].T)
        assert [source.class_names[e.label] for e in (first, last)] == ["a", "z"]

    def test_emnists_classes_are_torchvisions(self):
        from torchvision.datasets import EMNIST

        for split, names in CLASSES.items():
            assert [n for n in EMNIST.classes_split_dict[split] if n != "N/A"] == list(names)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (idx(noise(4, 4, 1))[:-1], "has 15 bytes of data where its header says 16"),
            (b"<html>", "not an IDX file"),
            (b"", "not an IDX file"),
        ],
    )
    def test_a_damaged_idx_file_is_named(self, tmp_path, data, message):
        (tmp_path / "x-ubyte").write_bytes(data)
        with pytest.raises(DataError, match=f"x-ubyte.*{message}"):
            read_idx(tmp_path / "x-ubyte")

    def test_a_damaged_archive_is_named(self, tmp_path):
        (tmp_path / "x-ubyte.gz").write_bytes(gzip.compress(b"abcdef" * 100)[:-20])
        with pytest.raises(DataError, match=r"x-ubyte\.gz cannot be read"):
            read_idx(tmp_path / "x-ubyte.gz")

    @pytest.mark.parametrize(
        ("source", "module", "where"),
        [
            (mnist, "mnist", "MNIST/raw.*train-images-idx3-ubyte.*t10k-labels-idx1-ubyte"),
            (fashion_mnist, "mnist", "FashionMNIST/raw.*train-images-idx3-ubyte"),
            (emnist, "mnist", "EMNIST/raw.*emnist-balanced-train-images-idx3-ubyte"),
            (cifar10, "cifar", "cifar-10-batches-py.*data_batch_1, .*test_batch, batches.meta"),
        ],
    )
    def test_offline_the_error_says_which_files_to_put_where(
        self, tmp_path, monkeypatch, source, module, where
    ):
        def unreachable(*args, **kwargs):
            raise URLError("network is unreachable")

        import torchvision

        place = getattr(torchvision.datasets, module)
        monkeypatch.setattr(place, "download_and_extract_archive", unreachable)
        with pytest.raises(DataError, match=rf"{where}.*data\.root") as refused:
            source(root=tmp_path)
        assert "\n" not in str(refused.value)

    def test_cifar_opens_only_pickles_of_the_published_digest(self, tmp_path, monkeypatch):
        from torchvision.datasets import CIFAR10

        place = tmp_path / CIFAR10.base_folder
        place.mkdir()
        pixels = noise(3, 3072, 1)

        def write(name, content):
            (place / name).write_bytes(pickle.dumps(content))
            return name, hashlib.md5((place / name).read_bytes()).hexdigest()

        train = write("data_batch_1", {"data": pixels, "labels": [2, 0, 1]})
        test = write("test_batch", {"data": pixels[:1], "labels": [1]})
        meta = write("batches.meta", {"label_names": ["cat", "dog", "frog"]})
        monkeypatch.setattr(CIFAR10, "train_list", [train])
        monkeypatch.setattr(CIFAR10, "test_list", [test])
        monkeypatch.setattr(
            CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
        )
        source = cifar10(root=tmp_path)
        first = source.parts["train"][0]
        assert source.class_names == ("cat", "dog", "frog")
        assert {part: len(found) for part, found in source.parts.items()} == {"train": 3, "test": 1}
        assert np.array_equal(np.asarray(first.image).transpose(2, 0, 1).ravel(), pixels[0])
        assert first.label == 2

        (place / "data_batch_1").write_bytes(pickle.dumps({"data": "something else"}))
        wanted = (
            r"cifar-10-batches-py lacks files, or they are damaged; .* data_batch_1, test_batch"
        )
        with pytest.raises(DataError, match=wanted):
            assert cifar10(root=tmp_path).parts

    def test_nothing_is_read_before_images_are_asked_for(self, tmp_path, monkeypatch):
        for module in ("sklearn.datasets", "torchvision.datasets"):
            monkeypatch.setitem(sys.modules, module, None)  # cannot be imported
        (tmp_path / "cifar-10-batches-py").mkdir()
        write_idx(tmp_path / "MNIST" / "raw", "train", np.zeros((2, 4, 4)), np.zeros(2))
        for part in (tmp_path / "MNIST" / "raw").iterdir():
            part.write_bytes(b"rubbish")
        for source in (digits(), mnist(root=tmp_path), cifar10(root=tmp_path)):
            assert source.identity
            for what in ("parts", "class_names"):
                with pytest.raises((ImportError, DataError)):
                    getattr(source, what)

    def test_digits_are_all_there_once_with_a_fixed_fifth_for_test(self):
        from sklearn.datasets import load_digits

        source = digits()
        parts = {part: examples(found) for part, found in source.parts.items()}
        assert {part: len(found) for part, found in parts.items()} == {"train": 1438, "test": 359}
        drawn = sorted(bytes([e.label]) + e.image.tobytes() for e in parts["train"] + parts["test"])
        bunch = load_digits()
        levels = np.rint(bunch.data / 16 * 255).astype(np.uint8)
        assert drawn == sorted(
            bytes([y]) + bytes(x) for x, y in zip(levels, bunch.target, strict=True)
        )


@needs_shared
class TestRealData:
    def test_mnist_has_its_published_counts(self, tmp_path):
        source = mnist(root=SHARED)
        train, test = source.parts["train"], source.parts["test"]
        counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert np.bincount(train.labels).tolist() == counts
        # The training set's mean and spread, as widely used for normalising it.
        assert round(train.images.mean() / 255, 4) == 0.1307
        assert round(train.images.std() / 255, 4) == 0.3081

        tests = Source(source.class_names, {"test": test}, source.identity)
        packed = pack(tests, tmp_path, image_size=28, channels=1)
        part = packed.part("test")
        assert part.images.shape == (10_000, 1, 28, 28)
        assert np.array_equal(part.images[:, 0], test.images)
        assert np.array_equal(part.labels, test.labels)

    def test_fashion_mnist_works_without_its_test_files(self, tmp_path):
        (tmp_path / "FashionMNIST").mkdir()
        (tmp_path / "FashionMNIST" / "raw").symlink_to(SHARED / "FashionMNIST-900")
        source = fashion_mnist(root=tmp_path)
        labels = [e.label for e in examples(source.parts["train"])]
        assert list(source.parts) == ["train"]
        assert np.bincount(labels).tolist() == [90] * 10

    def test_a_folder_of_real_photographs_is_decoded_exactly(self, tmp_path):
        with tarfile.open(SHARED / "cifar10-jpg.tar.xz") as tar:
            few = [
                m for m in islice(tar, 2500) if m.isfile() and m.name[-6:] in ("00.jpg", "50.jpg")
            ]
        with tarfile.open(SHARED / "cifar10-jpg.tar.xz") as tar:
            tar.extractall(tmp_path, members=few, filter="data")
        source = folder(path=tmp_path / "cifar10-jpg" / "test")
        packed = pack(source, tmp_path / "packed", image_size=32, channels=3)
        assert source.class_names[:2] == ("airplane", "automobile")
        for row, example in enumerate(examples(source.parts["train"])):
            assert isinstance(example, Example)
            stored = packed.part("train").images[row]
            assert np.array_equal(stored, np.asarray(example.image).transpose(2, 0, 1))
