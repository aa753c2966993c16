"""The options of every merge into a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fx.cli.options import TRUST, flag, option

if TYPE_CHECKING:
    from lora_fx.checkpoint.merge_settings import MergeOptions


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options for the output of a merge into a checkpoint, and for what it accepts."""

    dtype: str | None = option(
        "--dtype",
        metavar="DTYPE",
        help="Store merged tensors as bf16, fp16, fp32 or fp64.  [default: as in BASE]",
    )
    allow_unused: bool = flag("--allow-unused", "Leave out updates whose tensors BASE lacks.")
    allow_missing: bool = flag(
        "--allow-missing",
        "Accept an adapter without updates for some layers that its config names.",
    )
    any_base: bool = flag("--any-base", "Allow a base that the adapter was not trained on.")
    other_readers: bool = flag(
        "--other-readers", "Merge into a weight that is also read outside its matmuls."
    )
    untie: bool = flag(
        "--untie", "Store an output head that is tied to the embedding as a tensor of its own."
    )
    add: bool = flag("--add", "Add whole tensors that BASE lacks, such as a new head.")
    again: bool = flag("--again", "Merge an adapter even if BASE contains it already.")
    dequantise: bool = flag("--dequantise", "Store merged weights of a quantised base as floats.")
    requantise: bool = flag(
        "--requantise", "Store merged weights of a quantised base as codes again."
    )
    lossy: bool = flag("--lossy", "Let --requantise lose most of an update to rounding.")
    link: bool = flag("--link", "Link unchanged files to those of BASE in place of copying them.")
    trust: bool = flag("--trust", TRUST)
    max_shard_size: str | None = option(
        "--max-shard-size",
        metavar="SIZE",
        help="Set the size of the shards that --dequantise writes.  [default: 5GB]",
    )

    def merge(self, how: str = "sum", rank: int | None = None) -> MergeOptions:
        """The options of a merge; raises if options contradict each other.

        Args:
            how: The mix of several adapters.
            rank: The rank of an svd mix.
        """
        from lora_fx.checkpoint.merge_settings import MergeOptions

        return MergeOptions(
            how=how,
            rank=rank,
            dtype=self.dtype,
            allow_unused=self.allow_unused,
            untie=self.untie,
            add=self.add,
            again=self.again,
            allow_missing=self.allow_missing,
            any_base=self.any_base,
            other_readers=self.other_readers,
            trust=self.trust,
            dequantise=self.dequantise,
            requantise=self.requantise,
            lossy=self.lossy,
            max_shard_size=self.max_shard_size,
        )
