"""Experiment 1 [Wan2022, sections 4.2.1 and 4.3.1]: hyperplanes with and without adversarial noise.

The hyperplanes of all classes are compared at one image before and after an attack.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data, plots
from adjointbackmap.engine.pattern import record_pattern
from adjointbackmap.exactness.layer_check import SHARE_LIMIT
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.plots.classes import IMAGE_UNIT
from adjointbackmap.plots.drawing import SMALL, WIDTH, Drawing, finished, new_figure
from adjointbackmap.report.sections import Block, Claim, Picture, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.adversarial.gates import ROUNDINGS, flipped, gate_counts, near_kinks
from adjointbackmap.study.adversarial.pairs import (
    Pair,
    attack_of,
    attacked_pair,
    largest_error,
    relative_change,
)
from adjointbackmap.study.published.outputs import OUTPUTS, Outputs
from adjointbackmap.study.results import keep, kept
from adjointbackmap.study.setup import SCALE, Setup, Trained

KEY = "noise"
SHOWN = 10  # most classes in tables and pictures
KERNELS = 8  # in-channels, and out-channels, in the picture of RM3
KERNEL_LAYER = "conv1"

Found = dict[str, Any]


def compute(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Run the experiment on every network of a run.

    A network is skipped if the folder has its results for the same weights, image and settings.

    Args:
        setup: Networks, image and folder.
        report: Called with what is computed and the share that is done.
    """
    for number, name in enumerate(setup.networks):
        report(f"{name}: with and without noise", number / len(setup.networks))
        trained = setup.trained(name)
        image = setup.one(name)
        settings = {**attack_of(trained, image), "image": image.hashes[0]}
        keep(setup.folder / KEY / f"{name}.json", settings, partial(measured, trained, image))
    report("with and without noise", 1.0)


def measured(trained: Trained, image: data.Images) -> tuple[Found, dict[str, np.ndarray]]:
    """Compute the numbers of one network at one image, and the arrays for its pictures.

    Args:
        trained: The network.
        image: The one image.
    """
    pair = attacked_pair(trained, image)
    found = pair.found
    x = torch.cat([pair.original.x, pair.adversarial.x])
    patterns = [
        record_pattern(trained.network, part, SCALE)
        for part in (pair.original.x, pair.adversarial.x)
    ]
    outputs = {
        "original": pair.original.value[0].tolist(),
        "network": pair.adversarial.value[0].tolist(),
        "H_adv": pair.adversarial.reconstruct()[0].tolist(),
        "H_orig": pair.with_original[0].tolist(),
    }
    kernels, shown_kernels = kernel_changes(trained, x)
    result = {
        "classes": list(image.classes),
        "label": int(image.labels),
        "attack": {
            **{key: int(getattr(found, key)) for key in ("before", "after", "steps")},
            **{key: float(getattr(found, key)) for key in ("l2", "linf")},
            "fooled": bool(found.fooled(image.labels)),
        },
        "outputs": outputs,
        "pixels changed": float(relative_change(found.pixels, found.adversarial, 1)),
        "inputs changed": float(pair.inputs_changed),
        "changed": {
            part: relative_change(*both, 2)[0].tolist() for part, both in pair.parts.items()
        },
        "layers": layer_changes(trained, x),
        "gates": gate_counts(patterns[0]),
        "flipped": {layer: float(share) for layer, share in flipped(*patterns).items()},
        "near kinks": {
            layer: count.tolist() for layer, count in near_kinks(trained.network, x).items()
        },
        "kernels": kernels,
    }
    return result, shown_kernels | _shown(pair, shown_classes(outputs))


def layer_changes(
    trained: Trained,
    x: Float[Tensor, "2 c h w"],
) -> dict[str, dict[str, float | None]]:
    """Relative change of each layer's hyperplanes, taken together as one vector.

    Convolutions use mode RM1, ``fc`` uses RM0.

    Args:
        trained: The network.
        x: The input before and after the attack.

    Returns:
        Layer -> ``image`` and ``bias`` -> the change. It is ``None`` if the part does not exist, or
        is zero both before and after.
    """
    kernels = [layer for layer in trained.network.layers.values() if layer.kernel is not None]
    found: dict[str, dict[str, float | None]] = {}
    for mode in ("RM1", "RM0"):
        names = [layer.name for layer in kernels if mode in layer.modes]
        for name, planes in hyperplanes(
            trained.network,
            x,
            names,
            mode,
            own_bias=False,
            scale=SCALE,
        ).items():
            parts = {"image": planes.image, "bias": planes.bias}
            changes = {part: relative_change(both[0], both[1], 0) for part, both in parts.items()}
            found[name] = {
                part: None if change.isnan() else float(change) for part, change in changes.items()
            }
    return found


