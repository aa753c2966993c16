"""The probe of an adapter: what a model gives with it, made in torch.

It travels with the adapter into merged checkpoints. A command that asks a server adds what a server
can be asked, under `language`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.errors import LoraFxError, one_line
from lora_fx.formats.io import load_adapter
from lora_fx.formats.probe_beside import add_probe
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.unchanged import as_it_was
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.precision import precision_of
from lora_fx.inputs import SIZES
from lora_fx.passes.proofs.probe_making import Subject, make_probe
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.proofs.varied_runs import VariedRuns, with_its_adapter
from lora_fx.passes.verbs.adapt import insert
from lora_fx.passes.verbs.export_probe import facts_of
from lora_fx.probe.carried import MODE
from lora_fx.probe.probe import BASE, FULL, NONE, Probe
from lora_fx.text import Json

NAME = "adapter"
"""The name of the one adapter in such a probe."""


def probe_adapter(
    model: Captured | AdaptedModule, adapter: Adapter, digest: str, kind: str = FULL
) -> tuple[Probe | None, list[str]]:
    """Make the probe of an adapter, at an input of ours.

    Args:
        model: The capture of its base; or the module that has the adapter, which is as it was
            afterwards.
        adapter: Bound to the model.
        digest: The hash of the adapter as its file has it, by which others know it.
        kind: full; or short, without groups of targets.

    Returns:
        The probe, and what has to be said; None, with the reason, where there can be none.
    """
    with ExitStack() as stack:
        module: AdaptedModule | None = None
        captured = model
        if isinstance(model, AdaptedModule):
            captured = execution_of(model).captured
            module = model
            stack.enter_context(as_it_was(model))
            stack.enter_context(with_its_adapter(model))
        assert isinstance(captured, Captured)  # there are two kinds of models
        reference = TorchReference(captured, partial(_inserted, captured))
        runs = VariedRuns(reference.base, reference.branched, module)
        adapters = {NAME: adapter}

        def run(name: str) -> Run:
            return runs.run(adapters.get(name) if name != BASE else None)

        subject = Subject(
            mode=MODE,
            run=run,
            reference=runs.run,
            vary=runs.run,
            is_slow=True,
            adapters=adapters,
            found=reference.targets(),
            feeds=partial(reference.feeds, SIZES[0]),
            precision=precision_of(captured),
            narrow=runs.narrow,
        )
        facts = {**facts_of({}, "torch"), "adapters": {NAME: digest}}
        return make_probe(subject, kind, facts)


def _inserted(captured: Captured, adapter: Adapter) -> CapturedModule:
    return insert(captured, adapter=adapter, dead="allow")


def add_to_adapter(path: str, module: AdaptedModule, kind: str) -> tuple[Json, list[str]]:
    """Put a probe into the adapter that a module was trained to, and that was saved.

    The training is not lost where no probe can be made: the notes say why.

    Args:
        path: The adapter, a folder or a .safetensors file.
        module: What was trained.
        kind: full, short or none.

    Returns:
        The field `probe` of the report, and what has to be said.
    """
    if kind == NONE:
        return {}, []
    try:
        digest = adapter_hash(load_adapter(path))
        probe, notes = probe_adapter(module, module.adapter(), digest, kind)
        if probe is not None:
            add_probe(Path(path), probe)
    except (LoraFxError, RuntimeError, ValueError, TypeError, IndexError, MemoryError) as e:
        return {}, [f"no probe is written: {one_line(e, 200)}"]
    if probe is None:
        return {}, notes
    effect = float(f"{probe.effect(NAME):.4g}")
    groups = len(probe.adapters[NAME].groups)
    return {"probe": {"bytes": probe.size, "effect": effect, "groups": groups}}, notes
