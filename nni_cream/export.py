"""Networks for programs that have no PyTorch, or not ours: ONNX, ``torch.export`` and TorchScript.

A file is only written once it has given the logits of the network itself, for photographs and for random images, in
batches of two sizes. It says what it is of and how images are prepared for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image, ImageOps
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from nni_cream.child import AVERAGED, plain_beside, read_notes, weights_beside
from nni_cream.cost import measure_network
from nni_cream.data import preparation
from nni_cream.data_checks import class_names
from nni_cream.errors import UserError
from nni_cream.evaluate import Checkpoint, load_checkpoint
from nni_cream.runs import write_atomically
from nni_cream.settings import LARGEST_RESOLUTION, EvaluationData

# The endings of their files.
FORMATS: Final = {"onnx": ".onnx", "export": ".pt2", "torchscript": ".pt"}
FORMAT: Final = "nni_cream.export/1"
# Where formats other than ONNX keep what ONNX has a place for.
NOTES_FILE: Final = "nni_cream.json"
# What the notes say of weights that are no averages.
PLAIN: Final = "plain"
# How much of the largest logit another may be off.
TOLERANCE: Final = 1e-4
# Photographs and their mirror images, and as many random images.
CHECKED_IMAGES: Final = 4

# The endings of what is exported, which are left out of the name of an export; others may be a part of a version.
_ENDING: Final = re.compile(r"(?<=.)\.(safetensors|json|pth|pt|ckpt|bin|th)(\.tar)?$", re.IGNORECASE)
_NAMES: Final = ("images", "logits")
_BATCH: Final = "batch"

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the file.
        network: the text of its path or genotype, or timm's name of it.
        form: one of :data:`FORMATS`.
        resolution: height and width of the images, in pixels.
        num_classes: number of logits.
        opset: version of ONNX's operators; None in other formats.
        difference: the largest difference of a logit from the network's own, as a share of the largest logit.
    """

    file: Path
    network: str
    form: str
    resolution: int
    num_classes: int
    opset: int | None
    difference: float


def file_beside(file: Path, form: str) -> Path:
    """Return where a checkpoint is exported to if nobody says where: beside it, under its name.

    Raises:
        UserError: if there is no such format.
    """
    if form not in FORMATS:
        raise UserError(f"There is no format {form!r} to export to; there are {', '.join(FORMATS)}.")
    return file.with_name(_ENDING.sub("", file.name) + FORMATS[form])


