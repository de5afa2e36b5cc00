"""The tables of ``torch.nn`` and its ``functional`` in docs/operations.md: complete, right."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LINE, MAP, ROW, VOLUME, Net, make
from torch import Tensor, nn

import adjointbackmap as abm

PAGE = Path(__file__).parent.parent / "docs/operations.md"
ACCEPTED = "exact"
REASONS = {ACCEPTED, "curved", "statistics", "random", "loss", "integers", "batch", "no layer"}


def table(heading: str) -> dict[str, str]:
    """Name -> what the second column of a table says about it."""
    text = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    pairs = [(name, said.strip()) for names, said in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(pairs) == len(dict(pairs)), "a name is listed twice"
    return dict(pairs)


IN_MODULES = table("Every module of torch.nn")
IN_FUNCTIONS = table("Every function of torch.nn.functional")

Part = Callable[[Tensor], Tensor]
constant = torch.Generator().manual_seed(3)


def drawn(*shape: int) -> Tensor:
    """A constant of the functions below."""
    return torch.rand(shape, dtype=torch.float64, generator=constant) - 0.3


PER_CHANNEL = drawn(4)
KERNEL = drawn(4, 2, 2, 2)
VARIANCE = drawn(4).abs() + 0.3
GRID = drawn(1, 3, 5, 2)
FORMS = drawn(2, 6, 5)
LARGE_GRID = drawn(1, 2, 3, 4, 3)


def once(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A lazy layer after its first call."""
    layer(torch.zeros(2, *shape))
    return layer


