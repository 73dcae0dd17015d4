"""Processes end and others go on: which changes keep every bit, and which keep all but rounding."""

import json
from itertools import product
from pathlib import Path

import pytest
from cli import TINY, run_id
from faults_harness import Zygote
from faults_runs import rows
from safetensors.torch import load_file
from torch import Tensor

from rediffuse.training.committed import checkpoints

# 12 steps over an epoch of 216; every stop is in mid-epoch, and 432 is where nothing else happens.
WORDS = (
    *TINY,
    "training.images=576",
    "training.previews=false",
    "training.log_every_images=144",
    "training.validate_every_images=240",
    "training.checkpoint_every_images=192",
    "data.flip=true",
)
STOPS = (144, 432, 576)
LEARNS = {
    "nothing else": (),
    "loss-aware times": ("times=loss_aware", "times.bins=5", "times.history=4"),
    "a learned schedule": ("schedule=learned",),
}
MATRIX = list(product(LEARNS, ("fp32", "bf16"), (1, 2), ((0, 1, 0), (1, 0, 1))))
FAST = ("loss-aware times", "fp32", 2, (0, 1, 0))


def last(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint."""
    return {f.name: f.read_bytes() for f in checkpoints(run / "checkpoints")[-1].iterdir()}


@pytest.mark.parametrize(
    ("learns", "precision", "accumulation", "workers"),
    [pytest.param(*case, marks=[] if case == FAST else pytest.mark.slow) for case in MATRIX],
)
def test_three_processes_with_other_loaders_end_on_the_bits_of_one(
    tmp_path: Path,
    zygote: Zygote,
    learns: str,
    precision: str,
    accumulation: int,
    workers: tuple[int, ...],
) -> None:
    words = (
        *WORDS,
        *LEARNS[learns],
        f"training.precision={precision}",
        f"training.accumulation={accumulation}",
    )
    golden = tmp_path / run_id(zygote.run("train", *words, root=tmp_path, check=0))
    changes = [
        (f"training.stop_after_images={stop}", f"data.workers={count}")
        for stop, count in zip(STOPS, workers, strict=True)
    ]
    run = tmp_path / run_id(zygote.run("train", *words, *changes[0], root=tmp_path, check=0))
    for change in changes[1:]:
        zygote.run("resume", run.name, *change, root=tmp_path, check=0)
    assert last(golden) == last(run)
    assert rows(golden / "metrics.jsonl") == rows(run / "metrics.jsonl")
    print(f"{learns}, {precision}, {accumulation} micro-batches, workers {workers}: equal bits")


SEEN = """
import hashlib, json
from rediffuse.training import step
real = step._noised
def noised(recipe, batch, t):
    found = real(recipe, batch, t)
    with open("{file}", "a") as file:
        for row in range(len(batch.index)):
            words = [hashlib.sha256(x[row].numpy().tobytes()).hexdigest()
                     for x in (found.x_0, found.eps, found.x_t)]
            line = [int(batch.index[row]), float(t[row]), int(found.cond[row]), *words]
            file.write(json.dumps(line) + chr(10))
    return found
step._noised = noised
"""


def seen(file: Path) -> list[list[object]]:
    """Index, time, class and digests of image, noise and noised image, in order."""
    return [json.loads(line) for line in file.read_text().splitlines()]


# Halves of a batch add up the same numbers in another order: float32 rounds sums of gradients
# at 2^-24 of their terms, bfloat16's matrix products at 2^-8. Adam divides by the gradient's own
# size, so where a gradient is small against what it is the sum of, rounding weighs more.
APART = {"fp32": 1e-4, "bf16": 2e-2}  # seen: 8.6e-7 to 9.2e-7 and 3.8e-3 to 4.0e-3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pieces", [2, 3])
def test_more_micro_batches_on_resume_see_the_same_images_times_and_noise(
    tmp_path: Path, zygote: Zygote, precision: str, pieces: int
) -> None:
    words = (*WORDS, f"training.precision={precision}")
    files = [tmp_path / name for name in ("whole", "pieces")]
    whole, parted = (SEEN.format(file=file) for file in files)
    done = zygote.run("train", *words, root=tmp_path, before=whole, check=0)
    golden = tmp_path / run_id(done)
    stop = "training.stop_after_images=288"
    run = tmp_path / run_id(zygote.run("train", *words, stop, root=tmp_path, check=0))
    start = load_file(checkpoints(run / "checkpoints")[-1] / "model.safetensors")
    change = f"training.accumulation={pieces}"
    zygote.run("resume", run.name, change, root=tmp_path, before=parted, check=0)
    assert seen(files[1]) == seen(files[0])[288:]
    [drift] = map(json.loads, (run / "logs" / "drift.jsonl").read_text().splitlines())
    assert "training.accumulation" in json.dumps(drift)
    ends = [checkpoints(one / "checkpoints")[-1] / "model.safetensors" for one in (golden, run)]
    one, two = map(load_file, ends)
    apart = distance(one, two) / distance(one, start)
    print(f"{precision}, 1 -> {pieces} micro-batches: weights {apart:.1e} of their way apart")
    assert apart < APART[precision]


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The Euclidean distance of two networks."""
    return float(sum((one[n] - two[n]).double().square().sum().item() for n in one)) ** 0.5
