"""What a command says of an error is one line of bounded length, whatever stands in it."""

import pytest

from fastdmd.runs import cli, terminal


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\tc  d", "a b c d"),
        ("a\x1b[31mb\u202ec\x00d", "a?[31mb?c?d"),
        ("é①\u2060x", "é①?x"),
        ("x" * 2000, "x" * 1200 + " ..."),
        ("\udcff", "?"),
    ],
)
def test_report(text, line, capsys):
    terminal.report("fastdmd.test", text, ValueError())
    assert capsys.readouterr().err == f"fastdmd.test: error: {line}\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FileNotFoundError(2, "No such file", "a/b.pt"), 2, "access to a/b.pt, got: No such file"),
        (OSError(36, "File name too long", "x" * 999), 2, f"access to {'x' * 400}, got: File name too long"),
        (OSError(28, "No space left on device", "a"), 1, "access to a, got: No space left on device"),
        (OSError("expected b, got c"), 2, "b, got c"),
        (ValueError("expected b, got c"), 2, "b, got c"),
    ],
)
def test_errors_of_the_system_have_the_form_of_ours(error, code, line, capsys):
    with pytest.raises(SystemExit) as stop, cli.user_errors("fastdmd.test"):
        raise error
    assert stop.value.code == code and capsys.readouterr().err == f"fastdmd.test: error: expected {line}\n"
