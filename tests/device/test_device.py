"""The whole of run.py under pytest, a test for each code object."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cases import COMMON
from driver import open_driver
from run import run_all, select
from session import Session
from weights import ROOT, all_formats

LIBRARY = os.environ.get("TORCH_Q4_DRIVER")

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not LIBRARY, reason="TORCH_Q4_DRIVER names no driver library"),
]


@pytest.fixture(scope="module")
def session() -> Session:
    folder = Path(os.environ.get("TORCH_Q4_KERNELS", ROOT / "torch_q4" / "kernels"))
    return Session(open_driver(str(LIBRARY)), folder, os.environ.get("TORCH_Q4_ARCH"))


@pytest.mark.parametrize("code_object", [COMMON, *all_formats()])
def test_code_object(session: Session, code_object: str) -> None:
    cases = select([code_object], [])
    results = list(run_all(session, cases, size=1, seed=0))
    failures = [str(result) for result in results if result.failure is not None]
    assert not failures, "\n".join(failures)
    assert len(results) == len(cases)
