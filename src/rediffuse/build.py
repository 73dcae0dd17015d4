"""From a name to an object: the folder is the registry.

An axis is a module or a package, and the positional arguments that all of its functions share:
`solver: {name: heun, churn: 0}` is `rediffuse.solvers.heun.heun` with `churn=0` bound. A part that
learns is made by a function without positional arguments that returns a module, whose `forward`
has them. Nothing else can be reached by name, so a configuration that came with somebody's run
chooses among our parts and is never code.
"""

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.overrides import TorchFunctionMode

from rediffuse.config.schema import Config, Part
from rediffuse.data.pixels import pixel_range
from rediffuse.denoiser import Denoiser
from rediffuse.errors import ConfigError
from rediffuse.grids import Grid
from rediffuse.losses import Objective
from rediffuse.process import Schedule
from rediffuse.ranges import Range
from rediffuse.solvers import Solver
from rediffuse.words import did_you_mean


@dataclass(frozen=True)
class Axis:
    """Where the parts of one kind live, and the arguments that the code passes to each."""

    place: str
    positional: tuple[str, ...]
    given: tuple[str, ...] = ()  # keyword arguments that follow from elsewhere, never from the YAML
    offered: tuple[str, ...] = ()  # the same, for those parts that take them


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
    "weighting": Axis("rediffuse.weightings", ("schedule", "t", "target")),
    "objective": Axis(
        "rediffuse.losses", ("denoiser", "weighting", "noised"), offered=("low", "high")
    ),
    "pairing": Axis("rediffuse.pairings", ("x_0", "noise")),
    "grid": Axis("rediffuse.grids", ("schedule", "steps")),
    "solver": Axis("rediffuse.solvers", ("denoise", "schedule", "x", "times", "noise")),
    "guidance": Axis("rediffuse.guidance", ("sides", "schedule")),
    "threshold": Axis("rediffuse.guidance", ("denoise", "schedule"), ("low", "high")),
    "data": Axis("rediffuse.data.sources", ()),
    "optimizer": Axis("rediffuse.training.optimizers", ("groups", "learning_rate")),
    "rate": Axis("rediffuse.training.rates", ("images", "horizon_images")),
}


def bind(axis: str, part: Part, key: str, trusted: Sequence[str] | None = None) -> Any:
    """Find a part and bind its arguments; `key` is what messages call it (`sampling.solver`).

    A function comes back as a `partial`, a part that learns as a new module.

    `trusted` are the user's own packages that may be imported; None, for what the user typed
    himself, allows any.

    Raises:
        ConfigError: for a name that is not on the axis, or an argument that its function does not
        take.
    """
    function = find(axis, part.name, key, trusted)
    bound = partial(function, **_checked(axis, function, part.arguments, key, trusted))
    return bound() if _learner(function) and axis not in ("schedule", "model") else bound


def names(axis: str) -> list[str]:
    """Every name on an axis, as a configuration writes it."""
    place = AXES[axis].place
    return sorted(
        name
        for module in _modules(place)
        for name in (_name(place, module, part) for part in _parts(axis, module))
    )


def own_packages(config: Config) -> list[str]:
    """The packages of the user's own that a run's parts are in, which `--trust` names."""
    return list(dict.fromkeys(_own_packages(config.model_dump())))


def _own_packages(tree: Mapping[str, Any]) -> Iterator[str]:
    for axis, part in tree.items():
        if not isinstance(part, Mapping):
            continue
        name = part.get("name")
        if axis in AXES and isinstance(name, str) and name not in names(axis):
            package, _, function = name.partition(".")
            if function and package.isidentifier():
                yield package
        yield from _own_packages(part)


def schedule(config: Config, trusted: Sequence[str] | None = None) -> Schedule:
    """The schedule of a run."""
    built: Schedule = bind("schedule", config.schedule, "schedule", trusted)()
    return built


