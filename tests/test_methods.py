"""Every method gives the same hyperplanes, compact or dense, and the plan gives its reason."""

from dataclasses import replace

import pytest
import torch
from cases import LARGER, MAP, OPERATIONS, make, operation_case

import adjointbackmap as abm
from adjointbackmap.engine import sweep as sweeping
from adjointbackmap.engine.gated_convolution import AliveConvolution
from adjointbackmap.engine.patches import Patches
from adjointbackmap.engine.sweep import Sweep
from adjointbackmap.engine.windows import Group, Span, Windows
from adjointbackmap.planes import planner
from adjointbackmap.planes.planner import plan_queries
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.readout import Readout
from adjointbackmap.rules.kernels import Convolution

MAPS = sorted(name for name, (_, shape) in OPERATIONS.items() if shape == MAP)
CHAIN = "plain-conv-chain"


def assert_same(found, expected):
    """The same hyperplanes to rounding, in every form that they have."""
    for part in ("value", "bias", "image"):
        torch.testing.assert_close(
            getattr(found, part), getattr(expected, part), rtol=1e-11, atol=1e-12
        )
    for form in ("reconstruct", "magnitude"):
        torch.testing.assert_close(
            getattr(found, form)(), getattr(expected, form)(), rtol=1e-11, atol=1e-12
        )
    abm.reconstruction_test(found)


def compare(network, x):
    """Every method at every layer against cotangents, and how many layers took windows."""
    windowed = 0
    for layer in network.distinct_layers():
        mode = "RM2" if "RM2" in layer.modes else "RM0"
        expected = abm.hyperplanes(network, x, layer.name, mode, method="adjoint")
        for method in ("basis", "coloured", "windowed", "windowed-adjoint"):
            if method != "basis" and (len(layer.out_shape) != 3 or len(network.in_shape) != 3):
                with pytest.raises(ValueError, match="method must be one of adjoint, basis for"):
                    network.plan(layer.name, mode, method=method)
                continue
            assert_same(abm.hyperplanes(network, x, layer.name, mode, method=method), expected)
            windowed += method == "windowed"
    return windowed


def test_methods_agree_on_every_network(traced):
    """Cotangents and tangents, whole and windowed, agree on image and bias at every layer."""
    compare(traced.network, traced.x)


@pytest.mark.parametrize("name", MAPS)
def test_methods_agree_on_every_operation(traced_case, name):
    """The same on single operations: strides, dilation, pooling, transposed kernels, slices."""
    traced = traced_case(name)
    assert compare(traced.network, traced.x[:1])


def test_methods_agree_on_a_residual_network(traced_case):
    """The same through strides, shortcuts and pooling, in float32 too."""
    network = traced_case("small-resnet").network
    model, x = make(LARGER["small-resnet"], images=1)
    for layer in ("layer1.0.conv2", "layer2.0.conv1", "layer2.0.downsample.0"):
        assert_same(
            abm.hyperplanes(network, x, layer, "RM2", method="windowed"),
            abm.hyperplanes(network, x, layer, "RM2"),
        )
    model = model.float()
    x = x.float()
    network = abm.trace(model, x)
    abm.reconstruction_test(abm.hyperplanes(network, x, "layer2.0.conv1", "RM2", method="windowed"))


def test_windowed_units_are_those_that_are_asked_for(traced_case):
    """Slices, negative indices, arrays and one unit, as NumPy combines them."""
    traced = traced_case(CHAIN)
    for units in (
        (slice(1, None), -1, slice(None, None, 2)),
        ([0, 2], [1, 3], 1),
        (0, 3, 2),
        (slice(None), 2),
    ):
        expected = abm.hyperplanes(traced.network, traced.x, "2", "RM2", units, method="adjoint")
        assert_same(
            abm.hyperplanes(traced.network, traced.x, "2", "RM2", units, method="windowed"),
            expected,
        )


def test_batches_change_nothing(traced_case, monkeypatch):
    """One pixel's row at a time gives what all at once give."""
    traced = traced_case(CHAIN)
    expected = abm.hyperplanes(traced.network, traced.x, "4", "RM2", method="windowed")
    monkeypatch.setattr(sweeping, "BATCH_NUMBERS", 1)
    assert_same(abm.hyperplanes(traced.network, traced.x, "4", "RM2", method="windowed"), expected)


