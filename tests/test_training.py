"""Training: a run that is killed, at whatever moment, ends as if it had not been."""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adjointbackmap import data, models, training

EPOCHS, BATCH, STEPS_PER_EPOCH = 2, 16, 4
SPLITS = {"train": slice(0, 70), "validation": slice(70, 110), "test": slice(110, 200)}
NETWORKS = ("vgg7", "fixup-resnet20")
FASTEST_SETTING = training._fastest_setting  # the fixture below replaces it


class KilledError(Exception):
    """Stands for whatever ends a run."""


def task(network="vgg7", **changes):
    return training.Task(network, "cifar10", **{"recipe": training.Recipe(epochs=EPOCHS, batch=BATCH), **changes})


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    """Images of the sample in place of CIFAR-10, one setting in place of the fastest."""
    images = data.sample().draw(200, seed=0)
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: images[SPLITS[split]])
    monkeypatch.setattr(training, "_fastest_setting", lambda *args: training.Setting(channels_last=True, bfloat16=False))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing ended, for each network; made when first asked for."""
    folders = {}

    def run(network):
        if network not in folders:
            folders[network] = tmp_path_factory.mktemp(network)
            training.train(task(network), folders[network])
        return folders[network]

    return run


def stop_at(step):
    def report(progress):
        if progress.step == step:
            raise KilledError

    return report


def raise_after(function, calls):
    """The function, which at one of its calls does its work and then ends the run."""
    count = iter(range(1, 10_000))

    def wrapped(*args):
        result = function(*args)
        if next(count) == calls:
            raise KilledError
        return result

    return wrapped


def assert_same_end(folder, expected):
    name = next(expected.glob("*.safetensors")).name
    actual, wanted = load_file(folder / name), load_file(expected / name)
    assert actual.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(actual[key], wanted[key])] == []
    rows = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (folder, expected)]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_a_stopped_run_continues_bit_for_bit(unbroken, tmp_path, network, step):
    with pytest.raises(KilledError):
        training.train(task(network), tmp_path, report=stop_at(step))
    seen = []
    training.train(task(network), tmp_path, report=lambda progress: seen.append(progress.step))
    assert seen == list(range(step + 1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert_same_end(tmp_path, unbroken(network))


def test_a_run_continues_from_its_latest_checkpoint(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)  # after every step
    left = tmp_path / "left"
    left.mkdir()

    def report(progress):
        if progress.step == 6:  # what a power cut leaves
            shutil.copy(tmp_path / "checkpoint.pt", left)

    training.train(task(), tmp_path, report=report)
    seen = []
    training.train(task(), left, report=lambda progress: seen.append(progress.step))
    assert seen == [6, 7, 8]
    assert_same_end(left, unbroken("vgg7"))


@pytest.mark.parametrize(("name", "calls"), [("_loss", 6), ("accuracy", 1), ("accuracy", 2)])
def test_a_run_killed_in_the_midst_of_a_step_repeats_it(unbroken, tmp_path, monkeypatch, name, calls):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(training, name, raise_after(getattr(training, name), calls))
        with pytest.raises(KilledError):
            training.train(task(), tmp_path)
    training.train(task(), tmp_path)
    assert_same_end(tmp_path, unbroken("vgg7"))


def test_a_finished_run_is_not_trained_again(unbroken, tmp_path):
    folder = shutil.copytree(unbroken("vgg7"), tmp_path / "copy")
    seen = []
    training.train(task(), folder, report=seen.append)
    assert seen == []
    assert_same_end(folder, unbroken("vgg7"))


@pytest.mark.parametrize(
    "other",
    [task(seed=1), task("resnet20"), task(recipe=training.Recipe(epochs=3, batch=BATCH))],
    ids=["seed", "network", "recipe"],
)
def test_the_run_of_another_task_is_refused(unbroken, other):
    with pytest.raises(ValueError, match=r"must be empty or hold a run of .* Got a run of .*'vgg7'.*: name another folder"):
        training.train(other, unbroken("vgg7"))


def test_another_seed_gives_other_weights(unbroken, tmp_path):
    training.train(task(seed=1), tmp_path)
    first, second = (load_file(f / "vgg7-cifar10.safetensors")["conv0.weight"] for f in (tmp_path, unbroken("vgg7")))
    assert not torch.equal(first, second)


def test_progress_counts_steps_and_tells_the_last_validation(tmp_path):
    seen = []
    training.train(task(), tmp_path, report=seen.append)
    assert [p.step for p in seen] == list(range(1, 9))
    assert {p.steps for p in seen} == {8}
    assert [p.validation is None for p in seen] == [True] * 3 + [False] * 5
    history = [json.loads(line)["validation"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [seen[3].validation, seen[7].validation] == history


def test_the_card_tells_what_was_trained_and_how_well(unbroken):
    folder = unbroken("vgg7")
    card = json.loads((folder / "vgg7-cifar10.json").read_text())
    model = models.build("vgg7")
    model.load_state_dict(load_file(folder / "vgg7-cifar10.safetensors"))
    prepare = models.preprocessing("vgg7")
    expected = {
        "name": "vgg7-cifar10",
        "network": "vgg7",
        "dataset": "cifar10",
        "classes": 10,
        "training images": 70,
        "recipe": asdict(task().recipe),
        "seed": 0,
        "validation accuracy": training.accuracy(model, data.load("cifar10", "validation"), prepare),
        "test accuracy": training.accuracy(model, data.load("cifar10", "test"), prepare),
        "setting": {"channels_last": True, "bfloat16": False},
    }
    assert {key: card[key] for key in expected} == expected
    assert f"torch {torch.__version__}" in card["machine"]


@pytest.mark.parametrize(("shares", "kept"), [([0.3, 0.2], 1), ([0.2, 0.3], 2), ([0.3, 0.3], 1)])
def test_the_weights_kept_are_those_of_the_best_validation(tmp_path, monkeypatch, shares, kept):
    answers = iter([*shares, 0.9])
    weights = []

    def accuracy(model, images, prepare):
        weights.append(model.get_parameter("conv0.weight").detach().clone())
        return next(answers)

    monkeypatch.setattr(training, "accuracy", accuracy)
    card = training.train(task(), tmp_path)
    assert (card["kept epoch"], card["validation accuracy"], card["test accuracy"]) == (kept, max(shares), 0.9)
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(load_file(tmp_path / "vgg7-cifar10.safetensors")["conv0.weight"], weights[kept - 1])
    assert torch.equal(weights[2], weights[kept - 1])  # the test accuracy is theirs


def test_training_lowers_the_loss(tmp_path):
    losses = []
    training.train(task(recipe=training.Recipe(epochs=6, batch=BATCH)), tmp_path, report=lambda p: losses.append(p.loss))
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.1


def test_the_caller_keeps_its_random_numbers(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    training.train(task(recipe=training.Recipe(epochs=1, batch=BATCH)), tmp_path)
    assert torch.equal(torch.rand(1), expected)


def augment_twin(pixels, padding, generator):
    """Image by image: zeros around, crop at a random corner, mirror if the coin says so."""
    count, channels, height, width = pixels.shape
    corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    coins = torch.rand(count, generator=generator)
    out = torch.zeros(count, channels, height, width)
    for i in range(count):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
        padded[:, padding : padding + height, padding : padding + width] = pixels[i]
        top, left = corners[0, i], corners[1, i]
        crop = padded[:, top : top + height, left : left + width]
        out[i] = (crop.flip(2) if coins[i] < 0.5 else crop) / 255
    return out


@pytest.mark.parametrize("padding", [0, 4])
def test_augmentation_crops_and_mirrors(padding):
    pixels = data.sample().pixels[:40]
    actual = training.augment(pixels, padding, torch.Generator().manual_seed(2))
    torch.testing.assert_close(actual, augment_twin(pixels, padding, torch.Generator().manual_seed(2)), rtol=0, atol=0)
    original = pixels.float() / 255
    unchanged = sum(torch.equal(a, b) for a, b in zip(actual, original, strict=True))
    assert (10 <= unchanged <= 30) if padding == 0 else unchanged <= 5


def test_the_rate_rises_and_falls_linearly():
    recipe = training.Recipe(peak_rate=0.4, rise=0.25)
    rates = torch.tensor([recipe.rate(step, 100) for step in range(100)], dtype=torch.float64)
    assert rates.argmax() in (24, 25)
    assert 0.39 < rates.max() <= 0.4
    assert 0 < rates[0] < 0.01
    assert 0 < rates[-1] < 0.01
    torch.testing.assert_close(rates[:25].diff(), torch.full((24,), 0.4 / 25, dtype=torch.float64))
    torch.testing.assert_close(rates[25:].diff(), torch.full((74,), -0.4 / 75, dtype=torch.float64))


class Brightest(nn.Module):
    """Scores that name the label told by the first pixel; fails in train mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.training:
            raise KilledError
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), 10) * self.scale


