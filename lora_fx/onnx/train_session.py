"""Files of mode train: weights shared with the forward's file, and the session that runs a step.

A step takes a batch, its labels, `lr`, `step` (from 1), A and B as mode switch has them, and the
optimizer's states of each; it gives `loss`, and every one of them as `NAME.next`. Nothing but plain
ONNX Runtime is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.ranges import conditions_of
from lora_fx.onnx.save import INLINE
from lora_fx.onnx.session import check_inputs, manifest_of, open_session, tensors_of, told
from lora_fx.onnx.switch import reread

if TYPE_CHECKING:
    import onnxruntime as ort

    from lora_fx.formats.io import Format


def save_beside(model: ir.Model, path: Path, other: Path) -> int:
    """Write a model that reads the tensors in the data file of another; returns the bytes left.

    A tensor that is stored transposed there is read so, with a Transpose where a reader needs one.

    Args:
        model: The model, edited in place. Its tensors that are not found lie in its own file.
        path: Where to write.
        other: A saved file of that folder.
    """
    graph = OnnxGraph(model)
    held = [v for v in ir.load(other).graph.initializers.values() if _large(v)]
    known = {_digest(v): v.const_value for v in held}
    left = 0
    for value in [v for v in model.graph.initializers.values() if _large(v)]:
        assert value.const_value is not None
        same = known.get(_digest(value))
        turned = known.get(_digest(value, turned=True)) if same is None else None
        if turned is not None:
            name = str(value.name)
            new = ir.Value(name=name, type=value.type, shape=ir.Shape(turned.shape.numpy()))
            new.metadata_props.update(value.metadata_props)
            new.const_value = turned
            del model.graph.initializers[name]
            model.graph.initializers[name] = new
            reread(graph, value, new, (1, 0))
        elif same is not None:
            value.const_value = same
        else:
            left += value.const_value.nbytes
    ir.save(model, path)
    return left


def _large(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes >= INLINE


def _digest(value: ir.Value, *, turned: bool = False) -> tuple[object, ...] | None:
    """What tells a tensor from others: its dtype, shape and bytes; of a matrix its transpose's."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    if turned:
        if array.ndim != 2:
            return None
        array = array.T
    data = np.ascontiguousarray(array)
    return str(value.const_value.dtype), data.shape, hashlib.sha256(data.data).hexdigest()


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
        own = {"lr", "step", *(["seed"] if self.manifest.training["seed"] else [])}
        self._shapes = {i.name: i.shape for i in self.session.get_inputs()}
        slots = self.manifest.slots.values()
        states = [n for names in self.manifest.training["states"].values() for n in names]
        held = {n for s in slots for n in (s.a, s.b)} | set(states)
        self._states = states
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
        where = "the adapter" if isinstance(adapter, Adapter) else fspath(adapter)
        from lora_fx.formats.io import load_adapter

        if not isinstance(adapter, Adapter) and not where.endswith(".onnx_adapter"):
            adapter = load_adapter(adapter)
        tensors = tensors_of(adapter, self.manifest)
        for key, slot in self.manifest.slots.items():
            if slot.a not in tensors:
                raise LoraFxError(
                    f"{where}: no update of {key!r}; expected one of every target of the file",
                    "lora-fx export … --mode train with this adapter makes a file for it",
                )
            if tensors[slot.a].shape[-1] != slot.rank:
                raise LoraFxError(
                    f"{where}: {key!r} has rank {tensors[slot.a].shape[-1]}; expected {slot.rank}",
                    "lora-fx export … --mode train with this adapter makes a file for it",
                )
        zeros = {n: np.zeros(self._shapes[n], np.float32) for n in self._states}
        self._held = self._on_device({**tensors, **zeros})
        trained = self.manifest.training["states"]
        names = [n for s in trained for n in (s, *trained[s])]
        self._next = self._on_device({n: np.zeros(self._shapes[n], np.float32) for n in names})
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
        batch = {name: np.asarray(value) for name, value in batch.items()}
        check_inputs(batch, self._batch, self.ranges)
        self._check_labels(batch)
        number: dict[str, Array] = {
            "lr": np.array(self.lr, np.float32),
            "step": np.array(self.steps + 1, np.int64),
            "seed": np.array(self._seed + self.steps, np.int64),
        }
        binding = self.session.io_binding()
        for name in self._shapes:
            if name in self._held:
                binding.bind_ortvalue_input(name, self._held[name])
            else:
                given = batch[name] if name in batch else number[name]
                binding.bind_cpu_input(name, np.ascontiguousarray(given))
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

    def save(self, path: str | Path, format: Format = "peft", *, force: bool = False) -> None:
        """Write the adapter in any format; see lora_fx.save_adapter."""
        from lora_fx.formats.io import save_adapter

        save_adapter(self.adapter(), path, format=format, force=force)

    def _on_device(self, arrays: Mapping[str, Array]) -> dict[str, ort.OrtValue]:
        from onnxruntime import OrtValue

        return {
            n: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), self.provider, 0)
            for n, x in arrays.items()
        }
