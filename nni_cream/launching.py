"""How Lightning starts the processes of a search or a training, and what they do together in every step."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.overrides.distributed import _sync_module_states
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from nni_cream.distributed import average_
from nni_cream.errors import UserError
from nni_cream.supernet.synchronised import synchronised


class SharedBatch(DDPStrategy):
    """Processes that share every batch, with the result that one process would have with the whole of it.

    Unlike in Lightning's own DDP, whose process group and launching it has, the module stays as it is, since a search
    optimises by hand, runs another path every step, and calls its network as a function. Gradients are averaged after
    every backward pass, those that there are: of a path, the path's. Batch norms are synchronised in every step.

    Give it to a ``Trainer`` as ``strategy``, with ``use_distributed_sampler=False`` where the loaders divide the
    batches themselves (:class:`nni_cream.shards.Shards`).
    """

    def setup_distributed(self) -> None:
        """Join the other processes."""
        # Lightning seeds every process a second time here, after networks have been built: one process goes on drawing.
        with isolate_rng():
            super().setup_distributed()

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # After the training the network lies on the CPU, where its batch norms are recalibrated together.
        return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend

    def configure_ddp(self) -> None:
        """Start from the weights of the first process."""
        assert self.model is not None
        _sync_module_states(self.model)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients over the processes."""
        assert self.lightning_module is not None
        average_([p.grad for p in self.lightning_module.parameters() if p.grad is not None])

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Let the module take a step."""
        with synchronised():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Let the module measure a batch."""
        with synchronised():
            return super().validation_step(*args, **kwargs)


def refuse_other_strategies(trainer: Any) -> None:
    """Make sure that several processes work together as a search needs it.

    Raises:
        UserError: if Lightning has started them in another way.
    """
    if trainer.world_size > 1 and not isinstance(trainer.strategy, SharedBatch):
        raise UserError(
            f"A search in several processes needs strategy=nni_cream.launching.SharedBatch() in its Trainer, not "
            f"{type(trainer.strategy).__name__}."
        )
