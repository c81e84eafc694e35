"""Surprises, graded: what you may do without a thought, what you should know, what is refused.

Each test's docstring tells the user what happens. Three grades:

* SAFE: looks dangerous and is not: not one bit differs from plain training.
* KNOW: exact, or as plain PyTorch has it, but something else than you might expect happens.
* REFUSED: an error says what is wrong and what to write; never a wrong number.

More of them are elsewhere: writes of every kind in `test_inplace.py`, errors in `test_errors.py`, threads in
`test_threads.py`, compiled code in `test_compile.py`.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import helpers
import rekindle
from helpers import same_bits, small_batch, small_model
from rekindle import EveryN, KeepAll, KeepNone, MemoryOptimal, Session

pytestmark = [
    pytest.mark.usefixtures("leaving_nothing"),
    # PyTorch's own, of kinds of tensors that it means to change.
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
Program = Callable[[nn.Module, int, helpers.Managed], Tensor | list[Tensor]]
PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Program]] = {}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {}


def safe(make: Callable[[], nn.Module] = small_model) -> Callable[[Program], Program]:
    """Register a whole training step that must be exact."""

    def register(program: Program) -> Program:
        PROGRAMS[program.__name__] = make, program
        return program

    return register


def loss_of(result: Tensor) -> Tensor:
    """A loss that saves what it is given."""
    return F.gelu(result * 1.5).square().mean()


# -- SAFE: state of your own -------------------------------------------------------------------------------------------


class Mutable(nn.Module):
    """Keeps what it saw in a mutable default, in an attribute and in a list that everybody shares."""

    everybody: list[float] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = helpers.Layer(), 0

    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        """Each call computes something else, by what it remembers."""
        seen.append(1)
        self.calls += 1
        self.everybody.append(float(x.detach().sum()))
        return self.layer(x) * (self.calls % 5) + len(self.everybody[-3:])


@safe(Mutable)
def mutable_state(model: nn.Module, number: int, managed: helpers.Managed) -> list[Tensor]:
    """Mutable defaults, counters and class attributes move once for each call of `forward`, never for a replay:
    Rekindle repeats kernels, not Python."""
    before = len(Mutable.everybody)
    with managed:
        loss = loss_of(model(model(small_batch(number))))
        loss.backward()
    return [loss, torch.tensor(len(Mutable.everybody) - before), torch.tensor(model.calls)]


class Cached(nn.Module):
    """Caches masks by size in a dict, like rotary tables; and its last result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.masks, self.last = helpers.Layer(), {}, None

    def forward(self, x: Tensor) -> Tensor:
        """The first call of a size makes the mask, later ones read it."""
        rows = x.shape[0]
        if rows not in self.masks:
            self.masks[rows] = torch.arange(rows * 64.0).view(rows, 64).sin().exp()
        y = self.layer(x) * self.masks[rows]
        if self.last is not None and self.last.shape == y.shape:
            y = y + self.last.cos()
        self.last = y.detach()
        return y


