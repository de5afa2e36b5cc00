"""What a network and its parts say of themselves."""

from math import prod
from typing import TYPE_CHECKING

from adjointbackmap.display import Summary, Table, by

if TYPE_CHECKING:
    from adjointbackmap.engine.biases import Biases
    from adjointbackmap.engine.layers import Layer
    from adjointbackmap.engine.network import Network
    from adjointbackmap.engine.operators import LayerOperator
    from adjointbackmap.engine.pattern import ActivationPattern


def of_network(network: "Network") -> Summary:
    """The image, the bias vector, and a table of the layers."""
    until = f", until {network.until!r}" if network.until else ""
    shape = f"{by(network.in_shape)}, {_dtype(network.dtype)} on {network.device}"
    facts = {
        **({"input": f"{shape}, after {network.after!r}"} if network.after else {"image": shape}),
        "biases": f"M = {len(network.biases):,} in {len(network.biases.names)} parts",
        "layers": f"{len(network.layers)}, of them {_kernels(network)} with a kernel",
    }
    if network.curved:
        reading = network.note or "tangents"
        facts["curved"] = f"{len(network.curved)} calls, {reading}"
    heads = ("layer", "kind", "modes", "output", "receptive field", "units", "biases")
    reached = _biases_reached(network)
    rows = [(*_row(layer), f"{reached[name]:,}") for name, layer in network.layers.items()]
    title = f"Network of {type(network.model).__name__}{until}"
    return Summary(title, facts, {"": Table(heads, rows)})


def of_layer(layer: "Layer") -> Summary:
    """Kind, modes, shapes and receptive field of a layer."""
    _, kind, modes, output, field, units = _row(layer)
    facts = {
        "kind": kind,
        "modes": modes,
        "input": by(layer.in_shape) if layer.in_shape else "",
        "output": output,
        "receptive field": field,
        "units": units,
    }
    shown = {name: words for name, words in facts.items() if words}
    return Summary(f"Layer {layer.name}", shown)


def of_biases(biases: "Biases") -> Summary:
    """A table of the parts of the bias vector."""
    heads = ("part", "entries", "place in b", "smallest", "largest", "parameter")
    rows = []
    for name, part in biases.items():
        place = f"{part.slice.start}-{part.slice.stop - 1}"
        ends = (f"{float(n):.4g}" for n in (part.value.min(), part.value.max()))
        rows.append((name, f"{part.value.numel():,}", place, *ends, part.parameter or ""))
    title = f"Biases: M = {len(biases):,} in {len(rows)} parts, {_dtype(biases.dtype)}"
    return Summary(title, {}, {"": Table(heads, rows)} if rows else {})


def of_operator(operator: "LayerOperator") -> Summary:
    """Where the linear map comes from and leads to."""
    pattern = operator.pattern
    facts = {
        "from": f"[x; b] with x of {by(operator.in_shape)} and M = {operator.bias_length:,}",
        "to": f"{operator.layer.name} of {by(operator.out_shape)}",
        "at": f"the activation pattern of {_counted(pattern.images)}, {_dtype(pattern.dtype)}",
        "methods": "forward, adjoint, dense, as_scipy",
    }
    if pattern.network.note:
        facts["gates"] = pattern.network.note
    return Summary("LayerOperator", facts)


def of_pattern(pattern: "ActivationPattern") -> Summary:
    """How many gates and winners the pattern has."""
    count = sum(gate.numel() for gates in pattern.gates.values() for gate in gates)
    facts = {
        "of": f"{_counted(pattern.images)}, {_dtype(pattern.dtype)}",
        "gates and winners": f"{count:,} numbers of {len(pattern.gates)} operations",
        "network": f"{type(pattern.network.model).__name__}",
    }
    return Summary("ActivationPattern", facts)


def _row(layer: "Layer") -> tuple[str, ...]:
    """Name, kind, modes, output, receptive field and units."""
    modes = " ".join(layer.modes)
    field = by(layer.receptive_field) if layer.receptive_field else ""
    units = f"{prod(layer.out_shape):,}"
    return layer.name, layer.kind, modes, by(layer.out_shape), field, units


def _biases_reached(network: "Network") -> dict[str, int]:
    """How many entries of ``b`` each layer depends on."""
    program = network.program()
    sizes = {entry.slot: entry.value.numel() for entry in program.entries}
    found = {}
    for name, layer in network.layers.items():
        steps = program.upstream([layer.value])
        slots = {i.slot for step in steps for i in step.inputs}
        found[name] = sum(size for slot, size in sizes.items() if slot in slots)
    return found


def _kernels(network: "Network") -> int:
    return sum(layer.kernel is not None for layer in network.layers.values())


def _counted(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
