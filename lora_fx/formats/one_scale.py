"""One scale or one alpha for all updates of a file, and the ratio of other scales in B.

Some formats have one such number for a file. The most frequent one is written, and B of an update
with another is multiplied by the ratio of the two, so that ΔW = s · B A stays. A format without any
scale has s = 1 for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import finite

_FP32 = np.finfo(np.float32)


def most_frequent(numbers: Iterable[float]) -> float:
    """Return the scale or alpha of most updates that is not 0; 1 if all are 0.

    >>> most_frequent([0.5, 2.0, 2.0, 0.0, 0.0, 0.0]), most_frequent([0.0])
    (2.0, 1.0)
    """
    usable = Counter(number for number in numbers if number)
    if not usable:
        return 1.0
    number, _ = usable.most_common(1)[0]
    return number


def multiplied(
    array: Array, factor: float, key: str, refused: Callable[[str, str], LoraFxError]
) -> Array:
    """Return B, or a whole ΔW, times a scale or the ratio of two scales.

    Args:
        array: In fp32. One with NaN or infinite values is returned as it is.
        factor: The scale or the ratio.
        key: The key of the update.
        refused: Key and reason → the format's error.

    Raises:
        LoraFxError: The product is infinite in fp32, or its largest number is below fp32's normal
            numbers, whose digits are cut off.
    """
    if not array.any() or not finite(array):
        return array
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product = array * np.float32(factor)
        largest = np.abs(product).max()
    if factor != 0.0 and not _FP32.tiny <= largest <= _FP32.max:
        raise refused(
            key,
            f"the file has no field for its scale, and its numbers times {factor:g} are out of "
            "fp32's range",
        )
    return product
