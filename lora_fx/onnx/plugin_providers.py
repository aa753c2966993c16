"""Providers of ONNX Runtime that are packages beside the runtime: plugins.

The runtime takes the library of such a package once in a process, by
`register_execution_provider_library`. Then `get_ep_devices` lists the provider's devices, and a
session takes a device, not a name. A package is found by the name of its module; the module says
what its provider is called, and where the library is.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fx.errors import LoraFxError, retold
from lora_fx.onnx.runtime_log import quiet_options

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass(frozen=True)
class Plugin:
    """A provider that a package brings.

    Attributes:
        title: The provider's name in a sentence.
        module: The module of the package.
        packages: The packages that have the module; one of them is enough.
        install: How to install it, as a hint.
        without_device: What to do where the provider finds no device, as a hint.
    """

    title: str
    module: str
    packages: tuple[str, ...]
    install: str
    without_device: str


CUDA_PLUGIN = Plugin(
    "CUDA",
    "onnxruntime_ep_cuda",
    ("onnxruntime-ep-cuda12", "onnxruntime-ep-cuda13"),
    "install lora-fx[gpu] (pip install 'lora-fx[gpu]'), whose runtime has CUDA; or use cpu",
    "install NVIDIA's driver and the libraries of CUDA; or use cpu",
)
"""CUDA for a runtime that has none. Never run: PyPI has neither package (2026-11-30)."""


def plugin_devices(plugin: Plugin) -> tuple[ort.OrtEpDevice, ...]:
    """Return the devices that a plugin's provider can run on, best first; at least one.

    Raises:
        LoraFxError: The package is not installed, does not fit the runtime, or has no device.
    """
    import onnxruntime as ort

    name = registered_name(plugin)
    devices = tuple(device for device in ort.get_ep_devices() if device.ep_name == name)
    if not devices:
        raise without_device(plugin)
    return devices


def without_device(plugin: Plugin) -> LoraFxError:
    """Return the error of a plugin's provider that finds no device."""
    return LoraFxError(f"{_unusable(plugin)}: it finds no GPU", plugin.without_device)


@functools.cache
def registered_name(plugin: Plugin) -> str:
    """Register a plugin's library, once in a process, and return its provider's name there.

    Raises:
        LoraFxError: The package is not installed, or does not fit the runtime.
    """
    import onnxruntime as ort

    packages = " or ".join(plugin.packages)
    missing = f"{_unusable(plugin)}: {packages} cannot be imported"
    with retold(missing, plugin.install, most=120):  # a driver's library may be missing
        package = importlib.import_module(plugin.module)
    quiet_options()  # registration logs what it finds
    refused = f"{_unusable(plugin)}: ONNX Runtime {ort.__version__} does not take {packages}"
    with retold(refused, plugin.install):
        name = str(package.get_ep_name())
        ort.register_execution_provider_library(name, package.get_library_path())
    return name


def _unusable(plugin: Plugin) -> str:
    return f"{plugin.title} was requested, but cannot be used"
