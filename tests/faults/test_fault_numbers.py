"""Numbers that are not finite, wherever they come from, reach no weight and no checkpoint."""

import json
import math
from pathlib import Path

import pytest
from cli import TINY, run_id
from faults_harness import Zygote
from faults_runs import rows, runs_in, status
from safetensors.torch import load_file

from rediffuse.training.committed import checkpoints, verify

SIZE = 48
WORDS = (
    *TINY,
    "training.previews=false",
    "training.images=240",  # five steps, each of which is logged and saved
    "training.checkpoint_every_images=48",
    "training.log_every_images=48",
    "training.validate_every_images=48",
    "training.keep_checkpoints=9",
)

# Runs in the child before the command: `spoiled(index)` says whether a batch is to be spoiled.
SPOIL = """
import torch
from rediffuse.training import hooks, loop, step
VALUE, FIRST, LAST = float("{value}"), {first}, {last}
def spoiled(index):
    return FIRST <= int(index[0]) // 48 < LAST and int(index[0]) % 48 == 0
def once(module, name):
    return lambda wrap: setattr(module, name, wrap(getattr(module, name)))
"""
WHERE = {
    "loss": """
@once(step, "batch_losses")
def _(real):
    def losses(recipe, batch):
        losses, t = real(recipe, batch)
        return (losses + VALUE, t) if spoiled(batch.index) else (losses, t)
    return losses
""",
    "gradient of the loss": """
@once(step, "batch_losses")
def _(real):
    def losses(recipe, batch):
        losses, t = real(recipe, batch)
        if spoiled(batch.index):
            losses.register_hook(lambda gradient: gradient + VALUE)
        return losses, t
    return losses
""",
    "a pixel": """
@once(step, "batch_losses")
def _(real):
    def losses(recipe, batch):
        if spoiled(batch.index):
            x_0 = batch.x_0.clone()
            x_0[5, 0, 3, 3] = VALUE
            batch = batch._replace(x_0=x_0)
        return real(recipe, batch)
    return losses
""",
    "one gradient tensor": """
@once(step, "accumulate")
def _(real):
    def accumulate(recipe, state, batches):
        found = real(recipe, state, batches)
        if spoiled(batches[0].index):
            dict(state.network.named_parameters())["{tensor}"].grad.view(-1)[-1] = VALUE
        return found
    return accumulate
""",
    "a learned part's gradient": """
@once(step, "accumulate")
def _(real):
    def accumulate(recipe, state, batches):
        found = real(recipe, state, batches)
        if spoiled(batches[0].index):
            next(state.learned.parameters()).grad.view(-1)[-1] = VALUE
        return found
    return accumulate
""",
}


def spoil(where: str, value: str, first: int, last: int, tensor: str = "") -> str:
    """The source that spoils steps first..last-1, counted from 0."""
    source = SPOIL.format(value=value, first=first, last=last)
    return source + WHERE[where].replace("{tensor}", tensor)


def assert_all_finite(run: Path) -> None:
    """Every checkpoint verifies and holds nothing but finite numbers."""
    for checkpoint in checkpoints(run / "checkpoints"):
        verify(checkpoint)
        for file in checkpoint.glob("*.safetensors"):
            bad = [name for name, value in load_file(file).items() if not value.isfinite().all()]
            assert not bad, f"{checkpoint.name}/{file.name}: {bad}"


LEARNED = ("schedule=learned",)
CASES = [
    ("one gradient tensor", "nan", ()),
    ("loss", "inf", ("training.accumulation=2", "training.precision=bf16")),
    ("loss", "nan", ()),
    ("loss", "-inf", ()),
    ("gradient of the loss", "nan", ()),
    ("gradient of the loss", "inf", ("training.clip_norm=null",)),
    ("a pixel", "nan", ("times=loss_aware", "times.bins=5", "times.history=1")),
    ("a pixel", "inf", ()),
    ("one gradient tensor", "inf", ()),
    ("one gradient tensor", "-inf", ("training.accumulation=2",)),
    ("one gradient tensor", "nan", ("training.precision=bf16",)),
    ("a learned part's gradient", "nan", LEARNED),
    ("a learned part's gradient", "inf", LEARNED),
    ("loss", "nan", LEARNED),
    ("a pixel", "nan", ("weighting=uncertainty",)),
    ("a pixel", "nan", ("model.norm={name: batch}",)),
]


@pytest.mark.parametrize(
    ("where", "value", "more"),
    [pytest.param(*c, marks=[] if i == 0 else pytest.mark.slow) for i, c in enumerate(CASES)],
)
def test_a_step_that_is_not_finite_changes_nothing_is_counted_and_training_goes_on(
    tmp_path: Path, zygote: Zygote, where: str, value: str, more: tuple[str, ...]
) -> None:
    tensor = "conv_in.weight" if value == "nan" else "conv_out.bias"
    before = spoil(where, value, 2, 3, tensor)
    done = zygote.run("train", *WORDS, *more, root=tmp_path, before=before, check=0)
    run = tmp_path / run_id(done)
    assert status(run) == "FINISHED"
    assert_all_finite(run)
    before_it, after_it, next_one = (
        run / "checkpoints" / f"step-{number:08d}" for number in (2, 3, 4)
    )
    files = {file.name for file in before_it.glob("*.safetensors")}
    assert len(files) == (4 if "learned.safetensors" in files else 3)
    for name in files:
        same = (before_it / name).read_bytes() == (after_it / name).read_bytes()
        assert same, f"{name} has changed at the step that was to be skipped"
        if name != "learned.safetensors":
            assert (next_one / name).read_bytes() != (after_it / name).read_bytes()
    counted = [row["skipped_steps"] for row in rows(run / "metrics.jsonl") if "loss" in row]
    assert counted == [0, 0, 1, 1, 1]
    losses = [row["loss"] for row in rows(run / "metrics.jsonl") if "loss" in row]
    assert all(isinstance(losses[k], float) for k in (0, 1, 3, 4)), losses
    [fault] = rows(run / "logs" / "non_finite.jsonl")
    assert_names_the_step(fault, step=3)
    if where == "one gradient tensor":
        assert fault["not_finite"] == [tensor]
    print(f"{value} in {where} at 1 of 5 steps: {len(files)} files unchanged, 4 steps learned")


