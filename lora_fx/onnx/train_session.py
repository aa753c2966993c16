"""Sessions on the training steps of mode train.

A step takes a batch, its labels, `lr`, `step` (from 1), A and B as mode switch has them, and the
optimizer's states of each; it gives `loss`, and every one of them as `NAME.next`. Nothing but
plain ONNX Runtime is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, expect, one_line
from lora_fx.onnx.feeds import arrays_of, check_inputs, ort_values, tensors_of
from lora_fx.onnx.manifest import manifest_of
from lora_fx.onnx.range_guards import conditions_of
from lora_fx.onnx.session import open_session, told
from lora_fx.onnx.webgpu import exclusive
from lora_fx.text import counted, is_whole

if TYPE_CHECKING:
    from lora_fx.formats.registry import FormatName


class TrainSession:
    """A training step in ONNX Runtime; A, B and optimizer states stay on its device.

    Args:
        path: The .onnx file of lora-fx export --mode train.
        lr: The learning rate; an attribute that a schedule may set before a step.
        provider: The provider to ask for: auto, cpu, cuda or webgpu.
        threads: The number of threads; 0 leaves it to the runtime.
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
            text = one_line(repr(seed), 60)
            raise LoraFxError(f"seed is {text}; expected a whole number of 62 bits", "seed=0")
        self._path = path
        self.manifest = manifest_of(path)
        if self.manifest.mode != "train":
            raise LoraFxError(
                f"{fspath(path)}: a file of mode {self.manifest.mode}, which has no training step",
                "write one with lora-fx export MODEL -o X.onnx --mode train",
            )
        # A block for all values of a step comes on top of what the first step took, and makes
        # none faster: gpt2 at 2 × 256 had 1554 MB resident, and has 1168.
        opened = open_session(path, provider, threads, exact=exact, patterns=False)
        self.session = opened.session
        self.provider = opened.provider
        self.ranges = conditions_of(opened.metadata, fspath(path))
        self.lr = lr
        self._seed = seed
        self._note = opened.note
        self._check_rate()
        self._shapes = {node.name: node.shape for node in self.session.get_inputs()}
        self._states: list[str] = []
        for names in self.manifest.training["states"].values():
            self._states += names
        self._batch = self._batch_names()
        if adapter is None:
            adapter = Path(path).with_suffix(".onnx_adapter")
            if not adapter.exists():
                raise LoraFxError(
                    f"{adapter} does not exist: there is no adapter to start from",
                    "pass adapter=…, in any format",
                )
        self.load(adapter)

    def _batch_names(self) -> list[str]:
        """Return the inputs that a batch must provide: all that the session does not feed."""
        names_of_session = {"lr", "step", *self._states}
        if self.manifest.training["seed"]:
            names_of_session.add("seed")
        for slot in self.manifest.slots.values():
            names_of_session.update((slot.a, slot.b))
        return [name for name in self._shapes if name not in names_of_session]

    def load(self, adapter: Adapter | str | PathLike[str]) -> None:
        """Restart from an adapter, or an adapter file in any format, with zero optimizer states.

        The scale of an update is that of the file. Where the adapter has another, B takes the
        difference, so that W + s·B·A stays, and `note` says so.

        Raises:
            LoraFxError: The adapter does not fit the file, or lacks a target of it.
        """
        where = "the adapter"
        if not isinstance(adapter, Adapter):
            expected = "an Adapter, or the path of one"
            expect(
                adapter, (str, PathLike), "the adapter", expected, "call TrainSession.load(path)"
            )
            where = fspath(adapter)
            if not where.endswith(".onnx_adapter"):
                from lora_fx.formats.io import load_adapter

                adapter = load_adapter(adapter)
        tensors, _ = tensors_of(adapter, self.manifest, self._path)
        self._check_ranks(tensors, where)

        names = (*self.manifest.training["states"], *self._states)
        zeros = {name: np.zeros(self._shapes[name], np.float32) for name in names}
        # What a step reads, and what it writes: A, B and the states of each.
        self._held = ort_values({**zeros, **tensors}, self.provider)
        self._next = ort_values(zeros, self.provider)
        self.steps = 0
        notes = [self._note]
        if isinstance(adapter, Adapter):
            notes.append(self._note_of_scales(adapter, where))
        self.note = "; ".join(filter(None, notes))

    def _check_ranks(self, tensors: Mapping[str, Array], where: str) -> None:
        """Raise unless every target of the file has an update of the target's rank."""
        for key, slot in self.manifest.slots.items():
            rank = tensors[slot.a].shape[-1] if slot.a in tensors else None
            if rank == slot.rank:
                continue
            what = f"{key!r} has rank {rank}; expected {slot.rank}"
            if rank is None:
                what = f"no update of {key!r}; expected one for every target of the file"
            raise LoraFxError(
                f"{where}: {what}",
                "make a file for it with lora-fx export … --mode train and this adapter",
            )

    def _note_of_scales(self, adapter: Adapter, where: str) -> str:
        """Return a note on updates whose scale differs from the file's; empty if there are none."""
        updates_in_file = self.adapter().lowrank
        updates = adapter.resolved(updates_in_file).lowrank
        rescaled_keys = []
        for key, update in updates.items():
            if not math.isclose(update.scale, updates_in_file[key].scale):
                rescaled_keys.append(key)
        if not rescaled_keys:
            return ""
        key = rescaled_keys[0]
        return (
            f"{where}: {key!r} has the scale {updates[key].scale:g}, but the file "
            f"{updates_in_file[key].scale:g}; B of {counted(len(rescaled_keys), 'update')} was "
            "rescaled"
        )

    def step(self, batch: Mapping[str, Array]) -> float:
        """Take one step on a batch (arrays by input name, with `labels`); return its loss.

        Raises:
            LoraFxError: An input that is missing or unknown, sizes that the file does not hold for.
        """
        batch = arrays_of(batch)
        self._check_rate()
        check_inputs(batch, self._batch, self.ranges)
        self._check_labels(batch)
        feeds = {
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
                binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name]))
        for name, value in self._next.items():
            binding.bind_ortvalue_output(f"{name}.next", value)
        binding.bind_output("loss")
        with exclusive(self.provider), told(batch):
            self.session.run_with_iobinding(binding)
        # what was read becomes what is written next: no copy is made
        for name, value in list(self._next.items()):
            self._next[name] = self._held[name]
            self._held[name] = value
        self.steps += 1
        return float(binding.get_outputs()[-1].numpy())

    def _check_rate(self) -> None:
        """Raise for a learning rate that is not a float32 number."""
        is_number = isinstance(self.lr, Real) and not isinstance(self.lr, bool)
        if not is_number or not 0 <= self.lr < 1e38:
            text = one_line(repr(self.lr), 60)
            raise LoraFxError(f"lr is {text}; expected a number of 0 or more", "lr=1e-3")

    def _check_labels(self, batch: Mapping[str, Array]) -> None:
        """Raise for labels whose sizes differ from the rows, which ONNX might still accept."""
        label_sizes = self._shapes["labels"]
        labels = batch["labels"]
        for axis, size in enumerate(labels.shape[: len(label_sizes)]):
            same_symbol = self._axes_of_symbol(label_sizes[axis])
            if not same_symbol:
                continue
            if any(batch[name].shape[i : i + 1] == (size,) for name, i in same_symbol):
                continue
            name, i = same_symbol[0]
            raise LoraFxError(
                f"'labels' has size {size} in dimension {axis}, but {name!r} has "
                f"{batch[name].shape[i]} in {i}",
                "pass a label for each row of scores",
            )

    def _axes_of_symbol(self, symbol: object) -> list[tuple[str, int]]:
        """Return (input of a batch, axis) for each axis with this symbol, except in labels."""
        axes: list[tuple[str, int]] = []
        if not isinstance(symbol, str):
            return axes
        for name in self._batch:
            if name != "labels":
                sizes = self._shapes[name]
                axes += [(name, axis) for axis, size in enumerate(sizes) if size == symbol]
        return axes

    def adapter(self) -> Adapter:
        """Return the current adapter, in the model's keys."""
        tensors = {}
        for slot in self.manifest.slots.values():
            for name in (slot.a, slot.b):
                tensors[name] = self._held[name].numpy()
        return self.manifest.adapter(tensors)

    def save(self, path: str | Path, format: FormatName = "peft", *, force: bool = False) -> None:
        """Write the adapter in any format; see lora_fx.save_adapter."""
        from lora_fx.formats.io import save_adapter

        save_adapter(self.adapter(), path, format=format, force=force)
