"""The Inception Score: are single images certain, and all together various?"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from rediffuse.evaluation.estimate import Estimate
from rediffuse.evaluation.jackknife import standard_error
from rediffuse.randomness import Stream, permuted


def inception_score(
    logits: Float[Tensor, "n class"],
    seed: int,
    *,
    splits: int = 10,
    group: Int64[Tensor, " n"] | None = None,
) -> Estimate:
    """exp E KL(p(y|x) || p(y)) per split (Salimans et al. 2016, Sec. 4), in a keyed order.

    Images are shuffled first, because those of one class often come together. With `splits` = 1 the
    order does not matter. Scores with another number of splits are not comparable.

    Raises:
        ValueError: if there are fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be split into {splits}")
    count = len(logits)
    rows = permuted(torch.arange(count), count, seed, torch.tensor(0), Stream.EVALUATION)
    ends = [k * count // splits for k in range(splits + 1)]
    parts = [rows[start:end] for start, end in pairwise(ends)]
    scores = torch.stack([_score(logits[part]) for part in parts])
    error = None if group is None else standard_error(_without(logits, parts, group))
    return Estimate(float(scores.mean()), float(scores.std(correction=0)), error)


def _without(
    logits: Float[Tensor, "n class"], parts: Sequence[Tensor], group: Int64[Tensor, " n"]
) -> list[float]:
    """The score without each group; a split of which nothing is left does not count."""
    found = []
    for number in range(int(group.max()) + 1):
        left = [part[group[part] != number] for part in parts]
        scores = [_score(logits[part]) for part in left if len(part)]
        found.append(float(torch.stack(scores).mean()))
    return found


def _score(logits: Float[Tensor, "n class"]) -> Float64[Tensor, ""]:
    """exp(H(y) - H(y|x)), which is the same and knows that 0·ln 0 = 0."""
    p = logits.double().softmax(dim=1)
    return (torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp()
