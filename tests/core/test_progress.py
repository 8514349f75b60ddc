"""The one progress bar, on a terminal and without one."""

import sys

import pytest

from instructblip.core.progress import progress_bar


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_on_a_terminal_only(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("training", fields=("loss", "samples/s")) as bar:
        assert bar.shown == terminal
        bar(3, 10)
        bar(4, 10, **{"loss": "2.5", "samples/s": "31"})
        bar.advance(1, 10)
        bar.print("step [4] of 10")
    printed = capsys.readouterr()
    if terminal:
        assert "training" in printed.err
        assert "loss 2.5" in printed.err
        assert "samples/s 31" in printed.err
        assert "step [4] of 10" in printed.err
    else:
        assert printed.err == ""
        assert printed.out == "step [4] of 10\n"


def test_a_bar_can_be_turned_off(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("quiet", shown=False) as bar:
        bar(1, 2)
    assert capsys.readouterr().err == ""
