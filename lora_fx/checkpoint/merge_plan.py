"""The plan of a merge: the change of each tensor, and the record in the output's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.provenance import history, layout_hash, sample_hash
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.checkpoint.tied_names import Tie
from lora_fx.errors import stamp
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.hub import hub_record
from lora_fx.files.safetensors import TensorInfo
from lora_fx.probe.carried import FIELD, is_of
from lora_fx.probe.probe import Probe
from lora_fx.text import Json, human, table


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter to merge.

    Attributes:
        adapter: Its updates, without the weight.
        weight: What they are multiplied by.
        where: Its name in messages.
        hash: Its hash, without the weight.
        path: Its file or folder, where it was read from one.
        stated: True where the caller gave the weight, and it was not left at 1.
    """

    adapter: Adapter
    weight: float
    where: str
    hash: str
    path: Path | None = None
    stated: bool = False

    def record(self) -> Json:
        """The adapter's part of the output's metadata."""
        return {"hash": self.hash, "weight": self.weight, **hub_record(self.path)}


_RECORDED = ("allow_unused", "allow_missing", "other_readers", "dequantise", "requantise")


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be carried out.

    Attributes:
        base: The checkpoint.
        adapters: What is merged into it.
        changes: Tensor of the output → how it is computed.
        added: Names of those tensors that the base lacks → the shard that gets them.
        tie: Set where config.json has to say that head and embedding are no longer tied.
        one_use: Keys of updates for one use of a tied table, which is untied for them.
        notes: Warnings for the user.
        options: The options of the merge.
        unverified: The notes that say why the base could not be verified; empty if every adapter
            records that this is the base it was trained on.
    """

    base: Checkpoint
    adapters: tuple[WeightedAdapter, ...]
    changes: Mapping[str, TensorChange]
    added: Mapping[str, str] = field(default_factory=dict)
    tie: Tie | None = None
    one_use: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    options: MergeOptions = field(default_factory=MergeOptions)
    unverified: tuple[str, ...] = ()

    def record(self) -> str:
        """The metadata of the output: the base's history and this merge, without defaults."""
        layout = layout_hash(self.base.tensors)
        sample = sample_hash(self.replaced_tensors())
        merge: Json = {
            **stamp(),
            "base": {"layout": layout, "sample": sample, **hub_record(self.base.path)},
            "adapters": [adapter.record() for adapter in self.adapters],
            "dtype": self.options.dtype,
        }
        options = self._recorded_options()
        if options:
            merge["options"] = options
        return json.dumps([*history(self.base), merge], separators=(",", ":"))

    def probe(self) -> tuple[str | None, str]:
        """Return the text of the probe that holds for the output, and why there is none.

        The reason is empty where no adapter has a probe.
        """
        texts = [
            item.adapter.metadata[FIELD] for item in self.adapters if FIELD in item.adapter.metadata
        ]
        if not texts:
            return None, ""
        if len(self.adapters) > 1:
            return None, "several adapters are merged"
        (adapter,) = self.adapters
        if adapter.weight != 1:
            return None, f"the adapter is merged with weight {adapter.weight:g}"
        if history(self.base):
            return None, "the base has an adapter merged into it already"
        if not is_of(Probe.from_text(texts[0], adapter.where), adapter.hash):
            return None, f"that of {adapter.where} is of the adapter as it was before a change"
        return texts[0], ""

    def _recorded_options(self) -> Json:
        """Return the options that affect the written numbers, if they differ from the defaults."""
        options: Json = {}
        if len(self.adapters) > 1 and self.options.how in ("linear", "svd"):
            options["how"] = self.options.how
            if self.options.rank is not None:
                options["rank"] = self.options.rank
        for name in _RECORDED:
            if getattr(self.options, name):
                options[name] = True
        return options

    def replaced_tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """The base tensors that change, with their names."""
        for name in self.changes:
            if name not in self.added:
                yield name, self.base.tensors[name]

    @property
    def touched_bytes(self) -> int:
        """The number of computed bytes in the output."""
        return sum(change.nbytes for change in self.changes.values())

    @property
    def disk(self) -> int:
        """The size of the output in bytes, without the growth of headers."""
        replaced = 0
        for name, change in self.changes.items():
            if name not in self.added:
                replaced += change.source.stop - change.source.start
        return self.base.size + self.touched_bytes - replaced

    def to_json(self) -> Json:
        """The JSON of a dry run."""
        return {
            "tensors": [change.to_json() for change in self.changes.values()],
            "touched_bytes": self.touched_bytes,
            "disk_bytes": self.disk,
        }

    def __str__(self) -> str:
        """A table of the plan, and its totals."""
        rows: list[tuple[str, ...]] = [("tensor", "shape", "dtype", "update")]
        for change in self.changes.values():
            shape = "×".join(map(str, change.shape))
            rows.append((change.name, shape, change.dtype, "; ".join(change.what)))
        total = len(self.base.tensors) + len(self.added)
        disk = human(self.disk)
        lines = table(rows)
        lines.append(
            f"{len(self.changes)} of {total} tensors change, {human(self.touched_bytes)}B of "
            f"{disk}B; disk needed: {disk}B"
        )
        return "\n".join(lines)
