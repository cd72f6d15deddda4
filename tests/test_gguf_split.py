"""GGUF files that are split into parts: opened as one, and parts that do not belong together."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_cli import dense_tensors, metadata
from test_gguf import F32, array, build, tensor, value

import torch_q4
from torch_q4 import GGUFError, GGUFMetadata, load_gguf, save_gguf
from torch_q4.cli import main

KEYS = ("split.no", "split.count", "split.tensors.count")


def write_with_gguf(path: Path, **kwargs: Any) -> None:
    """The gguf package's writer, which splits as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, "llama", **kwargs)
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "東京"])
    rng = np.random.default_rng(0)
    for index in range(5):
        writer.add_tensor(f"t{index}", rng.standard_normal((3, 5 + index)).astype(np.float32))
    blocks = torch_q4.quantize(torch.linspace(-1, 1, 192).view(3, 64), "q5_0").numpy()
    writer.add_tensor("packed", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write_with_gguf(tmp_path / "m.gguf", split_max_tensors=2)
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return found


def split(source: Path, stem: Path, count: int) -> list[Path]:
    """Splits a file as llama.cpp's tool does: metadata in the first part, a few tensors each."""
    file = load_gguf(source)
    names = list(file.tensors)
    paths = [Path(f"{stem}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]
    for n, path in enumerate(paths):
        keys = GGUFMetadata(file if n == 0 else None)
        for key, number, kind in zip(KEYS, (n, count, len(names)), ("uint16", "uint16", "int32"),
                                     strict=True):  # fmt: skip
            keys.set(key, number, kind)
        chosen = names[n * len(names) // count : (n + 1) * len(names) // count]
        save_gguf(path, {name: file.tensors[name] for name in chosen}, keys)
    return paths


# ---- opened as one -------------------------------------------------------------------------------


def test_any_part_opens_all(parts: list[Path], tmp_path: Path) -> None:
    write_with_gguf(tmp_path / "whole.gguf")
    whole = load_gguf(tmp_path / "whole.gguf")
    assert whole.parts == (str(tmp_path / "whole.gguf"),)
    for part in parts:
        file = load_gguf(part)
        assert file.path == str(parts[0])
        assert file.parts == tuple(map(str, parts))
        assert file.architecture == "llama"
        assert file.metadata == whole.metadata
        assert list(file.metadata) == list(whole.metadata)
        assert list(file.tensors) == list(whole.tensors)
        for name, entry in whole.tensors.items():
            assert file.tensors[name].format == entry.format
            assert torch.equal(file.tensors[name].data, entry.data)
        assert "6 tensors" in repr(file)
        # As one file it is the file that was never split, byte for byte.
        save_gguf(tmp_path / "joined.gguf", file.tensors, file)
        joined = (tmp_path / "joined.gguf").read_bytes()
        assert joined == (tmp_path / "whole.gguf").read_bytes()
        assert dict(GGUFMetadata(file)) == whole.metadata


def test_relative_and_bytes_paths(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parts[0].parent)
    for path in (parts[1].name, f"./{parts[2].name}", os.fsencode(parts[1].name)):
        file = load_gguf(path)
        assert len(file.tensors) == 6
        assert len(file.parts) == 3


def test_links_lead_to_the_parts_beside_them(parts: list[Path], tmp_path: Path) -> None:
    """As caches of downloads have it: names that are links to files of any name."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "links").mkdir()
    for number, part in enumerate(parts):
        part.rename(tmp_path / "blobs" / f"{number}")
        (tmp_path / "links" / part.name).symlink_to(tmp_path / "blobs" / f"{number}")
    assert len(load_gguf(tmp_path / "links" / parts[1].name).tensors) == 6


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    write_with_gguf(tmp_path / "m.gguf", split_max_tensors=3, small_first_shard=True)
    first = tmp_path / "m-00001-of-00003.gguf"
    assert len(load_gguf(first).tensors) == 6


@pytest.mark.parametrize("count", [0, 1])
def test_a_whole_file_that_speaks_of_its_one_part(tmp_path: Path, count: int) -> None:
    """What llama.cpp's tool leaves when it merges; any name will do, and the keys stay."""
    keys = GGUFMetadata({"general.architecture": "llama"})
    keys.set("split.count", count, "uint16")
    save_gguf(tmp_path / "m.gguf", {"t": torch.ones(3)}, keys)
    file = load_gguf(tmp_path / "m.gguf")
    assert file.metadata["split.count"] == count
    save_gguf(tmp_path / "n.gguf", file.tensors, file)
    assert (tmp_path / "n.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_a_name_alone_does_not_make_a_part(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00009.gguf"
    save_gguf(path, {"t": torch.ones(3)})
    assert load_gguf(path).parts == (str(path),)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], gone: int) -> None:
    parts[gone].unlink()
    for part in parts:
        if part.exists():
            with pytest.raises(GGUFError) as error:
                load_gguf(part)
            rule = "load_gguf: all 3 parts of a split file must be there"
            assert str(error.value) == f"{rule}, got no {parts[gone].name!r} ({part})"


def write(folder: Path, keys: list[dict[str, bytes]], tensors: list[bytes] | None = None) -> Path:
    """Two parts of one tensor each, whose keys may be anything."""
    paths = [folder / f"m-0000{n + 1}-of-00002.gguf" for n in range(2)]
    for n, path in enumerate(paths):
        both = {
            "split.no": value("u16", n),
            "split.count": value("u16", 2),
            "split.tensors.count": value("i32", 2),
        }
        first = {"general.architecture": value("str", "llama")} if n == 0 else {}
        found = {key: raw for key, raw in (first | both | keys[n]).items() if raw}
        stored = tensors[n] if tensors else tensor(f"t{n}", [1], F32, 0)
        path.write_bytes(build(list(found.items()), [stored], struct.pack("<f", n)))
    return paths[0]


HOSTILE = {
    "string": (value("str", "1"), "'1'"),
    "list": (array("u16", [1]), r"GGUFArray\(uint16, 1 elements: \[1\]\)"),
    "negative": (value("i32", -1), "-1"),
    "large": (value("u64", 2**40), "1099511627776"),
    "float": (value("f32", 1.0), r"1\.0"),
    "bool": (value("bool", 1), "True"),
    "missing": (b"", "None"),
}


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("case", HOSTILE)
def test_values_that_are_no_numbers_of_parts(
    tmp_path: Path, key: str, case: str, part: int
) -> None:
    raw, shown = HOSTILE[case]
    path = write(tmp_path, [{key: raw} if n == part else {} for n in range(2)])
    culprit = tmp_path / f"m-0000{part + 1}-of-00002.gguf"
    if (key, case) == ("split.count", "missing") and part == 0:
        assert load_gguf(path).parts == (str(path),)  # then it is no part
        path = tmp_path / "m-00002-of-00002.gguf"
    if (key, case, part) == ("split.tensors.count", "missing", 1):
        assert len(load_gguf(path).tensors) == 2  # the first part says it
        return
    rules = {
        "split.no": f"split.no of part {part + 1} of 2 must be {part}",
        "split.count": "split.count must be an integer of 0 to 65535"
        if part == 0 and case != "missing"
        else f"split.count of part {part + 1} of 2 must be 2",
        "split.tensors.count": "split.tensors.count must be 2, as the parts have",
    }
    with pytest.raises(GGUFError) as error:
        load_gguf(path)
    wanted = rf"load_gguf: {re.escape(rules[key])}, got {shown} \({culprit}\)"
    assert re.fullmatch(wanted, str(error.value)), error.value


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ([{}, {"split.no": value("u16", 0)}], "split.no of part 2 of 2 must be 1, got 0"),
        ([{"split.no": value("u16", 1)}, {}], "split.no of part 1 of 2 must be 0, got 1"),
        ([{}, {"split.count": value("u16", 3)}], "split.count of part 2 of 2 must be 2, got 3"),
        ([{"split.count": value("u16", 65535)}, {}],
         "the name of one of 65535 parts must end in -00001-of-65535.gguf to "
         "-65535-of-65535.gguf, got 'm-00001-of-00002.gguf'"),
        ([{"split.tensors.count": value("i32", 3)}, {}],
         "split.tensors.count must be 2, as the parts have, got 3"),
        ([{}, {"split.tensors.count": value("i32", 1)}],
         "split.tensors.count must be 2, as the parts have, got 1"),
        ([{}, {"general.architecture": value("str", "qwen2")}],
         "general.architecture must be that of the first part, 'llama', got 'qwen2'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(
    tmp_path: Path, keys: list[dict[str, bytes]], rule: str
) -> None:
    path = write(tmp_path, keys)
    with pytest.raises(GGUFError, match=rf"load_gguf: {re.escape(rule)} \({tmp_path}/m-"):
        load_gguf(path)


def test_a_tensor_is_in_one_part(tmp_path: Path) -> None:
    path = write(tmp_path, [{}, {}], [tensor("same", [1], F32, 0)] * 2)
    with pytest.raises(GGUFError, match=r"a tensor must be in one part, got 'same' again \(.*-2?0"):
        load_gguf(path)


def test_the_architecture_may_be_in_every_part(tmp_path: Path) -> None:
    path = write(tmp_path, [{}, {"general.architecture": value("str", "llama")}])
    assert load_gguf(path).architecture == "llama"


@pytest.mark.parametrize("name", ["m.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf",
                                  "m-1-of-2.gguf", "m-00001-of-00003.gguf", "-00001-of-00002.GGUF",
                                  "m-\N{ARABIC-INDIC DIGIT ONE}0001-of-00002.gguf"])  # fmt: skip
def test_a_part_must_have_the_name_of_one(tmp_path: Path, name: str) -> None:
    write(tmp_path, [{}, {}])
    shutil.copy(tmp_path / "m-00001-of-00002.gguf", tmp_path / name)
    rule = "the name of one of 2 parts must end in -00001-of-00002.gguf to -00002-of-00002.gguf"
    with pytest.raises(GGUFError, match=re.escape(f"{rule}, got {name!r} (")):
        load_gguf(tmp_path / name)


def test_damage_to_another_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(GGUFError, match=re.escape(f"({parts[1]})")):
        load_gguf(parts[0])
    parts[1].unlink()
    parts[1].mkdir()
    with pytest.raises(IsADirectoryError):
        load_gguf(parts[0])


# ---- the command line and models -----------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A file, and the same in three parts."""
    save_gguf(tmp_path / "whole.gguf", dense_tensors(), metadata())
    return tmp_path / "whole.gguf", split(tmp_path / "whole.gguf", tmp_path / "m", 3)


def test_commands_take_any_part(model: tuple[Path, list[Path]], tmp_path: Path, capsys) -> None:
    whole, parts = model
    for number, (command, *options) in enumerate([
        ("quantize", "--type", "q4_k_m"), ("quantize", "--type", "q4_0", "--pure"),
        ("dequantize", "--dtype", "f16"),
    ]):  # fmt: skip
        targets = [tmp_path / f"{number}{kind}.gguf" for kind in ("whole", "split")]
        for source, target in zip((whole, parts[number]), targets, strict=True):
            assert main([command, str(source), str(target), *options]) == 0
        assert targets[0].read_bytes() == targets[1].read_bytes()
    capsys.readouterr()
    assert main(["compare", str(whole), str(parts[1])]) == 0
    count = len(dense_tensors())
    assert f"{count} tensors compared, {count} equal" in capsys.readouterr().out
    assert main(["info", str(parts[2]), "--metadata"]) == 0
    told = capsys.readouterr().out
    assert f"GGUF version 3 in 3 parts, llama: {count} tensors" in told
    assert "split." not in told
    assert main(["info", "--json", str(parts[2])]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == list(map(str, parts))


def test_no_part_is_a_target(model: tuple[Path, list[Path]], capsys) -> None:
    _, parts = model
    before = parts[2].read_bytes()
    assert main(["quantize", str(parts[0]), str(parts[2]), "--type", "q4_0"]) == 1
    assert "the target must be another file than the source" in capsys.readouterr().err
    assert parts[2].read_bytes() == before


def test_a_command_names_the_part_that_is_missing(model: tuple[Path, list[Path]], capsys) -> None:
    _, parts = model
    parts[1].unlink()
    for command in ("info", "compare"):
        again = [str(parts[0])] if command == "compare" else []
        assert main([command, str(parts[0]), *again]) == 1
        assert "got no 'm-00002-of-00003.gguf'" in capsys.readouterr().err


def test_an_importance_matrix_in_parts(tmp_path: Path) -> None:
    found = torch_q4.Importance(
        {name: torch.rand(8) for name in "abcd"}, {name: torch.ones(1) for name in "abcd"}
    )
    found.save(tmp_path / "i.gguf")
    paths = split(tmp_path / "i.gguf", tmp_path / "i", 3)
    again = torch_q4.load_importance(paths[1])
    assert {name: again[name].tolist() for name in again} == {
        name: found[name].tolist() for name in found
    }


def test_a_model_in_parts(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from test_transformers import IDS, random_model, write_gguf

    from torch_q4.integrations.transformers import load_gguf_model

    whole = write_gguf(tmp_path / "a.gguf", random_model("llama", {}), "llama", ["q8_0", "f16"])
    paths = split(whole, tmp_path / "m", 4)
    expected, found = (load_gguf_model(path, progress=False)[0] for path in (whole, paths[2]))
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)
