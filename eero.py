"""Chapter 4. EERO: a budget that is met (arXiv 2402.03779, UAI 2025).

A network with M heads answers at the first head that dares to. Head l has a risk R_l, its error
rate, and a cost B_l, all that is computed up to and with it. The user gives a budget B, the mean
cost of a sample. Two questions follow.

1.  Which share of the samples should leave at each head? Exponential weights under the budget:

        pi = argmin  sum_l pi_l R_l + KL(pi || prior) / beta     subject to  sum_l pi_l B_l <= B
        pi_l  proportional to  prior_l exp(-beta (R_l + lambda B_l)),  the smallest lambda >= 0

    beta -> 0 is the prior, tilted to the budget. beta -> inf is the linear programme: two heads
    are enough for an optimum, but where risks tie the limit may use more.

2.  Which samples? Head l keeps the share eps_l = pi_l / (1 - sum_{j<l} pi_j) of those that *reach*
    it, the most certain ones. A quantile of the calibration samples that reach it is the
    threshold. No labels are needed. Quantiles over all samples would miss the budget, since the
    scores of the heads are correlated.

The paper's abstract and summaries were at hand, not its text. Both equations and their numbers
are our reconstruction. Ours too: beta is chosen on held-out samples; and what is charged is the
network up to l and the outputs of the heads consulted. A head that nobody leaves at has the
threshold None, is never consulted and costs nothing. B_l depends on pi, then.

The second act: what equation 1 does not know. R_l is the mean risk of all samples, but those that
leave at l are the ones it is most certain of. `EERO.fit_incurred` (ours) takes J(pi), the risk of
the whole cascade on the calibration samples, in the place of sum_l pi_l R_l. Each step down is
equation 1 again, with the slope of J towards head l as R_l and the last pi as the prior. The
quantiles stay, and so the budget is met. The price: every sample needs its label, and J is not
convex. Tempting and wrong: the mean risk of those that left at l as R_l. What counts is the risk
of the *next* sample that would leave there. It is less certain than all that did.

    python eero.py                      the toy's exits: agreement with the full model by budget
    python eero.py --measure margin     another uncertainty; --beta 10: no choice of beta
    python -m appendix.images           the same table for image classifiers

appendix/budgets.py has the methods that EERO is compared with, and the table.

Letters: n samples, M heads (chapter 2's exits and, last, the full network), l a head. Uncertainty:
lower is surer. The last head needs none, so (n, M - 1) will do.
"""
import argparse
import sys
from dataclasses import dataclass

import numpy as np

# ---------------------------------------------------------------- equation 1: how many leave where

LARGEST_BETA = 1e12                      # stands for infinity
BETAS = (0, 2, 5, 10, 20, 50, 100, np.inf)


def spend(weights, B, budget, low=0.0):
    """weights(x), (M,), at the smallest x >= low whose mean cost is within the budget.

    The mean cost must fall as x grows. Bisection ends at two neighbouring x. The mixture of their
    weights meets the budget exactly, also where one step of x moves everything.
    """
    dearer, room = B - B.min(), budget - B.min()               # both beside the cheapest head
    if room < 0:
        raise ValueError(f"a budget of {budget:g} is below the cheapest head ({B.min():g})")
    if weights(low) @ dearer <= room:
        return weights(low)                                    # the budget does not bind
    high = low + 1 / dearer.max()
    while weights(high) @ dearer > room:
        high = low + 2 * (high - low)
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if weights(middle) @ dearer <= room:
            high = middle
        else:
            low = middle
    over, under = weights(low) @ dearer, weights(high) @ dearer
    share = (room - under) / (over - under) if over > under else 0.0
    return share * weights(low) + (1 - share) * weights(high)


def exit_distribution(risk, cost, budget, beta, prior=None):
    """Equation 1: the share pi (M,) of the samples that should leave at each head.

    risk (M,) error rates, cost (M,) and budget in one unit, beta >= 0 (inf allowed), prior (M,)
    uniform unless given, 0 excludes a head. ValueError for a budget below the cheapest head.
    """
    R, B = np.asarray(risk, float), np.asarray(cost, float)
    prior = np.ones(len(R)) if prior is None else np.asarray(prior, float)
    if not R.shape == B.shape == prior.shape or R.ndim != 1:
        raise ValueError("risk, cost and prior must be vectors of one length; "
                         f"got {R.shape}, {B.shape}, {prior.shape}")
    if not np.isfinite([*R, *B, budget]).all() or not beta >= 0:
        raise ValueError("risk, cost and budget must be finite, beta >= 0")
    if not (prior >= 0).all() or not prior.any():
        raise ValueError("the prior must not be negative, and not all zero")
    beta, used, pi = min(beta, LARGEST_BETA), prior > 0, np.zeros(len(R))
    R, B = R[used] - R[used].min(), B[used]
    free, dearer = np.log(prior[used]) - beta * R, B - B.min()

    def weights(tilt):                   # tilt = beta lambda, so that beta = 0 can be tilted too
        exponent = free - tilt * dearer
        w = np.exp(exponent - exponent.max())
        return w / w.sum()

    pi[used] = spend(weights, B, budget)
    return pi


