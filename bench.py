"""Chapter 7. What it costs, what it buys: every policy side by side in one run.

Decoding one sequence is bound by moving weights, not by arithmetic: a pass with n rows reads every matrix once,
as a pass with one row does. If n rows cost little more than one, verifying drafts is nearly free and speculation
pays what its acceptance promises; if they cost n times as much, it cannot pay at all. So the first thing printed
is this curve on this machine ("what a second row costs"), beside the memory bandwidth. The roofline of a policy:

    least ms per token = bytes that its passes must read per token / bandwidth

and the table shows which fraction of it was reached (a model that fits the processor's cache may exceed 100 %).
On a toy the overhead of each call counts as much as the bytes.

The policies run in turn on every prompt, after a warm-up, several times over; the figures are medians over the
repeats, with the least and the most, and all ratios are within one run. Greedy text of a small model falls into
loops, which flatter every speculative method: so the share of distinct 4-grams is printed, and sampled text
(temperature 0.8) stands beside the greedy one.

Real sizes without real weights: `--widen r` makes a model of the same function whose every matrix is r times
wider and taller. The residual stream is repeated r times, which leaves the statistics of LayerNorm alone; heads
are repeated; matrices are tiled and divided by r. `--vocab n` pads the unembedding to n rows that never win. So
acceptance is the toy's while the cost is that of a real model (toy x 16: D = 2,048, Pythia-1B's). The limits: the
heads are as good as the toy's, which says nothing about a real model's; and depth stays 16 blocks.

    python bench.py                                      the toy, its fast heads: tables, bench.png, growth.png
    python bench.py --heads toy/heads.safetensors        the paper's heads
    python bench.py --widen 8 --prompts 4 --max-new-tokens 64 --dtype bfloat16
    python bench.py --peer transformers                  beside another library, where it is installed
    python bench.py --tasks code                         accuracy against cost: lines of held-out code completed
    python bench.py --model pythia-410m --heads run/heads.safetensors --tasks lambada,piqa --task-dir DIR
    python bench.py --loss-memory                        what training heads costs in memory, chunked and not

The last line of stdout is one JSON object (also --json FILE). Expect a quarter of an hour on two CPU cores.
"""
import argparse
import json
import multiprocessing
import platform
import resource
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from confidence import entropy, is_certain
from dssd import (DSSD, HEADER, EarlyExit, Plain, always, automatic, beside_grid, fast, generate, grid_of, held_out_prompts,
                  measure, record, row_of, run_in_turn)
from eero import token_costs
from heads import ExitHeads, distill_loss, full_cost, kl, toy_windows
from model import TOY, InputError, Pythia, PythiaConfig, Tokenizer, command_line, locate, official_name, written_whole
from train import Progress

# ---------------------------------------------------------------- the machine


def bandwidth(device):
    """Bytes per second of reading a tensor that no cache holds (256 MB; 1 GB on a GPU), the median of nine."""
    x = torch.ones((64 if device == "cpu" else 256) * 2 ** 20, device=device)
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - begin)
    return x.numel() * 4 / sorted(times)[4]


