"""From a module and the shape of its input to a :class:`Network`.

The network is compared with the module once.
"""

from typing import cast

import torch
from torch import Tensor, nn

from adjointbackmap.capture.entering import Entrance, Example
from adjointbackmap.capture.fingerprints import attributes_read
from adjointbackmap.capture.graph import Capture, capture
from adjointbackmap.capture.model_check import batch_of
from adjointbackmap.engine.auditing import audit as audit_network
from adjointbackmap.engine.curved import Reading
from adjointbackmap.engine.network import Network, check_eval
from adjointbackmap.planes.patch_check import check_patches
from adjointbackmap.planes.planner import plan
from adjointbackmap.rules.curved import GATE, REFUSE
from adjointbackmap.rules.infinite import InfiniteValue


def trace(
    model: nn.Module,
    example: Example,
    until: str | nn.Module | None = None,
    output: int | str | None = None,
    audit: bool = True,
    *,
    curved: str = REFUSE,
    products: str = GATE,
    after: str | nn.Module | None = None,
) -> Network:
    r"""Capture a module in eval mode as a graph.

    The inputs of the graph are the image and every additive constant of the module.

    Args:
        model: Any module of piecewise-affine operations. It is not changed.
        example: A batch ``(N, *in_shape)`` such as ``(1, 3, 32, 32)``; only its shape and dtype
            matter. With ``after`` it is what the model takes: a tensor such as token numbers
            ``(N, T)``, or a tuple or dict of tensors, such as token numbers and a mask.
        until: Name or module of the layer that ends the network. Later operations are left out.
        output: Name or index of the output to take, if the module returns several.
        audit: Whether to compare the network with the module on one random input, see
            :func:`adjointbackmap.audit`, and a few hyperplanes on patches with the whole ones.
        curved: What to do with curved operations, such as GELU, norms and attention. ``"refuse"``
            raises. ``"frozen"`` holds their gates constant: the value is still
            :math:`\langle [x; b] | H \rangle`, but H is not the derivative. ``"tangent"`` takes
            their derivative, and the rest as entries of ``b``.
        products: Which factor of a product of two values is frozen. ``"gate"`` takes the one that
            is a gate by nature, such as a sigmoid. If there is none, or with ``"half"``, each
            factor is frozen in turn with weight one half.
        after: Name or module of the layer whose output is the network's input, such as the
            embedding of tokens. :meth:`adjointbackmap.Network.embed` makes such inputs. What the
            model takes beside them, such as masks, is read by gates alone.

    Returns:
        The network, for inputs of the example's shape and any batch size.

    Raises:
        TypeError: If the model is no module, or the example no tensor.
        ValueError: If the model is in train mode, the example does not fit it, ``until`` is not one
            of its layers, ``output`` is not one of its outputs, ``torch.export`` cannot capture
            it, or ``curved`` or ``products`` is none of its choices.
        UnsupportedOperation: If an operation is not piecewise affine; the message names all of
            them.
        RuntimeError: If the audit fails, or a receptive field is too small.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        >>> list(trace(model, torch.rand(1, 3, 8, 8)).layers)
        ['0', '1', 'output']
    """
    reading = Reading(curved, products)
    check_eval(model, ValueError)
    entrance = None
    if after is not None:
        entrance = Entrance.of(model, after, example)
        example = entrance.embed(model, entrance.given)
    x = cast("Tensor", example)
    captured = capture(model, x, entrance)
    attributes = attributes_read(model, batch_of(x), entrance)
    network = Network(model, captured, plan, until, output, attributes, reading, entrance)
    if audit:
        _audit(network, x)
    return network


def trace_captured(model: nn.Module, captured: Capture, example: Tensor) -> Network:
    """The network of a module whose graph is known, see :func:`trace`.

    Raises:
        RuntimeError: If the audit fails, because the graph is not that of the module.
    """
    attributes = attributes_read(model, batch_of(example))
    network = Network(model, captured, plan, None, None, attributes, Reading(REFUSE, GATE))
    _audit(network, example)
    return network


def _audit(network: Network, example: Tensor) -> None:
    """Compare a network with its model at random numbers."""
    if network.device.type == "meta":  # its tensors have no values
        return
    # drawn on the CPU in float64: the same numbers on every device and in every dtype
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *network.in_shape, generator=generator, dtype=torch.float64)
    _check(network, noise.to(network.device, network.dtype), batch_of(example)[:1])


def _check(network: Network, noise: Tensor, image: Tensor) -> None:
    """Compare the network with the model, and hyperplanes on patches with whole ones.

    The input is noise. If noise makes a value infinite, it is the given image.
    """
    try:
        audit_network(network, noise)
    except InfiniteValue:
        noise = image
        audit_network(network, noise)
    check_patches(network, noise)
