"""Proof that an adapter takes effect: gradients reach every target, and branches equal W + s·b·a.

At random a and b, one backward per mode with a fixed random cotangent on every output gives the
gradient of each b, or of what another variant says its ΔW is in proportion to. The cotangent is
random because a plain sum is constant after a LayerNorm: its gradient there is rounding. A target
is dead when the root mean square of its gradient is below 1e-6 of the median target's. One eval
forward is compared with the weight form of every site.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.variant import resized, slots_of, variant_of, with_values
from lora_fx.compare import (
    CEILING,
    EPSILON,
    FOLD_TOL,
    ORT_TOL,
    STEPS,
    Gate,
    Parity,
    compare,
    grow,
)
from lora_fx.conditions import SizeError
from lora_fx.dtypes import Array
from lora_fx.errors import DeadTargetError, LoraFxError, NoEffectError, one_line, retold
from lora_fx.fx.attach.attachment import Attachment
from lora_fx.fx.capture.call import Signature, copied
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.capture.example import sample_call
from lora_fx.fx.capture.unchanged import alike, as_it_was
from lora_fx.fx.graph.rounding import nearby
from lora_fx.fx.module.adapted import AdaptedModule, Effect, held_tensors
from lora_fx.fx.module.doubts import plain
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.insertion import insertion_of
from lora_fx.fx.module.module import Rewriter, by_output
from lora_fx.fx.tensors import device_of
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import SIZES, Named, default_dynamic
from lora_fx.passes.insert import Insert
from lora_fx.passes.proofs.dispatched import LiveRerun, live_choices
from lora_fx.passes.proofs.parity import arrays_of, is_real, named_of, prove, torch_rerun, torch_run
from lora_fx.passes.proofs.reference import SEEDS, compared
from lora_fx.progress import stage
from lora_fx.targets.target import base_name, split_key
from lora_fx.text import some

DEAD = 1e-6
"""Share of the median gradient below which a target is dead."""
DRAWS = 4
"""What a random depth left out, or a ReLU cut off, gets so many chances to be seen."""
SIZE = 0.05
"""The size of the probe's ΔW beside a weight of unit fan-in: seen, and far from saturation."""
HALVINGS = 10
"""Times that drawn updates are made smaller, where a model with them tells nothing."""
Telling = Mapping[str, nn.Parameter]
"""Target → the tensor that its ΔW is in proportion to, whose gradient tells: b of LoRA."""


@dataclass(frozen=True)
class Trained:
    """What gradients are proven of: the module of insert, or a live one with an adapter.

    Attributes:
        model: Holds the adapter's tensors and the mode.
        updates: Key → the update that it has.
        example: The example's arguments by name.
        call: Runs the model on named arguments.
        sample: Draws such arguments by a seed.
    """

    model: nn.Module
    updates: Updates
    example: Named
    call: Callable[[Named], object]
    sample: Callable[[int], Named]

    @classmethod
    def of(cls, module: AdaptedModule) -> Trained:
        """The module of insert, which knows what its capture was given."""
        execution = execution_of(module)
        example = execution.captured.named

        def sample(seed: int) -> Named:
            return execution.sample(seed=seed)

        return cls(module, module.updates, example, execution.run, sample)

    def runs_at(self) -> Named:
        """Named arguments for the proof: the sample, or the example where the model refuses that.

        Random numbers come first because examples are often zeros, through which no gradient flows.
        """
        named = self.sample(0)
        try:
            with torch.no_grad(), as_it_was(self.model):
                self.call(copied(named))
        except LoraFxError as e:  # some other: no eval program, in a file
            return self.example if isinstance(e, SizeError) else named
        except Exception:  # of the user's code, at sizes of ours
            return self.example
        return named


