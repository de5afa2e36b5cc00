"""The fold merges what the captured graph shows to be a plain kernel and a plain batch norm."""

import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make, parameter
from checks import assert_untouched, snapshot
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import adjointbackmap as abm
from adjointbackmap.capture.parametrizations import plain_copy

# the old hooks are met on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Standardised(nn.Conv2d):
    """A convolution with standardised kernels."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias)


class WithoutItsBias(nn.Conv2d):
    """A convolution that does not read its bias."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


class PaddedAsTensorFlow(nn.Conv2d):
    """A convolution with a forward of its own that reads kernel and bias."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm with an activation inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class WithShiftedMean(nn.BatchNorm2d):
    """A batch norm that changes its mean in the forward."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean + 1, self.running_var, self.weight, self.bias)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def hooked(module, hook):
    """A module with a forward hook."""
    module.register_forward_hook(hook)
    return module


def parametrized(module, name, *, shared=None):
    """A module with one doubled tensor, which may be another module's too."""
    if shared is not None:
        setattr(module, name, shared)
    parametrize.register_parametrization(module, name, Doubled())
    return module


def without_bias(norm):
    """A batch norm with a scale and no offset."""
    norm.bias = None
    return norm


def pair(conv, norm=None):
    """A convolution and a batch norm."""
    return {"conv": conv, "bn": norm or nn.BatchNorm2d(3)}


def in_a_row(net, x):
    """Convolution, batch norm, ReLU."""
    return F.relu(net.bn(net.conv(x)))


def conv(**options):
    """A convolution of two channels to three."""
    return nn.Conv2d(2, 3, 3, **options)


def tied():
    """Two convolutions that compute their kernels from one parameter."""
    first = parametrized(conv(), "weight")
    second = parametrized(conv(), "weight", shared=first.parametrizations.weight.original)
    return {"conv": first, "second": second, "bn": nn.BatchNorm2d(3)}


def known_by_two_names():
    """A batch norm that is registered twice and called by its second name."""
    norm = nn.BatchNorm2d(3)
    return {"bn": norm, "body": nn.Sequential(conv(), norm)}


MERGED = {
    "weight-norm": (in_a_row, lambda: pair(parametrizations.weight_norm(conv()))),
    "weight-norm-by-a-hook": (in_a_row, lambda: pair(weight_norm(conv()))),
    "spectral-norm": (in_a_row, lambda: pair(parametrizations.spectral_norm(conv()))),
    "spectral-norm-by-a-hook": (in_a_row, lambda: pair(spectral_norm(conv(bias=False)))),
    "pruned": (in_a_row, lambda: pair(prune.l1_unstructured(conv(), "weight", 0.5))),
    "pruned-twice": (
        in_a_row,
        lambda: pair(prune.random_unstructured(prune.identity(conv(), "weight"), "weight", 3)),
    ),
    "pruned-kernel-and-bias": (
        in_a_row,
        lambda: pair(prune.l1_unstructured(prune.identity(conv(), "weight"), "bias", 1)),
    ),
    "pruned-and-weight-norm": (
        in_a_row,
        lambda: pair(prune.l1_unstructured(weight_norm(conv().double()), "weight_v", 0.5)),
    ),
    "pruned-batch-norm": (
        in_a_row,
        lambda: pair(conv(), prune.l1_unstructured(nn.BatchNorm2d(3), "weight", 1)),
    ),
    "parametrized-batch-norm": (
        in_a_row,
        lambda: pair(conv(), parametrized(nn.BatchNorm2d(3), "bias")),
    ),
    "one-parameter-under-two-parametrizations": (
        lambda net, x: net.bn(net.conv(x)) + net.second(x),
        tied,
    ),
    "eps-of-its-own": (in_a_row, lambda: pair(conv(), nn.BatchNorm2d(3, eps=0.3))),
    "batch-norm-without-offset": (in_a_row, lambda: pair(conv(), without_bias(nn.BatchNorm2d(3)))),
    "own-forward-that-reads-the-bias": (
        in_a_row,
        lambda: pair(PaddedAsTensorFlow(2, 3, 3, bias=False)),
    ),
    "dropout-between": (
        lambda net, x: net.bn(net.drop(net.conv(x))),
        lambda: pair(conv()) | {"drop": nn.Dropout()},
    ),
    "batch-norm-by-its-second-name": (lambda net, x: net.body(x), known_by_two_names),
    "negative-multiplier": (
        lambda net, x: F.relu(net.bn(net.conv(x) * net.m)),
        lambda: pair(conv()) | {"m": torch.tensor(-2.0)},
    ),
    "multiplier-of-zero": (
        lambda net, x: net.bn(net.conv(x) * net.m),
        lambda: pair(conv()) | {"m": torch.tensor(0.0)},
    ),
    "whole-multiplier": (
        lambda net, x: net.bn(net.conv(x)) * net.m,
        lambda: pair(conv()) | {"m": torch.tensor(3)},
    ),
}


