"""The benchmark's own machinery, on cases small enough to run in no time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmkernels.bench import command, graphs, machine, measure, peaks, plots, results, supervisor, table, worker
from mmkernels.bench.contest import Contest
from mmkernels.bench.measure import Timing, interleave
from mmkernels.bench.overheads import OverheadResult, measure_overhead
from mmkernels.bench.results import CaseResult, Results
from mmkernels.bench.selection import select
from mmkernels.cards import all_cards
from mmkernels.cards.card import BenchCase, Call, Card, Cost, Overhead, Target

_PEAKS = peaks.Peaks({"float32": 100.0}, ((1000, 80.0), (4000, 90.0), (16000, 20.0)))


def _call(device, dtype, generator) -> Call:
    x, y = (torch.randn(4, 8, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    return Call((x, y), {"scale": 2.0})


def _product(x, y, scale):
    return x * y * scale, None, x.argmax()


def _case(**changes) -> BenchCase:
    case = BenchCase(
        "product.4x8",
        _call,
        _product,
        {"eager": _product, "addcmul": lambda x, y, scale: torch.addcmul(torch.zeros_like(x), x, y, value=scale)},
        lambda call: Cost(flops=64.0, bytes=384.0),
        target=Target(("eager",), 1.5, at_most=True),
    )
    return replace(case, **changes)


def _card(*cases: BenchCase, overheads: tuple[Overhead, ...] = ()) -> Card:
    return replace(all_cards()[0], name="product", family="products", bench=cases, overheads=overheads)


def _timing(ms: float) -> Timing:
    return Timing(ms, ms * 0.9, ms * 1.1, 15)


def _result(**changes) -> CaseResult:
    result = CaseResult(
        family="products",
        name="product.4x8",
        dtype="float32",
        backward=False,
        kernel="cpu/avx2",
        timings={"mmkernels": _timing(1.0), "eager": _timing(2.0), "compile": _timing(1.25)},
        failed={},
        flops=64.0,
        bytes=384.0,
        floor_ms=0.5,
        preemptions=0.0,
        target=None,
    )
    return replace(result, **changes)


def _results(*cases: CaseResult, **changes) -> Results:
    overheads = (OverheadResult("products", "product call", _timing(0.004), _timing(0.001), 5.0),)
    made = Results("cpu", "tuned", 1.0, machine.this_machine("cpu"), _PEAKS, cases or (_result(),), overheads)
    return replace(made, **changes)


# --- timing -----------------------------------------------------------------------------------------------------------
def test_order_is_shuffled_anew_each_round_and_everyone_is_measured_equally_often():
    ran: list[str] = []
    steps = {name: lambda name=name: ran.append(name) for name in "abcd"}
    times = interleave(steps, 1e-9, calls=1, min_rounds=40, seed=3)
    rounds = [tuple(ran[-160:][i : i + 4]) for i in range(0, 160, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 10
    assert max(Counter(order[0] for order in rounds).values()) < 25
    assert {timing.rounds for timing in times.values()} == {40}
    again: list[str] = []
    interleave({name: lambda name=name: again.append(name) for name in "abcd"}, 1e-9, calls=1, min_rounds=40, seed=3)
    assert again == ran


def test_all_steps_get_the_calls_that_the_shortest_needs():
    calls = Counter()
    milliseconds = {"short": 0.001, "long": 1.0}

    def clock(step, count):
        calls[step(), count] += 1
        return milliseconds[step()]

    interleave({"short": lambda: "short", "long": lambda: "long"}, 1e-9, clock=clock)
    assert calls["short", 50] == calls["long", 50] == 15


def test_long_rounds_are_fewer_but_never_less_than_five():
    times = interleave({"a": lambda: None, "b": lambda: None}, 1e-9, clock=lambda step, count: 300.0)
    assert {timing.rounds for timing in times.values()} == {5}


def test_timing_is_median_and_quartiles():
    timing = measure.timing_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_ms, timing.q1_ms, timing.q3_ms, timing.iqr_ms, timing.rounds) == (3.0, 2.0, 4.0, 2.0, 5)


# --- contests ---------------------------------------------------------------------------------------------------------
def test_backward_runs_and_leaves_no_gradient():
    leaves, gradients = [], []

    def ours(x, y, scale):
        leaves[:] = [x, y]
        output = x * y * scale
        output.register_hook(gradients.append)
        return output, None, x.argmax()

    contest = Contest(_case(run=ours, backward=True), "cpu", torch.float32)
    assert set(contest.steps) == {"mmkernels", "eager", "addcmul"} and len(gradients) == 1
    with contest.grad_mode():
        for step in contest.steps.values():
            step()
            step()
    assert len(gradients) == 3 and all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert all(leaf.is_leaf and leaf.requires_grad and leaf.grad is None for leaf in leaves)


def test_forward_cases_record_no_graph():
    needs = []
    contest = Contest(_case(run=lambda x, y, scale: needs.append((x * y).requires_grad)), "cpu", torch.float32)
    with contest.grad_mode():
        assert not torch.is_grad_enabled()
        contest.steps["mmkernels"]()
    assert needs == [False, False]


def test_case_with_backward_keeps_the_strides_of_its_inputs():
    strides = set()

    def make(device, dtype, generator):
        return Call(
            (torch.randn(8, 4, generator=generator).t(), torch.randn(1, 8, generator=generator).expand(4, 8)), {"scale": 1.0}
        )

    def ours(x, y, scale):
        strides.add((x.stride(), y.stride()))
        return x * y

    Contest(_case(make=make, run=ours, backward=True), "cpu", torch.float32)
    assert strides == {((1, 4), (0, 1))}


def test_a_failing_peer_is_named_and_a_failing_op_raises():
    def broken(x, y, scale):
        raise RuntimeError("no such kernel\nand a second line")

    contest = Contest(_case(peers={"eager": _product, "broken": broken}), "cpu", torch.float32)
    assert contest.failed == {"broken": "RuntimeError: no such kernel"}
    assert set(contest.steps) == {"mmkernels", "eager"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        Contest(_case(run=broken), "cpu", torch.float32)


def test_compiled_peers_are_contestants(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append((function, dynamic)) or function)
    one = Contest(_case(compiled_peers=("eager",)), "cpu", torch.float32)
    assert list(one.steps) == ["mmkernels", "eager", "addcmul", "compile"]
    assert compiled == [(_product, False)]
    two = Contest(_case(compiled_peers=("eager", "addcmul")), "cpu", torch.float32)
    assert list(two.steps)[-2:] == ["compile:eager", "compile:addcmul"]


def test_a_gpu_starts_every_case_anew_and_reads_longer(monkeypatch):
    """Peers there may compile themselves, and past its limit of recompilations torch.compile would run them eagerly."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    Contest(_case(), "cpu", torch.float32)
    assert not resets
    Contest(_case(make=lambda device, dtype, g: _call(torch.device("cpu"), dtype, g)), "cuda", torch.float32)
    assert resets
    calls = Counter()

    def clock(step, count):
        calls[count] += 1
        return 0.1

    monkeypatch.setattr(measure, "cuda_clock", clock)
    interleave({"a": lambda: None}, 1e-9, clock=clock)
    assert calls == {1: 1, 10: 15}


