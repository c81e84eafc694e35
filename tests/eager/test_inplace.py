"""In-place writes: an error where plain PyTorch has one, the same bits where it has none, and with
`inplace="snapshot"` the gradients of the program that writes to copies.

Each case is one program that is run twice. As written it writes in place. As its own reference it is given an `own`
that clones first, so that what was saved before stays as it was; nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rekindle
from helpers import live_activations, others_nbytes, same_bits, seeded
from programs import Kernel
from rekindle import EveryN, FakeReader, KeepNone, Pressure, Session
from rekindle.record.aliasing import disjoint, window_of
from rekindle.record.recorder import Recorder

WIDTH = 32
FORBIDDEN = "has been modified by an inplace operation"


class Program:
    """What a case works with. `own(tensor)` comes before each write, and before the views that are written through."""

    def __init__(self, own: Callable[[Tensor], Tensor], session: Session | None) -> None:
        torch.manual_seed(0)
        self.own = own
        self.session = session
        self.w = torch.randn(WIDTH, WIDTH, requires_grad=True)
        self.v = torch.randn(WIDTH, WIDTH, requires_grad=True)
        self.b = torch.randn(WIDTH, requires_grad=True)
        self.x = torch.randn(WIDTH, WIDTH)
        self.kept: list[Any] = []

    def hidden(self) -> Tensor:
        """An activation whose op saves its result."""
        return (self.x * self.w).exp()

    def constant(self) -> Tensor:
        """An activation that takes no gradient."""
        return (self.x * 2).exp()


Case = Callable[[Program], Tensor]
CASES: dict[str, Case] = {}
RIGHT_THOUGH_PLAIN_RAISES = {"failed_write"}  # the value is that of before the op that failed, and so are gradients
LEGAL: dict[str, Case] = {}
"""Cases that plain autograd sees nothing wrong with: it is the reference, and there is no other."""


def case(function: Case) -> Case:
    """Register a program under its name."""
    CASES[function.__name__] = function
    return function


def legal(function: Case) -> Case:
    """Register a program that plain autograd allows."""
    LEGAL[function.__name__] = function
    return function


def through(name: str, save: Callable[[Tensor], Tensor], write: Callable[[Tensor], object]) -> None:
    """Register a program that saves one view and writes through another, of three kinds of storages."""

    def body(p: Program, y: Tensor) -> Tensor:
        saved = save(y)
        size = saved.shape
        total = (saved * p.v.view(-1)[: saved.numel()].view(size)).sum() + saved.sin().sum()
        y = p.own(y)
        write(y)
        return total + (y * p.v).sum()

    if name not in ("chunks", "unbound"):  # plain autograd refuses the write itself where there are gradients
        CASES[f"{name}_of_an_activation"] = lambda p: body(p, p.hidden() + 1)
    CASES[f"{name}_of_a_constant"] = lambda p: body(p, p.constant())
    CASES[f"{name}_of_an_input"] = lambda p: body(p, p.x)


# -- views: the same, disjoint, overlapping, interleaved; written through every kind of view ---------------------------

through("all", lambda y: y, lambda y: y.mul_(2))
through("all_by_a_slice", lambda y: y, lambda y: y[:, 0].zero_())
through("top_then_bottom", lambda y: y[:16], lambda y: y[16:].mul_(2))
through("bottom_then_top", lambda y: y[16:], lambda y: y[:16].mul_(2))
through("top_then_middle", lambda y: y[:16], lambda y: y[8:24].mul_(2))
through("middle_then_top", lambda y: y[8:24], lambda y: y[:16].mul_(2))
through("even_then_odd_columns", lambda y: y[:, ::2], lambda y: y[:, 1::2].mul_(2))
through("odd_then_even_columns", lambda y: y[:, 1::2], lambda y: y[:, ::2].mul_(2))
through("left_then_right", lambda y: y[:, :16], lambda y: y[:, 16:].add_(1))
through("columns_then_overlap", lambda y: y[:, :16], lambda y: y[:, 15:].add_(1))
through("slice_then_all", lambda y: y[3:5, ::3], lambda y: y.add_(1))
through("turned", lambda y: y.t()[4:], lambda y: y.t()[:4].mul_(2))
through("turned_one_side", lambda y: y.t()[4:], lambda y: y[:4].mul_(2))
through("flat", lambda y: y.view(-1)[40:50], lambda y: y.view(-1)[45:].add_(1))
through("flat_disjoint", lambda y: y.view(-1)[40:50], lambda y: y[0].add_(1))
through("diagonal", lambda y: y.diagonal(), lambda y: y[5].mul_(2))
through("diagonal_written", lambda y: y[5], lambda y: y.diagonal().mul_(2))
through("strided", lambda y: y.as_strided((4, 4), (64, 2), 33), lambda y: y.as_strided((4,), (32,), 33).add_(1))
through("chunks", lambda y: y.chunk(4)[1], lambda y: y.unflatten(0, (16, 2))[3].mul_(2))
through("unbound", lambda y: y.unbind(1)[3], lambda y: y.narrow(1, 0, 5).mul_(2))
through("one_element", lambda y: y[2, 3], lambda y: y[2, 4].add_(1))
through("no_element", lambda y: y, lambda y: y[:0].add_(1))

# -- every way to write ------------------------------------------------------------------------------------------------

through("assigned", lambda y: y, lambda y: y.__setitem__((slice(None), 0), 0))
through("assigned_elsewhere", lambda y: y[:, 1:], lambda y: y.__setitem__((slice(None), 0), 0))
through("mask", lambda y: y, lambda y: y.__setitem__(y.detach() > 1, 0.5))
through("index_put", lambda y: y, lambda y: y.index_put_((torch.arange(4), torch.arange(4)), y.new_ones(())))
through("masked_fill", lambda y: y, lambda y: y.masked_fill_(y.detach() > 1, 0.5))
through("scatter", lambda y: y, lambda y: y.scatter_(1, torch.zeros(4, 1).long(), 3.0))
through("index_add", lambda y: y, lambda y: y.index_add_(0, torch.arange(4), torch.ones(4, WIDTH)))
through("index_fill", lambda y: y, lambda y: y.index_fill_(1, torch.tensor([2]), 1.5))
through("fill_diagonal", lambda y: y, lambda y: y.fill_diagonal_(7.0))
through("copy", lambda y: y, lambda y: y.copy_(torch.ones(WIDTH)))
through("copy_to_a_part", lambda y: y[4:], lambda y: y[:4].copy_(torch.ones(WIDTH)))
through("zero", lambda y: y, lambda y: y.zero_())
through("addmm", lambda y: y, lambda y: y.addmm_(torch.ones(WIDTH, 4), torch.ones(4, WIDTH)))
through("addcmul", lambda y: y, lambda y: y.addcmul_(y.detach().clone(), torch.ones(WIDTH)))
through("normal", lambda y: y, lambda y: y.normal_())
through("normal_in_a_part", lambda y: y, lambda y: y[3:7].normal_())
through("uniform", lambda y: y[:9], lambda y: y[9:].uniform_())
through("bernoulli", lambda y: y, lambda y: y.bernoulli_(0.3))
through("dropout", lambda y: y, lambda y: F.dropout(y, 0.4, inplace=True))
through("random_chain", lambda y: y, lambda y: F.dropout(y.add_(1), 0.4, inplace=True).relu_())
through("chain", lambda y: y, lambda y: y.add_(1).mul_(2).relu_())
through("foreach_first", lambda y: y[16:], lambda y: torch._foreach_add_([y[16:], y[:16]], 1.0))
through("foreach_second", lambda y: y[16:], lambda y: torch._foreach_add_([y[:16], y[16:]], 1.0))
through("foreach_neither", lambda y: y[8:16], lambda y: torch._foreach_mul_([y[:8], y[16:]], 2.0))
through("foreach_zero", lambda y: y[:4], lambda y: torch._foreach_zero_([y[:3], y[3:]]))
through("foreach_lists", lambda y: y, lambda y: torch._foreach_mul_([y[:1], y[1:]], [y.new_ones(1), y.new_ones(1)]))


def out(name: str, save: Callable[[Tensor], Tensor], write: Callable[[Tensor, Tensor], object]) -> None:
    """Register a program that writes through `out=`: (what to write to, what to write)."""

    def body(p: Program) -> Tensor:
        y = p.constant()
        saved = save(y)
        total = (saved * p.v.view(-1)[: saved.numel()].view(saved.shape)).sum()
        y = p.own(y)
        write(y, p.x)
        return total + (y * p.v).sum()

    CASES[name] = body


out("out", lambda y: y, lambda y, x: torch.sin(x, out=y))
out("out_of_itself", lambda y: y, lambda y, x: torch.add(y, x, out=y))
out("out_in_a_part", lambda y: y[:16], lambda y, x: torch.sin(x[:16], out=y[16:]))
out("out_max", lambda y: y, lambda y, x: torch.max(x, 1, out=(y[:, 3], torch.empty(WIDTH).long())))
out("out_max_elsewhere", lambda y: y[:, :3], lambda y, x: torch.max(x, 1, out=(y[:, 3], torch.empty(WIDTH).long())))
out("out_sort", lambda y: y, lambda y, x: torch.sort(x, out=(y, torch.empty(WIDTH, WIDTH).long())))
out("out_qr", lambda y: y[:16], lambda y, x: torch.linalg.qr(x[:16, :16], out=(y[:16, :16].t(), y[16:, :16].t())))
out("out_aminmax", lambda y: y[7:9], lambda y, x: torch.aminmax(x, dim=1, out=(y[6], y[8])))
out("out_frexp", lambda y: y, lambda y, x: torch.frexp(x, out=(y, torch.empty(WIDTH, WIDTH).int())))


# -- chains, storages, leaves, modules ---------------------------------------------------------------------------------


@case
def saved_at_each_link(p: Program) -> Tensor:
    """Each version of one storage is saved."""
    y, total = p.hidden(), p.w.sum() * 0
    for number in range(4):
        total = total + (y * p.v).sin().sum()
        y = p.own(y)
        y.add_(1) if number % 2 else y.mul_(0.5)
        y = p.own(y)
        y[number * 4 :].relu_()
    return total + y.cos().sum()


@case
def save_of_one_version_by_two_views(p: Program) -> Tensor:
    """Two disjoint views are saved, one of them written, then the other."""
    y = p.constant()
    total = (y[:16] * p.v[:16]).sum() + (y[16:] * p.v[16:]).sum()
    y = p.own(y)
    y[:16].add_(1)
    total = total + (y[:16] * p.w[:16]).sum()
    y = p.own(y)
    y[16:].add_(1)
    y = p.own(y)
    y.mul_(2)
    return total + (y * p.w).sum()


@case
def saved_of_a_copy(p: Program) -> Tensor:
    """The source of an evicted value is written after it, and then again."""
    y = p.hidden() * 2
    z = (y + 1).sin().sin()
    for _ in range(3):
        y = p.own(y)
        y.mul_(2)
    return (z * p.v).sum() + y.sum()


@case
def checkpoint_written(p: Program) -> Tensor:
    """A marked activation keeps the value before the write."""
    y = p.hidden() * 2
    if p.session is not None:
        p.kept.append(p.session.mark(y))
    z = (y * p.v).sin()
    y = p.own(y)
    y.add_(1)
    return (z * y.sin()).sum()


def _storage(change: Callable[[Tensor], object]) -> Case:
    def body(p: Program) -> Tensor:
        y = p.constant()
        total = (y * p.v).sum() + ((y + p.b).exp() * p.w).sum()
        y = p.own(y)
        change(y)
        return total

    return body


CASES["resize_grow"] = _storage(lambda y: y.resize_(64, 64))
CASES["resize_shrink"] = _storage(lambda y: y.resize_(4, 4).fill_(3))
CASES["resize_turn"] = _storage(lambda y: y.resize_(16, 64).add_(1))
CASES["set_to_another"] = _storage(lambda y: y.set_(torch.ones(3) * 2))
CASES["set_to_another_and_written"] = _storage(lambda y: y.set_(torch.ones(3) * 2).add_(1))
CASES["transposed_in_place"] = _storage(lambda y: y.t_())
CASES["squeezed_in_place"] = _storage(lambda y: y.unsqueeze_(0).squeeze_(0).add_(1))
CASES["swapped_in_place_and_written"] = _storage(lambda y: y.swapaxes_(0, 1)[:4].mul_(2))


@legal
def written_through_another_that_was_set(p: Program) -> Tensor:
    """`set_` makes another tensor look at the storage, which counts its writes apart."""
    y = p.constant()
    total = (y * p.v).sum()
    other = torch.ones(WIDTH, WIDTH) * 3
    other.set_(y)
    other.mul_(2)
    return total + (other * p.w).sum()


@case
def saved_through_data(p: Program) -> Tensor:
    """What was saved through `.data` counts its writes with that tensor."""
    y = p.constant()
    data = y.data
    total = (data * p.v).sum()
    y = data = p.own(data)
    data.add_(1)
    return total + (y * p.w).sum()


@case
def parameter_under_no_grad(p: Program) -> Tensor:
    """A parameter that was saved is written, as an optimizer step between forward and backward does."""
    w = p.own(p.w)
    total = (p.hidden() @ p.w).sin().sum()
    with torch.no_grad():
        w.mul_(2)
        w[3:] = 1
    return total


@case
def second_forward(p: Program) -> Tensor:
    """A buffer that the first forward pass saved is written by the second."""
    buffer, total = torch.zeros(WIDTH, WIDTH), p.w.sum() * 0
    for _ in range(3):
        total = total + F.gelu(buffer * p.w @ p.v).sum()
        buffer = p.own(buffer)
        buffer.add_(p.x).mul_(0.9)
    return total


@case
def failed_write(p: Program) -> Tensor:
    """An op that raises has written nothing; the next one has."""
    y = p.x
    total = (y * p.v).sum()
    y = p.own(y)
    with pytest.raises(RuntimeError):
        y.add_(torch.ones(3, 3))
    y.mul_(2)
    return total + (y * p.w).sum()


@case
def half_failed_write(p: Program) -> Tensor:
    """An op on a list of tensors has written to the first when it refuses the second."""
    y = p.x
    total = (y * p.w).sum()
    y = p.own(y)
    with pytest.raises(RuntimeError):
        torch._foreach_mul_([y, torch.ones(1, 1).expand(3, 3)], 2.0)
    return total + (y * p.v).sum()


@case
def turned_after_a_backward(p: Program) -> Tensor:
    """What was saved before a backward pass and read after it is turned: no byte is written, though autograd counts."""
    total = (p.v * p.v).sum()
    p.b.sin().sum().backward()
    other = p.v.roll(1, 0)
    p.own(p.v.detach()).t_()
    return total + (other * p.w).sum()


@case
def cache_of_keys(p: Program) -> Tensor:
    """Slices of an empty tensor are filled one after the other, and all that is there is read each time."""
    cache, total = torch.empty(2, WIDTH, WIDTH), p.w.sum() * 0
    for number in range(4):
        with torch.no_grad():
            cache = p.own(cache)
            cache[:, number * 8 : number * 8 + 8].copy_(p.constant()[:8] + number)
        total = total + (cache[:, : number * 8 + 8] @ p.w).sin().sum()
    return total


@case
def cache_of_keys_with_gradients(p: Program) -> Tensor:
    """The same with gradients into what was filled."""
    cache, total = p.x.new_zeros(2, WIDTH, WIDTH), p.w.sum() * 0
    for number in range(4):
        cache = p.own(cache)
        cache[:, number * 8 : number * 8 + 8].copy_(p.hidden()[:8] + number)
        total = total + (cache[:, : number * 8 + 8] @ p.v).sin().sum()
    return total


@case
def nested_checkpoint(p: Program) -> Tensor:
    """The user's own checkpointing inside; what goes into it is written afterwards."""
    y = p.hidden() * 1
    total = (y * p.v).sum() + checkpoint(lambda t: (t @ p.v).sin().cos(), y * 2, use_reentrant=False).sum()
    y = p.own(y)
    y.mul_(2)
    return total + y.sin().sum()


