"""Every YAML is found by itself, builds, and holds what its axis promises."""

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import torch
import yaml

from rediffuse import build
from rediffuse.config.compose import checked, compose, dump_yaml, part_from_file, read_yaml
from rediffuse.config.schema import Part
from rediffuse.legality import check
from rediffuse.ranges import Range

CONFIGS = Path(build.__file__).parent / "configs"
AXES = {axis for axis in build.AXES if (CONFIGS / axis).is_dir()}
PARAMETERS = {
    "digits": 1_081_569,
    "mnist": None,
    "fashion_mnist": None,
    "cifar10_ddpm": 35_746_307,
    "cifar10_edm": None,
    "flow_cifar10": 35_746_307,
    "folder64": None,
    "imagenet100_64": None,
}


@pytest.mark.parametrize("preset", sorted(f.stem for f in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_preset_composes_checks_and_survives_its_own_yaml(
    preset: str, tmp_path: Path
) -> None:
    config = compose([f"experiment={preset}"])
    if config.data.name == "folder":
        config = compose([f"experiment={preset}", f"data.path={tmp_path}"])
    check(config)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert checked(read_yaml(file)) == config
    if PARAMETERS[preset]:
        classes = 10 if config.data.use_labels else 0
        with torch.device("meta"):
            network = build.network(config, classes)
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[preset]


@pytest.mark.parametrize(
    "file", [f for axis in sorted(AXES) for f in sorted((CONFIGS / axis).glob("*.yaml"))], ids=str
)
def test_every_part_can_be_chosen_by_its_file_name(file: Path) -> None:
    axis = file.parent.name
    wanted = yaml.safe_load(file.read_text())
    wanted = wanted.get(axis, wanted)  # schedule=edm also sets sigma_data
    config = compose([f"{axis}={file.stem}"])
    found = getattr(config.sampling, axis, None) or getattr(config, axis, None)
    found = found or Part.model_validate(config.model.arguments[axis])
    assert found.name == wanted["name"]
    if axis == "data":
        found = found.source
        found = found.model_copy(update={"path": "."}) if file.stem == "folder" else found
    elif axis == "rate":
        found = Part(name=found.name, **found.arguments)
    build.bind(axis, found, axis)


@pytest.mark.parametrize("axis", sorted(AXES - {"model", "data"}))
def test_every_part_of_an_axis_has_a_file(axis: str) -> None:
    def name(file: Path) -> str:
        tree = yaml.safe_load(file.read_text())
        return str(tree.get(axis, tree)["name"])

    assert {name(f) for f in (CONFIGS / axis).glob("*.yaml")} >= set(build.names(axis))


def without_range(annotation: Any) -> bool:
    """Whether an annotation lets any number through."""
    if annotation in (int, float):
        return True
    if get_origin(annotation) is Annotated:
        kind, *facts = get_args(annotation)
        limits = any(isinstance(fact, Range) or hasattr(fact, "metadata") for fact in facts)
        return without_range(kind) and not limits
    return any(map(without_range, get_args(annotation)))


@pytest.mark.parametrize("axis", build.AXES)
def test_every_number_of_every_part_has_a_range(axis: str) -> None:
    given = build.AXES[axis].given + build.AXES[axis].offered
    own = {
        f"{name}.{key}": argument.annotation
        for name in build.names(axis)
        for key, argument in inspect.signature(build.find(axis, name, axis)).parameters.items()
        if argument.kind is argument.KEYWORD_ONLY and key not in given
    }
    assert [name for name, annotation in own.items() if without_range(annotation)] == []


def test_a_users_own_configs_folder_shadows_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs" / "rate").mkdir(parents=True)
    (tmp_path / "configs" / "rate" / "constant.yaml").write_text(
        "name: constant\nhorizon_images: 7\n"
    )
    (tmp_path / "configs" / "target").mkdir()
    (tmp_path / "configs" / "target" / "mine.yaml").write_text("name: edm\nsigma_data: 0.25\n")
    monkeypatch.chdir(tmp_path)
    config = compose(["rate=constant", "target=mine"])
    assert config.rate.horizon_images == 7
    assert config.target.arguments == {"sigma_data": 0.25}


@pytest.mark.parametrize(
    ("words", "section", "part"),
    [
        (["norm=batch"], "model.norm", {"name": "batch", "eps": 1e-5}),
        (["model.norm=batch"], "model.norm", {"name": "batch", "eps": 1e-5}),
        (["model.norm.name=batch"], "model.norm", {"name": "batch"}),
        (
            ["model.norm.eps=1e-3", "model.norm.name=layer"],
            "model.norm",
            {"name": "layer", "eps": 1e-3},
        ),
        (["model.name=mlp.MLP"], "model", {"name": "mlp.MLP"}),
        (["model.depth=2", "model.name=mlp.MLP"], "model", {"name": "mlp.MLP", "depth": 2}),
        (["sampling.solver=heun", "solver=ddim"], "sampling.solver", None),
        (
            ["sampling.solver.name=ddim", "experiment=cifar10_ddpm"],
            "sampling.solver",
            {"name": "ddim"},
        ),
        (["optimizer.name=adam"], "optimizer", {"name": "adam"}),
        (["schedule.name=flow"], "schedule", {"name": "flow"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_part_of_another_name_has_none_of_the_old_ones_arguments(
    words: list[str], section: str, part: dict[str, Any] | None
) -> None:
    tree = compose(words).model_dump()
    for name in section.split("."):
        tree = tree[name]
    assert tree == (part or part_from_file("solver", "heun"))


def test_what_all_parts_of_a_section_share_stays_when_its_name_changes(tmp_path: Path) -> None:
    config = compose(["rate.name=linear", "data.name=mnist"])
    assert config.rate.arguments == {}
    assert (config.data.image_size, config.data.arguments) == (8, {})
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  norm: batch\n")
    assert compose([], file).model.arguments["norm"] == {"name": "batch", "eps": 1e-5}


def test_a_users_own_part_needs_trust_once_it_comes_with_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab.py").write_text(
        "import torch\n\ndef heavy(schedule, t, target, *, factor: float = 2.0):\n"
        "    return torch.full_like(t, factor)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    part = Part.model_validate({"name": "my_lab.heavy", "factor": 3.0})
    t = torch.tensor([500.0], dtype=torch.float64)
    assert build.bind("weighting", part, "weighting")(None, t, None).tolist() == [3.0]
    with pytest.raises(build.ConfigError, match="--trust my_lab"):
        build.bind("weighting", part, "weighting", trusted=())
    assert build.bind("weighting", part, "weighting", trusted=("my_lab",)).keywords == {
        "factor": 3.0
    }


@pytest.mark.parametrize("experiment", ["digits", "mnist"])
def test_a_group_that_is_no_part_is_what_its_chosen_file_says(experiment: str) -> None:
    words = [f"experiment={experiment}", "average=none"]
    assert compose(words).average.half_life_images is None
    assert compose([*words, "average.half_life_images=7"]).average.half_life_images == 7
    assert compose(words[:1]).average.half_life_images is not None
    assert compose([*words[:1], "training=default"]).training.epochs == 100


def test_the_later_word_wins_file_over_defaults_and_command_line_over_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("schedule: linear\ntraining:\n  epochs: 3\n  learning_rate: 1e-4\nseed: 5\n")
    config = compose(["training.epochs=4", "--seed", "6"], file)
    assert config.schedule.name == "discrete.linear"
    assert (config.training.epochs, config.training.learning_rate, config.seed) == (4, 1e-4, 6)
