"""`train` and `resume`: from a configuration to a trained run."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rediffuse import build, drift, private, runs
from rediffuse.config.compose import (
    changes,
    checked,
    read_yaml,
    refuse_groups,
    set_values,
    typed_values,
)
from rediffuse.config.schema import AUTO, Config
from rediffuse.data.batches import Batch, Batches, fixed
from rediffuse.errors import CheckpointError, ConfigError, RunError, TrainingError
from rediffuse.evaluation.figures import short
from rediffuse.images import Images, absolute, of_run, prepare, relocate, split_places
from rediffuse.legality import check, check_new
from rediffuse.lengths import check_rate, command, next_command, planned_images, with_horizon
from rediffuse.processes import exit_code
from rediffuse.randomness import RNG_SCHEME, Stream, normal, torch_seeded
from rediffuse.runs import Record, Run
from rediffuse.session import (
    Look,
    Session,
    send_what_is_missing,
    trackers_of,
    unseen,
)
from rediffuse.tracking import mlflow, tensorboard
from rediffuse.tracking.tracker import in_one_line
from rediffuse.training import checkpoint, committed, hooks, memory
from rediffuse.training.average import Average
from rediffuse.training.compiling import Trial, compile_network, compile_noise, trial
from rediffuse.training.devices import (
    PRECISIONS,
    Devices,
    bfloat16_pays,
    choose,
    keep_freed_memory,
    set_determinism,
)
from rediffuse.training.loop import Hook, Stop
from rediffuse.training.loop import train as loop
from rediffuse.training.memory import free_bytes
from rediffuse.training.optimizers import parameter_groups
from rediffuse.training.state import TrainState
from rediffuse.training.step import Recipe
from rediffuse.words import say, tell


def train(config: Config, *, root: Path | None = None, parent: str | None = None) -> int:
    """Train a new run; return the exit code.

    Raises:
        RediffuseError: before anything is written, if the configuration or the images cannot work.
    """
    return trained(config, root=root, parent=parent)[1]


def trained(
    config: Config,
    *,
    root: str | Path | None = None,
    parent: str | None = None,
    look: Look = unseen,
) -> tuple[Run, int]:
    """Train a new run; return it and the exit code. `look` is told all that is recorded.

    Raises:
        RediffuseError: as `train` does.
    """
    check(config)
    check_new(config)
    private.check(config)
    home = runs.runs_root(root)
    parent = runs.find_run(home, parent).id if parent else None
    devices = choose(config.device)
    config = config.model_copy(update={"data": absolute(config.data)})
    images = prepare(config.data, home, whole=True)
    config = settled(config, images, devices)
    check_measured(config, images)
    check_rate(config, 0, planned_images(config, images.per_epoch), _warn(devices))
    state, recipe = fresh(config, images, devices)
    trackers_of(config, Run(home), parent)  # refused before there is a run
    _check_equal(config, images, state, devices)
    with closing(hooks.Interrupts(devices)) as interrupts:
        run = _created(config, home, parent, devices, images)
        with _writing(run, devices):
            return run, _go(run, config, images, recipe, state, interrupts, look=look)


def resume(
    word: str, words: Sequence[str] = (), *, root: Path | None = None, trusted: Sequence[str] = ()
) -> int:
    """Go on with a run from its newest checkpoint that verifies; return the exit code.

    Raises:
        RediffuseError: if the run cannot be found, or cannot go on as asked.
    """
    run = runs.find_run(runs.runs_root(root), word)
    places, others = split_places(load_config(run).data, words, trusted)
    old, config = to_resume(run, others)
    if config.training.batch_size == AUTO:
        raise ConfigError("training.batch_size=auto: a run that has begun needs a number")
    check(config, trusted)
    private.check(config, old)
    devices = choose(config.device)
    if places:
        devices.on_main(lambda: relocate(run, places, trusted))
        old, config = to_resume(run, others)
    set_up(config, devices)
    images = of_run(run, config.data, trusted, whole=True)
    config = with_horizon(config, images.per_epoch, trusted, before=old)
    _check_measured_again(old, config, images, devices)
    config = _compile_settled(_precision_settled(config, devices), images, devices, trusted)
    changed = changes(old, config)
    state, recipe = fresh(config, images, devices, trusted)
    with closing(hooks.Interrupts(devices)) as interrupts, _writing(run, devices):
        record, newest = devices.on_main(lambda: _newest(run))
        if newest:
            _load(state, newest, devices)
        _check_equal(config, images, state, devices)
        planned = planned_images(config, images.per_epoch)
        early = hooks.stopped_early(state, config.training.early_stopping_checks)
        if record.status == "FINISHED" and (early or state.images_seen >= planned):
            if devices.is_main:
                why = f" ({early})" if early else ""
                say(f"run {run.id} is finished at {state.images_seen:,} images{why}; nothing to do")
                ended = state.images_seen, planned, state.checks_since_best
                say(f"to go on: {next_command(run.id, config, *ended)}")
                send_what_is_missing(run, config)
            return 0
        grown = planned > planned_images(old, images.per_epoch)
        check_rate(config, state.images_seen, planned, _warn(devices), trusted, refuse=grown)
        if devices.is_main:
            found = drift.note(run, changed, surroundings(images, devices), state.images_seen)
            private.write_config(run, config)
            for line in found.told(found.decisive):
                say(f"changed {line}")
        return _go(run, config, images, recipe, state, interrupts, trusted)


def to_resume(run: Run, words: Sequence[str]) -> tuple[Config, Config]:
    """A run's own configuration, and the one that it is resumed with.

    A declared key that was edited in the run's file since is a change like one in `words`.

    Raises:
        RediffuseError: if the run's is damaged, or `words` or an edit change what may not change.
    """
    edits, tree = drift.refuse_edited(run), load_config(run).model_dump()
    old = checked(drift.undone(tree, edits, drift.recorded_config(run)))
    tree["training"]["stop_after_images"] = None  # that was for the process before
    typed = typed_values(words)
    refuse_groups(typed, tree)
    set_values(tree, typed)
    config = checked(tree)
    changes(old, config)
    return old, config


def _newest(run: Run) -> tuple[Record, Path | None]:
    """A run's record, and its newest checkpoint that verifies; damaged ones are set aside.

    Raises:
        RunError: if there is none any more.
    """
    record, newest = run.read(), committed.newest(run.checkpoints, say)
    if record.images_seen and not newest:
        raise RunError(
            f"run {run.id} has seen {record.images_seen:,} images, and there is no checkpoint in "
            f"{run.checkpoints}; put them back, or start a new run"
        )
    return record, newest


def _load(state: TrainState, chosen: Path, devices: Devices) -> None:
    """Load the checkpoint that the main process has chosen, in every process.

    Raises:
        CheckpointError: in every process, if one of them cannot read it.
    """
    failed = None
    try:
        checkpoint.load_checkpoint(state, chosen)
    except CheckpointError as refused:
        failed = str(refused)
    for rank, failure in enumerate(devices.everyones(failed)):
        if failure:
            where = f"process {rank} of {devices.ranks}: " if devices.ranks > 1 else ""
            raise CheckpointError(f"{where}{failure}")


def _check_equal(config: Config, images: Images, state: TrainState, devices: Devices) -> None:
    """Hold every process' configuration, images and training state to those of the main one.

    Raises:
        TrainingError: naming a process that differs, and in what.
    """
    if devices.ranks == 1:
        return
    mine = {
        "configuration": config.model_dump(exclude={"threads"}),
        "images": images.facts(),
        "images seen": state.images_seen,
        **hooks.state_digests(state),
    }
    if found := devices.first_difference(mine):
        raise TrainingError(
            f"{found}, and would train another model; start all processes with the same command, "
            "images and files of the run"
        )


def check_measured(config: Config, images: Images) -> None:
    """Refuse a metric that is asked for and that this run never measures.

    Raises:
        ConfigError: naming what is asked for, and what would be measured.
    """
    training, planned = config.training, planned_images(config, images.per_epoch)
    if training.early_stopping_checks and images.held_out is None:
        raise ConfigError(
            "training.early_stopping_checks counts validations, and no images are held out; set "
            "data.validation_fraction above 0"
        )
    train = images.packed.part("train")
    classes = train.labels is not None and len(images.packed.class_names) > 1
    wanted = training.best_metric
    measured = f"proxy/fd_{'classifier' if classes else 'turns'}_{short(training.proxy_images)}"
    if wanted.startswith("proxy/") and wanted != measured:
        raise ConfigError(
            f"training.best_metric={wanted}: with these images and training.proxy_images="
            f"{training.proxy_images} it is {measured}"
        )
    after = training.proxy_every_images or 0
    if wanted.startswith("proxy/") and after > planned:
        raise ConfigError(
            f"training.best_metric={wanted} is first measured after {after:,} images, and the run "
            f"is planned to end at {planned:,}"
        )


def _check_measured_again(old: Config, config: Config, images: Images, devices: Devices) -> None:
    """Refuse a metric that is newly asked for and never measured; say so of one asked for before.

    Raises:
        ConfigError: as `check_measured` does.
    """
    try:
        check_measured(config, images)
    except ConfigError as never:
        if old.training.model_dump(include=_MEASURED) != config.training.model_dump(
            include=_MEASURED
        ):
            raise
        _warn(devices)(str(never))


_MEASURED = {"best_metric", "early_stopping_checks", "proxy_images", "proxy_every_images"}


def _check_norms(network: nn.Module, devices: Devices) -> None:
    """Refuse a network that normalises over a batch, of which each process sees only a part.

    Raises:
        ConfigError: naming the layer.
    """
    for name, module in network.named_modules() if devices.ranks > 1 else ():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"model: {name} is a batch norm, and each of {devices.ranks} processes would "
                "normalise over its own part of a batch; use another model.norm, or one process"
            )


def load_config(run: Run) -> Config:
    """Read a run's own configuration, as data.

    Raises:
        RediffuseError: if it is missing or damaged.
    """
    return checked(read_yaml(run.config))


def set_up(config: Config, devices: Devices) -> str:
    """Set torch up for a run; return how exact it is."""
    keep_freed_memory()
    compiled = bool(config.training.compile)
    return set_determinism(config.determinism, devices.device, config.threads, compiled=compiled)


def settled(
    config: Config, images: Images, devices: Devices, trusted: Sequence[str] | None = None
) -> Config:
    """Decide and write down what was left open, and set torch up for it.

    That is the learning rate's horizon, how exact, how many threads, and what is `auto`: precision,
    batch size, compiler.

    Raises:
        RediffuseError: if nothing fits, or the compiled network is another one.
    """
    config = _resolved(config, images, set_up(config, devices), trusted)
    config = _precision_settled(config, devices)
    if config.training.batch_size == AUTO:
        size = _largest_batch(config, images, devices, trusted)
        config = _with_training(config, batch_size=size)
    return _compile_settled(config, images, devices, trusted)


def _resolved(
    config: Config, images: Images, exactness: str, trusted: Sequence[str] | None
) -> Config:
    config = with_horizon(config, images.per_epoch, trusted)
    threads = config.threads or torch.get_num_threads()
    return config.model_copy(update={"determinism": exactness, "threads": threads})


def _precision_settled(config: Config, devices: Devices) -> Config:
    """Take bfloat16 for `auto` where every rank is faster with it; warn where it was chosen and is
    slower.
    """
    asked = config.training.precision
    if asked not in ("auto", "bf16") or (asked == "bf16" and devices.device.type != "cpu"):
        return config
    pays = bool(devices.gather(torch.tensor([int(bfloat16_pays(devices.device))])).min())
    if asked == "auto":
        return _with_training(config, precision="bf16" if pays else "fp32")
    if not pays and devices.is_main:
        tell(
            "training.precision=bf16: this processor is faster with float32, maybe by far; "
            "training.precision=auto would take fp32",
            sys.stderr,
        )
    return config


_FULL = 0.8  # the share of free memory that `batch_size=auto` takes


def _largest_batch(
    config: Config, images: Images, devices: Devices, trusted: Sequence[str] | None
) -> int:
    """Micro-batches of the largest power of two that fits into free memory, and into an epoch."""
    parts = config.training.accumulation * devices.ranks
    plain = _with_training(config, batch_size=parts, compile=False)
    state, recipe = fresh(plain, images, devices, trusted)
    wanted = memory.estimated(state, recipe, few(images, devices, 2))
    shared_by = devices.ranks if devices.device.type == "cpu" else 1
    room = _FULL * free_bytes(devices.device) / shared_by - wanted.lasting
    fitting = int(devices.gather(torch.tensor([int(room // wanted.each)])).min())
    if fitting < 1 or images.per_epoch < parts:
        raise ConfigError(
            f"training.batch_size=auto: not one image fits into {max(0, room) / 1e9:.2f} GB, or "
            f"{images.per_epoch} images are fewer than ranks x accumulation; use a smaller "
            "network, smaller images, or a number"
        )
    fitting = min(fitting, images.per_epoch // parts)
    return int(parts * 2 ** (fitting.bit_length() - 1))


def few(images: Images, devices: Devices, count: int) -> Batch:
    """The first images, as a batch."""
    part = images.packed.part("train")
    labels = part.labels if images.class_names else None
    return fixed(part.images, labels, None, count, batch_size=count, device=devices.device)[0]


def _compile_settled(
    config: Config, images: Images, devices: Devices, trusted: Sequence[str] | None = None
) -> Config:
    """Try the compiler where it is asked for; `auto` becomes what was faster here.

    Raises:
        TrainingError: if it was asked for and fails, or the compiled network is another one.
    """
    wanted = config.training.compile
    if not wanted:
        return config
    parts = config.training.accumulation * devices.ranks
    count = config.training.batch_size // parts
    if devices.device.type == "cpu":  # where large images take seconds each
        count = max(1, min(count, _TRIED_IMAGES, _TRIED_PIXELS // config.data.image_size**2))
    elif isinstance(build.schedule(config, trusted), nn.Module):
        if wanted is True:
            raise ConfigError(f"training.compile: {_LEARNED}; set training.compile=false")
        return _with_training(config, compile=False)
    found, failed = None, None
    if devices.is_main:
        tell("compiling the network to try it, which may take a minute", sys.stderr)
    try:
        found = _tried(config, images, devices, count, trusted)
    except TrainingError as refused:
        failed = refused
    votes = [[found is not None, bool(found and found.agrees), bool(found and found.pays)]]
    works, agrees, pays = devices.gather(torch.tensor(votes, dtype=torch.int64)).amin(0).tolist()
    if not works:
        failed = failed or TrainingError("training.compile: the compiler failed on another rank")
        if wanted is True:
            raise failed
        if devices.is_main:
            tell(f"{failed}; going on without", sys.stderr)
        return _with_training(config, compile=False)
    assert found
    if not agrees and wanted is True:
        raise TrainingError(
            f"training.compile: the compiled network differs from the plain one by "
            f"{found.difference:.2g}, more than {config.training.precision} explains; set "
            "training.compile=false"
        )
    taken = wanted is True or bool(agrees and pays)
    if not taken:
        _forget_compiled(devices)
    if devices.is_main:  # not among the lines that begin with the run's id
        tell(
            f"compiled network: {found.seconds / found.plain_seconds:.2f} of the plain one's time, "
            f"relative difference {found.difference:.1e}{'' if taken else ': not used'}",
            sys.stderr,
        )
    return _with_training(config, compile=taken)


_TRIED_IMAGES, _TRIED_PIXELS = 128, 100_000
_LEARNED = "a schedule that learns takes two backward passes, and a compiled network only one"


def _tried(
    config: Config, images: Images, devices: Devices, count: int, trusted: Sequence[str] | None
) -> Trial:
    """A trial with so many images, or with fewer if the plain network, which needs more, is short
    of memory.
    """
    network, inputs = _example(config, images, devices, count, trusted)
    precision = PRECISIONS[config.training.precision]
    try:
        return trial(network, inputs, precision, replayed=_replayed(config))
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    del network, inputs
    _forget_compiled(devices)
    found = _tried(config, images, devices, count // 2, trusted)
    _forget_compiled(devices)
    return found


def _forget_compiled(devices: Devices) -> None:
    """Free a trial's memory; and what served batches of two sizes would be slower for each."""
    if devices.device.type != "cpu":
        torch.compiler.reset()


