"""Optimised exports: fused as much as the base's, equal at every size, each stage a transaction."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

import lora_fx
from lora_fx.compare import rel
from lora_fx.onnx.optimise import apply_stages
from lora_fx.onnx.rewrites.delta_before_bias import DeltaBeforeBias
from lora_fx.onnx.rewrites.gemm_to_matmul import GemmToMatMul
from lora_fx.onnx.rewrites.onnxscript_passes import FuseForRuntime
from lora_fx.onnx.session import open_session

FUSED = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding")
SIZES = ((2, 5), (3, 7), (1, 11))
IDS = torch.randint(0, 60, (2, 5), generator=torch.Generator().manual_seed(0))


def built(name: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    import transformers as tf

    torch.manual_seed(0)
    wide: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    text: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 64, **wide}
    if name == "bert":
        return tf.BertModel(tf.BertConfig(**text)).eval(), (IDS,)
    if name == "llama":
        config = tf.LlamaConfig(num_key_value_heads=2, use_cache=False, **text)
        return tf.LlamaForCausalLM(config).eval(), (IDS,)
    if name == "gpt2":
        own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        config = tf.GPT2Config(
            vocab_size=64, use_cache=False, bos_token_id=1, eos_token_id=2, **own
        )
        return tf.GPT2LMHeadModel(config).eval(), (IDS,)
    vit = tf.ViTModel(tf.ViTConfig(image_size=16, patch_size=8, **wide))
    return vit.eval(), (torch.randn(2, 3, 16, 16),)


def feeds_for(path: Path) -> list[dict[str, Any]]:
    (spec,) = open_session(path, "cpu").session.get_inputs()
    rng = np.random.default_rng(1)
    if "int" in spec.type:
        return [{spec.name: rng.integers(0, 60, s)} for s in SIZES]
    shape = [(n, 3, 16, 16) for n, _ in SIZES]
    return [{spec.name: rng.standard_normal(s).astype(np.float32)} for s in shape]


def ops(path: Path) -> Counter[str]:
    """Fused operators in the runtime's own optimised model."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/o.onnx"
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = Counter(n.op_type for n in onnx.load(f"{folder}/o.onnx").graph.node)
    return Counter(
        {k: n for k, n in found.items() if k in FUSED or k.startswith("Skip") or "Gelu" in k}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_optimised_is_equal_and_as_fused_with_an_adapter(name: str, tmp_path: Path) -> None:
    model, args = built(name)
    plain, fast, adapted = (tmp_path / f"{n}.onnx" for n in ("plain", "fast", "adapted"))
    lora_fx.export(model, plain, args, provider="cpu")
    report = lora_fx.export(model, fast, args, provider="cpu", optimise=True)
    stages = {s["name"]: s for s in report.details["stages"]}
    assert stages["runtime fusions"]["kept"] and all(s["kept"] for s in stages.values())
    assert ("gemm to matmul" in stages) == (name == "gpt2")
    assert report.details["nodes"] == report.details["stages"][-1]["nodes"]
    assert report.details["nodes"] < 0.8 * sum(1 for _ in ir.load(plain).graph.all_nodes())
    module = lora_fx.insert(model, args, rank=2)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.5)
    lora_fx.export(module, adapted, provider="cpu", optimise=True)
    fused, before = (
        Counter({k: n for k, n in ops(p).items() if not k.startswith("Skip")})
        for p in (fast, plain)
    )
    assert fused.total() > before.total() and fused == ops(fast), "slower than apart on the CPU"
    assert ops(adapted) == ops(fast)
    sessions = [open_session(p, "cpu") for p in (plain, fast, adapted)]
    with torch.no_grad():
        for feed in feeds_for(plain):
            base, quick, with_it = (s.run(feed) for s in sessions)
            want = module.eval()(torch.from_numpy(next(iter(feed.values()))))[0].numpy()
            first = next(iter(base))
            assert all(rel(quick[k], base[k]) < 1e-5 for k in base)
            assert rel(with_it[first], want) < 1e-5
            assert rel(with_it[first], base[first]) > 0.05


def test_fusions_that_break_a_graph_are_rolled_back(tmp_path: Path) -> None:
    """GPT-2's Gemms on flattened rows: onnxscript's attention fusion alone takes a Reshape away."""
    model, args = built("gpt2")
    lora_fx.export(model, tmp_path / "m.onnx", args, provider="cpu")
    before, feeds = ir.load(tmp_path / "m.onnx"), feeds_for(tmp_path / "m.onnx")
    fuse = {"runtime fusions": FuseForRuntime()}
    after, (row,) = apply_stages(before, feeds, fuse)
    assert after is before and not row.kept and "cannot load" in row.why and "rank" in row.why
    done, rows = apply_stages(before, feeds, {"gemm": GemmToMatMul(), **fuse})
    assert [r.kept for r in rows] == [True, True] and rows[1].nodes < row.nodes * 1.2
    assert not any(n.op_type == "Gemm" for n in done.graph)
    assert sum(n.op_type == "Gemm" for n in before.graph) == 8, "a clone was edited"
    assert not GemmToMatMul()(done).modified
    # onnx_ir's own manager runs them
    ir.passes.Sequential(GemmToMatMul(), RemoveUnusedNodesPass())(before)
    assert not any(n.op_type == "Gemm" for n in before.graph)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT
@pytest.mark.parametrize(
    "targets", [["query", "value"], pytest.param("all-linear", marks=pytest.mark.slow)]
)
def test_a_branch_after_the_bias_breaks_attention_and_one_before_does_not(
    tmp_path: Path, targets: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    model, args = built("bert")
    config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(model, config).eval()
    lora_fx.export(wrapped.base_model.model, tmp_path / "m.onnx", args, provider="cpu")
    before, feeds = ir.load(tmp_path / "m.onnx"), feeds_for(tmp_path / "m.onnx")
    fuse = {"runtime fusions": FuseForRuntime()}
    _, (row,) = apply_stages(before, feeds, fuse)
    assert not row.kept and row.why
    moved = before.clone()
    assert DeltaBeforeBias()(moved).modified and not DeltaBeforeBias()(moved).modified
    _, rows = apply_stages(before, feeds, {"delta": DeltaBeforeBias(), **fuse})
    assert [r.kept for r in rows] == [True, True]
    assert rows[0].error is not None and rows[0].error < 1e-6


def small(tmp_path: Path) -> tuple[ir.Model, list[dict[str, Any]]]:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[b, s, 4] x, float[4, 3] a) => (float[b, s, 3] y)
    <float[4, 3] a = {1,2,3,4,5,6,7,8,9,1,2,3}, float[4, 3] w = {3,1,4,1,5,9,2,6,5,3,5,8}>
    { unused = MatMul(x, a)
      p = MatMul(x, w)
      q = MatMul(x, a)
      y = Add(p, q) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "s.onnx")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((b, s, 4)).astype(np.float32)} for b, s in SIZES]
    return ir.load(tmp_path / "s.onnx"), feeds


def test_optional_inputs_do_not_vanish(tmp_path: Path) -> None:
    model, feeds = small(tmp_path)

    def lose(m: ir.Model) -> ir.passes.PassResult:
        from onnx_ir.passes.common import RemoveInitializersFromInputsPass

        return RemoveInitializersFromInputsPass()(m)

    after, (row,) = apply_stages(model, feeds, {"lose": lose})
    assert not row.kept and row.why == "it changes the inputs: a"
    assert [v.name for v in after.graph.inputs] == ["x", "a"]


def test_dead_nodes_go(tmp_path: Path) -> None:
    model, feeds = small(tmp_path)
    after, (row,) = apply_stages(model, feeds, {"dead": RemoveUnusedNodesPass()})
    assert row.kept and row.nodes == 3 and row.error == 0.0
    assert not any(o.name == "unused" for n in after.graph for o in n.outputs)
    assert apply_stages(after, feeds, {"dead": RemoveUnusedNodesPass()})[1] == []


def test_a_stage_that_raises_or_lies_is_rolled_back_alone(tmp_path: Path) -> None:
    model, feeds = small(tmp_path)

    def raises(m: ir.Model) -> ir.passes.PassResult:
        m.graph.remove(next(n for n in m.graph if n.outputs[0].name == "unused"))
        raise IndexError("list index")

    def lies(m: ir.Model) -> ir.passes.PassResult:
        w = m.graph.initializers["w"]
        w.const_value = ir.tensor(w.const_value.numpy() * np.float32(1.0001), name="w")
        return ir.passes.PassResult(m, True)

    def late(m: ir.Model) -> ir.passes.PassResult:
        """Right at the first size only."""
        node = next(n for n in m.graph if n.outputs[0].name == "p")
        to = ir.Value(name="to", const_value=ir.tensor(np.array([2, 5, 4]), name="to"))
        m.graph.initializers["to"] = to
        new = ir.node("Reshape", [node.inputs[0], to])
        new.outputs[0].name = "fixed"
        m.graph.insert_before(node, [new])
        node.replace_input_with(0, new.outputs[0])
        return ir.passes.PassResult(m, True)

    stages = {"raises": raises, "lies": lies, "late": late, "dead": RemoveUnusedNodesPass()}
    after, rows = apply_stages(model, feeds, stages)
    assert [(r.name, r.kept) for r in rows] == [
        ("raises", False), ("lies", False), ("late", False), ("dead", True),
    ]  # fmt: skip
    assert "list index" in rows[0].why and "the gate is 2.0e-06" in rows[1].why
    assert rows[1].error is not None and 1e-5 < rows[1].error < 1e-3
    assert rows[2].why and "rolled back" in str(rows[2]) and "rolled back" not in str(rows[3])
    assert set(after.graph.initializers) == {"a", "w"} and rows[3].nodes == 3
