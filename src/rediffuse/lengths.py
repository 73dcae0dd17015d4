"""How long a run trains, and the horizon over which its learning rate falls."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from math import ceil
from typing import Any

from rediffuse import build
from rediffuse.config.schema import Config
from rediffuse.errors import ConfigError


def planned_images(config: Config, per_epoch: int) -> int:
    """The number of images that the run is planned to train on."""
    if config.training.images is not None:
        return config.training.images
    assert config.training.epochs is not None
    return ceil(config.training.epochs * per_epoch)


def with_horizon(
    config: Config,
    per_epoch: int,
    trusted: Sequence[str] | None = None,
    before: Config | None = None,
) -> Config:
    """Set `rate.horizon_images` and whether it follows the plan; `before` is the resumed run's.

    A horizon that nobody typed is the planned length, and grows when the plan does. A run that was
    recorded without that fact follows its plan if its horizon equals the plan.
    """
    rate, planned = config.rate, planned_images(config, per_epoch)
    horizon, follows = rate.horizon_images, rate.horizon_follows_plan
    if follows is None:
        was_planned = before is not None and horizon == planned_images(before, per_epoch)
        follows = horizon is None or was_planned
    if horizon is None or (follows and before is None):
        horizon = planned
    # Where the learning rate does not depend on the horizon, nothing changes.
    if follows and planned > horizon and _differ(config, horizon, planned, trusted):
        horizon = planned
    return _with_rate(config, horizon_images=horizon, horizon_follows_plan=follows)


def rate_is_0_from(
    config: Config, images_seen: int, planned: int, trusted: Sequence[str] | None = None
) -> int | None:
    """The images seen from which on the learning rate is 0 in at least the last two steps."""
    rate, size = build.rate(config, trusted), config.training.batch_size
    ends = range(images_seen + size, planned + size, size)
    zero = list(takewhile(lambda images: rate(images) == 0, reversed(ends)))
    return zero[-1] - size if len(zero) > 1 else None  # a rate may end at 0 with the last step


def check_rate(
    config: Config,
    images_seen: int,
    planned: int,
    say: Callable[[str], None],
    trusted: Sequence[str] | None = None,
    *,
    refuse: bool = True,
) -> None:
    """Say from where on the learning rate is 0; `refuse` a length in which it is 0 throughout.

    Raises:
        ConfigError: if no step that is left would change the weights.
    """
    start = rate_is_0_from(config, images_seen, planned, trusted)
    if start is None:
        return
    told = (
        f"the learning rate is 0 from {start:,} to {planned:,} images "
        f"(rate={config.rate.name}, rate.horizon_images={config.rate.horizon_images})"
    )
    if start == images_seen and refuse:
        raise ConfigError(
            f"{told}, so that training would change no weight; set rate.horizon_images={planned}"
        )
    say(told)


def command(verb: str, run_id: str, config: Config) -> str:
    """A command about a run as it is typed, with `--trust` for parts of the user's own."""
    trust = "".join(f" --trust {package}" for package in build.own_packages(config))
    return f"rediffuse {verb} {run_id}{trust}"


def longer(run_id: str, config: Config) -> str:
    """The command that trains a finished run for as long again."""
    training, rate = config.training, config.rate
    length = f"images={2 * (training.images or 0)}"
    if training.epochs is not None:
        length = f"epochs={2 * training.epochs:g}"
    typed = None if rate.horizon_follows_plan else rate.horizon_images
    # A rate that has fallen to the end of a typed horizon would stay there.
    farther = f" rate.horizon_images={2 * typed}" if typed and rate.name != "constant" else ""
    return f"{command('resume', run_id, config)} training.{length}{farther}"


def next_command(
    run_id: str, config: Config, images_seen: int, planned: int, checks_since_best: int
) -> str:
    """The command that goes on with a run that has ended, at its planned length or before."""
    going_on = command("resume", run_id, config)
    if images_seen >= planned:
        going_on = longer(run_id, config)
    patience = config.training.early_stopping_checks
    if patience is None or checks_since_best < patience:
        return going_on
    return f"{going_on} training.early_stopping_checks={checks_since_best + patience}"


def _differ(config: Config, one: int, other: int, trusted: Sequence[str] | None) -> bool:
    """Whether the learning rate differs between two horizons, at 1,000 points of the longer one."""
    first, second = (
        build.rate(_with_rate(config, horizon_images=horizon), trusted) for horizon in (one, other)
    )
    longest = max(one, other)
    return any(first(i) != second(i) for i in range(0, longest + 1, max(1, longest // 1000)))


def _with_rate(config: Config, **update: Any) -> Config:
    return config.model_copy(update={"rate": config.rate.model_copy(update=update)})
