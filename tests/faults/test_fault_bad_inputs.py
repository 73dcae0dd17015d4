"""Bad input: one line, exit code 2, seconds and megabytes; nothing runs, nothing else changes."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shlex
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import TINY, run_id
from faults_harness import Done, Zygote
from PIL import Image
from safetensors.torch import load_file, save_file

from rediffuse.data.decoding import KINDS
from rediffuse.training.committed import FORMAT

# Child processes: 2 GiB beyond what imports take, and seconds of computing: five on a quiet
# machine, of which the limit leaves out those that a busy one makes of them.
LIMITS = """
import resource
pages = int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (30, 31))
"""
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Place:
    """A root with a run, and a folder beside it that nothing may change."""

    root: Path
    run: Path
    beside: Path

    @property
    def checkpoint(self) -> Path:
        """Its only checkpoint."""
        return next(self.run.glob("checkpoints/step-*"))

    def sample(self, *words: object) -> list[str]:
        """Ask for one image, quickly."""
        return ["sample", self.run.name, "--n", "1", "--steps", "1", *map(str, words)]


Make = Callable[[Place], list[str]]
GALLERY: dict[str, tuple[Make, str]] = {}


def bad(says: str) -> Callable[[Make], Make]:
    """Hang a function that makes a bad input, and returns the command it is for, into the gallery.

    `says` must be part of the line.
    """

    def hang(make: Make) -> Make:
        name = make.__name__.strip("_").replace("_", " ")
        assert name not in GALLERY, name
        GALLERY[name] = make, says
        return make

    return hang


def hang(name: str, says: str, make: Make) -> None:
    """The same for a lambda."""
    assert name not in GALLERY, name
    GALLERY[name] = make, says


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    root = tmp_path_factory.mktemp("golden")
    words = (*TINY, "training.images=48", "training.previews=false")
    return root / run_id(zygote.run("train", *words, root=root, check=0))


@pytest.fixture
def place(golden: Path, tmp_path: Path) -> Place:
    root = Path(shutil.copytree(golden.parent, tmp_path / "root"))
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "secret").write_text("nobody else's business")
    return Place(root, root / golden.name, beside)


def everything(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Every name below a folder, with kind and content; what is no file is not opened."""
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        small = is_file and path.stat().st_size < 10**7
        content = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
        yield str(path.relative_to(folder)), path.lstat().st_mode, content


def some(names: Iterable[str]) -> list[Any]:
    """All of them with `-m "slow or not slow"`, and every twelfth by default."""
    return [
        pytest.param(name, marks=pytest.mark.slow if k % 12 else ()) for k, name in enumerate(names)
    ]


def refused(done: Done, says: str) -> None:
    """Hold the end of a command to what a refusal is."""
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert len(done.stderr) < 2000, done.stderr[:300]
    assert says in done.stderr


# Checkpoints


def sealed(place: Place) -> None:
    """Write the manifest anew, as somebody would who wants the damage to be believed."""
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(place.checkpoint.iterdir())
        if file.name != "manifest.json" and file.is_file()
    }
    (place.checkpoint / "manifest.json").write_text(
        json.dumps({"format": FORMAT, "files": files}, indent=1)
    )


def weights(data: bytes) -> Make:
    def make(place: Place) -> list[str]:
        (place.checkpoint / "average.safetensors").write_bytes(data)
        sealed(place)
        return place.sample()

    return make


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


hang("weights of 3 bytes", "average.safetensors", weights(b"abc"))
hang("a weights header of 2^60 bytes", "average.safetensors", weights(struct.pack("<Q", 2**60)))
hang("a weights header cut short", "average.safetensors", weights(struct.pack("<Q", 99) + b"{"))
hang("a weights header that is no JSON", "average.safetensors", weights(b"\3" + b"\0" * 7 + b"{{{"))


@bad("average.safetensors")
def weights_with_a_million_names(place: Place) -> list[str]:
    entry = '"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % k for k in range(10**6)) + "}").encode()
    return weights(struct.pack("<Q", len(header)) + header)(place)


@bad("average.safetensors")
def a_pickle_for_weights(place: Place) -> list[str]:
    return weights(pickle.dumps(Bomb(place.beside / "executed")))(place)


@bad("made by another network")
def weights_of_another_network(place: Place) -> list[str]:
    save_file({"w": torch.zeros(3)}, place.checkpoint / "average.safetensors")
    sealed(place)
    return place.sample()


