"""What hyperplanes say of themselves."""

from typing import TYPE_CHECKING

from adjointbackmap.display import Summary, by, range_of, shown_html
from adjointbackmap.engine.patches import Patches
from adjointbackmap.planes.single import SingleHyperplane, single

if TYPE_CHECKING:
    from adjointbackmap.planes.hyperplane import Hyperplanes


def of_hyperplanes(planes: "Hyperplanes") -> Summary:
    """Which units they are of, their values, and the sizes of their parts."""
    units = planes.units
    extents = (f"{name} {n}" for name, n in zip(units.names, units.shape, strict=True))
    along = f" ({', '.join(extents)})" if units.shape else ""
    part = planes.image_part
    shape = by(planes.x.shape[1:])
    if isinstance(part, Patches):
        size = f"patches of {by(part.values.shape[-2:])} pixels in images of {shape}"
    else:
        size = shape
    dtype = str(planes.value.dtype).removeprefix("torch.")
    facts = {
        "images": f"{len(planes.x)}, {dtype}",
        "units": f"{units.count:,}{along}",
        "value": range_of(planes.value),
        "image part": size,
        "bias part": f"{len(planes.entries):,} of M = {len(planes.network.biases):,} biases",
    }
    if planes.network.note:
        facts["gates"] = planes.network.note
    own = "" if planes.own_bias else ", without the layer's own bias"
    scale = "" if planes.scale == 1 else f", k = {planes.scale:g}"
    return Summary(f"Hyperplanes of {planes.layer} in {planes.mode}{own}{scale}", facts)


def first_of(planes: "Hyperplanes") -> SingleHyperplane:
    """The hyperplane of the first unit at the first image, for a picture."""
    return single(planes, (0,) * len(planes.units.shape))


def html_of(planes: "Hyperplanes") -> str:
    """The summary, and the first unit with its pictures."""
    first = first_of(planes)
    about = of_hyperplanes(planes)
    one = planes.value.numel() == 1
    heading = "" if one else " of the first unit"
    added = {f"{name}{heading}": words for name, words in first._summary().facts.items()}
    whole = Summary(about.title, {**about.facts, **added}, about.tables)
    return shown_html(whole, first._pictures())
