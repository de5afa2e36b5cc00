"""Blocks of hyperplanes: equal to the whole, in the compact form, within the memory."""

import pytest
import torch
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.streaming import block_shape, stream, tiles
from adjointbackmap.planes.units import select

MODES = {  # the layers of some networks
    ("plain-conv-chain", "2"): ("RM4", "RM3", "RM2", "RM1"),
    ("stride-dilation-groups", "2"): ("RM4", "RM3", "RM2", "RM1"),
    ("residual-with-zero-padded-channels", "fc"): ("RM0",),
}
EVERY_MODE = [(*where, mode) for where, modes in MODES.items() for mode in modes]
SELECTIONS = {
    "all": ("RM2", None),
    "one-unit": ("RM2", (1, 2, 3)),
    "int-and-slice": ("RM2", (0, slice(1, None, 2))),
    "arrays-pointwise": ("RM2", ([0, 1, 3], [0, 1, 2], [3, 2, 1])),
    "array-in-the-middle": ("RM2", (slice(None), torch.tensor([0, 2]), slice(None))),
    "kernels": ("RM4", (slice(1, 3), slice(None), 2)),
    "kernels-summed": ("RM3", (slice(None), [0, 3])),
    "own-units": ("RM2", torch.tensor([[[0, 0, 0], [1, 2, 3]], [[3, 3, 0], [2, 0, 1]]])),
}


@pytest.fixture
def chain(traced_case):
    """A chain of three convolutions."""
    return traced_case("plain-conv-chain")


def assert_blocks_equal(work, whole):
    """Each block is the whole's part; together they are all of it."""
    seen = torch.zeros(work.shape, dtype=torch.int64)
    for block, planes in zip(work.blocks, map(work.compute, work.blocks), strict=True):
        seen[block] += 1
        own = whole.units.flat[(block[0] if len(whole.units.flat) > 1 else slice(None), *block[1:])]
        torch.testing.assert_close(planes.units.flat, own)
        assert planes.units.names == whole.units.names
        for part in ("image", "bias", "value"):
            torch.testing.assert_close(
                getattr(planes, part), getattr(whole, part)[block], rtol=1e-10, atol=1e-12
            )
        torch.testing.assert_close(
            planes.reconstruct(), whole.reconstruct()[block], rtol=1e-10, atol=1e-12
        )
    assert (seen == 1).all()


@pytest.mark.parametrize("memory", [10_000, 40_000, 10**7])
@pytest.mark.parametrize(("case", "layer", "mode"), EVERY_MODE)
def test_blocks_equal_the_whole(traced_case, case, layer, mode, memory):
    """In every mode, of two images, from a few units in a block to all in one."""
    traced = traced_case(case)
    work = stream(Query.of(traced.network, traced.x, layer, mode, memory=memory))
    assert_blocks_equal(work, abm.hyperplanes(traced.network, traced.x, layer, mode))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_blocks_of_a_selection(chain, selection):
    """Units as NumPy chooses them, and units of their own for each image."""
    mode, units = SELECTIONS[selection]
    work = stream(Query.of(chain.network, chain.x, "2", mode, units, memory=10_000))
    assert_blocks_equal(work, abm.hyperplanes(chain.network, chain.x, "2", mode, units))


def test_predicted_units(traced_case):
    """Each image has its own output."""
    flat = traced_case("residual-with-zero-padded-channels")
    work = stream(Query.of(flat.network, flat.x, "fc", "RM0", "predicted", memory=2_000))
    assert len(work.blocks) == 2
    assert_blocks_equal(work, abm.hyperplanes(flat.network, flat.x, "fc", "RM0", "predicted"))


@pytest.mark.parametrize("method", ["adjoint", "basis", "coloured", "windowed", "windowed-adjoint"])
def test_every_method_gives_the_same_form(chain, method):
    """Patches on the receptive field, from a method that gives whole images too."""
    work = stream(Query.of(chain.network, chain.x, "2", "RM2", method=method, memory=60_000))
    assert work.method == method
    image = work.compute(work.blocks[0]).image_part
    assert isinstance(image, Patches)
    assert image.values.shape[-2:] == (5, 5)
    assert_blocks_equal(work, abm.hyperplanes(chain.network, chain.x, "2", "RM2", method="adjoint"))


