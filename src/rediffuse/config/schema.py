"""What a run is made of. Everything is checked before anything is built or written.

Lengths count images, never steps or epochs unless the name says so. A `Part` names one file of an
axis (`schedule: {name: discrete.cosine, steps: 1000}`) with that function's own arguments.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rediffuse.words import masked

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=-1000, le=1000)]
Spread = Annotated[float, Field(ge=1e-3, le=1000)]
Epochs = Annotated[float, Field(gt=0, le=1e9)]
ImageCount = Annotated[int, Field(gt=0, le=10**15)]
LearningRate = Annotated[float, Field(gt=0, le=1000)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AUTO = 0
"""A batch size that is still to be found; a configuration says "auto"."""


def _number_or_auto(value: Any) -> Any:
    if type(value) is int and value <= AUTO:
        raise PydanticCustomError("greater_than", "Input should be greater than 0")
    return AUTO if value == "auto" else value


BatchSize = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(_number_or_auto),
    PlainSerializer(lambda size: "auto" if size == AUTO else size),
]
Seed = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]


BestMetric = Annotated[
    str, Field(pattern=r"^(validation/loss|loss|epoch/loss|proxy/fd_(classifier|turns)_\d+k?)$")
]
"""What a training run measures of itself, lowest at its best."""


class Section(BaseModel):
    """A group of fields: no unknown ones, no silent conversions, unchangeable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(Section):
    """A name on some axis, with the arguments of the function of that name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """What is given beside the name."""
        return dict(self.model_extra or {})


class Data(Part):
    """Which images, and what is done to every one of them; other arguments are the source's own."""

    image_size: Annotated[int, Field(gt=0, le=8192)] = 32
    """pixels of a side; images are square"""
    channels: Literal[1, 3, 4] = 3
    """1 grey, 3 colours, 4 with transparency"""
    fit: Literal["crop", "pad"] = "crop"
    """what makes an image square: `crop` its middle, or `pad` it with black"""
    mean: Level | list[Level] = 0.5
    """pixels become (pixel/255 - mean) / std; one number, or one per channel"""
    std: Spread | list[Spread] = 0.5
    """see `data.mean`; 0.5 and 0.5 give [-1, 1]"""
    use_labels: bool = True
    """train with classes, where there are any"""
    flip: bool = False
    """mirror half of the images; not for digits or texts"""
    crop_padding: Annotated[int, Field(ge=0, le=8192)] = 0
    """shift each image by up to so many pixels"""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """share of images held out, where the source has no such part"""
    on_device: bool | Literal["auto"] = "auto"
    """keep all images in the device's memory; auto: where they are not too many"""
    workers: Literal[0, 1] = 1
    """1 prepares batches in a thread of its own, 0 does not"""
    verify: bool = False
    """decode every image again when a process begins to train, to find any that was replaced"""

    @property
    def source(self) -> Part:
        """The source alone, with its own arguments."""
        return Part(name=self.name, **self.arguments)


class Training(Section):
    """How long, how fast, how exact, and how often something is looked at."""

    epochs: Epochs | None = None
    """the length in passes over the images; null: `training.images` says it"""
    images: ImageCount | None = None
    stop_after_images: PositiveInt | None = None
    batch_size: BatchSize = 128
    accumulation: PositiveInt = 1
    learning_rate: LearningRate = 2e-4
    """its peak; `rate` says how it changes"""
    clip_norm: PositiveFloat | None = 1.0
    """gradients with a larger norm are scaled down to it; null: never"""
    label_dropout: Probability = 0.1
    self_conditioning: Probability = 0.0
    offset_noise: NonNegativeFloat = 0.0
    input_perturbation: NonNegativeFloat = 0.0
    time_strata: PositiveInt = 1
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    compile: bool | Literal["auto"] = False
    """auto: try it at the start, and use it if it agrees and is faster"""
    log_every_images: PositiveInt | None = None
    validate_every_images: PositiveInt | None = None
    preview_every_images: PositiveInt | None = None
    """draw the same images again; null: an epoch, or a twentieth of the run if that is longer"""
    checkpoint_every_images: PositiveInt | None = None
    """null: an epoch, or a twentieth of the run if that is longer"""
    previews: bool = True
    """draw images while training, and at its end"""
    preview_count: Annotated[int, Field(gt=0, le=100_000)] = 64
    """how many"""
    validation_images: PositiveInt = 1024
    """held-out images whose loss is measured, always with the same times and noise"""
    keep_checkpoints: PositiveInt = 2
    keep_every_images: PositiveInt | None = None
    proxy_every_images: PositiveInt | None = None
    proxy_images: PositiveInt = 500
    proxy_steps: Annotated[int, Field(gt=0, le=100_000)] = 10
    """with how many steps of the run's solver"""
    best_metric: BestMetric = "validation/loss"
    early_stopping_checks: PositiveInt | None = None
    non_finite_limit: PositiveInt = 20

    @model_validator(mode="after")
    def _one_length(self) -> "Training":
        if (self.epochs is None) == (self.images is None):
            raise ValueError(
                "give either training.epochs or training.images (set the other to null)"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"training.accumulation={self.accumulation} must divide training.batch_size="
                f"{self.batch_size}, which counts the images of one optimizer step"
            )
        if self.best_metric.startswith("proxy/") and not self.proxy_every_images:
            raise ValueError(
                f"training.best_metric={self.best_metric} needs training.proxy_every_images"
            )
        return self


