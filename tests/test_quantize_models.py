"""quantize_ on models of transformers: ties, scaled embeddings, experts, and what stays."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from test_nn import check_sizes, dequantized, real_size, relative_error
from torch import nn

import torch_q4
from torch_q4 import QuantizeReport, quantize_, recipes
from torch_q4._tensors import TensorInfo
from torch_q4.nn import ScaledQuantEmbedding

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "gemma3_text": SMALL,
    "gemma3_text, rows of 320": {**SMALL, "hidden_size": 320},
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen3_moe": {
        **SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256
    },
    "gpt2": {
        "vocab_size": 64, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "mamba": {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2},
    "t5": {
        "vocab_size": 64, "d_model": 256, "d_kv": 64, "d_ff": 256, "num_layers": 2,
        "num_heads": 4,
    },
    "bart": {
        "vocab_size": 64, "d_model": 256, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256, "scale_embedding": True,
    },
}  # fmt: skip
# Models in which the embedding shares its weight with a layer that cannot be replaced.
HALF_TIED = {
    "mamba": {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1},
    "falcon_mamba": {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1},
    "minicpm3": {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2},
    "ibert": {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 64},
    "mobilebert": {
        **SMALL, "num_hidden_layers": 1, "embedding_size": 256, "max_position_embeddings": 64
    },
    "neomme": {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 64},
}  # fmt: skip
IDS = torch.arange(12).view(2, 6)


def build(name: str, **changes: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    kind = name.partition(",")[0]
    config = transformers.AutoConfig.for_model(kind, **{**MODELS[name], **changes})
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def bytes_kept(report: QuantizeReport, reason: str) -> dict[str, int]:
    """The tensors that stay for a reason, but other names of the same memory."""
    return {
        name: kept.nbytes
        for name, kept in report.kept.items()
        if kept.reason == reason and kept.nbytes
    }


@pytest.mark.parametrize("which", ["q4_k", "Q4_K_M"])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_logits(name: str, which: str) -> None:
    model = build(name)
    plain, before = copy.deepcopy(model), real_size(model)
    report = quantize_(model, which)
    check_sizes(report, model, before)
    assert report.ratio < 1
    assert relative_error(logits(model), logits(dequantized(plain, model))) < 1e-5


def test_gemma_becomes_smaller() -> None:
    """Its embedding scales its rows and is the output layer's weight."""
    model = build("gemma3_text")
    table = model.get_input_embeddings()
    assert type(table) is not nn.Embedding
    ids = torch.arange(64)
    quantize_(model, "q8_0")
    packed = model.get_input_embeddings()
    assert type(packed) is ScaledQuantEmbedding
    assert packed.blocks is model.get_output_embeddings().blocks
    assert relative_error(packed(ids), table(ids).detach()) < 0.01
    assert torch.equal(packed(ids), packed.dequantize()[ids] * 16)
    assert real_size(model) < 0.28 * real_size(build("gemma3_text"))


def test_a_checkpoint_of_a_quantised_gemma(tmp_path: Path) -> None:
    model, other = build("gemma3_text"), build("gemma3_text")
    other.get_input_embeddings().weight.data.zero_()
    quantize_(model, "q4_k_m")
    torch_q4.save_checkpoint(model, tmp_path / "gemma.safetensors")
    torch_q4.load_checkpoint(other, tmp_path / "gemma.safetensors")
    assert torch.equal(logits(other), logits(model))
    assert other.get_input_embeddings().blocks is other.get_output_embeddings().blocks


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("gemma3_text", "q4_k_m"), ("gemma3_text, rows of 320", "q4_k_m"), ("llama", "q4_0"),
        ("qwen2", "q5_k_s"), ("qwen3", "q2_k"),
    ],
)  # fmt: skip
def test_mixes_choose_as_for_a_file(name: str, mix: str) -> None:
    """The formats are those that converting the same model to a GGUF file would give."""
    from torch_q4.integrations.gguf_export import Export, tensor_names

    model = build(name, num_hidden_layers=8)
    names = tensor_names(model)
    facts = Export(model.config).facts
    parameters = dict(model.named_parameters())  # the tied output layer is not among them
    infos = [
        TensorInfo(names[path], None, tuple(parameters[f"{path}.weight"].shape), torch.float32)
        for path in names
        if f"{path}.weight" in parameters
    ]
    # Importance changes what q4_0 chooses for the first layers.
    importance = {"model.layers.1.mlp.down_proj": torch.ones(256)} if mix == "q4_0" else None
    wanted = recipes.choose(
        mix,
        infos,
        facts,
        has_importance=importance is not None,
    )
    report = quantize_(model, recipes.get(mix), importance=importance)
    assert report.mix == f"{mix}, as llama.cpp chooses for {facts.architecture}"
    found = {names[path]: fmt for path, fmt in report.quantized.items()}
    if "output.weight" not in wanted:
        assert found.pop("output.weight") == found["token_embd.weight"]
    assert found == {name: fmt.name for name, fmt in wanted.items()}
    assert len(set(found.values())) > 1


