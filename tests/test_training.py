"""Training: a run that is killed, at whatever moment, ends as if it had not been."""

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adjointbackmap import data, models, plots
from adjointbackmap.training import loop as training
from adjointbackmap.training.recipes import choose_recipe

EPOCHS = 2
BATCH = 16
STEPS_PER_EPOCH = 4
SPLITS = {"train": slice(0, 70), "validation": slice(70, 110), "test": slice(110, 200)}
NETWORKS = ("vgg7", "fixup-resnet20")
# the fixture below replaces them
FASTEST_SETTING = training.fastest_setting
DRAW = training.draw_curves
NEW_FIELDS = (
    "intervals",
    "l1",
    "validate_every",
    "augmentation",
    "objective",
    "radius",
    "strength",
)  # what the first checkpoints did not have


class KilledError(Exception):
    """Stands for whatever ends a run."""


def task(network="vgg7", **changes):
    return training.Task(
        network, "cifar10", **{"recipe": training.Recipe(epochs=EPOCHS, batch=BATCH), **changes}
    )


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    """Images of the sample for CIFAR-10, one setting for the fastest, and no picture."""
    images = data.sample().draw(200, seed=0)
    monkeypatch.setattr(data, "load", lambda dataset, split, root=None: images[SPLITS[split]])
    monkeypatch.setattr(
        training,
        "fastest_setting",
        lambda *args: training.Setting(channels_last=True, bfloat16=False),
    )
    monkeypatch.setattr(training, "draw_curves", lambda log, title: None)


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


def around(x):
    return training.Around(training.ball_of(nn.Identity(), 8 / 255, x), torch.Generator())


@pytest.mark.parametrize("objective", ["adversarial", "local-linearity", "gradient-norm"])
def test_a_run_with_an_objective_continues_bit_for_bit(tmp_path, objective):
    recipe = training.Recipe(epochs=1, batch=BATCH, objective=objective)
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    card = training.train(task(recipe=recipe), whole)
    assert card["recipe"]["objective"] == objective
    with pytest.raises(KilledError):
        training.train(task(recipe=recipe), broken, report=stop_at(2))
    training.train(task(recipe=recipe), broken)
    actual, wanted = (load_file(path / "vgg7-cifar10.safetensors") for path in (broken, whole))
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


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
    actual = load_file(folder / name)
    wanted = load_file(expected / name)
    assert actual.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(actual[key], wanted[key])] == []
    rows = [
        [json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()]
        for f in (folder, expected)
    ]
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


@pytest.mark.parametrize(
    ("name", "calls"), [("training_loss", 6), ("accuracy", 1), ("accuracy", 2)]
)
def test_a_run_killed_in_the_midst_of_a_step_repeats_it(
    unbroken, tmp_path, monkeypatch, name, calls
):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(training, name, raise_after(getattr(training, name), calls))
        with pytest.raises(KilledError):
            training.train(task(), tmp_path)
    training.train(task(), tmp_path)
    assert_same_end(tmp_path, unbroken("vgg7"))


def test_a_checkpoint_without_the_newer_fields_continues(unbroken, tmp_path):
    """It has their defaults; of its last epoch only the steps since then are in the logged loss."""
    with pytest.raises(KilledError):
        training.train(task(), tmp_path, report=stop_at(STEPS_PER_EPOCH + 1))
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del content["losses"]
    for name in NEW_FIELDS:
        del content["task"]["recipe"][name]
    torch.save(content, tmp_path / "checkpoint.pt")
    losses = []
    training.train(task(), tmp_path, report=lambda progress: losses.append(progress.loss))
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == sum(losses) / 3
    actual, wanted = (
        load_file(folder / "vgg7-cifar10.safetensors") for folder in (tmp_path, unbroken("vgg7"))
    )
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


