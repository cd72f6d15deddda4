"""Matrix products with GGML-quantised weights that stay packed, as PyTorch operators."""

from torch_q4 import formats
from torch_q4.gguf import GGUFError, GGUFFile, GGUFTensor, load_gguf
from torch_q4.nn import QuantEmbedding, QuantizeReport, QuantLinear, pack_, quantize_
from torch_q4.ops import (
    cpu_isa,
    dequantize,
    embedding,
    linear,
    matmul_q4_0,
    pack,
    quantize,
    unpack,
)

__version__ = "0.1.0"

__all__ = [
    "GGUFError",
    "GGUFFile",
    "GGUFTensor",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizeReport",
    "cpu_isa",
    "dequantize",
    "embedding",
    "formats",
    "linear",
    "load_gguf",
    "matmul_q4_0",
    "pack",
    "pack_",
    "quantize",
    "quantize_",
    "unpack",
]
