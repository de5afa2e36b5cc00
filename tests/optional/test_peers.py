"""Peers as oracles: Captum, FullGrad and auto_LiRPA on the catalogue.

FullGrad is written out below. Captum and auto_LiRPA live in an environment of their own
(docs/peers.md); without them their tests are skipped. A list of known differences names layers.
There torch.func.jacrev of the untouched module shows that ours is right, and the test also fails
when the peer is mended. Each difference is explained in docs/peers.md.
"""

import copy
import warnings
from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Net, make
from torch import nn

import adjointbackmap as abm

TOLERANCE = 1e-12  # relative to the largest entry
pytestmark = pytest.mark.filterwarnings(
    "ignore:Input Tensor 0 did not"
)  # Captum's, that it sets requires_grad

# networks beside the catalogue, for a peer's own mistakes


def max_pool_with_padding():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, 2, padding=1), nn.Conv2d(2, 2, 1)), (
        1,
        8,
        8,
    )


def registered_in_another_order():
    def forward(net, x):
        return net.last(F.relu(net.first(x)))

    return Net(forward, last=nn.Conv2d(2, 2, 1), first=nn.Conv2d(2, 2, 3)), (2, 5, 5)


OTHERS = {
    "max-pool-with-padding": max_pool_with_padding,
    "registered-in-another-order": registered_in_another_order,
}

# known differences: network -> layers

CAPTUM_DIFFERS = {  # a module's last call wins
    "reused-module": ["conv", "act", "conv:1"],
    "module-with-two-names": ["0.0", "0.1", "0"],
    "recurrent-over-rows": ["cell", "cell:1"],
}
FULLGRAD_DIFFERS = {
    "gradients-and-autocast-turned-on-and-off": "only modules have biases",
    "maps-of-six-dimensions": "only modules have biases",
    "factors-that-are-constant-on-pieces": "only modules have biases",
    "whole-numbers-and-masks-as-constants": "only modules have biases",
    "reused-module": "one gradient for each bias",
    "module-with-two-names": "one gradient for each bias",
    "functional-conv-on-raw-parameters": "only modules have biases",
    "conv-in-one-dimension": "only Conv2d, Linear and BatchNorm2d have biases",
    "mlp-on-flat-inputs": "only Conv2d, Linear and BatchNorm2d have biases",
    "scalars-before-padded-convs": "only modules have biases",
    "shared-scalar": "only modules have biases",
    "constants-and-buffers": "only modules have biases",
    "constant-for-every-position": "only modules have biases",
    "names-of-operations": "only modules have biases",
    "numbers-that-the-forward-reads": "only modules have biases",
    "functional-batch-norms": "only modules have biases",
    "saturated-on-both-sides": "a saturated piece has an intercept",
    "recurrent-over-rows": "only Conv2d, Linear and BatchNorm2d have biases",
    "registered-in-another-order": (
        "biases in the order of registration, gradients in that of execution"
    ),
}
FULLGRAD_CANNOT = {
    "conv-with-bias-before-batch-norm",
    "conv-batch-norm-multiplier",
    "linear-with-positions",
}
LIRPA_CANNOT = {  # how many layers
    "asymmetric-padding": 3,
    "residual-with-zero-padded-channels": 2,
    "saturated-on-both-sides": 4,
    "identities": 6,
    "max-pool-with-overlap-padding-and-ceil": 4,
    "max-pool-with-ties": 3,
}
LIRPA_DIFFERS = {
    "average-pool-with-ceil": [
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "output",
    ],  # ceil_mode and count_include_pad are ignored
    "max-pool-with-padding": [
        "1",
        "2",
        "output",
    ],  # winners of the map are taken for places of the padded map
}


class Reached(Exception):
    """Ends a forward pass with a layer's output."""


class Until(nn.Module):
    """A model cut after one call of one of its modules."""

    def __init__(self, model, layer):
        super().__init__()
        self.model = model
        self.path, _, call = layer.partition(":")
        self.call = int(call or 0)
        self.train(model.training)

    def forward(self, x):
        seen = []

        def stop(module, inputs, output):
            seen.append(output)
            if len(seen) > self.call:
                raise Reached

        handle = self.model.get_submodule(self.path).register_forward_hook(stop)
        try:
            self.model(x)
        except Reached:
            return seen[-1].clone()
        finally:
            handle.remove()


