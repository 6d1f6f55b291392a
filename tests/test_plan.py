"""Tests the exact sequence of moves in a plan."""

import pytest

from mlx_segtrain._core import StageSpec, make_plan
from mlx_segtrain.schedule import Cuts


def chain(n, trainable=None):
    return [
        StageSpec(chr(97 + i), ["h"], ["h"], trainable is None or i in trainable) for i in range(n)
    ]


def moves(stages, size, inputs=("h",), head=("h",), cuts=None):
    cuts = cuts or Cuts.every(len(stages), size)
    how = list(cuts.segments), list(cuts.groups), list(cuts.saves)
    return make_plan(stages, list(inputs), list(head), *how, offloaded=cuts.offloaded).describe()


def test_one_stage_a_segment():
    assert moves(chain(3), 1) == [
        "forward 0:1 reads h@input; keeps h@a",
        "forward 1:2 reads h@a; keeps h@b",
        "head 2:3 reads h@b; gives h@b; drops h@b",
        "backward 1:2 reads h@a; takes h@b; gives h@a; drops h@a",
        "backward 0:1 reads h@input; takes h@a; drops h@input",
    ]


def test_a_short_last_segment():
    assert moves(chain(5), 2) == [
        "forward 0:2 reads h@input; keeps h@b",
        "forward 2:4 reads h@b; keeps h@d",
        "head 4:5 reads h@d; gives h@d; drops h@d",
        "backward 2:4 reads h@b; takes h@d; gives h@b; drops h@b",
        "backward 0:2 reads h@input; takes h@b; drops h@input",
    ]


@pytest.mark.parametrize("size", [0, 3, 100])
def test_everything_kept(size):
    assert moves(chain(3), size) == ["head 0:3 reads h@input; drops h@input"]


def test_stages_below_the_first_parameter_run_forward_only_and_are_dropped_at_once():
    assert moves(chain(4, trainable={2}), 1) == [
        "forward 0:1 reads h@input; keeps h@a; drops h@input",
        "forward 1:2 reads h@a; keeps h@b; drops h@a",
        "forward 2:3 reads h@b; keeps h@c",
        "head 3:4 reads h@c; gives h@c; drops h@c",
        "backward 2:3 reads h@b; takes h@c; drops h@b",
    ]


def test_a_value_that_later_stages_read_is_kept_until_the_first_of_them_went_back():
    """kv acts like shared keys and values: b writes it, and c and d read it."""
    stages = [
        StageSpec("a", ["h"], ["h"], True),
        StageSpec("b", ["h"], ["h", "kv"], True),
        StageSpec("c", ["h", "kv"], ["h"], True),
        StageSpec("d", ["h", "kv"], ["h"], True),
    ]
    assert moves(stages, 1) == [
        "forward 0:1 reads h@input; keeps h@a",
        "forward 1:2 reads h@a; keeps h@b, kv@b",
        "forward 2:3 reads h@b, kv@b; keeps h@c",
        "head 3:4 reads h@c, kv@b; gives h@c, kv@b; drops h@c",
        "backward 2:3 reads h@b, kv@b; takes h@c; gives h@b, kv@b; drops h@b, kv@b",
        "backward 1:2 reads h@a; takes h@b, kv@b; gives h@a; drops h@a",
        "backward 0:1 reads h@input; takes h@a; drops h@input",
    ]
    # kv is kept only if a reader is in a later segment than b.
    assert moves(stages, 2)[0] == "forward 0:2 reads h@input; keeps h@b, kv@b"
    assert moves(stages, 4) == ["head 0:4 reads h@input; drops h@input"]


def test_what_is_not_needed_soon_waits_in_host_memory():
    """The copies of h@a and of what stage 0 saves come back one move before they are read. h@b is
    needed again three moves after its last use, so it stays."""
    cuts = Cuts((1, 2, 3, 4), (1, 2, 3, 4), saves=(0,), offloaded=4)
    assert moves(chain(4), 0, cuts=cuts) == [
        "forward 0:1 reads h@input; keeps h@a; saves in 0; offloads h@a; offloads the saves of 0",
        "forward 1:2 reads h@a; keeps h@b; frees h@a",
        "forward 2:3 reads h@b; keeps h@c",
        "head 3:4 reads h@c; gives h@c; drops h@c",
        "backward 2:3 reads h@b; takes h@c; gives h@b; drops h@b",
        "backward 1:2 reads h@a; takes h@b; gives h@a; drops h@a; fetches h@a",
        "backward 0:1 reads h@input; takes h@a; drops h@input; fetches the saves of 0",
    ]