def test_the_study_recipe_continues_bit_for_bit(tmp_path):
    """Intervals, L1, its augmentation; validated every two epochs and at the end."""
    recipe = choose_recipe("vgg7", "cifar10", "study", epochs=3, batch=BATCH)
    cut = tmp_path / "cut"
    whole = tmp_path / "whole"
    with pytest.raises(KilledError):
        training.train(task(recipe=recipe), cut, report=stop_at(STEPS_PER_EPOCH + 2))
    seen = []
    training.train(task(recipe=recipe), whole, report=seen.append)
    training.train(task(recipe=recipe), cut)
    assert_same_end(cut, whole)
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [row["validation"] is None for row in rows] == [True, False, False]
    assert [row["loss"] for row in rows] == [
        sum(p.loss for p in seen[i : i + 4]) / 4 for i in (0, 4, 8)
    ]
    assert seen[8].validation == seen[7].validation == rows[1]["validation"]
    assert json.loads((whole / "vgg7-cifar10.json").read_text())["recipe"]["l1"] == 1e-4


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
    with pytest.raises(
        ValueError,
        match=r"must be empty or hold a run of .* Got a run of .*'vgg7'.*: name another folder",
    ):
        training.train(other, unbroken("vgg7"))


def test_another_seed_gives_other_weights(unbroken, tmp_path):
    training.train(task(seed=1), tmp_path)
    first, second = (
        load_file(f / "vgg7-cifar10.safetensors")["conv0.weight"]
        for f in (tmp_path, unbroken("vgg7"))
    )
    assert not torch.equal(first, second)


