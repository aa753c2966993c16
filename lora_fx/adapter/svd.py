"""Best low-rank approximations (Eckart and Young 1936) of products b @ a and of given matrices.

A product b @ a of rank k needs no SVD of the whole: b = Q₁R₁, aᵀ = Q₂R₂, and R₁R₂ᵀ is k × k.

A matrix Δ is reduced to QᵀΔ with an orthonormal Q of l columns: its SVD gives the factors. Where
the short side is small, Q are leading eigenvectors of ΔΔᵀ in fp64, which is exact; else Q spans
(ΔΔᵀ)²ΔΩ of a random Ω, re-orthogonalised after every product (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1). Whatever Q is, ‖Δ − Q(QᵀΔ)ᵣ‖² = ‖Δ‖² − Σᵢ≤ᵣ σᵢ(QᵀΔ)².
"""

from __future__ import annotations

import numpy as np

from lora_fx.adapter.lowrank import Factors
from lora_fx.dtypes import Array, factor_dtype, widened

TRACY_WIDOM = 2.02
"""The 99 % point of the Tracy-Widom distribution of order 1."""


Triplets = tuple[Array, Array, Array]
"""u [*batch, out, k], s [*batch, k] in descending order, vt [*batch, k, in]."""


EXACT_SIDE = 512
"""Matrices whose short side is at most this are not sampled."""


OVERSAMPLING = 2
"""Columns that are sampled beyond the rank, as a multiple of it."""


ITERATIONS = 2
"""Power iterations; without any, the error is a third above the optimum on noisy spectra."""


BLOCK = 1 << 18
"""Elements of a block that is widened to fp64 at a time."""


def product_svd(a: Array, b: Array) -> Triplets:
    """The SVD of b @ a in fp64; a [*batch, r, in], b [*batch, out, r]."""
    b_q, b_r = np.linalg.qr(widened(b))
    a_q, a_r = np.linalg.qr(np.swapaxes(widened(a), -1, -2))
    u, s, vt = np.linalg.svd(b_r @ np.swapaxes(a_r, -1, -2), full_matrices=False)
    return b_q @ u, s, vt @ np.swapaxes(a_q, -1, -2)


def product_values(a: Array, b: Array) -> Array:
    """The singular values of b @ a alone, [*batch, k] in descending order, in fp64."""
    return np.asarray(np.linalg.svd(_small_product(widened(a), widened(b)), compute_uv=False))


def _small_product(a: Array, b: Array) -> Array:
    """A matrix [*batch, r, r] with the singular values of b @ a."""
    b_r = np.linalg.qr(b, mode="r")
    a_r = np.linalg.qr(np.swapaxes(a, -1, -2), mode="r")
    return np.asarray(b_r @ np.swapaxes(a_r, -1, -2))


def balanced(u: Array, s: Array, vt: Array, rank: int) -> Factors:
    """√S·Vᵀ as a and U·√S as b, of the first `rank` triplets, in fp32 or complex64."""
    root = np.sqrt(s[..., :rank])
    a = root[..., :, None] * vt[..., :rank, :]
    b = u[..., :rank] * root[..., None, :]
    kind = factor_dtype(a.dtype.name)
    return a.astype(kind), b.astype(kind)


def truncated(a: Array, b: Array, rank: int) -> Factors:
    """The best a, b of at most `rank` for b @ a."""
    u, s, vt = product_svd(a, b)
    return balanced(u, s, vt, min(rank, s.shape[-1]))


def distance(a1: Array, b1: Array, a2: Array, b2: Array) -> float:
    """‖b1 @ a1 − b2 @ a2‖_F over all batches, without forming a product, in fp64."""
    b = np.concatenate([widened(b1), -widened(b2)], axis=-1)
    a = np.concatenate([widened(a1), widened(a2)], axis=-2)
    return float(np.linalg.norm(_small_product(a, b)))


