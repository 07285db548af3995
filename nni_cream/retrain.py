"""Training of one network, found or published, as its trial runs it."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from nni_cream.architecture import CreamPath
from nni_cream.checkpoints import find_checkpoint
from nni_cream.child import Candidate, Child, build_network, load_weights, plain_beside, save_network
from nni_cream.cost import measure_network
from nni_cream.data_checks import has_the_same_test_part, names_another_folder, noted, warn_of_another_test_part
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.mixing import Mixing
from nni_cream.models.darts import DartsNetwork
from nni_cream.ranks import is_first
from nni_cream.recipe import RetrainRecipe
from nni_cream.recipe_files import complaint, to_yaml
from nni_cream.report import leave_report, show_report
from nni_cream.reporting import Reporter, on_terminal
from nni_cream.runs import RunDirectory, another_training, read_json, write_json
from nni_cream.search import arrange_in_memory, claim, load_splits, make_loader, make_trainer, make_training_loader
from nni_cream.settings import Data
from nni_cream.supernet.depthwise import with_explicit_derivatives
from nni_cream.training import ImageClassifier
from nni_cream.trouble import named_batch

_DIGEST_CHARACTERS: Final = 12


def retrain(recipe: RetrainRecipe, candidate: Candidate, directory: RunDirectory) -> float:
    """Train, test, and write the trained network and a report into ``directory``.

    With averaged weights ``model.safetensors`` and the result are theirs; the plain ones are beside it.

    Returns:
        The accuracy on the test part, which neither the search nor this training has seen, in [0, 1].

    Raises:
        UserError: as :func:`refuse_another_training`, :func:`build_for_training` and :func:`refuse_untrainable`, and if
            inherited weights are asked for and there are none that fit.
    """
    refuse_another_training(recipe, candidate, directory)
    result_file = directory.path / "result.json"
    reporter = Reporter(directory.path, quiet=on_terminal())
    if result_file.exists():
        print(f"{directory.path} holds a training that has ended; choose another folder with --name for a new one.")
        # The folder may have been moved since.
        result = {**read_result(result_file), "folder": str(directory.path.resolve())}
        if is_first():
            # NNI starts a trial again whose end it has not seen.
            reporter.deliver()
            reporter.final(_told_to_nni(result))
            show_report(recipe, directory)
        return print_result(result)

    child, name, data = _asked_for(recipe, candidate)
    pl.seed_everything(recipe.seed, verbose=False)
    splits = load_splits(data, recipe.seed)
    if child:
        warn_of_another_test_part(child.data, data, splits)
    try:
        network = build_for_training(recipe, name, splits.num_classes)
    except UserError as error:
        raise UserError(f"{candidate.file}: {error}" if child else str(error)) from None
    if recipe.inherit_weights:
        _inherit(network, candidate.file, child, splits.num_classes, recipe.rank)
    cost = measure_network(network, data.resolution)
    refuse_untrainable(recipe, network, data.resolution)
    arrange_in_memory(network, recipe.device)
    if recipe.device.compile != "off":
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
    # Faster there; but torch.compile cannot look into derivatives of our own.
    if trainer.strategy.root_device.type == "cpu" and recipe.device.compile == "off":
        with_explicit_derivatives(network)
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
        "data": noted(data, splits),
        "folder": str(directory.path.resolve()),
    }
    if not is_first():
        return float(tested["test_accuracy"])
    notes: dict[str, Any] = {
        "architecture": name,
        "num_classes": splits.num_classes,
        "data": noted(data, splits),
        "size": _size(recipe, name),
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


def refuse_another_training(recipe: RetrainRecipe, candidate: Candidate, directory: RunDirectory) -> None:
    """Make sure that ``directory`` is new or holds this very training, ended or not; write nothing.

    Raises:
        UserError: if it holds a training by another recipe or of another network, on other data or with other inherited
            weights; and if ``candidate`` is none, the result of the training is damaged, or the data of one that has
            ended is in another folder now and cannot be loaded.
    """
    directory.refuse_another(to_yaml(recipe))
    _, name, data = _asked_for(recipe, candidate)
    network = _canonical(name)
    # A recipe may leave the data to the child.
    training = f"{network} on {data.name} at {data.resolution} pixels"
    if recipe.inherit_weights and candidate.file is not None:
        digest = hashlib.sha256(candidate.file.read_bytes()).hexdigest()[:_DIGEST_CHARACTERS]
        training += f" with the weights of the child of SHA-256 {digest}…"
    directory.keep_to(training)
    # Of what it is was not always noted when a training began.
    file = directory.path / "result.json"
    if not file.exists():
        return
    result = read_result(file)
    if (before := _canonical(result["network"])) != network:
        raise another_training(directory, before, network)
    _refuse_other_data(result.get("data", {}), data, recipe.seed, network, directory)


def _refuse_other_data(notes: dict[str, Any], data: Data, seed: int, network: str, directory: RunDirectory) -> None:
    """Make sure that a training that has ended was on ``data``, which may have been moved since.

    One that has not ended compares all images as it goes on.
    """
    if not names_another_folder(notes, data) or has_the_same_test_part(notes, load_splits(data, seed)):
        return
    assert data.folder is not None
    raise UserError(
        f"{directory.path} holds a training of {network} on {notes['folder']}, not on {os.path.abspath(data.folder)}; "
        "choose another folder with --name."
    )


def _asked_for(recipe: RetrainRecipe, candidate: Candidate) -> tuple[Child | None, str, Data]:
    """Return the child if there is one, what :func:`build_network` is told of the network, and the data in full."""
    child = candidate.load(recipe.rank)
    try:
        data = recipe.data.completed(child.data if child else {})
    except UserError as error:
        raise UserError(f"{candidate.file}: {error}" if child else str(error)) from None
    return child, str(child.architecture) if child else candidate.name, data


def _canonical(network: str) -> str:
    """Write the text of a path or a genotype, which people space as they like, as a search does."""
    if network.startswith("["):
        return str(CreamPath.parse(network))
    return str(Genotype.parse(network)) if network.startswith("Genotype(") else network


def build_for_training(recipe: RetrainRecipe, name: str, num_classes: int) -> nn.Module:
    """Build a network as a recipe wants it trained, with new weights.

    Args:
        recipe: how it is trained.
        name: the text of a path or a genotype, or timm's name of a network.
        num_classes: number of classes.

    Raises:
        UserError: as :func:`nni_cream.child.build_network`.
    """
    return build_network(
        name, num_classes, _size(recipe, name), drop_rate=recipe.drop_rate, drop_path_rate=recipe.drop_path_rate
    )


def _size(recipe: RetrainRecipe, name: str) -> dict[str, Any]:
    return {"kind": "trained", **recipe.darts.model_dump()} if name.startswith("Genotype(") else {}


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
    data: dict[str, Any] | None = None


def read_result(file: Path) -> dict[str, Any]:
    """Read what a training has ended with; accuracies of plain weights are there where others were averaged.

    So is ``data``, as of :func:`nni_cream.data_checks.noted`, where it was noted.

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


def refuse_untrainable(recipe: RetrainRecipe, network: nn.Module, resolution: int) -> None:
    """Make sure that ``network``, which can take images of this resolution, can also be trained with them as said.

    Raises:
        UserError: as :func:`refuse_resolution`, and if it changes while it is trained and is to be compiled.
    """
    refuse_resolution(network, resolution)
    if recipe.device.compile != "off" and recipe.drop_path_rate and hasattr(network, "set_drop_path_rate"):
        raise UserError(
            f"device.compile is {recipe.device.compile!r}, but a network whose drop path rises would be compiled anew "
            "in every epoch: leave it off, or make drop_path_rate 0."
        )


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
