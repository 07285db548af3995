"""The Cream networks: stage table, choices, and discrete networks built on timm's ``MobileNetV3``.

Source: Peng et al., "Cream of the Crop: Distilling Prioritized Paths For One-Shot Neural Architecture Search",
NeurIPS 2020, and the block table of its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, efficientnet_init_weights, round_channels
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv
from torch import nn

from nni_cream.architecture import CreamPath
from nni_cream.errors import UserError
from nni_cream.models.operations import DilConv, defined_again

ResidualUnitKind = Literal["bottleneck", "basic"]
# What builds an operation, of (in_channels, out_channels, stride).
Builder = Callable[[int, int, int], Any]

_SQUEEZE_EXCITE = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=round_channels)


@dataclass(frozen=True)
class Choice:
    """One operation that every block offers: an inverted residual (kernel size, expansion ratio)."""

    kernel: int
    expansion: int

    def build(self, in_channels: int, out_channels: int, stride: int) -> InvertedResidual:
        """Build it: [N, in, H, W] to [N, out, H / stride, W / stride]."""
        return InvertedResidual(
            in_channels,
            out_channels,
            dw_kernel_size=self.kernel,
            stride=stride,
            exp_ratio=self.expansion,
            act_layer=nn.SiLU,
            se_layer=partial(_SQUEEZE_EXCITE, rd_ratio=0.25),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class DilConvChoice:
    """An operation that blocks may offer besides: a dilated depthwise-separable convolution (kernel size)."""

    kernel: int

    def build(self, in_channels: int, out_channels: int, stride: int) -> DilConv:
        """Build it: [N, in, H, W] to [N, out, H / stride, W / stride]."""
        return DilConv(in_channels, out_channels, self.kernel, stride)


@dataclass(frozen=True)
class ResidualUnitChoice:
    """An operation that blocks may offer besides: a residual unit of ResNet.

    ``bottleneck`` is 1×1, 3×3, 1×1 with a quarter of the output's channels inside, as published; ``basic`` is 3×3, 3×3.
    """

    kind: ResidualUnitKind

    def build(self, in_channels: int, out_channels: int, stride: int) -> Bottleneck | BasicBlock:
        """Build it: [N, in, H, W] to [N, out, H / stride, W / stride]."""
        shortcut = None
        if stride != 1 or in_channels != out_channels:
            shortcut = downsample_conv(in_channels, out_channels, kernel_size=1, stride=stride)
        if self.kind == "bottleneck":
            return Bottleneck(in_channels, out_channels // Bottleneck.expansion, stride, shortcut)
        return BasicBlock(in_channels, out_channels, stride, shortcut)


@dataclass(frozen=True)
class OwnChoice:
    """An operation that somebody has added with :func:`register_block_operation`."""

    name: str
    builder: Builder

    def build(self, in_channels: int, out_channels: int, stride: int) -> nn.Module:
        """Build it: [N, in, H, W] to [N, out, H / stride, W / stride]."""
        operation: nn.Module = self.builder(in_channels, out_channels, stride)
        return operation


@dataclass(frozen=True)
class Stage:
    """One stage of choice blocks. Only its first block has the stride.

    ``kernel`` and ``expansion`` are those of the published stage table; they matter only for published networks.
    """

    channels: int
    stride: int
    kernel: int
    expansion: int


CHOICES: Final = (Choice(3, 4), Choice(3, 6), Choice(5, 4), Choice(5, 6), Choice(7, 4), Choice(7, 6))
DIL_CONVS: Final = (DilConvChoice(3), DilConvChoice(5))
RESIDUAL_UNITS: Final = (ResidualUnitChoice("bottleneck"), ResidualUnitChoice("basic"))

# A path names these by their position here, whether or not the supernet it was found in offered all of them.
OPERATIONS: Final = (*CHOICES, *DIL_CONVS, *RESIDUAL_UNITS)

STAGES: Final = (
    Stage(channels=24, stride=2, kernel=3, expansion=4),
    Stage(channels=40, stride=2, kernel=5, expansion=4),
    Stage(channels=80, stride=2, kernel=3, expansion=6),
    Stage(channels=96, stride=1, kernel=3, expansion=6),
    Stage(channels=192, stride=2, kernel=5, expansion=6),
)

STEM_CHANNELS: Final = 16
FIRST_STAGE: Final = "ds_r1_k3_s1_e1_c16_se0.25"
LAST_STAGE: Final = "cn_r1_k1_s1_c320_se0.25"
HEAD_FEATURES: Final = 1280


Operation = Choice | DilConvChoice | ResidualUnitChoice | OwnChoice

# Lower numbers are for operations that may come with the package one day.
FIRST_OWN_NUMBER: Final = 100
_OWN: Final[dict[int, OwnChoice]] = {}


def known_operations() -> dict[int, Operation]:
    """Return all operations by the number that a path names them by: the package's, and those registered."""
    return {**dict(enumerate(OPERATIONS)), **_OWN}


