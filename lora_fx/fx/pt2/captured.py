"""A model that is only a file: a Captured whose programs are what a .pt2 holds.

It has no source, so no other mode, dtype or set of arguments can be traced. Where a file of ours
has branches, the graphs here are those of the model without them, and `adapter` is what they held.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any, TypeGuard

import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError, check_format, silenced
from lora_fx.fx.capture.call import Signature, leaf_names, program_key
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.cleaned_graph import Traced, clean_module, match_places
from lora_fx.fx.capture.example import describe
from lora_fx.fx.capture.guards import GuardLog
from lora_fx.fx.capture.model_source import base_dtype
from lora_fx.fx.codes import learn
from lora_fx.fx.graph.nodes import is_marked
from lora_fx.fx.pt2 import program
from lora_fx.fx.pt2.archive import MANIFEST, open_archive
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import BATCH, Dynamic, Inputs, default_dynamic, merge_dynamic
from lora_fx.text import Json, JsonView

LATER = "write the file with both modes (lora-fx insert MODEL -o FILE.pt2), or use the source"


class FileCaptured(Captured):
    """See the module's docstring.

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
            manifest = archive.json(MANIFEST) if MANIFEST in archive.members else {}
            self._loaded = {n: program.load_program(archive, n) for n in archive.programs}
        self.path = path
        self.notes: list[str] = []
        self.tracings, self.unproven = {}, {}
        try:
            self._read(manifest)
            if args or kwargs:  # an example of the caller's: a call that the programs take
                given = self.signature.bind(tuple(args), dict(kwargs or {}))
                self._same_call(given)
                self.named = given
            self._describe(manifest, dynamic, static)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise archive.bad(f"{MANIFEST} is wrong: {type(e).__name__} {e}") from e

    def _read(self, manifest: JsonView) -> None:
        if manifest:
            check_format(manifest, f"{self.path}: its manifest", program.FORMAT)
        programs = self._loaded
        first = programs.get("model") or next(iter(programs.values()))
        named = dict(first.named)
        # of a file without a manifest: constants have themselves as defaults
        plain = inspect.Signature([kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in named])
        signature = held_signature(plain, named)
        self.norm_stats = str(manifest.get("norm_stats", "frozen"))
        if manifest.get("recorded"):
            self.notes.append(
                f"{self.path} holds one recorded run, and not the live model: that it holds for "
                "other weights cannot be proven"
            )
        self.programs: dict[bool, list[str]] = {}
        if manifest:
            for n, mode in manifest["programs"].items():
                if n in programs:
                    self.programs.setdefault(mode == "train", []).append(n)
            tensors = [x for x in tree_leaves(named) if isinstance(x, torch.Tensor)]
            named = program.read_arguments({"dict": manifest["arguments"]["dict"]}, tensors)
            signature = held_signature(program.read_signature(manifest["parameters"]), named)
        else:
            graphs = {n: p.program.graph_module.graph for n, p in programs.items()}
            modes = {n: program.mode_of(g) for n, g in graphs.items()}
            self.programs = {m: [n] for m, n in program.pick_programs(modes).items()}
            if any(is_marked(n) for g in graphs.values() for n in g.nodes):
                self.notes.append(f"{self.path}: branches without a manifest are part of the model")
        self.signature = FileSignature(self.path, signature)
        self.named = {k: v for k, v in named.items() if not program.is_constant(v)}
        state = {k: v for p in programs.values() for k, v in p.state.items()}
        self.adapter: Adapter | None = program.read_adapter(manifest, state, str(self.path))
        self.dropout = float((self.adapter.metadata if self.adapter else {}).get("dropout", 0.0))
        order = [first, *(p for p in programs.values() if p is not first)]
        self.model = program.tree_of(order, program.adapter_names(manifest))
        for p in programs.values():
            said = p.program.graph_signature
            names = {**said.inputs_to_parameters, **said.inputs_to_buffers}
            learn(self.model, p.program.graph, names)
        if manifest and str(manifest["class"]).isidentifier():
            self.model.__class__ = type(str(manifest["class"]), (type(self.model),), {})
        self.base_dtype = base_dtype(self.model)

    def _describe(self, manifest: JsonView, dynamic: Dynamic | None, static: Sequence[str]) -> None:
        said = manifest.get("inputs", {})
        specs = (
            replace(s, high=said[s.name]["high"] if s.name in said else s.high)
            for s in describe(self.named).specs
        )
        self.inputs: Inputs = Inputs(tuple(specs))
        free = self._free(said)
        wanted = merge_dynamic(self.inputs, default_dynamic(self.inputs), free)
        self.requested = merge_dynamic(self.inputs, wanted, dynamic, static)
        for name, dims in merge_dynamic(self.inputs, {}, dynamic).items():
            for d in dims:
                if d not in free.get(name, {}):
                    raise LoraFxError(
                        f"{self.path} fixes {name} dimension {d}", "export it as dynamic"
                    )
        self.inputs = self.inputs.with_dims(self.requested)
        ones = manifest.get("not_one", [])  # as 0.1 wrote
        self._not_one = [Condition("s0 != 1", (("s0", n, d),)) for n, d in ones]
        self._stored = {
            name: tuple(Condition.read(row) for row in rows)
            for name, rows in manifest.get("conditions", {}).items()
        }
        self._own = bool(manifest)

    def _free(self, said: JsonView) -> dict[str, dict[int, str]]:
        """{input: {dimension: symbol}} of the sizes that the programs leave open."""
        first = self._loaded[next(iter(self.programs.values()))[0]]
        shapes = [tuple(v.shape) for v in program.tensor_places(first.program)]
        names = self.inputs.names
        batch = str(shapes[0][0]) if shapes and shapes[0] else ""
        defaults = default_dynamic(self.inputs)
        result: dict[str, dict[int, str]] = {}
        for name, shape in zip(names, shapes, strict=True):
            for d, n in enumerate(shape):
                if not isinstance(n, torch.SymInt):
                    continue
                known = said.get(name, {}).get("dims", {}).get(str(d))
                label = defaults.get(name, {}).get(d) or (BATCH if str(n) == batch else str(n))
                result.setdefault(name, {})[d] = known or label
        return result

    # --- what the file holds ---------------------------------------------------------------------

    def allows(self, training: bool, norm_stats: str = "frozen") -> None:
        """See Captured.allows."""
        if training in self.programs:
            return
        graph = self._trace_of(self.programs[not training][0]).graph
        modals = [m for m in program.modal_nodes(graph) if m.training is not training]
        if training and norm_stats == "frozen":
            modals = [m for m in modals if not m.norm]  # frozen norms are those of the eval graph
        if not modals and training:
            return
        has, lacks = ("eval", "train") if training else ("train", "eval")
        hint = "; model.eval() can be trained too, without dropout" if training else ""
        raise LoraFxError(
            f"{self.path} holds the {has} graph only; "
            f"in {lacks} mode these behave otherwise: {program.says(modals) or 'unknown'}",
            LATER + hint,
        )

    def traced(
        self,
        training: bool,
        named: JsonView,
        dtype: torch.dtype | None = None,
        *,
        portable: bool = False,
    ) -> Traced:
        """The file's graph for a mode and sizes, or one of the other mode: see `allows`."""
        if portable:
            raise LoraFxError(
                f"{self.path} holds a grouped product of experts, which ONNX has no operator for",
                "export from the source: its experts are switched for that",
            )
        if dtype is not None and dtype != self.base_dtype:
            raise LoraFxError(
                f"{self.path} was exported in {self.base_dtype} and cannot be run in {dtype}",
                "export it in that dtype, or insert from the source",
            )
        self._same_call(named)
        names = self.programs.get(training) or self.programs[not training]
        leaves, example = tree_leaves(dict(named)), named is self.named
        fit = (n for n in names if example or self._trace_of(n).door.admits(leaves))
        return self._trace_of(next(fit, names[0]))

    def _same_call(self, named: JsonView) -> None:
        mine, other = (program_key(n, tree_leaves(dict(n))) for n in (self.named, named))
        if mine != other:
            raise LoraFxError(
                f"{self.path} holds the program for {call_text(self.named)}, "
                f"not for {call_text(named)}",
                NO_SOURCE,
            )

    def _trace_of(self, name: str) -> Traced:
        if (name,) in self.tracings:
            return self.tracings[name,][0]
        loaded = self._loaded[name]
        module = loaded.program.module(check_guards=False)
        program.strip_branches(module.graph)
        leaves = tree_leaves(self.named)
        match_places(module.graph, leaves)
        names = leaf_names(self.named)
        traced = clean_module(module, loaded.program, names, self.requested, GuardLog())
        traced.pinned = [replace(p, op="the export") for p in traced.pinned]
        if self._own:
            # what a kernel asked of sizes while the file was written is no condition of the model
            held = self._stored.get(name, (*traced.door.conditions, *self._not_one))
            traced.door, traced.doubtful = replace(traced.door, conditions=held), []
        self._settle(traced)
        self.tracings[name,] = [traced]
        return traced

    @property
    def recorded(self) -> bool:
        """False: there is no live model to run beside it, as the notes say."""
        return False

    def plain(self) -> FileCaptured:
        """This model without the adapter that its file holds."""
        other = copy.deepcopy(self)
        other.adapter = None
        return other


