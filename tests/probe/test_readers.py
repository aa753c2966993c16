"""The three readers of samples/probe and lora-fx give the same verdicts, on all seeded failures."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.errors import LoraFxError
from lora_fx.onnx.runtime_adapter import SERVED, write_file
from lora_fx.passes.verbs.verify_probe import verify_probe
from lora_fx.probe.probe import BASE, MOST_BYTES, Probe
from tests.probe.probe_files import FAILURES, Network, network, probe_of, write_model
from tests.probe.random_cases import huge_case, random_case
from tests.probe.readers import EVERY, READERS, Python, Reader

CASES = [(name, mode) for name, failure in FAILURES.items() for mode in failure.modes]
RANDOM = 1200
"""Random cases that all readers judge."""
Readers = Callable[[str], Reader]
Files = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    """A reader by its name, compiled once."""
    cache: dict[str, Reader] = {}

    def reader(name: str) -> Reader:
        if name not in cache:
            cache[name] = READERS[name](tmp_path_factory.mktemp("reader"))
        return cache[name]

    return reader


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The file of a seeded failure in a mode, written once."""
    paths: dict[tuple[str, str], Path] = {}

    def file(name: str, mode: str) -> Path:
        if (name, mode) not in paths:
            paths[name, mode] = FAILURES[name].write(tmp_path_factory.mktemp("file"), mode)
        return paths[name, mode]

    return file


def expect(reader: Reader, path: Path, expected: dict[str, Any]) -> None:
    """Compare a reader's answer on a file."""
    answer = reader.check(path)
    assert answer.error == ""
    assert answer.result == expected
    verdicts = {value for key, value in expected.items() if key != "adapters"}
    verdicts |= {*expected["adapters"].values()}
    assert answer.code == (0 if verdicts <= {"right", "too small to tell"} else 1)


def of_lora_fx(path: Path) -> dict[str, Any]:
    """Return what lora-fx verify finds, as the readers print it."""
    details = verify_probe(path, provider="cpu").details
    verdicts = {row["adapter"] or BASE: row["verdict"] for row in details["verdicts"]}
    result: dict[str, Any] = {}
    if BASE in verdicts:
        result["base"] = verdicts.pop(BASE)
    if "ids" in details:
        result["ids"] = details["ids"]
    return {**result, "adapters": verdicts}


# Files


@pytest.mark.parametrize(("failure", "mode"), CASES)
def test_python_finds_a_failure(failure: str, mode: str, readers: Readers, files: Files) -> None:
    expect(readers("python"), files(failure, mode), FAILURES[failure].expected(mode))


@pytest.mark.slow
@pytest.mark.parametrize("reader", EVERY[1:])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_found(failure: str, reader: str, readers: Readers, files: Files) -> None:
    for mode in FAILURES[failure].modes:
        if mode in READERS[reader].modes:
            expect(readers(reader), files(failure, mode), FAILURES[failure].expected(mode))


@pytest.mark.parametrize(("failure", "mode"), CASES)
def test_lora_fx_finds_the_same(failure: str, mode: str, files: Files) -> None:
    assert of_lora_fx(files(failure, mode)) == FAILURES[failure].expected(mode)


