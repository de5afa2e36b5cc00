"""The arguments' one door: accepted values, refusals in one sentence, one check per call."""

import inspect
import json
import os
import subprocess
import sys
from fractions import Fraction
from textwrap import dedent

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Net, make
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine import observe as recording
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.pattern import check_scale
from adjointbackmap.planes import hyperplane, query
from adjointbackmap.planes.query import UNBOUNDED, Query, bytes_of
from adjointbackmap.planes.units import select

# its units are (4, 4, 4)
CHAIN = "plain-conv-chain"
CONV = "2"
BACK = slice(None, None, -1)


@pytest.fixture
def chain(traced_case):
    """A chain of three convolutions."""
    return traced_case(CHAIN)


def assert_same_planes(ours, theirs):
    """The same hyperplanes, bit for bit."""
    for part in ("image", "bias", "value"):
        torch.testing.assert_close(getattr(ours, part), getattr(theirs, part), rtol=0, atol=0)


# one door


def test_the_arguments_are_the_same_everywhere():
    """hyperplanes, iter_hyperplanes, save and Query.of share names and defaults of arguments."""
    known = inspect.signature(abm.hyperplanes).parameters
    for function, others in (
        (abm.iter_hyperplanes, []),
        (abm.save, ["path", "report"]),
        (Query.of, []),
    ):
        found = inspect.signature(function).parameters
        assert [name for name in found if name not in others] == list(known)
        for name in ("units", "own_bias", "scale", "dtype", "method", "memory"):
            assert found[name].default == known[name].default
    planned = inspect.signature(abm.plan).parameters
    assert list(planned) == ["network", "layer", "mode", "units", "own_bias", "method"]
    assert list(inspect.signature(Network.plan).parameters)[1:] == list(planned)[1:]


def counted(monkeypatch, owner, name):
    """A list that grows by one with every call of a function."""
    calls = []
    function = getattr(owner, name)

    def spy(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


CALLS = {
    "one-layer": (lambda n, x: abm.hyperplanes(n, x, CONV, "RM2"), 1),
    "windowed": (lambda n, x: abm.hyperplanes(n, x, CONV, "RM2", method="windowed"), 1),
    "several-layers": (lambda n, x: abm.hyperplanes(n, x, ["0", CONV, "4"]), 1),
    "plan": (lambda n, x: abm.plan(n, CONV, "RM2"), 0),
    "sparsity": (lambda n, x: abm.sparsity(n, x), 0),
    "audit": (lambda n, x: abm.audit(n, x), 1),
    "kinks": (lambda n, x: abm.kink_distances(n, x[:1]), 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_checks_the_model_once_and_runs_it_once(chain, monkeypatch, call):
    """The weights' fingerprint is taken once per call, for any number of images and layers."""
    function, runs = CALLS[call]
    checks = counted(monkeypatch, Network, "check_unchanged")
    recorded = counted(monkeypatch, recording, "record_call")
    function(chain.network, chain.x)
    assert len(checks) == 1
    assert len(recorded) == runs


def test_images_are_checked_once(chain, monkeypatch):
    """And the query is built once."""
    checks = counted(monkeypatch, query, "check_images")
    built = counted(monkeypatch, query, "select")
    abm.hyperplanes(chain.network, chain.x, CONV, "RM2", method="windowed")
    assert (len(checks), len(built)) == (1, 1)


def test_blocks_notice_a_model_that_changes_between_them():
    """Each block is a call of its own: weights that change after the first stop the second."""
    model, x = make(CHAIN)
    blocks = abm.iter_hyperplanes(abm.trace(model, x), x, CONV, "RM2", memory=10_000)
    next(blocks)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="must be as it was traced"):
        next(blocks)


def test_plan_is_a_function_and_a_method(chain):
    """Both give the same, also for the predicted unit, whichever it is."""
    for units in (None, (0, 1), (BACK, 0, 0)):
        assert abm.plan(chain.network, CONV, "RM2", units) == chain.network.plan(CONV, "RM2", units)
    flat = abm.trace(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.rand(1, 1, 2, 2))
    assert abm.plan(flat, "1", "RM0", "predicted").vectors == 1


# layers by their module


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_its_layer(traced_case, name):
    """Every module of every network: the layer that it gives, or a sentence with its calls."""
    network = traced_case(name).network
    calls = {}
    for layer in network.layers.values():
        if layer.module is not None:
            module = network.model.get_submodule(layer.module.partition(":")[0])
            calls.setdefault(id(module), (module, []))[1].append(layer.name)
    for module, names in calls.values():
        if module is not network.model and len(names) == 1:
            assert network.layer(module).name == names[0]
        elif module is not network.model:
            with pytest.raises(
                ValueError,
                match=r"module must be called once\. Got .* calls: give one of the names",
            ):
                network.layer(module)


def test_layers_are_taken_by_their_module_everywhere(chain, tmp_path):
    """As users of Captum write it: the same results as by name."""
    network = chain.network
    x = chain.x
    module = chain.model[2]
    named = abm.hyperplanes(network, x, CONV, "RM2")
    assert_same_planes(abm.hyperplanes(network, x, module, "RM2"), named)
    several = abm.hyperplanes(network, x, [module, "4"])
    assert list(several) == [CONV, "4"]
    assert_same_planes(several[CONV], named)
    assert_same_planes(next(abm.iter_hyperplanes(network, x, module, "RM2")), named)
    assert abm.save(tmp_path / "planes", network, x, module, "RM2").attributes["layer"] == CONV
    assert abm.operator(network, x, module).layer.name == CONV
    assert abm.plan(network, module, "RM2") == abm.plan(network, CONV, "RM2")
    assert (
        list(abm.verify(network, x[:1], [module]))
        == list(abm.verify(network, x[:1], module))
        == [CONV]
    )
    assert list(abm.sparsity(network, x[:1], module)) == [CONV]
    assert abm.trace(chain.model, x, until=module).until == CONV
    assert network.layer(chain.model).name == "output"


def test_one_name_of_several_letters_is_one_layer():
    """A single name where several may stand is that layer, not those that its letters name."""
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(11))).eval()
    network = abm.trace(model, torch.rand(1, 1, 2, 2))
    assert list(abm.verify(network, torch.rand(1, 1, 2, 2), "10")) == ["10"]
    assert list(abm.sparsity(network, torch.rand(1, 1, 2, 2), "10")) == ["10"]


