"""The proof that a live model with an attached adapter gives the numbers of its reference.

    branch   y + s·b(a x) is what a module's own forward gives with W + s·b·a for its weight
    graph    the live model is the eval graph with the same updates at the sites of its targets

Both are compared in one run, with random a and b, so that there is an effect to compare; the first
is in branches.py. The graph computes a site as the live model does: with the branch where the first
comparison shows it right, else with W + s·b·a. The two then round alike. With W + s·b·a at every
site they do not: in bfloat16 the sums of y + s·b(a x) and of (W + s·b·a) x differ so much after a
few layers that the comparison passes no gate, and a gate that lets it pass hides a lost update.

For a model without a graph the reference is the unadapted model, run with W + s·b·a in its
parameters. Gradients are those of the live model itself, in both modes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.factor_tensors import resized, slots_of, with_values
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.variant import variant_of
from lora_fx.compare import (
    CEILING,
    EPSILON,
    ORT_TOL,
    STEPS,
    Gate,
    Parity,
    compare,
    grow,
)
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, retold
from lora_fx.fx.attach.attachment import Attachment
from lora_fx.fx.capture.call import Signature, copied
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.example import sample_call
from lora_fx.fx.graph.rounding import nearby
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import Rewriter, by_output
from lora_fx.fx.tensors import device_of
from lora_fx.inputs import SIZES, Named, default_dynamic
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.branches import TOLERANCE, Branches
from lora_fx.passes.proofs.gradients import Trained, prove_gradients, without_gradient
from lora_fx.passes.proofs.live_choices import LiveRerun, live_choices
from lora_fx.passes.proofs.live_model import eval_mode, parameters_as
from lora_fx.passes.proofs.parity import prove
from lora_fx.passes.proofs.proof_inputs import arrays_of, named_of
from lora_fx.passes.proofs.reference import SEEDS, Choices
from lora_fx.passes.proofs.run_comparison import compared
from lora_fx.progress import stage
from lora_fx.targets.keys import base_name, split_key
from lora_fx.text import some

HALVINGS = 10
"""The number of times that random updates are halved if they are too large to be compared."""
READ_PAST = (
    "the update does not change the live model, so some code reads the weight, but not through "
    "the attribute of its module"
)
READ_TWICE = (
    "the update changes the live model in another way, so some code reads the weight for more "
    "than the matmuls that were found, or what the model does depends on the weight's values"
)


class InGraph:
    """The reference from a captured graph: the eval graph in weight form."""

    def __init__(self, state: Attachment, cap: Captured, adapter: Adapter) -> None:
        self.state = state
        self.cap = cap
        self.branched = state.branched_sites()
        self.module = AdaptedModule(cap, state.found, adapter, self._inserter)
        self.module._programs.blocks = False
        self.module._programs.few = True

    def _inserter(self, updates: Updates, training: bool) -> Rewriter:
        return Insert(updates, missing="skip", branched=self.branched)

    def put(self, updates: Updates) -> None:
        """Load these updates, which have the same shapes, in the forms of the live model."""
        branched = self.state.branched_sites()
        if branched != self.branched:
            self.branched = branched
            self.module._programs.compiled.clear()
        self.module.load_adapter(Adapter(updates))

    def check(self) -> Parity:
        """Compare on the example inputs, or on sampled inputs if the adapter does nothing there."""
        example = arrays_of(self.cap.named)
        with self.state.base():
            base = self._live(example)
        adapted = self._live(example)
        tol = self._tolerance(base)
        rerun = LiveRerun(self._live)
        if _are_equal(base, adapted):
            results = prove(self._live, self.module, sizes=SIZES[:1], tol=tol, rerun=rerun)
            if results:
                return results[0]

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            """Run the live model, but do not repeat its run on the example inputs."""
            if feeds.keys() == example.keys() and _are_equal(example, feeds):
                return adapted
            return self._live(feeds)

        return prove(run, self.module, arrays=example, tol=tol, rerun=rerun, unadapted=base)[0]

    def _tolerance(self, base: Named) -> float:
        """Return the fp32 gate, wider for quantised layers if even the unadapted models differ."""
        if self.cap.quantised is None:
            return ORT_TOL
        # kernels of quantised layers round as they like, some in bfloat16, some x too
        with self.module.base():
            difference = compare(
                base, execution_of(self.module).flat(self.cap.named), {}, ORT_TOL
            ).rel
        return max(ORT_TOL, min(STEPS, 4 * difference))

    def changes_live(self) -> bool:
        """Whether the adapter changes an output of the live model on the example inputs."""
        return _changes(self.state, partial(self._live, arrays_of(self.cap.named)))

    def _live(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with eval_mode(self.state.model):
            named = named_of(self.cap.named, feeds)
            return by_output(self.cap.signature.call(self.state.model, named))


class Explicit:
    """The reference without a graph: the same live model with W + s·b·a as its parameters."""

    def __init__(self, state: Attachment, signature: Signature, named: Named) -> None:
        self.state = state
        self.signature = signature
        self.named = named

    def put(self, updates: Updates) -> None:
        """Do nothing: this reference reads the updates from the live model."""

    def check(self) -> Parity:
        """Compare on the example inputs."""
        weights = dict(self.state.model.named_parameters())
        changed = self._changed(weights)
        feeds = arrays_of(self.named)
        unadapted = partial(self._unadapted, weights, feeds)

        def moved(seed: int) -> dict[str, Array]:
            """Run the reference with every weight moved by half a unit of its last place."""
            generator = torch.Generator().manual_seed(seed)
            return unadapted(
                {
                    name: nearby(changed.get(name, weight), generator)
                    for name, weight in weights.items()
                }
            )

        def own() -> Iterator[Mapping[str, float]]:
            largest_errors: dict[str, float] = {}
            for seed in SEEDS:
                yield grow(largest_errors, moved(seed), expected)

        def choose() -> Choices:
            return live_choices(lambda: unadapted(changed), [partial(moved, s) for s in SEEDS])

        expected = unadapted(changed)
        rerun = LiveRerun(self._live)
        gates = _live_gates(expected)
        parity, _ = compared(
            self._live, rerun, feeds, expected, gates, own, choose, of="the live model"
        )
        return parity

    def _changed(self, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return W + s·b·a by the name of the adapted parameter."""
        changed: dict[str, torch.Tensor] = {}
        for key, change in self.state.adapter().deltas().items():
            name = base_name(key)
            if name not in changed:
                changed[name] = weights[name].detach().clone()
            w = changed[name]
            _, region = split_key(key, tuple(w.shape))
            w[tuple(slice(lo, hi) for lo, hi in region)] += torch.from_numpy(change).to(w)
        return changed

    def changes_live(self) -> bool:
        """Whether the adapter changes an output of the live model on the example inputs."""
        return _changes(self.state, partial(self._live, arrays_of(self.named)))

    def _unadapted(
        self, weights: Mapping[str, nn.Parameter], feeds: Named, changed: Mapping[str, torch.Tensor]
    ) -> dict[str, Array]:
        with self.state.base(), parameters_as(weights, changed):
            return self._live(feeds)

    def _live(self, feeds: Named) -> dict[str, Array]:
        model = self.state.model
        named = named_of(self.named, feeds) if feeds else copied(self.named)
        with eval_mode(model):
            return by_output(self.signature.call(model, named))