@bad("but the network has")
def weights_of_another_shape(place: Place) -> list[str]:
    file = place.checkpoint / "average.safetensors"
    tensors = load_file(file)
    save_file({name: value[:1].clone() for name, value in tensors.items()}, file)
    sealed(place)
    return place.sample()


@bad("NaN or infinite")
def weights_that_are_nan(place: Place) -> list[str]:
    file = place.checkpoint / "average.safetensors"
    save_file(
        {name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}, file
    )
    sealed(place)
    return place.sample()


@bad("is a link")
def a_link_in_place_of_weights(place: Place) -> list[str]:
    file = place.checkpoint / "average.safetensors"
    file.rename(place.beside / file.name)
    file.symlink_to(place.beside / file.name)
    return place.sample()


@bad("is a link")
def a_link_in_place_of_a_checkpoint(place: Place) -> list[str]:
    whole = place.checkpoint
    whole.rename(place.beside / whole.name)
    whole.symlink_to(place.beside / whole.name)
    return place.sample()


@bad("average.safetensors")
def a_fifo_in_place_of_weights(place: Place) -> list[str]:
    (place.checkpoint / "average.safetensors").unlink()
    os.mkfifo(place.checkpoint / "average.safetensors")
    return place.sample()


def manifest(text: str) -> Make:
    def make(place: Place) -> list[str]:
        (place.checkpoint / "manifest.json").write_text(text)
        return place.sample()

    return make


def listed(name: str, entry: object) -> str:
    return json.dumps({"format": 1, "files": {name: entry}})


PASSWD = {"bytes": os.stat("/etc/passwd").st_size, "sha256": "0" * 64}
hang(
    "a manifest that names a file elsewhere",
    "no checkpoint",
    manifest(listed("../" * 12 + "etc/passwd", PASSWD)),
)
hang(
    "a manifest that names an absolute path",
    "no checkpoint",
    manifest(listed("/etc/passwd", PASSWD)),
)
hang("a manifest of brackets", "no checkpoint", manifest("[" * 100_000))
hang("a manifest with a list of files", "no checkpoint", manifest('{"format": 1, "files": ["a"]}'))
hang("a manifest with a number for a file", "no checkpoint", manifest(listed("state.json", 7)))
hang("a manifest that lists nothing", "no checkpoint", manifest('{"format": 1, "files": {}}'))
hang("a manifest of another format", "no checkpoint", manifest('{"format": 99, "files": {}}'))
hang("a manifest with NUL in a name", "no checkpoint", manifest(listed("a\0b", PASSWD)))


@bad("no checkpoint")
def a_manifest_of_a_gigabyte(place: Place) -> list[str]:
    os.truncate(place.checkpoint / "manifest.json", 2**30)
    return place.sample()


@bad("no checkpoint")
def a_fifo_in_place_of_a_manifest(place: Place) -> list[str]:
    (place.checkpoint / "manifest.json").unlink()
    os.mkfifo(place.checkpoint / "manifest.json")
    return place.sample()


