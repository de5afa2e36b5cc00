"""The explorer as one file: a page with its answers, which needs no server."""

import base64
import gzip
import json
from collections.abc import Iterator
from itertools import product
from typing import Any
from urllib.parse import urlencode

from adjointbackmap.engine.layers import Layer
from adjointbackmap.explorer import panels
from adjointbackmap.explorer.answers import packed, unpacked
from adjointbackmap.explorer.held import is_drawn, tiles_of
from adjointbackmap.explorer.pages import one_file
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.session import Session
from adjointbackmap.planes.units import unit_dims

MOST_BYTES = 20 * 10**6  # of the file, by default
COMPRESSED = 0.75  # of base64's 4 bytes for 3, what is left after compression, about


def exported(
    session: Session, layer: str | None = None, most: int = MOST_BYTES, channels: int | None = None
) -> tuple[str, dict[str, int]]:
    """A page for the first network at the first image.

    It has the units of RM0 and RM1 of all layers, and of one layer those of RM2, in float16.

    Args:
        session: What can be shown.
        layer: The layer whose units are in the page; by default one in the middle.
        most: Largest size of the file in bytes. Channels of the layer whose units do not fit are
            left out.
        channels: Most channels of each layer; by default all.

    Returns:
        The page as HTML, and the number of units of RM2 in it, by layer.

    Raises:
        ValueError: If there is no such layer, no channel is wanted, or the network reads sentences.
    """
    if channels is not None and channels < 1:
        msg = f"--export-channels must be 1 or more. Got {channels}: leave it out for all."
        raise ValueError(msg)
    place = Place(session.first_network, session.first_image)
    if session.reads(place.net):
        msg = (
            "--export must have a network of pictures. Got one that reads sentences: "
            f'adjointbackmap text "..." --network {place.net} --html FILE.'
        )
        raise ValueError(msg)
    network = session.at(place.net, place.img).network
    layers = [each for each in network.distinct_layers() if is_drawn(each)]
    chosen = network.layer(layer) if layer is not None else _middle(layers)
    shown = {each.name: _shown_tiles(each, channels) for each in layers}
    answers = dict(_always(session, place, layers, shown))
    size = sum(len(content) for content in answers.values())
    count = complete = 0
    for channel in range(shown[chosen.name]):
        found = dict(_units(session, place, chosen, "RM2", channel))
        size += sum(len(content) for content in found.values())
        if not found or size > most * COMPRESSED:
            break
        answers |= found
        count += len(found)
        complete += 1
    if complete:
        shown[chosen.name] = complete
    at = Place(place.net, place.img, chosen.name)
    answers[f"maps {chosen.name}"] = halved(panels.maps_answer(session, at, 0, shown[chosen.name]))
    about = _about(session, place, shown, chosen.name if complete else None)
    start = {"networks": [place.net], "net": place.net, "img": place.img, "upload": 0}
    answers[_address("start")] = _json({**start, "layer": chosen.name})
    answers[_address("network", net=place.net)] = _json(about)
    return page(answers), {chosen.name: count}


def _shown_tiles(layer: Layer, most: int | None) -> int:
    """How many tiles of a layer are in the page. Outputs without a position are all in it."""
    tiles, rows, columns = tiles_of(layer)
    return tiles if most is None or rows * columns == 1 else min(tiles, most)


def _about(
    session: Session, place: Place, shown: dict[str, int], chosen: str | None
) -> dict[str, Any]:
    """The layers of the network, with the tiles and the modes that are in the page."""
    found = panels.network_answer(session, place)
    for layer in found["layers"]:
        _, rows, columns = layer["tiles"]
        layer["tiles"] = (shown[layer["name"]], rows, columns)
        there = {"RM0", "RM1", "RM2"} if layer["name"] == chosen else {"RM0", "RM1"}
        layer["modes"] = {mode: dims for mode, dims in layer["modes"].items() if mode in there}
    # a layer with positions but without channels has no unit in the page
    found["layers"] = [layer for layer in found["layers"] if layer["modes"]]
    return found


def _middle(layers: list[Layer]) -> Layer:
    kernels = [layer for layer in layers if "RM4" in layer.modes]
    return kernels[len(kernels) // 2] if kernels else layers[0]


def _address(question: str, **words: Any) -> str:
    """The address under which the page asks for an answer."""
    return f"api/{question}?{urlencode(words)}"


def _always(
    session: Session, place: Place, layers: list[Layer], shown: dict[str, int]
) -> Iterator[tuple[str, bytes]]:
    """The answers that each page has: image, maps, and the units of RM0 and RM1."""
    overview = panels.overview_answer(session, place)
    yield _address("overview", net=place.net, img=place.img), overview
    for layer in layers:
        at = Place(place.net, place.img, layer.name)
        yield f"maps {layer.name}", halved(panels.maps_answer(session, at, 0, shown[layer.name]))
        for channel in range(shown[layer.name]):
            for mode in ("RM0", "RM1"):
                yield from _units(session, place, layer, mode, channel)


def _units(
    session: Session, place: Place, layer: Layer, mode: str, channel: int
) -> Iterator[tuple[str, bytes]]:
    """The answers for all units of a channel in a mode."""
    if mode not in layer.modes:
        return
    *positions, _ = unit_dims(layer, mode).values()  # the channel is the last number of a unit
    for where in product(*map(range, positions)):
        unit = ",".join(map(str, (*where, channel)))
        at = Place(place.net, place.img, layer.name, unit, mode)
        words = {"net": at.net, "img": at.img, "layer": at.layer, "unit": unit, "mode": mode}
        yield _address("unit", **words), halved(panels.unit_answer(session, at))


def _json(answer: dict[str, Any]) -> bytes:
    """A JSON answer as a head without arrays."""
    return packed(answer, {})


def halved(content: bytes) -> bytes:
    """An answer whose arrays are float16.

    Example:
        >>> import numpy as np
        >>> content = packed({}, {"H": np.full(800, 0.5)})  # packed as float32
        >>> len(halved(content)) < 0.6 * len(content)
        True
    """
    head, arrays = unpacked(content)
    listed = [{"name": name, "shape": array.shape} for name, array in arrays.items()]
    text = json.dumps({**head, "arrays": listed, "half": True}).encode()
    text += b" " * (-len(text) % 4)
    parts = [len(text).to_bytes(4, "little"), text]
    return b"".join([*parts, *(array.astype("<f2").tobytes() for array in arrays.values())])


def page(answers: dict[str, bytes]) -> str:
    """The page with its answers in one file."""
    places = {}
    start = 0
    for address, content in answers.items():
        places[address] = [start, start + len(content)]
        start += len(content)
    head = json.dumps(places).encode()
    blob = len(head).to_bytes(4, "little") + head + b"".join(answers.values())
    data = base64.b64encode(gzip.compress(blob, 6)).decode()
    return one_file(f'<script type="application/octet-stream" id="answers">{data}</script>')
