"""Changes after a trace: a changed model is refused by name, and results own their numbers."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import Net
from torch import nn

import adjointbackmap as abm
from adjointbackmap.attacks import Attack, basic_iterative
from adjointbackmap.capture.fingerprints import fingerprint
from adjointbackmap.examples import examine


@dataclass(slots=True)
class Limits:
    low: float


class Settings(dict):
    """A dictionary that is none of Python's own."""


class Scaled(nn.Module):
    """Reads attributes of every kind, and writes some itself."""

    level = 0.5

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.factor = 2.0
        self.options = SimpleNamespace(slope=0.1, other={"shift": [1.0, math.nan]})
        self.limits = Limits(-5.0)
        self.settings = Settings(gain=1.0)
        self.table = torch.tensor([1.0, 2.0])
        self.name = "not read"
        self.calls = 0
        self.feature = None

    def squeeze(self, x):
        return (
            F.leaky_relu(x, self.options.slope).clamp(min=self.limits.low) * self.settings["gain"]
        )

    def forward(self, x):
        self.calls += 1
        self.feature = self.conv(x)
        y = self.squeeze(self.feature) * self.factor + self.options.other["shift"][0]
        return (y + self.table.view(2, 1, 1) - self.level).flatten(1)


def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(
            lambda net, x: net.scaled(net.act(x)), act=nn.LeakyReLU(0.2), scaled=Scaled()
        ).eval()


def image(seed=0):
    return torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))


def other_class(model):
    model.act = nn.ReLU().eval()


def other_number(model):
    model.act.negative_slope = 0.3


def number_of_ones_own(model):
    model.scaled.factor = 3.0


def integer_in_place_of_a_number(model):
    model.scaled.factor = 2


def number_in_an_object(model):
    model.scaled.options.slope = 0.4


def number_in_slots(model):
    model.scaled.limits.low = -1.0


def number_in_a_dictionary_of_ones_own(model):
    model.scaled.settings["gain"] = 1.5


def number_in_a_list(model):
    model.scaled.options.other["shift"][0] = 2.0


def number_of_the_class(model):
    model.scaled.level = 0.75


def plain_tensor(model):
    model.scaled.table.data[0] = 5.0


def method(model):
    model.scaled.squeeze = torch.relu


def added_hook(model):
    model.act.register_forward_hook(lambda module, inputs, output: output + 1)


def hook_before(model):
    model.scaled.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def hook_of_the_model(model):
    model.register_forward_hook(lambda module, inputs, output: -output)


def rows_that_change_places(model):
    kernel = model.scaled.conv.weight
    kernel.data.copy_(kernel.detach().flip(0))


CHANGES = {
    other_class: "class of act",
    other_number: r"act\.negative_slope",
    number_of_ones_own: r"scaled\.factor",
    integer_in_place_of_a_number: r"scaled\.factor",
    number_in_an_object: r"scaled\.options",
    number_in_slots: r"scaled\.limits",
    number_in_a_dictionary_of_ones_own: r"scaled\.settings",
    number_in_a_list: r"scaled\.options",
    number_of_the_class: r"scaled\.level",
    plain_tensor: r"scaled\.table",
    method: r"scaled\.squeeze",
    added_hook: "hooks of act",
    hook_before: "hooks of scaled",
    hook_of_the_model: "hooks of the model",
    rows_that_change_places: r"scaled\.conv\.weight",
}


ADAPTED = (other_class, other_number, added_hook, number_in_a_list)


@pytest.fixture(scope="module")
def traced():
    """A network that is changed and mended in every test."""
    return abm.trace(small(), image())


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_is_named(change):
    """Whatever the forward computes with is named in the message."""
    model = small()
    network = abm.trace(model, image(), audit=False)
    change(model)
    with pytest.raises(RuntimeError, match=f"Changed since: {CHANGES[change]}.*: trace it again"):
        abm.hyperplanes(network, image(), "output")


