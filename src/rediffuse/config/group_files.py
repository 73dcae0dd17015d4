"""The YAML files of configuration groups: Rediffuse's own, and those of ./configs.

A file of ./configs takes the place of the one of the same group and name. Another project may have
a `configs/` folder too, so its files are told apart by what stands in them.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rediffuse.config.schema import Config, Part
from rediffuse.errors import ConfigError
from rediffuse.reading import read_bytes
from rediffuse.words import did_you_mean

OURS = Path(__file__).parent.parent / "configs"
_OF_SAMPLING = ("solver", "grid", "guidance", "threshold")
_GLOBAL = re.compile(r"\A(#.*\n)*#\s*@package\s+_global_", re.MULTILINE)


class Loader(yaml.SafeLoader):
    """YAML whose keys are unique and text; YAML 1.1 reads 1e-4 as text, and this one as a number.

    Raises:
        yaml.constructor.ConstructorError: for a key that stands twice, or is no text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what the base class drops (the first of two equal keys) or converts (`on`)."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                kind = key.tag.rpartition(":")[2]
                what = f"the key {key.value!r} is read as {kind}; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            if key.value in lines:
                what = f"the key '{key.value}' stands twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            lines[key.value] = line
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def problem(refused: Exception, with_file: bool = False) -> str:
    """What is wrong with a YAML file, and in which line, in one line."""
    what = " ".join(str(getattr(refused, "problem", None) or "not YAML").split())
    mark = getattr(refused, "problem_mark", None)
    if mark is None:
        return what
    file = f"{mark.name}: " if with_file else ""
    return f"{file}line {mark.line + 1}: {what}"


def names() -> dict[str, list[str]]:
    """The names of each group's files, those of ./configs last."""
    found: dict[str, list[str]] = {}
    for file in sorted(OURS.glob("*/*.yaml")):
        if file.parent.name != "root":
            found.setdefault(file.parent.name, []).append(file.stem)
    for group, name in _theirs():
        if name not in found[group] and not _is_foreign(group, name):
            found[group].append(name)
    return found


def find(group: str, name: str) -> Path | None:
    """The file of a group's name, or None where there is none."""
    if not name.isidentifier():
        return None
    theirs, ours = _home() / group / f"{name}.yaml", OURS / group / f"{name}.yaml"
    if theirs.is_file() and not why_foreign(group, name):
        return theirs
    return ours if ours.is_file() else None


def why_foreign(group: str, name: str) -> str | None:
    """Why ./configs/GROUP/NAME.yaml is not Rediffuse's; None where it is, or does not exist.

    Raises:
        ConfigError: if it cannot be read as YAML.
    """
    file = _home() / group / f"{name}.yaml"
    if not file.is_file():
        return None
    what = _foreign_mark(group, file)
    return f"configs/{group}/{name}.yaml belongs to another program: {what}" if what else None


@contextmanager
def search_path() -> Iterator[list[Path]]:
    """The folders where files are looked for, in order; nothing of another project is in them."""
    home, foreign = _home(), [pair for pair in _theirs() if _is_foreign(*pair)]
    if not home.is_dir() or not foreign:
        yield [home, OURS] if home.is_dir() else [OURS]
        return
    with tempfile.TemporaryDirectory(prefix="rediffuse-configs-") as folder:
        for group, name in _theirs():
            if (group, name) not in foreign:
                copy = Path(folder, group, f"{name}.yaml")
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(home / group / copy.name, copy)
        yield [Path(folder), OURS]


def _home() -> Path:
    return Path.cwd() / "configs"


def _theirs() -> list[tuple[str, str]]:
    """(group, name) of every file in ./configs that is in a folder named like one of our groups."""
    groups = {folder.name for folder in OURS.iterdir() if folder.name != "root"}
    files = sorted(_home().glob("*/*.yaml"))
    return [(file.parent.name, file.stem) for file in files if file.parent.name in groups]


def _is_foreign(group: str, name: str) -> bool:
    try:
        return why_foreign(group, name) is not None
    except ConfigError:  # told when it is chosen
        return False


def _foreign_mark(group: str, file: Path) -> str | None:
    """What tells that a file is not Rediffuse's, or None."""
    stat = file.stat()
    return _foreign_mark_of(group, file, stat.st_mtime_ns, stat.st_size)


@cache
def _foreign_mark_of(group: str, file: Path, changed: int, size: int) -> str | None:
    try:
        text = read_bytes(file, 1_000_000, links=True).decode("utf-8-sig")
        tree = yaml.load(text, Loader)  # a SafeLoader
    except OSError as refused:
        raise ConfigError(f"{file}: cannot be read ({refused.strerror})") from None
    except (yaml.YAMLError, RecursionError) as refused:
        raise ConfigError(f"{file}: {problem(refused)}") from None
    except ValueError as refused:
        raise ConfigError(f"{file}: {refused}, so it is no configuration") from None
    if not isinstance(tree, dict):
        return "it has no `key: value` lines"
    if _has_target(tree):
        return "it has a `_target_`"
    if _GLOBAL.match(text):
        return _unknown(tree, [*Config.model_fields, *_OF_SAMPLING, "defaults"])
    if group == "experiment":
        raise ConfigError(f"{file}: an experiment begins with the line `# @package _global_`")
    if group in (*_OF_SAMPLING, "norm") or issubclass(_section(group), Part):
        return None if isinstance(tree.get("name"), str) else "it has no `name`"
    return _unknown(tree, [*_section(group).model_fields, "defaults"])


def _section(group: str) -> Any:
    return Config.model_fields[group].annotation


def _unknown(tree: Mapping[str, Any], known: list[str]) -> str | None:
    """The first unknown key, or None; a single misspelt key is reported when it is composed."""
    other = [key for key in tree if key not in known]
    if not other or (len(other) == 1 and did_you_mean(other[0], known)):
        return None
    return f"Rediffuse has no key `{other[0]}`"


def _has_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))
