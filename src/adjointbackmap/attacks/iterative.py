"""The attacks of the study: the basic iterative method, also towards a target [Kurakin2017]."""

from dataclasses import KW_ONLY, dataclass, replace
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adjointbackmap.analysis.crossings import Prepare
from adjointbackmap.engine.network import check_eval
from adjointbackmap.examples import BATCH, Attacked, examine, finite_batch, forward, scores_of

STUDY_STEP = 0.008  # in pixels, for networks without normalisation
STUDY_STEP_NORMALISED = 0.04  # in normalised images
STUDY_MOST_STEPS = 100  # limit of experiment 1, which stops at the first success
STUDY_STEPS = 10  # steps of experiment 2, which does not stop at a success
# Tolerance for an affine map in float32, relative to its largest number. Rounding errors are
# smaller.
AFFINE_TOLERANCE = 1e-4

PerChannel = float | tuple[float, ...]


@dataclass(frozen=True)
class Attack:
    """The steps of an attack and their limits, in pixels.

    Attributes:
        step: Length of a step in each pixel; one number, or one number per channel.
        iterations: Largest number of steps.
        until_success: Whether an image stops at its first success. Otherwise it takes all steps.
        radius: Largest total change of a pixel; one number, or one number per channel. Without it,
            only the box limits a pixel.
        box: Smallest and largest value of a pixel.

    Raises:
        ValueError: If a number is not positive, or the box is empty.

    Example:
        >>> steps = kurakin_iterations(8 / 255)
        >>> Attack(2 / 255, iterations=steps, until_success=False, radius=8 / 255).iterations
        10
    """

    step: PerChannel
    _: KW_ONLY
    iterations: int
    until_success: bool
    radius: PerChannel | None = None
    box: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        radius = () if self.radius is None else _numbers(self.radius)
        for name, numbers in (
            ("step", _numbers(self.step)),
            ("radius", radius),
            ("iterations", (self.iterations,)),
        ):
            if not all(number > 0 and isfinite(number) for number in numbers):
                msg = f"{name} must be positive. Got {getattr(self, name)}."
                raise ValueError(msg)
        if not self.box[0] < self.box[1]:
            msg = f"box must be the smallest and the largest value of a pixel. Got {self.box}."
            raise ValueError(msg)


def basic_iterative(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    prepare: Prepare | None = None,
    targets: Tensor | None = None,
) -> Attacked:
    r"""The basic iterative method [Kurakin2017, section 2.2]; with targets, towards these.

    With the cross-entropy :math:`J` of the label :math:`y`, the images are :math:`X_0 = X` and
    :math:`X_{n+1} = Clip_{X, r}(X_n + a \, sign \nabla_X J(X_n, y))`. With a target :math:`t` they
    are :math:`X_{n+1} = Clip_{X, r}(X_n - a \, sign \nabla_X J(X_n, t))`. An attack succeeds when
    the predicted class is not the label, or is the target.

    Args:
        model: Any module in eval mode that gives ``(N, classes)``; it is not changed.
        pixels: Images ``(N, C, H, W)`` in the attack's box.
        labels: Class of each image ``(N,)``.
        attack: Steps and limits.
        prepare: Map from pixels to the model's input, such as ``models.preprocessing(name)``; the
            identity by default.
        targets: Class that the attack aims at for each image ``(N,)``.

    Returns:
        The attacked images, measured by :func:`examine`. ``steps`` is 0 for an image that needs no
        step.

    Raises:
        ValueError: If the model is in train mode, the images, classes or limits do not fit, or a
            target is the label of its image.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
        >>> _ = model[1].weight.data.copy_(torch.eye(2))
        >>> pixels = torch.tensor([0.75, 0.5]).view(1, 2, 1, 1)
        >>> attack = Attack(0.0625, iterations=9, until_success=True)
        >>> found = basic_iterative(model, pixels, torch.tensor([0]), attack)
        >>> found.adversarial.flatten().tolist(), int(found.steps), float(found.linf)
        ([0.5625, 0.6875], 3, 0.1875)
    """
    start = start_images(model, pixels, attack.box)
    count = scores_of(model, start[:1], prepare).shape[1]
    known = check_classes(labels, "labels", start, count)
    if targets is None:
        return _attack_in_batches(model, start, known, attack, prepare, 1)
    wanted = check_targets(targets, known, start, count)
    return _attack_in_batches(model, start, wanted, attack, prepare, -1)


