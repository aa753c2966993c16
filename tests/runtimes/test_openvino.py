"""OpenVINO: one compilation, base and two adapters, equal to torch; the rows of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.onnx.manifest import manifest_of
from tests.runtimes import environments, models, switch_files, zoo_files
from tests.runtimes.consumers import Row, agree

pytestmark = pytest.mark.slow
SAMPLE = environments.ROOT / "samples" / "runtimes" / "openvino_switch.py"
CHECKS = Path(__file__).parent / "in_openvino.py"
RUNTIME = "OpenVINO, CPU"


def version() -> str:
    """The version that the requirements pin."""
    pinned = environments.requirements_of("openvino").splitlines()[0]
    return pinned.partition("==")[2]


def measured(folder: Path, *tables: str) -> dict[str, Any]:
    """What in_openvino.py prints for a folder."""
    return json.loads(environments.run_in("openvino", CHECKS, SAMPLE, folder, *tables))


@pytest.fixture(scope="module", params=models.SUBJECTS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of the table and the folder of its files."""
    environments.environment("openvino")
    subject = models.SUBJECTS[request.param]()
    folder = tmp_path_factory.mktemp(subject.name)
    switch_files.write(
        folder, subject.name, subject.model, subject.adapters, subject.sizes, subject.outputs,
        args=subject.args, kwargs=subject.kwargs or None, **subject.options,
    )  # fmt: skip
    return subject, folder


def test_the_sample_runs_base_and_adapters(files: Any, tmp_path: Path) -> None:
    subject, folder = files
    sizes = switch_files.stored(folder, subject.name)
    np.savez(tmp_path / "inputs.npz", **sizes[0]["in"])
    kinds = ("base", "a", "b")
    adapters = [folder / f"{subject.name}.{kind}.safetensors" for kind in kinds]
    environments.run_in(
        "openvino", SAMPLE, folder / f"{subject.name}.onnx", tmp_path / "inputs.npz",
        tmp_path / "outputs.npz", *adapters,
    )  # fmt: skip
    with np.load(tmp_path / "outputs.npz") as arrays:
        for kind in kinds:
            expected = sizes[0][kind]
            ours = {name: arrays[f"{subject.name}.{kind}/{name}"] for name in expected}
            assert switch_files.worst(ours, expected) <= models.GATE


def test_the_row(files: Any) -> None:
    subject, folder = files
    table = ":".join(map(str, subject.table or ()))
    result = measured(folder, f"{subject.name}={table}")
    assert result["version"].startswith(version())
    row = result[subject.name]
    errors = row["errors"]

    def equal(kind: str) -> bool:
        return errors[f"0/{kind}"] <= models.GATE

    assert {*errors} == {f"{i}/{k}" for i in range(len(subject.sizes)) for k in ("base", "a", "b")}
    agree(
        Row(
            runtime=RUNTIME, version=version(), file="onnx", mode="switch", model=subject.name,
            loads=True, base=equal("base"), adapter_a=equal("a"), adapter_b=equal("b"),
            swap="one compilation", ids_out_of_range=row.get("out_of_range", "no ids"),
            dynamic_sizes=max(errors.values()) <= models.GATE,
            figures={**row["figures"], "error": max(errors.values())},
        )
    )  # fmt: skip


def test_twenty_files_of_the_zoo(tmp_path: Path) -> None:
    environments.environment("openvino")
    for name in zoo_files.NAMES:
        zoo_files.write(tmp_path, name)
    result = measured(tmp_path)
    assert len(zoo_files.NAMES) == 20
    refused = {
        name: result[name]["refused"] for name in zoo_files.NAMES if "refused" in result[name]
    }
    assert not refused
    for name in zoo_files.NAMES:
        assert max(result[name]["errors"].values()) <= models.GATE, (name, result[name])
    agree(
        Row(
            runtime=RUNTIME, version=version(), file="onnx", mode="switch",
            model="20 models of the zoo", loads=True, base=True, adapter_a=True, adapter_b=True,
            swap="one compilation", dynamic_sizes=True,
        )
    )  # fmt: skip