@pytest.mark.parametrize("reader", EVERY)
def test_the_program(reader: str, readers: Readers, files: Files) -> None:
    """Each as its user runs it, once where all is right and once where not."""
    run = Reader.check  # of a process of its own, for Python too
    right = run(readers(reader), files("right", "portable"))
    assert (right.code, right.error) == (0, "")
    assert right.result == {"base": "right", "adapters": {"de": "right", "fr": "right"}}
    wrong = run(readers(reader), files("the last adapter for every id", "batch"))
    assert (wrong.code, wrong.error) == (1, "")
    assert wrong.result == FAILURES["the last adapter for every id"].expected("batch")
    for arguments in ((), ("a.onnx", "b.onnx")):
        command = [*readers(reader).command, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and not done.stdout
        assert re.fullmatch(r"Error: .*\[--any-precision\] MODEL.onnx\n", done.stderr)


@pytest.mark.parametrize("reader", EVERY)
def test_another_precision_can_be_right(reader: str, readers: Readers, files: Files) -> None:
    path = files("another precision", "merged")
    assert readers(reader).check(path).code == 1
    assert readers(reader).check(path, "--any-precision").code == 0
    path = files("no effect in another precision", "merged")
    assert readers(reader).check(path, "--any-precision").code == 1


def without_adapters(known: Network) -> Network:
    return replace(known, adapters={})


@pytest.mark.parametrize("reader", EVERY)
@pytest.mark.parametrize("mode", ["merged", "switch", "portable", "load"])
def test_a_file_without_adapters(mode: str, reader: str, readers: Readers, tmp_path: Path) -> None:
    known = without_adapters(network())
    path = write_model(tmp_path, mode, known, json.dumps(probe_of(known, mode)))
    expect(readers(reader), path, {"base": "right", "adapters": {}})


@pytest.mark.parametrize("reader", EVERY)
def test_an_input_of_bfloat16(reader: str, readers: Readers, tmp_path: Path) -> None:
    """Drawn numbers have more bits than bfloat16, and are rounded."""
    known = replace(without_adapters(network()), half="bfloat16")
    path = write_model(tmp_path, "merged", known, json.dumps(probe_of(known, "merged")))
    if reader == "javascript":
        check_refusal(readers(reader), path, "no tensors of dtype bfloat16")
    else:
        expect(readers(reader), path, {"base": "right", "adapters": {}})


ODD = ("10", "2", "__proto__", "\x1b[31m \u202e\n", "ä\U0001f600")
"""Names that languages sort, or treat as their own, or that a terminal obeys."""


@pytest.mark.parametrize("reader", EVERY)
def test_odd_names(reader: str, readers: Readers, tmp_path: Path) -> None:
    """Those that compute the same are all named, in the order of the file."""
    known = network()
    odd = {name: known.adapters["fr"] for name in ODD}
    known = replace(known, adapters={"de": known.adapters["de"], **odd})
    computed = replace(known, adapters={**known.adapters, "de": odd["10"]})
    probe = probe_of(known, "batch")
    path = write_model(tmp_path, "batch", computed, json.dumps(probe, ensure_ascii=False))
    answer = readers(reader).check(path)
    assert answer.result is not None and answer.code == 1
    names = " or ".join(f"adapter {name}" for name in ODD)
    assert answer.result["adapters"] == {"de": names, **dict.fromkeys(ODD, "right")}
    assert answer.text.isascii() and answer.text[:-1].isprintable()


@pytest.mark.parametrize("reader", EVERY[1:2])
@pytest.mark.parametrize("mode", ["switch", "load"])
def test_what_javascript_cannot_run(mode: str, reader: str, readers: Readers, files: Files) -> None:
    check_refusal(readers(reader), files("right", mode), f"mode {mode}: onnxruntime-web ")


# Probes that others wrote


def edited(**changes: Any) -> str:
    """Return the text of a good probe with other fields."""
    return json.dumps({**probe_of(network(), "switch"), **changes})


def with_input(**changes: Any) -> str:
    """Return the text of a good probe with another input x."""
    inputs = probe_of(network(), "switch")["inputs"]
    changed = {key: value for key, value in {**inputs["x"], **changes}.items() if value != ...}
    return edited(inputs={**inputs, "x": changed})


def with_output(**changes: Any) -> str:
    """Return the text of a good probe with another output y."""
    outputs = probe_of(network(), "switch")["outputs"]
    return edited(outputs={"y": {**outputs["y"], **changes}})


def with_adapter(mode: str = "switch", **changes: Any) -> str:
    """Return the text of a good probe with another adapter de."""
    probe = probe_of(network(), mode)
    probe["adapters"]["de"] |= changes
    return json.dumps(probe)


GOOD = edited()
VALUES = probe_of(network(), "switch")["base"]
HOSTILE = {
    "empty": "",
    "no JSON": "{",
    "no object": "[]",
    "a number": "1",
    "deep": "[" * 30_000 + "]" * 30_000,
    "long": GOOD + " " * MOST_BYTES,
    "half a pair": GOOD.replace('"de"', '"\\ud800"'),
    "another format": edited(format=2),
    "no format": edited(format=None),
    "a format that is a text": edited(format="1"),
    "a format that is true": edited(format=True),
    "an unknown mode": edited(mode="\x1b[2J"),
    "a mode of other files": edited(mode="adapter"),
    "no mode": edited(mode=["switch"]),
    "inputs in a list": edited(inputs=[]),
    "no inputs": edited(inputs=None),
    "an input that is none": edited(inputs={"x": 1}),
    "an unknown dtype": with_input(dtype="string"),
    "no dtype": with_input(dtype=None),
    "a drawn number": with_input(dtype="int64"),
    "a negative seed": with_input(drawn=-1),
    "a large seed": with_input(drawn=1 << 32),
    "a broken seed": with_input(drawn=0.5),
    "two sources": with_input(fill=1),
    "no source": with_input(drawn=...),
    "a huge input": with_input(shape=[1 << 13, 1 << 13]),
    "an input beyond all numbers": with_input(shape=[1 << 50] * 15),
    "a negative size": with_input(shape=[-2, 3, 3]),
    "a size of NaN": with_input(shape=[float("nan")]),
    "a broken size": with_input(shape=[1.5]),
    "no shape": with_input(shape=None),
    "many axes": with_input(shape=[1] * 65),
    "too few values": with_input(drawn=..., values=[1.0]),
    "a value that is a text": with_input(drawn=..., fill="1"),
    "a value that is true": with_input(drawn=..., fill=True),
    "a value of NaN": with_input(drawn=..., fill=float("nan")),
    "a broken integer": with_input(drawn=..., dtype="int32", fill=0.5),
    "a large integer": with_input(drawn=..., dtype="int32", fill=1 << 31),
    "a boolean of 2": with_input(drawn=..., dtype="bool", fill=2),
    "no outputs": edited(outputs={}),
    "an output that is none": edited(outputs={"y": []}),
    "a largest of 0": with_output(largest=0),
    "an infinite largest": with_output(largest=float("inf")),
    "a negative tolerance": with_output(tolerance=-1e-5),
    "no tolerance": with_output(tolerance=None),
    "a tolerance of almost 0": with_output(largest=1e-300, tolerance=1e-300),
    "an output of another shape": with_output(shape=[1, 2, 3]),
    "no points": edited(points=[], base=[]),
    "many points": edited(points=[["y", 0]] * 65, base=[0.0] * 65, adapters={}),
    "a point that is none": edited(points=[["y"]]),
    "a point in no output": edited(points=[["z", 0]]),
    "a point in a list": edited(points=[[["y"], 0]]),
    "a point outside": edited(points=[["y", 30]]),
    "a point before": edited(points=[["y", -1]]),
    "a broken point": edited(points=[["y", 0.5]]),
    "a base of another length": edited(base=VALUES[1:]),
    "a base of NaN": edited(base=[float("nan"), *VALUES[1:]]),
    "a base of texts": edited(base=["1"] * len(VALUES)),
    "a huge whole number": edited(base=[10**400, *VALUES[1:]]),
    "adapters in a list": edited(adapters=[]),
    "an adapter that is none": edited(adapters={"de": VALUES}),
    "an adapter without values": with_adapter(values=None),
    "an adapter of infinity": with_adapter(values=[float("inf"), *VALUES[1:]]),
    "a half of another length": with_adapter(half=[1.0]),
    "groups in a list": with_adapter(groups=[]),
    "many groups": with_adapter(groups={str(i): VALUES for i in range(17)}),
    "a group of another length": with_adapter(groups={"q": [1.0]}),
    "a file elsewhere": with_adapter(file="../de.onnx_adapter"),
    "a file in the root": with_adapter(file="/etc/passwd"),
    "a file of a drive": with_adapter(file="C:de.onnx_adapter"),
    "a file that is a folder": with_adapter(file=".."),
    "a file of nothing": with_adapter(file=""),
    "a file with a zero": with_adapter(file="de\0"),
    "no file": with_adapter(file=None),
    "a file of the base elsewhere": edited(base_file="../base.safetensors"),
    "a file of the base that is none": edited(base_file=1),
    "an id of 0": with_adapter("batch", id=0),
    "a broken id": with_adapter("batch", id=1.5),
    "no id": with_adapter("batch", id=None),
    "two merged adapters": edited(mode="merged"),
    "nothing": json.dumps(
        {k: v for k, v in json.loads(edited(adapters={})).items() if k != "base"}
    ),
    "precisions in a list": edited(precisions=[1]),
    "a precision of 0": edited(precisions={"bfloat16": 0}),
    "a precision of NaN": edited(precisions={"bfloat16": float("nan")}),
}
NO_RUNS: dict[str, Any] = {"base": None, "adapters": [], "beyond_ids": None}


@pytest.mark.parametrize("reader", EVERY)
def test_a_damaged_probe_is_refused(reader: str, readers: Readers) -> None:
    cases = [{"text": text, "runs": NO_RUNS} for text in (GOOD, *HOSTILE.values())]
    good, *answers = readers(reader).judge(cases)
    assert good == {"result": {"adapters": {}}}
    accepted = [
        name for name, answer in zip(HOSTILE, answers, strict=True) if "error" not in answer
    ]
    assert accepted == []


FOR_LORA_FX = ("a mode of other files", "no file", "no id", "nothing")
"""What lora-fx reads: a file of another kind, or a fault that is found when the file is run."""


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in FOR_LORA_FX])
def test_lora_fx_refuses_a_damaged_probe(name: str) -> None:
    with pytest.raises(LoraFxError):
        Probe.from_text(HOSTILE[name], "model.onnx")