class WritesWhatItSaved(torch.autograd.Function):
    """Its backward pass multiplies in place."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, y: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        """A product."""
        ctx.save_for_backward(y)
        ctx.own = own
        return w * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of `w`, in the place of `y`."""
        (y,) = ctx.saved_tensors
        return ctx.own(y).mul_(grad), None, None


@case
def written_by_a_backward(p: Program) -> Tensor:
    """A custom backward writes to its saved view, which others saved too."""
    y = p.constant()
    first = WritesWhatItSaved.apply(p.w[4:12], y[4:12], p.own)
    return first.sum() * 2 + (y[4:12] * p.v[4:12]).sum() + (y[:5] * p.v[:5]).sum()


# -- what plain autograd allows ----------------------------------------------------------------------------------------


@legal
def bias_under_no_grad(p: Program) -> Tensor:
    """A bias is not saved, and yet the source of what was evicted."""
    total = (p.x @ p.w + p.b).sin().cos().sum()
    with torch.no_grad():
        p.b.mul_(2)
        p.b[3:].zero_()
    return total


@legal
def input_that_is_only_a_source(p: Program) -> Tensor:
    """So is an input here."""
    total = ((p.x + p.w).exp() * p.v).sum()
    p.x.mul_(2)
    p.x.t_()
    return total


