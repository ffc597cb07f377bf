"""The picture of the grid: which pass computed which cell, from the log of a generation alone.

A decoder is a grid of positions (across) and blocks (upwards). A pass takes some positions through
some blocks. Plain decoding fills the grid column by column. An early exit leaves the deep part of
a column empty, until a later token needs its keys and values. DSSD fills the deep part of many
columns by one pass, which verifies the drafts on the way. A position whose token was rejected is
computed again: the rejected cells stay, narrow and hatched, beside the new ones.

    python dssd.py --prompt "self._check_can_read()" --level 0.85 --figure grid.png
    python dssd.py --prompt "self._check_can_read()" --level 0.85 --figure grid.gif
Expect three grids of the same prompt, and from the second command an animation (in a minute).

The clock counts a pass by its blocks and the head that reads it, whatever number of positions it
takes: as if time went with the weights that are read. Its unit is one block.
"""
from collections import Counter, namedtuple
from pathlib import Path

from PIL import Image             # comes with matplotlib

from appendix.figures import BLACK, BLUE, GREEN, GREY, depth_colour, plt, token_label
from model import written_whole

LONGEST = 25                      # tokens shown
PROMPT = "#b5b5b5"
# rounds in two colours: their drafts in two light shades in turns, the pass to full depth dark
ROUNDS = (("#8fc3e3", "#bcdcf0", BLUE), ("#8fd3bd", "#c3e8dc", GREEN))
STORIES = {"Plain": "every token takes every block",
           "EarlyExit": "the first certain exit answers; after a mistake, another text (italics)",
           "DSSD": "certain exits draft, a pass to full depth verifies and fills the columns"}

# What a pass computed: positions, blocks, its colour, the first position that was rejected after
# it, and times: its begin and end, and the end of its round.
Fill = namedtuple("Fill", "first end start stop colour lost begin finish verified")


def replay(policy, log, L, costs):
    """A log -> (its Fills, {position: when its answer settled}). costs: {depth: of its head}."""
    asked = Counter((exit, end) for exit, _, end in log.asked)
    clock, step, walked, rounds = 0, 0, [], []
    for cells in log.passes:
        first, end, start, stop = cells
        if end <= log.prompt:
            continue
        # a position that enters the grid begins a step
        step += start == 0
        begin, clock = clock, clock + stop - start
        if stop == L or asked[stop, end] > 0:
            asked[stop, end] -= 1
            clock += costs[stop]
        walked.append((cells, step, len(rounds), begin, clock))
        # full depth ends the round: what it rejected, and at what time
        if stop == L:
            drafted, kept = log.rounds[len(rounds)]
            rounds.append((step, end - (drafted - kept), clock))
    # what early exits leave at the end waits for no pass
    rounds.append((None, log.prompt + step, clock))
    fills = [Fill(0, log.prompt, 0, L, PROMPT, log.prompt, 0, 0, 0)]
    settled = {log.prompt - 1: 0}
    for (first, end, start, stop), step, k, begin, finish in walked:
        last, lost, verified = rounds[k]
        colour = ROUNDS[k % 2][2 if step == last else step % 2]
        fills.append(Fill(first, end, start, stop, colour, lost, begin, finish, verified))
        if policy.final:
            settled[end - 1] = finish
        else:
            settled.update(dict.fromkeys(range(first, min(end, lost)), verified))
    return fills, settled


def draw_cells(axes, fills, column):
    """A bar for each Fill and position from `column` on -> [(bar, Fill, whether rejected)]."""
    attempts, seen, bars = Counter(), Counter(), []
    for fill in fills:
        if fill.start == 0:
            attempts.update(range(max(column, fill.first, fill.lost), fill.end))
    for fill in fills:
        for position in range(max(column, fill.first), fill.end):
            # rejected attempts are narrow, in their order; the one that stays is right of them
            rejected, narrow = position >= fill.lost, 0.5 / max(2, attempts[position])
            if rejected:
                seen[position] += fill.start == 0
                left, width = (seen[position] - 1) * narrow, narrow
            else:
                left, width = attempts[position] * narrow, 1 - attempts[position] * narrow
            bar, = axes.bar(position - column + left, fill.stop - fill.start, width, fill.start,
                            align="edge", color=fill.colour, edgecolor=BLACK, lw=0)
            bars.append((bar, fill, rejected))
    return bars


def draw_answer(axes, i, word, depth, L, italic):
    """Below column i its answer, and a dot at the depth that gave it -> the artists."""
    colour, dark = depth_colour(depth, L), depth > 0.7 * L
    text = axes.text(i + 0.5, -0.09 * L, word, ha="center", va="center", family="monospace",
                     size=min(8, 38 / max(1, len(word))), color="black" if dark else "white",
                     style="italic" if italic else "normal",
                     bbox={"boxstyle": "round,pad=0.2", "fc": colour, "lw": 0})
    dot, = axes.plot(i + 0.5, depth - 0.5, "o", ms=4.5, color=colour, mec="white", mew=0.7)
    return text, dot


