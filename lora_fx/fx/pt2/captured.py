"""A Captured for a model that is only a .pt2 file, which holds its programs.

It has no source, so no other mode, dtype or set of arguments can be traced. Where a file of ours
has branches, the graphs here are those of the model without them, and `adapter` is what they held.
Of a file of mode switch, whose A and B are inputs, it is the base.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, TypeGuard

import torch
from torch import fx

from lora_fx.adapter.adapter import Adapter
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, check_format, silenced
from lora_fx.files.program_manifest import MANIFEST, SWITCH
from lora_fx.fx.capture.call import leaf_names, program_key
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.cleaned_graph import Traced, clean_module, match_places
from lora_fx.fx.capture.example import describe
from lora_fx.fx.capture.guards import GuardLog
from lora_fx.fx.capture.model_source import base_dtype
from lora_fx.fx.dequantise_nodes import declare_codes
from lora_fx.fx.graph.nodes import is_marked, unmark
from lora_fx.fx.pt2.archive import open_archive
from lora_fx.fx.pt2.factor_inputs import read_from_tree, take_away_inputs
from lora_fx.fx.pt2.file_manifest import (
    SWITCH_FORMAT,
    adapter_names,
    is_constant,
    read_adapter,
    read_arguments,
    read_signature,
)
from lora_fx.fx.pt2.file_signature import (
    NO_SOURCE,
    FileSignature,
    call_text,
    plain_signature,
    signature_of_call,
)
from lora_fx.fx.pt2.module_tree import tree_of
from lora_fx.fx.pt2.program import LoadedProgram, load_program, tensor_places
from lora_fx.fx.pt2.program_modes import modal_nodes, modals_text, mode_of, pick_programs
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import BATCH, Dynamic, Inputs, default_dynamic, merge_dynamic
from lora_fx.onnx.manifest import Manifest
from lora_fx.text import JsonView

LATER = (
    "write the file with both modes (lora-fx insert MODEL -o FILE.pt2), or use the model that it "
    "was made from"
)


class FileCaptured(Captured):
    """The capture that a .pt2 file holds; see the module's docstring.

    Attributes:
        path: The file.
        adapter: What the file's branches hold, or None.
        dropout: On the branches' inputs.
        norm_stats: frozen, or update.
        programs: {training: names of its programs}, for the modes that the file holds: one for
            each path of the model's code, the example's first.
    """

    def __init__(
        self,
        path: str,
        args: Sequence[object] = (),
        kwargs: JsonView | None = None,
        dynamic: Dynamic | None = None,
        static: Sequence[str] = (),
        *,
        trust: bool = False,
        meta: bool = False,
    ) -> None:
        archive = open_archive(path, trust=trust, meta=meta)
        with archive.zip, silenced():  # torch's parsers warn about their own parts
            manifest: JsonView = {}
            if MANIFEST in archive.members:
                manifest = archive.json(MANIFEST)
            self._loaded = {name: load_program(archive, name) for name in archive.programs}
        self.path = path
        self.notes: list[str] = []
        self.tracings = {}
        self.unproven = {}
        self._factors: tuple[str, ...] = ()  # the inputs of adapters, after the model's own
        self._whole: dict[str, str] = {}  # those for whole tensors, with the parameters' names
        try:
            self._read(manifest)
            if args or kwargs:  # an example of the caller's: a call that the programs take
                example = self.signature.bind(tuple(args), dict(kwargs or {}))
                self._expect_same_call(example)
                self.named = example
            self._describe(manifest, dynamic, static)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise archive.bad(f"{MANIFEST} is wrong: {type(e).__name__} {e}") from e

    def _read(self, manifest: JsonView) -> None:
        """Read the call, the adapter and the modules from the programs and the manifest."""
        if manifest:
            check_format(manifest, f"{self.path}: its manifest", SWITCH_FORMAT)
        self.norm_stats = str(manifest.get("norm_stats", "frozen"))
        if manifest.get("recorded"):
            self.notes.append(
                f"{self.path} holds one recorded run, not the live model: it cannot be proven "
                "that it is valid for other weights"
            )
        self._read_call(manifest)
        self._read_tensors(manifest)

    @property
    def _example_program(self) -> LoadedProgram:
        """The program whose example is the file's example."""
        return self._loaded.get("model") or next(iter(self._loaded.values()))

    def _read_call(self, manifest: JsonView) -> None:
        """Read the programs of each mode, the signature and the example."""
        programs = self._loaded
        named = dict(self._example_program.named)
        if SWITCH in manifest:
            switch = Manifest.from_text(json.dumps(manifest[SWITCH]), self.path)
            self._factors = tuple(switch.names())
            self._whole = {slot.name: key for key, slot in switch.whole.items()}
        if self._factors and tuple(named)[-len(self._factors) :] != self._factors:
            raise ValueError("an adapter's are not the last inputs of the program, in its order")
        for name in self._factors:
            del named[name]
        signature = plain_signature(named)  # of a file without a manifest
        self.programs: dict[bool, list[str]]
        if manifest:
            self.programs = _programs_by_manifest(manifest, programs)
            tensors = [leaf for leaf in tree_leaves(named) if isinstance(leaf, torch.Tensor)]
            named = read_arguments({"dict": manifest["arguments"]["dict"]}, tensors)
            signature = signature_of_call(read_signature(manifest["parameters"]), named)
        else:
            self.programs = _programs_by_operators(programs)
            if any(_has_branches(loaded) for loaded in programs.values()):
                self.notes.append(
                    f"{self.path}: it has branches but no manifest, so they count as part of the "
                    "model"
                )
        self.signature = FileSignature(self.path, signature)
        self.named = {
            name: argument for name, argument in named.items() if not is_constant(argument)
        }

    def _read_tensors(self, manifest: JsonView) -> None:
        """Read the adapter, and the modules that hold the other tensors."""
        programs = self._loaded.values()
        state: dict[str, torch.Tensor] = {}
        for loaded in programs:
            state.update(loaded.state)
        absent = set(self._whole.values()) - set(state)
        if absent:
            raise ValueError(f"it has no {min(absent)!r}, which an input replaces")
        self.adapter: Adapter | None = read_adapter(manifest, state, str(self.path))
        self.dropout = 0.0
        if self.adapter:
            self.dropout = float(self.adapter.metadata.get("dropout", 0.0))

        example_first = [self._example_program]
        for loaded in programs:
            if loaded is not self._example_program:
                example_first.append(loaded)
        self.model = tree_of(example_first, adapter_names(manifest))
        for loaded in programs:
            graph_signature = loaded.program.graph_signature
            names = {
                **graph_signature.inputs_to_parameters,
                **graph_signature.inputs_to_buffers,
            }
            declare_codes(self.model, loaded.program.graph, names)
        if manifest and str(manifest["class"]).isidentifier():
            self.model.__class__ = type(str(manifest["class"]), (type(self.model),), {})
        self.base_dtype = base_dtype(self.model)

    def _describe(self, manifest: JsonView, dynamic: Dynamic | None, static: Sequence[str]) -> None:
        """Read from manifest and programs which sizes are free, and the conditions on sizes.

        Raises:
            LoraFxError: `dynamic` names a dimension that the programs fix.
        """
        rows = manifest.get("inputs", {})
        specs = []
        for spec in describe(self.named).specs:
            if spec.name in rows:
                spec = replace(spec, high=rows[spec.name]["high"])
            specs.append(spec)
        self.inputs: Inputs = Inputs(tuple(specs))

        free = self._free_dimensions(rows)
        defaults = merge_dynamic(self.inputs, default_dynamic(self.inputs), free)
        self.requested = merge_dynamic(self.inputs, defaults, dynamic, static)
        for name, dimensions in merge_dynamic(self.inputs, {}, dynamic).items():
            for dimension in dimensions:
                if dimension not in free.get(name, {}):
                    raise LoraFxError(
                        f"{self.path} fixes dimension {dimension} of {name}",
                        "export the model again with this dimension dynamic",
                    )
        self.inputs = self.inputs.with_dims(self.requested)

        self._not_one = [  # as 0.1 wrote
            Condition("s0 != 1", (("s0", name, dimension),))
            for name, dimension in manifest.get("not_one", [])
        ]
        self._conditions = {
            name: tuple(Condition.read(row) for row in condition_rows)
            for name, condition_rows in manifest.get("conditions", {}).items()
        }
        self._has_manifest = bool(manifest)

    def _free_dimensions(self, rows: JsonView) -> dict[str, dict[int, str]]:
        """Return {input: {dimension: symbol}} of the sizes that the programs leave free.

        A symbol is what the manifest calls it, else its name by default, else the batch's where
        it is equal to the first size of the first input, else torch's name.

        Args:
            rows: The inputs of the manifest, by name.
        """
        first_program = self._loaded[next(iter(self.programs.values()))[0]]
        places = tensor_places(first_program.program)
        shapes = [tuple(place.shape) for place in places[: len(self.inputs.names)]]
        batch = ""
        if shapes and shapes[0]:
            batch = str(shapes[0][0])
        defaults = default_dynamic(self.inputs)
        free: dict[str, dict[int, str]] = {}
        for name, shape in zip(self.inputs.names, shapes, strict=True):
            for dimension, size in enumerate(shape):
                if not isinstance(size, torch.SymInt):
                    continue
                written = rows.get(name, {}).get("dims", {}).get(str(dimension))
                symbol = written or defaults.get(name, {}).get(dimension)
                if not symbol:
                    symbol = BATCH if str(size) == batch else str(size)
                free.setdefault(name, {})[dimension] = symbol
        return free

    def allows(self, training: bool, norm_stats: str = "frozen") -> None:
        """Implement `Captured.allows`."""
        if training in self.programs:
            return
        graph = self._trace_of(self.programs[not training][0]).graph
        modals = [modal for modal in modal_nodes(graph) if modal.training is not training]
        if training and norm_stats == "frozen":  # frozen norms are those of the eval graph
            modals = [modal for modal in modals if not modal.norm]
        if not modals and training:
            return
        has = "train"
        lacks = "eval"
        hint = LATER
        if training:
            has = "eval"
            lacks = "train"
            hint = f"{LATER}; or train it after model.eval(), without dropout"
        raise LoraFxError(
            f"{self.path} holds only the {has} graph; in {lacks} mode these ops behave "
            f"differently: {modals_text(modals) or 'unknown'}",
            hint,
        )

    def traced(
        self,
        training: bool,
        named: JsonView,
        dtype: torch.dtype | None = None,
        *,
        portable: bool = False,
    ) -> Traced:
        """Return the file's graph for a mode and sizes; the other mode's if `allows` permits."""
        if portable:
            raise LoraFxError(
                f"{self.path} holds a grouped product of experts, for which ONNX has no operator",
                "export the model that it was made from, whose experts are then traced in "
                "another form",
            )
        if dtype is not None and dtype != self.base_dtype:
            raise LoraFxError(
                f"{self.path} was exported in {self.base_dtype} and cannot be run in {dtype}",
                "export it in that dtype, or insert into the model that it was made from",
            )
        self._expect_same_call(named)
        names = self.programs.get(training) or self.programs[not training]
        if named is self.named:  # the example's program is the first
            return self._trace_of(names[0])
        leaves = tree_leaves(dict(named))
        for name in names:
            traced = self._trace_of(name)
            if traced.door.admits(leaves):
                return traced
        return self._trace_of(names[0])

    def _expect_same_call(self, named: JsonView) -> None:
        """Raise for other arguments than the programs were exported with."""
        example_key = program_key(self.named, tree_leaves(dict(self.named)))
        key = program_key(named, tree_leaves(dict(named)))
        if key != example_key:
            raise LoraFxError(
                f"{self.path} holds the program for {call_text(self.named)}, not for "
                f"{call_text(named)}",
                NO_SOURCE,
            )

    def _trace_of(self, name: str) -> Traced:
        """Return a program of the file as a Traced, without branches and with its conditions."""
        if (name,) in self.tracings:
            return self.tracings[name,][0]
        loaded = self._loaded[name]
        module = loaded.program.module(check_guards=False)
        strip_branches(module.graph)
        read_from_tree(module, self._whole, loaded.state)
        take_away_inputs(module.graph, len(self._factors))
        match_places(module.graph, tree_leaves(self.named))
        names = leaf_names(self.named)
        traced = clean_module(module, loaded.program, names, self.requested, GuardLog())
        traced.pinned = [replace(pin, op="the export") for pin in traced.pinned]
        if self._has_manifest:
            # what a kernel asked of sizes while the file was written is no condition of the model
            conditions = self._conditions.get(name, (*traced.door.conditions, *self._not_one))
            traced.door = replace(traced.door, conditions=conditions)
            traced.doubtful = []
        self._settle(traced)
        self.tracings[name,] = [traced]
        return traced

    def switchable(self) -> torch.nn.Module:
        """Return the eval program of a file of mode switch, whose A and B are inputs.

        It takes the tensors of a call in order, and A and B by name.

        Raises:
            LoraFxError: A and B are no inputs of the file.
        """
        if not self._factors:
            raise LoraFxError(
                f"{self.path}: its A and B are no inputs",
                "write a switchable file with lora-fx export MODEL -o X.pt2 --mode switch",
            )
        return self._example_program.program.module(check_guards=False)

    @property
    def recorded(self) -> bool:
        """False, since there is no live model to compare a recorded run with."""
        return False

    def plain(self) -> FileCaptured:
        """Return this model without the adapter in its file."""
        other = copy.deepcopy(self)
        other.adapter = None
        return other


