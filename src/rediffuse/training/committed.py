"""The files of checkpoints: committed by one rename, verified, found, let go; no tensor is read.

    checkpoints/step-00012000/   named by optimizer steps
        model.safetensors  average.safetensors  optimizer.safetensors  state.json
        learned.safetensors      of a schedule, weighting or times that learn
        manifest.json            sizes and SHA-256 of the others, written last

A folder without a manifest that verifies is not a checkpoint.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count as counting
from pathlib import Path
from typing import Any
from uuid import uuid4

from rediffuse.errors import CheckpointError, TrainingError
from rediffuse.reading import decoded_object, open_regular, read_bytes

FORMAT = 2
STATE, LEARNED = "state.json", "learned.safetensors"
WEIGHTS = {"average": "average.safetensors", "raw": "model.safetensors"}
SKIPPED = ("skipped_steps", "skipped_in_a_row")
_MANIFEST, _MANIFEST_BYTES, _STATE_BYTES = "manifest.json", 1_000_000, 1_000_000


def commit(
    folder: Path, step: int, contents: Mapping[str, Callable[[], bytes]], bytes_needed: int
) -> Path:
    """Write the files of a checkpoint below `folder`; it is there completely or not at all.

    The file protocol (Pillai et al. 2014): unique temporary directory beside the final place, every
    file synced, manifest last, one rename, parent synced. One file is in memory at a time.

    Raises:
        TrainingError: if there is no room for it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            raise OSError("No space left on device")
        return _commit(folder / f"step-{step:08d}", contents)
    except OSError as failed:
        raise TrainingError(
            f"no checkpoint could be written in {folder}: {failed.strerror or failed} "
            f"({bytes_needed:,} bytes needed, {_free(folder)} free); the one before is untouched"
        ) from failed


