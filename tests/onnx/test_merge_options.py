"""Options of a merge into .onnx: the plan alone, a delta beside the base's data, mixes, a run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import draw
from lora_fx.cli import main
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError, NoEffectError
from lora_fx.onnx import save as saving
from lora_fx.onnx.session import open_session
from lora_fx.passes import fold
from lora_fx.passes.verbs import merge_onnx
from tests.onnx.test_switch import ADAPTERS, Net, captured, ids

X = {"ids": ids()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    lora_fx.export(captured(), folder / "base.onnx", provider="cpu", external_over=0)
    return folder


@pytest.fixture
def base(exported: Path, tmp_path: Path) -> Path:
    """Its weights lie in a data file."""
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "base.onnx.data").exists()
    return tmp_path / "base.onnx"


def some(*keys: str) -> Adapter:
    return Adapter({k: u for k, u in ADAPTERS["de"].entries.items() if k in keys})


def wanted(changes: dict[str, Any]) -> Any:
    net = Net().eval().double()
    with torch.no_grad():
        for key, delta in changes.items():
            dict(net.named_parameters())[key].add_(torch.tensor(delta))
        return net(torch.tensor(ids()))["y"].numpy()


def test_a_delta_writes_what_changes_and_shares_the_rest(base: Path, tmp_path: Path) -> None:
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    adapter = some("fc.weight", "head.weight")
    out = tmp_path / "delta.onnx"
    left = tmp_path / ".delta.onnx.lora_fx_0123abcd.onnx"  # by a run that was killed
    left.write_bytes(b"")
    lora_fx.merge(base, adapter, out, delta=True)
    stored = {t.name: t for t in onnx.load(out, load_external_data=False).graph.initializer}
    where = {
        n: next((e.value for e in t.external_data if e.key == "location"), "")
        for n, t in stored.items()
    }
    changed = {"fc.weight", "head.weight"}
    assert {n for n, w in where.items() if w == "delta.onnx.data"} == changed
    assert {n for n, w in where.items() if w == "base.onnx.data"} >= {"embed.weight", "w"}
    size = (20 * 32 + 18 * 17) * 4
    assert (tmp_path / "delta.onnx.data").stat().st_size == size
    assert all((tmp_path / n).read_bytes() == b for n, b in before.items())
    assert set(os.listdir(tmp_path)) == {*before, "delta.onnx", "delta.onnx.data"}
    got = open_session(out, "cpu").run(X)["y"]
    assert rel(got, wanted(dict(adapter.deltas()))) < 1e-6
    lora_fx.merge(out, some("w"), tmp_path / "second.onnx", delta=True)  # three files now
    got = open_session(tmp_path / "second.onnx", "cpu").run(X)["y"]
    assert rel(got, wanted(dict(some("w", *changed).deltas()))) < 1e-6


def test_a_delta_needs_a_data_file_in_its_folder(base: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(LoraFxError, match="runtimes read no data file from another folder"):
        lora_fx.merge(base, some("w"), tmp_path / "sub" / "d.onnx", delta=True)
    inline = tmp_path / "sub" / "inline.onnx"
    lora_fx.export(Net().eval(), inline, (torch.tensor(ids()),), provider="cpu")
    with pytest.raises(LoraFxError, match="no data file to share"):
        lora_fx.merge(inline, some("w"), tmp_path / "sub" / "d.onnx", delta=True)
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["inline.onnx"]


def test_a_wrong_delta_is_not_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = saving._with_data

    def wrong(*args: Any) -> Any:
        files = right(*args)
        data = bytearray(files[1].read_bytes())
        data[3::4] = bytes(x ^ 64 for x in data[3::4])  # of every row: only some are read
        files[1].write_bytes(data)
        return files

    monkeypatch.setattr(saving, "_with_data", wrong)
    with pytest.raises(LoraFxError, match="is wrong by"):
        lora_fx.merge(base, Adapter({"w": column()}), tmp_path / "d.onnx", delta=True)
    assert sorted(os.listdir(tmp_path)) == ["base.onnx", "base.onnx.data"]


def column() -> Any:
    """An update of `w`, which has few rows: all are computed again."""
    return ADAPTERS["de"].entries["w"]


def test_run_compares_with_branches(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ADAPTERS["fr"]
    report = lora_fx.merge(base, adapter, tmp_path / "m.onnx", run=True)
    assert len(report.parity) == 3 and max(p.rel for p in report.parity) < 2e-6
    right = fold.Fold

    def wrong(updates: Any, lazy: bool) -> Any:
        return right(dict(list(updates.items())[1:]), lazy=lazy)

    monkeypatch.setattr(merge_onnx, "prove_merge", lambda path, *_: merge_onnx_open(path))
    monkeypatch.setattr(merge_onnx, "Fold", wrong)
    with pytest.raises(NoEffectError, match="differs from the base with branches"):
        lora_fx.merge(base, adapter, tmp_path / "n.onnx", run=True)
    lora_fx.merge(base, adapter, tmp_path / "n.onnx")  # which the run alone has seen
    whole = Adapter({**adapter.entries, "fc.bias": lora_fx.Full(np.ones(32, np.float32))})
    monkeypatch.undo()
    with pytest.raises(LoraFxError, match=r"'fc\.bias' is replaced whole"):
        lora_fx.merge(base, whole, tmp_path / "o.onnx", run=True)


def merge_onnx_open(path: Path) -> Any:
    from lora_fx.onnx.graph.graph import OnnxGraph
    from lora_fx.onnx.load import load

    return OnnxGraph(load(path))


def seeded(seed: int) -> Adapter:
    target = lora_fx.find(Net(), (torch.tensor(ids()),))["fc.weight"]
    a, b = draw("fc.weight", target.layout, 3, seed, "probe")
    return Adapter({"fc.weight": lora_fx.LowRank(a, b, 2.0, target.layout)})


@pytest.mark.parametrize("how", ["sum", "cat", "linear", "svd"])
def test_mixes(how: str, base: Path, tmp_path: Path) -> None:
    parts = [(seeded(1), 0.7), (seeded(2), -0.4)]
    options: dict[str, Any] = {"rank": 2} if how == "svd" else {}
    lora_fx.merge(base, parts, tmp_path / "m.onnx", how=how, **options)
    u, v = (p.lowrank["fc.weight"] for p, _ in parts)
    exact = 0.7 * u.matrix() - 0.4 * v.matrix()
    if how == "svd":
        left, s, right = np.linalg.svd(exact)
        exact = (left[:, :2] * s[:2]) @ right[:2]
    if how == "linear":
        roots = [np.sqrt(abs(w) * low.scale) for low, (_, w) in zip((u, v), parts, strict=True)]
        a = roots[0] * u.a.astype(np.float64) - roots[1] * v.a.astype(np.float64)
        b = roots[0] * u.b.astype(np.float64) + roots[1] * v.b.astype(np.float64)
        exact = b @ a
    got = open_session(tmp_path / "m.onnx", "cpu").run(X)["y"]
    assert rel(got, wanted({"fc.weight": exact})) < 2e-6


def test_the_plan_and_the_options_of_the_command(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_fx.save_adapter(some("fc.weight", "head.weight"), tmp_path / "a")
    before = sorted(os.listdir(tmp_path))

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(list(args))
        out, err = capsys.readouterr()
        return int(str(done.value.code)), out, err

    command = ("merge", str(base), str(tmp_path / "a"), "-o", str(tmp_path / "m.onnx"))
    code, out, _ = run(*command, "--dry-run")
    assert code == 0 and "fc.weight" in out and "20×32" in out and "0.75" in out
    code, out, _ = run(*command, "--dry-run", "--json")
    plan = json.loads(out)
    assert [(r["tensor"], r["rank"], r["scale"]) for r in plan["tensors"]] == [
        ("fc.weight", 4, 0.75), ("head.weight", 4, 0.75),
    ]  # fmt: skip
    assert sum(r["bytes"] for r in plan["tensors"]) == (20 * 32 + 18 * 17) * 4
    assert sorted(os.listdir(tmp_path)) == before
    assert run(*command, "--delta", "--run")[::2] == (0, "")
    base_, merged = str(base), str(tmp_path / "m.onnx")
    assert (
        run("verify", merged, base_, "--adapter", str(tmp_path / "a"), "--provider", "cpu")[0] == 0
    )
    assert run("verify", merged, base_, "--provider", "cpu")[0] == 1
    (tmp_path / "w.safetensors").write_bytes(b"")
    code, _, err = run("merge", str(tmp_path / "w.safetensors"), "a", "-o", "o", "--delta")
    assert code == 2 and "--delta is for .onnx bases only" in err
