"""Command lines: MAR's own, presets, every command in README, docs and scripts (bad input: test_bad_*.py)."""

import json
import re
import shlex
from pathlib import Path

import pytest

import main_mar
import sample
from heads.policy import INFER_MODES
from scripts import (
    ablate_norms,
    bench,
    bench_attention,
    bench_ids,
    bench_scales,
    bench_training,
    cache_latents,
    cache_text,
    demo_shapes,
    demo_text,
    export_weights,
    plot_training,
    torture,
    train_classifier,
    train_tokenizer,
)
from tests.helpers_text import random_prompts
from tests.test_sample import train_tiny
from util.door import run_main

ROOT = Path(__file__).resolve().parents[1]
# those with --dry_run
SCRIPTS = (
    ablate_norms,
    bench,
    bench_attention,
    bench_ids,
    bench_scales,
    bench_training,
    cache_latents,
    cache_text,
    demo_shapes,
    demo_text,
    export_weights,
    plot_training,
    torture,
    train_classifier,
    train_tokenizer,
)
PROGRAMS = {Path(module.__file__).name: module.main for module in (main_mar, sample, *SCRIPTS)}


def dry(capsys, *flags) -> dict:
    """What `main_mar.py --dry_run` prints for these flags."""
    capsys.readouterr()
    assert main_mar.main([*map(str, flags), "--dry_run"]) == 0
    return json.loads(capsys.readouterr().out)


# -------------------------------------------------------------------------------------- MAR's commands and defaults

PUBLISHED_DEFAULTS = dict(
    batch_size=16, epochs=400, model="mar_large", img_size=256, vae_embed_dim=16, vae_stride=16, patch_size=1,
    num_iter=64, num_images=50000, cfg=1.0, label_drop_prob=0.1, eval_freq=40, save_last_freq=5, online_eval=False,
    evaluate=False, eval_bsz=64, weight_decay=0.02, grad_checkpointing=False, blr=1e-4, min_lr=0.0,
    lr_schedule="constant", warmup_epochs=100, ema_rate=0.9999, mask_ratio_min=0.7, grad_clip=3.0, attn_dropout=0.1,
    proj_dropout=0.1, buffer_size=64, diffloss_d=12, diffloss_w=1536, num_sampling_steps=100, diffusion_batch_mul=1,
    temperature=1.0, class_num=1000, seed=1, resume="", start_epoch=0, num_workers=10, pin_mem=True, world_size=1,
    local_rank=-1, dist_on_itp=False, dist_url="env://", use_cached=False, cached_path="", output_dir="./output_dir",
    cfg_schedule="linear",
)  # fmt: skip
ISSUE_FLAGS = """
    --batch_size --epochs --model --img_size --vae_path --vae_embed_dim --vae_stride --patch_size --num_iter
    --num_images --cfg --cfg_schedule --label_drop_prob --eval_freq --save_last_freq --online_eval --evaluate
    --eval_bsz --weight_decay --grad_checkpointing --lr --blr --min_lr --lr_schedule --warmup_epochs --ema_rate
    --mask_ratio_min --grad_clip --attn_dropout --proj_dropout --buffer_size --diffloss_d --diffloss_w
    --num_sampling_steps --diffusion_batch_mul --temperature --data_path --class_num --output_dir --resume --seed
    --start_epoch --num_workers --use_cached --cached_path --log_dir --pin_mem --no_pin_mem --world_size --local_rank
    --dist_url --dist_on_itp --preset --dtype --compile --accum_iter --device --dry_run --data --tokenizer
""".split()
TRAIN = """
    --img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 --vae_stride 16 --patch_size 1
    --model mar_large --diffloss_d 3 --diffloss_w 1024 --epochs 400 --warmup_epochs 100 --batch_size 64 --blr 1.0e-4
    --diffusion_batch_mul 4 --output_dir OUT --resume OUT --data_path IMAGENET
"""
EVALUATE = """
    --model {0} --diffloss_d {1} --diffloss_w {2} --eval_bsz 256 --num_images 50000 --num_iter 256
    --num_sampling_steps 100 --cfg {3} --cfg_schedule linear --temperature 1.0
    --output_dir pretrained_models/mar/{0} --resume pretrained_models/mar/{0} --data_path IMAGENET --evaluate
"""
PUBLISHED_COMMANDS = {
    "train": TRAIN,
    "train_online_eval": TRAIN + "--online_eval",
    "train_grad_checkpointing": TRAIN + "--grad_checkpointing",
    "train_cached": TRAIN + "--use_cached --cached_path CACHED",
    "evaluate_base": EVALUATE.format("mar_base", 6, 1024, 2.9),
    "evaluate_large": EVALUATE.format("mar_large", 8, 1280, 3.0),
    "evaluate_huge": EVALUATE.format("mar_huge", 12, 1536, 3.2),
}


