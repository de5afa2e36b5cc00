"""Pictures show the numbers, compared panels share one scale, files lie side by side."""

import inspect
import warnings
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import adjointbackmap as abm
from adjointbackmap import plots
from adjointbackmap.engine.patches import Patches
from adjointbackmap.plots.units import receptive_fields
from adjointbackmap.spectra import high_share, log_amplitude, radial_energy

CLASSES = ("cat", "dog", "frog", "ship")


@pytest.fixture(scope="module")
def small():
    """A network of two convolutions with biases and a linear layer, and an image."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 9, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    model = nn.Sequential(*layers).eval()
    x = torch.rand(1, 3, 8, 8)
    network = abm.trace(model, x)
    return SimpleNamespace(
        network=network, x=x, planes=lambda *args: abm.hyperplanes(network, x, *args)
    )


def render(drawing):
    """Lay a drawing out as saving it would; matplotlib warns where something does not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.figure.draw_without_rendering()
    return drawing


def images_of(drawing, dims):
    """Arrays of the panels with this many dimensions: 3 for colours, 2 for a colour map."""
    drawn = [
        image
        for axes in drawing.figure.axes
        for image in axes.images
        if axes.get_label() != "<colorbar>"
    ]
    return [np.asarray(image.get_array()) for image in drawn if image.get_array().ndim == dims]


def limits_of(drawing):
    return {
        image.get_clim()
        for axes in drawing.figure.axes
        for image in axes.images
        if image.get_array().ndim == 2
    }


def colours(parts, low, high):
    return ((np.moveaxis(np.asarray(parts), -3, -1) - low) / (high - low)).clip(0, 1)


def end_of(parts):
    """The 99.5th percentile of the magnitudes that are not zero."""
    magnitudes = np.abs(np.asarray(parts, dtype=float))
    return np.percentile(magnitudes[magnitudes > 0], 99.5)


# scales


def test_zero_is_at_the_centre_of_a_signed_scale():
    """Both signs reach equally far, also for maps of one sign and of zeros."""
    for part, limit in ((np.array([-3.0, 1.0]), 3), (np.array([1.0, 2.0]), 2), (np.zeros(2), 1)):
        scale = plots.Scale.of([part])
        assert (scale.low, scale.high) == (-limit, limit)
        assert scale.colours(np.zeros((3, 1, 1))).tolist() == [[[0.5, 0.5, 0.5]]]


def test_clipped_scale_ends_at_the_percentile_and_says_what_is_beyond():
    """Zeros do not count; a largest number does not make all others grey."""
    part = np.concatenate([np.zeros(500), np.linspace(-1, 1, 1000), [80.0]])
    scale = plots.Scale.clipped([part[:700], part[700:]])
    assert (scale.low, scale.high) == (-end_of(part), end_of(part))
    assert scale.largest == 80
    assert scale.beyond == (abs(part) > scale.high).sum() / 1001
    assert f"{100 * scale.beyond:.2g} % of the numbers are beyond, the largest 80" in scale.words(
        "m"
    )
    assert "beyond" not in plots.Scale.clipped([np.ones(5)]).words("m")


def test_normalised_scale_reaches_from_the_smallest_to_the_largest():
    """The study's: one minimum and maximum for all panels; a constant map divides by no zero."""
    scale = plots.Scale.of([np.full((3, 1, 1), -1.0), np.full((3, 1, 1), 4.0)], normalised=True)
    assert scale.colours(np.array([-1.0, 1.5, 4.0]).reshape(3, 1, 1)).tolist() == [[[0, 0.5, 1]]]
    assert np.isfinite(
        plots.Scale.of([np.ones((3, 2, 2))], normalised=True).colours(np.ones((3, 2, 2)))
    ).all()
    assert "normalised to [0, 1]" in scale.words("units")


def test_centred_is_the_signed_scale():
    part = torch.randn(3, 4, 5)
    np.testing.assert_allclose(plots.centred(part, 2.0), colours(part, -2, 2).clip(0, 1))


# all classes


