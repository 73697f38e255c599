"""Factors of a change of weights, ``up @ down``: the closest ones of a rank, and how much of the change they hold.

A change has singular values s_1 >= s_2 >= ... Of all matrices of rank r the truncated decomposition is the closest,
and its squared error is the sum of s_k^2 over k > r (Eckart & Young 1936; Mirsky 1960). So the energy it retains,
sum of s_k^2 over k <= r divided by the sum over all k, says exactly what a rank costs. Everything is in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-12
"""Singular values below this share of the largest are rounding of float64, not change."""


@dataclass(frozen=True)
class Spectrum:
    """A decomposed matrix: ``u`` (out, k), ``s`` (k) falling, ``vh`` (k, in)."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def rank(self, rank: int | None = None, energy: float | None = None) -> int:
        """The smallest rank that retains ``energy``, at most ``rank``; 0 for no change at all."""
        squares = self.s.square()
        if not float(squares.sum()):
            return 0
        wanted = int((self.s > NOISE * self.s[0]).sum())
        if energy is not None:
            retained = squares.cumsum(0) / squares.sum()
            wanted = min(wanted, int((retained < energy - NOISE).sum()) + 1)
        return wanted if rank is None else min(wanted, rank)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``up`` (out, rank) and ``down`` (rank, in), each with the square roots of the singular values.

        The halves have entries of one size, which is what lets them be stored in 16 bits.
        """
        root = self.s[:rank].sqrt()
        return self.u[:, :rank] * root, root[:, None] * self.vh[:rank]

    def energy(self, rank: int) -> float:
        """Squared norm of the best approximation of ``rank``."""
        return float(self.s[:rank].square().sum())


def decompose(matrix: Tensor) -> Spectrum:
    """Of a matrix (out, in), or a convolution's weight (out, in, *k)."""
    matrix = matrix.double().flatten(1)
    rows, columns = matrix.shape
    if columns <= 2 * rows:
        return Spectrum(*torch.linalg.svd(matrix, full_matrices=False))
    q, r = torch.linalg.qr(matrix.T)  # of a 3x3 convolution this leaves a ninth: four times as fast for 1280 x 11520
    square = decompose(r.T)
    return Spectrum(square.u, square.s, square.vh @ q.T)


def decompose_product(up: Tensor, down: Tensor) -> Spectrum:
    """Of ``up @ down`` for (out, r) and (r, in), without the product where r is smaller than both of its sides.

    With ``up = Q1 R1`` and ``down^T = Q2 R2`` the product is ``Q1 (R1 R2^T) Q2^T``, and Q1 and Q2 have orthonormal
    columns: its singular values are those of the r x r matrix in the middle (Golub & Van Loan 2013, chapter 5).
    """
    up, down = up.double(), down.double()
    if up.shape[1] >= min(len(up), down.shape[1]):
        return decompose(up @ down)
    q1, r1 = torch.linalg.qr(up)
    q2, r2 = torch.linalg.qr(down.T)
    middle = decompose(r1 @ r2.T)
    return Spectrum(q1 @ middle.u, middle.s, middle.vh @ q2.T)
