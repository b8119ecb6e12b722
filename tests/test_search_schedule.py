"""scripts/search_schedule.py: where a search begins and what it moves, that it goes on exactly, what it refuses."""

import json

import numpy as np
import pytest

import main_mar
from heads.searched import KINDS, read_schedule, schedule_setting
from scripts import search_schedule
from tests.helpers import untrained
from tests.helpers_generate import rules_of
from tests.helpers_ids import add_tokenizers
from tests.test_cli import refused
from tests.test_sample import draw, rows
from training.search import GRID, MOVES, NUM_KNOTS, Options, Search, hand_made_grid, moved, values_of
from util.evaluation.reward import RewardDistance, principal_directions, reward_kinds
from util.images.datasets import build_dataset

pytestmark = pytest.mark.on_cpu("runs are compared bit for bit, which a GPU promises with --deterministic alone")

START = dict(group=[0.25, 0.5, 1.0], tau=[1.0, 0.9, 0.8], cfg=[2.0, 2.0, 1.0], profile=[1.0] * NUM_KNOTS)
GOAL = moved(START, np.linspace(-1, 1, 3 * 3 + NUM_KNOTS))
CHECKPOINT = "--train_num_iter 2,4".split()


def toy(values, draw=0) -> dict:
    """Squared distances to GOAL in two kinds of values each, never 0."""
    far = {kind: float(np.square(np.subtract(values[kind], GOAL[kind])).sum()) for kind in KINDS}
    return {"a": 1e-4 + far["group"] + far["cfg"], "b": 1e-4 + far["tau"] + far["profile"]}


def search(
    path, measure=toy, grid=(START, GOAL | dict(cfg=[9.0, 9.0, 9.0])), seed=3, reward_weights=(1.0, 1.0), **settings
):
    return Search(measure, list(grid), path, settings, Options(8, seed, 0.5, dict(zip("ab", reward_weights))))


# --------------------------------------------------------------------------------------------------------- the space


def test_the_start_is_at_zero_and_every_coordinate_moves_its_value():
    size = 3 * 3 + NUM_KNOTS
    assert moved(START, np.zeros(size)) == START
    for i in range(3):
        x = np.zeros(size)
        x[3 + i], x[6 + i], x[9 + i] = 1.0, 1.0, -1.0
        values = moved(START, x)
        assert values["tau"][i] == pytest.approx(START["tau"][i] * np.exp(MOVES["tau"]), abs=1e-6)
        assert values["cfg"][i] == pytest.approx(START["cfg"][i] + MOVES["cfg"])
        assert values["profile"][i] == pytest.approx(1 - MOVES["profile"])
        x = np.zeros(size)
        x[i] = 1.0
        sizes = np.diff(START["group"], prepend=0.0)
        sizes[i] *= np.exp(MOVES["group"])
        np.testing.assert_allclose(moved(START, x)["group"], np.cumsum(sizes) / sizes.sum(), atol=1e-6)


@pytest.mark.parametrize("kinds", [("group", "tau", "cfg"), ("tau", "cfg")])
def test_a_schedule_moves_the_kinds_that_it_has_as_it_does_with_all(kinds):
    part = {kind: START[kind] for kind in kinds}
    x = np.linspace(-1, 1, 3 * 3 + NUM_KNOTS)
    mine = x[0 if "group" in kinds else 3 : 9]
    assert moved(part, mine) == {kind: moved(START, x)[kind] for kind in kinds}
    for values in hand_made_grid(4, 16, kinds):
        assert tuple(values) == kinds and json.loads(schedule_setting(json.dumps(values))) == values


@pytest.mark.parametrize("scale", [1.0, 5.0, 60.0])
def test_every_point_is_a_schedule(scale):
    for seed in range(20):
        values = moved(START, scale * np.random.RandomState(seed).randn(3 * 3 + NUM_KNOTS))
        assert json.loads(schedule_setting(json.dumps(values))) == values


@pytest.mark.parametrize("num_iter", [1, 2, 4, 9])
def test_the_grid_are_schedules_of_hand_made_rules(num_iter):
    grid = hand_made_grid(num_iter, 16)
    assert len(grid) == len({json.dumps(values) for values in grid}) or num_iter == 1
    for values in grid:
        schedule_setting(json.dumps(values))
        assert [len(values[kind]) for kind in ("group", "tau", "cfg")] == [num_iter] * 3
    cosine = values_of(rules_of(cfg=2.0, cfg_schedule="constant"), 4, 256)
    assert [256 * share for share in cosine["group"]] == pytest.approx([20, 75, 159, 256], abs=1e-3)
    assert cosine["cfg"] == [2.0] * 4 and cosine["tau"] == [1.0] * 4


# -------------------------------------------------------------------------------------------------------- the search


def test_a_search_improves_on_its_start(tmp_path):
    searching = search(tmp_path / "state.json")
    searching.run(150, 1e9, quiet=True)
    assert searching.start == START  # the other point of the grid has the smaller b, but by far the larger a
    ends = searching.candidates()
    assert ends.keys() == {"start", "mean"} and ends["start"] == START
    assert all(toy(ends["mean"])[kind] < 0.2 * toy(START)[kind] for kind in "ab")


