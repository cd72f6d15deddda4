"""QuantLinear, QuantEmbedding and quantize_ as parts of ordinary PyTorch models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import dense64, random_blocks
from torch import nn

import torch_q4
from torch_q4 import QuantEmbedding, QuantLinear, formats, quantize_


class Tied(nn.Module):
    """A small language model whose head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 256)
        self.hidden = nn.Linear(256, 512)
        self.odd = nn.Linear(512, 100)
        self.back = nn.Linear(100, 256)
        self.head = nn.Linear(256, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.back(self.odd(self.hidden(self.embed(ids)).relu())))


def test_from_linear(fmt) -> None:
    linear = nn.Linear(512, 20)
    layer = QuantLinear.from_linear(linear, fmt)
    assert (layer.in_features, layer.out_features, layer.format) == (512, 20, fmt.name)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (20, fmt.row_bytes(512))
    assert torch.equal(layer.weight, torch_q4.quantize(linear.weight.detach(), fmt))
    assert layer.bias is linear.bias
    x = torch.randn(2, 3, 512)
    wanted = torch_q4.linear(x, layer.weight, fmt, layer.bias)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer.dequantize().double(), dense64(layer.weight, fmt))


def test_from_linear_with_importance(fmt) -> None:
    linear = nn.Linear(512, 20, bias=False)
    importance = torch.rand(512)
    layer = QuantLinear.from_linear(linear, fmt, importance)
    assert layer.bias is None
    wanted = torch_q4.quantize(linear.weight.detach(), fmt, importance)
    assert torch.equal(layer.weight, wanted)


def test_from_blocks_shares_memory(fmt) -> None:
    blocks = random_blocks(fmt, 20, 512)
    layer = QuantLinear.from_blocks(blocks, fmt)
    assert layer.weight.data_ptr() == blocks.data_ptr()
    parameter = nn.Parameter(blocks, requires_grad=False)
    assert QuantLinear.from_blocks(parameter, fmt).blocks is parameter
    assert QuantEmbedding.from_blocks(parameter, fmt).blocks is parameter


@pytest.mark.parametrize("cls", [QuantLinear, QuantEmbedding])
def test_from_blocks_refuses(cls) -> None:
    fmt = formats.get("q4_0")
    blocks = random_blocks(fmt, 4, 64)
    with pytest.raises(ValueError, match="multiple of 18 for q4_0, got 35"):
        cls.from_blocks(blocks[:, :35], fmt)
    with pytest.raises(ValueError, match="2 dimensions"):
        cls.from_blocks(blocks[0], fmt)
    with pytest.raises(TypeError, match="must be uint8"):
        cls.from_blocks(blocks.int(), fmt)
    with pytest.raises(ValueError, match="format must be one of"):
        cls.from_blocks(blocks, "nope")


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match="multiple of 256, got 100"):
        QuantLinear(100, 4, "q4_k")
    with pytest.raises(ValueError, match="compute must be exact or int8, got fast"):
        QuantLinear(256, 4, "q4_k", compute="fast")
    fmt = formats.get("q4_0")
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(5,\)"):
        QuantLinear.from_blocks(random_blocks(fmt, 4, 64), fmt, torch.zeros(5))
    with pytest.raises(ValueError, match="max_norm must be None, got 1"):
        QuantEmbedding.from_embedding(nn.Embedding(4, 64, max_norm=1.0), fmt)


def test_wrong_input_width_raises() -> None:
    fmt = formats.get("q4_0")
    layer = QuantLinear.from_blocks(random_blocks(fmt, 4, 64), fmt)
    with pytest.raises(RuntimeError, match="72 bytes per row for q4_0 with 128 columns, got 36"):
        layer(torch.randn(2, 128))


def test_embedding_module(fmt, dtype) -> None:
    table = nn.Embedding(30, 256, padding_idx=3).to(dtype)
    module = QuantEmbedding.from_embedding(table, fmt)
    ids = torch.randint(0, 30, (2, 5))
    rows = module(ids)
    assert rows.dtype == dtype
    assert rows.shape == (2, 5, 256)
    assert torch.equal(rows, module.dequantize(dtype)[ids])
    assert module.padding_idx == 3
    assert (module.num_embeddings, module.embedding_dim) == (30, 256)


