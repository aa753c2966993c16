"""Steps of mode train.

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
from lora_fx.onnx.manifest import conditions_of, manifest_of
from lora_fx.onnx.session import open_session, told
from lora_fx.text import is_whole

if TYPE_CHECKING:
    from lora_fx.formats.registry import FormatName


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
        self._held = ort_values({**zeros, **tensors}, self.provider)
        self._next = ort_values(zeros, self.provider)
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
