"""The budget holds: by Rekindle's count and by the allocator's own events, from the first step, on any model."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rekindle
import zoo
from helpers import Layer, assert_same, live_activations, small_batch, small_model, train
from peak import peak_bytes
from rekindle._bytes import parse_bytes
from rekindle.record import kernels
from zoo import Batch, Entry

pytestmark = pytest.mark.usefixtures("counting")  # what an earlier test left behind is not ours


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Errors that a test caught hold frames, and frames activations: leave none to the tests that count them."""
    yield
    gc.collect()


def standing(model: nn.Module, batch: Any) -> int:
    """Bytes that are there before a step: parameters, gradients, buffers and inputs, each storage once."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [tensor for tensor in batch.values() if isinstance(tensor, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@dataclass
class Trainer:
    """Trains a model and has the allocator say what each step took.

    Attributes:
        peaks: for each step, the most bytes there were: those before it, and what it had allocated at its peak.
        counted: the same by the session's own count.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor] = zoo.loss_of
    steps: int = 3
    measured: bool = True
    peaks: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)

    def plain(self) -> list[Any]:
        """Without a session."""
        return self._train(None)

    def managed(self, budget: int) -> list[Any]:
        """With a budget, which must hold."""
        session = rekindle.Session(memory_budget=budget)
        history = self._train(session)
        if self.measured:
            assert max(self.peaks) <= budget
        assert max(self.counted) <= budget
        assert session.stats.failed_recomputes == 0
        assert live_activations() == 0
        return history

    def _train(self, session: rekindle.Session | None) -> list[Any]:
        self.peaks, self.counted = [], []

        def step(model: nn.Module, number: int, way: Any) -> Tensor:
            batch = self.batch(number)
            before = standing(model, batch)
            losses = []

            def run() -> None:
                with way:
                    loss = self.loss(model, batch)
                    loss.backward()
                losses.append(loss.detach())

            if self.measured:
                self.peaks.append(before + peak_bytes(run))
            else:
                run()
            if session is not None:
                self.counted.append(session._ledger.peak_nbytes + session._ledger.leaf_nbytes)
            return losses[0]

        return train(self.make, step, session, steps=self.steps)


def check(trainer: Trainer, least: int = 3) -> None:
    """From loose to the tightest that can be met, each budget holds in every step, no bit differs, and the first that
    cannot be met is refused. At least `least` can be met; all but the first are less than plain PyTorch needs."""
    plain = trainer.plain()
    peak = max(trainer.peaks)
    torch.manual_seed(0)
    floor = standing(trainer.make(), {})
    met = 0
    for share in (1.05, 0.95, 0.85, 0.75, 0.6, 0.45, 0.3, 0.15):
        try:
            managed = trainer.managed(floor + int(share * (peak - floor)))
        except rekindle.BudgetInfeasible:
            break
        assert_same(plain, managed)
        met += 1
    assert met >= least
    assert met < 8


@pytest.mark.parametrize("entry", zoo.ZOO, ids=repr)
def test_zoo(entry: Entry) -> None:
    """Every model of the zoo: in-place ResNet, LSTM, U-Net, encoders, decoders, experts."""
    check(Trainer(entry.make, entry.batch, steps=2), least=1 if entry.name == "lstm" else 2)


def rows(number: int) -> Batch:
    """A batch of the small model whose size changes in every step."""
    return {"x": small_batch(number, rows=(32, 48, 16, 64)[number % 4])}


