"""Random networks pass the catalogue's tests: thousands with ``make random``, a few always."""

from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import Event, Thread

import torch
from checks import (
    assert_close,
    assert_field_contains,
    assert_modes_are_sums,
    assert_reconstructed,
    assert_untouched,
    declared_field,
    snapshot,
    true_field,
)
from hypothesis import event, given, settings
from hypothesis.strategies import lists
from strategies import networks, with_detached_gates
from torch import nn

import adjointbackmap as abm


def has_ties(network, x):
    """Whether a gate is within rounding of its kink, so that float32 may find another pattern."""
    double, single = (
        abm.record_pattern(network, x, dtype=d) for d in (torch.float64, torch.float32)
    )
    pairs = [
        (a, b)
        for slot in double.gates
        for a, b in zip(double.gates[slot], single.gates[slot], strict=True)
    ]
    return not all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5) for a, b in pairs)


def small_convolution(network):
    """Name of a convolution of which all four modes are quickly made, if there is one."""
    for layer in network.layers.values():
        if "RM4" in layer.modes and prod(layer.out_shape) * layer.in_shape[0] <= 400:
            return layer.name
    return None


TORCH_SIXTH = 2e-7  # the derivative of hard sigmoid in PyTorch is 1/6 rounded to float32


def rounds(model):
    """Whether PyTorch's own derivative of a model is rounded."""
    return "hard sigmoid" in repr(model)


def is_factor(part):
    """Whether a part may be folded."""
    return (
        isinstance(part, nn.modules.batchnorm._BatchNorm) or getattr(part, "name", "") == "scalar"
    )


@given(networks())
def test_random_network_is_exact(drawn):
    """Transposes, the model's Jacobian, every unit, sums of modes, fields, the model untouched."""
    model, x = drawn
    before = snapshot(model)
    network = abm.trace(model, x)
    assert_reconstructed(network, x)
    tied = has_ties(network, x)
    event(f"has ties: {tied}")
    for layer in network.distinct_layers():
        operator = abm.operator(network, x, layer.name)
        abm.dot_test(operator)
        ends = ("output", next(iter(network.layers)))
        if not tied and layer.name in ends:
            abm.dense_test(operator, x, tolerance=TORCH_SIXTH if rounds(model) else None)
        assert_field_contains(
            true_field(network, x, layer.name), declared_field(network, layer.name)
        )
    conv = small_convolution(network)
    if conv:
        assert_modes_are_sums(network, x, conv)
    if any(map(is_factor, model.parts)):
        folded = abm.fold(model, x)
        event(f"merged: {len(folded.merged)}")
        assert_close(folded.model(x), model(x))
    assert_untouched(model, before)


@given(networks())
def test_regions_of_random_networks_are_exact(drawn):
    """Segments, integrated gradients, and a small window of a plane through the image."""
    model, x = drawn
    network = abm.trace(model, x, audit=False)
    generator = torch.Generator().manual_seed(0)
    other, u, v = (torch.randn(x.shape[1:], generator=generator).to(x) for _ in range(3))
    line = abm.region_line(network, x[0], other)
    event(f"regions: {line.regions // 10 * 10} and more")
    abm.line_test(line, points=4)
    assert all(line.flips)
    abm.integral_test(abm.integrated_gradients(network, x[0], other))
    found = abm.region_map(network, x[0], u, v, ((-0.02, 0.03), (-0.02, 0.03)), budget=300)
    if found.complete:
        abm.map_test(found, points=2)


HALF = max(1, settings.default.max_examples // 2)  # each network is traced twice


@settings(max_examples=HALF)
@given(networks(curved=True))
def test_random_curved_network_is_exact(drawn):
    """Frozen, the map is the Jacobian of a twin with detached gates; as tangent, the model's."""
    model, x = drawn
    with torch.no_grad():
        expected = model(x)
        assert_close(with_detached_gates(model)(x), expected)
    for curved, other in (("frozen", with_detached_gates(model)), ("tangent", model)):
        network = abm.trace(model, x, curved=curved)
        event(f"{curved}, curved calls: {len(network.curved)}")
        sizes = [check.scaled for check in abm.verify(network, x).values()]
        assert max(sizes) <= 1e-12
        operator = abm.operator(network, x, "output")
        abm.dot_test(operator)
        images = [jacobian_of(other, image) for image in x]
        scale = max(1.0, float(torch.stack(images).abs().max()))
        atol = TORCH_SIXTH if rounds(model) else 1e-8
        assert_close(operator.dense()[0] / scale, torch.stack(images) / scale, rtol=0, atol=atol)


def jacobian_of(model, image):
    """Derivative of the output of one image, ``(*out_shape, *in_shape)``."""
    return torch.autograd.functional.jacobian(lambda t: model(t[None])[0], image)


THREADS = 8
A_HUNDREDTH = max(1, settings.default.max_examples // 100)  # each example has eight networks


@settings(max_examples=A_HUNDREDTH)
@given(lists(networks(), min_size=THREADS, max_size=THREADS))
def test_random_networks_are_exact_in_threads(drawn):
    """Eight networks are traced, audited and verified at once, while a thread runs their models."""
    stopped = Event()
    expected = [model(x).detach() for model, x in drawn]
    seen = []

    def run_models():
        while not stopped.is_set():
            seen.append(
                all(torch.equal(m(x), out) for (m, x), out in zip(drawn, expected, strict=True))
            )

    def check(model, x):
        network = abm.trace(model, x)
        assert_reconstructed(network, x)
        abm.reconstruction_test(abm.hyperplanes(network, x, "output"))

    runner = Thread(target=run_models)
    runner.start()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(check, model, x) for model, x in drawn]:
                done.result()
    finally:
        stopped.set()
        runner.join()
    event(f"networks in threads: {THREADS}")
    assert all(seen)
