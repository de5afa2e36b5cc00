"""An image together with adversarial noise or with attributions."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from adjointbackmap.planes.thumbnails import PERCENTILE
from adjointbackmap.plots.drawing import SMALL, WIDTH, Drawing, finished, new_figure
from adjointbackmap.plots.scale import PIXEL_SCALE, Scale, drawable

MAPS_IN_ROW = 4


def attacked(
    pixels: Float[Tensor, "c h w"],
    adversarial: Float[Tensor, "c h w"],
    title: str,
    labels: tuple[str, str] = ("original", "adversarial"),
    factor: float = 10.0,
) -> Drawing:
    """An image, its noise, the enlarged noise, and the adversarial image [Wan2022, Fig. 1.1].

    Args:
        pixels: The image in [0, 1].
        adversarial: The adversarial image in [0, 1].
        title: Heading of the figure.
        labels: Predicted classes of the two images.
        factor: Factor by which the noise is enlarged.

    Raises:
        ValueError: If the images have different shapes.
    """
    if pixels.shape != adversarial.shape:
        msg = (
            "The two images must have one shape. "
            f"Got {tuple(pixels.shape)} and {tuple(adversarial.shape)}."
        )
        raise ValueError(msg)
    before = drawable(pixels, 0)
    after = drawable(adversarial, 0)
    noise = after - before
    panels = {
        labels[0]: (PIXEL_SCALE, before),
        "noise": (Scale(-0.5, 0.5), noise),
        f"noise x {factor:g}": (Scale(-0.5, 0.5), noise * factor),
        labels[1]: (PIXEL_SCALE, after),
    }
    figure = new_figure(WIDTH, 3.1, title)
    for i, (heading, (scale, panel)) in enumerate(panels.items()):
        scale.show(figure.add_subplot(1, len(panels), i + 1), panel, heading)
    caption = (
        "noise: grey is zero, black and white -0.5 and 0.5 of the pixels' [0, 1]; "
        f"its largest is {np.abs(noise).max():.3g}"
    )
    numbers = {
        "pixels": before,
        "adversarial": after,
        "noise": noise,
        "factor": np.array(factor),
    }
    return finished(figure, numbers, caption)


def attributions(
    pixels: Float[Tensor, "c h w"],
    maps: Mapping[str, Float[Tensor, "c h w"]],
    numbers: Mapping[str, str],
    title: str,
) -> Drawing:
    """An image and the maps that several methods give for it.

    Each map has a scale of its own, since the methods have different units.

    Args:
        pixels: The image in [0, 1].
        maps: Method -> its map.
        numbers: Method -> text below its map.
        title: Heading of the figure.

    Raises:
        ValueError: If a number belongs to no method.
    """
    unknown = sorted(set(numbers) - set(maps))
    if unknown:
        msg = f"Numbers must be of the methods {', '.join(maps)}. Got {', '.join(unknown)}."
        raise ValueError(msg)
    rows = -(-(len(maps) + 1) // MAPS_IN_ROW)
    columns = min(len(maps) + 1, MAPS_IN_ROW)
    figure = new_figure(WIDTH, 1.0 + rows * (WIDTH / MAPS_IN_ROW + 0.5), title)
    PIXEL_SCALE.show(figure.add_subplot(rows, columns, 1), drawable(pixels, 0), "input")
    drawn = {method: drawable(part, 0) for method, part in maps.items()}
    for i, (method, part) in enumerate(drawn.items(), start=2):
        scale = Scale.clipped([part])
        axes = figure.add_subplot(rows, columns, i)
        scale.show(axes, part, method)
        text = f"\n{numbers[method]}" if method in numbers else ""
        axes.set_xlabel(f"±{scale.high:.3g}{text}", fontsize=SMALL)
    caption = (
        "maps: grey is zero, black and white are the numbers ± below each, "
        f"the {PERCENTILE:g}th percentile of its own magnitudes"
    )
    arrays = {
        "pixels": drawable(pixels, 0),
        "maps": np.stack(list(drawn.values())),
        "methods": np.array(list(drawn)),
    }
    return finished(figure, arrays, caption)
