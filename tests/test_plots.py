"""What the figures show, read back from the Axes; that they are readable in light and in dark styles."""

import datetime
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from companion import metrics, plots
from companion.metrics import Estimate

BASE = Estimate(0.44, 0.35, 0.54, 108, "accuracy")
TUNED = Estimate(0.71, 0.62, 0.79, 108, "accuracy")
ALONE = Estimate(0.5, None, None, 1, "accuracy", "one sample")
NOTHING = Estimate(None, None, None, 0, "accuracy", "there are no values")


@pytest.fixture(autouse=True)
def figures():
    plt.switch_backend("agg")
    with plt.style.context("companion.style"):
        yield
    plt.close("all")


def bars(ax):
    """The ends of all error bars, as (x, y) pairs, to 9 digits."""
    drawn = [segment for lines in ax.collections for segment in lines.get_segments()]
    return [[tuple(np.round(end, 9)) for end in segment] for segment in drawn]


def points(ax):
    return [
        (float(x), float(y))
        for line in ax.lines
        if line.get_marker() == "o"
        for x, y in zip(line.get_xdata(orig=False), line.get_ydata(orig=False), strict=True)
    ]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


ALL = {
    "intervals": lambda ax=None: plots.intervals({"base": BASE, "tuned": NOTHING}, ax),
    "differences": lambda ax=None: plots.differences({"tuned": metrics.paired([0, 1], [1, 1])}, ax),
    "confusion": lambda ax=None: plots.confusion(metrics.confusion("aab", "abb"), ax),
    "reliability": lambda ax=None: plots.reliability(metrics.calibration([0.2, 0.9], [0, 1]), ax),
    "over_time": lambda ax=None: plots.over_time([1, 2], [BASE, TUNED], ax),
}


@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_it_draws_on_the_axes_given_and_else_on_a_figure_of_its_own(plot):
    _, (left, right) = plt.subplots(1, 2)
    assert plot(right) is right
    assert not left.has_data() and right.has_data()
    own = plot()
    assert own.figure is not right.figure
    own.figure.canvas.draw()


@pytest.mark.parametrize("style", ["companion.style", "dark_background"])
@pytest.mark.parametrize("plot", ALL.values(), ids=ALL)
def test_what_is_drawn_stands_out_from_its_ground(plot, style):
    with plt.style.context(style):
        ax = plot()
        ground = ax.get_facecolor()
        colors = [line.get_color() for line in ax.lines]
        colors += [color for lines in ax.collections for color in lines.get_colors()]
        if not ax.images:
            colors += [text.get_color() for text in ax.texts]
        assert all(plots._contrast(color, ground) >= 3 for color in colors), [to_hex(c) for c in colors]


def test_on_axes_that_are_given_no_other_figure_is_made():
    before = plt.get_fignums()
    _, ax = plt.subplots()
    for plot in ALL.values():
        plot(ax)
    assert len(plt.get_fignums()) == len(before) + 1


