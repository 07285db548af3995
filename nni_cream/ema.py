"""The exponential moving average of a network's weights over the steps of its training."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.callbacks import Callback

from nni_cream import soundness


class WeightAverage(Callback):
    """Takes the weights of every step into ``module.ema``, a ``timm.utils.ModelEmaV3`` of ``module.model``.

    A step that was left out because something was not finite does not count. It is a callback, and not a hook of the
    module, because those come after a checkpoint of the step has been written.
    """

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the weights after a step."""
        if not soundness.of(trainer).bad:
            module.ema.update(module.model, step=trainer.global_step)
