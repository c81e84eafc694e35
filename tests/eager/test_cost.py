"""What ops cost on paper: FLOPs, bytes, and the seconds that a roofline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rekindle
from helpers import small_batch, small_model
from rekindle import RehearsalError, Session, SessionError
from rekindle.record import cost as cost_module
from rekindle.record.cost import DEVICES, Device, Roofline, bytes_moved, find_device, flops, seconds
from rekindle.runtime.rehearse import rehearse

aten = torch.ops.aten
SLOW = Device("slow", "cuda", 0, 1e3, {"float32": 1e6, "bfloat16": 2e6, "tf32": 4e6}, 1e-3)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without bytes."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def ran(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """An op with its arguments and its result."""
    return func, args, kwargs, func(*args, **kwargs)


Q, K = (2, 4, 64, 16), (2, 4, 96, 16)
ATTENTION = 2 * 2 * 2 * 4 * 64 * 96 * 16
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ran(aten.mm.default, meta(3, 5), meta(5, 7)), 2 * 3 * 5 * 7),
        (ran(aten.addmm.default, meta(7), meta(3, 5), meta(5, 7)), 2 * 3 * 5 * 7),
        (ran(aten.bmm.default, meta(2, 3, 5), meta(2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (
            ran(
                aten.convolution.default,
                meta(2, 3, 8, 8),
                meta(4, 3, 3, 3),
                None,
                [1, 1],
                [1, 1],
                [1, 1],
                False,
                [0],
                1,
            ),
            2 * 2 * 4 * 64 * 27,
        ),
        (ran(FLASH, meta(*Q), meta(*K), meta(*K)), ATTENTION),
        (
            ran(FLASH_BACKWARD, meta(*Q), meta(*Q), meta(*K), meta(*K), meta(*Q), meta(*Q[:3]), 0.0, False),
            ATTENTION * 5 // 2,
        ),
        (ran(aten.add.Tensor, meta(3, 5), meta(3, 5)), 0),
        (ran(aten._local_scalar_dense.default, torch.ones(())), 0),
    ],
    ids=["mm", "addmm", "bmm", "convolution", "attention", "attention backward", "add", "item"],
)
def test_flops(op: tuple[Any, ...], expected: int) -> None:
    """Products count two for each multiplication, attention two products forward and five backward, others nothing."""
    assert flops(*op) == expected


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ran(aten.add.Tensor, meta(3, 5), meta(3, 5)), 3 * 60),
        (ran(aten.add_.Tensor, meta(3, 5), meta(3, 5)), 3 * 60),
        (ran(aten.add.Tensor, meta(3, 5), meta(5).expand(3, 5)), 2 * 60 + 20),
        (ran(aten._to_copy.default, meta(3, 5), dtype=torch.bfloat16), 60 + 30),
        (ran(aten.cat.default, [meta(3, 5), meta(4, 5)]), 2 * 140),
        (ran(aten.embedding.default, meta(1000, 8), meta(4, dtype=torch.long)), 2 * 4 * 8 * 4),
        (ran(aten.ones.default, [3, 5], device="meta"), 60),
        (ran(aten.view.default, meta(3, 5), [15]), 0),
        (ran(aten._unsafe_view.default, meta(3, 5), [15]), 0),
        (ran(aten.empty_like.default, meta(3, 5)), 0),
    ],
    ids=["add", "in place", "expanded", "cast", "list", "embedding", "ones", "view", "unsafe view", "empty"],
)
def test_bytes(op: tuple[Any, ...], expected: int) -> None:
    """Arguments and results move once each, rows that are looked up and not whole tables, views and empty ones not."""
    assert bytes_moved(*op) == expected


def test_the_roofline() -> None:
    """An op takes as long as its arithmetic, its bytes, or a launch, whichever is longest; what computes nothing takes
    nothing."""
    product = ran(aten.mm.default, meta(100, 1000), meta(1000, 100))
    assert seconds(*product, SLOW) == max(2 * 100 * 100 * 1000 / 1e6, (2 * 100 * 1000 + 100 * 100) * 4 / 1e3)
    half = ran(aten.mm.default, meta(100, 10**6, dtype=torch.bfloat16), meta(10**6, 100, dtype=torch.bfloat16))
    fast = Device("fast", "cuda", 0, 1e12, SLOW.flops, 1e-3)
    assert seconds(*half, fast) == 2e10 / 2e6
    assert seconds(*ran(aten.neg.default, meta(1000)), SLOW) == 8.0
    assert seconds(*ran(aten.neg.default, meta(1)), fast) == 1e-3
    assert seconds(*ran(aten.view.default, meta(3, 5), [15]), SLOW) == 0.0


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets how exactly float32 is multiplied while the test runs."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("products", "convolutions"), [(True, False), (False, True)])
def test_float32_in_tensor_cores(products: bool, convolutions: bool, precision: Callable[[str], None]) -> None:
    """float32 is multiplied at the rate that the user's settings allow: products and convolutions have one each."""
    precision("high" if products else "highest")
    fast = Device("fast", "cuda", 0, 1e15, SLOW.flops, 0.0)
    product = ran(aten.mm.default, meta(100, 100), meta(100, 100))
    convolution = ran(
        aten.convolution.default, meta(2, 3, 8, 8), meta(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0], 1
    )
    with torch.backends.cudnn.flags(allow_tf32=convolutions):
        assert seconds(*product, fast) == flops(*product) / (4e6 if products else 1e6)
        assert seconds(*convolution, fast) == flops(*convolution) / (4e6 if convolutions else 1e6)