def kl(pi, prior):
    """KL(pi || prior) in nats. The prior need not sum to 1."""
    used = pi > 0
    return float(np.sum(pi[used] * np.log(pi[used] / prior[used] * prior.sum())))


def cost_of_exits(cost, outputs=0.0, consulted=True):
    """B_l (M,): cost (M,) of running the network to each head, and the outputs consulted so far."""
    return np.asarray(cost, float) + np.cumsum(np.where(consulted, outputs, np.zeros(len(cost))))


def worth_consulting(solve, cost, outputs, budget):
    """The pi (M,) of the heads worth their outputs. solve(B, consulted) -> (objective, pi).

    All heads at first. Then the head goes whose going lowers the objective most, until none does.
    A head that costs less than a thousandth of the network is kept without a search.
    """
    M = len(cost)
    dear = np.broadcast_to(outputs, M)[:-1] > 1e-3 * cost[-1]
    lowest, pi = solve(cost_of_exits(cost, outputs), np.ones(M, bool))
    consulted, before = np.ones(M, bool), None
    while consulted is not before:
        before = consulted
        for l in np.flatnonzero(before[:-1] & dear):
            fewer = before & (np.arange(M) != l)
            B = cost_of_exits(cost, outputs, fewer)
            if B[fewer].min() <= budget:
                objective, shares = solve(B, fewer)
                if objective < lowest - 1e-9:
                    lowest, pi, consulted = objective, shares, fewer
    return pi


# ---------------------------------------------------------------- equation 2: who leaves there

EVERYBODY = sys.float_info.max           # a threshold that no finite uncertainty reaches


def ranked(uncertainty, cost, seed):
    """u (n, M - 1) with noise against ties, the order of its columns, the width of the noise.

    The order has the most certain first. ValueError unless uncertainty, (n, M) or (n, M - 1), and
    cost (M,) fit together.
    """
    u, M = np.asarray(uncertainty, float), len(cost)
    if u.ndim != 2 or u.shape[1] not in (M - 1, M) or not len(u) or not np.isfinite(u).all():
        raise ValueError(f"uncertainty must be finite, of shape (n, {M}), n > 0; got {u.shape}")
    if (np.diff(cost) < 0).any():
        raise ValueError(f"cost must be cumulative, cheapest head first; got {list(cost)}")
    u, noise = u[:, :M - 1], 1e-9 * max(1.0, float(np.abs(u).max()))   # far below what matters
    u = u + noise * np.random.default_rng(seed).random(u.shape)
    return u, u.T.argsort(1).T, noise


def cascade(u, order, pi, conditional=True):
    """Equation 2 on the calibration samples: the head (n,) where each leaves, M - 1 thresholds.

    u, order (n, M - 1): of ranked(). A threshold is None where nobody leaves. conditional=False
    takes every quantile over all samples, to show how the budget is missed.
    """
    n, last = u.shape
    waiting, head, thresholds = np.ones(n, bool), np.full(n, last), []
    for l in range(last):
        # the samples that reach head l, the most certain first
        queue = order[:, l]
        if conditional:
            queue = queue[waiting[queue]]
        # the share eps of them leaves
        left = 1 - pi[:l].sum()
        eps = pi[l] / left if left > 1e-12 else 1.0
        k = min(len(queue), round(eps * len(queue)))
        leaving = queue[:k]
        head[leaving[waiting[leaving]]] = l
        waiting[leaving] = False
        # the threshold lies between the last that leaves and the first that stays
        if k == 0:
            thresholds.append(None)
        elif k == len(queue):
            thresholds.append(EVERYBODY)
        else:
            thresholds.append(float(u[queue[k - 1:k + 1], l].mean()))
    return head, thresholds


def paired(wrong, uncertainty):
    """wrong as bool (n, M). ValueError unless it has the label of every sample."""
    if len(wrong) != len(uncertainty):
        raise ValueError(f"{len(wrong)} labelled samples of {len(uncertainty)}: to choose beta, "
                         "and for the incurred risk, every sample needs its label")
    return np.asarray(wrong, bool)


