"""Statistics against other libraries and against each other; how often intervals hold what they promise."""

import math
import statistics
from itertools import product

import numpy as np
import pandas as pd
import pytest
import sklearn.calibration
import sklearn.metrics
from scipy import stats

from companion import metrics

N = 40
VALUES = [(7 * i * i + 3 * i) % 101 / 100 for i in range(N)]
SHIFTED = VALUES[::-1][3:] + VALUES[:3]
RIGHT = [(5 * i * i + i) % 7 < 4 for i in range(N)]
OTHER = [(3 * i * i + 2 * i) % 5 < 2 for i in range(N)]
FOURS = [i // 4 for i in range(N)]
UNEQUAL = [math.isqrt(i) for i in range(N)]
TRUTH = ["abbc"[(i * i + i) % 4] for i in range(90)] + ["a", "d"]
SAID = ["abc"[(2 * i * i + i) % 3] for i in range(90)] + ["e", "a"]

# What other libraries gave for the data above.
# statsmodels 0.15.0: DescrStatsW(VALUES).tconfint_mean()
MEAN = (0.44775, 0.3487501720057753, 0.5467498279942246)
# statsmodels 0.15.0: OLS(VALUES, ones).fit(cov_type="cluster", cov_kwds={"groups": FOURS}, use_t=True)
# .conf_int(); inspect_ai 0.3.285: ci(cluster=...) of FOURS. Both gave the same.
CLUSTERED_MEAN = (0.44775, 0.3067163735418712, 0.5887836264581288)
# statsmodels 0.15.0: proportion_confint(18, 40, method="wilson"); inspect_ai 0.3.285: ci_wilson()
PROPORTION = (0.45, 0.30705307810904925, 0.6017090820106795)
# inspect_ai 0.3.285: ci_wilson(cluster=...) of FOURS
CLUSTERED_PROPORTION = (0.45, 0.2880274744099957, 0.623314846135806)
# statsmodels 0.15.0: mcnemar([[5, 17], [3, 15]], exact=True).pvalue
MCNEMAR = 0.0025768280029296875
# statsmodels 0.15.0: DescrStatsW(SHIFTED - VALUES).tconfint_mean()
PAIRED = (-0.0335, -0.18786252752789234, 0.12086252752789234)
# statsmodels 0.15.0: multipletests(P_VALUES, method="holm" and "fdr_bh")
P_VALUES = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.212, 0.216]
HOLM = [0.01, 0.072, 0.312, 0.312, 0.312, 0.312, 0.312, 0.615, 0.615, 0.615]
BH = [0.01, 0.04, 0.084, 0.084, 0.084, 0.1, 0.10571428571428572, 0.216, 0.216, 0.216]
# statsmodels 0.15.0: samplesize_proportions_2indep_onetail(difference, rate, 0.8, alternative="two-sided")
SAMPLES = {(0.05, 0.7): 1250.716733435614, (0.1, 0.5): 387.3385166990357, (-0.02, 0.9): 3840.8474824362725}


def exactly(numbers):
    return pytest.approx(numbers, rel=1e-9, abs=1e-9)


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


# The same as other libraries


def test_a_mean_is_that_of_statsmodels_and_scipy():
    assert ends(metrics.mean(VALUES)) == exactly(MEAN)
    low, high = stats.t.interval(0.9, N - 1, np.mean(VALUES), stats.sem(VALUES))
    assert ends(metrics.mean(VALUES, level=0.9))[1:] == exactly((low, high))


def test_a_clustered_mean_is_that_of_statsmodels_and_inspect_where_clusters_are_of_one_size():
    assert ends(metrics.mean(VALUES, FOURS)) == exactly(CLUSTERED_MEAN)


