"""The loop that a reader looks for."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from rediffuse.data.batches import Batch
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe, train_step

Hook = Callable[[TrainState, dict[str, Tensor]], None]


DONE = "done"


class Stop(Exception):
    """Raised by a hook to end training after this step, with the reason that people read."""


def train(
    recipe: Recipe,
    state: TrainState,
    steps: Iterator[Sequence[Batch]],
    hooks: Sequence[Hook],
    images: int,
) -> str:
    """Train until `images` images have been seen, or a hook stops it; return why it ended."""
    if state.images_seen >= images:
        return DONE
    for batches in steps:
        metrics = train_step(recipe, state, batches)
        try:
            for hook in hooks:
                hook(state, metrics)
        except Stop as stop:
            return str(stop)
        if state.images_seen >= images:
            break
    return DONE


def every(images: int, batch_size: int, hook: Hook) -> Hook:
    """Call a hook whenever the images seen pass a multiple of `images`."""

    def sometimes(state: TrainState, metrics: dict[str, Tensor]) -> None:
        if state.images_seen // images > (state.images_seen - batch_size) // images:
            hook(state, metrics)

    return sometimes
