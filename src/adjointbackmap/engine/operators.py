"""The linear map from [x; b] to a layer at an activation pattern, and its adjoint."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from adjointbackmap.capture.precision import exact
from adjointbackmap.display import Shown, Summary
from adjointbackmap.engine import showing
from adjointbackmap.engine.cotangent_windows import CotangentWindows
from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network, check_network
from adjointbackmap.engine.pattern import (
    ActivationPattern,
    check_images,
    check_pattern,
    check_scale,
    record_pattern,
)
from adjointbackmap.engine.program import IMAGE, Program, Step
from adjointbackmap.engine.threads import threads_for
from adjointbackmap.engine.workspace import bytes_of_vector, held
from adjointbackmap.rules import Value
from adjointbackmap.rules.base import gated_in_place, laid_out
from adjointbackmap.rules.kernels import Kernel
from adjointbackmap.rules.piecewise import Gate
from adjointbackmap.rules.pooling import AveragePooling, MaxPooling

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


# Rules whose adjoint gives a tensor that nothing else shares.
MAKES_ITS_OWN = (Kernel, Gate, MaxPooling, AveragePooling)


def push(
    pattern: ActivationPattern, tangents: dict[int, Tensor], targets: Iterable[Value]
) -> dict[int, Tensor | None]:
    """Forward: from tangents of the image and of entries to tangents of the targets.

    Args:
        pattern: The activation pattern.
        tangents: Slot -> tangents, folded ``(N * K, ...)``; missing ones are zero.
        targets: The values to compute.

    Returns:
        Slot of a target -> its tangents; ``None`` if no given tangent reaches it.
    """
    targets = list(targets)
    steps = pattern.program.upstream(targets)
    last = {i.slot: n for n, step in enumerate(steps) for i in step.inputs}
    kept = {t.slot for t in targets}
    values: dict[int, Tensor | None] = dict(tangents)
    for n, step in enumerate(steps):
        inputs = [values.get(i.slot) for i in step.inputs]
        if inputs:  # an infinite constant has none: its value is given, see pattern_of
            values[step.output.slot] = _forward(pattern, step, inputs)
        for i in step.inputs:
            if last[i.slot] == n and i.slot not in kept:
                values[i.slot] = None  # free it
    return {t.slot: values.get(t.slot) for t in targets}


def _forward(pattern: ActivationPattern, step: Step, inputs: list[Tensor | None]) -> Tensor | None:
    batch = next((len(t) for t in inputs if t is not None), None)
    if batch is None:
        return None
    like = next(t for t in inputs if t is not None)
    full = [
        like.new_zeros(()).expand(batch, *i.shape) if t is None else t
        for t, i in zip(inputs, step.inputs, strict=True)
    ]
    return laid_out(step.rule.forward(pattern.gates.get(step.output.slot, ()), *full))


def pull(
    pattern: ActivationPattern,
    cotangents: dict[int, Float[Tensor, "batch *_"]],
    windows: CotangentWindows | None = None,
) -> tuple[Float[Tensor, "batch *in"], Float[Tensor, "batch m"]]:
    """Adjoint: from cotangents of values to those of the image and of the bias vector.

    Args:
        pattern: The activation pattern.
        cotangents: Slot -> cotangents, folded ``(N * K, *shape)``.
        windows: The windows that the cotangents cover; by default whole maps.

    Returns:
        Cotangents of the image or of its window, ``(N * K, C, H, W)``, and of the bias vector,
        ``(N * K, M)``.
    """
    program = pattern.program
    sums = dict(cotangents)
    owned: set[int] = set()  # slots whose sums no other value shares, so that they may be changed
    batch, like = next((len(c), c) for c in cotangents.values())
    for step in reversed(program.upstream(Value(slot, ()) for slot in cotangents)):
        cotangent = sums.pop(step.output.slot, None)
        if cotangent is None:
            continue
        is_owned = step.output.slot in owned
        back = partial(_back, pattern) if windows is None else windows.back
        for i, part in zip(step.inputs, back(step, cotangent, is_owned), strict=True):
            if part is None:
                continue
            known = sums.get(i.slot)
            is_new = isinstance(step.rule, MAKES_ITS_OWN)
            if known is None:
                sums[i.slot] = part
            elif i.slot in owned:
                sums[i.slot] = known.add_(part)
            else:
                sums[i.slot] = part.add_(known) if is_new else known + part
            if is_new or known is not None:
                owned.add(i.slot)
    image = sums.get(IMAGE)
    if image is None:
        shape = program.image.shape if windows is None else windows.shape(program.image)
        image = like.new_zeros(batch, *shape)
    bias = [like.new_zeros(batch, 0)]
    for entry in program.entries:
        cotangent = sums.get(entry.slot)
        if cotangent is None:
            cotangent = like.new_zeros(batch, entry.value.numel())
        bias.append(cotangent.reshape(batch, -1))
    return image, torch.cat(bias, 1)


def _back(
    pattern: ActivationPattern, step: Step, cotangent: Tensor, is_owned: bool
) -> tuple[Tensor | None, ...]:
    """Cotangents of a step's inputs, from that of its output.

    Args:
        pattern: The activation pattern.
        step: The step.
        cotangent: The cotangent of its output.
        is_owned: Whether the cotangent may be changed.
    """
    gates = pattern.gates.get(step.output.slot, ())
    if is_owned and isinstance(step.rule, Gate):
        return (gated_in_place(gates[0], laid_out(cotangent)),)
    return step.rule.adjoint(gates, laid_out(cotangent), [i.shape for i in step.inputs])


@dataclass(frozen=True)
class Basis:
    """Some unit tangents of the extended input.

    Attributes:
        start: Position of the first one in ``[x; b]``.
        stop: Position after the last one.
        tangents: Slot -> tangents.
    """

    start: int
    stop: int
    tangents: dict[int, Tensor]


def basis(pattern: ActivationPattern, upstream: set[int]) -> Iterator[Basis]:
    """All unit tangents of [x; b] that can reach a layer, in chunks.

    Args:
        pattern: The activation pattern.
        upstream: Slots of the image and the entries that the layer depends on.
    """
    program = pattern.program
    parts = [(IMAGE, program.image.shape)]
    parts += [(e.slot, tuple(e.value.shape)) for e in program.entries]
    start = 0
    for slot, shape in parts:
        size = prod(shape)
        for first in range(0, size if slot in upstream else 0, pattern.chunk):
            count = min(pattern.chunk, size - first)
            unit = torch.zeros(count, size, dtype=pattern.dtype, device=pattern.network.device)
            unit[torch.arange(count), first + torch.arange(count)] = 1
            stacked = unit.view(1, count, *shape).expand(pattern.images, count, *shape)
            yield Basis(start + first, start + first + count, {slot: _folded(stacked)})
        start += size


def threads_of_tangents(
    pattern: ActivationPattern, targets: Iterable[Value], room: int | None
) -> int:
    """Number of parts of a basis that are computed at the same time, each in one thread.

    Args:
        pattern: The activation pattern.
        targets: The values whose tangents are computed.
        room: Bytes for all tangents; ``None`` without a bound.
    """
    steps = pattern.program.upstream(targets)
    numbers = held(steps)
    vectors = pattern.images * pattern.chunk
    each = vectors * bytes_of_vector(numbers, pattern.dtype.itemsize)
    return threads_for(pattern.network.device, room, each)


def reached(program: Program, targets: Iterable[Value]) -> set[int]:
    """Slots of the image and the entries that the targets depend on."""
    targets = list(targets)
    read = {i.slot for step in program.upstream(targets) for i in step.inputs}
    return {t.slot for t in targets} | read


@dataclass(frozen=True, repr=False)
class LayerOperator(Shown):
    r"""The linear map :math:`J` from [x; b] to a layer at an activation pattern, for N images.

    :meth:`forward` computes :math:`J [\dot x; \dot b]` and :meth:`adjoint` :math:`J^* g`. Both take
    any number K of vectors for each image; all of them share the gates of the image.

    Attributes:
        pattern: The activation pattern.
        layer: The layer.
    """

    pattern: ActivationPattern
    layer: Layer

    def _summary(self) -> Summary:
        return showing.of_operator(self)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.pattern.network.in_shape

    @property
    def bias_length(self) -> int:
        """Length M of the bias vector."""
        return len(self.pattern.network.biases)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the layer's output for one image."""
        return self.layer.out_shape

    def forward(
        self, image: Tensor | None = None, bias: Tensor | None = None
    ) -> Float[Tensor, "n *k_out"]:
        """Tangents of the layer.

        Args:
            image: Tangents ``(N, K, C, H, W)``, or ``(N, C, H, W)`` for K = 1; zero if left out.
            bias: Tangents ``(N, K, M)`` or ``(N, M)``; zero if left out.

        Returns:
            ``(N, K, *out_shape)``, or ``(N, *out_shape)``.

        Raises:
            ValueError: If both are left out, or a shape or dtype does not fit.
        """
        self.pattern.network.check_unchanged()
        both = (("image", image, self.in_shape), ("bias", bias, (self.bias_length,)))
        given = [(name, tensor, shape) for name, tensor, shape in both if tensor is not None]
        if not given:
            msg = (
                "forward needs tangents of the image, of the bias vector, or of both. Got neither."
            )
            raise ValueError(msg)
        stacked = {name: self._stacked(name, tensor, shape) for name, tensor, shape in given}
        counts = {t.shape[1] for t in stacked.values()}
        if len(counts) > 1:
            got = " and ".join(map(str, sorted(counts)))
            msg = f"There must be as many tangents of the image as of the bias. Got {got}."
            raise ValueError(msg)
        step = self.pattern.chunk
        parts = [
            self._push({name: t[:, k : k + step] for name, t in stacked.items()})
            for k in range(0, counts.pop(), step)
        ]
        out = torch.cat(parts, 1)
        return out if given[0][1].dim() == len(given[0][2]) + 2 else out[:, 0]

    def adjoint(
        self, cotangent: Tensor
    ) -> tuple[Float[Tensor, "n *k_in"], Float[Tensor, "n *k m"]]:
        """Cotangents of the image and of the bias vector.

        Args:
            cotangent: ``(N, K, *out_shape)``, or ``(N, *out_shape)`` for K = 1.

        Returns:
            ``(N, K, C, H, W)`` and ``(N, K, M)``, or the same without K.

        Raises:
            ValueError: If the shape or dtype does not fit.
        """
        self.pattern.network.check_unchanged()
        return self.pulled(cotangent)

    def pulled(self, cotangent: Tensor) -> tuple[Float[Tensor, "n *k_in"], Float[Tensor, "n *k m"]]:
        """The same as :meth:`adjoint`, without a check of the model."""
        stacked = self._stacked("cotangent", cotangent, self.out_shape)
        step = self.pattern.chunk
        slot = self.layer.value.slot
        parts = []
        with exact(cotangent.device):
            for k in range(0, stacked.shape[1], step):
                part = _folded(stacked[:, k : k + step])
                pulled = pull(self.pattern, {slot: part})
                parts.append([t.unflatten(0, (self.pattern.images, -1)) for t in pulled])
        image, bias = (torch.cat(p, 1) for p in zip(*parts, strict=True))
        has_k = cotangent.dim() == len(self.out_shape) + 2
        return (image, bias) if has_k else (image[:, 0], bias[:, 0])

    def dense(self) -> tuple[Float[Tensor, "n *out_in"], Float[Tensor, "n *out m"]]:
        """The whole matrix, with one row per unit.

        Returns:
            Image part ``(N, *out_shape, C, H, W)`` and bias part ``(N, *out_shape, M)``.
        """
        units = prod(self.out_shape)
        eye = torch.eye(units, dtype=self.pattern.dtype, device=self.pattern.network.device)
        eye = eye.view(1, units, *self.out_shape)
        image, bias = self.adjoint(eye.expand(self.pattern.images, *eye.shape[1:]))
        return image.unflatten(1, self.out_shape), bias.unflatten(1, self.out_shape)

    def as_scipy(self) -> "LinearOperator":
        """The map for one image as a SciPy operator from the vector [x; b] to the flat layer.

        Raises:
            ValueError: If there are several images.
            ImportError: If SciPy is not installed.
        """
        if self.pattern.images != 1:
            msg = (
                f"as_scipy needs the operator of one image. Got {self.pattern.images}: "
                "make one operator per image."
            )
            raise ValueError(msg)
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            msg = "as_scipy needs SciPy: pip install scipy."
            raise ImportError(msg) from error
        pixels = prod(self.in_shape)
        dtype = self.pattern.dtype
        device = self.pattern.network.device

        # SciPy's vectors are columns; K counts them here

        def matmat(vectors: np.ndarray) -> np.ndarray:
            v = torch.as_tensor(vectors.T.copy(), dtype=dtype, device=device)
            out = self.forward(v[None, :, :pixels].unflatten(2, self.in_shape), v[None, :, pixels:])
            return out[0].flatten(1).T.cpu().numpy()

        def rmatmat(vectors: np.ndarray) -> np.ndarray:
            g = torch.as_tensor(vectors.T.copy(), dtype=dtype, device=device)
            image, bias = self.adjoint(g.view(1, -1, *self.out_shape))
            return torch.cat([image[0].flatten(1), bias[0]], 1).T.cpu().numpy()

        shape = (prod(self.out_shape), pixels + self.bias_length)
        return LinearOperator(
            shape,
            matvec=lambda v: matmat(v.reshape(-1, 1))[:, 0],
            rmatvec=lambda v: rmatmat(v.reshape(-1, 1))[:, 0],
            matmat=matmat,
            rmatmat=rmatmat,
            dtype=str(dtype).removeprefix("torch."),
        )

    def _stacked(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Vectors as ``(N, K, *shape)``, checked.

        Raises:
            ValueError: If the shape or dtype does not fit.
        """
        n = self.pattern.images
        given = tuple(tensor.shape)
        if tensor.dim() == len(shape) + 1:
            tensor = tensor.unsqueeze(1)
        fits = tensor.dim() == len(shape) + 2 and tuple(tensor.shape[2:]) == shape
        if not fits or len(tensor) != n or not tensor.shape[1]:
            inner = ", ".join(map(str, shape))
            msg = f"{name} must have shape ({n}, K, {inner}) or ({n}, {inner}). Got {given}."
            raise ValueError(msg)
        if tensor.dtype != self.pattern.dtype:
            msg = (
                f"{name} must be {self.pattern.dtype} as the pattern. "
                f"Got {tensor.dtype}: convert it with .to()."
            )
            raise ValueError(msg)
        return tensor.detach()

    def _push(self, stacked: dict[str, Tensor]) -> Tensor:
        """Tangents of the layer, ``(N, K, *out_shape)``, from those of image and bias."""
        program = self.pattern.program
        tangents = {}
        if "image" in stacked:
            tangents[IMAGE] = _folded(stacked["image"])
        if "bias" in stacked:
            sizes = [e.value.numel() for e in program.entries]
            parts = _folded(stacked["bias"]).split(sizes, 1) if sizes else ()
            for entry, part in zip(program.entries, parts, strict=True):
                tangents[entry.slot] = part.reshape(-1, *entry.value.shape)
        count = next(iter(stacked.values())).shape[1]
        with exact(self.pattern.network.device):
            out = push(self.pattern, tangents, [self.layer.value])[self.layer.value.slot]
        if out is None:
            out = torch.zeros((), dtype=self.pattern.dtype, device=self.pattern.network.device)
        n = self.pattern.images
        return out.expand(n * count, *self.out_shape).unflatten(0, (n, count))


def _folded(stacked: Tensor) -> Tensor:
    """``(N, K, *shape)`` as one batch ``(N * K, *shape)``."""
    return laid_out(stacked.flatten(0, 1))


def operator(
    network: Network,
    x: Tensor,
    layer: str | nn.Module,
    scale: float | str = 1.0,
    dtype: torch.dtype | str | None = None,
    pattern: ActivationPattern | None = None,
) -> LayerOperator:
    r"""The linear map [x; b] -> layer at the activation pattern of ``x``.

    For any cotangent g of the layer, ``adjoint(g)`` is the effective hyperplane of
    :math:`\langle g | layer \rangle`. Examples are a margin between two classes, a probe, or one
    unit.

    Args:
        network: Traced network.
        x: Image ``(C, H, W)`` or batch ``(N, C, H, W)``.
        layer: Name in ``network.layers``, or a module of the model.
        scale: The factor k of the pattern.
        dtype: Dtype of the map, by default the model's.
        pattern: The pattern of ``x`` from :func:`record_pattern`; by default it is recorded.

    Raises:
        ValueError: If ``layer`` is not a layer of the network, ``x`` does not fit it, or the
            pattern is another one.
        RuntimeError: If the model was changed since the trace.

    Example:
        >>> import torch
        >>> from adjointbackmap import trace
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()).eval()
        >>> x = torch.rand(1, 1, 2, 2)
        >>> network = trace(model, x)
        >>> op = operator(network, x, "2")
        >>> bool(torch.allclose(op.forward(x, network.biases.vector[None]), model(x)))
        True
    """
    check_network(network)
    chosen = network.layer(layer)
    if pattern is None:
        return LayerOperator(record_pattern(network, x, scale, dtype), chosen)
    network.check_unchanged()
    check_pattern(pattern, network, check_images(network, x, dtype), check_scale(scale))
    return LayerOperator(pattern, chosen)
