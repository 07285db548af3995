"""The groups of settings that recipes consist of, typed.

Nothing heavy is imported here, so that a wrong setting is named at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nni_cream.data_names import DATA_SETS
from nni_cream.errors import UserError
from nni_cream.recipe_files import complaint

# What is counted or measured here never comes near the upper ends, beyond which torch and NumPy overflow.
PositiveInt = Annotated[int, Field(gt=0, le=1_000_000)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Pair = tuple[PositiveFloat, PositiveFloat]
Hue = Annotated[float, Field(ge=0, le=0.5)]
LARGEST_RESOLUTION: Final = 8192
Resolution = Annotated[int, Field(ge=8, le=LARGEST_RESOLUTION)]
BatchSize = Annotated[int, Field(ge=2, le=1_000_000)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Pixels = Annotated[int, Field(gt=0, le=8192)]
Channels = Annotated[int, Field(ge=2, le=4096, multiple_of=2)]
Cells = Annotated[int, Field(ge=3, le=1000)]


def _known_data_set(name: str) -> str:
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name, DATA_SETS, n=1, cutoff=0)[0]
        raise ValueError(f"there is no data set {name!r}; did you mean {near!r}? Known are {', '.join(DATA_SETS)}")
    return name


DataSetName = Annotated[str, AfterValidator(_known_data_set)]

# What timm builds as torch.optim.SGD, whose step DARTS can unroll.
UNROLLED = ("sgd", "momentum", "nesterov")
# What timm builds with Nesterov's momentum, which torch refuses to do with a momentum of 0.
_NESTEROV = frozenset({"sgd", "sgdw", "sgdc", "nesterov", "nesterovw", "csgdw", "csgdc", "nlars", "nlarc"})


class Settings(BaseModel):
    """A group of settings; a key that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would take true, which YAML also spells "yes" and "on", for the number 1.
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is not a value for this setting")
        return value


class Augmentation(Settings):
    """How training images are varied: arguments of ``timm.data.create_transform``; None is the data set's default."""

    scale: Pair | None = None
    ratio: Pair | None = None
    hflip: Share | None = None
    vflip: Share | None = None
    color_jitter: NotNegative | tuple[NotNegative, NotNegative, NotNegative, Hue] | None = None
    auto_augment: str | None = None
    interpolation: Literal["bilinear", "bicubic", "random"] | None = None
    re_prob: Share | None = None
    re_mode: Literal["const", "rand", "pixel"] | None = None
    crop_padding: Pixels | None = None
    cutout: Pixels | None = None


class Data(Settings):
    """Which images, how large, and how they are loaded.

    ``resident``: a part whose images fit and vary by moving alone stays on the device (:mod:`nni_cream.resident`).
    """

    name: DataSetName = "mnist5k"
    folder: Path | None = None
    download: bool = False
    resolution: Resolution = 32
    batch_size: BatchSize = 64
    workers: Workers = 0
    resident: bool = True
    architecture_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _images_are_left(self) -> Data:
        if self.architecture_fraction + self.validation_fraction >= 1:
            raise ValueError("architecture_fraction and validation_fraction together leave no images to train on")
        return self


class SearchData(Data):
    """As :class:`Data`; a resolution of None follows from the FLOPs interval."""

    resolution: Resolution | None = 32  # type: ignore[assignment]

    def at(self, resolution: int) -> Data:
        """Return the settings with the resolution that was chosen."""
        return Data.model_validate({**self.model_dump(), "resolution": resolution})


class ChildData(Data):
    """As :class:`Data`; what is None is as in the search that found the network."""

    name: DataSetName | None = None  # type: ignore[assignment]
    resolution: Resolution | None = None  # type: ignore[assignment]

    def completed(self, searched: Mapping[str, Any]) -> Data:
        """Fill in what is None from the data settings of the search, or from the defaults of :class:`Data`.

        Raises:
            UserError: if they are not data settings.
        """
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        inherited = {key: searched[key] for key in ("name", "folder", "resolution") if searched.get(key) is not None}
        return _inherited(given, inherited, "search")


class Resizing(Settings):
    """How test images are resized: an argument of ``timm.data.create_transform``."""

    interpolation: Literal["bilinear", "bicubic"] | None = None


class EvaluationData(Settings):
    """Which images, how large, and how they are loaded; what is None is as stored in the checkpoint."""

    name: DataSetName | None = None
    folder: Path | None = None
    download: bool = False
    resolution: Resolution | None = None
    batch_size: BatchSize | None = None
    workers: Workers | None = None
    resident: bool | None = None
    augmentation: Resizing = Resizing()

    def completed(self, stored: Mapping[str, Any]) -> Data:
        """Fill in what is None from ``stored`` data settings, or from the defaults of :class:`Data`.

        Raises:
            UserError: if they are not data settings.
        """
        given = self.model_dump(exclude_none=True)
        if not given["augmentation"]:
            del given["augmentation"]
        # What training was allowed to fetch, it has fetched.
        inherited = {
            key: value for key, value in stored.items() if key not in ("download", "images") and value is not None
        }
        return _inherited(given, inherited, "checkpoint")


