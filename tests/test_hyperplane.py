"""Hyperplanes: shapes, selected units, values, errors, and a line-by-line slow twin."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import make
from torch import nn

import adjointbackmap as abm

# a convolution of plain-conv-chain, its units, and its image
CONV = "2"
ROWS = 4
COLS = 4
INS = 3
OUTS = 4
PIXELS = (2, 6, 6)
LENGTH = 7


@pytest.fixture
def chain(traced_case):
    """A chain of three convolutions."""
    return traced_case("plain-conv-chain")


@pytest.fixture
def flat(traced_case):
    """A network that ends in a linear layer."""
    return traced_case("residual-with-zero-padded-channels")


# the slow twin: Algorithms 1 and 2 of the dissertation


def input_of(model, layer, x):
    """In-channel feature maps F of a convolution of a chain, for one image."""
    return model[: int(layer)](x[None])[0]


def jacobian_of_input(model, layer, x):
    """J_F of one image: (c_in, h, w, d_1) by the image, (c_in, h, w, d_2) by the biases before."""
    names = [
        n
        for n, _ in model.named_parameters()
        if n.endswith("bias") and int(n.split(".")[0]) < int(layer)
    ]
    biases = {n: model.get_parameter(n).detach() for n in names}

    def maps(values, image):
        return torch.func.functional_call(
            Front(model, layer), {f"model.{n}": v for n, v in values.items()}, (image,)
        )

    by_biases, by_image = torch.func.jacrev(maps, (0, 1))(biases, x)
    return by_image.flatten(3), torch.cat([by_biases[n] for n in names], -1)


class Front(nn.Module):
    """The part of a chain before a layer."""

    def __init__(self, model, layer):
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, x):
        return input_of(self.model, self.layer, x)


def adjoint_back_map(model, layer, x, mode):
    """Algorithm 2 for RM4 to RM1: image and bias part, units first, ``d_1`` or ``d_2`` last."""
    conv = model[int(layer)]
    parts = []
    for J in jacobian_of_input(model, layer, x):
        J = J.movedim(-1, 0)  # d x c_in x h x w
        if mode in ("RM4", "RM3"):
            R = []
            for j in range(conv.in_channels):
                # unstacked, with the dimension back
                J_j = J[:, j : j + 1]
                w_j = conv.weight[:, j : j + 1]
                R.append(F.conv2d(J_j, w_j, stride=conv.stride, padding=conv.padding))
            H = torch.stack(R, 1).permute(3, 4, 1, 2, 0)  # h_o x w_o x c_in x c_out x d
        else:
            H = F.conv2d(J, conv.weight, stride=conv.stride, padding=conv.padding).permute(
                2, 3, 1, 0
            )
        parts.append(H.sum((0, 1)) if mode in ("RM3", "RM1") else H)
    return [part.detach() for part in parts]


@pytest.mark.parametrize("mode", ["RM4", "RM3", "RM2", "RM1"])
def test_convolution_equals_its_slow_twin(chain, mode):
    """Each mode is Algorithm 2 on the Jacobian of the layer's input and the unstacked kernels."""
    planes = abm.hyperplanes(chain.network, chain.x, CONV, mode, own_bias=False)
    for n, x in enumerate(chain.x):
        image, bias = adjoint_back_map(chain.model, CONV, x, mode)
        torch.testing.assert_close(planes.image[n].flatten(-3), image, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            planes.bias[n, ..., : bias.shape[-1]], bias, rtol=1e-12, atol=1e-12
        )
        assert not planes.bias[n, ..., bias.shape[-1] :].any()


def test_fully_connected_layer_equals_its_slow_twin(flat):
    """RM0 is the Jacobian of the pooled map times the weights."""
    x = flat.x[0]
    pooled = torch.func.jacrev(
        lambda image: torch.linalg.pinv(flat.model.fc.weight) @ flat.model(image[None])[0]
    )(x)
    planes = abm.hyperplanes(flat.network, x, "fc", "RM0")
    product = torch.einsum("kc,cxyz->kxyz", flat.model.fc.weight, pooled).detach()
    torch.testing.assert_close(planes.image[0], product, rtol=1e-10, atol=1e-12)


