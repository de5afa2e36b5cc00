r"""Norms by statistics of the image: layer, group, instance and RMS norm, and norms as values.

Frozen, the subtraction of the mean stays linear, :math:`1 / \sqrt{\sigma^2 + \epsilon}` is a gate,
and :math:`\beta` is an entry of ``b``. A norm as a value of its own is
:math:`\|x\| = \langle x, [x / \|x\|] \rangle`, and zero at zero.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Aten,
    Builder,
    Constant,
    Gates,
    Mask,
    Refused,
    Shape,
    Value,
    by_name,
    keep_batch,
)
from adjointbackmap.rules.curved import (
    TANGENT,
    CurvedOperation,
    Held,
    curved_rule_for,
    linearized,
)
from adjointbackmap.rules.linear import Add, Masked, Multiply, aligned
from adjointbackmap.rules.moving import Reshape
from adjointbackmap.rules.natures import Nature
from adjointbackmap.rules.norms import REDUCTIONS

DEVIATION = "the inverse of the deviation"
NORM = "the direction x / |x|"


class Centred(Aten):
    """A value minus its mean over dimensions; the map is its own transpose."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = list(dims)

    def forward(self, gates: Gates, *tangents: Tensor) -> Tensor:
        return tangents[0] - tangents[0].mean(self.dims, keepdim=True)

    def adjoint(
        self, gates: Gates, cotangent: Tensor, shapes: Sequence[Shape]
    ) -> tuple[Tensor, ...]:
        return (self.forward(gates, cotangent),)

    def positional(self) -> bool:
        return self.dims == [1]


def over_deviation(
    builder: Builder, x: Value, dims: Sequence[int], eps: float, centres: bool = True
) -> Value:
    """Append the steps of a norm: the centred value times the inverse of its deviation.

    Args:
        builder: What appends the steps.
        x: The value.
        dims: The dimensions of the statistics, counted with the batch.
        eps: What is added to the mean of squares.
        centres: Whether the mean is subtracted.
    """
    if centres:
        x = builder.apply(Centred(dims), x, shape=x.shape)

    def inverse(k: float, c: Tensor) -> Tensor:
        return torch.rsqrt(c.square().mean(list(dims), keepdim=True) + eps)

    shape = tuple(1 if d + 1 in dims else n for d, n in enumerate(x.shape))
    made = Masked.product(builder, x, Mask(inverse, (x,), shape))
    return builder.note(made, DEVIATION)


def scaled(builder: Builder, x: Value, weight: Any, bias: Any, per_channel: bool) -> Value:
    """Append the product with a weight and the sum with a bias, which is an entry of ``b``."""
    dims = len(x.shape)

    def placed_shape(constant: Constant) -> Shape:
        if per_channel:
            return (*constant.tensor.shape, *(1,) * (dims - 1))
        return aligned(constant, dims)

    if isinstance(weight, Constant):
        factor = weight.tensor.reshape(placed_shape(weight))
        x = builder.apply(Multiply(factor), x, shape=x.shape)
    entry = builder.place(bias, placed_shape(bias)) if isinstance(bias, Constant) else None
    return x if entry is None else builder.apply(Add(), x, entry, shape=x.shape)


def check_constants(*parameters: Any) -> None:
    """Check that weight and bias of a norm do not depend on the image.

    Raises:
        Refused: If one does.
    """
    if any(isinstance(p, Value | Mask) for p in parameters):
        msg = "its weight or bias depends on the image"
        raise Refused(msg)


class StatisticsNorm(CurvedOperation):
    """A norm that divides by the deviation of the image."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append the steps of the reading that the trace asks for.

        Raises:
            Refused: If its weight or bias depends on the image.
        """
        given = by_name(builder.call, args, kwargs)
        check_constants(given.get("weight"), given.get("bias"))
        if builder.curved != TANGENT:
            return cls.frozen(builder, given)
        names = [a.name for a in builder.call._schema.arguments]
        rest = {n: _tensor(v) for n, v in given.items() if n != names[0]}

        def function(x: Tensor) -> Tensor:
            # the derivative of PyTorch's group norm needs it, also where maps are channels last
            return call(x.contiguous(), *(rest[n] for n in names[1:]))

        call = builder.call
        return linearized(builder, function, given[names[0]])

    @classmethod
    @abstractmethod
    def frozen(cls, builder: Builder, given: dict[str, Any]) -> Value:
        """Append the steps with the deviation as a gate."""


def _last_dims(x: Value, normalized: Sequence[int]) -> list[int]:
    """The last dimensions of a value, as many as a norm is over."""
    return keep_batch([-1 - d for d in range(len(normalized))], x)


def _tensor(argument: Any) -> Any:
    return argument.tensor if isinstance(argument, Constant) else argument


@curved_rule_for("aten.layer_norm.default")
class LayerNorm(StatisticsNorm):
    r"""Layer norm: :math:`\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`."""

    @classmethod
    def frozen(cls, builder: Builder, given: dict[str, Any]) -> Value:
        x = given["input"]
        dims = _last_dims(x, given["normalized_shape"])
        made = over_deviation(builder, x, dims, given["eps"])
        return scaled(builder, made, given["weight"], given["bias"], per_channel=False)


