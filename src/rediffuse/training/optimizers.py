"""Optimizers, and which weights decay."""

from typing import Any

import torch
from torch import nn

from rediffuse.ranges import BelowOne, NonNegative, Positive

Groups = list[dict[str, Any]]


def adam(
    groups: Groups,
    learning_rate: float,
    *,
    beta_1: BelowOne = 0.9,
    beta_2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
) -> torch.optim.Optimizer:
    """Kingma & Ba 2015; `weight_decay` is L2 regularisation here."""
    given = _decaying(groups, weight_decay)
    return torch.optim.Adam(
        given, lr=learning_rate, betas=(beta_1, beta_2), eps=eps, fused=_fused(groups)
    )


def adamw(
    groups: Groups,
    learning_rate: float,
    *,
    beta_1: BelowOne = 0.9,
    beta_2: BelowOne = 0.999,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.01,
) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019: weight decay apart from the gradient."""
    given = _decaying(groups, weight_decay)
    return torch.optim.AdamW(
        given, lr=learning_rate, betas=(beta_1, beta_2), eps=eps, fused=_fused(groups)
    )


def parameter_groups(network: nn.Module, learned: nn.Module | None = None) -> Groups:
    """Two groups: weights of convolutions and linear maps, which decay, and all else.

    Biases, norms and embeddings are spared: pulling a scale or a shift to 0 only costs accuracy.
    So is what learns beside the network, a schedule or a weighting.
    """
    decays = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    parameters = [*network.parameters(), *(learned.parameters() if learned is not None else ())]
    return [
        {"params": [p for p in parameters if id(p) in decays], "decays": True},
        {"params": [p for p in parameters if id(p) not in decays], "decays": False},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write the rate into every group; it is computed for each step, never restored."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it takes the attributes `found_inf` and `grad_scale` of `torch.amp.GradScaler`."""
    takes = getattr(optimizer, "_step_supports_amp_scaling", False)
    return takes and all(group.get("fused") for group in optimizer.param_groups)


def _decaying(groups: Groups, weight_decay: float) -> Groups:
    return [{**group, "weight_decay": weight_decay if group["decays"] else 0.0} for group in groups]


def _fused(groups: Groups) -> bool:
    return all(p.device.type in _FUSED for group in groups for p in group["params"])


_FUSED = {"cpu", "cuda"}