def test_modules_that_give_no_layer_are_refused():
    """A module of another model, an unused one, and one that is called twice."""
    parts = {"conv": nn.Conv2d(1, 1, 3, padding=1), "unused": nn.Conv2d(1, 1, 1)}
    model = Net(lambda net, x: net.conv(F.relu(net.conv(x))), **parts).eval()
    network = abm.trace(model, torch.rand(1, 1, 4, 4))
    refused = {
        (
            r"module of the model, or a name\. Got another Conv2d: "
            r"take it from network\.model"
        ): nn.Conv2d(1, 1, 3),
        (
            r"one of conv, conv:1, output\. Got Conv2d 'unused', "
            r"which gives none of them: take a module"
        ): model.unused,
        (
            r"called once\. Got Conv2d with 2 calls: give one of "
            r"the names 'conv', 'conv:1'"
        ): model.conv,
    }
    for match, module in refused.items():
        with pytest.raises(ValueError, match=match):
            abm.hyperplanes(network, torch.rand(1, 4, 4), module)
        with pytest.raises(ValueError, match="module"):
            abm.trace(model, torch.rand(1, 1, 4, 4), until=module)


# units


BACKWARDS = [
    ("RM2", (BACK, BACK, BACK)),
    ("RM2", (slice(3, 0, -2), 1, BACK)),
    ("RM2", (slice(1, None), BACK)),
    ("RM4", (BACK, slice(2, 0, -1), BACK, BACK)),
]


@pytest.mark.parametrize(
    ("method", "mode", "units"),
    [
        *((m, *b) for m in ("adjoint", "basis", "coloured", "windowed") for b in BACKWARDS),
        *(("windowed-adjoint", *b) for b in BACKWARDS[:3]),
    ],
)
def test_slices_may_step_backwards(chain, method, mode, units):
    """As NumPy takes them, in every method; all units backwards are not all units."""
    ours = abm.hyperplanes(chain.network, chain.x, CONV, mode, units, method=method)
    whole = abm.hyperplanes(chain.network, chain.x, CONV, mode)
    for part in ("image", "bias", "value"):
        found = getattr(ours, part).numpy()
        expected = getattr(whole, part).numpy()
        np.testing.assert_allclose(found, expected[(slice(None), *units)], rtol=1e-12, atol=1e-12)
    abm.reconstruction_test(ours)


