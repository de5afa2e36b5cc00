"""Compare hyperplanes with common attribution methods.

The comparison is how well each method's map sums to the logit of the predicted class.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adjointbackmap import data, models, plots
from adjointbackmap.engine.network import Network
from adjointbackmap.exactness.journal import Record
from adjointbackmap.exactness.layer_check import SHARE_LIMIT
from adjointbackmap.planes.hyperplane import hyperplanes
from adjointbackmap.plots.groups import Interval
from adjointbackmap.report.sections import Claim, Picture, ReportBlock, Section, Table
from adjointbackmap.report.sheets import Sheet
from adjointbackmap.study.charts import interval_rows
from adjointbackmap.study.pictures.panels import captioned
from adjointbackmap.study.quantiles import Quantiles
from adjointbackmap.study.results import Arrays, Found, keep, kept, save_picture
from adjointbackmap.study.setup import SCALE, Setup, Trained, read_json, write_json

KEY = "attributions"
MOST = 200  # images at most
BATCH = 20  # images that are computed and recorded together
STEPS = 50  # steps of integrated gradients, starting at an input of zeros
SAMPLES = 200  # points of integrated gradients per forward pass

# Methods, and rows of the table.
SALIENCY = "saliency"
INPUT_X_GRADIENT = "input x gradient"
INTEGRATED = "integrated gradients"
FULLGRAD = "FullGrad"
OF_MODULES = "FullGrad, biases of modules"
IMAGE_PART = "hyperplane, image part"
IMAGE_AND_BIAS_PARTS = "hyperplane, image and bias parts"
COMPLETED = f"{INPUT_X_GRADIENT}, and the hyperplane's bias part"
DIFFERENCE = f"{INTEGRATED}, beside f(x) - f(0)"
ROWS = (
    SALIENCY,
    INPUT_X_GRADIENT,
    COMPLETED,
    INTEGRATED,
    DIFFERENCE,
    FULLGRAD,
    OF_MODULES,
    IMAGE_PART,
    IMAGE_AND_BIAS_PARTS,
)
IN_CHART = (INPUT_X_GRADIENT, INTEGRATED, FULLGRAD, IMAGE_AND_BIAS_PARTS)
LEAST = 1e-8  # relative error that is drawn where it is smaller, on a logarithmic axis
MAPS = (SALIENCY, INPUT_X_GRADIENT, INTEGRATED)


def compute_attributions(setup: Setup, report: Callable[[str, float], None]) -> None:
    """Compare the methods on every network of a run.

    Images that are finished for the same weights are not computed again.

    Args:
        setup: Networks, images and folder.
        report: Called with what is computed and the share that is done.
    """
    for name in setup.networks:
        trained = setup.trained(name)
        untouched = models.load(name)
        images = setup.many(name, min(MOST, 2 * setup.images))
        path = setup.folder / KEY / f"{name}.json"
        settings = {**trained.about, "steps": STEPS, "scale": SCALE}
        weights = trained.about["weights sha256"][:8]
        record = Record(path.with_name(f"{name}-{weights}.jsonl"), settings)
        missing = [n for n, hashed in enumerate(images.hashes) if hashed not in record.names]
        for start in range(0, len(missing), BATCH):
            report(f"{name}: attributions", 1 - (len(missing) - start) / len(images))
            part = images[missing[start : start + BATCH]]
            for hashed, found in zip(part.hashes, sums(trained, untouched, part), strict=True):
                record.append(hashed, found)
        one = setup.one(name)
        finished = dict(record.results())
        settings |= {
            "image": one.hashes[0],
            "class": one.classes[int(one.labels)],
            "biases": len(trained.network.biases),
        }
        keep(path, settings, partial(maps, trained, untouched, one))
        numbers = {hashed: finished[hashed] for hashed in images.hashes}
        write_json(path, read_json(path) | {"images": numbers})
    report("attributions", 1.0)


def sums(trained: Trained, untouched: nn.Module, images: data.Images) -> list[Found]:
    """The sum of each method's map and the logit of the predicted class, for each image.

    Args:
        trained: The network. Hyperplanes and FullGrad use its folded version, in which all biases
            are parameters.
        untouched: The same network as it was trained. Its logits are the reference, and Captum's
            methods use it.
        images: Images.
    """
    x = trained.input(images.unit_interval())
    with torch.no_grad():
        scores = untouched(x)
        zero = untouched(torch.zeros_like(x[:1]))[0]
    classes = scores.argmax(1)
    made = captum_maps(untouched, x, classes)
    found = {method: part.flatten(1).sum(1) for method, part in made.items()}
    slopes, biases = full_gradients(trained.network, x, classes)
    pixels = (x * slopes).flatten(1).sum(1)
    none = x.new_zeros(len(x))  # the sum of no biases
    owned = (part for name, part in biases.items() if is_of_module(trained.network.model, name))
    found[FULLGRAD] = pixels + sum(biases.values(), none)
    found[OF_MODULES] = pixels + sum(owned, none)
    units = classes[:, None, None]  # one unit (class,) for each image
    planes = hyperplanes(trained.network, x, "fc", "RM0", units, scale=SCALE)
    parts = planes.contributions()
    found[IMAGE_PART] = parts.image.flatten(1).sum(1)
    found[IMAGE_AND_BIAS_PARTS] = parts.total()[:, 0]
    return [
        {
            "logit": float(scores[n, c]),
            "at zero": float(zero[c]),
            "sums": {method: float(total[n]) for method, total in found.items()},
        }
        for n, c in enumerate(classes.tolist())
    ]


def captum_maps(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    classes: Int64[Tensor, " n"],
) -> dict[str, Float[Tensor, "n c h w"]]:
    """Captum's attribution maps for one class of each image.

    The methods are saliency (magnitudes), input x gradient, and integrated gradients from zeros.

    Args:
        model: A module in eval mode with output ``(N, classes)``.
        x: Images in the units of the module's input.
        classes: One class for each image.
    """
    from captum.attr import InputXGradient, IntegratedGradients, Saliency

    inputs = x.detach().clone().requires_grad_()
    path: dict[str, Any] = {"baselines": 0, "n_steps": STEPS, "internal_batch_size": SAMPLES}
    found = {
        SALIENCY: Saliency(model).attribute(inputs, target=classes),
        INPUT_X_GRADIENT: InputXGradient(model).attribute(inputs, target=classes),
        INTEGRATED: IntegratedGradients(model).attribute(inputs, target=classes, **path),
    }
    return {method: part.detach().to(x) for method, part in found.items()}


def full_gradients(
    network: Network,
    x: Float[Tensor, "n c h w"],
    classes: Int64[Tensor, " n"],
) -> tuple[Float[Tensor, "n c h w"], dict[str, Float[Tensor, " n"]]]:
    r"""FullGrad by autograd [Srinivas2019].

    It is :math:`f = \langle x | \nabla_x f \rangle + \sum_b b\, \partial f / \partial b`.

    Args:
        network: Traced network. It is used only to find the parameters that are biases.
        x: Images.
        classes: One class for each image.

    Returns:
        The gradient with respect to the image. Then, for each bias parameter, its contribution to
        the output of the class.
    """
    named = dict(network.model.named_parameters())
    biases = {
        b.parameter: named[b.parameter].detach() for b in network.biases.values() if b.parameter
    }

    def score(image: Tensor, parameters: dict[str, Tensor], chosen: Tensor) -> Tensor:
        return (functional_call(network.model, parameters, (image[None],))[0] * chosen).sum()

    chosen = nn.functional.one_hot(classes, network.layers["output"].out_shape[0]).to(x)
    slopes, changes = vmap(grad(score, (0, 1)), (0, None, 0))(x, biases, chosen)
    added = {
        name: (value * changes[name].detach()).reshape(len(x), -1).sum(1)
        for name, value in biases.items()
    }
    return slopes.detach(), added


def is_of_module(model: nn.Module, parameter: str) -> bool:
    """Whether the code of FullGrad's authors includes a bias.

    It includes the biases of convolutions, linear layers and batch norms, but no bare parameters.
    """
    owner, _, name = parameter.rpartition(".")
    module = model.get_submodule(owner)
    return name == "bias" and isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)


def maps(trained: Trained, untouched: nn.Module, image: data.Images) -> tuple[Found, Arrays]:
    """The logit of one image, and the arrays for its pictures.

    The arrays are the maps, the hyperplane, and the contribution of each layer's biases.

    Args:
        trained: The network.
        untouched: The same network as it was trained.
        image: The one image.
    """
    pixels = image.unit_interval()
    x = trained.input(pixels)
    with torch.no_grad():
        scores = untouched(x)
    classes = scores.argmax(1)
    found = captum_maps(untouched, x, classes)
    planes = hyperplanes(trained.network, x, "fc", "RM0", classes[:, None, None], scale=SCALE)
    parts = planes.contributions()
    biases = full_gradients(trained.network, x, classes)[1]
    bias = {name: float(part.sum()) for name, part in parts.bias.items()}
    theirs = [float(biases[b.parameter]) for b in trained.network.biases.values() if b.parameter]
    return {"logit": float(scores.max())}, {
        "pixels": pixels[0].numpy(),
        **{method: part[0].numpy() for method, part in found.items()},
        "hyperplane": planes.image[0, 0].numpy(),
        IMAGE_PART: parts.image[0, 0].numpy(),
        "biases": np.array(list(bias), str),
        "bias": np.array(list(bias.values())),
        FULLGRAD: np.array(theirs),
    }


def attributions_section(folder: Path) -> Section | None:
    """Build the report section from the result files, and draw its pictures into the folder.

    Args:
        folder: Folder of the results.

    Returns:
        The section, or ``None`` if there are no results.
    """
    # The key "images" is written last: without it the run was stopped.
    results = [result for result in kept(folder / KEY) if "images" in result[1]]
    if not results:
        return None
    networks = {name: found for name, found, _ in results}
    counts = ", ".join(f"{len(found['images'])} for {name}" for name, found in networks.items())
    ran = (
        "Test images that each network classifies correctly, drawn with the seed of the run: "
        f"{counts}. The logit is that of the predicted class, from the network as it was trained, "
        "in float32.",
        "Saliency (magnitudes), input x gradient and integrated gradients are Captum's, on the "
        "network as it was trained, in its own input; integrated gradients start from an input "
        f"of zeros and take {STEPS} steps by Gauss-Legendre. FullGrad [Srinivas2019] is input x "
        "gradient and bias x gradient of the folded network by autograd, once with all its "
        "biases and once with those of modules alone, which is what its authors' code finds: "
        "Fixup's scalars are no modules. Hyperplanes are those of the folded network at the "
        f"pattern of {SCALE:g} [x; b].",
    )
    errors = {name: relative_errors(found["images"].values()) for name, found in networks.items()}
    blocks: list[ReportBlock] = [
        *attribution_claims(networks, errors),
        *(error_table(name, found) for name, found in errors.items()),
    ]
    blocks.append(_error_chart(folder, errors))
    for result in results:
        blocks += _pictures(folder, *result)
    return Section(KEY, "Hyperplanes and common attribution methods", ran, tuple(blocks))


def relative_errors(images: Iterable[Found]) -> dict[str, np.ndarray]:
    """``|sum - logit| / |logit|`` of every image for each method, in the order of the table.

    Two rows are added. One is input x gradient plus the bias part of the hyperplane. The other
    compares integrated gradients with f(x) - f(0).

    Args:
        images: Result of :func:`sums` for each image.
    """
    every = list(images)
    logits, zeros = (np.array([found[key] for found in every]) for key in ("logit", "at zero"))
    totals = {
        method: np.array([found["sums"][method] for found in every]) for method in every[0]["sums"]
    }
    totals[COMPLETED] = totals[INPUT_X_GRADIENT] + totals[IMAGE_AND_BIAS_PARTS] - totals[IMAGE_PART]
    errors = {method: np.abs(total - logits) / np.abs(logits) for method, total in totals.items()}
    errors[DIFFERENCE] = np.abs(totals[INTEGRATED] - (logits - zeros)) / np.abs(logits - zeros)
    return {method: errors[method] for method in ROWS}


def error_table(name: str, errors: dict[str, np.ndarray]) -> Table:
    """Table with a row for each method.

    The columns are the quantiles of the relative errors, and the share of images within 1 %.

    Args:
        name: The network.
        errors: Its errors for each method.
    """
    head = ["method", "relative error %", "within 1 %, %"]
    sheet = Sheet(f"{name}: how far each method is from the logit", head)
    for method, found in errors.items():
        sheet.rows.append([method, str(Quantiles.of(found, 100.0)), f"{_within(found):.1f}"])
    caption = (
        "Relative error: |sum of the map - logit| / |logit|, median and 5 to 95 % of the images. "
        "The sum of saliency's magnitudes has no meaning, and claims none. Integrated gradients "
        "claim f(x) - f(0), the row below them."
    )
    return Table(sheet, caption)


def attribution_claims(
    networks: dict[str, Found], errors: dict[str, dict[str, np.ndarray]]
) -> Iterator[Claim]:
    """Which methods reproduce the logit, for networks with biases and for those without.

    Args:
        networks: Results for each network.
        errors: Errors for each network and method.
    """
    everyone = list(networks)
    biased = [name for name, found in networks.items() if found["settings"]["biases"]]
    plain = [name for name in networks if name not in biased]
    for statement in STATEMENTS:
        names = {"all": everyone, "biased": biased, "plain": plain}[statement.networks]
        if names:
            yield claim_of(statement, errors, names)


@dataclass(frozen=True)
class Statement:
    """A claim about one method.

    Attributes:
        text: The claim.
        method: The row of the table that tests it.
        complete: Whether the claim is that the method reproduces the logits.
        networks: ``"all"``, ``"biased"`` for those with biases, or ``"plain"`` for those without.
    """

    text: str
    method: str
    complete: bool = True
    networks: str = "all"


STATEMENTS = (
    Statement("The hyperplane's image part and bias part sum to the logit.", IMAGE_AND_BIAS_PARTS),
    Statement("FullGrad with all biases of the folded network sums to it, too.", FULLGRAD),
    Statement(
        "Input x gradient alone does not where there are biases.", INPUT_X_GRADIENT, False, "biased"
    ),
    Statement(
        "What it misses is the bias part: with that of the hyperplane it does.",
        COMPLETED,
        networks="biased",
    ),
    Statement(
        "Nor do integrated gradients from zeros, as f(0) is missing.",
        INTEGRATED,
        False,
        "biased",
    ),
    Statement(
        "Without biases input x gradient is the image part, and all of the logit.",
        INPUT_X_GRADIENT,
        networks="plain",
    ),
    Statement(
        "Integrated gradients reproduce f(x) - f(0), which is what they claim, "
        f"with {STEPS} steps.",
        DIFFERENCE,
    ),
)


def claim_of(
    statement: Statement, errors: dict[str, dict[str, np.ndarray]], names: list[str]
) -> Claim:
    """A claim about some networks.

    If ``complete``, it holds if the method reproduces all logits. Otherwise it holds if the method
    reproduces fewer than half of them.
    """
    words = []
    holds = True
    for name in names:
        found = errors[name][statement.method]
        share = _within(found)
        words.append(f"{name} {share:.1f} %, median {np.median(found):.2g}")
        holds = holds and (share == 100 if statement.complete else share < 50)
    measured = f"Images within 1 %, and the median relative error: {'; '.join(words)}"
    return Claim(statement.text, measured, holds)


def _within(errors: np.ndarray) -> float:
    """Percentage of the images with a relative error of at most 1 %."""
    return 100 * float((errors <= SHARE_LIMIT).mean())


def _error_chart(folder: Path, errors: dict[str, dict[str, np.ndarray]]) -> Picture:
    """How far the sum of each method's map is from the logit, for each network."""
    values: dict[str, dict[str, Interval]] = {method: {} for method in IN_CHART}
    for name, of_network in errors.items():
        for method in IN_CHART:
            found = Quantiles.of(np.maximum(of_network[method], LEAST), 100.0)
            values[method][name] = (found.median, found.low, found.high)
    title = "How far the sum of a method's map is from the logit"
    quantity = "relative error in %"
    interval = f"where nine in ten images lie, the least drawn at {100 * LEAST:g} %"
    drawing = interval_rows(values, title, quantity, interval, mark=100 * SHARE_LIMIT, log=True)
    return _saved(folder, "errors", drawing)


