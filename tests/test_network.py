"""Contents of a trace: layers, receptive fields, the bias vector, and refusals."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make, not_affine, parameter
from torch import nn

import adjointbackmap as abm
from adjointbackmap.rules import RULES, Rule

CONV_MODES = ("RM4", "RM3", "RM2", "RM1")


def traced_fresh(name):
    """A network of the catalogue that may be changed, its images and its trace."""
    model, x = make(name)
    return model, x, abm.trace(model, x)


# layers


LAYERS = {
    "plain-conv-chain": ["0", "1", "2", "3", "4", "output"],
    "reused-module": ["conv", "act", "conv:1", "act:1", "conv:2", "output"],
    "functional-conv-on-raw-parameters": ["conv2d", "conv2d:1", "linear", "output"],
    "identities": ["0", "1", "2", "3", "4", "5", "6", "7", "output"],
    "in-place-relu": ["conv1", "act", "conv2", "output"],
    "scalars-before-padded-convs": ["conv0", "conv1", "conv2", "output"],
    "batch-norm-after-add": ["conv1", "conv2", "bn", "fc", "output"],
    "linear-with-positions": ["0", "1", "2", "3", "4", "output"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_names_of_the_modules_in_order(traced_case, name):
    """Every call is a layer: the module's name, numbered if repeated, or the operation's name."""
    assert list(traced_case(name).network.layers) == LAYERS[name]


def test_layers_inside_modules_have_dotted_names():
    """Nested modules keep their paths; functional calls are named after the calling module."""
    block = Net(
        lambda net, x: F.conv2d(net.inner(x), net.kernel),
        inner=nn.Conv2d(1, 2, 1),
        kernel=parameter(2, 2, 1, 1),
    )
    network = abm.trace(
        Net(lambda net, x: net.block(x), block=block).eval(), torch.rand(1, 1, 3, 3)
    )
    assert list(network.layers) == ["block.inner", "block.conv2d", "block", "output"]


KINDS = {
    ("plain-conv-chain", "0"): ("Conv2d", CONV_MODES, (2, 6, 6), (3, 6, 6)),
    ("plain-conv-chain", "1"): ("ReLU", ("RM2", "RM1"), None, (3, 6, 6)),
    ("reused-module", "conv:1"): ("Conv2d", CONV_MODES, (2, 5, 5), (2, 5, 5)),
    ("functional-conv-on-raw-parameters", "conv2d:1"): ("conv2d", CONV_MODES, (2, 5, 5), (2, 2, 2)),
    ("functional-conv-on-raw-parameters", "linear"): ("linear", ("RM0",), (8,), (3,)),
    ("conv-in-one-dimension", "0"): ("Conv1d", CONV_MODES, (2, 10), (3, 5)),
    ("average-pool-with-ceil", "7"): ("Linear", ("RM0",), (2,), (3,)),
    ("average-pool-with-ceil", "6"): ("Flatten", ("RM0",), None, (2,)),
    ("linear-with-positions", "2"): ("Linear", ("RM2",), (4, 4), (4, 3)),
    ("plain-conv-chain", "output"): ("output", ("RM2", "RM1"), None, (2, 2, 2)),
}


@pytest.mark.parametrize(("name", "layer"), KINDS, ids=lambda part: part)
def test_layers_have_kind_modes_and_shapes(traced_case, name, layer):
    """Kind, modes, and shapes without the batch."""
    found = traced_case(name).network.layers[layer]
    assert (found.kind, found.modes, found.in_shape, found.out_shape) == KINDS[name, layer]


def test_shapes_are_those_of_the_model(traced):
    """Every layer's shape is what a hook sees in the model."""
    shapes = {}

    def keep(name):
        def hook(module, inputs, output):
            # not of a recurrent layer, which gives two; what has infinite numbers is no layer
            if isinstance(output, torch.Tensor) and output.isfinite().all():
                shapes.setdefault(name, tuple(output.shape[1:]))

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in traced.model.named_modules() if n]
    out = traced.model(traced.x)
    for handle in handles:
        handle.remove()
    shapes["output"] = tuple(out.shape[1:])
    found = {name: layer.out_shape for name, layer in traced.network.layers.items()}
    assert shapes.items() <= found.items()