def least_likely(
    model: nn.Module,
    pixels: Tensor,
    attack: Attack,
    prepare: Prepare | None = None,
) -> Attacked:
    r"""The iterative least-likely class method [Kurakin2017, section 2.3].

    The target is the class that the model finds least likely for the image itself,
    :math:`y_{LL} = argmin_y p(y | X)`. The steps are those of :func:`basic_iterative` with this
    target.

    Args:
        model: Any module in eval mode that gives ``(N, classes)``; it is not changed.
        pixels: Images ``(N, C, H, W)`` in the attack's box.
        attack: Steps and limits.
        prepare: Map from pixels to the model's input; the identity by default.

    Raises:
        ValueError: If the model is in train mode, or the images or limits do not fit.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
        >>> attack = Attack(0.05, iterations=20, until_success=True)
        >>> found = least_likely(model, torch.rand(2, 3, 2, 2), attack)
        >>> bool(found.inside.all())
        True
    """
    start = start_images(model, pixels, attack.box)
    return _attack_in_batches(
        model, start, scores_of(model, start, prepare).argmin(1), attack, prepare, -1
    )


def kurakin_iterations(radius: float) -> int:
    """Number of steps of one grey level: ``min(255 radius + 4, 1.25 * 255 radius)``.

    See [Kurakin2017, section 2.2].

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> [kurakin_iterations(levels / 255) for levels in (1, 8, 16, 32)]
        [1, 10, 20, 36]
    """
    if not 0 < radius < float("inf"):
        msg = f"radius must be positive. Got {radius}."
        raise ValueError(msg)
    levels = 255 * radius
    # 255 * (8 / 255) may round below 8; 1e-9 keeps its 10 steps.
    return max(1, int(min(levels + 4, 1.25 * levels) + 1e-9))


def pixel_steps(step: float, pixels: Tensor, prepare: Prepare) -> tuple[float, ...]:
    """A step in units of the model's input, converted to pixels: one number per channel.

    For a normalisation it is ``step * std``.

    Args:
        step: Length of the step in the model's input.
        pixels: Images ``(N, C, H, W)``; only their shape matters.
        prepare: An affine map that acts on each pixel alone, with one factor per channel.

    Raises:
        ValueError: If ``prepare`` is not such a map.

    Example:
        >>> std = torch.tensor([0.25, 0.5]).view(2, 1, 1)
        >>> pixel_steps(0.5, torch.rand(1, 2, 4, 4), lambda pixels: (pixels - 0.5) / std)
        (0.125, 0.25)
    """
    zeros = torch.zeros_like(finite_batch(pixels, "pixels")[:1])
    others = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros)
    with torch.enable_grad():
        constant, back = torch.func.vjp(prepare, zeros)[:2]
    if constant.shape == zeros.shape:
        factors = back(torch.ones_like(constant))[0]
        by_channel = factors[0, :, 0, 0]
        rebuilt = constant + factors * others
        off = (prepare(others) - rebuilt).abs().amax()
        affine = off <= AFFINE_TOLERANCE * rebuilt.abs().amax()
        same_everywhere = (factors == by_channel[:, None, None]).all()
        if affine and same_everywhere and by_channel.all():
            return tuple(abs(step / factor) for factor in by_channel.tolist())
    msg = (
        "prepare must be an affine map of each pixel, with one factor for a channel. "
        "Got another: give the steps in pixels."
    )
    raise ValueError(msg)


def study_attack(experiment: int, pixels: Tensor, prepare: Prepare | None = None) -> Attack:
    """The attacks of the study [Wan2022, section 4.2].

    Steps are 0.04 in normalised images and 0.008 in images without normalisation.

    Experiment 1 is for :func:`basic_iterative` and stops at the first success. Experiment 2 is for
    :func:`basic_iterative` with targets or :func:`least_likely`. It takes ten steps towards a
    target, even after a success. The study states no number of steps.

    Args:
        experiment: 1 or 2.
        pixels: Images ``(N, C, H, W)``; only their shape matters.
        prepare: Map from pixels to the model's input; the identity by default.

    Raises:
        ValueError: If there is no such experiment, or ``prepare`` is not an affine map with one
            factor per channel.

    Example:
        >>> study_attack(1, torch.rand(1, 3, 32, 32)).step
        0.008
        >>> from adjointbackmap import models
        >>> attack = study_attack(2, torch.rand(1, 3, 32, 32), models.preprocessing("vgg7-nobias"))
        >>> [round(step, 6) for step in attack.step]
        [0.008092, 0.007976, 0.00804]
    """
    if experiment not in (1, 2):
        msg = f"The experiment must be 1 or 2. Got {experiment}."
        raise ValueError(msg)
    lengths = (1.0,) if prepare is None else pixel_steps(1.0, pixels, prepare)
    normalised = any(length != 1 for length in lengths)
    step = tuple(STUDY_STEP_NORMALISED * length for length in lengths) if normalised else STUDY_STEP
    first = experiment == 1
    return Attack(step, iterations=STUDY_MOST_STEPS if first else STUDY_STEPS, until_success=first)


