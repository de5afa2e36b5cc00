"""Captum's dialect, against torch's autograd on the untouched module; captum is not needed."""

import copy

import pytest
import torch
from cases import Net, make, not_affine
from checks import assert_close as close_to
from torch import nn

import adjointbackmap as abm
from adjointbackmap.captum import adjoint

LAYERS = {
    "plain-conv-chain": ["0", "3", "4"],
    "residual-with-zero-padded-channels": ["conv2", "bn2", "fc"],
    "in-place-relu": ["conv1", "act"],
    "max-pool-with-overlap-padding-and-ceil": ["1", "3"],
    "mlp-on-flat-inputs": ["1", "3"],
}
PAIRS = [(case, layer) for case, layers in LAYERS.items() for layer in layers]


def gradient(model, x, choose, layer=None):
    """Gradient by the inputs of what ``choose`` makes of a layer's output, from autograd."""
    outputs = []
    module = model if layer is None else layer
    handle = module.register_forward_hook(lambda _, inputs, output: outputs.append(output.clone()))
    image = x.clone().requires_grad_()
    model(image)
    handle.remove()
    return torch.autograd.grad(choose(outputs[0]).sum(), image)[0]


def assert_close(ours, theirs):
    """Equal to float64's rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def flat():
    """A classifier of three classes."""
    return make("average-pool-with-ceil")


@pytest.fixture(scope="module")
def maps():
    """A network whose output and layers are maps."""
    return make("plain-conv-chain")


@pytest.fixture(scope="module")
def of_classes(flat):
    """The method for the classifier's output."""
    return abm.captum.AdjointBackMap(flat[0])


@pytest.fixture(scope="module")
def of_maps(maps):
    """The method for a layer of four maps of four by four."""
    return abm.captum.AdjointBackMap(maps[0], maps[0][2])


# layers and units


@pytest.mark.parametrize(("case", "layer"), PAIRS)
def test_image_part_is_the_gradient(case, layer):
    """Of the first and the last unit of a layer."""
    model, x = make(case)
    module = model.get_submodule(layer)
    method = abm.captum.AdjointBackMap(model, module)
    axes = len(method.network(x).layers[layer].out_shape)
    for unit in ((0,) * axes, (-1,) * axes):
        image = method.attribute(x, unit)
        assert_close(
            image, gradient(model, x, lambda out, unit=unit: out[(slice(None), *unit)], module)
        )
        assert image.dtype == x.dtype
        assert not image.requires_grad


def test_the_layer_and_the_unit_have_two_names_each(maps):
    """A module or its name, neuron_selector or target."""
    model, x = maps
    for layer in (model[2], "2"):
        method = abm.captum.AdjointBackMap(model, layer)
        for arguments in ({"neuron_selector": (1, 2, 3)}, {"target": (1, 2, 3)}):
            assert_close(
                method.attribute(x, **arguments),
                gradient(model, x, lambda out: out[:, 1, 2, 3], model[2]),
            )


SELECTORS = {
    "one-unit": ((1, 2, -1), lambda out: out[:, 1, 2, -1]),
    "slice-sums": ((slice(0, 3), 1, slice(None)), lambda out: out[:, 0:3, 1].sum((1, 2))),
    "short-tuple-with-slice": ((slice(1, 3),), lambda out: out[:, 1:3].sum((1, 2, 3))),
    "bare-slice": (slice(1, 3), lambda out: out[:, 1:3].sum((1, 2, 3))),
    "callable-for-each": (lambda out: out[:, 0, 1, 1] - 2 * out[:, 2].sum((1, 2)), None),
    "callable-for-all": (lambda out: out[:, 0].sum(), None),
    "callable-with-pieces": (lambda out: out.clamp(min=0).amax((1, 2, 3)), None),
}


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_choose_as_captums(maps, of_maps, selector):
    """Ints and slices index, a slice's units are summed, a callable gets the layer's output."""
    model, x = maps
    given, choose = SELECTORS[selector]
    assert_close(of_maps.attribute(x, given), gradient(model, x, choose or given, model[2]))


