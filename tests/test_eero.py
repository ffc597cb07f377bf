"""Chapter 4: the exit distribution against independent solvers, the budget against statistics, the networks
against torchvision and closed forms, the data readers against files written by hand."""
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import eero
from eero import EERO, exit_distribution

ROOT = Path(eero.__file__).parent


def instance(seed, M=None):
    """Random risks, increasing costs and a budget between the cheapest and the dearest head."""
    rng = np.random.default_rng(seed)
    M = M or int(rng.integers(2, 13))
    cost = np.cumsum(rng.exponential(1, M) ** 2 + 0.01)                   # skewed on purpose
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


# ---------------------------------------------------------------- exit_distribution


@pytest.mark.parametrize("seed", range(40))
def test_equals_an_independent_convex_solve(seed):
    optimize = pytest.importorskip("scipy.optimize")
    risk, cost, budget, prior = instance(seed)
    beta = float(np.random.default_rng(seed + 1000).choice([0.5, 2.0, 5.0, 10.0]))
    log_prior = np.log(prior / prior.sum())

    def dual(m):                                                          # max over m >= 0: the problem's Lagrange dual
        w = log_prior - beta * risk - m * cost
        return m * budget + w.max() + np.log(np.exp(w - w.max()).sum())

    m = optimize.minimize_scalar(dual, bounds=(0, 1e3), method="bounded", options={"xatol": 1e-12}).x
    pi = exit_distribution(risk, cost, budget, beta, prior)
    primal = optimize.minimize(
        lambda p: objective(np.maximum(p, 1e-300), risk, beta, prior), np.full(len(risk), 1 / len(risk)),
        method="SLSQP",
        jac=lambda p: risk + (np.log(np.maximum(p, 1e-300)) - log_prior + 1) / beta, bounds=[(0, 1)] * len(risk),
        constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones_like(p)},
                     {"type": "ineq", "fun": lambda p: budget - p @ cost, "jac": lambda p: -cost}],
        options={"ftol": 1e-15, "maxiter": 2000})
    assert objective(pi, risk, beta, prior) <= primal.fun + 1e-9          # nothing feasible is better
    assert objective(pi, risk, beta, prior) == pytest.approx(-dual(m) / beta, abs=1e-9)   # no duality gap: optimal
    assert np.abs(pi - primal.x).max() < 1e-6
    assert pi.sum() == pytest.approx(1, abs=1e-12) and pi @ cost <= budget + 1e-10


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("beta", [1e8, np.inf])
def test_large_beta_is_the_linear_programme(seed, beta):
    risk, cost, budget, _ = instance(seed)
    best = min(risk[cost <= budget])                                      # vertices: one head, or two that spend it all
    for i, j in itertools.combinations(range(len(risk)), 2):
        if cost[i] <= budget <= cost[j]:
            share = (cost[j] - budget) / (cost[j] - cost[i])
            best = min(best, share * risk[i] + (1 - share) * risk[j])
    pi = exit_distribution(risk, cost, budget, beta)
    assert pi @ risk == pytest.approx(best, abs=1e-6)
    assert (pi > 1e-6).sum() <= 2
    assert pi @ cost <= budget + 1e-10


@pytest.mark.parametrize("seed", range(20))
def test_beta_zero_is_the_tilted_prior(seed):
    risk, cost, budget, prior = instance(seed)
    for beta, tolerance in ((0.0, 1e-12), (1e-9, 1e-7)):
        pi = exit_distribution(risk, cost, budget, beta, prior)
        ratio = np.log(pi / prior)                                        # linear in the cost, whatever the risk
        slope = (ratio[-1] - ratio[0]) / (cost[-1] - cost[0])
        assert np.abs(ratio - ratio[0] - slope * (cost - cost[0])).max() < tolerance * 1e3
        assert slope <= 1e-9
    assert pi @ cost == pytest.approx(min(budget, prior @ cost / prior.sum()), abs=1e-7)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1e3, 1e8, np.inf])
@pytest.mark.parametrize("seed", range(10))
def test_no_overflow_and_the_budget_to_1e_10(seed, beta):
    risk, cost, budget, prior = instance(seed)
    for scale in (1.0, 1e9):                                              # block-equivalents, multiply-adds
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            pi = exit_distribution(risk, cost * scale, budget * scale, beta, prior)
        free = exit_distribution(risk, cost, cost.max(), beta, prior) @ cost
        assert np.isfinite(pi).all() and pi.min() >= 0 and pi.sum() == pytest.approx(1, abs=1e-12)
        assert pi @ cost == pytest.approx(min(budget, free), abs=1e-10)


