"""The explorer's page in the system's Chromium: pointer, keys, address, light and dark."""

import shutil
import threading

import pytest
import uvicorn
from explorer_session import small_session
from playwright import sync_api
from playwright.sync_api import expect

import adjointbackmap as abm
from adjointbackmap.explorer import whatif
from adjointbackmap.explorer.export import exported
from adjointbackmap.explorer.held import cone_of
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.running import _listening
from adjointbackmap.explorer.server import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
READY = "body[data-ready=yes]"
PATIENCE = 60_000  # milliseconds; the machine may be busy
DRAWN = """async (act) => {
  const drawn = new Promise((done) =>
    document.addEventListener("unit-drawn", done, { once: true }));
  const { x, y } = explorer.placeOf(act);
  const event = new PointerEvent("pointermove", { clientX: x, clientY: y, bubbles: true });
  document.getElementById("tiles").dispatchEvent(event);
  await drawn;
}"""


@pytest.fixture(scope="module")
def session():
    """A session with a small network."""
    return small_session()


@pytest.fixture(scope="module")
def address(session):
    """The address of a server that runs in a thread."""
    server = Server(session, "token")
    running = uvicorn.Server(uvicorn.Config(server.app(), log_level="error"))
    with _listening("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/token/"
        running.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    with sync_api.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def opened(browser, address):
    """Opens the page; no error on its console, and no request to anywhere else, until the end."""
    seen = []
    contexts = []

    def opened(words="", width=1280, height=800, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: seen.append((message.type, message.text)))
        page.on("pageerror", lambda error: seen.append(("error", str(error))))
        page.on("request", lambda request: seen.append(("request", request.url)))
        page.goto(address + words)
        page.wait_for_selector(READY)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for kind, text in seen if kind == "error"] == []
    outside = ("http://127.0.0.1", "data:", "blob:")
    assert [url for kind, url in seen if kind == "request" and not url.startswith(outside)] == []


def text(page, name):
    """What the page says under a test id."""
    return page.get_by_test_id(name).inner_text()


def number(page, name):
    """The number behind what the page says."""
    return float(page.get_by_test_id(name).get_attribute("data-value"))


def picture(page):
    """The canvas of the hyperplane."""
    return page.locator("#plane").evaluate("(canvas) => canvas.toDataURL()")


def test_hover_shows_a_unit_whose_receipt_closes(session, opened):
    """The picture changes, and the sum is the value that the library's record gives."""
    page = opened("#net=small&img=frog&layer=conv2")
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    if page.locator("#pinned").is_visible():
        page.locator("#tiles").press("Escape")
    before = picture(page)
    held = session.at("small", "frog")
    for row, col, channel in ((3, 4, 1), (8, 2, 5)):
        page.evaluate(DRAWN, {"row": row, "col": col, "channel": channel})
        assert text(page, "unit") == f"conv2, row {row}, column {col}, channel {channel}"
        assert picture(page) != before
        before = picture(page)
        value = float(held.recorded.outputs["conv2"][0, channel, row, col])
        assert number(page, "model-value") == value
        assert number(page, "receipt-sum") == pytest.approx(value, abs=1e-5)
        difference = number(page, "receipt-sum") - value
        assert number(page, "receipt-error") == pytest.approx(difference, abs=1e-12)


def test_a_kept_unit_stays_beside_the_next(session, opened):
    """The same unit of another picture; the words have both values of the model."""
    page = opened("#net=small&img=5&layer=conv2&unit=4,1,2&mode=RM2")
    page.locator("#keep").click()
    assert "Cosine of the two H: 1.000" in page.locator("#kept-words").inner_text()
    page.locator("#pictures button").nth(7).click()
    values = [
        float(session.at("small", name).recorded.outputs["conv2"][0, 2, 4, 1]) for name in "57"
    ]
    old, now = (f"{value:.3g}".replace("-", "\N{MINUS SIGN}") for value in values)
    words = page.locator("#kept-words")
    expect(words).to_contain_text(f"now {now}", timeout=PATIENCE)
    expect(words).to_contain_text(f"Its value is {old}")


