"""What README and docs say can be done, can: commands, Python, configurations and links."""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click import ClickException
from documents import COMMANDS, OTHERS, PAGES, QUICK, ROOT, Block, blocks, ours, parsed, relative

from rediffuse import build
from rediffuse.build import AXES
from rediffuse.cli import data as data_commands
from rediffuse.config.compose import (
    changes,
    checked,
    compose,
    refuse_groups,
    set_values,
    sweep,
    typed_values,
)
from rediffuse.config.schema import Config
from rediffuse.errors import ConfigError
from rediffuse.gallery import Options, wanted
from rediffuse.legality import check, check_sampling
from scripts import site_pages

RUN = "0123456789abcdef0123456789abcdef"
LANGUAGES = {"bash", "console", "python", "yaml", "text", "json"}


pages = pytest.mark.parametrize("page", PAGES, ids=relative)


def check_typed(words: list[str]) -> None:
    """Refuse what the command line would refuse before it looks at a run or an image."""
    words = [re.sub(r"\b(ID|OTHER)\b", RUN, word) for word in words]
    told = ours(words)
    if told is None:
        return check_others(words)
    name, given = parsed(told)
    if name in ("train", "plan"):
        told = list(given["words"])  # type: ignore[call-overload]
        file = given["file"]
        for combination in each_value_once(told) if given.get("multirun") else [told]:
            check_training(combination, file)  # type: ignore[arg-type]
    elif name == "resume":
        check_resuming(list(given["words"]))  # type: ignore[call-overload]
    elif name.startswith("data "):
        data_commands._data(str(given["source"]), given["words"])  # type: ignore[arg-type]
    elif name:
        check_drawing(given)
    return None


def each_value_once(words: list[str]) -> list[Sequence[str]]:
    """A few of the combinations of `key=a,b,c` words, in which every word occurs."""
    seen, few = set[str](), []
    for combination in sweep(words):
        if {*combination} - seen:
            few.append(combination)
            seen |= {*combination}
    return few


@cache
def composed(*words: str) -> Config:
    return compose(words)


def check_training(words: Sequence[str], file: Path | None) -> None:
    rest = [word for word in words if not word.lstrip("-").startswith("parent_run_id=")]
    resumed = [word for word in rest if word.startswith("resume_from_run_id=")]
    if resumed:
        return check_resuming([word for word in rest if word not in resumed])
    if file or (Path.cwd() / "configs").exists():
        return check(compose(rest, file))
    return check_composed(*rest)


@cache
def check_composed(*words: str) -> None:
    check(composed(*words))


def check_resuming(words: Sequence[str]) -> None:
    """What may be changed on the way is a question of keys, not of the run."""
    old = composed()
    tree = old.model_dump()
    values = typed_values(words)
    refuse_groups(values, tree)
    set_values(tree, values)
    changes(old, checked(tree))


def check_drawing(given: dict[str, Any]) -> None:
    """Every way to sample that a command asks for."""
    if isinstance(given.get("seeds"), str) or given.get("count"):
        assert not (given.get("seeds") and given.get("count"))
    for solver in _several(given, "solver", "solvers"):
        for guidance in _several(given, "guidance", "guidance"):
            asked = Options(
                solver=solver and solver.partition("@")[0],
                guidance=guidance,
                grid=given.get("grid"),
                threshold=given.get("threshold"),
            )
            check_asked(asked)


@cache
def check_asked(asked: Options) -> None:
    config = composed()
    check_sampling(config, wanted(config.sampling, asked), build.schedule(config))


def _several(given: dict[str, Any], one: str, many: str) -> list[Any]:
    found = given.get(many) or given.get(one)
    if isinstance(found, tuple):
        return list(found)
    return str(found).split(",") if found and "axes" not in given else [found]


def written_before(page: Path, block: Block, folder: Path) -> None:
    """Write the files that the page has shown so far."""
    for file in blocks(page):
        if file.title and file.line < block.line:
            place = folder / file.title
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.text)


