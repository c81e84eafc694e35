"""A model in a loop that we do not control: the trainer of `transformers`, as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import rekindle
from peak import peak_bytes
from rekindle import Session, Stats
from watch import modes

STEPS, LENGTH = 6, 64
TEXTS = torch.randint(256, (16, LENGTH), generator=torch.Generator().manual_seed(0))
DATA: Any = [{"input_ids": text, "labels": text} for text in TEXTS]


def small_gpt2() -> nn.Module:
    """A GPT-2 with dropout, of three layers."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=64, n_head=4, n_positions=LENGTH, vocab_size=256))


class Watched(TrainerCallback):
    """Writes down what the session of a model says after each step."""

    def __init__(self, session: Session | None) -> None:
        self.session = session
        self.stats: list[Stats] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After the optimizer's step, before the gradients are zeroed."""
        if self.session is not None:
            self.stats.append(self.session.last_step)


@dataclass
class Fitted:
    """What the trainer logged, the weights it arrived at, the statistics of each step under a budget, and what all of
    it allocated at its peak."""

    logged: list[Any]
    weights: list[Tensor]
    stats: list[Stats]
    peak: int


def fit(path: Path, budget: int | None, **options: Any) -> Fitted:
    """Train."""
    model = small_gpt2()
    if budget is not None:
        rekindle.apply(model, memory_budget=budget)
    arguments = TrainingArguments(
        str(path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    watched = Watched(rekindle.session_of(model) if budget is not None else None)
    trainer = Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=[watched])
    peak = peak_bytes(trainer.train)
    if budget is not None:
        rekindle.remove(model)
    logged = [
        {name: value for name, value in entry.items() if name.endswith(("loss", "grad_norm"))}
        for entry in trainer.state.log_history
    ]
    return Fitted(logged, list(model.parameters()), watched.stats, peak)


def full_need() -> tuple[int, int]:
    """Bytes of parameters and their gradients, and of what a plain step allocates beside them."""
    model = small_gpt2()

    def step() -> None:
        model(input_ids=TEXTS[:2], labels=TEXTS[:2]).loss.backward()

    step()
    return 2 * sum(parameter.nbytes for parameter in model.parameters()), peak_bytes(step)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 2}, id="evaluation"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"activation_checkpointing": True}, id="checkpoints"),
    ],
)
def test_same_training_in_less_memory(options: dict[str, Any], tmp_path: Path) -> None:
    """With 60% of what a step allocates beside weights and gradients: losses, gradient norms and weights are those of
    the trainer alone, bit for bit, from the third step on nothing makes room op by op, and the allocator saw less."""
    standing, beside = full_need()
    plain = fit(tmp_path, None, **options)
    managed = fit(tmp_path, standing + int(0.6 * beside), **options)
    assert managed.logged == plain.logged
    assert all(map(torch.equal, plain.weights, managed.weights))
    assert all(step.departures == step.sweeps == 0 for step in managed.stats[2:])
    if "activation_checkpointing" not in options:  # which need no more than that by themselves
        assert managed.peak < plain.peak
        assert all(step.ops_replayed > 0 for step in managed.stats[2:])
    assert modes() == 0


def test_rests_where_all_fits(tmp_path: Path) -> None:
    """With room for all, the trainer's steps come to run as plain PyTorch, and are the same."""
    plain, managed = fit(tmp_path, None), fit(tmp_path, 1 << 30)
    assert managed.logged == plain.logged
    assert all(map(torch.equal, plain.weights, managed.weights))
    assert [step.rested for step in managed.stats][-2:] == [1, 1]
    assert modes() == 0
