"""An export that does equal layers once gives the graph of torch's own exporter, node by node."""

from __future__ import annotations

import hashlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnxscript.rewriter._rewrite_rule import RewriteRule
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F
from torch.onnx._internal.exporter._building import OpRecorder

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.fx.lowering.decomposition import lowered
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.onnx_export import exporter_speed, to_onnx
from lora_fx.fx.onnx_exporter import table_read_once
from tests.zoo.shared import captured


@pytest.fixture(autouse=True)
def _one_table() -> Iterator[None]:
    """The exporter's table of operators is the same on both ways, and takes a second to make."""
    with table_read_once():
        yield


def _bytes(tensor: Any) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}{hashlib.md5(tensor.tobytes()).hexdigest()}"


def tree(model: Any) -> tuple[Counter[str], list[Any]]:
    """The nodes of a model, each with its types and all that it is computed of, and its outputs.

    Nodes of branches are among them. Names of values, of dimensions, and the order of nodes that do
    not read each other are left out.
    """
    known: dict[Any, str] = {None: "none"}

    def of(value: Any) -> str:
        if value not in known:
            held = value.const_value
            known[value] = value.name if held is None else _bytes(held)
        return known[value]

    def told(attribute: Any) -> str:
        held = attribute.value
        if attribute.type == ir.AttributeType.GRAPH:
            walk(held)
            held = [of(v) for v in held.outputs]
        return f"{attribute.name}={_bytes(held) if hasattr(held, 'tobytes') else held}"

    def shape(value: Any) -> list[Any]:
        known = "none" if value.shape is None else value.shape
        return [d if isinstance(d, int) else "any" for d in known]

    nodes: Counter[str] = Counter()

    def walk(graph: Any) -> None:
        for node in graph:
            attributes = sorted(map(told, node.attributes.values()))
            types = [(v.dtype, shape(v)) for v in node.outputs]
            text = f"{node.domain}.{node.op_type}{[of(v) for v in node.inputs]}{attributes}{types}"
            made = f"{node.op_type} {hashlib.md5(text.encode()).hexdigest()}"
            nodes[made] += 1
            known.update((v, f"{made}.{i}") for i, v in enumerate(node.outputs))

    walk(model.graph)
    return nodes, [(v.name, of(v), v.dtype) for v in model.graph.outputs]


class Layers(nn.Module):
    """Equal blocks over x [n, s, 12] and integers [n, s]: what a language model has, and casts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(12, 36) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(count))
        self.norm = nn.ModuleList(nn.LayerNorm(12) for _ in range(count))

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        for up, down, norm in zip(self.up, self.down, self.norm, strict=True):
            q, k, v = up(norm(x)).unflatten(-1, (3, 12)).unbind(2)
            q = torch.cat([-q[..., 6:], q[..., :6]], -1) * places[..., None]
            a = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)
            x = x + down(F.gelu(a[:, 0])) / 3
        return x, x.argmax(-1) + places / 2


def layers(count: int) -> Any:
    args = torch.randn(2, 5, 12), torch.arange(10).reshape(2, 5)
    return plain(captured(f"repeated {count}", lambda: (Layers(count).eval(), args))[0]).eval()


def _alone(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The same functions of one value, of two, and of other numbers and ranks, in turn."""
    a, b = F.linear(x, w), F.linear(x.flip(1), w)
    parts = torch.add(a, a), torch.add(a, b), torch.add(a, b, alpha=2), torch.add(b, b)
    clipped = a.clamp(0, 1), b.clamp(0, 1), b.clamp(0.0, 1.5), a.sum(1), b.sum(1), b.sum(2)
    turned = a.transpose(0, 1), b.transpose(0, 1), a.sum(2).transpose(0, 1)
    same = a.view(*x.shape[:2], 7), b.view(*x.shape[:2], 7)
    y = torch.cat([p.flatten(1) for p in (*parts, *clipped, *same)], 1)
    return y, torch.cat([p.flatten(1) for p in turned], 1)


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _alone(x, self.w)


def alone() -> Any:
    return plain(captured("alone", lambda: (Alone().eval(), (torch.randn(3, 4, 5),)))[0]).eval()


def _zoo(name: str) -> Callable[[], Any]:
    return lambda: plain(captured(name)[0]).eval()


BUILT: dict[str, tuple[Callable[[], Any], bool]] = {
    "layers": (lambda: layers(2), True),
    "functions": (alone, False),
}
ZOO = (
    *("hf_llama", "hf_bert", "hf_gpt2", "hf_t5", "hf_mixtral", "hf_swin", "hf_deberta_v2"),
    *("hf_fnet", "tv_resnet18", "timm_convnext", "transformer_encoder", "torch_cond", "lstm"),
)
ROWS = [
    *(pytest.param(*row, id=name) for name, row in BUILT.items()),
    *(pytest.param(_zoo(n), True, id=n, marks=pytest.mark.slow) for n in ZOO),
]


