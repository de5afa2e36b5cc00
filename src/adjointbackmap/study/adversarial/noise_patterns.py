"""Noise patterns of one image: scaled-down adversarial ones that deceive, and Gaussian ones that do not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from adjointbackmap.examples import scores_of
from adjointbackmap.study.adversarial.targets import attack_targets
from adjointbackmap.study.setup import Trained

PATTERNS = 50
TRIES = 20  # times that a pattern is drawn, at most


@dataclass(frozen=True)
class Patterns:
    """Noise patterns of one image by kind: ``"adversarial"``, ``"Gaussian"``, ``"control"``; as many as could be made.

    Attributes:
        wanted: How many of each kind were wanted.
        targets: Which of the nine attacks reached their targets: the targets.
        target: The target whose noise each adversarial pattern is scaled down from.
        beta: By how much.
        noise: Kind -> patterns ``(n, 3, 32, 32)`` in pixels, as drawn; those that are not adversarial are made when all
            adversarial ones are there.
        images: Kind -> the image with each pattern, clipped to [0, 1].
        redrawn: Kind -> how many drawn patterns did not fit.
    """

    wanted: int
    targets: Int64[Tensor, " t"]
    target: Int64[Tensor, " n"]
    beta: Float[Tensor, " n"]
    noise: dict[str, Tensor]
    images: dict[str, Tensor]
    redrawn: dict[str, int]

    @property
    def missing(self) -> str | None:
        """Which patterns could not be made."""
        short = [f"{len(made)} of {self.wanted} {kind} patterns" for kind, made in self.noise.items() if len(made) < self.wanted]
        return f"only {', '.join(short)} could be made" if short else None


def make_patterns(
    trained: Trained, pixels: Float[Tensor, "1 3 32 32"], label: int, seed: int, patterns: int = PATTERNS
) -> Patterns:
    """Scaled-down adversarial patterns that still deceive, and Gaussian ones that do not, of the same mean and variance.

    Adversarial: beta times the noise of an attack that reached its target, beta uniform in (0, 1), as many of each target as
    it gives. Gaussian: of their mean and variance over all pixels of all patterns. Control: of their mean over all, and
    their variance in each pixel. Noise is added and the sum clipped to [0, 1]. A pattern that the network takes otherwise
    is drawn again, :data:`TRIES` times at most; a target that gives too few leaves the rest to the others.

    Args:
        trained: The network.
        pixels: An image in [0, 1] that it classifies correctly.
        label: Its class.
        seed: Of all draws.
        patterns: How many of each kind, at least two.

    Raises:
        ValueError: If there are fewer patterns.
    """
    if patterns < 2:
        msg = f"patterns must be at least 2, for a spread. Got {patterns}."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(seed)
    targets, attacked = attack_targets(trained, pixels, label, seed)
    reached = attacked.after == targets

    def known(noise: Tensor) -> Tensor:
        images = (pixels + noise).clamp(0, 1)
        return scores_of(trained.subject.module, images, trained.subject.prepare).argmax(1) == label

    noises = attacked.noise[reached]
    of, beta, again = _scale_down(noises, known, patterns, generator)
    noise, redrawn = {"adversarial": beta.view(-1, 1, 1, 1) * noises[of]}, {"adversarial": again}
    if len(beta) == patterns:
        like = noise["adversarial"]
        for kind, deviation in (("Gaussian", like.std(correction=0)), ("control", like.std(0))):

            def make(count: int, deviation: Tensor = deviation) -> Tensor:
                return like.mean() + deviation * torch.randn(count, *pixels.shape[1:], generator=generator)

            noise[kind], redrawn[kind] = _draw(make, known, patterns)
    images = {kind: (pixels + drawn).clamp(0, 1) for kind, drawn in noise.items()}
    return Patterns(patterns, targets[reached], targets[reached][of], beta, noise, images, redrawn)


def _scale_down(
    noises: Tensor, known: Callable[[Tensor], Tensor], patterns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """Which noise times which factor deceives, as many of each noise as it gives; and how many drawn factors did not."""
    betas, giving, redrawn = [torch.zeros(0)] * len(noises), list(range(len(noises))), 0

    def give(noise: Tensor, count: int) -> tuple[Tensor, int]:
        draw = partial(torch.rand, generator=generator)
        return _draw(draw, lambda beta: ~known(beta.view(-1, 1, 1, 1) * noise), count)

    while giving and (left := patterns - sum(map(len, betas))):
        shares = [left // len(giving) + (place < left % len(giving)) for place in range(len(giving))]
        for i, share in zip(tuple(giving), shares, strict=True):
            more, again = give(noises[i], share)
            betas[i], redrawn = torch.cat([betas[i], more]), redrawn + again
            if len(more) < share:
                giving.remove(i)
    of = torch.arange(len(noises)).repeat_interleave(torch.tensor([len(b) for b in betas], dtype=torch.int64))
    return of, torch.cat([torch.zeros(0), *betas]), redrawn


def _draw(make: Callable[[int], Tensor], fits: Callable[[Tensor], Tensor], count: int) -> tuple[Tensor, int]:
    """Draw until so many fit, or :data:`TRIES` times; and how many did not."""
    kept, redrawn = make(0), 0
    for _ in range(TRIES):
        if len(kept) == count:
            break
        drawn = make(count - len(kept))
        good = fits(drawn)
        kept, redrawn = torch.cat([kept, drawn[good]]), redrawn + int((~good).sum())
    return kept, redrawn
