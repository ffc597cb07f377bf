"""Chapter 3. Knowing when to stop: measures of uncertainty, how well they separate, and calibration.

An exit head proposes a token. Is it the one that the full model would choose? The labels are free, because
nothing but the model is asked ("correct" means: the head's argmax equals the full model's argmax), and the
answer at run time is one comparison (arXiv 2407.21082, confidence metrics and calibration):

    exit  <=>  uncertainty(logits) < threshold                              is_certain

1. The measure. For p = softmax(logits), p1 >= p2 the two largest, z1 >= z2 their logits:
       entropy  -sum p ln p  (nats)      one_minus_max  1 - p1      negative_margin     p2 - p1
       negative_logit_gap  z2 - z1       negative_max_logit  -z1    topk_entropy  entropy of the k largest
2. The separation. AUROC = P(a wrong token is more uncertain than a right one). Risk-coverage: of the i most
   certain of n tokens, coverage i/n, risk r(i) = the share that is wrong; AURC = mean of r(i) over i.
3. The threshold, for a level a. A(i) = 1 - r(i) is the agreement of the i most certain tokens:
       plain       the largest i with A(i) >= a (the paper's max-coverage); right on average, not always
       certified   P(agreement on new tokens < a) <= delta, by exact binomial tests from strict to loose
                   ("learn then test", Angelopoulos et al. 2021; our addition)
       conditional head l on the tokens that no shallower head has taken, as in decoding (our addition)

    python confidence.py                    # the toy in toy/: the tables below and confidence.png
    python confidence.py --figure ''        # the tables alone
Expect a table of measures by exits, a table of levels asked and agreement obtained on held-out text,
and a line that says whether entropy separates best, as the paper finds on Pythia.

Letters: B batch, T positions, V vocabulary, n tokens, M exits.
"""
import argparse
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch

# ---------------------------------------------------------------- measures: logits (..., V) -> (...), float32
# All are lower when more certain. A row with a logit of NaN or +inf is +inf: never certain. -inf is a token ruled out.


def never_certain_if_broken(uncertainty):
    return uncertainty.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)


def probabilities(logits):
    return logits.softmax(-1, dtype=torch.float32)                        # (..., V)


def entropy(logits):
    """Shannon entropy in nats, 0 .. ln V."""
    return never_certain_if_broken(torch.special.entr(probabilities(logits)).sum(-1))   # entr(p) = -p ln p, 0 at 0


def one_minus_max(logits):
    """1 - the largest probability, 0 .. 1."""
    return never_certain_if_broken(1 - probabilities(logits).amax(-1))


def negative_margin(logits):
    """Second largest minus largest probability ("breaking ties"), -1 .. 0; V >= 2."""
    top = probabilities(logits).topk(2).values                            # (..., 2)
    return never_certain_if_broken(top[..., 1] - top[..., 0])


def negative_logit_gap(logits):
    """Second largest minus largest logit: the log of p2 / p1, at most 0; V >= 2. Needs no softmax."""
    top = logits.topk(2).values.float()                                   # (..., 2)
    return never_certain_if_broken(top[..., 1].clamp(min=-1e38) - top[..., 0])


def negative_max_logit(logits):
    """Minus the largest logit. The one measure that a constant added to all logits changes."""
    return never_certain_if_broken(-logits.amax(-1).float())


def topk_entropy(logits, k=10):
    """Entropy in nats of the k largest probabilities scaled to sum 1, 0 .. ln k; no pass over V but the search."""
    return entropy(logits.topk(min(k, logits.shape[-1])).values)


MEASURES = {f.__name__: f for f in (entropy, one_minus_max, negative_margin, negative_logit_gap, negative_max_logit,
                                    topk_entropy)}


def is_certain(uncertainty, threshold):
    """The decision rule, at run time and in calibration: strictly below the threshold. None means never.

    uncertainty: number, array or tensor; the answer is of its kind, boolean. NaN and +inf are never certain.
    """
    return uncertainty < (-math.inf if threshold is None else threshold)


# ---------------------------------------------------------------- separation


def checked(uncertainty, correct):
    """Both as arrays (n,): float32, as the measures return, so that no threshold moves, and bool. NaN becomes +inf."""
    u, c = np.asarray(uncertainty, dtype=np.float32), np.asarray(correct)
    if u.ndim != 1 or u.shape != c.shape:
        raise ValueError(f"uncertainty and correct must be two vectors of one length, not {u.shape} and {c.shape}")
    if c.dtype != bool and not np.isin(c, (0, 1)).all():
        raise ValueError("correct must hold only true and false (or 1 and 0), one per token")
    return np.where(np.isnan(u), np.float32(np.inf), u), c.astype(bool)


