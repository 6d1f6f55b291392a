"""Tests that 64 ranks agree on which rank was lost, with a simulated transport and clock."""

import random

import pytest

from mlx_segtrain.training.watch import JUDGES, Lost, Watch

pytestmark = pytest.mark.acceptance

RANKS, PATIENCE, SETTLE, BEAT = 64, 13.0, 2.5, 6.0
#: LOOK is the interval in seconds between two checks of the clock. DELAYS lists the possible delays
#: of a message, as numbers of checks. Even forwarded messages arrive within SETTLE seconds.
LOOK, DELAYS = 0.5, (1, 1, 2)


class World:
    """Simulates ranks with a common clock and messages in transit."""

    def __init__(self, n, seed):
        self.n, self.random, self.looks = n, random.Random(seed), 0
        self.under_way = {}
        self.watches = {r: self.fresh(r) for r in range(n)}
        self.run_of = dict.fromkeys(range(n), 0)  # a restarted rank belongs to a new run
        self.inbox = {r: [] for r in range(n)}
        self.sleeping = set()
        self.plans = {}
        self.to_be_shot = 0  # how many judges to kill while they send a decision
        self.shot = set()

    @property
    def now(self):
        return self.looks * LOOK

    def fresh(self, r):
        return Watch(r, self.n, self.now, patience=PATIENCE, settle=SETTLE, beat=BEAT)

    def at(self, seconds, what, *args):
        self.plans.setdefault(max(self.looks + 1, round(seconds / LOOK)), []).append((what, args))

    def arrive(self, to, run, call, *args, delay=None):
        """Delivers a message after `delay` checks of the clock. By default, the delay is random and
        may differ between two groups of recipients."""
        if delay is not None:
            self.under_way.setdefault(self.looks + delay, []).append((to, run, call, args))
            return
        n = len(DELAYS)  # one random number for all choices, because most of the time is spent here
        x = int(self.random.random() * (len(to) + 1) * n * n)
        middle, x = divmod(x, n * n)
        for part, looks in ((to[:middle], DELAYS[x // n]), (to[middle:], DELAYS[x % n])):
            if part:
                when = self.looks + looks
                self.under_way.setdefault(when, []).append((part, run, call, args))

    def die(self, r, part=1.0):
        """Kills a rank before it can announce its own end. Only the fraction `part` of the
        recipients gets its last messages."""
        watch, run = self.watches.pop(r, None), self.run_of[r]
        self.sleeping.discard(r)
        if watch is None:
            return
        for call, args in self.inbox[r]:
            call(watch, *args, self.now)
        watch.tick(self.now)
        for to, message in watch.out:
            reached = self.random.sample(to, round(part * len(to)))
            self.arrive(reached, run, "receive", r, message)
        # The connections close after the rank's messages have arrived.
        self.arrive([x for x in range(self.n) if x != r], run, "closed", r, delay=max(DELAYS))

    def begin_again(self, r):
        if r not in self.watches:
            self.run_of[r] += 1
            self.watches[r], self.inbox[r] = self.fresh(r), []

    def sleep(self, r, seconds):
        if r in self.watches:
            self.sleeping.add(r)
            self.at(self.now + seconds, self.sleeping.discard, r)

    def fail(self, r):
        if r in self.watches:
            self.inbox[r].append((Watch.fail, ("failed: no memory",)))

    def step(self):
        self.looks += 1
        for what, args in self.plans.pop(self.looks, ()):
            what(*args)
        for to, run, name, args in self.under_way.pop(self.looks, ()):
            message = getattr(Watch, name), args
            for r in to:
                if self.run_of[r] == run:
                    self.inbox[r].append(message)
        now, shot = self.now, []
        for r, watch in self.watches.items():
            if r in self.sleeping or (watch.decided is not None and not self.inbox[r]):
                continue
            for call, args in self.inbox[r]:
                call(watch, *args, now)
            self.inbox[r] = []
            before = watch.decided
            watch.tick(now)
            if before is None and watch.decided is not None and len(shot) < self.to_be_shot:
                shot.append(r)
            elif watch.out:
                run = self.run_of[r]
                for to, message in watch.out:
                    self.arrive(to, run, "receive", r, message)
                watch.out = []

        for r in shot:
            self.to_be_shot -= 1
            self.shot.add(r)
            self.die(r, self.random.choice([0.0, 0.02, 0.1, 0.5]))

    def until_all_have_decided(self, seconds):
        """Runs until every live rank has decided, and returns the elapsed seconds."""
        while self.plans or any(watch.decided is None for watch in self.watches.values()):
            assert self.now < seconds, "a rank waits forever"
            self.step()
        return self.now


def schedule(seed):
    """Creates a world in which up to three ranks die (some while sending), sleep, fail or restart.
    Returns the world, the affected ranks, and the ranks that sleep."""
    world = World(RANKS, seed)
    pick = world.random
    victims = pick.sample(range(RANKS), pick.choice([1, 1, 2, 3]))
    if pick.random() < 0.3:
        victims[0] = 0
    at, slept = pick.uniform(0, 3), set()
    # At least one judge always survives. Otherwise agreement could not be guaranteed.
    world.to_be_shot = min(
        pick.choice([0, 0, 1, 2]), JUDGES - 1 - sum(r <= JUDGES for r in victims)
    )
    for i, r in enumerate(victims):
        kind = pick.choice([*["die"] * 6, *["fail"] * 4, "sleep", *["nap"][:i]])
        if kind == "die":
            world.at(at, world.die, r, pick.choice([1.0, pick.random()]))
            if pick.random() < 0.5:
                world.at(at + pick.uniform(0.5, 6), world.begin_again, r)
        elif kind == "fail":
            world.at(at, world.fail, r)
        else:
            world.at(at, world.sleep, r, PATIENCE + BEAT + 4 if kind == "sleep" else 2.0)
            slept.add(r)
        at += pick.choice([0, 0.5, 1.0, SETTLE, 3.0])
    return world, victims, slept


def test_all_name_the_same_rank_in_five_hundred_schedules():
    for seed in range(500):
        world, victims, slept = schedule(seed)
        world.until_all_have_decided(60)
        named = {
            watch.decided.rank
            for r, watch in world.watches.items()
            if world.run_of[r] == 0 and r not in slept
        }
        assert len(named) == 1 and named <= {*victims, *world.shot}, (seed, named, victims)
        for r in slept & world.watches.keys():  # a rank that slept blames no healthy rank
            assert world.run_of[r] or world.watches[r].decided.rank in {*victims, *world.shot}


def two(patience=5.0):
    return [Watch(r, 2, 0.0, patience=patience, settle=1.0, beat=1.0) for r in range(2)]


def test_a_rank_is_lost_when_it_has_said_nothing_for_so_long():
    one, _ = two()
    for now in range(1, 8):
        one.tick(now)
    assert one.decided is None
    one.tick(8.0)
    assert one.decided == Lost(1, "silent", "has not answered for 5 s")


def test_who_slept_blames_nobody_before_it_has_heard_them():
    one, _ = two()
    one.tick(1.0)
    one.tick(60.0)
    one.receive(1, {"at": 3}, 60.1)
    one.tick(62.0)
    assert one.decided is None and not one.lost and one.at[1] == 3


def test_a_rank_that_has_left_is_missed_by_one_that_waits_for_it_only():
    for waits in (False, True):
        one, other = two()
        other.leave()
        ((to, message),) = other.out
        assert to == [0]
        one.receive(1, message, 1.0)
        one.closed(1, 1.1)
        one.waits = waits
        for now in range(2, 9):
            one.tick(now)
        assert one.decided == (Lost(1, "ended", "has left the run") if waits else None)


def test_a_failure_counts_more_than_what_it_does_to_others():
    watches = [Watch(r, 4, 0.0, patience=5.0, settle=1.0, beat=9.0) for r in range(4)]
    watches[2].closed(1, 0.1)
    watches[3].fail("failed: no memory", 0.2)
    for sender in (2, 3):
        for to, message in watches[sender].out:
            for r in to:
                watches[r].receive(sender, message, 0.3)
    watches[0].tick(2.0)
    assert watches[0].decided == Lost(3, "failed", "failed: no memory")
