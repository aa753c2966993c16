"""export: write a model as an ONNX file that is proven equal before it gets its name.

The mode, and the kind of the model (torch or an .onnx file), decide which module does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.exact_lora import as_exact_lora
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, expect, expect_path, given_options, refuse_no_say
from lora_fx.files.atomic import check_output
from lora_fx.files.run_files import remember, remembering
from lora_fx.formats.io import AdapterLike, adapter_name, as_adapter
from lora_fx.inputs import Dynamic, Named
from lora_fx.onnx.genai import GenaiFolder, genai_folder
from lora_fx.onnx.made_for import CPU, PORTABLE
from lora_fx.onnx.save import EXTERNAL_OVER
from lora_fx.onnx.session import check_provider
from lora_fx.onnx.triton import repository_of
from lora_fx.passes.verbs.export_files import named_adapters
from lora_fx.passes.verbs.export_onnx import export_onnx
from lora_fx.passes.verbs.export_options import (
    EXPORT_RULES,
    REWRITE_RULES,
    ExportOptions,
    expect_ending,
)
from lora_fx.passes.verbs.merge import is_onnx
from lora_fx.passes.verbs.modes import ModeOptions, options_of_mode
from lora_fx.passes.verbs.options import (
    KNOWN_WITH_CACHE,
    CaptureOptions,
    ExportAdapters,
    Provider,
    Selectors,
)
from lora_fx.passes.verbs.refused_updates import check_adapters
from lora_fx.progress import Listener, told
from lora_fx.text import Json, StrPath

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss
    from lora_fx.passes.verbs.quantise import Wanted


Mode = Literal["merged", "switch", "load", "batch", "train"]
MadeFor = Literal["cpu", "cuda", "webgpu", "portable"]
ProbeKind = Literal["full", "short", "none"]
Precision = Literal["float32", "bfloat16", "float16", "int8", "fp32", "bf16", "fp16"]


@told
@remembering()
def export(
    model: object,
    path: str | PathLike[str],
    args: Sequence[object] = (),
    kwargs: Named | None = None,
    *,
    adapters: AdapterLike | Mapping[str, AdapterLike] | Sequence[AdapterLike] | None = None,
    mode: Mode | ModeOptions = "merged",
    include: Selectors = None,
    exclude: Selectors = None,
    rank: int | None = None,
    scales: bool = False,
    names: Mapping[str, str] | None = None,
    inputs: Named | None = None,
    provider: Provider = "auto",
    target: MadeFor = "cpu",
    opset: int | None = None,
    external_over: int | None = None,
    dynamic: Dynamic | None = None,
    static: Sequence[str] = (),
    force: bool = False,
    optimise: bool = False,
    precision: Precision | None = None,
    triton: str | PathLike[str] | None = None,
    max_batch: int | None = None,
    cache: bool = False,
    genai: str | PathLike[str] | None = None,
    within: bool = False,
    quantise: Wanted | None = None,
    accuracy_level: int = 0,
    loss: str | Loss | None = None,
    optimizer: str | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    tol: float | None = None,
    repeat: bool = True,
    probe: ProbeKind = "full",
    progress: Listener | None = None,
) -> Report:
    """Write an ONNX file of a model with an adapter folded in, or with switchable targets.

    Where the path ends in .pt2, mode switch writes a program of torch whose A and B are inputs.
    In mode merged the fold is compared with the unfolded module, and ONNX Runtime's outputs with
    the unfolded module's, at three sizes; only then the file gets its name.

    Args:
        model: A module that insert returned (its adapter is folded), a module, a Captured, a path
            as on the command line, or an .onnx file.
        path: Where to write; `PATH.data` beside it when the weights are large.
        args: Example inputs, for a model that is not captured yet.
        kwargs: Example inputs by keyword.
        adapters: What to fold instead, or its path; for the other modes {name: adapter}, or a list,
            of which paths are named after their last part and others adapter_1, adapter_2 …
            Those of switch and load are written beside the file as `NAME.onnx_adapter`; beside a
            .pt2 and a portable file as `NAME.safetensors`.
        mode: merged; switch: adapters are chosen run by run (lora_fx.onnx.Session); load: one is
            chosen when a session is made; batch: one graph whose rows use different adapters
            (docs/export.md); train: a training step, beside its forward (docs/train-onnx.md).
            What belongs to one mode is said by lora_fx.Switch(…), Load(…), Batch(…), TrainStep(…).
        include: Of mode switch, load and train; see lora_fx.Switch.
        exclude: The same.
        rank: Of mode load and train, and of a .pt2 file; see lora_fx.Load, TrainStep and Switch.
        scales: Of mode batch; see lora_fx.Batch.
        names: For an .onnx file, adapter key → tensor, where the names do not tell.
        inputs: Arrays by input name for the check, instead of sampled ones.
        provider: What proves the file: auto, cpu, cuda or webgpu.
        target: What the file is made for: cpu, cuda, webgpu or portable. It computes the same
            everywhere; for a device, nodes that its provider has no kernel for are written in
            another form; a portable file runs in other runtimes too (docs/runtimes).
        opset: ONNX operator set; 20 by default. An .onnx file keeps its own.
        external_over: Bytes of weights above which they go to a file of their own; 256 MiB by
            default. A training step has such a file always.
        dynamic: As in capture.
        static: The same.
        force: Replace an existing file.
        optimise: Rewrite the graph for ONNX Runtime, every stage kept only where it is proven.
        precision: In merged, float16 (nodes that need float32 keep it) or int8 (dynamic; weights by
            channel); what it costs is measured, said, and held to a gate. A bfloat16 model is in
            float32; bfloat16 keeps it.
        triton: A folder of models for Triton, which gets a copy as the next version of the file's
            stem (docs/serving.md).
        max_batch: With triton, above 0: the server may put requests together, up to so many rows.
        cache: For a decoder of transformers, in all modes but train: its key-value cache goes in
            and comes out as tensors. The inputs are known, so none are given. An encoder-decoder,
            in merged and switch, becomes two files, `X-encoder.onnx` and `X.onnx`.
        genai: With cache, in merged and switch: a folder for onnxruntime-genai, with a copy of the
            file and the tokenizer of the model's own folder (docs/serving.md).
        within: You keep to the sizes that the report's `ranges` name: leave the nodes out that fail
            at others.
        quantise: As in insert: weights of the base become codes of 4 or 8 bits, products over them
            are ONNX Runtime's own, and adapters stay branches in float (switch and batch).
        accuracy_level: Of products over int4 and int8 codes: 0 computes in floats, 4 takes x in
            int8, which is faster, rounds, and is held to a gate of its own.
        loss: Of mode train; see lora_fx.TrainStep.
        optimizer: The same.
        weight_decay: The same.
        clip: The same.
        tol: Instead of the gate of float16, int8 or level 4, and above it: the largest max|a − b| /
            max|b| of an output that is accepted. What was reached is reported; the fold, and files
            without such a precision, keep their gates.
        repeat: Trace and translate what a model has many times, its layers, once. False goes the
            exporter's own way, which takes longer and gives a file that computes the same.
        probe: The file gets an input of ours and what the outputs are on it, by which
            lora_fx.verify(path) tells anywhere whether its adapters take effect (docs/probe.md).
            full; short, without groups of targets; or none.
        progress: Called with a line once a stage of the work has taken a second, and at its end.

    Raises:
        NoEffectError: The outputs differ; nothing is written.
    """
    if isinstance(model, (str, PathLike)):
        remember(model)
    expect_path(path, "path", "call export(model, path, args)")
    expect_ending(path)
    keywords: Json = {
        "include": include, "exclude": exclude, "rank": rank, "scales": scales, "loss": loss,
        "optimizer": optimizer, "weight_decay": weight_decay, "clip": clip,
    }  # fmt: skip
    mode_name, of_mode = options_of_mode(mode, keywords)
    opened = opened_adapters(adapters, mode_name)
    capture = CaptureOptions(
        args=args, kwargs=kwargs, dynamic=dynamic, static=static, repeat=repeat, cache=cache
    )
    options = ExportOptions(
        target=Path(path), adapters=opened, mode=mode_name, names=names, inputs=inputs,
        provider=provider, made_for=target, opset=opset,
        external_over=EXTERNAL_OVER if external_over is None else external_over,
        capture=capture, force=force, optimise=optimise, precision=precision,
        places=repository_of(triton, path, max_batch), within=within,
        accuracy_level=accuracy_level, tol=tol, probe=probe, **of_mode,
    )  # fmt: skip
    check_output(path, force=force)
    spellings = given_options({"external_over": external_over, "inputs": inputs, "within": within})
    return export_as(model, options, spellings, quantise=quantise, genai=genai)


@told
@remembering()
def export_as(
    model: object,
    options: ExportOptions,
    given: Mapping[str, str],
    *,
    quantise: Wanted | None = None,
    genai: StrPath | None = None,
) -> Report:
    """Export as `export` does, with the options as one object.

    Args:
        model: As in export.
        options: What is asked for.
        given: Those of external_over, inputs and within that were given, each as the user spells
            it.
        quantise: As in export.
        genai: As in export.

    Raises:
        LoraFxError: A provider that cannot be used, or an option that has no effect for the model
            or the mode.
        NoEffectError: The outputs differ; nothing is written.
    """
    check_provider(options.provider)
    file = None
    if isinstance(model, (str, PathLike)) and is_onnx(model):
        file = fspath(model)
    notes: list[str] = []
    if not (file and options.mode == "merged"):
        options, notes = _checked(options)
    refuse_no_say(EXPORT_RULES, options, given)
    refuse_genai(genai, options.mode, cache=options.capture.cache)
    if options.is_program:
        _refuse_for_program(file, options.target, quantise, genai)
    if genai is not None and any(adapter.invocation for adapter in _adapters_of(options)):
        raise LoraFxError(
            "onnxruntime-genai gives a run no adapter_starts, from which on an aLoRA acts",
            "leave --genai out, or the aLoRA",
        )
    if genai is not None and options.mode == "switch" and options.made_for == PORTABLE:
        raise LoraFxError(
            "onnxruntime-genai gives a run of the base no A and B, which a portable file requires",
            "leave --target portable out for --genai",
        )
    if options.capture.cache:
        model, options, notes_of_copy = _with_cache(model, options, genai)
        notes += notes_of_copy

    if file is not None:
        _refuse_for_graph(file, options, quantise)
        refuse_no_say(REWRITE_RULES, options, given)
        report = export_onnx(file, options)
        return replace(report, warnings=(*notes, *report.warnings))

    if options.names:
        raise LoraFxError(
            "names are for .onnx files", "leave names out: a torch model has its own names"
        )
    if options.capture.cache:
        from lora_fx.passes.verbs.export_encoder_decoder import export_parts, has_parts

        if has_parts(model):
            report = export_parts(model, options, _export_part, quantise=bool(quantise))
            return replace(report, warnings=(*notes, *report.warnings))
    if quantise:
        model, options, notes_of_codes = _with_codes(model, options, quantise)
        notes += notes_of_codes
    return _export_model(model, options, notes)


def _export_part(model: object, options: ExportOptions) -> Report:
    """Export the capture of one part of an encoder-decoder."""
    return _export_model(model, options, ())


def _checked(options: ExportOptions) -> tuple[ExportOptions, list[str]]:
    """Return the options with LoRA for other methods of the same ΔW, and what has to be said.

    Raises:
        LoraFxError: An adapter that a file of this mode cannot hold; no model is captured yet.
    """
    adapters = options.adapters
    if not adapters:
        return options, []
    if isinstance(adapters, Adapter):
        check_adapters({"the adapter": adapters}, options.mode)
        exact_adapter, of_adapter = as_exact_lora(adapters)
        return replace(options, adapters=exact_adapter), of_adapter

    named = named_adapters(adapters)
    check_adapters(named, options.mode)
    exact: dict[str, Adapter] = {}
    notes: list[str] = []
    for name, adapter in named.items():
        exact[name], notes_of_adapter = as_exact_lora(adapter, name)
        notes += notes_of_adapter
    return (replace(options, adapters=exact) if notes else options), notes


def _adapters_of(options: ExportOptions) -> Sequence[Adapter]:
    """Return the adapters of an export."""
    if options.adapters is None or isinstance(options.adapters, Adapter):
        return [options.adapters] if options.adapters is not None else []
    return [*named_adapters(options.adapters).values()]


def _with_codes(
    model: object, options: ExportOptions, quantise: Wanted
) -> tuple[object, ExportOptions, list[str]]:
    """Return the quantised capture of a model, the options with its adapters, and notes."""
    if options.mode == "train":
        raise LoraFxError("mode train computes gradients in float32 only", "leave quantise out")
    options.refuse_codes()
    halves_the_rest = options.precision == "float16" and options.made_for != CPU
    if options.precision is not None and not halves_the_rest:
        raise LoraFxError(
            f"precision {options.precision!r} with quantise: both set how weights are stored",
            "leave one of them out; float16 and codes of 4 or 8 bits go together in a file for a "
            "GPU (--target cuda)",
        )
    from lora_fx.passes.verbs.export_torch import quantised_base

    base, adapters, notes = quantised_base(model, options, quantise)
    return base, replace(options, adapters=adapters), notes


def _export_model(model: object, options: ExportOptions, notes: Sequence[str]) -> Report:
    """Export a torch model; try again with eager attention if that may help."""
    from lora_fx.passes.verbs.eager_attention import eager, may_help
    from lora_fx.passes.verbs.export_memory import check_export

    check_export(model, options)
    run = _exporter(options)
    try:
        report = run(model, options)
        return replace(report, warnings=(*notes, *report.warnings))
    except LoraFxError as e:
        if not may_help(model, e):
            raise
        with eager(model) as eager_model:
            report = run(eager_model, options)
        warning = (
            f"exported with eager attention, since the model's own attention failed: {e.message}"
        )
        return replace(report, warnings=(*notes, *report.warnings, warning))


def _exporter(options: ExportOptions) -> Callable[[object, ExportOptions], Report]:
    """Return the function that exports a torch model in a mode, as a file of a kind."""
    mode = options.mode
    if options.is_program:
        from lora_fx.passes.verbs.export_pt2 import export_pt2

        return export_pt2
    if mode == "merged":
        from lora_fx.passes.verbs.export_merged import export_merged

        return export_merged
    if mode == "train":
        from lora_fx.passes.verbs.export_train import export_step

        return export_step
    from lora_fx.passes.verbs.export_slots import export_slots

    return export_slots


def refuse_genai(genai: StrPath | None, mode: str, *, cache: bool) -> None:
    """Raise for a --genai folder if onnxruntime-genai cannot run the exported file."""
    if genai is None or (cache and mode in ("merged", "switch")):
        return
    with_cache = "with" if cache else "without"
    raise LoraFxError(
        f"onnxruntime-genai cannot run a file of mode {mode} {with_cache} a cache",
        "use --cache with --mode merged or --mode switch; or leave --genai out",
    )


def _with_cache(
    model: object, options: ExportOptions, genai: StrPath | None
) -> tuple[object, ExportOptions, list[str]]:
    """Return the capture of a decoder with its key-value cache, the changed options, and notes."""
    if options.inputs:
        raise LoraFxError(*KNOWN_WITH_CACHE)
    if isinstance(model, (str, PathLike)) and is_onnx(model):
        raise LoraFxError(
            f"{fspath(model)} is an .onnx graph already: export cannot add a cache to it",
            "export the model that the file was made from",
        )
    from lora_fx.passes.verbs.open import captured_of, opened, own_adapters

    model = opened(model)
    options = replace(options, adapters=own_adapters(model, options.adapters))
    if genai is None:
        return captured_of(model, options.capture), options, []

    def place_of_copy(config: object) -> GenaiFolder:
        return genai_folder(
            genai, options.target, config, force=options.force, made_for=options.made_for
        )

    captured = captured_of(model, replace(options.capture, check=place_of_copy))
    copy = place_of_copy(captured.model.config)
    return captured, replace(options, places=[*options.places, copy]), [*copy.notes]


def _refuse_for_program(
    file: str | None, target: Path, quantise: Wanted | None, genai: StrPath | None
) -> None:
    """Raise for a model, or for an option, that a .pt2 file cannot be made of or follow."""
    if file is not None:
        raise LoraFxError(
            f"{file} is an .onnx graph, and {target.name} would be a program of torch",
            "export the model that the file was made from, or write an .onnx file",
        )
    if quantise:
        raise LoraFxError(
            f"{target.name}: codes of 4 or 8 bits are read by an operator of lora-fx, which other "
            "runtimes do not have",
            "leave quantise out, or write an .onnx file",
        )
    if genai is not None:
        raise LoraFxError(
            f"{target.name}: onnxruntime-genai reads .onnx files", "write an .onnx file"
        )


def _refuse_for_graph(file: str, options: ExportOptions, quantise: Wanted | None) -> None:
    """Raise for options that do not apply to an .onnx file, which is already a graph."""
    capture = options.capture
    example = capture.args or capture.kwargs or capture.dynamic or capture.static
    if example or options.opset or not capture.repeat:
        raise LoraFxError(
            f"{file} is an .onnx graph already: args, kwargs, dynamic, static, opset and repeat "
            "have no effect",
            "leave them out; pass real data with inputs={name: array}",
        )
    if options.mode == "train":
        raise LoraFxError(
            f"{file}: mode train needs a torch model, to derive the gradients from",
            "export the model that the file was made from; or add branches to the file with "
            "lora-fx insert",
        )
    if quantise or options.accuracy_level:
        raise LoraFxError(
            f"{file}: quantise and accuracy_level are for torch models",
            "quantise the file with onnxruntime's tools; lora-fx reads the result",
        )


def opened_adapters(
    given: AdapterLike | Mapping[str, AdapterLike] | Sequence[AdapterLike] | None, mode: str
) -> ExportAdapters | None:
    """Return the adapters of an export; a path is read, and its last part names the adapter.

    In mode merged it is one adapter, or none.
    """
    if given is None or isinstance(given, Adapter):
        return given
    if mode == "merged" and isinstance(given, (str, PathLike)):
        return as_adapter(given)
    adapters = _adapters_by_name(given)
    if mode != "merged":
        return adapters
    if len(adapters) != 1:
        raise LoraFxError(
            f"mode merged takes one adapter, not {len(adapters)}",
            "pass adapters=ADAPTER; lora_fx.adapter.adapter.mix combines several",
        )
    (adapter,) = adapters.values()
    return adapter


def _adapters_by_name(
    given: str | PathLike[str] | Mapping[str, AdapterLike] | Sequence[AdapterLike],
) -> dict[str, Adapter]:
    """Return adapters by name: their own, or the last part of a path, or adapter_1 and so on."""
    if isinstance(given, Mapping):
        return {name: as_adapter(adapter) for name, adapter in given.items()}

    expect(
        given, (str, PathLike, Iterable), "adapters", "adapters", "pass adapters=[first, second, …]"
    )
    adapters = [given] if isinstance(given, (str, PathLike)) else list(given)
    paths = [adapter for adapter in adapters if isinstance(adapter, (str, PathLike))]
    if len(paths) < len(adapters):
        return {f"adapter_{i}": as_adapter(adapter) for i, adapter in enumerate(adapters, 1)}

    by_last_part: dict[str, Adapter] = {}
    for path in paths:
        name = adapter_name(path)
        if name in by_last_part:
            raise LoraFxError(
                f"two adapters are called {name!r}", "give each a name: adapters={name: path, …}"
            )
        by_last_part[name] = as_adapter(path)
    return by_last_part
