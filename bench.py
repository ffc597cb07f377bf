"""Chapter 7. What it costs, what it buys: every policy side by side in one run.

Decoding one sequence is bound by moving weights, not by arithmetic. A pass reads every matrix
once, whether it has one row or ten. Two facts about the machine are therefore printed first:

1. What a second row costs. If ten rows cost little more than one, verifying drafts is nearly
   free. If they cost ten times as much, speculation cannot pay, whatever its acceptance.
2. The bandwidth of its memory. It sets the roofline, the pace that no policy can pass:

       least ms per token = bytes that the passes must read per token / bandwidth

   The table shows which share of it was reached. A model that fits the processor's cache may
   exceed 100 %. On a toy the overhead of each call counts as much as the bytes.

Then all policies run in turn on every prompt, several times over. The table gives medians over
the repeats, with the least and the most. Greedy text of a small model falls into loops, which
flatters every speculative method. So the share of distinct 4-grams is printed, and sampled text
(temperature 0.8) stands beside the greedy one.

LayerSkip is tuned by hand: an exit, a number of drafts. Its whole grid runs, and its best stands
in the table. "DSSD auto" (appendix/gain.py) drafts where the expected gain exceeds the costs that
appendix/tune.py measures on this machine. Model and heads are the fast twins of appendix/fast.py.

    python bench.py                                 the toy and its fast heads
    python bench.py --heads toy/heads.safetensors   the paper's heads
    python bench.py --widen 8 --dtype bfloat16      a wider model of the same function
    python bench.py --prompts 32 --max-new-tokens 128 --peer transformers --figure bench.png
The last line of stdout is one JSON object (also --json FILE).

Letters: L blocks, D hidden size, V vocabulary, n rows of a pass.
"""
import argparse
import json
import math
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dssd import DSSD, EarlyExit, LayerSkip, Plain, generate, ratio, seconds, summarize
from heads import FAST, ExitHeads, held_out_prompts, load_model, model_options
from model import InputError, check_file, command_line, seed_number, written_whole

LEVELS = (0.80, 0.90, 0.95)
DRAFT_LENGTHS = (1, 2, 3, 4, 5, 6, 10, 15)       # LayerSkip's grid, for every exit

# ---------------------------------------------------------------- the physics


