"""convert --as lora: ΔW by PEFT, and the error that is told is the error that there is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_fx.adapter.as_lora import as_lora
from lora_fx.checkpoint.merge_delta import delta_in
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.formats.io import load_adapter, save_adapter
from tests.cli.test_cli import run

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


def made(folder: Path, method: str) -> dict[str, np.ndarray[Any, Any]]:
    """PEFT's adapter and its base on disk; what PEFT's merge adds to each weight, in fp64."""
    torch.manual_seed(0)
    net = Net().double()
    save_file({k: v.float() for k, v in net.state_dict().items()}, folder / "base.safetensors")
    net.load_state_dict({k: v.float().double() for k, v in net.state_dict().items()})
    before = {k: v.detach().clone() for k, v in net.state_dict().items()}
    config: Any = {
        "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["up", "down"]),
        "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=["up", "down"]),
        "dora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], use_dora=True),
    }[method]
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                scale = 1.1 if "magnitude" in name else None
                p.mul_(scale) if scale else p.normal_(0, 0.4)
                p.copy_(p.float().double())
    model.float().save_pretrained(folder / method)
    after = model.double().merge_and_unload().state_dict()
    names = ("up.weight", "down.weight")
    return {n: (after[n] - before[n]).numpy() for n in names}


@pytest.mark.parametrize("method", ["loha", "lokr", "dora"])
@pytest.mark.parametrize("goal", [{"rank": 4}, {"energy": 0.9}, {"energy": 1.0}, {"rank": 99}])
def test_the_error_is_the_one_that_is_told(method: str, goal: Any, tmp_path: Path) -> None:
    want = made(tmp_path, method)
    delta_of = partial(delta_in, open_checkpoint(tmp_path / "base.safetensors"))
    loaded = load_adapter(tmp_path / method)
    adapter, rows = as_lora(loaded, delta_of=delta_of if method == "dora" else None, **goal)
    save_adapter(adapter, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config.get("use_dora")
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "plain")  # PEFT reads it
    for row in rows:
        delta = want[row.key]
        layer = again.base_model.model.get_submodule(row.key.removesuffix(".weight"))
        found = layer.get_delta_weight("default").detach().double().numpy()
        best = np.linalg.svd(delta, compute_uv=False)
        optimum = float(np.sqrt(np.sum(best[row.rank :] ** 2)))
        error = float(np.linalg.norm(delta - found))
        size = float(np.linalg.norm(delta))
        assert row.error == pytest.approx(error, rel=1e-5, abs=1e-5 * size)
        assert error == pytest.approx(optimum, rel=1e-4, abs=1e-5 * size)
        assert row.norm == pytest.approx(size, rel=1e-5)
        if "energy" in goal:
            assert 1 - (optimum / size) ** 2 >= goal["energy"] - 1e-6
            less = np.sum(best[: row.rank - 1] ** 2) / size**2
            assert less < goal["energy"]
        else:
            assert row.rank == min(goal["rank"], *delta.shape)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, "dora")
    args = ["convert", str(tmp_path / "dora"), "-o", str(tmp_path / "out"), "--as", "lora"]
    code, _, err = run(capsys, *args, "--rank", "4")
    assert code == 2 and "depends on the base" in err and "--base" in err
    more = ["--base", str(tmp_path / "base.safetensors")]
    code, out, _ = run(capsys, *args, *more, "--rank", "4", "--json")
    told = json.loads(out)
    assert code == 0 and [r["rank"] for r in told["approximated"]] == [4, 4]
    for wrong, words in (
        ([], "expected one of rank and energy"),
        (["--rank", "2", "--energy", "0.5"], "both rank and energy are given"),
        (["--energy", "2"], "energy 2.0 is not in (0, 1]"),
        (["--rank", "0"], "rank is 0; expected 1 or more"),
    ):
        code, _, err = run(capsys, *args, *more, *wrong, "--force")
        assert code == 2 and words in err, err
    plain = ["convert", str(tmp_path / "out"), "-o", str(tmp_path / "k.safetensors")]
    code, _, err = run(capsys, *plain, "--format", "kohya", "--rank", "2")
    assert code == 2 and "need --as lora" in err


def test_a_stack_is_no_one_matrix(tmp_path: Path) -> None:
    from lora_fx.adapter.adapter import Adapter
    from lora_fx.adapter.lowrank import LowRank

    rng = np.random.default_rng(0)
    save_file({"w": torch.randn(2, 6, 4)}, tmp_path / "stack.safetensors")
    a, b = rng.standard_normal((2, 2, 4)), rng.standard_normal((2, 6, 2))
    low = LowRank(a.astype("f4"), b.astype("f4"), 2.0, mutated="pissa")
    delta_of = partial(delta_in, open_checkpoint(tmp_path / "stack.safetensors"))
    with pytest.raises(LoraFxError, match="a stack of matrices"):
        as_lora(Adapter({"w": low}), rank=2, delta_of=delta_of)


def test_what_has_no_matrix(tmp_path: Path) -> None:
    from lora_fx.adapter.adapter import Adapter
    from lora_fx.adapter.updates import Dense, ReplacedRows

    vector = Adapter({"a.bias": Dense(np.ones(3, np.float32))})
    rows = Adapter({"t.weight": ReplacedRows((1,), np.ones((1, 4), np.float32))})
    for adapter, words in ((vector, "expected a matrix"), (rows, "has no ΔW")):
        with pytest.raises(LoraFxError, match=words):
            as_lora(adapter, rank=2)


class Turned(nn.Module):
    """A convolution, and a square weight that is stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 4)
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(2) @ self.w


def test_an_update_keeps_its_place(tmp_path: Path) -> None:
    """Merged, the plain adapter of all ranks gives the weights that the DoRA gives."""
    import lora_fx

    torch.manual_seed(0)
    net = Turned()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    x = torch.randn(2, 3, 9)
    dora = lora_fx.insert(net, (x,), include="*", rank=2, variant="dora")
    for p in dora.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    adapter = dora.adapter()
    delta_of = partial(delta_in, open_checkpoint(tmp_path / "base.safetensors"))
    plain, _ = as_lora(adapter, rank=99, delta_of=delta_of)
    for key, low in adapter.lowrank.items():
        assert plain.lowrank[key].layout == low.layout
    (note,) = save_adapter(plain, tmp_path / "plain")  # of w alone: PEFT has the convolution
    assert "'w'" in note
    want, found = tmp_path / "want.safetensors", tmp_path / "found.safetensors"
    lora_fx.merge(tmp_path / "base.safetensors", adapter, want)
    lora_fx.merge(tmp_path / "base.safetensors", tmp_path / "plain", found)
    assert lora_fx.verify(found, want, tol=1e-5)
    assert not lora_fx.verify(want, tmp_path / "base.safetensors", tol=0.05)
