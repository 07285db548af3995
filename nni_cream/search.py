"""A Cream search from recipe to child, as its trial runs it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import nni
import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nni.nas.evaluator.pytorch import Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import IntermediateMetricEvent, ModelEventType
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.loggers import TensorBoardLogger

from nni_cream.architecture import CreamPath, block_label
from nni_cream.checkpoints import LastTwo, find_checkpoint, steps_before
from nni_cream.child import Child
from nni_cream.cost import measure_space
from nni_cream.data import DataSplits, LabelledImages, load_data
from nni_cream.data_checks import fingerprint, noted, refuse_unreadable
from nni_cream.data_names import Augmentation, Fractions
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.history import History, Seen
from nni_cream.latency import LatencyBudget, LatencyTable
from nni_cream.launching import SharedBatch
from nni_cream.loading import Batches, TrainingBatches
from nni_cream.ranks import is_first, rank
from nni_cream.recipe import CreamRecipe, Recipe
from nni_cream.recipe_files import to_yaml
from nni_cream.report import leave_report, show_report
from nni_cream.reporting import Reporter, on_terminal
from nni_cream.resident import as_resident
from nni_cream.runs import RunDirectory
from nni_cream.settings import Data, Device, Flops
from nni_cream.shards import Shards
from nni_cream.soundness import Soundness
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.cream_module import CreamLightningModule, RankedPath
from nni_cream.training import ImageClassifier
from nni_cream.trouble import named_batch

if TYPE_CHECKING:
    from search_spaces.cream import CreamSpace, SpacePlan

_MILLION: Final = 1_000_000

# NNI's evaluators want to know what their parts were made with.
_Batches: Final = nni.trace(Batches)
_TrainingBatches: Final = nni.trace(TrainingBatches)


def search_cream(recipe: CreamRecipe, directory: RunDirectory) -> Child:
    """Search, write the child and a report into ``directory``, and tell NNI."""
    from search_spaces.cream import CreamSpace, plan_space

    reporter = Reporter(directory.path, quiet=on_terminal())
    if (ended := ended_search(recipe, directory, reporter)) is not None:
        return ended

    pl.seed_everything(recipe.seed, verbose=False)
    table = latency_table_of(recipe, directory)
    plan = plan_space(recipe.flops.min, recipe.flops.max, recipe.data.resolution)
    data = recipe.data.at(plan.resolution)
    splits = load_splits(data, recipe.seed)
    options = recipe.space.model_dump()
    space = CreamSpace(plan.depths, splits.num_classes, **options)
    budget: dict[str, Any]
    if table is None:
        budget = {"flops_range": flops_range(recipe.flops)}
    else:
        budget = {"latency": latency_budget(recipe, table, space, plan)}
    arrange_in_memory(space, recipe.device)
    evaluator = Lightning(
        ImageClassifier(splits.num_classes, recipe.optimizer.timm_arguments(), recipe.schedule.timm_arguments()),
        make_trainer(recipe, directory, checkpoint := find_checkpoint(directory)),
        train_dataloaders=make_training_loader(splits.weights, data, recipe.seed, recipe.device),
        val_dataloaders=make_loader(splits.architecture, data, recipe.device),
        fit_kwargs={"ckpt_path": checkpoint},
    )
    settings = recipe.cream.model_dump()
    if not isinstance(recipe.cream.prior, str):
        settings["prior"] = space.prior(recipe.cream.prior)
    strategy = CreamStrategy(
        **settings,
        **budget,
        seed=recipe.seed,
        ranking_dataloader=make_loader(splits.validation, data, recipe.device),
    )
    try:
        initialize(strategy, space, evaluator, reporter)
    except UserError:
        # Networks of other depths are counted only where those of the search are refused, which takes seconds.
        if table is None:
            refuse_unreachable(recipe.flops, plan, options, splits.num_classes)
        raise
    claim(directory, recipe, splits)
    if table is not None and is_first():
        table.save(directory.latency)
    with named_batch(data.batch_size, recipe.device.devices):
        strategy.run()

    module = strategy.oneshot_module
    # Paths that differ only in which blocks of a stage they skip are one architecture; the better one stands for it.
    found: dict[CreamPath, RankedPath] = {}
    for ranked in module.ranking:
        found.setdefault(space.architecture(ranked.sample), ranked)
    (path, best), *others = found.items()
    child = Child(
        architecture=path,
        num_classes=splits.num_classes,
        accuracy=best.accuracy,
        flops=best.cost.macs,
        params=best.cost.params,
        data=noted(data, splits),
        search={
            "name": recipe.name,
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            **({} if table is None else {"latency_of": str(table.conditions)}),
        },
        runners_up=[
            {
                "path": path.to_json(),
                "accuracy": other.accuracy,
                "flops": other.cost.macs,
                "params": other.cost.params,
                **({} if other.latency is None else {"latency": other.latency}),
            }
            for path, other in others
        ],
        latency=best.latency,
    )
    network = module.calibrated_network(best.sample)
    if is_first():
        # A child counts as the end of a search, so that it comes last.
        History(len(splits.validation), board=board_by_epoch(module, space)).save(directory.history)
        child.save(directory.child, network)
        reporter.final(result_of(child))
        print_child(child, directory)
        leave_report(recipe, directory)
    return child


def latency_table_of(recipe: CreamRecipe, directory: RunDirectory) -> LatencyTable | None:
    """Return the table of a search whose budget is one of time, and None for any other.

    A search keeps the table that it began with, also where its file has changed since, or is gone.

    Raises:
        UserError: if it is none.
    """
    file = recipe.latency.table
    if file is None:
        return None
    if not (directory.has_begun and directory.latency.exists()):
        return LatencyTable.load(file)
    table = LatencyTable.load(directory.latency)
    if is_first() and file.exists() and not _holds(file, table):
        print(f"{file} has changed; this search keeps the latency table that it began with, {directory.latency}.")
    return table


def _holds(file: Path, table: LatencyTable) -> bool:
    try:
        return LatencyTable.load(file) == table
    except UserError:
        return False


def latency_budget(recipe: CreamRecipe, table: LatencyTable, space: CreamSpace, plan: SpacePlan) -> LatencyBudget:
    """Return the budget of a search by a table.

    Raises:
        UserError: if the table is for other networks; or if the interval is above or below all of them, and it says
            which intervals are possible.
    """
    from search_spaces.cream import DEEPEST, SHALLOWEST

    file, low, high = recipe.latency.table, recipe.latency.min, recipe.latency.max
    assert file is not None
    assert high is not None
    table.refuse_another(file, plan.resolution, space.num_classes, space.operations)

    def budget(depths: tuple[int, ...]) -> LatencyBudget:
        return table.budget(depths, space.operations, space.skip, low, high)

    chosen = budget(plan.depths)
    if high < chosen.shortest or low > chosen.longest:
        raise UserError(
            f"By {file} no network takes {low:g} ms to {high:g} ms a batch (latency.min to latency.max): those of this "
            f"search take {chosen.shortest:.4g} ms to {chosen.longest:.4g} ms, and with other depths, which flops "
            f"decides, {budget(SHALLOWEST).shortest:.4g} ms to {budget(DEEPEST).longest:.4g} ms are possible."
        )
    return chosen


def board_by_epoch(module: CreamLightningModule, space: CreamSpace) -> dict[int, list[Seen]]:
    """Return what was on the board after every epoch; of paths that are one architecture, the better one."""
    epochs = {}
    for epoch, places in module.history.epochs.items():
        seen: dict[str, Seen] = {}
        for place in places:
            path = str(space.architecture(module.paths.to_sample(place.path)))
            seen.setdefault(path, Seen(path, place.score, place.macs, place.latency))
        epochs[epoch] = list(seen.values())
    return epochs


def initialize(strategy: OneShotStrategy, space: ModelSpace, evaluator: Lightning, reporter: Reporter) -> None:
    """Make ``strategy`` ready to run in this process, with every epoch that it reports going to ``reporter``.

    Raises:
        UserError: if the strategy cannot search this space.
    """
    engine = SequentialExecutionEngine()
    strategy.initialize(RawFormatModelSpace.from_model(space, evaluator), engine)

    def forward(event: IntermediateMetricEvent) -> None:
        reporter.intermediate(event.metric)

    engine.register_model_event_callback(ModelEventType.IntermediateMetric, forward)


def ended_search(recipe: Recipe, directory: RunDirectory, reporter: Reporter) -> Child | None:
    """Return, print and report what the search in ``directory`` has found; None if none has ended there."""
    if not directory.child.exists():
        return None
    try:
        child = Child.load(directory.child)
        told = result_of(child)
    except UserError as error:
        raise UserError(
            f"{str(error).rstrip('.')}, or remove it, and the same command makes it again from the last checkpoint."
        ) from None
    if not is_first():
        return child
    print(f"{directory.path} holds a search that has ended; choose another folder with --name for a new one.")
    # NNI starts a trial again whose end it has not seen.
    reporter.deliver()
    reporter.final(told)
    print_child(child, directory)
    show_report(recipe, directory)
    return child


def result_of(child: Child) -> dict[str, Any]:
    """Return what NNI is told of a child; its architecture is among it, since the file may lie on another machine.

    Raises:
        UserError: if it has a genotype, and not the accuracy of the supernet.
    """
    genotype = isinstance(child.architecture, Genotype)
    if genotype and not isinstance(child.search.get("supernet_accuracy"), float):
        raise UserError("The child of a DARTS search has no number 'supernet_accuracy' in its field 'search'.")
    return {
        # The tuner steers by what the curve shows: of DARTS, the supernet.
        "default": child.search["supernet_accuracy"] if genotype else child.accuracy,
        "accuracy": child.accuracy,
        "flops": child.flops,
        "params": child.params,
        **({} if child.latency is None else {"latency": child.latency}),
        "genotype" if genotype else "path": str(child.architecture),
    }


def flops_range(flops: Flops) -> tuple[float, float]:
    """Return the interval of a recipe in multiply-accumulates."""
    # A product with a binary fraction may miss the whole number that is meant.
    return round(flops.min * _MILLION, 3), round(flops.max * _MILLION, 3)


def refuse_unreachable(flops: Flops, plan: SpacePlan, options: Mapping[str, Any], num_classes: int) -> None:
    """Make sure that the interval holds networks of some depth.

    The depths follow from a rule that counts the blocks alone, so what it cannot reach is known only now.

    Raises:
        UserError: if it is above or below all of them; it says which intervals are possible.
    """
    from search_spaces.cream import DEEPEST, CreamSpace

    with torch.device("meta"):
        table = measure_space(
            CreamSpace((2,) * len(DEEPEST), num_classes, **options), (3, plan.resolution, plan.resolution)
        )
    # All blocks of a stage but its first cost the same, so the second of each tells what every depth costs.
    least, most = table.cheapest, table.dearest
    for stage, depth in enumerate(DEEPEST, start=1):
        further = [cost.macs for cost in table.choices[block_label(stage, 1)]]
        least -= min(further)
        most += (depth - 2) * max(further)
    low, high = least / _MILLION, most / _MILLION
    if flops.max < low or flops.min > high:
        raise UserError(
            f"No network costs {flops.min:g} M to {flops.max:g} M multiply-accumulates (flops.min to flops.max) at "
            f"{plan.resolution} pixels: those of this space cost {low:.12g} M to {high:.12g} M."
        )


def print_child(child: Child, directory: RunDirectory) -> None:
    """Tell a person what was found."""
    name = "path:" if isinstance(child.architecture, CreamPath) else "genotype:"
    print(f"{name:<10} {child.architecture}")
    print(f"FLOPs:     {child.flops / 1e6:.2f} M multiply-accumulates")
    print(f"params:    {child.params / 1e6:.3f} M")
    if child.latency is not None:
        print(f"latency:   {child.latency:.3f} ms predicted for {child.search.get('latency_of', 'a batch')}")
    print(f"accuracy:  {child.accuracy:.4f} with shared weights, on held-out images")
    print(f"folder:    {directory.path.resolve()}", flush=True)


def load_splits(data: Data, seed: int) -> DataSplits:
    """Load the data set of a recipe, and name its licence if its package does."""
    splits = load_data(
        data.name,
        folder=data.folder,
        resolution=data.resolution,
        seed=seed,
        augmentation=Augmentation(**data.augmentation.model_dump()),
        download=data.download,
        fractions=Fractions(validation=data.validation_fraction, architecture=data.architecture_fraction),
    )
    if splits.licence is not None:
        print(f"{data.name}: {splits.licence}")
    return splits


def claim(directory: RunDirectory, recipe: Recipe, splits: DataSplits) -> None:
    """Begin a run, now that all else has been checked: a start that fails must not claim the folder.

    Of several processes, the first does so.

    Raises:
        UserError: if an image cannot be read, and as :meth:`nni_cream.runs.RunDirectory.begin`.
    """
    if not is_first():
        return
    if not directory.has_begun:
        refuse_unreadable(splits)
    directory.begin(to_yaml(recipe), recipe.seed, asdict(fingerprint(splits)))


def arrange_in_memory(network: Any, device: Device) -> None:
    """Lay out the weights as the recipe says; images follow at the first convolution."""
    network.to(memory_format=getattr(torch, device.memory_format))


def make_training_loader(
    images: LabelledImages, data: Data, seed: int, device: Device, *, stream: int = 0
) -> TrainingBatches:
    """Return full batches of ``images``, shuffled; each of several processes, one for each device, gets its part.

    The order of an epoch, and how each image is varied in it, follow from ``seed``, and from ``stream`` where two
    loaders have one seed.

    Raises:
        UserError: if there is not one whole batch to train on.
    """
    if len(images) < data.batch_size:
        raise UserError(
            f"data.batch_size is {data.batch_size}, but there are {len(images)} images to train on: make it at most "
            "that."
        )
    source, workers = _source(images, data, device)
    loader: TrainingBatches = _TrainingBatches(
        source, data.batch_size, workers, seed=seed, stream=stream, rank=rank(), processes=device.devices
    )
    return loader


def make_loader(images: LabelledImages, data: Data, device: Device) -> Batches:
    """Return batches of ``images`` to measure on, of which each of several processes gets a part.

    They are as nearly equal as can be: a small last one would have poor batch statistics, and a single image none.

    Raises:
        UserError: if there is not one image for every device.
    """
    devices = device.devices
    if len(images) < devices:
        raise UserError(
            f"device.devices is {devices}, but a part of the data has {len(images)} images: make it smaller."
        )
    number = min(-(-len(images) // data.batch_size), max(1, len(images) // max(2, devices)))
    batches: Any = [part.tolist() for part in np.array_split(np.arange(len(images)), number)]
    source, workers = _source(images, data, device)
    loader: Batches = _Batches(source, batches if devices == 1 else Shards(batches, rank(), devices), workers=workers)
    return loader


def _source(images: LabelledImages, data: Data, device: Device) -> tuple[Any, int]:
    """Return what batches are made of, and how many workers make them."""
    if data.resident:
        on_gpu = device.accelerator != "cpu" and torch.cuda.is_available()
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
        resident = as_resident(images, data.resolution, where)
        if resident is not None:
            # What a worker puts on a GPU, nobody else can have.
            return resident, 0
    return images, data.workers


def make_trainer(recipe: Recipe, directory: RunDirectory, checkpoint: Path | None, **arguments: Any) -> Any:
    """Return a Lightning trainer that keeps checkpoints and TensorBoard events in the run directory.

    Args:
        recipe: what is trained.
        directory: of the run.
        checkpoint: what the run goes on from, if it does.
        arguments: further ones of Lightning's ``Trainer``.

    Raises:
        UserError: as :func:`on_device`.
    """
    # What was logged after the checkpoint will be logged again.
    purge_step = None if checkpoint is None else steps_before(checkpoint)
    return on_device(
        recipe.device,
        max_epochs=recipe.epochs,
        default_root_dir=directory.path,
        logger=TensorBoardLogger(directory.path, name="tensorboard", version="", purge_step=purge_step),
        callbacks=[Soundness(recipe.skip_bad_steps), LastTwo(directory, recipe.checkpoint_minutes)],
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        **arguments,
    )


def on_device(device: Device, **arguments: Any) -> Any:
    """Return a Lightning trainer for the device of a recipe; on the CPU, with as many threads as it says.

    For several devices it starts this command once more for each but the first, unless that has been done (torchrun).

    Raises:
        UserError: if there is no such device, or not a core for every process, or by far too few for the threads.
    """
    on_cpu = device.accelerator == "cpu" or (device.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and device.devices > (os.cpu_count() or 1):
        raise UserError(
            f"device.devices is {device.devices}, but on the CPU these are processes and this machine has "
            f"{os.cpu_count()} cores: make it at most that."
        )
    if device.threads is not None:
        most = 4 * (os.cpu_count() or 1)
        # OpenMP refuses none: of too many, it ends the process.
        if device.threads > most:
            raise UserError(
                f"device.threads is {device.threads}, but this machine has {os.cpu_count()} cores: make it at most "
                f"{most}, or leave it out for as many as there are cores."
            )
        torch.set_num_threads(device.threads)
        if device.devices > 1:
            # Lightning divides the cores among the processes where nobody has said how many each has.
            os.environ["OMP_NUM_THREADS"] = str(device.threads)
    if device.devices > 1:
        arguments |= {"strategy": SharedBatch(), "use_distributed_sampler": False}
    try:
        return Trainer(
            accelerator=device.accelerator,
            devices=device.devices,
            precision=device.precision,
            enable_progress_bar=on_terminal(),
            enable_model_summary=False,
            **arguments,
        )
    except MisconfigurationException as error:
        raise UserError(
            f"device.accelerator {device.accelerator!r} with device.devices {device.devices} is not available on "
            f"this machine: {str(error).rstrip('.!')}."
        ) from None
