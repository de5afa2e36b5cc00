"""The linear map at a pattern: its shapes, its formats, and its arithmetic."""

import sys

import numpy as np
import pytest
import torch
from cases import make

import adjointbackmap as abm
from adjointbackmap.capture.precision import exact

LAYERS = {
    "map": ("plain-conv-chain", "2"),
    "flat": ("residual-with-zero-padded-channels", "fc"),
    "no-bias": ("no-bias", "2"),
}
CPU = torch.device("cpu")


@pytest.fixture(params=LAYERS)
def operator(request, traced_case):
    """The operator of a layer at two images."""
    name, layer = LAYERS[request.param]
    traced = traced_case(name)
    return abm.operator(traced.network, traced.x, layer)


def draw(*shape, seed=0):
    """Random vectors in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(ours, theirs):
    """Equal to float64's rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def matrix(operator):
    """The dense matrix of each image, ``(N, units, pixels + M)``."""
    image, bias = operator.dense()
    axes = len(operator.out_shape)
    parts = [part.flatten(1, axes).flatten(2) for part in (image, bias)]
    return torch.cat(parts, 2)


# formats


def test_shapes_are_those_of_the_layer(operator):
    """dense has one row per unit, of the shape of the layer's output."""
    image, bias = operator.dense()
    assert image.shape == (2, *operator.out_shape, *operator.in_shape)
    assert bias.shape == (2, *operator.out_shape, operator.bias_length)


@pytest.mark.parametrize("count", [None, 1, 5], ids=["one-each", "k-is-1", "k-is-5"])
def test_forward_is_the_dense_matrix_times_the_tangent(operator, count):
    """With K tangents for each image, and with one each."""
    k = () if count is None else (count,)
    image = draw(2, *k, *operator.in_shape)
    bias = draw(2, *k, operator.bias_length, seed=1)
    out = operator.forward(image, bias)
    assert out.shape == (2, *k, *operator.out_shape)
    vectors = torch.cat([image.reshape(2, count or 1, -1), bias.reshape(2, count or 1, -1)], 2)
    assert_close(out.reshape(2, count or 1, -1), vectors @ matrix(operator).mT)


@pytest.mark.parametrize("count", [None, 1, 5], ids=["one-each", "k-is-1", "k-is-5"])
def test_adjoint_is_the_cotangent_times_the_dense_matrix(operator, count):
    """With K cotangents for each image, and with one each."""
    k = () if count is None else (count,)
    cotangent = draw(2, *k, *operator.out_shape)
    image, bias = operator.adjoint(cotangent)
    assert image.shape == (2, *k, *operator.in_shape)
    assert bias.shape == (2, *k, operator.bias_length)
    rows = torch.cat([image.reshape(2, count or 1, -1), bias.reshape(2, count or 1, -1)], 2)
    assert_close(rows, cotangent.reshape(2, count or 1, -1) @ matrix(operator))


def test_what_is_left_out_of_forward_is_zero(operator):
    """The image's and the bias vector's tangents add up to both."""
    image = draw(2, 3, *operator.in_shape)
    bias = draw(2, 3, operator.bias_length, seed=1)
    both = operator.forward(image, bias)
    assert_close(operator.forward(image) + operator.forward(bias=bias), both)
    assert_close(operator.forward(image), operator.forward(image, torch.zeros_like(bias)))


def test_forward_of_the_input_is_the_output(traced_case):
    """The tangent [x; b] itself gives what the model computes."""
    traced = traced_case("plain-conv-chain")
    b = traced.network.biases.vector.expand(2, -1)
    assert_close(
        abm.operator(traced.network, traced.x, "4").forward(traced.x, b),
        traced.model(traced.x).detach(),
    )


def test_cotangent_of_a_margin_is_the_difference_of_rows(traced_case):
    """The hyperplane of a margin is the difference of two classes' hyperplanes."""
    traced = traced_case("residual-with-zero-padded-channels")
    margin = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).expand(2, -1)
    image, bias = abm.operator(traced.network, traced.x, "fc").adjoint(margin)
    planes = abm.hyperplanes(traced.network, traced.x, "fc", "RM0")
    assert_close(image, planes.image[:, 0] - planes.image[:, 1])
    assert_close(bias, planes.bias[:, 0] - planes.bias[:, 1])


