"""verify: compare two models; tensor files are compared as tensors, other models are run.

Comparing tensors needs neither torch nor onnx, so what runs models is imported only where one is
run.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.merge import Adapters
from lora_fx.checkpoint.prove import ROWS
from lora_fx.checkpoint.verify import fits_files, is_tensor_file, verify_files
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, NoSay, expect, given_options, near_path, refuse_no_say
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.formats.detect import is_foreign_model
from lora_fx.formats.io import AdapterLike, is_adapter, load_adapter
from lora_fx.formats.probe_beside import check_probe
from lora_fx.formats.registry import FORMATS
from lora_fx.inputs import Named, expect_arrays
from lora_fx.onnx.validity import blaming
from lora_fx.passes.verbs.verify_onnx import verify_onnx
from lora_fx.passes.verbs.verify_run import RunOptions, is_onnx, is_path, verify_run
from lora_fx.text import Json, JsonView

if TYPE_CHECKING:
    from lora_fx.passes.verbs.options import Provider


@dataclass(frozen=True)
class Compared:
    """The kind of a comparison, which the rules of verify's options read.

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
        "when verify checks whether an adapter fits: it compares names and shapes",
    ),
    NoSay(
        ("inputs", "provider"), lambda c: c.tensors,
        "when tensors are compared", "leave it out, or pass --run",
    ),
    NoSay(
        ("rows",), lambda c: not (c.tensors and c.adapted),
        "except for tensor files with an adapter, whose rows it samples",
    ),
    NoSay(("provider",), lambda c: not c.onnx, "when no .onnx file is run"),
)  # fmt: skip


ALONE: tuple[NoSay[object], ...] = (
    NoSay(
        ("inputs", "adapter", "run"), lambda _: True,
        "for a file alone, which is run on its own probe",
        "leave it out, or name the model to compare with",
    ),
    NoSay(("provider",), lambda path: not is_onnx(path), "when no .onnx file is run"),
)  # fmt: skip
"""The rules for the options of a verification of one file."""


@blaming
def verify(
    a: object,
    b: Any = None,
    inputs: Named | None = None,
    *,
    adapter: Adapters | None = None,
    tol: float | None = None,
    provider: Provider | None = None,
    run: bool = False,
    rows: int | None = ROWS,
    trust: bool = False,
) -> Report:
    """Compare two models, or one file with its own probe; `bool(report)` is the answer.

    Without `b`, the file `a` is run on the input that it holds, with its base and each of its
    adapters, and compared with what the outputs were when it was made (docs/probe.md).

    Two tensor files (Hugging Face folders or `.safetensors`) are compared tensor by tensor,
    everything else output by output at three sizes.

    Args:
        a: A tensor file, a captured module, a Captured, an .onnx or .pt2 file, what load_model
            returned, or a model's name as on the command line.
        b: Another one, the reference; or an Adapter or its path: does it fit `a`? None, where `a`
            is a file with a probe.
        inputs: Arrays by input name, instead of sampled ones.
        adapter: Where models are run, it goes into whichever of the two is not an .onnx file (b
            where both are or neither is). Of tensor files: `a` should be `b` with it merged; also
            several, and pairs (adapter, weight).
        tol: Gate on max|a − b| / max|b|: of each output, 2e-6; of each tensor, 0.
        provider: The provider of .onnx files: auto, the default, cpu, cuda or webgpu.
        run: Run tensor files too, as models.
        rows: With adapters of tensor files, rows of every touched tensor that are computed again;
            None for all.
        trust: Read pickles, by torch's unpickler that runs no code.

    Raises:
        LoraFxError: What cannot be compared; an adapter that does not fit; a provider that cannot
            be used.
    """
    with trusting(trust):
        expect_arrays(inputs)
        expect(tol or 0, Real, "tol", "a number", "pass --tol 1e-5, for example")
        if tol is not None and not 0 <= tol < math.inf:
            raise LoraFxError(
                f"tol is {tol:g}; expected a finite number, 0 or more",
                "pass --tol 1e-5, for example",
            )
        model = _local(a)
        if b is None:
            alone: Json = {"inputs": inputs, "adapter": adapter, "run": run, "provider": provider}
            return _verify_alone(model, alone, tol)
        reference = _local(b)
        refuse_missing(model)
        refuse_missing(reference)
        refuse_adapter_as_model(model, reference)

        fits = _is_adapter(reference)
        kind = Compared(
            fits=fits,
            tensors=is_tensor_file(model) and not run and (fits or is_tensor_file(reference)),
            adapted=adapter is not None,
            onnx=is_onnx(model) or is_onnx(reference),
        )
        keywords = {
            "inputs": inputs,
            "adapter": adapter,
            "tol": tol,
            "provider": provider,
            "run": run,
            "rows": _spelling_of_rows(rows),
        }
        refuse_no_say(VERIFY_RULES, kind, given_options(keywords))
        if kind.tensors and is_path(model):
            if fits:
                return fits_files(model, reference)
            return verify_files(model, reference, adapter, tol=tol or 0.0, rows=rows)
        _check_provider(provider)
        if fits and is_onnx(model):
            return fits_switch(model, reference)
        options = RunOptions(inputs, adapter, tol, provider or "auto")
        if is_onnx(model) and is_onnx(reference):
            return verify_onnx(model, reference, options)
        if fits and not isinstance(reference, Adapter):
            reference = load_adapter(reference)
        return verify_run(model, reference, options)


