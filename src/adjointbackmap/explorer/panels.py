"""The answers about a network at an image: its layers, its maps, a unit, and how modes add up."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointbackmap.display import words_of_work
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.explorer.answers import packed
from adjointbackmap.explorer.held import Held, box_of, is_drawn, tiles_of
from adjointbackmap.explorer.session import Session
from adjointbackmap.planes.planner import plan
from adjointbackmap.planes.single import SingleHyperplane
from adjointbackmap.planes.units import unit_dims

FIRST_TILES = 3  # tiles of each layer in the overview
MOST_SIDE = 32  # pixels of a tile in the overview
MOST_PARTS = 12  # in-channels whose pictures are shown where modes add up


@dataclass(frozen=True)
class Place:
    """One unit of a network at an image, as the page names it.

    Attributes:
        net: Name of the network.
        img: Name of the picture.
        layer: Name of the layer.
        unit: Numbers of the unit, separated by commas.
        mode: Reconstruction mode.
    """

    net: str
    img: str
    layer: str = ""
    unit: str = ""
    mode: str = ""

    def numbers(self) -> tuple[int, ...]:
        """The unit as numbers.

        Raises:
            ValueError: If they are none.
        """
        try:
            return tuple(int(part) for part in self.unit.split(","))
        except ValueError:
            msg = f"unit must be numbers with commas, such as 4,1,2. Got {self.unit!r}."
            raise ValueError(msg) from None

    def single(self, held: Held) -> SingleHyperplane:
        """The hyperplane of the unit."""
        return held.single(self.layer, self.mode or None, self.numbers())


# the network


def network_answer(session: Session, place: Place) -> dict[str, Any]:
    """The layers of a network, their connections and its biases."""
    loaded = session.load(place.net)
    network = loaded.network
    subject = loaded.subject
    wanted = subject.preprocessing()
    return {
        **layers_answer(network),
        "name": place.net,
        "shape": subject.shape,
        "classes": subject.classes,
        "wanted": {"size": wanted.size, "resize": wanted.resize},
        "mean": wanted.mean,
        "std": wanted.std,
    }


def layers_answer(network: Network) -> dict[str, Any]:
    """The layers of a network, their connections and its biases."""
    before, skips = _connections(network)
    layers = [a for a in network.distinct_layers() if is_drawn(a)]
    return {
        # a layer that changes nothing, as a dropout of the input, is no step
        "layers": [{**_layer(network, each), "before": before.get(each.name)} for each in layers],
        "skips": skips,
        "biases": [
            {"name": b.name, "start": b.slice.start, "stop": b.slice.stop}
            for b in network.biases.values()
        ],
        "curved": network.curved_settings.get("curved", ""),
        "note": network.note,
    }


def _layer(network: Network, layer: Layer) -> dict[str, Any]:
    field = network.program().fields[layer.value.slot]
    in_channels = network.kernel(layer).rule.in_channels if layer.kernel is not None else 0
    return {
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.out_shape,
        "tiles": tiles_of(layer),
        "field": layer.receptive_field,
        "modes": {mode: unit_dims(layer, mode, in_channels) for mode in layer.modes},
        "units": prod(layer.out_shape),
        "work": words_of_work(_multiply_adds(network, layer, in_channels)),
        # of each axis: a position reads the pixels from position * step + low to ... + high
        "axes": [[float(a.step), float(a.low), float(a.high)] for a in field or ()],
    }


def _multiply_adds(network: Network, layer: Layer, in_channels: int) -> int:
    """Multiply-adds of the hyperplane of one unit, the one in the middle of the layer."""
    mode = "RM2" if "RM2" in layer.modes else layer.modes[0]
    middle = tuple(extent // 2 for extent in unit_dims(layer, mode, in_channels).values())
    return plan(network, layer.name, mode, units=middle, method="adjoint").multiply_adds


def _connections(network: Network) -> tuple[dict[str, str | None], list[tuple[str, str]]]:
    """How the layers are connected.

    Returns:
        Name of a layer -> the last layer that it reads; and the skip connections. A skip
        connection leads from a layer to the layer whose output its own is joined with.
    """
    names = {a.value.slot: a.name for a in network.distinct_layers() if is_drawn(a)}
    order = list(names.values())
    last: dict[int, str | None] = {}  # slot -> last layer that it depends on
    before: dict[str, str | None] = {}
    skips: dict[tuple[str, str], None] = {}  # a dict keeps the order, which a set does not
    for step in network.program().steps:
        seen = [name for value in step.inputs if (name := last.get(value.slot)) is not None]
        latest = max(seen, key=order.index, default=None)
        skips |= {(name, latest): None for name in seen if latest and name != latest}
        slot = step.output.slot
        if slot in names:
            before[names[slot]] = latest
        last[slot] = names.get(slot, latest)
    return before, list(skips)


# a network at an image


def overview_answer(session: Session, place: Place) -> bytes:
    """The image, the outputs, and the first tiles of each layer."""
    loaded = session.load(place.net)
    pixels, words = session.pixels(place.net, place.img)
    held = session.at(place.net, place.img)
    scores = held.scores()
    arrays: dict[str, Tensor] = {"pixels": pixels, "x": held.x}
    for layer in held.network.distinct_layers():
        if is_drawn(layer):
            arrays[f"tiles {layer.name}"] = small(held.maps(layer)[:FIRST_TILES])
    head: dict[str, Any] = {"words": words, "predicted": None}
    if scores is not None:
        arrays["scores"] = scores
        best = int(scores.argmax())
        head |= {"predicted": best, "prediction": loaded.class_name(best)}
    head["biases"] = held.network.biases.vector.tolist()
    return packed(head, arrays)


def small(maps: Tensor) -> Tensor:
    """Every second, third, ... row and column, so that a map has few pixels."""
    step = max(1, -(-max(maps.shape[1:]) // MOST_SIDE))
    return maps[:, ::step, ::step]


def maps_answer(session: Session, place: Place, start: int, count: int) -> bytes:
    """Some tiles of a layer."""
    held = session.at(place.net, place.img)
    layer = held.network.layer(place.layer)
    maps = held.maps(layer)
    stop = min(len(maps), max(0, start) + max(1, count))
    return packed({"start": start, "of": len(maps)}, {"maps": maps[max(0, start) : stop]})


def samples_answer(session: Session) -> bytes:
    """The pictures that can be shown, and small images of the samples."""
    from adjointbackmap import data
    from adjointbackmap.explorer.session import SAMPLES

    pictures = session.pictures()
    return packed({"pictures": pictures}, {"samples": data.sample().unit_interval()[:SAMPLES]})


# a unit


def unit_answer(session: Session, place: Place) -> bytes:
    """The hyperplane of a unit on its receptive field, and its receipt."""
    held = session.at(place.net, place.img)
    plane = place.single(held)
    head = {**unit_head(plane), "box": box_of(plane)}
    return packed(head, {"H": on_field(plane, plane.image), "H_b": plane.bias})


def unit_head(plane: SingleHyperplane) -> dict[str, Any]:
    """The receipt of a unit."""
    pixels = float(plane.contributions().sum())
    biases = plane.bias_contributions()
    total = pixels + sum(biases.values())
    return {
        "name": plane.name,
        "layer": plane.layer,
        "mode": plane.mode,
        "unit": list(plane.place.values()),
        "value": plane.value,
        "pixels": pixels,
        "biases": [{"name": name, "adds": adds} for name, adds in biases.items()],
        "sum": total,
        "error": total - plane.value,
    }


def on_field(plane: SingleHyperplane, image: Tensor) -> Tensor:
    """A map of the image's size, cut to the receptive field of a unit."""
    row, column, rows, columns = box_of(plane)
    return image[:, row : row + rows, column : column + columns]


