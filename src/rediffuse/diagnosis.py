"""`rediffuse diagnose`: where a model errs, whether it knows, and how its samples come about.

<run>/evaluation/diagnosis-<checkpoint>-<solver>-<steps>-<n>-<key>/
    report.json       all figures
    diagnosis.png     errors by log-SNR, and the way of samples from noise to data

The key is the digest of everything that the report depends on, so that no report replaces another.
"""

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rediffuse import judging, tables
from rediffuse.config.schema import Sampling
from rediffuse.data.pixels import pixel_range, to_model
from rediffuse.data.splits import split
from rediffuse.denoiser import Denoise
from rediffuse.drawing import Job, Setting, Way, classes_for, states, told
from rediffuse.errors import ConfigError, RunError
from rediffuse.evaluation.card import digest_of
from rediffuse.evaluation.denoising import (
    Errors,
    Gaussian,
    errors,
    fit,
    levels,
    posterior_mean,
    rms,
)
from rediffuse.evaluation.digests import add_digest
from rediffuse.gallery import Options, opened, wanted
from rediffuse.images import Images, of_run
from rediffuse.legality import check_sampling
from rediffuse.models import Model, find
from rediffuse.process import Prediction
from rediffuse.processes import alone
from rediffuse.progress import Progress
from rediffuse.randomness import Stream, normal
from rediffuse.references import real_parts, versions
from rediffuse.sampling import trajectory
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.words import json_text, say

Facts = dict[str, Any]

_MOST_IMAGES, _FITTED, _DRAWN = 10_000, 2048, 64


class Unseen(NamedTuple):
    """Images that a run was not trained on, in its model's range, and their classes."""

    x_0: Tensor
    cond: Tensor | None


def diagnose(word: str, options: Options, *, level_count: int = 12, as_json: bool = False) -> int:
    """Measure a run's denoising and the way of its samples, and tell; return the exit code.

    Raises:
        RediffuseError: if the run, its images or what is asked for cannot be used.
    """
    alone("diagnose")
    count = options.count or 256
    if count > _MOST_IMAGES:
        raise ConfigError(f"--n {count:,}: more than {_MOST_IMAGES:,} images")
    run = find(word, options.root)
    models = {kind: opened(run, replace(options, weights=kind)) for kind in ("average", "raw")}
    model = models["average"]
    if not model.config.average.half_life_images:
        models = {"raw": model}
    how = wanted(model.config.sampling, options)
    check_sampling(model.config, how, model.denoiser.schedule, model.trusted)
    images = of_run(run, model.config.data, model.trusted)
    held = unseen(images, model, count)
    with Progress(level_count, "noise levels") as bar:
        gaussian = _gaussian(images, model)
        rows = by_level(models, held, gaussian, options.seed, level_count, bar.move)
    assert model.origin
    job = _job(model, options.seed)
    measured = {"held_out": len(held.x_0), "levels": level_count, "models": [*models]}
    facts: Facts = {
        "key": key_of(model, how, job, images, measured),
        "run": run.id,
        "checkpoint": model.origin["checkpoint"],
        "images": len(held.x_0),
        "seed": options.seed,
        "levels": rows,
        "sampling": how.model_dump(mode="json"),
        "samples": _DRAWN,
        "data_rms": rms(held.x_0),
        "trajectory": way_of_samples(model, how, job, rms(held.x_0)),
        "versions": {"rediffuse": version("rediffuse"), "torch": torch.__version__},
    }
    name = (
        f"{facts['checkpoint']}-{how.solver.name}-{how.steps}-{facts['images']}-{facts['key'][:12]}"
    )
    _write(run.directory / "evaluation" / f"diagnosis-{name}", facts)
    say(json_text(facts)) if as_json else _tell(facts)
    return 0


def key_of(model: Model, how: Sampling, job: Job, images: Images, measured: Facts) -> str:
    """Return the digest of everything that a report depends on."""
    facts = {
        "samples": judging.samples(model, how, job),
        "measured": measured,
        "fitted": _FITTED,
        "real": {name: part.facts for name, part in real_parts(images).items()},
        "versions": versions(),
    }
    return digest_of(facts)


