"""Curved operations: frozen hyperplanes are the gradient of a twin with detached gates."""

import copy
import json

import curved_cases
import pytest
import torch
import torch.nn.functional as F
from cases import make
from curved_cases import CASES, Hold
from torch import nn

import adjointbackmap as abm
from adjointbackmap.cli import app
from adjointbackmap.explorer.panels import Place, network_answer
from adjointbackmap.explorer.session import Session
from adjointbackmap.planes.single import single
from adjointbackmap.rules import activations, multiplying, statistics
from adjointbackmap.sources import NetworkOptions

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def frozen_case():
    """A curved network with its images, its twin and its trace with frozen gates, made once."""
    seen = {}

    def get(name):
        if name not in seen:
            model, x, twin = curved_cases.make(name)
            seen[name] = model, x, twin, abm.trace(model, x, curved="frozen")
        return seen[name]

    return get


def gradients(model, x, twin):
    """Gradients of every unit of the twin: of the image, and of each parameter and entry."""
    hold = Hold()
    image = x.clone().requires_grad_()
    units = twin(model, image, hold)[0].flatten()
    named = {**dict(model.named_parameters()), **{f"#{n}": t for n, t in hold.entries.items()}}
    asked = [image, *named.values()]
    rows = [torch.autograd.grad(u, asked, retain_graph=True, allow_unused=True) for u in units]
    filled = [
        [torch.zeros_like(t) if part is None else part for part, t in zip(row, asked, strict=True)]
        for row in rows
    ]
    stacked = [torch.stack(parts) for parts in zip(*filled, strict=True)]
    return stacked[0][:, 0], dict(zip(named, stacked[1:], strict=True))


def largest_difference(network, model, x, twin):
    """Largest error of a hyperplane against the twin's gradient, and of the reconstruction."""
    image, parts = gradients(model, x, twin)
    operator = abm.operator(network, x[:1], "output")
    ours, bias = (
        part[0].flatten(0, -1 - n)
        for part, n in zip(operator.dense(), (x.dim() - 1, 1), strict=True)
    )
    errors = [float((ours - image).abs().max() / image.abs().max())]
    entries = {name: part for name, part in parts.items() if name.startswith("#")}
    for part in network.biases.values():
        theirs = parts.get(part.parameter)
        if theirs is not None:
            found = bias[:, part.slice].reshape(theirs.shape)
            errors.append(float((found - theirs).abs().max() / image.abs().max()))
    units = twin(model, x, Hold(False))[0].flatten()
    terms = [ours * x[0], bias * network.biases.vector]
    sums = sum(t.flatten(1).sum(1) for t in terms)
    sizes = sum(t.abs().flatten(1).sum(1) for t in terms)
    errors.append(float(((sums - units).abs() / sizes).detach().max()))
    named = [p for p in network.biases.values() if p.parameter is None and p.name.endswith("f(0)")]
    for part, (name, theirs) in zip(named, f_at_zero(entries), strict=False):
        assert float(part.value) == pytest.approx(float(FUNCTIONS[name]), rel=1e-15)
        found = bias[:, part.slice.start]
        errors.append(float((found - theirs).abs().max()))
    return max(errors)


FUNCTIONS = {name: at_zero for name, (_, at_zero) in curved_cases.FUNCTIONS.items()}


def f_at_zero(entries):
    """The twin's entries f(0), in the order of its functions."""
    return [
        (n, entries[f"#{n}"]) for n, at_zero in FUNCTIONS.items() if at_zero and f"#{n}" in entries
    ]


@pytest.mark.parametrize("name", CASES)
def test_frozen_hyperplanes_are_the_gradient_of_the_twin(frozen_case, name):
    """H_I and H_b are autograd's with detached gates, and every unit is reconstructed."""
    model, x, twin, network = frozen_case(name)
    with torch.no_grad():
        torch.testing.assert_close(twin(model, x, Hold(False)), model(x), rtol=1e-12, atol=1e-12)
    assert largest_difference(network, model, x, twin) <= TOLERANCE
    assert network.curved
    assert not network.is_derivative
    for layer in network.layers:
        abm.dot_test(abm.operator(network, x, layer))
    assert max(check.scaled for check in abm.verify(network, x).values()) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_tangent_hyperplanes_are_the_derivative(name):
    """With ``"tangent"`` the matrix is autograd's Jacobian, and every unit is reconstructed."""
    model, x, _ = curved_cases.make(name, images=1)
    network = abm.trace(model, x, curved="tangent")
    assert network.curved
    assert network.is_derivative
    operator = abm.operator(network, x, "output")
    abm.dot_test(operator)
    jacobian = torch.func.jacrev(lambda t: model(t[None])[0])(x[0])
    difference = (operator.dense()[0][0] - jacobian).abs().max() / jacobian.abs().max()
    assert float(difference.detach()) <= TOLERANCE
    assert max(check.scaled for check in abm.verify(network, x).values()) <= TOLERANCE


