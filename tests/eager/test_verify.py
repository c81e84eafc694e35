"""`Session(verify=True)` finds in one run the op that does not repeat itself and the writer that nobody sees."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, library, nn

import helpers
import rekindle
from helpers import seeded, small_batch, small_model
from rekindle import KeepNone, RecomputeMismatch, Session
from rekindle.runtime import checksums


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """Errors hold the frames they passed through until the collector comes; other tests count what is alive."""
    yield
    gc.collect()


class Affine(nn.Module):
    """A layer whose first op saves what it made, and whose second is the one that lies."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(small_batch(3, 64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Two ops that save their results."""
        return (x @ self.w).atan().tanh()


@pytest.fixture
def lying() -> Iterator[Callable[[Callable[[Tensor], Tensor]], None]]:
    """Overrides the kernel of `aten::atan` on the CPU until the test is over."""
    libraries = [library.Library("aten", "IMPL")]

    def override(kernel: Callable[[Tensor], Tensor]) -> None:
        libraries[0].impl("atan", kernel, "CPU", allow_override=True)

    yield override
    libraries.clear()  # the last reference, with which goes what it registered


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
def test_op_that_lies(lying, inplace) -> None:
    """An op that gives something else the second time is named, with its module and where the first difference is."""
    calls: list[int] = []

    def kernel(x: Tensor) -> Tensor:
        calls.append(1)
        result = x * 2
        if len(calls) > 1:
            result.view(-1)[1500] += 1
        return result

    lying(kernel)
    model = nn.Sequential(nn.Linear(64, 64), Affine())
    session = Session(KeepNone(), verify=True, inplace=inplace)
    with session:
        loss = model(small_batch(0)).sum()
        with pytest.raises(RecomputeMismatch, match=r"aten\.atan\.default in module '1' \(Affine\)") as caught:
            loss.backward()
    assert "elements 1024 to 2047 of 2048" in str(caught.value)
    assert session.stats.failed_recomputes == 1
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_op_that_is_not_deterministic(lying) -> None:
    """Noise that no tag tells of is found too; without `verify` nobody looks."""
    noise = torch.Generator(torch.get_default_device())
    lying(lambda x: x + torch.rand(x.shape, generator=noise))
    for verify in (True, False):
        model = nn.Sequential(nn.Linear(64, 64), Affine())
        with Session(KeepNone(), verify=verify):
            loss = model(small_batch(0)).sum()
            if verify:
                with pytest.raises(RecomputeMismatch, match=r"aten\.atan\.default in module '1' \(Affine\)"):
                    loss.backward()
            else:
                loss.backward()


def unseen(tensor: Tensor) -> None:
    """Write where no dispatcher looks."""
    tensor.detach().numpy()[20, 3] += 1


@pytest.mark.parametrize(
    ("when", "culprit"),
    [
        ("made", "sigmoid"),  # the bytes that were saved are not those that were made
        ("read", "add"),  # what was computed from other bytes comes out differently
        ("saved", "sigmoid"),  # alive still, so not recomputed: and not what it was
        ("source", "exp"),  # a source that is alive still is not what it was
        ("input", "mul"),  # nor is an input
    ],
)
@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
def test_unseen_writer(when: str, culprit: str, inplace: str) -> None:
    """A write through a NumPy view is found, whether before the bytes are saved, or read, or after."""
    x, w = small_batch(0), torch.ones(64, requires_grad=True)

    def step() -> None:
        y = (x * w).sigmoid()
        if when == "made":
            unseen(y)
        z = y.sin()
        if when == "read":
            y = (x * w) * 1
            unseen(y)
            z = (y + 1).sin()
            del y
        elif when == "saved":
            unseen(y)
        elif when == "source":
            y = y.detach() + 1
            z = y.exp() * w
            unseen(y)
        elif when == "input":
            del y
            unseen(x)
        z.sum().backward()

    session = Session(KeepNone(), verify=True, inplace=inplace)
    with session, pytest.raises(RecomputeMismatch, match=rf"aten\.{culprit}\..* in no module"):
        step()


def test_element_of_the_difference() -> None:
    """The message says where the first difference is, to the block of 4 KiB."""
    w = torch.ones(32, 64, requires_grad=True)
    with Session(KeepNone(), verify=True):
        y = (small_batch(0) * w).exp()
        unseen(y)
        with pytest.raises(RecomputeMismatch, match=r"float32\[32, 64\].*elements 1024 to 2047 of 2048"):
            y.sin()


@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
@pytest.mark.parametrize("fill", ["before", "after"])
def test_empty_tensors_may_be_filled_unseen(inplace: str, fill: str) -> None:
    """Whoever makes an empty tensor has a kernel that fills it, seen or not: that is no lie."""
    w = torch.ones(64, requires_grad=True)
    session = Session(KeepNone(), verify=True, inplace=inplace)
    with session:
        t = torch.empty(32, 64)
        if fill == "after":
            t.shape  # noqa: B018
        t.numpy()[:] = 2
        z = (t * w).sin()
        z.sum().backward()
    assert session.stats.failed_recomputes == 0


def resnet() -> nn.Module:
    """Convolutions, batch statistics and in-place activations."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Dropout(0.3, inplace=True),
        nn.Hardtanh(inplace=True),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp with dropout": (small_model, small_batch),
    "in-place resnet": (
        resnet,
        lambda seed: torch.randn(4, 3, 16, 16, generator=seeded(seed)),
    ),
}


@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_found_in_exact_training(name: str, inplace: str) -> None:
    """Real models repeat themselves: no false alarm, and the same bits, also where everything is evicted."""
    make, batch = MODELS[name]

    def step(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
        x = batch(number)
        with managed:
            loss = model(x).pow(2).mean()
            loss.backward()
        return loss

    session = helpers.assert_same_training(make, step, KeepNone(), verify=True, inplace=inplace, min_nbytes=0)
    helpers.assert_worked(session)


def test_off_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `verify` not one checksum is computed; with it, one for each activation made and each look at it."""
    count: list[int] = []
    real = checksums._sums_of
    monkeypatch.setattr(checksums, "_sums_of", lambda tensor: count.append(1) or real(tensor))
    for verify in (False, True):
        w = torch.ones(64, requires_grad=True)
        with Session(KeepNone(), verify=verify):
            (small_batch(0) * w).sin().cos().sum().backward()
        if not verify:
            assert not count
    assert count


def test_the_error_is_a_recompute_error() -> None:
    """Whoever catches failed recomputations catches this one."""
    assert issubclass(RecomputeMismatch, rekindle.RecomputeError)