def test_with_unequal_clusters_the_error_and_its_freedom_are_those_of_the_matrices():
    """CR2 and Bell and McCaffrey's degrees of freedom as they are defined, with nothing simplified."""
    ones = np.ones((N, 1))
    rest = np.eye(N) - ones @ ones.T / N
    residuals = rest @ np.array(VALUES)
    variance, columns = 0.0, []
    for cluster in sorted(set(UNEQUAL)):
        inside = np.flatnonzero(np.array(UNEQUAL) == cluster)
        values, vectors = np.linalg.eigh(rest[np.ix_(inside, inside)])
        adjusted = vectors @ np.diag(values**-0.5) @ vectors.T @ ones[inside] / N
        variance += float(adjusted[:, 0] @ residuals[inside]) ** 2
        columns.append(rest[:, inside] @ adjusted[:, 0])
    products = np.array(columns) @ np.array(columns).T
    freedom = np.trace(products) ** 2 / (products**2).sum()
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    mean = np.mean(VALUES)
    assert ends(metrics.mean(VALUES, UNEQUAL)) == exactly((mean, mean - half, mean + half))


def test_a_cluster_for_each_sample_changes_nothing():
    assert ends(metrics.mean(VALUES, range(N))) == exactly(ends(metrics.mean(VALUES)))


def test_a_proportion_is_that_of_statsmodels_inspect_and_scipy():
    assert ends(metrics.proportion(RIGHT)) == exactly(PROPORTION)
    for right in (0, 1, 17, 20):
        found = stats.binomtest(right, 20).proportion_ci(0.9, method="wilson")
        estimate = metrics.proportion([1] * right + [0] * (20 - right), level=0.9)
        assert ends(estimate) == exactly((right / 20, found.low, found.high))


def test_a_clustered_proportion_is_that_of_inspect_where_clusters_are_of_one_size():
    assert ends(metrics.proportion(RIGHT, FOURS)) == exactly(CLUSTERED_PROPORTION)


def test_labels_are_counted_as_scikit_learn_counts_them():
    labels = sorted({*TRUTH, *SAID})
    table = metrics.confusion(TRUTH, SAID)
    assert table.to_numpy().tolist() == sklearn.metrics.confusion_matrix(TRUTH, SAID, labels=labels).tolist()
    assert list(table.index) == list(table.columns) == labels
    assert metrics.accuracy(TRUTH, SAID).value == exactly(sklearn.metrics.accuracy_score(TRUTH, SAID))
    of_each = sklearn.metrics.precision_recall_fscore_support(TRUTH, SAID, labels=labels, zero_division=0)
    found = metrics.by_label(TRUTH, SAID)
    assert [one.value or 0 for one in found["precision"]] == exactly(list(of_each[0]))
    assert [one.value or 0 for one in found["recall"]] == exactly(list(of_each[1]))
    assert list(found["f1"]) == exactly(list(of_each[2]))
    assert list(found["n"]) == list(of_each[3])


