"""Networks in ONNX: each test skips where onnx2torch is not installed.

docs/networks-of-others.md says how to run them.
"""

import os
from pathlib import Path

import numpy as np
import others
import pytest
import zoo


@pytest.fixture
def onnx():
    """The library, where the converter is there too."""
    onnx = pytest.importorskip("onnx")
    zoo.mend_torchvision()
    pytest.importorskip("onnx2torch")
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
    monkeypatch.setitem(others.ONNX, "small", others.Converted("small", (2, 8, 8), opset=9))
    found = others.check_converted(tmp_path, "small")
    assert found["error"] <= others.LIMIT
    assert found["conversion"] <= others.CONVERTED
    assert found["opset"] == "8, raised to 9"
    assert found["biases"] == 7


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
