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
import pytest

import lora_fx
from lora_fx import Adapter, LoraFxError, LowRank

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
    shown = set(re.findall(r"from (lora_fx[\w.]*) import ([\w, ]+)", text))
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
    with pytest.warns(FutureWarning, match="workers= is called threads= now") as told:
        lora_fx.merge(*files, pair / "out.safetensors", workers=1)
    assert told[0].filename == __file__
    with pytest.raises(LoraFxError, match="workers and threads are one option"):
        lora_fx.merge(*files, pair / "out2.safetensors", workers=1, threads=1)


OF_ONNX = {"names": {"a": "b"}, "delta": True, "run": True, "external_over": 3, "provider": "cpu"}


@pytest.mark.parametrize("option", OF_ONNX)
def test_what_only_graphs_have_is_refused_for_checkpoints(option: str, pair: Path) -> None:
    files = pair / "base.safetensors", pair / "adapter", pair / "out.safetensors"
    with pytest.raises(LoraFxError, match=f"{option} is an option for .onnx files"):
        lora_fx.merge(*files, **{option: OF_ONNX[option]})
    assert not files[2].exists()


if __name__ == "__main__":
    LISTED.write_text("\n".join(lines()) + "\n", "utf-8")
