"""The public names and their signatures are those of public.txt: a change of one is meant.

`python -m tests.test_public` writes the file anew.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, Batch, Load, LoraFxError, LowRank, Switch, TrainStep
from lora_fx.passes.verbs.modes import ModeOptions

HERE = Path(__file__).parent
LISTED = HERE / "public.txt"
DOCS = (HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md")))


def signature(thing: Any) -> str:
    """A signature on one line, annotations as they are written."""
    text = str(inspect.signature(thing))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text.replace("'", ""))


def lines() -> Iterator[str]:
    """Each public name with its signature, and each public member of a class."""
    for name in sorted(lora_fx.__all__):
        thing = getattr(lora_fx, name)
        if not callable(thing):
            yield name
            continue
        yield f"{name}{signature(thing)}"
        if not inspect.isclass(thing):
            continue
        for member, value in sorted(vars(thing).items()):
            if member.startswith("_"):
                continue
            value = getattr(value, "__func__", value)
            parameters = signature(value) if inspect.isfunction(value) else ""
            yield f"{name}.{member}{parameters}"


def test_public_names_and_signatures_are_as_listed() -> None:
    assert "\n".join(lines()) + "\n" == LISTED.read_text("utf-8")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_that_the_docs_show_are_importable(path: Path) -> None:
    text = path.read_text("utf-8")
    shown = set(re.findall(r"from (lora_fx(?:\.\w+)*) import ([\w, ]+)", text))
    for module, names in shown:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"


@pytest.mark.parametrize(
    "verb", ["merge", "doctor", "insert", "attach", "export", "plan", "verify"]
)
def test_a_misspelt_option_is_seen_by_an_editor(verb: str) -> None:
    kinds = [p.kind for p in inspect.signature(getattr(lora_fx, verb)).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_an_adapter_is_a_mapping() -> None:
    update = LowRank(np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 2.0)
    adapter = Adapter({"w.weight": update})
    assert isinstance(adapter, Mapping)
    assert dict(adapter) == {"w.weight": update} and adapter["w.weight"] is update
    assert "w.weight" in adapter and "other" not in adapter
    assert adapter.get("other") is None and [*adapter.values()] == [update]
    with pytest.raises(KeyError, match="other"):
        _ = adapter["other"]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    save_file({"w.weight": np.ones((6, 4), "f4")}, tmp_path / "base.safetensors")
    update = LowRank(np.ones((2, 4), "f4"), np.ones((6, 2), "f4"), 2.0)
    lora_fx.save_adapter(Adapter({"w.weight": update}), tmp_path / "adapter")
    return tmp_path


def test_workers_is_the_old_name_of_threads(pair: Path) -> None:
    files = pair / "base.safetensors", pair / "adapter"
    with pytest.warns(FutureWarning, match="workers= is deprecated: use threads=") as told:
        lora_fx.merge(*files, pair / "out.safetensors", workers=1)
    assert told[0].filename == __file__
    with pytest.raises(LoraFxError, match="workers and threads are the same option"):
        lora_fx.merge(*files, pair / "out2.safetensors", workers=1, threads=1)


OF_ONNX = {"names": {"a": "b"}, "delta": True, "run": True, "external_over": 3, "provider": "cpu"}


@pytest.mark.parametrize("option", OF_ONNX)
def test_what_only_graphs_have_is_refused_for_checkpoints(option: str, pair: Path) -> None:
    files = pair / "base.safetensors", pair / "adapter", pair / "out.safetensors"
    with pytest.raises(LoraFxError, match=f"{option} is an option for .onnx files"):
        lora_fx.merge(*files, **{option: OF_ONNX[option]})
    assert not files[2].exists()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.two = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


X = (torch.ones(2, 4),)
MODES: dict[str, tuple[ModeOptions, dict[str, Any]]] = {
    "switch": (Switch(include="one"), {"include": "one"}),
    "load": (Load(include="one", rank=3), {"include": "one", "rank": 3}),
    "train": (TrainStep(rank=3, clip=0.0), {"rank": 3, "clip": 0.0}),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_with_its_options_is_the_mode_with_keywords(name: str, tmp_path: Path) -> None:
    mode, keywords = MODES[name]
    model = Net().eval()
    lora_fx.export(model, tmp_path / "new.onnx", X, mode=mode, provider="cpu")
    with pytest.warns(FutureWarning, match=f"options of mode {name} are written mode=") as told:
        lora_fx.export(model, tmp_path / "old.onnx", X, mode=name, provider="cpu", **keywords)
    assert told[0].filename == __file__ and len(told) == 1
    graphs = [onnx.load(tmp_path / f"{which}.onnx").graph for which in ("new", "old")]
    assert graphs[0].node == graphs[1].node and graphs[0].input == graphs[1].input


def test_rows_with_weights_are_said_by_their_mode(tmp_path: Path) -> None:
    model = Net().eval()
    adapter = lora_fx.insert(model, X, rank=2).adapter()
    path = tmp_path / "rows.onnx"
    lora_fx.export(model, path, X, adapters=[adapter], mode=Batch(scales=True), provider="cpu")
    assert "adapter_scales" in {i.name for i in onnx.load(path).graph.input}


WRONG_MODES: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"mode": Switch(), "include": "one"}, "include= with mode=lora_fx.Switch"),
    "of another": (
        {"mode": Switch(), "scales": True},
        "mode switch would ignore an option of mode",
    ),
    "a rank of 0": ({"mode": Load(rank=0)}, "rank 0 is not a positive whole number"),
    "a rank of 0 of a step": ({"mode": TrainStep(rank=0)}, "rank 0 is not a positive"),
    "a fraction": ({"mode": Load(rank=1.5)}, "rank 1.5 is not a positive whole number"),
    "a text": ({"mode": Load(rank="x")}, "rank 'x' is not a positive whole number"),
    "a truth": ({"mode": Load(rank=True)}, "rank True is not a positive whole number"),
    "unknown loss": ({"mode": TrainStep(loss="hinge")}, "unknown loss 'hinge'"),
    "unknown mode": ({"mode": "swap"}, "unknown mode 'swap'"),
    "no object of a mode": ({"mode": 3}, "mode"),
}


@pytest.mark.parametrize("name", WRONG_MODES)
def test_a_mode_that_contradicts_is_refused(name: str, tmp_path: Path) -> None:
    options, message = WRONG_MODES[name]
    with pytest.raises(LoraFxError, match=message):
        lora_fx.export(Net().eval(), tmp_path / "m.onnx", X, provider="cpu", **options)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    LISTED.write_text("\n".join(lines()) + "\n", "utf-8")
