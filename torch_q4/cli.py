"""The command line: ``torch-q4``, also ``python -m torch_q4``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_q4 import formats, recipes
from torch_q4._tensors import info_of
from torch_q4._text import printable
from torch_q4._tune import architecture_of_gpu, tune
from torch_q4.convert import (
    Conversion,
    architecture_of,
    compare_files,
    dequantize_file,
    files_of,
    lack_of_memory,
    open_file,
    quantize_file,
)
from torch_q4.gguf import GGUFArray, GGUFFile, GGUFOpaque
from torch_q4.importance import load_importance
from torch_q4.ops import _LIBRARY, cpu_isa

__all__ = ["main"]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

_DESCRIPTION = """\
Weights in GGML's block formats: look at files, quantise, dequantise and compare them.

Files are GGUF or safetensors; the latter also as the folder of a Hugging Face model. Of a GGUF file
that is split, NAME-00001-of-00003.gguf, any part stands for all of it.
"""
_INFO = """\
Lists a file's tensors, formats and sizes. A tensor of a type that torch-q4 has no format for is
listed by ggml's name of the type, or the type's number.
"""
_QUANTIZE = """\
Quantises the matrices of a file. The mixes choose each tensor's format as llama.cpp's quantize tool
does, for the architectures gemma3, llama, qwen2 and qwen3; --pure works for any.

IN is a GGUF file, a safetensors file, or a folder of a Hugging Face model. OUT ends in .gguf or
.safetensors; a safetensors IN becomes GGUF if its config.json lies beside it.
OUT appears when it is complete and not before: an interruption leaves what was there.

A tensor of a type that torch-q4 has no format for stays as it is, if the mix leaves it alone and
OUT is GGUF; otherwise it is refused before anything is written.
"""
_DEQUANTIZE = """\
Writes a file's packed tensors as plain numbers. A tensor of a type that torch-q4 has no format for
is refused before anything is written.
"""
_COMPARE = """\
Tells how far the tensors of two files are apart, name by name: NMSE is sum (a - b)^2 / sum a^2, max
is max |a - b|, cosine that of the angle between them. NaN is equal to NaN alone. Of tensors whose
type torch-q4 has no format for, the bytes are compared.

The exit status is 1 if a value is NaN or infinite in one file and not the same in the other.
"""
_QUANTIZE_EXAMPLES = """\
examples:
  torch-q4 quantize model-f16.gguf model-q4_k_m.gguf --type q4_k_m
  torch-q4 quantize model-f16.gguf model-q3_k_m.gguf --type q3_k_m --imatrix imatrix.gguf
  torch-q4 quantize hf-folder model.gguf --type q8_0 --like other-quantisation-of-it.gguf
  torch-q4 quantize model.safetensors packed.safetensors --type q4_0 --pure
"""
_TUNE = """\
Measures which kernel of linear is the fastest for weights of N rows (out_features) and K columns
(in_features), for each shape in each format, and saves it for programs to come.

