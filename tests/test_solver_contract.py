"""What every solver with a YAML promises; a new file there is found and held to it by itself."""

from pathlib import Path

import pytest
import torch
import yaml
from oracles import (
    CONTINUOUS,
    Counted,
    final,
    gaussian,
    gaussian_flow,
    images,
    is_chain,
    scalar,
    two_points,
)
from torch import Tensor

from rediffuse import build
from rediffuse.config.schema import Part
from rediffuse.grids import karras, log_snr, trailing
from rediffuse.process import Prediction, Schedule
from rediffuse.randomness import ImageNoise
from rediffuse.sampling import trajectory
from rediffuse.schedules import discrete
from rediffuse.solvers import Solver

FOLDER = Path(build.__file__).parent / "configs" / "solver"
SOLVERS: dict[str, Solver] = {
    file.stem: build.solver(Part.model_validate(yaml.safe_load(file.read_text())))
    for file in sorted(FOLDER.glob("*.yaml"))
}
SCHEDULES: dict[str, Schedule] = {
    "chain": discrete.linear(),
    "zero_snr_chain": discrete.scaled_linear(zero_terminal_snr=True),
    **{name: CONTINUOUS[name] for name in ("vp", "cosine", "edm", "flow")},
}
BETWEEN_STEPS = {"adaptive"}  # asks a chain's network between its steps, and says so

every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def pure_noise(schedule: Schedule) -> bool:
    """Whether nothing is left of the image at t_max."""
    return schedule(scalar(schedule.t_max)).alpha.item() == 0


def fine(schedule: Schedule, steps: int) -> Tensor:
    """Stops close enough to data, where α allows it."""
    return (trailing if pure_noise(schedule) else log_snr)(schedule, steps)


def walked(solver: Solver, schedule: Schedule, times: Tensor, like: Tensor) -> list[Tensor]:
    """All states of the images 0, 1, 2 ... of a job, for two-point data."""
    noise = ImageNoise(0, torch.arange(len(like)))
    return list(trajectory(two_points(schedule), schedule, solver, times, noise, like))


@every_schedule
@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_yields_one_finite_state_per_stop_of_the_starts_shape_and_type(solver, schedule, dtype):
    like = torch.empty(2, 1, 2, 2, dtype=dtype)
    for grid in (trailing,) if pure_noise(schedule) else (trailing, karras):
        for steps in (1, 2, 5):
            times = grid(schedule, steps)
            states = walked(solver, schedule, times, like)
            assert len(states) == len(times) - 1
            for state in states:
                assert (state.shape, state.dtype) == (like.shape, like.dtype)
                assert state.isfinite().all()


@every_schedule
@every_solver
def test_samples_of_two_points_are_both_of_them(solver, schedule):
    x_0 = walked(solver, schedule, fine(schedule, 40), torch.empty(8, 8).double())[-1]
    assert (x_0 - x_0.sign()).abs().lt(0.05).sum() > 60  # of 64
    assert 20 < x_0.gt(0).sum() < 44


@every_schedule
@every_solver
def test_an_image_is_the_same_to_the_last_bit_in_batches_of_64_7_and_1(solver, schedule):
    times = trailing(schedule, 4)

    def sampled(numbers: Tensor) -> Tensor:
        like, noise = torch.empty(len(numbers), 2, 3, 3), ImageNoise(3, numbers)
        return final(trajectory(gaussian(schedule), schedule, solver, times, noise, like))

    together = sampled(torch.arange(64))
    assert sampled(torch.arange(64)).equal(together)
    for size in (7, 1):
        parts = torch.arange(64).split(size)[:3]
        split = torch.cat([sampled(part) for part in parts])
        assert split.equal(together[: len(split)])
    assert sampled(torch.tensor([11, 3])).equal(together[[11, 3]])


@every_schedule
@every_solver
def test_samples_of_a_gaussian_tend_to_its_deviation(solver, schedule):
    """Methods of first order are up to 13 % away after 50 steps."""
    times = fine(schedule, 50)
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    x = images(100, 100) * schedule(times[0]).sigma
    x_0 = final(solver(gaussian(schedule), schedule, x, times, noise))
    exact = gaussian_flow(schedule, x, times[0], times[-1]).std().item()
    assert x_0.std().item() == pytest.approx(exact, rel=0.15)
    assert abs(x_0.mean().item()) < 4 * 0.5 / 10_000**0.5


@every_schedule
@every_solver
def test_it_asks_the_network_at_most_twice_for_a_further_step(solver, schedule):
    evaluations = []
    for steps in (10, 20):
        denoise = Counted(gaussian(schedule))
        x = images(2, 2) * schedule(scalar(schedule.t_max)).sigma
        final(solver(denoise, schedule, x, trailing(schedule, steps), torch.ones_like))
        evaluations.append(denoise.evaluations)
    assert evaluations[0] <= 60
    assert evaluations[1] - evaluations[0] <= 2 * 10


@every_schedule
@pytest.mark.parametrize("name", SOLVERS)
def test_it_asks_at_times_that_the_network_knows_and_for_noise_of_xs_shape(name, schedule):
    asked = []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        asked.append(t.expand(len(x_t)))
        return gaussian(schedule)(x_t, t)

    def noise(like: Tensor) -> Tensor:
        assert like.shape == x.shape
        return torch.ones_like(like)

    x = images(3, 2) * schedule(scalar(schedule.t_max)).sigma
    final(SOLVERS[name](denoise, schedule, x, trailing(schedule, 17), noise))
    times = torch.stack(asked)
    assert times.dtype == torch.float64
    assert times.min() >= schedule.t_min
    assert times.max() <= schedule.t_max
    if not (is_chain(schedule) and name in BETWEEN_STEPS):
        assert times.equal(schedule.snap(times))


@pytest.mark.parametrize("grad", [False, True])
@every_solver
def test_it_changes_neither_states_it_gave_nor_the_callers_grad_mode(solver, grad):
    schedule, x, modes = discrete.linear(), images(3, 2), []

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        modes.append(torch.is_grad_enabled())
        return gaussian(schedule)(x_t, t)

    states, copies = [], []
    with torch.set_grad_enabled(grad):
        for state in solver(denoise, schedule, x, trailing(schedule, 10), torch.ones_like):
            modes.append(torch.is_grad_enabled())
            states.append(state)
            copies.append(state.clone())
    assert set(modes) == {grad}
    assert x.equal(images(3, 2))
    assert all(state.equal(copy) for state, copy in zip(states, copies, strict=True))


@every_solver
def test_nothing_is_evaluated_before_the_first_state_or_after_the_caller_stops(solver):
    schedule = discrete.linear()
    denoise = Counted(gaussian(schedule))
    walk = solver(denoise, schedule, images(3, 2), trailing(schedule, 50), torch.ones_like)
    assert denoise.evaluations == 0
    next(walk)
    after_one = denoise.evaluations
    walk.close()
    assert list(walk) == []
    assert denoise.evaluations == after_one > 0
