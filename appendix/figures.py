"""The figures of the chapters, and the one style of them all.

A chapter computes, and a function here draws. A depth has one colour in all figures and in the
terminal: from violet (shallow) over red to gold (the full model), lighter with every step, so that
colour-blind readers can order them. Blue, green and grey stand for everything that is not a depth.
Files are written to a temporary name and renamed, so that a killed run leaves an old figure whole.
"""
import re
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt   # noqa: E402

from confidence import unit_of    # noqa: E402
from dssd import terminal_colour  # noqa: E402
from model import InputError, check_file, written_whole   # noqa: E402

BLUE, GREEN, SKY, GREY, BLACK = "#0072b2", "#009e73", "#56b4e9", "#777777", "#222222"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False, "legend.fontsize": 8, "hatch.linewidth": 0.7})


def depth_colour(depth, L):
    """The colour of a depth, as in the terminal: a hexadecimal code."""
    # the terminal's codes 16 .. 231 are a cube of six levels of red, green and blue
    code, levels = terminal_colour(depth, L) - 16, (0, 95, 135, 175, 215, 255)
    red, green, blue = levels[code // 36], levels[code // 6 % 6], levels[code % 6]
    return f"#{red:02x}{green:02x}{blue:02x}"


def check(path, endings=(".png", ".svg", ".pdf")):
    """Fail before the work, not after it: InputError unless a figure can be written to `path`."""
    path = Path(path)
    if path.suffix not in endings:
        raise InputError(f"--figure {path}: its name must end in {' or '.join(endings)}")
    check_file(path, "--figure")


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


def label(axes, title, columns=2, **names):
    """The title of a plot, its legend, and what Axes.set() takes. The legend covers no data."""
    axes.set(**names)
    axes.legend(title=title, title_fontsize=10, ncols=columns, alignment="left", borderaxespad=0.2,
                loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1.2, handlelength=1.8)


def token_label(tokenizer, token):
    """A token as one short printable word, safe for matplotlib; dots stand for up to 4 blanks."""
    text = tokenizer.decode([token]).encode("unicode_escape").decode().replace("$", r"\$")
    return re.sub(" {5,}", " " * 4, text).replace(" ", "\u00b7")


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
        image = axes.imshow(value.numpy(), origin="lower", aspect="auto", cmap="Greys", vmin=0,
                            vmax=1)
        for depth in range(L + 1):
            for t in range(T):
                # dark squares need white letters; bold: the full model's choice
                colour = "white" if value[depth, t] > 0.5 else "black"
                weight = "bold" if guess[depth, t] == guess[L, t] else "normal"
                axes.text(t, depth, token_label(tokenizer, guess[depth, t].item())[:8], size=7.5,
                          ha="center", va="center", color=colour, weight=weight, family="monospace")
        words = [token_label(tokenizer, i) for i in ids[0].tolist()]
        axes.set_xticks(range(T), words, size=8, family="monospace")
        axes.set(xlabel="token read", ylabel="depth (blocks)",
                 title="top prediction by depth; bold: the full model's")
        figure.colorbar(image, label="its probability")


def separation(path, test, separations, results, measure, layers, L):
    """confidence.py, a column for each exit: right and wrong tokens, risk and coverage, levels.

    test: a heads.Evaluation; separations: {measure: [Separation] * M}; results: {(method, level):
    [(agreement, coverage)] * M}, of `measure`; layers: the exits of a model of L blocks.
    """
    levels = sorted({level for _, level in results})
    unit = f"{measure} (nats)" if unit_of(measure) else measure
    looks = [(colour, line) for line in ("-", "--") for colour in (BLUE, GREEN, BLACK)]
    with canvas(path, 4, len(layers), size=(4.4 * len(layers), 12)) as (_, axes):
        for n, m, column in zip(layers, range(len(layers)), axes.reshape(4, len(layers)).T):
            # where the right and the wrong tokens lie
            u, right = test.uncertainty[measure][:, m], test.agree[:, m]
            column[0].hist(u[right], 50, color=depth_colour(n, L), alpha=0.7, label="right")
            column[0].hist(u[~right], 50, color=GREY, alpha=0.6, label="wrong")
            label(column[0], f"exit {n}", xlabel=unit, ylabel="tokens")
            # the risk of the most certain tokens, for every measure
            for (name, each), (colour, line) in zip(separations.items(), looks):
                column[1].plot(100 * each[m].coverage, 100 * each[m].risk, line, color=colour,
                               lw=1.2, label=f"{name} {each[m].aurc:.3f}")
            label(column[1], "measure and AURC", xlabel="coverage (% of tokens)",
                  ylabel="risk (% that disagree)")
            # what a level gives, alone and in a cascade, and the share of tokens that exit
            for method, line in (("plain", "o-"), ("in a cascade", "s--"), ("conditional", "^:")):
                agreement = [100 * (results[method, level][m][0] - level) for level in levels]
                coverage = [100 * results[method, level][m][1] for level in levels]
                for plot, values in zip(column[2:], (agreement, coverage)):
                    plot.plot(levels, values, line, color=depth_colour(n, L), ms=4, label=method)
            column[2].axhline(0, color=GREY, lw=1, label="as asked")
            label(column[2], "agreement obtained", xlabel="level asked for", xticks=levels,
                  ylabel="obtained - asked (points)")
            label(column[3], "tokens that exit", xlabel="level asked for", xticks=levels,
                  ylabel="coverage (%)", ylim=(0, None))


def report(path, heads, metrics, curves):
    """train.py's report: the losses, if it trained, and on the test text what a level gives.

    metrics: the records of the run; those with a "step" hold "loss_nats", one loss per exit.
    curves: {level as text: [(agreement or NaN, coverage)] * M} on the test text.
    """
    losses = [record["loss_nats"] for record in metrics if "step" in record]      # (steps, M)
    levels, L = [float(level) for level in curves], heads.backbone[0].config.num_hidden_layers
    panels = 3 if losses else 2
    with canvas(path, 1, panels, size=(4.2 * panels, 3.8)) as (_, axes):
        for m, layer in enumerate(heads.layers):
            style = {"color": depth_colour(layer, L), "label": f"exit {layer}"}
            coverage, agreement = [], []
            for exits in curves.values():
                coverage.append(100 * exits[m][1])
                agreement.append(100 * exits[m][0])
            axes[-2].plot(levels, coverage, "o-", ms=3, **style)
            axes[-1].plot(levels, agreement, "o-", ms=3, **style)
            if losses:
                axes[0].plot([loss[m] for loss in losses], lw=0.8, **style)
        axes[-1].plot(levels, [100 * level for level in levels], color=GREY, lw=1, label="as asked")
        label(axes[-2], "tokens that exit (test)", 4, xlabel="level asked for",
              ylabel="coverage (%)", ylim=(0, None))
        label(axes[-1], "agreement with the full model (test)", 4, xlabel="level asked for",
              ylabel="agreement of the tokens that exit (%)")
        if losses:
            label(axes[0], "training", 4, xlabel="step", ylabel="loss (nats per token)")


def growth(path, record):
    """appendix/scale.py: tokens per second by context, by width, by the depth where tokens leave.

    record: {"context" and "width": [(size, Plain, DSSD, Plain's roofline)], and "depth": [(depth,
    tokens/s)]}.
    """
    names = {"context": "tokens in the prompt", "width": "hidden size D (the toy widened)"}
    with canvas(path, 1, 3, size=(12, 3.6)) as (_, axes):
        for panel, (name, unit) in zip(axes, names.items()):
            sizes, *speeds = zip(*record[name])
            for speed, look in zip(speeds, ("Plain o- " + GREY, "DSSD s-- " + BLUE,
                                            "roofline : " + BLACK)):
                name, line, colour = look.split()
                panel.plot(sizes, speed, line, color=colour, label=name)
            panel.set(xscale="log")
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            label(panel, "", 3, xlabel=unit, ylabel="tokens/s")
        axes[0].set_ylim(bottom=0)
        axes[1].set_yscale("log")
        depths, speeds = zip(*record["depth"])
        axes[2].plot(depths, speeds, color=GREY, lw=1)
        axes[2].scatter(depths, speeds, c=[depth_colour(n, max(depths)) for n in depths], zorder=2)
        axes[2].set(xlabel="depth at which every token leaves (blocks)", ylabel="tokens/s",
                    ylim=(0, None), xticks=depths)


# marker, colour, size and layer of every series in bench()
BENCH_SERIES = {"LayerSkip, these heads": ("o", GREEN, 22, 2), "DSSD": ("*", BLUE, 90, 3),
                "LayerSkip, shared unembedding": ("x", BLACK, 22, 2)}


def bench(path, block_ms, points):
    """Speed against acceptance, a panel per part of the benchmark, and what further rows cost.

    block_ms: milliseconds of a block by rows. points: {title: {series: [numbers of a policy]}}.
    """
    panels = len(points) + 1
    with canvas(path, columns=panels, size=(4.3 * panels, 4)) as (_, axes):
        for panel, (title, series) in zip(axes, points.items()):
            for name, numbers in series.items():
                marker, colour, size, layer = BENCH_SERIES[name]
                acceptance = [row["acceptance"] for row in numbers]
                speed = [row["x_plain"] for row in numbers]
                panel.scatter(acceptance, speed, marker=marker, c=colour, s=size, label=name,
                              zorder=layer)
            panel.axhline(1, color=GREY, lw=1, ls=":", label="Plain")
            label(panel, title, xlabel="acceptance rate", ylabel="speed (x Plain)",
                  xlim=(-0.03, 1.03), ylim=(0, None))
        rows = range(1, len(block_ms) + 1)
        axes[-1].plot(rows, [ms / block_ms[0] for ms in block_ms], "o-", color=BLUE, ms=4,
                      label="measured")
        axes[-1].plot(rows, rows, ":", color=GREY, label="as many times as rows")
        label(axes[-1], "what further rows cost", xlabel="rows in one pass",
              ylabel="time (x one row)", ylim=(0, len(rows)), xticks=rows[::3])


def budget(path, runs, scores, budgets, full, unit, title):
    """EERO: accuracy against the cost really spent, and whether the budget is met.

    runs, scores: of appendix.budgets; budgets and full, the cost of the full network, in `unit`.
    """
    from appendix.budgets import METHODS, misses
    # large and hollow below small and full, so that equal lines are seen
    looks = ((BLUE, "o-", 10), (SKY, "^--", 7), (GREEN, "D-", 4), (GREY, "s--", 4),
             (BLACK, "d--", 4), (GREY, "x:", 4), (BLACK, ":", 0))
    with canvas(path, 1, 2, (11, 4.4)) as (_, (left, right)):
        for name, (colour, line, size) in zip(METHODS, looks):
            accuracy, cost = scores[name]
            left.plot(cost, 100 * accuracy, line, color=colour, label=name, ms=size, mfc="none")
        label(left, "what a budget buys", 4, xlabel=f"realised cost, {unit}", ylabel=f"{title}, %")
        shown = {"EERO": looks[0], "incurred": looks[2], "beta 10": looks[1],
                 "unconditional": looks[4]}
        for name, (colour, line, size) in shown.items():
            missed = misses(runs, name, full).T                           # (budgets, seeds)
            lines = right.plot(budgets, missed, line, color=colour, ms=size, mfc="none")
            lines[0].set_label(name)
        right.axhline(0, color=GREY, lw=1)
        label(right, "is it met?", 4, xlabel=f"budget, {unit}",
              ylabel="realised - asked for, % of the full cost")
