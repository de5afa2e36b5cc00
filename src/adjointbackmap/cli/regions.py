"""Commands on linear regions: line, region-map."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from adjointbackmap.cli.frame import (
    NO_NETWORK,
    app,
    check_extra,
    console,
    help_examples,
    progress,
    use_threads,
)
from adjointbackmap.cli.output import TABLES, Output
from adjointbackmap.sources import NetworkOptions, Subject, Switch, find_image, load_subject

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from adjointbackmap.analysis.line_profile import LineProfile
    from adjointbackmap.analysis.maps import RegionMap
    from adjointbackmap.engine.network import Network

Window = Annotated[tuple[float, float, float, float], Parameter(allow_leading_hyphen=True)]
WINDOW = (-0.25, 1.25)  # of both coordinates: the three images, and a margin around them
TRIES = 20  # windows, each smaller than the one before
TITLE = 8.0  # points
RADIUS = 2 / 255
STEPS = 10  # of the attack; each is a quarter of the radius long
LINE_EXAMPLES = help_examples(
    "adjointbackmap line fixup-resnet20-nobias-cifar10 --image horse --regions 200",
    "adjointbackmap line vgg7-cifar10 --image ship --to black --regions 500 --json",
    "adjointbackmap line --model mine:build --image photo.jpg --to other.jpg --out photo",
)
REGION_MAP_EXAMPLES = help_examples(
    "adjointbackmap region-map vgg7-cifar10 --image ship --budget 3000",
    "adjointbackmap region-map --model mine:build --image a.jpg --other b.jpg --html",
    "adjointbackmap region-map vgg7-cifar10 --window -0.001 0.001 -0.001 0.001 --json",
)


@Parameter(name="*")
@dataclass(frozen=True)
class NearOptions:
    """Images near the first one.

    Attributes:
        radius: Largest change of a pixel, for pixels in [0, 1]. The adversarial image is that of 10
            steps of the basic iterative method away from the predicted class, each a quarter of
            the radius long. In the random image, each pixel moves by the radius up or down.
        seed: Seed of the random image.
    """

    radius: float = RADIUS
    seed: int = 0

    def end(self, name: str, subject: Subject, pixels: "Tensor") -> tuple["Tensor", str]:
        """The image that an option names, and its description.

        Raises:
            ValueError: If there is none.
        """
        if name == "adversarial":
            return self._adversarial(subject, pixels), f"an adversarial image ({self.radius:.4g})"
        if name == "random":
            return self._random(pixels), f"a random image ({self.radius:.4g})"
        if name == "black":
            return 0 * pixels, "black"
        try:
            return find_image(name, subject)
        except (ValueError, FileNotFoundError) as error:
            words = f"{error}".partition(" Got ")[0].removeprefix("--image must be ")
            msg = f"The end must be adversarial, random, black, or {words} Got {name}."
            raise ValueError(msg) from error

    def _adversarial(self, subject: Subject, pixels: "Tensor") -> "Tensor":
        from adjointbackmap.attacks import Attack, basic_iterative
        from adjointbackmap.examples import scores_of

        step = self.radius / 4
        attack = Attack(step, iterations=STEPS, until_success=False, radius=self.radius)
        labels = scores_of(subject.module, pixels[None], subject.prepare).argmax(1)
        found = basic_iterative(subject.module, pixels[None], labels, attack, subject.prepare)
        return found.adversarial[0]

    def _random(self, pixels: "Tensor") -> "Tensor":
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        signs = 2 * torch.randint(2, pixels.shape, generator=generator) - 1
        return (pixels + self.radius * signs).clamp(0, 1)


NEAR = NearOptions()


@app.command(help_epilogue=LINE_EXAMPLES)
def line(
    source: NetworkOptions = NO_NETWORK,
    *,
    image: str = "horse",
    to: str = "adversarial",
    near: NearOptions = NEAR,
    regions: int | None = None,
    planes: int = 200,
    memory: str = "2GiB",
    out: Path = Path("adjointbackmap-line"),
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Find every linear region on the segment from an image to another, exactly.

    The figure shows the class scores, the turn of the predicted class's hyperplane H, and the gates
    that flip, along the segment. All numbers are float64, for pixels in [0, 1].

    Args:
        source: The network.
        image: A sample image by number, the first sample image of a class, or a picture file.
        to: The other end: adversarial, random, black, or an image as --image names it.
        near: The adversarial and the random image.
        regions: Number of regions to stop at; all if left out.
        planes: Number of hyperplanes to compare with that of the image. They are spread evenly
            over the regions.
        memory: Memory for the values along the segment.
        out: Name of the figure (.png) and of its numbers (.npz), without these endings.
        threads: Number of processor threads.
        output: How tables are printed.

    Raises:
        ValueError: If there is no such image, or a number is not positive.
    """
    from adjointbackmap import plots
    from adjointbackmap.analysis.line_profile import line_profile
    from adjointbackmap.analysis.lines import region_line

    use_threads(threads)
    subject = load_subject(source)
    pixels, described = find_image(image, subject)
    end, end_described = near.end(to, subject, pixels)
    network = subject.trace_in_pixels()
    with progress("linear regions") as (bar, job):
        found = region_line(network, pixels.double(), end.double(), memory, regions)
        bar.update(job, completed=0.5, description="hyperplanes")
        profile = line_profile(found, planes=planes)
    title = f"{subject.title}: {described} to {end_described}, {found.regions:,} linear regions"
    output.tables(console, _line_table(profile, subject.classes, title), _flip_table(profile))
    if not found.complete:
        words = f"The line stops at t = {float(found.t[-1]):.3g}: leave --regions out for all of it"
        output.text(console, words)
    picture = out.with_name(f"{out.name}.png")
    figure = profile.draw(subject.classes or None, title)
    plots.save(figure, picture, profile.numbers())
    output.text(console, f"Written: {picture} and {picture.with_suffix('.npz').name}")


