"""Everything that can go wrong with a file is found by its probe, and no wrong cause is named.

A wrong file has the probe of the right one, as a file has that was changed after its export.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import external_data_helper, helper, numpy_helper

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.dtypes import Array
from lora_fx.onnx.probe_runs import add_probe, probe_of
from tests.probe.model import FAILURES, adapters, encoder, fits

KINDS: Mapping[str, tuple[str, str]] = {
    "merged": ("merged", "cpu"),
    "switch": ("switch", "cpu"),
    "portable": ("switch", "portable"),
    "load": ("load", "cpu"),
    "batch": ("batch", "cpu"),
}
"""The mode and target of each kind of file."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as an .onnx file, from which other files are made without torch."""
    path = tmp_path_factory.mktemp("base") / "base.onnx"
    model, ids = encoder()
    lora_fx.export(model, path, (ids,), probe="none")
    return path


@pytest.fixture(scope="module", params=KINDS)
def right(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A kind of file, and a folder with the file m.onnx as it should be."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)  # a new one each time that the kind comes up
    model, ids = encoder()
    export(model, folder / "m.onnx", kind, adapters(), (ids,))
    return kind, folder


def export(
    model: object,
    path: Path,
    kind: str,
    of: Mapping[str, Adapter],
    args: tuple[object, ...] = (),
    **options: str,
) -> None:
    mode, target = KINDS[kind]
    given: object = dict(of)
    if mode == "merged":
        given = of["de"]
    lora_fx.export(model, path, args, adapters=given, mode=mode, target=target, **options)


def verdicts(report: Report) -> dict[str, str]:
    rows = report.details["verdicts"]
    return {row["adapter"] or "base": row["verdict"] for row in rows}


def with_probe_of(right: Path, wrong: Path) -> Path:
    """Give a file the probe of the one that it should be."""
    add_probe(wrong, probe_of(right))
    return wrong


def test_a_file_as_it_was_is_right(right: tuple[str, Path]) -> None:
    kind, folder = right
    report = lora_fx.verify(folder / "m.onnx")
    assert report, report
    names = {"adapter"} if kind == "merged" else {"base", "de", "fr"}
    assert verdicts(report) == dict.fromkeys(names, "right")
    assert not report.warnings


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the numbers merged
@pytest.mark.parametrize("failure", FAILURES)
def test_a_wrong_adapter_is_found(
    right: tuple[str, Path], base: Path, failure: str, tmp_path: Path
) -> None:
    kind, folder = right
    change, allowed = FAILURES[failure]
    wrong = {**adapters(), "de": change(adapters()["de"])}
    path = tmp_path / "m.onnx"
    try:
        if kind in ("merged", "batch"):
            export(base, path, kind, wrong, probe="none")
            with_probe_of(folder / "m.onnx", path)
        else:
            shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
            ending = ".safetensors" if kind == "portable" else ".onnx_adapter"
            write_adapter(path, wrong["de"], tmp_path / f"de{ending}")
    except lora_fx.LoraFxError as refused:
        assert failure in REFUSED, refused  # it is found when it is written
        return
    report = lora_fx.verify(path)
    assert not report
    found = verdicts(report)
    name = "adapter" if kind == "merged" else "de"
    if name not in found:
        assert failure in REFUSED
        assert "de is refused" in report.warnings[0]
    else:
        assert found.pop(name) in allowed
    if kind != "merged":
        assert found == {"base": "right", "fr": "right"}


REFUSED = {
    "zero", "one NaN", "one infinite number", "overflow", "the other adapter", "two mixed",
    "a little of the other",
}  # fmt: skip
"""Failures that no file of some kinds can have: numbers that are not finite, ranks too large."""


def write_adapter(switch: Path, adapter: Adapter, path: Path) -> None:
    """Write an adapter for a switchable file, whatever its numbers."""
    from lora_fx.formats.graph_inputs import write_inputs
    from lora_fx.onnx import runtime_adapter
    from lora_fx.onnx.manifest import manifest_of

    path.unlink()
    write = write_inputs if path.suffix == ".safetensors" else runtime_adapter.write_adapter
    write(adapter, manifest_of(switch), path)


def test_two_exchanged_adapters_are_named(right: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = right
    if kind in ("merged", "batch"):
        pytest.skip("a file of its own for each adapter is exchanged")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    ending = ".safetensors" if kind == "portable" else ".onnx_adapter"
    shutil.copy(folder / f"de{ending}", tmp_path / f"fr{ending}")
    shutil.copy(folder / f"fr{ending}", tmp_path / f"de{ending}")
    report = lora_fx.verify(tmp_path / "m.onnx")
    assert not report
    assert verdicts(report) == {"base": "right", "de": "adapter fr", "fr": "adapter de"}


def test_exchanged_ids_are_named(right: tuple[str, Path], base: Path, tmp_path: Path) -> None:
    kind, folder = right
    if kind != "batch":
        pytest.skip("mode batch alone has ids")
    exchanged = {"de": adapters()["fr"], "fr": adapters()["de"]}
    export(base, tmp_path / "m.onnx", kind, exchanged, probe="none")
    report = lora_fx.verify(with_probe_of(folder / "m.onnx", tmp_path / "m.onnx"))
    assert not report
    assert verdicts(report) == {"base": "right", "de": "adapter fr", "fr": "adapter de"}


def noisy(value: Array) -> Array:
    rng = np.random.default_rng(5)
    return value + 0.05 * np.abs(value).max() * rng.standard_normal(value.shape)


def drawn(value: Array) -> Array:
    rng = np.random.default_rng(6)
    return value.std() * rng.standard_normal(value.shape)


def in_steps(bits: int) -> Callable[[Array], Array]:
    """Rounding to codes of so many bits, with one scale a row."""

    def rounded(value: Array) -> Array:
        step = np.abs(value).max(-1, keepdims=True) / (2 ** (bits - 1) - 1) + 1e-30
        return np.round(value / step) * step

    return rounded


def in_dtype(dtype: object) -> Callable[[Array], Array]:
    return lambda value: value.astype(dtype).astype(np.float32)  # type: ignore[call-overload]


BASES: Mapping[str, tuple[Callable[[Array], Array], str, set[str]]] = {
    "another base": (drawn, "", {"differs"}),
    "another layer": (drawn, "layers.1.up_proj", {"differs"}),
    "a base trained further": (noisy, "", {"differs"}),
    "another embedding": (drawn, "embed", {"differs"}),
    "another head": (drawn, "head", {"differs"}),
    "a base twice as large": (lambda value: 2 * value, "down_proj", {"differs"}),
    "8 bits": (in_steps(8), "", {"differs", "right in tf32", "right in bfloat16"}),
    "4 bits": (in_steps(4), "", {"differs"}),
    "3 bits": (in_steps(3), "", {"differs"}),
    "bfloat16": (in_dtype(ml_dtypes.bfloat16), "", {"right in bfloat16", "differs"}),
    "float16": (in_dtype(np.float16), "", {"right in tf32", "right in bfloat16", "differs"}),
    "a layer of zeros": (np.zeros_like, "layers.2", {"differs"}),
}


@pytest.mark.parametrize("failure", BASES)
def test_a_wrong_base_is_found(right: tuple[str, Path], failure: str, tmp_path: Path) -> None:
    kind, folder = right
    change, word, allowed = BASES[failure]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path / "m.onnx", word, change)
    report = lora_fx.verify(tmp_path / "m.onnx")
    assert not report
    found = verdicts(report)
    if kind == "merged":
        assert found["adapter"] in allowed
        return
    assert found.pop("base") in allowed
    assert set(found.values()) <= {"right in bfloat16", "right in tf32", "differs"}


def change_weights(path: Path, word: str, change: Callable[[Array], Array]) -> None:
    """Change the matrices of a file whose names contain a word, but for those of adapters."""
    stored_apart = {
        tensor.name
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    model = onnx.load(path)
    count = 0
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        of_adapter = "lora" in tensor.name or "adapter" in tensor.name
        if word in tensor.name and value.ndim == 2 and value.dtype == np.float32 and not of_adapter:
            new = np.ascontiguousarray(change(value).astype(np.float32))
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
            count += 1
    assert count
    for tensor in model.graph.initializer:
        if tensor.name in stored_apart:
            external_data_helper.set_external_data(tensor, "m.onnx.data")
    if stored_apart:
        path.with_name("m.onnx.data").unlink()
    onnx.save(model, path)


def test_an_adapter_in_the_base_is_named(
    right: tuple[str, Path], base: Path, tmp_path: Path
) -> None:
    kind, folder = right
    if kind == "merged":
        pytest.skip("a merged file has no base")
    merged = tmp_path / "merged.onnx"
    lora_fx.merge(base, [adapters()["de"]], merged)
    export(merged, tmp_path / "m.onnx", kind, adapters(), probe="none")
    report = lora_fx.verify(with_probe_of(folder / "m.onnx", tmp_path / "m.onnx"))
    assert not report
    assert verdicts(report) == {"base": "adapter de", "de": "differs", "fr": "differs"}


def test_ids_that_are_clamped_are_found(right: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = right
    if kind != "batch":
        pytest.skip("mode batch alone has ids")
    model = onnx.load(folder / "m.onnx")
    for node in model.graph.node:
        names = ["clamped" if name == "adapter_ids" else name for name in node.input]
        del node.input[:]
        node.input.extend(names)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "lowest"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.int64), "highest"))
    clip = helper.make_node("Clip", ["adapter_ids", "lowest", "highest"], ["clamped"])
    model.graph.node.insert(0, clip)
    onnx.save(model, tmp_path / "m.onnx")
    report = lora_fx.verify(tmp_path / "m.onnx")
    assert not report
    assert report.details["ids"] == "ids are not checked"
    assert set(verdicts(report).values()) == {"right"}


