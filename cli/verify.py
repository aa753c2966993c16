"""lora-fx verify: compare models or tensor files, or check one file or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_fx.cli.adapter_arguments import adapter_of, split_weight
from lora_fx.cli.data_arguments import load_npz
from lora_fx.cli.file_command import ReportCommand
from lora_fx.cli.model_argument import captured
from lora_fx.cli.model_options import ModelOptions
from lora_fx.cli.model_page import show_graph
from lora_fx.cli.options import Rules, option_group
from lora_fx.cli.output import emit
from lora_fx.errors import NoSay
from lora_fx.text import JsonView

if TYPE_CHECKING:
    from lora_fx.passes.verbs.options import Provider


def _alone(asked: JsonView) -> bool:
    return asked["b"] is None


def _fits(asked: JsonView) -> bool:
    from lora_fx.formats.io import is_adapter

    return not _alone(asked) and is_adapter(asked["b"])


def _tensors(asked: JsonView) -> bool:
    if _alone(asked) or asked["run"]:
        return False
    return _of_tensors(asked["a"], asked["b"])


def _of_tensors(a: str, b: str) -> bool:
    """True if `a` is a tensor file and `b` is one too, is an adapter, or does not exist."""
    from lora_fx.checkpoint.verify import is_tensor_file
    from lora_fx.formats.io import is_adapter

    if not is_tensor_file(a):
        return False
    is_missing = ":" not in b and not Path(b).exists()
    return is_adapter(b) or is_tensor_file(b) or is_missing


def _onnx(asked: JsonView) -> list[bool]:
    return [str(asked[name]).endswith(".onnx") for name in "ab"]


MODEL = ("weights", "dynamic", "static", "no_repeat")
NO_SAY: Rules = (
    NoSay(
        ("adapters", "inputs_file", "run", "everything", *MODEL), _alone,
        "for {0[a]} alone, which is run on its own probe",
        "leave it out, or name the model to compare with",
    ),
    NoSay(
        ("adapters", "tol", "everything", "provider"), _fits,
        "with {0[b]}, an adapter: names and shapes are compared",
    ),
    NoSay(
        ("inputs_file", "provider", *MODEL), _tensors,
        "for {0[a]}, whose tensors are compared", "leave it out, or pass --run",
    ),
    NoSay(
        ("everything",), lambda asked: not (_tensors(asked) and asked["adapters"]),
        "except for tensor files with an --adapter, where every row is computed again",
    ),
    NoSay(
        ("inputs_file", *MODEL), lambda asked: _fits(asked) and _onnx(asked)[0],
        "for {0[a]}, whose names and shapes are compared",
    ),
    NoSay(
        MODEL, lambda asked: all(_onnx(asked)),
        "for {0[a]} and {0[b]}, which are already graphs",
    ),
    NoSay(("provider",), lambda asked: not any(_onnx(asked)), "when no .onnx file is run"),
)  # fmt: skip


@click.command("verify", cls=ReportCommand, no_say=NO_SAY)
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[:W]",
    help="Apply this adapter to B, or to the model that is not an .onnx file; of tensor "
    "files A has it merged.",
)
@click.option(
    "--tol",
    type=float,
    help="Accept max|a - b| / max|b| up to this.  [default: 2e-6; tensor files 0]",
)
@click.option(
    "--all", "everything", is_flag=True, help="Compute every row again, in place of a sample."
)
@click.option("--run", is_flag=True, help="Run tensor files as models and compare their outputs.")
@click.option(
    "--provider", show_default="auto", help="Run ONNX Runtime on auto, cpu, cuda or webgpu."
)
@option_group("capture", ModelOptions)
def command(
    a: str,
    b: str | None,
    adapters: tuple[str, ...],
    tol: float | None,
    everything: bool,
    run: bool,
    provider: Provider | None,
    capture: ModelOptions,
) -> None:
    r"""Compare models A and B, check that adapter B fits model A, or check file A alone.

    Without B, an exported .onnx or .pt2 file or a merged folder is run on the probe that it holds:
    it says whether the base is the same, whether each adapter takes effect, and where it can tell,
    what is wrong.

    Two Hugging Face folders or .safetensors files are compared tensor by tensor; with --adapter, A
    must equal B with the adapter merged. Other models are run on the same inputs, and their outputs
    are compared.

    Exit codes: 0 if they are equal within the tolerance, 1 if they differ, 2 if they cannot be
    compared.

    \b
    lora-fx verify model.onnx
    lora-fx verify model.onnx --provider cuda
    lora-fx verify ./merged
    lora-fx verify ./merged ./llama --adapter ./adapter
    lora-fx verify bert.onnx ./my-bert --adapter ./adapter
    lora-fx verify merged.onnx bert.onnx --adapter ./adapter
    lora-fx verify ./my-bert ./adapter
    lora-fx verify switch.onnx de.onnx_adapter
    """
    from lora_fx.checkpoint.prove import ROWS
    from lora_fx.checkpoint.verify import lines
    from lora_fx.formats.io import is_adapter
    from lora_fx.passes.verbs.verify import refuse_adapter_as_model, refuse_missing, verify

    refuse_missing(a)
    if b is None:
        report = verify(a, tol=tol, provider=provider)
        emit(lines(report), **{**report.to_json(), "inputs": [{"a": a}]})
        click.get_current_context().exit(0 if report else 1)
    refuse_missing(b)
    refuse_adapter_as_model(a, b)
    fits = is_adapter(b)
    if not run and _of_tensors(a, b):
        rows = None if everything else ROWS
        beside = [_with_weight(text) for text in adapters]
        report = verify(a, b, adapter=beside or None, tol=tol, rows=rows)
    elif fits and a.endswith(".onnx"):
        show_graph(a)
        report = verify(a, b)
    elif fits:
        adapter = adapter_of(b)  # before the model, which takes longer to open
        report = verify(captured(a, capture, meta=True), adapter)
    else:
        from lora_fx.onnx.session import check_provider

        check_provider(provider or "auto")
        loaded = [adapter_of(path).weighted(w) for path, w in map(split_weight, adapters)]
        arrays = load_npz(capture.inputs_file) or None
        one, two = (m if m.endswith(".onnx") else captured(m, capture) for m in (a, b))
        applied = loaded[0] if len(loaded) == 1 else loaded or None
        report = verify(one, two, arrays, adapter=applied, tol=tol, run=run, provider=provider)
    fields = {**report.to_json(), "inputs": [{"a": a, "b": b}]}
    emit(lines(report), **fields)
    click.get_current_context().exit(0 if report else 1)


def _with_weight(text: str) -> str | tuple[str, float]:
    """Split `ADAPTER:W` into (path, W); without a weight, return the path."""
    path, weight = split_weight(text)
    return text if path == text else (path, weight)
