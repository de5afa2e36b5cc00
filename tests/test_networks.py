"""The five networks of the study: exact in float64, with the dissertation's sizes."""

from dataclasses import dataclass
from math import prod

import pytest
import torch
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap.planes.units import unit_dims

NETWORKS = ("vgg7-nobias", "fixup-resnet20-nobias", "vgg7", "resnet20", "fixup-resnet20")
BIASES = {
    "vgg7-nobias": 0,
    "fixup-resnet20-nobias": 0,
    "vgg7": 384,
    "resnet20": 1184,
    "fixup-resnet20": 37,
}
UNITS = 64


@dataclass(frozen=True)
class Study:
    """A network of the study with random weights, traced in float64, and one real image."""

    name: str
    model: nn.Module
    x: Tensor
    network: abm.Network


def randomised(name: str, classes: int = 10) -> nn.Module:
    """A network in float64 and eval mode with all parameters random: none hides at 0 or 1."""
    generator = torch.Generator().manual_seed(NETWORKS.index(name))
    model = abm.models.build(name, classes).double().eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            spread = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.3
            positive = (
                "running_var" in key
                or key.startswith("m")
                or (key.startswith("bn") and key.endswith("weight"))
            )
            value.copy_(0.5 + drawn.abs() if positive else spread * drawn)
    return model


@pytest.fixture(scope="session", params=NETWORKS)
def study(request):
    """Each network of the study, traced once."""
    model = randomised(request.param)
    pixels = abm.data.sample().unit_interval()[7].double()
    x = abm.models.preprocessing(request.param)(pixels)[None]
    return Study(request.param, model, x, abm.trace(model, x))


def seeded_units(layer, mode):
    """Some units of a layer, always the same: an array for each unit dimension."""
    dims = unit_dims(layer, mode)
    count = prod(dims.values())
    flat = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:UNITS]
    return tuple(place.numpy() for place in torch.unravel_index(flat, tuple(dims.values())))


def kernel_layers(network):
    """The convolutions and the fully connected layer."""
    return [layer for layer in network.layers.values() if layer.kernel]


def test_bias_vector_has_the_length_of_the_tables(study):
    """M is 0, 0, 384, 1,184 and 37."""
    assert len(study.network.biases) == BIASES[study.name]


def test_seeded_units_of_every_layer_are_exact(study):
    """abs(error) <= 1e-12 (sum abs(x h) + sum abs(b h_b)), and no part is all zero."""
    first = kernel_layers(study.network)[0].name
    for layer in kernel_layers(study.network):
        mode = "RM0" if "RM0" in layer.modes else "RM2"
        planes = abm.hyperplanes(
            study.network,
            study.x,
            layer.name,
            mode,
            seeded_units(layer, mode),
            own_bias=False,
            scale=1 / 8,
        )
        error = (planes.reconstruct() - planes.value).abs()
        assert error.numel() == min(UNITS, prod(unit_dims(layer, mode).values()))
        assert (error <= 1e-12 * planes.magnitude()).all(), layer.name
        assert planes.image.any(), layer.name
        assert planes.value.any(), layer.name
        assert bool(planes.bias.any()) == (BIASES[study.name] > 0 and layer.name != first), (
            layer.name
        )


def test_pattern_at_an_eighth_is_bitwise_the_one_at_one(study):
    """The study's k = 1/8 changes no gate."""
    one, eighth = (abm.record_pattern(study.network, study.x, scale=k) for k in (1.0, 1 / 8))
    assert eighth.equal(one)
    assert any((gate != gate.flatten()[0]).any() for gates in one.gates.values() for gate in gates)


def test_any_scale_gives_the_same_values(study):
    """k = 0.3 gives equal values to rounding."""
    one, other = (abm.hyperplanes(study.network, study.x, "fc", "RM0", scale=k) for k in (1.0, 0.3))
    torch.testing.assert_close(other.reconstruct(), one.value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.image, one.image, rtol=1e-10, atol=1e-10)


def test_output_of_the_network_is_the_value(study):
    """RM0 of fc is what the untouched network gives."""
    planes = abm.hyperplanes(study.network, study.x, "fc", "RM0")
    assert torch.equal(planes.value, study.model(study.x).detach())


# Tables A.3, A.4, B.2, B.3: in-channels, out-channels, rows (= columns) of each convolution
VGG7 = [(32, 32, 32), (32, 64, 16), (64, 64, 16), (64, 96, 8), (96, 96, 8)]
RESNET20 = [*[(32, 32, 32)] * 6, (32, 64, 16), *[(64, 64, 16)] * 5, (64, 96, 8), *[(96, 96, 8)] * 5]


def test_modes_have_the_dimensions_of_the_tables(study):
    """The units of RM4, RM3, RM2 and RM1 for every convolution; RM0 has 10 outputs."""
    table = VGG7 if "vgg7" in study.name else RESNET20
    for number, (ins, outs, rows) in enumerate(table, start=1):
        layer = study.network.layers[f"conv{number}"]
        in_channels = study.network.kernel(layer).rule.in_channels
        found = [
            tuple(unit_dims(layer, mode, in_channels).values())
            for mode in ("RM4", "RM3", "RM2", "RM1")
        ]
        assert found == [(rows, rows, ins, outs), (ins, outs), (rows, rows, outs), (outs,)]
    assert f"conv{len(table) + 1}" not in study.network.layers
    assert unit_dims(study.network.layers["fc"], "RM0") == {"out_feature": 10}
    assert study.network.in_shape == (3, 32, 32)


def test_folded_network_gives_the_same(study):
    """Eq. 3.6: batch norms and multipliers go into the convolution; scalar biases stay scalar."""
    folded = abm.fold(study.model, study.x)
    torch.testing.assert_close(folded.model(study.x), study.model(study.x), rtol=1e-11, atol=1e-11)
    factors = {n for n, m in study.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    factors |= {n for n, _ in study.model.named_parameters() if n.startswith("m")}
    assert folded.merged.keys() == factors
    assert not folded.left
    assert len(abm.trace(folded.model, study.x).biases) == BIASES[study.name]


def test_all_classes_of_64_images_in_one_call():
    """RM0 for a batch of 64 real images at once, in the float32 of the shipped networks."""
    model = randomised("vgg7").float()
    x = abm.data.sample().unit_interval()[:64]
    planes = abm.hyperplanes(abm.trace(model, x[:1]), x, "fc", "RM0")
    assert planes.image.shape == (64, 10, 3, 32, 32)
    assert planes.bias.shape == (64, 10, 384)
    assert abm.reconstruction_test(planes)["error"] <= 1e-6
