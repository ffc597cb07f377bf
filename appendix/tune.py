"""Side room: what drafting costs on this machine, as appendix/gain.py weighs it.

Whether a draft pays depends on the machine. So a few policies decode, and the clock is read:

    plain         a step of plain decoding: T
    question      a head is asked before every step, and never certain: T + question
    one draft     every round takes one draft from the first exit: T + first + its row
    four drafts   T + first + 3 further + their rows
    rows          passes of 1 to 17 rows to full depth: what one more row of a verification costs

The two with drafts are AutoDSSD's rule, told that drafts are free. So its own time is part of a
draft's cost. It is not part of a question's, where it would be about a twelfth.

A first draft costs more than a later one: it splits the pass to full depth. A draft from a deeper
exit costs more by the blocks up to there. Rows cost little up to a point: then a library's kernel
has to read the weights a second time. What the text says does not matter, so the prompt is one
token, repeated. Attention reads every cached position. Costs are therefore measured twice, with few
positions cached and with many, and the rule takes the line between.

    python -m appendix.tune             the costs, and what acceptance a first draft then needs
    python -m appendix.tune --hard      then DSSD auto, Plain and a fixed LayerSkip on hard texts
Expect on the toy a question to cost 0.2 of a plain step, a first draft 0.5, and a later one less
than 0.4.
"""
import argparse
import math
import time
from functools import partial
from pydoc_data.topics import topics
from statistics import fmean, median

import torch

from appendix.fast import fast, least_ms
from appendix.gain import AutoDSSD, Costs
from dssd import DSSD, LayerSkip, Log, Plain, generate, stream, summarize
from heads import FAST, load_model, model_options
from model import InputError, command_line

HARD = (("code", 64, 0.0), ("English", 64, 0.0), ("random", 64, 0.0), ("code", 64, 0.8),
        ("English", 64, 0.8), ("English", 64, 1.2), ("random", 64, 1.0), ("code", 1024, 0.0),
        ("English", 1024, 0.0), ("code", 1900, 0.0))      # text, tokens of the prompt, temperature
MORE, ROUNDS = 3, 12             # drafts after the first, where they are timed; rounds of a repeat
ROWS = 17                        # of the longest pass: a token and 16 drafts
LONGEST, FORBIDDEN = 10, 1e9     # seconds of repeats; milliseconds of what is not to happen