class FakeGraph:
    """What a CUDA graph is to those who only record and replay it."""

    recording = None

    def __init__(self):
        self.steps = []

    def replay(self):
        for step in self.steps:
            step()


@contextmanager
def _recorded(graph):
    FakeGraph.recording = graph
    yield
    FakeGraph.recording = None


def test_short_calls_are_replayed_unless_they_wait(monkeypatch):
    mode = ["default"]
    fake = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        stream=lambda stream: nullcontext(),
        set_sync_debug_mode=lambda name: mode.__setitem__(0, name),
        CUDAGraph=FakeGraph,
        graph=_recorded,
    )
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    monkeypatch.setattr(graphs, "cuda_clock", lambda step, calls: step() or 20.0)
    ran = Counter()

    def step(name):
        if FakeGraph.recording is not None:
            FakeGraph.recording.steps.append(lambda: ran.update([name]))

    def waiting():
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    steps = {"mmkernels": lambda: step("mmkernels"), "eager": lambda: step("eager"), "waits": waiting}
    times = graphs.replayed(steps, 1e-9)
    assert set(times) == {"mmkernels", "eager"} and mode == ["default"]
    assert times["mmkernels"].median_ms == 2.0 and ran["mmkernels"] == ran["eager"] == 10 * (2 + 1 + 15)
    assert graphs.replayed({**steps, "mmkernels": waiting}, 1e-9) == {}
    assert graphs.is_short({"a": _timing(0.2), "b": _timing(9.0)}) and not graphs.is_short({"a": _timing(0.4)})


