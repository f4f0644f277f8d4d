"""A whole model as one ONNX folder: the logits and the tokens of the transformers model."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mcsharp_exporters.external_data import ExternalData
from mcsharp_exporters.model_tensors import ModelTensors
from mcsharp_exporters.onnx_model import OnnxModelExporter, export_onnx_model
from mcsharp_exporters.onnx_model_runner import Cache, OnnxModel
from mcsharp_exporters.onnx_runner import OnnxRouters
from onnx import TensorProto, helper
from onnx_models import FAMILIES, compressed, distance, logits_of, original, pruning_of, reference
from tiny_models import tiny_config
from tiny_tokenizer import save_tiny_tokenizer

import mcsharp_sdk
from mcsharp_sdk.cli.main import run
from mcsharp_sdk.errors import InputError, InputProblems
from mcsharp_sdk.evaluation.cost import model_cost
from mcsharp_sdk.runtime.pruned_routing import set_expert_pruning

SharedPath = Callable[[str], Path]

IDS = np.random.default_rng(0).integers(0, 128, (2, 20))


def exported(source: Path, folder: Path, **settings: Any) -> OnnxModel:
    """Exported, exact unless settings say otherwise, and opened."""
    mcsharp_sdk.export("onnx_model", source, folder, **{"accuracy_level": 0, **settings})
    return OnnxModel(folder, "cpu", threads=1)


def in_pieces(model: OnnxModel, ids: np.ndarray, *lengths: int) -> np.ndarray:
    """Logits of tokens that are read in pieces of these lengths."""
    cache: Cache | None = None
    found = []
    for piece in np.split(ids, np.cumsum(lengths)[:-1], axis=1):
        logits, cache = model(piece, cache)
        found.append(logits)
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_are_those_of_transformers_however_the_tokens_are_read(
    case: str, tmp_path: Path
) -> None:
    family, settings = FAMILIES[case]
    source = compressed(tmp_path / "model", family, **settings)
    model = exported(source, tmp_path / "onnx")
    onnx.checker.check_model(str(tmp_path / "onnx" / "model.onnx"))
    expected = logits_of(reference(source), IDS)
    at_once, _ = model(IDS)
    assert distance(at_once, expected) < 1e-4
    assert distance(in_pieces(model, IDS[:1], 7, 1, 12), expected[:1]) < 1e-4
    assert distance(in_pieces(model, IDS, 17, 1, 1, 1), expected) < 1e-4


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (0, 2, 3), (0, 0, 0, 2)])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_experts_may_be_rotated_and_removed(
    family: str, widths: Sequence[int], rotated: bool, tmp_path: Path
) -> None:
    settings = FAMILIES[family][1]
    source = compressed(tmp_path / "model", family, widths=widths, rotated=rotated, **settings)
    model = exported(source, tmp_path / "onnx")
    expected = logits_of(reference(source), IDS)
    assert distance(model(IDS)[0], expected) < 1e-4
    assert model.manifest.nominal_bits == pytest.approx(model_cost(source).bits.nominal)
    one_by_one = in_pieces(model, IDS[:1, :12], *[1] * 12)  # some have no expert left
    assert distance(one_by_one, expected[:1, :12]) < 1e-4


def test_a_layer_without_experts_is_refused(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "mixtral", widths=(0,))
    with pytest.raises(InputError, match="all experts of decoder layer 0 are removed"):
        mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2"])
def test_rows_of_a_padded_batch_are_read_as_if_alone(case: str, tmp_path: Path) -> None:
    family, settings = FAMILIES[case]
    source = compressed(tmp_path / "model", family, **settings)
    model = exported(source, tmp_path / "onnx")
    expected = logits_of(reference(source), IDS)
    mask = np.ones((2, 17), np.int64)
    mask[1, 13:] = 0
    logits, cache = model(IDS[:, :17], mask=mask)
    assert distance(logits[0], expected[0, :17]) < 1e-4
    assert distance(logits[1, :13], expected[1, :13]) < 1e-4
    for step in range(3):
        next_ids = np.array([[IDS[0, 17 + step]], [IDS[1, 13 + step]]])
        logits, cache = model(next_ids, cache)
        assert distance(logits[0, 0], expected[0, 17 + step]) < 1e-4
        assert distance(logits[1, 0], expected[1, 13 + step]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_are_not_compressed_can_be_exported(dtype: torch.dtype, tmp_path: Path) -> None:
    source = original(tmp_path / "model", "qwen2_moe", dtype)
    model = exported(source, tmp_path / "onnx")
    assert distance(model(IDS)[0], logits_of(reference(source), IDS)) < 1e-4
    assert not model.manifest.compressed
    assert model.manifest.nominal_bits == 8 * dtype.itemsize


def test_half_precision_and_level_4_come_close(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "mixtral", widths=(4, 4, 3, 3))
    expected = logits_of(reference(source), IDS)
    half = exported(source, tmp_path / "half", precision="fp16")
    rounded = exported(source, tmp_path / "rounded", accuracy_level=4)
    logits, cache = half(IDS)
    assert logits.dtype == np.float16
    assert {values.dtype.name for values in cache.values.values()} == {"float16"}
    for found in (logits.astype(np.float32), rounded(IDS)[0]):
        # A few tokens may choose other experts.
        error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert np.median(error) < 0.05


@pytest.mark.parametrize(("mode", "exported_as"), [("learned", "default"), ("rule", "weights")])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_experts_are_dropped_as_the_loaded_model_drops_them(
    family: str, mode: str, exported_as: str, tmp_path: Path
) -> None:
    settings = FAMILIES[family][1]
    source = compressed(tmp_path / "model", family, pruning=pruning_of(family, mode), **settings)
    loaded = reference(source)
    pruned = logits_of(loaded, IDS)
    set_expert_pruning(loaded, "off")
    assert distance(pruned, logits_of(loaded, IDS)) > 1e-2
    model = exported(source, tmp_path / "onnx", pruning=exported_as)
    assert distance(model(IDS)[0], pruned) < 1e-4
    assert distance(in_pieces(model, IDS, 17, 1, 1, 1), pruned) < 1e-4
    assert model.manifest.pruning == ("weights" if exported_as == "weights" else mode)


@pytest.mark.parametrize("metric", ["attention", "variance", "drop_insignificant"])
def test_what_a_graph_cannot_know_is_refused_with_the_nearest_that_it_can(
    metric: str, tmp_path: Path
) -> None:
    source = compressed(
        tmp_path / "model", "mixtral", pruning=pruning_of("mixtral", "rule", metric)
    )
    nearest = "off, or learned" if metric == "drop_insignificant" else "pruning: weights"
    with pytest.raises(InputError, match=nearest):
        mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")
    mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx", pruning="learned")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("granitemoe", {}, "granitemoe cannot be exported as one ONNX graph; mixtral, olmoe"),
        ("deepseek_v3", {}, "Its routers may be: see the exporter onnx_routers"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act: is 'gelu'; only 'silu'"),
        ("mixtral", {"head_dim": 24}, "head size: is 24; onnxruntime takes multiples of 16"),
        ("deepseek_v2", {}, "qk_rope_head_dim: is 8"),
    ],
)
def test_other_models_are_refused_before_any_work(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = original(tmp_path / "model", family, torch.float32, **settings)
    with pytest.raises(InputError, match=message):
        mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_groups_that_onnxruntime_lacks_are_refused(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "mixtral", group=8)
    with pytest.raises(InputError, match="groups of 8; onnxruntime takes groups of 16, 32"):
        mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")


def test_a_recipe_is_refused_before_it_runs() -> None:
    stages = [
        {"type": "ExpertStats"},
        {"type": "BitAllocation", "target_bits": 2.0},
        {"type": "GPTQQuantize", "group_size": 48},
        {"type": "TokenProtection"},
    ]
    with pytest.raises(InputError) as error:
        mcsharp_sdk.Recipe.from_dict(
            {
                "version": 1,
                "calibration": {"source": "embedded"},
                "stages": stages,
                "exports": [{"type": "onnx_model"}],
            }
        )
    assert "in groups of 16, 32, 64, 128, 256, not of 48" in str(error.value)
    assert "pruning: weights" in str(error.value)


@pytest.mark.parametrize(
    ("stage", "pruning", "lacks"),
    [
        ("GPTQQuantize", "learned", ["top any router"]),
        ("GPTQQuantize", "rule", ["token protection"]),
        ("GPTQQuantize", "weights", ["token protection"]),
        ("GPTQQuantize", "both", ["token protection", "top any router"]),
        ("TopAnyRouter", "learned", []),
        ("TopAnyRouter", "weights", ["token protection"]),
        ("TokenProtection", "weights", []),
    ],
)
def test_pruning_that_the_model_will_not_have_is_told_with_the_recipe(
    stage: str, pruning: str, lacks: list[str]
) -> None:
    bits = {"bits": 2} if stage == "GPTQQuantize" else {}
    recipe = {
        "version": 1,
        "calibration": {"source": "embedded"},
        "stages": [{"type": stage, **bits}],
        "exports": [{"type": "onnx_model", "pruning": pruning}],
    }
    if not lacks:
        mcsharp_sdk.Recipe.from_dict(recipe)
        return
    with pytest.raises(InputProblems) as error:
        mcsharp_sdk.Recipe.from_dict(recipe)
    for problem, artifact in zip(error.value.problems, lacks, strict=True):
        lack = f"exports[0]: onnx_model needs the {artifact} of an earlier stage"
        assert str(problem).startswith(lack)


def test_weights_that_do_not_fit_into_fp16_leave_nothing_behind(tmp_path: Path) -> None:
    source = original(tmp_path / "model", "mixtral", torch.float32)
    tensors = ModelTensors.of_directory(source)
    layer = tensors.layer

    def too_large(index: int) -> Any:
        return ((name, t * 1e6 if "o_proj" in name else t) for name, t in layer(index))

    object.__setattr__(tensors, "layer", too_large)
    settings = OnnxModelExporter(precision="fp16")
    with pytest.raises(InputError, match="self_attn.o_proj does not fit into fp16"):
        export_onnx_model(tensors, tmp_path / "onnx", settings)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_earlier_export_is_overwritten_and_nothing_else(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "mixtral")
    exported(source, tmp_path / "onnx")
    with pytest.raises(InputError, match="exists already; give --overwrite"):
        mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")
    again = mcsharp_sdk.export(
        "onnx_model", source, tmp_path / "onnx", overwrite=True, precision="fp16"
    )
    assert again["precision"] == "fp16"
    (tmp_path / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx", overwrite=True)


def test_only_a_layer_is_in_memory(tmp_path: Path) -> None:
    source = ModelTensors.of_directory(compressed(tmp_path / "model", "mixtral"))
    layer, most, alive = source.layer, 0, weakref.WeakSet[torch.Tensor]()

    def watched(index: int) -> Any:
        nonlocal most
        for name, tensor in layer(index):
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor

    of_one_layer = len(list(layer(0)))
    object.__setattr__(source, "layer", watched)
    export_onnx_model(source, tmp_path / "onnx")
    assert of_one_layer <= most < 2 * of_one_layer


def test_external_data_beyond_two_gigabytes_is_read(tmp_path: Path) -> None:
    values = torch.arange(100, dtype=torch.float32)
    with ExternalData(tmp_path / "data") as data:
        data._file.truncate(2**32)  # a hole: it takes no room
        data._file.seek(2**32)
        data.bytes = 2**32
        stored = data.store("values", values)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "values"], ["y"])],
        "far",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [100])],
        initializer=[stored],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "far.onnx").write_bytes(model.SerializeToString())
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(tmp_path / "far.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones(100, np.float32)})
    assert found.tolist() == (values + 1).tolist()


# Trained models


@pytest.fixture(scope="module", params=["mixtral-mini", "deepseek-mini"])
def trained(
    request: pytest.FixtureRequest, shared_path: SharedPath, tmp_path_factory: Any
) -> tuple[Path, Path]:
    """A trained model at 2.5 bits, and its export by the same recipe."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    recipe = mcsharp_sdk.Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"source": "embedded", "sequences": 4, "length": 128},
            "stages": [
                {"type": "ExpertStats", "group_size": 64, "quantizer": "rtn"},
                {"type": "BitAllocation", "target_bits": 2.5},
                {"type": "GPTQQuantize", "group_size": 64, "quantizer": "rtn"},
            ],
            "exports": [{"type": "safetensors"}, {"type": "onnx_model", "accuracy_level": 0}],
        }
    )
    mcsharp_sdk.compress(recipe, shared_path(f"models/{request.param}"), folder)
    return folder, folder / "onnx_model"