@pytest.mark.parametrize(("mode", "units"), [("RM1", BACK), ("RM3", (BACK, slice(None, 1, -1)))])
def test_summed_units_backwards(chain, mode, units):
    """The same where positions are summed."""
    ours = abm.hyperplanes(chain.network, chain.x, CONV, mode, units)
    whole = abm.hyperplanes(chain.network, chain.x, CONV, mode).value.numpy()
    key = (slice(None), *(units if isinstance(units, tuple) else (units,)))
    np.testing.assert_allclose(ours.value.numpy(), whole[key], rtol=1e-12, atol=1e-12)
    abm.reconstruction_test(ours)


def test_units_backwards_in_blocks_and_on_disk(chain, tmp_path):
    """A store of a selection that steps backwards holds the same."""
    units = (BACK, 0, BACK)
    whole = abm.hyperplanes(chain.network, chain.x, CONV, "RM2", units)
    blocks = list(abm.iter_hyperplanes(chain.network, chain.x, CONV, "RM2", units, memory=10_000))
    assert len(blocks) > 2
    stored = abm.save(
        tmp_path / "planes", chain.network, chain.x, CONV, "RM2", units, memory=10_000
    )
    torch.testing.assert_close(stored.value, whole.value)
    torch.testing.assert_close(stored.planes(chain.network).image, whole.image)


def test_units_of_one_number_are_saved(chain, tmp_path):
    """A selection whose numbers lie apart in memory has a checksum too."""
    stored = abm.save(tmp_path / "planes", chain.network, chain.x, "0", "RM3", (slice(1, None), -1))
    assert stored.shape == (2, 1)


# what is taken


def test_dtypes_are_taken_by_name(tmp_path):
    """ "float64" and "torch.float64" are torch.float64, wherever a dtype is taken."""
    model, x = make(CHAIN)
    model = model.float()
    x = x.float()
    network = abm.trace(model, x)
    expected = abm.hyperplanes(network, x, CONV, "RM1", dtype=torch.float64)
    for name in ("float64", "torch.float64", "double"):
        assert_same_planes(abm.hyperplanes(network, x, CONV, "RM1", dtype=name), expected)
    assert (
        next(abm.iter_hyperplanes(network, x, CONV, "RM1", dtype="float64")).value.dtype
        == torch.float64
    )
    assert (
        abm.save(tmp_path / "planes", network, x, CONV, "RM1", dtype="float64").attributes["dtype"]
        == "float64"
    )
    assert abm.operator(network, x, CONV, dtype="float64").pattern.dtype == torch.float64
    assert abm.record_pattern(network, x, dtype="float64").dtype == torch.float64
    assert max(abm.audit(network, x, dtype="float64").values()) <= 1e-12
    assert abm.verify(network, x[:1], CONV, dtype="float64")[CONV].scaled <= 1e-12
    assert abm.kink_distances(network, x[:1], "float64", sweep="float32").x.dtype == torch.float64


def test_k_is_taken_as_text_and_as_any_number(chain):
    """The same k, bit for bit, as a float in the result."""
    planes = abm.hyperplanes(chain.network, chain.x, CONV, "RM1", scale=0.125)
    for text in ("1/8", "0.125"):
        found = abm.hyperplanes(chain.network, chain.x, CONV, "RM1", scale=text)
        assert found.scale == 0.125
        assert_same_planes(found, planes)
    assert abm.verify(chain.network, chain.x[:1], CONV, scale="1/8")[CONV].share == 1
    for number in (Fraction(1, 8), np.float32(0.125), torch.tensor(0.125)):
        assert inspect.unwrap(check_scale)(number) == 0.125


def test_memory_is_a_number_a_text_or_no_bound(chain):
    """2e9 bytes, NumPy's integers, and None for no bound; one block then holds everything."""
    found = [
        bytes_of(2e9),
        bytes_of("2e9"),
        inspect.unwrap(bytes_of)(np.int64(7)),
        bytes_of(" 1 MiB "),
        bytes_of(None),
    ]
    assert found == [2 * 10**9, 2 * 10**9, 7, 2**20, UNBOUNDED]
    assert len(list(abm.iter_hyperplanes(chain.network, chain.x, CONV, "RM4", memory=None))) == 1
    assert abm.hyperplanes(chain.network, chain.x, CONV, "RM2", memory=None).image.shape == (
        2,
        4,
        4,
        4,
        2,
        6,
        6,
    )
    assert abm.hyperplanes(chain.network, chain.x, CONV, "RM2", memory=2e9).memory == 2 * 10**9


# what is refused

