from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from nni_cream.models.cream import Choice
from nni_cream.supernet.batch_norm import batch_statistics, recalibrated


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 5, 1),
        BatchNormAct2d(5, act_layer=nn.SiLU),
        nn.Flatten(),
        nn.BatchNorm1d(45, affine=False),
    ).double()
    with torch.no_grad():
        for buffer in layers.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
            else:
                buffer.fill_(17)
    return layers


def images(seed: int, number: int = 6) -> Tensor:
    return torch.randn(number, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state(layers: nn.Module) -> tuple[dict[str, Tensor], list[object]]:
    modes = [
        (
            module.training,
            getattr(module, "track_running_stats", None),
            getattr(module, "momentum", None),
            set(vars(module)),
        )
        for module in layers.modules()
    ]
    return copy.deepcopy(layers.state_dict()), modes


def assert_unchanged(layers: nn.Module, before: tuple[dict[str, Tensor], list[object]]) -> None:
    tensors, modes = state(layers)
    assert modes == before[1]
    assert list(tensors) == list(before[0])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[0][name]), name


@pytest.fixture(params=["train", "eval", "mixed"])
def layers(request: pytest.FixtureRequest) -> nn.Sequential:
    result = network().train(request.param == "train")
    if request.param == "mixed":
        result[1].train()
    return result


