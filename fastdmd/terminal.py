"""What a command writes to: output that is narrow, ASCII, closed or full is no reason for a traceback."""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import functools
import os
import shutil
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

LEAST_COLUMNS, GREATEST_COLUMNS = 40, 200  # below 3 the help of tyro 1.0 never ends
PLAIN = "fastdmd.plain"  # the name of an error handler of `codecs`
CLOSED_PIPE = 128 + 13  # as a shell reports a process that SIGPIPE ended
TRACEBACK = "FASTDMD_TRACEBACK"
_verbose = contextvars.ContextVar("verbose", default=False)


def command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around the `main` of a command: whatever becomes of stdout, the end is an exit code.

    141, and no word, if who read it is gone (`| head -1`); 1 and one line if it is full; closed, it takes nothing.
    What the encoding does not know is written without its accent, or as a question mark.
    """

    def decorate(main: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def guarded(arguments: list[str] | None = None) -> Any:
            _prepare()
            token = _verbose.set("--verbose" in (sys.argv if arguments is None else arguments))
            try:
                result = main(arguments)
            except BrokenPipeError:
                _give_up()
                raise SystemExit(CLOSED_PIPE) from None
            except OSError as error:  # what no step of the command has expected: of stdout, most likely
                report(name, str(error), error)
                _give_up()
                raise SystemExit(1) from None
            except BaseException:
                with _delivered(name):
                    sys.stdout.flush()
                raise
            finally:
                _verbose.reset(token)
            with _delivered(name):
                sys.stdout.flush()
            return result

        return guarded

    return decorate


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


def report(name: str, text: str, error: BaseException) -> None:
    """What went wrong, in one line; with --verbose or FASTDMD_TRACEBACK=1 the traceback beneath it."""
    say(f"{name}: error: {' '.join(text.split())}")
    if _verbose.get() or os.environ.get(TRACEBACK, "0") not in ("", "0"):
        say("".join(traceback.format_exception(error)).rstrip())


def _prepare() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=PLAIN))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


@contextlib.contextmanager
def _delivered(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _give_up()
        raise SystemExit(CLOSED_PIPE) from None
    except OSError as error:
        _give_up()
        report(name, f"expected to write to stdout, got {error}", error)
        raise SystemExit(1) from None


def _give_up() -> None:
    """Python flushes stdout and stderr once more as it ends, and would report that, too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = unicodedata.normalize("NFKD", error.object[error.start : error.end].replace("×", "x"))
    letters = "".join(character for character in text if not unicodedata.combining(character))
    return letters.encode("ascii", "replace").decode("ascii"), error.end


codecs.register_error(PLAIN, _plain)