def measure_costs(decoder, heads, temperature=0.0, repeats=20):
    """Costs of the decoder with its heads, with few and with many positions cached: two Costs."""
    context = decoder.config.max_position_embeddings
    return [costs_at(max(1, n), decoder, heads, temperature, repeats)
            for n in (context // 16, context // 2)]


def costs_at(positions, decoder, heads, temperature, repeats):
    """Costs with about this many positions cached, from the first exit: heads are of one kind."""
    exit, *others = heads.layers
    never = [-math.inf, *(None for _ in others)]
    # where drafts from the first exit cost nothing, the rule drafts up to its cap
    forbidden = [0.0, *(FORBIDDEN for _ in others)]
    free = [Costs(n, 1.0, 0.0, 0.0, 0.0, forbidden, [0.0] * ROWS) for n in (0, 1)]
    policies = ((Plain(), 0), (DSSD(heads, never), 0), (AutoDSSD(heads, free, 1), 1),
                (AutoDSSD(heads, free, 1 + MORE), 1 + MORE))      # and the drafts of a round
    repeated, begin = [], time.perf_counter()
    while len(repeated) < repeats and (not repeated or time.perf_counter() - begin < LONGEST):
        rounds = [usual_round_ms(decoder, policy, drafts, positions, temperature)
                  for policy, drafts in policies]
        repeated.append([*rounds, *rows_ms(decoder, positions)])
    # a machine that is shared is slow at times: of all repeats, those with the faster half of the
    # policies' rounds count
    repeated.sort(key=lambda times: sum(times[:len(policies)]))
    faster = repeated[:(len(repeated) + 1) // 2]
    plain, asking, one, several, *passes = [fmean(times) for times in zip(*faster)]
    # what more rows cost more than one: never less than fewer rows do
    rows = [max(0.0, min(passes[n:]) - passes[0]) for n in range(ROWS)]
    # a draft from a deeper exit: that many more blocks for its row, which the verification lacks
    L = decoder.config.num_hidden_layers
    deeper = [max(0.0, plain - rows[1]) * (n - exit) / L for n in heads.layers]
    return Costs(positions, plain, question=max(0.0, asking - plain),
                 first=max(0.0, one - plain - rows[1]),
                 further=max(0.0, (several - one - rows[1 + MORE] + rows[1]) / MORE),
                 deeper=deeper, rows=rows)


def usual_round_ms(decoder, policy, drafts, positions, temperature):
    """The median time of a policy's rounds of so many drafts, after a prompt."""
    log, most = Log(), (1 + drafts) * ROUNDS + 2
    tokens = stream(decoder, [1] * positions, most, policy, temperature=temperature, log=log)
    next(tokens)                          # after the prompt
    times = [round_ms(tokens, log, drafts) for _ in range(ROUNDS)]
    return median([ms for ms in times if ms < math.inf] or [math.inf])


@torch.inference_mode()
def rows_ms(decoder, positions):
    """The times of passes of 1, 2, .. ROWS rows to full depth, as a verification takes."""
    config = decoder.config
    L, most = config.num_hidden_layers, min(ROWS, config.max_position_embeddings - positions)
    x, cache = decoder.embed([[1] * (positions + most)]), decoder.new_cache(1, positions + most)
    decoder.run(x[:, :positions], 0, L, cache)

    def verification(n):
        out = decoder.run(x[:, :n], 0, L, cache)                          # (1, n, D)
        decoder.unembed(out).argmax(-1).tolist()
        cache.truncate(positions)

    times = [least_ms(partial(verification, n)) for n in range(1, most + 1)]
    return times + times[-1:] * (ROWS - most)


def round_ms(tokens, log, drafts):
    """The time of the next round of a stream. Infinite, if it has fewer drafts or none comes, as
    in a short context."""
    begin, done = time.perf_counter(), len(log.rounds)
    while len(log.rounds) == done and next(tokens, None):
        pass
    spent = 1000 * (time.perf_counter() - begin)
    return spent if len(log.rounds) > done and log.rounds[-1][0] == drafts else math.inf


def automatic(decoder, heads, temperature=0.0):
    """AutoDSSD with the costs of this machine. decoder, heads: what will decode, as fast twins."""
    return AutoDSSD(heads, measure_costs(decoder, heads, temperature))


def show(costs, heads):
    """Print Costs, and the chance p from which drafts pay."""
    print(f"{costs.positions} positions cached: a plain step takes {costs.plain:.2f} ms, "
          f"a question {costs.question:.2f} ms more")
    for exit, deeper in zip(heads.layers, costs.deeper):
        row, later = costs.rows[1], (costs.rows[1 + MORE] - costs.rows[1]) / MORE
        first, further = costs.first + deeper + row, costs.further + deeper + later
        print(f"  exit {exit}: a round's first draft {first:.2f} ms, pays alone from p = "
              f"{first / costs.plain:.2f} on; "
              f"each later one {further:.2f} ms, {further / costs.plain:.2f}")


def hard_texts(tokenizer, text):
    """{name: ids} to cut prompts from: code, English (Python's help topics), random tokens."""
    english = tokenizer.encode("\n".join(topics.values()))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(tokenizer.vocab_size, (30000,), generator=generator)
    code = text.splits["test"].tolist()
    return {"code": code, "English": english, "random": noise.tolist()}


def hard(decoder, twins, tokenizer, text, prompts, repeats):
    """Print a line for each of HARD: DSSD auto beside Plain and a fixed LayerSkip, in turn."""
    texts, (_, new) = hard_texts(tokenizer, text), text.fit(64, 96)
    fixed = LayerSkip(twins, twins.layers[0], MORE)
    policies = {bool(t): automatic(decoder, twins, t) for t in (0.0, 0.8)}
    print(f"{prompts} prompts x {new} tokens, the fastest of {repeats} repeats each; x Plain of "
          f"{fixed.name} and of DSSD auto, then what DSSD auto did\n"
          f"{'text':<8}{'prompt':>8}{'temperature':>13}{'Plain ms':>10}{'fixed':>7}{'auto':>6}"
          f"{'acceptance':>12}{'tokens/round':>14}  tokens by depth")
    for name, length, temperature in HARD:
        length = min(length, text.context - new)
        step = (len(texts[name]) - length) // prompts
        cut = [texts[name][i * step:i * step + length] for i in range(prompts)]
        auto = policies[bool(temperature)]
        (plain_ms, fixed_ms, auto_ms), done = in_turn(decoder, (Plain(), fixed, auto), cut, new,
                                                      temperature, repeats)
        s = summarize(auto, done)
        depths = ", ".join(f"{depth}: {n}" for depth, n in sorted(s.exits.items()))
        line = (f"{name:<8}{length:>8}{temperature:>13}{plain_ms:>10.2f}"
                f"{plain_ms / fixed_ms:>7.2f}{plain_ms / auto_ms:>6.2f}"
                f"{s.acceptance:>12.2f}{s.tau:>14.2f}  {depths}")
        print(line.replace("nan", "  -"), flush=True)


def in_turn(decoder, policies, prompts, new, temperature, repeats):
    """Milliseconds per token of each policy, and what the last one wrote.

    Of every prompt's repeats the fastest counts: a machine that is shared is slow at times.
    """
    spent, done = [0.0] * len(policies), []
    for seed, ids in enumerate(prompts):
        fastest = [math.inf] * len(policies)
        for _ in range(repeats):
            for i, policy in enumerate(policies):
                out = generate(decoder, ids, new, policy, temperature=temperature, seed=seed)
                fastest[i] = min(fastest[i], 1000 * out.decode_seconds / (len(out.tokens) - 1))
        spent = [a + b / len(prompts) for a, b in zip(spent, fastest)]
        done.append(out)
    return spent, done


def main():
    parser = argparse.ArgumentParser(description="What drafting costs on this machine.")
    model_options(parser, FAST, data=False)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--repeats", type=int, default=3, help="of each prompt of --hard")
    parser.add_argument("--hard", action="store_true", help="DSSD auto beside Plain, on ten cases")
    parser.add_argument("--prompts", type=int, default=4, help="of each case of --hard")
    parser.add_argument("--readable", action="store_true", help="without the fast twin")
    args = parser.parse_args()
    if min(args.repeats, args.prompts) < 1:
        raise InputError("--repeats and --prompts must be at least 1")
    model, heads, tokenizer, text = load_model(args, FAST)
    decoder, twins = (model, heads) if args.readable else fast(model, heads)
    print(f"{torch.get_num_threads()} threads")
    for costs in measure_costs(decoder, twins, args.temperature):
        show(costs, twins)
    if args.hard:
        hard(decoder, twins, tokenizer, text, args.prompts, args.repeats)


if __name__ == "__main__":
    command_line(main)