@legal
def input_turned(p: Program) -> Tensor:
    """Nothing is written, though autograd counts a write."""
    total = ((p.x + p.w).exp() * p.v).sum()
    p.x.t_()
    p.x.unsqueeze_(0)
    return total


@legal
def result_saved_before_a_write_of_the_source(p: Program) -> Tensor:
    """`exp` saves what it made, not what it read."""
    y = p.x @ p.w
    z = y.exp()
    y.mul_(2).add_(1)
    return (z * p.v).sum() + y.sin().sum()


@legal
def data_written(p: Program) -> Tensor:
    """Behind the back of autograd: the gradient is that of what is there in the end."""
    y = p.hidden() * 1
    z = (y * p.v).sin()
    y.data.mul_(2)
    y.data[3:7] = 0
    p.v.data.add_(1)
    return (z * y.sin()).sum()


@legal
def data_saved_and_the_other_written(p: Program) -> Tensor:
    """What `.data` counts apart, autograd does not see."""
    y = p.constant()
    data = y.data
    total = (data * p.v).sum()
    y.add_(1)
    return total + (y * p.w).sum() + data.sum()


@legal
def relu_chain(p: Program) -> Tensor:
    """In-place activations as networks have them."""
    y = F.relu_(p.x @ p.w)
    y = F.dropout(F.leaky_relu_(y @ p.v, 0.1) + 1, 0.3, inplace=True)
    return F.hardtanh_(y @ p.w).sigmoid_().sum()


