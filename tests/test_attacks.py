"""Attacks, against the paper's equations: limits, what they leave alone, results remeasured."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from adjointbackmap import data, models
from adjointbackmap.attacks import (
    Attack,
    basic_iterative,
    kurakin_iterations,
    least_likely,
    pixel_steps,
    study_attack,
)
from adjointbackmap.examples import BATCH, Attacked, examine, examples_of, read_examples

SHIPPED = "vgg7-cifar10"


def small_network(channels=3, classes=5):
    """A network whose first operation writes into its input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        ]
        return nn.Sequential(*layers, nn.Linear(6 * 36, classes)).double().eval()


def images(count=3, channels=3, seed=0):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def predicted(model, pixels):
    with torch.no_grad():
        return model(pixels.clone()).argmax(1)


@pytest.fixture(scope="module")
def shipped():
    """A trained network, and sample images that it classifies correctly, two of each class."""
    model = models.load(SHIPPED)
    sample = data.sample()
    right = (predicted(model, sample.unit_interval()) == sample.labels).nonzero().flatten()
    chosen = sample[torch.cat([right[sample.labels[right] == c][:2] for c in range(10)])]
    return SimpleNamespace(model=model, pixels=chosen.unit_interval(), labels=chosen.labels)


# the method


def by_the_paper(model, image, label, attack, prepare=None, target=None):
    """[Kurakin2017, section 2] for one image: Clip's three terms, one sign per pixel, the stop."""
    channels = len(image)
    step, radius = (
        v if isinstance(v, tuple) else (v,) * channels
        for v in (attack.step, attack.radius or float("inf"))
    )
    x, low, high = image.clone(), *attack.box
    for taken in range(attack.iterations):
        x.requires_grad_()
        scores = model((x if prepare is None else prepare(x))[None].clone())[0]
        done = int(scores.argmax()) != label if target is None else int(scores.argmax()) == target
        if attack.until_success and done:
            return x.detach(), taken
        log_p = scores - scores.exp().sum().log()
        loss = -log_p[label] if target is None else -log_p[target]
        slope = torch.autograd.grad(loss, x)[0]
        moved = torch.empty_like(image)
        for c in range(channels):
            new = x[c].detach() + (1 if target is None else -1) * step[c] * torch.sign(slope[c])
            least = torch.maximum(torch.tensor(low), image[c] - radius[c])
            moved[c] = torch.minimum(
                torch.minimum(torch.tensor(high), image[c] + radius[c]), torch.maximum(least, new)
            )
        x = moved
    return x.detach(), attack.iterations


ATTACKS = {
    "box-alone": Attack(0.03, iterations=6, until_success=False),
    "ball": Attack(0.03, iterations=6, until_success=False, radius=0.07),
    "by-channel": Attack(
        (0.01, 0.02, 0.05), iterations=4, until_success=False, radius=(0.02, 0.05, 0.07)
    ),
    "until-success": Attack(0.004, iterations=200, until_success=True),
    "narrow-box": Attack(0.3, iterations=3, until_success=False, box=(-0.25, 1.25)),
}


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_the_papers(name, targeted):
    """A batch gives what the equations give for each image alone, through a normalisation."""
    attack = ATTACKS[name]
    model = small_network()
    pixels = images()
    labels = predicted(model, models.Normalise()(pixels))
    targets = (labels + 2) % 5 if targeted else None
    found = basic_iterative(model, pixels, labels, attack, models.Normalise(), targets)
    for i, image in enumerate(pixels):
        goal = int(targets[i]) if targeted else None
        expected, steps = by_the_paper(
            model, image, int(labels[i]), attack, models.Normalise(), goal
        )
        assert torch.equal(found.adversarial[i], expected)
        assert int(found.steps[i]) == steps


def test_least_likely_is_the_target_of_the_clean_image():
    """The class with the smallest score of the image itself."""
    model = small_network()
    pixels = images()
    attack = ATTACKS["ball"]
    with torch.no_grad():
        least = model(pixels.clone()).argmin(1)
    expected = basic_iterative(model, pixels, predicted(model, pixels), attack, targets=least)
    assert torch.equal(least_likely(model, pixels, attack).adversarial, expected.adversarial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ATTACKS)
