"""Which weights of a checkpoint are quantised, how, and each of them as one `Quantised`.

The tensors beside a weight say that it is quantised, and `quantization_config` of config.json in
which layout. Shapes and bits come from headers, and where a format keeps them in a small tensor
(bitsandbytes' quant_state, compressed-tensors' weight_shape) from that one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from lora_fx.dtypes import FLOATING, Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.quantised.base import (
    ALL,
    FLOAT8,
    Parts,
    QuantisedWeight,
    Written,
    bits_of,
    by_stored_scales,
    checked,
    evenly,
    grouped,
    packed_range,
    rescaling,
)
from lora_fx.files.quantised.floats import (
    EXPONENTS,
    fp8,
    fp8_blocks,
    largest_to_top,
    mxfp4,
    mxfp4_stack,
    nvfp4,
)
from lora_fx.files.read import json_object
from lora_fx.files.safetensors import TensorInfo
from lora_fx.ir.quantised import FP4, NF4, Quantised, blocks_in, packed, unpacked, words_of
from lora_fx.text import JsonView, is_number, is_whole

SIBLINGS = {
    "qweight": "GPTQ or AWQ, 4-bit codes",
    "weight.absmax": "bitsandbytes, 4-bit codes",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    "weight_packed": "compressed-tensors, packed codes",
    "SCB": "bitsandbytes int8",
    "W_q": "HQQ codes",
    "codes": "AQLM codes",
    "weight.SCB": "bitsandbytes int8",
    "weight._data": "optimum-quanto codes",
    "weight_scale": "compressed-tensors or FP8 with a scale",
    "weight_scale_inv": "FP8 in blocks",
}
"""What lies beside a quantised weight NAME.weight as NAME.…, and what wrote it, the first found."""

ACTIVATIONS = ("input_scale", "input_global_scale", "input_zero_point")
"""What quantises the values that a weight is multiplied with."""
PARTS = (
    *SIBLINGS, *ACTIVATIONS, "weight", "qzeros", "scales", "g_idx", "weight_shape",
    "weight_zero_point", "weight_g_idx", "weight_global_scale", "weight_scale_2", "weight_format",
    "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
)  # fmt: skip
"""The last names of all tensors that a quantised weight can have."""

_BY_LENGTH = sorted(SIBLINGS, key=len, reverse=True)


Held = Mapping[str, TensorInfo | Array]
"""Tensors by name: headers of a file, or arrays of a live layer."""


def scheme_of(name: str, tensors: Held) -> str:
    """How the weight of this name is quantised, by the tensors beside it; empty where it is not."""
    module = name.removesuffix(".weight")
    found = next((w for s, w in SIBLINGS.items() if f"{module}.{s}" in tensors), "")
    return found or ("MXFP4, blocks of 4-bit codes" if f"{name}_blocks" in tensors else "")


def quantised_weights(tensors: Held, config: JsonView) -> dict[str, QuantisedWeight]:
    """Every quantised weight of a checkpoint by its name as the model has it, in file order.

    Args:
        tensors: All tensors: headers, or arrays of a live layer.
        config: Its config.json.

    Raises:
        LoraFxError: Headers of a known format that do not fit each other. A format that is not
            read is no error here: its weights have 0 bits, and the error comes from their `read`.
    """
    names: dict[str, None] = {}
    for tensor in tensors:
        part = next((s for s in _BY_LENGTH if tensor.endswith(f".{s}")), "")
        if part:
            names[f"{tensor.removesuffix(part)}weight"] = None
        elif tensor.endswith("_blocks"):
            names[tensor.removesuffix("_blocks")] = None
    return {name: _weight(name, tensors, config) for name in names}


def parts_beside(weights: Iterable[str], tensors: Held) -> dict[str, str]:
    """What a checkpoint holds of quantised weights → the weight that it belongs to."""
    found: dict[str, str] = {}
    for name in weights:
        module = name.removesuffix(".weight")
        every = (f"{module}.{part}" for part in PARTS)
        found |= {n: name for n in (*every, f"{name}_blocks", f"{name}_scales") if n in tensors}
    return found


def _weight(name: str, tensors: Held, config: JsonView) -> QuantisedWeight:
    if f"{name}_blocks" in tensors:
        module, _, last = name.rpartition(".")
        return mxfp4_stack(Parts(module, tensors), last)
    parts = Parts(name.removesuffix(".weight"), tensors)
    told = config.get("quantization_config")
    said: JsonView = told if isinstance(told, dict) else {}
    method = said.get("quant_method")
    if any(parts.has(f"weight.quant_state.bitsandbytes__{kind}") for kind in ("nf4", "fp4")):
        return four_bits(parts)
    if parts.has("SCB"):
        return int8(parts)
    if parts.has("qweight") and (layout := _layout(said)):
        return awq(parts) if layout == "awq" else gptq(parts, 2 if layout == "gptq_v2" else 1)
    why = "pre_quant_scale beside it" if parts.has("pre_quant_scale") else altered(said)
    scaled = "weight_scale" if parts.has("weight_scale") else "weight_scale_inv"
    if not why and parts.has(scaled):
        narrow = parts.has("weight") and parts.dtype("weight") in FLOAT8
        if parts.has("weight_global_scale") or parts.has("weight_scale_2"):
            return nvfp4(parts)
        if narrow and scaled == "weight_scale_inv":
            return fp8_blocks(parts, said)
        if parts.has("weight_packed") and parts.dtype(scaled) in EXPONENTS:
            return mxfp4(parts)
        if narrow and (method != "compressed-tensors" or parts.dtype(scaled) in EXPONENTS):
            return fp8(parts)
        if method == "compressed-tensors":
            return compressed(parts)
    scheme = scheme_of(name, tensors)
    why = why or "config.json does not say in which of its layouts"

    def read(rows: slice = ALL) -> Quantised:
        raise LoraFxError(
            f"weight {one_line(repr(name), 160)} is quantised ({scheme}), and not read: {why}",
            "use the checkpoint that it was quantised from",
        )

    return QuantisedWeight(scheme, 0, (), read)


def _layout(said: JsonView) -> str:
    """gptq, gptq_v2 or awq, by a quantization_config; empty for others."""
    method, packing = said.get("quant_method"), str(said.get("packing_format", ""))
    if method == "gptq":
        layout = said.get("checkpoint_format") or "gptq"
        return layout if layout in ("gptq", "gptq_v2") else ""
    if method == "awq":
        return "awq" if str(said.get("version") or "gemm").lower() == "gemm" else ""
    # AutoRound names the layout that it wrote; its auto_gptq is version 1
    return {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing, "")


# What quantisers of other libraries store: AutoGPTQ and AutoAWQ, bitsandbytes, compressed-tensors.
#
# Each part of this file begins with its layout.


# Weights in the layouts of GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it, and of AWQ.
#
#     qweight   int32 [in · bits/32, out], the first input in the lowest bits
#     qzeros    int32 [groups, out · bits/32], the first output in the lowest bits
#     scales    float [groups, out]
#     g_idx     int32 [in], the group of each input
#
# W[o, i] = scales[g, o] · (code − z[g, o]), g = g_idx[i]. Codes of 3 bits run on from word to word.
#
# Version 1 (`checkpoint_format` gptq or absent) stores z − 1, version 2 (gptq_v2) z. GPTQModel
# takes the 1 off whole words, so that a z of 0 borrows from its neighbour, and puts it back so
# (`convert_gptq_v1_to_v2_format_module`, gptqmodel/utils/model.py, 7.7); for 3 bits it does that
# field by field. That is done here, too: for the z from 1 up that others can write, it is the same.
#
# Where inputs of a group are not neighbours (`desc_act`), they are put together.


BITS = (2, 3, 4, 8)


def gptq(parts: Parts, version: int = 1) -> QuantisedWeight:
    """A weight [out, in].

    Args:
        parts: Of the module.
        version: 1 where qzeros holds z − 1, 2 where it holds z.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    words, out = parts.shape("qweight", ("int32",), None, None)
    groups, _ = parts.shape("scales", FLOATING, None, out)
    _, zeros = parts.shape("qzeros", ("int32",), groups, None)
    bits = bits_of(out, zeros)
    if bits not in BITS:
        raise parts.wrong("qzeros", f"has {zeros} words for {out} outputs", "2, 3, 4 or 8 bits")
    length = parts.shape("g_idx", ("int32", "int64"), None)[0] if parts.has("g_idx") else 0
    length = length or words * 32 // bits
    parts.shape("qweight", ("int32",), -(-length * bits // 32), out)

    def read(rows: slice = ALL) -> Quantised:
        codes = unpacked(parts.read("qweight", rows, 1), bits, 0)[:length].T
        stored = np.ascontiguousarray(parts.read("qzeros", packed_range(rows, 32, bits), 1))
        if version == 1 and bits != 3:
            stored = stored.view(np.uint32) + np.uint32(0xFFFFFFFF // (2**bits - 1))
        zero = unpacked(stored, bits)[:, : len(codes)].T
        zero = (zero + 1) & 7 if version == 1 and bits == 3 else zero
        scale, given = parts.read("scales", rows, 1).T, _groups(parts, length, groups)
        return checked(f"{parts.module}.weight", grouped(codes, scale, zero, given))

    name, count = f"{parts.module}.qweight", -(-length * bits // 32)
    recode = by_stored_scales(name, bits, lambda codes: words_of(codes, bits)[:, :count].T, axis=1)
    return QuantisedWeight("GPTQ", bits, (out, length), read, 32, recode, (name,))


def _groups(parts: Parts, length: int, groups: int) -> Array:
    """The group of each input."""
    if not parts.has("g_idx"):
        return np.arange(length) // evenly(parts, "scales", length, groups)
    order = parts.read("g_idx")
    if order.min() < 0 or order.max() >= groups:
        found = f"names groups {order.min()} to {order.max()}"
        raise parts.wrong("g_idx", found, f"0 to {groups - 1}")
    return order


# AWQ: the layout of its GEMM kernels, version "gemm" of AutoAWQ and llm-awq.
#
#     qweight   int32 [in, out/8], outputs 0 2 4 6 1 3 5 7 of eight from the lowest bits up
#     qzeros    int32 [groups, out/8] in the same order
#     scales    float [groups, out]
#
# W[o, i] = (code − z[g, o]) · scales[g, o], g = i // (in/groups); 4 bits
# (`pack_awq` and `dequantize_gemm`, awq/utils/packing_utils.py, autoawq 0.2.9 and GPTQModel 7.7).


PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where outputs 0 to 7 lie in a word, in codes from the lowest bits."""


def awq(parts: Parts) -> QuantisedWeight:
    """A weight [out, in].

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    length, words = parts.shape("qweight", ("int32",), None, None)
    groups, out = parts.shape("scales", FLOATING, None, words * 8)
    parts.shape("qzeros", ("int32",), groups, words)
    block = evenly(parts, "scales", length, groups)

    def read(rows: slice = ALL) -> Quantised:
        eights = packed_range(rows, 8)
        codes, zero = (_outputs(parts.read(n, eights, 1)) for n in ("qweight", "qzeros"))
        q = Quantised(codes, parts.read("scales", rows, 1).T, zero, (1, block))
        return checked(f"{parts.module}.weight", q)

    name = f"{parts.module}.qweight"

    def pack(codes: Array) -> Array:
        eights = codes.reshape(-1, 8, length).astype(np.uint32)
        words = [eights[:, i] << 4 * place for i, place in enumerate(PLACES)]
        return np.asarray(np.bitwise_or.reduce(words)).T.view(np.int32)

    recode = by_stored_scales(name, 4, pack, axis=1, each=8)
    return QuantisedWeight("AWQ", 4, (out, length), read, 8, recode, (name,))


def _outputs(words: Array) -> Array:
    """Codes [out, rows] of words [rows, out/8]."""
    each = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8)
    each = each.reshape(words.shape[1], len(words), 4)
    codes = np.empty((len(each), 8, len(words)), np.uint8)
    for i, place in enumerate(PLACES):
        byte = each[..., place // 2]
        codes[:, i] = byte >> 4 if place % 2 else byte & 15
    return codes.reshape(-1, len(words))


# Weights that bitsandbytes has quantised: NF4 and FP4, and LLM.int8.
#
# Four bits (`QuantState.as_dict`, bitsandbytes/functional.py, 0.50). The blocks, of `blocksize`
# elements, go on through the flattened weight, and their scales are the blocks' largest values:
#
#     weight             uint8 [n/2, 1], the first code in the high half; in the bytes of another
#                        dtype where it was saved with `bnb_4bit_quant_storage`
#     weight.absmax      float32 [blocks]; or uint8, codes of nested_quant_map in blocks of
#                        nested_blocksize with scales nested_absmax, and nested_offset is added
#     weight.quant_state.bitsandbytes__nf4 (or fp4)    uint8, a JSON text: quant_type, blocksize,
#                        dtype, shape, nested_blocksize, nested_offset
#     weight.quant_map   the 16 levels, which the kernels know by heart and do not read
#
# int8 (`int8_vectorwise_dequant`, bitsandbytes/_ops.py): weight int8 [out, in], SCB float32 [out],
# W = codes · SCB · (1/127), rounded to float32 twice. weight_format other than 0 is an order for
# GPUs, which no bitsandbytes writes any more.


STATE = "weight.quant_state.bitsandbytes__"
STORAGE = ("uint8", "int8", *FLOATING)
INT8_UNIT = 7.874015718698502e-3
"""1/127 in the digits of bitsandbytes."""


def four_bits(parts: Parts) -> QuantisedWeight:
    """NF4 or FP4.

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    kind = "nf4" if parts.has(f"{STATE}nf4") else "fp4"
    name = STATE + kind
    parts.shape(name, ("uint8",), None)
    state = json_object(parts.read(name).tobytes(), f"tensor '{parts.module}.{name}'")
    shape, block = state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != kind or not is_whole(block) or block < 1:
        found = f"says {state.get('quant_type')!r} in blocks of {block!r}"
        raise parts.wrong(name, found, f"{kind!r} in blocks of 1 or more")
    if not isinstance(shape, list) or not shape or not all(is_whole(n) and n > 0 for n in shape):
        raise parts.wrong(name, f"says the shape {shape!r}", "sizes from 1 up")
    size = math.prod(shape)
    parts.shape("weight", STORAGE, any_axes=True)
    parts.shape("weight.absmax", (*FLOATING, "uint8"), -(-size // block))

    def read(rows: slice = ALL) -> Quantised:
        low, high = (0, size) if rows == ALL else (rows.start * shape[-1], rows.stop * shape[-1])
        codes = parts.bytes("weight", low // 2, -(-high // 2) if high < size else sys.maxsize)
        if len(codes) != -(-high // 2) - low // 2:
            found = f"has {low // 2 + len(codes)} bytes"
            raise parts.wrong("weight", found, f"{-(-size // 2)} for {shape}")
        blocks = slice(low // block, -(-high // block))
        nested = parts.dtype("weight.absmax") == "uint8"
        scale = _nested(parts, blocks, state) if nested else parts.read("weight.absmax", blocks)
        sizes = shape if rows == ALL else (rows.stop - rows.start, shape[-1])
        whole = unpacked(codes, 4, high=True)[: high - low].reshape(sizes)
        q = Quantised(whole, scale, None, (block,), NF4 if kind == "nf4" else FP4)
        return checked(f"{parts.module}.weight", q)

    def recode(
        q: Quantised, rows: slice, weight: Array, delta: Array
    ) -> tuple[Quantised, list[Written]]:
        new = q.nearest(weight, 4)
        data = packed(new.codes.reshape(-1), 4, high=True)
        return new, [Written(f"{parts.module}.weight", data, rows.start * shape[-1] // 2, None)]

    step = math.lcm(block, 2) // math.gcd(math.lcm(block, 2), shape[-1])
    names = (f"{parts.module}.weight",)
    return QuantisedWeight(f"bitsandbytes {kind}", 4, tuple(shape), read, step, recode, names)


def _nested(parts: Parts, blocks: slice, state: JsonView) -> Array:
    """Scales of blocks that are stored quantised themselves."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not is_whole(block) or block < 1 or not is_number(offset):
        found = f"has nested scales in blocks of {block!r} with the offset {offset!r}"
        raise parts.wrong("weight.absmax", found, "blocks of 1 or more and a number")
    (count,) = parts.shape("weight.absmax", ("uint8",), None)
    parts.shape("weight.nested_absmax", FLOATING, -(-count // block))
    parts.shape("weight.nested_quant_map", FLOATING, 256)
    start = blocks.start // block * block
    codes = parts.read("weight.absmax", slice(start, blocks.stop))
    scale = parts.read("weight.nested_absmax", slice(start // block, -(-blocks.stop // block)))
    inner = Quantised(codes, scale, None, (block,), parts.read("weight.nested_quant_map"))
    name = f"{parts.module}.weight.nested_absmax"
    every = checked(name, inner).dequantise() + np.float32(offset)
    return np.asarray(every[blocks.start - start :])


def int8(parts: Parts) -> QuantisedWeight:
    """LLM.int8.

    Raises:
        LoraFxError: A part is malformed, or the codes lie in an order for GPUs.
    """
    rows, columns = parts.shape("weight", ("int8",), None, None)
    parts.shape("SCB", FLOATING, rows)

    def read(rows: slice = ALL) -> Quantised:
        order = parts.read("weight_format").reshape(-1) if parts.has("weight_format") else None
        if order is not None and order.any():
            raise parts.wrong("weight_format", f"is {order}, an order for GPUs", "0, row by row")
        block = (1, columns)
        codes, scale = parts.read("weight", rows), parts.read("SCB", rows)
        q = Quantised(codes, scale, None, block, None, INT8_UNIT)
        return checked(f"{parts.module}.weight", q)

    return QuantisedWeight("bitsandbytes int8", 8, (rows, columns), read)


# Weights that compressed-tensors (llm-compressor, vLLM) has quantised.
#
#     pack-quantized    weight_packed int32 [out, in · bits/32], code + 2^(bits−1), the first input
#                       in the lowest bits, codes of 3, 5, 6, 7 bits running on from word to word;
#                       weight_shape int64 [2]; weight_zero_point int32 packed along the outputs, in
#                       the same way, or int8 of one number
#     int-quantized     weight int8 [out, in]; weight_zero_point int8
#     float-quantized   weight float8_e4m3fn [out, in]
#     all               weight_scale [1], [out, 1] or [out, groups]; weight_g_idx int32 [in], the
#                       group of each input, or -1 everywhere (versions before 0.20)
#
# W = (code − zero point) · scale, in the dtype of the scale: compressors/pack_quantized and
# naive_quantized, quantization/lifecycle/forward.py, 0.20.


INTEGERS = ("int8", "int32", "int64")


def altered(config: JsonView) -> str:
    """Why the weights of a quantization_config are not those of the model; empty where they are."""
    names = [n for n in ("transform_config", "sparsity_config") if config.get(n)]
    return f"config.json has a {names[0]}: its weights are not the model's" if names else ""


def compressed(parts: Parts) -> QuantisedWeight:
    """A weight [out, in].

    Raises:
        LoraFxError: A part is missing, malformed, or does not fit the others.
    """
    if parts.has("weight_global_scale"):
        raise parts.wrong("weight_global_scale", "is there", "one level of scales: no NVFP4")
    if not parts.has("weight_packed"):
        shape = parts.shape("weight", ("int8", "float8_e4m3fn"), None, None)
        kind = "int8" if parts.dtype("weight") == "int8" else "fp8"
        read = partial(_affine, parts, shape, 8, lambda rows: parts.read("weight", rows))
        form, name = f"compressed-tensors {kind}", f"{parts.module}.weight"
        single = math.prod(parts.shape("weight_scale", FLOATING, any_axes=True)) == 1
        if single or kind == "int8":
            recode = by_stored_scales(name, 8, lambda codes: codes)
            return QuantisedWeight(form, 8, shape, read, 32, recode, (name,))
        recode = rescaling(parts, ("weight", "weight_scale"), 1, largest_to_top("float8_e4m3fn"))
        names = name, f"{parts.module}.weight_scale"
        return QuantisedWeight(form, 8, shape, read, 32, recode, names, "new")
    rows, words = parts.shape("weight_packed", ("int32",), None, None)
    parts.shape("weight_shape", INTEGERS, 2)
    out, length = map(int, parts.read("weight_shape"))
    bits = bits_of(length, words) if length > 0 else 0
    if out != rows or not bits:
        found = f"is {[rows, words]} for a weight of {[out, length]}"
        raise parts.wrong("weight_packed", found, "whole rows of codes of 2 to 8 bits")

    def codes(rows: slice) -> Array:
        return _signed(unpacked(parts.read("weight_packed", rows), bits)[:, :length], bits)

    read = partial(_affine, parts, (out, length), bits, codes)
    name, middle = f"{parts.module}.weight_packed", 2 ** (bits - 1)

    def pack(codes: Array) -> Array:
        return words_of(codes.astype(np.int16) + middle, bits)[:, :words]

    recode = by_stored_scales(name, bits, pack)
    form = "compressed-tensors packed"
    return QuantisedWeight(form, bits, (out, length), read, 32, recode, (name,))


def _signed(codes: Array, bits: int) -> Array:
    return np.asarray(codes.astype(np.int16) - 2 ** (bits - 1), np.int8)


def _affine(
    parts: Parts,
    whole: tuple[int, ...],
    bits: int,
    codes_of: Callable[[slice], Array],
    rows: slice = ALL,
) -> Quantised:
    """Codes of rows with the scales and zero points beside them."""
    (out, length), shape = whole, parts.shape("weight_scale", FLOATING, any_axes=True)
    codes = codes_of(rows)
    single = math.prod(shape) == 1
    some = ALL if single else rows
    if single:
        block: tuple[int, ...] = codes.shape
    else:
        _, groups = parts.shape("weight_scale", FLOATING, out, None)
        block = (1, evenly(parts, "weight_scale", length, groups))
    blocks = blocks_in((out, length), (out, length) if single else block)
    scale, zero = parts.read("weight_scale", some), None
    if parts.has("weight_zero_point"):
        if parts.dtype("weight_zero_point") == "int32":
            parts.shape("weight_zero_point", INTEGERS, -(-blocks[0] * bits // 32), blocks[1])
            zero = unpacked(parts.read("weight_zero_point", packed_range(some, 32, bits)), bits, 0)
            zero = _signed(zero[: 1 if single else len(codes)], bits)
        else:
            zero = parts.read("weight_zero_point", some)
    q = checked(f"{parts.module}.weight", Quantised(codes, scale, zero, block))
    order = parts.read("weight_g_idx") if parts.has("weight_g_idx") else np.full(1, -1)
    if (order == -1).all():  # written, and not used
        return q
    parts.shape("weight_g_idx", INTEGERS, length)
    if order.min() < 0 or order.max() >= blocks[1] or single:
        found = f"names groups {order.min()} to {order.max()}"
        raise parts.wrong("weight_g_idx", found, f"0 to {blocks[1] - 1}")
    return grouped(codes, q.scale, q.zero, order)
