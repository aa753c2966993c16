"""ONNX Runtime sessions: providers that really work, and runs by input name.

The runtime lists CUDA on machines without a GPU and falls back without an error, so the driver
is looked for first and the session's own first provider is compared afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.dtypes import Array, from_onnx, numpy_dtype
from lora_fx.errors import (
    LoraFxError,
    expect,
    expect_file,
    expect_name,
    expect_path,
    one_line,
    retold,
)
from lora_fx.inputs import OTHER_SIZES
from lora_fx.onnx.adapter_ids import RowChoice
from lora_fx.onnx.cuda_device import driver_present as driver_present  # tests ask it here
from lora_fx.onnx.cuda_device import refuse_stand_in
from lora_fx.onnx.invocation_tokens import starts_in
from lora_fx.onnx.manifest import PROPERTY, Manifest, manifest_in, read_manifest, with_base
from lora_fx.onnx.manifest import manifest_of as manifest_of  # docs/serving.md reads it here
from lora_fx.onnx.plugin_providers import CUDA_PLUGIN, plugin_devices
from lora_fx.onnx.provider_nodes import CUDA, NAMES, RECORD
from lora_fx.onnx.row_starts import Starts
from lora_fx.onnx.runtime_log import quiet_options
from lora_fx.onnx.unverified import CUDA_PACKAGES, never_run
from lora_fx.onnx.webgpu import NEGATION, cpu_nodes_of, exclusive, webgpu_devices
from lora_fx.progress import stage
from lora_fx.text import is_whole

if TYPE_CHECKING:
    import onnxruntime as ort


Wanted = list[str | tuple[str, dict[str, str]]]
"""The runtime's names of providers, with options, in the order of preference."""

WITHOUT_CUDA = (
    "install lora-fx[gpu] on a machine with a GPU (pip install 'lora-fx[gpu]'), or use --provider "
    "cpu"
)
MOST_THREADS = 1024
MOST_WITHOUT_DATA = 256 << 20
"""The size in bytes above which a model's own file holds its weights."""
NARROW = frozenset((2, 3, 10, 16, 21, 22))
"""TensorProto's UINT8, INT8, FLOAT16, BFLOAT16, UINT4 and INT4."""

_few_runs: ContextVar[bool] = ContextVar("few_runs", default=False)


@contextlib.contextmanager
def few_runs() -> Iterator[None]:
    """A block whose sessions are for the few runs of a proof.

    By default the runtime copies weights into the order in which products read them, once for all
    runs. In this block the float32 weights of a data file stay in the pages of that file, so that a
    proof needs no second model in memory.
    """
    token = _few_runs.set(True)
    try:
        yield
    finally:
        _few_runs.reset(token)


