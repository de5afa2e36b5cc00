"""Every operation with a rule is exact both ways; the others are refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make
from checks import (
    assert_close,
    assert_field_contains,
    assert_modes_are_sums,
    assert_reconstructed,
    declared_field,
    extents,
    true_field,
)
from torch import nn

import adjointbackmap as abm
from adjointbackmap.rules.linear import Masked
from adjointbackmap.rules.piecewise import (
    Clamp,
    HardShrink,
    HardSigmoid,
    Hardtanh,
    ReLU6,
    SoftShrink,
    Threshold,
)

# PyTorch's own derivative of hard sigmoid in float64 is 1/6 rounded to float32;
# the reconstruction is exact with 1/6.
DENSE_TOLERANCE = {"hard-sigmoid": 1e-7}


def test_operation_is_exact(operation):
    """Forward and adjoint are transposes, the matrix is the Jacobian, all units are exact."""
    for name in operation.network.layers:
        operator = abm.operator(operation.network, operation.x, name)
        abm.dot_test(operator)
        abm.dense_test(operator, operation.x, DENSE_TOLERANCE.get(operation.name))
    assert_reconstructed(operation.network, operation.x)


def test_pattern_at_an_eighth_is_the_one_at_one(operation):
    """A power of two times image, biases and kinks changes no gate, winner or mask."""
    eighth = abm.record_pattern(operation.network, operation.x, scale=1 / 8)
    assert eighth.equal(abm.record_pattern(operation.network, operation.x))


def test_value_is_the_models(operation):
    """The value of an operation's units is the model's output, bit for bit."""
    mode = operation.network.layers["output"].modes[0]
    planes = abm.hyperplanes(operation.network, operation.x, "output", mode)
    output = operation.model(operation.x).detach()
    assert torch.equal(
        planes.value, output.movedim(1, -1) if "out_channel" in planes.units.names else output
    )


# receptive fields


WHOLE_IMAGE = set(
    """
    adaptive-average adaptive-max added-mask-of-infinities filled-with-infinity
    filled-with-minus-infinity running-maximum-from-minus-infinity adaptive-max1d assignment
    bilinear-aligned cat-of-positions circular-padding einsum einsum-with-dots expand-and-repeat
    flip index index-of-positions largest largest-of-all matmul matmul-from-the-left max-pool3d
    maximum maxout mean-and-sum nearest-exact nearest-to-a-size one-number permute product
    products-of-a-batch reshape roll select sliding-windows split stack tile transpose
    unfold-and-fold sort group-sort order-statistics quantile sorted-by-another gather scatter
    index-add assignment-at-places unpooling unpooling-on-a-line unpooling-of-a-volume tensordot
    tensordot-of-two cross-product differences stacks-of-positions rotation triangles diagonals
    diagonal-scatter cumulative-sum-of-positions norms pairwise-distance grid-sample
    grid-sample-nearest grid-sample-of-a-volume affine-grid antialiased products-and-sums
    product-and-sum bilinear-with-a-constant relu-rnn relu-rnn-states relu-rnn-cell
    written-into-nothing
    """.split()
)
"""Operations whose positions move, or whose rule names no field: any pixel may count."""

WIDER = set(
    """
    padding-that-cuts padding-with-a-number pads-on-a-line reflect-padding reflect-padding-that-cuts
    replicate-padding replicate-padding-that-cuts transposed-conv-dilated transposed-conv3d
    """.split()
)
"""Operations with a field as wide as the widest position's: padding, skipped positions."""


def test_receptive_field_is_as_declared(operation):
    """Non-zeros of many Jacobians lie inside the declared field, and reach its ends."""
    images = torch.randn(
        12,
        *operation.network.in_shape,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(5),
    )
    declared = declared_field(operation.network, "output")
    assert (declared is None) == (operation.name in WHOLE_IMAGE)
    if declared is None:
        return
    true = true_field(operation.network, images, "output")
    assert_field_contains(true, declared)
    for axis, mask in enumerate(declared):
        assert operation.name in WIDER or torch.equal(extents(true, axis), mask)


# constants


def frame(c):
    """Where ``padding-with-a-number`` adds positions."""
    return F.pad(torch.zeros_like(c), (1, 0, 2, 1), value=1)


