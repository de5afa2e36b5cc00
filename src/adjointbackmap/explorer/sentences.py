"""The explorer's answers about networks that read sentences: words in the place of pixels."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from adjointbackmap.engine.layers import Layer
from adjointbackmap.explorer import panels
from adjointbackmap.explorer.answers import packed
from adjointbackmap.explorer.held import is_drawn
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.session import Session
from adjointbackmap.text.words import MOST_WORDS, tokenise

Answer = bytes | dict[str, Any]


def network_answer(session: Session, place: Place) -> dict[str, Any]:
    """The layers of a network, each drawn as one tile, their connections and the biases."""
    reader = session.reader(place.net)
    shown = panels.layers_answer(reader.network)
    for layer in shown["layers"]:
        layer |= {"tiles": _tile(tuple(layer["shape"]), MOST_WORDS), "one": len(layer["shape"]) > 1}
        layer["axes"] = []  # a receptive field is some of the words, and no box
    return {
        **shown,
        "name": place.net,
        "text": True,
        "shape": [1, *reader.network.in_shape],
        "classes": reader.classes,
    }


def overview_answer(session: Session, place: Place) -> bytes:
    """The words, the outputs, and a small map of each layer."""
    reader = session.reader(place.net)
    held = session.at(place.net, place.img)
    words = tokenise(place.img)
    unknown = set(reader.vocabulary.unknown(place.img))
    layers = [each for each in held.network.distinct_layers() if is_drawn(each)]
    arrays = {
        f"tiles {each.name}": panels.small(
            _map(held.maps(each), each, len(words))[: panels.FIRST_TILES]
        )
        for each in layers
    }
    scores = held.scores()
    assert scores is not None  # both networks give a score for each class
    best = int(scores.argmax())
    head = {
        "words": f"{len(words)} of at most {MOST_WORDS} words and punctuation marks",
        "tokens": [{"word": word, "unknown": word in unknown} for word in words],
        "tiles": {each.name: _tile(each.out_shape, len(words)) for each in layers},
        "predicted": best,
        "prediction": reader.classes[best],
        "biases": held.network.biases.vector.tolist(),
    }
    return packed(head, {**arrays, "scores": scores})


def maps_answer(session: Session, place: Place, start: int, count: int) -> bytes:
    """A layer as one tile; its outputs without a position as a tile each."""
    held = session.at(place.net, place.img)
    layer = held.network.layer(place.layer)
    maps = _map(held.maps(layer), layer, len(tokenise(place.img)))
    part = maps[max(0, start) : max(0, start) + max(1, count)]
    return packed({"start": start, "of": len(maps)}, {"maps": part})


def unit_answer(session: Session, place: Place) -> bytes:
    """The hyperplane of a unit, what each word adds, and the receipt."""
    plane = place.single(session.at(place.net, place.img))
    words = tokenise(place.img)
    adds = plane.contributions().sum(-1).tolist()  # (T, D) -> one number for each word
    listed = [{"word": w, "adds": n} for w, n in zip(words, adds, strict=False)]
    head = {**panels.unit_head(plane), "words": listed}
    rows = slice(0, len(words))  # what fills the sentence up adds nothing
    arrays = {"H": plane.image[rows], "xH": plane.contributions()[rows], "H_b": plane.bias}
    return packed(head, arrays)


def _tile(shape: tuple[int, ...], words: int) -> tuple[int, int, int]:
    """How a layer is drawn: ``(tiles, rows, columns)``.

    A layer with positions is one tile, cut to the words of the sentence. Its positions are the rows
    ``(T, D)``, or the columns of a convolution ``(C, T)``. Numbers without a position have a tile
    each.
    """
    if len(shape) == 1:
        return (shape[0], 1, 1)
    if shape[0] == MOST_WORDS:
        return (1, words, shape[1])
    # a convolution of width w gives w - 1 positions more than it gets
    return (1, shape[0], words + shape[1] - MOST_WORDS)


def _map(maps: Tensor, layer: Layer, words: int) -> Tensor:
    """What a layer computes, in the shape of :func:`_tile`."""
    if len(layer.out_shape) == 1:
        return maps
    _, rows, columns = _tile(layer.out_shape, words)
    return maps.reshape(1, *layer.out_shape)[:, :rows, :columns]


def _maps(session: Session, place: Place, words: Mapping[str, str]) -> Answer:
    return maps_answer(session, place, int(words.get("start", 0)), int(words.get("count", 1)))


# Name of a question -> what answers it; the other questions are about pictures.
QUESTIONS: dict[str, Callable[[Session, Place, Mapping[str, str]], Answer]] = {
    "network": lambda s, p, w: network_answer(s, p),
    "overview": lambda s, p, w: overview_answer(s, p),
    "maps": _maps,
    "unit": lambda s, p, w: unit_answer(s, p),
    "npz": lambda s, p, w: panels.npz_answer(s, p),
}


def answer(question: str, session: Session, place: Place, words: Mapping[str, str]) -> Answer:
    """Answer a question about a network that reads sentences.

    Raises:
        ValueError: If the question is about pictures.
    """
    if question not in QUESTIONS:
        msg = (
            f"A network that reads sentences has no {question!r}. "
            f"Got {place.net}: choose a network of pictures."
        )
        raise ValueError(msg)
    return QUESTIONS[question](session, place, words)
