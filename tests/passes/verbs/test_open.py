"""One door: whatever a MODEL may be, every verb takes it, and finds the same targets."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraFxError, LowRank
from lora_fx.fx.module.execution import execution_of
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.passes.verbs.options import CaptureOptions
from lora_fx.passes.verbs.program import save_program
from tests.house import House

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def build():
    return Net(), (torch.randn(2, 4),), {}
"""
KEYS = ["down.weight", "up.weight"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factory, and the same model as a .pt2 file."""
    home = tmp_path_factory.mktemp("open")
    (home / "net.py").write_text(CODE)
    spec = f"{home}/net.py:build"
    loaded = lora_fx.load_model(spec)
    rows = {"x": {0: torch.export.Dim("rows")}}
    program = torch.export.export(loaded.module, loaded.args, dynamic_shapes=rows)
    torch.export.save(program, home / "net.pt2")
    save_program(lora_fx.insert(spec, rank=2), home / "branches.pt2")
    return home


def of_kind(folder: Path, kind: str) -> tuple[Any, tuple[Any, ...]]:
    """A model of one kind, and the example inputs that it needs."""
    spec = f"{folder}/net.py:build"
    loaded = lora_fx.load_model(spec)
    module = loaded.module
    models: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "a module": (module, loaded.args),
        "a bound method": (module.forward, loaded.args),
        "a parallel wrapper": (nn.DataParallel(module), loaded.args),
        "what load_model returned": (loaded, ()),
        "FILE.py:NAME": (spec, ()),
        "file.pt2": (folder / "net.pt2", ()),
        "a Captured": (lora_fx.capture(module, loaded.args), ()),
    }
    return models[kind]


KINDS = (
    "a module",
    "a bound method",
    "a parallel wrapper",
    "what load_model returned",
    "FILE.py:NAME",
    "file.pt2",
    "a Captured",
)


def update() -> Adapter:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2, 4)).astype(np.float32)
    b = rng.standard_normal((6, 2)).astype(np.float32)
    return Adapter({"up.weight": LowRank(a, b, 4.0)})


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_takes_every_model(kind: str, folder: Path, tmp_path: Path) -> None:
    model, args = of_kind(folder, kind)
    assert sorted(t.key for t in lora_fx.find(lora_fx.capture(model, args)).targets) == KEYS
    assert sorted(t.key for t in lora_fx.find(model, args).targets) == KEYS
    assert sorted(row.key for row in lora_fx.plan(model, args, budget="uniform:2").rows) == KEYS
    assert sorted(lora_fx.insert(model, args, rank=2).adapter()) == KEYS
    assert lora_fx.fold(model, args, adapter=update()).folded
    report = lora_fx.export(model, tmp_path / "out.onnx", args, adapters=update())
    assert report and (tmp_path / "out.onnx").is_file()


@pytest.mark.parametrize("kind", KINDS[3:])
def test_verify_takes_what_has_an_example(kind: str, folder: Path) -> None:
    model, _ = of_kind(folder, kind)
    other, _ = of_kind(folder, "FILE.py:NAME")
    assert lora_fx.verify(model, other)
    assert not lora_fx.verify(model, other, adapter=update())
    assert lora_fx.verify(model, update()).details["fits"] == 1


def test_inputs_replace_the_example_of_a_loaded_model(folder: Path) -> None:
    x = torch.randn(5, 4)
    for model in (f"{folder}/net.py:build", lora_fx.load_model(f"{folder}/net.py:build")):
        assert lora_fx.capture(model, (x,)).named["x"].shape == (5, 4)
        assert lora_fx.capture(model, kwargs={"x": x}).named["x"].shape == (5, 4)
        assert lora_fx.capture(model).named["x"].shape == (2, 4)


def test_a_capture_is_returned_and_has_its_sizes(folder: Path) -> None:
    cap, _ = of_kind(folder, "a Captured")
    assert lora_fx.capture(cap) is cap and captured_of(cap) is cap
    with pytest.raises(LoraFxError, match="dynamic has no effect with a captured model"):
        lora_fx.capture(cap, dynamic={"x": {0: "rows"}})
    with pytest.raises(LoraFxError, match="static has no effect with a captured model"):
        lora_fx.capture(cap, static=["x"])


def test_static_is_wherever_dynamic_is() -> None:
    """A size that is static is the example's, in the graph of every verb that captures."""
    net, args = nn.Sequential(nn.Linear(4, 6)), (torch.ones(3, 5, 4),)
    module = lora_fx.insert(net, args, rank=2, static=["input:0"])
    folded = lora_fx.fold(net, args, adapter=module.adapter(), static=["input:0"])
    for adapted in (module, folded):
        captured = execution_of(adapted).captured
        assert captured.inputs.to_json()[0]["shape"] == [3, "length", 4]
    for verb in (lora_fx.find, lora_fx.plan, lora_fx.attach):
        with pytest.raises(LoraFxError, match="no input is named 'inputs'"):
            verb(net, args, static=["inputs"])
    for name, value in vars(lora_fx).items():
        parameters = inspect.signature(value).parameters if inspect.isfunction(value) else {}
        assert ("dynamic" in parameters) == ("static" in parameters), name


@pytest.mark.parametrize(
    ("static", "text"),
    [
        ("x:0", "static is the text 'x:0'; expected a list"),
        (["x:one"], "static 'x:one' is not NAME or NAME:DIM"),
        (["x:7"], "input 'x' has 2 dimensions, so there is no dimension 7"),
    ],
)
def test_static_that_is_none(static: Any, text: str) -> None:
    with pytest.raises(LoraFxError, match=text):
        lora_fx.capture(lambda x: x @ x.mT, (torch.ones(3, 4),), static=static)


def test_a_file_without_an_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match=r"zz does not end in \.onnx, nor in \.pt2") as refused:
        lora_fx.export(nn.Linear(4, 3), tmp_path / "zz", (torch.ones(2, 4),))
    assert f"{tmp_path / 'zz'}.onnx" in refused.value.hint and not [*tmp_path.iterdir()]