@pytest.mark.parametrize("average", ["macro", "weighted"])
@pytest.mark.parametrize("clusters", [None, [i // 2 for i in range(92)]], ids=["apart", "clustered"])
def test_precision_recall_and_f1_are_those_of_scikit_learn(average, clusters):
    for ours, theirs in (
        (metrics.precision, sklearn.metrics.precision_score),
        (metrics.recall, sklearn.metrics.recall_score),
        (metrics.f1, sklearn.metrics.f1_score),
    ):
        estimate = ours(TRUTH, SAID, clusters, average=average)
        assert estimate.value == exactly(theirs(TRUTH, SAID, average=average, zero_division=0))
        assert estimate.low < estimate.value < estimate.high


def test_the_interval_of_f1_is_that_of_a_bootstrap_with_scikit_learn():
    """By another way to the same: whole samples drawn, each resample scored by scikit-learn."""
    truth, said = np.array(TRUTH[:90]), np.array(SAID[:90])

    def score(rows):
        return sklearn.metrics.f1_score(truth[rows], said[rows], average="macro")

    result = stats.bootstrap((np.arange(90),), score, vectorized=False, n_resamples=300, rng=1)
    found = metrics.f1(truth, said)
    assert ends(found)[1:] == pytest.approx(tuple(result.confidence_interval), abs=0.03)


def test_calibration_is_that_of_scikit_learn():
    right = [int(value > 0.4) for value in SHIFTED]
    found = metrics.calibration(VALUES, right, bins=5)
    share, sure = sklearn.calibration.calibration_curve(right, VALUES, n_bins=5)
    assert list(found.table["right"]) == exactly(list(share))
    assert list(found.table["confidence"]) == exactly(list(sure))
    assert found.brier.value == exactly(sklearn.metrics.brier_score_loss(right, VALUES))
    ece = sum(n * abs(a - b) for n, a, b in zip(found.table["n"], share, sure, strict=True)) / N
    assert found.ece.value == exactly(ece)
    assert found.table["n"].sum() == N


def test_percentiles_are_those_of_numpy_between_the_values_of_scipy():
    found = metrics.percentile(VALUES, 80)
    low, high = stats.quantile_test(VALUES, p=0.8).confidence_interval(0.95)
    assert ends(found) == exactly((np.percentile(VALUES, 80), low, high))


def test_a_bootstrap_is_that_of_scipy():
    result = stats.bootstrap((VALUES,), np.median, n_resamples=2000, rng=7)
    found = metrics.bootstrap(VALUES, np.median, seed=7)
    assert ends(found) == exactly((np.median(VALUES), *result.confidence_interval))
    # A statistic that takes no axis, resampled one by one, gives the same.
    assert ends(metrics.bootstrap(VALUES, statistics.median, seed=7)) == exactly(ends(found))


def test_a_clustered_bootstrap_draws_whole_clusters():
    """With equal clusters, the mean of the clusters' means is the mean."""
    whole = [round(100 * value) for value in VALUES]  # so that sums are exact in any order
    means = [statistics.mean(whole[i : i + 4]) for i in range(0, N, 4)]
    found = metrics.bootstrap(whole, np.mean, FOURS)
    assert ends(found) == exactly(ends(metrics.bootstrap(means, np.mean)))
    assert found.n == N


def test_a_paired_test_of_right_and_wrong_is_that_of_statsmodels():
    found = metrics.paired(RIGHT, OTHER)
    assert found.p_value == exactly(MCNEMAR)
    assert (found.worse, found.better, found.same) == (3, 17, 20)
    assert found.difference.value == exactly(np.mean(OTHER) - np.mean(RIGHT))


@pytest.mark.parametrize("counts", [(17, 3, 40), (3, 17, 40), (1, 7, 21), (5, 5, 30), (2, 0, 300)])
def test_a_paired_interval_of_right_and_wrong_is_the_closed_form_of_tangos(counts):
    """The ends are roots of a quartic (Yang, Sun and Hardin 2013, doi:10.1002/sim.5570)."""
    b, c, n = counts
    z2 = stats.norm.ppf(0.975) ** 2
    k, d = n / z2, b - c
    quartic = [
        n**2 * (k + 1) ** 2,
        -n * d * (k + 1) * (4 * k + 1),
        2 * k * d**2 * (3 * k + 2) - n**2 * ((b + c) / z2 + 1),
        n * d * (2 * (b + c) / z2 + 1) - d**3 * (4 * k + 1) / z2,
        d**2 * (d**2 / z2 - (b + c)) / z2,
    ]
    roots = sorted(root.real for root in np.roots(quartic) if abs(root.imag) < 1e-6)
    found = metrics.paired([0] * b + [1] * c + [1] * (n - b - c), [1] * b + [0] * c + [1] * (n - b - c))
    assert ends(found.difference) == exactly((d / n, roots[0], roots[-1]))


def test_a_paired_interval_of_numbers_is_students_and_that_of_statsmodels():
    assert ends(metrics.paired(VALUES, SHIFTED).difference) == exactly(PAIRED)


def test_a_permutation_test_of_few_differences_is_exact_as_scipys():
    a, b = VALUES[:11], SHIFTED[:11]
    expected = stats.permutation_test(
        (np.subtract(b, a),), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert metrics.paired(a, b).p_value == exactly(expected)


def test_a_permutation_test_of_many_differences_is_near_to_all_permutations():
    for shift in (0.0, 0.05, 0.1):
        a, b = VALUES[:16], [value + shift for value in SHIFTED[:16]]
        d = np.subtract(b, a)
        sums = np.array(list(product((-1, 1), repeat=16))) @ d
        expected = np.mean(np.abs(sums) >= abs(d.sum()) - 1e-12)
        assert metrics.paired(a, b).p_value == pytest.approx(expected, abs=0.015)


def test_flipping_right_and_wrong_is_mcnemars_test():
    """Of differences that are all -1, 0 or 1 the exact permutation test is the exact test of McNemar."""
    a, b = [0, 0, 0, 0, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0, 1]
    clustered = metrics.paired(a, b, clusters=range(9))
    assert clustered.p_value == exactly(metrics.paired(a, b).p_value)


def test_corrections_are_those_of_statsmodels():
    assert metrics.adjust(P_VALUES) == exactly(HOLM)
    assert metrics.adjust(P_VALUES, "bh") == exactly(BH)
    assert metrics.adjust(P_VALUES[::-1]) == exactly(HOLM[::-1])


def test_samples_of_their_own_are_as_many_as_statsmodels_says():
    for (difference, rate), n in SAMPLES.items():
        assert metrics.samples_needed(difference, rate=rate) == math.ceil(n)


@pytest.mark.parametrize(("difference", "discordance"), [(0.05, 0.1), (0.1, 0.3), (-0.15, 0.25)])
def test_with_the_samples_needed_the_interval_leaves_out_zero_as_often_as_asked(difference, discordance):
    """The power that the number of samples gives to Tango's interval, summed over all outcomes."""
    n = metrics.samples_needed(difference, discordance=discordance)
    up, down = (discordance + difference) / 2, (discordance - difference) / 2
    power = 0.0
    for differ in range(n + 1):
        # Tango's interval leaves out 0 where the score test does: (better - worse)² / (better + worse) > z².
        better = np.arange(differ + 1)
        seen = (2 * better - differ) ** 2 > stats.norm.ppf(0.975) ** 2 * differ
        power += (
            stats.binom.pmf(differ, n, discordance)
            * stats.binom.pmf(better, differ, up / (up + down))[seen].sum()
        )
    assert power == pytest.approx(0.8, abs=0.04)


# How often the interval holds the truth: 93 to 97 % of the time


def covered(truth, intervals):
    found = [one.low <= truth <= one.high for one in intervals]
    return sum(found) / len(found)


def drawn(seed, repeats=2000):
    rng = np.random.default_rng(seed)
    return (rng for _ in range(repeats))


def holds(share, print_as):
    print(f"coverage of {print_as}: {share:.1%}")
    assert 0.93 <= share <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 20, 100])
def test_the_interval_of_a_mean_holds_the_truth(n):
    holds(
        covered(0.5, (metrics.mean(rng.uniform(size=n)) for rng in drawn(n))), f"the mean, uniform, n = {n}"
    )


@pytest.mark.slow
def test_the_interval_of_a_mean_of_skewed_times_holds_the_truth():
    intervals = (metrics.mean(rng.gamma(2.0, size=100)) for rng in drawn(1))
    holds(covered(2.0, intervals), "the mean, gamma(2), n = 100")


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 20, 100])
@pytest.mark.parametrize("shared", [0.1, 0.5])
def test_the_interval_of_a_clustered_mean_holds_the_truth(count, shared):
    """Conversations of 1 to 8 turns and a few long ones; `shared` is the part of the variance they share."""

    def sample(rng):
        clusters = np.repeat(np.arange(count), rng.geometric(0.25, count))
        common = rng.normal(size=count)[clusters] * math.sqrt(shared)
        return metrics.mean(common + rng.normal(size=len(clusters)) * math.sqrt(1 - shared), clusters)

    intervals = map(sample, drawn(count))
    holds(covered(0.0, intervals), f"the clustered mean, {count} clusters, {shared:.0%} shared")


