"""Chapter 4: shares against independent solvers, budgets against statistics, the second act.

The methods that EERO is compared with, and the table (appendix/budgets.py), are tested here too.
"""
import itertools

import numpy as np
import pytest
import torch

import eero
from appendix import budgets
from conftest import assert_refused, call, run, shaken, tiny
from confidence import entropy
from eero import EERO, exit_distribution
from heads import evaluate


def instance(seed, M=None):
    """Random risks, increasing costs and a budget between the cheapest and the dearest head."""
    rng = np.random.default_rng(seed)
    M = M or int(rng.integers(2, 13))
    cost = np.cumsum(rng.exponential(1, M) ** 2 + 0.01)        # skewed on purpose
    budget = cost[0] + rng.uniform(0.05, 0.95) * (cost[-1] - cost[0])
    return rng.uniform(0, 1, M), cost, budget, rng.dirichlet(np.ones(M)) + 0.01


def objective(pi, risk, beta, prior):
    used = pi > 0
    return pi @ risk + np.sum(pi[used] * np.log(pi[used] / (prior / prior.sum())[used])) / beta


def correlated(seed, n, M, ties=None):
    """Uncertainties of M heads that share a difficulty per sample, and errors that follow them."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=(n, 1))
    u = difficulty + rng.normal(size=(n, M)) * rng.uniform(0.1, 2, M) + rng.normal(size=M)
    wrong = u - np.linspace(0, 1.5, M) + rng.normal(size=(n, M)) > 0
    return (np.round(u * ties) if ties else u), wrong


def risk_of(fitted, u, wrong):
    return wrong[np.arange(len(u)), fitted.route(u)].mean()


# ---------------------------------------------------------------- equation 1


def test_equals_an_independent_convex_solve():
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(40):
        risk, cost, budget, prior = instance(seed)
        beta = float(np.random.default_rng(seed + 1000).choice([0.5, 2.0, 5.0, 10.0]))
        log_prior = np.log(prior / prior.sum())

        def dual(m):                     # max over m >= 0: the problem's Lagrange dual
            w = log_prior - beta * risk - m * cost
            return m * budget + w.max() + np.log(np.exp(w - w.max()).sum())

        def primal(p):
            return objective(np.maximum(p, 1e-300), risk, beta, prior)

        def slope(p):
            return risk + (np.log(np.maximum(p, 1e-300)) - log_prior + 1) / beta

        m = optimize.minimize_scalar(dual, bounds=(0, 1e3), method="bounded",
                                     options={"xatol": 1e-12}).x
        sums_to_one = {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like}
        meets_budget = {"type": "ineq", "fun": lambda p: budget - p @ cost, "jac": lambda p: -cost}
        M = len(risk)
        best = optimize.minimize(primal, np.full(M, 1 / M), jac=slope, method="SLSQP",
                                 bounds=[(0, 1)] * M, constraints=[sums_to_one, meets_budget],
                                 options={"ftol": 1e-15, "maxiter": 2000})
        pi = exit_distribution(risk, cost, budget, beta, prior)
        # nothing feasible is better, and there is no duality gap: optimal
        assert objective(pi, risk, beta, prior) <= best.fun + 1e-9
        assert objective(pi, risk, beta, prior) == pytest.approx(-dual(m) / beta, abs=1e-9)
        assert np.abs(pi - best.x).max() < 1e-6
        assert pi.sum() == pytest.approx(1, abs=1e-12) and pi @ cost <= budget + 1e-10


def test_large_beta_is_the_linear_programme():
    for seed, beta in itertools.product(range(40), (1e8, np.inf)):
        risk, cost, budget, _ = instance(seed)
        # vertices: one head, or two that spend it all
        best = min(risk[cost <= budget])
        for i, j in itertools.combinations(range(len(risk)), 2):
            if cost[i] <= budget <= cost[j]:
                share = (cost[j] - budget) / (cost[j] - cost[i])
                best = min(best, share * risk[i] + (1 - share) * risk[j])
        pi = exit_distribution(risk, cost, budget, beta)
        assert pi @ risk == pytest.approx(best, abs=1e-6)
        assert (pi > 1e-6).sum() <= 2
        assert pi @ cost <= budget + 1e-10


def test_where_risks_tie_the_limit_uses_more_than_two_heads():
    pi = exit_distribution([0.5, 0.2, 0.2, 0.2], [1.0, 2.0, 3.0, 4.0], 3.5, np.inf)
    assert np.allclose(pi, [0, 1 / 3, 1 / 3, 1 / 3])


def test_beta_zero_is_the_tilted_prior():
    for seed in range(20):
        risk, cost, budget, prior = instance(seed)
        for beta, tolerance in ((0.0, 1e-12), (1e-9, 1e-7)):
            pi = exit_distribution(risk, cost, budget, beta, prior)
            ratio = np.log(pi / prior)   # linear in the cost, whatever the risk
            slope = (ratio[-1] - ratio[0]) / (cost[-1] - cost[0])
            gap = np.abs(ratio - ratio[0] - slope * (cost - cost[0])).max()
            assert gap < tolerance * 1e3
            assert slope <= 1e-9
        assert pi @ cost == pytest.approx(min(budget, prior @ cost / prior.sum()), abs=1e-7)


def test_no_overflow_and_the_budget_to_1e_10():
    for seed, beta in itertools.product(range(10), (0.0, 1.0, 1e3, 1e8, np.inf)):
        risk, cost, budget, prior = instance(seed)
        for scale in (1.0, 1e9):         # block-equivalents, multiply-adds
            with np.errstate(over="raise", invalid="raise", divide="raise"):
                pi = exit_distribution(risk, cost * scale, budget * scale, beta, prior)
            free = exit_distribution(risk, cost, cost.max(), beta, prior) @ cost
            assert np.isfinite(pi).all() and pi.min() >= 0
            assert pi.sum() == pytest.approx(1, abs=1e-12)
            assert pi @ cost == pytest.approx(min(budget, free), abs=1e-10)


def test_slack_budget():
    risk, cost = np.array([0.4, 0.2, 0.3]), np.array([1.0, 2.0, 4.0])
    free = np.exp(-5 * risk) / np.exp(-5 * risk).sum()
    # above the dearest head: lambda = 0; exactly the cheapest head; the best head, not the last
    assert np.allclose(exit_distribution(risk, cost, 100.0, 5.0), free)
    assert np.allclose(exit_distribution(risk, cost, 1.0, 5.0), [1, 0, 0])
    assert np.allclose(exit_distribution(risk, cost, 4.0, 1e8), [0, 1, 0])
    u = np.random.default_rng(0).random((500, 3))
    wrong = np.random.default_rng(1).random((500, 3)) < risk
    tight, slack = (EERO.fit(u, wrong, cost, budget, 5.0) for budget in (1.5, 4.0))
    assert np.dot(tight.pi, cost) == pytest.approx(1.5) and np.dot(slack.pi, cost) < 3.9


def test_impossible_requests_are_refused():
    for change, message in (
            ({"budget": 0.5}, "below the cheapest head"), ({"budget": np.nan}, "finite"),
            ({"beta": -1.0}, "beta >= 0"), ({"risk": [0.1, np.nan]}, "finite"),
            ({"risk": [0.1]}, "one length"), ({"prior": [0, 0]}, "prior"),
            ({"prior": [0, 1], "budget": 1.5}, "below the cheapest head")):
        request = {"risk": [0.3, 0.1], "cost": [1.0, 2.0], "budget": 1.5, "beta": 1.0, **change}
        with pytest.raises(ValueError, match=message):
            exit_distribution(**request)


def test_monotone_in_the_budget():
    """A larger budget moves mass to dearer heads: cumulative shares, rates, thresholds fall.

    Thresholds do so when the heads rank the samples alike, as here; in general only the first's.
    """
    for seed in range(30):
        risk, cost, _, prior = instance(seed)
        alike = np.random.default_rng(seed).random((3000, 1)) + np.zeros(len(cost))
        before = None
        for budget in np.linspace(cost[0], cost[-1], 15):
            pi = exit_distribution(risk, cost, budget, 3.0, prior)
            left = 1 - np.concatenate([[0], np.cumsum(pi)[:-1]])
            rates = np.divide(pi, left, out=np.ones_like(pi), where=left > 1e-9)
            thresholds = EERO.from_distribution(alike, pi, cost, budget).thresholds
            # a head that never answers leaves standing what the heads before it have taken
            thresholds = [-np.inf if t is None else t for t in thresholds]
            thresholds = np.maximum.accumulate(thresholds)
            now = np.cumsum(pi), rates, thresholds
            if before:
                for new, old, tolerance in zip(now, before, (1e-9, 1e-6, 1e-8)):
                    assert (new <= old + tolerance).all()
            before = now


# ---------------------------------------------------------------- equation 2


def test_realised_budget_within_three_standard_errors():
    n = 4000
    for M, ties in itertools.product((2, 3, 4, 7, 12), (None, 1, 5)):
        scores = []
        for seed in range(8):
            u, wrong = correlated(seed, 2 * n, M, ties)
            _, cost, budget, _ = instance(seed, M)
            # labels for 500 of the samples only
            fitted = EERO.fit(u[:n], wrong[:500], cost, budget, beta=4.0, seed=seed)
            target = np.dot(fitted.pi, cost)
            deviation = np.sqrt(np.dot(fitted.pi, (cost - target) ** 2))
            realised = cost[fitted.route(u[n:])].mean()
            # calibration and test both vary
            scores.append((realised - target) / (deviation * np.sqrt(2 / n) + 1e-12))
            assert target <= budget + 1e-9
        assert np.abs(scores).max() < 3
        on_calibration = np.bincount(fitted.route(u[:n]), minlength=M) / n
        assert np.abs(on_calibration - fitted.pi).max() < (1.5 / n if ties is None else 0.03)


def test_shares_of_calibration_are_exact_and_unconditional_quantiles_drift():
    n = 20000
    u, wrong = correlated(3, 2 * n, 4)
    cost, pi = np.array([1.0, 2, 3, 4]), np.array([0.3, 0.3, 0.2, 0.2])
    error = {}
    for conditional in (True, False):
        fitted = EERO.from_distribution(u[:n], pi, cost, pi @ cost, conditional=conditional)
        error[conditional] = abs(cost[fitted.route(u[n:])].mean() - pi @ cost)
    assert error[True] < 3 * 1.1 * np.sqrt(2 / n)
    assert error[False] > 10 * 1.1 * np.sqrt(2 / n)            # far outside of chance


def test_thresholds_are_the_quantiles_of_those_who_reach():
    u, _ = correlated(5, 997, 3)
    pi = np.array([0.25, 0.45, 0.30])
    fitted = EERO.from_distribution(u, pi, [1, 2, 3], 2.05)
    # the naive twin: sort, take, remove
    order = sorted(range(997), key=lambda i: u[i, 0])
    first, rest = order[:round(0.25 * 997)], order[round(0.25 * 997):]
    second = sorted(rest, key=lambda i: u[i, 1])[:round(0.70 * 997) - len(first)]
    expected = np.full(997, 2)
    expected[first], expected[second] = 0, 1
    assert (fitted.route(u) == expected).all()


def test_route_equals_a_loop_over_samples():
    u, wrong = correlated(0, 40000, 4)
    fitted = EERO.fit(u, wrong, [1, 2, 3, 4], 2.3, 2.0)
    loop = []
    for row in u:
        certain = [l for l, t in enumerate(fitted.thresholds) if t is not None and row[l] < t]
        loop.append(certain[0] if certain else 3)
    assert (fitted.route(u) == loop).all()
    assert (fitted.route(u[:, :3]) == loop).all()              # the last head's score is not needed
    alike = EERO.fit(u[:, :3], wrong, [1, 2, 3, 4], 2.3, 2.0)
    assert (alike.route(u) == loop).mean() > 0.999             # other noise, the same thresholds


def test_cascade_is_what_route_does_on_the_calibration_samples():
    for seed in range(10):
        u, _ = correlated(seed, 1000, 5, ties=2 if seed % 2 else None)
        pi = np.random.default_rng(seed).dirichlet(np.ones(5)) * [1, 0, 1, 1, 1]
        fitted = EERO.from_distribution(u, pi / pi.sum(), [1, 2, 3, 4, 5], 5, seed=seed)
        noisy, order, _ = eero.ranked(u, [1, 2, 3, 4, 5], seed)
        head, thresholds = eero.cascade(noisy, order, pi / pi.sum())
        exact = EERO(fitted.pi, thresholds, fitted.cost, 5)    # without noise: it is in the scores
        assert thresholds == fitted.thresholds and (exact.route(noisy) == head).all()


def test_heads_without_a_share_are_never_consulted():
    u, wrong = correlated(1, 1000, 3)
    fitted = EERO.from_distribution(u, [0.5, 0.0, 0.5], [1, 2, 3], 2.0)
    assert fitted.thresholds[1] is None
    assert set(fitted.route(u)) == {0, 2}
    everybody = EERO.from_distribution(u, [1.0, 0.0, 0.0], [1, 2, 3], 1.0)
    assert (everybody.route(u + 100) == 0).all()               # also beyond what was calibrated


def test_all_scores_equal():
    u = np.zeros((20000, 3))
    fitted = EERO.from_distribution(u, [0.2, 0.5, 0.3], [1, 2, 3], 2.1)
    share = np.bincount(fitted.route(u), minlength=3) / len(u)
    assert np.abs(share - [0.2, 0.5, 0.3]).max() < 0.02        # the noise alone decides


def test_deterministic_given_the_seed():
    u, wrong = correlated(2, 5000, 4, ties=1)
    a, b, c = (EERO.fit(u, wrong, [1, 2, 3, 4], 2.5, 1.0, seed=s) for s in (0, 0, 1))
    assert a == b and a != c
    assert (a.route(u, seed=7) == b.route(u, seed=7)).all()
    assert (a.route(u, seed=7) != a.route(u, seed=8)).any()


def test_bad_calibration_data_is_refused():
    for u, pi, cost, message in (
            ([[0.1, np.nan]], [0.5, 0.5], [1, 2], "finite"),
            ([[0.1, 0.2, 0.3]], [0.5, 0.5], [1, 2], "shape"),
            (np.zeros((0, 2)), [0.5, 0.5], [1, 2], "n > 0"),
            ([[0.1, 0.2]], [0.5, 0.5], [2, 1], "cumulative"),
            ([[0.1, 0.2]], [0.5, 0.5], [1, 2, 3], "cumulative")):
        with pytest.raises(ValueError, match=message):
            EERO.from_distribution(u, pi, cost, 1.5)
    u, wrong = correlated(0, 100, 3)
    with pytest.raises(ValueError, match="every sample needs its label"):
        EERO.fit(u, wrong[:50], [1, 2, 3], 2)
    with pytest.raises(ValueError, match="every sample needs its label"):
        EERO.fit_incurred(u, wrong[:50], [1, 2, 3], 2)
    with pytest.raises(ValueError, match="beta must be above 0"):
        EERO.fit_incurred(u, wrong, [1, 2, 3], 2, beta=0)


# ---------------------------------------------------------------- what is charged; choice of beta

DEPTHS, OUTPUTS = [4, 8, 12, 16], [4 / 3] * 4                  # the toy's, in blocks


def selective(seed, n=4000):
    """Four heads that rank alike. The first is right on the easy third and lost beyond it."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random((n, 1))
    wrong = rng.random((n, 4)) < np.clip(difficulty * 3 - [0.6, 1.2, 1.8, 2.4], 0, 1)
    return difficulty + 0.1 * rng.random((n, 4)), wrong