def _changes(state: Attachment, live: Callable[[], Named]) -> bool:
    """Whether the adapter changes an output of an attached model."""
    adapted = live()
    with state.base():
        base = live()
    return not _are_equal(base, adapted)


def _are_equal(arrays: Named, others: Named) -> bool:
    return all(np.array_equal(array, others[name]) for name, array in arrays.items())


def _live_gates(expected: Named) -> dict[str, Gate]:
    """Return the gates of the explicit reference, which rounds W + s·b·a in another order."""
    gates = {}
    for name, value in expected.items():
        dtype = value.dtype.name
        first = TOLERANCE.get(dtype, 1e-9)
        most = 4 * first if dtype in EPSILON else CEILING
        gates[name] = Gate(first, most)
    return gates


def random_values(key: str, update: LowRank) -> LowRank:
    """Return an update of the same shapes with random numbers."""
    values = {slot.field: slot.value for slot in slots_of(key, update)}
    drawn = variant_of(update).drawn(update, key, seed=0)
    return with_values(update, {**values, **drawn})


@stage("proving that every target trains")
def prove_trained(
    state: Attachment, cap: Captured | None, signature: Signature, example: Named, dead: str
) -> tuple[str, ...]:
    """Prove that gradients reach every target of the live model, in eval and in train mode.

    Small random inputs come first, and the example where they do not do. A model that no graph
    shows takes paths that only its example is known to take.

    Args:
        state: The attached model; `state.effect` gets the finding.
        cap: Its capture; None where no single graph can hold it.
        signature: That of its forward.
        example: The example's arguments by name.
        dead: As in insert.

    Returns:
        The targets to leave out.

    Raises:
        DeadTargetError: A target that no gradient reaches.
    """

    def sample(seed: int) -> Named:
        if cap is None:
            return example
        inputs = cap.bounded_inputs()
        if not cap.requested:
            inputs = inputs.with_dims(default_dynamic(inputs))
        return sample_call(inputs, example, SIZES[0], seed, None, device_of(state.model))

    def call(named: Named) -> object:
        return signature.call(state.model, named)

    trained = Trained(state.model, state.updates, example, call, sample)
    # a train mode may draw by numpy or Python, as SpecAugment's masks do
    state_of_python = random.getstate()
    state_of_numpy = np.random.get_state()
    try:
        state.effect = prove_gradients(trained, trained.runs_at())
    finally:
        random.setstate(state_of_python)
        np.random.set_state(state_of_numpy)
    return without_gradient(state.effect, len(state.updates), "keep" if cap is None else dead)


