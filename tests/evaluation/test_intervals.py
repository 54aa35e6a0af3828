"""Coverage of the intervals: enumerated for proportions, by simulation for paired drops and the bootstrap."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from flexmerge_cli.evaluation.intervals import PairedBound, interval, paired_bound, proportion, resamples
from flexmerge_cli.evaluation.scored import Given, Scored

SIZES = (5, 8, 10, 20, 49, 50, 51, 52, 100, 200, 697)


def coverage(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares p with n·p and n·(1-p) at least a half, and how often the interval of n examples holds each."""
    limits = np.array([proportion(hits, n) for hits in range(n + 1)])
    p = np.linspace(0.5 / n, 1 - 0.5 / n, 4001)
    # Just beside every limit, too, where coverage jumps.
    edges = np.concatenate([limits.ravel() - 1e-9, limits.ravel() + 1e-9])
    p = np.concatenate([p, edges[(edges >= 0.5 / n) & (edges <= 1 - 0.5 / n)]])
    inside = (limits[:, :1] <= p) & (p <= limits[:, 1:])
    return p, (binom.pmf(np.arange(n + 1)[:, None], n, p) * inside).sum(0)


@pytest.mark.parametrize("n", SIZES)
def test_proportions_are_covered_95_percent_on_average_and_nowhere_below_90(n):
    p, covered = coverage(n)
    assert 0.93 <= covered[:4001].mean() <= 0.97
    assert covered.min() >= 0.90, (p[covered.argmin()] * n, covered.min())


def test_the_plain_wilson_interval_would_fall_below_90_percent():
    """The reason for the mended limits: 0.55 hits expected of 100."""
    p = 0.0055
    limits = [binomtest(hits, 100).proportion_ci(0.95, method="wilson") for hits in range(101)]
    plain = sum(binom.pmf(hits, 100, p) for hits, found in enumerate(limits) if found.low <= p <= found.high)
    assert plain < 0.90


@pytest.mark.parametrize("n", (50, 51, 697))
def test_it_is_wilsons_where_hits_and_misses_are_more_than_three(n):
    for hits in (0, 4, n // 2, n - 4, n):
        found = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert proportion(hits, n) == (found.low, found.high)


def test_one_example_has_an_interval_inside_0_and_1():
    for hits in (0, 1):
        low, high = proportion(hits, 1)
        assert 0 <= low < high <= 1 and low <= hits <= high


def scored(outcomes: np.ndarray) -> Scored:
    """Return outcomes of 0 and 1: right where it is 1."""
    return Scored(metric="accuracy", predictions=outcomes.astype(int), labels=np.ones(len(outcomes), int))


CELLS = {  # both right, only the reference, only the merged, neither
    "alike": (50, (0.80, 0.05, 0.02, 0.13)),
    "a little worse": (200, (0.85, 0.03, 0.01, 0.11)),
    "nearly perfect": (697, (0.95, 0.01, 0.005, 0.035)),
    "poor": (300, (0.50, 0.10, 0.08, 0.32)),
}


@pytest.mark.parametrize("relative", (False, True))
@pytest.mark.parametrize("name", CELLS)
def test_the_bound_of_a_paired_drop_holds_in_95_of_100_draws(name, relative):
    n, cells = CELLS[name]
    drop = (cells[1] - cells[2]) / (cells[0] + cells[1] if relative else 1)
    rng = np.random.default_rng(7)
    above = below = 0
    draws = 400
    for _ in range(draws):
        both, lost, gained, neither = rng.multinomial(n, cells)
        theirs = np.repeat([1, 1, 0, 0], [both, lost, gained, neither])
        ours = np.repeat([1, 0, 1, 0], [both, lost, gained, neither])
        found = paired_bound(scored(ours), scored(theirs), relative=relative)
        assert found is not None and found.low <= found.drop <= found.high
        above += found.high >= drop
        below += found.low <= drop
    # 400 draws of 95 %: a standard deviation of 1.1 points.
    assert above / draws >= 0.92 and below / draws >= 0.92


def test_no_example_judged_differently_is_no_proof_of_no_drop():
    """Where 100 agree, 2.6 % may differ: what a score test of 95 % does not reject, 2.71 / (n + 2.71)."""
    same = scored(np.ones(100))
    found = paired_bound(same, same, relative=False)
    assert found is not None and found.high == pytest.approx(1.6448536**2 / (100 + 1.6448536**2), abs=1e-6)
    assert paired_bound(same, same, relative=False, same_weights=True) == PairedBound(drop=0, low=0, high=0, n=100)


def test_means_that_are_no_shares_have_the_t_interval_of_their_differences():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    scores = [rng.normal(size=(40, 3)).astype(np.float32) for _ in range(3)]
    ours, theirs = (Scored(metric="kl_divergence", predictions=p, labels=scores[2]) for p in scores[:2])
    found = paired_bound(ours, theirs, relative=False)
    wanted = ttest_rel(ours.outcomes, theirs.outcomes, alternative="less").confidence_interval(0.95).high
    assert found is not None and found.high == pytest.approx(wanted)  # of a divergence more is worse


def test_a_metric_that_is_no_mean_is_resampled_in_pairs():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=80)
    good, bad = labels + rng.normal(size=80) / 4, labels + rng.normal(size=80)
    ours, theirs = (Scored(metric="pearson", predictions=p, labels=labels) for p in (bad, good))
    found = paired_bound(ours, theirs, relative=False)
    assert found is not None and 0 < found.low < found.drop < found.high < 1
    assert found == paired_bound(ours, theirs, relative=False)
    low, high = interval(theirs)
    assert low < theirs.value < high


def test_n_that_decides_is_where_the_bound_meets_the_limit():
    n, cells = 200, (160, 6, 3, 31)
    theirs, ours = np.repeat([1, 1, 0, 0], cells), np.repeat([1, 0, 1, 0], cells)
    found = paired_bound(scored(ours), scored(theirs), relative=False)
    assert found is not None and found.decides(0.02) is None and found.decides(0.5) is True
    needed = found.n_that_decides(0.02)
    assert needed is not None and needed > n
    times = -(-needed // n)
    more = paired_bound(scored(np.tile(ours, times)), scored(np.tile(theirs, times)), relative=False)
    assert more is not None and more.decides(0.02) is True


def test_a_number_from_outside_has_its_own_interval_and_no_bound():
    outside = Scored(metric="bleu", given=Given(value=31.5, n=10, interval=(30.0, 33.0)))
    assert interval(outside) == (30.0, 33.0) and outside.n == 10 and outside.value == 31.5
    assert paired_bound(outside, outside, relative=True) is None


def test_resamples_are_the_same_for_the_same_n():
    first, second = (np.stack(list(resamples(30, 5))) for _ in range(2))
    assert np.array_equal(first, second) and first.max() < 30
