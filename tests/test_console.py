"""What people see while something runs."""

import io

from rich.console import Console

from mint import console


def shown(monkeypatch, act, terminal=True) -> str:
    out = io.StringIO()
    monkeypatch.setattr(
        console, "stderr", lambda: Console(file=out, force_terminal=terminal, width=100, color_system=None)
    )
    with console.working() as say:
        act(say)
    return out.getvalue()


def test_progress_has_a_bar_and_the_time_left(monkeypatch):
    def act(say):
        say("loading [model]")
        say.progress("measuring", 0, 100)
        for done in (10, 20, 30):
            say.progress("measuring", done, 100)
            say._line.refresh()

    text = shown(monkeypatch, act)
    assert "measuring" in text and "s left" in text and "━" in text


def test_what_has_no_known_end_has_no_bar(monkeypatch):
    def act(say):
        say("loading [bold]model")
        say._line.refresh()

    text = shown(monkeypatch, act)
    assert "loading [bold]model" in text and "left" not in text and "━" not in text


def test_nothing_moves_where_nobody_looks(monkeypatch):
    assert shown(monkeypatch, lambda say: say("loading"), terminal=False) == ""