def modes_answer(session: Session, place: Place) -> bytes:
    """How the hyperplanes of one mode add up to that of another.

    RM4 is summed over in-channels to RM2, RM4 over positions to RM3, RM3 over in-channels to RM1.
    """
    held = session.at(place.net, place.img)
    layer = held.network.layer(place.layer)
    numbers = place.numbers()
    sums = [
        _over_in_channels(held, layer, mode, numbers)
        for mode in ("RM4", "RM3")
        if {mode, "RM2"} <= set(layer.modes)
    ]
    arrays: dict[str, Tensor] = {}
    for found in sums:
        arrays |= found.pop("arrays")
    return packed({"sums": sums}, arrays)


def _over_in_channels(
    held: Held, layer: Layer, mode: str, numbers: tuple[int, ...]
) -> dict[str, Any]:
    """The hyperplanes of all in-channels of one unit, and their sum."""
    *positions, channel = numbers
    unit = (slice(None), channel) if mode == "RM3" else (*positions, slice(None), channel)
    planes = held.planes(layer.name, mode, unit)
    values = planes.value[0]
    images = planes.image[0]
    into = "RM1" if mode == "RM3" else "RM2"
    whole = held.single(layer.name, into, numbers[-1:] if into == "RM1" else numbers)
    summed = images.sum(0)
    most = values.abs().argsort(descending=True)[:MOST_PARTS]
    return {
        "from": mode,
        "into": into,
        "values": values.tolist(),
        "shown": most.tolist(),
        "value": whole.value,
        "own": whole.value - float(values.double().sum()),
        "difference": float((summed - whole.image).abs().max()),
        "largest": float(whole.image.abs().max()),
        "arrays": {
            f"{mode} parts": torch.stack([on_field(whole, images[n]) for n in most.tolist()]),
            f"{into} sum": on_field(whole, summed),
        },
    }


# numbers to take away


def npz_answer(session: Session, place: Place) -> bytes:
    """The numbers of a unit as a file of NumPy."""
    import io

    held = session.at(place.net, place.img)
    plane = place.single(held)
    arrays = dict(_numbers(plane))
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def _numbers(plane: SingleHyperplane) -> Iterator[tuple[str, np.ndarray]]:
    yield "H", plane.image.cpu().numpy()
    yield "H_b", plane.bias.cpu().numpy()
    yield "x", plane.x.cpu().numpy()
    yield "b", plane.network.biases_in(plane.x.dtype).vector.cpu().numpy()
    yield "value", np.array(plane.value)
    yield "unit", np.array(list(plane.place.values()))
