"""Paths and genotypes with one fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.trials.bad_input.refusals import GENOTYPE, PATH, TEXTS, fuzz, refused

CHOICES = st.integers(min_value=10) | st.integers(max_value=-1) | st.sampled_from([1.5, "3", None, True, [3], {}])


@st.composite
def wrong_paths(draw: st.DrawFn) -> str:
    stages: list[Any] = PATH.to_json()
    fault = draw(st.sampled_from(["fewer", "more", "empty", "choice", "end", "number", "cut", "code"]))
    position = draw(st.integers(min_value=0, max_value=6))
    if fault == "fewer":
        del stages[position]
    elif fault == "more":
        stages.insert(position, [0])
    elif fault == "empty":
        stages[position] = []
    elif fault == "choice":
        stages[position] = [draw(CHOICES)]
    elif fault == "end":
        stages[draw(st.sampled_from([0, -1]))] = draw(st.sampled_from([[1], [0, 0]]))
    elif fault == "number":
        stages[position] = draw(st.integers())
    elif fault == "cut":
        # The first bracket closes at the end only.
        return str(stages)[: draw(st.integers(min_value=1, max_value=len(str(stages)) - 1))]
    else:
        return f"[[__import__('os').mkdir('executed')], {str(stages)[1:]}"
    return str(stages)


@st.composite
def wrong_genotypes(draw: st.DrawFn) -> str:
    fields = json.loads(json.dumps(GENOTYPE.to_json()))
    cell = draw(st.sampled_from(["normal", "reduce"]))
    edge = draw(st.integers(min_value=0, max_value=7))
    fault = draw(st.sampled_from(["operation", "state", "odd", "concat", "missing", "surplus", "type", "cut", "code"]))
    if fault == "operation":
        fields[cell][edge][0] = draw(st.sampled_from(["sep_conv_9x9", "", "Conv2d", "os.system", "a b", "é"]))
    elif fault == "state":
        fields[cell][edge][1] = draw(st.integers(max_value=-1) | st.integers(min_value=2 + edge // 2))
    elif fault == "odd":
        del fields[cell][edge]
    elif fault == "concat":
        wrong = st.sampled_from([[], [2, 2], [0], [1, 2], [6], [-1], ["2"], [2.0], [True]])
        fields[f"{cell}_concat"] = draw(wrong)
    elif fault == "missing":
        del fields[draw(st.sampled_from(sorted(fields)))]
    elif fault == "surplus":
        fields["colour"] = [1]
    elif fault == "type":
        fields[cell] = draw(st.sampled_from([None, 3, "abc", [1, 2], [[1, 2], [3, 4]], [["skip_connect"]], {}]))
    text = "Genotype(" + ", ".join(f"{key}={value}" for key, value in fields.items()) + ")"
    if fault == "cut":
        return text[: draw(st.integers(min_value=len("Genotype("), max_value=len(text) - 1))]
    if fault == "code":
        call = "__import__('os').mkdir('executed')"
        return draw(st.sampled_from([f"Genotype({call})", f"Genotype(normal={call})", f"{text} or {call}"]))
    return text


class TestArchitectures:
    @fuzz(60)
    @given(wrong_paths() | wrong_genotypes() | TEXTS.map(lambda text: f"no {text}"))
    def test_with_a_fault(self, place: Path, text: str) -> None:
        arguments = ["--set", "data.name=digits", "--set", "data.resolution=32", "--set", "darts.channels=4"]
        refused(place, "retrain_child", f"--architecture={text}", "--name", "a", *arguments)
