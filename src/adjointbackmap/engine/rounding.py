"""How large the numbers were that a unit's value was summed from: the scale of its rounding."""

from collections.abc import Iterable

import torch
from torch import Tensor

from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.rules import Value
from adjointbackmap.rules.base import laid_out

DRAWS = 8  # of random factors: their mean square is within a factor of ten of what it estimates
SHARE = 1e-2  # of what came along the paths: below it the terms of a hyperplane have cancelled


def path_sizes(
    pattern: ActivationPattern,
    x: Tensor,
    targets: Iterable[Value],
    bias: Tensor | None = None,
) -> dict[int, Tensor]:
    r"""Size of what is summed along the paths to every unit, whether it cancels or not.

    Each value is taken as the root of the sum of squares :math:`\sum_j L_{ij}^2 s_j^2` of its inputs'
    sizes :math:`s_j`, where :math:`L` is the operation's linear map at the pattern. The sum is
    estimated from ``DRAWS`` seeded Gaussian factors, so that it holds for any rule.

    Where two paths cancel exactly, as in ``min(a, b)`` built of ReLUs, the hyperplane is zero but the
    value is a rounding error of this size.

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
        if not step.inputs:  # an infinite constant is no term of any sum
            sizes[step.output.slot] = x.new_zeros(len(x), *step.output.shape)
            continue
        draws = [drawn(sizes[value.slot], generator) for value in step.inputs]
        inputs = [laid_out(draw.flatten(0, 1)) for draw in draws]
        out = step.rule.forward(pattern.gates.get(step.output.slot, ()), *inputs)
        squares = out.unflatten(0, (len(x), DRAWS)).square()  # (image, draw, *shape)
        sizes[step.output.slot] = squares.mean(1).sqrt()
        for value in step.inputs:
            if last[value.slot] == n and value.slot not in kept:
                sizes.pop(value.slot, None)
    return {target.slot: sizes[target.slot] for target in targets}


def drawn(size: Tensor, generator: torch.Generator) -> Tensor:
    """Sizes ``(N, *shape)`` times Gaussian factors, ``(N, DRAWS, *shape)``."""
    shape = (len(size), DRAWS, *size.shape[1:])
    factors = torch.randn(shape, generator=generator, dtype=size.dtype).to(size.device)
    return factors * size.unsqueeze(1)


def scale_of_rounding(terms: Tensor, paths: Tensor) -> Tensor:
    """The sum of a unit's absolute terms, or a share of what came along its paths if that is more."""
    return torch.maximum(terms, SHARE * paths)