def _verify_alone(model: Any, asked: JsonView, tol: float | None) -> Report:
    """Compare a file with its own probe.

    Args:
        model: The file.
        asked: What else was asked for, by option.
        tol: As in `verify`.

    Raises:
        LoraFxError: What is no file, or an option that has no effect.
    """
    if not is_path(model):
        raise LoraFxError(
            "a model alone has no probe: expected a file, or two models",
            "pass the path of a file that lora-fx export wrote, or the model to compare with",
        )
    refuse_missing(model)
    refuse_no_say(ALONE, model, given_options(asked))
    if is_onnx(model):
        _check_provider(asked["provider"])
        from lora_fx.passes.verbs.verify_probe import verify_probe

        return verify_probe(model, provider=asked["provider"] or "auto", tol=tol)
    if os.fspath(model).endswith(".pt2"):
        from lora_fx.passes.verbs.verify_program import verify_program

        return verify_program(model, tol=tol)
    if is_tensor_file(model) and Path(model).exists():
        from lora_fx.passes.verbs.verify_checkpoint import verify_checkpoint

        return verify_checkpoint(model, tol=tol)
    raise _not_run_alone(os.fspath(model))


def _not_run_alone(path: str) -> LoraFxError:
    """Return the error for a file that is nothing to run."""
    if is_foreign_model(path):
        return LoraFxError(
            f"{path}: its model is run by other programs",
            "serve it, and ask the server: lora-fx probe ADAPTER --server URL --model NAME",
        )
    if _is_adapter(path):
        check_probe(path)
        return LoraFxError(
            f"{path} is an adapter, which runs only in a model",
            f"check whether it fits one: lora-fx verify MODEL {path}; or ask the server that "
            f"serves it: lora-fx probe {path} --server URL --model NAME",
        )
    return LoraFxError(
        f"{path}: verify asks .onnx and .pt2 files and merged folders alone",
        f"name what it should equal: lora-fx verify {path} MODEL",
    )


def _check_provider(provider: str | None) -> None:
    """Raise for a provider that cannot be used, before a model is opened."""
    from lora_fx.onnx.session import check_provider  # a comparison of tensors needs no onnx

    check_provider(provider or "auto")


def _local(model: Any) -> Any:
    """Return the model, or the local path of a model on the hub."""
    return local(model, files=FORMATS.files_of_folders) if is_path(model) else model


def refuse_missing(model: object) -> None:
    """Raise for a path that does not exist, before anything is loaded or run.

    A name with a colon is a factory or timm:NAME; of `file.py:FACTORY` the file has to exist.
    """
    if not is_path(model):
        return
    name = os.fspath(model)
    file = name.rpartition(":")[0]
    path = file if file.endswith(".py") else name
    if ":" not in path and not Path(path).exists():
        raise LoraFxError(f"{path}: cannot be read: no such file or folder", near_path(path))


def _is_adapter(model: object) -> bool:
    return isinstance(model, Adapter) or (is_path(model) and is_adapter(model))


def _spelling_of_rows(rows: int | None) -> int | str | None:
    """Return the option `rows` as the user spelled it; None for the default."""
    if rows == ROWS:
        return None
    return "all" if rows is None else rows


def refuse_adapter_as_model(a: object, b: object) -> None:
    """Raise if A, which must be a model, is an adapter.

    Raises:
        LoraFxError: Says what can be asked of two adapters, or of an adapter and a model.
    """
    if not _is_adapter(a):
        return
    name = os.fspath(a) if is_path(a) else "A"
    if _is_adapter(b):
        other = os.fspath(b) if is_path(b) else "B"
        raise LoraFxError(
            f"{name} and {other} are adapters; expected at least one model",
            "merge each into its base with lora-fx merge, and compare the results",
        )
    model = os.fspath(b) if is_path(b) else "MODEL"
    raise LoraFxError(
        f"{name} is an adapter; expected a model",
        f"run lora-fx verify {model} {name} to check whether it fits",
    )


def fits_switch(path: str | PathLike[str], adapter: AdapterLike) -> Report:
    """Check, without running anything, that an adapter fits a switchable ONNX file.

    Raises:
        LoraFxError: It does not, or the file is not switchable.
    """
    from lora_fx.onnx.feeds import tensors_of
    from lora_fx.onnx.manifest import manifest_of

    manifest = manifest_of(path)
    tensors, _ = tensors_of(adapter, manifest, path)
    adapted = sum(slot.a in tensors for slot in manifest.slots.values())
    details = {"targets": len(manifest.slots), "adapted": adapted}
    if manifest.whole:
        replaced = [slot.name for slot in manifest.whole.values() if slot.name in tensors]
        details |= {"whole_tensors": len(manifest.whole), "replaced": len(replaced)}
    return Report("verify", True, details=details)
