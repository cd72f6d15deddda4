"""Packed weights in safetensors: what is written, any reader of safetensors can open.

A packed weight is a uint8 tensor ``(rows, bytes_per_row)`` of GGML's own bytes. Which format it has
stands in the header's metadata, under ``torch_q4.formats``: a JSON object, tensor name to format
name. ``torch_q4.ties`` likewise holds the names that share another tensor's data and are not
stored. ``safetensors.torch.load_file`` gives the tensors as they are; nothing is ever pickled.

The writer is our own: the package's needs all tensors in memory at once and writes to the final
name. Reading uses the package, which maps the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torch_q4 import formats
from torch_q4._files import AtomicFile
from torch_q4._tensors import TensorInfo, TensorLike, described
from torch_q4.formats import Format
from torch_q4.gguf import GGUFTensor
from torch_q4.nn import (
    QuantEmbedding,
    QuantLinear,
    ScaledQuantEmbedding,
    _Quantized,
    embedding_scale,
    pack_,
)

__all__ = [
    "SafetensorsFile",
    "SafetensorsWriter",
    "load_checkpoint",
    "load_safetensors",
    "save_checkpoint",
    "save_safetensors",
]

_FORMATS = "torch_q4.formats"
_TIES = "torch_q4.ties"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class SafetensorsWriter:
    """Writes a safetensors file in pieces: first its header, then each tensor's bytes.

    A context manager; the file appears under its name when the ``with`` block ends, and only if it
    ends without an exception and every tensor was written.

    Args:
        path: the file.
        infos: its tensors. They are written in the order of :attr:`infos`, which puts those of
            wide dtypes first, so that every one is aligned.
        metadata: further entries of the header's metadata.

    Raises:
        ValueError: two tensors of one name.
        TypeError: a dtype that safetensors has none for.
        OSError: the file cannot be made or there is no room for all of it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        infos: Iterable[TensorInfo],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.infos = sorted(infos, key=lambda info: -info.dtype.itemsize)
        header: dict[str, Any] = {}
        offset = 0
        for info in self.infos:
            if info.name in header or info.name == "__metadata__":
                raise ValueError(
                    f"save_safetensors: a tensor name must occur once, got {info.name!r} again"
                )
            if info.dtype not in _DTYPES:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                raise TypeError(
                    f"save_safetensors: tensor {info.name!r} must be one of {known}, "
                    f"got {info.dtype}"
                )
            header[info.name] = {
                "dtype": _DTYPES[info.dtype],
                "shape": list(info.stored_shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        packed = {info.name: info.format.name for info in self.infos if info.format is not None}
        notes = {"format": "pt", **(metadata or {}), _FORMATS: json.dumps(packed)}
        text = json.dumps({"__metadata__": notes, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._file = AtomicFile(path, len(self._head) + offset, "save_safetensors")

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._file.size

    def __enter__(self) -> SafetensorsWriter:
        """Opens the file and writes its structure."""
        self._file.__enter__()
        try:
            self._file.write(self._head)
        except BaseException as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the file its name, or removes it after an exception."""
        self._file.__exit__(kind, error, trace)

    def write(self, data: Tensor | bytes) -> int:
        """Appends a whole tensor or some of its rows; returns how many bytes that were."""
        return self._file.write(data)


@dataclasses.dataclass(frozen=True, repr=False)
class SafetensorsFile:
    """A mapped safetensors file, or a folder's shards as one.

    Attributes:
        path: the file or folder.
        metadata: the header's metadata.
        tensors: name to tensor, each with its format, in file order. Views of the map.
        ties: names that are not stored, and the names whose data they share.
    """

    path: str
    metadata: dict[str, str]
    tensors: dict[str, GGUFTensor]
    ties: dict[str, str]

    def __repr__(self) -> str:
        """Counts, not contents."""
        return f"SafetensorsFile({self.path!r}, {len(self.tensors)} tensors)"


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorLike],
    metadata: Mapping[str, str] | None = None,
    *,
    on_written: Callable[[str, int], None] | None = None,
) -> None:
    """Writes tensors, packed and plain, to a safetensors file, atomically.

    Args:
        path: the file.
        tensors: name to tensor: plain ones, ``(blocks, format)``, or :class:`GGUFTensor`.
        metadata: further entries of the header's metadata, strings.
        on_written: called with each tensor's name and bytes, for progress.

    Raises:
        ValueError: a shape that does not fit its format.
        TypeError: a dtype that safetensors has none for.
        OSError: the file cannot be made, or there is no room for all of it; what the path held
            before is untouched.
    """
    pairs = [described("save_safetensors", name, tensor) for name, tensor in tensors.items()]
    data = {info.name: values for info, values in pairs}
    with SafetensorsWriter(path, [info for info, _ in pairs], metadata) as writer:
        for info in writer.infos:
            writer.write(data[info.name].detach().cpu().contiguous())
            if on_written is not None:
                on_written(info.name, info.nbytes)


def load_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Maps a safetensors file; tensor data stays on disk until it is used.

    Args:
        path: a ``.safetensors`` file, with packed tensors or without; or a folder with
            ``model.safetensors``, or with shards and their index.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, or its metadata does not fit its tensors.
        ImportError: the ``safetensors`` package is not installed.
    """
    name = os.fspath(path)
    metadata: dict[str, str] = {}
    tensors: dict[str, GGUFTensor] = {}
    ties: dict[str, str] = {}
    for file in _files_of(name):
        notes, found = _read(file)
        metadata.update(notes)
        ties.update(_json_object(notes, _TIES, file))
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise ValueError(
                f"load_safetensors: a tensor must be in one shard, got {twice} again ({file})"
            )
        tensors.update(found)
    unknown = sorted(set(ties.values()) - tensors.keys())
    if unknown:
        raise ValueError(
            f"load_safetensors: ties must name tensors of the file, got {unknown} ({name})"
        )
    return SafetensorsFile(name, metadata, tensors, ties)


def _files_of(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    index = os.path.join(path, _INDEX)
    if not os.path.exists(index):
        return [os.path.join(path, "model.safetensors")]
    with open(index, encoding="utf-8") as file:
        try:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"load_safetensors: the index must have a weight_map, got: {error!r} ({index})"
            ) from error
    outside = [shard for shard in shards if os.path.basename(shard) != shard]
    if outside:
        raise ValueError(
            f"load_safetensors: shards must lie beside their index, got {outside} ({index})"
        )
    return [os.path.join(path, shard) for shard in shards]


def _read(path: str) -> tuple[dict[str, str], dict[str, GGUFTensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"load_safetensors needs the safetensors package: pip install safetensors ({error})"
        ) from error
    with open(path, "rb"):  # safe_open's own error for a missing file lacks the name
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            data = {name: file.get_tensor(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(
            f"load_safetensors: the file must be a whole safetensors file, got: {error} ({path})"
        ) from error
    packed = _json_object(metadata, _FORMATS, path)
    tensors = {}
    for name, values in data.items():
        try:
            fmt = formats.get(packed[name]) if name in packed else None
            if fmt is not None and (values.dtype != torch.uint8 or values.dim() < 1):
                raise ValueError(f"blocks must be uint8, got {values.dtype}")
            shape = tuple(values.shape)
            if fmt is not None:
                shape = (*shape[:-1], fmt.columns(shape[-1]))
        except ValueError as error:
            raise ValueError(f"load_safetensors: tensor {name!r}: {error} ({path})") from None
        tensors[name] = GGUFTensor(name, fmt, shape, values)
    unknown = sorted(packed.keys() - data.keys())
    if unknown:
        raise ValueError(
            f"load_safetensors: {_FORMATS} must name tensors of the file, got {unknown} ({path})"
        )
    return metadata, tensors


def _json_object(metadata: Mapping[str, str], key: str, path: str) -> dict[str, str]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(
            f"load_safetensors: metadata {key!r} must be a JSON object of strings, "
            f"got {metadata[key][:80]!r} ({path})"
        )
    return value


# ---- modules -------------------------------------------------------------------------------------


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    on_written: Callable[[str, int], None] | None = None,
) -> None:
    """Writes a model's ``state_dict`` to a safetensors file, packed weights as they are.

    A parameter that several modules share is stored once. Which format each packed weight has is
    in the header, so the plain ``state_dict`` entries ``*.weight_format`` are there as well: a
    model whose layers are quantised already can also ``load_state_dict`` what
    ``safetensors.torch.load_file`` gives.

    Args:
        model: any module.
        path: the file.
        metadata: further entries of the header's metadata, strings.
        on_written: called with each tensor's name and bytes, for progress.

    Raises:
        TypeError: a dtype that safetensors has none for, or an entry that is no tensor.
        ValueError: a tensor on the meta device.
        OSError: see :func:`save_safetensors`.
    """
    entries: dict[str, _Entry] = {}
    ties: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, keys, entry in _state(model):
        first = next((seen[key] for key in keys if key in seen), None)
        if first is not None:
            ties[name] = first
            continue
        seen.update(dict.fromkeys(keys, name))
        entries[name] = entry
    notes = {_TIES: json.dumps(ties), **(metadata or {})}
    with SafetensorsWriter(path, [info for info, _ in entries.values()], notes) as writer:
        for info in writer.infos:
            writer.write(entries[info.name][1]().detach().cpu().contiguous())
            if on_written is not None:
                on_written(info.name, info.nbytes)


# A tensor of a model's state: what it is, and what gives its data.
_Entry = tuple[TensorInfo, Callable[[], Tensor]]


def _state(model: nn.Module) -> Iterator[tuple[str, list[object], _Entry]]:
    """What ``model.state_dict()`` holds, one by one, and what two entries have in common if tied.

    ``state_dict`` itself makes GGML's own bytes of all packed layers at once, a second copy of the
    model.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        own: dict[str, Any] = {}
        if isinstance(module, _Quantized):
            shape = (module.blocks.shape[0], formats.get(module.format).columns(
                module.blocks.shape[1]))  # fmt: skip
            name = f"{dot}weight"
            _refuse_meta(name, module.blocks)
            info = TensorInfo(name, formats.get(module.format), shape)
            yield name, [id(module.blocks)], (info, functools.partial(getattr, module, "weight"))
            own[f"{dot}weight_format"] = torch.tensor(module._type_id, dtype=torch.int32)
            nn.Module._save_to_state_dict(module, own, dot, True)
            del own[f"{dot}blocks"]
        else:
            module._save_to_state_dict(own, dot, True)
        for name, value in own.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"save_checkpoint: {name!r} must be a tensor, got {type(value).__name__}"
                )
            _refuse_meta(name, value)
            info = TensorInfo(name, None, tuple(value.shape), value.dtype)
            # One parameter, or equal views of one memory: both are ties.
            view = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            keys: list[object] = [id(value), view] if value.numel() else [name]
            keep_alive = functools.partial(_itself, value)  # so that ids stay unique
            yield name, keys, (info, keep_alive)


def _itself(value: Tensor) -> Tensor:
    return value


def _refuse_meta(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"save_checkpoint: {name!r} must have data, got a meta tensor")


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    compute: str = "exact",
    strict: bool = True,
    assign: bool = False,
    pack: bool = True,
) -> None:
    """Loads a file of :func:`save_checkpoint` into a model, in place.

    Each ``nn.Linear`` and ``nn.Embedding`` whose weight is packed in the file becomes a
    :class:`QuantLinear` or :class:`QuantEmbedding` first; its weight is never allocated densely.
    The blocks are copied, unless the model is on the meta device or ``assign`` is set.

    Args:
        model: the model as it was built, quantised or not, on any device or the meta device.
        path: the file, or a folder with it.
        compute: the arithmetic of the layers that are replaced, see :func:`torch_q4.linear`.
        strict: whether the file must have exactly the model's tensors.
        assign: whether plain tensors become views of the file, too, instead of being copied.
        pack: whether to put packed weights into the layout that kernels read faster, see
            :func:`torch_q4.nn.pack_`.

    Raises:
        ValueError: a packed tensor that belongs to no linear or embedding layer, or whose shape is
            not that of the layer; a damaged file.
        RuntimeError: missing or unexpected tensors, or shapes that differ.
    """
    file = load_safetensors(path)
    state = {name: tensor.data for name, tensor in file.tensors.items()}
    packed = {
        name: tensor.format for name, tensor in file.tensors.items() if tensor.format is not None
    }
    for name, source in file.ties.items():
        state[name] = state[source]
        if source in packed:
            packed[name] = packed[source]
    blocks: dict[int, nn.Parameter] = {}  # what is one in the file becomes one in the model
    for name, fmt in packed.items():
        _replace(model, name, fmt, state[name], compute, blocks)
        module = name.rpartition(".")[0]
        state.setdefault(f"{module}.weight_format", torch.tensor(fmt.type_id, dtype=torch.int32))
    meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(state, strict=strict, assign=assign or meta)
    for name, source in file.ties.items():
        _tie(model, name, source)
    if pack:
        pack_(model)


def _replace(
    model: nn.Module,
    name: str,
    fmt: Format,
    stored: Tensor,
    compute: str,
    blocks: dict[int, nn.Parameter],
) -> None:
    """Makes the layer of a packed weight a quantised one over these blocks."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if leaf != "weight" or not isinstance(module, (nn.Linear, nn.Embedding, _Quantized)):
        raise ValueError(
            f"load_checkpoint: {name!r} must be the weight of a linear or embedding layer of the "
            f"model, got {type(module).__name__ if module is not None else 'no such module'}"
        )
    if isinstance(module, (nn.Linear, QuantLinear)):
        shape = (module.out_features, module.in_features)
    else:
        assert isinstance(module, (nn.Embedding, QuantEmbedding))
        shape = (module.num_embeddings, module.embedding_dim)
    if shape != (stored.shape[0], fmt.columns(stored.shape[1])):
        raise ValueError(
            f"load_checkpoint: {name!r} must have shape {shape}, got "
            f"{(stored.shape[0], fmt.columns(stored.shape[1]))}"
        )
    if isinstance(module, _Quantized) and module.format == fmt.name:
        return
    device = (module.blocks if isinstance(module, _Quantized) else module.weight).device
    if stored.data_ptr() not in blocks:
        shared = stored if device.type == "meta" else torch.empty_like(stored, device=device)
        blocks[stored.data_ptr()] = nn.Parameter(shared, requires_grad=False)
    weight = blocks[stored.data_ptr()]
    new: QuantLinear | QuantEmbedding
    if isinstance(module, (nn.Linear, QuantLinear)):
        new = QuantLinear.from_blocks(weight, fmt, module.bias, compute=compute)
    else:
        assert isinstance(module, (nn.Embedding, QuantEmbedding))
        dtype = (
            module.weight.dtype if isinstance(module, nn.Embedding) else module._dtype_marker.dtype
        )
        if type(module) in (nn.Embedding, QuantEmbedding):
            new = QuantEmbedding.from_blocks(weight, fmt, dtype, module.padding_idx)
        elif (scale := embedding_scale(module)) is not None:
            new = ScaledQuantEmbedding.from_blocks(weight, fmt, dtype, module.padding_idx)
            new.embed_scale = scale
        else:
            # A subclass does something of its own; only its author knows how to pack it.
            raise ValueError(
                f"load_checkpoint: {name!r} must be the weight of an nn.Embedding, got "
                f"{type(module).__name__}"
            )
    model.set_submodule(path, new.train(module.training))


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Makes the parameter of one name that of another."""
    path, _, leaf = name.rpartition(".")
    owner, _, source_leaf = source.rpartition(".")
    module, other = model.get_submodule(path), model.get_submodule(owner)
    if isinstance(module, _Quantized) and isinstance(other, _Quantized) and leaf == "weight":
        module.blocks, module.packed = other.blocks, other.packed
    else:
        setattr(module, leaf, getattr(other, source_leaf))
