"""Every op in PyTorch's own databases, every variant, every sample: what a session leaves behind equals the plain run.

`make test` takes a sample of it with fixed seeds; `make test-full` (REKINDLE_TESTS=full) takes all and writes
docs/op-database.md.
"""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import database
import database_page
import rekindle
from database import (
    EXCEPTIONS,
    NO_CONTENT,
    NOT_DETERMINISTIC,
    NOTHING_TO_REPLAY,
    UNDER_A_MODE,
    Entry,
    Outcome,
    Sample,
    differences,
)
from rekindle.runtime import replay

FULL = os.environ.get("REKINDLE_TESTS") == "full"
SAMPLES = 2  # of each entry, if not all


def chosen() -> list[Entry]:
    """All entries, or one dtype of each op and variant."""
    if FULL:
        return database.entries()
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in database.entries():
        groups.setdefault((entry.name, entry.variant), []).append(entry)
    generator = random.Random(0)
    return [generator.choice(group) for group in groups.values()]


ENTRIES = chosen()


@dataclass
class Tally:
    """What was run, counted."""

    entries: Counter[str] = field(default_factory=Counter)
    names: set[str] = field(default_factory=set)
    samples: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    excepted: dict[str, str] = field(default_factory=dict)
    stats: rekindle.Stats = field(default_factory=rekindle.Stats)
    kernels: Counter[str] = field(default_factory=Counter)


