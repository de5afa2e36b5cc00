"""The report section of experiment 2: claims, tables, pictures and scenes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from adjointbackmap import plots
from adjointbackmap.plots.biases import UNIT, cut_at
from adjointbackmap.plots.classes import IMAGE_UNIT
from adjointbackmap.plots.drawing import MEDIUM, WIDTH, Drawing, finished, new_figure
from adjointbackmap.plots.groups import Interval
from adjointbackmap.plots.scale import PIXEL_SCALE
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Scene, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.spread import MEASURES, Ratio
from adjointbackmap.study.adversarial.targets import KEY, PARTS
from adjointbackmap.study.charts import interval_rows
from adjointbackmap.study.results import Arrays, Found, kept, run_words, save_picture

ALMOST = 0.8  # our threshold for the study's "almost as broad"
FACTOR = 10  # pictures show the noise times this factor, as in the study
IN_A_ROW = 5  # panels per row
AXES_3D = ("tSNE 1", "tSNE 2", "tSNE 3")


def targets_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results of all experiments.
    """
    results = list(kept(folder / KEY))
    if not results:
        return None
    blocks: list[ReportBlock] = [Table(_summary(results), SPREAD_CAPTION)]
    blocks.append(_ratio_chart(folder, {name: found for name, found, _ in results}))
    for name, found, arrays in results:
        blocks += _blocks(folder, name, found, arrays)
    ran = (
        "An image that the network classifies correctly is attacked at nine other classes, each "
        "by the iterative least-likely class method with that class as the target, a fixed "
        "number of steps and no radius. The hyperplane of the label's class (RM0, pattern at "
        "1/8) is taken under the nine attacked images and the image itself, and under ten images "
        "of other classes that the network classifies correctly. For CIFAR-100, nine drawn "
        "classes are the targets: beyond the study.",
        *(_ran(name, found) for name, found, _ in results),
    )
    title = "Experiment 2: one hyperplane under attacks at nine classes"
    return Section(KEY, title, ran, tuple(blocks))


SPREAD_CAPTION = (
    "Spread of the hyperplanes under attack (nine attacked images and the image itself) over "
    "that under ten images of other classes. In the original space: mean pairwise distances, and "
    "total variances, each with the bootstrap's 95 % interval. Last: the ratio of mean distances "
    "between the points of the tSNE pictures. tSNE evens out how dense points lie, so that only "
    "the ratios in the original space are evidence."
)


def _ran(name: str, found: Found) -> str:
    """What was run on one network, in words."""
    hashes = found["settings"]["others"]
    classes = found["classes"]
    others = [f"{h[:8]} {classes[c]}" for h, c in zip(hashes, found["others"], strict=True)]
    return f"{run_words(name, found)}; images of other classes: {', '.join(others)}."


def _summary(results: Sequence[tuple[str, Found, Arrays]]) -> Sheet:
    head = ["network", "image", "targets reached"]
    head += [f"{part} part, {what}" for part in PARTS for what in (*MEASURES, "tSNE")]
    sheet = Sheet("Spread under attack over spread under other classes", head)
    for name, found, _ in results:
        reached = sum(attack["reached"] for attack in found["attacks"])
        of_all = f"{reached} of {len(found['attacks'])}"
        row = [f"`{name}`", found["classes"][found["label"]], of_all]
        for part in PARTS:
            ratios = found["ratios"].get(part)
            if ratios:
                row += [str(Ratio(**ratios[measure])) for measure in MEASURES]
                row.append(f"{found['tsne'][part]:.2f}")
            else:
                row += ["none"] * (len(MEASURES) + 1)
        sheet.rows.append(row)
    return sheet


def _blocks(folder: Path, name: str, found: Found, arrays: Arrays) -> Iterator[ReportBlock]:
    """Claims, table, pictures and 3D scenes of one network."""
    yield from _claims(name, found)
    yield Table(_attack_rows(name, found), ATTACKS_CAPTION)
    for kind, drawing, published in _drawings(name, found, arrays):
        caption = drawing.caption
        if kind.startswith("tsne"):
            caption = f"{caption}. {_tsne_words(found)}"
        yield save_picture(folder, f"{KEY}/{name}-{kind}", drawing, caption, published)
    for part in found["ratios"]:
        yield _scene(name, part, found, arrays[f"tsne_{part}"])


