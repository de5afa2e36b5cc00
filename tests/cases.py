"""The catalogue of small networks that every part of the engine is tested on.

A case is a function that gives a module and the shape of one input. :func:`make` seeds it,
makes its batch-norm statistics non-trivial, and gives it in float64 and eval mode with two images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

Case = Callable[[], tuple[nn.Module, tuple[int, ...]]]
CASES: dict[str, Case] = {}
SEED = 20


def case(build: Case) -> Case:
    """Put a network into the catalogue under its function's name."""
    CASES[build.__name__.replace("_", "-")] = build
    return build


def make(build: str | Case, images: int = 2) -> tuple[nn.Module, Tensor]:
    """A network of the catalogue and some images, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model, shape = CASES[build]() if isinstance(build, str) else build()
        enliven(model)
        return model.double().eval(), torch.randn(images, *shape, dtype=torch.float64)


def enliven(model: nn.Module) -> None:
    """Random statistics and parameters for every batch norm: none hides at 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.eps = 0.03  # not PyTorch's default, so that a rule that forgets it is seen
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias)


class Net(nn.Module):
    """A module of named parts and a function ``forward(net, x)``."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module | Tensor
    ) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(torch.randn(shape))


# convolutions


@case
def plain_conv_chain():
    convs = [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, bias=False)]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.LeakyReLU(0.2), convs[2]), (2, 6, 6)


@case
def no_bias():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False)
    ), (1, 5, 5)


@case
def stride_dilation_groups():
    first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
    return nn.Sequential(
        first, nn.ReLU(), second, nn.LeakyReLU(0.1), nn.Conv2d(4, 6, (1, 3), groups=2)
    ), (2, 8, 8)


@case
def asymmetric_padding():
    def forward(net, x):
        x = F.relu(net.conv1(F.pad(x, (0, 1, 2, 0))))
        return net.conv2(x)

    return Net(
        forward, conv1=nn.Conv2d(2, 3, 3, stride=2), conv2=nn.Conv2d(3, 2, (3, 1), padding=(1, 0))
    ), (2, 6, 6)


@case
def reused_module():
    def forward(net, x):
        return net.conv(net.act(net.conv(net.act(net.conv(x)))))

    return Net(forward, conv=nn.Conv2d(2, 2, 3, padding=1), act=nn.ReLU()), (2, 5, 5)


@case
def module_with_two_names():
    shared = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
    return nn.Sequential(shared, nn.ReLU(), shared, nn.LeakyReLU(0.2), nn.Conv2d(2, 1, 2)), (
        2,
        4,
        4,
    )


@case
def functional_conv_on_raw_parameters():
    def forward(net, x):
        x = F.relu(F.conv2d(x, net.kernel, net.offset, padding=1))
        return F.linear(F.conv2d(x, net.kernel, stride=2).flatten(1), net.matrix)

    parts = {"kernel": parameter(2, 2, 3, 3), "offset": parameter(2), "matrix": parameter(3, 8)}
    return Net(forward, **parts), (2, 5, 5)


@case
def conv_in_one_dimension():
    layers = [
        nn.Conv1d(2, 3, 3, stride=2, padding=1),
        nn.BatchNorm1d(3),
        nn.ReLU(),
        nn.Conv1d(3, 4, 2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)), (2, 10)


# residual connections


@case
def residual_with_zero_padded_channels():
    def forward(net, x):
        branch = net.bn2(net.conv2(F.leaky_relu(net.bn1(net.conv1(x)), 0.2)))
        shortcut = F.pad(F.avg_pool2d(x, 1, stride=2), (0, 0, 0, 0, 0, 2))
        return net.fc(F.leaky_relu(branch + shortcut, 0.2).mean((2, 3)))

    conv1 = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
    conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return Net(
        forward,
        conv1=conv1,
        bn1=nn.BatchNorm2d(3),
        conv2=conv2,
        bn2=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 3),
    ), (2, 6, 6)


@case
def in_place_relu():
    def forward(net, x):
        y = net.conv1(x)
        z = net.act(y)  # y is z from here on
        return F.relu_(net.conv2(z) + y) - y

    return Net(
        forward,
        conv1=nn.Conv2d(1, 2, 3),
        act=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(2, 2, 3, padding=1),
    ), (1, 6, 6)


@case
def scalars_before_padded_convs():
    def forward(net, x):
        x = F.relu(net.conv0(x) + net.b0)
        branch = F.relu(net.conv1(x + net.b1) + net.b2)
        return F.relu(net.conv2(branch + net.b3) * net.m2 + net.b4 + x)

    convs = {f"conv{i}": nn.Conv2d(2, 2, 3, padding=1, bias=False) for i in range(3)}
    return Net(forward, **convs, **{f"b{i}": parameter() for i in range(5)}, m2=parameter()), (
        2,
        5,
        5,
    )


@case
def shared_scalar():
    def forward(net, x):
        x = F.relu(net.conv(x + net.b) - 2 * net.c)
        return torch.sub(x, net.b, alpha=3) + net.b

    return Net(forward, conv=nn.Conv2d(1, 2, 3, padding=1), b=parameter(), c=parameter()), (1, 5, 5)


@case
def shared_kernel():
    def forward(net, x):
        return net.conv2(F.relu(net.bn(net.conv1(x))))

    first = nn.Conv2d(2, 2, 3, padding=1)
    second = nn.Conv2d(2, 2, 3, padding=1)
    second.weight = first.weight
    second.bias = first.bias
    return Net(forward, conv1=first, bn=nn.BatchNorm2d(2), conv2=second), (2, 4, 4)


# pointwise


@case
def multipliers():
    def forward(net, x):
        x = F.relu(net.conv1(x) * net.per_channel / 3)
        return 0.5 * -(net.conv2(x) * net.one)

    convs = {"conv1": nn.Conv2d(1, 3, 3), "conv2": nn.Conv2d(3, 2, 2)}
    return Net(forward, **convs, per_channel=parameter(3, 1, 1), one=parameter(1)), (1, 5, 5)


@case
def saturated_on_both_sides():
    def forward(net, x):
        x = F.hardtanh(net.conv1(4 * x), -0.7, 0.9)
        x = F.relu6(20 * net.conv2(x))
        x = torch.clamp(net.conv3(x), -0.3, 1.2)
        return torch.clamp(net.fc(x.flatten(1)), min=0.1)

    convs = {"conv1": nn.Conv2d(1, 3, 3), "conv2": nn.Conv2d(3, 3, 2), "conv3": nn.Conv2d(3, 2, 2)}
    return Net(forward, **convs, fc=nn.Linear(8, 6)), (1, 6, 6)


@case
def dead_units():
    dead = nn.Conv2d(1, 3, 3)
    dead.bias.data = torch.tensor([-100.0, 0.1, -100.0])
    return nn.Sequential(dead, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2, bias=False)), (
        1,
        6,
        6,
    )


@case
def constants_and_buffers():
    def forward(net, x):
        x = (x - net.mean) / net.std
        x = F.relu(torch.sub(net.conv(1.5 - x), 0.25, alpha=3))
        return net.fc((2 * x - 0.5).flatten(1)) + net.prior

    buffers = {
        "mean": torch.rand(2, 1, 1),
        "std": torch.rand(2, 1, 1) + 0.5,
        "prior": torch.randn(3),
    }
    return Net(forward, conv=nn.Conv2d(2, 2, 3), fc=nn.Linear(18, 3, bias=False), **buffers), (
        2,
        5,
        5,
    )


@case
def constant_for_every_position():
    def forward(net, x):
        return net.conv(F.relu(x + net.place))

    return Net(forward, place=parameter(1, 2, 4, 4), conv=nn.Conv2d(2, 2, 3)), (2, 4, 4)


@case
def identities():
    class Same(nn.Module):
        def forward(self, x):
            return x

    layers = [
        nn.Identity(),
        nn.Conv2d(1, 2, 3),
        Same(),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Identity(),
        nn.Conv2d(2, 2, 2),
        Same(),
    ]
    return nn.Sequential(*layers), (1, 5, 5)


# pooling


@case
def factors_that_are_constant_on_pieces():
    """A Leaky ReLU by hand, and gates that are computed of signs."""

    def forward(net, x):
        x = net.conv1(x)
        x = x * (0.1 + 0.9 * (x > 0).to(x.dtype)) + net.offset
        x = F.relu(net.gate(torch.sign(x))) * x
        return net.conv2(x) * torch.where(x[:, :1] > 0, net.offset, 2 * net.offset)

    convs = {"conv1": nn.Conv2d(2, 3, 3), "gate": nn.Conv2d(3, 3, 3, padding=1)}
    parts = {"conv2": nn.Conv2d(3, 2, 1), "offset": parameter(1)}
    return Net(forward, **convs, **parts), (2, 6, 6)


@case
def infinite_constants():
    """What always loses a maximum has no entry: padding, a mask that is added, a bound."""

    def forward(net, x):
        x = F.max_pool2d(F.pad(net.conv1(x), (1, 1, 1, 1), value=-torch.inf), 3, 2)
        x = net.conv2((x + net.absent).amax(1, keepdim=True))
        return net.fc(x.clamp(0, torch.inf).flatten(1))

    absent = torch.zeros(3, 1, 1)
    absent[1] = -torch.inf
    parts = {"absent": absent, "fc": nn.Linear(9, 2)}
    return Net(forward, conv1=nn.Conv2d(1, 3, 3), conv2=nn.Conv2d(1, 1, 3, padding=1), **parts), (
        1,
        7,
        7,
    )


@case
def max_pool_with_overlap_padding_and_ceil():
    pools = [nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2)]
    return nn.Sequential(nn.Conv2d(1, 2, 3), pools[0], nn.Conv2d(2, 2, 1), pools[1]), (1, 9, 9)


@case
def max_pool_with_ties():
    first = nn.Conv2d(1, 2, 3)
    first.bias.data.fill_(-1)  # most windows hold zeros only
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(3, 1), nn.Conv2d(2, 2, 2)), (1, 7, 7)


@case
def average_pool_with_ceil():
    pools = [
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
    ]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)]
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), *pools, nn.Conv2d(2, 2, 2), *tail), (
        1,
        8,
        8,
    )


# order and recurrence


@case
def sorted_channels():
    def forward(net, x):
        x = net.conv1(x).unflatten(1, (3, 2)).sort(2)[0].flatten(1, 2)  # MaxMin
        x = net.conv2(x).sort(1)[0]  # GroupSort of all channels
        return net.fc(x.topk(2, 1)[0].flatten(1))

    convs = {"conv1": nn.Conv2d(2, 6, 3), "conv2": nn.Conv2d(6, 4, 2, stride=2)}
    return Net(forward, **convs, fc=nn.Linear(8, 3)), (2, 6, 6)


@case
def recurrent_over_rows():
    def forward(net, x):
        outputs, states = net.rnn(x)
        state = net.cell(outputs[:, 0])
        for moment in range(1, outputs.shape[1]):
            state = net.cell(outputs[:, moment], state)
        return net.fc(state + states[-1])

    rnn = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
    return Net(forward, rnn=rnn, cell=nn.RNNCell(4, 4, nonlinearity="relu"), fc=nn.Linear(4, 2)), (
        3,
        3,
    )


# batch norm


@case
def conv_with_bias_before_batch_norm():
    first = nn.Conv2d(2, 3, 3)
    second = nn.Conv2d(3, 2, 3, bias=False)
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(2, affine=False)]
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1]), (2, 6, 6)


@case
def batch_norm_before_conv():
    return nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3)
    ), (2, 5, 5)


@case
def batch_norm_after_add():
    def forward(net, x):
        return net.fc(F.relu(net.bn(net.conv1(x) + net.conv2(x))).flatten(1))

    convs = {"conv1": nn.Conv2d(1, 2, 3), "conv2": nn.Conv2d(1, 2, 3, bias=False)}
    return Net(forward, **convs, bn=nn.BatchNorm2d(2), fc=nn.Linear(18, 3)), (1, 5, 5)


@case
def conv_output_used_elsewhere():
    def forward(net, x):
        y = net.conv(x)
        return F.relu(net.bn(y)) + y

    return Net(forward, conv=nn.Conv2d(1, 2, 3), bn=nn.BatchNorm2d(2)), (1, 5, 5)


@case
def conv_batch_norm_multiplier():
    def forward(net, x):
        return net.conv2(F.relu(net.bn(net.conv1(x)) * net.m + net.b))

    convs = {"conv1": nn.Conv2d(1, 3, 3, bias=False), "conv2": nn.Conv2d(3, 2, 2)}
    return Net(forward, **convs, bn=nn.BatchNorm2d(3), m=parameter(), b=parameter()), (1, 5, 5)


# linear


@case
def mlp_on_flat_inputs():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.ReLU()
    ), (6,)


@case
def linear_with_positions():
    return nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Flatten(), nn.Linear(12, 2)
    ), (4, 5)


# names and constants


@case
def names_of_operations():
    """Constants, parameters and modules that share names with the graph, layers or parts of b."""

    def forward(net, x):
        x = F.relu(net.conv2d(x - (net.mean - 0.1)) - 0.5 + net.sub)
        x = torch.maximum(F.conv2d(x, net.kernel), torch.tensor(0.2)) + net.max - net.max * 0.5
        return net.image(F.relu(net.output(x) + 0.25) + net.add)

    modules = {
        "conv2d": nn.Conv2d(2, 3, 3, padding=1),
        "output": nn.Conv2d(2, 3, 3),
        "image": nn.Conv2d(3, 2, 2),
    }
    tensors = {
        "mean": torch.rand(2, 1, 1),
        "max": torch.rand(2, 1, 1),
        "kernel": parameter(2, 3, 2, 2),
    }
    return Net(forward, **modules, **tensors, add=parameter(3, 1, 1), sub=parameter(3, 1, 1)), (
        2,
        5,
        5,
    )


@case
def functional_batch_norms():
    def forward(net, x):
        x = F.relu(F.batch_norm(net.conv(x), net.means[0], net.variances[0], None, net.offsets[0]))
        x = F.relu(F.batch_norm(x, net.means[1], net.variances[1], net.scale, net.own))
        return F.batch_norm(x, net.means[1], net.variances[1], net.scale, net.own, eps=0.01)

    statistics = {
        "means": torch.randn(2, 3),
        "variances": torch.rand(2, 3) + 0.5,
        "offsets": torch.randn(2, 3),
    }
    return Net(
        forward, conv=nn.Conv2d(2, 3, 2), **statistics, scale=parameter(3), own=parameter(3)
    ), (2, 4, 4)


@case
def pruned_kernels():
    first = nn.Conv2d(2, 3, 3, padding=1)
    second = nn.Linear(12, 3)
    prune.random_unstructured(first, "weight", 0.4)
    prune.random_unstructured(second, "weight", 0.4)
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), second), (2, 4, 4)


@case
def numbers_that_the_forward_reads():
    def forward(net, x):
        if torch.any(net.shape == 0):
            x = net.conv(x) * float(net.scale) + net.offsets.tolist()[1]
        x = F.relu(x - torch.tensor([0.1, 0.2, 0.3]).to(x)[:, None, None])[:, net.kept]
        return (
            x.reshape(torch.Size([x.shape[0], *net.shape[1:]])) / (net.shape[1] + torch.tensor(4))
            + net.offsets[net.place]
        )

    constants = {
        "shape": torch.tensor([0, -1]),
        "kept": torch.tensor([True, False, True]),
        "place": torch.tensor(2),
    }
    parts = {"conv": nn.Conv2d(2, 3, 2), "scale": parameter(), "offsets": torch.randn(3)}
    return Net(forward, **parts, **constants), (2, 4, 4)


# how a forward is written


@case
def gradients_and_autocast_turned_on_and_off():
    """Modules in parts of the forward that torch.export keeps apart, one within another."""

    def forward(net, x):
        with torch.autocast("cpu", enabled=False):
            x = F.relu(net.conv1(x))
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                y = F.relu(net.conv2(x) - 0.25)
            x = net.conv3(y) + F.conv2d(x, net.kernel)
        return net.fc(x.flatten(1))

    convs = {
        "conv1": nn.Conv2d(2, 3, 3),
        "conv2": nn.Conv2d(3, 3, 3, padding=1),
        "conv3": nn.Conv2d(3, 3, 1),
    }
    return Net(forward, **convs, kernel=parameter(3, 3, 1, 1), fc=nn.Linear(27, 2)), (2, 5, 5)


@case
def a_batch_of_one_is_squeezed():
    def forward(net, x):
        return net.fc(F.relu(F.adaptive_avg_pool2d(net.conv(x), 1).squeeze()))

    return Net(forward, conv=nn.Conv2d(2, 3, 3), fc=nn.Linear(3, 2)), (2, 5, 5)


@case
def maps_of_six_dimensions():
    def forward(net, x):
        return F.relu(F.relu(net.conv(x)).reshape(x.shape[0], 2, 2, 3, 1, 3) + net.shift)

    return Net(forward, conv=nn.Conv2d(2, 4, 3), shift=parameter(2, 2, 1, 1, 3)), (2, 5, 5)


@case
def whole_numbers_and_masks_as_constants():
    """Buffers that have no derivative among the parts of b."""

    def forward(net, x):
        return F.relu(net.conv(x) + net.whole) * net.mask + net.mask

    tensors = {
        "whole": torch.arange(3).view(3, 1, 1),
        "mask": torch.tensor([True, False, True]).view(3, 1, 1),
    }
    return Net(forward, conv=nn.Conv2d(2, 3, 3), **tensors), (2, 5, 5)


# one operation each, after a layer with a bias


OPERATIONS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]] = {}
MAP = (4, 6, 6)
LINE = (4, 6)
VOLUME = (2, 4, 4, 4)
ROW = (6,)


def operations(shape: tuple[int, ...], **functions: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Put operations ``f(net, x)`` on inputs of one shape into the catalogue."""
    OPERATIONS.update(
        {name.replace("_", "-"): (function, shape) for name, function in functions.items()}
    )


