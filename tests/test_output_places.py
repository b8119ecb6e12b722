"""No program writes into a cache of latents, which is known by its own files; and a dry run refuses what the run would
(util/images/folders.py; images: test_output_folders.py)."""

import shutil

import numpy as np
import pytest

import main_mar
import sample
from scripts import (
    bench_training,
    best_settings,
    cache_latents,
    download_weights,
    export_weights,
    inspector,
    make_fid_stats,
    make_table,
    measure_reconstruction,
    plot_trace,
    plot_training,
    search_schedule,
    torture,
    train_classifier,
    train_tokenizer,
)
from tests.helpers import blank_trace, untrained
from tests.helpers_latents import CACHE, SMALL, cache, content, refused
from tests.test_reading_settings import train
from util.images.folders import find_cache

IMAGES = "--data digits --img_size 8 --tokenizer pixel".split()
# program -> (its flags before the place, the name of the flag, what it writes there, has it --dry_run?)
WRITERS = {
    "main_mar": (main_mar, ["--preset", "digits"], "output_dir", "", True),
    "log_dir": (main_mar, ["--preset", "digits", "--output_dir", "elsewhere"], "log_dir", "", True),
    "evaluate": (main_mar, ["--preset", "digits", "--evaluate", "--resume", "GOOD"], "output_dir", "", True),
    "sample": (sample, ["--checkpoint", "GOOD", "--metrics", "none"], "output_dir", "", True),
    "cache_latents": (cache_latents, IMAGES, "cached_path", "/new", True),
    "train_tokenizer": (train_tokenizer, IMAGES[:4], "output_dir", "", True),
    "measure_reconstruction": (measure_reconstruction, IMAGES, "output_dir", "", True),
    "make_fid_stats": (make_fid_stats, IMAGES[:4], "out", "/x.npz", True),
    "export_weights": (export_weights, ["--checkpoint", "GOOD"], "output", "/x.safetensors", True),
    "search_schedule": (search_schedule, ["--checkpoint", "GOOD"], "out", "/x.json", True),
    "train_classifier": (train_classifier, [], "output", "/x.npz", True),
    "best_settings": (best_settings, ["RESULTS"], "out", "/x.jsonl", True),
    "download_weights": (download_weights, ["mar_base"], "out", "", True),
    "torture": (torture, [], "work_dir", "/new", True),
    "plot_training": (plot_training, ["."], "out", "/x.png", True),
    "bench_training": (bench_training, ["--preset", "digits"], "trace", "/x.json", True),
    "inspector": (inspector, ["--trace", "TRACE"], "export", "/x.html", False),
    "plot_trace": (plot_trace, ["TRACE"], "out", "", False),
    "make_table": (make_table, ["RESULTS"], "csv", "/x.csv", False),
    "plot": (make_table, ["RESULTS"], "plot", "/x.png", False),
}


@pytest.fixture(scope="module")
def caches(pictures, tmp_path_factory):
    """{kind: folder} of the same latents: both of our formats, and MAR's, which has no file that says what it is."""
    root = tmp_path_factory.mktemp("caches")
    made = {name: cache(pictures, root / name, "--format", name) for name in ("packed", "npz")}
    made["mar"] = shutil.copytree(made["npz"], root / "of mar" / "mar")
    for name in ("settings.json", "index.json"):
        (made["mar"] / name).unlink()
    return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What stands for the capital words in WRITERS."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "results.jsonl").write_text('{"settings": {"seed": 0, "cfg": 1.0}, "metrics": {"fid": 1.0}}\n')
    np.savez(root / "trace.npz", **blank_trace())
    good = untrained(root / "good")
    return {"GOOD": good, "RESULTS": root / "results.jsonl", "TRACE": root / "trace.npz"}


