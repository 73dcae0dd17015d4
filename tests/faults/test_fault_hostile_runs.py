"""A stranger's run: every file of it, damaged in every way, under every command.

Each case is refused in one line, or the command does without the file. Nothing hangs, ends in a
traceback, takes gigabytes, or brings a control character to the terminal.
"""

import json
import os
import shutil
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import TINY, run_id
from faults_harness import Done, Zygote
from PIL import Image

from rediffuse.training.committed import FORMAT
from rediffuse.words import visible_lines

OTHER = "f" * 32  # a second run, of another network
SMALL = (
    *TINY,
    "model.base_channels=8",
    "model.norm.groups=4",
    "model.channel_multipliers=[1]",
    "model.attention_resolutions=[]",
    "training.images=96",
    "training.preview_count=2",
    "training.validation_images=8",
    "training.batch_size=24",
    "training.preview_every_images=48",
    "rate.warmup_images=24",
)
PASSES = ("--n", "16", "--steps", "1")

STUDIO = """
import sys
from pathlib import Path
from rediffuse.errors import RediffuseError
from rediffuse.studio import shelf
from rediffuse.words import say
root = Path.cwd()
try:
    say(repr(shelf.run_choices(root)))
    say(repr(shelf.card(root, RUN)))
    say(repr(shelf.training(shelf.card(root, RUN).run)))
    shelf.mark(shelf.card(root, RUN).run)
except RediffuseError as refused:
    say(str(refused))
sys.argv[1:] = ["--help"]
"""
COMPLETION = {
    "_REDIFFUSE_COMPLETE": "bash_complete",
    "COMP_WORDS": "rediffuse show ",
    "COMP_CWORD": "2",
}
VERBS: dict[str, tuple[str, ...]] = {
    "runs": ("runs",),
    "show": ("show", "RUN"),
    "show --json": ("show", "RUN", "--json"),
    "resume": ("resume", "RUN", "training.images=144"),
    "resume finished": ("resume", "RUN"),
    "sample": ("sample", "RUN", "--n", "1", "--steps", "1"),
    "sample best": ("sample", "RUN", "--n", "1", "--steps", "1", "--checkpoint", "best"),
    "evaluate": ("evaluate", "RUN", *PASSES, "--allow-small-n"),
    "sweep": ("sweep", "RUN", *PASSES, "--solver", "ddim", "--allow-small-n"),
    "memorisation": ("memorisation", "RUN", *PASSES),
    "diagnose": ("diagnose", "RUN", "--n", "16"),
    "report": ("report", "RUN", "--no-images"),
    "compare": ("compare", "RUN", OTHER, "--no-images"),
    "compare second": ("compare", OTHER, "RUN", "--no-images", "--json"),
    "reproduce": ("reproduce", "RUN", "--steps", "1"),
    "studio": (),
    "completion": (),
}
QUICK = [
    v for v in VERBS if v not in ("evaluate", "sweep", "memorisation", "diagnose", "reproduce")
]

# Run in each child before its command: memory is bounded to 2 GiB beyond what imports took, a
# command that computes for ever is killed, and what it took is written down.
LIMITS = """
import atexit, os, resource
pages = int(open('/proc/self/statm').read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (30, 31))
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def told():
    took = resource.getrusage(resource.RUSAGE_SELF)
    with open(USAGE, "w") as file:
        file.write(f"{took.ru_utime + took.ru_stime} {took.ru_maxrss - resident}")
atexit.register(told)
"""
# The same, to find out which files a command opens.
AUDIT = """
import sys
log = open(USAGE, "a")
def look(event, given):
    if event == "open" and isinstance(given[0], str | bytes | os.PathLike) and not log.closed:
        log.write(os.fsdecode(given[0]) + chr(10))
        log.flush()
import os
sys.addaudithook(look)
"""