def _warn(devices: Devices) -> Callable[[str], None]:
    """Write a line to standard error, from the first rank alone."""
    return lambda line: tell(line, sys.stderr) if devices.is_main else None


def _replayed(config: Config) -> bool:
    """Whether a step's gradients are done with before the next forward pass."""
    return config.training.accumulation == 1


def _with_training(config: Config, **update: Any) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=update)})


def _example(
    config: Config, images: Images, devices: Devices, count: int, trusted: Sequence[str] | None
) -> tuple[nn.Module, list[Tensor | None]]:
    """A network as this run's, and what it may be asked: images, labels, classes."""
    classes, size = len(images.class_names), config.data.image_size
    with torch_seeded(config.seed, Stream.INITIALISATION):
        network = build.network(config, classes, trusted).to(devices.device)
        channels = config.data.channels * (2 if config.training.self_conditioning else 1)
        x = torch.randn(count, channels, size, size).to(devices.device)
    label = torch.linspace(1, 1000, count, device=devices.device)
    cond = torch.arange(count, device=devices.device) % classes if classes else None
    return network, [x, label, cond]


def fresh(
    config: Config, images: Images, devices: Devices, trusted: Sequence[str] | None = None
) -> tuple[TrainState, Recipe]:
    """The state before the first step, and what every step does."""
    training, classes = config.training, len(images.class_names)
    with torch_seeded(config.seed, Stream.INITIALISATION):
        network = build.network(config, classes, trusted)
        _check_norms(network, devices)
        denoiser = build.denoiser(config, network, trusted)
        weighting = build.bind("weighting", config.weighting, "weighting", trusted)
        times = build.bind("times", config.times, "times", trusted)
    network = network.to(devices.device)
    if training.compile:
        compile_network(network, devices.device, replayed=_replayed(config))
    parts = {"schedule": denoiser.schedule, "weighting": weighting, "times": times}
    learned = nn.ModuleDict({n: p for n, p in parts.items() if isinstance(p, nn.Module)})
    optimizer = build.bind("optimizer", config.optimizer, "optimizer", trusted)
    state = TrainState(
        network,
        optimizer(parameter_groups(network, learned), training.learning_rate),
        _average(config, network),
        torch.amp.GradScaler(devices.device.type) if training.precision == "fp16" else None,
        learned,
    )
    rate = build.rate(config, trusted)
    recipe = Recipe(
        denoiser=denoiser,
        objective=build.objective(config, trusted),
        weighting=weighting,
        times=times,
        pairing=build.bind("pairing", config.pairing, "pairing", trusted),
        seed=config.seed,
        batch_size=training.batch_size,
        learning_rate=lambda images: training.learning_rate * rate(images),
        devices=devices,
        clip_norm=training.clip_norm,
        label_dropout=training.label_dropout,
        null_class=classes or None,
        self_conditioning=training.self_conditioning,
        offset_noise=training.offset_noise,
        input_perturbation=training.input_perturbation,
        time_strata=training.time_strata,
        precision=PRECISIONS[training.precision],
        normal=compile_noise(devices.device) if training.compile else normal,
    )
    return state, recipe


