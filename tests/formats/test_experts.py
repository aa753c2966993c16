"""Experts: every layout to every other and back, and what PEFT, vLLM and SGLang read of each."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.expert_families import family_of
from lora_fx.adapter.expert_layouts import LAYOUTS, _alpha, laid
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import read_tensors
from lora_fx.formats.io import load_adapter
from lora_fx.formats.peft.decode import decode
from lora_fx.formats.peft.encode import encode
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.formats.servers import DROPS, MISREADS, READS, REFUSES, RULES, SERVERS, seen, verdicts
from tests.formats import expert_readers
from tests.formats.expert_readers import MODELS, Deltas, Model, Refused, halves

GOLDEN = Path(__file__).parent.parent / "fixtures" / "experts"
RELEASES = ("0.18.1", "0.19.0", "0.19.1", "0.21.2")
READERS = {
    "vllm": expert_readers.vllm,
    "sglang": expert_readers.sglang,
    "peft": expert_readers.peft,
}
File = tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]


def factors(rng: np.random.Generator, *sizes: int) -> tuple[Any, Any]:
    *batch, out, in_, rank = sizes
    a = rng.standard_normal((*batch, rank, in_)).astype(np.float32)
    return a, rng.standard_normal((*batch, out, rank)).astype(np.float32)


@cache
def trained(kind: str, split: bool, variant: str = "lora", alpha: float = 3.0) -> Adapter:
    """An adapter of the tiny model: stacks, or experts one by one, and an attention's output."""
    model, rng = MODELS[kind], np.random.default_rng(3)
    count, hidden, inner = model.experts, model.hidden, model.inner
    entries: dict[str, LowRank] = {}
    for layer in model.layers:
        entries[f"{layer}.self_attn.o_proj.weight"] = LowRank(
            *factors(rng, 7, hidden, 2), alpha, variant=variant
        )
        module = f"{layer}.{model.holder if split else 'mlp'}.experts"
        sides = ((inner, hidden), (inner, hidden), (hidden, inner))
        if split:
            for n in range(count):
                for leaf, (out, in_) in zip(model.names, sides, strict=True):
                    low = LowRank(*factors(rng, out, in_, 2), alpha, variant=variant)
                    entries[f"{module}.{n}.{leaf}.weight"] = low
        else:
            for leaf, out, in_ in (
                ("gate_up_proj", 2 * inner, hidden),
                ("down_proj", hidden, inner),
            ):
                pair = factors(rng, count, out, in_, 2)
                low = LowRank(*pair, alpha, None, variant, origin=Origin(op="experts"))
                entries[f"{module}.{leaf}"] = low
    return Adapter(entries)


def truth(kind: str, split: bool, variant: str = "lora") -> Deltas:
    """ΔW = s·b·a of every expert in fp64, of what `trained` drew."""
    model, low = MODELS[kind], trained(kind, split, variant).lowrank
    factor = 3.0 / (2**0.5 if variant == "rslora" else 2)
    result = Deltas()
    for layer in model.layers:
        for n in range(model.experts):
            if split:
                for role, leaf in zip(("gate", "up", "down"), model.names, strict=True):
                    one = low[f"{layer}.{model.holder}.experts.{n}.{leaf}.weight"]
                    result[layer, n, role] = factor * (one.b.astype(float) @ one.a.astype(float))
                continue
            wide, down = (low[f"{layer}.mlp.experts.{k}_proj"] for k in ("gate_up", "down"))
            fused = factor * (wide.b[n].astype(float) @ wide.a[n].astype(float))
            result[layer, n, "gate"], result[layer, n, "up"] = halves(fused, model.interleaved)
            result[layer, n, "down"] = factor * (down.b[n].astype(float) @ down.a[n].astype(float))
    return result


def written(adapter: Adapter, layout: str, kind: str = "", version: str = "") -> File:
    """The tensors and the config of a file with experts in a layout."""
    family = family_of([kind] if kind else [])
    entries = laid(adapter.entries, LAYOUTS[layout], family, version)
    facts = {"peft": {"peft_version": LAYOUTS[layout].version}}
    tensors, config, _, _ = encode(replace(adapter, entries=entries, metadata=facts))
    return {k: v.copy() for k, v in tensors.items()}, config


def read(file: File) -> Adapter:
    """A file without JSON of ours, as another program would have written it."""
    return decode(PeftFile("x", tensors=file[0], config=file[1], config_file="x.json"), {})


