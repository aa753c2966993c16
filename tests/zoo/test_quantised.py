"""Models of the zoo over codes: W̃ + s·BA in their own code, gradients, and ONNX Runtime."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.compare import FOLD_TOL
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.decoder import decoder
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.quantised_parameters import forms, numbers
from lora_fx.onnx import Session
from lora_fx.passes.proofs.parity import prove
from lora_fx.passes.verbs.open import capture
from lora_fx.passes.verbs.quantise import KINDS, quantised
from tests.onnx.decoders import MODELS as DECODERS
from tests.onnx.test_decoder import IDS, MASK, generated, greedy, with_delta
from tests.onnx.test_decoder import adapter as tuned
from tests.zoo.checks import EFFECT, FACTORS, effects, facts, seen
from tests.zoo.oracles import Subject, explicit
from tests.zoo.shared import zoo

MODELS = {
    "hf_bert": True,
    "hf_vit": True,
    "hf_whisper": True,
    "hf_llama/1": True,
    "hf_llama": True,
    "hf_mixtral": False,
    "hf_t5": True,
    "tv_resnet18": True,
    "two_inputs": True,
}
"""Model → whether a batch file exists: stacks of experts have no rows there."""
CASES = [
    pytest.param(n, k, marks=() if (n, k) == ("hf_llama/1", "int4") else pytest.mark.slow)
    for n in MODELS
    for k in KINDS
]
SINGLE = ("hf_mixtral",)
"""Their grouped products have no fp64 kernel."""


@lru_cache(maxsize=1)
def made(name: str, kind: str) -> tuple[Subject, Any]:
    """(the user's model with W̃ in it, insert's module with a random B that is seen)."""
    model, args, kwargs = zoo(name)
    model.requires_grad_(False)
    cap = quantised(capture(model, args, kwargs), kind)
    held = forms(cap.model)
    assert held and not forms(model)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for n in held:
            plain.get_parameter(n).copy_(numbers(cap.model, n, torch.float32))
    entry = facts(name)
    dead = "drop" if entry.idle else "error"
    module = lora_fx.insert(cap, rank=2, include=entry.include, dead=dead)
    for factor in FACTORS:
        updates = {}
        for key, u in module.updates.items():
            a, b = draw(key, u.layout, u.rank, 0, "probe")
            updates[key] = replace(u, a=a, b=b * np.float32(EFFECT * entry.gain * factor))
        module.load_adapter(Adapter(updates))
        if all(seen(e) for e in effects(module)):
            break
    return Subject(name, plain, args, kwargs, cap), module


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_insert_is_the_models_own_code_on_the_dequantised_weights(name: str, kind: str) -> None:
    subject, module = made(name, kind)
    adapted = {t.parameter.name for t in insertion_of(module).found.targets if t.parameter.format}
    assert adapted == set(forms(subject.cap.model))
    assert all(seen(e) for e in effects(module))
    double = name not in SINGLE
    rows = prove(explicit(subject, module, double=double), module, tol=FOLD_TOL, of="explicit")
    assert len({str(p.sizes) for p in rows}) >= 3 and all(p.ok for p in rows), rows


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_reach_every_factor(name: str, kind: str) -> None:
    _, module = made(name, kind)
    module = copy.deepcopy(module).train()
    torch.manual_seed(0)
    out = execution_of(module).run(execution_of(module).sample((2, 5)))
    outs = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.stack([(t * torch.randn_like(t)).sum() for t in outs]).sum().backward()
    lost = [
        n for n, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    ]  # fmt: skip
    assert not lost


@pytest.mark.parametrize("mode", ["merged", "switch", "batch"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_onnx_runtime_is_torch(name: str, kind: str, mode: str, tmp_path: Path) -> None:
    import onnx

    subject, module = made(name, kind)
    file = tmp_path / "m.onnx"
    updates = module.adapter().lowrank
    if mode == "batch":  # it serves updates of all uses of a shared tensor
        updates = {key: u for key, u in updates.items() if "@" not in key}
    given: dict[str, Any] = {"adapters": {"a": Adapter(updates)}, "mode": mode}
    if mode == "merged":  # the base alone: an update is not folded into codes
        given = {}

    def export() -> Any:
        return lora_fx.export(subject.cap, file, provider="cpu", within=True, **given)

    if mode == "batch" and not MODELS[name]:
        with pytest.raises(
            LoraFxError, match=r"experts.*, whose updates mode batch cannot choose row by row"
        ):
            export()
        assert not file.exists()
        return
    report = export()
    assert report.ok and report.parity
    ops = [n.op_type for n in onnx.load(file).graph.node if n.domain == "com.microsoft"]
    assert ("MatMulBnb4" if kind == "nf4" else "MatMulNBits") in ops


@pytest.mark.slow
def test_greedy_tokens_of_a_cached_llama_are_torchs(tmp_path: Path) -> None:
    model = DECODERS["llama"]()
    one = tuned(decoder(model), 1, 3)
    file = tmp_path / "m.onnx"
    lora_fx.export(
        decoder(model), file, adapters={"de": one}, mode="switch", cache=True, provider="cpu",
        quantise="int4",
    )  # fmt: skip
    cap = quantised(decoder(model), "int4")
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for n in forms(cap.model):
            plain.get_parameter(n).copy_(numbers(cap.model, n, torch.float32))
    session = Session(file, "cpu")
    session.load("de", file.with_name("de.onnx_adapter"))
    inputs = session.session.get_inputs()
    found = {}
    for name, adapter in ((None, None), ("de", one)):
        want = generated(with_delta(plain, adapter), IDS, MASK)
        ours = greedy(lambda f, n=name: session.run(f, n), inputs, IDS, MASK)
        np.testing.assert_array_equal(ours, want)
        found[name] = want
    assert not np.array_equal(found[None], found["de"])
    assert not np.array_equal(found["de"], generated(with_delta(model, one), IDS, MASK)), "codes"
