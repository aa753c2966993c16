"""What a .pt2 file must not be able to do."""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError
from lora_fx.fx.codes import Stored
from lora_fx.fx.dequantise_nodes import _fits
from lora_fx.fx.pt2.captured import open_program
from lora_fx.fx.pt2.program_gate import check_operator
from lora_fx.fx.pt2.size_expressions import check_expression
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program
from tests.fx.pt2.edit import CONFIG, JSON, SAMPLE, Edit, edited, in_json, refused, write_clean


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "run"))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch.export.save with a free batch dimension."""
    return write_clean(tmp_path_factory.mktemp("pt2") / "clean.pt2")


def torch_runs(path: Path, marker: Path) -> None:
    """Torch itself does what the file says: the payload is live."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("torch._export.serde.serialize.log.warning", lambda *a, **k: None)
        try:
            torch.export.load(str(path)).module()
        except Exception:
            assert marker.exists(), "the payload does not work, so the test shows nothing"
    assert marker.read_text() == "run"
    marker.unlink()


def test_sample_inputs_are_never_opened(clean: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = pickle.dumps((Payload(marker),))
    buffer = io.BytesIO()
    torch.save((Payload(marker),), buffer)
    path = edited(clean, tmp_path / "x.pt2", {SAMPLE: lambda _: buffer.getvalue()})
    torch_runs(path, marker)
    assert len(lora_fx.find(str(path)).targets) == 2
    edited(clean, path, {SAMPLE: lambda _: evil})
    assert load_program(path)(torch.zeros(2, 6)).shape == (2, 3)
    assert not marker.exists()


def test_pickled_weights(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"

    def pickled(rows: dict[str, Any]) -> None:
        rows["config"]["0.weight"]["use_pickle"] = True

    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    name = json.loads(zipfile.ZipFile(clean).read(f"clean/{CONFIG}"))["config"]["0.weight"]
    member = f"data/weights/{name['path_name']}"
    path = tmp_path / "x.pt2"
    edited(clean, path, {CONFIG: in_json(pickled), member: lambda _: buffer.getvalue()})
    torch_runs(path, marker)
    errors = refused(path, capsys)
    assert member in errors and "--trust" in errors
    assert "holds more than tensors" in refused(path, capsys, "--trust")
    assert not marker.exists()
    buffer = io.BytesIO()
    torch.save(nn.Parameter(torch.ones(8, 6)), buffer)
    edited(clean, path, {CONFIG: in_json(pickled), member: lambda _: buffer.getvalue()})
    assert "--trust" in refused(path, capsys)
    state = load_program(path, trust=True).state_dict()
    assert torch.equal(state["0.weight"], torch.ones(8, 6))


def test_pickled_objects_are_refused_even_with_trust(clean: Path, tmp_path: Path) -> None:
    def custom(rows: dict[str, Any]) -> None:
        rows["config"]["x"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}

    config = "data/constants/model_constants_config.json"
    path = edited(clean, tmp_path / "x.pt2", {config: in_json(custom)})
    with pytest.raises(LoraFxError, match="pickled Python object"):
        open_program(path, trust=True)


def every_expression(text: str) -> Edit:
    def walk(value: Any) -> None:
        for v in value.values() if isinstance(value, dict) else value:
            if isinstance(v, (dict, list)):
                walk(v)
        if isinstance(value, dict) and "expr_str" in value:
            value["expr_str"] = text

    return in_json(walk)


def test_size_expressions(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    text = f"__import__('pathlib').Path({str(marker)!r}).write_text('run')"
    path = edited(clean, tmp_path / "x.pt2", {JSON: every_expression(text)})
    torch_runs(path, marker)
    assert "could run code" in refused(path, capsys)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0').__class__", "lambdify(s0)", "(lambda: 1)()", "[s0 for s0 in ()]", "s0; s1",
        "s0 if s1 else s2", "Symbol('__import__(1)')", "'s0'", "s0\n", "preview", "Symbol", "",
        "Pow(Integer(9), Integer(99999))", "9**(99*99)", "Function('f')(s0)", "S('s0')", "f's0'",
        "9**9**9", 3,
    ],
)  # fmt: skip
def test_expressions_that_are_refused(text: Any) -> None:
    with pytest.raises(LoraFxError, match="could run code"):
        check_expression(text, "f")


SUM = "+".join(f"s{i}" for i in range(200))
TOO_LARGE = (
    "Float('1e999999')", "Float('1e-9999')", f"Float('{'9' * 300}')", f"Integer('{'9' * 300}')",
)  # fmt: skip
LARGE = (
    "9" * 300, "0x" + "f" * 300, "1e999", "Mod((s0 + s1 + s2 + s3 + s4)**64, 7)",
    f"Mod(({SUM})**64, 7)", f"({SUM})**3", f"FloorDiv(({SUM})*({SUM}), 7)",
    "Mod(Pow(Add(s0, s1, s2, s3), Integer(64)), Integer(7))", "Eq((s0+s1+s2+s3)**64, s4)",
    f"Mod(({'*'.join(['9' * 19] * 20)})**64, 7)", "(s0+1)*(s1+1)*" * 12 + "1",
    "Float('1.5', precision=9999999999)", "*".join(["(s0 + s1 + 1)"] * 99),
)  # fmt: skip


@pytest.mark.parametrize("text", TOO_LARGE)
def test_texts_that_are_refused(text: str) -> None:
    with pytest.raises(LoraFxError, match="the size expression"):
        check_expression(text, "f")


@pytest.mark.parametrize("text", LARGE)
def test_expressions_that_are_too_large(text: str) -> None:
    with pytest.raises(LoraFxError, match="is too large when multiplied out"):
        check_expression(text, "f")


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s53', positive=True, integer=True)", "Min(Integer(24), Mul(Integer(24), s0))",
        "Pow(Symbol('s53', integer=True), Integer(2))", "(s0 + 1)//2 % 3", "Integer(-1)", "true",
        "Equality(Mod(s0, Integer(2)), Integer(0))", "And(s0 <= 3, s1 != 4)", "Float('0.5')",
        "Float('0.0625000000000000', precision=53)", "Float('1.0e-5')", "(s0 + 1)**2 // 4",
        "((s77 - 1)//2 + 1)**2 * (s12 + 3)", "Integer(9223372036854775807)", "Integer('-1')",
        "Mod((s0 + s1)**2, 7)", "4096*s0*s1*s2", "Max(1, ((s0*s1 + 13)//14)**2)", "s0**64",
        "PowByNatural(2, s0)", "18446744073709551615", "Pow(Add(), Integer(0))",
    ],
)  # fmt: skip
def test_expressions_that_pass(text: str) -> None:
    check_expression(text, "f")


