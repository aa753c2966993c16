"""verify, where models are run: on the same inputs, output by output; or does an adapter fit?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.compare import Parity, Report
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.module import CapturedModule, plain
from lora_fx.onnx.session import open_session
from lora_fx.passes.given import captured_of, opened
from lora_fx.passes.pipeline import find, insert
from lora_fx.passes.proofs.parity import prove

Feeds = Mapping[str, np.ndarray[Any, Any]]


def verify_run(
    a: Any,
    b: Any,
    inputs: Mapping[str, Any] | None,
    adapter: Adapter | None,
    tol: float,
    provider: str,
) -> Report:
    """See `lora_fx.verify`."""
    if isinstance(b, Adapter):
        return _fits(a, b)
    a, b = (opened(_folder(m)) for m in (a, b))
    a_file, b_file = (isinstance(m, (str, PathLike)) for m in (a, b))
    if a_file or b_file:
        session = open_session(a if a_file else b, provider)
        module = _module(b if a_file else a, adapter)
        run: Callable[[Feeds], Any] = session.run
        notes = [session.note] if session.note else []
    else:
        from lora_fx.passes.proofs.parity import torch_run

        run, module, notes = torch_run(_module(a, None)), _module(b, adapter), []
    parity = prove(run, module, arrays=inputs, tol=tol)
    return _report(parity, notes)


def _folder(model: Any) -> Any:
    """The capture of a Hugging Face folder; anything else as it is."""
    is_folder = isinstance(model, (str, PathLike)) and Path(model).is_dir()
    return captured_of(model) if is_folder else model


def _report(parity: Sequence[Parity], notes: Sequence[str]) -> Report:
    ok = bool(parity) and all(p.ok for p in parity)
    return Report("verify", ok, tuple(parity), (), tuple(notes))


def _module(model: Any, adapter: Adapter | None) -> CapturedModule:
    if isinstance(model, CapturedModule):
        if adapter is not None:
            raise LoraFxError("this module has its adapter already", "load_adapter replaces it")
        return model.eval()
    if not isinstance(model, Captured):
        raise LoraFxError(
            f"cannot run a {type(model).__name__}", "pass capture(model, args) or an .onnx file"
        )
    return plain(model) if adapter is None else insert(model, adapter=adapter, dead="allow").eval()


def _fits(model: Any, adapter: Adapter) -> Report:
    """Does every key of an adapter have a target of its shape in a model?"""
    found = find(model)
    bound = bind(adapter, found)
    untouched = [t.key for t in found.targets if t.default and t.key not in bound.entries]
    details: dict[str, Any] = {
        "fits": len(bound.lowrank),
        "whole": len(bound.full),
        "untouched": untouched,
    }
    return Report("verify", True, details=details)