SHOWN = ("no JSON", "long", "another format", "an unknown mode", "a huge input", "a base of NaN")
"""What each program is run with."""


@pytest.mark.parametrize("reader", EVERY)
@pytest.mark.parametrize("name", SHOWN)
def test_one_line_tells_what_is_wrong(
    name: str, reader: str, readers: Readers, tmp_path: Path
) -> None:
    path = write_model(tmp_path, "merged", without_adapters(network()), HOSTILE[name])
    check_refusal(readers(reader), path, "the probe")


def check_refusal(reader: Reader, path: Path, message: str) -> None:
    """Expect exit code 2 and one line."""
    answer = reader.check(path)
    assert answer.code == 2 and not answer.text
    assert answer.error.startswith("Error: ") and answer.error.count("\n") == 1, answer.error
    assert answer.error[:-1].isprintable() and answer.error.isascii()
    assert message in answer.error


@pytest.mark.parametrize("reader", EVERY)
def test_a_file_without_a_probe(reader: str, readers: Readers, tmp_path: Path) -> None:
    path = write_model(tmp_path, "merged", without_adapters(network()), None)
    check_refusal(readers(reader), path, "the file has no probe")


@pytest.mark.parametrize("reader", EVERY)
def test_what_is_no_file(reader: str, readers: Readers, tmp_path: Path) -> None:
    check_refusal(readers(reader), tmp_path / "missing.onnx", "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    check_refusal(readers(reader), tmp_path / "text.onnx", "")


@pytest.mark.parametrize("reader", EVERY)
def test_a_missing_adapter(reader: str, readers: Readers, tmp_path: Path) -> None:
    path = FAILURES["right"].write(tmp_path, "portable")
    (tmp_path / "fr.safetensors").unlink()
    check_refusal(readers(reader), path, "fr.safetensors")


@pytest.mark.parametrize("reader", EVERY)
def test_a_damaged_adapter(reader: str, readers: Readers, tmp_path: Path) -> None:
    for mode, name in (("portable", "fr.safetensors"), ("load", "fr.onnx_adapter")):
        if mode in READERS[reader].modes:
            folder = tmp_path / mode
            folder.mkdir()
            path = FAILURES["right"].write(folder, mode)
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: len(data) // 2])
            check_refusal(readers(reader), path, "")


@pytest.mark.parametrize("reader", EVERY)
def test_an_adapter_of_huge_sizes(reader: str, readers: Readers, tmp_path: Path) -> None:
    """One that has no numbers, and would have 12 TiB in the rank of the file."""
    if "load" in READERS[reader].modes:
        path = FAILURES["right"].write(tmp_path, "load")
        file = tmp_path / "de.onnx_adapter"
        file.unlink()
        huge = {"w1.lora_A": np.zeros((1 << 40, 0), np.float32)}
        write_file(file, huge, {"adapter_version": SERVED, "model_version": 1})
        check_refusal(readers(reader), path, "")


@pytest.mark.parametrize("reader", EVERY)
def test_outputs_of_another_shape(reader: str, readers: Readers, tmp_path: Path) -> None:
    """A probe that is a good one, of another model."""
    known = without_adapters(network())
    probe = probe_of(known, "merged")
    probe["outputs"]["y"]["shape"] = [3, 2, 5]
    path = write_model(tmp_path, "merged", known, json.dumps(probe))
    check_refusal(readers(reader), path, "output y")
    probe["outputs"]["z"] = probe["outputs"].pop("y")
    probe["points"] = [["z", index] for _, index in probe["points"]]
    path = write_model(tmp_path, "merged", known, json.dumps(probe))
    check_refusal(readers(reader), path, "z")


# Random numbers


def judged_by_lora_fx(case: dict[str, Any]) -> dict[str, Any]:
    """Return what lora-fx says of a run."""
    runs = case["runs"]
    named = list(runs["adapters"])
    if runs["base"] is not None:
        named.append([BASE, runs["base"]])
    answers = {
        name: np.array([np.nan if x is None else x for x in outputs]) for name, outputs in named
    }
    verdicts = Probe.from_text(case["text"], "model.onnx").verdicts(answers)
    result: dict[str, Any] = {}
    if BASE in verdicts:
        result["base"] = verdicts.pop(BASE)
    return {"result": {**result, "adapters": verdicts}}


@pytest.fixture(scope="module")
def random_cases() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Random cases, and what lora-fx says of them."""
    cases = [random_case(seed) for seed in range(RANDOM)]
    cases += [huge_case(seed) for seed in range(RANDOM // 10)]
    return [(case, judged_by_lora_fx(case)) for case in cases]


@pytest.mark.parametrize("reader", EVERY)
def test_random_numbers(
    reader: str, readers: Readers, random_cases: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    """Every reader says what lora-fx says, and every kind of verdict occurs."""
    kinds: Counter[str] = Counter()
    answers = readers(reader).judge([case for case, _ in random_cases])
    for (case, expected), answer in zip(random_cases, answers, strict=True):
        ids = answer["result"].pop("ids", None)
        assert answer == expected, case
        beyond = case["runs"]["beyond_ids"]
        if ids is not None:
            is_checked = beyond is None or not any(x is not None for x in beyond)
            assert ids == ("right" if is_checked else "ids are not checked")
        verdicts = [*answer["result"]["adapters"].values(), answer["result"].get("base", "")]
        kinds.update(kind_of(verdict) for verdict in verdicts)
    assert min(kinds[kind] for kind in KINDS) > 1, kinds


KINDS = (
    "right", "right in", "no effect", "no effect in", "adapter", "adapter in", "without",
    "without in", "scaled by", "scaled by in", "several", "several in", "fitted", "not finite",
    "too small to tell", "differs",
)  # fmt: skip


def kind_of(verdict: str) -> str:
    """Return a verdict without names and numbers."""
    cause, precise, _ = verdict.partition(" in ")
    if " or " in cause:
        cause = "several"
    elif cause.startswith("scaled by"):
        cause = "scaled by" if cause in ("scaled by 0.5", "scaled by 2") else "fitted"
    elif cause.startswith(("adapter", "without")):
        cause = cause.partition(" ")[0]
    return f"{cause} in" if precise else cause


@given(st.integers(0, 2**64))
def test_the_reader_in_python_says_what_lora_fx_says(seed: int) -> None:
    case = random_case(seed)
    [answer] = PYTHON.judge([case])
    answer["result"].pop("ids", None)
    assert answer == judged_by_lora_fx(case)


PYTHON = Python(Path())
