"""Secrets of a run: `private.yaml`, which its owner alone can read.

A path or an argument of the data may hold a token. `config.yaml` has it masked, since it is shown,
copied and sent; its value is kept here, so that the images are found when the run is resumed.
"""

from typing import Any

import yaml
from pydantic import ValidationError

from rediffuse.config.compose import dump_yaml, leaves, read_yaml
from rediffuse.config.schema import Config, Data
from rediffuse.errors import ConfigError, RunError
from rediffuse.runs import Run
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.words import MASK, masked_tree


def check(config: Config, before: Config | None = None) -> None:
    """Refuse secrets outside of the data, but those that a run had `before`.

    Raises:
        ConfigError: naming the key.
    """
    flat = leaves(config.model_dump(exclude={"data"}))
    known = leaves(before.model_dump()) if before else {}
    for key, shown in masked_tree(flat).items():
        if shown != flat[key] != known.get(key):
            raise ConfigError(
                f"{key}={shown} holds what looks like a secret, and a run writes its configuration "
                "down; have the part read it from an environment variable"
            )


def files(config: Config) -> dict[str, bytes]:
    """The configuration as a new run keeps it: what may be shown, and what may not."""
    hidden = _hidden(config.data)
    private = {"private.yaml": _dump(hidden)} if hidden else {}
    return {"config.yaml": dump_yaml(config).encode(), **private}


def write_config(run: Run, config: Config) -> None:
    """Replace a run's configuration; hold its lock. What is masked in it keeps its secret."""
    tree = config.data.model_dump()
    known = {key: value for key, value in _read(run).items() if _is_masked(tree.get(key))}
    hidden = known | _hidden(config.data)
    if hidden:
        write_atomically(run.private, _dump(hidden), mode=0o600)
    write_atomically(run.config, dump_yaml(config).encode())
    if not hidden:
        run.private.unlink(missing_ok=True)


def restored(run: Run, data: Data) -> Data:
    """The data of a run's configuration with the values that are masked there.

    Raises:
        RunError: if a value is not in `private.yaml`, or it cannot be read.
    """
    tree = data.model_dump()
    for key in [key for key, value in tree.items() if _is_masked(value)]:
        known = _read(run)
        if key not in known:
            raise RunError(
                f"data.{key} is {tree[key]!r}: its secret is not in {run.private}; give it anew"
            )
        tree[key] = known[key]
    try:
        return Data.model_validate(tree)
    except ValidationError as wrong:
        why = wrong.errors()[0]["msg"]
        raise RunError(f"{run.private} does not fit the configuration: {why}") from None


def _hidden(data: Data) -> dict[str, Any]:
    tree = data.model_dump()
    return {key: tree[key] for key, shown in masked_tree(tree).items() if shown != tree[key]}


def _is_masked(value: Any) -> bool:
    return MASK in str(value)


def _read(run: Run) -> dict[str, Any]:
    try:
        return read_yaml(run.private) if run.private.exists() else {}
    except ConfigError as damaged:
        raise RunError(f"{damaged}; remove it, and give its values anew") from None


def _dump(hidden: dict[str, Any]) -> bytes:
    return yaml.safe_dump(hidden, allow_unicode=True).encode()
