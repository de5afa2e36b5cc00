"""Sentences: words, the movie reviews, two networks, and what words add to their units."""

import gzip
import hashlib
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adjointbackmap as abm
from adjointbackmap import cli, models
from adjointbackmap.text import reviews
from adjointbackmap.text.networks import HEADS, SentenceTransformer, TextCNN
from adjointbackmap.text.words import SPECIAL, Vocabulary, tokenise
from adjointbackmap.training import sentences as training

SENTENCE = "A thoughtful, moving film; it isn't dull."
NAMES = ("textcnn-reviews", "transformer-reviews")
ASSETS = Path(models.__file__).parent / "assets"


@pytest.fixture(scope="module")
def readers():
    return {name: models.reader(name) for name in NAMES}


def test_words_and_punctuation():
    assert tokenise("Isn't it -- 'good'?") == ["is", "n't", "it", "-", "-", "'good", "'", "?"]
    words = Vocabulary.of(["a good film", "a film"], at_least=2)
    assert words.words == (*SPECIAL, "a", "film")
    assert words.tokens(["a film", "good"]).tolist() == [[2, 3], [1, 0]]
    assert words.unknown("a good day") == ["good", "day"]


def test_errors_of_sentences():
    words = Vocabulary((*SPECIAL, "a"))
    with pytest.raises(ValueError, match=r"must have a word or a punctuation mark\. Got '  '"):
        words.tokens("  ")
    with pytest.raises(ValueError, match=r"at most 64 words and punctuation marks\. Got 65"):
        words.tokens("a " * 65)
    with pytest.raises(ValueError, match="Sentences must be at least one"):
        words.tokens([])


def written(folder, texts, monkeypatch):
    """Files of reviews, one compressed and one as the archive has it, with their checksums."""
    folder.mkdir()
    for name, sentences in zip(reviews.FILES, texts, strict=True):
        content = "\n".join(sorted(sentences)).encode()
        monkeypatch.setitem(reviews.SHA256, name, hashlib.sha256(content).hexdigest())
    (folder / f"{reviews.FILES[0]}.gz").write_bytes(gzip.compress("\n".join(texts[0]).encode()))
    (folder / reviews.FILES[1]).write_bytes(" \n".join(texts[1]).encode("cp1252"))