# --- floors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "gbps"),
    [(10, 90.0), (1000, 90.0), (2000, 90.0), (4000, 90.0), (5000, 90.0), (16000, 20.0), (10**9, 20.0)],
)
def test_bandwidth_is_the_fastest_from_the_smaller_neighbour_up(size, gbps):
    assert _PEAKS.bandwidth_gbps(size) == gbps


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    assert _PEAKS.floor_ms(1e9, 16000, "float32") == pytest.approx(10.0)
    assert _PEAKS.floor_ms(10, 2e9, "float64") == pytest.approx(100.0)
    assert replace(_PEAKS, gflops={"float32": 100.0, "bfloat16": 400.0}).floor_ms(1e9, 0, "float16") == pytest.approx(2.5)


def test_peaks_are_measured_once_and_a_broken_cache_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(peaks, "measure_cpu", lambda: measured.append(1) or _PEAKS)
    assert peaks.peaks("cpu") == peaks.peaks("cpu") == _PEAKS
    assert len(measured) == 1 and peaks.cache_file() == tmp_path / "mmkernels" / "peaks.json"
    assert [path.name for path in peaks.cache_file().parent.iterdir()] == ["peaks.json"]
    peaks.cache_file().write_text("{")
    assert peaks.peaks("cpu") == _PEAKS and len(measured) == 2


def test_peaks_of_a_gpu_are_of_random_numbers_drawn_there(monkeypatch):
    """As far as that can be without one."""
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: drawn.append(device) or randn(*size))
    monkeypatch.setattr(peaks, "cuda_clock", measure.wall_clock)
    measured = peaks.measure_cuda(traffic=(1 << 20, 1 << 22), matrix=64)
    assert set(drawn) == {"cuda"} and len(drawn) == 8
    assert set(measured.gflops) == {"float32", "bfloat16"} and [size for size, _ in measured.copy_gbps] == [1 << 20, 1 << 22]
    assert all(0.1 < gbps < 1e4 for _, gbps in measured.copy_gbps)


def test_peaks_are_plausible():
    measured = peaks.measure_cpu(traffic=(1 << 22,))
    assert 0.5 < measured.gflops["float32"] < 1e5
    assert 0.5 < measured.bandwidth_gbps(1 << 22) < 1e5


# --- targets ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (Target(("eager",), 2.0), 2.0, True),
        (Target(("eager",), 2.1), 2.0, False),
        (Target(("eager", "compile"), 1.5), 1.25, False),
        (Target(("eager",), 0.5, at_most=True), 0.5, True),
        (Target(("eager", "compile"), 0.7, at_most=True), 0.8, False),
    ],
)
def test_target_both_ways(target, ratio, met):
    verdict = _result(target=target).verdict
    assert verdict is not None and verdict.ratio == pytest.approx(ratio) and verdict.met is met