def _programs_by_manifest(
    manifest: JsonView, programs: Mapping[str, LoadedProgram]
) -> dict[bool, list[str]]:
    """Return {training: program names}, from a manifest."""
    by_mode: dict[bool, list[str]] = {}
    for name, mode in manifest["programs"].items():
        if name in programs:
            by_mode.setdefault(mode == "train", []).append(name)
    return by_mode


def _programs_by_operators(programs: Mapping[str, LoadedProgram]) -> dict[bool, list[str]]:
    """Return {training: program names}, from the operators of the graphs."""
    modes = {name: mode_of(loaded.program.graph_module.graph) for name, loaded in programs.items()}
    return {training: [name] for training, name in pick_programs(modes).items()}


def _has_branches(loaded: LoadedProgram) -> bool:
    return any(is_marked(node) for node in loaded.program.graph_module.graph.nodes)


def is_program(model: object) -> TypeGuard[str | PathLike[str]]:
    """True for a path that ends in .pt2."""
    return isinstance(model, (str, PathLike)) and fspath(model).endswith(".pt2")


def open_program(path: str | PathLike[str], *args: Any, **options: Any) -> FileCaptured:
    """Open a .pt2 file as a capture, as `lora_fx.capture("x.pt2")` does.

    Args:
        path: A file of `torch.export.save`, or of `save_program`.
        args: Example inputs, keyword inputs, dynamic and static, as in capture.
        options: trust: read pickled tensors, by torch.load with weights_only=True. meta: read no
            weights.

    Raises:
        LoraFxError: The file is damaged, or holds what could run code.
    """
    return FileCaptured(fspath(path), *args, **options)


def strip_branches(graph: fx.Graph) -> None:
    """Remove insert's branches: the marked sum of a value and a branch becomes that value."""
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    for node in filter(is_marked, sums):
        output, branch = node.args[:2]
        if isinstance(output, fx.Node) and not is_marked(output) and is_marked(branch):
            node.replace_all_uses_with(output)
    for node in reversed(list(graph.nodes)):
        if not is_marked(node):
            continue
        if not node.users:
            graph.erase_node(node)
        else:  # a view of the weight, now of the weight alone
            unmark(node)
