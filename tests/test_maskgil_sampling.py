"""MaskGIL through the one loop: published traces, what the published sampler gets wrong, rules, learned heads."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from heads.orders import SCORES
from heads.policy import HEADS, PolicyHeads, build_rules
from heads.schedules import GROUPS, RuleOptions
from heads.step import StepState
from models.mask_schedules import STEP_WEIGHTS, token_schedule
from sampling.loop import generate
from sampling.settings import SampleConfig
from tests.helpers import named_weights
from tests.helpers_causal import tiny_gpt
from tests.helpers_maskgil import ENTRIES, LENGTH, REFERENCE, published, settings_of, tensor, tiny_maskgil
from tests.parity import generate_ids
from training.optim import make_optimizer

TRACES = sorted({name.split("/")[1] for name in REFERENCE.files if name.startswith("sample/")})
LABELS, SEEDS = torch.tensor([0, 3, -1, 1]), [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model():
    return tiny_maskgil()


def known_half():
    """(ids (4, L), mask (4, L)), of other counts in each image, all known in the second."""
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(ENTRIES, (4, LENGTH), generator=g), torch.rand(4, LENGTH, generator=g) < 0.5
    mask[1] = False
    return ids, mask


@pytest.mark.parametrize("trace", TRACES)
def test_published_samples(trace):
    """With the recorded draws: ids and masks after every step; the schedule's counts are the recorded ones."""
    name, settings = f"sample/{trace}", settings_of(f"sample/{trace}")
    counts, gumbel, scores = (REFERENCE[f"{name}/{key}"] for key in ("counts", "token_gumbel", "order_noise"))
    options = {key: float(settings[key]) for key in ("temperature", "r_temp", "cfg")}
    options |= {key: settings[key] for key in ("schedule", "randomize")}
    known = trace == "edit_known_tokens"
    if known:
        options |= dict(ids=tensor(f"{name}/start_ids"), mask=tensor(f"{name}/start_mask"), counts=counts)
    num_iter = int(settings["num_iter"])
    assert known or counts.tolist() == token_schedule(settings["schedule"], num_iter, LENGTH)
    ids_steps, mask_steps = [], []

    def listen(step, ids, mask):
        ids_steps.append(ids.clone())
        mask_steps.append(mask)

    made = generate_ids(
        published(settings["model"]), tensor(f"{name}/labels"), num_iter=num_iter, callback=listen,
        keep_mask_logit=settings["keep_mask_logit"] == "True",
        noise_fn=lambda step: (torch.from_numpy(gumbel[step]), torch.from_numpy(scores[step])), **options,
    )  # fmt: skip
    assert made.equal(tensor(f"{name}/ids")) and len(ids_steps) == len(counts)
    expected = REFERENCE[f"{name}/mask_steps"]
    assert np.array_equal(torch.stack(mask_steps).numpy(), expected)
    drawn = np.where(expected, 0, torch.stack(ids_steps).numpy())
    assert np.array_equal(drawn, np.where(expected, 0, np.minimum(REFERENCE[f"{name}/ids_steps"], 63)))


@pytest.mark.parametrize("kind", STEP_WEIGHTS)
def test_group_rules_are_the_schedules(kind):
    for total in (1, 7, 16, 64):
        for num_iter in (1, 2, 3, 8, 12, 40, 2 * total):
            left, counts = total, []
            for step in range(num_iter):
                mask = (torch.arange(total) < left).unsqueeze(0)
                state = StepState(
                    step, num_iter, mask, torch.tensor([float(left)]), torch.tensor([float(total)]),
                    torch.zeros(1, total), None, torch.tensor([0]),
                )  # fmt: skip
                counts.append(int(build_rules("baseline", group=f"step_{kind}")(state).select.sum()))
                left -= counts[-1]
                if not left:
                    break
            assert counts == token_schedule(kind, num_iter, total)


def test_images_with_known_tokens_follow_schedules_of_their_own():
    """Of 16 and of 4 unknown tokens; the published sampler counts all tokens of the image."""
    model, mask, sizes = tiny_maskgil(), torch.ones(2, LENGTH).bool(), []
    mask[1, 4:] = False
    rules = build_rules("maskgil", cfg=2.0)

    def listen(step, rows, *_):
        sizes.append(torch.bincount(rows[:, 0], minlength=2))

    generate(
        model, LABELS[:2], rules, 8, seeds=[1, 2], tokens=torch.zeros(2, LENGTH).long(), mask=mask, callback=listen
    )
    columns = torch.stack(sizes).T.tolist()
    assert [[n for n in column if n] for column in columns] == [token_schedule("arccos", 8, m) for m in (16, 4)]


