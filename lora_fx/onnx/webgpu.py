"""ONNX Runtime's WebGPU provider, which is a package beside the runtime and no part of it."""

from __future__ import annotations

import contextlib
import threading
from os import PathLike
from typing import TYPE_CHECKING

from lora_fx.onnx.plugin_providers import Plugin, plugin_devices

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import onnxruntime as ort

PLUGIN = Plugin(
    "WebGPU",
    "onnxruntime_ep_webgpu",
    ("onnxruntime-ep-webgpu",),
    "pip install --no-deps onnxruntime-ep-webgpu, beside onnxruntime 1.32 or newer; or use cpu",
    "install a Vulkan driver; with ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 it takes a software one, "
    "which is slow; or use cpu",
)

WRONG_ON_DEVICE = ("And",)
"""Operators whose nodes run on the CPU. Of 0.4.0, And on one value and four ([1, 1, 1, 1] and
[3, 1, 1, 4]) leaves a program to later runs of any model in the process, in which each row of
[1, 1, 4, 4] is the first: a causal mask that masks nothing."""

_one_thread = threading.RLock()


def exclusive(provider: str) -> AbstractContextManager[object]:
    """A block that one thread is in at a time, where a provider takes one: WebGPU.

    Two threads that made values on its device ended each other's commands ("CommandEncoder is
    already finished", 0.4.0). All sessions of a process share the device.
    """
    if provider == "webgpu":
        return _one_thread
    return contextlib.nullcontext()


def options_for(path: str | PathLike[str]) -> dict[str, str]:
    """Return the provider's options for a file: the names of the nodes that stay on the CPU."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError):  # the runtime says what is wrong with the file
        return {}
    names = [node.name for node in graph.node if node.op_type in WRONG_ON_DEVICE and node.name]
    return {"forceCpuNodeNames": "\n".join(names)} if names else {}


def webgpu_devices() -> tuple[ort.OrtEpDevice, ...]:
    """Return the devices that the WebGPU provider can run on, best first; at least one.

    Raises:
        LoraFxError: The package is not installed, does not fit the runtime, or has no device.
    """
    return plugin_devices(PLUGIN)
