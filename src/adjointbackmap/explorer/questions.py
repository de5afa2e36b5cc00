"""The questions of the explorer's page, and who answers them: two threads."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from adjointbackmap.explorer import others, panels, sentences, whatif
from adjointbackmap.explorer.pages import MOST_BYTES
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.session import Session
from adjointbackmap.explorer.worker import Worker

Answer = bytes | dict[str, Any]
Words = Mapping[str, str]
Ask = Callable[[Session, Place, Words, bytes], Answer]


def _edited(body: bytes) -> torch.Tensor:
    """Pixels in float64 from the body of a request.

    Raises:
        ValueError: If the body is no list of numbers.
    """
    if len(body) % 8 or not body:
        msg = f"An edited image must be numbers of float64. Got {len(body)} bytes."
        raise ValueError(msg)
    return torch.frombuffer(bytearray(body), dtype=torch.float64)


def _maps(session: Session, place: Place, words: Words, body: bytes) -> Answer:
    start, count = (int(words.get(name, 1)) for name in ("start", "count"))
    return panels.maps_answer(session, place, start, count)


def _breakpoints(session: Session, place: Place, words: Words, body: bytes) -> Answer:
    regions = int(words.get("regions", 1))
    return whatif.breakpoints_answer(session, place, _edited(body), regions)


# Name of a question -> what answers it, in the worker's thread.
QUESTIONS: dict[str, Ask] = {
    "network": lambda s, p, w, b: panels.network_answer(s, p),
    "overview": lambda s, p, w, b: panels.overview_answer(s, p),
    "samples": lambda s, p, w, b: panels.samples_answer(s),
    "maps": _maps,
    "unit": lambda s, p, w, b: panels.unit_answer(s, p),
    "modes": lambda s, p, w, b: panels.modes_answer(s, p),
    "others": lambda s, p, w, b: others.others_answer(s, p),
    "npz": lambda s, p, w, b: panels.npz_answer(s, p),
    "kink": lambda s, p, w, b: whatif.kink_answer(s, p),
    "boundary": lambda s, p, w, b: whatif.boundary_answer(s, p),
    "attack": lambda s, p, w, b: whatif.attack_answer(s, p),
    "whatif": lambda s, p, w, b: whatif.whatif_answer(s, p, _edited(b)),
    "breakpoints": _breakpoints,
    "upload": lambda s, p, w, b: {"id": s.add(b, w.get("name", "picture"))},
}

# These take seconds. They have a thread of their own, so that units are shown meanwhile.
SLOW = frozenset({"kink", "boundary", "attack", "breakpoints", "others"})


class Desk:
    """Answers questions about a session, one at a time, and slow ones in a second thread.

    Args:
        session: What can be shown.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.worker = Worker()
        self.slow = Worker()

    questions = QUESTIONS

    def start(self) -> dict[str, Any]:
        """What the page shows first; it is known before the network is traced."""
        session = self.session
        return {
            "networks": session.names(),
            "net": session.first_network,
            "img": session.first_picture,
            "sentences": session.sentences(),
            "upload": MOST_BYTES,
        }

    def prepare(self) -> None:
        """Begin with what is shown first, before anybody asks."""
        session = self.session
        first = partial(session.at, session.first_network, session.first_image)
        self.worker.submit("start", first)

    def ask(self, question: str, words: Words, body: bytes, channel: str) -> "Future[Answer]":
        """Queue a question; an earlier one of the same channel that has not begun is dropped.

        Args:
            question: One of ``QUESTIONS``.
            words: What it is about: network, picture, layer, unit, mode and others.
            body: A picture or numbers.
            channel: Who asks, and for what: a tab and a panel.
        """
        names = ("net", "img", "layer", "unit", "mode")
        place = Place(*(words.get(name, "") for name in names))
        worker = self.slow if question in SLOW else self.worker
        if self.session.reads(place.net):
            work = partial(sentences.answer, question, self.session, place, words)
        else:
            work = partial(QUESTIONS[question], self.session, place, words, body)
        return worker.submit(channel, work)

    def close(self) -> None:
        """Drop what waits, and wait for what runs."""
        self.worker.close()
        self.slow.close()
