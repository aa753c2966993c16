"""An adapter of a torch model, merged and inserted into the ONNX file of its base.

`python -m tests.zoo.onnx_files [NAME...]` prints a line for every model of the zoo: the largest
difference from the adapted torch module, relative to its output, or why the file refuses.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import onnx_ir as ir

import lora_fx
from lora_fx.compare import rel
from lora_fx.errors import LoraFxError
from lora_fx.fx.module.execution import execution_of
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.match import match
from lora_fx.onnx.session import open_session
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.proof_inputs import arrays_of

from . import checks
from .models import ZOO


def differences(name: str, folder: Path) -> dict[str, float]:
    """{fold, insert}: the largest difference of any output at three rows."""
    lora_fx.export(checks.built(name).cap, folder / "base.onnx", provider="cpu", force=True)
    module = checks.perturbed(name).eval()
    named = execution_of(module).sample((3, 7))
    wanted, feeds = execution_of(module).flat(named), arrays_of(named)
    result = {}
    for make in (Fold, Insert):
        graph = OnnxGraph(ir.load(folder / "base.onnx"))
        make(match(module.adapter(), graph, find(graph)).updates)(graph)
        ir.save(graph.model, folder / "adapted.onnx")
        got = open_session(folder / "adapted.onnx", "cpu").run(feeds)
        result[make.__name__.lower()] = max(rel(got[k], v) for k, v in wanted.items())
    return result


def main(names: list[str]) -> None:
    """One line a model, and the count at the end."""
    equal = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = differences(name, Path(folder))
            except LoraFxError as error:
                print(f"{name}: refused: {error.message[:160]}", flush=True)
                continue
        equal += max(found.values()) < 1e-5
        print(f"{name}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()), flush=True)
    print(f"{equal} of {len(names)} within 1e-5")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:] or list(ZOO))
