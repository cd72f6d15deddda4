"""The command line, and the conversions underneath: what it says, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_q4
from torch_q4 import cli, formats, recipes
from torch_q4.cli import main
from torch_q4.convert import compare_files, dequantize_file, lack_of_memory, quantize_file

ROOT = Path(__file__).parents[1]
COLUMNS = 256


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch_q4", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def metadata(architecture: str = "llama", layers: int = 2) -> dict[str, Any]:
    return {
        "general.architecture": architecture,
        f"{architecture}.block_count": layers,
        f"{architecture}.attention.head_count": 8,
        f"{architecture}.attention.head_count_kv": 2,
        "general.file_type": 1,
        "tokenizer.ggml.tokens": ["a", "b"],
    }


def dense_tensors(layers: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"token_embd.weight": torch.randn(32, COLUMNS).half()}
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down"):
            dtype = torch.bfloat16 if name == "attn_q" else torch.float32
            tensors[f"blk.{layer}.{name}.weight"] = torch.randn(24, COLUMNS).to(dtype)
        tensors[f"blk.{layer}.attn_norm.weight"] = torch.randn(COLUMNS)
    tensors["output_norm.weight"] = torch.randn(COLUMNS)
    tensors["blk.0.attn_q.bias"] = torch.randn(24)
    return tensors


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    torch_q4.save_gguf(tmp_path / "dense.gguf", dense_tensors(), metadata())
    return tmp_path / "dense.gguf"


# ---- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [recipe.name for recipe in recipes.all()])
def test_quantize_is_the_quantiser_on_each_tensor(dense: Path, tmp_path: Path, mix: str) -> None:
    assert main(["quantize", str(dense), str(tmp_path / "q.gguf"), "--type", mix]) == 0
    source, result = torch_q4.load_gguf(dense), torch_q4.load_gguf(tmp_path / "q.gguf")
    infos = recipes.choose(
        mix, [torch_q4._tensors.info_of(t) for t in source.tensors.values()],
        recipes.ModelFacts("llama", 2, 8, 2),
    )  # fmt: skip
    assert list(result.tensors) == list(source.tensors)
    for name, tensor in source.tensors.items():
        expected = infos[name]
        found = result.tensors[name]
        if isinstance(expected, formats.Format):
            assert found.format is expected, name
            assert torch.equal(found.blocks, torch_q4.quantize(tensor.data, expected)), name
        else:
            assert torch.equal(found.data, tensor.data), name
    changed = {"general.file_type": recipes.get(mix).file_type, "general.quantization_version": 2}
    assert result.metadata == source.metadata | changed


@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_quantize_with_an_importance_matrix(dense: Path, tmp_path: Path, kind: str, capsys) -> None:
    names = [name for name in dense_tensors() if name.startswith("blk") and "norm" not in name]
    names.remove("blk.0.attn_q.bias")
    names.remove("blk.1.ffn_up.weight")
    values = {name: torch.rand(COLUMNS) + 0.01 for name in names}
    matrix = tmp_path / f"imatrix.{kind}"
    importance = torch_q4.Importance(
        {name: 4 * value for name, value in values.items()},
        dict.fromkeys(names, torch.tensor([4.0])),
        ("calibration.txt",), 4, 512,
    )  # fmt: skip
    if kind == "gguf":
        importance.save(matrix)
    else:
        from test_importance import write_dat

        sums = {name: (4, (4 * value).tolist()) for name, value in values.items()}
        write_dat(matrix, sums)
    target = tmp_path / "q.gguf"
    arguments = ["quantize", str(dense), str(target), "--type", "q4_k_s", "--imatrix", str(matrix)]
    assert main(arguments) == 0
    note = "note: 1 tensors have no importance, the first 'blk.1.ffn_up.weight'"
    assert note in capsys.readouterr().err
    source, found = torch_q4.load_gguf(dense), torch_q4.load_gguf(target)
    for name, tensor in found.tensors.items():
        if tensor.format is not None:
            wanted = torch_q4.quantize(source.tensors[name].data, tensor.format, values.get(name))
            assert torch.equal(tensor.blocks, wanted), name
    assert found.metadata["quantize.imatrix.file"] == str(matrix)
    assert found.metadata["quantize.imatrix.entries_count"] == len(names)
    if kind == "gguf":
        assert found.metadata["quantize.imatrix.dataset"] == "calibration.txt"
        assert found.metadata["quantize.imatrix.chunks_count"] == 4


def test_panels_do_not_change_bytes(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_file(dense, tmp_path / "a.gguf", "q4_k_m")
    monkeypatch.setattr("torch_q4.convert._PANEL", 5 * COLUMNS)
    quantize_file(dense, tmp_path / "b.gguf", "q4_k_m")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_dry_run_says_what_will_be_and_writes_nothing(dense: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "q.gguf"
    arguments = ["quantize", str(dense), str(target), "--type", "q5_k_m", "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert planned["tensors"] == done["tensors"]
    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    file = torch_q4.load_gguf(target)
    for row in done["tensors"]:
        assert row["bytes_after"] == file.tensors[row["name"]].nbytes
    assert done["bytes_after"] == sum(tensor.nbytes for tensor in file.tensors.values())
    assert main([*arguments[:-1], "--dry-run"]) == 0
    assert re.search(r"blk\.0\.attn_q\.weight +24 x 256 +bf16 +q5_k", capsys.readouterr().out)


def test_pure_and_tensor_types(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    options = ["--type", "q4_0", "--pure", "--tensor-type", r"blk\.1\..*_up=q8_0"]
    assert main(["quantize", str(dense), str(target), *options]) == 0
    found = {
        name: tensor.format.name
        for name, tensor in torch_q4.load_gguf(target).tensors.items()
        if tensor.format is not None
    }
    assert found.pop("blk.1.ffn_up.weight") == "q8_0"
    assert set(found.values()) == {"q4_0"}


def test_an_unknown_architecture_needs_pure(tmp_path: Path, capsys) -> None:
    source = tmp_path / "a.gguf"
    torch_q4.save_gguf(source, dense_tensors(), metadata("falcon"))
    arguments = ["quantize", str(source), str(tmp_path / "q.gguf"), "--type", "q4_0"]
    assert main(arguments) == 1
    assert "the architecture must be one of gemma3, llama, " in capsys.readouterr().err
    assert main([*arguments, "--pure"]) == 0


def test_requantising_must_be_asked_for(dense: Path, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert main(["quantize", str(dense), str(first), "--type", "q8_0"]) == 0
    arguments = ["quantize", str(first), str(second), "--type", "q4_0"]
    assert main(arguments) == 1
    assert "the source must not be quantised already" in capsys.readouterr().err
    assert not second.exists()
    assert main([*arguments, "--allow-requantize"]) == 0
    assert "are quantised again" in capsys.readouterr().err
    name = "blk.0.ffn_up.weight"
    once = torch_q4.load_gguf(first).tensors[name].dequantize()
    assert torch.equal(
        torch_q4.load_gguf(second).tensors[name].blocks, torch_q4.quantize(once, "q4_0")
    )
    # What has the wanted format already is copied.
    assert main(["quantize", str(first), str(tmp_path / "c.gguf"), "--type", "q8_0"]) == 0


def test_safetensors_without_a_config(tmp_path: Path, capsys) -> None:
    tensors = {"a.weight": torch.randn(8, 64), "b.bias": torch.randn(8), "n": torch.arange(3)}
    torch_q4.save_safetensors(tmp_path / "a.safetensors", tensors, {"author": "me"})
    arguments = ["quantize", str(tmp_path / "a.safetensors")]
    options = ["--type", "q4_0"]
    assert main([*arguments, str(tmp_path / "b.safetensors"), *options]) == 1
    assert "must know the model's architecture, got none; pure" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "b.safetensors"), *options, "--pure"]) == 0
    file = torch_q4.load_safetensors(tmp_path / "b.safetensors")
    assert file.tensors["a.weight"].format is formats.get("q4_0")
    assert torch.equal(
        file.tensors["a.weight"].blocks, torch_q4.quantize(tensors["a.weight"], "q4_0")
    )
    assert torch.equal(file.tensors["n"].data, tensors["n"])
    assert file.metadata["author"] == "me"
    assert main([*arguments, str(tmp_path / "b.gguf"), *options, "--pure"]) == 1
    assert "must have the config.json of its safetensors source" in capsys.readouterr().err

    assert main(["dequantize", str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"),
                 "--dtype", "bf16"]) == 0  # fmt: skip
    file = torch_q4.load_safetensors(tmp_path / "c.safetensors")
    assert file.tensors["a.weight"].dtype == torch.bfloat16
    assert file.tensors["b.bias"].dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "qwen3"])
@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_a_hugging_face_folder(tmp_path: Path, architecture: str, suffix: str, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    from test_transformers import CASES, IDS, random_model, relative_error

    from torch_q4.integrations.gguf_export import load_pretrained, tensor_names
    from torch_q4.integrations.transformers import load_gguf_model

    changes = CASES["llama-rope-freqs" if architecture == "llama" else architecture][1]
    model = random_model(architecture, changes)
    model.save_pretrained(tmp_path / "hf")
    target = tmp_path / "out" / f"model.{suffix}"
    target.parent.mkdir()
    assert main(["quantize", str(tmp_path / "hf"), str(target), "--type", "q5_k_m"]) == 0
    if suffix == "gguf":
        assert "note: the file has no tokenizer" in capsys.readouterr().err
        loaded, _ = load_gguf_model(target, progress=False)
    else:
        shutil.copy(tmp_path / "hf" / "config.json", target.parent)
        loaded, _ = load_pretrained(target.parent)
    with torch.no_grad():
        ours, exact = loaded(IDS).logits, model(IDS).logits
    assert relative_error(ours, exact) < 0.2
    assert relative_error(ours, exact) > 1e-4  # it is quantised
    packed = {name: module.format for name, module in loaded.named_modules()
              if hasattr(module, "format")}  # fmt: skip
    assert packed["model.layers.1.mlp.down_proj"] in ("q5_k", "q6_k")
    assert len(packed) == len(tensor_names(loaded))
    assert transformers is not None


def test_hugging_face_folder_with_like(tmp_path: Path, capsys) -> None:
    pytest.importorskip("transformers")
    from test_transformers import random_model, write_gguf

    model = random_model("qwen3", {})
    model.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "like.gguf", model, "qwen3", ["q8_0"],
               metadata=lambda writer: writer.add_string("some.key", "kept"))  # fmt: skip
    target = tmp_path / "new.gguf"
    like = str(tmp_path / "like.gguf")
    arguments = ["quantize", str(tmp_path / "hf"), str(target), "--type", "q4_k_m", "--like", like]
    assert main(arguments) == 0
    file, other = torch_q4.load_gguf(target), torch_q4.load_gguf(like)
    assert file.metadata["some.key"] == "kept"
    assert list(file.tensors) == list(other.tensors)
    arguments = ["dequantize", str(target), str(tmp_path / "x.gguf"), "--like", str(target)]
    assert main(arguments) == 1
    assert "like must go with a safetensors source" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_non_finite_weights_must_be_asked_for(
    tmp_path: Path, value: float, suffix: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_q4.convert._PANEL", 3 * COLUMNS)
    w = torch.randn(2, 4, COLUMNS)
    w[1, 2, 5] = w[1, 3, 0] = value
    source, target = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    tensors = {"norm.weight": torch.full((COLUMNS,), value), "x.weight": w, "y.weight": w[0]}
    if suffix == "gguf":
        torch_q4.save_gguf(source, tensors, metadata())
    else:
        torch_q4.save_safetensors(source, tensors)
    target.write_bytes(b"old")
    arguments = ["quantize", str(source), str(target), "--type", "q5_k_s", "--pure"]
    assert main(arguments) == 1
    words = (
        rf"tensor 'x.weight' must be finite \(--allow-nonfinite .*\), got {value} at \(1, 2, 5\)"
    )
    assert re.search(words, capsys.readouterr().err)
    assert target.read_bytes() == b"old"
    assert main([*arguments, "--allow-nonfinite"]) == 0
    assert "note: 1 tensors are not finite, and blocks of theirs" in capsys.readouterr().err
    found = compare_files(source, target).tensors
    open_file = torch_q4.load_gguf if suffix == "gguf" else torch_q4.load_safetensors
    blocks = open_file(target).tensors["x.weight"].blocks
    assert torch.equal(blocks, torch.ops.torch_q4.quantize.default(w, 13))
    assert {error.name: error.nonfinite for error in found}["norm.weight"] == 0  # it is copied


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_importance_must_be_a_mean_of_squares(dense: Path, tmp_path: Path, value: float) -> None:
    importance = {"blk.0.ffn_up.weight": torch.ones(COLUMNS)}
    importance["blk.0.ffn_up.weight"][7] = value
    with pytest.raises(ValueError, match=r"'blk.0.ffn_up.weight' must be finite and not negative"):
        quantize_file(dense, tmp_path / "q.gguf", "q4_0", importance=importance)
    assert not (tmp_path / "q.gguf").exists()


def test_the_target_is_none_of_the_files_that_it_is_made_from(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    torch_q4.save_safetensors(folder / "model.safetensors", {"a.weight": torch.randn(8, 64)})
    (tmp_path / "link.safetensors").symlink_to(folder / "model.safetensors")
    torch_q4.Importance({"a.weight": torch.ones(64)}, {"a.weight": torch.ones(1)}).save(
        tmp_path / "imatrix.gguf"
    )
    torch_q4.save_gguf(tmp_path / "dense.gguf", {"a.weight": torch.randn(8, 64)})
    options = ["--type", "q4_0", "--pure"]
    before = (folder / "model.safetensors").read_bytes(), (tmp_path / "imatrix.gguf").read_bytes()
    for source, target, more in (
        (folder, folder / "model.safetensors", []),
        (folder, tmp_path / "link.safetensors", []),
        (tmp_path / "link.safetensors", folder / "model.safetensors", []),
        (tmp_path / "dense.gguf", tmp_path / "imatrix.gguf", ["--imatrix"]),
    ):
        given = [*more, str(target)] if more else []
        assert main(["quantize", str(source), str(target), *options, *given]) == 1
        assert "the target must be another file than" in capsys.readouterr().err
    after = (folder / "model.safetensors").read_bytes(), (tmp_path / "imatrix.gguf").read_bytes()
    assert after == before


# ---- dequantize, compare, info -------------------------------------------------------------------


@pytest.mark.parametrize("plain_type", ["f32", "f16", "bf16"])
def test_dequantize(dense: Path, tmp_path: Path, plain_type: str) -> None:
    packed, plain = tmp_path / "q.gguf", tmp_path / "p.gguf"
    quantize_file(dense, packed, "q4_k_m")
    assert main(["dequantize", str(packed), str(plain), "--dtype", plain_type]) == 0
    source, result = torch_q4.load_gguf(packed), torch_q4.load_gguf(plain)
    wanted = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[plain_type]
    for name, tensor in source.tensors.items():
        if tensor.format is None:
            assert torch.equal(result.tensors[name].data, tensor.data)
        else:
            assert torch.equal(result.tensors[name].data, tensor.dequantize(wanted))
    assert result.metadata["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32}[plain_type]
    assert result.metadata["tokenizer.ggml.tokens"] == ["a", "b"]


def test_gguf_to_safetensors_and_back_values(dense: Path, tmp_path: Path) -> None:
    quantize_file(dense, tmp_path / "a.safetensors", "q4_k_m")
    quantize_file(dense, tmp_path / "a.gguf", "q4_k_m")
    result = compare_files(tmp_path / "a.gguf", tmp_path / "a.safetensors")
    assert len(result.tensors) == len(dense_tensors())
    assert all(error.max_error == 0 and error.type_a == error.type_b for error in result.tensors)


def test_compare(tmp_path: Path, capsys) -> None:
    a, b = torch.randn(40, 64), torch.randn(40, 64)
    zeros = torch.zeros(3)
    first = {"x": a, "zero": zeros, "same": a, "only": a, "shape": a, "null": zeros}
    second = {"x": b, "zero": zeros, "same": a, "more": a, "shape": a[:1], "null": zeros + 1}
    torch_q4.save_gguf(tmp_path / "a.gguf", first)
    torch_q4.save_safetensors(tmp_path / "b.safetensors", second)
    arguments = ["compare", str(tmp_path / "a.gguf"), str(tmp_path / "b.safetensors")]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    errors = {row["name"]: row for row in result["tensors"]}
    x, y = a.double(), b.double()
    assert errors["x"]["nmse"] == pytest.approx(float((x - y).square().sum() / x.square().sum()))
    assert errors["x"]["max_error"] == pytest.approx(float((x - y).abs().max()))
    cosine = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
    assert errors["x"]["cosine"] == pytest.approx(float(cosine))
    assert (errors["zero"]["nmse"], errors["zero"]["cosine"]) == (0, 1)
    assert errors["same"]["max_error"] == 0
    assert errors["null"]["nmse"] is None  # infinite, which JSON has no word for
    assert (result["only_a"], result["only_b"]) == (["only"], ["more"])
    assert result["shapes_differ"] == ["shape"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "of different shapes: shape" in text
    assert "4 tensors compared, 2 equal; NMSE mean inf, largest inf (null)" in text


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("a", "b", "places"),
    [
        ([NAN, NAN], [1.0, 2.0], 2),
        ([1.0, 2.0], [NAN, 2.0], 1),
        ([1.0, INF], [1.0, 3.0], 1),
        ([1.0, INF], [1.0, -INF], 1),
        ([NAN, INF], [INF, NAN], 2),
        ([NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.0], 0),
    ],
)
def test_compare_what_is_not_finite(
    tmp_path: Path, a: list[float], b: list[float], places: int, dtype: torch.dtype, capsys
) -> None:
    good = torch.ones(3)
    for name, values in (("a", a), ("b", b)):
        tensors = {"good": good, "x": torch.tensor(values, dtype=dtype)}
        torch_q4.save_safetensors(tmp_path / f"{name}.safetensors", tensors)
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    x = compare_files(*files).tensors[[e.name for e in compare_files(*files).tensors].index("x")]
    assert x.nonfinite == places
    status = 1 if places else 0
    if places:
        assert (x.nmse, x.max_error) == (INF, INF)
        assert x.cosine != x.cosine
    else:
        assert (x.nmse, x.max_error, x.cosine) == (0, 0, 1)
    assert main(["compare", *files, "--json"]) == status
    row = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}["x"]
    assert row["nonfinite"] == places
    assert main(["compare", *files]) == status
    text = capsys.readouterr().out
    assert f"2 tensors compared, {2 - status} equal" in text
    assert (f"x: {places} values are NaN or infinite in one file" in text) == bool(places)


def test_compare_integers_that_float64_cannot_tell_apart(tmp_path: Path) -> None:
    a = torch.tensor([2**53, -(2**63), 2**63 - 1, 5])
    torch_q4.save_safetensors(tmp_path / "a.safetensors", {"x": a})
    torch_q4.save_safetensors(tmp_path / "b.safetensors", {"x": a + torch.tensor([1, 0, 0, 0])})
    (found,) = compare_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors").tensors
    assert found.max_error == 1


def test_compare_in_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: Path) -> None:
    quantize_file(dense, tmp_path / "q.gguf", "q4_0")
    whole = compare_files(dense, tmp_path / "q.gguf")
    monkeypatch.setattr("torch_q4.convert._PANEL", 4 * 3 * COLUMNS)
    for one, other in zip(whole.tensors, compare_files(dense, tmp_path / "q.gguf").tensors,
                          strict=True):  # fmt: skip
        assert other.nmse == pytest.approx(one.nmse)
        assert other.max_error == one.max_error


def test_info(dense: Path, tmp_path: Path, capsys) -> None:
    quantize_file(dense, tmp_path / "q.gguf", "q4_0", pure=True)
    assert main(["info", str(tmp_path / "q.gguf"), "--json", "--metadata"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["architecture"]) == ("GGUF version 3", "llama")
    file = torch_q4.load_gguf(tmp_path / "q.gguf")
    assert [row["name"] for row in result["tensors"]] == list(file.tensors)
    elements = sum(tensor.numel() for tensor in dense_tensors().values())
    assert result["parameters"] == elements
    assert result["bytes"] == sum(tensor.nbytes for tensor in file.tensors.values())
    assert result["bits_per_weight"] == pytest.approx(8 * result["bytes"] / elements)
    assert result["types"]["q4_0"]["tensors"] == 15
    assert result["metadata"]["tokenizer.ggml.tokens"] == ["a", "b"]
    assert main(["info", str(tmp_path / "q.gguf"), "--metadata"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"blk\.0\.attn_q\.weight +q4_0 +24 x 256 +6\.1k +3\.5 kB +4\.50\n", text)
    assert "tokenizer.ggml.tokens = 2 values" in text
    assert "GGUF version 3, llama: 19 tensors" in text


def test_doctor(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["kernels"] == torch_q4.cpu_isa()
    assert report["formats"] == [fmt.name for fmt in formats.all()]
    assert report["torch"] == torch.__version__
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert report["library"] in text
    assert "code objects" in text


def test_doctor_names_what_is_missing_and_the_fix(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'transformers': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from torch_q4.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    environment = {**os.environ, "TORCH_Q4_CPU_ISA": "generic"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "problem: transformers is not installed" in result.stdout
    assert "fix: pip install 'torch_q4[transformers]'" in result.stdout
    assert "fix: unset TORCH_Q4_CPU_ISA" in result.stdout


# ---- usage, errors, output -----------------------------------------------------------------------

COMMANDS = ("info", "quantize", "dequantize", "compare", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "--debug" in text
    if command == "quantize":
        assert all(recipe.name in text for recipe in recipes.all())
        for option in ("--type", "--imatrix", "--dry-run", "--pure", "--tensor-type", "--like"):
            assert option in text


def test_help_lists_the_commands(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{command}\s", text, re.M) for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["info"], "the following arguments are required: FILE"),
        (["quantize", "a", "b.gguf"], "the following arguments are required: --type"),
        (["quantize", "a", "b.gguf", "--type", "q9"], "type must be one of tq1_0, .*, got 'q9'"),
        (
            ["quantize", "a", "b.gguf", "--type", "q4_0", "--tensor-type", "x"],
            "must be PATTERN=FORMAT, got 'x'",
        ),
        (
            ["quantize", "a", "b.gguf", "--type", "q4_0", "--tensor-type", "x=iq3_s"],
            "format must be one that torch_q4 quantises to; llama.cpp's llama-quantize makes files",
        ),
        (
            ["quantize", "a", "b.gguf", "--type", "iq1_m"],
            "llama.cpp's llama-quantize makes files of the others with an importance matrix",
        ),
        (
            ["quantize", "a", "b.gguf", "--type", "q4_0", "--tensor-type", "x=q9"],
            "format must be one of .*, got 'q9'",
        ),
        (["quantize", "a", "b", "--type", "q4_0", "--threads", "0"], "must be at least 1, got 0"),
        (["quantize", "a", "b", "--type", "q4_0", "--threads", "x"], "must be at least 1, got x"),
        (
            ["quantize", "a", "b.gguf", "--type", "q4_0", "--tensor-type", "(=q8_0"],
            r"PATTERN must be a regular expression, got '\('",
        ),
        (["dequantize", "a", "b.gguf", "--dtype", "f8"], "invalid choice: 'f8'"),
        (["info", "a", "--b\x1b[31m"], r"unrecognized arguments: --b\\x1b\[31m"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err)
    assert "--help)" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "missing.gguf"], "No such file or directory: missing.gguf"),
        (["info", "text.txt"], "must be a whole safetensors file"),
        (["quantize", "dense.gguf", "out.bin", "--type", "q4_0"],
         r"the target must end in .gguf or .safetensors, got 'out.bin'"),
        (["quantize", "dense.gguf", "dense.gguf", "--type", "q4_0"],
         "the target must be another file than the source"),
        (["quantize", "dense.gguf", "no/out.gguf", "--type", "q4_0"],
         "the folder must be one that can be written to, got: No such file or directory"),
        (["quantize", "dense.gguf", "q.gguf", "--type", "q4_0", "--imatrix", "text.txt"],
         "load_importance: a file must be an imatrix GGUF file"),
        (["quantize", "dense.gguf", "q.gguf", "--type", "q4_0", "--imatrix", "other.gguf"],
         "must have entries for tensors of the model, got none of 1"),
        (["quantize", "dense.gguf", "q.gguf", "--type", "q4_0", "--imatrix", "short.gguf"],
         "importance of 'blk.0.ffn_up.weight' must have 256 values, got 3"),
        (["compare", "dense.gguf", "other.gguf"], "must have tensors of the same names"),
    ],
)  # fmt: skip
def test_failures(dense: Path, arguments: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(dense.parent)
    Path("text.txt").write_text("neither GGUF nor safetensors, and no imatrix")
    for name, key, size in (
        ("other", "x", 3), ("short", "blk.0.ffn_up.weight", 3)
    ):  # fmt: skip
        torch_q4.Importance({key: torch.ones(size)}, {key: torch.ones(1)}).save(f"{name}.gguf")
    before = sorted(Path().iterdir())
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torch-q4: ")
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err
    assert sorted(Path().iterdir()) == before
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_as_a_process(dense: Path) -> None:
    result = run("info", dense)
    assert result.returncode == 0
    assert result.stderr == ""
    debug = run("info", dense.parent / "missing.gguf", "--debug")
    assert (debug.returncode, debug.stdout) == (1, "")
    assert "Traceback" in debug.stderr


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"torch-q4 {torch_q4.__version__}\n"


def test_a_closed_pipe_is_no_error(dense: Path) -> None:
    command = f"'{sys.executable}' -m torch_q4 info '{dense}' | head -n 1"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout.startswith("tensor")
    result = subprocess.run(
        f"{command}; exit ${{PIPESTATUS[0]}}", shell=True, cwd=ROOT, executable="/bin/bash"
    )
    assert result.returncode in (0, 128 + signal.SIGPIPE)  # 0: all of it was in the pipe already


def test_the_script_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'torch-q4 = "torch_q4.cli:main"' in text


def test_progress_bar(dense: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("tqdm")
    quantize_file(dense, tmp_path / "a.gguf", "q4_0", progress=True)
    text = capsys.readouterr().err
    assert "100%" in text
    assert "19/19 tensors" in text
    assert re.search(r"\d[kM]?B/s", text)
    dequantize_file(dense, tmp_path / "b.gguf", progress=False)
    assert capsys.readouterr().err == ""


def test_an_interrupt_leaves_what_was_there(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    target = tmp_path / "q.gguf"
    target.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_q4.convert._quantize", interrupt)
    assert main(["quantize", str(dense), str(target), "--type", "q4_0"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert target.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == before


# ---- what the terminal gets ----------------------------------------------------------------------

# ESC, BEL, CR and LF, DEL, C1's CSI, overrides of direction, a zero-width space, a line separator.
NASTY = "\x1b[31m\x07\r\n\x7f\x9b2J\u202e\u2066\u200b\u2028é"
SHOWN = r"\x1b[31m\x07\r\n\x7f\x9b2J\u202e\u2066\u200b\u2028é"


def nasty_file(path: Path, **tensors: torch.Tensor) -> Path:
    named = {f"{NASTY}{name}.weight": tensor for name, tensor in tensors.items()}
    torch_q4.save_gguf(path, named, metadata(f"a{NASTY}") | {f"k{NASTY}": f"v{NASTY}"})
    return path


def check_shown(capsys, *wanted: str) -> None:
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)
    for part in wanted:
        assert part in text, text


def test_what_a_file_says_is_shown_and_not_obeyed(tmp_path: Path, capsys) -> None:
    w = torch.randn(8, COLUMNS)
    a = nasty_file(tmp_path / "a.gguf", x=w, shape=w, only=w)
    b = nasty_file(tmp_path / "b.gguf", x=w + 1, shape=w[:2], more=w, nan=w)
    c = nasty_file(tmp_path / "c.gguf", x=w / 0)
    out = tmp_path / "out.gguf"
    name = f"{SHOWN}x.weight"
    assert main(["info", str(a)]) == 0
    check_shown(capsys, name, f"a{SHOWN}: 3 tensors")
    assert main(["info", "--metadata", str(a)]) == 0
    check_shown(capsys, f"k{SHOWN} = 'v{SHOWN}'", f"a{SHOWN}.block_count = 2")
    assert main(["compare", str(a), str(b)]) == 0
    check_shown(capsys, name, f"only in {a}: {SHOWN}only.weight", f"{SHOWN}shape.weight")
    assert main(["compare", str(a), str(c)]) == 1
    check_shown(capsys, f"{name}: 2048 values are NaN or infinite")
    quantise = ["quantize", str(a), str(out), "--type", "q4_0"]
    assert main(quantise) == 1
    check_shown(capsys, "the architecture must be one of")
    assert main([*quantise, "--pure", "--dry-run"]) == 0
    check_shown(capsys, name)
    assert main([*quantise, "--pure"]) == 0
    check_shown(capsys)
    assert main(["dequantize", "--dry-run", str(out), str(tmp_path / "p.gguf")]) == 0
    check_shown(capsys, name)
    assert main(["quantize", str(c), str(out), "--type", "q4_0", "--pure"]) == 1
    check_shown(capsys, "x.weight' must be finite")
    assert (
        main(["quantize", str(c), str(out), "--type", "q4_0", "--pure", "--allow-nonfinite"]) == 0
    )
    check_shown(capsys, "1 tensors are not finite")
    assert main(["quantize", str(c), str(out), "--type", "q4_0", "--pure", "--debug"]) == 1
    check_shown(capsys, "Traceback")


def test_names_of_files_are_shown_and_not_obeyed(tmp_path: Path, capsys) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    source = nasty_file(folder / "a.gguf", x=torch.randn(8, COLUMNS))
    target = folder / "b.gguf"
    arguments = ["quantize", str(source), str(target), "--type", "q4_0", "--pure"]
    assert main(arguments) == 0
    check_shown(capsys, f"wrote {tmp_path}/{SHOWN}/b.gguf")
    assert main(["info", str(folder / "missing")]) == 1
    check_shown(capsys, f"No such file or directory: {tmp_path}/{SHOWN}/missing")
    (folder / "text").write_text("neither this nor that")
    assert main(["info", str(folder / "text")]) == 1
    check_shown(capsys, f"{tmp_path}/{SHOWN}/text")


def test_json_is_json_whatever_the_names(tmp_path: Path, capsys) -> None:
    a = nasty_file(tmp_path / "a.gguf", x=torch.randn(8, COLUMNS))
    assert main(["info", "--json", "--metadata", str(a)]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.split("\n"))
    found = json.loads(text)
    assert found["tensors"][0]["name"] == f"{NASTY}x.weight"
    assert found["metadata"][f"k{NASTY}"] == f"v{NASTY}"
    assert main(["compare", "--json", str(a), str(a)]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["name"] == f"{NASTY}x.weight"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_are_no_utf_8(dense: Path, tmp_path: Path, encoding: str) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3\xa9.gguf")
    os.rename(dense, source)
    options = {"env": {**os.environ, "PYTHONIOENCODING": encoding}, "encoding": encoding}
    target = os.fsdecode(os.fsencode(tmp_path) + b"/\xfe.gguf")
    done = run("quantize", source, target, "--type", "q4_0", **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"/\xfe.gguf" in done.stdout
    assert os.path.exists(target)
    found = run("info", "--json", source, **options)
    assert json.loads(found.stdout)["path"] == source
    lost = run("info", f"{source}x", **options)
    assert lost.returncode == 1
    assert "No such file or directory: " in lost.stderr
    assert r"/\xff" in lost.stderr


# ---- statuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a FIFO", "a character device", "a folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, dense: Path, what: str, capsys) -> None:
    path = tmp_path / "thing"
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    good, new = str(dense), str(tmp_path / "new.gguf")
    for arguments in (
        ["info", str(path)],
        ["compare", str(path), good],
        ["compare", good, str(path)],
        ["quantize", str(path), new, "--type", "q4_0"],
        ["quantize", good, new, "--type", "q4_0", "--imatrix", str(path)],
        ["dequantize", str(path), new],
    ):
        assert main(arguments) == 1
        text = capsys.readouterr().err
        assert text.startswith("torch-q4: ")
        assert f"got {what}" in text or (what == "a folder" and "No such file" in text)
    assert not os.path.exists(new)


@pytest.mark.parametrize("what", ["a FIFO", "a character device", "a folder"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, dense: Path, what: str, capsys) -> None:
    target = tmp_path / "out.gguf"
    if what == "a folder":
        target.mkdir()
    elif what == "a FIFO":
        os.mkfifo(target)
    elif os.geteuid() == 0:
        os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    else:
        pytest.skip("making a device takes root")
    before = os.lstat(target)
    assert main(["quantize", str(dense), str(target), "--type", "q4_0"]) == 1
    assert f"got {'one' if what == 'a folder' else what}" in capsys.readouterr().err
    after = os.lstat(target)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_output_that_cannot_be_written(dense: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "torch_q4", "info", str(dense)],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "torch-q4: No space left on device\n"
    closed = f"'{sys.executable}' -m torch_q4 info '{dense}' >&-"
    result = subprocess.run(closed, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


HALF_WAY = """
import signal, sys, time
from torch_q4 import _files, convert
from torch_q4.cli import main