@dataclass
class EERO:
    """Fitted exits: head l answers where its uncertainty is below thresholds[l], else the last."""
    pi: list                             # (M,) share of the samples that leaves at each head
    thresholds: list                     # (M - 1,) None: the head is never consulted
    cost: list                           # (M,) what a sample that leaves at each head is charged
    budget: float                        # mean cost per sample
    beta: float = None                   # None when pi was given
    noise: float = 0.0                   # width of the tie-breaking noise

    @classmethod
    def fit(cls, uncertainty, wrong, cost, budget, beta=None, outputs=0.0, seed=0,
            conditional=True):
        """The paper's method. uncertainty (n, M) or (n, M - 1); wrong (labelled samples, M).

        cost (M,): of running the network to each head; outputs (M,): of each head itself, nothing
        unless given. beta=None: choose it; `wrong` must then be of the same n samples.
        """
        if beta is None:
            beta, pi = choose_beta(uncertainty, wrong, cost, budget, outputs, seed)
        else:
            R, prior, T = np.mean(wrong, 0), np.ones(len(cost)), 1 / np.clip(beta, 1e-12, 1e12)

            def solve(B, consulted):
                pi = exit_distribution(R, B, budget, beta, prior * consulted)
                return pi @ R + T * kl(pi, prior), pi

            pi = worth_consulting(solve, cost, outputs, budget)
        return cls.from_distribution(uncertainty, pi, cost, budget, outputs, seed, conditional,
                                     beta)

    @classmethod
    def fit_incurred(cls, uncertainty, wrong, cost, budget, beta=np.inf, outputs=0.0, seed=0):
        """The second act: minimise J(pi) + KL(pi || prior) / beta. wrong: of the same n samples."""
        u, order, _ = ranked(uncertainty, cost, seed)
        wrong, everybody = paired(wrong, u), np.arange(len(u))

        def J(pi):
            return wrong[everybody, cascade(u, order, pi)[0]].mean()

        def solve(B, consulted):
            value, pi = descend(J, B, budget, beta, consulted.astype(float))[-1]
            return value - np.log(consulted.mean()) / beta, pi    # KL to all heads, as in fit

        pi = worth_consulting(solve, cost, outputs, budget)
        return cls.from_distribution(uncertainty, pi, cost, budget, outputs, seed, beta=beta)

    @classmethod
    def from_distribution(cls, uncertainty, pi, cost, budget, outputs=0.0, seed=0,
                          conditional=True, beta=None):
        """Thresholds that realise the shares pi (M,) on the samples, and what they cost."""
        pi = np.asarray(pi, float)
        if len(pi) != len(cost):
            raise ValueError(f"cost must be cumulative, for {len(pi)} heads; got {list(cost)}")
        u, order, noise = ranked(uncertainty, cost, seed)
        _, thresholds = cascade(u, order, pi, conditional)
        consulted = [t is not None for t in thresholds] + [True]
        charged = cost_of_exits(cost, outputs, consulted)
        return cls(pi.tolist(), thresholds, charged.tolist(), float(budget), beta, noise)

    def route(self, uncertainty, seed=1):
        """uncertainty (n, M) or (n, M - 1) -> the head that answers each sample (n,)."""
        u, rng = np.asarray(uncertainty, float), np.random.default_rng(seed)
        last = len(self.thresholds)
        head = np.full(len(u), last)
        for l, threshold in enumerate(self.thresholds):
            if threshold is not None:
                certain = u[:, l] + self.noise * rng.random(len(u)) < threshold
                head[certain & (head == last)] = l
        return head


def choose_beta(uncertainty, wrong, cost, budget, outputs=0.0, seed=0):
    """The beta of BETAS that errs least, and its pi: fitted on one half, judged on the other."""
    u, wrong = np.asarray(uncertainty, float), paired(wrong, uncertainty)
    here, there = np.array_split(np.random.default_rng(seed).permutation(len(u)), 2)
    fits = [EERO.fit(u[here], wrong[here], cost, budget, b, outputs, seed) for b in BETAS]
    risks = [wrong[there, eero.route(u[there])].mean() for eero in fits]
    best = fits[int(np.argmin(risks))]
    return best.beta, best.pi


# ---------------------------------------------------------------- the second act: the incurred risk


