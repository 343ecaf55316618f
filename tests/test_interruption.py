"""Signals as exceptions: once, at the end of what belongs together, and saved on the way out."""

import os
import signal
from collections.abc import Iterator

import pytest

from mucs_cli import interruption
from mucs_cli.interruption import INTERRUPTIONS, Terminated, handled, held_back, saving

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture(autouse=True)
def unchanged_handlers() -> Iterator[None]:
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = [signal.getsignal(number) for number in RAISED]
    yield
    assert [signal.getsignal(number) for number in RAISED] == before
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_raises_where_the_command_is(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(RAISED[number]), handled():
        reached.append(1)
        signal.raise_signal(number)
        reached.append(2)
    assert reached == [1]


def test_what_belongs_together_ends_first() -> None:
    reached = []
    with pytest.raises(Terminated), handled():
        with held_back():
            with held_back():
                signal.raise_signal(signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")
        reached.append("after")
    assert reached == ["inner", "outer"]


def test_a_signal_that_a_launcher_passes_on_is_the_same_one() -> None:
    saved = []
    with (
        pytest.raises(KeyboardInterrupt),
        handled(),
        saving(lambda: (signal.raise_signal(signal.SIGTERM), saved.append(1))),
    ):
        signal.raise_signal(signal.SIGINT)
    assert saved == [1]


def test_a_later_signal_ends_the_process_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(interruption, "SAME_SECONDS", -1.0)
    with pytest.raises(SystemExit) as left, handled(), saving(lambda: signal.raise_signal(signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert capfd.readouterr().err == "mucs: ended without waiting for what was being saved\n"


def test_a_signal_of_an_earlier_command_is_forgotten() -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), handled():
            signal.raise_signal(signal.SIGINT)
    with handled(), held_back():
        pass


def test_an_interrupt_that_a_shell_has_turned_off_stays_off() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_interruptions_are_saved() -> None:
    saved = []
    for error in (*INTERRUPTIONS, ValueError):
        with pytest.raises(error), saving(lambda: saved.append(error)):  # noqa: B023
            raise error
    with saving(lambda: saved.append("end")):
        pass
    assert saved == list(INTERRUPTIONS)