@legal
def foreach_on_leaves(p: Program) -> Tensor:
    """An optimizer without a class, before what it writes is used."""
    total = (p.x + p.b).sin().sum()
    with torch.no_grad():
        torch._foreach_mul_([p.b, p.w], 0.5)
        torch._foreach_add_([p.b, p.w], [p.b.clone(), p.w.clone()])
    return total + ((p.x @ p.w).sin() @ p.v).sum()


@legal
def failed_write_alone(p: Program) -> Tensor:
    """An op that raises has written nothing."""
    y = p.hidden() * 1
    z = (y * p.v).sin()
    with pytest.raises(RuntimeError):
        y.add_(torch.ones(3, 3))
    with pytest.raises(RuntimeError):
        p.x.add_(torch.ones(3, 3))
    return (z * y.sin()).sum()


@legal
def failed_write_beside_a_view(p: Program) -> Tensor:
    """An op that raises has written nothing in the sight of a view that was made without gradients, either."""
    y = p.hidden()
    with torch.no_grad():
        rows = y[:1].expand(3, -1)
    z = (y * p.v).sin()
    with pytest.raises(RuntimeError), torch.no_grad():
        rows.add_(1)
    return (z * rows.sum()).sum()


# -- running them ------------------------------------------------------------------------------------------------------


