"""Chapter 2. Exit heads that learn without labels (arXiv 2407.21082).

A frozen model predicts at its last depth L. An exit head at depth n < L reads the residual stream h after
n blocks and guesses what the full model would say:

    z_head = W norm(h)                                  norm: LayerNorm, W: D -> V without bias
    loss   = KL( softmax(z_full) || softmax(z_head) )   mean over positions and heads

No labels are needed, any text will do, and the model can even write the text itself (`self_text`): this is
what "self-supervised" means. Only the heads learn; the backbone is never touched.

Kinds, all starting from the model's own final norm and unembedding (the "logit lens") unless told otherwise (but for
the hidden layer of mlp, which starts at random):
    linear    norm, D -> V                                        the paper's
    mlp       norm, D -> D, GELU, D -> V
    tied      norm, the backbone's own unembedding                LayerSkip's exit; only the norm learns
    lowrank   norm, x + (D -> r -> D) x, the own unembedding      few parameters, for large vocabularies
    block     h + S h' with h' the position before, a transformer block of its own (starting as the backbone's
              next block, with its own keys and values), norm, D -> V                beyond the paper
The token shift S, a matrix D -> D that starts at 0, is what lets one block copy: to continue a text as it went on the last
time ("induction"), the key of a position must tell which token stood before it (Olsson et al. 2022, smeared keys).
The kinds besides linear, the logit-lens start and the mixing of written text are additions of this project.

    python heads.py             a table of agreement with the full model per exit, where blocks look at the previous
                                token, and heads.png: the top prediction at every depth for one line of code
    python heads.py --steps 40  also every kind after the same short training, about two minutes
"""
import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import TOY, Block, InputError, KVCache, Pythia, Tokenizer, command_line, written_whole

KINDS = ("linear", "mlp", "tied", "lowrank", "block")


# ---------------------------------------------------------------- text to learn from


def stdlib_documents(tests=False):
    """The source of this Python's standard library, [(relative name, text)]; with `tests` its test package too.

    encodings and pydoc_data are left out: they are generated tables, not code that someone wrote.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if skip & set(parts) or not tests and {"test", "tests", "idle_test"} & set(parts):
            continue
        try:
            documents.append(("/".join(parts), path.read_bytes().decode("utf-8")))
        except UnicodeDecodeError:                                        # a few files test other encodings
            continue
    return documents


def split_of(name):
    """train, calibration or test: by a hash of the document's relative name, 80 : 10 : 10."""
    h = hashlib.sha256(name.encode()).digest()[0]
    return "test" if h < 26 else "calibration" if h < 52 else "train"


def tokens_of(documents, tokenizer):
    """Documents [(name, text)] as one stream of ids (N,), each closed by <|endoftext|>."""
    ids = [i for _, text in documents for i in (*tokenizer.encode(text), tokenizer.end)]
    return torch.tensor(ids, dtype=torch.long)