def test_a_search_fits_no_draw(tmp_path):
    """Each generation has images of its own, which its points share: what is good for one draw alone does not last."""
    draws, far = [], {}

    def noisy(values, draw):
        pull = np.random.RandomState(draw + 10).randn(3)  # where this draw's images would have τ
        return {kind: x + np.exp(0.5 * float(pull @ values["tau"])) for kind, x in toy(values).items()}

    def listened(values, draw):
        draws.append(draw)
        return noisy(values, draw)

    for name, measure in (("new", listened), ("one", lambda values, draw: noisy(values, 1))):
        searching = search(tmp_path / f"{name}.json", measure)
        searching.run(50, 1e9, quiet=True)
        far[name] = np.square(np.subtract(searching.candidates()["mean"]["tau"], GOAL["tau"])).sum()
    assert draws == [0, 0, *(1 + i // 8 for i in range(len(draws) - 2))]
    assert far["new"] < 0.5 * far["one"]


def test_weights_choose_what_a_search_improves(tmp_path):
    """Two goals that pull against each other: the heavier kind of distance ends nearer to its own."""

    def torn(values, draw=0):
        far = {kind: np.square(np.subtract(values["tau"], goal)).sum() for kind, goal in (("a", 0.5), ("b", 1.2))}
        return {kind: 0.01 + float(x) for kind, x in far.items()}

    ends = []
    for number, reward_weights in enumerate([(4.0, 1.0), (1.0, 4.0)]):
        searching = search(tmp_path / f"{number}.json", torn, [START], reward_weights=reward_weights)
        searching.run(60, 1e9, quiet=True)
        ends.append(torn(searching.candidates()["mean"]))
    assert ends[0]["a"] < 0.5 * ends[1]["a"] and ends[1]["b"] < 0.5 * ends[0]["b"]


@pytest.mark.parametrize("stop_at", [1, 2, 7, 30])
def test_a_search_goes_on_bit_for_bit(stop_at, tmp_path):
    """Interrupted within any evaluation and gone on with, whatever became of numpy's random state."""
    whole = search(tmp_path / "whole.json")
    whole.run(4, 1e9, quiet=True)

    class Interrupted(Exception):
        pass

    calls = []

    def measure(values, draw):
        calls.append(values)
        np.random.seed(len(calls))  # noqa: NPY002
        if len(calls) == stop_at:
            raise Interrupted
        return toy(values)

    path = tmp_path / "part.json"
    with pytest.raises(Interrupted):
        search(path, measure).run(4, 1e9, quiet=True)
    again = search(path, measure)
    again.run(4, 1e9, quiet=True)
    first, second = (json.loads(p.read_text()) for p in (tmp_path / "whole.json", path))
    first.pop("seconds"), second.pop("seconds")
    assert first == second and again.candidates() == whole.candidates()
    assert len(calls) <= 2 + 4 * 8 + 8  # at most one generation twice


def test_a_finished_search_measures_nothing_and_a_longer_one_goes_on(tmp_path):
    search(tmp_path / "s.json").run(2, 1e9, quiet=True)
    search(tmp_path / "s.json", lambda *arguments: pytest.fail("measured")).run(2, 1e9, quiet=True)
    longer = search(tmp_path / "s.json")
    longer.run(3, 0.0, quiet=True)  # no time
    assert len(longer.state["generations"]) == 2
    longer.run(3, 1e9, quiet=True)
    assert len(longer.state["generations"]) == 3


def test_a_state_of_another_search_is_refused(tmp_path):
    path = tmp_path / "s.json"
    search(path, weights="a").run(1, 1e9, quiet=True)
    for options, shown in ((dict(weights="b"), "weights 'a', not 'b'"), (dict(weights="a", seed=4), "seed 3, not 4")):
        with pytest.raises(ValueError, match=shown):
            search(path, **options)
    with pytest.raises(ValueError, match="of a search with reward_weights"):
        search(path, weights="a", reward_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="of a search with grid"):
        search(path, weights="a", grid=[START])
    state = json.loads(path.read_text())
    state["generations"][0]["points"] = "0"
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="another version of cma or numpy"):
        search(path, weights="a").run(2, 1e9, quiet=True)


# -------------------------------------------------------------------------------------------------------- the reward


def test_the_reward_is_0_for_the_real_images_and_grows_with_noise():
    real = build_dataset("digits")
    images = np.stack([np.moveaxis(real[i][0].numpy(), 0, -1) for i in range(len(real))])
    reward = RewardDistance(real, ("digits", "pixels"))
    assert all(value < 1e-6 for value in reward(images).values())
    draws = np.random.default_rng(0).integers(-60, 60, images.shape)
    noisy = [reward((images + share * draws).clip(0, 255).astype(np.uint8)) for share in (0.5, 1.0)]
    assert all(0.01 < noisy[0][kind] < noisy[1][kind] for kind in ("digits", "pixels"))


def test_many_features_are_projected_to_their_principal_directions():
    g = np.random.default_rng(0)
    rows = g.normal(size=(400, 30)) * np.linspace(0.1, 3, 30)
    directions = principal_directions(rows, 5)
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-12)
    kept = np.cov(rows @ directions, rowvar=False)
    np.testing.assert_allclose(np.sort(np.diag(kept)), np.linalg.eigvalsh(np.cov(rows, rowvar=False))[-5:], rtol=1e-9)
    assert np.array_equal(principal_directions(rows, 30), np.eye(30))


