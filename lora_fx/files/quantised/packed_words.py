"""Where codes lie that are packed into words."""

from __future__ import annotations

from lora_fx.files.quantised.quantised_weight import ALL


def packed_range(rows: slice, codes: int, words: int = 1) -> slice:
    """Where the codes of rows lie, `codes` of them in `words` words.

    >>> packed_range(slice(8, 20), 8), packed_range(slice(32, 64), 32, 3), packed_range(ALL, 8)
    (slice(1, 3, None), slice(3, 6, None), slice(None, None, None))
    """
    if rows == ALL:
        return ALL
    return slice(rows.start // codes * words, -(-rows.stop // codes) * words)


def bits_of(length: int, words: int) -> int:
    """How many bits `length` codes have that lie in `words` words of 32; 0 where none would do.

    >>> bits_of(128, 16), bits_of(100, 10), bits_of(128, 17)
    (4, 3, 0)
    """
    fits = [b for b in range(2, 9) if -(-length * b // 32) == words]
    return fits[0] if len(fits) == 1 else 0
