"""Sessions on switchable ONNX files: adapters are loaded by name and chosen for each run.

A and B go in as inputs: OrtValues on the session's device. ONNX Runtime's own active adapters are
copied to the device in each run; with IO binding it ignores them and says nothing, so here they are
bound. To hand over two tensors a target takes as long as a small model runs, so bindings are kept.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.invocation import NEVER
from lora_fx.dtypes import Array, from_onnx
from lora_fx.errors import LoraFxError, expect, one_line
from lora_fx.onnx.adapter_buffers import BASE, AdapterBuffers, check_rank, largest_rank
from lora_fx.onnx.feeds import arrays_of, check_inputs, ort_values, tensors_of
from lora_fx.onnx.graph_runs import GraphRuns, refuse_uncapturable
from lora_fx.onnx.manifest import PROPERTY, manifest_in, manifest_of, with_base
from lora_fx.onnx.range_guards import conditions_of
from lora_fx.onnx.row_starts import STARTS, Starts
from lora_fx.onnx.session import open_session, tensors_by_name, told, widened
from lora_fx.onnx.unverified import CUDA_GRAPHS, never_run
from lora_fx.onnx.webgpu import exclusive
from lora_fx.probe.check import check_run
from lora_fx.probe.probe import BASE as BASE_OF_PROBE
from lora_fx.probe.probe import Probe, probe_in
from lora_fx.text import Json, is_whole, near

if TYPE_CHECKING:
    import onnxruntime as ort

Choice = str | Mapping[str, float] | None


class Session:
    """A switchable model and its adapters; a switch needs no new session.

    Args:
        path: The .onnx file.
        provider: The provider to ask for: auto, cpu, cuda or webgpu.
        threads: The number of threads; 0 leaves it to the runtime.
        adapter: For a file of mode load, what is folded into its weights now: an adapter, or its
            file in any format. Without one it is the base model.
        exact: As in open_session; False is faster, and less exact, on a GPU and over codes.
        cuda_graph: Capture a CUDA graph for each shape of the inputs, and replay it. An adapter is
            then copied into buffers that stay. Never run on a GPU.
        check: Run the file on its probe now, and each adapter when it is loaded: the base has to
            be what it was, and every adapter has to take effect (docs/probe.md).
        rank: With cuda_graph, the rank of these buffers; by default the largest among the adapters
            that are loaded before the first run.

    Attributes:
        manifest: What an adapter has to bring.
        invocations: Name of a loaded adapter → the tokens from which on it acts, if it is an aLoRA.
        ranges: The sizes that the file is true for.
        provider: Where it runs: cpu or cuda.
        note: A line to show to the user, or empty.

    Raises:
        LoraFxError: The file does not load, or is not switchable, or no CUDA graph of it can be
            captured; with check, the file has no probe.
        NoEffectError: With check: the base is another one, or the adapter is not what it should be.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        provider: str = "auto",
        threads: int = 0,
        *,
        adapter: Adapter | str | PathLike[str] | None = None,
        exact: bool = True,
        cuda_graph: bool = False,
        rank: int | None = None,
        check: bool = False,
    ) -> None:
        _check_graph_options(cuda_graph, rank)
        if check and cuda_graph:
            raise LoraFxError(
                "check runs each adapter before it is loaded, which a CUDA graph has no room for",
                "run lora-fx verify FILE; or make the session without check or cuda_graph",
            )
        external = None
        if adapter is not None:
            external = _external_tensors(path, adapter)
        if cuda_graph:
            refuse_uncapturable(path)
            _refuse_whole_in_graphs(path)
        opened = open_session(
            path, provider, threads, exact=exact, external=external, cuda_graph=cuda_graph
        )
        if cuda_graph and opened.provider != "cuda":
            raise LoraFxError(
                f"{fspath(path)}: CUDA graphs were requested, but the session runs on "
                f"{opened.provider}",
                "make the session without cuda_graph, or on a machine with a GPU of NVIDIA's",
            )
        self._path = path
        self.session = opened.session
        self.provider = opened.provider
        self.note = opened.note
        with exclusive(self.provider):
            self._defaults = ort_values(opened.base_factors, self.provider)
        self.manifest = with_base(
            manifest_in(opened.metadata.get(PROPERTY), fspath(path)), Path(path)
        )
        if self.manifest.mode == "train":
            raise LoraFxError(
                f"{fspath(path)}: the file is a training step, and takes no adapter for a forward "
                "run",
                "run it with lora_fx.onnx.TrainSession; the forward is in the .switch.onnx file "
                "next to it",
            )
        if self.manifest.mode == "switch":
            self._check_switchable(path)
        self.ranges = conditions_of(opened.metadata, fspath(path))
        self._inputs = set(opened.input_names)
        self._outputs = [node.name for node in self.session.get_outputs()]
        # Of each loaded adapter: its tensors, their OrtValues, and bindings that no run is using.
        self._arrays: dict[str, dict[str, Array]] = {}
        self._values: dict[str, Json] = {}
        self._idle_bindings: dict[str, list[ort.IOBinding]] = {}
        self.invocations: dict[str, tuple[int, ...]] = {}
        self._cuda_graph = cuda_graph
        self._rank = rank
        self._graph_runs: GraphRuns | None = None
        self._buffers_lock = threading.Lock()
        if cuda_graph:
            self.note = never_run(CUDA_GRAPHS)
            warnings.warn(self.note, RuntimeWarning, stacklevel=2)
        self._probe: Probe | None = None
        if check:
            self._probe = probe_in(opened.metadata, fspath(path))
            name = BASE_OF_PROBE if adapter is None else _name_of(adapter)
            self._check(self._probe, name, {})

    def _check(self, probe: Probe, name: str | None, tensors: Mapping[str, Array]) -> None:
        """Raise unless a run on the probe gives what it should; see lora_fx.probe.check.

        Args:
            probe: That of the file.
            name: The adapter's; BASE for the base, None for one that the probe does not know.
            tensors: Its A and B by name, which are not loaded yet.
        """
        arrays = {**self._arrays_of(probe.feeds()), **tensors}
        feeds = {**self._defaults, **ort_values(arrays)}
        self.manifest.check_whole(feeds, "the probe's run")
        with exclusive(self.provider), told(arrays):
            values = self.session.run_with_ort_values(self._outputs, feeds)
        outputs = self._arrays_of_outputs(values)
        check_run(probe, name, probe.at_points(outputs, "the file"))

    def _check_switchable(self, path: str | PathLike[str]) -> None:
        """Raise if the manifest does not fit the file, or an output is no tensor."""
        for output in self.session.get_outputs():
            if not output.type.startswith("tensor("):
                raise LoraFxError(
                    f"output {output.name!r} is {output.type}, but a run with an adapter can only "
                    "give tensors",
                    "use mode merged, load or batch; or let the model end in ConcatFromSequence",
                )
        possible_slots = self.session.get_overridable_initializers()
        if self.manifest.required:
            possible_slots = self.session.get_inputs()
        declared = {node.name: (from_onnx(node.type), node.shape) for node in possible_slots}
        self.manifest.check_declared(declared, fspath(path))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return tuple(self._arrays)

    def load(self, name: str, adapter: Adapter | str | PathLike[str]) -> None:
        """Load an adapter, or an adapter file in any format; a loaded one of this name is replaced.

        Raises:
            LoraFxError: The adapter does not fit the manifest, or the buffers of CUDA graphs.
        NoEffectError: In a session that checks, the adapter is not what it should be.
        """
        if self.manifest.mode == "load":
            raise LoraFxError(
                "a file of mode load takes its adapter when the session is made",
                "pass Session(path, adapter=…); or pass --mode switch to export a file whose "
                "adapter can change at each run",
            )
        expect(name, str, "the name of an adapter", "a text", "call session.load(name, adapter)")
        tensors, invocation = tensors_of(adapter, self.manifest, self._path)
        self.invocations[name] = invocation
        if self._cuda_graph:
            self._load_for_graphs(name, tensors)
            return
        if self._probe is not None:
            self._check(self._probe, name, tensors)
        self._arrays[name] = tensors
        with exclusive(self.provider):
            self._values[name] = ort_values(tensors, self.provider)
        self._idle_bindings[name] = []

    def _load_for_graphs(self, name: str, tensors: dict[str, Array]) -> None:
        """Keep an adapter on the host, from where runs copy it into the buffers of CUDA graphs."""
        with self._buffers_lock:
            if self._rank is not None:
                check_rank(self.manifest, tensors, self._rank, f"adapter {name!r}")
            self._arrays[name] = tensors

    def run(self, inputs: Mapping[str, Array], adapter: Choice = None) -> dict[str, Array]:
        """Run once, with the base model, one adapter or a mix; return arrays by output name.

        Args:
            inputs: Arrays by input name. `adapter_starts` may be left out where no past hides the
                invocation: it is computed from the token ids.
            adapter: None for the base model, a loaded name, or {name: weight}: the weighted sum of
                their changes.

        Raises:
            LoraFxError: An adapter that is not loaded, a missing or unknown input.
        """
        arrays = self._arrays_of(inputs, adapter)
        if self._cuda_graph:
            tensors = self._chosen_tensors(adapter)
            with told(arrays):
                return self._runs_of_graphs().run(arrays, tensors)
        chosen = self.choice(adapter)
        with exclusive(self.provider), told(arrays):
            if isinstance(adapter, str):
                return self._run_bound(arrays, adapter)
            if not chosen:
                return tensors_by_name(self._outputs, self.session.run(self._outputs, arrays))
            feeds = {**ort_values(arrays), **chosen}
            outputs = self.session.run_with_ort_values(self._outputs, feeds)
            return self._arrays_of_outputs(outputs)

    def _arrays_of_outputs(self, outputs: Sequence[ort.OrtValue]) -> dict[str, Array]:
        return {name: value.numpy() for name, value in zip(self._outputs, outputs, strict=True)}

    def _arrays_of(self, inputs: Mapping[str, Array], adapter: Choice = None) -> dict[str, Array]:
        """Return the inputs in the runtime's form, checked; starts that are missing are added."""
        arrays = arrays_of(inputs)
        starts = self.manifest.starts
        if starts is not None and STARTS not in arrays and starts.fit(arrays):
            arrays[STARTS] = self._starts(starts, arrays, adapter)
        check_inputs(arrays, self._inputs, self.ranges)
        if starts is not None:
            starts.check(arrays)
        return {name: np.ascontiguousarray(widened(array)) for name, array in arrays.items()}

    def _starts(self, starts: Starts, arrays: Mapping[str, Array], adapter: Choice) -> Array:
        """Return from where on the choice of a run acts, by row; the base acts nowhere.

        Raises:
            LoraFxError: A past hides where the rows were invoked; or a mix of adapters that begin
                to act at different tokens.
        """
        self._check_choice(adapter)
        names = [adapter] if isinstance(adapter, str) else list(adapter or ())
        if not names:
            return np.full(len(arrays[starts.ids]), NEVER, np.int64)
        invocations = {self.invocations[name] for name in names}
        if len(invocations) > 1:
            raise LoraFxError(
                f"the adapters {' and '.join(map(repr, names))} begin to act at different tokens",
                f"mix adapters with the same invocation tokens, or pass {STARTS}",
            )
        return starts.of_run(arrays, invocations.pop())

    def _run_bound(self, arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
        """Run with a binding that already has the adapter and that no other thread is using."""
        idle_bindings = self._idle_bindings[name]
        try:
            binding = idle_bindings.pop()
        except IndexError:
            binding = self.session.io_binding()
            for tensor_name, value in self.choice(name).items():
                binding.bind_ortvalue_input(tensor_name, value)
        for input_name, array in arrays.items():
            binding.bind_cpu_input(input_name, array)
        # anew for each run, or the runtime would write over what the last run gave
        for output_name in self._outputs:
            binding.bind_output(output_name)
        self.session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        idle_bindings.append(binding)
        return self._arrays_of_outputs(outputs)

    def bind(self, inputs: Mapping[str, Array], adapter: Choice = None) -> ort.IOBinding:
        """Return an IOBinding of the inputs and the adapter, with outputs on the session's device.

        Run it by `session.session.run_with_iobinding(binding)`.

        Raises:
            LoraFxError: As `run`, and for a session with CUDA graphs: a replay looks at no binding.
        """
        if self._cuda_graph:
            raise LoraFxError(
                "a session with CUDA graphs binds its own inputs and outputs: a replay looks at no "
                "other binding",
                "call session.run, or make the session without cuda_graph",
            )
        arrays = self._arrays_of(inputs, adapter)
        binding = self.session.io_binding()
        chosen = self.choice(adapter)
        with exclusive(self.provider), told(arrays):
            values = {**ort_values(arrays), **chosen}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.provider)
        return binding

    def choice(self, adapter: Choice) -> Json:
        """Return the OrtValues of a choice, by input name; inputs left out keep their defaults."""
        self._check_choice(adapter)
        chosen: Json = {**self._defaults}
        if isinstance(adapter, str):
            chosen |= self._values[adapter]
        elif adapter:
            chosen |= ort_values(self._mixed(adapter))
        where = f"the choice {one_line(repr(adapter), 80)}" if adapter else "the base model"
        self.manifest.check_whole(chosen, where)
        return chosen

    def _chosen_tensors(self, adapter: Choice) -> Mapping[str, Array]:
        """Return the A and B of a choice by name, for the buffers of CUDA graphs."""
        self._check_choice(adapter)
        if isinstance(adapter, str):
            return self._arrays[adapter]
        if not adapter:
            return BASE
        mixed = self._mixed(adapter)
        names = " and ".join(map(repr, adapter))
        check_rank(self.manifest, mixed, self._runs_of_graphs().buffers.rank, f"the mix of {names}")
        return mixed

    def _runs_of_graphs(self) -> GraphRuns:
        """Return the runs with CUDA graphs; the first of them decides the rank of the buffers."""
        with self._buffers_lock:
            if self._graph_runs is None:
                if self._rank is None:
                    ranks = [largest_rank(self.manifest, one) for one in self._arrays.values()]
                    self._rank = max([1, *ranks])
                slots = self.manifest.slots if self.manifest.mode == "switch" else {}
                of_inputs = replace(self.manifest, slots=slots)
                buffers = AdapterBuffers(of_inputs, self._rank, self.provider)
                self._graph_runs = GraphRuns(self.session, buffers, self.provider)
            return self._graph_runs

    def _check_choice(self, adapter: Choice) -> None:
        """Raise for an adapter that is not loaded, and for what is no choice."""
        if isinstance(adapter, str):
            self._check_loaded(adapter)
        if adapter is None or isinstance(adapter, str):
            return
        expected = "a loaded name, or a weight by name"
        expect(
            adapter,
            Mapping,
            "adapter",
            expected,
            "pass adapter='a' or {'a': 0.5, 'b': 0.5}, for example",
        )
        for name, weight in adapter.items():
            self._check_loaded(name)
            self._check_weight(name, weight)

    def _check_weight(self, name: str, weight: object) -> None:
        """Raise for a weight that is not a number, or that is infinite in the multiplying dtype."""
        dtypes = {array.dtype for array in self._arrays[name].values()}
        is_number = isinstance(weight, Real) and not isinstance(weight, (bool, np.bool_))
        with np.errstate(over="ignore"), contextlib.suppress(OverflowError):
            if is_number and all(np.isfinite(dtype.type(weight)) for dtype in dtypes):
                return
        raise LoraFxError(
            f"the weight of adapter {name!r} is {one_line(repr(weight), 60)}; expected a number "
            f"that {' and '.join(sorted(dtype.name for dtype in dtypes))} holds",
            "pass 1.0 for the adapter at full strength",
        )

    def _mixed(self, weights: Mapping[str, float]) -> dict[str, Array]:
        """Return the tensors of a mix: A's and w·B's concatenated along the rank, the sum of w·D's.

        Args:
            weights: w by the name of an adapter.
        """
        self._check_mixable(weights)
        mixed: dict[str, Array] = {}
        for whole in self.manifest.whole.values():
            for name in weights:  # of one adapter at full strength
                if whole.name in self._arrays[name]:
                    mixed[whole.name] = self._arrays[name][whole.name]
        for slot in self.manifest.slots.values():
            a_blocks = []
            b_blocks = []
            gains = []
            for name, weight in weights.items():
                tensors = self._arrays[name]
                if slot.a in tensors:
                    b = tensors[slot.b]
                    a_blocks.append(tensors[slot.a])
                    b_blocks.append(b * b.dtype.type(weight))
                if slot.d in tensors:
                    gains.append(tensors[slot.d] * b.dtype.type(weight))
            if a_blocks:
                mixed[slot.a] = np.concatenate(a_blocks, axis=-1)
                mixed[slot.b] = np.concatenate(b_blocks, axis=-2)
            if gains:
                mixed[slot.d] = np.sum(gains, axis=0)
        return mixed

    def _check_mixable(self, weights: Mapping[str, float]) -> None:
        """Raise for a mix with a whole tensor: it is no change that could be weighted or added."""
        if len(weights) == 1 and set(weights.values()) == {1.0}:
            return
        for name in weights:
            for slot in self.manifest.whole.values():
                if slot.name in self._arrays[name]:
                    raise LoraFxError(
                        f"a mix cannot hold the whole tensor {slot.name!r} of adapter {name!r}",
                        f"pass adapter={name!r}; only low-rank updates can be mixed",
                    )

    def _check_loaded(self, name: object) -> None:
        """Raise if no loaded adapter has this name."""
        if isinstance(name, str) and name in self._arrays:
            return
        text = one_line(name, 80)
        hint = "call session.load(name, path)"
        if self._arrays:
            hint = near(text, list(self._arrays), f"loaded: {', '.join(self._arrays)}")
        raise LoraFxError(f"no adapter {text!r} is loaded", hint)


