"""What EERO is compared with, and the table, for tokens (eero.py) and for images (images.py).

Every method is charged alike: for the blocks that it runs and for the outputs of the heads that it
consults. Four methods and two yardsticks stand beside EERO:

    EERO LP          beta = infinity, the linear programme
    incurred         EERO.fit_incurred, ours
    geometric        MSDNet's law for the shares; thresholds as EERO's
    one threshold    the same for all heads; each is consulted
    random           EERO's shares, drawn without a look at the samples, charged as EERO's are
    oracle           knows the labels of the test samples, and asks the one head that it needs

Patience (PABEE) knows no budget and is printed below the table. This room has no command of its
own: `python eero.py` and `python -m appendix.images` print the table.

Letters: n samples, M heads (the last is the full network's).
"""
from dataclasses import dataclass

import numpy as np
import torch

from eero import EERO, cost_of_exits, spend

# ---------------------------------------------------------------- the other methods


def geometric_distribution(cost, budget):
    """MSDNet's exit law, P(l) proportional to r^l; r = exp(-x) spends the budget: pi (M,)."""
    cost, l = np.asarray(cost, float), np.arange(len(cost))

    def weights(x):
        w = np.exp(-x * l - (-x * l).max())
        return w / w.sum()

    return spend(weights, cost, budget, low=-800.0)  # exp(-800) is 0: all at the last head


def shared_threshold(uncertainty, cost, budget, outputs=0.0):
    """One threshold for all heads, each consulted, that spends the budget on (n, M): an EERO."""
    cost, last = cost_of_exits(cost, outputs), len(cost) - 1
    u = np.asarray(uncertainty, float)[:, :last]
    if budget < cost[0]:
        raise ValueError(f"a budget of {budget:g} is below the first head ({cost[0]:g}); raise it")
    low, high = u.min() - 1, u.max() + 1                       # all to the last head, to the first
    for _ in range(60):
        middle = (low + high) / 2
        eero = EERO(None, [float(middle)] * last, cost.tolist(), float(budget))
        if cost[eero.route(u)].mean() <= budget:
            high = middle
        else:
            low = middle
    eero.thresholds = [float(high)] * last
    eero.pi = (np.bincount(eero.route(u), minlength=last + 1) / len(u)).tolist()
    return eero


def patience(predictions, agree):
    """PABEE: leave after `agree` + 1 equal predictions in a row; predictions (n, M), head (n,)."""
    n, M = predictions.shape
    head, run = np.full(n, M - 1), np.zeros(n, int)
    for l in range(1, M):
        run = np.where(predictions[:, l] == predictions[:, l - 1], run + 1, 0)
        head = np.where((run >= agree) & (head == M - 1), l, head)
    return head


def random_exits(pi, n, seed=0):
    """Heads (n,) drawn from pi without a look at the samples: what the shares alone are worth."""
    return np.random.default_rng(seed).choice(len(pi), size=n, p=pi)


def oracle(wrong, cost, budget):
    """The best heads (n,) for somebody who knows wrong (n, M) and spends the budget in total."""
    wrong, cost = np.asarray(wrong, bool), np.asarray(cost, float)
    first = np.where(wrong.all(1), 0, (~wrong).argmax(1))      # the cheapest right head, else 0
    order = np.argsort(cost[first], kind="stable")             # one right answer each: cheap first
    spent = np.cumsum(cost[first][order] - cost[0])
    affordable = order[spent <= (budget - cost[0]) * len(first) * (1 + 1e-12)]
    head = np.zeros(len(first), int)
    head[affordable] = first[affordable]
    return head


# ---------------------------------------------------------------- the table

METHODS = ("EERO", "EERO LP", "incurred", "geometric", "one threshold", "random", "oracle")


@dataclass
class Outcome:
    """What one method did on the test samples at one budget."""
    head: np.ndarray                     # (n,) where each sample left
    realised: float                      # mean cost
    target: float                        # mean cost that its shares ask for
    beta: float = None                   # None where the method has none

    @classmethod
    def of(cls, head, charged, pi, beta=None):
        """charged (M,): what leaving at each head costs."""
        charged = np.asarray(charged)
        return cls(head, float(charged[head].mean()), float(charged @ pi), beta)


