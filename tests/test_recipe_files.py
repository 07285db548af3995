from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nni_cream.errors import UserError
from nni_cream.recipe import CreamRecipe, DartsRecipe, EvaluationRecipe, RetrainRecipe
from nni_cream.recipe_files import changed_settings, dotted_keys, load_recipe, parse_override, text_keys
from nni_cream.settings import Optimizer, Settings
from tests.recipes import SMALLEST, checked_sentence, refusal, write


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("settings", "wrong", "right"),
        [
            ({"epoch": 3}, "epoch", "epochs"),
            ({"optimiser": {"lr": 1}}, "optimiser", "optimizer"),
            ({"lr": 0.1}, "lr", "optimizer.lr"),
            ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", "optimizer.lr"),
            ({"data": {"batchsize": 3}}, "data.batchsize", "data.batch_size"),
            ({"data": {"augmentation": {"hlip": 1}}}, "data.augmentation.hlip", "data.augmentation.hflip"),
            ({"data": {"augmentations": {"hflip": 1}}}, "data.augmentations", "data.augmentation"),
            ({"cream": {"warm_up_epochs": 1}}, "cream.warm_up_epochs", "cream.warmup_epochs"),
        ],
    )
    def test_names_file_key_and_the_nearest_key(
        self, tmp_path: Path, settings: dict[str, Any], wrong: str, right: str
    ) -> None:
        file = write(tmp_path, SMALLEST | settings)
        assert refusal(file) == f"{file}: '{wrong}' is not a setting; did you mean '{right}'?"

    def test_is_named_before_what_else_is_wrong(self, tmp_path: Path) -> None:
        # 'epoch' is also why 'epochs' is missing.
        message = refusal(write(tmp_path, {"name": "a", "epoch": 3, "flops": {"min": 2, "max": 1}}))
        assert "'epoch' is not a setting; did you mean 'epochs'?" in message

    @pytest.mark.parametrize("settings", [{1: 2}, {"data": {1: 2}}])
    def test_that_are_no_text(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        assert "the key 1 should be text." in refusal(write(tmp_path, SMALLEST | settings))

    def test_of_the_other_kind_of_recipe(self, tmp_path: Path) -> None:
        file = write(tmp_path, {"name": "a", "epochs": 1, "flops": {"min": 1, "max": 2}})
        assert "'flops' is not a setting" in refusal(file, kind=RetrainRecipe)


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"name: [", "is not valid YAML"),
            (b"name: a\n  epochs: 3", "is not valid YAML"),
            (b"a\0b", "is not valid YAML"),
            (b"name: a\nepochs: 3\nname: b", "is not valid YAML: 'name' stands in lines 1 and 3; leave one out."),
            (b"data:\n  name: a\n  name: a", "is not valid YAML: 'name' stands in lines 2 and 3; leave one out."),
            (b"data: {name: a, 'name': b}", "'name' stands in lines 1 and 1"),
            (b"name: " + b"[" * 5000, "is not valid YAML"),
            (b"name: !!python/object/apply:os.system [ls]", "is not valid YAML"),
            (b"seed: 2020-13-45", "is not valid YAML"),  # PyYAML takes it for a date.
            (b"", "should be a YAML mapping of settings"),
            (b"# nothing but a comment", "should be a YAML mapping of settings"),
            (b"- a\n- b", "should be a YAML mapping of settings"),
            (b"epochs", "should be a YAML mapping of settings"),
            (b"name: \xff", "cannot be read"),
        ],
    )
    def test_that_are_no_recipe(self, tmp_path: Path, content: bytes, expected: str) -> None:
        file = tmp_path / "wrong.yml"
        file.write_bytes(content)
        message = refusal(file)
        assert message.startswith(f"The recipe {file} ")
        assert expected in message

    def test_that_are_missing(self, tmp_path: Path) -> None:
        message = refusal(tmp_path / "none.yml")
        assert message == f"There is no recipe {tmp_path / 'none.yml'}; those shipped are in experiments/recipes/."

    def test_that_are_folders(self, tmp_path: Path) -> None:
        assert refusal(tmp_path).startswith(f"The recipe {tmp_path} cannot be read: ")


