"""What is seen: no line is wider than the terminal, and a pipe gets words and nothing else."""

import fcntl
import inspect
import io
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli import TINY
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from rich.cells import cell_len

from rediffuse import overview, plan, tables
from rediffuse.cli import _STEPS, main
from rediffuse.cli import rediffuse as program
from rediffuse.config.compose import compose, leaves
from rediffuse.progress import Progress
from rediffuse.words import json_text, say, tell, visible

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WHOLE = re.compile(r"\S*/\S+|\b[0-9a-f]{32}\b")  # paths and ids are copied, and never broken


def commands(group: click.Group = program, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name."""
    for name, command in group.commands.items():
        yield f"{above}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{above}{name} ")


def in_terminal(columns: int, *words: str, root: Path, **more: str) -> str:
    """What a command writes to a terminal, all of it; `more` goes into its environment."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "rediffuse", *words]
    with subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env=surroundings(root) | more, cwd=root
    ) as process:
        os.close(its)
        seen = b""
        while piece := _read(ours):
            seen += piece
    os.close(ours)
    assert process.returncode == 0, seen.decode()
    return seen.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so where others end the file
        return b""


def surroundings(root: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    return {**kept, "REDIFFUSE_ROOT": str(root), "TERM": "xterm-256color"}


def piped(*words: str, root: Path) -> tuple[str, str]:
    """Standard output and standard error of a command that is not on a terminal."""
    command = [sys.executable, "-m", "rediffuse", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=surroundings(root), cwd=root, check=True
    )
    return done.stdout, done.stderr


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """The same in this process, where torch is there already."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0, capsys.readouterr().err
    return tuple(capsys.readouterr())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A root, the id of a run in it, and what training it looked like in a narrow terminal."""
    root = tmp_path_factory.mktemp("root")
    words = ["train", *TINY, "training.images=2880", "--run-name", "a name that is rather long"]
    seen = in_terminal(80, *words, root=root)
    return root, re.search(r"\brun +([0-9a-f]{32})", seen)[1], seen


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rediffuse"])
    monkeypatch.delenv("COLUMNS", raising=False)


def lines(seen: str) -> list[str]:
    """All that ever stood in a line, also what a bar has painted over since."""
    return [ESCAPE.sub("", line) for line in re.split(r"[\r\n]+", seen)]


def too_wide(seen: str, columns: int) -> list[str]:
    return [line for line in lines(seen) if cell_len(WHOLE.sub("", line)) > columns]


# Terminals


def test_training_shows_a_bar_that_keeps_to_its_line(trained: tuple[Path, str, str]) -> None:
    _, _, seen = trained
    assert too_wide(seen, 80) == []
    bars = [line for line in lines(seen) if "of 2,880 images" in line and "%" in line]
    assert any("left  loss" in line for line in bars), seen
    assert all(cell_len(bar) <= 80 for bar in bars)


SAMPLE = ["sample", "RUN", "--n", "64", "--solver", "ancestral", "--steps", "200"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [(80, ["runs"]), (200, ["runs"]), (80, ["show", "RUN"]), (200, ["show", "RUN"]), (80, SAMPLE)],
    ids=["runs, 80", "runs, 200", "show, 80", "show, 200", "sample, 80"],
)
def test_no_line_is_wider_than_the_terminal_nor_stretched_to_it(
    trained: tuple[Path, str, str], columns: int, words: list[str]
) -> None:
    root, run, _ = trained
    seen = in_terminal(columns, *(word.replace("RUN", run) for word in words), root=root)
    assert too_wide(seen, columns) == []
    if "show" not in words:  # whose values are as long as they are
        assert too_wide(seen, 120) == []
    if words[0] == "sample":
        assert re.search(r"\d+% \|.*\| \d+ of 64 images  [\d.]+/s  00:0\d left", seen), seen


def test_a_pipe_gets_no_escape_code_no_carriage_return_and_nothing_cut(
    trained: tuple[Path, str, str],
) -> None:
    root, run, _ = trained
    told = [piped(*words, root=root) for words in (["runs"], ["sample", run, "--n", "8"])]
    for out, err in told:
        for stream in (out, err):
            assert "\x1b" not in stream
            assert "\r" not in stream
            assert "…" not in stream
            assert all(line == line.rstrip() for line in stream.splitlines())
    assert "a name that is rather long" in told[0][0]


def test_colours_are_for_terminals_that_want_them(trained: tuple[Path, str, str]) -> None:
    root, _, _ = trained
    assert "\x1b[32mFINISHED" in in_terminal(80, "runs", root=root)
    uncoloured = in_terminal(80, "runs", root=root, NO_COLOR="1")
    assert "FINISHED" in uncoloured
    assert not re.search(r"\x1b\[[34]\d", uncoloured)


def test_what_could_move_a_cursor_is_shown_as_an_escape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overview.print_table([{"id": "a" * 32, "name": "\x1b[2Jgone\r"}])
    assert r"\x1b[2Jgone\r" in capsys.readouterr().out


def test_off_a_terminal_progress_is_a_whole_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with Progress(1000, first=100) as bar:
        for images in (200, 300, 400):
            bar.move(images, {"loss": 0.25})
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"(\d00 of 1,000 images  \d\.\d/s  \d\d:\d\d left  loss 0.25\n)+", err), err


