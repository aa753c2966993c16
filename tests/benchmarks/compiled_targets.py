"""The cost of the targets that an adapter leaves inert, in a module compiled for a union of them.

    python -m tests.benchmarks.compiled_targets [--backend inductor eager] [--rounds 21]

Blocks of SmolLM2-135M's shape with random weights, and a head of few words. The adapter has q and v
with rank 8; the union is all seven linear layers of a block. All run in turn, A B C A B C …: the
program of q and v alone, the same once more (the control), the program of the union, and PEFT's
model of q and v and of the union, prepared for hot swaps at rank 16. CPU seconds on one thread.
The gate is the adapter's own program.
"""

from __future__ import annotations

import argparse
import datetime
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.onnx.timing import Sample, interleave, timed
from tests.benchmarks.interleave import processor
from tests.benchmarks.kept import Row, add_keep, figures, gated, report

UNION = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHOSEN = ("q_proj", "v_proj")
RANK = 8
PADDED = 16
LIMIT = 1.03


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each backend, and for inference and a training step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", nargs="*", default=["inductor", "eager"])
    parser.add_argument("--what", nargs="*", default=["forward", "step"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--no-peft", action="store_true", help="lora-fx alone")
    add_keep(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{processor()}, torch {torch.__version__}, {datetime.date.today()}")
    for backend in given.backend:
        for what in given.what:
            title = f"{what}, {backend}, {given.layers} layers, {given.rows} × {given.tokens}"
            report("compiled_targets", title, rows(backend, what, given), given.keep)


def rows(backend: str, what: str, given: argparse.Namespace) -> list[Row]:
    """The times of all programs; the baseline is the adapter's own."""
    torch._dynamo.reset()
    ids = torch.randint(0, 512, (given.rows, given.tokens))
    training = what == "step"
    own = ours(given.layers, ids, CHOSEN, backend, training)
    runs = {
        "q, v alone": own,
        "control": own,
        "union of 7": ours(given.layers, ids, UNION, backend, training),
    }
    if not given.no_peft:
        runs["PEFT, q, v alone"] = pefts(given.layers, ids, CHOSEN, backend, training)
        runs["PEFT, union of 7"] = pefts(given.layers, ids, UNION, backend, training)
    functions = {name: sampled(run) for name, run in runs.items()}
    found = interleave(functions, given.rounds, warmup=3)
    seconds = {name: [sample.cpu for sample in samples] for name, samples in found.items()}
    table = []
    for name, times in seconds.items():
        row = figures(name, times, seconds["q, v alone"])
        if name == "union of 7":
            row = gated(row, f"{LIMIT} × q, v alone", LIMIT)
        if name == "PEFT, union of 7":
            row = figures(name, times, seconds["PEFT, q, v alone"], to="PEFT, q, v alone")
        table.append(row)
    return table


def sampled(run: Callable[[], object]) -> Callable[[], Sample]:
    """A function that times a run, as the mean of a few."""
    return lambda: timed(run, 3)


def ours(
    layers: int, ids: torch.Tensor, targets: Sequence[str], backend: str, training: bool
) -> Callable[[], object]:
    """Runs of an inserted module, compiled for these targets, with the adapter of q and v."""
    module = lora_fx.insert(llama(layers), (ids,), rank=RANK, include=list(targets), dead="allow")
    module.train(training)
    module(ids)
    module.compile(backend=backend)
    module(ids)
    rng = np.random.default_rng(0)
    entries = {}
    for key, low in module.adapter().lowrank.items():
        if any(name in key for name in CHOSEN):
            b = rng.normal(size=low.b.shape).astype(np.float32) / 100
            entries[key] = replace(low, b=b)
    with torch._dynamo.config.patch(error_on_recompile=True):
        module.load_adapter(Adapter(entries))
        module(ids)
    return runner(module, ids, training)


def pefts(
    layers: int, ids: torch.Tensor, targets: Sequence[str], backend: str, training: bool
) -> Callable[[], object]:
    """Runs of PEFT's compiled model of these targets after a hot swap to the adapter of q, v."""
    import peft
    from peft.utils import hotswap

    def config(names: Sequence[str], rank: int) -> Any:
        return peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(names), init_lora_weights=False
        )

    other = peft.get_peft_model(llama(layers), config(CHOSEN, RANK))
    state = {name: value for name, value in other.state_dict().items() if "lora_" in name}
    model: Any = peft.get_peft_model(llama(layers), config(targets, PADDED))
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=PADDED)
    model.train(training)
    with torch._dynamo.config.patch(recompile_limit=64):
        model.compile(backend=backend)
        model(ids)
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", config(CHOSEN, RANK))
        with torch._dynamo.config.patch(error_on_recompile=True):
            model(ids)
    return runner(model, ids, training)


def runner(model: Any, ids: torch.Tensor, training: bool) -> Callable[[], object]:
    """A forward pass without gradients, or a forward and a backward pass."""

    def forward() -> object:
        with torch.no_grad():
            return model(ids)

    def step() -> None:
        model.zero_grad()
        model(ids).logits.square().mean().backward()

    run = step if training else forward
    run()
    return run


def llama(layers: int) -> Any:
    """Blocks of SmolLM2-135M's shape."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