def export_checkpoint(
    file: Path,
    model: str | None = None,
    *,
    use_ema: bool = True,
    output: Path | None = None,
    form: str = "onnx",
    resolution: int | None = None,
    opset: int | None = None,
) -> Exported:
    """Write the network in ``file`` for other programs: images [batch, 3, R, R] to logits [batch, classes].

    Args:
        file: a checkpoint, or the ``child.json`` beside one.
        model: timm's name of the network, which a foreign checkpoint needs.
        use_ema: take the averaged weights of a checkpoint that has both.
        output: the file to write; None for one beside ``file``, which has another name for the plain weights of a
            checkpoint that has both, and replaces nothing but another export.
        form: one of :data:`FORMATS`.
        resolution: height and width R of the images, in pixels; None for those that it was trained or searched with.
        opset: version of ONNX's operators; None for PyTorch's choice.

    Raises:
        UserError: as :func:`nni_cream.evaluate.load_checkpoint`; if the network cannot take such images; if there is no
            such format or opset; if what would be written differs from the network by more than :data:`TOLERANCE`; or
            if it would replace what is exported, or without ``output`` a file that is no export. Nothing is written
            then.
    """
    beside = file_beside(file, form)
    if opset is not None and form != "onnx":
        raise UserError(f"An opset is a version of ONNX's operators, which the format {form!r} does not have.")
    if resolution is not None and not 1 <= resolution <= LARGEST_RESOLUTION:
        raise UserError(f"The resolution is {resolution} pixels, but should be from 1 to {LARGEST_RESOLUTION}.")
    checkpoint = load_checkpoint(file, model, use_ema=use_ema)
    source = weights_beside(file) if file.suffix == ".json" else file
    averaged, has_both = _weights_in(source, use_ema)
    to = output or (plain_beside(beside) if has_both and not averaged else beside)
    if to.resolve() in (file.resolve(), source.resolve()):
        raise UserError(f"{to} is what is to be exported, and would be overwritten; give another --output.")
    if output is None and to.is_file() and not _is_export(to):
        raise UserError(f"{to} exists and is no export of a network, so that it is kept; say with --output where to.")
    prepared = _preparation(checkpoint, resolution)
    network = _for_evaluation(checkpoint.network)
    measure_network(network, prepared["input_size"][-1])

    images = check_images(prepared)
    notes = {**_notes(checkpoint, prepared), "weights": AVERAGED if averaged else PLAIN}
    with warnings.catch_warnings(), _errors_only("torch.onnx", "onnxscript"):
        # What PyTorch's exporters say of their own code, and that sizes become constants, as they should.
        for category in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore", category)
        content, run, found = _EXPORTERS[form](network, images[:2], notes, opset)
    difference = largest_difference(network, run, images)
    if not difference <= TOLERANCE:
        raise UserError(
            f"As {form}, the network of {file} gives other logits: they are off by {difference:.1e} of the largest, "
            f"where {TOLERANCE:g} is allowed; try another --format, --opset or --resolution."
        )
    write_atomically(to, lambda temporary: temporary.write_bytes(content))
    return Exported(
        file=to,
        network=checkpoint.name,
        form=form,
        resolution=prepared["input_size"][-1],
        num_classes=checkpoint.num_classes,
        opset=found,
        difference=difference,
    )


def _weights_in(file: Path, use_ema: bool) -> tuple[bool, bool]:
    """Tell whether averaged weights are taken of a checkpoint, which can be read, and whether it has both kinds.

    Plain ones of ours lie beside the averaged.
    """
    if file.suffix == ".safetensors":
        has_averaged = read_notes(file).get("weights") == AVERAGED
        return has_averaged and use_ema, has_averaged and plain_beside(file).is_file()
    # The keys by which timm chooses; on meta, because the weights themselves have been read.
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        content = torch.load(file, map_location="meta", weights_only=True)
    has_averaged = any(content.get(key) is not None for key in ("state_dict_ema", "model_ema"))
    return has_averaged and use_ema, has_averaged and any(key in content for key in ("state_dict", "model"))


def _is_export(file: Path) -> bool:
    # Every format keeps the notes as they are, so that nothing has to be loaded for them.
    return FORMAT.encode() in file.read_bytes()


@contextlib.contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    # They warn of an opset that they cannot write, and then write another: that is told in one sentence here.
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def print_exported(exported: Exported) -> None:
    """Tell a person what was written, and how exact it is."""
    size = exported.resolution
    opset = "" if exported.opset is None else f", opset {exported.opset}"
    print(f"network:    {exported.network}")
    print(f"format:     {exported.form}{opset}")
    print(f"takes:      images [batch, 3, {size}, {size}]")
    print(f"gives:      logits [batch, {exported.num_classes}]")
    print(
        f"difference: at most {exported.difference:.1e} of the largest logit, for {CHECKED_IMAGES} photographs and "
        f"{CHECKED_IMAGES} random images"
    )
    print(f"file:       {exported.file.resolve()}", flush=True)


def check_images(prepared: Mapping[str, Any]) -> Tensor:
    """Return what exports are compared on, [8, 3, R, R]: two photographs, their mirror images, and random images.

    Args:
        prepared: arguments of ``timm.data.create_transform``.
    """
    from sklearn.datasets import load_sample_images

    transform = create_transform(**prepared)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    real = [transform(image) for photograph in photographs for image in (photograph, ImageOps.mirror(photograph))]
    assert len(real) == CHECKED_IMAGES
    noise = torch.randn(CHECKED_IMAGES, *real[0].shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.stack(real), noise])