def given_flags(command: str) -> dict:
    """{"model": "mar_large", "evaluate": True, …} from the text of a command, by its look alone."""
    parts = [part.split(None, 1) for part in re.split(r"(?:^|\s)--", command)[1:]]
    return {part[0]: part[1].strip() if len(part) > 1 else True for part in parts}


def same(value, expected) -> bool:
    """Is a resolved value what a command line says? Numbers compare as numbers, however they are spelled."""
    if isinstance(expected, bool) or isinstance(value, bool):
        return value is expected
    try:
        return float(value) == float(expected)
    except (TypeError, ValueError):
        return value == expected


def assert_published(values: dict, given: dict):
    """Every flag has the value given, or else MAR's default."""
    assert values["infer_mode"] == "baseline" and INFER_MODES["baseline"] == ("random", "cosine", "constant", "linear")
    values = {**values, "cfg_schedule": values["cfg_schedule"] or "linear"}  # None is the inference mode's
    wrong = {k: values[k] for k, v in {**PUBLISHED_DEFAULTS, **given}.items() if not same(values[k], v)}
    assert not wrong


@pytest.mark.parametrize("command", PUBLISHED_COMMANDS.values(), ids=PUBLISHED_COMMANDS)
def test_mars_commands_mean_what_they_meant(capsys, command):
    values = dry(capsys, *command.split())
    given = given_flags(command)
    assert len(given) > 10
    assert_published(values, given)
    assert (values["preset"], values["data"], values["tokenizer"]) == (None, "imagefolder", "kl16")
    assert values["solver"] == "ddpm"
    assert not any(values[rule] for rule in ("order", "group", "tau_schedule"))
    assert values["lr"] == pytest.approx(1e-4 * values["batch_size"] / 256)
    assert values["accum_iter"] == 1 and not values["mask_ratio_per_image"] and not values["init_from"]


@pytest.mark.parametrize("model, sizes", [("base", (768, 12, 12)), ("large", (1024, 16, 16)), ("huge", (1280, 20, 16))])
def test_mars_sizes(capsys, model, sizes):
    mar = dry(capsys, *PUBLISHED_COMMANDS[f"evaluate_{model}"].split())["mar"]
    for part in ("encoder", "decoder"):
        assert (mar[f"{part}_embed_dim"], mar[f"{part}_depth"], mar[f"{part}_num_heads"]) == sizes
    given = given_flags(PUBLISHED_COMMANDS[f"evaluate_{model}"])
    assert (mar["diffloss_d"], mar["diffloss_w"]) == (int(given["diffloss_d"]), int(given["diffloss_w"]))
    assert (mar["class_num"], mar["buffer_size"], mar["mlp_ratio"]) == (1000, 64, 4.0)


@pytest.mark.parametrize("name", ["evaluate_base", "train_grad_checkpointing"])
def test_the_published_autoencoder_is_the_default(capsys, name):
    """MAR's evaluation commands do not pass --vae_path."""
    assert dry(capsys, *PUBLISHED_COMMANDS[name].split())["vae_path"] == "pretrained_models/vae/kl16.ckpt"


