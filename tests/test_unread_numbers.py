"""Numbers of rules: which rules read them, and that one which none of them reads is refused."""

import pytest

import sample
from heads.policy import FLAGS, RULES, hand_made
from heads.schedules import READ_BY, RuleOptions
from sampling.settings import SampleConfig, check_read
from tests.helpers import untrained
from tests.helpers_generate import SCHEDULE, state
from tests.test_cli import refused

READ = set()


class Listening(RuleOptions):
    """Options that note in READ what is read of them."""

    def __getattribute__(self, name):
        READ.add(name)
        return super().__getattribute__(name)


def evaluate(kind: str, name: str, options) -> None:
    """Make a hand-made rule and ask it about a step in the middle, at which nothing is at its bound."""
    now, rule = state([9, 12], step=1, num_start=[16, 16]), hand_made(kind, name, options)
    if kind == "order":
        return rule(now) if callable(rule) else None
    decided = rule(now, now.num_unknown - 3) if kind == "cfg" else rule(now)
    return decided(0.5) if callable(decided) else decided


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, row in RULES.items() for name in row[0]])
def test_the_table_says_what_the_rules_read(kind, name):
    options = Listening(schedule=SCHEDULE)
    READ.clear()
    evaluate(kind, name, options)
    assert READ & READ_BY.keys() == {number for number, (k, rules) in READ_BY.items() if k == kind and name in rules}


def config(**settings) -> SampleConfig:
    return SampleConfig(num_iter=4, **settings)


OTHER = dict(order_base="halton", group_base="power", confidence_score="random")  # not the default


@pytest.mark.parametrize(
    "settings",
    [
        [dict(group_p=3.0, group="power")],
        [dict(group_p=3.0), dict(group_p=3.0, group="power")],  # one of a sweep reads it
        [dict(group_p=3.0, infer_mode="policy", group_base="power")],
        [dict(cfg_interval="0.0,1.0")],  # the default, which changes nothing, in other words
        [dict(order_noise=1.0, infer_mode="both"), dict(order_noise=0.5, infer_mode="both")],
        [dict(confidence_noise=2.0, infer_mode="policy", order_base="confidence")],
        [dict(confidence_noise=2.0, infer_mode="maskgil")],
        [dict(cfg_t_interval="0.1,0.9", cfg_profile="interval")],
        [dict(cfg=3.0, temperature=0.9)],
    ],
)
def test_a_number_that_a_rule_reads_is_taken(settings):
    check_read(dict.fromkeys(set().union(*settings)), [config(**each) for each in settings])


@pytest.mark.parametrize("name", READ_BY)
def test_a_number_that_no_rule_reads_is_refused(name):
    kind, rules = READ_BY[name]
    usual = getattr(SampleConfig, name)
    value = usual + 1 if isinstance(usual, float) else "0,0.5" if "," in usual else OTHER[name]
    reader = f"a learned {kind}" if rules == ("learned",) else f"--{FLAGS[kind]} {rules[0]}"
    for settings in ([config(**{name: value})], [config(cfg=2.0), config(**{name: value}, cfg=2.0)]):
        with pytest.raises(ValueError, match=f"--{name} {value} has no meaning without {reader}"):
            check_read({name: value}, settings)
        check_read({}, settings)  # not given by hand: as the checkpoint has it


def test_heads_are_not_switched_off_where_there_are_none():
    with pytest.raises(ValueError, match="--heads_adaptive off has no meaning without a learned rule"):
        check_read({"heads_adaptive": ["on", "off"]}, [config()])
    check_read({"heads_adaptive": ["on", "off"]}, [config(), config(infer_mode="guidance")])
    with pytest.raises(ValueError, match="has no meaning"):  # a profile is the same for all images
        check_read({"heads_adaptive": ["off"]}, [config(cfg_profile="learned")])


def test_it_is_one_line_before_anything_is_written(tmp_path, capsys):
    words = ["--checkpoint", str(untrained(tmp_path / "c")), "--output_dir", str(tmp_path / "out")]
    line = refused(sample.main, [*words, "--cfg_interval", "0,0.5", "--cfg", "2", "--cfg_power", "2"], capsys)
    assert "--cfg_interval 0,0.5 has no meaning without --cfg_schedule interval" in line
    assert not (tmp_path / "out").exists()