def test_progress_counts_steps_and_tells_the_last_validation(tmp_path):
    seen = []
    training.train(task(), tmp_path, report=seen.append)
    assert [p.step for p in seen] == list(range(1, 9))
    assert {p.steps for p in seen} == {8}
    assert [p.validation is None for p in seen] == [True] * 3 + [False] * 5
    history = [
        json.loads(line)["validation"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
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
        "recipe": {**asdict(task().recipe), "intervals": []},
        "seed": 0,
        "validation accuracy": training.accuracy(
            model, data.load("cifar10", "validation"), prepare
        ),
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
    assert (card["kept epoch"], card["validation accuracy"], card["test accuracy"]) == (
        kept,
        max(shares),
        0.9,
    )
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(
        load_file(tmp_path / "vgg7-cifar10.safetensors")["conv0.weight"], weights[kept - 1]
    )
    assert torch.equal(weights[2], weights[kept - 1])  # the test accuracy is theirs


def test_training_lowers_the_loss(tmp_path):
    losses = []
    training.train(
        task(recipe=training.Recipe(epochs=6, batch=BATCH)),
        tmp_path,
        report=lambda p: losses.append(p.loss),
    )
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.1


def test_the_caller_keeps_its_random_numbers(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    training.train(task(recipe=training.Recipe(epochs=1, batch=BATCH)), tmp_path)
    assert torch.equal(torch.rand(1), expected)


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


@pytest.mark.parametrize(
    "setting",
    [training.Setting(a, False) for a in (True, False)],
    ids=["channels last", "contiguous"],
)
def test_layouts_compute_the_same_loss(setting):
    images = data.sample()[:8]
    torch.manual_seed(0)
    model = models.build("vgg7").to(memory_format=setting.layout)
    torch.manual_seed(0)
    twin = models.build("vgg7")
    x = images.unit_interval()
    actual = training.training_loss(model, x, images.labels, training.Recipe(), setting, around(x))
    scores = twin(images.unit_interval()).log_softmax(1)
    expected = -(0.9 * scores[torch.arange(8), images.labels] + 0.1 * scores.mean(1)).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_l1_is_of_the_kernels_alone():
    """Multipliers, scalar biases and batch norm have none."""
    for network in NETWORKS:
        torch.manual_seed(0)
        model = models.build(network).eval()
        images = data.sample()[:4]
        kernels = [
            module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        arguments = (model, images.unit_interval(), images.labels)
        setting = training.Setting(channels_last=True, bfloat16=False)
        without, loss = (
            training.training_loss(
                *arguments, training.Recipe(l1=l1), setting, around(arguments[1])
            )
            for l1 in (0.0, 1e-3)
        )
        torch.testing.assert_close(
            loss - without, 1e-3 * torch.stack([w.abs().sum() for w in kernels]).sum()
        )


@pytest.mark.parametrize(
    "fastest", [training.Setting(a, b) for a in (True, False) for b in (True, False)], ids=str
)
def test_thefastest_setting_is_taken(monkeypatch, fastest):
    def loss(model, x, labels, recipe, setting, around):
        time.sleep(0 if setting == fastest else 0.02)
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(training, "training_loss", loss)
    monkeypatch.setattr(training, "has_bfloat16", lambda device: True)
    images = data.sample()[:4]
    assert (
        FASTEST_SETTING(task(), 10, nn.Identity(), images.pixels, images.labels, "cpu") == fastest
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512f avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512f", False), (None, False)],
    ids=str,
)
def test_bfloat16_is_tried_where_the_processor_has_it(monkeypatch, flags, expected):
    def read_text(path):
        if flags is None:
            raise FileNotFoundError
        return f"flags\t: fpu {flags} sse\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    assert training.has_bfloat16("cpu") is expected


# the picture of the log


def row(epoch, loss, validation):
    return {
        "epoch": epoch,
        "step": 4 * epoch,
        "loss": loss,
        "validation": validation,
        "seconds": 1.0,
    }


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH + 1, None], ids=["stopped", "finished"])
def test_curves_are_drawn_beside_the_log(tmp_path, monkeypatch, step):
    monkeypatch.setattr(training, "draw_curves", DRAW)
    if step:
        with pytest.raises(KilledError):
            training.train(task(), tmp_path, report=stop_at(step))
    else:
        training.train(task(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = np.load(tmp_path / "curves.npz")
    assert [drawn[name].tolist() for name in ("epoch", "loss", "validation")] == [
        [row[name] for row in rows] for name in ("epoch", "loss", "validation")
    ]


def test_a_run_stopped_in_its_first_epoch_has_no_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "draw_curves", DRAW)
    with pytest.raises(KilledError):
        training.train(task(), tmp_path, report=stop_at(1))
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert not (tmp_path / "curves.png").exists()


def test_the_folder_has_a_checkpoint_before_the_first_step(tmp_path, monkeypatch):
    """What a power cut in the first step leaves is a run that begins with it."""
    seen = []

    def killed(*args):
        seen.append((tmp_path / "checkpoint.pt").is_file())
        raise KilledError

    monkeypatch.setattr(training, "_step", killed)
    with pytest.raises(KilledError):
        training.train(task(), tmp_path)
    assert seen == [True]
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["step"] == 0


def test_a_run_stopped_before_its_first_step_says_so(tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fastest_setting", stopped)
    with pytest.raises(KeyboardInterrupt, match="before the first step; nothing is kept"):
        training.train(task(), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_curves_leave_out_epochs_without_validation():
    drawing = plots.training_curves(
        [row(1, 2.0, None), row(2, 1.5, 0.5), row(3, 1.2, None), row(4, 1.0, 0.5)], "title"
    )
    left, right = drawing.figure.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [
        [[1, 2.0], [2, 1.5], [3, 1.2], [4, 1.0]]
    ]
    assert [line.get_xydata().tolist() for line in right.lines] == [[[2, 50], [4, 50]], [[2, 50]]]
    assert "circle: epoch 2, whose weights are kept, 50.00 %" in drawing.caption
    assert "circle" not in plots.training_curves([row(1, 2.0, None)], "title").caption


def test_no_epoch_gives_no_curves():
    with pytest.raises(ValueError, match=r"at least one finished epoch to draw\. Got none"):
        plots.training_curves([], "title")
