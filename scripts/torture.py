"""Kill runs without warning, again and again, and compare their files with those of uninterrupted runs.

    python scripts/torture.py                     # everything, 20 kills each
    python scripts/torture.py --what train --kills 100 --seed 1

Each program of the table SCENARIOS is started as a process of its own, gets SIGKILL at a random moment, in a third of
the cases while it is writing a file, and is started again with the same command, until it is finished. Its files must
then be, bit for bit, those of one uninterrupted run. `two` is training by two processes, one of which is killed: the
other must end with an error within a minute. Everything runs on the CPU and needs no network.
"""

import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import torch

from util.args import flag, make_parser
from util.checkpoint import load_checkpoint
from util.door import run_main
from util.images.folders import check_output_folder

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds within which the other process must end
AIMED = 1 / 3  # share of the kills that wait for a file to be written
TIMING = {"seconds", "images_per_second", "num_made", "mar_evals", "mlp_evals"}  # they depend on when a run was killed


@dataclass(frozen=True)
class TortureArgs:
    """The flags."""

    what: str = flag("all", "comma list of train, sample, sweep, cache, two; or all")
    kills: int = flag(20, "kills in each of them", low=1)
    epochs: int = flag(6, "epochs of the digits that are trained", low=1)
    num_images: int = flag(600, "images that are sampled", low=8)
    seed: int = flag(0, "of the moments", low=0, high=2**63 - 1)
    work_dir: str | None = flag(None, "empty folder to work in (default: a temporary one, removed afterwards)")
    dry_run: bool = flag(False, "print the commands and stop")


# -------------------------------------------------------------------------------------- differences of two results


def differences(a, b, where: str = "") -> list[str]:
    """A line for each place at which two nests of dicts, lists and tensors are not bitwise the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        lines = [f"{where}/{key} is in one only" for key in sorted(map(str, a.keys() ^ b.keys()))]
        for key in a.keys() & b.keys():
            lines += differences(a[key], b[key], f"{where}/{key}")
        return lines
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b)) for line in differences(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [f"{where} differs"]


def file_differences(a: Path, b: Path, suffixes=(".png", ".npz", ".npy", ".json", ".jsonl"), skip=()) -> list[str]:
    """Files below two folders that are not in both, or not byte by byte the same."""
    names_a, names_b = (
        {str(f.relative_to(folder)) for f in folder.rglob("[!.]*") if f.suffix in suffixes and f.name not in skip}
        for folder in (a, b)
    )
    lines = [f"{name} is in one only" for name in sorted(names_a ^ names_b)]
    for name in sorted(names_a & names_b):
        if (a / name).read_bytes() != (b / name).read_bytes():
            lines.append(f"{name} differs")
    return lines


def compare_training(a: Path, b: Path) -> list[str]:
    """Compare weights, averages, optimizer and step; log.jsonl; pictures."""
    contents = [{k: v for k, v in load_checkpoint(folder).items() if k != "args"} for folder in (a, b)]
    return differences(*contents) + file_differences(a, b)


def compare_sampling(a: Path, b: Path) -> list[str]:
    """Compare all pictures and arrays, and the rows of results.jsonl without TIMING."""
    rows = []
    for folder in (a, b):
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        rows.append([{k: v for k, v in row.items() if k not in TIMING} for row in lines])

    return differences(*rows, "results.jsonl") + file_differences(a, b, skip=("results.jsonl",))


# -------------------------------------------------------------------------------------- the scenarios


@dataclass(frozen=True)
class Scenario:
    """A program, its flags for a folder, and the comparison of two finished folders."""

    program: str
    flags: Callable[[TortureArgs, Path, Path], list]  # (args, work, folder)
    compare: Callable[[Path, Path], list[str]]
    processes: int = 1


def train_flags(args, work, folder):
    small = ["--batch_size", 128, "--diffusion_batch_mul", 1, "--num_iter", 4, "--num_sampling_steps", 5]
    return ["--preset", "digits", "--epochs", args.epochs, *small, "--warmup_epochs", 1, "--save_last_freq", 1,
            "--eval_freq", 2, "--device", "cpu", "--output_dir", folder, "--resume", folder]  # fmt: skip


def sample_flags(args, work, folder):
    return ["--checkpoint", work / "model", "--output_dir", folder, "--num_images", args.num_images, "--eval_bsz", 20,
            "--metrics", "none", "--device", "cpu"]  # fmt: skip


def sweep_flags(args, work, folder):
    lists = ["--cfg", "1,1.5", "--order", "random,halton", "--num_images", args.num_images // 4]
    return [*sample_flags(args, work, folder), *lists]


def cache_flags(args, work, folder):
    return ["--data", "digits", "--img_size", 8, "--tokenizer", f"diffusers:{work / 'autoencoder'}", "--batch_size", 8,
            "--shard_size", 64, "--num_workers", 0, "--device", "cpu", "--cached_path", folder]  # fmt: skip


SCENARIOS = {
    "train": Scenario("main_mar.py", train_flags, compare_training),
    "sample": Scenario("sample.py", sample_flags, compare_sampling),
    "sweep": Scenario("sample.py", sweep_flags, compare_sampling),
    "cache": Scenario("scripts/cache_latents.py", cache_flags, file_differences),
    "two": Scenario("main_mar.py", train_flags, compare_training, processes=2),
}


def prepare(names, args: TortureArgs, work: Path) -> None:
    """Import modules that the forked processes share; make the model and the autoencoder that they need."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # AdamW looks for a GPU that has begun even on the CPU, and a fork has none
    torch.set_num_threads(1)
    from torch.utils import tensorboard  # noqa: F401

    import engine_mar  # noqa: F401

    if {"sample", "sweep"} & set(names):
        brief = TortureArgs(epochs=1)
        run_through([start("main_mar.py", train_flags(brief, work, work / "model"), work / "model.txt")], "the model")
    if "cache" in names:
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        sizes = dict(in_channels=1, out_channels=1, latent_channels=2, norm_num_groups=4, block_out_channels=(8, 8))
        blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
        AutoencoderKL(**sizes, **blocks).save_pretrained(work / "autoencoder")


