"""Networks in ONNX: each test skips where onnx2torch is not installed.

docs/networks-of-others.md says how to run them.
"""

import importlib
import os
from pathlib import Path

import numpy as np
import others
import pytest
import torch
import zoo

import adjointbackmap as abm


@pytest.fixture
def onnx():
    """The library, where the converter is there too."""
    onnx = pytest.importorskip("onnx")
    zoo.mend_torchvision()
    pytest.importorskip("onnx2torch")
    pytest.importorskip("onnxruntime")
    return onnx


def small(onnx, operation, *attributes):
    """Convolution, ReLU, an operation on maps of 6 x 6, Flatten of version 1, matrix product."""
    generator = np.random.default_rng(0)
    helper = onnx.helper
    to_tensor = onnx.numpy_helper.from_array
    features = 3 * 3 * 3 if operation.endswith("Pool") else 3 * 6 * 6
    constants = {"w": (3, 2, 3, 3), "b": (3,), "m": (features, 4), "c": (4,)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node(operation, ["relu"], ["moved"], **dict(attributes)),
        helper.make_node("Flatten", ["moved"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["product"]),
        helper.make_node("Add", ["product", "c"], ["y"]),
    ]
    drawn = {name: generator.normal(size=shape) for name, shape in constants.items()}
    numbers = [to_tensor(array.astype("float32"), name) for name, array in drawn.items()]
    ends = [("x", [1, 2, 8, 8]), ("y", [1, 4])]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in ends)
    graph = helper.make_graph(nodes, "small", [x], [y], numbers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=6)


