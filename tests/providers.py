"""The providers of runtime tests: those on a GPU are skipped, and counted, without a device."""

from __future__ import annotations

import os

import pytest
import torch

# Tests take a GPU that is computed on the CPU. Read when the provider is registered.
os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")

from lora_fx.onnx.session import providers

GPU = providers()[0]
"""The fastest provider here: cuda or webgpu; cpu where there is no other."""
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU == "cpu", reason="no provider on a GPU"),
]
PROVIDERS = ["cpu", pytest.param(GPU, id="gpu", marks=ON_GPU)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        id="gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
"""torch's devices, in the place of a provider."""