def run(body: Case, how: str, session: Session | None = None, own: Callable[[Tensor], Tensor] = lambda t: t) -> list:
    """The gradients, and the numbers drawn next."""
    p = Program(own, session)
    leaves = [p.w, p.v, p.b]

    def backward(total: Tensor) -> None:
        if how == "slope":
            slopes = torch.autograd.grad(total, leaves[:2], create_graph=True, allow_unused=True)
            slopes = [slope for slope in slopes if slope is not None and slope.requires_grad]
            total = total + sum(slope.pow(2).sum() for slope in slopes)
        if how == "twice":
            total.backward(retain_graph=True)
        total.backward()

    def step() -> Tensor | None:
        total = body(p)
        if how == "after":
            return total
        backward(total)
        return None

    if session is None:
        total = step()
    else:
        with session:
            total = step()
    if total is not None:
        backward(total)
    return [leaf.grad for leaf in leaves] + [torch.rand(3)]


def plain(body: Case, how: str, own: Callable[[Tensor], Tensor] = lambda t: t) -> list | None:
    """What plain PyTorch makes of it; None if it refuses."""
    try:
        return run(body, how, own=own)
    except RuntimeError as error:
        assert FORBIDDEN in str(error)  # noqa: PT017
        return None


SESSIONS: dict[str, Callable[[str], Session]] = {
    "on-line": lambda inplace: Session(inplace=inplace, min_nbytes=0),
    "keep-none": lambda inplace: Session(KeepNone(), inplace=inplace, min_nbytes=0),
    "every-2": lambda inplace: Session(EveryN(2), inplace=inplace, min_nbytes=0),
    "budget": lambda inplace: Session(memory_budget=(1 << 20) + others_nbytes(), inplace=inplace, min_nbytes=0),
    "pressure": lambda inplace: Session(inplace=inplace, min_nbytes=0, pressure=Pressure(FakeReader(10, 10))),
    "pressure-on-a-policy": lambda inplace: Session(
        EveryN(2), inplace=inplace, min_nbytes=0, pressure=Pressure(FakeReader(10, 10))
    ),
}
HOWS = ("at once", "after", "twice", "slope")
RUNS = [*((how, "keep-none") for how in HOWS), *(("at once", name) for name in SESSIONS if name != "keep-none")]