@pytest.mark.parametrize(
    "target",
    ["torch.load", "torch.hub.load", "torch.ops.aten.from_file.default", "_operator.attrgetter",
     "torch.ops.aten.__class__.mro", "torch.ops.aten.add.__class__", "torch.ops.mine.op.default",
     "torch.ops.load_library", "math.__loader__.load_module", "#ns:op", "os.system", 5],
)  # fmt: skip
def test_operators_that_are_refused(target: Any) -> None:
    with pytest.raises(LoraFxError, match="not an operator of aten"):
        check_operator(target, "f")


def test_names_guards_and_trees_run_nothing(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names become code when a graph is compiled; guards are code; trees may import modules."""
    marker, path = tmp_path / "marker", tmp_path / "x.pt2"
    call = f"__import__('pathlib').Path({str(marker)!r}).write_text('run')"
    text = zipfile.ZipFile(clean).read(f"clean/{JSON}").decode()
    assert '"relu"' in text and '"0.weight"' in text

    def swap(old: str, new: str) -> Edit:
        return lambda data: data.decode().replace(json.dumps(old), json.dumps(new)).encode()

    edited(clean, path, {JSON: swap("relu", f"relu = {call}; x")})
    assert "as the name of a value" in refused(path, capsys)
    edited(clean, path, {JSON: swap("0.weight", f"a'+{call}+'")})
    assert "could run code" in refused(path, capsys)

    def guarded(value: dict[str, Any]) -> None:
        value["guards_code"] = [f"{call} or True"]

    edited(clean, path, {JSON: in_json(guarded)})
    torch_runs_guard(path, marker)
    load_program(path)(torch.zeros(2, 6))
    assert not marker.exists()

    def imports(value: dict[str, Any]) -> None:
        enum = {"__enum__": True, "fqn": "antigravity:x", "name": "y"}
        leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
        tree = {"type": "builtins.dict", "context": json.dumps(enum), "children_spec": [leaf]}
        spec = value["graph_module"]["module_call_graph"][0]["signature"]
        spec["out_spec"] = json.dumps([1, tree])

    edited(clean, path, {JSON: in_json(imports)})
    assert "is not known" in refused(path, capsys)
    assert "antigravity" not in sys.modules

    def empty(value: dict[str, Any]) -> None:
        tree = {"type": "builtins.tuple", "context": "null", "children_spec": []}
        spec = value["graph_module"]["module_call_graph"][0]["signature"]
        spec["out_spec"] = json.dumps([1, tree])

    edited(clean, path, {JSON: in_json(empty)})
    assert "1 outputs" in refused(path, capsys)


def torch_runs_guard(path: Path, marker: Path) -> None:
    module = torch.export.load(str(path)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(torch.zeros(2, 6))
    assert marker.exists(), "the guard does not run in torch, so the test shows nothing"
    marker.unlink()


LIES: dict[str, dict[str, Any]] = {
    "shape": {"as_ints": [8, 7]},
    "shape of none": {"as_ints": []},
    "shape below 0": {"as_ints": [-8, -6]},
    "shape beyond memory": {"as_ints": [1 << 62, 1 << 62]},
    "shape of text": {"as_string": "zz"},
    "block": {"as_int": 0},
    "block below 0": {"as_int": -32},
    "block of another size": {"as_int": 32},
    "kind": {"as_string": "x"},
    "kind without a name": {"as_string": ""},
    "kind of no bits": {"as_string": "int0"},
    "kind of more bits": {"as_string": "int8"},
    "kind of a table": {"as_string": "nf4"},
    "dtype": {"as_scalar_type": 5},
}


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program over codes."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    file = tmp_path_factory.mktemp("coded") / "q.pt2"
    save_program(lora_fx.insert(model, (torch.randn(4, 6),), rank=2, quantise="int4"), file)
    return file


@pytest.mark.parametrize("lie", LIES)
def test_what_the_op_of_codes_says_is_held_to_its_tensors(
    lie: str, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(program: dict[str, Any]) -> None:
        for node in program["graph_module"]["graph"]["nodes"]:
            for given in node["inputs"]:
                if "dequantise" in node["target"] and given["name"] == lie.split()[0]:
                    given["arg"] = LIES[lie]

    path = edited(coded, tmp_path / "lie.pt2", {JSON: in_json(change)})
    assert "its codes are not those of" in refused(path, capsys)


def two_alike(file: Path) -> None:
    """Two weights of one shape in codes, in a program for training and one for eval."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    module = lora_fx.insert(model, (torch.randn(4, 8),), rank=2, quantise="nf4")
    save_program(module.train(), file)


def test_codes_with_the_scales_of_another_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_alike(tmp_path / "q.pt2")

    def change(program: dict[str, Any]) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        ops = [n for n in nodes if "dequantise" in n["target"]]
        scales = [i for n in ops for i in n["inputs"] if i["name"] == "scale"]
        scales[0]["arg"] = scales[-1]["arg"]

    path = edited(tmp_path / "q.pt2", tmp_path / "lie.pt2", {JSON: in_json(change)})
    assert "its codes are not those of" in refused(path, capsys)


def test_two_programs_that_read_one_weight_in_two_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_alike(tmp_path / "q.pt2")

    def change(program: dict[str, Any]) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        for node in [n for n in nodes if "dequantise" in n["target"]][:1]:
            for given in node["inputs"]:
                if given["name"] == "kind":  # whose tensors have the same sizes
                    given["arg"] = {"as_string": "fp4"}

    path = edited(tmp_path / "q.pt2", tmp_path / "lie.pt2", {JSON: in_json(change)})
    assert "its codes are not those of" in refused(path, capsys)


@pytest.mark.parametrize("at", [1, 32, -1])
def test_places_of_columns_are_all_there_once(at: int) -> None:
    stored = Stored("int8", (2, 32), 32, torch.float32, parts=("scale", "order"))
    order = torch.arange(32, dtype=torch.int32).flip(0)
    tensors = torch.zeros(2, 1, 32, dtype=torch.uint8), torch.ones(2, 1)
    assert _fits(stored, *tensors, order)
    order[0] = at
    assert not _fits(stored, *tensors, order)
