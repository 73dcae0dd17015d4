"""What all fault tests of a process share: a zygote, an undisturbed run, and a report."""

import os
import platform
import re
import shutil
import time
from collections import Counter
from datetime import date
from pathlib import Path

import cli
import pytest
import torch
from faults_harness import Zygote
from faults_runs import INTERVAL, WORDS, Golden, left, place, runs_in


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    return cli.zygote()


@pytest.fixture(scope="session")
def golden(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    root = place(tmp_path_factory.mktemp("golden"))
    began = time.monotonic()
    zygote.run("train", *WORDS, root=root, check=0)
    seconds = time.monotonic() - began
    return Golden(left(runs_in(root)[0]), seconds)


@pytest.fixture(scope="session")
def stopped(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that was stopped after its first checkpoint."""
    root = place(tmp_path_factory.mktemp("stopped"))
    zygote.run("train", *WORDS, f"training.stop_after_images={INTERVAL}", root=root, check=0)
    return root


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return shutil.copytree(stopped, tmp_path / "half")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", type=Path, help="Write what was shown to this file.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write a report: how each file of tests ended, and all that its tests have printed."""
    file: Path | None = terminalreporter.config.getoption("--fault-report")
    if file is None:
        return
    ended: dict[str, Counter[str]] = {}
    told: dict[str, list[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            name = Path(report.nodeid.partition("::")[0]).name
            ended.setdefault(name, Counter())[outcome] += 1
            said = re.sub(r"/\S*/pytest-of-\S+?/popen-\w+/", ".../", report.capstdout)
            told.setdefault(name, []).extend(filter(None, said.splitlines()))
    cores = f"{len(os.sched_getaffinity(0))} cores"
    lines = [
        "# What was done to it, and what came of it",
        "",
        f"Written by `pytest tests/faults -m 'slow or not slow' --fault-report {file.name}` on "
        f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, {cores}.",
        "",
        "| tests | passed | failed | skipped |",
        "|---|---|---|---|",
        *(
            f"| {name} | {n['passed']} | {n['failed'] + n['error']} | {n['skipped']} |"
            for name, n in sorted(ended.items())
        ),
    ]
    for name, shown in sorted(told.items()):
        if shown:
            lines += ["", f"## {name}", "", *(f"- {line}" for line in sorted(shown))]
    file.write_text("\n".join(lines) + "\n")
