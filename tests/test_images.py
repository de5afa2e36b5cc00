"""Pictures of any kind become inputs, compared pixel by pixel with Pillow and arithmetic."""

import copy
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import adjointbackmap as abm
from adjointbackmap.engine.pattern import check_tensor
from adjointbackmap.images import PRESETS, Preprocessing
from adjointbackmap.images.preprocessing import checked_numbers, checked_size, resized_size

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def colours(height=30, width=41, seed=0):
    """A picture of random colours, ``(H, W, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def written(pixels, format="PNG", **options):
    """A picture as a file in memory."""
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(file, format, **options)
    file.seek(0)
    return file


def unit(pixels):
    """``(H, W, C)`` of uint8 as ``(1, C, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.moveaxis(pixels, -1, 0).copy())[None].float() / 255


# kinds of sources


def test_path_file_picture_array_and_tensor_give_the_same(tmp_path):
    pixels = colours()
    path = tmp_path / "photo.png"
    path.write_bytes(written(pixels).getvalue())
    first = torch.from_numpy(pixels).permute(2, 0, 1)
    sources = [path, str(path), written(pixels), Image.fromarray(pixels), pixels]
    sources += [pixels.transpose(2, 0, 1), pixels[None], first, first[None], first / 255]
    for source in sources:
        assert torch.equal(abm.image(source), unit(pixels))
        assert torch.equal(abm.image(source).pixels, unit(pixels)[0])


def test_channels_are_last_in_an_array_and_first_in_a_tensor_where_both_fit():
    both = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert abm.image(both).shape == (1, 3, 3, 5)
    assert abm.image(torch.from_numpy(both)).shape == (1, 3, 5, 3)


def test_exif_orientation_turns_the_picture():
    pixels = colours()
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned: to see it upright, turn it by 90 degrees clockwise
    x = abm.image(written(turned, "PNG", exif=exif))
    assert torch.equal(x, unit(np.rot90(pixels, -1)))
    assert x.preparation.original == (41, 30)
    assert x.preparation.notes == ("turned upright (EXIF orientation 6)",)


def test_palette_becomes_colours_and_its_transparency_is_on_white():
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    palette = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette(palette.flatten().tolist())
    assert torch.equal(abm.image(written(picture)), unit(palette[indices]))
    x = abm.image(written(picture, transparency=1))
    palette[1] = 255
    assert torch.equal(x, unit(palette[indices]))
    assert x.preparation.notes == ("transparent parts on white",)


@pytest.mark.parametrize("kind", ["PIL", "uint8", "float"])
def test_opacity_mixes_with_white(kind):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 7, 4), dtype=np.uint8)
    source = {"PIL": Image.fromarray(pixels), "uint8": pixels, "float": pixels / 255}[kind]
    opacity = pixels[..., 3:] / 255
    expected = pixels[..., :3] / 255 * opacity + (1 - opacity)
    found = abm.image(source)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-6 if kind == "float" else 1.01 / 255
    )


def test_opaque_pictures_with_an_alpha_channel_are_only_colours():
    pixels = np.dstack([colours(), np.full((30, 41), 255, np.uint8)])
    for source in (pixels, Image.fromarray(pixels), pixels / 255):
        x = abm.image(source)
        torch.testing.assert_close(x.detach(), unit(pixels[..., :3]), rtol=0, atol=1e-7)
        assert x.preparation.notes == ()


def test_grey_with_opacity_stays_grey():
    pixels = np.stack([np.full((2, 3), 100), np.full((2, 3), 0)], -1).astype(np.uint8)
    x = abm.image(Image.fromarray(pixels, "LA"), channels=1)
    assert torch.equal(x, torch.ones(1, 1, 2, 3))


def test_grey_is_repeated_or_kept():
    grey = colours()[..., 0]
    assert torch.equal(abm.image(written(grey)), unit(grey[..., None]).expand(1, 3, 30, 41))
    assert torch.equal(abm.image(written(grey), channels=1), unit(grey[..., None]))
    assert abm.image(grey, mean=(0.5,), channels=1).shape == (1, 1, 30, 41)


def test_colours_become_grey_by_their_brightness():
    pixels = colours()
    expected = (pixels @ [0.299, 0.587, 0.114]) / 255
    for source, tolerance in ((pixels, 0.51 / 255), (pixels / 255, 1e-6)):
        x = abm.image(source, channels=1)
        np.testing.assert_allclose(x[0, 0].numpy(), expected, rtol=0, atol=tolerance)


