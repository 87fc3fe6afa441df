"""A lane does every job once, in order, a bounded number behind, and loses no error."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pipeline.lanes import Lane


def test_jobs_are_done_in_order_and_give_their_results() -> None:
    done: list[int] = []

    def job(number: int) -> int:
        done.append(number)
        return number * number

    with Lane() as lane:
        futures = [lane.do(job, number) for number in range(100)]
        lane.finish()
        assert done == list(range(100))
    assert [future.result() for future in futures] == [number**2 for number in range(100)]


def test_a_caller_is_at_most_two_jobs_ahead() -> None:
    gate, asked = threading.Event(), threading.Event()
    with Lane() as lane:
        lane.do(gate.wait)
        lane.do(gate.wait)

        def third() -> None:
            asked.set()
            lane.do(gate.wait)

        caller = threading.Thread(target=third)
        caller.start()
        assert asked.wait(10)
        caller.join(0.1)
        assert caller.is_alive()  # the first job is not done
        gate.set()
        caller.join(10)
        assert not caller.is_alive()
        lane.finish()


def _fail() -> None:
    raise OSError("no")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_error_comes_out(after: int) -> None:
    def run(lane: Lane) -> None:
        lane.do(_fail)
        for _ in range(after):
            lane.do(int)
        lane.finish()

    with pytest.raises(OSError, match="no"), Lane() as lane:
        run(lane)


def test_an_error_of_the_caller_ends_the_thread() -> None:
    before = threading.active_count()
    ran: list[int] = []

    def fail(then: Callable[[], object]) -> None:
        then()
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), Lane() as lane:
        fail(lambda: lane.do(ran.append, 1))
    assert threading.active_count() == before
