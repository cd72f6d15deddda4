"""The two tables agree, and the references and kernels decode golden bytes as ggml does."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from conftest import ALL_FORMATS, gguf_kind, golden, same_bits

import torch_q4
from torch_q4 import formats

KINDS = ("", "imatrix_", "raw_")


def test_tables_agree() -> None:
    lines = torch.ops.torch_q4.format_table().splitlines()
    cpp = [tuple(line.split()) for line in lines]
    python = [
        (fmt.name, str(fmt.type_id), str(fmt.block_elems), str(fmt.block_bytes))
        for fmt in formats.all()
    ]
    assert set(cpp) == set(python)
    assert cpp == python, "both list the formats in the same order"
    assert python


def test_the_foundation_formats_are_there() -> None:
    wanted = "q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k q4_0_f32".split()  # noqa: SIM905
    assert {fmt.name for fmt in formats.all()} >= set(wanted)


def test_table_matches_gguf_package(ggml_fmt) -> None:
    kind = gguf_kind(ggml_fmt)
    assert kind.name.lower() == ggml_fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (ggml_fmt.block_elems, ggml_fmt.block_bytes)


def test_get_accepts_names_numbers_and_gguf_types(ggml_fmt) -> None:
    number = ggml_fmt.type_id
    for spelling in (ggml_fmt.name, ggml_fmt.name.upper(), number, ggml_fmt):
        assert formats.get(spelling) is ggml_fmt
    kind = gguf_kind(ggml_fmt)
    for spelling in (kind.name, kind):
        assert formats.get(spelling) is ggml_fmt


@pytest.mark.parametrize("wrong", ["q9_9", "", 1234, -1])
def test_unknown_format_lists_the_known(wrong) -> None:
    with pytest.raises(ValueError, match=r"must be one of q4_0, .*q6_k.*got") as error:
        formats.get(wrong)
    assert all(fmt.name in str(error.value) for fmt in ALL_FORMATS)


@pytest.mark.parametrize("wrong", [None, 2.0, True, torch.float32])
def test_format_of_wrong_type(wrong) -> None:
    with pytest.raises(TypeError, match="must be a name, a ggml type or its number, got"):
        formats.get(wrong)


def test_row_bytes_and_columns_are_inverse(fmt) -> None:
    assert fmt.columns(fmt.row_bytes(512)) == 512
    with pytest.raises(ValueError, match=f"multiple of {fmt.block_elems}, got {512 + 1}"):
        fmt.row_bytes(513)
    with pytest.raises(ValueError, match=f"multiple of {fmt.block_bytes}, got"):
        fmt.columns(fmt.block_bytes + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_matches_golden(ggml_fmt, kind) -> None:
    if f"{ggml_fmt.name}_{kind}blocks" not in golden() and not ggml_fmt.quantizes:
        pytest.skip("ggml quantises to it with an importance matrix only")
    blocks = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}blocks"])
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}values"])
    got = ggml_fmt.reference(blocks.unflatten(-1, (-1, ggml_fmt.block_bytes))).flatten(-2)
    assert same_bits(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_matches_golden(ggml_fmt, kind) -> None:
    if f"{ggml_fmt.name}_{kind}blocks" not in golden() and not ggml_fmt.quantizes:
        pytest.skip("ggml quantises to it with an importance matrix only")
    blocks = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}blocks"])
    wanted = torch.from_numpy(golden()[f"{ggml_fmt.name}_{kind}values"])
    assert same_bits(torch_q4.dequantize(blocks, ggml_fmt), wanted)


def test_dequantize_matches_reference_on_random_bytes(fmt) -> None:
    for rows, count in ((1, 1), (3, 5), (7, 64), (2, 0), (0, 4)):
        blocks = torch.randint(0, 256, (rows, count * fmt.block_bytes), dtype=torch.uint8)
        split = blocks.unflatten(-1, (count, fmt.block_bytes)) if count else None
        wanted = fmt.reference(split).flatten(-2) if split is not None else torch.empty(rows, 0)
        assert same_bits(torch_q4.dequantize(blocks, fmt), wanted)


def test_dequantize_rounds_to_nearest_even(fmt, dtype) -> None:
    blocks = torch.randint(0, 256, (5, 8 * fmt.block_bytes), dtype=torch.uint8)
    wanted = torch_q4.dequantize(blocks, fmt).to(dtype)
    torch.testing.assert_close(
        torch_q4.dequantize(blocks, fmt, dtype), wanted, rtol=0, atol=0, equal_nan=True
    )


def test_dequantize_takes_any_strides_and_dimensions(fmt) -> None:
    blocks = torch.randint(0, 256, (4, 6, 2 * fmt.block_bytes), dtype=torch.uint8)
    whole = torch_q4.dequantize(blocks, fmt)
    assert whole.shape == (4, 6, 2 * fmt.block_elems)
    part = torch_q4.dequantize(blocks[::2, 1::3], fmt)
    torch.testing.assert_close(part, whole[::2, 1::3], rtol=0, atol=0, equal_nan=True)
    swapped = torch_q4.dequantize(blocks.transpose(0, 1), fmt)
    torch.testing.assert_close(swapped, whole.transpose(0, 1), rtol=0, atol=0, equal_nan=True)
    flat = torch_q4.dequantize(blocks[0, 0], fmt)
    torch.testing.assert_close(flat, whole[0, 0], rtol=0, atol=0, equal_nan=True)


def test_q4_0_f32_by_hand() -> None:
    block = np.zeros(20, dtype=np.uint8)
    block[:4] = np.frombuffer(np.float32(0.5).tobytes(), dtype=np.uint8)
    block[4:] = np.arange(16) | (15 - np.arange(16)) << 4
    values = torch_q4.dequantize(torch.from_numpy(block), "q4_0_f32")
    wanted = torch.stack([torch.arange(16), 15 - torch.arange(16)], dim=1).flatten()
    assert torch.equal(values, 0.5 * (wanted - 8.0))
