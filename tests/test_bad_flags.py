"""Every flag of every program, given what it cannot be: code 2, one line on stderr, nothing made and nothing started.

The cases of numbers, choices and switches are made from the fields of the programs' dataclasses, so that a new flag is
in here without anybody thinking of it.
"""

import dataclasses
import typing

import pytest

import main_mar
import sample
import util.args
from scripts import (
    ablate_norms,
    bench,
    bench_attention,
    bench_ids,
    bench_loader,
    bench_scales,
    bench_training,
    cache_latents,
    cache_text,
    demo_shapes,
    demo_text,
    export_weights,
    make_fid_stats,
    measure_latents,
    measure_reconstruction,
    search_schedule,
    train_classifier,
    train_tokenizer,
)
from tests.test_cli import refused
from training.config import flag_classes
from util.args import make_parser
from util.sizes import image_size

# program -> the dataclasses that its flags are made from
CONFIGS = {
    main_mar: flag_classes(),
    sample: sample.CONFIGS,
    ablate_norms: [ablate_norms.AblateArgs],
    bench_loader: [bench_loader.BenchArgs],
    bench: [bench.BenchArgs],
    bench_attention: [bench_attention.BenchAttentionArgs],
    bench_ids: [bench_ids.BenchIdsArgs],
    bench_scales: [bench_scales.BenchScalesArgs],
    bench_training: [bench_training.BenchTrainingArgs],
    cache_latents: [cache_latents.CacheArgs],
    cache_text: [cache_text.CacheTextArgs],
    demo_shapes: [demo_shapes.ShapesArgs],
    demo_text: [demo_text.DemoArgs],
    export_weights: [export_weights.ExportArgs],
    make_fid_stats: [make_fid_stats.StatsArgs],
    measure_latents: [measure_latents.MeasureArgs],
    measure_reconstruction: [measure_reconstruction.ReconstructionArgs],
    search_schedule: [search_schedule.SearchArgs],
    train_classifier: [train_classifier.ClassifierArgs],
    train_tokenizer: [train_tokenizer.TokenizerArgs],
}


def flags_of(program) -> dict[str, tuple[dataclasses.Field, type]]:
    """name -> (field, type of its values) for every flag of a program."""
    found = {}
    for config in CONFIGS[program]:
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if "help" in field.metadata:
                kinds = [k for k in typing.get_args(hints[field.name]) if k is not type(None)]
                found.setdefault(field.name, (field, (kinds or [hints[field.name]])[0]))
    return found


def wrong_values(field, kind) -> list[tuple[str, list[str]]]:
    """(what stands after the flag, what the line must say) for a flag of this kind."""
    meta = field.metadata
    if kind is bool:
        return [("=1", []), ("=false", [])]
    if meta["choices"] is not None:
        valid = [", ".join(map(str, meta["choices"]))]
        return [("=nope", ["'nope'", *valid]), ("=", ["''", *valid]), ("", [])]
    if kind is str:
        return [("", []), ("=", ["''"]), ("=  ", ["'  '"])]
    bounds = [f"at {word} {meta[end]}" for word, end in (("least", "low"), ("most", "high")) if meta[end] is not None]
    if meta["type"] is image_size:
        texts = ("", "x", "0", "-8", "1.5", "1e2", "8x", "x8", "0x8", "8x8x8", "8X16", "8,16", "8 x 16", "nan")
        return [(f"={text}", [f"'{text}'", "256x384"]) for text in texts]
    if meta["type"] is not None:  # a function that says itself what is valid
        return [
            (f"={text}", [f"'{text}'", "between 1 and 1000"])
            for text in ("nan", "x", "0", "1001", "50:0", "1.5", "1:2:3", "5:")
        ]
    texts = ["", "x", "nan", "inf", "-inf", "1e999", "1;2", "0x10"] + (["1.5", "1e2"] if kind is int else [])
    if meta["low"] is not None:
        texts += [str(meta["low"] - 1), str(-(10**30))]
    if meta["high"] is not None:
        texts += [str(meta["high"] + 1), str(10**30)]
    what = {int: "a whole number", float: "a number"}[kind]
    too_many = [(f"={10**14}", ["at most 100000000"])] if kind is int and meta["high"] is None else []
    return [
        ("", []),
        ("=--", ["'--'"]),
        *too_many,  # of images lists are made, before anything is sampled
        *((f"={text}", [what, *bounds, *([f"'{text}'"] if text else [])]) for text in texts),
    ]


ALONE = [(program, name, *flag) for program in CONFIGS for name, flag in flags_of(program).items()]
NUM_ALONE = sum(len(wrong_values(field, kind)) for *_, field, kind in ALONE)


def id_of(value) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("scripts.")


@pytest.fixture(scope="module")
def parsers_made_once():
    """Making main_mar.py's parser takes longer than the rest of a case, and it does not change."""
    made = {}

    def once(prog, *rest, **options):
        return made.setdefault(prog, made.get(prog) or make_parser(prog, *rest, **options))

    with pytest.MonkeyPatch.context() as patch:
        for program in (util.args, *CONFIGS):
            if hasattr(program, "make_parser"):  # or it leaves that to util.args.run_with
                patch.setattr(program, "make_parser", once)
        yield


@pytest.mark.parametrize("program", CONFIGS, ids=id_of)
def test_every_flag_refuses_what_it_cannot_be(program, parsers_made_once, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, (field, kind) in flags_of(program).items():
        for text, words in wrong_values(field, kind):
            line = refused(program.main, [f"--{name}{text}"], capsys)
            assert all(word in line for word in [f"--{name}", *words]), (text, line)
    assert not list(tmp_path.iterdir())


def test_int8_is_for_sampling_only():
    for program in CONFIGS:
        field, _ = flags_of(program).get("dtype", (None, None))
        assert field is None or ("int8" in field.metadata["choices"]) == (program is sample), program


def test_there_are_many():
    assert NUM_ALONE > 1700