def newest(
    folder: Path, tell: Callable[[str], None] = lambda line: None, *, set_aside: bool = True
) -> Path | None:
    """The newest checkpoint that verifies, or None if there never was one.

    Broken ones are named, and set aside by whoever may write the run.

    Raises:
        CheckpointError: if there are checkpoints and none of them verifies.
    """
    tried = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as refused:
            tried.append(str(refused))
            moved = f"set aside as {_set_aside(checkpoint).name}, " if set_aside else ""
            tell(f"{refused}; {moved}trying the one before")
        else:
            return checkpoint
    aside = [f"{c.name} was set aside" for c in sorted(folder.glob("step-*.corrupt*"))]
    if tried or aside:
        raise CheckpointError(
            f"no checkpoint in {folder} verifies ({'; '.join(tried or aside)}); put one of them "
            "back from a copy, or start a new run"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Every committed checkpoint, oldest first."""
    return sorted(c for c in folder.glob("step-*") if c.name[5:].isdecimal() and not c.is_symlink())


def facts(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says: images seen, losses, counters.

    Raises:
        CheckpointError: if it is not what was written.
    """
    expected = _manifest(checkpoint)[STATE]["sha256"]
    try:
        text = read_bytes(checkpoint / STATE, _STATE_BYTES)
        if hashlib.sha256(text).hexdigest() == expected:
            read = decoded_object(text, finite=False)  # a loss may have been infinite
            counted = (read[name] for name in ("images_seen", "step", *SKIPPED))
            if all(type(n) is int and n >= 0 for n in counted) and _are_metrics(read["metrics"]):
                return read
    except (OSError, ValueError, KeyError):
        pass
    raise CheckpointError(f"{checkpoint.name}: its {STATE} is damaged")


def verify(checkpoint: Path) -> set[str]:
    """Hold every file to the manifest's size and SHA-256; return their names.

    Other files are no part of the checkpoint, and are not to be read.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    files = _manifest(checkpoint)
    for name, entry in files.items():
        file = checkpoint / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{checkpoint.name}: {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{checkpoint.name}: {name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint.name}: {name} is damaged (SHA-256 differs)")
    return set(files)


def retain(
    folder: Path,
    latest: int,
    tell: Callable[[str], None] = lambda line: None,
    *,
    every_images: int | None = None,
    metric: str = "validation/loss",
) -> None:
    """Remove old checkpoints, once the newest one verifies.

    Kept are the newest `latest`, the one with the lowest `metric`, and the first one after each
    multiple of `every_images`. What cannot be removed is told, and tried again the next time.

    Raises:
        CheckpointError: if the newest one does not verify.
    """
    there = checkpoints(folder)
    verify(there[-1])
    kept = {*there[-latest:], best(folder, metric)}
    if every_images:
        first: dict[int, Path] = {}
        for checkpoint, saved in _all_facts(folder).items():
            first.setdefault(saved["images_seen"] // every_images, checkpoint)
        first.pop(0, None)
        kept |= set(first.values())
    trash = [left for left in folder.glob(f"{_TRASH}*") if LEFT_OVER.fullmatch(left.name)]
    for old in (*trash, *(old for old in there if old not in kept)):
        try:
            _remove(old)
        except OSError as failed:
            tell(
                f"{old} could not be removed ({failed.strerror or failed}); it is tried again "
                "after the next checkpoint"
            )


def best(folder: Path, metric: str = "validation/loss") -> Path | None:
    """The checkpoint with the lowest of a metric, if any has measured it."""
    measured = {
        checkpoint: saved["metrics"].get(metric, math.nan)
        for checkpoint, saved in _all_facts(folder).items()
    }
    return min(
        (c for c, value in measured.items() if math.isfinite(value)),
        key=measured.__getitem__,
        default=None,
    )


def digest_of_weights(checkpoint: Path, weights: str) -> str:
    """The SHA-256 that the manifest gives to the file of these weights.

    Raises:
        CheckpointError: if there is no such file.
    """
    try:
        return str(_manifest(checkpoint)[WEIGHTS[weights]]["sha256"])
    except KeyError:
        raise CheckpointError(f"{checkpoint} keeps no {weights} weights") from None


def copy_for_sampling(checkpoint: Path, folder: Path) -> Path:
    """Copy the average, or the weights where none is kept, and what was learned beside them.

    Raises:
        CheckpointError: if what was copied does not verify.
    """
    files = _manifest(checkpoint)
    weights = "average.safetensors" if "average.safetensors" in files else "model.safetensors"
    kept = {name: files[name] for name in (weights, LEARNED, STATE) if name in files}
    copy = folder / checkpoint.name
    copy.mkdir()
    for name in kept:
        shutil.copyfile(checkpoint / name, copy / name)
    _write(copy / _MANIFEST, json_bytes({"format": FORMAT, "files": kept}))
    verify(copy)
    return copy


def json_bytes(value: Any) -> bytes:
    """The one way in which a checkpoint's JSON is written."""
    return json.dumps(value, indent=1).encode()


def _commit(final: Path, contents: Mapping[str, Callable[[], bytes]]) -> Path:
    prefix = f".building-{final.name.removeprefix('step-')}-"
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        building.chmod(0o777 & ~_umask())
        files = {name: _write(building / name, made()) for name, made in contents.items()}
        _write(building / _MANIFEST, json_bytes({"format": FORMAT, "files": files}))
        _sync(building)
        if final.exists():  # a resumed run walks over the same steps again
            _put_into_trash(final)
        building.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return final


_TRASH = ".trash-"
LEFT_OVER = re.compile(r"\.building-\d+-\w{8}|\.trash-step-\d+(-[0-9a-f]{32})?")
"""Names of folders that a killed process left beside checkpoints, half written or half removed."""


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is none any more once its removal has begun."""
    if not checkpoint.name.startswith(_TRASH):
        checkpoint = _put_into_trash(checkpoint)
    shutil.rmtree(checkpoint)


def _put_into_trash(checkpoint: Path) -> Path:
    """Rename it to a free name; its removal may have failed before under another one."""
    return checkpoint.rename(checkpoint.with_name(f"{_TRASH}{checkpoint.name}-{uuid4().hex}"))


def _all_facts(folder: Path) -> dict[Path, dict[str, Any]]:
    """The facts of every checkpoint whose own are not damaged, oldest first."""
    known = {}
    for checkpoint in checkpoints(folder):
        with suppress(CheckpointError):
            known[checkpoint] = facts(checkpoint)
    return known


def _manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file; it is itself held to the one way to write it."""
    try:
        raw = read_bytes(checkpoint / _MANIFEST, _MANIFEST_BYTES)
        manifest = decoded_object(raw)
        if manifest["format"] != FORMAT:
            other = str(manifest["format"])[:80]
            raise CheckpointError(
                f"{checkpoint.name}: format {other}, but this version reads {FORMAT}"
            )
        names = set(manifest["files"])
        if raw == json_bytes(manifest) and STATE in names and names & {*WEIGHTS.values()}:
            files: dict[str, dict[str, Any]] = manifest["files"]
            return {name: {"bytes": f["bytes"], "sha256": f["sha256"]} for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{checkpoint.name}: its manifest cannot be read")


def _are_metrics(found: Any) -> bool:
    return isinstance(found, dict) and all(type(value) in (int, float) for value in found.values())


def _set_aside(checkpoint: Path) -> Path:
    """Rename a broken checkpoint to a name that is free; nothing is ever deleted."""
    names = (f"{checkpoint.name}.corrupt{number or ''}" for number in counting())
    aside = next(a for a in map(checkpoint.with_name, names) if not a.exists())
    return checkpoint.rename(aside)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _write(file: Path, data: bytes) -> dict[str, Any]:
    """Write and sync a file; return what the manifest says of it."""
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sha256(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