def _refuse_whole_in_graphs(path: str | PathLike[str]) -> None:
    """Raise for a file whose adapters replace whole tensors, of which there are no buffers."""
    whole = manifest_of(path).whole
    if whole:
        raise LoraFxError(
            f"{fspath(path)}: adapters replace {min(whole)!r} as a whole, and a session with CUDA "
            "graphs has buffers for A and B only",
            "make the session without cuda_graph",
        )


def _name_of(adapter: Adapter | str | PathLike[str]) -> str | None:
    """Return the name by which a probe knows an adapter: that of its file, where it is one."""
    return None if isinstance(adapter, Adapter) else Path(adapter).stem


def _check_graph_options(cuda_graph: bool, rank: int | None) -> None:
    """Raise for a rank that is none, or that no buffer would have."""
    if rank is None:
        return
    if not is_whole(rank) or rank < 1:
        raise LoraFxError(
            f"rank is {one_line(repr(rank), 60)}; expected 1 or more", "pass rank=16, for example"
        )
    if not cuda_graph:
        raise LoraFxError(
            "rank has no effect without cuda_graph: an adapter keeps its own rank",
            "pass cuda_graph=True, or leave rank out",
        )


def _external_tensors(
    path: str | PathLike[str], adapter: Adapter | str | PathLike[str]
) -> dict[str, Array]:
    """Return the tensors of an adapter, padded to the ranks of a file of mode load.

    Raises:
        LoraFxError: The file is of another mode, or the adapter does not fit.
    """
    manifest = manifest_of(path)
    if manifest.mode != "load":
        raise LoraFxError(
            f"{fspath(path)}: a file of mode {manifest.mode} takes an adapter at each run",
            "call session.load(name, adapter), then session.run(inputs, adapter=name)",
        )
    return manifest.padded(tensors_of(adapter, manifest, path)[0])
