"""Features of the data's own domain: a small classifier, trained once.

Where Inception, which knows photographs, means little (digits, textures), a network that tells
the data's classes apart sees more. Without labels it learns to tell quarter turns (Gidaris et al.
2018).
Distances through it are comparable only with those through the same weights.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from rediffuse.errors import DataError, RunError
from rediffuse.evaluation.digests import add_digest, read_report
from rediffuse.evaluation.features import Seen
from rediffuse.evaluation.looking import full_precision
from rediffuse.randomness import Stream, permuted, torch_seeded, uniform, words
from rediffuse.reading import read_bytes
from rediffuse.words import json_text

Images = UInt8[np.ndarray, "_ channel height width"]
Labels = Int64[np.ndarray, " _"]

FEATURES = 96
WEIGHTS, FACTS = "classifier.safetensors", "classifier.json"
_TURNS = 4
_MOST_BYTES = 100_000_000
_PIXELS = 14
"""To which the first layer reduces an image, about: 28 pixels become 14, and 64 become 16."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier as a feature network: `Features`, with the layer before the logits.

    `verified` is False if its facts were read from a file that has no digest of them.
    """

    network: "Network"
    name: str
    digest: str
    facts: Mapping[str, Any]
    verified: bool = True

    @property
    def accuracy(self) -> float:
        """Share of held-out images that it names rightly."""
        return float(self.facts["held_out_accuracy"])

    def __call__(self, pixels: UInt8[Tensor, "batch channel height width"]) -> Seen:
        expected = tuple(self.facts["image"])
        if tuple(pixels.shape[1:]) != expected:
            raise DataError(
                f"the classifier looks at images of {expected} (channels, height, width), "
                f"and these have {tuple(pixels.shape[1:])}"
            )
        with torch.inference_mode(), full_precision():
            features, logits = self.network(_ranged(pixels, self.network))
        return Seen(features.float().cpu(), logits.float().cpu())


class Network(nn.Module):
    """A strided convolution and three residual blocks (He et al. 2016), averaged over places."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        stride = max(1, size // _PIXELS)
        kernel = 2 * stride + 1
        self.stem = nn.Conv2d(channels, 24, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.blocks = nn.Sequential(Block(24, 24, 1), Block(24, 48, 2), Block(48, FEATURES, 2))
        self.out = nn.Linear(FEATURES, classes)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> tuple[Float[Tensor, "batch feature"], Float[Tensor, "batch class"]]:
        """Features and logits of pixels in [-1, 1]."""
        features = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return features, self.out(features)


class Block(nn.Module):
    """Conv-norm-ReLU twice around a skip connection (He et al. 2016, Fig. 2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(
        self, x: Float[Tensor, "batch in_c height width"]
    ) -> Float[Tensor, "batch out_c out_height out_width"]:
        """Add what two convolutions see to what came in."""
        h = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.skip(x) + self.norm_2(self.conv_2(h)))


def train_classifier(
    images: Images,
    labels: Labels | None,
    num_classes: int,
    seed: int,
    *,
    images_seen: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    tell: Callable[[int], object] = lambda images_seen: None,
) -> Classifier:
    """Learn to tell classes apart, or quarter turns where `labels` is None.

    A keyed tenth of the images, 5,000 at most, is held out to measure accuracy. Equal arguments
    give equal weights, on one kind of machine with the same number of threads. `images_seen` is
    six times all of them unless given, within 5,000 and 40,000. `tell` hears how many have been
    seen, after each batch.

    Raises:
        DataError: if the labels do not fit, or there are too few images.
    """
    _check(images, labels, num_classes)
    held_out, kept = _parted(len(images), seed)
    classes = _TURNS if labels is None else num_classes
    images_seen = images_seen or enough(len(images))
    training = _fit(images, labels, kept, classes, seed, images_seen, batch_size, device, tell)
    facts = {
        "image": list(images.shape[1:]),
        "classes": classes,
        "layer": "mean over places, before the logits",
        "resize": "none",
        "range": [-1, 1],
        "trained_to_tell": "quarter turns" if labels is None else "classes",
        "images": len(kept),
        "images_seen": images_seen,
        "batch_size": batch_size,
        "seed": seed,
        "held_out": len(held_out),
        "held_out_accuracy": _accuracy(training, images, labels, held_out),
    }
    return _classifier(training, facts)


def classification_accuracy_score(
    samples: Images,
    sampled: Labels,
    images: Images,
    labels: Labels,
    num_classes: int,
    seed: int,
    *,
    images_seen: int | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    tell: Callable[[int], object] = lambda images_seen: None,
) -> float:
    """Train the same classifier on samples, and test it on real images (Ravuri & Vinyals 2019).

    `sampled` are the classes that were asked for. Compare it with the accuracy of a classifier
    that was trained on as many real images.

    Raises:
        DataError: if the labels do not fit, or samples are of another shape than images.
    """
    _check(samples, sampled, num_classes)
    _check(images, labels, num_classes)
    if samples.shape[1:] != images.shape[1:]:
        raise DataError(f"samples of {samples.shape[1:]} cannot teach about {images.shape[1:]}")
    rows = np.arange(len(samples))
    images_seen = images_seen or enough(len(samples))
    network = _fit(samples, sampled, rows, num_classes, seed, images_seen, batch_size, device, tell)
    return _accuracy(network, images, labels, np.arange(len(images)))


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write weights and, last, what is to be known of them into a folder that exists."""
    _written(folder / WEIGHTS, _serialised(classifier.network))
    facts = {"name": classifier.name, "digest": classifier.digest, **classifier.facts}
    _written(folder / FACTS, json_text(add_digest(facts)).encode())


def load_classifier(folder: Path, device: str | torch.device = "cpu") -> Classifier:
    """Read what `save_classifier` wrote.

    Raises:
        RunError: if it is not there, or damaged.
    """
    from safetensors.torch import load

    try:
        facts, verified = read_report(folder / FACTS)
        weights = read_bytes(folder / WEIGHTS, _MOST_BYTES)
        name, digest = facts.pop("name"), facts.pop("digest")
        if _digest(weights) != digest:
            raise ValueError(f"{WEIGHTS} is not what {FACTS} says")
        channels, height, width = facts["image"]
        network = Network(channels, min(height, width), facts["classes"])
        network.load_state_dict(load(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as broken:
        raise RunError(f"{folder} holds no usable classifier ({broken}); delete it") from None
    return Classifier(_fixed(network.to(device)), name, digest, facts, verified)


def _classifier(network: "Network", facts: Mapping[str, Any]) -> Classifier:
    name = "turns" if facts["trained_to_tell"] == "quarter turns" else "classifier"
    return Classifier(_fixed(network), name, _digest(_serialised(network)), facts)


def _check(images: Images, labels: Labels | None, num_classes: int) -> None:
    if len(images) < 20:
        raise DataError(f"a classifier cannot learn from {len(images)} images; give it 20 or more")
    if labels is None:
        if images.shape[2] != images.shape[3]:
            raise DataError("quarter turns need square images; give labels, or square images")
        return
    if len(labels) != len(images):
        raise DataError(f"{len(labels)} labels do not fit {len(images)} images")
    if labels.min() < 0 or labels.max() >= num_classes or num_classes < 2:
        raise DataError(
            f"labels must lie in 0 .. {num_classes - 1}, of two classes or more; "
            f"these go from {labels.min()} to {labels.max()}"
        )


def enough(images: int) -> int:
    """How many images to learn from, where so many are given, unless it is said.

    98.3 % for 1,797 digits of 8 x 8, in seconds; a minute or two for MNIST's 60,000.
    """
    return min(40_000, max(5_000, 6 * images))


def _parted(length: int, seed: int) -> tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]:
    """Rows to hold out, and rows to learn from."""
    order = permuted(torch.arange(length), length, seed, torch.tensor(0), Stream.SPLIT).numpy()
    held_out = min(5_000, max(1, length // 10))
    return order[:held_out], np.sort(order[held_out:])


def _fit(
    images: Images,
    labels: Labels | None,
    rows: Int64[np.ndarray, " some"],
    classes: int,
    seed: int,
    images_seen: int,
    batch_size: int,
    device: str | torch.device,
    tell: Callable[[int], object] = lambda images_seen: None,
) -> "Network":
    """Adam with weight decay, and a learning rate that rises for a tenth and falls to 0."""
    with torch_seeded(seed, Stream.INITIALISATION):
        network = Network(images.shape[1], min(images.shape[2:]), classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.01)
    network.train()
    for seen in range(0, images_seen, batch_size):
        optimizer.param_groups[0]["lr"] = _HIGHEST_RATE * _rate(seen / images_seen)
        x, y = _batch(images, labels, rows, seed, seen, batch_size)
        with torch.enable_grad(), full_precision():
            _, logits = network(_ranged(x, network))
            loss = F.cross_entropy(logits, y.to(logits.device))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        tell(min(images_seen, seen + batch_size))
    return network


_HIGHEST_RATE = 4e-3


def _rate(progress: float) -> float:
    return min(1.0, 10 * progress + 0.01) * (1 + math.cos(math.pi * progress)) / 2


def _batch(
    images: Images,
    labels: Labels | None,
    rows: Int64[np.ndarray, " some"],
    seed: int,
    seen: int,
    batch_size: int,
) -> tuple[UInt8[Tensor, "batch channel height width"], Int64[Tensor, " batch"]]:
    """The next images, each moved by up to 1/14 of its size, with what is to be said of them."""
    index = torch.arange(seen, seen + batch_size)
    length = len(rows)
    place = permuted(index % length, length, seed, index // length, Stream.EVALUATION)
    row = rows[place.numpy()]
    x = _moved(torch.from_numpy(images[row]), seed, index)
    if labels is not None:
        return x, torch.from_numpy(labels[row])
    turns = words(seed, Stream.EVALUATION, index, 1, draw=1)[:, 0] % _TURNS
    return _turned(x, turns), turns


def _moved(x: UInt8[Tensor, "batch channel height width"], seed: int, index: Tensor) -> Tensor:
    """Shift each image by whole pixels, and repeat its edge."""
    height, width = x.shape[2:]
    most = torch.tensor([height // _PIXELS, width // _PIXELS])
    shift = (uniform(seed, Stream.EVALUATION, index, 2, draw=2) * (2 * most + 1)).long() - most
    down = (torch.arange(height) + shift[:, :1]).clamp(0, height - 1)
    right = (torch.arange(width) + shift[:, 1:]).clamp(0, width - 1)
    picture = torch.arange(len(x))[:, None, None]
    return x.movedim(1, 3)[picture, down[:, :, None], right[:, None, :]].movedim(3, 1)


def _turned(x: Tensor, turns: Int64[Tensor, " batch"]) -> Tensor:
    all_turns = torch.stack([x.rot90(k, (2, 3)) for k in range(_TURNS)])
    return all_turns[turns, torch.arange(len(x))]


def _accuracy(
    network: "Network", images: Images, labels: Labels | None, rows: Int64[np.ndarray, " some"]
) -> float:
    """Share of rows that are named rightly; without labels, of all their quarter turns."""
    _fixed(network)
    right, asked = 0, 0
    for part in np.array_split(rows, -(-len(rows) // 256)):
        x = torch.from_numpy(images[part])
        if labels is None:
            answer = torch.arange(_TURNS).repeat_interleave(len(x))
            x = _turned(x.repeat(_TURNS, 1, 1, 1), answer)
        else:
            answer = torch.from_numpy(labels[part])
        with torch.inference_mode(), full_precision():
            logits = network(_ranged(x, network))[1].cpu()
        right += int((logits.argmax(1) == answer).sum())
        asked += len(answer)
    return right / asked


def _ranged(pixels: Tensor, network: "Network") -> Float[Tensor, "batch channel height width"]:
    return pixels.to(network.out.weight.device).float() / 127.5 - 1


def _fixed(network: "Network") -> "Network":
    return network.requires_grad_(False).eval()


def _serialised(network: "Network") -> bytes:
    from safetensors.torch import save

    return save({name: tensor.cpu() for name, tensor in network.state_dict().items()})


def _digest(weights: bytes) -> str:
    return hashlib.sha256(weights).hexdigest()[:16]


def _written(file: Path, content: bytes) -> None:
    """Put a whole file in place, or none."""
    beside = file.with_name(f".{file.name}.{uuid4().hex}")
    beside.write_bytes(content)
    beside.replace(file)