def test_box_and_radius_hold_exactly(name, dtype):
    """No pixel of the result is outside the box or the ball; some are on the ball's surface."""
    attack = ATTACKS[name]
    pixels = images().to(dtype)
    model = small_network().to(dtype)
    found = basic_iterative(model, pixels, predicted(model, pixels), attack)
    assert found.adversarial.dtype == dtype
    assert found.inside.all()
    assert (found.adversarial >= attack.box[0]).all()
    assert (found.adversarial <= attack.box[1]).all()
    if attack.radius is not None:
        radius = torch.tensor(attack.radius, dtype=dtype).expand(3).view(3, 1, 1)
        assert (found.adversarial >= pixels - radius).all()
        assert (found.adversarial <= pixels + radius).all()
        assert (found.adversarial == pixels + radius).any()


def test_each_image_stops_at_its_first_success(shipped):
    """The last step fools the network, the one before does not; one image needs no step."""
    labels = shipped.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    attack = study_attack(1, shipped.pixels)
    found = basic_iterative(shipped.model, shipped.pixels, labels, attack)
    assert len(found.steps.unique()) > 2
    assert int(found.steps[0]) == 0
    assert torch.equal(found.adversarial[0], shipped.pixels[0])
    assert found.fooled(labels).tolist() == [False] + [True] * 19
    for i in range(1, 4):
        less = Attack(attack.step, iterations=max(1, int(found.steps[i]) - 1), until_success=False)
        before = basic_iterative(shipped.model, shipped.pixels[[i]], labels[[i]], less)
        assert int(found.steps[i]) == 1 or not before.fooled(labels[[i]])


@pytest.mark.parametrize("name", [SHIPPED, "vgg7-nobias-cifar10"])
def test_study_reaches_every_target(name):
    """Experiment 2's attack reaches all nine other classes for a bird and a horse, and beyond."""
    model = models.load(name)
    prepare = models.preprocessing(name)
    sample = data.sample()
    pixels = sample.unit_interval()
    for label in (2, 7):
        right = (sample.labels == label) & (predicted(model, prepare(pixels)) == label)
        nine = pixels[right][:1].expand(9, -1, -1, -1)
        targets = torch.tensor([c for c in range(10) if c != label])
        found = basic_iterative(
            model, nine, torch.full((9,), label), study_attack(2, pixels, prepare), prepare, targets
        )
        assert torch.equal(found.after, targets)
        assert (found.steps == study_attack(2, pixels, prepare).iterations).all()
        halved = examine(model, nine, nine + found.noise / 2, prepare)
        assert halved.fooled(torch.full((9,), label)).all()


def test_least_likely_is_reached_on_the_shipped_network(shipped):
    """What the network finds least likely is what it says after the attack."""
    with torch.no_grad():
        least = shipped.model(shipped.pixels).argmin(1)
    found = least_likely(shipped.model, shipped.pixels[:6], study_attack(2, shipped.pixels))
    assert torch.equal(found.after, least[:6])


def test_batches_give_what_single_images_give():
    """More images than one batch takes."""
    model = small_network()
    pixels = images(BATCH + 2)
    attack = ATTACKS["ball"]
    labels = predicted(model, pixels)
    found = basic_iterative(model, pixels, labels, attack)
    for i in (0, BATCH, BATCH + 1):
        alone = basic_iterative(model, pixels[[i]], labels[[i]], attack)
        torch.testing.assert_close(found.adversarial[[i]], alone.adversarial, rtol=0, atol=1e-12)


# units