def state(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(place: Place) -> list[str]:
        file = place.checkpoint / "state.json"
        told = json.loads(file.read_text())
        file.write_text(json.dumps(change(told) or told))
        sealed(place)
        return ["resume", place.run.name, "training.images=96"]

    return make


hang(
    "a state with NaN for images", "state.json", state(lambda s: s.update(images_seen=float("nan")))
)
hang("a state with a text for images", "state.json", state(lambda s: s.update(images_seen="many")))
hang("a state with images below 0", "state.json", state(lambda s: s.update(images_seen=-48)))
hang("a state that is a list", "state.json", state(lambda s: [1, 2]))
hang("a state without its counters", "state.json", state(lambda s: s.clear() or {"scaler": None}))


@bad("has no checkpoint 'best'")
def the_best_checkpoint_by_a_broken_state(place: Place) -> list[str]:
    (place.checkpoint / "state.json").write_text("{")
    return place.sample("--checkpoint", "best")


# Directories of runs


def config(text: str, *verb: str) -> Make:
    def make(place: Place) -> list[str]:
        (place.run / "config.yaml").write_text(text)
        return [*verb, place.run.name] if verb else place.sample()

    return make


ALIASES = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
hang("an alias bomb", "aliases are not read", config(ALIASES))
hang("an alias bomb to show", "aliases are not read", config(ALIASES, "show"))
hang(
    "a python object",
    "config.yaml",
    config("name: !!python/object/apply:os.system ['touch executed']"),
)
hang("a python name", "config.yaml", config("name: !!python/name:os.system"))
hang("brackets without end", "config.yaml", config("[" * 100_000))
hang("braces without end", "config.yaml", config("a: " + "{a: " * 50_000))
hang("a configuration of NULs", "config.yaml", config("\0" * 1000))
hang("an empty configuration", "config.yaml", config(""))
hang("a configuration that is a list", "config.yaml", config("- 1\n- 2\n"))
hang("a configuration without its parts", "needed", config("seed: 1\n"))
hang("two documents in a configuration", "config.yaml", config("a: 1\n---\nb: 2\n"))


def changed(old: str, new: str, *verb: str) -> Make:
    def make(place: Place) -> list[str]:
        file = place.run / "config.yaml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        return [*verb, place.run.name] if verb else place.sample()

    return make


SECRET = "not filled in here"
hang("the environment in a configuration", SECRET, changed("name: digits", "name: ${oc.env:HOME}"))
hang("the environment in a list", SECRET, changed("trackers: []", "trackers: ['${oc.env:HOME}']"))
hang(
    "the environment in a key", SECRET, changed("name: digits", "'${oc.env:HOME}': 1\nname: digits")
)
hang("a target to build", "_target_", changed("model:\n", "model:\n  _target_: os.system\n"))
hang(
    "a network named os.system",
    "there is no model 'os.system'",
    changed("name: unet.UNet", "name: os.system"),
)
hang(
    "a network of a package nobody trusts",
    "--trust",
    changed("name: unet.UNet", "name: antigravity.fly"),
)
hang(
    "a network with a path for a name",
    "is not a name",
    changed("name: unet.UNet", "name: ../../unet"),
)
hang(
    "a network of a hundred million channels",
    "the network of config.yaml",
    changed("base_channels: 16", "base_channels: 100000000"),
)
hang(
    "a network of less than no channels",
    "base_channels",
    changed("base_channels: 16", "base_channels: -16"),
)
hang(
    "images of a million pixels a side",
    "image_size",
    changed("image_size: 8", "image_size: 1000000"),
)
hang("a schedule of 10^12 steps", "steps", changed("steps: 1000", "steps: 1000000000000"))
hang("a million threads", "threads", changed("threads: 1", "threads: 1000000000"))


hang("a norm named 7", "model.norm.name", changed("name: group", "name: 7"))


@bad("keeps no average")
def weights_that_the_manifest_does_not_list(place: Place) -> list[str]:
    file = place.checkpoint / "average.safetensors"
    content = file.read_bytes()
    file.unlink()
    sealed(place)
    file.write_bytes(content)
    return place.sample()


@bad("more than 1,000,000 bytes")
def a_configuration_of_50_MB(place: Place) -> list[str]:
    os.truncate(place.run / "config.yaml", 50_000_000)
    return place.sample()


def replaced(name: str, how: Callable[[Path], object], *verb: str) -> Make:
    def make(place: Place) -> list[str]:
        (place.run / name).unlink()
        how(place.run / name)
        return [*verb, place.run.name] if verb else place.sample()

    return make


def written(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


for file, verb in (("config.yaml", ()), ("environment.json", ()), ("run.json", ("show",))):
    hang(f"no {file}", file, replaced(file, lambda path: None, *verb))
    hang(f"a fifo for {file}", file, replaced(file, os.mkfifo, *verb))
    hang(f"a folder for {file}", file, replaced(file, Path.mkdir, *verb))
    hang(
        f"a device for {file}",
        file,
        replaced(file, lambda path: path.symlink_to("/dev/zero"), *verb),
    )
for file, verb in (("environment.json", ()), ("run.json", ("show",))):
    hang(
        f"a gigabyte for {file}",
        file,
        replaced(file, lambda p: p.touch() or os.truncate(p, 2**30), *verb),
    )
    hang(f"no JSON in {file}", file, replaced(file, written("{"), *verb))
    hang(f"a list in {file}", file, replaced(file, written("[1]"), *verb))
    hang(f"brackets in {file}", file, replaced(file, written("[" * 100_000), *verb))
    hang(
        f"no text in {file}",
        file,
        replaced(file, lambda path: path.write_bytes(b"\xff\xfe\0"), *verb),
    )
hang(
    "classes that are a number",
    "environment.json",
    replaced("environment.json", written('{"data": {"class_names": 7}}')),
)
hang(
    "classes that are numbers",
    "environment.json",
    replaced("environment.json", written('{"data": {"class_names": [7]}}')),
)
hang(
    "a broken environment to show",
    "environment.json",
    replaced("environment.json", written("{"), "show"),
)
hang(
    "no environment to resume",
    "environment.json",
    replaced("environment.json", lambda p: None, "resume"),
)
hang(
    "classes of another number",
    "classes",
    replaced("environment.json", written('{"data": {"class_names": []}}')),
)


@bad("belongs to run")
def the_record_of_another_run(place: Place) -> list[str]:
    file = place.run / "run.json"
    file.write_text(file.read_text().replace(place.run.name, "0" * 32))
    return ["show", place.run.name]


@bad("no run")
def a_link_in_place_of_a_run(place: Place) -> list[str]:
    place.run.rename(place.beside / place.run.name)
    place.run.symlink_to(place.beside / place.run.name)
    return place.sample()


@bad("is not a run id")
def a_path_to_a_link_in_place_of_a_run(place: Place) -> list[str]:
    (place.root / "inside").symlink_to(place.beside)
    return ["sample", f"{place.root}/inside"]


# Ids

for name, word, says in (
    ("a path for an id", "../..", "is not a run id"),
    ("no id", "", "which run?"),
    ("5 digits", "abcde", "is not a run id"),
    ("unicode digits", "١٢٣٤٥٦", "is not a run id"),
    ("a float", "12e5", "is not a run id"),
    ("a float that is a beginning", "12e500", "no run '12e500'"),
    ("a long id", "a" * 100_000, "is not a run id"),
    ("NUL", "abc\0def", "is not a run id"),
    ("a line in an id", "abc\ndef", "is not a run id"),
    ("colours in an id", "\x1b[31mabcdef", "is not a run id"),
    ("an option's end", "-", "is not a run id"),
    ("spaces", "  ", "is not a run id"),
    ("a home of nobody", "~nobody-at-all/x", "there is no folder"),
    ("the root of all", "/", "is not a run"),
    ("a path with NUL", "/tmp/\0", "there is no folder"),
    ("a path with a line", "/tmp/a\nb", "there is no folder"),
    ("a very long path", "/" + "a" * 100_000, "there is no folder"),
    ("a path to nothing", "/no/such/run", "/no/such/run"),
):
    hang(f"{name} as an id", says, lambda place, word=word: ["sample", word])

# Images


def image(data: Callable[[], bytes], suffix: str = ".png", verb: str = "sample") -> Make:
    def make(place: Place) -> list[str]:
        folder = place.beside / "images"
        folder.mkdir()
        (folder / f"bad{suffix}").write_bytes(data())
        if verb == "sample":
            return place.sample("--input", folder / f"bad{suffix}")
        return ["data", "inspect", str(folder), "data.image_size=8"]

    return make


def saved(
    size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG", **how: Any
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind, **how)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of zeros, with other chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + width * depth // 8)) if width < 10**4 else b"")
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 1)


def gif() -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02L\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + frame * 10**5 + b";"


NO_IMAGE = f"it is not a {KINDS} image"
MANY = "64 million pixels"
IMAGES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "a bomb of 50000x50000": (lambda: png(50_000, 50_000), ".png", MANY),
    "a bomb of 2^31 by 1": (lambda: png(2**31 - 1, 1), ".png", "bad.png"),
    "no width": (lambda: png(0, 8), ".png", "bad.png"),
    "a truncated JPEG": (lambda: saved((64, 64), kind="JPEG")[:400], ".jpg", "broken"),
    "a JPEG bomb": (lambda: JPEG_BOMB, ".jpg", MANY),
    "a GIF with 10^5 frames": (gif, ".png", NO_IMAGE),
    "an SVG": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
        ".png",
        NO_IMAGE,
    ),
    "a text": (lambda: b"not an image\n" * 9, ".png", NO_IMAGE),
    "zero bytes": (lambda: b"", ".webp", NO_IMAGE),
    "a chunk of 2^31 bytes": (
        lambda: png(8, 8, struct.pack(">I", 2**31 - 1) + b"tEXtabc"),
        ".png",
        "broken",
    ),
    "a palette of 100 MB": (lambda: png(8, 8, chunk(b"PLTE", bytes(10**8))), ".png", "bytes"),
    "a bomb in a zTXt chunk": (
        lambda: png(8, 8, chunk(b"zTXt", b"k\0\0" + zeros(10**9))),
        ".png",
        "broken",
    ),
    "a bomb in an iCCP chunk": (
        lambda: png(8, 8, chunk(b"iCCP", b"k\0\0" + zeros(10**9))),
        ".png",
        "broken",
    ),
    "16 bits of wrong pixels": (lambda: png(8, 8, depth=16, colour=2)[:-30], ".png", "bad.png"),
    "a CMYK JPEG cut short": (lambda: saved((64, 64), "CMYK", "JPEG")[:500], ".jpg", "broken"),
    "a WebP cut short": (lambda: saved((64, 64), kind="WEBP")[:40], ".webp", "bad.webp"),
    "a TIFF": (lambda: saved(kind="TIFF"), ".jpg", NO_IMAGE),
    "a PostScript file": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        ".png",
        NO_IMAGE,
    ),
    "a zip": (lambda: archive(("../escaped", b"x")), ".png", NO_IMAGE),
    "a pickle": (lambda: pickle.dumps([1]), ".png", NO_IMAGE),
}
JPEG_BOMB = (
    b"\xff\xd8\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 65_500, 65_500) + b"\x01\x01\x11\x00"
    b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + bytes(64)
)


