"""Attacks within a ball around each image: PGD [Madry2018] and APGD [CroceHein2020].

Both climb the cross-entropy from a random start. PGD takes equal steps. APGD has momentum and
halves its step where it no longer climbs, so that it needs no step length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap.analysis.crossings import Prepare
from adjointbackmap.attacks.iterative import check_classes, check_targets, start_images
from adjointbackmap.examples import BATCH, Attacked, examine, forward, scores_of

NORMS = ("linf", "l2")
STEP_SHARE = 2.5  # PGD's steps together are this many radii long [Madry2018]
TINY = 1e-12  # keeps zero gradients from a division by zero
# Constants of APGD, from section 3.1 of its paper
MOMENTUM = 0.75  # share of the new step; the rest repeats the last one
CLIMBS = 0.75  # least share of steps that climb, or the step length is halved
FIRST_CHECK, LESS_EACH, LEAST_CHECK = 0.22, 0.03, 0.06  # shares of all steps between checks


@dataclass(frozen=True)
class Ball:
    """The images within a distance of an image, inside the box of pixels.

    Attributes:
        radius: Largest distance, in pixels.
        norm: ``"linf"`` or ``"l2"``.
        box: Smallest and largest value of a pixel.

    Raises:
        ValueError: If the radius is not positive, the norm unknown, or the box empty.

    Example:
        >>> ball = Ball(0.5, "l2")
        >>> ball.project(torch.full((1, 1, 1, 1), 0.9), torch.zeros(1, 1, 1, 1)).item()
        0.5
    """

    radius: float
    norm: str = "linf"
    box: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not (self.radius > 0 and isfinite(self.radius)):
            msg = f"The radius of a ball must be positive. Got {self.radius}."
            raise ValueError(msg)
        if self.norm not in NORMS:
            msg = f"The norm must be one of {', '.join(NORMS)}. Got {self.norm!r}."
            raise ValueError(msg)
        if not self.box[0] < self.box[1]:
            msg = f"box must be the smallest and the largest value of a pixel. Got {self.box}."
            raise ValueError(msg)

    def project(self, points: Tensor, centres: Tensor) -> Tensor:
        """The nearest points in the ball around each centre, then cut to the box.

        Args:
            points: Images ``(N, C, H, W)``.
            centres: Images of the same shape.
        """
        noise = points - centres
        if self.norm == "linf":
            inside = centres + noise.clamp(-self.radius, self.radius)
        else:
            inside = centres + noise * (self.radius / (_length(noise) + TINY)).clamp(max=1)
        return inside.clamp(*self.box)

    def steepest(self, slopes: Tensor) -> Tensor:
        """The direction of length 1 in which a linear function with these slopes grows fastest."""
        if self.norm == "linf":
            return slopes.sign()
        return slopes / (_length(slopes) + TINY)

    def random(self, centres: Tensor, generator: torch.Generator) -> Tensor:
        """A random image around each centre, on the ball's surface before it is cut to the box."""
        draw = torch.rand if self.norm == "linf" else torch.randn
        noise = draw(centres.shape, generator=generator).to(centres)
        if self.norm == "linf":
            noise = 2 * noise - 1
            size = noise.abs().amax((1, 2, 3), keepdim=True)
        else:
            size = _length(noise)
        return (centres + self.radius * noise / (size + TINY)).clamp(*self.box)


def pgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    ball: Ball,
    prepare: Prepare | None = None,
    targets: Tensor | None = None,
    *,
    steps: int = 20,
    step: float | None = None,
    starts: int = 1,
    seed: int | None = 0,
) -> Attacked:
    r"""Projected gradient descent [Madry2018]: equal steps along the gradient, inside a ball.

    A step is :math:`X_{n+1} = \Pi(X_n + a\,s(\nabla_X J(X_n, y)))`, with the projection :math:`\Pi`
    onto the ball and the box. The direction :math:`s` is the gradient's sign in linf, and the
    gradient divided by its length in l2. With targets the steps lower their loss. Of all starts,
    an image keeps its first success, or else the largest loss.

    Args:
        model: Any module in eval mode that gives ``(N, classes)``; it is not changed.
        pixels: Images ``(N, C, H, W)`` in the ball's box.
        labels: Class of each image ``(N,)``.
        ball: Radius and norm, in pixels.
        prepare: Map from pixels to the model's input; the identity by default.
        targets: Class that the attack aims at for each image ``(N,)``.
        steps: Number of steps of a start.
        step: Length of a step; by default all steps together are 2.5 radii long.
        starts: Number of random starts.
        seed: Seed of the starts; ``None`` starts at the image itself.

    Raises:
        ValueError: If the model is in train mode, or images, classes or numbers do not fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> pixels = torch.rand(2, 3, 2, 2)
        >>> found = pgd(model, pixels, torch.tensor([0, 1]), Ball(8 / 255), steps=5)
        >>> bool((found.linf <= 8 / 255 + 1e-6).all())
        True
    """
    _check_counts(steps, starts, step)
    length = STEP_SHARE * ball.radius / steps if step is None else step

    def climb(losses: "_Losses", start: Tensor) -> "_Best":
        best = _Best.at(start, *losses.of(start))
        x = start
        slopes = best.slopes
        for _ in range(steps):
            x = ball.project(x + length * ball.steepest(slopes), losses.pixels)
            loss, slopes, reached = losses.of(x)
            best = best.better(x, loss, slopes, reached)
        return best

    start = _Starts(ball, climb, steps, starts, seed)
    return _attack(model, pixels, labels, start, prepare, targets)


