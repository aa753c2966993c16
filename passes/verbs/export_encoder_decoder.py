"""export of an encoder-decoder with its cache: two files, each proven; both or none are written.

X.onnx is a step of the decoder, and X-encoder.onnx what runs once before the first step. An adapter
is split by the weights that each file has; the weights of the keys and values of the
cross-attention are in the encoder's file, since these are computed there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_stacks import place
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import check_output
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.encoder_decoder import DecoderStep, encoder_of, read_by
from lora_fx.passes.verbs.adapt import find
from lora_fx.passes.verbs.export_files import named_adapters
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.options import ExportAdapters
from lora_fx.targets.keys import base_name, split_use
from lora_fx.text import Json

ENCODER = "-encoder"
"""What the names of the encoder's files have behind the names of the decoder's."""
Export = Callable[[object, ExportOptions], Report]


def has_parts(model: object) -> bool:
    """Whether this is the capture of a step of an encoder-decoder."""
    return isinstance(model, Captured) and isinstance(model.model, DecoderStep)


def _check_options(options: ExportOptions, *, quantise: bool) -> None:
    """Raise for options that an export of an encoder-decoder with its cache does not have."""
    refused = {
        "--genai or --triton": (bool(options.places), "their folders are for one file"),
        "--quantise": (quantise, "codes are not proven for two files"),
        "a .pt2 file": (options.is_program, "the two parts are written as .onnx files"),
        "--mode batch": (options.mode == "batch", "its two files would need the same ids"),
        "--mode load": (options.mode == "load", "it is not proven for two files"),
        "--include or --exclude": (
            bool(options.include or options.exclude), "the targets lie in two files",
        ),
    }  # fmt: skip
    for option, (is_asked_for, reason) in refused.items():
        if is_asked_for:
            raise LoraFxError(
                f"{option} with --cache is for models without an encoder: {reason}",
                "leave it out; encoder-decoders with --cache have modes merged and switch, whose "
                "targets are those of the adapters",
            )


def export_parts(
    model: object, options: ExportOptions, export: Export, *, quantise: bool = False
) -> Report:
    """Export both parts of an encoder-decoder.

    The encoder's files get their names when the decoder's are proven, and before those get theirs:
    what cannot be proven leaves nothing.

    Args:
        model: The capture of a step.
        options: What is asked for; `adapters` are of the whole model.
        export: Exports one part.
        quantise: Whether codes are asked for, which is refused.

    Raises:
        LoraFxError: A part of it cannot be exported; nothing is written.
    """
    assert isinstance(model, Captured)
    step = model
    _check_options(options, quantise=quantise)
    target = options.target.with_stem(f"{options.target.stem}{ENCODER}")
    check_output(target, force=options.force)
    part = encoder_of(step)
    of_encoder, of_decoder = _split(part, step, options)
    reports: list[Report] = []

    def write_encoder() -> None:
        reports.append(export(part, replace(of_encoder, target=target)))

    decoder = export(step, replace(of_decoder, last=write_encoder))
    (encoder,) = reports
    return _together(encoder, decoder)


def _split(
    encoder: Captured, step: Captured, options: ExportOptions
) -> tuple[ExportOptions, ExportOptions]:
    """Return the options of the encoder's and of the decoder's file, each with its adapters.

    A part that no adapter changes is written in mode merged, without slots.
    """
    if not options.adapters:
        return options, options
    is_merged = options.mode == "merged"
    found = find(step)  # has the shapes and names of the whole model
    adapters: dict[str, Adapter] = {}
    for name, adapter in named_adapters(options.adapters).items():
        placed = place(adapter.entries, found.shapes.get, tuple(found.shapes))
        adapters[name] = replace(adapter, entries=placed).resolved(found.shapes)
        _check(name, adapters[name])

    split: list[ExportOptions] = []
    for captured, ending in ((encoder, ENCODER), (step, "")):
        read = {found.first_names.get(name, name) for name in read_by(captured)}
        of_part: dict[str, Adapter] = {}
        for name, adapter in adapters.items():
            entries = {
                key: entry
                for key, entry in adapter.entries.items()
                if found.first_names.get(base_name(key), base_name(key)) in read
            }
            if entries:
                of_part[f"{name}{ending}"] = replace(adapter, entries=entries)
        chosen: ExportAdapters | None = of_part or None
        if is_merged:
            chosen = next(iter(of_part.values()), None)
        mode = options.mode if of_part else "merged"
        split.append(replace(options, adapters=chosen, mode=mode))
    return split[0], split[1]


def _check(name: str, adapter: Adapter) -> None:
    """Raise for what acts from a token on, or in one use of a tensor that is used more than once.

    Args:
        name: The adapter's.
        adapter: With the keys of the model.
    """
    if adapter.invocation:
        raise LoraFxError(
            f"{name} is an aLoRA, which acts from its invocation tokens on: an encoder-decoder has "
            "two sequences of tokens, and --cache does not know in which of them to look",
            "leave the adapter out, or export without --cache",
        )
    for key in adapter.entries:
        if split_use(key)[1]:
            raise LoraFxError(
                f"{name}: {key!r} changes one use of a tensor that both files may have",
                "export without --cache, or leave this key out of the adapter",
            )


def _together(encoder: Report, decoder: Report) -> Report:
    """Return the report of both files; each detail of the encoder's is under `encoder`."""
    details: Json = {**decoder.details, "encoder": encoder.details}
    details["files"] = {**decoder.details["files"], **encoder.details["files"]}
    warnings = [*decoder.warnings]
    warnings += [f"the encoder's file: {warning}" for warning in encoder.warnings]
    return replace(
        decoder,
        parity=(*decoder.parity, *encoder.parity),
        outputs=(*decoder.outputs, *encoder.outputs),
        warnings=tuple(warnings),
        details=details,
    )
