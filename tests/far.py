"""A device that is not there: tensors that say they are on `meta` and compute on the CPU.

What a GPU would have to be waited for raises `Waited`: reading a value, choosing by one, and copies
to or from memory that is not pinned. So a CPU can tell whether code keeps a GPU busy.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import rediffuse.tensors
import rediffuse.training.optimizers

FAR = torch.device("meta")
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class Waited(Exception):
    """The CPU asked for what only a device that has finished can tell."""


class Far(Tensor):
    """A tensor on the device that is not there; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls: type["Far"], near: Tensor) -> "Far":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
            requires_grad=False,
        )
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Catches what makes tensors on the device out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given, _ = tree_flatten((args, kwargs))
    from_far = any(isinstance(value, Far) for value in given)
    name, target = func._schema.name, kwargs.get("device")
    if from_far and name in _READS:
        raise Waited(name)
    if name == "aten::index" and any(
        isinstance(value, Tensor) and value.dtype == torch.bool for value in given[1:]
    ):
        raise Waited("an index of truth values")
    if name in ("aten::_to_copy", "aten::copy_"):
        _check_copy(name, args, kwargs)
    to_far = from_far if target is None else torch.device(target).type == FAR.type
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    made = func(*near_args, **near_kwargs)
    return tree_map(lambda v: Far(v) if isinstance(v, Tensor) and to_far else v, made)


def _check_copy(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    source, target = args[0], kwargs.get("device")
    if name == "aten::copy_":
        target, source = args[0].device, args[1]
    if target is None or torch.device(target).type == source.device.type:
        return
    waits_not = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
    goes_along = source.ndim == 0 or (waits_not and getattr(source, "pinned", False))
    if isinstance(source, Far) or not goes_along:
        raise Waited(f"{name} {tuple(source.shape)} from {source.device} to {target}")


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


@contextmanager
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the device for as long as this lasts."""

    def pinned(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy.pinned = True  # type: ignore[attr-defined]
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(rediffuse.tensors, "FETCHING", {FAR.type})
    monkeypatch.setattr(rediffuse.training.optimizers, "_FUSED", {FAR.type})
    supported = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(
        importlib.import_module("torch.optim.optimizer"), supported, lambda: [FAR.type]
    )
    with _Mode():
        yield
