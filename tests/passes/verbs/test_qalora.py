"""QA-LoRA on a base of codes in torch: trained, folded, exported, all of it equal to unmerged."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.qalora import grouped
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.fx.codes import DEQUANTISE
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.quantised_parameters import forms
from lora_fx.onnx.session import open_session
from lora_fx.passes.fold import Fold
from lora_fx.passes.verbs.open import load_program
from lora_fx.passes.verbs.program import save_program

TOL = 1e-6
X = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(96, 160)
        self.down = nn.Linear(160, 24, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


def trained(variant: str = "qalora", steps: int = 5, **options: Any) -> Any:
    options = {"quantise": "int4", "rank": 3, "alpha": 3, **options}
    model = lora_fx.insert(Net().eval(), (X[:2],), variant=variant, **options)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=3e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        (model.train()(X) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def by_hand(adapter: Adapter, group: int) -> dict[str, Any]:
    """ΔW in fp64 of a [r, in/group] by PEFT's rule, with the alpha that was asked for."""
    result = {}
    for key, low in adapter.lowrank.items():
        width = low.a.shape[-1]
        assert all(np.array_equal(low.a[:, ::group], low.a[:, i::group]) for i in range(group))
        wide = low.b.astype(np.float64) @ low.a[:, ::group].astype(np.float64)
        result[key] = np.repeat(3 / 3 * width / group**2 * wide, group, 1)
    return result


@pytest.mark.parametrize("group", [32, 96])
def test_trained_folded_exported(group: int, tmp_path: Path) -> None:
    options = {} if group == 32 else {"include": "up"}
    model = trained("qalora" if group == 32 else f"qalora:{group}", **options)
    assert tuple(model.up.lora_A.weight.shape) == (3, 96 // group)
    adapter = model.adapter()
    with torch.no_grad():
        y, base = model(X).numpy(), lora_fx.insert(Net().eval(), (X[:2],), quantise="int4")(X)
    assert 0.05 < rel(base.detach().numpy(), y) < 5
    deltas = by_hand(adapter, group)
    for key, delta in deltas.items():
        got = adapter.deltas()[key]
        assert np.abs(got - delta).max() <= 1e-12 * np.abs(delta).max() and delta.any()
    # W̃ + ΔW in fp64, from the codes as they are in the tree
    w = {k: float_of(model, k) for k in ("up", "down")}
    for key, delta in deltas.items():
        w[key.removesuffix(".weight")] += torch.from_numpy(delta)
    hidden = torch.relu(X.double() @ w["up"].T + model.up.bias.double())
    assert rel(y, (hidden @ w["down"].T).detach().numpy()) < TOL
    folded = lora_fx.fold(model)
    assert rel(folded(X).detach().numpy(), y) < TOL
    assert torch.equal(folded.up.weight, model.up.weight)  # the codes themselves
    assert folded.up.weight_zero.dtype == torch.float32 and not hasattr(model.up, "weight_zero")
    assert rel(model(X).detach().numpy(), y) == 0
    assert forms(model)["up.weight"].parts == ("scale",), "the adapted module's own"
    # the pass alone, on a graph that has read its codes
    graph = execution_of(model).captured.fx_graph()
    graph.root = copy.deepcopy(graph.root)
    assert Fold(adapter.lowrank)(graph).modified
    read = [n.args[2] for n in graph.graph.find_nodes(op="call_function", target=DEQUANTISE)]
    assert [str(z) for z in read if z is not None] == [
        f"{k}_zero".replace(".", "_") for k in deltas
    ]
    out = tmp_path / "o.onnx"
    report = lora_fx.export(model, out, provider="cpu")
    assert all(p.rel < TOL for p in report.parity)
    assert any("quantised weights have zero points in floating point" in w for w in report.warnings)
    assert rel(open_session(out, "cpu").run({"x": X.numpy()})["output"], y) < TOL
    assert Counter(n.op_type for n in onnx.load(out).graph.node) == {
        "MatMulNBits": 2, "Relu": 1, "Add": 1}  # fmt: skip


def float_of(model: Any, name: str) -> torch.Tensor:
    """The codes of a linear layer as numbers, by hand: 4 bits, blocks of 32, 8 is 0."""
    codes = getattr(model, name).weight.detach()
    both = torch.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).double()
    wide = (both - 8) * getattr(model, name).weight_scale.double()[..., None]
    return wide.reshape(len(codes), -1)


