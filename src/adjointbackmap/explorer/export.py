"""The explorer as one file: a page with its answers, which needs no server."""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from adjointbackmap.engine.layers import Layer
from adjointbackmap.explorer import panels
from adjointbackmap.explorer.answers import packed, unpacked
from adjointbackmap.explorer.held import is_drawn, tiles_of
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.session import Session
from adjointbackmap.planes.units import unit_dims

STATIC = Path(__file__).parent / "static"
# In the order of their imports: a module comes after those that it reads.
MODULES = ("net", "state", "draw", "network", "unit", "others", "whatif", "take", "main")
MOST_BYTES = 20 * 10**6  # of the file, by default
COMPRESSED = 0.75  # of base64's 4 bytes for 3, what is left after compression, about


def exported(
    session: Session, layer: str | None = None, most: int = MOST_BYTES
) -> tuple[str, dict[str, int]]:
    """A page for the first network at the first image.

    It has the units of RM0 and RM1 of all layers, and of one layer those of RM2, in float16.

    Args:
        session: What can be shown.
        layer: The layer whose units are in the page; by default one in the middle.
        most: Largest size of the file in bytes.

    Returns:
        The page as HTML, and the number of units of RM2 in it, by layer.

    Raises:
        ValueError: If there is no such layer.
    """
    place = Place(session.first_network, session.first_image)
    network = session.at(place.net, place.img).network
    layers = [each for each in network.distinct_layers() if is_drawn(each)]
    chosen = network.layer(layer) if layer is not None else _middle(layers)
    answers = dict(_always(session, place, layers))
    size = sum(len(content) for content in answers.values())
    count = 0
    for address, content in _units(session, place, chosen, "RM2"):
        if size + len(content) > most * COMPRESSED:
            break
        answers[address] = content
        size += len(content)
        count += 1
    return page(answers), {chosen.name: count}


def _middle(layers: list[Layer]) -> Layer:
    kernels = [layer for layer in layers if "RM4" in layer.modes]
    return kernels[len(kernels) // 2] if kernels else layers[0]


def _address(question: str, **words: Any) -> str:
    """The address under which the page asks for an answer."""
    return f"api/{question}?{urlencode(words)}"


def _always(session: Session, place: Place, layers: list[Layer]) -> Iterator[tuple[str, bytes]]:
    """The answers that each page has: network, image, maps, and the units of RM0 and RM1."""
    start = {"networks": [place.net], "net": place.net, "img": place.img, "upload": 0}
    yield _address("start"), _json(start)
    yield _address("network", net=place.net), _json(panels.network_answer(session, place))
    overview = panels.overview_answer(session, place)
    yield _address("overview", net=place.net, img=place.img), overview
    for layer in layers:
        at = Place(place.net, place.img, layer.name)
        yield f"maps {layer.name}", halved(panels.maps_answer(session, at, 0, tiles_of(layer)[0]))
        for mode in ("RM0", "RM1"):
            yield from _units(session, place, layer, mode)


def _units(session: Session, place: Place, layer: Layer, mode: str) -> Iterator[tuple[str, bytes]]:
    """The answers for all units of a layer in a mode, those of the first channels first."""
    if mode not in layer.modes:
        return
    dims = unit_dims(layer, mode)
    extents = tuple(dims.values())
    order = list(range(prod(extents)))
    if mode == "RM2":  # the channel is the last number of a unit: sort by it
        order.sort(key=lambda n: n % extents[-1])
    for n in order:
        unit = ",".join(str(int(i)) for i in np.unravel_index(n, extents))
        at = Place(place.net, place.img, layer.name, unit, mode)
        words = {"net": at.net, "img": at.img, "layer": at.layer, "unit": unit, "mode": mode}
        yield _address("unit", **words), halved(panels.unit_answer(session, at))


def _json(answer: dict[str, Any]) -> bytes:
    """A JSON answer as a head without arrays."""
    return packed(answer, {})


def halved(content: bytes) -> bytes:
    """An answer whose arrays are float16.

    Example:
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
    """The page with its style, its modules and its answers in one file."""
    html = (STATIC / "index.html").read_text()
    style = (STATIC / "style.css").read_text()
    urls = {f"explorer/{name}": _url(_module(name)) for name in MODULES}
    places = {}
    start = 0
    for address, content in answers.items():
        places[address] = [start, start + len(content)]
        start += len(content)
    head = json.dumps(places).encode()
    blob = len(head).to_bytes(4, "little") + head + b"".join(answers.values())
    data = base64.b64encode(gzip.compress(blob, 6)).decode()
    scripts = (
        f'<script type="importmap">{json.dumps({"imports": urls})}</script>\n'
        f'<script type="application/octet-stream" id="answers">{data}</script>\n'
        '<script type="module">import "explorer/main";</script>'
    )
    html = re.sub(r"<link rel=\"stylesheet\".*>", lambda _: f"<style>{style}</style>", html)
    return re.sub(r"<script type=\"module\".*</script>", lambda _: scripts, html)


def _module(name: str) -> str:
    """A module whose imports are found by the page's import map."""
    text = (STATIC / f"{name}.js").read_text()
    return re.sub(r'"\./(\w+)\.js"', r'"explorer/\1"', text)


def _url(text: str) -> str:
    encoded = base64.b64encode(text.encode()).decode()
    return f"data:text/javascript;base64,{encoded}"
