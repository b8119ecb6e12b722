"""The rule `schedule`: the values of a file at each step, other numbers of steps, which rules it stands for, what is
refused, and that a setting is the values and not the name of the file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import sample
from heads.policy import PolicyHeads, build_rules
from heads.searched import KINDS, schedule_setting, schedule_values
from sampling.loop import generate
from sampling.settings import SampleConfig
from tests.helpers import named_weights, tiny_mar, untrained
from tests.helpers_generate import LENGTH, SCHEDULE, rules_of, run, state
from tests.helpers_heads import OF_LATENTS, state_of
from tests.test_cli import refused
from tests.test_sample import draw, folder_of, pngs, rows
from tests.test_visiting import draws_of
from training.config import resolve
from training.objectives.head_losses import HeadLossConfig
from training.objectives.token import HeadPlan
from training.objectives.visiting import make_visits
from util.checkpoint import load_checkpoint, save_checkpoint

VALUES = json.loads(SCHEDULE)


def written(folder, values, name="schedule.json", **provenance):
    """A schedule's file."""
    path = folder / name
    path.write_text(json.dumps({"provenance": provenance, "values": values}, indent=1))
    return path


def plans_of(rules, num_iter, length=64):
    """(known share of the tokens after the step, plan) of each step."""
    n, plans = length, []
    for step in range(num_iter):
        plan = rules(state([n], step, num_iter, num_start=[length], length=length))
        n -= int(plan.select.sum())
        plans.append((1 - n / length, plan))
    return plans


# ------------------------------------------------------------------------------------------------------- closed forms