def test_steps_through_a_normalisation_are_those_of_the_study():
    """A step of 0.04 in the normalised image is a step of 0.008 in pixels."""
    pixels = images()
    prepare = models.Normalise()
    model = small_network()[1:].eval()
    attack = study_attack(1, pixels, prepare)
    assert attack.step == pytest.approx([0.04 * s for s in models.CIFAR_STD], rel=1e-7)
    one = Attack(attack.step, iterations=1, until_success=False, box=(-1.0, 2.0))
    found = basic_iterative(model, pixels, predicted(model, prepare(pixels)), one, prepare)
    moved = (prepare(found.adversarial) - prepare(pixels)).abs()
    torch.testing.assert_close(
        moved[moved > 1e-9], torch.full_like(moved[moved > 1e-9], 0.04), rtol=1e-7, atol=0
    )
    assert (moved > 0.03).float().mean() > 0.9
    assert study_attack(2, pixels).step == study_attack(2, pixels, nn.Identity()).step == 0.008


def test_study_attacks_differ_in_when_they_stop():
    """Experiment 1 stops at the first success, experiment 2 after a fixed number of steps."""
    first, second = (study_attack(experiment, images()) for experiment in (1, 2))
    assert (first.until_success, second.until_success) == (True, False)
    assert first.radius is second.radius is None


NOT_BY_CHANNEL = {
    "square": lambda x: x * x,
    "swapped-channels": lambda x: x[:, [1, 0, 2]],
    "flipped": lambda x: x.flip(-1),
    "by-pixel": lambda x: x * torch.linspace(1, 2, 8),
    "other-shape": lambda x: x[..., :4],
    "dropped-channel": lambda x: x * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1),
}


@pytest.mark.parametrize("why", NOT_BY_CHANNEL)
def test_preparation_that_is_not_by_channel_is_refused(why):
    """A step in the model's input is no step of a channel's pixels then."""
    with pytest.raises(
        ValueError,
        match=r"affine map of each pixel, with one factor for a channel.*give the steps in pixels",
    ):
        pixel_steps(0.04, images(), NOT_BY_CHANNEL[why])


def test_negative_factors_give_steps_of_positive_length():
    """An inverted channel has a step of the same length."""
    assert pixel_steps(0.5, images(), lambda x: 1 - 2 * x) == (0.25,) * 3


# what is left alone