def test_costs_count_every_head_consulted_and_no_other():
    D, V, L = 128, 2048, 16
    head = V * D / (12 * D * D)                                # a linear head, in blocks
    expected = [4 + head, 8 + 2 * head, 12 + 3 * head, 16 + 4 * head]
    assert eero.cost_of_exits([4, 8, 12, L], [head] * 4) == pytest.approx(expected)
    u, _ = correlated(0, 1000, 4)
    fitted = EERO.from_distribution(u, [.5, 0, 0, .5], DEPTHS, 12, OUTPUTS)
    assert np.dot(fitted.pi, fitted.cost) == pytest.approx(12.0)
    assert np.array(fitted.cost)[fitted.route(u)].mean() == pytest.approx(12.0)
    # by hand, from what route() looks at: the blocks run, and each head asked on the way
    consulted = [t is not None for t in fitted.thresholds] + [True]
    for head in set(fitted.route(u)):
        by_hand = DEPTHS[head] + sum(OUTPUTS[l] for l in range(head + 1) if consulted[l])
        assert fitted.cost[head] == pytest.approx(by_hand)


def test_the_budget_is_spent_on_what_is_consulted():
    u, wrong = selective(0, 2000)
    for budget in (7.0, 12.0, 16.0):
        for fitted in (EERO.fit(u, wrong, DEPTHS, budget, 20, OUTPUTS),
                       EERO.fit(u, wrong, DEPTHS, budget, np.inf, OUTPUTS),
                       EERO.fit_incurred(u, wrong, DEPTHS, budget, outputs=OUTPUTS)):
            assert np.dot(fitted.pi, fitted.cost) == pytest.approx(budget, abs=0.01)
            assert np.array(fitted.cost)[fitted.route(u)].mean() == pytest.approx(budget, abs=0.01)
    full = EERO.fit(u, wrong, DEPTHS, 16 + 4 / 3, np.inf, OUTPUTS)
    assert np.dot(full.pi, full.cost) <= 16 + 4 / 3 + 1e-9