# Whoever runs the tests, under nohup or in the background, may ignore them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

def stop(*_):
    print("half way", flush=True)
    time.sleep(60)

convert._quantize = stop
if sys.argv[1] == "named":
    _files._UNNAMED = 0
sys.exit(main(["quantize", *sys.argv[2:], "--type", "q4_0"]))
"""


@pytest.mark.parametrize("kind", ["unnamed", "named"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_what_was_there(
    dense: Path, tmp_path: Path, number: signal.Signals, kind: str
) -> None:
    target = tmp_path / "q.gguf"
    target.write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, kind, str(dense), str(target)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert target.read_bytes() == b"old"
    left = sorted(os.listdir(tmp_path))
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert len(left) == (3 if kind == "named" else 2)  # nobody can catch it
    else:
        assert process.returncode == 128 + number
        ended = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        assert errors == f"torch-q4: {ended}\n"
        assert left == ["dense.gguf", "q.gguf"]


def test_handlers_are_the_callers_own_again(dense: Path, capsys) -> None:
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in signals]
    seen: list[Any] = []
    mine = lambda *_: None  # noqa: E731
    assert main(["info", str(dense)]) == 0
    assert [signal.getsignal(number) for number in signals] == before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        signal.signal(signal.SIGTERM, mine)
        with cli._signals_end_it():
            seen = [signal.getsignal(number) for number in signals[1:]]
        assert seen == [mine, signal.SIG_IGN]
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(main(["info", str(dense)])))
    thread.start()
    thread.join()
    assert statuses == [0]
    capsys.readouterr()


# ---- memory --------------------------------------------------------------------------------------

LITTLE = """
import resource, sys, torch, torch_q4
from torch_q4.cli import main
with open("/proc/self/status") as file:
    used = next(int(line.split()[1]) for line in file if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20), resource.RLIM_INFINITY))