def _inherited(given: dict[str, Any], inherited: dict[str, Any], origin: str) -> Data:
    """Return data settings of which some are given and others inherited; a folder is of one data set only."""
    if "name" in given and given["name"] != inherited.get("name"):
        inherited = {key: value for key, value in inherited.items() if key != "folder"}
    try:
        return Data.model_validate({**inherited, **given})
    except ValidationError as error:
        raise UserError(f"The data settings of the {origin}: {complaint(error, Data)}") from None


class Optimizer(Settings):
    """Arguments of ``timm.optim.create_optimizer_v2``.

    ``eps`` is added to what adaptive ones divide by; None is the optimizer's own. ``execution`` is how torch runs a
    step of its own optimizers; None is its own choice.
    """

    name: str = "sgd"
    lr: PositiveFloat = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    filter_bias_and_bn: bool = True
    eps: PositiveFloat | None = None
    execution: Literal["foreach", "fused"] | None = None

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Optimizer:
        # timm reads "lookahead_sgd" as sgd inside another optimizer.
        if self.momentum == 0 and self.name.lower().rpartition("_")[2] in _NESTEROV:
            raise ValueError(
                f"momentum is 0, but {self.name!r} is Nesterov's method and needs a momentum above 0; "
                "for plain gradient descent write name: momentum"
            )
        return self

    def timm_arguments(self) -> dict[str, Any]:
        """Return the settings under timm's names."""
        return {
            "opt": self.name,
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "filter_bias_and_bn": self.filter_bias_and_bn,
            **({} if self.eps is None else {"eps": self.eps}),
            **({self.execution: True} if self.execution else {}),
        }


class Schedule(Settings):
    """How the learning rate falls: ``linear`` and ``cosine`` to ``min_lr``, ``exponential`` by ``decay_rate``.

    It changes after every step, so that the last one has ``min_lr``, or after every epoch; the exponential one, every
    ``decay_epochs`` epochs.
    """

    name: Literal["linear", "cosine", "exponential", "constant"] = "linear"
    interval: Literal["step", "epoch"] = "step"
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.97
    decay_epochs: PositiveFloat = 1.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    warmup_lr: NotNegative = 1e-6
    min_lr: NotNegative = 0.0

    def timm_arguments(self) -> dict[str, Any]:
        """Return the settings under timm's names; a straight line is a polynomial of power 1 there."""
        shapes: dict[str, dict[str, Any]] = {
            "linear": {"sched": "poly", "decay_rate": 1.0},
            "exponential": {"sched": "step", "decay_rate": self.decay_rate, "decay_epochs": self.decay_epochs},
        }
        return {
            **shapes.get(self.name, {"sched": self.name}),
            "step_on_epochs": self.interval == "epoch",
            "warmup_epochs": self.warmup_epochs,
            "warmup_lr": self.warmup_lr,
            "min_lr": self.min_lr,
        }