def test_without_clusters_the_interval_would_be_too_narrow():
    """What clustering is for: the same data as if all samples were apart."""

    def sample(rng):
        common = np.repeat(rng.normal(size=50), 5)
        return metrics.mean(common + rng.normal(size=250))

    assert covered(0.0, map(sample, drawn(0, 500))) < 0.8


def coverage_of_a_proportion(n, shares):
    """At each share, summed over all outcomes, so exact."""
    found = [metrics.proportion([1] * k + [0] * (n - k)) for k in range(n + 1)]
    low, high = (np.array([getattr(one, end) for one in found])[:, None] for end in ("low", "high"))
    chances = stats.binom.pmf(np.arange(n + 1)[:, None], n, shares)
    return (chances * ((low <= shares) & (shares <= high))).sum(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 20, 50, 100, 500])
def test_the_interval_of_a_proportion_holds_the_truth_on_the_average_of_shares(n):
    share = coverage_of_a_proportion(n, np.linspace(0.05, 0.95, 181)).mean()
    holds(share, f"a proportion, mean of the shares 0.05 to 0.95, n = {n} (exact)")


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 100, 500])
def test_the_interval_of_a_proportion_holds_the_truth_at_each_share(n):
    found = coverage_of_a_proportion(n, np.linspace(0.2, 0.8, 121))
    holds(found.min(), f"a proportion, worst of the shares 0.2 to 0.8, n = {n} (exact)")
    holds(found.max(), f"a proportion, most careful of the shares 0.2 to 0.8, n = {n} (exact)")


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, 50, 200])
def test_the_interval_of_a_clustered_proportion_holds_the_truth(count):
    def sample(rng):
        clusters = np.repeat(np.arange(count), rng.integers(1, 8, count))
        return metrics.proportion(rng.random(len(clusters)) < rng.beta(2.4, 0.6, count)[clusters], clusters)

    holds(covered(0.8, map(sample, drawn(count))), f"a clustered proportion of 0.8, {count} clusters")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "up", "down"), [(30, 0.3, 0.1), (50, 0.1, 0.1), (50, 0.05, 0.05), (100, 0.1, 0.02)]
)
def test_the_interval_of_a_paired_difference_of_right_and_wrong_holds_the_truth(n, up, down):
    """Summed over all outcomes but the rarest, which are counted as missed."""
    held = 0.0
    for better, worse in product(range(n + 1), repeat=2):
        same = n - better - worse
        chance = (
            stats.multinomial.pmf((better, worse, same), n, (up, down, 1 - up - down)) if same >= 0 else 0
        )
        if chance > 1e-6:
            a, b = [0] * better + [1] * worse + [1] * same, [1] * better + [0] * worse + [1] * same
            one = metrics.paired(a, b).difference
            held += chance * (one.low <= up - down <= one.high)
    holds(held, f"a paired difference, {up} better, {down} worse, n = {n} (exact)")


