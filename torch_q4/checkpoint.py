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
from torch_q4._files import AtomicFile, require_file
from torch_q4._tensors import TensorInfo, TensorLike, described
from torch_q4.formats import Format
from torch_q4.gguf import GGUFOpaque, GGUFTensor, _format_of, _shown
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
        TypeError: a dtype that safetensors has none for, or a type that there is no format for.
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
            if isinstance(info.format, GGUFOpaque):
                raise TypeError(
                    f"save_safetensors: tensor {info.name!r} must be plain numbers or of one of "
                    f"torch_q4's formats, got {info.format}"
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
        TypeError: a dtype that safetensors has none for, or a type that there is no format for.
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
        OSError: the file cannot be opened, or is a device or a FIFO.
        MemoryError: the file cannot be mapped.
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
                f"load_safetensors: a tensor must be in one shard, got {_shown(twice)} again "
                f"({file})"
            )
        tensors.update(found)
    unknown = sorted(set(ties.values()) - tensors.keys())
    if unknown:
        raise ValueError(
            f"load_safetensors: ties must name tensors of the file, got {_shown(unknown)} ({name})"
        )
    stored = sorted(ties.keys() & tensors.keys())
    if stored:
        raise ValueError(
            f"load_safetensors: a tied name must have no tensor of its own, got {_shown(stored)} "
            f"({name})"
        )
    return SafetensorsFile(name, metadata, tensors, ties)


def _files_of(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    index = os.path.join(path, _INDEX)
    if not os.path.exists(index):
        return [os.path.join(path, "model.safetensors")]
    require_file(index, "load_safetensors")
    with open(index, encoding="utf-8") as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"load_safetensors: the index must be JSON, got: {error} ({index})"
            ) from error
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(isinstance(shard, str) for shard in files.values()):
        raise ValueError(
            f"load_safetensors: the index must have a weight_map of names to files, got "
            f"{str(files)[:80]!r} ({index})"
        )
    shards = sorted(set(files.values()))
    outside = [shard for shard in shards if not _lies_beside(shard)]
    if outside:
        raise ValueError(
            f"load_safetensors: shards must lie beside their index, got {_shown(outside)} ({index})"
        )
    return [os.path.join(path, shard) for shard in shards]


def _lies_beside(shard: str) -> bool:
    """Whether it is a bare file name."""
    try:
        os.fsencode(shard)
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return False
    no_folder = os.path.basename(shard) == shard and shard not in ("", os.curdir, os.pardir)
    return no_folder and "\0" not in shard


