"""One unit over a photo, and what adds up to its value: compared with sums that are written out."""

import warnings

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from torch import nn

import adjointbackmap as abm
from adjointbackmap import plots
from adjointbackmap.planes.thumbnails import limit_of, overlay, unit_interval
from adjointbackmap.plots.backdrop import backdrop


def double(*layers):
    """A sequential network in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*layers).double().eval()


@pytest.fixture(scope="module")
def network():
    """Two convolutions with biases and a linear layer, on 12 x 16 pixels, in float64."""
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, 2), nn.ReLU())
    model = double(*parts, nn.Flatten(), nn.Linear(120, 4))
    for bias in (model[0].bias, model[3].bias, model[6].bias, model[1].bias):
        nn.init.normal_(bias, generator=torch.Generator().manual_seed(1))
    return abm.trace(model, torch.zeros(1, 3, 12, 16, dtype=torch.float64))


@pytest.fixture(scope="module")
def photo():
    """A photo of 50 x 60 pixels, and what the network takes of it."""
    rng = np.random.default_rng(0)
    return abm.image(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8), size=(12, 16))


@pytest.fixture(scope="module")
def planes(network, photo):
    """Two units of the second convolution."""
    units = (2, slice(1, 6, 4), 3)
    return abm.hyperplanes(network, photo.double(), "3", units=units)


def render(drawing):
    """Lay a drawing out as saving it would; matplotlib warns where something does not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.figure.draw_without_rendering()
    return drawing


# one of several hyperplanes


def test_single_hyperplane_is_one_of_them(network, photo, planes):
    x = photo.double()
    one = planes.single(1)
    assert one.place == {"out_row": 2, "out_col": 5, "out_channel": 3}
    assert one.name == "3, row 2, column 5, channel 3"
    assert torch.equal(one.image, planes.image[0, 1])
    assert torch.equal(one.bias, planes.bias[0, 1])
    expected = network.model[:4](x)[0, 3, 2, 5].item()
    assert one.value == pytest.approx(expected, rel=1e-14)
    assert one.sum() == pytest.approx(expected, rel=1e-12)
    assert one.field == (4, 10, 5, 5)  # stride 2, kernels of 3: five pixels from twice the place
    slow = torch.func.jacrev(lambda x: network.model[:4](x)[0, 3, 2, 5])(x)[0]
    torch.testing.assert_close(one.image, slow)


def test_each_image_and_its_own_units_are_found(network):
    x = torch.rand(2, 3, 12, 16, dtype=torch.float64)
    places = torch.tensor([[[0, 1, 2]], [[3, 4, 0]]])
    planes = abm.hyperplanes(network, x, "3", units=places)
    one = planes.single(image=1)
    assert list(one.place.values()) == [3, 4, 0]
    assert one.field == (6, 8, 5, 5)
    assert one.value == network.model[:4](x)[1, 0, 3, 4].item()
    assert torch.equal(one.image, planes.image[1, 0])
    assert one.image[:, :6].abs().max() == 0


def test_units_that_are_not_one_are_refused(planes):
    with pytest.raises(ValueError, match=r"one of the 2 units.*\(2,\). Got none: choose one"):
        planes.single()
    with pytest.raises(ValueError, match=r"an index into \(2,\)\. Got 2: choose one, as in"):
        planes.receipt(2)
    with pytest.raises(ValueError, match=r"Got slice"):
        planes.single(slice(2))
    with pytest.raises(ValueError, match=r"image must be from 0 to 0\. Got 1: choose"):
        planes.single(0, image=1)


# receipts


def test_receipt_sums_to_what_the_model_computes(network, photo, planes):
    """Lines are sums of x * H over a box, written out, and of b * H_b; all sum to the value."""
    found = planes.receipt(0)
    one = planes.single(0)
    added = (photo.double()[0] * one.image).numpy()
    regions = [line for line in found.lines if line.kind == "pixels"]
    assert len(regions) == 9
    covered = np.zeros((12, 16), int)
    for line in regions:
        (row, column), (rows, columns) = line.box
        covered[row : row + rows, column : column + columns] += 1
        part = added[:, row : row + rows, column : column + columns].sum()
        assert line.amount == pytest.approx(part, abs=1e-14)
    assert covered.sum() == covered.max() * 25 == 25  # the field, each pixel once
    biases = {line.name: line.amount for line in found.lines if line.kind == "biases"}
    parts = network.biases
    assert list(biases) == ["0.bias", "1", "3.bias"]
    for name, amount in biases.items():
        part = parts[name]
        assert amount == pytest.approx(float(part.value @ one.bias[part.slice]), abs=1e-14)
    assert found.total == pytest.approx(
        network.model[:4](photo.double())[0, 3, 2, 1].item(), rel=1e-12
    )
    assert abs(found.error) < 1e-13
    assert found.of("pixels") + found.of("biases") == pytest.approx(found.total)


