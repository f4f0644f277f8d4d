"""Kernels against float64, and the choice between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcsharp_sdk.errors import InputError
from mcsharp_sdk.kernels import (
    KERNELS,
    Case,
    PackedMatrix,
    PackedStack,
    choose_kernel,
    integer_dot,
    linear,
    packed_linear,
    packed_linears,
    support,
    threads,
)
from mcsharp_sdk.kernels.dequantise import dequantise_into
from mcsharp_sdk.quantization.grid import (
    WIDTHS,
    PackedWeight,
    QuantizedWeight,
    dequantise,
    dequantise_packed,
    group_count,
    pack_weight,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

compiled_only = pytest.mark.skipif(
    bool(support.missing_support()), reason=support.missing_support() or "kernels can be compiled"
)


def random_stack(
    count: int, rows: int, columns: int, bits: int, group: int, seed: int = 0, size: float = 0.1
) -> tuple[PackedStack, Tensor]:
    """Random packed matrices with scales of about this size, and what they are in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(columns, group)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)

    signs = torch.randint(0, 2, (count, rows, groups), generator=generator) * 2 - 1
    scales = (torch.rand(count, rows, groups, generator=generator) + 0.5) * size * signs
    weight = QuantizedWeight(
        codes(count, rows, columns), scales.half(), codes(count, rows, groups), bits, group
    )
    return PackedStack(pack_weight(weight), bits, group, columns), dequantise(weight).double()


def random_matrix(rows: int, columns: int, bits: int, group: int) -> tuple[PackedMatrix, Tensor]:
    stack, exact = random_stack(1, rows, columns, bits, group)
    return stack.matrix(0), exact[0]


def replicas(matrix: PackedMatrix) -> PackedStack:
    """A stack of the same matrix twice."""
    one = matrix.stack()
    parts = (one.weight.qweight, one.weight.scales, one.weight.zeros)
    return replace(one, weight=PackedWeight(*(torch.cat([part, part]) for part in parts)))


def dense(stack: PackedStack) -> Tensor:
    """The first matrix of a stack in float64."""
    form = {"bits": stack.bits, "group_size": stack.group_size, "columns": stack.columns}
    packed = stack.matrix(0).weight
    return dequantise_packed(
        packed.qweight, packed.scales, packed.zeros, dtype=torch.float64, **form
    )


def case_of(stack: PackedStack | PackedMatrix, tokens: int, dtype: torch.dtype) -> Case:
    return Case(stack.rows, stack.columns, stack.bits, stack.group_size, tokens, dtype, "cpu")