class Device(Settings):
    """Arguments of Lightning's ``Trainer``, and how images and weights lie in memory.

    ``threads`` are those that torch computes with on the CPU, None being its own choice: as many as there are cores.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    memory_format: Literal["channels_last", "contiguous_format"] = "channels_last"
    threads: PositiveInt | None = None


class TrainingDevice(Device):
    """As :class:`Device`; ``compile`` is a mode of ``torch.compile``, ``reduce-overhead`` being its CUDA graphs.

    Only what is the same in every step can be compiled: the network of a training, not that of a search.
    """

    compile: Literal["off", "default", "reduce-overhead"] = "off"

    @field_validator("compile", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        # YAML reads an off without quotation marks as false.
        return "off" if value is False else value

    @model_validator(mode="after")
    def _compiles_for_one(self) -> TrainingDevice:
        if self.compile != "off" and self.devices > 1:
            raise ValueError(
                f"compile is {self.compile!r} and devices is {self.devices}, but batch norms that processes share "
                "cannot be compiled: leave compile off"
            )
        return self


class Flops(Settings):
    """The budget: million multiply-accumulates (what papers on small networks call FLOPs) for one image."""

    min: NotNegative
    max: PositiveFloat

    @model_validator(mode="after")
    def _ordered(self) -> Flops:
        if self.min > self.max:
            raise ValueError(f"min is {self.min:g}, above max {self.max:g}")
        return self


class Latency(Settings):
    """A budget of predicted time, in place of that of FLOPs: milliseconds for a batch, by the ``table`` of a device.

    Without a ``table``, which ``trials/measure_latency.py`` makes, there is none. With one, the FLOPs interval does
    nothing but say how deep the stages of the supernet are.
    """

    table: Path | None = None
    min: NotNegative = 0.0
    max: PositiveFloat | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Latency:
        if self.table is None and (self.max is not None or self.min > 0):
            raise ValueError(
                f"{'min' if self.max is None else 'max'} is given, but no table, which says what networks take; "
                "measure one with trials/measure_latency.py"
            )
        if self.table is not None and self.max is None:
            raise ValueError(
                "a table is given, but no max; say how many milliseconds a network may take, of those that "
                "trials/measure_latency.py has ended with"
            )
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min:g}, above max {self.max:g}")
        return self


class Space(Settings):
    """Arguments of :class:`search_spaces.cream.CreamSpace` that do not follow from budget and data.

    ``operations`` are names of your own ones, which a file that ``--import`` names registers.
    """

    dil_conv: bool = False
    resunit: tuple[Literal["bottleneck", "basic"], ...] = ()
    operations: tuple[str, ...] = ()
    skip: bool = False
    aligned: bool = False


class Cream(Settings):
    """Arguments of :class:`nni_cream.strategies.cream.CreamStrategy`."""

    board_size: PositiveInt = 10
    board_images: Annotated[int, Field(ge=2)] = 4
    admission_gap: NotNegative = 5.0
    warmup_epochs: Annotated[int, Field(ge=0)] = 20
    prior: Literal["even", "board"] | tuple[NotNegative, ...] = "even"
    teacher: Literal["matching", "top1", "none"] = "matching"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    meta_interval: PositiveInt = 200
    matching_lr: PositiveFloat = 1e-4
    recalibration_batches: PositiveInt = 20

    @model_validator(mode="after")
    def _prior_has_weight(self) -> Cream:
        if not isinstance(self.prior, str) and not sum(self.prior) > 0:
            raise ValueError("the prior gives every candidate probability 0")
        return self


class DartsSpaceSettings(Settings):
    """Arguments of :class:`search_spaces.darts.DartsSpace`."""

    channels: Channels = 16
    cells: Cells = 8
    nodes: Annotated[int, Field(gt=0, le=100)] = 4
    concat: PositiveInt | None = None
    operations: tuple[str, ...] = (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )


class Darts(Settings):
    """Arguments of :class:`nni_cream.strategies.darts.DartsStrategy`; ``flops_target`` is in millions here."""

    order: Literal["first", "second"] = "second"
    hypergradient: Literal["exact", "finite_difference"] = "exact"
    radius: PositiveFloat = 0.01
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    alpha_lr: PositiveFloat = 3e-4
    alpha_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    alpha_weight_decay: NotNegative = 1e-3
    gradient_clip: PositiveFloat | None = 5.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stop_above_skips: Annotated[int, Field(ge=0)] | None = None
    skip_limit: Annotated[int, Field(ge=0)] | None = None
    eigenvalue: Literal["off", "track", "stop", "rollback"] = "off"
    flops_target: PositiveFloat | None = None
    flops_weight: PositiveFloat = 1.0
    execution: Literal["fused", "textbook"] = "fused"
    cuda_graphs: bool = True

    @field_validator("eigenvalue", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        # YAML reads an off without quotation marks as false.
        return "off" if value is False else value


class DartsNetworkSettings(Settings):
    """Arguments of :class:`nni_cream.models.darts.DartsNetwork`: how large the network of a genotype becomes."""

    channels: Channels = 36
    cells: Cells = 20
    stem: Literal["cifar", "imagenet"] = "cifar"
    auxiliary: bool = False


class Ema(Settings):
    """The exponential moving average of the weights, ``timm.utils.ModelEmaV3``; without a ``decay`` there is none.

    In every step it keeps ``decay`` of itself and takes the rest from the network. With ``warmup`` it forgets the early
    steps faster: the decay is 1 - (1 + steps before)^(-2/3) as long as that is smaller.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    warmup: bool = True

    def timm_arguments(self) -> dict[str, Any] | None:
        """Return the settings under timm's names, or None where nothing is averaged."""
        return None if self.decay is None else {"decay": self.decay, "use_warmup": self.warmup}


class MixingSettings(Settings):
    """Arguments of :class:`nni_cream.mixing.Mixing`: ``mixup`` and ``cutmix`` are their α, 0 for none."""

    mixup: Annotated[float, Field(ge=0, le=1000)] = 0.0
    cutmix: Annotated[float, Field(ge=0, le=1000)] = 0.0
    prob: Share = 1.0
    switch_prob: Share = 0.5
    off_epoch: PositiveInt | None = None

    @property
    def wanted(self) -> bool:
        """Whether any images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _ends_what_there_is(self) -> MixingSettings:
        if self.off_epoch is not None and not self.wanted:
            raise ValueError(
                f"off_epoch is {self.off_epoch}, but with mixup and cutmix of 0 nothing is mixed: give one of them"
            )
        return self
