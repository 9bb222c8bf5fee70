"""The arithmetic behind fitted routers: token counts, ridge regression, main directions, typical points. Pure numpy.

Legend: N rows (prompts), V vocabulary, C columns (tokens), I inputs, O outputs, Z features, M points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_COLUMNS = 8192
MIN_PROMPTS = 2  # that a token must occur in, to be a column
MAX_SAMPLE = 4096  # rows that typical points are sought among
ROUNDS = 12


def common_tokens(prompts: Sequence[np.ndarray], vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """`(columns [C], weights [C])`: the most widespread tokens, and how much more a rare one says."""
    spread_V = np.zeros(vocabulary, np.int64)
    for ids in prompts:
        spread_V[np.unique(ids)] += 1
    order_V = np.argsort(-spread_V, kind="stable")[:MAX_COLUMNS]
    columns_C = order_V[spread_V[order_V] >= MIN_PROMPTS]
    weights_C = np.sqrt(np.maximum(np.log((len(prompts) + 1) / (spread_V[columns_C] + 0.5)), 0.05))
    return columns_C, weights_C.astype(np.float32)


def sublinear_counts(prompts: Sequence[np.ndarray], columns_C: np.ndarray, vocabulary: int) -> np.ndarray:
    """[N, C]: log(1 + count), a prompt's vector of length 1 over all its tokens, columns or not."""
    column_V = np.full(vocabulary, -1)
    column_V[columns_C] = np.arange(len(columns_C))
    rows_NC = np.zeros((len(prompts), len(columns_C)), np.float32)
    for row, ids in enumerate(prompts):
        found, counts = np.unique(ids, return_counts=True)
        weights = np.log1p(counts)
        known = column_V[found] >= 0
        rows_NC[row, column_V[found[known]]] = weights[known] / np.sqrt(weights @ weights)
    return rows_NC


def ridge(inputs_NI: np.ndarray, outputs_NO: np.ndarray, penalty: float) -> np.ndarray:
    """[I, O]: the least-squares map with `penalty` in units of the inputs' mean squared norm."""
    num_rows, num_inputs = inputs_NI.shape
    strength = np.float32(max(penalty * float((inputs_NI**2).sum(dtype=np.float64)) / num_rows, 1e-12))
    if num_rows <= num_inputs:
        gram_NN = inputs_NI @ inputs_NI.T
        gram_NN[np.diag_indices(num_rows)] += strength
        return np.asarray(inputs_NI.T @ np.linalg.solve(gram_NN, outputs_NO))
    gram_II = inputs_NI.T @ inputs_NI
    gram_II[np.diag_indices(num_inputs)] += strength
    return np.asarray(np.linalg.solve(gram_II, inputs_NI.T @ outputs_NO))


def ridge_of_sums(gram_II: np.ndarray, cross_IO: np.ndarray, num_rows: int, penalty: float) -> np.ndarray:
    """[I, O] float32: `ridge` from `inputs.T @ inputs` and `inputs.T @ outputs`, for rows too many to keep."""
    strength = max(penalty * float(np.trace(gram_II)) / num_rows, 1e-12)
    return np.asarray(np.linalg.solve(gram_II + strength * np.eye(len(gram_II)), cross_IO), np.float32)


def main_directions(rows_NO: np.ndarray, count: int) -> np.ndarray:
    """[O, Z]: orthonormal, largest first; as many as the rows can tell apart, at most `count`."""
    values_O, vectors_OO = np.linalg.eigh(rows_NO.T @ rows_NO)
    count = max(1, min(count, int((values_O > 1e-6 * values_O[-1]).sum())))
    basis_OZ = vectors_OO[:, ::-1][:, :count]
    # A direction's sign is arbitrary; pin it, so that it does not depend on the library.
    return np.asarray(basis_OZ * np.where(basis_OZ[np.abs(basis_OZ).argmax(0), np.arange(count)] < 0, -1, 1))


def typical_points(rows_NZ: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[M, Z]: k-means of a sample of the rows."""
    random = np.random.default_rng(seed)
    sample_NZ = rows_NZ[random.permutation(len(rows_NZ))[:MAX_SAMPLE]]
    points_MZ = sample_NZ[: max(1, min(count, len(sample_NZ)))].copy()
    for _ in range(ROUNDS):
        nearest_N = ((points_MZ**2).sum(1) - 2 * sample_NZ @ points_MZ.T).argmin(1)
        counts_M = np.bincount(nearest_N, minlength=len(points_MZ))
        sums_MZ = np.zeros_like(points_MZ)
        np.add.at(sums_MZ, nearest_N, sample_NZ)
        points_MZ = np.where(counts_M[:, None] > 0, sums_MZ / np.maximum(counts_M, 1)[:, None], points_MZ)
    return np.asarray(points_MZ, np.float32)
