"""The cross-entropy token head: its loss, its guidance, its filters, and that Gumbel-max is a categorical draw."""

import math

import pytest
import torch

from models.celoss import CELoss, Logits, kept
from models.diffloss import DiffLoss
from models.token_head import guide
from tests.helpers import randn
from util.rng import generator, gumbel

WIDTH, ENTRIES = 6, 8


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = CELoss(WIDTH, ENTRIES)
    with torch.no_grad():
        head.proj.weight.mul_(50)
        head.proj.bias.copy_(randn(ENTRIES))
    return head


def rows_of(num_images, each):
    return torch.cartesian_prod(torch.arange(num_images), torch.arange(each))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("entries", [8, 1000, 16384])
def test_the_first_loss_of_a_zero_head_is_ln_v(smoothing, entries):
    head = CELoss(WIDTH, entries, label_smoothing=smoothing)
    torch.nn.init.zeros_(head.proj.weight)
    target = torch.arange(5)
    loss = head.losses(head.predict(target, randn(5, WIDTH), {}), target, {})
    assert list(loss) == ["ce"]
    torch.testing.assert_close(loss["ce"], torch.full((5,), math.log(entries)), rtol=1e-6, atol=0)


def test_accuracy_counts_the_likeliest_ids():
    logits = randn(5, ENTRIES)
    target = logits.argmax(dim=1)
    target[1] = (target[1] + 1) % ENTRIES
    assert CELoss(WIDTH, ENTRIES).measures(Logits(logits), target)["accuracy"].tolist() == [1, 0, 1, 1, 1]


def test_the_start_is_small_and_without_bias():
    torch.manual_seed(0)
    head = CELoss(64, 4096)
    assert abs(head.proj.weight.std().item() - 0.02) < 1e-4 and not head.proj.bias.any()


@torch.no_grad()
def test_label_smoothing_is_a_mixture_with_the_uniform_distribution(head):
    z, target = randn(5, WIDTH), torch.tensor([0, 3, 7, 1, 1])
    logp = head.logits(z).log_softmax(dim=-1)
    expected = -(0.9 * logp.gather(1, target[:, None]).squeeze(1) + 0.1 * logp.mean(dim=1))
    prediction = head.predict(target, z, head.draws(generator(0), 5))
    torch.testing.assert_close(head.losses(prediction, target, {})["ce"], expected)
    torch.testing.assert_close(head.fit(prediction, target, {}), -logp.gather(1, target[:, None]).squeeze(1))


@torch.no_grad()
def test_guidance_is_one_formula_in_training_and_in_sampling(head):
    z, free, w = randn(4, WIDTH), randn(4, WIDTH, seed=1), torch.tensor([0.0, 0.5, 2.0, 3.0])
    cond, uncond = head.logits(z), head.logits(free)
    expected = uncond + w[:, None] * (cond - uncond)
    trained = head.guided(Logits(cond), Logits(uncond), w).logits
    torch.testing.assert_close(trained, expected)
    sampler, drawn, tau = head.sampler(), torch.tensor([1, 2, 3, 4]), torch.tensor([0.5, 1.0, 1.5, 2.0])
    log_prob = sampler.log_prob(drawn, z, free, w, tau)
    expected = (expected / tau[:, None]).log_softmax(dim=-1)
    torch.testing.assert_close(log_prob, expected.gather(1, drawn[:, None]).squeeze(1))
    some = torch.tensor([1, 3])
    w[[0, 2]] = 1.0
    noise = sampler.noise([generator(0)], rows_of(1, 4), 1)
    torch.testing.assert_close(
        sampler.log_prob(drawn, z, free[some], w, tau, some), sampler.log_prob(drawn, z, free, w, tau)
    )
    assert sampler.draw(z, free[some], w, tau, noise, 1, some).equal(sampler.draw(z, free, w, tau, noise, 1))


@torch.no_grad()
def test_a_scale_of_one_is_the_unguided_draw_bit_for_bit(head):
    z, free, sampler = randn(4, WIDTH), randn(4, WIDTH, seed=1), head.sampler()
    assert sampler._filtered(z, free, torch.ones(4), 1.0, None).equal(sampler._filtered(z, None, 1.0, 1.0, None))
    assert sampler.evals(1, 4, 0) == 4 and sampler.evals(1, 4, 3) == 7


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}])
@torch.no_grad()
def test_draws_have_the_probabilities_of_the_filtered_softmax(head, options):
    """Chi-square of 40,000 draws at τ 0.7, whose 99.99 % quantile with 7 degrees of freedom is 29.9."""
    num = 40000
    z, sampler = randn(1, WIDTH).expand(num, -1), head.sampler(**options)
    noise = sampler.noise([generator(3)], rows_of(1, num), 1)
    ids = sampler.draw(z, None, 1.0, 0.7, noise, 1)
    logits = head.logits(z[:1]) / 0.7
    p = logits.masked_fill(~kept(logits, options.get("top_k", 0), options.get("top_p", 1.0)), -math.inf).softmax(-1)[0]
    count = torch.bincount(ids, minlength=ENTRIES).float()
    assert not count[p == 0].any()
    assert ((count - num * p).square() / (num * p).clamp(min=1e-9))[p > 0].sum() < 29.9
    said = sampler.log_prob(ids, z, None, 1.0, 0.7)
    torch.testing.assert_close(said.exp(), p[ids])


