"""How PEFT, vLLM and SGLang read experts, written from their sources in numpy: a test's oracle.

A reader takes the tensors and the config of an adapter's file and gives ΔW [out, in] of gate, up
and down of every expert, or raises Refused. Nothing of the product is used here.

* PEFT 0.18.1 to 0.21.2, `lora.ParamWrapper`: the two golden files of every release check `peft`.
* vLLM 0.33.0, `LoRAModel.from_local_checkpoint` and `from_lora_tensors`, `LoRAModelManager.
  _create_merged_loras_inplace`, `_stack_moe_lora_weights`, `PackedLoRALayerWeights.pack_moe`,
  `FusedMoEWithLoRA.set_lora`.
* SGLang 0.5.23, `LoRAAdapter._normalize_weights`, `LoRAMemoryPool.load_lora_weight_to_buffer`,
  `FusedMoEWithLoRA._slice_moe_b_2d`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray[Any, Any]]
Deltas = dict[tuple[str, int, str], np.ndarray[Any, Any]]
"""(layer's prefix, expert, gate, up or down) → ΔW [out, in]."""


class Refused(Exception):
    """The program would stop with an error."""


@dataclass(frozen=True)
class Model:
    """A tiny mixture: how transformers 5 and the servers have its experts."""

    kind: str
    experts: int = 3
    hidden: int = 6
    inner: int = 5
    transposed: bool = False
    marked: bool = False
    interleaved: bool = False
    whole: bool = False
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    holder: str = "mlp"
    layers: tuple[str, ...] = ("model.layers.0", "model.layers.2")


MODELS = {
    "mixtral": Model("mixtral", names=("w1", "w3", "w2"), holder="block_sparse_moe"),
    "qwen3_moe": Model("qwen3_moe"),
    "deepseek_v3": Model("deepseek_v3", experts=4, inner=3),
    "gpt_oss": Model("gpt_oss", transposed=True, marked=True, interleaved=True, whole=True),
    "qwen3_vl_moe": Model("qwen3_vl_moe", whole=True),
    "llama4_text": Model("llama4_text", transposed=True),
}


def stored(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """Names without PEFT's prefix; fp64."""
    return {k.removeprefix("base_model.model."): v.astype(np.float64) for k, v in tensors.items()}


def scale(config: Any, name: str, rank: int, *, patterns: bool = True) -> float:
    """Alpha over rank of a module or parameter, by PEFT's rule for patterns."""
    alpha, r = config["lora_alpha"], config["r"]
    for table, low in (("rank_pattern", False), ("alpha_pattern", True)):
        for key, value in (config.get(table) or {}).items() if patterns else ():
            if re.match(rf"(.*\.)?({key})$", name):
                alpha, r = (value, r) if low else (alpha, value)
                break
    assert not patterns or r == rank, (name, r, rank)
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def halves(fused: np.ndarray[Any, Any], interleaved: bool) -> tuple[Any, Any]:
    """Gate and up of rows of the fused projection."""
    half = len(fused) // 2
    return (fused[::2], fused[1::2]) if interleaved else (fused[:half], fused[half:])


def stack(
    t: Tensors, name: str, rank: int, experts: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[E, r, w] and [E, v, r] of PEFT's two axes, the expert fastest in B."""
    a, b = t[f"{name}.lora_A.weight"], t[f"{name}.lora_B.weight"]
    if len(a) != rank * experts or b.shape[1] != rank * experts:
        raise Refused(f"{name}: size mismatch")
    return a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).transpose(2, 0, 1)


def peft(tensors: Tensors, config: Any, model: Model, release: str = "0.21.2") -> Deltas:
    """ParamWrapper.get_delta_weight of one release, and the model's own use of the stacks."""
    t, result = stored(tensors), Deltas()
    for layer in model.layers:
        module = f"{layer}.mlp.experts"
        for lead, leaf, out, in_ in (
            (".base_layer", "gate_up_proj", 2 * model.inner, model.hidden),
            ("", "down_proj", model.hidden, model.inner),
        ):
            if f"{module}{lead}.lora_A.weight" not in t:
                continue
            name = f"{module}.{leaf}"
            sizes = (in_, out) if model.transposed else (out, in_)
            first = {"0.18.1": True, "0.19.0": not model.marked}.get(release, model.marked)
            wide, tall = sizes if first else sizes[::-1]  # over what A and B go
            rank = len(t[f"{module}{lead}.lora_A.weight"]) // model.experts
            a, b = stack(t, f"{module}{lead}", rank, model.experts)
            if a.shape[-1] != wide or b.shape[1] != tall:
                raise Refused(f"{name}: size mismatch")
            way = "eor,eri->eio" if first else "eor,eri->eoi"
            whole = scale(config, name, rank) * np.einsum(way, b, a)
            whole = whole.swapaxes(1, 2) if model.transposed else whole
            for n, w in enumerate(whole):
                if leaf == "down_proj":
                    result[layer, n, "down"] = w
                else:
                    result[layer, n, "gate"], result[layer, n, "up"] = halves(w, model.interleaved)
    return result


def vllm(tensors: Tensors, config: Any, model: Model) -> Deltas:
    """Without flags: no mixed formats, no shared adapters."""
    if config.get("use_dora") or config.get("lora_bias"):
        raise Refused("unsupported feature")
    t = stored(tensors)
    if model.kind == "mixtral":
        other = {".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}
        for old, new in other.items():
            t = {k.replace(old, new): v for k, v in t.items()}
    single = {
        f"experts.{n}.{leaf}" for n in range(model.experts) for leaf in model.names
    } if not model.whole else set()  # fmt: skip
    for name in t:
        module, _, half = name.rpartition(".lora_")
        if half not in ("A.weight", "B.weight"):
            raise Refused(f"{name} is unsupported LoRA weight")
        if ".base_layer" in name or ".experts" not in module:
            continue
        if module[module.find(".experts") + 1 :] not in single | {"experts"}:
            raise Refused(f"unexpected module {module}")
    result = Deltas()
    roles = dict(zip(("gate", "up", "down"), model.names, strict=True))
    for layer in model.layers:
        module = f"{layer}.{model.holder}.experts"
        if f"{module}.lora_A.weight" in t or f"{module}.base_layer.lora_A.weight" in t:
            if not model.whole:
                raise Refused("fused 3D MoE weights for a 2D wrapper")
            result |= _vllm_stacks(t, config, model, layer)
            continue
        parts = [f"{module}.{n}.{leaf}" for n in range(model.experts) for leaf in model.names]
        have = [p for p in parts if f"{p}.lora_A.weight" in t]
        if have and have != parts:
            raise Refused("an expert lacks a projection")
        for n in range(model.experts) if have else ():
            for role, leaf in roles.items():
                name = f"{module}.{n}.{leaf}"
                a, b = t[f"{name}.lora_A.weight"], t[f"{name}.lora_B.weight"]
                result[layer, n, role] = scale(config, name, len(a)) * (b @ a)
    return result


def _vllm_stacks(t: Tensors, config: Any, model: Model, layer: str) -> Deltas:
    """FusedMoE3DWithLoRA: buffers of the model's sizes get the tensors, from their corner on."""
    module, result = f"{layer}.{model.holder}.experts", Deltas()
    sizes = {
        ".base_layer": ("gate_up_proj", model.hidden, 2 * model.inner),
        "": ("down_proj", model.inner, model.hidden),
    }
    for lead, (leaf, in_, out) in sizes.items():
        if f"{module}{lead}.lora_A.weight" not in t:
            raise Refused("gate_up_proj or down_proj is missing")
        rank = len(t[f"{module}{lead}.lora_A.weight"]) // model.experts
        a, b = stack(t, f"{module}{lead}", rank, model.experts)
        if a.shape[-1] > in_ or b.shape[1] > out:
            raise Refused("the size of a must match the size of b")
        left, right = np.zeros((model.experts, rank, in_)), np.zeros((model.experts, out, rank))
        left[..., : a.shape[-1]], right[:, : b.shape[1]] = a, b
        factor = scale(config, f"{module}.{leaf}", rank)
        for n in range(model.experts):
            w = factor * (right[n] @ left[n])
            if leaf == "down_proj":
                result[layer, n, "down"] = w
            else:
                result[layer, n, "gate"], result[layer, n, "up"] = halves(w, model.interleaved)
    return result


def sglang(tensors: Tensors, config: Any, model: Model) -> Deltas:
    """Without --experts-shared-outer-loras; the pool's rank is the adapter's."""
    if config.get("use_dora"):
        raise Refused("DoRA")
    wanted = {str(m).rpartition(".")[2] for m in config["target_modules"]}
    joined = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    wanted = {joined.get(m, m) for m in wanted}
    t = stored(tensors)
    for old, new in ((".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")):
        t = {k.replace(old, new): v for k, v in t.items()}
    for name in [n for n in t if "gate_proj" in n]:
        up = name.replace("gate_proj", "up_proj")
        pair = (t.pop(name), t.pop(up, None))
        pair = (pair[0], np.zeros_like(pair[0]) if pair[1] is None else pair[1])
        t[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(pair, axis=-2)
    for name in [n for n in tensors if ".gate_up_proj." in n and "lora_A" in n]:
        name = name.removeprefix("base_model.model.")
        t[name] = np.concatenate([t[name]] * 2, axis=-2)
    buffers: dict[tuple[str, int, str, str], np.ndarray[Any, Any]] = {}
    for name, value in t.items():
        kind = next((m for m in sorted(wanted, key=len, reverse=True) if m in name), None)
        if kind is None:
            raise Refused(f"Cannot find target module name for {name}")
        layer = re.match(r".*?layers\.\d+", name)
        single, half = re.search(r"experts\.(\d+)\.", name), "A" if "lora_A" in name else "B"
        if layer and single:
            buffers[layer[0], int(single[1]), kind, half] = value
        elif layer and "experts" in name and value.ndim == 3:
            buffers |= {(layer[0], n, kind, half): v for n, v in enumerate(value)}
    result, factor, rank = Deltas(), config["lora_alpha"] / config["r"], config["r"]
    for (layer, n, kind, half), a in buffers.items():
        if half == "B":
            continue
        b = buffers[layer, n, kind, "B"]
        count = 2 if kind == "gate_up_proj" else 1
        if len(a) != count * rank or b.shape[1] != rank:
            raise Refused("LoRA buffer shape does not match weight shape")
        if kind == "down_proj":
            result[layer, n, "down"] = factor * (b @ a)
            continue
        inner = len(b) // 2
        rows = np.concatenate([b[:inner], b[inner:]])
        if model.interleaved:
            rows = np.stack([b[:inner], b[inner:]], axis=1).reshape(-1, rank)
        gate, up = halves(rows, model.interleaved)  # of the base's own order
        result[layer, n, "gate"] = factor * (gate @ a[:rank])
        result[layer, n, "up"] = factor * (up @ a[rank:])
    return result