CONSTANTS = {
    "hard-sigmoid": [
        ("middle", 0.5, lambda c: (4 * c).abs() < 3),
        ("top", 1, lambda c: 4 * c >= 3),
    ],
    "relu6": [("max", 6, lambda c: 8 * c >= 6)],
    "hardtanh": [("min", -0.3, lambda c: c <= -0.3), ("max", 0.4, lambda c: c >= 0.4)],
    "threshold": [("value", -0.8, lambda c: c <= 0.1)],
    "threshold-at-zero": [],
    "hard-shrink": [],
    "soft-shrink": [
        (None, 0.4, lambda c: -c.sign() * (c.abs() > 0.4))
    ],  # PyTorch names it, by its version
    "clamp-max": [
        ("max", 0.3, lambda c: c > 0.3),
        ("min", -0.2, lambda c: c < -0.2),
        ("min#1", 0.1, lambda c: c < 0.1),
        ("max#1", 0.9, lambda c: c > 0.9),
    ],
    "padding-with-a-number": [("pad", 0.7, frame)],
    "where": [("sub", 1, lambda c: -1.0 * (c <= 0.1))],
    "where-several": [("where", 0.3, lambda c: (c > 0) & (c[:, :1] < 0.5) | (c < -0.5))],
    "where-equal": [("where", 0.7, lambda c: c <= 0), ("masked_fill", -1.5, lambda c: c < 0)],
    "mask-as-factor": [("mul", 0.3, lambda c: c < 0), ("one", 1, lambda c: -1.0 * (c > 1))],
    "sign": [("mul", 0.2, lambda c: -c.sign())],
}
"""Operation -> its entries of ``b``: name, value, coefficient at each unit."""


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_entries_with_their_coefficients(traced_case, name):
    """Name and value of every entry, and how much of it each unit has."""
    traced = traced_case(name)
    c = traced.model.first(traced.x)
    found = list(traced.network.biases.values())[1:]  # after the bias of the layer before
    coefficients = abm.operator(traced.network, traced.x, "output").dense()[1]
    for bias, (entry, value, coefficient) in zip(found, CONSTANTS[name], strict=True):
        assert bias.name == (entry or bias.name)
        assert float(bias.value) == value
        assert torch.equal(coefficients[..., bias.slice.start], coefficient(c).to(c.dtype))


VECTORS = {
    "clamp-between-tensors": [(-1, "per_channel"), (0.5, "per_channel")],
    "maximum-with-constants": [(1, "per_channel")],
    "cat": [(1, "per_channel")],
}


@pytest.mark.parametrize("name", VECTORS)
def test_constant_tensors_are_entries(traced_case, name):
    """A bound or a part of the output that is a tensor has an entry for each of its elements."""
    traced = traced_case(name)
    found = list(traced.network.biases.values())[1:]
    for bias, (factor, buffer) in zip(found, VECTORS[name], strict=True):
        assert torch.equal(bias.value.flatten(), factor * getattr(traced.model, buffer))


RULES = {
    "hard-shrink": (HardShrink(0.4), lambda c: F.hardshrink(c, 0.4)),
    "soft-shrink": (SoftShrink(0.4), lambda c: F.softshrink(c, 0.4)),
    "relu6": (ReLU6(0.0, 6.0), F.relu6),
}
"""Rules of operations that newer versions of PyTorch take apart before a trace sees them."""


def test_tensor_of_one_number_is_one_entry(traced_case):
    """``ones_like``, ``full_like`` and ``full`` add one number everywhere: one entry of ``b``."""
    biases = traced_case("constants-like").network.biases
    values = {name: part.value.tolist() for name, part in biases.items() if name != "first.bias"}
    assert list(values.values())[:2] == [[1.0], [1.5]]
    assert {len(value) for value in values.values()} == {1}


@pytest.mark.parametrize("name", RULES)
def test_rule_computes_the_function(name):
    """Gates at k times the input, then the linear map at the input: the function itself."""
    rule, function = RULES[name]
    c = torch.linspace(-8, 8, 65, dtype=torch.float64)[None]
    entries = [torch.full_like(c, value) for _, value in getattr(rule, "entries", list)()]
    gates = rule.gates(1 / 8, c / 8)
    assert torch.equal(rule.forward(gates, c, *entries), function(c))
    grad = torch.func.jacrev(lambda c: function(c).sum())(c)
    assert torch.equal(
        rule.adjoint(gates, torch.ones_like(c), [c.shape[1:]] * (1 + len(entries)))[0], grad
    )


