"""quantize: ggml's bytes, whatever the shape, the dtype and the number of threads."""

from __future__ import annotations

import pytest
import torch
from conftest import dense64, golden
from torch.fx.experimental.proxy_tensor import make_fx

import torch_q4


def test_matches_golden(ggml_fmt) -> None:
    x = torch.from_numpy(golden()["x"])
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_blocks"])
    assert torch.equal(torch_q4.quantize(x, ggml_fmt), wanted)


def test_matches_golden_with_importance(ggml_fmt) -> None:
    x = torch.from_numpy(golden()["x"])
    importance = torch.from_numpy(golden()["imatrix"])
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_imatrix_blocks"])
    assert torch.equal(torch_q4.quantize(x, ggml_fmt, importance), wanted)


# The error that each format's number of bits allows on normally distributed weights, as mean
# squared error over the mean square; measured 0.5-0.8 of these.
NMSE = {
    "q4_0": 1e-2, "q4_1": 9e-3, "q5_0": 2.7e-3, "q5_1": 2.1e-3, "q8_0": 4e-5, "q2_k": 1.2e-1,
    "q3_k": 3.5e-2, "q4_k": 7.5e-3, "q5_k": 2e-3, "q6_k": 5e-4, "q4_0_f32": 1e-2,
}  # fmt: skip


def test_error_is_what_the_bits_allow(fmt) -> None:
    w = torch.randn(64, 1024)
    blocks = torch_q4.quantize(w, fmt)
    nmse = (dense64(blocks, fmt) - w).square().mean() / w.square().mean()
    assert nmse <= NMSE[fmt.name]


def test_importance_moves_the_error_where_it_counts_less(fmt) -> None:
    if fmt.name == "q8_0":
        pytest.skip("ggml's q8_0 has nothing to weigh")
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
    w = torch.randn(3, 512).to(dtype)
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