def test_an_input_with_a_default_is_none_in_openvino(tmp_path: Path) -> None:
    """Why a portable file has none: OpenVINO makes constants of them."""
    subject = models.text()
    for target in ("webgpu", "portable"):
        lora_fx.export(
            subject.model, tmp_path / f"{target}.onnx", subject.args, subject.kwargs,
            mode="switch", target=target, provider="cpu",
        )  # fmt: skip
    program = (
        "import sys, openvino as ov\n"
        "for path in sys.argv[1:]:\n"
        "    inputs = ov.Core().read_model(path).inputs\n"
        "    print(sum('.lora_' in port.any_name for port in inputs), len(inputs))\n"
    )
    (tmp_path / "inputs.py").write_text(program)
    printed = environments.run_in(
        "openvino", tmp_path / "inputs.py", tmp_path / "webgpu.onnx", tmp_path / "portable.onnx"
    )
    with_defaults, required = (line.split() for line in printed.splitlines())
    factors = 2 * len(manifest_of(tmp_path / "portable.onnx").slots)
    assert with_defaults == ["0", "2"]
    assert required == [str(factors), str(factors + 2)]


RUN_NPZ = """
import sys
import numpy as np
import openvino as ov
model, inputs, outputs = sys.argv[1:]
compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
results = {}
with np.load(inputs) as arrays:
    for run in sorted({key.partition("/")[0] for key in arrays}):
        feeds = {key.partition("/")[2]: arrays[key] for key in arrays if key.startswith(run)}
        for port, array in compiled(feeds).items():
            results[f"{run}/{port.any_name}"] = array
np.savez(outputs, **results)
"""
"""Runs a model on the arrays `RUN/INPUT` of a file, and stores `RUN/OUTPUT`."""


def test_a_batch_file_chooses_an_adapter_for_each_row(tmp_path: Path) -> None:
    environments.environment("openvino")
    subject = models.text()
    adapters = {}
    for name, adapter in subject.adapters.items():
        # positions are looked up once for all rows
        updates = {key: u for key, u in adapter.lowrank.items() if "position" not in key}
        adapters[name] = Adapter(updates)
    lora_fx.export(
        subject.model, tmp_path / "m.onnx", subject.args, subject.kwargs, adapters=adapters,
        mode="batch", target="portable", provider="cpu",
    )  # fmt: skip
    inputs = subject.sizes[0]
    runs = {"rows": (inputs, [0, 1, 2]), "outside": (inputs, [0, 9, -5])}
    unknown_token = inputs["input_ids"].copy()
    unknown_token[1, 0] = 10_000
    runs["token"] = ({**inputs, "input_ids": unknown_token}, [0, 1, 2])
    feeds = {}
    for run, (arrays, ids) in runs.items():
        for name, array in {**arrays, "adapter_ids": np.array(ids)}.items():
            feeds[f"{run}/{name}"] = array
    np.savez(tmp_path / "inputs.npz", **feeds)
    (tmp_path / "run.py").write_text(RUN_NPZ)
    environments.run_in(
        "openvino", tmp_path / "run.py", tmp_path / "m.onnx", tmp_path / "inputs.npz",
        tmp_path / "outputs.npz",
    )  # fmt: skip

    equal = []
    with np.load(tmp_path / "outputs.npz") as outputs:
        for row, adapter_of_row in enumerate((None, adapters["a"], adapters["b"])):
            expected = {k: v[row] for k, v in subject.outputs(adapter_of_row, inputs).items()}
            ours = {name: outputs[f"rows/{name}"][row] for name in expected}
            equal.append(switch_files.worst(ours, expected) <= models.GATE)
        first = outputs["outside/last_hidden_state"]
        assert np.isnan(first[1:]).all() and np.isfinite(first[0]).all()
        tokens = "NaN" if np.isnan(outputs["token/last_hidden_state"]).any() else "numbers"
    agree(
        Row(
            runtime=RUNTIME, version=version(), file="onnx", mode="batch", model="text",
            loads=True, base=equal[0], adapter_a=equal[1], adapter_b=equal[2], swap="by row",
            ids_out_of_range=f"adapters: NaN in the row; tokens: {tokens}", dynamic_sizes=True,
        )
    )  # fmt: skip
