"""Whatever is typed: an exit code that is known, one line for a refusal, never a traceback."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rediffuse.cli import main, rediffuse
from rediffuse.config.compose import compose, leaves
from rediffuse.errors import TrainingError

KEYS = sorted(leaves(compose(()).model_dump()))
GROUPS = ["schedule", "target", "solver", "grid", "guidance", "threshold", "model", "data", "rate"]
VALUES = [
    "0", "1", "-1", "1e-3", "nan", "inf", "1e400", "9" * 400, "true", "null", "''", "[]", "[1,2]",
    "{a:1}", "{name: heun}", "heun", "unet", "flow", "cosine", "digits", "os.system", "../..",
    "${oc.env:HOME}", "${seed}", "1,2", "range(1,3)", "glob(*)", "'a b'", '"', "\\", "~",
]  # fmt: skip
OPTIONS = sorted(
    {option for command in rediffuse.commands.values() for p in command.params for option in p.opts}
    - {"--config"}  # as it would take `--show-config` for its value
)

junk = st.text(
    st.characters(exclude_characters="\0", exclude_categories=()), max_size=12
) | st.sampled_from(VALUES)
key = st.sampled_from([*KEYS, *GROUPS, *(k.rpartition(".")[2] for k in KEYS)])
# A near miss: a letter less, a dot more, another case, a prefix of Hydra's.
near = st.builds(
    lambda name, change: change(name),
    key,
    st.sampled_from([str.upper, lambda k: k[1:], lambda k: k + ".x", lambda k: f"+{k}",
                     lambda k: f"~{k}", lambda k: f"--{k}", lambda k: k.replace(".", "/")]),
)  # fmt: skip
setting = st.builds("{}={}".format, key | near | junk, junk)
option = st.sampled_from([o for o in OPTIONS if o.startswith("-")]) | setting | junk | key
words = st.lists(option, max_size=4)
# Nothing that trains: an id that no run has, or the configuration alone.
commands = st.one_of(
    st.builds(lambda rest: ["train", "--show-config", *rest], words),
    st.builds(lambda verb, rest: [verb, "abcdef", *rest],
              st.sampled_from(["sample", "resume", "show", "reproduce"]), words),
    st.builds(lambda verb, rest: [verb, *rest],
              st.sampled_from(["sample", "resume", "show", "reproduce", "runs"]), words),
    st.builds(lambda verb, rest: ["data", verb, "no/such/folder", *rest],
              st.sampled_from(["pack", "inspect"]), words),
    words.filter(lambda found: "train" not in found),
)  # fmt: skip


def ends_well(typed: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["rediffuse", *typed]
    silent = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with silent[0], silent[1], pytest.raises(SystemExit) as ended:
        main()
    said = err.getvalue()
    assert ended.value.code in {0, 1, 2, 130}, typed
    assert "Traceback" not in said
    if ended.value.code:
        assert said.startswith("error: "), (typed, said)
        assert said.count("\n") == 1, (typed, said)
        assert said.strip() != "error:"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root in an empty folder."""
    monkeypatch.setenv("REDIFFUSE_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)

    def prevented(*_: object, **__: object) -> None:
        raise TrainingError("trained")

    monkeypatch.setattr("rediffuse.launch.prepare", prevented)
    monkeypatch.setattr("rediffuse.processes.run", prevented)
    return tmp_path


common = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(typed=commands)
@settings(common, max_examples=60)
def test_no_words_end_in_a_traceback(alone: Path, typed: list[str]) -> None:
    ends_well(typed)
    assert not [*alone.glob("root/*/run.json")], typed


@pytest.mark.slow
@given(typed=commands)
@settings(common, max_examples=5000)
def test_nor_do_five_thousand(alone: Path, typed: list[str]) -> None:
    ends_well(typed)
    assert not [*alone.glob("root/*/run.json")], typed