def _attack_in_batches(
    model: nn.Module,
    pixels: Tensor,
    classes: Tensor,
    attack: Attack,
    prepare: Prepare | None,
    sign: int,
) -> Attacked:
    """Attack in batches, and measure the attacked images.

    Sign 1 increases the loss of the classes; sign -1 decreases it.
    """
    parts = zip(pixels.split(BATCH), classes.split(BATCH), strict=True)
    found = [
        _iterate(model, images, of_images, attack, prepare, sign) for images, of_images in parts
    ]
    adversarial, steps = (torch.cat(each) for each in zip(*found, strict=True))
    return replace(examine(model, pixels, adversarial, prepare, attack.box), steps=steps)


def _iterate(
    model: nn.Module,
    pixels: Tensor,
    classes: Tensor,
    attack: Attack,
    prepare: Prepare | None,
    sign: int,
) -> tuple[Tensor, Tensor]:
    """Take the steps. The result is the images, and the number of steps of each image."""
    found = pixels.clone()
    steps = torch.zeros_like(classes)
    step = sign * _per_channel(attack.step, "step", pixels)
    lower, upper = _limits(attack, pixels)
    left = torch.arange(len(pixels), device=pixels.device)
    for _ in range(attack.iterations):
        scores, slopes = _scores_and_slopes(model, found[left], classes[left], prepare)
        if attack.until_success:  # continue with images without success
            going = (scores.argmax(1) == classes[left]) == (sign == 1)
            left = left[going]
            slopes = slopes[going]
        if not len(left):
            break
        found[left] = (found[left] + step * slopes.sign()).clamp(lower[left], upper[left])
        steps[left] += 1
    return found, steps


def _scores_and_slopes(
    model: nn.Module,
    pixels: Tensor,
    classes: Tensor,
    prepare: Prepare | None,
) -> tuple[Tensor, Tensor]:
    """Scores, and the gradient of each image's cross-entropy with respect to its pixels.

    No other gradient is computed.
    """
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        scores = forward(model, pixels, prepare)
        loss = F.cross_entropy(scores, classes, reduction="sum")
    return scores.detach(), torch.autograd.grad(loss, pixels)[0]


def start_images(model: nn.Module, pixels: Tensor, box: tuple[float, float]) -> Tensor:
    """The images that an attack starts from, after checks.

    Raises:
        ValueError: If the model is in train mode, or the images do not fit or are outside the box.
    """
    check_eval(model, ValueError)
    images = finite_batch(pixels, "pixels")
    low, high = box
    if images.amin() < low or images.amax() > high:
        least = float(images.amin())
        largest = float(images.amax())
        msg = f"pixels must be in the box from {low} to {high}. Got {least:.4g} to {largest:.4g}."
        raise ValueError(msg)
    return images


def check_classes(classes: Tensor, what: str, pixels: Tensor, count: int) -> Tensor:
    """Classes on the device of the images, after checks.

    Raises:
        ValueError: If there is not one class per image, or the model has no such class.
    """
    if (
        classes.shape != pixels.shape[:1]
        or classes.dtype != torch.int64
        or classes.min() < 0
        or classes.max() >= count
    ):
        first = f", {classes.tolist()[:5]} ..." if classes.dim() == 1 else ""
        msg = (
            f"{what} must be one integer from 0 to {count - 1} "
            f"for each of the {len(pixels)} images. "
            f"Got {tuple(classes.shape)} of {classes.dtype}{first}."
        )
        raise ValueError(msg)
    return classes.to(pixels.device)


def check_targets(targets: Tensor, labels: Tensor, pixels: Tensor, count: int) -> Tensor:
    """Targets on the device of the images, after checks.

    Raises:
        ValueError: If they are no classes, or one is the label of its image.
    """
    wanted = check_classes(targets, "targets", pixels, count)
    if (wanted == labels).any():
        first = int((wanted == labels).nonzero()[0])
        msg = f"targets must be other classes than labels. Got the same for image {first}."
        raise ValueError(msg)
    return wanted


def _limits(attack: Attack, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of every pixel, from the box and from the ball around the image."""
    low, high = attack.box
    if attack.radius is None:
        return torch.full_like(pixels, low), torch.full_like(pixels, high)
    radius = _per_channel(attack.radius, "radius", pixels)
    return (pixels - radius).clamp(low, high), (pixels + radius).clamp(low, high)


def _per_channel(value: PerChannel, what: str, pixels: Tensor) -> Tensor:
    """One number per channel, ``(C or 1, 1, 1)``.

    Raises:
        ValueError: If the number of values is neither 1 nor the number of channels.
    """
    numbers = _numbers(value)
    if len(numbers) not in (1, pixels.shape[1]):
        msg = (
            f"{what} must be one number, or one for each of the {pixels.shape[1]} channels. "
            f"Got {value}."
        )
        raise ValueError(msg)
    return pixels.new_tensor(numbers)[:, None, None]


def _numbers(value: PerChannel) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
