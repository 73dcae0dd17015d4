"""What the site's pages hold beside their Markdown: MkDocs calls the `on_` functions.

Three pages outside of docs/ are pages of the site, too; links that lead out of the site become the
paths that they name; and `<!-- generated: NAME -->` is replaced by what the code says of itself.
"""

import ast
import inspect
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "src" / "rediffuse" / "configs"
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
SECTIONS = "data", "training", "average", "rate", "sampling", "tracking"
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_MARK = re.compile(r"<!-- generated: (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for outside, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / outside)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and make every link one of the site's."""
    outside = {page: name for name, page in OUTSIDE.items()}
    uri = page.file.src_uri
    lies = outside.get(uri, f"docs/{uri}")
    return _LINK.sub(lambda link: _inside(link, lies, uri), filled(markdown))


def filled(markdown: str) -> str:
    """A page with what is generated in it."""
    return _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def _inside(link: re.Match[str], lies: str, uri: str) -> str:
    """A link as the page at `uri` needs it, whose Markdown lies elsewhere in the repository."""
    picture, text, target, anchor = link.groups()
    if not target or ":" in target:
        return link[0]
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(lies), target))
    if meant in OUTSIDE or meant.startswith("docs/"):
        page = OUTSIDE.get(meant, meant.removeprefix("docs/"))
        way = posixpath.relpath(page, posixpath.dirname(uri) or ".")
        return f"{picture}[{text}]({way}{anchor or ''})"
    return text if meant in text else f"{text} (`{meant}`)"


def commands() -> str:
    """The help of every command, as it prints it."""
    from rediffuse.cli import rediffuse

    return "\n\n".join(_help(words, command) for words, command in _commands(rediffuse))


def _commands(
    command: click.Command, *words: str
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    words = (*words, str(command.name))
    yield words, command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from _commands(inner, *words)


def _help(words: tuple[str, ...], command: click.Command) -> str:
    with click.Context(
        command,
        info_name=" ".join(words),
        max_content_width=100,
        terminal_width=100,
        help_option_names=["-h", "--help"],
    ) as context:
        told = command.get_help(context)
    return f"## {' '.join(words)}\n\n```text\n{told}\n```"


def keys() -> str:
    """Every key of a configuration by section, with its default and what it means."""
    from rediffuse.config import schema

    text = inspect.getsource(schema)
    tables = [("The run itself", schema.Config, "", CONFIGS / "root" / "train.yaml")]
    tables += [
        (f"`{name}`", getattr(schema, name.capitalize()), f"{name}.", _default_file(name))
        for name in SECTIONS
    ]
    return "\n\n".join(
        f"## {title}\n\n{_keys_of(section, prefix, file, text)}"
        for title, section, prefix, file in tables
    )


def _default_file(section: str) -> Path:
    named = {"data": "cifar10", "average": "half_life", "rate": "constant", "tracking": "mlflow"}
    return CONFIGS / section / f"{named.get(section, 'default')}.yaml"


def _keys_of(section: Any, prefix: str, file: Path, source: str) -> str:
    said = comments(file) | notes(source, section.__name__)
    values = yaml.safe_load(file.read_text())
    rows = []
    for name, field in section.model_fields.items():
        part = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
        if (name == "name" and prefix) or part:
            continue
        value = values.get(name, None if field.is_required() else field.default)
        rows.append((f"`{prefix}{name}`", f"`{_told(value)}`", said[name]))
    return table(("key", "default", "what it is"), rows)


def notes(source: str, name: str) -> dict[str, str]:
    """What the strings below the fields of a class say of them."""
    found = next(n for n in ast.parse(source).body if getattr(n, "name", None) == name)
    assert isinstance(found, ast.ClassDef)
    return {
        str(getattr(field.target, "id", "")): inspect.cleandoc(str(text.value.value))
        for field, text in zip(found.body, found.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def comments(file: Path) -> dict[str, str]:
    """What the comments behind the lines of a YAML file say of its keys."""
    lines = re.findall(r"^(\w+): .*?\s# (.+)$", file.read_text(), re.MULTILINE)
    return {key: text.strip() for key, text in lines}


def parts() -> str:
    """Every part of every axis: the name to choose it by, its arguments, and what it is."""
    head = "choose", "arguments", "what it is"
    return "\n\n".join(f"## {axis}\n\n{table(head, _parts_of(axis))}" for axis in axes())


def axes() -> list[str]:
    """The axes whose parts have files."""
    from rediffuse import build

    return [axis for axis in build.AXES if (CONFIGS / axis).is_dir()]


def _parts_of(axis: str) -> Iterator[tuple[str, str, str]]:
    from rediffuse import build

    for file in sorted((CONFIGS / axis).glob("*.yaml")):
        tree = yaml.safe_load(file.read_text())
        tree = tree.get(axis, tree)
        found = build.find(axis, tree["name"], axis)
        own = [key for key in inspect.signature(found).parameters if key in tree]
        arguments = ", ".join(f"`{key}={_told(tree[key])}`" for key in own)
        yield f"`{axis}={file.stem}`", arguments, first_sentence(found)


def first_sentence(part: Callable[..., Any]) -> str:
    """The first paragraph of a docstring, in one line."""
    paragraph = inspect.cleandoc(part.__doc__ or "").split("\n\n")[0]
    return " ".join(paragraph.split())


def _told(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def table(head: tuple[str, ...], rows: Any) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


GENERATED: dict[str, Callable[[], str]] = {"commands": commands, "keys": keys, "parts": parts}
