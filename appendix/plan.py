"""What a run of train.py will need, before any weight is loaded: `train.py ... --dry-run`.

    python train.py --model pythia-2.8b --dry-run       no network, no files, some seconds
    python train.py --model FOLDER --head lowrank --dtype bfloat16 --batch 4 --dry-run

Shapes are enough. The model and its heads are built on torch's "meta" device, where a parameter
has a shape but no memory. A folder needs its config.json only, the ten official shapes stand below.

Memory. P parameters of heads, N = B T positions at a time, e bytes per number of the backbone.
All else is float32, 4 bytes:

    backbone            e x its parameters. It is frozen: no gradients, no optimizer
    heads               4 P, and 4 P for the gradients
    optimizer           8 P: AdamW keeps two numbers per parameter, Muon one
    residual streams    e (M + 1) N D: one at every exit, and the last
    one block           e N (2 I + 3 D), I the width inside its MLP: what it computes and lets go
    the heads' bodies   what the gradient needs: 4 N x (2 D + inputs and outputs of all matrices
                        but the last), per head
    the loss            for 1,024 positions and one head at a time: (e + 4) x 1,024 V for logits,
                        4 D V for a gradient that is added to the last one (if the head has a
                        matrix of its own), and 7 times the rows computed with at once (4 MB on
                        a CPU, all 1,024 on a GPU)

Calibration and test need less. Python, torch and its buffers take 0.5 to 0.8 GB more.

Time. A model of the same width with 2 blocks, one head and at most 8,192 tokens of vocabulary, all
random, takes a step. Its seconds are scaled to the real number of multiplications, apart for the
blocks and for unembedding and heads. It is a guess, and reading text is not in it.

Letters: D hidden size, V vocabulary, L blocks, M exits, B windows at a time, T tokens of a window.
"""
from dataclasses import replace
from pathlib import Path

import torch

from heads import CHUNK, ExitHeads, rows_at_once
from model import InputError, Pythia, PythiaConfig, read_json
from train import MEASURED, Training, make_heads

# D, L, attention heads, V. All have I = 4 D; each also with -deduped
SHAPES = {"pythia-14m": (128, 6, 4, 50304), "pythia-31m": (256, 6, 8, 50304),
          "pythia-70m": (512, 6, 8, 50304), "pythia-160m": (768, 12, 12, 50304),
          "pythia-410m": (1024, 24, 16, 50304), "pythia-1b": (2048, 16, 8, 50304),
          "pythia-1.4b": (2048, 24, 16, 50304), "pythia-2.8b": (2560, 32, 32, 50304),
          "pythia-6.9b": (4096, 32, 32, 50432), "pythia-12b": (5120, 36, 40, 50688)}
DEAR = 5e8                            # parameters of all heads' own matrices


def config_of(name_or_dir):
    """The PythiaConfig of a folder or an official name. InputError for anything else."""
    if Path(name_or_dir).is_dir():
        path = Path(name_or_dir) / "config.json"
        return PythiaConfig.from_dict(read_json(path, "is this a model's folder?"))
    plain = str(name_or_dir).removeprefix("EleutherAI/").removesuffix("-deduped")
    if plain not in SHAPES:
        raise InputError(f"{plain!r} is neither a folder nor an official name; the "
                         f"names are {', '.join(SHAPES)}, each also with -deduped")
    D, L, H, V = SHAPES[plain]
    return PythiaConfig(V, D, 4 * D, L, H)


def count(module):
    return sum(p.numel() for p in module.parameters())


def memory(training, length):
    """What takes memory, all at the same time: {what: bytes}."""
    model, heads, args = training.model, training.heads, training.args
    config, M = model.config, len(heads.layers)
    D, V, N = config.hidden_size, config.vocab_size, args.batch * length
    e = model.embed_out.weight.element_size()
    # 1. parameters and what belongs to them
    state = 0
    for part, _ in training.optimizer.parts:
        numbers = sum(p.numel() for p in part.param_groups[0]["params"])
        state += (8 if isinstance(part, torch.optim.AdamW) else 4) * numbers
    # 2. what the gradients of the heads need: inputs and outputs of the matrices inside
    inside = 2 * D * M
    for name, p in heads.named_parameters():
        if p.dim() == 2 and not name.endswith("out.weight"):
            inside += sum(p.shape)
    # 3. the loss
    chunk = min(CHUNK, N)
    rows = min(chunk, rows_at_once(V, torch.device(args.device)))
    logits = (e + 4) * chunk * V + 7 * 4 * rows * V
    added = 4 * D * V if heads.heads[0].owns_matrix else 0
    return {"the frozen model": e * count(model),
            "heads": 4 * count(heads),
            "their gradients": 4 * count(heads),
            "their optimizer's state": state,
            f"residual streams at {M + 1} depths": e * (M + 1) * N * D,
            "one block at work": e * N * (2 * config.intermediate_size + 3 * D),
            "the heads' bodies, for the gradients": 4 * N * inside,
            f"the loss, {CHUNK:,} positions at a time": logits + added}