def test_layer_that_no_bias_reaches_has_zero_bias_parts(traced_case):
    """Biases after a layer do not reach it."""
    traced = traced_case("plain-conv-chain")
    operator = abm.operator(traced.network, traced.x, "0")
    _, bias = operator.dense()
    later = traced.network.biases["2.bias"].slice
    assert not bias[..., later].any()
    tangent = torch.zeros(2, operator.bias_length, dtype=torch.float64)
    tangent[:, later] = 1
    assert not operator.forward(bias=tangent).any()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_chunks(operator, monkeypatch, chunk):
    """Vectors computed together or in parts differ by rounding alone."""
    image = draw(2, 9, *operator.in_shape)
    cotangent = draw(2, 9, *operator.out_shape)
    together = (operator.forward(image), *operator.adjoint(cotangent))
    monkeypatch.setattr(operator.pattern.program, "chunk", chunk)
    for ours, theirs in zip(
        (operator.forward(image), *operator.adjoint(cotangent)), together, strict=True
    ):
        assert_close(ours, theirs)


def test_repeated_calls_give_the_same(operator):
    """An operator has no state."""
    first = operator.dense()
    second = operator.dense()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# SciPy


def test_scipy_operator_is_the_dense_matrix(traced_case):
    """matvec, rmatvec, matmat and rmatmat of the SciPy operator of one image."""
    pytest.importorskip("scipy")
    traced = traced_case("plain-conv-chain")
    operator = abm.operator(traced.network, traced.x[:1], "2")
    ours = operator.as_scipy()
    dense = matrix(operator)[0].numpy()
    assert ours.shape == dense.shape
    assert ours.dtype == np.float64
    right = draw(dense.shape[1], 3).numpy()
    left = draw(dense.shape[0], 3).numpy()
    for found, expected in (
        (ours.matvec(right[:, 0]), dense @ right[:, 0]),
        (ours.matvec(right[:, :1]), dense @ right[:, :1]),
        (ours.matmat(right), dense @ right),
        (ours.rmatvec(left[:, 0]), dense.T @ left[:, 0]),
        (ours.rmatmat(left), dense.T @ left),
        (ours.T @ left[:, 0], dense.T @ left[:, 0]),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_scipy_finds_the_singular_values(traced_case):
    """The spectrum from SciPy's iterative solver is the dense matrix's."""
    linalg = pytest.importorskip("scipy.sparse.linalg")
    traced = traced_case("plain-conv-chain")
    operator = abm.operator(traced.network, traced.x[:1], "2")
    found = np.sort(
        linalg.svds(operator.as_scipy(), k=3, return_singular_vectors=False, random_state=0)
    )[::-1]
    expected = torch.linalg.svdvals(matrix(operator)[0])[:3].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_scipy_takes_one_image(traced_case):
    """A SciPy operator is one matrix: for several images the message says what to do."""
    pytest.importorskip("scipy")
    traced = traced_case("plain-conv-chain")
    with pytest.raises(ValueError, match="one image"):
        abm.operator(traced.network, traced.x, "2").as_scipy()


def test_missing_scipy_is_answered_with_how_to_install_it(traced_case, monkeypatch):
    """Without SciPy the message names the extra."""
    traced = traced_case("plain-conv-chain")
    operator = abm.operator(traced.network, traced.x[:1], "2")
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="scipy"):
        operator.as_scipy()


# errors