TARGETS = {
    "int": (2, [2, 2]),
    "tuple": ((1,), [1, 1]),
    "tensor": (torch.tensor([2, 0]), [2, 0]),
    "tensor-of-one": (torch.tensor(1), [1, 1]),
    "list": ([0, 1], [0, 1]),
    "list-of-tuples": ([(0,), (2,)], [0, 2]),
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets_choose_classes(flat, of_classes, target):
    """One class for all inputs, or one for each."""
    model, x = flat
    given, classes = TARGETS[target]
    assert_close(
        of_classes.attribute(x, target=given), gradient(model, x, lambda out: out[[0, 1], classes])
    )


def test_list_of_tuples_chooses_units_of_maps(maps):
    """A unit of the output for each input."""
    model, x = maps
    image = abm.captum.AdjointBackMap(model).attribute(x, target=[(0, 1, 1), (1, 0, 1)])
    assert_close(image, gradient(model, x, lambda out: out[[0, 1], [0, 1], [1, 0], [1, 1]]))


def test_no_target_where_there_is_one_unit():
    """The output of a network of one output."""
    model, x = make(
        lambda: (
            nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)),
            (1, 2, 2),
        )
    )
    assert_close(
        abm.captum.AdjointBackMap(model).attribute(x), gradient(model, x, lambda out: out[:, 0])
    )


def test_the_model_itself_as_layer(flat):
    """Is its output."""
    model, x = flat
    assert_close(
        abm.captum.AdjointBackMap(model, model).attribute(x, 1),
        gradient(model, x, lambda out: out[:, 1]),
    )


# what comes back


def test_tuple_of_inputs_gives_a_tuple(flat, of_classes):
    """As Captum's formats."""
    _, x = flat
    (image,) = of_classes.attribute((x,), target=1)
    assert_close(image, of_classes.attribute(x, target=1))


def test_absolute_value(flat, of_classes):
    """As Saliency's default."""
    _, x = flat
    assert_close(of_classes.attribute(x, 1, abs=True), of_classes.attribute(x, 1).abs())


@pytest.mark.parametrize(
    "case", ["saturated-on-both-sides", "scalars-before-padded-convs", "constants-and-buffers"]
)
def test_contributions_of_image_and_biases_sum_to_the_value(case):
    """With return_bias and multiply_by_inputs; without, the parts are the hyperplane's."""
    model, x = make(case)
    index = (0,) * (model(x).dim() - 1)
    image, bias = abm.captum.AdjointBackMap(model, multiply_by_inputs=True).attribute(
        x, index, return_bias=True
    )
    assert_close(image.flatten(1).sum(1) + bias.sum(1), model(x).detach()[(slice(None), *index)])
    method = abm.captum.AdjointBackMap(model)
    plane, plane_bias = method.attribute(x, index, return_bias=True)
    assert_close(image, x * plane)
    assert_close(bias, method.network(x).biases.vector * plane_bias)
    assert not bias.requires_grad


def test_float32_stays_float32():
    """The inputs' dtype is the attributions'."""
    model, x = make("plain-conv-chain")
    image = abm.captum.AdjointBackMap(model.float(), model[2]).attribute(x.float(), (0, 0, 0))
    assert image.dtype == torch.float32


def test_inputs_stay_as_they_were(flat, of_classes):
    """requires_grad, gradient and values of the images; Captum warns and sets it for the call."""
    _, x = flat
    leaf = x.clone().requires_grad_()
    image = of_classes.attribute(leaf, 0)
    assert leaf.requires_grad
    assert leaf.grad is None
    assert not image.requires_grad
    assert torch.equal(leaf, x)


# tracing


@pytest.fixture
def traces(monkeypatch):
    """The shapes that were traced."""
    seen = []
    trace = adjoint.trace
    monkeypatch.setattr(
        adjoint,
        "trace",
        lambda model, x, until: seen.append(tuple(x.shape)) or trace(model, x, until),
    )
    return seen


def test_traced_once_for_each_shape(traces):
    """Whatever the batch; the shapes used last are kept."""
    model, _ = make("plain-conv-chain")
    method = abm.captum.AdjointBackMap(model, "0")
    for batch, size in ((1, 6), (3, 6), (1, 7), (2, 6)):
        method.attribute(torch.rand(batch, 2, size, size).double(), (0, 0, 0))
    assert traces == [(1, 2, 6, 6), (1, 2, 7, 7)]
    for size in range(8, 8 + adjoint.SHAPES_KEPT):
        method.network(torch.rand(1, 2, size, size).double())
    assert len(traces) == 2 + adjoint.SHAPES_KEPT
    method.network(torch.rand(1, 2, 6, 6).double())
    assert len(traces) == 3 + adjoint.SHAPES_KEPT