@pytest.mark.parametrize("score", SCORES)
def test_every_score_draws_each_token_once_and_keeps_known_ones(model, score):
    """Of several images, with one step, and with more steps than tokens, where the published sampler fails."""
    ids, mask = known_half()
    for group, num_iter in zip(STEP_WEIGHTS, (1, 2, 5, 3, 40)):
        times = torch.zeros(4, LENGTH, dtype=torch.long)

        def count(step, rows, *_, times=times):
            times[rows[:, 0], rows[:, 1]] += 1

        rules = build_rules("maskgil", group=f"step_{group}", confidence_score=score, cfg=3.0, temperature=0.8)
        made = generate(model, LABELS, rules, num_iter, seeds=SEEDS, callback=count, tokens=ids, mask=mask).flatten(1)
        assert times.equal(mask.long()) and made[~mask].equal(ids[~mask])
        assert 0 <= made.min() and made.max() < ENTRIES


@pytest.mark.parametrize("score", SCORES)
def test_an_image_is_the_same_in_any_batch(model, score):
    rules = build_rules("maskgil", cfg=2.0, confidence_score=score)
    together = generate(model, LABELS, rules, 4, seeds=SEEDS)
    assert len({image.numpy().tobytes() for image in together}) == 4
    for i, (label, seed) in enumerate(zip(LABELS, SEEDS)):
        assert generate(model, label[None], rules, 4, seeds=[seed]).equal(together[i : i + 1])


def test_equal_scores_reveal_as_many_tokens_as_planned():
    """A tie at the threshold: the published sampler writes tokens that it does not unmask."""
    model = tiny_maskgil()
    with torch.no_grad():
        model.output.weight.zero_()  # all ids and all positions are alike
    rules, sizes, shown = build_rules("maskgil", confidence_score="none", cfg=2.0), [], []

    def listen(step, rows, plan, tokens):
        sizes.append(len(rows))
        shown.append(tokens.clone())

    made = generate(model, LABELS[:1], rules, 5, seeds=[1], callback=listen)
    assert sizes == token_schedule("arccos", 5, LENGTH)
    for i, tokens in enumerate(shown):  # in order of position, and what is not revealed is not written
        count = sum(sizes[: i + 1])
        assert tokens[0, :count].equal(made.flatten(1)[0, :count]) and not tokens[0, count:].any()


def test_scores_are_those_of_the_specification():
    log_prob, gumbel = torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.5, 3.0]])

    def scores(name, step, num_iter):
        n = torch.ones(1)
        state = StepState(step, num_iter, torch.ones(1, 2).bool(), 2 * n, 2 * n, gumbel, None, torch.tensor([0]))
        return SCORES[name](state, log_prob, gumbel, 4.5)

    for step, share in ((0, 1.0), (2, 0.5), (4, 0.0)):
        torch.testing.assert_close(scores("linear", step, 5), log_prob + 4.5 * share * gumbel)
    assert scores("linear", 0, 1).isfinite().all()
    assert scores("none", 3, 5).equal(log_prob.exp()) and scores("random", 3, 5).equal(gumbel)
    assert [scores("warm_up", step, 5).equal(gumbel) for step in range(4)] == [True, True, False, False]
    assert scores("warm_up", 2, 5).equal(log_prob.exp())


def test_a_ramp_begins_at_one_and_ends_at_w(model):
    """So the first step computes no unconditional half."""
    seen, evals = [], Counter()

    def listen(step, rows, plan, tokens):
        seen.append(plan.cfg[0, 0].item())

    generate(model, LABELS[:2], build_rules("maskgil", cfg=5.0), 5, seeds=[1, 2], callback=listen, evals=evals)
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0] and evals["mar"] == 2 * (5 + 4)
    rules = build_rules("maskgil", cfg=3.0)
    generate(model, LABELS[:2], rules, 1, seeds=[1, 2], callback=listen)
    assert seen[-1] == 3.0


def test_a_scale_of_one_is_the_unguided_path(model):
    plain, evals = build_rules("maskgil"), Counter()
    one = replace(plain, cfg=lambda state, after: torch.ones(len(state.mask), 1))
    made = generate(model, LABELS, plain, 4, seeds=SEEDS, evals=evals)
    assert evals["mar"] == 4 * 4  # one pass an image and step
    assert generate(model, LABELS, one, 4, seeds=SEEDS).equal(made)
    assert not generate(model, LABELS, build_rules("maskgil", cfg=4.0), 4, seeds=SEEDS).equal(made)


# ---------------------------------------------------------------------------------------------------- learned heads