# The call of a program in a file: the arguments that it was exported with, and no others.


kinds = inspect.Parameter
NO_SOURCE = "a file has no source to trace other arguments; insert from the source"


class FileSignature(Signature):
    """A Signature of the held arguments only; another call is one LoraFxError that names them."""

    def __init__(self, path: str, signature: inspect.Signature) -> None:
        super().__init__(signature)
        self.path = path

    def bind(self, args: Sequence[object], kwargs: JsonView) -> Json:
        """As Signature's; an unknown argument that is None is taken as left out."""
        given = {k: v for k, v in kwargs.items() if v is not None or k in self.keywords}
        try:
            return super().bind(args, given)
        except TypeError as e:
            raise LoraFxError(
                f"{self.path} holds the program for {self.signature}: {e}", NO_SOURCE
            ) from e


def held_signature(full: inspect.Signature, named: JsonView) -> inspect.Signature:
    """The part of a signature that `named` gives.

    By keyword only is what follows a gap, and a tensor behind a constant.
    """
    params: list[inspect.Parameter] = []
    gap = False
    for p in full.parameters.values():
        if p.name not in named:
            gap = gap or p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
            continue
        defaults = bool(params) and params[-1].default is not kinds.empty
        gap = gap or (defaults and not program.is_constant(named[p.name]))
        kind = kinds.KEYWORD_ONLY if gap and p.kind is not kinds.VAR_POSITIONAL else p.kind
        params.append(_held(p.name, kind, named[p.name]))
    rest = (k for k in named if k not in full.parameters)
    params += [_held(name, kinds.KEYWORD_ONLY, named[name]) for name in rest]
    return inspect.Signature(params)


