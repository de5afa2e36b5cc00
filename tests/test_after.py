"""Networks that begin after a module: what the model takes beside the input is read by gates."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adjointbackmap as abm
from adjointbackmap.capture.entering import Embedded
from adjointbackmap.exactness.verification import packed, unpacked

IDS = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 1, 2, 8], [9, 2, 0, 0, 0]])
MASK = (IDS > 0).long()


class Reader(nn.Module):
    """Takes token numbers and a mask by name: attention, a mean over the words, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.kinds = nn.Embedding(2, 8)  # an embedding that is no input of the network
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        # as models of language make masks: by the indices of rows and tokens
        rows = torch.arange(mask.shape[0], device=mask.device)
        mask = mask[rows[:, None], torch.arange(mask.shape[1], device=mask.device)[None]]
        x = self.words(ids) + self.kinds(mask)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None])
        weights = mask / mask.sum(1, keepdim=True)  # (N, T)
        return self.fc(F.relu(self.head(x) * weights[:, :, None]).sum(1))


class Filter(nn.Module):
    """Piecewise affine: a convolution over words, ReLU, the maximum over the words that count."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        u = F.relu(self.conv(self.words(ids).transpose(1, 2)))
        return self.fc(u.masked_fill((ids == 0)[:, None], 0.0).max(-1).values)


@pytest.fixture(scope="module")
def reader() -> abm.Network:
    torch.manual_seed(0)
    example = {"ids": IDS, "mask": MASK}
    return abm.trace(Reader().double().eval(), example, after="words", curved="frozen")


@pytest.fixture(scope="module")
def filtered() -> abm.Network:
    torch.manual_seed(1)
    model = Filter().double().eval()
    return abm.trace(model, IDS, after=model.words)


def largest_error(planes: abm.Hyperplanes) -> float:
    return float(((planes.reconstruct() - planes.value).abs() / planes.magnitude()).max())


def test_value_is_the_models_own_and_the_sum_gives_it(reader):
    x = reader.embed({"ids": IDS, "mask": MASK})
    assert x.equal(reader.model.words(IDS))
    planes = abm.hyperplanes(reader, x, "output")
    torch.testing.assert_close(planes.value, reader.model(IDS, MASK).detach(), rtol=0, atol=0)
    assert largest_error(planes) < 1e-14
    assert reader.after == "words"
    assert "words" not in reader.layers


def test_hyperplanes_are_the_gradient_of_the_model_with_detached_gates(reader):
    model = reader.model

    def twin(x: Tensor) -> Tensor:
        x = x + model.kinds(MASK)
        q, k, v = model.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(MASK[:, None] == 0, -torch.inf)
        x = x + scores.softmax(-1).detach() @ v
        weights = MASK / MASK.sum(1, keepdim=True)
        return model.fc(F.relu(model.head(x) * weights[:, :, None]).sum(1))

    x = model.words(IDS).detach().requires_grad_()
    planes = abm.hyperplanes(reader, reader.embed({"ids": IDS, "mask": MASK}), "output")
    for unit in range(2):
        (expected,) = torch.autograd.grad(twin(x)[:, unit].sum(), x)
        torch.testing.assert_close(planes.image[:, unit], expected, rtol=1e-12, atol=1e-14)


def test_piecewise_affine_network_has_the_derivative(filtered):
    x = filtered.embed(IDS)
    planes = abm.hyperplanes(filtered, x, "output")
    assert filtered.is_derivative
    assert largest_error(planes) < 1e-14

    def values(words: Tensor) -> Tensor:
        u = F.relu(filtered.model.conv(words.transpose(1, 2)))
        u = u.masked_fill((IDS[:1] == 0)[:, None], 0.0)
        return filtered.model.fc(u.amax(-1))[0]

    expected = torch.func.jacrev(values)(x[:1].plain)[:, 0]
    torch.testing.assert_close(planes.image[0], expected, rtol=1e-12, atol=1e-14)
    eighth = abm.hyperplanes(filtered, x, "output", scale=1 / 8)
    assert eighth.image.equal(planes.image)  # k does not multiply what the model takes


@pytest.mark.parametrize("curved", ["frozen", "tangent"])
def test_sentences_of_a_batch_are_as_each_alone(reader, curved):
    network = reader.read_as(curved)
    whole = abm.hyperplanes(network, network.embed({"ids": IDS, "mask": MASK}), "output")
    assert largest_error(whole) < 1e-13
    row = {"ids": IDS[:1, :3], "mask": MASK[:1, :3]}  # without its padding
    alone = abm.trace(reader.model, row, after="words", curved=curved)
    planes = abm.hyperplanes(alone, alone.embed(row), "output")
    torch.testing.assert_close(planes.image[0], whole.image[0][:, :3], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(planes.bias[0], whole.bias[0], rtol=1e-12, atol=1e-14)
    assert not whole.image[0][:, 3:].any()


def test_everything_that_takes_images_takes_them(reader, tmp_path):
    x = reader.embed({"ids": IDS, "mask": MASK})
    planes = abm.hyperplanes(reader, x, "output")
    torch.testing.assert_close(planes.reconstruct(x.plain), planes.value)
    abm.audit(reader, x)
    assert all(check.share == 1 for check in abm.verify(reader, x).values())
    blocks = list(abm.iter_hyperplanes(reader, x, "output", "RM0", memory=2000))
    assert len(blocks) > 1  # each has the masks of its own sentences
    values = torch.cat([block.reconstruct().flatten() for block in blocks])
    torch.testing.assert_close(values.sort().values, planes.value.flatten().sort().values)
    operator = abm.operator(reader, x[1], "output")
    abm.dot_test(operator)
    abm.save(tmp_path / "planes", reader, x, layer="output", mode="RM0")
    kept = abm.open(tmp_path / "planes").to_xarray()
    torch.testing.assert_close(torch.tensor(kept["image"].values), planes.image)


def test_ordinary_tensors_have_the_tokens_of_the_example(reader):
    x = reader.embed({"ids": IDS, "mask": MASK})
    ones = reader.embed({"ids": IDS, "mask": torch.ones_like(MASK)})

    def value(images: Tensor) -> Tensor:
        return abm.hyperplanes(reader, images, "output").value

    torch.testing.assert_close(value(x[0].plain), value(x[:1]))
    assert not torch.allclose(value(ones), value(x))
    # sums and slices keep the masks, other results lose them
    torch.testing.assert_close(value((ones + 0)[[2, 0]]), value(ones)[[2, 0]])
    assert isinstance(ones * 2, Embedded)
    assert not isinstance(ones.flip(0), Embedded)
    for joined in (torch.stack([ones[0], ones[2]]), torch.cat([ones[:1], ones[2:]])):
        torch.testing.assert_close(value(joined), value(ones)[[0, 2]])
    torch.testing.assert_close(value(pickle.loads(pickle.dumps(ones))), value(ones))
    pattern = abm.record_pattern(reader, x)
    with pytest.raises(ValueError, match="Got other inputs of the model, such as masks"):
        abm.hyperplanes(reader, ones, "output", pattern=pattern)


def test_copies_and_casts(reader):
    again = copy.deepcopy(reader)
    x = again.embed({"ids": IDS, "mask": MASK})
    ours = abm.hyperplanes(reader, x, "output").image
    torch.testing.assert_close(abm.hyperplanes(again, x, "output").image, ours)
    single = abm.trace(
        copy.deepcopy(reader.model).float(), (IDS, MASK), after="words", curved="frozen"
    )
    words = single.embed((IDS, MASK))
    planes = abm.hyperplanes(single, words, "output", dtype="float64")
    assert planes.value.dtype == torch.float64
    assert largest_error(planes) < 1e-14


def test_workers_have_the_same_network(reader):
    x = reader.embed({"ids": IDS, "mask": MASK})
    again = unpacked(".", packed(reader))
    ours = abm.hyperplanes(again, x, "output").image
    torch.testing.assert_close(ours, abm.hyperplanes(reader, x, "output").image)


def test_errors(reader, filtered):
    with pytest.raises(ValueError, match="kink_distances needs a network whose input is all"):
        abm.kink_distances(filtered, filtered.embed(IDS)[:1])
    model = filtered.model
    with pytest.raises(ValueError, match=r"after must be a module of the model: words, conv, fc"):
        abm.trace(model, IDS, after="wrods")
    with pytest.raises(TypeError, match=r"or a tuple or dict of tensors. Got an empty one"):
        abm.trace(model, (), after="words")
    with pytest.raises(ValueError, match="For token numbers name their embedding with after="):
        abm.trace(model, IDS)
    with pytest.raises(ValueError, match=r"with one N. Got"):
        abm.trace(reader.model, (IDS, MASK[:2]), after="words")
    with pytest.raises(ValueError, match=r"must run on the example. Got"):
        abm.trace(model, IDS.float(), after="words")
    with pytest.raises(ValueError, match=r"must be as the example of the trace, \(N, 5\). Got"):
        filtered.embed(IDS[:, :4])
    plain = abm.trace(nn.Linear(3, 2).eval(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="embed needs a network that begins after a module"):
        plain.embed(IDS)
    twice = nn.Sequential(nn.Embedding(10, 4), shared := nn.Linear(4, 4), shared, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"after='1' must be called once. Got 2 calls"):
        abm.trace(twice.eval(), IDS, after="1")
    several = nn.Sequential(nn.Embedding(10, 4), nn.LSTM(4, 4, batch_first=True))
    with pytest.raises(ValueError, match=r"must give a tensor of floating numbers .* Got tuple"):
        abm.trace(several.eval(), IDS, after="1")