def test_slack_budget_and_binding():
    risk, cost = np.array([0.4, 0.2, 0.3]), np.array([1.0, 2.0, 4.0])
    free = np.exp(-5 * risk) / np.exp(-5 * risk).sum()
    assert np.allclose(exit_distribution(risk, cost, 100.0, 5.0), free)   # above the dearest head: lambda = 0
    u, wrong = np.random.default_rng(0).random((500, 3)), np.random.default_rng(1).random((500, 3)) < risk
    assert EERO.fit(u, wrong, cost, 1.5, 5.0).binding
    assert not EERO.fit(u, wrong, cost, 4.0, 5.0).binding
    assert np.allclose(exit_distribution(risk, cost, 1.0, 5.0), [1, 0, 0])   # exactly the cheapest head
    assert np.allclose(exit_distribution(risk, cost, 4.0, 1e8), [0, 1, 0])   # overthinking: the best head, not the last


@pytest.mark.parametrize("change, message", [
    ({"budget": 0.5}, "below the cheapest head"), ({"budget": np.nan}, "finite"), ({"beta": -1.0}, "beta >= 0"),
    ({"risk": [0.1, np.nan]}, "finite"), ({"risk": [0.1]}, "one length"), ({"prior": [0, 0]}, "prior"),
    ({"prior": [0, 1], "budget": 1.5}, "below the cheapest head")])
def test_impossible_requests_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        exit_distribution(**{"risk": [0.3, 0.1], "cost": [1.0, 2.0], "budget": 1.5, "beta": 1.0, **change})


@pytest.mark.parametrize("seed", range(30))
def test_monotone_in_the_budget(seed):
    """A larger budget moves mass to dearer heads: cumulative shares, rates eps_l and thresholds all fall.

    Thresholds do so when the heads rank the samples alike, as here; in general only the first head's must.
    """
    risk, cost, _, prior = instance(seed)
    alike = np.random.default_rng(seed).random((3000, 1)) + np.zeros(len(cost))
    before = None
    for budget in np.linspace(cost[0], cost[-1], 15):
        pi = exit_distribution(risk, cost, budget, 3.0, prior)
        left = 1 - np.concatenate([[0], np.cumsum(pi)[:-1]])
        rates = np.divide(pi, left, out=np.ones_like(pi), where=left > 1e-9)
        thresholds = EERO.from_distribution(alike, pi, cost, budget).thresholds
        # a head that never answers leaves standing what the heads before it have taken
        thresholds = np.maximum.accumulate([-np.inf if t is None else t for t in thresholds])
        if before:
            for now, then, tolerance in zip((np.cumsum(pi), rates, thresholds), before, (1e-9, 1e-6, 1e-8)):
                assert (now <= then + tolerance).all()
        before = np.cumsum(pi), rates, thresholds


# ---------------------------------------------------------------- EERO