@pytest.mark.parametrize("size", [3, 1_001, 2_000, 2**17 + 2, 2**19], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_element_that_is_changed_through_data_is_found(size, dtype):
    """One bit, two elements or two halves; the version that PyTorch counts stays as it was."""
    model = nn.Linear(size, 1, bias=False).to(dtype)
    row = model.weight.data[0]
    kept = row.clone()
    half = size // 2
    seen = fingerprint(model, {})
    version = model.weight._version
    for at in {0, half, size - 1}:
        row.view(torch.uint8)[at * row.element_size()] ^= 1
        assert fingerprint(model, {}) != seen
        row.copy_(kept)
    row[[0, -1]] = row[[-1, 0]]
    assert fingerprint(model, {}) != seen
    row.copy_(torch.cat([kept[-half:], kept[half : size - half], kept[:half]]))
    assert fingerprint(model, {}) != seen
    row.copy_(kept)
    assert fingerprint(model, {}) == seen
    assert model.weight._version == version


@pytest.mark.parametrize("change", ADAPTED, ids=lambda change: change.__name__)
def test_adapter_traces_a_changed_model_again(change):
    """What it gives is the gradient and the value of the model as it is."""
    model = small()
    method = abm.captum.AdjointBackMap(model)
    method.attribute(image(), 3)
    change(model)
    ours, bias = method.attribute(image(), 3, return_bias=True)
    x = image().requires_grad_()
    value = model(x)[0, 3]
    torch.testing.assert_close(ours, torch.autograd.grad(value, x)[0])
    vector = method.network(image()).biases.vector
    torch.testing.assert_close((image() * ours).sum() + bias @ vector, value.detach()[None])


def test_what_the_forward_does_not_read_or_sets_itself_is_no_change(traced):
    """A name, a counter of calls, a kept feature, a gradient: the network goes on."""
    model = traced.model
    model(image(1)).sum().backward()
    model.scaled.name = "another"
    model.scaled.new = 3
    model.scaled.calls = -1
    assert abm.reconstruction_test(abm.hyperplanes(traced, image(), "output"))["error"] < 1e-6
    assert model.scaled.calls == -1, "it runs on a copy"


def test_model_is_looked_at_once_in_a_call(traced, monkeypatch):
    """However many passes and images."""
    import adjointbackmap.engine.network as home

    count = []
    own = home.fingerprint
    monkeypatch.setattr(home, "fingerprint", lambda *given: count.append(1) or own(*given))
    calls = {
        "planes": lambda: abm.hyperplanes(
            traced, image().expand(70, -1, -1, -1), "output", units=(0,)
        ),
        "operator": lambda: abm.operator(traced, image(), "output"),
        "audit": lambda: abm.audit(traced, image()),
        "verify": lambda: abm.verify(traced, image()),
        "adapter": lambda: method.attribute(image(), lambda out: out[:, 0] - out[:, 1]),
    }
    method = abm.captum.AdjointBackMap(traced.model)
    calls["adapter"]()  # the adapter traces in its first call
    count.clear()
    found = {}
    for name, call in calls.items():
        call()
        found[name] = len(count)
        count.clear()
    assert found == dict.fromkeys(calls, 1)


# results own what they hold


@pytest.fixture
def classifier():
    """A network in float64, its module and an image: nothing is converted on the way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)]
        model = nn.Sequential(*parts).double().eval()
    x = image().double()
    return model, x, abm.trace(model, x, audit=False)


def spoil(model, x):
    """An image and the biases of a model as an attack or a training step leaves them."""
    with torch.no_grad():
        x.add_(1)
        for parameter in model.parameters():
            parameter.add_(1)


RESULTS = {
    "planes": lambda planes: [
        planes.x,
        planes.reconstruct(),
        planes.magnitude(),
        planes.contributions().total(),
        planes.image,
    ],
    "blocks": lambda planes: [planes.x, planes.reconstruct(), planes.bias],
    "biases": lambda biases: [biases.vector, *(part.value for part in biases.values())],
    "boundary": lambda boundary: [
        boundary.x,
        boundary.weights,
        torch.tensor([boundary.value, boundary.distance("l2")]),
    ],
    "kinks": lambda kinks: [kinks.x, *kinks.distances.values()],
    "pattern": lambda pattern: [g for gates in pattern.gates.values() for g in gates],
    "analysis": lambda found: [
        found.kinks["l2"].plane.x,
        found.boundaries["l2"][0].plane.x,
        found.kinks["l2"].before.outputs,
    ],
    "adapter": lambda parts: list(parts),
    "attacked": lambda found: [found.pixels, found.adversarial, found.noise, found.l2],
    "examined": lambda found: [found.pixels, found.adversarial],
}


def results(model, x, network):
    pixels = x.clamp(0, 1)
    attack = Attack(0.1, iterations=2, until_success=False)
    made = {
        "planes": abm.hyperplanes(network, x, "3"),
        "blocks": next(abm.iter_hyperplanes(network, x, "0", "RM2")),
        "biases": network.biases_in(torch.float64),
        "boundary": abm.boundary(network, x, 0, 1),
        "kinks": abm.kink_distances(network, x),
        "pattern": abm.record_pattern(network, x),
        "analysis": abm.analyse(network, x),
        "adapter": abm.captum.AdjointBackMap(model).attribute(x, 1, return_bias=True),
        "attacked": basic_iterative(model, pixels, torch.tensor([0]), attack),
        "examined": examine(model, pixels, x),
    }
    return made, pixels


def test_results_own_what_they_hold(classifier):
    """They are the same after the image and the biases were changed in place."""
    model, x, _ = classifier
    made, pixels = results(*classifier)
    before = {name: [t.clone() for t in RESULTS[name](result)] for name, result in made.items()}
    spoil(model, x)
    pixels.mul_(0)
    for name, result in made.items():
        for now, then in zip(RESULTS[name](result), before[name], strict=True):
            assert torch.equal(now, then), name


def test_what_computes_with_a_changed_model_says_so(classifier):
    """Blocks, operators, kinks, another precision: what is not yet computed is refused."""
    model, x, network = classifier
    blocks = abm.iter_hyperplanes(network, x, "0", "RM2")
    operator = abm.operator(network, x, "3")
    kinks = abm.kink_distances(network, x)
    spoil(model, x)
    later = [
        lambda: next(blocks),
        lambda: operator.adjoint(torch.ones(1, 3).double()),
        lambda: operator.as_scipy().matvec(torch.ones(network.biases.vector.numel() + 25).numpy()),
        lambda: kinks.nearest("l2"),
        lambda: network.biases_in(torch.float32),
        lambda: abm.dot_test(operator),
        lambda: abm.dense_test(operator, x),
    ]
    for compute in later:
        with pytest.raises(RuntimeError, match="trace it again"):
            compute()


def test_blocks_are_those_of_the_image_at_the_call(classifier):
    """An image that is changed between two blocks changes none."""
    _, x, network = classifier
    whole = abm.hyperplanes(network, x, "0", "RM2")
    found = []
    for block in abm.iter_hyperplanes(network, x, "0", "RM2", memory=2500):
        found.append(block.reconstruct())
        x.add_(1)
    assert len(found) > 1
    torch.testing.assert_close(torch.cat(found, 1), whole.reconstruct(), rtol=1e-12, atol=1e-12)


def test_biases_may_be_written_to(classifier):
    """A value that the user changes is the user's alone."""
    _, x, network = classifier
    before = abm.hyperplanes(network, x, "3").reconstruct()
    for part in network.biases.values():
        part.value.add_(1)
    network.biases.vector.add_(1)
    assert torch.equal(abm.hyperplanes(network, x, "3").reconstruct(), before)


# variables outside of the model

GAIN = 2.0
SHIFT = torch.tensor(1.0)
STEPS = {"first": 1.0, "second": 3.0}
CALLS = 0


def shifted(x):
    """A function that a forward names, with variables of its own."""
    return x + STEPS["second"] * SHIFT


class Outside(nn.Module):
    """A forward whose numbers stand in the file, and that counts its calls there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)

    def forward(self, x):
        global CALLS
        CALLS += 1
        return shifted(self.conv(x)) * GAIN


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("GAIN", lambda patch: patch.setitem(globals(), "GAIN", 3.0)),
        ("SHIFT", lambda patch: patch.setitem(globals(), "SHIFT", torch.tensor(2.0))),
        ("STEPS", lambda patch: patch.setitem(STEPS, "second", 4.0)),
        ("shifted", lambda patch: patch.setitem(globals(), "shifted", F.relu)),
    ],
)
def test_a_changed_global_variable_is_found(monkeypatch, name, change):
    """Also of a function that the forward calls; what the forward itself changes is none."""
    x = torch.rand(1, 1, 4, 4)
    network = abm.trace(Outside().eval(), x)
    abm.reconstruction_test(abm.hyperplanes(network, x, "output"))
    with monkeypatch.context() as patch:
        change(patch)
        with pytest.raises(RuntimeError, match=rf"Changed since: .*\.{name}\b.*: trace it again"):
            abm.hyperplanes(network, x, "output")
    abm.hyperplanes(network, x, "output")


def test_a_changed_variable_around_the_class_is_found():
    """A class may be made in a function."""
    gain = torch.tensor(2.0)

    class Inside(nn.Module):
        def forward(self, x):
            return x * gain

    x = torch.rand(1, 1, 4, 4)
    network = abm.trace(Inside().eval(), x)
    gain.mul_(2)
    with pytest.raises(RuntimeError, match=r"Changed since: .*\.gain: trace it again"):
        abm.hyperplanes(network, x, "output")
