"""Gradients reach every target: those that none reaches are dead, and would train nothing.

gradient   ‖∂⟨c, y⟩/∂b‖ at random a, b and cotangent c, in eval and in train mode, per target

b stands for what a variant's ΔW is in proportion to. The cotangent is random because a plain sum is
constant after a LayerNorm: its gradient there is rounding. A target is dead when the root mean
square of its gradient is below 1e-6 of the median target's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lora_fx.adapter.lowrank import LowRank, Updates
from lora_fx.adapter.variant import variant_of
from lora_fx.conditions import SizeError
from lora_fx.errors import DeadTargetError, LoraFxError, one_line
from lora_fx.fx.capture.call import copied
from lora_fx.fx.capture.unchanged import as_it_was
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.adapted_report import Effect
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.tree_adapter import update_tensors
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Named
from lora_fx.passes.proofs.proof_inputs import is_real
from lora_fx.text import some

DEAD = 1e-6
"""Share of the median gradient below which a target is dead."""
DRAWS = 4
"""Times that a mode runs: a random depth leaves layers out, and a ReLU cuts numbers off."""
SIZE = 0.05
"""The size of the probe's ΔW for a weight of unit fan-in: visible, and far from saturation."""
Telling = Mapping[str, nn.Parameter]
"""Target → the tensor that its ΔW is proportional to, and whose gradient is checked: b of LoRA."""