@pytest.mark.parametrize("name", ["h100", "H100", "a100", "h200", "rtx4090", "RTX 4090", "NVIDIA H100 80GB HBM3"])
def test_devices_by_name(name: str) -> None:
    """Devices are found in any spelling, also in the one of the driver."""
    device = find_device(name)
    assert device.name in name.lower().replace(" ", "")
    assert DEVICES[device.name] is device


def test_the_table_is_sane() -> None:
    """Short floats are faster than long ones, newer devices than older ones, and all is in bytes and seconds."""
    for device in DEVICES.values():
        rates = [device.rate(dtype) for dtype in ("bfloat16", "tf32", "float32", "float64")]
        assert rates == sorted(rates, reverse=True)
        assert device.rate("float16") == rates[0]
        assert 1e12 < device.bandwidth < 1e13
        assert 20e9 < device.nbytes < 200e9
        assert device.rate("int8") == device.rate("float32")
    a100, h100, h200 = (DEVICES[name] for name in ("a100", "h100", "h200"))
    assert a100.bandwidth < h100.bandwidth < h200.bandwidth
    assert a100.rate("bfloat16") < h100.rate("bfloat16")


def test_more_threads_are_faster() -> None:
    """The CPU's rates are those of the threads that PyTorch may use."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = find_device("cpu")
        torch.set_num_threads(2)
        two = find_device(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert two.rate("float32") == 2 * one.rate("float32")
    assert one.bandwidth < two.bandwidth


@pytest.mark.parametrize("name", ["v100", "tpu", "", "meta"])
def test_unknown_devices(name: str) -> None:
    """A device that nothing is known about is refused with those that can be written."""
    with pytest.raises(RehearsalError, match="Write one of 'a100', 'h100', 'h200', 'rtx4090', 'cpu'"):
        find_device(name)


def run(session: Session) -> rekindle.Graph:
    """Two steps of the small model. Returns the graph of the second."""
    torch.manual_seed(0)
    model = small_model()
    for number in range(2):
        with session:
            model(small_batch(number, rows=128)).sum().backward()
        model.zero_grad()
    assert session.graph is not None
    return session.graph


def test_a_session_by_the_roofline() -> None:
    """Its graph has the seconds of a rehearsal, op by op, and two sessions plan alike, with a budget or a policy."""
    expected = [op.seconds for op in rehearse(small_model(), (small_batch(0, rows=128),)).forward]
    for options in ({"memory_budget": "1MiB"}, {"policy": rekindle.SpeedOptimal(0.3)}):
        one, other = (Session(cost="roofline", **options) for _ in range(2))
        graph = run(one)
        assert [op.seconds for op in graph.forward if op.call or op.name.startswith("aten.sum")] == expected[:-1]
        assert all(op.seconds for op in graph.ops if op.backward and op.name.startswith("aten.mm"))
        assert run(other) == graph
        assert one.plan == other.plan is not None


def test_a_session_by_the_clock() -> None:
    """Unless told otherwise, seconds are measured."""
    assert [op.seconds for op in run(Session(memory_budget="1MiB")).ops] != [
        op.seconds for op in run(Session(memory_budget="1MiB", cost="roofline")).ops
    ]


def test_the_roofline_of_what_has_no_rates() -> None:
    """Ops on the meta device take nothing, those on tensors without a plain storage no less than a launch."""
    roofline, x = Roofline(), meta(4, 4)
    assert roofline(aten.add.Tensor, (x, x), {}, x) == 0.0
    sparse = torch.eye(4).to_sparse()
    assert roofline(aten.add.Tensor, (sparse, sparse), {}, sparse) == find_device("cpu").launch


def test_unknown_costs() -> None:
    """Anything but the two spellings is refused with them, a function too."""
    for cost in ("flops", None, lambda *op: 1.0):
        with pytest.raises(SessionError, match='Write cost="measured" or cost="roofline"'):
            Session(cost=cost)  # type: ignore[arg-type]


def test_an_unknown_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A roofline for an accelerator of which no rates are known is refused at once, with the way out."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("mps"))
    monkeypatch.setattr(cost_module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SessionError, match=r"nothing is known about what device 'mps' can do.*cost=\"measured\""):
        Session(rekindle.KeepNone(), cost="roofline", pressure=rekindle.Pressure(rekindle.FakeReader(0, 1)))