def test_target_is_not_judged_without_a_peer_that_it_names_and_must_name_contestants():
    failed = _result(target=Target(("eager", "broken"), 1.0), failed={"broken": "RuntimeError: no"})
    assert failed.verdict is None
    with pytest.raises(ValueError, match="'absent'"):
        _ = _result(target=Target(("absent",), 1.0)).verdict
    several = {"mmkernels": _timing(1.0), "compile:a": _timing(3.0), "compile:b": _timing(2.0)}
    verdict = _result(timings=several, target=Target(("compile",), 1.0)).verdict
    assert verdict is not None and verdict.ratio == pytest.approx(2.0)


def test_optional_peers_may_fail_as_long_as_one_runs():
    target = Target(("eager", "broken"), 1.0, optional=True)
    verdict = _result(target=target, failed={"broken": "RuntimeError: no"}).verdict
    assert verdict is not None and verdict.ratio == pytest.approx(2.0)
    alone = _result(timings={"mmkernels": _timing(1.0)}, target=target, failed={"eager": "a", "broken": "b"})
    assert alone.verdict is None


@pytest.mark.parametrize(
    ("of", "limit", "measured", "met"),
    [
        ("TFLOP/s", 300.0, 320.0, True),
        ("TFLOP/s", 330.0, 320.0, False),
        ("floor", 0.5, 0.5, True),
        ("floor", 0.51, 0.5, False),
    ],
)
def test_target_of_a_rate(of, limit, measured, met):
    verdict = _result(flops=3.2e11, target=Target((), limit, of=of)).verdict
    assert verdict is not None and verdict.ratio == pytest.approx(measured) and verdict.met is met


def test_launch_bound_cases_are_judged_by_their_replays():
    target = Target(("eager", "waits"), 1.0)
    timings = {"mmkernels": _timing(0.1), "eager": _timing(0.06), "waits": _timing(0.5)}
    bound = _result(timings=timings, graphs={"mmkernels": _timing(0.01), "eager": _timing(0.05)}, target=target)
    assert bound.launch_bound and bound.verdict.ratio == pytest.approx(5.0) and bound.ratio == pytest.approx(5.0)
    assert bound.judged["waits"] == _timing(0.5) and bound.over_floor == pytest.approx(0.02)
    of_peer = replace(bound, graphs={"mmkernels": _timing(0.09), "eager": _timing(0.02)})
    assert of_peer.launch_bound and of_peer.verdict.ratio == pytest.approx(0.02 / 0.09)
    free = replace(bound, graphs={"mmkernels": _timing(0.08), "eager": _timing(0.05)})
    assert not free.launch_bound and free.verdict.ratio == pytest.approx(0.6)
    assert not _result().launch_bound


def test_rates_are_the_least_work_over_the_time():
    rates = _result(flops=2e12, bytes=3e9).rates(_timing(2.0))
    assert (rates.tflops, rates.gbps, rates.of_ceiling) == (pytest.approx(1000), pytest.approx(1500), 0.25)


def test_ratio_is_to_the_best_peer():
    assert (_result().best_peer, _result().ratio, _result().over_floor) == ("compile", 1.25, 2.0)
    alone = _result(timings={"mmkernels": _timing(1.0)})
    assert alone.best_peer is None and alone.ratio is None