def test_saved_and_trained_on(tmp_path: Path) -> None:
    """PEFT's files say it, and both they and .pt2 go on with an A of groups."""
    model = trained()
    save_adapter(model.adapter(), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    said = [config[n] for n in ("use_qalora", "qalora_group_size", "lora_alpha", "r")]
    assert said == [True, 32, 3, 3]
    save_program(model, tmp_path / "m.pt2")
    again = lora_fx.insert(Net().eval(), (X[:2],), adapter=load_adapter(tmp_path / "a"),
                           quantise="int4")  # fmt: skip
    loaded = load_program(tmp_path / "m.pt2")
    for other in (again, loaded):
        assert tuple(other.up.lora_A.weight.shape) == (3, 3)
        assert rel(other.eval()(X).detach().numpy(), model(X).detach().numpy()) < TOL
        assert variant_of(other.adapter().lowrank["up.weight"]).constant_over == 32


def test_attached() -> None:
    """A live module trains the same A of groups."""
    net = Net().eval()
    attached = lora_fx.attach(net, (X[:2],), rank=3, alpha=3, variant="qalora")
    assert tuple(net.up.lora_A.weight.shape) == (3, 3)
    with torch.no_grad():
        nn.init.normal_(net.up.lora_B.weight)
        nn.init.normal_(net.down.lora_B.weight)
    y = net(X).detach().numpy()
    adapter = attached.adapter()
    plain = Net().eval()
    with torch.no_grad():
        for key, delta in by_hand(adapter, 32).items():
            plain.get_parameter(key).add_(torch.from_numpy(delta).float())
    assert rel(plain(X).detach().numpy(), y) < 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "groups that hold no blocks": ({"variant": "qalora:16"}, "groups of 16 inputs are not whole"),
    "eight bits": ({"quantise": "int8"}, "no zero points that may be floats"),
    "levels": ({"quantise": "nf4"}, "no zero points that may be floats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    model = trained(steps=1, **options)
    assert any(words in n and "up.weight will not be folded" in n for n in model.report().notes)
    for verb in (lambda: lora_fx.fold(model), lambda: lora_fx.export(model, tmp_path / "o.onnx")):
        with pytest.raises(LoraFxError) as caught:
            verb()
        assert words in caught.value.message and "'up.weight'" in caught.value.message
        assert "--mode switch" in caught.value.hint
    assert not list(tmp_path.iterdir())
    assert lora_fx.export(model, tmp_path / "s.onnx", mode="switch", provider="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "qalora:36"}, "'up.weight': 96 inputs cannot be divided into groups of 36"),
        ({"variant": "qalora:0"}, "unknown variant 'qalora:0'"),
        ({"variant": "qalora:-2"}, "unknown variant 'qalora:-2'"),
        (
            {"variant": "qalora", "init": "pissa"},
            "init 'pissa' needs one column of A for each input",
        ),
        (
            {"variant": "qalora", "init": "gaussian"},
            "init 'gaussian' needs one column of A for each input",
        ),
    ],
    ids=str,
)
def test_refused_at_the_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraFxError) as caught:
        lora_fx.insert(Net().eval(), (X[:2],), rank=2, **options)
    assert words in caught.value.message and caught.value.hint


@pytest.mark.slow
def test_a_folder_of_gptq(tmp_path: Path) -> None:
    """What PEFT trains on GPTQ goes into an ONNX file; a GPTQ file has integers for zeros."""
    pytest.importorskip("transformers")
    from tests.fx.load.test_quantised_folders import IDS, Q, made

    plain = made(tmp_path / "m", "gptq")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, 1), (32, 3)))
    low = grouped(LowRank(a, b, 30.0), 32)
    save_adapter(Adapter({f"{Q}.weight": low}), tmp_path / "a")
    with pytest.raises(LoraFxError) as caught:
        lora_fx.merge(tmp_path / "m", [tmp_path / "a"], tmp_path / "o")
    assert caught.value.hint.startswith("lora-fx export folds QA-LoRA into the zero points without")
    assert "--dequantise" in caught.value.hint
    with torch.no_grad():
        before = plain(input_ids=IDS).logits.numpy()
        delta = np.repeat(30.0 / 3 * 32 / 32**2 * (b.astype(np.float64) @ a), 32, 1)
        plain.get_submodule(Q).weight.add_(torch.from_numpy(delta).float())
        want = plain(input_ids=IDS).logits.numpy()
    out = tmp_path / "o.onnx"
    lora_fx.export(str(tmp_path / "m"), out, adapters=tmp_path / "a", provider="cpu")
    session = open_session(out, "cpu")
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    names = [i.name for i in onnx.load(out).graph.input]
    got = session.run({n: given[n] for n in names})["logits"]
    assert rel(got, want) < TOL and 0.01 < rel(before, want) < 5
    assert Counter(n.op_type for n in onnx.load(out).graph.node)["MatMulNBits"] == 1
