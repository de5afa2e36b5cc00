"""The five networks against tables A.1, A.2, B.1, B.4, B.5, and against plain twins."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import adjointbackmap as abm
from adjointbackmap import data, models

VGG7_MAPS = {
    "conv0": (32, 32, 32),
    "conv1": (32, 32, 32),
    "conv2": (64, 16, 16),
    "conv3": (64, 16, 16),
    "conv4": (96, 8, 8),
    "conv5": (96, 8, 8),
}
RESNET20_MAPS = {
    **{f"conv{i}": (32, 32, 32) for i in range(7)},
    **{f"conv{i}": (64, 16, 16) for i in range(7, 13)},
    **{f"conv{i}": (96, 8, 8) for i in range(13, 19)},
}
VGGS = ("vgg7-nobias", "vgg7")
RESNETS = ("fixup-resnet20-nobias", "resnet20", "fixup-resnet20")
NETWORKS = (*VGGS, *RESNETS)


def randomised(name: str, seed: int = 0) -> nn.Module:
    """A network in float64 and eval mode with all parameters random: none hides at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model = models.build(name).double().eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            fan_in = value[0].numel() if value.dim() > 1 else 4
            draw = (
                torch.randn(value.shape, generator=generator, dtype=value.dtype)
                * (2 / fan_in) ** 0.5
            )
            value.copy_(draw.abs() + 0.5 if "var" in key else draw)
    return model


def record(model: nn.Module, x: torch.Tensor) -> tuple[dict, dict]:
    """Inputs and outputs of every named layer in one forward pass."""
    inputs = {}
    outputs = {}

    def hook(name):
        def keep(module, args, output):
            inputs[name] = args[0].detach()
            outputs[name] = output.detach()

        return keep

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name
    ]
    with torch.no_grad():
        outputs["output"] = model(x)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def image(seed: int = 1) -> torch.Tensor:
    return torch.randn(
        1, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def kernel_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("vgg7-nobias", 10, 204_576),
        ("vgg7", 10, 204_576),
        ("vgg7", 100, 213_216),
        ("resnet20", 10, 729_888),
        ("resnet20", 100, 738_528),
        ("fixup-resnet20-nobias", 10, 729_888),
        ("fixup-resnet20", 10, 729_888),
        ("fixup-resnet20", 100, 738_528),
    ],
)
def test_kernel_weights(name, classes, count):
    assert kernel_weights(models.build(name, classes)) == count


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("vgg7-nobias", 0),
        ("vgg7", 2 * 384),  # batch norm: a scale and a shift for each channel
        ("resnet20", 2 * 1_184),
        ("fixup-resnet20-nobias", 9),
        ("fixup-resnet20", 9 + 37),
    ],
)
def test_other_parameters(name, others):
    model = models.build(name)
    assert sum(p.numel() for p in model.parameters()) - kernel_weights(model) == others


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_have_the_sizes_of_the_tables(name):
    model = models.build(name).eval()
    _, outputs = record(model, torch.zeros(2, 3, 32, 32))
    convolutions = {
        key: tuple(value.shape[1:]) for key, value in outputs.items() if key.startswith("conv")
    }
    assert convolutions == (VGG7_MAPS if name in VGGS else RESNET20_MAPS)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", [10, 100])
def test_outputs_are_one_score_for_each_class(name, classes):
    assert models.build(name, classes).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize("name", NETWORKS)
def test_only_conv7_and_conv13_of_the_resnets_have_stride_two(name):
    strided = {
        key
        for key, m in models.build(name).named_modules()
        if isinstance(m, nn.Conv2d) and m.stride != (1, 1)
    }
    assert strided == (set() if name in VGGS else {"conv7", "conv13"})


@pytest.mark.parametrize("name", NETWORKS)
def test_fc_is_the_linear_output_of_the_pooled_map(name):
    model = randomised(name)
    inputs, outputs = record(model, image())
    assert torch.equal(outputs["output"], outputs["fc"])
    assert inputs["fc"].shape == (1, 96)
    assert bool((outputs["fc"] < 0).any())
    torch.testing.assert_close(outputs["fc"], inputs["fc"] @ model.get_parameter("fc.weight").T)


