"""From files and flags to a checked `Config`. The only importer of Hydra.

Hydra chooses the files (`schedule=cosine`, `experiment=mnist`) and reads the override grammar;
single values are set here, in a plain tree, so that one check with one wording finds every mistake.
"""

import itertools
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rediffuse.config import group_files
from rediffuse.config.schema import DECLARED, FREE, Config, Part
from rediffuse.errors import ConfigError
from rediffuse.reading import read_bytes
from rediffuse.words import did_you_mean, masked_tree, tell

Tree = dict[str, Any]

_HYDRA_ROOT = "train"


def compose(
    words: Sequence[str], file: Path | None = None, values: Mapping[str, Any] | None = None
) -> Config:
    """Compose a run's configuration: the defaults, then FILE.yaml, then `values`, then `words`.

    `values` maps full keys to values; `words` are overrides as typed on a command line.

    Raises:
        ConfigError: for an unknown key, a wrong value or a combination that cannot work.
    """
    typed = [*(values or {}).items(), *typed_values(words)]
    from_file = read_yaml(file) if file else {}
    groups = group_files.names()
    choices = {k: v for k, v in from_file.items() if k in groups and isinstance(v, str)}
    choices |= {key: str(value) for key, value in typed if key in groups and not _is_part(value)}
    tree = _chosen(choices, groups)
    own = {k: v for k, v in from_file.items() if k not in choices}
    training = own.get("training")
    given = {f"training.{key}" for key in training} if isinstance(training, Mapping) else set()
    set_values(tree, _replaced_lengths(given))
    _merge(tree, own)
    set_values(tree, [(key, value) for key, value in typed if key not in choices])
    return checked(tree)


def typed_values(words: Sequence[str]) -> list[tuple[str, Any]]:
    """`key=value` and `--key value` words as (key, value), read by Hydra's grammar.

    Raises:
        ConfigError: for a word that is neither.
    """
    return list(_overrides(words))


def part_from_file(axis: str, name: str) -> Tree:
    """What configs/AXIS/NAME.yaml says of a part, or nothing if there is no such file."""
    file = group_files.find(axis, name)
    return read_yaml(file) if file else {}


_LENGTHS = ("training.epochs", "training.images")
_HORIZON, _FOLLOWS = "rate.horizon_images", "rate.horizon_follows_plan"


def refuse_groups(values: Sequence[tuple[str, Any]], tree: Tree) -> None:
    """Refuse to choose other files for a run that has begun.

    Raises:
        ConfigError: naming what the run has and what was asked for.
    """
    for key, value in values:
        full = f"sampling.{key}" if key in _OF_SAMPLING else key
        has = tree["sampling"].get(key) if key in _OF_SAMPLING else tree.get(key)
        if isinstance(has, dict) and not isinstance(value, Mapping):
            raise ConfigError(
                f"{key} is '{has.get('name', 'settled')}' in this run and cannot become '{value}' "
                f"on the way; set single values by their full keys, as {full}.{next(iter(has))}"
            )


def set_values(tree: Tree, values: Sequence[tuple[str, Any]]) -> None:
    """Set full keys (`training.epochs`) or unambiguous last names (`--epochs`) in a plain tree.

    Raises:
        ConfigError: for a name that no section has, or that more than one has.
    """
    full = [(_full_key(tree, key), value) for key, value in values]
    given = {key for key, _ in full}
    full += _replaced_lengths(given)
    if _HORIZON in given and _FOLLOWS not in given:
        full.append((_FOLLOWS, dict(full)[_HORIZON] is None))  # a typed horizon stays
    for key, value in sorted(full, key=lambda pair: not pair[0].endswith(".name")):
        *sections, last = key.split(".")
        at = tree
        for section in sections:
            if not isinstance(at.get(section), dict):
                raise ConfigError(unknown_key(key, tree))
            at = at[section]
        if last == "name" and sections and at.get("name", value) != value:
            _drop_arguments(at, sections)
        at[last] = _of_another_name(last, at.get(last), value)


def _drop_arguments(part: Tree, sections: Sequence[str]) -> None:
    """Remove the arguments of a part that is about to get another name; they were the old one's."""
    field = Config.model_fields.get(".".join(sections))
    kept = getattr(field.annotation if field else Part, "model_fields", {})
    for key in set(part) - set(kept):
        del part[key]


