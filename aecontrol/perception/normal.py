"""Normal equations of the joint fit: 3 x 3 blocks of columns that overlap, and a few parameters common to all.

Every column is known to its neighbours only, so that the matrix is stored as rows of blocks padded to the largest
number of neighbours; background knots and the spot's shape are dense columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .spot import Columns

SOLVER_STEPS = 40
TOLERANCE = 1e-2
"""Residual of the normal equations at which a step is good enough: the next step repairs the rest."""
# derivative (0: none, 1: first) along y and x of the model by a, x, y
ALONG_Y, ALONG_X = (0, 0, 1), (0, 1, 0)
NEAR = 6.0
"""Neighbours within so many blurs are free when a column's errors are reckoned."""
DAMP_NM = 0.1
"""A position's step is damped as if it were known to this before: dim columns must not fly."""
DAMP_SHARE = 0.001
"""An intensity's step is damped by this share of what is known of the median column's: columns off the rim too."""
SHAPE_PRIOR = (1.0, 0.1, 0.1, 0.07, 0.07, 0.005, 0.1, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02)
"""Loose prior knowledge of the spot, for windows with few atoms: log blur, stretch, shear, the wings."""


@dataclass(frozen=True)
class Rows:
    """Block rows [n, 3, 3k] and the columns [n, k] that they belong to; the column itself comes first, padding blocks
    are zero."""

    blocks: torch.Tensor
    who: torch.Tensor
    real: torch.Tensor
    near: int
    """So many of each row's columns, itself included, matter for its errors."""

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self.blocks, v[self.who].reshape(len(v), -1, 1)).squeeze(2)