def archive(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members:
            packed.writestr(name, data)
    return out.getvalue()


for name, (make_image, suffix, says) in IMAGES.items():
    hang(f"{name} to start from", says, image(make_image, suffix))
for name in (
    "a bomb of 50000x50000",
    "a GIF with 10^5 frames",
    "a bomb in a zTXt chunk",
    "zero bytes",
):
    make_image, suffix, says = IMAGES[name]
    hang(f"{name} to train on", says, image(make_image, suffix, "data"))
hang(
    "a broken image as a mask",
    NO_IMAGE,
    lambda place: place.sample("--input", good(place), "--mask", place.beside / "secret"),
)


def good(place: Place, name: str = "good.png") -> Path:
    (place.beside / name).write_bytes(saved())
    return place.beside / name


@bad("it is not a regular file")
def a_fifo_to_start_from(place: Place) -> list[str]:
    os.mkfifo(place.beside / "fifo.png")
    return place.sample("--input", place.beside / "fifo.png")


@bad("it is not a regular file")
def a_device_to_start_from(place: Place) -> list[str]:
    return place.sample("--input", "/dev/zero")


@bad("symbolic links")
def a_link_to_itself_to_start_from(place: Place) -> list[str]:
    (place.beside / "self.png").symlink_to("self.png")
    return place.sample("--input", place.beside / "self.png")


@bad("there is no PNG")
def an_empty_folder_to_start_from(place: Place) -> list[str]:
    (place.beside / "empty").mkdir()
    return place.sample("--input", place.beside / "empty")


# Archives and arrays


def packed_as(name: str, data: Callable[[], bytes]) -> Make:
    def make(place: Place) -> list[str]:
        (place.beside / name).write_bytes(data())
        return ["data", "pack", str(place.beside / name), "data.image_size=8"]

    return make


def tar(*members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        for member in members:
            packed.addfile(member)
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, to
    return found


NO_FOLDER = "there is no folder"
hang("a zip with ../x", NO_FOLDER, packed_as("a.zip", lambda: archive(("../escaped", b"x"))))
hang(
    "a zip with an absolute path",
    NO_FOLDER,
    packed_as("a.zip", lambda: archive(("/tmp/escaped", b"x"))),
)
hang("a zip bomb", NO_FOLDER, packed_as("a.zip", lambda: archive(("0", bytes(10**8)))))
hang("a truncated tar", NO_FOLDER, packed_as("a.tar.gz", lambda: tar(member("x"))[:20]))
hang(
    "a tar with a link",
    NO_FOLDER,
    packed_as("a.tar.gz", lambda: tar(member("x", tarfile.SYMTYPE, "/etc/passwd"))),
)
hang(
    "a tar with a device",
    NO_FOLDER,
    packed_as("a.tar.gz", lambda: tar(member("x", tarfile.CHRTYPE))),
)


def mnist(images: bytes, labels: bytes | None = None, suffix: str = ".gz") -> Make:
    def make(place: Place) -> list[str]:
        raw = place.beside / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, data in (("images-idx3", images), ("labels-idx1", labels or idx(1))):
            (raw / f"train-{name}-ubyte{suffix}").write_bytes(data)
        return ["data", "pack", "mnist", f"data.root={place.beside}"]

    return make


def idx(*shape: int, data: bytes | None = None) -> bytes:
    head = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return gzip.compress(head + (bytes(int(np.prod(shape))) if data is None else data))


IDX = "train-images-idx3-ubyte"
hang("a gzip bomb for MNIST", IDX, mnist(gzip.compress(bytes(10**8)) * 40))
hang("a gzip cut short for MNIST", IDX, mnist(idx(1, 28, 28)[:30]))
hang("a tar for MNIST", IDX, mnist(tar(member("x"))))
hang("IDX with a header alone", IDX, mnist(idx(2**31, 2**31, 2**31, data=b"")))
hang("IDX of 255 axes", IDX, mnist(gzip.compress(b"\0\0\x08\xff")))
hang("IDX cut in its header", IDX, mnist(gzip.compress(b"\0\0\x08\x03\0\0")))
hang("IDX without images", "no image", mnist(idx(0, 28, 28), idx(0)))
hang("IDX with images of nothing", IDX, mnist(idx(1, 0, 28)))
hang("IDX with one label too many", "labels-idx1", mnist(idx(1, 28, 28), idx(2)))
hang("IDX with a class that is none", "class 200", mnist(idx(1, 28, 28), idx(1, data=b"\xc8")))


@bad("cifar-10-batches-py lacks files")
def a_truncated_tar_for_cifar(place: Place) -> list[str]:
    (place.beside / "cifar-10-python.tar.gz").write_bytes(tar(member("../escaped"))[:50])
    return ["data", "pack", "cifar10", f"data.root={place.beside}"]


@bad("cifar-10-batches-py lacks files")
def pickles_for_cifar(place: Place) -> list[str]:
    folder = place.beside / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb(place.beside / "executed")))
    return ["data", "pack", "cifar10", f"data.root={place.beside}"]