def until(model, layer):
    """The model up to a layer."""
    return model if layer == "output" else Until(model, layer)


def layers_of_modules(traced):
    """The layers that a peer can be asked for: calls of modules, and the output."""
    paths = dict(traced.model.named_modules())
    return [
        name
        for name in traced.network.layers
        if name == "output" or name.partition(":")[0] in paths
    ]


def same(ours, theirs):
    """Equal to float64's rounding, held against the largest entry."""
    scale = max(1.0, float(theirs.detach().abs().max()))
    return (
        ours.shape == theirs.shape
        and float((ours - theirs).detach().abs().max()) <= TOLERANCE * scale
    )


def affine(image, bias, x):
    """Image part and summed bias part of every unit, ``(N, units, pixels + 1)``."""
    n = len(x)
    pixels = x[0].numel()
    return torch.cat([image.reshape(n, -1, pixels), bias.reshape(n, -1, 1)], 2).detach()


def jacobian(model, x):
    """The truth: Jacobian ``(N, *units, *in_shape)`` of a module, by torch.func."""
    return torch.stack(
        [torch.func.jacrev(lambda image: model(image[None])[0])(image) for image in x]
    )


def true_affine(model, x):
    """The truth: Jacobian, and what the output has beside Jacobian times image."""
    values = model(x)
    slopes = jacobian(model, x)
    linear = slopes.reshape(len(x), -1, x[0].numel()) @ x.reshape(len(x), -1, 1)
    return affine(slopes, values.reshape(linear.shape) - linear, x)


@pytest.fixture(params=[*CASES, *OTHERS])
def traced_any(request, traced_case):
    """Every network of the catalogue and of the others in turn."""
    if request.param in CASES:
        return traced_case(request.param)
    model, x = make(OTHERS[request.param])
    return SimpleNamespace(name=request.param, model=model, x=x, network=abm.trace(model, x))


# Captum: image parts


@pytest.fixture(scope="session")
def captum():
    """The captum library."""
    return pytest.importorskip(
        "captum.attr", reason="Captum is not installed: pip install captum", exc_type=ImportError
    )


def neuron_gradients(captum, model, layer, x, shape):
    """NeuronGradient of every unit of a layer, ``(N, *shape, *in_shape)``."""
    method = captum.NeuronGradient(
        model, model if layer == "output" else model.get_submodule(layer.partition(":")[0])
    )
    units = [method.attribute(x.clone(), unit) for unit in product(*map(range, shape))]
    return torch.stack(units, 1).reshape(len(x), *shape, *x.shape[1:]).detach()


def test_image_parts_are_captums_neuron_gradients(captum, traced):
    """Of every unit of every layer that is a module's call."""
    different = []
    for layer in layers_of_modules(traced):
        linear = abm.operator(traced.network, traced.x, layer)
        ours = linear.dense()[0]
        if not same(
            ours, neuron_gradients(captum, traced.model, layer, traced.x, linear.out_shape)
        ):
            assert same(ours, jacobian(until(traced.model, layer), traced.x))
            different.append(layer)
    assert different == CAPTUM_DIFFERS.get(traced.name, [])


def test_captum_gives_a_reused_modules_last_call(captum, traced_case):
    """What it gives for the module is the third call's hyperplane; ours asks which is meant."""
    traced = traced_case("reused-module")
    linear = abm.operator(traced.network, traced.x, "conv:2")
    assert same(
        linear.dense()[0],
        neuron_gradients(captum, traced.model, "conv", traced.x, linear.out_shape),
    )
    with pytest.raises(ValueError, match="called once"):
        abm.captum.AdjointBackMap(traced.model, traced.model.conv).attribute(traced.x, (0, 0, 0))


SELECTORS = {
    "unit": (1, 2, 3),
    "slices": (slice(0, 2), 1, slice(1, 4)),
    "fewer": (slice(1, 3),),
    "callable": lambda out: out[:, 0].sum((1, 2)) - out[:, 1, 2, 2],
    "callable-for-all": lambda out: out[:, 0].clamp(min=0).sum(),
}


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_mean_what_captums_mean(captum, traced_case, selector):
    """The same call gives the same tensor."""
    model = traced_case("plain-conv-chain").model
    x = traced_case("plain-conv-chain").x
    theirs = captum.NeuronGradient(model, model[2]).attribute(x.clone(), SELECTORS[selector])
    assert same(
        abm.captum.AdjointBackMap(model, model[2]).attribute(x, SELECTORS[selector]), theirs
    )


