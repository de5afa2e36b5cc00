"""Work on many items in several processes, here or on a cluster; Dask starts them and gives a lost one's items to another."""

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

AHEAD = 4  # items that are with the scheduler, for each worker
LEAST_AHEAD = 32
CONNECT_SECONDS = 10
SETTINGS = {
    # Dask has glibc give memory back after every tensor, which costs this work nearly half as much processor time again
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}


class Loaded(WorkerPlugin):
    """What every worker has at hand: loaded with its first item, and again by the worker that takes a lost one's place.

    Attributes:
        name: By which a task finds it.
        load: Makes it.
        threads: Threads of the processor for a worker, ``None`` for its own setting.
    """

    def __init__(self, load: Callable[[], Any], threads: int | None) -> None:
        self.name = f"loaded-{uuid.uuid4().hex}"
        self.load = load
        self.threads = threads

    def setup(self, worker: Worker) -> None:
        """Prepare a worker."""
        self.lock = threading.Lock()

    @cached_property
    def value(self) -> Any:
        """What the items are worked on with."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return self.load()

    def apply(self, work: Callable[[Any, Any], Any], item: Any) -> Any:
        """Work on one item at a time, whatever the worker's number of threads: a model that is recorded cannot be shared."""
        with self.lock:
            return work(self.value, item)


def spread(
    load: Callable[[], Any],
    work: Callable[[Any, Any], Any],
    items: Iterable[Any],
    workers: int | str,
    device: str = "cpu",
) -> Iterator[Any]:
    """``work(load(), item)`` of each item, in the order in which workers finish them.

    An item whose worker is lost is given to another; local workers are started again.

    Args:
        load: Called once by every worker.
        work: Called for every item.
        items: What can be pickled.
        workers: How many processes on this machine, or the address of a Dask scheduler.
        device: ``"cuda"`` gives each local worker a card of its own, as far as there are cards.

    Raises:
        ValueError: If ``workers`` is less than one.
        ConnectionError: If no scheduler answers.
        RuntimeError: If an item ended four workers.
    """
    if isinstance(workers, int) and workers < 1:
        msg = f"workers must be at least 1, or the address of a Dask scheduler. Got {workers}."
        raise ValueError(msg)
    waiting = iter(items)
    with _client(workers, device) as client:
        loaded = Loaded(
            load, max(1, torch.get_num_threads() // workers) if isinstance(workers, int) else None
        )
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
            if isinstance(workers, str):  # a cluster lives on
                client.unregister_worker_plugin(loaded.name)


def _apply(name: str, work: Callable[[Any, Any], Any], item: Any) -> Any:
    """In a worker."""
    return cast("Loaded", get_worker().plugins[name]).apply(work, item)


def _result(future: Any) -> Any:
    try:
        return future.result()
    except KilledWorker as error:
        msg = f"Every item must leave its worker alive. Got one that ended {error.allowed_failures + 1}: give each more memory."
        raise RuntimeError(msg) from error


@contextmanager
def _client(workers: int | str, device: str) -> Iterator[Client]:
    """A client of the cluster, or of as many processes here, which end with it."""
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
        i: {"cls": Nanny, "options": {**options, "env": _environment(i, device)}}
        for i in range(workers)
    }
    with (
        dask.config.set(SETTINGS),
        SpecCluster(nannies, scheduler, silence_logs=logging.CRITICAL) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _connected(address: str) -> Client:
    try:
        return Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        msg = f"The address must be that of a Dask scheduler. No one answers at {address}: start one with dask scheduler."
        raise ConnectionError(msg) from error


def _environment(worker: int, device: str) -> dict[str, str]:
    """Which card a local worker sees."""
    if device != "cuda":
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": cards[worker % len(cards)]}