def prove_gradients(trained: Trained, named: Named) -> Effect:
    """One backward per mode at random a and b; the model is left as it was."""
    found: dict[str, list[str]] = {}
    modes: list[str] = []
    notes: list[str] = []
    failures: list[str] = []
    with probe(trained) as telling:
        for training in (False, True):
            mode = "train" if training else "eval"
            before = {n: b._version for n, b in _buffers(trained.model)}
            try:
                size = _gradients(trained, named, telling, training)
            except Exception as e:  # of the user's code, too
                failures.append(f"in {mode} mode: {one_line(e, 160)}")
                if len(failures) == 2 and not isinstance(e, LoraFxError):
                    raise LoraFxError(
                        f"no backward pass of the model runs: {'; '.join(failures)}",
                        "does the original train with these inputs? A train mode may ask for "
                        "targets; --dead allow leaves this proof out",
                    ) from e
                notes.append(f"{mode} mode is not proven: {one_line(e, 160)}")
                continue
            if size is None:
                notes.append(
                    f"{mode} mode is not proven: no output is a real number, or a complex one, "
                    "or all of these are empty"
                )
                continue
            modes.append(mode)
            moved = [n for n, b in _buffers(trained.model) if before.get(n) != b._version]
            if training and moved:
                notes.append(f"training moves {some(moved)}, which no adapter's file holds")
            middle = float(np.median([v for v in size.values() if np.isfinite(v)] or [0.0]))
            for key, v in size.items():
                if v <= DEAD * middle and trained.updates[key].scale:  # a weight of 0 is no fault
                    found.setdefault(key, []).append(mode)
    return Effect({k: tuple(m) for k, m in found.items()}, tuple(modes), tuple(notes))


