"""merge against PEFT's own merge of a Llama in bf16: the same bits, and a folder that loads."""

from __future__ import annotations

import json
import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_fx import merge
from tests.checkpoint.made import header, read, tree

HIDDEN, MIDDLE, VOCABULARY = 256, 688, 512
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALES = {  # no power of two: then the order of the products shows
    "4/3": {"r": 3, "lora_alpha": 4},
    "3/2": {"r": 16, "lora_alpha": 24},
    "16/sqrt(12)": {"r": 12, "lora_alpha": 16, "use_rslora": True},
    "rank 64": {"r": 64, "lora_alpha": 48},
}
HIGH = {"rank 128": {"r": 128, "lora_alpha": 96}, "rank 256": {"r": 256, "lora_alpha": 200}}


def llama(path: Path) -> Any:
    from transformers import LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in three shards, bf16, with a tokenizer's file and a licence beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=2, vocab_size=VOCABULARY,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama") / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1500KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"é": 0}}}\n', encoding="utf-8")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def trained(base: Path, path: Path, *, exact: bool = False, **config: Any) -> Any:
    """An adapter saved by PEFT, and its model merged by PEFT.

    Exact factors are multiples of 1/256: the sums of their products are exact in any order.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config["r"])
    settings = LoraConfig(target_modules=list(LINEARS), task_type="CAUSAL_LM", **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(base), settings)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
            if exact and "lora_" in name:
                p.data.mul_(256).round_().div_(256)
        model.save_pretrained(path)
        return model.merge_and_unload(safe_merge=False)


def ulps(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many bf16 values lie between, element by element."""

    def order(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        bits = x.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -32768 - bits, bits)

    return np.abs(order(a) - order(b))


def sums_alike(adapter: Path) -> bool:
    """True where torch's products b @ a are numpy's bits.

    PEFT sums in torch's BLAS and merge in numpy's; on some processors the two sum in other orders.
    """
    tensors = read(adapter / "adapter_model.safetensors")
    pairs = [(tensors[n.replace("lora_A", "lora_B")], a) for n, a in tensors.items() if "_A." in n]
    return all(
        np.array_equal((torch.from_numpy(b) @ torch.from_numpy(a)).numpy(), b @ a) for b, a in pairs
    )


def bounds(adapter: Path, s: float) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """By weight: Δ in fp64, and what two fp32 sums of its products may be apart.

    Each sum of r products is off by at most r·2⁻²⁴·s·|B||A|, in whatever order it is taken.
    """
    tensors = read(adapter / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
            a, rank = a.astype(np.float64), len(a)
            key = name.removeprefix("base_model.model.").replace("lora_A.", "")
            found[key] = s * (b @ a), 2 * rank * 2.0**-24 * s * (np.abs(b) @ np.abs(a))
    return found


@pytest.mark.parametrize("scale", SCALES)
def test_bits_are_pefts(
    scale: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, where the two BLAS sum alike; elsewhere as at high ranks."""
    count, _, _ = compared(scale, SCALES[scale], base, tmp_path, capsys)
    if sums_alike(tmp_path / "adapter"):
        assert count == 0


@pytest.mark.parametrize("rank", HIGH)
def test_high_ranks_differ_by_one_ulp_or_where_the_sum_cancels(
    rank: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, cancelled, total = compared(rank, HIGH[rank], base, tmp_path, capsys)
    assert count < 1e-3 * total
    assert cancelled < 1e-4 * total


def compared(
    title: str, config: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, int, int]:
    """(elements that differ from PEFT's, those by more than 1 ulp, all).

    Where W + Δ nearly cancels, an ulp of the result is below what the order of the sum decides:
    there the two may be apart by the sum's bound, and each from the exact value by it too.
    """
    theirs = trained(base, tmp_path / "adapter", **config).state_dict()
    merge(base, tmp_path / "adapter", tmp_path / "out", threads=2)
    ours, before = read(tmp_path / "out"), read(base)
    root = config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    limits = bounds(tmp_path / "adapter", config["lora_alpha"] / root)
    assert set(ours) == set(before) == set(theirs) and len(limits) == 2 * len(LINEARS)
    count = cancelled = total = 0
    for name in ours:
        bits = theirs[name].contiguous().view(torch.int16).numpy()
        if name not in limits:
            assert ours[name].tobytes() == before[name].tobytes() == bits.tobytes()
            continue
        assert ours[name].tobytes() != before[name].tobytes()
        delta, limit = limits[name]
        gap = ulps(ours[name], bits)
        mine, other, w = (
            x.view(ours[name].dtype).astype(np.float64) for x in (ours[name], bits, before[name])
        )
        near, far = gap == 1, gap > 1
        largest = np.maximum(np.abs(mine), np.abs(other))
        assert (largest < np.abs(w))[far].all(), name
        assert (np.abs(mine - other) <= limit)[far].all(), name
        assert (np.abs(mine - (w + delta)) <= limit)[far].all(), name
        tie = np.abs((mine + other) / 2 - (w + delta))  # fp32 alone decides to which side it goes
        assert (tie <= limit + 2.0**-24 * np.abs(w))[near].all(), name
        count, cancelled, total = count + (gap > 0).sum(), cancelled + far.sum(), total + gap.size
    if count:
        with capsys.disabled():
            print(
                f"\n{title}: {count} of {total} elements differ from PEFT's: {count - cancelled} "
                f"by 1 ulp, {cancelled} within fp32's bound where W + Δ cancels"
            )
    return int(count), int(cancelled), total


def test_the_folder_loads_and_its_logits_are_pefts(base: Path, tmp_path: Path) -> None:
    theirs = trained(base, tmp_path / "adapter", exact=True, r=16, lora_alpha=24).eval()
    assert sums_alike(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    ids = torch.arange(24).reshape(2, 12) * 17 % VOCABULARY
    with torch.no_grad():
        ours = llama(tmp_path / "out").eval()(ids).logits
        before = llama(base).eval()(ids).logits
        want = theirs(ids).logits
    assert torch.equal(ours, want)
    assert not torch.equal(ours, before)


def test_the_rest_of_the_folder_is_kept(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", r=3, lora_alpha=4)
    before = tree(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert tree(base, tmp_path / "adapter") == before
    out = tmp_path / "out"
    names = {p.relative_to(base) for p in base.rglob("*")} | {Path("report.json")}
    assert {p.relative_to(out) for p in out.rglob("*")} == names | {Path("lora_fx.json")}
    for file in base.rglob("*"):
        same = out / file.relative_to(base)
        if file.suffix != ".safetensors" and file.is_file():
            assert same.read_bytes() == file.read_bytes(), file
        elif file.is_file():
            old, new = header(file), header(same)
            assert list(old) == list(new)  # order of the names, and where the bytes lie
            for name in set(old) - {"__metadata__"}:
                assert old[name] == new[name]
            assert new["__metadata__"].items() >= old["__metadata__"].items()
            [record] = json.loads(new["__metadata__"]["lora_fx.merge"])
            assert len(record["adapters"]) == 1 and record["base"]["layout"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", r=3, lora_alpha=4)
    old = os.umask(umask)
    try:
        merge(base, tmp_path / "adapter", tmp_path / "out")
    finally:
        os.umask(old)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        source = base / path.relative_to(tmp_path / "out")
        if source.is_file() and not path.name.startswith("model"):  # a copy, no wider than it
            full &= stat.S_IMODE(source.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path
