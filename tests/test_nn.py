"""QuantLinear, QuantEmbedding and quantize_ as parts of ordinary PyTorch models."""

from __future__ import annotations

import copy
import io
import pickle
import types
import unittest.mock

import pytest
import torch
from conftest import dense64, random_blocks
from torch import nn
from torch.nn.utils import prune

import torch_q4
from torch_q4 import QuantEmbedding, QuantizeReport, QuantLinear, formats, quantize_, recipes
from torch_q4.nn import ScaledQuantEmbedding


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


def real_size(model: nn.Module) -> int:
    """The bytes of a model's tensors, each memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


def check_sizes(report: QuantizeReport, model: nn.Module, before: int) -> None:
    """The report's figures are the model's own, and its parts make up the whole."""
    assert report.bytes_before == before
    assert report.bytes_after == real_size(model)
    kept = sum(kept.nbytes for kept in report.kept.values())
    assert report.quantized_bytes + kept == report.bytes_after
    names = {name for name, value in (*model.named_parameters(remove_duplicate=False),
                                      *model.named_buffers(remove_duplicate=False))
             if value.numel()}  # fmt: skip
    assert names == {*report.kept, *(f"{name}.blocks" for name in report.quantized)}


def dequantized(plain: nn.Module, model: nn.Module) -> nn.Module:
    """The model as it was, with the values that its blocks have."""
    plain = copy.deepcopy(plain)
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            weight = plain.get_submodule(name).weight
            weight.data = module.dequantize(weight.dtype)
    return plain


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.quantises
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


@pytest.mark.quantises
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


@pytest.mark.quantises
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


@pytest.mark.quantises
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


@pytest.mark.quantises
def test_deepcopy_and_pickle(fmt) -> None:
    model = nn.Sequential(nn.Embedding(30, 256), nn.Linear(256, 8))
    quantize_(model, fmt, compute="int8")
    ids = torch.arange(30)
    wanted = model(ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), wanted)
        assert other[1].blocks.data_ptr() != model[1].blocks.data_ptr()
        assert other[1].format == fmt.name


@pytest.mark.quantises
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


@pytest.mark.quantises
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


@pytest.mark.quantises
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
    before = real_size(model)
    report = quantize_(model, "q4_k")
    assert report.quantized == {
        "embed": "q4_k", "hidden": "q4_k", "odd": "q4_k", "head": "q4_k"
    }  # fmt: skip
    reason = "columns must be a multiple of 256 for q4_k or of 32 for q5_0, got 100"
    assert report.kept["back.weight"] == (reason, 4 * 100 * 256)
    reason = "biases and norms: tensors of fewer than 2 dimensions"
    assert report.kept["odd.bias"] == (reason, 4 * 100)
    assert set(report.kept) == {"back.weight", "back.bias", "hidden.bias", "odd.bias"}
    assert report.quantized_bytes == (50 * 256 + 256 * 512 + 512 * 100) // 256 * 144
    check_sizes(report, model, before)
    assert report.ratio == report.bytes_after / before
    assert type(model.back) is nn.Linear
    ids = torch.arange(50)
    error = (model(ids) - plain(ids)).norm() / plain(ids).norm()
    assert 0 < error < 0.2


def test_the_report_as_a_table() -> None:
    model = nn.Sequential(
        nn.Embedding(2000, 256), nn.Linear(256, 64), nn.Linear(64, 7), nn.Linear(7, 7)
    )
    report = quantize_(model, "q4_k")
    short = "biases and norms: tensors of fewer than 2 dimensions"
    assert str(report).splitlines() == [
        "model      2.1 MB -> 298.0 kB (ratio 0.14)",
        "quantized  297.5 kB: 2 q4_k, 1 q5_0",
        "fallback   1 q5_0 instead of q4_k",
        f"kept       0.3 kB: {short}: 1.bias and 2 more",
        "kept       0.2 kB: columns must be a multiple of 256 for q4_k or of 32 for q5_0, got 7: "
        "3.weight",
    ]


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
    assert report.bytes_before == (256 * 256 + 256) * 4
    assert sorted(kept.nbytes for kept in report.kept.values()) == [0, 256 * 4]


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
    reason = "weight must be float32, float16 or bfloat16, got torch.float64"
    assert report.kept["0.weight"] == (reason, 256 * 256 * 8)
    assert model[1].training is False


def test_subclasses_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(256, 256))
    assert quantize_(model, "q4_0").quantized == {}


@pytest.mark.quantises
def test_rows_that_do_not_fit_get_a_shorter_format(fmt) -> None:
    """As llama.cpp's recipes have it; not where that is turned off."""
    columns = 96
    fits = columns % fmt.block_elems == 0
    shorter = recipes.fallback(fmt)
    wanted = {} if fits or shorter is None else {"0": fmt.name}
    model = nn.Sequential(nn.Linear(columns, 8), nn.Linear(8, 8))
    report = quantize_(model, fmt)
    assert report.fallbacks == wanted
    if fits or shorter is not None:
        assert report.quantized == {"0": (fmt if fits else shorter).name}
        assert model[0].format == report.quantized["0"]
    else:
        assert report.quantized == {}
    strict = nn.Sequential(nn.Linear(columns, 8))
    report = quantize_(strict, fmt, fallback=False)
    assert report.quantized == ({"0": fmt.name} if fits else {})
    assert report.fallbacks == {}
    if not fits:
        reason = f"columns must be a multiple of {fmt.block_elems} for {fmt.name}, got 96"
        assert report.kept["0.weight"] == (reason, 8 * columns * 4)


