"""How many bits a model needs for images that it has not seen: the bound, and the ODE's figure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rediffuse.data.pixels import pixel_range, to_model
from rediffuse.evaluation.card import Card
from rediffuse.evaluation.figures import Figure
from rediffuse.grids import log_snr, trailing
from rediffuse.likelihood import bound, ode_bits_per_dim
from rediffuse.models import Model
from rediffuse.process import Prediction
from rediffuse.randomness import ImageNoise, Stream
from rediffuse.references import Real, versions
from rediffuse.schedules.discrete import Discrete

BOUND_STEPS, ODE_STEPS = 200, 25

_AT_ONCE = 32


def card_of(model: Model, real: Real, count: int) -> Card:
    """The card of the bits per dimension of the first `count` real images."""
    assert model.origin
    weights, step, run = (model.origin[name] for name in ("weights", "checkpoint", "run"))
    samples: dict[str, Any] = {
        "told": f"real images, as {weights} weights of {step} of run {run[:8]} find them",
        **model.origin,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
    }
    chain = isinstance(model.denoiser.schedule, Discrete)
    measure = {
        "bound_grid": "trailing" if chain else "log_snr",
        "bound_steps": _bound_steps(model),
        "bound_variance": 0.0 if chain else 1.0,
        "ode_grid": "log_snr",
        "ode_steps": ODE_STEPS,
        "probes": 1,
        "seed": 0,
    }
    return Card(count, samples, real.facts, {}, measure, versions()).masked()


def bits(model: Model, real: Real, card: Card, done: Callable[[int], object]) -> tuple[Figure, ...]:
    """Bits per dimension of the images that the card is of, as means over images."""
    columns: dict[str, list[Tensor]] = {"bits_per_dim_bound": [], "bits_per_dim_ode": []}
    for start in range(0, card.n, _AT_ONCE):
        rows = range(start, min(card.n, start + _AT_ONCE))
        for name, values in zip(columns, _measured(model, real, rows), strict=True):
            columns[name].append(values.double())
        done(rows.stop)
    figures = []
    for name, parts in columns.items():
        values = torch.cat(parts)
        error = float(values.std() / card.n**0.5) if card.n > 1 else None
        figures.append(Figure(name, float(values.mean()), card, error))
    return tuple(figures)


def _measured(model: Model, real: Real, rows: range) -> tuple[Tensor, Tensor]:
    """The bound and the ODE's figure of each of some images, whose noise is their own."""
    data, schedule = model.config.data, model.denoiser.schedule
    picked = real.rows[rows.start : rows.stop]
    x_0 = to_model(torch.from_numpy(real.part.images[picked]), data.mean, data.std)
    x_0 = x_0.to(model.device)
    low, high = (level.to(model.device) for level in pixel_range(data.mean, data.std))
    labels = real.labels if model.class_names else None
    cond = None if labels is None else labels[rows.start : rows.stop].to(model.device)
    noise = ImageNoise(0, torch.arange(rows.start, rows.stop), Stream.LIKELIHOOD)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        return model.denoiser(x_t, t, cond)

    chain = isinstance(schedule, Discrete)
    grid = (trailing if chain else log_snr)(schedule, _bound_steps(model))
    variance = 0.0 if chain else 1.0
    least = bound(denoise, schedule, x_0, grid, noise, variance=variance, low=low, high=high)
    stops = log_snr(schedule, ODE_STEPS)
    ode = ode_bits_per_dim(denoise, schedule, x_0, stops, noise, low=low, high=high)
    return least.total.cpu(), ode.cpu()


def _bound_steps(model: Model) -> int:
    schedule = model.denoiser.schedule
    return min(BOUND_STEPS, int(schedule.t_max)) if isinstance(schedule, Discrete) else BOUND_STEPS