def test_heads_that_cost_nothing_are_all_kept_and_dear_ones_dropped_for_good_reason():
    """The loop finds what a search over all sets of consulted heads finds, or nearly so."""
    for seed in range(20):
        risk, _, _, _ = instance(seed, 4)
        risk = np.sort(risk)[::-1]
        budget = np.random.default_rng(seed).uniform(6, 17)
        wrong = np.linspace(0, 1, 2000, endpoint=False)[:, None] < risk
        u, R = correlated(seed, 2000, 4)[0], wrong.mean(0)
        free = EERO.fit(u, wrong, DEPTHS, budget, 10)
        assert free.pi == exit_distribution(R, DEPTHS, budget, 10).tolist()
        best = np.inf
        for kept in itertools.product((True, False), repeat=3):
            kept = np.array([*kept, True])
            B = eero.cost_of_exits(DEPTHS, OUTPUTS, kept)
            if B[kept].min() <= budget:
                pi = exit_distribution(R, B, budget, 10, kept * 1.0)
                best = min(best, objective(pi, R, 10, np.ones(4)))
        fitted = EERO.fit(u, wrong, DEPTHS, budget, 10, OUTPUTS)
        found = objective(np.array(fitted.pi), R, 10, np.ones(4))
        assert best - 1e-6 <= found <= best + 0.01


