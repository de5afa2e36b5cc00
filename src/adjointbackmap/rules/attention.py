r"""Softmax and attention.

Frozen, a softmax is a gate: :math:`y = [\mathrm{softmax}(s)]\,v` is linear in the values v. A
softmax that is a value of its own, such as class probabilities, is refused.
"""

import math
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.rules.base import (
    Builder,
    Constant,
    Mask,
    Refused,
    SoftmaxValue,
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


@curved_rule_for("aten.softmax.int", "aten._softmax.default")
class Softmax(CurvedOperation):
    """A softmax: frozen, it is a gate alone."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append its derivative.

        Raises:
            SoftmaxValue: If it is frozen; then gates alone may read it.
        """
        x, dim = args[:2]
        (dim,) = keep_batch([dim], x)
        if builder.curved != TANGENT:
            raise SoftmaxValue
        return linearized(builder, lambda t: torch.softmax(t, dim), x)


@curved_rule_for("aten.log_softmax.int", "aten._log_softmax.default", "aten.logsumexp.default")
class LogSoftmax(CurvedOperation):
    """The logarithm of a softmax, or of a sum of exponentials; frozen, it is refused."""

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append its derivative.

        Raises:
            Refused: If it is frozen.
        """
        x = args[0]
        call = builder.call
        keep_batch(args[1] if isinstance(args[1], list | tuple) else [args[1]], x)
        if builder.curved != TANGENT:
            msg = 'it has no gate: cut the network before it, or take curved="tangent"'
            raise Refused(msg)
        return linearized(builder, lambda t: call(t, *args[1:], **kwargs), x)


@curved_rule_for("aten.scaled_dot_product_attention.default")
class Attention(CurvedOperation):
    r"""Attention: :math:`\mathrm{softmax}(q k^T / \sqrt{d} + m)\,v`, the softmax as gate."""

    takes_masks = True

    @classmethod
    def build(cls, builder: Builder, *args: Any, **kwargs: Any) -> Value:
        """Append one step.

        Raises:
            Refused: If it drops units at random, or differs between the images of a batch.
        """
        given = by_name(builder.call, args, kwargs)
        if given["dropout_p"]:
            msg = "it drops units at random: pass dropout_p=0.0 in eval mode"
            raise Refused(msg)
        query, key, value = (_as_value(builder, given[n]) for n in ("query", "key", "value"))
        mask = given["attn_mask"]
        data = [query, key, mask] if isinstance(mask, Value) else [query, key]
        held = mask.inputs if isinstance(mask, Mask) else ()

        def weights(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
            return attention_weights(q, k, _mask(mask, rest), given)

        groups = query.shape[-3] // value.shape[-3] if given.get("enable_gqa") else 1

        def product(v: Tensor, gate: Tensor) -> Tensor:
            return gate @ (v.repeat_interleave(groups, -3) if groups > 1 else v)

        if builder.curved == TANGENT:
            if isinstance(mask, Mask) and mask.kinks != ():
                msg = "its mask depends on the image"
                raise Refused(msg)

            def whole(v: Tensor, *others: Tensor) -> Tensor:
                return product(v, weights(*others))

            return linearized(builder, whole, value, *data, held=held)
        rule = Held(product, lambda v, *others: (weights(*others),))
        made = builder.apply(rule, value, *data, *held)
        return builder.note(made, "the softmax of the scores")


def _as_value(builder: Builder, argument: Any) -> Value:
    """Query, key or value, which must depend on the image.

    Raises:
        Refused: If it does not.
    """
    if isinstance(argument, Mask):
        argument = builder.as_numbers(argument)
    if not isinstance(argument, Value):
        msg = "its query, key or value is a constant: write the attention with matmul and softmax"
        raise Refused(msg)
    return argument


def _mask(mask: Any, rest: tuple[Tensor, ...]) -> Tensor | None:
    """The mask of the scores as a tensor."""
    if isinstance(mask, Mask):
        return mask.test(1.0, *rest)
    if isinstance(mask, Value):
        return rest[0]
    return mask.tensor if isinstance(mask, Constant) else None


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """The softmax of the scores, as PyTorch defines it.

    Args:
        query: The queries.
        key: The keys.
        mask: Boolean: where scores count; or what is added to the scores.
        given: The other arguments of PyTorch's operation by name.
    """
    scale = given["scale"]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if given.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = (query * scale) @ key.transpose(-2, -1)
    if given["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    weights = torch.softmax(scores, -1)
    # a query without keys has no weights
    return torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
