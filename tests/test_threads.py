"""Several threads at once: each has its call's values, and the process stays as it was."""

import io
import logging
import sys
import threading
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from cases import Net, make
from torch import nn

import adjointbackmap as abm
from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.precision import exact
from adjointbackmap.engine import sweep as sweeping
from adjointbackmap.engine.threads import in_threads, one_thread

THREADS = 8
ROUNDS = 1


@pytest.fixture
def often():
    """Threads take turns ten times as often as they are used to."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    yield
    sys.setswitchinterval(before)


def classifier():
    """A small network in float32, also run in float64; a module of two calls, a functional."""

    def forward(net, x):
        y = net.act(net.first(x))
        y = net.act(net.second(y)) + y
        return net.last(y.flatten(1))

    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts = {"first": nn.Conv2d(1, 3, 3, padding=1), "second": nn.Conv2d(3, 3, 3, padding=1)}
        return Net(forward, act=nn.ReLU(), last=nn.Linear(75, 4), **parts).eval()


def images(seed):
    return torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))


def planes_are_exact(model, network, seed):
    """In float64, beside the model's own value of the same image."""
    x = images(seed).double()
    planes = abm.hyperplanes(network, x, "last", dtype=torch.float64)
    with torch.no_grad():
        assert float((planes.value - model(x.float())).abs().max()) < 1e-5
    assert abm.reconstruction_test(planes)["error"] <= 1e-12


def verified(model, network, seed):
    checks = abm.verify(network, images(seed), dtype=torch.float64)
    assert max(check.scaled for check in checks.values()) <= 1e-12


def audited(model, network, seed):
    assert max(abm.audit(network, images(seed), dtype=torch.float64).values()) <= 1e-10


def traced(model, network, seed):
    planes_are_exact(model, abm.trace(model, images(seed)), seed)


WORK = [planes_are_exact, verified, audited, traced]


def test_threads_beside_one_that_runs_the_model(often):
    """Threads share a network and trace others; the model gives the same bits as before."""
    model = classifier()
    network = abm.trace(model, images(0))
    mine = {seed: model(images(seed)).detach() for seed in range(4)}
    stop = threading.Event()
    runs = []

    def run_the_model():
        while not stop.is_set():
            for seed, before in mine.items():
                assert torch.equal(model(images(seed)), before)
                assert model.first.weight.dtype == torch.float32
            runs.append(1)
            stop.wait(0.005)

    with ThreadPoolExecutor(THREADS + 1) as pool:
        running = pool.submit(run_the_model)
        work = [
            pool.submit(WORK[i % len(WORK)], model, network, i) for i in range(THREADS * ROUNDS)
        ]
        try:
            for each in work:
                each.result()
        finally:
            stop.set()
        running.result()
    assert runs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# what all threads share


def settings():
    convolutions = torch.backends.mkldnn.conv
    precisions = (
        torch.get_float32_matmul_precision(),
        convolutions.fp32_precision,
        torch.backends.cudnn.allow_tf32,
    )
    text = "The tensor attribute"
    hidden = [
        entry
        for entry in warnings.filters
        if entry[0] == "ignore" and entry[1] and entry[1].match(text)
    ]
    return *precisions, sys.stderr, logging.root.manager.disable, hidden