# --- results ----------------------------------------------------------------------------------------------------------
def test_json_roundtrip(tmp_path):
    case = _result(target=Target(("eager",), 1.5), stock={"mmkernels": _timing(3.0)}, failed={"x": "RuntimeError: y"})
    on_gpu = _result(
        dtype="bfloat16", graphs={"mmkernels": _timing(0.1)}, target=Target((), 9.0, of="TFLOP/s", optional=True)
    )
    made = _results(case, on_gpu, broken={"product.5x5 float32": "RuntimeError: z"})
    results.write(made, tmp_path / "run.json")
    assert results.read(tmp_path / "run.json") == made
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["schema"] == 1 and record["cases"][0]["summary"]["target_met"] is True
    assert set(record["cases"][0]["summary"]["rates"]) == set(case.timings)
    for entry in record["cases"]:  # as a file of before
        del entry["graphs"]
        for name in ("of", "optional"):
            del entry["target"][name]
    del record["broken"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert results.read(tmp_path / "old.json").cases[0] == case


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        results.read(path)


def test_comparison_says_what_changed_and_what_makes_it_void():
    now = _results(_result(), _result(dtype="bfloat16"))
    slower = _result(timings={"mmkernels": _timing(2.0), "eager": _timing(2.0)})
    before = _results(slower, machine=replace(now.machine, isa="generic", cpu="Other"), allocator="stock", overheads=())
    comparison = results.compare(before, now)
    (change,) = comparison.changes
    assert (change.relative, change.before_ratio, change.now_ratio) == (-0.5, 1.0, 1.25)
    assert comparison.missing == ("product.4x8 bfloat16", "product call")
    assert [text.split(":")[0] for text in comparison.differences] == ["processor", "tier", "allocator"]
    assert results.compare(now, now).differences == ()


def test_tables_show_all_contestants_and_verdicts(capsys):
    case = _result(target=Target(("eager",), 3.0), stock={"mmkernels": _timing(7.0)}, failed={"broken": "TypeError: [x]"})
    made = _results(case, allocator="both")
    table.show(made, results.compare(made, made), table.make_console())
    shown = capsys.readouterr().out
    for text in ("2.00≥3 MISSED", "compile 1.25", "7.00", "TypeError: [x]", "+0.0%", made.machine.cpu, "product call"):
        assert text in shown
    assert "Other programs" not in shown


def test_tables_of_a_gpu_show_rates_replays_and_what_broke(capsys):
    short = _result(
        flops=5e9,
        bytes=4e6,
        graphs={"mmkernels": _timing(0.25), "eager": _timing(1.5)},
        target=Target((), 10.0, of="TFLOP/s"),
    )
    memory = _result(name="copy.1", flops=0.0, bytes=3e9, target=Target((), 0.6, of="floor"))
    made = _results(short, memory, device="cuda", broken={"product.5x5 float32": "RuntimeError: no shared memory"})
    table.show(made, None, table.make_console())
    shown = capsys.readouterr().out
    for text in ("0.250 ± 0.050 g", "20.00≥10 TFLOP/s met", "0.50≥0.6 of floor MISSED", "Short calls of products", "1.50"):
        assert text in shown, text
    for text in ("Rates of products", "3.33 2.67 33%", "3000 50%", "BROKEN: product.5x5 float32: RuntimeError: no shared"):
        assert text in shown, text
    assert re.search(r"faster +TFLOP/s +GB/s", shown) and re.search(r"20\.0 +16\.0", shown)
    table.show(_results(), None, table.make_console())
    assert "TFLOP/s" not in capsys.readouterr().out


def test_disturbed_cases_are_said_to_be(capsys):
    table.show(_results(_result(preemptions=99.0, target=Target(("eager",), 1.5)), _result()), None, table.make_console())
    shown = capsys.readouterr().out
    assert "2.00≥1.5 met?" in shown and "1 of 2 cases" in shown
    stock = _result(stock={"mmkernels": _timing(7.0)}, stock_preemptions=99.0)
    table.show(_results(stock, allocator="both"), None, table.make_console())
    shown = capsys.readouterr().out
    assert "7.00?" in shown and "1 of 1 cases" in shown


def test_plots_are_pictures(tmp_path):
    (path,) = plots.write_plots(_results(_result(), _result(dtype="bfloat16", floor_ms=0.01)), tmp_path / "new")
    assert path.name == "products_cpu.png" and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# --- worker -----------------------------------------------------------------------------------------------------------
def test_worker_streams_cases_and_overheads(monkeypatch):
    monkeypatch.setattr(worker, "peaks", lambda device: _PEAKS)
    overhead = Overhead("product call", lambda: Call((torch.ones(3), torch.ones(3), 1.0)), _product, grad=True, limit_us=1e6)
    card = _card(_case(), _case(name="product.backward", backward=True), overheads=(overhead,))
    request = worker.Request(seconds=1e-3, dtypes=("float32",))
    stream = json.loads(json.dumps(list(worker.events(request, [card]))))
    kinds = [event["event"] for event in stream]
    assert kinds == ["machine", "start", "peaks", *["start", "case"] * 2, "start", "overhead", "done"]
    plain, backward = (results.case_from(event["result"]) for event in stream if event["event"] == "case")
    assert set(plain.timings) == {"mmkernels", "eager", "addcmul"} and plain.ours.rounds >= 15
    assert plain.floor_ms == pytest.approx(384 / 90e6) and plain.verdict is not None and backward.backward
    assert results.overhead_from(stream[-2]["result"]).holds


def test_a_case_that_breaks_leaves_the_others_and_is_an_error_at_the_end(monkeypatch, tmp_path):
    def broken(x, y, scale):
        raise RuntimeError("out of shared memory\nand more")

    monkeypatch.setattr(worker, "peaks", lambda device: _PEAKS)
    request = worker.Request(seconds=1e-3, dtypes=("float32",))
    stream = list(worker.events(request, [_card(_case(name="first", run=broken), _case(name="second"))]))
    kinds = [event["event"] for event in stream]
    assert kinds == ["machine", "start", "peaks", "start", "broken", "start", "case", "done"]

    def replayed(request, allocator, on_event):
        for event in stream:
            on_event(event)

    monkeypatch.setattr(supervisor, "run_worker", replayed)
    error = {"first float32": "RuntimeError: out of shared memory"}
    for allocator in ("tuned", "both"):
        made = supervisor.measure(request, allocator, lambda what: None)
        assert made.broken == error and [case.name for case in made.cases] == ["second"]
    with pytest.raises(ChildProcessError, match="first float32: RuntimeError: out of shared memory"):
        command.run(family="token_roll", allocator="tuned", json_path=tmp_path / "run.json")
    assert results.read(tmp_path / "run.json").broken == error


def test_cases_beyond_the_limit_are_named(monkeypatch):
    monkeypatch.setattr(worker, "peaks", lambda device: _PEAKS)
    request = worker.Request(seconds=1e-3, dtypes=("float32",), limit_s=0.0)
    stream = list(worker.events(request, [_card(_case(name="late"))]))
    assert [event["event"] for event in stream] == ["machine", "start", "peaks", "broken", "done"]
    assert stream[-2]["case"] == "late float32" and "limit of 0 s" in stream[-2]["error"]


def test_overhead_is_missed_above_its_limit():
    overhead = Overhead(
        "product call", lambda: Call((torch.ones(3), torch.ones(3), 1.0)), _product, grad=False, limit_us=1e-6
    )
    result = measure_overhead(_card(), overhead, 1e-3)
    assert not result.holds and 0 < result.clone.median_ms < result.ours.median_ms < 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "import sys; print('boom at line 7', file=sys.stderr); sys.exit(3)",
            r"tuned worker ended with exit code 3(.|\n)*boom",
        ),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ('print(\'{"event": "start", "what": "case five"}\')', "exit code 0 during: case five"),
    ],
)
def test_worker_that_breaks_down_is_an_error_with_its_last_words(monkeypatch, script, message):
    monkeypatch.setattr(supervisor, "WORKER_COMMAND", (sys.executable, "-c", script))
    with pytest.raises(ChildProcessError, match=message):
        supervisor.run_worker(worker.Request(), "tuned", lambda event: None)


