"""``python -m tests.zoo.peft_matrix``: PEFT's own test models and its matrix of LoRA rows.

PEFT's source distribution of the installed version is fetched into a temporary folder, and its
tests/test_custom_models.py gives the models and the rows. A row that PEFT itself can merge is saved
with a random B, read by lora-fx and compared with PEFT's merged model: insert, insert with the
row's targets, attach, fold, and a merge of the checkpoint. Then every model of the file goes
through the columns of the lots with lora-fx's own defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxError, one_line
from tests.zoo.lot.columns import COLUMNS, Lot
from tests.zoo.oracles import flat

GATE = 1e-5
VERBS = ("insert", "include", "attach", "fold", "merge")


@contextlib.contextmanager
def source() -> Iterator[Any]:
    """PEFT's tests/test_custom_models.py as a module, while its folder lasts."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, f"peft=={version('peft')}", "-d", folder], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("*/tests")
        package = types.ModuleType("peft_tests")
        package.__path__ = [str(tests)]
        sys.modules["peft_tests"] = package
        wanted = ("datasets", "diffusers", "parameterized")  # by helpers that are not used here
        absent = [n for n in wanted if importlib.util.find_spec(n) is None]
        sys.modules.update({n: MagicMock() for n in absent})
        module = importlib.import_module("peft_tests.test_custom_models")
        for n in absent:
            del sys.modules[n]
        yield module


def example() -> torch.Tensor:
    """The input of PEFT's tests."""
    return torch.arange(90).view(9, 10)


def run(model: nn.Module) -> list[np.ndarray[Any, Any]]:
    """Outputs in eval mode."""
    with torch.no_grad():
        return flat(model.eval()(example()))


def gap(got: nn.Module, want: nn.Module) -> float:
    """The largest difference, relative to the largest output."""
    pairs = list(zip(run(got), run(want), strict=True))
    return max(float(np.abs(a - b).max() / max(1e-30, np.abs(b).max())) for a, b in pairs)


def wide(model: nn.Module) -> nn.Module:
    """A copy in fp64; these models cast their input to an attribute of theirs."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module.__dict__.get("dtype"), torch.dtype):
            module.__dict__["dtype"] = torch.float64
    return model


def row(theirs: Any, name: str, kind: str, config_class: Any, options: dict[str, Any]) -> Any:
    """{verb: result} of one row, or why PEFT itself does not merge it."""
    from peft import get_peft_model

    base = theirs.MockTransformerWrapper.from_pretrained(kind)
    config = config_class(**{"init_lora_weights": False, **options})
    torch.manual_seed(1)
    try:
        wrapped = get_peft_model(copy.deepcopy(base), config).eval()
        with torch.no_grad():
            for n, p in wrapped.named_parameters():
                if "lora_" in n and not p.any():
                    p.normal_(std=0.1)
        merged = wide(copy.deepcopy(wrapped)).merge_and_unload().eval()
        found = gap(merged, wide(wrapped))
    except Exception as e:
        return f"PEFT: {one_line(f'{type(e).__name__}: {e}', 120)}"
    if found > GATE:
        return f"PEFT: merged differs from unmerged by {found:.1e}"
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "adapter"
        wrapped.save_pretrained(saved)
        for verb in VERBS:
            try:
                model = VERB[verb](base, saved, options, Path(folder))
                if model is None:
                    result[verb] = "–"
                    continue
                found = gap(model, merged)
                if found > GATE:  # fp32's rounding, or ours
                    found = gap(VERB[verb](wide(base), saved, options, Path(folder)), merged)
                result[verb] = f"{found:.0e}" if found <= GATE else f"WRONG {found:.0e}"
            except LoraFxError as e:
                result[verb] = f"REFUSED {one_line(e.message, 200)}"
            except Exception as e:
                result[verb] = f"RAW {one_line(f'{type(e).__name__}: {e}', 200)}"
    return result


def _insert(base: nn.Module, saved: Path, options: Any, folder: Path) -> nn.Module:
    adapter = lora_fx.load_adapter(saved)
    return lora_fx.insert(copy.deepcopy(base), (example(),), adapter=adapter)


def _include(base: nn.Module, saved: Path, options: Any, folder: Path) -> nn.Module | None:
    """The row's targets as selectors give the keys of the adapter."""
    if {"modules_to_save", "trainable_token_indices", "use_dora"} & set(options):
        return None
    targets = options.get("target_modules", [])
    targets = [targets] if isinstance(targets, str) else list(targets)
    targets += [t.removesuffix(".weight") for t in options.get("target_parameters", [])]
    targets = [t if "." in t else f"re:^{t}[.]" for t in targets]
    args, adapter = (example(),), lora_fx.load_adapter(saved)
    module = lora_fx.insert(base, args, include=targets, rank=1, dead="allow")
    ours, theirs = ({k.partition("[")[0] for k in keys} for keys in (module.updates, adapter))
    assert ours == {k for k in theirs if not k.endswith(".bias")}, (ours, theirs)
    return lora_fx.insert(copy.deepcopy(base), args, adapter=adapter)


