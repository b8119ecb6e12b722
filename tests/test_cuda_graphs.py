"""On a GPU: CUDA graphs compute what eager calls do, wait for nothing, give their memory back, and may fail."""

import gc
from copy import deepcopy
from random import Random

import pytest
import torch

from diffusion.solvers import SOLVERS
from heads.policy import build_rules
from models.diffloss import DiffLoss
from sampling.loop import generate
from tests.helpers import named_weights, randn, tiny_mar
from tests.helpers_diffusion import CHANNELS, CLIP, WIDTH
from tests.helpers_graphs import PlainCalls, eagerly
from tests.helpers_var import tokenizer as scales_tokenizer
from tests.test_diffusion_graphs import random_draw
from tests.test_pass_graphs import FAMILIES
from tests.test_var import tiny as tiny_var
from tests.test_var_graphs import LABELS, looks
from util import graphs
from util.dist import autocast
from util.graphs import Graphs, release

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda(capsys):
    """The device; no capture may fail."""
    yield torch.device("cuda")
    assert "no more CUDA graphs" not in capsys.readouterr().err


def moved(options: dict, device) -> dict:
    """Arguments of DiffLoss.sample on the device, what a profile gives too."""
    here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    profile = options.get("profile")
    if profile:
        here["profile"] = lambda t: m.to(device) if isinstance(m := profile(t), torch.Tensor) else m
    return here


def head_of(device) -> DiffLoss:
    return named_weights(DiffLoss(CHANNELS, WIDTH, depth=2, width=16), scale=0.2).eval().to(device)


def test_draws_are_those_of_the_eager_loop(cuda, monkeypatch):
    """To the bit those of plain calls on the same buffers; padding alone may change the last bits."""
    head, plain, chance = head_of(cuda), head_of(cuda), Random(0)
    for _ in range(40):
        options = moved(random_draw(chance), cuda)
        made, expected = head.sample(**options), eagerly(monkeypatch, lambda options=options: head.sample(**options))
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)  # errors of ε grow up to 71-fold
        with monkeypatch.context() as patch:
            patch.setitem(graphs.CAPTURES, "cuda", PlainCalls)
            assert plain.sample(**options).equal(made)
    assert len(head.graphs.captures) == len(plain.graphs.captures) > 5


@pytest.mark.parametrize("by", ["autocast", "weights"])
def test_draws_in_bf16(by, cuda, monkeypatch):
    """Of weights that autocast casts, whose copies it frees when it ends: other tensors take their place in between."""
    head = head_of(cuda).to(torch.bfloat16 if by == "weights" else torch.float32)
    z, free, noise = (x.to(cuda) for x in (randn(24, WIDTH), randn(24, WIDTH, seed=1), randn(9, 24, CHANNELS, seed=2)))

    def sample():
        with autocast(cuda, torch.bfloat16 if by == "autocast" else torch.float32):
            return head.sample(z, free, torch.linspace(1, 3, 24, device=cuda), 0.9, 8, noise=noise, clip=CLIP)

    expected = eagerly(monkeypatch, sample)
    for _ in range(3):
        torch.testing.assert_close(sample(), expected, rtol=2e-2, atol=2e-2)
        rubbish = [torch.full((n, 16), torch.nan, device=cuda) for n in (3, 8, 16, 32, 48, 256) for _ in range(20)]
        del rubbish
    assert len(head.graphs.captures) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_guidance_scale_of_the_host_has_a_gradient(solver, cuda):
    """w of all rows, a tensor () on the CPU."""
    head, w = head_of(cuda), torch.tensor(2.0, requires_grad=True)
    noise, z, free = (torch.randn(*shape, device=cuda) for shape in ((4, 5, CHANNELS), (5, WIDTH), (5, WIDTH)))
    head.sampler(num_steps=3, solver=solver, clip=CLIP).draw(z, free, w, 0.9, noise, 3).sum().backward()
    assert w.grad.isfinite() and w.grad != 0


