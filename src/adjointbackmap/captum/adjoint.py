"""Hyperplanes through an interface like that of Captum.

Users of ``NeuronGradient``, ``Saliency`` and ``InputXGradient`` know the call.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from adjointbackmap.capture.copies import structural_copy
from adjointbackmap.capture.graph import listening
from adjointbackmap.engine.layers import OUTPUT
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record
from adjointbackmap.engine.operators import LayerOperator
from adjointbackmap.engine.pattern import check_tensor, pattern_of
from adjointbackmap.planes.query import Query
from adjointbackmap.tracing import trace

Target = int | slice | tuple[Any, ...] | list[Any] | Tensor | Callable[[Tensor], Tensor] | None
SHAPES_KEPT = 4  # input shapes whose traced networks are kept
# Largest constant part of a callable target, relative to its terms, that counts as zero.
CONSTANT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class AdjointBackMap:
    r"""Hyperplanes of a model's output or of one of its layers, called like a method of Captum.

    The image part of a hyperplane is the gradient of the chosen unit. Captum gives only this part.
    With ``return_bias=True`` the bias part is returned too. The two together reproduce the value of
    the unit: :math:`\langle x | H_I \rangle + \langle b | H_b \rangle`.

    Args:
        model: Any module that :func:`adjointbackmap.trace` takes, in eval mode.
        layer: A module of the model, or the name of a layer such as ``"conv:1"`` for the second
            call of a module; ``None`` for the model's output. Later layers have no influence.
        multiply_by_inputs: Whether to return the contributions x * H_I and b * H_b instead of H_I
            and H_b.

    Raises:
        ValueError: If ``layer`` is not a module of the model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), head).eval()
        >>> x = torch.rand(2, 1, 5, 5)
        >>> image = AdjointBackMap(model, model[0]).attribute(x, neuron_selector=(1, 0, 2))
        >>> image.shape
        torch.Size([2, 1, 5, 5])
        >>> method = AdjointBackMap(model, multiply_by_inputs=True)
        >>> image, bias = method.attribute(x, target=[2, 0], return_bias=True)
        >>> bool(torch.allclose(image.flatten(1).sum(1) + bias.sum(1), model(x)[[0, 1], [2, 0]]))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module | str | None = None,
        *,
        multiply_by_inputs: bool = False,
    ) -> None:
        self.model = model
        self.layer = layer
        self.multiply_by_inputs = multiply_by_inputs
        self._until = _layer_name(model, layer)
        self._networks: dict[tuple[int, ...], Network] = {}

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        *,
        neuron_selector: Target = None,
        return_bias: bool = False,
        abs: bool = False,
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Hyperplanes of one unit, or of a sum of units, for each input.

        Args:
            inputs: A batch ``(N, C, H, W)``, or a tuple that holds one batch.
            target: The unit. An int chooses a unit of a flat layer. A tuple of ints or slices
                indexes the layer's dimensions; the units of a slice are summed. A tensor ``(N,)``
                or a list has one unit per input. ``None`` is for a layer of one unit. A callable,
                such as ``lambda out: out[:, 3] - out[:, 5]``, maps the layer's output to one number
                per input or to one number in all. It must be linear around the layer's output.
            neuron_selector: Another name for ``target``, used by ``NeuronGradient``.
            return_bias: Whether to return the bias part too. Its entries are ordered as in
                ``self.network(inputs).biases``.
            abs: Whether to return the absolute value of the image part, the default of
                ``Saliency``.
            additional_forward_args: Must be ``None``: a network takes one image and nothing else.
            attribute_to_neuron_input: Must be ``False``: a hyperplane belongs to the output of a
                layer.

        Returns:
            The image part in the shape and dtype of ``inputs``, as a tuple if they are a tuple.
            With ``return_bias``, a pair of the image part and the bias part ``(N, M)``.

        Raises:
            ValueError: If the target does not choose units of the layer or is given under both
                names, the module is called more than once, or the inputs do not fit the model.
        """
        refuse_other_inputs(inputs, additional_forward_args, attribute_to_neuron_input)
        if target is not None and neuron_selector is not None:
            msg = "target and neuron_selector are two names of one argument. Got both: give one."
            raise ValueError(msg)
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        check_tensor(x)
        chosen = target if neuron_selector is None else neuron_selector
        query = self._query(x)
        network = query.network
        linear = LayerOperator(pattern_of(network, query.images, query.scale), query.layer)
        cotangent = (
            _slopes_of_target(query, chosen)
            if callable(chosen)
            else indicator(network, query.layer.out_shape, chosen, query.images)
        )
        image, bias = linear.pulled(cotangent)
        if self.multiply_by_inputs:
            image = x.detach() * image
            bias = network.biases.vector * bias
        image = image.abs() if abs else image
        given = (image,) if isinstance(inputs, tuple) else image
        return (given, bias) if return_bias else given

    def network(self, inputs: Tensor) -> Network:
        """The traced network for inputs of this shape.

        The model is traced once per shape, and again after it has changed.

        Args:
            inputs: A batch ``(N, C, H, W)``; only its shape and dtype matter.
        """
        return self._query(inputs.detach()).network

    def _query(self, x: Tensor) -> Query:
        """The query for inputs of one shape. It also checks the model, once per call."""
        known = self._networks.get(tuple(x.shape[1:]))
        if known is not None:
            with suppress(RuntimeError):  # the model has changed
                return self._kept(x, Query.of(known, x, OUTPUT))
        network = trace(self.model, x, until=self._until)
        if isinstance(self.layer, nn.Module) and self._until is not None:
            _check_called_once(self.model, self._until, x)
        return self._kept(x, Query.of(network, x, OUTPUT))

    def _kept(self, x: Tensor, query: Query) -> Query:
        """Store the network of a query as the most recently used one."""
        # The copy is changed and then assigned, since another thread may run this method too.
        networks = dict(self._networks)
        shape = tuple(x.shape[1:])
        networks.pop(shape, None)
        self._networks = dict([*networks.items(), (shape, query.network)][-SHAPES_KEPT:])
        return query


def _layer_name(model: nn.Module, layer: nn.Module | str | None) -> str | None:
    """Name of a module among the network's layers; ``None`` for the model's output.

    Raises:
        ValueError: If the layer is not a module of the model.
    """
    if layer is None or isinstance(layer, str):
        return layer
    for path, module in model.named_modules():
        if module is layer:
            return path or None
    msg = (
        "layer must be a module of the model, or a name. "
        f"Got {_other(layer)}: take it from the model itself."
    )
    raise ValueError(msg)


def _other(layer: object) -> str:
    """A layer that does not belong to the model, for a message."""
    return f"another {type(layer).__name__}" if isinstance(layer, nn.Module) else f"{layer!r:.40}"


def _check_called_once(model: nn.Module, path: str, x: Tensor) -> None:
    """Raise if the model calls a module more than once.

    The module alone does not say which call is meant. Captum takes the last one.

    Raises:
        ValueError: If the model calls the module more than once; the message names the calls.
    """
    calls: list[str] = []
    copied = structural_copy(model)

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        calls.append(name)

    with torch.no_grad(), listening(copied, note, [path]):
        copied(x.clone())
    if len(calls) > 1:
        msg = (
            "layer must be a module that is called once. "
            f"Got {len(calls)} calls: pass one of {', '.join(map(repr, calls))}."
        )
        raise ValueError(msg)


def refuse_other_inputs(
    inputs: Tensor | tuple[Tensor, ...],
    forward_args: object,
    to_input: bool,
) -> None:
    """Raise for arguments of Captum that a function of one image does not have.

    Raises:
        ValueError: If there are several inputs or additional arguments, or a layer's input is asked
            for.
    """
    if isinstance(inputs, tuple) and len(inputs) != 1:
        msg = (
            "inputs must be one tensor, or a tuple of one. "
            f"Got {len(inputs)}: wrap the model in a module of one input."
        )
        raise ValueError(msg)
    if forward_args is not None:
        msg = (
            "additional_forward_args must be None. "
            "Got some: wrap the model in a module that holds them."
        )
        raise ValueError(msg)
    if to_input:
        msg = "attribute_to_neuron_input must be False. Got True: choose the layer before this one."
        raise ValueError(msg)


def indicator(network: Network, shape: tuple[int, ...], target: Target, images: Tensor) -> Tensor:
    """The cotangent that is 1 at the chosen units of each image, ``(N, *shape)``.

    Args:
        network: The network.
        shape: Shape of the layer.
        target: The units.
        images: The images.

    Raises:
        ValueError: If a target chooses no unit, or several units without a slice.
    """
    cotangent = torch.zeros(
        len(images),
        *shape,
        dtype=images.dtype,
        device=network.device,
    )
    for row, index in zip(cotangent, _indices(target, len(images)), strict=True):
        try:
            count = row[index].numel()
        except (IndexError, TypeError):
            count = 0
        if not count or (count > 1 and not any(isinstance(i, slice) for i in index)):
            msg = (
                f"The target must be an int or a slice for each dimension of {shape}. "
                f"Got {index}: it chooses {count} units."
            )
            raise ValueError(msg)
        row[index] = 1
    return cotangent


def _indices(target: Target, images: int) -> list[tuple[Any, ...]]:
    """One index per image.

    Raises:
        ValueError: If a list or tensor does not have one target per image.
    """
    each: Any = target
    if isinstance(target, Tensor):
        each = target.item() if target.numel() == 1 else target.tolist()
    each = each if isinstance(each, list) else [each] * images
    if len(each) != images:
        msg = (
            f"A list or tensor of targets must have one for each of the {images} inputs. "
            f"Got {len(each)}."
        )
        raise ValueError(msg)
    return [() if one is None else one if isinstance(one, tuple) else (one,) for one in each]


def _slopes_of_target(query: Query, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The cotangent of a callable target: its gradient with respect to the layer's output.

    The model itself computes that output.

    Raises:
        ValueError: If the callable does not return one number per image or one number in all, or is
            not linear there.
    """
    output = record(query.network, query.images, [query.layer]).outputs[OUTPUT]
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        chosen = choose(output)
        if not isinstance(chosen, Tensor) or chosen.numel() not in (1, len(output)):
            got = tuple(chosen.shape) if isinstance(chosen, Tensor) else type(chosen).__name__
            msg = (
                f"A callable target must return ({len(output)},) numbers, or one. "
                f"Got {got}: sum over the layer's units."
            )
            raise ValueError(msg)
        slopes = None
        if chosen.requires_grad:
            slopes = torch.autograd.grad(chosen.sum(), output, create_graph=True)[0]
        if slopes is None or _curved(slopes, output) or _has_constant(chosen, slopes, output):
            msg = (
                "A callable target must be linear around the layer's output. "
                "Got one that is not: no hyperplane is exact for it."
            )
            raise ValueError(msg)
    return slopes.detach()


def _curved(slopes: Tensor, output: Tensor) -> bool:
    """Whether the slopes change with the output, to first order in a random direction."""
    if not slopes.requires_grad:
        return False
    direction = torch.randn(slopes.shape, generator=torch.Generator().manual_seed(0)).to(slopes)
    change = torch.autograd.grad((slopes * direction).sum(), output, allow_unused=True)[0]
    return change is not None and bool(change.any())


def _has_constant(chosen: Tensor, slopes: Tensor, output: Tensor) -> bool:
    """Whether a callable target has a constant part.

    It is what the inner product of slopes and output lacks. The hyperplane would lack it too.
    """
    products = (slopes * output).flatten(1)
    sums = products.sum(1) if chosen.numel() > 1 else products.sum()
    limit = CONSTANT_TOLERANCE[output.dtype] * products.abs().sum()
    return bool(((chosen.view_as(sums) - sums).abs() > limit).any())