# -------------------------------------------------------------------------------------- lives and deaths


def start(program: str, flags, log: Path, environment=None):
    """Run a program of the repository in a process forked from this one, its output added to the file `log`."""
    arguments = (str(ROOT / program), [str(part) for part in flags], log, environment or {})
    process = multiprocessing.get_context("fork").Process(target=_live, args=arguments, daemon=True)
    process.start()
    return process


def _live(program, flags, log, environment):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")


def start_all(name: str, args, work: Path, folder: Path) -> list:
    """All processes of a scenario, which meet at a free port."""
    scenario, log = SCENARIOS[name], folder.with_suffix(".txt")
    flags = scenario.flags(args, work, folder)
    if scenario.processes == 1:
        return [start(scenario.program, flags, log)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(scenario.processes))
    ranks = range(scenario.processes)
    return [start(scenario.program, flags, log, meeting | dict(RANK=str(i), LOCAL_RANK=str(i))) for i in ranks]


def run_through(processes, what: str) -> None:
    """Wait for them; ValueError unless all end well."""
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise ValueError(f"{what} ended with exit code {', '.join(map(str, codes))}")


def unfinished(folder: Path, pid: int) -> bool:
    """Has this process a temporary file in the folder?"""
    return any(f.name.startswith(".") and f.name.endswith(f".{pid}.tmp") for f in folder.rglob(".*"))