@pytest.mark.parametrize(
    "text, message", [("digits", "at least two"), ("digits,digits", "two"), ("digits,x", "'x'"), ("", "''")]
)
def test_a_reward_has_two_kinds(text, message):
    with pytest.raises(ValueError, match=message):
        reward_kinds(text)


# ------------------------------------------------------------------------------------------------------- the program


def test_the_program_writes_a_schedule_that_sampling_takes(tmp_path, capsys):
    checkpoint, out = untrained(tmp_path / "c"), tmp_path / "new" / "s.json"
    flags = ["--checkpoint", str(checkpoint), "--out", str(out)]
    flags += "--iterations 1 --popsize 4 --num_images 12 --batch_size 6 --num_iter 2 --num_sampling_steps 2".split()
    assert search_schedule.main(flags) == 0
    content = read_schedule(out)
    provenance = content["provenance"]
    assert len(provenance["weights"]) == 16 and provenance["seed"] == 1 and provenance["evaluations"] == 28
    assert (provenance["num_iter"], provenance["num_sampling_steps"], provenance["order"]) == (2, 2, "random")
    ratios = provenance["distance"]["unseen_over_start"]
    assert ratios.keys() == {"start", "mean"} and provenance["point"] == min(ratios, key=ratios.get)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = out.read_bytes()
    assert search_schedule.main(flags) == 0 and out.read_bytes() == before  # nothing is left to do
    assert draw(checkpoint, tmp_path / "images", "--num_images", "4", "--schedule", out) == 0
    assert json.loads(rows(tmp_path / "images")[0]["settings"]["schedule"]) == content["values"]
    assert "neither has seen" in capsys.readouterr().out
    assert "with seed 1, not 2" in refused(search_schedule.main, [*flags, "--seed", "2"], capsys)
    out.write_text("mine")
    assert "not of the kind" in refused(search_schedule.main, flags, capsys) and out.read_text() == "mine"


@pytest.mark.parametrize(
    "size, order, kinds",
    [
        ("mar_tiny --loss ce --buffer_size 2", "random", {"group", "tau", "cfg"}),
        pytest.param("mar_ar_tiny --loss ce --ar_order random", "random", {"tau", "cfg"}, marks=pytest.mark.slow),
        pytest.param("causal_gpt_tiny", "raster", {"tau", "cfg"}, marks=pytest.mark.slow),
    ],
)
def test_models_of_ids_are_searched_without_a_profile(size, order, kinds, tmp_path, monkeypatch):
    """And causal ones without groups: two values of τ and w stand for their 16 steps."""
    add_tokenizers(monkeypatch)
    words = f"--data digits --model {size} --tokenizer grey16 --img_size 8 --batch_size 1024 --epochs 1 --lr 0"
    words += " --num_images 1 --metrics none --num_workers 0 --warmup_epochs 0 --eval_freq 100"
    assert main_mar.main([*words.split(), "--output_dir", str(tmp_path / "c")]) == 0
    out = tmp_path / "s.json"
    flags = "--iterations 1 --popsize 4 --num_images 12 --batch_size 12 --num_iter 2".split()
    monkeypatch.setitem(GRID, "cfg", (1.25,))
    assert search_schedule.main(["--checkpoint", str(tmp_path / "c"), "--out", str(out), *flags]) == 0
    content = read_schedule(out)
    assert content["values"].keys() == kinds and {len(numbers) for numbers in content["values"].values()} == {2}
    assert content["provenance"]["order"] == order
    steps = "2" if "group" in kinds else "16"
    assert draw(tmp_path / "c", tmp_path / "images", "--num_images", "2", "--schedule", out, "--num_iter", steps) == 0


@pytest.mark.parametrize(
    "flags, shown",
    [
        ("--out s.json", "--checkpoint is needed"),
        ("--checkpoint c", "--out is needed"),
        ("--checkpoint c --out s.txt", "must end in .json"),
        ("--checkpoint nowhere --out s.json", "no checkpoint at nowhere"),
        ("--checkpoint c --out s.json --features digits", "at least two kinds"),
        ("--checkpoint c --out s.json --reward_weights 1", "'1'"),
        ("--checkpoint c --out s.json --order spiral", "'spiral'"),
        ("--checkpoint c --out s.json --popsize 1", "at least 4"),
    ],
)
def test_wrong_flags_are_one_line(flags, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert shown in refused(search_schedule.main, flags.split(), capsys)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_configuration(capsys):
    assert search_schedule.main(["--dry_run", "--num_iter", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["num_iter"] == 8
