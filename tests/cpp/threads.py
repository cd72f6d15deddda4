"""Every CPU operator on several threads at once, for ThreadSanitizer (see ci/sanitize.py).

Within a call torch's threads share the work; several callers use the same weight at the same time.
The results are compared with those of one thread. Written without pytest, whose own threads and
those of Python are nothing that the sanitizer understands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

import torch_q4
from torch_q4 import formats

CALLERS = 3
ops = torch.ops.torch_q4


def calls(fmt: formats.Format) -> list[Callable[[], Tensor]]:
    """What each caller does: large enough that every operator shares its work out."""
    w = torch.randn(80, 2048)
    blocks = torch_q4.quantize(w, fmt)
    packed = torch_q4.pack(blocks, fmt)
    wide = torch_q4.quantize(torch.randn(16, 8192), fmt)  # so few rows that K is split
    x, few, bias = torch.randn(20, 2048), torch.randn(3, 8192), torch.randn(80)
    half, grad = x.half(), torch.randn(70, 80)
    indices = torch.randint(0, 80, (300,))
    found: list[Callable[[], Tensor]] = [
        lambda: torch_q4.quantize(w, fmt),
        lambda: torch_q4.dequantize(blocks, fmt),
        lambda: torch_q4.dequantize(blocks, fmt, torch.bfloat16),
        lambda: torch_q4.pack(blocks, fmt),
        lambda: torch_q4.unpack(packed, fmt),
        lambda: torch_q4.embedding(indices, blocks, fmt),
        lambda: torch_q4.embedding(indices, blocks, fmt, torch.float16),
        lambda: ops.linear_transposed(grad, blocks, fmt.type_id),
    ]
    for compute in ("exact", "int8"):
        found += [
            lambda compute=compute: torch_q4.linear(x, blocks, fmt, bias, compute=compute),
            lambda compute=compute: torch_q4.linear(x, packed, fmt, compute=compute, packed=True),
            lambda compute=compute: torch_q4.linear(
                half, packed, fmt, compute=compute, packed=True
            ),
            lambda compute=compute: torch_q4.linear(few, wide, fmt, compute=compute),
        ]
    return found


def check(fmt: formats.Format) -> int:
    work = calls(fmt)
    torch.set_num_threads(1)
    wanted = [call() for call in work]
    failures: list[str] = []

    def caller() -> None:
        for number, (call, values) in enumerate(zip(work, wanted, strict=True)):
            # Where K is split, its parts are added up in another order.
            if not torch.allclose(call().float(), values.float(), rtol=1e-3, atol=1e-3):
                failures.append(f"{fmt.name}: call {number} gives other values on several threads")

    torch.set_num_threads(4)
    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return len(work)


def main() -> None:
    torch.manual_seed(0)
    total = sum(check(fmt) for fmt in formats.all() if fmt.quantizes)
    print(f"threads: {total} calls by {CALLERS} callers agree, {torch_q4.cpu_isa()}")


if __name__ == "__main__":
    main()