@safe(Cached)
def caches_in_python(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """What a model caches in Python in one step and reads in the next is a leaf there: it is neither chained to the
    step that made it nor recomputed from it."""
    with managed:
        loss = loss_of(model(small_batch(number))) + loss_of(model(small_batch(number, 16 + 16 * (number % 2))))
        loss.backward()
    return loss


@safe()
def lru_cache_of_activations(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """A memoised function that returns the same activation twice: one activation, recomputed once or alive."""
    memory: dict[int, Tensor] = {}

    def memoised(x: Tensor) -> Tensor:
        if id(x) not in memory:
            memory[id(x)] = model(x)
        return memory[id(x)]

    x = small_batch(number)
    with managed:
        loss = loss_of(memoised(x) * memoised(x).sin())
        memory.clear()
        loss.backward()
    return loss


@safe()
def closures_over_tensors(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """A closure sees the tensors that its variables name when it is called. Assigning another tensor to the variable
    afterwards changes nothing that was computed."""
    scale, x = small_batch(number + 10), small_batch(number)
    with managed:
        function = lambda y: loss_of(y * scale.exp())  # noqa: E731
        first = function(model(x))
        scale = scale * 2
        second = function(model(x))
        scale = None  # type: ignore[assignment]
        (first + second).backward()
    return first + second


class Swapping(nn.Module):
    """Puts another parameter in the place of its weight, in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """With the one weight, then with the other, then with the first one again."""
        x = F.gelu(self.layer(x))
        mine, self.layer.weight = self.layer.weight, self.other
        x = F.gelu(self.layer(x))
        self.layer.weight = mine
        return F.gelu(self.layer(x))


@safe(Swapping)
def weights_swapped_in_forward(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """A module whose parameter is another one for a while: replays read the one that was read."""
    with managed:
        loss = loss_of(model(small_batch(number)))
        loss.backward()
    return loss


@safe()
def functional_call(model: nn.Module, number: int, managed: helpers.Managed) -> list[Tensor]:
    """`torch.func.functional_call` with weights that are activations: they have gradients and may be recomputed."""
    with managed:
        fast = {name: p * 0.9 for name, p in model.named_parameters()}
        loss = loss_of(torch.func.functional_call(model, fast, small_batch(number)))
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        after = loss_of(torch.func.functional_call(model, fast, small_batch(number)))
        after.backward()
    return [loss, after]


@safe()
def parametrised(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """Weights computed by a parametrisation, cached for the length of a block."""
    if not nn.utils.parametrize.is_parametrized(model[-1]):
        nn.utils.parametrizations.weight_norm(model[-1])
    with managed, nn.utils.parametrize.cached():
        loss = loss_of(model[-1](model(small_batch(number))))
        loss.backward()
    return loss


@safe()
def data_of_an_activation(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """`tensor.data = other` inside the session, on what nothing has saved: from then on the tensor is a leaf with the
    new content, and what was computed before is recomputed from the old."""
    x = small_batch(number)
    with managed:
        hidden = model(x)
        first = loss_of(hidden * 2)
        hidden.data = small_batch(number + 5)
        second = loss_of(hidden * 3)
        (first + second).backward()
    return first + second


@safe()
def data_of_a_parameter(model: nn.Module, number: int, managed: helpers.Managed) -> list[Tensor]:
    """`parameter.data = other` between two forwards (as weight averaging does): the first is recomputed from the old
    storage, the second from the new one; what autograd saved of the parameter follows it, as in plain PyTorch."""
    x = small_batch(number)
    with managed:
        first = loss_of(model(x))
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.5
        second = loss_of(model(x))
        second.backward()
    return [first, second]


# -- SAFE: kinds of tensors --------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """Multiplies by a sparse matrix, looks words up with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.words = helpers.Layer(), nn.Embedding(50, 64, sparse=True)
        dense = torch.eye(32) * 2 + torch.eye(32).roll(1, 0)
        self.register_buffer("edges", dense.to_sparse())
        self.rows = dense.to_sparse_csr()

    def forward(self, x: Tensor) -> Tensor:
        """Dense, sparse in both layouts and turned in place, dense."""
        x = self.layer(x + self.words(torch.arange(32)))
        x = F.gelu(torch.sparse.mm(self.edges.clone().t_().t_(), x))
        y = (x.detach() * (x.detach() > 0.5)).to_sparse()
        x = F.gelu(self.rows @ x) + torch.sparse.mm(y, self.layer.down.weight[:, :64].sum(0).expand(64, 64)).cos()
        return self.layer(x)


class Quantised(nn.Module):
    """A quantised branch, frozen, between layers that train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = helpers.Layer()

    def forward(self, x: Tensor) -> Tensor:
        """Quantised and back; and fake-quantised with a straight-through gradient."""
        x = self.layer(x)
        q = torch.quantize_per_tensor(x.detach(), 0.05, 10, torch.quint8)
        side = F.relu(q).dequantize()
        x = torch.fake_quantize_per_tensor_affine(self.layer(x), 0.05, 0, -128, 127)
        return self.layer(x * side) + q.int_repr().float()


def forward_backward(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """An ordinary step."""
    with managed:
        loss = loss_of(model(small_batch(number)))
        loss.backward()
    return loss


@safe(Sparse)
def sparse_tensors(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """Sparse tensors have no storage that Rekindle could evict: they are left alone, not so what is dense around."""
    return forward_backward(model, number, managed)


@safe(Quantised)
def quantised_tensors(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """Quantised tensors are left alone; what is not quantised around them is evicted and recomputed."""
    return forward_backward(model, number, managed)


@safe()
def empty_and_scalar(model: nn.Module, number: int, managed: helpers.Managed) -> list[Tensor]:
    """Tensors without elements and without dimensions, made, saved, written and reduced."""
    x = small_batch(number)
    with managed:
        hidden = model(x)
        none = F.gelu(hidden[:0] @ model[-1].weight).exp()
        nothing = F.gelu(hidden.new_zeros(0, 3, requires_grad=True) * 2).sin()
        scalar = hidden.mean().exp().sin()
        scalar = scalar * scalar.detach().clone().mul_(2)
        hole = torch.empty(0).add_(1)
        whole = torch.cat([hidden * scalar, none])
        loss = loss_of(whole) + nothing.sum() + none.sum() + hole.sum() + scalar.tanh()
        loss.backward()
    return [loss, none, nothing, scalar]


@safe()
def expanded_inputs(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """An expanded tensor takes few bytes and shows many: it is replayed as it was, and not blown up."""
    x = small_batch(number, 1).expand(32, 64)
    with managed:
        bias = model[-1].bias.exp().expand(32, 64)
        hidden = model(x * bias)
        wide = hidden.mean(1, keepdim=True).sin().expand(-1, 64)
        loss = loss_of(hidden * wide) + loss_of(F.gelu(hidden[0].expand(32, 64)) * bias)
        loss.backward()
    return loss


class Strided(nn.Module):
    """Convolutions whose activations keep their memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the format of `x`."""
        return self.second(F.silu(self.norm(F.gelu(self.first(x)))) * 1.1).sigmoid()


LAYOUTS.update(
    contiguous=lambda x: x,
    channels_last=lambda x: x.contiguous(memory_format=torch.channels_last),
    turned=lambda x: x.transpose(2, 3),
    permuted=lambda x: x.permute(2, 1, 0, 3),
    strided=lambda x: x[:, :, ::2],
    offset=lambda x: x[1:, :, 1:, 2:],
    expanded=lambda x: x[:1].expand(4, -1, -1, -1),
    overlapping=lambda x: x.reshape(-1).as_strided((2, 2, 8, 8), (64, 32, 4, 2)),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_come_back(layout: str) -> None:
    """SAFE. Whatever the memory format of an activation, what is recomputed has its size, strides and offset."""

    def run(managed: helpers.Managed) -> tuple[list[Tensor], list[Any]]:
        torch.manual_seed(0)
        model, windows = Strided(), []
        x = torch.randn(4, 2, 8, 8).requires_grad_()
        with managed:
            hidden = F.gelu(LAYOUTS[layout](x * 2))
            out = model(hidden).exp()
            nodes = [hidden.grad_fn, out.grad_fn]
            del hidden
            for node in nodes:
                saved = node._saved_self if hasattr(node, "_saved_self") else node._saved_result
                windows.append((saved.size(), saved.stride(), saved.storage_offset(), saved.dtype))
            out.mean().backward()
        return [x.grad, *(p.grad for p in model.parameters())], windows  # type: ignore[list-item]

    session = Session(KeepNone(), min_nbytes=0)
    expected, managed = run(nullcontext()), run(session)
    assert managed[1] == expected[1]
    assert all(map(same_bits, managed[0], expected[0]))
    assert all(one.stride() == other.stride() for one, other in zip(managed[0], expected[0], strict=True))
    helpers.assert_worked(session)


# -- SAFE: the process around ------------------------------------------------------------------------------------------


class Rows(Dataset[Tensor]):
    """Random rows by index."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return small_batch(index, 1)[0]


@safe()
def background_threads(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
    """A thread that prepares the next batch while the step runs, as prefetchers do: not recorded, not disturbed."""
    made: list[Tensor] = []
    with managed:
        thread = threading.Thread(target=lambda: made.append(small_batch(number).mul(2).cos()))
        thread.start()
        hidden = model(small_batch(number))
        thread.join()
        loss = loss_of(hidden * made[0])
        loss.backward()
    return loss


@pytest.mark.parametrize("policy", [KeepAll(), KeepNone()], ids=repr)
def test_loader_with_workers(policy: Any) -> None:
    """SAFE. A DataLoader whose worker processes are forked while a session is entered, and read inside it."""

    def run(managed: helpers.Managed) -> list[Tensor]:
        torch.manual_seed(0)
        model, losses = small_model(1), []
        with managed:
            for batch in DataLoader(Rows(), batch_size=16, num_workers=2, shuffle=True):
                loss = loss_of(model(batch))
                loss.backward()
                losses.append(loss.detach())
        return [*losses, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    assert all(map(same_bits, run(nullcontext()), run(Session(policy, min_nbytes=0))))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_an_applied_model(how: str) -> None:
    """KNOW. A copy of an applied model, by `deepcopy`, `pickle` or `torch.save`, is not applied: apply it again. The
    original stays applied, and both train exactly."""
    plain = helpers.train(small_model, lambda model, number, _: forward_backward(model, number, nullcontext()))

    def copied(model: nn.Module) -> nn.Module:
        if how == "deepcopy":
            return copy.deepcopy(model)
        if how == "pickle":
            return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]

    originals: list[nn.Module] = []

    def make() -> nn.Module:
        originals.append(rekindle.apply(small_model(), KeepNone()))
        return copied(originals[-1])

    step: Program = lambda model, number, _: forward_backward(model, number, nullcontext())  # noqa: E731
    try:
        helpers.assert_same(plain, helpers.train(make, step))
        assert rekindle.session_of(originals[0]).stats.steps == 0
        assert all(parameter.grad is None for parameter in originals[0].parameters())
        helpers.assert_same(plain, helpers.train(lambda: copied(make()) and originals[-1], step))
        helpers.assert_worked(rekindle.session_of(originals[1]))
    finally:
        for model in originals:
            rekindle.remove(model)


def test_copy_in_the_middle_of_a_step() -> None:
    """SAFE. A deep copy taken between forward and backward, as weight averaging does, copies weights and no records."""
    model, session = small_model(2), Session(KeepNone())
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = forward_backward(plain, 0, nullcontext())
    torch.manual_seed(1)
    with session:
        loss = loss_of(model(small_batch(0)))
        average = copy.deepcopy(model)
        loss.backward()
    assert same_bits(loss.detach(), expected.detach())
    assert all(p.grad is None for p in average.parameters())
    assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_deepcopy_of_an_activation() -> None:
    """REFUSED, by PyTorch itself: only leaves can be deep-copied. A detached activation can; its copy is a leaf."""
    with Session(KeepNone()):
        hidden = small_model(1)(small_batch(0))
        with pytest.raises(RuntimeError, match="graph leaves"):
            copy.deepcopy(hidden)
        assert same_bits(copy.deepcopy(hidden.detach()), hidden.detach())


@pytest.mark.parametrize("entered", [False, True])
def test_pickling_a_session(entered: bool) -> None:
    """REFUSED. A session holds hooks and locks and cannot be pickled or copied; make another one with its policy."""
    session = Session(KeepNone())
    with session if entered else nullcontext(), pytest.raises(rekindle.SessionError, match="Make another"):
        copy.deepcopy(session)
    with pytest.raises(rekindle.SessionError, match="Make another"):
        pickle.dumps(session)


def test_policies_pickle() -> None:
    """SAFE. Policies are values: they can be pickled and copied, and are equal to what they were."""
    for policy in (KeepAll(), KeepNone(), EveryN(3), MemoryOptimal(0.3), rekindle.PerModule("layers.*")):
        assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)


def test_entered_by_a_worker_thread() -> None:
    """REFUSED while it is entered: one session belongs to one thread at a time; the error names the cure."""
    session, caught = Session(KeepNone()), []

    def enter() -> None:
        try:
            session.__enter__()
        except rekindle.SessionError as error:
            caught.append(str(error))

    with session:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "for each thread" in caught[0]


# -- KNOW --------------------------------------------------------------------------------------------------------------


def test_what_you_hold_stays() -> None:
    """KNOW. A list of all hidden states, for logging, keeps them alive: nothing is evicted, nothing recomputed. Keep
    what you need of them (`hidden.detach().mean()`), not them."""
    model, session, states = small_model(2), Session(KeepNone()), []
    hooks = [m.register_forward_hook(lambda module, args, out: states.append(out)) for m in model.modules()]
    with session:
        loss = loss_of(model(small_batch(0)))
        before = session.live_nbytes
        states.clear()
        after = session.live_nbytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    assert after < before


def test_data_of_something_saved() -> None:
    """REFUSED. `tensor.data = other` on an activation that autograd saved. Plain PyTorch goes on with the old content;
    Rekindle cannot tell what you meant, and says so: assign to a new variable."""
    with Session(KeepNone()):
        hidden = (small_batch(0).requires_grad_() * 2).sin()
        out = hidden.exp().sin() * hidden
        hidden.data = torch.zeros_like(hidden)
        with pytest.raises(rekindle.SavedTensorModified, match="Assign to a new variable"):
            out.sum().backward()


def test_swapped_tensors() -> None:
    """KNOW. `torch.utils.swap_tensors` refuses tensors that are referred to weakly, as all are that a step in progress
    has seen: swap between steps, where it works and the next step is exact."""
    model, session = small_model(1), Session(KeepNone())
    weights = model[0].up.weight, nn.Parameter(model[0].up.weight.detach() * 2)
    with session:
        loss = loss_of(model(small_batch(0)))
        with pytest.raises(RuntimeError, match="weakref"):
            torch.utils.swap_tensors(*weights)
        loss.backward()
    del loss
    model.zero_grad()
    torch.utils.swap_tensors(*weights)
    plain, managed = copy.deepcopy(model), model
    for either, context in ((plain, nullcontext()), (managed, session)):
        torch.manual_seed(0)
        forward_backward(either, 1, context)
    assert all(same_bits(p.grad, q.grad) for p, q in zip(plain.parameters(), managed.parameters(), strict=True))


def test_frozen_weight_written_with_a_gradient() -> None:
    """KNOW. An in-place write of something with a gradient makes a frozen weight part of that step's graph, in plain
    PyTorch too. It has no gradient of its own from there on, and nobody asks for it, which PyTorch would warn of."""
    left = []
    for context in (nullcontext(), Session(memory_budget="1GiB")):
        torch.manual_seed(0)
        model = small_model(1)
        weight = model[0].norm.weight.requires_grad_(False)
        for number in range(3):
            with context:
                scale = model[0].down.weight.mean()
                weight.add_(scale)
                loss_of(model(small_batch(number))).backward()
            weight.detach_()
        left.append([*model.state_dict().values(), model[0].down.weight.grad])
    assert all(map(same_bits, *left))


def test_nothing_without_backward() -> None:
    """KNOW. Evaluation inside a session costs time and saves nothing: no gradient, nothing to evict."""
    session = Session(KeepNone())
    with session, torch.no_grad():
        small_model(2).eval()(small_batch(0))
    assert session.last_step.evicted == session.last_step.ops_replayed == 0


POLICIES: dict[str, Callable[[], Any]] = {
    "keep-none": KeepNone,
    "every-2": lambda: EveryN(2),
    "memory-optimal": lambda: MemoryOptimal(0.3),
}


@pytest.fixture(scope="module")
def plain() -> dict[str, list[helpers.Snapshot]]:
    """What plain training leaves behind, by program."""
    return {}


def _fresh() -> None:
    Mutable.everybody.clear()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_safe(name: str, policy: str, plain: dict[str, list[helpers.Snapshot]]) -> None:
    """SAFE. See the docstring of the program: not one bit differs from plain training, three steps long."""
    if name not in plain:
        _fresh()
        plain[name] = helpers.train(*PROGRAMS[name])
    _fresh()
    session = helpers.assert_same_training(*PROGRAMS[name], POLICIES[policy](), plain=plain[name], min_nbytes=0)
    if policy == "keep-none":
        helpers.assert_worked(session)