@pytest.mark.parametrize("attack", [basic_iterative, least_likely], ids=lambda f: f.__name__)
def test_model_and_images_are_left_as_they_are(attack):
    """Parameters, their gradients and flags, statistics, modes, the images, the global switches."""
    model = small_network()
    pixels = images()
    settings = ATTACKS["ball"]
    model[1].weight.grad = torch.full_like(model[1].weight, 7.0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    labels = predicted(model, pixels)
    switches = (
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    )
    given = (model, pixels, labels) if attack is basic_iterative else (model, pixels)
    with torch.no_grad():
        found = attack(*given, settings)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (model[1].weight.grad == 7).all()
    assert [p.grad for p in model.parameters()][1:] == [None] * 5
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(pixels, images())
    assert not found.adversarial.requires_grad
    assert switches == (
        *(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attack_on_cuda_is_computed_there():
    """Model and images on a device; labels from elsewhere are brought there."""
    model = small_network().cuda()
    pixels = images().cuda()
    labels = predicted(model, pixels).cpu()
    found = basic_iterative(model, pixels, labels, ATTACKS["ball"])
    assert found.adversarial.device.type == found.steps.device.type == "cuda"
    assert found.fooled(labels).shape == (3,)


# measured again


def test_examine_measures_what_it_is_given():
    """Norms, box and classes of changes made by hand; nothing is believed or clipped."""
    model = small_network()
    pixels = images(2)
    changed = pixels.clone()
    changed[0, 0, 0, 0] += 3
    changed[1, 1, 2, 3:5] = pixels[1, 1, 2, 3:5] + torch.tensor(
        [0.003, -0.004], dtype=torch.float64
    )
    found = examine(model, pixels, changed)
    assert found.l2.tolist() == pytest.approx([3, 0.005], rel=1e-12)
    assert found.linf.tolist() == pytest.approx([3, 0.004], rel=1e-12)
    assert found.inside.tolist() == [False, True]
    assert torch.equal(found.noise, changed - pixels)
    assert torch.equal(found.before, predicted(model, pixels))
    assert torch.equal(found.after, predicted(model, changed))
    assert found.steps is None


def test_fooled_are_those_that_were_right_and_are_wrong():
    """An image that was wrong before is not fooled, nor one that is right after."""
    classes = torch.tensor([1, 1, 0, 0])
    rest = {"l2": torch.zeros(4), "linf": torch.zeros(4), "inside": torch.ones(4, dtype=torch.bool)}
    found = Attacked(
        torch.zeros(4, 1, 1, 1),
        torch.zeros(4, 1, 1, 1),
        classes,
        torch.tensor([0, 1, 2, 1]),
        **rest,
    )
    assert found.fooled(torch.tensor([1, 1, 1, 1])).tolist() == [True, False, False, False]


def test_kurakin_iterations_are_the_papers():
    """``min(eps + 4, 1.25 eps)`` in grey levels, rounded down; one at least."""
    assert [kurakin_iterations(e / 255) for e in range(1, 25)] == [
        max(1, min(e + 4, 5 * e // 4)) for e in range(1, 25)
    ]
    assert kurakin_iterations(0.1 / 255) == 1


# examples from elsewhere

READABLE = {
    "one.safetensors": lambda path, x: save_file({"anything": x}, path),
    "several.safetensors": lambda path, x: save_file({"pixels": x * 0, "adversarial": x}, path),
    "array.npy": lambda path, x: np.save(path, x.numpy()),
    "several.npz": lambda path, x: np.savez(path, adversarial=x.numpy(), labels=np.zeros(2)),
    "tensor.pt": lambda path, x: torch.save(x, path),
    "torchattacks.pt": lambda path, x: torch.save(
        {"adv_inputs": x, "labels": torch.zeros(2), "save_type": "float"}, path
    ),
}


@pytest.mark.parametrize("name", READABLE)
def test_examples_are_read(name, tmp_path):
    """Each kind of file gives the images that were written."""
    written = images(2)
    READABLE[name](tmp_path / name, written)
    assert torch.equal(read_examples(tmp_path / name), written)


def test_bytes_are_read_as_pixels(tmp_path):
    """What torchattacks saves as ``int``."""
    torch.save(
        {"adv_inputs": torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)}, tmp_path / "bytes.pt"
    )
    assert (read_examples(tmp_path / "bytes.pt") == torch.tensor(0.2)).all()


def write_several(path):
    np.savez(path, x=np.zeros(2), y=np.zeros(2))


def write_text(path):
    path.write_text("no arrays")


UNREADABLE = {
    "pictures.png": (
        lambda path: None,
        ValueError,
        r"ends in \.safetensors, \.npy, \.npz, \.pt\. Got .*pictures\.png",
    ),
    "missing.npy": (lambda path: None, FileNotFoundError, r"Got .*missing\.npy, which is none"),
    "damaged.safetensors": (
        write_text,
        ValueError,
        r"damaged\.safetensors must hold arrays\. It could not be read: .*write it",
    ),
    "damaged.pt": (write_text, ValueError, r"damaged\.pt must hold arrays\. It could not be read"),
    "several.npz": (
        write_several,
        ValueError,
        r"must hold one array, or one called adversarial or adv_inputs\. Got x, y",
    ),
    "flat.npy": (
        lambda path: np.save(path, np.zeros((2, 4))),
        ValueError,
        r"flat\.npy must be .*\(N, C, H, W\)\. Got \(2, 4\)",
    ),
    "whole.npy": (
        lambda path: np.save(path, np.zeros((1, 1, 1, 1), int)),
        ValueError,
        r"must be floating-point images.*int64",
    ),
    "nan.pt": (
        lambda path: torch.save(torch.full((1, 1, 2, 2), torch.nan), path),
        ValueError,
        r"must be finite\. Got 4 numbers",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_of_another_kind_are_refused(name, tmp_path):
    """The message says what the file must be."""
    write, error, match = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(error, match=match):
        read_examples(tmp_path / name)


class Eager:
    """A tensor of eagerpy: the tensor of torch is its ``raw``."""

    def __init__(self, raw):
        self.raw = raw


class Fgsm:
    """An attack with the interface of torchattacks: model first, then images and labels."""

    def __init__(self, model, eps):
        self.model = model
        self.eps = eps

    def __call__(self, inputs, labels, *args, **kwargs):
        inputs = inputs.clone().requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(self.model(inputs.clone()), labels), inputs)[0]
        return (inputs + self.eps * slope.sign()).clamp(0, 1)


CHANGED = images(2, seed=1)
MADE = {
    "foolbox": (CHANGED + 9, CHANGED, torch.ones(2)),
    "foolbox-one-epsilon-in-a-list": ([CHANGED + 9], [CHANGED], torch.ones(1, 2)),
    "foolbox-eagerpy": (Eager(CHANGED + 9), Eager(CHANGED), Eager(torch.ones(2))),
    "eagerpy": Eager(CHANGED),
    "tensor": CHANGED,
    "tensor-in-float32": CHANGED.float(),
    "callable": lambda inputs, labels: CHANGED,
}


@pytest.mark.parametrize("name", MADE)
def test_examples_of_other_libraries_are_taken(name):
    """What each gives becomes one tensor in the images' dtype: of Foolbox's the clipped one."""
    found = examples_of(MADE[name], images(2), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(found, CHANGED, rtol=0, atol=1e-7 if "float32" in name else 0)


def test_attack_of_torchattacks_is_called_and_examined():
    """A single step of the sign of the gradient is our method with one iteration."""
    model = small_network()
    pixels = images()
    labels = predicted(model, pixels)
    found = examine(model, pixels, examples_of(Fgsm(model, 0.05), pixels, labels))
    ours = basic_iterative(model, pixels, labels, Attack(0.05, iterations=1, until_success=False))
    assert torch.equal(found.adversarial, ours.adversarial)
    assert torch.equal(found.after, ours.after)
    assert torch.equal(found.l2, ours.l2)


UNTAKEN = {
    "epsilons": (
        ([CHANGED] * 3, [CHANGED] * 3, torch.ones(3, 2)),
        ValueError,
        r"those of one epsilon\. Got 3: pass one of them",
    ),
    "array": (
        CHANGED.numpy(),
        TypeError,
        r"must be a tensor, an attack, or what Foolbox returns\. Got ndarray",
    ),
    "shape": (
        CHANGED[:1],
        ValueError,
        r"must have the images' shape \(2, 3, 8, 8\)\. Got \(1, 3, 8, 8\)",
    ),
    "infinite": (CHANGED / 0, ValueError, "Examples must be finite"),
}


@pytest.mark.parametrize("why", UNTAKEN)
def test_what_is_no_example_is_refused(why):
    """The message says what must be given."""
    made, error, match = UNTAKEN[why]
    with pytest.raises(error, match=match):
        examples_of(made, images(2), torch.zeros(2, dtype=torch.int64))


# errors

WRONG_SETTINGS = {
    "step": (dict(step=0.0), r"step must be positive\. Got 0\.0"),
    "step-of-a-channel": (
        dict(step=(0.1, -0.1, 0.1)),
        r"step must be positive\. Got \(0\.1, -0\.1, 0\.1\)",
    ),
    "radius": (dict(radius=0.0), r"radius must be positive\. Got 0\.0"),
    "infinite": (dict(radius=float("inf")), r"radius must be positive\. Got inf"),
    "iterations": (dict(iterations=0), r"iterations must be positive\. Got 0"),
    "box": (
        dict(box=(1.0, 0.0)),
        r"box must be the smallest and the largest value of a pixel\. Got \(1\.0, 0\.0\)",
    ),
}


@pytest.mark.parametrize("why", WRONG_SETTINGS)
def test_settings_are_held(why):
    """Steps, radii and counts are positive, the box holds something."""
    wrong, match = WRONG_SETTINGS[why]
    with pytest.raises(ValueError, match=match):
        Attack(**{"step": 0.1, "iterations": 1, "until_success": True, **wrong})


def attacked(pixels=None, labels=None, model=None, targets=None, **settings):
    """The method on three images, with something wrong."""
    attack = Attack(**{"step": 0.1, "iterations": 1, "until_success": True, **settings})
    labels = torch.tensor([0, 1, 2]) if labels is None else labels
    return basic_iterative(
        model or small_network(),
        images() if pixels is None else pixels,
        labels,
        attack,
        targets=targets,
    )


def partly_training():
    """A model with one part that is not in eval mode."""
    model = nn.Sequential(small_network(), nn.Dropout()).eval()
    model[1].train()
    return model


WRONG_CALLS = {
    "train-mode": (dict(model=small_network().train()), r"must be in eval mode"),
    "one-part-in-train-mode": (
        dict(model=partly_training()),
        r"must be in eval mode\. Got train mode in 1: call",
    ),
    "one-image": (
        dict(pixels=images()[0]),
        r"pixels must be floating-point images \(N, C, H, W\)\. Got \(3, 8, 8\)",
    ),
    "bytes": (
        dict(pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
        r"pixels must be floating-point images.*uint8",
    ),
    "none": (dict(pixels=images()[:0]), r"pixels must be floating-point images.*\(0, 3, 8, 8\)"),
    "infinite": (dict(pixels=images() / 0), r"pixels must be finite\. Got 576 numbers"),
    "outside": (
        dict(pixels=images() + 1),
        r"pixels must be in the box from 0\.0 to 1\.0\. Got 1\.001 to 2",
    ),
    "too-few-labels": (
        dict(labels=torch.tensor([0])),
        r"labels must be one integer from 0 to 4 for each of the 3 images\. Got \(1,\)",
    ),
    "no-such-label": (
        dict(labels=torch.tensor([0, 1, 5])),
        r"labels must be one integer from 0 to 4.*\[0, 1, 5\]",
    ),
    "no-such-target": (
        dict(targets=torch.tensor([1, 2, -1])),
        r"targets must be one integer from 0 to 4",
    ),
    "labels-of-another-type": (dict(labels=torch.zeros(3)), r"labels must be one integer.*float32"),
    "target-is-label": (
        dict(targets=torch.tensor([1, 1, 3])),
        r"targets must be other classes than labels.*for image 1",
    ),
    "channels-of-the-step": (
        dict(step=(0.1, 0.1)),
        r"step must be one number, or one for each of the 3 channels\. Got \(0\.1, 0\.1\)",
    ),
    "channels-of-the-radius": (
        dict(radius=(0.1, 0.1)),
        r"radius must be one number, or one for each of the 3 channels",
    ),
    "output": (
        dict(model=nn.Identity().eval()),
        r"one score for each class, \(1, classes\)\. Got \(1, 3, 8, 8\)",
    ),
}


@pytest.mark.parametrize("why", WRONG_CALLS)
def test_what_does_not_fit_is_refused(why):
    """The message says what was expected and what came."""
    wrong, match = WRONG_CALLS[why]
    with pytest.raises(ValueError, match=match):
        attacked(**wrong)


def test_examine_refuses_what_does_not_fit():
    """Another shape, a number that is none, a model in train mode."""
    model = small_network()
    pixels = images()
    with pytest.raises(
        ValueError,
        match=r"adversarial must have the images' shape \(3, 3, 8, 8\)\. Got \(2, 3, 8, 8\)",
    ):
        examine(model, pixels, pixels[:2])
    with pytest.raises(ValueError, match=r"adversarial must be finite"):
        examine(model, pixels, pixels / 0)
    with pytest.raises(ValueError, match=r"must be in eval mode"):
        examine(small_network().train(), pixels, pixels)


def test_model_that_gives_no_tensor_is_refused():
    """A module with two outputs."""

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(
        ValueError, match=r"one score for each class.*Got tuple: wrap it in a module that does"
    ):
        examine(Two().eval(), images(), images())


@pytest.mark.parametrize("radius", [0.0, -1.0, float("inf")])
def test_kurakin_iterations_need_a_radius(radius):
    """A ball."""
    with pytest.raises(ValueError, match=re.escape(f"radius must be positive. Got {radius}.")):
        kurakin_iterations(radius)


def test_there_are_two_experiments():
    """The third of the study needs no attack of its own."""
    with pytest.raises(ValueError, match=r"experiment must be 1 or 2\. Got 3"):
        study_attack(3, images())