def test_receipt_by_channel(network, photo):
    planes = abm.hyperplanes(network, photo.double(), "6", units="predicted")
    found = planes.receipt(by="channel")
    added = photo.double()[0] * planes.image[0]
    assert [line.name for line in found.lines[:3]] == ["red", "green", "blue"]
    amounts = [line.amount for line in found.lines[:3]]
    np.testing.assert_allclose(amounts, added.sum((1, 2)).numpy())
    assert found.value == network.model(photo.double()).max().item()
    assert abs(found.error) < 1e-12


@pytest.mark.parametrize("mode", ["RM4", "RM3", "RM1"])
def test_receipts_of_other_modes_close(network, photo, mode):
    planes = abm.hyperplanes(network, photo.double(), "3", mode)
    found = planes.receipt((1,) * len(planes.units.shape))
    assert abs(found.error) < 1e-12
    assert found.value != 0


def test_many_biases_are_one_line(network, photo):
    from adjointbackmap.planes.receipts import receipt_of

    planes = abm.hyperplanes(network, photo.double(), "6", units=2)
    whole = receipt_of(planes)
    assert [line.name for line in whole.lines[9:]] == ["0.bias", "1", "3.bias", "6.bias"]
    found = receipt_of(planes, most=2)
    amounts = {line.name: line.amount for line in whole.lines[9:]}
    largest = sorted(amounts, key=lambda name: -abs(amounts[name]))[:2]
    assert {line.name for line in found.lines[9:]} == {*largest, "2 other parts"}
    assert found.total == pytest.approx(whole.total, rel=1e-14)
    with pytest.raises(ValueError, match=r"most must be a positive.*Got 0: give such as 12"):
        receipt_of(planes, most=0)
    with pytest.raises(ValueError, match=r"by must be region or channel\. Got 'pixel': choose"):
        planes.receipt(by="pixel")


OTHER_SHAPES = {
    "line": (nn.Conv1d(2, 3, 3), (2, 20), 9, "columns 0-2"),
    "flat": (nn.Linear(7, 3), (7,), 7, "features 0-0"),
    "volume": (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 8, "depths 0-1, rows 0-1, columns 0-1"),
}


@pytest.mark.parametrize("kind", OTHER_SHAPES)
def test_receipts_of_inputs_of_other_shapes(kind):
    layer, shape, lines, name = OTHER_SHAPES[kind]
    network = abm.trace(double(layer, nn.ReLU()), torch.zeros(1, *shape, dtype=torch.float64))
    x = torch.rand(shape, dtype=torch.float64)
    planes = abm.hyperplanes(network, x, "0")
    found = planes.receipt((0,) * len(planes.units.shape))
    assert len(found.lines) == lines + 1
    assert found.lines[0].name == name
    assert abs(found.error) < 1e-14
    render(found.plot())
    with pytest.raises(ValueError, match=r"over images with rows and columns|one picture"):
        planes.plot(x)


def test_waterfall_draws_the_lines(planes, photo):
    """Each bar begins where the one above it ends; the last two are sum and value."""
    found = planes.receipt(0)
    drawing = render(found.plot(photo))
    axes = drawing.figure.axes[-1]
    bars = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert len(bars) == len(found.lines) + 2
    at = 0.0
    for bar, line in zip(bars, found.lines, strict=False):
        assert bar.get_x() == pytest.approx(at)
        assert bar.get_width() == pytest.approx(line.amount)
        at += line.amount
    assert [bar.get_width() for bar in bars[-2:]] == [found.total, found.value]
    low, high = axes.get_xlim()
    assert all(low < bar.get_x() < high for bar in bars)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "1   rows 4-5, columns 2-3"
    assert labels[-2:] == ["sum", "model's value"]
    assert f"difference {found.error:.1e}" in drawing.caption


# over the photo


def test_field_is_framed_in_the_photos_own_pixels(planes, photo):
    drawing = render(planes.plot(photo, unit=0))
    axes = drawing.figure.axes[0]
    assert axes.images[0].get_array().shape == (50, 60, 3)
    frames = [p.get_bbox().bounds for p in axes.patches]
    done = photo.preparation
    row, column, rows, columns = done.in_original((4, 2, 5, 5))
    assert frames[-1] == pytest.approx((column - 0.5, row - 0.5, columns, rows))
    assert rows == pytest.approx(5 * 50 / done.resized[0])
    assert drawing.numbers["fields"].tolist() == [[4, 2, 5, 5]]
    np.testing.assert_array_equal(drawing.numbers["map_0"], planes.image[0, 0, :, 4:9, 2:7])


