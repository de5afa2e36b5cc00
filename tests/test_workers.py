"""Several workers: one process's results to the bit, even if a worker is lost."""

import json
import os
import signal
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cases import make
from torch import nn

import adjointbackmap as abm
from adjointbackmap.exactness import verification as runs

distributed = pytest.importorskip(
    "distributed",
    reason="several workers need the extra cluster: pip install 'adjointbackmap[cluster]'",
)
dask = pytest.importorskip("dask")
workers = pytest.importorskip("adjointbackmap.exactness.workers")

CHAIN = "plain-conv-chain"


class Mortal(nn.Module):
    """A network whose first forward pass in a worker ends it as the kernel would: silently."""

    def __init__(self, chain, marker: Path):
        super().__init__()
        self.chain = chain
        self.marker = str(marker)
        self.home = os.getpid()

    def forward(self, x):
        here = os.getpid() == self.home or torch.compiler.is_exporting()
        if not here and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.chain(x)


def killed(loaded, item):
    """End the worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def divided(loaded, item):
    """An error for the item zero."""
    return loaded / item


def overlapping(spans, item):
    """When an item was worked on."""
    start = time.monotonic()
    time.sleep(0.02)
    return start, time.monotonic()


@pytest.fixture(scope="module")
def six():
    """A network, six images, and their checks from one process."""
    model, x = make(CHAIN, 6)
    network = abm.trace(model, x)
    return network, x, as_json(abm.verify(network, x))


def as_json(checks):
    return json.dumps({name: check.to_dict() for name, check in checks.items()})


@pytest.fixture
def scheduler():
    """The address of a cluster of one worker with two threads, in this process."""
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, **quiet
    ) as cluster:
        yield cluster.scheduler_address


def test_lost_worker_changes_nothing(six, tmp_path):
    """One of two processes is killed with an image: the other computes it; the total is equal."""
    marker = tmp_path / "killed"
    keep = tmp_path / "kept.jsonl"
    heard = []
    network = abm.trace(Mortal(six[0].model, marker).eval(), six[1])
    x = six[1]
    whole = as_json(abm.verify(network, x))
    assert not marker.exists()
    checks = abm.verify(network, x, keep=keep, workers=2, report=heard.append)
    assert marker.exists()
    assert as_json(checks) == whole
    assert heard == [n / 6 for n in range(7)]
    assert as_json(abm.verify(network, x, keep=keep)) == whole


def test_workers_of_a_cluster(six, scheduler):
    """The address of a scheduler takes the place of a number."""
    network, x, whole = six
    assert as_json(abm.verify(network, x, workers=scheduler)) == whole


def test_worker_works_on_one_item_at_a_time(scheduler):
    """Whatever its threads: hooks of a model cannot be shared."""
    spans = sorted(workers.spread_items(dict, overlapping, range(6), scheduler))
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_error_of_an_item_comes_through(scheduler):
    """As it was raised in the worker."""
    with pytest.raises(ZeroDivisionError):
        list(workers.spread_items(partial(int, 6), divided, [1, 2, 0], scheduler))


def test_item_that_ends_every_worker_is_told():
    """It is given up after some workers; here after the first."""
    expected = r"Every item must leave its worker alive. Got one that ended 1: give each more"
    given_up = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with given_up, pytest.raises(RuntimeError, match=expected):
        list(workers.spread_items(dict, killed, [0], 1))


def test_number_of_workers_is_checked(six):
    """At least one."""
    with pytest.raises(
        ValueError, match=r"workers must be at least 1, or the address of a Dask scheduler. Got 0"
    ):
        abm.verify(*six[:2], workers=0)


def test_address_without_a_scheduler(six, monkeypatch):
    """It is given up soon, with what to do."""
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.5)
    with pytest.raises(
        ConnectionError, match=r"No one answers at tcp://127.0.0.1:9: start one with dask scheduler"
    ):
        abm.verify(*six[:2], workers="tcp://127.0.0.1:9")


def test_missing_dask_is_told(six, monkeypatch):
    """With the extra that has it."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "adjointbackmap.exactness.workers")
    with pytest.raises(
        ImportError, match=r"Several workers need Dask.*: pip install 'adjointbackmap\[cluster\]'"
    ):
        abm.verify(*six[:2], workers=2)


def test_each_worker_has_a_card_of_its_own(monkeypatch):
    """The visible ones in turn; on the processor none is named."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [workers.visible_card(i, "cuda")["CUDA_VISIBLE_DEVICES"] for i in range(3)] == [
        "0",
        "1",
        "0",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [workers.visible_card(i, "cuda")["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["5", "7"]
    assert workers.visible_card(0, "cpu") == {}


def test_unfolded_and_folded_networks_are_traced_again_alike():
    """A worker's network gives the same checks: until, output and folding are kept."""
    model, x = make("residual-with-zero-padded-channels")
    folded = abm.fold(model, x).model
    for network in (abm.trace(model, x, until="bn2"), abm.trace(folded, x)):
        again = runs.unpacked(os.getcwd(), runs.packed(network))
        assert as_json(abm.verify(again, x)) == as_json(abm.verify(network, x))
