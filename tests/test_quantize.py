"""quantize: ggml's bytes, whatever the shape, the dtype and the number of threads."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quantize_cases
import torch
from conftest import ALL_FORMATS, dense64, golden
from torch.fx.experimental.proxy_tensor import make_fx

import torch_q4

TESTS = Path(__file__).parent

pytestmark = pytest.mark.quantises


def test_matches_golden(ggml_fmt) -> None:
    x = torch.from_numpy(golden()["x"])
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_blocks"])
    assert torch.equal(torch_q4.quantize(x, ggml_fmt), wanted)


def test_matches_golden_with_importance(ggml_fmt) -> None:
    x = torch.from_numpy(golden()["x"])
    importance = torch.from_numpy(golden()["imatrix"])
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_imatrix_blocks"])
    assert torch.equal(torch_q4.quantize(x, ggml_fmt, importance), wanted)


def blocks_of_cases(isa: str, path: Path) -> dict[Any, torch.Tensor]:
    """The blocks of all of quantize_cases, made by one instruction set's quantisers."""
    done = subprocess.run(
        [sys.executable, TESTS / "quantize_cases.py", path], capture_output=True, text=True,
        env=dict(os.environ, TORCH_Q4_CPU_ISA=isa),
    )  # fmt: skip
    if "this CPU must have the instruction set" in done.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert done.returncode == 0, done.stderr
    used, blocks = torch.load(path)
    assert used == isa
    return dict(blocks)


@pytest.fixture(scope="module")
def row_by_row(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, torch.Tensor]:
    """What the formats' quantize_row makes of all cases: generic has no other form."""
    return blocks_of_cases("generic", tmp_path_factory.mktemp("quantize") / "generic")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avxvnni", "avx512", "amx"])
def test_every_instruction_set_makes_the_same_bytes(row_by_row, isa, tmp_path) -> None:
    for case, blocks in blocks_of_cases(isa, tmp_path / isa).items():
        differ = (blocks != row_by_row[case]).any(1)
        assert not differ.any(), f"{case}: rows {differ.nonzero().flatten().tolist()}"


def test_matches_the_ggml_that_is_installed(ggml_fmt) -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    function = getattr(library, f"quantize_{ggml_fmt.name.replace('_k', '_K')}", None)
    if function is None:
        pytest.skip(f"that ggml is older than {ggml_fmt.name}")
    function.restype = ctypes.c_size_t
    for kind, x in quantize_cases.rows().items():
        for name, importance in quantize_cases.importances(x.shape[1]).items():
            wanted = torch.empty(x.shape[0], ggml_fmt.row_bytes(x.shape[1]), dtype=torch.uint8)
            function(
                ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(wanted.data_ptr()),
                ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]),
                ctypes.c_void_p(None if importance is None else importance.data_ptr()),
            )  # fmt: skip
            differ = (torch_q4.quantize(x, ggml_fmt, importance) != wanted).any(1)
            assert not differ.any(), f"{kind}, importance {name}: {int(differ.sum())} rows"


def test_error_is_what_the_bits_allow(fmt) -> None:
    w = torch.randn(64, 1024)
    blocks = torch_q4.quantize(w, fmt)
    nmse = (dense64(blocks, fmt) - w).square().mean() / w.square().mean()
    assert 0.4 * fmt.quantize_error < nmse <= fmt.quantize_error


def test_importance_moves_the_error_where_it_counts_less(fmt) -> None:
    if not fmt.weighs_importance:
        pytest.skip(f"ggml's {fmt.name} does not weigh")
    w = torch.randn(64, 1024)
    importance = torch.where(torch.arange(1024) % 8 == 0, 100.0, 0.01)

    def weighted_error(blocks: torch.Tensor) -> float:
        return ((dense64(blocks, fmt) - w).square() * importance).sum().item()

    plain = torch_q4.quantize(w, fmt)
    weighted = torch_q4.quantize(w, fmt, importance)
    assert weighted_error(weighted) < 0.95 * weighted_error(plain)


def test_quantize_is_idempotent_on_exact_values() -> None:
    # Codes times a power of two, the extreme present in each block: nothing to round.
    w = (torch.randint(-8, 8, (4, 256)) * 0.25).float()
    w[:, ::32] = -8 * 0.25
    for name in ("q4_0", "q4_0_f32"):
        assert torch.equal(torch_q4.dequantize(torch_q4.quantize(w, name), name), w)


def test_half_inputs_are_widened_first(fmt, dtype) -> None:
    w = torch.randn(150, 512).to(dtype)  # more than are widened at a time
    assert torch.equal(torch_q4.quantize(w, fmt), torch_q4.quantize(w.float(), fmt))


