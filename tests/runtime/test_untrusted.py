"""Compressed models that lie: configs and headers, changed at random, give errors and no harm."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.checked_files import UNSUMMED_FILES
from mcsharp_sdk.errors import InputError, InputProblems, McSharpError
from mcsharp_sdk.evaluation.inspection import inspect
from mcsharp_sdk.evaluation.loading import load_model
from mcsharp_sdk.evaluation.verification import verify
from mcsharp_sdk.recipe.schema import Recipe

SPARE_MEMORY = 4 << 30
"""Address space that handling a tiny model may take beyond what the process has, in bytes."""

FUZZ = settings(
    max_examples=50,
    deadline=None,  # a hang meets the time limit of every test
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    save_tiny_tokenizer(save_tiny_model(base / "model", "mixtral", num_hidden_layers=2))
    (base / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    calibration = {"source": "text", "path": str(base / "text.txt"), "sequences": 8, "length": 32}
    stages = [
        {"type": "GPTQQuantize", "quantizer": "rtn", "bits": 3, "group_size": 16},
        {"type": "TokenProtection"},
        {"type": "TopAnyRouter", "steps": 2},
    ]
    recipe = Recipe.from_dict({"version": 1, "calibration": calibration, "stages": stages})
    mcsharp_sdk.compress(recipe, base / "model", base / "out", progress=False)
    return base / "out"


@pytest.fixture
def folder(compressed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(compressed, tmp_path / "broken")


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Little address space: taking it without bounds is a MemoryError, not a dead machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_handled(folder: Path) -> bool:
    """Load and inspect: whether both went well. Anything but our errors goes through."""
    for use in (inspect, lambda f: load_model(f, "cpu", torch.float32)):
        try:
            with bounded_memory():
                use(folder)
        except McSharpError as error:
            assert "memory" not in str(error)  # noqa: PT017
            return False
    return True


WILD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**40, 2**63, 10**30, -(2**63), 0.5, 1e300, "x", "8", "", "../x"]),
    st.sampled_from([[], {}, [1], [[]], {"a": 1}, [0] * 100, "float8_e4m3fn", "mixtral", "dbrx"]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON values."""
    found: list[tuple[Any, ...]] = []
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((*path, key))
        if isinstance(part, dict | list):
            found += places(part, (*path, key))
    return found


def changed(content: Any, place: tuple[Any, ...], value: Any, remove: bool) -> Any:
    """JSON values with another value at a place, or without it."""
    result = copy.deepcopy(content)
    target = result
    for key in place[:-1]:
        target = target[key]
    if remove:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return result


@FUZZ
@given(data=st.data(), value=WILD, remove=st.booleans())
def test_a_config_changed_at_random_gives_an_error_or_a_model(
    folder: Path, compressed: Path, data: st.DataObject, value: Any, remove: bool
) -> None:
    config = json.loads((compressed / "config.json").read_text())
    place = data.draw(st.sampled_from(places(config)))
    (folder / "config.json").write_text(json.dumps(changed(config, place, value, remove)))
    is_handled(folder)


@FUZZ
@given(data=st.data(), value=WILD, remove=st.booleans())
def test_a_header_changed_at_random_gives_an_error_or_a_model(
    folder: Path, compressed: Path, data: st.DataObject, value: Any, remove: bool
) -> None:
    name = "mcsharp-00001-of-00001.safetensors"
    original = (compressed / name).read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    place = data.draw(st.sampled_from(places(header)))
    text = json.dumps(changed(header, place, value, remove)).encode()
    content = len(text).to_bytes(8, "little") + text + original[8 + length :]
    (folder / name).write_bytes(content)
    if is_handled(folder):
        assert json.loads(text) == header or place[0] == "__metadata__"


@FUZZ
@given(st.data())
def test_bytes_of_a_header_changed_at_random_give_an_error_or_a_model(
    folder: Path, compressed: Path, data: st.DataObject
) -> None:
    name = "mcsharp-00001-of-00001.safetensors"
    content = bytearray((compressed / name).read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content[: data.draw(st.sampled_from([None, 7, 100, -1]))])
    is_handled(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: more than 4096"),
        ({"num_hidden_layers": 4000}, "says 4000 layers, but"),
        ({"num_local_experts": 5}, "gives 4 widths to the 5 experts"),
        ({"hidden_size": 128}, r"embed_tokens\.weight: is \[128, 64\], but \[128, 128\]"),
        ({"head_dim": 2**38}, "bytes|cannot be built"),
        ({"vocab_size": 10**13}, "vocab_size is 10000000000000"),
        ({"quantization_config": {"quant_method": "mcsharp"}}, "format_version None"),
        ({"model_type": "unheard_of"}, "unheard_of"),
    ],
)
def test_what_a_config_says_is_compared_with_the_files(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with bounded_memory(), pytest.raises(InputError, match=message):
        load_model(folder, "cpu", torch.float32)


def test_a_config_with_too_many_layers_is_refused_when_transformers_loads_it(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5000}))
    with pytest.raises(
        InputError, match=r"config\.json: num_hidden_layers is 5000: more than 4096"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_index_that_points_outside_its_folder_is_refused_by_transformers_too(
    folder: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    shard = folder / "mcsharp-00001-of-00001.safetensors"
    shard.rename(folder.parent / "outside.safetensors")
    index = folder / "mcsharp.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(InputProblems, match="not the name of a safetensors file in this folder"):
        load_model(folder, "cpu", torch.float32)
    with pytest.raises(InputError, match="lies outside of the model's folder"):
        AutoModelForCausalLM.from_pretrained(folder)


# Verifying


def test_an_exported_model_is_verified(compressed: Path) -> None:
    found = verify(compressed)
    assert found.compressed
    files = {f.name for f in compressed.iterdir()} - {"SHA256SUMS", *UNSUMMED_FILES}
    assert found.checksums == len(files)


def test_sha256sum_agrees(compressed: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=compressed, capture_output=True)
    assert checked.returncode == 0, checked.stdout


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_flipped_bit_in_an_exported_model_is_found_and_named(
    folder: Path, compressed: Path, data: st.DataObject
) -> None:
    names = sorted(
        f.name for f in compressed.iterdir() if f.name not in ("SHA256SUMS", *UNSUMMED_FILES)
    )
    name = data.draw(st.sampled_from(names))
    content = bytearray((compressed / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        verify(folder)
    shutil.copyfile(compressed / name, folder / name)


def test_a_config_of_another_depth_is_named(folder: Path) -> None:
    """As a flipped bit in the name of the setting makes it, which then has its default."""
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("num_hidden_layers", "num_hidden_layerz"))
    with pytest.raises(InputError, match=r"config\.json: quantization_config has experts in"):
        verify(folder)


def test_a_saved_model_has_checksums_of_its_own(compressed: Path, tmp_path: Path) -> None:
    load_model(compressed, "cpu", torch.float32).save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").checksums > 2


def test_checksums_of_files_outside_the_folder_are_refused(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(InputError, match="SHA256SUMS:1: is not a sha256"):
        verify(folder)
