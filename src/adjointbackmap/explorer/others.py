"""A unit through other methods: Captum's attributions, and how far each is from the value."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointbackmap.engine.layers import Layer
from adjointbackmap.engine.network import Network
from adjointbackmap.engine.observe import record_call
from adjointbackmap.explorer.answers import packed
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.session import Session
from adjointbackmap.planes.single import SingleHyperplane

STEPS = 50  # of integrated gradients, as many as Captum takes by default
AT_ONCE = 10  # images of these steps in one call of the model; bounds the memory
OURS = "Hyperplane and biases"


def others_answer(session: Session, place: Place) -> bytes:
    """Attributions of a unit, ours first, each with what its numbers sum to.

    Raises:
        ImportError: If Captum is not installed.
        ValueError: If the model itself does not compute the unit.
    """
    held = session.at(place.net, place.img)
    plane = place.single(held)
    value = unit_function(held.network, held.network.layer(plane.layer), plane)
    terms = plane.contributions()
    total = float(terms.sum()) + sum(plane.bias_contributions().values())
    methods = [_method(OURS, total, plane.value)]
    arrays: dict[str, Tensor] = {OURS: terms}
    for name, found in captum_maps(value, held.x[None]).items():
        methods.append(_method(name, float(found.double().sum()), plane.value))
        arrays[name] = found
    return packed({"methods": methods, "value": plane.value, "steps": STEPS}, arrays)


def _method(name: str, total: float, value: float) -> dict[str, Any]:
    return {"name": name, "sum": total, "off": total - value}


def unit_function(
    network: Network, layer: Layer, plane: SingleHyperplane
) -> Callable[[Tensor], Tensor]:
    """The value of a unit as a function of a batch of images, in the untouched model.

    Returns:
        A function from ``(N, C, H, W)`` to ``(N,)``, through which gradients flow.

    Raises:
        ValueError: If it is a kernel, whose value is only a part of what the model computes.
    """
    places = {name: int(n) for name, n in plane.place.items()}
    if "in_channel" in places:
        msg = f"Captum's methods take RM0, RM1 or RM2. Got {plane.mode}: choose one of these."
        raise ValueError(msg)
    # an output is (N, channel, *positions): the name of a unit has its channel last
    if "out_channel" in places:
        index = [places.pop("out_channel"), *places.values()]
    else:
        index = list(places.values())
    where: tuple[Any, ...] = (slice(None), *index)

    def value(images: Tensor) -> Tensor:
        output = record_call(network, images, [layer]).outputs[layer.name]
        return output[where].reshape(len(images), -1).sum(1)

    return value


def captum_maps(value: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Captum's attributions of one image, each of the image's shape.

    Args:
        value: From images ``(N, C, H, W)`` to numbers ``(N,)``.
        x: One image, ``(1, C, H, W)``.

    Raises:
        ImportError: If Captum is not installed.
    """
    try:
        from captum.attr import InputXGradient, IntegratedGradients, Saliency
    except ImportError as error:
        msg = "Other methods need Captum. Got none installed: pip install captum."
        raise ImportError(msg) from error
    with torch.enable_grad():  # the worker's thread has its own setting
        inputs = x.detach().clone().requires_grad_()
        path = IntegratedGradients(value)
        found = {
            "Saliency": Saliency(value).attribute(inputs),
            "Input x gradient": InputXGradient(value).attribute(inputs),
            "Integrated gradients": path.attribute(
                inputs, baselines=0, n_steps=STEPS, internal_batch_size=AT_ONCE
            ),
        }
    return {name: attribution.detach()[0].to(x) for name, attribution in found.items()}
