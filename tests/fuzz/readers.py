"""A fuzzer for each reader: a file that is right, or one that is damaged on purpose.

A right file must load and be what it was made from. A damaged one either loads, and then all of it
can be read and written again; or it is refused with an exception that the reader documents.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from damage import Numbers, change_bytes, json_text, number
from torch import nn

import torch_q4
from torch_q4 import _tune, formats
from torch_q4.convert import compare_files
from torch_q4.gguf import _BLOCKS, GGUFError, GGUFFile, GGUFOpaque, GGUFTensor
from torch_q4.importance import load_importance

GGML_FORMATS = [fmt for fmt in formats.all() if fmt.type_id >= 0]
PLAIN = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32,
    27: torch.int64, 28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
# Types that there is no format for: ggml's, with the elements and bytes of a block, and others.
OPAQUE = {
    number: sizes for number, (_, *sizes) in _BLOCKS.items()
    if number not in {fmt.type_id for fmt in GGML_FORMATS}
}  # fmt: skip
UNSIZED = (4, 31, 43, 255, 999, 2**31, 2**32 - 2, 2**32 - 1)
LOADED, REFUSED = "loaded", "refused"


def refusal(load: Callable[[], Any], kinds: tuple[type[Exception], ...], *ops: str) -> Any:
    """What ``load`` gives, or None if it refuses as it should: such an exception, in words of ours.

    An OSError's words are the system's.
    """
    try:
        return load()
    except OSError:
        if OSError not in kinds:
            raise
    except kinds as error:
        words = str(error)
        if type(error) is not RuntimeError:  # whose words may be torch's, as of load_state_dict
            assert words.partition(": ")[0] in ops, words
            assert "got" in words, words
        assert len(words) < 10_000, f"{len(words)} characters of message"
    return None


def read_all(tensor: GGUFTensor) -> int:
    """Every byte of a tensor, and its values, if there is a format for them."""
    if isinstance(tensor.format, GGUFOpaque):
        words = ""
        try:
            tensor.dequantize()
        except GGUFError as error:
            words = str(error)
        assert repr(tensor.name) in words, words
        assert str(tensor.format) in words, words
        assert tensor.nbytes == tensor.format.nbytes
        return int(tensor.data.long().sum())
    values = tensor.dequantize()
    assert values.dtype == torch.float32
    assert tuple(values.shape) == tensor.shape, (values.shape, tensor.shape)
    assert tensor.nbytes == tensor.data.nbytes
    values.double().sum().item()
    return int(tensor.data.contiguous().view(-1).view(torch.uint8).long().sum())


def same_tensors(
    got: dict[str, GGUFTensor], wanted: dict[str, GGUFTensor], padding: int = 0
) -> None:
    """``padding`` is how many zeros more a tensor may have whose size nobody knows."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = got[name]
        if isinstance(tensor.format, GGUFOpaque) and not tensor.format.sized:
            more = other.data[tensor.nbytes :]
            assert len(more) <= padding
            assert not more.any()
            other = GGUFTensor(
                name, GGUFOpaque(other.format.type_id, other.nbytes - len(more)), other.shape,
                other.data[: tensor.nbytes],
            )  # fmt: skip
        assert (other.format, other.shape, other.dtype) == (
            tensor.format, tensor.shape, tensor.dtype,
        )  # fmt: skip
        ours, theirs = (t.data.contiguous().view(-1).view(torch.uint8) for t in (tensor, other))
        assert torch.equal(ours, theirs), name


# ---- GGUF ----------------------------------------------------------------------------------------

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip
RANGES = {"B": (0, 255), "b": (-128, 127), "H": (0, 65535), "h": (-32768, 32767),
          "I": (0, 2**32 - 1), "i": (-(2**31), 2**31 - 1), "Q": (0, 2**64 - 1),
          "q": (-(2**63), 2**63 - 1)}  # fmt: skip


def text(rng: random.Random) -> bytes:
    return rng.choice((b"", b"a", "é€😀".encode(), b"x" * rng.randrange(100), b"blk.0.ffn"))


def scalar(rng: random.Random, code: str) -> Any:
    if code == "?":
        return rng.random() < 0.5
    if code in "fd":
        return rng.choice((0.0, -1.5, 1e-5, math.inf, 3e38))
    return rng.randint(*RANGES[code])