@pytest.mark.parametrize("M", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("ties", [None, 1, 5])
def test_realised_budget_within_three_standard_errors(M, ties):
    n, scores = 4000, []
    for seed in range(8):
        u, wrong = correlated(seed, 2 * n, M, ties)
        _, cost, budget, _ = instance(seed, M)
        fitted = EERO.fit(u[:n], wrong[:500], cost, budget, beta=4.0, seed=seed)   # labels for 500 of them only
        target = np.dot(fitted.pi, cost)
        deviation = np.sqrt(np.dot(fitted.pi, (cost - target) ** 2))
        realised = cost[fitted.route(u[n:])].mean()
        scores.append((realised - target) / (deviation * np.sqrt(2 / n) + 1e-12))  # calibration and test both vary
        assert target <= budget + 1e-9
        assert fitted.binding == (target > budget - 1e-9)
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
    assert error[False] > 10 * 1.1 * np.sqrt(2 / n)                       # far outside of chance


def test_thresholds_are_the_quantiles_of_those_who_reach():
    u, _ = correlated(5, 997, 3)
    pi = np.array([0.25, 0.45, 0.30])
    fitted = EERO.from_distribution(u, pi, [1, 2, 3], 2.05)
    order = sorted(range(997), key=lambda i: u[i, 0])                     # the naive twin: sort, take, remove
    first, rest = order[:round(0.25 * 997)], order[round(0.25 * 997):]
    second = sorted(rest, key=lambda i: u[i, 1])[:round(0.70 * 997) - len(first)]
    expected = np.full(997, 2)
    expected[first], expected[second] = 0, 1
    assert (fitted.route(u) == expected).all()


def test_route_equals_a_loop():
    u, wrong = correlated(0, 40000, 4)                                    # more than one piece of route()
    fitted = EERO.fit(u, wrong, [1, 2, 3, 4], 2.3, 2.0)
    loop = [next((l for l, t in enumerate(fitted.thresholds) if t is not None and row[l] < t), 3) for row in u]
    assert (fitted.route(u) == loop).all()
    assert (fitted.route(u[:, :3]) == loop).all()                         # the last head's score is not needed


def test_heads_without_a_share_are_never_consulted():
    u, wrong = correlated(1, 1000, 3)
    fitted = EERO.from_distribution(u, [0.5, 0.0, 0.5], [1, 2, 3], 2.0)
    assert fitted.thresholds[1] is None
    assert set(fitted.route(u)) == {0, 2}
    everybody = EERO.from_distribution(u, [1.0, 0.0, 0.0], [1, 2, 3], 1.0)
    assert (everybody.route(u + 100) == 0).all()                          # also beyond what calibration has seen


def test_all_scores_equal():
    u = np.zeros((20000, 3))
    fitted = EERO.from_distribution(u, [0.2, 0.5, 0.3], [1, 2, 3], 2.1)
    share = np.bincount(fitted.route(u), minlength=3) / len(u)
    assert np.abs(share - [0.2, 0.5, 0.3]).max() < 0.02                   # the noise alone decides


def test_deterministic_given_the_seed():
    u, wrong = correlated(2, 5000, 4, ties=1)
    a, b, c = (EERO.fit(u, wrong, [1, 2, 3, 4], 2.5, 1.0, seed=s) for s in (0, 0, 1))
    assert a == b and a != c
    assert (a.route(u, seed=7) == b.route(u, seed=7)).all()
    assert (a.route(u, seed=7) != a.route(u, seed=8)).any()


def test_save_and_load(tmp_path):
    u, wrong = correlated(2, 500, 4)
    for beta in (3.0, np.inf):
        fitted = EERO.fit(u, wrong, [1, 2, 3, 4], 2.5, beta)
        fitted.save(tmp_path / "eero.json")
        assert EERO.load(tmp_path / "eero.json") == fitted
        json.loads((tmp_path / "eero.json").read_text(), parse_constant=pytest.fail)   # strict JSON: no Infinity
    assert [p.name for p in tmp_path.iterdir()] == ["eero.json"]
    for text in ("", "[1]", '{"pi": [1]}', '{"pi": [1], "thresholds": [1, 2], "cost": [1], "budget": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="no saved EERO"):
            EERO.load(tmp_path / "bad.json")


@pytest.mark.parametrize("u, pi, cost, message", [
    ([[0.1, np.nan]], [0.5, 0.5], [1, 2], "finite"), ([[0.1, 0.2, 0.3]], [0.5, 0.5], [1, 2], "shape"),
    (np.zeros((0, 2)), [0.5, 0.5], [1, 2], "n > 0"), ([[0.1, 0.2]], [0.5, 0.5], [2, 1], "cumulative")])
def test_bad_calibration_data_is_refused(u, pi, cost, message):
    with pytest.raises(ValueError, match=message):
        EERO.from_distribution(u, pi, cost, 1.5)


def test_route_is_fast():
    u = np.random.default_rng(0).random((2_000_000, 4))
    fitted = EERO.from_distribution(u[:10000], [0.25] * 4, [1, 2, 3, 4], 2.5)
    seconds = []
    for _ in range(5):
        begin = time.process_time()                                       # of one core, whatever else is running
        fitted.route(u)
        seconds.append(time.process_time() - begin)
    assert len(u) / min(seconds) > 10e6


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("seed", range(20))
def test_geometric_law(seed):
    _, cost, budget, _ = instance(seed)
    pi = eero.geometric_distribution(cost, budget)
    assert pi @ cost == pytest.approx(budget, abs=1e-10)
    if len(pi) > 2:
        steps = np.diff(np.log(pi))
        assert np.abs(steps - steps[0]).max() < 1e-6                      # one rate
    assert np.allclose(eero.geometric_distribution(cost, cost[-1]), np.eye(len(cost))[-1])
    assert np.allclose(eero.geometric_distribution(cost, cost[0]), np.eye(len(cost))[0])
    with pytest.raises(ValueError, match="below the cheapest"):
        eero.geometric_distribution(cost, cost[0] / 2)


def test_shared_threshold_meets_the_budget_on_its_calibration_data():
    u, _ = correlated(0, 3000, 4)
    cost = np.array([1.0, 2, 3, 4])
    for budget in (1.0, 1.7, 2.5, 3.9, 4.0):
        fitted = eero.shared_threshold(u, cost, budget)
        realised = cost[fitted.route(u)].mean()
        assert budget - 0.01 <= realised <= budget                        # one sample is at most 0.001
        assert len(set(fitted.thresholds)) == 1
        assert np.dot(fitted.pi, cost) == pytest.approx(realised)


def test_patience_by_hand():
    predictions = np.array([[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 1, 2], [3, 4, 4, 5], [1, 1, 2, 2]])
    assert eero.patience(predictions, 1).tolist() == [1, 2, 3, 2, 1]
    assert eero.patience(predictions, 2).tolist() == [2, 3, 3, 3, 3]


def test_oracle_is_the_best_choice_there_is():
    rng = np.random.default_rng(0)
    cost = np.array([1.0, 2.0, 4.0])
    for _ in range(20):
        wrong = rng.random((6, 3)) < 0.5
        budget = rng.uniform(1, 4)
        best = max(6 - sum(wrong[i, h] for i, h in enumerate(heads)) for heads in itertools.product(range(3), repeat=6)
                   if cost[list(heads)].mean() <= budget + 1e-9)
        head = eero.oracle(wrong, cost, budget)
        assert (~wrong[np.arange(6), head]).sum() == best
        assert cost[head].mean() <= budget + 1e-9


def test_random_exits_follow_pi():
    head = eero.random_exits([0.2, 0.5, 0.3], 20000, seed=1)
    assert np.abs(np.bincount(head) / 20000 - [0.2, 0.5, 0.3]).max() < 0.015


def test_compare_and_score():
    """Informative scores: EERO must beat exits drawn at random from the same pi, and lose to the oracle."""
    halves = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        difficulty, level = rng.random((8000, 1)), np.array([0.4, 0.7, 1.0])
        wrong = difficulty > level
        u = difficulty + 0.1 * rng.random((8000, 3))
        halves.append({"uncertainty": u, "wrong": wrong, "predictions": wrong.astype(int)})
    cost, budgets = np.array([1.0, 2.0, 3.0]), np.array([1.5, 2.0])
    heads, targets = eero.compare(*halves, cost, budgets, beta=100.0)
    scores = {name: eero.score(h, halves[1]["wrong"], cost) for name, h in heads.items()}
    assert np.allclose(targets, budgets)
    assert np.abs(scores["EERO"][1] - budgets).max() < 0.05
    assert (scores["EERO"][0] > scores["random"][0] + 0.03).all()
    assert (scores["oracle"][0] >= scores["EERO"][0]).all()
    by_hand = [1 - np.mean([halves[1]["wrong"][i, h] for i, h in enumerate(row)]) for row in heads["EERO"]]
    assert np.allclose(scores["EERO"][0], by_hand)


# ---------------------------------------------------------------- networks


def torchvision_models():
    try:
        import torchvision.models as models
    except (ImportError, RuntimeError) as error:                          # RuntimeError: built for another torch
        pytest.skip(f"torchvision is not usable here: {error}")
    return models


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
@torch.no_grad()
def test_torchvision_state_dict_gives_torchvision_outputs(name):
    reference = getattr(torchvision_models(), name)(weights=None).eval()
    for p in reference.parameters():                                      # so that every part matters
        torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0, 0.05)
    ours = (eero.ResNet18(1000, small=False) if name == "resnet18" else eero.ConvNeXt(1000, small=False)).eval()
    ours.load_backbone(reference.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = reference(x)
    assert expected.std() > 1e-3
    assert torch.allclose(ours(x)[-1], expected, atol=1e-4, rtol=1e-4)


def test_load_backbone_refuses_another_network():
    net = eero.ResNet18(10, width=4)
    backbone = {k: v for k, v in net.state_dict().items() if not k.startswith("exits")}
    net.load_backbone(backbone)
    with pytest.raises(ValueError, match="not this backbone: missing"):
        net.load_backbone({k: v for k, v in backbone.items() if k != "conv1.weight"})
    with pytest.raises(ValueError, match="unexpected"):
        net.load_backbone({**backbone, "layer5.weight": torch.zeros(1)})


def test_exit_costs_of_resnet18_in_closed_form():
    w, S, C = 64, 32, 10
    stage, expected, total = 4 * 9 * w * w * S * S, [], 27 * w * S * S    # the four convolutions of a stage; the stem
    for i in range(4):
        if i:                                                             # the first of them sees half the channels
            total += stage - stage / 8 + stage / 72                       # and the shortcut is a 1x1 convolution
        else:
            total += stage
        total += w * 2 ** i * C
        expected.append(total)
    assert eero.exit_costs(eero.ResNet18(C), S).tolist() == expected
    assert expected[-1] == pytest.approx(556e6, rel=0.01)                 # the figure known for this network


@pytest.mark.parametrize("net, side", [(eero.ResNet18(5, 8), 16), (eero.ResNet18(5, 8, small=False), 64),
                                       (eero.ConvNeXt(5, 8, depths=(1, 1, 2, 1)), 32)])
def test_exit_costs_equal_pytorchs_counter(net, side):
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, 3, side, side))
    costs = eero.exit_costs(net, side)
    assert 2 * costs[-1] == counter.get_total_flops()
    assert (np.diff(costs) > 0).all() and len(costs) == 4


