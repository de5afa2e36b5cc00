"""The point of a polyhedron that is nearest to the origin, in l2 or l-infinity.

Only few of a polyhedron's walls bound its nearest point. So walls are added one after the other,
where the point so far is on their wrong side.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

ROUNDS = 200  # of adding walls
# A point is outside of a wall if it is further behind it than this share of its own distance.
TOLERANCE = 1e-9
# The residual of a least-squares problem that has no solution is 0 apart from rounding.
EMPTY = 1e-10

Walls = tuple[np.ndarray, np.ndarray]  # rows (m, n) and levels (m,): row @ point <= level


def nearest_point(first: Walls, outside: Callable[[np.ndarray], Walls], norm: str) -> Any:
    """The point nearest to the origin behind all walls, or ``None`` if there is no such point.

    Args:
        first: Walls to begin with.
        outside: Walls that a point is on the wrong side of; not all of them are needed.
        norm: ``"l2"`` or ``"linf"``.

    Raises:
        ImportError: If SciPy is not installed.
    """
    rows, levels = _unit(*first)
    solve = _least_squares if norm == "l2" else _linear_program
    for _ in range(ROUNDS):
        inside = bool((levels >= 0).all())
        point = np.zeros(rows.shape[1]) if inside else solve(rows, levels)
        if point is None:
            return None
        more = _unit(*outside(point))
        size = max(1e-300, float(np.abs(point).max()))
        wrong = more[0] @ point - more[1] > TOLERANCE * size
        if not wrong.any():
            return point
        rows = np.concatenate([rows, more[0][wrong]])
        levels = np.concatenate([levels, more[1][wrong]])
    return None


def _unit(rows: np.ndarray, levels: np.ndarray) -> Walls:
    """The same walls with rows of length 1; those without a row bound nothing."""
    sizes = np.linalg.norm(rows, axis=1)
    kept = sizes > 0
    return rows[kept] / sizes[kept, None], levels[kept] / sizes[kept]


def _least_squares(rows: np.ndarray, levels: np.ndarray) -> Any:
    """Least distance by non-negative least squares [Lawson1974, chapter 23]."""
    optimize = _scipy()
    scale = max(1e-300, float(np.abs(levels).max()))  # levels of the size of the rows
    matrix = np.concatenate([-rows.T, -levels[None] / scale])
    target = np.zeros(len(matrix))
    target[-1] = 1
    try:
        found, _ = optimize.nnls(matrix, target)
    except RuntimeError:  # it has not converged
        return None
    residual = matrix @ found - target
    if np.abs(residual).max() < EMPTY:
        return None
    return -scale * residual[:-1] / residual[-1]


def _linear_program(rows: np.ndarray, levels: np.ndarray) -> Any:
    """The smallest cube that reaches behind all walls.

    A point of the cube of half width t is t e, with every entry of e between -1 and 1. So
    rows e <= levels / t, which is linear in e and in s = 1 / t. The largest s is wanted. Without a
    point behind all walls it is 0.
    """
    optimize = _scipy()
    scale = max(1e-300, float(np.abs(levels).max()))
    matrix = np.concatenate([rows, -levels[:, None] / scale], axis=1)
    costs = np.zeros(matrix.shape[1])
    costs[-1] = -1
    bounds = [(-1, 1)] * rows.shape[1] + [(0, None)]
    found = optimize.linprog(costs, matrix, np.zeros(len(rows)), bounds=bounds, method="highs")
    if found.status != 0 or found.x[-1] < EMPTY:
        return None
    return scale * found.x[:-1] / found.x[-1]


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        msg = "region_walk needs SciPy: pip install scipy."
        raise ImportError(msg) from error
    return optimize