class TestOverrides:
    def test_replace_what_the_file_says(self, tmp_path: Path) -> None:
        file = write(tmp_path, SMALLEST | {"optimizer": {"lr": 0.5, "momentum": 0.8}})
        recipe = load_recipe(
            CreamRecipe,
            file,
            {"optimizer.lr": 0.2, "data.augmentation.hflip": 0.5, "cream.prior": [1, 2], "epochs": 40},
        )
        assert (recipe.optimizer.lr, recipe.optimizer.momentum) == (0.2, 0.8)
        assert recipe.data.augmentation.hflip == 0.5
        assert recipe.cream.prior == (1, 2)
        assert recipe.epochs == 40

    def test_may_replace_a_group(self, tmp_path: Path) -> None:
        file = write(tmp_path, SMALLEST | {"optimizer": {"lr": 0.5, "momentum": 0.8}})
        assert load_recipe(CreamRecipe, file, {"optimizer": {"lr": 0.2}}).optimizer == Optimizer(lr=0.2)

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("optimizer.l", "optimizer.lr"),
            ("lr", "optimizer.lr"),
            ("optimizr.lr", "optimizer.lr"),
            ("data.name.x", "data.name"),
            ("batch_size", "data.batch_size"),
        ],
    )
    def test_of_an_unknown_key(self, tmp_path: Path, wrong: str, right: str) -> None:
        message = refusal(write(tmp_path, SMALLEST), {wrong: 1})
        assert message == f"'{wrong}' is not a setting; did you mean '{right}'?"

    @pytest.mark.parametrize(
        ("overrides", "group"),
        [
            ({"data": 5, "data.folder": "x"}, "data"),
            ({"data.augmentation": 5, "data.augmentation.hflip": 1}, "data.augmentation"),
        ],
    )
    def test_of_a_member_of_what_is_no_group_any_more(
        self, tmp_path: Path, overrides: dict[str, Any], group: str
    ) -> None:
        message = refusal(write(tmp_path, SMALLEST), overrides)
        assert (
            message
            == f"'{list(overrides)[-1]}' cannot be set because '{group}' is not a group of settings in the recipe."
        )

    def test_with_a_wrong_value(self, tmp_path: Path) -> None:
        assert "'optimizer.lr' is -1, but should be greater than 0." in refusal(
            write(tmp_path, SMALLEST), {"optimizer.lr": -1}
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("data.folder=null", ("data.folder", None)),
            ("data.folder=", ("data.folder", None)),
            ("cream.prior=[1, 2.5]", ("cream.prior", [1, 2.5])),
            ("data.download=true", ("data.download", True)),
            ("optimizer.lr=0.2", ("optimizer.lr", 0.2)),
            ("data.folder=/a=b", ("data.folder", "/a=b")),
            (" epochs = 3", ("epochs", 3)),
            ("optimizer={lr: 0.2}", ("optimizer", {"lr": 0.2})),
        ],
    )
    def test_on_the_command_line_are_yaml(self, text: str, expected: tuple[str, Any]) -> None:
        assert parse_override(text) == expected

    @pytest.mark.parametrize("text", ["epochs", "=3", " =3", "epochs=[", "seed=2020-13-45"])
    def test_on_the_command_line_that_are_none(self, text: str) -> None:
        with pytest.raises(UserError) as caught:
            parse_override(text)
        assert repr(text) in checked_sentence(str(caught.value))

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("/x/photos #2", "/x/photos #2"),
            ("2024", "2024"),
            ("2024-01-05", "2024-01-05"),
            ("a: b", "a: b"),
            ("@x", "@x"),
            ("[x]", "[x]"),
            ("true", "true"),
            (" /x ", "/x"),
            ("'/x #2'", "/x #2"),
            ("'it''s'", "it's"),
            ('"a\\tb"', "a\tb"),
            (r'"a\q"', r'"a\q"'),
            ("'a' and 'b'", "'a' and 'b'"),
            ("'a' # 'b'", "'a' # 'b'"),
            ("'2024'", "2024"),
            ("'null'", "null"),
            ("", None),
            ("null", None),
            ("~", None),
        ],
    )
    def test_on_the_command_line_of_text_are_as_they_stand(self, value: str, expected: str | None) -> None:
        key = "data.folder"
        assert parse_override(f"{key}={value}", {key: True}) == (key, expected)
        assert parse_override(f"{key}={value}", {key: False}) == (key, value if expected is None else expected)

    @pytest.mark.parametrize(("kind", "of_data"), [(CreamRecipe, False), (RetrainRecipe, True)])
    def test_of_text_are_known_from_the_recipe(self, kind: type[Settings], of_data: bool) -> None:
        expected = {"name": False, "data.name": of_data, "data.folder": True, "data.augmentation.auto_augment": True}
        expected["optimizer.name"] = False
        if kind is CreamRecipe:
            expected["latency.table"] = True
        assert text_keys(kind) == expected


class TestChangedSettings:
    def test_are_none_where_only_what_has_to_be_given_is_given(self) -> None:
        recipe = CreamRecipe.model_validate({"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}})
        assert changed_settings(recipe) == {}

    def test_are_named_with_value_and_default(self) -> None:
        recipe = DartsRecipe.model_validate(
            {
                "name": "a",
                "epochs": 3,
                "seed": 7,
                "data": {"resolution": 16, "augmentation": {"hflip": 0.5}, "name": "mnist5k"},
                "space": {"operations": ["none", "skip_connect"]},
                "optimizer": {"name": "momentum"},
                "darts": {"eigenvalue": "track", "alpha_betas": [0.5, 0.999]},
            }
        )
        changed = changed_settings(recipe)
        assert changed.pop("space.operations")[0] == ("none", "skip_connect")
        assert changed == {
            "seed": (7, 0),
            "data.resolution": (16, 32),
            "data.augmentation.hflip": (0.5, None),
            "optimizer.name": ("momentum", "sgd"),
            "darts.eigenvalue": ("track", "off"),
        }

    @pytest.mark.parametrize("kind", [CreamRecipe, DartsRecipe, RetrainRecipe, EvaluationRecipe])
    def test_have_keys_that_can_be_set(self, kind: type[Settings]) -> None:
        required = {"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}}
        given = {key: value for key, value in required.items() if key in kind.model_fields}
        recipe = kind.model_validate({**given, "device": {"threads": 3}})
        assert changed_settings(recipe) == {"device.threads": (3, None)}
        assert set(changed_settings(recipe)) <= set(dotted_keys(kind))
