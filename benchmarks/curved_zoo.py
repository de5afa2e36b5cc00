"""Claim: with frozen gates, curved networks of timm and transformers are reproduced to rounding.

usage: python benchmarks/curved_zoo.py [--only swin] [--out docs/results/curved-zoo.json]
                                       [--docs docs/zoo.md] [--member NAME]

Each network has its own size of images or tokens, random weights, and float64. Ten units of the
output (RM0) and one unit of every layer are compared with the untouched module. Each network runs
in a process of its own, so that its memory is known, and finished networks are kept in the file: a
stopped run continues. timm and transformers need an environment of their own, which docs/zoo.md
describes.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from exactness import environment
from torch import Tensor, nn
from zoo import drawn, output_units

import adjointbackmap as abm
from adjointbackmap.engine.observe import record
from adjointbackmap.files.disk import write
from adjointbackmap.onnx import mend_torchvision
from adjointbackmap.planes.hyperplane import relative_error
from adjointbackmap.report.sheets import PagePlace

LIMIT = 1e-10  # largest scale-aware error
CANCELS = 1e6  # a unit whose terms are this many times larger than its value says little
PLACE = PagePlace(
    "<!-- curved zoo: written by benchmarks/curved_zoo.py -->", "<!-- curved zoo: end -->"
)
TIMM = {  # name -> rows and columns of its image
    "convnext_atto": 224,
    "convnextv2_atto": 224,
    "efficientnet_b0": 224,
    "tf_efficientnetv2_b0": 192,
    "mobilenetv3_small_050": 224,
    "mobilevit_xxs": 256,
    "regnety_002": 224,
    "resnest14d": 224,
    "vit_tiny_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "beit_base_patch16_224": 224,
    "mixer_s32_224": 224,
    "resmlp_12_224": 224,
    "poolformer_s12": 224,
    "coatnet_nano_rw_224": 224,
    "maxvit_pico_rw_256": 256,
    "efficientformer_l1": 224,
    "levit_128s": 224,
    "ghostnet_050": 224,
    "eca_nfnet_l0": 224,
    "xcit_nano_12_p16_224": 224,
    "pvt_v2_b0": 224,
    "edgenext_xx_small": 256,
    "gmlp_s16_224": 224,
    "fastvit_t8": 256,
}
TOKENS = 12
WIDTH = 64  # features of a token
SMALL = {"vocab_size": 100, "hidden_size": WIDTH, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 128}


class OfEmbeddings(nn.Module):
    """A language model that takes embeddings ``(N, T, D)`` and gives a vector for each text.

    Args:
        model: The model of transformers.
        read: Gives the vector from what the model returns.
    """

    def __init__(self, model: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        """The vector of each text."""
        return self.read(self.model(inputs_embeds=x))


class OfPixels(nn.Module):
    """A vision tower that takes images and gives one tensor."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """The chosen output."""
        return getattr(self.model(pixel_values=x), self.name)


def logits(output: Any) -> Tensor:
    """The logits of a classifier."""
    return output.logits


def next_token(output: Any) -> Tensor:
    """The logits of the token after the last one."""
    return output.logits[:, -1]


def mean_state(output: Any) -> Tensor:
    """The mean of the last states of all tokens."""
    return output.last_hidden_state.mean(1)


def language_model(kind: str, read: Callable[[Any], Tensor], **config: Any) -> nn.Module:
    """A language model of transformers from a small configuration, on embeddings."""
    return OfEmbeddings(transformer(kind, **config), read)


def transformer(kind: str, **config: Any) -> nn.Module:
    """A model of transformers with random weights."""
    library = importlib.import_module("transformers")
    model = getattr(library, kind)
    return model(model.config_class(**config))


VISION = {"image_size": 64, "patch_size": 16}
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bert": (
        lambda: language_model("BertForSequenceClassification", logits, **SMALL, **HEADS),
        (TOKENS, WIDTH),
    ),
    "distilbert": (
        lambda: language_model(
            "DistilBertForSequenceClassification",
            logits,
            vocab_size=100,
            dim=WIDTH,
            n_layers=2,
            n_heads=4,
            hidden_dim=128,
        ),
        (TOKENS, WIDTH),
    ),
    "gpt2": (
        lambda: language_model(
            "GPT2LMHeadModel", next_token, vocab_size=100, n_embd=WIDTH, n_layer=2, n_head=4
        ),
        (TOKENS, WIDTH),
    ),
    "llama": (
        lambda: language_model(
            "LlamaForCausalLM", next_token, **SMALL, **HEADS, num_key_value_heads=2
        ),
        (TOKENS, WIDTH),
    ),
    "t5-encoder": (
        lambda: language_model(
            "T5EncoderModel",
            mean_state,
            vocab_size=100,
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
        ),
        (TOKENS, WIDTH),
    ),
    "vit": (
        lambda: OfPixels(
            transformer(
                "ViTForImageClassification",
                hidden_size=WIDTH,
                num_hidden_layers=2,
                **HEADS,
                **VISION,
            ),
            "logits",
        ),
        (3, 64, 64),
    ),
    "clip-vision": (
        lambda: OfPixels(
            transformer(
                "CLIPVisionModelWithProjection",
                hidden_size=WIDTH,
                num_hidden_layers=2,
                projection_dim=16,
                **HEADS,
                **VISION,
            ),
            "image_embeds",
        ),
        (3, 64, 64),
    ),
}
NAMES = [f"timm/{name}" for name in TIMM] + [f"transformers/{name}" for name in TRANSFORMERS]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, and a random input ``(1, ...)`` of its own size in float64.

    Networks of timm are in float64. Those of transformers stay in float32, to which some of them
    cast, and are computed in float64.
    """
    mend_torchvision()
    library, _, own = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        model = importlib.import_module("timm").create_model(own, pretrained=False)
        shape: tuple[int, ...] = (3, TIMM[own], TIMM[own])
    else:
        make, shape = TRANSFORMERS[own]
        model = make()
    model = model.eval()
    if library == "timm":
        model = model.double()
    for module in model.modules():
        randomise(module)
    is_image = len(shape) == 3
    sampled = torch.rand if is_image else torch.randn
    return model, sampled(1, *shape, dtype=torch.float64)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Draw the parameters of a module and the statistics of a batch norm.

    No part is trivial: many of these networks begin with scales of zero or 1e-6.
    """
    has_kernel = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    for name, values in module.named_parameters(recurse=False):
        if values.dim() > 1 and (has_kernel or name == "weight"):
            nn.init.kaiming_normal_(values, nonlinearity="linear")
        elif name in ("weight", "gain", "gamma"):
            values.uniform_(0.5, 1.5)
        else:
            values.normal_(0, 0.1)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.running_mean.normal_(0, 0.3)
        module.running_var.uniform_(0.5, 2)


@dataclass(frozen=True)
class Unit:
    """What one unit's hyperplane gives.

    Attributes:
        scaled: Error divided by the sum of absolute terms.
        relative: Error divided by the value.
        terms: Sum of absolute terms, divided by the absolute value.
    """

    scaled: float
    relative: float
    terms: float


def unit_of(value: Tensor, terms: list[Tensor]) -> Unit:
    """A unit from its value and its terms, ``x * h`` and ``b * h``."""
    products = torch.cat([t.flatten() for t in terms])
    total = products.sum()
    scale = products.abs().sum().clamp_min(torch.finfo(value.dtype).tiny)
    return Unit(
        float((total - value).abs() / scale),
        float(relative_error(total, value).abs()),
        float(scale / value.abs().clamp_min(torch.finfo(value.dtype).tiny)),
    )


def check(name: str) -> dict:
    """Errors of ten units of the output and of one unit of every layer, with time and memory.

    A network that is refused has the message instead.
    """
    model, x = build(name)
    started = time.process_time()
    try:
        # the checks below are sharper than the audit of the trace
        own = x.to(next(model.parameters()).dtype)
        network = abm.trace(model, own, curved="frozen", audit=False)
    except (ValueError, abm.UnsupportedOperation) as error:
        return {"input": list(x.shape[1:]), "refused": str(error)}
    traced = time.process_time()
    units = {**output_of(network, x), **layers_of(network, x)}
    seconds = time.process_time() - started
    worst = max(units, key=lambda n: units[n].scaled)
    return {
        "input": list(x.shape[1:]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curved": len(network.curved),
        "layers": len(network.distinct_layers()),
        "units": len(units),
        "biases": len(network.biases_in(x.dtype)),
        "error": units[worst].scaled,
        "worst": worst,
        "relative": max(unit.relative for unit in units.values()),
        "cancelling": sum(unit.terms > CANCELS for unit in units.values()),
        "terms": median(unit.terms for unit in units.values()),
        "trace_seconds": round(traced - started, 1),
        "seconds": round(seconds, 1),
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def output_of(network: abm.Network, x: Tensor) -> dict[str, Unit]:
    """Ten random units of the output in RM0."""
    planes = abm.hyperplanes(
        network, x, "output", "RM0", units=(output_units(network),), dtype=x.dtype
    )
    image, bias = planes.image[0], planes.bias[0]
    b = network.biases_in(x.dtype).vector
    return {
        f"output {i}": unit_of(planes.value[0, i], [x[0] * image[i], b * bias[i]])
        for i in range(len(image))
    }


@torch.no_grad()
def layers_of(network: abm.Network, x: Tensor) -> dict[str, Unit]:
    """One random unit of every layer; all share one activation pattern."""
    layers = network.distinct_layers()
    values = record(network, x, layers).outputs
    pattern = abm.record_pattern(network, x, dtype=x.dtype)
    b = network.biases_in(x.dtype).vector
    generator = torch.Generator().manual_seed(0)
    units = {}
    for layer in layers:
        value = values.pop(layer.name).flatten()
        unit = drawn(value, generator)
        cotangent = torch.zeros_like(value)
        cotangent[unit] = 1
        image, bias = abm.LayerOperator(pattern, layer).adjoint(cotangent.view(1, *layer.out_shape))
        units[layer.name] = unit_of(value[unit], [x * image, b * bias])
    return units


def counts(f: dict) -> bool:
    """Whether a network has passed: small errors, and terms that mostly do not cancel."""
    return f["error"] <= LIMIT and 2 * f["cancelling"] < f["units"]


def size_of(f: dict) -> str:
    """The input of a network for people."""
    shape = f["input"]
    return f"{shape[1]} x {shape[2]}" if len(shape) == 3 else f"{shape[0]} tokens"


def first_cause(message: str) -> str:
    """The first cause of a refusal, and how many there are.

    Example:
        >>> first_cause("Every ... Got div at a (it is none), mul at b (nor this): replace them")
        'div at a (it is none), and 1 more'
    """
    causes = message.partition("Got ")[2].rpartition(": ")[0].split("), ")
    first = f"{causes[0].removesuffix(')')})"
    return first if len(causes) == 1 else f"{first}, and {len(causes) - 1} more"


def markdown(found: dict) -> str:
    """The tables of what was checked and what is refused."""
    checked = {name: f for name, f in found["networks"].items() if "refused" not in f}
    refused = {name: f for name, f in found["networks"].items() if "refused" in f}
    passed = sum(map(counts, checked.values()))
    lines = [f"{passed} of {len(found['networks'])} networks pass.", ""]
    lines.append(
        "| network | input | million parameters | curved calls | units | length of b "
        "| worst scale-aware error | worst relative error | units with terms above 1e6 "
        "| seconds | MB |"
    )
    lines.append("|---" * 11 + "|")
    for name, f in checked.items():
        sizes = f"{f['parameters'] / 1e6:.1f} | {f['curved']} | {f['units']} | {f['biases']:,}"
        errors = f"{f['error']:.1e} | {f['relative']:.1e} | {f['cancelling']}"
        costs = f"{f['seconds']:.0f} | {f['megabytes']:,}"
        lines.append(f"| `{name}` | {size_of(f)} | {sizes} | {errors} | {costs} |")
    if refused:
        lines += ["", "| refused network | cause |", "|---|---|"]
        lines += [f"| `{name}` | {first_cause(f['refused'])} |" for name, f in refused.items()]
    return "\n".join(lines)


def kept_with(found: dict, name: str, result: dict) -> dict:
    """The results with one more, in the order of the zoo, and where it was measured."""
    networks = {**found["networks"], name: result}
    libraries = {library: version(library) for library in ("timm", "transformers")}
    return {
        "environment": {**environment(), "cores": os.cpu_count(), **libraries},
        "networks": {n: networks[n] for n in NAMES if n in networks},
    }


def in_own_process(name: str) -> dict:
    """The results of one network, computed in a fresh process.

    Raises:
        RuntimeError: If the process fails.
    """
    words = [sys.executable, __file__, "--member", name]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        msg = f"{name} must be computed to its end. Got:\n{ended.stderr[-2000:]}"
        raise RuntimeError(msg)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Check every network that the file lacks, and print the tables.

    Raises:
        SystemExit: If a network does not pass.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the networks to run")
    parser.add_argument("--out", type=Path, default=Path("docs/results/curved-zoo.json"))
    parser.add_argument("--docs", type=Path, help="page to write the tables into: docs/zoo.md")
    parser.add_argument("--member", choices=NAMES, help="print the results of one network only")
    arguments = parser.parse_args()
    if arguments.member:
        print(json.dumps(check(arguments.member)))
        return
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    for name in NAMES:
        if arguments.only in name and name not in found["networks"]:
            result = in_own_process(name)
            print(name, result, flush=True)
            found = kept_with(found, name, result)
            write(arguments.out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    if arguments.docs:
        PLACE.fill(arguments.docs, markdown(found))
    checked = {n: f for n, f in found["networks"].items() if "refused" not in f}
    failed = [name for name, f in checked.items() if not counts(f)]
    if failed:
        msg = (
            f"the worst error must be at most {LIMIT:.0e} of the terms, and most terms at most "
            f"{CANCELS:.0e} times their value. Got more in {', '.join(failed)}"
        )
        raise SystemExit(msg)


if __name__ == "__main__":
    main()
