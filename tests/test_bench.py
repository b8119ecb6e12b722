"""The benchmark: its tables have their rows, its FLOPs are those of the formula, its stopwatch sees what it watches."""

import json
import mmap
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import low_precision
from models.mar import MAR
from scripts import bench, bench_attention, bench_ids, bench_scales, bench_training
from scripts.bench import PUBLISHED, SAMPLING, Bench, BenchArgs, main
from training import state
from training.ahead import Ahead
from util.timing import PeakMemory, Stopwatch, device_work, matmul_rate, run_seconds, union_length


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    for module in (bench, bench_training):
        monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: matmul_rate(device, dtype, size=64))


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (dict(fp32=3.0, bf16=1.0), "bf16"),
        (dict(fp32=1.4, bf16=1.0, int8=1.0), "fp32"),
        (dict(fp32=2.0, bf16=4.0, int8=1.0), "int8"),
    ],
)
def test_the_fast_dtype_of_a_cpu_is_measured(monkeypatch, seconds, expected):
    monkeypatch.setattr(low_precision, "layer_seconds", lambda width: dict(seconds))
    assert low_precision.fast_dtype(torch.device("cpu"), 64) == expected


@pytest.mark.parametrize("exact", (True, False))
def test_every_dtype_that_is_there_is_timed(monkeypatch, exact):
    monkeypatch.setattr(low_precision, "is_exact", lambda: exact)
    seconds_of = low_precision.layer_seconds(8)
    assert set(seconds_of) == {"fp32", "bf16", "int8"} - (set() if exact else {"int8"})
    assert all(0 < seconds < 1 for seconds in seconds_of.values())


SMALL = ("--preset", "digits", "--batch_size", "2", "--repeats", "1")


