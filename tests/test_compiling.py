"""A compiled network is the plain one, faster; its group norm is held to torch's own, in float64.

In processes of their own: the compiler cannot look through the tests' checks of shapes.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli import TINY, edit, rediffuse, run_id, zygote

from rediffuse import launch
from rediffuse.config.compose import compose
from rediffuse.errors import ConfigError, TrainingError
from rediffuse.images import prepare
from rediffuse.training import compiling
from rediffuse.training.compiling import Trial
from rediffuse.training.devices import Devices

needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)

NORM = """
import json, sys, torch
import torch.nn.functional as F
from rediffuse.networks.fused import group_norm
torch.set_num_threads(1)
torch.manual_seed(0)
found = []
for dtype, mean, modulates in GIVEN:
    x = (2 * torch.randn(4, 24, 6, 6) + mean).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    given = [torch.randn(24, requires_grad=True) for _ in range(2)]
    modulation = [torch.randn(4, 24, requires_grad=True) for _ in range(2)]
    y = group_norm(x, *given, 6, 1e-6, *(modulation if modulates else ()))
    assert y.dtype is dtype and y.is_contiguous(memory_format=torch.channels_last)
    exact = [a.detach().double().requires_grad_() for a in (x, *given, *modulation)]
    wanted = F.group_norm(exact[0], 6, *exact[1:3], 1e-6)
    if modulates:
        scale, shift = (m[:, :, None, None] for m in exact[3:])
        wanted = wanted * (1 + scale) + shift
    g = torch.randn_like(wanted)
    y.backward(g.to(dtype))
    wanted.backward(g.to(dtype).double())
    trained = list(zip((x, *given, *modulation), exact))[: 5 if modulates else 3]
    differing = [((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in trained]
    differing.append(((y - wanted).norm() / wanted.norm()).item())
    found.append((str(dtype), mean, max(differing)))
print(json.dumps(found))
"""

NETWORK = """
import sys, torch
from rediffuse.networks.norms import group
from rediffuse.networks.unet import UNet
from rediffuse.training.compiling import trial
torch.set_num_threads(1)
torch.manual_seed(0)
for scale_shift, groups in GIVEN:
    network = UNet(in_channels=1, out_channels=1, image_size=8, base_channels=32, num_classes=2,
                   channel_multipliers=(1, 2), attention_resolutions=(4,), blocks_per_level=1,
                   scale_shift=scale_shift, norm=lambda channels: group(channels, groups=groups))
    before = [p.clone() for p in network.parameters()]
    inputs = torch.randn(16, 1, 8, 8), torch.linspace(1, 999, 16), torch.arange(16) % 2
    found = trial(network, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    assert 0 < found.difference < 1e-4, found
    found = trial(network, inputs, torch.bfloat16)
    assert 1e-4 < found.difference < 3e-2 and found.agrees, found
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


MODULATED = "(torch.float32, 0.0, True), (torch.float32, 100.0, True), (torch.bfloat16, 0.0, True)"


@needs_a_compiler
@pytest.mark.parametrize(
    "given", [MODULATED, pytest.param("(torch.float32, 0.0, False),", marks=pytest.mark.slow)]
)
def test_the_group_norm_of_compiled_loops_is_torchs(given: str) -> None:
    for dtype, mean, difference in json.loads(run(NORM.replace("GIVEN", f"({given})"))):
        # float32: 6e-8 relative, times a mean of 50 deviations; bfloat16: 2^-9 each way
        tolerance = {"torch.bfloat16": 6e-3}.get(dtype, 3e-6 if mean else 3e-7)
        assert difference < tolerance, (dtype, mean, difference)


@needs_a_compiler
@pytest.mark.parametrize(
    "given", ["(True, 32),", pytest.param("(False, 8),", marks=pytest.mark.slow)]
)
def test_a_trial_compares_and_touches_nothing(given: str) -> None:
    run(NETWORK.replace("GIVEN", f"({given})"))


@pytest.mark.parametrize(
    ("precision", "difference", "agrees"),
    [(torch.float32, 2e-3, False), (torch.bfloat16, 2e-3, True), (torch.bfloat16, 0.1, False)],
)
def test_a_trial_refuses_what_precision_does_not_explain(
    precision: torch.dtype, difference: float, agrees: bool
) -> None:
    assert Trial(difference, 1.0, 2.0, precision).agrees is agrees


LOOKED_AT = (
    "threads=2",
    "training.preview_every_images=48",
    "training.validate_every_images=48",
)
# enough for gradients of convolutions that are our own
WIDE = ("training.previews=false", "model.base_channels=128", "model.channel_multipliers=[1,1]")


@needs_a_compiler
@pytest.mark.parametrize(
    "more",
    [
        ("training.previews=false",),
        pytest.param(LOOKED_AT, marks=pytest.mark.slow),
        pytest.param(WIDE, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_run_resumes_bit_for_bit(tmp_path: Path, more: tuple[str, ...]) -> None:
    words = ("train", *TINY, "training.compile=true", "training.images=144", *more)
    whole = rediffuse(*words, root=tmp_path)
    assert "compiled network: " in whole.stderr
    cut = rediffuse(*words, "training.stop_after_images=96", root=tmp_path)
    rediffuse("resume", run_id(cut), root=tmp_path)
    digests = [
        (tmp_path / run_id(done) / "logs" / "digests.jsonl").read_text().splitlines()[-1]
        for done in (whole, cut)
    ]
    kept = [{k: v for k, v in json.loads(d).items() if k != "time"} for d in digests]
    assert kept[0] == kept[1]
    assert kept[0]["images"] == 144
    config = yaml.safe_load((tmp_path / run_id(cut) / "config.yaml").read_text())
    assert config["training"]["compile"] is True
    if more == LOOKED_AT:
        again = rediffuse("reproduce", run_id(cut), root=tmp_path)
        assert "PASS" in again.stdout


WHOLE = """
import atexit
from torch._dynamo.utils import counters
from rediffuse import launch
from rediffuse.training import compiling
def whole(network, device, replayed):
    network.compile(backend="eager", fullgraph=True)
launch.compile_network = compiling.compile_network = whole
atexit.register(lambda: print("graphs", counters["stats"]["unique_graphs"]))
"""


@pytest.mark.parametrize("average", ["half_life", "none"])
def test_a_network_that_is_compiled_whole_is_compiled_once(tmp_path: Path, average: str) -> None:
    """As on a GPU: without a break; the trial's serves training, and nobody else calls for more.

    Previews and validation ask the average or, where there is none, the bare network.
    """
    looking_on = (
        "training.preview_every_images=48",
        "training.validate_every_images=48",
        f"average={average}",
    )
    words = ("train", *TINY, "training.images=144", "training.compile=true", *looking_on)
    done = zygote().run(*words, root=tmp_path, before=WHOLE, check=0)
    assert done.stdout.splitlines()[-1] == "graphs 1"


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_compiled_network_that_disagrees_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | str
) -> None:
    other = Trial(difference=0.2, seconds=1.0, plain_seconds=2.0, precision=torch.float32)
    monkeypatch.setattr(launch, "trial", lambda *given, **how: other)
    config = compose([f"training.compile={str(wanted).lower()}", "threads=1"])
    images = prepare(config.data, tmp_path)
    if wanted is True:
        with pytest.raises(TrainingError, match=r"differs from the plain one by 0\.2"):
            launch.settled(config, images, Devices(torch.device("cpu")))
    else:
        settled = launch.settled(config, images, Devices(torch.device("cpu")))
        assert settled.training.compile is False


@pytest.mark.parametrize(("seconds_each", "turns"), [(0.1, 3), (10, 2)])
def test_one_disturbed_turn_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, seconds_each: float, turns: int
) -> None:
    now, asked, seconds = 0.0, [], iter([0, 0, 2, *[1] * 9])  # the first two are not timed

    def answer(network: torch.nn.Module, *given: object) -> torch.Tensor:
        nonlocal now
        asked.append(network)
        now += seconds_each * next(seconds)
        return torch.ones(1)

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(compiling, "time", clock)
    monkeypatch.setattr(compiling, "_answer", answer)
    monkeypatch.setattr(compiling, "compile_network", lambda *given, **how: None)
    found = compiling.trial(torch.nn.Linear(1, 1), [torch.ones(1)])
    assert (found.seconds, found.plain_seconds) == pytest.approx((seconds_each, seconds_each))
    assert [asked.count(network) for network in set(asked)] == [turns + 1] * 2


def test_a_trial_that_does_not_fit_is_made_with_fewer_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def short_of_memory(network: object, inputs: list[torch.Tensor], *more: object, **how: object):  # type: ignore[no-untyped-def]
        tried.append(len(inputs[0]))
        if tried[-1] > least:
            raise torch.OutOfMemoryError
        return Trial(0.0, 1.0, 2.0, torch.float32)

    monkeypatch.setattr(launch, "trial", short_of_memory)
    config = compose(["training.compile=true", "threads=1", "training.batch_size=32"])
    images, here = prepare(config.data, tmp_path), Devices(torch.device("cpu"))
    least = 8
    assert launch.settled(config, images, here).training.compile is True
    assert tried == [32, 16, 8]
    least = 0
    with pytest.raises(torch.OutOfMemoryError):
        launch.settled(config, images, here)


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_schedule_that_learns_is_not_compiled_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | str
) -> None:
    monkeypatch.setattr(launch, "trial", lambda *given, **how: pytest.fail("it was tried"))
    words = [f"training.compile={str(wanted).lower()}", "schedule=learned", "weighting=vlb"]
    config = compose([*words, "threads=1", "training.precision=fp32"])
    images, elsewhere = prepare(config.data, tmp_path), Devices(torch.device("meta"))
    if wanted is True:
        with pytest.raises(ConfigError, match="two backward passes"):
            launch.settled(config, images, elsewhere)
    else:
        assert launch.settled(config, images, elsewhere).training.compile is False


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing made before
    return tmp_path


def test_a_compiler_that_is_missing_is_named(without_compiler: Path) -> None:
    words = ("train", *TINY, "training.images=48", "training.compile=true")
    refused = rediffuse(*words, root=without_compiler, check=1)
    assert "training.compile=false" in refused.stderr
    begun, error = refused.stderr.splitlines()
    assert begun.startswith("compiling")
    assert error.startswith("error: ")
    assert not list(without_compiler.glob("*/config.yaml"))


@pytest.mark.slow
def test_a_compiler_that_is_missing_is_done_without(without_compiler: Path) -> None:
    words = ("train", *TINY, "training.images=48", "training.compile=auto")
    run = without_compiler / run_id(rediffuse(*words, root=without_compiler))
    edit(run / "config.yaml", "compile: false", "compile: true")
    drawn = rediffuse("sample", run.name, "--n", "1", "--steps", "2", root=without_compiler)
    assert "sampling without" in drawn.stderr
    refused = rediffuse("resume", run.name, "training.images=96", root=without_compiler, check=1)
    assert "training.compile=false" in refused.stderr