def test_worker_environment(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "5")
    assert "MALLOC_TOP_PAD_" not in supervisor.worker_environment("stock")
    assert supervisor.worker_environment("tuned").items() >= supervisor.TUNED.items()


def test_both_allocators_meet_in_one_result(monkeypatch):
    ran = []

    def fake(request, allocator, on_event):
        ran.append((allocator, request.overheads))
        made = results.to_record(_results(_result(timings={"mmkernels": _timing(1.0 if allocator == "tuned" else 9.0)})))
        for kind in ("machine", "peaks"):
            on_event({"event": kind, kind: made[kind]})
        on_event({"event": "case", "result": made["cases"][0]})

    monkeypatch.setattr(supervisor, "run_worker", fake)
    made = supervisor.measure(worker.Request(), "both", lambda what: None)
    assert ran == [("tuned", True), ("stock", False)]
    (case,) = made.cases
    assert case.ours == _timing(1.0) and case.stock == {"mmkernels": _timing(9.0)}


# --- selection and command --------------------------------------------------------------------------------------------
def test_filters():
    overhead = Overhead("product call", lambda: Call(()), _product, grad=False, limit_us=1.0)
    cards = [_card(_case(), _case(name="other"), overheads=(overhead,)), *all_cards()]
    chosen = select(cards, family="products", dtypes=["bfloat16"])
    assert [(case.name, dtype) for _, case, dtype in chosen.cases] == [
        ("product.4x8", torch.bfloat16),
        ("other", torch.bfloat16),
    ]
    assert len(select(cards, family="products", case="4x8")) == 2
    assert len(select(cards, family="products", case="overhead").overheads) == 1
    assert not select(cards, family="products", device="cuda").overheads
    assert len(select([_card(_case(devices=("cuda",)), _case(name="other"))], device="cuda").cases) == 4
    assert [case.name for _, case, _ in select([_card(_case(devices=("cuda",)), _case(name="other"))]).cases] == [
        "other"
    ] * 2
    with pytest.raises(ValueError, match=r"case 'nothing'.*product\.4x8, other"):
        select(cards, family="products", case="nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "rolls"}, r"family: expected one of .*token_roll.*'rolls'"),
        ({"dtypes": ["float8"]}, r"dtype: expected one of float32.*'float8'"),
        ({"device": "tpu"}, "device: expected cpu or cuda"),
        ({"allocator": "jemalloc"}, "allocator: expected one of tuned, stock, both"),
        ({"seconds": 0.0}, "seconds: expected a number above 0"),
    ],
)
def test_mistakes_are_value_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        command.run(**arguments)


