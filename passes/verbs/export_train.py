"""export in mode train: write a training step and its forward as two files over one data file.

X.onnx                a step: loss, gradients and the optimizer, in plain operators
X.switch.onnx         the forward, as mode switch has it, for the same A and B
X.onnx.data           the weights of both
X.onnx_adapter        what A and B start from
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

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
from lora_fx.fx.capture.onnx_names import onnx_conditions
from lora_fx.fx.capture.unchanged import alike, as_it_was
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.graph.nodes import dtype_name
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.onnx_export.translation import OPSET
from lora_fx.fx.operators import SpecViolationError
from lora_fx.fx.quantised_parameters import forms
from lora_fx.fx.tensors import to_numpy
from lora_fx.fx.train.optimizer_step import STATES, Slot, Update, slots_in
from lora_fx.fx.train.step import step_of
from lora_fx.fx.train.train_graph import TrainGraph, train_graph
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.cuda_obstacles import Obstacle, cuda_obstacles
from lora_fx.onnx.made_for import make_for
from lora_fx.onnx.manifest import PROPERTY, Manifest
from lora_fx.onnx.on_device import of_obstacles
from lora_fx.onnx.output_file import Output
from lora_fx.onnx.probe_runs import LOSS, RATE
from lora_fx.onnx.range_guards import guard_within, say_within
from lora_fx.onnx.runtime_adapter import write_adapter
from lora_fx.onnx.save import save_beside
from lora_fx.onnx.session import RuntimeSession, open_session
from lora_fx.onnx.update_row import row_of
from lora_fx.passes.clean import Clean
from lora_fx.passes.fuse import Fuse
from lora_fx.passes.proofs.probe_making import Subject
from lora_fx.passes.proofs.proof_inputs import arrays_of, feeds_of
from lora_fx.passes.proofs.torch_reference import TorchReference
from lora_fx.passes.proofs.train_step import prove_step
from lora_fx.passes.share import Share
from lora_fx.passes.verbs.adapt import find, insert
from lora_fx.passes.verbs.drawn_labels import DrawnLabels
from lora_fx.passes.verbs.export_options import MODES, Companions, ExportOptions
from lora_fx.passes.verbs.export_probe import probe_file
from lora_fx.passes.verbs.export_slots import base_of, torch_reference
from lora_fx.passes.verbs.export_switch import SwitchTargets, write_switch
from lora_fx.passes.verbs.open import captured_of, opened
from lora_fx.progress import stage
from lora_fx.text import Json

if TYPE_CHECKING:
    import onnx_ir as ir

TAKEN = ("lr", "step", "seed", "loss")
"""Names of inputs and outputs that a step uses itself."""
FIRST_STEP: Mapping[str, Array] = {
    "lr": np.array(RATE, np.float32),
    "step": np.array(1, np.int64),
    "seed": np.array(0, np.int64),
}
"""The scalar inputs of a step as a session gives them to its first."""
MOST_INSIDE = 1 << 20
"""The bytes of tensors inside a step's own file above which a warning is given."""