def kernel_changes(
    trained: Trained,
    x: Float[Tensor, "2 c h w"],
) -> tuple[Found, dict[str, np.ndarray]]:
    """Change of the RM3 hyperplanes of conv1's kernels [Wan2022, Figs. 4.2 and 4.3, a5].

    Args:
        trained: The network.
        x: The input before and after the attack.

    Returns:
        Statistics over all kernels whose hyperplane before the attack is not zero. Then the
        changes ``(8, 8, C, H, W)`` for the eight in-channels and the eight out-channels that
        change most.
    """
    before, after = hyperplanes(trained.network, x, KERNEL_LAYER, "RM3", scale=SCALE).image
    norms = (after - before).flatten(2).norm(dim=2)
    alive = before.flatten(2).any(2)
    changes = relative_change(before, after, 2)[alive]
    rows, columns = (norms.norm(dim=d).topk(KERNELS).indices.sort().values for d in (1, 0))
    numbers = {
        "kernels": len(changes),
        "changed": int((changes > 0).sum()),
        "median": float(changes.median()),
    }
    shown = (after - before)[rows][:, columns]
    return numbers, {
        "kernels": shown.numpy(),
        "in_channels": rows.numpy(),
        "out_channels": columns.numpy(),
    }


def shown_classes(outputs: Mapping[str, Sequence[float]]) -> list[int]:
    """The classes in tables and pictures: at most ten.

    If there are more than ten classes, those with the largest outputs are shown. The outputs
    before and after the attack both count.

    Example:
        >>> shown_classes({"original": [9.0, *[0.0] * 11], "network": list(range(12))})
        [0, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    """
    largest = np.maximum(outputs["original"], outputs["network"])
    return sorted(np.argsort(-largest, kind="stable")[:SHOWN].tolist())


def _shown(pair: Pair, classes: list[int]) -> dict[str, np.ndarray]:
    """The two images, and the hyperplane parts of some classes."""
    arrays = {
        "pixels": pair.found.pixels[0].numpy(),
        "adversarial": pair.found.adversarial[0].numpy(),
    }
    for part, both in pair.parts.items():
        arrays |= {
            f"{part} {when}": planes[0, classes].numpy()
            for when, planes in zip(("before", "after"), both, strict=True)
        }
    return arrays


def section(folder: Path) -> Section | None:
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
    blocks: list[Block] = []
    for name, (found, arrays) in results.items():
        blocks += [*claims(name, found), output_table(name, found), layer_table(name, found)]
        blocks += _pictures(folder, name, found, arrays)
    blocks.append(_by_layer(folder, networks))
    return Section(
        KEY,
        "Experiment 1: hyperplanes with and without adversarial noise",
        ran,
        tuple(blocks),
    )


