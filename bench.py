"""Chapter 7. What it costs, what it buys: every policy side by side in one run.

Decoding one sequence is bound by moving weights, not by arithmetic: a step with T rows reads every matrix once,
as a step with one row does. If T rows cost little more than one, verifying drafts is nearly free and
speculation pays what its acceptance promises; if they cost T times as much, it cannot pay at all. So the first
thing printed is this curve on this machine ("what a second row costs"), beside the memory bandwidth. On a
toy that fits the cache the overhead of each call counts as well.

The policies run in turn on every prompt, after a warm-up, several times over; the figures are medians over the
repeats, with the least and the most, and the ratios are within one run. Greedy text of a small model falls into loops, which
flatter every speculative method: the share of distinct 4-grams in the continuations is printed.

    python bench.py                                      the toy, its fast heads, greedy
    python bench.py --heads toy/heads.safetensors        the paper's heads
    python bench.py --temperature 0.8
    python bench.py --peer transformers                  beside another library, where it is installed
    python bench.py --loss-memory                        what training heads costs in memory, chunked and not

The last line of stdout is one JSON object (also --json FILE). Expect about three minutes on two CPU cores.
"""
import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path

import torch

from dssd import (DRAFT_LENGTHS, DSSD, HEADER, EarlyExit, LayerSkip, Plain, automatic, fast, first_gaps, held_out_prompts,
                  measure, ratio, row_of, run_in_turn)
from heads import ExitHeads, distill_loss, kl
from model import TOY, InputError, Pythia, PythiaConfig, command_line, locate