def own_operations(names: Sequence[str]) -> tuple[OwnChoice, ...]:
    """Return registered operations by their names.

    Raises:
        UserError: if there is none of a name, or one is named twice.
    """
    known = {choice.name: choice for choice in _OWN.values()}
    for name in names:
        if name not in known:
            raise UserError(
                f"There is no block operation {name!r}; of your own there are {', '.join(known) or 'none'}, and those "
                "registered by a file that --import names."
            )
        if names.count(name) > 1:
            raise UserError(f"The operation {name!r} is to be offered twice; name it once.")
    return tuple(known[name] for name in names)


def register_block_operation(name: str, *, number: int) -> Callable[[Builder], Builder]:
    """Let paths and spaces name an operation of your own: a decorator for the function that builds it.

    The function takes (in_channels, out_channels, stride) and returns a module that maps [N, in, H, W] to [N, out,
    H / stride, W / stride], for every place of :data:`STAGES`. Its weights are initialised as those of timm's
    EfficientNets. It is no ``nn.Identity``, which stands for a block that is left out.

    Args:
        name: what the setting ``space.operations`` and pictures call it. A function that is defined once more, as in a
            notebook, takes its own place.
        number: what paths call it, from 100 upwards. Files keep it, so it has to stay.

    Raises:
        UserError: if name or number are taken or none, or, when the function is decorated, if what it builds is not as
            described.
    """
    if not name.isidentifier():
        raise UserError(f"An operation cannot be called {name!r}; a name such as fused_3x3 is expected.")
    if type(number) is not int or number < FIRST_OWN_NUMBER:
        raise UserError(
            f"The number of the operation {name!r} is {number}; numbers of your own begin at {FIRST_OWN_NUMBER}."
        )

    def register(builder: Builder) -> Builder:
        for taken, choice in _OWN.items():
            same = (taken == number, choice.name == name)
            if any(same) and not (all(same) and defined_again(choice.builder, builder)):
                raise UserError(
                    f"There is an operation {choice.name!r} of number {taken} already; give yours another name and "
                    "another number."
                )
        choice = OwnChoice(name, builder)
        _check(choice)
        _OWN[number] = choice
        return builder

    return register


