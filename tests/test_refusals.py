"""Bad input gets one clear line, exit code 2, and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rediffuse.cli import main

FLOW = ("schedule=flow", "times=uniform", "solver=euler")


def refused(
    words: list[str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one line that a command answers with."""
    monkeypatch.setenv("REDIFFUSE_ROOT", str(root))
    monkeypatch.setattr("sys.argv", ["rediffuse", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.base_chanels=64"], "model.base_chanels: no such key; did you mean base_channels"),
        (["training.epoch=3"], "training.epoch: no such key; did you mean training.epochs?"),
        (["--learning_rat", "1e-3"], "learning_rat: no such key; did you mean"),
        (["--steps", "3"], "which one? schedule.steps or sampling.steps"),
        (
            ["training.learning_rate=fast"],
            "training.learning_rate: expected a valid number, not 'fast'",
        ),
        (["training.batch_size=0"], "training.batch_size: expected greater than 0, not 0"),
        (["training.batch_size=true"], "training.batch_size: expected a valid integer, not True"),
        (["model.dropout=high"], "model.dropout: expected a valid number, not 'high'"),
        (["training.accumulation=3"], "must divide training.batch_size=64"),
        (
            ["training.images=5", "training.epochs=2"],
            "give either training.epochs or training.images",
        ),
        (["optimizer.beta_1=2"], "optimizer.beta_1: expected 0 or more and below 1, not 2"),
        (["optimizer.beta_2=1"], "optimizer.beta_2: expected 0 or more and below 1, not 1"),
        (["optimizer.eps=0"], "optimizer.eps: expected above 0, not 0"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay: expected 0 or more, not -1"),
        (["rate.warmup_images=-1"], "rate.warmup_images: expected 0 to 1e+15, not -1"),
        (["rate.final=-0.5"], "rate.final: expected 0 to 1, not -0.5"),
        (["data.std=1e-300"], "data.std: expected greater than or equal to 0.001, not 1e-300"),
        (["data.std=[0.5,1e-300]"], "data.std: expected"),
        (["training.learning_rate=1e30"], "training.learning_rate: expected less than"),
        (["schedule=linear", "beta_start=0.5", "beta_end=0.1"], "beta_start=0.5 is above"),
        (["schedule=linear", "schedule.beta_end=1.5"], "schedule.beta_end: expected above 0 and"),
        (["schedule=edm", "schedule.sigma_min=90"], "schedule.sigma_min=90 must be below"),
        (["model=mlp", "model.depth=100000000"], "model.depth: expected 1 to 1000"),
        (["model=mlp", "depth=1000", "width=65536"], "12,893,697,343,552 parameters take"),
        (["model.channel_multipliers=[1,-2]"], "channel_multipliers: expected 1 to 1000, not -2"),
        (["sigma_data=0.3", "target=edm"], "set sigma_data=0.3 target.sigma_data=0.3"),
        (["target=edm", "weighting=edm", "weighting.sigma_data=1"], "weighting.sigma_data=0.5"),
        (
            ["training.best_metric=proxy/fd_classifier_1000", "training.proxy_every_images=64"],
            "with these images and training.proxy_images=500 it is proxy/fd_classifier_500",
        ),
        (
            ["training.best_metric=proxy/fd_turns_500", "training.proxy_every_images=64"],
            "with these images and training.proxy_images=500 it is proxy/fd_classifier_500",
        ),
        (
            [
                "training.best_metric=proxy/fd_classifier_500",
                "training.images=64",
                "training.epochs=null",
                "training.proxy_every_images=128",
            ],
            "is first measured after 128 images, and the run is planned to end at 64",
        ),
        (
            ["training.early_stopping_checks=2", "data.validation_fraction=0"],
            "no images are held out; set data.validation_fraction above 0",
        ),
        (["seed=-1"], "seed: expected greater than or equal to 0"),
        (["schedule=flo"], "schedule=flo: there is no such schedule; did you mean flow?"),
        (["experiment=imagenet"], "there is no such experiment"),
        (["sampling.solver.name=heum"], "there is no solver 'heum'; did you mean heun?"),
        (["solver.eta=1"], "solver.eta: no such key"),
        (["sampling.solver.eta=1"], "takes no arguments"),
        (["target.name=solve"], "there is no target 'solve'"),
        (["target.name=os.system"], "there is no target 'os.system'"),
        ([*FLOW, "target=eps"], "target 'eps' cannot give x_0 at t = 1"),
        ([*FLOW, "target=flow", "grid=karras"], "use grid=trailing"),
        (["schedule=flow", "target=flow"], "use times=uniform"),
        (["schedule=zero_terminal_snr", "target=eps"], "cannot give x_0 at t = 1000"),
        (["schedule.name=edm", "schedule.steps=5"], "schedule.steps: no such key"),
        (["schedule=learned", "weighting=unit"], "needs weighting=vlb"),
        (["learned_variance=true"], "objective 'simple' teaches no variance"),
        (["objective.name=hybrid"], "this network learns none; set learned_variance=true"),
        ([*FLOW, "target=flow", "objective=bound"], "has no steps; use a chain"),
        (["times=loss_aware", "times.bins=7"], "cannot cut 1000 steps into 7 equal bins"),
        (["pairing=optimal_transport", "pairing.block_images=48"], "must divide the 64 images"),
        (["solver=unipc", "sampling.solver.order=7"], "sampling.solver.order: expected 1, 2 or 3"),
        (["schedule=betas", "schedule.betas=[0.1,1.5]"], "expected above 0 and below 1, not 1.5"),
        (["sampling.guidance.rescale=2"], "rescale: expected 0 to 1, not 2"),
        (["threshold=dynamic_thresholding", "sampling.threshold.percentile=7"], "percentile"),
        (["sampling.steps=2000"], "2000 sampling steps on a schedule of 1000"),
        (["data.image_size=9"], "image_size 9 cannot be halved 1 times; nearest that can: 8, 10"),
        (["model.norm.groups=7"], "7"),
        (["data=folder"], "data.path: expected a valid string, not None"),
        (["data=folder", "data.path=/no/such/folder", "experiment=folder64"], "/no/such/folder"),
        (["device=cuda:7"], "device=cuda:7: not on this machine"),
        (["seed=1,2"], "add -m to train one run for each"),
        (["epochs"], "is not `key=value`"),
        (["~training.epochs"], "set it to null"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["resume_from_run_id=12e5ab"], "no run '12e5ab'"),
        (["parent_run_id=../../etc"], "is not a run id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_in_one_line_before_anything_is_made(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert says in refused(["train", *words], tmp_path, monkeypatch, capsys)
    assert not [made for made in tmp_path.iterdir() if made.name != "packed"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "abcdef"], "no run 'abcdef'"),
        (["sample", "abc"], "is not a run id"),
        (["sample", "../../../etc"], "is not a run id"),
        (["sample"], "which run?"),
        (["show", "0" * 32], "no run"),
        (["resume", "nothex"], "is not a run id"),
        (["trian"], "No such command 'trian'"),
        (["data", "inspect", "nowhere/at/all"], "nowhere/at/all"),
        (["data", "pack", "minst"], "did you mean mnist?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_refuse_in_one_line(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert says in refused(words, tmp_path, monkeypatch, capsys)


def test_a_broken_image_is_named_and_refused_and_skipped_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{k}.png")
    (images / "torn.png").write_bytes((images / "3.png").read_bytes()[:40])
    words = ["data=folder", f"data.path={images}", "data.image_size=16"]
    root = tmp_path / "root"
    root.mkdir()
    assert "torn.png" in refused(["train", *words], root, monkeypatch, capsys)
    monkeypatch.setattr(
        "sys.argv",
        ["rediffuse", "data", "inspect", str(images), "data.image_size=16", "data.on_broken=skip"],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "torn.png" in capsys.readouterr().out


def test_an_empty_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(
        ["train", "data=folder", f"data.path={tmp_path / 'empty'}"],
        tmp_path / "root",
        monkeypatch,
        capsys,
    )
    assert str(tmp_path / "empty") in line