# Facts as JSON

FACTS = {
    "runs": ["runs"],
    "show": ["show", "RUN"],
    "plan": ["plan", *TINY, "training.images=480"],
    "data inspect": ["data", "inspect", "digits"],
    "data duplicates": ["data", "duplicates", "digits"],
    "compare": ["compare", "RUN", "RUN", "--n", "2"],
    "evaluate": ["evaluate", "RUN", "--n", "64", "--allow-small-n"],
    "sweep": ["sweep", "RUN", "--n", "64", "--allow-small-n", "--steps", "2,3"],
    "memorisation": ["memorisation", "RUN", "--n", "32"],
    "diagnose": ["diagnose", "RUN", "--n", "16", "--levels", "2"],
    "reproduce": ["reproduce", "RUN", "--steps", "2"],
}


def test_every_command_that_tells_facts_has_json() -> None:
    have = {name for name, c in commands() if any("--json" in p.opts for p in c.params)}
    assert have == {*FACTS, "doctor"}  # of which tests/test_doctor.py tells


@pytest.mark.parametrize("name", FACTS)
def test_json_is_all_that_stands_on_standard_output(
    trained: tuple[Path, str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    root, run, _ = trained
    monkeypatch.setattr(plan, "MEASURED_S", 0.1)
    monkeypatch.setattr("rediffuse.references.CLASSIFIER_IMAGES", 640)
    words = [word.replace("RUN", run) for word in FACTS[name]]
    out, _ = called(capsys, *words, "--json", "--root", str(root))
    json.loads(out, parse_constant=pytest.fail)


# Help


def examples(command: click.Command) -> list[list[str]]:
    """The words of each example, without what is said about it and where it is sent."""
    _, found, text = inspect.cleandoc(command.help or "").partition("\b\nExamples:\n")
    block = text.split("\n\n")[0] if found else ""
    told = (re.split(r"   +| [>|] ", line.strip())[0] for line in block.splitlines())
    return [shlex.split(line) for line in told]


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_the_help_of_every_command_has_examples_that_parse(name: str) -> None:
    command = dict(commands())[name]
    found = examples(command)
    assert found, f"{name} has no part 'Examples:'"
    for words in found:
        assert words[0] == "rediffuse"
        at: click.Command = program
        rest = words[1:]
        while isinstance(at, click.Group):
            at, rest = at.commands[rest[0]], rest[1:]
        asked = at.make_context(at.name, rest, color=False)
        settings = [w for w in asked.params.get("words") or () if "_run_id" not in w]
        if settings and at.name not in ("resume", "pack", "inspect", "duplicates"):
            compose([word for word in settings if "," not in word])


@pytest.mark.parametrize("name", ["", *(name for name, _ in commands())])
def test_help_fits_into_80_columns(name: str) -> None:
    command = dict([("", program), *commands()])[name]
    text = command.get_help(click.Context(command, info_name="rediffuse", terminal_width=80))
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_lists_every_command_once_in_the_order_of_work() -> None:
    listed = [command.name for commands in _STEPS.values() for command in commands]
    assert sorted(listed) == sorted(program.commands)
    text = program.get_help(click.Context(program, info_name="rediffuse"))
    places = [text.index(f"\n  {name} ") for name in listed]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "call",
    [
        "program.main(['--help'], standalone_mode=False)",
        "assert [i.value for i in ShellComplete(program, {}, 'rediffuse', '_').get_completions("
        "['train'], 'schedule=fl')] == ['schedule=flow', 'schedule=flow_resolution']",
    ],
    ids=["help", "completion"],
)
def test_neither_help_nor_completion_waits_for_what_is_heavy(call: str) -> None:
    heavy = "torch numpy hydra pydantic yaml rich tqdm mlflow"
    code = (
        "import sys; from click.shell_completion import ShellComplete\n"
        f"from rediffuse.cli import rediffuse as program\n{call}\n"
        f"found = {{*{heavy.split()}}} & {{*sys.modules}}\nassert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Completion


def completed(*words: str) -> list[str]:
    *before, last = words
    shell = ShellComplete(program, {}, "rediffuse", "_REDIFFUSE_COMPLETE")
    return [item.value for item in shell.get_completions(before, last)]


def test_run_ids_parts_and_keys_are_completed(trained: tuple[Path, str, str]) -> None:
    root, run, _ = trained
    assert completed("show", "--root", str(root), run[:3]) == [run]
    assert completed("sample", run, "--solver", "heu") == ["heun"]
    assert completed("sweep", run, "--solver", "heun,euler_m") == ["heun,euler_maruyama"]
    assert completed("train", "training.ep") == ["training.epochs="]
    assert completed("train", "schedule", "=", "edm") == ["edm"]  # as bash splits it
    assert "objective=hybrid" in completed("train", "objective=")
    assert completed("show", "--root", str(root / "nothing"), "") == []


def test_every_key_of_the_configuration_is_completed() -> None:
    keys = {*leaves(compose(()).model_dump())}
    offered = {word.partition("=")[0] for word in completed("train", "")}
    assert {key for key in keys - offered if key.count(".") < 2} == set()
    assert not {"schedule.defaults", "schedule.schedule", "objective.objective"} & offered


def test_bash_completes_a_real_line(trained: tuple[Path, str, str], tmp_path: Path) -> None:
    root, run, _ = trained
    program = tmp_path / "rediffuse"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rediffuse "$@"\n')
    program.chmod(0o755)
    script = (
        "source <(rediffuse completion bash)\n"
        f"COMP_WORDS=(rediffuse sample {run[:6]}); COMP_CWORD=2; _rediffuse_completion rediffuse\n"
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env={**surroundings(root), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [run]
    assert done.stderr == ""


# Texts of others


HOSTILE = {
    "\x1b[2J\x1b[31m": r"\x1b[2J\x1b[31m",
    "\x9b2J": r"\x9b2J",
    "a\rb\bc\x7f": r"a\rb\x08c\x7f",
    "cat\nerror: all is lost": r"cat\nerror: all is lost",
    "\u202egnp.exe\u2066": r"\u202egnp.exe\u2066",
    "\ufeffzero\u200bwidth\u00ad": r"\ufeffzero\u200bwidth\xad",
    "two\u2028lines\u2029": r"two\u2028lines\u2029",
    "half \ud83d": r"half \ud83d",
    "größe 猫 नमस्ते می‌خواهم 👩‍👧 e\u0301": "größe 猫 नमस्ते می‌خواهم 👩‍👧 e\u0301",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items())
def test_control_and_direction_characters_are_shown_as_escapes(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visible(text) == shown
    tables.table(("name",), [[text]], left=("name",))
    tables.facts({"name": text})
    tables.hanging(text.replace(" ", ""), 2)
    say(f"a line of ours\n{text}".replace("\n", " "))
    for line in capsys.readouterr().out.splitlines():
        assert visible(line) == line


def test_a_line_above_a_bar_has_no_escape_sequence_but_the_bars_own() -> None:
    ours, its = pty.openpty()
    with os.fdopen(its, "w") as terminal:
        bar = Progress(10, stream=terminal)
        bar.say("run \x1b]0;title\x07 \u202e", terminal)
        bar.close()
        seen = os.read(ours, 65536).decode()
    os.close(ours)
    assert r"run \x1b]0;title\x07 \u202e" in seen


def test_an_error_is_one_line_whatever_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "no\nrun\x1b[2J"])
    assert capsys.readouterr().err.count("\n") == 1


def test_json_has_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    told = json_text({text: text for text in HOSTILE})
    assert set(told) <= {"\n", *map(chr, range(32, 127))}
    assert json.loads(told) == {text: text for text in HOSTILE}


def test_only_one_place_writes_to_the_terminal() -> None:
    """Everything else passes through it, and so through `visible`."""
    package = Path(tables.__file__).parent
    found = [
        f"{file.relative_to(package)}: {line.strip()}"
        for file in sorted(package.rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"(?<!\.)\b(print|click\.echo|click\.secho)\(|\bstd(out|err)\.write\(", line)
        and not re.search(r"click\.echo\((json_text\(|script\))", line)
    ]
    assert found == ["words.py: print(encodable(line, stream), file=stream, flush=True)"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_an_output_of_any_encoding_gets_every_line(encoding: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding)
    tell("in  größe/猫 …", stream)
    assert len(written.getvalue().decode(encoding).splitlines()) == 1
    assert written.getvalue().decode(encoding).startswith("in  gr")
    if encoding == "ascii":
        assert written.getvalue() == b"in  gr\\xf6\\xdfe/\\u732b ~\n"


@pytest.mark.parametrize("columns", [20, 30, 80])
def test_a_narrow_terminal_loses_no_value(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    facts = {"data.validation_images_asked_for": "4321", "id": "0123456789abcdef0123456789abcdef"}
    tables.facts(facts)
    row = ("0123abcd", "FINISHED", "2026-11-30 20:57", "1,234,567")
    tables.table(("id", "status", "created", "images"), [row, row], left=("id",))
    seen = capsys.readouterr().out
    assert max(map(cell_len, seen.splitlines())) <= columns
    assert all(word in re.sub(r"\s", "", seen) for word in [*facts, *facts.values()])
    assert all(seen.count(cell) == 2 for cell in row)


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "abcdef", "--output-dir", ""),
        ("sample", "abcdef", "--input", ""),
        ("sample", "abcdef", "--input", "x.png", "--mask", ""),
        ("report", "abcdef", "--output", ""),
        ("report", "abcdef", "--pictures", ""),
        ("compare", "abcdef", "abcdef", "--html", ""),
        ("compare", "abcdef", "abcdef", "--output-dir", ""),
    ],
)
def test_an_empty_path_is_refused_and_is_not_the_working_directory(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(program, words)
    assert done.exit_code == 2
    assert "not an empty text" in done.output