@pytest.mark.parametrize("normalised", [False, True])
def test_classes_are_drawn_on_one_scale(small, normalised):
    """The colours of each panel are its numbers, scaled alike; so are the bias parts."""
    planes = small.planes("5", "RM0")
    drawing = render(plots.class_hyperplanes(planes, CLASSES, small.x[0], "title", normalised))
    image = planes.image[0].numpy()
    bias = planes.bias[0].numpy()
    low, high = (image.min(), image.max()) if normalised else (-end_of(image), end_of(image))
    np.testing.assert_array_equal(drawing.numbers["image"], image)
    np.testing.assert_array_equal(drawing.numbers["bias"], bias)
    shown_input, *parts = images_of(drawing, 3)
    np.testing.assert_allclose(shown_input, small.x[0].movedim(0, -1))
    np.testing.assert_allclose(parts, colours(image, low, high), atol=1e-6)
    np.testing.assert_array_equal([part.flatten() for part in images_of(drawing, 2)], bias)
    ((low, high),) = limits_of(drawing)
    assert (low, high) == pytest.approx(
        (bias.min(), bias.max()) if normalised else (-end_of(bias), end_of(bias))
    )
    assert ("normalised" in drawing.caption) == normalised


def test_best_class_is_bold_and_headings_have_the_values(small):
    planes = small.planes("5", "RM0")
    drawing = plots.class_hyperplanes(planes, CLASSES, small.x[0], "title")
    titles = {
        axes.get_title(): axes.title.get_fontweight()
        for axes in drawing.figure.axes
        if "\n" in axes.get_title()
    }
    assert list(titles) == [
        f"{name}\n{value:.2f}"
        for name, value in zip(CLASSES, planes.value[0].tolist(), strict=True)
    ]
    assert [list(titles.values()).index("bold")] == [int(planes.value[0].argmax())]
    assert list(titles.values()).count("bold") == 1


def test_network_without_biases_has_no_bias_panels():
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 4, bias=False)
    ).eval()
    x = torch.rand(1, 3, 4, 4)
    planes = abm.hyperplanes(abm.trace(model, x), x, "2", "RM0")
    drawing = render(plots.class_hyperplanes(planes, CLASSES, x[0], "title"))
    assert (len(images_of(drawing, 3)), len(images_of(drawing, 2))) == (5, 0)
    assert "bias" not in drawing.caption


def test_classes_that_do_not_fit_are_refused(small):
    for wrong, name in ((None, "NoneType"), ("cat", "str")):
        with pytest.raises(TypeError, match=rf"must be a list with a name .* Got {name}: give"):
            # unwrapped: the tests check types of arguments too
            inspect.unwrap(plots.class_hyperplanes)(
                small.planes("5", "RM0"), wrong, small.x[0], "title"
            )
    with pytest.raises(
        ValueError, match=r"Classes must be those of the RM0 hyperplanes\. Got 3 for 4 of RM0"
    ):
        plots.class_hyperplanes(small.planes("5", "RM0"), CLASSES[:3], small.x[0], "title")
    with pytest.raises(ValueError, match=r"Got 4 for 4 of RM1"):
        plots.class_hyperplanes(small.planes("0", "RM1"), CLASSES, small.x[0], "title")


# units and kernels


def test_units_of_two_dimensions_are_rows_and_columns(small):
    """Kernels of one channel lie at their positions, under the layer's rows and columns."""
    planes = small.planes("2", "RM2", (slice(0, 4, 2), slice(1, 4), 5))
    drawing = render(plots.unit_hyperplanes(planes, "title"))
    np.testing.assert_array_equal(drawing.numbers["image"], planes.image[0].flatten(0, 1))
    np.testing.assert_array_equal(drawing.numbers["value"], planes.value[0].flatten())
    assert drawing.numbers["out_row"].tolist() == [0, 0, 0, 2, 2, 2]
    assert drawing.numbers["out_col"].tolist() == [1, 2, 3, 1, 2, 3]
    limit = end_of(planes.image)
    np.testing.assert_allclose(
        images_of(drawing, 3), colours(drawing.numbers["image"], -limit, limit), atol=1e-6
    )
    panels = drawing.figure.axes
    assert [axes.get_ylabel() for axes in panels] == ["row 0", "", "", "row 2", "", ""]
    assert [axes.get_title().partition("\n")[0] for axes in panels[:3]] == [
        "column 1",
        "column 2",
        "column 3",
    ]
    assert [axes.get_title() for axes in panels[3:]] == [
        f"{v:.3g}" for v in planes.value[0, 1].tolist()
    ]
    assert panels[1].get_subplotspec().colspan.start == 1
    assert panels[3].get_subplotspec().rowspan.start == 1


