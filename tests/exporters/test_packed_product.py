"""Products with packed weights in ONNX: the weights of the grid, exactly, at every width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mcsharp_exporters.external_data import ExternalData
from mcsharp_exporters.model_nodes import AccuracyLevel, ModelNodes
from mcsharp_exporters.packed_product import (
    BLOCK_SIZES,
    Operand,
    container,
    pack_in_order,
    packed_products,
)
from onnx import TensorProto, helper

from mcsharp_sdk.quantization.grid import WIDTHS, QuantizedWeight, dequantise


def random_weight(
    rows: int, columns: int, bits: int, block: int, seed: int, size: float = 1.0
) -> QuantizedWeight:
    """Codes, zero points and signs of every kind, and scales of about this size."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // block)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

    scales = (torch.randn(rows, groups, generator=generator) * size).half()
    return QuantizedWeight(integers(rows, columns), scales, integers(rows, groups), bits, block)


def multiply(
    weights: list[QuantizedWeight], x: np.ndarray, level: AccuracyLevel, folder: Path
) -> list[np.ndarray]:
    """x times each matrix, by onnxruntime."""
    with ExternalData(folder / "data") as data:
        graph = ModelNodes(data, "fp32", level)
        operand = Operand(graph, "x", x.shape[1])
        for place, product in enumerate(packed_products(graph, weights)):
            sums = operand.sums(product.block) if product.correction else None
            graph.name_output(product.apply(graph, "x", sums), f"y{place}")
    free: Any = [None, None]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "products",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, x.shape[1]])],
            [
                helper.make_tensor_value_info(f"y{place}", TensorProto.FLOAT, free)
                for place in range(len(weights))
            ],
            initializer=graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"x": x}))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_products_are_those_of_the_dequantised_weights(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    block = data.draw(st.sampled_from(BLOCK_SIZES))
    columns, rows = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 40))
    widths = data.draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4))
    weights = [random_weight(rows, columns, b, block, seed) for seed, b in enumerate(widths)]
    x = np.random.default_rng(0).standard_normal((3, columns)).astype(np.float32)
    found = multiply(weights, x, 0, tmp_path_factory.mktemp("product"))
    for weight, y in zip(weights, found, strict=True):
        expected = x.astype(np.float64) @ dequantise(weight).double().numpy().T
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("bits", WIDTHS)
def test_subnormal_scales_are_read_as_they_are(bits: int, tmp_path: Path) -> None:
    weight = random_weight(30, 300, bits, 64, seed=bits, size=1e-6)
    x = np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)
    (found,) = multiply([weight], x, 0, tmp_path)
    expected = x.astype(np.float64) @ dequantise(weight).double().numpy().T
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", WIDTHS)
def test_level_4_rounds_activations_and_nothing_else(bits: int, block: int, tmp_path: Path) -> None:
    weight = random_weight(64, 576, bits, block, 3)
    # The largest value of each block is 127, so that rounding to 8 bits changes nothing.
    x = np.random.default_rng(0).integers(-126, 127, (4, 576)).astype(np.float32)
    x[:, ::32] = 127.0
    (found,) = multiply([weight], x, 4, tmp_path)
    expected = x.astype(np.float64) @ dequantise(weight).double().numpy().T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@given(
    st.sampled_from([1, 2, 4, 8]), st.lists(st.integers(0, 255), min_size=8, max_size=8), st.data()
)
def test_codes_lie_in_order_the_first_lowest(width: int, codes: list[int], data: Any) -> None:
    codes = [code % 2**width for code in codes]
    packed = pack_in_order(torch.tensor(codes, dtype=torch.uint8), width).tolist()
    number = sum(byte << (8 * place) for place, byte in enumerate(packed))
    assert [(number >> (width * place)) % 2**width for place in range(8)] == codes


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bits", WIDTHS)
def test_containers_hold_every_code(bits: int, level: AccuracyLevel) -> None:
    held = container(bits, 64, level)
    codes = held.factor * np.arange(2**bits) + held.offset
    assert codes.min() >= 0
    assert codes.max() < 2**held.bits
    assert held.bits in (2, 4, 8)
