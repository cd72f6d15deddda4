"""What is asked of every kernel, against numpy in float64.

A *case* is one kernel: a function that launches it over shapes, layouts and parts of the rows, and
raises :class:`MismatchError` at the first wrong output. Sizes are small, because an emulator takes
about a millisecond for each block of threads; ``--size`` multiplies them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import arguments as args
import numpy as np
from session import MismatchError, Output, Session
from weights import (
    F32,
    FLOATS,
    QUANTIZERS,
    Activations,
    Float,
    Format,
    Weight,
    all_formats,
    golden,
    make_weight,
    may_be_nan,
    quantize_activations,
)

EPS32 = F32.eps
HOPPER_SHARED_BYTES = 232448  # that a block may have
COMMON = "common"  # the code object of kernels that no format enters into


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and what to do with it."""

    code_object: str
    kernel: str
    run: Callable[[Session, int, np.random.Generator, int], None]  # function, numbers, size
    optional: bool = False  # not in the code for every device


def all_cases() -> Iterator[Case]:
    """Every kernel that kernels/arguments.h promises."""
    yield Case(COMMON, "quantize_activations", _quantize_activations)
    yield Case(COMMON, "sum_splits", _sum_splits)
    yield Case(COMMON, "arrange_lanes", _arrange_lanes, optional=True)
    yield Case(COMMON, "arrange", _arrange, optional=True)
    for fmt in all_formats().values():
        yield from _format_cases(fmt)


def _format_cases(fmt: Format) -> Iterator[Case]:
    def case(kernel: str, run: Callable[..., None], *rest: Any) -> Case:
        return Case(fmt.name, kernel, functools.partial(_with_format, run, fmt, rest))

    yield case("dequantize", _dequantize)
    yield case("embedding", _embedding)
    yield case("pack", _repack, True)
    yield case("unpack", _repack, False)
    if fmt.name in QUANTIZERS:
        yield case("quantize", _quantize)
    for dtype in FLOATS:
        yield case(f"reference_{dtype.name}", _linear, dtype, 0)
    for columns in args.ROWS_X_ROWS:
        for dtype in FLOATS:
            yield case(f"rows_{dtype.name}_{columns}", _linear, dtype, columns)
        yield case(f"rows_int8_{columns}", _linear_int8, columns)
    for columns in args.TILES_X_ROWS:
        for dtype in FLOATS[1:]:
            one = case(f"tiles_{dtype.name}_{columns}", _tiles, dtype, columns)
            yield dataclasses.replace(one, optional=True)
    for columns in args.PIPELINED_X_ROWS:
        for dtype in FLOATS[1:]:
            one = case(f"pipelined_{dtype.name}_{columns}", _pipelined, dtype, columns)
            yield dataclasses.replace(one, optional=True)
    for columns in args.HOPPER_ROWS_X_ROWS:
        for dtype in FLOATS[1:]:
            one = case(f"hopper_rows_{dtype.name}_{columns}", _hopper_rows, dtype, columns)
            yield dataclasses.replace(one, optional=True)
    for columns in args.HOPPER_MANY_X_ROWS:
        for dtype in FLOATS[1:]:
            one = case(f"hopper_many_{dtype.name}_{columns}", _hopper_many, dtype, columns)
            yield dataclasses.replace(one, optional=True)
    yield case("transposed", _transposed)


def _with_format(
    run: Callable[..., None],
    fmt: Format,
    rest: tuple[Any, ...],
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
) -> None:
    run(session, function, rng, size, fmt, *rest)


# ---- decoding ------------------------------------------------------------------------------------


def _dequantize(
    session: Session, function: int, rng: np.random.Generator, size: int, fmt: Format
) -> None:
    for blocks_of_row, parts in (
        (1, [(0, 37, False), (0, 37, True), (36, 37, False)]),
        (5, [(3, 20, False), (16, 37, True), (16, 32, True), (32, 37, True), (7, 7, False)]),
        (19, [(0, 37, True), (1, 37, False)]),
    ):
        weight = make_weight(fmt, 37, blocks_of_row * fmt.block_elems * size, rng, tame=False)
        for begin, end, packed in parts:
            if begin == end:
                continue  # nothing to launch; the host never does
            for dtype in FLOATS:
                out = session.output((end - begin, weight.k), dtype.bits)
                a = args.DequantizeArgs(
                    blocks=session.upload(weight.stored(packed)),
                    out=out.address,
                    n=weight.n,
                    k=weight.k,
                    row_begin=begin,
                    row_end=end,
                    packed=packed,
                    dtype=dtype.code,
                )
                session.launch(function, args.dequantize_grid(a, fmt.block_elems), a)
                where = f"{dtype.name} k={weight.k} rows {begin}:{end} packed={packed}"
                wanted = dtype.round(weight.values[begin:end])
                session.check_floats(dtype.decode(out.read()), wanted, where)
        session.release()


