"""The plan of a merge into an .onnx file: what goes where, read without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lora_fx.adapter.adapter import HOWS, mix
from lora_fx.checkpoint.merge import Adapters, given
from lora_fx.checkpoint.merge_plan import Given, refuse_rank
from lora_fx.checkpoint.provenance import METADATA, merges_of, refuse_again
from lora_fx.errors import LoraFxError, NoSay, given_options, refuse_no_say
from lora_fx.files.read import trusting
from lora_fx.inputs import Named
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.match import Matched, match
from lora_fx.onnx.names import named_graph
from lora_fx.onnx.save import EXTERNAL_OVER, Place, weight_bytes
from lora_fx.onnx.validity import blaming
from lora_fx.passes.find import find
from lora_fx.targets.target import Found
from lora_fx.text import Json, StrPath, table


@dataclass(frozen=True, kw_only=True)
class OnnxMergeOptions:
    """What a merge into an .onnx file is asked for; an object that exists is in order.

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
        provider: The provider of `run`: auto, cpu or cuda.
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

    def __post_init__(self) -> None:
        """Raise for a mix that is not known."""
        if self.how != "sum" and self.how not in HOWS:
            raise LoraFxError(f"no mix {self.how!r}", f"sum, {', '.join(HOWS)}")
        refuse_rank(self.how, self.rank)

    @classmethod
    def of(cls, options: Named) -> OnnxMergeOptions:
        """Those of `merge` that an .onnx file has; raises where another is given.

        Args:
            options: By name; None leaves one at its default.
        """
        cls.refuse_others(options)
        known = {f.name for f in fields(cls)}
        asked = cls(**{k: v for k, v in options.items() if k in known and v is not None})
        refuse_no_say([RUN], asked, given_options(options))
        return asked

    @classmethod
    def refuse_others(cls, options: Named) -> None:
        """Raise for an option that was given and is none of an .onnx file."""
        known = {f.name for f in fields(cls)}
        for name, value in options.items():
            if name not in known and value not in (None, False, "sum"):
                raise LoraFxError(
                    f"{name} is an option for checkpoints, not for .onnx files", "leave it out"
                )


RUN: NoSay[OnnxMergeOptions] = NoSay(
    ("inputs", "provider"), lambda o: not o.run, "without --run, which runs the file"
)
"""What only a run of the merged file has."""


@dataclass(frozen=True)
class OnnxMergePlan:
    """A file and the adapters that go into it, in its keys.

    Attributes:
        graph: The file; nothing is folded yet.
        found: Its targets.
        parts: The adapters as given.
        matched: Their sum.
        renamed: Tensors that got the names that the exporter's metadata tells.
        merges: Those before, as the file's metadata tells of them.
    """

    graph: OnnxGraph
    found: Found
    parts: tuple[Given, ...]
    matched: Matched
    renamed: int
    merges: Sequence[Json]

    def rows(self) -> list[Json]:
        """One a key: the tensor, its shape, rank and scale, and the bytes that are written."""
        updates = ((k, self.found[k].parameter, u) for k, u in self.matched.updates.items())
        rows: list[Json] = [
            {"key": k, "tensor": p.name, "shape": list(p.shape), "rank": u.rank, "scale": u.scale}
            for k, p, u in updates
        ]
        rows += [
            {"key": n, "tensor": n, "shape": list(v.shape), "rank": None, "scale": None}
            for n, v in self.matched.whole.items()
        ]
        stored = self.graph.flow.tensor
        return [{**row, "bytes": stored(row["tensor"]).nbytes} for row in rows]

    def to_json(self) -> Json:
        """Fields of `merge --dry-run --json`."""
        size = weight_bytes(self.graph.model)
        return {"tensors": self.rows(), "bytes": size, "warnings": list(self.graph.notes)}

    def __str__(self) -> str:
        """A table, and what is written in all."""
        rows: list[tuple[str, ...]] = [("tensor", "shape", "rank", "scale", "bytes")]
        for r in self.rows():
            shape = "×".join(map(str, r["shape"]))
            scale = "whole" if r["scale"] is None else f"{r['scale']:g}"
            rows.append((r["key"], shape, str(r["rank"] or ""), scale, str(r["bytes"])))
        touched = sum(r["bytes"] for r in self.rows())
        total = weight_bytes(self.graph.model)
        return "\n".join([*table(rows), f"{total} bytes of weights, {touched} of them change"])


@blaming
def plan_onnx(base: StrPath, adapters: Adapters, options: OnnxMergeOptions) -> OnnxMergePlan:
    """See lora_fx.passes.verbs.merge.

    Raises:
        LoraFxError: Every reason not to merge that the files give.
    """
    source = Path(base)
    with trusting(options.trust):
        parts = given(adapters)
    graph, renamed = named_graph(source)
    merges = merges_of(graph.model.metadata_props.get(METADATA), str(source))
    refuse_again(source, merges, [(p.where, p.hash) for p in parts], again=options.again)
    found = find(graph)
    matched = _sum(parts, graph, found, options)
    return OnnxMergePlan(graph, found, tuple(parts), matched, renamed, merges)


def _sum(
    parts: Sequence[Given], graph: OnnxGraph, found: Found, options: OnnxMergeOptions
) -> Matched:
    """All adapters as one, in the graph's keys."""
    each = [match(p.adapter, graph, found, options.names) for p in parts]
    how = "cat" if options.how == "sum" else options.how
    if len(parts) == 1 and how == "cat":
        (one,) = each
        as_one = replace(parts[0].adapter, entries=dict(one.updates)).weighted(parts[0].weight)
        if one.whole and parts[0].weight != 1.0:
            raise LoraFxError(
                f"{parts[0].where}: weight {parts[0].weight:g}, and it holds whole tensors",
                "only updates in proportion to their scale can be weighted",
            )
        return Matched(as_one.lowrank, one.whole)
    if any(m.whole for m in each):
        raise LoraFxError("several adapters, and one holds whole tensors", "merge that one alone")
    bound = [
        (replace(p.adapter, entries=dict(m.updates)), p.weight)
        for p, m in zip(parts, each, strict=True)
    ]
    return Matched(dict(mix(bound, how, options.rank).lowrank), {})