@pytest.mark.parametrize("tau", [0.0, 1e-30, torch.zeros(64), torch.linspace(0, 1e-12, 64)])
@torch.no_grad()
def test_at_temperature_0_the_likeliest_id_is_drawn(head, tau):
    z, free, sampler = randn(64, WIDTH), randn(64, WIDTH, seed=1), head.sampler(top_k=5, top_p=0.9)
    likeliest = guide(head.logits(z), head.logits(free), 2.0).argmax(dim=-1)
    noise = sampler.noise([generator(0)], rows_of(1, 64), 1)
    assert sampler.draw(z, free, 2.0, tau, noise, 1).equal(likeliest)
    torch.testing.assert_close(sampler.log_prob(likeliest, z, free, 2.0, tau), torch.zeros(64))
    assert sampler.mixture(z, free, 2.0, tau, noise, 0.5).argmax(dim=-1).equal(likeliest)


def test_gumbel_draws_of_many_seeds_are_independent():
    """Their distribution, along a row and from row to row; no two places, and no two near seeds, look alike."""
    seeds = torch.arange(300, dtype=torch.int32) * 3 - 400  # near each other, as no generator's are
    draws = gumbel(seeds, 4096)
    for part in (draws, draws[:, :64], draws[:4]):
        ranks = torch.exp(-torch.exp(-part.double())).flatten().sort().values
        expected = (torch.arange(len(ranks)) + 0.5) / len(ranks)
        assert (ranks - expected).abs().max() < 2.2 / len(ranks) ** 0.5  # Kolmogorov-Smirnov, 1 in 10,000
    uniform = torch.exp(-torch.exp(-draws)) - 0.5
    for a, b in ((uniform[:, 1:], uniform[:, :-1]), (uniform[1:], uniform[:-1]), (uniform[:, 256:], uniform[:, :-256])):
        assert abs((a * b).mean().item() * 12) < 4.5 / a.numel() ** 0.5
    bits = (uniform > 0).float()
    assert (bits.mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / 300**0.5
    assert draws.abs().max() < 17.4 and len(draws.unique()) > 0.9 * draws.numel()
    assert gumbel(seeds[5:7], 4096).equal(draws[5:7]) and gumbel(seeds, 100).equal(draws[:, :100])


@torch.no_grad()
def test_noise_is_gumbel_and_an_image_has_its_own(head):
    sampler = head.sampler()
    noise = sampler.noise([generator(1), generator(2)], rows_of(2, 5000), 1)
    assert noise.shape == (10000, ENTRIES) and noise.isfinite().all()
    for x in (-1.0, 0.0, 2.0):
        assert abs((noise < x).float().mean().item() - math.exp(-math.exp(-x))) < 0.006
    alone = sampler.noise([None, generator(2)], rows_of(2, 5000)[5000:], 1)
    assert alone.equal(noise[5000:])


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.4, 0.3, 0.2, 0.1]]).log()
    yes = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert kept(logits, 0, 1.0).equal(yes) and kept(logits, 9, 0.0).equal(yes)
    assert kept(logits, 2, 1.0).tolist() == [[True, True, False, False]] * 2
    # of entries that are equal to the k-th all stay
    assert kept(logits, 3, 1.0).tolist() == [[True] * 4, [True, True, True, False]]
    # the entry with which the sum exceeds p is the last one
    assert kept(logits, 0, 0.6).tolist() == [[True, True, False, False]] * 2
    assert kept(logits, 0, 0.01).tolist() == [[True, False, False, False]] * 2
    # where a sum is p exactly: VAR's rule has as much, LlamaGen's more
    equal = torch.zeros(1, 4)
    for exceeds, half, quarter in ((False, 2, 1), (True, 3, 2)):
        assert kept(equal, 0, 0.5, exceeds).sum() == half and kept(equal, 0, 0.25, exceeds).sum() == quarter
    # top-p counts shares of what top-k leaves: 4/7 is less than 0.6
    assert kept(logits[1:], 2, 0.5).tolist() == [[True, False, False, False]]
    assert kept(logits[1:], 2, 0.6).tolist() == [[True, True, False, False]]


def test_settings_that_have_no_meaning_are_refused(head):
    for options, words in (({"top_k": -1}, "--top_k"), ({"top_p": 1.5}, "--top_p")):
        with pytest.raises(ValueError, match=words):
            head.sampler(**options)
    with pytest.raises(ValueError, match="--cfg_profile must be constant"):
        head.sampler().draw(randn(1, WIDTH), None, 1.0, 1.0, torch.zeros(1, ENTRIES), 1, profile=lambda t: 1.0)
    for options, words in (({"top_k": 5}, "--top_k 5 must be 0.*--loss ce"), ({"top_p": 0.9}, "--top_p 0.9 must be 1")):
        with pytest.raises(ValueError, match=words):
            DiffLoss(2, WIDTH, 1, 8).sampler(**options)


def test_log_prob_is_differentiable_in_tau_and_w(head):
    z, free = randn(3, WIDTH).double(), randn(3, WIDTH, seed=1).double()
    head = head.double()
    head.logits = lambda z: head.proj(z)  # as it is, but in float64
    sampler, drawn = head.sampler(top_k=5), head.logits(z).argmax(dim=-1)
    tau, w = torch.full((3,), 0.8).double().requires_grad_(), torch.full((3,), 1.7).double().requires_grad_()
    said = sampler.log_prob(drawn, z, free, w, tau)
    gradients = torch.autograd.grad(said.sum(), (tau, w))
    for i, value in enumerate((tau, w)):
        ends = []
        for step in (1e-2, -1e-2):
            moved = [value.detach() + step if value is other else other.detach() for other in (tau, w)]
            ends.append(sampler.log_prob(drawn, z, free, moved[1], moved[0]).detach())
        torch.testing.assert_close(gradients[i], (ends[0] - ends[1]) / 2e-2, rtol=2e-2, atol=1e-3)