WRONG = {
    "neither": (lambda op: op.forward(), "forward needs tangents .* Got neither"),
    "image-shape": (
        lambda op: op.forward(draw(2, 2, 6, 5)),
        r"image must have shape \(2, K, 2, 6, 6\) or \(2, 2, 6, 6\)\. Got \(2, 2, 6, 5\)",
    ),
    "image-count": (
        lambda op: op.forward(draw(3, 2, 6, 6)),
        r"image must have shape .* Got \(3, 2, 6, 6\)",
    ),
    "no-vector": (
        lambda op: op.forward(draw(2, 0, 2, 6, 6)),
        r"image must have shape .* Got \(2, 0, 2, 6, 6\)",
    ),
    "bias-length": (
        lambda op: op.forward(bias=draw(2, 6)),
        r"bias must have shape \(2, K, 7\) or \(2, 7\)\. Got \(2, 6\)",
    ),
    "counts": (
        lambda op: op.forward(draw(2, 3, 2, 6, 6), draw(2, 4, 7)),
        r"as many tangents of the image as of the bias\. Got 3 and 4",
    ),
    "dtype": (
        lambda op: op.forward(draw(2, 2, 6, 6).float()),
        r"image must be torch\.float64 as the pattern\. Got torch\.float32",
    ),
    "cotangent-shape": (
        lambda op: op.adjoint(draw(2, 4)),
        r"cotangent must have shape \(2, K, 4, 4, 4\)",
    ),
    "cotangent-dtype": (
        lambda op: op.adjoint(draw(2, 4, 4, 4).float()),
        r"cotangent must be torch\.float64",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_vectors_are_refused(traced_case, wrong):
    """The message says what shape or dtype was expected and what came."""
    call, match = WRONG[wrong]
    traced = traced_case("plain-conv-chain")
    with pytest.raises(ValueError, match=match):
        call(abm.operator(traced.network, traced.x, "2"))


def test_unknown_layer_is_answered_with_the_layers(traced_case):
    """The message lists the layers that are."""
    traced = traced_case("plain-conv-chain")
    with pytest.raises(ValueError, match="A layer must be one of 0, 1, 2, 3, 4, output"):
        abm.operator(traced.network, traced.x, "conv0")


# arithmetic


def switches():
    """What decides in which precision PyTorch computes."""
    backends = torch.backends
    found = {
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
    }
    if hasattr(getattr(backends.cudnn, "conv", None), "fp32_precision"):
        return found | {
            "cudnn": backends.cudnn.conv.fp32_precision,
            "mkldnn": backends.mkldnn.conv.fp32_precision,
        }
    return found | {"cudnn": backends.cudnn.allow_tf32, "mkldnn": "ieee"}


@pytest.fixture
def reduced_precision():
    """Every switch for faster and less exact arithmetic, put back after the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_switches_are_off_inside_and_put_back(reduced_precision):
    """Inside, there is no autocast, no gradient and full precision; then all is as before."""
    before = switches()
    assert before["matmul"] == "medium"
    with exact(CPU):
        inside = switches()
    assert switches() == before
    assert (inside["matmul"], inside["autocast"], inside["grad"]) == ("highest", False, False)
    assert inside["cudnn"] in ("ieee", False)
    assert inside["mkldnn"] == "ieee"
    assert before["cudnn"] in ("tf32", True)


def test_switches_are_put_back_after_an_exception(reduced_precision):
    """An exception inside leaves nothing switched."""
    before = switches()
    with pytest.raises(ZeroDivisionError), exact(CPU):
        1 / 0  # noqa: B018
    assert switches() == before


def test_switches_are_put_back_where_nothing_was_switched_on():
    """Also from PyTorch's own settings, and nested."""
    before = switches()
    with exact(CPU), exact(CPU):
        pass
    assert switches() == before


@pytest.fixture(scope="module")
def in_float32():
    """A float32 network, its images, and all of its results in plain settings."""
    model, x = make("residual-with-zero-padded-channels")
    network = abm.trace(model.float(), x.float())
    return network, x.float(), results(network, x.float())


def results(network, x):
    """Planes, values, reconstructions, tangents, cotangents and errors of a network."""
    planes = abm.hyperplanes(network, x, "conv2", "RM4")
    operator = abm.operator(network, x, "fc")
    image, bias = operator.dense()
    forward = operator.forward(x)
    check = abm.verify(network, x)["conv2"]
    tensors = (planes.image, planes.bias, planes.value, image, bias, forward)
    return *(t.clone() for t in tensors), torch.tensor(check.scaled)


def test_results_do_not_depend_on_the_switches(in_float32, reduced_precision):
    """Under autocast and reduced products, every result is bit for bit the one without them."""
    network, x, expected = in_float32
    for ours, theirs in zip(results(network, x), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_autocast_would_have_changed_them(in_float32, reduced_precision):
    """The test above can fail: the model itself computes something else under these switches."""
    network, x, _ = in_float32
    with exact(CPU):
        plain = network.model(x)
    assert not torch.equal(network.model(x).float(), plain)