def apgd(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    ball: Ball,
    prepare: Prepare | None = None,
    targets: Tensor | None = None,
    *,
    steps: int = 100,
    starts: int = 1,
    seed: int | None = 0,
) -> Attacked:
    """Auto-PGD on the cross-entropy [CroceHein2020]: the step length follows from the climb.

    The first steps are two radii long and have momentum. At checkpoints, an image halves its step
    and goes back to its best place if too few steps climbed, or nothing was gained since the last
    check. It is the first part of AutoAttack; it has no other part.

    Args:
        model: Any module in eval mode that gives ``(N, classes)``; it is not changed.
        pixels: Images ``(N, C, H, W)`` in the ball's box.
        labels: Class of each image ``(N,)``.
        ball: Radius and norm, in pixels.
        prepare: Map from pixels to the model's input; the identity by default.
        targets: Class that the attack aims at for each image ``(N,)``.
        steps: Number of steps of a start.
        starts: Number of random starts.
        seed: Seed of the starts; ``None`` starts at the image itself.

    Raises:
        ValueError: If the model is in train mode, or images, classes or numbers do not fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> pixels = torch.rand(2, 3, 2, 2)
        >>> found = apgd(model, pixels, torch.tensor([0, 1]), Ball(0.5, "l2"), steps=10)
        >>> bool((found.l2 <= 0.5 + 1e-6).all())
        True
    """
    _check_counts(steps, starts)

    def climb(losses: "_Losses", start: Tensor) -> "_Best":
        return _Climb(ball, losses, start, steps).run()

    start = _Starts(ball, climb, steps, starts, seed)
    return _attack(model, pixels, labels, start, prepare, targets)


@dataclass(frozen=True)
class _Losses:
    """The loss that an attack climbs, for one batch.

    Attributes:
        model: The attacked module.
        prepare: Map from pixels to its input.
        pixels: The images.
        classes: Their labels, or their targets.
        sign: 1 for labels, -1 for targets, whose loss is to fall.
    """

    model: nn.Module
    prepare: Prepare | None
    pixels: Tensor
    classes: Tensor
    sign: int

    def of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, its gradient, and whether the attack succeeds, for each image."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            scores = forward(self.model, x, self.prepare)
            losses = self.sign * F.cross_entropy(scores, self.classes, reduction="none")
            (slopes,) = torch.autograd.grad(losses.sum(), x)
        hit = scores.argmax(1) == self.classes
        return losses.detach(), slopes, hit == (self.sign == -1)

    def only(self, chosen: Tensor) -> "_Losses":
        """The same for some of the images."""
        return replace(self, pixels=self.pixels[chosen], classes=self.classes[chosen])


@dataclass(frozen=True)
class _Best:
    """The best place so far of each image.

    Attributes:
        x: The place with the largest loss.
        loss: Its loss.
        slopes: The loss's gradient there.
        found: The latest place where the attack succeeds; else the start.
        success: Whether there is such a place.
    """

    x: Tensor
    loss: Tensor
    slopes: Tensor
    found: Tensor
    success: Tensor

    @classmethod
    def at(cls, start: Tensor, loss: Tensor, slopes: Tensor, reached: Tensor) -> "_Best":
        """At the start, which nobody has climbed from."""
        return cls(start, loss, slopes, start, reached)

    def better(self, x: Tensor, loss: Tensor, slopes: Tensor, reached: Tensor) -> "_Best":
        """With another place: it replaces those of smaller loss."""
        more = loss > self.loss
        return _Best(
            _where(more, x, self.x),
            _where(more, loss, self.loss),
            _where(more, slopes, self.slopes),
            _where(reached, x, self.found),
            self.success | reached,
        )

    @property
    def result(self) -> Tensor:
        """A place of success, or else the place with the largest loss."""
        return _where(self.success, self.found, self.x)