def add_value(rng: random.Random, out: Numbers, kind: int) -> None:
    if kind in SCALARS:
        out.add(SCALARS[kind], scalar(rng, SCALARS[kind]))
    elif kind == 8:
        out.string(text(rng))
    else:
        element = rng.choice((*SCALARS, 8))  # and never an array
        count = rng.choice((0, 1, 3, 40))
        out.add("I", element)
        out.add("Q", count)
        for _ in range(count):
            add_value(rng, out, element)


FLAWS = (
    "same key", "same tensor", "overlap", "unaligned", "alignment", "dimensions", "product", "zero",
    "type", "nesting", "far", "name", "architecture", "many", "columns",
)  # fmt: skip


def gguf_bytes(
    rng: random.Random, flaw: str | None, suffixes: tuple[str, ...] = ("",), *,
    part: tuple[str, int, list[tuple[bytes, int, Any]]] | None = None,
) -> Numbers:  # fmt: skip
    """A GGUF file of random keys and tensors, right but for the flaw.

    ``part`` makes it that of a whole: how its tensors' names begin, their number, and its keys.
    """
    alignment = rng.choice((None, None, None, 8, 32, 64, 1024))
    keys: list[tuple[bytes, int, Any]] = [
        (f"key.{i}".encode(), rng.choice((*SCALARS, 8, 9, 9)), None)
        for i in range(rng.randrange(6))
    ]
    if part is not None:
        keys += part[2]
    elif rng.random() < 0.5:
        keys.append((b"general.architecture", 8, b"llama"))
    if alignment is not None:
        keys.append((b"general.alignment", 4, alignment))
    if flaw == "alignment":
        kind, value = rng.choice((
            (4, 0), (4, 3), (4, 48), (10, 2**40), (10, 2**63), (5, -32), (5, -(2**31)), (11, -1),
            (6, 32.0), (7, True), (8, b"32"), (0, 1), (0, 2), (4, 2**31), (4, 1), (10, 2**20),
        ))  # fmt: skip
        keys.append((b"general.alignment", kind, value))
    if flaw == "architecture":
        keys.append((b"general.architecture", *rng.choice(((4, 7), (8, b"\xff\xfe"), (8, b"")))))
    if flaw == "same key" and keys:
        keys.append(rng.choice(keys))
    if flaw == "many":
        keys.append((b"many", 9, None))
    rng.shuffle(keys)

    tensors: list[list[Any]] = []  # name, dimensions, type, bytes
    stem, count = part[:2] if part is not None else ("blk", rng.randrange(1 if flaw else 0, 5))
    for i in range(count):
        for suffix in suffixes:
            if suffix == "" and rng.random() < 0.25:
                tensors.append([f"{stem}.{i}".encode(), *opaque(rng)])
                continue
            fmt = rng.choice(GGML_FORMATS) if rng.random() < 0.5 and suffix == "" else None
            rest = [rng.randrange(1, 5) for _ in range(rng.randrange(4 if fmt is None else 3))]
            if fmt is not None:
                columns = fmt.block_elems * rng.randrange(1, 4)
                size = math.prod(rest) * fmt.row_bytes(columns)
                dims, kind = [columns, *rest], fmt.type_id
            else:
                dims = (
                    [rng.randrange(1, 70), *rest] if rng.random() < 0.95 and len(rest) < 4 else []
                )
                kind = rng.choice(list(PLAIN)) if suffix == "" else 0
                if suffix == ".counts":
                    dims = [1]
                size = math.prod(dims) * PLAIN[kind].itemsize
            tensors.append([f"{stem}.{i}{suffix}".encode(), dims, kind, size])
    if tensors and flaw in (
        "same tensor",
        "dimensions",
        "product",
        "zero",
        "type",
        "name",
        "columns",
    ):
        tensor = rng.choice(tensors)
        if flaw == "same tensor":
            tensors.append(list(tensor))
        elif flaw == "dimensions":
            tensor[1] = tensor[1] + [1] * rng.choice((1, 2, 3, 5, 40))
        elif flaw == "product":
            tensor[1] = [
                rng.choice((2**31, 2**32, 2**62, 2**63)) for _ in range(rng.randrange(1, 5))
            ]
        elif flaw == "zero":
            tensor[1] = [0] * rng.randrange(1, 5) if rng.random() < 0.5 else [*tensor[1][:-1], 0]
        elif flaw == "type":
            tensor[2] = rng.choice((4, 5, 9, 15, 31, 39, 41, 42, 255, 2**31, 2**32 - 1))
        elif flaw == "columns":
            tensor[1] = [rng.randrange(1, 300), *tensor[1][1:]]
        else:
            tensor[0] = rng.choice((b"", b"\xff", b"\xed\xa0\x80", b"a\x00b", b"n" * 5000, b"\n"))

    out = Numbers()
    out.data += b"GGUF"
    out.add("I", rng.choice((2, 3, 3)))
    out.add("Q", len(tensors))
    out.add("Q", len(keys))
    used = 32
    for key, kind, value in keys:
        out.string(key)
        out.add("I", kind)
        if key == b"general.alignment" and kind in (0, 4, 10):
            used = value if value and not value & (value - 1) and value <= 4096 else 32
        if key == b"many":
            element = rng.choice((0, 1, 7))
            out.add("I", element)
            out.add("Q", 200_000)
            out.data += bytes(200_000)
        elif value is None:
            add_value(rng, out, kind)
        elif kind == 8:
            out.string(value)
        else:
            out.add(SCALARS[kind], value)
    if flaw == "nesting":
        out.data[16:24] = struct.pack("<Q", len(keys) + 1)
        out.string(b"nested")
        out.add("I", 9)
        for _ in range(rng.choice((1, 3, 4, 5, 30, 3000))):
            out.add("I", 9)
            out.add("Q", 1)
        out.add("I", 0)
        out.add("Q", 0)
    offsets, offset = [], 0
    for tensor in tensors:
        offsets.append(offset)
        offset += tensor[3] + -tensor[3] % used
    if tensors and flaw in ("overlap", "unaligned", "far"):
        at = rng.randrange(len(tensors))
        offsets[at] = {
            "overlap": rng.choice(offsets), "unaligned": offsets[at] + rng.randrange(1, 8),
            "far": rng.choice((offset, offset + used, 2**40, 2**63, 2**64 - used)),
        }[flaw]  # fmt: skip
    for (name, dims, kind, _), start in zip(tensors, offsets, strict=True):
        out.string(name)
        out.add("I", len(dims))
        for dim in dims:
            out.add("Q", dim)
        out.add("I", kind)
        out.add("Q", start)
    if tensors:
        out.data += bytes(-len(out.data) % used)
    # Blocks and numbers of any bits, scales that are infinite or NaN among them.
    padding = -tensors[-1][3] % used if tensors and rng.random() < 0.3 else 0
    out.data += rng.randbytes(offset - padding)
    return out


