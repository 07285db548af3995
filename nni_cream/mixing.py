"""Training images that are mixed in pairs: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019)."""

from __future__ import annotations

import numpy as np
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from nni_cream.distributed import agreed, gathered, processes
from nni_cream.ranks import rank


class Mixing:
    """Mixes the images of a batch, the first with the last and so on, as ``timm.data.Mixup`` does for a whole batch.

    What is drawn comes from NumPy's stream, which checkpoints have. Several processes mix the batch that they share, as
    the first of them would by itself.

    Args:
        num_classes: number of classes.
        mixup: α of the beta distribution of the share that the first image of a pair has; 0 for no mixup.
        cutmix: likewise, of the area that is not replaced by a rectangle of the other image; 0 for no CutMix.
        prob: of mixing a batch at all.
        switch_prob: of CutMix, where there are both.
        label_smoothing: of the labels, mixed or not.
        off_epoch: the first epoch, counted from 0, whose images are not mixed any more; None to mix to the end.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
        off_epoch: int | None = None,
    ) -> None:
        self._mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self._num_classes = num_classes
        self._label_smoothing = label_smoothing
        self._off_epoch = off_epoch

    def __call__(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and what they are of.

        Args:
            images: float [N, C, H, W]; they are overwritten. All processes together have an even number.
            labels: int64 [N].
            epoch: counted from 0.

        Returns:
            Images [N, C, H, W] and probabilities [N, classes].
        """
        if self._off_epoch is not None and epoch >= self._off_epoch:
            return images, mixup_target(labels, self._num_classes, 1.0, self._label_smoothing)
        # The parts of a batch that was mixed in two ways are no batch.
        np.random.set_state(agreed(np.random.get_state()))
        mixed, targets = self._mix(gathered(images), gathered(labels))
        own = slice(rank() * len(images), (rank() + 1) * len(images)) if processes() > 1 else slice(None)
        return mixed[own], targets[own]
