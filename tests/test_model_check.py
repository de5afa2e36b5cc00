"""Unsuitable models and examples: each runs, or is refused with what to do."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import Net
from torch import nn

import adjointbackmap as abm
from adjointbackmap.capture.model_check import check_kind
from adjointbackmap.engine.network import check_eval

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.MaxPool2d(3),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(18, 5)).eval()


def exported(model: nn.Module, dynamic: bool = True) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        return torch.export.export(model, (X,), dynamic_shapes=shapes)


UNFLATTENED = [
    "0.conv2d",
    "0",
    "1",
    "2",
    "3.conv_transpose2d",
    "3",
    "4",
    "5",
    "6.linear",
    "6",
    "output",
]
EXPORTS = {
    "module": (
        lambda program: program.module(),
        ["conv2d", "conv_transpose2d", "linear", "output"],
    ),
    "decomposed": (
        lambda program: program.run_decompositions().module(),
        ["conv2d", "conv_transpose2d", "output"],
    ),
    "unflattened": (
        torch.export.unflatten,
        ["0.conv2d", "0", "1", "2", "3.conv_transpose2d", "3", "4", "5", "6.linear", "6", "output"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", EXPORTS)
def test_modules_of_torch_export_are_traced(kind):
    """They count as in train mode, and may not be put into eval mode."""
    model = small()
    how, layers = EXPORTS[kind]
    network = abm.trace(how(exported(model)), X)
    assert list(network.layers) == layers
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    planes = abm.hyperplanes(network, x, "output", "RM0", dtype=torch.float64)
    assert (planes.reconstruct() - copy.deepcopy(model).double()(x)).abs().max() < 1e-13
    first = abm.hyperplanes(network, x, layers[0], "RM4", units=(0, 0, 1, 2), dtype=torch.float64)
    assert abm.reconstruction_test(first)["error"] < 1e-13


@pytest.mark.filterwarnings("ignore")
def test_an_export_that_fixes_the_batch_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError,
        match=(
            r"must take any batch size. Got an export that fixes it: "
            r"export it with dynamic_shapes"
        ),
    ):
        abm.trace(exported(small(), dynamic=False).module(), X)


@pytest.mark.filterwarnings("ignore")
def test_an_unflattened_export_that_fixes_the_batch_is_refused():
    unflattened = torch.export.unflatten(exported(small(), dynamic=False))
    with pytest.raises(ValueError, match=r"must take any batch size. Got an export that fixes it"):
        abm.trace(unflattened, X)


@pytest.mark.filterwarnings("ignore")
def test_an_export_with_a_largest_batch_is_traced():
    """It need not take as many images as we ask of other models."""
    shapes = ({0: torch.export.Dim("batch", max=99)},)
    module = torch.export.export(small(), (X,), dynamic_shapes=shapes).module()
    planes = abm.hyperplanes(abm.trace(module, X), X, "output", "RM0", dtype=torch.float64)
    assert (planes.reconstruct() - small().double()(X.double())).abs().max() < 1e-13


def test_a_batch_that_must_be_even_is_refused_with_what_to_do():
    model = Net(lambda net, x: x.reshape(-1, 2, 3, 8, 8).flip(1).reshape(-1, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"Got a model that takes only some numbers of images: keep"
    ):
        abm.trace(model.eval(), X)


def test_weights_that_are_no_numbers_are_named():
    model = small()
    model[6].bias.data[0] = torch.nan
    with pytest.raises(
        ValueError, match=r"Weights must be numbers\. Got NaN in 6\.bias: load other"
    ):
        abm.trace(model, X)


def test_parameters_of_two_dtypes_are_named():
    model = small()
    model[6].double()
    match = r"give all parameters one dtype, model\.float\(\), for there are .*float64 in 6\.bias"
    with pytest.raises(ValueError, match=match):
        abm.trace(model, X)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_train_mode_is_refused_by_its_operations():
    with pytest.raises(
        ValueError,
        match=r"must leave its buffers as they are in eval mode|must be piecewise affine",
    ):
        abm.trace(exported(small().train()).module(), X)


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return small()


def on_two_devices() -> nn.Module:
    model = nn.DataParallel(small()).eval()
    model.device_ids = [0, 1]
    return model


KINDS = {
    "program": (
        lambda: exported(small()),
        TypeError,
        r"Got ExportedProgram: pass program\.module\(\)\.",
    ),
    "function": (
        lambda: F.relu,
        TypeError,
        r"Got builtin_function_or_method|Got function: wrap it in one\.",
    ),
    "quantised": (
        quantised,
        ValueError,
        r"Got the quantised Linear at 6: pass the model as it was before quantisation\.",
    ),
    "observed": (
        lambda: nn.Sequential(torch.ao.quantization.FakeQuantize(), nn.ReLU()),
        ValueError,
        r"Got the quantised FakeQuantize at 0: pass the model as it was",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(4, 3)).eval(),
        ValueError,
        r"Got LazyConv2d, whose .* at 0: run the model on a",
    ),
    "inference": (
        made_in_inference_mode,
        ValueError,
        r"Got Conv2d with tensors of inference mode at 0: make or load",
    ),
    "without values": (
        lambda: small().to("meta"),
        ValueError,
        r"must have values\. Got 0\.weight on the device meta: load it\.",
    ),
    "parallel": (
        on_two_devices,
        ValueError,
        r"Got DataParallel on 2 devices at the model itself: pass .* model\.module\.",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_ordinary_module_is_named_with_what_to_pass(kind):
    build, error, message = KINDS[kind]
    with pytest.raises(error, match=message):
        check_eval(build(), ValueError) if error is ValueError else check_kind(build())


def test_data_parallel_on_one_device_is_its_module():
    network = abm.trace(
        nn.DataParallel(small(), device_ids=None).eval()
        if not torch.cuda.is_available()
        else small(),
        X,
    )
    assert max(abm.audit(network, X).values()) < 1e-5


NOT_KNOWN = "pass an example that it takes"
EXAMPLES = {
    "channels": (
        torch.rand(1, 1, 8, 8),
        r"shape \(N, 1, 8, 8\)\. Got RuntimeError: .*3 channels.*: pass an example that it takes",
    ),
    "size": (
        torch.rand(1, 3, 5, 12),
        r"shape \(N, 3, 5, 12\)\. Got RuntimeError: mat1 and mat2.*: pass an example that it takes",
    ),
    "channels last": (
        torch.rand(1, 8, 8, 3),
        r"shape \(N, 8, 8, 3\)\. Got RuntimeError: .*: pass example\.movedim\(-1, 1\)\.",
    ),
    "one image, channels last": (
        torch.rand(8, 8, 3),
        r"Got RuntimeError: .*: pass example\.movedim\(-1, 0\)\[None\]\.",
    ),
    "one image": (
        torch.rand(3, 8, 8),
        r"shape \(N, 8, 8\)\. Got ValueError: expected 4D input.*: pass example\[None\]\.",
    ),
    "dtype": (
        torch.rand(1, 3, 8, 8).double(),
        r"Got RuntimeError: .*: pass example\.to\(torch\.float32\)\.",
    ),
    "bytes": (
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        r"must be a batch .* of floating numbers\. Got \(1, 3, 8, 8\) of",
    ),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_that_the_model_does_not_take_is_refused_with_the_models_own_error(kind):
    example, message = EXAMPLES[kind]
    with pytest.raises(ValueError, match=message):
        abm.trace(small(), example)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)], ids=["maps", "lines"])
def test_one_image_that_a_convolution_takes_is_no_batch(layer):
    """A convolution takes an image without a batch; a trace would take its channels for images."""
    example = torch.rand(3, *[8] * (layer.weight.dim() - 2))
    with pytest.raises(
        ValueError,
        match=r"must be a batch .*\. Got \(3, 8.*, which is one image: pass example\[None\]\.",
    ):
        abm.trace(nn.Sequential(layer, nn.ReLU()).eval(), example)


class Two(nn.Module):
    """A module of two inputs."""

    def forward(self, x, y):
        return x + y


def test_several_inputs_are_refused():
    with pytest.raises(
        ValueError, match=r"Got TypeError: .*missing 1 required.*'y': .*or wrap the model in a"
    ):
        abm.trace(Two().eval(), X)


def test_a_failing_model_leaves_its_buffers():
    def forward(net, x):
        net.calls += 1
        return net.conv(x)

    model = Net(forward, calls=torch.zeros(()), conv=nn.Conv2d(1, 1, 1)).eval()
    with pytest.raises(ValueError, match="must run on a batch"):
        abm.trace(model, X)
    with pytest.raises(
        ValueError,
        match=r"must leave its buffers as they are in eval mode. Got a forward that changes calls",
    ):
        abm.trace(model, X[:, :1])
    assert model.calls == 0
