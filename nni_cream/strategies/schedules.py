"""Which schedules of the learning rate a search can follow."""

from __future__ import annotations

from typing import Any

from timm.scheduler.plateau_lr import PlateauLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nni_cream.errors import UserError


def refuse_plateau(trainer: Any) -> None:
    """Refuse a schedule that waits for a metric, which NNI's one-shot modules never give to one.

    Args:
        trainer: as of ``on_train_start``, before which Lightning has not asked for the schedules.

    Raises:
        UserError: for a schedule that lowers the learning rate where a metric stays as it is.
    """
    for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(schedule, ReduceLROnPlateau | PlateauLRScheduler):
            raise UserError(
                f"The schedule {type(schedule).__name__} waits for a metric, which a one-shot search does not give to "
                "it; take a schedule of epochs or steps."
            )
