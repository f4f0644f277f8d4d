"""What can be wrong with what a user gives: the message names it, and no harm is done."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer

from mcsharp_sdk.cli import main
from mcsharp_sdk.engine import disk_space
from mcsharp_sdk.evaluation.verification import verify
from mcsharp_sdk.models.shards import Checkpoint, write_safetensors

STAGE = {"type": "GPTQQuantize", "bits": 2, "group_size": 16}


@dataclass(frozen=True)
class Given:
    """What a user has, in a folder of their own."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def shard_of(self, tensor: str) -> Path:
        return Checkpoint.open(self.model).info(tensor).file

    def set_config(self, **changes: Any) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def set_tensors(self, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
        """Write the model again as one file, with tensors changed, or left out where None."""
        checkpoint = Checkpoint.open(self.model)
        changed = {name: change(name, checkpoint.read(name)) for name in checkpoint.names}
        for file in self.model.glob("*.safetensors*"):
            file.unlink()
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        write_safetensors(self.model / "model.safetensors", kept)

    def set_tensor(self, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        assert name in Checkpoint.open(self.model)
        self.set_tensors(lambda n, tensor: change(tensor) if n == name else tensor)

    def compress(self, *options: str) -> int:
        """Exit code of ``mcsharp compress``."""
        recipe = {
            "version": 1,
            "calibration": {"source": "text", "path": str(self.text), "sequences": 8, "length": 32},
            "stages": [STAGE],
        }
        (self.folder / "recipe.yaml").write_text(json.dumps(recipe))
        arguments = [self.folder / "recipe.yaml", "--model", self.model, "--output", self.output]
        with pytest.raises(SystemExit) as end:
            main.run(["compress", *map(str, arguments), *options])
        assert isinstance(end.value.code, int)
        return end.value.code


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    save_tiny_tokenizer(save_tiny_model(folder / "model", "mixtral", num_hidden_layers=2))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture
def given(intact: Path, tmp_path: Path) -> Given:
    return Given(shutil.copytree(intact, tmp_path / "given"))


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"


def truncated(given: Given) -> None:
    file = given.shard_of(ATTENTION)
    file.write_bytes(file.read_bytes()[:-100])


def flipped_header(given: Given) -> None:
    file = given.shard_of(ATTENTION)
    data = bytearray(file.read_bytes())
    place = data.index(b'"shape":[') + len('"shape":[')
    data[place] ^= 2
    file.write_bytes(data)


def no_header(given: Given) -> None:
    given.shard_of(ATTENTION).write_text("<html>404 Not Found</html>")


def missing_shard(given: Given) -> None:
    given.shard_of(ATTENTION).unlink()


def link_to_nowhere(given: Given) -> None:
    file = given.shard_of(ATTENTION)
    file.unlink()
    file.symlink_to("/nowhere/blob")


def pointer_of_git_lfs(given: Given) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    given.shard_of(ATTENTION).write_text(pointer)


def only_gguf(given: Given) -> None:
    for file in given.model.glob("*.safetensors*"):
        file.unlink()
    (given.model / "model.gguf").write_bytes(b"GGUF")


def outside(given: Given) -> None:
    file = given.model / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][ATTENTION] = "../text.safetensors"
    file.write_text(json.dumps(index))


def tokenizer_of_another(given: Given) -> None:
    save_tiny_tokenizer(given.model, vocabulary=50)


def without_tokenizer(given: Given) -> None:
    for file in given.model.glob("token*"):
        file.unlink()


def tokens_beyond(given: Given) -> None:
    save_tiny_tokenizer(given.model, vocabulary=200)
    given.text.write_text("".join(map(chr, range(150, 190))) * 40)


def quantised_by(method: str) -> Callable[[Given], None]:
    return lambda given: given.set_config(quantization_config={"quant_method": method, "bits": 4})


def packed_without_saying_so(given: Given) -> None:
    checkpoint = Checkpoint.open(given.model)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    tensors[ATTENTION.replace("weight", "qweight")] = tensors.pop(ATTENTION).int()
    write_safetensors(given.model / "model.safetensors", tensors)


BEFORE_WORK: dict[str, tuple[Callable[[Given], Any], str]] = {
    "no safetensors at all": (
        no_header,
        r"this is no safetensors file, or its start is damaged: get it again",
    ),
    "truncated shard": (
        truncated,
        r"model-\d+-of-\d+\.safetensors: .*truncated: ends at byte .* before .*; get the file",
    ),
    "bit flipped in a header": (flipped_header, r"model-\d+-of-.*: .* needs \d+ bytes, has"),
    "missing shard": (missing_shard, r"model-\d+-of-\d+\.safetensors: missing"),
    "link to nowhere": (link_to_nowhere, r"model-.*: is a link to /nowhere/blob, which is not"),
    "pointer of git-lfs": (pointer_of_git_lfs, r"model-.*: only a pointer of git-lfs: run `git"),
    "only GGUF": (only_gguf, r"model\.gguf is GGUF, which is not read: give the model"),
    "an expert in whole numbers": (
        lambda g: g.set_tensor(EXPERT, lambda t: t.to(torch.int8)),
        rf"model\.safetensors: {EXPERT} is I8, whole numbers: give the model before",
    ),
    "more experts per token than there are": (
        lambda g: g.set_config(num_experts_per_tok=5),
        r"layer 0: a token cannot use 5 of 4 experts; see num_experts_per_tok in config\.json",
    ),
    "no experts per token": (lambda g: g.set_config(num_experts_per_tok=0), "cannot use 0 of 4"),
    "no such activation": (
        lambda g: g.set_config(hidden_act="foo"),
        r"mixtral cannot be built as config\.json says \(KeyError: 'foo'\)",
    ),
    "index points outside": (outside, r"index\.json: '\.\./text\.safetensors' is not the name"),
    "a tensor is missing": (
        lambda g: g.set_tensor(ATTENTION, lambda _: None),
        rf"{ATTENTION}: there is no such tensor",
    ),
    "wrong shape": (
        lambda g: g.set_tensor(ATTENTION, lambda t: t[:-1]),
        rf"model\.safetensors: {ATTENTION}: .* is \[63, 64\] on disk, but \[64, 64\]",
    ),
    "wrong shape of an expert": (
        lambda g: g.set_tensor(EXPERT, lambda t: t[:-1]),
        r"experts\.down_proj cannot be made of what is on disk",
    ),
    "an expert is missing": (
        lambda g: g.set_tensor(EXPERT, lambda _: None),
        r"3 experts are stored, config.json says 4",
    ),
    "config says more experts": (
        lambda g: g.set_config(num_local_experts=6),
        r"experts\.0\.w2\.weight and 3 more: .*: 4 experts are stored, config.json says 6",
    ),
    "config says fewer experts": (
        lambda g: g.set_config(num_local_experts=3),
        r"4 experts are stored, config.json says 3",
    ),
    "config says more layers": (
        lambda g: g.set_config(num_hidden_layers=3),
        r"model\.layers\.2\.\S+: there is no such tensor, but config.json asks for it",
    ),
    "config says fewer layers": (
        lambda g: g.set_config(num_hidden_layers=1),
        r"decoder layer 1 is stored, config.json says 1 layers",
    ),
    "config says no end of layers": (
        lambda g: g.set_config(num_hidden_layers=10**9),
        r"config\.json: num_hidden_layers is 1000000000",
    ),
    "config says another width": (
        lambda g: g.set_config(hidden_size=32),
        r"model-.*safetensors: .* on disk, but .* by config.json",
    ),
    "no config": (lambda g: (g.model / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (
        lambda g: (g.model / "config.json").write_text("{"),
        r"config\.json is not JSON",
    ),
    "unknown architecture": (lambda g: g.set_config(model_type="unheard_of"), "unheard_of"),
    "quantised by gptq": (quantised_by("gptq"), "already quantised .*'gptq'.* the original model"),
    "quantised by awq": (quantised_by("awq"), "already quantised .*'awq'"),
    "quantised by fp8": (quantised_by("fp8"), "already quantised .*'fp8'"),
    "packed without saying so": (packed_without_saying_so, r"already quantised: .*q_proj\.qweight"),
    "NaN in the embedding": (
        lambda g: g.set_tensor(
            "model.embed_tokens.weight", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan)
        ),
        r"model\.safetensors: model\.embed_tokens\.weight: 64 numbers are NaN or infinite",
    ),
    "infinity in the head": (
        lambda g: g.set_tensor("lm_head.weight", lambda t: t * 1e38 * 1e38),
        r"model\.safetensors: lm_head\.weight: \d+ numbers are NaN or infinite",
    ),
    "tokenizer of another model": (
        tokenizer_of_another,
        "tokenizer knows 50 tokens, the model 128",
    ),
    "tokens beyond the embedding": (tokens_beyond, "the model knows 0 to 127"),
    "no tokenizer": (
        without_tokenizer,
        r"model: no tokenizer could be read; put the model's tokenizer\.json there",
    ),
    "no text": (lambda g: g.text.unlink(), r"text\.txt': there is no such file"),
    "empty text": (lambda g: g.text.write_text(""), r"text\.txt: has no text"),
    "white space": (lambda g: g.text.write_text(" \n" * 99), r"text\.txt: has no text"),
    "binary text": (lambda g: g.text.write_bytes(bytes(range(128)) * 99), r"text\.txt: .*binary"),
    "text in Latin-1": (
        lambda g: g.text.write_bytes("déjà vu ".encode("latin-1") * 99),
        r"text\.txt: is not UTF-8",
    ),
    "text in UTF-16": (
        lambda g: g.text.write_text("the fox " * 99, encoding="utf-16"),
        r"text\.txt: is not UTF-8 .*iconv -f UTF-16",
    ),
    "output is a file": (lambda g: g.output.write_text(""), r"out is a file"),
}


@pytest.mark.parametrize("case", BEFORE_WORK)
def test_what_is_wrong_before_work_is_named_and_nothing_is_written(
    case: str, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BEFORE_WORK[case]
    damage(given)
    code = given.compress()
    told = capsys.readouterr().err
    assert code == 2, told
    assert re.search(message, told), told
    left = {f.name for f in given.folder.iterdir()} - {"model", "text.txt", "recipe.yaml"}
    assert left <= ({"out"} if case == "output is a file" else set())


def test_a_tokenizer_that_would_only_be_copied_is_looked_at_too(
    given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    (given.model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    recipe = given.folder / "uncalibrated.yaml"
    recipe.write_text("version: 1\nstages: [{type: GPTQQuantize, bits: 2, quantizer: rtn}]\n")
    arguments = [recipe, "--model", given.model, "--output", given.output]
    with pytest.raises(SystemExit, match="2"):
        main.run(["compress", *map(str, arguments), "--set", "stages.GPTQQuantize.group_size=32"])
    assert "tokenizer.json: is not JSON" in capsys.readouterr().err
    assert not given.output.exists()


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[2, 3] = torch.nan
    return tensor


def with_infinity(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = -torch.inf
    return tensor


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (EXPERT, with_nan),
        (ATTENTION, with_infinity),
        ("model.layers.0.block_sparse_moe.gate.weight", with_nan),
    ],
)
def test_a_layer_that_has_no_numbers_stops_the_run_and_the_tensor_is_named(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    given: Given,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given.set_tensor(name, change)
    code = given.compress()
    told = capsys.readouterr().err
    assert code == 1, told
    assert re.search(rf"model\.safetensors: {re.escape(name)}: 1 of \d+ numbers are NaN", told)
    assert not given.output.exists()


def test_our_own_compressed_model_is_not_compressed_again(
    given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    assert given.compress() == 0
    shutil.rmtree(given.model)
    given.output.rename(given.model)
    assert given.compress() == 2
    assert re.search("already quantised .*'mcsharp'.*mcsharp inspect", capsys.readouterr().err)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read_only"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "ro,size=1M", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("option", ["--output", "--run-dir", "--log-file"])
def test_a_read_only_place_is_found_before_work(
    option: str, given: Given, read_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert given.compress(option, str(read_only / "x")) == 2
    assert str(read_only) in capsys.readouterr().err
    assert not given.output.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model/config.json",
        "model/model.safetensors",
        "model/new.log",
        "out/new.log",
        ".out.run/new.log",
        "recipe.yaml",
        "text.txt",
        "link.log",
    ],
)
def test_a_log_is_not_written_into_what_is_no_log(
    name: str, given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    (given.folder / "link.log").symlink_to(given.text)
    assert given.compress("--set", "stages.0.bits=99") == 2  # writes the recipe
    before = {f: f.read_bytes() for f in given.folder.rglob("*") if f.is_file()}
    assert given.compress("--log-file", str(given.folder / name)) == 2
    told = capsys.readouterr().err
    assert name in told
    assert "give another --log-file" in told
    assert {f: f.read_bytes() for f in given.folder.rglob("*") if f.is_file()} == before


def test_a_log_goes_on_behind_that_of_an_earlier_run(given: Given) -> None:
    log = given.folder / "log.txt"
    log.touch()
    assert given.compress("--log-file", str(log)) == 0
    first = log.read_text()
    assert given.compress("--log-file", str(log), "--overwrite") == 0
    assert log.read_text().startswith(first)
    assert log.read_text().count("GPTQQuantize begins") >= 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_is_said_once_and_stops_no_run(
    given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    assert given.compress("--log-file", "/dev/full") == 0
    told = capsys.readouterr().err
    assert told.count("/dev/full: the log is not complete: No space left on device") == 1
    assert "Logging error" not in told


def test_too_little_disk_space_is_found_before_work(
    given: Given, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage:
        free = 100_000

    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: Usage)
    assert given.compress() == 2
    told = capsys.readouterr().err
    needed = re.search(
        r"needs ([\d.]+) kB for the run directory and ([\d.]+) kB for the result .* 100.0 kB are",
        told,
    )
    assert needed, told
    monkeypatch.undo()
    assert given.compress() == 0
    written = sum(f.stat().st_size for f in given.output.glob("*.safetensors"))
    assert 1000 * float(needed[2]) == pytest.approx(written, rel=0.1)
    assert not list(given.folder.glob(".out*"))


# What is odd, but no error


def test_an_expert_that_no_token_reaches_is_compressed_and_named(
    given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    def never_expert_0(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(".gate.weight"):
            tensor[0] = 0
            tensor[2] = -tensor[1]
            tensor[3] = tensor[1]
            tensor[4] = -tensor[1]
        return tensor

    shutil.rmtree(given.model)
    save_tiny_model(given.model, "mixtral", num_hidden_layers=2, num_local_experts=5)
    save_tiny_tokenizer(given.model)
    given.set_tensors(never_expert_0)
    assert given.compress() == 0
    assert "layer 0: expert 0 (0 tokens)" in capsys.readouterr().err
    assert verify(given.output).tensors


def test_hessians_without_any_input_give_finite_weights(given: Given) -> None:
    given.text.write_text("a" * 2000)

    def zero_embedding(tensor: torch.Tensor) -> torch.Tensor:
        tensor[ord("a")] = 0
        return tensor

    given.set_tensor("model.embed_tokens.weight", zero_embedding)
    assert given.compress() == 0
    assert verify(given.output).tensors


def test_hessians_of_rank_one_give_finite_weights(given: Given) -> None:
    given.text.write_text("a" * 2000)
    assert given.compress() == 0
    assert verify(given.output).tensors
