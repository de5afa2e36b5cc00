"""Copies and pickles of networks and hyperplanes, and models that hold more than dense tensors."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import Net, make
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine.operators import operator
from adjointbackmap.engine.pattern import record_pattern

X = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def conv(function, **parts):
    """A network ``function(net, x)`` with one convolution, in float64."""
    torch.manual_seed(0)
    return Net(function, conv=nn.Conv2d(2, 3, 3), **parts).double().eval()


@pytest.fixture(scope="module")
def plain():
    """A network whose model can be pickled, and images."""
    model, x = make("plain-conv-chain")
    return abm.trace(model, x, until="2"), x


def through_a_file(what):
    """As ``torch.save`` and ``torch.load`` give it back."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda what: pickle.loads(pickle.dumps(what)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_are_the_same(plain, way):
    """A copied network, pattern, operator or bias gives the same numbers and has its own model."""
    network, x = plain
    planes = abm.hyperplanes(network, x, "2", "RM2")
    what = [
        network,
        planes,
        record_pattern(network, x, 1.0),
        operator(network, x, "2"),
        network.biases,
    ]
    again, other, pattern, linear, biases = WAYS[way](what)
    assert again.layers == network.layers
    assert (again.until, again.output, again.weights_hash()) == ("2", None, network.weights_hash())
    assert again.model is not network.model
    assert other.network is again
    for part in ("image", "bias", "value"):
        assert torch.equal(getattr(other, part), getattr(planes, part))
    assert torch.equal(other.reconstruct(), planes.reconstruct())
    assert torch.equal(abm.hyperplanes(again, x, "2", "RM2").image, planes.image)
    assert pattern.network is again
    assert abm.dense_test(linear, x)["error"] < 1e-12
    assert torch.equal(biases.vector, network.biases.vector)


def test_a_changed_model_is_not_copied(plain):
    """The copy would be another network."""
    model, x = make("plain-conv-chain")
    network = abm.trace(model, x)
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(
        RuntimeError, match=r"must be as it was traced. Changed since: 0.bias: trace it again"
    ):
        pickle.dumps(network)


def test_a_store_is_copied(plain, tmp_path):
    """It is its folder."""
    network, x = plain
    stored = abm.save(tmp_path / "planes", network, x, "2", "RM2")
    value = stored.value
    assert torch.equal(pickle.loads(pickle.dumps(stored)).value, value)
    assert torch.equal(copy.deepcopy(stored).value, value)


# what a model may hold


