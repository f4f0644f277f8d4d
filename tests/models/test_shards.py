"""Checkpoint against the safetensors library, and against damage of every kind."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.models.safetensors_file import DTYPES, MAX_HEADER_BYTES
from mcsharp_sdk.models.shards import Checkpoint, write_safetensors

LIBRARY_DTYPES = [d for d in DTYPES.values() if d in safetensors.torch._SIZE]


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Up to six tensors of random dtypes, shapes (empty and scalar ones too) and bytes."""
    names = draw(st.lists(st.text("abc.0é", min_size=1, max_size=8), unique=True, max_size=6))
    result = {}
    for name in names:
        dtype = draw(st.sampled_from(LIBRARY_DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        count = torch.Size(shape).numel()
        high = 2 if dtype is torch.bool else 256
        seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        data = torch.randint(high, (count * dtype.itemsize,), generator=seed, dtype=torch.uint8)
        result[name] = data.view(dtype).view(shape)
    return result


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """Dtype, shape and bytes: equality that NaN does not spoil."""
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).tolist()


@settings(max_examples=50, deadline=None)
@given(tensors())
def test_reads_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names) == set(state)
    assert checkpoint.metadata == {"format": "pt"}
    with safetensors.safe_open(folder / "model.safetensors", "pt") as library:
        for name, tensor in state.items():
            assert raw(checkpoint.read(name)) == raw(tensor)
            assert raw(checkpoint.slice(name)[...]) == raw(tensor)
            assert checkpoint.slice(name).get_shape() == library.get_slice(name).get_shape()
            assert checkpoint.slice(name).get_dtype() == library.get_slice(name).get_dtype()
            assert checkpoint.info(name).nbytes == tensor.numel() * tensor.element_size()


