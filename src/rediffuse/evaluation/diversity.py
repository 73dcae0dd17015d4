"""How much samples differ from one another, beside as many real images."""

import torch
from jaxtyping import Float
from torch import Tensor

from rediffuse.evaluation.neighbours import Vectors, nearest_others


def vendi(vectors: Vectors, centre: Float[Tensor, "*shape"]) -> float:
    """The Vendi score: how many different images there are, in effect (Friedman & Dieng 2023).

    It is the exponential of the entropy of the eigenvalues of K/n, where K holds the cosines of the
    vectors as seen from `centre`: 1 for n equal ones, n for n orthogonal ones. It grows with n.
    """
    x = vectors.flatten(1).double() - centre.flatten().double()
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    small = x.T @ x if x.shape[1] < len(x) else x @ x.T  # the same eigenvalues, but for zeros
    eigenvalues = torch.linalg.eigvalsh(small / len(x)).clamp(min=0)
    return float(torch.special.entr(eigenvalues).sum().exp())


def repeats(samples: Vectors, real: Vectors, level: float = 0.01) -> float:
    """The share of samples nearer to another sample than all but `level` of real images to another.

    There must be as many of both, since more images lie nearer to one another. For real images it
    is about `level`; a model that draws a few images again and again comes to 1.
    """
    assert len(samples) == len(real)
    usual, drawn = (nearest_others(x).distances[:, 0] for x in (real, samples))
    return float((drawn < usual.quantile(level)).double().mean())
