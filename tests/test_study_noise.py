"""Experiment 1: hyperplanes with and without noise, flipped gates, published tables."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import adjointbackmap as abm
from adjointbackmap import data, models
from adjointbackmap.analysis.angles import angles
from adjointbackmap.attacks import basic_iterative, study_attack
from adjointbackmap.report.sections import Claim, Picture, Table
from adjointbackmap.study.adversarial import noise, noise_report, pairs
from adjointbackmap.study.adversarial.gates import flipped, gate_counts, near_kinks
from adjointbackmap.study.adversarial.pairs import relative_change
from adjointbackmap.study.published.outputs import OUTPUTS
from adjointbackmap.study.setup import SCALE, Setup, read_json

NETWORKS = ("vgg7-nobias-cifar10", "vgg7-cifar10")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The experiment, run over the images that ship."""
    setup = Setup(tmp_path_factory.mktemp("study"), NETWORKS, sample=True)
    noise.compute_noise(setup, lambda what, share: None)
    return setup


@pytest.fixture(scope="module")
def section(setup):
    """What it tells, without any network or image at hand."""

    def none(*arguments):
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((models, "load"), (data, "load"), (data, "sample")):
            patch.setattr(module, name, none)
        return noise_report.noise_section(setup.folder)


@pytest.fixture(params=NETWORKS)
def case(request, setup):
    """A network with its results, its module, and the input before and after the attack."""
    trained = setup.trained(request.param)
    image = setup.one(request.param)
    pixels = image.unit_interval()
    subject = trained.subject
    attack = study_attack(1, pixels, subject.prepare)
    attacked = basic_iterative(subject.module, pixels, image.labels, attack, subject.prepare)
    found = read_json(setup.folder / noise.KEY / f"{request.param}.json")
    return found, subject.module, trained.input(pixels), trained.input(attacked.adversarial)


def gradients(module, x, of, layer=None):
    """Hyperplanes by autograd: outputs or a layer's channels, by input and convolution biases."""
    x = x.clone().requires_grad_()
    kept = []
    biases = [p for n, p in module.named_parameters() if n.endswith("bias")]
    hook = (
        module.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
        if layer
        else None
    )
    units = of(module(x)[0] if hook is None else (module(x), kept[0][0])[1])
    if hook:
        hook.remove()
    rows = [
        torch.autograd.grad(unit, [x, *biases], retain_graph=True, materialize_grads=True)
        for unit in units
    ]
    bias = [torch.cat([torch.zeros(0), *(g.flatten() for g in row[1:])]) for row in rows]
    return (
        torch.stack([row[0][0] for row in rows]),
        torch.stack(bias),
        torch.cat([torch.zeros(0), *biases]).detach(),
    )


def preactivations(module, x):
    """Output of every convolution, and the magnitudes of the terms that it was summed from."""
    kept = {}
    hooks = []

    def hear(name):
        def keep(conv, inputs, output):
            sizes = functional.conv2d(
                inputs[0].abs(),
                conv.weight.abs(),
                conv.bias if conv.bias is None else conv.bias.abs(),
                padding=1,
            )
            kept[name] = (output, sizes)

        return keep

    for name, conv in module.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            hooks.append(conv.register_forward_hook(hear(name)))
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return kept


def test_outputs_and_changes_are_those_of_autograd(case):
    """H_adv gives the outputs, H_orig others; how much each class's parts change."""
    found, module, x, attacked = case
    image, bias, b = gradients(module, x, lambda outputs: outputs)
    after, bias_after, _ = gradients(module, attacked, lambda outputs: outputs)
    outputs = found["outputs"]
    with torch.no_grad():
        assert outputs["network"] == pytest.approx(module(attacked)[0].tolist(), rel=1e-5)
        assert outputs["original"] == pytest.approx(module(x)[0].tolist(), rel=1e-5)
    assert outputs["H_adv"] == pytest.approx(outputs["network"], abs=1e-4)
    assert outputs["H_orig"] == pytest.approx(
        ((image * attacked).flatten(1).sum(1) + bias @ b).tolist(), abs=1e-4
    )
    changed = (after - image).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
    assert found["changed"]["image"] == pytest.approx(changed.tolist(), rel=1e-3)
    assert list(found["changed"]) == (["image", "bias"] if len(b) else ["image"])
    if len(b):
        assert found["changed"]["bias"] == pytest.approx(
            ((bias_after - bias).norm(dim=1) / bias.norm(dim=1)).tolist(), rel=1e-3
        )


