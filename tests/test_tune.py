"""Tuning without a GPU: the choice, the file of plans, and the way from one to the other.

The GPU's place is taken by device numbers that no other test has used: plans are kept by number,
and nothing here asks a driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_q4
from torch_q4 import _timing, _tune, cli, formats

ops = torch.ops.torch_q4
DEVICES = itertools.count(1)  # 0 is left alone: it could be a real one
TABLE = {1: "rows", 8: "rows", 16: "blas"}
TIMES = {
    "rows": {1: 10.0, 8: 20.0, 16: 40.0},
    "reference": {1: 9.8, 8: 12.0, 16: 12.5},
    "blas": {1: 60.0, 8: 60.0, 16: 60.0},
}
PLAN = ((1, "rows"), (16, "reference"))
TEXT = "1 rows\n16 reference\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_Q4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_tune, "_warned", set())
    return tmp_path / "cache"


@pytest.fixture
def device(monkeypatch) -> int:
    """A GPU that is not there, of a name of its own."""
    number = next(DEVICES)
    fake_gpu(monkeypatch, number)
    return number


def fake_gpu(monkeypatch, number: int, name: str | None = None) -> None:
    monkeypatch.setattr(_tune, "_gpu", lambda _: torch.device("cuda", number))
    monkeypatch.setattr(_tune, "_identity", lambda _: (name or f"GPU {number}", "sm_00"))
    monkeypatch.setattr(_tune, "_choice_of_table", lambda *args: TABLE[args[4]])
    monkeypatch.setattr(
        _tune, "_kernels_of_device", lambda _, *weight: ops._linear_kernels(*weight).split()
    )
    monkeypatch.setattr(_tune, "_measure", lambda *args: {kernel: dict(TIMES[kernel])
                                                          for kernel in TIMES})  # fmt: skip


def tune(**changes: Any) -> torch_q4.TuneReport:
    return torch_q4.tune(64, 256, "q4_k", **{"rows": tuple(TABLE), **changes})


def plan_text(device: int, fmt: str = "q4_k", dtype: torch.dtype = torch.float16) -> str:
    return ops._linear_plan(device, formats.get(fmt).type_id, dtype, True, 64, 256)


def saved(**changes: Any) -> _tune._Saved:
    plan = _tune._Saved(
        "GPU", "sm_00", torch_q4.__version__, "q4_k", "float16", True, 64, 256, PLAN
    )
    return dataclasses.replace(plan, **changes)


# ---- the choice ----------------------------------------------------------------------------------


def test_the_table_stands_unless_another_is_clearly_faster() -> None:
    assert _tune._quickest({"a": 10.0, "b": 9.72}, "a") == "a"
    assert _tune._quickest({"a": 10.0, "b": 9.70}, "a") == "b"
    assert _tune._quickest({"a": 10.0, "b": 5.0, "c": 4.9}, "a") == "c", "3 % is for the table only"
    assert _tune._quickest({"a": 10.0, "b": 11.0}, "a") == "a"


def test_neighbours_are_merged() -> None:
    steps = [(1, "a"), (2, "a"), (4, "b"), (8, "a"), (16, "a")]
    assert _tune._merged(steps) == ((2, "a"), (4, "b"), (16, "a"))
    assert _tune._merged([(7, "a")]) == ((7, "a"),)


def test_weights_exceed_the_cache() -> None:
    assert _timing.cold_bytes(50 << 20, hip=False) == 200 << 20
    assert _timing.cold_bytes(4 << 20, hip=True) >= 2 * 256 << 20  # MI300X's Infinity Cache
    assert _timing.copies_to_fill(33 << 20, 200 << 20) == 7
    assert _timing.copies_to_fill(1 << 30, 200 << 20) == 2


def test_graph_holds_every_copy_equally_often_and_lasts() -> None:
    for copies, microseconds in ((7, 11.0), (37, 4.0), (2, 369.0), (2, 5000.0), (3, 0.0)):
        calls = _timing.calls_in_graph(copies, microseconds)
        assert calls % copies == 0
        assert calls >= copies
        if microseconds:
            assert calls * microseconds >= 0.95 * _timing.GRAPH_MICROSECONDS
            assert (
                calls == copies or (calls - copies) * microseconds < _timing.GRAPH_MICROSECONDS
            )  # fmt: skip


# ---- tuning --------------------------------------------------------------------------------------


def test_what_was_found_is_reported_and_followed(device) -> None:
    report = tune()
    assert report == torch_q4.TuneReport(
        f"GPU {device}", "sm_00", "q4_k", 64, 256, torch.float16, True, PLAN, TABLE, TIMES
    )
    assert plan_text(device) == TEXT
    assert plan_text(device, "q5_k") == plan_text(device, dtype=torch.bfloat16) == ""
    assert ops._linear_plan(device, 12, torch.float16, False, 64, 256) == ""


def test_report_is_a_table(device) -> None:
    assert str(tune(save=False)).splitlines() == [
        f"64x256 q4_k, float16, on GPU {device} (sm_00): microseconds",
        " M  rows  reference  blas  plan",
        " 1  10.0        9.8  60.0  rows",
        " 8  20.0       12.0  60.0  reference, 1.67x as fast as rows",
        "16  40.0       12.5  60.0  reference, 4.80x as fast as blas",
    ]


def test_candidates_are_the_kernels_that_suit(device, monkeypatch) -> None:
    asked: list[Any] = []

    def measure(gpu: Any, fmt: Any, n: int, k: int, *args: Any) -> dict[str, dict[int, float]]:
        asked.append((fmt.name, n, k, *args))
        return {kernel: {m: 1.0 for m in TABLE} for kernel in args[-1]}

    monkeypatch.setattr(_tune, "_measure", measure)
    tune(rows=(16, 1, 8, 1))
    tune(dtype=torch.float32)
    tune(packed=False, dtype=torch.bfloat16)
    kernels = [args[-1] for args in asked]
    assert {"rows", "tiles_16", "tiles_64", "blas"} <= set(kernels[0])
    for others in kernels[1:]:
        assert {"rows", "blas"} <= set(others)
        assert {"tiles_16", "tiles_64"}.isdisjoint(others)
    assert not any("reference" in names for names in kernels)
    assert asked[0][:-1] == ("q4_k", 64, 256, torch.float16, True, [1, 8, 16])
    assert asked[2][3:5] == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("args", "options", "kind", "words"),
    [
        ((64, 256, "q4_9"), {}, ValueError, "tune: format must be one of .*, got 'q4_9'"),
        ((64, 250, "q4_0"), {}, ValueError,
         "tune: columns of x must be a multiple of 32 for q4_0, got 250"),
        ((0, 256, "q4_0"), {}, ValueError, "tune: n and k must be at least 1, got 0, 256"),
        ((64, -32, "q4_0"), {}, ValueError, "tune: n and k must be at least 1, got 64, -32"),
        ((64, 256, "q4_0"), {"dtype": torch.float64}, TypeError,
         "tune: dtype must be float32, float16 or bfloat16, got torch.float64"),
        ((64, 256, "q4_0"), {"rows": (4, 0)}, ValueError,
         r"tune: rows must be numbers of at least 1, got \(4, 0\)"),
        ((64, 256, "q4_0"), {"rows": ()}, ValueError,
         r"tune: rows must be numbers of at least 1, got \(\)"),
    ],
)  # fmt: skip
def test_errors(args, options, kind, words) -> None:
    with pytest.raises(kind, match=words):
        torch_q4.tune(*args, **options)


def test_there_must_be_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^tune: torch must see a GPU, got none$"):
        torch_q4.tune(64, 256, "q4_0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^tune: device must be a GPU, got cpu$"):
        torch_q4.tune(64, 256, "q4_0", device="cpu")
    for device in (2, "cuda:2"):
        with pytest.raises(ValueError, match=r"^tune: device must be one of 2 GPUs, got cuda:2$"):
            torch_q4.tune(64, 256, "q4_0", device=device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for given, index in ((None, 1), ("cuda", 1), (0, 0), (torch.device("cuda:1"), 1)):
        assert _tune._gpu(given) == torch.device("cuda", index)


def test_model_is_tuned_once_for_each_kind_of_weight(monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(_tune, "tune", lambda *args, **options: asked.append((args, options)))

    def layer(k: int, n: int, **options: Any) -> torch_q4.QuantLinear:
        return torch_q4.QuantLinear(k, n, "q4_0", device="meta", **options)

    model = torch.nn.Sequential(
        layer(64, 32), layer(32, 64), layer(64, 32, bias=False), layer(64, 96, compute="int8")
    )
    model[0].packed = model[1].packed = model[2].packed = True
    assert len(torch_q4.tune_model(model, rows=(1, 2), save=False)) == 2
    options = {"dtype": torch.float16, "rows": (1, 2), "packed": True, "save": False,
               "device": torch.device("meta")}  # fmt: skip
    assert asked == [((32, 64, "q4_0"), options), ((64, 32, "q4_0"), options)]


# ---- measuring, with a CPU in the GPU's place ----------------------------------------------------


class Rehearsal:
    """Runs everything on the CPU; each kernel's calls take their time, the first one longer."""

    cold_bytes = 100_000

    def __init__(self, microseconds: dict[str, float]) -> None:
        self.microseconds = microseconds
        self.calls: list[tuple[str, int, int]] = []  # kernel, rows and the weight's address
        self.rounds = 0

    def product(self, x: Any, blocks: Any, fmt: Any, packed: bool, kernel: str) -> Any:
        self.calls.append((kernel, len(x), blocks.data_ptr()))
        return torch_q4.linear(x, blocks, fmt, packed=packed)

    def capture(self, call: Callable[[int], Any], count: int) -> Callable[[], None]:
        def replay() -> None:
            for index in range(count):
                call(index)

        return replay

    def times(self, runs: list[Callable[[], Any]]) -> list[float]:
        found = []
        self.rounds += 1
        for run in runs:
            before = len(self.calls)
            run()
            new = self.calls[before:]
            noise = 1000.0 if len(runs) > 1 and self.rounds % 9 == 0 else 0.0
            loading = (
                10_000.0 if new[0][:2] not in {one[:2] for one in self.calls[:before]} else 0.0
            )
            found.append(sum(self.microseconds[name] for name, _, _ in new) + noise + loading)
        return found


