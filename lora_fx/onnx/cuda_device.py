"""The device that CUDA computes on, by the name that NVIDIA's driver gives it.

tests/cuda builds a stand-in for the CUDA runtime, with which ONNX Runtime makes sessions whose
numbers mean nothing. Its device has a name of its own, so that no session runs on it unseen.
"""

from __future__ import annotations

import ctypes

from lora_fx.errors import LoraFxError

DRIVER = "libcuda.so.1"
PLACEMENT_ONLY = "placement only"
LONGEST_NAME = 256


def driver_present() -> bool:
    """Whether the NVIDIA driver's library loads."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


def device_name() -> str:
    """Return the name of the first device; empty where the driver is missing or has none."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ""
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(LONGEST_NAME)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return ""
    if driver.cuDeviceGetName(name, LONGEST_NAME, device):
        return ""
    return name.value.decode(errors="replace")


def refuse_stand_in() -> None:
    """Raise where the device is the stand-in of tests/cuda.

    Raises:
        LoraFxError: The driver names the device so.
    """
    if device_name() != PLACEMENT_ONLY:
        return
    raise LoraFxError(
        f"the CUDA device is named {PLACEMENT_ONLY!r}: it is a stand-in that computes nothing",
        "take the folder of the stand-in off LD_LIBRARY_PATH, or use --provider cpu",
    )
