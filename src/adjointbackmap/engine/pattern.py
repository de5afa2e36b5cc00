"""The activation pattern: gates and winners of one forward pass at k [x; b]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from adjointbackmap.capture.entering import plain
from adjointbackmap.capture.precision import exact
from adjointbackmap.display import Shown, Summary
from adjointbackmap.engine import showing
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.observe import IMAGES_AT_ONCE, Recorded, record
from adjointbackmap.engine.program import IMAGE, Program, Step
from adjointbackmap.rules.base import Gates, laid_out
from adjointbackmap.rules.infinite import Infinite, InfiniteValue, finite


@dataclass(frozen=True, repr=False)
class ActivationPattern(Shown):
    """The gates of all operations at some images, with which the network is linear in [x; b].

    It can be given as ``pattern=`` to the functions that would record the same pattern again. Then
    it also keeps what the untouched model computes at each layer that was asked for.

    Attributes:
        network: The traced network.
        dtype: The dtype that it was recorded in.
        images: Number of images N.
        gates: Slot of a step's output -> gates, each ``(N, *shape)``.
        x: The images ``(N, C, H, W)`` in that dtype.
        scale: The factor k.
        most: Largest batch of tangents or cotangents, of all images together; ``None`` for no
            limit other than speed.
    """

    network: Network
    dtype: torch.dtype
    images: int
    gates: dict[int, Gates]
    x: Tensor = field(kw_only=True)
    scale: float = field(kw_only=True)
    most: int | None = field(default=None, kw_only=True)
    _recorded: Recorded = field(
        default_factory=lambda: Recorded({}, {}), kw_only=True, compare=False
    )

    def _summary(self) -> Summary:
        return showing.of_pattern(self)

    @property
    def program(self) -> Program:
        """The steps that the gates belong to."""
        return self.network.program(self.dtype)

    @property
    def chunk(self) -> int:
        """Number of tangents or cotangents per image that are computed as one batch."""
        fast = self.program.chunk
        return max(1, (fast if self.most is None else min(fast, self.most)) // self.images)

    def equal(self, other: "ActivationPattern") -> bool:
        """Whether every gate and every winner is the same, bit for bit."""
        if self.gates.keys() != other.gates.keys():
            return False
        pairs = [zip(self.gates[slot], other.gates[slot], strict=True) for slot in self.gates]
        return all(torch.equal(a, b) for pair in pairs for a, b in pair)

    def recorded(self, layers: Sequence[Layer], at_once: int = IMAGES_AT_ONCE) -> Recorded:
        """Inputs and outputs of layers in the untouched model, see ``engine.observe.record``.

        They are kept, so that the model runs once for each layer. The caller checks that the model
        is as it was traced.

        Args:
            layers: The layers.
            at_once: Images in one call of the model.
        """
        kept = self._recorded
        new = [layer for layer in layers if layer.name not in kept.outputs]
        if new:
            found = record(self.network, self.x, new, at_once)
            kept.inputs.update(found.inputs)
            kept.outputs.update(found.outputs)
        return kept

    def part(self, images: slice, most: int | None = None) -> "ActivationPattern":
        """The pattern of some of the images, with its own largest batch.

        Args:
            images: Which images.
            most: Largest batch of tangents or cotangents.
        """
        chosen = range(self.images)[images]
        if len(chosen) == self.images:
            return replace(self, most=most)
        gates = {slot: tuple(g[images] for g in found) for slot, found in self.gates.items()}
        kept = self._recorded
        recorded = Recorded(
            {name: t[images] for name, t in kept.inputs.items()},
            {name: t[images] for name, t in kept.outputs.items()},
        )
        return replace(
            self,
            images=len(chosen),
            gates=gates,
            x=self.x[images],
            most=most,
            _recorded=recorded,
        )


def record_pattern(
    network: Network, x: Tensor, scale: float | str = 1.0, dtype: torch.dtype | str | None = None
) -> ActivationPattern:
    r"""Record the activation pattern at :math:`z = k [x; b]` [Wan2022, eqs. 2.3 and 3.2].

    ``k`` multiplies the image, every entry of ``b`` and the position of every kink. So a power of
    two gives bitwise the pattern of ``k = 1``, unless numbers underflow.

    Args:
        network: Traced network.
        x: Image ``(C, H, W)`` or batch ``(N, C, H, W)``.
        scale: The factor k, positive.
        dtype: Dtype of the forward pass, by default the model's.

    Raises:
        ValueError: If ``x`` does not fit the network, k is not positive, or a maximum is over
            infinite constants only.
        RuntimeError: If the model was changed since the trace.

    Example:
        >>> import torch
        >>> from adjointbackmap import trace
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval()
        >>> x = torch.rand(1, 5, 5)
        >>> network = trace(model, x[None])
        >>> record_pattern(network, x, scale=1 / 8).equal(record_pattern(network, x))
        True
    """
    check_network(network)
    network.check_unchanged()
    # a copy: the caller may write into x, and the pattern is compared with later images
    images = check_images(network, x, dtype).clone()
    return pattern_of(network, images, check_scale(scale))


def pattern_of(
    network: Network, images: Tensor, scale: float, most: int | None = None
) -> ActivationPattern:
    """The same as :func:`record_pattern`, without checks of model and images.

    Raises:
        ValueError: If k is not 1 and the network has curved operations.
    """
    program = network.program(images.dtype)
    if scale != 1.0 and network.curved:
        msg = (
            f"scale must be 1 for a network with curved operations. Got {scale:g}: "
            "leave it out, because curved gates change with k."
        )
        raise ValueError(msg)
    gates: dict[int, Gates] = {}
    with exact(images.device):
        values = extended_input(program, images, scale)
        if network.entrance is not None:
            given = network.entrance.given_for(images)
            values |= {value.slot: given[i] for i, value in program.given.items()}
        for step in program.steps:
            inputs = [values[i.slot] for i in step.inputs]
            found = step.rule.gates(scale, *inputs)
            if found:
                gates[step.output.slot] = found
            values[step.output.slot] = value_of(program, step, found, inputs, len(images))
    return ActivationPattern(
        network, images.dtype, len(images), gates, x=images, scale=scale, most=most
    )


def check_pattern(
    pattern: ActivationPattern, network: Network, images: Tensor, scale: float
) -> None:
    """Check that a given pattern is the one that would be recorded.

    The caller checks that the model is as it was traced, so the pattern is of that model too.

    Args:
        pattern: The given pattern.
        network: The network.
        images: The images ``(N, C, H, W)`` in the wanted dtype.
        scale: The factor k.

    Raises:
        TypeError: If it is no pattern.
        ValueError: If it is of another network, dtype, k or images.
    """
    if not isinstance(pattern, ActivationPattern):
        msg = (
            "pattern must be from adjointbackmap.record_pattern. "
            f"Got {type(pattern).__name__}: record it, or leave it out."
        )
        raise TypeError(msg)
    other = ""
    if pattern.network is not network:
        other = "another network"
    elif pattern.dtype != images.dtype:
        other = f"{pattern.dtype} where {images.dtype} is computed"
    elif pattern.scale != scale:
        other = f"k = {pattern.scale:g} where scale = {scale:g}"
    elif pattern.x.shape != images.shape or not torch.equal(pattern.x, images):
        other = "other images"
    elif network.entrance is not None and not _same_given(network, pattern.x, images):
        other = "other inputs of the model, such as masks"
    if other:
        msg = (
            "pattern must be of the same network, images, k and dtype. "
            f"Got {other}: record it again with record_pattern, or leave it out."
        )
        raise ValueError(msg)


def _same_given(network: Network, one: Tensor, other: Tensor) -> bool:
    """Whether the model took the same for two batches."""
    assert network.entrance is not None
    pairs = zip(network.entrance.given_for(one), network.entrance.given_for(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def extended_input(program: Program, images: Tensor, scale: float = 1.0) -> dict[int, Tensor]:
    """Slot -> k times the image, or k times an entry, repeated for every image."""
    values = {IMAGE: scale * laid_out(plain(images))}
    for entry in (*program.entries, *program.constants):
        values[entry.slot] = (scale * entry.value).expand(len(images), *entry.value.shape)
    return values


def value_of(
    program: Program, step: Step, gates: Gates, inputs: Sequence[Tensor], images: int
) -> Tensor:
    """The output of a step.

    If an input may be infinite, its finite part and the signs of its infinities go through the
    linear map separately, because zero times infinity is not a number.

    Raises:
        InfiniteValue: If an infinity is left in a value that must be finite. Such a value is the
            output, or a maximum over infinite constants only.
    """
    if isinstance(step.rule, Infinite):
        return step.rule.value.expand(images, *step.output.shape)
    if step.rule.takes_infinities:
        return step.rule.output(gates, *inputs)
    if not any(i.slot in program.infinite for i in step.inputs):
        return step.rule.forward(gates, *inputs)
    out = step.rule.forward(gates, *(finite(t) for t in inputs))
    signs = step.rule.forward(gates, *(t.sign() * t.isinf() for t in inputs))
    if step.output.slot not in program.infinite and bool(signs.any()):
        msg = (
            f"Every value of {step.op} must be finite. Got windows or masks that leave infinite "
            "constants only: widen them, or cut the network before it with until=."
        )
        raise InfiniteValue(msg)
    return torch.where(signs == 0, out, signs * torch.inf)


def check_scale(scale: float | str) -> float:
    """The factor k as a number, from a number or from text such as ``"1/8"``.

    Raises:
        ValueError: If it is no positive number.
    """
    try:
        number = float(Fraction(scale)) if isinstance(scale, str) else float(scale)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        msg = (
            f"scale must be a positive number, such as 1/8. Got {scale!r}: "
            "give one, a power of two to keep every bit."
        )
        raise ValueError(msg)
    return number


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, from the dtype or its name, such as ``"float64"``.

    Raises:
        ValueError: If it is no dtype.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or isinstance(found, torch.dtype):
        return found
    msg = (
        f"dtype must be torch.float32 or torch.float64. Got {dtype!r}: "
        "give one of these, or leave it out."
    )
    raise ValueError(msg)


def check_tensor(x: object) -> None:
    """Check that an image is a tensor.

    Raises:
        TypeError: If it is no tensor; the message says how to convert it.
    """
    if isinstance(x, Tensor):
        return
    kind = type(x).__name__
    advice = "a picture with adjointbackmap.image(x), other data with torch.as_tensor(x)"
    msg = f"x must be a torch.Tensor. Got {kind}: convert {advice}."
    raise TypeError(msg)


def check_images(network: Network, x: Tensor, dtype: torch.dtype | str | None = None) -> Tensor:
    """Images as a batch in the wanted dtype.

    Raises:
        TypeError: If ``network`` is no traced network, or ``x`` no tensor.
        ValueError: If the shape, dtype or device is not the network's, or values are not finite.
    """
    check_network(network)
    check_tensor(x)
    shape = ", ".join(map(str, network.in_shape))
    if tuple(x.shape) == network.in_shape:
        x = x[None]
    if tuple(x.shape[1:]) != network.in_shape or not len(x):
        msg = (
            f"x must have shape ({shape}) or (N, {shape}). Got {tuple(x.shape)}: "
            "resize it, or trace the model at its size."
        )
        raise ValueError(msg)
    dtype = dtype_of(dtype)
    wanted = dtype or network.dtype
    if not wanted.is_floating_point or wanted.itemsize < 4:
        msg = (
            f"dtype must be torch.float32 or torch.float64. Got {wanted}: "
            "convert the model with model.float()."
        )
        raise ValueError(msg)
    if x.dtype != wanted and not (dtype is not None and x.dtype.is_floating_point):
        msg = (
            f"x must be {network.dtype} as the model. Got {x.dtype}: "
            f"convert it with x.to({network.dtype}), or pass dtype=."
        )
        raise ValueError(msg)
    if x.device != network.device:
        msg = (
            f"x must be on {network.device} as the model. Got {x.device}: "
            f"move it with x.to({str(network.device)!r})."
        )
        raise ValueError(msg)
    if x.layout != torch.strided:
        msg = f"x must be a dense tensor. Got {x.layout}: convert it with x.to_dense()."
        raise ValueError(msg)
    if not x.isfinite().all():
        count = int((~x.isfinite()).sum())
        msg = f"x must be finite. Got {count} values that are NaN or infinite: mend the image."
        raise ValueError(msg)
    return x.detach().to(wanted)