def test_beta_is_chosen_on_held_out_samples():
    u, wrong = correlated(4, 8000, 4)
    cost, budget = [1, 2, 3, 4], 2.2
    fitted = EERO.fit(u[:4000], wrong[:4000], cost, budget)
    assert fitted.beta in eero.BETAS and np.dot(fitted.pi, cost) <= budget + 1e-9
    # by hand: one half fits, the other judges
    order = np.random.default_rng(0).permutation(4000)
    here, there = order[:2000], order[2000:]
    risks = []
    for beta in eero.BETAS:
        half = EERO.fit(u[here], wrong[here], cost, budget, beta)
        risks.append(risk_of(half, u[there], wrong[there]))
    assert fitted.beta == eero.BETAS[int(np.argmin(risks))]
    # and it is worth something on new samples
    programme = EERO.fit(u[:4000], wrong[:4000], cost, budget, np.inf)
    new = u[4000:], wrong[4000:]
    assert risk_of(fitted, *new) < risk_of(programme, *new) - 0.01


# ---------------------------------------------------------------- the second act


def cascade_risk(u, wrong, cost):
    noisy, order, _ = eero.ranked(u, cost, 0)
    return lambda pi: wrong[np.arange(len(u)), eero.cascade(noisy, order, np.asarray(pi))[0]].mean()


