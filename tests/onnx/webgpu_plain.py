"""Runs a file on WebGPU as any program does, without what lora_fx knows of its provider.

`python -m tests.onnx.webgpu_plain MODEL FEEDS…` prints one line for each file of feeds (.npz): the
outputs as JSON, or the runtime's error. A process of its own, because some faults end it, and some
spoil its later runs.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np


def main() -> None:
    """Run the file of the first argument on those of the others."""
    os.environ["ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"] = "1"
    import onnxruntime as ort
    import onnxruntime_ep_webgpu as package

    ort.set_default_logger_severity(4)
    name = package.get_ep_name()
    ort.register_execution_provider_library(name, package.get_library_path())
    options = ort.SessionOptions()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    options.add_provider_for_devices(devices[:1], {})
    session = ort.InferenceSession(sys.argv[1], options)
    for path in sys.argv[2:]:
        print(json.dumps([output.tolist() for output in session.run(None, dict(np.load(path)))]))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