def other_factor(builder, first, second):
    which = RIGHT["factor"](builder, first, second)
    return None if which is None else 1 - which


def no_constant(self, function, rest=None, infinite=False):
    RIGHT["quotient"](self, function, rest, infinite)
    self.at_zero = 0.0


def no_eps(builder, x, dims, eps, centres=True):
    return RIGHT["deviation"](builder, x, dims, 0.0, centres)


RIGHT = {
    "factor": multiplying.frozen_factor,
    "quotient": activations.Quotient.__init__,
    "deviation": statistics.over_deviation,
}
FAULTS = {
    "the other factor": (multiplying, "frozen_factor", other_factor, "squeeze-and-excitation"),
    "half for gate": (multiplying, "frozen_factor", lambda *_: None, "gated-linear-units"),
    "no eps": (statistics, "over_deviation", no_eps, "norms-of-every-kind"),
    "no f(0)": (activations.Quotient, "__init__", no_constant, "functions-of-one-number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(monkeypatch, fault):
    """Each fault makes hyperplanes that are not the twin's gradient."""
    place, name, wrong, case = FAULTS[fault]
    model, x, twin = curved_cases.make(case)
    monkeypatch.setattr(place, name, wrong)
    network = abm.trace(model, x, curved="frozen", audit=False)
    assert largest_difference(network, model, x, twin) > 1e-4


FROZEN = {
    "squeeze-and-excitation": ["the second factor"],
    "gated-linear-units": ["the first factor", "the second factor", "the second factor"],
    "global-response-norm": ["the second factor"],
    "written-out-gelu": ["the second factor"],
    "highway-layer": ["the first factor", "the first factor"],
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_factor_is_told(frozen_case, name):
    """``network.curved`` names the gate of each product."""
    calls = frozen_case(name)[3].curved
    products = [call.frozen for call in calls if call.operation in ("mul", "glu")]
    assert products == FROZEN[name]


def test_products_half_freezes_each_factor_in_turn():
    """``products="half"`` takes no gate by nature, and another hyperplane."""
    model, x, _ = curved_cases.make("squeeze-and-excitation")
    half = abm.trace(model, x, curved="frozen", products="half")
    assert [c.frozen for c in half.curved if c.operation == "mul"] == [multiplying.BOTH_FROZEN]
    gate = abm.trace(model, x, curved="frozen")
    ours, other = (abm.operator(n, x, "output").dense()[0] for n in (half, gate))
    assert float((ours - other).abs().max()) > 1e-3


PIECEWISE = ["residual-with-zero-padded-channels", "saturated-on-both-sides"]


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_affine_networks_are_the_same_in_every_reading(name):
    """Hyperplanes are bitwise equal, and no call is curved."""
    model, x = make(name)
    planes = []
    for curved in ("refuse", "frozen", "tangent"):
        network = abm.trace(model, x, curved=curved)
        assert network.curved == ()
        assert network.is_derivative
        layer = network.layers["output"]
        planes.append(abm.hyperplanes(network, x, "output", layer.modes[-1], scale=1 / 8))
    for other in planes[1:]:
        assert torch.equal(other.image, planes[0].image)
        assert torch.equal(other.bias, planes[0].bias)


def test_gates_near_zero_have_no_cancellation():
    """At tiny u, the quotient of sigmoid is the derivative, a quarter, to rounding."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[0].bias.zero_()
    x = torch.tensor([[1e-9, -1e-12, 0.0]], dtype=torch.float64)
    network = abm.trace(model, x, curved="frozen")
    diagonal = abm.operator(network, x, "output").dense()[0][0].diagonal()
    torch.testing.assert_close(
        diagonal, torch.full((3,), 0.25, dtype=torch.float64), rtol=1e-15, atol=0
    )


def own_softmax(x):
    return torch.softmax(x, -1)


def written_softmax(x):
    shares = x.exp()
    return shares / shares.sum(-1, keepdim=True)


REFUSED = {
    "softmax": (own_softmax, "softmax .*it is a value of its own.*until="),
    "log-softmax": (lambda x: F.log_softmax(x, -1), 'log_softmax .*it has no gate.*"tangent"'),
    "softmax that is written out": (written_softmax, "div .*it is a value of its own"),
    "product of a softmax": (lambda x: x + 2 * own_softmax(x), "value of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_softmax_as_a_value_is_refused(name):
    """Frozen, a softmax is a gate alone; as a tangent it is a value like others."""
    function, words = REFUSED[name]
    model = curved_cases.Net(lambda net, x: function(net.first(x)), first=nn.Linear(3, 4))
    model, x = model.double().eval(), torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(abm.UnsupportedOperation, match=words):
        abm.trace(model, x, curved="frozen")
    assert abm.trace(model, x, curved="tangent").is_derivative


def test_routing_needs_no_rule():
    """What reaches the output through gates alone may be any operation."""

    def forward(net, x):
        u = net.first(x)
        best = torch.softmax(net.router(u), -1).topk(2, -1).values
        return net.last(u) * best.sum(-1, keepdim=True)

    parts = {"first": nn.Linear(3, 4), "router": nn.Linear(4, 4), "last": nn.Linear(4, 2)}
    model = curved_cases.Net(forward, **parts).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    network = abm.trace(model, x, curved="frozen")
    assert [call.frozen for call in network.curved] == ["the second factor"]
    assert max(check.scaled for check in abm.verify(network, x).values()) <= TOLERANCE


def test_wrong_readings_are_refused():
    """Each argument must be one of its choices; k must be 1; values must be finite."""
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU()).double().eval()
    x = torch.randn(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="curved must be one of 'refuse', 'frozen', 'tangent'"):
        abm.trace(model, x, curved="thawed")
    with pytest.raises(ValueError, match="products must be one of 'gate', 'half'"):
        abm.trace(model, x, products="both")
    network = abm.trace(model, x, curved="frozen")
    with pytest.raises(ValueError, match="scale must be 1 for a network with curved operations"):
        abm.hyperplanes(network, x, "output", "RM0", scale=1 / 8)
    log = curved_cases.Net(lambda net, x: x.log())
    with pytest.raises(ValueError, match=r"must be finite. Got log of -1"):
        abm.trace(log.eval(), -torch.ones(1, 2, dtype=torch.float64), curved="frozen")


REGIONS = {
    "kink_distances": lambda network, x: abm.kink_distances(network, x),
    "region_line": lambda network, x: abm.region_line(network, x, -x),
    "region_map": lambda network, x: abm.region_map(network, x, x, x.flip(0), budget=8),
    "A decision boundary": lambda network, x: abm.boundary(network, x, 0, 1),
    "region_walk": lambda network, x: abm.region_walk(network, x),
}


@pytest.mark.parametrize("name", REGIONS)
def test_what_needs_linear_regions_refuses_curved_networks(name):
    """One sentence says so."""
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).double().eval()
    x = torch.randn(3, dtype=torch.float64)
    network = abm.trace(model, x[None], curved="frozen")
    words = f"{name} needs a piecewise-affine network.*1 curved calls, first gelu at '1'"
    with pytest.raises(ValueError, match=words):
        REGIONS[name](network, x)


def test_pictures_and_angles_say_that_gates_are_frozen():
    """The note is in every summary; the angle is zero for the derivative alone."""
    model, x, _ = curved_cases.make("convolutions-with-gelu-and-silu", images=1)
    note = "frozen gates: not the derivative"
    planes = {}
    for curved in ("frozen", "tangent"):
        network = abm.trace(model, x, curved=curved)
        planes[curved] = abm.hyperplanes(network, x, "output", units=(0, 0, 0))
        abm.dense_test(abm.operator(network, x, "output"), x)
        texts = (repr(network), repr(planes[curved]), repr(planes[curved].receipt()))
        assert [note in text for text in texts] == [curved == "frozen"] * 3
        said = (abm.operator(network, x, "output"), single(planes[curved]))
        assert [note in repr(each) for each in said] == [curved == "frozen"] * 2
        captions = (planes[curved].plot().caption, planes[curved].receipt().plot().caption)
        assert [note in c.lower() for c in captions] == [curved == "frozen"] * 2
    assert float(abm.angle_to_derivative(planes["tangent"])) < 1e-5
    jacobian = torch.func.jacrev(lambda t: model(t)[0, 0, 0, 0])(x)
    cosine = F.cosine_similarity(jacobian.flatten(), planes["frozen"].image.flatten(), 0)
    angle = float(abm.angle_to_derivative(planes["frozen"]))
    assert angle == pytest.approx(float(cosine.detach().acos().rad2deg()), rel=1e-9)
    assert angle > 1


class CastingNorm(nn.RMSNorm):
    """An RMS norm that casts to float32, as language models do."""

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def test_widening_casts_are_computed_in_float64():
    """A model in float32 whose norms cast to float32 is exact in float64, as is its value."""
    model = nn.Sequential(nn.Linear(4, 5), CastingNorm(5), nn.Linear(5, 3)).eval()
    x = torch.randn(2, 6, 4)
    network = abm.trace(model, x, curved="frozen")
    planes = abm.hyperplanes(network, x, "output", dtype=torch.float64)
    assert abm.reconstruction_test(planes, tolerance=1e-15)["error"] <= 1e-15
    double = copy.deepcopy(nn.Sequential(model[0], nn.RMSNorm(5, 1e-6), model[2])).double()
    expected = double(x.double()).mT.detach()  # units are the features, then the positions
    torch.testing.assert_close(planes.value, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("curved", ["frozen", "tangent"])
def test_infinite_inputs_of_curved_functions_are_constants(curved):
    """What a mask makes infinite has gate zero; the function's limit is a unit entry's part."""

    def forward(net, x):
        u = net.first(x)
        hidden = u.masked_fill(u < 0, -torch.inf)
        return torch.cat([torch.sigmoid(hidden), hidden.exp(), 2 + torch.tanh(hidden)], -1)

    model = curved_cases.Net(forward, first=nn.Linear(3, 4)).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert bool((model(x) == 1).any())  # 2 + tanh(-inf)
    network = abm.trace(model, x, curved=curved)
    assert max(check.scaled for check in abm.verify(network, x).values()) <= TOLERANCE
    if curved == "tangent":
        abm.dense_test(abm.operator(network, x, "output"), x)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)], ids=["group", "map"])
def test_tangents_of_norms_of_channels_last(norm):
    """In float32, convolutions give maps with the channels last."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), norm, nn.Conv2d(4, 3, 3)).eval()
    x = torch.randn(2, 2, 8, 8)
    network = abm.trace(model, x, curved="tangent")
    abm.dense_test(abm.operator(network, x, "output"), x, tolerance=1e-5)


def test_copy_keeps_the_reading():
    """A copied network has frozen gates too."""
    model, x, _ = curved_cases.make("highway-layer", images=1)
    network = copy.deepcopy(abm.trace(model, x, curved="frozen"))
    assert network.note
    assert not network.is_derivative


def test_store_keeps_the_reading(tmp_path):
    """A store of frozen hyperplanes says so, and refuses a network with another reading."""
    model, x, _ = curved_cases.make("highway-layer", images=1)
    frozen, tangent = (abm.trace(model, x, curved=curved) for curved in ("frozen", "tangent"))
    stored = abm.save(tmp_path / "store", frozen, x, layer="output", mode="RM0")
    assert "frozen gates: not the derivative" in repr(stored)
    planes = abm.hyperplanes(frozen, x, "output")
    assert torch.equal(stored.planes(network=frozen).image, planes.image)
    with pytest.raises(ValueError, match="must be traced with the curved= and products= of the"):
        stored.planes(network=tangent)


def test_pages_and_maps_of_commands_say_that_gates_are_frozen(tmp_path, monkeypatch, capsys):
    """So do the picture and the record of ``map``, and the page of ``explore --export``."""
    (tmp_path / "with_gelu.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 2, 3, 2), "
        "nn.GELU(), nn.Flatten(), nn.Linear(18, 2)).eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = ["--model", "with_gelu:build", "--shape", "3", "8", "8", "--curved", "frozen"]
    note = "frozen gates: not the derivative"
    words = ["map", *network, "--layer", "0", "--mode", "RM2", "--out", str(tmp_path / "m")]
    captions = []
    monkeypatch.setattr("adjointbackmap.plots.save", lambda drawing, _: captions.append(drawing))
    app(words, result_action="return_value")
    assert note in capsys.readouterr().out
    assert note in captions[0].caption.lower()
    assert json.loads((tmp_path / "m.json").read_text())["gates"] == note
    session = Session(NetworkOptions(model="with_gelu:build", shape=(3, 8, 8), curved="frozen"))
    answer = network_answer(session, Place(session.first_network, session.first_image))
    assert (answer["curved"], answer["note"]) == ("frozen", note)


def test_command_takes_curved_networks(tmp_path, monkeypatch, capsys):
    """``--curved`` lists the layers of a network that is refused without it."""
    layers = "nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.BatchNorm1d(2), nn.GELU()).eval()"
    source = f"from torch import nn\n\ndef build():\n    return {layers}\n"
    (tmp_path / "curved_network.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["layers", "--model", "curved_network:build", "--shape", "3", "2", "2"]
    with pytest.raises(abm.UnsupportedOperation, match="gelu at 3"):
        app(words, result_action="return_value")
    for fold in ([], ["--fold"]):
        app([*words, "--curved", "frozen", *fold], result_action="return_value")
        shown = capsys.readouterr().out
        assert "GELU" in shown
        assert ("(folded)" in shown) == bool(fold)