def test_intervals_are_listed_from_the_top_with_their_ends():
    ax = plots.intervals({"base": BASE, "tuned": TUNED})
    assert names(ax.yaxis) == ["base", "tuned"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert points(ax) == [(0.44, 0), (0.71, 1)]
    assert bars(ax) == [[(0.35, 0), (0.54, 0)], [(0.62, 1), (0.79, 1)]]
    assert ax.get_xlabel() == "accuracy"


def test_without_an_interval_there_is_a_point_and_without_a_value_a_word():
    ax = plots.intervals({"alone": ALONE, "none": NOTHING, "base": BASE})
    assert points(ax) == [(0.5, 0), (0.44, 2)]
    assert len(bars(ax)) == 1
    assert texts(ax) == ["not defined"] and ax.texts[0].get_position()[1] == 1
    assert names(ax.yaxis) == ["alone", "none", "base"]


def test_estimates_of_different_things_have_no_common_label():
    ax = plots.intervals({"base": BASE, "seconds": metrics.mean([1, 2, 4])})
    assert ax.get_xlabel() == ""


def test_a_difference_is_filled_where_its_interval_leaves_out_zero_and_hollow_where_not():
    clear = metrics.paired([0] * 30 + [1] * 70, [1] * 30 + [1] * 70)
    unclear = metrics.paired([0] * 3 + [1] * 97, [1] * 3 + [1] * 95 + [0] * 2)
    undefined = metrics.paired([], [])
    ax = plots.differences({"clear": clear, "unclear": unclear, "undefined": undefined})
    zero, first, second = (line for line in ax.lines if line.get_marker() in ("o", "None"))
    assert list(zero.get_xdata()) == [0, 0]
    assert to_hex(first.get_markerfacecolor()) == to_hex("C0")
    assert to_hex(second.get_markerfacecolor()) == to_hex(ax.get_facecolor())
    assert points(ax) == [(0.3, 0), (0.01, 1)]
    assert texts(ax) == ["not defined"]


def test_confusion_shows_each_count_and_shades_by_the_share_of_the_row():
    ax = plots.confusion(metrics.confusion(["a"] * 9 + ["b"] * 3, ["a"] * 8 + ["b"] * 4))
    assert texts(ax) == ["8", "1", "0", "3"]
    assert np.allclose(ax.images[0].get_array(), [[8 / 9, 1 / 9], [0, 1]])
    assert names(ax.xaxis) == names(ax.yaxis) == ["a", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("said", "truth")


@pytest.mark.parametrize("style", ["companion.style", "dark_background"])
def test_each_count_can_be_read_on_its_shade(style):
    with plt.style.context(style):
        table = metrics.confusion(
            [i // 20 for i in range(220)], [11 if i % 20 < i // 20 else 0 for i in range(220)]
        )
        ax = plots.confusion(table)
        shares = ax.images[0].get_array().ravel()
        for text, back in zip(
            ax.texts, ax.images[0].to_rgba(ax.images[0].get_array()).reshape(-1, 4), strict=True
        ):
            assert plots._contrast(text.get_color(), back) >= 3.9
        assert len(set(np.round(shares, 2))) > 8


def test_a_label_without_samples_leaves_its_row_empty():
    ax = plots.confusion(metrics.confusion(["a"], ["b"]))
    assert texts(ax) == ["0", "1", "0", "0"]


def test_an_empty_table_says_so():
    ax = plots.confusion(metrics.confusion([], []))
    assert texts(ax) == ["no samples"] and not ax.images
    ax.figure.canvas.draw()


def test_reliability_shows_each_bin_against_the_diagonal():
    found = metrics.calibration([0.1, 0.1, 0.9, 0.9, 0.9], [0, 1, 1, 1, 0], bins=2)
    ax = plots.reliability(found)
    assert list(ax.lines[0].get_xdata()) == list(ax.lines[0].get_ydata()) == [0, 1]
    assert points(ax) == [(pytest.approx(0.1), 0.5), (pytest.approx(0.9), pytest.approx(2 / 3))]
    ends = [end[1] for bar in bars(ax) for end in bar]
    assert ends == pytest.approx([*found.table.loc[0, ["low", "high"]], *found.table.loc[1, ["low", "high"]]])


def test_reliability_of_nothing_is_the_diagonal():
    ax = plots.reliability(metrics.calibration([], []))
    assert points(ax) == []
    ax.figure.canvas.draw()


def test_over_time_leaves_a_gap_where_nothing_is_defined():
    days = [datetime.date(2026, 11, day) for day in (1, 2, 3, 4)]
    ax = plots.over_time(days, [BASE, NOTHING, ALONE, TUNED])
    values = [y for _, y in points(ax)]
    assert values[0] == 0.44 and math.isnan(values[1]) and values[2:] == [0.5, 0.71]
    ends = [[y for _, y in bar] for bar in bars(ax)]
    assert [ends[0], ends[3]] == [[0.35, 0.54], [0.62, 0.79]]
    assert ax.get_ylabel() == "accuracy"
    ax.figure.canvas.draw()


def test_over_time_takes_names_and_has_no_half_runs():
    ax = plots.over_time(["old", "new"], [BASE, TUNED])
    ax.figure.canvas.draw()
    assert names(ax.xaxis) == ["old", "new"]
    ax = plots.over_time([1, 2], [BASE, TUNED])
    assert all(tick == round(tick) for tick in ax.get_xticks())


def test_over_time_names_what_does_not_fit():
    with pytest.raises(ValueError, match="3 times for 2 estimates"):
        plots.over_time([1, 2, 3], [BASE, TUNED])
