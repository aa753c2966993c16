"""What the formats' own packages make of their arrays, each on a CPU.

`python -m tests.files.quantised.packages` writes golden.json anew, with bitsandbytes, torchao,
compressed-tensors, gptqmodel, auto-round, modelopt, transformers and onnxruntime installed; the
tests read it without them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from lora_fx.dtypes import Array
from tests.files.quantised.rows import Arrays, Options, Row, dump, mark

Found = tuple[str, str, Arrays, Options, Array]
"""A row whose weight is still whole."""
DTYPES = ("float32", "bfloat16", "float16")


def array(t: Any) -> Array:
    """A tensor's own bytes."""
    import torch

    t = t.detach().contiguous()
    narrow = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
    name = str(t.dtype).removeprefix("torch.")
    if t.dtype in narrow:
        return t.view(narrow[t.dtype]).numpy().view(getattr(ml_dtypes, name)).copy()
    return t.numpy().copy()


def bitsandbytes(rows: int, scale: int) -> Iterator[Found]:
    """Rows in whole blocks, and rows of an odd length.

    Others are left out: in 0.50.2, the kernel for AVX512 takes wrong scales where a row of a
    multiple of 32 ends within a block. Its own code for other processors and odd rows does not.
    """
    import bitsandbytes.functional as f
    import torch

    for dtype, kind, nested in itertools.product(DTYPES, ("nf4", "fp4"), (False, True)):
        for block, columns in ((64, 64 * scale), (32, 64 * scale), (64, 32 * scale + 1)):
            w = torch.randn(rows, columns, dtype=getattr(torch, dtype))
            q, s = f.quantize_4bit(w, None, None, block, nested, kind)
            arrays = {f"weight.{n}": array(v) for n, v in s.as_dict(packed=True).items()}
            del arrays["weight.quant_map"]  # which is not read
            name = f"{kind} {dtype} {block} {columns}{' nested' * nested}"
            want = array(f.dequantize_4bit(q, s))
            yield (name, "bitsandbytes four bits", arrays | {"weight": array(q)}, {}, want)
    codes, scb, _ = f.int8_vectorwise_quant(torch.randn(rows, 16 * scale, dtype=torch.float16))
    arrays = {"weight": array(codes), "SCB": array(scb)}
    yield ("int8", "bitsandbytes int8", arrays, {}, array(f.int8_vectorwise_dequant(codes, scb)))