@pytest.mark.parametrize("below", ["", "/7", "/new/deep"])
@pytest.mark.parametrize("program", WRITERS)
def test_no_program_writes_into_a_cache(program, below, caches, inputs, tmp_path, monkeypatch, capsys):
    """Nor does its dry run say that it would."""
    module, flags, name, file, has_dry_run = WRITERS[program]
    monkeypatch.chdir(tmp_path)
    flags = [inputs.get(word, word) for word in flags] + ["--dry_run"] * has_dry_run
    for kind in ("packed",) if below else caches:
        before, place = content(caches[kind]), f"{caches[kind]}{below}"
        if module is torture and not below:
            continue  # refused for not being empty
        line = refused(module.main, capsys, *flags, f"--{name}", place + file)
        assert line.startswith(f"error: --{name} {place}") and f"is in {caches[kind]}, a cache of latents" in line
        assert content(caches[kind]) == before
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["main_mar", "sample", "export_weights"])
def test_without_a_dry_run_as_well(program, caches, inputs, tmp_path, monkeypatch, capsys):
    module, flags, name, file, _ = WRITERS[program]
    monkeypatch.chdir(tmp_path)
    before = content(caches["npz"])
    line = refused(
        module.main, capsys, *(inputs.get(word, word) for word in flags), f"--{name}", f"{caches['npz']}{file}"
    )
    assert "a cache of latents" in line and content(caches["npz"]) == before and not any(tmp_path.iterdir())


