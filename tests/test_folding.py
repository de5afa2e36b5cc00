"""The equivalent network: equal outputs, batch norms merged, the rest named with a reason."""

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make, parameter, small_resnet
from torch import nn

import adjointbackmap as abm

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def assert_equivalent(model, x, folded):
    """The folded model computes what the model does."""
    torch.testing.assert_close(folded.model(x), model(x), **CLOSE)


def test_folded_network_computes_the_same(traced):
    """Outputs of every network of the catalogue are equal to rounding."""
    folded = abm.fold(traced.model, traced.x)
    assert_equivalent(traced.model, traced.x, folded)
    assert not folded.merged.keys() & folded.left.keys()


FOLDS = {
    "plain-conv-chain": ({}, {}),
    "conv-with-bias-before-batch-norm": ({"1": "0", "4": "3"}, {}),
    "residual-with-zero-padded-channels": ({"bn1": "conv1", "bn2": "conv2"}, {}),
    "conv-batch-norm-multiplier": ({"bn": "conv1", "m": "conv1"}, {}),
    "conv-in-one-dimension": ({"1": "0"}, {}),
    "mlp-on-flat-inputs": ({"1": "0"}, {}),
    "scalars-before-padded-convs": ({"m2": "conv2"}, {}),
    "multipliers": ({"one": "conv2"}, {}),
    "batch-norm-before-conv": ({}, {"0": "follows"}),
    "batch-norm-after-add": ({}, {"bn": "follows add"}),
    "conv-output-used-elsewhere": ({}, {"bn": "output of conv is used elsewhere"}),
    "shared-kernel": ({}, {"bn": "conv1"}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_merged_and_what_is_left(traced_case, name):
    """Merged: into which layer. Left: with a reason."""
    merged, left = FOLDS[name]
    traced = traced_case(name)
    folded = abm.fold(traced.model, traced.x)
    assert folded.merged == merged
    assert folded.left.keys() == left.keys()
    for factor, reason in left.items():
        assert reason in folded.left[factor]


def folded_net(function, shape=(1, 5, 5), **parts):
    """A network, two images and its fold."""
    model, x = make(lambda: (Net(function, **parts), shape))
    return model, x, abm.fold(model, x)


LEFT = {
    "module-called-twice": (
        lambda net, x: net.bn(net.conv(F.relu(net.conv(x)))),
        {"conv": nn.Conv2d(1, 1, 3, padding=1), "bn": nn.BatchNorm2d(1)},
        {"bn": "conv is used more than once"},
    ),
    "batch-norm-called-twice": (
        lambda net, x: net.bn(net.conv2(F.relu(net.bn(net.conv1(x))))),
        {"conv1": nn.Conv2d(1, 2, 3), "conv2": nn.Conv2d(2, 2, 3), "bn": nn.BatchNorm2d(2)},
        {"bn": "it is used more than once"},
    ),
    "multiplier-called-twice": (
        lambda net, x: net.conv2(net.conv1(x) * net.m) * net.m,
        {"conv1": nn.Conv2d(1, 2, 3), "conv2": nn.Conv2d(2, 2, 3), "m": parameter()},
        {"m": "used"},
    ),
    "multiplier-that-is-added-too": (
        lambda net, x: net.conv(x) * net.m + net.m,
        {"conv": nn.Conv2d(1, 2, 3), "m": parameter()},
        {"m": "m is used elsewhere too"},
    ),
    "kernel-that-is-used-by-a-function-too": (
        lambda net, x: net.bn(net.conv(x)) + F.conv2d(x, net.conv.weight),
        {"conv": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2)},
        {"bn": "conv.weight is used elsewhere too"},
    ),
    "kernel-whose-norm-is-read": (
        lambda net, x: net.bn(net.conv(x)) * float(net.conv.weight.norm().detach()),
        {"conv": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2)},
        {"bn": "conv.weight is used elsewhere too"},
    ),
    "statistics-that-are-read": (
        lambda net, x: net.bn(net.conv(x)) * net.bn.running_var.tolist()[0],
        {"conv": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2)},
        {"bn": "bn.running_var is used elsewhere too"},
    ),
    "multiplier-after-relu": (
        lambda net, x: F.relu(net.conv(x)) * net.m,
        {"conv": nn.Conv2d(1, 2, 3), "m": parameter()},
        {"m": "it follows relu"},
    ),
    "functional-conv": (
        lambda net, x: net.bn(F.conv2d(x, net.kernel)),
        {"kernel": parameter(2, 1, 3, 3), "bn": nn.BatchNorm2d(2)},
        {"bn": "not a convolution or linear layer of its own"},
    ),
    "multiplier-after-a-batch-norm-that-is-left": (
        lambda net, x: net.bn(net.conv1(x) + net.conv2(x)) * net.m,
        {
            "conv1": nn.Conv2d(1, 2, 3),
            "conv2": nn.Conv2d(1, 2, 3),
            "bn": nn.BatchNorm2d(2),
            "m": parameter(),
        },
        {"bn": "it follows add", "m": "it follows add"},
    ),
}


