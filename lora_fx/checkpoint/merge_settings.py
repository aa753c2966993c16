"""The options of a merge: which numbers it writes, and what it accepts."""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.dtypes import FLOATING, long_name
from lora_fx.errors import LoraFxError, expect_name, near
from lora_fx.files.quantised.dequantise import SHARD
from lora_fx.text import size_in_bytes


def refuse_rank(how: str, rank: int | None) -> None:
    """Refuse a rank for a mix that does not take one."""
    if rank is not None and how != "svd":
        raise LoraFxError(
            f"rank has no effect for a {how} mix", "leave it out; only svd takes a rank"
        )


HOWS = ("sum", "cat", "linear", "svd")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The options of a merge, checked when they are made."""

    how: str = "sum"
    rank: int | None = None
    dtype: str | None = None
    allow_unused: bool = False
    untie: bool = False
    add: bool = False
    again: bool = False
    allow_missing: bool = False
    any_base: bool = False
    other_readers: bool = False
    trust: bool = False
    dequantise: bool = False
    requantise: bool = False
    lossy: bool = False
    max_shard_size: int | str | None = None

    def __post_init__(self) -> None:
        """Raise for an unknown mix or dtype, and for texts that are not sizes."""
        object.__setattr__(self, "dtype", long_name(self.dtype))
        self._check_dtype()
        self._check_mix()
        self._check_quantised()
        if self.max_shard_size is not None and not self.dequantise:
            raise LoraFxError(
                "--max-shard-size works only with --dequantise",
                "leave it out; otherwise the shards stay unchanged",
            )
        if self.shard_bytes < 1:
            raise LoraFxError(
                "shards of 0 bytes; expected 1 or more", "for example --max-shard-size 5GB"
            )

    def _check_dtype(self) -> None:
        if self.dtype in (None, *FLOATING):
            return
        name = str(self.dtype).removeprefix("torch.")
        choices = f"one of {', '.join(FLOATING)}"
        raise LoraFxError(f"unknown dtype {self.dtype!r}", near(name, FLOATING, choices))

    def _check_mix(self) -> None:
        expect_name(self.how, HOWS, "unknown mix", f"one of {', '.join(HOWS)}")
        refuse_rank(self.how, self.rank)
        if self.rank is not None and self.rank < 1:
            raise LoraFxError(f"rank is {self.rank}; expected 1 or more", "for example --rank 16")

    def _check_quantised(self) -> None:
        if self.dequantise and self.requantise:
            raise LoraFxError("--dequantise and --requantise exclude each other", "choose one")
        if self.lossy and not self.requantise:
            raise LoraFxError("--lossy works only with --requantise", "leave it out")
        if self.requantise and self.dtype is not None:
            raise LoraFxError(
                "--dtype does not work with --requantise, which keeps the dtypes", "leave it out"
            )

    @property
    def reads_codes(self) -> bool:
        """True where weights that are stored as codes are to be changed."""
        return self.dequantise or self.requantise

    @property
    def dtype_of_codes(self) -> str:
        """The dtype of weights that were codes."""
        return self.dtype or "bfloat16"

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard when codes become floats; raises for a text that is not a size."""
        if self.max_shard_size is None:
            return SHARD
        if isinstance(self.max_shard_size, int):
            return self.max_shard_size
        return size_in_bytes(self.max_shard_size)


LENIENT = MergeOptions(untie=True, again=True, any_base=True, other_readers=True)
"""Options for a merge that is only planned: what an option would allow is not refused."""
