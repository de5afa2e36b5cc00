"""Modules of every structure: outputs, unused parts, sizes, layouts, precisions, refusals."""

import inspect
import re
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make, parameter
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap.capture.model_check import batch_of
from adjointbackmap.engine.network import check_eval

SHAPE = (2, 5, 5)
Pair = namedtuple("Pair", ["scores", "aux"])


@dataclass
class Outputs:
    """What a network returns: a dataclass that torch.export knows nothing of."""

    scores: Tensor
    aux: Tensor | None = None


def heads(function, **parts):
    """A network with two heads, in float64: ``function(net, features)`` gives what it returns."""

    def forward(net, x):
        return function(net, F.relu(net.conv(x)).flatten(1))

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Net(
            forward, conv=nn.Conv2d(2, 3, 3), fc=nn.Linear(27, 4), aux=nn.Linear(27, 2), **parts
        )
        return model.double().eval()


def conv(function, **parts):
    """A network ``function(net, x)`` with one convolution, in float64."""
    return Net(function, conv=nn.Conv2d(2, 3, 3), **parts).double().eval()


def images(count=2, *shape, seed=0):
    """Some images, always the same."""
    return torch.randn(
        count, *(shape or SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def output_error(network, x, **options):
    """Scale-aware error of the output's hyperplanes; raises if it is too large."""
    mode = "RM0" if "RM0" in network.layers["output"].modes else "RM2"
    return abm.reconstruction_test(abm.hyperplanes(network, x, "output", mode, **options))["error"]


# several outputs

RETURNS = {
    "tuple": lambda net, x: (net.fc(x), net.aux(x)),
    "list": lambda net, x: [net.fc(x), net.aux(x)],
    "dict": lambda net, x: {"scores": net.fc(x), "aux": net.aux(x)},
    "dict-with-ints": lambda net, x: {7: net.fc(x), 3: net.aux(x)},
    "namedtuple": lambda net, x: Pair(net.fc(x), net.aux(x)),
    "dataclass": lambda net, x: Outputs(net.fc(x), net.aux(x)),
}
CHOICES = [
    ("tuple", 0, "fc"),
    ("tuple", "1", "aux"),
    ("list", -1, "aux"),
    ("dict", "aux", "aux"),
    ("dict", 0, "fc"),
    ("dict-with-ints", 3, "aux"),
    ("namedtuple", "scores", "fc"),
    ("namedtuple", 1, "aux"),
    ("dataclass", "aux", "aux"),
    ("dataclass", -2, "fc"),
]


@pytest.mark.parametrize(("kind", "output", "layer"), CHOICES, ids=lambda part: str(part))
def test_output_is_chosen_by_name_or_index(kind, output, layer):
    """The network ends at the chosen output; the other head has no layer and no bias in it."""
    model = heads(RETURNS[kind])
    x = images()
    network = abm.trace(model, x, output=output)
    assert list(network.layers) == ["conv", layer, "output"]
    assert network.biases.names == ("conv.bias", f"{layer}.bias")
    planes = abm.hyperplanes(network, x, "output", "RM0")
    expected = model.get_submodule(layer)(F.relu(model.conv(x)).flatten(1)).detach()
    torch.testing.assert_close(planes.value, expected, rtol=0, atol=0)
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


def test_everything_works_on_a_chosen_output():
    """Audit, dot test, dense test, verification of every unit, in float32 too, and other images."""
    x = images(3, seed=1)
    network = abm.trace(heads(RETURNS["dict"]), images(1), output="aux")
    operator = abm.operator(network, x[:1], "output")
    assert abm.dot_test(operator)["error"] <= 1e-12
    assert abm.dense_test(operator, x[:1])["error"] <= 1e-12
    assert all(
        check.scaled <= 1e-12 and check.share == 1 for check in abm.verify(network, x).values()
    )
    assert max(abm.audit(network, x).values()) <= 1e-12
    assert (
        output_error(abm.trace(heads(RETURNS["dict"]).float(), x.float(), output="aux"), x.float())
        <= 1e-5
    )


def test_until_needs_no_choice_of_an_output():
    """What comes after the layer does not count: which outputs there are does not either."""
    x = images()
    network = abm.trace(heads(RETURNS["tuple"]), x, until="conv")
    assert list(network.layers) == ["conv", "output"]
    assert output_error(network, x) <= 1e-12


def test_fold_keeps_several_outputs():
    """Folding a network with several outputs leaves each of them what it was."""
    model = heads(lambda net, x: (net.fc(x), net.norm(net.aux(x))), norm=nn.BatchNorm1d(2))
    x = images()
    folded = abm.fold(model, x).model
    assert isinstance(folded.norm, nn.Identity)
    for ours, theirs in zip(folded(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def train_only_head(net, x):
    """An auxiliary head that only trains, as GoogLeNet's."""
    return net.fc(x), net.aux(x) if net.training else None


def test_head_for_training_alone_needs_no_choice():
    """Where all outputs but one are None, that one is the network's."""
    model = heads(train_only_head)
    x = images()
    network = abm.trace(model, x)
    assert list(network.layers) == ["conv", "fc", "output"]
    assert not any("aux" in name for name in network.biases)
    assert output_error(network, x) <= 1e-12


REFUSED_OUTPUTS = {
    "none-chosen": (
        RETURNS["tuple"],
        None,
        r"must be one of what the model returns: 0, 1\. Got None: choose one with output=",
    ),
    "no-such-name": (RETURNS["dict"], "fc", r"what the model returns: scores, aux\. Got 'fc'"),
    "no-such-index": (RETURNS["namedtuple"], 2, r"what the model returns: scores, aux\. Got 2"),
    "index-before-the-first": (train_only_head, -3, r"what the model returns: 0\. Got -3"),
    "a-head-that-is-none": (train_only_head, 1, r"what the model returns: 0\. Got 1"),
    "truth-value": (RETURNS["tuple"], True, r"what the model returns: 0, 1\. Got True"),
    "nothing": (lambda net, x: None, None, r"what the model returns: nothing\. Got None"),
    "nested": (
        lambda net, x: ((x, x), x),
        0,
        r"The output 0 must be a tensor\. Got tuple: wrap the model",
    ),
    "constant": (
        lambda net, x: (net.fc(x), net.fc.weight),
        1,
        "numbers that depend on the input.*: choose another with output=",
    ),
    "shape-alone": (lambda net, x: torch.ones_like(x), None, "numbers that depend on the input"),
    "truth-values": (
        lambda net, x: x > 0,
        None,
        r"numbers that depend on the input.* Got \(N, 27\) of torch\.bool",
    ),
    "a-number": (
        lambda net, x: net.fc(x).mean(1),
        None,
        r"with a dimension beside the batch\. Got \(N\) of torch\.float64",
    ),
}


@pytest.mark.parametrize("why", REFUSED_OUTPUTS)
def test_output_that_is_none_is_refused_with_those_that_are(why):
    """The message names the outputs and what to do."""
    function, output, match = REFUSED_OUTPUTS[why]
    with pytest.raises(ValueError, match=match):
        abm.trace(heads(function), images(), output=output)


# what does not count


def test_unused_parts_are_no_layers_and_no_biases():
    """Parameters and modules that the output does not depend on are not in the network."""

    def forward(net, x):
        net.wasted(x)
        return net.fc(x)

    model = heads(forward, wasted=nn.Linear(27, 5), never=nn.BatchNorm1d(3), scalar=parameter())
    x = images()
    network = abm.trace(model, x)
    assert list(network.layers) == ["conv", "fc", "output"]
    assert network.biases.names == ("conv.bias", "fc.bias")
    assert abm.dense_test(abm.operator(network, x, "output"), x)["error"] <= 1e-12


def test_softmax_tail_is_cut_with_until():
    """A softmax at the end is refused by its module's name; up to the scores all works."""
    model = (
        nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(1))
        .double()
        .eval()
    )
    x = images()
    with pytest.raises(abm.UnsupportedOperation, match=r"Got softmax at 4: .*until="):
        abm.trace(model, x)
    network = abm.trace(model, x, until="3")
    assert list(network.layers)[-2:] == ["3", "output"]
    assert output_error(network, x) <= 1e-12
    assert set(abm.audit(network, x)) == {"0", "1", "2", "3"}
    with pytest.raises(abm.UnsupportedOperation, match="softmax at 4"):
        abm.trace(model, x, until="4")


# sizes


def pooled(net, x):
    """A network for images of any size."""
    return net.fc(F.adaptive_avg_pool2d(F.relu(net.conv(x)), 1).flatten(1))


@pytest.mark.parametrize("size", [(3, 3), (4, 9), (33, 17)], ids=str)
def test_module_is_traced_once_for_each_image_size(size):
    """A module for any size has a network for each; another size is refused, with what to do."""
    network = abm.trace(conv(pooled, fc=nn.Linear(3, 4)), images(1, 2, *size))
    assert network.in_shape == (2, *size)
    assert output_error(network, images(2, 2, *size, seed=1)) <= 1e-12
    with pytest.raises(ValueError, match=r"resize it, or trace the model at its size"):
        abm.hyperplanes(network, images(1, 2, 8, 8), "output", "RM0")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_example_of_any_batch_size_gives_the_same_network(count):
    """Also with as many images as channels; a batch of another size has its own results."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = conv(pooled, fc=nn.Linear(3, 4))
    network = abm.trace(model, images(count))
    x = images(5, seed=1)
    planes = abm.hyperplanes(network, x, "output", "RM0")
    torch.testing.assert_close(planes.value, model(x).detach(), rtol=1e-12, atol=1e-12)
    assert abm.reconstruction_test(planes)["error"] <= 1e-12
    alone = torch.cat([abm.hyperplanes(network, one, "output", "RM0").image for one in x])
    torch.testing.assert_close(planes.image, alone, rtol=1e-12, atol=1e-12)


# memory layouts

LAYOUTS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, ::2, ::3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part-of-a-larger-one": lambda x: F.pad(x, (1, 2, 3, 1, 1, 0))[:, 1:, 3:-1, 1:-2],
    "requires-grad": lambda x: x.clone().requires_grad_(),
}


def viewed(net, x):
    """A network whose ``view`` asks for contiguous maps."""
    return net.fc(net.conv(x).view(x.shape[0], -1))


@pytest.fixture(scope="module")
def view_network():
    """A network whose ``view`` asks for contiguous maps, traced."""
    return abm.trace(conv(viewed, fc=nn.Linear(27, 4)), images())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_images_changes_nothing(view_network, layout):
    """Bitwise the same hyperplanes and values, detached; the images are left as they are."""
    x = images()
    given = LAYOUTS[layout](x)
    ours, plain = (abm.hyperplanes(view_network, t, "output", "RM0") for t in (given, x))
    assert torch.equal(ours.image, plain.image)
    assert torch.equal(ours.bias, plain.bias)
    assert torch.equal(ours.value, plain.value)
    assert not ours.image.requires_grad
    assert torch.equal(given, x)
    assert given.stride() == LAYOUTS[layout](x).stride()


def test_one_image_expanded_to_a_batch_gives_it_twice(view_network):
    """An input whose images share their memory."""
    planes = abm.hyperplanes(view_network, images(1).expand(2, *SHAPE), "output", "RM0")
    assert torch.equal(planes.image[0], planes.image[1])
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


@pytest.mark.parametrize("layout", ["channels-last", "strided", "requires-grad"])
def test_layout_of_the_example_changes_nothing(layout):
    """A trace from an example of any layout is the same."""
    model = conv(viewed, fc=nn.Linear(27, 4))
    assert output_error(abm.trace(model, LAYOUTS[layout](images())), images()) <= 1e-12


def test_channels_last_model_gives_the_same_hyperplanes(traced_case):
    """Channels-last kernels and images pass the dense and the reconstruction test."""
    name = "residual-with-zero-padded-channels"
    model, x = make(name)
    model = model.to(memory_format=torch.channels_last)
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    network = abm.trace(model, last)
    ours = abm.hyperplanes(network, last, "output", "RM0")
    plain = abm.hyperplanes(traced_case(name).network, x, "output", "RM0")
    torch.testing.assert_close(ours.image, plain.image, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.bias, plain.bias, rtol=1e-12, atol=1e-12)
    assert abm.dense_test(abm.operator(network, last, "output"), last)["error"] <= 1e-12
    assert all(check.scaled <= 1e-12 for check in abm.verify(network, last[:1]).values())


def test_model_may_write_into_its_input():
    """An in-place operation on the image: the network is right, the user's images stay."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3)).double().eval()
    x = images()
    network = abm.trace(model, x)
    assert output_error(network, x) <= 1e-12
    abm.dense_test(abm.operator(network, x, "output"), x)
    assert torch.equal(x, images())


# precisions and devices


def test_model_in_float64_is_computed_in_float64(view_network):
    """Hyperplanes and values are in the model's dtype."""
    planes = abm.hyperplanes(view_network, images(), "output", "RM0")
    assert {planes.image.dtype, planes.bias.dtype, planes.value.dtype, view_network.dtype} == {
        torch.float64
    }


def test_model_in_float32_is_computed_in_either():
    """float32, and float64 on request: then the value is the module's, parameters cast."""
    model = conv(viewed, fc=nn.Linear(27, 4)).float()
    network = abm.trace(model, images().float())
    x = images().float()
    assert output_error(network, x) <= 1e-6
    assert output_error(network, x, dtype=torch.float64) <= 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["residual-with-zero-padded-channels", "no-bias"])
def test_model_on_cuda_is_computed_there(name):
    """Everything on the model's device; an image on another device is refused."""
    model, x = make(name)
    network = abm.trace(model.cuda(), x.cuda())
    planes = abm.hyperplanes(network, x.cuda(), "output", "RM0")
    assert planes.image.device.type == planes.bias.device.type == planes.value.device.type == "cuda"
    assert abm.reconstruction_test(planes)["error"] <= 1e-12
    assert all(check.scaled <= 1e-12 for check in abm.verify(network, x.cuda()).values())
    with pytest.raises(ValueError, match=r"x must be on cuda.*move it with"):
        abm.hyperplanes(network, x, "output", "RM0")


# what capture refuses


def branch(net, x):
    """A branch on the values of the image."""
    x = net.conv(x)
    if x.sum() > 0:
        x = x + 1
    return x


def loop(net, x):
    """As many turns as the image says."""
    for _ in range(int(x.abs().sum())):
        x = x + 1
    return net.conv(x)


def fails(net, x):
    """An error of the model's own."""
    return net.parts[0]


def known_object(net, x):
    """An object of the user's own."""
    return net


def line_of(function, code):
    """File and number of the line of a function, as a message shows them."""
    lines, first = inspect.getsourcelines(function)
    number = first + next(i for i, line in enumerate(lines) if code in line)
    return f"at {__file__}:{number} ({code})"


GRAPH = "The model must be a graph that torch.export can capture"
RUNS = "The model must run on a batch of the example's shape (N, "
REFUSED_CODE = {
    "branch": (
        GRAPH,
        branch,
        "if x.sum() > 0:",
        "a branch or a shape that depends on the data",
        "write it with torch.where.",
    ),
    "loop": (
        GRAPH,
        loop,
        "for _ in range(int(x.abs().sum())):",
        "a branch or a shape that depends on the data",
        "torch.where.",
    ),
    "error": (
        RUNS,
        fails,
        "return net.parts[0]",
        "AttributeError: 'Net' object has no attribute 'parts'",
        "one tensor.",
    ),
}


@pytest.mark.parametrize("why", REFUSED_CODE)
def test_refused_code_is_shown_with_its_line(why, capfd):
    """File, line and code of the model's own line that causes it, and nothing else is printed."""
    first, function, code, cause, advice = REFUSED_CODE[why]
    with pytest.raises(ValueError, match=re.escape(first)) as raised:
        abm.trace(conv(function), images())
    message = str(raised.value)
    assert cause in message
    assert line_of(function, code) in message
    assert message.endswith(advice)
    assert capfd.readouterr() == ("", "")


BATCHES = {
    "len": (lambda net, x: net.conv(x).reshape(len(x), -1), images()),
    "number": (lambda net, x: net.conv(x).reshape(2, -1), images()),
}


@pytest.mark.parametrize("why", BATCHES)
def test_fixed_batch_is_refused_with_what_to_write(why, capfd):
    """The message says how to write a fixed batch size, and nothing else is printed."""
    function, example = BATCHES[why]
    with pytest.raises(
        ValueError,
        match=r"fixes the batch: write x\.shape\[0\] in place of len\(x\).* give a batch",
    ):
        abm.trace(conv(function), example)
    assert capfd.readouterr() == ("", "")


NUMBERS = {
    "item": (lambda net, x: net.conv(x) * x.sum((1, 2, 3))[0].item(), "mul"),
    "boolean-index": (
        lambda net, x: net.conv(x)[x[:, :1, :3, :3].expand(-1, 3, -1, -1) > 0],
        "index",
    ),
}


@pytest.mark.parametrize("why", NUMBERS)
def test_numbers_read_from_the_data_are_refused(why):
    """A factor or shape that depends on the image is refused by the operation's name."""
    function, op = NUMBERS[why]
    with pytest.raises(
        abm.UnsupportedOperation, match=rf"\b{op} \([^)]*number in it is [^)]*read from the data\)"
    ):
        abm.trace(conv(function), images())


REFUSED_MODELS = {
    "object": (
        conv(known_object),
        images(),
        ValueError,
        r"in output: return a tensor, a tuple, a dict or a dataclass",
    ),
    "buffer": (
        *(conv(lambda net, x: net.conv(x + net.seen.add_(1)), seen=torch.zeros(())), images()),
        *(ValueError, r"must leave its buffers as they are.*changes seen: leave that out"),
    ),
    "compiled": (
        torch.compile(nn.Conv2d(2, 3, 3).eval()),
        images(),
        TypeError,
        r"Got OptimizedModule, which is compiled: pass",
    ),
}


@pytest.mark.parametrize("why", REFUSED_MODELS)
def test_models_of_another_kind_are_refused(why):
    """What cannot be a network is answered with what must be given."""
    model, example, error, match = REFUSED_MODELS[why]
    with pytest.raises(error, match=match):
        abm.trace(model, example)


def test_other_kinds_are_refused_without_type_checks_too():
    """Without the tests' type checks: a function and a tuple are refused in a sentence."""
    with pytest.raises(
        TypeError,
        match=r"must be a torch\.nn\.Module\. Got builtin_function_or_method: wrap it in one",
    ):
        inspect.unwrap(check_eval)(torch.relu, ValueError)
    with pytest.raises(
        TypeError, match=r"must be a torch\.Tensor\. Got tuple: a network has one input"
    ):
        inspect.unwrap(batch_of)((images(), images()))


def state(model):
    """What a failure might leave in a module: hooks, modes, attributes, values, gradients."""
    return [
        (
            *(name, module.training, sorted(module.__dict__)),
            *(
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            ),
            {
                n: (p.data_ptr(), p._version, p.requires_grad, p.grad)
                for n, p in module.named_parameters(recurse=False)
            },
        )
        for name, module in model.named_modules()
    ]


def gelu(net, x):
    """An operation that is not piecewise affine."""
    return F.gelu(net.conv(x))


def several(net, x):
    """Two outputs."""
    return net.conv(x), x


@pytest.mark.parametrize(
    "function", [branch, fails, known_object, gelu, several], ids=lambda f: f.__name__
)
def test_model_is_left_as_it_was_after_a_failure(function):
    """No hook, mode, attribute or gradient stays behind, and the module computes what it did."""
    model = conv(function)
    before = state(model)
    kernel = model.conv(images())
    with pytest.raises((ValueError, RuntimeError)):
        abm.trace(model, images())
    assert state(model) == before
    assert torch.equal(model.conv(images()), kernel)
    assert torch.is_grad_enabled()