@dataclass(frozen=True)
class System:
    """The matrix [[rows, cross], [cross.T, common]]; ``own``: the columns' own blocks [n, 3, 3]."""

    rows: Rows
    own: torch.Tensor
    cross: torch.Tensor
    common: torch.Tensor

    def solve(self, columns: torch.Tensor, common: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps of columns [n, 3] and common parameters [m]: conjugate gradients, preconditioned with the columns' own
        blocks and the common block."""
        n = len(columns)
        inverse = torch.linalg.inv(self.own)
        factor = torch.linalg.cholesky(self.common)

        def apply(v: torch.Tensor) -> torch.Tensor:
            c, g = v[: 3 * n], v[3 * n :]
            return torch.cat(
                [(self.rows @ c.view(n, 3)).reshape(-1) + self.cross @ g, c @ self.cross + self.common @ g]
            )

        def condition(r: torch.Tensor) -> torch.Tensor:
            c = torch.bmm(inverse, r[: 3 * n].view(n, 3, 1)).reshape(-1)
            return torch.cat([c, torch.cholesky_solve(r[3 * n :, None], factor)[:, 0]])

        r = torch.cat([columns.reshape(-1), common])
        v, z = torch.zeros_like(r), condition(r)
        p, rz = z, r @ z
        end = TOLERANCE**2 * float(rz)
        for _ in range(SOLVER_STEPS):
            if float(rz) <= end:
                break
            q = apply(p)
            alpha = rz / (p @ q)
            v, r = v + alpha * p, r - alpha * q
            z = condition(r)
            rz, before = r @ z, rz
            p = z + rz / before * p
        return v[: 3 * n].view(n, 3), v[3 * n :]

    def covariance(self) -> torch.Tensor:
        """[n, 3, 3] covariance of (a, x, y) of every column, its near neighbours free."""
        who, real = self.rows.who, self.rows.real
        n, k = who.shape
        keys = (torch.arange(n, device=who.device)[:, None] * n + who)[real]
        blocks = self.rows.blocks.view(n, 3, k, 3).transpose(1, 2)[real]
        keys, order = torch.sort(keys)
        order = torch.cat([order, order.new_tensor([len(order)])])
        blocks = torch.cat([blocks, blocks.new_zeros(1, 3, 3)])
        k = self.rows.near
        turned, there = (
            who[:, :k].flip(1),
            real[:, :k].flip(1),
        )  # the column itself last: the end of the Cholesky factor is its own
        asked = turned[:, :, None] * n + turned[:, None, :]
        at = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
        found = (keys[at] == asked) & there[:, :, None] & there[:, None, :]
        at = order[torch.where(found, at, len(keys))]
        local = blocks[at].transpose(2, 3).reshape(n, 3 * k, 3 * k)
        size = local.diagonal(dim1=1, dim2=2)
        size = torch.where(size > 0, size, 1.0).rsqrt()
        local = local * size[:, :, None] * size[:, None, :]
        diagonal = local.diagonal(dim1=1, dim2=2)
        diagonal.copy_(torch.where(diagonal > 0, diagonal, 1.0) * (1 + 1e-5))
        last = torch.linalg.cholesky_ex(local)[0][:, -3:, -3:]
        return torch.cholesky_inverse(last) * size[:, -3:, None] * size[:, None, -3:]


def assemble(columns: Columns, pairs: torch.Tensor, weight: torch.Tensor, images: torch.Tensor | None) -> System:
    """Normal equations at ``columns`` with the pixels' ``weight``; ``pairs`` [p, 2] of columns that overlap, i < j;
    ``images`` [m, rows, cols] derivatives by the spot's shape, where it is to be fitted."""
    windows = columns.gather(weight)
    n = len(windows)
    overlap = (columns.corner_x[pairs[:, 0]] - columns.corner_x[pairs[:, 1]]).abs() < columns.width
    overlap &= (columns.corner_y[pairs[:, 0]] - columns.corner_y[pairs[:, 1]]).abs() < columns.height
    pairs = pairs[overlap]
    alone = torch.arange(n, device=pairs.device)
    own = _blocks(columns, windows, alone, alone)
    known = own[:, 0, 0].median()
    pixel = columns.grid.pixel_nm
    damp = own.new_tensor([0.0, (pixel[0] / DAMP_NM) ** 2, (pixel[1] / DAMP_NM) ** 2])
    damp[0] = DAMP_SHARE * known + 1e-9
    own = own + torch.diag(damp)
    blocks = _blocks(columns, windows, pairs[:, 0], pairs[:, 1])
    state = columns.state
    x, y = (a[pairs[:, 0]] - a[pairs[:, 1]] for a in (state.x / columns.sx, state.y / columns.sy))
    rows = _rows(own, blocks, pairs, torch.hypot(x, y))
    cross, common = _common(columns, windows, weight, images)
    return System(rows, own, cross, common)


def _blocks(columns: Columns, windows: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """[p, 3, 3] Fisher information between (a, x, y) of columns i and of columns j, in the windows of i."""
    state = columns.state
    other_y = columns.profile_y(state.y[j], columns.corner_y[i])[:, :2] * _within(
        columns.corner_y, i, j, columns.height
    )
    other_x = columns.profile_x(state.x[j], columns.corner_x[i])[:, :2] * _within(columns.corner_x, i, j, columns.width)
    y, x = columns.gy[i, :2, None] * other_y[:, None], columns.gx[i, :2, None] * other_x[:, None]
    m = torch.bmm(torch.bmm(y.flatten(1, 2), windows[i]), x.flatten(1, 2).mT)
    at_y, at_x = (torch.tensor(a)[:, None] * 2 + torch.tensor(a) for a in (ALONG_Y, ALONG_X))
    return m[:, at_y, at_x] * _scale(state.a[i], columns)[:, :, None] * _scale(state.a[j], columns)[:, None, :]


def _within(corner: torch.Tensor, i: torch.Tensor, j: torch.Tensor, length: int) -> torch.Tensor:
    """[p, 1, length] whether the pixels of the windows of i are in those of j too: without this the matrix would not be
    that of any model, and not positive."""
    pixel = (corner[i] - corner[j])[:, None] + torch.arange(length, device=corner.device)
    return ((pixel >= 0) & (pixel < length))[:, None]


def _scale(a: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Factors of the core's derivatives in the model's derivatives by (a, x, y)."""
    by_a, by_place = columns.spot.scales
    return torch.stack([torch.full_like(a, by_a), by_place * a, by_place * a], 1)


def _rows(own: torch.Tensor, blocks: torch.Tensor, pairs: torch.Tensor, distance: torch.Tensor) -> Rows:
    """Own blocks and both directions of the pairs' blocks as padded rows, in the order of ``distance`` (blurs)."""
    n = len(own)
    alone = torch.arange(n, device=own.device)
    source = torch.cat([alone, pairs[:, 0], pairs[:, 1]])
    target = torch.cat([alone, pairs[:, 1], pairs[:, 0]])
    values = torch.cat([own, blocks, blocks.mT])
    far = torch.cat([distance.new_zeros(n), distance, distance])
    order = torch.argsort(far)
    order = order[torch.argsort(source[order], stable=True)]
    source = source[order]
    count = torch.bincount(source, minlength=n)
    slot = torch.arange(len(source), device=own.device) - (count.cumsum(0) - count)[source]
    k = int(count.max())
    who = alone[:, None].repeat(1, k)
    who[source, slot] = target[order]
    real = torch.zeros_like(who, dtype=torch.bool)
    real[source, slot] = True
    filled = own.new_zeros(n, k, 3, 3)
    filled[source, slot] = values[order]
    near = int(torch.bincount(source[far[order] < NEAR], minlength=n).max())
    return Rows(filled.transpose(1, 2).reshape(n, 3, 3 * k), who, real, near)


def _common(
    columns: Columns, windows: torch.Tensor, weight: torch.Tensor, images: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Information shared by columns and common parameters [3n, m], and of the common parameters [m, m]."""
    grid = columns.grid
    hats_y = grid.hat_y.unfold(1, columns.height, 1)[:, columns.corner_y].transpose(0, 1)
    hats_x = grid.hat_x.unfold(1, columns.width, 1)[:, columns.corner_x].transpose(0, 1)
    n, ky, kx = len(windows), len(grid.hat_y), len(grid.hat_x)
    y = (columns.gy[:, :2, None] * hats_y[:, None]).flatten(1, 2)
    x = (columns.gx[:, :2, None] * hats_x[:, None]).flatten(1, 2)
    m = torch.bmm(torch.bmm(y, windows), x.mT).view(n, 2, ky, 2, kx)
    cross = torch.stack([m[:, a, :, b] for a, b in zip(ALONG_Y, ALONG_X, strict=True)], 1).view(n, 3, ky * kx)
    cross = cross * _scale(columns.state.a, columns)[:, :, None]
    pair_y = grid.hat_y[:, None] * grid.hat_y[None]
    pair_x = grid.hat_x[:, None] * grid.hat_x[None]
    common = (pair_y.flatten(0, 1) @ weight @ pair_x.flatten(0, 1).T).view(ky, ky, kx, kx)
    common = common.transpose(1, 2).reshape(ky * kx, ky * kx)
    if images is not None:
        weighted = images * weight
        cross = torch.cat([cross, columns.moments_of(weighted)], 2)
        with_knots = torch.stack([grid.knots_of(image) for image in weighted])
        shapes = (weighted.flatten(1) @ images.flatten(1).T) + torch.diag(
            common.new_tensor(SHAPE_PRIOR[: len(images)]) ** -2
        )
        common = torch.cat([torch.cat([common, with_knots.T], 1), torch.cat([with_knots, shapes], 1)])
    common = common + torch.diag(1e-5 * common.diagonal() + 1e-30)
    return cross.reshape(3 * n, -1), common
