"""Measured crossovers: found from times, kept in a file, and gone by."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_stacks import random_layer, relative_error, silu_layer
from hypothesis import given
from hypothesis import strategies as st

from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.kernels import Case, Kernel, choose_kernel, crossovers, measuring, timed_cases
from mcsharp_sdk.kernels.case import LayerCase
from mcsharp_sdk.kernels.gpu_experts import choose_tiling
from mcsharp_sdk.kernels.linear import KERNELS, candidates, explain_choice
from mcsharp_sdk.kernels.soundness import exact_layer
from mcsharp_sdk.kernels.timed_cases import time_product

CASE = Case(512, 256, 2, 128, 1, torch.bfloat16, "cpu")
LAYER = LayerCase(64, 32, 64, 8, 2, (1, 2), 32, torch.float16, "cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where crossovers are kept; there is none yet."""
    path = tmp_path / "cache" / "crossovers.json"
    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(path))
    return path


def write(file: Path, content: object) -> None:
    file.parent.mkdir()
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def of_this_machine(case: Case | LayerCase, steps: object) -> dict[str, object]:
    return {"version": 1, "devices": {crossovers.device_name("cpu"): {case.key(): steps}}}


# What is found from times

costs = st.tuples(st.floats(0, 100), st.floats(0.01, 10))


@given(first=costs, second=costs)
def test_of_two_straight_lines_the_lower_is_taken_everywhere(
    first: tuple[float, float], second: tuple[float, float]
) -> None:
    lines = {"first": first, "second": second}

    def seconds(name: str, tokens: int) -> float:
        fixed, each = lines[name]
        return fixed + each * tokens

    times = {n: {name: seconds(name, n) for name in lines} for n in measuring.TOKENS}
    steps = measuring.crossovers(times)
    for tokens in range(1, measuring.TOKENS[-1] + 1):
        taken = next(name for start, name in reversed(steps) if start <= tokens)
        least = min(seconds(name, tokens) for name in lines)
        assert seconds(taken, tokens) <= least / (1 - measuring.MARGIN) + 1e-9


def test_what_is_hardly_faster_does_not_take_over() -> None:
    times = {1: {"old": 1.0, "new": 2.0}, 2: {"old": 2.0, "new": 1.96}}
    assert measuring.crossovers(times) == ((1, "old"),)


