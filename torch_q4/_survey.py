"""What a model holds: its tensors' memory, and the weights that its modules read for themselves."""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Held", "measured", "nbytes", "overlapping", "tensors", "weights_read"]


# ---- memory --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A parameter or buffer of a model, under one of its names.

    Attributes:
        path: the name of the module that holds it.
        leaf: its name there.
        module: that module.
        tensor: the parameter or buffer itself.
    """

    path: str
    leaf: str
    module: nn.Module
    tensor: Tensor

    @property
    def name(self) -> str:
        """The name that ``named_parameters`` or ``named_buffers`` gives."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, and no parameter."""
        return self.leaf in self.module._buffers

    @functools.cached_property
    def extent(self) -> tuple[object, int, int]:
        """A memory, and where in it the tensor begins and ends, in bytes."""
        tensor = self.tensor
        if is_lazy(tensor):
            return id(tensor), 0, 0
        try:
            start = tensor.data_ptr() if tensor.untyped_storage().data_ptr() else 0
        except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses
            start = 0
        if not start:  # no memory of its own to compare, such as a meta tensor's
            return id(tensor), 0, nbytes(tensor)
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in sizes)
        return tensor.device, start, start + (last + 1) * tensor.element_size()

    @functools.cached_property
    def view(self) -> object:
        """Equal for tensors that are one: the same parameter, or equal views of one memory."""
        memory, start, end = self.extent
        if start == end or not start:
            return id(self.tensor)
        return memory, start, self.tensor.shape, self.tensor.stride(), self.tensor.dtype


def nbytes(tensor: Tensor) -> int:
    """The bytes of a tensor's elements; none where a lazy module has not made them yet."""
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()