@dataclass(frozen=True)
class Place:
    """A root with a run that all commands work on, and one more."""

    root: Path
    run: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One file, damaged in one way, under one command."""

    verb: str
    file: str
    damage: str

    def __str__(self) -> str:
        return f"{self.verb} with {self.damage} in place of {self.file}"

    @property
    def digest(self) -> int:
        """A number that decides what is drawn, and where a file is changed."""
        return zlib.crc32(str(self).encode())


# Damages


def fifo(path: Path, case: Case) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path, case: Case) -> None:
    """An endless one where we may make it, else a socket."""
    path.unlink()
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        os.mknod(path, 0o666 | stat.S_IFSOCK)


def link(path: Path, case: Case) -> None:
    path.rename(beside := path.parents[len(Path(case.file).parts)] / "beside")
    path.symlink_to(beside)


def endless_link(path: Path, case: Case) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path, case: Case) -> None:
    path.unlink()
    path.mkdir()


def truncated(path: Path, case: Case) -> None:
    size = path.stat().st_size
    os.truncate(path, case.digest % max(1, size))


def not_utf8(path: Path, case: Case) -> None:
    data = path.read_bytes()
    half = case.digest % (len(data) or 1)
    path.write_bytes(data[:half] + b"\xff\xfe\xed\xa0\x80" + data[half:])


def of_another_run(path: Path, case: Case) -> None:
    """The same file of the other run, or one like it, or nothing where it has none."""
    other = path.parents[len(Path(case.file).parts)] / OTHER
    like = sorted(other.rglob(f"*{path.suffix}" if path.suffix else path.name))
    same = [file for file in like if file.name == path.name]
    if same or like:
        shutil.copyfile((same or like)[-1], path)


def noise(path: Path, case: Case) -> None:
    path.write_bytes(struct.pack("<Q", 50) + bytes(range(256)) * 40)


PLAIN: dict[str, Callable[[Path, Case], object]] = {
    "nothing": lambda path, case: path.unlink(),
    "an empty file": lambda path, case: os.truncate(path, 0),
    "a FIFO": fifo,
    "a device": device,
    "a link": link,
    "a link to a device": endless_link,
    "a folder": folder,
    "a sparse file": lambda path, case: path.unlink() or path.touch() or os.truncate(path, 2**40),
    "zeros after its end": lambda path, case: os.truncate(path, 2**36),
    "the file cut short": truncated,
    "bytes that are not UTF-8": not_utf8,
    "another run's file": of_another_run,
    "noise": noise,
}

ESCAPES = "\x1b[2J\x1b]0;title\x07\u202eevil\r\nerror: forged\x7f\x9b1m"
VALUES: dict[str, list[Any]] = {
    "deep nesting": ["[" * n + "]" * n for n in (90, 150, 900, 100_000)],
    "a huge number": ["1" + "0" * 400, str(2**64), "1e308", "-" + "9" * 19, "9" * 5000],
    "another type": ["[1]", '{"a": 1}', '"text"', "7", "null", "true", "-1", "0.5", "[]", '""'],
    "what is not finite": ["NaN", "Infinity", "-Infinity", "1e999", '"nan"', '"inf"'],
    "escape sequences": [json.dumps(ESCAPES)],
    "half a character": [r'"\ud83d"'],
}


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in plain data but its root."""
    inside = {dict: dict.items, list: enumerate}.get(type(tree))
    for key, value in inside(tree) if inside else ():
        yield (*path, key)
        yield from nodes(value, (*path, key))


def changed(tree: Any, where: int, key: bool) -> Any:
    """Plain data with a mark in place of some value, or of its key."""
    there = list(nodes(tree))
    if not there:
        return MARK
    *above, last = there[where % len(there)]
    at = tree
    for step in above:
        at = at[step]
    if key and isinstance(at, dict):
        at[MARK] = at.pop(last)
    else:
        at[last] = MARK
    return tree


MARK = "put the value here"


