"""What an evaluation looks through: a fixed network that turns images into vectors."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor


class Seen(NamedTuple):
    """What a network says of some images, in float32 on the CPU.

    `logits` are those of the classes that it knows; `spatial` keeps where things are (sFID).
    """

    features: Float[Tensor, "batch feature"]
    logits: Float[Tensor, "batch class"] | None = None
    spatial: Float[Tensor, "batch position"] | None = None


@runtime_checkable
class Features(Protocol):
    """A fixed network, with all that a figure made through it depends on.

    Image k is seen in the same way whatever its neighbours are, up to rounding.
    """

    @property
    def name(self) -> str:
        """One word, which every figure carries: `fd_<name>`; `fid` is Inception's alone."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, 16 digits."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is done to pixels before the network, as plain data: resize, range, layer."""

    def __call__(self, pixels: UInt8[Tensor, "batch channel height width"]) -> Seen:
        """Look at uint8 images of 1 or 3 channels; they are never rounded, stretched or cut."""