def test_changed_weights_are_traced_again(traces):
    """A user of Captum expects the model as it is now."""
    model, x = make("plain-conv-chain")
    method = abm.captum.AdjointBackMap(model, model[2])
    before = method.attribute(x, (0, 0, 0))
    with torch.no_grad():
        model[2].weight.mul_(2)
    assert_close(method.attribute(x, (0, 0, 0)), 2 * before)
    assert len(traces) == 2


def test_what_comes_after_the_layer_does_not_count():
    """A layer before a GELU is exact, the output behind it is refused by name."""
    model, x = make(not_affine)
    image = abm.captum.AdjointBackMap(model, model.first).attribute(x, (1, 0, 0))
    assert_close(image, gradient(model, x, lambda out: out[:, 1, 0, 0], model.first))
    with pytest.raises(abm.UnsupportedOperation, match="gelu"):
        abm.captum.AdjointBackMap(model).attribute(x, 0)


# reused modules


def test_calls_of_a_reused_module_are_told_apart():
    """By name; Captum gives the last call without a word, here the module alone is refused."""
    model, x = make("reused-module")
    with pytest.raises(
        ValueError, match=r"called once. Got 3 calls: pass one of 'conv', 'conv:1', 'conv:2'"
    ):
        abm.captum.AdjointBackMap(model, model.conv).attribute(x, (0, 0, 0))
    images = [
        abm.captum.AdjointBackMap(model, name).attribute(x, (0, 2, 2))
        for name in ("conv", "conv:1", "conv:2")
    ]
    assert_close(images[0], gradient(model, x, lambda out: out[:, 0, 2, 2], model.conv))
    assert_close(images[2], gradient(model, x, lambda out: out[:, 0, 2, 2]))
    assert not torch.allclose(images[0], images[2])


# refusals


WRONG_TARGETS = {
    "too-few-dimensions": (
        3,
        r"int or a slice for each dimension of \(4, 4, 4\). Got \(3,\): it chooses 16 units",
    ),
    "none-on-a-map": (None, r"Got \(\): it chooses 64 units"),
    "out-of-range": ((4, 0, 0), r"Got \(4, 0, 0\): it chooses 0 units"),
    "too-many-dimensions": ((0, 0, 0, 0), r"it chooses 0 units"),
    "empty-slice": ((slice(4, 4), 0, 0), r"it chooses 0 units"),
    "not-an-index": ([1.5, 1.5], r"Got \(1.5,\): it chooses 0 units"),
    "too-few-targets": ([1], r"one for each of the 2 inputs. Got 1"),
    "callable-of-many": (
        lambda out: out[:, 0],
        r"must return \(2,\) numbers, or one. Got \(2, 4, 4\)",
    ),
    "callable-of-no-tensor": (lambda out: 1.0, r"or one. Got float"),
    "callable-that-is-curved": (lambda out: out.flatten(1).norm(dim=1), "must be linear"),
    "callable-with-a-constant": (lambda out: out.sum((1, 2, 3)) + 1, "must be linear"),
    "callable-of-steps": (lambda out: (out > 0).double().sum((1, 2, 3)), "must be linear"),
    "callable-across-the-batch": (lambda out: (out - out.flip(0)).sum((1, 2, 3)), "must be linear"),
}


@pytest.mark.parametrize("wrong", WRONG_TARGETS)
def test_wrong_targets_are_refused(maps, of_maps, wrong):
    """With what came."""
    target, message = WRONG_TARGETS[wrong]
    with pytest.raises(ValueError, match=message):
        of_maps.attribute(maps[1], target)


def test_train_mode_is_refused():
    """Captum runs such a model and moves its batch norm's statistics."""
    model, x = make("batch-norm-before-conv")
    method = abm.captum.AdjointBackMap(model, model[1])
    method.attribute(x, (0, 0, 0))
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        method.attribute(x, (0, 0, 0))
    assert model[0].num_batches_tracked == 0


def test_a_layer_of_another_model_is_refused(flat):
    """Before anything is traced."""
    with pytest.raises(
        ValueError, match=r"layer must be a module of the model, or a name. Got another ReLU"
    ):
        abm.captum.AdjointBackMap(flat[0], nn.ReLU())


