"""Sessions on switchable ONNX files: adapters are loaded by name and chosen run by run.

A and B go in as inputs (OrtValues, on the CPU side). ONNX Runtime's own active adapters do the
same for plain runs; with IO binding it ignores them and says nothing, so here they are bound. To
hand over two tensors a target takes as long as a small model runs, so bindings are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from numbers import Real
from os import PathLike, fspath
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array, from_onnx
from lora_fx.errors import LoraFxError, expect, one_line
from lora_fx.onnx.feeds import arrays_of, check_inputs, ort_values, tensors_of
from lora_fx.onnx.manifest import PROPERTY, conditions_of, manifest_in, manifest_of
from lora_fx.onnx.session import open_session, tensors_by_name, told, widened
from lora_fx.text import Json, near

if TYPE_CHECKING:
    import onnxruntime as ort

Choice = str | Mapping[str, float] | None


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
        self._values[name] = ort_values(tensors)
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
            feeds = {**ort_values(arrays), **chosen}
            made = self.session.run_with_ort_values(self._outputs, feeds)
        return {n: v.numpy() for n, v in zip(self._outputs, made, strict=True)}

    def _arrays_of(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs as the runtime takes them, checked."""
        arrays = arrays_of(inputs)
        check_inputs(arrays, self._inputs, self.ranges)
        return {n: np.ascontiguousarray(widened(x)) for n, x in arrays.items()}

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
            values = {**ort_values(arrays), **chosen}
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
        return ort_values(self._mixed(adapter)) if adapter else {}

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