def leading(delta: Array, k: int, rng: np.random.Generator) -> Triplets:
    """The first min(k, out, in) triplets of one matrix [out, in], in fp64.

    Args:
        delta: fp32 or fp64; products are in its dtype.
        k: How many triplets.
        rng: Draws the random subspace; not used where the result is exact.
    """
    # The Gram matrix is that of the shorter side.
    if delta.shape[0] > delta.shape[1]:
        v, s, ut = leading(delta.T, k, rng)
        return ut.T, s, v.T

    side = delta.shape[0]
    k = min(k, side)
    if side <= max(EXACT_SIDE, 2 * OVERSAMPLING * k):
        q = _eigenvectors(delta, k)
        blocks = [delta[:, columns] for columns in _blocks(delta.shape[1], side)]
        small = np.concatenate([q.T @ block.astype(np.float64) for block in blocks], axis=1)
    else:
        q = _sampled(delta, (1 + OVERSAMPLING) * k, rng)
        small = (q.T.astype(delta.dtype) @ delta).astype(np.float64)
    u, s, vt = np.linalg.svd(small, full_matrices=False)
    return (q @ u)[:, :k], s[:k], vt[:k]


def squared_distance(delta: Array, a: Array, b: Array) -> float:
    """‖delta − b @ a‖² element by element in fp64, by blocks of rows."""
    squares = 0.0
    wide_a = a.astype(np.float64)
    for rows in _blocks(*delta.shape):
        gap = delta[rows] - b[rows].astype(np.float64) @ wide_a
        squares += float(np.vdot(gap, gap))
    return squares


def above_noise(s: Array, total: float, shape: tuple[int, int]) -> int:
    """The number of singular values that are larger than those of white noise.

    The largest one of noise of variance τ² on m × n is near τ(√m + √n), the edge of Marchenko and
    Pastur (1967), with the distribution of Tracy and Widom (Johnstone 2001,
    doi:10.1214/aos/1009210544), of which the 99 % point is taken. τ² is the energy per element
    that the values above leave, so the count is a fixed point.

    Args:
        s: The leading singular values, descending.
        total: ‖Δ‖² of the whole matrix.
        shape: (m, n).
    """
    above = 0
    while above < len(s):
        noise_energy = max(0.0, total - float(np.sum(s[:above] ** 2)))
        edge = _noise_edge(noise_energy, shape[0] - above, shape[1] - above)
        count = int(np.count_nonzero(s**2 > edge))
        if count <= above:
            break
        above = count
    return above


def _noise_edge(energy: float, m: int, n: int) -> float:
    """The σ² that the largest of white noise of this energy on m × n exceeds 1 time in 100."""
    root_m = np.sqrt(m)
    root_n = np.sqrt(max(n - 1, 1))
    spread = (root_m + root_n) * (1 / root_m + 1 / root_n) ** (1 / 3)
    return float(energy / (m * n) * ((root_m + root_n) ** 2 + TRACY_WIDOM * spread))


def _blocks(count: int, width: int) -> list[slice]:
    """Slices of `count` rows, or columns, of `width` elements: BLOCK elements at a time."""
    step = max(1, BLOCK // width)
    return [slice(i, i + step) for i in range(0, count, step)]


def _eigenvectors(delta: Array, k: int) -> Array:
    """The k leading left singular vectors of [m, n], m ≤ n, from ΔΔᵀ in fp64."""
    m, n = delta.shape
    gram = np.zeros((m, m))
    for columns in _blocks(n, m):
        block = delta[:, columns].astype(np.float64)
        gram += block @ block.T
    _, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors[:, ::-1][:, :k])


def _sampled(delta: Array, count: int, rng: np.random.Generator) -> Array:
    """An orthonormal [m, count] that nearly holds the leading left singular vectors."""
    # Orthogonal again after every product, or small σ drown in the rounding of large ones.
    random = rng.standard_normal((delta.shape[1], count), dtype=np.float32).astype(delta.dtype)
    q = _orthonormal(delta @ random)
    for _ in range(ITERATIONS):
        q = _orthonormal(delta.T @ q.astype(delta.dtype))
        q = _orthonormal(delta @ q.astype(delta.dtype))
    return np.asarray(q, np.float64)


def _orthonormal(matrix: Array) -> Array:
    """An orthonormal basis of the columns."""
    q, _ = np.linalg.qr(matrix)
    return np.asarray(q)