def test_a_layer_that_is_not_called_is_refused():
    """With the names of those that are."""
    model, x = make(
        lambda: (
            Net(lambda net, x: net.used(x), used=nn.Conv2d(1, 1, 2), idle=nn.ReLU()),
            (1, 3, 3),
        )
    )
    with pytest.raises(ValueError, match="must be one of used"):
        abm.captum.AdjointBackMap(model, model.idle).attribute(x, (0, 0, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": (torch.rand(1, 1), torch.rand(1, 1))}, "one tensor, or a tuple of one. Got 2"),
        ({"additional_forward_args": 1}, "additional_forward_args must be None"),
        ({"attribute_to_neuron_input": True}, "attribute_to_neuron_input must be False"),
        ({"target": 0, "neuron_selector": 1}, "two names of one argument. Got both"),
    ],
    ids=["two-inputs", "forward-args", "neuron-input", "both-names"],
)
def test_what_a_network_of_one_image_has_not_is_refused(flat, of_classes, arguments, message):
    """By the argument's name."""
    with pytest.raises(ValueError, match=message):
        of_classes.attribute(**{"inputs": flat[1], **arguments})


# integrated gradients


@pytest.fixture(scope="module")
def classifier():
    """A small classifier in float64, and images."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)]
    return nn.Sequential(*layers).double().eval(), torch.rand(3, 1, 6, 6).double()


def test_exact_integrated_gradients_are_those_of_the_library(classifier):
    """Targets, baselines and outputs as Captum has them; the delta is zero to rounding."""
    model, x = classifier
    network = abm.trace(model, x)
    exact = abm.captum.ExactIntegratedGradients(model)
    image, delta = exact.attribute(x, 0.25, [1, 0, 3], return_convergence_delta=True)
    every = abm.integrated_gradients(network, x, 0.25).image
    close_to(image, every[[0, 1, 2], [1, 0, 3]], rtol=1e-12, atol=1e-14)
    assert delta.abs().max() < 1e-13
    (same,) = exact.attribute((x,), (torch.full_like(x, 0.25),), torch.tensor([1, 0, 3]), n_steps=7)
    close_to(same, image, rtol=0, atol=1e-14)
    slopes = abm.captum.ExactIntegratedGradients(model, False).attribute(x, 0.25, [1, 0, 3])
    close_to((x - 0.25) * slopes, image, rtol=0, atol=1e-14)
    module = abm.captum.ExactIntegratedGradients(model, layer=model[0])
    hidden = module.attribute(x, target=(2, 1, 0))
    ours = abm.integrated_gradients(network, x, layer="0", units=(1, 0, 2)).image
    assert hidden.any()
    close_to(hidden, ours, rtol=0, atol=1e-14)
    assert [line.complete for line in exact.lines(x)] == [True] * 3


def test_captums_integrated_gradients_come_near_with_more_steps(classifier):
    pytest.importorskip("captum", reason="the error of Captum's own needs Captum")
    model, x = classifier
    exact = abm.captum.ExactIntegratedGradients(model)
    errors = [
        exact.sampling_error(x, None, 1, steps, "riemann_middle").pixels for steps in (5, 50, 500)
    ]
    assert (errors[2] < errors[1]).all()
    assert (errors[1] < errors[0]).all()
    assert errors[2].max() < 0.01
    found = exact.sampling_error(x, None, 1, 5, "riemann_middle")
    change = (model(x) - model(0 * x))[:, 1].detach()
    close_to(found.exact.flatten(1).sum(1), change, rtol=1e-12, atol=1e-12)
    off = found.sampled.flatten(1).sum(1) - change
    close_to(found.total, (off / change).abs(), rtol=1e-9, atol=1e-12)


def test_exact_integrated_gradients_in_float32(classifier):
    model, x = classifier
    with_floats = copy.deepcopy(model).float()
    exact = abm.captum.ExactIntegratedGradients(with_floats).attribute(x.float(), target=0)
    assert exact.dtype == torch.float32
    close_to(
        exact.double(),
        abm.captum.ExactIntegratedGradients(model).attribute(x, target=0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_targets_that_exact_integrated_gradients_refuse(classifier):
    model, x = classifier
    exact = abm.captum.ExactIntegratedGradients(model)
    with pytest.raises(ValueError, match=r"target must choose units\. Got a callable"):
        exact.attribute(x, target=lambda out: out[:, 0])
    with pytest.raises(ValueError, match="it chooses 0 units"):
        exact.attribute(x, target=9)
    with pytest.raises(ValueError, match="sampling_error is for the model's output"):
        abm.captum.ExactIntegratedGradients(model, layer=model[0]).sampling_error(x)