# receptive fields


FIELDS = {
    "plain-conv-chain": {"0": (3, 3), "1": (3, 3), "2": (5, 5), "4": (6, 6)},
    "stride-dilation-groups": {"0": (3, 3), "2": (8, 8)},
    "asymmetric-padding": {"conv1": (3, 3), "conv2": (6, 3)},
    "conv-in-one-dimension": {"0": (3,), "3": (5,)},
    "max-pool-with-overlap-padding-and-ceil": {"0": (3, 3), "1": (5, 5), "3": (9, 9)},
    "average-pool-with-ceil": {"1": (3, 3), "2": (5, 5), "7": (8, 8)},
    "mlp-on-flat-inputs": {"0": ()},
}


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_fields_are_as_counted_by_hand(traced_case, name):
    """Kernel, stride, dilation and pooling window, at most the image."""
    network = traced_case(name).network
    assert {layer: network.layers[layer].receptive_field for layer in FIELDS[name]} == FIELDS[name]


def test_receptive_field_is_never_smaller_than_the_true_one(traced):
    """No unit's hyperplane has non-zeros further apart than its layer's receptive field says."""
    for name, layer in traced.network.layers.items():
        image, _ = abm.operator(traced.network, traced.x, name).dense()
        spatial = len(layer.receptive_field)
        seen = (
            (image.reshape(-1, *traced.network.in_shape) != 0).flatten(1, -1 - spatial).any(1)
        )  # units, then rows and columns
        for axis, extent in enumerate(layer.receptive_field, start=1):
            along = seen.movedim(axis, 1).flatten(2).any(2) if spatial > 1 else seen
            places = torch.arange(along.shape[1])
            first = torch.where(along, places, len(places)).amin(1)
            last = torch.where(along, places, -1).amax(1)
            assert int((last - first + 1).max()) <= extent, (name, axis)


# the bias vector