@pages
def test_every_command_can_be_meant(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks(page):
        done_anyway = relative(page) in QUICK and not block.excuse  # test_docs_run.py
        if block.language not in COMMANDS or done_anyway:
            continue
        written_before(page, block, tmp_path)
        for words in block.commands():
            try:
                check_typed(words)
            except (AssertionError, ConfigError, ClickException) as refused:
                said = refused.format_message() if isinstance(refused, ClickException) else refused
                if not (shows_refusal(block) and f"error: {said}" in block.text):
                    pytest.fail(f"{block}: {' '.join(words)}: {said}")


def shows_refusal(block: Block) -> bool:
    """Whether the block shows how a mistake is refused."""
    return block.language == "console" and "\nerror: " in block.text


def check_others(words: list[str]) -> None:
    """A command of somebody else's: known, and what it names of ours is there."""
    assert words[0] in OTHERS, f"{words[0]} is not a command of this project's"
    if words[0] == "python" and words[1] == "-m" and words[2].startswith("benchmarks."):
        assert importlib.util.find_spec(words[2])
    for word in words:
        if re.match(r"(tests|examples|docs|scripts)/", word):
            assert (ROOT / word).exists(), word


@pages
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} needs a language: {sorted(LANGUAGES)}"
        if block.language == "text":
            typed = [row for row in block.text.splitlines() if row.startswith(("$ ", "uv "))]
            assert not typed, f"{block}: commands belong into a bash block"
        if block.excuse:
            assert block.language in (*COMMANDS, "python"), f"{block} would not be run anyway"


@pages
def test_every_python_block_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for text, target in links(page.read_text()):
        place, _, anchor = target.partition("#")
        if ":" in place:
            parts = urlsplit(target)
            assert parts.scheme == "https", target
            assert "." in parts.netloc, target
            continue
        to = (page.parent / place).resolve() if place else page
        assert to.is_relative_to(ROOT), target
        assert to.exists(), f"{relative(page)}: [{text}]({target})"
        if anchor:
            assert anchor in anchors(site_pages.filled(to.read_text())), (
                f"{relative(page)}: [{text}]({target})"
            )


def links(markdown: str) -> Iterator[tuple[str, str]]:
    """Texts and targets of the links and pictures outside of code."""
    plain = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    plain = re.sub(r"`[^`\n]*`", "", plain)
    yield from re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", plain)


def anchors(markdown: str) -> set[str]:
    """The anchors of headings, in the words that GitHub and MkDocs agree on."""
    plain = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", plain, re.MULTILINE)
    slugs = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    assert max(Counter(slugs).values()) == 1, "two headings of a page are equal"
    return {re.sub(r"\s+", "-", slug) for slug in slugs}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = set(re.findall(r": ([\w./-]+\.md)$", navigation, re.MULTILINE))
    there = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert named == there | {"changelog.md", "contributing.md", "security.md"}


def test_the_site_loads_nothing_from_elsewhere() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in configuration
    for asset in [configuration, *(f.read_text() for f in ROOT.glob("docs/*.css"))]:
        assert "://" not in asset


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("rediffuse trian", "no such command"),
        ("rediffuse train model.base_chanels=64", "no such key"),
        ("rediffuse train schedule=flow times=uniform target=eps", "cannot give x_0"),
        ("rediffuse train -m schedule=cosine,flo", "there is no such schedule"),
        ("rediffuse resume ID schedule.steps=10", "cannot become"),
        ("rediffuse sample ID --stepz 3", "No such option"),
        ("rediffuse sample ID --solver heum", "there is no solver"),
        ("rediffuse sweep ID --solver heun,unipcc --steps 5", "there is no solver"),
        ("rediffuse data pack cifar11", "there is no such data"),
        ("rm -r /", "not a command"),
    ],
)
def test_a_typo_in_a_documented_command_is_found(words: str, says: str) -> None:
    page = ROOT / "README.md"
    block = Block(page, 1, "bash", None, words, None)
    (typed,) = block.commands()
    with pytest.raises((AssertionError, ConfigError, ClickException), match=re.escape(says)):
        check_typed(typed)


def test_the_reference_names_every_key_part_and_command() -> None:
    keys, parts, commands = site_pages.keys(), site_pages.parts(), site_pages.commands()
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for section, kind in sections.items():
        if section in site_pages.SECTIONS:
            for name in set(kind.model_fields) - {"name", *AXES}:  # type: ignore[union-attr]
                assert f"| `{section}.{name}` |" in keys
        elif section not in AXES:
            assert f"| `{section}` |" in keys
    for file in (ROOT / "src/rediffuse/configs").glob("*/*.yaml"):
        if file.parent.name in site_pages.axes():
            assert f"| `{file.parent.name}={file.stem}` |" in parts
    for name in ("train", "sample", "data duplicates"):
        assert f"## rediffuse {name}\n" in commands