def test_contributions_are_summed_over_the_channels(planes, photo):
    drawing = render(planes.plot(photo, "contributions", unit=1))
    expected = (photo.double()[0] * planes.image[0, 1]).sum(0)
    np.testing.assert_allclose(drawing.numbers["map_0"], expected[None, 4:9, 10:15])
    pixels = planes.receipt(1).of("pixels")
    assert drawing.numbers["map_0"].sum() == pytest.approx(pixels)


@pytest.mark.parametrize(("what", "panels"), [("hyperplane", 3), ("channels", 4), ("spectrum", 6)])
def test_each_unit_has_a_row(planes, photo, what, panels):
    """The spectrum has a bar of colours too."""
    drawing = render(planes.plot(photo, what))
    rows = 2
    each = panels if what != "spectrum" else panels - 1
    assert len(drawing.figure.axes) == rows * each + (what == "spectrum")
    headings = [axes.get_title() for axes in drawing.figure.axes if "row 2" in axes.get_title()]
    assert len(headings) == 2
    assert "99.5th percentile" in drawing.caption


def test_only_the_first_units_are_drawn(network, photo):
    planes = abm.hyperplanes(network, photo.double(), "3", "RM1")
    drawing = planes.plot()
    assert drawing.figure.get_suptitle() == "Hyperplane of 3 (RM1), first 4 of 5 units"
    assert drawing.numbers["fields"].tolist() == [[0, 0, 12, 16]] * 4


def test_clipping_is_said(network, photo):
    """Of 576 numbers, those beyond the percentile are counted on the picture."""
    planes = abm.hyperplanes(network, photo.double(), "6", units=0)
    part = planes.image[0].abs()
    nonzero = part[part > 0]
    limit = np.percentile(nonzero.numpy(), 99.5)
    beyond = 100 * float((nonzero > limit).double().mean())
    drawing = planes.plot(photo)
    assert drawing.numbers["limits"].tolist() == pytest.approx([limit])
    text = drawing.figure.axes[2].get_xlabel().replace("\n", " ")
    assert text == f"±{limit:.3g}; {beyond:.2g} % clipped, largest {part.max():.3g}"


def test_colours_over_the_picture_are_opaque_where_the_map_is_large():
    colours = overlay(np.array([[-2.0, 0.0, 0.5, 4.0]]), 2.0)
    assert colours[0, :, 3].tolist() == [1, 0, 0.25, 1]
    assert colours[0, 0, 2] > colours[0, 0, 0]  # lowers: blue
    assert colours[0, 3, 0] > colours[0, 3, 2]  # raises: red
    assert limit_of(np.zeros((2, 2))) == 1


def test_picture_of_an_input_keeps_what_is_in_the_unit_interval():
    inside = torch.tensor([[[0.2, 0.4]]])
    assert np.array_equal(unit_interval(inside), inside.double().numpy())
    assert unit_interval(torch.tensor([[[-1.0, 3.0]]])).tolist() == [[[0, 1]]]
    assert unit_interval(torch.rand(5, 2, 2)).shape == (1, 2, 2)


def test_what_cannot_be_drawn_is_refused(planes, photo):
    with pytest.raises(ValueError, match=r"what must be one of hyperplane, contributions.*'H'"):
        planes.plot(photo, "H")
    with pytest.raises(TypeError, match=r"over must be what adjointbackmap.image gave.*Got str"):
        planes.plot("photo.jpg")
    with pytest.raises(
        ValueError, match=r"picture of the image's 12 x 16 pixels\. Got \(1, 3, 8, 8"
    ):
        backdrop(torch.zeros(1, 3, 8, 8), planes.x[0])


def test_nothing_shows_a_tensor(planes):
    one = planes.single(0)
    for shown in (one, planes.receipt(0)):
        assert "tensor(" not in repr(shown)
        assert len(repr(shown)) < 1200
        assert shown._repr_html_().count("data:image/png") == 3
    assert f"value of the model: {one.value:.6g}" in repr(one)


def test_plots_are_functions_too(planes, photo):
    assert plots.over_image(planes, photo).caption == planes.plot(photo).caption
    assert plots.receipt(planes.receipt(0)).numbers["total"] == planes.receipt(0).total


def test_a_unit_without_biases_has_a_receipt_of_pixels():
    """The first layer of a network whose convolution has no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.rand(1, 3, 6, 6)
    network = abm.trace(model, x)
    found = abm.hyperplanes(network, x, "0", "RM2", units=(1, 2, 3)).receipt()
    assert {line.kind for line in found.lines} == {"pixels"}
    assert found.total == pytest.approx(float(model[0](x).detach()[0, 3, 1, 2]), abs=1e-6)
