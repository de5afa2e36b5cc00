"""Memory: batches shrink with it, results do not change, and a process keeps to it."""

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from cases import make

import adjointbackmap as abm
from adjointbackmap.engine.sweep import Batches
from adjointbackmap.engine.workspace import held
from adjointbackmap.planes.planner import METHODS, plan_query, vectors_at_once
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.streaming import stream

# Peak memory of a fresh process over what it has before the first block: for each size of memory,
# three blocks of RM4 of the second layer of VGG7, and all layers of one image verified.
MEASURE = """
import json, sys, torch, adjointbackmap as abm

def kib(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

def peak(work):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what there is now
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024

def blocks(memory):
    found = abm.iter_hyperplanes(network, x, "conv1", "RM4", memory=memory)
    for _ in range(3):
        next(found)

x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
network = abm.trace(abm.models.load("vgg7-cifar10"), x, audit=False)
abm.hyperplanes(network, x, "conv1", "RM4", units=(0, 0, 0, 0))
taken = {}
for mib in (4, 16, 64):
    taken[f"blocks {mib}"] = peak(lambda: blocks(f"{mib}MiB"))
    taken[f"verify {mib}"] = peak(lambda: abm.verify(network, x, memory=f"{mib}MiB"))
print(json.dumps(taken))
"""
# MiB beside the memory: 8 bytes for each of a million units, maps of one vector, PyTorch's own
FLOOR = 48


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a peak since"
)
def test_a_process_keeps_to_the_memory():
    """Blocks of 16 MiB took 212 MiB before batches shrank with the memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    for name, mib in json.loads(done.stdout.splitlines()[-1]).items():
        assert mib <= int(name.split()[1]) + FLOOR, name


@pytest.fixture
def chain(traced_case):
    """A chain of three convolutions in float64."""
    return traced_case("plain-conv-chain")


# windowed cotangents are for RM2 alone
PAIRS = [(m, mode) for m in METHODS for mode in ("RM2", "RM4") if (m, mode) != (METHODS[-1], "RM4")]


@pytest.mark.parametrize(("method", "mode"), PAIRS)
def test_batches_shrink_and_hyperplanes_stay(chain, method, mode):
    """From the batch that is fast to one vector; what they give is the same."""
    result = plan_query(Query.of(chain.network, chain.x, "2", mode, method=method)).bytes
    whole = abm.hyperplanes(chain.network, chain.x, "2", mode, method=method)
    seen = []
    for memory in (2**31, result + 40_000, result):
        query = Query.of(chain.network, chain.x, "2", mode, method=method, memory=memory)
        seen.append((vectors_at_once(query, method), plan_query(query).workspace))
        planes = abm.hyperplanes(chain.network, chain.x, "2", mode, method=method, memory=memory)
        for ours, theirs in (
            (planes.image_part.values, whole.image_part.values),
            (planes.bias_part, whole.bias_part),
            (planes.value, whole.value),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[1] > seen[2]
    assert seen[2][0] == 1


def test_windows_of_a_batch_shrink_to_one_pixel(chain):
    """A row of pixels at least is fast; less memory takes parts of a row."""
    program = chain.network.program()
    target = chain.network.layer("2").value

    def pixels(room):
        return Batches.of(program, [target], [], 1, torch.float64, room).pixels((6, 6))

    assert pixels(None) >= 36
    assert pixels(None) > pixels(20_000) > pixels(1) == 1


def test_plan_counts_the_workspace(chain):
    """It stands in the plan's line, and less memory makes it less."""
    query = Query.of(chain.network, chain.x, "2", "RM4", memory=10_000)
    assert f"workspace {plan_query(query).workspace / 2**10:.3g} KiB" in str(plan_query(query))
    large = plan_query(Query.of(chain.network, chain.x, "2", "RM4", memory="1GiB"))
    assert large.workspace > plan_query(query).workspace > 0


def test_a_vector_holds_what_is_not_freed():
    """Of a residual network the skip is there while its branch is computed."""
    model, x = make("residual-with-zero-padded-channels")
    program = abm.trace(model, x).program()
    assert held(program.steps) >= program.largest
    assert held(program.steps, kept={step.output.slot for step in program.steps}) >= held(
        program.steps
    )


@pytest.mark.parametrize("memory", [None, "1MiB", 1])
def test_verify_takes_memory(chain, memory):
    """Every unit is verified in any memory, and kept results do not depend on it."""
    checks = abm.verify(chain.network, chain.x, memory=memory)
    plain = abm.verify(chain.network, chain.x)
    assert {n: (c.units, c.within) for n, c in checks.items()} == {
        n: (c.units, c.within) for n, c in plain.items()
    }
    assert max(check.scaled for check in checks.values()) <= 1e-12


def test_verify_refuses_what_is_no_memory(chain):
    """As the other commands do."""
    with pytest.raises(ValueError, match="memory must be a number of bytes"):
        abm.verify(chain.network, chain.x, memory="some")


def test_methods_that_copy_their_result_take_smaller_blocks(chain):
    """Half of the memory is for the result, with its copy."""

    def units(method):
        query = Query.of(chain.network, chain.x, "2", "RM2", method=method, memory=10_000)
        return prod(stream(query).block)

    assert units("adjoint") > units("coloured") >= units("basis")
