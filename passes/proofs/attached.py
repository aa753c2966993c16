"""Prove that a live model with an adapter gives the numbers it should, before it is handed over.

The reference is the eval graph with W + s·b·a at every site; for a model without one, the
unadapted model run with W + s·b·a in its parameters. Both run with random a and b, so that there is
an effect to compare. Gradients are those of the live model itself, in both modes.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, draw, slots_of, with_values
from lora_fx.compare import EPSILON, ORT_TOL, STEPS, Parity, compare
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.fx.attach.attachment import Attachment
from lora_fx.fx.capture.call import Signature, sample_call
from lora_fx.fx.capture.capture import Captured, alike
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import by_output, copied, with_signature
from lora_fx.fx.tensors import device_of
from lora_fx.inputs import SIZES, Named, default_dynamic
from lora_fx.passes.proofs.effect import Trained, prove_gradients, weight_form, without_gradient
from lora_fx.passes.proofs.parity import arrays_of, named_of, prove
from lora_fx.progress import stage
from lora_fx.targets.target import base_name, split_key

Arrays = dict[str, Array]
TOLERANCE = {"float32": 1e-5, **{name: 8 * eps for name, eps in EPSILON.items()}}
"""The gates of the explicit reference, which rounds W + s·b·a in another order."""


class InGraph:
    """What the live model has to equal: the eval graph of its capture, in the weight form."""

    def __init__(self, state: Attachment, cap: Captured, adapter: Adapter) -> None:
        self.state = state
        self.cap = cap
        module: AdaptedModule = with_signature(AdaptedModule, cap)(
            cap, state.found, adapter, weight_form
        )
        module._programs.blocks = False  # it runs once
        self.module = module

    def put(self, updates: Mapping[str, LowRank]) -> None:
        """Take these updates from now on, of the same shapes."""
        self.module.load_adapter(Adapter(updates))

    def check(self) -> Parity:
        """Compare on the example inputs; on sampled ones where the adapter does nothing there."""
        module, given, tol = self.module, arrays_of(self.cap.named), ORT_TOL
        with self.state.base():
            base = self._live(given)
        adapted = self._live(given)
        if self.cap.quantised is not None:
            # kernels of quantised layers round as they like, some in bfloat16, some x too
            with module.base():
                own = compare(base, module.flat(self.cap.named), {}, tol).rel
            tol = max(tol, min(STEPS, 4 * own))
        idle = all(np.array_equal(base[n], adapted[n]) for n in base)
        sampled = prove(self._live, module, sizes=SIZES[:1], tol=tol) if idle else []
        return (sampled or prove(lambda _: adapted, module, arrays=given, tol=tol))[0]

    def _live(self, feeds: Mapping[str, Array]) -> Arrays:
        with eval_mode(self.state.model):
            named = named_of(self.cap.named, feeds)
            return by_output(self.cap.signature.call(self.state.model, named))


class Explicit:
    """Without a graph: the same live model, its adapter off, with W + s·b·a in its parameters."""

    def __init__(self, state: Attachment, signature: Signature, named: Named) -> None:
        self.state, self.signature, self.named = state, signature, named

    def put(self, updates: Mapping[str, LowRank]) -> None:
        """The live model has them already."""

    def check(self) -> Parity:
        """Compare on the example inputs."""
        model = self.state.model
        weights = dict(model.named_parameters())
        changed: dict[str, torch.Tensor] = {}
        for key, change in self.state.adapter().deltas().items():
            name = base_name(key)
            w = changed.setdefault(name, weights[name].detach().clone())
            _, region = split_key(key, tuple(w.shape))
            w[tuple(slice(lo, hi) for lo, hi in region)] += torch.from_numpy(change).to(w)
        with eval_mode(model):
            got = by_output(self.signature.call(model, copied(self.named)))
        with eval_mode(model), self.state.base(), _data(weights, changed):
            want = by_output(self.signature.call(model, copied(self.named)))
        gates = {n: TOLERANCE.get(v.dtype.name, 1e-9) for n, v in want.items()}
        return compare(got, want, {}, gates)


@contextlib.contextmanager
def _data(
    weights: Mapping[str, nn.Parameter], changed: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Other numbers in the parameters themselves, so that every way of reading them sees them."""
    was = {name: weights[name].data for name in changed}
    try:
        for name, value in changed.items():
            weights[name].data = value
        yield
    finally:
        for name, value in was.items():
            weights[name].data = value


def random_values(key: str, update: LowRank) -> LowRank:
    """An update of the same shapes with random a and b."""
    assert update.layout is not None
    values = {s.field: s.value for s in slots_of(key, update)}
    a, values["b"] = draw(key, update.layout, update.rank - update.frozen, 0, "probe")
    values["a"] = a[..., :: a.shape[-1] // values["a"].shape[-1]]
    return with_values(update, values)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, with the same random numbers; the model is put back after it."""
    with alike(model, training=False), torch.no_grad():
        yield


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
        free = inputs if cap.requested else inputs.with_dims(default_dynamic(inputs))
        return sample_call(free, example, SIZES[0], seed, None, device_of(state.model))

    def call(named: Named) -> object:
        return signature.call(state.model, named)

    trained = Trained(state.model, state.updates, example, call, sample)
    # a train mode may draw by numpy or Python, as SpecAugment's masks do
    drawn = random.getstate(), np.random.get_state()
    try:
        state.effect = prove_gradients(trained, trained.runs_at())
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
    return without_gradient(state.effect, len(state.updates), "keep" if cap is None else dead)


@stage("comparing the live model with the graph")
def prove_live(
    state: Attachment, reference: InGraph | Explicit, probe: Mapping[str, LowRank]
) -> None:
    """Raise unless the attached model gives the reference's numbers with `probe` installed.

    Modules whose branch does not run, because some fused path reads their weight, change to the
    weight form first.

    Raises:
        LoraFxError: It differs; the message names the targets that differ when alone.
    """
    try:
        with state.watch() as ran:
            found = reference.check()
        unseen = {path for path, form in state.forms.items() if form.output} - ran
        if unseen:
            state.by_weight = frozenset(unseen)
            state.install(probe)
            found = reference.check()
        for _ in range(3):  # random updates may take a deep model past the largest number
            if math.isfinite(found.rel):
                break
            probe = {k: replace(u, b=u.b * np.float32(0.1)) for k, u in probe.items()}
            found = _with(state, reference, probe)
        if found.ok:
            return
        guilty = [k for k in probe if not _alone(state, reference, probe, k).ok]
    except LoraFxError:
        raise
    except Exception as e:
        raise LoraFxError(
            f"the attached model does not run on the example inputs: {one_line(e, 200)}",
            "use lora_fx.insert",
        ) from e
    size = f"{found.rel:.1e}" if math.isfinite(found.rel) else "more than numbers can say"
    raise LoraFxError(
        f"{', '.join(guilty[:3]) or 'the adapter'}: the attached model's {found.output!r} differs "
        f"from the reference by {size}: something reads the weight past its module's attribute, "
        "or reads it for more than the matmuls that were found",
        "exclude it, or use lora_fx.insert",
    )


def _alone(
    state: Attachment, reference: InGraph | Explicit, probe: Mapping[str, LowRank], key: str
) -> Parity:
    """The comparison with every other update at zero."""
    only = {k: u if k == key else replace(u, b=np.zeros_like(u.b)) for k, u in probe.items()}
    return _with(state, reference, only)


def _with(
    state: Attachment, reference: InGraph | Explicit, updates: Mapping[str, LowRank]
) -> Parity:
    state.fill(updates)
    reference.put(updates)
    return reference.check()