def of_parts(function, parts):
    """A network, two images and its state before."""
    model, x = make(lambda: (Net(function, **parts()), (2, 5, 5)))
    return model, x, snapshot(model)


@pytest.mark.parametrize("name", MERGED)
def test_a_plain_kernel_and_a_plain_batch_norm_are_merged(name):
    """Also where PyTorch computes the kernel anew at every call; the model still does so after."""
    model, x, before = of_parts(*MERGED[name])
    folded = abm.fold(model, x)
    torch.testing.assert_close(folded.model(x), model(x), **CLOSE)
    assert "bn" in folded.merged
    assert not folded.left
    assert isinstance(folded.model.bn, nn.Identity)
    names = {n for n, _ in folded.model.named_parameters()}
    assert {"conv.weight", "conv.bias"} <= names or name.endswith("second-name")
    assert_untouched(model, before)


LEFT = {
    "standardised-kernel": (
        in_a_row,
        lambda: pair(Standardised(2, 3, 3)),
        "computed in its forward",
    ),
    "parametrized-and-standardised": (
        lambda net, x: net.bn(net.conv(x)),
        lambda: pair(parametrized(Standardised(2, 3, 3), "weight")),
        "computed in its forward",
    ),
    "bias-that-is-not-read": (
        in_a_row,
        lambda: pair(WithoutItsBias(2, 3, 3)),
        "does not read conv.bias",
    ),
    "no-bias-and-none-read": (
        in_a_row,
        lambda: pair(WithoutItsBias(2, 3, 3, bias=False)),
        "does not read conv.bias",
    ),
    "activation-inside": (
        in_a_row,
        lambda: pair(conv(), NormAndActivation(3)),
        "computes more than batch norm",
    ),
    "hook-on-batch-norm": (
        in_a_row,
        lambda: pair(conv(), hooked(nn.BatchNorm2d(3), lambda m, i, o: o.relu())),
        "a hook",
    ),
    "hook-that-only-looks": (
        in_a_row,
        lambda: pair(conv(), hooked(nn.BatchNorm2d(3), lambda m, i, o: None)),
        "a hook",
    ),
    "hook-on-conv": (in_a_row, lambda: pair(hooked(conv(), lambda m, i, o: 2 * o)), "follows mul"),
    "functional-batch-norm": (
        lambda net, x: F.batch_norm(net.conv(x), net.bn.running_mean, net.bn.running_var),
        lambda: pair(conv()),
        "a function call",
    ),
    "computed-statistics": (
        lambda net, x: net.bn(net.conv(x)),
        lambda: pair(conv(), WithShiftedMean(3)),
        "computes more than batch norm",
    ),
    "complex-multiplier": (
        lambda net, x: torch.view_as_real(net.conv(x) * net.m),
        lambda: {"conv": conv(), "m": torch.tensor(1 + 2j)},
        "complex",
    ),
    "output-that-is-a-copy-of-what-would-change": (
        lambda net, x: (net.bn(y := net.conv(x)), y.clone()),
        lambda: pair(conv()),
        "output of conv is used elsewhere",
    ),
    "kernel-times-a-multiplier": (
        lambda net, x: F.conv2d(x, net.conv.weight * net.m),
        lambda: {"conv": conv(), "m": parameter()},
        "follows conv.weight",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_the_rest_is_left_with_a_reason(name):
    """Nothing is merged, and the outputs are the model's bit by bit."""
    function, parts, reason = LEFT[name]
    model, x, before = of_parts(function, parts)
    folded = abm.fold(model, x)
    assert not folded.merged
    (found,) = folded.left.values()
    assert re.search(reason, found), found
    torch.testing.assert_close(folded.model(x), model(x), rtol=0, atol=0)
    assert_untouched(model, before)


def test_functional_batch_norms_have_names_of_their_own():
    """Two in one module: both are left, neither takes the module's place."""

    def forward(net, x):
        for _ in range(2):
            x = F.batch_norm(x, net.bn.running_mean, net.bn.running_var)
        return x

    model, x, _ = of_parts(
        lambda net, x: net.block(net.conv(x)),
        lambda: {"conv": conv(), "block": Net(forward, bn=nn.BatchNorm2d(3))},
    )
    folded = abm.fold(model, x)
    assert list(folded.left) == ["block.batch_norm", "block.batch_norm:1"]
    assert isinstance(folded.model.block, Net)


def test_a_multiplier_in_the_memory_of_another_tensor_becomes_one_alone():
    """Setting it in place would set the other too."""

    def build():
        numbers = torch.tensor([2.0, 3.0], dtype=torch.float64)
        return {"conv": conv(), "numbers": numbers, "m": numbers[0]}

    model, x, _ = of_parts(lambda net, x: F.relu(net.conv(x) * net.m) * net.numbers[0], build)
    folded = abm.fold(model, x)
    assert folded.merged == {"m": "conv"}
    torch.testing.assert_close(folded.model(x), model(x), **CLOSE)


def test_a_fold_that_differs_is_not_returned():
    """A list of modules keeps the batch norm: the figures come in one sentence."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.bn = nn.BatchNorm2d(3)
            self.stages = [self.conv, self.bn]

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return x

    model, x = make(lambda: (Listed(), (2, 5, 5)))
    with pytest.raises(
        RuntimeError,
        match=r"must repeat the model to 1e-10 .* difference of [\d.e+-]+ .* bn into conv merged",
    ):
        abm.fold(model, x)


def test_outputs_that_cancel_are_compared_at_the_scale_of_what_cancels():
    """x - mean over one position is rounding, and rounding differs."""

    def forward(net, x):
        y = net.bn(net.conv(x))
        return y * 3 - (y + y + y)

    model, x, _ = of_parts(forward, lambda: pair(conv()))
    assert abm.fold(model, x).merged == {"bn": "conv"}


def test_a_kernel_that_a_transform_has_left_is_computed_anew():
    """torch.func leaves its own tensor as the weight that a hook computed."""
    model, x, _ = of_parts(in_a_row, lambda: pair(prune.identity(conv(), "weight")))

    def output(constants):
        return torch.func.functional_call(model, constants, x)

    torch.func.jacrev(output)(dict(model.named_parameters()))
    with pytest.raises(NotImplementedError):
        model.conv.weight.untyped_storage()
    folded = abm.fold(model, x)
    assert folded.merged == {"bn": "conv"}
    torch.testing.assert_close(folded.model(x), model(x), **CLOSE)


def test_export_says_nothing_of_kernels_that_a_hook_computes():
    """The engine knows that the weight is assigned."""
    model, x, _ = of_parts(in_a_row, lambda: pair(prune.identity(conv(), "weight")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abm.trace(model, x)
        abm.fold(model, x)


def test_a_model_that_cannot_be_copied_is_refused():
    """A lock among its attributes: the sentence says what cannot be copied."""
    model, x, _ = of_parts(in_a_row, lambda: pair(conv()))
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"copy\.deepcopy can copy\. Got .*lock.*: remove"):
        abm.fold(model, x)


def test_a_parametrization_that_changes_from_call_to_call_stays():
    """It is no constant: nothing takes its place."""

    class Noise(nn.Module):
        def forward(self, weight):
            return weight + torch.rand_like(weight)

    model = nn.Sequential(conv()).eval()
    parametrize.register_parametrization(model[0], "weight", Noise())
    assert parametrize.is_parametrized(plain_copy(model)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_fold(dtype):
    """The comparison knows their rounding."""
    model, x = make("residual-with-zero-padded-channels")
    folded = abm.fold(model.to(dtype), x.to(dtype))
    assert folded.merged == {"bn1": "conv1", "bn2": "conv2"}
    assert folded.model.conv1.weight.dtype == dtype
