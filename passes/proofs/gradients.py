"""Gradients reach every target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.lowrank import Updates
from lora_fx.adapter.variant import variant_of
from lora_fx.conditions import SizeError
from lora_fx.errors import DeadTargetError, LoraFxError, one_line
from lora_fx.fx.capture.capture import as_it_was, copied
from lora_fx.fx.module.adapted import AdaptedModule, Effect, held_tensors
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.passes.proofs.proof_inputs import is_real
from lora_fx.text import some

DEAD = 1e-6
"""Share of the median gradient below which a target is dead."""


DRAWS = 4
"""What a random depth left out, or a ReLU cut off, gets so many chances to be seen."""


SIZE = 0.05
"""The size of the probe's ΔW beside a weight of unit fan-in: seen, and far from saturation."""


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
        example, run = module.captured.named, module._run_named
        return cls(module, module.updates, example, run, lambda seed: module.sample(seed=seed))

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