def test_large_layers_take_windows_and_single_units_cotangents():
    """The plan's choice for all units of a layer and for one, and its line."""
    network = abm.trace(abm.models.build("vgg7").eval(), torch.rand(1, 3, 32, 32), audit=False)
    for layer in ("conv1", "conv3", "conv5"):
        assert network.plan(layer, "RM2").method == "windowed"
    one = network.plan("conv3", "RM2", (0, 0, 0))
    assert (one.method, one.vectors) == ("adjoint", 1)
    assert str(one).startswith("adjoint: 1 cotangents, ")
    assert network.plan("conv1", "RM2", method="basis").vectors == 3 * 32 * 32 + 32


def test_plan_counts_multiply_adds():
    """A 3 x 3 convolution of 2 to 3 channels on 6 x 6 positions: 1,944 for each cotangent."""
    network = abm.trace(torch.nn.Conv2d(2, 3, 3, padding=1).eval(), torch.rand(1, 2, 6, 6))
    plan = network.plan("output", "RM2", (0, slice(None), 0), method="adjoint")
    assert plan.multiply_adds == 6 * (3 * 36 * 2 * 9)
    assert plan.bytes == 6 * (2 * 9 + 3) * 4


def test_compact_parts_are_patches_on_the_receptive_field(traced_case):
    """A patch has the layer's field; its corner may lie outside the image, filled with zeros."""
    traced = traced_case(CHAIN)
    planes = abm.hyperplanes(traced.network, traced.x, "2", "RM2", method="windowed")
    part = planes.image_part
    assert isinstance(part, Patches)
    assert part.values.shape[-2:] == traced.network.layers["2"].receptive_field == (5, 5)
    assert part.corners[0, 0, 0].tolist() == [-1, -1]
    assert not part.values[:, 0, :, :, :, 0].any()
    labelled = planes.to_xarray()
    assert labelled["image"].dims[-3:] == ("channel", "patch_row", "patch_col")
    assert labelled["top"].values[0, 0, 0] == -1
    torch.testing.assert_close(
        torch.as_tensor(planes.to_xarray(dense=True)["image"].values), planes.image
    )


def test_dense_part_larger_than_memory_is_refused_by_its_compact_name():
    """The compact part fits, the dense one does not."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1)).eval()
    x = torch.rand(1, 3, 32, 32)
    planes = abm.hyperplanes(abm.trace(model, x), x, "0", "RM2", memory="1MiB")
    with pytest.raises(ValueError, match="image_part"):
        _ = planes.image
    abm.reconstruction_test(planes)


def test_unknown_method_is_refused(traced_case):
    """One sentence with what there is."""
    with pytest.raises(
        ValueError,
        match=r"one of adjoint, basis, coloured, windowed, windowed-adjoint for .*Got 'fast'",
    ):
        traced_case(CHAIN).network.plan("4", "RM2", method="fast")


@pytest.mark.parametrize(
    ("conv", "shape", "axes"),
    [(torch.nn.Conv1d, (2, 9), "1 axis"), (torch.nn.Conv3d, (2, 4, 4, 4), "3 axes")],
)
def test_plan_says_why_series_and_volumes_have_no_windows(conv, shape, axes):
    """Maps with one axis or three take cotangents or unit tangents."""
    network = abm.trace(torch.nn.Sequential(conv(2, 3, 3)).eval(), torch.rand(1, *shape))
    plan = network.plan("0", "RM2")
    assert plan.method in ("adjoint", "basis")
    assert f"these need maps with 2 axes, this one has {axes}" in str(plan)
    assert not network.plan("0", "RM1").note


def test_modes_of_summed_units_have_cotangents_only(traced_case):
    """RM3 and RM1 are sums over positions, which tangents of units do not give."""
    network = traced_case(CHAIN).network
    assert network.plan("2", "RM1").method == "adjoint"
    with pytest.raises(ValueError, match="method must be one of adjoint for layer '2' in RM3"):
        network.plan("2", "RM3", method="windowed")


KERNELS = sorted(name for name in MAPS if name.startswith(("conv", "transposed")))


@pytest.mark.parametrize("name", KERNELS)
def test_single_kernels_by_every_method(name, monkeypatch):
    """RM4 by unit cotangents, shared rows and tangents of the kernel's input; RM3 by rows."""
    model, x = make(lambda: operation_case(name), images=2)
    network = abm.trace(model, x, audit=False)
    for layer in (layer for layer in network.layers.values() if "RM4" in layer.modes):
        units = (slice(1, 3), slice(None), slice(None), slice(None))
        for mode, chosen in (("RM4", units), ("RM3", None)):
            shared = abm.hyperplanes(network, x, layer.name, mode, chosen, method="adjoint")
            with monkeypatch.context() as patched:
                patched.setattr(Readout, "rows", None)
                expected = abm.hyperplanes(network, x, layer.name, mode, chosen, method="adjoint")
            assert_same(shared, expected)
            if mode == "RM4" and network.kernel(layer).rule.groups == 1:
                for method in ("basis", "coloured", "windowed"):
                    assert_same(
                        abm.hyperplanes(network, x, layer.name, mode, chosen, method=method),
                        expected,
                    )


