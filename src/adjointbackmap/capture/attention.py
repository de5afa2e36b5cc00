"""Attention modules written with the batch first, so that a graph of one image at a time exists.

PyTorch's own code moves the batch to the second dimension and joins it with the heads.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def put_batch_first(model: nn.Module) -> None:
    """Give each multi-head attention of a copied model a forward that keeps the batch first.

    A module that has its own forward, hooks its keys with a bias, or adds zero keys, stays as it
    is. The weighted sums are no layers of the network: PyTorch's code has others.
    """
    for module in model.modules():
        is_plain = type(module) is nn.MultiheadAttention and "forward" not in vars(module)
        if is_plain and module.bias_k is None and not module.add_zero_attn:
            vars(module)["forward"] = partial(attention, module)


def attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same as :class:`torch.nn.MultiheadAttention` in eval mode, computed with the batch first.

    The batch of its arguments is where the module has it.
    """
    if query.dim() < 3:
        given: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        given["average_attn_weights"] = average_attn_weights
        whole = partial(type(module).forward, module, query, key, value, **given)
        return whole(need_weights=need_weights, is_causal=is_causal)
    data = [t if module.batch_first else t.transpose(0, 1) for t in (query, key, value)]
    parts = zip(data, _kernels(module), _biases(module), strict=True)
    q, k, v = (_by_head(module, x, weight, bias) for x, weight, bias in parts)
    mask = _merged(module, key_padding_mask, attn_mask, query.dtype)
    if need_weights:
        scores = q @ k.transpose(-2, -1) * module.head_dim**-0.5
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        joined = weights @ v
    else:
        weights = None
        joined = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    joined = joined.transpose(1, 2).flatten(2)  # (N, T, heads * features)
    out = joined @ module.out_proj.weight.T
    out = out if module.out_proj.bias is None else out + module.out_proj.bias
    out = out if module.batch_first else out.transpose(0, 1)
    return out, weights.mean(1) if weights is not None and average_attn_weights else weights


def _kernels(module: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """The kernels of query, key and value."""
    if module.in_proj_weight is not None:
        return module.in_proj_weight.chunk(3)
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight


def _biases(module: nn.MultiheadAttention) -> tuple[Tensor | None, ...]:
    """The biases of query, key and value."""
    bias = module.in_proj_bias
    return (None, None, None) if bias is None else bias.chunk(3)


def _by_head(
    module: nn.MultiheadAttention, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A projection in the shape ``(N, heads, T, features)``."""
    product = x @ weight.T
    total = product if bias is None else product + bias
    return total.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _merged(
    module: nn.MultiheadAttention,
    padding: Tensor | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one that is added to the scores."""
    added = None if mask is None else _added(mask, dtype)
    if added is not None and added.dim() == 3:  # (N * heads, T, S)
        added = added.unflatten(0, (-1, module.num_heads))
    if padding is None:
        return added
    keys = _added(padding, dtype)[:, None, None]  # (N, 1, 1, S)
    return keys if added is None else added + keys


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added: minus infinity where a Boolean mask is true."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
