"""The report section of experiment 1: claims, tables and pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from adjointbackmap import plots
from adjointbackmap.exactness.layer_check import SHARE_LIMIT
from adjointbackmap.plots.classes import IMAGE_UNIT
from adjointbackmap.plots.drawing import SMALL, WIDTH, Drawing, finished, new_figure
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.gates import KINK_ROUNDINGS
from adjointbackmap.study.adversarial.noise import KERNEL_LAYER, KERNELS, KEY, shown_classes
from adjointbackmap.study.adversarial.pairs import largest_error
from adjointbackmap.study.published.outputs import OUTPUTS, Outputs
from adjointbackmap.study.results import Arrays, Found, kept, save_picture
from adjointbackmap.study.setup import SCALE

# Keys of the outputs: of the network at both images, and reconstructed at the adversarial one.
OUTPUT_COLUMNS = ("original", "network", "H_adv", "H_orig")
OUTPUT_HEAD = ["class", "network", "with H_adv", "with H_orig"]
TITLE = "Experiment 1: hyperplanes with and without adversarial noise"


def noise_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results.

    Returns:
        The section, or ``None`` if there are no results.
    """
    results = {name: (found, arrays) for name, found, arrays in kept(folder / KEY)}
    if not results:
        return None
    networks = {name: found for name, (found, _) in results.items()}
    ran = (
        "One image, attacked by the basic iterative method without a target, which stops at its "
        f"first success; no radius but the box of the pixels. The pattern is that of {SCALE:g} "
        "[x; b], in float32.",
        *(_ran(name, found) for name, found in networks.items()),
    )
    blocks: list[ReportBlock] = []
    for name, (found, arrays) in results.items():
        blocks += [*noise_claims(name, found), output_table(name, found), layer_table(name, found)]
        blocks += _pictures(folder, name, found, arrays)
    blocks.append(_by_layer(folder, networks))
    return Section(KEY, TITLE, ran, tuple(blocks))


def noise_claims(name: str, found: Found) -> Iterator[Claim]:
    """Each claim of the study's captions and analysis, with the measured numbers.

    Args:
        name: The network.
        found: Its results.
    """
    table = OUTPUTS.get(name)
    winners = {key: _winner(found["outputs"][key], found["classes"]) for key in OUTPUT_COLUMNS}
    shown = [_winner(column, found["classes"]) for column in table.numbers] if table else []
    yield Claim(
        "The noise changes the class.",
        f"{winners['original']} becomes {winners['network']}",
        found["attack"]["fooled"],
        f"{table.label} becomes {shown[0]} ({table.source})" if table else "",
        name,
    )
    yield from _reconstruction_claims(name, found, table)
    expected = bool(shown) and shown[0] == shown[2]
    rebuilt = winners["H_orig"]
    after = winners["network"]
    word = "the same" if expected else "another one"
    yield Claim(
        f"With the hyperplanes of the original image, the class is {word}.",
        f"the largest output is that of {rebuilt}, the network's that of {after}",
        (rebuilt == after) == expected,
        f"{shown[2]}, the network's {shown[0]}" if table else "",
        name,
    )
    yield from _change_claims(name, found)


def _reconstruction_claims(name: str, found: Found, table: Outputs | None) -> Iterator[Claim]:
    """Which hyperplanes reproduce the outputs at the adversarial image."""
    network = found["outputs"]["network"]
    published = ["", ""]
    if table:
        first, *columns = table.numbers
        published = [f"{largest_error(column, first):.2g}" for column in columns]
    texts = {
        "H_adv": "The hyperplanes of the adversarial image reproduce its outputs",
        "H_orig": "The hyperplanes of the original image do not",
    }
    for (key, text), printed in zip(texts.items(), published, strict=True):
        outputs = found["outputs"][key]
        error = largest_error(outputs, network)
        off = max(abs(a - b) for a, b in zip(outputs, network, strict=True))
        measured = (
            f"largest |relative error| of {len(network)} outputs: {error:.2g}; "
            f"largest |error|: {off:.2g}"
        )
        reproduced = error <= SHARE_LIMIT
        holds = reproduced if key == "H_adv" else not reproduced
        yield Claim(f"{text}.", measured, holds, printed, name)


