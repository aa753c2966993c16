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
        help="Of touched tensors: bf16, fp16, fp32, fp64.  [default: as stored]",
    )
    allow_unused: bool = flag(
        "--allow-unused", "Leave out updates that the base has no tensor for."
    )
    allow_missing: bool = flag(
        "--allow-missing", "Accept an adapter that lacks layers its config has."
    )
    any_base: bool = flag("--any-base", "Merge into other weights than it was trained on.")
    other_readers: bool = flag(
        "--other-readers", "Merge where more than its products reads a weight."
    )
    untie: bool = flag("--untie", "Give a tied output head a tensor of its own.")
    add: bool = flag("--add", "Add whole tensors that the base lacks: a new head.")
    again: bool = flag("--again", "Merge an adapter that is in the base already.")
    dequantise: bool = flag("--dequantise", "Store the weights of a quantised base as floats.")
    requantise: bool = flag("--requantise", "Store them as codes again, with the update in them.")
    lossy: bool = flag("--lossy", "Of --requantise: also where that loses most of the update.")
    link: bool = flag("--link", "Hard links for untouched files, instead of copies.")
    trust: bool = flag("--trust", TRUST)
    max_shard_size: str | None = option(
        "--max-shard-size", metavar="SIZE", help="Of --dequantise.  [default: 5GB]"
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