def test_difference_begins_at_conv1(case):
    """RM1 by autograd; conv0 does not change at all, its bias part is zero."""
    found, module, x, attacked = case
    assert found["layers"]["conv0"] == {"image": 0.0, "bias": None}
    for layer in ("conv1", "conv2"):
        parts = [
            gradients(module, z, lambda output: output.sum((1, 2)), layer) for z in (x, attacked)
        ]
        for part, (before, after) in zip(
            ("image", "bias"), list(zip(*parts, strict=True))[:2], strict=True
        ):
            if (
                part == "bias" and before.numel()
            ):  # without the layer's own, 1,024 or 256 for each of its channels
                own = 32 * (int(layer[-1]) + 1) if layer == "conv1" else 128
                before, after = (
                    t[:, : own - (32 if layer == "conv1" else 64)] for t in (before, after)
                )
            if before.numel():
                assert found["layers"][layer][part] == pytest.approx(
                    float((after - before).norm() / before.norm()), rel=1e-3
                )
            else:
                assert found["layers"][layer][part] is None
    assert list(found["layers"]) == [*(f"conv{i}" for i in range(6)), "fc"]


def test_gates_are_counted_one_by_one(case):
    """Signs before and after; those nearer to zero than 16 eps of their terms."""
    found, module, x, attacked = case
    before = preactivations(module, x)
    after = preactivations(module, attacked)
    for layer, share in found["flipped"].items():
        (first, sizes) = before[layer]
        (second, sizes_after) = after[layer]
        assert found["gates"][layer] == first.numel()
        assert share == pytest.approx(
            float(((first > 0) != (second > 0)).double().mean()), abs=1.1 / first.numel()
        )
        near = [
            int((c.abs() <= 16 * 2.0**-23 * s).sum())
            for c, s in ((first, sizes), (second, sizes_after))
        ]
        assert found["near kinks"][layer] == pytest.approx(near, abs=1)


def test_kernels_are_those_that_change_most(setup, case):
    """The difference of conv1's RM3 hyperplanes, kernel by kernel."""
    found, _, x, attacked = case
    name = found["settings"]["network"]
    arrays = np.load(setup.folder / noise.KEY / f"{name}.npz")
    planes = [
        abm.hyperplanes(setup.trained(name).network, z, "conv1", "RM3", scale=SCALE).image[0]
        for z in (x, attacked)
    ]
    change = planes[1] - planes[0]
    rows = arrays["in_channels"]
    columns = arrays["out_channels"]
    torch.testing.assert_close(
        torch.from_numpy(arrays["kernels"]), change[rows][:, columns], rtol=1e-4, atol=1e-5
    )
    by_row = change.flatten(1).norm(dim=1)
    assert by_row[rows].min() >= np.delete(by_row.numpy(), rows).max()
    alive = planes[0].flatten(2).norm(dim=2) > 0
    assert found["kernels"]["kernels"] == int(alive.sum())
    assert 0 < found["kernels"]["changed"] <= found["kernels"]["kernels"]


