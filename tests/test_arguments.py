"""Arguments of the wrong kind: what the functions say that Python's users call."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mcsharp_sdk
from mcsharp_sdk import Recipe, compress, evaluate, evaluate_tasks, export, plan, sweep
from mcsharp_sdk.arguments import short_dtype, whole_number
from mcsharp_sdk.artifacts import BitMap
from mcsharp_sdk.embedded import model_directory
from mcsharp_sdk.errors import InputError
from mcsharp_sdk.evaluation.kernel_choice import kernel_choices
from mcsharp_sdk.models.device import device_name
from mcsharp_sdk.modifiers.bit_allocation import BitAllocation
from mcsharp_sdk.recipe import json_schema
from mcsharp_sdk.recipe.overrides import override_texts, parse_override

MODEL = model_directory()
ROUNDED: dict[str, Any] = {
    "version": 1,
    "stages": [{"type": "GPTQQuantize", "bits": 4, "quantizer": "rtn", "group_size": 64}],
}
BITS = "stages.GPTQQuantize.bits"
QUICK: dict[str, Any] = {"window": 64, "max_tokens": 128}
AnyCall = Callable[[Any], Any]

PATHS: dict[str, tuple[str, AnyCall]] = {
    "plan": ("model", lambda path: plan(ROUNDED, path)),
    "compress": ("model", lambda path: compress(ROUNDED, path, "output")),
    "compress into": ("output", lambda path: compress(ROUNDED, MODEL, path)),
    "sweep": ("model", lambda path: sweep(ROUNDED, path, "output", {BITS: [2]})),
    "sweep into": ("output", lambda path: sweep(ROUNDED, MODEL, path, {BITS: [2]})),
    "evaluate": ("model_dir", evaluate),
    "evaluate_tasks": ("model_dir", lambda path: evaluate_tasks(path, ["piqa"])),
    "compare": ("model_dirs[1]", lambda path: mcsharp_sdk.compare([MODEL, path])),
    "inspect": ("model", mcsharp_sdk.inspect),
    "verify": ("model", mcsharp_sdk.verify),
    "export": ("model", lambda path: export("onnx_routers", path)),
    "allocate": (
        "statistics",
        lambda path: mcsharp_sdk.allocate(path, BitAllocation(target_bits=2.5)),
    ),
    "from_file": ("path", Recipe.from_file),
    "save": ("path", BitMap({0: (2, 2)}).save),
    "load": ("path", BitMap.load),
    "kernel_choices": ("model_dir", kernel_choices),
}
OPTIONAL_PATHS: dict[str, tuple[str, AnyCall]] = {
    "run_dir": ("run_dir", lambda path: compress(ROUNDED, MODEL, "output", run_dir=path)),
    "run_dir of a sweep": (
        "run_dir",
        lambda path: sweep(ROUNDED, MODEL, "output", {BITS: [2]}, run_dir=path),
    ),
    "text of a sweep": (
        "text",
        lambda path: sweep(ROUNDED, MODEL, "output", {BITS: [2]}, text=path),
    ),
    "text": ("text", lambda path: evaluate(MODEL, path)),
    "text of a comparison": ("text", lambda path: mcsharp_sdk.compare([MODEL], path)),
    "reference": ("reference", lambda path: mcsharp_sdk.compare([MODEL], reference=path)),
    "include": ("include", lambda path: evaluate_tasks(MODEL, ["piqa"], include=path)),
    "output of an export": ("output", lambda path: export("onnx_routers", MODEL, path)),
    "base": ("base", lambda path: Recipe.from_dict(ROUNDED, base=path)),
}
DEVICES: dict[str, AnyCall] = {
    "compress": lambda device: compress(ROUNDED, MODEL, "output", device=device),
    "sweep": lambda device: sweep(ROUNDED, MODEL, "output", {BITS: [2]}, device=device),
    "evaluate": lambda device: evaluate(MODEL, device=device),
    "compare": lambda device: mcsharp_sdk.compare([MODEL], device=device),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(call: AnyCall, given: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(given)
    assert not list(Path.cwd().iterdir())
    return str(caught.value)


@pytest.mark.parametrize("given", [3, ["first"], b"first"])
@pytest.mark.parametrize("name", [*PATHS, *OPTIONAL_PATHS])
def test_what_is_no_path_is_refused_by_the_name_of_the_argument(name: str, given: Any) -> None:
    argument, call = {**PATHS, **OPTIONAL_PATHS}[name]
    assert f"{argument} is a path, not {given!r}: give " in refusal(call, given)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_must_be_given_is_not_none(name: str) -> None:
    argument, call = PATHS[name]
    assert refusal(call, None).startswith(f"{argument} is a path, not None: give ")


@pytest.mark.parametrize("given", [None, 0, b"cpu"])
@pytest.mark.parametrize("name", DEVICES)
def test_what_is_no_device_is_told_what_there_is(name: str, given: Any) -> None:
    wanted = f"device is a text or a torch.device, not {given!r}: give cpu, cuda or cuda:N"
    assert refusal(DEVICES[name], given) == wanted


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_without_numbers_is_refused(name: str) -> None:
    assert "device 'meta' cannot be used: it holds no numbers" in refusal(DEVICES[name], "meta")


def test_a_device_of_torch_is_as_good_as_its_name() -> None:
    cpu = torch.device("cpu")
    assert device_name(torch.device("cuda", 1)) == "cuda:1"
    assert compress(ROUNDED, MODEL, "first", device=cpu, max_memory="64GB").output.is_dir()
    assert evaluate("first", device=cpu, **QUICK).device == "cpu"
    assert kernel_choices("first", device=cpu).device == "cpu"


@pytest.mark.parametrize(
    ("given", "computed_in"),
    [("bf16", "bfloat16"), ("fp32", "float32"), (torch.bfloat16, "bfloat16")],
)
def test_evaluation_takes_short_names_of_dtypes(given: Any, computed_in: str) -> None:
    assert evaluate(MODEL, dtype=given, device="cpu", **QUICK).dtype == computed_in


@pytest.mark.parametrize("given", ["fp16", "float16", torch.float16])
def test_an_export_takes_names_of_dtypes_and_those_of_torch(given: Any) -> None:
    assert export("onnx_routers", MODEL, "routers", dtype=given)["dtype"] == "fp16"


def test_a_recipe_may_name_dtypes_of_exports_by_either_name() -> None:
    exports = [
        {"type": "onnx_routers", "dtype": "bfloat16"},
        {"type": "onnx_model", "precision": "float16"},
    ]
    data = {**ROUNDED, "exports": exports}
    routers, whole = Recipe.from_dict(data).settings()["exports"]
    assert (routers["dtype"], whole["precision"]) == ("bf16", "fp16")
    kinds = json_schema()["$defs"]
    assert "bfloat16" in kinds["OnnxRoutersExporter"]["properties"]["dtype"]["enum"]
    assert "bfloat16" not in kinds["OnnxModelExporter"]["properties"]["precision"]["enum"]


def test_a_dtype_that_cannot_be_exported_is_shown() -> None:
    wrong = refusal(lambda dtype: export("onnx_routers", MODEL, dtype=dtype), torch.float64)
    assert "dtype: should be 'fp32', 'fp16' or 'bf16', not torch.float64" in wrong
    assert "not 'float65'" in refusal(
        lambda dtype: export("onnx_model", MODEL, precision=dtype), "float65"
    )


def test_what_has_no_short_name_stays() -> None:
    assert [short_dtype(value) for value in (None, 3, "float64")] == [None, 3, "float64"]


@pytest.mark.parametrize("given", [True, 1.0, "2", None, np.ones(2), np.bool_(True)])
def test_what_is_no_whole_number_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="window is a whole number, not "):
        whole_number(given, "window")


def test_whole_numbers_of_others_are_taken() -> None:
    assert whole_number(np.int64(3), "window") == whole_number(torch.tensor(3), "window") == 3


@pytest.mark.parametrize("given", [1.5, "2", True, None])
def test_processes_are_counted_in_whole_numbers(given: Any) -> None:
    wrong = refusal(lambda processes: plan(ROUNDED, MODEL, processes=processes), given)
    assert wrong == f"processes is a whole number, not {given!r}"


@pytest.mark.parametrize("given", [0, -1, 10**12])
def test_no_machines_run_so_many_processes(given: int) -> None:
    wrong = refusal(lambda processes: plan(ROUNDED, MODEL, processes=processes), given)
    assert wrong == f"processes is {given}: give a number from 1 to 65536"


SWITCHES: dict[str, tuple[str, AnyCall]] = {
    "compress": ("overwrite", lambda given: compress(ROUNDED, MODEL, "o", overwrite=given)),
    "export": ("overwrite", lambda given: export("onnx_routers", MODEL, overwrite=given)),
    "sweep": (
        "overwrite",
        lambda given: sweep(ROUNDED, MODEL, "o", {BITS: [2]}, overwrite=given),
    ),
    "keep": (
        "keep_models",
        lambda given: sweep(ROUNDED, MODEL, "o", {BITS: [2]}, keep_models=given),
    ),
    "tasks": ("download", lambda given: evaluate_tasks(MODEL, ["piqa"], download=given)),
}


@pytest.mark.parametrize("given", ["no", None, 0])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_true_or_false(name: str, given: Any) -> None:
    argument, call = SWITCHES[name]
    assert refusal(call, given) == f"{argument} is True or False, not {given!r}"


@pytest.mark.parametrize("given", ["tqdm", print, 1])
def test_progress_is_shown_or_not(given: Any) -> None:
    calls: list[AnyCall] = [
        lambda progress: compress(ROUNDED, MODEL, "o", progress=progress),
        lambda progress: sweep(ROUNDED, MODEL, "o", {BITS: [2]}, progress=progress),
    ]
    for call in calls:
        assert refusal(call, given).startswith(f"progress is True, False or None, not {given!r}")


LISTS: dict[str, tuple[str, AnyCall]] = {
    "tasks": ("tasks", lambda given: evaluate_tasks(MODEL, given)),
    "models": ("model_dirs", mcsharp_sdk.compare),
    "vary": ("vary", lambda given: sweep(ROUNDED, MODEL, "output", given)),
    "overrides": ("overrides", lambda given: plan(ROUNDED, MODEL, given)),
    "of a file": ("overrides", lambda given: plan("quickstart", MODEL, given)),
    "of a sweep": (
        "overrides",
        lambda given: sweep(ROUNDED, MODEL, "output", {BITS: [2]}, overrides=given),
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_no_single_text_and_not_nothing(name: str) -> None:
    argument, call = LISTS[name]
    assert refusal(call, "nope") == f"{argument} is a list: give ['nope'], not 'nope'"
    assert refusal(call, None) == f"{argument} is a list, not None"
    assert refusal(call, 3) == f"{argument} is a list, not 3"


@pytest.mark.parametrize("name", [name for name in LISTS if name != "models"])
def test_a_list_of_texts_holds_no_numbers(name: str) -> None:
    argument, call = LISTS[name]
    assert refusal(call, [3]) == f"{argument} is a list of texts, and 3 is none"


def test_settings_to_vary_are_named_by_texts() -> None:
    wrong = refusal(lambda vary: sweep(ROUNDED, MODEL, "output", vary), {3: [1]})
    assert "3 is no setting: name one by a text" in wrong


def test_numbers_of_tasks_are_whole() -> None:
    def call(name: str) -> AnyCall:
        return lambda given: evaluate_tasks(MODEL, ["piqa"], **{name: given})

    assert refusal(call("limit"), 0.5) == "limit is a whole number, not 0.5"
    assert refusal(call("batch_size"), "auto") == "batch_size is a whole number, not 'auto'"
    assert refusal(call("num_fewshot"), -1) == "num_fewshot is -1: it must be 0 or more"


def test_overrides_may_be_a_mapping() -> None:
    changed = Recipe.from_dict(ROUNDED, overrides={BITS: 3, "stages[0].group_size": 32})
    assert (changed.stages[0].bits, changed.stages[0].group_size) == (3, 32)  # type: ignore[attr-defined]
    wider, given = plan(ROUNDED, MODEL), plan(ROUNDED, MODEL, {BITS: 3})
    assert given.bytes_after < wider.bytes_after


@pytest.mark.parametrize("name", ["Ä 😀", "off", "1e3", Path("a b.json"), None, 1e-05, [1, "x"]])
def test_a_value_of_a_mapping_reaches_the_recipe_as_it_is(name: Any) -> None:
    wanted = str(name) if isinstance(name, Path) else name
    (text,) = override_texts({"a.b": name})
    assert parse_override(text).value == wanted


@pytest.mark.parametrize("given", [{3: 1}, {BITS: object()}, {BITS: float("nan")}])
def test_a_mapping_of_overrides_that_is_no_plain_data_is_refused(given: Any) -> None:
    refused = refusal(lambda overrides: Recipe.from_dict(ROUNDED, overrides=overrides), given)
    assert re.match("overrides: (3 is no setting|a value is no plain data)", refused)


@pytest.mark.parametrize("given", [None, Path("recipe.yaml"), b"version: 1"])
def test_the_text_of_a_recipe_is_a_text(given: Any) -> None:
    wrong = refusal(Recipe.from_text, given)
    assert wrong == f"text is a recipe in YAML, not {given!r}: from_file reads a file"


@pytest.mark.parametrize("given", ["version: 1", None, [ROUNDED], Path("recipe.yaml")])
def test_the_data_of_a_recipe_are_a_mapping(given: Any) -> None:
    wrong = refusal(Recipe.from_dict, given)
    assert wrong.startswith("data is a mapping such as {'version': 1, 'stages': [...]}, not ")


@pytest.mark.parametrize("text", ["version: 1\nstages: []", "version: 1\n" + "# long\n" * 1000])
def test_text_for_a_recipe_file_is_told_where_to_go(text: str) -> None:
    calls: list[AnyCall] = [
        lambda recipe: plan(recipe, MODEL),
        lambda recipe: sweep(recipe, MODEL, "output", {BITS: [2]}),
    ]
    for call in calls:
        assert "Recipe.from_text makes a recipe of YAML text" in refusal(call, text)


def test_an_artifact_is_not_written_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    with pytest.raises(
        InputError, match=r"first is a folder: give the file to write, e\.g\. first/"
    ):
        BitMap({0: (2, 2)}).save("first")
    assert not list((tmp_path / "first").iterdir())
