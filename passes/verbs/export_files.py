"""Functions that all modes of export share: adapters by name, valid sizes, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import check_served
from lora_fx.compare import Parity, Report
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import check_output, replacing
from lora_fx.files.side_outputs import Beside
from lora_fx.formats.graph_inputs import write_inputs
from lora_fx.formats.io import check_real
from lora_fx.onnx.adapter_session import Session
from lora_fx.onnx.made_for import PORTABLE
from lora_fx.onnx.manifest import Manifest
from lora_fx.onnx.on_device import of_obstacles
from lora_fx.onnx.output_file import Output
from lora_fx.onnx.range_guards import guard_within, say_within
from lora_fx.onnx.rewrites.fast_codes import said_of_slow_codes
from lora_fx.onnx.rewrites.guard_lookups import unguarded_outputs
from lora_fx.onnx.runtime_adapter import write_adapter
from lora_fx.onnx.session import RuntimeSession
from lora_fx.passes.proofs.switchable import NO_UPDATE
from lora_fx.passes.verbs.export_options import ExportOptions
from lora_fx.passes.verbs.options import ExportAdapters
from lora_fx.passes.verbs.refused_updates import plain_hint
from lora_fx.text import Json, JsonView, some

if TYPE_CHECKING:
    import onnx_ir as ir


BASE = ""
"""The name of the file that stands for the base, among those of adapters."""
ONLY = "adapter"
"""The name of an adapter that is given alone, without a name."""


def adapters_of(options: ExportOptions) -> dict[str, Adapter]:
    """Return the adapters of an export by name; raise if one of their files exists already."""
    if options.mode == "batch":
        return named_adapters(options.adapters)

    adapters: dict[str, Adapter] = {}
    if options.adapters:
        if isinstance(options.adapters, Adapter):
            adapters = {ONLY: options.adapters}
        else:
            adapters = named_adapters(options.adapters)
    adapter_paths(adapters, options)  # raises before the model is captured
    return adapters


def adapter_paths(adapters: Iterable[str], options: ExportOptions) -> dict[str, Path]:
    """Return the paths of a switchable file's adapters; raise if one exists already.

    A file that has to be given A and B has one more, by an empty name: what stands for the base.

    Raises:
        LoraFxError: A name that is no name of a file, or a file that exists.
    """
    paths: dict[str, Path] = {}
    for name in adapters:
        file_name = f"{name}{options.adapter_ending}"
        if not name or Path(file_name).name != file_name:
            raise LoraFxError(
                f"the adapter's name {name!r} is no name of a file",
                "give the adapter another name, without a path: adapters={'first': …}",
            )
        paths[name] = options.target.with_name(file_name)
    if options.base_file is not None:
        paths[BASE] = options.target.with_name(options.base_file)
        if paths[BASE] in [paths[name] for name in adapters]:
            raise LoraFxError(
                f"{paths[BASE].name} would be both an adapter's file and the base's",
                "give the adapter another name",
            )
    for path in paths.values():
        check_output(path, force=options.force)
    return paths


def write_adapters(
    paths: Mapping[str, Path],
    adapters: Mapping[str, Adapter],
    manifest: Manifest,
    options: ExportOptions,
    beside: Beside,
) -> None:
    """Write the adapters of a switchable file.

    Args:
        paths: Those of `adapter_paths`.
        adapters: The adapters by name, bound.
        manifest: That of the file.
        options: What export is asked for.
        beside: The outputs that belong to the file.
    """
    write = write_inputs if options.requires_factors else write_adapter
    for name, path in paths.items():
        adapter = NO_UPDATE if name == BASE else adapters[name]
        with replacing(path, force=options.force, beside=beside) as temporary:
            write(adapter, manifest, temporary)


def save_within(
    output: Output,
    model: ir.Model,
    conditions: Sequence[Condition],
    guards: Sequence[Condition],
    options: ExportOptions,
    slots: Sequence[str] = (),
) -> list[str]:
    """Save a model with the sizes at which it is valid; return a line for each guarded condition.

    Lines on products that are slow on the device that the file is made for, or on outputs of a
    portable file that do not tell a wrong id, come after them.

    Args:
        output: The file.
        model: What goes into it.
        conditions: What sizes have to satisfy.
        guards: Those outside which a session could give an answer. They get a guard each.
        options: What export is asked for.
        slots: Names of tensors that a session replaces; see Output.save.
    """
    say_within(model, conditions)
    if guards and not options.within:
        guard_within(model, guards)
    output.save(model, options.external_over, slots)
    notes = said_of_slow_codes(model) if options.made_for == "cuda" else []
    if options.made_for == PORTABLE:
        notes += [
            f"output {name!r} cannot hold NaN: a runtime that accepts an id without a row gives a "
            "wrong number there"
            for name in unguarded_outputs(model)
        ]
    elsewhere = "other sizes are not checked" if options.within else "with other sizes it fails"
    bounds = dict.fromkeys(map(str, guards))
    return [f"the file is valid only for {bound}: {elsewhere}" for bound in bounds] + notes


def on_device(output: Output, session: RuntimeSession | Session) -> Json:
    """Return what a file does on devices: the fields of lora_fx.onnx.on_device.

    Args:
        output: The file, which has its name.
        session: The one that proved it. Where it runs on a device, its provider is asked.
    """
    return of_obstacles(output.target, output.obstacles, session.provider, output.made_for)


def report_of(
    files: Sequence[Path],
    provider: str,
    parity: Sequence[Parity],
    warnings: Sequence[str],
    details: JsonView,
) -> Report:
    """Make the report of an export that has written these files."""
    sizes = {str(file): file.stat().st_size for file in files}
    all_details = {"files": sizes, "provider": provider, **details}
    return Report("export", True, tuple(parity), tuple(sizes), tuple(warnings), all_details)


def refuse_unexchangeable(adapters: Mapping[str, Adapter], what: str) -> None:
    """Raise for updates that cannot be exchanged between runs or between rows.

    Args:
        adapters: By name; those that read their base have been evaluated on it.
        what: What should take them, for messages.
    """
    for name, adapter in adapters.items():
        check_served(adapter, f"{name}: {what}", plain_hint(name))
        check_real(adapter.lowrank)


LARGE_TENSORS = 64 << 20
"""The size in bytes above which the whole tensors of adapters are told."""


def said_of_large_tensors(adapters: Mapping[str, Adapter]) -> list[str]:
    """Return a line for each adapter whose whole tensors are large."""
    lines = []
    for name, adapter in adapters.items():
        size = sum(full.value.nbytes for full in adapter.full.values())
        if size > LARGE_TENSORS:
            lines.append(
                f"{name}: its whole tensors ({some(sorted(adapter.full))}) are {size >> 20} MB, "
                "which every session that loads it has in memory"
            )
    return lines


def named_adapters(adapters: ExportAdapters | None) -> dict[str, Adapter]:
    """Return adapters by name, in the order of their ids."""
    if isinstance(adapters, Adapter):
        return {"adapter_1": adapters}
    if not adapters:
        raise LoraFxError("mode batch needs adapters", "pass adapters=[first, second, …]")
    if isinstance(adapters, Mapping):
        return dict(cast(Mapping[str, Adapter], adapters))
    return {f"adapter_{i}": adapter for i, adapter in enumerate(adapters, 1)}