def test_a_group_is_run_forward_again_before_it_goes_back():
    assert moves(chain(5), 0, cuts=Cuts((1, 2, 3, 4, 5), (3, 5))) == [
        "forward 0:3 reads h@input; keeps h@c",
        "forward 3:4 reads h@c; keeps h@d",
        "head 4:5 reads h@d; gives h@d; drops h@d",
        "backward 3:4 reads h@c; takes h@d; gives h@c; drops h@c",
        "forward 0:1 reads h@input; keeps h@a",
        "forward 1:2 reads h@a; keeps h@b",
        "backward 2:3 reads h@b; takes h@c; gives h@b; drops h@b",
        "backward 1:2 reads h@a; takes h@b; gives h@a; drops h@a",
        "backward 0:1 reads h@input; takes h@a; drops h@input",
    ]


def test_what_a_group_shares_inside_and_with_later_ones_is_made_again_for_itself():
    stages = [
        StageSpec("a", ["h"], ["h", "kv"], True),
        StageSpec("b", ["h", "kv"], ["h"], True),
        StageSpec("c", ["h", "kv"], ["h"], True),
        StageSpec("d", ["h"], ["h"], True),
    ]
    assert moves(stages, 0, cuts=Cuts((1, 2, 3, 4), (2, 4))) == [
        "forward 0:2 reads h@input; keeps h@b, kv@a",
        "forward 2:3 reads h@b, kv@a; keeps h@c",
        "head 3:4 reads h@c; gives h@c; drops h@c",
        "backward 2:3 reads h@b, kv@a; takes h@c; gives h@b, kv@a; drops h@b, kv@a",
        "forward 0:1 reads h@input; keeps h@a, kv@a",
        "backward 1:2 reads h@a, kv@a; takes h@b; gives h@a, kv@a; drops h@a, kv@a",
        "backward 0:1 reads h@input; takes h@a, kv@a; drops h@input",
    ]


def test_the_head_reads_inputs_and_values_of_earlier_segments():
    stages = [StageSpec("a", ["h"], ["h", "aux"], True), StageSpec("b", ["h"], ["h"], False)]
    assert moves(stages, 1, inputs=["h", "targets"], head=["h", "targets", "aux"]) == [
        "forward 0:1 reads h@input; keeps h@a, aux@a",
        "head 1:2 reads h@a, targets@input, aux@a; gives h@a, aux@a; "
        "drops h@a, targets@input, aux@a",
        "backward 0:1 reads h@input; takes h@a, aux@a; drops h@input",
    ]


def test_a_plan_resolves_names_and_counts_their_readers():
    """`plan.readers` treats the head as an additional stage after the last one."""
    stages = [StageSpec("a", ["h"], ["h", "kv"], True), StageSpec("b", ["h", "kv"], ["h"], True)]
    plan = make_plan(stages, ["h"], ["h", "kv"], [2], [1])
    assert [(stage.reads, stage.writes) for stage in plan.stages] == [([0], [1, 2]), ([1, 2], [3])]
    assert plan.head_reads == [3, 2]
    assert [plan.readers(value, 0, 3) for value in range(4)] == [1, 1, 2, 1]
    assert [plan.readers(2, *stages) for stages in ((0, 1), (1, 2), (2, 3))] == [0, 1, 1]


def test_errors():
    with pytest.raises(ValueError, match="b reads 'kv', which is neither an input nor written"):
        make_plan([chain(1)[0], StageSpec("b", ["h", "kv"], ["h"], True)], ["h"], ["h"], [2], [1])
    with pytest.raises(ValueError, match="the head reads 'x'"):
        make_plan(chain(1), ["h"], ["x"], [1], [1])
    with pytest.raises(ValueError, match="segment_size must be 0"):
        Cuts.every(1, -1)
    with pytest.raises(ValueError, match="at least one stage"):
        make_plan([], ["h"], ["h"], [], [])
    for segments, groups in ([2, 2, 3], [3]), ([1, 4], [2]), ([], []), ([1, 3], [1]), ([3], [0, 1]):
        with pytest.raises(ValueError, match="must be ascending and end with"):
            make_plan(chain(3), ["h"], ["h"], segments, groups)