def _read(path: str) -> tuple[dict[str, str], dict[str, GGUFTensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"load_safetensors needs the safetensors package: pip install safetensors ({error})"
        ) from error
    require_file(path, "load_safetensors")
    with open(path, "rb"):  # safe_open's own error for one that may not be read lacks the name
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            data = {name: file.get_tensor(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(
            f"load_safetensors: the file must be a whole safetensors file, got: {error} ({path})"
        ) from error
    except Exception as error:
        if "allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"load_safetensors: memory must hold a map of {os.path.getsize(path)} bytes, got: "
            f"{error} ({path})"
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
            f"load_safetensors: {_FORMATS} must name tensors of the file, got {_shown(unknown)} "
            f"({path})"
        )
    return metadata, tensors


def _json_object(metadata: Mapping[str, str], key: str, path: str) -> dict[str, str]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
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
        strict: whether the file must have exactly the model's tensors. If not, ties of names that
            the model does not have count for nothing either.
        assign: whether plain tensors become views of the file, too, instead of being copied.
        pack: whether to put packed weights into the layout that kernels read faster, see
            :func:`torch_q4.nn.pack_`.

    Names that the file ties become one parameter or buffer, unless they are on different devices:
    then each keeps its own copy.

    Raises:
        ValueError: a packed tensor that belongs to no linear or embedding layer, or whose shape is
            not that of the layer; a tie of entries that are not of one shape and dtype; a damaged
            file.
        RuntimeError: missing or unexpected tensors, or shapes that differ.
    """
    file = load_safetensors(path)
    state = {name: tensor.data for name, tensor in file.tensors.items()}
    packed = {
        name: fmt
        for name, tensor in file.tensors.items()
        if (fmt := _format_of("load_checkpoint", tensor)) is not None
    }
    for name, source in file.ties.items():
        state[name] = state[source]
        if source in packed:
            packed[name] = packed[source]
    for name, fmt in packed.items():
        _check_layer(model, name, fmt, state[name])
        key = f"{name.removesuffix('weight')}weight_format"
        number = state.setdefault(key, torch.tensor(fmt.type_id, dtype=torch.int32))
        if number.numel() != 1 or number.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"load_checkpoint: {key!r} must be one integer, got {number.dtype} "
                f"{tuple(number.shape)}"
            )
    # What is one in the file becomes one in the model, on each device.
    blocks: dict[tuple[str, torch.device], nn.Parameter] = {}
    for name, fmt in packed.items():
        _replace(model, name, fmt, state[name], compute, blocks, file.ties.get(name, name))
    meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(state, strict=strict, assign=assign or meta)
    slots = _slots(model)
    for name, source in file.ties.items():
        if name in slots and source in slots:
            _tie(name, slots[name], source, slots[source])
    if pack:
        pack_(model)


def _check_layer(model: nn.Module, name: str, fmt: Format, stored: Tensor) -> None:
    """Refuses a packed weight that is not that of a layer of the model."""
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
    found = (*stored.shape[:-1], fmt.columns(stored.shape[-1]))
    if shape != found:
        raise ValueError(f"load_checkpoint: {name!r} must have shape {shape}, got {found}")
    if isinstance(module, _Quantized) and module.format == fmt.name:
        return
    if module is model:
        raise ValueError(
            f"load_checkpoint: model must hold the layers to replace, got a bare "
            f"{type(module).__name__}"
        )
    if (
        isinstance(module, (nn.Embedding, QuantEmbedding))
        and type(module) not in (nn.Embedding, QuantEmbedding)
        and embedding_scale(module) is None
    ):
        # A subclass does something of its own; only its author knows how to pack it.
        raise ValueError(
            f"load_checkpoint: {name!r} must be the weight of an nn.Embedding, got "
            f"{type(module).__name__}"
        )


def _replace(
    model: nn.Module,
    name: str,
    fmt: Format,
    stored: Tensor,
    compute: str,
    blocks: dict[tuple[str, torch.device], nn.Parameter],
    source: str,
) -> None:
    """Makes the layer of a packed weight a quantised one over these blocks."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if isinstance(module, _Quantized) and module.format == fmt.name:
        return
    weight = module.blocks if isinstance(module, _Quantized) else module.weight
    assert isinstance(weight, Tensor)
    key = (source, weight.device)
    if key not in blocks:
        shared = stored if weight.is_meta else torch.empty_like(stored, device=weight.device)
        blocks[key] = nn.Parameter(shared, requires_grad=False)
    new: QuantLinear | QuantEmbedding
    if isinstance(module, (nn.Linear, QuantLinear)):
        new = QuantLinear.from_blocks(blocks[key], fmt, module.bias, compute=compute)
    else:
        assert isinstance(module, (nn.Embedding, QuantEmbedding))
        dtype = (
            module.weight.dtype if isinstance(module, nn.Embedding) else module._dtype_marker.dtype
        )
        if type(module) in (nn.Embedding, QuantEmbedding):
            new = QuantEmbedding.from_blocks(blocks[key], fmt, dtype, module.padding_idx)
        else:
            scale = embedding_scale(module)
            assert scale is not None  # or _check_layer would have refused it
            new = ScaledQuantEmbedding.from_blocks(blocks[key], fmt, dtype, module.padding_idx)
            new.embed_scale = scale
    model.set_submodule(path, new.train(module.training))


# Where a module keeps a parameter or a buffer: the module, its dictionary of such, the key there.
_Slot = tuple[nn.Module, dict[str, Any], str]


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Where each entry of the model's state is kept: what a file may tie, and nothing else."""
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for kept in (module._parameters, module._buffers):
            for key, value in kept.items():
                if value is not None and key not in module._non_persistent_buffers_set:
                    is_blocks = isinstance(module, _Quantized) and key == "blocks"
                    slots[f"{dot}{'weight' if is_blocks else key}"] = (module, kept, key)
    return slots


def _tie(name: str, slot: _Slot, source: str, of: _Slot) -> None:
    """Makes the parameter or buffer of one name that of another."""
    (module, kept, key), (other, others, other_key) = slot, of
    old, new = kept[key], others[other_key]
    kinds = [
        module.format if isinstance(module, _Quantized) and key == "blocks" else str(value.dtype)
        for module, key, value in ((module, key, old), (other, other_key, new))
    ]
    if kinds[0] != kinds[1] or old.shape != new.shape:
        raise ValueError(
            f"load_checkpoint: tied entries must have one shape and dtype, got {tuple(old.shape)} "
            f"{kinds[0]} for {name!r} and {tuple(new.shape)} {kinds[1]} for {source!r}"
        )
    if old.device != new.device:
        return
    if type(old) is type(new):
        kept[key] = new
    else:
        old.data = new.data  # a buffer and a parameter over one memory
    if isinstance(module, _Quantized) and isinstance(other, _Quantized) and key == "blocks":
        module.packed = other.packed
