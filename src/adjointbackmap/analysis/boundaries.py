"""Distances from an image to decision boundaries and kinks.

It is also tested whether they lie in the image's linear region.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjointbackmap.analysis.crossings import NORMS, Plane, Prepare, Reached, Side, reach
from adjointbackmap.analysis.kinks import Kink, kink_distances, one_image
from adjointbackmap.display import Shown, Summary, Table
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.operators import operator
from adjointbackmap.engine.pattern import ActivationPattern, record_pattern

# Tolerance for a margin in float64, relative to the sum of its terms' magnitudes. It is larger than
# the error of rounding.
AFFINE = 1e-9


@dataclass(frozen=True, repr=False)
class Boundary(Plane):
    """The decision boundary between two classes in the image's linear region.

    Its ``value`` is the margin at the image: the score of the first class minus that of the second.

    Attributes:
        first: A class.
        second: Another class.
    """

    first: int
    second: int

    def margin(self, side: Side) -> float:
        """Score of the first class minus that of the second, from the model itself at a point."""
        return float(side.outputs[self.first] - side.outputs[self.second])


def boundary(
    network: Network,
    x: Tensor,
    first: int,
    second: int,
    prepare: Prepare | None = None,
    pattern: ActivationPattern | None = None,
) -> Boundary:
    r"""The boundary between two classes in the linear region of an image.

    See [Wan2022, eqs. 2.14, 2.15]. All numbers are float64.

    With :math:`H = H_{first} - H_{second}` the boundary is :math:`\langle [x; b] | H \rangle = 0`.
    Its weights are :math:`H_I`, and its offset is :math:`\langle b | H_b \rangle`.

    If the network reads prepared images :math:`x' = A x + a`, the boundary is given in the pixels
    :math:`x`. Its weights are then :math:`A^* H_I`, which is :math:`H_I / std` for a normalisation.
    Its offset is :math:`\langle a | H_I \rangle + \langle b | H_b \rangle`.

    Args:
        network: Traced network whose output is one number per class.
        x: One image; in pixels if ``prepare`` is given.
        first: A class.
        second: Another class.
        prepare: The affine map from pixels to the network's input, such as
            ``models.preprocessing(name)``.
        pattern: The float64 pattern of the network's input at k = 1, from :func:`record_pattern`;
            by default it is recorded.

    Returns:
        The boundary as a plane. Its value is positive where the network prefers ``first``.

    Raises:
        ValueError: If the network has no such classes, ``prepare`` is not affine, ``x`` does not
            fit or is not one image, or ``pattern`` is another one.

    Example:
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Linear(2, 2, bias=False).eval()
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> between = boundary(trace(model, torch.zeros(1, 2)), torch.tensor([3.0, 1.0]), 0, 1)
        >>> between.weights.tolist(), between.value, between.distance("linf")
        ([1.0, -1.0], 2.0, 1.0)
    """
    return boundaries(network, x, first, [second], prepare, pattern)[0]


def boundaries(
    network: Network,
    x: Tensor,
    first: int,
    others: Sequence[int],
    prepare: Prepare | None = None,
    pattern: ActivationPattern | None = None,
) -> list[Boundary]:
    """The decision boundaries between one class and several others, see :func:`boundary`.

    Args:
        network: Traced network whose output is one number per class.
        x: One image; in pixels if ``prepare`` is given.
        first: A class.
        others: Other classes.
        prepare: The affine map from pixels to the network's input.
        pattern: The float64 pattern of the network's input at k = 1; by default it is recorded.

    Raises:
        ValueError: If the network has no such classes, ``prepare`` is not affine, ``x`` does not
            fit or is not one image, or ``pattern`` is another one.
    """
    count = _classes(network)
    wrong = [c for c in (first, *others) if not 0 <= c < count]
    if wrong or first in others:
        msg = (
            f"Two classes must be different, from 0 to {count - 1}. Got {first} and "
            f"{', '.join(map(str, others))}."
        )
        raise ValueError(msg)
    given = x.detach().double().reshape(-1, *x.shape[-len(network.in_shape) :]) if prepare else x
    images = one_image(network, prepare(given) if prepare else x, torch.float64)
    margins = images.new_zeros(1, len(others), count)
    margins[:, :, first] = 1
    margins[0, torch.arange(len(others)), torch.tensor(others, dtype=torch.int64)] = -1
    linear = operator(network, images, OUTPUT, dtype=torch.float64, pattern=pattern)
    weights, bias = (t[0] for t in linear.pulled(margins))
    offsets = (bias @ network.biases_in(torch.float64).vector).tolist()
    made = [
        Boundary(images[0], w, o, first, c)
        for w, o, c in zip(weights, offsets, others, strict=True)
    ]
    return _in_pixels(made, prepare, given) if prepare else made


def _classes(network: Network) -> int:
    """Number of classes of a network.

    Raises:
        ValueError: If its output is not one number per class.
    """
    check_network(network)
    network.check_piecewise_affine("A decision boundary")
    shape = network.layers[OUTPUT].out_shape
    if len(shape) != 1:
        msg = (
            f"The output must be one number for each class. Got shape {shape}: cut the "
            "network with until=."
        )
        raise ValueError(msg)
    return shape[0]


def _in_pixels(made: list[Boundary], prepare: Prepare, pixels: Tensor) -> list[Boundary]:
    """Boundaries on prepared images, converted to boundaries on pixels.

    Raises:
        ValueError: If the map is not affine.
    """
    constant = prepare(torch.zeros_like(pixels))[0]
    back = torch.func.vjp(prepare, pixels)[1]
    found = [
        replace(
            b,
            x=pixels[0],
            weights=back(b.weights[None])[0][0],
            offset=b.offset + float((constant * b.weights).sum()),
        )
        for b in made
    ]
    for before, after in zip(made, found, strict=True):
        scale = float((after.x * after.weights).abs().sum()) + abs(after.offset)
        old = before.value
        new = after.value
        if abs(new - old) > AFFINE * scale:
            msg = (
                f"prepare must be an affine map of the pixels. Got a margin of {new:.3g}, not "
                f"{old:.3g}: trace it with the model."
            )
            raise ValueError(msg)
    return found


def _nearest_first(boundaries: Sequence[Boundary], norm: str) -> list[Boundary]:
    return sorted(boundaries, key=lambda boundary: boundary.distance(norm))


@dataclass(frozen=True, repr=False)
class Analysis(Shown):
    """The kinks and class boundaries near one image, keyed by norm: ``"l2"`` and ``"linf"``.

    Attributes:
        predicted: The class that the network predicts.
        kinks: The nearest kink of all units, where the linear region ends. A norm has no entry if
            no kink can be reached.
        boundaries: The boundaries to all other classes that can be reached, nearest first.
        unmeasured: Operations whose kinks are not measured, see
            :class:`adjointbackmap.analysis.kinks.KinkDistances`.
    """

    predicted: int
    kinks: dict[str, Reached[Kink]]
    boundaries: dict[str, list[Reached[Boundary]]]
    unmeasured: tuple[str, ...]

    def _summary(self) -> Summary:
        facts = {"predicted class": str(self.predicted)}
        if self.unmeasured:
            facts["kinks not measured"] = ", ".join(self.unmeasured)
        rows = []
        for norm, kink in self.kinks.items():
            rows.append((norm, f"kink of {kink.plane.name}", f"{kink.distance:.4g}", ""))
        for norm, found in self.boundaries.items():
            for reached in found:
                inside = "yes" if reached.in_region else "no"
                name = f"boundary to class {reached.plane.second}"
                rows.append((norm, name, f"{reached.distance:.4g}", inside))
        heads = ("norm", "what is reached", "distance", "in the region")
        return Summary("Analysis", facts, {"": Table(heads, rows)})


def analyse(
    network: Network,
    x: Tensor,
    most: int | None = None,
    pattern: ActivationPattern | None = None,
) -> Analysis:
    """Exact distances from an image to its nearest kink and to each class boundary, in float64.

    A sweep in float32 finds the nearest kinks. Their distances are then computed in float64.

    A boundary is computed for the image's linear region. If ``in_region`` is true, the predicted
    class really changes there: the outputs just before and just after the boundary show it.
    Otherwise the region ends before the boundary. For distances in pixels, trace the normalisation
    together with the model.

    Args:
        network: Traced network whose output is one number per class.
        x: One image.
        most: Number of boundaries to step to in each norm, nearest first; by default all.
        pattern: The float64 pattern of ``x`` at k = 1, from :func:`record_pattern`; by default it
            is recorded.

    Raises:
        ValueError: If the output is not one number per class, ``x`` does not fit or is not one
            image, or ``pattern`` is another one.

    Example:
        >>> from adjointbackmap import trace
        >>> layers = torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        >>> model = torch.nn.Sequential(*layers).eval()
        >>> found = analyse(trace(model, torch.zeros(1, 4)), torch.rand(4))
        >>> found.kinks["l2"].ends_region, len(found.boundaries["l2"])
        (True, 2)
    """
    count = _classes(network)
    if pattern is None:
        pattern = record_pattern(network, one_image(network, x, torch.float64), 1.0, torch.float64)
    distances = kink_distances(network, x, sweep=torch.float32, pattern=pattern)
    predicted = int(pattern.recorded([network.layers[OUTPUT]]).outputs[OUTPUT].argmax())
    others = [c for c in range(count) if c != predicted]
    planes = (
        boundaries(network, distances.x, predicted, others, pattern=pattern) if count > 1 else []
    )
    reachable = [plane for plane in planes if plane.weights.any()]
    nearest = {norm: distances.nearest(norm) for norm in NORMS}
    kinks = {
        norm: reach(network, [kink], norm)[0] for norm, kink in nearest.items() if kink is not None
    }
    ordered = {norm: _nearest_first(reachable, norm)[:most] for norm in NORMS}
    reached = {norm: reach(network, planes, norm) for norm, planes in ordered.items()}
    return Analysis(predicted, kinks, reached, distances.unmeasured)
