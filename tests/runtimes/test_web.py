"""onnxruntime-web: one session, base and two adapters, equal to torch; the rows of the table.

In node and in headless Chromium, on WebAssembly, and on WebGPU, which Chromium computes on the CPU.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lora_fx
from lora_fx.compare import rel
from lora_fx.dtypes import Array
from tests.runtimes import models, switch_files, web, zoo_files
from tests.runtimes.consumers import Row, agree

pytestmark = [pytest.mark.slow, web.needs_package]
SAMPLES = web.SAMPLES / "runtimes"
PLACES = {
    "node": web.needs_node,
    "wasm": web.needs_chromium,
    "webgpu": web.needs_chromium,
}
KINDS = ("base", "a", "b", "base")
"""The runs of each size; the last one shows that an adapter leaves nothing behind."""

Place = web.Node | web.Chromium


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=mark) for name, mark in PLACES.items()]
)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Where the package runs."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "node":
        yield web.Node(folder)
    else:
        with web.chromium(request.param, folder) as browser:
            yield browser


class Files(NamedTuple):
    """A model of the table, and the folder of its files."""

    subject: models.Subject
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / f"{self.subject.name}.onnx"

    @property
    def adapters(self) -> dict[str, Path]:
        return adapters_in(self.folder, self.subject.name)


def adapters_in(folder: Path, name: str) -> dict[str, Path]:
    """The adapters of a file."""
    return {which: folder / f"{name}.{which}.safetensors" for which in switch_files.ADAPTERS}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The files of the models of the table, written when they are asked for."""
    return {}


@pytest.fixture(params=models.SUBJECTS)
def files(
    request: pytest.FixtureRequest,
    written: dict[str, Files],
    tmp_path_factory: pytest.TempPathFactory,
) -> Files:
    """A model of the table and the folder of its files."""
    name = request.param
    if name not in written:
        subject = models.SUBJECTS[name]()
        folder = tmp_path_factory.mktemp(name)
        switch_files.write(
            folder, name, subject.model, subject.adapters, subject.sizes, subject.outputs,
            args=subject.args, kwargs=subject.kwargs or None, **subject.options,
        )  # fmt: skip
        written[name] = Files(subject, folder)
    return written[name]


def job_of(folder: Path, name: str, provider: str) -> web.Job:
    """Every adapter at every size that is stored."""
    path = folder / f"{name}.onnx"
    sizes = switch_files.stored(folder, name)
    return web.Job(
        path,
        adapters_in(folder, name),
        [(kind, size["in"]) for size in sizes for kind in KINDS],
        web.nodes_for_cpu(path) if provider == "webgpu" else (),
    )


def errors_of(results: web.Results, folder: Path, name: str) -> dict[str, float]:
    """The largest error of every adapter at every size, by SIZE/KIND."""
    assert results.error is None, (name, results.error)
    errors: dict[str, float] = {}
    cases = iter(results.cases)
    for number, size in enumerate(switch_files.stored(folder, name)):
        for kind in KINDS:
            outputs = next(cases)
            assert not isinstance(outputs, web.Failed), (name, outputs)
            error = switch_files.worst(outputs, size[kind])
            errors[f"{number}/{kind}"] = max(error, errors.get(f"{number}/{kind}", 0))
    return errors


def out_of_range(place: Place, files: Files) -> str:
    """What comes out for ids that the table has no row for."""
    if files.subject.table is None:
        return "no ids"
    name, rows = files.subject.table
    inputs = files.subject.sizes[0]
    cases: list[tuple[str, dict[str, Array]]] = []
    for bad in (rows, -1):
        ids = inputs[name].copy()
        ids[0, -1] = bad
        cases.append(("base", {**inputs, name: ids}))
    results = place.run(web.Job(files.model, files.adapters, cases))
    answers = set()
    for outputs in results.cases:
        if isinstance(outputs, web.Failed):
            assert "out of data bounds" in outputs.message, outputs
            answers.add("error")
        else:
            first = next(iter(outputs.values()))
            answers.add("NaN" if np.isnan(first).any() else "numbers")
    return " and ".join(sorted(answers))


def test_the_row(place: Place, files: Files) -> None:
    name = files.subject.name
    job = job_of(files.folder, name, place.provider)
    job.rounds = 5 if place.provider == "webgpu" else 21  # computed on the CPU, it is slow
    results = place.run(job)
    errors = errors_of(results, files.folder, name)

    def equal(kind: str) -> bool:
        return errors[f"0/{kind}"] <= models.GATE

    file_bytes = files.adapters["b"].stat().st_size
    agree(
        Row(
            runtime=place.name, version=web.version(), file="onnx", mode="switch", model=name,
            loads=loads(job), base=equal("base"), adapter_a=equal("a"), adapter_b=equal("b"),
            swap="one session", ids_out_of_range=out_of_range(place, files),
            dynamic_sizes=max(errors.values()) <= models.GATE,
            figures={
                **results.figures, "adapter_file_bytes": file_bytes, "error": max(errors.values())
            },
        )
    )  # fmt: skip


