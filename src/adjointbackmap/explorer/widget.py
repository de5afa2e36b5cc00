"""The explorer as a widget: the same page in a notebook, which the kernel answers."""

from concurrent.futures import Future
from functools import partial
from typing import Any

import anywidget
import traitlets

from adjointbackmap.explorer.pages import IN_NOTEBOOK, MOST_BYTES, REFUSED, STATIC, one_file
from adjointbackmap.explorer.questions import Desk
from adjointbackmap.explorer.session import Session


class ExplorerWidget(anywidget.AnyWidget):
    """The explorer in a notebook, see :func:`adjointbackmap.explore`.

    Attributes:
        view: What is seen, as the address of the explorer's page has it, such as
            ``"#layer=conv3&unit=9,6,5&mode=RM2&view=xH"``. It follows the page, and the page
            follows it.
    """

    _esm = (STATIC / "widget.js").read_text()
    _page = traitlets.Unicode().tag(sync=True)
    view = traitlets.Unicode().tag(sync=True)

    def __init__(self, session: Session, view: str = "") -> None:
        super().__init__(_page=one_file(IN_NOTEBOOK), view=view)
        self.desk = Desk(session)
        self.desk.prepare()
        self.on_msg(self._asked)

    def close(self) -> None:
        """Remove the widget, and end its threads."""
        super().close()
        self.desk.close()

    def _asked(self, widget: Any, content: dict[str, Any], buffers: list[Any]) -> None:
        """Queue a question of the page. The answer is sent by the thread that computes it."""
        number = content["id"]
        question = content["question"]
        body = bytes(buffers[0]) if buffers else b""
        if question == "start":
            self.send({"id": number, "json": self.desk.start()})
        elif question not in self.desk.questions:
            self.send({"id": number, "error": "There is no such question."})
        elif len(body) > MOST_BYTES:
            limit = MOST_BYTES // 2**20
            self.send({"id": number, "error": f"A picture must have at most {limit} MiB."})
        else:
            words = content["words"]
            channel = words.get("channel", number)
            work = self.desk.ask(question, words, body, channel)
            work.add_done_callback(partial(self._answer, number))

    def _answer(self, number: str, work: "Future[Any]") -> None:
        """Send what was computed, or why nothing was."""
        if work.cancelled():
            self.send({"id": number, "dropped": True})
            return
        try:
            answer = work.result()
        except REFUSED as error:
            self.send({"id": number, "error": str(error)})
            return
        if isinstance(answer, dict):
            self.send({"id": number, "json": answer})
        else:
            self.send({"id": number}, [answer])
