"""Work on many items in several processes, on this machine or on a cluster.

Dask starts the processes. If one is lost, another gets its items.
"""

import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch

try:
    import dask
    from distributed import (
        Client,
        KilledWorker,
        Nanny,
        Scheduler,
        SpecCluster,
        Worker,
        WorkerPlugin,
        as_completed,
        get_worker,
    )
except ImportError as error:
    message = (
        "Several workers need Dask, which is not installed: pip install 'adjointbackmap[cluster]'."
    )
    raise ImportError(message) from error

# Items that the scheduler has for each worker, so that no worker waits. All items at once would
# take too much memory there.
AHEAD = 4
# Least number of these items, for a cluster whose workers join later.
LEAST_AHEAD = 32
CONNECT_SECONDS = 10  # until a scheduler must have answered
SETTINGS = {
    # By default Dask lets glibc give memory back after every tensor. This work then takes nearly
    # half as much processor time again.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}


class Loaded(WorkerPlugin):
    """A value that every worker loads with its first item.

    A worker that replaces a lost one loads it again.

    Attributes:
        name: Name by which a task finds the plugin.
        load: Makes the value.
        threads: Number of PyTorch's threads in a worker; ``None`` for its own setting.
    """

    def __init__(self, load: Callable[[], Any], threads: int | None) -> None:
        self.name = f"loaded-{uuid.uuid4().hex}"
        self.load = load
        self.threads = threads

    def setup(self, worker: Worker) -> None:
        """Prepare a worker: Dask calls this in each of them."""
        self.lock = threading.Lock()

    @cached_property
    def value(self) -> Any:
        """The loaded value."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return self.load()

    def apply(self, work: Callable[[Any, Any], Any], item: Any) -> Any:
        """Work on one item at a time, even if the worker has several threads.

        Threads cannot share a model whose values are recorded.
        """
        with self.lock:
            return work(self.value, item)


def spread_items(
    load: Callable[[], Any],
    work: Callable[[Any, Any], Any],
    items: Iterable[Any],
    workers: int | str,
    device: str = "cpu",
) -> Iterator[Any]:
    """``work(load(), item)`` of each item, in the order in which workers finish them.

    If a worker is lost, its item goes to another one. Local workers are started again.

    Args:
        load: Called once in every worker.
        work: Called for every item.
        items: Items that can be pickled.
        workers: Number of processes on this machine, or the address of a Dask scheduler.
        device: ``"cuda"`` gives each local worker a GPU of its own. If there are fewer GPUs than
            workers, some share one.

    Raises:
        ValueError: If ``workers`` is less than one.
        ConnectionError: If no scheduler answers.
        RuntimeError: If the same item ended four workers.
    """
    if isinstance(workers, int) and workers < 1:
        msg = f"workers must be at least 1, or the address of a Dask scheduler. Got {workers}."
        raise ValueError(msg)
    waiting = iter(items)
    threads = max(1, torch.get_num_threads() // workers) if isinstance(workers, int) else None
    with _client(workers, device) as client:
        loaded = Loaded(load, threads)
        client.register_plugin(loaded)

        def submit(count: int) -> list[Any]:
            return [
                client.submit(_apply, loaded.name, work, item, pure=False)
                for item in islice(waiting, count)
            ]

        try:
            finished = as_completed(submit(max(LEAST_AHEAD, AHEAD * len(client.nthreads()))))
            for future in finished:
                yield _result(future)
                finished.update(submit(1))
        finally:
            if isinstance(workers, str):  # a cluster goes on running
                client.unregister_worker_plugin(loaded.name)


def _apply(name: str, work: Callable[[Any, Any], Any], item: Any) -> Any:
    """Work on an item, in a worker."""
    return cast("Loaded", get_worker().plugins[name]).apply(work, item)


def _result(future: Any) -> Any:
    """The result of an item.

    Raises:
        RuntimeError: If the item ended all workers that tried it.
    """
    try:
        return future.result()
    except KilledWorker as error:
        msg = (
            "Every item must leave its worker alive. "
            f"Got one that ended {error.allowed_failures + 1}: give each more memory."
        )
        raise RuntimeError(msg) from error


@contextmanager
def _client(workers: int | str, device: str) -> Iterator[Client]:
    """A client of a running cluster, or of new local processes that end with the block."""
    if isinstance(workers, str):
        with _connected(workers) as client:
            yield client
        return
    anywhere = {
        "host": "127.0.0.1",
        "port": 0,
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
    }
    scheduler = {"cls": Scheduler, "options": anywhere}
    options = {"nthreads": 1, "silence_logs": logging.CRITICAL}
    nannies = {
        i: {"cls": Nanny, "options": {**options, "env": visible_card(i, device)}}
        for i in range(workers)
    }
    with (
        dask.config.set(SETTINGS),
        SpecCluster(nannies, scheduler, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _connected(address: str) -> Client:
    """A client of the cluster whose scheduler has an address.

    Raises:
        ConnectionError: If no scheduler answers.
    """
    try:
        return Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        msg = (
            "The address must be that of a Dask scheduler. "
            f"No one answers at {address}: start one with dask scheduler."
        )
        raise ConnectionError(msg) from error


def visible_card(worker: int, device: str) -> dict[str, str]:
    """Environment variables of a local worker: the GPU that it sees."""
    if device != "cuda":
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": cards[worker % len(cards)]}
