"""Files that ONNX Runtime's own quantisers wrote of exported models: every weight has a format."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import (
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.compare import rel
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.session import open_session
from lora_fx.onnx.signature import signature
from lora_fx.passes.find import find
from lora_fx.targets.target import Found

from .graph.coded import NF4

Array = np.ndarray[Any, Any]
TOKENS = torch.arange(14).reshape(2, 7) % 90


class Pixels(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, 2), nn.Conv2d(12, 8, (3, 1), padding=1)
        self.head = nn.Linear(8 * 25, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(
            self.head(self.second(torch.relu(self.first(x))).mean(3).flatten(1)[:, :200])
        )


def text() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
                        intermediate_size=80, vocab_size=96, max_position_embeddings=32,
                        initializer_range=0.2)  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval(), (TOKENS,)


def decoder() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = LlamaConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=80, vocab_size=96,
                         tie_word_embeddings=False, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval(), (TOKENS,)


def pixels() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Pixels().eval(), (torch.randn(2, 3, 52, 20),)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for build in (text, decoder, pixels):
        torch.manual_seed(0)
        model, args = build()
        made[build.__name__] = folder / f"{build.__name__}.onnx"
        lora_fx.export(model, made[build.__name__], args, provider="cpu")
    return made


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The quantisers warn of divisions by the range of a constant 0, and of much else."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """A few drawn inputs of a file."""

    def __init__(self, path: Path) -> None:
        inputs = signature(open_session(path, "cpu"))
        self.feeds = iter([inputs.sample((2, 5), seed) for seed in range(4)])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def by_blocks(**options: Any) -> Callable[[Path, Path], None]:
    def write(source: Path, out: Path) -> None:
        quantiser = MatMulNBitsQuantizer(onnx.load(source), **options)
        quantiser.process()
        quantiser.model.save_model_to_file(str(out))

    return write


def bnb4(source: Path, out: Path) -> None:
    quantiser = MatMulBnb4Quantizer(onnx.load(source), MatMulBnb4Quantizer.NF4, 64)
    quantiser.process()
    quantiser.model.save_model_to_file(str(out))


def dynamic(source: Path, out: Path) -> None:
    model = onnx.load(source)
    if any(n.op_type == "Gemm" for n in model.graph.node):  # it turns that weight, not its shape
        del model.graph.value_info[:]
    quantize_dynamic(model, out, op_types_to_quantize=["MatMul", "Conv", "Gather"])


def static(source: Path, out: Path) -> None:
    quantize_static(source, out, Reader(source), quant_format=QuantFormat.QDQ, per_channel=True)


HQQ = HQQWeightOnlyQuantConfig(block_size=16, bits=4)
GATHER = ("MatMul", "Gather")
QUANTISERS: dict[str, tuple[Callable[[Path, Path], None], set[str]]] = {
    "RTN 16": (by_blocks(block_size=16, is_symmetric=False), {"MatMulNBits"}),
    "RTN 32 symmetric, tables too": (
        by_blocks(block_size=32, is_symmetric=True, op_types_to_quantize=GATHER),
        {"MatMulNBits", "GatherBlockQuantized"},
    ),
    "RTN 128 of 8 bits": (by_blocks(block_size=128, bits=8), {"MatMulNBits"}),
    "RTN 32 as DequantizeLinear": (
        by_blocks(block_size=32, quant_format=QuantFormat.QDQ), {"DequantizeLinear"}),
    "RTN 32, level 4": (by_blocks(block_size=32, accuracy_level=4), {"MatMulNBits"}),
    "HQQ": (by_blocks(algo_config=HQQ), {"MatMulNBits"}),
    "bnb4": (bnb4, {"MatMulBnb4"}),
    "dynamic": (dynamic, {"MatMulInteger", "ConvInteger", "DequantizeLinear"}),
    "static": (static, {"DequantizeLinear"}),
}  # fmt: skip
CASES = [(n, m) for n in QUANTISERS for m in ("text", "decoder")]
CASES += [(n, "pixels") for n in ("dynamic", "static")]  # its one product is a Gemm
ROUNDED = {"dynamic", "static", "RTN 32, level 4"}
"""Those whose activations are codes too."""


def adapter_of(found: Found, seed: int, size: float = 0.5) -> Adapter:
    """An update of every target of the default plan."""
    rng, entries = np.random.default_rng(seed), {}
    for t in (t for t in found.targets if t.default):
        layout = t.layout
        a = rng.standard_normal((2, layout.in_size)) / layout.in_size**0.5
        b = rng.standard_normal((layout.out_size, 2)) / 2
        low = LowRank(a.astype(np.float32), b.astype(np.float32), 2 * size, layout)
        entries[t.key] = low
    return Adapter(entries)


@pytest.mark.parametrize(("name", "model"), CASES)
def test_files_of_the_runtimes_quantisers(
    name: str, model: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    write, formats = QUANTISERS[name]
    source, path = exports[model], tmp_path / "base.onnx"
    write(source, path)
    found = find(OnnxGraph(load(path)))
    floats = find(OnnxGraph(load(source)))
    assert len(found.targets) == len(floats.targets)
    assert found.reached_share == floats.reached_share == 1.0
    assert found.flops == floats.flops
    assert {t.parameter.format for t in found.targets} <= {*formats, ""}
    coded = [t for t in found.targets if t.parameter.format]
    assert len(coded) >= len(floats.targets) - 3
    names = {n for t in found.targets for n in (t.key, *t.parameter.aliases)}
    assert {t.key for t in floats.targets} <= names
    adapters = {"one": adapter_of(found, 1), "two": adapter_of(found, 2)}
    switch = tmp_path / "s.onnx"
    assert lora_fx.export(path, switch, adapters=adapters, mode="switch", provider="cpu")
    session, base = Session(switch, "cpu"), open_session(path, "cpu")
    feeds = signature(base).sample((3, 5), 7)
    session.load("one", adapters["one"])
    (y, *_), (was, *_) = (list(r.values()) for r in (
        session.run(feeds, adapter="one"), base.run(feeds)))  # fmt: skip
    assert 0.05 < rel(y, was) < 5
    if name not in ROUNDED:
        wanted = in_floats(source, path, found, adapters["one"], tmp_path)
        assert rel(y, next(iter(wanted.run(feeds).values()))) < 1e-5
    given = list(adapters.values())
    report = lora_fx.export(path, tmp_path / "b.onnx", adapters=given, mode="batch", provider="cpu")
    assert report and max(p.rel for p in report.parity) < 1e-5


def in_floats(source: Path, path: Path, found: Found, adapter: Adapter, folder: Path) -> Any:
    """A session of the float model with the decoded weights, and s·b·a added to them in fp64."""
    model, coded = onnx.load(source), onnx.load(path)
    stored = {t.name: t for t in coded.graph.initializer}
    arrays = {n: onnx.numpy_helper.to_array(t) for n, t in stored.items()}
    wide = {}
    for node in coded.graph.node:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        inputs = [arrays.get(n) for n in node.input]
        decode = DECODE.get(node.op_type)
        if decode is not None and any(n in arrays for n in node.input[:2]):
            at = 0 if node.op_type in ("DequantizeLinear", "GatherBlockQuantized") else 1
            wide[node.input[at]] = decode(inputs, given)
    for t in found.targets:
        (own,) = t.parameter.aliases or (t.key,)
        (at,) = (i for i, v in enumerate(model.graph.initializer) if v.name == own)
        w = wide.get(t.key, arrays.get(own))
        assert w is not None
        low, by_rows = (
            adapter.lowrank.get(t.key),
            t.parameter.format in ("MatMulNBits", "MatMulBnb4"),
        )
        if low is not None:
            change = low.scale * low.b.astype(np.float64) @ low.a.astype(np.float64)
            w = w + (change if by_rows else change.T)
        value = (w.T if by_rows else w).astype(np.float32)
        assert value.shape == tuple(model.graph.initializer[at].dims)
        model.graph.initializer[at].CopyFrom(onnx.numpy_helper.from_array(value, own))
    onnx.save(model, folder / "floats.onnx")
    return open_session(folder / "floats.onnx", "cpu")


def _nbits(inputs: list[Any], a: dict[str, Any]) -> Array:
    packed, scales, zeros = inputs[1], inputs[2], inputs[3] if len(inputs) > 3 else None
    bits, n, k, each = a["bits"], a["N"], a["K"], -(-a["K"] // a["block_size"])
    unpacked = _unpacked(packed.reshape(n, each, -1), bits)
    if zeros is None:
        point: Any = 2 ** (bits - 1)
    elif zeros.dtype == np.uint8:
        point = _unpacked(zeros.reshape(n, -1), bits)[:, :each, None]
    else:
        point = zeros.reshape(n, each, 1).astype(np.float64)
    return ((unpacked - point) * scales.reshape(n, each, 1).astype(np.float64)).reshape(n, -1)[
        :, :k
    ]


def _unpacked(packed: Array, bits: int) -> Array:
    parts = [(packed >> s) & (2**bits - 1) for s in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.float64)


def _bnb4(inputs: list[Any], a: dict[str, Any]) -> Array:
    packed, absmax = inputs[1], inputs[2].astype(np.float64)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    return (NF4[codes] * np.repeat(absmax, a["block_size"])[: codes.size]).reshape(a["N"], a["K"])


def _blocks(inputs: list[Any], a: dict[str, Any]) -> Array:
    codes, scale = inputs[0].astype(np.float64), inputs[1].astype(np.float64)
    axis, block = a["axis"], a["block_size"]
    zero = inputs[2].astype(np.float64) if len(inputs) > 2 else np.zeros_like(scale)
    scale, zero = (np.repeat(v, block, axis).take(range(codes.shape[axis]), axis)
                   for v in (scale, zero))  # fmt: skip
    return (codes - zero) * scale


def _rows(inputs: list[Any], a: dict[str, Any]) -> Array:
    return _blocks([inputs[0], *inputs[2:]], {"axis": 1, "block_size": a["block_size"]})


DECODE: dict[str, Callable[[list[Any], dict[str, Any]], Array]] = {
    "MatMulNBits": _nbits, "MatMulBnb4": _bnb4, "DequantizeLinear": _blocks,
    "GatherBlockQuantized": _rows,
}  # fmt: skip


def test_a_classifier_of_another_framework_in_int8(tmp_path: Path) -> None:
    """Its weights are Constant nodes, of which the quantiser makes codes in every run."""
    path = tmp_path / "base.onnx"
    folder = distribution("rapidocr").locate_file("rapidocr/models")
    quantize_dynamic(Path(str(folder)) / "ch_ppocr_mobile_v2.0_cls_mobile.onnx", path)
    found = find(OnnxGraph(load(path)))
    assert {t.parameter.format for t in found.targets} == {"ConvInteger", ""}
    assert len(found.targets) + len(found.optional) == 54
    low = adapter_of(found, 1, 0.02)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 48, 192)).astype(np.float32)}
    switch = tmp_path / "s.onnx"
    report = lora_fx.export(path, switch, adapters=low, mode="switch", inputs=feeds, provider="cpu")
    assert report and report.details["targets"] == len(low)


def test_static_codes_of_opset_21(tmp_path: Path) -> None:
    """A branch adds no Reshape next to QuantizeLinear: ONNX Runtime moves that, and refuses it."""
    rng, source, path = np.random.default_rng(0), tmp_path / "m.onnx", tmp_path / "base.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> m (int64[batch, seq] ids) => '
        "(float[batch, seq, 48] y) { e = Gather(table, ids) p = MatMul(e, w) h = Add(p, b) "
        "t = Tanh(h) q = MatMul(t, v) y = Add(q, c) }"
    )
    shapes = {"table": (50, 64), "w": (64, 96), "b": (96,), "v": (96, 48), "c": (48,)}
    for name, shape in shapes.items():
        value = (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, source)
    static(source, path)
    found = find(OnnxGraph(load(path)))
    adapters = {"one": adapter_of(found, 1)}
    assert len(adapters["one"]) == 2 and found.reached_share == 1.0
    assert lora_fx.export(
        path, tmp_path / "s.onnx", adapters=adapters, mode="switch", provider="cpu"
    )