def test_what_is_a_cache(caches, tmp_path):
    """Beside one, above one, in a folder of samples or of statistics, all goes; a cut settings.json is one still."""
    for kind in caches:
        for below in (".", "7", "new", "7/new"):
            assert find_cache(caches[kind] / below) == caches[kind] or (kind, below[0]) == ("mar", "7"), (kind, below)
        assert find_cache(caches[kind] / "7") is not None
        assert find_cache(caches[kind].parent) is find_cache(caches[kind].parent / "run") is None
        assert find_cache(caches[kind], itself=False) is None
    cut = shutil.copytree(caches["packed"], tmp_path / "cut")
    (cut / "index.json").unlink()
    text = (cut / "settings.json").read_text()
    (cut / "settings.json").write_text(text[: len(text) * 2 // 3])
    assert find_cache(cut / "x") == cut
    out = tmp_path / "samples"
    for name in ("a", "b"):
        (out / name).mkdir(parents=True)
        np.savez(out / name / "samples.npz", arr_0=np.zeros(1), labels=np.zeros(1))
        (out / name / "settings.json").write_text('{"format": 1}')
    np.savez(out / "stats.npz", mu=np.zeros(1), sigma=np.zeros(1))
    (out / "c.npz").mkdir()
    assert find_cache(out) is find_cache(out / "a") is find_cache(out / "a" / "x") is None
    one = shutil.copytree(caches["mar"] / "7", tmp_path / "project" / "latents")  # a cache without folders of classes
    assert (
        find_cache(one) == one and find_cache(tmp_path / "project" / "run") is find_cache(tmp_path / "project") is None
    )


def test_a_cache_goes_on_in_its_own_folder(pictures, caches, capsys):
    assert cache_latents.main([*CACHE, "--data_path", str(pictures), "--cached_path", str(caches["packed"])]) == 0
    assert cache_latents.main(["--cached_path", str(caches["npz"]), "--verify"]) == 0


@pytest.mark.parametrize("below", ["", "/7"])
def test_weights_are_not_exported_among_the_images_they_learned(below, some, tmp_path, capsys):
    run, place = train(some, tmp_path / "run"), f"{some}/train{below}"
    before = content(some)
    line = refused(export_weights.main, capsys, "--checkpoint", run, "--output", f"{place}/x.safetensors")
    assert line == f"error: --output {place} is in {some}/train, whose images are read: choose a folder outside"
    assert content(some) == before


FOLDER = [*SMALL[:6], "--data_path", "DATA"]
DRY = {  # program -> (module, flags with {place}, what the line says), place being a folder of images, a file or a name
    "main_mar": (main_mar, [*FOLDER, "--output_dir", "DATA/train/7"], "whose images are read"),
    "log_dir": (main_mar, [*FOLDER, "--log_dir", "DATA/train/7"], "whose images are read"),
    "use_cached": (main_mar, [*FOLDER, "--use_cached", "--cached_path", "SOME", "--output_dir", "SOME/x"], "SOME"),
    "another run": (main_mar, ["--output_dir", "GOOD"], "--resume GOOD"),
    "file": (main_mar, ["--output_dir", "FILE"], "--output_dir FILE: FILE is a file, not a folder"),
    "sample": (sample, ["--checkpoint", "GOOD", "--output_dir", "FILE/x"], "FILE is a file"),
    "cache_latents": (cache_latents, [*FOLDER, "--cached_path", "DATA/train/new"], "whose images are read"),
    "no cache": (cache_latents, [*FOLDER, "--cached_path", "SOME"], "SOME is not empty and no cache"),
    "train_tokenizer": (train_tokenizer, [*FOLDER[:2], *FOLDER[6:], "--output_dir", "DATA/train"], "images are read"),
    "tokenizer": (train_tokenizer, ["--data", "digits", "--output_dir", "GOOD"], "continue it with --resume"),
    "reconstruction": (measure_reconstruction, [*FOLDER, "--output_dir", "DATA/val"], "images are read"),
    "make_fid_stats": (make_fid_stats, ["--data", "imagefolder", *FOLDER[6:], "--out", "DATA/train/7/x.npz"], "images"),
    "statistics": (make_fid_stats, ["--data", "digits", "--out", "FILE"], "FILE"),
    "search_schedule": (search_schedule, ["--checkpoint", "GOOD", "--out", "FILE/x.json"], "FILE is a file"),
    "classifier": (train_classifier, [*FOLDER[6:], "--output", "DATA/train/7/x.npz"], "whose images are read"),
    "best_settings": (best_settings, ["RESULTS", "--out", "FILE"], "--out FILE exists"),
    "download_weights": (download_weights, ["--out", "FILE"], "FILE is a file"),
    "torture": (torture, ["--work_dir", "FILE/x"], "FILE is a file"),
}  # fmt: skip


@pytest.mark.parametrize("program", DRY)
def test_a_dry_run_refuses_what_the_run_would(program, some, inputs, tmp_path, monkeypatch, capsys):
    """Each would have to read images or a model for nothing else."""
    module, flags, words = DRY[program]
    (tmp_path / "file.npz").write_text("mine")
    (some / "val" / "a").mkdir(parents=True)
    places = {"DATA": some, "SOME": inputs["RESULTS"].parent, "FILE": tmp_path / "file.npz", **inputs}

    def filled(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    before, lines = content(tmp_path), []
    for dry in (["--dry_run"], []):
        lines.append(refused(module.main, capsys, *map(filled, flags), *dry))
    assert filled(words) in lines[0] and lines[0] == lines[1] and content(tmp_path) == before


LONG = "--order checkerboard --group power --group_p 2.34567 --tau_schedule linear --temperature 0.912345"
LONG += " --temperature_end 1.012345 --cfg_schedule power_cosine --cfg_power 1.23456 --cfg 1.23456"
LONG += " --cfg_profile interval --cfg_t_interval 0.123456,0.987654 --solver dpmpp_sde --spacing uniform"
LONG += " --num_sampling_steps 12:5 --refresh_every 3"


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_a_name_too_long_for_a_folder_is_refused_before_sampling(dry, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine_mar.train_one_epoch", lambda *a: pytest.fail("it had started"))
    words = [*LONG.split(), "--output_dir", tmp_path / "out", *dry]
    for main, flags in (
        (sample.main, ["--checkpoint", inputs["GOOD"], "--metrics", "none"]),
        (main_mar.main, ["--preset", "digits", "--online_eval"]),
        (main_mar.main, ["--preset", "digits", "--evaluate", "--resume", inputs["GOOD"]]),
    ):
        assert "a name in it has more than 255 bytes" in refused(main, capsys, *flags, *words)
    assert not any(tmp_path.iterdir())
