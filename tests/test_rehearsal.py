"""How long a loop takes, from given times of its first units; and which loops a rehearsal leaves."""

import pytest

from mucs_cli.rehearsal import Enough, Loop, Pace, StagePlan, rehearsing
from mucs_cli.runtime import Progress


def test_the_first_units_count_as_they_were_and_the_others_by_the_pace_of_those_after_them() -> None:
    pace = Pace(left=100, setups=0, started=50.0)
    pace.advance(4, 0.0, 60.0)  # ten seconds for four
    for now in (61.0, 62.0, 63.0):
        pace.advance(2, 0.0, now)  # then two a second
    assert pace.predicted(63.0) == pytest.approx(10 + (100 - 4) / 2)


def test_of_one_step_alone_the_whole_follows_from_that() -> None:
    pace = Pace(left=30, setups=0, started=0.0)
    pace.advance(10, 0.0, 7.0)
    assert pace.predicted(7.0) == pytest.approx(21.0)


def test_a_part_of_a_unit_stands_for_the_whole() -> None:
    pace = Pace(left=8, setups=0, started=0.0)
    assert pace.predicted(5.0) is None
    pace.advance(0, 0.25, 5.0)
    assert pace.predicted(5.0) == pytest.approx(8 * 20.0)
    pace.advance(1, 0.0, 21.0)
    pace.advance(0, 0.5, 30.0)
    assert pace.predicted(30.0) == pytest.approx(8 * 20.0)


def test_setups_are_counted_by_themselves() -> None:
    pace = Pace(left=40, setups=4, started=0.0)
    pace.set_up(3.0)
    for now in (4.0, 5.0, 6.0):
        pace.advance(1, 0.0, now)  # a second each
    pace.set_up(5.0)
    pace.advance(1, 0.0, 12.0)
    assert pace.predicted(12.0) == pytest.approx(4 * 4.0 + 40 * 1.0)


def test_of_a_loop_that_ended_the_prediction_is_the_time_it_took() -> None:
    pace = Pace(left=6, setups=2, started=0.0)
    pace.set_up(1.0)
    pace.advance(1, 0.0, 5.0)
    pace.advance(2, 0.0, 6.0)
    pace.set_up(2.0)
    pace.advance(3, 0.0, 11.0)
    assert pace.predicted(11.0) == pytest.approx(11.0)


def count(progress: Progress, units: int) -> int:
    """Units that a loop gets through."""
    done = 0
    with progress:
        for _ in range(units):
            done += 1
            progress.advance()
    return done


def test_a_rehearsal_leaves_the_loops_that_may_be_left_and_no_others() -> None:
    assert count(Progress("before", 5, "units", leave_after=0.0), 5) == 5
    with rehearsing() as rehearsal:
        assert count(Progress("whole", 5, "units"), 5) == 5
        assert count(Progress("left", 9, "units", 3, leave_after=0.0), 6) == 1
        assert count(Progress("one", 1, "units", leave_after=0.0), 1) == 1
    assert count(Progress("after", 5, "units", leave_after=0.0), 5) == 5
    left, one = rehearsal.loops
    assert (left.title, left.total, left.finished, left.rehearsed, left.left, left.is_cut) == ("left", 9, 3, 1, 6, True)
    assert (one.rehearsed, one.is_cut) == (1, False)
    assert left.seconds == pytest.approx(6 * left.spent, rel=0.5)


def test_an_error_in_a_rehearsed_loop_is_no_end_of_it() -> None:
    with rehearsing() as rehearsal, pytest.raises(ZeroDivisionError), Progress("left", 2, "units", leave_after=0.0):
        raise ZeroDivisionError
    assert rehearsal.loops == []
    assert not isinstance(Enough(), Exception)  # what catches errors lets it pass


def test_a_stage_takes_its_loops_and_the_rest_without_what_is_unknown() -> None:
    known, unknown = Loop("a", "units", 4, 1, 3, 2.0, 5.0), Loop("b", "units", 4, 0)
    plan = StagePlan("score", [known], other_seconds=1.5)
    assert (plan.seconds, plan.is_known, plan.is_cut) == (6.5, True, False)
    plan = StagePlan("score", [known, unknown], other_seconds=1.5)
    assert (plan.seconds, plan.is_known, plan.is_cut) == (6.5, False, True)
