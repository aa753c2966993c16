"""LoHa and LoKr: their tensors in files of LyCORIS (kohya's naming) and of PEFT, to changes.

LoHa  ΔW = s · (w1_a w1_b) ∘ (w2_a w2_b)             w_a [out, r], w_b [r, in·k]
      with t1, t2 [r, r, *k] (Tucker): each factor is Σᵢⱼ w_a[i, out] · t[i, j, k] · w_b[j, in],
      so w_a [r, out], w_b [r, in], and b = w_aᵀ, a = Σⱼ t[·, j, k] w_b[j, ·] is the plain form
LoKr  ΔW = s · w1 ⊗ w2                                w1 [o1, i1], w2 [o2, i2, *k]
      each may be a product: w1 = w1_a w1_b, w2 = w2_a w2_b, or Tucker with t2 as above

s is alpha / r. LyCORIS takes s = 1 where w1 and w2 are both whole, whatever alpha says; PEFT takes
alpha / r of its config there too. LyCORIS stores alpha with rsLoRA's factor worked in, so files
carry no flag for it.

Facts: LyCORIS 4.1.3, modules/loha.py and lokr.py (its get_diff_weight multiplies by s a second
time; forward, which trains, does not); PEFT 0.21.2, tuners/loha and tuners/lokr.
Products of Tucker and of LoKr's halves are computed in fp64 and rounded to fp32 once.
"""

from __future__ import annotations

import numpy as np

from lora_fx.adapter.updates import Dense, Hadamard, Kronecker
from lora_fx.dtypes import Array
from lora_fx.formats.checked_file import Arrays, File

_LOHA = "hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and both or none of hada_t1 and hada_t2"


