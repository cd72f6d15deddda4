"""The whole of run.py under pytest, a test for each code object."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cases import COMMON, Case
from driver import open_driver
from run import Result, run_all, select
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


def check(session: Session, cases: list[Case]) -> list[Result]:
    results = list(run_all(session, cases, size=1, seed=0))
    failures = [str(result) for result in results if result.failure is not None]
    assert not failures, "\n".join(failures)
    assert len(results) == len(cases)
    return results


@pytest.mark.parametrize("code_object", [COMMON, *all_formats()])
def test_code_object(session: Session, code_object: str) -> None:
    check(session, [case for case in select([code_object], []) if not case.optional])


@pytest.mark.parametrize("code_object", [COMMON, *all_formats()])
def test_kernels_that_some_devices_lack(session: Session, code_object: str) -> None:
    results = check(session, [case for case in select([code_object], []) if case.optional])
    if all(result.skipped for result in results):
        pytest.skip(
            ", ".join(result.case.kernel for result in results) + " are not for this device"
        )
