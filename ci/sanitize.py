#!/usr/bin/env python3
"""Runs Python on a copy of the package whose library was built with a sanitizer.

    ci/sanitize.py build/address pytest tests/test_linear.py
    ci/sanitize.py build/thread tests/cpp/threads.py

The folder is CMake's, configured with ``TORCH_Q4_SANITIZE``. The package in it is the tree's own
Python files, as links, beside the library that CMake built. Before anything else a read past a
tensor's end (address), or two threads that write to one (thread), is planted: where the sanitizer
does not see it, nothing that it finds right means anything, and the exit status is 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent

# Two blocks in the memory of one.
PLANTED_READ = """
import ctypes, torch, torch_q4
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = (ctypes.c_uint8 * 36).from_address(libc.malloc(18))
torch_q4.dequantize(torch.frombuffer(memory, dtype=torch.uint8), "q4_0")
"""
# Two threads that put the same blocks into the packed layout, in place.
PLANTED_RACE = """
import threading, torch, torch_q4
torch.set_num_threads(1)
blocks = torch.zeros(16 << 10, 18, dtype=torch.uint8)
start = threading.Barrier(2)
def work():
    start.wait()
    for _ in range(20):
        torch.ops.torch_q4.pack_(blocks, 2)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
# Sanitizer: its library, the planted fault, and what it says of it. Leaks are not looked for:
# Python and torch keep much until the process ends.
KINDS = {
    "address": ("libasan.so", PLANTED_READ, "AddressSanitizer: heap-buffer-overflow"),
    "thread": ("libtsan.so", PLANTED_RACE, "ThreadSanitizer: data race"),
}


def setting(build: Path, name: str) -> str:
    """A variable of CMake's cache."""
    for line in (build / "CMakeCache.txt").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition("=")[2]
    raise SystemExit(f"sanitize: {build} must be a build with {name}, got none")


def library(build: Path, name: str) -> str:
    """One of the compiler's own libraries."""
    command = [setting(build, "CMAKE_CXX_COMPILER"), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"sanitize: the compiler must have {name}, got none")
    return os.path.realpath(path)


def link_package(build: Path) -> None:
    """The package's Python files, beside the library that was built."""
    package = build / "torch_q4"
    for path in package.iterdir():
        if path.is_symlink():
            path.unlink()
    for path in (SOURCE / "torch_q4").iterdir():
        if path.name not in ("_C.so", "kernels", "__pycache__"):
            (package / path.name).symlink_to(path)


def environment(build: Path, kind: str) -> dict[str, str]:
    """With the sanitizer before everything else, and the package of the build."""
    preloaded = [library(build, KINDS[kind][0]), library(build, "libstdc++.so")]
    if kind == "thread":
        preloaded.append(str(build / "torch_q4" / "libopenmp.so"))
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(preloaded),
        "PYTHONPATH": str(build),
        "PYTHONSAFEPATH": "1",  # not the package in the current directory
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Only what has a function of the library in its stack: torch and Python are not
        # instrumented, and what they do to each other is not seen.
        "TSAN_OPTIONS": f"suppressions={SOURCE / 'ci' / 'tsan.supp'}:report_thread_leaks=0",
    }


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if len(arguments) < 2:
        raise SystemExit(f"sanitize: expected BUILD COMMAND..., got {arguments}")
    build, command = Path(arguments[0]).resolve(), arguments[1:]
    kind = setting(build, "TORCH_Q4_SANITIZE")
    if kind not in KINDS:
        raise SystemExit(f"sanitize: TORCH_Q4_SANITIZE must be address or thread, got {kind}")
    link_package(build)
    variables = environment(build, kind)
    _, planted, words = KINDS[kind]
    told = subprocess.run(
        [sys.executable, "-c", planted], env=variables, capture_output=True, text=True
    )
    if told.returncode == 0 or words not in told.stderr or "csrc/cpu" not in told.stderr:
        print(f"sanitize: a planted fault must be found, got\n{told.stderr}", file=sys.stderr)
        return 2
    print(f"sanitize: {words}, as planted; now {' '.join(command)}", flush=True)
    first = ["-m", "pytest"] if command[0] == "pytest" else [command[0]]
    return subprocess.run([sys.executable, *first, *command[1:]], env=variables).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
