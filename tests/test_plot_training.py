"""Curves of training runs: which quantities have a panel, and which runs the legend names."""

import pytest

from scripts import plot_training
from training.run_log import RunLog


def run_of(folder, **values):
    """A run that logged these quantities at three steps."""
    log = RunLog(folder, folder, 0)
    for step in (1, 2, 3):
        log.step(step, {name: value * step for name, value in values.items()})
    log.close()
    return folder


def plotted(monkeypatch, path, *flags) -> tuple[dict[str, list[str]], list[str]]:
    """({panel: the runs with a line in it}, the legend) of the plot, which is drawn and written to a path."""
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    assert plot_training.main([*map(str, flags), "--out", str(path)]) == 0
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    legends = [*figure.legends, *(panel.get_legend() for panel in panels if panel.get_legend())]
    named = [text.get_text() for legend in legends for text in legend.get_texts()]
    return {panel.get_title(): [line.get_label() for line in panel.lines] for panel in panels}, named


def test_a_run_that_the_first_panel_lacks_is_in_the_legend(tmp_path, monkeypatch):
    backbone, heads = run_of(tmp_path / "a" / "backbone", mse=1.0), run_of(tmp_path / "a" / "heads", tau_mean=0.9)
    panels, legend = plotted(monkeypatch, tmp_path / "x.png", heads, backbone)
    assert panels == {"mse": ["a/backbone"], "tau_mean": ["a/heads"]} and legend == ["a/heads", "a/backbone"]


def test_a_run_without_any_of_the_quantities_is_named(tmp_path, monkeypatch, capsys):
    runs = run_of(tmp_path / "a" / "one", mse=1.0), run_of(tmp_path / "a" / "two", rate=1.0)
    panels, legend = plotted(monkeypatch, tmp_path / "x.png", *runs)
    assert panels == {"mse": ["a/one"]} and legend == ["a/one"]
    assert capsys.readouterr().err == "in no panel, since they logged none of mse: a/two\n"


@pytest.mark.parametrize(
    "logged", [("reward", "distance_digits", "distance_pixels", "w_mean"), ("ce", "accuracy"), ("mse", "order")]
)
def test_what_a_run_minimises_is_in_its_plot(logged, tmp_path, monkeypatch):
    """Distances of whole images, whose names are those of the features; losses of ids; losses of latents."""
    panels, _ = plotted(monkeypatch, tmp_path / "x.png", run_of(tmp_path / "run", **dict.fromkeys(logged, 1.0)))
    assert tuple(panels) == logged


def test_runs_of_the_same_name_are_two_lines(tmp_path, monkeypatch):
    runs = [run_of(tmp_path / part / "heads" / "seed1", mse=1.0) for part in "ab"]
    panels, legend = plotted(monkeypatch, tmp_path / "x.png", *runs)
    assert panels == {"mse": ["a/heads/seed1", "b/heads/seed1"]} and len(legend) == 2
    panels, _ = plotted(monkeypatch, tmp_path / "x.png", runs[0], runs[0])
    assert panels == {"mse": ["heads/seed1"]}
