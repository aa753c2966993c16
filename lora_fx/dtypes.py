"""The dtypes that files and graphs name, and the arrays that hold them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name such as float32 or bfloat16."""
    if hasattr(ml_dtypes, name):
        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return narrow
    return np.dtype(name)


def finfo(dtype: str | np.dtype[Any]) -> Any:
    """What numpy.finfo says of a floating dtype, narrow ones too."""
    wanted = numpy_dtype(dtype) if isinstance(dtype, str) else dtype
    return ml_dtypes.finfo(wanted)  # type: ignore[no-untyped-call]