def loads(job: web.Job) -> bool | str:
    """True, or what stays off WebGPU."""
    nodes = onnx.load(job.model, load_external_data=False).graph.node
    operators = {node.op_type for node in nodes if node.name in set(job.cpu)}
    return f"with {', '.join(sorted(operators))} on the CPU" if operators else True


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of twenty models of the zoo."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in zoo_files.NAMES:
        zoo_files.write(folder, name)
    return folder


def test_twenty_files_of_the_zoo(place: Place, zoo: Path) -> None:
    assert len(zoo_files.NAMES) == 20
    for name in zoo_files.NAMES:
        results = place.run(job_of(zoo, name, place.provider))
        errors = errors_of(results, zoo, name)
        assert max(errors.values()) <= models.GATE, (name, errors)
    agree(
        Row(
            runtime=place.name, version=web.version(), file="onnx", mode="switch",
            model="20 models of the zoo", loads=True, base=True, adapter_a=True, adapter_b=True,
            swap="one session", dynamic_sizes=True,
        )
    )  # fmt: skip


FIRST = re.compile(r"^(\w[\w.]*): (\w+) \[.*\] (.*) …$", re.MULTILINE)


def check_printed(text: str, files: Files) -> None:
    """The first numbers of every output and adapter, as the samples print them."""
    name = files.subject.name
    printed = FIRST.findall(text)
    expected = switch_files.stored(files.folder, name)[0]
    adapters = {"base": "base", f"{name}.a": "a", f"{name}.b": "b"}
    shown = [adapter for adapter, output, _ in printed if output == printed[0][1]]
    assert shown == ["base", f"{name}.a", f"{name}.b", "base"]
    for adapter, output, numbers in printed:
        array = expected[adapters[adapter]][output]
        ours = np.array(numbers.split(), np.float64)
        np.testing.assert_allclose(ours, array.ravel()[:4], rtol=0, atol=2e-5 * np.abs(array).max())


def feeds_of(files: Files, folder: Path) -> Path:
    """The inputs of the first size in a file that the samples read."""
    inputs = switch_files.stored(files.folder, files.subject.name)[0]["in"]
    path = folder / "feeds.json"
    path.write_text(json.dumps({name: web.numbers(array) for name, array in inputs.items()}))
    return path


@pytest.fixture(scope="module")
def text_files(written: dict[str, Files], tmp_path_factory: pytest.TempPathFactory) -> Files:
    subject = models.text()
    folder = tmp_path_factory.mktemp("text")
    switch_files.write(
        folder, "text", subject.model, subject.adapters, subject.sizes, subject.outputs,
        args=subject.args, kwargs=subject.kwargs,
    )  # fmt: skip
    return Files(subject, folder)


@web.needs_node
def test_the_sample_for_node(text_files: Files, tmp_path: Path) -> None:
    printed = web.node(
        SAMPLES / "web_switch.mjs", text_files.model, feeds_of(text_files, tmp_path),
        *text_files.adapters.values(),
    )  # fmt: skip
    check_printed(printed, text_files)


@web.needs_chromium
@pytest.mark.parametrize(
    ("provider", "asked", "said"),
    [
        ("webgpu", "", "Ran on WebGPU."),
        ("webgpu", "&provider=wasm", "Ran on WebAssembly."),
        ("wasm", "", "Ran on WebAssembly."),
    ],
)
def test_the_sample_for_browsers(
    provider: str, asked: str, said: str, text_files: Files, tmp_path: Path
) -> None:
    with web.chromium(provider, tmp_path) as browser:
        paths = [text_files.model, feeds_of(text_files, tmp_path), *text_files.adapters.values()]
        for path in paths:
            (browser.folder / path.name).symlink_to(path)
        model, feeds, *adapters = (path.name for path in paths)
        query = f"model={model}&feeds={feeds}&adapters={','.join(adapters)}{asked}"
        browser.tab.open(f"{browser.address}web_switch.html?{query}")
        status = "document.getElementById('status').textContent"
        deadline = time.monotonic() + web.LIMIT
        while (text := browser.tab.value(status)) == "Loading …":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert text == said
        check_printed(
            browser.tab.value("document.getElementById('outputs').textContent"), text_files
        )


