"""Feeds golden blocks to the sanitizer build of the kernels, once per instruction set.

Usage: ``run.py build/sanitize/test_kernels``. Exits with 1 if any run fails. An instruction set
that this CPU lacks is said and left out; ``generic`` always runs.
"""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent.parent / "golden" / "ggml_golden.npz"
NEEDS = {
    "generic": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx2", "avx_vnni"},
    "avx512": {"avx512_vnni", "avx512dq"},
    "amx": {"avx512_vnni", "avx512dq", "amx_tile", "amx_bf16"},
}


def golden_input(supported: set[int]) -> bytes:
    data = np.load(GOLDEN)
    parts = []
    for line in data["formats"]:
        name, type_id, _, _ = str(line).lower().split()
        if int(type_id) not in supported:
            continue
        for kind in ("", "imatrix_", "raw_"):
            if f"{name}_{kind}blocks" not in data:
                continue  # ggml quantises it with importance only
            blocks = data[f"{name}_{kind}blocks"]
            values = data[f"{name}_{kind}values"]
            parts.append(struct.pack("<iqq", int(type_id), blocks.size, values.size))
            parts += [blocks.tobytes(), values.astype("<f4").tobytes()]
    return b"".join(parts)


def main() -> int:
    program = sys.argv[1]
    listing = subprocess.run([program, "--types"], capture_output=True, text=True, check=True)
    text = golden_input({int(number) for number in listing.stdout.split()})
    flags = set(Path("/proc/cpuinfo").read_text().split())
    failures = 0
    for isa, needed in NEEDS.items():
        if not needed <= flags:
            print(f"{isa}: this CPU lacks {', '.join(sorted(needed - flags))}, not run")
            continue
        environment = dict(os.environ, TORCH_Q4_CPU_ISA=isa)
        failures += subprocess.run([program], input=text, env=environment).returncode != 0
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