def test_an_adapter_file_that_is_missing_is_said(right: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = right
    if kind in ("merged", "batch"):
        pytest.skip("the file holds its adapters")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    ending = ".safetensors" if kind == "portable" else ".onnx_adapter"
    (tmp_path / f"fr{ending}").unlink()
    report = lora_fx.verify(tmp_path / "m.onnx")
    assert not report
    assert verdicts(report) == {"base": "right", "de": "right"}
    assert report.warnings == (f"fr is not verified: {tmp_path / f'fr{ending}'} does not exist",)


def test_a_tolerance_accepts_a_precision(right: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = right
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path / "m.onnx", "", in_dtype(np.float16))
    assert not lora_fx.verify(tmp_path / "m.onnx")
    level = probe_of(folder / "m.onnx").precisions["bfloat16"]
    assert lora_fx.verify(tmp_path / "m.onnx", tol=level)


def test_groups_are_named_exactly(right: tuple[str, Path], base: Path, tmp_path: Path) -> None:
    """Every group of the probe, left out, is named or not told; most are named."""
    kind, folder = right
    if kind != "switch":
        pytest.skip("one kind is enough")
    probe = probe_of(folder / "m.onnx")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    named = 0
    groups = probe.adapters["de"].groups
    assert len(groups) == 13
    for group in groups.keys() - {"linear"}:
        role, _, half = group.partition(", ")
        layers = {"first half": (0, 1), "second half": (2,)}[half]
        words = [f"{layer}.{role}_proj" for layer in layers]

        def left_out(key: str, words: list[str] = words) -> bool:
            return any(word in key for word in words)

        entries = {key: low for key, low in adapters()["de"].lowrank.items() if not left_out(key)}
        write_adapter(tmp_path / "m.onnx", Adapter(entries), tmp_path / "de.onnx_adapter")
        verdict = verdicts(lora_fx.verify(tmp_path / "m.onnx"))["de"]
        assert verdict in (f"without {group}", "differs"), group
        named += verdict == f"without {group}"
    assert named >= 10


def test_a_changed_scale_is_fitted(right: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = right
    if kind != "switch":
        pytest.skip("one kind is enough")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    named = 0
    for factor in (0.2, 0.3, 0.4, 0.6, 0.7, 0.9, 0.96, 1.03, 1.08, 1.2):
        entries = {
            key: replace(low, b=low.b * np.float32(factor))
            for key, low in adapters()["de"].lowrank.items()
        }
        write_adapter(tmp_path / "m.onnx", Adapter(entries), tmp_path / "de.onnx_adapter")
        verdict = verdicts(lora_fx.verify(tmp_path / "m.onnx"))["de"]
        assert verdict in fits(factor)
        named += verdict != "differs"
    assert named >= 6
