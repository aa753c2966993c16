"""`.pt2` files of mode switch: one program whose A and B are inputs, and its adapters by name."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import save_for
from lora_fx.onnx.manifest import manifest_of
from lora_fx.passes.verbs.open import load_program
from tests.fx.pt2.edit import edited

Example = tuple[nn.Module, torch.Tensor]


class Tied(nn.Module):
    """A table that is looked up and is the head, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.fc(self.table(ids))), self.table.weight)


class Stack(nn.Module):
    """A stack of matrices in an einsum, and a product with the weight on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.left = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("bi,eio->beo", x, self.experts)
        return self.left @ y.transpose(1, 2)


class Odd(nn.Module):
    """A dict whose keys are no names in Python, in a forward that writes into its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, **arguments: torch.Tensor) -> torch.Tensor:
        arguments["class"].mul_(2.0)
        return self.fc(arguments["class"]) + arguments["a-b"]


class Steps(nn.Module):
    """A recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]


def seeded(build: Callable[[], nn.Module], example: torch.Tensor) -> Callable[[], Example]:
    def made() -> Example:
        torch.manual_seed(0)
        return build().eval(), example

    return made


MODELS: Mapping[str, tuple[Callable[[], Example], list[str] | None]] = {
    "linear": (
        seeded(
            lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.ones(2, 5)
        ),
        None,
    ),
    "convolution": (
        seeded(
            lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 1)),
            torch.ones(2, 4, 7, 5),
        ),
        ["0", "2"],
    ),
    "transposed convolution": (
        seeded(lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, 2)), torch.ones(2, 4, 7)),
        ["0"],
    ),
    "tied": (seeded(Tied, torch.tensor([[1, 2, 3], [4, 5, 0]])), ["table", "fc"]),
    "stack": (seeded(Stack, torch.ones(2, 5)), ["experts", "left"]),
    "recurrent": (seeded(Steps, torch.ones(2, 3, 5)), None),
}


def adapters_of(name: str) -> tuple[Example, dict[str, Adapter]]:
    """A model with two adapters of different ranks."""
    build, include = MODELS[name]
    model, x = build()
    adapters = {}
    for seed, rank in ((1, 1), (2, 3)):
        module = lora_fx.insert(model, (x,), rank=rank, include=include, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in module.named_parameters():
            if ".lora_B." in parameter_name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.3 * noise)
        adapters[f"a{seed}"] = module.adapter()
    return (model, x), adapters


def explicit(model: nn.Module, x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """The model with W + s·b·a in its parameters, in fp64."""
    wide = copy.deepcopy(model).double()
    for key, delta in adapter.deltas(dtype="float64").items():
        wide.get_parameter(key).data += torch.from_numpy(np.asarray(delta))
    with torch.no_grad():
        return wide(x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_torch_alone_runs_base_and_adapters(name: str, rank: int | None, tmp_path: Path) -> None:
    (model, x), adapters = adapters_of(name)
    mode = lora_fx.Switch(rank=rank)
    report = lora_fx.export(model, tmp_path / "m.pt2", (x,), mode=mode, adapters=adapters)
    assert report.ok and {parity.of for parity in report.parity} == {"base", "a1", "a2"}

    program = torch.export.load(str(tmp_path / "m.pt2")).module()
    runs = {"m.base": Adapter({}), **adapters}
    for file, adapter in runs.items():
        factors = load_file(tmp_path / f"{file}.safetensors")
        for batch in (x, torch.cat([x, x, x])[1:]):
            expected = explicit(model, batch, adapter)
            with torch.no_grad():
                output = program(batch, **factors)
            difference = (output.double() - expected).abs().max() / expected.abs().max()
            assert difference < 2e-6, (file, batch.shape)
    if rank is None:
        assert {tensor.shape[-1] for n, tensor in factors.items() if n.endswith("_a")} == {3}
    else:
        assert {tensor.shape[-2] for n, tensor in factors.items() if n.endswith("_b")} == {rank}


def test_any_text_may_be_the_name_of_an_input(tmp_path: Path) -> None:
    x, shift = torch.ones(2, 5), torch.ones(2, 4)
    lora_fx.export(Odd().eval(), tmp_path / "m.pt2", (), {"class": x, "a-b": shift}, mode="switch")
    program = torch.export.load(str(tmp_path / "m.pt2"))
    assert {*program.graph_signature.user_inputs[:2]} == {"class_", "a_b"}


def test_the_proof_writes_into_no_argument_of_the_caller(tmp_path: Path) -> None:
    x, shift = torch.ones(2, 5), torch.ones(2, 4)
    lora_fx.export(Odd().eval(), tmp_path / "m.pt2", (), {"class": x, "a-b": shift}, mode="switch")
    assert torch.equal(x, torch.ones(2, 5))


@pytest.mark.parametrize("name", ["", "../a", "folder/a", "m.base"])
def test_a_name_that_cannot_be_a_file_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    named = {name: adapters["a1"]}
    with pytest.raises(LoraFxError, match=r"is no name of a file|both an adapter's file and"):
        lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch", adapters=named)
    assert not [*tmp_path.iterdir()]


def test_no_transpose_and_no_scale_is_left(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch", adapters=adapters)
    graph = torch.export.load(str(tmp_path / "m.pt2")).graph
    ops = [node.target for node in graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert ops.count(aten.matmul.default) == 4 and ops.count(aten.linear.default) == 2
    assert not {aten.permute.default, aten.mul.Scalar, aten.type_as.default} & {*ops}


def test_a_base_in_half_precision_takes_adapters_in_float32(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    half, short = model.to(torch.bfloat16), x.to(torch.bfloat16)
    report = lora_fx.export(half, tmp_path / "m.pt2", (short,), mode="switch", adapters=adapters)
    assert report.ok
    factors = load_file(tmp_path / "a1.safetensors")
    signature = torch.export.load(str(tmp_path / "m.pt2")).graph_signature
    assert signature.user_inputs[1:] == tuple(manifest_names(tmp_path / "m.pt2"))
    assert {tensor.dtype for tensor in factors.values()} == {torch.float32}
    assert (
        torch.export.load(str(tmp_path / "m.pt2")).module()(short, **factors).dtype == short.dtype
    )


def test_an_adapter_of_some_targets_leaves_the_others_alone(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    part = adapters["a1"].select(include=["0"])
    both = {"part": part, "all": adapters["a2"]}
    lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch", adapters=both)
    factors = load_file(tmp_path / "part.safetensors")
    assert not factors["_2_weight_lora_a"].any() and factors["_0_weight_lora_a"].any()
    again = lora_fx.load_adapter(tmp_path / "part.safetensors")
    assert list(again) == ["0.weight"]


def test_an_adapter_is_converted_for_a_file_and_back(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("convolution")
    file = tmp_path / "m.pt2"
    lora_fx.export(model, file, (x,), mode="switch", adapters={"a1": adapters["a1"]})
    save_for(str(file), adapters["a1"], tmp_path / "again.safetensors", "graph_inputs")
    written = (tmp_path / "a1.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == written
    back = lora_fx.load_adapter(tmp_path / "a1.safetensors").bind(model, (x,))
    for key, delta in adapters["a1"].deltas().items():
        np.testing.assert_allclose(back.deltas()[key], delta, rtol=1e-6, atol=1e-7)


def test_no_onnx_adapter_is_written_for_a_file_that_cannot_take_it(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch")
    out = tmp_path / "a.onnx_adapter"
    with pytest.raises(LoraFxError, match="are inputs without defaults") as error:
        save_for(str(tmp_path / "m.pt2"), adapters["a1"], out, "onnx_adapter")
    assert "-o X.safetensors" in str(error.value.hint) and not out.exists()


def test_the_file_is_read_as_its_base(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("tied")
    lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch", adapters=adapters)
    captured = lora_fx.capture(tmp_path / "m.pt2")
    keys = [target.key for target in lora_fx.find(captured).targets]
    assert keys == [target.key for target in lora_fx.find(model, (x,)).targets]
    base = load_program(tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.equal(base(x), model(x))
    # what is made of it once more is a file like any other
    again = tmp_path / "again"
    again.mkdir()
    lora_fx.export(tmp_path / "m.pt2", again / "m.pt2", mode="switch", adapters=adapters)
    assert manifest_of(again / "m.pt2") == manifest_of(tmp_path / "m.pt2")


def test_a_rank_above_that_of_the_file_is_refused(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    with pytest.raises(LoraFxError, match="has rank 3; expected at most 2") as error:
        lora_fx.export(
            model, tmp_path / "m.pt2", (x,), mode=lora_fx.Switch(rank=2), adapters=adapters
        )
    assert "--rank 3" in str(error.value.hint)
    assert not [*tmp_path.iterdir()]


def test_largest_sizes_are_those_of_the_program(tmp_path: Path) -> None:
    (model, ids), adapters = adapters_of("tied")
    file = tmp_path / "m.pt2"
    mode = lora_fx.Switch(largest={"batch": 4, "length": 8, "rank": 3})
    report = lora_fx.export(model, file, (ids,), mode=mode, adapters=adapters)
    assert max(parity.sizes["ids"][1] for parity in report.parity) == 8
    program = torch.export.load(str(file))
    assert sorted(bounds.upper for bounds in program.range_constraints.values()) == [3, 3, 4, 8]
    assert program.module()(ids[:1].repeat(4, 1), **load_file(tmp_path / "a2.safetensors")).any()
    with pytest.raises(RuntimeError, match="to be <= 4, but got 5"):
        program.module()(ids[:1].repeat(5, 1), **load_file(tmp_path / "a2.safetensors"))
    larger = lora_fx.insert(model, (ids,), rank=4, include=["fc"]).adapter()
    with pytest.raises(LoraFxError, match="has rank 4; expected at most 3") as error:
        save_for(str(file), larger, tmp_path / "larger.safetensors", "graph_inputs")
    assert "--largest rank=4" in str(error.value.hint)


LARGEST: Mapping[str, tuple[object, str]] = {
    "a number": (8, "largest is an int, not sizes by name"),
    "a number as a name": ({0: 8}, "a name in largest is an int, not a text"),
    "no such dimension": ({"lenght": 8}, "no dimension that is free has the name 'lenght'"),
    "an example that is larger": ({"length": 2}, "'ids' has size 3 in dimension 1"),
    "one size": ({"batch": 1}, "the largest batch is 1, which leaves it no other size"),
    "no size": ({"batch": 0}, "the largest batch is 0; expected 1 or more"),
}


@pytest.mark.parametrize("name", LARGEST)
def test_a_largest_size_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    (model, ids), adapters = adapters_of("tied")
    largest, message = LARGEST[name]
    with pytest.raises(LoraFxError, match=message):
        lora_fx.export(
            model,
            tmp_path / "m.pt2",
            (ids,),
            mode=lora_fx.Switch(largest=largest),
            adapters=adapters,
        )
    assert not [*tmp_path.iterdir()]


def test_a_largest_rank_beside_a_dimension_of_that_name_is_refused(tmp_path: Path) -> None:
    model, x = MODELS["linear"][0]()
    mode = lora_fx.Switch(largest={"rank": 4})
    with pytest.raises(LoraFxError, match="a dimension has this name too"):
        lora_fx.export(model, tmp_path / "m.pt2", (x,), mode=mode, dynamic={"input": {0: "rank"}})
    assert not [*tmp_path.iterdir()]


def test_a_wrong_adapter_is_refused_by_torch_itself(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch", adapters=adapters)
    program = torch.export.load(str(tmp_path / "m.pt2")).module()
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("a1", "a2"))
    name = next(iter(one))
    with pytest.raises(Exception, match=r"size|shape|Runtime assertion"):
        program(x, **{**one, name: other[name]})
    with pytest.raises(Exception, match=r"[Mm]issing|kwarg|keyword|structure"):
        program(x)


def test_an_older_lora_fx_refuses_the_file_by_its_format(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    lora_fx.export(model, tmp_path / "m.pt2", (x,), mode="switch", adapters=adapters)
    assert json.loads(_member(tmp_path / "m.pt2"))["format"] == 3


def test_a_header_that_names_no_tensors_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(2, 4)}
    for names in ([["a"], ["b"]], ["c"], "ab", ["a", "c"], {"a": "b"}):
        save_file(tensors, tmp_path / "x.safetensors", {"lora_fx.inputs": json.dumps({"w": names})})
        with pytest.raises(LoraFxError, match="expected the names of its A and B"):
            lora_fx.load_adapter(tmp_path / "x.safetensors")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/extra/lora_fx.json", "{}")
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of the member, and of its entry in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(LoraFxError, match=r"m\.pt2: not a \.pt2 file"):
        manifest_of(path)


def test_adapters_of_a_portable_file_are_among_the_outputs(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    options = {"mode": "switch", "target": "portable", "adapters": adapters}
    report = lora_fx.export(model, tmp_path / "m.onnx", (x,), **options)
    names = [Path(output).name for output in report.outputs]
    assert names == ["m.onnx", "a1.safetensors", "a2.safetensors", "m.base.safetensors"]


def test_a_file_whose_factors_have_defaults_takes_no_tensors_by_name(tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    lora_fx.export(model, tmp_path / "m.onnx", (x,), mode="switch", adapters=adapters)
    with pytest.raises(LoraFxError, match="its A and B have defaults"):
        save_for(
            str(tmp_path / "m.onnx"), adapters["a1"], tmp_path / "a.safetensors", "graph_inputs"
        )


REFUSED: Mapping[str, tuple[dict[str, object], str]] = {
    "merged": ({"mode": "merged"}, "is written in mode switch, not in mode merged"),
    "batch": ({"mode": "batch"}, "not in mode batch"),
    "optimise": ({"mode": "switch", "optimise": True}, "would ignore|optimise=True is for"),
    "opset": ({"mode": "switch", "opset": 18}, "opset is for .onnx files"),
    "target": ({"mode": "switch", "target": "cuda"}, "target is for .onnx files"),
    "codes": ({"mode": "switch", "quantise": "int4"}, "codes of 4 or 8 bits"),
    "external": ({"mode": "switch", "external_over": 1}, "external_over has no effect"),
    "within": ({"mode": "switch", "within": True}, "within has no effect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    options, message = REFUSED[name]
    with pytest.raises(LoraFxError, match=message):
        lora_fx.export(model, tmp_path / "m.pt2", (x,), adapters=adapters, **options)
    assert not [*tmp_path.iterdir()]


DAMAGED: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "no slots": lambda switch: switch.pop("slots"),
    "another mode": lambda switch: switch.update(mode="batch"),
    "a name that is no input": lambda switch: switch["slots"]["0.weight"].update(a="x"),
    "a later format": lambda switch: switch.update(format=9),
    "another order": lambda switch: switch.update(slots=dict([*switch["slots"].items()][::-1])),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_manifest_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (model, x), adapters = adapters_of("linear")
    file = tmp_path / "m.pt2"
    lora_fx.export(model, file, (x,), mode="switch", adapters=adapters)
    manifest = json.loads(_member(file))
    DAMAGED[name](manifest["switch"])
    text = json.dumps(manifest).encode()
    damaged = edited(file, tmp_path / "d.pt2", {"data/extra/lora_fx.json": lambda _: text})
    with pytest.raises(LoraFxError, match=r"d\.pt2"):
        lora_fx.capture(damaged)


def manifest_names(file: Path) -> list[str]:
    """The inputs for A and B, in the order of the manifest."""
    slots = manifest_of(file).slots.values()
    return [name for slot in slots for name in (slot.a, slot.b)]


def _member(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("lora_fx.json"))
        return archive.read(name)
