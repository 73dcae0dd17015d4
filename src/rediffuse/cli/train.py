"""`rediffuse train` and `rediffuse resume`."""

from collections.abc import Sequence
from pathlib import Path

import click

from rediffuse import processes
from rediffuse.cli import complete, options
from rediffuse.words import say


@click.command(context_settings=options.WORDS)
@options.words
@options.config_file
@click.option("--run-name", "--run_name", "name", help="What `rediffuse runs` calls it.")
@click.option("-m", "--multirun", is_flag=True, help="One run for each of `key=a,b,c`.")
@click.option("--show-config", is_flag=True, help="Print the whole configuration and stop.")
@options.root
@options.trust
def train(
    words: tuple[str, ...],
    file: Path | None,
    name: str | None,
    multirun: bool,
    show_config: bool,
    root: Path | None,
    trust: tuple[str, ...],
) -> int:
    """Train a model; every KEY of the configuration can be set, and every group (`schedule=flow`).

    \b
    Examples:
      rediffuse train
      rediffuse train experiment=mnist training.epochs=5 --learning_rate 1e-3
      rediffuse train experiment=folder64 data.path=my/images data.on_broken=skip
      rediffuse train schedule=flow target=flow times=uniform -m seed=0,1,2
      rediffuse train resume_from_run_id=ID training.epochs=200
      rediffuse train --show-config    every key with its value
    """
    if multirun and not show_config:
        return _train_each(words, _shared(file, name, root, trust))
    if show_config:
        _show(words, file, name, root, multirun)
        return 0
    from rediffuse import launch
    from rediffuse.config.compose import compose, run_ids

    rest, ids = run_ids(words)
    if ids["resume_from_run_id"]:
        return launch.resume(ids["resume_from_run_id"], rest, root=root, trusted=trust)
    config = compose(rest, file, {"name": name} if name else {})
    return launch.train(config, root=root, parent=ids["parent_run_id"])


@click.command(context_settings=options.WORDS)
@click.argument("run_id", shell_complete=complete.run_ids)
@options.words
@options.root
@options.trust
def resume(run_id: str, words: tuple[str, ...], root: Path | None, trust: tuple[str, ...]) -> int:
    """Go on with a run where its newest checkpoint is, with the run's own configuration.

    Length, logging and device may change; learning rate, batch size and the like may too and are
    recorded; network, schedule, target and data may not.

    \b
    Examples:
      rediffuse resume 3f2a91
      rediffuse resume 3f2a91 training.epochs=200
    """
    from rediffuse import launch

    return launch.resume(run_id, words, root=root, trusted=trust)


def _shared(
    file: Path | None, name: str | None, root: Path | None, trust: Sequence[str]
) -> list[str]:
    """The options that every run of a multirun is started with."""
    options = {"--config": file, "--run-name": name, "--root": root}
    given = [f"{option}={value}" for option, value in options.items() if value]
    return [*given, *(f"--trust={package}" for package in trust)]


def _train_each(words: Sequence[str], shared: Sequence[str]) -> int:
    """Train one run after another, each in a process of its own, so that nothing survives a run.

    Return the highest exit code. A signal ends the run that is trained, and no other one begins.
    """
    from rediffuse.config.compose import sweep

    processes.alone("train -m")
    codes = [0]
    for combination in sweep(words):
        say(f"── rediffuse train {' '.join(combination)}")
        code, received = processes.run(processes.command("train", *shared, *combination))
        if received:
            return processes.exit_code(received)
        codes.append(code)
    return max(codes)


def _show(
    words: Sequence[str], file: Path | None, name: str | None, root: Path | None, multirun: bool
) -> None:
    """Print the whole configuration, of each combination as a document of one YAML."""
    from rediffuse.config.compose import compose, dump_yaml, run_ids, sweep

    for combination in sweep(words) if multirun else [words]:
        if multirun:
            say(f"--- # rediffuse train {' '.join(combination)}")
        rest, ids = run_ids(combination)
        if word := ids["resume_from_run_id"]:
            from rediffuse import launch, runs

            _, config = launch.to_resume(runs.find_run(runs.runs_root(root), word), rest)
        else:
            config = compose(rest, file, {"name": name} if name else {})
        say(dump_yaml(config).removesuffix("\n"))