def test_other_arguments_reach_the_blocks(chain):
    """Own bias, k and dtype."""
    network = chain.network
    x = chain.x.float()
    given = {"own_bias": False, "scale": 0.5, "dtype": torch.float32}
    blocks = list(abm.iter_hyperplanes(network, x, "2", "RM2", memory="10kB", **given))
    whole = abm.hyperplanes(network, x, "2", "RM2", **given)
    assert (blocks[0].own_bias, blocks[0].scale, blocks[0].value.dtype) == (
        False,
        0.5,
        torch.float32,
    )
    found = torch.cat([b.image.flatten(0, -4) for b in blocks])
    torch.testing.assert_close(found, whole.image.flatten(0, -4), rtol=1e-5, atol=1e-6)


def test_blocks_are_whole_rows_and_fit(chain):
    """Half of the memory holds the result; a block takes whole rows of the map where one fits."""
    for memory in (10_000, 40_000, 160_000):
        work = stream(Query.of(chain.network, chain.x, "2", "RM2", memory=memory))
        assert work.plan.bytes <= memory // 2
        assert work.block in {
            (1, 1, 1, 4),
            (1, 1, 2, 4),
            (1, 1, 4, 4),
            (1, 2, 4, 4),
            (1, 4, 4, 4),
            (1, 3, 4, 4),
            (2, 4, 4, 4),
        }


def test_the_estimate_names_number_method_and_size(chain):
    """What the command map shows before it starts."""
    work = stream(Query.of(chain.network, chain.x, "2", "RM2", method="adjoint", memory="10kB"))
    kib = 128 * (2 * 25 + 7 + 1) * 8 / 2**10
    assert str(work).startswith(f"128 hyperplanes in {len(work.blocks)} blocks, adjoint, at most ")
    assert str(work).endswith(f" multiply-adds, at most {kib:.3g} KiB")


REFUSED = {
    "memory": (
        {"memory": 100},
        r"memory must be at least [\d,]+ bytes for one hyperplane of '2'. Got 100: raise memory.",
    ),
    "memory-text": ({"memory": "much"}, "memory must be a number of bytes or such as '2GiB'"),
    "method": ({"method": "guess"}, "method must be one of .* Got 'guess'"),
    "unit": ({"units": (9, 0, 0)}, "units must lie in"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_bad_arguments_are_refused_at_the_call(chain, refused):
    """Before the first block is asked for."""
    given, message = REFUSED[refused]
    with pytest.raises(ValueError, match=message):
        abm.iter_hyperplanes(chain.network, chain.x, "2", "RM2", **given)


def test_the_memory_that_a_refusal_names_suffices(chain):
    """What to do is what helps."""
    with pytest.raises(ValueError, match="memory must be at least") as refusal:
        stream(Query.of(chain.network, chain.x, "2", "RM4", memory=100))
    least = int(str(refusal.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert stream(Query.of(chain.network, chain.x, "2", "RM4", memory=least)).block == (
        1,
        1,
        1,
        1,
        1,
    )


def test_a_batch_takes_several_images_in_a_block():
    """Where all units of several images fit, a block is a range of images."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    )
    x = torch.rand(7, 3, 2, 2, dtype=torch.float64)
    network = abm.trace(model, x)
    work = stream(Query.of(network, x, "3", "RM0", memory=2 * 3 * 2 * (12 + 7) * 8))
    assert work.block == (3, 2)
    assert_blocks_equal(work, abm.hyperplanes(network, x, "3", "RM0"))


def test_tiles_cover_a_region_once():
    """Also where the step does not divide it, and a step of a block of units."""
    step = block_shape((3, 5, 4), 9)
    assert step == (1, 2, 4)
    covered = torch.zeros(3, 5, 4)
    for tile in tiles([slice(0, 3), slice(0, 5), slice(0, 4)], step):
        covered[tile] += 1
    assert (covered == 1).all()
    assert tiles([], ()) == [()]


def test_units_of_a_block_are_a_selection(chain):
    """Their places are those in the layer, not in the block."""
    work = stream(Query.of(chain.network, chain.x, "2", "RM2", memory="10kB"))
    selection = work.compute(work.blocks[-1]).units
    assert selection.coordinates()["out_row"].unique().tolist() == [3]
    assert selection.dims == select(selection.dims, None, 1).dims