TARGETS = {
    "int": 1,
    "tuple": (2,),
    "list": [2, 0],
    "tensor": torch.tensor([1, 2]),
    "list-of-tuples": [(0,), (1,)],
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets_mean_what_captums_mean(captum, traced_case, target):
    """Saliency and InputXGradient; without our biases the sum is not the class's score."""
    model = traced_case("average-pool-with-ceil").model
    x = traced_case("average-pool-with-ceil").x
    given = {"target": TARGETS[target]}
    ours = abm.captum.AdjointBackMap(model)
    assert same(
        ours.attribute(x, **given),
        captum.Saliency(model).attribute(x.clone(), abs=False, **given).detach(),
    )
    assert same(
        ours.attribute(x, abs=True, **given),
        captum.Saliency(model).attribute(x.clone(), **given).detach(),
    )
    theirs = captum.InputXGradient(model).attribute(x.clone(), **given).detach()
    image, bias = abm.captum.AdjointBackMap(model, multiply_by_inputs=True).attribute(
        x, return_bias=True, **given
    )
    assert same(image, theirs)
    scores = captum.LayerActivation(model, model).attribute(x).detach()
    classes = [t[0] if isinstance(t, tuple) else int(t) for t in _for_each(TARGETS[target])]
    chosen = scores[[0, 1], classes]
    assert same(image.flatten(1).sum(1) + bias.sum(1), chosen)
    assert not torch.allclose(theirs.flatten(1).sum(1), chosen, rtol=1e-3)


def _for_each(target):
    return target if isinstance(target, list | torch.Tensor) else [target, target]


def test_captum_runs_a_model_in_train_mode(captum):
    """And moves its statistics; ours refuses."""
    model, x = make("conv-output-used-elsewhere")
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        abm.captum.AdjointBackMap(model, model.conv).attribute(x, (0, 0, 0))
    before = model.bn.running_mean.clone()
    captum.NeuronGradient(model, model.conv).attribute(x.clone(), (0, 0, 0))
    assert not torch.equal(model.bn.running_mean, before)


# FullGrad: image parts, and bias parts by layer


def full_gradient(model, x, unit):
    """FullGrad of one output unit: input gradient, and bias x gradient ``(N, C)`` per module.

    After the reference implementation, github.com/idiap/fullgrad-saliency at 7c106b3,
    saliency/tensor_extractor.py and fullgrad.py. It lists the modules in the order of registration,
    with batch norm's implicit bias beta - mean gamma / sqrt(var + eps). It takes one gradient at
    the output of each module that has a bias, in the order of the backward pass, and pairs the i-th
    bias with the i-th gradient from the end. There the products stay maps, here they are summed
    over positions. It registers backward hooks on modules, which torch has since deprecated; hooks
    on their outputs see the same gradients.
    """
    modules = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    }
    biases = {n: b for n, m in modules.items() if (b := implicit_bias(m)) is not None}
    gradients = []

    def keep(module, inputs, output):
        if module.bias is not None:
            output.register_hook(gradients.append)

    handles = [module.register_forward_hook(keep) for module in modules.values()]
    image = x.clone().requires_grad_()
    chosen = model(image)[(slice(None), *unit)].sum()
    for handle in handles:
        handle.remove()
    (input_gradient,) = torch.autograd.grad(chosen, image)
    parts = {}
    for i, (name, bias) in enumerate(biases.items()):
        gradient = gradients[len(biases) - 1 - i]
        product = gradient * bias.view(1, -1, *(1,) * (gradient.dim() - 2)).expand_as(gradient)
        parts[name] = product.flatten(2).sum(2) if product.dim() > 2 else product
    return input_gradient, parts


def implicit_bias(module):
    """The constant that a module adds to each channel."""
    if isinstance(module, nn.BatchNorm2d):
        scale = module.weight / torch.sqrt(module.running_var + module.eps)
        return (module.bias - module.running_mean * scale).detach()
    return None if module.bias is None else module.bias.detach()