def rows_of(text):
    """{first cell: the others} of all Markdown tables."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in cells}


@pytest.mark.slow
@pytest.mark.on_cpu("it has a row in int8, and rows that run no transformer")
def test_every_lever_has_a_row(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(MAR, "compile_parts", lambda mar: compiled.append(mar))  # which takes long, see test_compile.py
    assert main([*SMALL, "--num_iter", "2", "--only", "sampling"]) == 0
    assert bench_training.main([*SMALL]) == 0
    rows = rows_of(capsys.readouterr().out)
    first = list(SAMPLING)[0]
    assert rows[first][3] == "1.00"
    for name in (*SAMPLING, *bench_training.TRAINING):
        if name not in SAMPLING and "--compile" in name or "int8" in name and not low_precision.is_exact():
            continue
        cells = next(rest for row, rest in rows.items() if row.startswith(name))
        assert float(cells[0]) > 0
    assert len(compiled) == 1
    stubbed = [row for row, rest in rows.items() if rest[-2] == "="]  # they run no transformer
    assert [row.split(",")[0] for row in stubbed][:2] == ["fp32", "+ annealing"]


def test_rows_of_a_gpu_are_run_whole_and_say_what_it_does(capsys, monkeypatch):
    """On a CPU operators are in place of kernels."""
    runs, sample, compiled = [], Bench.sample, []
    monkeypatch.setattr(MAR, "compile_parts", lambda mar: compiled.append(mar))  # which takes long, see test_compile.py

    def counted(run, row, *sizes, **options):
        seconds, steps = sample(run, row, *sizes, **options)
        runs.append((row["num_sampling_steps"], options.get("stub", False), {str(count) for *_, count in steps}))
        return seconds, steps

    monkeypatch.setattr(Bench, "sample", counted)
    monkeypatch.setattr(Bench, "on_gpu", True)
    names = list(SAMPLING)[:4:3]  # the published settings, and those that differ in diffusion settings only
    monkeypatch.setattr(bench, "SAMPLING", {name: SAMPLING[name] for name in names})
    assert main([*SMALL, "--num_iter", "2", "--only", "sampling"]) == 0
    assert not any(stub for _, stub, _ in runs)
    assert runs[0][::2] == ("100", {"100"})  # none is timed as a few
    assert len(runs) == 3 * 4  # the first two, one that is timed, one for the profiler
    assert runs[-1][::2] == ("100", {"100"}) and len(compiled) == 1  # the compiled row, with published settings
    rows = rows_of(capsys.readouterr().out)
    assert rows[""][-4:] == bench.GPU_COLUMNS
    many, few = (rows[name][-4:] for name in names)
    assert float(rows["published settings, bf16, --compile"][-4]) > 0
    assert float(few[0]) > float(many[0]) > 0
    assert all(row[1].endswith("%") and float(row[3]) < 60 for row in (many, few))
    assert int(many[2]) > 5 * int(few[2]) > 0  # 100 steps have more than 12


def test_a_trace_shows_that_draws_and_steps_overlap(tmp_path, monkeypatch, capsys):
    """In a thread of their own, as on a GPU; and the loader's part of the loop."""
    monkeypatch.setattr(state, "Ahead", lambda active: Ahead(True))
    path = tmp_path / "new" / "deep" / "trace.json"
    assert bench_training.main([*SMALL, "--trace", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"6 steps: {path}\n"
    if "follows the main thread alone" in said.err:
        pytest.skip("this torch has no trace of other threads")
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    steps, draws = (
        [event for event in events if event["name"] == name] for name in ("training_step", "what the next step needs")
    )
    assert len(steps) == 6 and len(draws) == 5 and any("DataLoader" in event["name"] for event in events)
    assert not {event["tid"] for event in steps} & {event["tid"] for event in draws}
    steps, draws = (sorted(some, key=lambda event: event["ts"]) for some in (steps, draws))
    # those of the second step begin before the first one ends, and so on; of the operating system's threads, not always
    assert sum(draw["ts"] < step["ts"] + step["dur"] for draw, step in zip(draws, steps)) >= 3
    assert bench_training.main([*SMALL, "--trace", str(path)]) == 0  # its own is replaced


def test_a_gpu_has_columns_and_a_compiled_row_of_training(capsys, monkeypatch):
    """On a CPU operators are in place of kernels."""
    compiled = []
    monkeypatch.setattr(MAR, "compile_parts", lambda mar: compiled.append(mar))
    monkeypatch.setattr(bench_training, "is_gpu", lambda device: True)
    names = list(bench_training.TRAINING)[2:]
    monkeypatch.setattr(bench_training, "TRAINING", {name: bench_training.TRAINING[name] for name in names})
    assert bench_training.main([*SMALL]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[""][-3:] == bench_training.GPU_COLUMNS and len(compiled) == 1
    for name in names:
        seconds, (images, busy, kernels) = float(rows[name][0]), rows[name][-3:]
        assert float(images) == pytest.approx(2 / seconds, rel=0.02) and busy.endswith("%") and int(kernels) > 100


def fails(mar):
    raise ValueError("--compile does not work here")


def test_where_no_training_can_be_compiled_the_other_rows_are_there(capsys, monkeypatch):
    monkeypatch.setattr(MAR, "compile_parts", fails)
    monkeypatch.setattr(bench_training, "is_gpu", lambda device: True)
    names = list(bench_training.TRAINING)[2:]
    monkeypatch.setattr(bench_training, "TRAINING", {name: bench_training.TRAINING[name] for name in names})
    assert bench_training.main([*SMALL]) == 0
    out, err = capsys.readouterr()
    assert names[0] in rows_of(out) and names[1] not in rows_of(out)
    assert f"no row {names[1]!r}: --compile does not work here" in err


def test_where_nothing_can_be_compiled_the_other_rows_are_there(capsys, monkeypatch):
    monkeypatch.setattr(MAR, "compile_parts", fails)
    first, compiled = list(SAMPLING)[0], "--fast, --compile"
    monkeypatch.setattr(bench, "SAMPLING", {name: SAMPLING[name] for name in (first, compiled)})
    assert main([*SMALL, "--num_iter", "2", "--only", "sampling"]) == 0
    out, err = capsys.readouterr()
    assert "'--fast, --compile': --compile does not work here" in err
    assert compiled not in out and first in out


def test_unknown_section(capsys):
    with pytest.raises(ValueError, match="'speed' is not a section; valid: sampling"):
        main(["--only", "speed"])
    with pytest.raises(ValueError, match="'speed' is not a section; valid: training, heads"):
        bench_training.main(["--only", "speed"])


@pytest.mark.parametrize(
    "section, other, given",
    [
        ("training", bench_training, {"--batch_size=3"}),
        ("ids", bench_ids, set()),
        ("scales", bench_scales, set()),
    ],
)
def test_other_tables_are_made_in_a_process_of_their_own(section, other, given, monkeypatch):
    """With flags that its program takes."""
    said = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command: said.append(command) or CompletedProcess(command, 0))
    assert main(["--preset", "digits", "--train_batch_size", "3", "--repeats", "2", "--only", section]) == 0
    ((python, program, *flags),) = said
    assert Path(program).samefile(other.__file__)
    assert other.main([*flags, "--dry_run"]) == 0 and {"--repeats=2", *given} <= set(flags)


def attention_rows(capsys, kernels: str, *flags) -> list[dict]:
    """{kernel: its largest difference, None where it does not run} of each table of bench_attention.py."""
    words = f"--mar mar_tiny --var var_tiny --batch_size 3 --calls 1 --repeats 1 --kernels {kernels}".split()
    assert bench_attention.main([*words, *flags]) == 0
    tables = capsys.readouterr().out.split("| --- |")[1:]
    rows = [[line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")] for table in tables]
    return [{row[0]: float(row[3]) if len(row) == 5 else None for row in table} for table in rows]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_kernels_of_attention_agree_under_a_mask(capsys):
    whole, partial, training = attention_rows(capsys, "none,bool,nested")
    for table in whole, partial:
        assert table["none"] > 0.01 and table["bool"] == 0 and table["nested"] < 1e-4
    assert training["none"] > 0.01 and training["bool"] == 0 and training["nested"] is None
    with pytest.raises(ValueError, match="--kernels 'fast' is not known; valid: none, bool, cudnn, flex, nested"):
        attention_rows(capsys, "fast")
    with pytest.raises(ValueError, match="--only 'speed' is not known; valid: whole, partial, training"):
        attention_rows(capsys, "bool", "--only", "speed")


@pytest.mark.slow
def test_compiled_attention_agrees_under_a_mask(capsys):
    whole, partial = attention_rows(capsys, "flex", "--only", "whole,partial")
    assert whole["flex"] < 1e-4 and partial["flex"] < 1e-4
    args = bench_attention.BenchAttentionArgs(var="var_tiny", batch_size=3, device="cpu")
    place = replace(bench_attention.training(args), gradients=False)  # of which a CPU has none
    made, wanted = (
        bench_attention.attend(place, *kernel(place)) for kernel in (bench_attention.flex, bench_attention.bool_mask)
    )
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


def test_models_of_ids_have_a_row_for_each_batch_size(capsys):
    words = "--models causal_gpt_tiny,mar_ar_tiny --mar mar_tiny --maskgil maskgil_tiny --img_size 32".split()
    words += "--vocab_size 8 --num_iter 2".split()
    assert bench_ids.main([*words, "--repeats", "1", "--batch_sizes", "1,2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| m") or line.startswith("| c")]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {size}", batch] for size in (*words[1].split(","), "mar_tiny", "maskgil_tiny") for batch in "12"
    ]
    for line in lines:
        first, second, ratio = map(float, line.split(" | ")[2:5])
        assert min(first, second, ratio) >= 0
    for flags, shown in (("--models maskgil_b", "'maskgil_b'"), ("--batch_sizes 0", "'0'"), ("--only x", "'x'")):
        with pytest.raises(ValueError, match=shown):
            bench_ids.main(flags.split())


@pytest.mark.parametrize("cfg", (1.0, 2.0))
def test_flops_are_those_of_the_formula(cfg):
    run = Bench(BenchArgs(preset="digits", batch_size=2, num_iter=3, cfg=cfg, device="cpu"))
    _, steps = run.sample(PUBLISHED)
    flops = run.sampling_flops(steps, 1)
    c, size, width = run.config, 2, run.config.encoder_embed_dim
    slots = c.buffer_size + c.seq_len

    def blocks(depth, tokens):  # 12·D² weights a block, scores and their use
        return depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)

    transformer, known = 0, 0
    halves = 2 if cfg > 1 else 1
    for rows, _, _ in steps:
        seen = c.buffer_size + known
        embed = 2 * known * c.token_dim * width + 2 * seen * width**2  # z_proj, decoder_embed
        # without a label one image stands for all, as long as nothing is known
        images = size + (halves - 1) * (size if known else 1)
        transformer += images * (blocks(c.encoder_depth, seen) + embed + blocks(c.decoder_depth, slots))
        known += len(rows) // size
    assert known == c.seq_len and flops["transformer"] == transformer
    w, num_rows = c.diffloss_w, halves * size * c.seq_len
    a_row = 2 * (c.token_dim * w + c.diffloss_d * 5 * w**2 + 2 * w**2 + 2 * w * c.token_dim)
    a_step = 2 * (256 * w + w**2)  # the embedding of the time, one for all rows
    condition = 2 * num_rows * width * w
    assert flops["diffusion"] == 100 * (num_rows * a_row + len(steps) * a_step) + condition


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20))))
def test_the_union_of_intervals(spans):
    spans = [(begin, begin + length) for begin, length in spans]
    assert union_length(spans) == len({x for begin, end in spans for x in range(begin, end)})


@pytest.mark.gpu
def test_kernels_and_their_seconds_on_a_gpu():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    run_seconds(device, lambda: a @ a)
    seconds, (kernels, busy) = (
        run_seconds(device, lambda: [a @ a for _ in range(20)]),
        device_work(device, lambda: a @ a),
    )
    assert 1 <= kernels < 10
    assert 0 < busy < seconds  # one product takes less than twenty
    watch = Stopwatch(device)
    with watch.watch(torch, "mm", "product"):
        torch.mm(a, a)
    assert 0 < watch.seconds["product"] < seconds


def test_stopwatch_and_memory():
    class Work:
        def run(self, x):
            return torch.ones(1000, x).sum().item()

    watch, original = Stopwatch(torch.device("cpu")), Work.run
    with watch.watch(Work, "run", "work"):
        assert Work().run(3) == Work().run(3) == 3000
    assert watch.seconds["work"] > 0 and Work.run is original
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    before = peak.read()
    with mmap.mmap(-1, 2**28) as block:  # of its own: what was freed before may be given out again
        block[:] = bytes(2**28)
        after = peak.read()
    assert before != before or after - before > 0.8 * 2**28