def test_kernels_share_the_rows_of_their_in_channel():
    """RM3, 4 in-channels, 32 out-channels: nine cotangents per in-channel, not per kernel."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 32, 3)
    ).eval()
    network = abm.trace(model, torch.rand(1, 3, 8, 8))
    assert network.plan("2", "RM3").vectors == 4 * 9
    assert network.plan("2", "RM3", (0, slice(0, 3))).vectors == 3
    assert network.plan("2", "RM4", (1, 1)).vectors <= 4 * 9


def test_several_layers_share_a_sweep(traced_case):
    """A list of layers gives what each layer alone gives, each in its own mode."""
    traced = traced_case(CHAIN)
    names = [layer.name for layer in traced.network.distinct_layers()]
    found = abm.hyperplanes(traced.network, traced.x, names)
    assert list(found) == names
    for name, planes in found.items():
        assert planes.mode == ("RM0" if len(traced.network.layers[name].out_shape) == 1 else "RM2")
        assert_same(
            planes, abm.hyperplanes(traced.network, traced.x, name, planes.mode, method="adjoint")
        )


def test_one_sweep_serves_every_map_of_vgg7():
    """The plan for all layers at once takes windows where each layer alone might not."""
    network = abm.trace(abm.models.build("vgg7").eval(), torch.rand(1, 3, 32, 32), audit=False)
    first = Query.of_any_image(network, "conv1")
    queries = [first, *map(first.at_layer, ("conv3", "conv5"))]
    assert [plan.method for plan in plan_queries(queries)] == ["windowed"] * 3
    asked = [replace(query, method="basis") for query in queries]
    assert len({plan.method for plan in plan_queries(asked)}) == 1


# windowed cotangents


def test_some_units_of_a_large_image_take_windowed_cotangents():
    """Four positions of a deep layer cost less on the windows that they see."""
    convs = [torch.nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16, 16)]
    parts = [part for conv in convs for part in (conv, torch.nn.ReLU())]
    network = abm.trace(torch.nn.Sequential(*parts).eval(), torch.rand(1, 3, 64, 64), audit=False)
    units = (slice(20, 22), slice(20, 22))
    planned = network.plan("6", "RM2", units)
    whole = network.plan("6", "RM2", units, method="adjoint")
    assert planned.method == "windowed-adjoint"
    assert str(planned).startswith("windowed-adjoint: 64 cotangents, ")
    assert planned.vectors == whole.vectors
    assert planned.multiply_adds < whole.multiply_adds / 10


def test_plan_says_that_windows_save_nothing():
    """A unit whose field is the image."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Conv2d(2, 2, 3))
    network = abm.trace(model.eval(), torch.rand(1, 1, 4, 4))
    assert str(network.plan("1", "RM2", 0)).endswith("(each unit sees the whole image)")
    assert "whole image" not in str(network.plan("0", "RM2", 0))


@pytest.mark.parametrize("units", [None, (slice(0, 4, 3), [0, 2, 3], 1), (-1, -1, 0)], ids=str)
@pytest.mark.parametrize("side", [1, 4])
def test_tiles_of_any_side_give_the_same(traced_case, monkeypatch, units, side):
    """Positions apart or together, at the border and inside; several images have gates each."""
    monkeypatch.setattr(planner, "tilings", lambda query: [planner.Tiling.of(query, side)])
    traced = traced_case("small-resnet")
    _, x = make(LARGER["small-resnet"], images=2)
    for layer in ("layer1.0.conv2", "layer2.0"):
        expected = abm.hyperplanes(traced.network, x, layer, "RM2", units, method="adjoint")
        found = abm.hyperplanes(traced.network, x, layer, "RM2", units, method="windowed-adjoint")
        assert_same(found, expected)