def claims(name: str, found: Found) -> Iterator[Claim]:
    """Each claim of the study's captions and analysis, with the measured numbers.

    Args:
        name: The network.
        found: Its results.
    """
    outputs = found["outputs"]
    table = OUTPUTS.get(name)
    classes = found["classes"]
    errors = {key: largest_error(outputs[key], outputs["network"]) for key in ("H_adv", "H_orig")}
    printed = (
        [f"{largest_error(column, table.numbers[0]):.2g}" for column in table.numbers[1:]]
        if table
        else ["", ""]
    )
    before, after, rebuilt = (
        _winner(outputs[key], classes) for key in ("original", "network", "H_orig")
    )
    shown = [_winner(column, classes) for column in table.numbers] if table else []
    same = rebuilt == after
    yield Claim(
        f"{name}: the noise changes the class.",
        f"{before} becomes {after}",
        found["attack"]["fooled"],
        f"{table.label} becomes {shown[0]} ({table.source})" if table else "",
    )
    for key, text, holds, published in (
        (
            "H_adv",
            "the hyperplanes of the adversarial image reproduce its outputs",
            errors["H_adv"] <= SHARE_LIMIT,
            printed[0],
        ),
        (
            "H_orig",
            "the hyperplanes of the original image do not",
            errors["H_orig"] > SHARE_LIMIT,
            printed[1],
        ),
    ):
        off = max(abs(a - b) for a, b in zip(outputs[key], outputs["network"], strict=True))
        measured = f"largest |relative error| of {len(classes)} outputs: {errors[key]:.2g}; largest |error|: {off:.2g}"
        yield Claim(f"{name}: {text}.", measured, holds, published)
    expected = bool(shown) and shown[0] == shown[2]
    yield Claim(
        f"{name}: with the hyperplanes of the original image, the class is {'the same' if expected else 'another one'}.",
        f"the largest output is that of {rebuilt}, the network's that of {after}",
        same == expected,
        f"{shown[2]}, the network's {shown[0]}" if table else "",
    )
    for part, changes in found["changed"].items():
        yield Claim(
            f"{name}: the hyperplanes of all classes differ significantly ({part} parts), the images hardly.",
            f"relative change of the hyperplanes {min(changes):.2f} to {max(changes):.2f}; of the "
            f"network's input {found['inputs changed']:.3f}, of the pixels "
            f"{found['pixels changed']:.3f}",
            min(changes) > found["inputs changed"],
        )
    first, second = list(found["layers"].values())[:2]
    yield Claim(
        f"{name}: the difference starts from conv1, the second convolution.",
        f"relative change of the hyperplanes of conv0: {first['image']:g}, of conv1: "
        f"{second['image']:.3f}; {found['kernels']['changed']} of conv1's "
        f"{found['kernels']['kernels']} RM3 hyperplanes that are not zero change, their median by "
        f"{found['kernels']['median']:.3f}",
        first["image"] == 0 < second["image"],
    )


def output_table(name: str, found: Found) -> Table:
    """The network's outputs at the adversarial image and their two reconstructions.

    The published table is shown next to it.

    Args:
        name: The network.
        found: Its results.
    """
    head = ["class", "network", "with H_adv", "with H_orig"]
    columns = ("network", "H_adv", "H_orig")
    values = [found["outputs"][key] for key in columns]
    largest = [max(column) for column in values]
    sheet = Sheet(f"{name}: outputs at the adversarial image", head)
    for k in shown_classes(found["outputs"]):
        cells = [_bold(f"{v[k]:.6g}", v[k] == top) for v, top in zip(values, largest, strict=True)]
        sheet.rows.append([f"{k} ({found['classes'][k]})", *cells])
    table = OUTPUTS.get(name)
    caption = (
        "H_adv and H_orig: hyperplanes of the adversarial and of the original image, each with "
        "the adversarial image; bold: the "
        "largest. "
        + ("The published image is another one." if table else "CIFAR-100 is beyond the study.")
    )
    return Table(sheet, caption, _published(table, found["classes"]) if table else None)


def _published(table: Outputs, classes: Sequence[str]) -> Sheet:
    numbers = table.numbers
    printed = (table.network, table.adversarial, table.original)
    sheet = Sheet(
        f"{table.source}: {table.label}",
        ["class", "network", "with H_adv", "with H_orig"],
    )
    for k, name in enumerate(classes):
        cells = [
            _bold(text[k], column[k] == max(column))
            for text, column in zip(printed, numbers, strict=True)
        ]
        sheet.rows.append([f"{k} ({name})", *cells])
    return sheet


def layer_table(name: str, found: Found) -> Table:
    """Changes of hyperplanes and gates per layer: they show where the difference begins.

    Args:
        name: The network.
        found: Its results.
    """
    head = [
        "layer",
        "image part",
        "bias part",
        "gates flipped %",
        "gates",
        "near, original",
        "near, adversarial",
    ]
    sheet = Sheet(f"{name}: the difference by layer", head)
    for layer, changes in found["layers"].items():
        parts = [
            "" if changes[part] is None else f"{changes[part]:.4f}" for part in ("image", "bias")
        ]
        if layer in found["gates"]:
            shares = f"{100 * found['flipped'][layer]:.3f}", f"{found['gates'][layer]:,}"
            gates = [*shares, *map(str, found["near kinks"][layer])]
        else:
            gates = [""] * 4
        sheet.rows.append([layer, *parts, *gates])
    caption = (
        "Relative change |H_adv - H| / |H| of all hyperplanes of a layer together (RM1 of "
        "convolutions, RM0 of fc, without the layer's own bias); gates are those after the "
        "layer, so they bear on later layers. Near: gates within rounding of their kink "
        f"({ROUNDINGS} float32 eps of the sum of the terms' magnitudes), which another machine "
        "may set otherwise."
    )
    return Table(sheet, caption)


