"""Figures: one colour a depth, the picture of the grid from the log of passes, no empty panels."""
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_refused, call, shaken, tiny
from PIL import Image

import dssd as D
from appendix import figures, grid
from dssd import DSSD, EarlyExit, Log, Plain, generate


def luminance(colour):
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_deeper_colour_is_lighter_and_the_terminals():
    assert figures.depth_colour(0, 16) == "#5f00af" and figures.depth_colour(16, 16) == "#ffd700"
    for exits in ((1, 2, 4, 16), (4, 8, 12, 16)):
        lights = [luminance(figures.depth_colour(n, 16)) for n in exits]
        assert all(a < b for a, b in zip(lights, lights[1:])), exits
    lights = [luminance(figures.depth_colour(n, 7)) for n in range(8)]
    assert lights == sorted(set(lights)) and len(D.DEPTH_COLOURS) == 8


def test_the_log_replayed_by_hand():
    """Position 2 drafts at depth 1, position 3 is not certain; the draft is wrong, so 3 is computed
    again."""
    log = Log(prompt=2, passes=[(0, 2, 0, 1), (0, 2, 1, 4), (2, 3, 0, 1), (3, 4, 0, 1),
                                (2, 4, 1, 4), (3, 4, 0, 1), (3, 4, 1, 4)],
              asked=[(1, 2, 3), (1, 3, 4), (1, 3, 4)], rounds=[(1, 0), (0, 0)])
    fills, settled = grid.replay(SimpleNamespace(final=False), log, 4, {1: 2, 4: 0.5})
    (light, other, dark), (_, _, dark_next) = grid.ROUNDS
    assert [tuple(fill) for fill in fills] == [
        (0, 2, 0, 4, grid.PROMPT, 2, 0, 0, 0),
        (2, 3, 0, 1, other, 3, 0, 3, 9.5),
        (3, 4, 0, 1, dark, 3, 3, 6, 9.5),              # of the step that went to full depth
        (2, 4, 1, 4, dark, 3, 6, 9.5, 9.5),
        (3, 4, 0, 1, dark_next, 4, 9.5, 12.5, 16),
        (3, 4, 1, 4, dark_next, 4, 12.5, 16, 16)]
    assert settled == {1: 0, 2: 9.5, 3: 16}
    # the rejected cells of position 3 are narrow, and the new ones take the rest of the column
    _, axes = figures.plt.subplots()
    bars = grid.draw_cells(axes, fills, 1)
    third = [(bar.get_x(), bar.get_width(), rejected) for bar, fill, rejected in bars
             if bar.get_x() >= 2]
    assert third == [(2, 0.25, True), (2, 0.25, True), (2.25, 0.75, False), (2.25, 0.75, False)]
    figures.plt.close()


@pytest.fixture(scope="module")
def runs():
    model, ids, thresholds = tiny(11), [5, 6, 7], (2.0, 2.3, 3.0)
    heads = shaken(model, seed=11)
    runs = [(policy, generate(model, ids, 8, policy))
            for policy in (Plain(), EarlyExit(heads, thresholds), DSSD(heads, thresholds))]
    return heads, runs


def test_every_cell_that_stays_is_drawn_once_and_every_token_settles(runs):
    heads, runs = runs
    # else this test is empty
    assert (5, 3) in runs[2][1].log.rounds and set(runs[2][1].depths) == {1, 2, 4}
    for policy, generation in runs:
        log, L, n = generation.log, 4, len(generation.tokens)
        fills, settled = grid.replay(policy, log, L, {1: 1, 2: 1, 3: 1, 4: 1})
        cells, lost = Counter(), Counter()
        for fill in fills:
            for position in range(fill.first, fill.end):
                for block in range(fill.start, fill.stop):
                    (cells if position < fill.lost else lost)[position, block] += 1
        assert set(cells.values()) == {1}
        assert (sum(cells.values()) + sum(lost.values())
                == sum((b - a) * (d - c) for a, b, c, d in log.passes))
        assert bool(lost) == any(kept < drafts for drafts, kept in log.rounds)
        if not policy.final:
            assert len(cells) == L * (2 + n)                              # full columns
        times = [settled[log.prompt - 1 + i] for i in range(n)]
        assert times == sorted(times) and times[0] == 0 and times[-1] == fills[-1].finish
        # the clock: blocks, heads that were asked, and the unembedding of each pass to full depth
        passes = [cells for cells in log.passes if cells[0] >= log.prompt]
        assert times[-1] == (sum(stop - start for *_, start, stop in passes)
                             + len(log.asked) + len(log.rounds))


def test_the_picture_and_the_animation(runs, tmp_path):
    heads, runs = runs
    tokenizer = SimpleNamespace(decode=lambda ids: f" ${ids[0]}")
    grid.grid(tmp_path / "g.png", tokenizer, heads, runs)
    width, height = Image.open(tmp_path / "g.png").size
    # wide enough for its titles; matplotlib rounds, or rounds down
    assert width in (959, 960) and height == 684
    grid.grid(tmp_path / "g.gif", tokenizer, heads, [(p, g) for p, g in runs if p.name == "DSSD"])
    image = Image.open(tmp_path / "g.gif")
    assert image.n_frames > 5 and (tmp_path / "g.gif").stat().st_size < 200_000
    image.seek(image.n_frames - 1)
    assert image.info["duration"] == 5000
    last = set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))
    assert {tuple(bytes.fromhex(colour[1:])) for colour in (figures.BLUE, grid.PROMPT)} <= last
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g.gif", "g.png"]


def test_only_the_grid_can_be_an_animation(tmp_path):
    assert_refused(call(D, "--figure", tmp_path / "g.jpg"), ".png", ".gif")
    with pytest.raises(ValueError, match="must end in .png"):
        figures.check(tmp_path / "bench.gif")


def test_the_report_without_training_has_no_empty_panel(tmp_path):
    heads = SimpleNamespace(layers=[1, 2], backbone=[
        SimpleNamespace(config=SimpleNamespace(num_hidden_layers=4))])
    curves = {"0.80": [(0.82, 0.1), (0.8, 0.7)], "0.90": [(float("nan"), 0.0), (0.9, 0.4)]}
    for name, metrics, panels in (("a.png", [{"seconds": 1}], 2),
                                  ("b.png", [{"step": 0, "loss_nats": [2.0, 1.0]}], 3)):
        figures.report(tmp_path / name, heads, metrics, curves)
        assert Image.open(tmp_path / name).size[0] == round(panels * 4.2 * 120)


def test_labels_are_printable(toy_tokenizer):
    words = [figures.token_label(toy_tokenizer, token)
             for token in (toy_tokenizer.end, *toy_tokenizer.encode(" $\n" + " " * 12))]
    assert all(word.isprintable() and " " not in word for word in words)
    assert "\u00b7" * 4 in words and not any("\u00b7" * 5 in word for word in words)
