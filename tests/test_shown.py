"""What Python shows: reprs in a line, tables in notebooks, hints in its own spelling."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.updates import Dense
from lora_fx.compare import Parity, Report
from lora_fx.conditions import SizeError
from lora_fx.errors import LoraFxError, MisfitError, NoEffectError
from lora_fx.python_spelling import _FLAGS, _KEYWORDS, in_python
from lora_fx.text import html

LOW = lora_fx.LowRank(np.ones((2, 8), "f"), np.ones((12, 2), "f"), alpha=6.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def captured() -> lora_fx.Captured:
    return lora_fx.capture(Net().eval(), (torch.randn(3, 8),))


def test_updates_are_shown_by_their_shapes() -> None:
    assert repr(LOW) == "LowRank(a=float32[2, 8], b=float32[12, 2], alpha=6.0)"
    assert repr(lora_fx.Full(np.zeros((5, 12)))) == "Full(value=float64[5, 12])"
    assert repr(Dense(np.zeros((5, 12), "f2"))).startswith("Dense(value=float16[5, 12]")
    one = {"fc1.weight": LOW, "head<b>": lora_fx.Full(np.zeros((5, 12), "f"))}
    adapter = lora_fx.Adapter(one)
    assert repr(adapter) == (
        "Adapter(fc1.weight lora [12, 8] rank 2, head<b> a whole tensor [5, 12])"
    )
    many = lora_fx.Adapter({f"{i}.weight": LOW for i in range(200)})
    assert len(repr(many)) < 200 and repr(many).endswith("and 197 more)")
    shown = adapter._repr_html_()
    assert "head&lt;b&gt;" in shown and "<b>" not in shown and "[12, 8]" in shown
    assert shown.startswith("<p>2 updates, 100 parameters</p><table><tr><th>key</th>")


def test_reports_are_shown_in_a_line() -> None:
    parity = (Parity({"x": (2, 8)}, 0.5, 0.25, 1e-6, "<y>"),)
    report = Report("verify", False, parity, ("a",), (), {"rows": [{"x": 1}] * 900})
    assert repr(report) == "Report(command='verify', ok=False, parity=1, outputs=1, details=1)"
    shown = report._repr_html_()
    assert shown.startswith("<p>verify: FAILED</p>")
    assert "<td>2.50e-01</td><td>1.0e-06</td><td>False</td>" in shown
    assert html("a\x1b<i>", [("&",), ('"',)]) == (
        "<p>a\\u001b&lt;i&gt;</p><table><tr><th>&amp;</th></tr><tr><td>&quot;</td></tr></table>"
    )


def test_models_are_shown_by_their_shapes(captured: lora_fx.Captured) -> None:
    assert repr(captured) == "Captured(Net, x: float32 ['batch', 8])"
    found = lora_fx.find(captured)
    assert repr(found) == "Found(fc1.weight [12, 8], fc2.weight [5, 12]; 0 refusals)"
    shown = found._repr_html_()
    assert shown.count("<tr>") == 3 and "<td>fc2.weight</td><td>linear</td><td>12</td>" in shown
    model = lora_fx.insert(captured, rank=2)
    assert "(lora_A): AdapterTensors(weight: [2, 8])" in repr(model)
    assert "(lora_B): AdapterTensors(weight: [5, 2])" in repr(model)
    report = model.report()
    assert len(repr(report)) < 300 and "array" not in repr(report)
    assert "<tr><td>fc1.weight</td><td>2</td><td>4</td></tr>" in report._repr_html_()


HINTS = {
    "--force to replace it": "force=True to replace it",
    "--allow-unused leaves them out": "allow_unused=True leaves them out",
    "a wider --dtype keeps small updates": "a wider dtype keeps small updates",
    "--dtype bfloat16 or float32 can": "dtype='bfloat16' or float32 can",
    "--rank 8, or exclude it": "rank=8, or exclude it",
    "--exclude steps.q leaves it out": "exclude='steps.q' leaves it out",
    "say which with --names FILE": "say which with names=FILE",
    "--map FILE, as a table of rows": "--map FILE, as a table of rows",
    "(--dynamic NAME:0=batch)": "(dynamic={NAME: {DIM: SYMBOL}})",
    "run lora-fx targets MODEL for the names": "print(lora_fx.find(model)) for the names",
    "lora-fx merge --add does; --trust reads": "lora-fx merge --add does; trust=True reads",
    "pip install --force-reinstall x": "pip install --force-reinstall x",
    "--as lora --rank R makes LoRA of it": "--as lora --rank R makes LoRA of it",
    "--dead drop leaves it out; --exclude does": "dead='drop' leaves it out; exclude does",
}  # fmt: skip


@pytest.mark.parametrize("hint", HINTS)
def test_hints_in_pythons_spelling(hint: str) -> None:
    error = LoraFxError("it is wrong", hint)
    assert in_python(hint) == HINTS[hint]
    assert str(error) == f"it is wrong\nHint: {HINTS[hint]}" and error.hint == hint


def test_what_python_is_told_are_its_own_names() -> None:
    """Each word is an argument of a public function."""
    import inspect

    from lora_fx.adapter.truncate import truncate
    from lora_fx.checkpoint.merge import merge as of_files
    from lora_fx.formats.io import load_adapter
    from lora_fx.fx.train.loop import fit
    from lora_fx.passes.verbs.merge_onnx_plan import OnnxMergeOptions

    verbs: list[Callable[..., Any]] = [
        lora_fx.capture, lora_fx.insert, lora_fx.export, lora_fx.extract, lora_fx.save_adapter,
        lora_fx.load_model, truncate, load_adapter, of_files, OnnxMergeOptions, fit, lora_fx.verify,
    ]  # fmt: skip
    known = {name for verb in verbs for name in inspect.signature(verb).parameters}
    said = {w.replace("-", "_") for w in (*_FLAGS, *_KEYWORDS)}
    assert said - known == set()


WRONG: dict[str, tuple[Callable[[lora_fx.Captured], Any], str, str]] = {
    "a tensor for args": (
        lambda cap: lora_fx.capture(Net(), torch.ones(3, 8)),
        "args is a Tensor, not a tuple", "args=(x,)",
    ),
    "a dict for args": (
        lambda cap: lora_fx.find(Net(), {"x": torch.ones(3, 8)}),
        "args is a dict, not a tuple", "kwargs={'x': x}",
    ),
    "a tensor for kwargs": (
        lambda cap: lora_fx.insert(Net(), (), torch.ones(3, 8)),
        "kwargs is a Tensor, not a dict", "kwargs={'x': x}",
    ),
    "a list for dynamic": (
        lambda cap: lora_fx.capture(Net(), (torch.ones(3, 8),), dynamic=["x"]),
        "dynamic is a list, not a dict", "{'x': {0: 'batch'}}",
    ),
    "no args": (
        lambda cap: lora_fx.capture(Net()), "missing a required argument: 'x'", "forward(x",
    ),
    "a missing .onnx": (
        lambda cap: lora_fx.verify("gone.onnx", "gone.onnx"), "gone.onnx: cannot be read", "path",
    ),
    "a missing file beside tensors": (
        lambda cap: [
            lora_fx.save_adapter(lora_fx.Adapter({"w": LOW}), "out"),
            lora_fx.verify("out/adapter_model.safetensors", "outt"),
        ],
        "outt: cannot be read: no such file", "did you mean out",
    ),
    "a dtype of torch for its name": (
        lambda cap: lora_fx.merge("base", "adapter", "out", dtype=torch.float16),
        "unknown dtype torch.float16", "did you mean float16",
    ),
    "a missing .onnx to find": (
        lambda cap: lora_fx.find("gnoe.onnx"), "gnoe.onnx: cannot be read", "check the path",
    ),
    "a text to capture": (
        lambda cap: lora_fx.capture("model"),
        "'model' is not a model", "pass a Hugging Face folder",
    ),
    "export the wrong way round": (
        lambda cap: lora_fx.export("m.onnx", cap),
        "path is a Captured, not a path", "export(model, path, args)",
    ),
    "merge the wrong way round": (
        lambda cap: lora_fx.merge(["a"], "base", "out"),
        "base is a list, not a path", "merge(base, adapters, out)",
    ),
    "save the wrong way round": (
        lambda cap: lora_fx.save_adapter("x", lora_fx.Adapter({})),
        "adapter is a str, not an Adapter", "save_adapter(adapter, path)",
    ),
    "a number to load": (
        lambda cap: lora_fx.load_adapter(3),
        "path is an int, not a path", "load_adapter(path)",
    ),
    "a home that nobody expands": (
        lambda cap: lora_fx.load_adapter("~/gone"), "~/gone: no such file", "os.path.expanduser",
    ),
    "a path to truncate": (
        lambda cap: lora_fx.truncate("x", rank=1),
        "adapter is a str, not an Adapter", "load_adapter(path)",
    ),
    "no goal": (
        lambda cap: lora_fx.truncate(lora_fx.Adapter({"w": LOW})),
        "no goal is given",
        "one of rank, params",
    ),
    "a text for rank": (
        lambda cap: lora_fx.insert(cap, rank="8"),
        "rank '8' is not a positive whole number", "8 or 16",
    ),
    "a text for alpha": (
        lambda cap: lora_fx.insert(cap, alpha="8"),
        "alpha is a str, not a number", "2·rank",
    ),
    "a text for dropout": (
        lambda cap: lora_fx.insert(cap, dropout="0.1"),
        "dropout is a str, not a number", "0.05",
    ),
    "a number for include": (
        lambda cap: lora_fx.insert(cap, include=3),
        "include is an int, not selectors", "include=['q_proj'",
    ),
    "a mode": (
        lambda cap: lora_fx.export(cap, "m.onnx", mode="swich"),
        "unknown mode 'swich'", "did you mean switch",
    ),
    "a precision": (
        lambda cap: lora_fx.export(cap, "m.onnx", precision="float61"),
        "unknown precision 'float61'", "did you mean float16",
    ),
    "a key": (lambda cap: lora_fx.find(cap)["fc3.weight"], "is not a target", "mean fc2.weight"),
    "a selector": (
        lambda cap: lora_fx.insert(cap, include="fc3"), "'fc3' matches no target", "mean fc2",
    ),
    "a start from data": (
        lambda cap: lora_fx.insert(cap, init="eva"), "starts from data", "data=[{INPUT: TENSOR}",
    ),
    "an output that exists": (
        lambda cap: [lora_fx.save_adapter(lora_fx.Adapter({"w": LOW}), "out") for _ in "12"],
        "out already exists", "force=True to replace it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls_are_one_error_with_a_hint(
    what: str, captured: lora_fx.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, message, hint = WRONG[what]
    with pytest.raises(LoraFxError) as caught:
        call(captured)
    said, _, hinted = str(caught.value).partition("\nHint: ")
    assert message in said and hint in hinted, str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] in ([], ["out"])


@pytest.mark.parametrize("kind", [LoraFxError, NoEffectError, SizeError, MisfitError])
def test_errors_come_through_a_pool_of_processes_as_they_were(kind: type[LoraFxError]) -> None:
    error = MisfitError("a") if kind is MisfitError else kind("a", "use --rank")
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is kind and str(again) == str(error) and again.args == error.args
        assert (again.hint, again.exit_code) == (error.hint, error.exit_code)
