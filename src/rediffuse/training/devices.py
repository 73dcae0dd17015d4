"""Which device, how many of them, and how exact."""

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rediffuse.errors import ConfigError, RediffuseError, TrainingError
from rediffuse.processes import announced

Value = TypeVar("Value")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Devices:
    """This process' device, and its place among the processes that work together."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum_over_ranks(self, tensors: list[Tensor]) -> None:
        """Add tensors up over all ranks, in place, in one message for each precision."""
        if self.ranks == 1:
            return
        for dtype in {tensor.dtype: None for tensor in tensors}:
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten().to(self.device) for tensor in alike])
            torch.distributed.all_reduce(flat)
            sizes = [tensor.numel() for tensor in alike]
            for tensor, part in zip(alike, flat.split(sizes), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, shares: Tensor) -> Tensor:
        """Put every rank's equal share together, in the order of ranks, on each of them."""
        if self.ranks == 1:
            return shares
        sent = shares.to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, sent)
        return torch.cat(parts).to(shares.device)

    def everyones(self, mine: Value) -> list[Value]:
        """What every rank has, in the order of ranks, on each of them."""
        box = [mine] * self.ranks
        if self.ranks > 1:
            torch.distributed.all_gather_object(box, mine)
        return box

    @contextmanager
    def main_talks(self) -> Iterator[None]:
        """Let nobody but the first rank print; what the others raise is heard."""
        if self.is_main:
            yield
            return
        with open(os.devnull, "w") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
            yield

    def on_main(self, act: Callable[[], Value]) -> Value:
        """Call `act` in the first process alone; return its result, or raise its error, in each.

        Raises:
            TrainingError: in the other processes, if `act` raised what is no RediffuseError.
        """
        if self.ranks == 1:
            return act()
        box: list[Any] = [None, None]  # the result, the error
        raised: BaseException | None = None
        if self.is_main:
            try:
                box[0] = act()
            except BaseException as failed:
                raised = failed
                known = isinstance(failed, RediffuseError)
                box[1] = failed if known else TrainingError(f"process 0 failed: {failed!r}")
        torch.distributed.broadcast_object_list(box, src=0)
        if error := raised or box[1]:
            raise error
        result: Value = box[0]
        return result

    def first_difference(self, mine: Mapping[str, Any]) -> str | None:
        """Name the first process whose facts differ from those of process 0, and the facts."""
        first, *others = self.everyones(mine)
        for rank, theirs in enumerate(others, 1):
            if names := [name for name in first if theirs.get(name) != first[name]]:
                return f"process {rank} differs from process 0 in {', '.join(names)}"
        return None


class Ballot:
    """Numbers that ranks tell one another between CPUs, so that no device is waited for.

    Every rank makes it, and calls it, at the same points.
    """

    def __init__(self, devices: Devices) -> None:
        several = devices.ranks > 1
        self._group: Any = torch.distributed.new_group(backend="gloo") if several else None
        self._is_main = devices.is_main
        self._under_way: tuple[Any, Tensor] | None = None

    def cast(self, number: int) -> int:
        """The largest number of all ranks' call before, which has had a step's time to travel.

        Of a single rank it is the number of now.
        """
        if self._group is None:
            return number
        before, self._under_way = self._under_way, self._largest(number)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def of_the_first(self, number: int) -> int:
        """The first rank's number, once all are here; one's own if somebody has died."""
        if self._group is None:
            return number
        try:
            work, told = self._largest(number if self._is_main else -1)
            work.wait()
        except RuntimeError:
            return number
        return int(told)

    def _largest(self, number: int) -> tuple[Any, Tensor]:
        told = torch.tensor([number])
        most = torch.distributed.ReduceOp.MAX
        return torch.distributed.all_reduce(told, most, self._group, async_op=True), told


def choose(device: str = "auto") -> Devices:
    """Take the best device there is, or the one asked for; join `torchrun`'s other processes.

    Raises:
        ConfigError: if the device is not there, or the processes that were announced cannot join.
    """
    rank, ranks = announced()
    if ranks > 1:
        return _joined(device, rank, ranks)
    if device == "auto":
        return Devices(torch.device(_best()))
    return Devices(_checked(device))


def _joined(device: str, rank: int, ranks: int) -> Devices:
    """Join the other processes, on this one's GPU or on the CPU."""
    asked = device
    if device == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked not in ("cuda", "cpu"):
        raise ConfigError(
            f"device={device}: {ranks} processes work together with device=cuda, each on a GPU of "
            "its own, or with device=cpu"
        )
    chosen = _checked(asked)
    if chosen.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        chosen = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(chosen)
    if not torch.distributed.is_initialized():
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
            torch.distributed.all_reduce(torch.zeros((), device=chosen))  # NCCL connects here
        except (RuntimeError, ValueError) as failed:
            why = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:200]
            raise ConfigError(
                f"{ranks} processes cannot work together at {address}: {why}"
            ) from None
    return Devices(chosen, rank, ranks)


def _checked(device: str) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: if it is not there.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"device={device}: not on this machine; device=auto takes {_best()} here"
        ) from None
    return chosen


@cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether this device convolves clearly faster in bfloat16 than in float32.

    A CPU is tried for some milliseconds: with units for bfloat16 (AMX, AVX-512 BF16) it is two to
    eight times faster, without them up to a hundred times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    seconds = {dtype: _seconds_to_convolve(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def has_bfloat16_units() -> bool:
    """Whether this CPU has units for bfloat16 (AVX-512 BF16, AMX, ARM's BF16), as Linux lists them.

    It is a fact of the processor: unlike `bfloat16_pays` it is the same at every call.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(_FLAGS))
    return not _BFLOAT16_FLAGS.isdisjoint(next(flags, ()))


_FLAGS = ("flags", "Features")  # as x86 and ARM call them
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@torch.inference_mode()
def _seconds_to_convolve(dtype: torch.dtype) -> float:
    x, weight = torch.ones(8, 64, 16, 16, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
    taken = []
    for _ in range(4):  # the first one prepares
        start = time.perf_counter()
        torch.nn.functional.conv2d(x, weight, padding=1)
        taken.append(time.perf_counter() - start)
    return min(taken)


def set_determinism(
    mode: str, device: torch.device, threads: int | None, *, compiled: bool = False
) -> str:
    """Switch torch to `exact` or `fast` kernels and return which; `auto` is exact on a CPU.

    Order, times and noise do not depend on it. `exact` gives equal bits on one kind of machine with
    the same number of threads; `fast` leaves the choice of kernels to torch.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if mode == "auto":
        mode = "exact" if device.type == "cpu" else "fast"
    exact = mode == "exact"
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # "error", never "warn": attention's backward stays random where it only warns.
    torch.set_deterministic_debug_mode("error" if exact else "default")
    if compiled:  # the same for the compiler, whose import alone takes seconds
        torch.use_deterministic_algorithms(exact)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not exact
    torch.backends.cudnn.deterministic = exact
    return mode


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, instead of asking for fresh pages.

    Fresh pages are filled with zeros by the kernel: 2 to 12 % of a step on a CPU. Other C libraries
    are left alone.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # Bytes of one tensor; glibc before 2.35 takes no more than 32 MiB, or says 0.
        if mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25):
            mallopt(_M_TRIM_THRESHOLD, -1)  # never


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