def test_sixteen_bits_are_kept():
    levels = np.array([[0, 1, 300], [65534, 65535, 32768]], np.uint16)
    for source in (written(levels), levels, Image.fromarray(levels)):
        x = abm.image(source, channels=1)
        assert torch.equal(x[0, 0], torch.from_numpy(levels.astype(np.float32) / 65535))
    assert x.preparation.notes == ("16 bits",)
    with pytest.raises(ValueError, match=r"from 0 to 65535. Got 0 to 70000: scale them"):
        abm.image(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_masks_other_colours_and_animations_are_read():
    mask = np.array([[True, False]])
    assert abm.image(mask, channels=1).tolist() == [[[[1.0, 0.0]]]]
    assert abm.image(Image.fromarray(mask), channels=1).tolist() == [[[[1.0, 0.0]]]]
    ink = Image.fromarray(colours()).convert("CMYK")
    assert torch.equal(abm.image(ink), unit(np.asarray(ink.convert("RGB"))))
    frames = [Image.fromarray(np.full((4, 4), n, np.uint8)) for n in (10, 200)]
    moving = written(frames[0], "GIF", save_all=True, append_images=frames[1:])
    x = abm.image(moving)
    assert torch.equal(x, torch.full((1, 3, 4, 4), 10 / 255))
    assert x.preparation.notes == ("first of 2 frames",)


# size, crop, normalisation


def reference(pixels, resize, crop, mean=(0, 0, 0), std=(1, 1, 1)):
    """Resize, CenterCrop, ToTensor and Normalize of torchvision for a PIL image, written out."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    size = [int(resize * side / short) for side in (height, width)]
    picture = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    top, left = (round((a - b) / 2.0) for a, b in zip(size, crop, strict=True))
    picture = picture.crop((left, top, left + crop[1], top + crop[0]))
    x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(part, dtype=torch.float32).view(3, 1, 1) for part in (mean, std))
    return x.sub(mean).div(std)[None]


@pytest.mark.parametrize("shape", [(512, 600), (333, 257), (100, 91), (256, 256)])
def test_imagenet_is_what_torchvision_does(shape):
    pixels = colours(*shape)
    x = abm.image(pixels, preprocess="imagenet")
    assert torch.equal(x, reference(pixels, 256, (224, 224), *IMAGENET))
    torchvision = SimpleNamespace(  # what weights.transforms() has
        crop_size=[224],
        resize_size=[232],
        mean=IMAGENET[0],
        std=IMAGENET[1],
        interpolation=SimpleNamespace(value="bilinear"),
    )
    x = abm.image(pixels, preprocess=torchvision)
    assert torch.equal(x, reference(pixels, 232, (224, 224), *IMAGENET))


@pytest.mark.parametrize("size", [(20, 20), (20, 10), (10, 20), (64, 33)])
@pytest.mark.parametrize("shape", [(30, 41), (41, 30), (20, 20)])
def test_crop_is_as_large_as_it_can_be(shape, size):
    """The resized picture covers the crop, and in one direction it has no pixel to spare."""
    x = abm.image(colours(*shape), size=size)
    assert x.shape[2:] == size
    spare = np.subtract(x.preparation.resized, size)
    assert spare.min() == 0
    assert x.preparation.resized == resized_size(shape, Preprocessing(size))


def test_arguments_replace_parts_of_a_preset():
    pixels = colours()
    x = abm.image(pixels, preprocess="cifar10", size=16, mean=0, std=1)
    assert torch.equal(x, reference(pixels, 16, (16, 16)))
    y = abm.image(pixels, size=16, preprocess="cifar10")
    mean, std = (
        torch.tensor(p).view(3, 1, 1) for p in (PRESETS["cifar10"].mean, PRESETS["cifar10"].std)
    )
    assert torch.equal(y, (x - mean) / std)
    torch.testing.assert_close(y.pixels, x[0], rtol=0, atol=1e-6)


def test_floating_pictures_are_resized_as_bytes_are():
    pixels = np.repeat(np.repeat(colours(4, 5), 8, 0), 8, 1)
    found = abm.image(pixels / 255, size=16)
    torch.testing.assert_close(found, abm.image(pixels, size=16).detach(), rtol=0, atol=1 / 255)


def test_boxes_are_found_in_the_photos_own_pixels():
    """A bright square of the photo is where the brightest pixels of the input say."""
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[240:280, 320:360] = 255
    x = abm.image(pixels, size=50, resize=100)
    rows, columns = torch.nonzero(x[0, 0] > 0.5, as_tuple=True)
    box = (
        rows.min(),
        columns.min(),
        rows.max() + 1 - rows.min(),
        columns.max() + 1 - columns.min(),
    )
    assert x.preparation.in_original([int(n) for n in box]) == (240, 320, 40, 40)


# what is refused


REFUSED = {
    "type": (5, {}, TypeError, r"path, a binary file, a PIL image or an array. Got int"),
    "address": ("https://x.org/a.png", {}, ValueError, "must be a local file. Got https:"),
    "missing": ("none.png", {}, FileNotFoundError, "Got none.png, which is no file: check"),
    "folder": (".", {}, FileNotFoundError, "which is a folder"),
    "text": (io.BytesIO(b"hello"), {}, ValueError, "format that Pillow reads. Got a BytesIO"),
    "dtype": (np.zeros((4, 4), np.int64), {}, ValueError, "uint8, uint16, bool.*Got int64"),
    "shape": (np.zeros((2, 4, 4, 3)), {}, ValueError, r"one picture.*Got \(2, 4, 4, 3\)"),
    "range": (np.full((4, 4), 255.0), {}, ValueError, "from 0 to 1. Got 255 to 255: divide"),
    "nan": (np.full((4, 4), np.nan), {}, ValueError, "from 0 to 1. Got nan"),
    "size": (colours(), {"size": 0}, ValueError, r"size must be a number.*Got 0"),
    "resize": (colours(), {"resize": 0}, ValueError, "resize must be a number.*Got 0"),
    "small": (colours(), {"size": 9, "resize": 8}, ValueError, r"at least the 9 x 9.*Got 8 x 10"),
    "mean": (colours(), {"mean": (1, 2, 3)}, ValueError, "mean must be that of pixels.*by 255"),
    "means": (colours(), {"mean": (0.1, 0.2)}, ValueError, "channels must be 1 or 3. Got 2"),
    "std": (colours(), {"std": (1, 0, 1)}, ValueError, "std must be positive numbers"),
    "fewer": (
        colours(),
        {"std": (1, 1, 1), "channels": 1},
        ValueError,
        "for each of 1 channels.*3",
    ),
    "preset": (colours(), {"preprocess": "mnist"}, ValueError, "imagenet, cifar10, none.*'mnist'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_picture_is_refused_in_a_sentence(why):
    source, options, kind, message = REFUSED[why]
    with pytest.raises(kind, match=message):
        abm.image(source, **options)


def test_sizes_and_means_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"size must be.*Got \(1, 2, 3\): give such as 224"):
        checked_size((1, 2, 3))
    with pytest.raises(ValueError, match=r"mean must be numbers, one for each channel\. Got 'x'"):
        checked_numbers("mean", "x")


def test_damaged_files_are_refused():
    cut = io.BytesIO(written(colours()).getvalue()[:900])
    with pytest.raises(ValueError, match=r"must be complete and readable\. Got a BytesIO"):
        abm.image(cut)
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, bicubic, nearest"):
        Preprocessing(interpolation="lanczos")


@pytest.mark.parametrize("source", ["photo.png", Image.new("RGB", (8, 8)), colours()])
def test_bare_pictures_are_refused_with_the_function_to_call(source):
    with pytest.raises(TypeError, match=r"Got \w+: convert a picture with adjointbackmap.image"):
        check_tensor(source)


# what takes a prepared image


@pytest.fixture(scope="module")
def network():
    """A small network on 12 x 12 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
        return abm.trace(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 12, 12))


