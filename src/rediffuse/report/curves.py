"""From rows of metrics, and from a configuration, to figures."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rediffuse import build, plots
from rediffuse.config.schema import Config
from rediffuse.plots import Curve
from rediffuse.process import Schedule
from rediffuse.report.page import Picture, Section, figure
from rediffuse.times import LossAware
from rediffuse.tracking.tracker import Row

_BY_NOISE = "loss/half_log_snr "


def curves(sides: Sequence[tuple[str, Sequence[Row]]], clip_norm: float | None = None) -> Section:
    """Every curve of one run, or of several in the same plots; each side is a name and its rows."""
    if not any(rows for _, rows in sides):
        return Section("Training", notes=["No metrics have been written yet."])
    of = partial(_curves, sides)
    drawn = [
        _drawn("loss", of("loss"), plots.loss, "Training loss",
               "Thin: as logged. Thick: smoothed; the half-life is 1/40 of what is shown."),
        _drawn("held-out", of("validation/loss"), plots.held_out, "Held-out loss",
               "Averaged weights, the same times and noise every time. The circle is the least."),
        _by_noise(sides),
        _drawn("learning-rate", of("learning_rate"), partial(plots.metric, unit="learning rate"),
               "Learning rate"),
        _drawn("gradient-norm", of("gradient_norm"),
               partial(plots.metric, unit="gradient norm", level=clip_norm), "Gradient norm",
               f"Before clipping; dashed: clipped at {clip_norm:g}." if clip_norm else ""),
        _drawn("throughput", of("images_per_s", least=0.0), partial(plots.metric, unit="images/s"),
               "Throughput", "Validation, previews and checkpoints included."),
    ]  # fmt: skip
    return Section("Training", [picture for picture in drawn if picture])


def schedule(config: Config, clock: Schedule, trusted: Sequence[str] | None) -> Section:
    """The scales, their ratio, and where training looks, with the stops of the run's grid."""
    how = config.sampling
    t = torch.linspace(clock.t_min, clock.t_max, 400, dtype=torch.float64)
    at_t = clock(t).half_log_snr
    known = at_t[at_t.isfinite()]
    t = torch.unique(torch.cat((clock.snap(t), _times(clock, known.min(), known.max()))))
    stops = build.grid(how.grid, trusted)(clock, how.steps)
    at, at_stops = clock(t), clock(stops)
    grid = f"{how.grid.name}, {how.steps} steps"
    drawn = [
        figure(
            "scales",
            partial(plots.scales, *map(_array, (t, at.alpha, at.sigma, stops))),
            "Schedule",
            f"{config.schedule.name}; x_t = α·x_0 + σ·ε. Stops: {grid}.",
        ),
        figure(
            "half-log-snr",
            partial(
                plots.half_log_snr,
                *map(_array, (t, at.half_log_snr, stops[:-1], at_stops.half_log_snr[:-1])),
            ),
            "Signal and noise",
            "Half the log-SNR; the last stop is data, where it is infinite.",
        ),
    ]
    notes = []
    if isinstance(clock, nn.Module):
        notes.append("This schedule learns; drawn is how it is at the checkpoint, or at the start.")
    if weighed := _weights(config, clock, trusted):
        drawn.append(weighed)
    else:
        notes.append("The weighting learns, so there is no curve of it to draw here.")
    return Section("Schedule and weighting", drawn, notes)


def _weights(config: Config, clock: Schedule, trusted: Sequence[str] | None) -> Picture | None:
    weighting = build.bind("weighting", config.weighting, "weighting", trusted)
    if isinstance(weighting, nn.Module):
        return None
    times = build.bind("times", config.times, "times", trusted)
    drawn = times.evenly if isinstance(times, LossAware) else times
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    often = _array(clock(drawn(clock, u)).half_log_snr)
    often = often[np.isfinite(often)]
    low, high = np.quantile(often, (0.001, 0.999))
    t = _times(clock, *torch.tensor([low, high], dtype=torch.float64))
    values = _array(clock(t).half_log_snr)
    weight = _array(weighting(clock, t, build.bind("target", config.target, "target", trusted)))
    density, edges = np.histogram(often, bins=50, range=(low, high))
    at = np.interp(values, (edges[1:] + edges[:-1]) / 2, density.astype(np.float64))
    return figure(
        "weighting",
        partial(plots.weights, values, weight, at),
        "What training looks at",
        f"weighting={config.weighting.name} on the error of target={config.target.name}; "
        f"times={config.times.name}.",
    )


def _times(clock: Schedule, low: Tensor, high: Tensor, count: int = 400) -> Tensor:
    """Times that are even in ln(α/σ), as far as the clock has them."""
    even = torch.lerp(low, high, torch.linspace(0, 1, count, dtype=torch.float64))
    return torch.unique(clock.snap(clock.time(even).clamp(clock.t_min, clock.t_max))).detach()


def _by_noise(sides: Sequence[tuple[str, Sequence[Row]]]) -> Picture | None:
    """Of one run only: six curves are enough for one plot."""
    if len(sides) > 1:
        return None
    ((_, rows),) = sides
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(_BY_NOISE))
    found = [_curve(_range(name), rows, name) for name in names]
    return _drawn(
        "loss-by-noise",
        found,
        plots.losses_by_noise,
        "Loss by noise level",
        "Smoothed. Left of 0 there is more noise than image, right of it more image.",
    )


def _range(name: str) -> str:
    return name.removeprefix(_BY_NOISE).replace("-", "−").replace("inf", "∞")


def _curves(
    sides: Iterable[tuple[str, Sequence[Row]]], name: str, least: float | None = None
) -> list[Curve]:
    found = [_curve(label, rows, name, least) for label, rows in sides]
    return [curve for curve in found if len(curve.images)]


def _curve(label: str, rows: Sequence[Row], name: str, least: float | None = None) -> Curve:
    """A metric's rows; those not above `least` are no measurements (a process' first speed)."""
    points = [
        (row["images"], row[name])
        for row in rows
        if name in row and (least is None or row[name] > least)
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    values = np.where(np.isfinite(table[:, 1]), table[:, 1], np.nan)
    return Curve(label, table[:, 0], values)


def _drawn(
    name: str, found: Sequence[Curve], draw: plots.Drawing, title: str, caption: str = ""
) -> Picture | None:
    known = [curve for curve in found if np.isfinite(curve.values).any()]
    return figure(name, partial(draw, known), title, caption) if known else None


def _array(values: Tensor) -> plots.Numbers:
    return values.detach().double().numpy()
