"""ONNX Runtime sessions: providers that are really there, and runs by input name.

The runtime lists CUDA on machines without a GPU and falls back without an error, so the driver
is looked for first and the session's own first provider is compared afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.conditions import Condition
from lora_fx.dtypes import Array, from_onnx
from lora_fx.errors import LoraFxError, expect, expect_name, expect_path, one_line, retold
from lora_fx.inputs import BATCH, OTHER_SIZES, SIZES, Input, Inputs, Named
from lora_fx.onnx.manifest import (
    PROPERTY,
    Manifest,
    RowChoice,
    conditions_of,
    manifest_in,
    manifest_of,
    read_file,
)
from lora_fx.onnx.runtime_log import quiet_options
from lora_fx.text import Json, is_whole, near

if TYPE_CHECKING:
    import onnxruntime as ort

    from lora_fx.formats.registry import FormatName


MOST_THREADS = 1024


def driver_present() -> bool:
    """True when the NVIDIA driver's library loads."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@dataclass
class RuntimeSession:
    """A loaded model and the provider that it runs on.

    `note` is a line to show to the user, or empty.
    """

    session: ort.InferenceSession
    provider: str
    note: str = ""

    @functools.cached_property
    def row_choice(self) -> RowChoice | None:
        """Which adapter a row may ask for, in a file of mode batch."""
        shapes = {i.name: i.shape for i in self.session.get_inputs()}
        return RowChoice.from_text(self.metadata.get(PROPERTY), shapes)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says of itself, by key."""
        found: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
        return found

    @property
    def input_names(self) -> list[str]:
        """The names of the graph's inputs."""
        return [i.name for i in self.session.get_inputs()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays by input name and give arrays by output name.

        Feeds that the graph does not take are left out.

        Raises:
            LoraFxError: The runtime refuses the feeds, or a row asks for an adapter that is none.
        """
        if self.row_choice is not None:
            self.row_choice.check(feeds)
        with told(feeds, OTHER_SIZES):
            return self.outputs(feeds)

    def outputs(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `run`, but with the runtime's own errors, and with any ids of rows."""
        optional = self.session.get_overridable_initializers()  # A and B of a switchable file
        taken = {*self.input_names, *(i.name for i in optional)}
        known = {k: _widened(feeds[k]) for k in taken.intersection(feeds)}
        names = [o.name for o in self.session.get_outputs()]
        return tensors_by_name(names, self.session.run(names, known))


def tensors_by_name(
    names: Sequence[str], outputs: Sequence[Array | Sequence[Array]]
) -> dict[str, Array]:
    """The outputs of a run by name, those of a sequence y as `y[0]`, `y[1]` and so on."""
    tensors: dict[str, Array] = {}
    for name, value in zip(names, outputs, strict=True):
        if isinstance(value, list):
            tensors |= {f"{name}[{i}]": tensor for i, tensor in enumerate(value)}
        elif isinstance(value, np.ndarray):
            tensors[name] = value
    return tensors


@contextlib.contextmanager
def told(
    feeds: Mapping[str, Array],
    hint: str = "check sizes and dtypes of the inputs against the model",
) -> Iterator[None]:
    """The runtime's errors, which have no common base, as one of ours that names the sizes."""
    try:
        yield
    except Exception as e:
        sizes = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds.items())
        said = str(e).partition("Name:")[2] or str(e)
        raise LoraFxError(
            f"ONNX Runtime fails at {one_line(sizes, 120)}: {one_line(said, 240)}",
            hint,
        ) from e


