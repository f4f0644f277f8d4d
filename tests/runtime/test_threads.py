"""One pruned model that several threads call, each with its own padding."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from test_pruned_routing import Made, load, logits, make, with_metric

THREADS, LENGTH = 4, 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.mark.parametrize("mode", ["rule", "both"])
@pytest.mark.parametrize("metric", ["variance", "attention"])
def test_threads_get_what_each_would_get_alone(made: Made, metric: str, mode: str) -> None:
    model = load(made.folder)
    with_metric(model, metric)
    model.set_expert_pruning(mode)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 128, (THREADS, 1, LENGTH), generator=generator)
    masks = torch.ones_like(ids)
    for thread in range(THREADS):
        masks[thread, :, : 3 * thread] = 0
    alone = [logits(model, i, attention_mask=m) for i, m in zip(ids, masks, strict=True)]

    # All reach the last layer before one goes on: what a forward keeps is there all at once.
    meet = Barrier(THREADS, timeout=60)
    last = max(made.topology.moe)
    experts = model.model.layers[last].get_submodule(made.topology.moe[last].experts)

    def wait(*_: object) -> None:
        meet.wait()

    experts.register_forward_pre_hook(wait, prepend=True)

    def call(thread: int) -> torch.Tensor:
        return logits(model, ids[thread], attention_mask=masks[thread])

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(call, range(THREADS)))
    for mine, expected, mask in zip(found, alone, masks, strict=True):
        assert torch.equal(mine[mask.bool()], expected[mask.bool()])