def cumulate(uncertainty, correct):
    """Distinct uncertainties in ascending order; up to and with each: the tokens, and the right ones among them."""
    values, which, new = np.unique(uncertainty, return_inverse=True, return_counts=True)
    return values, new.cumsum(), np.bincount(which, correct, len(values)).cumsum()


@dataclass
class Separation:
    """How well an uncertainty tells wrong tokens from right ones; all between 0 and 1."""
    auroc: float           # P(wrong is more uncertain than right), ties count half (Mann-Whitney); NaN if all are alike
    auprc: float           # mean precision of "the most uncertain are wrong" over the errors; NaN without errors
    aurc: float            # area under the risk-coverage curve, lower is better
    excess_aurc: float     # aurc minus that of the ideal order, which puts every right token first
    coverage: np.ndarray   # (distinct values,) share of tokens at most this uncertain
    risk: np.ndarray       # (distinct values,) share of wrong ones among them


def separation(uncertainty, correct):
    """uncertainty (n,), correct (n,) -> Separation. Tied tokens enter the areas as if in random order (the mean over
    all orders of r(i)), and the curves as one step. Raises ValueError without tokens."""
    values, count, right = cumulate(*checked(uncertainty, correct))
    if not len(count):
        raise ValueError("separation needs at least one token")
    wrong, n = count - right, count[-1]
    new_right, new_wrong = np.diff(right, prepend=0), np.diff(wrong, prepend=0)
    errors = wrong[-1]
    rights_below = right - new_right / 2                                  # strictly, and half of the ties
    precision = (errors - wrong + new_wrong) / (n - count + np.diff(count, prepend=0))   # among the tokens >= value
    i = np.arange(1, n + 1)
    aurc = (np.interp(i, np.append(0, count), np.append(0, wrong)) / i).mean()
    ideal = (np.maximum(0, i - right[-1]) / i).mean()
    return Separation(
        auroc=float(new_wrong @ rights_below / (errors * right[-1])) if errors and right[-1] else math.nan,
        auprc=float(new_wrong @ precision / errors) if errors else math.nan,
        aurc=float(aurc), excess_aurc=float(aurc - ideal), coverage=count / n, risk=wrong / count)


# ---------------------------------------------------------------- calibration


def check_level(level, delta=0.5):
    if not (0 < level <= 1 and 0 < delta < 1):
        raise ValueError(f"level must be in (0, 1] and delta in (0, 1), not {level} and {delta}")


def calibrate(uncertainty, correct, level):
    """Plain calibration, max-coverage: the loosest threshold whose tokens agree at least at `level` (2407.21082).

    uncertainty (n,), correct (n,) -> float, or None where no number of tokens reaches the level. Tokens of one
    uncertainty stay together: the threshold is the float32 next above the last accepted value.

    The other rules in the authors' code are left out, after trials on simulated heads (500 and 20,000 tokens): the
    smallest i stops at the first tokens (coverage at most 1 %); the midpoint to the next value is the same threshold
    (coverage equal to 0.1 %, as many violations); Platt's sigmoid holds only where agreement is a sigmoid of u:
    elsewhere it gave up 2 to 8 points of coverage, and read as the last token's own probability, 24 or more.
    """
    check_level(level)
    values, count, right = cumulate(*checked(uncertainty, correct))
    good = np.flatnonzero((right / count >= level) & (values < np.inf))
    return float(np.nextafter(values[good[-1]], np.float32(np.inf))) if len(good) else None


def binomial_tail(successes, trials, p):
    """P(X >= successes) for X ~ Binomial(trials, p), 0 < p < 1: the exact sum, in logarithms against underflow.

    The Clopper-Pearson lower bound with confidence 1 - delta is the p at which this is delta; so the bound is at least
    `level` exactly when binomial_tail(successes, trials, level) <= delta.
    """
    n, x = int(trials), int(successes)
    i = np.arange(x, n)
    ratios = np.log((n - i) / (i + 1)) + math.log(p) - math.log1p(-p)     # ln of P(X = i + 1) / P(X = i)
    first = (math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)
             + x * math.log(p) + (n - x) * math.log1p(-p))                # ln P(X = successes)
    logs = first + np.append(0, np.cumsum(ratios))
    return min(1.0, math.exp(logs.max()) * float(np.exp(logs - logs.max()).sum()))