@curved_rule_for("aten.rms_norm.default")
class RootMeanSquareNorm(StatisticsNorm):
    r"""RMS norm: :math:`\gamma x / \sqrt{\overline{x^2} + \epsilon}`."""

    @classmethod
    def frozen(cls, builder: Builder, given: dict[str, Any]) -> Value:
        x = given["input"]
        dims = _last_dims(x, given["normalized_shape"])
        eps = given["eps"]
        eps = torch.finfo(builder.dtype).eps if eps is None else eps
        made = over_deviation(builder, x, dims, eps, centres=False)
        return scaled(builder, made, given["weight"], None, per_channel=False)


@curved_rule_for("aten.group_norm.default")
class GroupNorm(StatisticsNorm):
    """Group norm: a layer norm of each group of channels, with a weight for each channel."""

    @classmethod
    def frozen(cls, builder: Builder, given: dict[str, Any]) -> Value:
        x = given["input"]
        groups = given["num_groups"]
        grouped = (groups, prod(x.shape) // groups)
        parts = builder.apply(Reshape(grouped), x, shape=grouped)
        made = over_deviation(builder, parts, [2], given["eps"])
        made = builder.apply(Reshape(x.shape), made, shape=x.shape)
        return scaled(builder, made, given["weight"], given["bias"], per_channel=True)


@curved_rule_for("aten.instance_norm.default")
class InstanceNorm(StatisticsNorm):
    """Instance norm by the statistics of each map of the image."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        return bool(args[5])  # use_input_stats

    @classmethod
    def frozen(cls, builder: Builder, given: dict[str, Any]) -> Value:
        x = given["input"]
        dims = list(range(2, len(x.shape) + 1))
        made = over_deviation(builder, x, dims, given["eps"])
        return scaled(builder, made, given["weight"], given["bias"], per_channel=True)


def _direction(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a norm at each image; zero where the norm is zero."""
    gradient = torch.func.grad(lambda t: function(t).sum())(x)
    return torch.where(gradient.isfinite(), gradient, torch.zeros_like(gradient))


def homogeneous(
    builder: Builder,
    function: Callable[[Tensor], Tensor],
    reduced: Callable[[Tensor], Tensor],
    x: Value,
    share: float,
    nature: Nature,
) -> Value:
    r"""Append a norm, a deviation, or a sum of squares of them, as a value of its own.

    It is :math:`f(x) = \langle x, [s f'(x)] \rangle`, with ``share`` s = 1 for a norm, and 1/2 for
    a sum of squares.

    Args:
        builder: What appends the steps.
        function: The norm.
        reduced: The sum over the norm's dimensions.
        x: The value.
        share: The factor s.
        nature: What the value is as a factor.
    """
    if builder.curved == TANGENT:
        return linearized(builder, function, x)

    def hold(t: Tensor) -> Gates:
        return (share * _direction(function, t),)

    made = builder.apply(Held(lambda t, gate: reduced(t * gate), hold), x)
    return builder.note(builder.mark(made, nature), NORM)


@curved_rule_for("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
class VectorNormValue(CurvedOperation):
    r"""A norm of order 2 or another: :math:`\|x\| = \langle x, [x / \|x\|] \rangle`."""

    @classmethod
    def is_curved(cls, builder: Builder, *args: Any, **kwargs: Any) -> bool:
        return cls.order(by_name(builder.call, args, kwargs)) not in REDUCTIONS

    @staticmethod
    def order(given: dict[str, Any]) -> float:
        """The order of the norm; 2 by default."""
        order = given["ord"] if "ord" in given else given["p"]
        return float(2 if order is None else order)

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it goes over the images of a batch, or its order is not above one.
        """
        given = by_name(builder.call, args, kwargs)
        x = given["self"]
        order = cls.order(given)
        if order < 1:
            msg = f"a norm of order {order:g} is no norm"
            raise Refused(msg)
        dims = keep_batch(given["dim"] or [0], x)
        keep = given["keepdim"]

        def function(t: Tensor) -> Tensor:
            return torch.linalg.vector_norm(t, order, dims, keep)

        return homogeneous(builder, function, lambda t: t.sum(dims, keep), x, 1.0, Nature.NORM)


@curved_rule_for("aten.std.dim", "aten.std.correction", "aten.var.dim", "aten.var.correction")
class Spread(CurvedOperation):
    r"""A deviation or a variance: :math:`\sigma = \langle x, [\sigma'(x)] \rangle`."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it goes over the images of a batch.
        """
        given = by_name(builder.call, args, kwargs)
        x = given["self"]
        dims = keep_batch(given["dim"] or [0], x)
        keep = given["keepdim"]
        correction = given["correction"] if "correction" in given else int(given["unbiased"])
        correction = 1 if correction is None else correction
        is_deviation = builder.op == "std"
        op = torch.std if is_deviation else torch.var

        def function(t: Tensor) -> Tensor:
            return op(t, dims, correction=correction, keepdim=keep)

        share, nature = (1.0, Nature.NORM) if is_deviation else (0.5, Nature.SQUARES)
        return homogeneous(builder, function, lambda t: t.sum(dims, keep), x, share, nature)