@pytest.mark.parametrize("packed", [True, False])
def test_measuring(monkeypatch, packed) -> None:
    gpu = Rehearsal({"rows": 200.0, "blas": 300.0})

    @contextlib.contextmanager
    def on_own_stream(device: torch.device) -> Iterator[Rehearsal]:
        yield gpu

    monkeypatch.setattr(_tune, "_on_own_stream", on_own_stream)
    monkeypatch.setattr(_tune, "_product", gpu.product)
    n, k, fmt = 70, 256, formats.get("q4_k")
    times = _tune._measure(
        torch.device("cpu"), fmt, n, k, torch.float32, packed, [1, 3], ["rows", "blas"]
    )
    # The median does not show the one round that was disturbed.
    assert times == {"rows": {1: 200.0, 3: 200.0}, "blas": {1: 300.0, 3: 300.0}}
    assert {rows for _, rows, _ in gpu.calls} == {1, 3}
    copies = {address for _, _, address in gpu.calls}
    assert len(copies) == 10  # of 144 * 70 bytes each
    for kernel in times:
        used = [address for name, _, address in gpu.calls if name == kernel]
        assert set(used) == copies


def test_weights_are_copies_of_one_weight() -> None:
    fmt = formats.get("q6_k")
    one, two = _tune._weights(fmt, 70, 256, True, torch.device("cpu"), 15_000)
    assert torch.equal(one, two)
    assert one.shape == (70, 210)
    assert len(torch_q4.unpack(one, fmt).unique(dim=0)) > 30
    assert torch_q4.dequantize(torch_q4.unpack(one, fmt), fmt).std() == pytest.approx(1, abs=0.1)
    (canonical,) = _tune._weights(fmt, 70, 256, False, torch.device("cpu"), 10_000)
    assert torch.equal(torch_q4.pack(canonical, fmt), one)
    assert len(_tune._weights(fmt, 1, 256, True, torch.device("cpu"), 200 << 20)) == 512


