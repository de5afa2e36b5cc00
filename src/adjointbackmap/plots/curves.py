"""Curves of a training: loss and validation accuracy per epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adjointbackmap.plots.drawing import (
    COLOURS,
    MEDIUM,
    SMALL,
    WIDTH,
    Drawing,
    finished,
    new_figure,
)


def training_curves(rows: Sequence[Mapping[str, Any]], title: str) -> Drawing:
    """Loss and validation accuracy per epoch; a circle marks the epoch whose weights are kept.

    Args:
        rows: Lines of a training's ``log.jsonl`` with ``epoch``, ``loss`` and ``validation``. The
            last is a share, or None if the epoch has none.
        title: Heading of the figure.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        msg = "There must be at least one finished epoch to draw. Got none."
        raise ValueError(msg)
    epoch = np.array([row["epoch"] for row in rows])
    loss = np.array([row["loss"] for row in rows], dtype=float)
    validation = np.array([row["validation"] for row in rows], dtype=float)  # None becomes NaN
    known = np.isfinite(validation)
    figure = new_figure(WIDTH, 4.0, title)
    left, right = figure.subplots(1, 2)
    left.plot(epoch, loss, color=COLOURS[1], marker=".")
    left.set_ylabel("training loss, mean over the epoch", fontsize=MEDIUM)
    right.plot(epoch[known], 100 * validation[known], color=COLOURS[2], marker=".")
    right.set_ylabel("accuracy on the validation images in %", fontsize=MEDIUM)
    caption = "loss: on augmented images, with every term that is trained on"
    if known.any():
        best = int(np.nanargmax(validation))
        right.plot(
            epoch[best],
            100 * validation[best],
            "o",
            color=COLOURS[0],
            markersize=9,
            fillstyle="none",
        )
        caption += (
            f"; circle: epoch {epoch[best]}, whose weights are kept, {100 * validation[best]:.2f} %"
        )
    for axes in (left, right):
        axes.set_xlabel("epoch", fontsize=MEDIUM)
        axes.tick_params(labelsize=SMALL)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
    return finished(figure, {"epoch": epoch, "loss": loss, "validation": validation}, caption)