# how baseline and heads name what is moved
BASES = {
    "random": (dict(order="random"), dict(order_base="random")),
    "confidence": (dict(order="confidence"), dict(order_base="confidence")),
}


@pytest.mark.parametrize("base", BASES)
def test_untrained_heads_are_what_they_move_bit_for_bit(model, base):
    """With the model's own guidance, which is the ramp."""
    plain, moved = BASES[base]
    for score in SCORES if base == "confidence" else ["linear"]:
        options = dict(**model.fixed_rules, cfg=2.5, confidence_score=score)
        made = generate(model, LABELS, build_rules("baseline", **plain, **options), 3, seeds=SEEDS)
        rules = build_rules("baseline", **plain, cfg_schedule="ramp", cfg=2.5, confidence_score=score)
        assert generate(model, LABELS, rules, 3, seeds=SEEDS).equal(made)
        rules = build_rules("both", PolicyHeads(model.width, HEADS), **moved, **options)
        assert generate(model, LABELS, rules, 3, seeds=SEEDS).equal(made)


@pytest.mark.parametrize("base", BASES)
def test_trained_heads_change_the_images_and_draw_each_token_once(model, base):
    heads = named_weights(PolicyHeads(model.width, HEADS), scale=0.2).eval()
    rules = build_rules("both", heads, **BASES[base][1], cfg=2.5)
    times, sizes = torch.zeros(4, LENGTH, dtype=torch.long), []

    def count(step, rows, *_):
        times[rows[:, 0], rows[:, 1]] += 1
        sizes.append(torch.bincount(rows[:, 0], minlength=4).tolist())

    made = generate(model, LABELS, rules, 5, seeds=SEEDS, callback=count)
    assert times.eq(1).all() and any(len(set(row)) > 1 for row in sizes)
    assert not made.equal(generate(model, LABELS, build_rules("baseline", **BASES[base][0], cfg=2.5), 5, seeds=SEEDS))


def test_a_learned_order_moves_confidence(model):
    """A head that is sure of the last tokens makes them the first ones, unless the score outweighs it."""
    heads, firsts = PolicyHeads(model.width, ["order"]), []
    heads.logits = lambda state, base_cfg: 100.0 * torch.arange(LENGTH).expand(len(state.mask), -1)
    rules = build_rules("baseline", heads, order="learned", order_base="confidence", group="one")
    generate(model, LABELS[:1], rules, LENGTH, seeds=[3], callback=lambda s, rows, *_: firsts.append(int(rows[0, 1])))
    assert firsts == [*range(LENGTH)][::-1]
    firsts.clear()
    heavy = build_rules("baseline", heads, order="learned", order_base="confidence", group="one", order_noise=1e6)
    generate(model, LABELS[:1], heavy, LENGTH, seeds=[3], callback=lambda s, rows, *_: firsts.append(int(rows[0, 1])))
    assert firsts != [*range(LENGTH)][::-1] and sorted(firsts) == [*range(LENGTH)]


def test_names_that_are_no_scores_are_refused():
    with pytest.raises(ValueError, match="unknown confidence_score 'x'; valid: linear, none, random, warm_up"):
        RuleOptions(confidence_score="x")
    assert {f"step_{kind}" for kind in STEP_WEIGHTS} < GROUPS.keys()


def test_a_temperature_of_zero_leaves_nothing_to_be_sure_of():
    """All that is drawn has probability 1, and ties would go row by row."""
    usual = dict(infer_mode="maskgil", temperature=0.0)
    for sure in (dict(confidence_score="none"), dict(confidence_score="warm_up"), dict(confidence_noise=0.0)):
        with pytest.raises(ValueError, match="--temperature 0 .* --order confidence"):
            SampleConfig(**usual | sure).check(tiny_maskgil())
        for other in (dict(order="random"), dict(tau_schedule="linear"), dict(temperature=0.1)):
            SampleConfig(**usual | sure | other).check(tiny_maskgil())
    for drawn in ({}, dict(confidence_score="random")):  # Gumbel draws decide
        SampleConfig(**usual | drawn).check(tiny_maskgil())


@pytest.mark.parametrize("make", [tiny_maskgil, tiny_gpt])
def test_all_but_vectors_have_weight_decay(make):
    model = make()
    no_decay, decay = make_optimizer(model, model.token_head, 1e-4, 0.05, model.no_decay).param_groups
    assert all(p.ndim == 1 for p in no_decay["params"]) and all(p.ndim > 1 for p in decay["params"])
    assert any(p is model.output.weight for p in decay["params"]) and decay["weight_decay"] == 0.05