def test_units_by_channel_follow_one_another(small):
    """Only where they differ is named; at most 64 are drawn, and the heading says of how many."""
    drawing = render(plots.unit_hyperplanes(small.planes("2", "RM2", (1, 2)), "title"))
    assert [axes.get_title().partition("\n")[0] for axes in drawing.figure.axes] == [
        str(i) for i in range(9)
    ]
    assert "headings: channel and value" in drawing.caption
    drawing = plots.unit_hyperplanes(small.planes("2", "RM2"), "title")
    assert len(drawing.figure.axes) == len(drawing.numbers["image"]) == plots.MOST_PANELS
    assert drawing.figure.get_suptitle() == "title (first 64 of 144 units)"


def test_each_images_own_units_and_one_unit_are_drawn(small):
    own = small.planes("2", "RM2", torch.tensor([[[0, 1, 2], [3, 3, 3]]]))
    drawing = render(plots.unit_hyperplanes(own, "title"))
    assert [axes.get_title().partition("\n")[0] for axes in drawing.figure.axes] == [
        "0, 1, 2",
        "3, 3, 3",
    ]
    one = render(plots.unit_hyperplanes(small.planes("2", "RM2", (0, 1, 2)), "title", outline=True))
    assert one.numbers["image"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("mode", ["RM3", "RM4"])
def test_kernels_are_in_channels_by_out_channels(small, mode):
    """Nine out-channels are cut to eight columns."""
    units = (slice(None),) * 2 if mode == "RM3" else (1, 2)
    planes = small.planes("2", mode, units)
    drawing = render(plots.kernel_hyperplanes(planes, "title"))
    np.testing.assert_array_equal(drawing.numbers["image"], planes.image[0][:, :8].flatten(0, 1))
    np.testing.assert_array_equal(drawing.numbers["value"], planes.value[0][:, :8].flatten())
    assert drawing.figure.get_suptitle() == "title (first 4 x 8 of 4 x 9 units)"
    for panel, part in zip(images_of(drawing, 3), drawing.numbers["image"], strict=True):
        limit = end_of(part)  # each on its own scale
        np.testing.assert_allclose(panel, colours(part, -limit, limit), atol=1e-6)
    printed = [axes.get_xlabel() for axes in drawing.figure.axes]
    assert printed == [f"±{end_of(part):.2g}" for part in drawing.numbers["image"]]
    assert [axes.get_ylabel() for axes in drawing.figure.axes[::8]] == [
        f"in-channel {i}" for i in range(4)
    ]


def test_units_that_are_no_kernels_are_refused(small):
    message = (
        r"Kernels must have the dimensions in_channel and out_channel\. "
        r"Got out_row, out_col, out_channel in RM2"
    )
    with pytest.raises(ValueError, match=message):
        plots.kernel_hyperplanes(small.planes("2", "RM2"), "title")


def outlines(drawing):
    """First row, first column, rows, columns of the rectangle of each panel."""
    found = [
        next(p for p in axes.patches if isinstance(p, Rectangle)) for axes in drawing.figure.axes
    ]
    return [(p.get_y() + 0.5, p.get_x() + 0.5, p.get_height(), p.get_width()) for p in found]


def test_outline_is_the_receptive_field(small):
    """It holds all patches of a corner, an edge and the middle."""
    planes = small.planes("2", "RM2", (slice(0, 4, 2), slice(0, 4, 2), 0))
    drawing = render(plots.unit_hyperplanes(planes, "title", outline=True))
    assert outlines(drawing) == [(0, 0, 3, 3), (0, 2, 3, 5), (2, 0, 5, 3), (2, 2, 5, 5)]
    np.testing.assert_array_equal(drawing.numbers["fields"], outlines(drawing))
    for part, (top, left, rows, columns) in zip(
        drawing.numbers["image"], drawing.numbers["fields"], strict=True
    ):
        inside = part[:, top : top + rows, left : left + columns]
        assert np.count_nonzero(inside) == np.count_nonzero(part) > 0


def test_cropped_units_show_their_patches(small):
    """The outline follows the patch's corner, also outside the image at the top and left."""
    planes = small.planes("2", "RM2", (slice(0, 4, 2), 0, 0))
    assert isinstance(planes.image_part, Patches)
    drawing = render(plots.unit_hyperplanes(planes, "title", outline=True, crop=True))
    np.testing.assert_array_equal(drawing.numbers["image"], planes.image_part.values[0])
    assert drawing.numbers["corners"].tolist() == [[-2, -2], [2, -2]]
    assert outlines(drawing) == [(2, 2, 3, 3), (0, 2, 5, 3)]


def test_units_without_a_position_have_the_whole_image_as_their_field(small):
    drawing = plots.unit_hyperplanes(small.planes("2", "RM1"), "title", outline=True, crop=True)
    assert outlines(drawing) == [(0, 0, 8, 8)] * 9


def test_images_of_other_shapes_are_drawn():
    """Two channels are summed, signals are rows; these have no receptive field to outline."""
    model = nn.Conv2d(2, 3, 3).eval()
    x = torch.rand(1, 2, 5, 5)
    planes = abm.hyperplanes(abm.trace(model, x), x, "output", "RM1")
    drawing = render(plots.unit_hyperplanes(planes, "title"))
    np.testing.assert_allclose(images_of(drawing, 2), planes.image[0].sum(1))
    ((low, high),) = limits_of(drawing)
    assert low == -high == pytest.approx(-end_of(drawing.numbers["image"]))
    model = nn.Conv1d(2, 3, 3).eval()
    x = torch.rand(1, 2, 7)
    planes = abm.hyperplanes(abm.trace(model, x), x, "output", "RM2")
    assert plots.unit_hyperplanes(planes, "title").numbers["image"].shape == (15, 2, 7)
    with pytest.raises(
        ValueError,
        match=r"Receptive fields are drawn on images with rows and columns\. Got images of shape",
    ):
        receptive_fields(planes, np.arange(2))


# bias parts


class Additions(nn.Module):
    """Adds vectors of these lengths."""

    def __init__(self, lengths):
        super().__init__()
        self.b = nn.ParameterList(torch.zeros(n) for n in lengths)

    def forward(self, x):
        return torch.cat([x + b for b in self.b], 1)


@cache
def biases_of(*lengths):
    return abm.trace(Additions(lengths).eval(), torch.rand(1, 1)).biases


@pytest.mark.parametrize(
    ("length", "shape"),
    [(384, (24, 16)), (1184, (37, 32)), (37, (1, 37)), (1, (1, 1)), (0, (0, 1))],
)
def test_near_squares_are_the_studys(length, shape):
    """Read row by row."""
    assert plots.near_square(torch.arange(float(length))).shape == shape
    assert plots.near_square(torch.arange(float(length))).flatten().tolist() == list(range(length))


@pytest.mark.parametrize("shape", ["square", "strip"])
@pytest.mark.parametrize("normalised", [False, True])
def test_bias_parts_share_one_scale_and_name_the_layers(shape, normalised):
    vectors = {
        name: torch.randn(24, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(CLASSES)
    }
    drawing = render(plots.bias_parts(vectors, biases_of(8, 4, 12), "title", shape, normalised))
    values = torch.stack(list(vectors.values()))
    np.testing.assert_array_equal(drawing.numbers["bias"], values)
    assert drawing.numbers["starts"].tolist() == [0, 8, 12]
    np.testing.assert_array_equal(np.concatenate(images_of(drawing, 2)).flatten(), values.flatten())
    ((low, high),) = limits_of(drawing)
    limit = end_of(values)
    assert (low, high) == pytest.approx(
        (values.min().item(), values.max().item()) if normalised else (-limit, limit)
    )
    first = drawing.figure.axes[0]
    labels = first.get_yticklabels() if shape == "square" else first.get_xticklabels()
    assert [label.get_text() for label in labels] == list(drawing.numbers["layers"])
    assert len(first.lines) == 2


def test_squares_are_cut_where_a_layer_begins():
    """Also in the middle of a row: 20 biases in rows of four, cut after six."""
    drawing = plots.bias_parts({"one": torch.zeros(20)}, biases_of(6, 14), "title")
    (line,) = drawing.figure.axes[0].lines
    assert list(zip(*line.get_data(), strict=True)) == [
        (-0.5, 1.5),
        (1.5, 1.5),
        (1.5, 0.5),
        (3.5, 0.5),
    ]


def test_scalar_biases_are_strips_without_lines():
    """Each is a layer of its own; not every name has room."""
    drawing = render(plots.bias_parts({"one": torch.randn(37)}, biases_of(*[1] * 37), "title"))
    assert images_of(drawing, 2)[0].shape == (1, 37)
    assert not drawing.figure.axes[0].lines
    assert len(drawing.figure.axes[0].get_xticklabels()) == 13


def test_bias_parts_that_do_not_fit_are_refused():
    biases = biases_of(4)
    with pytest.raises(ValueError, match=r"shape must be square or strip\. Got 'round'"):
        plots.bias_parts({"one": torch.zeros(4)}, biases, "title", "round")
    for vectors, found in (({"one": torch.zeros(3)}, r"\[3\]"), ({}, "none")):
        with pytest.raises(
            ValueError, match=rf"one number for each of the network's 4 biases\. Got {found}"
        ):
            plots.bias_parts(vectors, biases, "title")


# differences


def test_difference_is_drawn_on_its_own_scale():
    """The two sets on one scale, whatever the size of their difference."""
    first = torch.randn(4, 3, 5, 5)
    second = first + 0.01 * torch.randn(4, 3, 5, 5)
    drawing = render(plots.differences(first, second, CLASSES, "title", ("one", "two")))
    both, own = (end_of(parts) for parts in (torch.cat([first, second]), second - first))
    panels = images_of(drawing, 3)
    np.testing.assert_allclose(panels[:4], colours(first, -both, both), atol=1e-6)
    np.testing.assert_allclose(panels[4:8], colours(second, -both, both), atol=1e-6)
    np.testing.assert_allclose(panels[8:], colours(second - first, -own, own), atol=1e-6)
    np.testing.assert_array_equal(drawing.numbers["difference"], second - first)
    assert drawing.caption.startswith("one and two on one scale: ")
    assert f"two - one on its own: grey is zero, black {-own:.3g}" in drawing.caption


def test_differences_of_bias_parts_are_near_squares():
    first = torch.randn(2, 24)
    second = torch.randn(2, 24)
    drawing = render(
        plots.differences(first, second, CLASSES[:2], "title", biases=biases_of(8, 16))
    )
    np.testing.assert_array_equal(
        [p.flatten() for p in images_of(drawing, 2)], torch.cat([first, second, second - first])
    )
    assert {image.shape for image in images_of(drawing, 2)} == {(6, 4)}
    assert all(low == -high for low, high in limits_of(drawing))
    assert all(len(axes.lines) == 1 for axes in drawing.figure.axes)


def test_ten_differences_are_two_rows_of_five_with_the_layers_lines():
    """In each of the three sets; the layers may be given by their first biases."""
    first = torch.randn(10, 24)
    names = [str(i) for i in range(10)]
    drawing = render(plots.differences(first, first + 1, names, "title", biases=[8]))
    places = [axes.get_subplotspec() for axes in drawing.figure.axes]
    assert [place.colspan.start for place in places] == [*range(5)] * 6
    assert [place.rowspan.start for place in places[::5]] == [*range(6)]
    assert [axes.get_title() for axes in drawing.figure.axes] == names * 3
    assert all(len(axes.lines) == 1 for axes in drawing.figure.axes)


@pytest.mark.parametrize(
    ("first", "second", "names"), [((2, 5), (2, 6), 2), ((2, 5), (2, 5), 3), ((11, 5), (11, 5), 11)]
)
def test_differences_that_do_not_fit_are_refused(first, second, names):
    with pytest.raises(
        ValueError, match=r"must have one shape and a name each, for 1 to 10 units\. Got \(\d+, 5\)"
    ):
        plots.differences(torch.zeros(first), torch.zeros(second), ["name"] * names, "title")


# images


def test_attacked_image_shows_the_noise_twice():
    """Once as it is, once enlarged, both around grey."""
    pixels = torch.rand(3, 4, 4) * 0.8 + 0.1
    noise = 0.01 * torch.randn(3, 4, 4).sign()
    drawing = render(plots.attacked(pixels, pixels + noise, "title", ("ship", "cat")))
    before, once, enlarged, after = images_of(drawing, 3)
    for found, expected in (
        (before, pixels),
        (once, 0.5 + noise),
        (enlarged, 0.5 + 10 * noise),
        (after, pixels + noise),
    ):
        np.testing.assert_allclose(found, expected.movedim(0, -1), atol=1e-6)
    np.testing.assert_allclose(drawing.numbers["noise"], noise, atol=1e-6)
    assert [axes.get_title() for axes in drawing.figure.axes] == [
        "ship",
        "noise",
        "noise x 10",
        "cat",
    ]
    assert "its largest is 0.01" in drawing.caption


def test_attacked_images_of_two_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"two images must have one shape\. Got \(3, 4, 4\) and \(1, 4, 4\)"
    ):
        inspect.unwrap(plots.attacked)(
            torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), "title"
        )  # no types checked before


