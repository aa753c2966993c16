"""verify by running both models on the same inputs, or by fitting an adapter to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from lora_fx.adapter.adapter import Adapter, bind
from lora_fx.checkpoint.merge import Adapters
from lora_fx.compare import ORT_TOL, Parity, Report
from lora_fx.errors import LoraFxError, type_of
from lora_fx.formats.io import load_adapter
from lora_fx.inputs import Named
from lora_fx.text import JsonView, StrPath

if TYPE_CHECKING:
    from lora_fx.fx.module.module import CapturedModule
    from lora_fx.onnx.session import RuntimeSession
    from lora_fx.passes.proofs.reference import Run


@dataclass(frozen=True)
class RunOptions:
    """The options to run two models; `lora_fx.verify` explains the fields."""

    inputs: Named | None
    adapter: Adapters | None
    tol: float | None
    provider: str

    def adapter_alone(self) -> Adapter | None:
        """Return the adapter, given or read from a file; raise for several adapters."""
        if is_path(self.adapter):
            return load_adapter(self.adapter)
        if self.adapter is not None and not isinstance(self.adapter, Adapter):
            raise LoraFxError(
                "a model is run with one adapter, not with several",
                "merge the adapters first, or mix them",
            )
        return self.adapter


def verify_run(a: object, b: object, options: RunOptions) -> Report:
    """Run two models on the same inputs, or fit an adapter to one; see `lora_fx.verify`."""
    from lora_fx.onnx.on_device import of_files
    from lora_fx.onnx.session import few_runs, open_session
    from lora_fx.onnx.session_memory import check_sessions
    from lora_fx.passes.proofs.onnx_reference import FileRerun
    from lora_fx.passes.proofs.parity import prove, torch_rerun, torch_run
    from lora_fx.passes.proofs.recorded_capture import prove_as_it_is
    from lora_fx.passes.proofs.reference import Rerun

    adapter = options.adapter_alone()
    if isinstance(b, Adapter):
        return _fits(a, b)
    model, notes_on_model = _opened(a)
    reference, notes_on_reference = _opened(b)
    notes = list(dict.fromkeys([*notes_on_model, *notes_on_reference]))
    file, other = (model, reference) if is_path(model) else (reference, model)
    gate = ORT_TOL
    device: JsonView = {}
    if is_path(file):
        check_sessions("comparing", [file], options.provider, packed=False)
        with few_runs():
            session = open_session(file, options.provider)
        module = _module(other, adapter)
        run: Run = session.run
        rerun: Rerun = FileRerun(Path(file), options.provider)
        if session.note:
            notes.append(session.note)
        gate = gate_of(session)
        device = of_files([fspath(file)], session.provider)
    else:
        first = _module(model, None)
        module = _module(reference, adapter)
        run = torch_run(first)
        rerun = torch_rerun(first, same=False)
        notes += prove_as_it_is(first)
    notes += [note for note in prove_as_it_is(module) if note not in notes]
    if options.tol is not None:
        gate = options.tol
    with few_runs():
        parity = prove(run, module, arrays=options.inputs, tol=gate, rerun=rerun)
    if is_path(file):
        expect_outputs(file, session.output_names, [row.output for row in parity])
    return report_of(parity, notes, device)


def expect_outputs(file: StrPath, names: Sequence[str], expected: Sequence[str]) -> None:
    """Raise if a file lacks an output of the model that it is compared with.

    Args:
        file: The file.
        names: The names of its outputs.
        expected: Those of the other model.
    """
    for name in expected:
        if name not in names:
            raise LoraFxError(
                f"{fspath(file)} has no output {name!r}; its outputs are {', '.join(names)}",
                "compare two models with the same outputs",
            )


def _opened(model: object) -> tuple[object, Sequence[str]]:
    """Return an .onnx path, a module or a capture, and the notes from opening the model."""
    from lora_fx.fx.load.loaded_model import LoadedModel
    from lora_fx.passes.verbs.open import captured_of, opened

    if is_onnx(model):
        return model, ()
    if not is_path(model) and not isinstance(model, LoadedModel):
        return opened(model), ()
    captured = captured_of(model)
    return opened(captured), captured.notes


def gate_of(*sessions: RuntimeSession) -> float:
    """Return the gate that export used for the precision of these files."""
    from lora_fx.onnx.precision import GATES, PRECISION

    gates = []
    for session in sessions:
        precision = session.metadata.get(PRECISION, "")
        gates.append(GATES.get(precision, ORT_TOL))
    return max(gates)


def report_of(
    parity: Sequence[Parity], notes: Sequence[str], device: JsonView | None = None
) -> Report:
    """Make the report of a verify that ran both models.

    Args:
        parity: The comparisons.
        notes: To be reported as warnings.
        device: What the .onnx files do on devices; see lora_fx.onnx.on_device.
    """
    ok = all(row.ok for row in parity) and not all(row.blank for row in parity)
    return Report("verify", ok, tuple(parity), (), tuple(notes), device or {})


def _module(model: object, adapter: Adapter | None) -> CapturedModule:
    """Return the module that runs a model in eval mode, with an adapter if one is given."""
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.capture.root_module import unwrapped
    from lora_fx.fx.module.doubts import plain
    from lora_fx.fx.module.module import CapturedModule
    from lora_fx.passes.verbs.adapt import insert

    model = unwrapped(model)
    if isinstance(model, CapturedModule):
        if adapter is not None:
            raise LoraFxError(
                "this module has its adapter already", "use load_adapter to replace it"
            )
        return model.eval()
    if not isinstance(model, Captured):
        raise LoraFxError(
            f"cannot run {type_of(model)}", "pass capture(model, args) or an .onnx file"
        )
    if adapter is None:
        return plain(model)
    return insert(model, adapter=adapter, dead="allow").eval()


def _fits(model: object, adapter: Adapter) -> Report:
    """Report how many keys of an adapter fit a model, and the targets without an update."""
    from lora_fx.fx.capture.capture import Captured
    from lora_fx.fx.load.loaded_model import LoadedModel
    from lora_fx.passes.verbs.adapt import find
    from lora_fx.passes.verbs.open import captured_of
    from lora_fx.passes.verbs.options import CaptureOptions

    if is_path(model) or isinstance(model, (Captured, LoadedModel)):
        model = captured_of(model, CaptureOptions(meta=True, adapter=adapter))
    targets = find(model)
    bound = bind(adapter, targets)
    untouched = [
        target.key
        for target in targets.targets
        if target.default and target.key not in bound.entries
    ]
    details = {"fits": len(bound.lowrank), "whole": len(bound.full), "untouched": untouched}
    return Report("verify", True, details=details)


def is_path(value: object) -> TypeGuard[str | PathLike[str]]:
    """Whether a model is given as a path or a name."""
    return isinstance(value, (str, PathLike))


def is_onnx(value: object) -> TypeGuard[str | PathLike[str]]:
    """Whether a model is the path of an .onnx file."""
    return is_path(value) and str(value).endswith(".onnx")