@torch.no_grad()
def largest_difference(network: nn.Module, run: Run, images: Tensor) -> float:
    """Compare ``run`` with ``network`` on ``images``, all together and the first alone.

    Returns:
        The largest difference between two logits, as a share of the largest logit.

    Raises:
        UserError: if the network itself gives something else than numbers.
    """
    differences = []
    for batch in (images, images[:1]):
        expected, found = network(batch), run(batch)
        if not expected.isfinite().all():
            raise UserError("The network gives logits that are no numbers, so that there is nothing to export.")
        if found.shape != expected.shape:
            return float("inf")
        differences.append((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo().tiny))
    # Of numbers and a NaN, torch's largest is the NaN.
    return torch.stack(differences).max().item()


def _preparation(checkpoint: Checkpoint, resolution: int | None) -> dict[str, Any]:
    if checkpoint.data is None:
        size = None if resolution is None else (3, resolution, resolution)
        config: dict[str, Any] = resolve_data_config(
            {"input_size": size}, pretrained_cfg=checkpoint.network.default_cfg
        )
        return config
    data = EvaluationData().completed(checkpoint.data)
    return preparation(data.name, resolution or data.resolution, data.augmentation.interpolation)


def _for_evaluation(network: Any) -> nn.Module:
    if getattr(network, "auxiliary_head", None) is not None:
        network.auxiliary_head = None
    evaluated: nn.Module = network.eval().requires_grad_(False)
    return evaluated


def _notes(checkpoint: Checkpoint, prepared: Mapping[str, Any]) -> dict[str, str]:
    shown = ("input_size", "mean", "std", "interpolation", "crop_pct")
    notes = {
        "format": FORMAT,
        "architecture": checkpoint.name,
        "num_classes": json.dumps(checkpoint.num_classes),
        **{name: json.dumps(prepared[name]) for name in shown},
    }
    if checkpoint.data is not None:
        notes["data"] = json.dumps(checkpoint.data["name"])
        if (names := class_names(checkpoint.data)) is not None:
            notes["class_names"] = json.dumps(names)
    return notes


def _as_onnx(
    network: nn.Module, images: Tensor, notes: Mapping[str, str], opset: int | None
) -> tuple[bytes, Run, int | None]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(
            f"ONNX needs packages that are not there ({error}); pip install onnx onnxruntime onnxscript brings them."
        ) from error
    image, logits = _NAMES
    try:
        program: Any = torch.onnx.export(
            network,
            (images,),
            input_names=[image],
            output_names=[logits],
            dynamic_shapes=({0: torch.export.Dim(_BATCH)},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        model = program.model_proto
        found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset not in (None, found):
            raise UserError(f"PyTorch cannot write ONNX with opset {opset} for this network, but with {found}.")
        onnx.helper.set_model_props(model, dict(notes))
        content: bytes = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except UserError:
        raise
    # Neither has an exception of its own for what it does not support.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UserError(
            f"The network cannot be written as ONNX{'' if opset is None else f' with opset {opset}'}: {reason}."
        ) from error

    def run(batch: Tensor) -> Tensor:
        (output,) = session.run([logits], {image: batch.numpy()})
        return torch.from_numpy(output)

    return content, run, found


def _as_export(
    network: nn.Module, images: Tensor, notes: Mapping[str, str], _opset: int | None
) -> tuple[bytes, Run, int | None]:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim(_BATCH)},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={NOTES_FILE: json.dumps(dict(notes))})
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module(), None


def _as_torchscript(
    network: nn.Module, images: Tensor, notes: Mapping[str, str], _opset: int | None
) -> tuple[bytes, Run, int | None]:
    traced = torch.jit.trace(network, images, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={NOTES_FILE: json.dumps(dict(notes))})
    content = buffer.getvalue()
    return content, torch.jit.load(io.BytesIO(content)), None


_EXPORTERS: Final[
    Mapping[str, Callable[[nn.Module, Tensor, Mapping[str, str], int | None], tuple[bytes, Run, int | None]]]
] = {"onnx": _as_onnx, "export": _as_export, "torchscript": _as_torchscript}
