"""Training of one network, found or published, as its trial runs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from nni_cream.checkpoints import find_checkpoint
from nni_cream.child import Candidate, Child, build_network, load_weights, plain_beside, save_network
from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.mixing import Mixing
from nni_cream.models.darts import DartsNetwork
from nni_cream.ranks import is_first
from nni_cream.recipe import RetrainRecipe
from nni_cream.recipe_files import complaint
from nni_cream.report import leave_report, show_report
from nni_cream.reporting import Reporter, on_terminal
from nni_cream.runs import RunDirectory, read_json, write_json
from nni_cream.search import arrange_in_memory, claim, load_splits, make_loader, make_trainer, make_training_loader
from nni_cream.training import ImageClassifier
from nni_cream.trouble import named_batch


def retrain(recipe: RetrainRecipe, candidate: Candidate, directory: RunDirectory) -> float:
    """Train, test, and write the trained network and a report into ``directory``.

    With averaged weights ``model.safetensors`` and the result are theirs; the plain ones are beside it.

    Returns:
        The accuracy on the test part, which neither the search nor this training has seen, in [0, 1].

    Raises:
        UserError: if inherited weights are asked for and there are none that fit, or a network that changes is to be
            compiled.
    """
    result_file = directory.path / "result.json"
    reporter = Reporter(directory.path, quiet=on_terminal())
    if result_file.exists():
        print(f"{directory.path} holds a training that has ended; choose another folder with --name for a new one.")
        result = read_result(result_file)
        if is_first():
            # NNI starts a trial again whose end it has not seen.
            reporter.deliver()
            reporter.final(_told_to_nni(result))
            show_report(recipe, directory)
        return print_result(result)

    child = candidate.load(recipe.rank)
    try:
        data = recipe.data.completed(child.data if child else {})
    except UserError as error:
        raise UserError(f"{candidate.file}: {error}" if child else str(error)) from None
    pl.seed_everything(recipe.seed, verbose=False)
    splits = load_splits(data, recipe.seed)
    name = str(child.architecture) if child else candidate.name
    size: dict[str, Any] = {}
    if name.startswith("Genotype("):
        size = {"kind": "trained", **recipe.darts.model_dump()}
    try:
        network = build_network(
            name, splits.num_classes, size, drop_rate=recipe.drop_rate, drop_path_rate=recipe.drop_path_rate
        )
    except UserError as error:
        raise UserError(f"{candidate.file}: {error}" if child else str(error)) from None
    if recipe.inherit_weights:
        _inherit(network, candidate.file, child, splits.num_classes, recipe.rank)
    cost = measure_network(network, data.resolution)
    refuse_resolution(network, data.resolution)
    arrange_in_memory(network, recipe.device)
    if recipe.device.compile != "off":
        if recipe.drop_path_rate and hasattr(network, "set_drop_path_rate"):
            raise UserError(
                f"device.compile is {recipe.device.compile!r}, but a network whose drop path rises would be compiled "
                "anew in every epoch: leave it off, or make drop_path_rate 0."
            )
        network.compile(mode=recipe.device.compile)

    module = ImageClassifier(
        splits.num_classes,
        recipe.optimizer.timm_arguments(),
        recipe.schedule.timm_arguments(),
        recipe.label_smoothing,
        recipe.auxiliary_weight,
        recipe.drop_path_rate,
        mixing=_mixing(recipe, splits.num_classes),
        ema=recipe.ema.timm_arguments(),
    )
    module.set_model(network)
    checkpoint = find_checkpoint(directory)
    trainer = make_trainer(recipe, directory, checkpoint, gradient_clip_val=recipe.gradient_clip)
    training, validation = splits.retraining_parts()
    training_loader = make_training_loader(training, data, recipe.seed, recipe.device)
    validation_loader = make_loader(validation, data, recipe.device)

    claim(directory, recipe, splits)
    reporter.install()
    with named_batch(data.batch_size, recipe.device.devices):
        trainer.fit(module, training_loader, validation_loader, ckpt_path=checkpoint)
    # Measured again, because a training that was interrupted after its last epoch has no metrics of it any more.
    (validated,) = trainer.validate(module, validation_loader, verbose=False)
    (tested,) = trainer.test(module, make_loader(splits.test, data, recipe.device), verbose=False)

    result = {
        "network": name,
        **{key: value for key, value in tested.items() if not key.endswith("_loss")},
        **{key: value for key, value in validated.items() if key.endswith("_accuracy")},
        "flops": cost.macs,
        "params": cost.params,
        "data": data.model_dump(mode="json"),
        "folder": str(directory.path.resolve()),
    }
    if not is_first():
        return float(tested["test_accuracy"])
    notes: dict[str, Any] = {
        "architecture": name,
        "num_classes": splits.num_classes,
        "data": data.model_dump(mode="json"),
        "size": size,
    }
    file = directory.path / "model.safetensors"
    if module.ema is None:
        save_network(file, network, **notes)
    else:
        save_network(plain_beside(file), network, **notes)
        save_network(file, module.ema.module, averaged=True, **notes)
    write_json(result_file, result)
    reporter.final(_told_to_nni(result))
    leave_report(recipe, directory)
    return print_result(result)


def _mixing(recipe: RetrainRecipe, num_classes: int) -> Mixing | None:
    if not recipe.mixing.wanted:
        return None
    return Mixing(num_classes, label_smoothing=recipe.label_smoothing, **recipe.mixing.model_dump())


class _Result(BaseModel):
    """What is read of ``result.json``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    network: str
    folder: str
    test_accuracy: float
    test_plain_accuracy: float | None = None
    val_accuracy: float
    val_plain_accuracy: float | None = None
    flops: int
    params: int