class Nothing(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """The counts of this module's tests, the replayed kernels among them."""
    counts, call = Tally(), replay._call

    def spy(op, args, kwargs, run):
        counts.kernels[str(op.func)] += 1
        return call(op, args, kwargs, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_call", spy)
        yield counts
    gc.collect()  # what errors hold; other tests count what is alive


@pytest.fixture(scope="module")
def worker() -> Iterator[ThreadPoolExecutor]:
    """A thread with a short stack: for each sample PyTorch formats all of it, which is long under pytest."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
    torch.set_num_threads(threads)


# -- one entry ---------------------------------------------------------------------------------------------------------


def judge(entry: Entry, tally: Tally) -> list[str]:
    """Run what is chosen of an entry. Returns what is wrong with it."""
    strict = rekindle.Session(rekindle.KeepNone(), min_nbytes=0)
    snapshot = rekindle.Session(rekindle.KeepNone(), min_nbytes=0, inplace="snapshot")
    before = tally.refused.total(), tally.runs.total()
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the samples do
        for number, sample in enumerate(picked(entry)):
            tally.samples += 1
            for kind in kinds(entry, sample, number):
                tally.runs[kind] += 1
                session = snapshot if kind in ("snapshot", "over saved") else strict
                wrong += [f"sample {number}, {kind}: {what}" for what in compare(entry, sample, kind, session, tally)]
    refused, runs = tally.refused.total() - before[0], tally.runs.total() - before[1]
    stats = strict.stats
    if runs > refused and not stats.ops_replayed and entry.name not in NOTHING_TO_REPLAY:
        wrong.append(f"nothing was replayed in {runs - refused} runs")
    tally.stats.add(stats)
    tally.stats.add(snapshot.stats)
    tally.entries[str(entry.dtype).removeprefix("torch.")] += 1
    tally.names.add(entry.name)
    return wrong


def picked(entry: Entry) -> Iterator[Sample]:
    """The samples of an entry, or a few of them."""
    if FULL:
        yield from entry.samples()
        return
    samples = list(entry.samples())
    yield from random.Random(str(entry)).sample(samples, min(SAMPLES, len(samples)))


def kinds(entry: Entry, sample: Sample, number: int) -> Iterator[str]:
    """How a sample is run: each as a chain of evicted values, the first ones of an entry in other ways too."""
    yield "clone"
    if number < 12:
        yield ("window", "leaf")[number % 2]
    if number < 3:
        yield "snapshot"
        if entry.twice:
            yield "twice"
    if sample.inplace and isinstance(sample.args[0], Tensor):
        yield "over saved"


def run(sample: Sample, kind: str, session: rekindle.Session | None) -> Outcome:
    """One run of a kind, plain without a session."""
    if kind == "over saved":
        return database.run_over_saved(sample, session)
    return database.run(sample, session, kind if kind in database.FEEDS else "clone", kind == "twice")


def compare(entry: Entry, sample: Sample, kind: str, session: rekindle.Session, tally: Tally) -> list[str]:
    """Run a sample plain and with a session. Returns what differs."""
    plain = attempt(lambda: run(sample, kind, None))
    managed = attempt(lambda: run(sample, kind, session))
    if isinstance(plain, Exception):
        tally.refused[entry.name, entry.variant, str(plain).partition("\n")[0]] += 1
        return [] if isinstance(managed, Exception) else [f"plain PyTorch refuses it, and a session does not: {plain}"]
    if isinstance(managed, Exception):
        return [f"{type(managed).__name__}: {managed}"]
    wrong = differences(plain, managed)
    if wrong and entry.name in EXCEPTIONS:
        tally.excepted[str(entry)] = EXCEPTIONS[entry.name]
        wrong = excepted(entry.name, sample, kind, plain, managed)
    return [f"{', '.join(wrong)} differ"] if wrong else []


def excepted(name: str, sample: Sample, kind: str, plain: Outcome, managed: Outcome) -> list[str]:
    """What differs by the comparison that an exception names."""
    if name in NO_CONTENT:
        return differences(plain, managed, database.alike)
    if name in NOT_DETERMINISTIC:
        return differences(plain, managed, database.near)
    with Nothing():
        return differences(run(sample, kind, None), managed)


def attempt(make: Callable[[], Outcome]) -> Outcome | Exception:
    """What comes of it, or what it raises."""
    try:
        return make()
    except Exception as error:
        return error.with_traceback(None)


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_equals_plain(entry: Entry, tally: Tally, worker: ThreadPoolExecutor) -> None:
    """Promise 1, op by op: outputs, gradients, mutated inputs and random state equal the plain run's bit for bit, with
    every value evicted and replayed."""
    assert worker.submit(judge, entry, tally).result() == []


@pytest.fixture
def complete(tally: Tally) -> Tally:
    """The counts, if all the tests above ran."""
    if tally.entries.total() < len(ENTRIES):
        pytest.skip("only a part of the entries was run")
    return tally


def test_replays_happened(complete: Tally) -> None:
    """The tests above do not pass for want of evictions: most runs replay several ops, by hundreds of kernels."""
    assert complete.stats.evicted > complete.runs.total()
    assert complete.stats.ops_replayed > 2 * complete.runs.total()
    assert complete.stats.snapshots > 0
    assert len(complete.kernels) > 400


def test_few_exceptions(complete: Tally) -> None:
    """Under 1% of the entries are compared in another way than bit for bit with the plain run."""
    assert len(complete.excepted) < 0.01 * complete.entries.total()


def test_every_exception_is_an_entry() -> None:
    """The lists of exceptions name nothing that PyTorch does not have, and each name once."""
    names = {entry.name for entry in database.entries()}
    assert EXCEPTIONS.keys() | NOTHING_TO_REPLAY.keys() <= names
    assert len(EXCEPTIONS) == len(NO_CONTENT) + len(NOT_DETERMINISTIC) + len(UNDER_A_MODE)


@pytest.mark.skipif(not FULL, reason="REKINDLE_TESTS=full runs everything and writes the page")
def test_page(complete: Tally) -> None:
    """What a full run found is written to docs/op-database.md."""
    database_page.write(complete)


def test_differences_are_seen() -> None:
    """The comparison sees one bit, a type, a missing tensor; and takes any NaN for any other."""

    def outcome(*things: Any) -> Outcome:
        made = Outcome()
        made.add("result", things)
        return made

    x = torch.tensor([1.0, -0.0, torch.nan])
    assert not differences(outcome(x, None, "1"), outcome(x.clone(), None, "1"))
    other_nan = torch.tensor([0xFFC00000 - (1 << 32)], dtype=torch.int32).view(torch.float32)
    assert not differences(outcome(x), outcome(torch.cat([x[:2], other_nan])))
    assert not differences(outcome(x.to(torch.complex64)), outcome(x.to(torch.complex64)))
    for other in (x.abs(), x.double(), x[:2], torch.cat([x[:2], torch.zeros(1)]), None, "1"):
        assert differences(outcome(x), outcome(other)) == ["result 0"]
    assert differences(outcome(x), outcome(x, x))