def same(one: File, two: File) -> bool:
    alike = one[0].keys() == two[0].keys() and one[1] == two[1]
    return alike and all(np.array_equal(v, two[0][k]) for k, v in one[0].items())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("split", "first"), [(False, "peft"), (True, "peft-0.18"), (True, "per-expert")]
)
def test_every_layout_to_every_layout_and_back(kind: str, split: bool, first: str) -> None:
    """Bit-equal tensors, and the same config, from files alone."""
    start = written(trained(kind, split), first, kind)
    assert any(".experts." in name for name in start[0])
    for second in LAYOUTS:
        middle = read(written(read(start), second, kind))
        for third in LAYOUTS:
            last = written(read(written(middle, third, kind)), first, kind)
            assert same(last, start), (second, third)


def golden(release: str, way: str) -> tuple[Model, Deltas]:
    """The golden file's model, and ΔW [out, in] by the release's own get_delta_weight."""
    turned = way == "in-out"
    kind = "aria" if turned else "mixtral"
    model = Model(kind, hidden=5, inner=4, transposed=turned, marked=turned, layers=("m",))
    wanted, _ = read_tensors(GOLDEN / f"peft-{release}-{way}" / "deltas.safetensors")
    wide, down = (wanted[f"delta.{k}_proj"] for k in ("gate_up", "down"))
    wide, down = (w.swapaxes(1, 2) if turned else w for w in (wide, down))
    parts = {"gate": wide[:, :4], "up": wide[:, 4:], "down": down}
    return model, {("m", n, role): w for role, part in parts.items() for n, w in enumerate(part)}


def close(got: Deltas, want: Deltas) -> bool:
    return got.keys() == want.keys() and all(
        np.abs(got[k] - v).max() < 1e-5 * np.abs(v).max() for k, v in want.items()
    )


def under(tensors: dict[str, Any]) -> dict[str, Any]:
    """The golden model's module `mlp` under a layer m."""
    return {k.replace(".model.mlp", ".model.m.mlp"): v for k, v in tensors.items()}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("way", ["out-in", "in-out"])
def test_what_every_release_of_peft_wrote(release: str, way: str) -> None:
    """Golden files say which axis is in; the oracle of the other tests, and ours, agree."""
    folder = GOLDEN / f"peft-{release}-{way}"
    model, want = golden(release, way)
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 3}
    assert close(expert_readers.peft(under(tensors), config, model, release), want)
    for kind in (model.kind, ""):  # shapes tell without the model's type
        adapter = load_adapter(folder)
        tensors, _ = written(adapter, "peft", kind, release)
        assert close(expert_readers.peft(under(tensors), config, model, "0.21.2"), want)
    old, said = written(adapter, "peft-0.18", model.kind, release)
    assert close(expert_readers.peft(under(old), config, model, "0.18.1"), want)
    assert said["peft_version"] == "0.18.1"


@pytest.mark.parametrize("alpha", [3.0, 8.0, 3.5])  # 3.5/√2·√2 is 3.5000000000000004 in fp64
def test_alpha_of_rslora_comes_back(alpha: float) -> None:
    start = written(trained("mixtral", True, "rslora", alpha), "per-expert", "mixtral")
    assert start[1]["lora_alpha"] == alpha and not start[1]["alpha_pattern"]
    fused = written(read(start), "peft", "mixtral")
    assert max(map(len, fused[0].values())) > 7 and fused[1]["use_rslora"]
    assert same(written(read(fused), "per-expert", "mixtral"), start)
    assert not written(read(fused), "sglang", "mixtral")[1]["alpha_pattern"], "one scale for all"


@pytest.mark.parametrize("rank", [3, 4, 8, 16])
@pytest.mark.parametrize("alpha", [1.0, 3.0, 8.0, 16.0])
def test_alpha_of_twice_the_rank_comes_back(rank: int, alpha: float) -> None:
    """√2 there and back is 2: a server's one scale for all is not missed by the last digit."""
    low = LowRank(np.ones((rank, 5), "f4"), np.ones((6, rank), "f4"), alpha, variant="rslora")
    twice = replace(low, a=np.ones((2 * rank, 5), "f4"), b=np.ones((6, 2 * rank), "f4"))
    wide = replace(twice, alpha=_alpha(low, 2 * rank))
    assert _alpha(wide, rank) == alpha


@pytest.mark.parametrize("kind", ["gpt_oss", "openai_privacy_filter"])
def test_how_gate_and_up_lie_is_as_transformers_has_it(kind: str) -> None:
    """Where up is -1 nothing comes out of (up + 1)·…: which columns of gate_up are up?"""
    from transformers import AutoConfig, AutoModel

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_local_experts": 2,
        "vocab_size": 16,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(
        kind, **sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    )
    model = AutoModel.from_config(config)
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    woven, halves = torch.full((1, 12), 0.5), torch.full((1, 12), 0.5)
    woven[:, 1::2], halves[:, 6:] = -1.0, -1.0
    family = family_of([kind])
    assert family is not None
    right, wrong = (woven, halves) if family.interleaved else (halves, woven)
    assert experts._apply_gate(right).abs().max() < 1e-6 < experts._apply_gate(wrong).abs().max()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("way", ["out-in", "in-out"])