def test_the_address_comes_back_to_the_same_view(opened):
    """Network, picture, layer, unit, mode and view."""
    page = opened("#net=small&img=5&layer=conv2&unit=4,1,3,2&mode=RM4&view=xH&zoom=1")
    assert text(page, "layer") == "conv2"
    assert text(page, "unit") == "conv2, row 4, column 1, in-channel 3, channel 2"
    first = picture(page)
    again = opened(page.evaluate("location.hash"))
    assert picture(again) == first
    again.locator("[data-mode=RM1]").click()
    expect(again.locator("#unit")).to_have_text("conv2, channel 2", timeout=PATIENCE)
    assert "unit=2&mode=RM1" in again.evaluate("location.hash")


def test_painting_ends_the_region_when_a_gate_flips(session, opened):
    """The state and the count of flipped gates are those of the library's patterns."""
    page = opened("#net=small&img=frog&layer=conv2&unit=6,6,2&mode=RM2")
    place = Place("small", "frog", "conv2", "6,6,2", "RM2")
    _, own, held = whatif.precise(session, place)
    cone = cone_of(place.single(held))
    start = abm.record_pattern(held.network, held.x, dtype=own.dtype)
    states = set()
    for row, col in ((0, 0), (11, 11), (6, 6)):
        page.evaluate("document.getElementById('reset').click()")
        page.evaluate(
            """async ([row, col]) => {
              const drawn = new Promise((done) =>
                document.addEventListener("whatif-drawn", done, { once: true }));
              const box = document.getElementById("photo").getBoundingClientRect();
              const at = (k, n) => k + (n + 0.5) * box.width / 12;
              document.getElementById("brush").getAttribute("aria-pressed") === "true"
                || document.getElementById("brush").click();
              const place = { clientX: at(box.left, col), clientY: at(box.top, row) };
              document.getElementById("photo").dispatchEvent(
                new PointerEvent("pointermove", { ...place, buttons: 1, bubbles: true }));
              await drawn;
            }""",
            [row, col],
        )
        pixels = own.clone()
        pixels[:, max(0, row - 1) : row + 2, max(0, col - 1) : col + 2] = 1  # a brush of 3 pixels
        now = abm.record_pattern(held.network, pixels, dtype=own.dtype)
        flipped = sum(whatif.flips(start, now, cone).values())
        expect(page.locator("#flipped")).to_have_text(str(flipped), timeout=PATIENCE)
        same = page.get_by_test_id("region-state").get_attribute("data-state") == "same"
        assert same == (flipped == 0)
        states.add(same)
    assert states == {True, False}


def test_the_address_has_what_was_painted(session, opened):
    """The strokes of a brush and of the eraser come back, and so do their flipped gates."""
    page = opened("#net=small&img=frog&layer=conv2&unit=6,6,2&mode=RM2")
    page.locator("#photo").focus()
    for key in ("ArrowDown", "ArrowRight", "Space", "ArrowDown", "Space"):
        page.keyboard.press(key)
    page.locator("#erase").click()
    page.locator("#photo").press("Space")
    assert "paint=ffffff-3:1.1,2.1;grey-3:2.1" in page.evaluate("decodeURIComponent(location.hash)")
    _, own, held = whatif.precise(session, Place("small", "frog"))
    plane = Place("small", "frog", "conv2", "2,2,2", "RM2").single(held)
    pixels = own.clone()
    pixels[:, 0:4, 0:3] = 1
    pixels[:, 1:4, 0:3] = 0.5
    now = abm.record_pattern(held.network, pixels, dtype=own.dtype)
    flipped = sum(whatif.flips(held.pattern, now, cone_of(plane)).values())
    assert flipped > 0
    again = opened(page.evaluate("location.hash").replace("unit=6,6,2", "unit=2,2,2"))
    expect(again.locator("#flipped")).to_have_text(str(flipped), timeout=PATIENCE)
    again.locator("#pictures button").nth(3).click()
    expect(again.locator("#flipped")).to_have_text("0", timeout=PATIENCE)
    assert "paint" not in again.evaluate("location.hash")