def opaque(rng: random.Random) -> tuple[list[int], int, int]:
    """Dimensions, type and bytes of a tensor of a type that there is no format for."""
    rest = [rng.randrange(1, 4) for _ in range(rng.randrange(4))]
    if rng.random() < 0.5:
        return [*rest, rng.randrange(1, 9)], rng.choice(UNSIZED), rng.randrange(1, 300)
    kind = rng.choice(list(OPAQUE))
    block_elems, block_bytes = OPAQUE[kind]
    blocks = rng.randrange(1, 3)
    return [blocks * block_elems, *rest], kind, blocks * math.prod(rest) * block_bytes


def damaged_gguf(rng: random.Random, suffixes: tuple[str, ...] = ("",)) -> tuple[bytes, bool]:
    """A file, and whether it is right."""
    kind = rng.random()
    if kind < 0.1:
        return bytes(gguf_bytes(rng, None, suffixes).data), True
    if kind < 0.35:
        return bytes(gguf_bytes(rng, rng.choice(FLAWS), suffixes).data), False
    if kind < 0.4:  # two files spliced
        one, two = (gguf_bytes(rng, None, suffixes).data for _ in range(2))
        return bytes(one[: rng.randrange(len(one))] + two[rng.randrange(len(two)) :]), False
    flaw = rng.choice(FLAWS) if kind < 0.5 else None
    return gguf_bytes(rng, flaw, suffixes).damaged(rng), False