def test_one_stack_alone_lies_as_its_release_and_its_family_say(release: str, way: str) -> None:
    model, want = golden(release, way)
    name = "base_model.model.mlp.experts.lora_"
    tensors, _ = read_tensors(GOLDEN / f"peft-{release}-{way}" / "adapter_model.safetensors")
    down = {k: v for k, v in tensors.items() if k.startswith(name)}
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "peft_version": release}
    adapter = read((down, {**fields, "target_modules": [], "target_parameters": ["down_proj"]}))
    with pytest.raises(LoraFxError, match="shapes do not show which axis of the experts is in"):
        written(adapter, "peft", "", release)
    if not model.marked:  # of a marked one all releases but 0.19.0 think alike
        with pytest.raises(LoraFxError, match="shapes do not show which axis of the experts is in"):
            written(adapter, "peft", model.kind)
    now, config = written(adapter, "peft", model.kind, release)
    got = expert_readers.peft(under(now), config, model)
    assert close(got, {k: v for k, v in want.items() if k[2] == "down"})


def outcome(server: str, file: File, kind: str, want: Deltas) -> str:
    """What the reader written from the program's source makes of a file."""
    try:
        got = READERS[server](*file, MODELS[kind])
    except Refused:
        return REFUSES
    if not got:
        return DROPS
    return READS if close(got, want) else MISREADS


def told(server: str, file: File, kind: str) -> str:
    """What the table says: the worst of its rows."""
    family = family_of([kind])
    assert family is not None
    found = seen({k: v.shape for k, v in file[0].items()}, file[1], family)
    rows = [rule.outcome for rule, _ in verdicts(server, found, family, frozenset({kind}))]
    return next((o for o in (REFUSES, DROPS, MISREADS, READS) if o in rows), "")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_says_what_the_readers_do(kind: str, split: bool, layout: str) -> None:
    variant = "rslora" if split else "lora"
    file, want = written(trained(kind, split, variant), layout, kind), truth(kind, split, variant)
    for server in READERS:
        if server == "peft" and any(f"experts.{n}" in k for k in file[0] for n in range(4)):
            continue  # its conversion is transformers' own, which test_experts_served runs
        if server == "peft" and layout == "sglang-3d":
            continue
        got, said = outcome(server, file, kind, want), told(server, file, kind)
        # A tensor that fits no buffer is an error, one that is too small a wrong number.
        assert got == said or (got, said) == (REFUSES, MISREADS), (server, got, said)
        assert got == READS or layout != server, (server, got)


def test_every_row_of_the_table_names_its_source() -> None:
    for rule in RULES:
        assert rule.server in SERVERS and rule.outcome in (READS, MISREADS, DROPS, REFUSES)
        assert rule.source.endswith(".py") and rule.said


def without(file: File, part: str) -> File:
    return {k: v for k, v in file[0].items() if part not in k}, file[1]


@pytest.mark.parametrize(
    ("server", "kind", "layout", "change", "want"),
    [
        ("vllm", "qwen3_moe", "vllm", lambda f: without(f, "experts.1.up_proj"), REFUSES),
        ("vllm", "gpt_oss", "vllm", lambda f: without(f, "experts.lora"), REFUSES),
        ("vllm", "qwen3_moe", "vllm", lambda f: (f[0], {**f[1], "use_dora": True}), REFUSES),
        ("vllm", "qwen3_moe", "vllm", lambda f: (f[0], {**f[1], "lora_bias": True}), REFUSES),
        (
            "vllm", "mixtral", "vllm",
            lambda f: ({k.replace("block_sparse_moe", "mlp"): v for k, v in f[0].items()}, f[1]),
            DROPS,
        ),
        (
            "vllm", "qwen3_moe", "vllm",
            lambda f: ({k.replace("down_proj", "w2"): v for k, v in f[0].items()}, f[1]),
            REFUSES,
        ),
        (
            "vllm", "qwen3_moe", "vllm",
            lambda f: ({**f[0], "lora_fx.x.lora_A": np.ones((2, 2))}, f[1]),
            REFUSES,
        ),
        ("sglang", "qwen3_moe", "sglang", lambda f: (f[0], {**f[1], "use_dora": True}), REFUSES),
        (
            "sglang", "qwen3_moe", "sglang",
            lambda f: (f[0], {**f[1], "alpha_pattern": {"x": 2}, "lora_alpha": 9}),
            MISREADS,
        ),
    ],
)  # fmt: skip
def test_what_else_the_table_knows(
    server: str, kind: str, layout: str, change: Any, want: str
) -> None:
    file = change(written(trained(kind, True), layout, kind))
    assert outcome(server, file, kind, truth(kind, True)) == told(server, file, kind) == want
