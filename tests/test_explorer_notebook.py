"""The explorer in a notebook: what the kernel answers, and the page in JupyterLab."""

import re
import shutil
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from explorer_session import SHAPE, Small
from in_jupyterlab import explorer_in, in_jupyterlab, run_cell
from nbclient import NotebookClient
from playwright import sync_api
from playwright.sync_api import expect

import adjointbackmap as abm
from adjointbackmap.explorer.answers import unpacked
from adjointbackmap.explorer.pages import MOST_BYTES

pytest.importorskip("anywidget", reason="anywidget is not installed", exc_type=ImportError)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120_000  # milliseconds; the machine may be busy
UNIT = {"layer": "conv2", "unit": "5,0,2", "mode": "RM2"}
SETTING_UP = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import adjointbackmap as abm
from explorer_session import Small

torch.manual_seed(0)
model = Small().eval()
view = "#layer=conv2&unit=5,0,2&mode=RM2"
widget = abm.explore(model, "frog", size=12, classes="abcd", view=view)
widget
"""


def small():
    """The network of the notebooks."""
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def widget():
    """A widget with the small network at a tensor that is its input."""
    torch.manual_seed(3)
    given = torch.randn(1, *SHAPE)
    made = abm.explore(small(), given, size=12, mean=0.4, std=0.5, classes="abcd")
    made.given = given
    yield made
    made.close()


def answered(widget, question, body=(), **words):
    """The messages that the widget sends for a question, until all work is done."""
    sent = []
    widget.send = lambda content, buffers=None: sent.append((content, buffers))
    session = widget.desk.session
    words = {"net": session.first_network, "img": session.first_image, **words}
    message = {"id": "7", "question": question, "words": words}
    widget._handle_custom_msg(message, list(body))
    for worker in (widget.desk.worker, widget.desk.slow):
        worker.submit("test", lambda: None).result()
    return sent


def test_the_kernel_answers_with_the_bytes_of_the_library(widget):
    """One message with the number of the question and a buffer."""
    ((content, (buffer,)),) = answered(widget, "unit", **UNIT)
    head, arrays = unpacked(buffer)
    model = small()
    planes = abm.hyperplanes(abm.trace(model, widget.given), widget.given, **query(UNIT))
    row, column, rows, columns = head["box"]
    found = planes.image[0, :, row : row + rows, column : column + columns]
    assert content == {"id": "7"}
    # the pixels that the page shows are normalised again, which rounds
    assert arrays["H"] == pytest.approx(found.numpy(), abs=1e-6)
    value = model.conv2(torch.relu(model.conv1(widget.given)))[0, 2, 5, 0]
    assert head["value"] == pytest.approx(float(value.detach()), abs=1e-5)


def query(words):
    """The words of a question as arguments of the library."""
    numbers = tuple(map(int, words["unit"].split(",")))
    return {"layer": words["layer"], "mode": words["mode"], "units": numbers}


@pytest.mark.parametrize(
    ("question", "words", "body", "match"),
    [
        ("unit", {**UNIT, "layer": "none"}, [], "A layer must be one of"),
        ("whatif", UNIT, [b"123"], "An edited image must be numbers"),
        ("upload", {}, [bytes(MOST_BYTES + 1)], "at most 20 MiB"),
        ("none", {}, [], "There is no such question"),
    ],
)
def test_bad_questions_get_one_sentence_of_the_kernel(widget, question, words, body, match):
    """Whatever is wrong with them."""
    ((content, _),) = answered(widget, question, body, **words)
    assert content["id"] == "7"
    assert match in content["error"]


def test_questions_that_nobody_waits_for_are_dropped(widget):
    """Of three questions of one panel, the one that waits is dropped."""
    sent = []
    widget.send = lambda content, buffers=None: sent.append(content)
    begun, wait = threading.Event(), threading.Event()
    widget.desk.worker.submit("test", lambda: (begun.set(), wait.wait(10)))
    begun.wait(10)
    for number in "12":
        message = {"id": number, "question": "samples", "words": {"channel": "panel"}}
        widget._handle_custom_msg(message, [])
    wait.set()
    widget.desk.worker.submit("test", lambda: None).result()
    assert sent == [{"id": "1", "dropped": True}, {"id": "2"}]


def test_a_network_that_is_traced_is_not_traced_again():
    """Its shape and its classes are known."""
    network = abm.trace(small(), torch.zeros(1, *SHAPE))
    picture = np.full((20, 30, 3), 200, np.uint8)
    widget = abm.explore(network, picture, classes=list("abcd"))
    session = widget.desk.session
    assert session.load("Small").network is network
    pixels, words = session.pixels("Small", session.first_image)
    assert words.startswith("your ndarray (resized to 12 x 18")
    assert pixels.shape == SHAPE
    assert float(pixels.max()) == pytest.approx(200 / 255)
    widget.close()


def test_what_a_notebook_cannot_show_is_refused(monkeypatch):
    """With one sentence each."""
    network = abm.trace(small(), torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="classes must be one name for each of 4 outputs"):
        abm.explore(network, "frog", classes="abc")
    flat = abm.trace(torch.nn.Sequential(torch.nn.Linear(5, 2)).eval(), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"pictures with 1 or 3 channels. Got inputs of \(5,\)"):
        abm.explore(flat, torch.zeros(1, 5))
    monkeypatch.delitem(sys.modules, "adjointbackmap.explorer.widget", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ImportError, match=r"explore needs anywidget.*adjointbackmap\[notebook\]"):
        abm.explore(network, "frog")


class Listening(NotebookClient):
    """Runs a notebook, and keeps the messages of its widgets."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "comm_msg":
            self.__dict__.setdefault("heard", []).append(msg)
        return super().process_message(msg, cell, cell_index)


