"""The ONNX side: op table, Graph and Emitter on onnx_ir, export, sessions and providers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fx.onnx.session import Session
    from lora_fx.onnx.train_session import TrainSession

__all__ = ["Session", "TrainSession"]


def __getattr__(name: str) -> Any:
    if name == "Session":
        from lora_fx.onnx.session import Session

        return Session
    if name == "TrainSession":
        from lora_fx.onnx.train_session import TrainSession

        return TrainSession
    raise AttributeError(f"module 'lora_fx.onnx' has no attribute {name!r}")