class Rate(Part):
    """How the learning rate changes, and over how many images."""

    horizon_images: PositiveInt | None = None
    """the length over which it falls; null: the planned length"""
    horizon_follows_plan: bool | None = None
    """whether `rate.horizon_images` grows with the planned length; null: unless it is given"""


class Average(Section):
    """An exponential moving average of the weights; null half-life: none is kept."""

    half_life_images: PositiveInt | None = 50_000
    """after so many images, older weights count half; null: no average is kept"""
    warm_up: bool = True
    """a shorter half-life at the beginning"""


class Sampling(Section):
    """How previews are drawn, and the defaults of `rediffuse sample`."""

    solver: Part
    grid: Part
    steps: PositiveInt = 20
    """how many steps a solver takes"""
    guidance: Part
    threshold: Part


def _each_once(names: list[str]) -> list[str]:
    """Drop repetitions; two feeders of one tracker would send every row twice."""
    return list(dict.fromkeys(names))


class Tracking(Section):
    """Where copies of the run's metrics go, beside the run's own files."""

    trackers: Annotated[
        list[Literal["mlflow", "tensorboard", "wandb"]], AfterValidator(_each_once)
    ] = []
    """any of mlflow, tensorboard and wandb; several at once"""
    experiment: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(masked)] = (
        "rediffuse"
    )
    """what trackers call the group of runs"""
    register_model: bool = False


class Config(Section):
    """One run, completely."""

    name: Annotated[str, Field(max_length=200), AfterValidator(masked)] | None = None
    """what `rediffuse runs` calls it; `--run-name` sets it"""
    seed: Seed = 0
    """the key of all randomness: weights, order, times, noise"""
    device: str = "auto"
    determinism: Literal["auto", "exact", "fast"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    profile: bool = False
    sigma_data: PositiveFloat | None = None
    learned_variance: bool = False
    model: Part
    schedule: Part
    target: Part
    times: Part
    objective: Part
    weighting: Part
    pairing: Part
    data: Data
    training: Training
    optimizer: Part
    rate: Rate
    average: Average
    sampling: Sampling
    tracking: Tracking


# What a resumed run may change (DESIGN: free, declared, fixed). Prefixes of full keys.
FREE = (
    "name", "profile", "data.on_device", "data.workers", "data.path", "data.root",
    "data.validation_path", "data.test_path", "data.verify",
    "rate.horizon_follows_plan",
    "training.epochs", "training.images", "training.stop_after_images",
    "training.log_every_images", "training.validate_every_images", "training.preview_every_images",
    "training.checkpoint_every_images", "training.previews", "training.preview_count",
    "training.keep_checkpoints", "training.keep_every_images", "training.best_metric",
    "training.early_stopping_checks", "training.non_finite_limit",
    "training.proxy_every_images", "training.proxy_images", "training.proxy_steps",
    "sampling", "tracking",
)  # fmt: skip
DECLARED = (
    "determinism", "device", "threads", "optimizer", "rate", "average",
    "training.batch_size", "training.accumulation", "training.learning_rate", "training.clip_norm",
    "training.precision", "training.compile", "training.label_dropout",
    "training.validation_images",
)  # fmt: skip