# the sweep itself


def test_windows_stay_smaller_than_maps_until_they_cover_them(traced_case):
    """The first layers are windows, the last are whole maps."""
    model = torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(5))).eval()
    x = torch.rand(1, 1, 8, 8)
    network = abm.trace(model, x)
    values = [network.layers[str(i)].value for i in range(5)]
    sweep = Sweep(abm.record_pattern(network, x), values)
    group = next(iter(sweep.groups()))
    found = sweep.run(group)
    kinds = [isinstance(found[v.slot], Windows) for v in values]
    assert kinds == [True, True, True, False, False]
    assert found[values[1].slot].spans[0] == Span(-2, 5, 1)


def test_strided_pixels_form_groups_of_one_geometry(traced_case):
    """Two halvings: sixteen groups of pixels four apart, which together are all pixels."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3, 2, 1), torch.nn.MaxPool2d(2), torch.nn.Conv2d(2, 2, 1)
    ).eval()
    x = torch.rand(1, 1, 10, 10)
    network = abm.trace(model, x)
    groups = list(Sweep(abm.record_pattern(network, x), [network.layers["2"].value]).groups())
    assert len(groups) == 16
    assert {tuple(p.step for p in g.pixels) for g in groups} == {(4, 4)}
    places = torch.cat([g.places() for g in groups]).tolist()
    assert sorted(map(tuple, places)) == [(r, c) for r in range(10) for c in range(10)]


def test_pixel_that_reaches_nothing_has_no_tangent():
    """A 1 x 1 convolution of stride 2 leaves out three pixels of four."""
    model = torch.nn.Conv2d(1, 1, 1, 2).eval()
    x = torch.rand(1, 1, 4, 4)
    network = abm.trace(model, x)
    value = network.layers["output"].value
    sweep = Sweep(abm.record_pattern(network, x), [value])
    assert sweep.run(Group((range(1, 4, 2), range(0, 4, 2))))[value.slot] is None
    assert sweep.run(Group((range(0, 4, 2), range(0, 4, 2))))[value.slot] is not None


# what is dead


@pytest.mark.parametrize(
    "geometry",
    [{}, {"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2, "padding": 2}],
    ids=str,
)
def test_dead_channels_are_left_out_of_a_convolution(geometry):
    """Only what the gate lets through is multiplied: the same as the convolution of gated maps."""
    conv = torch.nn.Conv2d(4, 5, 3, bias=False, **geometry).double()
    gate = (torch.rand(1, 4, 7, 8) < 0.3).double()
    gate[:, :, :4, :4] = 0
    tangents = torch.randn(6, 4, 7, 8).double() * gate
    rule = Convolution(conv.weight.detach(), conv.stride, conv.padding, conv.dilation)
    alive = AliveConvolution(rule, gate)
    torch.testing.assert_close(
        alive.forward(tangents), conv(tangents).detach(), rtol=1e-12, atol=1e-12
    )
    assert sum(len(rows) for rows in alive.rows) < alive.kernel.shape[0] * len(alive.rows) / 2


def test_sweep_leaves_out_what_is_dead():
    """On whole maps behind a ReLU that is mostly zero, the sweep takes the shorter product."""
    convs = [torch.nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 4))]
    model = torch.nn.Sequential(convs[0], convs[1], torch.nn.ReLU(), convs[2]).eval().double()
    convs[1].bias.data.sub_(0.5)
    x = torch.rand(1, 3, 5, 5).double()
    network = abm.trace(model, x)
    sweep = Sweep(abm.record_pattern(network, x), [network.layers["3"].value])
    assert len(sweep.dead) == 1
    for group in sweep.groups():
        sweep.run(group)
    assert list(sweep.alive) == list(sweep.dead)
    assert_same(
        abm.hyperplanes(network, x, "3", "RM2", method="windowed"),
        abm.hyperplanes(network, x, "3", "RM2"),
    )