def _buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those that count how often they were written to."""
    return [(n, b) for n, b in model.named_buffers() if not b.is_inference()]


@contextlib.contextmanager
def probe(trained: Trained, size: float = SIZE) -> Iterator[Telling]:
    """Random updates of a size in a model, mode and buffers put back afterwards."""
    held = held_tensors(trained.model, trained.updates)
    telling = {
        key: held[key][variant_of(update).proportional] for key, update in trained.updates.items()
    }
    kept = [(p, p.detach().clone()) for h in held.values() for p in h.values()]
    try:
        with torch.no_grad():
            for key, u in trained.updates.items():
                variant = variant_of(u)
                for field, drawn in variant.drawn(u, key, seed=1).items():
                    factor = 1.0
                    if field == variant.proportional:
                        factor = size / abs(u.scale or 1.0)
                    held[key][field].copy_(torch.from_numpy(drawn * np.float32(factor)))
                if u.frozen:  # a large part of W; the probe is small and random
                    held[key]["b0"].mul_(size)
        with as_it_was(trained.model, None):
            yield telling
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
                p.grad = None


def _gradients(
    trained: Trained, named: Named, telling: Telling, training: bool
) -> dict[str, float] | None:
    """Key → root mean square of a gradient; None where no output has a number with one.

    A detector that finds nothing has outputs without elements, which tell nothing.
    """
    trained.model.train(training)
    own = trained.example
    best = dict.fromkeys(telling, 0.0)
    proven = False
    with torch.random.fork_rng(devices=[]):
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            given = trained.sample(seed) if seed and named is not own else named
            if seed == DRAWS - 1 and is_real(own):  # where no draw is what the model is for
                given = own
            with torch.enable_grad():
                made = tree_leaves(trained.call(copied(given)))
                results = [y for y in made if isinstance(y, torch.Tensor)]
                floats = [y for y in results if y.is_floating_point() or y.is_complex()]
                outputs = [y for y in floats if y.requires_grad]
                if not outputs:
                    return best if floats else None
                outputs = [y for y in outputs if y.numel()]
                if not outputs:
                    continue
                proven = True
                tangents = [torch.randn_like(y) for y in outputs]
                tensors = list(telling.values())
                grads = torch.autograd.grad(outputs, tensors, tangents, allow_unused=True)
            for key, g in zip(telling, grads, strict=True):
                size = 0.0 if g is None else float(g.abs().double().square().mean().sqrt())
                best[key] = max(best[key], size)
            if min(best.values()) > DEAD * float(np.median(list(best.values()))):
                break
    return best if proven else None


# effect: the proof that insert ends with, so that no adapter trains nothing or merges wrongly.
#
# gradient   ‖∂⟨c, y⟩/∂b‖ at random a, b and cotangent c, in eval and in train mode, per target
# form       y(branches) = y(W + s·b·a) at the same a and b: every site's output form against
# its weight form, in one eval forward


@stage("proving that every target takes effect")
def prove_effect(module: AdaptedModule, dead: str = "error") -> Sequence[str]:
    """Prove every target; the module's tensors are as before afterwards.

    Args:
        module: Fresh from insert; the finding becomes the effect of its insertion.
        dead: drop: return the dead keys instead of raising, unless all are; keep: neither.

    Raises:
        NoEffectError: A dead target, or branches that are not W + s·b·a.
    """
    if any(p.device.type == "meta" for p in module.parameters()):
        insertion_of(module).effect = Effect({}, (), ("not proven: the model has no weights",))
        return ()
    trained = Trained.of(module)
    named = trained.runs_at()
    effect = prove_gradients(trained, named)
    insertion_of(module).effect = effect
    if idle := without_gradient(effect, len(module.updates), dead):
        return idle
    try:
        execution = execution_of(module)
        execution.captured.allows(False, execution.norm_stats)
    except LoraFxError:
        return ()  # a file with a train program only; the note on eval mode says so
    _same_as_weight_form(module, named)
    _same_gradients(module, named)
    return ()


def without_gradient(found: Effect, count: int, dead: str) -> tuple[str, ...]:
    """The targets to leave out; see prove_effect.

    Args:
        found: What a proof of `count` targets found.
        count: How many there are.
        dead: What becomes of those that no gradient reaches.

    Raises:
        DeadTargetError: One that must not be left out.
    """
    if dead == "drop" and 0 < len(found.dead) < count:
        return tuple(found.dead)
    if found.dead and dead != "keep":
        keys = [f"{k} ({'/'.join(modes)})" for k, modes in found.dead.items()]
        raise DeadTargetError(
            f"no gradient reaches {some(keys, 5)}: an adapter there would train nothing",
            "--exclude leaves it out; --dead drop leaves all such out; --dead allow keeps it",
        )
    return ()


def _same_gradients(module: AdaptedModule, named: Named) -> None:
    """Where a forward has autograd functions or hooks, its weights' gradients are the graph's.

    A capture drops them: a memory saver's gradient is the same, a reversal's is not.
    """
    execution = execution_of(module)
    captured = execution.captured
    own = captured.traced(False, captured.named, execution.base_dtype).own_gradients
    if not own or captured.live:
        return
    names = list(dict.fromkeys(base_name(k) for k in module.updates))[:8]
    both = (plain(captured), captured.model)
    ours, theirs = (_gradients_of(captured, m, names, named) for m in both)
    near = [
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        for a, b in zip(ours, theirs, strict=False)
    ]
    if len(ours) != len(theirs) or not all(near):
        raise LoraFxError(
            f"{some(own)} has a gradient of its own, which a graph drops: training would differ",
            "lora_fx.attach trains the live model; --dead allow inserts all the same",
        )


def _gradients_of(
    captured: Captured, model: nn.Module, names: Sequence[str], named: Named
) -> list[torch.Tensor]:
    """∂(a sum of the outputs)/∂W in eval mode, by a model's own call; zeros where there is none."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    given = {n: weights[n].detach().clone().requires_grad_() for n in names if n in weights}

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, given, args, kwargs)

    with as_it_was(model), torch.enable_grad():
        out = tree_leaves(captured.signature.call(call, copied(named)))
        outputs = [y for y in out if isinstance(y, torch.Tensor) and y.requires_grad]
        parts = [(y * torch.linspace(-1, 2, y.numel()).view(y.shape).to(y)).sum() for y in outputs]
        if not parts:
            return []
        grads = torch.autograd.grad(parts, list(given.values()), allow_unused=True)
    pairs = zip(grads, given.values(), strict=True)
    return [torch.zeros_like(w) if g is None else g for g, w in pairs]