def assert_same(expected: list, actual: list) -> None:
    """Bit for bit."""
    for left, right in zip(expected, actual, strict=True):
        assert (left is None) == (right is None)
        assert left is None or same_bits(left, right)


@pytest.mark.parametrize("name", [*CASES, *LEGAL])
def test_strict(name: str) -> None:
    """`inplace="strict"`: where plain autograd raises, so does Rekindle; where it does not, not one bit differs."""
    body = CASES.get(name) or LEGAL[name]
    expected = {how: plain(body, how) for how in HOWS}
    assert name in CASES or None not in expected.values()
    for how, make in RUNS:
        session, wanted = SESSIONS[make]("strict"), expected[how]
        if wanted is not None:
            assert_same(wanted, run(body, how, session))
            assert session.stats.failed_recomputes == 0
        elif name not in RIGHT_THOUGH_PLAIN_RAISES:
            with pytest.raises(rekindle.SavedTensorModified, match=FORBIDDEN):
                run(body, how, session)
    if None not in expected.values():
        assert live_activations() == 0


@pytest.mark.parametrize("name", CASES)
def test_snapshot(name: str) -> None:
    """`inplace="snapshot"`: gradients are those of the program that writes to copies, also where plain refuses."""
    expected = {how: run(CASES[name], how, own=torch.clone) for how in HOWS}
    for how, make in RUNS:
        session = SESSIONS[make]("snapshot")
        assert_same(expected[how], run(CASES[name], how, session))
        assert session.stats.failed_recomputes == 0
        assert session.snapshots.nbytes == 0
    assert live_activations() == 0


@pytest.mark.parametrize("name", LEGAL)
def test_snapshot_where_plain_allows_it(name: str) -> None:
    """`inplace="snapshot"` changes nothing of what plain autograd allows."""
    expected = {how: run(LEGAL[name], how) for how in HOWS}
    for how, make in RUNS:
        assert_same(expected[how], run(LEGAL[name], how, SESSIONS[make]("snapshot")))
    assert live_activations() == 0


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
@pytest.mark.parametrize("make", [torch.empty, torch.zeros], ids=["empty", "zeros"])
def test_writes_beside_what_is_needed_copy_nothing(inplace: str, make: Callable[..., Tensor]) -> None:
    """A cache that is filled slice by slice, all that is filled read each time, is never copied, though slices of its
    rows interleave."""
    w = torch.ones(WIDTH, WIDTH, requires_grad=True)
    keys = torch.randn(4, 2, 8, WIDTH)
    cache = make(2, WIDTH, WIDTH)
    session = Session(KeepNone(), inplace=inplace, min_nbytes=0)
    with session:
        total = w.sum() * 0
        for number in range(4):
            cache[:, number * 8 : number * 8 + 8].copy_(keys[number])
            total = total + (cache[:, : number * 8 + 8] + w[: number * 8 + 8]).sin().cos().sum()
        total.backward()
    assert (session.stats.snapshots, session.stats.snapshot_nbytes) == (0, 0)


