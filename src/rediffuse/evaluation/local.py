"""Any image model of `transformers` from a local directory: DINOv2, CLIP and others.

FD through DINOv2 is nearer to what people see than FID (Stein et al. 2023).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.evaluation.features import Seen
from rediffuse.evaluation.looking import as_rgb, full_precision

_CONFIGURATION = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class LocalFeatures:
    """The pooled output of a model, or its class token: `Features`."""

    network: nn.Module
    name: str
    digest: str
    pooled: bool
    size: int
    mean: tuple[float, float, float]
    sd: tuple[float, float, float]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is done to pixels before the network."""
        return {
            "model": type(self.network).__name__,
            "resize": f"bicubic with antialias, the whole image to {self.size} x {self.size}",
            "range": {"mean": list(self.mean), "sd": list(self.sd)},
            "grey": "repeated to three channels",
            "layer": "pooled output" if self.pooled else "class token",
        }

    def __call__(self, pixels: UInt8[Tensor, "batch channel height width"]) -> Seen:
        x = as_rgb(pixels).to(next(self.network.parameters()).device).float()
        with torch.inference_mode(), full_precision():
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True) / 255
            mean, sd = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.sd))
            features = _features(self.network, (x - mean) / sd, self.pooled)
        return Seen(features.float().cpu())


def local_features(directory: Path, device: str | torch.device = "cpu") -> LocalFeatures:
    """Load a model that was saved with `save_pretrained`: safetensors only, and no code of its own.

    Its name is the directory's, in small letters and digits.

    Raises:
        ConfigError: if transformers is not installed, or the directory holds no such model.
    """
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError:
        raise ConfigError(
            "features from a directory need transformers: pip install 'rediffuse[features]'"
        ) from None
    files = _files(directory)
    safely: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        network, loading = AutoModel.from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, **safely
        )
        pooled = _pooled(loading["missing_keys"])
        processor = AutoImageProcessor.from_pretrained(directory, **safely)
        size, mean, sd = _size(processor), processor.image_mean, processor.image_std
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as broken:
        reason = str(broken).strip().splitlines()[0]
        raise ConfigError(f"{directory} holds no image model of transformers: {reason}") from None
    network = network.to(device).float().requires_grad_(False).eval()
    return LocalFeatures(
        network, _name(directory), _digest(files), pooled, size, tuple(mean), tuple(sd)
    )


def _files(directory: Path) -> list[Path]:
    """All files that the features depend on, by name."""
    weights = sorted(directory.glob("*.safetensors"))
    missing = [name for name in _CONFIGURATION if not (directory / name).is_file()]
    if missing or not weights:
        raise ConfigError(
            f"{directory} lacks {' and '.join(missing or ['*.safetensors'])}; download a model "
            "there, e.g. `hf download facebook/dinov2-base --local-dir dinov2`"
        )
    return [directory / name for name in _CONFIGURATION] + weights


def _digest(files: list[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _name(directory: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", directory.resolve().name.lower()).strip("_")
    if name in ("", "inception", "classifier", "turns", "colour"):
        raise ConfigError(f"{directory}: call the directory after its model, e.g. dinov2")
    return name


def _size(processor: Any) -> int:
    """The side of the square that the model was made for; nothing is cut to get there."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    side = size.get("height") or size.get("shortest_edge")
    if not side:
        raise ValueError("its preprocessor_config.json names no size")
    return int(side)


def _pooled(missing: Iterable[str]) -> bool:
    """Whether the pooling layer was trained: what the files lack would be random numbers."""
    others = [name for name in missing if not name.startswith("pooler.")]
    if others:
        raise ValueError(f"its files lack {len(others)} of its weights, e.g. {others[0]}")
    return not missing


def _features(network: Any, x: Tensor, pooled: bool) -> Tensor:
    """Pooled output, or the first token; of the images alone where a model reads texts too."""
    see = getattr(network, "get_image_features", network)
    seen = see(pixel_values=x)
    output = getattr(seen, "pooler_output", None) if pooled else None
    return (seen.last_hidden_state[:, 0] if output is None else output).flatten(1)