def entry_name(traced, path):
    """Name of a module's constant in b; a parameter of several modules is one entry."""
    module = traced.model.get_submodule(path)
    if isinstance(module, nn.BatchNorm2d):
        return path
    parameters = dict(traced.model.named_parameters(remove_duplicate=False))
    return next(
        b.name
        for b in traced.network.biases.values()
        if b.parameter and parameters[b.parameter] is module.bias
    )


def test_image_and_bias_parts_are_fullgrads(traced_any):
    """Of every unit of the output, where FullGrad is complete; where it is not, ours is."""
    traced = traced_any
    x = traced_any.x
    network = traced_any.network
    image, bias = abm.operator(network, x, "output").dense()
    values = traced.model(x).detach()
    shares = network.biases.vector * bias
    incomplete = 0
    for unit in product(*map(range, values.shape[1:])):
        at = (slice(None), *unit)
        try:
            slopes, parts = full_gradient(traced.model, x, unit)
        except (IndexError, RuntimeError, TypeError) as error:
            assert traced.name in FULLGRAD_CANNOT
            pytest.skip(
                f"FullGrad cannot do {traced.name}: {type(error).__name__}: "
                f"{str(error).splitlines()[0]}"
            )
        assert same(image[at], slopes)
        assert same((x * image[at]).flatten(1).sum(1) + shares[at].sum(1), values[at])
        theirs = (x * slopes).flatten(1).sum(1) + sum(part.sum(1) for part in parts.values())
        if not same(theirs, values[at]):
            incomplete += 1
        elif traced.name not in FULLGRAD_DIFFERS:
            assert_same_parts(traced, shares[at], parts)
    assert bool(incomplete) == (traced.name in FULLGRAD_DIFFERS)
    assert traced.name not in FULLGRAD_CANNOT


def assert_same_parts(traced, shares, parts):
    """Every part of b is the sum of the parts of its modules, and none is left over."""
    theirs = defaultdict(float)
    for path, part in parts.items():
        theirs[entry_name(traced, path)] = theirs[entry_name(traced, path)] + part
    assert theirs.keys() == set(traced.network.biases.names)
    for name, part in theirs.items():
        assert same(shares[:, traced.network.biases[name].slice], part), name


# auto_LiRPA: whole affine maps


@pytest.fixture(scope="session")
def lirpa():
    """auto_LiRPA; the release on PyPI does not run on a current NumPy and counts as missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "auto_LiRPA",
            reason="auto_LiRPA is not installed: see docs/peers.md",
            exc_type=ImportError,
        )


@pytest.fixture
def in_float64():
    """auto_LiRPA makes its matrices in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def crown(lirpa, model, x):
    """Lower and upper affine bounds at eps 0, ``(N, units, pixels + 1)``; errors as text."""
    ball = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=float("inf"), eps=0.0))
    try:
        bounded = lirpa.BoundedModule(copy.deepcopy(model), x, device="cpu", verbose=0)
        end = bounded.output_name[0]
        start = bounded.input_name[0]
        found = bounded.compute_bounds(
            (ball,), method="CROWN", return_A=True, needed_A_dict={end: {start}}
        )[2][end][start]
    except Exception as error:  # it has no type of its own for what it cannot do
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return [affine(found[f"{side}A"], found[f"{side}bias"], x) for side in ("l", "u")]


@pytest.mark.filterwarnings("ignore")
def test_affine_maps_are_autolirpas(lirpa, traced_any, in_float64):
    """Every unit of every layer that is a module's call; the skip names the layers it refuses."""
    traced = traced_any
    x = traced_any.x
    layers = layers_of_modules(traced)
    different = []
    refused = []
    for layer in layers:
        peer = until(traced.model, layer)
        bounds = crown(lirpa, peer, x)
        if isinstance(bounds, str):
            refused.append(bounds)
            continue
        image, bias = abm.operator(traced.network, x, layer).dense()
        ours = affine(image, bias @ traced.network.biases.vector, x)
        if not all(same(ours, bound) for bound in bounds):
            assert same(ours, true_affine(peer, x))
            different.append(layer)
    assert different == LIRPA_DIFFERS.get(traced.name, [])
    assert len(refused) == LIRPA_CANNOT.get(traced.name, 0)
    if refused:
        pytest.skip(
            f"auto_LiRPA cannot do {len(refused)} of {len(layers)} layers of {traced.name}: "
            f"{refused[0]}"
        )