def _change_claims(name: str, found: Found) -> Iterator[Claim]:
    """How much the hyperplanes change, and in which layer the change begins."""
    inputs = found["inputs changed"]
    for part, changes in found["changed"].items():
        yield Claim(
            f"The hyperplanes of all classes differ significantly ({part} parts), "
            "the images hardly.",
            f"relative change of the hyperplanes {min(changes):.2f} to {max(changes):.2f}; of the "
            f"network's input {inputs:.3f}, of the pixels {found['pixels changed']:.3f}",
            min(changes) > inputs,
            network=name,
        )
    first, second = list(found["layers"].values())[:2]
    kernels = found["kernels"]
    yield Claim(
        "The difference starts from conv1, the second convolution.",
        f"relative change of the hyperplanes of conv0: {first['image']:g}, of conv1: "
        f"{second['image']:.3f}; {kernels['changed']} of conv1's {kernels['kernels']} RM3 "
        f"hyperplanes that are not zero change, their median by {kernels['median']:.3f}",
        first["image"] == 0 < second["image"],
        network=name,
    )


def output_table(name: str, found: Found) -> Table:
    """The network's outputs at the adversarial image and their two reconstructions.

    The published table is shown next to it.

    Args:
        name: The network.
        found: Its results.
    """
    columns = [found["outputs"][key] for key in OUTPUT_COLUMNS[1:]]
    sheet = Sheet(f"{name}: outputs at the adversarial image", OUTPUT_HEAD)
    for k in shown_classes(found["outputs"]):
        cells = [_bold(f"{column[k]:.6g}", column[k] == max(column)) for column in columns]
        sheet.rows.append([f"{k} ({found['classes'][k]})", *cells])
    table = OUTPUTS.get(name)
    other = "The published image is another one." if table else "CIFAR-100 is beyond the study."
    caption = (
        "H_adv and H_orig: hyperplanes of the adversarial and of the original image, each with "
        f"the adversarial image; bold: the largest. {other}"
    )
    return Table(sheet, caption, _published(table, found["classes"]) if table else None)


def _published(table: Outputs, classes: Sequence[str]) -> Sheet:
    """The printed table; the largest output of each column is bold."""
    printed = (table.network, table.adversarial, table.original)
    columns = list(zip(printed, table.numbers, strict=True))
    sheet = Sheet(f"{table.source}: {table.label}", OUTPUT_HEAD)
    for k, name in enumerate(classes):
        cells = [_bold(text[k], numbers[k] == max(numbers)) for text, numbers in columns]
        sheet.rows.append([f"{k} ({name})", *cells])
    return sheet


def layer_table(name: str, found: Found) -> Table:
    """Changes of hyperplanes and gates per layer: they show where the difference begins.

    Args:
        name: The network.
        found: Its results.
    """
    gate_columns = ["gates flipped %", "gates", "near, original", "near, adversarial"]
    head = ["layer", "image part", "bias part", *gate_columns]
    sheet = Sheet(f"{name}: the difference by layer", head)
    for layer, changes in found["layers"].items():
        both = (changes["image"], changes["bias"])
        parts = ["" if change is None else f"{change:.4f}" for change in both]
        if layer in found["gates"]:
            shares = f"{100 * found['flipped'][layer]:.3f}", f"{found['gates'][layer]:,}"
            gates = [*shares, *map(str, found["near kinks"][layer])]
        else:
            gates = [""] * len(gate_columns)
        sheet.rows.append([layer, *parts, *gates])
    caption = (
        "Relative change |H_adv - H| / |H| of all hyperplanes of a layer together (RM1 of "
        "convolutions, RM0 of fc, without the layer's own bias); gates are those after the "
        "layer, so they bear on later layers. Near: gates within rounding of their kink "
        f"({KINK_ROUNDINGS} float32 eps of the sum of the terms' magnitudes), which another "
        "machine may set otherwise."
    )
    return Table(sheet, caption)


def _ran(name: str, found: Found) -> str:
    """What was run on one network, in words."""
    attack = found["attack"]
    settings = found["settings"]
    step = settings["attack"]["step"]
    if isinstance(step, list):
        steps = ", ".join(f"{s:.4f}" for s in step) + " by channel"
    else:
        steps = f"{step:g}"
    return (
        f"{name} (weights {settings['weights sha256'][:8]}): image {settings['image'][:8]} "
        f"({found['classes'][found['label']]}); steps of {steps} in pixels, {attack['steps']} of "
        f"at most {settings['attack']['iterations']} taken; noise {attack['l2']:.3f} in l2, "
        f"{attack['linf']:.4f} at most in a pixel."
    )