def hardware():
    """One line: processor, threads, versions, and the bandwidth of reading a large tensor, in GB/s."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                     if line.startswith("model name")), name)
    x = torch.ones(64 * 2 ** 20)                                          # 256 MB: no cache holds it
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - begin)
    bandwidth = x.numel() * 4 / sorted(times)[2] / 1e9
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; memory read at {bandwidth:.1f} GB/s"


def distinct(texts, n=4):
    """Share of distinct n-grams among all n-grams of the continuations: low where text loops."""
    grams = [tuple(t[i:i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def peer_times(folder, prompts, max_new_tokens, repeats):
    """transformers' cached greedy generate on the same weights, plain and with prompt lookup: ms per token, and the texts."""
    try:
        from transformers import GPTNeoXForCausalLM
    except ImportError:
        raise InputError("--peer transformers: it is not installed; pip install transformers, or leave --peer out") from None
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"transformers generate": {}, "transformers lookup": {"prompt_lookup_num_tokens": 10}}
    times, texts = {name: [] for name in settings}, {name: [] for name in settings}
    for repeat in range(repeats + 1):
        spent = dict.fromkeys(settings, 0.0)
        for prompt in prompts if repeat else prompts[:1]:
            for name, options in settings.items():
                begin = time.perf_counter()
                out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                     max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False,
                                     pad_token_id=1, eos_token_id=None, **options)
                spent[name] += time.perf_counter() - begin
                if repeat == 1:
                    texts[name].append(out[0, len(prompt):].tolist())
        if repeat:
            for name, seconds in spent.items():
                times[name].append(1000 * seconds / len(prompts) / max_new_tokens)
    return {name: (sorted(t)[len(t) // 2], texts[name]) for name, t in times.items()}


def without_nan(value):
    """The same with None for what is undefined, such as the acceptance of a policy that never drafts."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and value != value else value


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


def main():
    parser = argparse.ArgumentParser(description="Speed, acceptance and cost of every decoding policy.")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--heads", help="heads file (default: heads-fast.safetensors in the model's folder)")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts of 64 tokens")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of every policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=("transformers",), help="another library to compare with, where installed")
    parser.add_argument("--json", help="also write the JSON object to this file")
    parser.add_argument("--loss-memory", action="store_true", help="only measure the memory of the heads' loss")
    args = parser.parse_args()
    if args.loss_memory:
        for name, naive in (("chunked", False), ("naive", True)):         # each in a process of its own, for its own peak
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"{name} loss, V = 50,304, 4 heads, 8 x 512 tokens: {pool.apply(loss_peak, (naive,)):.2f} GB at the peak")
        return
    if min(args.prompts, args.repeats) < 1 or args.max_new_tokens < 2:
        raise InputError("--prompts and --repeats must be at least 1, --max-new-tokens at least 2")
    folder = locate(args.model)
    model = Pythia.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    heads = ExitHeads.load(args.heads or folder / "heads-fast.safetensors", model)
    decoder = fast(model)
    machine = hardware()
    print(machine)
    cost = measure(decoder, heads, 8)
    print("what a second row costs: one block at 128 cached positions, "
          + ", ".join(f"{1000 * cost['block'][n - 1]:.0f} us for {n}" for n in (1, 2, 4, 8)) + " rows; a head "
          + ", ".join(f"{1000 * ms:.0f} us at exit {n}" for n, ms in zip(heads.layers, cost["head"]))
          + f"; unembedding {1000 * cost['full'][0]:.0f} us", flush=True)

    prompts = held_out_prompts(folder, args.prompts)
    tuned = automatic(model, heads, held_out_prompts(folder, 16, split="calibration"), temperature=args.temperature)
    tuned.name = "DSSD auto"
    grid = [LayerSkip(heads, n, k) for n in heads.layers for k in DRAFT_LENGTHS]
    levels = [(f"{kind.__name__} {level:.2f}", kind(heads, heads.thresholds(level))) for level in (0.80, 0.90, 0.95)
              for kind in (EarlyExit, DSSD)]
    for name, policy in levels:
        policy.name = name
    policies = [Plain(), tuned, *(p for _, p in levels), *grid]
    runs = run_in_turn(decoder, policies, prompts, args.max_new_tokens, args.temperature, repeats=args.repeats, seed=args.seed)
    middle = {name: sorted((s for s, _ in r), key=lambda s: s.ms_per_token)[len(r) // 2] for name, r in runs.items()}
    plain_ms, plain_texts = middle["Plain"].ms_per_token, runs["Plain"][0][1]
    print(f"\n{args.prompts} held-out prompts of 64 tokens x {args.max_new_tokens} new, temperature {args.temperature}, "
          f"{args.repeats} repeats; distinct 4-grams in Plain's text: {distinct(plain_texts):.0%}; prefill "
          f"{1000 * middle['Plain'].prefill_seconds / args.prompts:.1f} ms")
    print(f"{HEADER[0]:<22}" + "".join(f"{h:>10}" for h in HEADER[1:]) + "   min .. max ms/token")
    record = {"machine": machine, "options": {**vars(args), "model": str(args.model)}, "policies": {}}
    for policy in policies:
        s, times = middle[policy.name], [r.ms_per_token for r, _ in runs[policy.name]]
        same = sum(a == b for a, b in zip(runs[policy.name][0][1], plain_texts)) / len(prompts)
        print(row_of(policy.name, s, plain_ms, f"{same:.0%}" if not args.temperature else "-")
              + f"   {min(times):.2f} .. {max(times):.2f}")
        record["policies"][policy.name] = {
            "ms_per_token": s.ms_per_token, "min_ms": min(times), "max_ms": max(times), "x_plain": plain_ms / s.ms_per_token,
            "acceptance": s.acceptance, "wasted": s.wasted, "tau": s.tau, "draft_length": s.draft_length,
            "layers_per_token": s.layers_per_token, "cost_per_token_blocks": s.cost_per_token, "same_text": same}

    gaps = first_gaps(model, prompts, plain_texts, runs["DSSD auto"][0][1]) if not args.temperature else []
    if gaps:
        print(f"{args.dtype}: DSSD auto's text differs from Plain's on {len(gaps)} of {len(prompts)} prompts; the full model's "
              f"top-2 logit gap at the first difference: median {sorted(gaps)[len(gaps) // 2]:.3f}, largest {max(gaps):.3f}")
    names = [p.name for p in grid]
    mean = {k: sum(getattr(middle[n], k) for n in names) / len(names) for k in ("acceptance", "wasted", "ms_per_token")}
    fastest = min(names, key=lambda n: middle[n].ms_per_token)
    most = max(names, key=lambda n: middle[n].acceptance)
    auto = middle["DSSD auto"]
    print(f"\nLayerSkip's grid ({len(names)} settings): mean acceptance {mean['acceptance']:.2f}, mean wasted {mean['wasted']:.0f} "
          f"tokens; fastest {fastest}, highest acceptance {most} ({middle[most].acceptance:.2f})")
    for name in ("DSSD auto", "DSSD 0.80", "DSSD 0.90", "DSSD 0.95"):
        s = middle[name]
        print(f"{name}: acceptance {ratio(s.acceptance, mean['acceptance'])} x the grid's mean, "
              f"{ratio(s.acceptance, middle[fastest].acceptance)} x the fastest's, {ratio(s.acceptance, middle[most].acceptance)} x "
              f"the highest; wasted {s.wasted} tokens, 1/{mean['wasted'] / max(1, s.wasted):.1f} of the mean, "
              f"1/{middle[fastest].wasted / max(1, s.wasted):.1f} of the fastest's; speed "
              f"{middle[fastest].ms_per_token / s.ms_per_token:.2f} x the fastest")
    record["grid"] = {**mean, "fastest": fastest, "highest_acceptance": most}
    if args.peer:
        # the peers time prefill with decoding, so ours is counted with it here
        for name, (ms, texts) in peer_times(folder, prompts, args.max_new_tokens, args.repeats).items():
            whole = {k: (1000 * (middle[k].prefill_seconds + middle[k].decode_seconds) / len(prompts) / args.max_new_tokens)
                     for k in ("Plain", "DSSD auto")}
            same = sum(a == b for a, b in zip(texts, plain_texts)) / len(texts)
            print(f"{name}: {ms:.2f} ms/token, prefill included; same text as Plain {same:.0%}; Plain is {ms / whole['Plain']:.2f} x, "
                  f"DSSD auto {ms / whole['DSSD auto']:.2f} x as fast")
            record[name] = {"ms_per_token": ms, "plain_is": ms / whole["Plain"], "dssd_is": ms / whole["DSSD auto"], "same_text": same}
    text = json.dumps(without_nan(record), allow_nan=False)
    if args.json:
        Path(args.json + ".tmp").write_text(text + "\n")
        os.replace(args.json + ".tmp", args.json)
    print(text)


if __name__ == "__main__":
    command_line(main)