@pytest.mark.parametrize("why", LEFT)
def test_what_cannot_be_merged_is_left_with_a_reason(why):
    """A kernel or a factor that something else uses stays, and outputs stay with it."""
    function, parts, left = LEFT[why]
    model, x, folded = folded_net(function, **parts)
    assert_equivalent(model, x, folded)
    assert not folded.merged
    assert folded.left.keys() == left.keys()
    for name, reason in left.items():
        assert reason in folded.left[name]


TRANSPOSED = {
    "one-axis": (nn.ConvTranspose1d(2, 3, 3, stride=2), nn.BatchNorm1d(3), (2, 4)),
    "two-axes": (nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), (2, 3, 4)),
    "groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), (4, 3, 3)),
    "depthwise": (
        nn.ConvTranspose2d(3, 3, 2, groups=3),
        nn.BatchNorm2d(3, affine=False),
        (3, 3, 3),
    ),
    "three-axes": (nn.ConvTranspose3d(2, 4, 2, groups=2), nn.BatchNorm3d(4), (2, 2, 2, 2)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution_takes_batch_norm_and_multiplier(name):
    """Its kernel is (in, out / groups, ...): every out-channel of a group has its own factor."""
    conv, norm, shape = TRANSPOSED[name]
    model, x, folded = folded_net(
        lambda net, x: F.relu(net.bn(net.conv(x)) * net.m), shape, conv=conv, bn=norm, m=parameter()
    )
    assert folded.merged == {"bn": "conv", "m": "conv"}
    assert_equivalent(model, x, folded)


def test_batch_norm_over_positions_is_left():
    """After a linear layer with positions, batch norm scales these and not the features."""
    parts = {"fc": nn.Linear(5, 4), "bn": nn.BatchNorm1d(4)}
    model, x, folded = folded_net(lambda net, x: net.bn(net.fc(x)), (4, 5), **parts)
    assert_equivalent(model, x, folded)
    assert "positions of fc" in folded.left["bn"]


def test_scalar_buffer_is_merged_as_a_parameter_is():
    """A multiplier may be a buffer."""
    model, x, folded = folded_net(
        lambda net, x: net.conv(x) * net.m, conv=nn.Conv2d(1, 2, 3), m=torch.tensor(3.0)
    )
    assert_equivalent(model, x, folded)
    assert folded.merged == {"m": "conv"}
    assert float(folded.model.m) == 1


def test_order_of_modules_does_not_matter():
    """What feeds what is read off the data flow: modules may be registered in any order."""
    parts = {
        "bn_b": nn.BatchNorm2d(3),
        "bn_a": nn.BatchNorm2d(2),
        "b": nn.Conv2d(2, 3, 3),
        "a": nn.Conv2d(1, 2, 3),
    }
    model, x, folded = folded_net(
        lambda net, x: net.bn_b(net.b(F.relu(net.bn_a(net.a(x))))), **parts
    )
    assert_equivalent(model, x, folded)
    assert folded.merged == {"bn_a": "a", "bn_b": "b"}


def test_folded_kernel_is_that_of_eq_3_6():
    """w' = s w, b' = beta + s (b - mean), the batch norm an identity."""
    model, x = make("conv-with-bias-before-batch-norm")
    folded = abm.fold(model, x).model
    conv = model[0]
    norm = model[1]
    s = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded[0].weight, s.view(-1, 1, 1, 1) * conv.weight, **CLOSE)
    torch.testing.assert_close(
        folded[0].bias, norm.bias + s * (conv.bias - norm.running_mean), **CLOSE
    )
    assert isinstance(folded[1], nn.Identity)
    assert folded[3].bias is not None
    assert model[3].bias is None