def export_step(model: object, options: ExportOptions) -> Report:
    """Export in mode train; see lora_fx.passes.verbs.export.

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
            f"torch cannot compute the loss or its gradient with random labels: {one_line(e, 200)}",
            "pass labels in the example, as kwargs={'labels': …}; fix each of their dimensions "
            "that no input shares with --static labels:1",
        ) from e
    except (TypeError, SpecViolationError) as e:
        raise LoraFxError(
            f"torch cannot trace a training step of this model: {type(e).__name__}: "
            f"{one_line(e, 200)}",
            "train the model in torch with lora-fx train",
        ) from e


def _adapted(model: object, options: ExportOptions) -> AdaptedModule:
    """Return the module whose step is exported; raise for a module that cannot have a step."""
    adapter = _one_adapter(options)
    model = opened(model)
    if isinstance(model, CapturedModule) and not isinstance(model, AdaptedModule):
        raise LoraFxError("this module's weights are folded", "export the original model")
    if isinstance(model, AdaptedModule):
        if adapter is not None or options.include or options.exclude or options.rank:
            raise LoraFxError(
                "the module has branches already: adapters, include, exclude and rank have no "
                "effect",
                "leave them out, or export the original model",
            )
        module = model
    else:
        module = _inserted(model, adapter, options)
    _refuse_module(module)
    return module


def _one_adapter(options: ExportOptions) -> Adapter | None:
    """Return the adapter that the step trains; None stands for a new adapter."""
    adapters = options.adapters
    if adapters is None or isinstance(adapters, Adapter):
        return adapters
    several: Sequence[Adapter]
    if isinstance(adapters, Mapping):
        several = list(cast(Mapping[str, Adapter], adapters).values())
    else:
        several = adapters
    if len(several) > 1:
        raise LoraFxError(
            f"a training step trains one adapter, not {len(several)}", "pass one adapter"
        )
    return several[0] if several else None


def _inserted(model: object, adapter: Adapter | None, options: ExportOptions) -> AdaptedModule:
    """Insert the branches of an adapter, or new branches, into a model."""
    captured = captured_of(model, options.capture_of_base())
    _refuse_base(captured.model)
    keywords: dict[str, Any] = {}
    if options.rank:
        keywords["rank"] = options.rank
    if adapter is None:
        keywords["include"] = options.include
        keywords["exclude"] = options.exclude
    return insert(captured, adapter=adapter, **keywords)


def _refuse_module(module: AdaptedModule) -> None:
    """Raise for a base, an update or norm statistics that no training step supports."""
    _refuse_base(module)
    adapter = module.adapter()
    check_plain(adapter, "mode train")
    if adapter.full:
        raise LoraFxError(
            f"{min(adapter.full)!r} is trained whole; a training step trains low-rank updates only",
            "leave it out of also_train, or train with lora-fx train",
        )
    for key, update in adapter.lowrank.items():
        if update.frozen or variant_of(update).made_of:
            raise LoraFxError(
                f"{key!r} starts from the weight itself, or computes A and B from other tensors: "
                "no training step can be exported for it",
                "use init kaiming, gaussian or orthogonal, and variant lora, rslora, lora+ or "
                "lora-fa",
            )
    if execution_of(module).norm_stats != "frozen":
        raise LoraFxError(
            "a training step does not update running statistics of norms",
            "pass norm_stats='frozen'",
        )


def _refuse_base(model: torch.nn.Module) -> None:
    """Raise for weights that are not in float32."""
    coded = sorted(forms(model))
    if coded:
        raise LoraFxError(
            f"{coded[0]!r} is quantised: a training step computes gradients in float32 only",
            "export the model that it was made from, or train with lora-fx train",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise LoraFxError(
                f"{name!r} is {dtype_name(parameter.dtype)}; a training step needs float32",
                "call model.float() before the export",
            )


class _Files:
    """The files of one export in mode train."""

    def __init__(self, module: AdaptedModule, options: ExportOptions) -> None:
        self.module = module
        self.execution = execution_of(module)
        self.options = options
        of_update = {}
        for name in ("optimizer", "weight_decay", "clip"):
            value = getattr(options, name)
            if value is not None:
                of_update[name] = value
        self.update = Update(**of_update)
        self.labels = DrawnLabels(module, options.loss)
        self.named = self.labels.labelled(self.execution.captured.named)[0]
        self.updates = module.updates
        self.adapter = module.adapter()
        self.obstacles: Sequence[Obstacle] = ()  # those of the step
        self.of_probe: Json = {}  # the report's field on the step's probe

    def write(self) -> Report:
        """Write and prove all files."""
        module = self.module
        options = self.options
        target = options.target
        switch = target.with_suffix(".switch.onnx")
        start = target.with_suffix(".onnx_adapter")
        for path in (target, switch, start):
            check_output(path, force=options.force)

        captured = self.execution.captured
        targets = find(captured)
        reference = torch_reference(captured, options)
        bound = bind(self.adapter, targets)
        keys = list(bound.lowrank)
        graph, _, notes = base_of(reference, keys, options)
        of_train_alone: dict[str, Any] = dict.fromkeys(
            (*MODES["train"], "rank", "include", "exclude")
        )
        of_forward = replace(
            options,
            mode="switch",
            target=switch,
            owner=target,
            external_over=0,
            also=partial(self._write_step, reference),
            also_probed={target.stem: bound} if _changes_anything(bound) else {},
            **of_train_alone,
        )
        report = write_switch(
            graph,
            reference,
            SwitchTargets(keys, captured=targets),
            {},
            of_forward,
            [*notes, *module.notes],
        )
        device = of_obstacles(target, self.obstacles, report.details["provider"], options.made_for)
        details = {
            **report.details,
            "mode": "train",
            "optimizer": self.update.optimizer,
            **device,
            **self.of_probe,
        }
        step_first = sorted(report.outputs, key=lambda name: name != str(target))
        return replace(report, outputs=tuple(step_first), details=details)

    def _write_step(
        self, reference: TorchReference, output: Output, manifest: Manifest
    ) -> Companions:
        """Write the step and the initial adapter next to the forward's file."""
        options = self.options
        target = options.target
        names = {key: (slot.a, slot.b) for key, slot in manifest.slots.items()}
        slots = slots_in(self.updates, names)
        with stage("deriving the training step"):
            plain = train_graph(self.module, self.named, self.labels.loss)
            self._settle(plain)
            model = self._model(manifest, slots, reference)

        self.obstacles = cuda_obstacles(model)
        path = output.path.with_name(target.name)
        with stage("writing the step"):
            bytes_inside = save_beside(model, path, output.path)
        session = open_session(path, options.provider)
        parity = prove_step(
            session.run, plain, slots, self.update, self.labels.labelled, options.inputs
        )
        demand(parity, "ONNX Runtime's step differs from torch's")
        warnings: list[str] = []
        at_start = {**self._start(manifest, slots), **FIRST_STEP}
        subject = self._subject(session, plain, at_start, reference)
        self.of_probe = probe_file(path, subject, options.probe, session.provider, warnings)

        with replacing(target, force=options.force, beside=output.beside) as temporary:
            path.replace(temporary)
        start = target.with_suffix(".onnx_adapter")
        with replacing(start, force=options.force, beside=output.beside) as temporary:
            write_adapter(self.adapter, manifest, temporary)
        if bytes_inside > MOST_INSIDE:
            warnings.append(f"{target.name} holds {bytes_inside} bytes of tensors inside the file")
        return Companions(parity, [target, start], warnings)

    def _start(self, manifest: Manifest, slots: Sequence[Slot]) -> dict[str, Array]:
        """Return the tensors that the file takes before its first step: A, B, and states of 0."""
        tensors = manifest.tensors(self.adapter)
        for slot in slots:
            if slot.trained:
                for suffix in STATES[self.update.optimizer]:
                    tensors[f"{slot.name}.{suffix}"] = np.zeros_like(tensors[slot.name])
        return tensors

    def _subject(
        self,
        session: RuntimeSession,
        plain: TrainGraph,
        start: Named,
        reference: TorchReference,
    ) -> Subject:
        """Return the proven step as a probe is made of it: its loss from a start."""
        names = {node.name for node in session.inputs}

        def of_file(feeds: Named) -> dict[str, Array]:
            arrays = {name: array for name, array in {**start, **feeds}.items() if name in names}
            return {LOSS: session.run(arrays)[LOSS]}

        def of_torch(feeds: Named) -> dict[str, Array]:
            return {LOSS: self._loss(plain, {**FIRST_STEP, **feeds})}

        def batch(_seed: int) -> dict[str, Array]:
            arrays = self._batch(plain)
            return {name: array for name, array in arrays.items() if name in names}

        return Subject(
            mode="train",
            run=lambda _: of_file,
            reference=lambda _: of_torch,
            vary=lambda _: of_file,  # there is no adapter to vary
            adapters={},
            found=find(self.execution.captured),
            base=reference.base_facts(),
            feeds=batch,
            written=("labels",),
        )

    def _batch(self, graph: TrainGraph) -> dict[str, Array]:
        """Return the first drawn batch that the step takes, with its labels.

        Raises:
            LoraFxError: It takes none.
        """
        for named, _, _ in feeds_of(self.module, self.options.inputs):
            try:
                named, labels = self.labels.labelled(named)
            except (IndexError, RuntimeError, ValueError):
                continue  # a size that the model does not take, which the proof has left out
            if graph.traced.door.refused(tree_leaves(dict(named))) is None:
                return {**arrays_of(named), "labels": labels}
        raise LoraFxError("the step takes no drawn batch", "pass --inputs")

    def _model(
        self, manifest: Manifest, slots: Sequence[Slot], reference: TorchReference
    ) -> ir.Model:
        """Make the step in ONNX, with its manifest and the sizes at which it is valid."""
        options = self.options
        quick: list[Callable[[FxGraph], object]] = [Clean(), Share(), Fuse()]
        graph = train_graph(self.module, self.named, self.labels.loss, quick, unit=True)
        _refuse_taken_names(graph)
        model: ir.Model = step_of(
            graph,
            slots,
            self.update,
            self.labels.without_values,
            options.opset or OPSET,
            repeat=options.capture.repeat,
        )
        own_manifest = self._manifest(manifest, slots, graph.seeded)
        model.metadata_props[PROPERTY] = own_manifest.to_text()
        say_within(model, onnx_conditions(graph.traced.door.conditions))
        if not options.within:
            guard_within(model, reference.guards())
        make_for(model, options.made_for)
        return model

    def _settle(self, graph: TrainGraph) -> None:
        """Drop size conditions that come from labels, if a graph of other sizes has the same loss.

        One row is contiguous, so `labels[..., 1:].contiguous()` would refuse a batch of 1.
        """
        for size in SIZES:
            with contextlib.suppress(SizeError):  # a batch norm trains on no single row
                self._settle_at(graph, self.execution.sample(size))

    def _settle_at(self, graph: TrainGraph, sample: Named) -> None:
        """Drop the conditions that a sample breaks, if a graph of this sample has the same loss."""
        traced = graph.traced
        door = traced.door
        named, labels = self.labels.labelled(sample)
        leaves = tree_leaves(named)
        broken = {
            condition
            for condition in door.conditions
            if not condition.holds(door.given(condition, leaves))
        }
        if not broken or not broken <= {*traced.doubtful}:
            return

        arrays = {**arrays_of(named), "labels": labels, "seed": np.array(0)}
        graph_of_sample = train_graph(self.module, named, self.labels.loss)
        loss = self._loss(graph, arrays)
        loss_of_sample = self._loss(graph_of_sample, arrays)
        if rel(loss, loss_of_sample) < ORT_TOL:
            conditions = tuple(
                condition for condition in door.conditions if condition not in broken
            )
            traced.door = replace(door, conditions=conditions)

    def _loss(self, graph: TrainGraph, arrays: Mapping[str, Array]) -> Array:
        """Compute a graph's loss from arrays by name."""
        inputs = [torch.tensor(arrays[name]) for name in graph.names]
        with torch.no_grad(), alike(self.module):
            run = fx.Interpreter(graph.flat)
            return to_numpy(graph.loss(run, inputs, torch.tensor(arrays["labels"])))

    def _manifest(self, manifest: Manifest, slots: Sequence[Slot], seeded: bool) -> Manifest:
        """Return the manifest of the step: fixed ranks, and a description of the step."""
        slots_of_rank = {
            key: replace(slot, rank=self.updates[key].rank) for key, slot in manifest.slots.items()
        }
        loss = self.options.loss
        suffixes = STATES[self.update.optimizer]
        states = {}
        for slot in slots:
            if slot.trained:
                states[slot.name] = [f"{slot.name}.{suffix}" for suffix in suffixes]
        training = {
            **vars(self.update),
            "loss": loss if isinstance(loss, str) else "function",
            "seed": seeded,
            "states": states,
            "updates": {key: row_of(update) for key, update in self.updates.items()},
            "metadata": self.adapter.metadata,
        }
        return Manifest(slots_of_rank, "train", training=training)


def _changes_anything(adapter: Adapter) -> bool:
    """Whether an adapter is more than a start, whose B is 0."""
    return any(update.b.any() for update in adapter.lowrank.values())


def _refuse_taken_names(graph: TrainGraph) -> None:
    """Raise if an input of the model has a name that the step uses itself."""
    inputs_of_model = graph.names[: len(graph.names) - graph.seeded]
    names_of_step = {*TAKEN}
    if not graph.own:
        names_of_step.add("labels")
    clashes = sorted(names_of_step.intersection(inputs_of_model))
    if clashes:
        raise LoraFxError(
            f"the model has an input {clashes[0]!r}, a name that the training step uses itself",
            "rename this input",
        )
