"""Rows and importance at which quantisers of different make would part ways.

``python tests/quantize_cases.py FILE [SEED]`` saves the blocks that every format makes of them with
the kernels that ``TORCH_Q4_CPU_ISA`` names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from conftest import golden
from torch import Tensor

import torch_q4
from torch_q4 import formats

ROWS, COLUMNS = 35, 768  # of each kind; no number of blocks that fills vectors


def _powers(low: float, high: float) -> Tensor:
    """Magnitudes of all orders from 10 ** low to 10 ** high."""
    return 10 ** torch.empty(ROWS, COLUMNS).uniform_(low, high)


def _normal() -> Tensor:
    return torch.randn(ROWS, COLUMNS)


def _keep(share: float) -> Tensor:
    return (torch.rand(ROWS, COLUMNS) < share).float()


def _signs() -> Tensor:
    return torch.where(torch.rand(ROWS, COLUMNS) < 0.5, -1.0, 1.0)


def _zero_groups() -> Tensor:
    # Whole groups without a value between others: lanes that have ended beside lanes that go on.
    keep = (torch.rand(ROWS, COLUMNS // 16) < 0.5).repeat_interleave(16, 1)
    return _normal() * keep


KINDS: dict[str, Callable[[], Tensor]] = {
    "normal": _normal,
    "heavy tails": lambda: _normal() / _normal().abs().clamp_min(1e-3),
    "outliers": lambda: _normal() * (1 + 1000 * _keep(0.01)),
    "sparse": lambda: _normal() * _keep(0.05),
    "zero groups": _zero_groups,
    "zeros": lambda: torch.zeros(ROWS, COLUMNS),
    "zeros of both signs": lambda: 0.0 * _signs(),
    "-0.0 among others": lambda: torch.where(_keep(0.3) > 0, -0.0, _normal()),
    "positive": lambda: _normal().abs(),
    "negative": lambda: -_normal().abs(),
    "positive, far from zero": lambda: 100 + _normal(),
    "negative, almost constant": lambda: -1 - 1e-3 * _normal().abs(),
    "constant": lambda: torch.randn(ROWS, 1).expand(ROWS, COLUMNS).contiguous(),
    "equal magnitudes": lambda: _signs() * torch.rand(ROWS, 1),
    "few levels": lambda: torch.randint(-4, 5, (ROWS, COLUMNS)) / 4,
    "halves between codes": lambda: torch.randint(-127, 128, (ROWS, COLUMNS)) / 2,
    "ramps": lambda: torch.linspace(-1, 1, COLUMNS) * torch.randn(ROWS, 1),
    "tiny": lambda: 1e-6 * _normal(),
    "about negligible": lambda: _powers(-17, -14) * _signs(),
    "below negligible": lambda: 1e-20 * _normal(),
    "subnormal": lambda: 1e-40 * _normal(),
    "smallest subnormals": lambda: 1.4e-45 * torch.randint(-3, 4, (ROWS, COLUMNS)).float(),
    "large": lambda: 1e5 * _normal(),
    "huge": lambda: 1e30 * _normal(),
    "almost infinite": lambda: 3.4e38 * torch.empty(ROWS, COLUMNS).uniform_(-1, 1),
    "of all orders": lambda: _powers(-30, 30) * _signs(),
    "of many orders": lambda: _powers(-8, 4) * _signs(),
}


def rows(seed: int = 0) -> dict[str, Tensor]:
    """Each kind's rows, the same in every process."""
    torch.manual_seed(seed)
    found = {kind: make().float() for kind, make in KINDS.items()}
    return {**found, "golden": torch.from_numpy(golden()["x"])}


def importances(columns: int, seed: int = 0) -> dict[str, Tensor | None]:
    torch.manual_seed(seed)
    rand = torch.rand(columns)
    return {
        "none": None,
        "usual": rand + 0.1,
        "zeros": torch.zeros(columns),
        "zeros among others": rand * (torch.rand(columns) < 0.3),
        "zero groups": rand * (torch.rand(columns // 32) < 0.5).repeat_interleave(32),
        # With negative rows, rounding makes the scale of some fits negative, whose code wraps.
        "dominated by few": rand * torch.where(torch.rand(columns) < 1 / 24, 1e11, 1.0),
        "of all orders": 10 ** torch.empty(columns).uniform_(-25, 25),
        "huge": 3e38 * rand,
    }


def main() -> None:
    found, seed = {}, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for kind, x in rows(seed).items():
        for name, importance in importances(x.shape[1], seed).items():
            for fmt in (fmt for fmt in formats.all() if fmt.quantizes):
                found[kind, name, fmt.name] = torch_q4.quantize(x, fmt, importance)
    torch.save((torch_q4.cpu_isa(), found), sys.argv[1])


if __name__ == "__main__":
    main()
