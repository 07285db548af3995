"""What timm expects of every network in its registry, for all of ours; what only one family has is tested beside it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import nni_cream  # noqa: F401 (registers the networks)
from nni_cream.child import create_timm_model, read_network, save_network
from nni_cream.errors import UserError
from nni_cream.models import cream, darts_published

NAMES = [*cream.PUBLISHED, *darts_published.PUBLISHED]


def reduction(name: str) -> int:
    """How many times smaller than the image the last features are."""
    return 4 if name.endswith("cifar10") else 32


@cache
def registered(name: str) -> Any:
    """A network without values, for tests that leave it as it is."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def images(name: str, number: int = 2) -> Tensor:
    return torch.empty(number, *registered(name).default_cfg["input_size"])


def test_these_are_all() -> None:
    ours = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("nni_cream.")}
    assert ours == set(NAMES)
    assert len(NAMES) == 14


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("on_meta")
class TestShapes:
    def test_of_features_and_logits(self, name: str) -> None:
        network = registered(name)
        batch = images(name)
        size = batch.shape[-1] // reduction(name)
        assert network.num_classes == network.default_cfg["num_classes"] == (10 if reduction(name) == 4 else 1000)
        features = network.forward_features(batch)
        assert features.shape == (2, network.num_features, size, size)
        assert (size, size) == network.default_cfg["pool_size"]
        assert network.forward_head(features, pre_logits=True).shape == (2, network.head_hidden_size)
        assert network.forward_head(features).shape == network(batch).shape == (2, network.num_classes)

    @pytest.mark.parametrize(("classes", "pool"), [(7, None), (7, "max"), (0, None), (0, "")])
    def test_after_the_classifier_has_been_replaced(self, name: str, classes: int, pool: str | None) -> None:
        network = timm.create_model(name).eval()
        old = network.get_classifier()
        assert old is dict(network.named_modules())[network.default_cfg["classifier"]]
        assert old.weight.shape == (network.num_classes, network.head_hidden_size)
        network.reset_classifier(classes, *([] if pool is None else [pool]))
        assert network.num_classes == classes
        assert not network.get_classifier().training
        size = images(name).shape[-1] // reduction(name)
        output = network(images(name))
        if classes:
            assert network.get_classifier().weight.shape == (classes, network.head_hidden_size)
            assert output.shape == (2, classes)
        else:
            assert isinstance(network.get_classifier(), nn.Identity)
            assert output.shape == (2, network.head_hidden_size, *([size] * 2 if pool == "" else []))

    def test_of_the_features_of_several_resolutions_are_as_told(self, name: str) -> None:
        network = timm.create_model(name, features_only=True)
        batch = images(name)
        features = network(batch)
        told = zip(network.feature_info.channels(), network.feature_info.reduction(), strict=True)
        assert [tuple(f.shape[1:]) for f in features] == [(c, *[batch.shape[-1] // r] * 2) for c, r in told]
        assert len(features) == (3 if reduction(name) == 4 else 5)
        assert network.feature_info.reduction()[-1] == reduction(name)
        # Some of them cost no more than they need, and are the same.
        few = timm.create_model(name, features_only=True, out_indices=(-3, -2))
        assert [f.shape for f in few(batch)] == [f.shape for f in features[-3:-1]]
        assert sum(p.numel() for p in few.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
class TestConfiguration:
    def test_prepares_images_of_the_right_size_and_colours(self, name: str) -> None:
        network = registered(name)
        config = resolve_data_config({}, model=network)
        white = create_transform(**config)(Image.new("RGB", (300, 260), "white"))
        assert white.shape == network.default_cfg["input_size"]
        mean, std = (torch.tensor(network.default_cfg[key]) for key in ("mean", "std"))
        torch.testing.assert_close(white[:, 0, 0], (1 - mean) / std)

    def test_gives_every_weight_one_rate_by_its_depth(self, name: str) -> None:
        network = registered(name)
        parameters = dict(network.named_parameters())
        for coarse in (False, True):
            groups = group_parameters(network, network.group_matcher(coarse=coarse))
            assert sorted(member for members in groups.values() for member in members) == sorted(parameters)
            # What matches no pattern is in the last group: only the head may be.
            heads = {member.split(".")[0] for member in groups[max(groups)]}
            assert heads == ({"classifier"} if name in darts_published.PUBLISHED else {"conv_head", "classifier"})
            assert all(member.startswith(("conv_stem", "bn1", "stem")) for member in groups[0])
            depths = {member: depth for depth, members in groups.items() for member in members}
            assert [depths[name] for name in parameters] == sorted(depths.values())
        optimizer = create_optimizer_v2(network, opt="sgd", lr=1.0, layer_decay=0.5)
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(held) == sorted(map(id, parameters.values()))
        scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        first, *_, last = parameters.values()
        assert scale[id(first)] < scale[id(last)] == 1

    def test_has_no_weights_to_promise(self, name: str) -> None:
        with pytest.raises(RuntimeError, match=f"^No pretrained weights exist for {name}"):
            timm.create_model(name, pretrained=True)
        with pytest.raises(UserError, match=re.escape(f"timm cannot build '{name}': No pretrained weights exist")):
            create_timm_model(name, pretrained=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_its_state_dict(name: str, tmp_path: Path) -> None:
    """Its values, in a file and back, in another instance, and traced."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    size = 16 if reduction(name) == 4 else 64
    batch = torch.randn(3, 3, size, size)
    with torch.no_grad():
        network.train()(batch)
        network.eval()
        expected = network(batch)
        assert torch.equal(network.forward_head(network.forward_features(batch)), expected)
        assert expected.std(dim=0).max() > 1e-3

        save_network(tmp_path / "a.safetensors", network, architecture=name, num_classes=10, data={}, size={})
        weights, _ = read_network(tmp_path / "a.safetensors")
        again = timm.create_model(name).eval()
        assert not torch.allclose(again(batch), expected)
        again.load_state_dict(weights)
        # What comes out of the layers that the information of features names, as it passes in the whole network.
        features = timm.create_model(name, features_only=True).eval()
        features.load_state_dict({key: weights[key.removeprefix("model.")] for key in features.state_dict()})
        seen: dict[str, Tensor] = {}
        layers = dict(again.named_modules())
        for layer in features.feature_info.module_name():
            layers[layer].register_forward_hook(lambda *passed, layer=layer: seen.update({layer: passed[-1]}))
        assert torch.equal(again(batch), expected)
        given = features(batch)
        assert len(given) == len(seen) >= 3
        assert all(torch.equal(feature, passed) for feature, passed in zip(given, seen.values(), strict=True))

        traced = torch.jit.trace(network, batch[:2], check_trace=False)
        torch.testing.assert_close(traced(batch), expected)

    logits = network.train()(batch)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert [key for key, gradient in gradients.items() if not gradient.any()] == []