def _embedding(
    session: Session, function: int, rng: np.random.Generator, size: int, fmt: Format
) -> None:
    for blocks_of_row, n, count in ((1, 37, 9), (3, 16, 40), (2, 5, 1)):
        weight = make_weight(fmt, n, blocks_of_row * fmt.block_elems * size, rng, tame=False)
        for packed in (False, True):
            for dtype in FLOATS:
                for wide, kind in enumerate((np.int32, np.int64)):
                    indices = rng.integers(0, n, count).astype(kind)
                    indices[-1] = n - 1
                    out = session.output((count, weight.k), dtype.bits)
                    a = args.EmbeddingArgs(
                        indices=session.upload(indices),
                        blocks=session.upload(weight.stored(packed)),
                        out=out.address,
                        count=count,
                        n=n,
                        k=weight.k,
                        wide=wide,
                        packed=packed,
                        dtype=dtype.code,
                    )
                    session.launch(function, args.embedding_grid(a, fmt.block_elems), a)
                    where = f"{dtype.name} {kind.__name__} n={n} k={weight.k} packed={packed}"
                    wanted = dtype.round(weight.values[indices])
                    session.check_floats(dtype.decode(out.read()), wanted, where)
        session.release()


# ---- layouts and quantisation --------------------------------------------------------------------


def _repack(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    to_packed: bool,
) -> None:
    for groups, blocks_of_row in ((1, 1), (3, 1), (2, 5), (1, 19)):
        k = blocks_of_row * fmt.block_elems * size
        shape = (groups * args.GROUP_ROWS, fmt.row_bytes(k))
        blocks = rng.integers(0, 256, shape, dtype=np.uint8)
        weight = Weight(fmt, blocks, np.empty((shape[0], k), np.float32))
        out = session.output(shape, np.uint8)
        a = args.RepackArgs(
            **{"from": session.upload(weight.stored(not to_packed))},
            to=out.address,
            groups=groups,
            k=k,
        )
        session.launch(function, args.repack_grid(a, fmt.block_elems), a)
        session.check_bits(out.read(), weight.stored(to_packed), f"groups={groups} k={k}")
        session.release()


def _quantize(
    session: Session, function: int, rng: np.random.Generator, size: int, fmt: Format
) -> None:
    """Golden bytes, and in the other dtypes those of numpy's version, which makes them too."""
    for dtype in FLOATS:
        for w in (golden()["x"], rng.standard_normal((3 * size, 7 * fmt.block_elems))):
            bits = dtype.encode(w)
            rounded = dtype.decode(bits).astype(np.float32).reshape(-1, fmt.block_elems)
            wanted = QUANTIZERS[fmt.name](rounded)
            out = session.output(wanted.shape, np.uint8)
            a = args.QuantizeArgs(
                w=session.upload(bits), blocks=out.address, count=bits.size, dtype=dtype.code
            )
            session.launch(function, args.quantize_grid(a, fmt.block_elems), a)
            session.check_bits(out.read(), wanted, f"{dtype.name} block and byte")
            session.release()