def test_the_incurred_risk_falls_at_every_kept_step_and_the_budget_is_met():
    for seed, beta in itertools.product(range(3), (5.0, np.inf)):
        u, wrong = correlated(seed, 2000, 4)
        cost, budget = np.array([1.0, 2, 3, 4]), 2.2
        J = cascade_risk(u, wrong, cost)
        kept = eero.descend(J, cost, budget, beta, np.ones(4))
        values = [value for value, _ in kept]
        assert len(kept) > 1 and (np.diff(values) < 0).all()
        for value, pi in kept:
            assert value == pytest.approx(J(pi) + eero.kl(pi, np.ones(4)) / beta)
            assert pi.sum() == pytest.approx(1) and pi @ cost <= budget + 1e-9
        fitted = EERO.fit_incurred(u, wrong, cost, budget, beta)
        assert fitted.pi == kept[-1][1].tolist()
        assert cost[fitted.route(u)].mean() == pytest.approx(budget, abs=0.01)


def test_a_head_is_not_dropped_for_a_smaller_prior():
    """Where all heads err alike, the KL from all heads keeps them all, however small beta is."""
    u = correlated(0, 2000, 4)[0]
    wrong = np.arange(2000)[:, None].repeat(4, 1) % 4 == 0
    fitted = EERO.fit_incurred(u, wrong, DEPTHS, 9.0, 1.0, outputs=0.1)
    assert None not in fitted.thresholds
    mean_risk = EERO.fit(u, wrong, DEPTHS, 9.0, 1.0, outputs=0.1)
    assert mean_risk.pi == pytest.approx(fitted.pi, abs=0.02)