def seconds(training, length):
    """Of one step: blocks; unembedding and heads; optimizer. Measured on a small model, scaled."""
    args, config = training.args, training.model.config
    small = replace(config, num_hidden_layers=2, vocab_size=min(config.vocab_size, 8192))
    model = Pythia(small).to(args.device, getattr(torch, args.dtype)).requires_grad_(False)
    heads = ExitHeads(model, [1], training.heads.kind).float().train()
    trial = Training(model, heads, args, training.team)
    B = 1 if args.device == "cpu" else args.batch
    ids = torch.randint(small.vocab_size, (B, length), device=args.device)
    notice = torch.zeros(1, device=args.device)
    for _ in range(2):                    # the first step only warms up
        trial.seconds = [0.0, 0.0, 0.0]
        trial.step(iter([ids] * args.accumulate), notice)
    pairs = zip(trial.seconds, training.multiplications(), trial.multiplications())
    blocks, others = [time * real / tried * args.batch / B for time, real, tried in pairs]
    return blocks, others, trial.seconds[2] * count(training.heads) / count(heads)


def spoken(seconds):
    """A time in a unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"


# ---------------------------------------------------------------- what is printed


def show_heads(model, heads, name):
    config = model.config
    print(f"plan of {heads.kind} heads on {name}: {len(model.layers)} blocks of width "
          f"{config.hidden_size:,}, {count(model):,} parameters; a token at full depth costs "
          f"{config.full_cost:.2f} block-equivalents")
    print("exit  parameters  head's cost (blocks)")
    for layer, head in zip(heads.layers, heads.heads):
        print(f"{layer:4d}  {count(head):10,}  {head.cost():20.2f}")
    matrices = sum(head.out.weight.numel() for head in heads.heads if head.owns_matrix)
    if matrices > min(DEAR, config.num_hidden_layers * config.block_weights):
        print(f"these heads are dear: their own matrices, {config.hidden_size:,} to "
              f"{config.vocab_size:,}, have {matrices:,} parameters in all; "
              f"--head lowrank or tied borrows the model's")


def show_memory(training, length):
    args, parts = training.args, memory(training, length)
    print(f"\nGB of memory, {args.batch} windows of {length:,} tokens at a time, {args.dtype}")
    for what, size in parts.items():
        print(f"{size / 1e9:8.2f}  {what}")
    print(f"{sum(parts.values()) / 1e9:8.2f}  at most at once")


def show_time(training, length):
    args, size = training.args, training.team.size
    learned = args.steps * args.batch * args.accumulate * size * length
    print(f"\n{learned:,} tokens to train on, {2 * MEASURED:,} to calibrate and to test on"
          + ", and the model writes text first" * ("self" in args.data), flush=True)
    blocks, others, optimizer = seconds(training, length)
    step = blocks + others + optimizer
    # no gradients, but the measures: about as long for a token
    test = (blocks + others) * args.steps * 2 * MEASURED / learned
    print(f"about {spoken(step)} a step, {spoken(step * args.steps)} to train, {spoken(test)} to "
          f"calibrate and test: a trial of 2 random blocks and a head, scaled")


def plan(args, team):
    """Print what the run of these arguments of train.py will need. Nothing is written."""
    if Path(args.start).is_file():
        raise InputError(f"--dry-run plans new heads: instead of --start {args.start} give the "
                         f"--head and --layers of that file")
    config = config_of(args.model)
    with torch.device("meta"):
        model = Pythia(config).to(getattr(torch, args.dtype)).requires_grad_(False)
        heads = make_heads(args, model)
        training = Training(model, heads, args, team)
    length = max(1, min(args.length, config.max_position_embeddings - 1))
    show_heads(model, heads, Path(args.model).resolve().name)
    show_memory(training, length)
    show_time(training, length)
