"""Files of torch.export.save as models, in every verb and command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.cli import main
from lora_fx.errors import LoraFxError
from lora_fx.passes.verbs.open import load_program
from lora_fx.targets.found import Found
from lora_fx.text import Json
from tests.fx.pt2.models import exported, net, stirred
from tests.zoo.shared import captured

WHOLE = ("hf_bert", "hf_gpt2", "hf_llama", "tv_resnet18")
SLOW = (pytest.param(n, marks=pytest.mark.slow) for n in WHOLE)
FOREIGN = ("hf_gpt2/1", "tv_resnet18/1", "transformer_encoder", *SLOW)


def told(found: Found) -> Json:
    """Its JSON, without the lines of source that a foreign file does not hold."""
    result = found.to_json()
    return {**result, "ranges": [{**row, "line": ""} for row in result["ranges"]]}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_has_the_targets_of_its_source(name: str, tmp_path: Path) -> None:
    cap, args, kwargs = captured(name)
    path = exported(cap, args, kwargs, tmp_path / "x.pt2")
    want = told(lora_fx.find(cap))
    assert told(lora_fx.find(path)) == want
    assert told(lora_fx.find(lora_fx.capture(path))) == want
    assert len(want["targets"]) > (3 if "/" in name else 5)


def test_a_foreign_file_goes_through_every_verb(tmp_path: Path) -> None:
    cap, args, kwargs = captured("hf_gpt2/1")
    model = cap.model
    path = exported(cap, args, kwargs, tmp_path / "x.pt2")
    module = stirred(lora_fx.insert(path, rank=2, include="c_attn,c_fc,lm_head"))
    source = lora_fx.insert(cap, rank=2, include="c_attn,c_fc,lm_head")
    source.load_adapter(module.adapter())
    want = source.eval()(**kwargs)["logits"]
    assert torch.equal(module.eval()(**kwargs)["logits"], want)
    assert not torch.equal(model(**kwargs)["logits"], want)
    folded = lora_fx.fold(path, adapter=module.adapter())
    assert torch.allclose(folded(**kwargs)["logits"], want, atol=1e-5)
    onnx = tmp_path / "x.onnx"
    assert lora_fx.export(path, onnx, adapters=module.adapter(), provider="cpu")
    assert lora_fx.verify(onnx, source, provider="cpu")
    assert lora_fx.verify(path, cap)


def test_a_foreign_file_that_refuses_size_one_does_so_here_too(tmp_path: Path) -> None:
    """The assert left the graph, and its condition was among those that no run had decided."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._check(x.shape[0] != 1)
            y: torch.Tensor = self.fc(x)
            return y

    free = {0: torch.export.Dim.AUTO}
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(
            Several(), (torch.randn(3, 6),), dynamic_shapes=(free,),
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
    torch.export.save(program, str(tmp_path / "x.pt2"))
    module = lora_fx.insert(str(tmp_path / "x.pt2"), rank=2)
    assert module(torch.randn(5, 6)).shape == (5, 4)
    with pytest.raises(LoraFxError, match="is valid only for x\\[0\\] != 1"):
        module(torch.randn(1, 6))


def test_an_eval_graph_trains_only_where_modes_agree(tmp_path: Path) -> None:
    model, args = net()
    path = exported(model, (args[0],), {}, tmp_path / "x.pt2")
    module = lora_fx.insert(path, rank=2)
    assert module(args[0])["scores"].shape == (4, 3)
    module.train()
    with pytest.raises(LoraFxError, match=r"holds only the eval graph.*dropout of drop") as e:
        module(args[0])
    assert "train it after model.eval()" in e.value.hint
    assert "norm" not in e.value.message, "norms are frozen, as in the eval graph"
    loss = module.eval()(args[0])["scores"].sum()
    loss.backward()
    model.drop = nn.Identity()
    path = exported(model, (args[0],), {}, tmp_path / "y.pt2")
    assert lora_fx.insert(path, rank=2).train()(args[0])["scores"].requires_grad
    with pytest.raises(LoraFxError, match="batch_norm of norm"):
        lora_fx.insert(path, rank=2, norm_stats="update").train()(args[0])
    with pytest.raises(LoraFxError, match="batch_norm of norm"):
        _ = lora_fx.capture(path).train


def test_a_train_graph(tmp_path: Path) -> None:
    model, args = net()
    path = exported(model.train(), (args[0],), {}, tmp_path / "x.pt2")
    assert {t["key"] for t in lora_fx.find(path).to_json()["targets"]} == {
        "fc.weight",
        "out.weight",
    }
    module = lora_fx.insert(path, rank=2).train()
    module(args[0])["scores"].sum().backward()
    with pytest.raises(LoraFxError, match=r"holds only the train graph.*dropout of drop"):
        module.eval()(args[0])
    with pytest.raises(LoraFxError, match="holds only the train graph"):
        lora_fx.export(path, tmp_path / "x.onnx", provider="cpu")
    assert not (tmp_path / "x.onnx").exists()


def test_two_programs_of_torch(tmp_path: Path) -> None:
    from torch.export.pt2_archive._package import package_pt2

    model, args = net()
    both = {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        both[mode] = torch.export.export(model, (args[0],))
    package_pt2(str(tmp_path / "x.pt2"), exported_programs=both)
    module = lora_fx.insert(tmp_path / "x.pt2", rank=2)
    assert torch.equal(module(args[0])["scores"], model.eval()(args[0])["scores"])
    assert not torch.equal(module.train()(args[0])["scores"], module.train()(args[0])["scores"])


def test_what_a_file_does_not_hold_is_said(tmp_path: Path) -> None:
    model, args = net()
    path = exported(model, (args[0],), {}, tmp_path / "x.pt2")
    module = lora_fx.insert(path, rank=2)
    with pytest.raises(LoraFxError, match=r"holds the program for.*'extra'"):
        module(args[0], extra=torch.ones(1))
    with pytest.raises(LoraFxError, match=r"holds the program for .*not for"):
        module({"a": args[0]["a"]})
    with pytest.raises(LoraFxError, match=r"was exported in torch.float32"):
        module.to(torch.bfloat16)(args[0])
    with pytest.raises(LoraFxError, match=r"fixes parts.a dimension 1"):
        lora_fx.capture(path, dynamic={"parts.a": {1: "n"}})
    with pytest.raises(ValueError, match="dimension"):
        lora_fx.insert(path, rank=2)({"a": torch.ones(4, 6), "b": [torch.ones(3, 6)]})
    assert lora_fx.capture(path).inputs.to_json()[0]["shape"] == ["batch", 6]
    assert lora_fx.capture(path, static=["parts.a"]).inputs.to_json()[0]["shape"] == [4, 6]
    assert load_program(path)(args[0])["scores"].shape == (4, 3)


# --- the command line ----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--json"])
    shown = capsys.readouterr()
    return int(stop.value.code or 0), json.loads(shown.out), shown.err


def test_every_command_takes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    exported(model, (torch.randn(4, 6),), {}, Path("base.pt2"))
    labels = np.arange(40) % 3
    np.savez("data.npz", input=np.random.default_rng(0).normal(size=(40, 6)).astype("f4"), y=labels)
    code, out, _ = run(capsys, "targets", "base.pt2")
    assert code == 0 and [t["key"] for t in out["targets"]] == ["0.weight", "2.weight"]
    code, out, _ = run(capsys, "insert", "base.pt2", "-o", "new.pt2", "--rank", "2")
    assert code == 0 and out["outputs"] == ["new.pt2"]
    code, _, errors = run(capsys, "insert", "new.pt2", "-o", "other.pt2")
    assert code == 2 and "new.pt2 holds an adapter already" in errors
    train = ("data.npz", "--label", "y", "--steps", "5", "--validation", "0")
    code, out, _ = run(capsys, "train", "new.pt2", *train, "-o", "tuned")
    assert code == 0 and len(out["losses"]) == 5
    code, _, errors = run(capsys, "train", "new.pt2", *train, "-o", "more", "--rank", "4")
    assert code == 2 and "--rank has no effect" in errors
    assert run(capsys, "train", "base.pt2", *train, "-o", "tuned2", "--rank", "2")[0] == 0
    for source, adapter in (("new.pt2", "tuned"), ("base.pt2", "tuned")):
        onnx = f"{source}.onnx"
        assert run(capsys, "export", source, adapter, "-o", onnx, "--provider", "cpu")[0] == 0
        assert run(capsys, "verify", onnx, "base.pt2", "--adapter", adapter)[0] == 0
    assert run(capsys, "verify", "new.pt2", "base.pt2")[0] == 0, "an untrained adapter"
    assert run(capsys, "verify", "new.pt2.onnx", "base.pt2")[0] == 1
    assert run(capsys, "verify", "base.pt2", "tuned")[0] == 0
    code, _, errors = run(capsys, "targets", "base.pt2", "--weights", "x.safetensors")
    assert code == 2 and "holds its weights" in errors