def test_it_equals_equation_1_where_risks_do_not_depend_on_who_leaves():
    n, risk, cost = 8000, np.array([0.5, 0.3, 0.25, 0.1]), np.array([1.0, 2, 3, 4])
    rank = np.arange(n)
    u = np.repeat(rank[:, None], 4, 1) / n                     # all heads rank alike ..
    wrong = rank[:, None] % 100 < 100 * risk                   # .. and err evenly along the ranks
    J = cascade_risk(u, wrong, cost)
    for budget, beta in itertools.product((1.7, 3.2), (2.0, 10.0, np.inf)):
        expected = exit_distribution(risk, cost, budget, beta)
        value, pi = eero.descend(J, cost, budget, beta, np.ones(4))[-1]
        assert J(pi) == pytest.approx(pi @ risk, abs=0.005)
        if beta < np.inf:
            assert np.abs(pi - expected).max() < 0.02
        assert pi @ risk + eero.kl(pi, np.ones(4)) / beta == pytest.approx(
            expected @ risk + eero.kl(expected, np.ones(4)) / beta, abs=0.005)


def test_the_incurred_risk_is_lower_than_equation_1s_on_new_samples():
    (u, wrong), (u_test, wrong_test) = selective(0), selective(1)
    cost = [1, 2, 3, 4]
    programme = risk_of(EERO.fit(u, wrong, cost, 2.2, np.inf), u_test, wrong_test)
    chosen = risk_of(EERO.fit(u, wrong, cost, 2.2), u_test, wrong_test)
    incurred = risk_of(EERO.fit_incurred(u, wrong, cost, 2.2), u_test, wrong_test)
    assert incurred < chosen + 0.005 and incurred < programme - 0.02


def test_the_mean_risk_of_those_that_left_is_the_wrong_thing_to_iterate():
    """What counts is the risk of the next sample that would leave there, the marginal one."""
    u, wrong = selective(0)
    cost, budget = np.array([1.0, 2, 3, 4]), 2.8
    noisy, order, _ = eero.ranked(u, cost, 0)
    J = cascade_risk(u, wrong, cost)
    pi, best = exit_distribution(wrong.mean(0), cost, budget, 0), 1.0
    for t in range(40):
        head = eero.cascade(noisy, order, pi)[0]
        mean = np.array([wrong[head == l, l].mean() if (head == l).any() else 0 for l in range(4)])
        pi = exit_distribution(mean, cost, budget, 12 / np.sqrt(1 + t), np.maximum(pi, 1e-12))
        best = min(best, J(pi))
    marginal = eero.descend(J, cost, budget, np.inf, np.ones(4))[-1][0]
    assert J(pi) > marginal + 0.05 and best > marginal + 0.02  # 0.120, 0.083 and 0.055


# ---------------------------------------------------------------- the other methods


def test_geometric_law():
    for seed in range(20):
        _, cost, budget, _ = instance(seed)
        pi = budgets.geometric_distribution(cost, budget)
        assert pi @ cost == pytest.approx(budget, abs=1e-10)
        if len(pi) > 2:
            steps = np.diff(np.log(pi))
            assert np.abs(steps - steps[0]).max() < 1e-6       # one rate
        edges = np.eye(len(cost))
        assert np.allclose(budgets.geometric_distribution(cost, cost[-1]), edges[-1])
        assert np.allclose(budgets.geometric_distribution(cost, cost[0]), edges[0])
        with pytest.raises(ValueError, match="below the cheapest"):
            budgets.geometric_distribution(cost, cost[0] / 2)


