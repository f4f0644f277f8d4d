"""Compressed models in transformers: load, run, save, offload, and refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PLAIN_FAMILIES, save_tiny_model
from tiny_tokenizer import save_tiny_tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import mcsharp_sdk
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.models.experts import MATRICES, fused_weight
from mcsharp_sdk.models.source import SourceModel
from mcsharp_sdk.quantization.grid import dequantise_packed
from mcsharp_sdk.quantization.rotation import expert_signs, rotate
from mcsharp_sdk.recipe.schema import Recipe
from mcsharp_sdk.runtime import modules
from mcsharp_sdk.runtime.modules import ExpertBucket, PackedLinear

LENGTH = 32


def recipe(tmp_path: Path, bits: dict[str, list[int]], **quantise: Any) -> Recipe:
    """Quantise experts at given widths, calibrated on a text of the alphabet."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    widths = tmp_path / "bits.json"
    widths.write_text(json.dumps({"version": 1, "bits": bits}))
    calibration = {"source": "text", "path": str(text), "sequences": 8, "length": LENGTH}
    stage = {"type": "GPTQQuantize", "bits": str(widths), "group_size": 16, **quantise}
    return Recipe.from_dict({"version": 1, "calibration": calibration, "stages": [stage]})


def compress_tiny(
    tmp_path: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    widths: Sequence[int] = (1, 2, 3, 4),
    **quantise: Any,
) -> Path:
    """A tiny model of a family, compressed at mixed widths; the original is in ``original``."""
    original = save_tiny_model(tmp_path / "original", family, dtype=dtype)
    save_tiny_tokenizer(original)
    topology = SourceModel(original).topology
    bits = {
        str(layer): [widths[(expert + layer) % len(widths)] for expert in range(count)]
        for layer, count in topology.experts_per_layer().items()
    }
    output = tmp_path / "compressed"
    mcsharp_sdk.compress(recipe(tmp_path, bits, **quantise), original, output, progress=False)
    return output


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral")


def tokens() -> torch.Tensor:
    return torch.randint(1, 128, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens(), use_cache=False).logits


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def packed_modules(model: Any) -> Iterator[tuple[str, PackedLinear | ExpertBucket]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | ExpertBucket):
            yield name, module


def rotation(columns: int, expert: int) -> torch.Tensor:
    """T, [K, K]."""
    signs = expert_signs(expert + 1, columns)[expert]
    return rotate(torch.eye(columns, dtype=torch.float64), signs)


@torch.no_grad()
def dequantised(compressed: Any, original: Path) -> Any:
    """The stock model with the packed weights written out."""
    stock = AutoModelForCausalLM.from_pretrained(
        original, dtype=compressed.dtype, experts_implementation="eager"
    ).eval()
    for name, module in packed_modules(compressed):
        if isinstance(module, PackedLinear):
            stock.get_submodule(name).weight.copy_(
                dequantise_packed(
                    module.qweight,
                    module.scales,
                    module.zeros,
                    bits=module.bits,
                    group_size=module.group_size,
                    columns=module.in_features,
                    dtype=compressed.dtype,
                )
            )
            continue
        experts = stock.get_submodule(name.rpartition(".")[0])
        for matrix in MATRICES:
            for slot, expert in enumerate(module.experts):
                packed = module.stack(matrix).matrix(slot)
                weight = dequantise_packed(
                    packed.weight.qweight,
                    packed.weight.scales,
                    packed.weight.zeros,
                    bits=packed.bits,
                    group_size=packed.group_size,
                    columns=packed.columns,
                    dtype=torch.float64 if module.rotated else compressed.dtype,
                )
                if module.rotated:
                    weight = weight @ rotation(packed.columns, expert)
                fused_weight(experts, matrix)[expert] = weight
    for name, module in compressed.named_modules():
        for expert in getattr(module, "removed", ()):
            for matrix in MATRICES:
                fused_weight(stock.get_submodule(name), matrix)[expert] = 0
    return stock


