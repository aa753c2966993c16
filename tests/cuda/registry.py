"""Print the kernels of ONNX Runtime's CUDA provider and the schemas of all operators, as JSON.

Tests start this as a script in a child process that sees the stand-in with TensorRT's libraries:
the runtime lists the kernels of all its providers, or ends with a segmentation fault.
"""

from __future__ import annotations

import json
from typing import Any

from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from lora_fx.onnx.provider_nodes import CUDA


def parameters(listed: Any) -> list[tuple[str, str, bool]]:
    """The name, the type's name and whether it must be given, of each input or output."""
    optional = "Optional"
    return [(one.name, one.typeStr, not str(one.option).endswith(optional)) for one in listed]


def main() -> None:
    kernels = [
        (kernel.domain, kernel.op_name, *kernel.version_range, dict(kernel.type_constraints))
        for kernel in runtime.get_all_opkernel_def()
        if kernel.provider == CUDA
    ]
    on_cpu = {
        (kernel.domain, kernel.op_name)
        for kernel in runtime.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    schemas = [
        (
            schema.domain,
            schema.name,
            schema.since_version,
            parameters(schema.inputs),
            parameters(schema.outputs),
        )
        for schema in runtime.get_all_operator_schema()
    ]
    print(json.dumps({"kernels": kernels, "on_cpu": sorted(on_cpu), "schemas": schemas}))


if __name__ == "__main__":
    main()
