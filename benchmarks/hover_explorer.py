"""Measure how long the explorer's page takes from pointing at a unit to its picture.

    python benchmarks/hover_explorer.py vgg7-cifar10 resnet20-cifar10

It needs playwright and Chromium. The page runs without a window, so that drawing is in software.
"""

import os
import random
import re
import shutil
import subprocess
import sys
import time

from playwright.sync_api import Page, sync_playwright

UNITS = 200
LOST = 10_000  # milliseconds after which a unit counts as not drawn
PATIENCE = 300_000  # milliseconds, for a machine that is busy
# Point at a unit as the page's own listener sees it, and wait until its picture is drawn.
HOVER = """async (unit) => {
  const { state, chooseLayer, placeOf, network } = explorer;
  if (state.layer !== unit.layer) {
    const drawn = new Promise((done) => {
      document.addEventListener("unit-drawn", done, { once: true });
      setTimeout(done, unit.lost);
    });
    chooseLayer(unit.layer);
    await drawn;
    while (network.of !== unit.layer) await new Promise((done) => setTimeout(done, 10));
    await new Promise((done) => setTimeout(done, 30));
  }
  unit.channel = network.start + unit.tile % network.maps.shape[0];
  const place = placeOf(unit);
  const same = ["row", "col", "channel"].every((name) => state[name] === unit[name]);
  if (!place || same) return null;
  const began = performance.now();
  const drawn = new Promise((done) => {
    document.addEventListener("unit-drawn", () => done(performance.now()), { once: true });
    setTimeout(() => done(Infinity), unit.lost);
  });
  document.getElementById("tiles").dispatchEvent(new PointerEvent("pointermove", {
    clientX: place.x, clientY: place.y, bubbles: true }));
  return (await drawn) - began;
}"""


def measured(page: Page, units: int) -> list[float]:
    """Milliseconds from pointing to the picture, for random units of all layers."""
    layers = page.evaluate("explorer.network.info.layers.map((l) => [l.name, l.tiles])")
    chance = random.Random(0)
    chosen = sorted(chance.choice(range(len(layers))) for _ in range(units))
    found = []
    for n in chosen:
        name, (count, rows, columns) = layers[n]
        unit = {
            "layer": name,
            "row": chance.randrange(rows),
            "col": chance.randrange(columns),
            "lost": LOST,
            "tile": chance.randrange(count),
        }
        took = page.evaluate(HOVER, unit)
        if took is not None:
            found.append(took)
    return sorted(found)


def ready(network: str) -> tuple[subprocess.Popen[str], str, float]:
    """Start the command; returns it, the page's address, and when it was started."""
    began = time.monotonic()
    command = [sys.executable, "-c", "from adjointbackmap.cli import main; main()"]
    words = [*command, "explore", network, "--no-browser"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    address = re.search(r"http\S+", running.stdout.readline())
    assert address is not None
    return running, address[0], began


def main() -> None:
    """Print a line for each network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for network in sys.argv[1:] or ["vgg7-cifar10", "resnet20-cifar10"]:
            running, address, began = ready(network)
            try:
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                page.set_default_timeout(PATIENCE)
                page.goto(address)
                page.wait_for_selector("body[data-ready=yes]")
                opened = time.monotonic() - began
                times = measured(page, UNITS)
                p50, p90 = (times[int(share * (len(times) - 1))] for share in (0.5, 0.9))
                load = ", ".join(f"{each:.1f}" for each in os.getloadavg()[:2])
                print(
                    f"{network}: page ready {opened:.1f} s after the command; hover to picture of "
                    f"{len(times)} units: median {p50:.0f} ms, p90 {p90:.0f} ms, fastest "
                    f"{times[0]:.0f} ms; load {load} on {os.cpu_count()} cores",
                    flush=True,
                )
                page.close()
            finally:
                running.terminate()
                running.wait()


if __name__ == "__main__":
    main()