def test_shared_threshold_meets_the_budget_on_its_calibration_data():
    u, _ = correlated(0, 3000, 4)
    cost = np.array([1.0, 2, 3, 4])
    for budget in (1.0, 1.7, 2.5, 3.9, 4.0):
        fitted = budgets.shared_threshold(u, cost, budget)
        realised = cost[fitted.route(u)].mean()
        assert budget - 0.01 <= realised <= budget             # one sample is at most 0.001
        assert len(set(fitted.thresholds)) == 1
        assert np.dot(fitted.pi, cost) == pytest.approx(realised)
    # every head is consulted, and charged
    fitted = budgets.shared_threshold(u, DEPTHS, 12, OUTPUTS)
    assert fitted.cost == pytest.approx([4 + 4 / 3, 8 + 8 / 3, 16, 16 + 16 / 3])
    assert np.array(fitted.cost)[fitted.route(u)].mean() == pytest.approx(12, abs=0.01)


def test_patience_by_hand():
    predictions = np.array([[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 1, 2], [3, 4, 4, 5], [1, 1, 2, 2]])
    assert budgets.patience(predictions, 1).tolist() == [1, 2, 3, 2, 1]
    assert budgets.patience(predictions, 2).tolist() == [2, 3, 3, 3, 3]


def test_oracle_is_the_best_choice_there_is():
    rng = np.random.default_rng(0)
    cost = np.array([1.0, 2.0, 4.0])
    for _ in range(20):
        wrong = rng.random((6, 3)) < 0.5
        budget = rng.uniform(1, 4)
        best = 0
        for heads in itertools.product(range(3), repeat=6):
            if cost[list(heads)].mean() <= budget + 1e-9:
                best = max(best, 6 - sum(wrong[i, h] for i, h in enumerate(heads)))
        head = budgets.oracle(wrong, cost, budget)
        assert (~wrong[np.arange(6), head]).sum() == best
        assert cost[head].mean() <= budget + 1e-9


def test_random_exits_follow_pi():
    head = budgets.random_exits([0.2, 0.5, 0.3], 20000, seed=1)
    assert np.abs(np.bincount(head) / 20000 - [0.2, 0.5, 0.3]).max() < 0.015


def test_passing_on_hopeless_samples_loses_to_chance():
    """A limit: where the least certain are wrong at every depth, random exits do better."""
    rng = np.random.default_rng(0)
    difficulty = rng.random((20000, 1))
    wrong = difficulty > np.array([0.4, 0.6])                  # beyond 0.6 no head is right
    pi, cost, u = [0.6, 0.4], [1.0, 2.0], difficulty + np.zeros((1, 2))
    fitted = EERO.from_distribution(u, pi, cost, 1.4)
    ours = 1 - risk_of(fitted, u, wrong)
    chance = 1 - wrong[np.arange(20000), budgets.random_exits(pi, 20000, seed=1)].mean()
    assert ours == pytest.approx(0.4, abs=0.02) and chance == pytest.approx(0.48, abs=0.02)


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def informative():
    """Scores that say which samples are hard: (calibration, test), 4,000 samples each."""
    halves = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        difficulty, level = rng.random((8000, 1)), np.array([0.4, 0.7, 1.0])
        wrong = difficulty > level
        u = difficulty + 0.1 * rng.random((8000, 3))
        halves.append({"uncertainty": u, "wrong": wrong, "predictions": wrong.astype(int)})
    return halves


def test_compare_and_score(informative):
    """EERO must beat exits drawn at random from the same pi, and lose to the oracle."""
    cost, asked = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0])
    rows = budgets.compare(*informative, cost, asked, beta=100.0)
    test = informative[1]
    scores = budgets.score([(rows, test)], "wrong")
    assert np.allclose([row["EERO"].target for row in rows], asked)
    assert np.abs(scores["EERO"][1] - asked).max() < 0.05
    assert (scores["EERO"][0] > scores["random"][0] + 0.03).all()
    assert (scores["oracle"][0] >= scores["EERO"][0]).all()
    for i, row in enumerate(rows):
        by_hand = np.mean([test["wrong"][j, h] for j, h in enumerate(row["EERO"].head)])
        assert scores["EERO"][0][i] == pytest.approx(1 - by_hand)
        assert row["EERO"].realised == pytest.approx(cost[row["EERO"].head].mean())
    means = budgets.score([(rows, test), (rows, test)], "wrong")
    assert all(np.allclose(means[name], scores[name]) for name in scores)