SPARSE = {
    "coo": (lambda eye: eye.to_sparse(), "sparse_coo"),
    "csr": (lambda eye: eye.to_sparse_csr(), "sparse_csr"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_buffers_are_refused(kind):
    """By name, with what to do."""
    made, layout = SPARSE[kind]
    model = conv(lambda net, x: net.conv(x), table=made(torch.eye(3, dtype=torch.float64)))
    with pytest.raises(
        TypeError, match=rf"must be dense. Got table \({layout}\): register them with .to_dense\(\)"
    ):
        abm.trace(model, X)


class Stateful(nn.Module):
    """A module whose state_dict has more than tensors."""

    def __init__(self, shift):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.shift = shift

    def forward(self, x):
        return F.relu(self.conv(x) + self.shift)

    def get_extra_state(self):
        return {"shift": self.shift, "history": [1, 2]}

    def set_extra_state(self, state):
        self.shift = state["shift"]


def test_extra_state_belongs_to_the_weights(tmp_path):
    """It is hashed: a store of the one is none of the other."""
    torch.manual_seed(0)
    networks = [abm.trace(Stateful(shift).double().eval(), X) for shift in (0.25, 0.5)]
    networks[1].model.conv.load_state_dict(networks[0].model.conv.state_dict())
    networks[1] = abm.trace(networks[1].model, X)
    assert networks[0].weights_hash() == networks[0].weights_hash()
    assert networks[0].weights_hash() != networks[1].weights_hash()
    stored = abm.save(tmp_path / "planes", networks[0], X, "output", "RM2")
    assert stored.relative_error().abs().max() < 1e-12
    with pytest.raises(ValueError, match="of other weights sha256"):
        abm.save(tmp_path / "planes", networks[1], X, "output", "RM2")


# what a forward may compute with


def casting(net, x):
    """A part in another precision."""
    with torch.autocast("cpu", torch.bfloat16):
        return net.conv(x)


def test_autocast_is_refused():
    """What it rounds, the hyperplanes would not."""
    with pytest.raises(
        ValueError,
        match=r"own precision. Got torch.autocast to torch.bfloat16 in its forward: leave it out",
    ):
        abm.trace(conv(casting), X)


def test_autocast_of_another_device_does_nothing():
    """It is off where the model computes."""
    network = abm.trace(conv(autocast_elsewhere), X)
    assert abm.hyperplanes(network, X, "conv").relative_error().abs().max() < 1e-12


def autocast_elsewhere(net, x):
    """A part that another device would cast."""
    with torch.autocast("xpu", enabled=False), torch.autocast("cpu", enabled=False):
        return F.relu(net.conv(x))


def within_each_other(net, x):
    """Parts that torch.export keeps apart, one within another, with a module in each."""
    with torch.no_grad():
        x = F.relu(net.conv(x))
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = net.second(x)
        return F.relu(net.second(y - 0.25)) + F.conv2d(x, net.kernel)


def test_parts_without_gradients_are_taken():
    """The function is the same, whatever PyTorch differentiates; layers keep their modules."""
    torch.manual_seed(0)
    parts = {"second": nn.Conv2d(3, 3, 1), "kernel": torch.randn(3, 3, 1, 1)}
    network = abm.trace(conv(within_each_other, **parts), X)
    assert {"conv", "second", "second:1", "conv2d"} <= set(network.layers)
    assert all(check.share == 1 for check in abm.verify(network, X).values())
    assert max(abm.audit(network, X).values()) < 1e-12


COUNTS = {
    "divided": lambda net, x: net.conv(x) / x.shape[0],
    "added": lambda net, x: net.conv(x) + 0.5 * x.shape[0],
    "a power": lambda net, x: net.conv(x) * 2 ** x.shape[0],
    "filled": lambda net, x: net.conv(x) * torch.full((1,), x.shape[0], dtype=x.dtype),
    "a tensor": lambda net, x: net.conv(x) * torch.ones(1, dtype=x.dtype).fill_(x.shape[0]),
    "places": lambda net, x: net.conv(x) + torch.arange(x.shape[0]).view(-1, 1, 1, 1),
    "clamped": lambda net, x: net.conv(x).clamp(max=x.shape[0]),
    "compared": lambda net, x: torch.where(net.conv(x) > x.shape[0] - 2, 1.0, 0.0) * net.conv(x),
}


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_the_batch_are_refused(name):
    """A hyperplane is that of one image, whatever others it comes with."""
    with pytest.raises(
        ValueError, match=r"its numbers depend on how many images there are: write a number"
    ):
        abm.trace(conv(COUNTS[name]), X)


SHAPES = {
    "view": lambda net, x: F.relu(net.conv(x).view(x.shape[0], 3, 9)).view(x.shape[0], -1),
    "expand": lambda net, x: net.conv(x) + net.offset.expand(x.shape[0], 3, 1, 1),
    "zeros": lambda net, x: torch.cat(
        [net.conv(x), torch.zeros(x.shape[0], 1, 3, 3, dtype=x.dtype)], 1
    ),
    "ones": lambda net, x: net.conv(x) * torch.full((x.shape[0], 1, 1, 1), 0.5, dtype=x.dtype),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_batch_are_taken(name):
    """Extents may depend on how many images there are."""
    network = abm.trace(conv(SHAPES[name], offset=torch.ones(3, 1, 1)), X)
    assert all(check.share == 1 for check in abm.verify(network, X).values())


def test_maps_of_six_dimensions_are_labelled(tmp_path):
    """Their axes have numbers, in memory and in a store."""
    model, x = make("maps-of-six-dimensions")
    planes = abm.hyperplanes(abm.trace(model, x), x, "output", "RM2")
    names = ("n", "out_axis_0", "out_axis_1", "out_axis_2", "out_axis_3", "out_channel")
    assert planes.to_xarray()["value"].dims == names
    stored = abm.save(tmp_path / "planes", planes.network, x, "output", "RM2")
    assert stored.to_xarray()["value"].dims == names
    assert stored.relative_error().abs().max() < 1e-12


def test_images_of_six_dimensions_are_labelled(tmp_path):
    """The same for the axes of the input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).double().eval()
    x = torch.randn(1, 1, 2, 2, 2, 2, dtype=torch.float64)
    planes = abm.hyperplanes(abm.trace(model, x), x, "2", "RM0")
    names = ("n", "out_feature", "channel", "axis_0", "axis_1", "axis_2", "axis_3")
    assert planes.to_xarray()["image"].dims == names
    stored = abm.save(tmp_path / "planes", planes.network, x, "2", "RM0")
    assert stored.to_xarray()["image"].dims == names
    assert torch.equal(stored.planes(planes.network).image, planes.image)


# what cannot be pickled


def _local():
    class Local(nn.Module):
        def forward(self, x):
            return 2 * x

    return nn.Sequential(Local())


def _hooked():
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def _held():
    model = nn.Sequential(nn.ReLU())
    model[0].own = lambda x: x
    return model


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (_local, r"the class _local\.<locals>\.Local of 0"),
        (_hooked, r"the hook _hooked\.<locals>\.<lambda> of 0"),
        (_held, r"the attribute own of 0"),
    ],
)
def test_what_cannot_be_pickled_is_named(build, what):
    """In networks and hyperplanes, for pickle and torch.save; a copy is one yet."""
    model = build().eval()
    x = torch.rand(1, 1, 2, 2)
    network = abm.trace(model, x)
    planes = abm.hyperplanes(network, x, "output")
    match = rf"A model must be pickled with its network\. Got {what} \(.*\): define it at the top"
    for held in (network, planes):
        with pytest.raises(TypeError, match=match):
            pickle.dumps(held)
    for same in (copy.deepcopy(network), copy.copy(network)):
        assert torch.equal(abm.hyperplanes(same, x, "output").value, planes.value)


class _Scaled(nn.Module):
    gain = 2.0

    def forward(self, x):
        return self.gain * x


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_notices_a_changed_attribute(way):
    """As the network does that it was made of."""
    x = torch.rand(1, 1, 2, 2)
    same = way(abm.trace(_Scaled().eval(), x))
    same.model.gain = 3.0
    with pytest.raises(RuntimeError, match="Changed since: gain"):
        abm.hyperplanes(same, x, "output")