ATTACKS_CAPTION = (
    "Each attack: the class that the network gives, whether it is the target, its softmax; the "
    "noise's Euclidean norm and largest magnitude in pixels from 0 to 1; how far the label's "
    "hyperplane is from that under the image itself, in lengths of that one."
)


def _claims(name: str, found: Found) -> Iterator[Claim]:
    """The two published claims, with the measured numbers."""
    ratios = {part: Ratio(**both["distances"]) for part, both in found["ratios"].items()}
    measured = "; ".join(f"{part} part {ratio}" for part, ratio in ratios.items())
    yield Claim(
        "The spread due to adversarial noise is almost as broad as that due to inputs "
        f"from different classes. (Our reading of almost: at least {ALMOST} of it.)",
        f"mean pairwise distance of hyperplanes, under attack / under other classes: {measured}",
        all(ratio.value >= ALMOST for ratio in ratios.values()),
        "in pictures: Figs. 4.4, 4.9-4.11",
        name,
    )
    least = {part: min(attack["changed"][part] for attack in found["attacks"]) for part in ratios}
    yield Claim(
        "The distances between the hyperplanes are very large although the noise is "
        "small. (Our reading: every attack changes the hyperplane by more than half its length.)",
        "least change of an attack: "
        + "; ".join(f"{part} part {change:.2f}" for part, change in least.items()),
        min(least.values()) > 0.5,
        network=name,
    )


def _attack_rows(name: str, found: Found) -> Sheet:
    """Table with a row for each attack."""
    parts = list(found["ratios"])
    head = ["target", "class given", "reached", "softmax", "l2", "largest"]
    head += [f"{part} part differs by" for part in parts]
    sheet = Sheet(f"{name}: nine attacks on a {found['classes'][found['label']]}", head)
    classes = found["classes"]
    for attack in found["attacks"]:
        reached = "yes" if attack["reached"] else "**no**"
        row = [classes[attack["target"]], classes[attack["given"]], reached]
        row += [f"{attack['confidence']:.4f}", f"{attack['l2']:.3f}", f"{attack['linf']:.3f}"]
        row += [f"{attack['changed'][part]:.2f}" for part in parts]
        sheet.rows.append(row)
    return sheet


def _names(found: Found) -> tuple[list[str], list[str]]:
    """Names of the ten inputs under attack, and of the images of other classes."""
    classes = found["classes"]
    label = found["label"]
    red = [f"{classes[c]}{' (no noise)' if c == label else ''}" for c in found["shown"]]
    return red, [classes[c] for c in found["others"]]


def _ratio_chart(folder: Path, networks: dict[str, Found]) -> Picture:
    """The spread under attack over that under other classes, for each network and part."""
    values: dict[str, dict[str, Interval]] = {f"{part} part": {} for part in PARTS}
    for name, found in networks.items():
        for part, ratios in found["ratios"].items():
            ratio = Ratio(**ratios["distances"])
            values[f"{part} part"][name] = (ratio.value, ratio.low, ratio.high)
    title = "Spread of the label's hyperplane: under nine attacks over under ten other classes"
    quantity = "ratio of mean pairwise distances"
    drawing = interval_rows(values, title, quantity, "95 % interval of the bootstrap", mark=1.0)
    return save_picture(folder, f"{KEY}/ratios", drawing, drawing.caption)


def _scene(name: str, part: str, found: Found, placed: np.ndarray) -> Scene:
    """The points of a tSNE picture, which the reader can turn."""
    groups = _groups(found, placed)
    points = {group: p.tolist() for group, p in groups.items()}
    labels = dict(zip(groups, _names(found), strict=True))
    caption = f"Hyperplanes of one unit. {_tsne_words(found)}"
    return Scene(points, labels, f"{name}: tSNE of {part} parts", caption)


def _tsne_words(found: Found) -> str:
    settings = found["settings"]
    return (
        f"tSNE in three dimensions, perplexity {settings['perplexity']:g}, started from principal "
        f"components, seed {settings['seed']}; its distances are not those of the original space."
    )


def _groups(found: Found, placed: np.ndarray) -> Arrays:
    """Split the points into those under attack and those of other classes."""
    red = len(found["shown"])
    return {
        "under attack, and without noise": placed[:red],
        "images of other classes": placed[red:],
    }