def weight_form(now: Updates, training: bool) -> Rewriter:
    """The pass that puts W + s·b·a at every site: the reference of output forms."""
    return Insert(now, missing="skip", weight_form=True)


def _same_as_weight_form(module: AdaptedModule, named: Named) -> None:
    plain = torch_run(module)
    in_weight_form = insertion_of(module).inserting(weight_form)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with in_weight_form():
            return plain(feeds)

    with probe(Trained.of(module)):
        module.eval()
        rerun = replace(torch_rerun(module), block=in_weight_form)
        arrays = arrays_of(named)
        parity = prove(run, module, arrays=arrays, tol=FOLD_TOL, of="weight form", rerun=rerun)
    for p in parity:
        if not p.ok:
            raise NoEffectError(
                f"the branches differ from W + s·b·a: output {p.output!r}: rel {p.rel:.2e}, "
                f"the gate is {p.tol:.1e}",
                "--dead allow inserts without the proof; please report this model",
            )


# A live model with an adapter gives the numbers it should, before it is handed over.
#
# The reference is the eval graph with W + s·b·a at every site; for a model without one, the
# unadapted model run with W + s·b·a in its parameters. Both run with random a and b, so that there
# is an effect to compare. Gradients are those of the live model itself, in both modes.


TOLERANCE = {"float32": 1e-5, **{name: 8 * eps for name, eps in EPSILON.items()}}
"""The first gates of the explicit reference."""