def with_value(path: Path, value: str, where: int, key: bool) -> bool:
    """Write a value, or a key, somewhere into a file of JSON, JSON lines or YAML."""
    try:
        if path.suffix == ".yaml":
            tree = yaml.safe_load(path.read_text())
            text = yaml.safe_dump(changed(tree, where, key), width=10**6)
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            at = where % len(lines)
            lines[at] = json.dumps(changed(json.loads(lines[at]), where // len(lines), key))
            text = "".join(f"{line}\n" for line in lines)
        else:
            text = json.dumps(changed(json.loads(path.read_text()), where, key), indent=1)
    except (ValueError, ZeroDivisionError):  # .owner, and logs without a line
        return False
    quoted = f'"{MARK}"' if f'"{MARK}"' in text else MARK
    path.write_text(text.replace(quoted, value))
    return True


def of_values(path: Path, case: Case) -> bool:
    some = VALUES[case.damage.rpartition(" ")[0]]
    key = case.damage.startswith(("escape", "half")) and bool(case.digest & 1)
    return with_value(path, some[case.digest % len(some)], case.digest // 16, key)


def picture(path: Path, case: Case) -> bool:
    """A small file of 64 million pixels, all equal."""
    if path.suffix == ".png":
        Image.new("L", (8000, 7999)).save(path, compress_level=1)
    return path.suffix == ".png"


VARIANTS = 2  # places in a file, and values, for each kind of value
CHANGES = [f"{kind} {k}" for kind in VALUES for k in range(VARIANTS)]
DAMAGES = [*PLAIN, *CHANGES, "64 million pixels"]
SEALED = "sealed "  # the manifest of the checkpoint is written anew after the damage


def do(case: Case, run: Path) -> bool:
    """Damage a file; False where it cannot be damaged in this way."""
    path = run / case.file.removeprefix(SEALED)
    if case.damage in PLAIN:
        PLAIN[case.damage](path, case)
    elif not (picture if case.damage == "64 million pixels" else of_values)(path, case):
        return False
    if case.file.startswith(SEALED):
        seal(path.parent)
    return True


def seal(checkpoint: Path) -> None:
    """Write the manifest anew, as somebody would who wants the damage to be believed."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(checkpoint.iterdir())
        if file.name != "manifest.json" and file.is_file() and file.stat().st_size < 10**8
    }
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (checkpoint / "manifest.json").write_text(text)


def sha256(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


# Runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Place:
    """A run that was resumed with a change and sampled, with one of every file that a run has."""
    root = tmp_path_factory.mktemp("small")
    words = (*SMALL, "training.stop_after_images=48")
    run = root / run_id(zygote.run("train", *words, root=root, check=0))
    zygote.run("resume", run.name, "training.learning_rate=0.001", root=root, check=0)
    zygote.run("sample", run.name, "--n", "1", "--steps", "1", root=root, check=0)
    words = (*SMALL, "training.images=24", "model.base_channels=4", "training.previews=false")
    other = root / run_id(zygote.run("train", *words, "seed=1", root=root, check=0))
    other = other.rename(root / OTHER)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "id": OTHER}))
    row = json.dumps({"images": 48, "time": 1.0, "loss": 0.5}) + "\n"
    (run / "logs/undone.jsonl").write_text(row)
    (run / "logs/non_finite.jsonl").write_text(row)
    figure = {"figure": "fid_16", "name": "fid", "value": 1.5, "sd": None, "spread": None}
    figure |= {"floor": None, "card": {"digest": "0" * 16, "n": 16, "samples": {"told": "these"}}}
    (run / "evaluation").mkdir()
    (run / "evaluation/step-00000004-a.json").write_text(json.dumps({"figures": [figure]}))
    Image.new("L", (16, 16)).save(run / "evaluation/a.png")
    return placed(root, run)


@pytest.fixture(scope="module")
def whole(small: Place, zygote: Zygote) -> Place:
    """The same run with all that can be found out about it."""
    for verb in ("evaluate", "sweep", "memorisation", "diagnose", "report"):
        words = [small.run.name if word == "RUN" else word for word in VERBS[verb]]
        zygote.run(*words, root=small.root, check=0)
    return placed(small.root, small.run)


def placed(root: Path, run: Path) -> Place:
    files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())
    newest = max(file for file in files if file.startswith("checkpoints/")).rpartition("/")[0]
    inside = [f for f in files if f.startswith(newest) and not f.endswith("manifest.json")]
    return Place(root, run, (*files, *(SEALED + file for file in inside)))


def copied(place: Place, root: Path) -> Path:
    """The root with copies of its runs; packed images and what was learned of them are shared."""
    root.mkdir()
    for name in ("packed", "evaluation"):
        if (place.root / name).exists():
            (root / name).symlink_to(place.root / name)
    shutil.copytree(place.root / OTHER, root / OTHER)
    return shutil.copytree(place.run, root / place.run.name)


def start(case: Case, place: Place, root: Path, zygote: Zygote, before: str) -> Any:
    run = place.run.name
    words = [run if word == "RUN" else word for word in VERBS[case.verb]]
    prelude = f"USAGE = {str(root / 'usage')!r}\nRUN = {run!r}\n{before}"
    env = COMPLETION if case.verb == "completion" else {}
    if case.verb == "studio":
        prelude += STUDIO
    return zygote.start(*words, root=root, before=prelude, env=env)


def opened(place: Place, verb: str, root: Path, zygote: Zygote) -> set[str]:
    """The files of an undamaged run that a command opens, checkpoints always among them."""
    run = copied(place, root)
    done = start(Case(verb, "", ""), place, root, zygote, AUDIT).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [root / line for line in (root / "usage").read_text().splitlines()]
    inside = {p.relative_to(run).as_posix() for p in lines if p.is_relative_to(run)}
    return {f for f in place.files if f in inside or (inside and "checkpoints/" in f)}


# Verdicts


def what_is_wrong(case: Case, done: Done) -> str:
    """Why a command did not end as it should have, or nothing."""
    said = done.stdout + done.stderr
    if "Traceback" in said or "Error:" in said.replace("error:", ""):
        return f"traceback: {said.strip().splitlines()[-1][:300]}"
    if visible_lines(said) != said:
        return f"control characters: {said!r}"
    last = done.stderr.strip().splitlines()[-1:] or [""]
    if done.returncode == 2:
        return "" if last[0].startswith("error: ") and len(last[0]) < 2000 else f"no error: {said}"
    found_different = case.verb == "reproduce" and done.returncode == 1 and "FAIL" in done.stdout
    if done.returncode == 0 or found_different:
        return ""
    return f"exit code {done.returncode}: {said[-500:]}"


def tried(cases: list[Case], place: Place, tmp_path: Path, zygote: Zygote) -> list[str]:
    """Run cases, two at a time; print what came of them, and return what is wrong."""
    ended: Counter[str] = Counter()
    seconds, kilobytes, wrong = [0.0], [0.0], []
    under_way: list[tuple[Case, Path, Any]] = []
    for k, case in enumerate([*cases, None, None]):
        if case:
            root = tmp_path / str(k)
            if not do(case, copied(place, root)):
                ended["not possible"] += 1
                shutil.rmtree(root)
                continue
            under_way.append((case, root, start(case, place, root, zygote, LIMITS)))
        if under_way and (not case or len(under_way) > 1):
            ran, root, process = under_way.pop(0)
            try:
                done = process.wait(120)
            except AssertionError as hung:
                wrong.append(f"{ran}: hangs: {str(hung)[-200:]}")
                continue
            finally:
                used = root / "usage"
                took = used.read_text().split() if used.exists() else ["0", "0"]
                shutil.rmtree(root)
            if why := what_is_wrong(ran, done):
                wrong.append(f"{ran}: {why}")
            ended["refused" if done.returncode == 2 else "done without it"] += 1
            seconds.append(float(took[0]))
            kilobytes.append(float(took[1]))
    told = ", ".join(f"{count} {how}" for how, count in sorted(ended.items()))
    print(
        f"{cases[0].verb}: {told}, {len(wrong)} wrong; at most {max(seconds):.1f} s of computing "
        f"and {max(kilobytes) / 1e6:.2f} GB"
    )
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_file_is_refused_in_one_line_or_not_needed(
    verb: str, whole: Place, tmp_path: Path, zygote: Zygote
) -> None:
    read = opened(whole, verb, tmp_path / "undamaged", zygote)
    cases = [Case(verb, file, damage) for file in sorted(read) for damage in DAMAGES]
    assert tried(cases, whole, tmp_path, zygote) == []


DRAWN = 40


def test_damaged_files_are_refused_in_one_line_or_not_needed(
    small: Place, tmp_path: Path, zygote: Zygote
) -> None:
    """The same for some of the files, drawn by their digests."""
    cases = [Case(v, file, d) for v in QUICK for file in small.files for d in DAMAGES]
    drawn = sorted(cases, key=lambda case: case.digest)[:DRAWN]
    assert tried(drawn, small, tmp_path, zygote) == []
