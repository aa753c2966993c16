"""Configurations and models made small, by the names and types of their fields alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

LEVELS = 4
"""Every rule; all but those of widths; depth and vocabulary; nothing."""
VOCAB = 128
SIDE = 64
LENGTH = 64

_DEPTH = re.compile(
    r"^(num|n)_(.*_)?(layers|layer|blocks)$|^n_layers?$|_layers$|^layers$|depths?$|^num_blocks$"
)
_HEADS = re.compile(r"heads$|n_head$|heads_")
_HEAD_DIM = re.compile(r"head_dim|head_size|^d_kv$|kv_channels|head_hidden_size")
_RANK = re.compile(r"lora_rank$|^dt_rank$|time_step_rank")
_FFN = re.compile(r"intermediate|ffn|inner|mlp_dim|feedforward|feed_forward|d_ff|mlp_hidden")
_WIDTH = re.compile(
    r"hidden_size|d_model$|n_embd|embed(ding)?_dim|hidden_dim|^dim$|proj(ection)?_dim|_width$|^width$"
    r"|embedding_size|embd_pdim|embed_size|output_dim$|input_dim$"
)
_EXPERTS = re.compile(r"experts$|num_experts")
_CHOSEN = re.compile(r"per_tok|top_?k$|moe_k$")
_GROUPS = re.compile(r"^(n_group|topk_group)$")
_VOCAB = re.compile(r"vocab_size|^n_vocab$|^vocab$")
_TOKEN = re.compile(r"(token|pad|bos|eos|sep|cls|mask|unk|start)_(id|ids|index)$")
_PLACES = re.compile(
    r"max_.*positions?(_embeddings)?$|n_positions|^n_ctx$|max_seq|max_length|seq_len$"
)
_IMAGE = re.compile(r"^(image|img|input|crop)_size$|resolution$")
_FRAMES = re.compile(r"^num_frames$")
_QUERIES = re.compile(r"num_(object_)?queries$|num_query")


def overrides(config: Any, level: int) -> dict[str, Any]:
    """{field: smaller value} of a transformers config, those of its parts included."""
    from transformers import PretrainedConfig

    found: dict[str, Any] = {}
    tokens: list[int] = []
    deep = {k: v for k, v in vars(config).items() if _is_count(v) and _DEPTH.search(k)}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "id2label", "label2id"):
            continue
        if isinstance(value, PretrainedConfig):
            found[name] = {**overrides(value, level), "model_type": value.model_type}
        elif isinstance(value, list) and len(value) > 2 and len(value) in deep.values():
            if name not in ("layer_types",) and not all(isinstance(v, list) for v in value):
                found[name] = value[:2]
        else:
            small = _smaller(name, value, level, tokens)
            if small is not None and small != value:
                found[name] = small
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _smaller(name: str, value: Any, level: int, tokens: list[int]) -> Any:
    if isinstance(value, (list, tuple)) and value and all(_is_count(v) for v in value):
        return _smaller_list(name, value, level)
    if not _is_count(value) or level == LEVELS - 1:
        return None
    if _DEPTH.search(name):
        return min(value, 2)
    if _VOCAB.search(name):
        return min(value, VOCAB)
    if _TOKEN.search(name) and value >= VOCAB:
        tokens.append(value)
        return VOCAB - 1 - len(tokens)
    if level == 2:
        return None
    if _EXPERTS.search(name):
        return min(value, 4)
    if _CHOSEN.search(name):
        return min(value, 2)
    if _GROUPS.search(name):
        return 1
    if _PLACES.search(name):
        return min(value, LENGTH)
    if _IMAGE.search(name):
        return min(value, SIDE)
    if _FRAMES.search(name):
        return min(value, 4)
    if _QUERIES.search(name):
        return min(value, 8)
    if level == 1:
        return None
    if _HEADS.search(name):
        kv = "kv" in name or "key_value" in name
        return min(value, 2 if kv and value < 16 else 4)
    if _HEAD_DIM.search(name):
        return min(value, 8)
    if _RANK.search(name):
        return min(value, 16)
    if _FFN.search(name):
        return min(value, 64)
    if _WIDTH.search(name):
        return min(value, 32)
    return None


def _smaller_list(name: str, value: Any, level: int) -> Any:
    if level < 3 and _DEPTH.search(name):
        return type(value)(min(v, 2) for v in value)
    if level < 2 and _IMAGE.search(name):
        return type(value)(min(v, SIDE) for v in value)
    if level == 0 and _HEADS.search(name) and value[0]:
        return type(value)(max(1, v // value[0]) for v in value)
    if level == 0 and re.search(r"hidden_sizes|embed_dims|channels|_dims$", name) and value[0] > 16:
        return type(value)(max(8, v * 16 // value[0] // 8 * 8) for v in value)
    return None


def drop_repeats(model: nn.Module) -> int:
    """Takes out of every row of blocks those that are like the one before, but for one.

    Like means: the same class, with tensors of the same names and shapes. Returns how many.
    """
    taken = 0
    for owner in list(model.modules()):
        if not isinstance(owner, (nn.Sequential, nn.ModuleList)):
            continue
        kept: dict[str, nn.Module] = {}
        run, last = 0, None
        for name, child in owner.named_children():
            mark = (type(child), [(n, t.shape) for n, t in child.state_dict().items()])
            run = run + 1 if mark == last and mark[1] else 1
            last = mark
            if run <= 2:
                kept[name] = child
        if len(kept) < len(owner):
            taken += len(owner) - len(kept)
            plain = isinstance(owner, nn.ModuleList)
            owner._modules.clear()
            names = enumerate(kept.values()) if plain else kept.items()
            owner._modules.update({str(n): m for n, m in names})
    return taken


def without_repeats(model: nn.Module) -> nn.Module:
    """A copy in which blocks repeat twice at most."""
    small = copy.deepcopy(model)
    return small if drop_repeats(small) else model


def subconfig(config: Any, *names: str) -> Any:
    """The first part of a config that it has, or the config."""
    for name in names:
        if isinstance(getattr(config, name, None), Mapping) or hasattr(config, name):
            return getattr(config, name)
    return config