def npy(dtype: str, *shape: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with path.open("wb") as out:
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            if dtype == "|O":
                pickle.dump([Bomb(path.with_name("executed"))], out)

    return write


# What is packed can be packed again, so damage to it is mended rather than refused.
PACKED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "objects for images": ("train/images.npy", npy("|O", 1)),
    "objects for labels": ("train/labels.npy", npy("|O", 1)),
    "images of 10^9 elements": ("train/images.npy", npy("|u1", 10**9, 1, 1, 1)),
    "labels of 10^12 elements": ("train/labels.npy", npy("<i8", 10**12)),
    "a header that is code": ("train/images.npy", written("\x93NUMPY\1\0\x10\0__import__('os')")),
    "a fifo for labels": ("train/labels.npy", os.mkfifo),
    "facts of brackets": ("facts.json", written("[" * 100_000)),
    "facts that are a list": ("facts.json", written("[1]")),
    "facts with a path for a part": ("facts.json", written('{"parts": {"../..": {}}}')),
}


@pytest.mark.parametrize("name", some(PACKED))
def test_damaged_packs_are_packed_anew(name: str, place: Place, zygote: Zygote) -> None:
    data = next((place.root / "packed").glob("digits-*"))
    whole = json.loads((data / "facts.json").read_text())
    file, damage = PACKED[name]
    (data / file).unlink()
    damage(data / file)
    words = ["data", "inspect", "digits", "--json"]
    done = zygote.start(*words, root=place.root, before=LIMITS, env=OFFLINE).wait()
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) <= 1
    assert json.loads(done.stdout)["fingerprint"] == whole["fingerprint"]
    assert not list(place.root.rglob("executed"))