def test_writes_beside_what_was_saved_copy_nothing() -> None:
    """Nor does a write beside what autograd saved; one that touches it copies the storage once."""
    w, x = torch.ones(16, WIDTH, requires_grad=True), torch.ones(WIDTH, WIDTH)
    session = Session(KeepNone(), inplace="snapshot", min_nbytes=0)
    with session:
        total = (x[::2] * w).sum()
        x[1::2].mul_(2)
        assert session.stats.snapshots == 0
        x[:, 3] = 0
        assert (session.stats.snapshots, session.stats.snapshot_nbytes) == (1, x.nbytes)
        x[:, 4] = 0
        x.add_(1)
        assert session.stats.snapshots == 1
        total.backward()
    assert same_bits(w.grad, torch.ones_like(w))


def test_batch_statistics() -> None:
    """Running statistics and `num_batches_tracked` move once for each forward, replayed and with snapshots."""
    results = []
    for session in (None, *(SESSIONS[name](inplace) for name in SESSIONS for inplace in ("strict", "snapshot"))):
        p = Program(lambda t: t, session)
        norm = nn.BatchNorm1d(WIDTH)

        def step(p: Program = p, norm: nn.Module = norm) -> None:
            y = F.relu_(norm(p.x @ p.w))
            y = F.relu_(norm(y @ p.v))
            norm.eval()
            y = norm(y).sin()
            norm.train()
            (y * norm(p.x)).sum().backward()

        if session is None:
            step()
        else:
            with session:
                step()
        assert norm.num_batches_tracked == 3
        results.append([p.w.grad, p.v.grad, norm.weight.grad, norm.running_mean, norm.running_var])
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
def test_foreach_step_before_backward(inplace: str) -> None:
    """An optimizer that writes to lists of parameters between forward and backward is seen: PyTorch does not count
    such writes under a dispatch mode."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = torch.randn(4, 8)
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    with Session(KeepNone(), inplace=inplace, min_nbytes=0):
        total = model(x).sum()
        optimizer.step()
        if inplace == "strict":
            with pytest.raises(rekindle.SavedTensorModified, match=r"2\.weight"):
                total.backward()
            return
        (actual,) = torch.autograd.grad(total, model[0].weight)
    assert same_bits(expected, actual)


def test_backward_that_writes_what_it_saved_is_seen() -> None:
    """A custom backward that writes through a view of what others saved: plain autograd refuses, and so does strict."""
    for session in (None, Session(KeepNone(), min_nbytes=0), Session(min_nbytes=0)):
        p = Program(lambda t: t, session)
        with pytest.raises(RuntimeError, match=FORBIDDEN):
            run(CASES["written_by_a_backward"], "twice", session)
        del p


@pytest.mark.parametrize("seed", range(4))
def test_disjoint(seed: int) -> None:
    """Windows said to be disjoint share no byte; and for slices of one tensor that have none in common, it is said."""
    pick = seeded(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=pick))

    whole = torch.arange(4 * 6 * 10).view(4, 6, 10)
    found = {True: 0, False: 0}
    for _ in range(400):
        windows, cut = [], []
        for _ in range(2):
            slices = [slice(begin := number(n), begin + 1 + number(n - begin), 1 + number(2)) for n in whole.shape]
            view = whole[tuple(slices)]
            cut.append(view)
            order = torch.randperm(3, generator=pick).tolist()
            windows.append(window_of(view.permute(order)))
        free = not set(cut[0].flatten().tolist()) & set(cut[1].flatten().tolist())
        said = disjoint(*windows)
        assert free or not said
        found[said] += 1
        if free and all(view.stride() == whole.stride() for view in cut):
            assert said
    assert min(found.values()) > 20
    flat = torch.empty(64)
    assert not disjoint(window_of(flat[:9]), window_of(flat[8:]))
    assert disjoint(window_of(flat[:8]), window_of(flat[8:]))
    assert not disjoint(window_of(flat.as_strided((8, 8), (4, 1))), window_of(flat[30:31]))
    assert disjoint(window_of(flat.view(torch.int16)[:16]), window_of(flat[8:]))
    assert not disjoint(window_of(flat.view(torch.int16)[:17]), window_of(flat[8:]))


@pytest.mark.parametrize("mode", ["strict", "snapshot"])
@pytest.mark.parametrize("written", [False, True], ids=["out-of-place", "in-place"])
def test_noise_filled_after_it_is_saved(mode: str, written: bool) -> None:
    """The noise of a randomised ReLU, which autograd saves before the kernel fills it, is what the kernel put there."""

    def gradient() -> Tensor:
        torch.manual_seed(0)
        x = torch.linspace(-3, 1, 16, requires_grad=True)
        result = F.rrelu(x.clone(), training=True, inplace=written)
        return torch.autograd.grad(result.sin().sum(), x)[0]

    plain = gradient()
    with Session(KeepNone(), min_nbytes=0, inplace=mode):
        managed = gradient()
    assert torch.equal(plain, managed)


@pytest.mark.parametrize(("writes", "looked"), [(False, 0), (True, 1)])
def test_only_writes_over_what_may_be_wanted_are_looked_at(writes: bool, looked: int, monkeypatch) -> None:
    """Adding to a gradient destroys nothing, so it is only counted; a hook that writes to a kept value is seen."""
    long_way = []
    look = Recorder._pass
    monkeypatch.setattr(Recorder, "_pass", lambda self, func, *rest: long_way.append(func) or look(self, func, *rest))
    weight = torch.randn(16, 16, requires_grad=True)
    weight.grad = torch.zeros(16, 16)
    session = Session(KeepNone(), min_nbytes=0)
    for _ in range(3):
        long_way.clear()  # the first step writes every op down
        with session:
            y = (torch.randn(16, 16) @ weight).sin()
            other = y.detach().exp()
            if writes:
                y.register_hook(lambda grad, other=other: _add_one(other))
            y.sum().backward()
        del y, other
    assert len(long_way) == looked


def _add_one(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


BESIDE: dict[str, Callable[[Tensor, Callable[[], Any]], Any]] = {
    "by an op": lambda rows, then: [rows.zero_(), then()],
    "by an op on lists": lambda rows, then: [torch._foreach_zero_([rows]), then()],
    "by an op on lists that nobody counts": lambda rows, then: [_fused(rows), then()],
    "by an op that failed": lambda rows, then: [_failing(lambda: rows.add_(torch.ones(7))), then()],
    "in inference mode": lambda rows, then: [torch.inference_mode()(rows.zero_)(), then()],
    "after a cut": lambda rows, then: [_backward(lambda: None), rows.zero_(), then()],
    "by a hook": lambda rows, then: _backward(lambda: [rows.zero_(), then()]),
}
"""Writes to a leaf beside what was read of it."""


def _backward(hook: Callable[[], Any]) -> None:
    w = torch.ones(WIDTH, requires_grad=True)
    w.register_hook(lambda grad: [hook(), None][1])
    w.exp().sum().backward()


def _fused(rows: Tensor) -> None:
    options = dict.fromkeys(("weight_decay", "momentum", "dampening"), 0.0)
    flags = {"nesterov": False, "maximize": False, "is_first_step": True}
    torch._fused_sgd_([rows], [torch.ones_like(rows)], [], lr=0.5, **options, **flags)


def _failing(write: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        write()


@pytest.mark.parametrize("first", BESIDE)
@pytest.mark.parametrize("alias", [False, True])
def test_write_that_no_dispatcher_sees_after_one_that_spared(first: str, alias: bool) -> None:
    """What a write leaves as it was, a later one destroys that only its version tells of: the first one's is known
    before the second, so the gradient is refused instead of computed from other numbers."""
    x, w = torch.randn(WIDTH, WIDTH, generator=seeded(0)), torch.ones(WIDTH, requires_grad=True)
    with Session(policy=KeepNone()):
        read = x.detach() if alias else x
        loss = ((read[:16] * 2).exp() * w).sum()
        BESIDE[first](x[16:], lambda: Kernel.apply(x))
        with pytest.raises(rekindle.LeafModified):
            loss.backward()
    assert w.grad is None


@pytest.mark.parametrize("first", BESIDE)
@pytest.mark.parametrize("alias", [False, True])
def test_write_that_spares_what_was_read(first: str, alias: bool) -> None:
    """The same without the second write: nothing is refused, and the gradient is that of plain PyTorch."""
    x, w = torch.randn(WIDTH, WIDTH, generator=seeded(0)), torch.ones(WIDTH, requires_grad=True)
    expected = (x[:16] * 2).exp().sum(0)
    with Session(policy=KeepNone()):
        read = x.detach() if alias else x
        loss = ((read[:16] * 2).exp() * w).sum()
        BESIDE[first](x[16:], lambda: None)
        loss.backward()
    assert same_bits(w.grad, expected)