def test_the_filter_does_not_change_what_a_mix_chooses() -> None:
    everything = quantize_(build("llama"), "q4_k_m").quantized
    some = quantize_(build("llama"), "q4_k_m", lambda module, name: ".1." in name).quantized
    assert some == {name: fmt for name, fmt in everything.items() if ".1." in name}
    assert len(set(some.values())) == 2


def test_a_known_model_with_another_head_has_the_general_rule() -> None:
    config = transformers.AutoConfig.for_model("llama", **SMALL, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    report = quantize_(model, "q4_k_m")
    assert report.mix == "q4_k_m, the general rule: q4_k, output layer apart"
    assert set(report.quantized.values()) == {"q4_k"}


def test_experts_are_listed_with_their_bytes() -> None:
    experts = 2 * 4 * 3 * 256 * 256 * 4
    for name in ("mixtral", "qwen3_moe"):
        model = build(name)
        kind = type(model.model.layers[0].mlp.experts).__name__
        report = quantize_(model, "q4_k")
        kept = bytes_kept(report, f"{kind} is no nn.Linear or nn.Embedding (3 dimensions)")
        assert sum(kept.values()) == experts
        assert "model.layers.1.mlp.experts.gate_up_proj" in kept
        assert f"kept       {experts / 1e6:.1f} MB: {kind}" in str(report)
        assert report.ratio > 0.7


def test_gpt2s_own_layers_are_listed() -> None:
    report = quantize_(build("gpt2"), "q4_k")
    kept = bytes_kept(report, "Conv1D is no nn.Linear or nn.Embedding (2 dimensions)")
    assert sum(kept.values()) == 2 * 12 * 256 * 256 * 4
    assert set(report.quantized) == {"transformer.wte", "transformer.wpe", "lm_head"}


def test_layers_whose_weight_their_model_reads() -> None:
    report = quantize_(build("t5"), "q4_k")
    kept = bytes_kept(report, "T5DenseActDense reads its weight")
    assert set(kept) == {
        f"{side}.block.{layer}.layer.{place}.DenseReluDense.wo.weight"
        for side, place in (("encoder", 1), ("decoder", 2)) for layer in (0, 1)
    }  # fmt: skip
    report = quantize_(build("mamba"), "q4_k")
    assert set(report.quantized) == {f"backbone.layers.{layer}.mixer.in_proj" for layer in (0, 1)}
    reason = "tied to lm_head.weight, which stays: MambaForCausalLM reads its weight"
    assert bytes_kept(report, reason) == {"backbone.embeddings.weight": 64 * 256 * 4}


@pytest.mark.parametrize("name", HALF_TIED)
def test_ties_with_a_layer_that_stays(name: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **HALF_TIED[name])
    causal = "mamba" in name or name == "minicpm3"
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    model = kind.from_config(config).eval()
    plain, before = copy.deepcopy(model), real_size(model)
    report = quantize_(model, "q4_0")
    check_sizes(report, model, before)
    assert any("tied to" in kept.reason for kept in report.kept.values())
    assert relative_error(logits(model), logits(dequantized(plain, model))) < 1e-5


def test_bart_scales_its_embeddings() -> None:
    model = build("bart")
    report = quantize_(model, "q4_k")
    assert type(model.get_input_embeddings()) is ScaledQuantEmbedding
    reason = "BartLearnedPositionalEmbedding is a subclass that may do more"
    assert len(bytes_kept(report, reason)) == 2