def assert_names_the_step(fault: dict[str, object], step: int) -> None:
    """Step, sample indices, times, and a norm for each tensor."""
    assert (fault["step"], fault["images"]) == (step, step * SIZE)
    assert fault["samples"] == list(range((step - 1) * SIZE, step * SIZE))
    times, norms = fault["times"], fault["gradient_norms"]
    assert isinstance(times, list)
    assert len(times) == SIZE
    assert all(0 <= t <= 1000 for t in times)
    assert isinstance(norms, dict)
    assert {"conv_in.weight", "conv_out.bias"} <= norms.keys()
    assert not all(math.isfinite(float(n)) for n in (*norms.values(), fault["loss"]))


@pytest.mark.parametrize(
    "where", [pytest.param(w, marks=[] if w == "loss" else pytest.mark.slow) for w in WHERE]
)
def test_where_no_step_is_finite_the_run_fails_and_its_last_checkpoint_is_sound(
    tmp_path: Path, zygote: Zygote, where: str
) -> None:
    words = (*WORDS, *(LEARNED if "learned" in where else ()), "training.non_finite_limit=2")
    before = spoil(where, "nan", 2, 99, "conv_in.weight")
    done = zygote.run("train", *words, root=tmp_path, before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "2 steps in a row" in line
    assert "Traceback" not in done.stderr
    [run] = runs_in(tmp_path)
    assert status(run) == "FAILED"
    assert_all_finite(run)
    newest = checkpoints(run / "checkpoints")[-1]
    for file in newest.glob("*.safetensors"):
        sound = run / "checkpoints" / "step-00000002" / file.name
        assert file.read_bytes() == sound.read_bytes()
    for number, fault in enumerate(rows(run / "logs" / "non_finite.jsonl"), start=3):
        assert_names_the_step(fault, number)
    assert number == 4
    zygote.run("resume", run.name, root=tmp_path, check=0)  # the fault has gone
    assert status(run) == "FINISHED"
    assert_all_finite(run)


BY_ITSELF = """
@once(loop, "train_step")
def _(real):
    def train_step(recipe, state, batches):
        found = real(recipe, state, batches)
        if spoiled(batches[0].index):
            with torch.no_grad():
                {target}.view(-1)[0] = VALUE
        return found
    return train_step
"""
TARGETS = {
    "a weight": "next(state.network.parameters())",
    "the average": "next(state.average.network.parameters())",
    "a moment": "next(iter(state.optimizer.state.values()))['exp_avg_sq']",
}


@pytest.mark.parametrize(
    ("target", "value"),
    [
        pytest.param(t, v, marks=[] if (t, v) == ("the average", "nan") else pytest.mark.slow)
        for t in TARGETS
        for v in ("nan", "inf")
    ],
)
def test_what_is_not_finite_by_itself_is_never_saved(
    tmp_path: Path, zygote: Zygote, target: str, value: str
) -> None:
    before = SPOIL.format(value=value, first=2, last=3) + BY_ITSELF.format(target=TARGETS[target])
    done = zygote.run("train", *WORDS, root=tmp_path, before=before)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not finite" in line
    print(f"{value} in {target}: {line}")
    [run] = runs_in(tmp_path)
    assert status(run) == "FAILED"
    assert_all_finite(run)
    assert checkpoints(run / "checkpoints")[-1].name == "step-00000002"
    (tmp_path / "other").mkdir()
    golden = zygote.run("train", *WORDS, root=tmp_path / "other", check=0)
    zygote.run("resume", run.name, root=tmp_path, check=0)
    ends = [r / "checkpoints" / "step-00000005" for r in (tmp_path / "other" / run_id(golden), run)]
    for file in ends[0].iterdir():
        assert file.read_bytes() == (ends[1] / file.name).read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 2])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(
    tmp_path: Path, zygote: Zygote, when: int
) -> None:
    before = (
        SPOIL.format(value="nan", first=0, last=0)
        + f"""
@once(hooks, "validation_loss")
def _(real):
    seen = []
    def loss(recipe, state, batches):
        seen.append(real(recipe, state, batches))
        return VALUE if len(seen) == {when} + 1 else seen[-1]
    return loss
"""
    )
    words = (*WORDS, "training.early_stopping_checks=4")
    run = tmp_path / run_id(zygote.run("train", *words, root=tmp_path, before=before, check=0))
    assert json.loads((run / "run.json").read_text())["images_seen"] == 240
    found = [r["validation/loss"] for r in rows(run / "metrics.jsonl") if "validation/loss" in r]
    assert found[when] == "nan"
    best = min(loss for loss in found if isinstance(loss, float))
    state = json.loads((run / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert state["best_loss"] == best
    out = tmp_path / "drawn"
    words = ("--checkpoint", "best", "--n", "1", "--output-dir", str(out))
    zygote.run("sample", run.name, *words, root=tmp_path, check=0)
    drawn = json.loads((out / "manifest.json").read_text())["checkpoint"]
    assert drawn == f"step-{found.index(best) + 1:08d}"