@pytest.mark.parametrize("recipe", recipes.all(), ids=lambda recipe: recipe.name)
def test_a_mix_in_a_model_that_no_rule_is_of(recipe: recipes.Recipe) -> None:
    base = recipe.base.name
    best = "q8_0" if recipe.name in ("q8_0", "mxfp4_moe") else "q6_k"
    model = Tied()
    mixed = quantize_(model, recipe)
    assert mixed.mix == f"{recipe.name}, the general rule: {base}, output layer apart"
    assert mixed.mix in str(mixed)
    assert mixed.quantized == {"embed": best, "hidden": base, "odd": base, "head": best}

    class Untied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 256), nn.Linear(256, 50)
            self.narrow = nn.Linear(96, 50)

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    report = quantize_(Untied(), recipe)
    assert (report.quantized["embed"], report.quantized["out"]) == (base, best)
    assert report.quantized["narrow"] == recipes.fitting(recipe.base, 96).name
    # A name that is a format's, too, is the format's.
    name = recipe.name.upper()
    report = quantize_(Untied(), name)
    is_format = recipe.name in [fmt.name for fmt in formats.all()]
    assert report.mix == (None if is_format else mixed.mix)
    assert report.quantized["out"] == (base if is_format else best)


# ---- ties ----------------------------------------------------------------------------------------


class Special(nn.Linear):
    """A subclass, of which nobody knows what it does."""