# shapes and selections


SELECTIONS = {
    "all": ("RM2", None, (ROWS, COLS, OUTS)),
    "one-int": ("RM2", 1, (COLS, OUTS)),
    "one-unit": ("RM2", (1, 2, 3), ()),
    "negative-int": ("RM2", (-1, 0, -2), ()),
    "slices": ("RM2", (slice(1, 3), slice(None), slice(0, 4, 2)), (2, COLS, 2)),
    "int-and-slice": ("RM2", (0, slice(2, None)), (2, OUTS)),
    "array": ("RM2", (np.array([0, 3]),), (2, COLS, OUTS)),
    "arrays-pointwise": ("RM2", ([0, 1, 3], [0, 1, 2], [3, 2, 1]), (3,)),
    "arrays-apart": ("RM2", (np.array([0, 1]), slice(None), np.array([0, 2])), (2, COLS)),
    "array-in-the-middle": (
        "RM2",
        (slice(None), torch.tensor([0, 2]), slice(None)),
        (ROWS, 2, OUTS),
    ),
    "grid": ("RM2", (np.array([[0], [1]]), np.array([[0, 1, 2]]), 0), (2, 3)),
    "kernels": ("RM4", (slice(1), 2, slice(None), 1), (1, INS)),
    "kernels-summed": ("RM3", (slice(None), [0, 3]), (INS, 2)),
    "channels": ("RM1", slice(1, None), (3,)),
    "numpy-integer": ("RM1", np.int64(2), ()),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_units_are_chosen_as_numpy_chooses(chain, selection):
    """A selection is the same part of the whole that NumPy's indexing takes."""
    mode, units, shape = SELECTIONS[selection]
    planes = abm.hyperplanes(chain.network, chain.x, CONV, mode, units)
    whole = abm.hyperplanes(chain.network, chain.x, CONV, mode)
    assert planes.value.shape == (2, *shape)
    assert planes.image.shape == (2, *shape, *PIXELS)
    assert planes.bias.shape == (2, *shape, LENGTH)
    key = units if isinstance(units, tuple) else () if units is None else (units,)
    key = tuple(np.asarray(k) if isinstance(k, list | torch.Tensor) else k for k in key)
    for n in range(2):
        for part in ("image", "bias", "value"):
            np.testing.assert_allclose(
                getattr(planes, part)[n],
                getattr(whole, part)[n].numpy()[key],
                rtol=1e-12,
                atol=1e-12,
            )


def test_each_image_may_have_its_own_units(chain):
    """A tensor (N, K, d) gives the n-th image its K units."""
    units = torch.tensor([[[0, 0, 0], [1, 2, 3]], [[3, 3, 1], [2, 0, 0]]])
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM2", units)
    whole = abm.hyperplanes(chain.network, chain.x, CONV, "RM2")
    assert planes.image.shape == (2, 2, *PIXELS)
    for n in range(2):
        places = tuple(units[n].T)
        torch.testing.assert_close(planes.image[n], whole.image[n][places], rtol=1e-12, atol=1e-12)
        assert torch.equal(planes.value[n], whole.value[n][places])


def test_predicted_is_the_largest_output_of_each_image(flat):
    """``"predicted"`` drops the unit dimension and takes the model's own answer for each image."""
    x = torch.randn(
        5, *flat.network.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    planes = abm.hyperplanes(flat.network, x, "fc", "RM0", "predicted")
    assert planes.image.shape == (5, *flat.network.in_shape)
    assert len(flat.model(x).argmax(1).unique()) > 1
    assert torch.equal(planes.value, flat.model(x).amax(1).detach())
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_one_image_is_a_batch_of_one(chain):
    """N is always there."""
    planes = abm.hyperplanes(chain.network, chain.x[0], CONV, "RM1")
    assert planes.image.shape == (1, OUTS, *PIXELS)
    assert planes.x.shape == (1, *PIXELS)


def test_many_images_in_one_call(flat):
    """64 and 65 images, more than are computed together: each has the planes that it has alone."""
    x = torch.randn(
        65, *flat.network.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    for images in (x[:64], x):
        planes = abm.hyperplanes(flat.network, images, "fc", "RM0")
        assert planes.image.shape == (len(images), 3, *flat.network.in_shape)
        assert abm.reconstruction_test(planes)["error"] <= 1e-12
    alone = abm.hyperplanes(flat.network, x[64], "fc", "RM0")
    torch.testing.assert_close(planes.image[64:], alone.image, rtol=1e-12, atol=1e-12)


def test_linear_with_positions_has_a_unit_at_every_position(traced_case):
    """A linear call on more than two dimensions: positions, then features."""
    traced = traced_case("linear-with-positions")
    planes = abm.hyperplanes(traced.network, traced.x, "0", "RM2")
    assert planes.image.shape == (2, 4, 4, 4, 5)
    assert planes.units.names == ("out_position_0", "out_feature")
    assert torch.equal(planes.value, traced.model[0](traced.x).detach())


@pytest.mark.parametrize(
    ("mode", "own_bias"), [("RM2", True), ("RM1", True), ("RM4", False), ("RM3", False)]
)
def test_own_bias_is_in_where_a_module_gives_it(chain, mode, own_bias):
    """By default RM2 and RM1 include the layer's bias, RM4 and RM3 never do."""
    assert abm.hyperplanes(chain.network, chain.x, CONV, mode).own_bias == own_bias


def test_value_is_what_the_module_gives(chain):
    """With own bias, the value is the module's output; without, the product of the kernel."""
    out = chain.model[:3](chain.x).detach()
    assert torch.equal(
        abm.hyperplanes(chain.network, chain.x, CONV, "RM2").value, out.movedim(1, -1)
    )
    summed = abm.hyperplanes(chain.network, chain.x, CONV, "RM1").value
    torch.testing.assert_close(summed, out.sum((2, 3)), rtol=1e-12, atol=1e-12)


# float64 on request


def test_float64_on_a_float32_model():
    """float64 on request gives float64's rounding from float32 parameters and images."""
    model, x = make("conv-with-bias-before-batch-norm")
    model = model.float()
    x = x.float()
    network = abm.trace(model, x)
    for image in (x, x.double()):
        planes = abm.hyperplanes(network, image, "4", "RM2", dtype=torch.float64)
        assert {
            t.dtype for t in (planes.image, planes.bias, planes.value, planes.reconstruct())
        } == {torch.float64}
        assert abm.reconstruction_test(planes)["error"] <= 1e-12
    assert abm.hyperplanes(network, x, "4", "RM2").image.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# what planes can do


def test_reconstruct_takes_other_images(chain):
    """<[x'; b] | H> for another batch, and one image for all of them."""
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM2", (0, 0))
    other = -2 * chain.x
    b = chain.network.biases.vector
    expected = torch.einsum("nkcxy,ncxy->nk", planes.image, other) + planes.bias @ b
    torch.testing.assert_close(planes.reconstruct(other), expected, rtol=1e-12, atol=1e-12)
    expected = torch.einsum("nkcxy,cxy->nk", planes.image, other[0]) + planes.bias @ b
    torch.testing.assert_close(planes.reconstruct(other[0]), expected, rtol=1e-12, atol=1e-12)


def test_magnitude_is_the_sum_of_absolute_products(chain):
    """sum |x h| + sum |b h_b|."""
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM1")
    expected = (planes.image * chain.x[:, None]).abs().sum((2, 3, 4)) + (
        planes.bias * chain.network.biases.vector
    ).abs().sum(2)
    torch.testing.assert_close(planes.magnitude(), expected, rtol=1e-12, atol=1e-12)


def test_relative_error_is_signed_and_knows_zero():
    """Eq. 3.29 is signed; zero becomes the smallest normal float32; both zero give zero."""
    from adjointbackmap.planes.hyperplane import relative_error

    tiny = torch.finfo(torch.float32).tiny
    for dtype in (torch.float32, torch.float64):
        ours = torch.tensor([1.5, 0.5, -1.5, 0.0, 3 * tiny, -tiny], dtype=dtype)
        value = torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 0.0], dtype=dtype)
        expected = torch.tensor([0.5, -0.5, 0.5, 0.0, 3.0, -1.0], dtype=dtype)
        torch.testing.assert_close(relative_error(ours, value), expected, rtol=1e-6, atol=0)


def test_dead_units_have_no_error(traced_case):
    """Units that are exactly zero are reconstructed as exactly zero: their error is 0, not NaN."""
    traced = traced_case("dead-units")
    planes = abm.hyperplanes(traced.network, traced.x, "1", "RM2", (slice(None), slice(None), 0))
    assert not planes.value.any()
    assert not planes.relative_error().any()
    assert abm.reconstruction_test(planes)["error"] == 0


@pytest.mark.parametrize("units", [None, (1, 2, 3)], ids=["all", "one"])
def test_contributions_sum_to_the_value(chain, units):
    """x * H_I and b * H_b by part of the bias vector: all of them sum to the units' values."""
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM2", units)
    contributions = planes.contributions()
    assert contributions.image.shape == planes.image.shape
    assert {name: part.shape[-1] for name, part in contributions.bias.items()} == {
        "0.bias": 3,
        "2.bias": 4,
    }
    torch.testing.assert_close(contributions.total(), planes.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["no-bias", "mlp-on-flat-inputs", "linear-with-positions", "conv-in-one-dimension"]
)
def test_contributions_sum_to_the_value_for_any_shape_of_input(traced_case, name):
    """Also without any bias, and where inputs are no maps."""
    traced = traced_case(name)
    planes = abm.hyperplanes(
        traced.network, traced.x, "output", traced.network.layers["output"].modes[0]
    )
    torch.testing.assert_close(planes.contributions().total(), planes.value, rtol=1e-11, atol=1e-11)


DIMS = {
    "all": (None, ("n", "out_row", "out_col", "out_channel")),
    "slice": ((1, slice(1, 3)), ("n", "out_col", "out_channel")),
    "pointwise": (([0, 1], [2, 3], [1, 1]), ("n", "unit")),
    "one-array": ((slice(None), [1, 3]), ("n", "out_row", "unit", "out_channel")),
    "one-unit": ((1, 2, 3), ("n",)),
    "own": (torch.tensor([[[0, 1, 2]], [[3, 2, 1]]]), ("n", "unit")),
}


@pytest.mark.parametrize("selection", DIMS)
def test_xarray_has_labelled_dimensions(chain, selection):
    """Dimensions are named, and every unit's place along the mode's dimensions is a coordinate."""
    units, dims = DIMS[selection]
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM2", units)
    patch = ("row", "col") if selection == "own" else ("patch_row", "patch_col")
    assert planes.to_xarray()["image"].dims == (*dims, "channel", *patch)
    data = planes.to_xarray(dense=True)
    assert data["value"].dims == dims
    assert data["image"].dims == (*dims, "channel", "row", "col")
    assert data["bias_part"].dims == (*dims, "m")
    assert list(data["bias_name"].values) == list(chain.network.biases.labels)
    np.testing.assert_array_equal(data["image"].values, planes.image)
    np.testing.assert_array_equal(data["value"].values, planes.value)
    assert data.attrs == {"layer": CONV, "mode": "RM2", "own_bias": 1, "k": 1.0}


@pytest.mark.parametrize("selection", DIMS)
def test_xarray_coordinates_lead_back_to_the_value(chain, selection):
    """The value at a unit's coordinates in the layer's output is the value beside them."""
    units, _ = DIMS[selection]
    data = abm.hyperplanes(chain.network, chain.x, CONV, "RM2", units).to_xarray()
    out = chain.model[:3](chain.x).detach().movedim(1, -1).numpy()
    places = [
        data[name].broadcast_like(data["value"]).transpose(*data["value"].dims)
        for name in ("out_row", "out_col", "out_channel")
    ]
    n = np.arange(2).reshape(2, *(1,) * (data["value"].ndim - 1))
    np.testing.assert_array_equal(out[n, *(p.values for p in places)], data["value"].values)


def test_xarray_of_a_flat_network_and_of_the_predicted_class(traced_case):
    """Flat inputs have features, and the predicted class of each image is a coordinate."""
    traced = traced_case("mlp-on-flat-inputs")
    data = abm.hyperplanes(traced.network, traced.x, "3", "RM0").to_xarray()
    assert data["image"].dims == ("n", "out_feature", "feature")
    data = abm.hyperplanes(traced.network, traced.x, "3", "RM0", "predicted").to_xarray()
    assert data["image"].dims == ("n", "feature")
    assert data["out_feature"].dims == ("n",)
    expected = traced.model[:4](traced.x).argmax(1)
    np.testing.assert_array_equal(data["out_feature"].values, expected)


# errors


X = torch.zeros(2, *PIXELS, dtype=torch.float64)
NAN = X.clone()
NAN[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
OWN = torch.zeros(2, 3, 3, dtype=torch.int64)

ERRORS = {
    "unknown-layer": ({"layer": "fc"}, r"A layer must be one of 0, 1, 2, 3, 4, output\. Got 'fc'"),
    "mode-of-others": ({"mode": "RM0"}, r"Layer '2' has the modes RM4, RM3, RM2, RM1\. Got 'RM0'"),
    "no-mode": ({"mode": "rm2"}, r"has the modes .* Got 'rm2'"),
    "kernel-mode-without-kernel": (
        {"layer": "1", "mode": "RM4"},
        r"Layer '1' has the modes RM2, RM1\. Got 'RM4'",
    ),
    "own-bias-in-rm3": ({"mode": "RM3", "own_bias": True}, r"own_bias must be False in RM3"),
    "own-bias-in-rm4": ({"mode": "RM4", "own_bias": True}, r"own_bias must be False in RM4"),
    "no-kernel-of-its-own": (
        {"layer": "1", "own_bias": False},
        r"Layer '1' has no kernel of its own: .*own_bias=True",
    ),
    "row-out-of-range": (
        {"units": (4, 0, 0)},
        r"units must lie in out_row of 0 to 3, .*out_channel of 0 to 3\. Got \(4, 0, 0\)",
    ),
    "array-out-of-range": ({"units": ([0, 9],)}, r"units must lie in"),
    "arrays-that-do-not-fit": ({"units": ([0, 1], [0, 1, 2])}, r"units must lie in"),
    "too-many-parts": (
        {"units": (0, 0, 0, 0)},
        r"units must be a tuple over out_row .*Got 4 parts",
    ),
    "none-chosen": ({"units": (slice(2, 2),)}, r"must name at least one unit"),
    "empty-array": ({"units": (np.array([], dtype=int),)}, r"must name at least one unit"),
    "float-unit": ({"units": (0.5,)}, r"units must be ints, slices or integer arrays\. Got 0\.5"),
    "mask": (
        {"units": (np.array([True, False, True, False]),)},
        r"units must be ints, slices or integer arrays",
    ),
    "own-units-of-other-images": (
        {"units": OWN[:1]},
        r"units of each image must be integers of shape \(2, K, 3\)\. Got \(1, 3, 3\)",
    ),
    "own-units-of-floats": ({"units": OWN.double()}, r"must be integers of shape .*float64"),
    "own-units-out-of-range": ({"units": OWN + 4}, r"units must lie in out_row of 0 to 3"),
    "own-units-negative": ({"units": OWN - 1}, r"units must lie in out_row of 0 to 3"),
    "own-units-none": ({"units": OWN[:, :0]}, r"units must lie in .*or none"),
    "predicted-of-a-map": (
        {"units": "predicted"},
        r"units must be 'predicted' in RM0.* Got 'predicted' in RM2",
    ),
    "another-word": ({"units": "largest"}, r"units must be 'predicted' in RM0.* Got 'largest'"),
    "other-size": (
        {"x": torch.zeros(2, 2, 6, 7).double()},
        r"x must have shape \(2, 6, 6\) or \(N, 2, 6, 6\)\. Got \(2, 2, 6, 7\)",
    ),
    "channels-last": (
        {"x": torch.zeros(6, 6, 2).double()},
        r"x must have shape .* Got \(6, 6, 2\)",
    ),
    "no-image": ({"x": X[:0]}, r"x must have shape .* Got \(0, 2, 6, 6\)"),
    "float32": (
        {"x": X.float()},
        (
            r"x must be torch\.float64 as the model\. Got torch\.float32: "
            r"convert it with x\.to\(torch\.float64\)"
        ),
    ),
    "bytes": (
        {"x": X.to(torch.uint8)},
        r"x must be torch\.float64 as the model\. Got torch\.uint8",
    ),
    "bytes-in-float64": (
        {"x": X.to(torch.uint8), "dtype": torch.float64},
        r"x must be torch\.float64.* Got torch\.uint8",
    ),
    "half": (
        {"dtype": torch.float16},
        r"dtype must be torch\.float32 or torch\.float64\. Got torch\.float16",
    ),
    "integers": (
        {"dtype": torch.int64},
        r"dtype must be torch\.float32 or torch\.float64\. Got torch\.int64",
    ),
    "other-device": (
        {"x": X.to("meta")},
        r"x must be on cpu as the model\. Got meta: move it with x\.to\('cpu'\)",
    ),
    "not-finite": ({"x": NAN}, r"x must be finite\. Got 2 values that are NaN or infinite"),
    "too-large": (
        {"memory": "1kB"},
        r"must fit in memory=1kB\. It needs .* GiB for 2 x 64 hyperplanes: choose fewer units",
    ),
    "memory-without-a-unit": (
        {"memory": "2 lots"},
        r"memory must be a number of bytes or such as '2GiB'.* Got '2 lots'",
    ),
    "memory-of-nothing": ({"memory": "GiB"}, r"memory must be a number of bytes"),
    "scale-zero": ({"scale": 0.0}, r"scale must be a positive number, such as 1/8\. Got 0"),
    "scale-negative": (
        {"scale": -0.125},
        r"scale must be a positive number, such as 1/8\. Got -0\.125",
    ),
    "scale-infinite": ({"scale": float("inf")}, r"scale must be a positive number"),
    "scale-nan": ({"scale": float("nan")}, r"scale must be a positive number"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_bad_arguments_are_answered_with_what_to_do(chain, error):
    """One sentence: what was expected, what came, what to do."""
    changed, match = ERRORS[error]
    arguments = {"x": X, "layer": CONV, "mode": "RM2", **changed}
    with pytest.raises(ValueError, match=match):
        abm.hyperplanes(chain.network, **arguments)


def test_reconstruct_with_another_number_of_images_is_refused(chain):
    """Other images must be as many as the planes' or one."""
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM1")
    with pytest.raises(ValueError, match=r"x must be one image or 2\. Got 3"):
        planes.reconstruct(torch.zeros(3, *PIXELS, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must have shape"):
        planes.reconstruct(torch.zeros(2, 6, 6, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("memory", "count"),
    [("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5 kB", 1500), ("7B", 7), (12, 12)],
)
def test_memory_is_read_with_its_unit(memory, count):
    """Decimal and binary units, and plain numbers of bytes."""
    from adjointbackmap.planes.query import bytes_of

    assert bytes_of(memory) == count


def test_memory_bounds_the_result_exactly(chain):
    """A result of exactly the size passes, one byte less does not."""
    size = 2 * OUTS * (72 + LENGTH) * 8
    abm.hyperplanes(chain.network, chain.x, CONV, "RM1", memory=size)
    with pytest.raises(ValueError, match="must fit in memory"):
        abm.hyperplanes(chain.network, chain.x, CONV, "RM1", memory=size - 1)
