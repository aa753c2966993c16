"""--report: every command's page says what its --json says, and files are as they should be."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.singular_values import FEW, MANY, summary
from lora_fx.cli.step_lines import StepLines
from lora_fx.errors import LoraFxError, Terminated
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.report.html_text import number, percent
from tests.cli.test_cli import run
from tests.report.read import Page

MODEL = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 5)
        self.pos = nn.Parameter(torch.zeros(1, 8))
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x + self.pos)))
def build():
    return Net().eval(), (torch.randn(3, 8),), {}
"""
SHAPES = {"fc1.weight": (12, 8), "fc2.weight": (5, 12)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a training table, an adapter with an effect, and a base to merge it into."""
    rng = np.random.default_rng(0)
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    draw = rng.standard_normal
    x = draw((60, 8)).astype("f4")
    np.savez("d.npz", x=x, labels=x[:, :5].argmax(1))
    save_adapter(Adapter(updates(rng), {"dropout": 0.0}), "ad")
    base = {k: draw(s).astype("f4") for k, s in SHAPES.items()} | {"fc1.bias": np.zeros(12, "f4")}
    save_file(base, "base.safetensors")
    delta = Adapter(load_adapter("ad").entries).deltas()
    save_file(base | {k: (base[k] + d).astype("f4") for k, d in delta.items()}, "tuned.safetensors")
    return tmp_path


def updates(rng: np.random.Generator) -> dict[str, LowRank]:
    f4 = "float32"
    return {
        k: LowRank(
            rng.standard_normal((3, i)).astype(f4), rng.standard_normal((o, 3)).astype(f4), 6.0
        )
        for k, (o, i) in SHAPES.items()
    }


def shown(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[Page, Any]:
    """(the page, the --json object) of one run."""
    got, out, err = run(capsys, *argv, "--report", "page.html", "--json")
    assert got == code, err
    assert "wrote page.html" in err or code == 1
    return Page(Path("page.html").read_text(encoding="utf-8")), json.loads(out)


COMMANDS = {
    "insert": ["insert", "model.py:build", "-o", "out", "--rank", "2"],
    "train": ["train", "model.py:build", "d.npz", "-o", "out", "--rank", "2", "--steps", "12"],
    "plan": ["plan", "model.py:build", "d.npz", "-o", "plan.json", "--method", "kfac"],
    "export": ["export", "model.py:build", "ad", "-o", "m.onnx", "--provider", "cpu"],
    "merge": ["merge", "base.safetensors", "ad", "-o", "m.safetensors", "--dtype", "bfloat16"],
    "merge-all": ["merge-all", "base.safetensors", "ad", "-o", "fleet"],
    "extract": ["extract", "base.safetensors", "tuned.safetensors", "-o", "out", "--rank", "2"],
    "truncate": ["truncate", "ad", "-o", "out", "--rank", "1"],
    "convert": ["convert", "ad", "-o", "out.onnx_adapter"],
    "verify": ["verify", "tuned.safetensors", "base.safetensors", "--adapter", "ad"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_holds_what_json_says(
    home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    page, whole = shown(capsys, *COMMANDS[name])
    added = page.data.pop("page")
    assert page.data == whole and whole["command"] == name and whole["ok"]
    assert added["argv"] == [*COMMANDS[name], "--report", "page.html", "--json"]
    assert added["versions"]["lora-fx"] == whole["version"]
    began = datetime.strptime(added["when"], "%Y-%m-%d %H:%M:%S %z")
    assert -1 <= (datetime.now().astimezone() - began).total_seconds() - added["seconds"] < 60
    assert added["host"] == platform.node() and set(added["notes"]) <= set(whole["warnings"])
    if name == "merge":  # of the adapter, whose base is not known
        assert whole["warnings"] and not added["notes"]
    if name == "convert":  # alpha goes into B: nothing to look at
        assert added["notes"] == whole["warnings"] != []
    for file in added["files"]:
        data = Path(file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert file["sha256"] in page.text
    given = [Path(a.rpartition(":")[0] or a) for a in COMMANDS[name][1:3]]
    wanted = {("input", p) for p in given if p.exists()} | {
        ("output", Path(o)) for o in whole["outputs"]
    }
    held = {(f["of"], Path(f["path"])) for f in added["files"]}
    for of, path in wanted:
        assert any(of == o and (p == path or path in p.parents) for o, p in held), path
    assert {t["target"] for t in page.targets} == set(SHAPES)


def test_numbers_of_a_training(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, whole = shown(capsys, *COMMANDS["train"])
    assert whole["verdict"] in page.text
    assert number(whole["validation"][str(whole["best_step"])]) in page.text
    assert percent(whole["trained"] / (whole["trained"] + whole["frozen"])) in page.text
    assert percent(whole["adapted_share"]) in page.text
    assert whole["unreached"][0]["reason"] in page.text and "pos" in page.text
    for row, t in zip(page.targets, whole["targets"], strict=True):
        out, in_ = SHAPES[t["key"]]
        assert t["rank"] == 2 and t["alpha"] == 4.0
        assert row["params"] == str(2 * (out + in_))
        total = 2 * 3 * sum(o * i for o, i in SHAPES.values())
        assert row["FLOPs"] == percent(2 * 3 * out * in_ / total)


def test_numbers_of_a_merge(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, _ = shown(capsys, *COMMANDS["merge"])
    base, merged = load_file("base.safetensors"), load_file("m.safetensors")
    for row in page.targets:
        key = row["target"]
        low = load_adapter("ad").lowrank[key]
        delta = 2.0 * low.b.astype("f8") @ low.a.astype("f8")
        applied = merged[key].astype("f8") - base[key]
        gain = (applied * delta).sum() / (delta**2).sum()
        assert float(row["rounding"].rstrip("\u00a0%")) == pytest.approx(100 * (1 - gain), rel=6e-3)
        ratio = np.linalg.norm(delta) / np.linalg.norm(base[key])
        assert float(row["effect"].rstrip("\u00a0%")) == pytest.approx(100 * ratio, rel=6e-3)


def test_spectra_are_those_of_the_whole_product(home: Path) -> None:
    rng = np.random.default_rng(1)
    stack = LowRank(
        rng.standard_normal((4, 2, 6)).astype("f4"),
        rng.standard_normal((4, 9, 2)).astype("f4"),
        -3.0,
    )
    adapter = Adapter({**load_adapter("ad").entries, "experts": stack})
    for row in summary(adapter):
        low = adapter.lowrank[row["key"]]
        sigma = np.linalg.svd(low.matrix("f8"), compute_uv=False)[..., : low.rank]
        wanted = np.sort(sigma, axis=None)[::-1]
        assert np.allclose(row["sigma"], wanted, rtol=5.1e-3) and len(row["sigma"]) == wanted.size
        assert row["norm"] == pytest.approx(np.linalg.norm(low.matrix("f8")), rel=1e-5)
        assert (row["norm"] / row["sigma"][0]) ** 2 > 1 - 1e-4, "no stable rank below 1"
        assert row["parameters"] == low.a.size + low.b.size and row["rank"] == low.rank
    many = Adapter({f"h.{i}.q": updates(rng)["fc1.weight"] for i in range(MANY + 1)})
    wide = LowRank(np.ones((20, 30), "f4"), np.ones((40, 20), "f4"), 1.0)
    assert len(summary(Adapter({**many.entries, "wide": wide}))[-1]["sigma"]) == FEW


def test_spectra_are_weighted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, _ = shown(capsys, "merge", "base.safetensors", "ad:0.5", "-o", "m.safetensors")
    (adapter,) = page.data["page"]["adapters"]
    low = load_adapter("ad").lowrank["fc1.weight"]
    sigma = np.linalg.svd(low.matrix("f8"), compute_uv=False)[:3]
    row = next(r for r in adapter["updates"] if r["key"] == "fc1.weight")
    assert np.allclose(row["sigma"], sigma / 2, rtol=5.1e-3)


def test_a_page_that_exists_is_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.html").write_text("<!doctype html><title>lora-fx merge: done")
    code, _, err = run(capsys, *COMMANDS["truncate"], "--report", "page.html")
    assert code == 2 and "page.html already exists" in err and "--force" in err
    assert "merge: done" in Path("page.html").read_text()
    assert not Path("out").exists(), "refused before any work"
    code, _, _ = run(capsys, *COMMANDS["truncate"], "--report", "page.html", "--force")
    assert code == 0 and "Truncated" in Path("page.html").read_text()
    code, _, err = run(capsys, *COMMANDS["verify"], "--report", "page.html")
    assert code == 2 and "page.html already exists" in err
    code, _, err = run(capsys, *COMMANDS["verify"], "--report", "page.html", "--force")
    assert code == 0 and "as expected" in Path("page.html").read_text()
    assert not [p for p in os.listdir() if "lora_fx_" in p]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("page.txt", "does not end in .html"),
        ("gone/page.html", "does not exist"),
        ("out.html", "also --output out.html"),
        ("in.html", "also an input"),
        ("folder.html", "is a folder"),
    ],
)
def test_pages_that_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str], path: str, why: str
) -> None:
    Path("folder.html").mkdir()
    os.rename("ad", "in.html")
    argv = ("truncate", "in.html", "-o", "out.html", "--rank", "1", "--force", "--report", path)
    code, _, err = run(capsys, *argv)
    assert code == 2 and why in err
    assert not Path("out.html").exists() and load_adapter("in.html")


def test_the_answer_no_has_its_page(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, whole = shown(capsys, "verify", "base.safetensors", "tuned.safetensors", code=1)
    assert not whole["ok"] and "They differ" in page.text
    assert {r["target"] for r in page.targets} == set(SHAPES)
    argv = ["merge-all", "base.safetensors", "ad", "base.safetensors", "-o", "fleet", "--force"]
    page, whole = shown(capsys, *argv, code=1)
    assert whole["error"] in page.text and "1 of 2" in page.text
    assert not page.data["page"]["adapters"], "no model has all of them"
    assert page.data["hint"] == whole["hint"]


def test_an_error_with_exit_code_1_has_its_page(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("extract", "base.safetensors", "base.safetensors", "-o", "out")
    page, whole = shown(capsys, *argv, code=1)
    assert "Stopped" in page.text and whole["error"] in page.text
    assert page.data["error"] == whole["error"] and not page.data["ok"]
    code, _, _ = run(capsys, "truncate", "ad", "-o", "out", "--report", "other.html")
    assert code == 2 and not Path("other.html").exists(), "misuse has no result"


def test_a_word_is_no_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that happens to be called as the mode is no input."""
    os.rename("ad", "merged")
    os.symlink("merged", "cpu")
    page, _ = shown(capsys, "export", "model.py:build", "-o", "m.onnx", "--provider", "cpu")
    assert {f["path"] for f in page.data["page"]["files"]} == {"model.py", "m.onnx"}
    assert page.targets == []


def test_no_page_without_the_option(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *COMMANDS["truncate"], "--json")
    assert code == 0 and "page" not in json.loads(out)
    assert not list(Path().glob("*.html"))


def test_the_page_of_a_run_is_written_at_each_validation(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it runs, and is replaced by the page of the end, without --force."""
    from lora_fx.cli.result_page import PageFile

    seen: list[str] = []
    written = PageFile._replace

    def look(file: PageFile, shown: Any) -> None:
        written(file, shown)
        seen.append(Path(file.path).read_text())

    monkeypatch.setattr(PageFile, "_replace", look)
    line = "train model.py:build d.npz -o t --steps 20 --checks 4 --report p.html"
    assert run(capsys, *line.split())[0] == 0
    *running, last = seen
    for step, text in zip((5, 10, 15), running, strict=True):
        page = Page(text)
        assert f"Training 2 targets: step {step} of 20" in page.text and "Running" in page.text
        assert len(page.data["losses"]) == step and "location.reload()" in text
    assert len(Page(last).data["losses"]) == 20
    assert "Running" not in Page(last).text and "location.reload()" not in last


def test_rows_are_in_the_models_order_and_weights_have_a_hash(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of export, and of verify, whose second model is no adapter although it may be one."""
    names = {"fc1.weight": "zeta.weight", "fc2.weight": "alpha.weight"}
    text = MODEL.replace("fc1", "zeta").replace("fc2", "alpha")
    Path("named.py").write_text(text)
    entries = load_adapter("ad").entries
    save_adapter(Adapter({names[key]: entries[key] for key in reversed(SHAPES)}), "ad2")
    page, _ = shown(capsys, "export", "named.py:build", "ad2", "-o", "n.onnx", "--provider", "cpu")
    assert [row["target"] for row in page.targets] == ["zeta.weight", "alpha.weight"]
    (weights,) = page.data["page"]["in_memory"]
    assert weights["sha256"] in page.text and weights["name"] == "named.py:build"
    assert weights["what"] == "Net: both ends of each of 3 matrices"

    Path("page.html").unlink()
    verify = ("verify", "n.onnx", "named.py:build", "--adapter", "ad2", "--provider", "cpu")
    page, _ = shown(capsys, *verify)
    assert [row["target"] for row in page.targets] == ["zeta.weight", "alpha.weight"]
    assert page.data["page"]["in_memory"] == [weights]


def test_data_of_a_function_have_a_hash(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.py").write_text(
        "import numpy as np\ndef load():\n    return dict(np.load('d.npz'))\n"
    )
    command = ("train", "model.py:build", "rows.py:load", "-o", "out", "--steps", "2")
    page, _ = shown(capsys, *command)
    weights, training, held_out = page.data["page"]["in_memory"]
    assert weights["of"] == "weights" and training["of"] == held_out["of"] == "data"
    assert training["what"] == "54 training examples: every byte"
    assert held_out["what"] == "6 validation examples: every byte"
    assert training["sha256"] != held_out["sha256"] and training["sha256"] in page.text


LINE = "train model.py:build d.npz -o t --steps 20 --checks 4 --report p.html"
DIVERGED = "step 8: the loss is nan; lower the rate"


def stopping_at(step: int, stop: BaseException) -> Any:
    """A listener of steps that raises after one of them."""

    def tell(self: Any, now: int, steps: int, loss: float) -> None:
        if now == step:
            raise stop

    return tell


@pytest.mark.parametrize(
    ("stop", "state", "code", "said"),
    [
        (Terminated(), "terminated", 143, "terminated after step 8 of 20"),
        (LoraFxError(DIVERGED, "again", exit_code=1), "failed", 1, DIVERGED),
        (ZeroDivisionError("a bug"), "failed", 1, "ZeroDivisionError: a bug"),
    ],
    ids=["sigterm", "answer", "bug"],
)
def test_the_page_of_a_stopped_run_says_so(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
    state: str,
    code: int,
    said: str,
) -> None:
    """With all its losses, and it loads itself no more."""
    monkeypatch.setattr(StepLines, "__call__", stopping_at(8, stop))
    assert run(capsys, *LINE.split())[0] == code
    text = Path("p.html").read_text()
    page = Page(text)
    assert said in page.text and f"<title>lora-fx train: {state}</title>" in text
    assert "location.reload()" not in text and "Running" not in page.text
    assert len(page.data["losses"]) == 8 and not page.data["ok"]
    assert page.data["page"]["run"]["state"] == state and len(page.targets) == 2


def test_a_resumed_run_replaces_its_own_page(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --force; that of another run is kept, and so is one of a finished run."""
    for lr, folder in (("0.01", "state"), ("0.02", "other")):
        line = LINE.replace("p.html", f"{folder}.html")
        with monkeypatch.context() as patched:
            patched.setattr(StepLines, "__call__", stopping_at(8, KeyboardInterrupt()))
            argv = (*line.split(), "--lr", lr, "--save-state", folder)
            assert run(capsys, *argv)[0] == 130
        page = Page(Path(f"{folder}.html").read_text())
        assert "interrupted after step 8 of 20" in page.text
        assert f"{folder} holds the state of step 5: --resume {folder} goes on" in page.text

    resume = ("--lr", "0.01", "--resume", "state")
    code, _, err = run(capsys, *LINE.replace("p.html", "other.html").split(), *resume)
    assert code == 2 and "other.html already exists" in err
    line = LINE.replace("p.html", "state.html").split()
    code, _, err = run(capsys, *line, *resume)
    assert code == 0 and "wrote state.html" in err
    assert len(Page(Path("state.html").read_text()).data["losses"]) == 20
    code, _, err = run(capsys, *line, *resume)
    assert code == 2 and "state.html already exists" in err, "the page of a finished run is kept"
