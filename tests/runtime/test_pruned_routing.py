"""Expert pruning in loaded models, against a slow reference and the unpruned model."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pruned_models import SlowPruning, networks, pruning_layout, save_pruned, stock_model
from tiny_models import PLAIN_FAMILIES
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import mcsharp_sdk.runtime.hf_quantizer  # noqa: F401  (lets transformers load the models)
from mcsharp_sdk.errors import InputError, RunError
from mcsharp_sdk.models.experts import call_arguments
from mcsharp_sdk.models.topology import Topology
from mcsharp_sdk.pruning import METRICS, TopAnyNetwork
from mcsharp_sdk.runtime import modules
from mcsharp_sdk.runtime.expert_pruner import ExpertPruner
from mcsharp_sdk.runtime.pruning_layout import DROP_INSIGNIFICANT, PruningLayout
from mcsharp_sdk.runtime.received_attention import AttentionTap

MODES = ("rule", "learned", "both")
SEQUENCES = [
    torch.randint(1, 128, (length,), generator=torch.Generator().manual_seed(length))
    for length in (13, 8, 1)
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Made(NamedTuple):
    """A folder, and what it was made from."""

    folder: Path
    stock: Any
    topology: Topology
    layout: PruningLayout
    nets: dict[int, TopAnyNetwork]


def make(
    folder: Path,
    family: str,
    *,
    packed: bool = True,
    trained: bool = True,
    model: dict[str, Any] | None = None,
    **pruning: Any,
) -> Made:
    stock, topology = stock_model(family, **(model or {}))
    layout = pruning_layout(topology, **pruning)
    nets = networks(topology, stock.config.hidden_size, trained=trained)
    save_pruned(folder, stock, topology, layout, nets, packed=packed)
    return Made(folder, stock, topology, layout, nets)


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", **settings
    ).eval()


def with_metric(model: Any, metric: str) -> None:
    """Give a loaded model another metric, as if its config named that."""
    model.set_expert_pruning("off")
    state = model.expert_pruning_state
    rule = dataclasses.replace(state.layout.rule, metric=metric)
    state.layout = dataclasses.replace(state.layout, mode="rule", rule=rule)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """k = 3, sigmoid scores, slots in no order, a shared expert and a dense layer."""
    return make(tmp_path_factory.mktemp("deepseek"), "deepseek_v3")


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The sequences as one batch, and its attention mask."""
    longest = max(map(len, SEQUENCES))
    ids = torch.zeros(len(SEQUENCES), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(SEQUENCES):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


@torch.no_grad()
def logits(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    return model(ids, use_cache=False, **settings).logits


def choices(model: Any) -> dict[int, list[Tensor]]:
    """What the experts of each layer are called with from now on."""
    seen: dict[int, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(pruner := getattr(module, "pruner", None), ExpertPruner):
            calls = seen[pruner.layer] = []
            module.register_forward_pre_hook(lambda _m, args, c=calls: c.append(args[1]))
    return seen


# Nothing dropped, nothing changed


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_keeping_everything_leaves_the_logits_bit_for_bit(
    family: str, packed: bool, tmp_path: Path
) -> None:
    made = make(tmp_path, family, packed=packed, trained=False, thresholds=(0.0,) * 5)
    model = load(tmp_path)
    ids, mask = padded("left")
    assert model.expert_pruning == "both"
    model.set_expert_pruning("off")
    off = logits(model, ids, attention_mask=mask)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["pruning"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path), ids, attention_mask=mask), off)
    torch.testing.assert_close(logits(made.stock, ids, attention_mask=mask), off)
    for mode in MODES:
        model.set_expert_pruning(mode)
        assert torch.equal(logits(model, ids, attention_mask=mask), off)
    for metric in (*METRICS, "none"):
        with_metric(model, metric)
        model.set_expert_pruning("rule")
        assert torch.equal(logits(model, ids, attention_mask=mask), off)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_nothing_changes_with_other_implementations_of_stock_experts(
    implementation: str, tmp_path: Path
) -> None:
    make(tmp_path, "olmoe", packed=False, trained=False, thresholds=(0.0,))
    model = load(tmp_path)
    model.set_experts_implementation(implementation)
    ids, _ = padded("left")
    model.set_expert_pruning("off")
    off = logits(model, ids)
    for mode in MODES:
        model.set_expert_pruning(mode)
        assert torch.equal(logits(model, ids), off)


# Against the slow reference, a batch against its sequences one by one


def check_against_reference(made: Made, model: Any, layout: PruningLayout, mode: str) -> None:
    reference = SlowPruning(copy.deepcopy(made.stock), made.topology, layout, made.nets)
    reference.mode = mode
    model.set_expert_pruning(mode)
    seen = choices(model)
    dropped = 0
    for side in ("left", "right"):
        ids, mask = padded(side)
        found = logits(model, ids, attention_mask=mask)
        for row, sequence in enumerate(SEQUENCES):
            expected = reference.logits(sequence)
            place = mask[row].bool()
            for layer, calls in seen.items():
                chosen = calls[-1].unflatten(0, ids.shape)[row, place]
                assert torch.equal(chosen, reference.choices[layer]), (side, row, layer)
                dropped += int((chosen == made.topology.moe[layer].num_experts).sum())
            torch.testing.assert_close(found[row, place], expected, rtol=1e-3, atol=1e-4)
    assert dropped > 0


@pytest.mark.parametrize(
    ("family", "packed", "mode"),
    [*((family, True, "both") for family in PLAIN_FAMILIES), ("olmoe", False, "rule")],
)
def test_families_prune_as_the_reference_does(
    family: str, packed: bool, mode: str, tmp_path: Path
) -> None:
    made = make(tmp_path, family, packed=packed, mode=mode)
    model = load(tmp_path)
    assert model.expert_pruning == mode
    for chosen in MODES:
        check_against_reference(made, model, made.layout, chosen)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        *((metric, mode) for metric in (*METRICS, "none") for mode in ("rule", "both")),
        (DROP_INSIGNIFICANT, "rule"),
    ],
)
@pytest.mark.parametrize("made", ["mixtral", "deepseek"])
def test_every_metric_prunes_as_the_reference_does(
    made: str, metric: str, mode: str, request: pytest.FixtureRequest
) -> None:
    source: Made = request.getfixturevalue(made)
    model = load(source.folder)
    with_metric(model, metric)
    check_against_reference(source, model, model.expert_pruning_state.layout, mode)