def _stays_in_place(path: str | PathLike[str]) -> bool:
    """Whether a file has a data file, and no weights in it that are narrower than float32.

    Products over codes and over float16 have another kernel, with other rounding, where these are
    packed.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if os.path.getsize(path) > MOST_WITHOUT_DATA:
            return False
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError):  # the runtime says what is wrong with the file
        return False
    stored_apart = [
        tensor
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL and len(tensor.dims) > 1
    ]
    narrow = any(tensor.data_type in NARROW for tensor in stored_apart)
    return bool(stored_apart) and not narrow


@dataclass
class RuntimeSession:
    """A loaded model and the provider that it runs on.

    `note` is a line to show to the user, or empty; `path` is the file.
    """

    session: ort.InferenceSession
    provider: str
    note: str = ""
    path: str = ""

    @functools.cached_property
    def row_choice(self) -> RowChoice | None:
        """The adapters that a row can choose, in a file of mode batch."""
        shapes = {node.name: node.shape for node in self.session.get_inputs()}
        return RowChoice.from_text(self.metadata.get(PROPERTY), shapes)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the file, by key."""
        metadata: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
        return metadata

    @property
    def inputs(self) -> list[ort.NodeArg]:
        """The graph's inputs, but for A and B of a switchable file."""
        manifest = self._switchable
        of_adapters = manifest.names() if manifest is not None and manifest.required else ()
        return [node for node in self.session.get_inputs() if node.name not in of_adapters]

    @property
    def input_names(self) -> list[str]:
        """The names of these inputs."""
        return [node.name for node in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs."""
        return [node.name for node in self.session.get_outputs()]

    @functools.cached_property
    def _switchable(self) -> Manifest | None:
        """The manifest of a file of mode switch."""
        text = self.metadata.get(PROPERTY)
        if text is None or read_manifest(text, "the model").get("mode") != "switch":
            return None
        return with_base(manifest_in(text, "the model"), Path(self.path))

    @functools.cached_property
    def _starts(self) -> Starts | None:
        """What the file's manifest says of starts, if an adapter is an aLoRA."""
        return starts_in(self.metadata.get(PROPERTY), self.path or "the model")

    @functools.cached_property
    def _required(self) -> dict[str, Array]:
        """Zeros for A and B of a file in which they have no defaults, and the base's tensors."""
        if self._switchable is None or not self._switchable.required:
            return {}
        return {**self._switchable.zeros(), **self._switchable.base}

    @functools.cached_property
    def base_factors(self) -> dict[str, Array]:
        """Zeros for A and B, where a run of the base has to be given them.

        That is in a file without defaults for them, and on a provider without rank 0. With finite
        activations, zeros of rank 1 change as little as a file's own defaults of rank 0, a product
        with which ends the process in WebGPU's MatMul (onnxruntime-ep-webgpu 0.4.0).
        """
        manifest = self._switchable
        if self._required or self.provider != "webgpu" or manifest is None:
            return self._required
        factors = {name for slot in manifest.slots.values() for name in slot.names}
        zeros = {}
        for node in self.session.get_overridable_initializers():
            if node.name in factors:
                sizes = [size if isinstance(size, int) else 1 for size in node.shape]
                zeros[node.name] = np.zeros(sizes, numpy_dtype(from_onnx(node.type)))
        return zeros

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays by input name, and return arrays by output name.

        Feeds that the graph does not take are left out.

        Raises:
            LoraFxError: The runtime refuses the feeds, or a row asks for an adapter that is none.
        """
        if self.row_choice is not None:
            self.row_choice.check(feeds)
        if self._switchable is not None:
            self._switchable.check_whole({**self.base_factors, **feeds}, "the base model")
        if self._starts is not None:
            self._starts.check(feeds)
        with told(feeds, OTHER_SIZES):
            return self.outputs(feeds)

    def outputs(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run without checks of ids, and with the runtime's own errors."""
        input_names = {node.name for node in self.session.get_inputs()}
        for initialiser in self.session.get_overridable_initializers():
            input_names.add(initialiser.name)  # A and B of a switchable file
        given = {**self.base_factors, **feeds}
        arrays = {name: widened(given[name]) for name in input_names.intersection(given)}
        names = self.output_names
        with exclusive(self.provider):
            return tensors_by_name(names, self.session.run(names, arrays))


def tensors_by_name(
    names: Sequence[str], outputs: Sequence[Array | Sequence[Array]]
) -> dict[str, Array]:
    """Return a run's outputs by name; the tensors of a sequence y are `y[0]`, `y[1]` and so on."""
    tensors: dict[str, Array] = {}
    for name, value in zip(names, outputs, strict=True):
        if isinstance(value, list):
            for i, tensor in enumerate(value):
                tensors[f"{name}[{i}]"] = tensor
        elif isinstance(value, np.ndarray):
            tensors[name] = value
    return tensors


@contextlib.contextmanager
def told(
    feeds: Mapping[str, Array],
    hint: str = "check sizes and dtypes of the inputs against the model",
) -> Iterator[None]:
    """A block whose runtime errors become LoraFxErrors with the sizes of the feeds."""
    try:
        yield
    except Exception as error:
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        message = str(error).partition("Name:")[2] or str(error)
        raise LoraFxError(
            f"ONNX Runtime fails at {one_line(sizes, 120)}: {one_line(message, 240)}",
            hint,
        ) from error


def widened(array: Array) -> Array:
    """Return a bfloat16 array as float32, because the runtime accepts no bfloat16 arrays."""
    if array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array


def open_session(
    path: str | PathLike[str],
    provider: str = "auto",
    threads: int = 0,
    *,
    rewrites: bool = True,
    exact: bool = True,
    patterns: bool = True,
    external: Mapping[str, Array] | None = None,
    cuda_graph: bool = False,
) -> RuntimeSession:
    """Load a model.

    Args:
        path: The .onnx file.
        provider: cpu; cuda or webgpu, which is an error when it cannot be had; or auto: CUDA where
            it can be had, else CPU with a note.
        threads: The number of threads; 0 takes that of OMP_NUM_THREADS, or leaves it to the
            runtime, which does not read that variable.
        rewrites: Let the runtime rewrite the graph.
        exact: Products are computed in float32. Unasked, the runtime makes int8 of activations at
            block-wise DequantizeLinear (level 4 of MatMulNBits): rel 5e-3, and CUDA multiplies in
            TF32, with 10 bits of each factor.
        patterns: Keep one block of memory for all values of a run at sizes seen before.
        external: Arrays in the place of initialisers that lie in a data file, of equal shapes
            and dtypes.
        cuda_graph: On CUDA, let the runtime capture a graph of a run and replay it.

    Raises:
        LoraFxError: The file does not load, or a provider was asked for and is not there, or
            CUDA's device is the stand-in of tests/cuda.
    """
    import onnxruntime as ort

    expect_path(path, "the model", "the path of an .onnx file")
    expect_file(path, "pass the path of an .onnx file")
    _check_name(provider)
    if not is_whole(threads) or not 0 <= threads <= MOST_THREADS:
        text = one_line(repr(threads), 60)
        raise LoraFxError(
            f"threads is {text}; expected 0 to {MOST_THREADS}", "pass 0 to let ONNX Runtime choose"
        )

    options = quiet_options()
    options.enable_mem_pattern = patterns
    if _few_runs.get() and _stays_in_place(path):
        options.add_session_config_entry("session.disable_prepacking", "1")
    threads = threads or _threads_of_user()
    if threads:
        options.intra_op_num_threads = threads
    if not rewrites:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")

    if external:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in external.values()]
        # add_initializer would be ignored, without a word, where W + A·B is folded at load
        options.add_external_initializers(list(external), values)

    note = ""
    wanted: Wanted | None = ["CPUExecutionProvider"]
    if provider == "webgpu":
        device = webgpu_devices()[0]
        on_cpu = cpu_nodes_of(path)
        note = on_cpu.note
        options.add_provider_for_devices([device], on_cpu.options)
        options.add_session_config_entry(*RECORD)
        wanted = None  # what the options hold
    elif provider in ("auto", "cuda") and driver_present() and (provider == "cuda" or _has_cuda()):
        of_cuda = {"use_tf32": "0"} if exact else {}
        if cuda_graph:
            of_cuda["enable_cuda_graph"] = "1"
        wanted = cuda_providers(options, of_cuda)
    refused = f"{fspath(path)}: ONNX Runtime cannot load it"
    hint = "check whether it was written for a newer opset"
    with retold(refused, hint), stage("loading the file in ONNX Runtime"):
        session = ort.InferenceSession(fspath(path), options, providers=wanted)

    used_provider = NAMES.get(session.get_providers()[0], "cpu")
    if used_provider == "cuda":
        refuse_stand_in()
    if provider == "cuda" and used_provider != "cuda":
        raise _without_cuda()
    if used_provider == "cuda" and CUDA not in ort.get_available_providers():
        note = never_run(CUDA_PACKAGES)
    # A machine without a GPU runs on its CPU, which is no news.
    if provider == "auto" and used_provider == "cpu" and driver_present():
        note = "running on CPU: this build of ONNX Runtime does not use the GPU"
    return RuntimeSession(session, used_provider, note, fspath(path))


