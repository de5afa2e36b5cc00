"""Linear regions on a segment, against dense samples, a slow walk, and the model itself."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, OPERATIONS
from checks import assert_close

import adjointbackmap as abm
from adjointbackmap.engine.operators import push
from adjointbackmap.engine.program import IMAGE
from adjointbackmap.rules import RULES
from adjointbackmap.rules.piecewise import Gate


def dense_ends(traced):
    """The two images of a catalogue network, as the ends of a segment."""
    return traced.x[0], traced.x[1]


@pytest.mark.parametrize("name", [*CASES, *OPERATIONS])
def test_line_of_every_network(traced_case, name):
    traced = traced_case(name)
    start, end = dense_ends(traced)
    line = abm.region_line(traced.network, start, end)
    assert line.complete
    assert abm.line_test(line)["regions"] == line.regions
    assert all(line.flips)


def test_line_in_parts_is_the_whole_line(traced_case):
    """Little memory, or few regions at a time, give the same breakpoints and flips."""
    traced = traced_case("max-pool-with-overlap-padding-and-ceil")
    start, end = dense_ends(traced)
    whole = abm.region_line(traced.network, start, end)
    small = abm.region_line(traced.network, start, end, memory="100kB")
    assert small.walk.room < whole.regions
    line = abm.region_line(traced.network, start, end, regions=7)
    assert line.regions == 7
    assert not line.complete
    while not line.complete:
        line = line.resume(line.regions + 10)
    for other in (small, line):
        assert_close(other.t, whole.t, rtol=0, atol=1e-13)
        assert [set(flips) for flips in other.flips] == [set(flips) for flips in whole.flips]


def test_values_are_linear_between_breakpoints(traced_case):
    """In the middle of each region a layer is half way between its limits, also where it jumps."""
    for name in ("residual-with-zero-padded-channels", "sign", "hard-shrink", "unpooling"):
        traced = traced_case(name)
        line = abm.region_line(traced.network, *dense_ends(traced))
        values = line.values()
        middle = traced.model(line.at(line.middles)).detach()
        assert_close(values.mean(1), middle, rtol=1e-11, atol=1e-11)
        jumps = line.jumps()
        assert_close(jumps[1:-1], values[1:, 0] - values[:-1, 1], rtol=0, atol=0)
        assert bool((jumps.abs() > 1e-6).any()) == (name != "residual-with-zero-padded-channels")


def test_hyperplanes_of_a_region_give_its_values(traced_case):
    traced = traced_case("residual-with-zero-padded-channels")
    line = abm.region_line(traced.network, *dense_ends(traced))
    planes = line.hyperplanes("output", "RM0", at=[0, 3, -1])
    ends = torch.stack([line.at(line.t[:-1]), line.at(line.t[1:])], 1)[[0, 3, -1]]
    for side in range(2):
        found = planes.reconstruct(ends[:, side])
        assert_close(found, line.values()[[0, 3, -1], side], rtol=1e-11, atol=1e-11)


def test_a_comparison_at_one_point_alone_is_told_and_no_breakpoint():
    class Equal(torch.nn.Module):
        def forward(self, x):
            return torch.where(x == 0.25, 5.0, 2 * x).relu()

    network = abm.trace(Equal().double().eval(), torch.rand(1, 1).double())
    line = abm.region_line(network, torch.zeros(1).double(), torch.ones(1).double())
    assert line.t.tolist() == [0, 1]
    assert [t for t, _ in line.isolated] == [0.25, 0.25]


def test_a_rule_of_the_users_own_is_refused(monkeypatch):
    class Own(Gate):
        def slope(self, c, scale):
            return (c > scale).to(c.dtype)

    monkeypatch.setitem(RULES, "aten.relu.default", Own)
    network = abm.trace(torch.nn.ReLU().eval(), torch.rand(1, 2), audit=False)
    with pytest.raises(
        abm.UnsupportedOperation, match=r"must give its kinks\. Got relu: add a method"
    ):
        abm.region_line(network, torch.zeros(2), torch.ones(2))


def test_arguments_that_do_not_fit(traced_case):
    traced = traced_case("plain-conv-chain")
    with pytest.raises(ValueError, match="end must be one image"):
        abm.region_line(traced.network, traced.x[0], traced.x)
    with pytest.raises(ValueError, match=r"regions must be at least 1\. Got 0"):
        abm.region_line(traced.network, traced.x[0], traced.x[1], regions=0)


def test_a_missing_breakpoint_and_a_false_one_are_found(traced_case):
    """The public test of a line sees both."""
    traced = traced_case("plain-conv-chain")
    line = abm.region_line(traced.network, *dense_ends(traced))
    missing = torch.arange(len(line.t)) != 5
    fewer = replace(line, t=line.t[missing], uncertainty=line.uncertainty[missing])
    with pytest.raises(RuntimeError, match=r"constant gates inside every region\. Got others in"):
        abm.line_test(fewer)
    between = torch.cat([line.t, (line.t[4:5] + line.t[5:6]) / 2]).sort().values
    more = replace(line, t=between, uncertainty=torch.zeros_like(between))
    with pytest.raises(RuntimeError, match=r"other gates across every breakpoint\. Got none at"):
        abm.line_test(more)
    with pytest.raises(RuntimeError, match=r"at most 1 % of regions too narrow"):
        abm.line_test(replace(line, uncertainty=line.uncertainty + 1))


def slow_walk(network, start, end, beside=1e-7):
    """The same breakpoints one after the other, from the kinks of every unit in each region."""
    direction = (end - start)[None]
    t = [0.0]
    while True:
        here = t[-1] + beside
        found = abm.kink_distances(network, torch.lerp(start, end, here))
        assert found.unmeasured == ()
        targets = [watched.value for watched in found.watched]
        program = found.pattern.program
        entries = {entry.slot: entry.value[None] for entry in program.entries}
        values = push(found.pattern, {IMAGE: found.x[None], **entries}, targets)
        slopes = push(found.pattern, {IMAGE: direction}, targets)
        nearest = 1.0
        for watched in found.watched:
            value, slope = (part[watched.value.slot] for part in (values, slopes))
            if slope is None:
                continue
            # infinite constants never reach a kink
            reachable = found.distances[watched.name][0].isfinite()
            for kink in watched.kinks:
                place = here + ((kink - value) / slope)[0][reachable]
                ahead = place[place > here]
                nearest = min(nearest, float(ahead.min()) if len(ahead) else 1.0)
        t.append(nearest)
        if nearest == 1.0:
            return torch.tensor(t, dtype=torch.float64)


WALKED = (
    "residual-with-zero-padded-channels saturated-on-both-sides mlp-on-flat-inputs maxout "
    "max-pool-with-ties sign hard-shrink group-sort relu-rnn-cell clamp-between-tensors"
).split()


@pytest.mark.parametrize("name", WALKED)
def test_line_equals_an_independent_slow_walk(traced_case, name):
    """A part of the segment, walked kink by kink; breakpoints nearer than its step may be one."""
    traced = traced_case(name)
    start, other = dense_ends(traced)
    end = torch.lerp(start, other, 0.3)
    line = abm.region_line(traced.network, start, end)
    walked = slow_walk(traced.network, start, end)
    apart = torch.ones_like(line.t, dtype=torch.bool)
    apart[1:-1] = line.t[1:-1] - line.t[:-2] > 1e-7
    assert_close(walked, line.t[apart], rtol=0, atol=1e-9)