# ---- the file ------------------------------------------------------------------------------------


def test_plans_are_saved_with_what_they_hold_for(device, folder) -> None:
    tune()
    assert json.loads((folder / "tune.json").read_text()) == {
        "torch_q4_plans": 1,
        "plans": [
            {
                "device": f"GPU {device}",
                "architecture": "sm_00",
                "torch_q4": torch_q4.__version__,
                "format": "q4_k",
                "dtype": "float16",
                "packed": True,
                "n": 64,
                "k": 256,
                "plan": [[1, "rows"], [16, "reference"]],
            }
        ],
    }


def test_nothing_is_saved_unasked(device, folder) -> None:
    tune(save=False)
    assert plan_text(device) == TEXT
    assert not folder.exists()


def test_saved_plans_come_back_at_a_devices_first_product(monkeypatch, folder) -> None:
    """In C++ this is one question for all uses of plans, a product's and this one's."""
    path = folder / "tune.json"
    for plan in (
        saved(),
        saved(dtype="bfloat16", plan=((3, "reference"),)),
        saved(format="q5_k", torch_q4="0.0.1"),
        saved(format="q6_k", device="another"),
        saved(format="q8_0", architecture="sm_01"),
    ):
        _tune._write(path, plan)
    number = next(DEVICES)
    fake_gpu(monkeypatch, number, "GPU")
    assert plan_text(number) == TEXT
    assert plan_text(number, dtype=torch.bfloat16) == "3 reference\n"
    for fmt in ("q5_k", "q6_k", "q8_0"):
        assert plan_text(number, fmt) == "", "of another version, device or architecture"
    path.unlink()
    assert plan_text(number) == TEXT, "asked once"


