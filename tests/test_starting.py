"""`rediffuse init` makes a folder in which its own words hold."""

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import zygote
from oracles import final, gaussian, no_noise
from PIL import Image

from rediffuse.cli import rediffuse as program
from rediffuse.config.compose import compose
from rediffuse.errors import ConfigError
from rediffuse.grids import karras
from rediffuse.schedules.edm import edm
from rediffuse.solvers.euler import euler
from rediffuse.starting import begin

FILES = [".gitignore", "README.md", "configs/experiment/mine.yaml", "data/README.txt",
         "my_parts.py"]  # fmt: skip
TINY = ("data.image_size=8", "model.base_channels=8", "model.channel_multipliers=[1,2]",
        "model.attention_resolutions=[4]", "model.head_channels=8", "model.norm.groups=4",
        "data.validation_fraction=0.2", "training.images=64", "training.batch_size=16",
        "training.compile=false", "training.preview_count=4", "sampling.steps=3",
        "tracking=none", "threads=1")  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    begin(tmp_path / "flowers")
    return tmp_path / "flowers"


def test_every_file_is_written_once(project: Path) -> None:
    there = sorted(str(f.relative_to(project)) for f in project.rglob("*") if f.is_file())
    assert there == FILES
    assert (project / "README.md").read_text().startswith("# flowers\n")
    (project / "my_parts.py").write_text("mine")
    (project / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"is there already, and nothing was written"):
        begin(project)
    assert (project / "my_parts.py").read_text() == "mine"
    assert not (project / "README.md").exists()


def test_a_few_images_train_and_a_solver_of_ones_own_draws(project: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("roses", "tulips"):
        (project / "data" / kind).mkdir()
        for k in range(12):
            pixels = rng.integers(0, 255, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(project / "data" / kind / f"{k}.png")
    mine = "sampling.solver.name=my_parts.careful_euler"
    _command(project, "train", "experiment=mine", mine, *TINY)
    (run,) = project.glob("runs/*/run.json")
    words = ["sample", run.parent.name, "--n", "2", "--output-dir", "drawn"]
    refused = _command(project, *words, code=2)
    assert "add --trust my_parts" in refused
    other = ["--solver", "my_parts.careful_euler looks=2", "--trust", "my_parts"]
    assert "2 images" in _command(project, *words, *other)


def _command(project: Path, *words: str, code: int = 0) -> str:
    here = "import sys; sys.path.insert(0, '')"  # as PYTHONPATH=. and `python -m` have it
    env = {"REDIFFUSE_ROOT": "runs"}
    done = zygote().run(*words, root=project, env=env, before=here, check=code)
    return done.stdout + done.stderr


def test_the_commands_of_its_readme_parse(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    told = re.findall(r"^rediffuse (\S+) (.*?)(?:   .*)?$", (project / "README.md").read_text(),
                      re.MULTILINE)  # fmt: skip
    assert len(told) > 8
    for verb, rest in told:
        command, words = program.commands[verb], shlex.split(rest)
        if verb == "data":
            command, words = command.commands[words[0]], words[1:]
        context = command.make_context(verb, words)
        if verb in ("train", "plan"):
            compose(context.params["words"])


def test_the_solver_is_nearer_than_eulers_method(project: Path) -> None:
    spec = importlib.util.spec_from_file_location("my_parts", project / "my_parts.py")
    assert spec
    assert spec.loader
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    schedule, x = edm(), torch.full((1, 1, 1, 1), 80.0, dtype=torch.float64)
    gaps = []
    for solver in (euler, mine.careful_euler):
        end = final(solver(gaussian(schedule), schedule, x, karras(schedule, 40), no_noise))
        gaps.append(abs(float(end) - 0.499990234661093))
    assert gaps[1] < gaps[0] / 5