def test_report_has_a_row_per_budget_and_a_column_per_method(informative, capsys):
    cost, asked = np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.5, 3.0])
    runs = [(budgets.compare(*informative, cost, asked), informative[1])]
    budgets.report(runs, "wrong", cost, asked, 0.0, "units", "accuracy")
    budgets.report_misses(runs, 3)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|") for line in lines if line.count("|") == 1][1:]
    assert [len(right.split()) for _, right in rows] == [len(budgets.METHODS)] * 3
    betas = [float(left.split()[3]) for left, _ in rows]
    assert betas == [row["EERO"].beta for row in runs[0][0]] and set(betas) <= set(eero.BETAS)
    assert sum(line.startswith("patience") for line in lines) == 2
    assert any("unconditional" in line for line in lines)


# ---------------------------------------------------------------- tokens and the command line


def test_token_samples_on_a_tiny_model():
    model = tiny()
    heads = shaken(model)
    ids = torch.randint(96, (3, 7), generator=torch.Generator().manual_seed(0))
    got = eero.token_samples(evaluate(model, heads, ids, {"entropy": entropy}, batch=2), "entropy")
    with torch.no_grad():
        last, hidden = model(ids[:, :-1], exits=heads.layers)
        logits = torch.stack([*heads.logits(hidden), last], 2).flatten(0, 1)   # (N, M, V)
    p = logits.softmax(-1)
    expected = -(p * p.log()).sum(-1)[:, :-1]
    target = ids[:, 1:].flatten()
    assert np.allclose(got["uncertainty"], expected, atol=1e-5)
    for k, z in enumerate(logits):
        assert got["predictions"][k].tolist() == z.argmax(-1).tolist()
        assert got["wrong"][k].tolist() == (z.argmax(-1) != z[-1].argmax()).tolist()
        assert got["wrong_next"][k].tolist() == (z.argmax(-1) != target[k]).tolist()
    assert len(got["wrong"]) == len(logits) == 18


def test_bad_input_is_refused_before_any_work(tmp_path):
    for arguments, words in ((("--beta", "-1"), "at least 0"), (("--beta", "nan"), "at least 0"),
                             (("--tokens", "10"), "at least 257"),
                             (("--prompts", "-1"), "at least 0"),
                             (("--heads", "nowhere.safetensors"), "nowhere.safetensors"),
                             (("--figure", "nowhere/eero.png"), "folder"),
                             (("--figure", "eero.exe"), ".png")):
        assert_refused(call(eero, *arguments), words)


def test_bad_input_is_one_line_and_status_2():
    status, out, errors = run("eero.py", "--tokens", "1")
    assert status == 2 and out == ""
    assert errors.count("\n") == 1 and errors.startswith("error: --tokens must be at least 257")


def test_the_chapter_runs_on_the_toy(tmp_path):
    status, out, errors = call(eero, "--tokens", 2000, "--prompts", 0, "--beta", 20,
                               "--measure", "margin", "--figure", tmp_path / "eero.png")
    assert status == 0, errors
    assert "by margin" in out and "accuracy on the true next token" in out
    assert [p.name for p in tmp_path.iterdir()] == ["eero.png"]
    misses = {}
    for line in out.splitlines():
        if line.startswith("  ") and line.split()[-1][0] in "+-":
            misses[" ".join(line.split()[:-1])] = float(line.split()[-1])
    assert abs(misses["unconditional"]) > 1.5 + abs(misses["beta 10"])   # why equation 2 exists


@pytest.mark.slow
def test_tokens_on_the_toy_at_full_size():
    status, out, errors = call(eero, "--prompts", 12)
    assert status == 0, errors
    worst = next(line for line in out.splitlines() if line.startswith("  EERO "))
    assert abs(float(worst.split()[1])) < 1.0                  # % of the full cost
    lines = out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(" budget  uncorrected"))
    rows = []
    for line in lines[begin + 1:begin + 4]:
        rows.append([float(cell.rstrip("%")) for cell in line.split()])
    assert all(abs(corrected - budget) < 0.1 * budget for budget, _, corrected, _, _ in rows)
    worst = [max(abs(row[c] / row[0] - 1) for row in rows) for c in (1, 2)]
    # the correction helps the worst budget
    assert worst[1] < worst[0]