def _line_table(profile: "LineProfile", classes: tuple[str, ...], title: str) -> Table:
    """What is found on the whole segment."""
    found = profile.line
    table = Table("what", "value", title=title)
    table.add_row("linear regions", f"{found.regions:,}")
    table.add_row("breakpoints", f"{found.regions - 1:,}")
    table.add_row("flips", f"{sum(found.flips_by_operation().values()):,}")
    table.add_row("narrowest region", f"{float(found.widths.min()):.2e} of the segment")
    if profile.scores is not None:
        table.add_row("class at the start", _name(int(profile.scores[0, 0].argmax()), classes))
        table.add_row("class at the end", _name(int(profile.scores[-1, 1].argmax()), classes))
        change = profile.change
        at = "nowhere" if change is None else f"at t = {change.t:.6f}"
        table.add_row("class changes first", at)
        if change is not None:
            turned = profile.turned_at(change.region)
            table.add_row("turn of H until there", f"{turned:.2f} degrees")
    table.add_row("turn of H at the end", f"{float(profile.turned[-1]):.2f} degrees")
    table.add_row("length of H at the end", f"{float(profile.stretched[-1]):.3f} of the start")
    return table


def _flip_table(profile: "LineProfile") -> Table:
    """Flips of each operation."""
    flips = profile.line.flips_by_operation()
    total = sum(flips.values())
    table = Table("operation", "flips", "share in %", title="Gates that flip, by operation")
    for name, count in flips.items():
        table.add_row(name, f"{count:,}", f"{100 * count / total:.1f}")
    return table


def _name(number: int, classes: tuple[str, ...]) -> str:
    return classes[number] if number < len(classes) else str(number)