def operation_case(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution or linear layer, and one operation on what it gives."""
    function, shape = OPERATIONS[name]
    kinds = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
    first = kinds[len(shape)](shape[0], shape[0], *((3, 1, 1) if len(shape) > 1 else ()))
    constants = {
        "matrix": torch.randn(6, 5),
        "channels": torch.randn(4, 3),
        "per_channel": torch.rand(4),
        "kernel2": torch.randn(4, 3, 3, 3),
        "places": torch.tensor([2, 0, 2]),
        "chosen": torch.rand(6, 6) > 0.5,
        "prior": torch.randn(5),
        "forms": torch.randn(2, 6, 5),
        "grid": 2.4 * torch.rand(1, 4, 5, 2) - 1.2,
        "rnn": nn.RNN(6, 3, 2, nonlinearity="relu", batch_first=True, bidirectional=True),
        "cell": nn.RNNCell(3, 4, nonlinearity="relu"),
    }
    return Net(lambda net, x: function(net, net.first(x)), first=first, **constants), shape


def assigned(x: Tensor) -> Tensor:
    """Parts of a tensor replaced in place."""
    x = x.clone()
    x[:, 0] = x[:, 1] * 2
    x[:, :, 1:3] = 0
    x[:, 2, ::2] += x[:, 3, 1::2]
    return x


operations(
    MAP,
    reflect_padding=lambda net, x: F.pad(x, (1, 2, 2, 0), mode="reflect"),
    replicate_padding=lambda net, x: F.pad(x, (1, 2, 2, 0), mode="replicate"),
    circular_padding=lambda net, x: F.pad(x, (1, 2, 2, 0), mode="circular"),
    padding_with_a_number=lambda net, x: F.pad(x, (1, 0, 2, 1), value=0.7),
    replicate_padding_that_cuts=lambda net, x: F.avg_pool2d(
        F.pad(x, (-1, 2, -2, 1), mode="replicate"), 2
    ),
    reflect_padding_that_cuts=lambda net, x: F.avg_pool2d(
        F.pad(x, (2, -1, 1, -2), mode="reflect"), 2
    ),
    padding_that_cuts=lambda net, x: F.pad(x, (-1, 0, 2, -1)),
    conv_same_even_kernel=lambda net, x: F.conv2d(
        x, net.kernel2[:, :1, :2, :2].transpose(0, 1), padding="same"
    ),
    conv_valid=lambda net, x: F.conv2d(x, net.kernel2[:, :1].transpose(0, 1), padding="valid"),
    transposed_conv=lambda net, x: F.conv_transpose2d(x, net.kernel2, net.per_channel[:3], 2, 1, 1),
    transposed_conv_dilated=lambda net, x: F.conv_transpose2d(
        x, net.kernel2, None, (3, 1), 1, 0, dilation=2
    ),
    transposed_conv_grouped=lambda net, x: F.conv_transpose2d(
        x, net.kernel2, net.per_channel.repeat(2)[:6], groups=2
    ),
    einsum=lambda net, x: torch.einsum("nchw,cd->ndhw", x, net.channels),
    einsum_with_dots=lambda net, x: torch.einsum("...w,wd->...d", x, net.matrix),
    matmul=lambda net, x: x @ net.matrix,
    matmul_from_the_left=lambda net, x: net.matrix.T @ x,
    absolute=lambda net, x: x.abs(),
    prelu=lambda net, x: F.prelu(x, net.per_channel),
    rrelu=lambda net, x: F.rrelu(x, training=net.training),
    relu6=lambda net, x: F.relu6(8 * x),
    hardtanh=lambda net, x: F.hardtanh(x, -0.3, 0.4),
    hard_sigmoid=lambda net, x: F.hardsigmoid(4 * x),
    hard_shrink=lambda net, x: F.hardshrink(x, 0.4),
    soft_shrink=lambda net, x: F.softshrink(x, 0.4),
    threshold=lambda net, x: F.threshold(x, 0.1, -0.8),
    threshold_at_zero=lambda net, x: F.threshold(x, -0.1, 0),
    clamp_max=lambda net, x: x.clamp_max(0.3) + x.clamp_min(-0.2) + torch.clip(x, 0.1, 0.9),
    clamp_between_tensors=lambda net, x: x.clamp(
        -net.per_channel[:, None, None], 0.5 * net.per_channel[:, None, None]
    ),
    maximum=lambda net, x: (
        torch.maximum(x, 0.5 - x) - torch.min(x[:, :2], x[:, 2:]).repeat(1, 2, 1, 1)
    ),
    maximum_with_constants=lambda net, x: (
        torch.maximum(x, net.per_channel[:, None, None]) + torch.maximum(torch.zeros(1), x)
    ),
    largest=lambda net, x: x.amax((2, 3)) - x.amin((2, 3)),
    largest_channel=lambda net, x: x.amax(1, keepdim=True) + x,
    maxout=lambda net, x: (
        x.unflatten(1, (2, 2)).max(1).values - x.unflatten(1, (2, 2)).min(dim=2)[0]
    ),
    maxout_kept=lambda net, x: x.max(1, keepdim=True)[0] - x,
    where=lambda net, x: torch.where(x > 0.1, x, 2 * x - 1),
    where_several=lambda net, x: torch.where((x > 0) & (x[:, :1] < 0.5) | ~(x >= -0.5), 0.3, x),
    where_constant=lambda net, x: torch.where(net.chosen, x, -x) + torch.where(net.chosen, 0.0, x),
    where_equal=lambda net, x: (
        torch.where(F.relu(x) == 0, 0.7, x) + x.masked_fill(x != F.relu(x), -1.5)
    ),
    mask_as_factor=lambda net, x: (
        x * (x > 0) + (x < 0).float().to(x.dtype) * 0.3 - (x > 1).to(x.dtype)
    ),
    masks_multiplied=lambda net, x: (x > 0) * (x[:, :1] <= 0.5) * x,
    masks_compared=lambda net, x: (
        torch.where(torch.sign(x) == 1, x, 0.3)
        + x * ((x > 0).to(x.dtype) == 1)
        + torch.where((x > 0).to(x.dtype) < x + 0.4, x, 0.2)
        + torch.where((x > 0) == net.chosen, 0.1, x)
    ),
    masks_moved=lambda net, x: (
        torch.where((x > 0)[:, 1:2].flip(2), x, -x)
        + x * (x > 0.1).to(x.dtype).permute(0, 1, 3, 2).roll(1, 3)
        + torch.where(torch.cat([x[:, :2] > 0, x[:, :2] < 0], 1), x, 0.4)
    ),
    masks_over_channels=lambda net, x: (
        torch.where((x > 0.5).any(1, keepdim=True), x, 0.2) * (x > -2).all(1, True)
    ),
    where_of_masks=lambda net, x: (
        x
        + torch.where(x > 0.2, torch.sign(x), 0.5)
        + torch.where(torch.where(x > 0, x < 1, x > -1), x, 0.3)
        + torch.sign(x).masked_fill(x > 1, 0.4)
    ),
    truth_of_data=lambda net, x: (
        torch.where(F.relu(x).bool(), x, 0.3) + x * (x > 0).to(torch.int64)
    ),
    signs_alone=lambda net, x: F.relu(
        F.conv2d(torch.sign(x), net.kernel2.transpose(0, 1), net.per_channel[:3])
    ).sign(),
    padding_with_minus_infinity=lambda net, x: F.max_pool2d(
        F.pad(x, (1, 0, 2, 1), value=-torch.inf), 3, 2
    ),
    filled_with_minus_infinity=lambda net, x: x.masked_fill(net.chosen, -torch.inf).amax((2, 3)),
    filled_with_infinity=lambda net, x: torch.where(net.chosen, x, torch.inf).min(3)[0],
    infinite_where_data_says=lambda net, x: (
        -torch.cat([-x[:, :1], (-x[:, 1:]).masked_fill(x[:, 1:] < 0, -torch.inf)], 1).amax(1, True)
    ),
    infinite_bounds=lambda net, x: (
        x.clamp(0, torch.inf) + x.clamp(-torch.inf, 0.3) + F.hardtanh(x, -0.2, torch.inf)
    ),
    infinite_bounds_in_a_tensor=lambda net, x: x.clamp(
        net.per_channel[:, None, None].log() * torch.inf, None
    ),
    added_mask_of_infinities=lambda net, x: (
        x + torch.zeros(6, 6, dtype=x.dtype).masked_fill(net.chosen, -torch.inf)
    ).amax(2),
    running_maximum_from_minus_infinity=lambda net, x: torch.maximum(
        torch.maximum(torch.full_like(x, -torch.inf), x), x.flip(1)
    ),
    joined_with_minus_infinity=lambda net, x: torch.cat(
        [x, torch.full_like(x[:, :1], -torch.inf)], 1
    ).amax(1, True),
    rectified_minus_infinity=lambda net, x: F.relu(
        x + torch.where(net.chosen, torch.tensor(-torch.inf, dtype=x.dtype), 0.1)
    ),
    sign=lambda net, x: x - 0.2 * torch.sign(x),
    average_pool_options=lambda net, x: F.avg_pool2d(x, 3, 2, 1, True, False, 2),
    adaptive_average=lambda net, x: F.adaptive_avg_pool2d(x, (3, 4)),
    adaptive_average_divides=lambda net, x: F.adaptive_avg_pool2d(x, (3, 2)),
    adaptive_max=lambda net, x: F.adaptive_max_pool2d(x, (3, 4)),
    max_pool_with_indices=lambda net, x: F.max_pool2d(x, 3, 1, 1, return_indices=True)[0],
    mean_and_sum=lambda net, x: (
        x.mean(1, keepdim=True) + x.sum((1, 2), keepdim=True) - x.mean((1, 2, 3), keepdim=True)
    ),
    cat=lambda net, x: torch.cat(
        [x, 2 * x, net.per_channel[:, None, None].expand(1, 4, 6, 6) + 0 * x[:, :1]], 1
    ),
    cat_with_constants=lambda net, x: torch.cat(
        [x, torch.ones_like(x), torch.zeros_like(x), x.new_full((x.shape[0], 1, 6, 6), 2.0)], 1
    ),
    cat_of_positions=lambda net, x: torch.cat([x, x[:, :, 1:3]], 2),
    stack=lambda net, x: torch.stack([x, 2 * x, torch.ones_like(x)], 2),
    split=lambda net, x: (
        x.split([1, 3], 1)[1]
        - x.chunk(2, 1)[0].repeat(1, 2, 1, 1)[:, 1:]
        + x.unbind(1)[2].unsqueeze(1)
    ),
    slices=lambda net, x: x[:, 1:, ::2, 2:5] + x[:, :3, 1::2, -4:-1].narrow(2, 0, 3),
    select=lambda net, x: x[:, 1] - x.select(3, 2).mean(1, keepdim=True),
    index=lambda net, x: x[:, [3, 0]] + x.index_select(1, net.places[:2]),
    index_of_positions=lambda net, x: (
        x[:, :, net.places][:, :, :, net.places] + x[:, :, [0, 1, 2], [3, 4, 5]].unsqueeze(2)
    ),
    assignment=lambda net, x: assigned(x),
    flip=lambda net, x: x.flip(1, 3),
    roll=lambda net, x: x.roll((1, -2), (2, 1)),
    permute=lambda net, x: x.permute(0, 2, 3, 1).contiguous() * net.per_channel,
    transpose=lambda net, x: x.transpose(1, -1).movedim(1, 2).swapaxes(2, 3),
    reshape=lambda net, x: x.view(x.shape[0], 2, -1).unsqueeze(1).squeeze(1).flatten(2),
    expand_and_repeat=lambda net, x: (
        x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 3).repeat(1, 2, 1, 1).repeat_interleave(2, 3)
    ),
    scaled_and_shifted=lambda net, x: (
        x * net.per_channel[:, None, None] + net.per_channel[:, None, None]
    ),
    tile=lambda net, x: x.tile(1, 1, 2, 1),
    constants_like=lambda net, x: (
        x
        + torch.ones_like(x)
        - torch.full_like(x, 1.5)
        + torch.zeros_like(x)
        + torch.full((1, 6), 0.1)
    ),
    nearest=lambda net, x: F.interpolate(x, scale_factor=2),
    nearest_to_a_size=lambda net, x: F.interpolate(x, size=(9, 4)),
    nearest_by_a_factor_that_is_no_ratio=lambda net, x: F.avg_pool2d(
        F.interpolate(x, scale_factor=3.1), 3
    ),
    bilinear_by_a_factor_that_is_no_ratio=lambda net, x: F.avg_pool2d(
        F.interpolate(x, scale_factor=2.1, mode="bilinear"), 2
    ),
    nearest_exact=lambda net, x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
    bilinear=lambda net, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    bilinear_aligned=lambda net, x: F.interpolate(
        x, size=(9, 11), mode="bilinear", align_corners=True
    ),
    bicubic=lambda net, x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    pixel_shuffle=lambda net, x: F.pixel_shuffle(x, 2),
    pixel_unshuffle=lambda net, x: F.pixel_unshuffle(x, 2),
    channel_shuffle=lambda net, x: F.channel_shuffle(x, 2),
    unfold_and_fold=lambda net, x: F.fold(F.unfold(x, 3, padding=1) * 2, (6, 6), 3, padding=1),
    sliding_windows=lambda net, x: x.unfold(2, 3, 2),
    casts=lambda net, x: x.to(x.dtype).type_as(x) * 2,
)
operations(
    LINE,
    conv1d_padded_by_name=lambda net, x: F.conv1d(
        x, net.kernel2[0][:, :, :2].repeat(1, 2, 1)[:, :4], padding="same"
    ),
    transposed_conv1d=lambda net, x: F.conv_transpose1d(x, net.kernel2[:, :, 0], None, 2),
    max_pool1d=lambda net, x: F.max_pool1d(x, 3, 2, 1),
    one_number=lambda net, x: x.flatten(1).select(1, -1).unsqueeze(1),
    adaptive_max1d=lambda net, x: F.adaptive_max_pool1d(x, 4),
    average_pool1d=lambda net, x: F.avg_pool1d(x, 2, 2) + F.adaptive_avg_pool1d(x, 3),
    linear_interpolation=lambda net, x: (
        F.interpolate(x, scale_factor=2, mode="linear") + F.interpolate(x, scale_factor=2)
    ),
    pads_on_a_line=lambda net, x: (
        F.pad(x, (2, 1), mode="reflect") + F.pad(x, (2, 1), mode="replicate")
    ),
)
operations(
    VOLUME,
    conv3d=lambda net, x: F.conv3d(
        x, net.kernel2[:2, :2, :, :, None].repeat(1, 1, 1, 1, 2), stride=(1, 2, 1), padding=1
    ),
    transposed_conv3d=lambda net, x: F.conv_transpose3d(
        x, net.kernel2[:2, :, :2, :2, None], None, 2
    ),
    max_pool3d=lambda net, x: F.max_pool3d(x, 2, 1) + F.adaptive_max_pool3d(x, 3),
    average_pool3d=lambda net, x: F.avg_pool3d(x, 2) + F.adaptive_avg_pool3d(x, 2),
    volume_interpolation=lambda net, x: (
        F.interpolate(x, scale_factor=2, mode="trilinear") + F.interpolate(x, scale_factor=2)
    ),
)
operations(
    ROW,
    product=lambda net, x: torch.mm(x, net.matrix) + x.matmul(net.matrix),
    largest_of_all=lambda net, x: x - x.amax(-1, keepdim=True) + x.max(dim=1, keepdim=True)[0],
    products_of_a_batch=lambda net, x: torch.bmm(
        x[:, None].expand(-1, 2, -1), x.new_zeros(x.shape[0], 6, 2) + net.matrix[:, :2]
    ),
)


# operations that choose by order, write at places, or are linear in other ways


def written_at_places(net: nn.Module, x: Tensor) -> Tensor:
    """Assignments to constant places, to a constant mask, and to a mask of the data."""
    x = x.clone()
    x[:, [0, 2]] = 2 * x[:, [1, 3]]
    x[:, :, net.chosen] = 0.5
    x[:, 1, [0, 2], [1, 1]] += x[:, 3, 0, :2]
    x[:, [3], 4:] = net.per_channel[:, None].expand(4, 6)[None, :1]
    x[x < -0.8] = 0
    x[x > 0.9] = -0.3
    return x


def written_into(empty: Tensor, x: Tensor) -> Tensor:
    """A tensor that holds nothing until every part is written."""
    empty[:, :1] = x[:, 3:]
    empty[:, 1:] = 2 * x[:, :3]
    return empty


def repeated(places: Tensor, x: Tensor) -> Tensor:
    """Places along channels, the same at every position of every image."""
    return places[None, :, None, None].expand(x.shape[0], -1, *x.shape[2:])


operations(
    MAP,
    sort=lambda net, x: (
        x.sort(1)[0]
        - 0.5 * x.sort(3, descending=True).values
        + torch.sort(x, dim=2, stable=True)[0]
    ),
    group_sort=lambda net, x: x.unflatten(1, (2, 2)).sort(2)[0].flatten(1, 2),
    sort_of_channels=lambda net, x: x.sort(1)[0] + x.cummax(1)[0] - x.cummin(dim=1)[0],
    top_k=lambda net, x: x.topk(2, 1)[0] - x.topk(2, 1, largest=False)[0],
    order_statistics=lambda net, x: x.kthvalue(3, 1)[0] - x.median(1)[0] + x.nanmedian(1).values,
    order_statistics_kept=lambda net, x: (
        x.kthvalue(2, 1, keepdim=True)[0] + x.median(1, keepdim=True)[0] - x
    ),
    quantile=lambda net, x: (
        x.quantile(0.3, 1) - x.quantile(0.5, 1) + x.quantile(0.7, 1, interpolation="nearest")
    ),
    smallest_and_largest=lambda net, x: (
        x.aminmax(dim=1, keepdim=True)[1] - x.aminmax(dim=1, keepdim=True).min + x
    ),
    sorted_by_another=lambda net, x: (
        x.gather(1, (2 * x[:, :1] - x).argsort(1)) + x.gather(1, x.topk(4, 1)[1])
    ),
    place_of_the_largest=lambda net, x: (
        x * x.argmax(1, keepdim=True) - x.argmin(2, keepdim=True).to(x.dtype) + x.max(1, True)[1]
    ),
    repeated_channels=lambda net, x: x - 2 * F.relu(x).mean(1, keepdim=True).expand(-1, 4, -1, -1),
    written_into_nothing=lambda net, x: (
        written_into(torch.empty_like(x), x) - written_into(x.new_empty(x.shape), x)
    ),
    rrelu_in_place=lambda net, x: F.rrelu_(1 * x),
    gather=lambda net, x: x.gather(1, repeated(net.places, x)) - x[:, :3],
    scatter=lambda net, x: (
        x.scatter(1, repeated(net.places[:2], x), 2 * x[:, :2])
        + x.scatter(1, repeated(net.places[:1], x), 0.4)
        + torch.zeros_like(x).scatter_add(1, repeated(net.places, x), x[:, 1:])
        - x.scatter_reduce(1, repeated(net.places, x), x[:, :3], "mean")
    ),
    index_add=lambda net, x: (
        x.index_add(1, net.places, x[:, :3], alpha=0.5)
        - x.index_copy(1, net.places[:2], x[:, 2:])
        + x.index_fill(1, net.places, 0.7)
    ),
    assignment_at_places=written_at_places,
    unpooling=lambda net, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2) + x,
    lerp=lambda net, x: (
        torch.lerp(x, F.relu(x), 0.3)
        + x.lerp(net.per_channel[:, None, None], net.per_channel[:, None, None])
    ),
    tensordot=lambda net, x: torch.tensordot(x, net.matrix, 1) - torch.inner(x, net.matrix.T),
    tensordot_of_two=lambda net, x: torch.tensordot(x, net.kernel2[:, :, 0], ([1], [0])),
    sums_of_products=lambda net, x: (
        torch.addcmul(x, x.abs(), net.per_channel[:, None, None], value=0.5)
        - torch.addcdiv(x, x, net.per_channel[:, None, None])
    ),
    cross_product=lambda net, x: torch.cross(
        x[:, :3], net.per_channel[None, :3, None, None].expand_as(x[:, :3]), dim=1
    ),
    differences=lambda net, x: torch.diff(x, dim=2) + torch.diff(x, 2, 2, prepend=x[:, :, :1]),
    differences_of_channels=lambda net, x: torch.diff(x, dim=1),
    stacks=lambda net, x: torch.hstack([x, -x]) + torch.column_stack([2 * x, x]),
    stacks_of_positions=lambda net, x: torch.dstack([x, -x]) + torch.fliplr(x).repeat(1, 1, 2, 1),
    rotation=lambda net, x: torch.rot90(x, 1, (2, 3)) - x.rot90(2, (1, 2)),
    triangles=lambda net, x: torch.triu(x, 1) - 0.5 * x.tril(),
    diagonals=lambda net, x: (
        x.diagonal(1, 2, 3) - torch.diag_embed(x).diagonal(0, 2, 4)[..., 1:].mean(2)
    ),
    diagonal_scatter=lambda net, x: x.diagonal_scatter(x[:, :, 0], 0, 2, 3),
    cumulative_sum=lambda net, x: x.cumsum(1),
    cumulative_sum_of_positions=lambda net, x: x.cumsum(2) + torch.trapezoid(x, dim=2)[:, :, None],
    norms=lambda net, x: (
        torch.linalg.vector_norm(x, 1, 1)
        - x.norm(float("inf"), 1)
        + x.norm(-float("inf"), dim=(1, 2))[:, None]
    ),
    pairwise_distance=lambda net, x: (
        F.pairwise_distance(x, F.relu(x), 1) + F.l1_loss(x, 2 * x, reduction="none")[..., 0]
    ),
    grid_sample=lambda net, x: F.grid_sample(
        x, net.grid.expand(x.shape[0], -1, -1, -1), align_corners=False
    ),
    grid_sample_nearest=lambda net, x: (
        F.grid_sample(x, net.grid.expand(x.shape[0], -1, -1, -1), "nearest", "border", True)
        + F.grid_sample(x, net.grid.expand(x.shape[0], -1, -1, -1), "bicubic", "reflection", False)
    ),
    affine_grid=lambda net, x: F.affine_grid(
        x.mean((2, 3)).repeat(1, 2)[:, :6].unflatten(1, (2, 3)), (x.shape[0], 4, 3, 3), False
    ),
    antialiased=lambda net, x: (
        F.interpolate(x, (4, 3), mode="bilinear", antialias=True)
        + F.interpolate(x, (4, 3), mode="bicubic", antialias=True)
    ),
    pooling_of_order_one=lambda net, x: (
        F.lp_pool2d(x, 1, 3, 2) + F.lp_pool2d(x, float("inf"), 3, 2)
    ),
)
operations(
    LINE,
    running_instance_norm=lambda net, x: F.instance_norm(
        x,
        net.per_channel,
        net.per_channel + 0.3,
        net.per_channel,
        -net.per_channel,
        use_input_stats=False,
    ),
    products_and_sums=lambda net, x: torch.baddbmm(
        net.per_channel[:, None], x, net.matrix.expand(x.shape[0], -1, -1), beta=0.5, alpha=2
    ),
    unpooling_on_a_line=lambda net, x: F.max_unpool1d(*F.max_pool1d(x, 3, return_indices=True), 3),
    relu_rnn=lambda net, x: net.rnn(x)[0],
    relu_rnn_states=lambda net, x: net.rnn(x)[1][-1] - net.rnn(x)[1][0],
)
operations(
    VOLUME,
    unpooling_of_a_volume=lambda net, x: F.max_unpool3d(
        *F.max_pool3d(x, 2, return_indices=True), 2
    ),
    grid_sample_of_a_volume=lambda net, x: F.grid_sample(
        x,
        net.grid.repeat(1, 1, 1, 2)[:, None, ..., :3].expand(x.shape[0], -1, -1, -1, -1),
        align_corners=True,
    ),
)
operations(
    ROW,
    product_and_sum=lambda net, x: (
        torch.addmm(net.prior, x, net.matrix)
        - torch.addmm(x[:, :5], x, net.matrix, beta=2, alpha=0.5)
    ),
    bilinear_with_a_constant=lambda net, x: F.bilinear(
        x, net.prior.expand(x.shape[0], 5), net.forms, net.prior[:2]
    ),
    relu_rnn_cell=lambda net, x: (
        net.cell(x[:, 3:], net.cell(x[:, :3]))
        + net.cell(x[:, :3], x[:, :4])
        + net.cell(net.prior[:3].expand(x.shape[0], 3), x[:, :4])
    ),
)


# a whole network in torchvision's layout


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, with torchvision's names."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class SmallResNet(nn.Module):
    """ResNet-18 in torchvision's layout, with four channels where it has 64."""

    def __init__(self, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, (inputs, outputs) in enumerate(((1, 1), (1, 2), (2, 4), (4, 8)), start=1):
            first = BasicBlock(width * inputs, width * outputs, 1 if i == 1 else 2)
            self.add_module(
                f"layer{i}", nn.Sequential(first, BasicBlock(width * outputs, width * outputs))
            )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def small_resnet():
    """A ResNet-18 on small images."""
    return SmallResNet(), (3, 32, 32)


# not in the catalogue, whose networks every test meets
LARGER = {"small-resnet": small_resnet}


# networks that are not piecewise affine


def not_affine():
    """GELU in a block, a product of data, and a softmax at the end."""

    def block(net, x):
        return F.gelu(net.conv(x))

    def forward(net, x):
        x = net.block(F.relu(net.first(x)))
        x = net.gate(x)
        return net.last(net.fc(x.flatten(1)))

    gate = Net(lambda net, x: x * x)
    parts = {
        "first": nn.Conv2d(1, 2, 3),
        "block": Net(block, conv=nn.Conv2d(2, 2, 1)),
        "gate": gate,
    }
    return Net(forward, **parts, fc=nn.Linear(18, 3), last=nn.Softmax(1)), (1, 5, 5)
