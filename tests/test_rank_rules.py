"""Tests the rules for ranks without starting processes: each rank's share of a step, the number of
micro-batches, and errors that name a rank."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from lib.runs import config_of
from mlx_segtrain.commands.main import main
from mlx_segtrain.errors import InputError, NoRoom, RunError
from mlx_segtrain.training import links, ranks, setup, transfers
from mlx_segtrain.training.checkpoint import Checkpoint
from mlx_segtrain.training.diagnosis import together
from mlx_segtrain.training.links import Links
from mlx_segtrain.training.ranks import ALONE, LAUNCH, Diverged, Ranks
from mlx_segtrain.training.setup import accumulating
from mlx_segtrain.training.state import Progress


def group(n, rank=0, others=()):
    """Returns one of n ranks, whose `gather` returns its own value followed by `others`."""
    own = Ranks(rank, n, names=[f"process {i} on box{i}" for i in range(n)])
    own.gather = lambda value: [value, *others]
    return own


def resumed(tmp_path, count, n):
    record = {"config": {"grad_accumulation_steps": count}, "ranks": n}
    return Checkpoint(tmp_path, {}, 5, Progress(), record, 0, False)


def test_a_step_has_a_batch_for_every_rank(tmp_path):
    plain, told = config_of("m", "d", tmp_path), []

    def count(config, n, checkpoint=None):
        own = accumulating(config, Ranks(size=n), checkpoint, told.append)
        return own.grad_accumulation_steps

    assert count(plain, 1) == 1 and not told
    assert count(plain, 3) == 3
    assert told.pop()["message"].startswith("grad_accumulation_steps is 3")
    given = config_of("m", "d", tmp_path, grad_accumulation_steps=4)
    assert count(given, 4) == 4 and count(given, 1) == 4
    # A resumed run keeps the recorded number, regardless of the number of ranks.
    assert count(plain, 3, resumed(tmp_path, 4, 2)) == 4
    assert count(plain, 1, resumed(tmp_path, 4, 2)) == 4
    assert count(plain, 1, resumed(tmp_path, 4, 1)) == 1  # refused later, like any other change
    assert not told
    with pytest.raises(
        InputError,
        match=r"= 4, but there are 5 ranks.*at most 4 ranks, or raise grad_accumulation_steps",
    ):
        count(given, 5)
    with pytest.raises(InputError, match=r"= 2, but there are 3 ranks.*start a new run"):
        count(plain, 3, resumed(tmp_path, 2, 2))


def test_ranks_divide_the_prompts_of_a_step(tmp_path, monkeypatch):
    prompts = config_of("m", "d", tmp_path, method="grpo", batch_size=5, max_completion_tokens=9)
    own = accumulating(prompts, Ranks(size=5), None, pytest.fail)
    assert (own.batch_size, own.grad_accumulation_steps) == (5, 1)
    with pytest.raises(
        InputError, match=r"batch_size = 5, but there are 6 ranks.*a prompt in.*at most 5 ranks, or"
    ):
        accumulating(prompts, Ranks(size=6), None, pytest.fail)
    # The rank with the least memory determines how many completions each rank generates at a time.
    monkeypatch.setattr(setup, "rollouts_at_once", lambda config, tokens, every: every)
    assert setup.with_rollouts(prompts, 50, None, Ranks()).rollout_batch == 5 * 8
    ranks, asked = Ranks(rank=1, size=2), []
    ranks.gather = lambda own: asked.append(own) or ([None, own] if own is None else [7, own])
    assert setup.with_rollouts(prompts, 50, None, ranks).rollout_batch == 7
    assert asked == [None, 3 * 8]
    ranks.gather = lambda own: [11, own]  # rank 0 has found the number recorded by an earlier run
    assert setup.with_rollouts(prompts, 50, None, ranks).rollout_batch == 11
    with pytest.raises(
        InputError, match=r"parallel has no effect with method grpo, .* whole model"
    ):
        config_of("m", "d", tmp_path, method="grpo", max_completion_tokens=9, parallel="pipeline")


def test_a_pipeline_that_is_filled_badly_is_warned_of(tmp_path):
    def told(count, rank=0):
        found = []
        config = config_of("m", "d", tmp_path, grad_accumulation_steps=count)
        accumulating(config, Ranks(rank, 2, pipeline=True), None, found.append)
        return [own["message"] for own in found if own["type"] == "warning"]

    (said,) = told(3)
    assert "= 3 is too low for a pipeline of 2 ranks" in said and "75% of the time" in said
    assert not told(4) and not told(3, rank=1)


def test_a_pipeline_of_one_rank_without_room_says_what_it_needs(monkeypatch, tmp_path):
    def first(*args, **how):
        raise NoRoom("it needs 9 GB.")

    monkeypatch.setattr(setup, "first_that_fits", first)
    objective = SimpleNamespace(choices=lambda data: iter([data]))
    objective.batch_shapes = lambda data, rows: []
    monkeypatch.setattr(setup, "objective_of", lambda config: objective)
    for parallel, more in (("data", False), ("pipeline", True)):
        config = config_of("m", "d", tmp_path, parallel=parallel)
        with pytest.raises(NoRoom) as found:
            setup.prepare(SimpleNamespace(config=config, train="rows"), lambda event: None)
        assert ("mlx.launch -n N" in str(found.value)) == more


def test_a_pipeline_is_planned_for_several_ranks(capsys):
    assert main(["plan", "--model", "nowhere", "--parallel", "pipeline"]) == 2
    assert "add --ranks N" in capsys.readouterr().err


def test_every_batch_is_some_ranks():
    for n in (1, 2, 3, 4):
        shares = [Ranks(rank, n).share(list(range(7))) for rank in range(n)]
        assert sorted(x for own in shares for x in own) == list(range(7))
        assert all(own[0] == rank for rank, own in enumerate(shares))
        every = Ranks(0, n)
        every.gather = lambda own, shares=shares: shares
        assert every.unshared(shares[0]) == list(range(7))


def test_other_inputs_are_named_with_rank_and_field():
    same = {"rank": 8, "data/train.jsonl": "ab"}
    group(2, others=[same]).check_same(same)
    for other, said in (
        ({**same, "rank": 4}, "rank is 4 on rank 1 (process 1 on box1), but 8 on rank 0"),
        ({"rank": 8}, "data/train.jsonl is None on rank 1"),
        ({**same, "data/valid.jsonl": "cd"}, "data/valid.jsonl is cd on rank 1"),
    ):
        with pytest.raises(RunError) as found:
            group(2, others=[other]).check_same(same)
        assert str(found.value).startswith(said)


def test_a_rank_with_other_factors_is_named():
    group(3, others=["a", "a"]).check_factors(5, "a")
    for others, named in ((["a", "b"], 2), (["b", "b"], 0), (["b"], 1)):
        said = rf"step 5: the factors of rank {named} \(process {named} on box"
        with pytest.raises(Diverged, match=said):
            group(len(others) + 1, others=others).check_factors(5, "a")


@pytest.mark.parametrize("piece", [8, 1 << 28])
def test_contents_are_added_up_in_pieces(piece, monkeypatch):
    monkeypatch.setattr(ranks, "PIECE", piece, raising=False)
    contents = [b"rank 0", b"", bytes(range(1, 30))]
    barrier, asked, found = threading.Barrier(3), [[], [], []], {}

    def summed(self, x):
        asked[self.rank] = np.array(x)
        barrier.wait(20)
        total = mx.array(sum(asked))
        assert x.nbytes <= max(24, piece)
        barrier.wait(20)
        return total

    monkeypatch.setattr(Ranks, "_sum", summed)

    def rank(r):
        found[r] = Ranks(r, 3).every(contents[r])

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    for own in threads:
        own.start()
    for own in threads:
        own.join(60)
    assert found == {r: contents for r in range(3)}


def test_lengths_above_two_gigabytes_are_told(monkeypatch):
    """Simulates one of three ranks. Its content claims a length of 3 GiB, but is not that large."""

    class Long(bytes):
        def __len__(self):
            return 3 << 30

    def summed(self, x):
        told = np.array(x).view(np.int64)
        assert told.tolist() == [0, 3 << 30, 0]
        raise RunError("told")

    monkeypatch.setattr(Ranks, "_sum", summed)
    with pytest.raises(RunError, match="told"):
        Ranks(1, 3).every(Long())


def test_what_one_rank_saw_going_through_a_row_is_told():
    everywhere = (["a:1"], "the gradient of x"), (["a:2"], "the gradient of x")
    assert together(everywhere) == (["a:1", "a:2"], "the gradient of x")
    assert together([(["a:1"], None), (["a:2"], "h after layer 1")]) == (
        ["a:2"],
        "h after layer 1",
    )


@pytest.mark.parametrize(
    ("set_by_the_launcher", "found"),
    [
        ({}, None),
        ({"MLX_RANK": "1"}, None),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": ""}, None),  # a single host
        ({"MLX_RANK": "1", "MLX_HOSTFILE": '[["10.0.0.1:5"], ["10.0.0.2:5"]]'}, "ring"),
        ({"MLX_RANK": "1", "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "2"}, "nccl"),
        ({"MLX_RANK": "0", "NCCL_HOST_IP": "10.0.0.1", "MLX_WORLD_SIZE": "1"}, None),
        ({"MLX_RANK": "1", "MLX_IBV_DEVICES": "f", "MLX_JACCL_COORDINATOR": "10.0.0.1:5"}, "jaccl"),
    ],
)
def test_the_launcher_is_known_by_what_it_sets(set_by_the_launcher, found, monkeypatch, tmp_path):
    for name in (*LAUNCH, "NCCL_HOST_IP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_the_launcher.items():
        if name == "MLX_HOSTFILE":
            (tmp_path / "hosts").write_text(value)
            value = str(tmp_path / "hosts")
        monkeypatch.setenv(name, value)
    assert ranks._backend() == found
    assert ranks.launched() == (found and int(set_by_the_launcher["MLX_RANK"]))
    if found == "ring":
        assert ranks.address_of(Ranks(1, 2, "ring")) == "10.0.0.2"
    if found is None:
        with ranks.joined(print) as own:
            assert own is ALONE


def test_the_ring_is_hung_up_and_nothing_else():
    """All sockets of the ring are closed. Other sockets, such as that of a tracker, stay open."""
    server = socket.create_server(("127.0.0.1", 0))
    ring = socket.create_connection(server.getsockname())
    peer, _ = server.accept()
    pair = socket.socketpair()
    before = len(os.listdir("/dev/fd"))
    ranks._hang_up([[f"127.0.0.1:{server.getsockname()[1]}"]])
    assert peer.recv(1) == b""
    pair[0].send(b"x")
    assert pair[1].recv(1) == b"x"
    assert len(os.listdir("/dev/fd")) == before
    for own in (server, ring, peer, *pair):
        own.close()


def test_a_state_that_is_written_is_not_broken_off(monkeypatch):
    monkeypatch.setattr(ranks, "SECOND", 0.01)
    monkeypatch.setattr(ranks, "TO_END", 0.05)
    ended, over = threading.Event(), threading.Event()
    monkeypatch.setattr(ranks.os, "_exit", lambda code: (ended.set(), over.set()))
    own = Ranks(0, 2, saving=True, links=SimpleNamespace(lost=SimpleNamespace(rank=1, why="died")))
    thread = threading.Thread(target=ranks._end_in_time, args=(own, over))
    thread.start()
    assert not ended.wait(0.3)
    own.saving = False
    assert ended.wait(10)
    thread.join()


#: A communication backend that waits for a lost rank while holding the GIL, which blocks all other
#: Python threads.
LOCKED = """
import ctypes, threading
from types import SimpleNamespace
from mlx_segtrain.training import ranks
ranks.SECOND, ranks.STUCK = 0.05, 1.0
links = SimpleNamespace(lost=SimpleNamespace(rank=1, why="does not answer"))
own = ranks.Ranks(0, 2, links=links)
threading.Thread(target=ranks._end_in_time, args=(own, threading.Event()), daemon=True).start()
threading.Event().wait(0.5)
ctypes.PyDLL(None).sleep(60)
print("left alone")
"""


def test_a_back_end_that_keeps_the_lock_does_not_keep_the_process():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True)
    assert done.returncode == 1 and "left alone" not in done.stdout, done
    assert time.monotonic() - began < 50 and "Timeout" in done.stderr


def test_messages_use_the_ring(monkeypatch):
    """With JACCL, messages use the ring, because JACCL mixes up messages that are sent in both
    directions at the same time."""
    monkeypatch.setattr(transfers, "ring_of", lambda ranks: "ring")
    found = [
        transfers.transfers_of(Ranks(0, n, backend, group="its own"))
        for n, backend in ((2, "ring"), (2, "jaccl"), (3, "jaccl"), (3, "nccl"), (2, "nccl"))
    ]
    assert [own.group for own in found] == ["its own", "ring", "ring", "ring", "its own"]
    assert [isinstance(own, transfers.Sums) for own in found] == [False] * 4 + [True]


def test_what_is_on_its_way_arrives_before_a_sum(monkeypatch):
    own, order = Ranks(0, 2, "ring"), []
    sent = transfers.transfers_of(own)
    monkeypatch.setattr(sent, "sent", deque([[mx.ones((1,))]]))
    monkeypatch.setattr(own, "wait_for", lambda arrays: order.append(len(sent.sent)))
    monkeypatch.setattr(
        mx.distributed, "all_sum", lambda x, group, stream: order.append("sum") or x
    )
    own._sum(mx.ones((2,)))
    assert order == [0, "sum", 0]


def test_runs_of_a_process_share_a_ring_that_is_waited_for_so_long(monkeypatch, capsys):
    armed, made = [], []

    def init(strict, backend):
        assert armed == [(transfers.CONNECT, True)]
        made.append(json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text()))
        return "group"

    timer = SimpleNamespace(
        dump_traceback_later=lambda seconds, exit: armed.append((seconds, exit)),
        cancel_dump_traceback_later=armed.clear,
    )
    monkeypatch.setattr(transfers, "faulthandler", timer)
    monkeypatch.setattr(ranks, "faulthandler", timer)
    monkeypatch.setattr(transfers, "_ring", None, raising=False)
    monkeypatch.setattr(transfers, "address_of", lambda ranks: "127.0.0.1")
    monkeypatch.setattr(mx.distributed, "init", init)
    first, second = (group(3, others=["10.0.0.2:5", "10.0.0.3:6"]) for _ in range(2))
    assert transfers.ring_of(first) == transfers.ring_of(second) == "group"
    assert made == [first.ring] and first.ring == second.ring and not armed
    said = capsys.readouterr().err
    assert "rank 1 at 10.0.0.2:5, rank 2 at 10.0.0.3:6" in said and "within 60 s" in said


def test_who_greets_slowly_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(links, "TO_GREET", 0.2)
    server = socket.create_server(("127.0.0.1", 0))
    at = server.getsockname()
    own = SimpleNamespace(_secret=b"secret", _sockets={})
    stranger = socket.create_connection(at)
    stop = threading.Event()

    def drip():
        while not stop.wait(0.05):
            try:
                stranger.send(b"x")
            except OSError:
                return

    threads = [threading.Thread(target=drip)]
    threads[0].start()
    rank = socket.create_connection(at)
    rank.sendall(b"1 secret\n")
    begin = time.monotonic()
    Links._accept(own, server, {1})
    assert time.monotonic() - begin < 3 and 1 in own._sockets
    stop.set()
    threads[0].join()
    for made in (server, stranger, rank, own._sockets[1]):
        made.close()


def test_all_ranks_run_pairs_as_the_one_with_least_memory_can(monkeypatch, tmp_path):
    """All ranks must choose the same way to run pairs, because this choice affects the order of
    rows."""
    choices, asked = ["shared", "apart"], []

    def first(config, found, shapes, **how):
        asked.append(found)
        raise_at = len(asked) == 2
        if raise_at:
            raise RunError("planned again")
        return found[0], "plan"

    monkeypatch.setattr(setup, "first_that_fits", first)
    objective = SimpleNamespace(choices=lambda data: iter(choices), batch_shapes=None)
    objective.batch_shapes = lambda data, rows: []
    monkeypatch.setattr(setup, "objective_of", lambda config: objective)
    inputs = SimpleNamespace(config=config_of("m", "d", tmp_path), train="rows")
    with pytest.raises(RunError, match="planned again"):
        setup.prepare(inputs, lambda event: None, ranks=group(2, others=[1]))
    assert asked == [choices, ["apart"]]
