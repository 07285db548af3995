"""Recipes: every setting of a search, a training or a test, typed.

Nothing heavy is imported here, so that a wrong setting is named at once.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from nni_cream.settings import (
    UNROLLED,
    ChildData,
    Cream,
    Darts,
    DartsNetworkSettings,
    DartsSpaceSettings,
    Data,
    Device,
    Ema,
    EvaluationData,
    Flops,
    Latency,
    MixingSettings,
    NotNegative,
    Optimizer,
    PositiveFloat,
    PositiveInt,
    Schedule,
    SearchData,
    Settings,
    Space,
    TrainingDevice,
)


class Recipe(Settings):
    """What a search and a training have in common.

    A checkpoint is written after every epoch, and after a step when ``checkpoint_minutes`` have passed since the last.
    A step whose loss or gradient is not finite ends it, but for the first ``skip_bad_steps`` of those, which are left
    out.
    """

    # File systems take names of up to 255 bytes.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    # NumPy takes no larger seed.
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    epochs: PositiveInt
    checkpoint_minutes: PositiveFloat = 10.0
    skip_bad_steps: Annotated[int, Field(ge=0)] = 0
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    device: Device = Device()

    @model_validator(mode="after")
    def _learning_rate_falls(self) -> Recipe:
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs}, but the learning rate falls after it and "
                f"epochs is {self.epochs}: make it smaller"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr is {self.schedule.min_lr:g}, above optimizer.lr {self.optimizer.lr:g}")
        return self

    @model_validator(mode="after")
    def _scaled_gradients_are_clipped(self) -> Recipe:
        # A fused step takes the scale of the loss off by itself, too late for whoever clips before it, and Lightning
        # refuses it in bf16-mixed too.
        if self.device.precision != "32-true" and self.optimizer.execution == "fused":
            raise ValueError(
                f"optimizer.execution is 'fused', which cannot clip the gradients of device.precision "
                f"{self.device.precision}; take foreach"
            )
        return self

    @model_validator(mode="after")
    def _devices_share_a_batch(self) -> Recipe:
        if self.data.batch_size % self.device.devices:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}, but the {self.device.devices} of device.devices share "
                "every batch: make it a multiple of that"
            )
        return self


class CreamRecipe(Recipe):
    """A Cream search."""

    data: SearchData = SearchData()
    flops: Flops
    latency: Latency = Latency()
    space: Space = Space()
    cream: Cream = Cream()

    @model_validator(mode="after")
    def _fits(self) -> CreamRecipe:
        if self.cream.warmup_epochs >= self.epochs:
            raise ValueError(
                f"cream.warmup_epochs is {self.cream.warmup_epochs}, but the board opens after it and epochs is "
                f"{self.epochs}: make it smaller"
            )
        slices = 2 if self.cream.teacher == "matching" else 1
        if slices * self.cream.board_images > self.data.batch_size:
            raise ValueError(
                f"cream.board_images is {self.cream.board_images}, but "
                + (
                    "learning to match takes two slices of that size"
                    if slices == 2
                    else "an entry keeps as many images"
                )
                + f" from a batch and data.batch_size is {self.data.batch_size}: make it at most "
                + ("half of that" if slices == 2 else "as much")
            )
        return self


class DartsRecipe(Recipe):
    """A DARTS search."""

    space: DartsSpaceSettings = DartsSpaceSettings()
    darts: Darts = Darts()

    @model_validator(mode="after")
    def _fits(self) -> DartsRecipe:
        if self.darts.warmup_epochs >= self.epochs:
            raise ValueError(
                f"darts.warmup_epochs is {self.darts.warmup_epochs}, but α learns after it and epochs is "
                f"{self.epochs}: make it smaller"
            )
        if self.darts.order == "second" and self.optimizer.name.lower() not in UNROLLED:
            raise ValueError(
                f"optimizer.name is {self.optimizer.name!r}, but darts.order: second unrolls a step of "
                f"{' or '.join(UNROLLED)}"
            )
        if self.data.resolution % 4:
            raise ValueError(
                f"data.resolution is {self.data.resolution}, but the two reduction cells halve it twice: make it a "
                "multiple of 4"
            )
        if self.space.concat is not None and self.space.concat > self.space.nodes:
            raise ValueError(f"space.concat is {self.space.concat}, but a cell has space.nodes = {self.space.nodes}")
        return self


class RetrainRecipe(Recipe):
    """The training of one network.

    ``rank`` says which of the paths that a search found, 1 being the best; ``darts`` is for genotypes, whose drop path
    rises from 0 to its rate. With ``ema.decay`` the averaged weights are the result, beside the plain ones.
    """

    rank: PositiveInt = 1
    data: ChildData = ChildData()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_clip: PositiveFloat | None = None
    auxiliary_weight: NotNegative = 0.4
    inherit_weights: bool = False
    mixing: MixingSettings = MixingSettings()
    ema: Ema = Ema()
    device: TrainingDevice = TrainingDevice()
    darts: DartsNetworkSettings = DartsNetworkSettings()

    @model_validator(mode="after")
    def _images_are_mixed_in_pairs(self) -> RetrainRecipe:
        if self.mixing.wanted and self.data.batch_size % 2:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size}, but mixing.mixup and mixing.cutmix take the images of a "
                "batch in pairs: make it even"
            )
        return self


class EvaluationRecipe(Settings):
    """The test of a checkpoint."""

    data: EvaluationData = EvaluationData()
    device: Device = Device()

    @model_validator(mode="after")
    def _one_device(self) -> EvaluationRecipe:
        # On several, some images would count twice, so that every device has as many.
        if self.device.devices != 1:
            raise ValueError(f"device.devices is {self.device.devices}, but a checkpoint is tested on one device")
        return self