def test_at_its_own_steps_the_schedule_is_its_values():
    plans = plans_of(rules_of(schedule=SCHEDULE), 3)
    assert [known for known, _ in plans] == VALUES["group"]
    for (_, plan), tau, cfg in zip(plans, VALUES["tau"], VALUES["cfg"]):
        assert (plan.tau == tau).all() and (plan.cfg == np.float32(cfg)).all()
        assert [plan.profile(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 0.75, 0.5]


@pytest.mark.parametrize("num_iter", [1, 2, 4, 6, 9, 64, 70])
def test_other_steps_interpolate_over_the_progress(num_iter):
    """The cumulative curve from (0, 0); τ and w between 1/3, 2/3 and 1, and as at 1/3 before it."""
    plans, n = plans_of(rules_of(schedule=SCHEDULE), num_iter), 64
    for step, (known, plan) in enumerate(plans):
        u, places = (step + 1) / num_iter, np.arange(1, 4) / 3
        wanted = round(64 * (1 - np.interp(u, [0, *places], [0, *VALUES["group"]])))
        n = max(1, min(n - 1, wanted)) if n > 1 and step < num_iter - 1 else 0
        assert known == 1 - n / 64
        np.testing.assert_allclose(plan.tau, np.interp(u, places, VALUES["tau"]), rtol=1e-6)
        np.testing.assert_allclose(plan.cfg, np.interp(u, places, VALUES["cfg"]), rtol=1e-6)
        if n == 0:
            break


@pytest.mark.parametrize("num_iter", [1, 3, 5])
def test_the_values_of_the_baseline_give_its_images(mar, num_iter):
    """What the cosine, constant and linear rules decide, written into a schedule, bit for bit."""
    baseline = rules_of(cfg=2.5, temperature=0.9)
    plans = plans_of(baseline, num_iter, LENGTH)
    values = dict(group=[known for known, _ in plans], tau=[0.9] * num_iter, profile=[1.0] * 8)
    values["cfg"] = [float(plan.cfg[0, 0]) for _, plan in plans]
    rules = rules_of(schedule=json.dumps(values))
    assert torch.equal(run(mar, rules, num_iter), run(mar, baseline, num_iter))


def test_editing_takes_shares_of_what_was_unknown():
    rules = rules_of(schedule=SCHEDULE)
    k = [rules.group(state([n], 0, 3, num_start=[start], length=64)).item() for n, start in ((10, 10), (40, 40))]
    assert k == [round(10 * 0.25), 10]


# ------------------------------------------------------------------------------------------- which rules it stands for


def test_a_file_stands_for_the_rules_that_it_has_values_of():
    baseline = rules_of(cfg=2.0)
    for kind in KINDS:
        rules = rules_of(cfg=2.0, schedule=json.dumps({kind: VALUES[kind]}))
        for other in KINDS:
            before, after = getattr(baseline, other), getattr(rules, other)
            assert (before.func is after.func) == (other != kind)
    names = dict(group="cosine", tau_schedule="constant", cfg_schedule="linear", cfg_profile="constant")
    named = rules_of(schedule=SCHEDULE, **names)
    assert all(getattr(named, kind).func is getattr(baseline, kind).func for kind in KINDS)


@pytest.mark.parametrize("flag, kind", zip(("group", "tau_schedule", "cfg_schedule", "cfg_profile"), KINDS))
def test_the_rule_without_its_values_is_one_line(flag, kind):
    for schedule in (None, json.dumps({other: VALUES[other] for other in KINDS if other != kind})):
        with pytest.raises(ValueError, match=f"the {kind} rule 'schedule' needs --schedule FILE with values of {kind}"):
            rules_of(schedule=schedule, **{flag: "schedule"})


@pytest.mark.parametrize("mode", OF_LATENTS)
def test_untrained_heads_move_the_schedule_bit_for_bit(mode):
    mar, heads = tiny_mar(), PolicyHeads(16)
    options = dict(num_iter=4, num_steps=3, seeds=[4, 5, 6], clip=(-1, 1))
    base = generate(mar, [0, 2, -1], build_rules("baseline", schedule=SCHEDULE), **options)
    assert torch.equal(generate(mar, [0, 2, -1], build_rules(mode, heads, schedule=SCHEDULE), **options), base)
    assert not torch.equal(generate(mar, [0, 2, -1], build_rules("baseline", cfg=2.0), **options), base)


def test_heads_are_trained_around_the_schedule():
    """With a schedule the base of k, τ and w in training is what it is in sampling at that step."""
    draws, heads = draws_of(), PolicyHeads(16)
    options = SampleConfig(schedule=SCHEDULE)
    plan = HeadPlan(heads, HeadLossConfig(), options, draws, torch.zeros(*draws.mask.shape, 16))
    rules = build_rules("baseline", schedule=SCHEDULE)
    for i, (step, num_iter) in enumerate(zip(plan.state.step.tolist(), draws.policy.num_iter.tolist())):
        mask = draws.mask[i : i + 1]
        sampling = rules(state_of(mask, None, step, num_iter))
        assert int(sampling.select.sum()) == plan.k[i].item()
        assert sampling.tau[0, 0] == plan.tau[i, 0] and sampling.cfg[0, 0] == plan.w[i, 0]


def test_training_masks_follow_it():
    given = dict(preset="digits", train_masks="visited", schedule=SCHEDULE)
    config = resolve(given)
    visit = make_visits(config.masks, config.sampling, None)
    assert visit.names == {"order": "random", "group": "schedule"}
    with pytest.raises(ValueError, match="the group rule 'schedule' needs --schedule FILE"):
        resolve(dict(preset="digits", train_masks="visited", group="schedule"))


# --------------------------------------------------------------------------------------------------------- the setting


def test_a_setting_has_the_values_and_not_the_name_of_the_file(tmp_path):
    first = written(tmp_path, VALUES, seed=1)
    setting = schedule_setting(str(first))
    assert setting == schedule_setting(setting) == schedule_setting(str(written(tmp_path, VALUES, "b.json", seed=2)))
    assert {kind: value.tolist() for kind, value in schedule_values(setting).items()} == VALUES
    config = SampleConfig(schedule=str(first))
    assert config == SampleConfig(schedule=setting) and config.schedule == setting
    assert replace(config, cfg=2.0).schedule == setting
    other = SampleConfig(schedule=str(written(tmp_path, {**VALUES, "tau": [1.0, 0.9, 0.7500001]})))
    names = {config.name(), other.name(), SampleConfig().name()}
    assert len(names) == 3 and not any("json" in name or "{" in name for name in names)
    resolved = config.resolved()
    assert (resolved.order, resolved.group, resolved.cfg_profile) == ("random", "schedule", "schedule")
    assert resolved.name() == config.name() and replace(config, group="cosine").name() != config.name()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "no 'values'"),
        ("{", "is no JSON"),
        ('{"values": {}}', "has no values"),
        ('{"values": [1]}', "has no values"),
        ('{"values": {"order": [1]}}', "values of 'order'; valid: group, tau, cfg, profile"),
        ('{"values": {"tau": []}}', "tau must be a list"),
        ('{"values": {"tau": 1}}', "tau must be a list"),
        ('{"values": {"tau": ["1"]}}', "tau must be a list"),
        ('{"values": {"tau": [true]}}', "tau must be a list"),
        ('{"values": {"cfg": [NaN]}}', "cfg must be a list"),
        ('{"values": {"cfg": [-1]}}', "cfg must be a list"),
        ('{"values": {"profile": [1e999]}}', "profile must be a list"),
        ('{"values": {"profile": [1' + 400 * "0" + "]}}", "profile must be a list of numbers from 0 to 1000"),
        ('{"values": {"group": [0.5, 0.4, 1]}}', "group must be shares that rise to 1"),
        ('{"values": {"group": [0.5, 0.9]}}', "group must be shares that rise to 1"),
        ('{"values": {"group": [0.5, 1.5]}}', "group must be shares that rise to 1"),
    ],
)
def test_a_file_that_is_no_schedule_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        schedule_setting(str(path))
    flags = ["--checkpoint", "nowhere", "--output_dir", str(tmp_path / "out"), "--schedule", str(path)]
    assert "--schedule" in refused(sample.main, flags, capsys)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="none.json cannot be read: No such file"):
        schedule_setting(str(tmp_path / "none.json"))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b.json is no text"):
        schedule_setting(str(tmp_path / "b.json"))


