"""What training minimises: the plain loss, or one that also calms the network around each image.

[Wan2022, section 5.2] proposes networks whose effective hyperplanes are less sensitive. Three
objectives aim at that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n c h w"]
Loss = Callable[[Images], Tensor]  # the mean loss of a batch, whose labels it knows
Scores = Callable[[Images], Float[Tensor, "n classes"]]

OBJECTIVES = ("plain", "adversarial", "local-linearity", "gradient-norm")
# Both numbers are those of N-FGSM [Jorge2022].
NOISE_RADII = 2.0  # the noise before the step is uniform in this many radii
STEP_RADII = 1.0  # length of the step


@dataclass(frozen=True)
class Around:
    """What an objective may look at around an image.

    Attributes:
        ball: The images within the radius.
        generator: Source of the noise, on the CPU, so that it is the same on every device.
    """

    ball: "Ball"
    generator: torch.Generator

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.ball.radius.device)

    def noisy(self, x: Images, radii: float) -> Images:
        """Images with uniform noise of some radii."""
        return x + radii * (2 * self.uniform(*x.shape) - 1) * self.ball.radius


@dataclass(frozen=True)
class Ball:
    """The images within a radius of an image.

    Attributes:
        radius: Largest change of each channel, ``(C, 1, 1)``.
        low: What a pixel of 0 is in the network's input, ``(C, 1, 1)``.
        high: What a pixel of 1 is there, ``(C, 1, 1)``.
    """

    radius: Tensor
    low: Tensor
    high: Tensor

    def clip(self, x: Images) -> Images:
        """Keep every pixel between 0 and 1."""
        return torch.minimum(torch.maximum(x, self.low), self.high)


def ball_of(prepare: Callable[[Tensor], Tensor], radius: float, x: Images) -> Ball:
    """The images within a radius of pixels.

    Args:
        prepare: Map from pixels in [0, 1] to the network's input, affine in each channel.
        radius: Largest change of a pixel.
        x: Images, for their channels and their device.
    """
    ends = torch.tensor([0.0, 1.0], device=x.device).view(2, 1, 1, 1)
    low, high = prepare(ends.expand(-1, x.shape[1], -1, -1))
    return Ball(radius * (high - low), low, high)


def objective_loss(
    objective: str,
    strength: float,
    x: Images,
    scores: Scores,
    loss: Callable[[Tensor], Tensor],
    around: Around,
) -> Tensor:
    """The value of an objective on a batch.

    Args:
        objective: One of ``OBJECTIVES``.
        strength: Factor of the penalty of ``"local-linearity"`` and ``"gradient-norm"``.
        x: Images of the batch, in the network's input.
        scores: The network, from images to scores.
        loss: Mean loss of some scores of this batch.
        around: Radius, range of the pixels and noise.
    """
    if objective == "adversarial":
        x = noisy_step(x, lambda images: loss(scores(images)), around)
    if objective == "gradient-norm":
        x = x.detach().requires_grad_()
    found = scores(x)
    total = loss(found)
    if objective == "local-linearity":
        total = total + strength * bend(x, found, scores, around)
    if objective == "gradient-norm":
        total = total + strength * gradient_norm(x, total)
    return total


def noisy_step(x: Images, loss: Loss, around: Around) -> Images:
    """One adversarial step from a noisy image: N-FGSM [Jorge2022].

    Args:
        x: Images of a batch.
        loss: Their mean loss.
        around: Radius, range of the pixels and noise.

    Returns:
        The images to train on. The gradient does not flow through the step.
    """
    noisy = around.noisy(x, NOISE_RADII).detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(noisy), noisy)
    step = STEP_RADII * around.ball.radius * slope.sign()
    return around.ball.clip(noisy + step).detach()


def bend(x: Images, scores: Tensor, network: Scores, around: Around) -> Tensor:
    """How far the scores are from linear near each image, after ELLE [Rocamora2024].

    A noisy image and a place on the line to it are drawn. The term is the squared distance between
    the scores at this place and those interpolated between the line's ends. ELLE takes the loss in
    place of the scores, and two noisy ends. Here one end is the image itself: its scores serve the
    cross-entropy too, and scores do not saturate.

    Args:
        x: Images of a batch.
        scores: Their scores, ``(n, classes)``.
        network: The network.
        around: Radius, range of the pixels and noise.

    Returns:
        The mean over images of the sum over classes.
    """
    noisy = around.ball.clip(around.noisy(x, 1.0))
    share = around.uniform(len(x), 1, 1, 1)
    linear = torch.lerp(scores, network(noisy), share.flatten(1))
    return (network(x.lerp(noisy, share)) - linear).square().sum(1).mean()


def gradient_norm(x: Images, loss: Tensor) -> Tensor:
    """The squared length of the loss's gradient in the image [Drucker1992].

    Args:
        x: Images of a batch, which need a gradient.
        loss: Their mean loss.

    Returns:
        The mean over images, with a graph for a second derivative.
    """
    # The mean over the batch has divided each image's gradient by the number of images.
    (slope,) = torch.autograd.grad(loss * len(x), x, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()