def _threads_of_user() -> int:
    """Return the first number in OMP_NUM_THREADS; 0 if there is none."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not first.isdecimal():
        return 0
    return min(int(first), MOST_THREADS)


def check_provider(provider: str) -> None:
    """Raise for a provider that no session gets on this machine, before other work is done.

    Every verb that takes a provider calls this first: a model may take minutes to capture. It
    imports ONNX Runtime for cuda and webgpu, and nothing for auto and cpu.

    Args:
        provider: auto, cpu, cuda or webgpu.

    Raises:
        LoraFxError: The name is unknown, or the provider cannot be had, in the words of
            `open_session`.
    """
    _check_name(provider)
    if provider == "webgpu":
        webgpu_devices()
    elif provider == "cuda":
        _check_cuda()


def _check_name(provider: str) -> None:
    """Raise for what is no name of a provider."""
    use = "use auto, cpu, cuda or webgpu"
    expect(provider, str, "provider", "a text", use)
    expect_name(provider, ("auto", "cpu", "cuda", "webgpu"), "unknown provider", use)


def _check_cuda() -> None:
    """Raise if a session of one node would not be on CUDA."""
    if not driver_present():
        raise _without_cuda()

    import onnxruntime as ort
    from onnx import parser

    options = quiet_options()
    wanted = cuda_providers(options, {})
    negation = parser.parse_model(NEGATION).SerializeToString()
    with retold("CUDA was requested, but cannot be used", WITHOUT_CUDA):
        session = ort.InferenceSession(negation, options, providers=wanted)
    if NAMES.get(session.get_providers()[0]) != "cuda":
        raise _without_cuda()
    refuse_stand_in()


def _without_cuda() -> LoraFxError:
    """Return the error of a session that was to be on CUDA and is not."""
    why = "its libraries did not load" if driver_present() else "the driver did not load"
    return LoraFxError(f"CUDA was requested, but cannot be used: {why}", WITHOUT_CUDA)


def cuda_providers(options: ort.SessionOptions, of_cuda: Mapping[str, str]) -> Wanted | None:
    """Return the runtime's providers for a session on CUDA; None where the options hold them.

    Args:
        options: The session's, to which a plugin's device is added.
        of_cuda: The options of the provider.

    Raises:
        LoraFxError: The runtime has no CUDA, and there is no plugin that can be used.
    """
    import onnxruntime as ort

    options.add_session_config_entry(*RECORD)
    if CUDA in ort.get_available_providers():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        return [(CUDA, dict(of_cuda)), "CPUExecutionProvider"]
    options.add_provider_for_devices([plugin_devices(CUDA_PLUGIN)[0]], dict(of_cuda))
    return None


def usable_provider(provider: str) -> str:
    """Return the provider that a session gets: for auto, CUDA where it can be had, else the CPU."""
    if provider != "auto":
        return provider
    return "cuda" if "cuda" in providers() else "cpu"


def providers() -> list[str]:
    """Return this machine's providers, fastest first: cuda, webgpu, cpu.

    CUDA wants the driver, and a runtime that was built with it or a plugin beside the runtime.
    """
    usable = []
    if driver_present() and _has_cuda():
        usable.append("cuda")
    with contextlib.suppress(LoraFxError):
        webgpu_devices()
        usable.append("webgpu")
    return [*usable, "cpu"]


def _has_cuda() -> bool:
    """Whether the runtime was built with CUDA, or has a plugin with a device."""
    import onnxruntime as ort

    if CUDA in ort.get_available_providers():
        return True
    with contextlib.suppress(LoraFxError):
        return bool(plugin_devices(CUDA_PLUGIN))
    return False