def test_attributions_have_their_own_scales():
    maps = {"saliency": torch.rand(3, 4, 4), "gradients": 100 * torch.randn(3, 4, 4)}
    drawing = render(plots.attributions(torch.rand(3, 4, 4), maps, {"gradients": "93 %"}, "title"))
    for panel, part in zip(images_of(drawing, 3)[1:], maps.values(), strict=True):
        limit = end_of(part)
        np.testing.assert_allclose(panel, colours(part, -limit, limit), atol=1e-6)
    np.testing.assert_array_equal(drawing.numbers["maps"], torch.stack(list(maps.values())))
    below = [axes.get_xlabel() for axes in drawing.figure.axes]
    assert below == [
        "",
        f"±{end_of(maps['saliency']):.3g}",
        f"±{end_of(maps['gradients']):.3g}\n93 %",
    ]


def test_numbers_of_no_attribution_are_refused():
    with pytest.raises(
        ValueError, match=r"Numbers must be of the methods saliency\. Got gradients"
    ):
        plots.attributions(
            torch.rand(3, 4, 4), {"saliency": torch.rand(3, 4, 4)}, {"gradients": "1"}, "title"
        )


# spectra


def test_spectra_are_drawn_on_one_scale():
    """Each channel's own, with the share of its high frequencies below."""
    maps = {"image": torch.rand(3, 8, 9), "hyperplane": 0.01 * torch.randn(3, 8, 9)}
    drawing = render(plots.spectra(maps, "title"))
    stacked = torch.stack(list(maps.values()))
    np.testing.assert_array_equal(images_of(drawing, 2), log_amplitude(stacked).flatten(0, 1))
    np.testing.assert_array_equal(drawing.numbers["log_amplitude"], log_amplitude(stacked))
    assert limits_of(drawing) == {(-4, 0)}
    image, hyperplane = images_of(drawing, 3)
    limit = end_of(maps["hyperplane"])
    labels = [axes.get_xlabel() for axes in drawing.figure.axes]
    assert f"±{limit:.3g}" in labels
    np.testing.assert_allclose(image, maps["image"].movedim(0, -1))
    np.testing.assert_allclose(hyperplane, colours(maps["hyperplane"], -limit, limit), atol=1e-6)
    below = [t for t in (axes.get_xlabel() for axes in drawing.figure.axes) if "above" in t]
    assert below == [
        f"above 0.25: {100 * share:.1f} %" for share in high_share(stacked).flatten().tolist()
    ]