def bandwidth(device):
    """Bytes per second of reading a tensor that no cache holds (256 MB, on a GPU 1 GB)."""
    megabytes = 1024 if device.type == "cuda" else 256
    x = torch.ones(megabytes * 2 ** 20 // 4, device=device)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        x.sum().item()                           # item() waits for a GPU
        times.append(time.perf_counter() - begin)
    return x.numel() * 4 / sorted(times)[4]


def hardware(device):
    """One line: processor, threads, version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        described = Path("/proc/cpuinfo").read_text().partition("model name")[2]
        name = described.partition("\n")[0].strip("\t: ") or name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@torch.inference_mode()
def cost_of_rows(model, max_rows=16, positions=128, repeats=30):
    """Milliseconds of one block for passes of 1 .. max_rows rows, medians."""
    L, device = model.config.num_hidden_layers, model.embed_in.weight.device
    cache = model.new_cache(1, positions + max_rows)
    ids = torch.zeros(1, positions, dtype=torch.long, device=device)
    model.run(model.embed(ids), 0, L, cache)
    times = {n: [] for n in range(1, max_rows + 1)}
    for _ in range(repeats + 3):
        # in turn: a slow moment of the machine is everyone's
        for n in times:
            x = model.embed(ids[:, :1].expand(1, n))                      # (1, n, D)
            begin = seconds(device)
            model.run(x, 0, L, cache)
            times[n].append(seconds(device) - begin)
            cache.truncate(positions)
    # the first three rounds warm up
    return [1000 * sorted(spent[3:])[repeats // 2] / L for spent in times.values()]


@torch.inference_mode()
def row_dependence(model, rows=17, positions=64):
    """For n = 1 .. rows: how much going in one pass changes the logits of n rows at most.

    0.0: not by a bit. Only then is verification lossless to the bit, too.
    """
    L, device = model.config.num_hidden_layers, model.embed_in.weight.device
    prompt = torch.ones(1, positions, dtype=torch.long, device=device)
    ids = torch.arange(2, 2 + rows, device=device)[None]                  # (1, rows)

    def logits(n, step):
        """Of the first n ids, in passes of `step` rows: (1, n, V)."""
        cache, parts = model.new_cache(1, positions + rows), []
        model.run(model.embed(prompt), 0, L, cache)
        for i in range(0, n, step):
            x = model.run(model.embed(ids[:, i:i + step]), 0, L, cache)
            parts.append(model.unembed(x))
        return torch.cat(parts, 1)

    alone = logits(rows, 1)
    changes = []
    for n in range(1, rows + 1):
        changes.append((logits(n, n) - alone[:, :n]).abs().max().item())
    return changes


def cached_positions(model, most, rows):
    """How many positions a measurement puts before its rows: `most`, fewer in a small context."""
    return max(1, min(most, model.config.max_position_embeddings - rows))


def report_rows(model, dtype):
    """Print and return row_dependence: up to how many rows lossless is so to the bit."""
    positions = cached_positions(model, 64, 17)
    changes = row_dependence(model, positions=positions)
    same = 0
    while same < len(changes) and changes[same] == 0:
        same += 1
    line = "already two rows in a pass change the logits"
    if same > 1:
        line = f"passes of up to {same} rows give the logits of one row at a time to the bit"
    if same < len(changes):
        line += f"; passes of up to {len(changes)} rows change them by up to {max(changes):.2g}"
    print(f"{dtype}, at {positions} cached positions: {line}", flush=True)
    return changes


def report_physics(model, dtype):
    """Print and return what is known of machine and model before any policy runs."""
    device, config = model.embed_in.weight.device, model.config
    machine, bytes_per_second = hardware(device), bandwidth(device)
    print(f"{machine}; memory read at {bytes_per_second / 1e9:.1f} GB/s; {dtype}, "
          f"L = {config.num_hidden_layers}, D = {config.hidden_size:,}, "
          f"V = {config.vocab_size:,}")
    positions = cached_positions(model, 128, 16)
    block_ms = cost_of_rows(model, positions=positions)
    costs = [f"{1000 * block_ms[n - 1]:.0f} us for {n}" for n in (1, 2, 4, 8, 16)]
    print(f"what a second row costs: one block at {positions} cached positions, "
          f"{', '.join(costs)} rows")
    return {"machine": machine, "gigabytes_per_second": bytes_per_second / 1e9,
            "block_ms": block_ms, "row_dependence": report_rows(model, dtype)}


# ---------------------------------------------------------------- policies in turn, and costs


def run_in_turn(model, policies, prompts, max_new_tokens, *,
                temperature=0.0, top_p=1.0, repeats=3, seed=0):
    """All policies in turn on every prompt, `repeats` times, after a short round that warms up.

    policies {name: Policy} -> {name: [generations of one repeat, ..]}, a Generation per prompt.
    In turn, so that a slow moment of the machine is everyone's. Prompt i is sampled from seed + i.
    """
    options = {"temperature": temperature, "top_p": top_p}

    def one_round(prompts, n):
        generations = {name: [] for name in policies}
        for i, prompt in enumerate(prompts):
            for name, policy in policies.items():
                done = generate(model, prompt, n, policy, seed=seed + i, **options)
                generations[name].append(done)
        return generations

    one_round(prompts[:1], min(16, max_new_tokens))
    runs = {name: [] for name in policies}
    for _ in range(repeats):
        for name, generations in one_round(prompts, max_new_tokens).items():
            runs[name].append(generations)
    return runs


def middle_of(policy, repeats):
    """The Summary of the repeat whose time per token is the median."""
    summaries = [summarize(policy, generations) for generations in repeats]
    summaries.sort(key=lambda summary: summary.ms_per_token)
    return summaries[len(summaries) // 2]


def cost_of(model, policy, generations):
    """What generations cost per token -> (block-equivalents, bytes), from their logs.

    Block-equivalents count arithmetic: every row of a pass. Bytes count what a pass must read,
    whatever its rows: weights, and the keys and values of the positions that it attends to.
    The prompt's own passes do not count.
    """
    config, item = model.config, model.embed_in.weight.element_size()
    block = item * config.block_weights                        # bytes of a block's matrices
    position = item * 2 * config.hidden_size                   # of a position's keys and values
    unembed = config.unembed_cost
    copy = 2 * config.hidden_size ** 2 / config.block_weights  # CALM's copy: keys and values alone
    cost = read = decoded = 0
    for g in generations:
        log = g.log
        decoded += len(g.tokens) - 1
        # passes through blocks
        for first, end, start, stop in log.passes:
            if first >= log.prompt:
                cost += (end - first) * (stop - start)
                read += (stop - start) * (block + end * position)
        # heads: the body for every position that they read, the matrix for the newest
        for exit, first, end in log.asked:
            if first >= log.prompt:
                head = policy.heads.heads[policy.heads.layers.index(exit)].cost()
                cost += (end - first) * (head - unembed) + unembed
                read += head * block
                if policy.heads.kind == "block":
                    read += end * position
        # a pass to full depth: the unembedding, for the drafts and for one position more
        for drafted, _ in log.rounds:
            cost += (drafted + 1) * unembed
            read += unembed * block
        # keys and values copied from an exit state
        for first, end, start, stop in log.copied:
            cost += (end - first) * (stop - start) * copy
            read += (stop - start) * copy * block
    return cost / max(1, decoded), read / max(1, decoded)


# ---------------------------------------------------------------- side by side


@dataclass
class Setting:
    """What is the same for all policies of a run."""
    prompts: list                 # lists of ids
    max_new_tokens: int
    temperature: float
    repeats: int
    seed: int


def distinct(texts, n=4):
    """Share of distinct n-grams among all n-grams of the texts: low where text loops."""
    grams = []
    for text in texts:
        grams += [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def numbers_of(model, policy, repeats, plain, bytes_per_second):
    """One policy's line of the table: the fields of its Summary, and what it is beside Plain.

    same_text: on which share of prompts the text is Plain's. same_tokens: of places.
    """
    middle = middle_of(policy, repeats)
    times = [summarize(policy, generations).ms_per_token for generations in repeats]
    cost, read = cost_of(model, policy, repeats[0])
    least_ms = 1000 * read / bytes_per_second                             # the roofline
    same_texts, same_tokens = [], []
    for mine, full in zip(repeats[0], plain[0]):
        same_texts.append(mine.tokens == full.tokens)
        same_tokens += [a == b for a, b in zip(mine.tokens, full.tokens)]
    return {
        **vars(middle),
        "min_ms": min(times), "max_ms": max(times),
        "x_plain": middle_of(Plain(), plain).ms_per_token / middle.ms_per_token,
        "cost_per_token_blocks": cost,
        "bytes_per_token": read,
        "roofline": least_ms / middle.ms_per_token,
        "prefill_ms": 1000 * middle.prefill_seconds / len(repeats[0]),
        "same_text": sum(same_texts) / len(same_texts),
        "same_tokens": sum(same_tokens) / len(same_tokens)}


def print_table(numbers):
    """One line per policy, at most 120 columns."""
    print(f"{'policy':<20}{'tokens/s':>9}{'ms/token (min..max)':>22}{'x Plain':>8}{'accept':>7}"
          f"{'wasted':>7}{'tau':>6}{'drafts':>7}{'blocks':>7}{'cost':>6}{'same text':>10}"
          f"{'roofline':>9}")
    for name, row in numbers.items():
        d = 2 if row["max_ms"] < 100 else 0                               # digits
        spent = f"{row['ms_per_token']:.{d}f} ({row['min_ms']:.{d}f}..{row['max_ms']:.{d}f})"
        line = (f"{name:<20}{row['tokens_per_second']:>9.0f}{spent:>22}{row['x_plain']:>8.2f}"
                f"{row['acceptance']:>7.2f}{row['wasted']:>7}{row['tau']:>6.2f}"
                f"{row['draft_length']:>7.2f}{row['layers_per_token']:>7.1f}"
                f"{row['cost_per_token_blocks']:>6.1f}{row['same_text']:>10.0%}"
                f"{row['roofline']:>9.0%}")
        print(line.replace("nan%", "   -").replace("nan", "  -"), flush=True)


def side_by_side(title, model, policies, setting):
    """Run {name: Policy}, print the table -> ({name: numbers}, {name: texts}, GB/s)."""
    device, prompts = model.embed_in.weight.device, setting.prompts
    # on a shared machine the bandwidth changes: the roofline is by the mean
    before = bandwidth(device)
    runs = run_in_turn(model, policies, prompts, setting.max_new_tokens,
                       temperature=setting.temperature, repeats=setting.repeats, seed=setting.seed)
    after = bandwidth(device)
    mean = (before + after) / 2
    numbers, texts = {}, {}
    for name, policy in policies.items():
        numbers[name] = numbers_of(model, policy, runs[name], runs["Plain"], mean)
        texts[name] = [g.tokens for g in runs[name][0]]
        # sampled texts are different draws: not compared
        if setting.temperature:
            numbers[name].update(same_text=math.nan, same_tokens=math.nan)
    print(f"\n{title}: {len(prompts)} prompts of {len(prompts[0])} tokens x "
          f"{setting.max_new_tokens} new, {setting.repeats} repeats; "
          f"{distinct(texts['Plain']):.0%} of the 4-grams in Plain's text are distinct;\n"
          f"prefill {numbers['Plain']['prefill_ms']:.1f} ms; memory read at {before / 1e9:.1f} "
          f"GB/s before and {after / 1e9:.1f} after, the roofline is by the mean")
    print_table(numbers)
    return numbers, texts, mean / 1e9


def layerskip_grid(heads, suffix=""):
    """LayerSkip at every exit and every draft length: {name: Policy}."""
    grid = {}
    for exit in heads.layers:
        for length in DRAFT_LENGTHS:
            grid[f"LayerSkip {exit}x{length}{suffix}"] = LayerSkip(heads, exit, length)
    return grid


def beside_grid(mine, grid):
    """Print DSSD auto's numbers beside those of LayerSkip's grid, {name: numbers}."""
    mean = {}
    for key in ("acceptance", "wasted", "tokens_per_second"):
        mean[key] = sum(row[key] for row in grid.values()) / len(grid)
    fastest = min(grid, key=lambda name: grid[name]["ms_per_token"])
    highest = max(grid, key=lambda name: grid[name]["acceptance"])
    print(f"DSSD auto in multiples of LayerSkip's grid of {len(grid)}:")
    for name, other in (("the grid's mean", mean), (f"the fastest, {fastest}", grid[fastest]),
                        (f"the highest acceptance, {highest}", grid[highest])):
        line = (f"  {name:<42} acceptance {ratio(mine['acceptance'], other['acceptance']):.2f}, "
                f"wasted {ratio(mine['wasted'], other['wasted']):.2f}, "
                f"speed {ratio(mine['tokens_per_second'], other['tokens_per_second']):.2f}")
        print(line.replace("nan", "-"))


def compare(title, model, heads, tied, tuned, setting):
    """One part, greedy or sampled -> (its JSON, texts by policy, points for the figure).

    LayerSkip's grid runs once on a quarter of the prompts. tied: heads with the shared
    unembedding, as in the original LayerSkip; None: without them. tuned: the policy "DSSD auto".
    """
    own = layerskip_grid(heads)
    shared = {} if tied is None else layerskip_grid(tied, " tied")
    few = setting.prompts[:max(1, len(setting.prompts) // 4)]
    once = replace(setting, prompts=few, repeats=1)
    policies = {"Plain": Plain(), "DSSD auto": tuned, **own, **shared}
    grid, _, _ = side_by_side(f"{title}, LayerSkip's grid", model, policies, once)
    beside_grid(grid["DSSD auto"], {name: grid[name] for name in own})
    best = min([*own, *shared], key=lambda name: grid[name]["ms_per_token"])

    early, levels = {}, {}
    for level in LEVELS:
        early[f"EarlyExit {level:.2f}"] = EarlyExit(heads, heads.thresholds(level))
        levels[f"DSSD {level:.2f}"] = DSSD(heads, heads.thresholds(level))
    policies = {"Plain": Plain(), **early, **levels, best: policies[best], "DSSD auto": tuned}
    numbers, texts, gigabytes_per_second = side_by_side(title, model, policies, setting)
    peaks = peak_memories(model, policies, setting)
    part = {"grid": grid, "policies": numbers, "peak_memory_gb": peaks, "best_layerskip": best,
            "costs": [vars(costs) for costs in tuned.costs],
            "distinct_4grams": distinct(texts["Plain"]),
            "gigabytes_per_second": gigabytes_per_second}
    # all points are of the grid's run, but for the levels, which only the other one has
    points = {"LayerSkip, these heads": [grid[name] for name in own],
              "LayerSkip, shared unembedding": [grid[name] for name in shared],
              "DSSD": [grid["DSSD auto"], *(numbers[name] for name in levels)]}
    return part, texts, points


def with_graphs(graphed, tuned, setting):
    """Plain and DSSD auto once more, on a decoder with CUDA graphs -> {name: numbers}."""
    policies = {"Plain": Plain(), "DSSD auto": tuned}
    # every pass is captured before it is timed
    for prompt in setting.prompts:
        for policy in policies.values():
            generate(graphed, prompt, setting.max_new_tokens, policy)
    numbers, _, _ = side_by_side("greedy, with CUDA graphs", graphed, policies, setting)
    return numbers


# ---------------------------------------------------------------- memory, and where texts part


def take_peak(device):
    """Peak memory in GB since the last call; on a GPU what torch allocated there."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024        # bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # only Linux can start anew; elsewhere the peak only ever rises
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")
    return peak / 1e9


def peak_memories(model, policies, setting):
    """Print and return the peak so far, and while each policy continues one prompt, in GB."""
    device = model.embed_in.weight.device
    peaks = {"so far": take_peak(device)}
    for name, policy in policies.items():
        generate(model, setting.prompts[0], setting.max_new_tokens, policy,
                 temperature=setting.temperature, seed=setting.seed)
        peaks[name] = take_peak(device)
    said = [f"{name} {gigabytes:.3f} GB" for name, gigabytes in peaks.items()]
    print(f"peak memory, all that is loaded included: {', '.join(said)}")
    return peaks


@torch.inference_mode()
def first_gaps(model, prompts, texts, others):
    """Print and return the full model's top-2 logit gaps where greedy texts first differ.

    texts are Plain's, others DSSD auto's. Near 0: rounding flipped a near-tie.
    """
    gaps = []
    for prompt, text, other in zip(prompts, texts, others):
        same, both = 0, min(len(text), len(other))
        while same < both and text[same] == other[same]:
            same += 1
        if same < both:
            ids = torch.tensor([prompt + text[:same]], device=model.embed_in.weight.device)
            logits, _ = model(ids)                                        # (1, T, V)
            first, second = logits[0, -1].float().topk(2).values.tolist()
            gaps.append(first - second)
    line = f"DSSD auto's text differs from Plain's on {len(gaps)} of {len(prompts)} prompts"
    if gaps:
        line += (f"; the full model's top-2 logit gap at the first difference: "
                 f"median {sorted(gaps)[len(gaps) // 2]:.3f}, largest {max(gaps):.3f}")
    print(line)
    return gaps


# ---------------------------------------------------------------- command line


def strict(value):
    """The same for JSON: None for NaN (undefined, as Plain's acceptance), "inf" for infinity."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return value


def finish(record, args):
    """The run's options and results as one line of JSON, also to --json FILE."""
    options = {**vars(args), "model": str(args.model)}
    text = json.dumps(strict({"options": options, **record}), allow_nan=False)
    print(text)
    if args.json:
        with written_whole(args.json) as temporary:
            temporary.write_text(text + "\n", "utf-8")


def arguments():
    parser = argparse.ArgumentParser(description="Speed, acceptance and cost of every policy.")
    model_options(parser, FAST)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts of 64 tokens")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of every policy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of weights and arithmetic")
    parser.add_argument("--widen", type=int, default=1, help="times as wide, same function")
    parser.add_argument("--vocab", type=int, default=0, help="rows to pad the unembedding to")
    parser.add_argument("--peer", choices=("transformers",), help="another library beside it")
    parser.add_argument("--json", help="also write the JSON object to this file")
    parser.add_argument("--figure", help="draw speed against acceptance to this file")
    parser.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args()
    if min(args.prompts, args.repeats) < 1 or args.max_new_tokens < 2:
        raise InputError("--prompts and --repeats must be at least 1, --max-new-tokens at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here; use cpu")
    if args.json:
        check_file(args.json, "--json")
    if args.peer and args.device != "cpu":
        raise InputError("--peer compares on the CPU; leave --device out")
    return args