def _of_another_name(axis: str, part: Any, value: Any) -> Any:
    """What a part becomes that is set to a name alone (`model.norm=batch`): what its file says."""
    if not (isinstance(value, str) and isinstance(part, dict) and "name" in part):
        return value
    own = part_from_file(axis, value)
    return own.get(axis, own) or {"name": value}


def _replaced_lengths(given: Collection[str]) -> list[tuple[str, None]]:
    """The length that is unset because the other one is given: epochs replace images."""
    pairs = (_LENGTHS, _LENGTHS[::-1])
    return [(other, None) for one, other in pairs if one in given and other not in given]


def checked(tree: Tree) -> Config:
    """Hold a plain tree to the schema; one line for the first thing that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as refused:
        first = refused.errors()[0]
        key = ".".join(str(word) for word in first["loc"] if not _is_branch(word))
        if first["type"] == "extra_forbidden":
            raise ConfigError(unknown_key(key, tree)) from None
        if first["type"] == "value_error":
            raise ConfigError(first["msg"].removeprefix("Value error, ")) from None
        if first["type"] == "missing":
            raise ConfigError(f"{key}: this key is needed") from None
        if first["type"] == "model_type":
            *_, axis = key.split(".")
            chosen = f"choose it with {axis}={first['input']}, or set single values, as {key}.name"
            raise ConfigError(f"{key} is a part with arguments; {chosen}") from None
        given = "" if isinstance(first["input"], dict) else f", not {_short(first['input'])}"
        raise ConfigError(f"{key}: {_plain(first['msg'])}{given}") from None


def unknown_key(key: str, tree: Tree) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    near = did_you_mean(key, (known for known in [*_all_keys(tree), *tree] if known != key))
    return f"{key}: no such key{near} (`rediffuse train --help` tells how to list them all)"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A flat view of a tree: full key to value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the declared keys that a resumed run wants changed; free ones pass, fixed ones do not.

    Raises:
        ConfigError: if a fixed key differs, naming both values.
    """
    dropped, drops = old.training.label_dropout, new.training.label_dropout
    if (dropped > 0) != (drops > 0):
        raise ConfigError(
            f"training.label_dropout is {dropped:g} here and cannot become {drops:g}: with 0 a "
            "network has no entry for 'no class', above 0 it has one; start a new run for that"
        )
    before, after = leaves(old.model_dump()), leaves(new.model_dump())
    differing = {
        key: (before.get(key), after.get(key))
        for key in (*before, *(k for k in after if k not in before))
        if before.get(key) != after.get(key)
    }
    for key, (was, now) in differing.items():
        if not is_under(key, FREE + DECLARED):
            raise ConfigError(
                f"{key} is {was!r} in this run and cannot become {now!r} on the way; start a new "
                "run for that (`rediffuse train ... parent_run_id=ID` records where it came from)"
            )
    return {key: pair for key, pair in differing.items() if not is_under(key, FREE)}


_MOST_RUNS = 10_000


