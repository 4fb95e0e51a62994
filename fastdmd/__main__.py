"""`fastdmd COMMAND ...`, or `python -m fastdmd COMMAND ...`: runs the module `fastdmd.COMMAND`."""

from __future__ import annotations

import runpy
import sys

from fastdmd import __version__
from fastdmd.runs import terminal

COMMANDS = {
    "train": "distil a teacher into a generator of one step, or a few",
    "pretrain": "train a teacher",
    "sample": "sample images from a generator or a teacher",
    "evaluate": "measure samples against real images",
    "export": "write a generator as ONNX, a torch.export program or bare weights",
    "report": "show what runs came to, as one page",
    "pairs": "make pairs of noise and a teacher's images, for a regression",
    "ops": "tell which implementations of the ops this machine has",
    "completion": "print a script that completes all of this in bash, zsh or fish",
}


def main() -> None:
    """Runs the command that sys.argv names, in this process, as `python -m` would: it prepares the process before it
    imports torch."""
    by_name = sys.argv[0].endswith("__main__.py")
    terminal.called_through("python -m fastdmd" if by_name else "fastdmd")
    name = chosen(sys.argv[1:])
    if name is not None:
        del sys.argv[1]
        runpy.run_module(f"fastdmd.{name}", run_name="__main__", alter_sys=True)


@terminal.command("fastdmd")
def chosen(arguments: list[str]) -> str | None:
    """The command to run; None where help or version was all that was wanted. Exit code 2 for one that is not there."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"fastdmd {__version__}")
    elif name in COMMANDS:
        return name
    elif not name:
        terminal.say(usage())
        raise SystemExit(2)
    else:
        line = f"expected a command out of {', '.join(COMMANDS)}, got {name}{terminal.meant(name, COMMANDS)}"
        terminal.report("fastdmd", line)
        raise SystemExit(2)
    return None


def usage() -> str:
    program = terminal.usage("fastdmd")
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} [-h] [--version] COMMAND ...",
            "",
            "Distil a diffusion model into a one-step generator.",
            "",
            "commands:",
            *lines,
            "",
            f"{program} COMMAND --help lists the flags of a command.",
        ]
    )


if __name__ == "__main__":
    main()
