"""Figures that a person typed into README and docs are those of the committed results.

A row of the table has a page, a pattern whose groups are the figures, and for each group what it
must be. A page that changes, or a result that changes, fails here until both agree.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from adjointbackmap import models

ROOT = Path(__file__).parent.parent


@cache
def results(name):
    """The committed results of a command."""
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


# speed.json


def measured(entry, way):
    """What the benchmark measured of one way to compute."""
    return results("speed")["entries"][entry]["ways"][way]


def seconds(entry, way):
    """Median time of a way to compute an entry of the benchmark."""
    return measured(entry, way)["seconds"]


def ratio(layer, peer, ours="windowed"):
    """Time of a peer, divided by ours."""
    return seconds(layer, peer) / seconds(layer, ours)


def jacrev_of_all(network):
    """Time of jacrev, summed over the layers with a kernel."""
    entries = results("speed")["entries"]
    layers = [e for e in entries if re.fullmatch(rf"{network}/(conv\d+|fc)", e)]
    return sum(seconds(layer, "jacrev") for layer in layers)


def all_layers(network):
    """How many times as long jacrev takes for every layer of an image."""
    return jacrev_of_all(network) / seconds(f"{network}/layers", "all layers")


def verified(network):
    """How many times as long jacrev takes as ``abm.verify``."""
    return jacrev_of_all(network) / seconds(f"{network}/verify", "abm.verify")


def classes(network, peer):
    """Time of a peer for ten classes of a batch, divided by ours."""
    return ratio(f"{network}/classes", peer, "adjoint")


def rate(network, kind):
    """Rate of the sweep in percent of the best plain convolution."""
    entries = results("speed")["entries"]
    best = max(way["gflops"] for way in entries["machine/rate"]["ways"].values())
    return 100 * entries[f"{network}/sweep"]["gflops"][kind] / best


# verification.json and exactness.json


def verification(arithmetic):
    """The checks of every layer of every network in an arithmetic."""
    return [
        layer["check"]
        for network in results("verification")["networks"].values()
        for part in network["runs"][arithmetic].values()
        for layer in part["layers"].values()
    ]


def reproduced(arithmetic):
    """How many units there are, if all are within 1 %."""
    checks = verification(arithmetic)
    units = sum(check["units"] for check in checks)
    assert units == sum(check["within"] for check in checks)
    return units


def exactness(key):
    """One key of every layer of the shipped networks."""
    networks = results("exactness")["networks"].values()
    return [layer[key] for network in networks for layer in network["layers"].values()]


# others.json


def others(key):
    """How many networks of others have a key in their results."""
    return sum(key in network for network in results("others")["networks"].values())


WORDS = {6: "six", 10: "ten", 16: "sixteen"}

FIGURES = [
    (
        "README.md",
        r"All ([\d.]+) million units of all layers of the eight networks, on two images, are",
        lambda: [f"{sum(exactness('units')) / 1e6:.1f}"],
    ),
    (
        "README.md",
        r"The largest error is (\S+) of the scale of rounding",
        lambda: [f"{max(exactness('every unit')):.1e}"],
    ),
    (
        "README.md",
        r"All (\d+) million units that were verified in float64 .* largest error of (\S+)\. ",
        lambda: [
            f"{reproduced('float64') / 1e6:.0f}",
            f"{max(check['scaled'] for check in verification('float64')):.1e}",
        ],
    ),
    (
        "README.md",
        r"([\d.]+) billion units were compared with their hyperplanes in float32",
        lambda: [f"{sum(check['units'] for check in verification('float32')) / 1e9:.1f}"],
    ),
    (
        "README.md",
        r"All ([\d,]+) hyperplanes of VGG7's conv1 take ([\d.]+) s on (\w+) cores",
        lambda: [
            f"{results('speed')['entries']['vgg7/conv1']['units']:,}",
            f"{seconds('vgg7/conv1', 'windowed'):.3f}",
            {2: "two"}[results("speed")["environment"]["cores"]],
        ],
    ),
    (
        "README.md",
        r"`torch.func.jacfwd` takes (\d+) times as long, and `jacrev` (\d+) times",
        lambda: [f"{ratio('vgg7/conv1', peer):.0f}" for peer in ("jacfwd", "jacrev")],
    ),
    (
        "README.md",
        r"The ([\d,]+) units of one image are verified in ([\d.]+) s",
        lambda: [
            f"{results('speed')['entries']['vgg7/layers']['units']:,}",
            f"{seconds('vgg7/verify', 'abm.verify'):.2f}",
        ],
    ),
    (
        "docs/speed.md",
        r"\| VGG7 conv1 \| 400 x jacrev \| (\d+) x \| (\d+) x `is_grads_batched`, (\d+) x jacfwd",
        lambda: [f"{ratio('vgg7/conv1', p):.0f}" for p in ("jacrev", "is_grads_batched", "jacfwd")],
    ),
    (
        "docs/speed.md",
        r"\| VGG7 conv3 \| 100 x jacrev \| (\d+) x \| (\d+) x `is_grads_batched`, (\S+) x jacfwd",
        lambda: [
            f"{ratio('vgg7/conv3', 'jacrev'):.0f}",
            f"{ratio('vgg7/conv3', 'is_grads_batched'):.0f}",
            f"{ratio('vgg7/conv3', 'jacfwd'):.1f}",
        ],
    ),
    (
        "docs/speed.md",
        r"\| VGG7 conv5 \| 15 x jacrev \| (\S+) x \| (\d+) x `is_grads_batched`, (\S+) x jacfwd",
        lambda: [
            f"{ratio('vgg7/conv5', 'jacrev'):.1f}",
            f"{ratio('vgg7/conv5', 'is_grads_batched'):.0f}",
            f"{ratio('vgg7/conv5', 'jacfwd'):.1f}",
        ],
    ),
    (
        "docs/speed.md",
        r"a VGG7 image \| 100 x jacrev \| (\d+) x, (\S+) s \| (\d+) x with `abm.verify`",
        lambda: [
            f"{all_layers('vgg7'):.0f}",
            f"{seconds('vgg7/layers', 'all layers'):.2f}",
            f"{verified('vgg7'):.0f}",
        ],
    ),
    (
        "docs/speed.md",
        r"a ResNet20 image \| 120 x jacrev \| (\d+) x, (\S+) s \| (\d+) x with `abm.verify`",
        lambda: [
            f"{all_layers('resnet20'):.0f}",
            f"{seconds('resnet20/layers', 'all layers'):.1f}",
            f"{verified('resnet20'):.0f}",
        ],
    ),
    (
        "docs/speed.md",
        (
            r"`InputXGradient` \| (\S+) x \(VGG7\), (\S+) x \(ResNet20\) \| FullGrad takes "
            r"(\S+) and (\S+)"
        ),
        lambda: [
            f"{classes(network, peer):.2f}"
            for peer in ("Captum InputXGradient", "FullGrad")
            for network in ("vgg7", "resnet20")
        ],
    ),
    (
        "docs/speed.md",
        r"plain convolution's \| (\d+) % \(ResNet20\) \| (\d+) % of all its products",
        lambda: [f"{rate('resnet20', kind):.0f}" for kind in ("touching", "products")],
    ),
    (
        "docs/speed.md",
        r"\*conv1\* takes (\d+) ms\.",
        lambda: [f"{1000 * seconds('vgg7/conv1', 'windowed'):.0f}"],
    ),
    (
        "docs/speed.md",
        r"layer2\.1\.conv2 jacrev took (\S+) s and ours (\S+) s\. ",
        lambda: [
            f"{seconds('resnet18/layer2.1.conv2', 'jacrev'):.3g}",
            f"{seconds('resnet18/layer2.1.conv2', 'adjoint'):.3g}",
        ],
    ),
    (
        "docs/speed.md",
        r"VGG7's sweep does (\S+) G multiply-adds\.",
        lambda: [
            f"{measured('vgg7/sweep', 'sweep')['multiply_adds'] / 1e9:.1f}",
        ],
    ),
    (
        "docs/networks-of-others.md",
        r"This page is about (\w+) trained networks",
        lambda: [WORDS[len(results("others")["networks"])]],
    ),
    (
        "docs/networks-of-others.md",
        r"(\w+) networks classify CIFAR-10 images; .* (\w+) networks are files in ONNX",
        lambda: [WORDS[others("right")].capitalize(), WORDS[others("conversion")].capitalize()],
    ),
    (
        "docs/zoo.md",
        r"with torch (\S+) for the CPU, torchvision (\S+) and timm (\S+)\. ",
        lambda: [
            results("zoo")["environment"][library].partition("+")[0]
            for library in ("torch", "torchvision", "timm")
        ],
    ),
    (
        "docs/larger-than-memory.md",
        r"on one CIFAR image is a million hyperplanes, (\S+) GB on whole images",
        lambda: [f"{32**4 * 4 * (3 * 32 * 32 + 384) / 1e9:.1f}"],  # units x bytes x [x; b]
    ),
]


def text_of(page):
    """A page in one line, so that a sentence may be broken anywhere."""
    return " ".join((ROOT / page).read_text().split())


NAMES = [
    f"{page}, {' '.join(re.findall(r'[A-Za-z]{3,}', pattern)[:6])}" for page, pattern, _ in FIGURES
]


@pytest.mark.parametrize(("page", "pattern", "expected"), FIGURES, ids=NAMES)
def test_figure_is_that_of_the_results(page, pattern, expected):
    """The sentence is on the page once, and its figures are those of the results, rounded."""
    found = list(re.finditer(pattern, text_of(page)))
    assert len(found) == 1, "the sentence is not on the page, or more than once: change the pattern"
    assert list(found[0].groups()) == expected()


PUBLISHED = {  # test accuracies in percent: Tables 2.1, 3.1 and 3.2 of the dissertation
    "vgg7-nobias-cifar10": 85.6,
    "fixup-resnet20-nobias-cifar10": 90.3,
    "vgg7-cifar10": 89.5,
    "vgg7-cifar100": 63.2,
    "resnet20-cifar10": 91.6,
    "resnet20-cifar100": 68.8,
    "fixup-resnet20-cifar10": 91.2,
    "fixup-resnet20-cifar100": 64.0,
}


@pytest.mark.parametrize("name", models.names())
def test_accuracies_are_those_of_the_cards(name):
    """README has ours and the published one; docs/networks.md has the published one."""
    ours = 100 * models.card(name)["test accuracy"]
    published = f"{PUBLISHED[name]} %"
    assert f"| `{name}` | {ours:.2f} % | {published} |" in text_of("README.md")
    (network, data) = name.rsplit("-", 1)
    row = rf"\| `{network}` \| {data.upper().replace('CIFAR', 'CIFAR-')} \| [^|]* \| {published} \|"
    assert re.search(row, text_of("docs/networks.md"))
    assert ours > PUBLISHED[name]
