"""Hyperplanes in a file, with what made them."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from adjointbackmap.hyperplane import Hyperplanes
from adjointbackmap.network import Network


def weights_hash(network: Network) -> str:
    """SHA-256 of the model's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def provenance(planes: Hyperplanes) -> dict:
    """What made some hyperplanes: weights, versions, layer, mode, k, dtype, and where each bias lies in the bias part."""
    return {
        "adjointbackmap": version("adjointbackmap"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "weights sha256": weights_hash(planes.network),
        "layer": planes.layer,
        "mode": planes.mode,
        "own bias": planes.own_bias,
        "k": planes.scale,
        "dtype": str(planes.image.dtype).removeprefix("torch."),
        "unit dimensions": list(planes.units.names),
        "biases": {name: [part.slice.start, part.slice.stop] for name, part in planes.network.biases.items()},
    }


def write_npz(planes: Hyperplanes, path: Path) -> Path:
    """Write image, bias, value, unit places and provenance (as JSON) to a NumPy archive; nothing in it is pickled.

    Args:
        planes: Hyperplanes of any units.
        path: File to write; it appears when it is whole.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"image": planes.image, "bias": planes.bias, "value": planes.value, "x": planes.x, **planes.units.coordinates()}
    partial = path.with_name(path.name + ".partial")
    made_by = np.array(json.dumps(provenance(planes)))
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, provenance=made_by, **{n: t.cpu().numpy() for n, t in arrays.items()})
    partial.replace(path)
    return path