def check_gguf(file: GGUFFile, folder: Path, padding: int = 0) -> None:
    """All of a file that loaded, and that writing it gives a file that holds the same."""
    repr(file)
    places = []
    for tensor in file.tensors.values():
        read_all(tensor)
        start = tensor.data.data_ptr()
        places.append((start, start + tensor.nbytes))
    places.sort()
    for (_, end), (start, _) in itertools.pairwise(places):
        assert end <= start, "two tensors overlap"
    copies = [folder / "copy.gguf", folder / "again.gguf"]
    torch_q4.save_gguf(copies[0], file.tensors, file)
    second = torch_q4.load_gguf(copies[0])
    assert repr(second.metadata) == repr(file.metadata)  # not `==`: NaN
    assert second.alignment == file.alignment
    same_tensors(second.tensors, file.tensors, padding)
    torch_q4.save_gguf(copies[1], second.tensors, second)
    assert copies[0].read_bytes() == copies[1].read_bytes()
    if file.tensors:
        found = compare_files(*copies, progress=False)
        assert all(error.max_error == 0 for error in found.tensors)
        assert all(error.different == 0 for error in found.opaque)
        assert len(found.tensors) + len(found.opaque) == len(file.tensors)


def gguf(rng: random.Random, folder: Path) -> str:
    data, right = damaged_gguf(rng)
    path = folder / "file.gguf"
    path.write_bytes(data)
    file = refusal(lambda: torch_q4.load_gguf(path), (OSError, ValueError), "load_gguf")
    assert file is not None or not right, "a file without a flaw is refused"
    if file is None:
        return REFUSED
    check_gguf(file, folder)
    return LOADED


# ---- GGUF in parts -------------------------------------------------------------------------------

# Of the parts, those that are always refused first, and those that may still be right.
WRONG = ("missing", "swapped", "same tensor", "names")
MAYBE_WRONG = ("damaged", "no", "count", "tensors.count", "architecture")