# Options

BESIDE = ("no.png", "no2.png", "good.png", "secret", "secret/x")
for line, says in (
    ("--n 0", "--n"),
    ("--n -1", "--n"),
    ("--n one", "--n"),
    ("--n 99999999999", "--n"),
    ("--n 2 --seeds 1", "--seeds 1 names 1"),
    ("--steps 0", "--steps"),
    ("--steps 1001", "1001 sampling steps"),
    ("--steps 99999999999", "expected 1 to 100,000 steps"),
    ("--batch-size 0", "--batch-size"),
    ("--seed -1", "--seed"),
    ("--seed 4294967296", "--seed"),
    ("--seeds 5-1", "0 images"),
    ("--seeds 0-99999999999", "more than 10,000,000 images"),
    ("--seeds 0-99999999999999999999", "below 2^63"),
    ("--seeds 1,,2", "expected numbers and ranges"),
    ("--seeds -5", "expected numbers and ranges"),
    ("--seeds ²", "expected numbers and ranges"),
    ("--seeds " + "9" * 5000, "below 2^63"),
    ("--class 12", "there are 0, 1"),
    ("--guidance nan", "--guidance nan"),
    ("--guidance strong", "there is no guidance 'strong'"),
    ("--guidance 'projected scale=2 norm=0'", "norm"),
    ("--guidance '2 rescale=7'", "rescale"),
    ("--guidance '2 name=5'", "name"),
    ("--guidance '2 sigma_min=nan'", "sigma_min"),
    ("--guide-by nonsense --guidance 2", "nonsense"),
    ("--guide-by abcdef:latest --guidance 2", "no run 'abcdef'"),
    ("--guide-by abcdef --guidance 2", "abcdef:latest"),
    ("--guide-by ../x:latest --guidance 2", "no folder '../x'"),
    ("--checkpoint ../x", "has no checkpoint '../x'"),
    ("--checkpoint -1", "has no checkpoint '-1'"),
    ("--checkpoint ²", "has no checkpoint '²'"),
    ("--checkpoint " + "9" * 5000, "has no checkpoint"),
    ("--checkpoint best", "has no checkpoint 'best'"),
    ("--weights rotten", "--weights"),
    ("--device quantum", "device=quantum"),
    ("--device cuda:99", "device=cuda:99"),
    ("--solver heum", "did you mean heun"),
    ("--solver ' '", "--solver"),
    ("--solver 'heun churn'", "is not `key=value`"),
    ("--solver 'heun churn=many'", "churn"),
    ("--solver 'heun churn=-40'", "churn"),
    ("--solver 'heun name=euler'", "name"),
    ("--solver 'heun churn=1 churn=2'", "each key=value once"),
    ("--solver os.system", "there is no solver 'os.system'"),
    ("--solver ../heun", "is not a name"),
    ("--solver 'ddim eta=5'", "eta: expected 0 to 1, not 5"),
    ("--solver 'ddim eta=nan'", "eta"),
    ("--solver 'adaptive rtol=-1'", "rtol"),
    ("--solver 'adaptive max_evaluations=0'", "max_evaluations"),
    ("--solver 'dpmpp_sde r=0'", "r: expected above 0"),
    ("--solver 'dpmpp_sde noise_scale=-1'", "noise_scale"),
    ("--solver 'dpmpp_2m_sde eta=-1'", "eta"),
    ("--solver 'euler_ancestral eta=inf'", "eta"),
    ("--solver 'ancestral variance=3'", "variance"),
    ("--solver 'predictor_corrector snr=0'", "snr"),
    ("--solver 'predictor_corrector corrections=-1'", "corrections"),
    ("--solver 'unipc order=9'", "order"),
    ("--grid karas", "did you mean karras"),
    ("--grid 'karras rho=nan'", "rho"),
    ("--grid 'stops ratios=[]'", "ratios"),
    ("--threshold 'dynamic_thresholding percentile=nan'", "percentile"),
    ("--strength 0.5", "needs --input"),
    ("--jump 2", "add --mask"),
    ("--input no.png", "no.png"),
    ("--input good.png --strength nan", "--strength"),
    ("--input good.png --mask no.png", "no.png"),
    ("--input good.png --reconstruct --strength 1", "do not go together"),
    ("--input good.png --guidance 3", "--class"),
    ("--interpolate 3", "two numbers"),
    ("--interpolate 3,", "two numbers"),
    ("--interpolate 3,foo.png", "two numbers"),
    ("--interpolate 3,4", "add --class"),
    ("--interpolate 3,99999999999999999999", "below 2^63"),
    ("--interpolate 3," + "9" * 5000, "below 2^63"),
    ("--interpolate no.png,no2.png", "no.png"),
    ("--output-dir secret", "secret"),
    ("--output-dir secret/x", "secret"),
    ("--output-dir /proc/nope", "/proc/nope"),
    ("--root secret", "secret"),
    ("--nonsense", "--nonsense"),
    ("extra", "extra"),
):

    def _sample(place: Place, line: str = line) -> list[str]:
        good(place)
        given = (str(place.beside / w) if w in BESIDE else w for w in shlex.split(line))
        return place.sample(*given)

    hang(f"sample {line[:60]}", says, _sample)