def test_protection_changes_what_is_dropped(mixtral: Made) -> None:
    model, (ids, mask) = load(mixtral.folder), padded("left")
    model.set_expert_pruning("both")
    protected = logits(model, ids, attention_mask=mask)
    model.set_expert_pruning("learned")
    assert not torch.equal(logits(model, ids, attention_mask=mask), protected)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_stock_experts_prune_alike_in_every_implementation(
    implementation: str, tmp_path: Path
) -> None:
    make(tmp_path, "qwen3_moe", packed=False)
    model, (ids, _) = load(tmp_path), padded("left")
    eager = logits(model, ids)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model, ids), eager, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_base_model_prunes_as_the_whole_one_does(mixtral: Made) -> None:
    base = AutoModel.from_pretrained(mixtral.folder, experts_implementation="eager").eval()
    whole, ids = load(mixtral.folder), SEQUENCES[0][None]
    hidden = base(ids, use_cache=False).last_hidden_state
    assert torch.equal(whole.lm_head(hidden), logits(whole, ids))
    base.set_expert_pruning("off")
    assert not torch.equal(base(ids, use_cache=False).last_hidden_state, hidden)


def test_the_body_alone_and_embedded_inputs_prune_alike(mixtral: Made) -> None:
    model, (ids, mask) = load(mixtral.folder), padded("left")
    expected = logits(model, ids, attention_mask=mask)
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        found = model(inputs_embeds=embedded, attention_mask=mask).logits
        body = model.model(ids, mask).last_hidden_state
        assert torch.equal(model.lm_head(body), expected)
    assert torch.equal(found, expected)


# Generation