def _average(config: Config, network: nn.Module) -> Average | None:
    half_life = config.average.half_life_images
    if half_life is None:
        return None
    return Average(network, half_life_images=half_life, warm_up=config.average.warm_up)


def _go(
    run: Run,
    config: Config,
    images: Images,
    recipe: Recipe,
    state: TrainState,
    interrupts: hooks.Interrupts,
    trusted: Sequence[str] | None = None,
    look: Look = unseen,
) -> int:
    """Train to the planned length with everything that looks on; settle how the run ended."""
    session = Session(run, config, images, recipe, look, interrupts.go_on)
    try:
        session.begin(state)
        if "tensorboard" in config.tracking.trackers and recipe.devices.is_main:
            _draw_graph(run, config, images, recipe.devices, trusted)
        batches = batches_of(config, images, recipe.devices).since(state.images_seen)
        steps = session.watched(batches)
        try:
            session.owed_preview(state)
            looking: list[Hook] = [*session.hooks(), interrupts]
            reason = session.ended(state) or loop(recipe, state, steps, looking, session.planned)
            session.save(state)
            session.saved()
            if not interrupts.received:
                session.check_trained(state)
            session.final_preview(state)
        except Stop as stop:  # of a preview that is not drawn to its end
            reason = str(stop)
        if stopped_by := interrupts.received:
            reason = f"{stopped_by.name} received"
        session.end(state, "KILLED" if stopped_by else "FINISHED")
    except BaseException as failed:
        session.fail(state)
        if not isinstance(failed, OSError):
            raise
        raise TrainingError(
            f"{failed.filename or run.directory}: {failed.strerror or failed}; the last checkpoint "
            f"is untouched: mend that, then {command('resume', run.id, config)}"
        ) from failed
    session.farewell(state, reason)
    return interrupts.agreed(exit_code(stopped_by) if stopped_by else 0)


