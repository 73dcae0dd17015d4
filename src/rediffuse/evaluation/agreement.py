"""Do samples show what was asked for?"""

from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor


class Agreement(NamedTuple):
    """`share` of samples that a classifier names as asked, `confidence` its mean p(asked)."""

    share: float
    confidence: float


def class_agreement(logits: Float[Tensor, "n class"], asked: Int64[Tensor, " n"]) -> Agreement:
    """Compare the classes that a classifier sees with those that were asked for."""
    p = logits.double().softmax(dim=1)
    share = (logits.argmax(1) == asked).double().mean()
    return Agreement(float(share), float(p.gather(1, asked[:, None]).mean()))