def _held(name: str, kind: Any, value: object) -> inspect.Parameter:
    """A parameter of an argument that a file holds; a constant is its own default."""
    return kinds(name, kind, default=value if program.is_constant(value) else kinds.empty)


def call_text(named: JsonView) -> str:
    """A call in words: `(ids: int64 of 2 dimensions, scale=2.0)`."""
    parts = []
    for name, x in named.items():
        if isinstance(x, torch.Tensor):
            parts.append(f"{name}: {str(x.dtype).removeprefix('torch.')} of {x.dim()} dimensions")
        else:
            parts.append(f"{name}={x!r}" if program.is_constant(x) else name)
    return f"({', '.join(parts)})"


def is_program(model: object) -> TypeGuard[str | PathLike[str]]:
    """True for a path that ends in .pt2."""
    return isinstance(model, (str, PathLike)) and fspath(model).endswith(".pt2")


def open_program(path: str | PathLike[str], *args: Any, **options: Any) -> FileCaptured:
    """The capture that a .pt2 file is: `lora_fx.capture("x.pt2")`.

    Args:
        path: A file of `torch.export.save`, or of `save_program`.
        args: Example inputs, keyword inputs, dynamic and static, as in capture.
        options: trust: read pickled tensors, by torch.load with weights_only=True. meta: read no
            weights.

    Raises:
        LoraFxError: The file is damaged, or holds what could run code.
    """
    return FileCaptured(fspath(path), *args, **options)