@pytest.mark.slow
def test_the_interval_of_a_paired_difference_of_numbers_holds_the_truth():
    def sample(rng):
        old = rng.uniform(size=50)
        return metrics.paired(old, old * 0.5 + rng.uniform(size=50) * 0.6).difference

    holds(covered(0.05, map(sample, drawn(3, 1000))), "a paired difference of numbers, n = 50")


@pytest.mark.slow
def test_the_interval_of_a_clustered_paired_difference_holds_the_truth():
    def sample(rng):
        clusters = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        gain = rng.choice([-0.2, 0.0, 0.5], 40)[clusters]
        old, new = (rng.random((2, len(clusters))) < (0.4 + 0 * gain, 0.4 + gain)).astype(int)
        return metrics.paired(old, new, clusters).difference

    holds(covered(0.1, map(sample, drawn(4, 1000))), "a clustered paired difference, 40 clusters")


@pytest.mark.slow
@pytest.mark.parametrize(("n", "kind"), [(50, "uniform"), (100, "exponential")])
def test_the_interval_of_a_bootstrap_holds_the_truth(n, kind):
    def sample(rng):
        return metrics.bootstrap(
            rng.uniform(0, 2, n) if kind == "uniform" else rng.exponential(size=n), np.mean
        )

    holds(covered(1.0, map(sample, drawn(n, 1000))), f"a bootstrap of the mean, {kind}, n = {n}")


