"""The explorer's server: its bytes are those of the library, and what it refuses."""

import asyncio
import base64
import gzip
import io
import json
import re
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from explorer_session import SHAPE, small_session
from PIL import Image
from starlette.testclient import TestClient

import adjointbackmap as abm
from adjointbackmap import cli
from adjointbackmap.explorer import export, others, panels, whatif
from adjointbackmap.explorer.answers import unpacked
from adjointbackmap.explorer.held import cone_of
from adjointbackmap.explorer.pages import MOST_BYTES
from adjointbackmap.explorer.panels import Place
from adjointbackmap.explorer.running import _listening
from adjointbackmap.explorer.server import Server
from adjointbackmap.explorer.session import Session
from adjointbackmap.explorer.worker import Worker
from adjointbackmap.sources import NetworkOptions


@pytest.fixture(scope="module")
def session():
    """A session with a small network, traced once."""
    return small_session()


@pytest.fixture(scope="module")
def client(session):
    """A browser, as far as the server can see."""
    with TestClient(Server(session, "token").app()) as made:
        yield made


def asked(client, question, body=None, **words):
    """The answer to a question, as head and arrays."""
    words = {"net": "small", "img": "frog", **words}
    address = f"/token/api/{question}"
    answer = (
        client.post(address, params=words, content=body)
        if body
        else client.get(address, params=words)
    )
    assert answer.status_code == 200, answer.text
    return unpacked(answer.content)


@pytest.mark.parametrize(
    ("layer", "mode", "unit"),
    [
        ("conv2", "RM4", (5, 0, 1, 2)),
        ("conv2", "RM3", (1, 2)),
        ("conv2", "RM2", (5, 0, 2)),
        ("conv2", "RM1", (2,)),
        ("fc", "RM0", (3,)),
    ],
)
def test_the_bytes_are_those_of_the_library(session, client, layer, mode, unit):
    """Also the value of the model, and the receipt that sums to it."""
    text = ",".join(map(str, unit))
    head, arrays = asked(client, "unit", layer=layer, mode=mode, unit=text)
    held = session.at("small", "frog")
    planes = abm.hyperplanes(held.network, held.x, layer, mode, units=unit)
    row, column, rows, columns = head["box"]
    found = planes.image[0, :, row : row + rows, column : column + columns]
    assert arrays["H"].tobytes() == found.numpy().tobytes()
    assert arrays["H_b"].tobytes() == planes.bias[0].numpy().tobytes()
    assert head["value"] == float(planes.value)
    assert head["pixels"] + sum(b["adds"] for b in head["biases"]) == pytest.approx(head["sum"])
    assert head["sum"] == pytest.approx(head["value"], abs=1e-5)


@pytest.mark.parametrize(
    ("layer", "mode", "unit"),
    [("fc", "RM0", "3"), ("conv2", "RM2", "5,0,2"), ("conv2", "RM1", "2")],
)
def test_other_methods_are_those_of_the_untouched_model(session, client, layer, mode, unit):
    """Captum's maps are those of autograd, and each says how far it is from the value."""
    pytest.importorskip("captum.attr", reason="Captum is not installed", exc_type=ImportError)
    head, arrays = asked(client, "others", layer=layer, mode=mode, unit=unit)
    held = session.at("small", "frog")
    model = held.network.model
    x = held.x.detach().clone()[None].requires_grad_()
    first = torch.relu(model.conv1(x))
    maps = model.conv2(first)[0]
    found = {
        "fc": lambda: model(x)[0, 3],
        "conv2RM2": lambda: maps[2, 5, 0],
        "conv2RM1": lambda: maps[2].sum(),
    }
    value = found[layer if layer == "fc" else layer + mode]()
    (gradient,) = torch.autograd.grad(value, x)
    assert arrays["Saliency"] == pytest.approx(gradient[0].abs().numpy(), abs=1e-5)
    product = (gradient * x)[0].detach().numpy()
    assert arrays["Input x gradient"] == pytest.approx(product, abs=1e-5)
    for method in head["methods"]:
        away = float(arrays[method["name"]].astype(float).sum()) - float(value.detach())
        if method["name"] != others.OURS:  # whose sum has the biases too
            assert method["off"] == pytest.approx(away, abs=1e-4)
            assert abs(method["off"]) > 1e-2
    assert abs(head["methods"][0]["off"]) < 1e-5


def test_other_methods_take_no_kernel(client):
    """The model does not compute the part of one in-channel alone."""
    words = {"net": "small", "img": "frog", "layer": "conv2", "unit": "5,0,1,2", "mode": "RM4"}
    answer = client.get("/token/api/others", params=words)
    assert answer.status_code == 400
    assert re.search("take RM0, RM1 or RM2. Got RM4", answer.json()["error"])