@settings(max_examples=50, deadline=None)
@given(tensors())
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_safetensors(path, state, {"format": "pt"})
    loaded = safetensors.torch.load_file(path)
    assert {n: raw(t) for n, t in loaded.items()} == {n: raw(t) for n, t in state.items()}
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 7))
def test_rows_and_slices_equal_indexing(
    tmp_path_factory: pytest.TempPathFactory, rows: int, start: int, stop: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = torch.randn(rows, 3, 2, dtype=torch.bfloat16)
    write_safetensors(folder / "model.safetensors", {"w": whole, "after": torch.ones(9)})
    checkpoint = Checkpoint.open(folder)
    if start <= stop <= rows:
        assert raw(checkpoint.read_rows("w", start, stop)) == raw(whole[start:stop])
    else:
        with pytest.raises(IndexError, match="has no rows"):
            checkpoint.read_rows("w", start, stop)
    lazy = checkpoint.slice("w")
    assert raw(lazy[start:stop]) == raw(whole[start:stop])
    assert raw(lazy[start:stop, 1:]) == raw(whole[start:stop, 1:])
    assert raw(lazy[:, :, 1]) == raw(whole[:, :, 1])


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {"t": base.T, "shared": base, "part": base[1:, 1:]}
    write_safetensors(tmp_path / "model.safetensors", state)
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):  # a meta tensor has no bytes to copy
        write_safetensors(path, {"a": torch.ones(3), "b": torch.ones(1, device="meta")})
    with pytest.raises(TypeError, match="dtype of b"):
        write_safetensors(path, {"b": torch.ones(1, dtype=torch.complex128)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_transformers_loader_accepts_slices(tmp_path: Path) -> None:
    from transformers.core_model_loading import _materialize_copy

    weight = torch.randn(4, 3)
    write_safetensors(tmp_path / "model.safetensors", {"w": weight})
    lazy: Any = Checkpoint.open(tmp_path).slice("w")
    copied = _materialize_copy(lazy, "cpu", torch.bfloat16)
    assert torch.equal(copied, weight.to(torch.bfloat16))


# --- which files make up the checkpoint ------------------------------------------------------


def write_sharded(folder: Path, base: str = "model") -> None:
    shards = {
        f"{base}-00001-of-00002.safetensors": {"a": torch.ones(2), "b": torch.zeros(3)},
        f"{base}-00002-of-00002.safetensors": {"c": torch.arange(4)},
    }
    for name, state in shards.items():
        write_safetensors(folder / name, state)
    weight_map = {tensor: name for name, state in shards.items() for tensor in state}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("base", ["model", "mcsharp", "consolidated"])
def test_shards_are_found_through_their_index(tmp_path: Path, base: str) -> None:
    write_sharded(tmp_path, base)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.names) == {"a", "b", "c"}
    assert torch.equal(checkpoint.read("c"), torch.arange(4))
    assert checkpoint.nbytes == 8 + 12 + 32
    assert len(checkpoint.files) == 2


def test_shards_may_be_links_as_in_the_download_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_safetensors(tmp_path / "blobs" / "0af1", {"a": torch.ones(2)})
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0af1")
    assert Checkpoint.open(tmp_path / "snapshot").names == ("a",)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert Checkpoint.open(tmp_path).names == ("a",)
    write_safetensors(tmp_path / "y.safetensors", {"b": torch.ones(2)})
    with pytest.raises(InputError, match="which belong to the model"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(InputError, match="no safetensors weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        Checkpoint.open(tmp_path)


# --- damage ----------------------------------------------------------------------------------


def file_with(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes: not a safetensors"),
    "shorter than the length": (b"\0\0\0", "only 3 bytes"),
    "huge header": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most 100000000"),
    "header cut": (struct.pack("<Q", 90) + b"{}", "truncated: header of 90"),
    "not JSON": (file_with(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (file_with(b'{"\xff": 1}'), "not valid JSON"),
    "nested too deep": (file_with(b"[" * 100_000), "not valid JSON"),
    "not an object": (file_with([1]), "not a JSON object"),
    "metadata not strings": (file_with({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry not an object": (file_with({"a": 3}), "a: needs dtype"),
    "entry lacks offsets": (file_with({"a": {"dtype": "U8", "shape": []}}), "a: needs dtype"),
    "unknown dtype": (file_with({"a": entry(0, 1, dtype="Q7")}, b"1"), "'Q7' is not supp"),
    "dtype not a string": (file_with({"a": entry(0, 1, dtype=["U8"])}, b"1"), "is not supp"),
    "negative size": (file_with({"a": entry(0, 1, [-1])}, b"1"), "not a list of sizes"),
    "size true": (file_with({"a": entry(0, 1, [True])}, b"1"), "not a list of sizes"),
    "huge size": (file_with({"a": entry(0, 0, [2**70, 0])}), "not a list of sizes"),
    "offsets backwards": (file_with({"a": entry(2, 1, [1])}, b"12"), r"not \[begin, end\]"),
    "data cut": (
        file_with({f"t{i}": entry(4 * i, 4 * i + 4) for i in range(9)}, b"12345"),
        "truncated: ends at byte .*, within or before t1, t2, .* more; get the file again",
    ),
    "shape and bytes differ": (file_with({"a": entry(0, 4, [3])}, b"1234"), "needs 3 bytes"),
    "overlap": (file_with({"a": entry(0, 3), "b": entry(2, 4)}, b"1234"), "b: overlaps"),
    "hole": (file_with({"a": entry(0, 1), "b": entry(2, 4)}, b"1234"), "b: 1 unused bytes"),
    "bytes at the end": (file_with({"a": entry(0, 1)}, b"12"), "1 bytes after the last"),
    "tensor twice": (
        file_with(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
        "'a' stands twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_with_its_tensor(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGE[damage]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputProblems, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_random_damage_is_refused_whenever_the_library_refuses(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.uint8)})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), place]))])
    try:
        safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        with pytest.raises(InputProblems):
            Checkpoint.open(folder)


def test_all_problems_of_a_sharded_checkpoint_come_together(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "s1.safetensors", {"a": torch.ones(2), "twice": torch.ones(1)})
    write_safetensors(tmp_path / "s2.safetensors", {"twice": torch.ones(1)})
    (tmp_path / "s3.safetensors").write_bytes(b"oh")
    files = {"a": "s1", "twice": "s1", "lost": "s2", "late": "s2", "x": "s3", "y": "s4"}
    weight_map = {name: f"{file}.safetensors" for name, file in files.items()}
    weight_map |= {"out": "../s5.safetensors", "far": "/s6.safetensors", "odd": "s7.bin"}
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputProblems) as caught:
        Checkpoint.open(tmp_path)
    wheres = sorted(problem.where for problem in caught.value.problems)
    assert wheres == [
        "model.safetensors.index.json",
        "model.safetensors.index.json",
        "model.safetensors.index.json",
        "s2.safetensors: late",
        "s2.safetensors: lost",
        "s2.safetensors: twice",
        "s3.safetensors",
        "s4.safetensors",
    ]


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{}"])
def test_a_bad_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputProblems, match=r"index\.json: .*weight_map"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(100)})
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(EOFError, match="changed since it was opened"):
        checkpoint.read("a")


def test_unknown_tensor_names_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    checkpoint = Checkpoint.open(tmp_path)
    assert "a" in checkpoint
    assert "b" not in checkpoint
    with pytest.raises(KeyError, match="no tensor 'b'"):
        checkpoint.slice("b")