@pytest.mark.parametrize(
    "maps", [{}, {"a": torch.zeros(3, 4, 4), "b": torch.zeros(3, 5, 4)}], ids=["none", "two shapes"]
)
def test_spectra_of_no_shape_are_refused(maps):
    with pytest.raises(
        ValueError, match=r"There must be maps of one shape\. Got (none|\(3, 4, 4\), \(3, 5, 4\))"
    ):
        plots.spectra(maps, "title")


def test_radial_profiles_are_lines_of_the_mean():
    """With a band where there are many maps."""
    profiles = {
        "images": radial_energy(torch.rand(5, 3, 8, 8)),
        "one": radial_energy(torch.rand(8, 8)),
    }
    drawing = render(plots.radial_profiles(profiles, "title"))
    (axes,) = drawing.figure.axes
    for i, (line, (name, profile)) in enumerate(zip(axes.lines, profiles.items(), strict=True)):
        mean = profile.share.reshape(-1, 4).mean(0)
        np.testing.assert_allclose(
            line.get_xydata(), torch.stack([profile.frequency, mean], 1), rtol=1e-6
        )
        np.testing.assert_array_equal(drawing.numbers[f"share_{i}"], profile.share.reshape(-1, 4))
        assert line.get_label() == name
    assert len(axes.collections) == 1
    assert axes.get_yscale() == "log"


