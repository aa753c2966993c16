"""ONNX Runtime's WebGPU provider, which is a package beside the runtime and no part of it."""

from __future__ import annotations

import contextlib
import functools
import threading
from os import PathLike, fspath
from typing import TYPE_CHECKING

from lora_fx.errors import LoraFxError
from lora_fx.onnx.plugin_providers import Plugin, plugin_devices, without_device
from lora_fx.onnx.runtime_log import quiet_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import onnxruntime as ort

    from lora_fx.onnx.webgpu_faults import CpuNodes

PLUGIN = Plugin(
    "WebGPU",
    "onnxruntime_ep_webgpu",
    ("onnxruntime-ep-webgpu",),
    "pip install --no-deps onnxruntime-ep-webgpu, beside onnxruntime 1.32 or newer; or use cpu",
    "install a Vulkan driver; with ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 it takes a software one, "
    "which is slow; or use cpu",
)

NEGATION = """
<ir_version: 8, opset_import: ["": 17]>
negation (float[1] x) => (float[1] y) { y = Neg(x) }
"""

_one_thread = threading.RLock()


def exclusive(provider: str) -> AbstractContextManager[object]:
    """A block that one thread is in at a time, where a provider takes one: WebGPU.

    Two threads that made values on its device ended each other's commands ("CommandEncoder is
    already finished", 0.4.0). All sessions of a process share the device.
    """
    if provider == "webgpu":
        return _one_thread
    return contextlib.nullcontext()


def cpu_nodes_of(path: str | PathLike[str]) -> CpuNodes:
    """Return the nodes of a file that stay on the CPU, because they are wrong on the device.

    Raises:
        LoraFxError: Such a node has no name, by which the provider could be told.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from lora_fx.onnx.webgpu_faults import CpuNodes, cpu_nodes

    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError):  # the runtime says what is wrong with the file
        return CpuNodes()
    try:
        return cpu_nodes(model)
    except LoraFxError as error:
        raise LoraFxError(f"{fspath(path)}: {error.message}", error.hint) from None


@functools.cache
def webgpu_devices() -> tuple[ort.OrtEpDevice, ...]:
    """Return the devices that the WebGPU provider can run on, best first; at least one.

    Raises:
        LoraFxError: The package is not installed, does not fit the runtime, or has no device.
    """
    devices = plugin_devices(PLUGIN)
    if not _works(devices[0]):
        raise without_device(PLUGIN)
    return devices


def _works(device: ort.OrtEpDevice) -> bool:
    """Whether a session can be made on a device: one is listed without any Vulkan driver too."""
    import onnxruntime as ort
    from onnx import parser

    model = parser.parse_model(NEGATION)
    options = quiet_options()
    options.add_provider_for_devices([device], {})
    try:
        ort.InferenceSession(model.SerializeToString(), options)
    except Exception:  # the runtime's own errors have no other base
        return False
    return True
