"""What the floors are for, where import-linter cannot see."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def imported(file: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return {
        name.split(".")[0]
        for node in nodes
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }


def test_only_compose_imports_hydra() -> None:
    users = {file.name for file in SOURCES if imported(file) & {"hydra", "omegaconf"}}
    assert users == {"compose.py"}


def test_the_engine_and_the_metrics_import_with_torch_alone() -> None:
    absent = (
        "hydra omegaconf mlflow pydantic PIL sklearn torchvision yaml rich click accelerate tqdm "
        "scipy torch_fidelity torchmetrics transformers"
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent.split()}))\n"
        "import rediffuse.training.loop, rediffuse.training.hooks, rediffuse.training.checkpoint\n"
        "import rediffuse.sampling, rediffuse.networks.unet, rediffuse.solvers.heun\n"
        "from rediffuse.evaluation import agreement, colour, frechet, inception_score, kernel\n"
        "from rediffuse.evaluation import features, manifold, mifid, moments\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_slow_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys\n"
        "import rediffuse.overview\n"
        "assert not {'torch', 'hydra'} & {*sys.modules}, 'runs and show'\n"
        "from rediffuse import build, gallery\n"
        "from rediffuse.config.compose import compose\n"
        "network = build.empty_network(compose([]), 10)\n"
        "assert all(p.is_meta for p in network.parameters())\n"
        "slow = {'torch._dynamo', 'sympy', 'sklearn', 'torchvision', 'mlflow'} & {*sys.modules}\n"
        "assert not slow, f'sample: {slow}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nobody_touches_torchs_generator_but_the_keyed_scope() -> None:
    pattern = re.compile(r"manual_seed\(|np\.random\.seed\(|random\.seed\(")
    assert {f.name for f in SOURCES if pattern.search(f.read_text())} == {"randomness.py"}


def test_nothing_that_is_read_can_be_code() -> None:
    pattern = re.compile(
        r"\bpickle\b|torch\.load\(|allow_pickle=True|hydra\.utils|\beval\(|\bexec\("
    )
    found = {
        f"{file.name}: {line.strip()}"
        for file in SOURCES
        for line in file.read_text().splitlines()
        if pattern.search(line) and '"""' not in line and not line.strip().startswith("#")
        if "weights_only=True" not in line
    }
    assert {
        line for line in found if "network.eval(" not in line and ".eval()" not in line
    } == set()


def test_images_are_decoded_where_their_pixels_are_bounded() -> None:
    """`decoding` reads images to learn from, `rasters` pictures of runs; `duplicates` its own."""
    opening = {file.name for file in SOURCES if "Image.open(" in file.read_text()}
    assert opening == {"decoding.py", "rasters.py", "duplicates.py"}


def test_every_function_that_the_derivation_names_exists() -> None:
    text = (ROOT / "docs" / "derivation.md").read_text()
    named = sorted(set(re.findall(r"`(rediffuse(?:\.\w+)+)`", text)))
    assert len(named) > 20
    for name in named:
        module, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), last), name


@pytest.mark.parametrize("page", ["docs/trust.md", "SECURITY.md"])
def test_every_test_that_a_promise_names_exists(page: str) -> None:
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^ *def (test_\w+)", tests, re.MULTILINE))
    named = set(re.findall(r"\b(test_\w+)(?!\w|\.py)", (ROOT / page).read_text()))
    assert named
    assert named - there == set()