def _widened(array: Array) -> Array:
    """bfloat16, which the runtime takes from no array, as float32; anything else as it is."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def open_session(
    path: str | PathLike[str],
    provider: str = "auto",
    threads: int = 0,
    *,
    rewrites: bool = True,
    exact: bool = True,
    patterns: bool = True,
    external: Mapping[str, Array] | None = None,
) -> RuntimeSession:
    """Load a model.

    Args:
        path: The .onnx file.
        provider: cpu; cuda, which is an error when it cannot be had; or auto: CUDA when it is
            really there, else CPU with a note.
        threads: How many; 0 leaves the number to the runtime.
        rewrites: Let the runtime rewrite the graph.
        exact: Products are computed in float32. Unasked, the runtime makes int8 of activations at
            block-wise DequantizeLinear (level 4 of MatMulNBits): rel 5e-3, and CUDA multiplies in
            TF32, with 10 bits of each factor.
        patterns: Keep one block of memory for all values of a run at sizes seen before.
        external: Arrays in the place of initialisers that lie in a data file, of equal shapes
            and dtypes.

    Raises:
        LoraFxError: The file does not load, or CUDA was asked for and is not there.
    """
    import onnxruntime as ort

    expect_path(path, "the model", "the path of an .onnx file")
    expect(provider, str, "provider", "a text", "auto, cpu or cuda")
    expect_name(provider, ("auto", "cpu", "cuda"), "no provider", "auto, cpu or cuda")
    if not is_whole(threads) or not 0 <= threads <= MOST_THREADS:
        found = one_line(repr(threads), 60)
        raise LoraFxError(f"threads is {found}; expected 0 to {MOST_THREADS}", "0 lets it choose")
    options = quiet_options()
    options.enable_mem_pattern = patterns
    if threads:
        options.intra_op_num_threads = threads
    if not rewrites:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    held = {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in (external or {}).items()}
    if held:
        # add_initializer would be ignored, without a word, where W + A·B is folded at load
        options.add_external_initializers(list(held), list(held.values()))
    usable = provider != "cpu" and "cuda" in providers()
    if usable and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"} if exact else {})
    wanted = [*[cuda] * usable, "CPUExecutionProvider"]
    with retold(
        f"{fspath(path)}: ONNX Runtime cannot load it", "was it written for a newer opset?"
    ):
        session = ort.InferenceSession(fspath(path), options, providers=wanted)
    got = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    if provider == "cuda" and got != "cuda":
        why = "the driver did not load" if not driver_present() else "its libraries did not load"
        raise LoraFxError(
            f"CUDA was asked for and cannot be had: {why}",
            "pip install 'lora-fx[gpu]' on a machine with a GPU, or --provider cpu",
        )
    # A machine without a GPU runs on its CPU, which is no news.
    missed = provider == "auto" and got == "cpu" and driver_present()
    note = "running on CPU: this build of ONNX Runtime does not use the GPU" if missed else ""
    return RuntimeSession(session, got, note)


def providers() -> list[str]:
    """What sessions can run on here, the fastest first: cuda with a build and a driver, and cpu."""
    import onnxruntime as ort

    built = "CUDAExecutionProvider" in ort.get_available_providers()
    return ["cuda"] * (built and driver_present()) + ["cpu"]


IMAGE = 64
"""The height and width of a sampled image where a file leaves them open: smaller ones would vanish
in the strides of most models."""


def signature(session: RuntimeSession) -> Inputs:
    """The inputs of a loaded model; names of dimensions become symbols.

    Open heights and widths of images (floats of four dimensions) are IMAGE, as in a capture, where
    they are never dynamic unasked.
    """
    specs = []
    for i in session.session.get_inputs():
        dtype = from_onnx(i.type)
        image = len(i.shape) == 4 and "float" in dtype and not i.name.startswith("past_key_values.")
        sizes = [IMAGE if image and k > 1 and not isinstance(d, int) else d
                 for k, d in enumerate(i.shape)]  # fmt: skip
        shape = tuple(d if isinstance(d, int) else 2 for d in sizes)
        dims = {k: str(d) if k else BATCH for k, d in enumerate(sizes) if not isinstance(d, int)}
        specs.append(Input(i.name, dtype, shape, dims))
    inputs = Inputs(tuple(specs), conditions_of(session.metadata, "the model"))
    if len(inputs.others) > 1:
        try:  # many exporters give one length a name for every input
            session.run(inputs.sample())
        except LoraFxError:
            equal = f"tried only where {', '.join(inputs.others)} are equal"
            session.note = f"{session.note}; {equal}" if session.note else equal
            return inputs.alike()
    return inputs


def feeds_of_sizes(inputs: Inputs, given: Named) -> Iterator[dict[str, Array]]:
    """Feeds of every size at which shapes differ; of one where arrays of a user are given."""
    seen: list[dict[str, tuple[int, ...]]] = []
    for size in SIZES[:1] if given else inputs.checks:
        feeds = {**inputs.sample(size), **given}
        shapes = {name: array.shape for name, array in feeds.items()}
        if shapes not in seen:
            seen.append(shapes)
            yield feeds


# Sessions on switchable ONNX files: adapters are loaded by name and chosen run by run.
#
# A and B go in as inputs (OrtValues, on the CPU side). ONNX Runtime's own active adapters do the
# same for plain runs; with IO binding it ignores them and says nothing, so here they are bound. To
# hand over two tensors a target takes as long as a small model runs, so bindings are kept.


Choice = str | Mapping[str, float] | None


def tensors_of(adapter: Adapter | str | PathLike[str], manifest: Manifest) -> dict[str, Array]:
    """The tensors of an adapter, or of its file in any format, checked against a manifest."""
    if isinstance(adapter, Adapter):
        return manifest.tensors(adapter)
    from lora_fx.formats.io import load_adapter

    wanted = "an Adapter, or the path of one"
    expect(adapter, (str, PathLike), "the adapter", wanted, "adapter=None runs the base model")
    where = fspath(adapter)
    if where.endswith(".onnx_adapter"):
        found = read_file(Path(where))[0]
        manifest.check(found, where)
        return found
    return manifest.tensors(load_adapter(where), where)


class Session:
    """A switchable model and its adapters; a switch makes no new session.

    Args:
        path: The .onnx file.
        provider: The provider to ask for: auto, cpu or cuda.
        threads: How many; 0 leaves the number to the runtime.
        adapter: For a file of mode load, what is folded into its weights now: an adapter, or its
            file in any format. Without one it is the base model.
        exact: As in open_session; False is faster, and less exact, on a GPU and over codes.

    Attributes:
        manifest: What an adapter has to bring.
        ranges: The sizes that the file is true for.
        provider: Where it runs: cpu or cuda.
        note: A line to show to the user, or empty.

    Raises:
        LoraFxError: The file does not load, or is not switchable.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        provider: str = "auto",
        threads: int = 0,
        *,
        adapter: Adapter | str | PathLike[str] | None = None,
        exact: bool = True,
    ) -> None:
        external = None
        if adapter is not None:
            manifest = manifest_of(path)
            if manifest.mode != "load":
                raise LoraFxError(
                    f"{fspath(path)}: a file of mode {manifest.mode} takes adapters run by run",
                    "session.load(name, adapter), then session.run(inputs, adapter=name)",
                )
            external = manifest.padded(tensors_of(adapter, manifest))
        opened = open_session(path, provider, threads, exact=exact, external=external)
        self.session, self.provider, self.note = opened.session, opened.provider, opened.note
        self.manifest = manifest_in(opened.metadata.get(PROPERTY), fspath(path))
        if self.manifest.mode == "train":
            raise LoraFxError(
                f"{fspath(path)}: a training step, which no adapter is loaded into for a forward",
                "lora_fx.onnx.TrainSession runs it; the forward is in the .switch.onnx beside it",
            )
        if self.manifest.mode == "switch":
            for output in self.session.get_outputs():
                if not output.type.startswith("tensor("):
                    raise LoraFxError(
                        f"output {output.name!r} is {output.type}, which a run with an adapter "
                        "cannot give; expected a tensor",
                        "mode merged, load or batch; or let the model end in ConcatFromSequence",
                    )
            defaults = self.session.get_overridable_initializers()
            declared = {i.name: (from_onnx(i.type), i.shape) for i in defaults}
            self.manifest.check_declared(declared, fspath(path))
        self.ranges = conditions_of(opened.metadata, fspath(path))
        self._inputs = {i.name for i in self.session.get_inputs()}
        self._outputs = [o.name for o in self.session.get_outputs()]
        self._arrays: dict[str, dict[str, Array]] = {}
        self._values: dict[str, Json] = {}
        self._free: dict[str, list[ort.IOBinding]] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(self._arrays)

    def load(self, name: str, adapter: Adapter | str | PathLike[str]) -> None:
        """Load an adapter, or its file in any format; a name that is taken is replaced.

        Raises:
            LoraFxError: The adapter does not fit the manifest.
        """
        if self.manifest.mode == "load":
            raise LoraFxError(
                "a file of mode load takes its adapter when the session is made",
                "Session(path, adapter=…); --mode switch exports one that switches run by run",
            )
        expect(name, str, "the name of an adapter", "a text", "session.load(name, adapter)")
        tensors = tensors_of(adapter, self.manifest)
        self._arrays[name] = tensors
        self._values[name] = _values(tensors)
        self._free[name] = []

    def run(self, inputs: Mapping[str, Array], adapter: Choice = None) -> dict[str, Array]:
        """Run once, with the base model, one adapter or a mix, and give arrays by output name.

        Args:
            inputs: Arrays by input name.
            adapter: None for the base model, a loaded name, or {name: weight}: the weighted sum of
                their changes.

        Raises:
            LoraFxError: An adapter that is not loaded, a missing or unknown input.
        """
        arrays = self._arrays_of(inputs)
        chosen = self.choice(adapter)
        with told(arrays):
            if isinstance(adapter, str) and self.provider == "cpu":
                return self._run_bound(arrays, adapter)
            if adapter is None:
                return tensors_by_name(self._outputs, self.session.run(self._outputs, arrays))
            feeds = {**_values(arrays), **chosen}
            made = self.session.run_with_ort_values(self._outputs, feeds)
        return {n: v.numpy() for n, v in zip(self._outputs, made, strict=True)}

    def _arrays_of(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs as the runtime takes them, checked."""
        arrays = arrays_of(inputs)
        check_inputs(arrays, self._inputs, self.ranges)
        return {n: np.ascontiguousarray(_widened(x)) for n, x in arrays.items()}

    def _run_bound(self, arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
        """Run with a binding that has the adapter already and that no other thread is using."""
        free = self._free[name]
        try:
            binding = free.pop()
        except IndexError:
            binding = self.session.io_binding()
            for n, v in self._values[name].items():
                binding.bind_ortvalue_input(n, v)
        for n, x in arrays.items():
            binding.bind_cpu_input(n, x)
        for n in self._outputs:  # anew, or the runtime would write over what the last run gave
            binding.bind_output(n)
        self.session.run_with_iobinding(binding)
        made = binding.get_outputs()
        free.append(binding)
        return {n: v.numpy() for n, v in zip(self._outputs, made, strict=True)}

    def bind(self, inputs: Mapping[str, Array], adapter: Choice = None) -> ort.IOBinding:
        """An IOBinding of the inputs and the adapter, outputs where the session runs.

        Run it by `session.session.run_with_iobinding(binding)`.
        """
        arrays = self._arrays_of(inputs)
        binding = self.session.io_binding()
        chosen = self.choice(adapter)
        with told(arrays):
            values = {**_values(arrays), **chosen}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.provider)
        return binding

    def choice(self, adapter: Choice) -> Json:
        """The OrtValues of a choice, by input name; those left out keep their defaults."""
        if isinstance(adapter, str):
            self._known(adapter)
            return self._values[adapter]
        if adapter is None:
            return {}
        wanted, hint = "a loaded name, or a weight by name", "adapter='a', or {'a': 0.5, 'b': 0.5}"
        expect(adapter, Mapping, "adapter", wanted, hint)
        for name, weight in adapter.items():
            self._known(name)
            self._check_weight(name, weight)
        return _values(self._mixed(adapter)) if adapter else {}

    def _check_weight(self, name: str, weight: object) -> None:
        """Raise for a weight that is no number, or infinite in the dtype that multiplies by it."""
        dtypes = {array.dtype for array in self._arrays[name].values()}
        number = isinstance(weight, Real) and not isinstance(weight, (bool, np.bool_))
        with np.errstate(over="ignore"), contextlib.suppress(OverflowError):
            if number and all(np.isfinite(dtype.type(weight)) for dtype in dtypes):
                return
        raise LoraFxError(
            f"the weight of adapter {name!r} is {one_line(repr(weight), 60)}; expected a number "
            f"that {' and '.join(sorted(d.name for d in dtypes))} holds",
            "1.0 is the adapter as it is",
        )

    def _mixed(self, weights: Mapping[str, float]) -> dict[str, Array]:
        """The tensors of a mix: A side by side and w·B below one another, so the ranks add up."""
        mixed: dict[str, Array] = {}
        for slot in self.manifest.slots.values():
            parts = [(self._arrays[n], w) for n, w in weights.items() if slot.a in self._arrays[n]]
            if parts:
                mixed[slot.a] = np.concatenate([t[slot.a] for t, _ in parts], axis=-1)
                b = [t[slot.b] * t[slot.b].dtype.type(w) for t, w in parts]
                mixed[slot.b] = np.concatenate(b, axis=-2)
        return mixed

    def _known(self, name: object) -> None:
        if not isinstance(name, str) or name not in self._arrays:
            name = one_line(name, 80)
            raise LoraFxError(
                f"no adapter {name!r} is loaded",
                near(name, list(self._arrays), f"loaded: {', '.join(self._arrays)}")
                if self._arrays
                else "session.load(name, path)",
            )


def arrays_of(inputs: object) -> dict[str, Array]:
    """Inputs by name as arrays; lists of numbers, and tensors of torch on the CPU, are taken.

    Raises:
        LoraFxError: No mapping by name, or a value that is no array of numbers.
    """
    hint = "session.run({'x': array}), with the names of the model's inputs"
    expect(inputs, Mapping, "inputs", "arrays by the names of the model's inputs", hint)
    assert isinstance(inputs, Mapping)
    arrays = {}
    for name, value in inputs.items():
        expect(name, str, f"the input {one_line(repr(name), 60)}", "the name of one", hint)
        with retold(f"input {name!r} is no array", "numpy.asarray makes one"):
            arrays[name] = np.asarray(value)
        if arrays[name].dtype.kind == "O":
            kind = type(value).__name__
            raise LoraFxError(f"input {name!r} is a {kind}, not an array of numbers", hint)
    return arrays


def check_inputs(
    inputs: Mapping[str, Array], known: Collection[str], ranges: Sequence[Condition]
) -> None:
    """Raise for an input that is missing or unknown, and for sizes that a file is not true for."""
    for name in inputs:
        if name not in known:
            hint = near(name, [*known], f"inputs: {sorted(known)}")
            raise LoraFxError(f"the model has no input {name!r}", hint)
    missing = sorted(set(known) - set(inputs))
    if missing:
        raise LoraFxError(f"input {missing[0]!r} is missing", f"inputs: {sorted(known)}")
    for _, name, d in (size for condition in ranges for size in condition.sizes):
        if inputs[name].ndim <= d:
            found = f"{inputs[name].ndim} dimensions; expected {d + 1} at least"
            raise LoraFxError(f"input {name!r} has {found}", "give arrays as the model takes them")
    for condition in ranges:
        given = {(n, d): inputs[n].shape[d] for _, n, d in condition.sizes}
        if not condition.holds(given):
            raise condition.refusal(given)


def _values(tensors: Mapping[str, Array], device: str = "cpu") -> Json:
    from onnxruntime import OrtValue

    return {
        n: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), device, 0)
        for n, x in tensors.items()
    }


# Steps of mode train.
#
# A step takes a batch, its labels, `lr`, `step` (from 1), A and B as mode switch has them, and the
# optimizer's states of each; it gives `loss`, and every one of them as `NAME.next`. Nothing but
# plain ONNX Runtime is needed.


class TrainSession:
    """A training step in ONNX Runtime: A, B and the optimizer's states stay where it runs.

    Args:
        path: The .onnx file of lora-fx export --mode train.
        lr: The learning rate; an attribute, which a schedule may set before a step.
        provider: The provider to ask for: auto, cpu or cuda.
        threads: How many; 0 leaves the number to the runtime.
        adapter: What to start from: an adapter, or its file in any format. Without one it is the
            start that export wrote beside the file, as `STEM.onnx_adapter`.
        seed: The first of the seeds of dropout; each step takes the next one.
        exact: Products on a GPU are of float32; False lets them be of TF32, which is faster.

    Attributes:
        manifest: The slots, and what the step does.
        note: A line to show to the user, or empty.
        steps: Steps taken since the start.

    Raises:
        LoraFxError: The file does not load or is no training step, or there is no start.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        lr: float = 1e-3,
        provider: str = "auto",
        threads: int = 0,
        *,
        adapter: Adapter | str | PathLike[str] | None = None,
        seed: int = 0,
        exact: bool = True,
    ) -> None:
        if not is_whole(seed) or not 0 <= seed < 1 << 62:
            found = one_line(repr(seed), 60)
            raise LoraFxError(f"seed is {found}; expected a whole number of 62 bits", "seed=0")
        self.manifest = manifest_of(path)
        if self.manifest.mode != "train":
            raise LoraFxError(
                f"{fspath(path)}: a file of mode {self.manifest.mode}, which holds no step",
                "lora-fx export MODEL -o X.onnx --mode train writes one",
            )
        # A block for all values of a step comes on top of what the first step took, and makes
        # none faster: gpt2 at 2 × 256 had 1554 MB resident, and has 1168.
        opened = open_session(path, provider, threads, exact=exact, patterns=False)
        self.session, self.provider, self._note = opened.session, opened.provider, opened.note
        self.ranges = conditions_of(opened.metadata, fspath(path))
        self.lr, self._seed = lr, seed
        self._check_rate()
        own = {"lr", "step", *(["seed"] if self.manifest.training["seed"] else [])}
        self._shapes = {i.name: i.shape for i in self.session.get_inputs()}
        slots = self.manifest.slots.values()
        self._states = [n for s in self.manifest.training["states"].values() for n in s]
        held = {n for s in slots for n in (s.a, s.b)} | set(self._states)
        self._batch = [n for n in self._shapes if n not in own | held]
        if adapter is None:
            adapter = Path(path).with_suffix(".onnx_adapter")
            if not adapter.exists():
                raise LoraFxError(
                    f"{adapter} is not there: nothing to start from", "adapter=…, in any format"
                )
        self.load(adapter)

    def load(self, adapter: Adapter | str | PathLike[str]) -> None:
        """Start anew from an adapter, or its file in any format, with states of zeros.

        The scale of an update is that of the file. Where the adapter has another, B takes the
        difference, so that W + s·B·A stays, and `note` says so.

        Raises:
            LoraFxError: The adapter does not fit the file, or lacks a target of it.
        """
        if not isinstance(adapter, Adapter):
            wanted = "an Adapter, or the path of one"
            expect(adapter, (str, PathLike), "the adapter", wanted, "TrainSession.load(path)")
        where = "the adapter" if isinstance(adapter, Adapter) else fspath(adapter)
        from lora_fx.formats.io import load_adapter

        if not isinstance(adapter, Adapter) and not where.endswith(".onnx_adapter"):
            adapter = load_adapter(adapter)
        tensors = tensors_of(adapter, self.manifest)
        for key, slot in self.manifest.slots.items():
            rank = tensors[slot.a].shape[-1] if slot.a in tensors else None
            if rank != slot.rank:
                what = f"{key!r} has rank {rank}; expected {slot.rank}"
                if rank is None:
                    what = f"no update of {key!r}; expected one of every target of the file"
                raise LoraFxError(
                    f"{where}: {what}",
                    "lora-fx export … --mode train with this adapter makes a file for it",
                )
        names = (*self.manifest.training["states"], *self._states)
        zeros = {n: np.zeros(self._shapes[n], np.float32) for n in names}
        self._held = _values({**zeros, **tensors}, self.provider)
        self._next = _values(zeros, self.provider)
        self.steps = 0
        notes = [self._note]
        if isinstance(adapter, Adapter):
            now = self.adapter().lowrank
            given = adapter.resolved(now).lowrank
            other = [k for k, u in given.items() if not math.isclose(u.scale, now[k].scale)]
            notes += [
                f"{where}: {k!r} has the scale {given[k].scale:g}, the file {now[k].scale:g}; B of "
                f"{len(other)} updates was rescaled" for k in other[:1]
            ]  # fmt: skip
        self.note = "; ".join(filter(None, notes))

    def step(self, batch: Mapping[str, Array]) -> float:
        """Take one step on a batch, arrays by input name with `labels` among them; its loss.

        Raises:
            LoraFxError: An input that is missing or unknown, sizes that the file does not hold for.
        """
        batch = arrays_of(batch)
        self._check_rate()
        check_inputs(batch, self._batch, self.ranges)
        self._check_labels(batch)
        given = {
            "lr": np.array(self.lr, np.float32),
            "step": np.array(self.steps + 1, np.int64),
            "seed": np.array(self._seed + self.steps, np.int64),
            **batch,
        }
        binding = self.session.io_binding()
        for name in self._shapes:
            if name in self._held:
                binding.bind_ortvalue_input(name, self._held[name])
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
        for name, value in self._next.items():
            binding.bind_ortvalue_output(f"{name}.next", value)
        binding.bind_output("loss")
        with told(batch):
            self.session.run_with_iobinding(binding)
        # what was read becomes what is written next: no copy is made
        for name, value in list(self._next.items()):
            self._next[name], self._held[name] = self._held[name], value
        self.steps += 1
        return float(binding.get_outputs()[-1].numpy())

    def _check_rate(self) -> None:
        """Raise for a learning rate that is no number of float32."""
        if not isinstance(self.lr, Real) or isinstance(self.lr, bool) or not 0 <= self.lr < 1e38:
            found = one_line(repr(self.lr), 60)
            raise LoraFxError(f"lr is {found}; expected a number from 0 up", "lr=1e-3")

    def _check_labels(self, batch: Mapping[str, Array]) -> None:
        """Raise for labels of other sizes than the rows: as many in another order ONNX takes."""
        for d, n in enumerate(batch["labels"].shape[: len(self._shapes["labels"])]):
            free = self._shapes["labels"][d]
            others = [(m, i) for m in self._batch for i, s in enumerate(self._shapes[m])
                      if m != "labels" and s == free and isinstance(s, str)]  # fmt: skip
            if others and all(batch[m].shape[i : i + 1] != (n,) for m, i in others):
                m, i = others[0]
                raise LoraFxError(
                    f"'labels' has size {n} in dimension {d}, {m!r} has {batch[m].shape[i]} in {i}",
                    "give a label for each row of scores",
                )

    def adapter(self) -> Adapter:
        """The adapter as it is now, in the model's keys."""
        return self.manifest.adapter({
            n: self._held[n].numpy() for s in self.manifest.slots.values() for n in (s.a, s.b)
        })  # fmt: skip

    def save(self, path: str | Path, format: FormatName = "peft", *, force: bool = False) -> None:
        """Write the adapter in any format; see lora_fx.save_adapter."""
        from lora_fx.formats.io import save_adapter

        save_adapter(self.adapter(), path, format=format, force=force)