class TestBatchStatistics:
    def test_nothing_is_left_behind(self, layers: nn.Sequential) -> None:
        before = state(layers)
        with batch_statistics(layers):
            layers(images(1))
            layers(images(2))
        assert_unchanged(layers, before)

    def test_nothing_is_left_behind_after_an_error(self, layers: nn.Sequential) -> None:
        before = state(layers)
        with pytest.raises(RuntimeError, match="channels"), batch_statistics(layers):
            layers(torch.cat([images(1)] * 2, 1))
        assert_unchanged(layers, before)

    def test_buffers_do_not_move_inside_either(self, layers: nn.Sequential) -> None:
        before, _ = state(layers)
        with batch_statistics(layers):
            layers(images(1))
            assert all(torch.equal(before[name], tensor) for name, tensor in layers.state_dict().items())

    def test_normalises_with_the_batch(self) -> None:
        layers = network().eval()
        first, act, last = layers[1], layers[5], layers[7]
        batch = images(3)
        x = F.batch_norm(layers[0](batch), None, None, first.weight, first.bias, training=True, eps=first.eps)
        x = layers[4](x.relu())  # the dropout is in evaluation mode
        x = F.silu(F.batch_norm(x, None, None, act.weight, act.bias, training=True, eps=act.eps))
        x = F.batch_norm(x.flatten(1), None, None, training=True, eps=last.eps)
        with batch_statistics(layers):
            torch.testing.assert_close(layers(batch), x, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(layers(batch), x)

    def test_only_batch_norms_change_their_mode(self) -> None:
        layers = network().eval()
        with batch_statistics(layers):
            assert [module.training for module in layers] == [False, True, False, False, False, True, False, True]

    def test_nests(self) -> None:
        layers = network().train()
        before = state(layers)
        with batch_statistics(layers):
            with batch_statistics(layers):
                layers(images(1))
            layers(images(2))
        assert_unchanged(layers, before)


def channels(number: int, *size: int) -> Tensor:
    return torch.randn(6, number, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def fail_after(module: nn.Module, batch: Tensor) -> None:
    module(batch)
    raise RuntimeError("stop")


class TestGroups:
    """Several batches in one, each normalised by itself."""

    CASES = (
        pytest.param(nn.BatchNorm2d(4), channels(4, 5, 5), id="BatchNorm2d"),
        pytest.param(nn.BatchNorm1d(4), channels(4), id="BatchNorm1d"),
        pytest.param(nn.BatchNorm1d(4, affine=False), channels(4, 7), id="BatchNorm1d of sequences"),
        pytest.param(BatchNormAct2d(4, act_layer=nn.SiLU), channels(4, 5, 5), id="BatchNormAct2d"),
        # Many pixels are normalised in another way than few.
        pytest.param(nn.BatchNorm2d(4), channels(4, 32, 33), id="BatchNorm2d of large images"),
        pytest.param(nn.BatchNorm2d(4, affine=False), channels(4, 32, 33), id="of large images, without weights"),
        pytest.param(nn.BatchNorm2d(4, affine=False), channels(4, 5, 5), id="BatchNorm2d without weights"),
        pytest.param(BatchNormAct2d(4, act_layer=nn.SiLU), channels(4, 32, 33), id="BatchNormAct2d of large images"),
        pytest.param(Choice(3, 4).build(8, 8, 1), channels(8, 5, 5), id="Cream block"),
        pytest.param(network(), images(4), id="network"),
    )

    @pytest.mark.parametrize("groups", [1, 2, 3])
    @pytest.mark.parametrize(("module", "batch"), CASES)
    def test_equal_the_groups_one_by_one(self, module: nn.Module, batch: Tensor, groups: int) -> None:
        module = copy.deepcopy(module).double().eval()
        formats = [torch.contiguous_format, *([torch.channels_last] if batch.ndim == 4 else [])]
        with batch_statistics(module):
            expected = torch.cat([module(group) for group in batch.split(len(batch) // groups)])
            together = module(batch)
        assert torch.allclose(together, expected) == (groups == 1)
        for memory_format in formats:
            with batch_statistics(module, groups):
                ours = module(batch.contiguous(memory_format=memory_format))
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [5, 46])
    def test_large_numbers_of_half_precision(self, dtype: torch.dtype, size: int) -> None:
        """Squares of 300 are no numbers of float16."""
        norm = nn.BatchNorm2d(4)
        batch = (300 * channels(4, size, size)).to(dtype).contiguous(memory_format=torch.channels_last)
        with batch_statistics(norm):
            expected = torch.cat([norm(group.float()) for group in batch.chunk(3)])
        with batch_statistics(norm, groups=3):
            ours = norm(batch)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), expected, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(("module", "batch"), CASES)
    def test_nothing_is_left_behind(self, module: nn.Module, batch: Tensor, training: bool) -> None:
        module = copy.deepcopy(module).double().train(training)
        before = state(module)
        with batch_statistics(module, groups=2):
            module(batch)
        assert_unchanged(module, before)
        with pytest.raises(RuntimeError, match="stop"), batch_statistics(module, groups=2):
            fail_after(module, batch)
        assert_unchanged(module, before)


class TestRecalibrated:
    BATCHES = (1, 2, 3)

    def test_statistics_are_the_plain_average_over_the_batches(self) -> None:
        layers = network().train()
        with torch.no_grad():
            inputs = [layers[0](images(seed)) for seed in self.BATCHES]
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        variances = torch.stack([x.var((0, 2, 3), unbiased=True) for x in inputs]).mean(0)
        with recalibrated(layers, (images(seed) for seed in self.BATCHES)):
            torch.testing.assert_close(layers[1].running_mean, means, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(layers[1].running_var, variances, rtol=1e-12, atol=1e-12)

    def test_later_layers_see_batches_normalised_by_themselves(self) -> None:
        # The second batch norm's statistics come from activations as in training, without dropout.
        layers = network().train()
        first = layers[1]
        with torch.no_grad():
            inputs = [
                layers[4](
                    F.batch_norm(layers[0](images(seed)), None, None, first.weight, first.bias, training=True).relu()
                )
                for seed in self.BATCHES
            ]
        means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        with recalibrated(layers, (images(seed) for seed in self.BATCHES)):
            torch.testing.assert_close(layers[5].running_mean, means, rtol=1e-12, atol=1e-12)

    def test_evaluates_with_the_new_statistics(self) -> None:
        layers = network().train()
        batch = images(9)
        with recalibrated(layers, [images(seed) for seed in self.BATCHES]):
            assert not any(module.training for module in layers.modules())
            first = layers[1]
            expected = F.batch_norm(
                layers[0](batch), first.running_mean, first.running_var, first.weight, first.bias, eps=first.eps
            )
            torch.testing.assert_close(layers[:2](batch), expected, rtol=1e-12, atol=1e-12)
            # In evaluation an image's answer does not depend on the rest of the batch.
            torch.testing.assert_close(layers(batch)[:2], layers(batch[:2]), rtol=1e-12, atol=1e-12)

    def test_nothing_is_left_behind(self, layers: nn.Sequential) -> None:
        before = state(layers)
        with recalibrated(layers, [images(seed) for seed in self.BATCHES]):
            pass
        assert_unchanged(layers, before)

    def test_nothing_is_left_behind_after_an_error_inside(self, layers: nn.Sequential) -> None:
        before = state(layers)
        with pytest.raises(RuntimeError, match="channels"), recalibrated(layers, [images(1)]):
            layers(torch.cat([images(1)] * 2, 1))
        assert_unchanged(layers, before)

    def test_nothing_is_left_behind_after_an_error_in_a_batch(self, layers: nn.Sequential) -> None:
        before = state(layers)
        batches = [images(1), torch.zeros(2, 7, 5, 5, dtype=torch.float64)]
        with pytest.raises(RuntimeError), recalibrated(layers, batches):
            pytest.fail("the body must not run")
        assert_unchanged(layers, before)

    def test_needs_no_gradient(self) -> None:
        layers = network()
        with recalibrated(layers, [images(1)]):
            assert all(parameter.grad is None for parameter in layers.parameters())
            assert not layers[1].running_mean.requires_grad