def _attach(base: nn.Module, saved: Path, options: Any, folder: Path) -> nn.Module:
    adapter = lora_fx.load_adapter(saved)
    return lora_fx.attach(copy.deepcopy(base), (example(),), adapter=adapter)


def _fold(base: nn.Module, saved: Path, options: Any, folder: Path) -> nn.Module:
    adapter = lora_fx.load_adapter(saved)
    return lora_fx.fold(copy.deepcopy(base), (example(),), adapter=adapter)


def _merge(base: nn.Module, saved: Path, options: Any, folder: Path) -> nn.Module:
    file, out = folder / "base.safetensors", folder / "merged.safetensors"
    save_file(base.state_dict(), file)
    lora_fx.merge(file, [saved], out, force=True)
    model = copy.deepcopy(base)
    model.load_state_dict(load_file(out))
    return model


VERB: dict[str, Callable[..., Any]] = {
    "insert": _insert, "include": _include, "attach": _attach, "fold": _fold, "merge": _merge,
}  # fmt: skip


def models(theirs: Any) -> dict[str, nn.Module]:
    """Every model of the file that can be made without arguments and runs on the input."""
    found = {}
    for name, kind in vars(theirs).items():
        own = isinstance(kind, type) and kind.__module__ == theirs.__name__
        if own and issubclass(kind, nn.Module) and not name.startswith("_"):
            torch.manual_seed(0)
            with contextlib.suppress(Exception):
                model = kind().eval()
                run(model)
                found[name] = model
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.peft_matrix", description=__doc__)
    parser.add_argument("--only", default="", help="rows and models with this in their name")
    parser.add_argument("--out", type=Path, help="a JSON file of all results")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with source() as theirs:
        rows = {
            case[0]: row(theirs, *case) for case in theirs.TEST_CASES
            if case[2].__name__ == "LoraConfig" and options.only in case[0]
        }  # fmt: skip
        own = {}
        for name, model in models(theirs).items():
            if options.only not in name:
                continue
            lot = Lot(name, (model, (example(),), {}))
            own[name] = {c.column: [c.state, c.why] for c in lot.cells()}
    able = {n: r for n, r in rows.items() if isinstance(r, dict)}
    print(f"{'row':45}", *(f"{v:8}" for v in VERBS))
    for name, r in rows.items():
        shown = [f"{r[v][:8]:8}" for v in VERBS] if isinstance(r, dict) else [r]
        print(f"{name:45}", *shown)
        for verb, text in r.items() if isinstance(r, dict) else ():
            if text[0].isupper():
                print(f"    {verb}: {text}")
    print(f"\n{'model':30}", *(f"{c[:8]:8}" for c in COLUMNS))
    for name, cells in own.items():
        print(f"{name:30}", *(f"{cells[c][0]:8}" for c in COLUMNS))
        for column, (state, why) in cells.items():
            if state != "ok":
                print(f"    {column}: {why}")
    whole = sum(not any(t[0].isupper() for t in r.values()) for r in able.values())
    good = sum(all(state == "ok" for state, _ in cells.values()) for cells in own.values())
    print(f"\n{len(rows)} LoRA rows, {len(able)} that PEFT merges, {whole} equal to {GATE:g}")
    print(f"{len(own)} models, {good} pass every column")
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "models": own}, indent=1))


if __name__ == "__main__":
    main()