OWN_BOOLS = torch.ones(2, 1, 3, dtype=torch.bool)
REFUSED = {
    "no-layer": (
        {"layer": []},
        r"Layers must be at least one\. Got an empty list: give names of network\.layers",
    ),
    "dtype-that-is-none": (
        {"dtype": "float65"},
        r"dtype must be torch\.float32 or torch\.float64\. Got 'float65': give one",
    ),
    "dtype-that-is-a-function": (
        {"dtype": "rand"},
        r"dtype must be torch\.float32 or torch\.float64\. Got 'rand'",
    ),
    "half-by-name": ({"dtype": "float16"}, r"Got torch\.float16: convert the model"),
    "scale-text": (
        {"scale": "an eighth"},
        r"scale must be a positive number, such as 1/8\. Got 'an eighth': give one",
    ),
    "scale-over-zero": (
        {"scale": "1/0"},
        r"scale must be a positive number, such as 1/8\. Got '1/0'",
    ),
    "scale-text-negative": (
        {"scale": "-1/8"},
        r"scale must be a positive number, such as 1/8\. Got '-1/8'",
    ),
    "memory-of-zero": (
        {"memory": 0},
        r"memory must be a number of bytes .* Got 0: give one of these, or None for no bound",
    ),
    "memory-negative": ({"memory": "-1GiB"}, r"memory must be a number of bytes .* Got '-1GiB'"),
    "memory-infinite": ({"memory": float("inf")}, r"memory must be a number of bytes .* Got inf"),
    "memory-nan": ({"memory": float("nan")}, r"memory must be a number of bytes .* Got nan"),
    "step-of-zero": (
        {"units": slice(0, 4, 0)},
        r"units must be ints, slices .* Got slice\(0, 4, 0\): choose out_row of 0",
    ),
    "slice-of-text": (
        {"units": slice("a")},
        r"units must be ints, slices or integer arrays\. Got slice\(None, 'a', None\)",
    ),
    "truth-value": ({"units": True}, r"units must be ints, slices or integer arrays\. Got True"),
    "mask": (
        {"units": torch.tensor([True, False, True, False])},
        r"Got tensor.*: take nonzero\(\) of the mask",
    ),
    "new-axis": ({"units": (None, 0)}, r"units must be ints, slices or integer arrays\. Got None"),
    "ellipsis": (
        {"units": (..., 0)},
        r"units must be ints, slices or integer arrays\. Got Ellipsis",
    ),
    "ragged": (
        {"units": ([[0], [1, 2]],)},
        r"units must be ints, slices or integer arrays\. Got \[\[0\], \[1, 2\]\]",
    ),
    "empty-list": (
        {"units": []},
        r"units must name at least one unit of .* Got \[\], which is none",
    ),
    "huge": (
        {"units": 2**70},
        r"units must be ints, slices or integer arrays\. Got 1180591620717411303424",
    ),
    "unsigned": (
        {"units": np.array([2**64 - 1], dtype=np.uint64)},
        r"units must lie in out_row of 0 to 3",
    ),
    "meta": (
        {"units": torch.zeros(1, dtype=torch.int64, device="meta")},
        r"units must be ints, slices or integer arrays",
    ),
    "own-units-of-truth-values": (
        {"units": OWN_BOOLS},
        r"integers of shape \(2, K, 3\)\. Got \(2, 1, 3\) of torch\.bool",
    ),
    "sparse": (
        {"x": make(CHAIN)[1].to_sparse()},
        r"x must be a dense tensor\. Got torch\.sparse_coo: convert it with x\.to_dense",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_bad_arguments_are_refused_in_a_sentence(chain, why):
    """What was expected, what came, what to do; by the streamed call too."""
    changed, match = REFUSED[why]
    arguments = {"x": chain.x, "layer": CONV, "mode": "RM2", **changed}
    with pytest.raises(ValueError, match=match) as refusal:
        abm.hyperplanes(chain.network, **arguments)
    assert "\n" not in str(refusal.value)
    if arguments["layer"]:
        with pytest.raises(ValueError, match=match):
            abm.iter_hyperplanes(chain.network, **arguments)


def test_empty_lists_of_layers_are_refused_everywhere(chain):
    """No layer is not all layers."""
    for function in (abm.verify, abm.sparsity):
        with pytest.raises(ValueError, match=r"Layers must be at least one\. Got an empty list"):
            function(chain.network, chain.x, [])


def test_a_selection_backwards_is_not_everything():
    """All units in another order have other numbers."""
    dims = {"out_row": 2, "out_channel": 3}
    assert select(dims, None, 1).is_everything
    assert select(dims, (slice(None), slice(0, 3)), 1).is_everything
    assert not select(dims, (BACK,), 1).is_everything
    assert not select(dims, (BACK, BACK), 1).is_box


def test_the_network_itself_is_checked_without_type_checks_too():
    """The tests' own checks would answer first."""
    with pytest.raises(
        TypeError, match=r"must be a traced network\. Got str: trace the model first"
    ):
        inspect.unwrap(check_network)("vgg7")


WITHOUT_TYPE_CHECKS = dedent(
    """
    import inspect, json
    import numpy as np, torch
    import adjointbackmap as abm
    from torch import nn

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    x = torch.rand(1, 1, 6, 6)
    network = abm.trace(model, x)
    said = {}

    def heard(name, function, *args, **given):
        try:
            function(*args, **given)
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    given = dict(network=model, x=x, images=x, layer="0", mode="RM2", path="none")
    given.update(first=0, second=1, start=x[0], end=x[0], baseline=x, norm="l2")
    given.update(origin=x[0], u=x[0], v=x[0])
    for name in abm.__all__:
        function = getattr(abm, name)
        wanted = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        if "network" in wanted:
            needed = {p: given[p] for p, v in wanted.items() if v.default is v.empty}
            heard(f"network of {name}", function, **needed)
    others = {
        "layer": [0, None, network.layers["0"]],
        "own_bias": [0, "no", torch.tensor(False)],
        "mode": [2],
        "method": [["adjoint"]],
        "memory": [True, [1]],
        "scale": [None, [1], 1j],
        "dtype": [64, np.float64, float],
        "pattern": [x],
    }
    for name, values in others.items():
        for value in values:
            call = {"x": x, "layer": "0", "mode": "RM2", name: value}
            heard(f"{name} {type(value).__name__}", abm.hyperplanes, network, **call)
    for value in (None, [[1.0]], x.numpy()):
        heard(f"x {type(value).__name__}", abm.hyperplanes, network, value, "0")
    planes = [abm.hyperplanes(network, x, "0", own_bias=bias) for bias in (np.False_, False)]
    equal = torch.equal(planes[0].value, planes[1].value)
    said["own_bias of NumPy"] = equal and planes[0].own_bias is False
    print(json.dumps(said))
    """
)
SAID = {
    "network of ": (
        r"TypeError: network must be a traced network. "
        r"Got Sequential, a model: trace it first"
    ),
    "layer ": "ValueError: A layer must be one of 0, 1, output. Got ",
    "own_bias ": "ValueError: own_bias must be True, False or None for the mode's default. Got ",
    "mode ": "ValueError: Layer '0' has the modes RM4, RM3, RM2, RM1. Got 2: choose one of these",
    "method ": (
        "ValueError: method must be one of adjoint, basis, coloured, windowed, "
        "windowed-adjoint for layer '0' in RM2. Got ['adjoint']"
    ),
    "memory ": "ValueError: memory must be a number of bytes or such as '2GiB'",
    "scale ": "ValueError: scale must be a positive number, such as 1/8. Got ",
    "dtype ": "ValueError: dtype must be torch.float32 or torch.float64. Got ",
    "pattern ": "TypeError: pattern must be from adjointbackmap.record_pattern. Got Tensor",
    "x ": "TypeError: x must be a torch.Tensor. Got ",
}


def test_arguments_of_another_type_are_refused_in_a_sentence():
    """In a process without type checks: every function that takes a network, every argument."""
    source = os.path.dirname(os.path.dirname(abm.__file__))
    environment = {**os.environ, "PYTHONPATH": source}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TYPE_CHECKS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert said.pop("own_bias of NumPy")
    assert sum(name.startswith("network of") for name in said) >= 12
    for name, message in said.items():
        expected = next(text for start, text in SAID.items() if name.startswith(start))
        assert message.startswith(expected), (name, message)
        assert "\n" not in message


def test_planes_hold_the_query_that_made_them(chain):
    """Layer, mode, units, own bias, k and memory are those that were asked for."""
    asked = Query.of(
        chain.network, chain.x, chain.model[2], None, (0, BACK), False, "1/2", None, "basis", "1MB"
    )
    (planes,) = hyperplane.planes_of([asked], ["basis"])
    assert (planes.layer, planes.mode, planes.own_bias, planes.scale, planes.memory) == (
        CONV,
        "RM2",
        False,
        0.5,
        10**6,
    )
    assert planes.value.shape == (2, 4, 4)
