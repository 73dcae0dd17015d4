"""From a name to an object: the folder is the registry.

An axis is a module or a package, and the positional arguments that all of its functions share:
`solver: {name: heun, churn: 0}` is `rediffuse.solvers.heun.heun` with `churn=0` bound. Nothing else
can be reached by name, so a configuration that came with somebody's run chooses among our parts and
is never code.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from rediffuse.config.schema import Config, Part
from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.grids import Grid
from rediffuse.process import Schedule
from rediffuse.solvers import Solver
from rediffuse.targets import Target, check_target
from rediffuse.words import did_you_mean


@dataclass(frozen=True)
class Axis:
    """Where the parts of one kind live, and the arguments that the code passes to each."""

    place: str
    positional: tuple[str, ...]
    given: tuple[str, ...] = ()  # keyword arguments that follow from elsewhere, never from the YAML


AXES = {
    "model": Axis(
        "rediffuse.networks",
        (),
        ("in_channels", "out_channels", "image_size", "num_classes", "null_class"),
    ),
    "norm": Axis("rediffuse.networks.norms", ("channels",)),
    "schedule": Axis("rediffuse.schedules", ()),
    "target": Axis("rediffuse.targets", ("at",)),
    "times": Axis("rediffuse.times", ("schedule", "u")),
    "weighting": Axis("rediffuse.weightings", ("at", "target")),
    "grid": Axis("rediffuse.grids", ("schedule", "steps")),
    "solver": Axis("rediffuse.solvers", ("denoise", "schedule", "x", "times", "noise")),
    "guidance": Axis("rediffuse.guidance", ("conditional", "unconditional")),
    "data": Axis("rediffuse.data.sources", ()),
    "optimizer": Axis("rediffuse.training.optimizers", ("groups", "learning_rate")),
    "rate": Axis("rediffuse.training.rates", ("images", "horizon_images")),
}


def bind(axis: str, part: Part, key: str, trusted: Sequence[str] | None = None) -> partial[Any]:
    """Find a part and bind its arguments; `key` is what messages call it (`sampling.solver`).

    `trusted` are the user's own packages that may be imported; None, for what the user typed
    himself, allows any.

    Raises:
        ConfigError: for a name that is not on the axis, or an argument that its function does not
        take.
    """
    function = _find(axis, part.name, key, trusted)
    return partial(function, **_checked(axis, function, part.arguments, key, trusted))


def names(axis: str) -> list[str]:
    """Every name on an axis, as a configuration writes it."""
    place = AXES[axis].place
    return sorted(
        name
        for module in _modules(place)
        for name in (_name(place, module, part) for part in _parts(axis, module))
    )


def schedule(config: Config, trusted: Sequence[str] | None = None) -> Schedule:
    """The schedule of a run."""
    built: Schedule = bind("schedule", config.schedule, "schedule", trusted)()
    return built


def network(
    config: Config,
    num_classes: int,
    trusted: Sequence[str] | None = None,
    learned_variance: bool = False,
) -> nn.Module:
    """The network of a run for its images; its first weights come from torch's generator."""
    image = config.data
    built: nn.Module = bind("model", config.model, "model", trusted)(
        in_channels=image.channels,
        out_channels=image.channels * (2 if learned_variance else 1),
        image_size=image.image_size,
        num_classes=num_classes,
        null_class=num_classes > 0 and config.training.label_dropout > 0,
    )
    return built


def denoiser(config: Config, net: nn.Module, trusted: Sequence[str] | None = None) -> Denoiser:
    """A network with the schedule and target it was, or will be, trained for."""
    return Denoiser(
        net,
        schedule(config, trusted),
        bind("target", config.target, "target", trusted),
        config.sigma_data,
    )


def rate(config: Config, trusted: Sequence[str] | None = None) -> Callable[[int], float]:
    """The learning rate as a share of its peak, by images seen; its horizon must be settled."""
    falling, horizon = bind("rate", config.rate, "rate", trusted), config.rate.horizon_images or 1
    return lambda images: float(falling(images, horizon))


def solver(part: Part, trusted: Sequence[str] | None = None) -> Solver:
    """A solver with its own arguments bound."""
    return bind("solver", part, "sampling.solver", trusted)


def grid(part: Part, trusted: Sequence[str] | None = None) -> Grid:
    """A grid with its own arguments bound."""
    return bind("grid", part, "sampling.grid", trusted)