sys.exit(main(["compare", sys.argv[1], sys.argv[1], "--no-progress"]))
"""


def test_lack_of_memory_is_said_and_how_much(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    torch_q4.save_safetensors(path, {"x": torch.ones(1, 1 << 24, dtype=torch.float16)})
    result = subprocess.run(
        [sys.executable, "-c", LITTLE, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    words = (
        r"torch-q4: out of memory: compare: memory must hold a part of tensor 'x' of 33554432 "
        r"bytes, got none for \d+ bytes\n"
    )
    assert re.fullmatch(words, result.stderr), result.stderr


def test_what_lack_of_memory_looks_like() -> None:
    import numpy as np

    def of(call: Any) -> str | None:
        with pytest.raises(Exception, match=r".*") as error:
            call()
        return lack_of_memory(error.value)

    assert of(lambda: torch.empty(1 << 50, dtype=torch.uint8)) == f"got none for {1 << 50} bytes"
    assert "Unable to allocate 1.00 PiB" in str(of(lambda: np.empty(1 << 50, np.uint8)))
    assert of(lambda: bytearray(1 << 62)) == "got none, of how much is not known"
    assert of(lambda: torch.empty(-1)) is None
    assert of(lambda: os.stat("missing")) is None


# Not getrusage: its maximum is the parent's, too, across fork and exec.
PEAK = """
import sys, torch, torch_q4
from torch_q4.convert import compare_files, quantize_file

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

