"""The door of the programs: exit codes, one line, output that cannot be encoded; processes that wait or are lost."""

import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import PIL.Image
import pytest
import torch

import main_mar
import sample
from models.mar import MAR, MAR_CONFIGS
from models.tokenizers.multiscale_vq import MultiScaleVQ
from scripts import cache_latents, make_fid_stats, make_table, plot_training, train_classifier, train_tokenizer
from tests.helpers import SMALLEST, image_folder, torchrun, untrained
from training.config import flag_classes, resolve
from util import dist
from util.args import make_parser
from util.checkpoint import atomic_file
from util.door import run_main
from util.images.pictures import prepare_folder

ROOT = Path(__file__).resolve().parents[1]


def raising(error):
    def main(argv=None):
        raise error

    return main


def library_value_error(argv=None):
    torch.nn.Dropout(2)  # torch raises ValueError


def undecodable(argv=None):
    b"\xff".decode()


def code_and_line(main, capsys):
    code, said = run_main(main), capsys.readouterr()
    return code, said.err.splitlines()


def test_input_is_one_line_and_code_2(capsys):
    def main(argv=None):
        raise ValueError("--x\n must be 1")

    from util import args  # a check in this repository, of a flag's range

    assert code_and_line(lambda argv: args.parse_range("x", "2,1", int, 0), capsys)[0] == 2
    code, lines = code_and_line(raising(OSError(28, "No space left on device")), capsys)
    assert code == 2 and lines == ["error: [Errno 28] No space left on device"]
    assert code_and_line(main, capsys) == (2, ["error: --x must be 1"])


@pytest.mark.parametrize("main", [library_value_error, raising(TypeError("x")), raising(KeyError("x"))])
def test_a_fault_of_the_code_is_not_blamed_on_the_user(main, capsys):
    code, lines = code_and_line(main, capsys)
    assert code == 1 and lines[0].startswith("Traceback") and lines[-1].startswith("error: internal error, not your")


@pytest.mark.parametrize(
    "error, code, words",
    [
        (FloatingPointError("diverged"), 1, "diverged"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "--eval_bsz"),
        (MemoryError("Unable to allocate 3 TiB"), 2, "--eval_bsz"),
        (RuntimeError("NCCL error: Duplicate GPU detected : rank 0 and rank 1"), 2, "--nproc_per_node"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:25"),
            1,
            "another process",
        ),
        (RuntimeError("Read error: Connection reset by peer"), 1, "another process"),
    ],
)
def test_devices_and_peers_are_one_line(error, code, words, capsys):
    found, lines = code_and_line(raising(error), capsys)
    assert found == code and len(lines) == 1 and words in lines[0]


def test_a_model_that_is_too_large_is_no_matter_of_the_batch(tmp_path, monkeypatch, capsys):
    """Neither in training, of a tokenizer too, nor where a checkpoint is read."""
    checkpoint = untrained(tmp_path / "good")

    def too_large(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    for network in (MAR, MultiScaleVQ):
        monkeypatch.setattr(network, "__init__", too_large)
    sampling = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "x")]
    tokenizer = ["--data", "digits", "--multiscale", "--stride", "1", "--output_dir", str(tmp_path / "y")]
    for main, flags in ((main_mar.main, SMALLEST.split()), (sample.main, sampling), (train_tokenizer.main, tokenizer)):
        code, lines = code_and_line(lambda argv, main=main, flags=flags: main(flags), capsys)
        assert code == 2 and len(lines) == 1 and "model is too large" in lines[0] and "--diffloss_w" in lines[0]
        assert "batch" not in lines[0] and "eval_bsz" not in lines[0]


def test_a_full_disk_is_named_in_sampling_and_everywhere_else(tmp_path, monkeypatch, capsys):
    checkpoint, out = untrained(tmp_path / "good"), tmp_path / "out"

    def full(self, target, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(out), "--metrics", "none", "--num_images", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image.Image, "save", full)
        code, lines = code_and_line(lambda argv: sample.main([*flags, "--num_iter", "1"]), capsys)
    lines = [line for line in lines if line.startswith("error: ")]
    assert code == 2 and lines[0].startswith(f"error: {out} cannot be written (No space left on device)")
    assert "the same command" in lines[0]

    def unwritten(argv):
        with atomic_file(out / "a.csv"):
            full(None, None)

    assert code_and_line(unwritten, capsys) == (2, [f"error: [Errno 28] No space left on device: '{out / 'a.csv'}'"])


def test_images_are_loaded_by_at_most_a_process_a_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert [dist.num_loading(number) for number in (0, 1, 2, 10)] == [0, 1, 2, 2]