def _quantize_activations(
    session: Session, function: int, rng: np.random.Generator, size: int
) -> None:
    for m, k in ((1, 32), (3, 160), (7, 1280), (5, 2080 * size)):
        for dtype in FLOATS:
            x = rng.standard_normal((m, k)).astype(np.float32)
            x[:, :32] *= 100
            x[-1, :32] = 0
            if k > 128:
                x[0, 40], x[0, 70], x[0, 100] = np.nan, np.inf, -np.inf
            bits = dtype.encode(x)
            x = dtype.decode(bits).astype(np.float32)
            wanted = quantize_activations(x)
            codes = session.output((m, k), np.int8)
            scales = session.output((m, k // 32), np.float32)
            sums = session.output((m, k // 16), np.int32)
            a = args.ActivationArgs(
                x=session.upload(bits),
                codes=codes.address,
                scales=scales.address,
                sums=sums.address,
                count=m * k,
                dtype=dtype.code,
            )
            session.launch(function, args.activation_grid(a), a)
            where = f"{dtype.name} m={m} k={k}"
            session.check_floats(scales.read(), wanted.scales, f"scales {where}")
            got = codes.read()
            # A product that is a tie to within float32's rounding may go either way.
            scale = np.repeat(wanted.scales.astype(np.float64), 32, axis=1)
            with np.errstate(invalid="ignore", over="ignore"):
                either = np.abs(x - scale * got) <= 0.5 * scale * (1 + 1e-4)
            session.check_bits(np.where(either, wanted.codes, got), wanted.codes, f"codes {where}")
            added = got.reshape(m, k // 16, 16).sum(axis=2, dtype=np.int32)
            session.check_bits(sums.read(), added, f"sums {where}")
            session.release()


# ---- products ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """One product: (m, k) with rows [begin, end) of a weight of n rows."""

    n: int
    k: int
    m: int
    begin: int
    end: int
    packed: bool
    bias: bool

    def __str__(self) -> str:
        return (
            f"m={self.m} n={self.n} k={self.k} rows {self.begin}:{self.end} "
            f"packed={self.packed} bias={self.bias}"
        )


def _widths(fmt: Format, size: int) -> tuple[int, int, int]:
    """K of one block, of an odd number of blocks, and more than a block of threads has at once."""
    one = fmt.block_elems
    return one, (5 if one < 256 else 3) * one, (4096 + one) * size


def _row_shapes(fmt: Format, columns: int, size: int) -> list[Shape]:
    """For kernels that take rows of either layout, and any number of them."""
    one, odd, long = _widths(fmt, size)
    c = max(columns, 1)
    return [
        Shape(37, one, 1, 0, 37, False, False),
        Shape(37, odd, c, 0, 37, True, True),
        Shape(37, odd, c + 1, 16, 37, True, False),
        Shape(48, odd, 2 * c + 1, 16, 32, True, True),
        Shape(16, long, c, 0, 16, True, False),
        Shape(21, long, 1, 0, 21, False, True),
        Shape(37, odd, 3, 32, 37, True, True),
        Shape(5, one, c, 0, 5, True, False),
        Shape(1, odd, c, 0, 1, False, True),
        Shape(16 * size, one, 1, 0, 16 * size, True, True),
    ]


def _tile_shapes(fmt: Format, size: int) -> list[Shape]:
    """For the matrix kernels: whole groups of packed rows."""
    one, odd, long = _widths(fmt, size)
    return [
        Shape(16, one, 1, 0, 16, True, False),
        Shape(48, odd, 5, 0, 48, True, True),
        Shape(37, one, 16, 0, 32, True, False),
        Shape(48, odd, 17, 16, 32, True, True),
        Shape(48, one, 64, 16, 48, True, False),
        Shape(32 * size, odd, 70, 0, 32 * size, True, True),
        Shape(16, long, 17, 0, 16, True, False),
        Shape(80, long, 3, 0, 80, True, False),
        Shape(90, odd, 33, 0, 80, True, False),
    ]


def _linear_args(
    session: Session, shape: Shape, weight: Weight, dtype: Float, bias: np.ndarray | None
) -> tuple[args.LinearArgs, Any]:
    """The arguments that every product has, and the output."""
    out = session.output((shape.m, shape.n), dtype.bits)
    a = args.LinearArgs(
        blocks=session.upload(weight.stored(shape.packed)),
        bias=None if bias is None else session.upload(bias),
        out=out.address,
        m=shape.m,
        n=shape.n,
        k=shape.k,
        row_begin=shape.begin,
        row_end=shape.end,
        packed=shape.packed,
        dtype=dtype.code,
    )
    return a, out


def _written(session: Session, out: Any, shape: Shape) -> np.ndarray:
    """The part of the output that the kernel was to write; the rest must be as it was."""
    bits = out.read()
    session.check_untouched(bits[:, : shape.begin], f"{shape}, rows before")
    session.check_untouched(bits[:, shape.end :], f"{shape}, rows after")
    return bits[:, shape.begin : shape.end]


Launch = Callable[[args.LinearArgs], None]


def _launcher(session: Session, function: int, columns: int) -> Launch:
    """``columns`` is 0 for the kernel that computes one output a thread."""

    def launch(a: args.LinearArgs) -> None:
        grid = args.rows_grid(a, columns) if columns else args.reference_grid(a)
        session.launch(function, grid, a)

    return launch


def _pipelined_launcher(
    session: Session, function: int, fmt: Format, columns: int, splits: int
) -> Launch:
    def launch(a: args.LinearArgs) -> None:
        sizes = a.m, a.k, columns, fmt.block_elems
        arranged = session.output((args.arranged_lanes_bytes(*sizes) // 2,), np.uint16)
        order = args.ArrangeArgs(
            x=a.x, out=arranged.address, m=a.m, k=a.k, x_rows=columns, block_elems=fmt.block_elems
        )
        session.launch(
            session.kernel(COMMON, "arrange_lanes"), args.arrange_lanes_grid(order), order
        )
        product = args.PipelinedArgs(linear=a, arranged=arranged.address, splits=splits)
        product.linear.x = None  # so that reading it is a fault
        shape = splits, a.m, a.row_end - a.row_begin
        partial = session.output(shape, np.float32) if splits > 1 else None
        product.partial = partial.address if partial else None
        session.launch(function, args.pipelined_grid(product, columns), product)
        arranged.read()  # looks at its guards
        if partial is not None:
            _add_up(session, a, partial, splits)

    return launch


def _hopper_rows_launcher(
    session: Session,
    function: int,
    fmt: Format,
    columns: int,
    groups: int,
    stages: int,
    splits: int,
) -> Launch:
    """Fewer stages where shared memory has no room, fewer splits where K has fewer units."""
    sizes = columns, fmt.block_elems, fmt.block_bytes

    def launch(a: args.LinearArgs) -> None:
        hopper_rows = args.HopperRowsArgs(linear=a, groups=groups, stages=stages)
        hopper_rows.splits = min(splits, args.ceil_div(a.k, args.STAGE_UNIT))
        while args.hopper_rows_shared_bytes(hopper_rows, *sizes) > HOPPER_SHARED_BYTES:
            hopper_rows.stages -= 1
        shape = hopper_rows.splits, a.m, a.row_end - a.row_begin
        partial = session.output(shape, np.float32) if hopper_rows.splits > 1 else None
        hopper_rows.partial = partial.address if partial else None
        grid, threads = (
            args.hopper_rows_grid(hopper_rows, columns),
            args.hopper_rows_threads(columns),
        )
        session.launch(
            function, grid, hopper_rows, threads, args.hopper_rows_shared_bytes(hopper_rows, *sizes)
        )
        if partial is None:
            return
        _add_up(session, a, partial, hopper_rows.splits)

    return launch


def _hopper_many_launcher(
    session: Session,
    function: int,
    fmt: Format,
    columns: int,
    x_stages: int,
    weight_stages: int,
    splits: int,
    multiprocessors: int,
) -> Launch:
    """Fewer stages where shared memory has no room, fewer splits where K has fewer units."""
    sizes = columns, fmt.block_elems, fmt.block_bytes

    def launch(a: args.LinearArgs) -> None:
        hopper_many = args.HopperManyArgs(linear=a, x_stages=x_stages, weight_stages=weight_stages)
        hopper_many.splits = min(splits, args.ceil_div(a.k, args.hopper_many_unit(fmt.block_elems)))
        while args.hopper_many_shared_bytes(hopper_many, *sizes) > HOPPER_SHARED_BYTES:
            if hopper_many.x_stages >= hopper_many.weight_stages:
                hopper_many.x_stages -= 1
            else:
                hopper_many.weight_stages -= 1
        # What arrange leaves unwritten is NaN, which then must not get into other columns.
        arranged = session.output((args.arranged_bytes(a.m, a.k, columns) // 2,), np.uint16)
        order = args.ArrangeArgs(
            x=a.x, out=arranged.address, m=a.m, k=a.k, x_rows=columns, block_elems=fmt.block_elems
        )
        session.launch(session.kernel(COMMON, "arrange"), args.arrange_grid(order), order)
        hopper_many.linear.x = None  # so that reading it is a fault
        hopper_many.arranged = arranged.address
        shape = hopper_many.splits, a.m, a.row_end - a.row_begin
        partial = session.output(shape, np.float32) if hopper_many.splits > 1 else None
        hopper_many.partial = partial.address if partial else None
        grid = args.hopper_many_grid(hopper_many, columns, multiprocessors)
        shared_bytes = args.hopper_many_shared_bytes(hopper_many, *sizes)
        session.launch(function, grid, hopper_many, args.HOPPER_MANY_THREADS, shared_bytes)
        arranged.read()  # looks at its guards
        if partial is not None:
            _add_up(session, a, partial, hopper_many.splits)

    return launch


def _add_up(session: Session, a: args.LinearArgs, partial: Output, splits: int) -> None:
    """What is left to do where blocks have shared out K."""
    partial.read()  # looks at its guards
    rows = a.row_end - a.row_begin
    sums = args.SumArgs(
        partial=partial.address,
        bias=a.bias + 2 * a.row_begin if a.bias else None,
        out=a.out + 2 * a.row_begin,
        count=a.m * rows,
        rows=rows,
        n=a.n,
        splits=splits,
        dtype=a.dtype,
    )
    session.launch(session.kernel(COMMON, "sum_splits"), args.sum_grid(sums), sums)


def check_exact(
    session: Session,
    got: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    dtype: Float,
    where: str,
) -> None:
    """The bounds of exact arithmetic; all but ``dtype`` in float64.

    Of each output: weights to within a rounding of their scale, their group's shift and themselves
    to the dtype, float32 sums, one rounding of the result. Of the whole: at most twice the error of
    a product that is exact but for one rounding of the weights and one of the result.
    """
    product = x @ w.T
    wanted = product if bias is None else product + bias
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    if bias is not None:
        norms = norms + np.abs(bias)
    bound = 4 * EPS32 * np.sqrt(x.shape[1]) * norms
    if dtype is not F32:
        largest = np.abs(w).max(axis=1, keepdims=True)
        rounded = (np.abs(w) + largest / 2) * dtype.eps + dtype.tiny
        bound += np.abs(x) @ rounded.T + dtype.eps / 2 * (np.abs(wanted) + bound) + dtype.tiny
    session.check_close(got, wanted, bound, where)
    if dtype is F32 or wanted.size < 64:
        return
    plain = x @ dtype.round(w).T
    plain = dtype.round(plain if bias is None else plain + bias)
    allowed = 2 * max(
        float(np.linalg.norm(plain - wanted)), float(dtype.eps / 2 * np.linalg.norm(wanted))
    )
    error = float(np.linalg.norm(got - wanted))
    if not error <= allowed:
        raise MismatchError(
            f"{where}: the whole error must be at most {allowed:.3g}, got {error:.3g}"
        )


def _linear(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    dtype: Float,
    columns: int,
) -> None:
    launch = _launcher(session, function, columns)
    _products(session, rng, _row_shapes(fmt, columns, size), fmt, dtype, launch)
    _nan_row(session, rng, fmt, dtype, launch)
    # The reference kernel's time goes with the outputs; it has no fragments to get wrong.
    k = 256 if columns else 32 * (fmt.block_elems // 32)
    rows = np.arange(k)
    for packed in (True, False):
        _one_hot(session, rng, fmt, dtype, launch, rows, k, packed)


def _tiles(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    dtype: Float,
    columns: int,
) -> None:
    launch = _launcher(session, function, columns)
    _products(session, rng, _tile_shapes(fmt, size), fmt, dtype, launch)
    _nan_row(session, rng, fmt, dtype, launch)
    _one_hot_tiles(session, rng, fmt, dtype, columns, launch)


def _pipelined(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    dtype: Float,
    columns: int,
) -> None:
    # More splits than K has steps for all waves of them, too.
    for splits in (1, 2, 7):
        launch = _pipelined_launcher(session, function, fmt, columns, splits)
        _products(session, rng, _tile_shapes(fmt, size), fmt, dtype, launch)
    launch = _pipelined_launcher(session, function, fmt, columns, 1)
    _nan_row(session, rng, fmt, dtype, launch)
    _one_hot_tiles(session, rng, fmt, dtype, columns, launch)


def _hopper_rows(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    dtype: Float,
    columns: int,
) -> None:
    start = functools.partial(_hopper_rows_launcher, session, function, fmt, columns)
    # Several units of K, the last one with a single block where blocks are small.
    k = 1280 + fmt.block_elems % 256
    for number, (groups, stages, splits) in enumerate(
        ((1, 2, 1), (3, 4, 1), (8, 2, 1), (1, 4, 3), (3, 2, 3), (8, 4, 3))
    ):
        m = (1, columns - 1, columns, columns + 1, 2 * columns + 1, 3)[number]
        launch = start(groups, stages, splits)
        shapes = [
            Shape(16 * (groups + 1), k, m, 0, 16 * (groups + 1), True, bool(number % 2)),
            Shape(16 * groups + 23, k, min(m, 9), 16, 16 * groups + 16, True, True),
            *_tile_shapes(fmt, size)[number % 2 :: 2],
        ]
        _products(session, rng, shapes, fmt, dtype, launch)
    _nan_row(session, rng, fmt, dtype, start(1, 2, 1))
    _one_hot_tiles(session, rng, fmt, dtype, columns, start(8, 4, 1))


def _hopper_many(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    dtype: Float,
    columns: int,
) -> None:
    start = functools.partial(_hopper_many_launcher, session, function, fmt, columns)
    # Several units of K, the last one with a single block where blocks are small.
    k = 1280 + fmt.block_elems % 256
    # Rows end in either block of a pair, in a tile's middle or with it. Few multiprocessors make
    # blocks take several tiles, whose stages follow each other through the rings.
    for number, (stages, splits, multiprocessors, m, rows) in enumerate((
        ((2, 2), 1, 2, 1, 288),
        ((8, 2), 1, 132, columns - 1, 80),
        ((2, 8), 1, 4, columns, 256),
        ((3, 3), 1, 2, 2 * columns + 1, 176),
        ((8, 8), 3, 4, columns + 1, 144),
        ((2, 2), 3, 2, 2 * columns + 1, 272),
        ((4, 4), 3, 132, 3, 128),
    )):  # fmt: skip
        launch = start(*stages, splits, multiprocessors)
        shapes = [
            Shape(rows + 8 * (number % 2), k, m, 0, rows, True, bool(number % 2)),
            Shape(rows + 23, k, min(m, 41), 16, rows + 16, True, True),
            *_tile_shapes(fmt, size)[number % 2 :: 2],
        ]
        _products(session, rng, shapes, fmt, dtype, launch)
    _nan_row(session, rng, fmt, dtype, start(2, 2, 1, 2))
    _one_hot_tiles(session, rng, fmt, dtype, columns, start(4, 4, 1, 132))


def _one_hot_tiles(
    session: Session,
    rng: np.random.Generator,
    fmt: Format,
    dtype: Float,
    columns: int,
    launch: Launch,
) -> None:
    one, odd, _ = _widths(fmt, 1)
    for k in sorted({one, odd if one < 256 else one, 256}):
        # Column p of tile t selects element t + 7 p: over K tiles each column selects each.
        tile, column = np.divmod(np.arange(k * columns), columns)
        chosen = (tile + 7 * column) % k
        _one_hot(session, rng, fmt, dtype, launch, chosen, k, True)


def _products(
    session: Session,
    rng: np.random.Generator,
    shapes: list[Shape],
    fmt: Format,
    dtype: Float,
    launch: Launch,
) -> None:
    for shape in shapes:
        weight = make_weight(fmt, shape.n, shape.k, rng)
        x = dtype.encode(rng.standard_normal((shape.m, shape.k)))
        bias = dtype.encode(rng.standard_normal(shape.n)) if shape.bias else None
        a, out = _linear_args(session, shape, weight, dtype, bias)
        a.x = session.upload(x)
        launch(a)
        part = slice(shape.begin, shape.end)
        check_exact(
            session,
            dtype.decode(_written(session, out, shape)),
            dtype.decode(x),
            weight.values[part].astype(np.float64),
            None if bias is None else dtype.decode(bias[part]),
            dtype,
            str(shape),
        )
        session.release()


def _nan_row(
    session: Session, rng: np.random.Generator, fmt: Format, dtype: Float, launch: Launch
) -> None:
    """A row whose scales are NaN, all bits of their mantissas set, gives NaN, and no other does."""
    if not may_be_nan(fmt):
        return
    weight = make_weight(fmt, args.GROUP_ROWS, 256, rng)
    weight.blocks[5] = 0xFF
    shape = Shape(weight.n, weight.k, 3, 0, weight.n, True, False)
    a, out = _linear_args(session, shape, weight, dtype, None)
    a.x = session.upload(dtype.encode(rng.standard_normal((shape.m, weight.k))))
    launch(a)
    wanted = np.zeros((shape.m, weight.n), bool)
    wanted[:, 5] = True
    got = np.isnan(dtype.decode(_written(session, out, shape)))
    session.check_bits(got.astype(np.uint8), wanted.astype(np.uint8), f"NaN or not {shape}")
    session.release()


def _one_hot(
    session: Session,
    rng: np.random.Generator,
    fmt: Format,
    dtype: Float,
    launch: Launch,
    chosen: np.ndarray,
    k: int,
    packed: bool,
) -> None:
    """Each row of x selects one element of K: the product is that column of the weight itself.

    Only the rounding to the dtype may be between them, so that no place of a fragment's layout
    (row, element, column) can be wrong unseen.
    """
    weight = make_weight(fmt, args.GROUP_ROWS, k, rng)
    x = np.zeros((len(chosen), k), np.float32)
    x[np.arange(len(chosen)), chosen] = 1
    shape = Shape(weight.n, k, len(chosen), 0, weight.n, packed, False)
    a, out = _linear_args(session, shape, weight, dtype, None)
    a.x = session.upload(dtype.encode(x))
    launch(a)
    wanted = weight.values.T[chosen].astype(np.float64)
    # In float32 scale * code + shift may be fused. In 16 bits scale, shift and weight may each be
    # rounded, the shift being about as large as the largest weight around.
    bound = np.maximum(dtype.eps * np.abs(wanted), dtype.tiny) * (1 + 2**-6)
    bound += EPS32 * np.abs(weight.values).max()
    if dtype is not F32:
        around = np.abs(weight.values).reshape(weight.n, -1, 32).max(axis=2)
        bound += dtype.eps * np.repeat(around, 32, axis=1).T[chosen]
    got = dtype.decode(_written(session, out, shape))
    session.check_close(got, wanted, bound, f"one-hot (column of x, row of W) {shape}")
    session.release()


def _linear_int8(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
    columns: int,
) -> None:
    for number, shape in enumerate(_row_shapes(fmt, columns, size)):
        dtype = FLOATS[number % 3]
        x = quantize_activations(rng.standard_normal((shape.m, shape.k)).astype(np.float32))
        _int8_product(session, function, rng, fmt, columns, shape, dtype, x)
    # Every code at its extreme, where sums of fewer than 32 bits would overflow.
    _, odd, _ = _widths(fmt, 1)
    for sign in (1, -1):
        codes = np.full((columns, odd), 127 * sign, np.int8)
        sums = np.full((columns, odd // 16), 16 * 127 * sign, np.int32)
        scales = np.full((columns, odd // 32), 0.01, np.float32)
        shape = Shape(16, odd, columns, 0, 16, True, False)
        extreme = Activations(codes, scales, sums)
        _int8_product(session, function, rng, fmt, columns, shape, F32, extreme)


def _int8_product(
    session: Session,
    function: int,
    rng: np.random.Generator,
    fmt: Format,
    columns: int,
    shape: Shape,
    dtype: Float,
    x: Activations,
) -> None:
    weight = make_weight(fmt, shape.n, shape.k, rng)
    bias = dtype.encode(rng.standard_normal(shape.n)) if shape.bias else None
    a, out = _linear_args(session, shape, weight, dtype, bias)
    a.x, a.scales, a.sums = (session.upload(part) for part in (x.codes, x.scales, x.sums))
    session.launch(function, args.rows_grid(a, columns), a)
    part = slice(shape.begin, shape.end)
    w = weight.values[part].astype(np.float64)
    wanted = x.values @ w.T
    # scale * code and shift are summed apart, and each is at most twice the block's largest weight.
    blocks = np.abs(w).reshape(len(w), -1, fmt.block_elems).max(axis=2)
    terms = np.abs(x.values).reshape(shape.m, -1, fmt.block_elems).sum(axis=2) @ blocks.T
    if bias is not None:
        wanted = wanted + dtype.decode(bias[part])
        terms = terms + np.abs(dtype.decode(bias[part]))
    bound = 16 * EPS32 * terms
    if dtype is not F32:
        bound += dtype.eps / 2 * (np.abs(wanted) + bound) + dtype.tiny
    got = dtype.decode(_written(session, out, shape))
    session.check_close(got, wanted, bound, f"{dtype.name} {shape}")
    session.release()


def _transposed(
    session: Session,
    function: int,
    rng: np.random.Generator,
    size: int,
    fmt: Format,
) -> None:
    one, odd, long = _widths(fmt, size)
    shapes = (
        (37, odd, 1, 1, False),
        (37, odd, 4, 3, True),
        (48, one, 5, 3, True),
        (5, one, 3, 1, True),
        (37, odd, 9, 5, False),  # fewer groups than splits: some have nothing, and say zero
        (16, long, 2, 1, True),
        (16 * 9 * size, one, 5, 2, True),
    )
    for dtype, (n, k, m, splits, packed) in itertools.product(FLOATS, shapes):
        weight = make_weight(fmt, n, k, rng)
        w = weight.values.astype(np.float64)
        bits = dtype.encode(rng.standard_normal((m, n)))
        out = session.output((splits, m, k), np.float32)
        a = args.TransposedArgs(
            grad=session.upload(bits),
            blocks=session.upload(weight.stored(packed)),
            partial=out.address,
            m=m,
            n=n,
            k=k,
            splits=splits,
            packed=packed,
            dtype=dtype.code,
        )
        session.launch(function, args.transposed_grid(a), a)
        partial = out.read().astype(np.float64)
        groups = args.ceil_div(n, args.GROUP_ROWS)
        for split in range(splits):
            begin, end = (groups * s // splits * args.GROUP_ROWS for s in (split, split + 1))
            grad = dtype.decode(bits)[:, begin:end]
            rows = w[begin:end]
            norms = np.linalg.norm(grad, axis=1)[:, None] * np.linalg.norm(rows, axis=0)
            bound = 4 * EPS32 * np.sqrt(n) * norms
            if dtype is not F32:  # the weights may be rounded to the dtype
                bound += np.abs(grad) @ (np.abs(rows) * dtype.eps / 2 + dtype.tiny / 2)
            where = f"{dtype.name} m={m} n={n} k={k} packed={packed} split {split} of {splits}"
            session.check_close(partial[split], grad @ rows, bound, where)
        session.release()


def _stage_segment(block_elems: int, lane: int, quarter: int) -> int:
    """Which of a unit's 16 segments a lane multiplies in a quarter of the unit's work."""
    if block_elems == 32:
        return quarter // 2 * 8 + lane * 2 + quarter % 2
    if block_elems == 64:
        return lane * 4 + quarter
    return lane // 2 * 8 + lane % 2 + quarter * 2


def _arranged(x: np.ndarray, columns: int, block_elems: int) -> np.ndarray:
    """Elements of two bytes (m, k) in the order of kernels/linear/hopper_many.h.

    Past the last column they are 0xFFFF.

    A row for each 8 elements of all columns, which lie side by side there.
    """
    m, k = x.shape
    units, blocks = args.ceil_div(k, args.STAGE_UNIT), args.ceil_div(m, columns)
    whole = np.zeros((m, units * args.STAGE_UNIT), np.uint16)
    whole[:, :k] = x
    # An instruction multiplies a step, four elements, of the segments that four lanes have in a
    # quarter of a unit; first the first and third of each four, then the others.
    segments = [[_stage_segment(block_elems, lane, q) for lane in range(4)] for q in range(4)]
    parts = whole.reshape(m, units, 16, 4, 2, 2)[:, :, segments]
    # From (column, unit, quarter, lane, step, pair, half).
    ordered = parts.transpose(1, 2, 4, 6, 0, 3, 5).reshape(units * 32, m, 8)
    arranged = np.full((blocks, units * 32, columns, 8), 0xFFFF, np.uint16)
    for block, part in enumerate(arranged):
        there = ordered[:, block * columns : (block + 1) * columns]
        part[:, : there.shape[1]] = there
    return arranged.reshape(blocks * units * 32, columns * 8)


def _arrange(session: Session, function: int, rng: np.random.Generator, size: int) -> None:
    for columns in args.HOPPER_MANY_X_ROWS:
        for block_elems in (32, 64, 128, 256):
            for m, k in (
                (1, 32),
                (7, 288),
                (columns - 1, 256),
                (columns, 1312 * size),
                (columns + 1, 224),
                (2 * columns + 17, 1280),
            ):
                x = rng.integers(0, 1 << 16, (m, k), dtype=np.uint16)
                wanted = _arranged(x, columns, block_elems)
                out = session.output(wanted.shape, np.uint16)
                a = args.ArrangeArgs(
                    x=session.upload(x),
                    out=out.address,
                    m=m,
                    k=k,
                    x_rows=columns,
                    block_elems=block_elems,
                )
                session.launch(function, args.arrange_grid(a), a)
                where = f"columns={columns} block_elems={block_elems} m={m} k={k}"
                session.check_bits(out.read(), wanted, where)
                session.release()


def _arrange_lanes(session: Session, function: int, rng: np.random.Generator, size: int) -> None:
    """In which order differs between architectures: the products are wrong where it is not theirs.

    Here every 8 elements of x must be somewhere, once, and zeros or nothing must be elsewhere.
    """
    for columns in args.PIPELINED_X_ROWS:
        for block_elems in (32, 64, 128, 256):
            for m, blocks in ((1, 1), (7, 9), (columns, 41 * size), (2 * columns + 17, 5)):
                k = blocks * block_elems
                x = rng.integers(1, 1 << 15, (m, k), dtype=np.uint16)
                shape = (args.arranged_lanes_bytes(m, k, columns, block_elems) // 16, 8)
                out = session.output(shape, np.uint16)
                a = args.ArrangeArgs(
                    x=session.upload(x), out=out.address, m=m, k=k, x_rows=columns,
                    block_elems=block_elems,
                )  # fmt: skip
                session.launch(function, args.arrange_lanes_grid(a), a)
                got = out.read()
                zeros = ~got.any(axis=1)
                unwritten = (got == 0xFFFF).all(axis=1)
                found, wanted = got[~zeros & ~unwritten], x.reshape(-1, 8)
                where = f"columns={columns} block_elems={block_elems} m={m} k={k}"
                if len(found) != len(wanted):
                    raise MismatchError(
                        f"{where}: {len(found)} of 8 elements each, wanted {len(wanted)}"
                    )
                order, wanted_order = (np.lexsort(each.T) for each in (found, wanted))
                session.check_bits(found[order], wanted[wanted_order], where)
                session.release()


def _sum_splits(session: Session, function: int, rng: np.random.Generator, size: int) -> None:
    for splits, m, rows, n, with_bias in (
        (1, 1, 7, 7, False),
        (2, 16, 16, 16, False),
        (3, 1000 * size, 1, 1, True),
        (17, 3, 80, 80, True),
        (5, 7, 32, 45, False),
        (4, 5, 48, 63, True),
    ):
        partial = rng.standard_normal((splits, m, rows)).astype(np.float32)
        for dtype in FLOATS:
            out = session.output((m, n), dtype.bits)
            bias = dtype.encode(rng.standard_normal(rows))
            a = args.SumArgs(
                partial=session.upload(partial),
                bias=session.upload(bias) if with_bias else None,
                out=out.address,
                count=m * rows,
                rows=rows,
                n=n,
                splits=splits,
                dtype=dtype.code,
            )
            session.launch(function, args.sum_grid(a), a)
            total = np.zeros((m, rows), np.float32)
            for one in partial:  # in this order, so the sum is the same to the last bit
                total = total + one
            if with_bias:
                total = total + dtype.decode(bias).astype(np.float32)
            where = f"{dtype.name} splits={splits} m={m} rows={rows} n={n} bias={with_bias}"
            bits = out.read()
            session.check_floats(dtype.decode(bits[:, :rows]), dtype.round(total), where)
            session.check_untouched(bits[:, rows:], f"{where}, rows after")
            session.release()
