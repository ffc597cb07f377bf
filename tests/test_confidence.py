"""Chapter 3: measures against direct float64 computations, separation against hand-made and brute-force values,
calibration against its definition, the certificate against scipy and in simulation."""
import math

import numpy as np
import pytest
import torch

import confidence as C

INF = math.inf


# ---------------------------------------------------------------- measures

def by_definition(z, k=10):
    """All measures of one row of logits, in plain float64 Python, in the order of MEASURES."""
    def H(row):
        e = [math.exp(x - max(row)) for x in row]
        return -sum(x / sum(e) * math.log(x / sum(e)) for x in e if x)
    top = sorted(z, reverse=True)
    e = [math.exp(x - top[0]) for x in top]
    p = [x / sum(e) for x in e]
    return [H(top), 1 - p[0], p[1] - p[0], top[1] - top[0], -top[0], H(top[:k])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_measures_equal_their_definition(dtype, scale):
    z = (torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    want = torch.tensor([[by_definition(row.double().tolist()) for row in rows] for rows in z])   # (2, 3, measures)
    for i, f in enumerate(C.MEASURES.values()):
        got = f(z)
        assert got.dtype == torch.float32 and got.shape == (2, 3)
        torch.testing.assert_close(got, want[..., i].float(), rtol=1e-5, atol=1e-6)


def test_closed_forms():
    flat = torch.zeros(1, 64)
    assert C.entropy(flat).item() == pytest.approx(math.log(64), rel=1e-6)
    assert C.topk_entropy(flat, k=8).item() == pytest.approx(math.log(8), rel=1e-6)
    assert C.one_minus_max(flat).item() == pytest.approx(63 / 64)
    assert C.negative_margin(flat).item() == C.negative_logit_gap(flat).item() == 0
    torch.testing.assert_close(C.topk_entropy(flat, k=999), C.entropy(flat))


def test_measures_fall_as_the_favourite_grows():
    z = torch.randn(30, generator=torch.Generator().manual_seed(2)).repeat(20, 1)
    z[:, 7] = torch.linspace(3, 9, 20)
    for f in C.MEASURES.values():
        assert (f(z).diff() < 0).all()


@pytest.mark.parametrize("f", C.MEASURES.values(), ids=C.MEASURES)
def test_extreme_logits(f):
    big = torch.tensor([[1e4, -1e4, 0.0, -1e4], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, -1e4, -1e4]])
    assert torch.isfinite(f(big)).all() and f(big)[0] <= f(big)[2]
    z = torch.tensor([[2.0, 1.0, -INF, 0.5, -INF]])
    torch.testing.assert_close(f(z), f(z[:, [0, 1, 3]]))                  # ruled out is the same as not there
    assert f(torch.tensor([[1.0, -INF, -INF]])).isfinite().all()          # one token left: as certain as can be


@pytest.mark.parametrize("f", C.MEASURES.values(), ids=C.MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_broken_logits_are_never_certain(f, dtype):
    for bad in (math.nan, INF):
        for at in range(4):
            z = torch.tensor([[9.0, 1.0, 0.0, -5.0], [9.0, 1.0, 0.0, -5.0]], dtype=dtype)
            z[0, at] = bad
            u = f(z)
            assert u[0] == INF and torch.isfinite(u[1])
            assert not C.is_certain(u, 3e38)[0] and not C.is_certain(u, INF)[0]
    assert f(torch.full((1, 4), -INF, dtype=dtype)) == INF                # nothing left to choose


def test_is_certain_is_strict_and_none_is_never():
    for kind in (torch.tensor, np.array):
        u = kind([-INF, 0.5, 1.0, math.nan, INF])
        assert C.is_certain(u, 1.0).tolist() == [True, True, False, False, False]
        assert not C.is_certain(u, None).any()
    assert C.is_certain(0.5, 1.0) and not C.is_certain(1.0, 1.0) and not C.is_certain(0.5, None)


# ---------------------------------------------------------------- separation

def test_separation_by_hand():
    s = C.separation([1, 2, 3, 4], [True, True, False, True])
    assert s.auroc == pytest.approx(2 / 3)                                # 3 pairs, the wrong one wins two
    assert s.auprc == pytest.approx(1 / 2)                                # found second of the two most uncertain
    assert s.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert s.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert s.aurc == pytest.approx((1 / 3 + 1 / 4) / 4)
    assert s.excess_aurc == pytest.approx((1 / 3 + 1 / 4) / 4 - 1 / 16)


def test_separation_in_the_limits():
    best = C.separation([0, 1, 2, 3], [1, 1, 0, 0])
    worst = C.separation([3, 2, 1, 0], [1, 1, 0, 0])
    tied = C.separation([5, 5, 5, 5], [1, 1, 0, 0])
    assert (best.auroc, best.auprc, best.excess_aurc) == (1, 1, 0)
    assert worst.auroc == 0 and tied.auroc == 0.5
    assert tied.auprc == tied.aurc == 0.5 and tied.risk.tolist() == [0.5] and tied.coverage.tolist() == [1]
    assert math.isnan(C.separation([1, 2], [1, 1]).auroc) and C.separation([1, 2], [1, 1]).aurc == 0


@pytest.mark.parametrize("seed", range(5))
def test_separation_equals_brute_force_with_ties(seed):
    rng = np.random.default_rng(seed)
    u, c = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.6
    s = C.separation(u, c)
    pairs = [(w > r) + 0.5 * (w == r) for w in u[~c] for r in u[c]]
    assert s.auroc == pytest.approx(np.mean(pairs))
    assert s.auprc == pytest.approx(np.mean([(~c[u >= w]).mean() for w in u[~c]]))
    areas = []
    for _ in range(4000):                                                 # ties in random order
        order = np.lexsort((rng.random(40), u))
        areas.append(np.mean(np.cumsum(~c[order]) / np.arange(1, 41)))
    assert s.aurc == pytest.approx(np.mean(areas), abs=5 * np.std(areas) / 4000**0.5)


# ---------------------------------------------------------------- calibration

def test_calibrate_takes_the_largest_prefix_by_hand():
    u, c = np.float32([0.1, 0.2, 0.3, 0.4, 0.5]), [1, 0, 1, 1, 0]
    t = C.calibrate(u, c, 0.75)
    assert C.is_certain(u, t).tolist() == [True, True, True, True, False]   # 1, 1/2, 2/3, 3/4, 3/5
    assert C.is_certain(u, C.calibrate(u, c, 0.9)).tolist() == [True] + 4 * [False]
    assert C.is_certain(u, C.calibrate(u, c, 0.6)).all()
    assert C.calibrate([1, 2], [0, 0], 0.5) is None and C.calibrate([], [], 0.5) is None


@pytest.mark.parametrize("seed", range(20))
def test_calibrate_against_all_thresholds(seed):
    """The accepted set is the largest {u <= value} that agrees enough; at run time, in float32, exactly it exits."""
    rng = np.random.default_rng(seed)
    u = np.round(rng.random(60), 1 + seed % 3).astype(np.float32) * 10.0 ** rng.integers(-30, 30)
    c, level = rng.random(60) < 1 - 0.6 * u / u.max(), rng.choice([0.6, 0.8, 0.9])
    fit = [v for v in np.unique(u) if c[u <= v].mean() >= level]
    t = C.calibrate(u, c, level)
    want = u <= max(fit) if fit else np.zeros(60, bool)
    assert (C.is_certain(u, t) == want).all()
    assert (C.is_certain(torch.tensor(u), t).numpy() == want).all()       # torch compares in float32
    assert t is None or float(np.float32(t)) == t


def test_calibrate_never_splits_ties_nor_accepts_broken_rows():
    assert C.calibrate([1, 1, 1], [1, 1, 0], 0.9) is None
    assert not C.is_certain(np.float32([INF, math.nan]), C.calibrate([0, 1, INF, math.nan], [1, 1, 1, 1], 0.5)).any()
    assert C.calibrate([INF, math.nan], [1, 1], 0.5) is None
    u = np.zeros(10, np.float32)
    assert C.is_certain(u, C.calibrate(u, np.arange(10) < 9, 0.9)).all()  # 9 / 10 >= 0.9 holds exactly


def test_bad_input():
    with pytest.raises(ValueError, match="one length"):
        C.calibrate([1, 2], [1], 0.9)
    with pytest.raises(ValueError, match="only true and false"):
        C.calibrate([1, 2], [1, 3], 0.9)
    for level in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="level"):
            C.calibrate([1], [1], level)
    with pytest.raises(ValueError, match="delta"):
        C.calibrate_certified([1], [1], 0.9, delta=0)
    with pytest.raises(ValueError, match="groups"):
        C.calibrate_certified([1, 2], [1, 1], 0.9, groups=[0])
    with pytest.raises(ValueError, match="at least one"):
        C.separation([], [])
    with pytest.raises(ValueError, match="M"):
        C.calibrate_conditional([1, 2], [1, 1], 0.9)


def test_conditional_calibrates_on_what_is_left():
    rng = np.random.default_rng(3)
    z = rng.random((20_000, 1))
    u = z + 0.1 * rng.random((20_000, 3))
    c = rng.random((20_000, 3)) < np.clip([1.1, 1.2, 1.3] - z, 0, 0.99)
    thresholds = C.calibrate_conditional(u, c, 0.9)
    left = np.ones(20_000, bool)
    for l, t in enumerate(thresholds):                                    # the definition, head by head
        assert t == C.calibrate(u[left, l], c[left, l], 0.9)
        left &= ~(u[:, l].astype(np.float32) < t)
    alone = [C.calibrate(u[:, l], c[:, l], 0.9) for l in range(3)]
    assert thresholds[0] == alone[0]
    u = u.astype(np.float32)
    independent, conditional = C.cascade(u, c, alone), C.cascade(u, c, thresholds)
    assert all(a >= 0.9 for a, _ in conditional)
    assert all(a < 0.89 for a, _ in independent[1:])                      # the promise breaks on what reaches the head


# ---------------------------------------------------------------- the certificate

def test_binomial_tail_closed_forms():
    assert C.binomial_tail(0, 7, 0.3) == pytest.approx(1)
    assert C.binomial_tail(7, 7, 0.3) == pytest.approx(0.3**7)
    assert C.binomial_tail(3, 5, 0.5) == pytest.approx(0.5)
    direct = sum(math.comb(50, i) * 0.9**i * 0.1**(50 - i) for i in range(48, 51))
    assert C.binomial_tail(48, 50, 0.9) == pytest.approx(direct, rel=1e-12)


def test_binomial_tail_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (1, 10, 300, 10_000, 200_000):
        for p in (0.5, 0.8, 0.95, 0.99):
            for x in {0, n, *rng.binomial(n, p, 3), min(n, round(n * p + 5 * (n * p * (1 - p)) ** 0.5))}:
                got, want = C.binomial_tail(x, n, p), stats.binom.sf(x - 1, n, p)
                assert got == pytest.approx(want, rel=1e-6, abs=1e-300)
                if 0 < x:                                                 # duality with the Clopper-Pearson bound
                    bound = stats.beta.ppf(0.05, x, n - x + 1)
                    if abs(bound - p) > 1e-9:
                        assert (bound >= p) == (got <= 0.05)


def simulated(rng, n):
    """Tokens whose agreement below u is exactly 1 - 0.4 u: P(right | u) = 1 - 0.8 u, u uniform."""
    u = rng.random(n).astype(np.float32)
    return u, rng.random(n) < 1 - 0.8 * u


def violations(calibrate, draws, level, sample):
    """Share of draws whose threshold admits tokens that agree less than level; and the mean threshold."""
    t = np.array([calibrate(*sample(np.random.default_rng(seed)), level) or 0 for seed in range(draws)])
    return np.mean(1 - 0.4 * t < level), t.mean()


def test_certified_violates_at_most_delta_and_plain_far_more():
    draws, delta = 1500, 0.1
    sample = lambda rng: simulated(rng, 1000)
    plain, _ = violations(C.calibrate, draws, 0.9, sample)
    certified, mean = violations(lambda *a: C.calibrate_certified(*a, delta), draws, 0.9, sample)
    slack = 3 * (delta * (1 - delta) / draws) ** 0.5                      # three standard errors: 0.023
    assert certified <= delta + slack
    assert plain > 0.35 and plain > 4 * certified > 0
    _, mean = violations(lambda *a: C.calibrate_certified(*a, delta), 20, 0.9, lambda rng: simulated(rng, 50_000))
    assert mean > 0.8 * 0.25                                              # no empty promise: 0.25 is ideal


def test_certificate_does_not_die_on_bad_first_tokens():
    """The 5 % most certain tokens miss the level: a sequence that starts there alone would accept nothing."""
    rng = np.random.default_rng(0)
    u = rng.random(20_000).astype(np.float32)
    c = rng.random(20_000) < np.where(u < 0.05, 0.9, 0.99 - 0.7 * np.clip(u - 0.3, 0, 1))
    t = C.calibrate_certified(u, c, 0.95)
    assert t is not None and 0.4 < t < C.calibrate(u, c, 0.95)


def test_certified_refuses_what_cannot_be_known():
    right = np.ones(100, bool)
    assert C.calibrate_certified(np.arange(100), right, 0.98) is None     # 80 right ones are no proof of 98 %
    assert C.calibrate_certified(np.arange(100), right, 1.0) is None
    assert C.calibrate_certified([], [], 0.9) is None
    assert C.calibrate_certified(np.full(5000, INF), np.ones(5000), 0.9) is None
    u = np.arange(5000)
    assert C.calibrate_certified(u, np.zeros(5000), 0.5) is None
    assert C.calibrate_certified(u, np.ones(5000), 0.98) > 4900
    assert C.calibrate_certified(u, u % 7 > 0, 0.8, seed=4) == C.calibrate_certified(u, u % 7 > 0, 0.8, seed=4)


def test_groups_restore_the_promise_that_dependence_breaks():
    """20 copies of each token: the certificate believes in 20 times the evidence; one token a group does not."""
    draws, delta = 400, 0.1
    copies = lambda rng: [np.repeat(a, 20) for a in simulated(rng, 600)]
    groups = np.repeat(np.arange(600), 20)
    broken, _ = violations(lambda *a: C.calibrate_certified(*a, delta), draws, 0.9, copies)
    mended, mean = violations(lambda *a: C.calibrate_certified(*a, delta, groups=groups), draws, 0.9, copies)
    assert broken > 0.25
    assert mended <= delta + 3 * (delta * (1 - delta) / draws) ** 0.5
    assert mean > 0


# ---------------------------------------------------------------- the chapter's tables and figure

class TwoHeads:
    layers = [1, 2]

    def logits(self, hidden):
        return hidden


def test_measure_tables_and_figure(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    full = torch.randn(6, 400, 12, generator=g) * 3

    def model(ids, exits):                                                # ids are row numbers; heads see noisy logits
        z = full[ids[:, 0]]
        noise = torch.randn(2, *z.shape, generator=g)
        return z, [z + 3 * noise[0], z + noise[1]]

    ids = torch.arange(6)[:, None].expand(6, 400)
    sets = [C.measure(model, TwoHeads(), ids, batch=4) for _ in range(2)]
    u, c = sets[0]
    assert u["entropy"].shape == c.shape == (2400, 2) and c.dtype == bool and 0.3 < c[:, 0].mean() < c[:, 1].mean() < 1
    found = C.compare_measures(*sets, TwoHeads.layers)
    rows = C.compare_calibrations(u["entropy"], c, sets[1][0]["entropy"], sets[1][1], TwoHeads.layers,
                                  np.arange(2400) // 16)
    out = capsys.readouterr().out
    assert "entropy has the lowest AURC at" in out and all(name in out for name in C.MEASURES)
    best = min((f for f in found if f != "entropy"), key=lambda f: sum(s.aurc for s in found[f]))
    wins = sum(s.aurc for s in found["entropy"]) < sum(s.aurc for s in found[best])
    assert ("entropy wins here" in out) == wins
    agreement, coverage = rows["plain", 0.9][1]
    t = C.calibrate(u["entropy"][:, 1], c[:, 1], 0.9)
    leaves = sets[1][0]["entropy"][:, 1] < t
    assert (agreement, coverage) == (sets[1][1][leaves, 1].mean(), leaves.mean())
    figure = tmp_path / "f.png"
    C.draw(figure, sets[1][0]["entropy"], sets[1][1], found, rows, TwoHeads.layers)
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and list(tmp_path.iterdir()) == [figure]
