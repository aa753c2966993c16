"""The rows of a fused weight that belong to q, k and v, or to gate and up.

================================  ==================================================
all others                        q, then k, then v; gate, then up
query_key_value of these models   a group of heads after the other: its q, its k, its v
CodeGen's qkv_proj                the same in four parts, q, v, k
================================  ==================================================

Facts of transformers 5.24; the tests compare them with its models.
"""

from __future__ import annotations

from collections.abc import Collection

from lora_fx.adapter.fused import QKV
from lora_fx.files.checkpoint import text_config
from lora_fx.text import JsonView, is_whole

_GROUPED = {"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "gpt_bigcode"}


def part_rows(name: str, out: int, in_: int, config: JsonView) -> dict[str, str]:
    """Role → its rows, `LOW:HIGH`, or `LOW:HIGH:PERIOD` for such rows of every so many.

    Args:
        name: Of a fused weight [out, in], of q, k and v or of gate and up.
        out: Its rows.
        in_: Its columns.
        config: config.json.

    Returns:
        Nothing where the order of the rows, or how many they are, is not known.
    """
    config = {**config, **text_config(config)}
    types = {config.get("model_type"), text_config(config).get("model_type")}
    if "minimax" in types or ("phi4_multimodal" in types and "audio" in name):
        return {}  # MiniMax has two kinds of attention, and Phi-4's audio has up first
    if ".conv.in_proj" in f".{name}":
        return {}  # LFM2's gates
    if "gate_up" in name:
        if out % 2:
            return {}
        half = out // 2
        return {"gate": f"0:{half}", "up": f"{half}:{out}"}
    if "codegen" in types:
        size = out // 12
        spans = {}
        for i, role in enumerate("qvk"):
            spans[role] = f"{i * size}:{(i + 1) * size}:{3 * size}"
        return spans

    heads, groups = _heads(config, types)
    head_size = _count(config, ("head_dim",), in_ // heads)
    fits = (heads + 2 * groups) * head_size == out and heads % groups == 0
    is_grouped = bool(types & _GROUPED)
    if QKV in name or (is_grouped and groups == heads):
        if not fits or not is_grouped:
            return {}
        return _rows_by_group(heads // groups * head_size, head_size, period=out // groups)

    sizes: set[tuple[int, int]] = set()
    if fits:
        sizes.add((heads * head_size, groups * head_size))
    if out == 3 * in_:
        sizes.add((in_, in_))
    if len(sizes) != 1:
        return {}
    q, k = sizes.pop()
    return {"q": f"0:{q}", "k": f"{q}:{q + k}", "v": f"{q + k}:{out}"}


def _count(config: JsonView, names: tuple[str, ...], default: int) -> int:
    """The first of a config's fields that is a number of something."""
    for name in names:
        value = config.get(name)
        if is_whole(value) and value > 0:
            return int(value)
    return default


def _heads(config: JsonView, types: Collection[object]) -> tuple[int, int]:
    """(heads of queries, heads of keys and values) of a model, from its config."""
    heads = _count(config, ("num_attention_heads", "n_head", "n_heads"), 1)
    has_one_or_all = "falcon" in types or "gpt_bigcode" in types
    if has_one_or_all and not config.get("new_decoder_architecture"):
        if config.get("multi_query", True):
            return heads, 1
        return heads, heads
    return heads, _count(config, ("num_key_value_heads", "num_kv_heads"), heads)


def _rows_by_group(q: int, head_size: int, period: int) -> dict[str, str]:
    """Rows ordered by groups of heads: for each group its queries, its key and its value.

    Args:
        q: Rows of a group's queries.
        head_size: Rows of its key, and of its value.
        period: Rows of a group.
    """
    k_end = q + head_size
    return {"q": f"0:{q}:{period}", "k": f"{q}:{k_end}:{period}", "v": f"{k_end}:{period}:{period}"}