def decoded(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt and then of one token at a time, with a cache."""
    parts = []
    with torch.no_grad():
        step = model(ids[:, :prompt], use_cache=True)
        parts.append(step.logits)
        for place in range(prompt, ids.shape[1]):
            step = model(ids[:, place : place + 1], past_key_values=step.past_key_values)
            parts.append(step.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("made", ["mixtral", "deepseek"])
@pytest.mark.parametrize(("mode", "metric"), [("rule", "none"), ("learned", "attention")])
def test_step_by_step_agrees_with_the_whole_forward_where_no_token_is_ranked(
    made: str, mode: str, metric: str, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(made).folder)
    with_metric(model, metric)
    model.set_expert_pruning(mode)
    ids = torch.stack([SEQUENCES[0], SEQUENCES[0].flip(0)])
    torch.testing.assert_close(decoded(model, ids, 5), logits(model, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("metric", ["attention", "mean", DROP_INSIGNIFICANT])
def test_a_decode_step_is_pruned_by_its_weights_alone(mixtral: Made, metric: str) -> None:
    model = load(mixtral.folder)
    with_metric(model, metric)
    model.set_expert_pruning("rule")
    seen = choices(model)
    decoded(model, SEQUENCES[0][None], 6)
    with_metric(model, "none")
    model.set_expert_pruning("rule" if metric != DROP_INSIGNIFICANT else "off")
    first = min(seen)
    alone = len(seen[first])
    decoded(model, SEQUENCES[0][None], 6)  # the first layer sees the same tokens in both
    steps = [torch.cat(seen[first][start + 1 : start + alone]) for start in (0, alone)]
    assert len(steps[0]) == len(SEQUENCES[0]) - 6
    assert torch.equal(*steps)


@pytest.mark.parametrize("made", ["mixtral", "deepseek"])
@pytest.mark.parametrize("mode", MODES)
def test_generation_of_a_padded_batch_equals_that_of_its_sequences(
    made: str, mode: str, request: pytest.FixtureRequest
) -> None:
    model, (ids, mask) = load(request.getfixturevalue(made).folder), padded("left")
    model.set_expert_pruning(mode)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)[:, -6:]
    static = model.generate(
        ids, attention_mask=mask, pad_token_id=0, cache_implementation="static", **settings
    )[:, -6:]
    assert torch.equal(static, batch)
    for row, sequence in enumerate(SEQUENCES):
        assert torch.equal(model.generate(sequence[None], **settings)[0, -6:], batch[row])


def test_a_prompt_in_two_parts_ranks_each_part_on_its_own(mixtral: Made) -> None:
    model = load(mixtral.folder)
    with_metric(model, "mean")
    model.set_expert_pruning("rule")
    seen, ids = choices(model), SEQUENCES[0][None]
    with torch.no_grad():
        step = model(ids[:, :8], use_cache=True)
        model(ids[:, 8:], past_key_values=step.past_key_values)
        model(ids[:, :8], use_cache=True)
    first = min(seen)
    kept = [(calls != 4).all(1).sum().item() for calls in seen[first]]
    assert torch.equal(seen[first][0], seen[first][2])
    assert kept[1] >= 1  # ⌈0.2 · 5⌉ of the second part is protected, whatever the first had


# Received attention


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The sums that pruners take, in order of layer."""
    taken: list[Tensor] = []
    take = AttentionTap.take

    def note(tap: AttentionTap) -> Tensor | None:
        if (sums := take(tap)) is not None:
            taken.append(sums)
        return sums

    monkeypatch.setattr(AttentionTap, "take", note)
    return taken


@torch.no_grad()
def eager_sums(model: Any, ids: Tensor, mask: Tensor, **settings: Any) -> list[Tensor]:
    """Column sums of eager attention maps over the queries that are no padding, per layer."""
    model.set_attn_implementation("eager")
    maps = model(ids, attention_mask=mask, output_attentions=True, **settings).attentions
    valid = mask[:, -ids.shape[1] :, None].float()
    return [(found.float().mean(1) * valid).sum(1)[:, -ids.shape[1] :] for found in maps]


@pytest.mark.parametrize(
    ("family", "model"),
    [*((family, {}) for family in PLAIN_FAMILIES), ("mixtral", {"sliding_window": 5})],
)
def test_received_attention_equals_that_of_eager_maps(
    family: str, model: dict[str, Any], tmp_path: Path, received: list[Tensor]
) -> None:
    made = make(tmp_path, family, packed=False, mode="rule", model=model, protect_ratio=1.0)
    loaded = load(tmp_path)  # everything is protected: all layers see what the stock model does
    for side in ("left", "right", "none"):
        ids, mask = padded("left" if side == "none" else side)
        mask = torch.ones_like(mask) if side == "none" else mask
        received.clear()
        logits(loaded, ids, attention_mask=None if side == "none" else mask)
        expected = eager_sums(made.stock, ids, mask)
        assert len(received) == len(made.topology.moe)
        for sums, layer in zip(received, made.topology.moe, strict=True):
            close = torch.where(mask.bool(), sums - expected[layer], 0.0).abs().max()
            assert close < 2e-5, (side, layer)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_received_attention_behind_a_cache(
    cache: str, tmp_path: Path, received: list[Tensor]
) -> None:
    from transformers import DynamicCache, StaticCache

    made = make(tmp_path, "mixtral", packed=False, mode="rule", protect_ratio=1.0)
    model, (ids, mask) = load(tmp_path), padded("left")
    kind: dict[str, Any] = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=20),
    }
    for stop, start in ((8, 0), (13, 8)):
        if start == 0:
            past = kind[cache]()
            stock_past = DynamicCache(config=model.config)
        received.clear()
        part, seen = ids[:, start:stop], mask[:, :stop]
        with torch.no_grad():
            model(part, attention_mask=seen, past_key_values=past)
        expected = eager_sums(made.stock, part, seen, past_key_values=stock_past)
        for sums, wanted in zip(received, expected, strict=True):
            place = mask[:, start:stop].bool()
            torch.testing.assert_close(sums[place], wanted[place], rtol=1e-4, atol=2e-5)