def read_result(file: Path) -> dict[str, Any]:
    """Read what a training has ended with; accuracies of plain weights are there where others were averaged.

    Raises:
        UserError: if the file is no result of a training.
    """
    try:
        return _Result.model_validate(read_json(file, "result of a training")).model_dump(exclude_none=True)
    except ValidationError as error:
        reason = f"{file} is not a result of a training: {complaint(error, _Result)}"
    except UserError as error:
        reason = str(error)
    raise UserError(f"{reason.rstrip('.')}; remove it, and the same command measures it again.") from None


def _told_to_nni(result: dict[str, Any]) -> dict[str, Any]:
    # A tuner may steer by the validation part; the test part is for people.
    told = ("val_accuracy", "val_plain_accuracy", "test_accuracy", "test_plain_accuracy", "flops", "params", "network")
    return {"default": result["val_accuracy"], **{key: result[key] for key in told if key in result}}


def refuse_resolution(network: nn.Module, resolution: int) -> None:
    """Make sure that ``network`` can be trained at this resolution, which those of genotypes halve twice or more.

    Raises:
        UserError: if it cannot.
    """
    if isinstance(network, DartsNetwork):
        copy.deepcopy(network).to("meta").train()(torch.empty(2, 3, resolution, resolution, device="meta"))


def print_result(result: dict[str, object]) -> float:
    """Tell a person how good the network is, the averaged weights last, and return its test accuracy."""
    accuracy = result["test_accuracy"]
    assert isinstance(accuracy, float)
    print(f"network: {result['network']}")
    print(f"folder: {result['folder']}")
    if "test_plain_accuracy" in result:
        print(f"test accuracy of the plain weights: {result['test_plain_accuracy']:.4f}")
    print(f"test accuracy: {accuracy:.4f}", flush=True)
    return accuracy


def _inherit(network: nn.Module, file: Path | None, child: Child | None, num_classes: int, rank: int) -> None:
    if file is None or child is None:
        raise UserError("inherit_weights is on, but without a --child of a search there are no weights to inherit.")
    if rank > 1:
        raise UserError(f"inherit_weights is on, but the search keeps the weights of rank 1 alone, and rank is {rank}.")
    if isinstance(child.architecture, Genotype):
        raise UserError(
            "inherit_weights is on, but the network that DARTS searches with is another than the one that is trained "
            "afterwards; leave it off for a genotype."
        )
    if child.num_classes != num_classes:
        raise UserError(
            f"inherit_weights is on, but {file} was searched with {child.num_classes} classes and the data has "
            f"{num_classes}; leave it off, or give the data of the search."
        )
    load_weights(network, file)
