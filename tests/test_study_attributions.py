"""The comparison with attributions: sums against a slow twin, resuming, the section."""

from functools import cache

import numpy as np
import pytest
import torch

from adjointbackmap import data, models
from adjointbackmap.report.sections import Claim, Picture, Table
from adjointbackmap.study import attributions
from adjointbackmap.study.attributions import (
    COMPLETED,
    DIFFERENCE,
    FULLGRAD,
    IMAGE_AND_BIAS_PARTS,
    IMAGE_PART,
    INPUT_X_GRADIENT,
    INTEGRATED,
    OF_MODULES,
    SALIENCY,
)
from adjointbackmap.study.setup import Setup, read_json

pytest.importorskip("captum")
BIASED = "vgg7-cifar10"
PLAIN = "vgg7-nobias-cifar10"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The comparison on two networks and four images."""
    setup = Setup(tmp_path_factory.mktemp("study"), (BIASED, PLAIN), images=2, sample=True)
    heard = []
    attributions.compute_attributions(setup, lambda what, share: heard.append((what, share)))
    return setup, heard


@cache
def found(folder, name):
    return read_json(folder / "attributions" / f"{name}.json")


@pytest.mark.parametrize("name", [BIASED, PLAIN])
def test_sums_are_those_of_a_slow_twin(run, name):
    """One backward pass for one image; integrated gradients as a sum over the path's points."""
    setup, _ = run
    hashed, kept = next(iter(found(setup.folder, name)["images"].items()))
    sample = data.sample()
    model = models.load(name)
    x = models.preprocessing(name)(
        sample[[sample.hashes.index(hashed)]].unit_interval()
    ).requires_grad_()
    logit = model(x).max()
    (slope,) = torch.autograd.grad(logit, x)
    sums = kept["sums"]
    assert kept["logit"] == pytest.approx(logit.item(), rel=1e-5)
    assert sums[SALIENCY] == pytest.approx(slope.abs().sum().item(), rel=1e-4)
    assert sums[INPUT_X_GRADIENT] == pytest.approx((x * slope).sum().item(), rel=1e-3, abs=1e-3)
    assert sums[IMAGE_PART] == pytest.approx(sums[INPUT_X_GRADIENT], rel=1e-3, abs=1e-3)
    assert sums[IMAGE_AND_BIAS_PARTS] == pytest.approx(kept["logit"], rel=1e-4)
    assert sums[FULLGRAD] == pytest.approx(kept["logit"], rel=1e-4)
    nodes, weights = np.polynomial.legendre.leggauss(attributions.STEPS)
    total = 0.0
    place = int(model(x).argmax())
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        point = (x * float(node)).detach().requires_grad_()
        total += float(weight) * float(
            (x.detach() * torch.autograd.grad(model(point)[0, place], point)[0]).sum()
        )
    assert sums[INTEGRATED] == pytest.approx(total, rel=1e-3, abs=1e-3)


def test_fullgrad_finds_scalars_that_are_no_modules():
    """Of untrained Fixup: all biases give the output, those of modules alone do not."""
    from adjointbackmap import trace

    torch.manual_seed(0)
    model = models.build("fixup-resnet20").eval()
    for name, parameter in model.named_parameters():
        if name.startswith("b"):
            torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(model.fc.weight)
    x = torch.rand(2, 3, 32, 32)
    network = trace(model, x)
    classes = torch.tensor([3, 1])
    slopes, biases = attributions.full_gradients(network, x, classes)
    values = model(x).detach()[torch.arange(2), classes]
    pixels = (x * slopes).flatten(1).sum(1)
    assert torch.allclose(pixels + sum(biases.values()), values, rtol=1e-3)
    assert len(biases) == 37
    assert not any(attributions.is_of_module(model, name) for name in biases)
    assert not torch.allclose(pixels, values, rtol=0.1)


def test_finished_images_are_not_computed_again(run, monkeypatch):
    """Neither sums nor maps; two images more are two more."""
    setup, heard = run
    assert heard[-1] == ("attributions", 1.0)
    assert all(0 <= share <= 1 for _, share in heard)
    seen = []
    right = attributions.sums
    monkeypatch.setattr(
        attributions, "sums", lambda t, u, images: seen.extend(images.hashes) or right(t, u, images)
    )
    monkeypatch.setattr(attributions, "maps", lambda *arguments: pytest.fail("computed again"))
    attributions.compute_attributions(setup, lambda what, share: None)
    assert not seen
    assert len(found(setup.folder, BIASED)["images"]) == 4
    attributions.compute_attributions(
        Setup(setup.folder, (PLAIN,), images=3, sample=True), lambda what, share: None
    )
    assert len(seen) == 2
    assert len(read_json(setup.folder / "attributions" / f"{PLAIN}.json")["images"]) == 6


def test_section_needs_the_files_alone(run, monkeypatch):
    """The section needs no network and no data; without biases there is no picture of them."""
    setup, _ = run
    monkeypatch.setattr(models, "load", lambda name: pytest.fail("loaded"))
    monkeypatch.setattr(data, "sample", lambda: pytest.fail("loaded"))
    section = attributions.attributions_section(setup.folder)
    claims = [block for block in section.blocks if isinstance(block, Claim)]
    assert [
        claim.holds for claim in claims if "part sum" in claim.text or "FullGrad" in claim.text
    ] == [True, True]
    assert all(name in claims[0].measured for name in (BIASED, PLAIN))
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [row[0] for row in tables[0].sheet.rows].count(DIFFERENCE) == 1
    assert {row[0]: row[2] for row in tables[0].sheet.rows}[INPUT_X_GRADIENT] == "100.0"
    pictures = [block.path.name for block in section.blocks if isinstance(block, Picture)]
    maps = [f"{PLAIN}-maps.png", f"{BIASED}-maps.png", f"{BIASED}-biases.png"]
    assert pictures == ["errors.png", *maps]
    assert all(
        (setup.folder / "attributions" / name).with_suffix(s).is_file()
        for name in pictures
        for s in (".svg", ".npz")
    )


def test_errors_are_relative_to_the_logit():
    """By hand; a method that misses all but one in three images does not hold."""
    others = dict.fromkeys((SALIENCY, FULLGRAD, OF_MODULES), 0.0)
    images = [
        {
            "logit": v,
            "at zero": 0.5,
            "sums": {
                INPUT_X_GRADIENT: s,
                INTEGRATED: v - 0.5,
                IMAGE_PART: 1.0,
                IMAGE_AND_BIAS_PARTS: 1 + v - s,
                **others,
            },
        }
        for v, s in {2.0: 2.0, -1.0: 0.0, 4.0: 0.0}.items()
    ]
    errors = attributions.relative_errors(images)
    assert tuple(errors) == attributions.ROWS
    assert errors[INPUT_X_GRADIENT].tolist() == [0, 1, 1]
    assert errors[INTEGRATED].tolist() == [0.25, 0.5, 0.125]
    assert not errors[DIFFERENCE].any()
    assert not errors[COMPLETED].any()
    claim = attributions.claim_of(
        attributions.Statement("It does not.", INPUT_X_GRADIENT, False), {"net": errors}, ["net"]
    )
    assert claim.holds
    assert "net 33.3 %, median 1" in claim.measured
    statement = attributions.Statement("It does.", INPUT_X_GRADIENT)
    assert attributions.claim_of(statement, {"net": errors}, ["net"]).holds is False


def test_no_results_are_no_section(tmp_path):
    assert attributions.attributions_section(tmp_path) is None
