"""`python -m fastdmd.ops`: which implementations are active on this machine, and why others are not."""

from __future__ import annotations

import argparse

import torch

from fastdmd import _native, ops
from fastdmd.runs import terminal


@terminal.command("fastdmd.ops")
def main(arguments: list[str] | None = None) -> None:
    program = terminal.usage("fastdmd.ops")
    parser = argparse.ArgumentParser(
        program,
        description="Tell which implementations of the ops this machine has, and why not others.",
        epilog=f"examples:\n  {program}\n  {program} --all",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="every backend of every op, those of the tests too")
    show_all = parser.parse_args(arguments).all
    try:
        ops.require_environment()
    except ValueError as error:
        terminal.report("fastdmd.ops", str(error), error)
        raise SystemExit(2) from None
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"{device_type}:")
        for name in ops.names():
            active, *others = ops.implementations(name, device_type)
            also = f", also {', '.join(others)}" if others else ""
            print(f"  {name:<26}{active}{also}")
            if show_all:
                for backend, reason in ops.unavailable(name, device_type).items():
                    print(f"    no {backend}: {reason}")
        if not show_all:
            reasons = ops.unavailable(ops.names()[0], device_type)
            reasons.pop("emulated", None)  # which only the tests have
            for backend, reason in reasons.items():
                print(f"  no {backend}: {reason}")
        if _native.load("cpu") is None and device_type == "cpu":
            print(f"  native library: {_native.build_facts()}")
    try:
        _native.runtime()
    except _native.Unavailable as reason:
        print(f"fastdmd._runtime: {reason}")
    if not torch.cuda.is_available():
        print("cuda: torch finds no GPU")


if __name__ == "__main__":
    main()
