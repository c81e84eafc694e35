"""One managed stretch of forward and backward: the one place that wires record, policy and runtime together."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch

from rekindle._bytes import Amount, format_bytes, parse_bytes
from rekindle._errors import RehearsalError, SessionError, UnknownTensor, UnsupportedContext
from rekindle.graph import Graph, Plan, verify_plan
from rekindle.policy import Decider, KeepAll, PerModule, PolicyLike, check_policy, decider_of
from rekindle.record.activation import Activation
from rekindle.record.aliasing import Ledger
from rekindle.record.cost import Roofline
from rekindle.record.modules import ModuleStack
from rekindle.record.recorder import DEFAULT_MIN_NBYTES, Recorder
from rekindle.record.tape import Tape
from rekindle.record.torch_private import (
    any_hooked,
    around_backward,
    current_graph_task,
    hooks_refused,
    in_func_transform,
    left,
    modes_and_hooks,
    nodes_made,
    reaches,
)
from rekindle.runtime.ahead import Ahead
from rekindle.runtime.arrival import Arrival
from rekindle.runtime.aside import Aside
from rekindle.runtime.checksums import Checksums
from rekindle.runtime.decide import Decisions
from rekindle.runtime.eviction import Eviction, EvictionPolicy, Evictor, Sweep
from rekindle.runtime.follow import Follower, kind_of
from rekindle.runtime.hooks import SavedTensors
from rekindle.runtime.learn import Learner
from rekindle.runtime.pressure import AcceleratorReader, Level, Pressure, default_reader, read_budget
from rekindle.runtime.replay import Replayer
from rekindle.runtime.rest import Rest, arrival_of
from rekindle.runtime.room import Room
from rekindle.runtime.snapshots import Snapshots
from rekindle.runtime.standing import Standing
from rekindle.runtime.stats import Stats


class Session:
    """Trains what runs inside it with fewer stored activations, and the same numbers.

    Use it as a context manager around forward and backward, once a step, as often as you like. What the policy does not
    keep is evicted as soon as your code lets go of it, and recomputed when the backward pass asks for it; that may also
    happen after the `with` block.

    Policies that decide from what they see as the step runs (`KeepAll`, `KeepNone`, `EveryN`, `PerModule`) act from the
    first step. The others need the graph of a whole step: they watch the first one, which runs as plain PyTorch would,
    and act from the second on, and again so whenever a step runs ops that no earlier one did.

    Where nothing has to go, steps rest: they run as plain PyTorch, at its speed, with nothing recorded or measured, and
    `stats.rested` counts them. These are all but the first step under `KeepAll`, and under a budget steps like one that
    was looked at while all was kept, and went as planned. They are told apart by the modules called and by the
    geometry of what these are called with, and one in 61 is looked at all the same.
    """

    def __init__(
        self,
        policy: PolicyLike | None = None,
        *,
        memory_budget: Amount | None = None,
        headroom: int | str | None = None,
        plan: Plan | None = None,
        plan_ahead: bool = False,
        cost: Literal["measured", "roofline"] = "measured",
        inplace: Literal["strict", "snapshot"] = "strict",
        verify: bool = False,
        pressure: Pressure | None = None,
        min_nbytes: int = DEFAULT_MIN_NBYTES,
    ) -> None:
        """Make a session.

        Args:
            policy: what to keep. Without one, everything that autograd saves is kept, as far as there is room.
            memory_budget: the most bytes that may be live while the session is entered, such as "6GiB": parameters,
                gradients, buffers and inputs that the step touches, and all that its ops allocate. Room is made before
                each op by evicting what can be recomputed. A float in (0, 1] is a share of the device's memory, "auto"
                what is free now; `print(session)` says what was understood.
            headroom: bytes of the budget to keep back, such as "500MB". "auto" keeps a twentieth back by itself.
            plan: one made for a budget earlier, such as `Plan.load(path)`, obeyed from the first step on, within that
                budget. A forward pass that is not the one it was made for is refused.
            plan_ahead: plan the first step of a new shape before it runs, at its first call of an outermost module that
                trains, by rehearsing that call and its backward pass on fake tensors. Without it that step makes room
                op by op. A budget without a plan is refused there, before an op has run. What cannot be rehearsed
                warns with `RehearsalWarning` and goes on as without. `stats.rehearsals` counts the steps so planned.
            cost: where the seconds of ops in `session.graph` come from, by which plans are made: "measured" for the
                clock, or "roofline" for the published rates of the device, with which equal steps give equal plans.
            inplace: with "strict", an in-place write over what autograd saved is an error in the backward pass, as in
                plain PyTorch; with "snapshot", what was saved survives the write.
            verify: compare each recomputed activation with a checksum of what it was. Slow.
            pressure: whose levels start sweeps: safe ones from medium, aggressive ones from high. Without a budget and
                without this, `session.pressure` tells the level and nothing is evicted by itself.
            min_nbytes: activations with fewer bytes are always kept; they are not worth a decision.

        Raises:
            PolicyError: `policy` is not a policy.
            BytesError: `memory_budget` or `headroom` is not an amount of memory, or nothing is left.
            SessionError: `inplace` or `cost` is something else, nothing is known about the device's rates, `plan` has
                no graph or is not alone, or `plan_ahead` has no budget to plan for.
        """
        if policy is not None:
            check_policy(policy)
        if inplace not in ("strict", "snapshot"):
            raise SessionError(f'inplace is {inplace!r}. Write inplace="strict" or inplace="snapshot".')
        if cost not in ("measured", "roofline"):
            raise SessionError(f'cost is {cost!r}. Write cost="measured" or cost="roofline".')
        if plan_ahead and (memory_budget is None or policy is not None or plan is not None):
            raise SessionError(
                "plan_ahead plans for a memory budget, and for nothing else. Write "
                'rekindle.Session(memory_budget="6GiB", plan_ahead=True), without a policy or a plan.'
            )
        if plan is not None:
            _check_plan(plan, policy, memory_budget if memory_budget is not None else headroom)
            memory_budget = plan.forecast.budget if plan.forecast is not None else None
        self.policy = policy
        self.budget = None if memory_budget is None else read_budget(memory_budget, headroom)
        self.memory_budget = None if self.budget is None else self.budget.nbytes
        self._finished = Stats()
        self._step = Stats()
        self._entry_nbytes = 0
        self._thread: int | None = None
        self._stack: ExitStack | None = None
        self._looking = ExitStack()
        self._learner = Learner(policy, self.memory_budget, plan)
        self._ahead = Ahead(self.memory_budget, min_nbytes) if plan_ahead and self.memory_budget is not None else None
        self._signature: Hashable = None
        self._graph: Graph | None = plan.graph if plan is not None else None
        self._asked = False  # user code marks or evicts by itself
        self._is_plain = pressure is None and inplace == "strict" and not verify
        self._may_rest = self._is_plain and memory_budget is None
        self._resting = self._waking = False
        self._awaits_backward = self.in_backward = False
        self._nodes = 0, 0  # the numbers of the autograd nodes of a step that waits: the first, and the one after them
        me = weakref.ref(self)

        def on_death(activation: Activation, nbytes: int) -> None:
            session = me()
            if session is not None:
                session._count_eviction(activation, nbytes)

        def stats() -> Stats:
            session = me()
            return session._step if session is not None else Stats()

        def on_root(module: torch.nn.Module) -> None:
            session = me()
            if session is not None:
                session._meet(module)

        def on_call(module: torch.nn.Module, args: Any) -> None:
            session = me()
            if session is not None:
                session._called(module, args)

        ledger = self._ledger = Ledger(on_death, lambda device: AcceleratorReader(device).used())
        planned = self.memory_budget is not None and policy is None and plan is None
        rests = planned and self._is_plain
        watches = self._watches = self.memory_budget is not None or pressure is not None
        self.modules = ModuleStack(on_root if watches else None, on_call if rests else None)
        standing = self._standing = Standing(ledger, self.modules)
        self._rest = Rest(standing.see) if rests else None
        self._pressure = (
            Pressure(default_reader(lambda: ledger.total_nbytes, self.memory_budget)) if pressure is None else pressure
        )
        self._evictor = Evictor(ledger, stats, lambda: self._recorder.number, lambda: self.snapshots.cleanup_stale())
        room = self._room = Room(ledger, self._evictor, self._pressure, self.memory_budget, watches, stats, _told(cost))
        self.snapshots = Snapshots(ledger, room, stats)
        self._replayer = Replayer(ledger, room, stats, self.modules.name_of)
        self._decisions = Decisions(None, None, self.snapshots, self._step)
        self._recorder = Recorder(ledger, self.modules, self._decisions, room, min_nbytes, inplace == "snapshot")
        self._saved_tensors = SavedTensors(
            self._recorder,
            self._replayer,
            lambda activation, call: self._decisions.saved(activation, call),
            inplace == "snapshot",
        )
        self._aside = Aside(
            ledger, lambda: self._recorder.number, standing.gradients, standing.surely_fits, self._runs_unattended
        )
        self._saved_tensors.aside = self._aside
        if verify:
            checksums = Checksums()
            self._recorder.checksums = self._saved_tensors.checksums = self._replayer.checksums = checksums

    # -- one step ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        if self._awaits_backward:
            self.end()
        self._check_enter()
        try:
            self._begin_step()
            if self._rests():
                self._step.rested = 1
            else:
                self._open()
        except BaseException:
            self._thread = None
            raise
        return self

    def _open(self) -> None:
        self._signature = None
        self._recorder.home, self._recorder.unattended, self._recorder.leaves.stranger = None, True, False
        self._decide_with(self._new_decisions())
        tape = Tape(self._ledger) if self._learner.records else None
        self._recorder.tape = self._replayer.tape = tape
        self._ledger.on_end = tape.died if tape is not None else None
        self._room.measures = tape is not None
        self._room.watches = self._watches and (self.policy is not None or self._decisions.follower is None)
        self._room.unseen = 0
        self._nodes = nodes_made(), 0
        self._aside.begin(self._is_plain and tape is None and not self._room.watches and self._finds_gradients())
        if self._rest is not None:
            self._rest.begin()
        visitors = self._ledger.forget_visitors() if self._watches else 0
        self._check_standing(0 if self.modules.roots else visitors)  # if modules are called, they bring theirs
        with ExitStack() as stack:
            self.modules.open()
            stack.callback(self.modules.close)
            stack.enter_context(around_backward(self._around_backward))
            stack.enter_context(self._looking)
            self._look()
            self._stack = stack.pop_all()

    def _look(self) -> None:
        """See the ops that run from here on, and what autograd saves."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self._saved_tensors.pack, self._saved_tensors.unpack)
        self._looking.enter_context(hooks)
        self._looking.enter_context(self._recorder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        self._thread, self._awaits_backward = None, False
        if stack is None:
            return
        stack.close()
        tape, self._recorder.tape, self._replayer.tape = self._recorder.tape, None, None
        self._ledger.on_end = None
        self._room.measures = False
        try:
            if tape is not None and error is None:
                self._learn(tape)
        finally:
            self._recorder.cut()
        self._end_watch(error is None)
        self._learner.ended(self._decisions.follower, self._highest())
        self._end_rest(tape is None and error is None)
        if self._aside.highest:
            self._find_gradients()
        if tape is None and self._ahead is not None and self._ahead.wants_record(self._signature):
            self._learner.records = True
        if isinstance(error, RuntimeError) and "saved tensor hooks" in str(error) and "torch.func" in str(error):
            raise UnsupportedContext(
                "torch.func transforms (grad, vjp, jacrev, hessian) refuse saved-tensor hooks, so they cannot run "
                "inside a session. Use torch.autograd.grad, or run the transform outside of the `with` block."
            ) from error

    def _check_enter(self) -> None:
        if in_func_transform():
            raise UnsupportedContext(
                "a session cannot be entered inside a torch.func transform, which refuses saved-tensor hooks. Use "
                "torch.autograd.grad instead of the transform."
            )
        if (refused := hooks_refused()) is not None:
            raise UnsupportedContext(
                f"a session cannot be entered where saved-tensor hooks are disabled: {refused} Enter it outside of "
                "torch.autograd.graph.disable_saved_tensors_hooks."
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedContext(
                "a session cannot be entered while a CUDA graph is captured: a captured graph cannot contain "
                "evictions. Capture without the session."
            )
        if self._thread is not None:
            where = "this thread" if self._thread == threading.get_ident() else "another thread"
            raise SessionError(
                f"the session is already entered, on {where}. Leave the first `with` block before, or make a "
                "rekindle.Session for each thread."
            )
        self._thread = threading.get_ident()

    def _begin_step(self) -> None:
        self._close_step()
        self._step = Stats(steps=1)
        self._resting = self._waking = False
        self._entry_nbytes = self._ledger.peak_nbytes = self._ledger.live_nbytes
        self._standing.begin()

    def _close_step(self) -> None:
        self._finished.add(self.last_step)
        self._step = Stats()

    def _decide_with(self, decisions: Decisions) -> None:
        self._decisions = decisions
        self._recorder.ask(decisions)
        self._saved_tensors.follower = decisions.follower

    def _new_decisions(self) -> Decisions:
        decider: Decider | None = decider_of(self.policy) if self.policy is not None else None
        follower = self._learner.follow()
        if follower is not None and self.policy is None:
            follower.on_departure = self._go_on_line
        return Decisions(decider, follower, self.snapshots, self._step)

    def _go_on_line(self) -> None:
        """Make room op by op: the step is not the planned one."""
        self._watch()
        self._step.departures += 1

    def _watch(self) -> None:
        """Make room op by op from here on, if there is a budget, and see every op of the backward pass. Gradients that
        were made unseen count."""
        self._room.watches = self._watches
        self._aside.stop()
        if self._aside.highest:
            self._find_gradients()

    def _learn(self, tape: Tape) -> None:
        graph = self._graph = tape.graph(self.modules.names())
        follower = self._decisions.follower
        followed = follower.completed() if follower is not None else None
        self._learner.learn(graph, self._highest() + tape.adopted_nbytes, followed, tape.held(), tape.repeats())
        if self._ahead is not None and self._signature is not None:
            self._ahead.recorded(self._signature, self._learner.plans.find(kind_of(graph)) is not None)
        if isinstance(self.policy, PerModule) and (unmatched := self.policy.unmatched(graph)):
            warnings.warn(
                f"{self.policy!r}: no module that ran is meant by {', '.join(map(repr, unmatched))}, so nothing is "
                "evicted for it. Write module classes, or names as in model.named_modules().",
                stacklevel=3,
            )

    def _highest(self) -> int:
        """The most bytes that were live in the step, what stood before it included."""
        return self._standing.highest(self._aside.highest)

    def _end_watch(self, calm: bool) -> None:
        """Learn what a step needs that was seen as a whole, and went as it was meant to."""
        step = self._step
        if calm and not (step.sweeps or step.rescues or step.departures or step.rested):
            self._aside.ended(self._highest)
        self._aside.stop()

    def _finds_gradients(self) -> bool:
        """Whether the bytes of gradients are known that are made unseen, as far as anybody has to know them."""
        return not self._watches or bool(self.modules.roots)

    def _find_gradients(self) -> None:
        """Know the gradients that were made unseen: which plan the next step follows depends on them."""
        if self._watches:
            self._standing.see_all()

    @contextmanager
    def _around_backward(self, outputs: Sequence[Any], retain_graph: bool, create_graph: bool) -> Iterator[None]:
        """What a backward pass runs in that begins now from `outputs`: without the recorder, if nobody has to watch
        it."""
        awaited = self._awaits_backward
        if awaited and not (_may_switch() and reaches(outputs, *self._nodes)):
            yield  # somebody else's
            return
        with self._last_part(retain_graph) if awaited else nullcontext():
            if self._resting:
                yield
                return
            aside = self._aside
            if create_graph:  # what it makes may be recomputed in another
                aside.stop()
            else:
                aside.backward_begins()
            with left(self._recorder) if aside.whole and _may_switch() else nullcontext():
                yield

    # -- a step whose backward pass is called by somebody else -------------------------------------------------------

    def await_backward(self) -> None:
        """Look at nothing until this thread begins the backward pass of what ran so far, with which the step ends: at
        the end of the forward pass of a model that somebody else calls. If autograd saved nothing there is none."""
        if self._stack is None or not (self._resting or self._recorder.saves):
            self.end()
            return
        self._nodes = self._nodes[0], nodes_made()
        self._look_away()

    def _look_away(self) -> None:
        self._looking.close()
        self.modules.pause()
        self._awaits_backward = True

    def end(self, error: BaseException | None = None) -> None:
        """End the step, as leaving the `with` block does."""
        self.__exit__(type(error) if error is not None else None, error, None)

    def goes_on(self) -> bool:
        """Whether a forward pass that begins now begins no step: a backward pass is running, which calls the model once
        more, or another thread does meanwhile; or one is waited for, and no gradients are asked for."""
        return self.in_backward or (self._awaits_backward and not torch.is_grad_enabled())

    @contextmanager
    def _last_part(self, retain_graph: bool) -> Iterator[None]:
        """Look at the backward pass that was waited for, which ends the step, if it does not come again."""
        self._awaits_backward, self.in_backward = False, True
        if self._recorder.tape is not None:
            self._recorder.tape.adopts = True  # a loss that nobody saw
        try:
            self.modules.resume()
            if not self._resting:
                self._look()
            yield
        except BaseException as error:
            self.end(error)
            raise
        finally:
            self.in_backward = False
        if retain_graph:
            self._look_away()
        else:
            self.end()

    def _runs_unattended(self) -> bool:
        """Whether nobody else's code is known to run in the backward pass, and no gradient is made there that nobody
        finds afterwards though its bytes count."""
        recorder = self._recorder
        if not (recorder.unattended and recorder.is_at_home) or (recorder.leaves.stranger and self._watches):
            return False
        return not any(map(any_hooked, list(self.modules.roots)))

    def _rests(self) -> bool:
        """Whether nothing has to be recorded in this step: all is kept, and nobody asked for more."""
        return isinstance(self.policy, KeepAll) and self._may_rest and not self._learner.records and not self._asked

    def _called(self, module: torch.nn.Module, args: Any) -> None:
        """See a call of a module come."""
        assert self._rest is not None
        if not self._resting:
            self._rest.called(module, args, self._ledger.live_nbytes)
        elif self._waking or not self._rest.expects(module, args):
            self._wake(module, args)

    def _lie_down(self) -> None:
        """Look at nothing from here on, unless somebody else's modes or hooks are active, which are left in order."""
        modes, hooks = modes_and_hooks()
        if modes != (self._recorder,) or hooks is None or hooks[0] != self._saved_tensors.pack or not _may_switch():
            return
        self._looking.close()
        if modes_and_hooks() != ((), None):
            self._look()
            return
        self._resting = True
        self._step.rested = 1
        self._decide_with(Decisions(None, None, self.snapshots, self._step))
        self._recorder.cut()
        self.modules.slacken()

    def _wake(self, module: torch.nn.Module, args: Any) -> None:
        """Make room op by op: the step is not the one that was to rest. In the middle of somebody else's modes or hooks
        that begins with the first call after them."""
        assert self._rest is not None
        if not self._waking:
            self._waking = True
            unseen = self._rest.woken()
            self._room.unseen = unseen if self._ledger.place is None else 0  # an accelerator's allocator tells
            self._signature = "woken" if self._signature is None else self._signature  # too late to plan ahead
            self._step.departures += 1
            self._learner.records = True
        if modes_and_hooks() != ((), None) or not _may_switch():
            return
        self._resting = False
        self._watch()
        self._look()
        self.modules.tighten(module, args)

    def _end_rest(self, calm: bool) -> None:
        """Learn whether steps like this one may rest, or whether this one rested with reason."""
        rest, step = self._rest, self._step
        if rest is None:
            return
        if not step.rested:
            calm = calm and not (step.recompute_calls or step.sweeps or step.rescues or step.departures)
            rest.ended(self._decisions.follower, self._highest(), calm)
        elif self._resting and not self._waking and calm and not rest.finished():
            rest.woken()
            self._learner.records = True
            step.departures += 1
        self._resting = False

    def _meet(self, module: torch.nn.Module) -> None:
        """Make ready for a call of an outermost module: plan ahead for it, or rest if nobody has to look."""
        new = self._standing.see(module)
        arrival = arrival_of(module)
        if arrival is not None:
            for tensor in arrival.tensors:
                self._ledger.track_leaf(tensor)
            if self._ahead is not None and self._signature is None and torch.is_grad_enabled() and _trains(module):
                self._plan_ahead(self._ahead, arrival)
        self._check_standing()
        rest, follower = self._rest, self._decisions.follower
        if rest is None or self._step.rested:
            return
        made = follower.made_so_far if follower is not None else 0
        rest.arrived(arrival, self._ledger.total_nbytes if rest.is_first() else new, made)
        if not (self._learner.records or self._asked) and rest.knows(follower):
            self._lie_down()

    def _plan_ahead(self, ahead: Ahead, arrival: Arrival) -> None:
        """Follow a rehearsed plan from here on, and make room where it says too little, if no recorded step gave one.

        Raises:
            BudgetInfeasible: there is none that fits.
        """
        self._signature = arrival.full_signature
        if not ahead.knows(self._signature):
            with self.modules.blind():
                self._step.rehearsals += ahead.rehearse(arrival, self._standing.beside(arrival))
        step = ahead.step(self._signature)
        if step is not None:
            follower = Follower((step,))
            follower.on_departure = self._go_on_line
            self._decide_with(Decisions(None, follower, self.snapshots, self._step))
            self._watch()
            self._step.departures = 0  # from plans for other arguments, by what ran before the call

    def _check_standing(self, expected: int = 0) -> None:
        """Follow no plan if there is more from before the step than when it was made: gradients, say. So many bytes are
        `expected` that are not seen yet."""
        follower = self._decisions.follower
        if follower is not None and self.memory_budget is not None:
            self._ledger.look()
            follower.check(self._ledger.total_nbytes + expected)

    def _count_eviction(self, activation: Activation, nbytes: int) -> None:
        if activation.pending(current_graph_task()):
            self._step.evicted += 1
            self._step.evicted_nbytes += nbytes

    # -- what the user asks ------------------------------------------------------------------------------------------

    def mark(self, tensor: torch.Tensor) -> Activation:
        """Make the activation that `tensor` looks at a checkpoint: it is kept, whatever the policy says, as long as
        something needs it or you hold what this returns.

        Raises:
            UnknownTensor: the session never saw `tensor`, or does not see now.
        """
        entered, resting = self._thread is not None, bool(self._step.rested)
        try:
            tracked = self._ledger.find(tensor)
        except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or one without a storage
            tracked, resting = None, False
        if not entered or (tracked is None and not resting):
            what = f"a {type(tensor).__name__}"
            if isinstance(tensor, torch.Tensor):
                what = f"a {tensor.layout} tensor of shape {list(tensor.shape)} and dtype {tensor.dtype}"
            where = "the session never saw it" if entered else "the session is not entered"
            raise UnknownTensor(
                f"cannot mark {what}: {where}. Mark what an op inside the `with` block returned, inside that block."
            )
        self._asked = True
        activation = tracked.activation if tracked is not None else None
        if activation is None:
            activation = self._recorder.leaf(tensor)
        if not activation.is_checkpoint:
            self._step.checkpoints += 1
        activation.is_checkpoint = activation.is_marked = True
        if activation.is_source() or any(activation.live_handles()):
            self._saved_tensors.hold(activation, tensor)  # else it is held when something reads or saves it
        return activation

    def try_evict(self, activation: Activation, policy: EvictionPolicy = EvictionPolicy.ALWAYS_SAFE) -> Eviction:
        """Evict one activation if it can be recomputed; a checkpoint only if `policy` is AGGRESSIVE.

        Returns whether that was done, the bytes freed, and why not.
        """
        self._asked = True
        return self._evictor.try_evict(activation, policy)

    def sweep(self, policy: EvictionPolicy = EvictionPolicy.ALWAYS_SAFE) -> Sweep:
        """Evict all that `policy` allows, at any moment of a step."""
        self._asked = True
        return self._evictor.sweep(policy)

    def sweep_to_target(self, target: int | str, policy: EvictionPolicy = EvictionPolicy.ALWAYS_SAFE) -> Sweep:
        """Evict until at most `target` bytes (such as "64MiB") are live of what the session's ops made.

        What is no checkpoint goes first, then, if `policy` is AGGRESSIVE and it is still needed, checkpoints, then
        snapshots.

        Raises:
            BytesError: `target` is not an amount of memory.
        """
        self._asked = True
        return self._evictor.sweep_to_target(target if target == 0 else parse_bytes(target), policy)

    @property
    def pressure(self) -> Level:
        """How near the limit the session is now."""
        return self._room.level()

    @property
    def live_nbytes(self) -> int:
        """Bytes that are live now of all that the session's ops made."""
        return self._ledger.live_nbytes

    @property
    def stats(self) -> Stats:
        """What happened over the session's life."""
        total = Stats()
        total.add(self._finished)
        total.add(self.last_step)
        return total

    @property
    def last_step(self) -> Stats:
        """What happened in the running step, or the last one."""
        self._step.peak_nbytes = max(0, self._ledger.peak_nbytes - self._entry_nbytes)
        return self._step

    @property
    def graph(self) -> Graph | None:
        """The graph of the last step that was recorded: the first one, and each that ran ops no earlier one did."""
        return self._graph

    @property
    def plan(self) -> Plan | None:
        """The newest plan, for a budget and for policies that plan from the graph of a step."""
        planned = self._learner.plans.planned
        if self._ahead is not None and (step := self._ahead.step(self._signature)) is not None:
            return step.plan
        return planned[0].plan if planned else None

    def __reduce__(self) -> NoReturn:
        raise SessionError(
            "a session cannot be pickled or copied: it holds hooks, and what its steps left behind. Make another with "
            f"rekindle.Session({self.policy!r}) where it is needed."
        )

    def __repr__(self) -> str:
        budget = "" if self.memory_budget is None else f", memory_budget={format_bytes(self.memory_budget)!r}"
        return f"Session(policy={self.policy!r}{budget})"

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"\nbudget {self.budget}"
        return f"{self!r}{budget}\n{self.stats}"


def _told(cost: str) -> Roofline | None:
    """Who tells what an op took; None if that is measured."""
    if cost == "measured":
        return None
    roofline = Roofline()
    place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if place is not None:
        try:
            roofline.of(place)
        except RehearsalError as error:
            raise SessionError(f'cost is "roofline", but {error} Or write cost="measured".') from error
    return roofline


def _may_switch() -> bool:
    """Whether modes and hooks that are entered or left now stay so: autograd's engine puts back what a node changed."""
    return current_graph_task() == -1 and not in_func_transform() and hooks_refused() is None


def _trains(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _check_plan(plan: object, policy: object, memory_budget: object) -> None:
    """See that a plan can be obeyed, and nothing else is asked for."""
    if not isinstance(plan, Plan):
        raise SessionError(f"plan is {plan!r}. Write plan=rekindle.Plan.load(path).")
    if policy is not None or memory_budget is not None:
        other = "policy" if policy is not None else "memory_budget"
        raise SessionError(f"plan and {other} are both given, but a plan says all. Give one of them.")
    if plan.graph is None:
        raise SessionError(
            "the plan has no graph to compare the step with. Give one that was made for a budget, or loaded from a "
            "file."
        )
    verify_plan(plan.graph, plan)
