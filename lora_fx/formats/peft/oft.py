"""OFT in PEFT's files: vectors of skew-symmetric matrices, to the blocks of a rotation of W.

    X.oft_R.weight [blocks, n(n−1)/2]    Q above its diagonal, row by row; one block is shared by
                                         all with block_share
    W' = W · Rᵀ, R block-diagonal        R = (1 − Q)(1 + Q)⁻¹ (Cayley), or, with
                                         use_cayley_neumann, 1 + 2Q + 2Q² + … + Qᵏ, k = terms − 1

The series is that of (1 + Q)(1 − Q)⁻¹: the other way round, and its last power counts once. With
coft, Q is first brought within eps/√blocks of zero, as PEFT does when it merges. It has no scale.

Facts: PEFT 0.21.2, tuners/oft/layer.py. Its OFT of embeddings is not read.
"""

from __future__ import annotations

import math
import re

import numpy as np

from lora_fx.adapter.updates import Rotation
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.peft.config import VERSION
from lora_fx.formats.peft.peft_file import PeftFile
from lora_fx.text import is_number, is_whole

MOST_TERMS = 1000
"""Terms that a series may have; PEFT takes 5, and each is a product of every block."""


def check_oft(source: PeftFile) -> None:
    """Raise for an OFT config that PEFT no longer writes; note differences from training.

    Raises:
        LoraFxError: No oft_block_size, as in PEFT before 0.15, or fields that are not numbers.
    """
    config = source.config
    where = source.config_file
    terms = config.get("num_cayley_neumann_terms", 5)
    eps = config.get("eps", 6e-5)
    are_terms = is_whole(terms) and 0 <= terms <= MOST_TERMS
    if "oft_block_size" not in config or not are_terms or not is_number(eps):
        raise LoraFxError(
            f"{where}: oft_block_size is {config.get('oft_block_size')}, num_cayley_neumann_terms "
            f"and eps are {(terms, eps)}; expected the fields of PEFT 0.15 or later",
            "merge it with the PEFT release that trained it (merge_and_unload)",
        )
    version = re.match(r"0\.(\d+)", str(config.get(VERSION) or "0.0"))
    if config.get("use_cayley_neumann", True) and version and int(version[1]) < 18:
        source.notes.append(
            f"{where}: saved before PEFT 0.18, which changed the Cayley-Neumann series; read with "
            "the new series, as PEFT does"
        )


def rotation(vectors: Array, source: PeftFile, module: str) -> Rotation:
    """The change of one module, from its vectors [blocks, n(n − 1)/2]."""
    config = source.config
    is_shared = bool(config.get("block_share"))
    n = (1 + math.isqrt(1 + 8 * vectors.shape[-1])) // 2
    fits = vectors.ndim == 2 and n * (n - 1) == 2 * vectors.shape[1]
    if not fits or (is_shared and len(vectors) > 1):
        blocks = "one block, because block_share is on," if is_shared else "blocks"
        what = f"has oft_R {list(vectors.shape)}; expected {blocks} of n(n − 1)/2 numbers"
        raise source.error(module, what)

    terms = None
    if config.get("use_cayley_neumann", True):
        terms = config.get("num_cayley_neumann_terms", 5)
    eps = config.get("eps", 6e-5) if config.get("coft") else None
    return Rotation(turns(vectors, n, terms, eps), is_shared)


def turns(vectors: Array, size: int, terms: int | None, eps: float | None) -> Array:
    """R − 1 of each block, [blocks, size, size], computed in fp64 and rounded to fp32.

    Args:
        vectors: [blocks, size·(size − 1)/2].
        size: Of a block.
        terms: Of the series; None for the inverse.
        eps: How far coft lets Q be from zero; None without it.
    """
    q = np.zeros((len(vectors), size, size))
    rows, columns = np.triu_indices(size, 1)
    q[:, rows, columns] = vectors
    q -= q.swapaxes(1, 2)
    if eps is not None:
        norm = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        bound = eps / math.sqrt(len(q))
        q *= bound / np.maximum(norm, bound)
    if terms is None:
        return np.asarray(-2 * q @ np.linalg.inv(np.eye(size) + q), np.float32)
    return np.asarray(_series(q, terms), np.float32)


def _series(q: Array, terms: int) -> Array:
    """2Q + 2Q² + … + Qᵏ with k = terms − 1, the last power once, and at least Q³ from Q² on."""
    turn = 2.0 * q * (terms > 1)
    last = max(terms - 1, 3) if terms > 2 else 0  # PEFT adds Q³ of three terms too
    power = q
    for exponent in range(2, last + 1):
        power = power @ q
        factor = 2.0 if exponent < last else 1.0
        turn = turn + power * factor
    return turn