def test_answers_do_not_wait_for_acknowledgements():
    """A connection to the explorer's socket sends small packets at once."""

    async def delays():
        found = asyncio.get_running_loop().create_future()

        async def accepted(reader, writer):
            own = writer.get_extra_info("socket")
            found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = _listening("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            answer = await asyncio.wait_for(found, 10)
            writer.close()
        return answer

    assert asyncio.run(delays()) == 1


def test_the_page_is_behind_the_token(client):
    """Without it there is nothing, and each answer forbids other servers."""
    assert client.get("/").status_code == 404
    assert client.get("/other/api/start").status_code == 404
    page = client.get("/token/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert client.get("/token/static/../server.py").status_code == 404


def test_layers_know_what_they_read(client):
    """The skip connection ends where it is added; the first layer reads the image alone."""
    found = client.get("/token/api/network", params={"net": "small"}).json()
    before = {layer["name"]: layer["before"] for layer in found["layers"]}
    assert before == {"conv1": None, "conv2": "conv1", "fc": "conv2"}
    assert found["skips"] == [["conv1", "conv2"]]


def test_layers_know_what_a_hyperplane_costs(client):
    """One unit of a first layer of 3 x 3 kernels costs its kernel at least, later ones more."""
    found = client.get("/token/api/network", params={"net": "small"}).json()
    counts = [int(layer["work"].split(" ")[0].replace(",", "")) for layer in found["layers"]]
    assert counts == sorted(set(counts))
    assert counts[0] >= 27


def test_maps_are_what_the_model_computes(session, client):
    """A page of tiles."""
    head, arrays = asked(client, "maps", layer="conv1", start="2", count="3")
    held = session.at("small", "frog")
    module = held.network.model
    assert head == {"start": 2, "of": 6}
    assert arrays["maps"].tobytes() == module.conv1(held.x[None])[0, 2:5].detach().numpy().tobytes()


def test_modes_add_up(client):
    """In-channels sum to the unit, with its own bias."""
    head, arrays = asked(client, "modes", layer="conv2", unit="5,0,2")
    assert [(s["from"], s["into"]) for s in head["sums"]] == [("RM4", "RM2"), ("RM3", "RM1")]
    for found in head["sums"]:
        assert found["difference"] < 1e-5 * found["largest"]
        assert sum(found["values"]) + found["own"] == pytest.approx(found["value"], abs=1e-5)
    assert arrays["RM4 parts"].shape == (6, 3, 5, 3)  # of its field, which the border cuts
    assert arrays["RM3 parts"].shape == (6, *SHAPE)


def gates_differ(session, pixels, plane):
    """Whether a gate in the cone of a unit differs, from patterns of the library."""
    held = whatif.precise(session, Place("small", "frog"))[2]
    network = held.network
    patterns = [
        abm.record_pattern(network, x, dtype=torch.float64) for x in (held.x, pixels.view(SHAPE))
    ]
    cone = cone_of(plane)
    return any(
        not torch.equal(
            *(p.gates[slot][0][(slice(None), slice(None), *(cone[slot] or ()))] for p in patterns)
        )
        for slot in patterns[0].gates
        if slot in cone
    )


def test_a_region_ends_where_a_gate_flips(session, client):
    """Small changes keep the hyperplane exact, large ones flip gates, as the library's patterns."""
    place = Place("small", "frog", "conv2", "5,0,2", "RM2")
    _, own, held = whatif.precise(session, place)
    plane = place.single(held)
    words = {"layer": "conv2", "unit": "5,0,2", "mode": "RM2"}
    seen = set()
    torch.manual_seed(1)
    direction = torch.randn(SHAPE, dtype=torch.float64)
    for size in (0, 1e-6, 1e-3, 1e-2, 0.1, 0.5):
        pixels = own + size * direction
        head, arrays = asked(client, "whatif", pixels.numpy().tobytes(), **words)
        seen.add(head["same"])
        assert head["same"] != gates_differ(session, pixels, plane)
        if head["same"]:
            assert head["old"] == pytest.approx(head["value"], abs=1e-12)
            assert np.array_equal(arrays["before"], arrays["after"])
    assert seen == {True, False}


def test_pixels_outside_the_field_change_nothing(session, client):
    """The state is that of the unit, not of the whole network."""
    own = whatif.precise(session, Place("small", "frog"))[1].clone()
    own[:, 9:, 9:] = 1 - own[:, 9:, 9:]
    words = {"layer": "conv2", "mode": "RM2"}
    far, _ = asked(client, "whatif", own.numpy().tobytes(), unit="2,2,2", **words)
    near, _ = asked(client, "whatif", own.numpy().tobytes(), unit="10,10,2", **words)
    assert (far["same"], near["same"]) == (True, False)
    assert near["count"] == sum(each["count"] for each in near["flipped"])


@pytest.mark.parametrize("question", ["kink", "boundary", "attack"])
def test_moves_reach_what_they_name(client, question):
    """The kink flips one gate of the unit; the attack changes the class."""
    words = {"layer": "conv2", "unit": "5,0,2", "mode": "RM2"}
    _, arrays = asked(client, question, **words)
    pixels = arrays["pixels"].astype(float) + arrays["rest"]
    head, _ = asked(client, "whatif", pixels.tobytes(), **words)
    before, _ = asked(client, "overview")
    if question == "kink":
        assert head["count"] == 1
    if question == "attack":
        assert head["prediction"] != before["prediction"]


def test_the_nearest_kink_is_none_where_values_are_equal(client):
    """Pools whose units are all off have equal values: there, no gate flips."""
    words = {"layer": "fc", "unit": "3", "mode": "RM0"}
    found, arrays = asked(client, "kink", **words)
    assert found["distance"] > 0
    pixels = arrays["pixels"].astype(float) + arrays["rest"]
    head, _ = asked(client, "whatif", pixels.tobytes(), **words)
    assert head["count"] > 0


def test_breakpoints_are_where_gates_flip(session, client):
    """Between two of them the unit's hyperplane stays."""
    _, own, _ = whatif.precise(session, Place("small", "frog"))
    end = own + 0.2 * torch.sin(torch.arange(own.numel(), dtype=torch.float64)).view(SHAPE)
    words = {"layer": "conv2", "unit": "5,0,2", "mode": "RM2"}
    given = {"net": "small", "img": "frog", "regions": "10000", **words}
    answer = client.post("/token/api/breakpoints", params=given, content=end.numpy().tobytes())
    t = answer.json()["t"]
    assert t == sorted(t)
    assert t
    for at, same in ((t[0] * 0.999, True), (t[0] * 1.001, False)):
        pixels = own + at * (end - own)
        head, _ = asked(client, "whatif", pixels.numpy().tobytes(), **words)
        assert head["same"] is same


def test_the_numbers_can_be_taken_away(client):
    """A file of NumPy whose inner product is the value."""
    words = {"net": "small", "img": "frog", "layer": "fc", "unit": "1", "mode": "RM0"}
    found = np.load(io.BytesIO(client.get("/token/api/npz", params=words).content))
    total = (found["H"] * found["x"]).sum() + found["H_b"] @ found["b"]
    assert total == pytest.approx(found["value"], abs=1e-5)


def test_a_picture_can_be_uploaded(client):
    """It is resized to the network's input."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(file, "PNG")
    answer = client.post("/token/api/upload", params={"name": "red.png"}, content=file.getvalue())
    head, arrays = asked(client, "overview", img=answer.json()["id"])
    assert head["words"].startswith("red.png (resized to")
    assert arrays["pixels"][0].min() == 1


@pytest.mark.parametrize(
    ("question", "words", "match"),
    [
        ("unit", {"layer": "none", "unit": "0"}, "A layer must be one of"),
        ("unit", {"layer": "fc", "unit": "x"}, "unit must be numbers"),
        ("unit", {"layer": "conv1", "unit": "0", "mode": "RM2"}, "A unit must be one number for"),
        ("unit", {"layer": "fc", "unit": "0", "img": "/etc/hostname"}, "img must be a sample"),
        ("overview", {"net": "other"}, "net must be one of"),
        ("whatif", {"layer": "fc", "unit": "0"}, "An edited image must be numbers"),
    ],
)
def test_bad_questions_get_one_sentence(client, question, words, match):
    """The status says that the question is wrong."""
    answer = client.get(f"/token/api/{question}", params={"net": "small", "img": "frog", **words})
    assert answer.status_code == 400
    assert match in answer.json()["error"]


def test_bad_pictures_are_refused(client):
    """What is no picture, and what is too large; the server works on."""
    assert client.post("/token/api/upload", content=b"none").status_code == 400
    large = client.post("/token/api/upload", content=bytes(MOST_BYTES + 1))
    assert (large.status_code, large.json()["error"]) == (
        413,
        "A picture must have at most 20 MiB.",
    )
    assert client.get("/token/api/none").status_code == 404
    asked(client, "overview")


def test_first_pictures_must_exist():
    """A path is taken from the command line alone."""
    with pytest.raises(FileNotFoundError, match="--image must be the number or class"):
        Session(picture="/none.png")


def test_late_work_is_dropped():
    """Of three questions of one panel, the second never begins."""
    before = threading.active_count()
    worker = Worker()
    began = []
    wait = threading.Event()
    first = worker.submit("panel", lambda: (began.append(1), wait.wait(10)))
    while not began:
        time.sleep(0.001)
    second = worker.submit("panel", lambda: began.append(2))
    third = worker.submit("panel", lambda: began.append(3))
    wait.set()
    third.result()
    assert first.done()
    assert second.cancelled()
    assert began == [1, 3]
    worker.close()
    assert threading.active_count() == before


def test_what_is_held_is_bounded(session):
    """The least recently used image goes first."""
    small = Session(NetworkOptions(model="small"), memory=1)
    small.loaded = session.loaded
    for picture in ("0", "1", "0"):
        small.at("small", picture)
    assert list(small.held) == [("small", "0")]


def test_one_file_has_what_the_server_answers(session):
    """Its halves are those of the server's bytes, and units that do not fit are left out."""
    html, counts = export.exported(session, "conv2", most=300_000)
    assert 0 < counts["conv2"] < 6 * 144
    assert len(html) < 300_000
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", html.split("<body>")[0])
    text = re.search(r'id="answers">([^<]*)<', html)[1]
    blob = gzip.decompress(base64.b64decode(text))
    stop = 4 + int.from_bytes(blob[:4], "little")
    places = json.loads(blob[4:stop])
    picture = session.first_image
    words = f"net=small&img={picture}&layer=conv2&unit=0%2C1%2C0&mode=RM2"
    first, last = places[f"api/unit?{words}"]
    place = Place("small", picture, "conv2", "0,1,0", "RM2")
    assert blob[stop + first : stop + last] == export.halved(panels.unit_answer(session, place))


def test_one_file_of_few_channels_shows_no_more(session):
    """Its layers have the tiles and the modes that are in it."""
    html, counts = export.exported(session, "conv2", channels=2)
    assert counts == {"conv2": 2 * 144}
    blob = gzip.decompress(base64.b64decode(re.search(r'id="answers">([^<]*)<', html)[1]))
    stop = 4 + int.from_bytes(blob[:4], "little")
    first, last = json.loads(blob[4:stop])["api/network?net=small"]
    about, _ = unpacked(blob[stop + first : stop + last])
    shown = {
        layer["name"]: (layer["tiles"][0], sorted(layer["modes"])) for layer in about["layers"]
    }
    assert shown == {"conv1": (2, ["RM1"]), "conv2": (2, ["RM1", "RM2"]), "fc": (4, ["RM0"])}
    with pytest.raises(ValueError, match=r"--export-channels must be 1 or more\. Got 0"):
        export.exported(session, channels=0)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--model", "nothing:here"], "--model must be module:function"),
        (["--image", "none.png"], "--image must be the number or class"),
        (["vgg7-cifar10", "--port", "PORT"], "--port must be free"),
    ],
)
def test_bad_options_get_one_line(monkeypatch, capsys, words, match):
    """Before a page is opened."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [port if word == "PORT" else word for word in words]
        monkeypatch.setattr(sys, "argv", ["adjointbackmap", "explore", "--no-browser", *given])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2
    assert match in capsys.readouterr().err


def test_words_add_what_the_reader_says():
    """Also of a hidden unit; pictures have no place there."""
    session = Session(NetworkOptions("textcnn-reviews"))
    sentence = "A moving, thoughtful film."
    reader = session.reader("textcnn-reviews")
    with TestClient(Server(session, "token").app()) as client:
        given = {"net": "textcnn-reviews", "img": sentence}
        overview, maps = asked(client, "overview", **given)
        hidden = {"layer": "conv4", "unit": "7,2", "mode": "RM2"}
        for words in (hidden, {"layer": "fc", "unit": "1", "mode": "RM0"}):
            head, arrays = asked(client, "unit", **given, **words)
            unit = tuple(map(int, words["unit"].split(",")))
            reading = reader.read(sentence, words["layer"], unit)
            assert [(w["word"], w["adds"]) for w in head["words"]] == list(reading.words)
            assert head["value"] == reading.value
            assert head["sum"] == pytest.approx(reading.value, abs=1e-12)
            expected = reading.planes.image[0, : len(reading.words)].float().numpy()
            assert arrays["H"].tobytes() == expected.tobytes()
        refused = client.get("/token/api/kink", params={**given, **hidden})
        tile = asked(client, "maps", **given, layer="conv4", start=0, count=1)[1]["maps"]
    assert maps["scores"] == pytest.approx(reader.scores(sentence)[0].numpy(), abs=1e-6)
    assert [token["word"] for token in overview["tokens"]] == [word for word, _ in reading.words]
    assert list(tile.shape) == overview["tiles"]["conv4"] == [1, 100, 6 + 3]
    assert refused.status_code == 400
    assert "reads sentences has no 'kink'" in refused.json()["error"]


def test_networks_of_sentences_take_no_picture(tmp_path):
    """Nor a page in one file."""
    network = NetworkOptions("textcnn-reviews")
    with pytest.raises(ValueError, match="--image must come with a network of pictures"):
        Session(network, picture="frog")
    with pytest.raises(ValueError, match="--export must have a network of pictures"):
        export.exported(Session(network))
