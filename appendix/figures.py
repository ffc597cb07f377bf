"""Every figure of the project, in one style.

A chapter computes, and a function here draws. A depth has one colour in all figures, from dark
violet (shallow) to gold (the full model), chosen so that colour-blind readers can tell them apart.
Files are written to a temporary name and renamed, so that a killed run leaves an old figure whole.
"""
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt   # noqa: E402

from model import InputError, written_whole   # noqa: E402

DEPTHS = ("#440154", "#31688e", "#35b779", "#b8860b")   # shallow to full
GREY = "#777777"


def depth_colour(depth, L):
    """The colour of a depth: a hexadecimal code."""
    share = depth / L
    for colour, largest in zip(DEPTHS, (0.13, 0.3, 0.99)):
        if share <= largest:
            return colour
    return DEPTHS[3]


def check(path):
    """Fail before the work, not after it: InputError unless a figure can be written to `path`."""
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {path}: its name must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise InputError(f"--figure {path}: there is no folder {path.parent}; make it first")


@contextmanager
def canvas(path, rows=1, columns=1, size=(6, 4)):
    """Gives a figure and its axes (one, or an array) to draw on, then writes it to `path`."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    try:
        yield figure, axes
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:])
    finally:
        plt.close(figure)


def token_label(tokenizer, token, space=" "):
    """A token as one short printable word, safe for matplotlib; `space` stands for its blanks."""
    text = tokenizer.decode([token]).encode("unicode_escape").decode()
    return text.replace("$", r"\$").replace(" ", space)


def lens(path, model, tokenizer, text):
    """The logit lens: the model's own norm and unembedding at every depth of one line of text."""
    L = model.config.num_hidden_layers
    ids = torch.tensor([tokenizer.encode(text)])                          # (1, T)
    with torch.inference_mode():
        states = model.hidden_states(ids, range(L + 1))                   # (L + 1) x (1, T, D)
        logits = torch.cat([model.unembed(h) for h in states])            # (L + 1, T, V)
    value, guess = logits.softmax(-1).max(-1)                             # (L + 1, T) each
    T = ids.shape[1]
    with canvas(path, size=(0.62 * T + 1.5, 0.3 * L + 1.5)) as (figure, axes):
        image = axes.imshow(value, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for depth in range(L + 1):
            for t in range(T):
                # dark squares need white letters; bold: the full model's choice
                colour = "white" if value[depth, t] < 0.6 else "black"
                weight = "bold" if guess[depth, t] == guess[L, t] else "normal"
                label = token_label(tokenizer, guess[depth, t].item(), "\u00b7")[:8]
                axes.text(t, depth, label, ha="center", va="center", color=colour,
                          fontsize=6, fontweight=weight, family="monospace")
        labels = [token_label(tokenizer, i, "\u00b7") for i in ids[0].tolist()]
        axes.set_xticks(range(T), labels, fontsize=7, family="monospace", rotation=45)
        axes.set(xlabel="input token", ylabel="depth (blocks executed)",
                 title="top prediction by depth; bold: the full model's")
        figure.colorbar(image, label="its probability")


def tokens(path, tokenizer, pairs, L):
    """A continuation [(token, depth)]: a bar per token, as high as the depth that produced it."""
    shown = pairs[:96]
    n = len(shown)
    depths = [depth for _, depth in shown]
    colours = [depth_colour(depth, L) for depth in depths]
    labels = [token_label(tokenizer, token) for token, _ in shown]
    with canvas(path, size=(0.16 * n + 1, 3)) as (_, axes):
        axes.bar(range(n), depths, color=colours, width=0.85)
        axes.set_xticks(range(n), labels, rotation=90, fontsize=6, family="monospace")
        axes.set(ylabel="depth that produced it (blocks)", ylim=(0, L + 0.5), xlim=(-0.6, n - 0.4))


def separation(path, test, separations, results, measure, layers, L):
    """confidence.py, a column for each exit: right and wrong tokens, risk and coverage, levels.

    test: a heads.Evaluation; separations: {measure: [Separation] * M}; results: {(method, level):
    [(agreement, coverage)] * M}, of `measure`; layers: the exits of a model of L blocks.
    """
    levels = sorted({level for _, level in results})
    with canvas(path, 3, len(layers), size=(4.2 * len(layers), 10)) as (_, axes):
        axes = axes.reshape(3, len(layers))
        for m, n in enumerate(layers):
            top, middle, bottom = axes[:, m]
            # where the right and the wrong tokens lie
            u, right = test.uncertainty[measure][:, m], test.agree[:, m]
            top.hist(u[right], 50, color=depth_colour(n, L), alpha=0.6, label="right")
            top.hist(u[~right], 50, color=GREY, alpha=0.6, label="wrong")
            top.set(title=f"exit {n}", xlabel=measure, ylabel="tokens")
            top.legend()
            # the risk of the most certain tokens, for every measure
            for name, each in separations.items():
                middle.plot(each[m].coverage, each[m].risk, label=f"{name}, {each[m].aurc:.3f}")
            middle.set(xlabel="coverage (share of tokens)", ylabel="risk (share that disagrees)")
            middle.legend(title="measure, AURC", fontsize=7)
            # what a level gives, alone and in a cascade
            for method, line in (("plain", "o-"), ("in a cascade", "s--"), ("conditional", "^:")):
                agreement = [results[method, level][m][0] for level in levels]
                bottom.plot(levels, agreement, line, color=depth_colour(n, L), label=method)
            bottom.plot(levels, levels, color=GREY, label="as asked")
            bottom.set(xlabel="level asked for", ylabel="agreement obtained", xticks=levels)
            bottom.legend(fontsize=7)


def report(path, heads, metrics, curves):
    """train.py's report: the losses, the coverage at a level, and the agreement obtained at it.

    metrics: the records of the run; those with a "step" hold "loss_nats", one loss per exit.
    curves: {level as text: [(agreement or NaN, coverage)] * M} on the test text.
    """
    losses = [record["loss_nats"] for record in metrics if "step" in record]      # (steps, M)
    levels = [float(level) for level in curves]
    L = heads.backbone[0].config.num_hidden_layers
    with canvas(path, 1, 3, size=(13, 3.8)) as (_, (training, coverage, agreement)):
        for m, layer in enumerate(heads.layers):
            # exits of one colour are told apart by their lines
            style = {"color": depth_colour(layer, L), "ls": ("-", "--", ":", "-.")[m % 4],
                     "label": f"exit {layer}"}
            training.plot([loss[m] for loss in losses], lw=0.8, **style)
            coverage.plot(levels, [exits[m][1] for exits in curves.values()], **style)
            agreement.plot(levels, [exits[m][0] for exits in curves.values()], **style)
        agreement.plot(levels, levels, color=GREY, lw=1, label="as asked")
        training.set(title="training", xlabel="step", ylabel="loss (nats per token)")
        coverage.set(title="tokens that exit (test)", xlabel="level asked for", ylabel="coverage",
                     ylim=(0, 1))
        agreement.set(title="agreement obtained (test)", xlabel="level asked for",
                      ylabel="agreement with the full model")
        coverage.legend()
        agreement.legend()


def growth(path, record):
    """appendix/scale.py: tokens per second by context, by width, by the depth where tokens leave.

    record: {"context" and "width": [(size, Plain, DSSD, Plain's roofline)], and "depth": [(depth,
    tokens/s)]}.
    """
    labels = {"context": "tokens in the prompt", "width": "hidden size D (the toy widened)"}
    with canvas(path, 1, 3, size=(12, 3.6)) as (_, axes):
        for panel, (name, label) in zip(axes, labels.items()):
            sizes, plain, dssd, roofline = zip(*record[name])
            panel.plot(sizes, plain, "o-", color=DEPTHS[1], label="Plain")
            panel.plot(sizes, dssd, "s--", color=DEPTHS[3], label="DSSD")
            panel.plot(sizes, roofline, ":", color=GREY, label="Plain's roofline")
            panel.set(xlabel=label, ylabel="tokens/s", xscale="log")
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.legend()
        axes[0].set_ylim(bottom=0)
        axes[1].set_yscale("log")
        depths, speeds = zip(*record["depth"])
        axes[2].plot(depths, speeds, "o-", color=DEPTHS[0])
        axes[2].set_xticks(depths)
        axes[2].set(xlabel="depth at which every token leaves (blocks)", ylabel="tokens/s",
                    ylim=(0, None))


# marker, colour, size and layer of every series in bench()
BENCH_SERIES = {
    "LayerSkip, these heads": ("o", DEPTHS[1], 22, 2),
    "LayerSkip, shared unembedding": ("x", DEPTHS[0], 22, 2),
    "DSSD": ("*", DEPTHS[3], 90, 3),
}


def bench(path, block_ms, points):
    """Speed against acceptance, a panel per part of the benchmark, and what further rows cost.

    block_ms: milliseconds of a block by rows. points: {title: {series: [numbers of a policy]}}.
    """
    panels = len(points) + 1
    with canvas(path, columns=panels, size=(4.3 * panels, 3.8)) as (_, axes):
        for panel, (title, series) in zip(axes, points.items()):
            for label, numbers in series.items():
                marker, colour, size, layer = BENCH_SERIES[label]
                acceptance = [row["acceptance"] for row in numbers]
                speed = [row["x_plain"] for row in numbers]
                panel.scatter(acceptance, speed, marker=marker, c=colour, s=size, label=label,
                              zorder=layer)
            panel.axhline(1, color=GREY, lw=0.8, ls=":")
            panel.set(title=title, xlabel="acceptance rate", ylabel="speed (x Plain)",
                      xlim=(-0.03, 1.03), ylim=(0, None))
        axes[0].legend(fontsize=7)
        rows = range(1, len(block_ms) + 1)
        panel = axes[-1]
        panel.plot(rows, [ms / block_ms[0] for ms in block_ms], "o-", color=DEPTHS[2],
                   label="measured")
        panel.plot(rows, rows, ":", color=GREY, label="as many times as rows")
        panel.set(title="what further rows cost", xlabel="rows in one pass",
                  ylabel="time (x one row)", ylim=(0, len(rows)))
        panel.legend(fontsize=7)


def budget(path, runs, scores, budgets, full, unit, title):
    """EERO: accuracy against the cost really spent, and whether the budget is met.

    runs, scores: of appendix.budgets; budgets and full, the cost of the full network, in `unit`.
    """
    from appendix.budgets import METHODS, misses
    styles = ("o-", "^:", "D-", "s--", "d--", "x:", "k:")
    with canvas(path, 1, 2, (11, 4.2)) as (_, (left, right)):
        for name, style in zip(METHODS, styles):
            accuracy, cost = scores[name]
            left.plot(cost, 100 * accuracy, style, label=name, markersize=4)
        left.set(xlabel=f"realised cost, {unit}", ylabel=f"{title}, %")
        left.legend()
        shown = {"EERO": "C0", "incurred": "C2", "beta 10": "C4", "unconditional": "C3"}
        for name, colour in shown.items():
            missed = misses(runs, name, full).T                           # (budgets, seeds)
            lines = right.plot(budgets, missed, "o-", color=colour, markersize=4)
            lines[0].set_label(name)
        right.axhline(0, color=GREY, linewidth=0.5)
        right.set(xlabel=f"budget, {unit}", ylabel="realised - asked for, % of the full cost")
        right.legend()
