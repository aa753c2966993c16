"""Optimised exports of many models: none breaks, and an adapter costs no fusion.

`python -m tests.onnx.test_survive [NAME...]` prints a line for every model and adapter.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.compare import rel
from lora_fx.fx.module.execution import execution_of
from lora_fx.onnx.session import open_session
from lora_fx.passes.proofs.proof_inputs import arrays_of
from tests.zoo import checks

TOL = 1e-5
SIZES = ((2, 5), (3, 7), (1, 11))
FEW = {  # q and v, or what comes nearest in a model that has none
    "timm_mixer": "*.fc1",
    "timm_convnext": "*.fc1",
    "timm_efficientnet_b0": "*.conv_pw",
    "timm_resnet18": "*.conv1",
}
NAMES = [
    "hf_bert", "hf_gpt2", "hf_llama", "hf_whisper", "hf_t5", "hf_vit", "timm_vit", "timm_swinv2",
    *FEW,
]  # fmt: skip
FAST = "hf_bert/1"
ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
NONE = "timm_resnet18"  # has nothing to fuse


def fused(path: Path) -> Counter[str]:
    """Fused operators in the model that ONNX Runtime makes of a file."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = f"{folder}/o.onnx"
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(f"{folder}/o.onnx").graph.node
    return Counter(n.op_type for n in nodes if _is_fused(n.op_type))


def _is_fused(op: str) -> bool:
    norm = op.endswith("Normalization") and ("Skip" in op or "Simplified" in op)
    return norm or op.endswith("Gelu") or op in (*ATTENTION, "RotaryEmbedding")


def module(name: str, which: str) -> Any:
    """An inserted module with a random adapter that the outputs show."""
    entry = checks.facts(name)
    include = FEW.get(name, "q,v") if which == "few" else entry.include
    made = lora_fx.insert(checks.built(name).cap, rank=2, include=include)
    updates: dict[str, LowRank] = {}
    for key, low in made.updates.items():
        a, b = draw(key, low.layout, low.rank, 0, "probe")
        size = np.float32(checks.EFFECT * entry.gain)
        updates[key] = replace(low, a=a, b=b * size)
    made.load_adapter(Adapter(updates))
    return made.eval()


def survive(name: str, folder: Path) -> dict[str, tuple[Counter[str], float, list[str]]]:
    """Base, few and all → (fused operators, largest difference to torch, stages rolled back)."""
    result = {}
    for which in ("base", "few", "all"):
        own = module(name, "all" if which == "base" else which)
        given: Any = checks.built(name).cap if which == "base" else own
        path = folder / f"{which}.onnx"
        report = lora_fx.export(given, path, provider="cpu", optimise=True)
        session, worst = open_session(path, "cpu"), 0.0
        for size in SIZES:
            named = execution_of(own).sample(size)
            if which == "base":
                with own.base():
                    wanted = execution_of(own).flat(named)
            else:
                wanted = execution_of(own).flat(named)
            got = session.run(arrays_of(named))
            worst = max(worst, *(rel(got[k], v) for k, v in wanted.items()))
        stages = report.details["stages"]
        back = [f"{s['name']}: {s['why']}" for s in stages if not s["kept"]]
        result[which] = (fused(path), worst, back)
    return result


def kinds(found: Counter[str]) -> Counter[str]:
    """Counts with all forms of attention as one: packed weights are one form of it."""
    others = {k: n for k, n in found.items() if k not in ATTENTION}
    return Counter({"attention": sum(found[a] for a in ATTENTION), **others})


@pytest.mark.parametrize("name", [FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES)])
def test_adapted_models_survive_as_fused_as_their_bases(name: str, tmp_path: Path) -> None:
    found = survive(name, tmp_path)
    base = kinds(found["base"][0])
    assert (base.total() > 0) == (name != NONE)
    for which, (operators, error, back) in found.items():
        assert error <= TOL, (which, error)
        assert not back, (which, back)
        assert kinds(operators) >= base, (which, operators, base)


if __name__ == "__main__":
    for n in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as f:
            try:
                rows = survive(n, Path(f))
            except Exception as e:
                print(n, type(e).__name__, e, flush=True)
                continue
        for w, (operators, error, back) in rows.items():
            print(f"{n} {w}: {error:.1e} {dict(operators)} {back}", flush=True)