OPERATIONS = {
    "AveragePool": (("kernel_shape", [2, 2]), ("strides", [2, 2])),
    "MaxPool": (("kernel_shape", [2, 2]), ("strides", [2, 2])),
    "LeakyRelu": (("alpha", 0.1),),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_small_file_is_reproduced(onnx, tmp_path, monkeypatch, operation):
    """With its opset raised to one that the converter knows."""
    (tmp_path / "onnx").mkdir()
    onnx.save(small(onnx, operation, *OPERATIONS[operation]), tmp_path / "onnx" / "small.onnx")
    monkeypatch.setitem(others.ONNX, "small", others.Converted("small"))
    found = others.check_converted(tmp_path, "small")
    assert found["error"] <= others.LIMIT
    assert found["conversion"] <= others.CONVERTED
    assert found["opset"] == "8, raised to 13"
    assert found["biases"] == 7


def with_reshape(onnx):
    """A convolution, then a reshape to a batch of one, as files of one image have it."""
    generator = np.random.default_rng(1)
    helper = onnx.helper
    to_tensor = onnx.numpy_helper.from_array
    arrays = {
        "w": generator.normal(size=(3, 2, 3, 3)).astype("float32"),
        "shape": np.array([1, 108]),
        "m": generator.normal(size=(108, 4)).astype("float32"),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Reshape", ["relu", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "m"], ["y"]),
    ]
    numbers = [to_tensor(array, name) for name, array in arrays.items()]
    ends = [("x", [1, 2, 8, 8]), ("y", [1, 4])]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in ends)
    graph = helper.make_graph(nodes, "reshape", [x], [y], numbers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def test_a_batch_of_one_is_made_free(onnx, tmp_path, monkeypatch):
    (tmp_path / "onnx").mkdir()
    onnx.save(with_reshape(onnx), tmp_path / "onnx" / "one.onnx")
    monkeypatch.setitem(others.ONNX, "one", others.Converted("one"))
    found = others.check_converted(tmp_path, "one")  # on ten images at once
    assert found["error"] <= others.LIMIT
    assert found["conversion"] <= others.CONVERTED


def test_a_reshape_that_is_not_of_the_batch_stays(onnx, tmp_path):
    """Channels are moved before the batch, then joined: a size of 0 would keep the channels."""
    helper = onnx.helper
    shape = onnx.numpy_helper.from_array(np.array([1, -1]), "shape")
    nodes = [
        helper.make_node("Transpose", ["x"], ["moved"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["moved", "shape"], ["flat"]),
        helper.make_node("ReduceSum", ["flat"], ["sum"], keepdims=1),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    nodes[2].input.append("axes")
    axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
    x, y = (
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s)
        for n, s in (("x", [1, 3, 4]), ("y", [1, 1]))
    )
    graph = helper.make_graph(nodes, "moved", [x], [y], [shape, axes])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.save(file, tmp_path / "moved.onnx")
    image = torch.rand(1, 3, 4)
    found = abm.onnx.load(tmp_path / "moved.onnx")(image)
    torch.testing.assert_close(found, image.sum().view(1, 1))


def test_a_raised_file_is_compared_with_the_file(onnx, tmp_path, monkeypatch):
    """A change of version that doubles a constant is found."""
    changer = importlib.import_module("onnx.version_converter")
    convert = changer.convert_version

    def wrong(file, version):
        raised = convert(file, version)
        place = next(t for t in raised.graph.initializer if t.name == "c")
        numbers = 2 * onnx.numpy_helper.to_array(place)
        place.CopyFrom(onnx.numpy_helper.from_array(numbers, "c"))
        return raised

    monkeypatch.setattr(changer, "convert_version", wrong)
    onnx.save(small(onnx, "LeakyRelu", ("alpha", 0.1)), tmp_path / "small.onnx")
    with pytest.raises(ValueError, match=r"same network with a newer opset. Got other outputs"):
        abm.onnx.load(tmp_path / "small.onnx")


def test_an_operation_without_a_converter_is_named(onnx, tmp_path):
    helper = onnx.helper
    ends = [("x", [1, 4]), ("y", [1, 4])]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in ends)
    node = helper.make_node("Hardmax", ["x"], ["y"])
    graph = helper.make_graph([node], "hardmax", [x], [y])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.save(file, tmp_path / "hardmax.onnx")
    with pytest.raises(ValueError, match=r"must have a converter in onnx2torch. Got .*Hardmax"):
        abm.onnx.load(tmp_path / "hardmax.onnx")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([("x", [1, 0])], r"must fix the size of its input.*export it with a fixed size"),
        ([("x", [1, 4]), ("z", [1, 4])], r"must be a network of one input. Got 2: x, z"),
    ],
)
def test_inputs_that_do_not_fit(onnx, tmp_path, inputs, message):
    helper = onnx.helper
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in inputs]
    if message.startswith("must fix"):
        infos[0].type.tensor_type.shape.dim[1].dim_param = "n"
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", infos, [y])
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.save(file, tmp_path / "g.onnx")
    with pytest.raises(ValueError, match=message):
        abm.onnx.load(tmp_path / "g.onnx")


def test_what_is_no_onnx_file(onnx, tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"no.onnx must be a network in ONNX"):
        abm.onnx.load(tmp_path / "no.onnx")


def test_one_command_verifies_a_file(onnx, tmp_path, capsys):
    from adjointbackmap.cli import app

    onnx.save(with_reshape(onnx), tmp_path / "one.onnx")
    arguments = ["--onnx", str(tmp_path / "one.onnx"), "--image", "random", "--dtype", "float64"]
    with pytest.raises(SystemExit) as stop:
        app(["verify", *arguments, "--csv"])
    assert stop.value.code in (0, None)
    assert "100" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", others.CHECKS)
def test_every_layer_is_reproduced(onnx, name):
    """Of the networks themselves, where their folder is at hand."""
    folder = Path(os.environ.get(others.FOLDER, ""))
    if others.FOLDER not in os.environ or not folder.is_dir():
        pytest.skip(f"{others.FOLDER} is no folder")
    found = others.CHECKS[name](folder, name)
    assert found["error"] <= others.LIMIT, f"{found['worst']} of {name}: {found['error']:.2e}"
    assert found.get("conversion", 0.0) <= others.CONVERTED
