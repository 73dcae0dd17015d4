"""What is typed on the command line, and what stands in YAML files, becomes what was meant."""

from pathlib import Path

import pytest

from rediffuse.cli import main
from rediffuse.config.compose import compose, read_yaml, run_ids, sweep
from rediffuse.errors import ConfigError

HARD_NAMES = [
    "größe", "猫", "🐈", "C# pictures", "a,b", "x=y", "(2024)", "[raw]", "{x}", "Bob's photos",
    "~/images", "007", "2024", "1e5", "true", "off", "100%", "a&b", 'say "cheese"', "back\\slash",
    "dollar$HOME", "semi;colon", "two  spaces", "trailing ", "new\nline", "-dash", "+plus",
]  # fmt: skip


@pytest.mark.parametrize("name", HARD_NAMES)
def test_a_path_is_taken_as_it_was_typed(name: str) -> None:
    folder = ["data=folder"]
    assert compose([*folder, f"data.path={name}"]).data.source.arguments["path"] == name
    assert compose([*folder, f"data.path='{name}'"]).data.source.arguments["path"] == name
    assert compose([*folder, f"data.test_path={name}"]).data.source.arguments["test_path"] == name
    assert compose([f"name={name}"]).name == name


def test_a_path_after_a_space_is_taken_as_it_was_typed() -> None:
    assert compose(["data=folder", "--path", "a,b"]).data.source.arguments["path"] == "a,b"
    assert compose(["data=folder"], values={"data.path": "'q'"}).data.source.arguments == {
        **compose(["data=folder"]).data.source.arguments,
        "path": "'q'",
    }


def test_null_is_no_path_and_an_empty_one_is_refused() -> None:
    assert (
        compose(["data=folder", "data.path=x", "data.test_path=null"]).data.source.arguments[
            "test_path"
        ]
        is None
    )
    for words in (["data=folder", "data.path="], ["data=folder", "data.path=''"]):
        with pytest.raises(ConfigError, match=r"data\.path: expected a text, and it is empty"):
            compose(words)


def test_sweeps_leave_a_path_as_it_was_typed_where_it_is_no_list() -> None:
    assert list(sweep(["data.path=Bob's photos"])) == [["data.path=Bob's photos"]]
    assert list(sweep(["data.path=a,b"])) == [["data.path=a"], ["data.path=b"]]


@pytest.mark.parametrize(
    "words",
    [
        ["resume_from_run_id=12e456"],
        ["resume_from_run_id='12e456'"],
        ["--resume_from_run_id", "12e456"],
        ["--resume-from-run-id", "12e456"],
        ["--resume-from-run-id=12e456"],
    ],
)
def test_a_run_id_is_text_however_it_is_typed(words: list[str]) -> None:
    rest, ids = run_ids([*words, "training.epochs=3"])
    assert ids == {"resume_from_run_id": "12e456", "parent_run_id": None}
    assert rest == ["training.epochs=3"]


