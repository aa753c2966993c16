"""Tensors in the memory of a device, as values of ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_fx.dtypes import Array
from lora_fx.onnx.plugin_providers import CUDA_PLUGIN, plugin_devices
from lora_fx.onnx.provider_nodes import CUDA

if TYPE_CHECKING:
    import onnxruntime as ort


def value_on(array: Array, device: str) -> ort.OrtValue:
    """Return a contiguous array as a value on a device: cpu, cuda or webgpu."""
    import onnxruntime as ort

    if device == "cuda" and CUDA not in ort.get_available_providers():
        return value_of_plugin(array, plugin_devices(CUDA_PLUGIN)[0])
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def value_of_plugin(array: Array, device: ort.OrtEpDevice) -> ort.OrtValue:
    """Return a contiguous array as a value in the memory of a plugin's device.

    A runtime without CUDA makes no values on "cuda" by name: it has no allocator of that name.
    """
    import onnxruntime as ort

    memory = device.memory_info(ort.OrtDeviceMemoryType.DEFAULT)
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, memory_info=memory)
    value.update_inplace(array)
    return value
