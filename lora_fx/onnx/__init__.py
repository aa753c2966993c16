"""The ONNX side: op table, Graph and Emitter on onnx_ir, export, sessions and providers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_fx.onnx.session import Session, TrainSession

__all__ = ["Session", "TrainSession"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from lora_fx.onnx import session

        return getattr(session, name)
    raise AttributeError(f"module 'lora_fx.onnx' has no attribute {name!r}")