class Clock:
    """Time that passes only while a candidate works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def candidate(self, name: str, cost: Callable[[int], float]) -> measuring.Run:
        def run(tokens: int) -> None:
            self.calls.append((name, tokens))
            self.now += cost(tokens)

        return run


def test_candidates_are_timed_in_turns_and_those_far_behind_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock.now)
    runs = {
        "few": clock.candidate("few", lambda n: 1.0 * n),
        "many": clock.candidate("many", lambda n: 10.0 + 0.1 * n),
        "never": clock.candidate("never", lambda n: 100.0 + n),
    }
    steps = measuring.find_steps(runs, "cpu", (1, 8, 16, 64))
    assert steps == ((1, "few"), (12, "many"))  # 10 + 0.1 n = n where n is 11.1
    assert clock.calls[:6] == [(name, 1) for name in runs] * 2
    tried = 1 + measuring.TRIALS
    assert clock.calls.count(("never", 1)) == tried
    assert clock.calls.count(("few", 1)) == 1 + measuring.ROUNDS


def test_a_product_is_timed_with_all_kernels_that_may_do_it() -> None:
    steps = time_product(CASE, (1, 3))
    assert steps[0][0] == 1
    assert {name for _, name in steps} <= set(candidates(CASE))


# The file


def test_what_is_saved_is_found_again_and_the_rest_stays(file: Path) -> None:
    other = {"Some GPU; triton 1": {"a": [[1, "triton"]]}}
    write(file, {"version": 1, "devices": other})
    assert crossovers.fastest(CASE, 1) == ""
    crossovers.save("cpu", {CASE.key(): ((1, "dequantise"), (9, "chunked"))})
    crossovers.save("cpu", {LAYER.key(): ((1, "gemm_16"),)})
    assert crossovers.fastest(CASE, 8) == "dequantise"
    assert crossovers.fastest(CASE, 9) == "chunked"
    assert crossovers.fastest(LAYER, 1) == "gemm_16"
    assert crossovers.fastest(replace(CASE, rows=8), 1) == ""
    kept = json.loads(file.read_text())["devices"]
    assert kept["Some GPU; triton 1"] == other["Some GPU; triton 1"]


BROKEN = [
    "",
    "[1]",
    {"version": 2, "devices": {}},
    {"devices": [1]},
    {"weight_map": {}},
    *(
        of_this_machine(CASE, steps)
        for steps in ([], 3, [[2, "chunked"]], [[1, "chunked"], [1, "dequantise"]], [[1, 2]], [1])
    ),
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda c: json.dumps(c)[-40:])
def test_a_broken_file_is_left_out_with_a_warning_and_never_overwritten(
    content: object, file: Path
) -> None:
    write(file, content)
    before = file.read_bytes()
    with pytest.warns(RuntimeWarning, match="crossovers.json: .*delete it and measure again"):
        assert explain_choice(CASE).reason == "built in"
    with pytest.raises(InputError, match="crossovers.json"):
        crossovers.save("cpu", {})
    assert file.read_bytes() == before


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("MCSHARP_CROSSOVERS", str(tmp_path / "cache" / "file"))
    with pytest.raises(InputError, match="cannot be written .* MCSHARP_CROSSOVERS"):
        crossovers.save("cpu", {})
    monkeypatch.setenv("MCSHARP_CROSSOVERS", "off")
    with pytest.raises(InputError, match="MCSHARP_CROSSOVERS=off"):
        crossovers.save("cpu", {})


def test_by_default_the_file_is_in_the_users_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCSHARP_CROSSOVERS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert crossovers.crossover_file() == tmp_path / "mcsharp_sdk" / "kernel_crossovers.json"


# Who goes by it


def test_products_are_done_by_what_was_measured(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(file, of_this_machine(CASE, [[1, "chunked"], [30, "dequantise"], [300, "chunked"]]))
    chosen = {n: choose_kernel(replace(CASE, tokens=n)) for n in (1, 29, 30, 299, 300)}
    few, many = "chunked", "dequantise" if "dequantise" in candidates(CASE) else "chunked"
    assert chosen == {1: few, 29: few, 30: many, 299: many, 300: "chunked"}
    assert explain_choice(CASE).reason == "measured"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert explain_choice(CASE).reason == "built in"


def test_a_forced_kernel_comes_first_and_measurements_can_be_switched_off(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASE, tokens=7)
    built_in = choose_kernel(case)
    write(file, of_this_machine(CASE, [[1, "chunked"]]))
    crossovers._of_device.cache_clear()
    assert choose_kernel(case) == "chunked"
    monkeypatch.setenv("MCSHARP_KERNEL", built_in)
    assert explain_choice(case) == (built_in, "MCSHARP_KERNEL")
    monkeypatch.delenv("MCSHARP_KERNEL")
    monkeypatch.setenv("MCSHARP_CROSSOVERS", "off")
    assert explain_choice(case) == (built_in, "built in")


@pytest.mark.parametrize("name", ["integer_dot", "triton_dp4a", "triton", "quickest"])
def test_no_file_can_choose_a_kernel_that_is_unfit_or_less_exact(name: str, file: Path) -> None:
    case = replace(CASE, dtype=torch.float32)
    write(file, of_this_machine(case, [[1, name]]))
    with pytest.warns(RuntimeWarning, match=f"'{name}' cannot be used"):
        assert explain_choice(case).reason == "built in"


def test_no_file_can_choose_a_tiling_that_a_layer_cannot_take(file: Path) -> None:
    odd = replace(LAYER, group_size=50)
    write(file, of_this_machine(odd, [[1, "gemv_32"], [2, "gemm_16"]]))
    assert choose_tiling(odd, 2) == "gemm_16"
    with pytest.warns(RuntimeWarning, match="'gemv_32' cannot be used"):
        assert choose_tiling(odd, 1) == ""


# Kernels that are wrong


def off_in_one_number(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = KERNELS["chunked"].run(x, *rest)
    out[-1, -1] += out.square().mean().sqrt()
    return out


def no_number(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return KERNELS["chunked"].run(x, *rest) * torch.nan


def without_a_compiler(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    if len(x) > 1:
        raise OSError("out of resource: shared memory\nand more")
    return KERNELS["chunked"].run(x, *rest)


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (off_in_one_number, r"with 1 tokens a number is off by [\d.]+ of"),
        (no_number, "with 1 tokens a number is off by nan"),
        (without_a_compiler, r"with 3 tokens \(OSError: out of resource: shared memory\)$"),
    ],
)
def test_a_kernel_that_is_wrong_or_does_not_run_is_left_out(
    run: Callable[..., torch.Tensor], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "broken", Kernel(refuses=lambda _: "", run=run))
    monkeypatch.setattr(timed_cases, "candidates", lambda _: ("broken", "chunked"))
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    with pytest.warns(RuntimeWarning, match=f"broken is left out: .*{told}"):
        assert time_product(CASE, (1, 4)) == ((1, "chunked"),)
    monkeypatch.setattr(timed_cases, "candidates", lambda _: ("broken",))
    with pytest.warns(RuntimeWarning), pytest.raises(RunError, match="no kernel is right"):
        time_product(CASE, (1, 4))


def test_what_layers_are_compared_with_is_the_layer_in_float64() -> None:
    layer, gate_up, down = random_layer((1, 3, 2, 2), 128, 32, 32)
    hidden, routing = torch.randn(9, 128), torch.rand(9, 2)
    chosen = torch.randint(0, 5, (9, 2))  # 4 is a dropped slot
    expected = silu_layer(hidden, chosen, routing, gate_up, down)
    assert relative_error(exact_layer(layer, hidden, chosen, routing), expected) < 1e-5
