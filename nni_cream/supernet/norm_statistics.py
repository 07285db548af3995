"""What the batch norms of a fused cell normalise by, and what they remember: of all norms at once, not one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nni_cream.supernet.stages import Found
from nni_cream.supernet.synchronised import sharers


class RunningStatistics:
    """The running statistics of batch norms, in one tensor, so that one call moves them all.

    The buffers of the norms become views of it, and stay so in copies and files of torch's. Where a buffer is in other
    memory since, because somebody has replaced it or a plain pickle has parted it from the tensor, every norm is moved
    by itself.

    Args:
        norms: the batch norms, of equally many channels.
    """

    def __init__(self, norms: Sequence[Any]) -> None:
        self._places = {norm: place for place, norm in enumerate(norms)}
        self._tensors: dict[str, Tensor] = {}
        self._views: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self.bind()

    def bind(self) -> None:
        """Take over the buffers that the norms have now."""
        if self._views and self.is_joint():
            return
        self._tensors, self._views = {}, []
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffers = [norm._buffers[name] for norm in self._places]
            if not buffers or any(buffer is None for buffer in buffers):
                continue
            joint = self._tensors[name] = torch.stack(buffers)
            for norm, part in zip(self._places, joint.unbind(), strict=True):
                # Each with a version of its own: a norm that runs by itself must not seem to have changed the others'.
                view = norm._buffers[name] = part.data
                self._views.append((norm._buffers, name, view, part))

    def is_joint(self) -> bool:
        """Tell whether the norms still have the views as buffers, in the memory of the tensor."""
        return all(
            buffers[name] is view and view.data_ptr() == part.data_ptr() for buffers, name, view, part in self._views
        )

    def move(self, norms: Sequence[Any], mean: Tensor, variance: Tensor, momentum: float) -> None:
        """Move the statistics of ``norms`` towards ``mean`` and ``variance``, [norms, channels]."""
        if len(self._tensors) == 3 and self.is_joint():
            places = [self._places[norm] for norm in norms]
            means, variances, counters = self._tensors.values()
            if places == list(range(len(means))):
                means.lerp_(mean, momentum)
                variances.lerp_(variance, momentum)
                counters.add_(1)
            else:
                rows = torch.tensor(places, device=mean.device)
                means.index_copy_(0, rows, means[rows].lerp_(mean, momentum))
                variances.index_copy_(0, rows, variances[rows].lerp_(variance, momentum))
                counters.index_add_(0, rows, torch.ones_like(rows))
            return
        buffers = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        torch._foreach_lerp_(buffers, [*mean.unbind(), *variance.unbind()], momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


class Statistics:
    """How the batch norms of a cell normalise at the moment, and what they are to remember of it.

    Args:
        norms: the batch norms, all in one mode.
        running: their running statistics.
    """

    def __init__(self, norms: Sequence[Any], running: RunningStatistics) -> None:
        first = norms[0]
        self.of_batch: bool = first.training or first.running_mean is None
        self.eps: float = first.eps
        self._remembers: bool = first.training and first.track_running_stats
        self._momentum: float = first.momentum
        self._running = running
        self._seen: list[tuple[Sequence[Any], Tensor, Tensor, int]] = []

    def saw(self, norms: Sequence[Any], mean: Tensor, variance: Tensor, count: int) -> None:
        """Note mean and variance of the batch, [norms, channels], where norms may have several dimensions.

        The batch may be divided among processes, each with ``count`` values a channel.
        """
        if self._remembers:
            self._seen.append((norms, mean.detach(), variance.detach(), count * sharers()))

    def known(self, norms: Sequence[Any]) -> Found | None:
        """Return mean and variance that ``norms`` normalise by, [norms, channels]; None for those of the batch."""
        if self.of_batch:
            return None
        return Found(torch.stack([n.running_mean for n in norms]), torch.stack([n.running_var for n in norms]))

    def remember(self) -> None:
        """Move the running statistics, as batch norms in training do."""
        if not self._seen:
            return
        norms = [norm for each, *_ in self._seen for norm in each]
        channels = self._seen[0][1].shape[-1]
        with torch.no_grad():
            means = torch.cat([mean.reshape(-1, channels) for _, mean, *_ in self._seen])
            # Unbiased, as batch norms remember it.
            variances = torch.cat(
                [(variance * (count / (count - 1))).view(-1, channels) for *_, variance, count in self._seen]
            )
            self._running.move(norms, means, variances, self._momentum)
