"""The ONNX side: op table, Graph and Emitter on onnx_ir, export, sessions and providers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_fx.adapter.invocation import adapter_starts
    from lora_fx.onnx.adapter_session import Session
    from lora_fx.onnx.invocation_tokens import invocations
    from lora_fx.onnx.train_session import TrainSession

__all__ = ["Session", "TrainSession", "adapter_starts", "invocations"]

# From 1.29 on, ONNX Runtime writes names and hashes of the models that it opens into a database of
# the user's and sends them to its makers. It reads this variable as it is imported; afterwards,
# disable_telemetry_events stops neither.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    if name == "Session":
        from lora_fx.onnx.adapter_session import Session

        return Session
    if name == "TrainSession":
        from lora_fx.onnx.train_session import TrainSession

        return TrainSession
    if name == "adapter_starts":
        from lora_fx.adapter.invocation import adapter_starts

        return adapter_starts
    if name == "invocations":
        from lora_fx.onnx.invocation_tokens import invocations

        return invocations
    raise AttributeError(f"module 'lora_fx.onnx' has no attribute {name!r}")