@dataclass(frozen=True)
class Trained:
    """A model whose gradients are proven: the module of insert, or a live one with an adapter.

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
        """Take these from the module of insert, which has the arguments of its capture."""
        return cls(
            model=module,
            updates=module.updates,
            example=execution_of(module).captured.named,
            call=execution_of(module).run,
            sample=lambda seed: execution_of(module).sample(seed=seed),
        )

    def runs_at(self) -> Named:
        """Named arguments for the proof: the sample, or the example where the model refuses that.

        Random numbers come first because examples are often zeros, through which no gradient flows.
        """
        named = self.sample(0)
        try:
            with torch.no_grad(), as_it_was(self.model):
                self.call(copied(named))
        except SizeError:
            return self.example
        except LoraFxError:  # some other: no eval program, in a file
            return named
        except Exception:  # of the user's code, at sizes of ours
            return self.example
        return named


def prove_gradients(trained: Trained, named: Named) -> Effect:
    """One backward per mode at random a and b; the model is left as it was.

    Args:
        trained: The model and its updates.
        named: Named arguments on which the model runs.

    Raises:
        LoraFxError: A backward pass runs in neither mode.
    """
    dead_modes: dict[str, list[str]] = {}
    modes: list[str] = []
    notes: list[str] = []
    failures: list[str] = []
    with probe(trained) as telling:
        for training in (False, True):
            mode = "train" if training else "eval"
            versions = _buffer_versions(trained.model)
            try:
                sizes = _gradients(trained, named, telling, training)
            except Exception as e:  # of the user's code, too
                failures.append(f"in {mode} mode: {one_line(e, 160)}")
                if len(failures) == 2 and not isinstance(e, LoraFxError):
                    raise LoraFxError(
                        f"no backward pass of the model runs: {'; '.join(failures)}",
                        "check that the original model trains with these inputs; some models "
                        "need targets as inputs in train mode; --dead allow leaves out this proof",
                    ) from e
                notes.append(f"{mode} mode is not proven: {one_line(e, 160)}")
                continue
            if sizes is None:
                notes.append(
                    f"{mode} mode is not proven: the model has no output of real or complex "
                    "numbers that is not empty"
                )
                continue

            modes.append(mode)
            if training:
                moved = _written_buffers(trained.model, versions)
                if moved:
                    notes.append(
                        f"training changes {some(moved)}, which an adapter file does not hold"
                    )
            for key in _dead_keys(trained.updates, sizes):
                dead_modes.setdefault(key, []).append(mode)

    dead = {key: tuple(modes_of_key) for key, modes_of_key in dead_modes.items()}
    return Effect(dead, tuple(modes), tuple(notes))


def _buffer_versions(model: nn.Module) -> dict[str, int]:
    """The number of writes to each buffer, for the buffers that count it."""
    return {
        name: buffer._version for name, buffer in model.named_buffers() if not buffer.is_inference()
    }


def _written_buffers(model: nn.Module, versions: Mapping[str, int]) -> list[str]:
    """The buffers that were written to since they had these versions."""
    return [
        name for name, version in _buffer_versions(model).items() if versions.get(name) != version
    ]


def _dead_keys(updates: Updates, sizes: Mapping[str, float]) -> list[str]:
    """The keys whose gradient is negligible compared with the median."""
    finite = [size for size in sizes.values() if np.isfinite(size)]
    median = float(np.median(finite or [0.0]))
    # an update of the weight 0 has no gradient, and that is no fault
    return [key for key, size in sizes.items() if size <= DEAD * median and updates[key].scale]


@contextlib.contextmanager
def probe(trained: Trained, size: float = SIZE) -> Iterator[Telling]:
    """Random updates of a size in a model, mode and buffers put back afterwards."""
    tensors = update_tensors(trained.model, trained.updates)
    telling = {
        key: tensors[key][variant_of(update).proportional]
        for key, update in trained.updates.items()
    }
    saved: list[tuple[nn.Parameter, torch.Tensor]] = []
    for fields in tensors.values():
        saved += [(parameter, parameter.detach().clone()) for parameter in fields.values()]
    try:
        with torch.no_grad():
            for key, update in trained.updates.items():
                _draw(key, update, tensors[key], size)
        with as_it_was(trained.model, None):
            yield telling
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)
                parameter.grad = None


def _draw(key: str, update: LowRank, fields: Mapping[str, nn.Parameter], size: float) -> None:
    """Write random numbers of a size into the tensors of one update."""
    variant = variant_of(update)
    for field, drawn in variant.drawn(update, key, seed=1).items():
        factor = 1.0
        if field == variant.proportional:
            factor = size / abs(update.scale or 1.0)
        fields[field].copy_(torch.from_numpy(drawn * np.float32(factor)))
    if update.frozen:  # a large part of W; the probe is small and random
        fields["b0"].mul_(size)


def _gradients(
    trained: Trained, named: Named, telling: Telling, training: bool
) -> dict[str, float] | None:
    """Key → root mean square of a gradient; None where no output has a number with one.

    A detector that finds nothing has outputs without elements, which tell nothing.
    """
    trained.model.train(training)
    largest = dict.fromkeys(telling, 0.0)
    proven = False
    with torch.random.fork_rng(devices=[]):
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            inputs = _inputs_of(trained, named, seed)
            with torch.enable_grad():
                floats = _float_tensors(trained.call(copied(inputs)))
                outputs = [output for output in floats if output.requires_grad]
                if not outputs:
                    return largest if floats else None
                outputs = [output for output in outputs if output.numel()]
                if not outputs:
                    continue
                proven = True
                cotangents = [torch.randn_like(output) for output in outputs]
                gradients = torch.autograd.grad(
                    outputs, list(telling.values()), cotangents, allow_unused=True
                )
            for key, gradient in zip(telling, gradients, strict=True):
                if gradient is not None:
                    size = float(gradient.abs().double().square().mean().sqrt())
                    largest[key] = max(largest[key], size)
            sizes = list(largest.values())
            if min(sizes) > DEAD * float(np.median(sizes)):
                break
    return largest if proven else None


def _inputs_of(trained: Trained, named: Named, seed: int) -> Named:
    """The arguments of one draw: first those of the proof, and last the example."""
    example = trained.example
    if seed == DRAWS - 1 and is_real(example):  # where no draw is what the model is for
        return example
    if seed == 0 or named is example:
        return named
    return trained.sample(seed)


def _float_tensors(results: object) -> list[torch.Tensor]:
    """The tensors of real or complex numbers among the results of a model."""
    return [
        leaf
        for leaf in tree_leaves(results)
        if isinstance(leaf, torch.Tensor)
        if leaf.is_floating_point() or leaf.is_complex()
    ]


def without_gradient(effect: Effect, count: int, dead: str) -> tuple[str, ...]:
    """The targets to leave out; see prove_effect.

    Args:
        effect: The result of a proof of `count` targets.
        count: How many there are.
        dead: What becomes of those that no gradient reaches.

    Raises:
        DeadTargetError: One that must not be left out.
    """
    if dead == "drop" and 0 < len(effect.dead) < count:
        return tuple(effect.dead)
    if effect.dead and dead != "keep":
        keys = [f"{key} ({'/'.join(modes)})" for key, modes in effect.dead.items()]
        raise DeadTargetError(
            f"no gradient reaches {some(keys, 5)}: an adapter there would train nothing",
            "--exclude leaves out one target; --dead drop leaves out all such targets; --dead "
            "allow keeps them",
        )
    return ()