def test_sums_are_computed_only_where_a_mode_needs_them(
    mixtral: Made, received: list[Tensor]
) -> None:
    model, (ids, _) = load(mixtral.folder), padded("left")
    for mode, needed in (("rule", 3), ("learned", 0), ("off", 0), ("both", 3)):
        model.set_expert_pruning(mode)
        assert model.config._attn_implementation == ("mcsharp_sdpa" if needed else "sdpa")
        received.clear()
        logits(model, ids)
        assert len(received) == needed
    with_metric(model, "mean")
    model.set_expert_pruning("rule")
    assert model.config._attn_implementation == "sdpa"


# Cost


def test_dropped_slots_compute_nothing(deepseek: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    multiply = modules.packed_linears

    def count(x: Tensor, stack: Any, counts: Any) -> Tensor:
        rows.append(x.shape[0])
        return multiply(x, stack, counts)

    monkeypatch.setattr(modules, "packed_linears", count)
    model, (ids, mask) = load(deepseek.folder), padded("left")
    for mode in ("off", *MODES):
        model.set_expert_pruning(mode)
        seen = choices(model)
        rows.clear()
        logits(model, ids, attention_mask=mask)
        kept = sum(int((calls[-1] < 8).sum()) for calls in seen.values())
        assert sum(rows) == 2 * kept  # two matrices per expert
        assert (kept < 2 * 3 * ids.numel()) == (mode != "off")


# Switching, saving, placing


def test_modes_switch_back_and_forth_without_loading(mixtral: Made) -> None:
    model, (ids, mask) = load(mixtral.folder), padded("left")
    first: dict[str, Tensor] = {}
    for mode in ("off", *MODES, "learned", "rule", "off", "both"):
        model.set_expert_pruning(mode)
        assert model.expert_pruning == mode
        found = logits(model, ids, attention_mask=mask)
        assert torch.equal(found, first.setdefault(mode, found))
    assert len({tuple(found.flatten().tolist()) for found in first.values()}) == 4


def test_saving_a_loaded_model_round_trips(deepseek: Made, tmp_path: Path) -> None:
    model, (ids, mask) = load(deepseek.folder), padded("left")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    again = load(tmp_path)
    assert again.expert_pruning == "both"
    assert again.expert_pruning_state.layout == deepseek.layout
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    for mode in ("off", *MODES):
        model.set_expert_pruning(mode)
        again.set_expert_pruning(mode)
        expected = logits(model, ids, attention_mask=mask)
        assert torch.equal(logits(again, ids, attention_mask=mask), expected)


def test_networks_stay_in_float32(mixtral: Made) -> None:
    model = load(mixtral.folder, dtype=torch.bfloat16)
    pruners = [p for n, p in model.named_parameters() if ".pruner." in n]
    assert {p.dtype for p in pruners} == {torch.float32}
    assert not any(p.requires_grad for p in pruners)
    assert logits(model, padded("left")[0]).dtype == torch.bfloat16
    model.model.half()
    assert {p.dtype for n, p in model.named_parameters() if ".pruner." in n} == {torch.float32}


def test_pruners_can_be_offloaded_to_disk(deepseek: Made, tmp_path: Path) -> None:
    reference, (ids, mask) = load(deepseek.folder), padded("left")
    expected = logits(reference, ids, attention_mask=mask)
    places = {name: "cpu" for name, _ in reference.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in reference.model.named_children()}
    del places["model.layers"]
    places |= {f"model.layers.{i}": "disk" for i in range(3)}
    model = load(deepseek.folder, device_map=places, offload_folder=tmp_path)
    assert all(p.is_meta for n, p in model.named_parameters() if ".pruner." in n)
    assert torch.equal(logits(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_has_a_mode_of_its_own(mixtral: Made, copied: Any) -> None:
    model, (ids, mask) = load(mixtral.folder), padded("left")
    expected = logits(model, ids, attention_mask=mask)
    other = copied(model)
    assert torch.equal(logits(other, ids, attention_mask=mask), expected)
    other.set_expert_pruning("off")
    assert not torch.equal(logits(other, ids, attention_mask=mask), expected)
    assert torch.equal(logits(model, ids, attention_mask=mask), expected)


# Refusals


def test_a_model_without_pruning_can_only_be_off(mixtral: Made, tmp_path: Path) -> None:
    stock, topology = stock_model("mixtral")
    model = load(save_pruned(tmp_path, stock, topology, None, {}, packed=True))
    assert model.expert_pruning == "off"
    model.set_expert_pruning("off")
    with pytest.raises(InputError, match="'rule' is not possible: this model has none"):
        model.set_expert_pruning("rule")


def test_a_refused_mode_changes_nothing(mixtral: Made) -> None:
    model = load(mixtral.folder)
    model.set_expert_pruning("learned")
    with pytest.raises(InputError, match="'always' is not possible.*off, rule, learned, both"):
        model.set_expert_pruning("always")
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="needs attn_implementation='sdpa'.*runs 'eager'"):
        model.set_expert_pruning("both")
    assert model.expert_pruning == "learned"
    logits(model, padded("left")[0])


def test_loading_with_other_attention_says_what_to_do(mixtral: Made) -> None:
    with pytest.raises(InputError, match="Load it with 'sdpa'"):
        load(mixtral.folder, attn_implementation="eager")


def test_attention_that_is_changed_later_is_noticed(mixtral: Made) -> None:
    model, (ids, _) = load(mixtral.folder), padded("left")
    model.set_attn_implementation("sdpa")
    with pytest.raises(RunError, match=r"call model\.set_expert_pruning\('both'\) again"):
        logits(model, ids)
    model.set_expert_pruning("both")
    logits(model, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["rule"]["thresholds"].update({"1": []}), "layer 1 0 thresholds.* need 1"),
        (lambda p: p["rule"]["thresholds"].update({"7": [0.5]}), r"layers \[7\]"),
        (lambda p: p["learned"].update(layers=[0, 9]), r"layers \[9\].*in \[0, 1, 2\]"),
        (lambda p: p.update(mode="always"), "'always' is not possible"),
    ],
)
def test_a_description_that_does_not_fit_the_model_is_refused(
    mixtral: Made, tmp_path: Path, change: Any, message: str
) -> None:
    for file in mixtral.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((mixtral.folder / "config.json").read_text())
    change(config["quantization_config"]["pruning"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_layers_may_be_pruned_in_part(tmp_path: Path) -> None:
    stock, topology = stock_model("mixtral")
    layout = pruning_layout(topology, mode="rule")
    assert layout.rule is not None
    assert layout.learned is not None
    rule = dataclasses.replace(layout.rule, thresholds={1: layout.rule.thresholds[1]})
    learned = dataclasses.replace(layout.learned, layers=(2,))
    layout = PruningLayout("rule", rule, learned)
    nets = networks(topology, 64, trained=True)
    model = load(save_pruned(tmp_path, stock, topology, layout, nets, packed=True))
    seen = choices(model)
    assert set(seen) == {1, 2}
    for mode, pruned in (("rule", {1}), ("learned", {2}), ("both", {2}), ("off", set())):
        model.set_expert_pruning(mode)
        logits(model, padded("left")[0])
        assert {layer for layer, calls in seen.items() if (calls[-1] == 4).any()} == pruned


def test_experts_called_by_name_in_any_order_are_understood() -> None:
    hidden, index, weights = (
        torch.ones(3, 4),
        torch.zeros(3, 2, dtype=torch.int64),
        torch.rand(3, 2),
    )
    by_name = {"top_k_weights": weights, "top_k_index": index}
    for found in (call_arguments((hidden, index, weights), {}), call_arguments((hidden,), by_name)):
        assert [a is b for a, b in zip(found, (hidden, index, weights), strict=True)] == [True] * 3
