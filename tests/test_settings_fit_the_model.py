"""What sampling would refuse at its first images is refused before anything is trained, sampled or written."""

import pytest
import torch

import main_mar
import sample
from heads.policy import build_rules
from sampling.loop import generate
from sampling.settings import SampleConfig
from scripts import search_schedule
from tests import helpers_family
from tests.helpers import tiny_mar
from tests.helpers_toys import Causal
from tests.test_cli import files, refused
from tests.test_new_family import SAMPLE, TRAIN
from training.config import resolve

STEPLESS = "--cfg_profile must be constant: this model draws a token in one step, not in diffusion steps"
ONE_A_STEP = "--num_iter {} is too small: this model draws one token a step, an image has 64"
STAGED = "the group rule staged needs at least 3 steps, got num_iter {}"
# flags -> the line; of a model with a token head without steps, and of it where it draws one token a step
REFUSED = [
    ("--cfg_profile interval --cfg_t_interval 0,0.5", STEPLESS, {}),
    ("--num_iter 63", ONE_A_STEP.format(63), {"group": "one"}),
    ("--group staged --num_iter 2", STAGED.format(2), {}),
]
IMAGE = "--objective image --learn tau --features digits --bank 16".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of the family of helpers_family, before it needs any rule."""
    with pytest.MonkeyPatch.context() as patch:
        helpers_family.add_family(patch)
        folder = tmp_path_factory.mktemp("run")
        assert main_mar.main([*TRAIN, "--epochs", "1", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def needing(monkeypatch):
    """A function that adds the family to the table, with these rules that it needs beside its order."""

    def add(rules):
        helpers_family.add_family(monkeypatch)
        monkeypatch.setattr(helpers_family.MeanModel, "fixed_rules", {"order": "raster", **rules})

    for name in ("engine_mar.train_one_epoch", "sampling.run.generate"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("it had started"))
    return add


@pytest.mark.parametrize("flags, line, rules", REFUSED)
def test_before_training(flags, line, rules, needing, tmp_path, capsys):
    needing(rules)
    words = [*TRAIN, "--epochs", "1", "--output_dir", str(tmp_path / "run"), *flags.split()]
    assert refused(main_mar.main, words, capsys) == f"error: {line}" and not files(tmp_path)


@pytest.mark.parametrize("flags, line, rules", REFUSED)
def test_before_sampling_and_evaluating(flags, line, rules, trained, needing, tmp_path, capsys):
    needing(rules)
    words = ["--checkpoint", str(trained), "--output_dir", str(tmp_path / "out"), *SAMPLE, *flags.split()]
    assert refused(sample.main, words, capsys) == f"error: {line}" and not files(tmp_path)
    words = [*TRAIN, "--evaluate", "--resume", str(trained), "--output_dir", str(tmp_path / "out"), *flags.split()]
    assert refused(main_mar.main, words, capsys) == f"error: {line}" and not files(tmp_path)


@pytest.mark.parametrize(
    "flags, line, rules",
    [
        ("--num_iter 64 --train_num_iter 9,64", ONE_A_STEP.format(9), {"group": "one"}),
        ("--num_iter 4 --group staged --train_num_iter 2,4", STAGED.format(2), {}),
        ("--num_iter 2 --cfg_profile interval", STEPLESS, {}),
    ],
)
def test_before_heads_are_trained_on_images(flags, line, rules, trained, needing, tmp_path, capsys):
    needing(rules)
    words = [*TRAIN, *IMAGE, "--output_dir", str(tmp_path / "run"), "--init_from", str(trained), *flags.split()]
    assert refused(main_mar.main, words, capsys) == f"error: {line}" and not files(tmp_path)


def test_before_a_schedule_is_searched_for(trained, needing, tmp_path, monkeypatch, capsys):
    needing({"order": "raster"})
    monkeypatch.setattr(search_schedule, "RewardDistance", lambda *a: pytest.fail("it had started"))
    words = ["--checkpoint", str(trained), "--out", str(tmp_path / "s.json"), "--order", "halton"]
    line = "error: --order halton does not fit the model, which needs raster"
    assert refused(search_schedule.main, words, capsys) == line and not files(tmp_path)


def test_what_is_refused_could_not_be_sampled_and_the_rest_can():
    model, labels = Causal(6), torch.tensor([0, 1])
    model.fixed_rules = {"order": "random", "group": "one"}
    rules = build_rules("baseline", order="random", group="one")
    SampleConfig(num_iter=6, **model.fixed_rules).check(model)
    generate(model, labels, rules, 6, 1, seeds=[1, 2])
    with pytest.raises(ValueError, match="one token a step, an image has 6"):
        SampleConfig(num_iter=5, **model.fixed_rules).check(model)
    with pytest.raises(ValueError, match="num_iter 5 is too small: 2 tokens"):
        generate(model, labels, rules, 5, 1, seeds=[1, 2])
    SampleConfig(num_iter=1, cfg_profile="interval", group="one").check(tiny_mar())  # the last step draws all


def test_heads_replace_a_rule_that_is_not_named_too(trained, needing, tmp_path, monkeypatch, capsys):
    """Samples would show --group staged, and never the group head."""
    needing({})
    monkeypatch.setattr("main_mar.train", lambda *a: 0)
    words = [*TRAIN, *IMAGE, "--learn", "group", "--output_dir", str(tmp_path / "run"), "--init_from", str(trained)]
    words += "--num_iter 4 --train_num_iter 2,4".split()
    assert main_mar.main(words) == 0
    assert "--group staged leaves no place for --learn group" in refused(
        main_mar.main, [*words, "--group", "staged"], capsys
    )


def test_the_steps_of_a_model_that_draws_one_token_a_step_are_its_tokens_by_default():
    model, labels, steps = Causal(6), torch.tensor([0, 1]), []
    model.fixed_rules = {"order": "random", "group": "one"}
    default = SampleConfig().fitted(model.fixed_rules, "the model", 6)
    assert default.num_iter == 6 and SampleConfig().fitted({}, "the model", 6).num_iter == 64
    assert SampleConfig(num_iter=9).fitted(model.fixed_rules, "the model", 6).num_iter == 9
    SampleConfig(**model.fixed_rules).check(model)
    generate(model, labels, default.rules(), num_steps=1, seeds=[1, 2], callback=lambda step, *_: steps.append(step))
    assert steps == [*range(6)]
    for given in (dict(model="mar_ar_base"), dict(model="llamagen_ar_b", preset="digits")):
        assert resolve(given).sampling.num_iter is None  # a preset's are for other models; known with the tokenizer
        assert resolve({**given, "num_iter": 300}).sampling.num_iter == 300
    assert resolve({"preset": "digits"}).sampling.num_iter == 8 and resolve({}).sampling.num_iter == 8
    assert resolve({"model": "mar_base"}).sampling.num_iter == 64
