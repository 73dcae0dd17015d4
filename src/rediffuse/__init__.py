"""Train, sample, evaluate and reproduce diffusion models for images: one run id is enough.

`train`, `load`, `sample`, `generate_samples` and `Denoiser` are here; every part of an axis is a
plain function in its own module, such as `rediffuse.solvers.heun.heun`. They are imported when they
are first used, so that `import rediffuse` itself takes no time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rediffuse.api import generate_samples, load, sample, train
    from rediffuse.denoiser import Denoiser
    from rediffuse.models import Model

__all__ = ["Denoiser", "Model", "generate_samples", "load", "sample", "train"]

_PLACES = {
    "Denoiser": "rediffuse.denoiser",
    "Model": "rediffuse.models",
    "generate_samples": "rediffuse.api",
    "load": "rediffuse.api",
    "sample": "rediffuse.api",
    "train": "rediffuse.api",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rediffuse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
