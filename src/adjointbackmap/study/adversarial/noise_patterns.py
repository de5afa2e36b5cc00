"""Noise patterns of one image: adversarial ones change the class, Gaussian ones do not."""

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
TRIES = 20  # rounds of drawing, at most


@dataclass(frozen=True)
class Patterns:
    """Noise patterns of one image, as many as could be made.

    The kinds are ``"adversarial"``, ``"Gaussian"`` and ``"control"``.

    Attributes:
        wanted: Number of patterns wanted of each kind.
        targets: The targets of those of the nine attacks that reached them.
        target: For each adversarial pattern, the target of the attack whose noise it scales down.
        beta: For each adversarial pattern, the factor of that noise.
        noise: Kind -> patterns ``(n, 3, 32, 32)`` in pixels, before clipping. The other kinds are
            made only if all adversarial patterns could be made.
        images: Kind -> the image plus each pattern, clipped to [0, 1].
        redrawn: Kind -> number of drawn patterns that were rejected.
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
        """The kinds with too few patterns, in words; ``None`` if there are none."""
        short = [
            f"{len(made)} of {self.wanted} {kind} patterns"
            for kind, made in self.noise.items()
            if len(made) < self.wanted
        ]
        return f"only {', '.join(short)} could be made" if short else None


def make_patterns(
    trained: Trained,
    pixels: Float[Tensor, "1 3 32 32"],
    label: int,
    seed: int,
    patterns: int = PATTERNS,
) -> Patterns:
    """Draw adversarial patterns that change the class, and Gaussian patterns that do not.

    An adversarial pattern is beta times the noise of an attack that reached its target. Beta is
    uniform in (0, 1). Each target gives the same number of patterns; if one gives too few, the
    others give more. Gaussian patterns have the mean and the variance of the adversarial ones, over
    all pixels of all patterns. Control patterns have the same mean, and in each pixel the variance
    of the adversarial ones there. The sum of image and pattern is clipped to [0, 1]. A pattern with
    the wrong effect on the class is drawn again, at most :data:`TRIES` times.

    Args:
        trained: The network.
        pixels: An image in [0, 1] that it classifies correctly.
        label: Its class.
        seed: Seed of all draws.
        patterns: Number of patterns of each kind, at least two.

    Raises:
        ValueError: If ``patterns`` is less than 2.
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
    of, beta, again = scaled_down(noises, known, patterns, generator)
    noise = {"adversarial": beta.view(-1, 1, 1, 1) * noises[of]}
    redrawn = {"adversarial": again}
    if len(beta) == patterns:
        like = noise["adversarial"]
        for kind, deviation in (("Gaussian", like.std(correction=0)), ("control", like.std(0))):

            def make(count: int, deviation: Tensor = deviation) -> Tensor:
                return like.mean() + deviation * torch.randn(
                    count,
                    *pixels.shape[1:],
                    generator=generator,
                )

            noise[kind], redrawn[kind] = _draw(make, known, patterns)
    images = {kind: (pixels + drawn).clamp(0, 1) for kind, drawn in noise.items()}
    return Patterns(patterns, targets[reached], targets[reached][of], beta, noise, images, redrawn)


def scaled_down(
    noises: Tensor,
    known: Callable[[Tensor], Tensor],
    patterns: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """Draw factors with which the noises change the class.

    Returns the index of the noise for each factor, the factors, and the number of rejected factors.
    """
    betas = [torch.zeros(0)] * len(noises)
    giving = list(range(len(noises)))
    redrawn = 0

    def give(noise: Tensor, count: int) -> tuple[Tensor, int]:
        draw = partial(torch.rand, generator=generator)
        return _draw(draw, lambda beta: ~known(beta.view(-1, 1, 1, 1) * noise), count)

    while giving and (left := patterns - sum(map(len, betas))):
        shares = [
            left // len(giving) + (place < left % len(giving)) for place in range(len(giving))
        ]
        for i, share in zip(tuple(giving), shares, strict=True):
            more, again = give(noises[i], share)
            betas[i] = torch.cat([betas[i], more])
            redrawn = redrawn + again
            if len(more) < share:
                giving.remove(i)
    of = torch.arange(len(noises)).repeat_interleave(
        torch.tensor([len(b) for b in betas], dtype=torch.int64)
    )
    return of, torch.cat([torch.zeros(0), *betas]), redrawn


def _draw(
    make: Callable[[int], Tensor],
    fits: Callable[[Tensor], Tensor],
    count: int,
) -> tuple[Tensor, int]:
    """Draw until ``count`` items fit, at most :data:`TRIES` times.

    Returns them, and the number of rejected items.
    """
    kept = make(0)
    redrawn = 0
    for _ in range(TRIES):
        if len(kept) == count:
            break
        drawn = make(count - len(kept))
        good = fits(drawn)
        kept = torch.cat([kept, drawn[good]])
        redrawn = redrawn + int((~good).sum())
    return kept, redrawn