def _draw_graph(
    run: Run, config: Config, images: Images, devices: Devices, trusted: Sequence[str] | None
) -> None:
    """Show a copy of the network to TensorBoard; what cannot be drawn is no reason to stop."""
    network, inputs = _example(config, images, devices, 1, trusted)
    given = [value for value in inputs if value is not None]
    try:
        tensorboard.draw_graph(run.directory, network.eval(), given)
    except Exception as failed:
        say(f"tensorboard: no graph of the network ({in_one_line(failed)})")


def batches_of(config: Config, images: Images, devices: Devices) -> Batches:
    data, train = config.data, images.packed.part("train")
    on_device = data.on_device
    if on_device == "auto":
        on_device = devices.device.type == "cpu" or train.images.nbytes < _ON_DEVICE_BYTES
    return Batches(
        images=train.images,
        labels=train.labels if images.class_names else None,
        rows=images.train_rows,
        seed=config.seed,
        batch_size=config.training.batch_size,
        micro_batches=config.training.accumulation,
        rank=devices.rank,
        ranks=devices.ranks,
        flip=data.flip,
        crop_padding=data.crop_padding,
        mean=data.mean,
        std=data.std,
        device=devices.device,
        on_device=on_device and devices.device.type != "cpu",
        workers=data.workers,
    )


