"""Draw the pictures and the recording of docs/explorer.md from the explorer's page at work.

    python benchmarks/pictures_explorer.py

It needs playwright, Chromium and JupyterLab.
"""

import io
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hover_explorer import PATIENCE, ready
from in_jupyterlab import explorer_in, in_jupyterlab, run_cell
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
VGG7 = "#net=vgg7-cifar10&img=160"
RESNET20 = "#net=resnet20-cifar10&img=160&layer=conv13&unit=4,3,5&mode=RM2&view=over"
CELL = """import adjointbackmap as abm

widget = abm.explore("vgg7-cifar10", "ship", view="#layer=conv3&unit=9,6,5&mode=RM2")
widget"""
COLOURS = 255  # of the recording; one more is left for what stays the same
WIDTH = 880  # pixels of the recording
POINT = """async ([row, col, channel]) => {
  const drawn = new Promise((done) =>
    document.addEventListener("unit-drawn", done, { once: true }));
  const place = explorer.placeOf({ row, col, channel });
  document.getElementById("tiles").dispatchEvent(new PointerEvent("pointermove", {
    clientX: place.x, clientY: place.y, bubbles: true }));
  await drawn;
}"""


def opened(browser: Browser, address: str, width: int = 1280, dark: bool = False) -> Page:
    """The page, once it is ready."""
    scheme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("body[data-ready=yes]")
    page.wait_for_timeout(1500)
    return page


def attacked(page: Page) -> None:
    """Slide along an attack, and wait for all breakpoints."""
    page.locator("#to-attack").click()
    page.wait_for_selector("#state[data-state=other]")
    words = page.locator("#tick-words")
    expect(words).to_have_text(re.compile("regions of this unit$"), timeout=PATIENCE)
    page.wait_for_timeout(500)


def panels(browser: Browser, address: str) -> None:
    """One picture of each panel."""
    page = opened(browser, f"{address}{VGG7}&layer=conv3&unit=9,6,5&mode=RM2&view=H")
    page.screenshot(path=FIGURES / "explorer.png")
    page.locator("#input").screenshot(path=FIGURES / "explorer-input.png")
    page.locator("#sums summary").click()
    page.wait_for_selector(".sum canvas")
    page.set_viewport_size({"width": 1280, "height": 1400})
    page.wait_for_timeout(1500)
    page.locator("#unit-panel").screenshot(path=FIGURES / "explorer-modes.png")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.locator("#sums summary").click()
    page.locator("#keep").click()
    page.locator("#pictures button").nth(21).click()
    page.wait_for_timeout(1500)
    page.locator("#kept").screenshot(path=FIGURES / "explorer-compare.png")
    page.close()
    page = opened(browser, f"{address}{VGG7}&layer=conv3&unit=9,6,5&mode=RM2&view=H")
    page.locator("#others summary").click()
    page.locator("#others-body canvas").first.wait_for()
    page.locator("#others").screenshot(path=FIGURES / "explorer-others.png")
    page.close()
    page = opened(browser, f"{address}{VGG7}&layer=conv3&unit=9,6,5&mode=RM2&view=H")
    attacked(page)
    page.locator("#whatif").screenshot(path=FIGURES / "explorer-whatif.png")
    page.close()
    page = opened(browser, f"{address}{VGG7}&layer=fc&unit=8&mode=RM0&view=xH")
    page.set_viewport_size({"width": 1280, "height": 1100})
    page.locator("#rows button", has_text="bn5").click()
    page.wait_for_timeout(800)
    page.locator("#receipt").screenshot(path=FIGURES / "explorer-receipt.png")
    page.close()
    page = opened(browser, f"{address}{RESNET20}", dark=True)
    page.screenshot(path=FIGURES / "explorer-dark.png")
    page.locator("#network").screenshot(path=FIGURES / "explorer-network.png")
    page.close()
    page = opened(browser, f"{address}{VGG7}&layer=conv3&unit=9,6,5&mode=RM2&view=over", width=390)
    page.locator("#unit-panel").screenshot(path=FIGURES / "explorer-narrow.png")
    page.close()


def notebook(browser: Browser) -> None:
    """The page below the cell that made it."""
    with TemporaryDirectory() as folder, in_jupyterlab(Path(folder), [CELL]) as address:
        page = browser.new_page(viewport={"width": 1240, "height": 1360})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.locator(".jp-NotebookPanel").wait_for()
        page.keyboard.press("Control+b")  # hides the list of files
        run_cell(page, 0)
        explorer_in(page)
        page.wait_for_timeout(1500)
        page.locator(".jp-NotebookPanel").screenshot(path=FIGURES / "explorer-notebook.png")
        page.close()


def recording(browser: Browser, address: str) -> None:
    """Point at some units, then slide along an attack."""
    page = opened(browser, f"{address}{VGG7}")
    frames = []

    def frame(count: int = 1) -> None:
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        height = round(shot.height * WIDTH / shot.width)
        frames.extend([shot.resize((WIDTH, height), Image.Resampling.LANCZOS)] * count)

    for channel, places in (
        (2, [(4, 4), (5, 6), (7, 8), (9, 9)]),
        (5, [(9, 6), (9, 10), (11, 12)]),
    ):
        for row, column in places:
            page.evaluate(POINT, [row, column, channel])
            frame(2)
    attacked(page)
    for share in (0, 2, 5, 10, 200, 400, 600, 800, 1000):
        page.evaluate(
            """(share) => {
              const slide = document.getElementById("slide");
              slide.value = share;
              slide.dispatchEvent(new Event("input"));
            }""",
            share,
        )
        page.wait_for_timeout(1200)
        frame(2)
    first = frames[0].quantize(COLOURS)
    rest = [each.quantize(palette=first, dither=Image.Dither.NONE) for each in frames[1:]]
    first.save(FIGURES / "explorer.gif", save_all=True, append_images=rest, duration=450, loop=0)
    page.close()


def main() -> None:
    """Draw all of them."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    running, address, _ = ready("vgg7-cifar10")
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            notebook(browser)
            panels(browser, address)
            recording(browser, address)
    finally:
        running.terminate()
        running.wait()


if __name__ == "__main__":
    main()