@pytest.mark.slow
def test_trained_models_say_the_same_64_tokens(
    trained: tuple[Path, Path], shared_path: SharedPath
) -> None:
    from transformers import AutoTokenizer

    source, folder = trained
    text = shared_path("data/wikitext2-test.txt").read_text()[:1000]
    ids = np.array([AutoTokenizer.from_pretrained(source)(text)["input_ids"][:64]])
    model, expected = OnnxModel(folder, "cpu", threads=1), reference(source)
    assert distance(model(ids)[0], logits_of(expected, ids)) < 1e-4
    said = expected.generate(torch.from_numpy(ids), max_new_tokens=64, do_sample=False)[0, 64:]
    stop = frozenset([expected.generation_config.eos_token_id])
    assert list(model.generate(ids[0], 64, stop)) == said.tolist()


@pytest.mark.slow
def test_the_folder_is_as_small_as_the_safetensors(trained: tuple[Path, Path]) -> None:
    source, folder = trained
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    after = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    assert after < 1.03 * before


@pytest.mark.slow
def test_evaluating_the_export_gives_the_perplexity_of_the_model(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sons of the king went to the city, and there they stayed. " * 40)
    given: dict[str, Any] = {"text": text, "window": 128, "max_tokens": 512}
    expected, found = (mcsharp_sdk.evaluate(folder, **given) for folder in trained)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.tokens == expected.tokens
    assert found.nominal_bits == pytest.approx(expected.nominal_bits)
    assert found.stored_bits == pytest.approx(expected.stored_bits, rel=0.02)
    mcsharp_sdk.export("onnx_model", trained[0], tmp_path / "level4")
    rounded = mcsharp_sdk.evaluate(tmp_path / "level4", **given)
    assert rounded.perplexity == pytest.approx(expected.perplexity, rel=0.01)


# The command line


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_export_and_evaluate_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    source, folder = compressed(tmp_path / "model", "mixtral"), tmp_path / "onnx"
    save_tiny_tokenizer(source)
    assert command("export", "onnx_model", source, "--output", folder) == 0
    assert "3 layers" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("all that is told here is told twice " * 5)
    assert command("evaluate", folder, "--text", text, "--window", 32, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "CPUExecutionProvider"
    assert found["activated_expert_ratio"] is None
    assert command("evaluate", folder, "--text", text) == 0
    assert command("evaluate", folder, "--text", text, "--dtype", "bfloat16") == 2
    assert "another precision is a setting of the export" in capsys.readouterr().err
    assert command("evaluate", folder, "--text", text, "--save") == 2
    assert "evaluated by itself: with no other model, no reference" in capsys.readouterr().err


def test_what_evaluate_cannot_change_is_said(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "mixtral")
    mcsharp_sdk.export("onnx_model", source, tmp_path / "onnx")
    with pytest.raises(InputError, match="exported with pruning 'off'"):
        mcsharp_sdk.evaluate(tmp_path / "onnx", pruning="rule")
    with pytest.raises(InputError, match="auto, cpu or cuda, not on 'mps'"):
        mcsharp_sdk.evaluate(tmp_path / "onnx", device="mps")


def test_what_a_runner_cannot_take_is_said(tmp_path: Path) -> None:
    mcsharp_sdk.export("onnx_model", compressed(tmp_path / "model", "mixtral"), tmp_path / "onnx")
    with pytest.raises(InputError, match="is not ONNX routers: open it with OnnxModel of"):
        OnnxRouters(tmp_path / "onnx")
    with pytest.raises(InputError, match="threads is 0: give 1 or more"):
        OnnxModel(tmp_path / "onnx", "cpu", threads=0)
    model: Any = OnnxModel(tmp_path / "onnx", "cpu", threads=1)
    ids = np.array([[1, 2]])
    with pytest.raises(InputError, match="tokens: a numpy array is needed, not list"):
        model([[1, 2]])
    with pytest.raises(InputError, match="mask: a numpy array is needed, not list"):
        model(ids, None, [[1, 1]])
    with pytest.raises(InputError, match="cache: what an earlier call gave is needed, not str"):
        model(ids, "cache")


def test_settings_of_the_config_are_those_of_the_folder(tmp_path: Path) -> None:
    source = compressed(tmp_path / "model", "deepseek_v2", qk_rope_head_dim=16)
    exported(source, tmp_path / "onnx")
    decoder = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["decoder"]
    config = tiny_config("deepseek_v2")
    assert decoder["num_hidden_layers"] == config.num_hidden_layers
    inputs = {
        i.name
        for i in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.input
    }
    named = {decoder["inputs"]["past_key_names"] % 2, decoder["inputs"]["past_value_names"] % 0}
    assert named | {"input_ids", "attention_mask"} <= inputs