def split(rng: random.Random, folder: Path) -> str:
    """A file in parts, opened by any of them; one of the parts damaged, or not that of the file."""
    whole = folder / "parts"
    whole.mkdir(exist_ok=True)
    for path in whole.iterdir():
        path.unlink()
    kind = rng.random()
    flaw = None if kind < 0.3 else rng.choice(WRONG if kind < 0.55 else MAYBE_WRONG)
    count = rng.choice((2, 2, 3, 5))
    numbers = [rng.randrange(4) for _ in range(count)]
    if flaw == "same tensor":
        numbers = [max(number, 1) for number in numbers]
    at = rng.randrange(count)
    # So that no other rule than the one that is broken refuses the parts.
    total = max(numbers) if flaw == "same tensor" else sum(numbers)
    parts = []
    for n in range(count):
        keys: dict[bytes, tuple[int, Any]] = {
            b"split.no": (2, n),
            b"split.count": (2, count),
            b"split.tensors.count": (5, total),
        }
        if n == 0 or flaw in ("architecture", "swapped"):
            names = (b"llama", b"qwen2") if flaw == "architecture" else (b"llama",)
            keys[b"general.architecture"] = 8, rng.choice(names)
        if n == at and flaw in ("no", "count", "tensors.count"):
            keys[f"split.{flaw}".encode()] = rng.choice((
                (8, b"1"), (9, None), (5, -1), (10, 2**40), (10, 2**63), (11, -(2**63)), (6, 1.0),
                (7, True), (4, 0), (4, 1), (4, 2), (2, 65535), (12, math.nan),
            ))  # fmt: skip
        stem = "part" if flaw == "same tensor" else f"part.{n}"
        listed = [(key, *value) for key, value in keys.items()]
        out = gguf_bytes(rng, None, part=(stem, numbers[n], listed))
        parts.append(out.damaged(rng) if n == at and flaw == "damaged" else bytes(out.data))
    if flaw == "swapped":
        parts[0], parts[-1] = parts[-1], parts[0]
    named = count + 1 if flaw == "names" else count
    paths = [whole / f"m-{n + 1:05}-of-{named:05}.gguf" for n in range(count)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    if flaw == "missing":
        paths[at].unlink()
    path = rng.choice(paths)
    file = refusal(lambda: torch_q4.load_gguf(path), (OSError, ValueError), "load_gguf")
    if file is None:
        assert flaw is not None, "parts without a flaw are refused"
        return REFUSED
    assert flaw not in WRONG, f"parts are not refused: {flaw}"
    if len(file.parts) > 1:
        assert [*map(str, paths)] == list(file.parts)
        assert len(file.tensors) == sum(numbers) or flaw == "damaged"
        assert not any(key.startswith("split.") for key in file.metadata)
        for other in paths:
            again = torch_q4.load_gguf(other)
            assert repr(again.metadata) == repr(file.metadata)
            same_tensors(again.tensors, file.tensors)
    check_gguf(file, folder, file.alignment)
    return LOADED


# ---- importance matrices -------------------------------------------------------------------------


def check_importance(path: Path, right: bool, folder: Path) -> str:
    found = refusal(lambda: load_importance(path), (OSError, ValueError), "load_importance")
    assert found is not None or not right, "a file without a flaw is refused"
    if found is None:
        return REFUSED
    repr(found)
    for name in found:
        means = found[name]
        assert means.dtype == torch.float32
        assert means.shape == found.sums[name].shape
        assert not bool((means < 0).any())
    found.save(folder / "copy.gguf")
    again = load_importance(folder / "copy.gguf")
    assert set(again) == set(found)
    for name in found:
        assert torch.equal(again.sums[name], found.sums[name])
        assert torch.equal(again.counts[name], found.counts[name])
    assert (again.datasets, again.chunks) == (found.datasets, found.chunks)
    return LOADED


def imatrix_gguf(rng: random.Random, folder: Path) -> str:
    path = folder / "imatrix.gguf"
    if rng.random() < 0.5:
        names = [f"blk.{i}.weight" for i in range(rng.randrange(1, 4))]
        experts = rng.choice((1, 1, 2))
        found = torch_q4.Importance(
            {name: torch.rand(8 * experts) for name in names},
            {name: torch.full((experts,), float(rng.randrange(9))) for name in names},
            ("set",), rng.randrange(5), 512,
        )  # fmt: skip
        found.save(path)
        data = bytearray(path.read_bytes())
        right = rng.random() < 0.2
        for _ in range(0 if right else rng.randrange(1, 3)):
            if rng.random() < 0.5 and len(data) > 8:
                place = rng.randrange(0, len(data) - 8)
                old = int.from_bytes(data[place : place + 8], "little")
                new = number(rng, old, len(data)) & 2**64 - 1
                data[place : place + 8] = new.to_bytes(8, "little")
            else:
                data = change_bytes(rng, data)
        path.write_bytes(data)
    else:
        data, _ = damaged_gguf(rng, (".in_sum2", ".counts"))
        right = False  # its numbers are any
        path.write_bytes(data)
    return check_importance(path, right, folder)


def imatrix_dat(rng: random.Random, folder: Path) -> str:
    out, entries = Numbers(), rng.randrange(1, 5)
    out.add("i", entries)
    for i in range(entries):
        out.string(f"blk.{i}.weight".encode(), "i")
        count = rng.randrange(1, 20)
        out.add("i", rng.randrange(1, 9))
        out.add("i", count)
        for _ in range(count):
            out.add("f", rng.random())
    if rng.random() < 0.7:
        out.add("i", rng.randrange(9))
        if rng.random() < 0.7:
            out.string(b"set of data", "i")
    right = rng.random() < 0.15
    path = folder / "imatrix.dat"
    path.write_bytes(bytes(out.data) if right else out.damaged(rng))
    return check_importance(path, right, folder)


# ---- safetensors ---------------------------------------------------------------------------------

CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES_OF = {dtype: code for code, dtype in CODES.items()}


def random_tensors(rng: random.Random, prefix: str = "") -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for i in range(rng.randrange(1, 5)):
        rows = rng.randrange(1, 4)
        if rng.random() < 0.5:
            fmt = rng.choice(formats.all())
            raw = bytearray(rng.randbytes(rows * fmt.row_bytes(fmt.block_elems * 2)))
            blocks = torch.frombuffer(raw, dtype=torch.uint8).view(rows, -1)
            tensors[f"{prefix}{i}.weight"] = (blocks, fmt)
        else:
            dtype = rng.choice(list(CODES_OF))
            tensors[f"{prefix}{i}.bias"] = torch.arange(rows * 6).view(rows, 6).to(dtype)
    return tensors


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The file with its header's JSON changed, its length, or any bytes."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], bytearray(data[8 + length :])
    if rng.random() < 0.8:
        header = json_text(rng, json.loads(header), damaged=True)
    if rng.random() < 0.1:
        rest = change_bytes(rng, rest)
    length = len(header)
    if rng.random() < 0.05:
        length = number(rng, length, len(header) + len(rest)) & 2**64 - 1
    return length.to_bytes(8, "little") + header + bytes(rest)


def check_safetensors(path: Path, folder: Path) -> str:
    file = refusal(
        lambda: torch_q4.load_safetensors(path), (OSError, ValueError), "load_safetensors"
    )
    if file is None:
        return REFUSED
    repr(file)
    for tensor in file.tensors.values():
        if tensor.dtype in CODES_OF and not tensor.data.is_complex():
            read_all(tensor)
    for name, source in file.ties.items():
        assert isinstance(name, str)
        assert source in file.tensors
    if any(tensor.dtype not in CODES_OF for tensor in file.tensors.values()):
        return "loaded, of a dtype that is not written"
    if any(not isinstance(value, str) for value in file.metadata.values()):
        raise AssertionError("metadata must be strings")
    copy = folder / "copy.safetensors"
    torch_q4.save_safetensors(copy, file.tensors, file.metadata)
    again = torch_q4.load_safetensors(copy)
    same_tensors(again.tensors, file.tensors)
    assert again.ties == file.ties
    return LOADED


def safetensors(rng: random.Random, folder: Path) -> str:
    path = folder / "file.safetensors"
    tensors = random_tensors(rng)
    notes = {"note": "é"}
    if rng.random() < 0.5:
        notes["torch_q4.ties"] = json.dumps({"tied": next(iter(tensors))})
    torch_q4.save_safetensors(path, tensors, notes)
    if rng.random() < 0.1:
        assert check_safetensors(path, folder) == LOADED
        return LOADED
    path.write_bytes(damaged_safetensors(rng, path.read_bytes()))
    return check_safetensors(path, folder)


def shards(rng: random.Random, folder: Path) -> str:
    """A folder of two shards and their index, one of the three damaged."""
    whole = folder / "shards"
    whole.mkdir(exist_ok=True)
    for path in whole.iterdir():
        path.unlink()
    weights: dict[str, str] = {}
    for prefix in ("a", "b"):
        tensors = random_tensors(rng, prefix)
        torch_q4.save_safetensors(whole / f"{prefix}.safetensors", tensors)
        weights.update(dict.fromkeys(tensors, f"{prefix}.safetensors"))
    index: Any = {"metadata": {"total_size": 7}, "weight_map": weights}
    which = rng.random()
    path = whole / "model.safetensors.index.json"
    path.write_bytes(json_text(rng, index, damaged=which < 0.7))
    if 0.7 <= which < 0.9:
        shard = whole / "a.safetensors"
        shard.write_bytes(damaged_safetensors(rng, shard.read_bytes()))
    outcome = check_safetensors(whole, folder)
    assert outcome == LOADED or which < 0.9, "a folder without a flaw is refused"
    return outcome


# ---- checkpoints ---------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    model = nn.Sequential(
        nn.Embedding(20, 64), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64),
        nn.Linear(64, 20, bias=False),
    )  # fmt: skip
    return model