def sweep(words: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of `key=a,b,c` words, as Hydra's `--multirun` spells them.

    Run ids are split at commas and stay text; `glob(...)` chooses among the files of a group.

    Raises:
        ConfigError: for a word that is no override, a sweep without an end, or over 10,000 runs.
    """
    alternatives = [_alternatives(word) for word in joined(words)]
    if math.prod(map(len, alternatives)) > _MOST_RUNS:
        raise ConfigError(f"{_short(' '.join(words))}: more than {_MOST_RUNS:,} runs")
    yield from (list(combination) for combination in itertools.product(*alternatives))


def _alternatives(word: str) -> list[str]:
    """The overrides that one word of a sweep stands for."""
    from hydra.core.override_parser.types import Glob

    key, _, text = word.partition("=")
    if key in RUN_IDS:
        return [f"{key}={run_id}" for run_id in text.split(",")]
    try:
        parsed = _parsed(word)
    except ConfigError:
        if _is_text(key):
            return [word]  # a path as it was typed, which need not follow Hydra's grammar
        raise
    if not parsed.is_sweep_override():
        return [word]
    if isinstance(globbed := parsed.value(), Glob):
        if key not in (groups := group_files.names()):
            raise ConfigError(f"{_short(word)}: glob() chooses among the files of a group")
        return [f"{key}={name}" for name in globbed.filter(groups[key])]
    if not (parsed.is_choice_sweep() or parsed.is_range_sweep()):
        raise ConfigError(f"{_short(word)}: -m takes key=a,b,c, choice(a,b) and range(0,3)")
    try:
        values = list(itertools.islice(parsed.sweep_string_iterator(), _MOST_RUNS + 1))
    except (ValueError, OverflowError) as refused:  # a range with a step of 0, say
        raise ConfigError(f"{_short(word)}: {refused}") from None
    return [f"{parsed.get_key_element()}={value}" for value in values]


def read_yaml(file: Path, most_bytes: int = 1_000_000) -> Tree:
    """Read plain YAML data: no tags, no aliases, no interpolation.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    try:
        # Some editors write a byte order mark first.
        text = read_bytes(file, most_bytes, links=True).decode("utf-8-sig")
        depth = 0
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise ConfigError(f"{file}: YAML aliases are not read; write the value out")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _DEEPEST:
                raise ConfigError(f"{file}: nested more than {_DEEPEST} deep")
        tree = yaml.load(text, group_files.Loader)  # a SafeLoader
    except OSError as refused:
        raise ConfigError(f"{file}: cannot be read ({refused.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not a text file") from None
    except (yaml.YAMLError, RecursionError) as refused:
        raise ConfigError(f"{file}: {group_files.problem(refused)}") from None
    except ValueError as refused:
        raise ConfigError(f"{file}: {refused}, so it is no configuration") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected `key: value` lines")
    for key, value in leaves(tree).items():
        if "${" in f"{key}{value}":
            raise ConfigError(
                f"{file}: {key}: '${{...}}' is not filled in here; write the value out"
            )
    return tree


_DEEPEST = 100
_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def dump_yaml(config: Config) -> str:
    """The resolved configuration, readable by `read_yaml`; secrets of its data are masked."""
    tree = config.model_dump()
    tree["data"] = masked_tree(tree["data"])
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


RUN_IDS = ("resume_from_run_id", "parent_run_id")
"""Words of `train` that name a run; they are no keys of the configuration."""


def run_ids(words: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """Take run ids out of overrides as they were typed: 12e5 is an id, never a number.

    Raises:
        ConfigError: for an id that is empty, as `resume_from_run_id=$UNSET` is.
    """
    found: dict[str, str | None] = dict.fromkeys(RUN_IDS)
    rest = []
    for word in joined(words):
        key, _, value = word.partition("=")
        if key not in found:
            rest.append(word)
            continue
        found[key] = _unquoted(value)
        if not found[key]:
            raise ConfigError(f"{key}: expected a run id, and it is empty; is a variable unset?")
    return rest, found


def _overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for word in joined(words):
        if "${" in word:
            raise ConfigError(f"{_short(word)}: nothing is filled in for ${{...}}; write the value")
        key, equals, text = word.partition("=")
        if equals and _is_text(key):
            yield key, _text_value(key, text)
            continue
        parsed = _parsed(word.lstrip("-"))
        if parsed.is_sweep_override():
            raise ConfigError(f"{word!r} lists several values; add -m to train one run for each")
        if parsed.is_delete():
            raise ConfigError(f"{word!r}: keys cannot be removed; set it to null")
        if parsed.is_add():
            raise ConfigError(
                f"{word!r}: keys cannot be added; every key there is can be set as it is"
            )
        if not parsed.key_or_group:
            raise ConfigError(_no_override(word))
        yield parsed.key_or_group, _plain_value(parsed.value())


def _parsed(word: str) -> Any:
    """An override, by Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        raise ConfigError(_no_override(word)) from None


def _is_text(key: str) -> bool:
    """Whether a key's value is a path or a title, taken as typed: no grammar, no numbers."""
    last = key.rpartition(".")[2]
    return (
        key in ("name", "tracking.experiment")
        or last in ("path", "root")
        or (last.endswith("_path") and key.replace(".", "_").isidentifier())
    )


def _text_value(key: str, text: str) -> str | None:
    """What was typed, without quotes around it; `null` is None.

    Raises:
        ConfigError: for a path that is empty, as `data.path=$UNSET` is.
    """
    if text == "null":
        return None
    value = _unquoted(text)
    if not value and key != "name":
        raise ConfigError(f"{key}: expected a text, and it is empty; is a variable unset?")
    return value or None


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _no_override(word: str) -> str:
    return f"{_short(word)} is not `key=value`; quote what has spaces or commas"


def joined(words: Sequence[str]) -> Iterator[str]:
    """Write `--some-key value` as `some_key=value`, and `--key` alone as `key=true`."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield word
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield f"{name.replace('-', '_')}={value}"


def _plain_value(value: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain_value(key)): _plain_value(item) for key, item in value.items()}
    return value


def _chosen(choices: Mapping[str, str], groups: Mapping[str, list[str]]) -> Tree:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for group, choice in choices.items():
        _check_choice(group, choice, groups[group])
    place = {axis: f"{axis}@sampling.{axis}" for axis in _OF_SAMPLING}
    words = [
        f"{place.get(group, group)}={choice}"
        for group, choice in choices.items()
        if group != "norm"
    ]
    if "data" in choices and "experiment" not in choices:
        words.append("~experiment")  # the default preset is made for its own images
    try:
        # The root file is ours and lies where no file of the user's can shadow it by accident.
        with (
            group_files.search_path() as homes,
            initialize_config_dir(str(group_files.OURS / "root"), version_base="1.3"),
        ):
            places = [f"file://{home}" for home in homes]
            composed = hydra_compose(_HYDRA_ROOT, [*words, f"hydra.searchpath={places}"])
            tree = dict(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]
    except yaml.YAMLError as refused:
        raise ConfigError(group_files.problem(refused, with_file=True)) from None
    except (HydraException, OmegaConfBaseException) as refused:
        raise ConfigError(" ".join(str(refused).split())) from None
    finally:
        GlobalHydra.instance().clear()
    for group in choices:
        if group == "norm":
            tree["model"]["norm"] = part_from_file("norm", choices["norm"])
        elif group != "data":
            _give_way(tree, group, choices[group])
    return tree


def _check_choice(group: str, choice: str, names: Sequence[str]) -> None:
    """Refuse a file that does not exist or is not ours; warn where it hides none of ours."""
    foreign = group_files.why_foreign(group, choice)
    if choice not in names:
        reason = f" ({foreign})" if foreign else did_you_mean(choice, names)
        raise ConfigError(
            f"{group}={choice}: there is no such {group}{reason}; there are {', '.join(names)}"
        )
    if foreign:
        tell(f"{foreign}; the {group} '{choice}' of Rediffuse is used", sys.stderr)


def _give_way(tree: Tree, group: str, choice: str) -> None:
    """Let what a preset says of a group give way to the file that was chosen for it.

    Of a part it stays as far as the chosen part has such arguments, all of which its file lists. Of
    anything else, such as `average=none`, nothing stays that the file says otherwise.
    """
    section = (tree["sampling"] if group in _OF_SAMPLING else tree).get(group)
    own = part_from_file(group, choice)
    own = own.get(group, own)
    if not isinstance(section, dict):
        return
    if "name" not in own:
        _merge(section, {key: value for key, value in own.items() if key != "defaults"})
        return
    for key in set(section) - set(own):
        del section[key]


def _merge(tree: Tree, more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        mine = tree.get(key)
        if isinstance(value, Mapping) and isinstance(mine, dict):
            if value.get("name", mine.get("name")) != mine.get("name"):
                tree[key] = dict(
                    value
                )  # another part: the arguments of the old one mean nothing to it
            else:
                _merge(mine, value)
        else:
            tree[key] = _of_another_name(key, mine, value)


_OF_SAMPLING = ("solver", "grid", "guidance", "threshold")


def _full_key(tree: Tree, key: str) -> str:
    if "." in key or key in tree or key in Config.model_fields:
        return key
    keys = [full for full in _all_keys(tree) if full.rpartition(".")[2] == key]
    if len(keys) > 1:
        raise ConfigError(f"{key}: which one? {' or '.join(keys)}")
    if not keys:
        raise ConfigError(unknown_key(key, tree))
    return keys[0]


def _all_keys(tree: Tree) -> list[str]:
    fields = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        for name in getattr(field.annotation, "model_fields", ())
    ]
    return list(dict.fromkeys([*leaves(tree), *fields]))


def is_under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether a full key is one of `prefixes`, or lies in a section that is."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_branch(word: int | str) -> bool:
    """Pydantic names the branch of a union that it tried; nobody wrote that."""
    kinds = {"bool", "float", "int", "str", "constrained-float", "constrained-int"}
    return isinstance(word, str) and ("[" in word or word in kinds)


def _short(given: Any, most: int = 200) -> str:
    told = repr(given)
    return told if len(told) <= most else f"{told[:most]}..."


def _plain(message: str) -> str:
    return message.replace("Input should be", "expected")