class InGraph:
    """What the live model has to equal: the eval graph of its capture, in the weight form."""

    def __init__(self, state: Attachment, cap: Captured, adapter: Adapter) -> None:
        self.state = state
        self.cap = cap
        self.module = AdaptedModule(cap, state.found, adapter, weight_form)
        self.module._programs.blocks = False
        self.module._programs.few = True

    def put(self, updates: Updates) -> None:
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
                own = compare(base, execution_of(module).flat(self.cap.named), {}, tol).rel
            tol = max(tol, min(STEPS, 4 * own))
        idle = all(np.array_equal(base[n], adapted[n]) for n in base)
        rerun = LiveRerun(self._live)
        if idle and (sampled := prove(self._live, module, sizes=SIZES[:1], tol=tol, rerun=rerun)):
            return sampled[0]

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            """The live model, which does not run on the same inputs again."""
            known = feeds.keys() == given.keys()
            known = known and all(np.array_equal(feeds[n], given[n]) for n in given)
            return adapted if known else self._live(feeds)

        return prove(run, module, arrays=given, tol=tol, rerun=rerun)[0]

    def changes_live(self) -> bool:
        """Whether the adapter changes an output of the live model on the example inputs."""
        return _changes(self.state, partial(self._live, arrays_of(self.cap.named)))

    def _live(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with eval_mode(self.state.model):
            named = named_of(self.cap.named, feeds)
            return by_output(self.cap.signature.call(self.state.model, named))


class Explicit:
    """Without a graph: the same live model, its adapter off, with W + s·b·a in its parameters."""

    def __init__(self, state: Attachment, signature: Signature, named: Named) -> None:
        self.state, self.signature, self.named = state, signature, named

    def put(self, updates: Updates) -> None:
        """The live model has them already."""

    def check(self) -> Parity:
        """Compare on the example inputs."""
        weights = dict(self.state.model.named_parameters())
        changed: dict[str, torch.Tensor] = {}
        for key, change in self.state.adapter().deltas().items():
            name = base_name(key)
            w = changed.setdefault(name, weights[name].detach().clone())
            _, region = split_key(key, tuple(w.shape))
            w[tuple(slice(lo, hi) for lo, hi in region)] += torch.from_numpy(change).to(w)
        feeds = arrays_of(self.named)
        unadapted = partial(self._unadapted, weights, feeds)

        def moved(seed: int) -> dict[str, Array]:
            """With every weight moved by half a unit of its last place."""
            generator = torch.Generator().manual_seed(seed)
            return unadapted({n: nearby(changed.get(n, w), generator) for n, w in weights.items()})

        def own() -> Iterator[Mapping[str, float]]:
            worst: dict[str, float] = {}
            for seed in SEEDS:
                yield grow(worst, moved(seed), expected)

        expected = unadapted(changed)
        found, _ = compared(
            self._live, LiveRerun(self._live), feeds, expected, _live_gates(expected), own,
            lambda: live_choices(lambda: unadapted(changed), [partial(moved, s) for s in SEEDS]),
            of="the live model",
        )  # fmt: skip
        return found

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
    """Whether an attached model gives other outputs than without its adapter."""
    adapted = live()
    with state.base():
        base = live()
    return any(not np.array_equal(base[n], adapted[n]) for n in base)


def _live_gates(expected: Named) -> dict[str, Gate]:
    """The gates of the explicit reference, which rounds W + s·b·a in another order."""
    gates = {}
    for name, value in expected.items():
        first = TOLERANCE.get(value.dtype.name, 1e-9)
        most = 4 * first if value.dtype.name in EPSILON else CEILING
        gates[name] = Gate(first, most)
    return gates


@contextlib.contextmanager
def parameters_as(
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
    """An update of the same shapes with random numbers."""
    values = {s.field: s.value for s in slots_of(key, update)}
    return with_values(update, {**values, **variant_of(update).drawn(update, key, seed=0)})


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
def prove_live(state: Attachment, reference: InGraph | Explicit, probe: Updates) -> None:
    """Raise unless the attached model gives the reference's numbers with `probe` installed.

    Modules whose branch does not run, because some fused path reads their weight, change to the
    weight form first.

    Raises:
        LoraFxError: It differs; the message names the targets that differ when alone.
    """

    def found_with(updates: Updates) -> Parity:
        state.fill(updates)
        reference.put(updates)
        return reference.check()

    def alone(key: str) -> Parity:
        """The comparison with every other update at zero."""
        rest = {k: resized(u, 0.0) for k, u in probe.items() if k != key}
        return found_with({**probe, **rest})

    failed = "the attached model does not run on the example inputs"
    with retold(failed, "use lora_fx.insert", most=200):
        with state.watch() as ran:
            found = reference.check()
        unseen = {path for path, form in state.forms.items() if form.output} - ran
        if unseen:
            state.by_weight = frozenset(unseen)
            state.install(probe)
            found = reference.check()
        if found.ok:
            return
        # random updates may take a deep model past the largest number, or so far that rounding
        # alone would be more than any gate: smaller ones say then what these cannot
        for _ in range(HALVINGS):
            if math.isfinite(found.rel) and found.tol != CEILING:
                break
            probe = {k: resized(u, 0.5) for k, u in probe.items()}
            found = found_with(probe)
            if found.ok and found.tol != CEILING:
                return
        guilty = [k for k in probe if not alone(k).ok]
        why = "each update is right alone, and all of them together are not"
        if guilty:
            alone(guilty[0])
            why = READ_TWICE if reference.changes_live() else READ_PAST
    size = f"{found.rel:.1e}" if math.isfinite(found.rel) else "more than numbers can say"
    raise LoraFxError(
        f"{some(guilty, 3) or 'the adapter'}: the attached model's {found.output!r} differs "
        f"from the reference by {size}: {why}",
        "exclude it, or use lora_fx.insert" if guilty else "use lora_fx.insert",
    )


READ_PAST = (
    "the live model does not change with it, so something reads the weight past its module's "
    "attribute"
)
READ_TWICE = (
    "the live model changes with it in another way, so something reads the weight for more than "
    "the matmuls that were found, or its numbers decide what the model does"
)
