"""From plain numbers to figures; nothing here knows what a run is.

A figure is drawn in the style that is in force: in a notebook its own, in `svg` one of ours. Ours
use the colours of Okabe & Ito (2008, Color Universal Design), which can be told apart with any kind
of colour vision, and no letter below 9 points at the size that a figure has.
"""

import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from jaxtyping import Float64, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import EngFormatter, NullFormatter

from rediffuse.pictures import Pixels, enlarged

Style = dict[Any, Any]
"""matplotlib's own parameters."""


def _style(ink: str, faint: str, paper: str, colours: Sequence[str]) -> Style:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        "axes.prop_cycle": cycler(color=colours),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": faint,
        "grid.linewidth": 0.8,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "text.parse_math": False,  # a class may be called $\frac
        "text.usetex": False,
        "svg.fonttype": "path",  # the same letters on every machine
        "svg.hashsalt": "rediffuse",
        "image.interpolation": "none",
    }


LIGHT = _style(
    "#1f2328",
    "#e2e5e9",
    "#ffffff",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = _style(
    "#e6e8eb",
    "#363b42",
    "#16191d",
    ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00"),
)


class Curve(NamedTuple):
    """A metric, by images seen."""

    label: str
    images: Float64[np.ndarray, " rows"]
    values: Float64[np.ndarray, " rows"]


Drawing = Callable[[Sequence[Curve]], Figure]


def svg(draw: Callable[[], Figure], style: Style = LIGHT) -> bytes:
    """Draw in a style of ours; the same numbers always give the same bytes."""
    with rc_context(style):
        written = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw().savefig(written, format="svg", metadata=nothing)
    return written.getvalue()


def png(draw: Callable[[], Figure], style: Style = LIGHT) -> bytes:
    """Draw in a style of ours, at twice the pixels of a screen."""
    with rc_context(style):
        written = io.BytesIO()
        draw().savefig(written, format="png", dpi=192, metadata={"Software": None})
    return written.getvalue()


# Curves


def loss(curves: Sequence[Curve]) -> Figure:
    """The loss as it was measured, and smoothed."""
    figure, axes = _panel("images seen", "loss")
    for k, curve in enumerate(curves):
        axes.plot(*curve[1:], color=f"C{k}", linewidth=0.8, alpha=0.45, **_points(curve))
        axes.plot(curve.images, smoothed(curve), _LINES[k % 2], color=f"C{k}", label=curve.label)
    return _finished(figure, axes, curves)


def losses_by_noise(curves: Sequence[Curve]) -> Figure:
    """The smoothed loss in each range of ln(α/σ)."""
    figure, axes = _panel("images seen", "loss")
    for curve in curves:
        axes.plot(curve.images, smoothed(curve), label=curve.label, **_points(curve))
    return _finished(figure, axes, curves, title="ln(α/σ), nats")


def held_out(curves: Sequence[Curve]) -> Figure:
    """The loss on images that are not trained on, with the least of each."""
    figure, axes = _panel("images seen", "loss on held-out images")
    for k, curve in enumerate(curves):
        line = _LINES[k % 2]
        axes.plot(*curve[1:], line, marker="o", markersize=3.5, color=f"C{k}", label=curve.label)
        if np.isfinite(curve.values).any():
            at = int(np.nanargmin(curve.values))
            least = curve.images[at], curve.values[at]
            axes.plot(*least, "o", markersize=9, fillstyle="none", color=f"C{k}")
            axes.annotate(f"{least[1]:.4g}", least, (0, 9), textcoords="offset points", ha="center")
    axes.margins(y=0.15)
    return _finished(figure, axes, curves)


def metric(curves: Sequence[Curve], unit: str, level: float | None = None) -> Figure:
    """Any other metric; `level` is drawn as a dashed line."""
    figure, axes = _panel("images seen", unit)
    for k, curve in enumerate(curves):
        axes.plot(*curve[1:], _LINES[k % 2], linewidth=1.5, label=curve.label, **_points(curve))
    if level is not None:
        axes.axhline(level, linestyle="--", linewidth=1.2, color="C1")
    return _finished(figure, axes, curves)


def smoothed(curve: Curve, parts: float = 40) -> Float64[np.ndarray, " rows"]:
    """Weigh what was measured d images before or after by 2^(-d·`parts`/length).

    What is not finite does not count.
    """
    images, counts = curve.images, np.isfinite(curve.values).astype(np.float64)
    values = np.where(counts > 0, curve.values, 0)
    half_life = max(1.0, (images[-1] - images[0]) / parts) if len(images) else 1.0
    kept = 2.0 ** -(np.diff(images) / half_life)
    total, weight = (_leaking(of, kept) for of in (values, counts))
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def _leaking(values: np.ndarray, kept: np.ndarray) -> Float64[np.ndarray, " rows"]:
    """Sums over all rows, of which `kept` is left from each row to the next, in both directions."""
    both = -values  # each row is in both sums
    for way in (1, -1):
        total, sums = 0.0, np.empty_like(values)
        for k, (value, keep) in enumerate(zip(values[::way], (0, *kept[::way]), strict=False)):
            total = sums[k] = keep * total + value
        both = both + sums[::way]
    return both


# The schedule

Numbers = Float64[np.ndarray, "..."]


def scales(t: Numbers, alpha: Numbers, sigma: Numbers, stops: Numbers) -> Figure:
    """How much of the image and of the noise there is; a grid's stops are along the bottom."""
    figure, axes = _panel("t", "share in x_t")
    axes.plot(t, alpha, label="α, image")
    axes.plot(t, sigma, label="σ, noise")
    if sigma.max() > 20 * alpha.max():
        _by_powers(axes)
    _mark(axes, stops)
    axes.legend()
    return figure


def half_log_snr(t: Numbers, values: Numbers, stops: Numbers, at_stops: Numbers) -> Figure:
    """ln(α/σ) by time, with a grid's stops on it."""
    figure, axes = _panel("t", "ln(α/σ), nats")
    axes.plot(t, _finite(values))
    axes.plot(stops, _finite(at_stops), "o", markersize=4.5, color="C1", label="a solver's stops")
    axes.legend()
    return figure


def weights(values: Numbers, weight: Numbers, density: Numbers) -> Figure:
    """What the loss weighs errors by at each noise level, and how often training goes there."""
    figure, axes = _panel("ln(α/σ), nats", "share of the greatest")
    for k, (label, of) in enumerate((("weight on the output's error", weight),
                                     ("how often it is drawn", density))):  # fmt: skip
        known = np.isfinite(of) & np.isfinite(values)
        peak = of[known].max(initial=0)
        axes.plot(values[known], of[known] / (peak or 1), color=f"C{k}", label=label)
    axes.set_ylim(0, 1.05)
    axes.legend()
    return figure


# Images


def table(
    rows: Sequence[Pixels], row_names: Sequence[str], column_names: Sequence[str], across: str = ""
) -> Figure:
    """Rows of equally many images, each row and column with its name."""
    names = [readable(name) for name in row_names]
    count, (height, width) = len(rows[0]), rows[0].shape[2:]
    canvas = _laid_out(rows)
    left = 0.2 + 0.085 * max(map(len, names))
    cell = min(0.62, (12.7 - left) / count)  # inches: no wider than a laptop's page
    tall = cell * height / width
    top = 0.5 if across or any(column_names) else 0.1
    size = (left + cell * count + 0.1, tall * len(rows) + top + 0.1)
    figure = Figure(figsize=size)
    inside = (left / size[0], 0.1 / size[1], cell * count / size[0], tall * len(rows) / size[1])
    axes = figure.add_axes(inside)
    axes.imshow(canvas, extent=(0, count, len(rows), 0), aspect="auto")
    axes.set_xticks(np.arange(count) + 0.5, [readable(name, 9) for name in column_names])
    axes.set_yticks(np.arange(len(rows)) + 0.5, names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_xlabel(across)
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)
    return figure


def readable(text: str, most: int = 28) -> str:
    """A name as our letters can show it."""
    shown = "".join(c if ord(c) in _letters() and c.isprintable() else "?" for c in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def _laid_out(rows: Sequence[Pixels], gap: int = 2) -> UInt8[np.ndarray, "h w 4"]:
    """Images in rows, transparent in between."""
    cells = np.stack([enlarged(row) for row in rows])
    _, _, channels, height, width = cells.shape
    opaque = np.full((*cells.shape[:2], 4, height + gap, width + gap), 255, np.uint8)
    opaque[:, :, 3, height:, :] = opaque[:, :, 3, :, width:] = 0
    opaque[:, :, : min(channels, 3) if channels != 1 else 3, :height, :width] = cells[:, :, :3]
    if channels == 4:
        opaque[:, :, 3, :height, :width] = cells[:, :, 3]
    down, across = len(rows) * (height + gap), cells.shape[1] * (width + gap)
    return opaque.transpose(0, 3, 1, 4, 2).reshape(down, across, 4)


# What panels share

_LINES = "-", "--"  # so that of two equal curves both are seen


def _panel(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes


def _finished(
    figure: Figure, axes: Axes, curves: Sequence[Curve], title: str | None = None
) -> Figure:
    """Count images in k and M, choose the scale, and name the curves if there are several."""
    values = np.concatenate([curve.values for curve in curves])
    known = values[np.isfinite(values)]
    if len(known) and known.min() > 0 and known.max() > 30 * known.min():
        _by_powers(axes)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(curves) > 1:
        figure.legend(loc="outside right upper", title=title)
    return figure


def _points(curve: Curve) -> dict[str, Any]:
    """A line of one or two points cannot be seen without them."""
    return {"marker": "o", "markersize": 4} if len(curve.images) < 3 else {}


def _by_powers(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # the default writes formulas
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark(axes: Axes, stops: Numbers) -> None:
    bottom = np.zeros_like(stops)
    along = axes.get_xaxis_transform()
    axes.plot(stops, bottom, "|", markersize=9, color="C2", transform=along, clip_on=False,
              label="a solver's stops")  # fmt: skip


def _finite(values: Numbers) -> Numbers:
    return np.where(np.isfinite(values), values, np.nan)