STEPS, STARTS, PLACING = 100, 5, 0.2   # thresholds tried, places where a sequence of tests starts, share for the grid


def calibrate_certified(uncertainty, correct, level, delta=0.05, groups=None, seed=0):
    """A threshold below which new tokens agree at least at `level`, with probability 1 - delta over the calibration.

    uncertainty (n,), correct (n,), groups (n,) or None -> float, or None where nothing could be certified.

    1. A random fifth of the tokens places up to STEPS thresholds at its quantiles, its labels unread. For the other
       four fifths these are constants: of the n tokens below a threshold, Binomial(n, true agreement) are right.
    2. The thresholds are tested from strict to loose, exactly (binomial_tail). A test with error alpha that is passed
       hands its alpha to the next one; one that fails loses it. delta is dealt out in equal shares at STARTS places,
       which is fixed-sequence testing with fallback (Wiens 2003). A single start at the strict end can die for
       good on a few unlucky tokens: in trials where the most certain tokens were not the best, it found nothing.
       The probability that any threshold below its level is accepted is at most delta.
    3. The loosest *accepted* threshold is returned. The first start expects twice the ln delta / ln level tokens
       that could pass with no error at all; where there are not that many, or the level is 1, the answer is None.

    This needs independent tokens drawn as the later ones are. Tokens of one document depend on each other: n of them
    say less than n, and violations become more frequent than delta. Remedy: `groups`, the document or block of each
    token; one token of each, drawn with the seed, is kept. The promise then is about a random token of a random group.
    One promise covers one head at one level; give M heads delta / M each to have all M at once.
    """
    check_level(level, delta)
    u, c = checked(uncertainty, correct)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(u))
    if groups is not None:
        if np.shape(groups) != u.shape:
            raise ValueError(f"groups must name the document or block of each of the {len(u)} tokens")
        order = rng.permutation(order[np.unique(np.asarray(groups)[order], return_index=True)[1]])
    placing, testing = np.split(order, [round(PLACING * len(order))])
    needed = 2 * math.log(delta) / math.log(level) if level < 1 else math.inf
    if needed > len(testing) or not len(placing):
        return None
    shares = np.geomspace(needed / len(testing), 1, STEPS)
    grid = np.sort(u[placing])[np.ceil(shares * (len(placing) - 1)).astype(int)]
    grid = np.unique(grid[grid < np.inf])
    deal = {len(grid) * s // STARTS for s in range(STARTS)}               # where a share of delta is dealt out
    values, count, right = cumulate(u[testing], c[testing])
    below = np.searchsorted(values, grid)                                 # distinct values with u < threshold
    accepted, alpha = None, 0
    for step, (threshold, j) in enumerate(zip(grid, below)):
        alpha += delta / len(deal) if step in deal else 0
        if alpha and j and binomial_tail(right[j - 1], count[j - 1], level) <= alpha:
            accepted = float(threshold)
        else:
            alpha = 0
    return accepted


def calibrate_conditional(uncertainties, correct, level):
    """Plain calibration of each head on the tokens that reach it: those that no shallower head is certain of.

    uncertainties (n, M) and correct (n, M), shallow to deep -> [float or None] * M. Heads calibrated on all tokens
    promise less in a cascade: the easy tokens, on which a deep head would agree, have left before.
    """
    u, correct = np.asarray(uncertainties, dtype=np.float32), np.asarray(correct)
    if u.ndim != 2 or u.shape != correct.shape:
        raise ValueError(f"uncertainties and correct must both be (n, M), not {u.shape} and {correct.shape}")
    waiting, thresholds = np.ones(len(u), dtype=bool), []
    for column, right in zip(u.T, correct.T):
        thresholds.append(calibrate(column[waiting], right[waiting], level))
        waiting &= ~is_certain(column, thresholds[-1])
    return thresholds


# ---------------------------------------------------------------- what this chapter shows on the toy

LEVELS = (0.80, 0.85, 0.90, 0.95, 0.98)


def obtained(uncertainty, correct, threshold):
    """(agreement among the tokens that exit, NaN if none; coverage) on the tokens given, both 0 .. 1."""
    leaves = is_certain(uncertainty, threshold)
    return float(correct[leaves].mean()) if leaves.any() else math.nan, float(leaves.mean())


def cascade(uncertainties, correct, thresholds):
    """obtained() of each head on the tokens that reach it, when all heads decide one after the other: [(a, c)] * M."""
    waiting, rows = np.ones(len(uncertainties), dtype=bool), []
    for u, right, threshold in zip(uncertainties.T, correct.T, thresholds):
        leaves = waiting & is_certain(u, threshold)
        rows.append((float(right[leaves].mean()) if leaves.any() else math.nan, float(leaves.mean())))
        waiting &= ~leaves
    return rows


@torch.no_grad()
def measure(model, heads, ids, batch=8):
    """ids (N, T) -> {measure: uncertainties (N T, M)} and correct (N T, M), in batches so that no (N, T, V) exists."""
    parts, right = {name: [] for name in MEASURES}, []
    for rows in ids.split(batch):
        full, hidden = model(rows, exits=heads.layers)
        logits = heads.logits(hidden)                                     # M x (B, T, V)
        right.append(torch.stack([z.argmax(-1) == full.argmax(-1) for z in logits], -1).flatten(0, 1))
        for name, f in MEASURES.items():
            parts[name].append(torch.stack([f(z) for z in logits], -1).flatten(0, 1))   # (B T, M)
    return {name: torch.cat(p).numpy() for name, p in parts.items()}, torch.cat(right).numpy()


def compare_measures(calibration, test, layers):
    """Print the table of measures by exits -> {measure: [Separation] * M}; both arguments as measure() returns them."""
    (u_cal, c_cal), (u_test, c_test) = calibration, test
    print(f"\nmeasures on {len(c_test):,} test tokens (AUROC: higher is better, AURC: lower; "
          "coverage: share of tokens that exit at level 0.95)")
    print(f"{'':20}" + "".join(f"  exit {n:<3} AUROC   AURC coverage" for n in layers))
    found = {}
    for name in MEASURES:
        found[name] = [separation(u_test[name][:, l], c_test[:, l]) for l in range(len(layers))]
        row = f"{name:20}"
        for l, s in enumerate(found[name]):
            threshold = calibrate(u_cal[name][:, l], c_cal[:, l], 0.95)
            coverage = obtained(u_test[name][:, l], c_test[:, l], threshold)[1]
            row += f"{s.auroc:16.3f} {s.aurc:6.3f} {coverage:8.1%}"
        print(row)
    wins = sum(min(found, key=lambda m: found[m][l].aurc) == "entropy" for l in range(len(layers)))
    mean = {name: float(np.mean([s.aurc for s in each])) for name, each in found.items()}
    best = min((name for name in mean if name != "entropy"), key=mean.get)
    verdict = "wins" if mean["entropy"] < mean[best] else "does not win"
    print(f"entropy has the lowest AURC at {wins} of {len(layers)} exits; on average {mean['entropy']:.4f}, against "
          f"{mean[best]:.4f} of the best other, {best}: entropy {verdict} here")
    return found


def compare_calibrations(u_cal, c_cal, u_test, c_test, layers, blocks, seed=0):
    """Print levels asked and agreement obtained on the test tokens, all arrays (n, M) of one measure, blocks (n,).

    -> {(method, level): [(agreement, coverage)] * M}, methods: plain, certified, blockwise (certified on one token of
    each block), in a cascade, conditional.
    """
    M, rows = len(layers), {}
    for level in LEVELS:
        plain = [calibrate(u_cal[:, l], c_cal[:, l], level) for l in range(M)]
        sets = {"plain": plain}
        for method, groups in (("certified", None), ("blockwise", blocks)):
            sets[method] = [calibrate_certified(u_cal[:, l], c_cal[:, l], level, groups=groups, seed=seed)
                            for l in range(M)]
        for method, thresholds in sets.items():
            rows[method, level] = [obtained(u_test[:, l], c_test[:, l], thresholds[l]) for l in range(M)]
        rows["in a cascade", level] = cascade(u_test, c_test, plain)
        rows["conditional", level] = cascade(u_test, c_test, calibrate_conditional(u_cal, c_cal, level))
    methods = list(dict.fromkeys(method for method, _ in rows))
    print("\nentropy: agreement obtained on test text (share of tokens that exit), delta = 0.05")
    print("exit level" + "".join(f"{m:>17}" for m in methods))
    for l, n in enumerate(layers):
        for level in LEVELS:
            cells = (rows[m, level][l] for m in methods)
            print(f"{n:4} {level:5.0%}" + "".join("            never" if math.isnan(a) else f"{a:9.1%} ({c:5.1%})"
                                                  for a, c in cells))
    print("plain, certified, blockwise (one token of 16 neighbours): each head alone, on all tokens\n"
          "in a cascade (the plain thresholds), conditional: each head on the tokens that reach it")
    return rows


def draw(path, u_test, c_test, found, rows, layers):
    """The chapter's figure: entropies of right and wrong tokens, risk-coverage curves, reliability."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    M = len(layers)
    figure = plt.figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2 * M)
    bins = np.linspace(0, u_test[np.isfinite(u_test)].max(), 50)
    for l, n in enumerate(layers):
        ax = figure.add_subplot(grid[0, 2 * l:2 * l + 2])
        for right, name in ((c_test[:, l], "right"), (~c_test[:, l], "wrong")):
            ax.hist(u_test[right, l], bins, alpha=0.6, label=f"{name} ({right.mean():.0%})")
        ax.set(title=f"exit after block {n}", xlabel="entropy (nats)", ylabel="tokens")
        ax.legend()
    ax, middle = figure.add_subplot(grid[1, :M]), M // 2
    for name, each in found.items():
        ax.plot(each[middle].coverage, each[middle].risk, label=f"{name}, AURC {each[middle].aurc:.3f}")
    ax.set(title=f"risk and coverage, exit after block {layers[middle]}", xlabel="coverage (share of tokens)",
           ylabel="risk (share that disagrees)", xlim=(0, 1))
    ax.legend()
    ax = figure.add_subplot(grid[1, M:])
    ax.plot(LEVELS, LEVELS, "k:", label="as asked")
    for method, marker in (("plain", "o-"), ("certified", "s--"), ("conditional", "^:")):
        for l, n in enumerate(layers):
            ax.plot(LEVELS, [rows[method, level][l][0] for level in LEVELS], marker, color=f"C{l}",
                    label=f"{method}, exit {n}")
    ax.set(title="reliability on test text", xlabel="level asked for", ylabel="agreement obtained")
    ax.legend(ncols=3, fontsize=7, loc="upper left")
    ax.set_ylim(top=ax.get_ylim()[1] + 0.4 * np.subtract(*ax.get_ylim()[::-1]))   # room for the legend
    part = f"{path}.part"
    figure.savefig(part, dpi=100, format="png")
    plt.close(figure)
    os.replace(part, path)
    print(f"figure: {path}")


def main():
    from heads import ExitHeads, toy_windows
    from model import TOY, InputError, Pythia
    parser = argparse.ArgumentParser(description="Measures of uncertainty and calibration of exit heads, on the toy.")
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens of each split (default %(default)s)")
    parser.add_argument("--heads", default=TOY / "heads.safetensors", help="a heads file for the toy")
    parser.add_argument("--figure", default="confidence.png", help="PNG to draw; '' for none (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the certified calibration's draw (default %(default)s)")
    args = parser.parse_args()
    if args.tokens < 256:
        raise InputError(f"--tokens {args.tokens}: at least one window of 256 tokens is needed")
    if not os.path.isdir(os.path.dirname(args.figure) or ".") or args.figure and not args.figure.endswith(".png"):
        raise InputError(f"--figure {args.figure}: must be a name that ends in .png, in a folder that exists")
    model = Pythia.from_pretrained(TOY).eval()
    heads = ExitHeads.load(args.heads, model)
    began = time.time()
    calibration, test = (measure(model, heads, toy_windows(split, args.tokens)) for split in ("calibration", "test"))
    (u_cal, c_cal), (u_test, c_test) = calibration, test
    print(f"{len(c_cal):,} calibration and {len(c_test):,} test tokens in {time.time() - began:.1f} s")
    found = compare_measures(calibration, test, heads.layers)
    blocks = np.arange(len(c_cal)) // 16                                  # 16 neighbouring tokens, one is kept
    u_cal, u_test = u_cal["entropy"], u_test["entropy"]
    rows = compare_calibrations(u_cal, c_cal, u_test, c_test, heads.layers, blocks, args.seed)
    if args.figure:
        draw(args.figure, u_test, c_test, found, rows, heads.layers)


if __name__ == "__main__":
    from model import command_line
    command_line(main)