def _drawings(name: str, found: Found, arrays: Arrays) -> Iterator[tuple[str, Drawing, str]]:
    """For each picture: its kind, the drawing and the published figures."""
    published = "Figs. 4.9-4.11" if "bias" in found["ratios"] else "Fig. 4.4"
    yield "inputs", _draw_inputs(name, found, arrays), published
    for part in found["ratios"]:
        yield part, _draw_hyperplanes(name, part, found, arrays[part]), published
    for part in found["ratios"]:
        groups = _groups(found, arrays[f"tsne_{part}"])
        drawing = plots.points(groups, f"{name}: tSNE of {part} parts", AXES_3D)
        yield f"tsne-{part}", drawing, published


def _draw_inputs(name: str, found: Found, arrays: Arrays) -> Drawing:
    """The noise of each attack, and the attacked images."""
    red, _ = _names(found)
    inputs = arrays["inputs"][: len(red)]
    noise = FACTOR * (inputs - arrays["pixels"])
    rows = {
        f"noise x {FACTOR}": (red, noise, plots.Scale(-0.5, 0.5)),
        "inputs": (red, inputs, PIXEL_SCALE),
    }
    unit = found["classes"][found["label"]]
    title = f"{name}: image of the class {unit} under nine attacks"
    caption = "grey is zero, black -0.5 and white 0.5 of the pixels' 0 to 1"
    return _panels(title, rows, f"noise x {FACTOR}: {caption}")


def _draw_hyperplanes(name: str, part: str, found: Found, planes: np.ndarray) -> Drawing:
    """One part of the hyperplanes under attack and under other classes; a bias part is square."""
    red, black = _names(found)
    starts = found.get("bias starts", []) if part == "bias" else []
    values = zip(red + black, found["values"], strict=True)
    headings = [f"{word}\n{value:.2f}" for word, value in values]
    if part == "bias":
        maps = np.stack([plots.near_square(torch.from_numpy(b)) for b in planes])
        scale = plots.Scale.clipped([maps])
        words = scale.words(UNIT, channels=False)
        lines = ", lines between the layers" if starts else ""
        size = f"; {planes.shape[1]} biases in the order of execution, row by row{lines}"
    else:
        maps = planes
        scale = plots.Scale.clipped([maps])
        words = scale.words(IMAGE_UNIT)
        size = ""
    count = len(red)
    rows = {
        "under attack": (headings[:count], maps[:count], scale),
        "under other classes": (headings[count:], maps[count:], scale),
    }
    unit = found["classes"][found["label"]]
    title = f"{name}: hyperplane of the unit {unit}, {part} parts"
    caption = f"headings: the input, and the unit's value under it{size}; on one scale: {words}"
    return _panels(title, rows, caption, starts)


def _panels(
    title: str,
    groups: Mapping[str, tuple[Sequence[str], np.ndarray, plots.Scale]],
    caption: str,
    starts: Sequence[int] = (),
) -> Drawing:
    """Groups of panels, one group below the other.

    Each group has names, maps and a colour scale. Lines are drawn where layers of biases start.
    """
    rows = [-(-len(names) // IN_A_ROW) for names, _, _ in groups.values()]
    shapes = [maps.shape[-2:] for _, maps, _ in groups.values()]
    ratio = min(1.0, max(0.2, *(height / width for height, width in shapes)))
    height = WIDTH / (IN_A_ROW + 0.5) * ratio + 0.25  # of a panel with its heading, in inches
    figure = new_figure(WIDTH, 1.0 + sum(rows) * height, title)
    for i, (group, (names, maps, scale)) in enumerate(groups.items()):
        above = sum(rows[:i]) * IN_A_ROW  # places of the groups above
        for j, (name, part) in enumerate(zip(names, maps, strict=True)):
            axes = figure.add_subplot(sum(rows), IN_A_ROW, above + j + 1)
            scale.show(axes, part, name)
            cut_at(axes, starts, part.shape[-1], linewidth=0.3)
            if j % IN_A_ROW == 0:
                axes.set_ylabel(group, fontsize=MEDIUM)
    numbers = {f"maps_{i}": maps for i, (_, maps, _) in enumerate(groups.values())}
    return finished(figure, numbers | {"groups": np.array(list(groups))}, caption)
