"""One thread per device that runs whatever is ready: training operations in each model's order, and decode steps.

Work is event-driven (DESIGN.md 2.9): the thread sleeps only when nothing is ready. Policy: owners take turns, one
operation each, and so do the models of an owner. While samplers have work too, they and the operations each get their
part of the device's time (`fair_share.py`).

An operation whose turn it is may take others along that are next in their lanes (`joint.py`): they run as one. Brief
operations go first, and who was answered a moment ago has a moment to ask again, so that clients which are out of step
by an optimiser step still meet. Nobody loses a turn by it: who was not taken along is where it was.

What an operation only queues on a GPU (`pending.py`) is answered when the GPU has done it; meanwhile the thread packs
and queues what comes next, one set of passes ahead. In the same lane that may be a joint or a brief operation, which is
queued behind; others read what the first one leaves, and wait for its answer. Nothing is queued ahead of clients that
are at work and could share its passes when they ask again. Decode steps are never queued behind passes: they would be
charged with the passes' time.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from mint_engine.errors import EngineClosedError
from mint_engine.fair_share import FairShare
from mint_engine.in_flight import InFlight
from mint_engine.interruption import Interruption
from mint_engine.joint import Joint, Operation, Queued
from mint_engine.kernels.op import dismiss_team
from mint_engine.lanes import BRIEF_ONES, Lane
from mint_engine.off_thread import Apart, OffThread
from mint_engine.pending import Pending
from mint_engine.settling import settle, settle_all
from mint_engine.turns import Turns

AHEAD = 2  # sets of passes on a GPU: one that runs, one behind it


class Stepper(Protocol):
    """Something with steps to take between operations: a sampler."""

    @property
    def busy(self) -> bool:
        """Whether there is something that a step would have the device compute. Quick."""

    def step(self) -> bool:
        """Do one step; False if there was nothing to do."""

    def fail(self, error: BaseException) -> None:
        """Give up on everything that is waiting or running."""

    def close(self, error: BaseException) -> None:
        """The same, and refuse whatever comes later."""


class Executor:
    """Owns the device thread. ``share``: of its time, between the steppers and the operations."""

    def __init__(self, name: str, share: FairShare | None = None) -> None:
        self.interruption = Interruption()  # of steppers, when somebody else has work
        self._share = share or FairShare()
        self._wake = threading.Condition()
        self._ready: Turns[Lane] = Turns()
        self._steppers: list[Stepper] = []
        self._resumed: deque[Callable[[], None]] = deque()
        self._queued = 0  # operations accepted and not begun
        self._answered: weakref.WeakSet[Lane] = weakref.WeakSet()  # lanes that ran dry since the last joint operation
        self._off_thread = 0  # operations waiting for a call off the device thread
        self._signalled = False  # a stepper got work, or was given up on, since the thread last looked
        self._asked: float | None = None  # since when steppers have had work; None while they have none
        self._closed = False
        self._draining = False  # closed, but what was accepted is still done
        self._in_flight = InFlight(name, self._resume)
        self._at_work: list[Lane] = []  # whose operations are in flight, each as often as it has some
        self._passes = 0  # sets of joint operations in flight
        self._charged = 0.0  # up to when the device's time is charged to operations, while some are in flight
        self._pid = os.getpid()
        self._calls = OffThread(name)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def lane(self, owner: str = "") -> Lane:
        return Lane(self.enqueue, owner)

    def add_stepper(self, stepper: Stepper) -> None:
        with self._wake:
            self._steppers.append(stepper)

    def enqueue(self, lane: Lane, operation: Operation, brief: bool, caller: str) -> Future:
        future: Future = Future()
        if (error := self.inherited()) is not None:
            future.set_exception(error)
            return future
        self._leave_cores()
        with self._wake:
            if self._closed:
                future.set_exception(EngineClosedError("the engine is closed"))
                return future
            lane.waiting.append(caller, Queued(operation, future, brief))
            self._queued += 1
            self._answered.discard(lane)
            if not lane.busy and lane.may_start:
                lane.busy = True
                self._ready.append(lane.owner, lane)
                self._call()
        return future

    @property
    def queued(self) -> int:
        """Operations accepted and not begun."""
        return self._queued

    def notify(self) -> None:
        """Wake the thread: a stepper has work."""
        self._leave_cores()
        with self._wake:
            self._signalled = True
            self._look_at_steppers()
            self._call()

    def _look_at_steppers(self) -> None:
        """Note since when they have had work. The lock is held."""
        busy = any(stepper.busy for stepper in self._steppers)
        self._asked = (self._asked or time.perf_counter()) if busy else None

    def _call(self) -> None:
        """Wake the thread; if a stepper has it, for several steps, it gives it back after the present one. Locked."""
        self.interruption.wanted = True
        self._wake.notify()

    def _leave_cores(self) -> None:
        """Whoever asks for work ends its idle OpenMP threads first, beside which the device's would be slow."""
        if threading.current_thread() is not self._thread:
            dismiss_team()

    def inherited(self) -> EngineClosedError | None:
        """The reason why a forked child cannot use this executor: its thread stayed in the parent."""
        if os.getpid() == self._pid:
            return None
        return EngineClosedError(
            f"this engine lives in process {self._pid}; start processes by 'spawn' (torch's threads do not survive a "
            "fork) and make a ServiceClient in each"
        )

    def close(self, *, drain: bool = False) -> None:
        """Finish what is running; refuse what is waiting or, with ``drain``, do it first. Nothing new is accepted."""
        with self._wake:
            self._closed, self._draining = True, drain
            self._call()
        if threading.current_thread() is not self._thread:
            self._thread.join()  # it waits for the calls off its thread
        self._in_flight.close()
        self._calls.close()

    def _run(self) -> None:
        with torch.no_grad():
            worked = True
            while self._wait(worked):
                worked = self._turn()
        self._refuse_waiting()

    def _wait(self, worked: bool) -> bool:
        """Sleep until there may be work; False when the executor is closed and nothing is in flight."""
        with self._wake:
            while not (worked or self._may_start() or self._resumed or self._signalled or self._closed):
                self._wake.wait()
            while self._closed and self._off_thread and not (self._resumed or self._may_start()):
                self._wake.wait()
            return not self._closed or bool(self._resumed) or self._may_start()

    def _may_start(self) -> bool:
        """Whether there is an operation to start, and room for it on the device. The lock is held."""
        if not self._ready or (self._closed and not self._draining):
            return False
        if self._samplers_wait() and self._share.samplers_turn:
            return False
        return not self._at_work or (self._passes < AHEAD and not self._company_comes()) or self._brief_one_waits()

    def _brief_one_waits(self) -> bool:
        """Whether an operation can be queued behind what is in flight whoever else waits."""
        return bool(self._at_work) and any(lane.waiting.first().brief for lane in self._ready)

    def _company_comes(self) -> bool:
        """Whether the next joint operation waits for clients that are at work, and could share their next one."""
        joints = (joint for lane in self._ready.in_turn() if (joint := lane.next_joint()) is not None)
        first = next(joints, None)
        if first is None or not first.patience:
            return False
        gone = [lane for lane in self._at_work if lane.next_joint() is None]
        theirs = [joint for lane in gone for joint in lane.in_flight if joint is not None]
        # A client whose call is done and whose step is not will be answered in a moment.
        return any(not any(lane.in_flight) for lane in gone) or bool(first.choose(theirs))

    def _samplers_wait(self) -> bool:
        """Whether decode steps wait for what is in flight."""
        return len(self._in_flight) > 0 and not self._closed and any(stepper.busy for stepper in self._steppers)

    def _turn(self) -> bool:
        """What has come back, and one operation of the next model or one step of every sampler. False if nothing."""
        begun = time.perf_counter()
        with self._wake:
            resumed, self._resumed = self._resumed, deque()
            signalled, self._signalled = self._signalled, False
            self._look_at_steppers()
        came_back = bool(resumed)
        while resumed:
            resumed.popleft()()
        with self._wake:
            if held := self._samplers_wait():
                self._charge(begun)  # they know what they are owed
            steppers = [] if self._closed or held else list(self._steppers)
            given_up = signalled and self._asked is None  # a step gives back the memory of what was cancelled
            sample = bool(steppers) and (self._share.samplers_turn or given_up or not self._may_start())
            brief = self._may_start() and not sample and self._brief_one_waits()
            lane = self._ready.pop() if self._may_start() and not (sample or brief) else None
            waiting = bool(self._ready)
            # Who has called so far is seen now: the steppers' work, or what makes them take one step at a time.
            self.interruption.wanted = waiting or bool(self._resumed) or self._closed
        if brief:
            self._run_brief_ones()
        if lane is not None:
            self._start_next(lane)
        started = brief or lane is not None
        if came_back or started:
            self._charge(begun)
            begun = time.perf_counter()
        if not sample:
            return came_back or started
        worked = [self._step(stepper) for stepper in steppers]
        if any(worked):
            self._share.sampled(time.perf_counter() - begun, others_waited=waiting)
            return True
        self._share.forget()
        with self._wake:
            return came_back or self._may_start()

    def _charge(self, begun: float) -> None:
        """Operations have had the device since ``begun`` or, if some were in flight, since the last time.

        What counts is the time in which the steppers had work.
        """
        asked, now = self._asked, time.perf_counter()
        if asked is None:
            self._share.forget()
        else:
            self._share.trained(now - max(self._charged or begun, asked))
        self._charged = now if len(self._in_flight) else 0.0

    def _step(self, stepper: Stepper) -> bool:
        try:
            return stepper.step()
        except BaseException as error:
            # The requests in the step carry the error; the thread and everybody else live on.
            stepper.fail(error)
            return True

    def _start_next(self, lane: Lane) -> None:
        queued = self._take(lane)
        if isinstance(queued.operation, Joint):
            self._start_together(lane, queued, queued.operation)
            return
        future = queued.future
        if not future.set_running_or_notify_cancel():
            self._finish(lane)
            return
        try:
            result = queued.operation()
        except BaseException as error:
            self._settle(lane, future, error=error)
            return
        if isinstance(result, Pending):
            self._follow(result, [(None, lane, future)])
            self._finish(lane)
        elif isinstance(result, Generator):
            self._advance(lane, future, result, lambda: next(result))
        else:
            self._settle(lane, future, result)

    def _take(self, lane: Lane) -> Queued:
        with self._wake:
            self._queued -= 1
            return lane.waiting.pop()

    def _start_together(self, lane: Lane, queued: Queued, first: Joint) -> None:
        """Run an operation and those it chooses of the others that are next in their lanes."""
        self._run_brief_ones()
        with self._wake:
            self._await_others(lane, first.patience)
            near = [(joint, other) for other in self._ready.in_turn() if (joint := other.next_joint()) is not None]
            chosen = {id(joint) for joint in first.choose([joint for joint, _ in near])}
            company = [(joint, other) for joint, other in near if id(joint) in chosen]
            for _, other in company:
                self._ready.discard(other.owner, other)
        futures = [queued.future, *(self._take_joint(other).future for _, other in company)]
        everyone = zip([(first, lane), *company], futures, strict=True)
        running = [(joint, one, future) for (joint, one), future in everyone if future.set_running_or_notify_cancel()]
        joints = [joint for joint, _, _ in running]
        outcomes: Sequence[Any] | Pending
        try:
            outcomes = joints[0].run(joints[1:]) if joints else []
        except BaseException as error:
            outcomes = [error] * len(joints)
        if isinstance(outcomes, Pending):
            self._follow(outcomes, running)
        else:
            settle_all([future for _, _, future in running], outcomes)
        for one in (lane, *(other for _, other in company)):
            self._finish(one)

    def _follow(self, pending: Pending, running: Sequence[tuple[Joint | None, Lane, Future]]) -> None:
        """Answer when the device has done it. Meanwhile the lanes go on with what may follow it there."""
        together = running[0][0] is not None
        with self._wake:
            self._off_thread += 1
            self._passes += together
            for joint, lane, _ in running:
                lane.in_flight.append(joint)
                self._at_work.append(lane)

        def done(error: BaseException | None) -> None:
            futures = [future for _, _, future in running]
            try:
                if error is not None:
                    raise error
                found = pending.finish()
                outcomes = found if together else [found]
            except BaseException as failure:
                outcomes = [failure] * len(futures)
            settle_all(futures, outcomes)
            with self._wake:
                self._passes -= together
                for _, lane, _ in running:
                    lane.in_flight.pop(0)
                    self._at_work.remove(lane)
                    if not lane.busy:
                        self._finish(lane)

        self._in_flight.add(pending, done)

    def _run_brief_ones(self) -> None:
        """Do what is brief at the heads of all lanes."""
        with self._wake:
            lanes = [other for other in self._ready.in_turn() if other.waiting.first().brief]
            for other in lanes:
                self._ready.discard(other.owner, other)
        for other in lanes:
            for _ in range(BRIEF_ONES):
                if other.may_start and other.waiting.first().brief:
                    self._run_brief(other)
            self._finish(other)

    def _await_others(self, lane: Lane, patience: float) -> None:
        """Give those who were answered since the last time a moment to ask again. The lock is held."""
        self._answered.discard(lane)
        until = time.monotonic() + patience
        while self._answered and not self._closed and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)
        self._answered.clear()

    def _take_joint(self, lane: Lane) -> Queued:
        """The operation that was chosen, after the brief ones in front of it."""
        while lane.waiting.first().brief:
            self._run_brief(lane)
        return self._take(lane)

    def _run_brief(self, lane: Lane) -> None:
        queued = self._take(lane)
        if queued.future.set_running_or_notify_cancel():
            try:
                result = queued.operation()  # type: ignore[operator]
            except BaseException as error:
                settle(queued.future, error=error)
            else:
                if isinstance(result, Pending):
                    self._follow(result, [(None, lane, queued.future)])
                else:
                    settle(queued.future, result)

    def _advance(self, lane: Lane, future: Future, steps: Generator, resume: Callable[[], Any]) -> None:
        """Run a generator operation up to its next off-thread call, or to its end."""
        try:
            call = resume()
        except StopIteration as stop:
            self._settle(lane, future, stop.value)
            return
        except BaseException as error:
            self._settle(lane, future, error=error)
            return

        calls, apart = [call], isinstance(call, Apart)
        del call  # what it worked on may be freed the moment it has returned, not when the next call comes

        def off_thread() -> None:
            try:
                value = calls.pop()()
            except BaseException as error:
                failure = error  # `error` is unbound when the except block ends
                self._resume(lambda: self._advance(lane, future, steps, lambda: steps.throw(failure)))
            else:
                self._resume(lambda: self._advance(lane, future, steps, lambda: steps.send(value)))

        with self._wake:
            self._off_thread += 1
        self._calls.put(off_thread, apart=apart)

    def _resume(self, continuation: Callable[[], None]) -> None:
        with self._wake:
            self._off_thread -= 1
            self._resumed.append(continuation)
            self._call()

    def _settle(self, lane: Lane, future: Future, result: Any = None, error: BaseException | None = None) -> None:
        settle(future, result, error)
        self._finish(lane)

    def _finish(self, lane: Lane) -> None:
        with self._wake:
            lane.busy = lane.may_start
            if lane.busy:
                self._ready.append(lane.owner, lane)
            elif not lane.waiting and not lane.in_flight:
                self._answered.add(lane)

    def _refuse_waiting(self) -> None:
        closed = EngineClosedError("the engine was closed before this ran")
        with self._wake:
            lanes, steppers = list(self._ready), list(self._steppers)
        for lane in lanes:
            for queued in lane.waiting:
                settle(queued.future, error=closed)
        for stepper in steppers:
            stepper.close(closed)