def test_output_that_cannot_be_encoded_ends_nothing():
    """Class names and ± on a terminal of ASCII."""
    program = (
        "from util.door import run_main; raise SystemExit(run_main(lambda _: print('caf\u00e9 \u00b1 \u2212') or 0))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout == b"caf? ? ?\n" and not done.stderr


def test_streams_without_encoding_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run_main(lambda argv: 0) == 0


@pytest.mark.parametrize("word", ["--output_dir=~/x", "--output_dir ~/x", "--resume=~", "--tokenizer=diffusers:~/x"])
def test_a_home_folder_is_expanded_in_every_flag(word):
    given = vars(make_parser("x", "", *flag_classes()).parse_args(word.split()))
    (value,) = given.values()
    assert os.path.expanduser("~") in value and "~" not in value


@pytest.mark.parametrize("word", ["--output_dir=a~b", "--output_dir=x/~/y", "--init_from=~other/x"])
def test_other_tildes_stay(word):
    (value,) = vars(make_parser("x", "", *flag_classes()).parse_args([word])).values()
    assert value == word.partition("=")[2]


def test_a_process_without_a_gpu_names_the_flag():
    dist.check_local_rank(1, 2)
    with pytest.raises(ValueError, match="process 1 .* no GPU .* there are 1: --nproc_per_node must be at most 1"):
        dist.check_local_rank(1, 1)


@pytest.mark.parametrize("visible, used", [(1, 0), (4, 3)])
def test_a_process_of_slurm_has_its_own_gpu(visible, used, monkeypatch):
    """Also where SLURM shows it no other one, which then is number 0."""
    for name, value in dict(PROCID=3, NTASKS=4, LOCALID=3).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    dist.init(torch.device("cuda"))
    assert chosen == [used]


def test_a_process_that_waits_says_so_after_a_while(capsys):
    import threading

    with dist.said_after(0.05, "waiting"):
        threading.Event().wait(0.5)
    assert capsys.readouterr().err == "waiting\n"
    with dist.said_after(5, "waiting"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no names of threads here")
def test_a_group_of_processes_sends_no_buffers_and_leaves_no_threads(tmp_path):
    """Those of gloo would still read from the other process while this one's libraries are torn down."""
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, torch, warnings\n"
        "from training.build import distributed\n"
        "from util import dist\n"
        "warnings.simplefilter('error', FutureWarning)\n"
        "tasks = pathlib.Path('/proc/self/task')\n"
        "names = lambda: [(task / 'comm').read_text() for task in tasks.iterdir()]\n"
        "dist.init(torch.device('cpu'))\n"
        "wrapped = distributed(torch.nn.BatchNorm1d(1))\n"
        "assert wrapped.modules_buffers and not wrapped.will_sync_module_buffers()\n"
        "wrapped(torch.ones(2, 1)).sum().backward()\n"
        "del wrapped\n"
        "assert any('gloo' in name for name in names())\n"
        "dist.shutdown()\n"
        "assert not any('gloo' in name for name in names()), names()\n"
    )
    torchrun(program)


def test_a_lonely_process_of_a_cluster_says_what_it_waits_for(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    program = "import torch; from util import dist; dist.WAIT_SECONDS = 0.1; dist.init(torch.device('cpu'))"
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    line = run.stderr.readline()
    run.kill()
    run.communicate()
    assert line.startswith(f"waiting for the other 1 of 2 processes at 127.0.0.1:{port} (this is number 0)")
    assert line.endswith("to run alone unset SLURM_PROCID\n")


def train(folder, *flags):
    words = [
        *SMALLEST.split(),
        "--patch_size",
        "2",
        "--batch_size",
        "600",
        "--epochs",
        "1",
        "--num_images",
        "20",
        "--metrics",
        "none",
        "--output_dir",
        str(folder),
    ]
    return run_main(main_mar.main, [*words, *map(str, flags)])


def test_a_fresh_start_where_checkpoints_are_is_refused(tmp_path, capsys):
    """A mistyped, forgotten or foreign --resume, and a second stage into its base's folder; nothing is touched."""
    assert train(tmp_path / "run", "--resume", tmp_path / "run") == 0
    assert train(tmp_path / "other") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    run = tmp_path / "run"
    wrong = ([], ["--resume", tmp_path / "typo"], ["--resume", tmp_path / "other"], ["--init_from", run])
    for flags in wrong:
        assert train(run, *flags) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(run) in said and "--resume" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train(run, "--resume", run / "checkpoint-last.pth", "--epochs", 2) == 0  # a file in it is the run's own
    assert train(tmp_path / "third", "--init_from", run) == 0


@pytest.mark.parametrize("model", MAR_CONFIGS)
def test_own_data_with_a_small_model_has_its_own_diffusion_mlp(model):
    """MAR's command-line defaults (12 blocks of 1536) are for MAR's models; a flag by hand wins over both."""
    given = dict(data="imagefolder", data_path="x", tokenizer="pixel", model=model, img_size=32, patch_size=4)
    config = resolve(given).model.build()
    row = MAR_CONFIGS[model]
    published = model in ("mar_base", "mar_large", "mar_huge")
    wanted = (12, 1536) if published else (row.diffloss_d, row.diffloss_w)
    assert (config.diffloss_d, config.diffloss_w) == wanted
    assert resolve(given | dict(diffloss_w=77)).model.build().diffloss_w == 77
    if not published:
        with torch.device("meta"):
            assert sum(p.numel() for p in MAR(config).diffloss.parameters()) < 1e7


def test_the_start_says_how_large_the_model_is(tmp_path, capsys):
    assert train(tmp_path, "--learn", "order") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mar_tiny: ")]
    sizes = r"mar_tiny: transformer 0\.\d+ M parameters, token head 0\.\d+ M, policy heads 0\.\d+ M"
    assert re.fullmatch(sizes + r"; unmasked attention: \w+", line)


def test_pictures_that_no_run_has_made_are_left_alone(tmp_path):
    """A folder of one's own in the place of a setting's: refused, nothing removed."""
    (tmp_path / "0.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="0.png and no run.json"):
        prepare_folder(tmp_path, {"labels": [0]})
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    (tmp_path / "run.json").write_text("an earlier run's")
    prepare_folder(tmp_path, {"labels": [0]})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_an_autoencoder_of_another_origin_is_not_replaced(tmp_path, capsys):
    (tmp_path / "autoencoder").mkdir()
    flags = ["--data", "digits", "--img_size", "8", "--stride", "2", "--output_dir", str(tmp_path)]
    assert run_main(train_tokenizer.main, flags) == 2
    assert "autoencoder is not of a run in this folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["autoencoder"]


def test_an_output_file_replaces_no_input_and_nothing_of_another_kind(tmp_path, capsys):
    """The table and the picture of before may be made again."""
    results, notes, log = tmp_path / "results.jsonl", tmp_path / "notes.png", tmp_path / "x.npz"
    line = {"settings": {"seed": 1, "cfg": 1.0}, "metrics": {"fid": 1.0}, "mar_evals": 2.0, "mlp_evals": 3.0}
    results.write_text(json.dumps(line) + "\n")
    for file in (notes, log):
        file.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    digits = ["--data", "digits", "--features", "digits"]
    refused = [
        (make_table.main, [results, "--csv", results]),
        (make_table.main, [results, "--csv", notes]),
        (make_table.main, [results, "--plot", notes]),
        (plot_training.main, [tmp_path, "--out", notes]),
        (plot_training.main, [tmp_path, "--out", results]),
        (make_fid_stats.main, [*digits, "--out", log]),
        (train_classifier.main, ["--epochs", "1", "--output", log]),
    ]
    for main, argv in refused:
        assert run_main(main, [*map(str, argv)]) == 2, argv
        assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for _ in range(2):
        table = [results, "--csv", tmp_path / "t.csv", "--plot", tmp_path / "t.png"]
        assert run_main(make_table.main, [*map(str, table)]) == 0
        assert run_main(make_fid_stats.main, [*map(str, [*digits, "--out", tmp_path / "s.npz"])]) == 0


def test_a_warning_is_one_line_that_names_a_file_once(tmp_path):
    """Also from the processes that load images, of many names, and of names that break lines."""
    data = image_folder(tmp_path / "data", {"train": 2}) / "train"
    bad = {"bad.png": b"no", "cut.png": (data / "dark" / "0.png").read_bytes()[:60], "a\nb.png": b"no"}
    for name, content in bad.items():
        (data / "dark" / name).write_bytes(content)
    (data / "light" / "gone.png").symlink_to("nothing")
    (data / "stray.png").write_bytes(b"")
    for i in range(8):
        (data / f"empty {i}\n").mkdir()
    flags = "--tokenizer pixel --img_size 8 --num_workers 1 --batch_size 4 --data_path".split()
    command = [sys.executable, cache_latents.__file__, *flags, str(tmp_path / "data"), "--cached_path"]
    done = subprocess.run([*command, str(tmp_path / "c")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    said = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "\x1b" not in line]
    said = [re.sub(r"^.*\d+%\|.*?\]", "", line) for line in said]  # bars of progress
    said = [line for line in said if line.strip()]
    assert len(said) == 6 and all(line.startswith("warning: ") and line.count(str(data)) == 1 for line in said)
    for name in ("bad.png (", "cut.png (", "a\\nb.png (", "gone.png (", "3 more", "1 images outside"):
        assert sum(name in line for line in said) == 1, name


def test_a_librarys_warning_is_one_line_too_inside_a_program(capsys):
    before = warnings.formatwarning
    said = []
    for code in (0, 2):

        def main(argv, code=code):
            said.append(warnings.formatwarning("two\n lines", UserWarning, "x.py", 3))
            if code:
                raise OSError("a disk")
            return 0

        assert run_main(main) == code and warnings.formatwarning is before
    assert said == ["warning: two lines\n"] * 2