def test_every_flag_of_mar_exists(capsys):
    with pytest.raises(SystemExit) as stop:
        main_mar.main(["--help"])
    assert stop.value.code == 0
    shown = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert not set(ISSUE_FLAGS) - shown


def test_pin_mem_can_be_said_both_ways(capsys):
    assert dry(capsys, "--pin_mem")["pin_mem"] is True
    assert dry(capsys, "--no_pin_mem")["pin_mem"] is False


# ---------------------------------------------------------------------------------------------------------- presets


def test_no_flags_at_all_are_the_digits(capsys):
    values = dry(capsys)
    assert values == dry(capsys, "--preset", "digits") == dry(capsys, "--data", "digits")
    assert (values["data"], values["model"], values["tokenizer"]) == ("digits", "mar_tiny", "pixel")
    assert (values["img_size"], values["patch_size"], values["vae_stride"]) == (8, 1, 1)  # 64 tokens of one pixel
    assert (values["features"], values["num_images"]) == ("digits", 1800)


@pytest.mark.parametrize("name, size, channels", [("cifar10", 32, 3), ("mnist", 28, 1), ("fashion_mnist", 28, 1)])
def test_naming_the_data_implies_its_preset(capsys, name, size, channels):
    values = dry(capsys, "--data", name)
    assert values == dry(capsys, "--preset", name)
    assert (values["preset"], values["data"], values["tokenizer"]) == (name, name, "pixel")
    assert (values["img_size"], values["vae_embed_dim"]) == (size, channels)


def test_a_flag_by_hand_beats_the_preset_and_leaves_the_rest_of_it(capsys):
    preset = dry(capsys, "--preset", "digits")
    by_hand = dict(epochs=7, diffloss_w=48, cfg=1.25, num_iter=5, lr_schedule="constant", attn_dropout=0.2)
    values = dry(capsys, *(text for k, v in by_hand.items() for text in (f"--{k}", v)), "--preset", "digits")
    changed = {k: v for k, v in values.items() if v != preset[k]}
    mar = changed.pop("mar")
    assert changed == by_hand and all(preset[k] != v for k, v in by_hand.items())
    assert (mar["diffloss_w"], mar["attn_dropout"]) == (48, 0.2)


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_a_published_preset_is_the_published_model(capsys, name):
    values = dry(capsys, "--preset", name)
    given = given_flags(PUBLISHED_COMMANDS[name.replace("mar_", "evaluate_")])
    for key in ("model", "diffloss_d", "diffloss_w", "cfg", "num_iter", "num_sampling_steps", "temperature"):
        assert same(values[key], given[key]), key
    assert (values["data"], values["tokenizer"], values["img_size"]) == ("imagefolder", "kl16", 256)


@pytest.mark.parametrize("flags", ["--model mar_base", "--data_path X", "--vae_path X", "--use_cached"])
def test_what_mars_commands_pass_implies_the_image_folder(capsys, flags):
    values = dry(capsys, *flags.split())
    assert (values["preset"], values["data"], values["tokenizer"]) == (None, "imagefolder", "kl16")
    assert_published(values, given_flags(flags))


def test_the_image_folder_works_in_pixels_too(capsys):
    values = dry(capsys, *"--data imagefolder --data_path X --tokenizer pixel --img_size 32 --patch_size 2".split())
    assert (values["vae_stride"], values["vae_embed_dim"], values["data"]) == (1, 3, "imagefolder")


