"""`fastdmd COMMAND`: it starts at once, names what was typed, says what is wrong in one line, completes in shells."""

import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastdmd
from fastdmd import completion
from fastdmd.__main__ import COMMANDS
from fastdmd.runs import cli, help, startup, terminal
from fastdmd.runs.config import TrainConfig
from fastdmd.runs.presets import PRESETS
from fastdmd.settings import Settings

PACKAGE = Path(fastdmd.__file__).parent
NAMES = ", ".join(COMMANDS)
CONSOLE = "import sys; sys.argv[0] = '/usr/bin/fastdmd'; from fastdmd.__main__ import main; main()"  # as pip writes it


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100)


def main_of(name):
    return importlib.import_module(f"fastdmd.{name}" + ".__main__" * (name in ("ops", "report"))).main


def test_help_of_all_needs_no_torch():
    done = run("-X", "importtime", "-m", "fastdmd", "--help")
    assert done.returncode == 0 and re.findall(r"^  (\w+)  ", done.stdout, re.M) == list(COMMANDS)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "fastdmd.runs.terminal" in imported and not {"torch", "numpy", "tyro"} & imported


def test_every_module_that_is_a_command_is_listed():
    sources = "".join(path.read_text() for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")])
    assert set(re.findall(r'^@terminal.command\("fastdmd\.(\w+)"\)', sources, re.M)) == set(COMMANDS)
    assert set(completion.CONFIGS) == set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["--version"], 0, ""),
        (
            ["smaple"],
            2,
            f"fastdmd: error: expected a command out of {', '.join(COMMANDS)}, got smaple; did you mean sa",
        ),
        (["--verbose"], 2, f"fastdmd: error: expected a command out of {', '.join(COMMANDS)}, got --verbose\n"),
        ([], 2, "usage: fastdmd [-h] [--version] COMMAND ...\n"),
    ],
)
def test_what_is_no_command(arguments, code, error):
    done = run("-c", CONSOLE, *arguments)
    assert done.returncode == code and done.stderr.startswith(error)
    assert done.stdout == (f"fastdmd {fastdmd.__version__}\n" if "--version" in arguments else "")


# Says when torch is asked for, and how threads are to wait by then.
WATCHED = """
import os, sys
for name in list(os.environ):
    if name.startswith(("OMP_", "GOMP_", "KMP_")):
        del os.environ[name]
seen = []
sys.addaudithook(lambda event, values: event == "import" and values[0] == "torch" and seen.append(values) or None)
sys.addaudithook(lambda event, values: len(seen) == 1 and seen.append(print(os.environ.get("GOMP_SPINCOUNT"))) or None)
"""


def test_commands_know_how_they_were_called(tmp_path):
    """And prepare their process before torch is there; also the one whose settings are defined in the module that is
    run, which is then called `__main__`."""
    done = run("-c", WATCHED + CONSOLE, "export", "gone.safetensors", "--out", str(tmp_path / "a.pt2"))
    assert done.returncode == 2 and done.stderr.startswith("fastdmd export: error: ") and "gone" in done.stderr
    assert done.stdout == f"{startup.SPIN_COUNT}\n"