def kill_one(processes, folder: Path, draws: random.Random, seconds: float) -> tuple[bool, bool, float]:
    """Kill one of the processes at a random moment: (was it alive, was it writing, seconds until the others ended).

    A run of which any process ended well counts as ended: the kill met what was left to do after its last file.
    """
    victim = draws.choice(processes)
    if len(processes) > 1:
        # Wait for a training step: before the processes meet, only a launcher would notice that one is missing.
        log = folder / "log.jsonl"
        size = log.stat().st_size if log.is_file() else 0
        while victim.is_alive() and not (log.is_file() and log.stat().st_size not in (0, size)):
            victim.join(0.01)
    victim.join(draws.uniform(0, seconds))
    if draws.random() < AIMED:
        writer = processes[0]
        while victim.is_alive() and not unfinished(folder, writer.pid):
            victim.join(0.0005)
    victim.kill()
    victim.join()
    began = time.perf_counter()
    others = [process for process in processes if process is not victim]
    for process in others:
        process.join(PATIENCE)
    for process in others:
        if process.exitcode is None:
            process.kill()
            raise ValueError(f"{folder}: a process was still waiting {PATIENCE} seconds after the other was killed")
    codes = [process.exitcode for process in others]
    if victim.exitcode == 0 and any(codes):
        raise ValueError(f"{folder}: a process ended with exit code {max(codes)} after the other had ended well")
    if 0 in (victim.exitcode, *codes):  # one says that all is well: then the files are compared
        return False, False, 0.0
    if victim.exitcode != -9:
        raise ValueError(f"{folder} ended with exit code {victim.exitcode}; what it said is in {folder}.txt")
    return True, unfinished(folder, victim.pid), time.perf_counter() - began


def torture(name: str, args: TortureArgs, work: Path) -> bool:
    """Kill a scenario args.kills times, print a line about it; are the results those of an uninterrupted run?"""
    scenario, draws = SCENARIOS[name], random.Random(f"{args.seed} {name}")
    whole = work / name / "whole"
    whole.parent.mkdir()
    began = time.perf_counter()
    run_through(start_all(name, args, work, whole), f"the uninterrupted {name}")
    seconds = time.perf_counter() - began
    longest_life = seconds * min(1, 2 / args.epochs)  # two epochs of training, so that a life may save a checkpoint
    kills, kills_while_writing, longest_wait, folders = 0, 0, 0.0, [work / name / "run0"]
    while True:
        processes = start_all(name, args, work, folders[-1])
        if kills == args.kills:
            run_through(processes, str(folders[-1]))
            break
        killed, was_writing, waited = kill_one(processes, folders[-1], draws, longest_life)
        longest_wait = max(longest_wait, waited)
        if killed:
            kills += 1
        else:  # the run ended before the kill: kill another one
            folders.append(work / name / f"run{len(folders)}")
        if was_writing:
            kills_while_writing += 1
    wrong = [f"{folder}: {line}" for folder in folders for line in scenario.compare(whole, folder)]
    summary = f"{name:7} {kills} kills survived, {kills_while_writing} of them while writing a file; "
    summary += f"{len(folders)} runs finished, "
    summary += f"{len(wrong)} DIFFERENCES" if wrong else "all bit for bit as without"
    if scenario.processes > 1:
        summary += f"; the other process ended within {longest_wait:.1f} s"
    print(f"{summary} ({seconds:.0f} s)", *wrong[:10], sep="\n  ", flush=True)
    return not wrong


def main(argv=None) -> int:
    """Parse, kill; 0 if all results are those of uninterrupted runs, else 1."""
    args = TortureArgs(**vars(make_parser("torture.py", __doc__.splitlines()[0], TortureArgs).parse_args(argv)))
    names = list(SCENARIOS) if args.what == "all" else args.what.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise ValueError(f"unknown --what {name!r}; valid: {', '.join(SCENARIOS)}, all")
    if args.work_dir is not None and Path(args.work_dir).is_dir() and any(Path(args.work_dir).iterdir()):
        raise ValueError(f"--work_dir {args.work_dir} is not empty")
    if args.work_dir is not None:
        check_output_folder("work_dir", args.work_dir)
    if args.dry_run:
        work = Path(args.work_dir or "WORK")
        commands = {n: [SCENARIOS[n].program, *map(str, SCENARIOS[n].flags(args, work, work / n))] for n in names}
        print(json.dumps({**asdict(args), "commands": commands}, indent=2))
        return 0
    with tempfile.TemporaryDirectory(prefix="torture") as temporary:
        work = Path(args.work_dir or temporary).absolute()
        work.mkdir(parents=True, exist_ok=True)
        prepare(names, args, work)
        same = [torture(name, args, work) for name in names]  # all of them run, also after a difference
        return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(run_main(main))
