"""The certificate: its binomial test against closed forms and scipy, its promise in simulation."""
import math

import numpy as np
import pytest
from conftest import assert_refused, call

from appendix import certified
from appendix.certified import binomial_tail, blocks_of, calibrate_certified
from confidence import calibrate

INF = math.inf


def test_binomial_tail_closed_forms():
    assert binomial_tail(0, 7, 0.3) == pytest.approx(1)
    assert binomial_tail(7, 7, 0.3) == pytest.approx(0.3**7)
    assert binomial_tail(3, 5, 0.5) == pytest.approx(0.5)
    direct = sum(math.comb(50, i) * 0.9**i * 0.1 ** (50 - i) for i in range(48, 51))
    assert binomial_tail(48, 50, 0.9) == pytest.approx(direct, rel=1e-12)


def test_binomial_tail_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for n in (1, 10, 300, 10_000, 200_000):
        for p in (0.5, 0.8, 0.95, 0.99):
            far = min(n, round(n * p + 5 * (n * p * (1 - p)) ** 0.5))
            for x in {0, n, *generator.binomial(n, p, 3), far}:
                tail = binomial_tail(x, n, p)
                assert tail == pytest.approx(stats.binom.sf(x - 1, n, p), rel=1e-6, abs=1e-300)
                if x == 0:
                    continue
                # duality with the Clopper-Pearson bound
                bound = stats.beta.ppf(0.05, x, n - x + 1)
                if abs(bound - p) > 1e-9:
                    assert (bound >= p) == (tail <= 0.05)


def simulated(generator, n):
    """Tokens whose agreement below u is exactly 1 - 0.4 u: P(right | u) = 1 - 0.8 u, u uniform."""
    u = generator.random(n).astype(np.float32)
    return u, generator.random(n) < 1 - 0.8 * u


def thresholds_of(calibration, draws, n, **options):
    """One threshold at level 0.9 for each simulated sample of n tokens; 0 for None."""
    thresholds = []
    for seed in range(draws):
        u, correct = simulated(np.random.default_rng(seed), n)
        thresholds.append(calibration(u, correct, 0.9, **options) or 0)
    return np.array(thresholds)


def violations(thresholds):
    """Share of thresholds that admit tokens which agree less than 0.9."""
    return np.mean(1 - 0.4 * thresholds < 0.9)


@pytest.mark.parametrize("draws", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_certified_violates_at_most_delta_and_plain_far_more(draws):
    delta = 0.1
    slack = 3 * (delta * (1 - delta) / draws) ** 0.5               # three standard errors
    plain = violations(thresholds_of(calibrate, draws, 1000))
    promised = violations(thresholds_of(calibrate_certified, draws, 1000, delta=delta))
    assert promised <= delta + slack
    assert plain > 0.35 and plain > 4 * promised > 0


def test_certificate_is_no_empty_promise():
    thresholds = thresholds_of(calibrate_certified, 20, 50_000, delta=0.1)
    assert thresholds.mean() > 0.8 * 0.25                          # 0.25 is ideal


def test_certificate_does_not_die_on_bad_first_tokens():
    """The 5 % most certain tokens miss the level: a sequence from there alone accepts nothing."""
    generator = np.random.default_rng(0)
    u = generator.random(20_000).astype(np.float32)
    agreement = np.where(u < 0.05, 0.9, 0.99 - 0.7 * np.clip(u - 0.3, 0, 1))
    correct = generator.random(20_000) < agreement
    threshold = calibrate_certified(u, correct, 0.95)
    assert threshold is not None and 0.4 < threshold < calibrate(u, correct, 0.95)


def test_half_of_delta_goes_where_the_placing_tokens_look_best():
    u = np.arange(1000)
    correct = (u >= 100) & (u < 600)                               # best below 600
    thresholds = np.arange(50, 1000, 50)
    shares = certified.deal(thresholds, u, correct, 0.8, 0.05)
    assert sum(shares.values()) == pytest.approx(0.05)
    assert thresholds[max(shares, key=shares.get)] == 600
    evenly = certified.deal(thresholds, u[:0], correct[:0], 0.8, 0.05)
    assert sum(evenly.values()) == pytest.approx(0.05)


def test_certified_refuses_what_cannot_be_known():
    right = np.ones(100, bool)
    assert calibrate_certified(np.arange(100), right, 0.98) is None   # 80 right ones are no proof
    assert calibrate_certified(np.arange(100), right, 1.0) is None
    assert calibrate_certified([], [], 0.9) is None
    assert calibrate_certified(np.full(5000, INF), np.ones(5000), 0.9) is None
    u = np.arange(5000)
    assert calibrate_certified(u, np.zeros(5000), 0.5) is None
    assert calibrate_certified(u, np.ones(5000), 0.98) > 4900
    once, again = (calibrate_certified(u, u % 7 > 0, 0.8, seed=4) for _ in range(2))
    assert once == again


@pytest.mark.parametrize("draws", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_groups_restore_the_promise_that_dependence_breaks(draws):
    """20 copies of a token: the certificate believes in 20 times the evidence, but for groups."""
    delta, groups = 0.1, np.repeat(np.arange(600), 20)

    def copied(u, correct, level, **options):
        u, correct = np.repeat(u, 20), np.repeat(correct, 20)
        return calibrate_certified(u, correct, level, delta, **options)

    broken = violations(thresholds_of(copied, draws, 600))
    thresholds = thresholds_of(copied, draws, 600, groups=groups)
    assert broken > 0.25
    assert violations(thresholds) <= delta + 3 * (delta * (1 - delta) / draws) ** 0.5
    assert thresholds.mean() > 0


def test_bad_input():
    for delta in (0, 1, math.nan):
        with pytest.raises(ValueError, match="delta"):
            calibrate_certified([1], [1], 0.9, delta=delta)
    with pytest.raises(ValueError, match="level"):
        calibrate_certified([1], [1], 0)
    with pytest.raises(ValueError, match="groups"):
        calibrate_certified([1, 2], [1, 1], 0.9, groups=[0])


def test_blocks_do_not_cross_windows():
    blocks = blocks_of(2, 5, size=2)
    assert blocks.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert len(np.unique(blocks_of(3, 255))) == 3 * 16
    assert len(np.unique(blocks_of(3, 32))) == 3 * 2


def test_table_on_the_toy():
    status, out, errors = call(certified, "--tokens", 1024)
    assert status == 0, errors
    assert "1,020 test tokens" in out and "blockwise" in out and "assumes independent tokens" in out
    assert_refused(call(certified, "--tokens", 1), "--tokens", "256")
    assert_refused(call(certified, "--delta", 2), "--delta")
    assert_refused(call(certified, "--heads", "none"), "none", "train.py")