def compressed_tensors(rows: int, scale: int) -> Iterator[Found]:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    rows = max(rows, 9)  # 0.20 cannot unpack zero points that lie in one word
    kinds = [("pack-quantized", b) for b in range(2, 9)]
    kinds += [("int-quantized", 8), ("float-quantized", 8)]
    ways = itertools.product(kinds, ("group", "channel", "tensor"), (True, False))
    for i, ((layout, bits), strategy, symmetric) in enumerate(ways):
        if layout == "float-quantized" and not symmetric:
            continue
        dtype = DTYPES[i % 3]
        w = torch.randn(rows, 32 * scale, dtype=getattr(torch, dtype))
        args = QuantizationArgs(
            num_bits=bits,
            type="float" if layout == "float-quantized" else "int",
            symmetric=symmetric,
            strategy=strategy,
            group_size=16 if strategy == "group" else None,
        )
        shape = {"group": (rows, -1, 16), "channel": (rows, 1, -1), "tensor": (1, -1)}[strategy]
        cut = w.reshape(shape)
        steps, zero = calculate_qparams(cut.amin(-1), cut.amax(-1), args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        state = {"weight": w, "weight_scale": steps, "weight_zero_point": zero}
        state = compressor.compress(state, scheme)
        want = array(compressor.decompress(dict(state), scheme)["weight"])
        name = f"{layout} {bits} {strategy} {dtype}{' symmetric' * symmetric}"
        yield (name, "compressed-tensors", {n: array(v) for n, v in state.items()}, {}, want)


def compressed_floats(rows: int, scale: int) -> Iterator[Found]:
    """Two levels of scales, and scales that are powers of two; its products are in bfloat16."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    kinds = {
        "nvfp4-pack-quantized": ("nvfp4", 4, "tensor_group", 16, None),
        "mxfp4-pack-quantized": ("mxfp4", 4, "group", 32, torch.uint8),
        "mxfp8-quantized": ("fp8", 8, "group", 32, torch.uint8),
    }
    for layout, (reader, bits, strategy, size, dtype) in kinds.items():
        args = QuantizationArgs(
            num_bits=bits,
            type="float",
            strategy=strategy,
            group_size=size,
            symmetric=True,
            scale_dtype=dtype,
        )
        w = torch.randn(rows, 64 * scale)
        cut = w.reshape(rows, -1, size)
        more = {} if dtype else {"weight_global_scale": generate_gparam(w.amin(), w.amax())}
        steps, _ = calculate_qparams(
            cut.amin(-1), cut.amax(-1), args, global_scale=more.get("weight_global_scale")
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        state = compressor.compress({"weight": w, "weight_scale": steps, **more}, scheme)
        want = array(compressor.decompress(dict(state), scheme)["weight"])
        yield (layout, reader, {n: array(v) for n, v in state.items()}, {}, want)


def modelopt(rows: int, scale: int) -> Iterator[Found]:
    import torch
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    for name in DTYPES:
        dtype = getattr(torch, name)
        w = torch.randn(rows, 64 * scale, dtype=dtype)
        q, s, second = NVFP4QTensor.quantize(w, 16)
        sizes = {-1: 16}
        want = array(q.dequantize(dtype=dtype, scale=s, double_scale=second, block_sizes=sizes))
        arrays = {"weight": q._quantized_data, "weight_scale": s, "weight_scale_2": second}
        yield (f"NVFP4 {name}", "nvfp4", {n: array(v) for n, v in arrays.items()}, {}, want)
    q, s = MXFP8QTensor.quantize(torch.randn(rows, 64 * scale))
    arrays = {"weight": array(q._quantized_data), "weight_scale": array(s)}
    yield ("MXFP8", "fp8", arrays, {}, array(q.dequantize(dtype=torch.float32, scale=s)))


def transformers(rows: int, scale: int) -> Iterator[Found]:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    for dtype, size in itertools.product((torch.float32, torch.bfloat16), (128, 32)):
        w = torch.randn(2 * size, size * scale).to(torch.float8_e4m3fn)
        s = (torch.rand(2, scale) / 100).to(dtype)
        want = array(Fp8Dequantize(None)._dequantize_one(w, s, torch.float32))
        arrays = {"weight": array(w), "weight_scale_inv": array(s)}
        yield (f"FP8 {size} {dtype}", "fp8 blocks", arrays, {"weight_block_size": [size] * 2}, want)
    for name in ("bfloat16", "float32"):
        blocks = torch.randint(0, 256, (2, 8 * rows, scale, 16), dtype=torch.uint8)
        steps = torch.randint(110, 130, (2, 8 * rows, scale), dtype=torch.uint8)
        want = array(convert_moe_packed_tensors(blocks, steps, dtype=getattr(torch, name)))
        arrays = {"w_blocks": array(blocks), "w_scales": array(steps)}
        yield (f"gpt-oss {name}", "mxfp4 stack", arrays, {}, want)


def torchao(rows: int, scale: int) -> Iterator[Found]:
    import torch
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerTensor,
        quantize_,
    )
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    configs: list[Any] = [
        Int8WeightOnlyConfig(),
        Int8WeightOnlyConfig(granularity=PerTensor()),
        Float8WeightOnlyConfig(),
    ]
    for bits, group, mapping in itertools.product(
        (2, 3, 4, 8), (PerGroup(16), PerAxis(0)), (MappingType.SYMMETRIC, MappingType.ASYMMETRIC)
    ):
        dtype = getattr(torch, f"int{bits}")
        configs.append(
            IntxWeightOnlyConfig(weight_dtype=dtype, granularity=group, mapping_type=mapping)
        )
    for i, config in enumerate(configs):
        name = DTYPES[i % 3]
        layer = torch.nn.Linear(32 * scale, rows, bias=False, dtype=getattr(torch, name))
        quantize_(layer, config)
        w: Any = layer.weight
        arrays = {"qdata": array(w.qdata), "scale": array(w.scale)}
        if getattr(w, "zero_point", None) is not None:
            arrays["zero"] = array(w.zero_point)
        options = {"block_size": list(w.block_size)}
        yield (f"{type(w).__name__} {i} {name}", "torchao", arrays, options, array(w.dequantize()))
    for name in DTYPES:
        w = to_nf4(torch.randn(4 * rows, 32 * scale, dtype=getattr(torch, name)), 32, scale)
        arrays = {
            "data": array(w.quantized_data),
            "scalers": array(w.quantized_scalers),
            "factor": array(w.quantization_factor),
            "mean": array(w.scaler_mean),
            "levels": array(w.nf4),
        }
        options = {"shape": list(w.shape)}
        want = array(w.get_original_weight())
        yield (f"NF4Tensor {name}", "torchao nf4", arrays, options, want)


def words(*shape: int) -> Any:
    import torch

    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def gptqmodel(rows: int, scale: int) -> Iterator[Found]:
    """Words at random: every zero point occurs, those that borrow from their neighbours too."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    out, length = 32, 32 * scale
    for bits, group, version in itertools.product((2, 3, 4, 8), (16, -1), (1, 2)):
        order = group == 16 and version == 1
        layer = TorchLinear(
            bits=bits,
            group_size=group,
            sym=False,
            desc_act=order,
            in_features=length,
            out_features=out,
            bias=False,
            pack_dtype=torch.int32,
            register_buffers=True,
        )
        groups = torch.arange(length, dtype=torch.int32) // (group if group > 0 else length)
        layer.g_idx = groups[torch.randperm(length)] if order else groups
        layer.qweight, layer.qzeros = words(*layer.qweight.shape), words(*layer.qzeros.shape)
        layer.scales = (torch.rand(layer.scales.shape) / 100).half()
        names = ("qweight", "qzeros", "scales", "g_idx")
        arrays = {n: array(getattr(layer, n)) for n in names}
        if version == 1:
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer._init_wf_unsqueeze_buffers()
        want = array(layer.dequantize_weight().T)
        name = f"gptq {bits} {group} version {version}{' in an order' * order}"
        yield (name, "gptq", arrays, {"version": version}, want)
    for group in (16, 32):
        arrays = {
            "qweight": array(words(length, out // 8)),
            "qzeros": array(words(length // group, out // 8)),
            "scales": array((torch.rand(length // group, out) / 100).half()),
        }
        tensors = [torch.from_numpy(a) for a in arrays.values()]
        want = array(dequantize_gemm(*tensors, 4, group).T)
        yield (f"awq {group}", "awq", arrays, {}, want)


def auto_round(rows: int, scale: int) -> Iterator[Found]:
    import torch
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    for bits in (2, 3, 4, 8):
        steps = (torch.rand(32, scale) / 100 + 0.01).half().float()
        zero = torch.randint(1, 2**bits - 1, (32, scale)).float()
        layer = QuantLinear(bits, 32, 32 * scale, 32, False)
        layer.pack(torch.nn.Linear(32 * scale, 32, bias=False), steps, zero)
        arrays = {n: array(getattr(layer, n)) for n in ("qweight", "qzeros", "scales")}
        want = array(layer(torch.eye(32 * scale).half()).T)
        yield (f"auto-round {bits}", "gptq", arrays, {}, want)


def _run(
    op: str, inputs: dict[str, Array | None], *, transposed: bool = False, **attributes: Any
) -> Array:
    """One operator over constants; its `x` or rows of a table are the identity or all."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    given = {n: a for n, a in inputs.items() if a is not None}
    domain = "" if op == "DequantizeLinear" else "com.microsoft"
    node = helper.make_node(op, list(given), ["y"], domain=domain, **attributes)
    out = onnx.TensorProto.FLOAT16 if given["s"].dtype == np.float16 else onnx.TensorProto.FLOAT
    feeds = {}
    if "eye" in given:  # no constant, or the kernel is folded away
        feeds["eye"] = given.pop("eye")
    known = [helper.make_tensor_value_info(n, 1, a.shape) for n, a in feeds.items()]
    graph = helper.make_graph(
        [node],
        "g",
        known,
        [helper.make_tensor_value_info("y", out, None)],
        [numpy_helper.from_array(a, n) for n, a in given.items()],
    )
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, feeds)
    return np.asarray(y.T if transposed else y)


def onnxruntime(rows: int, scale: int) -> Iterator[Found]:
    rng = np.random.default_rng(rows)

    def drawn(*shape: int) -> Array:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    def steps(*shape: int, dtype: Any = np.float32) -> Array:
        return (rng.standard_normal(shape) / 100).astype(dtype)

    for bits, block, packed in itertools.product((2, 4, 8), (16, 32, 128), (False, True)):
        n, k = rows, 24 * scale
        blocks = -(-k // block)
        b, s = drawn(n, blocks, block * bits // 8), steps(n, blocks)
        z = drawn(n, -(-blocks * bits // 8)) if packed else None
        y = _run(
            "MatMulNBits",
            {"eye": np.eye(k, dtype=np.float32), "b": b, "s": s, "z": z},
            transposed=True,
            **{"K": k, "N": n, "bits": bits, "block_size": block},
        )
        arrays = {"b": b, "scale": s} | ({} if z is None else {"zero": z})
        name = f"MatMulNBits {bits} {block}{' zero points' * packed}"
        yield (name, "MatMulNBits", arrays, {"shape": [n, k], "bits": bits}, y)
    for kind, block, k in itertools.product((0, 1), (16, 64), (32 * scale, 33)):
        b, s = drawn(-(-rows * k // 2)), steps(-(-rows * k // block))
        y = _run(
            "MatMulBnb4",
            {"eye": np.eye(k, dtype=np.float32), "b": b, "s": s},
            transposed=True,
            **{"K": k, "N": rows, "quant_type": kind, "block_size": block},
        )
        options = {"shape": [rows, k], "quant_type": kind, "block": block}
        yield (f"MatMulBnb4 {kind} {block} {k}", "MatMulBnb4", {"b": b, "absmax": s}, options, y)
    yield from _dequantize_linear(rng, rows, scale)
    for bits, block, zeros in itertools.product((2, 4, 8), (16, 32), (False, True)):
        x, s = drawn(rows, 16 * scale * bits // 8), steps(rows, -(-16 * scale // block))
        z = drawn(rows, -(-s.shape[1] * bits // 8)) if zeros else None
        inputs = {"x": x, "i": np.arange(rows), "s": s, "z": z}
        y = _run("GatherBlockQuantized", inputs, bits=bits, block_size=block)
        arrays = {"x": x, "scale": s} | ({} if z is None else {"zero": z})
        name = f"GatherBlockQuantized {bits} {block}{' zero points' * zeros}"
        yield (name, "GatherBlockQuantized", arrays, {"bits": bits, "block": block}, y)
    for kind in ("int4", "uint4"):
        x = _codes(rng, kind, (rows, 16 * scale))
        s = steps(rows, scale)
        y = _run("GatherBlockQuantized", {"x": x, "i": np.arange(rows), "s": s}, block_size=16)
        arrays = {"x": x, "scale": s}
        yield (f"GatherBlockQuantized {kind}", "GatherBlockQuantized", arrays, {"block": 16}, y)


KINDS = (
    *("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)


def _codes(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    if kind.startswith("float"):
        return np.asarray(rng.standard_normal(shape).astype(dtype))
    info: Any = ml_dtypes.iinfo(dtype) if kind.endswith("t4") else np.iinfo(kind)
    return np.asarray(rng.integers(int(info.min), int(info.max) + 1, shape).astype(dtype))


def _dequantize_linear(rng: np.random.Generator, rows: int, scale: int) -> Iterator[Found]:
    shape = (rows, 16 * scale)
    ways = {"tensor": (1, ()), "rows": (0, shape[:1]), "columns": (1, shape[1:])}
    for i, (kind, (way, (axis, counts))) in enumerate(
        itertools.product(KINDS, (*ways.items(), ("blocks", (1, (rows, scale)))))
    ):
        block = 16 if way == "blocks" else 0
        x = _codes(rng, kind, shape)
        dtype = np.float16 if i % 3 == 2 and kind != "int32" else np.float32
        s = (rng.standard_normal(counts) / 1000).astype(dtype)
        with_zero = i % 2 == 0 and kind.endswith(("t4", "t8", "t16"))
        z = np.asarray(_codes(rng, kind, counts)) if with_zero else None
        more = {"axis": axis, "block_size": block} if block else {"axis": axis}
        y = _run("DequantizeLinear", {"x": x, "s": np.asarray(s), "z": z}, **more)
        arrays = {"x": x, "scale": np.asarray(s)} | ({} if z is None else {"zero": z})
        name = f"DequantizeLinear {kind} {way} {np.dtype(dtype)}{' zero points' * with_zero}"
        yield (name, "DequantizeLinear", arrays, {"axis": axis, "block": block}, y)


PACKAGES: dict[str, Callable[[int, int], Iterator[Found]]] = {
    "bitsandbytes": bitsandbytes,
    "compressed_tensors": compressed_tensors,
    "compressed_tensors.quantization": compressed_floats,
    "modelopt": modelopt,
    "transformers": transformers,
    "torchao": torchao,
    "gptqmodel": gptqmodel,
    "auto_round_extension": auto_round,
    "onnxruntime": onnxruntime,
}


def rows_of(package: str, rows: int, scale: int) -> Iterator[Row]:
    """Rows of a seed of their own, whatever ran before."""
    import torch

    torch.manual_seed(rows)
    for name, reader, arrays, options, want in PACKAGES[package](rows, scale):
        yield Row(name, reader, arrays, options, mark(want))


if __name__ == "__main__":
    dump(row for package in PACKAGES for row in rows_of(package, 3, 1))
