"""MaskGIL of text: the fixture, what padding and dropped captions do, sampling, training draws, cleaning."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from heads.policy import build_rules
from models.maskgil import MASKGIL_CONFIGS, MaskGIL, MaskGILConfig
from models.text import Prompts, Text
from sampling.loop import generate
from tests.helpers_maskgil import ENTRIES, LENGTH, REFERENCE, tensor, tiny_maskgil
from tests.helpers_text import NUM_TOKENS, WIDTH, batch_of, published_text, random_prompts, tiny_t2i
from tests.parity import generate_ids
from training.objectives.draws import DrawSettings, training_draws
from training.objectives.token import Batch, TokenObjective
from util.images.captions import clean
from util.images.text_cache import ImageCaptions

RULES = dict(order="confidence", group="step_arccos", cfg_schedule="ramp", cfg=3.0)


def test_the_fixtures_logits():
    model = published_text()
    assert sorted(f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()) == sorted(REFERENCE["text/keys"])
    ids, mask, text, text_mask = (tensor(f"text/{name}") for name in ("ids", "mask", "text", "text_mask"))
    with torch.no_grad():
        given = model.logits(ids, mask, text=text, text_mask=text_mask, grid=(3, 5))
        free = model.logits(ids, mask, grid=(3, 5))
    for logits, name in ((given, "text/logits"), (free, "text/logits_uncond")):
        np.testing.assert_allclose(logits.numpy(), REFERENCE[name], rtol=1e-4, atol=2e-5)


def test_the_published_size():
    with torch.device("meta"):
        model = MaskGIL(MASKGIL_CONFIGS["maskgil_t2i_xl"])
    gains = 2 * 64 * model.config.n_layer
    assert sum(p.numel() for p in model.parameters()) == 777_926_400 + gains
    assert tuple(model.cls_embedding.uncond_embedding.shape) == (120, 2048)
    assert dict(model.named_parameters())["cls_embedding.uncond_embedding"].requires_grad


@torch.no_grad()
def test_padding_does_not_matter():
    model = tiny_t2i()
    ids, mask, text = batch_of(model, [0, 2, 4])
    z = model.encode_decode(ids, mask, text)
    noise = torch.where(text.mask.unsqueeze(-1), text.features.float(), torch.nan)
    assert model.encode_decode(ids, mask, Text(noise, text.mask, text.known)).equal(z)
    # on the left, as LlamaGen pads; the order of captions' tokens does not matter
    flipped = Text(text.features.flip(1), text.mask.flip(1), text.known)
    torch.testing.assert_close(model.encode_decode(ids, mask, flipped), z)
    longer = replace(model.config, cls_token_num=NUM_TOKENS + 3)
    other = MaskGIL(longer).eval()
    weights = model.state_dict()
    uncond = torch.cat([weights["cls_embedding.uncond_embedding"], torch.zeros(3, model.config.caption_dim)])
    other.load_state_dict(weights | {"cls_embedding.uncond_embedding": uncond})
    padded = [torch.nn.functional.pad(x, (0,) * (2 * x.dim() - 3) + (3,)) for x in (text.features, text.mask)]
    torch.testing.assert_close(other.encode_decode(ids, mask, Text(*padded, text.known)), z)


@torch.no_grad()
def test_captions_of_fewer_tokens_are_filled_up_and_none_may_be_longer():
    model = tiny_t2i()
    ids, mask, text = batch_of(model, [0, 1, 2])  # of 1, 2 and 3 tokens
    expected = model.logits(ids, mask, text=text.features, text_mask=text.mask)
    short = model.logits(ids, mask, text=text.features[:, :3], text_mask=text.mask[:, :3])
    assert short.equal(expected)
    whole = model.logits(ids[2:], mask[2:], text=text.features[2:, :3])
    torch.testing.assert_close(whole, expected[2:])
    for channels, num, message in ((WIDTH, 7, "7 tokens of 8 channels"), (9, 6, "6 tokens of 9 channels")):
        with pytest.raises(ValueError, match=f"captions have {message}, the model takes 6 of 8"):
            model.logits(ids, mask, text=torch.zeros(3, num, channels))


def test_logits_refuse_a_condition_of_the_other_kind_and_another_number_of_tokens():
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    labels, features = torch.tensor([0, 1]), torch.zeros(2, NUM_TOKENS, WIDTH)
    with pytest.raises(ValueError, match="a MaskGIL of text takes no labels: give text"):
        tiny_t2i().logits(ids, ids > 0, labels)
    with pytest.raises(ValueError, match="a MaskGIL of classes takes no text: give labels"):
        tiny_maskgil().logits(ids, ids > 0, text=features)
    for model in (tiny_t2i(), tiny_maskgil()):
        with pytest.raises(ValueError, match="ids are 8 an image, a grid of 4x4 has 16"):
            model.logits(ids[:, :8], ids[:, :8] > 0)
        with pytest.raises(ValueError, match="ids are 16 an image, a grid of 2x4 has 8"):
            model.logits(ids, ids > 0, grid=(2, 4))


@torch.no_grad()
def test_the_caption_matters_and_no_caption_is_the_unconditional_embedding():
    model = tiny_t2i()
    ids, mask, text = batch_of(model, [1, 1, -1])
    z = model.encode_decode(ids[[0, 0, 0]], mask[[0, 0, 0]], text)
    torch.testing.assert_close(z[0], z[1])
    assert not z[0].allclose(z[2], atol=1e-3)
    free = model.encode_decode(ids, mask, None)
    torch.testing.assert_close(model.encode_decode(ids, mask, model.prompts[torch.tensor([-1] * 3)]), free)
    every = torch.ones(3, NUM_TOKENS, dtype=torch.bool)
    embedding = model.cls_embedding.uncond_embedding.expand(3, -1, -1)
    torch.testing.assert_close(model.encode_decode(ids, mask, Text(embedding, every, every[:, 0])), free)
    with pytest.raises(ValueError, match="rope published must be 2d of a MaskGIL of text"):
        MaskGILConfig(model_type="t2i", rope="published")
    with pytest.raises(ValueError, match="cls_token_num 3 must be 1 of a MaskGIL of classes"):
        MaskGILConfig(cls_token_num=3)


def test_an_image_depends_on_its_prompt_and_seed_alone():
    model, rules = tiny_t2i(), build_rules("baseline", **RULES)
    labels, seeds = torch.tensor([0, 3, -1, 4]), [5, 6, 7, 8]
    ids = generate(model, labels, rules, 4, seeds=seeds)
    for i in range(4):
        assert generate(model, labels[[i]], rules, 4, seeds=seeds[i : i + 1]).equal(ids[[i]])
    assert not generate(model, labels.roll(1), rules, 4, seeds=seeds).equal(ids)
    with pytest.raises(ValueError, match="labels must be between -1 and 4, got 5"):
        generate(model, torch.tensor([5]), rules, 4)
    model.prompts = None
    with pytest.raises(ValueError, match="this model is of text and has no prompts"):
        generate(model, torch.tensor([0]), rules, 4)


def test_the_specifications_sampler_takes_captions_and_grids():
    """Equal to the loop with prompts; None = no caption; a rectangle as of a model of that size."""
    model, seeds = tiny_t2i(), [5, 6, 7]
    labels = torch.tensor([1, -1, 4])
    wide = tiny_t2i(img_size="4x12")
    for grid, other in ((None, model), ((2, 6), wide)):
        text = other.prompts[labels]
        expected = generate(other, labels, build_rules("baseline", **RULES), 4, seeds=seeds).flatten(1)
        options = dict(num_iter=4, cfg=3.0, seeds=seeds, grid=grid)
        given = dict(text=text.features, text_mask=text.mask)
        assert generate_ids(model, labels, **given, **options).equal(expected)
        named = generate_ids(model, None, **given, **options)  # its text has no token, which is another thing than none
        assert named[[0, 2]].equal(expected[[0, 2]])
        free = generate(other, torch.tensor([-1] * 3), build_rules("baseline", **RULES), 4, seeds=seeds).flatten(1)
        assert generate_ids(model, labels, **options).equal(free)
    assert model.config == tiny_t2i().config and len(model.prompts) == 5


def test_the_loss_reaches_the_unconditional_embedding_where_captions_are_dropped():
    model = tiny_t2i()
    settings = DrawSettings(LENGTH, mask_ratio_min=0.0, label_drop_prob=0.1, mask_schedule="arccos", loss_tokens="all")
    draws = training_draws(0, 0, [0, 1], model.token_head, settings)
    ids = torch.randint(ENTRIES, (2, LENGTH))
    for labels, reached in (([0, -1], True), ([0, 2], False)):
        model.zero_grad()
        batch = Batch(ids, model.prompts[torch.tensor(labels)], draws)
        TokenObjective(model)(batch, batch.num_targets)["loss"].backward()
        assert bool(model.cls_embedding.uncond_embedding.grad.any()) == reached
        assert model.cls_embedding.cap_proj.fc1.weight.grad.any()


def test_captions_are_drawn_anew_at_each_step_and_a_stand_in_has_none():
    captions = ImageCaptions([[0, 1, 2], [3], [4, 5]], torch.tensor([0, 0, 1]))
    drawn = [captions.draw([1, 0], seed=0, step=step).tolist() for step in range(40)]
    assert {first for first, _ in drawn} == {3} and {second for _, second in drawn} == {0, 1, 2}
    assert captions.draw([0], 0, 7).tolist() == captions.draw([2, 0], 0, 7).tolist()[1:]
    assert captions.draw([2], 0, 0).tolist() == [-1]
    assert captions.examples(10) == [0, 3, 4] and captions.examples(1) == [0]


def test_prompts_are_known_by_their_captions_and_where_these_are_cut_off():
    prompts = random_prompts(3)
    assert prompts.content == random_prompts(3, seed=1).content != random_prompts(4).content
    cut = Prompts(prompts.captions, [row[:2] for row in prompts.rows], 2, WIDTH)
    assert prompts.content != cut.content


@pytest.mark.parametrize(
    "caption, cleaned",
    [
        ("A  Cat\n on a MAT", "a cat on a mat"),
        ("wow!!! a <b>dog</b>... at https://x.org/a?b=1 &amp; www.y.com", "wow! a dog . at &"),
        ("3 > 2", "3 > 2"),
        ("3 < 5 and 7 > 2, i <3 you </p><br/><!-- no -->", "3 < 5 and 7 > 2, i <3 you"),
        (" \t", ""),
    ],
)
def test_captions_are_cleaned(caption, cleaned):
    assert clean(caption) == cleaned


@pytest.mark.gpu
@torch.no_grad()
def test_logits_of_text_on_a_gpu_are_those_of_the_cpu():
    model = tiny_t2i()
    ids, mask, text = batch_of(model, [0, 3, -1])
    expected = model.encode_decode(ids, mask, text)
    made = model.cuda().encode_decode(ids.cuda(), mask.cuda(), text.to("cuda")).cpu()
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


def test_a_step_reads_text_once_a_batch():
    """Prompts may be in files: they are read when a batch begins, not at each step."""
    model, asked = tiny_t2i(), []
    prompts = model.prompts

    class Watched(type(prompts)):
        def __getitem__(self, labels):
            asked.append(labels.tolist())
            return super().__getitem__(labels)

    model.prompts = Watched(prompts.captions, prompts.rows, prompts.num_tokens, prompts.width)
    generate(model, torch.tensor([0, 3]), build_rules("baseline", **RULES), 4, seeds=[1, 2])
    assert asked == [[0, 3]]
