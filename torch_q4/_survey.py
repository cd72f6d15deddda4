"""What a model holds: its tensors' memory, and the weights that its modules read for themselves."""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
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
# through local variables, into every method and function that `forward` can reach. Where code reads
# the weight of an object that this cannot tell, the object may be each layer of the read name below
# the reader, and each layer that any code of the model hands on, or iterates over, uncalled.

_Path = tuple[str, ...]
_ANY = "*"  # in a path: each part of a container

# What gives a module's parts by a name, or all of them.
_LOOKUPS = {
    "__getattr__", "_modules", "children", "get_submodule", "getattr", "modules", "named_children",
    "named_modules",
}  # fmt: skip


@dataclasses.dataclass
class _Reads:
    """What code reads.

    Attributes:
        weights: the paths, as attributes of ``self``, of modules whose ``weight`` is read.
        unknown: the same from an object that is not known.
        handed: the paths of what is not called itself, but indexed, stored or passed on.
        iterated: the paths of what the code iterates over.
        names: what is looked up in ``self``, methods among them.
        dtypes: the paths of modules whose first parameter's dtype is taken.
        globals: what is looked up outside, attributes of modules and classes among them.
        looks_up: whether the code finds modules by a name that it computes.
    """

    weights: set[_Path] = dataclasses.field(default_factory=set)
    unknown: set[_Path] = dataclasses.field(default_factory=set)
    handed: set[_Path] = dataclasses.field(default_factory=set)
    iterated: set[_Path] = dataclasses.field(default_factory=set)
    names: set[str] = dataclasses.field(default_factory=set)
    dtypes: set[_Path] = dataclasses.field(default_factory=set)
    globals: set[_Path] = dataclasses.field(default_factory=set)
    looks_up: bool = False

    def add(self, other: _Reads) -> None:
        """Takes in what other code reads."""
        for name, value in vars(self).items():
            setattr(self, name, value | getattr(other, name))


def weights_read(model: nn.Module) -> dict[int, str]:
    """The modules whose weight another module of the model reads: their ids, and who reads."""
    found: dict[int, str] = {}
    handed: dict[int, nn.Module] = {}
    strangers: dict[_Path, str] = {}  # what is read from what may come from another module
    givers: list[nn.Module] = []  # modules that hand on themselves

    def note(modules: Iterable[nn.Module], why: str, reader: nn.Module | None = None) -> None:
        for each in modules:
            if each is not reader:
                found.setdefault(id(each), why)

    for module in model.modules():
        why = f"{type(module).__name__} reads its weight"
        reads = _Reads()
        for each in _reads_of(module):
            reads.add(each)
        for path in reads.weights:
            note(_at(module, path), why, module)
        for path in reads.dtypes:
            for owner in _at(module, path):
                taken = f"{type(module).__name__} takes its dtype from parameters()"
                note(_first_owner(owner), taken)
        for path in reads.handed - {()}:
            handed.update({id(part): part for part in _at(module, (*path, _ANY))})
        if () in reads.handed:
            givers.append(module)
        for path in reads.unknown:
            strangers.setdefault(path, why)
        if () in reads.unknown:
            for path in reads.iterated - {()}:
                note(_at(module, (*path, _ANY)), why)
            if reads.looks_up:
                note(module.modules(), why, module)
        for path in reads.unknown - {()}:
            for part in module.modules():
                note(_at(part, path), why)
    for path, why in strangers.items():
        for module in handed.values():
            for part in module.modules() if path else (module,):
                note(_at(part, path), why)
        for module in givers:
            note(_at(module, path), why, module)
    return found


def _at(module: nn.Module, path: _Path) -> list[nn.Module]:
    """The modules at a path: none, one, or all parts of a container."""
    found: list[Any] = [module]
    for name in path:
        if name == _ANY:
            found = [part for each in found for part in _parts(each)]
        else:
            modules = [each for each in found if isinstance(each, nn.Module)]
            found = [each._modules.get(name, vars(each).get(name)) for each in modules]
    return [each for each in found if isinstance(each, nn.Module)]