def by_experts(x: Tensor, exact: Tensor, slots: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The products in float64, one matrix after the other."""
    parts = x.double().split(list(counts))
    found = [part @ exact[slot].t() for slot, part in zip(slots, parts, strict=True)]
    return torch.cat(found) if found else x.new_empty(0, exact.shape[1], dtype=torch.float64)


ROUNDED_OFF = {"int8_dot": 1e-2}


def assert_close(
    found: Tensor, x: Tensor, exact: Tensor, expected: Tensor, kernel: str = ""
) -> None:
    """Within what the dtype rounds off, and integers for activations: against |x| times |W|."""
    size = x.double().norm(dim=-1, keepdim=True) * exact.norm(dim=-1).max()
    unit = max(ROUNDED_OFF.get(kernel, 1e-4), 2 * torch.finfo(x.dtype).eps)
    assert found.dtype == x.dtype
    assert ((found.double() - expected).abs() <= unit * size + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-5, 1e-7])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_subnormal_scales_are_read_as_they_are(
    kernel: str, bits: int, size: float, dtype: torch.dtype
) -> None:
    for rows, columns, group in ((7, 33, 16), (17, 300, 64), (130, 512, 128), (66, 512, 384)):
        stack, exact = random_stack(2, rows, columns, bits, group, size=size)
        assert (stack.weight.scales.abs() < torch.finfo(torch.float16).smallest_normal).all()
        if KERNELS[kernel].refuses(case_of(stack, 40, dtype)):
            continue
        x = torch.randn(45, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = KERNELS[kernel].run(x, stack, [0, 1], [5, 40])
        expected = by_experts(x, exact, [0, 1], [5, 40])
        unit = max(ROUNDED_OFF.get(kernel, 1e-4), 2 * torch.finfo(dtype).eps)
        assert (found.double() - expected).norm() <= unit * expected.norm()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bits=st.sampled_from(WIDTHS),
    rows=st.sampled_from([1, 7, 17, 128, 130]),
    columns=st.sampled_from([1, 33, 128, 192, 300, 512]),
    group=st.sampled_from([16, 32, 64, 128, 384]),
    counts=st.lists(st.integers(0, 17), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_a_kernel_agrees_with_float64(
    kernel: str,
    bits: int,
    rows: int,
    columns: int,
    group: int,
    counts: list[int],
    dtype: torch.dtype,
) -> None:
    stack, exact = random_stack(3, rows, columns, bits, group)
    if KERNELS[kernel].refuses(case_of(stack, max(counts), dtype)):
        return
    slots = [slot for slot, count in enumerate(counts) if count]
    used = [counts[slot] for slot in slots]
    x = torch.randn(sum(used), columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    if not used:
        return
    found = KERNELS[kernel].run(x, stack, slots, used)
    assert_close(found, x, exact.flatten(0, 1), by_experts(x, exact, slots, used), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(130, 192, 64), (33, 384, 128)])
def test_many_tokens_agree_with_float64(kernel: str, rows: int, columns: int, group: int) -> None:
    stack, exact = random_stack(2, rows, columns, 3, group)
    counts = [131, 262]
    if reason := KERNELS[kernel].refuses(case_of(stack, 262, torch.float32)):
        pytest.skip(reason)
    x = torch.randn(sum(counts), columns, generator=torch.Generator().manual_seed(1))
    found = KERNELS[kernel].run(x, stack, [0, 1], counts)
    assert_close(found, x, exact.flatten(0, 1), by_experts(x, exact, [0, 1], counts), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_that_was_cast_as_a_whole_gives_the_same_products(kernel: str) -> None:
    stack, _ = random_stack(2, 64, 256, 3, 64)
    if KERNELS[kernel].refuses(case_of(stack, 4, torch.float32)):
        return
    cast = replace(stack, weight=replace(stack.weight, scales=stack.weight.scales.float()))
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    found = KERNELS[kernel].run(x, cast, [1], [4])
    torch.testing.assert_close(found, KERNELS[kernel].run(x, stack, [1], [4]))


@compiled_only
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_dequantisation_gives_the_bits_of_the_definition(
    bits: int, dtype: torch.dtype
) -> None:
    for rows, columns, group in ((200, 300, 32), (129, 512, 128), (64, 640, 256)):
        stack, exact = random_stack(2, rows, columns, bits, group)
        padded = -(-columns // 32) * 32
        scratch = torch.empty(rows, padded, dtype=dtype)
        dequantise_into(scratch, stack, 1, 0, rows)
        expected = exact[1].float().to(dtype)
        assert torch.equal(scratch[:, :columns], expected)


@compiled_only
@pytest.mark.parametrize("bits", [bits for bits in WIDTHS if bits < 8 or support.has_vnni()])
def test_integer_products_of_float32_are_far_closer_than_bfloat16(bits: int) -> None:
    matrix, exact = random_matrix(256, 1024, bits, 128)
    x = torch.randn(5, 1024)
    x[:, 7] *= 100  # as activations have it: one column dwarfs the others of its group
    expected = x.double() @ exact.t()
    found = KERNELS["integer_dot"].run(x, matrix.stack(), [0], [5])
    assert (found - expected).norm() / expected.norm() < 2e-4


@pytest.mark.skipif(
    bool(support.missing_support()) or not support.has_wide_vnni(),
    reason="8-bit activations need a processor with AVX-512 VNNI",
)
@pytest.mark.parametrize("bits", WIDTHS)
def test_eight_bits_are_what_several_tokens_are_rounded_to(bits: int) -> None:
    matrix, exact = random_matrix(256, 1024, bits, 128)
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ exact.t()
    found = KERNELS["int8_dot"].run(x, matrix.stack(), [0], [5])
    assert 1e-3 < (found - expected).norm() / expected.norm() < 1e-2
    alone = [KERNELS[name].run(x[:1], matrix.stack(), [0], [1]) for name in integer_dot.BYTES]
    assert torch.equal(*alone)


@pytest.mark.skipif(
    bool(support.missing_support()) or not support.has_wide_vnni(),
    reason="8-bit activations need a processor with AVX-512 VNNI",
)
def test_no_token_of_many_is_left_over() -> None:
    matrix, exact = random_matrix(32, 256, 2, 128)
    x = torch.randn(129, 256, generator=torch.Generator().manual_seed(1))
    off = KERNELS["int8_dot"].run(x, matrix.stack(), [0], [129]) - x.double() @ exact.t()
    assert (off.norm(dim=1) > 1e-4 * x.norm(dim=1)).all()


@compiled_only
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_codes_and_activations_fit(tokens: int, sign: float) -> None:
    stack, _ = random_stack(1, 20, 256, 8, 128)
    stack.weight.qweight.fill_(255)
    if reason := KERNELS["integer_dot"].refuses(case_of(stack, tokens, torch.float32)):
        pytest.skip(reason)
    exact = dense(stack)
    x = torch.full((tokens, 256), sign)
    found = KERNELS["integer_dot"].run(x, stack, [0], [tokens])
    torch.testing.assert_close(found.double(), x.double() @ exact.t(), rtol=1e-4, atol=1e-2)


@compiled_only
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float, tokens: int) -> None:
    matrix, _ = random_matrix(16, 256, 2, 128)
    x = torch.randn(tokens + 1, 256)
    x[tokens, 3] = value
    for counts in ([tokens, 1], [1, tokens]):
        found = KERNELS["integer_dot"].run(x, replicas(matrix), [0, 1], counts)
        assert found[:tokens].isfinite().all()
        assert not found[tokens].isfinite().any()


@compiled_only
@pytest.mark.parametrize("kernel", ["integer_dot", "dequantise"])
@pytest.mark.parametrize("shares", [2, 3])
def test_threads_share_the_rows(kernel: str, shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, exact = random_stack(3, 300, 256, 3, 128)
    x = torch.randn(7, 256)
    monkeypatch.setattr(threads, "SMALL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: shares)
    found = KERNELS[kernel].run(x, stack, [0, 2], [1, 6])
    assert_close(found, x, exact.flatten(0, 1), by_experts(x, exact, [0, 2], [1, 6]))


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def job(share: int, shares: int) -> None:
        if share:
            raise ValueError("share")

    with pytest.raises(ValueError, match="share"):
        threads.in_shares(job, 1e9)


def test_rows_beyond_one_chunk_are_all_computed() -> None:
    matrix, exact = random_matrix(700, 4096, 2, 128)
    x = torch.randn(3, 4096)
    expected = (x.double() @ exact.t()).float()
    torch.testing.assert_close(packed_linear(x, matrix), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leading_dimensions_and_dtype_are_kept(dtype: torch.dtype) -> None:
    matrix, _ = random_matrix(16, 64, 3, 64)
    out = packed_linear(torch.randn(2, 5, 64).to(dtype), matrix)
    assert out.shape == (2, 5, 16)
    assert out.dtype == dtype


def test_no_tokens_give_no_rows() -> None:
    matrix, _ = random_matrix(16, 64, 3, 64)
    assert packed_linear(torch.empty(0, 64), matrix).shape == (0, 16)
    stack, _ = random_stack(2, 16, 64, 3, 64)
    assert packed_linears(torch.empty(0, 64), stack, [0, 0]).shape == (0, 16)


def test_each_expert_gets_the_kernel_for_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, exact = random_stack(4, 40, 256, 2, 128)
    counts = [3, 160, 0, 2]
    x = torch.randn(sum(counts), 256).bfloat16()
    met: dict[str, list[int]] = {}

    def noting(name: str) -> linear.Kernel:
        kernel = KERNELS[name]

        def run(x: Tensor, stack: PackedStack, slots: Sequence[int], n: Sequence[int]) -> Tensor:
            met.setdefault(name, []).extend(slots)
            return kernel.run(x, stack, slots, n)

        return replace(kernel, run=run)

    monkeypatch.setattr(linear, "KERNELS", {name: noting(name) for name in KERNELS})
    found = packed_linears(x, stack, counts)
    expected = by_experts(x, exact, [0, 1, 3], [3, 160, 2])
    assert_close(found, x, exact.flatten(0, 1), expected)
    if not support.missing_support():
        assert met == {"integer_dot": [0, 3], "dequantise": [1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 16384])
def test_the_gradient_is_that_of_the_dense_product(columns: int, dtype: torch.dtype) -> None:
    stack, exact = random_stack(4, 160, columns, 3, 128)
    counts = [3, 60, 0, 40]
    x = torch.randn(sum(counts), columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    by_output = torch.randn(sum(counts), 160, generator=torch.Generator().manual_seed(2)).to(dtype)
    x.requires_grad_()
    packed_linears(x, stack, counts).backward(by_output)
    assert x.grad is not None
    expected = by_experts(by_output, exact.transpose(1, 2), [0, 1, 3], [3, 60, 40])
    transposed = exact.transpose(1, 2).flatten(0, 1)
    assert_close(x.grad, by_output, transposed, expected)


# The choice


@compiled_only
def test_few_tokens_in_half_precision_take_integers_and_float32_never_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(512, 256, 2, 128, 1, torch.bfloat16, "cpu")
    assert choose_kernel(case) == "integer_dot"
    assert choose_kernel(replace(case, tokens=1000)) == "dequantise"
    for wide, most in ((True, 128), (False, 24)):
        monkeypatch.setattr(support, "has_wide_vnni", lambda wide=wide: wide)
        assert choose_kernel(replace(case, tokens=most)) == "integer_dot"
        assert choose_kernel(replace(case, tokens=most + 1)) == "dequantise"
    assert choose_kernel(replace(case, dtype=torch.float32)) == "dequantise"


def test_what_nothing_else_can_do_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(512, 256, 2, 128, 1, torch.bfloat16, "cpu")
    assert choose_kernel(replace(case, group_size=48)) == "chunked"
    assert choose_kernel(replace(case, device="cuda")) == "chunked"
    assert choose_kernel(replace(case, dtype=torch.float64)) == "chunked"
    monkeypatch.setattr(support, "missing_support", lambda: "numba is not installed")
    assert choose_kernel(case) == "chunked"


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_environment_names_a_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(512, 256, 2, 128, 7, torch.float32, "cpu")
    if KERNELS[kernel].refuses(case):
        pytest.skip(KERNELS[kernel].refuses(case))
    monkeypatch.setenv("MCSHARP_KERNEL", kernel)
    assert choose_kernel(case) == kernel


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "fastest",
            {},
            "no such kernel; there are triton, triton_dp4a, integer_dot, int8_dot, dequantise",
        ),
        ("integer_dot", {"device": "cuda"}, "runs on the CPU, not on cuda"),
        ("integer_dot", {"group_size": 48}, "group size 48 is not 32, 64 or a multiple of 128"),
        ("dequantise", {"dtype": torch.float64}, "activations are torch.float64"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(
    name: str, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCSHARP_KERNEL", name)
    monkeypatch.setattr(support, "missing_support", lambda: "")
    case = Case(512, 256, 2, 128, 1, torch.float32, "cpu")
    with pytest.raises(InputError, match=f"^MCSHARP_KERNEL={name}: .*{message}"):
        choose_kernel(replace(case, **change))  # type: ignore[arg-type]


OLDER_PROCESSOR = """
import torch, sys
sys.path.insert(0, "tests/kernels")
from test_linear import KERNELS, assert_close, by_experts, case_of, random_stack
for bits, group in ((b, g) for b in (1, 2, 3, 4, 8) for g in (32, 64, 128)):
    stack, exact = random_stack(2, 70, 300, bits, group)
    x = torch.randn(5, 300)
    assert KERNELS["int8_dot"].refuses(case_of(stack, 5, torch.float32))
    for name in ("integer_dot", "dequantise", "chunked"):
        kernel = KERNELS[name]
        for dtype in (torch.float32, torch.bfloat16):
            if reason := kernel.refuses(case_of(stack, 5, dtype)):
                assert (bits, name) == (8, "integer_dot"), reason
                continue
            part = x.to(dtype)
            found = kernel.run(part, stack, [0, 1], [1, 4])
            assert_close(found, part, exact.flatten(0, 1), by_experts(part, exact, [0, 1], [1, 4]))
print("done")
"""


@compiled_only
@pytest.mark.slow
def test_processors_without_byte_products_get_the_same_results() -> None:
    features = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-c", OLDER_PROCESSOR]
    run = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert run.stdout.strip() == "done", run.stderr[-2000:]


def test_stacks_are_views() -> None:
    stack, _ = random_stack(2, 8, 64, 2, 32)
    matrix = stack.matrix(1)
    assert isinstance(matrix.weight, PackedWeight)
    assert matrix.stack().weight.qweight.data_ptr() == stack.weight.qweight[1].data_ptr()
