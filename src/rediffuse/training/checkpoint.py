"""Checkpoints: safetensors and JSON, committed by one rename.

    checkpoints/step-00012000/   named by optimizer steps
        model.safetensors  average.safetensors  optimizer.safetensors  state.json
        learned.safetensors      of a schedule, weighting or times that learn
        manifest.json            sizes and SHA-256 of the others, written last

A folder without a manifest that verifies is not a checkpoint.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rediffuse.errors import CheckpointError
from rediffuse.training.state import Sums, TrainState

FORMAT = 1
_MANIFEST, _LEARNED = "manifest.json", "learned.safetensors"


def save_checkpoint(state: TrainState, folder: Path, step: int) -> Path:
    """Write the whole state below `folder`; it is there completely or not at all.

    The file protocol (Pillai et al. 2014): unique temporary directory beside the final place, every
    file synced, manifest last, one rename, parent synced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    building = Path(tempfile.mkdtemp(prefix=f".building-{step:08d}-", dir=folder))
    building.chmod(0o777 & ~_umask())
    try:
        files = {name: make() for name, make in _files(state).items()}
        manifest = {
            "format": FORMAT,
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            },
        }
        for name, data in {**files, _MANIFEST: _json(manifest)}.items():
            _write(building / name, data)
        _sync(building)
        if final.exists():  # a resumed run walks over the same steps again
            shutil.rmtree(final)
        building.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return final


def load_checkpoint(state: TrainState, checkpoint: Path) -> None:
    """Bring a freshly built state to where the checkpoint was.

    Raises:
        CheckpointError: if the checkpoint does not verify, or was made by another network.
    """
    verify(checkpoint)
    saved = json.loads((checkpoint / "state.json").read_text())
    _load_module(state.network, checkpoint / "model.safetensors")
    if state.average and (checkpoint / "average.safetensors").exists():
        _load_module(state.average.network, checkpoint / "average.safetensors")
    if state.learned:
        _load_module(state.learned, checkpoint / _LEARNED)
    _load_optimizer(state, load_file(checkpoint / "optimizer.safetensors"))
    if state.scaler and saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])
    for name in _COUNTERS:
        setattr(state, name, saved[name])
    state.since_log = Sums.from_json(saved["since_log"])
    state.this_epoch = Sums.from_json(saved["this_epoch"])


def load_weights(network: nn.Module, checkpoint: Path, weights: str = "average") -> str:
    """Load only what sampling needs: the average, or the `raw` weights; return which it was.

    Raises:
        CheckpointError: if the checkpoint does not verify, does not fit, or has no average.
    """
    verify(checkpoint)
    file = {"average": "average.safetensors", "raw": "model.safetensors"}[weights]
    if not (checkpoint / file).exists():
        raise CheckpointError(f"{checkpoint} keeps no average; use --weights raw")
    _load_module(network, checkpoint / file)
    return weights


def load_schedule(schedule: nn.Module, checkpoint: Path) -> None:
    """Load a schedule that was learned with the network, from a checkpoint that has verified.

    Raises:
        CheckpointError: if the checkpoint keeps none, or another one.
    """
    _load_module(schedule, checkpoint / _LEARNED, "schedule.")


def newest(folder: Path, tell: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint that verifies, or None if there never was one; broken ones go aside.

    Raises:
        CheckpointError: if there are checkpoints and none of them verifies.
    """
    tried = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as refused:
            aside = checkpoint.with_name(f"{checkpoint.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            tried.append(str(refused))
            tell(f"{refused}; set aside as {aside.name}, trying the one before")
        else:
            return checkpoint
    if tried or any(folder.glob("step-*.corrupt")):
        raise CheckpointError(f"no checkpoint in {folder} verifies: {'; '.join(tried)}")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Every committed checkpoint, oldest first."""
    return sorted(c for c in folder.glob("step-*") if c.name[5:].isdigit() and not c.is_symlink())


def facts(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` says: images seen, losses, counters."""
    read: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return read


def verify(checkpoint: Path) -> None:
    """Hold every file to the manifest's size and digest.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        listed = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{checkpoint.name}: format {manifest['format']}, but this version reads {FORMAT}"
            )
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{checkpoint.name}: its manifest cannot be read") from None
    for name, entry in listed.items():
        file = checkpoint / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{checkpoint.name}: {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{checkpoint.name}: {name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            )
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{checkpoint.name}: {name} is damaged (SHA-256 differs)")


def retain(folder: Path, latest: int) -> None:
    """Remove old checkpoints but the newest `latest` and the best, once the newest one verifies."""
    kept = checkpoints(folder)
    verify(kept[-1])
    spared = best(folder)
    for old in kept[:-latest]:
        if old != spared:
            doomed = old.with_name(f".trash-{old.name}")
            old.rename(doomed)
            shutil.rmtree(doomed)
    for left in (*folder.glob(".trash-*"), *folder.glob(".building-*")):
        shutil.rmtree(
            left, ignore_errors=True
        )  # what a killed process left; the run's lock is ours


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, if any was measured."""
    measured = {c: facts(c)["validation_loss"] for c in checkpoints(folder)}
    return min(
        (c for c, loss in measured.items() if loss is not None),
        key=measured.__getitem__,
        default=None,
    )


_COUNTERS = (
    "images_seen",
    "skipped_steps",
    "skipped_in_a_row",
    "validation_loss",
    "best_loss",
    "checks_since_best",
)


def _files(state: TrainState) -> dict[str, Callable[[], bytes]]:
    files = {
        "model.safetensors": lambda: save(_contiguous(state.network.state_dict())),
        "optimizer.safetensors": lambda: save(_contiguous(_optimizer_tensors(state))),
        "state.json": lambda: _json(
            {
                **{name: getattr(state, name) for name in _COUNTERS},
                "scaler": state.scaler.state_dict() if state.scaler else None,
                "since_log": state.since_log.as_json(),
                "this_epoch": state.this_epoch.as_json(),
            }
        ),
    }
    if state.average:
        average = state.average.network
        files["average.safetensors"] = lambda: save(_contiguous(average.state_dict()))
    if state.learned:
        files[_LEARNED] = lambda: save(_contiguous(state.learned.state_dict()))
    return files


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = _optimized(state)
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, values in state.optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Restore the moments only: rates, betas and decay are what the config says now."""
    index = {name: index for index, name in enumerate(_optimized(state))}
    moments: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        if name not in index:
            raise CheckpointError(f"the optimizer's {full} belongs to no parameter of this network")
        moments.setdefault(index[name], {})[key] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _optimized(state: TrainState) -> list[str]:
    """The names of the optimizer's parameters, in its own order."""
    named = (*state.network.named_parameters(), *state.learned.named_parameters("learned"))
    names = {id(parameter): name for name, parameter in named}
    return [names[id(p)] for group in state.optimizer.param_groups for p in group["params"]]


def _load_module(module: nn.Module, file: Path, prefix: str = "") -> None:
    if not file.exists():
        raise CheckpointError(f"{file} is missing: this checkpoint was made by another recipe")
    saved, wanted = load_file(file), module.state_dict()
    tensors = {n.removeprefix(prefix): value for n, value in saved.items() if n.startswith(prefix)}
    if differing := sorted(set(tensors) ^ set(wanted)):
        raise CheckpointError(f"{file}: made by another network ({differing[0]} is in one only)")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise CheckpointError(
                f"{file}: {name} is {tuple(tensor.shape)} {tensor.dtype}, but the network has "
                f"{tuple(wanted[name].shape)} {wanted[name].dtype}"
            )
    module.load_state_dict(tensors)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


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
