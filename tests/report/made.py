"""Results to make pages of: large, hostile, and one that has everything at once."""

from __future__ import annotations

import math
import random
from typing import Any

PARTS = (
    ("self_attn.q_proj", "q", 4096, 4096),
    ("self_attn.k_proj", "k", 1024, 4096),
    ("self_attn.v_proj", "v", 1024, 4096),
    ("self_attn.o_proj", "o", 4096, 4096),
    ("mlp.gate_proj", "gate", 14336, 4096),
    ("mlp.up_proj", "up", 14336, 4096),
    ("mlp.down_proj", "down", 4096, 14336),
)
HOSTILE = (
    "<script>alert(1)</script>.weight",
    '"><img src=x onerror=alert(1)>.weight',
    "layers.0.' onmouseover='alert(1).weight",
    "</script><script>alert(1)</script>.q.weight",
    "<!--<script>.0.q.weight",
    "layers.1.\u202egnp.exe.weight",
    "layers.1.שלום.weight",
    "layers.2.a\tb\nc\x00d.weight",
    "layers.2.\ud800.weight",
    "layers.²." + "x" * 300 + ".weight",
    "&lt;b&gt;.weight",
)


def target(key: str, role: str, out: int, in_: int, rank: int) -> dict[str, Any]:
    return {
        "key": key, "aliases": [], "op": "linear", "uses": ["linear"], "shape": [out, in_],
        "in": in_, "out": out, "batch": [], "dtype": "bfloat16", "sites": 1,
        "flops": 200 * out * in_, "role": role, "default": True, "why_not": "", "parts": [],
        "rank": rank, "alpha": 2.0 * rank,
    }  # fmt: skip


def spectrum(key: str, rank: int, most: int, rng: random.Random) -> dict[str, Any]:
    sigma = sorted((rng.expovariate(0.1) for _ in range(rank)), reverse=True)
    norm = float(f"{math.hypot(*sigma):.5g}")
    return {
        "key": key,
        "kind": "lora",
        "norm": norm,
        "sigma": [float(f"{s:.3g}") for s in sigma[:most]],
    }


