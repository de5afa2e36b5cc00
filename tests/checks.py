"""Shared checks of a traced network: exactness, receptive fields, an untouched model."""

from math import ceil, floor

import torch
from torch import Tensor, nn

import adjointbackmap as abm

TIGHT = {"rtol": 1e-11, "atol": 1e-11}  # float64, values of the order of one


def assert_close(ours, theirs, **tolerances):
    """Equal to rounding; the message says where not."""
    torch.testing.assert_close(ours, theirs, **(tolerances or TIGHT))


def assert_reconstructed(network, x: Tensor) -> None:
    """Every unit of every layer equals its reconstruction, and the audit finds no difference."""
    for own_bias in (True, False):
        checks = abm.verify(network, x, own_bias=own_bias)
        assert {
            name: check.scaled for name, check in checks.items() if not check.scaled <= 1e-12
        } == {}
    assert max(abm.audit(network, x).values()) <= 1e-12


def assert_modes_are_sums(network, x: Tensor, name: str) -> None:
    """RM3 = sum_s RM4, RM2 = sum_j RM4, RM1 = sum_j RM3 = sum_s RM2: image, bias and value."""
    layer = network.layers[name]
    axes = len(layer.out_shape) - 1
    rm = {m: abm.hyperplanes(network, x, name, m, own_bias=False) for m in layer.modes}
    positions = tuple(range(1, 1 + axes))
    for part in ("image", "bias", "value"):
        rm4, rm3, rm2, rm1 = (getattr(rm[m], part) for m in ("RM4", "RM3", "RM2", "RM1"))
        assert_close(rm4.sum(positions), rm3)
        assert_close(rm4.sum(1 + axes), rm2)
        assert_close(rm3.sum(1), rm1)
        assert_close(rm2.sum(positions), rm1)


# receptive fields


def true_field(network, images: Tensor, name: str) -> Tensor:
    """Pixels that each position depends on at any of the images: ``(*positions, *pixels)``."""
    jacobian = abm.operator(network, images, name).dense()[0]
    channels = len(network.layers[name].out_shape) + 1
    return jacobian.ne(0).any(channels).any(1).any(0)


def declared_field(network, name: str) -> list[Tensor] | None:
    """Pixels that a position may depend on, ``(positions, pixels)`` per axis; ``None`` for any."""
    layer = network.layers[name]
    field = network.program().fields[layer.value.slot]
    if not field:
        return field
    masks = []
    for axis, positions, pixels in zip(
        field, layer.out_shape[1:], network.in_shape[1:], strict=True
    ):
        mask = torch.zeros(positions, pixels, dtype=torch.bool)
        for o in range(positions):
            low = ceil(o * axis.step + axis.low)
            high = floor(o * axis.step + axis.high)
            mask[o, max(low, 0) : max(high + 1, 0)] = True
        masks.append(mask)
    return masks


def assert_field_contains(true: Tensor, declared: list[Tensor] | None) -> None:
    """No position depends on a pixel outside its declared field."""
    if declared is None:
        return
    if not declared:  # no pixel at all
        assert not true.any()
        return
    allowed = torch.ones((), dtype=torch.bool)
    axes = len(declared)
    for i, mask in enumerate(declared):
        shape = [1] * (2 * axes)
        shape[i], shape[axes + i] = mask.shape
        allowed = allowed & mask.view(shape)
    assert not (true & ~allowed).any()


def extents(true: Tensor, axis: int) -> Tensor:
    """From the first to the last pixel of each position along an axis, ``(positions, pixels)``."""
    axes = true.dim() // 2
    others = [d for d in range(2 * axes) if d not in (axis, axes + axis)]
    along = true.any(others) if others else true
    after = along.flip(1).cumsum(1).flip(1) > 0
    return (along.cumsum(1) > 0) & after


# the model


def snapshot(model: nn.Module) -> tuple:
    """Everything of a model that must not change: tensors and their grads, flags, hooks."""
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    parameters = {
        n: (id(p), p.requires_grad, None if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        n: (id(m), m.training, *(list(getattr(m, h)) for h in hooks))
        for n, m in model.named_modules()
    }
    return tensors, parameters, modules


def assert_untouched(model: nn.Module, before: tuple) -> None:
    """The model is as in the snapshot."""
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