@pytest.mark.parametrize("flags", ["", "--data cifar10", "--preset mar_base", TRAIN])
def test_defaults_spelled_out_are_the_same_run(capsys, flags):
    """Whatever --dry_run prints can be given back as flags and changes nothing."""
    values = dry(capsys, *flags.split())
    spelled = []
    for name, value in values.items():
        if isinstance(value, bool):
            spelled.append(f"--{name}" if value else f"--no_{name}")
        elif name != "mar" and value not in (None, ""):  # which are spelled by leaving the flag out
            spelled += [f"--{name}", str(value)]
    assert dry(capsys, *(text for text in spelled if text != "--no_dry_run")) == values


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.chdir(tmp_path)
    dry(capsys, "--output_dir", "out", "--log_dir", "log", "--data", "cifar10", "--online_eval")
    before = sorted(checkpoint.rglob("*"))
    assert sample.main(["--checkpoint", str(checkpoint), "--output_dir", "samples", "--dry_run"]) == 0
    json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir()) and sorted(checkpoint.rglob("*")) == before


def test_flags_of_sampling_are_checked_before_there_is_a_checkpoint(capsys):
    """As quickstart.sh does before it trains."""
    flags = "--dry_run --infer_mode policy,both --seed 1,2 --num_images 600 --features digits --metrics fid".split()
    assert sample.main(flags) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["infer_mode"] == ["policy", "both"] and shown["num_images"] == 600 and shown["checkpoint"] is None
    assert "'0'" in refused(sample.main, [*flags, "--num_images", "0"], capsys)
    assert "need 2 images, got 1" in refused(sample.main, [*flags, "--num_images", "1"], capsys)
    assert "--order confidence" in refused(sample.main, ["--dry_run", "--confidence_noise", "3"], capsys)


# ------------------------------------------------------------------------------ commands in README, docs and scripts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("checkpoint"), "--batch_size", 600)


def shell_lines(path: Path) -> list[str]:
    """Lines of a script, or of the bash blocks of a README, those ending in a backslash joined."""
    text = path.read_text()
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, flags=re.M | re.S))
    return re.sub(r"\\\n\s*", " ", text).splitlines()


BEFORE_COMMANDS = ("do", "then", "if", "time", "exec", "$", "run", "into")  # the last with the file that it writes
# shell variables that stand for no number
TEXTS = {"preset": "digits", "model": "mar_base", "mode": "baseline", "range": "2,4"}


def commands_in(line: str) -> list[tuple[str, list[str]]]:
    """(program, its arguments) for each call of main_mar.py or sample.py in a line of shell."""
    if not any(name in line for name in PROGRAMS):
        return []
    line = re.sub(r'"?\$(?:@|\{@:\d+\}|\{\w+\[@\]\})"?', "", line)  # "$@", "${@:4}", "${array[@]}"
    for name, value in TEXTS.items():
        line = re.sub(rf'"?\$\{{?{name}\b\}}?"?', value, line)
    line = re.sub(r"\$\([^()]*\)|\$\{\w+[^}]*\}|\$\w+", "1", line)  # $(command), ${NAME}, $NAME: a number fits anywhere
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    calls, words = [], []
    for word in [*lexer, ";"]:
        if not set(word) <= set("();<>|&"):
            words.append(word)
            continue
        while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in BEFORE_COMMANDS):
            del words[: 2 if words[0] == "into" else 1]
        at = next((i for i, w in enumerate(words) if Path(w).name in PROGRAMS), None)
        if at is not None and re.fullmatch(r"python[\d.]*|torchrun|.*\.py", Path(words[0]).name):  # an array before it
            calls.append((Path(words[at]).name, words[at + 1 :]))
        words = []
    return calls


FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("scripts/*.sh"))]
COMMANDS = [
    (path.relative_to(ROOT), program, arguments)
    for path in FILES
    if path.is_file()
    for line in shell_lines(path)
    for program, arguments in commands_in(line)
]


def test_the_reader_of_shell_finds_commands():
    line = 'X=1 Y=2 torchrun --nnodes=2 --rank=${R:-0} main_mar.py --cfg "$w" --x "a b" "$@" | tee log'
    line += ' && python3 ./sample.py "${more[@]}" --y $(date) # main_mar.py'
    assert commands_in(line) == [("main_mar.py", ["--cfg", "1", "--x", "a b"]), ("sample.py", ["--y", "1"])]
    assert commands_in("# Arguments go to main_mar.py: bash x") == commands_in("cat main_mar.py") == []