def test_shapes_and_strides(fmt) -> None:
    w = torch.randn(2, 3, 512)
    blocks = torch_q4.quantize(w, fmt)
    assert blocks.shape == (2, 3, fmt.row_bytes(512))
    assert torch.equal(torch_q4.quantize(w[:, 1], fmt), blocks[:, 1])
    assert torch.equal(torch_q4.quantize(w.transpose(0, 1), fmt), blocks.transpose(0, 1))
    assert torch.equal(torch_q4.quantize(w[0, 0], fmt), blocks[0, 0])
    assert torch_q4.quantize(w[:0], fmt).shape == (0, 3, fmt.row_bytes(512))
    assert torch_q4.quantize(w[..., :0], fmt).shape == (2, 3, 0)


def test_rows_do_not_depend_on_their_neighbours(fmt) -> None:
    # Vectors take several blocks at a time: one row fills them otherwise than many do.
    importance = torch.rand(3 * fmt.block_elems) + 0.1
    w = torch.randn(37, 3 * fmt.block_elems) * torch.logspace(-3, 3, 37)[:, None]
    for weights in (None, importance):
        alone = torch.stack([torch_q4.quantize(row, fmt, weights) for row in w])
        for rows in (1, 2, 5, 16, 17, 37):
            assert torch.equal(torch_q4.quantize(w[:rows], fmt, weights), alone[:rows])


def test_threads_do_not_change_bytes(fmt) -> None:
    w = torch.randn(65, 512)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch_q4.quantize(w, fmt)
        torch.set_num_threads(4)
        assert torch.equal(torch_q4.quantize(w, fmt), one)
    finally:
        torch.set_num_threads(threads)


def test_all_zero_and_non_finite_rows_do_not_crash(fmt) -> None:
    w = torch.zeros(4, 256)
    w[1] = float("inf")
    w[2] = float("nan")
    w[3, ::3] = -float("inf")
    blocks = torch.ops.torch_q4.quantize.default(w, fmt.type_id)
    assert torch.equal(torch_q4.dequantize(blocks[0], fmt), torch.zeros(256))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_and_found(fmt, dtype, value: float) -> None:
    w = torch.randn(2, 3, 512).to(dtype)
    w[1, 0, 300] = w[1, 2, 7] = value
    with pytest.raises(ValueError, match=rf"quantize: w must be finite, got {value} at \(1, 0, 30"):
        torch_q4.quantize(w, fmt)
    with pytest.raises(ValueError, match=rf"got {value} at \(1, 1, 7\)"):
        torch_q4.quantize(w.transpose(0, 1)[1:], fmt)
    assert torch_q4.quantize(w[:1], fmt).shape == (1, 3, fmt.row_bytes(512))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_importance_must_be_a_mean_of_squares(fmt, value: float) -> None:
    importance = torch.ones(512)
    torch_q4.quantize(torch.randn(2, 512), fmt, importance)
    importance[400] = value
    words = rf"quantize: importance must be finite and not negative, got {value} at \(400,\)"
    with pytest.raises(ValueError, match=words):
        torch_q4.quantize(torch.randn(2, 512), fmt, importance)


def test_values_are_not_looked_at_where_there_are_none() -> None:
    w = torch.full((2, 64), float("nan"))

    def call(w: torch.Tensor) -> torch.Tensor:
        return torch_q4.quantize(w, "q8_0", torch.ones(64, device=w.device))

    assert call(w.to("meta")).shape == (2, 68)
    assert torch.vmap(call)(w).shape == (2, 68)
    assert torch.compile(call, fullgraph=True, backend="eager")(w).shape == (2, 68)
    for mode in ("real", "fake", "symbolic"):
        assert make_fx(call, tracing_mode=mode)(w)(w).shape == (2, 68)


@pytest.mark.parametrize("name", [fmt.name for fmt in ALL_FORMATS if not fmt.quantizes])
def test_a_format_without_a_quantiser_is_refused(name) -> None:
    words = rf"quantize: format must be one that .*llama-quantize .*; got {name}$"
    w, linear = torch.randn(2, 256), torch.nn.Linear(256, 2)
    with pytest.raises(ValueError, match=words):
        torch_q4.quantize(w, name)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.torch_q4.quantize(w, torch_q4.formats.get(name).type_id)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.torch_q4.quantize(w.to("meta"), torch_q4.formats.get(name).type_id)
    with pytest.raises(ValueError, match=words):
        torch_q4.QuantLinear.from_linear(linear, name)
    with pytest.raises(ValueError, match=r"quantize_: .*llama-quantize .*; got"):
        torch_q4.quantize_(torch.nn.Sequential(linear), name)