def hardware(device):
    """One line: processor, threads, version of torch."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@torch.inference_mode()
def row_dependence(model, rows=17):
    """For n = 1 .. rows: the largest difference that going together makes to final logits of n rows; 0.0 if none."""
    ids = torch.arange(2, 2 + rows, device=model.embed_in.weight.device)[None]
    L = model.config.num_hidden_layers

    def logits(n, step):
        cache = model.new_cache(1, 64 + rows)
        model.run(model.embed(torch.ones(1, 64, dtype=torch.long, device=ids.device)), 0, L, cache)
        return torch.cat([model.unembed(model.run(model.embed(ids[:, i:i + step]), 0, L, cache)) for i in range(0, n, step)], 1)

    alone = logits(rows, 1)
    return [(logits(n, n) - alone[:, :n]).abs().max().item() for n in range(1, rows + 1)]


def report_rows(model, dtype):
    """Print and return row_dependence: whether, and up to how many rows in a pass, the lossless policies are so to the bit."""
    found = row_dependence(model)
    same = next((n for n, difference in enumerate(found) if difference), len(found))
    print(f"{dtype}, at 64 cached positions: " + (f"passes of up to {same} rows give the logits of one row at a time to the bit"
          if same > 1 else "already two rows in a pass change the logits") + (
          f"; passes of up to {len(found)} rows change them by up to {max(found):.2g}" if same < len(found) else ""), flush=True)
    return found


# ---------------------------------------------------------------- a wider model of the same function


@torch.no_grad()
def widen(model, heads, r, vocab=0):
    """The same function, r times as wide, with the unembedding padded to `vocab` rows: (Pythia, ExitHeads).

    Every matrix is tiled r x r and divided by r, every vector repeated; embedding and unembedding keep their rows.
    A padding row w has w (g x + b) = -50 for every normalised x: as the entries of x sum to 0, w = c / g with
    c = -50 / sum(b / g) does it. Such a row never wins and adds e^-50 to the softmax.
    """
    c = model.config
    if r < 1 or vocab and vocab < c.vocab_size:
        raise InputError(f"--widen must be at least 1, and --vocab at least the model's {c.vocab_size} entries")
    if vocab and heads.kind not in ("linear", "block"):
        raise InputError(f"--vocab cannot pad heads of kind {heads.kind}: their matrix does not read a norm of its own")
    V, like = max(vocab, c.vocab_size), model.embed_in.weight
    with torch.device("meta"):
        wide = Pythia(replace(c, vocab_size=V, hidden_size=r * c.hidden_size, intermediate_size=r * c.intermediate_size,
                              num_attention_heads=r * c.num_attention_heads))
    wide = wide.to(like.dtype).to_empty(device=like.device).requires_grad_(False).eval()
    wide_heads = ExitHeads(wide, heads.layers, heads.kind, start="random").requires_grad_(False).eval()
    wide_heads.calibration = heads.calibration

    def fill(narrow, wider, norm_of):
        for (name, p), q in zip(narrow.named_parameters(), wider.parameters()):
            if p.dim() == 1:
                q.copy_(p.repeat(r))
            elif name == "embed_in.weight":
                q.zero_()[:c.vocab_size] = p.repeat(1, r)
            elif name in norm_of:
                g, b = (t.float() for t in norm_of[name].parameters())
                q[:c.vocab_size] = p.repeat(1, r) / r
                q[c.vocab_size:] = (-50 / (b / g).sum() / g).repeat(r) / r
            else:
                q.copy_(p.repeat(r, r) / r)

    fill(model, wide, {"embed_out.weight": model.final_layer_norm})
    fill(heads, wide_heads, {f"heads.{m}.out.weight": head.norm for m, head in enumerate(heads.heads)})
    return wide, wide_heads


# ---------------------------------------------------------------- other libraries, the loss's memory


def peer_times(model, prompts, max_new_tokens, repeats):
    """transformers' cached greedy generate on the same weights, plain and with prompt lookup: ms per token, and the texts."""
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError:
        raise InputError("--peer transformers: it is not installed; pip install transformers, or leave --peer out") from None
    peer = GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(model.config.to_dict())).to(model.embed_in.weight.dtype).eval()
    newer = {"embed_out.weight": "lm_head.weight"} if hasattr(peer, "lm_head") else {}   # its name since version 5
    peer.load_state_dict({newer.get(name, official_name(name)): p for name, p in model.named_parameters()})
    settings = {"transformers generate": {}, "transformers lookup": {"prompt_lookup_num_tokens": 10}}
    times, texts = {name: [] for name in settings}, {name: [] for name in settings}
    for repeat in range(repeats + 1):
        spent = dict.fromkeys(settings, 0.0)
        for prompt in prompts if repeat else prompts[:1]:
            for name, options in settings.items():
                begin = time.perf_counter()
                out = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                    max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False,
                                    pad_token_id=1, eos_token_id=None, **options)
                spent[name] += time.perf_counter() - begin
                if repeat == 1:
                    texts[name].append(out[0, len(prompt):].tolist())
        if repeat:
            for name, seconds in spent.items():
                times[name].append(1000 * seconds / len(prompts) / max_new_tokens)
    return {name: (sorted(t)[len(t) // 2], texts[name]) for name, t in times.items()}


def beside_peer(decoder, tuned, model, prompts, max_new_tokens, repeats):
    """Print and return the peers' times beside Plain's and DSSD auto's on the same prompts: medians, all with prefill."""
    found, runs = {}, run_in_turn(decoder, [Plain(), tuned], prompts, max_new_tokens, repeats=repeats)
    whole = {name: sorted(1000 * (s.prefill_seconds + s.decode_seconds) / len(prompts) / max_new_tokens for s, _ in r)[repeats // 2]
             for name, r in runs.items()}
    for name, (ms, texts) in peer_times(model, prompts, max_new_tokens, repeats).items():
        same = sum(a == b for a, b in zip(texts, runs["Plain"][0][1])) / len(texts)
        print(f"{name}: {ms:.2f} ms/token on {len(prompts)} prompts, prefill included; same text as Plain on {same:.0%}; Plain is "
              f"{ms / whole['Plain']:.2f} x, DSSD auto {ms / whole['DSSD auto']:.2f} x as fast")
        found[name] = {"ms_per_token": ms, "plain_is": ms / whole["Plain"], "dssd_is": ms / whole["DSSD auto"], "same_text": same}
    return found


def loss_peak(naive):
    """Peak memory in GB that one training step of 4 linear heads adds at V = 50,304 and 8 x 512 tokens (D = 128)."""
    torch.manual_seed(0)
    model = Pythia(PythiaConfig(50304, 128, 512, 5, 4)).requires_grad_(False)
    heads = ExitHeads(model, [1, 2, 3, 4])
    *hidden, last = torch.randn(5, 8, 512, 128)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if naive:
        full = model.unembed(last).flatten(0, 1)
        sum(kl(full, z.flatten(0, 1)) for z in heads.logits(hidden)).backward()
    else:
        distill_loss(heads, hidden, last)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9


def loss_memory():
    for name, naive in (("chunked", False), ("naive", True)):             # each in a process of its own, for its own peak
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(f"{name} loss, V = 50,304, 4 heads, 8 x 512 tokens: {pool.apply(loss_peak, (naive,)):.2f} GB at the peak")


# ---------------------------------------------------------------- policies side by side


def distinct(texts, n=4):
    """Share of distinct n-grams among all n-grams of the continuations: low where text loops."""
    grams = [tuple(t[i:i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def named(policy, name):
    policy.name = name
    return policy


def middle_of(run):
    """The Stats of the repeat whose time per token is the median, of one policy's [(Stats, texts) per repeat]."""
    return sorted((s for s, _ in run), key=lambda s: s.ms_per_token)[len(run) // 2]


def table(runs, prompts, bytes_per_second, temperature):
    """Print one line per policy; return {name: its numbers} and {name: median Stats}."""
    middle = {name: middle_of(run) for name, run in runs.items()}
    plain, plain_texts, record = middle["Plain"], runs["Plain"][0][1], {}
    print(f"{HEADER[0]:<22}" + "".join(f"{h:>10}" for h in (*HEADER[1:-1], "same tok.")) + "  roofline   min .. max ms/token")
    for name, s in middle.items():
        times = [r.ms_per_token for r, _ in runs[name]]
        pairs = [(a, b) for x, y in zip(runs[name][0][1], plain_texts) for a, b in zip(x, y)]
        same = sum(a == b for a, b in pairs) / len(pairs)
        roof = 1000 * s.bytes_per_token / bytes_per_second / s.ms_per_token
        print(row_of(name, s, plain.ms_per_token, "-" if temperature else f"{same:.0%}")
              + f"{roof:>10.0%}   {min(times):.2f} .. {max(times):.2f}", flush=True)
        record[name] = {"ms_per_token": s.ms_per_token, "min_ms": min(times), "max_ms": max(times),
                        "x_plain": plain.ms_per_token / s.ms_per_token, "acceptance": s.acceptance, "wasted": s.wasted, "tau": s.tau,
                        "draft_length": s.draft_length, "layers_per_token": s.layers_per_token, "cost_per_token_blocks": s.cost_per_token,
                        "prefill_ms": 1000 * s.prefill_seconds / len(prompts), "bytes_per_token": s.bytes_per_token,
                        "roofline": roof, "same_tokens": None if temperature else same}
    return record, middle


def tuned_on(decoder, model, heads, narrow, folder, args, temperature):
    """The automatic level; its record is made on `narrow`, (model, heads) of the same function, which is fast."""
    prompts = held_out_prompts(folder, 12, split="calibration")
    n = min(96, args.max_new_tokens)
    recorded = record(*narrow, prompts, n, temperature, decoder=decoder if narrow[0] is model else None)
    few = 2 if model.config.hidden_size > 512 else 1                      # a wide model is slow: it races on half, half as long
    return named(automatic(model, heads, prompts[::few], n // few, temperature, decoder=decoder, recorded=recorded), "DSSD auto")


def peak_memory(device, restart=False):
    """Peak memory in GB so far, on a GPU what torch allocated there; then, with restart, the peak counts from now on."""
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if restart and device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif restart and Path("/proc/self/clear_refs").exists():              # Linux; elsewhere the peak only ever rises
        Path("/proc/self/clear_refs").write_text("5")
    return peak / 1e9


def peak_memories(decoder, policies, prompt, args, temperature):
    """Print and return the peak so far and while each policy continues one prompt, in GB; all that is loaded counts."""
    found = {"so far": peak_memory(args.device, restart=True)}
    for policy in policies:
        generate(decoder, prompt, args.max_new_tokens, policy, temperature=temperature, seed=args.seed)
        found[policy.name] = peak_memory(args.device, restart=True)
    print("peak memory, all that is loaded included: " + ", ".join(f"{name} {gb:.3f} GB" for name, gb in found.items()))
    return found


def compare(decoder, model, heads, narrow, folder, prompts, args, temperature):
    """One part of the benchmark, greedy or sampled: LayerSkip's whole grid once, then its best beside the other policies."""
    tuned = tuned_on(decoder, model, heads, narrow, folder, args, temperature)
    options, title = {"temperature": temperature, "seed": args.seed}, f"sampled at {temperature}" if temperature else "greedy"
    grid, some = grid_of(heads), prompts[:max(1, len(prompts) // 4)]
    if not temperature:                                                   # the shared unembedding: original LayerSkip
        grid += [named(p, p.name + " tied") for p in grid_of(ExitHeads(model, heads.layers, "tied").requires_grad_(False))]
    print(f"\n{title}: LayerSkip's grid on {len(some)} prompts of "
          f"{len(prompts[0])} tokens x {args.max_new_tokens} new, once")
    runs = run_in_turn(decoder, [Plain(), tuned, *grid], some, args.max_new_tokens, repeats=1, **options)
    before = bandwidth(args.device)
    record, stats = table(runs, some, before, temperature)
    own = {p.name: stats[p.name] for p in grid if p.heads is heads}
    print(beside_grid("DSSD auto", stats["DSSD auto"], own))
    best = min(grid, key=lambda p: stats[p.name].ms_per_token)
    levels = [named(kind(heads, heads.thresholds(level)), f"{kind.__name__} {level:.2f}")
              for kind in (EarlyExit, DSSD) for level in (0.80, 0.90, 0.95)]
    policies = [Plain(), *levels, best, tuned]
    runs = run_in_turn(decoder, policies, prompts, args.max_new_tokens, repeats=args.repeats, **options)
    after = bandwidth(args.device)                                        # on a shared machine it changes
    texts = runs["Plain"][0][1]
    print(f"\n{title}: {len(prompts)} prompts x {args.max_new_tokens} new "
          f"tokens, {args.repeats} repeats; {distinct(texts):.0%} of the 4-grams in Plain's text are distinct; prefill "
          f"{1000 * runs['Plain'][0][0].prefill_seconds / len(prompts):.1f} ms; memory read at {before / 1e9:.1f} GB/s before and "
          f"{after / 1e9:.1f} after, the roofline is by the mean")
    main_record, _ = table(runs, prompts, (before + after) / 2, temperature)
    peaks = peak_memories(decoder, policies, prompts[0], args, temperature)
    if not temperature:
        report_gaps(model, prompts, texts, runs["DSSD auto"][0][1], args.dtype)
    setting = {"thresholds": [str(t) if t == float("inf") else t for t in tuned.thresholds], "max_draft": tuned.max_draft}
    return {"grid": record, "policies": main_record, "peak_memory_gb": peaks, "distinct_4grams": distinct(texts),
            "best_layerskip": best.name, "automatic": setting, "gigabytes_per_second": (before + after) / 2e9}, tuned


def first_gaps(model, prompts, texts, others):
    """The full model's top-2 logit gap where each pair of continuations first differs: near 0 for a flipped near-tie."""
    gaps = []
    for prompt, a, b in zip(prompts, texts, others):
        i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if i is not None:
            top = model(torch.tensor([prompt + a[:i]], device=model.embed_in.weight.device))[0][0, -1].float().topk(2).values
            gaps.append((top[0] - top[1]).item())
    return gaps


def report_gaps(model, prompts, texts, others, dtype):
    """Print on how many prompts two greedy texts differ, and how near a tie the full model was where they first did."""
    gaps = first_gaps(model, prompts, texts, others)
    print(f"{dtype}: DSSD auto's text differs from Plain's on {len(gaps)} of {len(prompts)} prompts"
          + (f"; the full model's top-2 logit gap at the first difference: median {sorted(gaps)[len(gaps) // 2]:.3f}, largest "
             f"{max(gaps):.3f}" if gaps else ""))


# ---------------------------------------------------------------- how cost grows


def pace(decoder, policies, prompts, n, repeats=3):
    """The Stats of each policy's median repeat on prompts x n new tokens, run in turn."""
    return [middle_of(run) for run in run_in_turn(decoder, policies, prompts, n, repeats=repeats).values()]


def growth(decoder, model, heads, folder, tuned, widths, bytes_per_second):
    """Tokens per second by context length and by width, of Plain, DSSD and Plain's roofline; and by the depth at which tokens leave.

    DSSD keeps the setting that was tuned for the model as it is and for short prompts.
    """
    def both(decoder, heads, prompts, n):
        plain, dssd = pace(decoder, [Plain(), replace(tuned, heads=heads)], prompts, n)
        return plain.tokens_per_second, dssd.tokens_per_second, bytes_per_second / plain.bytes_per_token

    L, context = model.config.num_hidden_layers, model.config.max_position_embeddings
    found = {"context": [], "width": [], "depth": []}
    long = toy_windows("test", 2 * context, context, folder).tolist()
    for n in [n for n in (128, 256, 512, 1024, 1920) if n + 64 <= context]:
        found["context"].append((n, *both(decoder, heads, [ids[:n] for ids in long], 64)))
    prompts = held_out_prompts(folder, 2)
    tied = ExitHeads(model, range(1, L), "tied").requires_grad_(False)
    for n in sorted({1, 2, L // 4, L // 2, 3 * L // 4, L - 1}):           # the text is of no use, its pace is
        stats, = pace(decoder, [EarlyExit(tied, always(tied, n), fill="copy")], prompts, 64)
        found["depth"].append((n, stats.tokens_per_second))
    for r in widths:
        wide, wide_heads = widen(model, heads, r)
        found["width"].append((r * model.config.hidden_size, *both(fast(wide), wide_heads, prompts, 24)))
    for name, unit in (("context", "tokens in the prompt"), ("width", "hidden size")):
        print(f"tokens/s by {unit}, Plain / DSSD auto / Plain's roofline: "
              + ", ".join(f"{n:,}: {a:.0f} / {b:.0f} / {roof:.0f}" for n, a, b, roof in found[name]))
    print("tokens/s if every token left at a depth (keys and values copied): " + ", ".join(f"{n}: {a:.0f}" for n, a in found["depth"]))
    return found


def draw_growth(path, found):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for a, name, label in zip(axes, ("context", "width"), ("tokens in the prompt", "hidden size D (the toy widened)")):
        x, plain, dssd, roof = zip(*found[name])
        a.plot(x, plain, "o-", color="#31688e", label="Plain")
        a.plot(x, dssd, "s--", color="#b8860b", label="DSSD auto")
        a.plot(x, roof, ":", color="grey", label="Plain's roofline")
        a.set(xlabel=label, ylabel="tokens/s", xscale="log", yscale="log" if name == "width" else "linear")
        a.set_xticks(x, [f"{n:,}" for n in x])
        a.minorticks_off()
        a.legend()
    axes[0].set_ylim(bottom=0)
    axes[2].plot(*zip(*found["depth"]), "o-", color="#440154")
    axes[2].set(xlabel="depth at which every token leaves (blocks)", ylabel="tokens/s", ylim=(0, None))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(path, cost, parts):
    """Speed against acceptance of every policy, greedy and sampled, and what further rows cost."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(parts) + 1, figsize=(4.3 * (len(parts) + 1), 3.8), layout="constrained")
    for a, (title, part) in zip(axes, parts.items()):
        for kind, marker, colour in (("LayerSkip", "o", "#31688e"), (" tied", "x", "#440154"), ("DSSD", "*", "#b8860b")):
            # all points are of the grid's run, but for the levels, which only the second one has
            chosen = {n: r for n, r in {**part["policies"], **part["grid"]}.items() if r["acceptance"] == r["acceptance"]
                      and (n.endswith(kind) if kind == " tied" else n.startswith(kind) and not n.endswith(" tied"))}
            label = {"LayerSkip": "LayerSkip, these heads", " tied": "LayerSkip, shared unembedding"}.get(kind, kind)
            a.scatter([r["acceptance"] for r in chosen.values()], [r["x_plain"] for r in chosen.values()], marker=marker, c=colour,
                      s=90 if kind == "DSSD" else 22, label=label, zorder=2 + (kind == "DSSD"))
        a.axhline(1, color="grey", lw=0.8, ls=":")
        a.set(title=title, xlabel="acceptance rate", ylabel="speed (x Plain)", xlim=(-0.03, 1.03), ylim=(0, None))
    axes[0].legend(fontsize=7)
    rows = range(1, len(cost["block"]) + 1)
    axes[-1].plot(rows, [ms / cost["block"][0] for ms in cost["block"]], "o-", color="#35b779", label="measured")
    axes[-1].plot(rows, rows, ":", color="grey", label="as many times as rows")
    axes[-1].set(title="what further rows cost", xlabel="rows in one pass", ylabel="time (x one row)", ylim=(0, len(rows)))
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- accuracy against cost on tasks
# Zero-shot, scored as lm-evaluation-harness scores the version-0 tasks of Pythia's published results. At the time it
# encoded context and continuation apart, later together as encode_pair does; on these files the ids are the same.
TASKS = {"lambada": ("lambada_openai.jsonl", ("acc", "ppl")), "piqa": ("piqa_valid.jsonl", ("acc", "acc_norm")),
         "arc_easy": ("arc_easy.jsonl", ("acc", "acc_norm")), "winogrande": ("winogrande_dev.jsonl", ("acc",)),
         "arc_challenge": ("arc_challenge.jsonl", ("acc", "acc_norm")), "code": (None, ("acc", "token_acc"))}


def pairs_of(name, d):
    """One JSON object of a task's file -> [(context, continuation)] per choice, and the index of the right one."""
    if name == "lambada":
        context, word = d["text"].rsplit(" ", 1)
        return [(context, " " + word)], 0
    if name == "winogrande":                                              # the choices are in the contexts
        return [(context, " " + d["continuation"]) for context in d["context_options"]], d["gold"]
    if name == "piqa":
        question, choices, gold = d["goal"], (d["sol1"], d["sol2"]), d["label"]
    else:                                                                 # ARC; its labels are A .. E or 1 .. 5
        question, choices = d["question"]["stem"], [c["text"] for c in d["question"]["choices"]]
        gold = [c["label"] for c in d["question"]["choices"]].index(d["answerKey"])
    return [("Question: " + question + "\nAnswer:", " " + choice) for choice in choices], gold


def read_task(name, folder, limit=None):
    """The first `limit` examples of a task's file, each as pairs_of() gives it. InputError where it cannot be read."""
    path, labels = Path(folder) / TASKS[name][0], None
    try:
        lines = path.read_text("utf-8").rstrip().split("\n")
        if name == "piqa":                                                # its labels are a file of their own
            labels = path.with_name("piqa_valid-labels.lst").read_text("utf-8").split()
            if len(labels) != len(lines):
                raise ValueError(f"{path} has {len(lines):,} lines, its labels are {len(labels):,}")
    except (OSError, ValueError) as error:
        raise InputError(f"task {name}: {error}; --task-dir must be the folder that holds its files") from None
    examples = []
    for n, line in enumerate(lines[:limit]):
        try:
            d = json.loads(line)
            pairs, gold = pairs_of(name, {**d, "label": int(labels[n])} if labels else d)
            if type(gold) is not int or not 0 <= gold < len(pairs) or not all(isinstance(c, str) for c, _ in pairs):
                raise ValueError(f"no choice {gold!r}, or a context is no text")
            examples.append((pairs, gold))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {n + 1} is no example of {name} ({error!r}); correct it") from None
    return examples


def encode_pair(tokenizer, context, continuation, max_len):
    """The last max_len + 1 ids of context and continuation, read as one text, and how many are the continuation's."""
    before = tokenizer.encode(context.rstrip())                           # white space at its end is scored, too
    after = tokenizer.encode(context + continuation)[len(before):]
    if not 0 < len(after) <= max_len:
        raise InputError(f"{continuation[:40]!r} adds {len(after)} tokens to its context; it must add 1 .. {max_len}")
    return ((before or [tokenizer.end]) + after)[-max_len - 1:], len(after)   # of nothing follows <|endoftext|>


def code_rows(folder, windows):
    """Held-out windows of 256 tokens of the standard library as rows for score(), and the slices of their lines.

    All tokens but a window's first are scored. A line of two tokens or more is given up to its middle, and completed if
    each further one, the newline too, is the argmax: given the true tokens, that is what greedy decoding writes.
    """
    newline = {i for i, text in Tokenizer.load(folder).bytes.items() if b"\n" in text}
    rows = [(ids, len(ids) - 1) for ids in toy_windows("test", 256 * windows, 256, folder).tolist()]
    ends = [[i for i, token in enumerate(ids) if token in newline] for ids, _ in rows]
    return rows, [[slice((a + b) // 2, b) for a, b in zip(e, e[1:]) if b - a > 2] for e in ends]


def read_on(model, heads, ids, caches):
    """Ids (B, T) after what the caches hold: what every head's matrix, then the model's unembedding, reads, [(B, T, D)]."""
    x, at, found = model.embed(ids), 0, []
    for n, head, cache in zip(heads.layers, heads.heads, caches[1:]):
        x, at = model.run(x, at, n, caches[0]), n
        found.append(head.body(x, cache))
    return [*found, model.run(x, at, model.config.num_hidden_layers, caches[0])]


@torch.inference_mode()
def score(model, heads, readers, rows, name="rows", batch_tokens=2048):
    """Log-probability in nats, argmax match (0 or 1) and cost in block-equivalents of scored tokens, (3, R, n) by row.

    rows [(ids, n)]: the last n ids are scored. readers: R lists of thresholds, one or None per exit; a token's logits
    come from the first certain head, else from the full model. The cost is theirs alone, the depth and the heads
    consulted: the tokens before have exact keys and values (EarlyExit's fill="exact"), which are not counted.
    Rows with the same ids before what is scored, a question with several choices, have them read once and cached.
    """
    L, device, exits, own = model.config.num_hidden_layers, model.embed_in.weight.device, heads.layers, heads.heads
    outputs = [[0 if t is None else head.cost() for head, t in zip(own, r)] + [full_cost(model) - L] for r in readers]
    costs = [torch.tensor(token_costs([*exits, L], output)) for output in outputs]       # (M + 1,) per reader
    before = [tuple(ids[:-n - 1]) for ids, n in rows]                     # the last id before is the first input of its row
    often = Counter(before)
    before = [prefix if often[prefix] > 1 else () for prefix in before]   # what one row alone has is not worth a pass of its own
    order, found = sorted(range(len(rows)), key=lambda i: (len(before[i]), before[i], -len(rows[i][0]))), {}
    progress = Progress(len(rows), "sequences")
    while len(found) < len(rows):
        P = len(before[order[len(found)]])
        part = [i for i in order[len(found):][:max(1, batch_tokens // (P + 1))] if len(before[i]) == P]
        T = max(len(rows[i][0]) for i in part) - 1 - P                    # inputs of the longest
        part = part[:max(1, batch_tokens // (P + T))]
        prefixes = list(dict.fromkeys(before[i] for i in part))           # the distinct ones
        caches = [m.new_cache(len(prefixes), P + T) for m in (model, *own)]
        if P:
            read_on(model, heads, torch.tensor(prefixes, device=device), caches)
        for cache in filter(None, caches):                                # from one entry per prefix to one per row
            cache.pick([prefixes.index(before[i]) for i in part])
        ids = pad_sequence([torch.tensor(rows[i][0][P:]) for i in part], batch_first=True).to(device)   # on the right
        end, n = torch.tensor([(len(rows[i][0]) - 1 - P, rows[i][1]) for i in part], device=device).T[:, :, None]   # (B, 1)
        place = torch.arange(ids.shape[1] - 1, device=device)
        scored = (place >= end - n) & (place < end)                       # (B, T), before the padding, so blind to it
        bodies, target = read_on(model, heads, ids[:, :-1], caches), ids[:, 1:][scored]   # (B, T, D) each; (S,)
        seen, read, every = [], [], torch.arange(len(target))
        for head, h in zip((*own, None), bodies):                         # logits (S, V) of one head at a time
            z = head.output(h[scored]) if head else model.unembed(h[scored])
            logprob = z.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
            seen.append(torch.stack((logprob, z.argmax(-1) == target, entropy(z))).cpu())
        seen = torch.stack(seen, 1)                                       # (3, M + 1, S), the full model last
        for reader, cost in zip(readers, costs):
            at = torch.stack([*map(is_certain, seen[2], reader), every >= 0]).int().argmax(0)   # (S,) the first certain
            read.append(torch.stack((*seen[:2, at, every], cost[at])))
        found.update(zip(part, torch.stack(read, 1).split(n.flatten().tolist(), -1)))
        progress.show(len(found), f"scoring {name}")
    return [found[i] for i in range(len(rows))]


def accuracies(examples, scores):
    """Examples [(pairs, gold)] and the scores of all their pairs in order -> {measure: (R,)}.

    acc: the right choice has the largest log-probability; acc_norm: the largest per character, the space in front not
    counted. An example of one continuation is right if each of its tokens is the argmax. ppl is per continuation.
    """
    scores, found = iter(scores), []
    for pairs, gold in examples:
        own = [next(scores) for _ in pairs]
        logprob = torch.stack([s[0].sum(-1) for s in own])                # (choices, R)
        characters = torch.tensor([max(1, len(text) - 1) for _, text in pairs])[:, None]
        right = logprob.argmax(0) == gold if len(pairs) > 1 else own[0][1].all(-1)
        found.append(torch.stack((right, (logprob / characters).argmax(0) == gold, logprob[gold])))
    acc, acc_norm, logprob = torch.stack(found).double().mean(0)
    return {"acc": acc, "acc_norm": acc_norm, "ppl": (-logprob).exp()}


def run_tasks(model, heads, folder, names, task_dir=None, limit=None, levels=(0.80, 0.90, 0.95)):
    """Print and return accuracy and cost by task and reader; `limit` counts examples, of code windows of 256 tokens."""
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f"--tasks: unknown {', '.join(map(repr, unknown))}; the tasks are {', '.join(TASKS)}")
    if limit is not None and limit < 1 or not task_dir and set(names) != {"code"}:
        raise InputError("--tasks needs the files' folder as --task-dir (not for code), and --task-limit at least 1")
    tokenizer, max_len, record = Tokenizer.load(folder), model.config.max_position_embeddings, {}
    files = {name: read_task(name, task_dir, limit) for name in names if name != "code"}   # all, before the long work
    readers = {"full": [None] * len(heads.layers),
               **{f"exit {n}": always(heads, n) for n in heads.layers},
               **{f"level {level:.2f}": heads.thresholds(level) for level in levels}}
    for name in names:
        rows = [encode_pair(tokenizer, *pair, max_len) for pairs, _ in files.get(name, []) for pair in pairs]
        spans = [[slice(None)]] * len(rows)                               # one continuation per row; in code, many
        if name == "code":
            rows, spans = code_rows(folder, limit or 128)
        scores = score(model, heads, list(readers.values()), rows, name)
        parts = [s[..., span] for s, own in zip(scores, spans) for span in own]
        examples = files.get(name, [([("", " ")], 0)] * len(parts))
        _, token_acc, cost = torch.cat(scores, -1).double().mean(-1)
        values = {**accuracies(examples, parts), "token_acc": token_acc, "cost": cost}
        columns, count = (*TASKS[name][1], "cost"), sum(n for _, n in rows)
        print(f"{len(examples):,} examples, {count:,} scored tokens; cost per scored token, in block-equivalents\n"
              f"{'task':<15}{'reader':<12}" + "".join(f"{c:>11}" for c in columns))
        for r, reader in enumerate(readers):
            cells = (f"{values[c][r]:.1%}" if "acc" in c else f"{values[c][r]:.4g}" for c in columns)
            print(f"{name:<15}{reader:<12}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
        record[name] = {"examples": len(examples), "scored_tokens": count, "readers": {
            reader: {c: values[c][r].item() for c in columns} for r, reader in enumerate(readers)}}
    return record


# ---------------------------------------------------------------- command line


def without_nan(value):
    """The same with None for what is undefined, such as the acceptance of a policy that never drafts."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value


def finish(record, args):
    """The run's options and results as one line of JSON, also to --json FILE."""
    text = json.dumps(without_nan({"options": {**vars(args), "model": str(args.model)}, **record}), allow_nan=False)
    print(text)
    if args.json:
        with written_whole(args.json) as temporary:
            temporary.write_text(text + "\n", "utf-8")


def arguments():
    parser = argparse.ArgumentParser(description="Speed, acceptance and cost of every decoding policy.")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--heads", help="heads file (default: heads-fast.safetensors in the model's folder)")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts of 64 tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    parser.add_argument("--widen", type=int, default=1, help="times as wide, the function unchanged")
    parser.add_argument("--vocab", type=int, default=0, help="rows to pad the unembedding to")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of every policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=("transformers",), help="another library to compare with, where installed")
    parser.add_argument("--json", help="also write the JSON object to this file")
    parser.add_argument("--figures", default=".", help="folder for bench.png and growth.png")
    parser.add_argument("--tasks", type=lambda text: text.split(","), metavar="NAMES",
                        help=f"only score tasks, of {', '.join(TASKS)}, joined by commas")
    parser.add_argument("--task-dir", help="folder of the tasks' JSONL files; code needs none")
    parser.add_argument("--task-limit", type=int, help="examples per task (default: all; of code 128 windows)")
    parser.add_argument("--loss-memory", action="store_true", help="only measure the memory of the heads' loss")
    args = parser.parse_args()
    if min(args.prompts, args.repeats) < 1 or args.max_new_tokens < 2:
        raise InputError("--prompts and --repeats must be at least 1, --max-new-tokens at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here; use cpu")
    for option, folder in (("--figures", args.figures), ("--json", Path(args.json or "").parent)):
        if not Path(folder).is_dir():
            raise InputError(f"{option}: there is no folder {folder}; make it first")
    if args.tasks and (args.widen != 1 or args.vocab or args.peer):
        raise InputError("--tasks scores the model as it is; leave --widen, --vocab and --peer out")
    if args.peer and args.device != "cpu":
        raise InputError("--peer compares on the CPU; leave --device out")
    return args


def main():
    args = arguments()
    if args.loss_memory:
        return loss_memory()
    folder = locate(args.model)
    model = Pythia.from_pretrained(folder, args.device, getattr(torch, args.dtype))
    heads = ExitHeads.load(args.heads or folder / "heads-fast.safetensors", model)
    if args.tasks:
        return finish({"tasks": run_tasks(model, heads, folder, args.tasks, args.task_dir, args.task_limit)}, args)
    prompts = held_out_prompts(folder, args.prompts)
    narrow = model, heads
    if args.widen != 1 or args.vocab:
        model, heads = widen(model, heads, args.widen, args.vocab)
    decoder, machine, bytes_per_second = fast(model), hardware(args.device), bandwidth(args.device)
    c = model.config
    print(f"{machine}; memory read at {bytes_per_second / 1e9:.1f} GB/s; {args.dtype}, L = {c.num_hidden_layers}, "
          f"D = {c.hidden_size:,}, V = {c.vocab_size:,}, {heads.kind} heads at {', '.join(map(str, heads.layers))}")
    cost = measure(decoder, heads, 16)
    print("what a second row costs: one block at 128 cached positions, "
          + ", ".join(f"{1000 * cost['block'][n - 1]:.0f} us for {n}" for n in (1, 2, 4, 8, 16)) + " rows; beside its blocks a draft takes "
          + ", ".join(f"{1000 * ms:.0f} us at exit {n}" for n, ms in zip(heads.layers, cost["head"]))
          + f"; beside its blocks a pass to full depth {1000 * cost['full'][0]:.0f} us")
    differences = report_rows(decoder, args.dtype)
    parts, tuned = {}, {}
    for title, temperature in (("greedy", 0.0), ("sampled at 0.8", 0.8)):
        parts[title], tuned[title] = compare(decoder, model, heads, narrow, folder, prompts, args, temperature)
    record = {"machine": machine, "gigabytes_per_second": bytes_per_second / 1e9, "cost_ms": cost, "row_dependence": differences, **parts}
    if args.device == "cuda":
        print(f"\nwith CUDA graphs, greedy: {len(prompts)} prompts x {args.max_new_tokens} new tokens, {args.repeats} repeats")
        graphed = fast(model, graphs=True)
        policies = [Plain(), tuned_on(graphed, model, heads, narrow, folder, args, 0.0)]
        for prompt in prompts:                                            # every pass is captured before it is timed
            for policy in policies:
                generate(graphed, prompt, args.max_new_tokens, policy)
        runs = run_in_turn(graphed, policies, prompts, args.max_new_tokens, repeats=args.repeats)
        record["graphs"], _ = table(runs, prompts, bytes_per_second, 0.0)
    if args.peer:
        record["peer"] = beside_peer(decoder, tuned["greedy"], model, prompts[:8], args.max_new_tokens, args.repeats)
    draw(Path(args.figures) / "bench.png", cost, parts)
    if args.widen == 1 and args.device == "cpu":
        widths = [r for r in (1, 4, 8, 16) if r * c.hidden_size <= 2048]  # 2,048 takes 11 GB in all
        record["growth"] = growth(decoder, model, heads, folder, tuned["greedy"], widths, bytes_per_second)
        draw_growth(Path(args.figures) / "growth.png", record["growth"])
    finish(record, args)


if __name__ == "__main__":
    command_line(main)
