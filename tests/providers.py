"""The providers of runtime tests: those on CUDA are skipped, and counted, without a device."""

from __future__ import annotations

import pytest

from lora_fx.onnx.session import driver_present

PROVIDERS = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not driver_present(), reason="no CUDA device"),
        ],
    ),
]
