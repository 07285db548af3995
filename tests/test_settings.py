from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from nni_cream.errors import UserError
from nni_cream.recipe import CreamRecipe, EvaluationRecipe
from nni_cream.recipe_files import load_recipe, parse_override, to_yaml
from nni_cream.settings import ChildData, Data, EvaluationData, Optimizer
from tests.recipes import SMALLEST, checked_sentence, refusal, write


class TestWrongValues:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # Types.
            ({"epochs": "ten"}, "'epochs' is 'ten', but should be a valid integer"),
            ({"epochs": 2.5}, "'epochs' is 2.5, but should be a valid integer"),
            ({"epochs": True}, "epochs: true is not a value for this setting."),
            ({"optimizer": {"lr": True}}, "optimizer.lr: true is not"),
            ({"epochs": None}, "'epochs' is None, but should be"),
            ({"optimizer": 5}, "'optimizer' is 5, but should be a group of settings."),
            ({"data": None}, "'data' is None, but should be a group of settings."),
            ({"data": {"folder": 3}}, "'data.folder' is 3, but should be a path."),
            ({"data": {"download": "maybe"}}, "'data.download' is 'maybe', but should be true or false."),
            ({"data": {"augmentation": {"scale": 3}}}, "'data.augmentation.scale' is 3, but should be a list."),
            ({"data": {"augmentation": {"scale": [1]}}}, "'data.augmentation.scale[1]' is missing."),
            ({"data": {"augmentation": {"scale": [1, 2, 3]}}}, "'data.augmentation.scale' is [1, 2, 3], but should"),
            ({"device": {"precision": 16}}, "'device.precision' is 16, but should be '32-true'"),
            # Ranges.
            ({"epochs": 0}, "'epochs' is 0, but should be greater than 0."),
            ({"seed": -1}, "'seed' is -1, but should be greater than or equal to 0."),
            ({"seed": 2**32}, "'seed' is 4294967296, but should be less than or equal to 4294967295."),
            ({"skip_bad_steps": -1}, "'skip_bad_steps' is -1, but should be greater than or equal to 0."),
            ({"checkpoint_minutes": 0}, "'checkpoint_minutes' is 0, but should be greater than 0."),
            ({"data": {"resolution": 7}}, "'data.resolution' is 7"),
            ({"data": {"batch_size": 1}}, "'data.batch_size' is 1"),
            ({"data": {"architecture_fraction": 1}}, "'data.architecture_fraction' is 1"),
            ({"data": {"augmentation": {"hflip": 1.5}}}, "'data.augmentation.hflip' is 1.5"),
            ({"data": {"augmentation": {"scale": [0, 3]}}}, "'data.augmentation.scale[0]' is 0"),
            ({"optimizer": {"momentum": 1}}, "'optimizer.momentum' is 1, but should be less than 1."),
            ({"device": {"devices": 0}}, "'device.devices' is 0"),
            # Numbers that are none.
            ({"optimizer": {"lr": float("nan")}}, "'optimizer.lr' is nan, but should be a finite number."),
            ({"optimizer": {"weight_decay": float("inf")}}, "'optimizer.weight_decay' is inf"),
            ({"flops": {"min": float("nan"), "max": 2}}, "'flops.min' is nan"),
            ({"flops": {"min": 1, "max": float("inf")}}, "'flops.max' is inf"),
            ({"cream": {"prior": [1, float("nan")]}}, "'cream.prior[1]' is nan, but should be a finite number."),
            # Settings that do not go together.
            ({"flops": {"min": 3, "max": 2}}, "flops: min is 3, above max 2."),
            ({"latency": {"table": "l.json", "min": 3, "max": 2}}, "latency: min is 3, above max 2."),
            ({"latency": {"table": "l.json"}}, "latency: a table is given, but no max; say how many milliseconds"),
            ({"latency": {"table": "l.json", "min": 1}}, "latency: a table is given, but no max"),
            (
                {"latency": {"max": 2}},
                "latency: max is given, but no table, which says what networks take; measure one",
            ),
            ({"latency": {"min": 2}}, "latency: min is given, but no table"),
            ({"latency": {"table": "l.json", "max": 0}}, "'latency.max' is 0, but should be greater than 0."),
            (
                {"latency": {"table": "l.json", "min": -1, "max": 2}},
                "'latency.min' is -1, but should be greater than or",
            ),
            ({"latency": {"table": 3, "max": 2}}, "'latency.table' is 3, but should be a path."),
            ({"latency": {"milliseconds": 3}}, "'latency.milliseconds' is not a setting; did you mean 'latency."),
            ({"cream": {"warmup_epochs": 30}}, "cream.warmup_epochs is 30"),
            ({"cream": {"board_images": 1}}, "'cream.board_images' is 1, but should be greater than or equal to 2."),
            ({"cream": {"board_images": 33}}, "data.batch_size is 64: make it at most half of that."),
            ({"cream": {"board_images": 33}}, "cream.board_images is 33, but learning to match takes two slices"),
            ({"cream": {"board_images": 65, "teacher": "top1"}}, "data.batch_size is 64: make it at most as much."),
            ({"cream": {"board_images": 65, "teacher": "none"}}, "is 65, but an entry keeps as many images from a b"),
            ({"data": {"batch_size": 7}}, "cream.board_images is 4, but learning to match takes two slices"),
            ({"cream": {"prior": [0, 0]}}, "cream: the prior gives every candidate probability 0."),
            ({"cream": {"prior": []}}, "cream: the prior gives every candidate probability 0."),
            ({"cream": {"prior": [1, -1]}}, "'cream.prior[1]' is -1, but should be greater than or equal to 0."),
            ({"cream": {"prior": "oven"}}, "'cream.prior' is 'oven', but should be 'even' or 'board'."),
            ({"schedule": {"warmup_epochs": 30}}, "schedule.warmup_epochs is 30"),
            ({"schedule": {"min_lr": 0.2}}, "schedule.min_lr is 0.2, above optimizer.lr 0.1."),
            ({"data": {"architecture_fraction": 0.6, "validation_fraction": 0.4}}, "data: architecture_fraction and"),
            ({"optimizer": {"name": "sgd", "momentum": 0}}, "write name: momentum."),
            # Names.
            ({"data": {"name": "mnits"}}, "there is no data set 'mnits'; did you mean 'mnist5k'?"),
            ({"data": {"name": "cifar-100"}}, "there is no data set 'cifar-100'; did you mean 'cifar100'?"),
            ({"name": "a/b"}, "'name' is 'a/b', but should match"),
            ({"name": ".."}, "'name' is '..', but should match"),
            ({"name": ""}, "'name' is '', but should match"),
            ({"name": "a\n"}, "'name' is 'a\\n', but should match"),
            ({"cream": {"teacher": "x"}}, "'cream.teacher' is 'x', but should be 'matching', 'top1' or 'none'."),
            ({"schedule": {"name": "x"}}, "'schedule.name' is 'x', but should be 'linear', 'cosine', 'exponential' or"),
            ({"space": {"resunit": "basic"}}, "'space.resunit' is 'basic', but should be a list."),
            ({"space": {"resunit": True}}, "space.resunit: true is not a value for this setting."),
            (
                {"space": {"resunit": ["basic", "wide"]}},
                "'space.resunit[1]' is 'wide', but should be 'bottleneck' or 'basic'.",
            ),
        ],
        ids=str,
    )
    def test_are_refused_in_a_sentence(self, tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
        file = write(tmp_path, SMALLEST | settings)
        message = refusal(file)
        assert message.startswith(f"{file}: ")
        assert expected in message

    @pytest.mark.parametrize("missing", ["name", "epochs", "flops"])
    def test_missing(self, tmp_path: Path, missing: str) -> None:
        settings = {key: value for key, value in SMALLEST.items() if key != missing}
        file = write(tmp_path, settings)
        assert refusal(file) == f"{file}: the setting '{missing}' is missing."

    @pytest.mark.parametrize(
        "settings",
        [
            {"flops": {"min": 2, "max": 2}},
            {"cream": {"warmup_epochs": 29}},
            {"cream": {"board_images": 32}},
            {"cream": {"board_images": 2}, "data": {"batch_size": 4}},
            {"cream": {"board_images": 64, "teacher": "top1"}},
            {"cream": {"board_images": 64, "teacher": "none"}},
            {"space": {"resunit": ["basic", "bottleneck"]}},
            {"space": {"resunit": []}},
            {"data": {"resolution": None}},
            {"cream": {"prior": [0, 1]}},
            {"schedule": {"warmup_epochs": 29, "min_lr": 0.1}},
            {"optimizer": {"lr": "1e-4"}},  # YAML 1.1 reads 1e-4 as text.
            {"epochs": 30.0},  # What a tuner that draws from a grid sends.
        ],
        ids=str,
    )
    def test_at_the_limit_are_taken(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        load_recipe(CreamRecipe, write(tmp_path, SMALLEST | settings), {})


class TestNesterov:
    def test_refuses_what_torch_refuses(self) -> None:
        import timm.optim
        from torch import nn

        def fails_in_torch(name: str) -> bool:
            try:
                timm.optim.create_optimizer_v2(nn.Linear(1, 1), **(settings | {"opt": name}))
            except ValueError as error:
                assert "Nesterov" in str(error)  # noqa: PT017 (others would be new to us)
                return True
            except AssertionError as error:
                assert "CUDA required" in str(error)  # noqa: PT017
            return False

        settings = Optimizer(name="momentum", momentum=0).timm_arguments()
        # timm lists neither its aliases nor the wrapper.
        names = [*timm.optim.list_optimizers(), "nesterov", "nesterovw", "SGD", "lookahead_sgd", "lookahead_adam"]
        refused = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of packages that some optimizers would like to have.
            expected = {name for name in names if fails_in_torch(name)}
            for name in names:
                try:
                    Optimizer(name=name, momentum=0)
                except ValueError as error:
                    refused[name] = str(error)
            assert set(refused) == expected
            assert {"sgd", "nesterov", "lookahead_sgd"} <= expected
            assert all("write name: momentum" in message for message in refused.values())
            assert not fails_in_torch("momentum")

    def test_with_momentum_is_taken(self) -> None:
        assert Optimizer(name="sgd", momentum=0.1).timm_arguments()["opt"] == "sgd"


class TestDataOfASearch:
    def test_takes_the_resolution_that_follows_from_the_interval(self, tmp_path: Path) -> None:
        file = write(tmp_path, SMALLEST | {"data": {"name": "digits", "resolution": 48, "workers": 3, "folder": "a"}})
        assert load_recipe(CreamRecipe, file, {}).data.resolution == 48
        recipe = load_recipe(CreamRecipe, file, dict([parse_override("data.resolution=null")]))
        assert recipe.data.resolution is None
        assert recipe.data.at(96) == Data(name="digits", resolution=96, workers=3, folder=Path("a"))
        (tmp_path / "written.yml").write_text(to_yaml(recipe), encoding="utf-8")
        assert load_recipe(CreamRecipe, tmp_path / "written.yml", {}) == recipe

    def test_is_the_only_one_without_a_resolution(self) -> None:
        with pytest.raises(ValueError, match="resolution"):
            Data.model_validate({"resolution": None})
        with pytest.raises(ValueError, match="resolution"):
            CreamRecipe.model_validate({**SMALLEST, "data": {"resolution": None}}).data.at(4)
        for inheriting in (ChildData(resolution=None), EvaluationData(resolution=None)):
            assert inheriting.completed({}).resolution == 32
            assert inheriting.completed({"resolution": 48}).resolution == 48


class TestDataOfAChild:
    @pytest.fixture
    def searched(self) -> dict[str, Any]:
        data = Data(name="folder", folder=Path("/images"), resolution=48, batch_size=16, validation_fraction=0.3)
        return data.model_dump(mode="json")

    def test_takes_data_set_and_resolution_from_the_search_and_nothing_else(self, searched: dict[str, Any]) -> None:
        assert ChildData().completed(searched) == Data(name="folder", folder=Path("/images"), resolution=48)

    def test_keeps_what_the_recipe_gives(self, searched: dict[str, Any]) -> None:
        given = ChildData(resolution=64, batch_size=8, folder=Path("/others"))
        assert given.completed(searched) == Data(name="folder", folder=Path("/others"), resolution=64, batch_size=8)

    def test_takes_the_folder_only_for_the_same_data_set(self, searched: dict[str, Any]) -> None:
        assert ChildData(name="folder").completed(searched).folder == Path("/images")
        assert ChildData(name="digits").completed(searched) == Data(name="digits", folder=None, resolution=48)
        other = ChildData(name="imagenet", folder=Path("/imagenet"))
        assert other.completed(searched).folder == Path("/imagenet")

    def test_without_a_search_is_the_default(self) -> None:
        assert ChildData().completed({}) == Data()

    @pytest.mark.parametrize("searched", [{"name": "mnits"}, {"resolution": "large"}, {"folder": 3}])
    def test_of_a_search_that_makes_no_sense(self, searched: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=str(next(iter(searched.values())))) as caught:
            ChildData().completed(searched)
        assert checked_sentence(str(caught.value)).startswith("The data settings of the search: ")


class TestDataOfACheckpoint:
    @pytest.fixture
    def stored(self) -> dict[str, Any]:
        data = Data(
            name="cifar10",
            folder=Path("/images"),
            download=True,
            resolution=48,
            batch_size=16,
            validation_fraction=0.3,
            augmentation={"interpolation": "bicubic", "hflip": 0.5},
        )
        return data.model_dump(mode="json")

    def test_is_what_is_stored_in_it(self, stored: dict[str, Any]) -> None:
        assert EvaluationData().completed(stored) == Data.model_validate({**stored, "download": False})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("folder", Path("/others")),
            ("download", True),
            ("resolution", 64),
            ("batch_size", 8),
            ("workers", 2),
        ],
    )
    def test_keeps_what_the_recipe_gives(self, stored: dict[str, Any], key: str, value: Any) -> None:
        completed = EvaluationData.model_validate({key: value}).completed(stored)
        assert getattr(completed, key) == value
        assert completed == EvaluationData().completed(stored).model_copy(update={key: value})

    def test_keeps_how_the_recipe_resizes(self, stored: dict[str, Any]) -> None:
        given = EvaluationData.model_validate({"augmentation": {"interpolation": "bilinear"}})
        assert given.completed(stored).augmentation.interpolation == "bilinear"

    def test_takes_the_folder_only_for_the_same_data_set(self, stored: dict[str, Any]) -> None:
        assert EvaluationData(name="cifar10").completed(stored).folder == Path("/images")
        other = EvaluationData(name="cifar100").completed(stored)
        assert (other.name, other.folder, other.resolution) == ("cifar100", None, 48)

    @pytest.mark.parametrize("stored", [{"name": "mnits"}, {"resolution": "large"}, {"colour": "blue"}])
    def test_that_makes_no_sense(self, stored: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"mnits|large|colour") as caught:
            EvaluationData().completed(stored)
        assert checked_sentence(str(caught.value)).startswith("The data settings of the checkpoint: ")

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"data": {"name": "mnits"}}, "did you mean 'mnist5k'?"),
            ({"data": {"validation_fraction": 0.2}}, "'data.validation_fraction' is not a setting"),
            ({"data": {"augmentation": {"interpolation": "random"}}}, "'data.augmentation.interpolation' is 'random'"),
            ({"device": {"devices": 2}}, "device.devices is 2, but a checkpoint is tested on one device."),
            ({"epochs": 3}, "'epochs' is not a setting"),
        ],
        ids=str,
    )
    def test_is_checked_as_soon_as_the_recipe_is_read(
        self, tmp_path: Path, settings: dict[str, Any], expected: str
    ) -> None:
        assert expected in refusal(write(tmp_path, settings), kind=EvaluationRecipe)