def test_no_profile_is_refused():
    with pytest.raises(ValueError, match=r"at least one profile to draw\. Got none"):
        plots.radial_profiles({}, "title")


# groups and layers


@pytest.mark.parametrize("dimensions", [2, 3])
def test_points_are_at_their_places(dimensions):
    groups = {
        "adversarial": np.random.default_rng(0).normal(size=(5, dimensions)),
        "others": np.zeros((3, dimensions)),
    }
    drawing = render(plots.points(groups, "title", ("a", "b", "c")[:dimensions]))
    (axes,) = drawing.figure.axes
    if dimensions == 2:
        for drawn, found in zip(axes.collections, groups.values(), strict=True):
            np.testing.assert_allclose(drawn.get_offsets(), found)
    assert [label.get_text() for label in axes.get_legend().get_texts()] == [
        "adversarial (5)",
        "others (3)",
    ]
    red, *_ = axes.collections[0].get_facecolor()[0]
    assert red > 0.8
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a", "b")
    np.testing.assert_array_equal(drawing.numbers["points_0"], groups["adversarial"])


@pytest.mark.parametrize(
    ("groups", "axes"),
    [({"a": np.zeros((4, 3))}, "xy"), ({}, "xy"), ({"a": np.zeros((4, 4))}, "wxyz")],
    ids=["wrong", "none", "4-d"],
)
def test_points_of_other_dimensions_are_refused(groups, axes):
    with pytest.raises(
        ValueError,
        match=r"Groups must be points \(n, 2\) or \(n, 3\) with a name for each axis\. Got ",
    ):
        plots.points(groups, "title", tuple(axes))


