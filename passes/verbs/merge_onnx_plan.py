"""The plan of a merge into an .onnx file: where each update goes; made without reading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lora_fx.adapter.adapter import mix
from lora_fx.adapter.mix import HOWS
from lora_fx.checkpoint.merge import Adapters, read_adapters
from lora_fx.checkpoint.merge_plan import WeightedAdapter
from lora_fx.checkpoint.merge_settings import refuse_rank
from lora_fx.checkpoint.provenance import METADATA, merges_of, refuse_again
from lora_fx.errors import LoraFxError, NoSay, given_options, refuse_no_say
from lora_fx.files.read import trusting
from lora_fx.inputs import Named
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.match import Matched, match
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.place import Place
from lora_fx.onnx.save import EXTERNAL_OVER, weight_bytes
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find
from lora_fx.probe.probe import FULL, NONE
from lora_fx.targets.found import Found
from lora_fx.text import Json, StrPath, table


@dataclass(frozen=True, kw_only=True)
class OnnxMergeOptions:
    """The options of a merge into an .onnx file, checked when the object is made.

    Attributes:
        names: Adapter key → tensor of the file, where the names do not tell.
        again: Fold an adapter that the file's metadata says is in it already.
        trust: Read pickles, by torch's unpickler that runs no code.
        force: Replace an output that exists.
        external_over: Bytes of weights above which they go to a file of their own.
        places: Where copies go.
        how: Several adapters: sum (cat is the same), or linear and svd, which mix factors first.
        rank: The rank of an svd mix.
        delta: Write only what changes: the output reads the rest from the base's data file, which
            has to lie in the same folder and to stay.
        run: Also run it against the base with branches, at three sizes; that takes memory.
        inputs: Arrays by input name for run, instead of sampled ones.
        provider: The provider of `run`: auto, cpu, cuda or webgpu.
        probe: The probe that the file gets: full, short or none; empty for full with `run`, and
            none without.
    """

    names: Mapping[str, str] | None = None
    again: bool = False
    trust: bool = False
    force: bool = False
    external_over: int = EXTERNAL_OVER
    places: Sequence[Place] = ()
    how: str = "sum"
    rank: int | None = None
    delta: bool = False
    run: bool = False
    inputs: Named | None = None
    provider: str = "cpu"
    probe: str = ""

    def __post_init__(self) -> None:
        """Raise for an unknown way to mix adapters."""
        if self.how != "sum" and self.how not in HOWS:
            raise LoraFxError(f"unknown mix {self.how!r}", f"use sum, {', '.join(HOWS)}")
        refuse_rank(self.how, self.rank)

    @property
    def probe_kind(self) -> str:
        """The probe that the file gets."""
        if self.probe:
            return self.probe
        return FULL if self.run else NONE

    @classmethod
    def of(cls, options: Named) -> OnnxMergeOptions:
        """Return the options of `merge` that apply to an .onnx file; raise for other given options.

        Args:
            options: By name; None leaves one at its default.
        """
        cls.refuse_others(options)
        names = {field.name for field in fields(cls)}
        keywords = {
            name: value for name, value in options.items() if name in names and value is not None
        }
        merge_options = cls(**keywords)
        refuse_no_say([RUN], merge_options, given_options(options))
        return merge_options

    @classmethod
    def refuse_others(cls, options: Named) -> None:
        """Raise for a given option that an .onnx file does not have."""
        names = {field.name for field in fields(cls)}
        for name, value in options.items():
            if name not in names and value not in (None, False, "sum"):
                raise LoraFxError(
                    f"{name} is an option for checkpoints, not for .onnx files", "leave it out"
                )


RUN: NoSay[OnnxMergeOptions] = NoSay(
    ("inputs", "provider"), lambda o: not o.run, "without --run, which runs the file"
)
"""The rule for options that have an effect only if the merged file is run."""


@dataclass(frozen=True)
class OnnxMergePlan:
    """A file and the adapters that are merged into it, with the keys of the file.

    Attributes:
        graph: The file; nothing is folded yet.
        targets: Its targets.
        adapters: The adapters and their weights.
        matched: Their sum.
        renamed: Tensors that got the names that the exporter's metadata tells.
        merges: The merges before, as the file's metadata has them.
    """

    graph: OnnxGraph
    targets: Found
    adapters: tuple[WeightedAdapter, ...]
    matched: Matched
    renamed: int
    merges: Sequence[Json]

    def rows(self) -> list[Json]:
        """Return a row per key: the tensor, its shape, rank and scale, and the bytes written."""
        rows: list[Json] = []
        for key, update in self.matched.updates.items():
            parameter = self.targets[key].parameter
            rows.append(
                {
                    "key": key,
                    "tensor": parameter.name,
                    "shape": list(parameter.shape),
                    "rank": update.rank,
                    "scale": update.scale,
                    "bytes": self._stored_bytes(parameter.name),
                }
            )
        for name, value in self.matched.whole.items():
            rows.append(
                {
                    "key": name,
                    "tensor": name,
                    "shape": list(value.shape),
                    "rank": None,
                    "scale": None,
                    "bytes": self._stored_bytes(name),
                }
            )
        return rows

    def _stored_bytes(self, name: str) -> int:
        return self.graph.flow.tensor(name).nbytes

    def to_json(self) -> Json:
        """Return the fields of `merge --dry-run --json`."""
        size = weight_bytes(self.graph.model)
        return {"tensors": self.rows(), "bytes": size, "warnings": list(self.graph.notes)}

    def __str__(self) -> str:
        """Return a table, and the number of bytes that are written."""
        rows = self.rows()
        lines: list[tuple[str, ...]] = [("tensor", "shape", "rank", "scale", "bytes")]
        for row in rows:
            shape = "×".join(map(str, row["shape"]))
            scale = "whole" if row["scale"] is None else f"{row['scale']:g}"
            lines.append((row["key"], shape, str(row["rank"] or ""), scale, str(row["bytes"])))
        changed = sum(row["bytes"] for row in rows)
        total = weight_bytes(self.graph.model)
        return "\n".join([*table(lines), f"{total} bytes of weights, {changed} of them change"])


@blaming
def plan_onnx(base: StrPath, adapters: Adapters, options: OnnxMergeOptions) -> OnnxMergePlan:
    """Plan a merge into an .onnx file; see lora_fx.passes.verbs.merge.

    Raises:
        LoraFxError: Every reason not to merge that the files give.
    """
    source = Path(base)
    with trusting(options.trust):
        weighted_adapters = read_adapters(adapters)
    graph, renamed = named_graph(source)
    merges = merges_of(graph.model.metadata_props.get(METADATA), str(source))
    hashes = [(adapter.where, adapter.hash) for adapter in weighted_adapters]
    refuse_again(source, merges, hashes, again=options.again)
    targets = find(graph)
    matched = _matched(weighted_adapters, graph, targets, options)
    return OnnxMergePlan(graph, targets, tuple(weighted_adapters), matched, renamed, merges)


def _matched(
    adapters: Sequence[WeightedAdapter], graph: OnnxGraph, targets: Found, options: OnnxMergeOptions
) -> Matched:
    """Return all adapters as one, with the graph's keys."""
    matched = [match(weighted.adapter, graph, targets, options.names) for weighted in adapters]
    how = "cat" if options.how == "sum" else options.how  # the same sum
    if len(adapters) == 1 and how == "cat":
        return _at_its_weight(adapters[0], matched[0])
    if any(of_one.whole for of_one in matched):
        raise LoraFxError(
            "several adapters were given, and one of them holds whole tensors",
            "merge that adapter alone",
        )

    bound = [
        (replace(weighted.adapter, entries=dict(of_one.updates)), weighted.weight)
        for weighted, of_one in zip(adapters, matched, strict=True)
    ]
    mixed = mix(bound, how, options.rank)
    return Matched(dict(mixed.lowrank), {})


def _at_its_weight(adapter: WeightedAdapter, matched: Matched) -> Matched:
    """Return one adapter at its weight; raise if whole tensors have another weight than 1."""
    bound = replace(adapter.adapter, entries=dict(matched.updates))
    weighted = bound.weighted(adapter.weight)
    if matched.whole and adapter.weight != 1.0:
        raise LoraFxError(
            f"{adapter.where}: weight {adapter.weight:g}, but the adapter holds whole tensors; "
            "expected weight 1",
            "leave the weight out; only low-rank updates in proportion to their scale can be "
            "weighted",
        )
    return Matched(weighted.lowrank, matched.whole)