def test_process_is_as_before_whatever_the_order():
    """Computations that end in the order they began; the user's settings stay."""
    before = settings()
    torch.set_float32_matmul_precision("medium")
    try:
        first = exact(torch.device("cpu"))
        second = exact(torch.device("cpu"))
        first.__enter__()
        assert torch.get_float32_matmul_precision() == "highest"
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
        with exact(torch.device("cpu")):
            torch.set_float32_matmul_precision("high")
            with exact(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_grad_enabled(
            True
        )  # the thread's own: in one thread, only the order of a stack puts it back
    assert settings() == before


def refused(net, x):
    return net.conv(x) if x.sum() > 0 else x


def test_traces_in_threads_leave_the_process_as_it_was(often, monkeypatch):
    """Traces that pass or fail leave other threads' error stream whole, and add nothing."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = settings()
    stop = threading.Event()

    def write():
        while not stop.is_set():
            print("theirs", file=sys.stderr)
            stop.wait(0.01)

    def trace(n):
        if n % 2:
            abm.trace(classifier(), images(n))
        else:
            with pytest.raises(ValueError, match="depends on the data"):
                abm.trace(Net(refused, conv=nn.Conv2d(1, 1, 1)).eval(), images(n))

    with ThreadPoolExecutor(5) as pool:
        writing = pool.submit(write)
        try:
            for each in [pool.submit(trace, n) for n in range(4)]:
                each.result()
        finally:
            stop.set()
        writing.result()
    assert set(stream.getvalue().split()) == {"theirs"}
    assert settings() == before
    assert not any(handler.filters for handler in logging.getLogger("torch").handlers)


# the copy of a structure


def own_forward(model):
    """A method put on a module, which holds the original."""
    model.first.forward = types.MethodType(type(model.first).forward, model.first)


def closure(model):
    """A function that finds a layer in its closure."""
    first = model.first
    plain = first.forward
    first.forward = lambda x: plain(x) + 0 * first.bias.view(-1, 1, 1)


def bound_arguments(model):
    """A function with a module among its arguments."""
    model.first.forward = partial(type(model.first).forward, model.first)


def hook_of_an_object(model):
    """A hook that is the method of an object, which keeps what it saw."""

    class Keeper:
        def __init__(self):
            self.kept = []

        def __call__(self, module, inputs, output):
            self.kept.append(output)

        def hook(self, module, inputs, output):
            assert len(self.kept) < 2, "another call's"
            self.kept = [output]

    model.keeper = Keeper()
    model.first.register_forward_hook(model.keeper.hook)


def list_of_layers(model):
    """Layers in a list of Python's, and a reference back to the model."""
    model.listed = [model.first, (model.second, {"last": model.last})]
    model.first.parent = weakref.ref(model)
    run = type(model).forward
    model.forward = lambda x: run(model, x) if model.listed[0].parent() is model else x


STRUCTURES = [own_forward, closure, bound_arguments, hook_of_an_object, list_of_layers]


@pytest.mark.parametrize("change", STRUCTURES, ids=lambda change: change.__name__)
def test_structures_that_lead_back_to_the_model(change):
    """The copy's parts refer to the copy: a cast reaches them all, none of the original."""
    model = classifier()
    change(model)
    copied = structural_copy(model, lambda t: t.double())
    with torch.no_grad():
        assert copied(images(0).double()).dtype == torch.float64
        assert model(images(0)).dtype == torch.float32
    if hasattr(model, "keeper"):
        model.keeper.kept = []
    network = abm.trace(model, images(0))
    planes = abm.hyperplanes(network, images(1), "last", dtype=torch.float64)
    assert abm.reconstruction_test(planes)["error"] <= 1e-12
    assert not getattr(getattr(model, "keeper", None), "kept", [])


@pytest.mark.parametrize(
    "case", ["reused-module", "residual-with-zero-padded-channels", "in-place-relu"]
)
def test_copy_computes_the_same(case):
    """It shares every tensor and no module."""
    model, x = make(case)
    copied = structural_copy(model)
    with torch.no_grad():
        assert torch.equal(copied(x.clone()), model(x.clone()))
    assert [id(p) for p in copied.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
    assert [n for n, _ in copied.named_modules()] == [n for n, _ in model.named_modules()]


# threads of one computation


@pytest.fixture
def two_threads():
    """PyTorch has two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_work_in_threads_has_one_thread_each_and_leaves_their_number(two_threads):
    """Results are in order; this thread and later ones have two threads again."""
    found = list(in_threads(lambda n: (n, torch.get_num_threads()), range(9), 2))
    assert found == [(n, 1) for n in range(9)]
    with one_thread(torch.device("cpu")):
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == 2


def test_work_in_threads_raises_what_an_item_raises(two_threads):
    """The error of one item ends the work."""
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda n: 1 // n, [1, 0, 1], 2))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_groups_in_threads_give_the_same_bits(two_threads, mode, monkeypatch):
    """Windows, biases and sums of two threads are those of one, in inference mode too."""
    monkeypatch.setattr(sweeping, "BATCH_NUMBERS", 1)  # many groups
    model, x = make("plain-conv-chain", images=1)
    network = abm.trace(model, x)
    kept = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        with mode():
            planes = abm.hyperplanes(network, x, "4", "RM2", method="windowed")
            check = abm.verify(network, x)["4"]
        kept[count] = (planes.image_part.values.clone(), planes.bias_part.clone(), check.scaled)
    assert torch.equal(kept[1][0], kept[2][0])
    assert torch.equal(kept[1][1], kept[2][1])
    assert kept[1][2] == kept[2][2]