def test_keys_alone_suffice(opened):
    """Tab comes to the tiles; arrows and pages walk; the brush paints without a pointer."""
    page = opened("#net=small&img=frog&layer=conv2&unit=4,4,2&mode=RM2")
    seen = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
        if page.evaluate("document.activeElement.id") == "tiles":
            break
    assert {"net", "copy-python", "photo", "brush", "file", "tiles"} <= seen
    for key in ("ArrowRight", "ArrowDown", "PageDown"):
        page.keyboard.press(key)
    unit = "conv2, row 5, column 5, channel 3"
    expect(page.locator("#unit")).to_have_text(unit, timeout=PATIENCE)
    page.locator("#photo").focus()
    for key in ("ArrowRight", "ArrowDown", "Space"):
        page.keyboard.press(key)
    expect(page.locator("#state")).to_contain_text("it still gives the value", timeout=PATIENCE)


def test_other_methods_are_drawn_beside_ours(opened):
    """Four pictures, and of these only the hyperplane's receipt closes."""
    pytest.importorskip("captum.attr", reason="Captum is not installed", exc_type=ImportError)
    page = opened("#net=small&img=frog&layer=conv2&unit=4,4,2&mode=RM2")
    page.locator("#others summary").click()
    expect(page.locator("#others-body canvas")).to_have_count(4, timeout=PATIENCE)
    off = page.locator("#others-body [data-off]").evaluate_all("all => all.map(s => s.dataset.off)")
    is_exact = [abs(float(each)) < 1e-5 for each in off]
    assert is_exact == [True, False, False, False]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(opened, width, scheme):
    """Also that the theme is that of the system."""
    page = opened("#net=small&img=frog&layer=conv2", width, 800, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    for name in ("prediction", "layer", "unit", "model-value", "receipt-sum", "region-state"):
        assert page.get_by_test_id(name).is_visible()


def test_python_that_is_copied_computes_what_is_seen(opened):
    """The lines run, with the small network in the place of its name."""
    page = opened("#net=small&img=5&layer=conv2&unit=4,1,2&mode=RM2")
    lines = page.evaluate("import('./static/take.js').then((take) => take.python())")
    assert 'network, x.detach(), "conv2", "RM2", units=(4, 1, 2))' in lines
    compile(lines, "copied", "exec")


def test_one_file_opens_without_a_server(session, browser, tmp_path):
    """A unit of it has the receipt of the model."""
    path = tmp_path / "page.html"
    path.write_text(exported(session, "conv2", most=10**6)[0])
    page = browser.new_page()
    seen = []
    page.on("console", lambda message: seen.append(message.text))
    page.on("request", lambda request: seen.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector(READY, timeout=PATIENCE)
    page.evaluate(DRAWN, {"row": 3, "col": 4, "channel": 1})
    value = float(session.at("small", session.first_image).recorded.outputs["conv2"][0, 1, 3, 4])
    assert number(page, "model-value") == value
    page.close()
    own = (path.as_uri(), "data:", "blob:")
    assert [text for text in seen if not text.startswith(own)] == []


def test_words_stand_in_the_place_of_pixels(opened):
    """The receipt closes, the address has the sentence, and a picture's tools are gone."""
    page = opened("#net=textcnn-reviews&text=a+moving+zzyx+film")
    words = page.locator(".word")
    assert words.count() == 4
    assert page.locator(".word.unknown").inner_text().startswith("zzyx")
    value = number(page, "model-value")
    assert number(page, "receipt-sum") == pytest.approx(value, abs=1e-12)
    assert not page.locator("#whatif, #photo, #pictures, #brush").filter(visible=True).count()
    page.locator("#sentence").fill(" ")
    page.locator("#sentence").press("Enter")
    expect(page.locator("#notice")).to_contain_text("must have a word")
    page.locator("#sentence").fill("dull from start to end")
    page.locator("#sentence").press("Enter")
    expect(words).to_have_count(5)
    expect(page.get_by_test_id("prediction")).to_have_text("negative")
    assert "text=dull+from+start+to+end" in page.evaluate("location.hash")
    assert number(page, "model-value") != value
    page.locator("#net").select_option("small")
    expect(page.locator("#photo")).to_be_visible()
    expect(words.first).to_be_hidden()