def descend(J, B, budget, beta, prior, steps=40, h=0.04):
    """Mirror descent on J(pi) + KL(pi || prior) / beta under the budget. Every step is equation 1.

    J: function of pi (M,); beta > 0; prior (M,), 0 excludes a head -> [(objective, pi)], each
    objective below the one before it.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, not {beta}")
    pi = exit_distribution(np.zeros(len(B)), B, budget, 0, prior)
    kept = [(J(pi) + kl(pi, prior) / beta, pi)]
    for t in range(steps):
        # how fast J grows when a share h of all samples is sent to head l
        slope, here = np.zeros(len(B)), J(pi)
        for l in np.flatnonzero(prior):
            slope[l] = (J((1 - h) * pi + h * np.eye(len(B))[l]) - here) / h
        # the least of slope . pi + KL(pi || prior) / beta + KL(pi || last pi) / step
        step = 12 / np.sqrt(1 + t)
        rate = 1 / (1 / step + 1 / beta)
        # (prior > 0): with beta = inf an excluded head would have 0 ** 0 = 1
        mixed = np.maximum(pi, 1e-12) ** (rate / step) * prior ** (rate / beta) * (prior > 0)
        pi = exit_distribution(slope, B, budget, rate, mixed)
        objective = J(pi) + kl(pi, prior) / beta
        if objective < kept[-1][0]:
            kept.append((objective, pi))
    return kept


# ---------------------------------------------------------------- the chapter's demonstration


def token_samples(evaluation, measure):
    """What the table needs of a heads.Evaluation: a dict of arrays (N, M), uncertainty (N, M - 1).

    wrong: it is not the full model's choice. wrong_next: it is not the true next token.
    """
    full = np.zeros((len(evaluation.agree), 1), bool)          # the full model agrees with itself
    return {"uncertainty": evaluation.uncertainty[measure], "predictions": evaluation.choice,
            "wrong": np.concatenate([~evaluation.agree, full], 1),
            "wrong_next": ~evaluation.right}


def options(model_options, measures, seed_number):
    parser = argparse.ArgumentParser(description="Budgets on the exits of a model.")
    model_options(parser)
    option = parser.add_argument
    option("--measure", choices=measures, help="the uncertainty (default: that of the heads)")
    option("--beta", type=float, help="of EERO, per unit of error rate (default: chosen)")
    option("--tokens", type=int, default=30_000, help="of each split (default %(default)s)")
    option("--prompts", type=int, default=24, help="texts to write, 0: none (default %(default)s)")
    option("--seed", type=seed_number, default=0, help="of noise and halves (default %(default)s)")
    option("--consult-all", action="store_true",
           help="charge all heads up to the exit, as if they were needed anyway")
    option("--figure", metavar="PATH", help="also draw accuracy and realised cost by budget")
    args = parser.parse_args()
    if args.tokens < 257 or args.prompts < 0 or (args.beta is not None and not args.beta >= 0):
        raise ValueError("--tokens must be at least 257, --prompts and --beta at least 0")
    return args


def main():
    from appendix.budgets import compare, report, report_misses, write_under_budget
    from confidence import MEASURES
    from heads import evaluate, load_model, measuring_windows, model_options
    from model import seed_number
    args = options(model_options, MEASURES, seed_number)
    if args.figure:
        from appendix import figures
        figures.check(args.figure)
    model, heads, _, text = load_model(args)
    heads.measure = args.measure or heads.measure
    # 1. what every head says, on calibration and on test text
    samples = []
    for split in ("calibration", "test"):
        windows = measuring_windows(split, args.tokens, 257, text)     # (n, 257), last: a target
        found = evaluate(model, heads, windows, {heads.measure: MEASURES[heads.measure]})
        samples.append(token_samples(found, heads.measure))
    # 2. costs in block-equivalents; budgets from the first exit to the model without exits
    cost = np.array([*heads.layers, model.config.num_hidden_layers], float)
    outputs = np.array([*(head.cost() for head in heads.heads), model.config.unembed_cost])
    full, unit, charged = model.config.full_cost, "block-equivalents", cost_of_exits(cost, outputs)
    print(f"exits at layers {heads.layers}, by {heads.measure}; in {unit}: {charged.round(2)} "
          f"with all heads consulted, {full:.2f} for the model without exits")
    if args.consult_all:
        cost, outputs, full = charged, np.zeros(len(cost)), charged[-1]
    budgets = np.linspace(charged[0], full, 7)
    # 3. the table; budgets met or missed; text
    runs = [(compare(*samples, cost, budgets, outputs, args.beta, args.seed), samples[1])]
    title = "agreement with the full model"
    scores = report(runs, "wrong", cost, budgets, outputs, unit, title)
    report(runs, "wrong_next", cost, budgets, outputs, unit, "accuracy on the true next token")
    report_misses(runs, full)
    if args.figure:
        figures.budget(args.figure, runs, scores, budgets, full, unit, title)
        print(f"figure: {args.figure}")
    if args.prompts and not args.consult_all:
        write_under_budget(model, heads, cost, outputs, args.beta, args.seed, text, args.prompts)


if __name__ == "__main__":
    from model import command_line
    command_line(main)