class Apart(nn.Module):
    """Holds a parameter of its own, no layer's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.table = weight


def triple(*others: nn.Module) -> nn.Module:
    """An embedding, a linear layer deep inside, and others, all with one weight."""
    model = nn.ModuleDict({"embed": nn.Embedding(40, 256)})
    model["deep"] = nn.Sequential(nn.Sequential(nn.Linear(256, 40)))
    model["deep"][0][0].weight = model["embed"].weight
    for place, other in enumerate(others):
        if hasattr(other, "weight"):
            other.weight = model["embed"].weight
        else:
            other = Apart(model["embed"].weight)
        model[f"other{place}"] = other
    return model


def test_three_modules_with_one_weight() -> None:
    model = triple(nn.Linear(256, 40, bias=False))
    before = real_size(model)
    report = quantize_(model, "q4_k")
    assert set(report.quantized) == {"embed", "deep.0.0", "other0"}
    assert model["embed"].blocks is model["deep"][0][0].blocks is model["other0"].blocks
    check_sizes(report, model, before)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Special(256, 40), "Special is a subclass that may do more"),
        (nn.Module(), "Apart is no nn.Linear or nn.Embedding"),
        (nn.Embedding(40, 256, max_norm=1.0), "max_norm must be None, got 1.0"),
    ],
)
def test_a_tie_to_something_that_stays(other: nn.Module, reason: str) -> None:
    model = triple(other)
    before = real_size(model)
    report = quantize_(model, "q4_k")
    assert report.quantized == {}
    name = "other0.table" if "Apart" in reason else "other0.weight"
    assert report.kept["embed.weight"] == (
        f"tied to {name}, which stays: {reason}", 40 * 256 * 4
    )  # fmt: skip
    assert report.kept["deep.0.0.weight"] == (f"tied to {name}, which stays: {reason}", 0)
    assert report.kept[name] == (reason, 0)
    assert model["embed"].weight is model["deep"][0][0].weight
    check_sizes(report, model, before)


def test_one_side_of_a_tie_is_not_chosen() -> None:
    for chosen in (
        {"filter_fn": lambda module, name: isinstance(module, nn.Linear)},
        {"fmt": {"hidden": "q4_k", "odd": "q4_k", "head": "q4_k"}},
        {"fmt": lambda name: "q4_k" if name != "embed" else None},
    ):
        model = Tied()
        before = real_size(model)
        report = quantize_(model, **{"fmt": "q4_k", **chosen})
        assert set(report.quantized) == {"hidden", "odd"}
        assert report.kept["embed.weight"] == ("not chosen", 50 * 256 * 4)
        reason = "tied to embed.weight, which stays: not chosen"
        assert report.kept["head.weight"] == (reason, 0)
        assert model.head.weight is model.embed.weight
        check_sizes(report, model, before)


def test_equal_views_of_one_memory_are_a_tie() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.data)
    before = real_size(model)
    report = quantize_(model, "q4_k")
    assert model.head.blocks is model.embed.blocks
    check_sizes(report, model, before)


def test_a_part_or_a_transpose_of_another_weight_stays() -> None:
    model = nn.ModuleDict({name: nn.Linear(256, 256, bias=False) for name in "abc"})
    model["d"] = nn.Linear(256, 128, bias=False)
    model["b"].weight = nn.Parameter(model["a"].weight.data.t())
    model["d"].weight = nn.Parameter(model["c"].weight.data[128:])
    report = quantize_(model, "q4_k")
    assert report.quantized == {}
    reason = "weight shares memory with another tensor of the model, of other shape or strides"
    assert {kept.reason for kept in report.kept.values()} == {reason}
    assert {name: kept.nbytes for name, kept in report.kept.items()} == {
        "a.weight": 256 * 256 * 4, "b.weight": 0, "c.weight": 256 * 256 * 4, "d.weight": 0
    }  # fmt: skip
    assert report.bytes_before == report.bytes_after == 2 * 256 * 256 * 4
    # Neighbours in one memory share nothing.
    memory = torch.randn(512, 256)
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    for layer, weight in zip(model, memory.chunk(2), strict=True):
        layer.weight = nn.Parameter(weight)
    assert set(quantize_(model, "q4_k").quantized) == {"0", "1"}


def test_tied_layers_must_agree() -> None:
    model = Tied()
    words = r"share a weight must have one format, got \{'embed': 'q4_k', 'head': 'q6_k'\}"
    with pytest.raises(ValueError, match=words):
        quantize_(model, {"hidden": "q4_k", "embed": "q4_k", "head": "q6_k"})
    assert type(model.hidden) is nn.Linear
    shared = nn.Linear(256, 256)
    model = nn.Sequential(shared, shared)
    with pytest.raises(ValueError, match=r"one format, got q4_k and q6_k for \['0', '1'\]"):
        quantize_(model, {"0": "q4_k", "1": "q6_k"})
    # One name of a module is enough.
    assert quantize_(model, {"1": "q6_k"}).quantized == {"0": "q6_k", "1": "q6_k"}


def test_importance_of_tied_layers() -> None:
    first, second = torch.rand(256), torch.rand(256)
    for importance, wanted in (
        ({"head": first}, first),
        ({"embed": first}, first),
        ({"head": first, "embed": second}, torch.stack([first, second]).mean(0)),
    ):
        model = Tied()
        weight = model.embed.weight.detach()
        quantize_(model, "q4_k", importance=importance)
        assert torch.equal(model.embed.weight, torch_q4.quantize(weight, "q4_k", wanted))
        assert model.head.blocks is model.embed.blocks


# ---- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_transformer_layers_still_run(training: bool) -> None:
    """In eval an encoder layer hands `linear1.weight` to a kernel of its own."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
    other = nn.TransformerDecoderLayer(256, 4, 512, dropout=0.0, batch_first=True)
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(layer, 2),
            "layer": copy.deepcopy(layer),
            "decoder": nn.TransformerDecoder(other, 2),
            "attention": nn.MultiheadAttention(256, 4, batch_first=True),
            "last": nn.Linear(256, 256),
        }
    ).train(training)
    plain, before = copy.deepcopy(model), real_size(model)
    report = quantize_(model, "q4_k")
    check_sizes(report, model, before)
    assert set(report.quantized) == {
        "last", *(f"decoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2))
    }  # fmt: skip
    for name, reason in (
        ("encoder.layers.1.linear2.weight", "TransformerEncoder reads its weight"),
        ("layer.linear1.weight", "TransformerEncoderLayer reads its weight"),
        ("attention.out_proj.weight", "MultiheadAttention reads its weight"),
        ("attention.in_proj_weight",
         "MultiheadAttention is no nn.Linear or nn.Embedding (2 dimensions)"),
    ):  # fmt: skip
        assert report.kept[name].reason == reason
    x = torch.randn(2, 5, 256)

    def run(model: nn.ModuleDict) -> torch.Tensor:
        y = model["encoder"](x) + model["layer"](x)
        y = model["decoder"](y, x) + model["attention"](x, x, x)[0]
        return model["last"](y)

    with torch.no_grad():
        assert relative_error(run(model), run(dequantized(plain, model))) < 1e-5


class Reader(nn.Module):
    """Reads its layers' weights in the ways that code has."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefghijkl":
            self.add_module(name, nn.Linear(256, 256))
        self.inner = nn.Sequential(nn.Linear(256, 256))
        self.many = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))
        self.named = nn.ModuleDict({"x": nn.Linear(256, 256)})
        self.bare = nn.ModuleList([nn.Linear(256, 256)])
        self.time = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))

    def _init_weights(self) -> None:
        self.l.weight.data.zero_()  # nothing that forward calls

    @property
    def kind(self) -> torch.dtype:
        return self.d.weight.dtype

    def helper(self) -> torch.Tensor:
        return self.e.weight

    def deviceless(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.k.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.a.weight.dtype)
        alias = self.b
        x = x @ alias.weight.T
        x = (lambda y: y @ self.c.weight)(x).to(self.kind)
        x = x @ self.helper() + self.inner[0].weight
        for layer in self.many:
            x = x @ layer.weight
        for block in self.named.values():
            x = x + block.weight.sum()
        x = x.to(next(self.time.parameters()).dtype)
        for layer in (self.f, self.g):
            x = layer(x)
        return self.deviceless(self.bare[0](self.time(x)))


class Derived(Reader):
    """Reads in what it inherits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize("cls", [Reader, Derived])
def test_weights_that_other_modules_read(cls: type[Reader]) -> None:
    model = nn.Sequential(cls())
    report = quantize_(model, "q4_k")
    kept = {
        name.removesuffix(".weight").removeprefix("0."): kept.reason
        for name, kept in report.kept.items()
        if name.endswith("weight")
    }
    reads, takes = f"{cls.__name__} reads its weight", "takes its dtype from parameters()"
    wanted = {name: reads for name in ("a", "b", "c", "d", "e", "inner.0", "many.0", "many.1")}
    wanted["named.x"] = reads
    assert kept.pop("time.0") == f"{cls.__name__} {takes}"
    # Elements of a container of this code: which of them are read cannot be told.
    assert kept.pop("bare.0") == reads
    # And so may be what the code puts into a tuple.
    assert kept.pop("f") == kept.pop("g") == reads
    assert kept == wanted
    assert {"0.k", "0.l", "0.time.1"} <= report.quantized.keys()


def product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight.T


def body(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x @ module.proj.weight.T


TABLE = {"product": product, "body": body}


class Given(nn.Module):
    """Reads the weight of a layer that it is given."""

    def forward(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return x @ layer.weight.T


class GivenParent(nn.Module):
    """Reads the weight of a layer of a module that it is given."""

    def forward(self, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        return x @ module.proj.weight.T


class Hides(nn.Module):
    """Layers that are read where their name is not in sight; and `free`, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other, self.free = (nn.Linear(256, 256, bias=False) for _ in range(3))
        self.which = "proj"
        self.plain = [self.proj]
        self.nested = nn.ModuleList([nn.ModuleList([nn.Linear(256, 256, bias=False)])])
        self.given = Given()
        self.given_parent = GivenParent()
        self.attribute = product

    def times(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.T

    def chosen(self) -> nn.Linear:
        return self.proj

    def by_function(self, x):
        return product(self.proj, x)

    def by_function_of_self(self, x):
        return body(self, x)

    def by_table(self, x):
        return TABLE["product"](self.proj, x)

    def by_method(self, x):
        return self.times(self.proj, x)

    def by_result(self, x):
        return x @ self.chosen().weight.T

    def by_name(self, x):
        return x @ getattr(self, self.which).weight.T

    def by_weights_name(self, x):
        return x @ getattr(self.proj, "weight").T  # noqa: B009

    def by_branch(self, x):
        layer = self.other
        if x.numel():
            layer = self.proj
        if not x.numel():
            layer = self.other
        return x @ layer.weight.T

    def by_condition(self, x):
        return x @ (self.proj if x.numel() else self.other).weight.T

    def by_list(self, x):
        for layer in self.plain:
            x = x @ layer.weight.T
        return x

    def by_nested_lists(self, x):
        for row in self.nested:
            for layer in row:
                x = x @ layer.weight.T
        return x

    def by_child(self, x):
        return self.given(x, self.proj)

    def by_child_given_self(self, x):
        return self.given_parent(x, self)

    def optional(self, x, layer=None):
        if layer is None:
            layer = self.other
        return x @ layer.weight.T

    def by_parameter(self, x):
        return self.optional(x, self.proj)

    def by_attribute(self, x):
        return self.attribute(self.proj, x)

    def by_children(self, x):
        for child in self.children():
            if isinstance(child, nn.Linear):
                x = x @ child.weight.T
        return x


@pytest.mark.parametrize("way", [name for name in vars(Hides) if name.startswith("by_")])
def test_weights_that_are_read_out_of_sight(way: str) -> None:
    forward = vars(Hides)[way]
    cls = type("Hiding", (Hides,), {
        "forward": lambda self, x: self.free(forward(self, x))
    })  # fmt: skip
    model, x = cls(), torch.randn(3, 256)
    if "given" not in way and way != "by_child":
        del model.given, model.given_parent  # their reads are the whole model's business
    plain = copy.deepcopy(model)
    quantize_(model, "q4_0")
    assert relative_error(model(x), dequantized(plain, model)(x)) < 1e-5
    # Each layer may be the one.
    searches = way in ("by_name", "by_weights_name", "by_children")
    assert (type(model.free) is nn.Linear) == searches


def test_forward_on_the_object_reads() -> None:
    model = nn.Sequential(nn.ModuleDict({"a": nn.Linear(256, 256), "b": nn.Linear(256, 256)}))
    model[0].forward = types.MethodType(lambda self, x: self.a.weight @ x, model[0])
    report = quantize_(model, "q4_k")
    assert report.quantized == {"0.b": "q4_k"}
    assert report.kept["0.a.weight"].reason == "ModuleDict reads its weight"


def test_modules_that_compute_their_weight() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(5)))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[1])
    nn.utils.spectral_norm(model[2])
    prune.l1_unstructured(model[3], "weight", 0.5)
    before = real_size(model)
    x = torch.randn(3, 256)
    model.eval()
    report = quantize_(model, "q4_k")
    check_sizes(report, model, before)
    assert report.quantized == {"4": "q4_k"}
    for place, leaf in enumerate(
        ("parametrizations.weight.original1", "weight_v", "weight_orig", "weight_orig")
    ):
        reason = f"the weight of {place} is computed from it"
        assert report.kept[f"{place}.{leaf}"].reason == reason
    assert model(x).isfinite().all()


def test_lazy_modules_stay() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(256, 8), nn.LazyConv1d(4, 3))
    report = quantize_(model, "q4_k_s")
    assert report.quantized == {"1": "q4_k"}
    for name in ("0.weight", "0.bias", "2.weight"):
        assert report.kept[name] == ("not initialised yet", 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.register_buffer("mask", torch.ones(3)),
         "the layer holds further tensors: mask"),
        (lambda layer: layer.register_module("adapter", nn.Identity()),
         "the layer holds further tensors: adapter"),
        (lambda layer: setattr(layer, "forward", lambda x: x),
         "the object has a forward of its own"),
        (lambda layer: layer.register_state_dict_pre_hook(print),
         "the layer has hooks on its state dict"),
        (lambda layer: layer.register_load_state_dict_post_hook(print),
         "the layer has hooks on its state dict"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.empty(0, 256))),
         "weight must be a matrix with elements, got shape (0, 256)"),
    ],
)  # fmt: skip
def test_layers_with_something_more(change, reason: str) -> None:
    model = nn.Sequential(nn.Linear(256, 8))
    change(model[0])
    report = quantize_(model, "q4_k")
    assert report.quantized == {}
    assert not model[0].weight.numel() or report.kept["0.weight"].reason == reason


def test_hooks_move_along() -> None:
    model = nn.Sequential(nn.Embedding(9, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    seen: list[object] = []
    handles = [
        model[1].register_forward_pre_hook(lambda module, args: seen.append("before")),
        model[1].register_forward_hook(lambda module, args, y: seen.append(type(module))),
        model[1].register_forward_hook(
            lambda module, args, kwargs, y: seen.append(kwargs), with_kwargs=True
        ),
        model[2].register_full_backward_hook(lambda module, grads, out: seen.append("backward")),
        model[0].register_forward_hook(lambda module, args, y: y.requires_grad_()),
    ]
    quantize_(model, "q4_k")
    model(torch.tensor([1, 2])).sum().backward()
    assert seen == ["before", QuantLinear, {}, "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.tensor([1, 2]))
    assert seen == []


def test_quantising_twice() -> None:
    model = Tied()
    quantize_(model, {"hidden": "q6_k"})
    before = real_size(model)
    report = quantize_(model, "q4_k", importance={"hidden": torch.ones(256)})
    check_sizes(report, model, before)
    assert report.kept["hidden.blocks"] == ("quantised already, q6_k", 512 * 210)
    assert "hidden" not in report.quantized


# ---- embeddings that scale -----------------------------------------------------------------------


class Scaled(nn.Embedding):
    def __init__(self, *args, scale: object = 3.7, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.embed_scale = scale

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class ScaledByBuffer(Scaled):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, scale=None, **kwargs)
        del self.embed_scale
        self.register_buffer("embed_scale", torch.tensor(25.3), persistent=False)

    def forward(self, ids):
        return nn.Embedding.forward(self, ids) * self.embed_scale.to(self.weight.dtype)


class Dropping(Scaled):
    def forward(self, ids):
        return nn.functional.dropout(super().forward(ids), 0.5, self.training)


class Shifted(Scaled):
    def forward(self, ids):
        return super().forward((ids + 2) % self.num_embeddings)


class Padded(Scaled):
    def forward(self, ids):
        return super().forward(ids).masked_fill((ids == 40)[..., None], 0)


def test_scaled_embeddings(dtype) -> None:
    for table in (Scaled(50, 256, scale=16.0), ScaledByBuffer(50, 256, padding_idx=3)):
        model = Tied()
        model.embed, model.head.weight = table, table.weight
        model.to(dtype)
        plain, before = copy.deepcopy(model), real_size(model)
        report = quantize_(model, "q6_k")
        check_sizes(report, model, before)
        assert type(model.embed) is ScaledQuantEmbedding
        assert model.head.blocks is model.embed.blocks
        ids = torch.arange(50).view(5, 10)
        assert torch.equal(model.embed(ids), dequantized(plain, model).embed(ids))
        assert model.embed.padding_idx == plain.embed.padding_idx


@pytest.mark.parametrize(
    "table",
    [
        Dropping(50, 256, scale=1.0), Shifted(50, 256), Padded(50, 256, padding_idx=40, scale=2.0),
        Scaled(50, 256, scale=nn.Parameter(torch.tensor(2.0))),
        Scaled(50, 256, scale=torch.ones(256)), Scaled(50, 256, scale=None),
    ],
    ids=["dropping", "shifted", "padded", "trained", "vector", "none"],
)  # fmt: skip
def test_embeddings_that_do_something_else_stay(table: nn.Embedding) -> None:
    table.weight.data.normal_()
    model = Tied()
    model.embed, model.head.weight = table, table.weight
    report = quantize_(model, "q4_k")
    assert set(report.quantized) == {"hidden", "odd"}
    reason = f"{type(table).__name__} is a subclass that may do more"
    assert report.kept["embed.weight"].reason == reason
    assert model.head.weight is model.embed.weight


# ---- all or nothing ------------------------------------------------------------------------------


def spoilt(name: str, place: tuple[int, int], value: float) -> Tied:
    model = Tied()
    model.get_submodule(name).weight.data[place] = value
    return model


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (spoilt("odd", (99, 511), float("nan")), {},
         r"quantize_: 'odd': weight must be finite, got nan at \(99, 511\)"),
        (spoilt("head", (49, 3), float("-inf")), {},
         r"quantize_: 'embed': weight must be finite, got -inf at \(49, 3\)"),
        (Tied(), {"importance": {"odd": torch.ones(511)}},
         r"quantize_: 'odd': importance must have shape \(512,\), got \(511,\)"),
        (Tied(), {"importance": {"odd": torch.full((512,), float("nan"))}},
         r"quantize_: 'odd': importance must be finite and not negative, got nan at \(0,\)"),
        (Tied(), {"importance": {"head": -torch.ones(256)}},
         r"quantize_: 'head': importance must be finite and not negative, got -1.0 at \(0,\)"),
        (Tied().to("meta"), {}, r"quantize_: 'embed': weight must have data, got a meta tensor"),
    ],
)  # fmt: skip
def test_every_rule_is_checked_before_the_first_layer(model: Tied, options, words: str) -> None:
    state = dict(model.named_parameters())
    with pytest.raises(ValueError, match=words):
        quantize_(model, "q4_k", **options)
    assert [type(module) for module in model.children()] == [
        nn.Embedding, nn.Linear, nn.Linear, nn.Linear, nn.Linear
    ]  # fmt: skip
    assert all(value is state[name] for name, value in model.named_parameters())


def test_importance_of_another_type_is_refused_first() -> None:
    model = Tied()
    with pytest.raises(TypeError, match=r"'odd': importance must be float32, got torch\.float64"):
        quantize_(model, "q4_k", importance={"odd": torch.ones(512).double()})
    assert type(model.embed) is nn.Embedding


def test_a_weight_that_stays_need_not_be_finite() -> None:
    model = spoilt("back", (0, 0), float("nan"))
    assert "back" not in quantize_(model, "q4_k").quantized


@pytest.mark.parametrize("failing", ["quantize", "_replacement"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(failing: str) -> None:
    model = Tied()
    children, state = dict(model.named_modules()), dict(model.named_parameters())
    before = {name: value.clone() for name, value in state.items()}
    real, calls = getattr(torch_q4._quantize, failing), []

    def planted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise ValueError("the scale must be finite, got inf")
        return real(*args)

    with (
        unittest.mock.patch(f"torch_q4._quantize.{failing}", planted),
        pytest.raises(ValueError, match="the scale must be finite"),
    ):
        quantize_(model, "q4_0")
    assert len(calls) == 3
    assert dict(model.named_modules()) == children
    assert all(value is state[name] for name, value in model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert len(quantize_(model, "q4_0").quantized) == 4
