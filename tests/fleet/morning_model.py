# SPDX-License-Identifier: MIT OR Apache-2.0
"""A fleet that lost its power at one instant, and the server that it comes back to: a discrete-event simulation.

The devices' pauses are those of the scripts that ship (`morning_pace`), the server's times are measured
(`morning_server`). Times are seconds since the power came back.

The server is what the administrators' page sets up: nginx that speaks TLS, and processes of Caramel behind it, on
the same cores. nginx has room for so many connections; a check takes one of them from its beginning, and a second
one, to Caramel, when the handshake is over. Where there is none for the first, the connection is reset, and the
program tries once more without its certificate; where there is none for the second, nginx answers 500. A device that
leaves gives its two places back at once, but Caramel goes on to work for it: it has the request already. That was
seen on the real ones.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import simpy

from fleet.morning_pace import Pace

HOUR = 3600.0
#: Statuses of a run.
CERTIFIED, FAILED = 0, 127
FRONT, BACK = "nginx", "Caramel"

Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Machine:
    """A server; times are seconds of one core, of a single check.

    Attributes: cores; processes: of Caramel; front: nginx's time for a handshake, and back: Caramel's time for a
    check (a function, where it differs from check to check); turned_away: nginx's time for a connection that it has
    no room for; room: nginx's connections; rate: how many checks a second nginx lets through (`limit_req`), with
    `burst` of them at a time, and the others get 503 and `retry_after`; None: no limit. back_from: it is out of reach
    until then.
    """

    cores: int
    processes: int
    front: float
    back: Callable[[random.Random], float]
    turned_away: float
    room: int
    rate: Optional[float] = None
    burst: int = 0
    retry_after: Optional[int] = None
    back_from: float = 0.0

    def scaled(self, by: int) -> Machine:
        """What one device of `by` sees of it: all rates and places are shared."""
        back = self.back
        return Machine(
            self.cores,
            self.processes,
            self.front * by,
            lambda chance: back(chance) * by,
            self.turned_away * by,
            max(2, self.room // by),
            None if self.rate is None else self.rate / by,
            max(1, self.burst // by),
            self.retry_after,
            self.back_from,
        )


class Processor:
    """Cores that two kinds of work share fairly, as a scheduler would: who has had less comes next."""

    def __init__(self, env: simpy.Environment, cores: int, most: dict[str, int]) -> None:
        """`most`: of each kind of work, how much of it can go on at a time."""
        self.env = env
        self.idle = cores
        self.most = most
        self.running = dict.fromkeys(most, 0)
        self.had = dict.fromkeys(most, 0.0)
        self.waiting: dict[str, deque[tuple[float, simpy.Event]]] = {kind: deque() for kind in most}

    def work(self, kind: str, seconds: float) -> simpy.Event:
        """An event that happens when this work is done."""
        done = self.env.event()
        if not self.waiting[kind] and not self.running[kind]:
            # Who had nothing to do has saved nothing up.
            others = [self.had[other] for other in self.had if self.waiting[other] or self.running[other]]
            self.had[kind] = max(self.had[kind], *others, 0.0)
        self.waiting[kind].append((seconds, done))
        self._begin()
        return done

    def _begin(self) -> None:
        while self.idle:
            ready = [kind for kind in self.most if self.waiting[kind] and self.running[kind] < self.most[kind]]
            if not ready:
                return
            kind = min(ready, key=self.had.__getitem__)
            seconds, done = self.waiting[kind].popleft()
            self.had[kind] += seconds
            self.running[kind] += 1
            self.idle -= 1
            timer = self.env.timeout(seconds, (kind, done))
            timer.callbacks.append(self._end)

    def _end(self, timer: simpy.Event) -> None:
        of_whom: Any = timer.value
        kind, done = of_whom
        self.idle += 1
        self.running[kind] -= 1
        done.succeed()
        self._begin()


@dataclass
class Connection:
    """One try of a run: `answer` happens with status and Retry-After."""

    answer: simpy.Event
    places: int = 0
    left: bool = False


class Server:
    """nginx and Caramel on one machine; `chance` is where its service times come from."""

    def __init__(self, env: simpy.Environment, machine: Machine, round_trip: float, chance: random.Random) -> None:
        self.env = env
        self.machine = machine
        self.round_trip = round_trip
        self.chance = chance
        self.free = machine.room
        self.processor = Processor(env, machine.cores, {FRONT: machine.cores, BACK: machine.processes})
        self.served = self.wasted = self.reset = self.without_upstream = self.told_to_wait = 0
        self._bucket, self._filled = 0.0, 0.0

    def connect(self) -> Connection:
        """A connection, on which an answer comes, or none."""
        connection = Connection(self.env.event())
        if self.env.now >= self.machine.back_from:
            self.env.process(self._serve(connection))
        return connection

    def leave(self, connection: Connection) -> None:
        """The device ends the connection."""
        connection.left = True
        self._give_back(connection)

    def _give_back(self, connection: Connection) -> None:
        self.free += connection.places
        connection.places = 0

    def _take(self, connection: Connection) -> bool:
        if self.free < 1:
            return False
        self.free -= 1
        connection.places += 1
        return True

    def _let_through(self) -> bool:
        """nginx's limit_req with nodelay: a bucket that empties at the rate."""
        if self.machine.rate is None:
            return True
        now = self.env.now
        level = max(0.0, self._bucket - (now - self._filled) * self.machine.rate)
        self._filled = now
        through = level <= self.machine.burst
        self._bucket = level + 1 if through else level
        return through

    def _serve(self, connection: Connection) -> Steps:
        machine = self.machine
        if self.round_trip:
            yield self.env.timeout(self.round_trip)
        for last in (False, True):
            if self._take(connection):
                break
            self.reset += 1
            yield self.processor.work(FRONT, machine.turned_away)
            if last:
                connection.answer.succeed((FAILED, None))
                return
            if self.round_trip:
                yield self.env.timeout(2 * self.round_trip)
        if self.round_trip:
            yield self.env.timeout(self.round_trip)
        yield self.processor.work(FRONT, machine.front)
        if connection.left:
            return
        answer: tuple[int, Optional[int]] = FAILED, None
        if not self._let_through():
            self.told_to_wait += 1
            answer = FAILED, machine.retry_after
        elif not self._take(connection):
            self.without_upstream += 1
        else:
            yield self.processor.work(BACK, machine.back(self.chance))
            if connection.left:
                self.wasted += 1
                return
            self.served += 1
            answer = CERTIFIED, None
        self._give_back(connection)
        connection.answer.succeed(answer)