def test_multiplier_becomes_one_and_scalars_stay():
    """The multiplier goes into the kernel; what is added stays a scalar of the same value."""
    model, x = make("scalars-before-padded-convs")
    folded = abm.fold(model, x).model
    assert float(folded.m2) == 1
    torch.testing.assert_close(folded.conv2.weight, model.m2 * model.conv2.weight, **CLOSE)
    assert folded.conv2.bias is None
    for i in range(5):
        assert torch.equal(folded.get_parameter(f"b{i}"), model.get_parameter(f"b{i}"))


def test_chain_of_batch_norm_and_multiplier_goes_into_one_kernel():
    """conv -> batch norm -> multiplier: the kernel takes both, the bias the multiplier."""
    model, x = make("conv-batch-norm-multiplier")
    folded = abm.fold(model, x).model
    s = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
    torch.testing.assert_close(
        folded.conv1.weight, model.m * s.view(-1, 1, 1, 1) * model.conv1.weight, **CLOSE
    )
    torch.testing.assert_close(
        folded.conv1.bias, model.m * (model.bn.bias - s * model.bn.running_mean), **CLOSE
    )


@pytest.mark.parametrize(
    "name", ["conv-batch-norm-multiplier", "scalars-before-padded-convs", "batch-norm-after-add"]
)
def test_fold_is_a_copy_with_the_same_names(name):
    """No tensor is shared with the model, module names stay, and the model is untouched."""
    model, x = make(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    folded = abm.fold(model, x).model
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in model.named_modules()]
    ours, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (folded, model))
    assert not ours & theirs
    assert not folded.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_folded_network_has_the_same_hyperplanes(traced_case):
    """The folded network has the same hyperplanes, its bias entries at the convolutions."""
    traced = traced_case("conv-with-bias-before-batch-norm")
    folded = abm.fold(traced.model, traced.x)
    network = abm.trace(folded.model, traced.x)
    assert network.biases.names == ("0.bias", "3.bias")
    ours, theirs = (
        abm.hyperplanes(n, traced.x, "output", "RM2") for n in (network, traced.network)
    )
    torch.testing.assert_close(ours.image, theirs.image, **CLOSE)
    torch.testing.assert_close(ours.value, theirs.value, **CLOSE)
    assert abm.reconstruction_test(ours)["error"] <= 1e-12


def test_small_resnet_folds_completely():
    """Every batch norm of a ResNet-18 in torchvision's layout goes into its convolution."""
    model, x = make(small_resnet)
    folded = abm.fold(model, x)
    assert_equivalent(model, x, folded)
    assert folded.merged.keys() == {
        n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)
    }
    assert folded.merged["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    assert not folded.left


def test_forward_that_reads_a_merged_module_is_refused():
    """An identity has no epsilon: one sentence with the line, not an AttributeError."""
    model = Net(
        lambda net, x: net.bn(net.conv(x)) * net.bn.eps,
        conv=nn.Conv2d(1, 2, 3),
        bn=nn.BatchNorm2d(2),
    )
    match = (
        r"The folded model must run on the example. Got AttributeError: .*'eps' at "
        r".*with bn merged: write a forward"
    )
    with pytest.raises(RuntimeError, match=match):
        abm.fold(model.eval(), torch.rand(1, 1, 4, 4))


def test_train_mode_is_refused():
    """Batch norm in train mode is not affine: the message says what to do."""
    model, x = make("conv-with-bias-before-batch-norm")
    with pytest.raises(ValueError, match=r"eval mode.*model\.eval\(\)"):
        abm.fold(model.train(), x)