_ON_DEVICE_BYTES = 16 * 2**30


def surroundings(images: Images, devices: Devices) -> dict[str, Any]:
    """Everything around a run that bits may depend on: images, code, packages, machine."""
    return {
        **runs.environment(),
        "rng_scheme": RNG_SCHEME,
        "device": devices.device.type,
        "ranks": devices.ranks,
        "data": images.facts(),
    }


def _created(
    config: Config, root: Path, parent: str | None, devices: Devices, images: Images
) -> Run:
    """Make the run, under MLflow's id where MLflow is asked for; every process gets the same."""

    def create() -> str:
        run_id = None
        if "mlflow" in config.tracking.trackers:
            run_id = mlflow.create_run(root, config.tracking.experiment, config.name, say)
        facts = json.dumps(surroundings(images, devices), indent=1)
        files = {**private.files(config), "environment.json": facts.encode()}
        made = runs.create(
            root, run_id, name=config.name, parent=parent, command=sys.argv, files=files
        )
        return made.id

    return Run(root / devices.on_main(create))


@contextmanager
def _writing(run: Run, devices: Devices) -> Iterator[None]:
    """Hold the run's lock, in the main process alone; each is refused if that one is."""
    with ExitStack() as held:
        devices.on_main(lambda: held.enter_context(runs.locked(run)))
        yield