def check(config: Config, trusted: Sequence[str] | None = None) -> None:
    """Refuse, before anything is built or written, what can be known to fail.

    Raises:
        ConfigError: naming the key, what was given and what would work.
    """
    of = partial(bind, trusted=trusted)
    clock = schedule(config, trusted)
    target: Target = of("target", config.target, "target")
    check_target(target, clock, config.target.name)
    _check_input_scale(config, clock)
    of("times", config.times, "times")(clock, torch.full((1,), 0.5, dtype=torch.float64))
    for axis in ("weighting", "optimizer"):
        of(axis, getattr(config, axis), axis)
    rate(config, trusted)(0)
    of("data", config.data.source, "data")
    solver(config.sampling.solver, trusted)
    of("guidance", config.sampling.guidance, "sampling.guidance")
    grid(config.sampling.grid, trusted)(clock, config.sampling.steps)
    with torch.device("meta"):
        network(config, num_classes=2, trusted=trusted)


def _check_input_scale(config: Config, clock: Schedule) -> None:
    loudest = clock(torch.tensor(clock.t_max, dtype=torch.float64))
    if config.sigma_data is None and loudest.alpha**2 + loudest.sigma**2 > 2:
        raise ConfigError(
            f"schedule '{config.schedule.name}' reaches σ = {loudest.sigma.item():g}, too loud for "
            "a network; set sigma_data to the images' standard deviation (0.5 for [-1, 1])"
        )


def _find(axis: str, name: str, key: str, trusted: Sequence[str] | None) -> Callable[..., Any]:
    if not all(word.isidentifier() and not word.startswith("_") for word in name.split(".")):
        raise ConfigError(f"{key}.name: {name!r} is not a name")
    place = AXES[axis].place
    for module in _modules(place):
        for part in _parts(axis, module):
            if _name(place, module, part) == name:
                return part
    return _users_own(axis, name, key, trusted)


def _users_own(axis: str, name: str, key: str, trusted: Sequence[str] | None) -> Callable[..., Any]:
    package, _, function = name.rpartition(".")
    known = names(axis)
    near, all_known = did_you_mean(name, known), ", ".join(known)
    missing = f"{key}: there is no {axis} '{name}'{near}; there are {all_known}"
    if not package:
        raise ConfigError(missing)
    if trusted is not None and package.split(".")[0] not in trusted:
        raise ConfigError(
            f"{missing}; for code of your own that you trust, add --trust {package.split('.')[0]}"
        )
    try:
        found = getattr(importlib.import_module(package), function)
    except (ImportError, AttributeError):
        raise ConfigError(missing) from None
    wanted = AXES[axis].positional
    if not inspect.isfunction(found) or _positional(found) != wanted:
        raise ConfigError(
            f"{missing}; one of your own is a function of ({', '.join([*wanted, '*', '...'])})"
        )
    return found


def _modules(place: str) -> Iterator[ModuleType]:
    home = importlib.import_module(place)
    yield home
    for found in pkgutil.iter_modules(getattr(home, "__path__", ())):
        yield importlib.import_module(f"{place}.{found.name}")


def _parts(axis: str, module: ModuleType) -> Iterator[Callable[..., Any]]:
    """What a module offers on an axis: its public functions, or networks, of the right shape."""
    for name, part in vars(module).items():
        if name.startswith("_") or getattr(part, "__module__", None) != module.__name__:
            continue
        is_network = inspect.isclass(part) and issubclass(part, nn.Module)
        if is_network if axis == "model" else inspect.isfunction(part):
            accepted = set(inspect.signature(part).parameters)
            if _positional(part) == AXES[axis].positional and accepted >= set(AXES[axis].given):
                yield part


def _positional(part: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


def _name(place: str, module: ModuleType, part: Callable[..., Any]) -> str:
    """`heun` for heun.heun, `discrete.linear` for a function of a file with another name."""
    inside = module.__name__.removeprefix(place).lstrip(".")
    return part.__name__ if part.__name__ == inside or not inside else f"{inside}.{part.__name__}"


def _checked(
    axis: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    key: str,
    trusted: Sequence[str] | None,
) -> dict[str, Any]:
    own = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in AXES[axis].given
    }
    checked = {}
    for name, value in arguments.items():
        full = f"{key}.{name}"
        if name not in own:
            takes = f"takes {', '.join(own)}" if own else "takes no arguments"
            raise ConfigError(
                f"{full}: no such key{did_you_mean(name, own)}; {key} '{function.__name__}' {takes}"
            )
        if name in AXES and isinstance(value, Mapping):
            checked[name] = bind(name, Part.model_validate(value), full, trusted)
        else:
            checked[name] = _typed(own[name].annotation, value, full)
    missing = [n for n, p in own.items() if p.default is p.empty and n not in checked]
    if missing:
        raise ConfigError(f"{key}.{missing[0]}: {key} '{function.__name__}' needs it")
    return checked


def _typed(annotation: Any, value: Any, key: str) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    try:
        return TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as refused:
        why = refused.errors()[0]["msg"].replace("Input should be", "expected")
        raise ConfigError(f"{key}: {why}, not {value!r}") from None
