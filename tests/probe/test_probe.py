"""The JSON of a probe, its inputs, its groups, and the verdict, on lists of numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.onnx.probe_runs import add_probe, probe_of
from lora_fx.probe.drawn import drawn
from lora_fx.probe.groups import groups_of
from lora_fx.probe.probe import Probe, ProbedAdapter, ProbeInput, ProbeOutput
from lora_fx.probe.sentences import sentence_of_causes
from lora_fx.probe.verdict import Gauge, Known, fitted_scale, verdict_on_adapter, verdict_on_base
from lora_fx.targets.found import Found
from tests.probe.model import adapters, encoder

PAGE = (Path(__file__).parent.parent.parent / "docs" / "probe.md").read_text()


def test_the_page_and_the_code_draw_alike() -> None:
    shown = re.search(r"Those of seed 1 begin with ([-\d., \n]+)\.\n", PAGE)
    assert shown
    numbers = [float(text) for text in shown[1].split(",")]
    assert drawn((len(numbers),), "float32", 1).tolist() == numbers


@given(st.integers(0, 2**32 - 1), st.integers(0, 3000))
def test_an_element_is_what_its_number_says(seed: int, index: int) -> None:
    x = ((index + 1) * 0x9E3779B1 + seed * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x ^= x >> 16
    expected = ((x >> 20) - 2048) / 1024
    tensor = drawn((index + 1,), "float32", seed)
    assert tensor[index] == expected
    assert drawn((index + 1,), "float16", seed)[index] == expected


def test_elements_are_spread_evenly() -> None:
    values = drawn((3, 224, 224), "float32", 5)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 4 / np.sqrt(12)) < 0.01
    assert abs(np.corrcoef(values.reshape(-1)[:-1], values.reshape(-1)[1:])[0, 1]) < 0.01


PROBE = Probe(
    "switch",
    {
        "ids": ProbeInput("int64", (1, 3), values=(3, 1, 4)),
        "mask": ProbeInput("bool", (1, 3), fill=1),
        "x": ProbeInput("float32", (2, 2), seed=7),
    },
    {"y": ProbeOutput((1, 4), 2.0, 1e-5)},
    (("y", 3), ("y", 0)),
    np.array([0.25, -1.5]),
    {
        "de": ProbedAdapter(
            np.array([0.5, -1.75]),
            None,
            "de.onnx_adapter",
            np.array([0.375, -1.625]),
            np.array([0.75, -2.0]),
            {"q": np.array([0.25, -1.75])},
        )
    },
    {"bfloat16": 0.004},
    {"versions": {"lora-fx": "0.1.0"}},
)


def test_a_probe_is_read_as_it_was_written() -> None:
    text = PROBE.to_text()
    again = Probe.from_text(text, "m.onnx")
    assert again.to_text() == text
    assert again.feeds()["ids"].tolist() == [[3, 1, 4]]
    assert again.feeds()["mask"].tolist() == [[True, True, True]]
    assert (again.feeds()["x"] == drawn((2, 2), "float32", 7)).all()
    assert again.without_groups().adapters["de"].groups == {}


def test_the_example_of_the_page_is_a_probe() -> None:
    (shown,) = re.findall(r"```json\n(\{\n  \"format\".*?)```", PAGE, re.S)
    data = json.loads(shown)
    data["inputs"]["ids"]["values"] = list(range(10))
    assert Probe.from_text(json.dumps(data), "the page").adapters["de"].number == 1


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what a path of keys leads to."""

    def apply(data: dict[str, Any]) -> None:
        *before, last = path.split("/")
        for key in before:
            data = data[key]
        data[last] = value

    return apply


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (change("format", 2), "has the format 2; expected 1"),
    "no format": (change("format", None), "has the format None"),
    "true as a format": (change("format", True), "has the format True"),
    "another mode": (change("mode", "run"), "mode is 'run'; expected one of merged"),
    "inputs as a list": (change("inputs", []), "inputs is []; expected an object"),
    "a dtype that is none": (change("inputs/x/dtype", "object"), "expected the name of a dtype"),
    "huge sizes": (change("inputs/x/shape", [2**20, 2**20]), "at most 33554432"),
    "many sizes": (change("inputs/x/shape", [1] * 65), "expected at most 64 sizes"),
    "a negative size": (change("inputs/x/shape", [-1]), "expected at most 64 sizes"),
    "a size that is no number": (change("inputs/x/shape", ["a"]), "expected at most 64 sizes"),
    "too few values": (change("inputs/ids/values", [1]), "is '1 numbers'; expected 3 numbers"),
    "values that are text": (change("inputs/ids/values", ["a"] * 3), "expected a finite number"),
    "a token that is no whole number": (
        change("inputs/ids/values", [1, 2.5, 3]), "is 2.5; expected a number of int64",
    ),
    "a token beyond int64": (change("inputs/ids/values", [1, 2**63, 3]), "a number of int64"),
    "a mask of 2": (change("inputs/mask/fill", 2), "is 2; expected a number of bool"),
    "a divisor that vanishes": (
        lambda data: data["outputs"]["y"].update(largest=1e-200, tolerance=1e-200),
        "expected a larger number",
    ),
    "two sources": (change("inputs/ids/fill", 1), "expected one of values, fill and drawn"),
    "a drawn integer": (
        lambda data: data["inputs"].update(ids={"dtype": "int64", "shape": [1], "drawn": 1}),
        "expected a seed of 32 bits, for a float dtype",
    ),
    "a large seed": (change("inputs/x/drawn", 2**32), "expected a seed of 32 bits"),
    "no points": (change("points", []), "points is '0 of them'; expected 1 to 64"),
    "a million points": (change("points", [["y", 0]] * 5000), "expected 1 to 64"),
    "a point outside": (change("points", [["y", 4], ["y", 0]]), "expected an index into one"),
    "a point of no output": (change("points", [["z", 0], ["y", 0]]), "expected an index into one"),
    "a point that is text": (change("points", ["y", "y"]), "expected the name of an output"),
    "a base of another length": (change("base", [1.0]), "base is '1 numbers'; expected 2 numbers"),
    "a tolerance of 0": (change("outputs/y/tolerance", 0), "expected a number above 0"),
    "a largest of 0": (change("outputs/y/largest", 0), "expected a number above 0"),
    "a path": (change("adapters/de/file", "../de.onnx_adapter"), "expected the name of a file"),
    "a drive": (change("adapters/de/file", "c:de"), "expected the name of a file"),
    "an id of 0": (change("adapters/de/id", 0), "expected a whole number from 1"),
    "many groups": (
        change("adapters/de/groups", {str(i): [0, 0] for i in range(17)}), "expected at most 16",
    ),
    "an adapter without a name": (
        lambda data: data["adapters"].update({"": data["adapters"]["de"]}),
        "adapters is 'an empty name'; expected names",
    ),
    "two adapters of one file": (
        lambda data: data["adapters"].update(fr=data["adapters"]["de"]),
        "adapters.file is 'one of two'; expected another for each adapter",
    ),
    "an empty input whose other sizes are huge": (
        change("inputs/x/shape", [0, 2**31 - 1, 2**31 - 1]), "at most 33554432",
    ),
    "a number beyond float32": (
        lambda data: data["inputs"].update(x={"dtype": "float32", "shape": [1], "fill": 1e300}),
        "expected numbers of float32",
    ),
    "control characters": (
        change("adapters/a\u202eb", {"values": []}), "adapters.a\\u202eb.values",
    ),
    "a precision of text": (change("precisions/bfloat16", "x"), "expected a finite number"),
    "facts as a text": (change("facts", "x"), "facts is 'x'; expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_probe_is_refused(case: str) -> None:
    apply, expected = HOSTILE[case]
    data = json.loads(PROBE.to_text())
    apply(data)
    with pytest.raises(LoraFxError) as error:
        Probe.from_text(json.dumps(data), "m.onnx")
    assert expected in error.value.message
    assert "\n" not in error.value.message and "\x1b" not in error.value.message
    assert len(error.value.message) < 400


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" " * 65537, "has 65537 bytes; expected at most 65536"),
        ("{", "not valid JSON"),
        ('{"format": 1, "format": 1}', "appears twice"),
        ('{"format": NaN}', "NaN is not JSON"),
        ("[" * 60000, "too deeply nested"),
        ("[]", "a JSON list, not an object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_what_is_no_probe_is_refused(text: str | bytes, expected: str) -> None:
    with pytest.raises(LoraFxError, match=re.escape(expected)):
        Probe.from_text(text, "m.onnx")


@pytest.mark.parametrize("mode", ["merged", "switch", "batch", "load", "train", "adapter"])
def test_a_probe_that_a_file_does_not_fit_is_one_line(tmp_path: Path, mode: str) -> None:
    """A probe of another model, or of another mode than the file's: nothing raw is raised."""
    model, ids = encoder()
    path = tmp_path / "m.onnx"
    lora_fx.export(model, path, (ids,), adapters=adapters(), mode="switch", probe="none")
    add_probe(path, replace(PROBE, mode=mode))
    with pytest.raises(LoraFxError) as error:
        lora_fx.verify(path)
    assert "\n" not in error.value.message


def test_a_file_with_a_probe_is_valid(tmp_path: Path) -> None:
    model, ids = encoder()
    path = tmp_path / "m.onnx"
    lora_fx.export(model, path, (ids,))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert probe_of(path).mode == "merged"


POINTS = 8
NUMBERS = st.lists(st.floats(-2, 2), min_size=POINTS, max_size=POINTS).map(np.array)
GAUGE = Gauge(np.full(POINTS, 2.0), np.full(POINTS, 1e-5), {"tf32": 1e-3, "bfloat16": 8e-3})


@given(NUMBERS, NUMBERS)
def test_what_is_expected_is_right(base: Any, change_of_adapter: Any) -> None:
    known = Known(base + change_of_adapter, base)
    verdict = verdict_on_adapter(known.expected, known, GAUGE)
    is_seen = np.abs(change_of_adapter).max() > 4e-5
    assert verdict == ("right" if is_seen else "too small to tell")
    assert verdict_on_base(base, base, {}, GAUGE) == "right"


@given(NUMBERS, NUMBERS, st.integers(10, 300))
def test_a_scale_is_named_only_where_it_explains(base: Any, slope: Any, hundredths: int) -> None:
    """Outputs that are linear in the scale, which the cubic fits exactly."""
    slope = slope + np.copysign(0.01, slope)  # that every point is moved
    scale = hundredths / 100
    known = Known(base + slope, base, {}, {}, base + slope / 2, base + 2 * slope)
    found = fitted_scale(base + scale * slope, known, GAUGE)
    if abs(scale - 1) <= 0.1 + 1e-9:
        assert found is None
    else:
        assert found == pytest.approx(scale)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_no_cause_is_named_for_anything_else(base: Any, change_of_adapter: Any, other: Any) -> None:
    """A named cause explains the run: its own outputs are near what was found."""
    known = Known(
        base + change_of_adapter,
        base,
        {"fr": base - change_of_adapter},
        {},
        base + change_of_adapter / 2,
        base + 2 * change_of_adapter,
    )
    verdict = verdict_on_adapter(other, known, GAUGE)
    assert not str(verdict).startswith("scaled") or verdict in ("scaled by 0.5", "scaled by 2")
    near = {
        "right": known.expected,
        "no effect": base,
        "adapter fr": known.others["fr"],
    }
    cause, _, precision = verdict.partition(" in ")
    level = GAUGE.precisions.get(precision, 1e-5)
    for name in cause.split(" or "):
        if name in near:
            assert GAUGE.distance(other, near[name]) <= level


def test_a_number_that_is_not_finite_is_told() -> None:
    base = np.zeros(POINTS)
    known = Known(base + 1, base)
    for number in (np.nan, np.inf, -np.inf):
        found = base + 1
        found[3] = number
        assert verdict_on_adapter(found, known, GAUGE) == "not finite"
        assert verdict_on_base(found, base, {}, GAUGE) == "not finite"


def test_the_largest_numbers_are_compared() -> None:
    """Without a warning of numpy's: a probe's numbers are those of a file."""
    base = np.full(POINTS, 1e308)
    known = Known(-base, base, {}, {"q": base}, base, -base)
    assert verdict_on_adapter(base, known, GAUGE) == "no effect or without q or scaled by 0.5"


SIGNS = np.array([1, -1, 1, 1, -1, -1, 1, -1])


def test_two_causes_that_are_alike_are_both_named() -> None:
    base = np.zeros(POINTS)
    known = Known(base + 1, base, {}, {"q": base, "v": base + 0.5})
    assert verdict_on_adapter(base, known, GAUGE) == "no effect or without q"
    assert verdict_on_adapter(base + 0.5, known, GAUGE) == "without v"
    assert verdict_on_adapter(base + 0.5 + 0.001 * SIGNS, known, GAUGE) == "without v in tf32"
    assert verdict_on_adapter(base + 1 + 0.001 * SIGNS, known, GAUGE) == "right in tf32"
    assert verdict_on_adapter(base + 1 + 0.01 * SIGNS, known, GAUGE) == "right in bfloat16"
    assert verdict_on_adapter(base + 1 + 0.1 * SIGNS, known, GAUGE) == "differs"


def test_no_precision_hides_a_small_effect() -> None:
    base = np.zeros(POINTS)
    known = Known(base + 0.02, base)
    assert verdict_on_adapter(base + 0.02 + 0.0005 * SIGNS, known, GAUGE) == "right in tf32"
    assert verdict_on_adapter(base + 0.02 + 0.008 * SIGNS, known, GAUGE) == "differs"


def test_a_scale_near_one_is_no_precision() -> None:
    base = np.zeros(POINTS)
    known = Known(base + 0.02 * SIGNS, base)
    assert verdict_on_adapter(1.02 * known.expected, known, GAUGE) == "scaled by 1.02"
    assert verdict_on_adapter(0.97 * known.expected, known, GAUGE) == "scaled by 0.97"


def test_a_few_points_tell_no_scale() -> None:
    """One number, such as a mean, lies near the cubic of every adapter."""
    for count in (1, 2, 7):
        few = Gauge(GAUGE.largest[:count], GAUGE.tolerance[:count], GAUGE.precisions)
        base = np.zeros(count)
        known = Known(base + 1, base, {}, {}, base + 0.5, base + 2)
        for number in (0.3, 0.95, 1.04, 1.5, 2.6):
            assert verdict_on_adapter(base + number, known, few) in ("differs", "right in bfloat16")


def test_names_that_hold_the_words_of_verdicts() -> None:
    base = np.zeros(POINTS)
    name = "x or y in z"
    known = Known(base + 1, base, {name: base + 2 * SIGNS})
    verdict = verdict_on_adapter(base + 2 * SIGNS, known, GAUGE)
    assert verdict == "adapter x or y in z"
    assert verdict.causes == ("adapter x or y in z",)
    assert verdict.precision == "" and not verdict.is_right
    assert sentence_of_causes(verdict) == "the outputs are those of the adapter x or y in z"


def found_targets() -> Found:
    model, ids = encoder()
    return lora_fx.find(model, (ids,))


@pytest.mark.parametrize(
    ("most", "count", "first"),
    [
        (24, 20, "embedding"),
        (16, 14, "embedding"),
        (8, 8, "embedding"),
        (3, 3, "all, first third"),
    ],
)
def test_groups_are_roles_and_parts_of_the_depth(most: int, count: int, first: str) -> None:
    found = found_targets()
    groups = groups_of(found.targets, most)
    assert len(groups) == count
    assert next(iter(groups)) == first
    keys = [key for keys_of_group in groups.values() for key in keys_of_group]
    assert sorted(keys) == sorted(target.key for target in found.targets)
