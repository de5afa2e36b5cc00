"""Measure how long the explorer takes from the command to its first picture.

    python benchmarks/ready_explorer.py vgg7-cifar10 resnet20-cifar10

It needs playwright and Chromium, which already runs when the command starts. On a busy machine the
seconds say little; the processor time of the command is printed beside them.
"""

import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from hover_explorer import PATIENCE, ready
from playwright.sync_api import Browser, sync_playwright

RUNS = 5
FIRST = "[data-testid=receipt-sum][data-value]"  # it is written after the first picture is drawn
TICKS = os.sysconf("SC_CLK_TCK")  # units of /proc, per second


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime


def once(browser: Browser, network: str) -> tuple[float, float, float]:
    """Seconds from the command to its page, to the first picture, and of the processor."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(PATIENCE)
    running, address, began = ready(network)
    try:
        page.goto(address)
        opened = time.monotonic() - began
        page.wait_for_selector(FIRST)
        drawn = time.monotonic() - began
        return opened, drawn, processor_seconds(running.pid)
    finally:
        page.close()
        running.terminate()
        running.wait()


def main() -> None:
    """Print a line for each network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for network in sys.argv[1:] or ["vgg7-cifar10", "resnet20-cifar10"]:
            found = [once(browser, network) for _ in range(RUNS)]
            opened, drawn, used = (statistics.median(each) for each in zip(*found, strict=True))
            load = ", ".join(f"{each:.1f}" for each in os.getloadavg()[:2])
            print(
                f"{network}: page shown {opened:.1f} s after the command, first picture "
                f"{drawn:.1f} s; the command used {used:.1f} s of the processor; medians of "
                f"{RUNS}; load {load} on {os.cpu_count()} cores",
                flush=True,
            )


if __name__ == "__main__":
    main()