NAMES = {
    "plain-conv-chain": {"0.bias": 3, "2.bias": 4},
    "no-bias": {},
    "reused-module": {"conv.bias": 2},
    "functional-conv-on-raw-parameters": {"offset": 2},
    "residual-with-zero-padded-channels": {"bn1": 3, "bn2": 4, "fc.bias": 3},
    "scalars-before-padded-convs": {"b0": 1, "b1": 1, "b2": 1, "b3": 1, "b4": 1},
    "shared-scalar": {"b": 1, "conv.bias": 2, "mul": 1},
    "constants-and-buffers": {
        "mean": 2,
        "rsub": 1,
        "conv.bias": 2,
        "sub": 1,
        "sub#1": 1,
        "prior": 3,
    },
    "constant-for-every-position": {"place": 32, "conv.bias": 2},
    "conv-with-bias-before-batch-norm": {"0.bias": 3, "1": 3, "4": 2},
    "conv-batch-norm-multiplier": {"bn": 3, "b": 1, "conv2.bias": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_bias_vector_has_an_entry_for_each_additive_scalar(traced_case, name):
    """Names, order and lengths; a parameter used twice is one entry at its first use."""
    biases = traced_case(name).network.biases
    assert {part.name: part.value.numel() for part in biases.values()} == NAMES[name]
    assert list(biases) == list(biases.names) == list(NAMES[name])
    assert len(biases) == len(biases.vector) == len(biases.labels) == sum(NAMES[name].values())


def test_slices_follow_each_other(traced):
    """The slices cut the vector b into its parts, in order and without gaps."""
    biases = traced.network.biases
    start = 0
    for part in biases.values():
        assert part.slice == slice(start, start + part.value.numel())
        assert torch.equal(biases.vector[part.slice], part.value.flatten())
        start = part.slice.stop
    assert start == len(biases)


def test_values_are_the_parameters(traced):
    """A part that stands for an additive parameter has its value."""
    tensors = {**dict(traced.model.named_parameters()), **dict(traced.model.named_buffers())}
    for part in traced.network.biases.values():
        if part.name in tensors:
            assert torch.equal(part.value, tensors[part.name].detach().reshape(part.value.shape))


def test_batch_norm_gives_its_shift(traced_case):
    """The entry of a batch norm is b' = beta - gamma mean / sqrt(var + eps)."""
    traced = traced_case("conv-with-bias-before-batch-norm")
    for name in ("1", "4"):
        norm = traced.model.get_submodule(name)
        expected = norm(torch.zeros(1, norm.num_features, 1, 1, dtype=torch.float64)).flatten()
        torch.testing.assert_close(
            traced.network.biases[name].value, expected.detach(), rtol=1e-14, atol=1e-14
        )


def test_constants_and_bounds_have_their_values(traced_case):
    """Constants and bounds of clamps are entries with their values; exact zeros are not."""
    biases = traced_case("constants-and-buffers").network.biases
    assert [float(biases[name].value) for name in ("rsub", "sub", "sub#1")] == [1.5, 0.25, 0.5]
    bounds = [
        p
        for p in traced_case("saturated-on-both-sides").network.biases.values()
        if p.parameter is None
    ]
    assert [float(p.value) for p in bounds] == pytest.approx(
        [-0.7, 0.9, 6.0, -0.3, 1.2, 0.1], abs=0
    )


def test_labels_name_every_element(traced_case):
    """A part of several elements is numbered, a scalar is not."""
    labels = traced_case("conv-batch-norm-multiplier").network.biases.labels
    assert labels == ("bn[0]", "bn[1]", "bn[2]", "b", "conv2.bias[0]", "conv2.bias[1]")


def test_biases_of_a_float32_model_are_computed_in_the_asked_precision():
    """b' in float64 is computed from the float32 parameters, not rounded to float32."""
    model, x = make("conv-with-bias-before-batch-norm")
    model = model.float()
    network = abm.trace(model, x.float())
    norm = model[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = (norm.bias.double() - scale * norm.running_mean.double()).detach()
    assert network.biases["1"].value.dtype == torch.float32
    torch.testing.assert_close(
        network.biases_in(torch.float64)["1"].value, expected, rtol=1e-14, atol=1e-14
    )


# until


def test_until_ends_the_network(traced_case):
    """What comes after the layer does not count: neither its layers nor its biases."""
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x, until="2")
    assert list(network.layers) == ["0", "1", "2", "output"]
    assert network.biases.names == ("0.bias", "2.bias")
    planes = abm.hyperplanes(network, x, "output", "RM2")
    torch.testing.assert_close(planes.value, model[:3](x).detach().movedim(1, -1), rtol=0, atol=0)
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_until_cuts_before_what_is_not_affine():
    """A network with a non-affine tail works up to the layer before the tail."""
    model, x = make(not_affine)
    network = abm.trace(model, x, until="block.conv")
    assert list(network.layers) == ["first", "block.conv", "output"]
    assert (
        abm.reconstruction_test(abm.hyperplanes(network, x, "block.conv", "RM2"))["error"] <= 1e-12
    )


def test_unknown_until_is_answered_with_the_layers():
    """The message lists what until may be."""
    model, x = make("plain-conv-chain")
    with pytest.raises(ValueError, match=r"until must be one of .*\b4\b.* Got 'fc'"):
        abm.trace(model, x, until="fc")


# refusals


def test_unsupported_operations_are_all_named_with_their_modules():
    """One message names every operation that has no rule, with its module path."""
    model, x = make(not_affine)
    with pytest.raises(abm.UnsupportedOperation) as raised:
        abm.trace(model, x)
    message = str(raised.value)
    for named in ("gelu at block", "mul at gate", "softmax at last"):
        assert named in message
    assert "until=" in message
    assert isinstance(raised.value, ValueError)


def test_refusal_comes_before_anything_is_computed(monkeypatch):
    """No gate and no linear map is computed for a network that is refused."""
    computed = []
    for rule in set(RULES.values()):
        if issubclass(rule, Rule):
            monkeypatch.setattr(rule, "forward", lambda *_: computed.append(1))
    model, x = make(not_affine)
    with pytest.raises(abm.UnsupportedOperation):
        abm.trace(model, x)
    assert not computed


def batch_mixed(net, x):
    """Subtract the mean over the batch."""
    return net.conv(x - x.mean(0, keepdim=True))


def batch_moved(net, x):
    """Let the batch and the channels change places."""
    return net.conv(x).transpose(0, 1) + 0.0


REFUSED = {
    "kernel-from-data": (
        lambda net, x: F.conv2d(net.conv(x), net.conv(x)[:1, :, :2, :2]),
        "conv2d",
    ),
    "mean-over-the-batch": (batch_mixed, r"Got mean \(.*batch.*\): replace"),
    "batch-moved": (batch_moved, "moves the batch"),
    "functional-dropout": (
        lambda net, x: F.dropout(net.conv(x)),
        "dropout .*training=self.training",
    ),
    "square": (lambda net, x: net.conv(x) ** 2, "pow"),
    "division-by-data": (lambda net, x: 1 / net.conv(x), "reciprocal|div"),
    "train-mode-batch-norm": (
        lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
        "batch_norm",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_affine_per_image_is_refused(why):
    """The message names the operation and what is wrong with it."""
    function, match = REFUSED[why]
    model = Net(function, conv=nn.Conv2d(2, 2, 1)).eval()
    with pytest.raises(abm.UnsupportedOperation, match=match):
        abm.trace(model, torch.rand(2, 2, 4, 4))


def test_branch_on_the_data_is_refused():
    """A Python branch on the image's values cannot be captured, and the message says so."""
    model = Net(lambda net, x: net.conv(x) if x.sum() > 0 else x, conv=nn.Conv2d(1, 1, 1)).eval()
    with pytest.raises(ValueError, match=r"must be a graph that torch\.export can capture"):
        abm.trace(model, torch.rand(1, 1, 3, 3))


@pytest.mark.parametrize("path", ["", "1"], ids=["whole-model", "one-module"])
def test_train_mode_is_refused(path):
    """Any module in train mode is named, and the message says how to mend it."""
    model, x = make("conv-with-bias-before-batch-norm")
    model.get_submodule(path).train()
    with pytest.raises(ValueError, match=r"must be in eval mode.*call model.eval\(\)"):
        abm.trace(model, x)


@pytest.mark.parametrize(
    "example",
    [torch.rand(5), torch.zeros(1, 2, 6, 6, dtype=torch.int64), torch.zeros(0, 2, 6, 6)],
    ids=["flat", "integers", "empty"],
)
def test_example_must_be_a_batch_of_floats(example):
    """An example of another kind is refused with its shape and dtype."""
    model, _ = make("plain-conv-chain")
    with pytest.raises(ValueError, match="example must be a batch"):
        abm.trace(model, example)


def test_unknown_layer_is_answered_with_the_layers(traced_case):
    """The message lists the layers that are."""
    with pytest.raises(ValueError, match=r"A layer must be one of 0, 1, 2, 3, 4, output. Got 'fc'"):
        traced_case("plain-conv-chain").network.layer("fc")


# a model that was changed since


def optimizer_step(model, x):
    """A training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()


def edited_data(model, x):
    """An edit that no version counter sees."""
    model[0].weight.data[0, 0, 0, 0] += 1


def replaced_parameter(model, x):
    """Another tensor under the same name."""
    model[0].weight = nn.Parameter(model[0].weight.detach().clone() + 1)


def replaced_module(model, x):
    """Another module under the same name."""
    model[0] = nn.Conv2d(2, 3, 3).double().eval()


def changed_buffer(model, x):
    """Another statistic of a batch norm."""
    model[1].running_mean += 1


def removed_bias(model, x):
    """One parameter less."""
    model[0].bias = None


def into_train_mode(model, x):
    """Train mode."""
    model.train()


def into_float32(model, x):
    """Another dtype."""
    model.float()


CHANGES = [
    optimizer_step,
    edited_data,
    replaced_parameter,
    replaced_module,
    changed_buffer,
    removed_bias,
    into_train_mode,
]


@pytest.mark.parametrize("change", [*CHANGES, into_float32], ids=lambda change: change.__name__)
def test_changed_model_is_refused(change):
    """Computing with a model that was changed since the trace raises, and says what to do."""
    model, x, network = traced_fresh("conv-with-bias-before-batch-norm")
    abm.hyperplanes(network, x, "0", "RM1")
    change(model, x)
    for compute in (
        lambda: abm.hyperplanes(network, x, "0", "RM1"),
        lambda: abm.operator(network, x, "0"),
        lambda: abm.verify(network, x),
    ):
        with pytest.raises(RuntimeError, match=r"trace it again|model.eval\(\)"):
            compute()


def test_change_is_named():
    """The message names the parameter that was changed."""
    model, x, network = traced_fresh("conv-with-bias-before-batch-norm")
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"Changed since: 3\.weight"):
        abm.hyperplanes(network, x, "0", "RM1")


def test_grads_are_no_change():
    """A backward pass alone changes nothing that the trace holds."""
    model, x, network = traced_fresh("plain-conv-chain")
    model(x).sum().backward()
    assert abm.reconstruction_test(abm.hyperplanes(network, x, "4", "RM2"))["error"] <= 1e-12


# batches


@pytest.mark.parametrize("images", [1, 3, 7])
@pytest.mark.parametrize(
    "name", ["residual-with-zero-padded-channels", "conv-in-one-dimension", "mlp-on-flat-inputs"]
)
def test_trace_is_good_for_any_batch_size(traced_case, name, images):
    """Each image of a batch has the hyperplanes that it has alone."""
    traced = traced_case(name)
    x = torch.randn(
        images,
        *traced.network.in_shape,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )
    planes = abm.hyperplanes(traced.network, x, "output", "RM0")
    assert abm.reconstruction_test(planes)["error"] <= 1e-12
    alone = [abm.hyperplanes(traced.network, one, "output", "RM0") for one in x]
    torch.testing.assert_close(
        planes.image, torch.cat([p.image for p in alone]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        planes.bias, torch.cat([p.bias for p in alone]), rtol=1e-12, atol=1e-12
    )


def test_example_of_one_image_is_enough():
    """A trace from one image works for a batch of others."""
    model, x = make("scalars-before-padded-convs")
    planes = abm.hyperplanes(abm.trace(model, x[:1]), torch.cat([x, -x]), "output", "RM2")
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_small_resnet_has_the_layers_of_torchvision(traced_case):
    """A ResNet-18: names, receptive fields of the stem, and a bias entry for each shift."""
    model = traced_case("small-resnet").model
    network = traced_case("small-resnet").network
    assert [n for n in network.layers if "." not in n] == [
        *(
            "conv1",
            "bn1",
            "relu",
            "maxpool",
            "layer1",
            "layer2",
            "layer3",
            "layer4",
            "avgpool",
            "fc",
            "output",
        ),
    ]
    assert network.layers["conv1"].receptive_field == (7, 7)
    assert network.layers["maxpool"].receptive_field == (11, 11)
    assert network.layers["layer1.0.conv2"].modes == CONV_MODES
    shifts = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert len(network.biases) == shifts + 10