torch_q4.quantize(torch.randn(64, 256), "q4_k")  # brings in what is loaded at first use
before = status("VmRSS")
source, target = sys.argv[1:]
quantize_file(source, target, "q4_k_m", progress=False)
quantised = status("VmHWM")
compare_files(source, target, progress=False)
print(quantised - before, status("VmHWM") - before)
"""


def peaks(source: Path, target: Path) -> list[int]:
    """Bytes of memory that quantising, and comparing after it, needed at most."""
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(target)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [int(count) << 10 for count in result.stdout.split()]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """160 MiB in tensors of 16 MiB."""
    tensors: dict[str, torch.Tensor] = {"token_embd.weight": torch.randn(64, 1024)}
    for layer in range(10):
        tensors[f"blk.{layer}.ffn_up.weight"] = torch.randn(4096, 1024)
    torch_q4.save_gguf(tmp_path / "a.gguf", tensors, metadata(layers=10))
    for peak in peaks(tmp_path / "a.gguf", tmp_path / "b.gguf"):
        assert peak < 80 << 20


@pytest.mark.slow
def test_a_file_of_2_gb_in_two_of_its_tensors(tmp_path: Path) -> None:
    """2.1 GB in tensors of 128 MiB."""
    part = torch.randn(1024, 4096)
    tensors = {"token_embd.weight": part} | {
        f"blk.{layer}.ffn_up.weight": part.repeat(8, 1) for layer in range(16)
    }
    torch_q4.save_gguf(tmp_path / "a.gguf", tensors, metadata(layers=16))
    del tensors
    assert (tmp_path / "a.gguf").stat().st_size > 2 << 30
    began = time.perf_counter()
    quantising, comparing = peaks(tmp_path / "a.gguf", tmp_path / "b.gguf")
    print(
        f"peak memory {quantising / 2**20:.0f} MiB quantising, {comparing / 2**20:.0f} MiB "
        f"comparing, {time.perf_counter() - began:.0f} s"
    )
    assert quantising < 2 * (128 << 20)
    assert comparing < 2 * (128 << 20)