def test_casts_leave_blocks_alone(fmt) -> None:
    model = nn.Sequential(nn.Embedding(30, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    quantize_(model, fmt)
    before = [module.weight.clone() for module in model]
    for cast, dtype in (
        (model.half, torch.float16), (model.bfloat16, torch.bfloat16), (model.float, torch.float32)
    ):  # fmt: skip
        cast()
        assert all(
            torch.equal(module.weight, old) for module, old in zip(model, before, strict=True)
        )
        assert model[1].bias.dtype == dtype
        assert model(torch.tensor([1, 2])).dtype == dtype
    model.to(torch.float16)
    assert model(torch.tensor([1])).dtype == torch.float16


def test_repr() -> None:
    layer = QuantLinear(256, 8, "q4_k", compute="int8")
    assert repr(layer) == (
        "QuantLinear(in_features=256, out_features=8, format=q4_k, bias=True, compute=int8)"
    )
    table = QuantEmbedding(10, 256, "q6_k", dtype=torch.bfloat16)
    assert repr(table) == (
        "QuantEmbedding(num_embeddings=10, embedding_dim=256, format=q6_k, dtype=torch.bfloat16)"
    )


def test_deepcopy_and_pickle(fmt) -> None:
    model = nn.Sequential(nn.Embedding(30, 256), nn.Linear(256, 8))
    quantize_(model, fmt, compute="int8")
    ids = torch.arange(30)
    wanted = model(ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), wanted)
        assert other[1].blocks.data_ptr() != model[1].blocks.data_ptr()
        assert other[1].format == fmt.name


def test_state_dict_round_trip(fmt) -> None:
    source = QuantLinear.from_linear(nn.Linear(512, 20), fmt)
    state = source.state_dict()
    assert set(state) == {"weight", "weight_format", "bias"}
    assert torch.equal(state["weight"], source.weight)
    assert state["weight"].dtype == torch.uint8
    assert int(state["weight_format"]) == fmt.type_id
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    target = QuantLinear(512, 20, fmt)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = torch.randn(3, 512)
    assert torch.equal(target(x), source(x))


def test_state_dict_of_a_model_round_trips_through_safetensors(fmt, tmp_path) -> None:
    import safetensors.torch

    model = nn.Sequential(nn.Embedding(30, 256), nn.Linear(256, 512), nn.Linear(512, 8))
    quantize_(model, fmt)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(
        QuantEmbedding(30, 256, fmt), QuantLinear(256, 512, fmt), QuantLinear(512, 8, fmt)
    )
    result = other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert not result.missing_keys
    assert not result.unexpected_keys
    ids = torch.arange(30)
    assert torch.equal(other(ids), model(ids))


def test_loading_another_format_is_refused() -> None:
    state = QuantLinear(256, 8, "q4_k").state_dict()
    with pytest.raises(RuntimeError, match=r"weight_format: the format must be q4_0 \(2\), got 12"):
        QuantLinear(256, 8, "q4_0").load_state_dict(state)
    # 18 bytes for 32 elements and 144 for 256: the same shape, so only the format can tell.
    assert state["weight"].shape == QuantLinear(256, 8, "q4_0").weight.shape
    del state["weight_format"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_format"'):
        QuantLinear(256, 8, "q4_k").load_state_dict(state)
    result = QuantLinear(256, 8, "q4_k").load_state_dict(state, strict=False)
    assert result.missing_keys == ["weight_format"]


def test_loading_a_wrong_shape_is_refused() -> None:
    state = QuantLinear(256, 8, "q4_k").state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        QuantLinear(512, 8, "q4_k").load_state_dict(state)


def test_meta_construction_and_assign(fmt) -> None:
    source = QuantLinear.from_linear(nn.Linear(512, 20), fmt)
    for meta in (QuantLinear(512, 20, fmt, device="meta"), _under_meta(512, 20, fmt)):
        assert meta.blocks.is_meta
        assert meta.bias.is_meta
        assert meta(torch.empty(2, 512, device="meta")).shape == (2, 20)
        meta.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(3, 512)
        assert torch.equal(meta(x), source(x))
    table = QuantEmbedding(10, 256, fmt, device="meta").to_empty(device="cpu")
    assert table(torch.tensor([1])).shape == (1, 256)


def _under_meta(k, n, fmt) -> QuantLinear:
    with torch.device("meta"):
        return QuantLinear(k, n, fmt)


def test_layouts_are_the_layers_own_business(fmt) -> None:
    """Packed or not, a layer computes the same and shows GGML's own bytes; pack_ keeps ties."""
    for rows in (16, 37, 5):
        blocks = random_blocks(fmt, rows, 512)
        original = blocks.clone()
        plain = QuantLinear.from_blocks(blocks, fmt)
        assert not plain.packed
        assert plain.weight.data_ptr() == blocks.data_ptr()
        packed = QuantLinear.from_blocks(blocks.clone(), fmt)
        assert torch_q4.pack_(packed) is packed
        assert packed.packed
        assert torch.equal(packed.weight, original)
        assert torch.equal(packed.blocks, torch_q4.pack(original, fmt))
        for key, value in packed.state_dict().items():
            assert torch.equal(value, plain.state_dict()[key])
        for m in (1, 3, 9, 200):
            x = torch.randn(m, 512)
            assert torch.equal(packed(x), plain(x))
        assert torch.equal(packed.dequantize(), plain.dequantize())
        table = torch_q4.pack_(QuantEmbedding.from_blocks(blocks.clone(), fmt))
        assert torch.equal(table(torch.arange(rows)), plain.dequantize())
        assert torch.equal(blocks, original)
        torch_q4.pack_(packed)  # once more changes nothing
        assert torch.equal(packed.weight, original)


def test_pack_keeps_ties() -> None:
    fmt = formats.get("q6_k")
    shared = nn.Parameter(random_blocks(fmt, 48, 256), requires_grad=False)
    wanted = shared.detach().clone()
    model = nn.ModuleDict(
        {
            "embed": QuantEmbedding.from_blocks(shared, fmt),
            "head": QuantLinear.from_blocks(shared, fmt),
        }
    )
    torch_q4.pack_(model)
    assert model["embed"].blocks is model["head"].blocks
    for module in model.values():
        assert torch.equal(module.weight, wanted)


def test_loading_a_tied_pair_twice_packs_it_once() -> None:
    model = Tied()
    quantize_(model, "q6_k")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_weight_is_read_only() -> None:
    layer = QuantLinear.from_linear(nn.Linear(256, 16), "q4_k")
    layer.weight.zero_()  # a copy: what the layer computes with is not touched
    assert layer.weight.any()
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(1)


def test_requires_grad_spares_the_blocks() -> None:
    layer = QuantLinear.from_linear(nn.Linear(256, 8), "q4_k")
    layer.requires_grad_(False)
    assert not layer.bias.requires_grad
    layer.requires_grad_(True)
    assert layer.bias.requires_grad
    assert not layer.blocks.requires_grad
    torch.optim.SGD(layer.parameters(), lr=0.1)


# ---- quantize_ -----------------------------------------------------------------------------------


def test_quantize_model_and_report() -> None:
    model = Tied()
    plain = copy.deepcopy(model)
    report = quantize_(model, "q4_k")
    assert report.quantized == {
        "embed": "q4_k", "hidden": "q4_k", "odd": "q4_k", "head": "q4_k"
    }  # fmt: skip
    assert report.skipped == {"back": "columns must be a multiple of 256 for q4_k, got 100"}
    assert report.bytes_before == 4 * (50 * 256 + 256 * 512 + 512 * 100)  # tied: counted once
    assert report.bytes_after == (50 * 256 + 256 * 512 + 512 * 100) // 256 * 144
    assert type(model.back) is nn.Linear
    ids = torch.arange(50)
    error = (model(ids) - plain(ids)).norm() / plain(ids).norm()
    assert 0 < error < 0.2


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    quantize_(model, "q6_k")
    assert isinstance(model.embed, QuantEmbedding)
    assert isinstance(model.head, QuantLinear)
    assert model.head.blocks is model.embed.blocks
    for moved in (copy.deepcopy(model), model.half(), model.to("cpu")):
        assert moved.head.blocks is moved.embed.blocks


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.Linear(256, 256)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = quantize_(model, "q4_0")
    assert model[0] is model[2]
    assert report.quantized == {"0": "q4_0", "2": "q4_0"}
    assert report.bytes_before == 256 * 256 * 4


def test_filter_formats_by_name_and_function() -> None:
    model = Tied()
    report = quantize_(model, "q4_k", lambda module, name: isinstance(module, nn.Linear))
    assert "embed" not in report.quantized
    model = Tied()
    report = quantize_(model, {"hidden": "q6_k", "odd": "Q4_0"})
    assert report.quantized == {"hidden": "q6_k", "odd": "q4_0"}
    assert model.odd.format == "q4_0"
    model = Tied()
    report = quantize_(model, lambda name: "q8_0" if name == "hidden" else None)
    assert report.quantized == {"hidden": "q8_0"}
    model = Tied()
    weight = model.hidden.weight.detach()
    importance = torch.rand(256)
    quantize_(model, {"hidden": "q4_k"}, importance={"hidden": importance})
    assert torch.equal(model.hidden.weight, torch_q4.quantize(weight, "q4_k", importance))


def test_quantize_refuses_before_it_changes_anything() -> None:
    model = Tied()
    for call, words in (
        (lambda: quantize_(model, "q9"), "format must be one of"),
        (lambda: quantize_(model, {"hidden": "q4_k", "odd": "q9"}), "format must be one of"),
        (lambda: quantize_(model, {"hiden": "q4_k"}), r"fmt must name layers .*\['hiden'\]"),
        (lambda: quantize_(model, "q4_k", compute="fast"), "compute must be exact or int8"),
        (lambda: quantize_(model, "q4_k", importance={"x": torch.ones(1)}), r"got \['x'\]"),
        (lambda: quantize_(nn.Linear(256, 4), "q4_k"), "bare Linear; use QuantLinear.from_linear"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert type(model.hidden) is nn.Linear


def test_training_mode_and_other_dtypes() -> None:
    model = nn.Sequential(nn.Linear(256, 256).double(), nn.Linear(256, 8)).eval()
    report = quantize_(model, "q4_0")
    assert report.skipped == {"0": "weight must be float32, float16 or bfloat16, got torch.float64"}
    assert model[1].training is False


def test_subclasses_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(256, 256))
    assert quantize_(model, "q4_0").quantized == {}
