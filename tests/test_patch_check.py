"""Patches against whole images: every network passes; a wrong receptive field fails."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make
from checks import assert_close, assert_field_contains, declared_field, true_field
from torch import nn

import adjointbackmap as abm
from adjointbackmap.planes.patch_check import check_patches
from adjointbackmap.rules.field import windowed
from adjointbackmap.rules.kernels import Convolution
from adjointbackmap.rules.moving import PixelShuffle, Slice
from adjointbackmap.rules.padding import Replicate, sides
from adjointbackmap.rules.pooling import AveragePooling, Interpolation, MaxPooling


def around(operation):
    """A convolution, the operation, and a convolution of stride 2, on 2 x 12 x 12."""

    def build():
        parts = {"first": nn.Conv2d(2, 4, 3, padding=1), "last": nn.LazyConv2d(2, 3, 2, 1)}
        net = Net(lambda net, x: net.last(operation(net.first(x))), **parts)
        net(torch.zeros(1, 2, 12, 12))
        return net, (2, 12, 12)

    return build


def nearest(**to):
    """Interpolation to the nearest."""
    return around(lambda x: F.interpolate(x, **to))


# faults


def ratio_of_sizes(monkeypatch):
    """An interpolation that takes 3.1 for 3, as the sizes have it."""
    reach = [[v, v] for v in (Fraction(1, 3), Fraction(-2, 3), 0)]
    monkeypatch.setattr(Interpolation, "field", lambda self, field: windowed(field, *reach))


def padding_forgotten(monkeypatch):
    """A window that starts at the first position, though the map is padded."""
    reach = Convolution.reach
    monkeypatch.setattr(Convolution, "reach", lambda self: (reach(self)[0], [0, 0], [2, 2]))


def start_forgotten(monkeypatch):
    """A slice that starts at the first position."""
    reach = Slice.reach
    monkeypatch.setattr(Slice, "reach", lambda self: (reach(self)[0], [0, 0], [0, 0]))


def dilation_forgotten(monkeypatch):
    """A window as large as one without dilation."""
    monkeypatch.setattr(
        MaxPooling, "reach", lambda self: (self.stride, [0, 0], [n - 1 for n in self.size])
    )


def cut_taken_for_padding(monkeypatch):
    """A padding whose negative numbers count as positions that were added."""

    def wrong(self, field):
        before, after = sides(self.args[0], self.axes)
        lows = [-b - a for b, a in zip(before, after, strict=True)]
        return windowed(field, [1, 1], lows, [0, 0])

    monkeypatch.setattr(Replicate, "field", wrong)


def edges_forgotten(monkeypatch):
    """An average that counts the padding: the fields are right, only windows are wrong."""
    monkeypatch.setattr(
        AveragePooling,
        "border_correction",
        lambda self, shape, like: like.new_ones(1, 1, *like.shape[2:]),
    )


def origin_forgotten(monkeypatch):
    """Finer positions on windows that start elsewhere."""
    monkeypatch.setattr(PixelShuffle, "origin", lambda self, first: [2 * i + 1 for i in first])


PLANTED = {
    ratio_of_sizes: nearest(scale_factor=3.1),
    padding_forgotten: around(lambda x: x),
    start_forgotten: around(lambda x: x[:, :, ::2, 1:]),
    dilation_forgotten: around(lambda x: F.max_pool2d(x, 2, 1, dilation=3)),
    cut_taken_for_padding: around(lambda x: F.pad(x, (-1, 2, -2, 1), mode="replicate")),
    edges_forgotten: around(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    origin_forgotten: around(lambda x: F.pixel_shuffle(x, 2)),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_wrong_geometry_makes_the_trace_fail(monkeypatch, plant):
    """The audit passes, for it sums over whole images; the patches do not."""
    model, x = make(PLANTED[plant])
    abm.trace(model, x)
    plant(monkeypatch)
    abm.audit(abm.trace(model, x, audit=False), x)
    match = (
        r"Hyperplanes on patches must be the whole ones to 1e-10\. "
        r"Got .* first at layer '(first|last)'"
    )
    with pytest.raises(RuntimeError, match=match):
        abm.trace(model, x)


def test_every_layer_that_has_patches_is_checked(traced):
    """Those whose field is smaller than the image, and no other; to rounding."""
    network = traced.network
    image = traced.network.in_shape[1:]
    fields = network.program().fields
    smaller = [
        layer.name
        for layer in network.distinct_layers()
        if fields[layer.value.slot]
        and any(n < m for n, m in zip(layer.receptive_field, image, strict=True))
    ]
    errors = check_patches(network, traced.x[:1])
    assert list(errors) == smaller
    assert all(error <= 1e-12 for error in errors.values())


def test_patches_of_every_operation(operation):
    """The same for one network around each operation."""
    assert all(
        error <= 1e-12 for error in check_patches(operation.network, operation.x[:1]).values()
    )


# geometry that no ratio of sizes shows

RESIZED = {
    "nearest 3.1": {"scale_factor": 3.1},
    "nearest 0.34": {"scale_factor": 0.34},
    "nearest of two factors": {"scale_factor": (2.0, 3.05)},
    "nearest-exact 3.1, computed again": {
        "scale_factor": 3.1,
        "mode": "nearest-exact",
        "recompute_scale_factor": True,
    },
    "bilinear 2.05": {"scale_factor": 2.05, "mode": "bilinear"},
    "bilinear 2 with corners": {"scale_factor": 2.0, "mode": "bilinear", "align_corners": True},
    "bicubic to a size": {"size": (24, 36), "mode": "bicubic"},
}


@pytest.mark.parametrize("to", RESIZED.values(), ids=RESIZED)
def test_field_of_an_interpolation_is_that_of_its_arguments(to):
    """No unit reads a pixel outside its field, and its patch repeats the model's value."""
    model, x = make(nearest(**to), images=1)
    network = abm.trace(model, x)
    assert_field_contains(true_field(network, x, "last"), declared_field(network, "last"))
    planes = abm.hyperplanes(network, x, "last", units=(slice(None), slice(None), 0))
    assert_close(planes.reconstruct(), planes.value)


def test_field_of_a_whole_factor_is_small():
    """A map twice as fine still has patches: a unit of the last layer sees a part of the image."""
    for to in ({}, {"mode": "bicubic"}):
        network = abm.trace(*make(nearest(scale_factor=2.0, **to)))
        assert max(network.layers["last"].receptive_field) < 12