def test_reviews_are_read_from_any_copy(tmp_path, monkeypatch):
    texts = (["dull", "a bore — really"], ["fine café"])
    written(tmp_path / "movie-reviews", texts, monkeypatch)
    found = reviews.load(tmp_path)
    assert found.texts == ("dull", "a bore — really", "fine café")
    assert found.labels == (0, 0, 1)
    assert reviews.load(tmp_path / "movie-reviews").texts == found.texts
    monkeypatch.setenv("ADJOINTBACKMAP_DATA", str(tmp_path))
    assert reviews.load().texts == found.texts
    monkeypatch.setitem(reviews.SHA256, reviews.FILES[1], "0")
    with pytest.raises(ValueError, match=r"rt-polarity\.pos must have the sentences .* fetch it"):
        reviews.load()
    (tmp_path / "movie-reviews" / f"{reviews.FILES[0]}.gz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"must be a gzip file\. Got a damaged one"):
        reviews.load()
    with pytest.raises(FileNotFoundError, match=r"must hold rt-polarity\.neg and rt-polarity\.pos"):
        reviews.load(tmp_path / "nowhere")


def test_folds_are_a_partition():
    texts = tuple(f"sentence {i}" for i in range(400))
    whole = reviews.Sentences(texts, (0, 1) * 200)
    folds = [whole.fold(i) for i in range(reviews.FOLDS)]
    assert sorted(t for fold in folds for t in fold.test.texts) == sorted(texts)
    for fold in folds:
        parts = (fold.train.texts, fold.validation.texts, fold.test.texts)
        assert sorted(sum(parts, ())) == sorted(texts)
        assert 0 < len(fold.validation) < len(fold.train) / 5
    labels = dict(zip(texts, whole.labels, strict=True))
    assert [labels[t] for t in folds[3].test.texts] == list(folds[3].test.labels)
    with pytest.raises(ValueError, match=r"A fold must be from 0 to 9\. Got 10"):
        whole.fold(10)


@pytest.mark.parametrize("build", [TextCNN, SentenceTransformer])
def test_padding_changes_no_score(build):
    torch.manual_seed(0)
    model = build(20).double().eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.embed.weight.data[0] = 0
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 2, 3]])
    whole = model(tokens)
    torch.testing.assert_close(model(tokens[:1, :3])[0], whole[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(model(tokens[1:])[0], whole[1], rtol=1e-12, atol=1e-13)


def test_transformer_is_the_gradient_of_its_twin_with_detached_gates(readers):
    """H_I and H_b equal autograd's gradient of a model written by hand, every gate detached."""
    reader = readers["transformer-reviews"]
    model = models.load("transformer-reviews").double()
    tokens = reader.tokens(SENTENCE)
    is_word = tokens != 0

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        return centred / deviation.detach() * layer.weight + layer.bias

    def heads(x):
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def twin(x):
        x = x + model.places[: x.shape[1]]
        for block in model.blocks:
            q, k, v = map(heads, block.qkv(norm(block.norm1, x)).chunk(3, -1))
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            gate = scores.masked_fill(~is_word[:, None, None], -torch.inf).softmax(-1).detach()
            x = x + block.out((gate @ v).transpose(1, 2).reshape(x.shape))
            u = block.up(norm(block.norm2, x))
            x = x + block.down(u * (0.5 * (1 + torch.erf(u / math.sqrt(2)))).detach())
        words = norm(model.norm, x) * is_word[..., None]
        return model.fc(words.sum(1) / is_word.sum(1, keepdim=True))

    x = model.embed(tokens).detach().requires_grad_()
    planes = abm.hyperplanes(reader.network, reader.embed(SENTENCE), "output", dtype="float64")
    parameters = dict(model.named_parameters())
    names = [n for n in reader.network.biases.names if n in parameters]
    assert len(names) == len(reader.network.biases.names)
    for unit in range(2):
        value = twin(x)[0, unit]
        gradients = torch.autograd.grad(value, [x, *(parameters[n] for n in names)])
        scale = float(planes.magnitude()[0, unit])
        torch.testing.assert_close(value, planes.value[0, unit], rtol=0, atol=1e-12 * scale)
        torch.testing.assert_close(planes.image[0, unit], gradients[0][0], rtol=1e-9, atol=1e-12)
        for name, expected in zip(names, gradients[1:], strict=True):
            ours = planes.bias[0, unit][reader.network.biases[name].slice]
            torch.testing.assert_close(ours, expected.flatten(), rtol=1e-9, atol=1e-12)
    assert float(((planes.reconstruct() - planes.value).abs() / planes.magnitude()).max()) < 1e-12


def test_cnn_has_the_derivative(readers):
    reader = readers["textcnn-reviews"]
    model = models.load("textcnn-reviews").double()
    is_word = reader.tokens(SENTENCE) != 0

    def scores(x: Tensor) -> Tensor:
        features = []
        for width in (3, 4, 5):
            u = F.relu(model.get_submodule(f"conv{width}")(x[None].transpose(1, 2)))
            has_word = F.pad(is_word[:, None], (width - 1, 0), value=True)
            features.append((u * has_word).amax(-1))
        return model.fc(torch.cat(features, 1))[0]

    assert reader.network.is_derivative
    x = model.embed(reader.tokens(SENTENCE))[0].detach()
    planes = abm.hyperplanes(reader.network, reader.embed(SENTENCE), "output", dtype="float64")
    torch.testing.assert_close(scores(x), planes.value[0], rtol=0, atol=1e-12)
    expected = torch.func.jacrev(scores)(x)
    torch.testing.assert_close(planes.image[0], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_words_and_biases_sum_to_the_value(readers, name):
    reader = readers[name]
    reading = reader.read(SENTENCE)
    assert [word for word, _ in reading.words] == tokenise(SENTENCE)
    assert abs(reading.error) < 1e-12
    score = reader.scores(SENTENCE)[0]
    assert reading.value == pytest.approx(float(score.max()), abs=1e-5)
    assert reading.predicted == reader.classes[int(score.argmax())]
    assert all(word in reading.html() for word in tokenise(SENTENCE) if word.isalpha())
    assert ("frozen gates" in repr(reading)) == (name == "transformer-reviews")
    less = int(score.argmin())
    other = reader.read(SENTENCE, units=(less,))
    # both classes start at zero and have opposite gradients
    assert other.value == pytest.approx(-reading.value, abs=1e-4)
    assert other.unit == f"output, {reader.classes[less]}"


def test_any_unit_of_any_layer(readers):
    reader = readers["transformer-reviews"]
    reading = reader.read("good film zzzz", "blocks.1.up", (2, 7))
    with torch.no_grad():
        model = reader.model
        kept = []
        handle = model.blocks[1].up.register_forward_hook(lambda m, i, o: kept.append(o))
        model(reader.vocabulary.tokens("good film zzzz"))
        handle.remove()
    assert reading.value == pytest.approx(float(kept[0][0, 2, 7]), abs=1e-5)
    assert abs(reading.error) < 1e-12
    assert reading.unknown == ("zzzz",)
    with pytest.raises(ValueError, match=r"units must be one unit of 'blocks\.1\.up'"):
        reader.read("good", "blocks.1.up")
    with pytest.raises(ValueError, match=r"units must be one unit\. Got 2"):
        reader.read("good", units=(slice(2),))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_networks_are_small_and_as_good_as_promised(name):
    card = models.card(name)
    files = [ASSETS / f"{name}.{ending}" for ending in ("safetensors", "words.txt", "json")]
    assert sum(file.stat().st_size for file in files) < 3e6
    assert len(card["accuracies of all folds"]) == reviews.FOLDS
    assert card["mean accuracy"] >= {"textcnn": 0.75, "transformer": 0.74}[card["network"]]
    assert card["test accuracy"] == card["accuracies of all folds"][card["fold"]]


def test_shipped_networks_have_the_accuracy_of_their_cards(readers):
    try:
        test = reviews.load().fold(0).test
    except (ConnectionError, FileNotFoundError):
        pytest.skip("the movie reviews are not there: set ADJOINTBACKMAP_DATA")
    for name, reader in readers.items():
        tokens = reader.vocabulary.tokens(test.texts)
        share = training.accuracy(reader.model, tokens, torch.tensor(test.labels))
        assert share == models.card(name)["test accuracy"]


def test_page_has_the_figures_of_the_cards():
    page = (Path(__file__).parents[1] / "docs" / "text.md").read_text()
    for name in NAMES:
        card = models.card(name)
        mean = f"{100 * card['mean accuracy']:.1f} %"
        deviation = f"{100 * card['standard deviation']:.1f}"
        (row,) = (
            line
            for line in page.splitlines()
            if line.startswith(f"| `{name}` | con") or (line.startswith(f"| `{name}` | two"))
        )
        assert f"| {mean}, deviation {deviation} | {100 * card['test accuracy']:.2f} % |" in row


def test_names_and_words():
    assert models.names("sentences") == NAMES
    assert models.names("all") == tuple(sorted((*models.names(), *NAMES)))
    assert not set(NAMES) & set(models.names())
    with pytest.raises(ValueError, match="takes must be images, sentences or all"):
        models.names("words")
    with pytest.raises(ValueError, match="A network of sentences must be one of textcnn-reviews"):
        models.reader("vgg7-cifar10")


@pytest.mark.parametrize("network", ["textcnn", "transformer"])
def test_training_continues_with_the_fold_that_was_not_finished(tmp_path, monkeypatch, network):
    positive = [f"good number {i}" for i in range(60)]
    negative = [f"bad number {i}" for i in range(60)]
    written(tmp_path / "movie-reviews", (negative, positive), monkeypatch)
    recipe = training.SentenceRecipe(epochs=2, batch=10)
    task = training.SentenceTask(network, recipe=recipe, folds=2)
    out = tmp_path / "run"
    card = training.train(task, out, tmp_path)
    assert len(card["accuracies of all folds"]) == 2
    assert (
        hashlib.sha256((out / f"{network}-reviews.words.txt").read_bytes()).hexdigest()
        == (card["words sha256"])
    )
    (out / "fold-1.json").unlink()
    steps = []
    again = training.train(task, out, tmp_path, report=lambda now: steps.append(now.step))
    assert again["accuracies of all folds"] == card["accuracies of all folds"]
    assert min(steps) > steps[-1] // 2  # the first fold was kept
    other = training.SentenceTask(network, seed=1, recipe=recipe, folds=2)
    with pytest.raises(ValueError, match="must be empty or hold a run of seed 1"):
        training.train(other, out, tmp_path)
    with pytest.raises(ValueError, match="Epochs, batch and at_least must be at least 1"):
        training.SentenceRecipe(epochs=0)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line; its status and what it printed."""

    def call(line):
        monkeypatch.setattr(sys, "argv", ["adjointbackmap", *shlex.split(line)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_command_shows_words_biases_and_the_sum(run, tmp_path):
    page = tmp_path / "words.html"
    status, out, err = run(f'text "a moving film" --network textcnn-reviews --json --html {page}')
    assert status == 0
    words, biases, (total,) = (table["rows"] for table in json.loads(out))
    assert [row["word"] for row in words] == ["a", "moving", "film"]
    added = sum(float(row["adds"]) for row in words) + sum(float(row["add"]) for row in biases)
    assert added == pytest.approx(float(total["value of the model"]), abs=1e-5)
    assert "says positive" in err
    assert "moving" in page.read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('text ""', "must have a word or a punctuation mark"),
        ("text good --network vgg7-cifar10", "A network of sentences must be one of"),
        ("layers textcnn-reviews", "Got textcnn-reviews, which reads sentences"),
        ("train textcnn", "adjointbackmap train textcnn reviews"),
        ("train vgg7 reviews", "adjointbackmap train vgg7 cifar10"),
        ("train textcnn reviews --l1 1", r"Got --l1: leave it out"),
        ("train textcnn reviews --preset study", "--preset must come with a network of images"),
    ],
)
def test_bad_input_is_one_line(run, line, message):
    status, _, err = run(line)
    assert status == 2
    assert message in " ".join(err.split())