def tucker(t: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """The plain pair (b [out, r], a [r, in·k]) of t [r, r, *k], a [r, out] and b [r, in]."""
    wide = np.einsum("ij...,jp->ip...", t.astype(np.float64), b.astype(np.float64))
    return np.ascontiguousarray(a.T), wide.reshape(len(t), -1).astype(np.float32)


def loha(tensors: Arrays, alpha: float | None, file: File, module: str) -> Hadamard:
    """The change of one module.

    Args:
        tensors: hada_w1_a … as fp32, by the ends of their names.
        alpha: None: the rank.
        file: The file, for messages and notes.
        module: Its name in the file.
    """
    ends = {end.removeprefix("hada_") for end in tensors}
    tucker_ends = ends & {"t1", "t2"}
    if ends - tucker_ends != {"w1_a", "w1_b", "w2_a", "w2_b"} or len(tucker_ends) == 1:
        raise file.error(module, f"has {', '.join(sorted(tensors))}; a LoHa needs {_LOHA}")
    b1, a1, _ = _loha_factor(tensors, "1", file, module)
    b2, a2, kernel = _loha_factor(tensors, "2", file, module)
    fits = b1.shape == b2.shape and a1.shape == a2.shape
    _check(fits, file, module, b1, a1, b2, a2)
    rank = b1.shape[1]
    return Hadamard(a1, b1, a2, b2, float(rank if alpha is None else alpha), kernel=kernel)


def _loha_factor(
    tensors: Arrays, number: str, file: File, module: str
) -> tuple[Array, Array, tuple[int, ...]]:
    """B [out, r] and a [r, in·k] of one of the two factors, and the kernel of its Tucker form."""
    b = tensors[f"hada_w{number}_a"]
    a = tensors[f"hada_w{number}_b"]
    t = tensors.get(f"hada_t{number}")
    kernel: tuple[int, ...] = ()
    if t is not None:
        _check(_fits(b, a, t), file, module, b, a, t)
        b, a = tucker(t, b, a)
        kernel = _kernel(t.shape[2:])
    a = a.reshape(len(a), -1)
    _check(b.ndim == 2 and b.shape[1] == len(a), file, module, b, a)
    return b, a, kernel


def lokr(
    tensors: Arrays, alpha: float | None, file: File, module: str, rank: float | None = None
) -> Kronecker | Dense:
    """The change of one module; `rank` is PEFT's, from its config. Otherwise as `loha`."""
    if "lokr_t1" in tensors:
        raise file.error(
            module,
            "has lokr_t1, which no reader uses; expected lokr_t2 only",
            "is the file of another method?",
        )
    w1, rank1 = _lokr_factor(tensors, "lokr_w1", file, module)
    w2, rank2 = _lokr_factor(tensors, "lokr_w2", file, module)
    if rank1 and rank2 and rank1 != rank2:
        raise file.error(
            module,
            f"has rank {rank1} in w1 and {rank2} in w2; expected one rank, which decides the scale",
        )
    stored_rank = rank1 or rank2
    if rank is not None and stored_rank and stored_rank != rank:
        raise file.error(module, f"has rank {stored_rank}; the config has {rank:g}")

    divisor = stored_rank if rank is None else rank
    # Without a rank of its own: LyCORIS takes 1, and PEFT its config's alpha / r.
    scale = 1.0
    if divisor is not None and alpha is not None:
        scale = alpha / divisor
    _check(w1.ndim == 2 and w2.ndim >= 2, file, module, w1, w2)
    if rank is not None and w2.ndim == 3:
        # PEFT takes the product with w1 as [1, o1, i1], which mixes the axes of a Conv1d.
        shape = (len(w1) * len(w2), w1.shape[1] * w2.shape[1], w2.shape[2])
        return Dense(np.kron(w1[None], w2).reshape(shape), scale)
    return Kronecker(w1, w2.reshape(len(w2), -1), scale, kernel=_kernel(w2.shape[2:]))


def encode(entry: Hadamard | Kronecker) -> tuple[dict[str, Array], float | None]:
    """Tensors of LyCORIS by the ends of their names, and alpha (None: none is needed).

    A scale other than 1 needs a rank: w1 is then stored as w1 · I, of rank i1 and alpha s·i1.
    """
    if isinstance(entry, Hadamard):
        factors = {
            "hada_w1_a": entry.b1,
            "hada_w1_b": entry.a1,
            "hada_w2_a": entry.b2,
            "hada_w2_b": entry.a2,
        }
        return factors, entry.alpha
    kernel = entry.layout.stored[2:] if entry.layout else entry.kernel  # empty for a matrix
    w2 = entry.w2
    if kernel:
        w2 = w2.reshape(len(w2), -1, *kernel)
    if entry.scale == 1.0:
        return {"lokr_w1": entry.w1, "lokr_w2": w2}, None
    rank = entry.w1.shape[1]
    identity = np.eye(rank, dtype=np.float32)
    factors = {"lokr_w1_a": entry.w1, "lokr_w1_b": identity, "lokr_w2": w2}
    return factors, entry.scale * rank


def _lokr_factor(tensors: Arrays, name: str, file: File, module: str) -> tuple[Array, int | None]:
    """w1 or w2, and its rank where it is a product."""
    stored = tensors.get(name)
    a = tensors.get(f"{name}_a")
    b = tensors.get(f"{name}_b")
    t = tensors.get("lokr_t2") if name == "lokr_w2" else None
    if stored is not None and a is None and b is None and t is None:
        return stored, None
    if stored is not None or a is None or b is None:
        have = ", ".join(sorted(tensors))
        raise file.error(module, f"has {have}; a LoKr needs {name}, or {name}_a and {name}_b")

    rank = len(b)
    if t is not None:
        _check(_fits(a, b, t), file, module, a, b, t)
        product_b, product_a = tucker(t, a, b)
        product = product_b.astype(np.float64) @ product_a.astype(np.float64)
        shape = (len(product_b), b.shape[1], *t.shape[2:])
        return product.reshape(shape).astype(np.float32), rank
    _check(a.ndim == 2 and b.ndim >= 2 and a.shape[1] == rank, file, module, a, b)
    if b.ndim == 2 and np.array_equal(b, np.eye(rank)):
        return a, rank  # as encode writes it; a product would lose the sign of zeros
    product = a.astype(np.float64) @ b.reshape(rank, -1).astype(np.float64)
    return product.reshape(len(a), *b.shape[1:]).astype(np.float32), rank


def _fits(a: Array, b: Array, t: Array) -> bool:
    """Whether a [r, out], b [r, in] and t [r, r, *k] are a product of Tucker."""
    return a.ndim == b.ndim == 2 and t.ndim > 2 and t.shape[:2] == (len(a), len(b))


def _kernel(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The kernel by a tensor's last sizes; PEFT gives the t1 of a Conv1d a fourth axis of 1."""
    return () if kernel[1:] == (1,) else kernel


def _check(fits: bool, file: File, module: str, *arrays: Array) -> None:
    """Raise for factors that do not fit each other."""
    if fits:
        return
    shapes = ", ".join(str(list(array.shape)) for array in arrays)
    raise file.error(module, f"has factors of {shapes}, which do not fit each other")