class Residual(torch.nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv0, self.conv1 = (torch.nn.Conv2d(n, 32, 3, padding=1) for n in (3, 32))

    def forward(self, x):
        """Both activations; the second is that of the sum."""
        x = torch.relu(self.conv0(x))
        return torch.relu(x - 0.5 + self.conv1(x)).mean((2, 3))


def test_gates_that_precision_flips_are_near_their_kink():
    """Units zero but for rounding, which float64 sets; gates bear their convolution's name."""
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.full((1, 3, 32, 32), 0.3)
    with torch.no_grad():
        model.conv0.bias -= model.conv0(x)[0, :, 16, 16]
    network = abm.trace(model, x)
    patterns = [
        abm.record_pattern(network, x, dtype=dtype) for dtype in (torch.float32, torch.float64)
    ]
    near = near_kinks(network, x)
    counts = gate_counts(patterns[0])
    assert counts == {"conv0": 32768, "conv1": 32768}
    differ = [
        int((a[0] != b[0].float()).sum())
        for a, b in zip(*(p.gates.values() for p in patterns), strict=True)
    ]
    assert differ[0] > 0
    assert all(count <= int(near[layer]) for layer, count in zip(counts, differ, strict=True))
    assert int(near["conv0"]) == pytest.approx(
        32 * 30 * 30, abs=60
    )  # all but those at the edge, where zeros are padded
    assert near_kinks(network, x, 1e9)["conv1"].tolist() == [32768]


def test_flipped_takes_patterns_of_one_kind(setup):
    """Two batches of different size."""
    network = setup.trained(NETWORKS[0]).network
    patterns = [abm.record_pattern(network, torch.rand(n, 3, 32, 32)) for n in (1, 2)]
    with pytest.raises(ValueError, match="must be of one network, dtype and number of images"):
        flipped(*patterns)


def test_changes_and_angles():
    """Against their plain equations; undefined where both are zero."""
    before = torch.randn(2, 5, 7)
    after = torch.randn(2, 5, 7)
    cosine = functional.cosine_similarity(before.double().flatten(1), after.double().flatten(1))
    torch.testing.assert_close(angles(before, after, 1), cosine.arccos().rad2deg())
    assert angles(before, -before, 1).tolist() == pytest.approx([180.0, 180.0])
    assert relative_change(torch.zeros(2), torch.zeros(2), 0).isnan()


def test_second_run_computes_nothing(setup, monkeypatch):
    """Another image is refused before it is computed; what is there stays."""
    calls = []
    monkeypatch.setattr(
        noise, "measure_noise", lambda *arguments: calls.append(arguments) or ({}, {})
    )
    noise.compute_noise(setup, lambda what, share: None)
    assert calls == []
    other = Setup(setup.folder, NETWORKS[:1], image="frog", sample=True)
    kept = {path: path.read_bytes() for path in (setup.folder / noise.KEY).glob(f"{NETWORKS[0]}.*")}
    with pytest.raises(
        ValueError,
        match=r"Got others \(image [0-9a-f]+..., not [0-9a-f]+...\): name another folder",
    ):
        noise.compute_noise(other, lambda what, share: None)
    assert calls == []
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_section_tells_tables_pictures_and_claims(setup, section):
    """From the files alone; a network without bias has no bias part."""
    assert section.key == noise.KEY
    assert all(any(name in words for words in section.ran) for name in NETWORKS)
    pictures = [block.path.stem for block in section.blocks if isinstance(block, Picture)]
    assert f"{NETWORKS[1]}-bias" in pictures
    assert f"{NETWORKS[0]}-bias" not in pictures
    assert len(set(pictures)) == len(pictures) == 8
    for stem in pictures:
        assert all(
            (setup.folder / noise.KEY / f"{stem}.{kind}").is_file()
            for kind in ("png", "svg", "npz")
        )
    tables = [block for block in section.blocks if isinstance(block, Table)]
    assert [len(t.sheet.rows) for t in tables] == [10, 7, 10, 7]
    assert [t.published.title for t in tables if t.published] == [
        "Table 4.1: horse",
        "Table 4.3: bird",
    ]
    assert "**14.794**" in tables[2].published.rows[3]
    claims = [block for block in section.blocks if isinstance(block, Claim)]
    assert len(claims) == 13
    assert [c.holds for c in claims if "reproduce" in c.text] == [True, True]
    assert (
        next(c.published for c in claims if "changes the class" in c.text)
        == "horse becomes dog (Table 4.1)"
    )


def test_claims_fail_where_numbers_do(setup):
    """Results that say the contrary."""
    found = copy.deepcopy(read_json(setup.folder / noise.KEY / f"{NETWORKS[1]}.json"))
    outputs = found["outputs"]
    outputs["H_orig"] = outputs["network"]
    outputs["H_adv"] = outputs["original"]
    found["attack"]["fooled"] = False
    found["changed"] = {"image": [1.0, 1e-6], "bias": [1e-6]}
    found["layers"]["conv1"]["image"] = 0.0
    assert [claim.holds for claim in noise_report.noise_claims(NETWORKS[1], found)] == [False] * 7


def test_hundred_classes_show_ten(setup):
    """No published table; the claim about the class is the dissertation's in general."""
    found = copy.deepcopy(read_json(setup.folder / noise.KEY / f"{NETWORKS[1]}.json"))
    found["classes"] = [str(k) for k in range(100)]
    found["outputs"] = {key: [float(k) for k in range(100)] for key in found["outputs"]}
    table = noise_report.output_table("vgg7-cifar100", found)
    assert [row[0] for row in table.sheet.rows] == [f"{k} ({k})" for k in range(90, 100)]
    assert table.published is None
    claims = list(noise_report.noise_claims("vgg7-cifar100", found))
    assert all(claim.published == "" for claim in claims)
    assert "another one" in claims[3].text
    assert not claims[3].holds


def test_section_of_nothing_is_none(tmp_path: Path):
    """No results."""
    assert noise_report.noise_section(tmp_path) is None


def test_published_tables_are_as_their_captions_say():
    """The class that each network predicts; H_adv reproduces, H_orig does not."""
    winners = {
        "4.1": ("dog", "dog"),
        "4.2": ("dog", "cat"),
        "4.3": ("cat", "dog"),
        "4.4": ("deer", "deer"),
    }
    for name, table in OUTPUTS.items():
        network, adversarial, original = table.numbers
        assert len(network) == 10
        assert (
            pairs.largest_error(adversarial, network)
            < 3e-4
            < pairs.largest_error(original, network)
        )
        shown = tuple(
            data.CIFAR10_CLASSES[int(np.argmax(column))] for column in (network, original)
        )
        assert shown == winners.get(table.source.split()[1], ("airplane", "ship"))
        assert table.label == ("horse" if "nobias" in name else "bird")
