"""Inception-v3 as the FID paper used it: TensorFlow's weights of 2015, by torch-fidelity.

`fid`, `is` and `kid` without another word are figures through this network alone.
"""

import hashlib
import io
import shutil
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from rediffuse.errors import ConfigError
from rediffuse.evaluation.features import Seen
from rediffuse.evaluation.looking import as_rgb, full_precision
from rediffuse.reading import read_bytes

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
_BYTES = 95_628_359
_SPATIAL_CHANNELS = 7
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Inception:
    """`Features`: 2048 (FID, KID), 1008 logits without bias (IS), 7 · 17 · 17 places (sFID)."""

    network: nn.Module
    digest: str
    name: str = "inception"

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is done to pixels, as in the FID paper's own graph."""
        return {
            "resize": "TensorFlow 1 bilinear to 299 x 299, without antialias, never rounded",
            "range": "(x - 128) / 128",
            "grey": "repeated to three channels",
            "layer": "pool_3 (2048); logits without bias (1008); mixed_6/conv, 7 channels (2023)",
        }

    def __call__(self, pixels: UInt8[Tensor, "batch channel height width"]) -> Seen:
        x = as_rgb(pixels).to(next(self.network.parameters()).device)
        with torch.inference_mode(), full_precision():
            (features, logits), spatial = _with_spatial(self.network, x)
        return Seen(features.cpu(), logits.cpu(), spatial.cpu())


def inception(
    weights: Path, device: str | torch.device = "cpu", *, sha256: str = SHA256
) -> Inception:
    """Load the network from a file, whose content is checked before anything is made of it.

    Raises:
        ConfigError: if the file is missing, or is another one.
    """
    content = _read(weights)
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ConfigError(
            f"{weights} is not {FILE}: its SHA-256 begins with {found[:8]}, not {sha256[:8]}; "
            f"delete it, and get the file again from {ADDRESS}"
        )
    network = _network(torch.load(io.BytesIO(content), weights_only=True))
    return Inception(network.to(device), sha256[:16])


def find_weights(
    folder: Path, *, address: str = ADDRESS, sha256: str = SHA256, download: bool = True
) -> Path:
    """Return the file of weights in `folder`, downloading it once if it is not there.

    Raises:
        ConfigError: if it is not there and cannot be downloaded, saying which file goes where.
    """
    file = folder / FILE
    if file.is_file():
        return file
    why = "downloads are off"
    if download:
        try:
            _download(address, file, sha256)
            return file
        except (OSError, ValueError) as failed:
            why = f"the download failed: {failed}"
    raise ConfigError(
        f"fid, kid and is need Inception's weights, and {why}; get {address} where there is a "
        f"network and put it at {file}; figures through other features do not need it"
    )


def _read(weights: Path) -> bytes:
    try:
        return read_bytes(weights, 2 * _BYTES, links=True)
    except (OSError, ValueError) as failed:
        raise ConfigError(
            f"{weights} cannot be read ({failed}); it should be {FILE}, from {ADDRESS}"
        ) from None


def _download(address: str, file: Path, sha256: str) -> None:
    """Fetch a file whole and right, or leave none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as source, part.open("wb") as out:
            shutil.copyfileobj(source, out)
        with part.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"its SHA-256 begins with {found[:8]}, not {sha256[:8]}")
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink()


def _network(state: dict[str, Tensor]) -> nn.Module:
    """Build torch-fidelity's network; it is handed weights that were read as data, written anew."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    again = io.BytesIO()
    torch.save(state, again)
    again.seek(0)
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=again
    )


def _with_spatial(network: Any, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Run the network, and keep the first 7 channels of mixed_6/conv (Nash et al. 2021).

    TensorFlow's mixed_6 is Mixed_6d here, and its conv the 1x1 branch.
    """
    kept: list[Tensor] = []
    branch = network.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda _, __, out: kept.append(out[:, :_SPATIAL_CHANNELS]))
    try:
        return network(x), kept[0].flatten(1)
    finally:
        hook.remove()