@pytest.mark.slow
def test_the_interval_of_a_clustered_bootstrap_holds_the_truth():
    def sample(rng):
        values = np.repeat(rng.normal(size=60), 3) + rng.normal(size=180)
        return metrics.bootstrap(values, np.mean, np.arange(180) // 3, resamples=600)

    holds(covered(0.0, map(sample, drawn(5, 1000))), "a clustered bootstrap of the mean, 60 clusters")


@pytest.mark.slow
def test_the_interval_of_macro_f1_holds_the_truth():
    chances = np.array([[0.3, 0.05, 0.02], [0.05, 0.25, 0.05], [0.03, 0.05, 0.2]])
    truth = np.mean(2 * np.diag(chances) / (chances.sum(0) + chances.sum(1)))

    def sample(rng):
        cells = rng.choice(9, size=150, p=chances.ravel())
        return metrics.f1(cells // 3, cells % 3)

    holds(covered(truth, map(sample, drawn(6, 600))), "macro F1 of 3 labels, n = 150")


# Not defined, and why


@pytest.mark.parametrize(
    "nothing", [[], [None], [math.nan, None, pd.NA]], ids=["empty", "missing", "all NaN"]
)
def test_of_nothing_nothing_is_defined(nothing):
    labels = [None] * len(nothing)
    found = [
        metrics.mean(nothing),
        metrics.mean(nothing, [1] * len(nothing)),
        metrics.proportion(nothing),
        metrics.proportion(nothing, [1] * len(nothing)),
        metrics.rate(nothing, "escalation"),
        metrics.percentile(nothing, 95),
        metrics.bootstrap(nothing, np.mean),
        metrics.bootstrap(nothing, np.mean, [1] * len(nothing)),
        metrics.accuracy(labels, labels),
        metrics.precision(labels, labels),
        metrics.recall(labels, labels),
        metrics.f1(labels, labels),
        metrics.calibration(nothing, nothing).ece,
        metrics.calibration(nothing, nothing).brier,
        metrics.paired(nothing, nothing).difference,
        metrics.cost([None for _ in nothing], prompt=1, completion=1),
    ]
    for one in found:
        assert (one.value, one.low, one.high, one.n) == (None, None, None, 0), one.what
        assert str(one).startswith("not defined: ") and one.why
    assert metrics.paired(nothing, nothing).p_value is None
    assert metrics.confusion(labels, labels).empty
    assert metrics.by_label(labels, labels).empty


def test_one_sample_has_a_value_and_no_interval():
    for one in (
        metrics.mean([0.5]),
        metrics.mean([0.5], ["c"]),
        metrics.percentile([0.5], 50),
        metrics.bootstrap([0.5], np.mean),
        metrics.paired([0.5], [1.0]).difference,
    ):
        assert (one.value, one.low, one.high, one.n) == (0.5, None, None, 1)
        assert one.why and "no interval" in str(one)
    assert metrics.paired([0.5], [1.0]).p_value == 1


def test_one_sample_right_or_wrong_has_the_wide_interval_that_it_deserves():
    one = metrics.proportion([True])
    assert one.value == 1 and one.low < 0.25 and one.high == 1
    one = metrics.paired([0], [1])
    assert one.difference.low < 0 and one.p_value == 1


def test_equal_values_give_no_interval_of_width_zero():
    for one in (
        metrics.mean([0.1] * 30),
        metrics.mean([0.1] * 30, [i // 3 for i in range(30)]),
        metrics.bootstrap([0.1] * 30, np.mean),
        metrics.bootstrap([0.1] * 30, np.mean, [i // 3 for i in range(30)]),
    ):
        assert one.value == pytest.approx(0.1)
        assert one.low is None and one.high is None and one.why
    found = metrics.paired([0.1] * 30, [0.1] * 30)
    assert (found.difference.value, found.difference.low, found.p_value) == (0, None, 1)
    for one in (metrics.proportion([1] * 30), metrics.paired([1] * 30, [1] * 30).difference):
        assert one.high - one.low > 0.1


def test_equal_clusters_give_no_interval_of_width_zero():
    one = metrics.mean([0.1, 0.3] * 20, [i // 2 for i in range(40)])
    assert one.value == pytest.approx(0.2) and one.low is None and "clusters" in one.why


def test_all_right_in_few_clusters_says_as_much_as_few_samples():
    one = metrics.proportion([1] * 60, [i // 10 for i in range(60)])
    assert one.low < metrics.proportion([1] * 6).low and one.high == 1


def test_one_cluster_gives_no_interval():
    together = ["c"] * N
    for one in (
        metrics.mean(VALUES, together),
        metrics.proportion(RIGHT, together),
        metrics.bootstrap(VALUES, np.mean, together),
        metrics.f1(RIGHT, OTHER, together),
        metrics.paired(VALUES, SHIFTED, together).difference,
    ):
        assert one.value is not None and one.low is None and "one cluster" in one.why
    assert metrics.paired(VALUES, SHIFTED, together).p_value == 1


def test_one_label_leaves_nothing_to_tell_apart():
    for score in (metrics.precision, metrics.recall, metrics.f1):
        one = score(["a"] * 5, ["a"] * 5)
        assert one.value is None and "only the label 'a' occurs" in one.why
    assert metrics.accuracy(["a"] * 5, ["a"] * 5).value == 1


def test_a_label_never_given_has_no_precision():
    found = metrics.by_label(["a", "b", "b"], ["a", "a", "a"])
    assert found.loc["b", "precision"].value is None and "'b'" in found.loc["b", "precision"].why
    assert (found.loc["b", "recall"].value, found.loc["b", "f1"], found.loc["b", "n"]) == (0, 0, 2)


def test_all_labels_right_gives_no_interval_of_width_zero():
    one = metrics.f1(list("abcabc"), list("abcabc"))
    assert (one.value, one.low) == (1, None) and one.why


def test_what_is_infinite_is_not_defined():
    for one in (
        metrics.mean([1.0, math.inf]),
        metrics.percentile([1.0, math.inf], 50),
        metrics.bootstrap([1.0, math.inf], np.mean),
        metrics.paired([1.0, 2.0], [1.0, math.inf]).difference,
    ):
        assert one.value is None and "infinite" in one.why


def test_a_statistic_that_is_not_defined_says_so():
    one = metrics.bootstrap([-1.0, -2.0, -3.0], lambda x: float("nan"))
    assert one.value is None and "nan" in one.why
    one = metrics.bootstrap([0.0, 0.0, 1.0], lambda x: x.sum() / x.sum() if x.sum() else math.nan)
    assert one.value == 1 and one.low is None and "resamples" in one.why


def test_too_few_values_do_not_bound_an_extreme_percentile():
    one = metrics.percentile(VALUES, 99)
    assert one.value == np.percentile(VALUES, 99) and one.low is None and "40 values are too few" in one.why


# What is missing, and what is wrong


def test_missing_values_are_counted_out_of_all_columns():
    gaps = [None, math.nan, pd.NA, np.nan]
    assert metrics.mean(VALUES + gaps) == metrics.mean(VALUES)
    assert metrics.mean(VALUES + gaps, FOURS + [0] * 4) == metrics.mean(VALUES, FOURS)
    assert metrics.proportion([*RIGHT, None], [*FOURS, 99]) == metrics.proportion(RIGHT, FOURS)
    assert metrics.paired([*VALUES, None, 1], [*SHIFTED, 1, None]) == metrics.paired(VALUES, SHIFTED)
    assert metrics.f1([*TRUTH, None, "a"], [*SAID, "a", None]) == metrics.f1(TRUTH, SAID)
    assert metrics.adjust([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert metrics.mean(pd.Series([1, None, 2])).n == 2


def test_bools_numpy_numbers_and_iterators_are_taken():
    assert metrics.proportion(iter([True, np.True_, 0, np.int64(1), 1.0])).value == 0.8
    assert metrics.mean(np.array(VALUES, dtype=np.float32)).value == pytest.approx(0.44775)


def test_labels_of_any_kind_are_taken():
    table = metrics.confusion([1, "a", True, ("x", 1)], ["a", "a", 10, ("x", 1)])
    assert table.to_numpy().sum() == 4 and table.loc["a", "a"] == 1
    assert list(metrics.confusion([10, 9, 1], [1, 9, 10]).index) == [1, 9, 10]


def test_the_same_seed_gives_the_same_and_another_seed_nearly_the_same():
    assert metrics.f1(TRUTH, SAID, seed=3) == metrics.f1(TRUTH, SAID, seed=3)
    assert metrics.paired(VALUES, SHIFTED, seed=3) == metrics.paired(VALUES, SHIFTED, seed=3)
    one, other = (metrics.bootstrap(VALUES, np.mean, seed=seed) for seed in (1, 2))
    assert one != other and ends(one) == pytest.approx(ends(other), abs=0.02)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: metrics.mean(["0.5"]), "'0.5' is no number"),
        (lambda: metrics.mean([1, 2], ["a"]), "1 clusters for 2 samples"),
        (lambda: metrics.mean([1, 2], ["a", None]), r"clusters\[1\] is missing"),
        (lambda: metrics.mean([1, 2], level=95), "level=95"),
        (lambda: metrics.proportion([1, 0.5]), "not 0.5: use mean"),
        (lambda: metrics.paired([1], [1, 2]), "1 and 2 values"),
        (lambda: metrics.accuracy(["a"], []), "1 and 0 values"),
        (lambda: metrics.f1(["a"], ["b"], average="micro"), "average='micro'"),
        (lambda: metrics.percentile([1], 0.0), "q=0.0"),
        (lambda: metrics.calibration([1.2], [1]), "not 1.2"),
        (lambda: metrics.calibration([0.2], [2]), "not 2"),
        (lambda: metrics.calibration([0.2], [1], bins=0), "bins=0"),
        (lambda: metrics.samples_needed(0.1), "discordance"),
        (lambda: metrics.samples_needed(0.1, rate=0.5, discordance=0.2), "discordance"),
        (lambda: metrics.samples_needed(0, rate=0.5), "difference of 0"),
        (lambda: metrics.samples_needed(0.3, discordance=0.2), "discordance=0.2"),
        (lambda: metrics.samples_needed(0.3, rate=0.8), "1.1"),
        (lambda: metrics.samples_needed(0.3, rate=0.5, power=80), "power=80"),
        (lambda: metrics.adjust([0.5, 5]), "not 5"),
        (lambda: metrics.adjust([0.5], "bonferroni"), "method='bonferroni'"),
    ],
)
def test_what_is_wrong_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


# What is said


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.4444, 0.35, 0.541, 108), "0.44 (0.35 to 0.54), n = 108"),
        ((0.4444, 0.4422, 0.4466, 100_000), "0.4444 (0.4422 to 0.4466), n = 100,000"),
        ((1234.5, 1100.0, 1400.2, 20), "1,230 (1,100 to 1,400), n = 20"),
        ((0.000052, 0.000041, 0.000063, 50), "0.000052 (0.000041 to 0.000063), n = 50"),
        ((-0.001, -0.3, 0.3, 9), "0.00 (-0.30 to 0.30), n = 9"),
        ((12.3456, 8.1, 17.0, 30), "12.35 (8.10 to 17.00), n = 30"),
    ],
)
def test_an_estimate_reads_with_as_many_digits_as_it_is_sure_of(numbers, said):
    assert str(metrics.Estimate(*numbers, what="mean")) == said


def test_a_paired_difference_reads_with_its_test():
    found = metrics.paired([0] * 12 + [1] * 20, [1] * 12 + [1] * 20)
    assert str(found) == "0.38 (0.23 to 0.55), n = 32; p < 0.001 (McNemar's exact test)"
    assert (found.better, found.worse, found.same) == (12, 0, 20)
    assert "of clusters" in metrics.paired(VALUES, SHIFTED, FOURS).test


def test_tokens_and_cost_are_those_of_a_request():
    usages = [
        {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        {"input_tokens": 300, "output_tokens": 40},
        {},
        None,
    ]
    used = metrics.tokens(usages)
    assert [(name, one.value, one.n) for name, one in used.items()] == [
        ("prompt tokens", 200, 2),
        ("completion tokens", 30, 2),
    ]
    found = metrics.cost(usages, prompt=0.15, completion=0.60)
    assert found.value == exactly((200 * 0.15 + 30 * 0.60) / 1e6) and found.n == 2


def test_a_rate_has_its_name():
    assert metrics.rate([1, 0, 0], "escalation").what == "escalation"


@pytest.mark.slow
def test_a_hundred_thousand_samples_are_no_trouble():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 100_000))
    found = metrics.paired(a, b + 0.01)
    assert found.difference.n == 100_000 and found.p_value == 1e-4
    found = metrics.f1(a > 0.5, b > 0.5, np.arange(100_000) // 4)
    assert found.low < 0.5 < found.high