@dataclass(frozen=True)
class Scenario:
    """One morning after.

    Attributes: devices; pace; machine; certified: whether the devices have a usable certificate; boots_within: all
    boot within so many seconds; round_trip: between a device and the server; until: the end of what is looked at, or
    two hours, if all have been served by then;
    each: how many devices one of the simulation stands for; hourly: whether those that were served check
    again; boots: when each device boots, where that is known; seed.
    """

    devices: int
    pace: Pace
    machine: Machine
    certified: bool = True
    boots_within: float = 60.0
    round_trip: float = 0.1
    until: float = 4 * HOUR
    each: int = 1
    hourly: bool = True
    boots: Sequence[float] = ()
    seed: int = 1


@dataclass
class Morning:
    """What came of it.

    Attributes: server: with its counts; first: when each device was served for the first time, in order; runs: how
    many ended with which status, of those that began when the server was there, until the last device had been
    served; begun, done: checks that began, and that ended with 0, by `WIDTH` seconds; pauses: some of those between
    checks: the device's own, the server's wish, and what came of them.
    """

    scenario: Scenario
    server: Server
    first: list[float] = field(default_factory=list)
    runs: Counter[int] = field(default_factory=Counter)
    begun: Counter[int] = field(default_factory=Counter)
    done: Counter[int] = field(default_factory=Counter)
    pauses: list[tuple[int, Optional[int], float]] = field(default_factory=list)

    WIDTH = 10.0

    def served_after(self, share: float = 1.0) -> Optional[float]:
        """When this share of the devices had been served; None where that didn't happen."""
        number = max(0, round(share * self.devices) - 1)
        return self.first[number] if number < len(self.first) else None

    @property
    def devices(self) -> int:
        return self.scenario.devices // self.scenario.each

    @property
    def failures(self) -> float:
        """The share of runs that ended with 127."""
        return self.runs[FAILED] / max(1, sum(self.runs.values()))

    def rate(self, counts: Counter[int], width: float = 60.0) -> list[float]:
        """A second, over `width` seconds each, of the whole fleet."""
        per = round(width / self.WIDTH)
        last = max(counts, default=0)
        return [
            sum(counts[i] for i in range(start, start + per)) * self.scenario.each / width
            for start in range(0, last + 1, per)
        ]

    @property
    def peak(self) -> float:
        """The busiest minute since the server is there: checks that began, a second."""
        return max(self.rate(self.begun)[int(self.scenario.machine.back_from // 60) :])


class Device:
    """One device; see `Pace` for what it does when."""

    def __init__(self, env: simpy.Environment, morning: Morning, chance: random.Random) -> None:
        self.env = env
        self.morning = morning
        self.scenario = morning.scenario
        self.server = morning.server
        self.chance = chance
        self.waiting = True  # for the first answer since the power is back

    def live(self, boot: float, hour: float) -> Steps:
        """From the boot on. `hour`: when the next full hour begins."""
        env, pace, chance = self.env, self.scenario.pace, self.chance
        minute = chance.randrange(60)  # what the client ID makes of it
        yield env.timeout(boot)
        booted = env.now
        yield env.timeout(pace.after_boot + chance.uniform(0, pace.boot_spread))
        if self.scenario.certified:
            yield env.timeout(self.wait(booted))
        while True:
            yield from self.until_enrolled()
            # What comes while that goes on finds it running, and does nothing.
            at = -1.0
            while at < env.now:
                at = hour + (chance.uniform(0, pace.later_spread) if pace.later_spread else 60.0 * minute)
                hour += HOUR
            if not self.scenario.hourly:
                return
            yield env.timeout(at - env.now)
            yield env.timeout(self.wait(booted))

    def wait(self, booted: float) -> int:
        """The wait before the first check of a device that has a certificate."""
        return self.scenario.pace.wait(self.env.now - booted, self.chance.getrandbits(32))

    def until_enrolled(self) -> Steps:
        """Checks until one ends with 0."""
        pace = self.scenario.pace
        hurry = (self.waiting and not self.scenario.certified) or not pace.spread
        delay = pace.first if hurry else pace.unhurried
        while True:
            status, retry_after = yield from self.check()
            if status == CERTIFIED:
                return
            pause = pace.pause(delay, retry_after, self.chance.getrandbits(32))
            if len(self.morning.pauses) < 10_000:
                self.morning.pauses.append((delay, retry_after, pause))
            yield self.env.timeout(pause)
            delay = pace.longer(delay)

    def check(self) -> Steps:
        """One run of the program."""
        morning, env = self.morning, self.env
        morning.begun[int(env.now / morning.WIDTH)] += 1
        counts = env.now >= self.scenario.machine.back_from and len(morning.first) < morning.devices
        connection = self.server.connect()
        over = env.timeout(self.scenario.pace.timeout)
        yield connection.answer | over
        if connection.answer.triggered:
            said: Any = connection.answer.value
            status, retry_after = said
        else:
            self.server.leave(connection)
            status, retry_after = FAILED, None
        if counts:
            morning.runs[status] += 1
        if status == CERTIFIED:
            morning.done[int(env.now / morning.WIDTH)] += 1
            if self.waiting:
                self.waiting = False
                morning.first.append(env.now)
        return status, retry_after


def simulate(scenario: Scenario) -> Morning:
    """Lives through it; the same seed gives the same morning."""
    chance = random.Random(scenario.seed)
    env = simpy.Environment()
    server = Server(env, scenario.machine.scaled(scenario.each), scenario.round_trip, chance)
    morning = Morning(scenario, server)
    hour = chance.uniform(0, HOUR)  # the power doesn't come back at a full hour
    for number in range(morning.devices):
        boot = scenario.boots[number] if scenario.boots else chance.uniform(0, scenario.boots_within)
        env.process(Device(env, morning, chance).live(boot, hour))
    while env.now < scenario.until and (env.now < 2 * HOUR or len(morning.first) < morning.devices):
        env.run(until=min(env.now + HOUR / 2, scenario.until))
    return morning
