"""export in mode train: a training step and its forward, two ONNX files over one data file.

X.onnx                a step: loss, gradients and the optimizer, in plain operators
X.switch.onnx         the forward, as mode switch has it, for the same A and B
X.onnx.data           the weights of both
X.onnx_adapter        what A and B start from
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from lora_fx.adapter.adapter import Adapter, bind, check_plain
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import ORT_TOL, Report, demand, rel
from lora_fx.conditions import SizeError
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.files.atomic import check_output, replacing
from lora_fx.fx.capture.call import onnx_conditions
from lora_fx.fx.capture.capture import alike, as_it_was
from lora_fx.fx.codes import forms
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.operators import SpecViolationError
from lora_fx.fx.tensors import from_numpy, to_numpy
from lora_fx.fx.to_onnx import OPSET
from lora_fx.fx.train.loss import IGNORED, loss_function, scores_of
from lora_fx.fx.train.step import STATES, Slot, TrainGraph, Update, slots_in, step_of, train_graph
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.manifest import (
    PROPERTY,
    Manifest,
    guard_within,
    row_of,
    say_within,
    write_adapter,
)
from lora_fx.onnx.save import Output, save_beside
from lora_fx.onnx.session import open_session
from lora_fx.passes.clean import Clean
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.proofs.proof_inputs import arrays_of
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.proofs.train_step import prove_step
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.adapt import find, insert
from lora_fx.passes.verbs.export_files import write_switch
from lora_fx.passes.verbs.export_torch import base_of, torch_reference
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.passes.verbs.options import MODES, Companions, ExportOptions

TAKEN = ("lr", "step", "seed", "loss")
"""Names that a step has for itself."""


def export_step(model: object, options: ExportOptions) -> Report:
    """See lora_fx.passes.verbs.export.

    Raises:
        LoraFxError: A base or an update that no step is made for, an operator without a gradient.
        NoEffectError: ONNX Runtime's step differs from torch's; nothing is written.
    """
    module = _adapted(model, options)
    with as_it_was(module, None):
        return _written(_Files(module, options))


def _written(files: _Files) -> Report:
    try:
        return files.write()
    except LoraFxError:  # a SizeError is a ValueError too
        raise
    except (AssertionError, IndexError, RuntimeError, ValueError) as e:
        raise LoraFxError(
            f"torch finds no loss or gradient for drawn labels: {one_line(e, 200)}",
            "name labels in the example, as kwargs={'labels': …}; of their sizes, those that the "
            "model's inputs do not share are fixed by --static labels:1",
        ) from e
    except (TypeError, SpecViolationError) as e:
        raise LoraFxError(
            f"torch traces no step of this model: {type(e).__name__}: {one_line(e, 200)}",
            "lora-fx train trains it in torch",
        ) from e


def _adapted(model: object, options: ExportOptions) -> AdaptedModule:
    """The module whose step it is; raises for what no step is made for."""
    adapter = options.adapters
    if adapter is not None and not isinstance(adapter, Adapter):
        several = list(adapter.values() if hasattr(adapter, "values") else adapter)
        if len(several) > 1:
            raise LoraFxError(f"a step trains one adapter, not {len(several)}", "name one")
        adapter = several[0] if several else None
    model = opened(model)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise LoraFxError("this module's weights are folded", "export the original model")
    if isinstance(model, AdaptedModule):
        if adapter is not None or options.include or options.exclude or options.rank:
            raise LoraFxError(
                "the module has branches already: adapters, include, exclude and rank have no say",
                "leave them out, or export the original model",
            )
        module = model
    else:
        cap = captured_of(model, options.capture_of_base())
        _refuse_base(cap.model)
        chosen: dict[str, Any] = {"rank": options.rank} if options.rank else {}
        if adapter is None:
            chosen |= {"include": options.include, "exclude": options.exclude}
        module = insert(cap, adapter=adapter, **chosen)
    _refuse_base(module)
    made = module.adapter()
    check_plain(made, "mode train")
    if made.full:
        raise LoraFxError(
            f"{min(made.full)!r} is trained whole; a step trains low-rank updates",
            "leave it out of also_train, or train with lora-fx train",
        )
    for key, u in made.lowrank.items():
        if u.frozen or variant_of(u).made_of:
            raise LoraFxError(
                f"{key!r} starts from its weight, or makes A and B of other tensors: it has no "
                "step",
                "init kaiming, gaussian or orthogonal, and variant lora, rslora, lora+ or lora-fa",
            )
    if module.norm_stats != "frozen":
        raise LoraFxError("a step keeps running statistics as they are", "norm_stats='frozen'")
    return module


def _refuse_base(model: torch.nn.Module) -> None:
    coded = sorted(forms(model))
    if coded:
        raise LoraFxError(
            f"{coded[0]!r} is quantised: a step computes gradients in float32 alone",
            "export the model that it was made from, or train with lora-fx train",
        )
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype is not torch.float32:
            raise LoraFxError(
                f"{name!r} is {dtype_name(p.dtype)}; a step is made of float32",
                "model.float() before the export",
            )


class _Files:
    """The files of one export."""

    def __init__(self, module: AdaptedModule, options: ExportOptions) -> None:
        self.module, self.options = module, options
        said = {n: getattr(options, n) for n in ("optimizer", "weight_decay", "clip")}
        self.update = Update(**{n: x for n, x in said.items() if x is not None})
        captured = module.captured
        known = captured.signature.keywords
        self.loss = loss_function(options.loss or "ce", "labels", lambda n: n in known)
        self.fractions = options.loss == "mse" or self._takes_fractions()
        self.named = self._labelled(captured.named)[0]
        self.updates = module.updates
        self.adapter = module.adapter()

    def write(self) -> Report:
        """Write and prove all of them."""
        module, options = self.module, self.options
        target = options.target
        switch, start = (target.with_suffix(s) for s in (".switch.onnx", ".onnx_adapter"))
        for path in (target, switch, start):
            check_output(path, force=options.force)
        captured = module.captured
        found = find(captured)
        reference = torch_reference(captured, options)
        keys = list(bind(self.adapter, found).lowrank)
        graph, _, said = base_of(reference, keys, options)
        only: dict[str, Any] = dict.fromkeys((*MODES["train"], "rank", "include", "exclude"))
        own = replace(
            options,
            mode="switch",
            target=switch,
            owner=target,
            external_over=0,
            also=partial(self._step, reference),
            **only,
        )
        report = write_switch(graph, reference, keys, {}, own, [*said, *module.notes], found=found)
        details = {**report.details, "mode": "train", "optimizer": self.update.optimizer}
        outputs = sorted(report.outputs, key=lambda name: name != str(target))  # the step first
        return replace(report, outputs=tuple(outputs), details=details)

    def _step(self, reference: TorchReference, made: Output, manifest: Manifest) -> Companions:
        """Write the step and the start beside the forward."""
        module, options, target = self.module, self.options, self.options.target
        slots = slots_in(self.updates, {k: (s.a, s.b) for k, s in manifest.slots.items()})
        quick: list[Callable[[FxGraph], object]] = [Clean(), Share(), Fuse()]
        plain = train_graph(module, self.named, self.loss)
        self._settle(plain)
        graph = train_graph(module, self.named, self.loss, quick, unit=True)
        batch = graph.names[: len(graph.names) - graph.seeded]
        if mine := sorted({*TAKEN, *([] if graph.own else ["labels"])} & {*batch}):
            raise LoraFxError(
                f"the model has an input {mine[0]!r}, which a step has for itself", "rename it"
            )
        opset, repeat = options.opset or OPSET, options.capture.repeat
        model = step_of(graph, slots, self.update, self._without_values, opset, repeat=repeat)
        model.metadata_props[PROPERTY] = self._manifest(manifest, slots, graph.seeded).to_text()
        say_within(model, onnx_conditions(graph.traced.door.conditions))
        if not options.within:
            guard_within(model, reference.guards())
        place = made.path.with_name(target.name)
        left = save_beside(model, place, made.path)
        session = open_session(place, options.provider)
        parity = prove_step(session.run, plain, slots, self.update, self._labelled, options.inputs)
        demand(parity, "ONNX Runtime's step differs from torch's")
        with replacing(target, force=options.force, beside=made.beside) as part:
            place.replace(part)
        start = target.with_suffix(".onnx_adapter")
        with replacing(start, force=options.force, beside=made.beside) as part:
            write_adapter(self.adapter, manifest, part)
        inside = f"{left} bytes of tensors lie in {target.name} itself"
        said = [inside] * (left > MOST_INSIDE)
        return Companions(parity, [target, start], said)

    def _settle(self, graph: TrainGraph) -> None:
        """Drop what labels asked of sizes where a graph of those sizes has the same loss.

        One row is contiguous, so `labels[..., 1:].contiguous()` would refuse a batch of 1.
        """
        for size in SIZES:
            with contextlib.suppress(SizeError):  # a batch norm trains on no single row
                self._settle_at(graph, self.module.sample(size))

    def _settle_at(self, graph: TrainGraph, sample: Named) -> None:
        traced, module = graph.traced, self.module
        named, labels = self._labelled(sample)
        door, leaves = traced.door, tree_leaves(named)
        broken = {c for c in door.conditions if not c.holds(door.given(c, leaves))}
        if not broken or not broken <= {*traced.doubtful}:
            return
        given = {**arrays_of(named), "labels": labels, "seed": np.array(0)}
        losses = []
        for each in (graph, train_graph(module, named, self.loss)):
            inputs = [torch.tensor(given[n]) for n in each.names]
            with torch.no_grad(), alike(module):
                run = fx.Interpreter(each.flat)
                losses.append(to_numpy(each.loss(run, inputs, torch.tensor(labels))))
        if rel(losses[0], losses[1]) < ORT_TOL:
            kept = tuple(c for c in door.conditions if c not in broken)
            traced.door = replace(door, conditions=kept)

    def _manifest(self, manifest: Manifest, own: Sequence[Slot], seeded: bool) -> Manifest:
        """The manifest of the step: fixed ranks, and what the step does."""
        slots = {k: replace(s, rank=self.updates[k].rank) for k, s in manifest.slots.items()}
        states = STATES[self.update.optimizer]
        training = {
            **vars(self.update),
            "loss": self.options.loss if isinstance(self.options.loss, str) else "function",
            "seed": seeded,
            "states": {s.name: [f"{s.name}.{x}" for x in states] for s in own if s.trained},
            "updates": {k: row_of(u) for k, u in self.updates.items()},
            "metadata": self.adapter.metadata,
        }
        return Manifest(slots, "train", training)

    # --- labels ----------------------------------------------------------------------------------

    def _takes_fractions(self) -> bool:
        """Whether a function takes a number for each score, and no class for each row of them."""
        compute, own = self.loss
        if own or not callable(self.options.loss):
            return False
        self.module.eval()
        with torch.no_grad():
            out = self.module._run_named(self.module.captured.named)
            scores = scores_of(out)
            for fractions in (False, True):
                self.fractions = fractions
                # a function raises what it likes for labels of another shape or dtype
                with contextlib.suppress(Exception):
                    compute(out, self._drawn(scores, None))
                    return fractions
        return False

    def _labelled(self, named: Named) -> tuple[dict[str, Any], Array]:
        """The call of a batch with its labels, where the model takes them, and the labels."""
        own, signature = self.loss[1], self.module.captured.signature
        example: Any = named.get(own)  # where the example has labels, theirs are shape and dtype
        named = {k: v for k, v in named.items() if k != own}
        asked = {}
        if example is not None and own in signature.required:
            asked[own] = torch.zeros_like(example)
        self.module.eval()
        with torch.no_grad():
            scores = scores_of(self.module._run_named({**named, **asked})).detach()
        labels = self._drawn(scores, example)
        if own:
            named = signature.bind((), {**named, own: labels})
        return dict(named), to_numpy(labels)

    def _drawn(self, scores: torch.Tensor, example: torch.Tensor | None) -> torch.Tensor:
        """Labels of scores, one of them left out."""
        at = self._without_values(scores) if example is None else example
        generator = np.random.default_rng(scores.numel())
        if at.is_floating_point():
            # a function of probabilities takes none outside [0, 1]
            draw = generator.random if callable(self.options.loss) else generator.standard_normal
            return from_numpy(draw(tuple(at.shape)).astype(np.float32))
        # a model's own labels of pixels stand where its scores have their second axis
        last = example is None or scores.dim() < 2 or at.shape == scores.shape[:-1]
        labels = generator.integers(0, scores.shape[-1 if last else 1], at.shape)
        if labels.size > 3 and example is None and not callable(self.options.loss):
            labels.reshape(-1)[-1] = IGNORED
        return from_numpy(labels)

    def _without_values(self, scores: torch.Tensor) -> torch.Tensor:
        """Labels of scores: fractions for each of them, else a class for each row of them."""
        if self.fractions:
            return torch.zeros(tuple(scores.shape), dtype=torch.float32)
        return torch.zeros(tuple(scores.shape[:-1]), dtype=torch.int64)


MOST_INSIDE = 1 << 20
"""Bytes of tensors inside a step's own file, above which it is said."""