def _pictures(folder: Path, name: str, found: Found, arrays: Arrays) -> Iterator[Picture]:
    """The maps of one image, and the contribution of each layer's biases if there are biases."""
    of = f"{name}, {found['settings']['class']} {found['settings']['image'][:8]}"
    shown = {key: torch.from_numpy(arrays[key]) for key in (*MAPS, "hyperplane", IMAGE_PART)}
    sums = {key: float(part.double().sum()) for key, part in shown.items() if key != "hyperplane"}
    below = {key: f"sum {total:.4g}" for key, total in sums.items()}
    shown["image part x input"] = shown.pop(IMAGE_PART)
    below["image part x input"] = f"{below.pop(IMAGE_PART)}, biases {arrays['bias'].sum():.4g}"
    heading = f"{of}: maps of the predicted class's logit, {found['logit']:.4g}"
    drawing = plots.attributions(torch.from_numpy(arrays["pixels"]), shown, below, heading)
    yield _saved(folder, f"{name}-maps", drawing)
    if len(arrays["bias"]):
        layers = arrays["biases"].tolist()
        values = {
            "hyperplane, b x H_b": dict(zip(layers, arrays["bias"].tolist(), strict=True)),
            "FullGrad, bias x gradient": dict(zip(layers, arrays[FULLGRAD].tolist(), strict=True)),
        }
        title = f"{of}: what the biases of each layer add"
        drawing = plots.by_layer(values, title, "what is added to the logit", kind="bar")
        yield _saved(folder, f"{name}-biases", drawing)


def _saved(folder: Path, stem: str, drawing: plots.Drawing) -> Picture:
    return save_picture(folder, f"{KEY}/{stem}", drawing, captioned(drawing))
