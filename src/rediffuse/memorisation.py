"""`rediffuse memorisation`: are a run's samples copies of what it was trained on?

<run>/evaluation/memorisation-<checkpoint>-<weights>-<solver>-<steps>-<n>-<key>/
    report.json       all that was found, and the rule by which it was judged
    neighbours.png    samples above their nearest training images; held-out images above theirs

The key is the digest of everything that the report depends on, so that no report replaces another.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from rediffuse import judging, tables
from rediffuse.config.schema import Sampling
from rediffuse.data.pixels import augment
from rediffuse.data.splits import split
from rediffuse.drawing import Job, draw
from rediffuse.errors import ConfigError, RunError
from rediffuse.evaluation.card import digest_of
from rediffuse.evaluation.digests import add_digest
from rediffuse.evaluation.diversity import repeats, vendi
from rediffuse.evaluation.memorisation import (
    AROUND,
    COPY,
    LEAST_SHARE,
    LEVEL,
    SIGNIFICANCE,
    Nearness,
    Verdict,
    judge,
    nearness,
)
from rediffuse.evaluation.neighbours import augmented
from rediffuse.gallery import Options, opened, settled
from rediffuse.images import Images, of_run
from rediffuse.models import Model, find
from rediffuse.pictures import Pixels, grid, save_png
from rediffuse.processes import alone
from rediffuse.progress import Progress
from rediffuse.references import real_parts, versions
from rediffuse.tracking.jsonl import write_atomically
from rediffuse.words import json_text, say

Facts = dict[str, Any]

_MOST_SAMPLES, _MOST_HELD_OUT = 100_000, 10_000
_MOST_HELD_OUT_OF_CROPS = 2_000  # the search takes as many times longer as there are shifts
_SHOWN = 16


class Known(NamedTuple):
    """Real images: those trained on, in what versions training shows them, and others.

    The others are shown as training would show them, since that is what the model learns: else
    its borders by reflection could tell fresh samples from them.
    """

    training: Pixels
    held_out: Pixels
    flip: bool = False
    crop_padding: int = 0

    def nearest(self, near: Nearness, which: Sequence[int]) -> Pixels:
        """The versions of training images that lie nearest to some images."""
        images = torch.from_numpy(self.training[near.rows[which].numpy()])
        return augmented(images, near.shift[which], near.mirrored[which]).numpy()


class Findings(NamedTuple):
    """What was measured, and how it is judged."""

    samples: Nearness
    held_out: Nearness
    verdict: Verdict


def memorisation(word: str, options: Options, *, as_json: bool = False) -> int:
    """Draw samples, look for their nearest training images, and tell; return the exit code.

    Raises:
        RediffuseError: if the run, its images or what is asked for cannot be used.
    """
    alone("memorisation")
    count = options.count or 1000
    if count > _MOST_SAMPLES:
        raise ConfigError(f"--n {count:,}: more than {_MOST_SAMPLES:,} samples at once")
    run = find(word, options.root)
    model = opened(run, options)
    how, job = settled(model, replace(options, count=count))
    images = of_run(run, model.config.data, model.trusted)
    data = model.config.data
    known = real(images, flip=data.flip, crop_padding=data.crop_padding)
    samples = _drawn(model, how, job)
    found = compared(samples, known)
    facts = {
        "key": key_of(model, how, job, images),
        **report(model, how, job, samples, known, found),
    }
    assert model.origin
    at, weights = model.origin["checkpoint"], model.origin["weights"]
    name = f"memorisation-{at}-{weights}-{how.solver.name}-{how.steps}-{count}-{facts['key'][:12]}"
    _write(run.directory / "evaluation" / name, facts, _picture(samples, known, found))
    say(json_text(facts)) if as_json else _tell(facts)
    return 0


def key_of(model: Model, how: Sampling, job: Job, images: Images) -> str:
    """Return the digest of everything that a report depends on."""
    facts = {
        "samples": judging.samples(model, how, job),
        "real": {name: part.facts for name, part in real_parts(images).items()},
        "held_out": [_MOST_HELD_OUT, _MOST_HELD_OUT_OF_CROPS],
        "augmentation": [model.config.data.flip, model.config.data.crop_padding],
        "rule": {"around": AROUND, "level": LEVEL, "significance": SIGNIFICANCE},
        "least_share": LEAST_SHARE,
        "versions": versions(),
    }
    return digest_of(facts)


def real(images: Images, *, flip: bool, crop_padding: int) -> Known:
    """The images that a run saw, and those that it never did: held out, or of the test part.

    Raises:
        ConfigError: if there are none of the latter, since nothing tells then what is near.
    """
    most = _MOST_HELD_OUT_OF_CROPS if crop_padding else _MOST_HELD_OUT
    parts, train = [], images.packed.part("train")
    if images.held_out is not None:
        parts.append(images.held_out.images[images.held_out_rows[:most]])
    if "test" in images.packed.parts:
        test = images.packed.part("test").images
        parts.append(test[split(len(test), 1.0)[1][:most]])
    if not parts:
        raise ConfigError(
            "there is no image that this run was not trained on (data.validation_fraction=0, and "
            "no validation or test part), so nothing tells how near unseen images lie"
        )
    held_out = torch.from_numpy(np.concatenate(parts)[:most])
    index = torch.arange(len(held_out))
    shown = augment(held_out, index, 0, flip=flip, crop_padding=crop_padding).numpy()
    return Known(train.images[images.train_rows], shown, flip, crop_padding)


def compared(samples: Pixels, known: Known) -> Findings:
    """Hold samples and held-out images against what the network was shown, in pixels."""
    training = torch.from_numpy(known.training)
    both = [torch.from_numpy(images) for images in (samples, known.held_out)]
    near = partial(nearness, flip=known.flip, crop_padding=known.crop_padding)
    with Progress(sum(map(len, both)), "images compared") as bar:
        drawn = near(both[0], training, bar.move)
        unseen = near(both[1], training, lambda count: bar.move(len(both[0]) + count))
    verdict = judge(drawn.ratio, unseen.ratio)
    return Findings(drawn, unseen, verdict)


def report(
    model: Model, how: Sampling, job: Job, samples: Pixels, known: Known, found: Findings
) -> Facts:
    """All that was found, as plain data."""
    verdict = found.verdict
    return {
        **(model.origin or {}),
        "sampling": how.model_dump(mode="json"),
        "seed": job.seed,
        "samples": len(samples),
        "training_images": len(known.training),
        "mirrored": known.flip,
        "crop_padding": known.crop_padding,
        "held_out_images": len(known.held_out),
        "seen_through": "pixels",
        "around": min(AROUND, len(known.training)),
        "alarm": verdict.alarm,
        "rule": _rule(verdict, known, len(samples)),
        "verdict": {**verdict._asdict(), "suspicious": int(verdict.suspicious.sum())},
        "nearness": {
            "samples": _summary(found.samples),
            "held_out": _summary(found.held_out),
        },
        "diversity": diversity(samples, known, found),
        "most_suspicious": [_one(found, job, k) for k in _most(found.samples, 100)],
        "versions": {"rediffuse": version("rediffuse"), "torch": torch.__version__},
    }


def diversity(samples: Pixels, known: Known, found: Findings) -> Facts:
    """How much samples differ, beside as many real images."""
    pool = np.concatenate((known.training, known.held_out))
    count = min(len(samples), len(pool))
    drawn, others = (
        torch.from_numpy(x) for x in (samples[:count], pool[split(len(pool), 1.0)[1][:count]])
    )
    centre = torch.from_numpy(known.training.mean(axis=0)).float()
    few = min(len(samples), len(known.held_out))
    return {
        "images": count,
        "repeats": repeats(drawn, others) if count > 1 else 0.0,
        "vendi": {"samples": vendi(drawn, centre), "real": vendi(others, centre)},
        "nearest_are_distinct": {
            "of": few,
            "samples": _distinct(found.samples, few),
            "held_out": _distinct(found.held_out, few),
        },
    }


def _distinct(near: Nearness, count: int) -> float:
    return len(near.rows[:count].unique()) / count


def _summary(near: Nearness) -> Facts:
    levels = torch.tensor([0.01, 0.5]).double()
    return {
        "distance": near.distance.quantile(levels).tolist(),
        "ratio": near.ratio.quantile(levels).tolist(),
        "copies": float((near.second < COPY).double().mean()),
    }


def _rule(verdict: Verdict, known: Known, samples: int) -> str:
    count, around = len(known.held_out), min(AROUND, len(known.training))
    return (
        f"A sample is suspicious if its nearest training image{_versions(known)} is nearer than "
        f"{verdict.threshold:.4g} of the mean of the {around} nearest, which {verdict.rank - 1} of "
        f"{count:,} held-out images are. The alarm is raised if at least {LEAST_SHARE:.0%} of "
        f"{samples:,} samples are, and {SIGNIFICANCE:g} is above p, the probability that fresh "
        f"real images come to as many."
    )


def _versions(known: Known) -> str:
    """In which versions a training image is compared, in words."""
    shifts = f"shifted by up to {known.crop_padding} pixels" if known.crop_padding else ""
    ways = " or ".join(filter(None, (shifts, "mirrored" if known.flip else "")))
    return f", as it is or {ways}," if ways else ""


def _most(near: Nearness, count: int) -> list[int]:
    """The images whose nearest training image stands out the most."""
    order: list[int] = near.ratio.argsort(stable=True)[:count].tolist()
    return order


def _one(found: Findings, job: Job, k: int) -> Facts:
    near = found.samples
    return {
        "image": job.images[k],
        "nearest": int(near.rows[k]),
        "mirrored": bool(near.mirrored[k]),
        "shift": near.shift[k].tolist(),
        "distance": float(near.distance[k]),
        "ratio": float(near.ratio[k]),
        "suspicious": bool(found.verdict.suspicious[k]),
    }


def _drawn(model: Model, how: Sampling, job: Job) -> Pixels:
    with Progress(len(job.images)) as bar:
        drawn = [pixels for _, pixels in draw(model, how, job, bar.move)]
    return np.concatenate(drawn)


def _picture(samples: Pixels, known: Known, found: Findings) -> np.ndarray:
    """Rows: suspicious samples, their nearest; a white one; held-out images, their nearest."""
    rows = []
    for images, near in ((samples, found.samples), (known.held_out, found.held_out)):
        most = _most(near, _SHOWN)
        pairs = (images[most], known.nearest(near, most))
        rows.append([_filled(images) for images in pairs])
    blank = _filled(samples[:0])
    return grid(np.concatenate([*rows[0], blank, *rows[1]]), columns=_SHOWN)


def _filled(images: Pixels) -> UInt8[np.ndarray, "_ channels height width"]:
    blank = np.full((_SHOWN - len(images), *images.shape[1:]), 255, np.uint8)
    return np.concatenate((images, blank))


def _write(folder: Path, facts: Facts, picture: np.ndarray) -> None:
    facts["folder"] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_png(picture, folder / "neighbours.png")
        write_atomically(folder / "report.json", json_text(add_digest(facts)).encode())
    except OSError as failed:
        raise RunError(f"{folder} cannot be written ({failed.strerror})") from None


# The terminal


def _tell(facts: Facts) -> None:
    verdict, varied = facts["verdict"], facts["diversity"]
    drawn, unseen = facts["nearness"]["samples"], facts["nearness"]["held_out"]
    say(
        f"{facts['samples']:,} samples of run {facts['run'][:8]}, {facts['checkpoint']}, "
        f"{facts['weights']} weights"
    )
    rows = [
        ("images", f"{facts['samples']:,}", f"{facts['held_out_images']:,}"),
        ("nearest training image, rms of 255", *_medians(drawn, unseen, "distance", "{:.1f}")),
        (
            f"  over the mean of the {facts['around']} nearest",
            *_medians(drawn, unseen, "ratio", "{:.3f}"),
        ),
        ("suspicious", f"{verdict['share']:.1%}", f"{verdict['expected']:.1%} expected"),
        ("nearer than 1/3 of the second", f"{drawn['copies']:.1%}", f"{unseen['copies']:.1%}"),
        ("nearest ones that are distinct", *_percents(varied["nearest_are_distinct"])),
    ]
    _table(("", "samples", "held out"), rows)
    rows = [
        ("images", *[f"{varied['images']:,}"] * 2),
        ("different ones, in effect (Vendi)", *_plain(varied["vendi"])),
        ("near to another of the same", f"{varied['repeats']:.1%}", "1.0%"),
    ]
    _table(("", "samples", "real"), rows)
    p = verdict["p_value"]
    told = f"p = {p:.2g}" if p else "p < 1e-300"
    say(f"\n{'ALARM' if facts['alarm'] else 'no alarm'}  ({told})")
    tables.paragraph(facts["rule"])
    say(f"grid    {facts['folder']}/neighbours.png")
    say(f"all     {facts['folder']}/report.json")


def _medians(drawn: Facts, unseen: Facts, name: str, form: str) -> tuple[str, ...]:
    return tuple(form.format(of[name][1]) for of in (drawn, unseen))


def _percents(of: Facts) -> tuple[str, ...]:
    return tuple(f"{of[name]:.1%}" for name in ("samples", "held_out"))


def _plain(of: Facts) -> tuple[str, ...]:
    return tuple(f"{of[name]:.1f}" for name in ("samples", "real"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    say("")
    tables.table(head, [(f"{what:36}", *rest) for what, *rest in rows], left=("",))
