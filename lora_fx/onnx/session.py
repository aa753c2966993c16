"""ONNX Runtime sessions: providers that are really there, and runs by input name.

The runtime lists CUDA on machines without a GPU and falls back without an error, so the driver
is looked for first and the session's own first provider is compared afterwards.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.inputs import BATCH, Input, Inputs


def driver_present() -> bool:
    """True when the NVIDIA driver's library loads."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@dataclass
class RuntimeSession:
    """A loaded model and the provider that it runs on; `note` is the line to show, or empty."""

    session: Any
    provider: str
    note: str = ""

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [i.name for i in self.session.get_inputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """{output name: array}; feeds that the graph does not take are left out."""
        known = {k: v for k, v in feeds.items() if k in self.input_names}
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, known), strict=True))


def open_session(
    path: str | PathLike[str],
    provider: str = "auto",
    threads: int = 0,
    *,
    rewrites: bool = True,
    external: Mapping[str, Array] | None = None,
) -> RuntimeSession:
    """Load a model.

    Args:
        path: The .onnx file.
        provider: auto: CUDA when it is really there, else CPU with a note; cpu; cuda: an error
            when it cannot be had.
        threads: 0 leaves the number to the runtime.
        rewrites: Let the runtime rewrite the graph.
        external: In the place of initialisers that lie in a data file: equal shapes and dtypes.

    Raises:
        LoraFxError: The file does not load, or CUDA was asked for and is not there.
    """
    import onnxruntime as ort

    if provider not in ("auto", "cpu", "cuda"):
        raise LoraFxError(f"no provider {provider!r}", "auto, cpu or cuda")
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if not rewrites:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    held = {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in (external or {}).items()}
    if held:
        options.add_external_initializers(list(held), list(held.values()))
    built = "CUDAExecutionProvider" in ort.get_available_providers()
    usable = provider != "cpu" and built and driver_present()
    if usable and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    wanted = ["CUDAExecutionProvider"] * usable + ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(fspath(path), options, providers=wanted)
    except Exception as e:  # the runtime's exceptions have no common base
        raise LoraFxError(
            f"{fspath(path)}: ONNX Runtime cannot load it: {one_line(e)}",
            "was it written for a newer opset?",
        ) from e
    got = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    if provider == "cuda" and got != "cuda":
        why = "the driver did not load" if not driver_present() else "its libraries did not load"
        raise LoraFxError(
            f"CUDA was asked for and cannot be had: {why}",
            "pip install 'lora-fx[gpu]' on a machine with a GPU, or --provider cpu",
        )
    note = "running on CPU: no usable CUDA device" if provider == "auto" and got == "cpu" else ""
    return RuntimeSession(session, got, note)


_DTYPES = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(bool)": "bool"}


IMAGE = 64
"""Height and width of a sampled image where a file leaves them open: smaller ones would vanish in
the strides of most models."""


def signature(session: RuntimeSession) -> Inputs:
    """The inputs of a loaded model; names of dimensions become symbols.

    Open heights and widths of images (floats of four dimensions) are IMAGE, as in a capture, where
    they are never dynamic unasked.
    """
    specs = []
    for i in session.session.get_inputs():
        dtype = _DTYPES.get(i.type, i.type.removeprefix("tensor(").removesuffix(")"))
        image = len(i.shape) == 4 and "float" in dtype and not i.name.startswith("past_key_values.")
        sizes = [IMAGE if image and k > 1 and not isinstance(d, int) else d
                 for k, d in enumerate(i.shape)]  # fmt: skip
        shape = tuple(d if isinstance(d, int) else 2 for d in sizes)
        dims = {k: str(d) for k, d in enumerate(sizes) if not isinstance(d, int)}
        specs.append(
            Input(i.name, dtype, shape, {k: BATCH if k == 0 else v for k, v in dims.items()})
        )
    return Inputs(tuple(specs))