class Rows(nn.Module):
    """Rows of a table, convolved: mode batch takes all of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def test_a_batch(place: Place, tmp_path: Path) -> None:
    """Every row picks its adapter; one without is refused or NaN, and changes no other row."""
    module = Rows().eval()
    x = torch.randn(3, 4, 6, 6)
    adapters = {}
    for seed, name in enumerate(("a", "b")):
        adapted = lora_fx.insert(Rows().eval(), (x,), rank=2, seed=seed).eval()
        for parameter, value in adapted.named_parameters():
            if "lora_B" in parameter:
                nn.init.normal_(value, std=0.3)
        adapters[name] = adapted.adapter()
    path = tmp_path / "batch.onnx"
    lora_fx.export(
        module, path, (x,), adapters=adapters, mode="batch", target="portable", provider="cpu"
    )
    expected = []
    with torch.no_grad():
        for row, adapter in zip(x.split(1), (None, *adapters.values()), strict=True):
            one = module if adapter is None else lora_fx.fold(module, (x,), adapter=adapter)
            expected.append(one(row))
    wanted = torch.cat(expected).numpy()
    ids = {"right": [0, 1, 2], "wrong": [0, 1, 7]}
    inputs = [{"x": x.numpy(), "adapter_ids": np.array(rows)} for rows in ids.values()]
    cpu = web.nodes_for_cpu(path) if place.provider == "webgpu" else ()
    right, wrong = place.run(web.Job(path, {}, [("base", i) for i in inputs], cpu)).cases
    assert not isinstance(right, web.Failed), right
    assert rel(right["output"], wanted) <= models.GATE
    if isinstance(wrong, web.Failed):
        assert "adapter_ids out of range, 0 to 2" in wrong.message
        answer = "error"
    else:
        assert np.isnan(wrong["output"][2]).all()
        assert rel(wrong["output"][:2], wanted[:2]) <= models.GATE
        answer = "NaN"
    agree(
        Row(
            runtime=place.name, version=web.version(), file="onnx", mode="batch",
            model="a convolution and a head",
            loads=loads(web.Job(path, {}, [], cpu)), base=True, adapter_a=True, adapter_b=True,
            swap="by row", ids_out_of_range=answer, dynamic_sizes="not tried",
        )
    )  # fmt: skip


def test_an_input_with_a_default_takes_no_value(place: Place, text_files: Files) -> None:
    """Why a portable file has none."""
    path = text_files.folder / "defaults.onnx"
    subject = text_files.subject
    if not path.exists():
        lora_fx.export(
            subject.model, path, (), subject.kwargs, mode="switch", target="webgpu", provider="cpu"
        )
    results = place.run(web.Job(path, text_files.adapters, [("a", subject.sizes[0])]))
    (outputs,) = results.cases
    assert isinstance(outputs, web.Failed) and "invalid input" in outputs.message


def one_node(
    operator: str, x: Array, weight: Array | None, path: Path, **attributes: object
) -> None:
    """Write a file of one node."""
    weights = [] if weight is None else [numpy_helper.from_array(weight, "w")]
    node = helper.make_node(operator, ["x", *(w.name for w in weights)], ["y"], "one", **attributes)
    inputs, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * x.ndim) for name in "xy"
    )
    graph = helper.make_graph([node], "g", [inputs], [outputs], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )


@pytest.mark.parametrize("case", ["convolution", "grouped convolution", "cosine"])
def test_webgpu_computes_it_wrongly(case: str, place: Place, tmp_path: Path) -> None:
    """The smallest reproductions; one that fails says that the package has mended the fault."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 5, 5)).astype(np.float32)
    path = tmp_path / "one.onnx"
    if case == "cosine":
        x *= 10
        one_node("Cos", x, None, path)
        expected = np.cos(x.astype(np.float64))
    else:
        groups, channels = (1, 8) if case == "convolution" else (6, 54)
        weight = rng.standard_normal((channels, 6 // groups, 3, 3)).astype(np.float32)
        one_node("Conv", x, weight, path, group=groups)
        tensors = torch.from_numpy(x), torch.from_numpy(weight)
        expected = nn.functional.conv2d(*tensors, groups=groups).numpy()
    cases = [("base", {"x": x})]
    (outputs,) = place.run(web.Job(path, {}, cases)).cases
    assert not isinstance(outputs, web.Failed), outputs
    error = rel(outputs["y"], expected)
    if place.provider == "wasm":
        assert error <= models.GATE
        return
    assert error > (1e-5 if case == "cosine" else 0.1)
    (outputs,) = place.run(web.Job(path, {}, cases, cpu=["one"])).cases
    assert not isinstance(outputs, web.Failed)
    assert rel(outputs["y"], expected) <= models.GATE


@web.needs_chromium
def test_the_older_webgpu_computes_an_encoder_wrongly(text_files: Files, tmp_path: Path) -> None:
    """The package's default import, without any adapter; the build for WebGPU is right."""
    cases = [("base", size["in"]) for size in switch_files.stored(text_files.folder, "text")]
    expected = switch_files.stored(text_files.folder, "text")[0]["base"]
    errors = {}
    with web.chromium("webgpu", tmp_path) as browser:
        for build in ("ort.webgpu.bundle.min.mjs", "ort.bundle.min.mjs"):
            browser.build = build
            outputs = browser.run(web.Job(text_files.model, {}, cases[:1])).cases[0]
            assert not isinstance(outputs, web.Failed), outputs
            errors[build] = switch_files.worst(outputs, expected)
    assert errors["ort.webgpu.bundle.min.mjs"] <= models.GATE
    assert errors["ort.bundle.min.mjs"] > 0.1, "the package has mended it: change the page"