def test_a_plan_replaces_its_predecessor_and_no_other(folder) -> None:
    path = folder / "tune.json"
    _tune._write(path, saved())
    _tune._write(path, saved(n=128))
    _tune._write(path, saved(plan=((4, "blas"),)))
    assert _tune._read(path) == [saved(plan=((4, "blas"),)), saved(n=128)]


def test_several_processes_save_at_once(folder) -> None:
    code = """
import sys
from pathlib import Path
from torch_q4 import _tune
for k in range(1, 21):
    _tune._write(Path(sys.argv[1]), _tune._Saved(
        "GPU", "sm_00", "0", "q4_0", "float16", True, int(sys.argv[2]), k, ((1, "blas"),)))
"""
    path = folder / "tune.json"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)
    ]
    assert [process.wait() for process in processes] == [0] * 3
    assert {(plan.n, plan.k) for plan in _tune._read(path)} == {
        (n, k) for n in range(3) for k in range(1, 21)
    }
    assert sorted(file.name for file in folder.iterdir()) == ["tune.json", "tune.json.lock"]


GOOD = dataclasses.asdict(saved())
DAMAGED = {
    "cut off": '{"torch_q4_plans": 1, "pla',
    "empty": "",
    "no dictionary": "[]",
    "another program's": '{"plans": []}',
    "a later version's": '{"torch_q4_plans": 2, "plans": []}',
    "no text": b"\xff\xfe\x00",
    "deeply nested": "[" * 100_000,
    "no list": {"plans": 5},
    "no plans": {},
    "a plan of a wrong kind": {"plans": [5]},
    "a plan without a field": {"plans": [{k: v for k, v in GOOD.items() if k != "n"}]},
    "a field of a wrong kind": {"plans": [{**GOOD, "n": "64"}]},
    "a boolean for a number": {"plans": [{**GOOD, "n": True}]},
    "an unknown field": {"plans": [{**GOOD, "more": 1}]},
    "steps of a wrong kind": {"plans": [{**GOOD, "plan": [[1.5, "blas"]]}]},
    "an unknown kernel": {"plans": [{**GOOD, "plan": [[1, "fast"]]}]},
    "an unsuited kernel": {"plans": [{**GOOD, "packed": False, "plan": [[1, "tiles_16"]]}]},
    "an unknown format": {"plans": [{**GOOD, "format": "q9"}]},
    "an unknown dtype": {"plans": [{**GOOD, "dtype": "float24"}]},
    "another dtype": {"plans": [{**GOOD, "dtype": "float64"}]},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_warned_of(monkeypatch, folder, content) -> None:
    folder.mkdir()
    path = folder / "tune.json"
    if isinstance(content, dict):
        content = json.dumps({"torch_q4_plans": 1, **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fake_gpu(monkeypatch, number := next(DEVICES), "GPU")
    with pytest.warns(UserWarning, match="could not be used") as caught:
        text = plan_text(number)
    assert text == ""
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


def test_a_plan_that_cannot_be_followed_keeps_no_other_back(monkeypatch, folder) -> None:
    """Such as one for a kernel that this build is without."""
    path = folder / "tune.json"
    _tune._write(path, saved(format="q5_k", plan=((1, "fast"),)))
    _tune._write(path, saved())
    fake_gpu(monkeypatch, number := next(DEVICES), "GPU")
    with pytest.warns(UserWarning, match="could not be used as a whole.*for the rest.*got fast"):
        text = plan_text(number)
    assert (text, plan_text(number, "q5_k")) == (TEXT, "")


def test_one_warning_is_enough(monkeypatch, folder) -> None:
    folder.mkdir()
    (folder / "tune.json").write_text("damaged")
    with pytest.warns(UserWarning, match="could not be used") as caught:
        texts = [plan_text(next(DEVICES)) for _ in range(3)]
    assert texts == [""] * 3
    assert len(caught) == 1


def test_an_unreadable_file_is_warned_of(monkeypatch, folder) -> None:
    (folder / "tune.json").mkdir(parents=True)
    fake_gpu(monkeypatch, number := next(DEVICES))
    with pytest.warns(UserWarning, match=r"tune\.json could not be used.*IsADirectoryError"):
        assert plan_text(number) == ""


def test_a_warning_that_is_an_error_does_not_break_a_product(folder) -> None:
    folder.mkdir()
    (folder / "tune.json").write_text("damaged")
    code = (
        "import torch, torch_q4\n"
        "print(repr(torch.ops.torch_q4._linear_plan(0, 12, torch.float16, True, 64, 256)))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "''\n"), result.stderr


@pytest.mark.parametrize("content", ["damaged", '{"settings": []}'])
def test_somebody_elses_file_is_left_alone(device, folder, content) -> None:
    folder.mkdir()
    path = folder / "tune.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"tune\.json") as caught:
        tune()
    assert plan_text(device) == TEXT, "the plan holds in this process all the same"
    assert path.read_text() == content
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2  # of loading and of saving
    assert all(str(path) in message for message in told)
    assert caught[1].filename == __file__


@pytest.mark.parametrize("name", ["tune.json", "tune.json.lock"])
def test_a_fifo_is_neither_waited_for_nor_replaced(device, folder, name) -> None:
    folder.mkdir()
    os.mkfifo(folder / name)
    with pytest.warns(UserWarning, match=r"tune\.json.*(FIFO|No such device or address)"):
        tune()
    assert plan_text(device) == TEXT
    assert stat.S_ISFIFO(os.lstat(folder / name).st_mode)


def test_locking_empties_nothing(folder) -> None:
    folder.mkdir()
    (folder / "precious").write_text("contents")
    (folder / "tune.json.lock").symlink_to("precious")
    _tune._write(folder / "tune.json", saved())
    assert (folder / "precious").read_text() == "contents"


def test_what_a_file_says_is_shown_and_not_obeyed(monkeypatch, folder) -> None:
    folder.mkdir()
    content = json.dumps({"torch_q4_plans": 1, "plans": [{**GOOD, "\x1b[31m": 1}]})
    (folder / "tune.json").write_text(content)
    fake_gpu(monkeypatch, number := next(DEVICES), "GPU")
    with pytest.warns(UserWarning, match="could not be used") as caught:
        plan_text(number)
    assert str(caught[0].message).isprintable()


def test_a_folder_that_cannot_be_made(device, folder) -> None:
    folder.write_text("a file")
    with pytest.warns(UserWarning, match=f"could not be saved in {folder}/tune.json") as caught:
        tune()
    assert plan_text(device) == TEXT
    assert len(caught) == 1, "a file that is not there is no damaged one"


def test_where_the_file_is(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("TORCH_Q4_CACHE", "/mine")
    assert _tune._cache_file() == Path("/mine/tune.json")
    monkeypatch.setenv("TORCH_Q4_CACHE", "")
    assert _tune._cache_file() == Path("/caches/torch_q4/tune.json")
    for relative in ("", "caches"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert _tune._cache_file() == Path("/home/somebody/.cache/torch_q4/tune.json")


# ---- the command line ----------------------------------------------------------------------------


TIMES_OF = {"rows": 10.0, "blas": 60.0}


def test_command(monkeypatch, capsys, folder, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_tune, "_choice_of_table", lambda *_: "blas")
    monkeypatch.setattr(
        _tune,
        "_measure",
        lambda *args: {kernel: dict.fromkeys(args[6], time) for kernel, time in TIMES_OF.items()},
    )
    command = ["tune", "--shape", "64x256", "32x512", "--format", "q4_k", "--dtype", "bfloat16"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "64x256 q4_k, bfloat16, on GPU" in out
    assert "32x512 q4_k, bfloat16, on GPU" in out
    assert plan_text(device, dtype=torch.bfloat16) == "512 rows\n"
    assert [(plan.n, plan.k) for plan in _tune._read(folder / "tune.json")] == [
        (64, 256), (32, 512)]  # fmt: skip
    assert cli.main([*command, "--json", "--no-save"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [(report["n"], report["dtype"]) for report in reports] == [
        (64, "bfloat16"), (32, "bfloat16")]  # fmt: skip
    assert reports[0]["plan"] == [[512, "rows"]]
    assert reports[0]["microseconds"]["blas"]["48"] == 60.0


def test_command_saves_nothing_unasked(monkeypatch, capsys, folder, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_tune, "_choice_of_table", lambda *_: "blas")
    monkeypatch.setattr(_tune, "_measure", lambda *args: {"blas": dict.fromkeys(args[6], 1.0)})
    assert cli.main(["tune", "--shape", "64x256", "--format", "q4_k", "--no-save"]) == 0
    assert "blas" in capsys.readouterr().out
    assert not folder.exists()


def test_command_without_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--shape", "64x256", "--format", "q4_k"]) == 1
    assert capsys.readouterr().err == "torch-q4: tune: torch must see a GPU, got none\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "64", "--format", "q4_k"], "must be NxK, got '64'"),
        (["--shape", "64x256", "--format", "q9"], "format must be one of"),
    ],
)
def test_wrong_usage(capsys, arguments, words) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", *arguments])
    assert words in capsys.readouterr().err
