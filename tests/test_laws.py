"""Every schedule × target × weighting that a YAML names keeps the laws of its axis."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import scalar
from torch import Tensor

from rediffuse import build
from rediffuse.config.schema import Part
from rediffuse.errors import ConfigError
from rediffuse.process import Schedule
from rediffuse.targets import check_target, combine, determinant, solve

CONFIGS = Path(build.__file__).parent / "configs"


def every(axis: str) -> dict[str, Any]:
    """The parts of an axis by their files' names, with the options that these hold."""
    trees = {f.stem: yaml.safe_load(f.read_text()) for f in (CONFIGS / axis).glob("*.yaml")}
    parts = {name: Part.model_validate(tree.get(axis, tree)) for name, tree in trees.items()}
    return {name: build.bind(axis, parts[name], axis) for name in sorted(parts)}


SCHEDULES: dict[str, Schedule] = {name: make() for name, make in every("schedule").items()}
TARGETS, WEIGHTINGS, TIMES = every("target"), every("weighting"), every("times")
NO_IMAGE_LEFT = {"flow", "flow_resolution", "zero_terminal_snr"}
ALLOWED = [(s, t) for s in SCHEDULES for t in TARGETS if not (s in NO_IMAGE_LEFT and t == "eps")]
law = settings(deadline=None, derandomize=True, database=None, max_examples=15)
places = st.lists(st.floats(0, 1), min_size=1, max_size=4)
numbers = st.floats(-10, 10, width=32)


def known_times(schedule: Schedule, u: list[float]) -> Tensor:
    """Both ends of the clock, and times between them that the network knows."""
    place = torch.tensor([0.0, 1.0, *u], dtype=torch.float64)
    return schedule.snap(schedule.t_min + place * (schedule.t_max - schedule.t_min))


@pytest.mark.parametrize("name", SCHEDULES)
@law
@given(u=st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_log_snr_falls_with_time_inverts_and_begins_at_data(name, u):
    schedule = SCHEDULES[name]
    t = known_times(schedule, u).unique()
    half_log_snr = schedule(t).half_log_snr.detach()
    assert (half_log_snr.diff()[t.diff() > 1e-12 * schedule.t_max] < 0).all()
    torch.testing.assert_close(schedule.time(half_log_snr), t, rtol=1e-9, atol=1e-9)
    assert [part.item() for part in schedule(scalar(0.0))] == [1, 0]


@pytest.mark.parametrize(("name", "target"), ALLOWED)
@law
@given(u=places, x_0=numbers, eps=numbers)
def test_image_and_noise_come_back_from_what_a_perfect_network_says(name, target, u, x_0, eps):
    schedule = SCHEDULES[name]
    t = known_times(schedule, u)
    at = type(schedule(t))(*(part.detach() for part in schedule(t)))
    a, b = TARGETS[target](at)
    x_0, eps = torch.full_like(t, x_0), torch.full_like(t, eps)
    x_t = combine(x_0, eps, at.alpha, at.sigma)
    found_x_0, found_eps = solve(combine(x_0, eps, a, b), x_t, at, a, b)
    # What rounding leaves of x_t and of the output is magnified by the inverse of the 2×2 system.
    det = determinant(at, a, b).abs()
    size = 20 * (at.alpha.abs() + at.sigma) * (a.abs() + b.abs()).clamp(min=1) / det
    assert ((found_x_0 - x_0).abs() <= 1e-9 + 1e-14 * size).all()
    assert ((found_eps - eps).abs() <= 1e-9 + 1e-14 * size).all()


@pytest.mark.parametrize(("name", "target"), ALLOWED)
@settings(law, max_examples=5)
@given(u=places)
def test_a_weight_is_finite_nowhere_negative_and_positive_where_some_image_is_left(name, target, u):
    schedule = SCHEDULES[name]
    t = known_times(schedule, u)
    some_is_left = schedule(t).alpha > 0
    for weighting, weigh in WEIGHTINGS.items():
        weights = weigh(schedule, t, TARGETS[target]).detach()
        assert weights.dtype == torch.float64, weighting
        assert weights.shape == t.shape, weighting
        assert weights.isfinite().all(), weighting
        assert (weights >= 0).all(), weighting
        assert (weights[some_is_left] > 0).all(), weighting


@pytest.mark.parametrize(("name", "target"), ALLOWED)
@settings(law, max_examples=5)
@given(u=places)
def test_an_error_of_x_0_weighs_the_same_whatever_the_target(name, target, u):
    """But for the two weights that are on the output itself."""
    schedule = SCHEDULES[name]
    t = known_times(schedule, u)
    at = schedule(t)
    output_error, error = (
        (determinant(at, *TARGETS[of](at)) / at.sigma).detach() for of in (target, "x_0")
    )
    for weighting in sorted(set(WEIGHTINGS) - {"unit", "uncertainty"}):
        found, wanted = (
            WEIGHTINGS[weighting](schedule, t, TARGETS[of]).detach() for of in (target, "x_0")
        )
        torch.testing.assert_close(
            found * output_error**2, wanted * error**2, rtol=1e-9, atol=0, msg=weighting
        )


@pytest.mark.parametrize("name", SCHEDULES)
@law
@given(u=places)
def test_one_formula_gives_the_three_published_min_snr_weights(name, u):
    """Hang et al. 2023, Sec. 3.4; for v where α² + σ² = 1."""
    schedule = SCHEDULES[name]
    t = known_times(schedule, u)
    at = schedule(t)
    snr = (at.alpha / at.sigma).square().detach()
    clipped = snr.clamp(max=5)
    published = {"x_0": clipped, "v": clipped / (snr + 1), "eps": clipped / snr}
    if name in NO_IMAGE_LEFT:
        del published["eps"]
    if ((at.alpha**2 + at.sigma**2 - 1).abs() > 1e-12).any():
        del published["v"]
    for target, literal in published.items():
        found = WEIGHTINGS["min_snr"](schedule, t, TARGETS[target]).detach()
        torch.testing.assert_close(found, literal, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@law
@given(u=places)
def test_edms_weight_times_c_out_squared_is_1(name, u):
    schedule = SCHEDULES[name]
    t = known_times(schedule, u)
    found = WEIGHTINGS["edm"](schedule, t, TARGETS["edm"]).detach()
    torch.testing.assert_close(found, torch.ones_like(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_target_is_refused_exactly_where_its_determinant_is_0(name, target):
    schedule = SCHEDULES[name]
    at = schedule(known_times(schedule, [i / 100 for i in range(101)]))
    if (determinant(at, *TARGETS[target](at)).abs() < 1e-9).any():
        assert (name, target) not in ALLOWED
        with pytest.raises(ConfigError, match=f"target '{target}' cannot give x_0 at t = "):
            check_target(TARGETS[target], schedule, target)
    else:
        assert (name, target) in ALLOWED
        check_target(TARGETS[target], schedule, target)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", SCHEDULES)
@law
@given(u=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6))
def test_a_drawn_time_is_one_that_the_network_knows(name, times, u):
    schedule, u = SCHEDULES[name], torch.tensor(u, dtype=torch.float64)
    is_chain = schedule.snap(scalar(schedule.t_max - 0.25)) == schedule.t_max
    refused = (times == "uniform_steps" and not is_chain) or (
        times == "loss_aware" and is_chain and schedule.t_max % 100
    )
    if refused:
        with pytest.raises(ConfigError, match=f"times '{times}'"):
            TIMES[times](schedule, u)
        return
    t = TIMES[times](schedule, u)
    assert schedule.snap(t).equal(t)
    assert (t > 0).all()
    assert schedule(t).sigma.isfinite().all()
