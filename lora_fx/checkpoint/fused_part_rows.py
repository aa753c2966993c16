"""Which rows of a fused weight are whose, where the names of its parts do not say.

================================  ==================================================
all others                        q, then k, then v; gate, then up
query_key_value of these models   a group of heads after the other: its q, its k, its v
CodeGen's qkv_proj                the same in four parts, q, v, k
================================  ==================================================

Facts of transformers 5.24; the tests compare them with its models.
"""

from __future__ import annotations

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
    kinds = {config.get("model_type"), text_config(config).get("model_type")}
    if "minimax" in kinds or ("phi4_multimodal" in kinds and "audio" in name):
        return {}  # MiniMax has two kinds of attention, and Phi-4's audio has up first
    if ".conv.in_proj" in f".{name}":
        return {}  # LFM2's gates
    if "gate_up" in name:
        return {} if out % 2 else {"gate": f"0:{out // 2}", "up": f"{out // 2}:{out}"}
    if "codegen" in kinds:
        n = out // 12
        return {r: f"{i * n}:{i * n + n}:{3 * n}" for i, r in enumerate("qvk")}
    count = {n: v for n, v in config.items() if is_whole(v) and v > 0}
    heads = next((count[n] for n in ("num_attention_heads", "n_head", "n_heads") if n in count), 1)
    groups = next((count[n] for n in ("num_key_value_heads", "num_kv_heads") if n in count), heads)
    if kinds & {"falcon", "gpt_bigcode"} and not config.get("new_decoder_architecture"):
        groups = 1 if config.get("multi_query", True) else heads
    head = count.get("head_dim", in_ // heads)
    fits = (heads + 2 * groups) * head == out and heads % groups == 0
    if QKV in name or (kinds & _GROUPED and groups == heads):
        q, period = heads // groups * head, out // groups
        ends = {"q": (0, q), "k": (q, q + head), "v": (q + head, period)}
        known = fits and kinds & _GROUPED
        return {r: f"{i}:{j}:{period}" for r, (i, j) in ends.items()} if known else {}
    sizes = {(heads * head, groups * head)} if fits else set()
    sizes |= {(in_, in_)} if out == 3 * in_ else set()
    if len(sizes) != 1:
        return {}
    q, k = sizes.pop()
    return {"q": f"0:{q}", "k": f"{q}:{q + k}", "v": f"{q + k}:{out}"}