def test_the_quickstarts_commands_were_found():
    found = [c[1] for c in COMMANDS if c[0] == Path("scripts/quickstart.sh")]
    assert found == ["main_mar.py"] * 2 + ["sample.py"] * 3 + ["train_classifier.py"]
    if FILES[0].is_file():
        assert {c[1] for c in COMMANDS if c[0] == Path("README.md")} >= {"main_mar.py", "sample.py"}


@pytest.mark.parametrize("path, program, arguments", COMMANDS, ids=[f"{c[0]}:{c[1]}" for c in COMMANDS])
def test_every_command_shown_is_valid(path, program, arguments, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if program in (
        "sample.py",
        "export_weights.py",
    ):  # a tiny checkpoint stands in for the one that is named, whose sizes do not fit it
        monkeypatch.setattr("models.loading._check_given", lambda *a, **k: None)
        monkeypatch.setattr("sample.check_asked", lambda *a, **k: None)
        monkeypatch.setattr("sample.open_prefix", lambda *a, **k: None)
        monkeypatch.setattr("sample.open_prompts", lambda *a, **k: random_prompts(40))
        at = next((i for i, word in enumerate(arguments) if word.startswith("--checkpoint")), None)
        if at is not None:  # quickstart.sh gives it later
            arguments = [*arguments[:at], *arguments[at + (2 if arguments[at] == "--checkpoint" else 1) :]]
        arguments = [*arguments, "--checkpoint", str(checkpoint)]
    monkeypatch.setattr("heads.searched.read_schedule", lambda path: {"values": {"cfg": [2.0]}})  # for one to be made
    capsys.readouterr()
    assert PROGRAMS[program]([*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- bad input

TINY = "--preset digits --epochs 1 --batch_size 600 --diffloss_w 16 --diffloss_d 1 --diffusion_batch_mul 1"
TINY = f"{TINY} --buffer_size 2 --num_iter 2 --num_sampling_steps 2 --output_dir {{out}}".split()


@pytest.fixture
def places(checkpoint, tmp_path):
    """A good checkpoint, and a folder that is not there."""
    return {"good": str(checkpoint), "out": str(tmp_path / "out")}


def refused(main, argv, capsys) -> str:
    """The one line on stderr of a command that must end with code 2."""
    capsys.readouterr()
    try:
        code = run_main(main, argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 2, f"exit code {code}"
    assert len(lines) == 1, lines
    return lines[0]


def files(folder) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


@pytest.mark.parametrize("missing", ["checkpoint", "output_dir"])
def test_sampling_needs_both_places(missing, places, capsys):
    given = {"checkpoint": places["good"], "output_dir": places["out"]}
    del given[missing]
    assert f"--{missing}" in refused(sample.main, [text for k, v in given.items() for text in (f"--{k}", v)], capsys)
    assert not Path(places["out"]).exists()


def test_no_gpu_here_is_one_line(places, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = [word.format(**places) for word in [*TINY, "--device", "cuda"]]
    assert "'cuda'" in refused(main_mar.main, argv, capsys)
    argv = ["--checkpoint", places["good"], "--output_dir", places["out"], "--device", "cuda"]
    assert "'cuda'" in refused(sample.main, argv, capsys)
    assert not Path(places["out"]).exists()


def test_many_class_labels_are_no_trouble(checkpoint, tmp_path):
    """The list may be longer than a file name can be."""
    labels = ",".join(["1"] * 300)
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), "--class_labels", labels]
    assert sample.main([*flags, *"--num_images 4 --metrics none --num_sampling_steps 2".split()]) == 0
    assert len(list(tmp_path.glob("*/3.png"))) == 1


def test_unconditional_first_in_a_list_of_labels(checkpoint, tmp_path):
    """`--class_labels -1,3`: argparse must not take the value for a flag."""
    flags = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), "--class_labels", "-1,3", "--dry_run"]
    assert sample.main(flags) == 0
