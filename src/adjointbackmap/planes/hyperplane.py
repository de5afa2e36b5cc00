"""Effective hyperplanes of a layer's units in the five reconstruction modes RM0 to RM4."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adjointbackmap.display import Shown, ShownFields, Summary
from adjointbackmap.engine.network import Network, several
from adjointbackmap.engine.patches import BLOCK, Patches
from adjointbackmap.engine.pattern import ActivationPattern, check_images
from adjointbackmap.engine.threads import one_thread
from adjointbackmap.planes import showing
from adjointbackmap.planes.methods import compute_parts
from adjointbackmap.planes.planner import images_per_batch, plan_queries
from adjointbackmap.planes.query import Query
from adjointbackmap.planes.units import Selection, input_names

if TYPE_CHECKING:
    import xarray

    from adjointbackmap.planes.receipts import Receipt
    from adjointbackmap.planes.single import SingleHyperplane
    from adjointbackmap.plots import Drawing


@dataclass(frozen=True, repr=False)
class Contributions(ShownFields):
    """What each pixel and each bias adds to a unit. All contributions sum to its value.

    Attributes:
        image: ``x * H_I``, ``(N, *units, C, H, W)``.
        bias: Name of a part of the bias vector -> ``b * H_b`` of it, ``(N, *units, length)``.
        axes: Number of dimensions of one input: 3 for ``(C, H, W)``.
    """

    image: Tensor
    bias: dict[str, Tensor]
    axes: int = 3

    def total(self) -> Float[Tensor, "n *units"]:
        """Sum over pixels and biases, ``(N, *units)``."""
        pixels = self.image.flatten(-self.axes).sum(-1)
        return sum((b.sum(-1) for b in self.bias.values()), start=pixels)


@dataclass(frozen=True, repr=False)
class Hyperplanes(Shown):
    """Effective hyperplanes of some units at some images.

    Attributes:
        image_part: Image parts. In RM2 and RM4 of maps they are patches on the receptive fields,
            unless each image has its own units. Otherwise they are whole images. :attr:`image`
            expands patches to whole images.
        bias_part: Bias parts ``(N, *units, m)`` for the entries of ``b`` on which the layer
            depends. :attr:`bias` expands them to all entries.
        entries: Indices of these m entries among the M entries of ``b``, ``(m,)``.
        value: Values of the units in the untouched model, ``(N, *units)``.
        x: The images, ``(N, C, H, W)``.
        network: The network.
        layer: Name of the layer.
        mode: Reconstruction mode.
        units: The units, see :class:`Selection`.
        own_bias: Whether the layer's own bias belongs to the units.
        scale: The factor k of the pattern.
        memory: Largest size of :attr:`image` in bytes.
    """

    image_part: Tensor | Patches
    bias_part: Float[Tensor, "n *units m"]
    entries: Tensor
    value: Float[Tensor, "n *units"]
    x: Float[Tensor, "n *in"]
    network: Network
    layer: str
    mode: str
    units: Selection
    own_bias: bool
    scale: float
    memory: int

    def _summary(self) -> Summary:
        return showing.of_hyperplanes(self)

    def _repr_html_(self) -> str:
        return showing.html_of(self)

    @property
    def image(self) -> Tensor:
        """Image parts ``(N, *units, C, H, W)``, in activation per unit of input.

        Raises:
            ValueError: If they are larger than ``memory``.
        """
        if not isinstance(self.image_part, Patches):
            return self.image_part
        wanted = self.value.numel() * prod(self.x.shape[1:]) * self.value.element_size()
        if wanted > self.memory:
            msg = (
                f"The dense image part must fit in memory={self.memory:,} bytes. "
                f"It needs {wanted / 2**30:.2f} GiB: use image_part (patches and their corners), "
                "reconstruct() and to_xarray(), or raise memory."
            )
            raise ValueError(msg)
        return self.image_part.dense()

    @property
    def bias(self) -> Tensor:
        """Bias parts ``(N, *units, M)``, in activation per unit of bias."""
        whole = self.bias_part.new_zeros(*self.bias_part.shape[:-1], len(self.network.biases))
        whole[..., self.entries] = self.bias_part
        return whole

    def reconstruct(self, x: Tensor | None = None) -> Float[Tensor, "n *units"]:
        r"""The inner product :math:`\langle [x; b] | H \rangle`, ``(N, *units)``.

        Args:
            x: Images ``(N, C, H, W)``, or one image ``(C, H, W)`` for all hyperplanes; by default
                the images of the hyperplanes.

        Raises:
            ValueError: If the shape does not fit.
        """
        return self._inner(self._images(x), torch.positive)

    def magnitude(self, x: Tensor | None = None) -> Float[Tensor, "n *units"]:
        r"""The scale of the rounding error, :math:`\sum |x h_I| + \sum |b h_b|`.

        Its shape is ``(N, *units)``.
        """
        return self._inner(self._images(x), torch.abs)

    def relative_error(self) -> Float[Tensor, "n *units"]:
        """Signed relative error of the reconstruction [Wan2022, eq. 3.29], ``(N, *units)``."""
        return relative_error(self.reconstruct(), self.value)

    def contributions(self) -> Contributions:
        """What each pixel and each bias adds to the units."""
        # (N, 1 for each dimension of the units, C, H, W)
        x = self.x.view(len(self.x), *(1,) * len(self.units.shape), *self.x.shape[1:])
        parts = self.network.biases_in(self.value.dtype)
        whole = self.bias
        bias = {name: whole[..., part.slice] * part.value.flatten() for name, part in parts.items()}
        return Contributions(x * self.image, bias, self.x.dim() - 1)

    def single(self, unit: Any = None, image: int = 0) -> "SingleHyperplane":
        """The hyperplane of one unit, which shows itself in a notebook.

        Args:
            unit: Index of the unit among those of the hyperplanes, an int or a tuple of ints. It
                may be left out if there is one unit.
            image: Index of the image.

        Raises:
            ValueError: If the index does not choose one unit.
        """
        from adjointbackmap.planes.single import single

        return single(self, unit, image)

    def receipt(self, unit: Any = None, image: int = 0, by: str = "region") -> "Receipt":
        """What pixels and each layer's biases add to one unit: the lines sum to its value.

        Args:
            unit: As for :meth:`single`.
            image: Index of the image.
            by: ``"region"`` for nine regions of the receptive field, or ``"channel"``.

        Raises:
            ValueError: If ``by`` is unknown, or the index does not choose one unit.

        Example:
            >>> import torch
            >>> from adjointbackmap import trace
            >>> network = trace(torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8))
            >>> planes = hyperplanes(network, torch.rand(3, 8, 8), "output", units=(0, 0, 0))
            >>> found = planes.receipt()
            >>> len(found.lines), abs(found.error) < 1e-5
            (10, True)
        """
        from adjointbackmap.planes.receipts import receipt_of

        return receipt_of(self, unit, image, by)

    def plot(
        self,
        over: Any = None,
        what: str = "hyperplane",
        unit: Any = None,
        image: int = 0,
        title: str | None = None,
    ) -> "Drawing":
        """Hyperplanes over the photo, see :func:`adjointbackmap.plots.over_image`.

        Args:
            over: What :func:`adjointbackmap.image` gave, to draw over the photo in its own pixels;
                by default the image that the network took.
            what: ``"hyperplane"``, ``"contributions"``, ``"channels"`` or ``"spectrum"``.
            unit: As for :meth:`single`; by default the first four units.
            image: Index of the image.
            title: Heading of the figure.
        """
        from adjointbackmap import plots

        return plots.over_image(self, over, what, unit, image, title)

    def to_xarray(self, dense: bool = False) -> "xarray.Dataset":
        """Image part, bias part and value with labelled dimensions and the names of the biases.

        Args:
            dense: Whether to expand patches to whole images. Otherwise the coordinates ``top`` and
                ``left`` are the row and the column of each patch's first pixel.

        Example:
            >>> import torch
            >>> from adjointbackmap import trace
            >>> network = trace(torch.nn.Conv2d(1, 2, 3).eval(), torch.rand(1, 1, 5, 5))
            >>> hyperplanes(network, torch.rand(1, 5, 5), "output", "RM1").to_xarray()["image"].dims
            ('n', 'out_channel', 'channel', 'row', 'col')
        """
        import xarray

        names = input_names(self.x.dim() - 2)
        dims = ("n", *self.units.names)
        coords: dict[str, Any] = {"bias_name": ("m", list(self.network.biases.labels))}
        coords |= self.units.labelled()
        image = self.image_part
        if isinstance(image, Patches) and not dense:
            names = ("channel", "patch_row", "patch_col")
            tops, lefts = image.corners.unbind(-1)
            coords |= {"top": (dims[1:], tops.numpy()), "left": (dims[1:], lefts.numpy())}
            image = image.values
        else:
            image = self.image
        arrays = {
            "image": ((*dims, *names), image),
            "bias_part": ((*dims, "m"), self.bias),
            "value": (dims, self.value),
        }
        data = {name: (d, t.cpu().numpy()) for name, (d, t) in arrays.items()}
        attrs = {
            "layer": self.layer,
            "mode": self.mode,
            "own_bias": int(self.own_bias),
            "k": self.scale,
            **self.network.curved_settings,
        }
        return xarray.Dataset(data, coords, attrs)

    def _images(self, x: Tensor | None) -> Tensor:
        """One image for each image of the hyperplanes, ``(N, C, H, W)``; by default these.

        Raises:
            ValueError: If the number of images is another.
        """
        if x is None:
            return self.x
        x = check_images(self.network, x, self.value.dtype)
        if len(x) not in (1, len(self.x)):
            several = f" or {len(self.x)}" if len(self.x) > 1 else ""
            msg = (
                f"x must be one image{several}. "
                f"Got {len(x)}: give as many images as the hyperplanes have."
            )
            raise ValueError(msg)
        return x.expand(len(self.x), *x.shape[1:])

    def _inner(self, x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Sums over ``of(product)``, for the products of hyperplane and [x; b]."""
        biases = self.network.biases_in(self.value.dtype).vector[self.entries].expand(len(x), -1)
        image = self.image_part
        if isinstance(image, Patches):
            pixels = image.inner(x, of)
        else:
            pixels = _sums(image, x.flatten(1), self.value, of)
        return pixels + _sums(self.bias_part, biases, self.value, of)