@functools.cache
def checkpoints() -> tuple[bytes, ...]:
    """Files of the model: quantised, tied, partly quantised, plain."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        for kind in range(4):
            torch.manual_seed(kind)
            model = small_model()
            if kind < 3:
                keep = (lambda module, name: name != "1") if kind == 2 else None
                torch_q4.quantize_(model, "q8_0" if kind == 1 else "q4_0", filter_fn=keep)
            if kind == 1:
                model[4].blocks, model[4].packed = model[0].blocks, model[0].packed
            torch_q4.save_checkpoint(model, path)
            found.append(path.read_bytes())
    return tuple(found)


def checkpoint(rng: random.Random, folder: Path) -> str:
    right = rng.random() < 0.1
    data = rng.choice(checkpoints())
    path = folder / "model.safetensors"
    path.write_bytes(data if right else damaged_safetensors(rng, data))
    torch.manual_seed(0)
    on_meta = rng.random() < 0.3
    with torch.device("meta" if on_meta else "cpu"):
        model = small_model()
    if rng.random() < 0.3 and not on_meta and not right:
        torch_q4.quantize_(model, rng.choice(("q4_0", "q8_0")))
    options = {
        "strict": rng.random() < 0.7,
        "assign": rng.random() < 0.3,
        "pack": rng.random() < 0.7,
    }
    before = refusal(
        lambda: torch_q4.load_checkpoint(model, path, **options) or model,
        (OSError, ValueError, RuntimeError), "load_checkpoint", "load_safetensors",
    ) if not right else torch_q4.load_checkpoint(model, path, **options) or model  # fmt: skip
    if before is None:
        return REFUSED
    if any(value.is_meta for value in model.state_dict().values()):
        assert not options["strict"], "loaded strictly, and still without data"
        return "loaded in part"
    with torch.no_grad():
        y = model(torch.tensor([[0, 19, 3]]))
    assert y.shape == (1, 3, 20)
    torch_q4.save_checkpoint(model, folder / "copy.safetensors")
    torch_q4.load_checkpoint(model, folder / "copy.safetensors")
    return LOADED


# ---- the tuner's file ----------------------------------------------------------------------------

PLAN = {
    "device": "GPU", "architecture": "sm_90", "torch_q4": torch_q4.__version__, "format": "q4_k",
    "dtype": "float16", "packed": True, "n": 4096, "k": 4096, "plan": [[1, "rows"], [64, "blas"]],
}  # fmt: skip


def tune(rng: random.Random, folder: Path) -> str:
    """No file breaks the first product; a plan is added to a good file and never to a bad one."""
    path = folder / "tune.json"
    right = rng.random() < 0.1
    plans = [{**PLAN, "n": 256 * (i + 1)} for i in range(rng.randrange(1, 4))]
    tree = {"torch_q4_plans": 1, "plans": plans}
    data = json_text(rng, tree, damaged=not right)
    path.write_bytes(data)
    followed: list[Any] = []
    _tune._cache_file = lambda: path
    _tune._identity = lambda index: ("GPU", "sm_90")
    _tune._Saved.follow = lambda self, index: followed.append(self)  # there is no GPU
    _tune._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _tune._load_linear_plans(0)
    assert bool(followed) or bool(caught) or not right
    assert len(caught) <= 1
    for plan in followed:
        assert plan.key
        assert all(type(m) is int for m, _ in plan.plan)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _tune._save(_tune._Saved.from_json({**PLAN, "n": 1 << 20}))
    if told:
        assert path.read_bytes() == data, "a file that could not be used was changed"
        return REFUSED
    saved = json.loads(path.read_bytes())
    assert sum(entry["n"] == 1 << 20 for entry in saved["plans"]) == 1
    assert len(_tune._read(path)) == len(saved["plans"]) >= len(followed)
    return LOADED


# ---- folders of transformers ---------------------------------------------------------------------


@functools.cache
def pretrained_folder() -> dict[str, bytes]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from torch_q4.integrations.gguf_export import save_pretrained

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch_q4.quantize_(model, "q4_0")
    with tempfile.TemporaryDirectory() as name:
        save_pretrained(model, name)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def pretrained(rng: random.Random, folder: Path) -> str:
    """A damaged config beside weights that are right, now and then the other way round."""
    from torch_q4.integrations.gguf_export import load_pretrained

    whole = folder / "pretrained"
    whole.mkdir(exist_ok=True)
    which = rng.random()
    for name, data in pretrained_folder().items():
        damaged = name == "config.json" if which < 0.75 else name.startswith("gen") and which > 0.9
        if damaged:
            data = json_text(rng, json.loads(data), damaged=True)
        elif name == "model.safetensors" and 0.75 <= which < 0.85:
            data = damaged_safetensors(rng, data)
        (whole / name).write_bytes(data)
    right = 0.85 <= which <= 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = refusal(
            lambda: load_pretrained(whole), (OSError, ValueError, RuntimeError),
            "load_pretrained", "load_checkpoint", "load_safetensors",
        )  # fmt: skip
    if loaded is None:
        assert not right, "a folder without a flaw is refused"
        return REFUSED
    model, _ = loaded
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    return LOADED


FUZZERS = {
    "gguf": gguf,
    "split": split,
    "imatrix_gguf": imatrix_gguf,
    "imatrix_dat": imatrix_dat,
    "safetensors": safetensors,
    "shards": shards,
    "checkpoint": checkpoint,
    "tune": tune,
    "pretrained": pretrained,
}
