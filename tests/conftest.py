"""What several test modules share: the golden vectors, random blocks, the bounds of the errors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_q4 import formats
from torch_q4.formats import Format

# Inductor's cache does not ask for which vectors its code was made: compiled for wider ones, that
# code writes past the ends of tensors. So code made under the variable that chooses vectors stays
# apart, and so do processes that run at the same time.
_KIND = os.environ.get("PYTEST_XDIST_WORKER", "main"), os.environ.get("ATEN_CPU_CAPABILITY", "any")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(
    Path(__file__).parent.parent / "build/inductor" / "-".join(_KIND)
)

GOLDEN = Path(__file__).parent / "golden" / "ggml_golden.npz"

ALL_FORMATS = formats.all()
GGML_FORMATS = [fmt for fmt in ALL_FORMATS if fmt.type_id >= 0]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument ``fmt`` runs for every format, one with ``dtype`` for every dtype.

    One that is marked ``quantises`` runs for every format with a quantiser.
    """
    quantises = metafunc.definition.get_closest_marker("quantises") is not None
    for name, found in (("fmt", ALL_FORMATS), ("ggml_fmt", GGML_FORMATS)):
        if name in metafunc.fixturenames:
            chosen = [fmt for fmt in found if fmt.quantizes or not quantises]
            metafunc.parametrize(name, chosen, ids=lambda fmt: fmt.name)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The fuzzers' long forms run only where they are asked for.

    What uses the real model goes to one process, which loads it once.
    """
    for item in items:
        if "real" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("real"))
    if "fuzz" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("fuzz")]
    items[:] = [item for item in items if not item.get_closest_marker("fuzz")]
    config.hook.pytest_deselected(items=long)


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """Every test begins with the same random numbers, and with torch's own number of threads."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as data:
        return {name.lower(): data[name] for name in data.files}


def gguf_kind(fmt: Format) -> Any:
    """The gguf package's number of a format; skips the test where that package is older."""
    gguf = pytest.importorskip("gguf")
    try:
        return gguf.GGMLQuantizationType(fmt.type_id)
    except ValueError:
        pytest.skip(f"gguf is older than {fmt.name}")


def random_blocks(fmt: Format, rows: int, columns: int, size: float = 1) -> Tensor:
    """Blocks of weights of about that size, normally distributed where there is a quantiser."""
    import torch_q4

    if fmt.quantizes:
        return torch_q4.quantize(torch.randn(rows, columns) * size, fmt)
    pool = _tame_blocks(fmt, size)
    chosen = torch.randint(len(pool), (rows, columns // fmt.block_elems))
    return pool.to(chosen.device)[chosen].flatten(-2)


@functools.cache
def _tame_blocks(fmt: Format, wanted: float) -> Tensor:
    """Blocks of random bytes, of which those stay whose values could be a model's weights."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1 << 15, fmt.block_bytes)
    blocks = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")
    size = fmt.reference(blocks).double().square().mean(-1).sqrt()
    # Of a NaN neither is true.
    found = blocks[(size > wanted / 2) & (size < wanted * 2)]
    assert len(found) > 100, fmt
    return found


def dense64(blocks: Tensor, fmt: Format) -> Tensor:
    """The weights by the reference, in float64. Not to be written to: the last ones are kept."""
    kept = _dense64(blocks.cpu().contiguous().numpy().tobytes(), blocks.shape, fmt)
    return kept.to(blocks.device)


@functools.lru_cache(maxsize=2)
def _dense64(data: bytes, shape: torch.Size, fmt: Format) -> Tensor:
    blocks = np.frombuffer(bytearray(data), dtype=np.uint8)
    split = torch.from_numpy(blocks).reshape(*shape[:-1], -1, fmt.block_bytes)
    return fmt.reference(split).flatten(-2).double()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN counting as any other."""
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool(((a.view(torch.int32) == b.view(torch.int32)) | nan).all())