def _sums(part: Tensor, vectors: Tensor, value: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums over ``of(product)``, for the products of parts and one vector for each image.

    The products of a block of units are made at once, to bound the memory. PyTorch's sum adds
    pairwise, so the rounding error grows only with the logarithm of the number of terms.
    """
    flat = part.reshape(len(part), prod(value.shape[1:]), vectors.shape[1])  # (N, units, length)
    blocks = flat.split(max(1, BLOCK // max(1, vectors.shape[1])), 1)
    return torch.cat([of(block * vectors[:, None]).sum(2) for block in blocks], 1).view(value.shape)


def relative_error(
    reconstructed: Float[Tensor, "*units"], value: Float[Tensor, "*units"]
) -> Float[Tensor, "*units"]:
    r"""Signed relative error :math:`(\hat c - c) / c_{\neq 0}` [Wan2022, eq. 3.29].

    In the denominator a value of zero is replaced by the smallest positive normal float32. If both
    numbers are zero, the error is zero.

    Example:
        >>> relative_error(torch.tensor([1.5, 0.0]), torch.tensor([1.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    tiny = torch.finfo(torch.float32).tiny
    return (reconstructed - value) / torch.where(value == 0, tiny, value)


@overload
def hyperplanes(
    network: Network,
    x: Tensor,
    layer: str | nn.Module,
    mode: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Hyperplanes: ...


@overload
def hyperplanes(
    network: Network,
    x: Tensor,
    layer: Sequence[str | nn.Module],
    mode: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Hyperplanes]: ...


def hyperplanes(
    network: Network,
    x: Tensor,
    layer: str | nn.Module | Sequence[str | nn.Module],
    mode: str | None = None,
    units: Any = None,
    own_bias: bool | None = None,
    scale: float | str = 1.0,
    dtype: torch.dtype | str | None = None,
    method: str | None = None,
    memory: str | float | int | None = "2GiB",
    pattern: ActivationPattern | None = None,
) -> Hyperplanes | dict[str, Hyperplanes]:
    r"""Effective hyperplanes of a layer's units at the activation pattern of ``x``.

    :math:`c([x; b]) = \langle [x; b] | J_F^*(k [x; b])\, w \rangle`
    [Wan2022, eqs. 3.2-3.4, 3.7-3.12].

    Args:
        network: Traced network, see :func:`trace`.
        x: One image ``(C, H, W)`` or a batch ``(N, C, H, W)``, in the units that the model takes.
        layer: Name in ``network.layers``, or a module of the model that is called once, such as
            ``model.conv3``. Several names or modules share one sweep if that is cheaper.
        mode: The reconstruction mode; by default RM2, or RM0 if the layer has no positions.

            - ``"RM4"``: one kernel at one position; units
              ``(out_row, out_col, in_channel, out_channel)``;
            - ``"RM3"``: one kernel, summed over positions; units ``(in_channel, out_channel)``;
            - ``"RM2"``: one unit; units ``(out_row, out_col, out_channel)``;
            - ``"RM1"``: one out-channel, summed over positions; units ``(out_channel,)``;
            - ``"RM0"``: one output of a fully connected layer; units ``(out_feature,)``.
        units: ``None`` for all. A tuple of ints, slices or integer arrays over the mode's unit
            dimensions, combined as NumPy does; they may be negative and have steps. A tensor
            ``(N, K, d)`` with K units for each image. ``"predicted"`` for the largest output in
            RM0.
        own_bias: Whether the layer's own bias belongs to the unit. By default it does in RM0 to
            RM2, and the value is the output of the module. It never does in RM3 and RM4.
        scale: The factor k at which the pattern is taken, a positive number or ``"1/8"``.
        dtype: ``torch.float64`` or ``"float64"`` for more than the model's own precision.
        method: The way to compute the hyperplanes; by default the one that :func:`plan` finds
            cheapest.

            - ``"adjoint"``: one cotangent for each hyperplane;
            - ``"basis"``: one tangent for each scalar of [x; b];
            - ``"coloured"``: one tangent for all pixels of which no unit sees two;
            - ``"windowed"``: one tangent for each pixel, only on the windows that the pixel
              reaches;
            - ``"windowed-adjoint"``: one cotangent for each hyperplane, only on the windows that
              the unit sees.
        memory: Bytes for the result and for the batches that compute it, or a size such as
            ``"2GiB"``; ``None`` for no bound. A batch has at least one vector, see ``workspace`` of
            :func:`plan`.
        pattern: The pattern of ``x`` from :func:`record_pattern`, with the same ``scale`` and
            ``dtype``. Who asks for many units of one image, one after the other, pays for the
            pattern once. By default it is recorded.

    Returns:
        ``image`` of shape ``(N, *units, C, H, W)``, ``bias`` of shape ``(N, *units, M)`` and
        ``value`` of shape ``(N, *units)``, detached, on the model's device. For several layers a
        dict: name of a layer -> its hyperplanes.

    Raises:
        TypeError: If ``network`` is no traced network, or ``x`` no tensor.
        ValueError: If the layer, mode, units, shape or dtype do not fit, ``x`` is not finite, the
            result is larger than ``memory``, or ``pattern`` is another one.
        RuntimeError: If the model was changed since the trace.

    Example:
        >>> import torch
        >>> from adjointbackmap import record_pattern, trace
        >>> first, second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3)
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), second).eval()
        >>> image = torch.rand(3, 8, 8)
        >>> network = trace(model, image[None])
        >>> planes = hyperplanes(network, image, layer="2", mode="RM2")
        >>> bool((planes.reconstruct() - planes.value).abs().max() < 1e-5)
        True
        >>> held = record_pattern(network, image)
        >>> unit = hyperplanes(network, image, layer="2", units=(1, 1, 0), pattern=held)
        >>> bool((unit.image - planes.image[:, 1, 1, 0]).abs().max() < 1e-5)
        True
    """
    names = several(layer)
    first = Query.of(
        network, x, names[0], mode, units, own_bias, scale, dtype, method, memory, pattern
    )
    queries = [first, *(first.at_layer(name, mode, units, own_bias) for name in names[1:])]
    plans = plan_queries(queries)
    needed = sum(plan.bytes for plan in plans)
    if needed > first.memory:
        count = sum(query.units.count for query in queries)
        msg = (
            f"The result must fit in memory={memory}. It needs {needed / 2**30:.2f} GiB for "
            f"{len(first.images)} x {count:,} hyperplanes: choose fewer units or images, raise "
            "memory, or take iter_hyperplanes() or save()."
        )
        raise ValueError(msg)
    found = planes_of(queries, [plan.method for plan in plans])
    single = isinstance(layer, str | nn.Module)
    return found[0] if single else {planes.layer: planes for planes in found}


def planes_of(queries: Sequence[Query], methods: Sequence[str]) -> list[Hyperplanes]:
    """The hyperplanes of queries at the same images, with the values of the untouched model.

    Args:
        queries: The queries.
        methods: The method of each query.
    """
    first = queries[0]
    layers = [query.layer for query in queries]
    with one_thread(first.images.device) if "windowed" in methods else nullcontext():
        recorded = first.recorded(layers, images_per_batch(queries, methods))
    return [
        Hyperplanes(
            image_part=parts.image,
            bias_part=parts.bias,
            entries=query.readout.entries,
            value=query.values(recorded),
            x=query.images,
            network=query.network,
            layer=query.layer.name,
            mode=query.mode,
            units=query.units,
            own_bias=query.own_bias,
            scale=query.scale,
            memory=query.memory,
        )
        for query, parts in zip(queries, compute_parts(queries, methods), strict=True)
    ]