def main():
    args = arguments()
    from appendix import fast, figures, scale, tune
    if args.figure:
        figures.check(args.figure)
    if args.peer:
        scale.peer_classes()
    model, heads, _, text = load_model(args, FAST)
    for level in LEVELS:
        heads.thresholds(level)                  # what lacks shows now, not after minutes
    length, args.max_new_tokens = text.fit(64, args.max_new_tokens)
    prompts = held_out_prompts(args.prompts, length, text=text)
    if args.widen != 1 or args.vocab:
        model, heads = scale.widen(model, heads, args.widen, args.vocab)
    decoder, twins = fast.fast(model, heads)
    tied = ExitHeads(model, heads.layers, "tied").requires_grad_(False)
    if decoder is not model:
        tied = fast.FusedHeads(decoder, tied)

    record, points = report_physics(decoder, args.dtype), {}
    greedy = Setting(prompts, args.max_new_tokens, 0.0, args.repeats, args.seed)
    tuned = tune.automatic(decoder, twins)
    part, texts, points["greedy"] = compare("greedy", decoder, twins, tied, tuned, greedy)
    gaps = first_gaps(model, prompts, texts["Plain"], texts["DSSD auto"])
    record["greedy"] = {**part, "first_gaps": gaps}
    title, sampled = "sampled at 0.8", replace(greedy, temperature=0.8)
    tuned_sampled = tune.automatic(decoder, twins, 0.8)
    record[title], _, points[title] = compare(title, decoder, twins, None, tuned_sampled, sampled)
    if args.device == "cuda":
        pair = fast.fast(model, heads, graphs=True)
        record["graphs"] = with_graphs(pair[0], tune.automatic(*pair), greedy)
    if args.peer:
        record["peer"] = scale.beside_peers(model, decoder, tuned, prompts[:8],
                                            args.max_new_tokens, args.repeats)
    if args.figure:
        figures.bench(args.figure, record["block_ms"], points)
        print(f"wrote {args.figure}")
    finish(record, args)


if __name__ == "__main__":
    command_line(main)