def _pictures(
    folder: Path,
    name: str,
    found: Found,
    arrays: Arrays,
) -> Iterator[Picture]:
    """Pictures of the noise, of the class hyperplanes before and after, and of the RM3 change."""
    table = OUTPUTS.get(name)
    classes = found["classes"]
    before_after = ("original", "network")
    first, second = (_winner(found["outputs"][key], classes) for key in before_after)
    figure = table.figure if table else ""
    shown = [classes[k] for k in shown_classes(found["outputs"])]
    pixels = torch.from_numpy(arrays["pixels"])
    adversarial = torch.from_numpy(arrays["adversarial"])
    title = f"{name}: {first} becomes {second}"
    drawing = plots.attacked(pixels, adversarial, title, (first, second))
    yield _saved(folder, f"{name}-attacked", drawing, figure)
    for part in found["changed"]:
        before, after = (torch.from_numpy(arrays[f"{part} {when}"]) for when in ("before", "after"))
        title = f"{name}: {part} parts of the classes (RM0)"
        starts = found.get("bias starts") if part == "bias" else None
        drawing = plots.differences(before, after, shown, title, biases=starts)
        yield _saved(folder, f"{name}-{part}", drawing, figure)
    published = figure if "nobias" in name else ""
    yield _saved(folder, f"{name}-kernels", _kernel_grid(name, arrays), published)


def _kernel_grid(name: str, arrays: Arrays) -> Drawing:
    """Change of the RM3 hyperplanes: rows are in-channels, columns are out-channels."""
    parts = arrays["kernels"]
    scale = plots.Scale.clipped([parts])
    # Each tile has one row and one column more than its map: a white line, since 1 is white.
    height, width = (n + 1 for n in parts.shape[-2:])
    tiles = np.ones((KERNELS * height, KERNELS * width, 3))
    for i, j in np.ndindex(KERNELS, KERNELS):
        rows = slice(i * height, (i + 1) * height - 1)
        columns = slice(j * width, (j + 1) * width - 1)
        tiles[rows, columns] = scale.colours(parts[i, j])
    title = f"{name}: difference of the RM3 hyperplanes of {KERNEL_LAYER}'s kernels"
    figure = new_figure(WIDTH, WIDTH + 0.9, title)
    axes = figure.add_subplot()
    axes.imshow(tiles, interpolation="nearest")
    middles = np.arange(KERNELS)
    axes.set_xticks((middles + 0.5) * width, arrays["out_channels"], fontsize=SMALL)
    axes.set_yticks((middles + 0.5) * height, arrays["in_channels"], fontsize=SMALL)
    axes.set(xlabel="channel", ylabel="in-channel")
    caption = (
        "the in-channels and channels that change most; "
        f"adversarial - original, one scale: {scale.words(IMAGE_UNIT)}"
    )
    numbers = {key: arrays[key] for key in ("kernels", "in_channels", "out_channels")}
    return finished(figure, numbers, caption)


def _by_layer(folder: Path, networks: dict[str, Found]) -> Picture:
    """Relative change of the image parts per layer, for all networks."""
    # The deepest network comes first: it sets the order of the layers on the axis.
    deepest = sorted(networks, key=lambda name: -len(networks[name]["layers"]))
    values = {}
    for name in deepest:
        changes = {layer: both["image"] for layer, both in networks[name]["layers"].items()}
        values[name] = {layer: c for layer, c in changes.items() if c is not None}
    title = "Relative change of a layer's hyperplanes under adversarial noise, image part"
    return _saved(folder, "by-layer", plots.by_layer(values, title, "|H_adv - H| / |H|"), "")


def _saved(folder: Path, stem: str, drawing: Drawing, published: str) -> Picture:
    return save_picture(folder, f"{KEY}/{stem}", drawing, drawing.caption, published)


def _winner(outputs: Sequence[float], classes: Sequence[str]) -> str:
    """The class with the largest output."""
    return classes[int(np.argmax(outputs))]


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text
