"""Single works of the benchmark, which a fresh process measures alone.

This file is also run as a script, with the package of an older commit. So it takes from the package
only what that commit has: ``hyperplanes``, ``verify``, and the networks of the benchmark.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import adjointbackmap as abm
from adjointbackmap.benchmark.networks import benchmark_network

MEMORY = "4GiB"
LEAST_RUNS = 3


def work(name: str) -> Callable[[], object]:
    """A work by its name.

    Args:
        name: The network, then ``layers``, ``classes`` or the name of a layer; of a network that
            grows, the last layer, such as ``depth/16``.
    """
    family, _, part = name.partition("/")
    grows = part.isdigit()
    subject = benchmark_network(name if grows else family)
    network = subject.network
    x = subject.x[:1]
    with_kernel = [layer.name for layer in network.distinct_layers() if layer.kernel is not None]
    if part == "classes":
        return lambda: abm.hyperplanes(network, subject.x, "fc", "RM0", memory=MEMORY)
    if part == "layers":
        return lambda: abm.hyperplanes(network, x, with_kernel, memory=MEMORY)
    layer = with_kernel[-1] if grows else part
    return lambda: abm.hyperplanes(network, x, layer, memory=MEMORY)


def seconds_of_runs(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of some runs, after one that does not count."""
    run()
    times = []
    for _ in range(max(repeats, LEAST_RUNS)):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    _, name, repeats = sys.argv
    times = seconds_of_runs(work(name), int(repeats))
    print(json.dumps({"seconds": statistics.median(times), "package": abm.__file__}))