def trained(layers: int, *, most: int = 10, steps: int = 2000) -> dict[str, Any]:
    """A training of 7 · layers targets, with all that a real one has."""
    rng = random.Random(0)
    targets, spectra = [], []
    for i in range(layers):
        for name, role, out, in_ in PARTS:
            key, rank = f"model.layers.{i}.{name}.weight", rng.choice((4, 8, 16, 32))
            targets.append(target(key, role, out, in_, rank))
            spectra.append(spectrum(key, rank, most, rng))
    losses = [round(2 + 3 * math.exp(-i / 300) + rng.gauss(0, 0.1), 6) for i in range(steps)]
    marks = range(max(1, steps // 10), steps + 1, max(1, steps // 10))
    held = {str(i): round(2.1 + 3 * math.exp(-i / 300) + i / 9000, 6) for i in marks}
    best = min(held, key=lambda k: held[k])
    head = {"key": "lm_head.weight", "op": "linear", "reason": "an output head", "flops": 10**11}
    return {
        "command": "train", "version": "0.1.0", "ok": True, "inputs": [], "outputs": ["adapter"],
        "warnings": ["a warning that is said"], "targets": targets, "also_train": [],
        "trained": sum(t["rank"] * (t["in"] + t["out"]) for t in targets), "frozen": 8_030_261_248,
        "adapted_share": 0.934512, "refusals": [head],
        "unreached": [{"key": "pos", "shape": [8, 32], "reason": "no weight matmul uses it"}],
        "pinned": [{"input": "x", "dim": 1, "size": 8, "op": "reshape"}],
        "flops": {"reached": sum(t["flops"] for t in targets), "refused": 10**11, "data": 10**9},
        "losses": losses, "validation": held, "before": 5.05, "best_step": int(best),
        "stopped": None, "verdict": f"validation loss rose 11 % after step {best}",
        "page": {
            "argv": ["train", "./llama", "d.jsonl", "-o", "adapter"],
            "versions": {"lora-fx": "0.1.0", "python": "3.13"},
            "files": [{"of": "output", "path": "a/b", "bytes": 336 * 10**6, "sha256": "cd" * 32}],
            "unhashed": [], "adapters": [{"path": "adapter", "weight": 1.0, "updates": spectra}],
        },
    }  # fmt: skip


def merged(layers: int) -> dict[str, Any]:
    """A merge into 7 · layers tensors, numbers in all their digits as a merge gives them."""
    rng = random.Random(1)
    tensors, spectra = [], []
    for i in range(layers):
        for name, _, out, in_ in PARTS:
            key = f"model.layers.{i}.{name}.weight"
            tensors.append({
                "key": key, "shape": [out, in_], "dtype": "bfloat16",
                "updates": ["lora, rank 16, scale 2"], "bytes": 2 * out * in_,
                "ratio": rng.random() / 30, "lost": rng.random() / 2, "gain": 1 - rng.random() / 9,
                "int8": None,
            })  # fmt: skip
            more = {"rank": 16, "alpha": 32.0, "parameters": 16 * (out + in_)}
            spectra.append(spectrum(key, 16, 10, rng) | more)
    return {
        "command": "merge", "version": "0.1.0", "ok": True, "inputs": [], "outputs": ["merged"],
        "warnings": [], "tensors": tensors, "touched_bytes": 1, "disk_bytes": 2,
        "base_verified": True,
        "page": {"adapters": [{"path": "a", "weight": 1.0, "updates": spectra}]},
    }  # fmt: skip


def everything() -> dict[str, Any]:
    """A refused export with each kind of section: what a page can show, it shows here."""
    result = trained(2, steps=50)
    parity = {"sizes": {"x": [2, 5]}, "max_abs": 1.07e-6, "rel": 3.8e-7, "tol": 1e-6}
    ok = {**parity, "output": "logits", "of": "fold", "ok": True}
    bad = {**ok, "of": "onnxruntime", "rel": 3e-3, "ok": False}
    stage = {"name": "fuse", "kept": True, "why": "", "nodes": 120, "bytes": 10**6}
    why = {"kept": False, "why": "not faster", "seconds": None, "ratio": None, "error": None}
    rows = merged(2)["tensors"]
    done = {"adapter": "de", "out": "m/de", "ok": True, "warnings": []}
    return {
        **result, "ok": False, "error": "outputs differ", "hint": "nothing was written",
        "parity": [ok, bad, {**bad, "rel": None, "max_abs": None}],
        "stages": [{**stage, "seconds": 0.0123, "ratio": 0.81, "error": 1e-7}, {**stage, **why}],
        "merges": [done, {**done, "ok": False, "error": "no such file", "hint": ""}],
        "tensors": rows, "untouched": ["a.weight"], "removed": ["b.weight"],
    }  # fmt: skip


def hostile() -> dict[str, Any]:
    """Names that would be markup, code, or text that turns round what follows."""
    rng = random.Random(2)
    result = trained(1, steps=50)
    result["targets"] = [target(k, "q", 8, 4, 2) for k in HOSTILE]
    updates = [spectrum(k, 2, 12, rng) for k in HOSTILE]
    name = HOSTILE[1]
    result |= {
        "warnings": list(HOSTILE), "verdict": HOSTILE[0], "outputs": list(HOSTILE),
        "refusals": [{"key": k, "op": k, "reason": k, "flops": 1} for k in HOSTILE],
        "parity": [{
            "sizes": {name: [1]}, "max_abs": 0.0, "rel": 0.0, "tol": 1e-6, "output": name,
            "of": name, "ok": True,
        }],
    }  # fmt: skip
    result["page"] |= {
        "argv": list(HOSTILE), "versions": {name: name},
        "files": [{"of": "input", "path": k, "bytes": 1, "sha256": "00"} for k in HOSTILE],
        "unhashed": list(HOSTILE), "adapters": [{"path": name, "weight": 1.0, "updates": updates}],
    }  # fmt: skip
    return result