def toy_windows(split, tokens, length=256, folder=TOY):
    """About `tokens` tokens of the standard library's given split, as spread-out windows (n, length)."""
    documents = [d for d in stdlib_documents() if split_of(d[0]) == split]
    stream = tokens_of(documents, Tokenizer.load(folder))
    all_windows = stream[:len(stream) // length * length].view(-1, length)
    if not len(all_windows):
        raise InputError("this Python's standard library has no source files here; give a text with --data")
    return all_windows[::max(1, len(all_windows) * length // tokens)][:max(1, tokens // length)]


@torch.inference_mode()
def self_text(model, prefixes, length, temperatures=(0.0, 0.8), seed=0):
    """Text that the model writes itself: continue prefixes (B, P) to `length` tokens -> ids (B, length).

    Row b is written at temperatures[b % n], 0 being greedy. Start from <|endoftext|> to need no corpus at all.
    """
    generator = torch.Generator(prefixes.device).manual_seed(seed)
    B, P = prefixes.shape
    t = torch.tensor(temperatures, device=prefixes.device).repeat(B)[:B, None]       # (B, 1)
    cache, new, out = model.new_cache(B, length), prefixes, [prefixes]
    for _ in range(length - P):
        x = model.run(model.embed(new), 0, model.config.num_hidden_layers, cache)
        logits = model.unembed(x[:, -1]).float()                                     # (B, V)
        # Gumbel: argmax(z / t + g) samples softmax(z / t), and is greedy at t = 0
        noise = -torch.log(torch.empty_like(logits).exponential_(generator=generator))
        new = (logits + t * noise).argmax(-1, keepdim=True)                          # (B, 1)
        out.append(new)
    return torch.cat(out, 1)                                                         # (B, length)


# ---------------------------------------------------------------- the heads


class BlockCache(KVCache):
    """What a block head remembers: its block's keys and values, and the states that it has read, after a zero."""

    def __init__(self, config, batch, max_len, device, dtype):
        super().__init__(config, batch, max_len, device, dtype, blocks=1)
        self.seen = torch.zeros(batch, 1 + max_len, config.hidden_size, device=device, dtype=dtype)

    def push(self, h):
        """Keep the states h of the next positions (B, T, D); return those of the positions before them (B, T, D)."""
        n, T = self.length[0], h.shape[1]
        self.check_room(n + T)
        self.seen[:, n + 1:n + 1 + T] = h
        return self.seen[:, n:n + T]

    def pick(self, entries):
        super().pick(entries)
        self.seen = self.seen[entries]


class ExitHead(nn.Module):
    """One head: residual stream (B, T, D) at its depth -> logits (B, T, V).

    `body` gives what the final matrix reads (B, T, D); for kind "block" it runs the token shift and the head's own
    block, with a BlockCache in decoding. `output` applies the matrix, alone so that it can run in chunks.
    """

    def __init__(self, model, layer, kind="linear", start="lens"):
        super().__init__()
        D, V, like = model.config.hidden_size, model.config.vocab_size, model.embed_out.weight
        self.kind = kind
        self.backbone = (model,)                                          # in a tuple: used here, not owned
        self.norm = nn.LayerNorm(D, eps=model.config.layer_norm_eps)
        if kind == "block":
            self.shift = nn.Linear(D, D, bias=False)
            nn.init.zeros_(self.shift.weight)                             # starts as the backbone's next block
            self.block = Block(model.config)
        if kind == "mlp":
            self.hidden = nn.Linear(D, D)
        if kind == "lowrank":
            self.down, self.up = nn.Linear(D, D // 8, bias=False), nn.Linear(D // 8, D, bias=False)
            nn.init.zeros_(self.up.weight)                                # starts as the logit lens
        if kind not in ("tied", "lowrank"):
            self.out = nn.Linear(D, V, bias=False)
        self.to(like.device, like.dtype)
        if start == "lens":
            self.norm.load_state_dict(model.final_layer_norm.state_dict())
            if kind == "block":
                self.block.load_state_dict(model.layers[layer].state_dict())
            if kind not in ("tied", "lowrank"):
                self.out.load_state_dict(model.embed_out.state_dict())

    def body(self, h, cache=None):
        h = h.to(self.norm.weight.dtype)                                  # heads may learn in float32 on a bfloat16 backbone
        if self.kind == "block":
            model = self.backbone[0]
            T, offset = h.shape[1], cache.length[0] if cache else 0
            h = h + self.shift(cache.push(h) if cache else F.pad(h, (0, 0, 1, -1)))
            h = self.block(h, model.angles(offset, T, h), model.mask(offset, T, h), cache)
        x = self.norm(h)                                                  # (B, T, D)
        if self.kind == "mlp":
            x = F.gelu(self.hidden(x))
        if self.kind == "lowrank":
            x = x + self.up(self.down(x))
        return x

    def output(self, x):
        matrix = self.backbone[0].embed_out if self.kind in ("tied", "lowrank") else self.out
        return matrix(x.to(matrix.weight.dtype))                          # (B, T, V)

    def forward(self, h, cache=None):
        return self.output(self.body(h, cache))

    def new_cache(self, batch=1, max_len=None):
        """The BlockCache of a block head; None for the other kinds, which look at one position only."""
        config, w = self.backbone[0].config, self.norm.weight
        length = max_len or config.max_position_embeddings
        return BlockCache(config, batch, length, w.device, w.dtype) if self.kind == "block" else None

    def cost(self):
        """Multiply-adds per token in block-equivalents: the head's matrices over those of one block."""
        D, V, I = (getattr(self.backbone[0].config, f) for f in ("hidden_size", "vocab_size", "intermediate_size"))
        own = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return (own + (D * V if self.kind in ("tied", "lowrank") else 0)) / (4 * D * D + 2 * D * I)


def full_cost(model):
    """Cost of a token at full depth in block-equivalents: L blocks and the unembedding."""
    c = model.config
    return c.num_hidden_layers + c.hidden_size * c.vocab_size / (
        4 * c.hidden_size ** 2 + 2 * c.hidden_size * c.intermediate_size)


def check_layers(layers, depth):
    """Raise InputError unless layers are increasing whole numbers in 1 .. depth - 1."""
    if not layers or any(not 1 <= n < depth for n in layers) or any(a >= b for a, b in zip(layers, layers[1:])):
        raise InputError(f"layers {layers} must be increasing whole numbers between 1 and {depth - 1}: "
                         f"blocks executed before the exit, of {depth} in this model")


def fingerprint(model):
    """A short name of a backbone: a hash of its shape and of some of its weights.

    The same whether F16 weights, as the official ones are, are read as float16, bfloat16 or float32.
    """
    h = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    first, last = model.layers[0], model.layers[-1]
    for w in (model.embed_out.weight, first.attention.query_key_value.weight, last.mlp.dense_4h_to_h.weight):
        h.update(w[:16].detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


class ExitHeads(nn.Module):
    """The heads of one backbone at increasing depths `.layers`, and the thresholds that calibration found.

    `.calibration` maps a level, written with two digits ("0.95"), to one threshold on the entropy in nats, or
    None, per exit (arXiv 2407.21082, calibration by level).
    """

    def __init__(self, model, layers, kind="linear", start="lens"):
        super().__init__()
        check_layers(layers, model.config.num_hidden_layers)
        if kind not in KINDS:
            raise InputError(f"head kind {kind!r} is not one of {', '.join(KINDS)}")
        self.layers, self.kind, self.calibration = list(layers), kind, {}
        self.backbone = (model,)
        self.heads = nn.ModuleList(ExitHead(model, n, kind, start) for n in layers)

    def logits(self, hidden):
        """Residual streams [(B, T, D)] at .layers -> [(B, T, V)]."""
        return [head(h) for head, h in zip(self.heads, hidden)]

    def thresholds(self, level):
        """One threshold or None per exit for a level of agreement, e.g. 0.95. InputError if not calibrated for it."""
        found = self.calibration.get(f"{level:.2f}")
        if found is None or abs(level - round(level, 2)) > 1e-9:
            known = sorted(self.calibration) or ["none"]
            raise InputError(f"these heads are not calibrated for level {level}; levels: {known[0]} .. {known[-1]}, step 0.01")
        return found

    def save(self, path):
        """Write a safetensors file (F16) with kind, layers, calibration and the backbone's fingerprint, atomically."""
        info = {"kind": self.kind, "layers": self.layers, "calibration": self.calibration,
                "backbone": fingerprint(self.backbone[0])}
        tensors = {name: p.detach().half().contiguous() for name, p in self.named_parameters()}
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"nanoexit": json.dumps(info)})

    @classmethod
    def load(cls, path, model):
        """Read what save() wrote. InputError if it is missing, damaged, no heads file, or of another backbone."""
        try:
            with safe_open(path, framework="pt") as f:
                info = json.loads((f.metadata() or {}).get("nanoexit", "null"))
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a heads file ({error}); train heads with train.py") from None
        if not isinstance(info, dict) or {"kind", "layers", "calibration", "backbone"} - set(info):
            raise InputError(f"{path} holds no exit heads (its metadata lacks 'nanoexit'); train heads with train.py")
        if info["backbone"] != fingerprint(model):
            raise InputError(f"the heads in {path} were trained on another backbone (fingerprint {info['backbone']}, "
                             f"this model's is {fingerprint(model)}); train heads for this model with train.py")
        heads = cls(model, info["layers"], info["kind"])
        try:
            heads.load_state_dict(tensors)
        except RuntimeError as error:
            raise InputError(f"the tensors in {path} do not fit its description: {' '.join(str(error).split())}") from None
        heads.calibration = info["calibration"]
        return heads.requires_grad_(False).eval()


# ---------------------------------------------------------------- the self-supervised loss


def kl(full, head):
    """Sum over positions of KL(softmax(full) || softmax(head)); logits (N, V)."""
    return F.kl_div(head.log_softmax(-1), full.log_softmax(-1), reduction="sum", log_target=True)


def topk_kl(full, head, k=32):
    """KL over the k tokens that the full model likes best, both sides renormalised over them."""
    full, at = full.topk(min(k, full.shape[-1]), -1)                      # (N, k)
    return kl(full, head.gather(-1, at))


def hard(full, head, weight=0.1):
    """The paper's first version: (1 - weight) CE(head, argmax full) - weight H(softmax(head)), summed."""
    logp = head.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum()
    return (1 - weight) * F.nll_loss(logp, full.argmax(-1), reduction="sum") - weight * entropy


def distill_loss(heads, hidden, last, loss=kl, chunk=1024):
    """Mean loss per position of every head (M,), with the gradients added to the heads' parameters.

    hidden: residual streams [(B, T, D)] at heads.layers; last: at depth L. The full model's logits and each
    head's exist for `chunk` positions at a time and one head at a time, forward and backward, so that memory
    does not grow with V x T x M. Without autograd (torch.no_grad) it only evaluates.
    """
    learn = torch.is_grad_enabled()
    model, N = heads.backbone[0], last.shape[0] * last.shape[1]
    bodies = [head.body(h).flatten(0, 1) for head, h in zip(heads.heads, hidden)]    # (N, D) each
    leaves = [body.detach().requires_grad_(learn) for body in bodies]
    total = torch.zeros(len(bodies), device=last.device)
    for i in range(0, N, chunk):
        with torch.no_grad():
            full = model.unembed(last.flatten(0, 1)[i:i + chunk]).float()            # (chunk, V)
        for m, (head, leaf) in enumerate(zip(heads.heads, leaves)):
            part = loss(full, head.output(leaf[i:i + chunk]).float()) / N
            if learn:
                part.backward()
            total[m] += part.detach()
    if learn:
        for body, leaf in zip(bodies, leaves):
            body.backward(leaf.grad)
    return total


# ---------------------------------------------------------------- the chapter's demonstration


@torch.inference_mode()
def agreement(heads, ids, batch=8):
    """Share of tokens on which each head's argmax is the full model's, (M,), over windows ids (n, T)."""
    model, same = heads.backbone[0], torch.zeros(len(heads.layers))
    for rows in ids.split(batch):
        full, hidden = model(rows, exits=heads.layers)
        same += torch.stack([(z.argmax(-1) == full.argmax(-1)).sum() for z in heads.logits(hidden)])
    return same / ids.numel()


def train_briefly(model, heads_by_kind, ids, steps, batch=8, lr=2e-3):
    """All kinds side by side on the same batches, by AdamW alone: one frozen forward pass serves them all."""
    layers = next(iter(heads_by_kind.values())).layers
    optimizer = torch.optim.AdamW([p for heads in heads_by_kind.values() for p in heads.parameters()], lr=lr)
    for step in range(steps):
        rows = ids[step * batch % len(ids):][:batch]
        with torch.no_grad():
            *hidden, last = model.hidden_states(rows, (*layers, model.config.num_hidden_layers))
        for heads in heads_by_kind.values():
            distill_loss(heads, hidden, last)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def previous_token_attention(model, ids):
    """The largest mean attention that a head of each block pays to the previous token, [L], on windows ids (n, T).

    To copy what followed the last time ("induction"), a block needs such a head in an earlier one. Without their token
    shift, block heads at and after the depth where this is near 1 learned to copy, the ones before did not.
    """
    x, found = model.embed(ids), []
    rope, hidden = model.angles(0, ids.shape[1], x), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for layer in model.layers:
        q, (k, _) = layer.attention.project(layer.input_layernorm(x), rope)          # (n, H, T, K)
        weight = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(weight.diagonal(-1, -2, -1).mean((0, 2)).max().item())
        x = layer(x, rope)
    return found


@torch.inference_mode()
def draw_lens(path, model, tokenizer, text):
    """The logit lens: the model's own norm and unembedding at every depth of one line of text, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ids = torch.tensor([tokenizer.encode(text)])
    L = model.config.num_hidden_layers
    p = torch.cat([model.unembed(h) for h in model.hidden_states(ids, range(L + 1))]).softmax(-1)   # (L + 1, T, V)
    value, guess = p.max(-1)                                              # (L + 1, T)
    figure, axes = plt.subplots(figsize=(0.62 * ids.shape[1] + 1.5, 0.3 * L + 1.5), layout="constrained")
    image = axes.imshow(value, origin="lower", aspect="auto", cmap="cividis", vmin=0, vmax=1)

    def name(token):
        return tokenizer.decode([token]).encode("unicode_escape").decode().replace("$", r"\$").replace(" ", "\u00b7")

    for depth in range(L + 1):
        for t in range(ids.shape[1]):
            right = guess[depth, t] == guess[-1, t]
            axes.text(t, depth, name(guess[depth, t].item())[:8], ha="center", va="center", fontsize=6, family="monospace",
                      color="white" if value[depth, t] < 0.6 else "black", fontweight="bold" if right else "normal")
    axes.set_xticks(range(ids.shape[1]), [name(i) for i in ids[0].tolist()], fontsize=7, family="monospace", rotation=45)
    axes.set(xlabel="input token", ylabel="depth (blocks executed)", title="top prediction by depth; bold: the full model's")
    figure.colorbar(image, label="its probability")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description="Exit heads of the toy: how often they agree with the full model, at what cost.")
    parser.add_argument("--heads", help="another heads file to show (default: the two that come with the toy)")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens to measure on")
    parser.add_argument("--steps", type=int, default=0, help="also train every kind for so many steps and compare them")
    parser.add_argument("--figure", default="heads.png", help="where the logit-lens picture goes")
    args = parser.parse_args()
    if args.tokens < 1 or args.steps < 0:
        raise InputError("--tokens must be at least 1 and --steps at least 0")
    torch.manual_seed(0)
    model, tokenizer = Pythia.from_pretrained(TOY), Tokenizer.load(TOY)
    files = [args.heads] if args.heads else [TOY / "heads.safetensors", TOY / "heads-fast.safetensors"]
    rows = {Path(f).name: ExitHeads.load(f, model) for f in files}
    rows["tied, untrained (logit lens)"] = ExitHeads(model, [4, 8, 12], "tied")
    if args.steps:
        brief = {kind: ExitHeads(model, [4, 8, 12], kind) for kind in KINDS}
        train_briefly(model, brief, toy_windows("train", args.steps * 8 * 256), args.steps)
        rows.update({f"{kind}, {args.steps} steps": heads for kind, heads in brief.items()})
    test = toy_windows("test", args.tokens)
    print(f"agreement with the full model on {test.numel():,} held-out tokens; a full token costs {full_cost(model):.2f} blocks")
    print(f"{'heads':<30}{'kind':<9}{'depth':>6}{'agreement':>11}{'parameters':>12}{'cost (block-equivalents)':>26}")
    for name, heads in rows.items():
        for layer, head, share in zip(heads.layers, heads.heads, agreement(heads, test)):
            print(f"{name:<30}{head.kind:<9}{layer:>6}{share:>11.1%}{sum(p.numel() for p in head.parameters()):>12,}"
                  f"{head.cost():>26.2f}")
    print("largest mean attention of a block's heads to the previous token, blocks 1 .. "
          f"{model.config.num_hidden_layers}: " + ", ".join(f"{a:.2f}" for a in previous_token_attention(model, test[:8])))
    draw_lens(args.figure, model, tokenizer, "def read(self, size=-1):\n    return self.")
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    command_line(main)
