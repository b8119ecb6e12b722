"""scripts/bench_ids.py: a row for each model and dtype, with the steps and passes of its family."""

import pytest

from scripts import bench_ids
from tests.test_bench import rows_of
from tests.test_cli import refused


def test_a_row_for_each_model_and_dtype(monkeypatch, capsys):
    for name in ("maskgil_tiny", "causal_gpt_tiny"):
        sizes = bench_ids.FAMILIES[bench_ids.SIZES[name]].sizes
        small = type(sizes[name])(dim=16, n_layer=1, n_head=2, multiple_of=16, vocab_size=9, block_size=16)
        monkeypatch.setitem(sizes, name, small)
    flags = "--models maskgil_tiny,causal_gpt_tiny --batch_size 2 --repeats 1 --device cpu".split()
    assert bench_ids.main(flags) == 0
    out = capsys.readouterr().out
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert [(row[0], row[1], row[2], row[4]) for row in rows[2:]] == [
        (name, dtype, steps, passes)
        for name, steps, passes in (("maskgil_tiny", "8", "15"), ("causal_gpt_tiny", "16", "2"))
        for dtype in ("fp32", "bf16")
    ]
    assert all(float(row[3]) > 0 for row in rows[2:]) and rows_of(out)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--models mar_base", "--models: unknown 'mar_base'; valid: causal_gpt_tiny"),
        ("--dtypes fp32,int8", "--dtypes: unknown 'int8'; valid: fp32, bf16"),
    ],
)
def test_names_that_are_none_are_one_line(flags, message, capsys):
    assert message in refused(bench_ids.main, flags.split(), capsys)