def test_a_kernel_answers_in_a_notebook():
    """The widget is the output of its cell, and a question gets a message with a buffer."""
    asking = f"""words = {{"net": "Small", "img": widget.desk.session.first_image, **{UNIT!r}}}
widget._handle_custom_msg({{"id": "7", "question": "unit", "words": words}}, [])
widget.desk.worker.submit("test", lambda: None).result()
"""
    cells = [nbformat.v4.new_code_cell(text) for text in (SETTING_UP, asking)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = Listening(notebook, timeout=PATIENCE / 1000)
    client.execute()
    assert "application/vnd.jupyter.widget-view+json" in notebook.cells[0].outputs[0].data
    (message,) = [m for m in client.heard if m["content"]["data"].get("method") == "custom"]
    assert message["content"]["data"]["content"] == {"id": "7"}
    head, arrays = unpacked(bytes(message["buffers"][0]))
    frog = abm.image(pixels_of_frog(), size=12).detach()
    planes = abm.hyperplanes(abm.trace(small(), frog), frog, **query(UNIT))
    row, column, rows, columns = head["box"]
    found = planes.image[0, :, row : row + rows, column : column + columns]
    assert arrays["H"].tobytes() == found.numpy().tobytes()
    assert head["value"] == float(planes.value)


def pixels_of_frog():
    """The first frog of the sample."""
    sample = abm.data.sample()
    return sample.pixels[int((sample.labels == sample.classes.index("frog")).nonzero()[0])]


@pytest.fixture
def lab(tmp_path):
    """The address of a notebook in JupyterLab, which has its files in a folder of its own."""
    if find_spec("jupyterlab") is None or CHROMIUM is None:
        pytest.skip("there is no JupyterLab or no Chromium on this machine")
    with in_jupyterlab(tmp_path, [SETTING_UP, "widget.view"]) as address:
        yield address


def test_the_page_works_in_jupyterlab(lab):
    """Hover changes the picture, the receipt closes, and Python knows what is seen."""
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(lab)
        run_cell(page, 0)
        inside = explorer_in(page)
        assert inside.get_by_test_id("unit").inner_text() == "conv2, row 5, column 0, channel 2"
        tiles = inside.locator("#tiles")
        tiles.focus()
        before = inside.locator("#plane").evaluate("(canvas) => canvas.toDataURL()")
        tiles.press("ArrowDown")
        expect(inside.locator("#unit")).to_have_text("conv2, row 6, column 0, channel 2")
        model = small()
        frog = abm.image(pixels_of_frog(), size=12).detach()
        value = float(model.conv2(torch.relu(model.conv1(frog)))[0, 2, 6, 0].detach())
        shown = inside.get_by_test_id("receipt-sum")
        expect(shown).to_have_text(re.compile(f"{value:.4g}".replace("-", ".")), timeout=PATIENCE)
        assert inside.locator("#plane").evaluate("(canvas) => canvas.toDataURL()") != before
        page.wait_for_timeout(500)  # the kernel gets the view a little later
        run_cell(page, 1)
        page.get_by_text("unit=6,0,2&mode=RM2").first.wait_for()
        browser.close()
    assert errors == []
