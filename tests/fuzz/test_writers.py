"""Every writer of files, ended at random moments in every way: what was there, or all that is new.

As a script, ``test_writers.py FOLDER TRIALS SEED``, it runs the trials in forked processes, so that
torch is imported once, and prints what it counted as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPORARY = ".torch_q4."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
COMMANDS = ("quantize", "dequantize")  # what catches SIGTERM and SIGHUP

Writer = Callable[[Path], object]


def writers(folder: Path) -> tuple[dict[str, Writer], dict[str, Path]]:
    """Each writes a file of some megabytes to a path; and the names of those files."""
    import torch
    from torch import nn

    import torch_q4
    from torch_q4 import _tune
    from torch_q4.cli import main

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)))
    tensors = {f"{name}.weight": torch.randn(512, 512) for name in "abcdef"}
    importance = torch_q4.Importance(
        {str(i): torch.rand(1 << 16) for i in range(16)}, {str(i): torch.ones(1) for i in range(16)}
    )
    torch_q4.save_gguf(folder / "dense.gguf", tensors)
    source, packed = str(folder / "dense.gguf"), str(folder / "packed.gguf")
    pure = ["--type", "q8_0", "--pure", "--no-progress"]
    assert main(["quantize", source, packed, *pure]) == 0
    plans = [
        _tune._Saved("gpu", "sm_90", "0", "q4_0", "float16", True, n, 4096, ((1, "few"),))
        for n in range(2000)
    ]
    (folder / "plans.json").write_text(
        json.dumps({"torch_q4_plans": 1, "plans": [vars(plan) for plan in plans]})
    )
    plan = _tune._Saved("gpu", "sm_90", "0", "q8_0", "float16", True, 1, 4096, ((1, "few"),))
    made: dict[str, Writer] = {
        "save_gguf": lambda path: torch_q4.save_gguf(path, tensors),
        "save_safetensors": lambda path: torch_q4.save_safetensors(path, tensors),
        "save_checkpoint": lambda path: torch_q4.save_checkpoint(model, path),
        "importance": importance.save,
        "quantize": lambda path: main(["quantize", source, str(path), *pure]),
        "dequantize": lambda path: main(["dequantize", packed, str(path), "--no-progress"]),
        "tune": lambda path: _tune._write(path, plan),
    }
    suffixes = dict.fromkeys(made, "gguf") | {
        "save_safetensors": "safetensors", "save_checkpoint": "safetensors", "tune": "json"
    }  # fmt: skip
    return made, {name: Path(f"{name}.{suffix}") for name, suffix in suffixes.items()}


def in_a_child(
    write: Writer, path: Path, prepare: Callable[[], None], number: int = 0, delay: float = 0.0
) -> tuple[int, float]:
    """Writes in a process of its own, which gets a signal; how it ended and after how long."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            prepare()
            # Whoever runs the tests, under nohup or in the background, may ignore them.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(120)  # a writer that hangs is a failure, too
            os.write(go, b"x")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = write(path)
            status = result if isinstance(result, int) else 0
        except KeyboardInterrupt:
            status = 130
        except OSError as error:
            status = 3 if error.errno in (errno.ENOSPC, errno.EFBIG) else 4
        finally:
            os._exit(status)
    os.close(go)
    os.read(ready, 1)
    os.close(ready)
    began = time.perf_counter()
    if number:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended), time.perf_counter() - began


def run_trials(folder: Path, trials: int, seed: int) -> dict[str, int]:
    """Ends writers at random; AssertionError if a file is neither the old nor the new one."""
    import torch

    from torch_q4 import _files

    torch.set_num_threads(1)  # threads do not survive a fork
    chance = random.Random(seed)
    made, names = writers(folder)
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    has_small = subprocess.run(mount, capture_output=True).returncode == 0
    count: Counter[str] = Counter()
    new: dict[str, bytes] = {}
    old: dict[str, bytes] = {}
    seconds: dict[str, float] = {}
    for name, write in made.items():
        path = folder / names[name]
        old[name] = (folder / "plans.json").read_bytes() if name == "tune" else b"old"
        for attempt in range(3):
            path.write_bytes(old[name])
            status, took = in_a_child(write, path, lambda: None)
            assert status == 0, name
            seconds[name] = took if attempt == 0 else min(took, seconds[name])
        new[name] = path.read_bytes()
        path.unlink()
    try:
        for _ in range(trials):
            trial(chance, folder, small if has_small else None, made, names, old, new, seconds,
                  count, _files)  # fmt: skip
    finally:
        if has_small:
            subprocess.run(["umount", str(small)], check=True)
    return dict(count)


def trial(chance, folder, small, made, names, old, new, seconds, count, files) -> None:
    name = chance.choice(list(made))
    ways = [*SIGNALS, *SIGNALS, "limit"]
    if small is not None and len(new[name]) > 1 << 20:
        ways.append("disk")
    way = chance.choice(ways)
    named, reserved, replaced = (chance.random() < 0.5 for _ in range(3))
    replaced = replaced or name == "tune"  # whose file depends on the one before
    where = small if way == "disk" else folder / "work"
    where.mkdir(exist_ok=True)
    path = where / names[name]
    if replaced:
        path.write_bytes(old[name])
    lock = path.with_name("tune.json.lock")

    def prepare() -> None:
        if named:
            files._UNNAMED = 0
        if not reserved:
            os.posix_fallocate = unsupported  # type: ignore[assignment]
        if way == "limit":
            limit = chance.randrange(len(new[name]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    number = int(way) if isinstance(way, signal.Signals) else 0
    delay = chance.random() * 0.9 * seconds[name]
    status, _ = in_a_child(made[name], path, prepare, number, delay)

    what = f"{name}, {way!r}, named {named}, replaced {replaced}, delay {delay:.4f}, {status}"
    count["trials"] += 1
    left = [entry for entry in where.iterdir() if entry not in (path, lock)]
    found = path.read_bytes() if path.exists() else None
    assert found in ((old[name] if replaced else None), new[name]), what
    count["new" if found == new[name] else "as before"] += 1
    if number:
        ended = status in (-number, 128 + number)
        assert ended or (status == 0 and found == new[name]), what
        count["ended by a signal" if ended else "finished first"] += 1
    else:
        assert status == (1 if name in COMMANDS else 3), what
        assert found != new[name], what
        count["no room"] += 1
    if left:
        caught = number == signal.SIGINT or (name in COMMANDS and number != signal.SIGKILL)
        assert number, f"{what}: left {left}"
        assert not caught, f"{what}: left {left}"
        assert len(left) == 1, what
        assert left[0].name.startswith(TEMPORARY), what
        # Without a name before: only between its link and its renaming, so all of it.
        assert named or left[0].read_bytes() == new[name], what
        count["left, named" if named else "left, between link and renaming"] += 1
    count[f"{'named' if named else 'unnamed'}, {way.name if number else way}"] += 1
    for entry in where.iterdir():
        entry.unlink()


def unsupported(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "not supported")


def script(folder: Path, trials: int, seed: int) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, __file__, str(folder), str(trials), str(seed)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    count: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return count


def test_some(tmp_path: Path) -> None:
    count = script(tmp_path, 40, 1)
    assert count["trials"] == 40
    assert count["as before"] >= 10


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_many(tmp_path: Path, seed: int) -> None:
    count = script(tmp_path, 300, seed)
    print(json.dumps(count, indent=1, sort_keys=True))
    assert count["trials"] == 300
    assert count["ended by a signal"] >= 60


if __name__ == "__main__":
    print(json.dumps(run_trials(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
