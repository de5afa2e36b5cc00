"""Experiment 1 [Wan2022, sections 4.2.1 and 4.3.1]: hyperplanes with and without adversarial noise.

The hyperplanes of all classes are compared at one image before and after an attack.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.engine.pattern import record_pattern
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.plots.biases import layer_starts
from adjointbackmap.study.adversarial.gates import flipped, gate_counts, near_kinks
from adjointbackmap.study.adversarial.pairs import (
    Pair,
    attack_of,
    attacked_pair,
    relative_change,
)
from adjointbackmap.study.results import Arrays, Found, keep
from adjointbackmap.study.setup import SCALE, Setup, Trained

KEY = "noise"
MOST_CLASSES = 10  # most classes in tables and pictures
KERNELS = 8  # in-channels, and out-channels, in the picture of RM3
KERNEL_LAYER = "conv1"


def compute_noise(setup: Setup, report: Callable[[str, float], None]) -> None:
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
        keep(setup.folder / KEY / f"{name}.json", settings, partial(measure_noise, trained, image))
    report("with and without noise", 1.0)


def measure_noise(trained: Trained, image: data.Images) -> tuple[Found, Arrays]:
    """Compute the numbers of one network at one image, and the arrays for its pictures.

    Args:
        trained: The network.
        image: The one image.
    """
    pair = attacked_pair(trained, image)
    found = pair.found
    x = torch.cat([pair.original.x, pair.adversarial.x])
    both = (pair.original.x, pair.adversarial.x)
    patterns = [record_pattern(trained.network, part, SCALE) for part in both]
    near = near_kinks(trained.network, x)
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
        "attack": _outcome(pair, image),
        "outputs": outputs,
        "pixels changed": float(relative_change(found.pixels, found.adversarial, 1)),
        "inputs changed": float(pair.inputs_changed),
        "changed": {part: relative_change(*two, 2)[0].tolist() for part, two in pair.parts.items()},
        "layers": layer_changes(trained, x),
        "gates": gate_counts(patterns[0]),
        "flipped": {layer: float(share) for layer, share in flipped(*patterns).items()},
        "near kinks": {layer: count.tolist() for layer, count in near.items()},
        "kernels": kernels,
        "bias starts": layer_starts(trained.network.biases),
    }
    return result, shown_kernels | _shown(pair, shown_classes(outputs))


def _outcome(pair: Pair, image: data.Images) -> Found:
    """Classes before and after the attack, its steps and its noise."""
    found = pair.found
    return {
        **{key: int(getattr(found, key)) for key in ("before", "after", "steps")},
        **{key: float(getattr(found, key)) for key in ("l2", "linf")},
        "fooled": bool(found.fooled(image.labels)),
    }


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
    network = trained.network
    kernels = [layer for layer in network.layers.values() if layer.kernel is not None]
    found: dict[str, dict[str, float | None]] = {}
    for mode in ("RM1", "RM0"):
        names = [layer.name for layer in kernels if mode in layer.modes]
        by_layer = hyperplanes(network, x, names, mode, own_bias=False, scale=SCALE)
        for name, planes in by_layer.items():
            found[name] = {"image": _change(planes.image), "bias": _change(planes.bias)}
    return found


def _change(part: Float[Tensor, "2 ..."]) -> float | None:
    """Relative change from the first to the second; ``None`` if both are zero or empty."""
    change = relative_change(part[0], part[1], 0)
    return None if change.isnan() else float(change)


def kernel_changes(
    trained: Trained,
    x: Float[Tensor, "2 c h w"],
) -> tuple[Found, Arrays]:
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
    return sorted(np.argsort(-largest, kind="stable")[:MOST_CLASSES].tolist())


def _shown(pair: Pair, classes: list[int]) -> Arrays:
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