# -------------------------------------------------------------------------------------------------------- the programs


def test_two_files_are_two_folders_and_an_edited_one_is_sampled_anew(tmp_path, capsys):
    checkpoint, out = untrained(tmp_path / "c"), tmp_path / "out"
    path, few = written(tmp_path, VALUES), ["--num_images", "4"]
    assert draw(checkpoint, out, *few, "--schedule", path) == 0
    assert draw(checkpoint, out, *few, "--schedule", written(tmp_path, VALUES, "copy.json", seed=9)) == 0
    assert len(rows(out)) == 1 and "already in" in capsys.readouterr().out
    written(tmp_path, {**VALUES, "tau": [1.0, 0.9, 0.5]})  # untrained weights have no guidance
    assert draw(checkpoint, out, *few, "--schedule", path) == 0
    first, second = rows(out)
    assert first["name"] != second["name"] and first["settings"] != second["settings"]
    assert json.loads(first["settings"]["schedule"]) == VALUES
    assert pngs(out / first["name"]) != pngs(out / second["name"])


def test_the_baseline_of_a_checkpoint_with_heads_uses_no_searched_value(tmp_path):
    """Its heads were trained around a schedule; `baseline` is what it is without, unless --schedule gives one."""
    plain = untrained(tmp_path / "plain", "--learn", "group,tau,cfg")
    content = load_checkpoint(plain)
    heads = PolicyHeads(len(content["heads"]["heads.cfg.norm.weight"]), ("group", "tau", "cfg"))
    content["heads"] = content["heads_ema"] = named_weights(heads).state_dict()
    save_checkpoint(plain, content)
    content["config"]["sample"] |= dict(schedule=schedule_setting(SCHEDULE), group="schedule")
    save_checkpoint(around := tmp_path / "around", content)
    file, both = ["--schedule", written(tmp_path, VALUES)], ["--infer_mode", "both", "--order", "random"]

    def sampled(name, checkpoint, *flags):
        assert draw(checkpoint, tmp_path / name, "--num_images", "4", *flags) == 0
        return pngs(folder_of(tmp_path / name))

    baseline = sampled("plain", plain)
    assert sampled("stored", around, "--infer_mode", "baseline") == baseline
    settings = rows(tmp_path / "stored")[0]["settings"]
    assert settings["schedule"] is None and settings["group"] == "cosine"
    assert sampled("given", around, *file) == sampled("given to plain", plain, *file) != baseline
    for flag in ("--group", "--tau_schedule", "--cfg_schedule", "--cfg_profile"):  # by hand, and without values
        with pytest.raises(ValueError, match="rule 'schedule' needs --schedule FILE"):
            sampled("by hand", around, "--infer_mode", "baseline", flag, "schedule")
    learned = sampled("both", around, *both)
    assert learned == sampled("both, given", plain, *both, *file, "--group", "schedule")
    assert learned != sampled("both, plain", plain, *both, "--group", "cosine")


def test_a_checkpoint_without_heads_keeps_the_schedule_that_it_was_trained_on(tmp_path):
    checkpoint = untrained(tmp_path / "c", "--train_masks", "visited", "--schedule", written(tmp_path, VALUES))
    (tmp_path / "schedule.json").unlink()  # the checkpoint has the values
    assert draw(checkpoint, tmp_path / "out", "--num_images", "4") == 0
    assert json.loads(rows(tmp_path / "out")[0]["settings"]["schedule"]) == VALUES