def unseen(images: Images, model: Model, count: int) -> Unseen:
    """The first `count` held-out images, and of the test part where these are too few.

    Raises:
        ConfigError: if there are none.
    """
    pieces = []
    if images.held_out is not None:
        pieces.append((images.held_out, images.held_out_rows))
    if "test" in images.packed.parts:
        test = images.packed.part("test")
        pieces.append((test, split(len(test.images), 1.0)[1]))
    if not pieces:
        raise ConfigError(
            "there is no image that this run was not trained on (data.validation_fraction=0, and "
            "no validation or test part), so there is nothing to measure its errors on"
        )
    pixels = np.concatenate([part.images[rows[:count]] for part, rows in pieces])[:count]
    cond = None
    if model.class_names:
        labels = [part.labels[rows[:count]] for part, rows in pieces if part.labels is not None]
        cond = torch.from_numpy(np.concatenate(labels)[:count]).to(model.device)
    return Unseen(_in_range(pixels, model), cond)


@torch.no_grad()
def by_level(
    models: dict[str, Model],
    held: Unseen,
    gaussian: Gaussian,
    seed: int,
    count: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[Facts]:
    """The errors of each model at each level, beside a Gaussian's and those of the mean image.

    `done` is told how many levels are measured.
    """
    schedule = next(iter(models.values())).denoiser.schedule
    found = []
    for t in levels(schedule, count):
        told_by: dict[str, Callable[[Tensor | None], Denoise]] = {
            name: partial(_asked, model) for name, model in models.items()
        }
        told_by["gaussian"] = lambda cond: partial(_gaussian_says, gaussian, schedule)
        row: Facts = {"t": float(t), "log_snr": 2 * float(schedule(t).half_log_snr)}
        for name, asked in told_by.items():
            batches = _batches(held, seed)
            one = [errors(asked(cond), schedule, x_0, eps, t) for x_0, eps, cond in batches]
            row[name] = _means(one)
        row["mean_image"] = float((held.x_0 - gaussian.mean).double().square().mean())
        found.append(row)
        done(len(found))
    return found


def _job(model: Model, seed: int) -> Job:
    numbers = tuple(range(_DRAWN))
    return Job(numbers, classes_for(numbers, model.class_names), seed, _DRAWN)


def way_of_samples(model: Model, how: Sampling, job: Job, data_rms: float) -> list[Facts]:
    """How large x_t, x_0 and ε are whenever the solver asks, beside what they should be.

    For images and noise that do not know of each other, x_t has the size √(α²·E[x_0²] + σ²).
    """
    seen: dict[float, list[tuple[float, float, float]]] = defaultdict(list)

    def watching(denoise: Denoise) -> Denoise:
        def watched(x_t: Tensor, t: Tensor) -> Prediction:
            predicted = denoise(x_t, t)
            seen[float(t)].append((rms(x_t), rms(predicted.x_0), rms(predicted.eps)))
            return predicted

        return watched

    def way(at: Setting, images: Tensor, fresh: Callable[[], Denoise]) -> Iterator[Tensor]:
        return trajectory(*at._replace(denoise=watching(at.denoise)))

    job = replace(job, way=Way(way))
    with Progress(how.steps, "steps of samples") as bar:
        for k, _ in enumerate(states(model, how, job), 1):
            bar.move(min(k, how.steps))
    schedule, found = model.denoiser.schedule, []
    for time in sorted(seen, reverse=True):
        at = schedule(torch.tensor(time, dtype=torch.float64))
        x_t, x_0, eps = np.mean(seen[time], axis=0).tolist()
        expected = float(((at.alpha * data_rms) ** 2 + at.sigma**2).sqrt())
        log_snr = 2 * float(at.half_log_snr.clamp(-50, 50))
        found.append(
            {
                "t": time,
                "log_snr": log_snr,
                "x_t": x_t,
                "expected": expected,
                "x_0": x_0,
                "eps": eps,
            }
        )
    return found


def _asked(model: Model, cond: Tensor | None) -> Denoise:
    return partial(told(model), cond=cond)


def _gaussian_says(gaussian: Gaussian, schedule: Any, x_t: Tensor, t: Tensor) -> Prediction:
    return posterior_mean(gaussian, schedule, x_t, t)


def _gaussian(images: Images, model: Model) -> Gaussian:
    """The Gaussian of training images; between two levels of pixels nothing is known."""
    train = images.packed.part("train").images
    rows = np.sort(images.train_rows[split(len(images.train_rows), 1.0)[1][:_FITTED]])
    low, high = pixel_range(model.config.data.mean, model.config.data.std)
    width = float((high - low).mean()) / 255
    return fit(_in_range(train[rows], model), width**2 / 12)


def _in_range(pixels: np.ndarray, model: Model) -> Tensor:
    data = model.config.data
    return to_model(torch.from_numpy(pixels).to(model.device), data.mean, data.std)


def _batches(
    held: Unseen, seed: int, size: int = 64
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images with their noise, the same at every level and for every denoiser."""
    for start in range(0, len(held.x_0), size):
        x_0 = held.x_0[start : start + size]
        index = torch.arange(start, start + len(x_0), device=x_0.device)
        eps = normal(seed, Stream.EVALUATION, index, tuple(x_0.shape[1:]), draw=2)
        cond = None if held.cond is None else held.cond[start : start + size]
        yield x_0, eps.to(x_0), cond


def _means(found: list[Errors]) -> Facts:
    x_0, eps = (torch.cat([getattr(one, name) for one in found]) for name in ("x_0", "eps"))
    calibrations = [one.calibration for one in found if one.calibration is not None]
    return {
        "x_0": float(x_0.mean()),
        "x_0_standard_error": float(x_0.std(correction=1) / len(x_0) ** 0.5) if len(x_0) > 1 else 0,
        "eps": float(eps.mean()),
        "calibration": float(torch.cat(calibrations).mean()) if calibrations else None,
    }


def _write(folder: Path, facts: Facts) -> None:
    facts["folder"] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _plot(facts, folder / "diagnosis.png")
        write_atomically(folder / "report.json", json_text(add_digest(facts)).encode())
    except OSError as failed:
        raise RunError(f"{folder} cannot be written ({failed.strerror})") from None


_COLOURS = {"average": "#0072B2", "raw": "#D55E00", "gaussian": "#009E73", "mean_image": "#888888"}
"""Of Okabe & Ito (2008), which colour-blind people can tell apart."""


def _plot(facts: Facts, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    of_x_0, of_eps, way = figure.subplots(1, 3)
    rows, at = facts["levels"], [row["log_snr"] for row in facts["levels"]]
    for name in [name for name in ("average", "raw", "gaussian") if name in rows[0]]:
        style = {"color": _COLOURS[name], "label": name, "marker": "."}
        of_x_0.semilogy(at, [row[name]["x_0"] for row in rows], **style)
        of_eps.semilogy(at, [row[name]["eps"] for row in rows], **style)
    grey = {"color": _COLOURS["mean_image"], "linestyle": "--"}
    of_x_0.semilogy(at, [row["mean_image"] for row in rows], label="mean image", **grey)
    of_x_0.set_title("squared error of x_0 on held-out images")
    of_eps.set_title("squared error of ε")
    steps = facts["trajectory"]
    at = [step["log_snr"] for step in steps]
    for name, line in (("x_t", "average"), ("x_0", "raw"), ("eps", "gaussian")):
        way.plot(at, [step[name] for step in steps], color=_COLOURS[line], marker=".", label=name)
    way.plot(at, [step["expected"] for step in steps], label="x_t expected", **grey)
    way.set_title("root mean square along samples")
    for axes in (of_x_0, of_eps, way):
        axes.set_xlabel("log-SNR, nats")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    written = io.BytesIO()
    figure.savefig(written, dpi=80, format="png")
    write_atomically(file, written.getvalue())


# The terminal


def _tell(facts: Facts) -> None:
    rows = facts["levels"]
    names = [name for name in ("average", "raw") if name in rows[0]]
    learned = any(row[names[0]]["calibration"] is not None for row in rows)
    say(f"{facts['images']:,} held-out images, {facts['checkpoint']} of run {facts['run'][:8]}")
    say("\nsquared error of x_0, by the model's weights and by a Gaussian of all images;")
    say("of ε; where a variance is learned, squared residual over it: 1 is calibrated")
    head = ("log-SNR", "t", *names, "gaussian", "mean image", "ε")
    tables.table(
        (*head, "residual") if learned else head,
        [
            (
                f"{row['log_snr']:.1f}",
                f"{row['t']:.4g}",
                *(f"{row[name]['x_0']:.3g}" for name in (*names, "gaussian")),
                f"{row['mean_image']:.3g}",
                f"{row[names[0]]['eps']:.3g}",
                *([_shown(row[names[0]]["calibration"])] if learned else []),
            )
            for row in rows
        ],
    )
    how = facts["sampling"]
    say(f"\n{facts['samples']} samples by {how['solver']['name']} in {how['steps']} steps:")
    say(f"root mean squares; images have {facts['data_rms']:.3f}, noise 1")
    steps = facts["trajectory"]
    shown = [steps[k] for k in sorted({*np.linspace(0, len(steps) - 1, 12).round().astype(int)})]
    names = ["log_snr", "t", "x_t", "expected", "x_0", "eps"]
    tables.table(
        ("log-SNR", "t", "x_t", "expected", "x_0", "ε"),
        [tuple(f"{step[name]:.4g}" for name in names) for step in shown],
    )
    say(f"\npicture {facts['folder']}/diagnosis.png")
    say(f"all     {facts['folder']}/report.json")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