@pytest.mark.parametrize("key", ["resume_from_run_id", "parent_run_id"])
@pytest.mark.parametrize("empty", ["", "''"])
def test_an_empty_run_id_is_refused(key: str, empty: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected a run id, and it is empty"):
        run_ids([f"{key}={empty}"])


def test_a_sweep_spells_every_combination() -> None:
    assert list(sweep(["resume_from_run_id=123456,12e456"])) == [
        ["resume_from_run_id=123456"],
        ["resume_from_run_id=12e456"],
    ]
    assert list(sweep(["--seed", "0,1"])) == [["seed=0"], ["seed=1"]]
    assert list(sweep(["seed=range(0,2)", "target=v,eps"])) == [
        ["seed=0", "target=v"], ["seed=0", "target=eps"],
        ["seed=1", "target=v"], ["seed=1", "target=eps"],
    ]  # fmt: skip
    assert list(sweep(["threshold=glob(*, exclude=dyn*)"])) == [
        ["threshold=clipping"],
        ["threshold=none"],
    ]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed=glob(*)", "glob() chooses among the files of a group"),
        ("seed=interval(0,1)", "-m takes key=a,b,c, choice(a,b) and range(0,3)"),
        ("seed=range(1,3,0)", "must not be zero"),
        ("seed=range(0,1000000)", "more than 10,000 runs"),
        ("seed=[1", "is not `key=value`"),
    ],
)
def test_a_sweep_without_a_sense_is_refused(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list(sweep([word]))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"data:\n  class_names:\n    0: cat\n", "line 3: the key '0' is read as int"),
        (b"training:\n  on: true\n", "line 2: the key 'on' is read as bool"),
        (b"null: 3\n", "line 1: the key 'null' is read as null"),
        (b"seed: 1\ntraining: {}\nseed: 2\n", "line 3: the key 'seed' stands twice"),
        (b"[a]: 1\n", "line 1: the key"),
        (b"seed: 1\n---\nseed: 2\n", "line 2: but found another document"),
        (b"training:\n\timages: 640\n", "line 2: found character"),
        (b"name: [cats\n", "line 2: expected ',' or ']'"),
        (b"- a\n- b\n", "expected `key: value` lines"),
        (b"", "expected `key: value` lines"),
        ("seed: 1\n".encode("utf-16"), "not a text file"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused_in_one_line(
    text: bytes, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as refused:
        read_yaml(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_and_another_ends_of_lines_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(b"\xef\xbb\xbftraining:\r\n  images: 640\r\n")
    config = compose([], file)
    assert (config.training.images, config.training.epochs) == (640, None)


def test_a_key_with_a_dot_in_a_file_is_no_length(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("training.images: 640\n")
    with pytest.raises(ConfigError, match=r"training\.images: no such key"):
        compose([], file)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ./configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/digits", "data_dir: ${paths.data_dir}\nbatch_size: 64\n"),
        ("model/unet", "_target_: src.models.Unet\nname: unet\n"),
        ("training/default", "max_steps: 3\naccelerator: gpu\n"),
        ("experiment/digits", "# @package _global_\ntags: [a]\ntrainer: {max_epochs: 1}\n"),
        ("solver/heun", "- 1\n"),
    ],
)
def test_another_projects_configs_change_nothing(
    name: str, text: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["schedule=flow", "target=flow", "times=uniform"]
    before = compose(words)
    write(files / f"{name}.yaml", text)
    assert compose(words) == before
    assert capsys.readouterr().err == ""
    group, _, choice = name.partition("/")
    compose([f"{group}={choice}"])
    told = f"configs/{name}.yaml belongs to another program: "
    assert capsys.readouterr().err.startswith(told)


def test_a_file_of_another_project_is_no_choice(files: Path) -> None:
    write(files / "data/mine.yaml", "data_dir: here\n")
    write(files / "trainer/default.yaml", "a: 1\n")
    with pytest.raises(ConfigError, match=r"no such data \(configs/data/mine.yaml belongs to an"):
        compose(["data=mine"])
    with pytest.raises(ConfigError, match="trainer: no such key"):
        compose(["trainer=default"])


def test_a_file_of_ones_own_shadows_ours(files: Path) -> None:
    write(files / "solver/heun.yaml", "name: heun\nchurn: 7\n")
    write(files / "data/mine.yaml", "data_dir: of another project\n")
    assert compose(["solver=heun"]).sampling.solver.arguments["churn"] == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# @package _global_\nname: [cats\n", "line 3: expected ',' or ']'"),
        ("# @package _global_\nseed: 1\nseed: 2\n", "line 3: the key 'seed' stands twice"),
        ("name: cats\n", "an experiment begins with the line `# @package _global_`"),
    ],
)
def test_a_damaged_file_is_named_where_it_is_chosen_and_harms_nothing_else(
    text: str, says: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = compose(["experiment=mnist"])
    write(files / "experiment/cats.yaml", text)
    assert compose(["experiment=mnist"]) == before
    with pytest.raises(ConfigError) as refused:
        compose(["experiment=cats"])
    assert str(refused.value).startswith(f"{files}/experiment/cats.yaml: ")
    assert says in str(refused.value)


def test_a_damaged_default_of_a_chosen_file_is_named(files: Path) -> None:
    write(files / "experiment/cats.yaml", "# @package _global_\ndefaults:\n  - torn\nname: cats\n")
    write(files / "experiment/torn.yaml", "# @package _global_\nname: [cats\n")
    with pytest.raises(ConfigError, match=r"torn\.yaml: line 3: expected"):
        compose(["experiment=cats"])


def test_a_folder_with_a_quote_in_its_name_is_inspected(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (files.parent / "Bob's photos").mkdir()
    monkeypatch.setattr("sys.argv", ["rediffuse", "data", "inspect", "./Bob's photos"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "Bob's photos holds no" in capsys.readouterr().err