@pytest.mark.parametrize("name", ["vgg7", "resnet20"])
def test_batch_norm_has_the_eps_of_tensorflow(name):
    assert {m.eps for m in models.build(name).modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


def same_convolution(x, w, stride):
    """TensorFlow's "same" convolution, position by position."""
    n = x.shape[-1]
    size = -(-n // stride)
    before = max((size - 1) * stride + 3 - n, 0) // 2
    out = torch.zeros(w.shape[0], size, size, dtype=x.dtype)
    for row in range(size):
        for column in range(size):
            for u in range(3):
                for v in range(3):
                    r = row * stride + u - before
                    c = column * stride + v - before
                    if 0 <= r < n and 0 <= c < n:
                        out[:, row, column] += w[:, :, u, v] @ x[:, r, c]
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding(stride):
    conv = models.Conv3x3(2, 4, stride).double()
    x = image()[:, :2, :8, :8]
    torch.testing.assert_close(conv(x)[0], same_convolution(x[0], conv.weight, stride))


def same_average_pooling(x):
    """Average pooling, window 3, stride 2; positions outside the map are not counted."""
    size = x.shape[-1] // 2
    windows = [
        [x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].mean((1, 2)) for c in range(size)]
        for r in range(size)
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in windows], dim=-2)


@pytest.mark.parametrize("name", VGGS)
@pytest.mark.parametrize(("before", "after"), [("1", "conv2"), ("3", "conv4")])
def test_vgg7_pooling_leaves_padding_out_of_the_count(name, before, after):
    inputs, outputs = record(randomised(name), image())
    activation = outputs[("conv" if name == "vgg7-nobias" else "bn") + before].clamp(min=0)
    torch.testing.assert_close(inputs[after][0], same_average_pooling(activation[0]))


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def shortcut(x, channels):
    """Every second pixel of every channel, then channels of zeros."""
    if x.shape[0] == channels:
        return x
    out = torch.zeros(channels, x.shape[1] // 2, x.shape[2] // 2, dtype=x.dtype)
    out[: x.shape[0]] = x[:, ::2, ::2]
    return out


def test_resnet20_blocks_add_the_shortcut_and_leak_a_fifth():
    inputs, outputs = record(randomised("resnet20"), image())
    torch.testing.assert_close(inputs["conv1"], leaky(outputs["bn0"]))
    for block in range(9):
        first = 2 * block + 1
        second = 2 * block + 2
        branch = outputs[f"bn{second}"][0]
        expected = leaky(branch + shortcut(inputs[f"conv{first}"][0], len(branch)))
        actual = inputs[f"conv{second + 1}"][0] if block < 8 else inputs["fc"][0]
        torch.testing.assert_close(inputs[f"conv{second}"], leaky(outputs[f"bn{first}"]))
        torch.testing.assert_close(actual, expected if block < 8 else expected.mean((1, 2)))


def fixup_twin(p, x):
    """Table B.5, row by row; without scalar biases it is Table A.2."""

    def plus(number, x):
        return x + p.get(f"b{number}", 0.0)

    def conv(number, x):
        stride = 2 if number in (7, 13) else 1
        padded = F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        return F.conv2d(padded, p[f"conv{number}.weight"], stride=stride)

    x = plus(0, conv(0, x)).clamp(min=0)
    for block in range(9):
        shifted = plus(4 * block + 1, x)
        inner = plus(4 * block + 2, conv(2 * block + 1, shifted)).clamp(min=0)
        branch = conv(2 * block + 2, plus(4 * block + 3, inner)) * p[f"m{2 * block + 2}"]
        source = shifted if block in (3, 6) else x
        x = (plus(4 * block + 4, branch) + shortcut(source[0], branch.shape[1])).clamp(min=0)
    return x.mean((2, 3)) @ p["fc.weight"].T


@pytest.mark.parametrize("name", ["fixup-resnet20", "fixup-resnet20-nobias"])
def test_fixup_follows_its_table(name):
    model = randomised(name)
    with torch.no_grad():
        torch.testing.assert_close(model(image()), fixup_twin(model.state_dict(), image()))


def test_fixup_scalar_is_added_before_the_padding():
    model = models.build("fixup-resnet20").eval()
    with torch.no_grad():
        model.get_parameter("b1").fill_(2.0)
    _, outputs = record(model, torch.zeros(1, 3, 32, 32))
    w = model.get_parameter("conv1.weight").detach()
    torch.testing.assert_close(outputs["conv1"][0, :, 5, 5], 2 * w.sum((1, 2, 3)))
    torch.testing.assert_close(outputs["conv1"][0, :, 0, 0], 2 * w[:, :, 1:, 1:].sum((1, 2, 3)))


def test_fixup_scalars_are_named_as_in_the_tables():
    scalars = {
        name for name, p in models.build("fixup-resnet20").named_parameters() if p.dim() == 0
    }
    assert scalars == {f"b{i}" for i in range(37)} | {f"m{i}" for i in range(2, 19, 2)}
    scalars = {
        name for name, p in models.build("fixup-resnet20-nobias").named_parameters() if p.dim() == 0
    }
    assert scalars == {f"m{i}" for i in range(2, 19, 2)}


def test_fixup_without_biases_gets_a_gradient_in_every_channel():
    """Second convolutions at zero would leave the new channels of a wider block on ReLU's kink."""
    torch.manual_seed(0)
    model = models.build("fixup-resnet20-nobias").double()
    nn.init.normal_(model.fc.weight)
    model(image(8)).square().sum().backward()
    for name, weight in model.named_parameters():
        if name.startswith("conv"):
            assert (weight.grad.flatten(1) != 0).any(1).all(), name


def test_fixup_initialisation():
    parameters = dict(models.build("fixup-resnet20").named_parameters())
    zero = {name for name, p in parameters.items() if not p.any()}
    assert zero == {f"conv{i}.weight" for i in range(2, 19, 2)} | {f"b{i}" for i in range(37)} | {
        "fc.weight"
    }
    assert all(parameters[f"m{i}"] == 1 for i in range(2, 19, 2))
    for i, outputs in ((1, 32), (9, 64), (17, 96)):
        deviation = (2 / (9 * outputs)) ** 0.5 / 3  # He's, over the square root of the nine blocks
        assert parameters[f"conv{i}.weight"].std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(
    "name",
    ["vgg7-nobias", "fixup-resnet20-nobias-cifar10", "fixup-resnet20", "fixup-resnet20-cifar100"],
)
def test_preprocessing_normalises_each_channel(name):
    pixels = image().abs()
    expected = torch.stack(
        [
            (pixels[0, 0] - 0.4914) / 0.2023,
            (pixels[0, 1] - 0.4822) / 0.1994,
            (pixels[0, 2] - 0.4465) / 0.2010,
        ]
    )
    torch.testing.assert_close(
        models.preprocessing(name)(pixels)[0], expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ["vgg7", "vgg7-cifar10", "resnet20", "resnet20-cifar100"])
def test_preprocessing_leaves_the_networks_with_batch_norm_their_pixels(name):
    assert torch.equal(models.preprocessing(name)(image()), image())


@pytest.mark.parametrize("function", [models.build, models.preprocessing, models.architecture])
@pytest.mark.parametrize("name", ["vgg8", "vgg7-cifar1000", ""])
def test_an_unknown_network_is_answered_with_the_known_ones(function, name):
    with pytest.raises(
        ValueError,
        match=(
            r"one of vgg7-nobias, .*, fixup-resnet20, "
            rf"or .* -cifar10 or -cifar100\. Got '{name}'\."
        ),
    ):
        function(name)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of assets with one network of 100 classes."""
    model = models.build("vgg7", 100)
    folder = tmp_path / "assets"
    folder.mkdir()
    save_file(model.state_dict(), folder / "vgg7-cifar100.safetensors")
    (folder / "vgg7-cifar100.json").write_text(json.dumps({"classes": 100, "dataset": "cifar100"}))
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    return model


def test_a_shipped_network_is_loaded_with_its_weights(shipped):
    assert models.names() == ("vgg7-cifar100",)
    assert models.card("vgg7-cifar100")["classes"] == 100
    loaded = models.load("vgg7-cifar100")
    assert not any(module.training for module in loaded.modules())
    assert all(
        torch.equal(value, shipped.state_dict()[key]) for key, value in loaded.state_dict().items()
    )


@pytest.mark.parametrize("function", [models.load, models.card])
def test_a_network_that_is_not_shipped_is_answered_with_those_that_are(shipped, function):
    with pytest.raises(
        ValueError, match=r"A shipped network must be one of vgg7-cifar100\. Got 'vgg7-cifar10'\."
    ):
        function("vgg7-cifar10")


def test_shipped_networks_classify_the_sample_as_their_cards_say():
    names = [name for name in models.names() if name.endswith("-cifar10")]
    assert "vgg7-cifar10" in names
    images = data.sample()
    for name in names:
        with torch.no_grad():
            scores = models.load(name)(models.preprocessing(name)(images.unit_interval()))
        share = (scores.argmax(1) == images.labels).double().mean().item()
        expected = models.card(name)["test accuracy"]
        deviation = (expected * (1 - expected) / len(images)) ** 0.5
        assert abs(share - expected) < 4 * deviation, (
            f"{name}: {share} of the sample, {expected} of all test images"
        )


def test_normalisation_is_traced_with_the_network_in_either_dtype():
    """The study's normalisation is no cast: a float32 trace gives float64 hyperplanes of pixels."""
    whole = torch.nn.Sequential(
        models.preprocessing("vgg7-nobias-cifar10"), torch.nn.Conv2d(3, 2, 3)
    ).eval()
    x = torch.rand(1, 3, 8, 8)
    network = abm.trace(whole, x)
    planes = abm.hyperplanes(network, x, "output", "RM2", (slice(None), 0, 0), dtype=torch.float64)
    assert abm.reconstruction_test(planes)["error"] <= 1e-12