for words, says in (
    (["resume", "ID", "threshold=none"], "sampling.threshold"),
    (["resume", "ID", "training.label_dropout=0"], "training.label_dropout"),
    (["resume", "ID", "solver=heun"], "solver"),
    (["resume", "ID", "model.base_channels=32"], "cannot become 32"),
    (["resume", "ID", "training.images=96", "training.images=soon"], "training.images"),
    (["train", "sampling.solver=heun"], "solver=heun"),
    (["train", "schedule=heun"], "there is no such schedule"),
    (["train", "sampling.solver.eta=nan", "solver=ddim"], "eta"),
    (["train", "seed=4294967296"], "seed"),
    (["train", "seed=0x"], "seed"),
    (["train", "seed=[1,2]"], "seed"),
    (["train", "seed={a:1}"], "seed"),
    (["train", "seed=${oc.env:HOME}"], "${"),
    (["train", "name=${oc.env:HOME}"], "${"),
    (["train", "name=" + "x" * 300], "name"),
    (["train", "training.batch_size=99999999999999"], "batch_size"),
    (["train", "model={name: os.system}"], "os.system"),
    (["train", "model.name=rediffuse.cli.main"], "rediffuse.cli.main"),
    (["train", "data.name=os.system"], "os.system"),
    (["train", "+seed=1"], "seed"),
    (["train", "seed"], "is not `key=value`"),
    (["train", "=1"], "`key=value`"),
    (["train", "a.b.c=1"], "a.b.c"),
    (["train", "seed.x=1"], "seed.x"),
    (["train", "--\udcff=1"], "\\udcff"),
    (["train", "näme=1"], "n"),
    (["train", "training.epochs=1e400"], "epochs"),
    (["train", "training.epochs=nan"], "epochs"),
    (["train", "experiment=../../etc/passwd"], "experiment"),
    (["train", "hydra.run.dir=/tmp/x"], "hydra"),
    (["train", "hydra/launcher=basic"], "hydra"),
    (["train", "data=digits", "data=folder"], "data"),
    (["train", "-m", "seed=1,"], "seed"),
    (["train", "-m", "seed=range(1,99999999)"], "seed"),
    (["train", "--config", "/dev/zero"], "/dev/zero"),
    (["train", "--config", "/"], "/"),
    (["train", "--trust"], "--trust"),
    (["train", "data=folder", "data.path=/dev/null"], "/dev/null"),
    (["train", "data=folder", "data.path=a\0b"], "data.path"),
    (["train", "data=folder", "data.path=~nobody-at-all"], "nobody-at-all"),
    (["data", "pack", "a'b/c"], "a'b/c"),
    (["data", "pack", "digits", "--out", "/proc/nope/x"], "/proc/nope/x"),
    (["data", "pack", "digits", "data.image_size=100000"], "image_size"),
    (["data", "inspect", ""], "data"),
    (["reproduce", "../.."], "is not a run id"),
    (["reproduce", "ID", "--steps", "0"], "--steps"),
    ([""], "No such command"),
    (["--help=1"], "--help"),
):
    hang(
        " ".join(words)[:60],
        says,
        lambda place, words=words: [place.run.name if w == "ID" else w for w in words],
    )


@pytest.mark.parametrize("name", some(GALLERY))
def test_bad_input_is_refused_in_one_line_and_harms_nothing(
    name: str, place: Place, zygote: Zygote
) -> None:
    make, says = GALLERY[name]
    words = make(place)
    before = list(everything(place.beside))
    done = zygote.start(*words, root=place.root, before=LIMITS, env=OFFLINE).wait()
    refused(done, says)
    assert list(everything(place.beside)) == before
    assert sorted(path.name for path in place.root.parent.iterdir()) == ["beside", "root"]
