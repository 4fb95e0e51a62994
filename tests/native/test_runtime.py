"""The module fastdmd._runtime: the numbers of the ops for numpy, the instruction set, and a package without it."""

import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fastdmd
from fastdmd import _native, _sources, ops
from tests.ops.test_random import KNOWN_ANSWERS

try:
    runtime = _native.runtime()
except _native.Unavailable as reason:
    runtime, REASON = None, str(reason)
else:
    REASON = ""
ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(runtime is None, reason=f"no fastdmd._runtime: {REASON}")


@pytest.fixture
def limits():
    """The instruction sets, best first; whatever a test holds back is as it was afterwards."""
    before = runtime.instruction_set()
    yield runtime.build_facts()["instruction_sets"]
    runtime.hold_back(before)


@built
def test_philox_gives_the_published_answers():
    for words in KNOWN_ANSWERS:
        counter, key, answer = (np.array([int(word, 16) for word in text.split()], np.uint32) for text in words)
        found = runtime.philox(counter[None], key)
        assert found.dtype == np.uint32 and np.array_equal(found, answer[None])


@built
def test_philox_is_that_of_the_ops():
    generator = np.random.default_rng(0)
    counter, key = (generator.integers(2**32, size=size, dtype=np.uint32) for size in ((501, 4), 2))
    given = [torch.from_numpy(words.astype(np.int64)) for words in (counter, key)]
    for implementation in ops.implementations("philox").values():
        assert np.array_equal(runtime.philox(counter, key), implementation(*given).numpy())
    assert np.array_equal(runtime.philox(counter[::-3], key), runtime.philox(counter, key)[::-3])
    assert runtime.philox(counter[:0], key).shape == (0, 4)


