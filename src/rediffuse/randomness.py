"""Every random number is a pure function of (seed, stream, global sample index).

Nothing here has a state, so nothing random is saved, skipped or replayed: resuming at image i
computes image i's numbers. Philox4x32-10 (Salmon et al. 2011) turns a 128-bit counter into 128
random bits; the key is (seed, stream), the counter is (index, block, draw). Integers only up to the
last step, so words are equal on every machine and device, uniforms too, and normals up to the last
digit of log, sin and cos.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor

from rediffuse.tensors import sent

RNG_SCHEME = 1
"""Raised if any number below ever changes; recorded in every run."""

_WORD = 0xFFFFFFFF


class Stream(IntEnum):
    """What a random number is for; numbered for ever, so that a new one moves no other."""

    ORDER = 0
    TIME = 1
    NOISE = 2
    AUGMENT = 3
    LABEL_DROP = 4
    DROPOUT = 5
    SAMPLING = 6
    EVALUATION = 7
    INITIALISATION = 8
    SPLIT = 9
    NOISE_EXTRAS = 10
    SELF_CONDITIONING = 11
    LIKELIHOOD = 12


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Turn `[..., 4]` counter words into `[..., 4]` random words (Salmon et al. 2011, Sec. 3.3).

    Words are 32 bits in int64, whose product wraps modulo 2^64 and so keeps all the bits needed.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ k0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def words(seed: int, stream: Stream, index: Tensor, count: int, draw: int = 0) -> Tensor:
    """`[n]` global sample indices to `[n, count]` random 32-bit words (int64, 0 .. 2^32 - 1).

    `draw` numbers repeated draws for the same sample: the steps of a stochastic solver, for
    instance.
    """
    blocks = torch.arange(-(-count // 4), device=index.device)
    shape = (len(index), len(blocks))
    counter = torch.stack(
        (
            (index & _WORD)[:, None].expand(shape),
            ((index >> 32) & _WORD)[:, None].expand(shape),
            blocks.expand(shape),
            blocks.new_full((), draw).expand(shape),
        ),
        dim=-1,
    )
    return philox(counter, (check_seed(seed), int(stream))).flatten(1)[:, :count]


def uniform(seed: int, stream: Stream, index: Tensor, count: int, draw: int = 0) -> Tensor:
    """`[n, count]` float64 numbers in [0, 1), with 53 random bits each."""
    high, low = words(seed, stream, index, 2 * count, draw).unflatten(1, (count, 2)).unbind(-1)
    # 26 + 27 bits in two halves that are exact in float64, so this is equal on every device.
    return (high >> 6).double() * 2**-26 + (low >> 5).double() * 2**-53


Normal = Callable[[int, Stream, Tensor, tuple[int, ...], int], Tensor]


def normal(
    seed: int, stream: Stream, index: Tensor, shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """`[n, *shape]` float32 standard normals by Box & Muller (1958); |z| stays below 6.8."""
    size = math.prod(shape)
    pairs = words(seed, stream, index, size + size % 2, draw).unflatten(1, (-1, 2)).float()
    radius = ((pairs[..., 0] + 0.5) * 2**-32).log().mul(-2).clamp(min=0).sqrt()
    angle = pairs[..., 1] * (2 * math.pi * 2**-32)
    both = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return both.flatten(1)[:, :size].unflatten(1, shape)


def permuted(position: Tensor, length: int, seed: int, epoch: Tensor, stream: Stream) -> Tensor:
    """Where each position of an epoch lands in a random order of [0, length), in O(1) memory.

    A Feistel network permutes the next power of four; values outside [0, length) walk on until they
    are inside (Black & Rogaway 2002, "cycle walking"), which keeps it a permutation. `epoch` is one
    for all positions, or one each.
    """
    half = max(_FEISTEL_HALF, -(-(length - 1).bit_length() // 2))
    mask = (1 << half) - 1
    keys = words(seed, stream, epoch.reshape(-1), _FEISTEL_ROUNDS).unbind(-1)
    image = position
    outside = torch.ones_like(position, dtype=torch.bool)
    while outside.any():
        left, right = image >> half, image & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        image = torch.where(outside, (left << half) | right, image)
        outside = image >= length
    return image


# Halves of 2 or 3 bits have too few round functions: orders of 4 images are not equally likely.
_FEISTEL_HALF, _FEISTEL_ROUNDS = 4, 12


def _mix(word: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser: every input bit reaches every output bit."""
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)


def order(index: Tensor, length: int, seed: int) -> Tensor:
    """The training set's row for each global image index; epoch i // length is shuffled anew."""
    return permuted(index % length, length, seed, index // length, Stream.ORDER)


class ImageNoise:
    """A solver's noise: draw k for image j is a function of (seed, j, k), whatever the batch.

    Call it with the state to be matched, `[n, ...]` for the n images it was made for. The first
    draw is the state that sampling starts from.
    """

    def __init__(self, seed: int, images: Tensor, stream: Stream = Stream.SAMPLING) -> None:
        self._seed, self._images, self._stream = seed, images, stream
        self._draws = 0

    def __call__(self, like: Tensor) -> Tensor:
        images = sent(self._images, like.device)
        drawn = normal(self._seed, self._stream, images, tuple(like.shape[1:]), self._draws)
        self._draws += 1
        return drawn.to(like.dtype)


@contextmanager
def torch_seeded(seed: int, stream: Stream, index: int = 0) -> Iterator[None]:
    """Key torch's own generators for what only they draw: first weights and dropout."""
    low, high = words(seed, stream, torch.tensor([index]), 2)[0].tolist()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((high << 31) ^ low)
        yield


def check_seed(seed: int) -> int:
    """Refuse a seed that is not one 32-bit word."""
    if not 0 <= seed <= _WORD:
        raise ValueError(f"a seed lies in 0 .. {_WORD}, not {seed}")
    return seed