def _check(choice: OwnChoice) -> None:
    in_channels = STEM_CHANNELS
    for stage in STAGES:
        for source, stride in ((in_channels, stage.stride), (stage.channels, 1)):
            with torch.device("meta"):
                block = choice.build(source, stage.channels, stride)
                features = torch.empty(2, source, 8, 8)
            if isinstance(block, nn.Identity):
                raise UserError(
                    f"The operation {choice.name!r} is an nn.Identity, which stands for a block that is left out: "
                    "offer that with skip."
                )
            made, expected = tuple(block(features).shape), (2, stage.channels, 8 // stride, 8 // stride)
            if made != expected:
                raise UserError(
                    f"The operation {choice.name!r} makes {list(made)} of {list(features.shape)} at stride {stride}, "
                    f"but {list(expected)} is needed."
                )
        in_channels = stage.channels


@dataclass(frozen=True)
class PublishedNetwork:
    """A network of the paper: its path and the resolution (pixels) that it was trained at."""

    path: CreamPath
    resolution: int


# The configurations named 23 and 72 were published without an architecture, so they cannot be here.
PUBLISHED: Final = {
    name: PublishedNetwork(CreamPath.parse(path), resolution)
    for name, resolution, path in (
        ("cream_14", 64, "[0] [3] [3,3] [3,3] [3] [3] [0]"),
        ("cream_43", 96, "[0] [3] [3,1] [3,1] [3,3,3] [3,3] [0]"),
        ("cream_114", 160, "[0] [3] [3,3] [3,3] [3,3,3] [3,3] [0]"),
        ("cream_287", 224, "[0] [3] [3,3] [3,1,3] [3,3,3,3] [3,3,3] [0]"),
        ("cream_481", 224, "[0] [3,4,3,1] [3,2,3,0] [3,3,3,1,1] [3,3,3,3] [3,3,3,3] [0]"),
        ("cream_604", 224, "[0] [3,3,2,3,3] [3,2,3,2,3] [3,2,3,2,3] [3,3,2,2,3,3] [3,3,2,3,3,3] [0]"),
    )
}


def block_strings(path: CreamPath, *, published: bool = False) -> list[list[str]]:
    """Write ``path`` in timm's block notation, one list a stage.

    The notation has no word for the operations beyond :data:`CHOICES`; :func:`build_child` puts them in place of the
    stage table's own block, which stands for them here.

    Args:
        path: seven stages, the first and last ``[0]``.
        published: build as the published code does, which ignores the choice where a stage has a single block and
            keeps the stage table's kernel and expansion there. The published parameter counts need this.

    Raises:
        UserError: if the path does not fit the stage table or names a choice that does not exist.
    """
    if len(path.stages) != len(STAGES) + 2:
        raise UserError(f"The Cream path {path} has {len(path.stages)} stages, but the stage table has 7.")
    if path.stages[0] != (0,) or path.stages[-1] != (0,):
        raise UserError(f"The Cream path {path} must begin and end with [0]: these stages have a single choice.")
    known = known_operations()
    rows = [[FIRST_STAGE]]
    for number, (stage, chosen) in enumerate(zip(STAGES, path.stages[1:-1], strict=True), start=1):
        row = []
        for block, index in enumerate(chosen):
            if index not in known:
                own = "; those of your own are known once a file that --import names has registered them"
                raise UserError(
                    f"Stage {number} of the Cream path names choice {index}, "
                    f"but choices go from 0 to {len(OPERATIONS) - 1}{own if index >= FIRST_OWN_NUMBER else ''}."
                )
            choice = known[index]
            if not isinstance(choice, Choice) or (published and len(chosen) == 1):
                choice = Choice(stage.kernel, stage.expansion)
            stride = stage.stride if block == 0 else 1
            row.append(f"ir_r1_k{choice.kernel}_s{stride}_e{choice.expansion}_c{stage.channels}_se0.25")
        rows.append(row)
    return [*rows, [LAST_STAGE]]


def network_arguments(strings: list[list[str]]) -> dict[str, Any]:
    """Return the arguments with which timm's ``MobileNetV3`` is the Cream network of these block strings."""
    return {
        "block_args": decode_arch_def(strings),
        "stem_size": STEM_CHANNELS,
        "fix_stem": False,
        "num_features": HEAD_FEATURES,
        "head_bias": True,
        "head_norm": False,
        "act_layer": nn.SiLU,
        "se_from_exp": True,
        "round_chs_fn": round_channels,
        "se_layer": _SQUEEZE_EXCITE,
    }


def build_child(path: CreamPath, *, num_classes: int, **arguments: Any) -> MobileNetV3:
    """Build the network of a searched path: [N, 3, R, R] to logits [N, num_classes].

    Args:
        path: the path.
        num_classes: number of classes; 0 for features in place of logits.
        arguments: further ones of timm's ``MobileNetV3``, such as ``drop_rate``.

    Raises:
        UserError: as :func:`block_strings`.
    """
    network = MobileNetV3(num_classes=num_classes, **{**network_arguments(block_strings(path)), **arguments})
    blocks: Any = network.blocks
    for stage, chosen in zip(blocks, path.stages, strict=True):
        for position, index in enumerate(chosen):
            if index >= len(CHOICES):
                placeholder = stage[position]
                block: Any = known_operations()[index].build(
                    placeholder.conv_pw.in_channels, placeholder.conv_pwl.out_channels, placeholder.conv_dw.stride[0]
                )
                efficientnet_init_weights(block)
                block.to(placeholder.conv_pw.weight)
                if hasattr(block, "drop_path"):
                    block.drop_path = placeholder.drop_path
                stage[position] = block
    return network


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "num_classes": 1000,
            "input_size": (3, network.resolution, network.resolution),
            "pool_size": (network.resolution // 32,) * 2,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "origin_url": "https://github.com/microsoft/Cream",
            "paper_ids": "arXiv:2010.15821",
        }
        for name, network in PUBLISHED.items()
    }
)


def _published(variant: str, pretrained: bool, **kwargs: Any) -> MobileNetV3:
    arguments = network_arguments(block_strings(PUBLISHED[variant].path, published=True))
    model: MobileNetV3 = build_model_with_cfg(
        MobileNetV3, variant, pretrained, feature_cfg={"feature_cls": "getter"}, **{**arguments, **kwargs}
    )
    return model


@register_model
def cream_14(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """Build Cream's 14 M network (64 px, 2.67 M parameters with 1,000 classes)."""
    return _published("cream_14", pretrained, **kwargs)


@register_model
def cream_43(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """Build Cream's 43 M network (96 px, 4.40 M parameters with 1,000 classes)."""
    return _published("cream_43", pretrained, **kwargs)


@register_model
def cream_114(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """Build Cream's 114 M network (160 px, 4.41 M parameters with 1,000 classes)."""
    return _published("cream_114", pretrained, **kwargs)


@register_model
def cream_287(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """Build Cream's 287 M network (224 px, 6.04 M parameters with 1,000 classes)."""
    return _published("cream_287", pretrained, **kwargs)


@register_model
def cream_481(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """Build Cream's 481 M network (224 px, 7.71 M parameters with 1,000 classes)."""
    return _published("cream_481", pretrained, **kwargs)


@register_model
def cream_604(pretrained: bool = False, **kwargs: Any) -> MobileNetV3:
    """Build Cream's 604 M network (224 px, 9.70 M parameters with 1,000 classes)."""
    return _published("cream_604", pretrained, **kwargs)
