"""What if the image were another: the gates of a unit that flip, and its hyperplane after that.

All numbers are float64 where the network can be computed in it. The end of a linear region is
often closer than the rounding of float32.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.analysis.boundaries import boundaries
from adjointbackmap.analysis.crossings import reach
from adjointbackmap.analysis.kinks import kink_distances, layer_names, step_name, step_names
from adjointbackmap.analysis.lines import region_line
from adjointbackmap.attacks import Attack, basic_iterative
from adjointbackmap.engine.pattern import ActivationPattern
from adjointbackmap.explorer.answers import packed
from adjointbackmap.explorer.held import Held, cone_of
from adjointbackmap.explorer.panels import Place, on_field
from adjointbackmap.explorer.session import Loaded, Session
from adjointbackmap.planes.single import SingleHyperplane

Part = tuple[slice, ...] | None
"""Part of a map: a slice along each axis; ``None`` for all of it."""
Cone = dict[int, Part]
NOWHERE: Part = ()
BEYOND = 1e-3  # the image is moved this share of the step beyond a kink or a boundary
STEP = 1 / 255  # length of a step of the attack, in pixels
STEPS = 50  # most steps of the attack
MOST_REGIONS = 10_000  # of the whole network, through which a slider's line is walked


@dataclass(frozen=True, eq=False)
class Compared:
    """A unit at the image and at another image.

    Attributes:
        loaded: The network.
        before: The network at the image.
        after: The network at the other image.
        plane: The hyperplane of the unit at the image.
    """

    loaded: Loaded
    before: Held
    after: Held
    plane: SingleHyperplane

    def flipped(self) -> dict[str, int]:
        """Gates of the unit that flip, for each operation that has any."""
        return flips(self.before.pattern, self.after.pattern, cone_of(self.plane))


def precise(session: Session, place: Place) -> tuple[Loaded, Tensor, Held]:
    """A network at an image in float64, if it can be computed in it, and the pixels."""
    loaded = session.load(place.net)
    network = loaded.network
    dtype = torch.float64 if network.is_computed_in(torch.float64) else network.dtype
    pixels = session.pixels(place.net, place.img)[0].to(dtype)
    return (
        loaded,
        pixels,
        session.keep(
            (place.net, place.img, "precise"),
            lambda: Held.of(network, session.prepared(loaded, pixels), dtype),
        ),
    )


def compared(session: Session, place: Place, pixels: Tensor) -> Compared:
    """The unit at the image and at other pixels.

    Raises:
        ValueError: If the pixels have another shape.
    """
    loaded, own, before = precise(session, place)
    if pixels.numel() != own.numel():
        msg = f"The edited image must have {own.numel()} numbers. Got {pixels.numel()}."
        raise ValueError(msg)
    x = session.prepared(loaded, pixels.to(own.dtype).view_as(own))
    after = Held.of(loaded.network, x, own.dtype)
    return Compared(loaded, before, after, place.single(before))


def whatif_answer(session: Session, place: Place, pixels: Tensor) -> bytes:
    """What becomes of a unit where the image is edited."""
    found = compared(session, place, pixels)
    flipped = found.flipped()
    before = found.plane
    after = place.single(found.after)
    # the hyperplane of the first image, applied to the other one
    terms = before.image.double() * after.x.double()
    biases = sum(before.bias_contributions().values())
    scores = found.after.scores()
    best = None if scores is None else int(scores.argmax())
    head = {
        "same": not flipped,
        "flipped": [{"name": name, "count": n} for name, n in flipped.items()],
        "count": sum(flipped.values()),
        "old": float(terms.sum()) + biases,
        "value": after.value,
        "before": before.value,
        "predicted": best,
        "prediction": None if best is None else found.loaded.class_name(best),
    }
    arrays = {
        "before": on_field(before, before.image),
        "after": on_field(before, after.image),
    }
    return packed(head, arrays if scores is None else {**arrays, "scores": scores})


def flips(before: ActivationPattern, after: ActivationPattern, cone: Cone) -> dict[str, int]:
    """Gates that differ between two images, for each operation that has any.

    Args:
        before: The pattern at one image.
        after: The pattern at the other one.
        cone: Slot -> part of its map; other slots are left out.
    """
    steps = [step for step in before.program.steps if step.output.slot in before.gates]
    names = step_names(before.network, steps)
    found = {}
    for step, name in zip(steps, names, strict=True):
        slot = step.output.slot
        if slot in cone:
            pairs = zip(before.gates[slot], after.gates[slot], strict=True)
            count = sum(int((_cut(a, cone[slot]) != _cut(b, cone[slot])).sum()) for a, b in pairs)
            if count:
                found[name] = count
    return found


def _cut(gate: Tensor, part: Part) -> Tensor:
    """The part of a gate on some positions; all of it where it has none."""
    if part is None or gate.dim() != 2 + len(part):
        return gate
    fits = [1 if n == 1 else 0 for n in gate.shape[2:]]
    where = [slice(None) if one else s for one, s in zip(fits, part, strict=True)]
    return gate[:, :, *where]


# where to move the image


def kink_answer(session: Session, place: Place) -> bytes:
    """The image just beyond the nearest kink that belongs to a unit.

    Raises:
        ValueError: If no kink can be reached.
    """
    loaded, pixels, held = precise(session, place)
    plane = place.single(held)
    distances = kink_distances(loaded.network, held.x, held.x.dtype, torch.float32, held.pattern)
    parts = _watched_parts(held.pattern, cone_of(plane))
    masked = {
        w.name: _only(found, parts.get(w.value.slot, parts.get(_base(w.name), NOWHERE)))
        for w, found in ((w, distances.distances[w.name]) for w in distances.watched)
    }
    kink = replace(distances, distances=masked).nearest("l2")
    if kink is None:
        msg = f"{plane.name} must have a kink that can be reached. Got none: choose another unit."
        raise ValueError(msg)
    step = kink.step("l2") * (1 + BEYOND) * loaded.std
    words = f"the kink of {kink.name}, unit {', '.join(map(str, kink.unit))}"
    head = {"what": words, "distance": float(step.norm())}
    return packed(head, _split(pixels + step))


def _watched_parts(pattern: ActivationPattern, cone: Cone) -> dict[int | str, Part]:
    """The parts of a unit's gates, by the slot that a gate reads and by its operation's name."""
    names = layer_names(pattern.network)
    found: dict[int | str, Part] = {}
    for step in pattern.program.steps:
        slot = step.output.slot
        if slot in cone and slot in pattern.gates:
            found[step.inputs[0].slot] = cone[slot]
            found[step_name(names, step)] = cone[slot]
    return found


def _only(distances: Tensor, part: Part) -> Tensor:
    """Distances of some units that are not zero; infinite elsewhere."""
    # zero: values that are equal, such as those of a pool whose units are all off; no gate flips
    apart = distances.where(distances > 0, torch.inf)
    if part is None or (part and distances.dim() != 2 + len(part)):
        return apart
    blank = torch.full_like(distances, torch.inf)
    if part:  # (norm, channel, *positions)
        where = (slice(None), slice(None), *part)
        blank[where] = apart[where]
    return blank


def _base(name: str) -> str:
    """Name of an operation, without the number of a watched value."""
    return name.partition("#")[0].partition("[")[0]


def _class_scores(held: Held, what: str) -> Tensor:
    """The scores of the classes.

    Raises:
        ValueError: If the network has no classes.
    """
    scores = held.scores()
    if scores is None or len(scores) < 2:
        msg = f"{what} needs a network with two classes or more. Got one without."
        raise ValueError(msg)
    return scores


def boundary_answer(session: Session, place: Place) -> bytes:
    """The image just beyond the nearest class boundary of its linear region.

    Raises:
        ValueError: If the network has no classes.
    """
    loaded, pixels, held = precise(session, place)
    scores = _class_scores(held, "A boundary")
    best = int(scores.argmax())
    others = [c for c in range(len(scores)) if c != best]
    prepare = loaded.subject.prepare
    planes = boundaries(loaded.network, pixels, best, others, prepare)
    nearest = min(planes, key=lambda plane: plane.distance("l2"))
    inside = reach(loaded.network, [nearest], "l2", prepare)[0].in_region
    step = nearest.step("l2") * (1 + BEYOND)
    where = "inside the linear region" if inside else "beyond the linear region"
    words = f"the boundary to {loaded.class_name(nearest.second)}, {where}"
    return packed({"what": words, "distance": float(step.norm())}, _split(pixels + step))


def attack_answer(session: Session, place: Place) -> bytes:
    """The image at the end of an attack on the predicted class.

    Raises:
        ValueError: If the network has no classes.
    """
    loaded, pixels, held = precise(session, place)
    scores = _class_scores(held, "An attack")
    attack = Attack(STEP, iterations=STEPS, until_success=True)
    found = basic_iterative(
        loaded.subject.module,
        pixels[None].float(),
        scores.argmax()[None],
        attack,
        loaded.subject.prepare,
    )
    end = found.adversarial[0].double()
    head = {"what": "an attack on the predicted class", "distance": float((end - pixels).norm())}
    return packed(head, _split(end))


def _split(pixels: Tensor) -> dict[str, Tensor]:
    """Float64 as the sum of two arrays of float32, which an answer can hold."""
    high = pixels.float()
    return {"pixels": high, "rest": (pixels - high.double()).float()}


def breakpoints_answer(session: Session, place: Place, end: Tensor, regions: int) -> dict[str, Any]:
    """Where gates of a unit flip on the way from the image to another one.

    Args:
        session: What can be shown.
        place: The unit.
        end: Pixels at the end of the way.
        regions: Number of regions of the whole network to walk through. A later call with more of
            them goes on where this one stops.
    """
    loaded, pixels, held = precise(session, place)
    plane = place.single(held)
    most = min(max(1, regions), MOST_REGIONS)
    key = (place.net, place.img, end.numpy().tobytes())
    if session.line is not None and session.line[0] == key:
        line = session.line[1].resume(most)
    else:
        x = session.prepared(loaded, end.to(pixels.dtype).view_as(pixels))
        line = region_line(loaded.network, held.x, x[0], regions=most)
    session.line = (key, line)
    cone = cone_of(plane)
    parts = {
        name: cone[step.output.slot]
        for name, step in zip(
            step_names(loaded.network, line.walk.steps), line.walk.steps, strict=True
        )
        if step.output.slot in cone
    }
    ticks = [
        t
        for t, flipped in zip(line.t[1:-1].tolist(), line.flips, strict=True)
        if any(flip.name in parts and _within(flip.unit, parts[flip.name]) for flip in flipped)
    ]
    until = float(line.t[-1])
    is_last = line.complete or line.regions >= MOST_REGIONS
    return {"t": ticks, "regions": line.regions, "until": until, "last": is_last}


def _within(unit: tuple[int, ...], part: Part) -> bool:
    """Whether a unit of an operation lies in a part of its map."""
    if part is None or len(unit) != 1 + len(part):
        return True
    return all(s.start <= n < s.stop for n, s in zip(unit[1:], part, strict=True))