def test_a_draw_waits_for_nothing(cuda):
    head, chance = head_of(cuda), Random(1)
    draws = [moved(random_draw(chance), cuda) for _ in range(10)]
    for options in draws:  # the tensors of profiles are moved when they are asked for
        options.pop("profile", None)
    expected = [head.sample(**options) for options in draws]
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [head.sample(**options) for options in draws]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(a.equal(b) for a, b in zip(made, expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_passes_of_each_family_are_the_eager_ones(name, cuda, monkeypatch):
    """z of three batches on the way from an empty canvas to half a one, with label and without."""
    make, settings, _ = FAMILIES[name]
    model, images = make().to(cuda), torch.arange(3)
    length, discrete = model.config.seq_len, model.token_head.discrete

    def look(seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.rand(3, length, model.token_head.empty(1, 1).shape[-1], generator=generator).to(cuda)
        tokens = (16 * tokens[..., 0]).long() if discrete else tokens
        labels = torch.tensor([0, seed % 3, -1], device=cuda)
        conditions = model.conditions(labels, refresh_every=settings.get("refresh_every", 1))
        looked = []
        for step in range(length // 2):
            unknown = torch.arange(length).expand(3, -1) >= step
            z, positions = conditions.look(step, tokens, unknown, images)
            places = torch.arange(length).expand(3, -1) if positions is None else positions
            rows = torch.stack([images.repeat_interleave(places.shape[1]), places.flatten()], dim=1)
            looked += [z, *conditions.at(step, tokens, unknown, rows, torch.arange(len(rows)))]
        return looked

    with torch.no_grad():
        expected = [eagerly(monkeypatch, lambda seed=seed: look(seed)) for seed in range(3)]
        made = [look(seed) for seed in range(3)]
    assert model.graphs.captures
    for here, there in zip(sum(made, []), sum(expected, [])):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_captures_of_one_pool_replay_in_any_order_and_their_results_last(cuda):
    some, sizes = Graphs(), [64, 1024, 16, 4096]
    inputs = [randn(n, 32, seed=n).to(cuda) for n in sizes]
    weight = randn(32, 32).to(cuda)

    def function(x):
        for _ in range(5):
            x = (x @ weight).tanh()
        return x

    made, expected = [], []
    with torch.no_grad():
        for which in Random(0).choices(range(4), k=40):
            x = inputs[which] + len(made)
            made.append(some.run("f", function, [x], [x.shape]))
            expected.append(function(x))
    assert len(some.captures) == 4 and all(a.equal(b) for a, b in zip(made, expected))


def test_memory_is_bounded_and_given_back(cuda):
    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    head = head_of(cuda)
    head.graphs = Graphs(most=2)
    z, noise = randn(2**18, WIDTH).to(cuda), randn(3, 2**18, CHANNELS).to(cuda)
    sizes, taken = [2**16, 2**17, 2**18], []
    head.sample(z[:9], num_steps=2, noise=noise[:, :9], clip=CLIP)  # workspaces of cuBLAS, which stay
    release(head)
    eager = allocated()
    for _ in range(4):
        for n in sizes:
            head.sample(z[:n], num_steps=2, noise=noise[:, :n], clip=CLIP)
        taken.append(allocated())
    assert len(head.graphs.captures) == 2 and taken[-1] <= taken[0] * 1.1
    release(head)
    assert allocated() <= eager + 2**22 < taken[0]


def test_a_capture_that_fails_leaves_everything_usable(capsys):
    some, x, stream, reserved = Graphs(), randn(4, 3).to("cuda"), torch.cuda.current_stream(), []
    with torch.no_grad():
        for _ in range(2):
            assert some.run("reads", lambda a: a * a.sum().item(), [x], [(4, 3)]).equal(x * x.sum())
    assert torch.cuda.current_stream() == stream and some.failed and gc.isenabled()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: no more CUDA graphs, since one could not be captured: ")
    for _ in range(3):  # memory that another stream has used is given back too, which inside a capture must wait
        lent = torch.empty(2**22, dtype=torch.uint8, device="cuda")
        lent.record_stream(torch.cuda.Stream())
        del lent
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] == reserved[-1]
    other = Graphs()
    with torch.no_grad():
        assert other.run("works", lambda a: 2 * a, [x], [(4, 3)]).equal(2 * x) and len(other.captures) == 1


@pytest.mark.parametrize("block", ["l2", "plain_shared"])
def test_z_of_scales_is_that_of_the_eager_passes(block, cuda, monkeypatch):
    model, tok = tiny_var(block).to(cuda), deepcopy(scales_tokenizer()).to(cuda)
    each = [LABELS.to(cuda), LABELS.flip(0).to(cuda)]
    with torch.no_grad():
        expected = [eagerly(monkeypatch, lambda c=labels: looks(model, tok, c)) for labels in each]
        made = [looks(model, tok, labels) for labels in [*each, *each]]
    assert len(model.graphs.captures) == 8
    for (here, passes), (there, others) in zip(made, [*expected, *expected]):
        assert passes == others
        for a, b in zip(here, there):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_batches(dtype, cuda, monkeypatch):
    """Of MAR latents close to the eager ones, of VAR ids but for ties; the second batch captures nothing."""
    mar, var = tiny_mar().to(cuda), tiny_var().to(cuda)
    tok = deepcopy(scales_tokenizer()).to(cuda)
    of_scales = build_rules("baseline", order="raster", group="scale", cfg=2.5)

    def batch():
        with autocast(cuda, dtype):
            options = dict(num_iter=6, num_steps="4:2", clip=(-2.0, 2.0), seeds=[1, 2, 3])
            latents = generate(mar, LABELS % 3, build_rules("baseline", cfg=2.0), **options)
            return latents, generate(var, LABELS, of_scales, seeds=[1, 2, 3], tokenizer=tok)

    latents, ids = eagerly(monkeypatch, batch)
    counts = []
    for _ in range(2):
        made, drawn = batch()
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert (made - latents).abs().mean() < tolerance and (drawn == ids).float().mean() > 0.9
        counts.append((len(mar.diffloss.graphs.captures), len(var.graphs.captures)))
    assert counts[0] == counts[1] and min(counts[0]) > 1