@app.command(name="region-map", help_epilogue=REGION_MAP_EXAMPLES)
def region_map(
    source: NetworkOptions = NO_NETWORK,
    *,
    image: str = "horse",
    to: str = "adversarial",
    other: str = "random",
    near: NearOptions = NEAR,
    window: Window | None = None,
    budget: int = 10_000,
    html: Switch = False,
    memory: str = "2GiB",
    out: Path = Path("adjointbackmap-region-map"),
    threads: int | None = None,
    output: Output = TABLES,
) -> None:
    """Find every linear region on a plane through three images, as exact polygons.

    The image is at (0, 0), the image of --to at (1, 0) and that of --other at (0, 1). The figure
    shows the regions, the predicted classes and the decision boundaries in a window of the plane.

    Args:
        source: The network.
        image: A sample image by number, the first sample image of a class, or a picture file.
        to: The image at (1, 0): adversarial, random, black, or an image as --image names it.
        other: The image at (0, 1), named like that of --to.
        near: The adversarial and the random image.
        window: First and last value of the first coordinate, then of the second one. The default is
            -0.25 to 1.25 for both, and a smaller window around the image if the budget is met.
        budget: Number of polygons after which the map stops.
        html: Also write an interactive page (.html). It needs Plotly.
        memory: Memory for the values that are carried.
        out: Name of the figure (.png), of its numbers (.npz), and of the interactive page, without
            these endings.
        threads: Number of processor threads.
        output: How tables are printed.

    Raises:
        ValueError: If there is no such image, the window has no area, or the output is not one
            number per class.
    """
    from adjointbackmap import plots
    from adjointbackmap.plots.drawing import wrapped

    use_threads(threads)
    if html:
        check_extra("--html", "study", plotly="Plotly")
    subject = load_subject(source)
    pixels, described = find_image(image, subject)
    ends = [near.end(name, subject, pixels) for name in (to, other)]
    u, v = ((end - pixels).double() for end, _ in ends)
    network = subject.trace_in_pixels()
    with progress("linear regions"):
        found = _mapped(network, (pixels.double(), u, v), window, budget, memory)
        table = _map_table(found, subject.classes)
    output.tables(console, table)
    if not found.complete:
        words = "The map stops at --budget: raise it, or choose a smaller --window"
        output.text(console, words)
    names = subject.classes or None
    figure = found.plot(names=names, marks=["image", to, other])
    title = ", ".join([f"{subject.title}: {described}", *(words for _, words in ends)])
    figure.suptitle(wrapped(title, figure.get_figwidth(), TITLE), fontsize=TITLE)
    written = [plots.save(figure, out.with_name(f"{out.name}.png"), _numbers(found))]
    if html:
        written.append(out.with_name(f"{out.name}.html"))
        found.html(written[-1], names)
    output.text(console, f"Written: {', '.join(map(str, written))}, and the numbers (.npz)")


def _mapped(
    network: "Network",
    plane: tuple["Tensor", "Tensor", "Tensor"],
    window: tuple[float, float, float, float] | None,
    budget: int,
    memory: str,
) -> "RegionMap":
    """The map of a window; without one, of the largest that was found for the budget."""
    from adjointbackmap.analysis.maps import region_map as mapped

    if window is not None:
        return mapped(network, *plane, (window[:2], window[2:]), budget, memory)
    found = mapped(network, *plane, (WINDOW, WINDOW), budget, memory)
    scale = 1.0
    for _ in range(TRIES):
        if found.complete:
            break
        # the number of polygons grows about as the area does; half of the budget is a margin
        scale *= (found.covered / 2) ** 0.5
        side = (scale * WINDOW[0], scale * WINDOW[1])
        found = mapped(network, *plane, (side, side), budget, memory)
    return found


def _map_table(found: "RegionMap", classes: tuple[str, ...]) -> Table:
    """Share of each class, and what was found in all."""
    table = Table(
        *("class", "share of the area in %"),
        title=f"{len(found.polygons):,} polygons in {100 * found.covered:.4g} % of the window "
        f"{_range(found.limits[0])} x {_range(found.limits[1])}",
        caption=f"{len(found.patterns.unique()):,} patterns of gates; smallest polygon "
        f"{float(found.areas.min()) / found.window_area:.1e} of the window",
    )
    for number, share in found.class_areas().items():
        table.add_row(_name(number, classes), f"{100 * share:.4f}")
    return table


def _range(limits: tuple[float, float]) -> str:
    return " to ".join(f"{limit:.3g}" for limit in limits)


def _numbers(found: "RegionMap") -> "dict[str, np.ndarray]":
    """The map as arrays: vertices of the cells one after the other, and the cell of each."""
    import torch

    cells = found.cells
    listed = cells.polygons.listed()
    lengths = torch.tensor([len(vertices) for vertices in listed])
    columns = {
        "vertices": torch.cat(listed),
        "cell": torch.arange(len(listed)).repeat_interleave(lengths),
        "class": cells.classes,
        "polygon": cells.region,
        "pattern": found.patterns,
        "coefficients": found.coefficients,
    }
    return {name: values.cpu().numpy() for name, values in columns.items()}