def draw_panel(axes, tokenizer, heads, policy, generation, plain):
    """One policy's grid -> (a function of the clock that shows what is computed by then, its end).

    Answers are italic from the first on that differs from the tokens `plain`.
    """
    L, n, log = heads.backbone[0].config.num_hidden_layers, len(generation.tokens), generation.log
    costs = {depth: head.cost() for depth, head in zip(heads.layers, heads.heads)}
    costs[L] = heads.backbone[0].config.full_cost - L
    fills, settled = replay(policy, log, L, costs)
    column, end = log.prompt - 1, fills[-1].verified      # the prompt's last gives the first token
    bars, answers = draw_cells(axes, fills, column), []
    for i, (token, depth) in enumerate(zip(generation.tokens, generation.depths)):
        word, same = token_label(tokenizer, token)[:8], generation.tokens[:i + 1] == plain[:i + 1]
        artists = draw_answer(axes, i, word, depth, L, not same)
        answers.append((settled[column + i], artists))
    # the lines of the grid
    axes.hlines(range(1, L), 0, n, color="white", lw=0.5)
    axes.vlines(range(1, n), 0, L, color="white", lw=1)
    axes.set(xlim=(0, n), ylim=(0, L), xticks=[], ylabel="depth (blocks)", facecolor="#f3f3f3",
             yticks=[*(heads.layers if policy.heads else ()), L])
    axes.tick_params(labelsize=7)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(f"{policy.name}: {STORIES[policy.name]}", loc="left", size=9.5)

    def show(clock):
        for bar, fill, rejected in bars:
            done = (clock - fill.begin) / max(1e-9, fill.finish - fill.begin)
            bar.set_height(min(1, max(0, done)) * (fill.stop - fill.start))
            bar.set_hatch("/////" if rejected and clock >= fill.verified else None)
        for time, artists in answers:
            for artist in artists:
                artist.set_visible(clock >= time)
        full = sum(fill.stop == L and 0 < fill.finish <= clock for fill in fills)
        axes.set_title(f"full passes: {full}   clock: {min(clock, end):.0f}", loc="right", size=9)
    return show, end


def grid(path, tokenizer, heads, runs):
    """Draw `runs`, [(Policy, Generation)] of one prompt, one below the other; Plain is the first.

    A name that ends in .gif gives an animation, all policies by one clock.
    """
    n = max(len(generation.tokens) for _, generation in runs)
    figure, panels = plt.subplots(len(runs), 1, squeeze=False, layout="constrained",
                                  figsize=(0.36 * max(n, 20) + 0.8, 1.8 * len(runs) + 0.3))
    shows, ends = [], []
    for axes, (policy, generation) in zip(panels[:, 0], runs):
        show, end = draw_panel(axes, tokenizer, heads, policy, generation, runs[0][1].tokens)
        shows.append(show)
        ends.append(end)
    keys = {"prompt": {"fc": PROMPT}, "passes that stop at an exit": {"fc": ROUNDS[0][0]},
            "pass to full depth": {"fc": BLUE},
            "rejected and computed again": {"fc": ROUNDS[0][0], "hatch": "/////", "lw": 0}}
    patches = [plt.Rectangle((0, 0), 1, 1, **look) for look in keys.values()]
    patches.append(plt.Line2D([], [], ls="", marker="o", color=GREY, mec="white"))
    figure.legend(patches, [*keys, "depth that answered"], loc="outside upper center", ncols=5)

    def snapshot(clock):
        for show in shows:
            show(clock)
        figure.canvas.draw()
    with written_whole(path) as temporary:
        snapshot(max(ends))
        if Path(path).suffix == ".gif":
            animate(temporary, figure, snapshot, max(ends))
        else:
            figure.savefig(temporary, dpi=120, format=Path(path).suffix[1:])
    plt.close(figure)


def animate(path, figure, snapshot, end):
    """A GIF of the figure while the clock runs to `end`: a frame is three blocks' time."""
    figure.set_layout_engine("none")      # the places stay as they are, and frames are drawn fast
    figure.set_dpi(90)
    images, palette = [], None
    # the last frame first: it has all colours
    for clock in (end, *range(0, int(end) + 1, 3)):
        snapshot(clock)
        size, pixels = figure.canvas.get_width_height(), figure.canvas.buffer_rgba()
        image = Image.frombuffer("RGBA", size, pixels).convert("RGB")
        palette = palette or image.quantize(64)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    images = [*images[1:], images[0]]
    times = [100] * (len(images) - 1) + [5000]                            # milliseconds
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=times,
                   loop=0)
