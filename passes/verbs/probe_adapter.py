"""The probe of an adapter: what a model gives with it, made in torch.

It travels with the adapter into merged checkpoints. A command that asks a server adds what a server
can be asked, under `language`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.adapter_hash import adapter_hash
from lora_fx.errors import LoraFxError, one_line, silenced
from lora_fx.formats.io import load_adapter
from lora_fx.formats.probe_beside import add_probe
from lora_fx.fx.capture.call import without_cache
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.unchanged import as_it_was
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule, by_output
from lora_fx.fx.tensors import from_numpy
from lora_fx.fx.trees import tree_map_only
from lora_fx.fx.weight_precision import precision_of
from lora_fx.inputs import SIZES, Named
from lora_fx.passes.proofs.probe_making import Subject, make_probe
from lora_fx.passes.proofs.proof_inputs import named_of
from lora_fx.passes.proofs.reference import Run
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.proofs.varied_runs import VariedRuns, with_its_adapter
from lora_fx.passes.verbs.adapt import insert
from lora_fx.passes.verbs.export_probe import facts_of, summary
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
    if adapter.invocation:
        why = "the adapter acts from its invocation tokens on, and a probe's input has none"
        return None, [f"no probe: {why}"]
    with ExitStack() as stack:
        module: AdaptedModule | None = None
        captured = model
        if isinstance(model, AdaptedModule):
            captured = execution_of(model).captured
            module = model
            stack.enter_context(as_it_was(model))
            stack.enter_context(with_its_adapter(model))
        assert isinstance(captured, Captured)  # there are two kinds of models
        reference = TorchReference(captured, partial(with_branches, captured))
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
            base=reference.base_facts(),
            feeds=partial(reference.feeds, SIZES[0]),
            precision=precision_of(captured),
            narrow=partial(narrow_run, captured, runs),
            narrows_adapters=True,
        )
        facts = {**facts_of(subject, "torch"), "adapters": {NAME: digest}}
        return make_probe(subject, kind, facts)


def with_branches(captured: Captured, adapter: Adapter) -> CapturedModule:
    """Insert the branches of an adapter, whether a gradient reaches them or not."""
    return insert(captured, adapter=adapter, dead="allow")


def narrow_run(
    captured: Captured, runs: VariedRuns, adapter: Adapter | None, feeds: Named
) -> Named | None:
    """Run the model with all of its parameters in bfloat16, as a merged folder of that dtype runs.

    The live model does so; where there is none that can, its products alone are in bfloat16.
    """
    model = captured.model
    arguments = named_of(captured.named, feeds)
    arguments = dict(tree_map_only(torch.Tensor, _in_bfloat16, arguments))
    try:
        parameters = _merged_in_bfloat16(model, adapter or Adapter({}))
        with torch.no_grad(), as_it_was(model), silenced():
            outputs = torch.func.functional_call(model, parameters, (), arguments)
            return by_output(without_cache(outputs))
    except (LoraFxError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return runs.narrow(adapter, feeds)  # a file's model, or an op that takes no two dtypes


def _merged_in_bfloat16(model: nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the float32 parameters of a model by name, with an adapter merged, in bfloat16.

    Raises:
        LoraFxError: An update that is not of a whole parameter of the model.
    """
    parameters = dict(model.named_parameters())
    merged: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float32:
            merged[name] = parameter.detach().to(torch.bfloat16)
    for key, entry in adapter.entries.items():
        if key not in merged:
            raise LoraFxError(f"{key!r} is no parameter of the model", "measure its products alone")
        (delta,) = Adapter({key: entry}).deltas(dtype="float32").values()
        exact = parameters[key].detach() + from_numpy(delta).to(parameters[key].device)
        merged[key] = exact.to(torch.bfloat16)
    return merged


def _in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


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
    return {"probe": summary(probe)}, notes