@pytest.mark.parametrize("kind", ["line", "bar"])
def test_numbers_by_layer_have_their_intervals(kind):
    """Layers that a series does not have are left out of it."""
    values = {
        "VGG7": {"conv0": 1.0, "conv1": (2.0, 1.5, 4.0)},
        "ResNet20": {"conv1": 3.0, "fc": 4.0},
    }
    drawing = render(plots.by_layer(values, "title", "share in %", kind))
    panels = drawing.figure.axes
    names = [[label.get_text() for label in axes.get_xticklabels()] for axes in panels]
    first, second = (c for axes in panels for c in axes.containers if c.get_label() in values)
    if kind == "bar":
        assert names == [["conv0", "conv1", "fc"]]
        assert [bar.get_height() for bar in first][:2] == [1, 2]
    else:  # a panel for each, so that whiskers do not overlap
        assert names == [["conv0", "conv1"], ["conv1", "fc"]]
        assert [axes.get_title() for axes in panels] == ["VGG7", "ResNet20"]
        assert first.lines[0].get_ydata().tolist() == [1, 2]
        assert second.lines[0].get_ydata().tolist() == [3, 4]
        low, high = first.lines[2][0].get_segments()[1][:, 1]
        assert (low, high) == (1.5, 4.0)
    np.testing.assert_array_equal(
        drawing.numbers["series_0"], [[1, np.nan, np.nan], [2, 1.5, 4], [np.nan] * 3]
    )
    assert "whiskers" in drawing.caption