def _ran(name: str, found: Found) -> str:
    attack = found["attack"]
    settings = found["settings"]
    step = settings["attack"]["step"]
    steps = (
        ", ".join(f"{s:.4f}" for s in step) + " by channel"
        if isinstance(step, list)
        else f"{step:g}"
    )
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
    arrays: dict[str, np.ndarray],
) -> Iterator[Picture]:
    """Pictures of the noise, of the class hyperplanes before and after, and of the RM3 change."""
    table = OUTPUTS.get(name)
    classes = found["classes"]
    labels = (
        _winner(found["outputs"]["original"], classes),
        _winner(found["outputs"]["network"], classes),
    )
    figure = table.figure if table else ""
    shown = [classes[k] for k in shown_classes(found["outputs"])]
    pixels = torch.from_numpy(arrays["pixels"])
    adversarial = torch.from_numpy(arrays["adversarial"])
    drawing = plots.attacked(
        pixels,
        adversarial,
        f"{name}: {labels[0]} becomes {labels[1]}",
        labels,
    )
    yield _saved(folder, f"{name}-attacked", drawing, figure)
    for part in found["changed"]:
        before, after = (torch.from_numpy(arrays[f"{part} {when}"]) for when in ("before", "after"))
        drawing = plots.differences(
            before,
            after,
            shown,
            f"{name}: {part} parts of the classes (RM0)",
        )
        yield _saved(folder, f"{name}-{part}", drawing, figure)
    yield _saved(
        folder,
        f"{name}-kernels",
        _kernel_grid(name, arrays),
        figure if "nobias" in name else "",
    )


def _kernel_grid(name: str, arrays: dict[str, np.ndarray]) -> Drawing:
    """Change of the RM3 hyperplanes: rows are in-channels, columns are out-channels."""
    parts = arrays["kernels"]
    scale = plots.Scale.of([arrays["kernels"]])
    height, width = (n + 1 for n in parts.shape[-2:])
    tiles = np.ones((KERNELS * height, KERNELS * width, 3))  # ones: a white line between two tiles
    for i, j in np.ndindex(KERNELS, KERNELS):
        tiles[i * height : (i + 1) * height - 1, j * width : (j + 1) * width - 1] = scale.colours(
            parts[i, j]
        )
    figure = new_figure(
        WIDTH,
        WIDTH + 0.9,
        f"{name}: difference of the RM3 hyperplanes of {KERNEL_LAYER}'s kernels",
    )
    axes = figure.add_subplot()
    axes.imshow(tiles, interpolation="nearest")
    middles = np.arange(KERNELS)
    axes.set_xticks((middles + 0.5) * width, arrays["out_channels"], fontsize=SMALL)
    axes.set_yticks((middles + 0.5) * height, arrays["in_channels"], fontsize=SMALL)
    axes.set(xlabel="channel", ylabel="in-channel")
    caption = f"the in-channels and channels that change most; adversarial - original, one scale: {scale.words(IMAGE_UNIT)}"
    return finished(
        figure,
        {n: arrays[n] for n in ("kernels", "in_channels", "out_channels")},
        caption,
    )


def _by_layer(folder: Path, networks: dict[str, Found]) -> Picture:
    """Relative change of the image parts per layer, for all networks."""
    # The deepest network comes first: it sets the order of the layers on the axis.
    deepest = sorted(networks, key=lambda name: -len(networks[name]["layers"]))
    values = {
        name: {
            layer: c["image"]
            for layer, c in networks[name]["layers"].items()
            if c["image"] is not None
        }
        for name in deepest
    }
    title = "Relative change of a layer's hyperplanes under adversarial noise, image part"
    return _saved(folder, "by-layer", plots.by_layer(values, title, "|H_adv - H| / |H|"), "")


def _saved(folder: Path, stem: str, drawing: Drawing, published: str) -> Picture:
    path = plots.save(drawing, folder / KEY / f"{stem}.png", formats=("png", "svg"))
    return Picture(path.relative_to(folder), drawing.caption, published)


def _winner(outputs: Sequence[float], classes: Sequence[str]) -> str:
    return classes[int(np.argmax(outputs))]


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text
