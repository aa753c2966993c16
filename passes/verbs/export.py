"""export: a model as an ONNX file that is proven equal before it gets its name.

Which file does the work depends on the mode, and on whether the model is in torch or an .onnx file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, expect, expect_path, given_options, refuse_no_say
from lora_fx.files.atomic import check_output
from lora_fx.files.read import remember, remembering, scratch_folder
from lora_fx.formats.io import AdapterLike, adapter_name, as_adapter
from lora_fx.inputs import Dynamic, Named
from lora_fx.onnx.batch import batch_symbol
from lora_fx.onnx.genai import GenaiFolder, genai_folder
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.load import load
from lora_fx.onnx.manifest import check_no_slots
from lora_fx.onnx.match import Matched, match
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.save import EXTERNAL_OVER, is_external
from lora_fx.onnx.triton import repository_of
from lora_fx.onnx.validity import blaming
from lora_fx.passes.batch import StoredWeight
from lora_fx.passes.find import find
from lora_fx.passes.fold import Fold
from lora_fx.passes.proofs.merged_tensors import prove_merge
from lora_fx.passes.proofs.onnx_reference import reference_of
from lora_fx.passes.verbs.export_files import (
    by_name,
    named,
    optimise_file,
    write_batch,
    write_switch,
)
from lora_fx.passes.verbs.merge import is_onnx, merge_onnx
from lora_fx.passes.verbs.modes import ModeOptions, options_of_mode
from lora_fx.passes.verbs.options import (
    EXPORT_RULES,
    KNOWN_WITH_CACHE,
    REWRITE_RULES,
    CaptureOptions,
    ExportAdapters,
    ExportOptions,
    Provider,
    Selectors,
    check_adapters,
    exclude_hint,
)
from lora_fx.progress import Listener, told
from lora_fx.targets.target import Found
from lora_fx.text import Json, StrPath

if TYPE_CHECKING:
    from lora_fx.fx.train.loss import Loss
    from lora_fx.passes.verbs.quantise import Wanted


Mode = Literal["merged", "switch", "load", "batch", "train"]
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
    opset: int | None = None,
    external_over: int | None = None,
    dynamic: Dynamic | None = None,
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
    progress: Listener | None = None,
) -> Report:
    """Write an ONNX file of a model with an adapter folded in, or with switchable targets.

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
            Those of switch and load are written beside the file as `NAME.onnx_adapter`.
        mode: merged; switch: adapters are chosen run by run (lora_fx.onnx.Session); load: one is
            chosen when a session is made; batch: one graph whose rows use different adapters
            (docs/export.md); train: a training step, beside its forward (docs/train-onnx.md).
            What belongs to one mode is said by lora_fx.Switch(…), Load(…), Batch(…), TrainStep(…).
        include: Of mode switch, load and train; see lora_fx.Switch.
        exclude: The same.
        rank: Of mode load and train; see lora_fx.Load and lora_fx.TrainStep.
        scales: Of mode batch; see lora_fx.Batch.
        names: For an .onnx file, adapter key → tensor, where the names do not tell.
        inputs: Arrays by input name for the check, instead of sampled ones.
        provider: auto, cpu or cuda.
        opset: ONNX operator set; 20 by default. An .onnx file keeps its own.
        external_over: Bytes of weights above which they go to a file of their own; 256 MiB by
            default. A training step has such a file always.
        dynamic: As in capture.
        force: Replace an existing file.
        optimise: Rewrite the graph for ONNX Runtime, every stage kept only where it is proven.
        precision: In merged, float16 (nodes that need float32 keep it) or int8 (dynamic; weights by
            channel); what it costs is measured, said, and held to a gate. A bfloat16 model is in
            float32; bfloat16 keeps it.
        triton: A folder of models for Triton, which gets a copy as the next version of the file's
            stem (docs/serving.md).
        max_batch: With triton, above 0: the server may put requests together, up to so many rows.
        cache: For a decoder of transformers, in all modes but train: its key-value cache goes in
            and comes out as tensors. The inputs are known, so none are given.
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
        progress: Called with a line once a stage of the work has taken a second, and at its end.

    Raises:
        NoEffectError: The outputs differ; nothing is written.
    """
    remember(*([model] if isinstance(model, (str, PathLike)) else []))
    expect_path(path, "path", "export(model, path, args)")
    keywords: Json = {
        "include": include, "exclude": exclude, "rank": rank, "scales": scales, "loss": loss,
        "optimizer": optimizer, "weight_decay": weight_decay, "clip": clip,
    }  # fmt: skip
    mode_name, of_mode = options_of_mode(mode, keywords)
    adapters = opened_adapters(adapters, mode_name)
    capturing = CaptureOptions(
        args=args, kwargs=kwargs, dynamic=dynamic, repeat=repeat, cache=cache
    )
    options = ExportOptions(
        target=Path(path), adapters=adapters, mode=mode_name, names=names, inputs=inputs,
        provider=provider,
        opset=opset, external_over=EXTERNAL_OVER if external_over is None else external_over,
        capture=capturing, force=force,
        optimise=optimise, precision=precision, places=repository_of(triton, path, max_batch),
        within=within, accuracy_level=accuracy_level, tol=tol,
        **of_mode,
    )  # fmt: skip
    check_output(path, force=force)
    given = given_options({"external_over": external_over, "inputs": inputs, "within": within})
    return export_as(model, options, given, quantise=quantise, genai=genai)


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
    """What `export` does, with its options as an object.

    Args:
        model: As in export.
        options: What is asked for.
        given: Those of external_over, inputs and within that were given, each as the user spells
            it.
        quantise: As in export.
        genai: As in export.

    Raises:
        LoraFxError: An option that has no say for the model or the mode.
        NoEffectError: The outputs differ; nothing is written.
    """
    file = fspath(model) if isinstance(model, (str, PathLike)) and is_onnx(model) else None
    adapters = options.adapters
    if adapters and not (file and options.mode == "merged"):  # before the model is captured
        adapters_by_name = (
            {"the adapter": adapters} if isinstance(adapters, Adapter) else named(adapters)
        )
        check_adapters(adapters_by_name, options.mode)
    refuse_no_say(EXPORT_RULES, options, given)
    refuse_genai(genai, options.mode, cache=options.capture.cache)
    notes: list[str] = []
    if options.capture.cache:
        model, options, notes = _with_cache(model, options, genai)
    if file:
        _refuse_for_graph(file, options, quantise)
        refuse_no_say(REWRITE_RULES, options, given)
        return export_onnx(file, options)
    if options.names:
        raise LoraFxError("names are for .onnx files", "the names of the model itself tell")
    from lora_fx.passes.verbs import export_torch

    if quantise and options.mode == "train":
        raise LoraFxError("a step computes gradients in float32 alone", "leave quantise out")
    if quantise:
        if options.precision is not None:
            raise LoraFxError(
                f"precision {options.precision!r} beside quantise: both say how weights are stored",
                "leave one out",
            )
        model, adapters, said = export_torch.quantised_base(model, options, quantise)
        notes += said
        options = replace(options, adapters=adapters)
    run = export_torch.export_merged if options.mode == "merged" else export_torch.export_slots
    if options.mode == "train":
        from lora_fx.passes.verbs.export_train import export_step

        run = export_step
    try:
        report = run(model, options)
        return replace(report, warnings=(*notes, *report.warnings))
    except LoraFxError as e:
        if not export_torch.may_help(model, e):
            raise
        with export_torch.eager(model) as again:
            report = run(again, options)
        failed = f"with eager attention, since the model's own failed: {e.message}"
        return replace(report, warnings=(*notes, *report.warnings, failed))


def refuse_genai(genai: StrPath | None, mode: str, *, cache: bool) -> None:
    """Raise for a folder of onnxruntime-genai beside a file that it does not run."""
    if genai is None or (cache and mode in ("merged", "switch")):
        return
    raise LoraFxError(
        f"onnxruntime-genai runs no file of mode {mode} with{'' if cache else 'out'} a cache",
        "--cache, with --mode merged or --mode switch; or leave --genai out",
    )


def _with_cache(
    model: object, options: ExportOptions, genai: StrPath | None
) -> tuple[object, ExportOptions, list[str]]:
    """The capture of a decoder with its key-value cache, its options, and notes."""
    if options.inputs:
        raise LoraFxError(*KNOWN_WITH_CACHE)
    if isinstance(model, (str, PathLike)) and is_onnx(model):
        raise LoraFxError(
            f"{fspath(model)} is a graph as it is, with a cache or without",
            "export the model that it was made from",
        )
    from lora_fx.passes.verbs.open import captured_of, opened, own_adapters

    model = opened(model)
    options = replace(options, adapters=own_adapters(model, options.adapters))
    if genai is None:
        return captured_of(model, options.capture), options, []

    def place_of_copy(config: object) -> GenaiFolder:
        return genai_folder(genai, options.target, config, force=options.force)

    captured = captured_of(model, replace(options.capture, check=place_of_copy))
    copy = place_of_copy(captured.model.config)
    return captured, replace(options, places=[*options.places, copy]), [*copy.notes]


def _refuse_for_graph(file: str, options: ExportOptions, quantise: Wanted | None) -> None:
    """Raise for options that an .onnx file, a graph as it is, has no place for."""
    asked = options.capture
    of_capture = asked.args or asked.kwargs or asked.dynamic
    if of_capture or options.opset or not asked.repeat:
        told = "args, kwargs, dynamic, opset and repeat have no say"
        raise LoraFxError(
            f"{file} is a graph as it is: {told}",
            "leave them out; inputs={name: array} gives real data",
        )
    if options.mode == "train":
        raise LoraFxError(
            f"{file}: gradients are derived from a model of torch",
            "export the model that the file was made from; lora-fx insert adds branches here",
        )
    if quantise or options.accuracy_level:
        raise LoraFxError(
            f"{file}: quantise and its accuracy level are for models of torch",
            "onnxruntime's quantisers make a file of codes, and lora-fx reads it",
        )


def opened_adapters(
    given: AdapterLike | Mapping[str, AdapterLike] | Sequence[AdapterLike] | None, mode: str
) -> ExportAdapters | None:
    """The adapters of an export, read where they are paths, which then are their names."""
    if given is None or isinstance(given, Adapter):
        return given
    if mode == "merged" and isinstance(given, (str, PathLike)):
        return as_adapter(given)
    if isinstance(given, Mapping):
        by_name = cast(Mapping[str, AdapterLike], given)  # an Adapter, also a mapping, is above
        return {name: as_adapter(a) for name, a in by_name.items()}
    expect(given, (str, PathLike, Iterable), "adapters", "adapters", "adapters=[first, second, …]")
    every = [given] if isinstance(given, (str, PathLike)) else list(given)
    paths = [a for a in every if isinstance(a, (str, PathLike))]
    if len(paths) < len(every):
        return [as_adapter(a) for a in every]
    found: dict[str, Adapter] = {}
    for path in paths:
        name = adapter_name(path)
        if name in found:
            raise LoraFxError(f"two adapters are called {name!r}", "adapters={name: path, …}")
        found[name] = as_adapter(path)
    return found


# export of an .onnx file, from whatever framework, without torch.
#
# Mode merged is merge, then the stages of optimise where those are asked for. The other modes are
# the same passes as after a torch export; what they have to equal is the file itself in ONNX
# Runtime, with the branches that insert adds.


UNNAMED = (
    "use mode merged or switch, or name dimension 0 of the inputs and outputs alike: "
    "onnx.tools.update_model_dims.update_inputs_outputs_dims"
)
"""What to do with a file whose inputs share no dynamic dimension 0."""


@blaming
def export_onnx(source: str | PathLike[str], options: ExportOptions) -> Report:
    """Write another .onnx file of a file, which is not changed; see lora_fx.passes.verbs.export.

    Raises:
        LoraFxError: An adapter that does not fit, an option that the mode would ignore.
        NoEffectError: The outputs differ; nothing is written.
    """
    source = Path(source)
    if options.mode == "merged":
        return _merged_file(source, options)
    adapters = by_name(options)
    graph, renamed = named_graph(source)
    check_no_slots(graph.model, source)
    found = find(graph)
    bound = {n: _bound(n, a, graph, found, options.names) for n, a in adapters.items()}
    said = [*graph.notes]
    if renamed:
        said.append(f"{renamed} tensors got the names that the exporter's metadata tells")
    with reference_of(source, graph, options.provider, options.inputs) as reference:
        rewritten = graph.clone()
        if options.mode == "batch":
            batch_symbol(rewritten.model, "", UNNAMED)
            every = (*found.targets, *found.optional)
            calls = {s.id: f"call:{n}" for t in every for n, s in enumerate(t.sites)}
            stored = {p.name: StoredWeight(p.shape, calls=calls) for p in graph.parameters()}
            sources = {name: (name, weight) for name, weight in stored.items()}
            return write_batch(rewritten, reference, sources, bound, options, said)
        keys, _ = options.chosen(found, bound)
        return write_switch(rewritten, reference, keys, bound, options, said)


def _bound(
    name: str, adapter: Adapter, graph: OnnxGraph, found: Found, names: Mapping[str, str] | None
) -> Adapter:
    """An adapter in the keys and layouts of the graph."""
    matched = match(adapter, graph, found, names)
    if matched.whole:
        raise LoraFxError(
            f"{name}: it holds the whole tensor {min(matched.whole)!r}; expected s·b·a",
            exclude_hint(name, sorted(matched.whole)),
        )
    return replace(adapter, entries=dict(matched.updates), names=None)


def _merged_file(source: Path, options: ExportOptions) -> Report:
    """Merge, then optimise; one of the two may be left out."""
    adapter: Any = options.adapters  # the path of one too
    target = options.target
    if isinstance(adapter, Mapping) and not isinstance(adapter, Adapter):
        raise LoraFxError("merged takes one adapter", "lora-fx merge takes several")
    rewritten = options.rewrites
    if adapter is None and not rewritten:
        graph = OnnxGraph(load(source))
        if any(t.no_fold for t in find(graph).targets):  # where nothing could be merged
            return _copied(source, graph, options)
        raise LoraFxError(
            f"{source} is an .onnx file already, and there is nothing to do",
            "give an adapter, --optimise, --precision or a --mode",
        )
    last: Json = {"force": options.force, "places": options.places}
    given: Json = {"names": options.names, "external_over": options.external_over}
    if not rewritten:
        return replace(merge_onnx(source, [adapter], target, **given, **last), command="export")
    if adapter is None:
        return optimise_file(source, options)
    with scratch_folder() as folder:
        merged = Path(folder) / "merged.onnx"
        try:
            made = merge_onnx(source, [adapter], merged, **given)
        except LoraFxError as e:
            said = e.message.replace(str(merged), str(target))
            raise LoraFxError(said, e.hint, exit_code=e.exit_code) from e
        done = optimise_file(merged, options)
        details = {**made.details, **done.details}
        return replace(done, warnings=(*made.warnings, *done.warnings), details=details)


def _copied(source: Path, graph: OnnxGraph, options: ExportOptions) -> Report:
    """Write a quantised file again, with the bytes of its tensors."""
    before = {n: graph.reader(n) for n in graph.flow.stores}
    with options.output() as made:
        made.save(graph.model, 0 if is_external(source) else options.external_over)
        nothing = Matched({}, {}), Fold({})
        prove_merge(made.seen, options.target, before, set(), find(graph), *nothing)
    said = "a copy: no adapter was given, and none goes into a quantised weight"
    outputs = tuple(map(str, made.files))
    return Report("export", True, (), outputs, (said, *graph.notes), {"mode": "merged"})
