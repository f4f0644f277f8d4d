"""Training of top-any networks, step by step, so that it can be cut off and continued.

What a step draws at random depends on the seed and the step's number alone. So networks, optimiser,
penalty and curve are all there is to keep, and a continued training ends with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcsharp_sdk.artifacts import TrainingCurve
from mcsharp_sdk.checked_files import DamagedFile, hash_of
from mcsharp_sdk.errors import RunError
from mcsharp_sdk.models.ranks import ALONE, Ranks
from mcsharp_sdk.models.shards import write_safetensors
from mcsharp_sdk.pruning.top_any import TopAnyNetwork

if TYPE_CHECKING:
    from mcsharp_sdk.modifiers.top_any_router import TopAnyRouter

PENALTY_RATE = 0.2
"""Step of the dual ascent on the logarithm of the penalty, per unit that too many are kept."""

WEIGHT_GAIN = 6.0
"""How much louder than the whole hidden state the routing weights speak at the start: they tell
most about what an expert is worth, and are few among many inputs."""

NEAR_TARGET = 0.02
"""Training to a target may stop early once the keep ratio is this near."""


class StepLosses(NamedTuple):
    """``error``: distillation loss; ``keep_ratio``: mean share of kept experts; both scalars.

    Of several processes, each has a part, and the parts add up.
    """

    error: Tensor
    keep_ratio: Tensor


Losses = Callable[[float, torch.Generator], StepLosses]
"""Temperature and source of randomness -> losses of one step."""


def temperature_at(settings: TopAnyRouter, step: int) -> float:
    """Temperature of the Gumbel-Softmax at a step, from the first to the last of ``steps``."""
    start, end = settings.temperature, settings.final_temperature
    done = step / max(1, settings.steps - 1)
    if settings.temperature_schedule == "linear":
        return start + (end - start) * done
    if settings.temperature_schedule == "exponential":
        return float(start * (end / start) ** done)
    return start


def seeded(*parts: object) -> int:
    """A seed that depends on all the parts."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def new_network(
    layer: int, hidden_size: int, top_k: int, settings: TopAnyRouter, device: str
) -> TopAnyNetwork:
    """The network of one layer before training; it keeps all experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(settings.seed, layer))
        network = TopAnyNetwork(hidden_size, top_k, settings.units)
    with torch.no_grad():
        network.first.weight[:, hidden_size:] *= WEIGHT_GAIN * hidden_size**0.5
    return network.to(device)


class Training:
    """One training, of one network or of several together.

    Parameters
    ----------
    settings : of the stage.
    name : of what is trained, for seeds and messages: a decoder layer, or ``model``.
    networks : decoder layer -> network; trained in place.
    worst_error : error if every token kept one expert.
    file : where the state is kept every ``checkpoint_steps``; read first if it is there.
    ranks : the processes that train together, each on its part of a step's tokens.
    """

    def __init__(
        self,
        settings: TopAnyRouter,
        name: str,
        networks: Mapping[int, TopAnyNetwork],
        worst_error: float,
        file: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self._settings, self._name, self._networks, self._file = settings, name, networks, file
        self._ranks = ranks
        # Comparing with the worst error makes settings mean the same at every layer.
        self._scale = max(worst_error, torch.finfo(torch.float32).tiny)
        parameters = [p for network in networks.values() for p in network.parameters()]
        self._optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        given = settings.activation_penalty
        self._penalty = self._scale if given is None else given
        self._curve: dict[str, list[float]] = {n: [] for n in TrainingCurve.__dataclass_fields__}
        self._ranks.wait()  # nobody writes the state before all have read it
        self._restore()
        self._ranks.wait()

    @property
    def curve(self) -> TrainingCurve:
        """The steps so far."""
        return TrainingCurve(**self._curve)

    def run(self, losses: Losses) -> TrainingCurve:
        """Train to the end, or until nothing gets better.

        Raises
        ------
        RunError
            If the loss is not finite.
        """
        for step in range(self.curve.steps, self._settings.steps):
            if self._is_done():
                break
            self._step(step, losses)
            if (step + 1) % self._settings.checkpoint_steps == 0 and self._ranks.first:
                self._save()
        if not all(p.isfinite().all() for n in self._networks.values() for p in n.parameters()):
            raise RunError(self._not_finite(self.curve.steps, math.nan))
        return self.curve

    def _step(self, step: int, losses: Losses) -> None:
        temperature = temperature_at(self._settings, step)
        generator = torch.Generator().manual_seed(seeded(self._settings.seed, self._name, step))
        with torch.enable_grad():
            error, keep = losses(temperature, generator)
            loss = error + self._penalty * keep
            value, error_now, kept = self._summed(loss, error, keep)
            if not math.isfinite(value):
                raise RunError(self._not_finite(step, value))
            self._optimizer.zero_grad()
            (loss / self._scale).backward()
        self._sum_gradients()
        self._optimizer.step()
        now = (value, error_now, kept, temperature, self._penalty)
        for values, number in zip(self._curve.values(), now, strict=True):
            values.append(number)
        if self._settings.target_activation is not None:
            excess = kept - self._settings.target_activation
            self._penalty *= math.exp(PENALTY_RATE * excess)

    def _summed(self, *parts: Tensor) -> list[float]:
        """The values of scalars of which each process has a part."""
        return self._ranks.sum_(torch.stack([part.detach() for part in parts])).tolist()

    def _sum_gradients(self) -> None:
        if self._ranks.alone:
            return
        for network in self._networks.values():
            for parameter in network.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(self._ranks.sum_(parameter.grad.contiguous()))

    def _is_done(self) -> bool:
        """Whether the last ``patience`` steps were no better than as many before them."""
        patience, target = self._settings.patience, self._settings.target_activation
        if patience is None or self.curve.steps < 2 * patience:
            return False

        def means(what: str) -> tuple[float, float]:
            values = self._curve[what][-2 * patience :]
            return sum(values[:patience]) / patience, sum(values[patience:]) / patience

        if target is None:
            before, now = means("loss")
            return now >= before
        before, now = means("error")
        return now >= before and all(abs(k - target) < NEAR_TARGET for k in means("keep_ratio"))

    def _not_finite(self, step: int, value: float) -> str:
        return (
            f"TopAnyRouter: {what_trains(self._name)}: the loss is {value} at step {step}. What "
            "earlier stages made is kept in the run directory. A smaller learning_rate (it is "
            f"{self._settings.learning_rate:g}) may help; if the loss is not finite at step 0, "
            "the model's own outputs are not"
        )

    def _save(self) -> None:
        tensors = {
            f"network.{layer}.{name}": tensor
            for layer, network in self._networks.items()
            for name, tensor in network.state_dict().items()
        }
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        notes: dict[str, Any] = {
            "name": self._name,
            "penalty": self._penalty,
            "curve": self._curve,
            "sha256": _tensors_hash(tensors),
        }
        notes["notes_sha256"] = hash_of(notes)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(self._file, tensors, {"training": json.dumps(notes)})

    def _restore(self) -> None:
        if not self._file.exists():
            return
        notes, tensors = _read_state(self._file)
        if notes["name"] != self._name:
            return
        for layer, network in self._networks.items():
            prefix = f"network.{layer}."
            network.load_state_dict(
                {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, what = name.split(".")
                state.setdefault(int(number), {})[what] = tensor
        groups: Any = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._penalty, self._curve = notes["penalty"], notes["curve"]


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the tensors' names and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(name.encode() + hashlib.sha256(data.numpy().data).digest())
    return total.hexdigest()


def _read_state(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Notes and tensors of a training that is under way.

    Raises
    ------
    DamagedFile
        If they are not those that were written.
    """
    try:
        with safe_open(file, "pt") as kept:
            notes = json.loads(kept.metadata()["training"])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        expected = notes.pop("notes_sha256")
        whole = hash_of(notes) == expected and notes["sha256"] == _tensors_hash(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedFile(f"{file} is damaged. Delete it: this training then begins again")
    return notes, tensors


def what_trains(name: str) -> str:
    """``name`` of a training, as messages call it."""
    return f"layer {name}" if name.isdigit() else "the networks"


def renormalised(weights: Tensor, keep: Tensor) -> Tensor:
    """Weights of the kept slots, their sum as before; zeros for a token whose weights are all 0.

    As :func:`mcsharp_sdk.pruning.renormalise` at run time, but with gradients, also of the slots of
    tokens that keep everything: there that hands on the weights themselves.

    Parameters
    ----------
    weights, keep : (T, k) floating; ``keep`` is 0 or 1, and 1 somewhere in each row.
    """
    kept = weights * keep
    after = kept.sum(-1, keepdim=True)
    after = torch.where(after > 0, after, torch.ones_like(after))
    return kept * (weights.sum(-1, keepdim=True) / after)
