"""verify: are two models the same? Tensor files are compared as tensors, others are run.

Comparing tensors needs neither torch nor onnx, so what runs models is imported only where one is
run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.checkpoint.merge import Adapters
from lora_fx.checkpoint.prove import ROWS
from lora_fx.checkpoint.verify import fits_files, is_tensor_file, verify_files
from lora_fx.compare import ORT_TOL, Parity, Report, compare, shapes_of
from lora_fx.errors import LoraFxError, NoSay, expect, given_options, near_path, refuse_no_say
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.formats.io import AdapterLike, is_adapter, load_adapter
from lora_fx.formats.registry import FORMATS
from lora_fx.inputs import Named
from lora_fx.onnx.validity import blaming

if TYPE_CHECKING:
    from lora_fx.fx.module.module import CapturedModule
    from lora_fx.onnx.graph.graph import OnnxGraph
    from lora_fx.onnx.session import RuntimeSession
    from lora_fx.passes.proofs.reference import Run
    from lora_fx.passes.verbs.options import Provider


@dataclass(frozen=True)
class Compared:
    """What a verify compares.

    Attributes:
        fits: Whether an adapter fits a model; nothing is run then.
        tensors: Tensor files, tensor by tensor.
        adapted: An adapter is given beside them.
        onnx: One of the two is an .onnx file.
    """

    fits: bool
    tensors: bool
    adapted: bool
    onnx: bool


VERIFY_RULES: tuple[NoSay[Compared], ...] = (
    NoSay(
        ("adapter", "tol", "inputs", "rows", "provider"), lambda c: c.fits,
        "where an adapter is fitted: names and shapes are compared",
    ),
    NoSay(
        ("inputs", "provider"), lambda c: c.tensors,
        "where tensors are compared", "leave it out, or --run",
    ),
    NoSay(
        ("rows",), lambda c: not (c.tensors and c.adapted),
        "but of tensor files with an adapter, of which a sample is computed again",
    ),
    NoSay(("provider",), lambda c: not c.onnx, "where no .onnx file is run"),
)  # fmt: skip


@blaming
def verify(
    a: object,
    b: Any,
    inputs: Named | None = None,
    *,
    adapter: Adapters | None = None,
    tol: float | None = None,
    provider: Provider | None = None,
    run: bool = False,
    rows: int | None = ROWS,
    trust: bool = False,
) -> Report:
    """Compare two models; `bool(report)` is the answer.

    Two tensor files (Hugging Face folders or `.safetensors`) are compared tensor by tensor,
    everything else output by output at three sizes.

    Args:
        a: A tensor file, a captured module, a Captured, an .onnx or .pt2 file, what load_model
            returned, or a model's name as on the command line.
        b: Another one, the reference; or an Adapter or its path: does it fit `a`?
        inputs: Arrays by input name, instead of sampled ones.
        adapter: Where models are run, it goes into whichever of the two is not an .onnx file (b
            where both are or neither is). Of tensor files: `a` should be `b` with it merged; also
            several, and pairs (adapter, weight).
        tol: Gate on max|a − b| / max|b|: of each output, 2e-6; of each tensor, 0.
        provider: The provider of .onnx files: auto, the default, cpu or cuda.
        run: Run tensor files too, as models.
        rows: With adapters of tensor files, rows of every touched tensor that are computed again;
            None for all.
        trust: Read pickles, by torch's unpickler that runs no code.

    Raises:
        LoraFxError: What cannot be compared; an adapter that does not fit.
    """
    with trusting(trust):
        expect(tol or 0, Real, "tol", "a number", "--tol 1e-5")
        if tol is not None and not 0 <= tol < math.inf:
            raise LoraFxError(f"tol is {tol:g}; expected a finite number, 0 or more", "--tol 1e-5")
        names = FORMATS.files_of_folders
        a, b = (local(m, files=names) if _is_path(m) else m for m in (a, b))
        for path in filter(_is_path, (a, b)):
            if not Path(path).exists() and ":" not in str(path):  # of a factory, or timm:NAME
                raise LoraFxError(
                    f"{path}: cannot be read: no such file or folder", near_path(path)
                )
        refuse_adapter_as_model(a, b)
        fits = isinstance(b, Adapter) or (_is_path(b) and is_adapter(b))
        tensors = is_tensor_file(a) and not run and (fits or is_tensor_file(b))
        asked = {"inputs": inputs, "adapter": adapter, "tol": tol, "provider": provider, "run": run}
        asked["rows"] = None if rows == ROWS else "all" if rows is None else rows
        kind = Compared(fits, tensors, adapter is not None, any(map(_is_onnx, (a, b))))
        refuse_no_say(VERIFY_RULES, kind, given_options(asked))
        options = RunOptions(inputs, adapter, tol, provider or "auto")
        if tensors and _is_path(a):
            if fits:
                return fits_files(a, b)
            return verify_files(a, b, adapter, tol=tol or 0.0, rows=rows)
        if fits and _is_path(a) and str(a).endswith(".onnx"):
            return fits_switch(a, b)
        if _is_path(a) and _is_path(b) and str(a).endswith(".onnx") and str(b).endswith(".onnx"):
            return verify_onnx(a, b, options)
        if fits and not isinstance(b, Adapter):
            b = load_adapter(b)
        return verify_run(a, b, options)


def refuse_adapter_as_model(a: object, b: object) -> None:
    """Raise where A, which has to be a model, is an adapter.

    Raises:
        LoraFxError: Says what can be asked of two adapters, or of an adapter and a model.
    """
    if not (isinstance(a, Adapter) or (_is_path(a) and is_adapter(a))):
        return
    name = os.fspath(a) if _is_path(a) else "A"
    if isinstance(b, Adapter) or (_is_path(b) and is_adapter(b)):
        other = os.fspath(b) if _is_path(b) else "B"
        raise LoraFxError(
            f"{name} and {other} are adapters: what they do is a question to a model",
            "lora-fx merge each into their base, and compare what was written",
        )
    raise LoraFxError(
        f"{name} is an adapter; expected a model",
        f"lora-fx verify {os.fspath(b) if _is_path(b) else 'MODEL'} {name} says whether it fits",
    )


def fits_switch(path: str | PathLike[str], adapter: AdapterLike) -> Report:
    """Does an adapter, or its file, fit the manifest of a switchable ONNX file? Nothing is run.

    Raises:
        LoraFxError: It does not, or the file is not switchable.
    """
    from lora_fx.onnx.manifest import manifest_of
    from lora_fx.onnx.session import tensors_of

    manifest = manifest_of(path)
    details = {"targets": len(manifest.slots), "adapted": len(tensors_of(adapter, manifest)) // 2}
    return Report("verify", True, details=details)


def _is_path(value: object) -> TypeGuard[str | PathLike[str]]:
    return isinstance(value, (str, PathLike))


def _is_onnx(value: object) -> bool:
    return _is_path(value) and str(value).endswith(".onnx")


# verify, where models are run: on the same inputs, output by output; or does an adapter fit?


@dataclass(frozen=True)
class RunOptions:
    """How two models are run; `lora_fx.verify` says what the fields mean."""

    inputs: Named | None
    adapter: Adapters | None
    tol: float | None
    provider: str

    def adapter_alone(self) -> Adapter | None:
        """The adapter, or that of a file; several cannot be run."""
        if _is_path(self.adapter):
            return load_adapter(self.adapter)
        if self.adapter is not None and not isinstance(self.adapter, Adapter):
            raise LoraFxError("models are run with one adapter", "merge them first, or mix them")
        return self.adapter


def verify_run(a: object, b: object, options: RunOptions) -> Report:
    """See `lora_fx.verify`."""
    from lora_fx.onnx.session import open_session
    from lora_fx.passes.proofs.onnx_reference import FileRerun
    from lora_fx.passes.proofs.parity import prove, torch_rerun, torch_run
    from lora_fx.passes.proofs.recorded_run import prove_as_it_is
    from lora_fx.passes.proofs.reference import Rerun

    adapter, tol = options.adapter_alone(), options.tol
    if isinstance(b, Adapter):
        return _fits(a, b)
    (a, notes_a), (b, notes_b) = _opened(a), _opened(b)
    opening = list(dict.fromkeys([*notes_a, *notes_b]))
    file, other = (a, b) if _is_path(a) else (b, a)
    if _is_path(file):
        session, module = open_session(file, options.provider), _module(other, adapter)
        run: Run = session.run
        rerun: Rerun = FileRerun(Path(file), options.provider)
        notes = [*opening, *filter(None, [session.note])]
        tol = _gate(session) if tol is None else tol
    else:
        ours, module = _module(a, None), _module(b, adapter)
        run, rerun = torch_run(ours), torch_rerun(ours, same=False)
        notes = [*opening, *prove_as_it_is(ours)]
    notes += [note for note in prove_as_it_is(module) if note not in notes]
    gate = ORT_TOL if tol is None else tol
    parity = prove(run, module, arrays=options.inputs, tol=gate, rerun=rerun)
    return _report(parity, notes)


def _opened(model: object) -> tuple[object, Sequence[str]]:
    """A path of .onnx, a module or a capture; and what opening a model by its name has to say."""
    from lora_fx.fx.load.huggingface import LoadedModel
    from lora_fx.passes.verbs.open import captured_of, opened

    if _is_onnx(model):
        return model, ()
    if not _is_path(model) and not isinstance(model, LoadedModel):
        return opened(model), ()
    captured = captured_of(model)
    return opened(captured), captured.notes


def _gate(*sessions: RuntimeSession) -> float:
    """The gate of the precision that files were written in, which export held them to."""
    from lora_fx.onnx.precision import GATES, PRECISION

    return max(GATES.get(s.metadata.get(PRECISION, ""), ORT_TOL) for s in sessions)


def _report(parity: Sequence[Parity], notes: Sequence[str]) -> Report:
    ok = all(p.ok for p in parity) and not all(p.blank for p in parity)
    return Report("verify", ok, tuple(parity), (), tuple(notes))


def _module(model: object, adapter: Adapter | None) -> CapturedModule:
    from lora_fx.fx.capture.call import unwrapped
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.module.module import CapturedModule, plain
    from lora_fx.passes.verbs.adapt import insert

    model = unwrapped(model)
    if isinstance(model, CapturedModule):
        if adapter is not None:
            raise LoraFxError("this module has its adapter already", "load_adapter replaces it")
        return model.eval()
    if not isinstance(model, Captured):
        raise LoraFxError(
            f"cannot run a {type(model).__name__}", "pass capture(model, args) or an .onnx file"
        )
    return plain(model) if adapter is None else insert(model, adapter=adapter, dead="allow").eval()


def _fits(model: object, adapter: Adapter) -> Report:
    """Does every key of an adapter have a target of its shape in a model?"""
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.load.huggingface import LoadedModel
    from lora_fx.passes.verbs.adapt import find
    from lora_fx.passes.verbs.open import captured_of
    from lora_fx.passes.verbs.options import CaptureOptions

    if _is_path(model) or isinstance(model, (Captured, LoadedModel)):
        model = captured_of(model, CaptureOptions(meta=True, adapter=adapter))
    found = find(model)
    bound = bind(adapter, found)
    untouched = [t.key for t in found.targets if t.default and t.key not in bound.entries]
    details = {"fits": len(bound.lowrank), "whole": len(bound.full), "untouched": untouched}
    return Report("verify", True, details=details)


# verify, where both models are .onnx files: no torch, and an adapter goes into the second.


def verify_onnx(a: str | PathLike[str], b: str | PathLike[str], options: RunOptions) -> Report:
    """Outputs of a against those of b, with an adapter's branches where one is given.

    Raises:
        LoraFxError: Inputs of other names, an adapter that does not fit b.
    """
    from lora_fx.onnx.load import load
    from lora_fx.onnx.session import open_session
    from lora_fx.passes.proofs.onnx_reference import FileRerun, reference_of

    load(a)  # which names what is wrong with a file better than the runtime does
    branches, tol = options.adapter is not None, options.tol
    graph, one = _graph(b, needed=branches), open_session(a, options.provider)
    bound = _bound(options, graph) if graph is not None and branches else None
    with reference_of(Path(b), graph, options.provider, options.inputs) as reference:
        names, note = reference.session.input_names, reference.session.note
        if set(one.input_names) != set(names):
            raise LoraFxError(
                f"{a} takes {sorted(one.input_names)}, {b} takes {sorted(names)}",
                "two models with the same inputs can be compared",
            )
        expected, gate = reference.run(bound), _gate(one, reference.session)
        if tol is None and gate == ORT_TOL:  # widened by what the runtime's own rewrites do
            parity = reference.prove(one.run, bound, "", FileRerun(Path(a), options.provider))
        else:
            parity = [
                compare(one.run(f), expected(f), shapes_of(f), gate if tol is None else tol)
                for f in reference.sizes()
            ]
    return _report(parity, [note] if note else [])


def _graph(path: str | PathLike[str], *, needed: bool) -> OnnxGraph | None:
    """The graph; None for an opset that we do not read, where nothing has to be inserted."""
    from lora_fx.onnx.graph.graph import OnnxGraph
    from lora_fx.onnx.load import load
    from lora_fx.onnx.names import restore_weight_names

    model = load(path)
    restore_weight_names(model)
    try:
        return OnnxGraph(model)
    except LoraFxError:
        if needed:
            raise
        return None


def _bound(options: RunOptions, graph: OnnxGraph) -> Adapter:
    from lora_fx.onnx.match import match
    from lora_fx.passes.find import find

    adapter = options.adapter_alone()
    assert adapter is not None  # verify_onnx asked
    matched = match(adapter, graph, find(graph))
    if matched.whole:
        raise LoraFxError(
            f"the adapter holds the whole tensor {min(matched.whole)!r}",
            "branches are s·b·a; merge the adapter, and verify the two files",
        )
    return Adapter(dict(matched.updates))