def compare(calibration, test, cost, budgets, outputs=0.0, beta=None, seed=0):
    """Every method at every budget, fitted on the calibration samples alone: [{method: Outcome}].

    calibration, test: dicts of uncertainty (n, M) or (n, M - 1) and wrong (n, M). cost, outputs
    (M,): as in EERO.fit. Two more show equation 2: "beta 10", where all heads are consulted
    whatever they are worth, and "unconditional", the same with quantiles over all samples.
    """
    u, wrong, rows = calibration["uncertainty"], calibration["wrong"], []
    options, everywhere = {"outputs": outputs, "seed": seed}, cost_of_exits(cost, outputs)
    for budget in budgets:
        law = geometric_distribution(everywhere, budget)
        fits = {
            "EERO": EERO.fit(u, wrong, cost, budget, beta, **options),
            "EERO LP": EERO.fit(u, wrong, cost, budget, np.inf, **options),
            "incurred": EERO.fit_incurred(u, wrong, cost, budget, **options),
            "geometric": EERO.from_distribution(u, law, cost, budget, **options),
            "one threshold": shared_threshold(u, cost, budget, outputs),
            "beta 10": EERO.fit(u, wrong, everywhere, budget, 10, seed=seed),
            "unconditional": EERO.fit(u, wrong, everywhere, budget, 10, 0.0, seed, False)}
        row = {}
        for name, eero in fits.items():
            row[name] = Outcome.of(eero.route(test["uncertainty"]), eero.cost, eero.pi, eero.beta)
        blind = random_exits(fits["EERO"].pi, len(test["wrong"]), seed)
        row["random"] = Outcome.of(blind, fits["EERO"].cost, fits["EERO"].pi)
        alone = np.asarray(cost, float) + outputs
        best = oracle(test["wrong"], alone, budget)
        row["oracle"] = Outcome.of(best, alone, np.bincount(best, minlength=len(cost)) / len(best))
        rows.append(row)
    return rows


def accuracy(head, wrong):
    """The share of samples that are right at their head. head (n,), wrong (n, M)."""
    return 1 - wrong[np.arange(len(wrong)), head].mean()


def score(runs, error):
    """{method: (2, budgets)}: accuracy and realised cost, mean over runs."""
    scores = {}
    for method in runs[0][0][0]:
        pairs = []
        for rows, test in runs:
            pairs.append([(accuracy(row[method].head, test[error]), row[method].realised)
                          for row in rows])                    # (budgets, 2)
        scores[method] = np.mean(pairs, 0).T
    return scores


def report(runs, error, cost, budgets, outputs, unit, title):
    """Print accuracy by method and budget, mean over runs, and return what score() gives.

    runs: (what compare() gave, test samples) per seed. error: "wrong", or another key of `test`.
    """
    scores, tests = score(runs, error), [test for _, test in runs]
    print(f"\n{title}, %; costs in {unit}; {len(tests[0][error]):,} test samples, "
          f"{len(runs)} seed(s)")
    print(" budget  target realised   beta |" + "".join(f"{name:>14}" for name in METHODS))
    for i, budget in enumerate(budgets):
        chosen = [rows[i]["EERO"] for rows, _ in runs]
        target = np.mean([outcome.target for outcome in chosen])
        betas = np.median([outcome.beta for outcome in chosen])
        print(f"{budget:7.2f} {target:7.2f}  {scores['EERO'][1][i]:7.2f} {betas:6.4g} |"
              + "".join(f"{scores[name][0][i]:14.2%}" for name in METHODS).replace("%", ""))
    everywhere = cost_of_exits(cost, outputs)
    for agree in range(1, len(cost)):
        heads = [patience(test["predictions"], agree) for test in tests]
        right = np.mean([accuracy(head, test[error]) for head, test in zip(heads, tests)])
        print(f"patience {agree}: {right:.2%} at {np.mean([everywhere[h] for h in heads]):.2f}")
    alone = 1 - np.mean([test[error].mean(0) for test in tests], 0)
    lost = np.mean([(test[error][:, -1] & ~test[error].all(1)).mean() for test in tests])
    best = scores["EERO"][0].argmax()
    print("each head alone: " + ", ".join(f"{a:.2%}" for a in alone))
    print(f"best of EERO: {scores['EERO'][0][best]:.2%} at {scores['EERO'][1][best]:.2f}; "
          f"the final head is wrong where an earlier one is right: {lost:.2%}")
    return scores