@pytest.mark.parametrize("widths", [(2, 0, 3, 0), (0,)])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_weights_of_removed_experts_count_as_zeros(
    family: str, widths: Sequence[int], tmp_path: Path
) -> None:
    """Also with biases, which stay, with shared experts, and where none of a layer is left."""
    folder = compress_tiny(tmp_path, family, widths=widths)
    compressed = load(folder)
    buckets = [m.bits for _, m in packed_modules(compressed) if isinstance(m, ExpertBucket)]
    assert set(buckets) == set(widths) - {0}
    assert any(getattr(module, "removed", ()) for module in compressed.modules())
    stock = dequantised(compressed, tmp_path / "original")
    torch.testing.assert_close(logits(compressed), logits(stock), rtol=1e-4, atol=1e-5)
    mcsharp_sdk.verify(folder)
    compressed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(compressed))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_rotated_experts_are_their_weights_turned_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shared experts, and with biases and a gate of another kind."""
    compressed = load(compress_tiny(tmp_path, family, rotation="hadamard"))
    buckets = [m for _, m in packed_modules(compressed) if isinstance(m, ExpertBucket)]
    assert buckets
    assert all(bucket.rotated for bucket in buckets)
    stock = dequantised(compressed, tmp_path / "original")
    expert_signs.cache_clear()
    torch.testing.assert_close(logits(compressed), logits(stock), rtol=1e-4, atol=1e-5)
    shapes = {(b.rotated_of, columns) for b in buckets for columns in b.columns.values()}
    assert expert_signs.cache_info().currsize == len(shapes) == 2  # one table a layer shape
    compressed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(compressed))
    monkeypatch.setattr(modules, "FEW_ROWS", 0)  # one expert after the other
    torch.testing.assert_close(logits(compressed), logits(stock), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_logits_equal_those_of_the_stock_model_with_dequantised_weights(
    family: str, tmp_path: Path
) -> None:
    folder = compress_tiny(tmp_path, family)
    compressed = load(folder)
    widths = {module.bits for _, module in packed_modules(compressed)}
    assert widths == {1, 2, 3, 4}
    stock = dequantised(compressed, tmp_path / "original")
    torch.testing.assert_close(logits(compressed), logits(stock), rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_equals_generation_of_the_stock_model(mixtral: Path) -> None:
    compressed = load(mixtral)
    stock = dequantised(compressed, mixtral.parent / "original")
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        compressed.generate(tokens(), **settings), stock.generate(tokens(), **settings)
    )


def test_saving_a_loaded_model_round_trips(mixtral: Path, tmp_path: Path) -> None:
    model = load(mixtral)
    model.save_pretrained(tmp_path / "once", max_shard_size="40KB")
    assert not list((tmp_path / "once").glob("model*"))
    assert len(list((tmp_path / "once").glob("mcsharp-*.safetensors"))) > 1
    again = load(tmp_path / "once")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice")), logits(model))


def test_one_of_several_processes_saves_a_model(mixtral: Path, tmp_path: Path) -> None:
    model = load(mixtral)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    model.save_pretrained(tmp_path / "another", False)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "main", is_main_process=True)
    assert torch.equal(logits(load(tmp_path / "main")), logits(model))


@torch.no_grad()
def hidden_states(base: Any) -> torch.Tensor:
    return base(tokens(), use_cache=False).last_hidden_state


def test_the_base_model_is_loaded_alone_and_saved(mixtral: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(mixtral).eval()
    assert type(base).__name__ == "MixtralModel"
    assert torch.equal(hidden_states(base), hidden_states(load(mixtral).model))
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(hidden_states(again), hidden_states(base))
    with pytest.raises(
        InputError, match=r"which has no lm_head\.weight .*: load it by MixtralModel"
    ):
        load(tmp_path / "base")


def test_a_class_with_other_tensors_is_told_which_one_has_these(mixtral: Path) -> None:
    wanted = (
        r"compressed holds a MixtralForCausalLM, which has no score\.weight for a "
        "MixtralForSequenceClassification: load it by AutoModelForCausalLM"
    )
    with pytest.raises(InputError, match=wanted):
        AutoModelForSequenceClassification.from_pretrained(mixtral)


def test_a_tensor_that_is_gone_is_missed_by_the_base_model_too(
    mixtral: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(mixtral, tmp_path / "copy")
    for file in folder.glob("mcsharp-*.safetensors"):
        kept = load_file(file)
        kept.pop("model.norm.weight", None)
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"has no norm\.weight"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(InputProblems, match=r"model\.norm\.weight: no file has it"):
        load(folder)


def test_a_model_loads_onto_devices_chosen_by_accelerate(mixtral: Path) -> None:
    assert torch.equal(logits(load(mixtral, device_map="auto")), logits(load(mixtral)))


def test_packed_weights_can_be_offloaded_to_disk(mixtral: Path, tmp_path: Path) -> None:
    reference = load(mixtral)
    places = {name: "cpu" for name, _ in reference.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in reference.model.named_children()}
    del places["model.layers"]
    places |= {f"model.layers.{i}": "disk" for i in range(3)}
    model = load(mixtral, device_map=places, offload_folder=tmp_path)
    packed = [p for _, module in packed_modules(model) for p in module.parameters()]
    assert all(parameter.is_meta for parameter in packed)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_asked_for_is_that_of_the_outputs(mixtral: Path, dtype: torch.dtype) -> None:
    model = load(mixtral, dtype=dtype)
    assert logits(model).dtype == dtype
    scales = [p for n, p in model.named_parameters() if n.endswith("scales")]
    assert {s.dtype for s in scales} == {torch.float16}


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", dtype=torch.float32),
        lambda model: model.to(torch.zeros(1)),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.double(),
    ],
)
def test_a_loaded_model_is_moved_but_not_cast(mixtral: Path, cast: Any) -> None:
    model = load(mixtral)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"load it with from_pretrained\(..., dtype=...\) instead"):
        cast(model)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    assert model.to("cpu") is model
    assert model.to(device=torch.device("meta"), dtype=None).device.type == "meta"


def test_casting_a_part_of_a_model_leaves_packed_tensors(mixtral: Path) -> None:
    model = load(mixtral)
    packed = {id(p) for _, module in packed_modules(model) for p in module.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in packed]
    assert names
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    body = model.model.half()
    assert body.layers[0].input_layernorm.weight.dtype == torch.float16
    body.layers[0].bfloat16()
    body.layers[0].type(torch.float64)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert {name: after[name].dtype for name in names} == {n: before[n].dtype for n in names}
    model.model.to("meta", torch.float64)
    assert {model.state_dict()[name].device.type for name in names} == {"meta"}


def test_the_bias_of_a_packed_linear_is_cast_with_what_it_is_added_to() -> None:
    linear = PackedLinear(32, 16, 2, 32, torch.zeros(16))
    linear.bfloat16()
    assert linear.bias is not None
    assert (linear.bias.dtype, linear.scales.dtype) == (torch.bfloat16, torch.float16)


def test_a_pickled_model_gives_the_same_logits(mixtral: Path, tmp_path: Path) -> None:
    model = load(mixtral)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_without_the_package_loading_is_an_error(mixtral: Path) -> None:
    program = (
        "from transformers import AutoModelForCausalLM as A; "
        f"A.from_pretrained({str(mixtral)!r}); print('loaded')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "OSError" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["experts"].pop("1"), "decoder layers"),
        (lambda q: q["experts"]["0"].append(2), "5 widths to the 4 experts"),
        (lambda q: q["linears"].update({"self_attn.x_proj": 4}), "x_proj"),
        (lambda q: q.update(format_version=9), "format_version 9"),
        (lambda q: q.update(rotations="hadamard"), "has rotations, which this mcsharp_sdk does"),
        (lambda q: q.update(to_dict="hadamard"), "has to_dict, which this mcsharp_sdk does not"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(
    mixtral: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = shutil.copytree(mixtral, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_shapes_that_do_not_fit_the_widths_are_refused(mixtral: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixtral, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    widths = config["quantization_config"]["experts"]["0"]
    config["quantization_config"]["experts"]["0"] = [4 if b == 3 else b for b in widths]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputProblems, match=r"width_4\.gate_up_qweight: is \[1, 192, 32\], but \[2,"
    ):
        load(folder)


@pytest.mark.parametrize("first", ["pruned_routing", "packed_model"])
def test_any_module_can_be_imported_first(first: str) -> None:
    # It imports transformers, which imports the plug-in while the module is not complete.
    command = [sys.executable, "-c", f"import mcsharp_sdk.runtime.{first}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