def test_a_module_with_branches(folder: Path) -> None:
    """capture traces it as any module; a verb takes the model that it was made from."""
    net, args = of_kind(folder, "a module")
    module = lora_fx.insert(net, args, rank=2)
    assert captured_of(module) is execution_of(module).captured
    assert "up.lora_A.weight" in dict(lora_fx.capture(module, args).model.named_parameters())
    lora_fx.attach(net, args, rank=2)
    with pytest.raises(LoraFxError, match="an adapter is attached to this Net"):
        captured_of(net)
    assert "up.lora_A.weight" in dict(lora_fx.capture(net, args).model.named_parameters())


def test_a_program_with_branches(folder: Path) -> None:
    module = opened(folder / "branches.pt2")
    assert isinstance(module, lora_fx.AdaptedModule) and sorted(module.adapter()) == KEYS
    with pytest.raises(LoraFxError, match="holds an adapter already"):
        lora_fx.insert(folder / "branches.pt2")


def test_no_model(folder: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        ("nothing", "'nothing' is not a model: no such file or folder"),
        (f"{folder}/net.py", "the name of a factory is missing"),
        (f"{folder}/net.py:bild", "has no 'bild'"),
        ("net.onnx", "an .onnx file cannot be opened as a torch model"),
        (3, "an int is not a model"),
    ]
    for model, text in wrong:
        for verb in (lora_fx.capture, lora_fx.insert, lora_fx.plan, captured_of):
            with pytest.raises(LoraFxError, match=text):
                verb(model)


def test_inputs_beside_a_cache() -> None:
    """Refused before a model is loaded."""
    with pytest.raises(LoraFxError, match=r"with a cache, .*\nHint: leave inputs and"):
        CaptureOptions(cache=True, static=("x",))


def test_what_loading_says_comes_before_the_capture() -> None:
    """A model that cannot be captured had random weights all the same."""
    pytest.importorskip("timm")
    told: list[str] = []
    options = CaptureOptions(static=("nothing",), tell=lambda *notes: told.extend(notes))
    with pytest.raises(LoraFxError, match="nothing"):
        captured_of("timm:resnet18", options)
    assert "random weights" in told[0]


def test_no_other_file_of_a_verb_or_a_command_opens_a_model() -> None:
    opens = {"Captured", "FileCaptured", "decoder", "load_model", "open_program"}
    folders = ("lora_fx.passes.verbs", "lora_fx.cli")
    files = [m for m in House().modules.values() if m.folder in folders]
    calls = {
        (module.path.name, node.func.id)
        for module in files
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert {file for file, name in calls if name in opens} == {"open.py"}