def square(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the small models."""
    return model(batch["x"]).square().mean()


def test_shapes_change() -> None:
    """Shapes that change in every step are no trouble: there is no plan that they could break."""
    check(Trainer(small_model, rows, square, steps=4))


def test_amp() -> None:
    """Under autocast, where types are mixed and products of short floats need room of their own."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch["x"]).float().square().mean()

    check(Trainer(lambda: small_model(8), lambda number: {"x": small_batch(number, rows=256)}, loss))


def test_gradient_accumulation() -> None:
    """Several backward passes in one step, the gradients of the earlier ones counted."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        first, second, last = batch["x"].chunk(3)
        for part in (first, second):
            model(part).square().mean().backward()
        return model(last).square().mean()

    check(Trainer(small_model, lambda number: {"x": small_batch(number, rows=96)}, loss))


def test_checkpoint_inside() -> None:
    """PyTorch's own checkpoints inside the session."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        hidden = batch["x"]
        for layer in model:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if isinstance(layer, Layer) else layer(hidden)
        return hidden.square().mean()

    plain = (trainer := Trainer(small_model, rows, loss)).plain()
    for share in (1.3, 1.15, 1.05):
        assert_same(plain, trainer.managed(int(share * max(trainer.peaks))))


def test_masks() -> None:
    """How much comes out of a mask depends on data: the budget holds all the same, in steps where more does."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        hidden = model(batch["x"])
        return (hidden[hidden > batch["least"]] ** 2).sum() + hidden.square().mean()

    def batch(number: int) -> Batch:
        return {"x": small_batch(number), "least": 10.0 if number == 0 else -10.0}

    check(Trainer(lambda: small_model(8), batch, loss), least=1)


def test_parameters_and_inputs_count() -> None:
    """The budget is everything the step needs, not only its activations: one below the parameters is refused at once,
    and the message counts them."""
    model = nn.Linear(512, 512)
    session = rekindle.Session(memory_budget="1MiB")
    with pytest.raises(rekindle.BudgetInfeasible) as caught, session:
        model(torch.ones(1, 512))
    assert "1.0 MiB parameters, gradients, buffers and inputs" in str(caught.value)
    assert "memory_budget is 1.0 MiB" in str(caught.value)


@pytest.mark.parametrize("modules", [True, False], ids=["modules", "functions"])
def test_inputs_of_other_steps_do_not_count(modules: bool) -> None:
    """Batches that stay alive count in the step that touches them: a list of them does not fill the budget up."""
    torch.manual_seed(0)
    model = small_model(1)
    batches = [small_batch(number, rows=256) for number in range(16)]
    weights = [torch.randn(64, 64).div_(8).requires_grad_() for _ in range(4)]

    def loss(x: Tensor) -> Tensor:
        if modules:
            return model(x).square().mean()
        for weight in weights:
            x = F.gelu(x @ weight)
        return x.square().mean()

    def step(x: Tensor, managed: Any) -> list[Tensor]:
        random = torch.get_rng_state()
        model.zero_grad()
        for weight in weights:
            weight.grad = None
        with managed:
            loss(x).backward()
        if managed is not session:
            torch.set_rng_state(random)
        return [p.grad.clone() for p in (*model.parameters(), *weights) if p.grad is not None]

    session = rekindle.Session(memory_budget=700 << 10)
    leaves = []
    for number, x in enumerate(batches):
        assert all(map(torch.equal, step(x, nullcontext()), step(x, session)))
        if number > 1:
            leaves.append(session._ledger.leaf_nbytes)
            assert session.last_step.ops_replayed > 0
    assert session.stats.departures == 0
    assert len(set(leaves[-8:])) == 1


def test_inputs_of_a_pending_backward_pass_are_known() -> None:
    """What an earlier step read, and may have to read again, is copied before a later step writes over it."""

    def run(managed: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = small_model(2), small_batch(0, rows=256)
        with managed:
            early = model(x + 1).square().mean()
        with managed:
            x.data.mul_(2)
            late = model(x).square().mean()
            late.backward()
            early.backward()
        return [parameter.grad for parameter in model.parameters()]

    session = rekindle.Session(rekindle.KeepNone(), pressure=rekindle.Pressure(rekindle.FakeReader()))
    assert all(map(torch.equal, run(nullcontext()), run(session)))
    assert session.stats.ops_replayed > 0


def test_without_a_profiler() -> None:
    """What ops take is measured when nobody else profiles: the same bits and the budget kept by count."""
    trainer = Trainer(small_model, rows, square, steps=4)
    plain = trainer.plain()
    peak = max(trainer.peaks)
    trainer.measured = False
    for share in (1.0, 0.9, 0.8):
        assert_same(plain, trainer.managed(int(share * peak)))


@pytest.mark.parametrize("entry", [e for e in zoo.ZOO if e.name in ("gpt2", "bert", "resnet", "unet")], ids=repr)
def test_later_steps_of_a_measured_session(entry: Entry) -> None:
    """The allocator agrees in the steps that rely on what was measured in earlier ones."""
    torch.manual_seed(0)
    model, batch = entry.make(), entry.batch(0)

    def plain() -> None:
        zoo.loss_of(model, batch).backward()

    plain()
    budget = standing(model, batch) + int(0.8 * peak_bytes(plain))
    session = rekindle.Session(memory_budget=budget)

    def step() -> None:
        with session:
            zoo.loss_of(model, batch).backward()

    for _ in range(2):
        step()
    for _ in range(3):
        assert standing(model, batch) + peak_bytes(step) <= budget
    assert session.stats.ops_replayed > 0


CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


@pytest.fixture
def no_idea(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound for convolutions is far above what they take, as for those of few channels that are transposed."""
    for name in CONVOLUTIONS:
        monkeypatch.setitem(kernels._BOUNDS, name, lambda tensors, args, results: 1 << 30)


def convolutions() -> nn.Module:
    """A few convolutions."""
    return nn.Sequential(*(part for _ in range(6) for part in (nn.Conv1d(16, 16, 3, padding=1), nn.GELU())))


def sounds(number: int) -> Batch:
    """A batch for them."""
    return {"x": torch.randn(4, 16, 256, generator=torch.Generator().manual_seed(number))}


@pytest.mark.usefixtures("no_idea")
def test_a_loose_bound_refuses_nothing() -> None:
    """Where the bound for an op may be far above what it takes, the op is run when all that can go is gone: the budget
    is refused by what it took, and holds if that fits."""
    trainer = Trainer(convolutions, sounds, square)
    plain = trainer.plain()
    peak, trainer.measured = max(trainer.peaks), False
    for share in (1.0, 0.9, 0.8):
        assert_same(plain, trainer.managed(int(share * peak)))
    low = standing(convolutions(), sounds(0))
    refused = low + sounds(0)["x"].nbytes + (24 << 10)  # its result, and not the copy that its kernel makes
    with pytest.raises(rekindle.BudgetInfeasible) as caught:
        trainer.managed(refused)
    match = MESSAGE.fullmatch(str(caught.value))
    assert match is not None, str(caught.value)
    assert parse_bytes(match[3]) < peak


@pytest.mark.usefixtures("no_idea")
def test_what_kernels_take_is_known_to_all_sessions() -> None:
    """What a session measured another goes by, though it could measure nothing itself: a profiler is on."""
    trainer = Trainer(convolutions, sounds, square)
    plain = trainer.plain()
    peak, trainer.measured = max(trainer.peaks), False
    trainer.managed(2 * peak)
    trainer.measured = True
    for share in (1.0, 0.9, 0.8):
        assert_same(plain, trainer.managed(int(share * peak)))


def test_what_kernels_take_counts_in_all_sessions() -> None:
    """A session that never measured an op knows all the same that its kernel takes much: only such ops are looked up in
    steps that follow a plan, and count."""
    model, batch, sessions = convolutions(), sounds(0), [rekindle.Session(memory_budget="1GiB") for _ in range(2)]
    for session in sessions:
        with session:
            square(model, batch).backward()
    measures, knows = (session._room.hungry for session in sessions)
    assert knows == measures >= {"aten.convolution.default"}


# -- a budget that cannot be met ---------------------------------------------------------------------------------------

MESSAGE = re.compile(
    r"memory_budget is ([\d.]+ [KM]iB), but aten\.\S+ in .+ needs [\d.]+ (B|[KM]iB) and [\d.]+ [KM]iB cannot go: "
    r"[\d.]+ [KM]iB parameters, gradients, buffers and inputs; .+\. "
    r'This op fits from memory_budget="(\d+[KM]iB)"; ops after it may need more\. Or use a smaller batch\.'
)


def test_infeasible() -> None:
    """The error names the budget as it was written, the op, the bytes that cannot go and what holds them."""
    session = rekindle.Session(memory_budget="300KiB")
    model = small_model()
    with pytest.raises(rekindle.BudgetInfeasible) as caught, session:
        model(small_batch(0, rows=128)).square().mean().backward()
    message = str(caught.value)
    match = MESSAGE.fullmatch(message)
    assert match is not None, message
    assert match[1] == "300.0 KiB"
    assert isinstance(caught.value, rekindle.RekindleError)


def test_what_holds_it() -> None:
    """What the user's own variables hold, what cannot be recomputed, and what the backward pass made are told apart."""
    session = rekindle.Session(memory_budget="200KiB")
    x = small_batch(0, rows=128).requires_grad_()

    def step() -> None:
        mine, routed = x * 2, x.topk(64)[0]
        (mine.exp() * routed).exp().sin().cos().sum().backward()

    with pytest.raises(rekindle.BudgetInfeasible) as caught, session:
        step()
    message = str(caught.value)
    assert "made by aten.mul.Tensor in no module: your code" in message
    assert "routes by order" in message


def test_named_budget() -> None:
    """With the budget that the message names, the op it names fits; following the messages leads to one that works."""
    torch.manual_seed(0)
    model, x = small_model(), small_batch(0, rows=128)

    def refusal(budget: str) -> str:
        try:
            with rekindle.Session(memory_budget=budget):
                model(x).square().mean().backward()
        except rekindle.BudgetInfeasible as error:
            return str(error)
        return ""

    budget, tried = "300KiB", []
    while message := refusal(budget):
        model.zero_grad()
        match = MESSAGE.fullmatch(message)
        assert match is not None, message
        assert match[3] not in tried
        tried.append(budget := match[3])
        assert len(tried) < 40
    assert tried


def test_nothing_happened() -> None:
    """A budget that the forward pass does not meet leaves parameters, gradients and buffers as they were, nothing of
    the session alive, and the next step with a larger budget is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(*small_model(), nn.Linear(64, 4096))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = small_batch(0, rows=128)
    session = rekindle.Session(memory_budget=sum(p.nbytes for p in model.parameters()) + (256 << 10))
    with pytest.raises(rekindle.BudgetInfeasible), session:
        model(x).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert live_activations() == 0

    def step(model: nn.Module, number: int, way: Any) -> Tensor:
        if isinstance(way, rekindle.Session):
            tight = rekindle.Session(memory_budget=sum(p.nbytes for p in model.parameters()) + 1)
            state = torch.get_rng_state()
            with pytest.raises(rekindle.BudgetInfeasible), tight:
                model(x)
            torch.set_rng_state(state)
        with way:
            loss = model(x).square().mean()
            loss.backward()
        return loss

    assert_same(train(small_model, step), train(small_model, step, rekindle.Session(memory_budget="64MiB")))


def test_error_in_backward() -> None:
    """A budget that only the backward pass does not meet: after zero_grad the next step is exact, with the same session
    and a lighter batch, and with another."""
    torch.manual_seed(0)
    model, x = small_model(), small_batch(0, rows=128)
    low = sum(p.nbytes for p in model.parameters())
    raised = False
    for extra in range(1 << 16, 5 << 18, 1 << 15):
        session = rekindle.Session(memory_budget=low + extra)
        loss = None
        try:
            with session:
                loss = model(x).square().mean()
                loss.backward()
        except rekindle.BudgetInfeasible:
            raised = raised or loss is not None
        del loss
        assert live_activations() == 0
        model.zero_grad()
    assert raised
    torch.manual_seed(1)
    with session:
        model(x).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().mean().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))


def test_checkpoints_only_for_need() -> None:
    """A marked activation goes only when the budget cannot be kept without."""
    x = small_batch(0).requires_grad_()

    def run(budget: int) -> rekindle.Activation:
        session = rekindle.Session(memory_budget=budget)
        with session:
            hidden = F.gelu(x)
            mark = session.mark(hidden)
            for _ in range(12):
                hidden = hidden.sin()
            hidden.sum().backward()
        assert session.stats.evicted > 0
        return mark

    assert run(8 * x.nbytes).is_live
    assert not run(7 * x.nbytes).is_live