@pytest.mark.parametrize("make", [lambda: eero.ResNet18(8, 8), lambda: eero.ConvNeXt(8, 16, depths=(1, 1, 1, 1))])
def test_training_learns_and_repeats(make, capsys):
    x, y, _ = eero.make_shapes(256, seed=3)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        net = make()
        untrained = eero.evaluate(net, x, y)
        eero.train(net, x, y, epochs=3, batch=32, seed=1)
        results.append(eero.evaluate(net, x, y, batch=100))
    assert (results[0]["uncertainty"] == results[1]["uncertainty"]).all()
    with torch.no_grad():
        p = torch.stack(net(eero.normalized(x)), 1).softmax(-1)           # (n, M, C), all at once
    assert np.allclose(results[0]["uncertainty"], -(p * p.log()).sum(-1), atol=1e-4)
    assert (results[0]["wrong"] == (p.argmax(-1) != y[:, None]).numpy()).all()
    assert results[0]["uncertainty"].mean() < untrained["uncertainty"].mean() - 0.01 or \
        results[0]["wrong"].mean() < untrained["wrong"].mean() - 0.05
    with pytest.raises(ValueError, match="fewer than one batch"):
        eero.train(net, x, y, epochs=1, batch=1000)


def test_augment_is_a_shift_and_a_mirror():
    x = torch.arange(16 * 16 * 3).remainder(251).to(torch.uint8).view(1, 3, 16, 16).repeat(64, 1, 1, 1) + 1
    out = eero.augment(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    possible = [padded[:, r:r + 16, c:c + 16] for r in range(5) for c in range(5)]
    possible += [p.flip(2) for p in possible]
    found = [next(i for i, p in enumerate(possible) if torch.equal(p, image)) for image in out]
    assert out.is_contiguous()                                            # channels-last backward crashes on some CPUs
    assert len(set(found)) > 20


# ---------------------------------------------------------------- data


def test_shapes_are_seeded_and_harder_ones_are_harder():
    (x, y, d), (x2, y2, _), (x3, _, _) = (eero.make_shapes(400, seed=s) for s in (0, 0, 1))
    assert torch.equal(x, x2) and torch.equal(y, y2) and not torch.equal(x, x3)
    assert x.shape == (400, 3, 16, 16) and x.dtype == torch.uint8 and set(y.tolist()) == set(range(8))
    roughness = (x[..., 1:].float() - x[..., :-1].float()).abs().mean((1, 2, 3)).numpy()
    assert np.corrcoef(roughness, d)[0, 1] > 0.5                          # noise and clutter grow with difficulty


def write_cifar(folder, hundred=False):
    """Three records per file, each pixel byte a function of its place."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["train.bin", "test.bin"] if hundred else [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    records = {}
    for name in names:
        label = rng.integers(0, 100 if hundred else 10, 3)
        pixels = rng.integers(0, 256, (3, 3, 32, 32))
        records[name] = label, pixels
        rows = [([7] if hundred else []) + [label[i]] + pixels[i].ravel().tolist() for i in range(3)]
        (folder / name).write_bytes(bytes(int(b) for row in rows for b in row))
    return records


@pytest.mark.parametrize("hundred", [False, True])
def test_read_cifar(tmp_path, hundred):
    inner = tmp_path / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    records = write_cifar(inner, hundred)
    for folder in (tmp_path, inner):
        x, y, xt, yt, classes = eero.read_cifar(folder)
        last = records["test.bin" if hundred else "test_batch.bin"]
        assert classes == (100 if hundred else 10) and x.shape == (3 if hundred else 15, 3, 32, 32)
        assert (xt.numpy() == last[1]).all() and (yt.numpy() == last[0]).all()
        assert (y.numpy() == np.concatenate([r[0] for r in records.values()][:-1])).all()
    (inner / ("test.bin" if hundred else "test_batch.bin")).write_bytes(b"short")
    with pytest.raises(ValueError, match="no multiple of"):
        eero.read_cifar(tmp_path)
    with pytest.raises(ValueError, match="no CIFAR binaries"):
        eero.read_cifar(tmp_path / "nowhere")


def test_download_checks_the_hash_and_unpacks_inside_the_folder(tmp_path, monkeypatch):
    write_cifar(tmp_path / "source")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in (tmp_path / "source").iterdir():
            tar.add(path, f"../../evil/{path.name}")
    monkeypatch.setattr(eero.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(buffer.getvalue()))
    with pytest.raises(ValueError, match="the hash is"):
        eero.download_cifar("cifar-10", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setitem(eero.CIFAR, "cifar-10", ("cifar-10-batches-bin", hashlib.md5(buffer.getvalue()).hexdigest()))
    eero.download_cifar("cifar-10", tmp_path / "data")
    assert eero.read_cifar(tmp_path / "data")[0].shape == (15, 3, 32, 32)
    assert not (tmp_path.parent / "evil").exists() and not (tmp_path / "evil").exists()


def test_image_folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("b", (0, 200, 0)), ("a", (200, 0, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (60, 40), colour).save(tmp_path / name / "1.png")
    folder = eero.ImageFolder(tmp_path, 24)
    assert folder.classes == ["a", "b"] and folder.labels.tolist() == [0, 1]
    images = folder[torch.tensor([1, 0])]
    assert images.shape == (2, 3, 24, 24) and images.dtype == torch.uint8
    assert images[0, :, 5, 5].tolist() == [0, 200, 0] and images[1, :, 5, 5].tolist() == [200, 0, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no CLASS"):
        eero.ImageFolder(tmp_path / "empty", 24)


# ---------------------------------------------------------------- tokens and the command line


def test_token_costs_count_every_head_consulted():
    D, V, L = 128, 2048, 16
    head = V * D / (12 * D * D)                                           # a linear head, in blocks
    expected = [4 + head, 8 + 2 * head, 12 + 3 * head, 16 + 4 * head]
    assert eero.token_costs([4, 8, 12, L], [head] * 4) == pytest.approx(expected)


def test_passing_on_hopeless_samples_loses_to_chance():
    """The limit that the chapter names: where the least certain are wrong at every depth, random exits do better."""
    rng = np.random.default_rng(0)
    difficulty = rng.random((20000, 1))
    wrong = difficulty > np.array([0.4, 0.6])                             # beyond 0.6 no head is right
    pi, cost = [0.6, 0.4], [1.0, 2.0]
    fitted = EERO.from_distribution(difficulty + np.zeros((1, 2)), pi, cost, 1.4)
    ours = 1 - wrong[np.arange(20000), fitted.route(difficulty + np.zeros((1, 2)))].mean()
    chance = 1 - wrong[np.arange(20000), eero.random_exits(pi, 20000, seed=1)].mean()
    assert ours == pytest.approx(0.4, abs=0.02) and chance == pytest.approx(0.48, abs=0.02)


def test_evaluate_tokens_on_a_tiny_model():
    T, V = 6, 5
    generator = torch.Generator().manual_seed(0)
    table, offset = torch.randn(V, V, generator=generator), torch.randn(2, V, generator=generator)

    class Heads:
        layers = [1, 2]

        def logits(self, hidden):
            return [h + o for h, o in zip(hidden, offset)]

    ids = torch.randint(V, (3, T), generator=generator)
    model = lambda x, exits: (table[x], [table[x] * depth for depth in exits])
    got = eero.evaluate_tokens(model, Heads(), ids, batch=2)
    k = 0
    for row in ids:
        for t in range(T - 1):
            logits = torch.stack([table[row[t]] + offset[0], 2 * table[row[t]] + offset[1], table[row[t]]])   # (M, V)
            p = logits.softmax(-1)
            assert np.allclose(got["uncertainty"][k], -(p * p.log()).sum(-1), atol=1e-5)
            assert got["wrong"][k].tolist() == [bool(z.argmax() != logits[2].argmax()) for z in logits]
            assert got["wrong_next"][k].tolist() == [bool(z.argmax() != row[t + 1]) for z in logits]
            k += 1
    assert len(got["wrong"]) == k


def run(*args, cwd):
    return subprocess.run([sys.executable, str(ROOT / "eero.py"), *args], capture_output=True, text=True, cwd=cwd)


def test_command_line_on_a_small_data_set(tmp_path):
    """A CIFAR-like folder from end to end: one table row per budget, the figure, no other file."""
    records = {"test_batch.bin": 0}
    for i in range(1, 6):
        records[f"data_batch_{i}.bin"] = i
    (tmp_path / "data").mkdir()
    for name, seed in records.items():
        x, y, _ = eero.make_shapes(100, 32, seed)
        rows = np.concatenate([y.numpy().astype(np.uint8)[:, None], x.numpy().reshape(100, -1)], 1)
        rows.tofile(tmp_path / "data" / name)
    out = run("--data", "data", "--width", "2", "--epochs", "1", "--seeds", "2", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    lines = [line.split() for line in out.stdout.splitlines() if line.count("|") == 1 and line.strip()[0].isdigit()]
    assert len(lines) == 9 and lines[0][0] == lines[0][1] and lines[-1][0] == "100.00"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "eero.png"]
    assert (tmp_path / "eero.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("args, message", [
    (("--data", "nowhere"), "no CIFAR binaries"), (("--download", "cifar-10"), "needs --data"),
    (("--seeds", "0"), "at least 1"), (("--epochs", "0"), "at least 1"), (("--beta", "-1"), "at least 0"),
    (("--figure", "nowhere/eero.png"), "folder that exists"), (("--figure", "eero.exe"), ".png")])
def test_bad_input_is_refused_before_any_work(monkeypatch, args, message):
    monkeypatch.setattr(sys, "argv", ["eero.py", *args])
    monkeypatch.setattr(eero, "train", lambda *a, **k: pytest.fail("it began to train"))
    with pytest.raises(ValueError, match=message):
        eero.main()


def test_bad_input_is_one_line_and_status_2(tmp_path):
    out = run("--data", "nowhere", cwd=tmp_path)
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.count("\n") == 1 and out.stderr.startswith("error: nowhere has no CIFAR binaries")


def test_tokens_on_the_toy(tmp_path):
    if not (ROOT / "toy" / "heads.safetensors").exists():
        pytest.skip("toy/heads.safetensors is not there")
    out = run("--tokens", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    worst = next(line for line in out.stdout.splitlines() if line.startswith("  EERO "))
    assert abs(float(worst.split()[1])) < 1.0                             # % of the full cost, on held-out text
    assert "accuracy on the true next token" in out.stdout and (tmp_path / "eero.png").exists()
    lines = out.stdout.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(" budget  realised, uncorrected"))
    rows = [[float(cell.rstrip("%")) for cell in line.split()] for line in lines[begin + 1:begin + 4]]
    assert all(abs(corrected - budget) < 0.1 * budget for budget, _, corrected, _, _ in rows)
    gap = [sum(abs(row[c] - row[0]) for row in rows) for c in (1, 2)]
    assert gap[1] < gap[0]                                                # the correction helps