def network(config: Config, num_classes: int, trusted: Sequence[str] | None = None) -> nn.Module:
    """The network of a run for its images; its first weights come from torch's generator."""
    image = config.data
    built: nn.Module = bind("model", config.model, "model", trusted)(
        in_channels=image.channels * (2 if config.training.self_conditioning else 1),
        out_channels=image.channels * (2 if config.learned_variance else 1),
        image_size=image.image_size,
        num_classes=num_classes,
        null_class=num_classes > 0 and config.training.label_dropout > 0,
    )
    return built


def empty_network(
    config: Config, num_classes: int, trusted: Sequence[str] | None = None
) -> nn.Module:
    """The same network on torch's device "meta": shapes that take neither memory nor time."""
    with torch.device("meta"), _Unfilled():
        return network(config, num_classes, trusted)


class _Unfilled(TorchFunctionMode):
    """Leave tensors as they are that would be filled with first weights.

    Normal ones on "meta" have torch import its compiler: a second or two (torch 2.15).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def denoiser(config: Config, net: nn.Module, trusted: Sequence[str] | None = None) -> Denoiser:
    """A network with the schedule and target it was, or will be, trained for."""
    return Denoiser(
        net,
        schedule(config, trusted),
        bind("target", config.target, "target", trusted),
        config.sigma_data,
        pixel_range(config.data.mean, config.data.std)
        if config.training.self_conditioning
        else None,
    )


def objective(config: Config, trusted: Sequence[str] | None = None) -> Objective:
    """What a run minimises; a likelihood is told where black and white lie."""
    part: partial[Any] = bind("objective", config.objective, "objective", trusted)
    levels = dict(zip(("low", "high"), pixel_range(config.data.mean, config.data.std), strict=True))
    takes = inspect.signature(part).parameters
    return partial(part, **{name: level for name, level in levels.items() if name in takes})


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


def find(
    axis: str, name: str, key: str, trusted: Sequence[str] | None = None
) -> Callable[..., Any]:
    """The function, or class of networks, of that name; arguments are those of `bind`."""
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
    if not inspect.isfunction(found) or wanted not in (_positional(found), _learns_as(found)):
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
            fits = AXES[axis].positional in (_positional(part), _learns_as(part))
            if fits and accepted >= set(AXES[axis].given):
                yield part


def _positional(part: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


def _learner(part: Callable[..., Any]) -> type[nn.Module] | None:
    """The class of the module that a function without positional arguments makes, if it does."""
    made = getattr(part, "__annotations__", {}).get("return")
    is_module = inspect.isclass(made) and issubclass(made, nn.Module)
    return made if is_module and not _positional(part) else None


def _learns_as(part: Callable[..., Any]) -> tuple[str, ...] | None:
    made = _learner(part) if inspect.isfunction(part) else None
    return _positional(made.forward)[1:] if made else None


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
        if parameter.kind is parameter.KEYWORD_ONLY
        and name not in AXES[axis].given + AXES[axis].offered
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
            if not isinstance(value.get("name"), str):
                given = repr(value.get("name"))[:200]
                raise ConfigError(f"{full}.name: expected a name, not {given}")
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
        found = TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as refused:
        why = refused.errors()[0]["msg"].replace("Input should be", "expected")
        raise ConfigError(f"{key}: {why}, not {repr(value)[:200]}") from None
    for numbers, number in _ranged(annotation, value):
        if number not in numbers:
            raise ConfigError(f"{key}: expected {numbers}, not {repr(number)[:200]}")
    if any(number != number for number in (value if isinstance(value, tuple) else (value,))):
        raise ConfigError(f"{key}: expected a number, not {repr(value)[:200]}")
    return found


def _ranged(annotation: Any, value: Any) -> Iterator[tuple[Range, Any]]:
    """Every number of a value that was checked against its annotation, with each of its ranges."""
    if value is None:
        return
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from ((fact, value) for fact in inner[1:] if isinstance(fact, Range))
        yield from _ranged(inner[0], value)
        return
    for part, each in itertools.product(inner, value if isinstance(value, tuple) else (value,)):
        yield from _ranged(part, each)
