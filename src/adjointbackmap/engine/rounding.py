"""The scale of a unit's rounding: the size of the numbers that its value is summed from."""

from collections.abc import Iterable

import torch
from torch import Tensor

from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.rules import Value
from adjointbackmap.rules.base import laid_out

# Random factors per estimate; their mean square is within a factor of ten of its expectation.
GAUSSIAN_DRAWS = 8
# If a unit's terms sum to less than this share of its paths' size, the terms have cancelled.
CANCELLED_SHARE = 1e-2


def path_sizes(
    pattern: ActivationPattern,
    x: Tensor,
    targets: Iterable[Value],
    bias: Tensor | None = None,
) -> dict[int, Tensor]:
    r"""Size of the numbers that are summed along the paths to every unit, even if they cancel.

    The size of a value is :math:`\sqrt{\sum_j L_{ij}^2 s_j^2}` for the sizes :math:`s_j` of its
    inputs, where :math:`L` is the operation's linear map at the pattern. The sum is estimated from
    ``GAUSSIAN_DRAWS`` seeded Gaussian factors, which works for any rule.

    If two paths cancel exactly, as in ``min(a, b)`` built of ReLUs, the hyperplane is zero, but the
    value is a rounding error relative to this size.

    Args:
        pattern: Activation pattern of N images.
        x: The images ``(N, *in_shape)``, in the pattern's dtype.
        targets: Values to stop at.
        bias: A bias vector for each image, ``(N, M)``; by default the network's own.

    Returns:
        Slot of a target -> sizes ``(N, *shape)``.
    """
    targets = list(targets)
    steps = pattern.program.upstream(targets)
    last = {value.slot: n for n, step in enumerate(steps) for value in step.inputs}
    kept = {target.slot for target in targets}
    sizes = {IMAGE: x.abs()}
    start = 0
    for entry in pattern.program.entries:
        stop = start + entry.value.numel()
        own = entry.value.expand(len(x), *entry.value.shape)
        given = own if bias is None else bias[:, start:stop].reshape(own.shape)
        sizes[entry.slot] = given.abs()
        start = stop
    generator = torch.Generator().manual_seed(0)
    for n, step in enumerate(steps):
        if not step.inputs:  # an infinite constant is a term of no sum
            sizes[step.output.slot] = x.new_zeros(len(x), *step.output.shape)
            continue
        # what only frozen gates read has no tangents
        known = [sizes.get(v.slot, x.new_zeros(len(x), *v.shape)) for v in step.inputs]
        draws = [drawn(size, generator) for size in known]
        inputs = [laid_out(draw.flatten(0, 1)) for draw in draws]
        out = step.rule.forward(pattern.gates.get(step.output.slot, ()), *inputs)
        squares = out.unflatten(0, (len(x), GAUSSIAN_DRAWS)).square()  # (image, draw, *shape)
        sizes[step.output.slot] = squares.mean(1).sqrt()
        for value in step.inputs:
            if last[value.slot] == n and value.slot not in kept:
                sizes.pop(value.slot, None)
    return {target.slot: sizes[target.slot] for target in targets}


def drawn(size: Tensor, generator: torch.Generator) -> Tensor:
    """Sizes ``(N, *shape)`` times Gaussian factors: ``(N, GAUSSIAN_DRAWS, *shape)``."""
    shape = (len(size), GAUSSIAN_DRAWS, *size.shape[1:])
    factors = torch.randn(shape, generator=generator, dtype=size.dtype).to(size.device)
    return factors * size.unsqueeze(1)


def scale_of_rounding(terms: Tensor, paths: Tensor) -> Tensor:
    """The sum of a unit's absolute terms; for a unit that cancelled, a share of its paths' size."""
    return torch.maximum(terms, CANCELLED_SHARE * paths)
