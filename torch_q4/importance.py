"""Which columns of a weight matter: activations gathered for the quantiser.

For a layer ``y = x @ W.T``, the importance of column j is the mean of ``x[..., j]**2`` over all
rows that the layer saw: an error in column j of W counts as much. It is what
:func:`torch_q4.quantize` takes, and what llama.cpp calls an importance matrix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_q4._files import require_file
from torch_q4._tensors import info_of
from torch_q4.gguf import GGUFArray, GGUFError, load_gguf
from torch_q4.gguf_write import GGUFMetadata, save_gguf
from torch_q4.nn import QuantLinear

__all__ = ["Importance", "collect_importance", "load_importance"]

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclasses.dataclass(frozen=True, repr=False)
class Importance(Mapping[str, Tensor]):
    """Sums of squared activations by layer; as a mapping, their means.

    ``importance[name]`` is float32 ``(K,)``, so the object itself can be given to
    :func:`torch_q4.quantize_`. Names are the modules' where it was collected, the tensors' where
    it was read from a file.

    Attributes:
        sums: name to the sum of squares, float32 ``(K,)``, or ``(experts * K,)`` for a mixture.
        counts: name to the number of rows, float32 ``(1,)`` or ``(experts,)``.
        datasets: what the activations came from, for the record.
        chunks: how many batches they came from.
        chunk_size: rows of one batch.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0

    def __getitem__(self, name: str) -> Tensor:
        """The mean squares, float32; ones for an expert that no row reached."""
        sums, counts = self.sums[name], self.counts[name]
        means = sums.view(counts.numel(), -1) / counts.view(-1, 1)
        return torch.where(counts.view(-1, 1) > 0, means, 1.0).flatten()

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.sums)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.sums)

    def __repr__(self) -> str:
        """Counts, not contents."""
        return f"Importance({len(self)} layers, {self.chunks} chunks of {self.chunk_size})"

    def renamed(self, names: Mapping[str, str]) -> Importance:
        """The same under other names; layers without one are left out.

        Args:
            names: each layer's new name, such as
                :func:`torch_q4.integrations.gguf_export.tensor_names` gives for a model.
        """
        kept = [name for name in self if name in names]
        return dataclasses.replace(
            self,
            sums={names[name]: self.sums[name] for name in kept},
            counts={names[name]: self.counts[name] for name in kept},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an imatrix GGUF file, as llama.cpp's imatrix tool does.

        For llama.cpp the names must be those of tensors: see :meth:`renamed`.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = GGUFMetadata({"general.type": "imatrix"})
        # Always there, even if empty: llama.cpp asks for all three.
        metadata.set_array("imatrix.datasets", list(self.datasets), "string")
        metadata.set("imatrix.chunk_count", self.chunks, "uint32")
        metadata.set("imatrix.chunk_size", self.chunk_size, "uint32")
        tensors: dict[str, Tensor] = {}
        for name in sorted(self):
            experts = self.counts[name].numel()
            sums = self.sums[name].float()
            tensors[name + _SUMS] = sums.view(experts, -1) if experts > 1 else sums
            tensors[name + _COUNTS] = self.counts[name].float().view(experts, 1)
        save_gguf(path, tensors, metadata)


def collect_importance(
    model: nn.Module,
    batches: Iterable[Any],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    dataset: str | None = None,
) -> Importance:
    """Runs a model over some batches and gathers the squared activations that its layers see.

    The model runs as it is, without gradients; calling ``model.eval()`` first is the caller's.

    Args:
        model: any module with ``nn.Linear`` or :class:`QuantLinear` layers.
        batches: each a tensor, a tuple of arguments, or a mapping of keyword arguments, as the
            model takes it; moved to the device of the model's first parameter.
        filter_fn: ``filter_fn(module, name)`` says which layers to watch; by default all.
        dataset: a name to keep with the result.

    Returns:
        The sums, by the layers' names.

    Raises:
        ValueError: no layer to watch, no batch, or an activation that is infinite or NaN; the
            message names the layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLinear))
        and (filter_fn is None or filter_fn(module, name))
    }
    if not layers:
        raise ValueError("collect_importance: the model must have linear layers to watch, got none")
    sums = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}
    sums = {
        name: value.to(next(iter(layers[name].parameters())).device, torch.float64)
        for name, value in sums.items()
    }
    rows = dict.fromkeys(layers, 0)
    device = next(model.parameters()).device

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().reshape(-1, sums[name].numel())
            # In float64 across batches: a float32 would stop growing after some million rows.
            sums[name] += x.float().square().sum(0)
            rows[name] += x.shape[0]

        return hook

    chunks = longest = 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            before = sum(rows.values())
            _call(model, batch, device)
            chunks += 1
            longest = max(longest, (sum(rows.values()) - before) // len(layers))
    if chunks == 0:
        raise ValueError("collect_importance: there must be at least 1 batch, got none")
    for name, value in sums.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"collect_importance: activations must be finite, got some that are not in {name!r}"
            )
    seen = [name for name in layers if rows[name]]
    return Importance(
        {name: sums[name].float().cpu() for name in seen},
        {name: torch.tensor([float(rows[name])]) for name in seen},
        (dataset,) if dataset else (),
        chunks,
        longest,
    )


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{key: moved(value) for key, value in batch.items()})
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        model(*(moved(value) for value in batch))
    else:
        model(moved(batch))


def load_importance(path: str | os.PathLike[str]) -> Importance:
    """Reads an importance matrix: an imatrix GGUF file, or llama.cpp's older ``.dat``.

    Args:
        path: the file; which of the two it is, it says itself.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is neither, is damaged, or holds values that are negative, infinite or
            NaN.
    """
    name = os.fspath(path)
    require_file(name, "load_importance")
    with open(name, "rb") as file:
        found = _from_gguf(name) if file.read(4) == b"GGUF" else _from_dat(name)
    if not found:
        raise ValueError(f"load_importance: the file must have entries, got none ({name})")
    for what, entries in (("values", found.sums), ("counts", found.counts)):
        for layer, numbers in entries.items():
            if not bool((numbers.isfinite() & (numbers >= 0)).all()):
                raise ValueError(
                    f"load_importance: {what} must be finite and not negative, got others in "
                    f"{layer!r} ({name})"
                )
    return found


def _from_gguf(path: str) -> Importance:
    try:
        file = load_gguf(path)
    except GGUFError as error:
        raise ValueError(str(error).replace("load_gguf", "load_importance", 1)) from error
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        for suffix, values in ((_SUMS, sums), (_COUNTS, counts)):
            if name.endswith(suffix):
                if tensor.format is not None or tensor.dtype != torch.float32:
                    raise ValueError(
                        f"load_importance: {name!r} must be float32, got "
                        f"{info_of(tensor).type_name} ({path})"
                    )
                values[name.removesuffix(suffix)] = tensor.data.flatten().clone()
    for name in sorted(sums.keys() ^ counts.keys()):
        raise ValueError(
            f"load_importance: {name!r} must have sums and counts, got only one of them ({path})"
        )
    for name, value in sums.items():
        if not counts[name].numel() or value.numel() % counts[name].numel():
            raise ValueError(
                f"load_importance: the sums of {name!r} must be a multiple of its "
                f"{counts[name].numel()} counts, got {value.numel()} ({path})"
            )
    datasets = file.metadata.get("imatrix.datasets", [])
    return Importance(
        sums,
        counts,
        tuple(datasets) if isinstance(datasets, (list, GGUFArray)) else (),
        _count(file.metadata.get("imatrix.chunk_count")),
        _count(file.metadata.get("imatrix.chunk_size")),
    )


def _count(value: Any) -> int:
    return value if type(value) is int else 0


def _from_dat(path: str) -> Importance:
    """The older file: little-endian, no magic.

    Entry count i32, then for each entry: name length i32, name, calls i32, value count i32, values
    f32. Then, in later ones, the number of chunks i32 and the data set's name.
    A value is a mean of squares times the number of calls.
    """
    with open(path, "rb") as file:
        data = file.read()
    pos = 0

    def take(count: int, what: str) -> bytes:
        nonlocal pos
        if count < 0 or pos + count > len(data):
            raise ValueError(
                f"load_importance: {what} must end within the file's {len(data)} bytes, got "
                f"{pos + count} ({path})"
            )
        pos += count
        return data[pos - count : pos]

    def number(what: str) -> int:
        value: int = struct.unpack("<i", take(4, what))[0]
        return value

    def text(what: str) -> str:
        raw = take(number(f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"load_importance: {what} must be UTF-8, got {raw[:40]!r}") from None

    entries = number("the entry count")
    if not 0 < entries <= len(data) // 12:
        raise ValueError(
            f"load_importance: a file must be an imatrix GGUF file, or start with a count of 1 to "
            f"{len(data) // 12} entries, got {entries} ({path})"
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for index in range(entries):
        name = text(f"the name of entry {index}")
        calls = number(f"the calls of {name!r}")
        values = number(f"the value count of {name!r}")
        raw = take(4 * values, f"the values of {name!r}")
        if values == 0:
            raise ValueError(f"load_importance: {name!r} must have values, got none ({path})")
        sums[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        # A count that is missing counts as one: the values are taken as they are.
        counts[name] = torch.tensor([float(max(calls, 1))])
    chunks = 0
    datasets: tuple[str, ...] = ()
    if pos < len(data):
        chunks = max(number("the number of chunks"), 0)
        if pos < len(data):
            dataset = text("the data set's name")
            datasets = (dataset,) if dataset else ()
    return Importance(sums, counts, datasets, chunks)


def for_tensor(
    importance: Mapping[str, Tensor] | None, name: str, shape: tuple[int, ...]
) -> Tensor | None:
    """The importance of a tensor's columns, ``(matrices, K)`` float32, or None if there is none.

    Raises:
        ValueError: it is there, but for another number of columns or negative or not finite.
    """
    if importance is None or name not in importance:
        return None
    values = importance[name]
    matrices = math.prod(shape[:-2])
    if values.numel() != matrices * shape[-1]:
        # llama.cpp's files have an entry for a tied embedding that is not of its columns.
        if name == "token_embd.weight":
            return None
        raise ValueError(
            f"quantize: the importance of {name!r} must have {matrices * shape[-1]} values, "
            f"got {values.numel()}"
        )
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(
            f"quantize: the importance of {name!r} must be finite and not negative, got others"
        )
    return values.float().view(matrices, shape[-1])