@stage("comparing the live model with the graph")
def prove_live(state: Attachment, reference: InGraph | Explicit, probe: Updates) -> None:
    """Raise if the attached model with the updates `probe` differs from the reference.

    Modules whose branch does not run, because some fused path reads their weight, change to the
    weight form first.

    Raises:
        LoraFxError: It differs; the message names the targets that differ when alone.
    """

    def checked_with(updates: Updates) -> Parity:
        state.fill(updates)
        reference.put(updates)
        return _checked(state, reference)[0]

    def checked_alone(key: str) -> Parity:
        """Compare with all updates but this one set to zero."""
        zeros = {k: resized(update, 0.0) for k, update in probe.items() if k != key}
        return checked_with({**probe, **zeros})

    failed = "the attached model does not run on the example inputs"
    with retold(failed, "use lora_fx.insert", most=200):
        parity = _checked_in_its_forms(state, reference, probe)
        if parity.ok:
            return

        # random updates may take a deep model past the largest number, or so far that rounding
        # alone would be more than any gate: smaller ones say then what these cannot
        for _ in range(HALVINGS):
            if math.isfinite(parity.rel) and parity.tol != CEILING:
                break
            probe = {key: resized(update, 0.5) for key, update in probe.items()}
            parity = checked_with(probe)
            if parity.ok and parity.tol != CEILING:
                return

        guilty = [key for key in probe if not checked_alone(key).ok]
        why = "each update is right by itself, but all of them together are not"
        if guilty:
            checked_alone(guilty[0])
            why = READ_TWICE if reference.changes_live() else READ_PAST

    size = "an infinite amount or NaN"
    if math.isfinite(parity.rel):
        size = f"{parity.rel:.1e}"
    raise LoraFxError(
        f"{some(guilty, 3) or 'the adapter'}: the attached model's {parity.output!r} differs "
        f"from the reference by {size}: {why}",
        "exclude it, or use lora_fx.insert" if guilty else "use lora_fx.insert",
    )


def _checked_in_its_forms(
    state: Attachment, reference: InGraph | Explicit, probe: Updates
) -> Parity:
    """Compare; modules whose branch did not run change to the weight form first."""
    parity, ran = _checked(state, reference)
    with_branch = {path for path, form in state.forms.items() if form.output}
    unseen = with_branch - ran
    if unseen:
        state.by_weight = frozenset(unseen)
        state.install(probe)
        reference.put(probe)
        parity, _ = _checked(state, reference)
    return parity


def _checked(state: Attachment, reference: InGraph | Explicit) -> tuple[Parity, set[str]]:
    """Compare the outputs and the branches; return the first failure, and the branches that ran."""
    branches = Branches(state)
    with state.watched(branches):
        parity = reference.check()
    if parity.ok:
        parity = branches.wrong() or parity
    return parity, branches.ran