The plans are in tune.json in the folder TORCH_Q4_CACHE, by default $XDG_CACHE_HOME/torch_q4 or
~/.cache/torch_q4. Delete the file to forget them.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name the command that explains."""

    def error(self, message: str) -> Any:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


class _Ended(BaseException):
    """A signal that ends the process; an exception, so that whatever is half written is removed."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGTERM and SIGHUP raise :class:`_Ended` meanwhile, unless they are handled or ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python sets no handler there
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise _Ended(signal.Signals(number))

    ours = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program's name; by default that of the process.

    Returns:
        The exit status: 0, 1 where the command failed, 128 and the signal's number where a signal
        ended it: 130 for an interruption, 143 and 129 for SIGTERM and SIGHUP, 141 where nobody
        reads the output any more. Wrong usage raises ``SystemExit(2)``, as argparse does.
    """
    options = _parser().parse_args(arguments)
    try:
        with _signals_end_it():
            status: int = options.run(options)
            if sys.stdout is not None:
                sys.stdout.flush()  # a closed pipe and a full disk show here, not at exit
        return status
    except KeyboardInterrupt:
        status, text = 128 + signal.SIGINT, "interrupted"
    except _Ended as error:
        status, text = 128 + error.number, f"ended by {error}"
    except BrokenPipeError:  # what reads our output has enough of it
        _forget_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        status, text = 1, _described(error)
        if options.debug:
            for line in traceback.format_exc().splitlines():
                _say(line, error=True)
    _say(f"torch-q4: {text}", error=True)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _forget_output()
    return status


def _forget_output() -> None:
    """Keeps the interpreter's exit from failing on output that cannot be written."""
    with contextlib.suppress(OSError):  # a stream that is no file's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _described(error: Exception) -> str:
    lack = lack_of_memory(error)
    if lack is not None:
        return f"out of memory: {lack}"
    if isinstance(error, OSError) and error.strerror:
        where = f": {os.fsdecode(error.filename)}" if error.filename else ""
        return f"{error.strerror}{where}"
    if isinstance(error, (ValueError, TypeError, ImportError, OSError)):
        return str(error)
    # Not one that was foreseen: say what it is.
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    threads = _Parser(add_help=False)
    threads.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )
    threads.add_argument("--no-progress", action="store_true", help="show no progress bar")

    parser = _Parser(
        prog="torch-q4",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torch-q4 {_version('torch_q4')}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )

    def command(
        name: str,
        run: Any,
        summary: str,
        parents: list[_Parser],
        description: str | None = None,
        epilog: str | None = None,
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(
            name,
            parents=[*parents, common],
            help=summary,
            description=description or f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    info = command("info", _info, "list a file's tensors, formats and sizes", [], _INFO)
    info.add_argument("file", metavar="FILE", help="a GGUF or safetensors file, or a folder")
    info.add_argument("--metadata", action="store_true", help="list the metadata, too")

    quantise = command(
        "quantize",
        _quantize,
        "quantise a file",
        [threads],
        _QUANTIZE,
        _QUANTIZE_EXAMPLES,
    )
    quantise.add_argument("source", metavar="IN", help="what to quantise")
    quantise.add_argument("target", metavar="OUT", help="the file to write")
    quantise.add_argument(
        "--type",
        required=True,
        type=_mix,
        metavar="TYPE",
        help=f"the mix: {', '.join(recipe.name for recipe in recipes.all())}",
    )
    quantise.add_argument(
        "--imatrix",
        metavar="FILE",
        help="an importance matrix, as llama.cpp's imatrix tool writes it: GGUF or the older .dat",
    )
    quantise.add_argument(
        "--pure", action="store_true", help="give every matrix the mix's base format"
    )
    quantise.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        type=_override,
        metavar="PATTERN=FORMAT",
        help="give tensors whose name has this regular expression in it this format; repeatable, "
        f"the first that fits counts; formats: {', '.join(f.name for f in _file_formats())}",
    )
    quantise.add_argument(
        "--allow-requantize",
        action="store_true",
        help="quantise tensors that are quantised already, at a loss",
    )
    quantise.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="quantise tensors that hold NaN or infinities, which spoil the rest of their blocks",
    )
    quantise.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )

    undo = command(
        "dequantize",
        _dequantize,
        "write a file's packed tensors as plain numbers",
        [threads],
        _DEQUANTIZE,
    )
    undo.add_argument("source", metavar="IN", help="a GGUF or safetensors file, or a folder")
    undo.add_argument("target", metavar="OUT", help="the file to write, .gguf or .safetensors")
    undo.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="f32", help="(default: %(default)s)"
    )
    undo.add_argument(
        "--dry-run", action="store_true", help="print what would be done, write nothing"
    )
    for sub in (quantise, undo):
        sub.add_argument(
            "--like",
            metavar="GGUF",
            help="take metadata and tokenizer from this file, for a safetensors IN and a GGUF OUT",
        )

    compare = command(
        "compare",
        _compare,
        "tell how far the tensors of two files are apart",
        [threads],
        _COMPARE,
    )
    compare.add_argument("a", metavar="A", help="the reference")
    compare.add_argument("b", metavar="B", help="what is compared with it")

    measure = command(
        "tune",
        _tune,
        "measure which kernels are the fastest on this GPU, and remember it",
        [],
        _TUNE,
        "example:\n  torch-q4 tune --shape 14336x4096 4096x14336 --format q4_k q6_k",
    )
    measure.add_argument(
        "--shape", nargs="+", required=True, type=_matrix, metavar="NxK", help="shapes of weights"
    )
    measure.add_argument(
        "--format",
        nargs="+",
        required=True,
        type=_one_format,
        metavar="FORMAT",
        help=f"their formats: {', '.join(fmt.name for fmt in formats.all())}",
    )
    measure.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="that of the activations (default: %(default)s)",
    )
    measure.add_argument(
        "--no-save", action="store_true", help="only show what was found, do not remember it"
    )

    command(
        "doctor",
        _doctor,
        "say what this installation has, what it lacks and what to do about it",
        [],
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _mix(text: str) -> recipes.Recipe:
    try:
        return recipes.get(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _override(text: str) -> tuple[str, formats.Format]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"must be PATTERN=FORMAT, got {text!r}")
    try:
        re.compile(pattern)
        fmt = formats.get(name)
        fmt.check_quantizes("--tensor-type")
        return pattern, fmt
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"PATTERN must be a regular expression, got {pattern!r}: {error}"
        ) from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _matrix(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be NxK, got {text!r}")
    return int(n), int(k)


def _one_format(text: str) -> formats.Format:
    try:
        return formats.get(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file_formats() -> list[formats.Format]:
    """What a file's tensors may be quantised to."""
    return [fmt for fmt in formats.all() if fmt.type_id >= 0 and fmt.quantizes]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "torch_q4":
            from torch_q4 import __version__

            return __version__
        return ""


# ---- output --------------------------------------------------------------------------------------


def _say(text: str = "", *, error: bool = False) -> None:
    """Prints a line; what a terminal would obey is escaped, and what the stream cannot encode."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed when the process began
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(OSError) if error else contextlib.nullcontext():
        print(line, file=stream)


def _print_json(value: Any) -> None:
    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None  # JSON has no infinity
        if isinstance(item, dict):
            return {key: plain(each) for key, each in item.items()}
        return (
            [plain(each) for each in item] if isinstance(item, (list, tuple, GGUFArray)) else item
        )

    if sys.stdout is not None:
        print(json.dumps(plain(value), indent=2))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints columns, the first ``left`` of them flush left."""
    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        _say("  ".join(cells).rstrip())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _count(count: float) -> str:
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f}G"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


# ---- commands ------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    file = open_file(options.file)
    infos = [info_of(tensor) for tensor in file.tensors.values()]
    elements = sum(info.elements for info in infos)
    nbytes = sum(info.nbytes for info in infos)
    types: dict[str, list[int]] = {}
    for info in infos:
        entry = types.setdefault(info.type_name, [0, 0, 0])
        for place, value in enumerate((1, info.elements, info.nbytes)):
            entry[place] += value
    kind = f"GGUF version {file.version}" if isinstance(file, GGUFFile) else "safetensors"
    files = files_of(file)
    opaque = [info.name for info in infos if isinstance(info.format, GGUFOpaque)]
    bits = 8 * nbytes / elements if elements else 0.0
    if options.json:
        _print_json(
            {
                "path": file.path,
                "files": files,
                "kind": kind,
                "architecture": architecture_of(file),
                "parameters": elements,
                "bytes": nbytes,
                "bits_per_weight": bits,
                "types": {
                    name: {"tensors": count, "parameters": parameters, "bytes": size}
                    for name, (count, parameters, size) in types.items()
                },
                "tensors": [
                    {
                        "name": info.name,
                        "type": info.type_name,
                        "shape": info.shape,
                        "parameters": info.elements,
                        "bytes": info.nbytes,
                        "readable": not isinstance(info.format, GGUFOpaque),
                    }
                    for info in infos
                ],
                "metadata": dict(file.metadata) if options.metadata else None,
            }
        )
        return 0
    if options.metadata:
        for key, stored in file.metadata.items():
            text = f"{len(stored)} values" if isinstance(stored, GGUFArray) else repr(stored)
            _say(f"{key} = {text if len(text) <= 120 else text[:117] + '...'}")
        _say()
    _print_table(
        ("tensor", "type", "shape", "parameters", "size", "bits"),
        [
            (
                info.name,
                info.type_name,
                _shape(info.shape),
                _count(info.elements),
                _size(info.nbytes),
                f"{8 * info.nbytes / info.elements:.2f}" if info.elements else "-",
            )
            for info in infos
        ],
        left=3,
    )
    _say()
    _print_table(
        ("type", "tensors", "parameters", "size"),
        [(n, str(c), _count(p), _size(s)) for n, (c, p, s) in types.items()],
    )
    _say()
    parts = f" in {len(files)} parts" if len(files) > 1 else ""
    _say(
        f"{kind}{parts}, {architecture_of(file) or 'no architecture'}: {len(infos)} tensors, "
        f"{_count(elements)} parameters, {_size(nbytes)}, {bits:.2f} bits per weight"
    )
    if opaque:
        _say(f"without a format here, so that their values cannot be read: {_some(opaque)}")
    return 0


def _prepare(options: argparse.Namespace) -> bool | None:
    """Sets the threads; whether to show a bar, None being as the terminal says."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return False if options.no_progress else None


def _quantize(options: argparse.Namespace) -> int:
    progress = _prepare(options)
    result = quantize_file(
        options.source,
        options.target,
        options.type.name,
        importance=load_importance(options.imatrix) if options.imatrix else None,
        importance_path=options.imatrix,
        pure=options.pure,
        overrides=options.tensor_type,
        allow_requantize=options.allow_requantize,
        allow_nonfinite=options.allow_nonfinite,
        like=options.like,
        dry_run=options.dry_run,
        progress=progress,
    )
    _report(result, options)
    return 0


def _dequantize(options: argparse.Namespace) -> int:
    progress = _prepare(options)
    result = dequantize_file(
        options.source,
        options.target,
        _DTYPES[options.dtype],
        like=options.like,
        dry_run=options.dry_run,
        progress=progress,
    )
    _report(result, options)
    return 0


def _report(result: Conversion, options: argparse.Namespace) -> None:
    if options.json:
        _print_json(
            dataclasses.asdict(result)
            | {"bits_per_weight": result.bits_per_weight, "dry_run": options.dry_run}
        )
        return
    if options.dry_run:
        _print_table(
            ("tensor", "shape", "from", "to", "size before", "size after"),
            [
                (
                    row["name"],
                    _shape(row["shape"]),
                    row["from"],
                    row["to"],
                    _size(row["bytes_before"]),
                    _size(row["bytes_after"]),
                )
                for row in result.tensors
            ],
            left=4,
        )
        _say()
    for note in result.notes:
        _say(f"note: {note}", error=True)
    _say(
        f"{len(result.tensors)} tensors, {_size(result.bytes_before)} to "
        f"{_size(result.bytes_after)}, {result.bits_per_weight:.2f} bits per weight"
        + (" (dry run: nothing written)" if options.dry_run else f", in {result.seconds:.1f} s")
    )
    if not options.dry_run:
        _say(f"wrote {result.target}")


def _compare(options: argparse.Namespace) -> int:
    result = compare_files(options.a, options.b, progress=_prepare(options))
    broken = [error for error in result.tensors if error.nonfinite]
    status = 1 if broken else 0
    if options.json:
        _print_json(dataclasses.asdict(result))
        return status
    if result.tensors or not result.opaque:
        _print_table(
            ("tensor", "shape", "A", "B", "NMSE", "max", "cosine"),
            [
                (
                    error.name,
                    _shape(error.shape),
                    error.type_a,
                    error.type_b,
                    f"{error.nmse:.3e}",
                    f"{error.max_error:.3e}",
                    f"{error.cosine:.6f}",
                )
                for error in result.tensors
            ],
            left=4,
        )
    if result.opaque:
        if result.tensors:
            _say()
        _print_table(
            ("tensor", "shape", "A", "B", "bytes"),
            [
                (
                    error.name,
                    _shape(error.shape),
                    error.type_a,
                    error.type_b,
                    "of different types" if error.different is None
                    else f"{error.different} of {error.nbytes} differ" if error.different
                    else "equal",
                )
                for error in result.opaque
            ],
            left=5,
        )  # fmt: skip
    for what, names in (
        (f"only in {options.a}", result.only_a),
        (f"only in {options.b}", result.only_b),
        ("of different shapes", result.shapes_differ),
    ):
        if names:
            _say(f"{what}: {_some(names)}")
    if result.tensors or result.opaque:
        _say()
    if result.tensors:
        worst = max(result.tensors, key=lambda error: _or_infinite(error.nmse))
        mean = sum(error.nmse for error in result.tensors) / len(result.tensors)
        exact = sum(error.max_error == 0 for error in result.tensors)
        _say(
            f"{len(result.tensors)} tensors compared, {exact} equal; NMSE mean {mean:.3e}, "
            f"largest {worst.nmse:.3e} ({worst.name})"
        )
    if result.opaque:
        exact = sum(error.different == 0 for error in result.opaque)
        _say(f"{len(result.opaque)} tensors have no format here: the bytes of {exact} are equal")
    for error in broken:
        _say(
            f"{error.name}: {error.nonfinite} values are NaN or infinite in one file and not the "
            "same in the other"
        )
    return status


def _some(names: Sequence[str]) -> str:
    """A few names and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _tune(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        _say("torch-q4: tune: torch must see a GPU, got none", error=True)
        return 1
    reports = []
    for n, k in options.shape:
        for fmt in options.format:
            dtype = getattr(torch, options.dtype)
            reports.append(tune(n, k, fmt, dtype=dtype, save=not options.no_save))
            if not options.json:
                for line in [*str(reports[-1]).splitlines(), ""]:
                    _say(line)
                if sys.stdout is not None:
                    sys.stdout.flush()
    if options.json:
        _print_json([dataclasses.asdict(report) | {"dtype": options.dtype} for report in reports])
    return 0


# ---- doctor --------------------------------------------------------------------------------------

# What the CPU kernels can use, and the packages that some parts need, with what for.
_CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni",
    "amx_tile", "amx_bf16",
)  # fmt: skip
_PACKAGES = {
    "safetensors": ("safetensors files", "pip install safetensors"),
    "tqdm": ("progress bars", "pip install tqdm"),
    "transformers": ("running GGUF files as models", "pip install 'torch_q4[transformers]'"),
    "gguf": ("tokenizers of GGUF files", "pip install 'torch_q4[transformers]'"),
}
_CODE_OBJECTS = {"hip": "*.hipfb", "cuda": "*.fatbin"}
_VENDORS = {"hip": "AMD", "cuda": "NVIDIA"}


def _cpu() -> dict[str, Any]:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                if key.strip() == "flags":
                    flags = set(value.split())
                    break
    except OSError:
        pass
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "features": [feature for feature in _CPU_FEATURES if feature in flags],
        "missing": [feature for feature in _CPU_FEATURES if feature not in flags],
        "kernels": cpu_isa(),
    }