def on(part: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A module that is called in another way than on one tensor."""
    return Net(lambda net, x: function(net.part, x), part=part)


def relu(x: Tensor) -> Tensor:
    """Another value of the same shape."""
    return F.relu(x)


MODULES: dict[tuple[int, ...], dict[str, Callable[[], nn.Module]]] = {
    MAP: {
        "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((2, 4)),
        "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d((2, 4)),
        "AlphaDropout": nn.AlphaDropout,
        "AvgPool2d": lambda: nn.AvgPool2d(2),
        "BatchNorm2d": lambda: nn.BatchNorm2d(4),
        "ChannelShuffle": lambda: nn.ChannelShuffle(2),
        "CircularPad2d": lambda: nn.CircularPad2d(1),
        "ConstantPad2d": lambda: nn.ConstantPad2d(1, 0.3),
        "Conv2d": lambda: nn.Conv2d(4, 2, 2),
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 2, 2, 2),
        "Dropout": nn.Dropout,
        "Dropout2d": nn.Dropout2d,
        "FeatureAlphaDropout": nn.FeatureAlphaDropout,
        "Flatten": nn.Flatten,
        "Fold": lambda: Net(lambda net, x: net.fold(F.unfold(x, 2)), fold=nn.Fold((6, 6), 2)),
        "Hardshrink": nn.Hardshrink,
        "Hardsigmoid": nn.Hardsigmoid,
        "Hardtanh": nn.Hardtanh,
        "Identity": nn.Identity,
        "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        "L1Loss": lambda: on(nn.L1Loss(reduction="none"), lambda part, x: part(x, relu(x))),
        "LPPool2d": lambda: nn.LPPool2d(1, 2),
        "LazyBatchNorm2d": lambda: once(nn.LazyBatchNorm2d(), MAP),
        "LazyConv2d": lambda: once(nn.LazyConv2d(2, 2), MAP),
        "LazyConvTranspose2d": lambda: once(nn.LazyConvTranspose2d(2, 2), MAP),
        "LazyInstanceNorm2d": lambda: once(nn.LazyInstanceNorm2d(track_running_stats=True), MAP),
        "LazyLinear": lambda: once(nn.LazyLinear(3), MAP),
        "LeakyReLU": nn.LeakyReLU,
        "Linear": lambda: nn.Linear(6, 3),
        "MaxPool2d": lambda: nn.MaxPool2d(2),
        "MaxUnpool2d": lambda: on(
            nn.MaxUnpool2d(2), lambda part, x: part(*F.max_pool2d(x, 2, return_indices=True))
        ),
        "PReLU": lambda: nn.PReLU(4),
        "PairwiseDistance": lambda: on(nn.PairwiseDistance(1), lambda part, x: part(x, relu(x))),
        "PixelShuffle": lambda: nn.PixelShuffle(2),
        "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
        "RReLU": nn.RReLU,
        "ReLU": nn.ReLU,
        "ReLU6": nn.ReLU6,
        "ReflectionPad2d": lambda: nn.ReflectionPad2d(1),
        "ReplicationPad2d": lambda: nn.ReplicationPad2d(1),
        "Sequential": lambda: nn.Sequential(nn.Conv2d(4, 2, 2), nn.ReLU()),
        "Softshrink": nn.Softshrink,
        "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
        "Threshold": lambda: nn.Threshold(0.1, -0.4),
        "Unflatten": lambda: nn.Unflatten(1, (2, 2)),
        "Unfold": lambda: nn.Unfold(2),
        "Upsample": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
        "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
        "ZeroPad2d": lambda: nn.ZeroPad2d(1),
    },
    LINE: {
        "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(4),
        "AdaptiveMaxPool1d": lambda: nn.AdaptiveMaxPool1d(4),
        "AvgPool1d": lambda: nn.AvgPool1d(2),
        "BatchNorm1d": lambda: nn.BatchNorm1d(4),
        "CircularPad1d": lambda: nn.CircularPad1d(1),
        "ConstantPad1d": lambda: nn.ConstantPad1d(1, 0.3),
        "Conv1d": lambda: nn.Conv1d(4, 2, 2),
        "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 2, 2, 2),
        "Dropout1d": nn.Dropout1d,
        "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
        "LPPool1d": lambda: nn.LPPool1d(1, 2),
        "LazyBatchNorm1d": lambda: once(nn.LazyBatchNorm1d(), LINE),
        "LazyConv1d": lambda: once(nn.LazyConv1d(2, 2), LINE),
        "LazyConvTranspose1d": lambda: once(nn.LazyConvTranspose1d(2, 2), LINE),
        "LazyInstanceNorm1d": lambda: once(nn.LazyInstanceNorm1d(track_running_stats=True), LINE),
        "MaxPool1d": lambda: nn.MaxPool1d(2),
        "MaxUnpool1d": lambda: on(
            nn.MaxUnpool1d(2), lambda part, x: part(*F.max_pool1d(x, 2, return_indices=True))
        ),
        "RNN": lambda: on(
            nn.RNN(6, 3, nonlinearity="relu", batch_first=True),
            lambda part, x: part(x)[0] + part(x)[1][-1][:, None],
        ),
        "ReflectionPad1d": lambda: nn.ReflectionPad1d(1),
        "ReplicationPad1d": lambda: nn.ReplicationPad1d(1),
        "ZeroPad1d": lambda: nn.ZeroPad1d(1),
    },
    VOLUME: {
        "AdaptiveAvgPool3d": lambda: nn.AdaptiveAvgPool3d(2),
        "AdaptiveMaxPool3d": lambda: nn.AdaptiveMaxPool3d(2),
        "AvgPool3d": lambda: nn.AvgPool3d(2),
        "BatchNorm3d": lambda: nn.BatchNorm3d(2),
        "CircularPad3d": lambda: nn.CircularPad3d(1),
        "ConstantPad3d": lambda: nn.ConstantPad3d(1, 0.3),
        "Conv3d": lambda: nn.Conv3d(2, 2, 2),
        "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 2, 2),
        "Dropout3d": nn.Dropout3d,
        "InstanceNorm3d": lambda: nn.InstanceNorm3d(2, track_running_stats=True),
        "LPPool3d": lambda: nn.LPPool3d(1, 2),
        "LazyBatchNorm3d": lambda: once(nn.LazyBatchNorm3d(), VOLUME),
        "LazyConv3d": lambda: once(nn.LazyConv3d(2, 2), VOLUME),
        "LazyConvTranspose3d": lambda: once(nn.LazyConvTranspose3d(2, 2), VOLUME),
        "LazyInstanceNorm3d": lambda: once(nn.LazyInstanceNorm3d(track_running_stats=True), VOLUME),
        "MaxPool3d": lambda: nn.MaxPool3d(2),
        "MaxUnpool3d": lambda: on(
            nn.MaxUnpool3d(2), lambda part, x: part(*F.max_pool3d(x, 2, return_indices=True))
        ),
        "ReflectionPad3d": lambda: nn.ReflectionPad3d(1),
        "ReplicationPad3d": lambda: nn.ReplicationPad3d(1),
        "ZeroPad3d": lambda: nn.ZeroPad3d(1),
    },
    ROW: {
        "Bilinear": lambda: on(
            nn.Bilinear(6, 4, 2), lambda part, x: part(x, PER_CHANNEL.expand(x.shape[0], 4))
        ),
        "RNNCell": lambda: nn.RNNCell(6, 3, nonlinearity="relu"),
    },
}
"""Shape of an input -> a module of every name in ``torch.nn`` that is accepted."""

NORMS = {"running_mean": PER_CHANNEL, "running_var": VARIANCE}

FUNCTIONS: dict[tuple[int, ...], dict[str, Part]] = {
    MAP: {
        "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (2, 4)),
        "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (2, 4)),
        "adaptive_max_pool2d_with_indices": lambda x: F.adaptive_max_pool2d_with_indices(x, (2, 4))[
            0
        ],
        "affine_grid": lambda x: F.affine_grid(
            x[:, 0, :2, :3], (x.shape[0], 4, 3, 3), align_corners=False
        ),
        "alpha_dropout": lambda x: F.alpha_dropout(x, training=False),
        "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
        "batch_norm": lambda x: F.batch_norm(x, **NORMS),
        "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
        "conv2d": lambda x: F.conv2d(x, KERNEL[..., 0].repeat(1, 2, 1)[..., None], PER_CHANNEL),
        "conv_transpose2d": lambda x: F.conv_transpose2d(x, KERNEL[:, :, 0, :, None], stride=2),
        "dropout": lambda x: F.dropout(x, training=False),
        "dropout2d": lambda x: F.dropout2d(x, training=False),
        "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=False),
        "fold": lambda x: F.fold(F.unfold(x, 2), (6, 6), 2),
        "grid_sample": lambda x: F.grid_sample(
            x, GRID.expand(x.shape[0], -1, -1, -1), align_corners=False
        ),
        "hardshrink": F.hardshrink,
        "hardsigmoid": F.hardsigmoid,
        "hardtanh": F.hardtanh,
        "hardtanh_": lambda x: F.hardtanh_(x.clone()),
        "instance_norm": lambda x: F.instance_norm(x, **NORMS, use_input_stats=False),
        "interpolate": lambda x: F.interpolate(x, (4, 5), mode="bilinear", antialias=True),
        "l1_loss": lambda x: F.l1_loss(x, relu(x), reduction="none"),
        "leaky_relu": F.leaky_relu,
        "leaky_relu_": lambda x: F.leaky_relu_(x.clone()),
        "linear": lambda x: F.linear(x, FORMS[:, :, 0], PER_CHANNEL[:2]),
        "lp_pool2d": lambda x: F.lp_pool2d(x, 1, 2),
        "max_pool2d": lambda x: F.max_pool2d(x, 2),
        "max_pool2d_with_indices": lambda x: F.max_pool2d_with_indices(x, 2)[0],
        "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        "pad": lambda x: F.pad(x, (1, 1), value=0.3),
        "pairwise_distance": lambda x: F.pairwise_distance(x, relu(x), 1),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
        "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
        "prelu": lambda x: F.prelu(x, PER_CHANNEL),
        "relu": F.relu,
        "relu6": F.relu6,
        "relu_": lambda x: F.relu_(x.clone()),
        "rrelu": F.rrelu,
        "rrelu_": lambda x: F.rrelu_(x.clone()),
        "softshrink": F.softshrink,
        "threshold": lambda x: F.threshold(x, 0.1, -0.4),
        "threshold_": lambda x: F.threshold_(x.clone(), 0.1, -0.4),
        "unfold": lambda x: F.unfold(x, 2),
        "upsample": lambda x: F.upsample(x, scale_factor=2),
        "upsample_bilinear": lambda x: F.upsample_bilinear(x, scale_factor=2),
        "upsample_nearest": lambda x: F.upsample_nearest(x, scale_factor=2),
    },
    LINE: {
        "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 4),
        "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 4),
        "adaptive_max_pool1d_with_indices": lambda x: F.adaptive_max_pool1d_with_indices(x, 4)[0],
        "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
        "conv1d": lambda x: F.conv1d(x, KERNEL[..., 0].repeat(1, 2, 1)),
        "conv_transpose1d": lambda x: F.conv_transpose1d(x, KERNEL[..., 0]),
        "dropout1d": lambda x: F.dropout1d(x, training=False),
        "lp_pool1d": lambda x: F.lp_pool1d(x, 1, 2),
        "max_pool1d": lambda x: F.max_pool1d(x, 2),
        "max_pool1d_with_indices": lambda x: F.max_pool1d_with_indices(x, 2)[0],
        "max_unpool1d": lambda x: F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2),
    },
    VOLUME: {
        "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
        "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, 2),
        "adaptive_max_pool3d_with_indices": lambda x: F.adaptive_max_pool3d_with_indices(x, 2)[0],
        "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
        "conv3d": lambda x: F.conv3d(x, KERNEL[..., None]),
        "conv_transpose3d": lambda x: F.conv_transpose3d(x, KERNEL[:2, ..., None]),
        "dropout3d": lambda x: F.dropout3d(x, training=False),
        "lp_pool3d": lambda x: F.lp_pool3d(x, 1, 2),
        "max_pool3d": lambda x: F.max_pool3d(x, 2),
        "max_pool3d_with_indices": lambda x: F.max_pool3d_with_indices(x, 2)[0],
        "max_unpool3d": lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2),
    },
    ROW: {
        "bilinear": lambda x: F.bilinear(
            x, FORMS[0, 0].expand(x.shape[0], 5), FORMS, PER_CHANNEL[:2]
        )
    },
}
"""Shape of an input -> every name in ``torch.nn.functional`` that is accepted."""

REFUSED_MODULES: dict[str, Callable[[], nn.Module]] = {
    **{
        name: getattr(nn, name)
        for name in (
            "CELU ELU GELU Hardswish LogSigmoid Mish SELU SiLU Sigmoid "
            "Softplus Softsign Tanh Tanhshrink"
        ).split()
    },
    "CosineSimilarity": lambda: on(nn.CosineSimilarity(), lambda part, x: part(x, relu(x))),
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, 3),
    "GLU": lambda: nn.GLU(1),
    "GRU": lambda: on(nn.GRU(6, 3, batch_first=True), lambda part, x: part(x[:, 0])[0]),
    "GRUCell": lambda: on(nn.GRUCell(6, 3), lambda part, x: part(x[:, 0, 0])),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LSTM": lambda: on(nn.LSTM(6, 3, batch_first=True), lambda part, x: part(x[:, 0])[0]),
    "LSTMCell": lambda: on(nn.LSTMCell(6, 3), lambda part, x: part(x[:, 0, 0])[0]),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "Softmax": lambda: nn.Softmax(1),
    "Softmax2d": nn.Softmax2d,
    "Softmin": lambda: nn.Softmin(1),
}

REFUSED_FUNCTIONS: dict[str, Part] = {
    **{
        name: getattr(F, name)
        for name in (
            "celu elu gelu hardswish logsigmoid mish selu silu sigmoid "
            "softplus softsign tanh tanhshrink"
        ).split()
    },
    "celu_": lambda x: F.celu_(x.clone()),
    "elu_": lambda x: F.elu_(x.clone()),
    "selu_": lambda x: F.selu_(x.clone()),
    "cosine_similarity": lambda x: F.cosine_similarity(x, relu(x)),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, 3),
    "glu": lambda x: F.glu(x, 1),
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "local_response_norm": lambda x: F.local_response_norm(x, 2),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "normalize": F.normalize,
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "softmax": lambda x: F.softmax(x, 1),
    "softmin": lambda x: F.softmin(x, 1),
}


class Every(nn.Module):
    """Parts side by side after a layer with a bias, one number of each."""

    def __init__(self, shape: tuple[int, ...], parts: dict[str, nn.Module]) -> None:
        super().__init__()
        kinds = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}
        self.first = kinds[len(shape)](shape[0], shape[0], *((1,) if len(shape) > 1 else ()))
        self.parts = nn.ModuleDict(
            {f"{name}_": part for name, part in parts.items()}
        )  # some names alone are attributes of a ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat(
            [part(x).flatten(1).sum(1, keepdim=True) for part in self.parts.values()], 1
        )


def every(
    shape: tuple[int, ...], parts: dict[str, Callable[[], nn.Module]]
) -> tuple[nn.Module, Tensor]:
    """A network of all parts, and images."""
    return make(lambda: (Every(shape, {name: build() for name, build in parts.items()}), shape))


def as_modules(functions: dict[str, Part]) -> dict[str, Callable[[], nn.Module]]:
    """Functions as modules, so that each is a layer."""
    return {
        name: lambda f=function: Net(lambda net, x: f(x)) for name, function in functions.items()
    }


GROUPS = [(shape, parts) for shape, parts in MODULES.items()]
GROUPS += [(shape, as_modules(functions)) for shape, functions in FUNCTIONS.items()]


@pytest.mark.filterwarnings("ignore")  # what is deprecated, lazy, or fills up with zeros says so
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_what_the_tables_accept_is_exact(group):
    """Every unit of every module and function is exact, and the audit passes."""
    shape, parts = GROUPS[group]
    model, x = every(shape, parts)
    network = abm.trace(model, x)
    by_value = {
        network.layers[layer].value: check for layer, check in abm.verify(network, x).items()
    }
    errors = {name: by_value[network.layers[f"parts.{name}_"].value].scaled for name in parts}
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "parts", [REFUSED_MODULES, as_modules(REFUSED_FUNCTIONS)], ids=["modules", "functions"]
)
def test_what_the_tables_refuse_is_refused(parts):
    """One message names every one of them."""
    model, x = every(MAP, parts)
    with pytest.raises(abm.UnsupportedOperation) as refused:
        abm.trace(model, x)
    named = set(re.findall(r" at parts\.(\w+)_\b", str(refused.value)))
    assert set(parts) - named == set()


def is_module(name: str) -> bool:
    """Whether a name of ``torch.nn`` is a module."""
    return inspect.isclass(getattr(nn, name)) and issubclass(getattr(nn, name), nn.Module)


HELPERS = set(
    """
    Callable DType Optional ScalingType SwizzleType Tensor assert_int_or_pair boolean_dispatch
    handle_torch_function has_torch_function has_torch_function_unary has_torch_function_variadic
    """.split()
)
"""Names in ``torch.nn.functional`` that are no functions of tensors."""


def test_tables_name_everything():
    """Every module and function of the installed PyTorch is in its table, with a reason."""
    modules = {name for name in dir(nn) if is_module(name)}
    functions = {n for n in dir(F) if not n.startswith("_") and callable(getattr(F, n))} - HELPERS
    assert modules - IN_MODULES.keys() == set()
    assert functions - IN_FUNCTIONS.keys() == set()
    assert {*IN_MODULES.values(), *IN_FUNCTIONS.values()} <= REASONS


def test_every_accepted_name_is_run():
    """What the tables call exact is what the test above runs, and what it refuses is not."""
    modules, functions = (
        {name for parts in group.values() for name in parts} for group in (MODULES, FUNCTIONS)
    )
    assert {name for name, said in IN_MODULES.items() if said == ACCEPTED} == modules
    assert {name for name, said in IN_FUNCTIONS.items() if said == ACCEPTED} == functions
    assert (
        not REFUSED_MODULES.keys() - IN_MODULES.keys()
        | REFUSED_FUNCTIONS.keys() - IN_FUNCTIONS.keys()
    )
