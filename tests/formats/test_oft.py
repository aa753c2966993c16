"""OFT adapters of PEFT: our W' and ΔW against what PEFT's own merge makes, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_fx.adapter.as_lora import as_lora
from lora_fx.checkpoint.merge import merge
from lora_fx.checkpoint.merge_delta import delta_in
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.formats.io import load_adapter
from tests.cli.test_cli import run

peft = pytest.importorskip("peft")
KINDS: dict[str, dict[str, Any]] = {
    "series": {"oft_block_size": 4},
    "inverse": {"oft_block_size": 4, "use_cayley_neumann": False},
    "r": {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False},
    "shared": {"oft_block_size": 4, "block_share": True},
    "coft": {"oft_block_size": 4, "coft": True, "eps": 0.3},
    "coft shared": {"oft_block_size": 4, "coft": True, "eps": 0.3, "block_share": True},
    **{f"{n} terms": {"oft_block_size": 6, "num_cayley_neumann_terms": n} for n in (2, 3, 4, 7)},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(24, 6)
        self.point, self.wide = nn.Conv2d(12, 5, 1), nn.Conv2d(4, 5, 3)
        self.table = nn.Embedding(7, 12)


def made(
    folder: Path, names: list[str], dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """PEFT's adapter and its base on disk; the weights as PEFT merges them, in fp64."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    save_file(net.state_dict(), folder / "base.safetensors")
    config = peft.OFTConfig(target_modules=names, init_weights=False, **options)
    model = peft.get_peft_model(net, config)
    model.save_pretrained(folder / "oft")
    after: dict[str, Any] = model.double().merge_and_unload().state_dict()
    return {n: v.numpy() for n, v in after.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    want = made(tmp_path, ["up", "down", "point"], **KINDS[kind])
    base = load_file(tmp_path / "base.safetensors")
    report = merge(tmp_path / "base.safetensors", tmp_path / "oft", tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    changed = {r["key"] for r in report.details["tensors"]}
    assert changed == {"up.weight", "down.weight", "point.weight"}
    for name in changed:
        delta = want[name] - base[name].double().numpy()
        assert np.abs(delta).max() > 0.01 * np.abs(want[name]).max()
        assert np.abs(got[name].double().numpy() - want[name]).max() < 3e-7  # fp32 holds W' so


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_peft(kind: str, tmp_path: Path) -> None:
    want = made(tmp_path, ["up", "down", "point"], **KINDS[kind])
    base = open_checkpoint(tmp_path / "base.safetensors")
    loaded = load_adapter(tmp_path / "oft")
    adapter, rows = as_lora(loaded, rank=3, delta_of=partial(delta_in, base))
    before = load_file(tmp_path / "base.safetensors")
    assert len(rows) == 3
    for row in rows:
        delta = want[row.key] - before[row.key].double().numpy()
        delta, low = delta.reshape(len(delta), -1), adapter.lowrank[row.key]
        ours = delta_in(base, type(loaded)({row.key: loaded.entries[row.key]}))
        assert np.abs(ours - delta).max() < 1e-6 * np.abs(delta).max() + 1e-7
        error = np.linalg.norm(delta - low.matrix())
        assert row.error == pytest.approx(error, rel=1e-5)
        assert row.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5) and row.rank == 3


def test_narrow_weights(tmp_path: Path) -> None:
    made(tmp_path, ["down"], torch.bfloat16, oft_block_size=4)
    base = load_file(tmp_path / "base.safetensors")["down.weight"].double().numpy()
    merge(tmp_path / "base.safetensors", tmp_path / "oft", tmp_path / "out.safetensors")
    turn = load_adapter(tmp_path / "oft").entries["down.weight"].turn.astype(np.float64)
    want = base.copy()
    for i, block in enumerate(turn):
        want[:, 4 * i : 4 * i + 4] += base[:, 4 * i : 4 * i + 4] @ block.T
    got = load_file(tmp_path / "out.safetensors")["down.weight"].double().numpy()
    assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()
    assert np.abs(want - base).max() > 0.01


def edited(folder: Path, config: dict[str, Any], names: dict[str, torch.Tensor]) -> None:
    file, text = folder / "oft/adapter_model.safetensors", folder / "oft/adapter_config.json"
    save_file({**load_file(file), **names}, file)
    said = {**json.loads(text.read_text()), **config}
    text.write_text(json.dumps({k: v for k, v in said.items() if v != "gone"}))


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lead = "base_model.model.up"
    rows: list[tuple[list[str], dict[str, Any], dict[str, torch.Tensor], str]] = [
        (["wide"], {}, {}, "which PEFT merges differently from how it trains it"),
        (["table"], {}, {}, "expected only X.oft_R…"),
        (["up"], {"oft_block_size": "gone"}, {}, "expected the fields of PEFT 0.15 or later"),
        (["up"], {"num_cayley_neumann_terms": 10**9}, {}, "(1000000000, 6e-05)"),
        (["up"], {"eps": "small"}, {}, "num_cayley_neumann_terms and eps are (5, 'small')"),
        (["up"], {"target_modules": ["down"]}, {}, "that target_modules does not name"),
        (["up"], {}, {f"{lead}.oft_R.weight": torch.ones(3, 5)}, "n(n − 1)/2 numbers"),
        (["up"], {"block_share": True}, {}, "expected one block, because block_share is on"),
        (["up"], {}, {f"{lead}.oft_R.weight": torch.ones(5, 6)},
         "of 5 blocks of 4 along the in axis"),
        (["up"], {}, {f"{lead}.bias": torch.ones(20)}, "are not supported"),
    ]  # fmt: skip
    for i, (names, config, tensors, words) in enumerate(rows):
        folder = tmp_path / str(i)
        folder.mkdir()
        made(folder, names, oft_block_size=4)
        edited(folder, config, tensors)
        files = (str(folder / n) for n in ("base.safetensors", "oft", "out.safetensors"))
        base, adapter, out = files
        code, _, err = run(capsys, "merge", base, adapter, "-o", out)
        assert code == 2 and words in err and not Path(out).exists(), err


def test_what_only_the_base_can_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, ["up"], oft_block_size=4)
    base, adapter, out = (str(tmp_path / n) for n in ("base.safetensors", "oft", "out"))
    args = ["convert", adapter, "-o", out]
    for more, words in (
        (["--as", "lora", "--rank", "3"], "--base FOLDER"),
        ([], "which peft_type LORA cannot store"),
        (["-o", f"{out}.safetensors", "--format", "kohya"], "--as lora --rank R --base FOLDER"),
    ):
        code, _, err = run(capsys, *args, *more)
        assert code == 2 and words in err and not Path(out).exists(), err
    assert run(capsys, *args, "--as", "lora", "--rank", "3", "--base", base)[0] == 0
    code, _, err = run(
        capsys, "merge", base, adapter, f"{out}", "-o", str(tmp_path / "m.safetensors")
    )
    assert code == 2 and "rotates it (OFT)" in err
    code, _, err = run(
        capsys, "merge", base, f"{adapter}:0.5", "-o", str(tmp_path / "m.safetensors")
    )
    assert code == 2 and "OFT" in err
    edited(tmp_path, {"peft_version": "0.17.1"}, {})
    assert any("0.18" in n for n in load_adapter(adapter).metadata["notes"])


def test_a_merge_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, ["up"], oft_block_size=4)
    base, adapter = str(tmp_path / "base.safetensors"), str(tmp_path / "oft")
    merge(base, adapter, tmp_path / "m.safetensors")
    args = ["verify", str(tmp_path / "m.safetensors"), base, "--adapter", adapter, "--all"]
    code, out, err = run(capsys, *args)
    assert code == 0, out + err
    broken = load_file(tmp_path / "m.safetensors")
    broken["up.weight"][3, 5] += 0.01
    save_file(broken, tmp_path / "m.safetensors")
    assert run(capsys, *args)[0] == 1


def test_doctor_finds_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, ["up"], oft_block_size=4)
    args = ["doctor", str(tmp_path / "base.safetensors"), str(tmp_path / "oft")]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "errors" not in out