def _parts(value: Any) -> Iterator[nn.Module]:
    """The modules that code gets from a module, or from a container of them, by indices."""
    if isinstance(value, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        value = list(value.children())
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (dict, list, set, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parts(part)


def _first_owner(module: nn.Module) -> list[nn.Module]:
    """The module whose parameter is the first of all, if there is one."""
    owners = (
        each for each in module.modules()
        if any(parameter is not None for parameter in each._parameters.values())
    )  # fmt: skip
    return list(itertools.islice(owners, 1))


def _reads_of(module: nn.Module) -> Iterator[_Reads]:
    cls: Any = type(module)  # mypy holds that a class of modules has no hash
    found = _reads_of_class(cls)
    yield from found
    own = vars(module)
    names = {"forward"}.union(*(reads.names for reads in found))
    # A function that is an attribute of the object does not get the object.
    functions = [
        (own[name], name == "forward" or not isinstance(own[name], FunctionType))
        for name in sorted(names & own.keys())
    ]
    yield from _reached(functions, cls)


@functools.lru_cache(maxsize=1024)
def _reads_of_class(cls: Any) -> list[_Reads]:
    """What ``forward`` reads, and every method, property and function that it reaches."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    # Of every base: `super().forward` does not say which.
    methods = [
        (vars(base)[name], True)
        for name in ("forward", "__call__") for base in bases if name in vars(base)
    ]  # fmt: skip
    return _reached(methods, cls)


def _reached(functions: list[tuple[Any, bool]], cls: Any) -> list[_Reads]:
    """What functions, or methods of a class, read and reach, through ``self`` or by name."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    found: list[_Reads] = []
    waiting = list(functions)
    seen: set[object] = set()
    while waiting:
        value, is_method = waiting.pop()
        for function in _functions(value):
            key = function.__code__, is_method
            if key in seen:
                continue
            seen.add(key)
            reads = _scanned(function.__code__, is_method and not isinstance(value, staticmethod))
            found.append(reads)
            for name in sorted(reads.names - seen):
                seen.add(name)
                waiting += [(vars(base)[name], True) for base in bases if name in vars(base)]
            for path in sorted(reads.globals):
                waiting += [(each, False) for each in _outside(path, function.__globals__)]
    return found


def _outside(path: _Path, names: dict[str, Any]) -> Iterator[Any]:
    """The functions that code may call by a global name: not torch's, which take tensors."""
    value: Any = names.get(path[0])
    for name in path[1:]:
        if not isinstance(value, (ModuleType, type)):
            break
        value = vars(value).get(name)
    if isinstance(value, type) and issubclass(value, Function):
        value = vars(value).get("forward")
    values = value.values() if isinstance(value, dict) else value
    for each in values if isinstance(value, (dict, list, set, tuple)) else (value,):
        for function in _functions(each):
            if function.__module__ is None or function.__module__.partition(".")[0] != "torch":
                yield each
                break


def _functions(value: Any) -> list[FunctionType]:
    """The function of a method or property, and the functions that a decorator hides."""
    found: dict[CodeType, FunctionType] = {}
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
            found[value.__code__] = value
            waiting.append(inspect.unwrap(value))
            for cell in value.__closure__ or ():
                try:
                    inner = cell.cell_contents
                except ValueError:  # not filled yet
                    continue
                if isinstance(inner, (FunctionType, MethodType)):
                    waiting.append(inner)
    return list(found.values())


@functools.lru_cache(maxsize=4096)
def _scanned(code: CodeType, is_method: bool) -> _Reads:
    reads = _Reads()
    own = code.co_varnames[0] if code.co_argcount and is_method else None
    names: set[str] = set()
    parameters: set[_Path] = set()
    _scan(code, own, reads, parameters, names)
    if "dtype" in names and "is_floating_point" not in names:
        reads.dtypes |= parameters
    outside = {path[0] for path in reads.globals}
    reads.looks_up = not _LOOKUPS.isdisjoint(names | outside)
    return reads


def _scan(
    code: CodeType, own: str | None, reads: _Reads, parameters: set[_Path], names: set[str]
) -> None:
    """Follows attributes through one code object, and through those that are defined inside."""
    instructions = [
        each for each in dis.get_instructions(code)
        if each.opname not in ("CACHE", "EXTENDED_ARG", "NOP")
    ]  # fmt: skip
    # A variable that is set in several places, a parameter among them, holds one of several.
    stores = Counter(name for each in instructions for name in _stored(each))
    stores.update(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    local: dict[str, _Path] = {}  # variables that hold an attribute of self
    path: _Path | None = None  # what lies on the stack, as a path from self; None: unknown
    suffix: _Path = ()  # the attributes taken of something unknown
    outside: str | None = None  # the global that they are taken of
    called = False  # whether the last attribute is a method, or a module, to be called
    index = -1  # where an index is taken of the path

    def drop(follows: str, compared: bool) -> None:
        """Notes what was read, when nothing more is taken of it."""
        if path is not None:
            reads.names.update(path[:1])
            if path and path[-1] in ("children", "items", "modules", "values"):
                reads.iterated.add(path[:-1])
            elif follows.startswith("GET_ITER"):
                reads.iterated.add(path)
            elif not called and not compared and follows != "STORE_ATTR":
                reads.handed.add(path)
        elif outside is not None:
            reads.globals.add((outside, *suffix))
        taken = suffix if path is None else path
        for leaf, places in (
            ("weight", reads.unknown if path is None else reads.weights),
            ("parameters", set() if path is None else parameters),
        ):
            # The device of blocks is the weight's own.
            if leaf in taken and taken[taken.index(leaf) + 1 :][:1] != ("device",):
                places.add(taken[: taken.index(leaf)])

    for place, instruction in enumerate(instructions):
        kind, value = instruction.opname, instruction.argval
        if instruction.is_jump_target:  # what lies on the stack is one of several
            drop("", False)
            path, suffix, outside, called = None, (), None, False
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            names.add(value)
            called = _is_method(instruction)
            if path is None:
                suffix = (*suffix, value)
            else:
                path = (*path, value)
            continue
        after = [each.opname for each in instructions[place : place + 2]]
        if path and kind in ("LOAD_CONST", "LOAD_FAST") and after[1:] == ["BINARY_SUBSCR"]:
            path, index = (*path, _ANY), place + 1
            continue
        if place == index:
            continue
        drop(kind, kind.startswith("POP_JUMP") or after == ["LOAD_CONST", "IS_OP"])
        for name in _stored(instruction)[:1]:
            if path is not None and stores[name] == 1:
                local[name] = path
            else:
                local.pop(name, None)
        path, suffix, outside, called = None, (), None, False
        # Python 3.13 has instructions that load two variables, or store one and load another.
        if "LOAD_FAST" in kind or "LOAD_DEREF" in kind:
            last = value[-1] if isinstance(value, tuple) else value
            path = () if last == own else local.get(last)
        elif kind in ("LOAD_GLOBAL", "LOAD_NAME"):
            outside = value
    drop("", False)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inside = own if own in constant.co_freevars else None
            _scan(constant, inside, reads, parameters, names)
        elif constant == "weight" and "getattr" in {root for root, *_ in reads.globals}:
            reads.unknown.add(())


def _stored(instruction: dis.Instruction) -> tuple[str, ...]:
    """The variables that an instruction sets."""
    kind, value = instruction.opname, instruction.argval
    if not kind.startswith("STORE_FAST"):
        return ()
    if not isinstance(value, tuple):
        return (value,)
    return value[:1] if "LOAD" in kind else value


def _is_method(instruction: dis.Instruction) -> bool:
    """Whether an attribute is looked up to be called at once."""
    if sys.version_info < (3, 12):
        return instruction.opname == "LOAD_METHOD"
    return bool((instruction.arg or 0) & 1)