def test_a_prepared_image_is_taken_wherever_a_tensor_is(network):
    x = abm.image(colours(), size=12, preprocess="cifar10")
    plain = x.detach()
    model = network.model
    assert type(plain) is torch.Tensor
    assert type(x * 2) is torch.Tensor
    assert type(model(x)) is torch.Tensor
    assert list(abm.trace(model, x).layers) == list(network.layers)
    planes = abm.hyperplanes(network, x, "3")
    assert torch.equal(planes.image, abm.hyperplanes(network, plain, "3").image)
    assert torch.equal(planes.reconstruct(x), planes.reconstruct())
    adapter = abm.captum.AdjointBackMap(model)
    assert torch.equal(adapter.attribute(x, target=2), adapter.attribute(plain, target=2))
    torch.testing.assert_close(adapter.attribute(x, target=2), planes.image[:, 2])
    found = abm.operator(network, x, "3").adjoint(torch.eye(5)[None])
    torch.testing.assert_close(found[0], planes.image)
    assert max(abm.audit(network, x).values()) < 1e-5


def test_copies_and_pickles_keep_the_photo():
    x = abm.image(colours(), size=12, mean=0.5)
    for again in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(again, x)
        assert again.preparation == x.preparation
        assert np.array_equal(again.original, x.original)


def test_a_prepared_image_shows_no_numbers():
    x = abm.image(colours(), size=12, preprocess="cifar10")
    assert "tensor(" not in repr(x)
    assert repr(x).splitlines()[:2] == [
        "PreparedImage 1 x 3 x 12 x 12 float32",
        "  picture: 30 x 41",
    ]
    assert "data:image/png" in x._repr_html_()