def tensors(model: nn.Module) -> list[Held]:
    """Every parameter and buffer of a model, under each of its names."""
    return [
        Held(path, leaf, module, tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]


def measured(held: list[Held]) -> list[int]:
    """The bytes of each tensor, memory that several share counted once: at the first."""
    sizes = [0] * len(held)
    reached: dict[object, int] = {}
    for _, place, entry in _by_place(held):
        memory, start, end = entry.extent
        begin = max(start, reached.get(memory, 0))
        sizes[place] = max(0, end - begin)
        reached[memory] = max(end, begin)
    return sizes


def overlapping(held: list[Held]) -> set[object]:
    """The views that share memory with another view, of which they are no equal."""
    found: set[object] = set()
    last: dict[object, tuple[int, object]] = {}  # of each memory: how far a view reaches
    for _, _, entry in _by_place(held):
        memory, start, end = entry.extent
        reach, view = last.get(memory, (0, None))
        if start < reach and view != entry.view:
            found |= {view, entry.view}
        if end > reach:
            last[memory] = end, entry.view
    return found


def _by_place(held: list[Held]) -> list[tuple[tuple[str, int, int], int, Held]]:
    """Tensors in the order of their memory, the first and longest of equal starts first."""
    entries = []
    for place, entry in enumerate(held):
        memory, start, end = entry.extent
        entries.append(((str(memory), start, -end), place, entry))
    return sorted(entries, key=lambda item: item[:2])


# ---- code ----------------------------------------------------------------------------------------
#
# A module may read the weight of a module inside it, past that module's forward: T5 casts to
# `self.wo.weight.dtype`, nn.TransformerEncoderLayer hands `self.linear1.weight` to a kernel. Blocks
# would be taken for numbers there. The compiled code tells: attributes of `self` are followed,
# through local variables, into every method that `forward` can reach.

_Path = tuple[str, ...]


@dataclasses.dataclass
class _Reads:
    """What code reads, as attributes of ``self``.

    Attributes:
        weights: the paths of modules whose ``weight`` is read.
        elements: the same from an unknown object, which may be an element of a container.
        containers: the paths of what is not called itself, but indexed, iterated or passed on.
        names: what is looked up in ``self``, methods among them.
        dtypes: the paths of modules whose first parameter's dtype is taken.
    """

    weights: set[_Path] = dataclasses.field(default_factory=set)
    elements: set[_Path] = dataclasses.field(default_factory=set)
    containers: set[_Path] = dataclasses.field(default_factory=set)
    names: set[str] = dataclasses.field(default_factory=set)
    dtypes: set[_Path] = dataclasses.field(default_factory=set)


def weights_read(model: nn.Module) -> dict[int, str]:
    """The modules whose weight another module of the model reads: their ids, and who reads."""
    found: dict[int, str] = {}
    for module in model.modules():
        if not module._modules:
            continue
        reader = type(module).__name__
        for reads in _reads_of(module):
            for path in reads.weights:
                target = _at(module, path)
                if target is not None and target is not module:
                    found.setdefault(id(target), f"{reader} reads its weight")
            for container in map(functools.partial(_at, module), reads.containers):
                if not isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                    continue
                for element in container.children():
                    for path in reads.elements:
                        target = _at(element, path)
                        if target is not None:
                            found.setdefault(id(target), f"{reader} reads its weight")
            for path in reads.dtypes:
                first = _first_owner(_at(module, path))
                if first is not None:
                    found.setdefault(id(first), f"{reader} takes its dtype from parameters()")
    return found


def _at(module: nn.Module, path: _Path) -> nn.Module | None:
    found: Any = module
    for name in path:
        if not isinstance(found, nn.Module):
            return None
        found = found._modules.get(name, vars(found).get(name))
    return found if isinstance(found, nn.Module) else None


def _first_owner(module: nn.Module | None) -> nn.Module | None:
    """The module whose parameter is the first of all."""
    for each in module.modules() if module is not None else ():
        if any(parameter is not None for parameter in each._parameters.values()):
            return each
    return None


def _reads_of(module: nn.Module) -> Iterator[_Reads]:
    cls: Any = type(module)  # mypy holds that a class of modules has no hash
    yield from _reads_of_class(cls)
    own = vars(module).get("forward")
    if own is not None:
        for code in _codes(own):
            yield _scanned(code)


@functools.lru_cache(maxsize=1024)
def _reads_of_class(cls: Any) -> list[_Reads]:
    """What ``forward`` reads, and every method and property that it reaches through ``self``."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    found: list[_Reads] = []
    waiting = ["forward", "__call__"]
    seen: set[str] = set(waiting)
    while waiting:
        name = waiting.pop()
        # Of every base: `super().forward` does not say which.
        for value in (vars(base)[name] for base in bases if name in vars(base)):
            for code in _codes(value):
                reads = _scanned(code)
                found.append(reads)
                new = reads.names - seen
                seen |= new
                waiting += sorted(new)
    return found


def _codes(value: Any) -> list[CodeType]:
    """The code of a function, method or property, and of the functions that a decorator hides."""
    found: dict[CodeType, None] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (classmethod, staticmethod, MethodType)):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting.append(value.fget)
        elif isinstance(value, (functools.partial, functools.cached_property)):
            waiting += [value.func, getattr(value, "__wrapped__", None)]
        elif isinstance(value, FunctionType) and value.__code__ not in found:
            found[value.__code__] = None
            waiting.append(inspect.unwrap(value))
            for cell in value.__closure__ or ():
                try:
                    inner = cell.cell_contents
                except ValueError:  # not filled yet
                    continue
                if isinstance(inner, (FunctionType, MethodType)):
                    waiting.append(inner)
    return list(found)


def _scanned(code: CodeType) -> _Reads:
    reads = _Reads()
    own = code.co_varnames[0] if code.co_argcount else None
    names: set[str] = set()
    parameters: set[_Path] = set()
    _scan(code, own, reads, parameters, names)
    if "dtype" in names and "is_floating_point" not in names:
        reads.dtypes |= parameters
    return reads


def _scan(
    code: CodeType, own: str | None, reads: _Reads, parameters: set[_Path], names: set[str]
) -> None:
    """Follows attributes through one code object, and through those that are defined inside."""
    local: dict[str, _Path] = {}  # variables that hold an attribute of self
    path: _Path | None = None  # what lies on the stack, as a path from self; None: unknown
    suffix: _Path = ()  # the attributes taken of something unknown
    called = False  # whether the last attribute is a method, or a module, to be called

    def drop() -> None:
        """Notes what was read, when nothing more is taken of it."""
        if path is not None:
            reads.names.update(path[:1])
            if not called:
                reads.containers.add(path)
            elif path[-1] in ("children", "items", "modules", "values"):
                reads.containers.add(path[:-1])
        taken = suffix if path is None else path
        for leaf, places in (
            ("weight", reads.elements if path is None else reads.weights),
            ("parameters", set() if path is None else parameters),
        ):
            # The device of blocks is the weight's own.
            if leaf in taken and taken[taken.index(leaf) + 1 :][:1] != ("device",):
                places.add(taken[: taken.index(leaf)])

    for instruction in dis.get_instructions(code):
        kind, value = instruction.opname, instruction.argval
        if kind in ("CACHE", "EXTENDED_ARG", "NOP"):
            continue
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            names.add(value)
            called = _is_method(instruction)
            if path is None:
                suffix = (*suffix, value)
            else:
                path = (*path, value)
            continue
        drop()
        variables = value if isinstance(value, tuple) else (value,)
        if kind.startswith("STORE_FAST"):
            if path is not None:
                local[variables[0]] = path
            else:
                local.pop(variables[0], None)
        path, suffix, called = None, (), False
        # Python 3.13 has instructions that load two variables, or store one and load another.
        if "LOAD_FAST" in kind or "LOAD_DEREF" in kind:
            path = () if variables[-1] == own else local.get(variables[-1])
    drop()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inside = own if own in constant.co_freevars else None
            _scan(constant, inside, reads, parameters, names)


def _is_method(instruction: dis.Instruction) -> bool:
    """Whether an attribute is looked up to be called at once."""
    if sys.version_info < (3, 12):
        return instruction.opname == "LOAD_METHOD"
    return bool((instruction.arg or 0) & 1)
