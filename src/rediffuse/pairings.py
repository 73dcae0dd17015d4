"""Which noise each training image meets: by default, its own.

Noise and image may be paired so that paths cross less, which keeps both marginals and is easier to
learn. `noise(k)` gives every image's k-th standard normal draw, keyed, so pairs do not depend on
how a batch is cut into pieces.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rediffuse.errors import ConfigError
from rediffuse.ranges import Count

Pairing = Callable[[Tensor, Callable[[int], Tensor]], Tensor]


def independent(x_0: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
    """Give each image its own noise (Ho et al. 2020, Alg. 1)."""
    return noise(0)


def immiscible(x_0: Tensor, noise: Callable[[int], Tensor], *, candidates: Count = 4) -> Tensor:
    """Give each image the nearest of a few draws (Li et al. 2025, Improved Immiscible Diffusion).

    Images stay independent of one another. What is kept leans towards the image, so that the noise
    as a whole is not quite normal any more; to assign it within a batch (Li et al. 2024, Immiscible
    Diffusion) is `optimal_transport`, which keeps it normal.

    Raises:
        ConfigError: if there is nothing to choose from.
    """
    if candidates < 1:
        raise ConfigError(f"pairing.candidates: expected 1 or more, not {candidates}")
    drawn = torch.stack([noise(k) for k in range(candidates)])
    nearest = (drawn - x_0).flatten(2).square().sum(dim=2).argmin(dim=0)
    return drawn[nearest, torch.arange(len(x_0), device=x_0.device)]


def optimal_transport(
    x_0: Tensor, noise: Callable[[int], Tensor], *, block_images: Count = 64
) -> Tensor:
    """Share out the noise of each block of images so that squared distances add up to the least.

    Mini-batch optimal transport (Tong et al. 2024; Pooladian et al. 2023) over blocks of
    consecutive training images, which micro-batches and ranks do not cut. Classes share a block, so
    that the noise of one class is not quite normal: meant for models without classes.

    Raises:
        ConfigError: if a micro-batch does not hold whole blocks.
    """
    from scipy.optimize import linear_sum_assignment

    if block_images < 1 or len(x_0) % block_images:
        raise ConfigError(
            f"pairing.block_images={block_images} must divide the {len(x_0)} images of a "
            "micro-batch (training.batch_size / training.accumulation / ranks)"
        )
    drawn = noise(0).split(block_images)
    return torch.cat(
        [
            eps[linear_sum_assignment(_distances(images, eps))[1]]
            for images, eps in zip(x_0.split(block_images), drawn, strict=True)
        ]
    )


def _distances(x_0: Tensor, eps: Tensor) -> np.ndarray:
    """Half the squared distances, less the norms, which no assignment changes."""
    return -(x_0.flatten(1).double() @ eps.flatten(1).double().T).cpu().numpy()