def _devices() -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "architecture": architecture_of_gpu(properties),
                "memory": properties.total_memory,
                # Loads a kernel there, so this is what an operator would meet with.
                "problem": torch.ops.torch_q4.gpu_problem(index).removeprefix("gpu_problem: "),
            }
        )
    return devices


def _gpu_kernels() -> dict[str, Any]:
    """The GPU kernels of this installation, and the driver's library if one is in use."""
    table = dict(line.partition(" ")[::2] for line in torch.ops.torch_q4.gpu_table().splitlines())
    folder = Path(_LIBRARY).parent / "kernels"
    return {
        "driver": table.get("driver"),
        "architectures": {backend: table[backend].split() for backend in _CODE_OBJECTS},
        "files": {
            backend: sorted(path.name for path in folder.glob(pattern))
            for backend, pattern in _CODE_OBJECTS.items()
        },
    }


def _gpu_kernels_text(kernels: dict[str, Any]) -> str:
    texts = [
        f"{_VENDORS[backend]}: {len(kernels['files'][backend])} for {', '.join(architectures)}"
        for backend, architectures in kernels["architectures"].items()
        if architectures
    ]
    return "; ".join(texts) or "none in this build: GPU kernels are not there"


def _doctor(options: argparse.Namespace) -> int:
    backend = "ROCm " + torch.version.hip if torch.version.hip else (
        "CUDA " + torch.version.cuda if torch.version.cuda else "CPU only"
    )  # fmt: skip
    devices = _devices()
    kernels = _gpu_kernels()
    packages = {name: _version(name) for name in _PACKAGES}
    problems = [
        {"problem": f"{name} is not installed, needed for {what}", "fix": fix}
        for name, (what, fix) in _PACKAGES.items()
        if not packages[name]
    ]
    for device in devices:
        if device["problem"]:
            problems.append(
                {
                    "problem": f"{device['name']} cannot run torch_q4: {device['problem']}",
                    "fix": "build the kernels for it as said there; until then the CPU works: "
                    "model.to('cpu')",
                }
            )
    if platform.machine() in ("x86_64", "AMD64") and cpu_isa() == "generic":
        problems.append(
            {
                "problem": "the CPU kernels run without vector instructions, got "
                f"TORCH_Q4_CPU_ISA={os.environ.get('TORCH_Q4_CPU_ISA', '')!r}",
                "fix": "unset TORCH_Q4_CPU_ISA, or use a CPU with AVX2",
            }
        )
    cpu = _cpu()
    report = {
        "torch_q4": _version("torch_q4"),
        "library": str(_LIBRARY),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": backend,
        "formats": [fmt.name for fmt in formats.all()],
        "cpu": cpu,
        "devices": devices,
        "gpu_kernels": kernels,
        "packages": packages,
        "problems": problems,
    }
    if options.json:
        _print_json(report)
        return 0
    lines = {
        "torch_q4": f"{report['torch_q4']}, {report['library']}",
        "python": report["python"],
        "torch": f"{report['torch']}, {backend}",
        "formats": ", ".join(fmt.name for fmt in formats.all()),
        "cpu": f"{cpu['name']}, {cpu['threads']} threads",
        "cpu features": ", ".join(cpu["features"]) or "none that the kernels use",
        "cpu kernels": cpu["kernels"],
        "code objects": _gpu_kernels_text(kernels),
        "gpu driver": kernels["driver"] or "none in use",
    }
    for index, device in enumerate(devices):
        lines[f"device {index}"] = (
            f"{device['name']}, {device['architecture']}, {_size(device['memory'])}, "
            f"{'kernels do not run, see below' if device['problem'] else 'kernels run'}"
        )
    lines |= {name: version or "not installed" for name, version in packages.items()}
    width = max(map(len, lines))
    for name, text in lines.items():
        _say(f"{name:{width}}  {text}")
    _say()
    for problem in problems:
        _say(f"problem: {problem['problem']}")
        _say(f"    fix: {problem['fix']}")
    if not problems:
        _say("no problems found")
    return 0