MISSES = ("EERO", "incurred", "geometric", "one threshold", "beta 10", "unconditional")


def misses(runs, method, full):
    """Realised minus target cost of a method in % of the full cost, (runs, budgets)."""
    return np.array([[100 * (row[method].realised - row[method].target) / full for row in rows]
                     for rows, _ in runs])


def report_misses(runs, full):
    """Print how far the realised cost is from the one asked for: this is why equation 2 exists."""
    print("\nrealised - target cost, in % of the full cost: worst budget and seed")
    for method in MISSES:
        gaps = misses(runs, method, full).ravel()
        print(f"  {method:14} {gaps[np.abs(gaps).argmax()]:+.2f}")
    print("beta 10: all heads consulted; unconditional: the same, by quantiles over all samples")


# ---------------------------------------------------------------- text under a budget


def write_under_budget(model, heads, cost, outputs, beta, seed, text, prompts=24):
    """Text written by early exit with EERO's thresholds: the budget beside the cost of the text.

    EERO is fitted on the full model's own greedy texts, since a decoder meets its own text and not
    a corpus. Text written with exits is yet another, and leaves later. So the budget given to EERO
    is corrected three times by the gap found on calibration prompts, never on the test prompts.
    """
    from appendix.fast import fast
    from confidence import MEASURES
    from dssd import EarlyExit, Plain, generate
    from eero import token_samples
    from heads import evaluate, held_out_prompts, self_text
    prefix, new = text.fit(32, 64)
    starts = torch.tensor(held_out_prompts(64, prefix, "calibration", text))
    length = min(prefix + 129, text.context + 1)
    texts = self_text(model, starts, length, (0.0,), seed)[:, prefix - 1:]
    found = evaluate(model, heads, texts, {heads.measure: MEASURES[heads.measure]})
    sample = token_samples(found, heads.measure)
    practice = held_out_prompts(prompts, prefix, "calibration", text)
    tests = held_out_prompts(prompts, prefix, "test", text)
    decoder, twins = fast(model, heads)
    plain = [generate(decoder, ids, new, Plain()).tokens for ids in tests]

    def write(budget, prompts):
        """Texts, the depths of their tokens, and the mean cost, under the budget given to EERO."""
        eero = EERO.fit(sample["uncertainty"], sample["wrong"], cost, budget, beta, outputs, seed)
        policy = EarlyExit(twins, eero.thresholds, fill="copy")
        written = [generate(decoder, ids, new, policy) for ids in prompts]
        # the prompt gives the first token
        depths = np.concatenate([w.depths[1:] for w in written])
        return written, depths, np.array(eero.cost)[np.searchsorted(heads.layers, depths)].mean()

    print(f"\nwriting under a budget: fitted on {len(sample['wrong']):,} tokens of the full model, "
          f"{prompts} test prompts x {new} tokens\nthe last column adds the copied keys and values")
    print(" budget  uncorrected  corrected  same token as the full model's text  with copies")
    low, high = cost[0] + outputs[0], cost[-1] + outputs[-1]
    for budget in np.linspace(low, high, 5)[1:4]:
        asked = budget
        for _ in range(3):
            asked = np.clip(asked + budget - write(asked, practice)[2], low, high)
        written, depths, realised = write(asked, tests)
        same = np.mean([np.equal(w.tokens[1:], p[1:]).mean() for w, p in zip(written, plain)])
        copies = (model.config.num_hidden_layers - depths).mean() / 6
        print(f"{budget:7.2f} {write(budget, tests)[2]:12.2f} {realised:10.2f} {same:36.1%} "
              f"{realised + copies:12.2f}")
