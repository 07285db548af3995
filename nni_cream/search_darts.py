"""A DARTS search from recipe to child, as its trial runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Lightning
from torch import nn

from nni_cream.checkpoints import find_checkpoint
from nni_cream.child import Child
from nni_cream.cost import measure_network
from nni_cream.data import LabelledImages
from nni_cream.data_checks import noted
from nni_cream.distributed import total
from nni_cream.history import History
from nni_cream.loading import first_batches
from nni_cream.ranks import is_first
from nni_cream.recipe import DartsRecipe
from nni_cream.report import leave_report
from nni_cream.reporting import Reporter, on_terminal
from nni_cream.runs import RunDirectory
from nni_cream.search import (
    arrange_in_memory,
    claim,
    ended_search,
    initialize,
    load_splits,
    make_loader,
    make_trainer,
    make_training_loader,
    print_child,
    result_of,
)
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.batch_norm import recalibrated
from nni_cream.training import ImageClassifier
from nni_cream.trouble import named_batch

_MILLION = 1_000_000
_CALIBRATION_BATCHES = 20


def search_darts(recipe: DartsRecipe, directory: RunDirectory) -> Child:
    """Search, write the child and a report into ``directory``, and tell NNI."""
    from search_spaces.darts import DartsSpace

    reporter = Reporter(directory.path, quiet=on_terminal())
    if (ended := ended_search(recipe, directory, reporter)) is not None:
        return ended

    pl.seed_everything(recipe.seed, verbose=False)
    data = recipe.data
    splits = load_splits(data, recipe.seed)
    space = DartsSpace(splits.num_classes, **recipe.space.model_dump())
    arrange_in_memory(space, recipe.device)
    # As published, the images that α learns from vary like those of the weights.
    varied = LabelledImages(splits.architecture.images, splits.architecture.indices, splits.weights.transform)
    weight_loader = make_training_loader(splits.weights, data, recipe.seed, recipe.device)
    validation_loader = make_loader(splits.validation, data, recipe.device)
    evaluator = Lightning(
        ImageClassifier(splits.num_classes, recipe.optimizer.timm_arguments(), recipe.schedule.timm_arguments()),
        make_trainer(recipe, directory, checkpoint := find_checkpoint(directory)),
        train_dataloaders=weight_loader,
        val_dataloaders=make_training_loader(varied, data, recipe.seed, recipe.device, stream=1),
        fit_kwargs={"ckpt_path": checkpoint},
    )
    settings = recipe.darts.model_dump()
    if recipe.darts.flops_target is not None:
        settings["flops_target"] = recipe.darts.flops_target * _MILLION
    strategy = DartsStrategy(**settings, reporting_dataloader=validation_loader)
    initialize(strategy, space, evaluator, reporter)
    claim(directory, recipe, splits)
    with named_batch(data.batch_size, recipe.device.devices):
        strategy.run()

    module = strategy.oneshot_module
    if module.ended_because is not None:
        print(f"The search was ended: {module.ended_because}.")
    sample = module.export()
    # freeze() hands out the supernet's own modules.
    network = copy.deepcopy(module.model.freeze(sample)).to(module.device)
    cost = measure_network(network, data.resolution)
    batches = first_batches(weight_loader, _CALIBRATION_BATCHES, recipe.epochs)
    calibrate(network, (images.to(module.device) for images, _ in batches))
    child = Child(
        architecture=space.genotype(sample),
        num_classes=splits.num_classes,
        accuracy=accuracy_of(network, validation_loader, module.device),
        flops=cost.macs,
        params=cost.params,
        data=noted(data, splits),
        search={
            "name": recipe.name,
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            "supernet_accuracy": module.epochs[-1].val_accuracy,
            "ended_because": module.ended_because,
        },
        space=recipe.space.model_dump(mode="json"),
    )
    # A search that was ended has once more the epoch that it went back to.
    epochs = module.epochs if module.ended_because is None else module.epochs[:-1]
    history = History(
        len(splits.validation),
        alphas={name: [epoch.alphas[number].tolist() for epoch in epochs] for number, name in enumerate(module.alphas)},
    )
    if is_first():
        # A child counts as the end of a search, so that it comes last.
        history.save(directory.history)
        child.save(directory.child, network)
        reporter.final(result_of(child))
        print_child(child, directory)
        leave_report(recipe, directory)
    return child


def calibrate(network: nn.Module, batches: Any) -> None:
    """Give the batch norms of ``network`` statistics of its own, averaged over ``batches`` of images."""
    with recalibrated(network, batches):
        state = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for name, buffer in network.named_buffers():
        buffer.copy_(state[name])
    network.eval()


def accuracy_of(network: nn.Module, batches: Any, device: torch.device) -> float:
    """Return the share of right answers on ``batches`` of images and labels, those of all processes."""
    correct = seen = 0
    with torch.no_grad():
        for images, targets in batches:
            correct += int((network(images.to(device)).argmax(-1) == targets.to(device)).sum())
            seen += len(targets)
    correct, seen = total(correct, seen)
    return correct / seen