@pytest.mark.parametrize(("build", "optimised"), ROWS)
def test_the_graph_is_that_of_the_long_way(
    build: Callable[[], Any], optimised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx import ONNXProgram

    if not optimised:
        monkeypatch.setattr(ONNXProgram, "optimize", lambda self: None)
    module = build()
    quick, long = (tree(to_onnx.to_onnx(module, repeat=r)) for r in (True, False))
    assert quick[0] == long[0]
    assert quick[1] == long[1]
    assert sum(long[0].values()) > 5


OWN = (
    "onnxscript.optimizer._constant_folding.FoldConstantsPass._do_inference",
    "torch.onnx._internal.exporter._dispatching.dispatch",
    "torch.onnx._internal.fx.passes.type_promotion._TypePromotionInterpreter",
)
"""What the short way puts something in the place of, and a later version may lack."""


@pytest.mark.parametrize("name", OWN)
def test_what_a_version_lacks_goes_the_long_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other parts are still short, and all of them are as they were afterwards."""
    thing, attribute = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
    before = OpRecorder.eval, RewriteRule.try_rewrite, ExportedProgram.run_decompositions
    monkeypatch.delattr(thing, attribute)
    with exporter_speed.repeating():
        assert ExportedProgram.run_decompositions is lowered
        assert not hasattr(thing, attribute)
    assert (OpRecorder.eval, RewriteRule.try_rewrite, ExportedProgram.run_decompositions) == before


def test_layers_cost_no_more_functions_and_inferences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer and all after it are copies: as many calls for three layers as for two."""
    run, infer = OpRecorder.eval, onnx.shape_inference.infer_node_outputs
    seen: Counter[str] = Counter()

    def counted(*args: Any, **named: Any) -> Any:
        seen["function"] += 1
        return run(*args, **named)

    def inferred(*args: Any) -> Any:
        seen["inference"] += 1
        return infer(*args)

    monkeypatch.setattr(OpRecorder, "eval", counted)
    monkeypatch.setattr(onnx.shape_inference, "infer_node_outputs", inferred)
    found = []
    for count in (2, 3):
        seen.clear()
        to_onnx.to_onnx(layers(count))
        found.append(dict(seen))
    assert found[0] == found[1]
    assert min(found[0].values()) > 10


HALVES: dict[str, tuple[Sequence[tuple[str, str, str]], int]] = {
    "the second first": ([("x", "3", "6"), ("x", "0", "3")], 1),
    "the first first": ([("x", "0", "3"), ("x", "3", "6")], 0),  # it is tried as its own second
    "of two values": ([("z", "3", "6"), ("x", "0", "3")], 0),
    "of both": ([("x", "3", "6"), ("z", "3", "6"), ("z", "0", "3"), ("x", "0", "3")], 2),
    "thirds": ([("x", "4", "6"), ("x", "2", "4"), ("x", "0", "2")], 0),
}
"""Slices of values [2, 6] in the order of the graph, and how many pairs become a split."""


def _sliced(slices: Sequence[tuple[str, str, str]]) -> Any:
    numbers = ", ".join(f"int64[1] n{i} = {{{i}}}" for i in range(7))
    lines = [f"y{i} = Slice({x}, n{a}, n{b}, last)" for i, (x, a, b) in enumerate(slices)]
    outputs = ", ".join(f"float[2, m{i}] y{i}" for i in range(len(slices)))
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[2, 6] x, float[2, 6] z) => ({outputs})
        <{numbers}, int64[1] last = {{1}}> {{ {" ".join(lines)} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("case", HALVES)
def test_a_rule_of_two_outputs_finds_what_it_would_find_in_the_whole_graph(case: str) -> None:
    from onnxscript import rewriter

    slices, splits = HALVES[case]
    whole, near = _sliced(slices), _sliced(slices)
    rewriter.rewrite(whole)
    with exporter_speed.repeating():
        rewriter.rewrite(near)
    assert [n.op_type for n in near.graph] == [n.op_type for n in whole.graph]
    assert tree(near) == tree(whole)
    assert sum(n.op_type == "Split" for n in near.graph) == splits


@pytest.mark.parametrize("mode", ["merged", "switch", "batch"])
@pytest.mark.parametrize("repeat", [True, False])
def test_the_option_reaches_the_exporter(
    mode: Any, repeat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long way starts without the shortcuts, and captures anew."""
    asked: list[bool] = []

    def refused(*args: Any, **named: Any) -> Any:
        asked.append(named["repeat"])
        raise LoraFxError("stop", "")

    monkeypatch.setattr(to_onnx, "translated", refused)
    adapters = None
    if mode != "merged":
        adapters = {
            "a": lora_fx.insert(execution_of(layers(2)).captured, rank=2, dead="allow").adapter()
        }
    with pytest.raises(LoraFxError, match="stop"):
        lora_fx.export(
            execution_of(layers(2)).captured,
            tmp_path / "m.onnx",
            mode=mode,
            adapters=adapters,
            repeat=repeat,
        )
    assert set(asked) == {repeat}


MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (torch.randn(2, 5),)
"""


def test_the_command_line_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    source = f"{tmp_path / 'model.py'}:build"
    for name, more in (("a", []), ("b", ["--no-repeat"])):
        with pytest.raises(SystemExit) as done:
            main(["export", source, "-o", str(tmp_path / f"{name}.onnx"), *more])
        assert done.value.code == 0
    a, b = (tree(ir.load(tmp_path / f"{name}.onnx")) for name in "ab")
    assert a == b
    capsys.readouterr()
    line = ["export", str(tmp_path / "a.onnx"), "-o", str(tmp_path / "c.onnx"), "--no-repeat"]
    with pytest.raises(SystemExit) as done:
        main(line)
    assert done.value.code == 2
    assert "--no-repeat has no effect" in capsys.readouterr().err
    with pytest.raises(LoraFxError, match="opset and repeat have no effect"):
        lora_fx.export(tmp_path / "a.onnx", tmp_path / "c.onnx", optimise=True, repeat=False)
    assert not (tmp_path / "c.onnx").exists()