KINKS = {
    "hard-sigmoid": HardSigmoid,
    "threshold": Threshold,
    "clamp-max": Clamp,
    "hardtanh": Hardtanh,
    "saturated-on-both-sides": Hardtanh,
    "hard-shrink": Masked,
    "soft-shrink": Masked,
    "where": Masked,
    "where-several": Masked,
}


@pytest.mark.parametrize("name", KINKS)
def test_kink_left_unscaled_would_change_gates(traced_case, monkeypatch, name):
    """k multiplies the kinks: with those of k = 1, the pattern at an eighth differs."""
    traced = traced_case(name)
    at_one = abm.record_pattern(traced.network, traced.x)
    right = KINKS[name].gates
    assert at_one.equal(abm.record_pattern(traced.network, traced.x, 1 / 8))
    monkeypatch.setattr(
        KINKS[name], "gates", lambda self, scale, *inputs: right(self, 1.0, *inputs)
    )
    assert not at_one.equal(abm.record_pattern(traced.network, traced.x, 1 / 8))


# kernels


def between(module, inputs, outputs, axes):
    """A module between two convolutions, so that it has biases before it and gates around it."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(
        conv(1, inputs, 2), nn.ReLU(), module, nn.LeakyReLU(0.3), conv(outputs, 2, 2)
    )


def assert_exact_kernel(network, x, layer):
    """The three tests at the output, every unit of every layer, and the identities of modes."""
    operator = abm.operator(network, x, "output")
    abm.dot_test(operator)
    abm.dense_test(operator, x)
    assert_reconstructed(network, x)
    assert_modes_are_sums(network, x, layer)


TRANSPOSED = {
    "1d": (lambda: nn.ConvTranspose1d(3, 2, 3, 2, 1, 1), 3, 2, 1),
    "1d-groups": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), 4, 6, 1),
    "2d": (lambda: nn.ConvTranspose2d(3, 2, (3, 2), (2, 1), (1, 0)), 3, 2, 2),
    "2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), 4, 6, 2),
    "2d-depthwise": (lambda: nn.ConvTranspose2d(3, 3, 2, groups=3, bias=False), 3, 3, 2),
    "2d-dilated": (lambda: nn.ConvTranspose2d(2, 3, 2, dilation=2), 2, 3, 2),
    "3d": (lambda: nn.ConvTranspose3d(2, 2, 2, (1, 2, 1)), 2, 2, 3),
    "3d-groups": (lambda: nn.ConvTranspose3d(2, 4, 2, groups=2), 2, 4, 3),
}


def kernel_by_kernel(conv, F_j, j, i):
    """Transposed convolution of out-channel ``i`` and in-channel ``j`` of its group."""
    per_group = conv.out_channels // conv.groups
    channel = i // per_group * (conv.in_channels // conv.groups) + j
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[conv.weight.dim() - 3]
    w_ji = conv.weight[channel : channel + 1, i % per_group : i % per_group + 1]
    geometry = (conv.stride, conv.padding, conv.output_padding, 1, conv.dilation)
    return function(F_j[:, channel : channel + 1], w_ji, None, *geometry)[:, 0]


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution_has_the_modes(name):
    """Sums over positions and in-channels; RM4 is the product with one kernel of a group."""
    build, inputs, outputs, axes = TRANSPOSED[name]
    model, x = make(lambda: (between(build(), inputs, outputs, axes), (1, *(4, 3, 3)[:axes])))
    network = abm.trace(model, x)
    assert network.layers["2"].modes == ("RM4", "RM3", "RM2", "RM1")
    assert_exact_kernel(network, x, "2")
    planes = abm.hyperplanes(network, x, "2", "RM4")
    abm.reconstruction_test(planes)
    for j in range(inputs // model[2].groups):
        for i in range(outputs):
            assert_close(
                planes.value[..., j, i], kernel_by_kernel(model[2], model[:2](x), j, i).detach()
            )


PADDED = {
    f"{axes}d-{mode}": (conv, axes, mode, (2, 1, 1)[:axes])
    for axes, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1)
    for mode in ("reflect", "replicate", "circular")
} | {
    "2d-same-and-reflect": (nn.Conv2d, 2, "reflect", "same"),
    "1d-same-and-zeros": (nn.Conv1d, 1, "zeros", "same"),
}


@pytest.mark.parametrize("name", PADDED)
def test_convolution_module_pads_in_its_own_way(name):
    """``padding_mode`` of a module in 1, 2 and 3 dimensions, and ``"same"`` with an even kernel."""
    conv, axes, mode, padding = PADDED[name]
    module = lambda: conv(2, 2, (2, 3, 2)[:axes], padding=padding, padding_mode=mode)  # noqa: E731
    model, x = make(lambda: (between(module(), 2, 2, axes), (1, *(5, 4, 3)[:axes])))
    assert_exact_kernel(abm.trace(model, x), x, "2")


# what is refused


BATCH = "over the images of a batch"
MOVES = "moves the batch out of the first dimension"
STATISTICS = "its statistics depend on the image"
TWO_DATA = "its second factor depends on the image"
REFUSED = {
    "instance-norm": (nn.InstanceNorm1d(4), rf"instance_norm at part \({STATISTICS}"),
    "layer-norm": (nn.LayerNorm(6), rf"layer_norm at part \({STATISTICS}"),
    "group-norm": (nn.GroupNorm(2, 4), rf"group_norm at part \({STATISTICS}"),
    "rms-norm": (nn.RMSNorm(6), rf"rms_norm at part \({STATISTICS}"),
    "batch-norm-without-statistics": (nn.BatchNorm1d(4, track_running_stats=False), STATISTICS),
    "lp-pooling": (nn.LPPool1d(2, 2), "Got pow at part"),
    "circular-padding-of-what-was-cut": (
        lambda net, x: F.pad(x, (-4, 4), mode="circular"),
        "it pads by 4 numbers a side that has 2 left",
    ),
    "hardswish": (nn.Hardswish(), "Got hardswish at part"),
    "gelu": (nn.GELU(), "Got gelu at part"),
    "silu": (nn.SiLU(), "Got silu at part"),
    "sigmoid": (nn.Sigmoid(), "Got sigmoid at part"),
    "softmax": (nn.Softmax(1), "Got softmax at part"),
    "product-of-data": (lambda net, x: x * F.relu(x), rf"Got mul \({TWO_DATA}\)"),
    "quotient-of-data": (
        lambda net, x: x / (1 + x.abs()),
        r"Got div \(its divisor depends on the image",
    ),
    "power": (lambda net, x: x**2, "Got pow:"),
    "matrix-product-of-data": (lambda net, x: x @ x.mT, rf"Got matmul \({TWO_DATA}\)"),
    "einsum-of-data": (
        lambda net, x: torch.einsum("ncw,nkw->nck", x, x),
        "several of its operands depend on the image",
    ),
    "mask-of-a-product": (lambda net, x: x * (x * x > 1), rf"Got mul \({TWO_DATA}\)"),
    "functional-dropout": (
        lambda net, x: F.dropout(x),
        r"drops units at random: pass training=self\.training",
    ),
    "functional-rrelu": (
        lambda net, x: F.rrelu(x, training=True),
        r"draws slopes at random: pass training=self\.training",
    ),
    "flip-of-the-batch": (lambda net, x: x.flip(0), rf"Got flip \(it goes {BATCH}\)"),
    "roll-of-the-batch": (lambda net, x: x.roll(1, 0), rf"Got roll \(it goes {BATCH}\)"),
    "roll-of-everything": (
        lambda net, x: x.roll(1),
        rf"Got roll \(it goes {BATCH}: name the dimensions\)",
    ),
    "sum-over-the-batch": (lambda net, x: x - x.sum(0, keepdim=True), rf"Got sum \(it {MOVES}\)"),
    "mean-over-the-batch": (
        lambda net, x: x - x.mean(0, keepdim=True),
        rf"Got mean \(it {MOVES}\)",
    ),
    "largest-of-the-batch": (
        lambda net, x: x - x.amax(0, keepdim=True),
        rf"Got amax \(it {MOVES}\)",
    ),
    "first-image": (lambda net, x: x - x[:1], rf"Got slice \(it {MOVES}\)"),
    "images-in-another-order": (lambda net, x: x[[1, 0]], rf"Got index \(it goes {BATCH}\)"),
    "cat-over-the-batch": (lambda net, x: torch.cat([x, x]), rf"Got cat \(it {MOVES}\)"),
    "stack-before-the-batch": (lambda net, x: torch.stack([x, x]), rf"Got stack \(it {MOVES}\)"),
    "batch-that-is-transposed": (
        lambda net, x: x.transpose(0, 1),
        rf"Got transpose \(it {MOVES}\)",
    ),
    "batch-that-is-merged": (
        lambda net, x: x.reshape(-1, 6),
        rf"Got (view|reshape) \(it {MOVES}\)",
    ),
    "padding-of-the-batch": (
        lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 0)),
        rf"Got pad \(it {MOVES}\)",
    ),
    "sort-of-the-batch": (lambda net, x: x.msort(), "Got msort:"),
    "quantile-of-everything": (
        lambda net, x: x - x.quantile(0.5),
        rf"Got quantile \(it goes {BATCH}|moves the batch",
    ),
    "place-in-everything": (lambda net, x: x * x.argmax(), "Got argmax"),
    "all-last-states": (
        Net(
            lambda net, x: net.rnn(x)[1].transpose(0, 1),
            rnn=nn.RNN(6, 3, 2, nonlinearity="relu", batch_first=True),
        ),
        r"Got transpose at .* \(its input has the batch in the second dimension",
    ),
    "half-precision": (
        lambda net, x: x.half().double(),
        r"casts to torch\.float16, and the network computes in torch\.float64",
    ),
    "integers": (
        lambda net, x: x.int().double(),
        r"casts to torch\.int32, and the network computes in torch\.float64",
    ),
}


def with_part(part):
    """One module or function in float64 and eval mode, and two images of shape (4, 6)."""
    model = (
        Net(part) if not isinstance(part, nn.Module) else Net(lambda net, x: net.part(x), part=part)
    )
    return model.double().eval(), torch.randn(2, 4, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_piecewise_affine_is_refused_by_name(name):
    """The message names the operation, its module, and why."""
    part, match = REFUSED[name]
    model, x = with_part(part)
    with pytest.raises(abm.UnsupportedOperation, match=match):
        abm.trace(model, x)


def test_images_left_out_are_refused():
    """The capture says that a network which returns fewer images than it took has no batch."""
    model, x = with_part(lambda net, x: x[1:])
    with pytest.raises(ValueError, match=r"for any batch size\. Got a model that fixes the batch"):
        abm.trace(model, x)


def test_cast_to_a_finer_dtype_is_refused():
    """``.double()`` inside a float32 model: the trace would compute it in float32."""
    model, x = with_part(lambda net, x: x.double().relu())
    with pytest.raises(
        abm.UnsupportedOperation,
        match=r"casts to torch\.float64, and the network computes in torch\.float32",
    ):
        abm.trace(model.float(), x.float())


def test_cast_to_the_models_own_dtype_does_not_round_in_float64():
    """``.float()`` changes nothing in float32. In float64 it would round: it becomes a cast to it.

    The value is computed so too. A model in float64 that casts to float32 stays refused.
    """

    def forward(net, x):
        sums = torch.cumsum(F.relu(x.float()), 1, dtype=torch.float32)
        return (sums + torch.arange(4, dtype=torch.float32)[:, None] / 7).to(torch.float32)

    model, x = with_part(forward)
    double = copy.deepcopy(model)
    network = abm.trace(model.float(), x.float())
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        planes = abm.hyperplanes(network, x.float(), "output", "RM2", dtype=dtype)
        assert abm.reconstruction_test(planes, tolerance=limit)["error"] <= limit
    assert not torch.equal(planes.value, planes.value.float().double())
    words = r"casts to torch\.float32, and the network computes in torch\.float64"
    with pytest.raises(abm.UnsupportedOperation, match=words):
        abm.trace(double, x)


def test_antialiased_interpolation_to_one_column_is_refused():
    """PyTorch repeats the first row there, unless the rows stay as many: then it is right."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def network(size):
        resize = Net(lambda net, x: F.interpolate(x, size, mode="bilinear", antialias=True))
        return abm.trace(resize.double().eval(), x)

    with pytest.raises(abm.UnsupportedOperation, match="PyTorch repeats the first row of one"):
        network((4, 1))
    one = torch.nn.functional.interpolate(x, (4, 1), mode="bilinear", antialias=True)
    assert (one == one[:, :, :1]).all(), "PyTorch has mended it: the refusal may go"
    abm.dot_test(abm.operator(network((6, 1)), x, "output"))
