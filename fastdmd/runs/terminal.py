"""What a command writes to: output that is narrow, ASCII, closed or full is no reason for a traceback."""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import difflib
import functools
import os
import shutil
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

LEAST_COLUMNS, GREATEST_COLUMNS = 40, 200  # below 3 the help of tyro 1.0 never ends
PLAIN = "fastdmd.plain"  # the name of an error handler of `codecs`
CLOSED_PIPE = 128 + 13  # as a shell reports a process that SIGPIPE ended
TRACEBACK = "FASTDMD_TRACEBACK"
MAX_LINE = 1200  # characters of what went wrong
_verbose = contextvars.ContextVar("verbose", default=False)
_may_report: Callable[[], bool] | None = None  # of several processes
_errors: Any = None  # where errors go, if not to stderr
_program: str | None = None  # that runs the commands: `fastdmd`, or `python -m fastdmd`


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around the `main` of a command: whatever becomes of its output, the work is done first, and the end is an exit
    code.

    Of stdout: 141, and no word, if who read it is gone (`| head -1`); 1 and one line if it is full; closed, it takes
    nothing. What stderr does not take is lost. What the encoding does not know is written without its accent, or as a
    question mark.
    """

    def decorate(main: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def guarded(arguments: list[str] | None = None) -> Any:
            _prepare()
            token = _verbose.set("--verbose" in (sys.argv if arguments is None else arguments))
            try:
                with _outlasted(name):
                    return main(arguments)
            finally:
                _verbose.reset(token)

        return guarded

    return decorate


def called_through(program: str) -> None:
    """From here on commands are named as whoever typed them knows them, `fastdmd train` instead of `fastdmd.train`."""
    global _program
    _program = program


def typed(name: str) -> str:
    """`fastdmd.train`, or `fastdmd train`: how a line on the terminal begins."""
    return name if _program is None else name.replace(".", " ", 1)


def usage(name: str) -> str:
    """`python -m fastdmd.train`, `python -m fastdmd train` or `fastdmd train`: what is to be typed."""
    return f"python -m {name}" if _program is None else typed(name).replace("fastdmd", _program, 1)


def meant(word: str, known: Iterable[str]) -> str:
    """`; did you mean WORD?`, where a known one is alike; nothing without."""
    alike = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {alike[0]}?" if alike else ""


@contextlib.contextmanager
def readable_width() -> Iterator[None]:
    """Inside, text is laid out for 40 to 200 columns, however many the terminal or COLUMNS have."""
    before, columns = os.environ.get("COLUMNS"), shutil.get_terminal_size().columns
    os.environ["COLUMNS"] = str(min(max(columns, LEAST_COLUMNS), GREATEST_COLUMNS))
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def say(text: str) -> None:
    """A line beside the results, which have stdout for themselves; lost where stderr takes none."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def report(name: str, text: str, error: BaseException | None = None) -> None:
    """What went wrong, in one line; with --verbose or FASTDMD_TRACEBACK=1 the traceback beneath it."""
    if _may_report is not None and not _may_report():
        return
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    line = line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..."
    lines = [f"{typed(name)}: error: {line}"]
    if error is not None and (_verbose.get() or os.environ.get(TRACEBACK, "0") not in ("", "0")):
        lines.append("".join(traceback.format_exception(error)).rstrip())
    with contextlib.suppress(OSError):
        print("\n".join(lines), file=_errors or sys.stderr)


@contextlib.contextmanager
def one_of_several(may_report: Callable[[], bool], *, is_silent: bool) -> Iterator[None]:
    """Inside, an error is said where `may_report` says so, and nothing else of a process that `is_silent`."""
    global _may_report, _errors
    before = _may_report, _errors, sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8", errors=PLAIN) as nowhere:
        _may_report = may_report
        if is_silent:
            _errors, sys.stdout, sys.stderr = sys.stderr, nowhere, nowhere
        try:
            yield
        finally:
            _may_report, _errors, sys.stdout, sys.stderr = before


def _prepare() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=PLAIN))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


class Lenient:
    """A text stream that raises no OSError: what it does not take is lost, and `error` says why."""

    def __init__(self, stream: Any):
        self.error: OSError | None = None
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            if self.error is None:
                action()
        except OSError as error:
            self.error = error
            with open(os.devnull, "wb") as nowhere:  # for what is buffered, which Python tries again as it ends
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def _outlasted(name: str) -> Iterator[None]:
    """Nothing inside learns that stdout or stderr fail; the end is the exit code of that of stdout."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lenient(sys.stdout), Lenient(sys.stderr)
    try:
        try:
            yield
        except OSError as error:  # that no step of the command has expected
            report(name, str(error), error)
            raise SystemExit(1) from None
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            if isinstance(sys.stdout.error, BrokenPipeError):
                raise SystemExit(CLOSED_PIPE) from None
            if sys.stdout.error is not None:
                report(name, f"expected to write to stdout, got {sys.stdout.error}", sys.stdout.error)
                raise SystemExit(1) from None
    finally:
        sys.stdout, sys.stderr = before


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = unicodedata.normalize("NFKD", error.object[error.start : error.end].replace("×", "x"))
    letters = "".join(character for character in text if not unicodedata.combining(character))
    return letters.encode("ascii", "replace").decode("ascii"), error.end


codecs.register_error(PLAIN, _plain)
