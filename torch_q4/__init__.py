"""Matrix products with GGML-quantised weights that stay packed, as PyTorch operators."""

from torch_q4 import formats
from torch_q4._quantize import Kept, QuantizeReport, quantize_
from torch_q4._tune import TuneReport, tune, tune_model
from torch_q4.checkpoint import (
    SafetensorsFile,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
    save_safetensors,
)
from torch_q4.gguf import GGUFArray, GGUFError, GGUFFile, GGUFOpaque, GGUFTensor, load_gguf
from torch_q4.gguf_write import GGUFMetadata, save_gguf
from torch_q4.importance import Importance, collect_importance, load_importance
from torch_q4.nn import QuantEmbedding, QuantLinear, pack_
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
    "GGUFArray",
    "GGUFError",
    "GGUFFile",
    "GGUFMetadata",
    "GGUFOpaque",
    "GGUFTensor",
    "Importance",
    "Kept",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizeReport",
    "SafetensorsFile",
    "TuneReport",
    "collect_importance",
    "cpu_isa",
    "dequantize",
    "embedding",
    "formats",
    "linear",
    "load_checkpoint",
    "load_gguf",
    "load_importance",
    "load_safetensors",
    "matmul_q4_0",
    "pack",
    "pack_",
    "quantize",
    "quantize_",
    "save_checkpoint",
    "save_gguf",
    "save_safetensors",
    "tune",
    "tune_model",
    "unpack",
]
