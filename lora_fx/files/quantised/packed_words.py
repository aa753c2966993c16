"""The positions of codes that are packed into words."""

from __future__ import annotations

from lora_fx.files.quantised.quantised_weight import ALL


def packed_range(rows: slice, codes: int, words: int = 1) -> slice:
    """The range of words that holds a range of rows, where `words` words hold `codes` codes.

    >>> packed_range(slice(8, 20), 8), packed_range(slice(32, 64), 32, 3), packed_range(ALL, 8)
    (slice(1, 3, None), slice(3, 6, None), slice(None, None, None))
    """
    if rows == ALL:
        return ALL
    return slice(rows.start // codes * words, -(-rows.stop // codes) * words)


def bits_of(length: int, words: int) -> int:
    """The number of bits of each of `length` codes in `words` words of 32 bits.

    0 where no number of bits from 2 to 8 would do, or several would.

    >>> bits_of(128, 16), bits_of(100, 10), bits_of(128, 17)
    (4, 3, 0)
    """
    fitting = [bits for bits in range(2, 9) if -(-length * bits // 32) == words]
    if len(fitting) != 1:
        return 0
    return fitting[0]
