"""Every program on a device that refuses what a GPU refuses (`helpers_device`), on any machine; its waits counted."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch

import main_mar
import sample
from heads.policy import build_rules
from models.tokenizers import build_tokenizer
from sampling.loop import generate
from sampling.run import Parts
from scripts import bench, bench_scales, bench_training, search_schedule, train_tokenizer
from tests.helpers import tiny_mar
from tests.helpers_causal import tiny_ar, tiny_gpt
from tests.helpers_device import DEVICE, FarTensor, near, pretended
from tests.helpers_diffusion import CLIP
from tests.helpers_maskgil import tiny_maskgil
from tests.helpers_var import tokenizer as scales_tokenizer
from tests.test_sample import rows
from tests.test_var import tiny as tiny_var
from training.describe import KERNELS, attention_kernel
from util import dist
from util.images.pictures import read_png

TINY = "--preset digits --patch_size 2 --epochs 1 --diffloss_w 16 --diffloss_d 1 --buffer_size 2".split()
TINY += "--diffusion_batch_mul 1 --batch_size 1200 --num_images 20 --num_iter 2 --num_sampling_steps 2".split()
TINY += "--eval_freq 1000 --dtype fp32".split()
PICTURES = "--infer_mode both --num_iter 3 --num_images 40 --num_sampling_steps 6 --solver dpmpp --dtype fp32".split()


@pytest.fixture
def pretence(monkeypatch):
    with pretended(monkeypatch) as counter:
        yield counter


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def waits(request):
    """The waits for the device that programs pick by themselves; None where it is real and nobody counts."""
    if request.param == "pretended":
        return request.getfixturevalue("pretence")
    return None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with heads, made on the CPU."""
    folder = tmp_path_factory.mktemp("trained")
    heads = "--learn order,group,tau,cfg --train_num_iter 2,4".split()
    assert main_mar.main([*TINY, *heads, "--output_dir", str(folder), "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def pictured(trained, tmp_path_factory):
    """A folder of pictures made on the CPU."""
    folder = tmp_path_factory.mktemp("pictured")
    assert sample.main(["--checkpoint", str(trained), "--output_dir", str(folder), "--device", "cpu", *PICTURES]) == 0
    return folder


# ---------------------------------------------------------------------------------------------------- the device itself


def test_host_and_device_do_not_mix(pretence):
    torch.arange(3.0).to(DEVICE)  # the host waits for this copy, not for the next
    assert pretence.total() == 1
    far = torch.arange(3.0).to(DEVICE, non_blocking=True)
    assert isinstance(far, FarTensor) and far.device == DEVICE
    for mixed in (
        lambda: far + torch.ones(3),
        lambda: torch.stack([far, torch.ones(3)]),
        lambda: far.index_select(0, torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError, match="on one device"):
            mixed()
    assert pretence.total() == 1
    assert torch.equal((far + torch.tensor(1.0) + 1).cpu(), torch.tensor([2.0, 3.0, 4.0])) and pretence.total() == 2
    assert torch.equal(far[torch.tensor([2])].cpu(), torch.tensor([2.0])) and pretence.total() == 4  # the index too
    assert far.sum().item() == 3.0 and (far > 1).nonzero().shape == (1, 1) and pretence.total() == 6


def test_gradients_on_it_are_those_of_the_cpu(monkeypatch):
    torch.manual_seed(0)
    module, x = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 1)), torch.randn(4, 5)
    module(x).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    with pretended(monkeypatch):
        module.to(DEVICE)
        module(x.to(DEVICE)).square().sum().backward()
    for parameter, value in zip(module.parameters(), expected):
        torch.testing.assert_close(near(parameter.grad), value)


def test_a_part_on_another_device_is_found_where_parts_are_put_together(pretence):
    model, tokenizer = tiny_mar(), build_tokenizer("pixel", channels=1)
    Parts(model, tokenizer, torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="model is on cpu, what it works with is on lazy"):
        Parts(model, tokenizer, DEVICE, torch.float32)
    with pytest.raises(RuntimeError, match="tokenizer is on cpu"):
        Parts(tiny_mar().to(DEVICE), tokenizer, DEVICE, torch.float32)
    Parts(tiny_mar().to(DEVICE), build_tokenizer("pixel", channels=1).to(DEVICE), DEVICE, torch.float32)


# --------------------------------------------------------------------------------------------------------- the programs


@pytest.mark.parametrize(
    "flags",
    [
        "",
        pytest.param(
            "--learn order,group,tau,cfg --train_masks policy --train_num_iter 2,4 --accum_iter 2 --batch_size 600",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--objective image --learn order,group,tau,cfg,profile --bank 32 --init_from {trained} "
            "--no-grad_checkpointing",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "heads", "image"],
)
def test_training_and_its_samples(flags, trained, waits, tmp_path):
    more = flags.format(trained=trained).split()
    assert main_mar.main([*TINY, *more, "--output_dir", str(tmp_path / "out")]) == 0
    assert waits is None or not waits["training/objectives/image.py:listen"]
    assert waits is None or not waits["training/objectives/decisions.py:chosen"]
    assert waits is None or waits["training/step.py:training_step"] == 1  # of the one step


@pytest.mark.parametrize(
    "flags",
    [
        "--infer_mode baseline,both --metrics fid --features digits --save_trace 2",
        "--fast --solver ddim",
        "--order halton --group power --cfg_schedule interval --cfg_profile interval --tau_schedule linear",
        "--infer_mode guidance --heads_adaptive off --refresh_every 2",
    ],
)
def test_sampling_waits_once_a_step(flags, trained, waits, tmp_path):
    call = ["--checkpoint", str(trained), "--output_dir", str(tmp_path), *flags.split(), "--dtype", "fp32"]
    assert sample.main([*call, "--num_iter", "3", "--num_images", "20"]) == 0
    most = 3 * (len(rows(tmp_path)) + flags.count("off"))
    assert waits is None or 0 < waits["sampling/canvas.py:select"] <= most


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("model", [tiny_ar("ce"), tiny_ar("diffusion"), tiny_gpt()], ids=["ids", "latents", "gpt"])
def test_causal_tokens_are_those_of_the_cpu_and_a_step_waits_once(model, guided, waits):
    """With guidance that comes and goes, so that a cache lags behind; ids but for ties."""
    schedule = dict(cfg=2.0, cfg_schedule="interval", cfg_interval="0.3,0.7") if guided else {}
    rules = build_rules("baseline", **model.fixed_rules, **schedule)
    device = dist.pick_device("auto")
    made = [
        generate(deepcopy(model).to(place), torch.tensor([0, -1, 2]), rules, num_steps=3, seeds=[1, 2, 3], clip=CLIP)
        for place in (torch.device("cpu"), device)
    ]
    here, there = (near(tokens).cpu() for tokens in made)
    if here.is_floating_point():
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
    else:
        assert (here == there).float().mean() > 0.9
    assert waits is None or 0 < waits["sampling/canvas.py:select"] <= 16


def test_a_step_that_judges_what_it_drew_waits_for_that_too(waits):
    """By the confidence in the ids drawn, as MaskGIL does."""
    model = tiny_maskgil().to(dist.pick_device("auto"))
    rules = build_rules("baseline", cfg=2.0, order="confidence", group="step_arccos")
    if waits is not None:
        waits.clear()  # of moving the model
    generate(model, torch.tensor([0, 2, -1]), rules, num_iter=4, seeds=[1, 2, 3])
    assert waits is None or waits == {"sampling/canvas.py:select": 4, "sampling/canvas.py:judged": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("model", [tiny_ar("ce"), tiny_ar("diffusion"), tiny_gpt()], ids=["ids", "latents", "gpt"])
def test_causal_models_sample_in_bf16_on_a_gpu(model):
    model = deepcopy(model).to("cuda", torch.bfloat16)
    rules = build_rules("baseline", **model.fixed_rules, cfg=2.0)
    made = generate(model, torch.tensor([0, -1, 2]), rules, num_steps=3, seeds=[1, 2, 3])
    assert made.device.type == "cuda" and made.float().isfinite().all()
    if not made.is_floating_point():
        assert 0 <= int(made.min()) and int(made.max()) < model.config.vocab_size


def scales_of(device: torch.device, dtype: torch.dtype, **schedule) -> torch.Tensor:
    """Ids (3, 30) of a small VAR on the device under autocast to the dtype, one image without a label."""
    rules = build_rules("baseline", order="raster", group="scale", cfg=2.5, **schedule)
    model, tokenizer = tiny_var().to(device), deepcopy(scales_tokenizer()).to(device)
    with dist.autocast(device, dtype):
        ids = generate(model, torch.tensor([0, -1, 2]), rules, seeds=[1, 2, 3], tokenizer=tokenizer)
    assert ids.device.type == device.type
    return near(ids).cpu()


@pytest.mark.parametrize("schedule", ["ramp", "interval"])
def test_scales_are_those_of_the_cpu_and_each_waits_once(schedule, waits):
    """With guidance from the second scale on, or from the third, so that a cache catches up; but for ties."""
    options = dict(cfg_schedule=schedule, cfg_interval="0.1,1")
    here, there = (
        scales_of(place, torch.float32, **options) for place in (torch.device("cpu"), dist.pick_device("auto"))
    )
    assert (here == there).float().mean() > 0.9
    assert waits is None or 0 < waits["sampling/canvas.py:select"] <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_half_precision_on_a_gpu(dtype):
    """The first scales' ids are those of float32 on the CPU, but for ties: later ones follow from what was drawn."""
    expected = scales_of(torch.device("cpu"), torch.float32, cfg_schedule="ramp")
    made = scales_of(torch.device("cuda"), dtype, cfg_schedule="ramp")
    assert 0 <= int(made.min()) and int(made.max()) < 64
    assert (made[:, :5] == expected[:, :5]).float().mean() > 0.6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_of_training_on_scales(dtype, waits, capsys):
    words = f"--only training --model var_tiny --batch_size 4 --repeats 1 --dtype {dtype}".split()
    assert bench_scales.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| var_tiny | ")
    assert waits is None or waits["training/step.py:training_step"] == 2  # one a step


def test_pictures_are_those_of_the_cpu(trained, pictured, waits, tmp_path):
    """To one grey level, but for a pixel in a thousand."""
    assert sample.main(["--checkpoint", str(trained), "--output_dir", str(tmp_path), *PICTURES]) == 0
    here, there = (
        np.stack([read_png(path) for path in sorted(folder.glob("*/*.png")) if path.stem.isdigit()])
        for folder in (tmp_path, pictured)
    )
    assert len(here) == 40 and (np.abs(here.astype(int) - there) > 1).mean() <= 1e-3


@pytest.mark.slow
def test_a_search(trained, waits, tmp_path):
    flags = "--iterations 1 --popsize 4 --num_images 12 --batch_size 6 --num_iter 2 --num_sampling_steps 2".split()
    assert search_schedule.main(["--checkpoint", str(trained), "--out", str(tmp_path / "s.json"), *flags]) == 0


def test_a_tokenizer(waits, tmp_path):
    flags = "--data digits --epochs 0.1 --width 16 --stride 2 --batch_size 64 --features digits".split()
    assert train_tokenizer.main([*flags, "--output_dir", str(tmp_path / "t")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("program", [bench, bench_training])
def test_benchmarks(program, waits, tmp_path):
    more = "--quick --only sampling" if program is bench else "--only heads"
    assert program.main(f"--preset digits --repeats 1 {more}".split()) == 0


def test_no_attention_of_cudnn():
    """Which is built anew for each number of tokens."""
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_kernel_computes_attention_is_found_without_a_warning(dtype):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert attention_kernel(64, torch.device("cuda"), dtype) in KERNELS
    assert not seen