@built
@pytest.mark.parametrize("seed, word", [(0, 0), (2**62 + 3, 5), (2**63 - 1, 2**32 - 1)])
def test_normals_are_the_noise_of_the_ops(seed, word, limits):
    """Of every instruction set bit for bit, of the reference as near as the op is."""
    place = {"stream": word, "iteration": word // 2}
    key = ops.rng_key(seed, first_sample=word, **place)
    arguments = torch.zeros(2, 3, 29, 31), torch.ones(2)
    found = ops.implementations("add_noise_rng")
    expected = found["reference"](*arguments, key, None, torch.float32)
    for limit in limits:
        runtime.hold_back(limit)
        for row, image in enumerate(expected.flatten(1)):
            of_image = {"sample": (word + row) % 2**32, **place}
            noise = runtime.normals(seed, image.numel(), **of_image)
            assert noise.dtype == np.float32
            assert_close(torch.from_numpy(noise), image)
            if "native" in found:
                with ops.use_backend("native"):
                    drawn = ops.add_noise(*arguments, rng_key=key)[row]
                assert torch.equal(drawn.flatten(), torch.from_numpy(noise))
            for first, size in ((0, 0), (5, 1), (777, 1000), (1, 383)):
                found_part = runtime.normals(seed, size, first=first, **of_image)
                assert np.array_equal(found_part, noise[first : first + size])


@built
def test_far_elements_have_counters_of_their_own():
    first = 2**33 - 8
    low, high = runtime.normals(1, 8, first=2**32 - 8), runtime.normals(1, 8, first=first)
    assert not np.array_equal(low, high)
    a, b = runtime.philox(np.array([[first // 4, 0, 0, 0]], np.uint32), np.array([1, 0], np.uint32))[0, :2].tolist()
    radius = (-2 * np.log((a // 2 + 0.5) / 2**31)) ** 0.5
    angle = np.pi * np.int32(np.uint32(b)) / 2**31
    np.testing.assert_allclose(high[:2], [radius * np.cos(angle), radius * np.sin(angle)], rtol=1e-5)


@built
def test_what_is_asked_wrongly_is_said_in_one_line():
    counter, key = np.zeros((1, 4), np.uint32), np.zeros(2, np.uint32)
    for call, error, message in (
        (lambda: runtime.philox([[0] * 4], key), TypeError, "philox: expected counter to be a numpy array, got list"),
        (lambda: runtime.philox(counter.astype(float), key), TypeError, "counter of dtype uint32, got float64"),
        (lambda: runtime.philox(counter[:, :3], key), ValueError, r"counter of shape \(N, 4\), got \(1, 3\)"),
        (lambda: runtime.philox(counter, counter), ValueError, r"key of shape \(2,\), got \(1, 4\)"),
        (lambda: runtime.normals(-1, 3), ValueError, r"normals: expected seed in \[0, 2\^63\), got -1"),
        (lambda: runtime.normals(0, 3, stream=2**32), ValueError, rf"stream in \[0, 2\^32\), got {2**32}"),
        (lambda: runtime.normals(0, 3, sample=-1), ValueError, r"sample in \[0, 2\^32\), got -1"),
        (lambda: runtime.normals(0, 1.5), TypeError, "size to be an int, got float 1.5"),
        (lambda: runtime.normals(0, 1, first=2**33), ValueError, rf"first in \[0, 2\^33\), got {2**33}"),
        (lambda: runtime.hold_back("sse"), ValueError, "expected an instruction set out of .*generic, got 'sse'"),
        (lambda: runtime.normals(10**5000, 1), ValueError, r"seed in \[0, 2\^63\), got one without a text"),
        (lambda: runtime.normals(0, 1, iteration="a\nb"), TypeError, r"iteration to be an int, got str 'a\\nb'"),
        (lambda: runtime.hold_back("\ud800"), ValueError, r"out of .*generic, got '\\ud800'"),
        (lambda: runtime.hold_back("avx2\0"), ValueError, r"out of .*generic, got 'avx2\\x00'"),
        (lambda: runtime.hold_back(2), ValueError, "expected an instruction set out of .*generic, got 2"),
    ):
        with pytest.raises(error, match=message) as raised:
            call()
        assert str(raised.value).startswith("fastdmd.") and "\n" not in str(raised.value)


@built
def test_the_instruction_set_is_held_back_and_let_go(limits):
    best = runtime.hold_back(limits[0])
    for limit in limits:
        chosen = runtime.hold_back(limit)
        assert chosen == runtime.instruction_set() and _native.build_facts().endswith(f"running {chosen}")
        assert limits.index(chosen) == max(limits.index(limit), limits.index(best))
    with pytest.raises(ValueError):
        runtime.hold_back("none")
    assert runtime.instruction_set() == "generic"
    assert runtime.hold_back(limits[0]) == best


@built
def test_facts_of_the_build():
    facts = runtime.build_facts()
    assert set(facts) == {"compiler", "flags", "instruction_sets", "torch_abi", "cuda_architectures", "commit"}
    assert "-O3" in facts["flags"] and "-march" not in facts["flags"] and "-ffast-math" not in facts["flags"]
    assert facts["compiler"] in _native.build_facts() and facts["torch_abi"] == "2.10"
    assert bool(facts["cuda_architectures"]) == (_native.load("cuda") is None)


def test_digest_of_sources(tmp_path):
    """By names and contents of what is compiled, and nothing else that lies there."""
    assert _sources.digest(tmp_path) is None
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "a.h").write_text("int a;")
    assert _sources.digest(tmp_path) is None  # as beside a wheel, where another one has left its csrc
    (tmp_path / "CMakeLists.txt").write_text("project(a)")
    before = _sources.digest(tmp_path)
    (tmp_path / "csrc" / "cpu" / "a.h~").write_text("int b;")
    (tmp_path / "csrc" / "notes").mkdir()
    (tmp_path / "csrc" / "folder.cpp").mkdir()
    (tmp_path / "csrc" / ".#b.cpp").symlink_to("somebody@here")  # as an editor leaves it
    (tmp_path / "csrc" / "cpu" / "a.h").touch()
    assert _sources.digest(tmp_path) == before
    seen = {before}
    for name, text in (
        ("csrc/cpu/a.h", "int b;"),
        ("CMakeLists.txt", "project(b)"),
        ("csrc/b.cu", ""),
        ("csrc/c.cpp", ""),
    ):
        (tmp_path / name).write_text(text)
        seen.add(_sources.digest(tmp_path))
    (tmp_path / "csrc" / "b.cu").rename(tmp_path / "csrc" / "d.cu")
    seen.add(_sources.digest(tmp_path))
    assert len(seen) == 6 and None not in seen


@built
def test_libraries_of_other_sources_are_told(tmp_path):
    """As after `git pull`, when Python's side is new and the libraries compute as before."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for root in (ROOT, tmp_path, tmp_path / "csrc"):  # the last has nothing to compare with
            _native._compare_with_sources(root)
    with open(tmp_path / "csrc" / "ops.cpp", "a") as file:
        file.write("\n")
    folder = re.escape(str(tmp_path))
    expected = f"built from other sources than {folder}/csrc has now; `pip install .* -e {folder}` builds them anew"
    with pytest.warns(RuntimeWarning, match=expected):
        _native._compare_with_sources(tmp_path)


@built
def test_other_threads_run_meanwhile():
    counter, key = np.zeros((2**21, 4), np.uint32), np.zeros(2, np.uint32)
    begun, ended = threading.Event(), threading.Event()

    def draw():
        begun.set()
        runtime.philox(counter, key)
        ended.set()

    thread = threading.Thread(target=draw)
    thread.start()
    begun.wait()
    turns = 0
    while not ended.is_set():
        turns += 1
    thread.join()
    assert turns > 1000


NUMPY_ALONE = """
import sys
from fastdmd import _runtime
print(_runtime.normals(7, 3, stream=3).tolist(), "torch" in sys.modules)
"""


@built
def test_it_needs_no_torch():
    result = subprocess.run([sys.executable, "-c", NUMPY_ALONE], capture_output=True, text=True)
    assert result.stdout.strip() == f"{runtime.normals(7, 3, stream=3).tolist()} False", result.stderr


WITHOUT = """
import sys
sys.modules["fastdmd._runtime"] = None
from fastdmd import _native
from fastdmd.runs import machine
from fastdmd.ops.__main__ import main
machine.keep_freed_memory()
main([])
"""


def test_without_it_everything_works_and_the_overview_says_so():
    result = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *_, reason, _ = result.stdout.splitlines()
    assert reason == f"fastdmd._runtime: {_native.NO_RUNTIME}" or torch.cuda.is_available()
    if _native.load("cpu") is None:
        assert re.search("compiled by .*, stable ABI of torch 2.10, running (avx512|avx2|generic)\n", result.stdout)


def test_a_broken_module_warns_with_its_cause(tmp_path, monkeypatch):
    (tmp_path / "_runtime.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.setattr(fastdmd, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "fastdmd._runtime", raising=False)
    _native.runtime.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="_runtime is there but does not load: undefined symbol"):
            with pytest.raises(_native.Unavailable, match="does not load: undefined symbol"):
                _native.runtime()
    finally:
        _native.runtime.cache_clear()