def test_cuda_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda cannot be used"):
        command.run(device="cuda")


def test_unreadable_comparison_and_missing_matplotlib_are_found_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "measure", None)
    with pytest.raises(OSError, match=r"absent\.json"):
        command.run(compare_path=tmp_path / "absent.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'mmkernels\[bench\]'"):
        command.run(plot_folder=tmp_path)


def test_command_line(tmp_path):
    cache = tmp_path / "cache" / "mmkernels"
    cache.mkdir(parents=True)
    record = {"gflops": _PEAKS.gflops, "copy_gbps": _PEAKS.copy_gbps}
    (cache / "peaks.json").write_text(json.dumps({"schema": 1, "machines": {peaks._key("cpu"): record}}))
    out = tmp_path / "run.json"
    options = (
        "--family",
        "token_roll",
        "--case",
        "overhead",
        "--seconds",
        "0.01",
        "--allocator",
        "tuned",
        "--json",
        str(out),
    )
    done = subprocess.run(
        (sys.executable, "-m", "mmkernels", "bench", *options),
        capture_output=True,
        text=True,
        # As many threads as here: the cached peaks are kept by their number.
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "token_roll call, no gradient" in done.stdout and "\x1b" not in done.stdout
    made = results.read(out)
    assert made.peaks == _PEAKS and len(made.overheads) == 2 and not made.cases
