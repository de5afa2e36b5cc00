"""Images before and after an untargeted attack, and the hyperplanes of all classes at both."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adjointbackmap import data
from adjointbackmap.attacks import basic_iterative, study_attack
from adjointbackmap.examples import Attacked
from adjointbackmap.planes.hyperplane import Hyperplanes, hyperplanes, relative_error
from adjointbackmap.study.setup import SCALE, Trained


@dataclass(frozen=True)
class Pair:
    """Images before and after an attack, with the RM0 hyperplanes of all classes at both.

    Attributes:
        found: The attack's result.
        original: Hyperplanes at the N images.
        adversarial: Hyperplanes at the attacked images.
    """

    found: Attacked
    original: Hyperplanes
    adversarial: Hyperplanes

    @property
    def parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each part of the hyperplanes before and after the attack.

        Image parts are ``(N, classes, C, H, W)``. Bias parts are ``(N, classes, M)``. There are
        none if the network has no biases.
        """
        names = ("image", "bias") if len(self.original.network.biases) else ("image",)
        return {
            name: (getattr(self.original, name), getattr(self.adversarial, name)) for name in names
        }

    @property
    def with_original(self) -> Float[Tensor, "n classes"]:
        """Outputs at the attacked images, reconstructed from the original images' hyperplanes."""
        return self.original.reconstruct(self.adversarial.x)

    @property
    def inputs_changed(self) -> Float[Tensor, " n"]:
        """Relative change of the network's inputs."""
        return relative_change(self.original.x, self.adversarial.x, 1)


def attacked_pair(trained: Trained, images: data.Images) -> Pair:
    """Attack images by the study's basic iterative method, which stops at the first success.

    Args:
        trained: The network.
        images: Images that it classifies correctly.
    """
    pixels = images.unit_interval()
    subject = trained.subject
    attack = study_attack(1, pixels, subject.prepare)
    found = basic_iterative(subject.module, pixels, images.labels, attack, subject.prepare)
    original, adversarial = (
        hyperplanes(trained.network, trained.input(x), "fc", "RM0", scale=SCALE)
        for x in (found.pixels, found.adversarial)
    )
    return Pair(found, original, adversarial)


def attack_of(trained: Trained, images: data.Images) -> dict[str, Any]:
    """Settings that identify the results, as JSON-compatible values.

    They are the weights, the attack and the scale of the pattern.
    """
    attack = study_attack(1, images.unit_interval()[:1], trained.subject.prepare)
    return json.loads(json.dumps({**trained.about, "attack": asdict(attack), "scale": SCALE}))


def relative_change(before: Tensor, after: Tensor, kept: int) -> Tensor:
    """Norm of the difference divided by the norm before.

    The norms are over all dimensions after the first ``kept``. The result is NaN if both vectors
    are zero.

    Example:
        >>> relative_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]), 1).tolist()
        [0.1]
    """
    change, size = (t.double().flatten(kept).norm(dim=-1) for t in (after - before, before))
    return change / size


def largest_error(found: Sequence[float], values: Sequence[float]) -> float:
    """Largest magnitude of the relative errors [Wan2022, eq. 3.29].

    Example:
        >>> largest_error([2.0, 3.0], [2.0, 4.0])
        0.25
    """
    return float(
        relative_error(*(torch.tensor(t, dtype=torch.float64) for t in (found, values))).abs().max()
    )