def test_kinds_of_lines_and_nothing_to_draw_are_refused():
    for values, kind in (({"a": {"conv0": 1.0}}, "pie"), ({"a": {}}, "line"), ({}, "bar")):
        with pytest.raises(
            ValueError,
            match=(
                r"by_layer must draw line or bar, of at least one number\. "
                rf"Got '{kind}' of [01] layers"
            ),
        ):
            plots.by_layer(values, "title", "share", kind)


# files


def drawing_of_zeros():
    return plots.attacked(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), "title")


def test_saving_writes_the_numbers_beside_the_picture(tmp_path):
    """In a folder that is made; the arrays are those of the drawing."""
    drawing = drawing_of_zeros()
    path = plots.save(drawing, tmp_path / "new" / "figure.png", formats=("png", "svg"))
    assert path == tmp_path / "new" / "figure.png"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "figure.npz",
        "figure.png",
        "figure.svg",
    ]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in path.with_suffix(".svg").read_text()
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
        assert set(stored) == set(drawing.numbers)
        for name, array in drawing.numbers.items():
            np.testing.assert_array_equal(stored[name], array)


def test_saving_twice_gives_the_same_files(tmp_path):
    """No date and no random name is in them."""
    for folder in ("a", "b"):
        plots.save(drawing_of_zeros(), tmp_path / folder / "figure.png", formats=("svg", "png"))
    for suffix in ("npz", "png", "svg"):
        assert (tmp_path / "a" / f"figure.{suffix}").read_bytes() == (
            tmp_path / "b" / f"figure.{suffix}"
        ).read_bytes()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_path_may_be_a_string_and_its_suffix_chooses_the_format(tmp_path, suffix):
    beginnings = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    path = plots.save(drawing_of_zeros(), str(tmp_path / f"a.{suffix}"))
    assert path == tmp_path / f"a.{suffix}"
    assert path.read_bytes().startswith(beginnings[suffix])
    again = plots.save(drawing_of_zeros(), tmp_path / "b" / f"a.{suffix}")
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", f"a.{suffix}", "b"]


def test_suffix_that_is_no_format_is_replaced_and_other_formats_are_refused(tmp_path):
    assert plots.save(Figure(), tmp_path / "version-1.0").name == "version-1.png"
    with pytest.raises(ValueError, match=r"some of png, svg, pdf\. Got jpg: choose of these"):
        plots.save(Figure(), tmp_path / "a.jpg")


def test_drawing_shows_itself(tmp_path):
    drawing = drawing_of_zeros()
    assert repr(drawing).startswith("Drawing 9 x 3.1 in: noise: grey is zero")
    assert repr(drawing).endswith("numbers: pixels, adversarial, noise, factor")
    assert drawing._repr_png_() == plots.save(drawing, tmp_path / "a.png").read_bytes()


def test_figure_alone_has_the_numbers_that_are_given(tmp_path):
    path = plots.save(Figure(), tmp_path / "figure.png")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
    plots.save(Figure(), path, {"x": np.arange(3)})
    assert np.load(path.with_suffix(".npz"))["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("formats", "found"), [(("gif",), "gif"), ((), "none")])
def test_other_formats_are_refused(tmp_path, formats, found):
    with pytest.raises(ValueError, match=rf"formats must be some of png, svg, pdf\. Got {found}"):
        plots.save(Figure(), tmp_path / "figure.png", formats=formats)