@dataclass
class _Climb:
    """One start of APGD: the state of algorithm 1 of its paper, for a batch."""

    ball: Ball
    losses: _Losses
    start: Tensor
    steps: int
    history: list[Tensor] = field(default_factory=list)  # loss at the start and after each step

    def run(self) -> _Best:
        """Take all steps."""
        ball = self.ball
        pixels = self.losses.pixels
        best = _Best.at(self.start, *self.losses.of(self.start))
        x = before = self.start
        slopes = best.slopes
        length = torch.full_like(pixels[:, :1, :1, :1], 2 * ball.radius)
        checked = _Check(best.loss, torch.ones_like(best.success))
        every = max(int(FIRST_CHECK * self.steps), 1)
        since = 0
        self.history.append(best.loss)
        for number in range(self.steps):
            share = MOMENTUM if number else 1.0
            plain = ball.project(x + length * ball.steepest(slopes), pixels)
            mixed = x + share * (plain - x) + (1 - share) * (x - before)
            before = x
            x = ball.project(mixed, pixels)
            loss, slopes, reached = self.losses.of(x)
            best = best.better(x, loss, slopes, reached)
            self.history.append(loss)
            since += 1
            if since == every:
                stuck = self._stuck(every, checked, best.loss)
                length = _where(stuck, length / 2, length)
                x = _where(stuck, best.x, x)
                slopes = _where(stuck, best.slopes, slopes)
                checked = _Check(best.loss, stuck)
                every = max(every - max(int(LESS_EACH * self.steps), 1), self._least)
                since = 0
        return best

    @property
    def _least(self) -> int:
        """Fewest steps between two checks."""
        return max(int(LEAST_CHECK * self.steps), 1)

    def _stuck(self, every: int, last: "_Check", best: Tensor) -> Tensor:
        """Which images halve their step: conditions 1 and 2 of the paper."""
        recent = torch.stack(self.history[-(every + 1) :])
        climbs = (recent[1:] > recent[:-1]).sum(0)
        few = climbs <= CLIMBS * every
        nothing = ~last.halved & (last.best >= best)
        return few | nothing


@dataclass(frozen=True)
class _Check:
    """The best loss at the last check, and which images halved their step there."""

    best: Tensor
    halved: Tensor


@dataclass(frozen=True)
class _Starts:
    """How often and from where an attack starts.

    Attributes:
        ball: The ball around each image.
        climb: Takes all steps of a start.
        steps: How many these are.
        count: Number of random starts.
        seed: Their seed; ``None`` starts once, at the image itself.
    """

    ball: Ball
    climb: Callable[[_Losses, Tensor], _Best]
    steps: int
    count: int
    seed: int | None

    def attack(self, losses: _Losses, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The best image of all starts, and its number of steps.

        An image that has succeeded starts no more.
        """
        result = losses.pixels.clone()
        taken = torch.zeros_like(losses.classes)
        largest = torch.full_like(result[:, 0, 0, 0], -torch.inf)
        left = torch.arange(len(result), device=result.device)
        for _ in range(1 if self.seed is None else self.count):
            part = losses.only(left)
            random = self.seed is not None
            start = self.ball.random(part.pixels, generator) if random else part.pixels
            best = self.climb(part, start)
            more = best.success | (best.loss > largest[left])
            result[left[more]] = best.result[more]
            largest[left[more]] = best.loss[more]
            taken[left] += self.steps
            left = left[~best.success]
            if not len(left):
                break
        return result, taken


def _attack(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    starts: _Starts,
    prepare: Prepare | None,
    targets: Tensor | None,
) -> Attacked:
    """Attack in batches from all starts, and measure the attacked images."""
    images = start_images(model, pixels, starts.ball.box)
    count = scores_of(model, images[:1], prepare).shape[1]
    known = check_classes(labels, "labels", images, count)
    losses = _Losses(model, prepare, images, known, 1)
    if targets is not None:
        aims = check_targets(targets, known, images, count)
        losses = replace(losses, classes=aims, sign=-1)
    generator = torch.Generator().manual_seed(starts.seed or 0)
    places = torch.arange(len(images), device=images.device)
    made = [starts.attack(losses.only(part), generator) for part in places.split(BATCH)]
    adversarial, steps = (torch.cat(each) for each in zip(*made, strict=True))
    return replace(examine(model, images, adversarial, prepare, starts.ball.box), steps=steps)


def _length(images: Tensor) -> Tensor:
    """Euclidean length of each image, ``(N, 1, 1, 1)``."""
    return images.square().sum((1, 2, 3), keepdim=True).sqrt()


def _where(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows of one tensor where chosen, else those of another."""
    return torch.where(chosen.view(-1, *[1] * (first.dim() - 1)), first, second)


def _check_counts(steps: int, starts: int, step: float | None = None) -> None:
    """Check that the numbers of an attack are positive.

    Raises:
        ValueError: If one is not.
    """
    for name, number in (("steps", steps), ("starts", starts), ("step", step)):
        if number is not None and not (number > 0 and isfinite(number)):
            msg = f"{name} must be positive. Got {number}."
            raise ValueError(msg)