def told(labels):
    """Images whose first pixel is the given label; their own labels go from 0 to 9."""
    pixels = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor(labels, dtype=torch.uint8)
    return replace(data.sample()[:10], pixels=pixels, labels=torch.arange(10))


@pytest.mark.parametrize("batch", [1, 3, 10, 500])
def test_accuracy_is_the_share_of_right_answers(batch):
    images = told([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert training.accuracy(Brightest(), images, nn.Identity(), batch) == 0.7


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_accuracy_puts_the_mode_back(mode):
    model = Brightest().train(mode)
    training.accuracy(model, told(range(10)), nn.Identity())
    assert model.training is mode


def test_accuracy_puts_the_mode_back_after_a_failure():
    model = Brightest().train()
    with pytest.raises(RuntimeError):
        training.accuracy(model, told([200] * 10), nn.Identity())
    assert model.training


@pytest.mark.parametrize("setting", [training.Setting(a, False) for a in (True, False)], ids=["channels last", "contiguous"])
def test_layouts_compute_the_same_loss(setting):
    images = data.sample()[:8]
    torch.manual_seed(0)
    model = models.build("vgg7").to(memory_format=setting.layout)
    torch.manual_seed(0)
    twin = models.build("vgg7")
    actual = training._loss(model, images.unit_interval(), images.labels, training.Recipe(), setting)
    scores = twin(images.unit_interval()).log_softmax(1)
    expected = -(0.9 * scores[torch.arange(8), images.labels] + 0.1 * scores.mean(1)).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fastest", [training.Setting(a, b) for a in (True, False) for b in (True, False)], ids=str)
def test_the_fastest_setting_is_taken(monkeypatch, fastest):
    def loss(model, x, labels, recipe, setting):
        time.sleep(0 if setting == fastest else 0.02)
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(training, "_loss", loss)
    monkeypatch.setattr(training, "_has_bfloat16", lambda device: True)
    images = data.sample()[:4]
    assert FASTEST_SETTING(task(), 10, nn.Identity(), images.pixels, images.labels, "cpu") == fastest


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512f avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512f", False), (None, False)], ids=str
)
def test_bfloat16_is_tried_where_the_processor_has_it(monkeypatch, flags, expected):
    def read_text(path):
        if flags is None:
            raise FileNotFoundError
        return f"flags\t: fpu {flags} sse\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert training._has_bfloat16("cpu") is expected