def test_names(monkeypatch):
    monkeypatch.setattr(terminal, "_program", None)
    assert (terminal.typed("fastdmd.train"), terminal.usage("fastdmd.train")) == ("fastdmd.train",) + (
        "python -m fastdmd.train",
    )
    for program in ("fastdmd", "python -m fastdmd"):
        terminal.called_through(program)
        assert terminal.typed("fastdmd.train") == "fastdmd train"
        assert terminal.usage("fastdmd.train") == f"{program} train"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_ends_with_examples(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main_of(name)(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    head, _, examples = text.partition("\nexamples:\n")
    assert head.startswith(f"usage: python -m fastdmd.{name} [-h]")
    assert 2 <= examples.count("\n") <= 3
    for line in examples.splitlines():
        assert line.startswith(f"  python -m fastdmd.{name}")
        config, words = completion.CONFIGS[name], shlex.split(line)[3:]
        if issubclass(config, Settings) and "--resume" not in words:  # of a run that there is not
            cli.parse(config, f"fastdmd.{name}", words)
    for said in re.split(r"^[│ ]+(?=--)", text, flags=re.M):
        assert not ("Default" in said and "(default: None)" in said), said
    presets = re.findall(r"^  (\S+)  +(\S.*)$", head.partition("\npresets:\n")[2], re.M)
    assert presets == ([(name, preset.summary) for name, preset in PRESETS.items()] if name == "train" else [])


def test_what_is_said_of_a_flag_is_one_paragraph():
    texts = help.docstrings(TrainConfig)
    assert texts["seed"] == "Every random draw is a function of the seed and the iteration."  # inherited
    assert texts["teacher"].endswith(" package.module:name, or `mnist`: the embedded one.")
    assert "optimizer" not in texts and not any("\n" in text for text in texts.values())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--generator-lrr 3", "expected flags that --help lists, got --generator-lrr 3; did you mean --generator-lr?"),
        ("--guidancelr 3", "expected flags that --help lists, got --guidancelr 3; did you mean --guidance-lr?"),
        ("--seed 1 more", "expected flags that --help lists, got more"),
        (
            "--execution captred",
            "expected --execution one of auto, eager, compiled, captured, got captred; did you mean captured?",
        ),
        (
            "--batch-size ten",
            "expected --batch-size to be readable, got: invalid literal for int() with base 10: 'ten'",
        ),
        (
            "--image-shape 3 a 4",
            "expected --image-shape to be readable, got: no type matching {None}|{INT INT INT} could be instantiated "
            "from ['3', 'a', '4']",
        ),
        (
            "--method",
            "expected arguments as --help lists them, got: Missing value for argument '--method'. Expected 1 values.",
        ),
        ("--preset imagenet", f"expected --preset one of {', '.join(PRESETS)}, got imagenet; did you mean imagenet64?"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_mistakes_are_one_line_and_say_what_was_meant(words, line, columns, encoding, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit) as stop:
        cli.parse(TrainConfig, "fastdmd.train", words.split(), PRESETS)
    assert stop.value.code == 2 and capsys.readouterr().err == f"fastdmd.train: error: {line}\n"


def test_what_else_is_said_meanwhile_is_not_lost(capsys):
    with help.errors_as_lines():
        print("a warning", file=sys.stderr)
    for code, line in ((0, "then help"), (None, "then help")):
        with pytest.raises(SystemExit), help.errors_as_lines():
            print(line, file=sys.stderr)
            raise SystemExit(code)
    assert capsys.readouterr().err == "a warning\nthen help\nthen help\n"
    for text in ("", "no box", "title\nno rule"):
        with pytest.raises(ValueError, match=f"{text.splitlines()[-1] if text else 'got: '}$"), help.errors_as_lines():
            print(text, end="", file=sys.stderr)
            raise SystemExit(2)


COMPLETE = """
source {script}
for line in "$@"; do
    COMP_WORDS=($line "") COMP_CWORD=$(wc -w <<< "$line") COMPREPLY=()
    if [[ $line != *" " ]]; then unset 'COMP_WORDS[-1]'; COMP_CWORD=$((COMP_CWORD - 1)); fi
    $(complete -p fastdmd | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    echo "${{COMPREPLY[*]}}"
done
"""


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("python3"), reason="needs bash and python3")
def test_completion_in_bash(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        completion.main(["bash"])
    script = tmp_path / "fastdmd.bash"
    script.write_text(capsys.readouterr().out)
    lines = ["fastdmd tra", "fastdmd sample --nu", "fastdmd train --execution ", "fastdmd export --weights-dtype b"]
    command = ["bash", "-c", COMPLETE.format(script=script), "bash", *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert stop.value.code in (0, None) and done.stderr == ""
    found = [line.split() for line in done.stdout.splitlines()]
    assert found == [["train"], ["--num", "--num-classes"], ["auto", "eager", "compiled", "captured"], ["bfloat16"]]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        completion.main([shell])
    script = capsys.readouterr().out
    assert stop.value.code in (0, None) and "'--dfake-gen-update-ratio'" in script
    assert {"zsh": "#compdef fastdmd", "fish": "function _tyro_fastdmd"}[shell] in script
