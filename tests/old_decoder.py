"""The decoder as it was before the frontier was rewritten: the oracle of test_old_decoder.py, for one commit."""
import functools
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from confidence import entropy, is_certain
from heads import KINDS, ExitHeads
from model import InputError

KIND = {made: kind for kind, made in KINDS.items()}


def full_cost(model):
    return model.config.full_cost


# ---------------------------------------------------------------- policies: four settings of one loop


@dataclass
class Policy:
    """What the decoding loop does; made by Plain, EarlyExit, LayerSkip and DSSD."""
    name: str
    heads: ExitHeads = None
    thresholds: tuple = ()        # one per head; None: never consulted
    max_draft: int = 0            # drafts pending at most
    verify: bool = True           # False: an exit's token is final
    veto: bool = False            # deeper heads may cut a round short
    fill: str = "exact"           # how positions that left early get deeper keys and values


def Plain():
    """The full model, token by token, cached."""
    return Policy("Plain")


def EarlyExit(heads, thresholds, fill="exact"):
    """The first certain head's token is final: fewer layers, other text. Not lossless.

    fill="exact" carries a position deeper when a later token needs its keys and values, in one batch;
    fill="copy" takes the deeper blocks' keys and values from its exit state (CALM, Schuster et al. 2022).
    """
    if fill not in ("exact", "copy"):
        raise InputError(f"fill {fill!r} must be 'exact' or 'copy'")
    return Policy("EarlyExit", heads, tuple(thresholds), verify=False, fill=fill)


def always(heads, exit):
    """Thresholds with which the head at depth `exit` is always certain, and no other consulted."""
    return tuple(float("inf") if n == exit else None for n in heads.layers)


def LayerSkip(heads, exit, draft_length):
    """A fixed exit drafts a fixed number of tokens (Elhoushi et al. 2024): the hand-tuned baseline."""
    if exit not in heads.layers or draft_length < 1:
        raise InputError(f"LayerSkip: exit {exit} must be one of {heads.layers} and the draft length at least 1")
    return Policy(f"LayerSkip {exit}x{draft_length}", heads, always(heads, exit), draft_length)


def DSSD(heads, thresholds, max_draft=8, veto=False):
    """Dynamic exit and dynamic draft length from the thresholds of one level."""
    if max_draft < 1:
        raise InputError("max_draft must be at least 1")
    return Policy("DSSD", heads, tuple(thresholds), max_draft, veto=veto)


# ---------------------------------------------------------------- a fast twin of the blocks


@functools.cache
def packs(dtype):
    """Whether oneDNN's packed products, which torch.compile uses but torch has no public name for, work here in this type."""
    try:
        if dtype != torch.float32 and (dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        x, w = torch.ones(1, 8, dtype=dtype), torch.ops.mkldnn._reorder_linear_weight(torch.eye(8, dtype=dtype), 16)
        return (torch.equal(torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], ""), x)
                and torch.equal(torch.ops.mkldnn._linear_pointwise.binary(x, x, w, None, "add"), 2 * x))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


class Product:
    """x -> x w + b for few rows x (T, n), with w (n, m) stored as this machine multiplies it fastest.

    On a CPU a plain product of few rows reads w at half the memory's speed or less, and in float32 two rows cost twice
    one. Packed into oneDNN's own layout it is read at nearly full speed, and eight rows cost little more than one. That pays
    in 16 bits, and in float32 from D = 256 on; smaller matrices are in the cache, and the call costs more than it saves.
    """

    def __init__(self, w, b, dtype):
        w, self.b = w.detach().to(dtype), None if b is None else b.detach().to(dtype)
        self.packed = w.device.type == "cpu" and packs(dtype) and (dtype != torch.float32 or min(w.shape) >= 256)
        self.least_rows = 4 if w.numel() >= 2 ** 20 else 1                # an EPYC multiplies 4 rows by a large w faster than 1 or 2
        if self.packed:
            self.w = torch.ops.mkldnn._reorder_linear_weight(w.T.contiguous(), 16)
        else:                                                             # float32 by rows, 16 bits as the transposed view
            self.w = w.contiguous() if dtype == torch.float32 else w.T.contiguous().T

    def __call__(self, x):
        """x w + b, a new tensor (T, m)."""
        if not self.packed:
            return x @ self.w if self.b is None else torch.addmm(self.b, x, self.w)
        return torch.ops.mkldnn._linear_pointwise.default(self.padded(x), self.w, self.b, "none", [], "")[:len(x)]

    def into(self, out, x):
        """out = x w + b, in place."""
        if self.packed or self.b is None or out.dtype != x.dtype:
            out.copy_(self(x))
        else:
            torch.addmm(self.b, x, self.w, out=out)

    def onto(self, rest, x):
        """rest + x w + b, a new tensor (T, m)."""
        if not self.packed:
            y = torch.addmm(rest, x, self.w)
            return y if self.b is None else y.add_(self.b)
        return torch.ops.mkldnn._linear_pointwise.binary(self.padded(x), self.padded(rest), self.w, self.b, "add")[:len(x)]

    def columns(self, first, last, x):
        """x w + b in columns first .. last - 1 alone: of an unpacked w no others are read."""
        if self.packed:
            return self(x)[:, first:last]
        return torch.addmm(self.b[first:last], x, self.w[:, first:last])

    def padded(self, x):
        return x if len(x) >= self.least_rows else F.pad(x, (0, 0, 0, self.least_rows - len(x)))


def fold(block, R):
    """A parallel block as two Products: w1 (D, 3D + I) and b1, then w2 (D + I, D) and b2, folded in float64.

    The affine parts of both LayerNorms go into w1, so one plain normalisation serves both; the rows of q, k, v
    are regrouped from per-head to per-kind; attention's output sits beside the MLP's hidden layer before w2.
    The rotated dimensions are reordered so that each pair is adjacent: the rotation is one complex product,
    and q.k does not depend on the order.
    """
    attention, mlp = block.attention, block.mlp
    H, D = attention.heads, attention.dense.weight.shape[0]

    def absorb(linear, norm):                                             # W (g x + c) + b = (W g) x + (W c + b)
        w = linear.weight.double()
        return w * norm.weight.double(), w @ norm.bias.double() + linear.bias.double()

    w, b = absorb(attention.query_key_value, block.input_layernorm)       # (3D, D), (3D,)
    w, b = w.view(H, 3, D // H, D), b.view(H, 3, D // H)
    pairs = torch.arange(R, device=w.device).view(2, R // 2).T.flatten()  # 0, R/2, 1, R/2 + 1, ..
    order = torch.cat((pairs, torch.arange(R, D // H, device=w.device)))
    w[:, :2], b[:, :2] = w[:, :2, order], b[:, :2, order]
    w, b = w.transpose(0, 1).reshape(3 * D, D), b.transpose(0, 1).reshape(3 * D)
    up, up_b = absorb(mlp.dense_h_to_4h, block.post_attention_layernorm)
    w[:D], b[:D] = w[:D] * (D // H) ** -0.5, b[:D] * (D // H) ** -0.5      # attention's scale, into q
    half = 0.5 ** 0.5                                                     # GELU(h) = g (1 + erf g) / sqrt(2), g = h / sqrt(2)
    w1, b1 = torch.cat((w, up * half)).T, torch.cat((b, up_b * half))     # (D, 3D + I), (3D + I,)
    w2 = torch.cat((attention.dense.weight.double(), mlp.dense_4h_to_h.weight.double() * half), 1).T   # (D + I, D)
    dtype = attention.dense.weight.dtype
    return Product(w1, b1, dtype), Product(w2, attention.dense.bias + mlp.dense_4h_to_h.bias, dtype)


class Fused:
    """A Pythia with folded blocks for decoding one sequence: same doors, same values up to rounding, less overhead.

    All tensor views of a step depend only on the number of rows T, so they are made once per T; a block is then
    a dozen calls. Only for parallel residuals; `fast(model)` falls back to the readable model elsewhere.
    """

    def __init__(self, model):
        c = self.config = model.config
        self.embed_in, self.new_cache = model.embed_in, model.new_cache
        R = int(c.hidden_size // c.num_attention_heads * c.rotary_pct)
        self.blocks = [fold(block, R) for block in model.layers]
        self.out = self.fold_output(model.final_layer_norm, model.embed_out)
        cos, sin = model.angles(0, c.max_position_embeddings, model.embed_in.weight.float())
        self.turn = torch.complex(cos, sin)[..., :R // 2]                 # (context, 1, R / 2)
        self.steps, self.twins = {}, {}

    @staticmethod
    def fold_output(norm, linear):
        """LayerNorm and D -> V as one Product after a plain normalisation."""
        w = linear.weight.double()
        return Product((w * norm.weight.double()).T, w @ norm.bias.double(), linear.weight.dtype)

    def step(self, T, like):
        """A buffer z (T, 3D + I) for q, k, v and the MLP's hidden layer, and the views of it that a block needs.

        On a CPU it is float32 whatever the type of the weights: the small steps between products are faster there.
        """
        if T in self.steps:
            return self.steps[T]
        c = self.config
        D, H = c.hidden_size, c.num_attention_heads
        K, W, R = D // H, 3 * D + c.intermediate_size, 2 * self.turn.shape[-1]
        z = like.new_empty(T, W, dtype=torch.float32 if like.device.type == "cpu" else like.dtype)
        views = (z, z.as_strided((T, 2 * H, R // 2, 2), (W, K, 2, 1)),    # the rotated pairs of q and k
                 z.as_strided((H, T, K), (K, W, 1)),                      # q
                 z.as_strided((2, H, T, K), (D, K, W, 1), D),             # k and v
                 z.as_strided((H, T, K), (K, W, 1), 2 * D),               # where attention's output goes: over v
                 z[:, 3 * D:], z[:, 2 * D:])                              # MLP's hidden layer; both inputs of w2
        if z.dtype == torch.float32:
            views = (z, torch.view_as_complex(views[1]), *views[2:])
        if T <= 32:
            self.steps[T] = views
        return views

    def run_folded(self, x, blocks, cache, start, stop):
        """Rows x (T, D) through folded blocks start .. stop - 1 of a cache."""
        T, D, n = len(x), x.shape[1], cache.length[start]
        cache.check_room(n + T)
        z, pairs, q, new, y, hidden, both = self.step(T, x)
        kv, turn, eps = cache.kv[start:stop, :, 0], self.turn[n:n + T], self.config.layer_norm_eps
        mask = None if T == 1 else z.new_full((T, n + T), float("-inf")).triu(n + 1)
        slots = kv[..., n:n + T, :].unbind(0)                             # (2, H, T, K) per block
        keys, values = kv[:, 0, :, :n + T].mT.unbind(0), kv[:, 1, :, :n + T].unbind(0)   # (H, K, n + T), (H, n + T, K)
        for slot, k, v, (up, down) in zip(slots, keys, values, blocks):
            up.into(z, torch.layer_norm(x, (D,), None, None, eps))
            self.rotate(pairs, turn)
            slot.copy_(new)
            k, v = k.to(z.dtype), v.to(z.dtype)
            if n == 0 and T > 1:                                          # a prompt: the library's blocked attention
                y.copy_(F.scaled_dot_product_attention(q[None], k.mT[None], v[None], is_causal=True, scale=1.0)[0])
            else:                                                         # a few rows: two small products are faster
                weight = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)    # (H, T, n + T)
                y.copy_(torch.bmm(weight.softmax(-1), v))
            hidden.addcmul_(hidden, torch.erf(hidden))                    # sqrt(2) GELU, as w1 and w2 are scaled
            x = down.onto(x, both.to(x.dtype))
        cache.length[start:stop] = [n + T] * (stop - start)
        return x

    def keys_values(self, x, block, cache):
        """As Pythia.keys_values: only this part of the block, for x (1, 1, D)."""
        n, D = cache.length[block], x.shape[-1]
        z, pairs, _, new, *_ = self.step(1, x[0])
        z[:, :3 * D] = self.blocks[block][0].columns(0, 3 * D, torch.layer_norm(x[0], (D,), None, None, self.config.layer_norm_eps))
        self.rotate(pairs, self.turn[n:n + 1])
        cache.append(block, new[:, None])

    @staticmethod
    def rotate(pairs, turn):
        if pairs.is_complex():
            pairs.mul_(turn)
        else:                                                             # there are no complex bfloat16 numbers
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turn))

    def embed(self, ids):
        return self.embed_in(ids)

    def run(self, x, start, stop, cache):
        """As Pythia.run, for B = 1 and with a cache."""
        return self.run_folded(x[0], self.blocks[start:stop], cache, start, stop)[None]

    def unembed(self, x):
        return self.output(x, self.out)

    def output(self, x, product):
        return product(torch.layer_norm(x[0], x.shape[-1:], None, None, self.config.layer_norm_eps))[None]

    def twin(self, head):
        """The fused twin of an exit head (kinds linear, tied and block; the others run as they are)."""
        if head not in self.twins:
            self.twins[head] = FusedHead(self, head) if KIND[type(head)] in ("linear", "tied", "block") else head
        return self.twins[head]


class FusedHead:
    """A linear, tied or block head with shift, block and norm as Products; same body, output and new_cache as ExitHead."""

    def __init__(self, fused, head):
        self.fused, self.kind, self.new_cache = fused, KIND[type(head)], head.new_cache
        self.out = fused.fold_output(head.norm, head.backbone[0].embed_out if KIND[type(head)] == "tied" else head.out)
        if self.kind == "block":
            self.blocks = [fold(head.block, 2 * fused.turn.shape[-1])]
            self.shift = Product(head.shift.weight.T, None, head.shift.weight.dtype)

    def body(self, h, cache=None):
        if self.kind != "block":
            return h
        x = self.shift.onto(h[0], cache.push(h)[0])
        return self.fused.run_folded(x, self.blocks, cache, 0, 1)[None]

    def output(self, x):
        return self.fused.output(x, self.out)


class Graphed(Fused):
    """Fused with static shapes, so that a pass of T rows through blocks start .. stop is one CUDA graph.

    A graph replays fixed kernels on fixed addresses. So the position is a tensor, keys and values are stored by index,
    attention reads the whole cache under a mask, and one cache serves all generations, one at a time. Without CUDA the
    same steps run eagerly: the graph's twin, slower and for tests only.
    """

    def __init__(self, model):
        super().__init__(model)
        self.buffers, self.passes = {}, {}

    def run_folded(self, x, blocks, cache, start, stop):
        T, n = len(x), cache.length[start]
        owner = blocks[0] if len(cache.length) == 1 else None             # a block head has its own cache
        if owner not in self.buffers:
            L, _, _, H, _, K = cache.kv.shape
            self.buffers[owner] = cache.kv.new_zeros(L, 2, 1, H, self.config.max_position_embeddings, K)
        cache.kv = self.buffers[owner]
        if n == 0 or T > 17:                                              # a prompt
            return super().run_folded(x, blocks, cache, start, stop)
        cache.check_room(n + T)
        key = owner, T, start, stop
        if key not in self.passes:
            self.passes[key] = self.capture(x, blocks, cache.kv[start:stop, :, 0])
        rows, at, out, replay = self.passes[key]
        rows.copy_(x)
        at.fill_(n)
        replay()
        cache.length[start:stop] = [n + T] * (stop - start)
        return out.clone()                                                # the next replay overwrites it

    def capture(self, x, blocks, kv):
        """(input rows, position, output, replay): buffers of one pass, and what computes the output from them."""
        rows, at, out = x.clone(), torch.zeros(1, dtype=torch.long, device=x.device), torch.empty_like(x)
        if x.device.type != "cuda":
            return rows, at, out, lambda: out.copy_(self.static(rows, at, blocks, kv))
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        kept = kv[..., :len(x), :].clone()                                # the warm-up writes at position 0
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.static(rows, at, blocks, kv)
        torch.cuda.current_stream().wait_stream(side)
        kv[..., :len(x), :] = kept
        with torch.cuda.graph(graph):
            out.copy_(self.static(rows, at, blocks, kv))
        return rows, at, out, graph.replay

    def static(self, x, at, blocks, kv):
        """Rows x (T, D) at positions at, at + 1, .. through folded blocks with the caches kv (blocks, 2, H, N, K)."""
        T, D, eps = *x.shape, self.config.layer_norm_eps
        z, pairs, q, new, y, hidden, both = self.step(T, x)
        position = at + torch.arange(T, device=x.device)                  # (T,)
        turn = self.turn.index_select(0, position)
        unseen = torch.arange(kv.shape[-2], device=x.device) > position[:, None]
        mask = torch.zeros_like(unseen, dtype=z.dtype).masked_fill_(unseen, float("-inf"))   # (T, N)
        for cache, (up, down) in zip(kv.unbind(0), blocks):
            up.into(z, torch.layer_norm(x, (D,), None, None, eps))
            self.rotate(pairs, turn)
            cache.index_copy_(2, position, new.to(cache.dtype))
            k, v = cache.to(z.dtype)                                      # (H, N, K) each
            y.copy_(torch.bmm(torch.baddbmm(mask, q, k.mT).softmax(-1), v))
            hidden.addcmul_(hidden, torch.erf(hidden))
            x = down.onto(x, both.to(x.dtype))
        return x


def fast(model, graphs=False):
    """The fused twin where there is one (on request with CUDA graphs), else the model itself."""
    if not model.config.use_parallel_residual:
        return model
    return Graphed(model) if graphs else Fused(model)


# ---------------------------------------------------------------- statistics


def stopwatch(device):
    """Start timing; the function returned gives the seconds since then, on a GPU by events, for which the host waits."""
    if device.type != "cuda":
        begin = time.perf_counter()
        return lambda: time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    begin.record(stream)

    def seconds():
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    return seconds


@dataclass
class Stats:
    """What a generation did. A round is one verification with its drafts; prefill counts in seconds only."""
    emitted: int = 0              # new tokens, the prefill's first one included
    drafted: int = 0
    accepted: int = 0             # drafts equal to the full model's choice before the first mismatch
    rounds: int = 0
    blocks: int = 0               # (position, block) pairs evaluated
    redone: int = 0               # of these, for drafts that were rejected
    prefills: int = 0             # generations counted
    extra_cost: float = 0.0       # heads, unembeddings and CALM's copies, in block-equivalents
    bytes: float = 0.0            # weights, keys and values that had to be read: once per pass, whatever its rows
    draft_lengths: Counter = field(default_factory=Counter)
    exits: Counter = field(default_factory=Counter)           # emitted tokens by the depth that produced them
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __iadd__(self, other):
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def decoded(self):
        """Tokens emitted after the prefill's, to which all costs and rates refer."""
        return max(1, self.emitted - self.prefills)

    wasted = property(lambda s: s.drafted - s.accepted)
    acceptance = property(lambda s: s.accepted / s.drafted if s.drafted else float("nan"))
    tau = property(lambda s: s.decoded / s.rounds if s.rounds else float("nan"))
    draft_length = property(lambda s: s.drafted / s.rounds if s.rounds else float("nan"))
    layers_per_token = property(lambda s: s.blocks / s.decoded)
    cost_per_token = property(lambda s: (s.blocks + s.extra_cost) / s.decoded)
    bytes_per_token = property(lambda s: s.bytes / s.decoded)
    ms_per_token = property(lambda s: 1000 * s.decode_seconds / s.decoded)
    tokens_per_second = property(lambda s: s.decoded / s.decode_seconds if s.decode_seconds else float("nan"))


@dataclass
class Generation:
    tokens: list                  # new ids
    depths: list                  # the depth that produced each
    stats: Stats


# ---------------------------------------------------------------- the frontier


class Frontier:
    """Which positions have reached which depth, and the residual streams of those that wait to go on.

    Depths `bounds` = 0, the consulted exits, L. `reached[s]` positions have arrived at bounds[s]; `queue[s]` is
    the list of the rows [(1, n, D)] of those that have not yet left it.
    """

    def __init__(self, model, policy, capacity, stats):
        L = model.config.num_hidden_layers
        self.model, self.stats = model, stats
        exits = [m for m, t in enumerate(policy.thresholds) if t is not None]
        self.bounds = [0, *(policy.heads.layers[m] for m in exits), L]
        self.thresholds = [policy.thresholds[m] for m in exits]
        own = [policy.heads.heads[m] for m in exits]
        c, item = model.config, model.embed_in.weight.element_size()
        self.block_bytes = item * (4 * c.hidden_size ** 2 + 2 * c.hidden_size * c.intermediate_size)
        self.position_bytes = item * 2 * c.hidden_size                    # one block's keys and values of one position
        self.unembed_cost = full_cost(model) - L
        self.body_costs = [head.cost() - self.unembed_cost for head in own]
        self.heads = [model.twin(h) for h in own] if isinstance(model, Fused) else own
        self.cache = model.new_cache(1, capacity)
        self.head_caches = [head.new_cache(1, capacity) for head in self.heads]
        self.unread = [None] * len(self.heads)                            # rows that a block head has yet to read
        self.reached = [0] * len(self.bounds)
        self.queue = [[] for _ in self.bounds]

    def push(self, tokens):
        """New positions arrive at depth 0."""
        if len(tokens) == 1:                                              # a row of the matrix: no copy to the device
            x = self.model.embed_in.weight[tokens[0]][None, None]         # (1, 1, D)
        else:
            x = self.model.embed(torch.tensor([tokens], device=self.cache.kv.device))   # (1, n, D)
        self.queue[0].append(x)
        self.reached[0] += len(tokens)

    def advance(self, s):
        """All positions waiting at bounds[s] go on to bounds[s + 1], in one batch; returns how many."""
        rows, self.queue[s] = self.queue[s], []
        if not rows:
            return 0
        start, stop = self.bounds[s], self.bounds[s + 1]
        x = self.model.run(rows[0] if len(rows) == 1 else torch.cat(rows, 1), start, stop, self.cache)
        self.stats.blocks += x.shape[1] * (stop - start)
        self.stats.bytes += (stop - start) * (self.block_bytes + self.reached[s] * self.position_bytes)
        self.queue[s + 1].append(x)
        self.reached[s + 1] = self.reached[s]
        if s < len(self.heads) and self.head_caches[s]:
            self.unread[s] = x if self.unread[s] is None else torch.cat((self.unread[s], x), 1)
        return x.shape[1]

    def ask(self, s, rows=1):
        """Logits (rows, V) of the head at bounds[s + 1] for the newest rows that arrived there."""
        if self.head_caches[s]:
            x = self.read(s)
        else:
            x = self.heads[s].body(self.queue[s + 1][-1][:, -rows:])
            self.spend(rows, self.body_costs[s])
        self.spend(rows, self.unembed_cost)
        return self.heads[s].output(x[:, -rows:])[0]

    def read(self, s):
        """A block head takes in the rows that it has yet to read, and keeps their keys and values."""
        x, self.unread[s] = self.unread[s], None
        self.spend(x.shape[1], self.body_costs[s], self.reached[s + 1])
        return self.heads[s].body(x, self.head_caches[s])

    def spend(self, rows, cost, positions=0):
        """Count a pass of rows through matrices of `cost` block-equivalents, which attends to so many positions."""
        self.stats.extra_cost += rows * cost
        self.stats.bytes += cost * self.block_bytes + positions * self.position_bytes

    def prompt(self, tokens):
        """All tokens of a prompt go to full depth, and block heads read them; the rows at depth L (1, n, D)."""
        self.push(tokens)
        for s in range(len(self.bounds) - 1):
            self.advance(s)
        for s, cache in enumerate(self.head_caches):
            if cache:
                self.read(s)
        return self.take()

    def take(self):
        """The rows that have reached depth L since the last call."""
        return self.queue[-1].pop()

    def cut(self, n):
        """Forget every position from n on, wherever it waits."""
        for s, rows in enumerate(self.queue[:-1]):                        # the last queue is empty: all were taken
            keep = min(self.reached[s], n) - self.reached[s + 1]
            self.queue[s] = [torch.cat(rows, 1)[:, :keep]] if rows and keep > 0 else []
        for s, cache in enumerate(self.head_caches):
            if cache:
                if self.unread[s] is not None:
                    keep = max(0, n - cache.length[0])
                    self.unread[s] = self.unread[s][:, :keep] if keep else None
                cache.truncate(n)
        lost = [max(0, r - n) for r in self.reached]
        self.stats.redone += sum(k * (b - a) for k, a, b in zip(lost[1:], self.bounds, self.bounds[1:]))
        self.reached = [min(r, n) for r in self.reached]
        self.cache.truncate(n)

    def copy_state(self, s):
        """CALM's shortcut: the deeper blocks take keys and values of the position waiting at bounds[s] from there."""
        x = self.queue[s].pop()
        for block in range(self.bounds[s], self.bounds[-1]):
            self.model.keys_values(x, block, self.cache)
        for m in range(s, len(self.heads)):                               # deeper block heads read it from there, too
            if self.head_caches[m]:
                self.unread[m] = x if self.unread[m] is None else torch.cat((self.unread[m], x), 1)
        self.reached[s + 1:] = [self.reached[s]] * (len(self.bounds) - s - 1)
        self.spend(1, (self.bounds[-1] - self.bounds[s]) / 6)             # 2 of a block's 12 D x D products


# ---------------------------------------------------------------- decoding


def distribution(logits, temperature, top_p):
    """Probabilities (..., V) that sampling uses: softmax at the temperature, cut to the top-p nucleus."""
    logits = logits.float()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)   # no overflow at a tiny temperature
    if top_p < 1:
        ordered, at = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0                # keep the fewest that reach top_p
        p = torch.zeros_like(p).scatter(-1, at, ordered)
        p /= p.sum(-1, keepdim=True)
    return p


def draw(p, generator):
    return torch.multinomial(p, 1, generator=generator).item()


def keep_or_replace(p, q, token, generator):
    """Speculative sampling of one draft token ~ q against the full model's p (V,): (kept, token)."""
    if torch.rand((), generator=generator, device=p.device) * q[token] < p[token]:    # probability min(1, p / q)
        return True, token
    rest = (p - q).clamp(min=0)
    if not rest.any():                                                    # p = q up to rounding
        rest = p
    return False, draw(rest, generator)


def verify_drafts(logits, pending, temperature, top_p, generator):
    """Full-model logits (n + 1, V) for n pending drafts -> how many are kept, and the full model's next token.

    With n rows only, there is no next token after n kept drafts: None.
    """
    if not temperature:
        full = logits.argmax(-1).tolist()
        kept = next((i for i, (token, _, _) in enumerate(pending) if token != full[i]), len(pending))
        return kept, full[kept] if kept < len(full) else None
    p = distribution(logits, temperature, top_p)
    for i, (token, _, q) in enumerate(pending):
        kept, token = keep_or_replace(p[i], q, token, generator)
        if not kept:
            return i, token
    return len(pending), draw(p[len(pending)], generator) if len(p) > len(pending) else None


def answers_of(logits, threshold):
    """A head's uncertainties and choices [[..], [..]] for logits (rows, V), with one synchronisation."""
    choice = logits.argmax(-1)
    if threshold == float("inf"):                                         # LayerSkip's head is never uncertain
        return [[0.0] * len(choice), choice.tolist()]
    return torch.stack((entropy(logits), choice.float())).tolist()


class Decoder:
    """One generation: the loop that all policies share. Iterating yields (token, depth that produced it)."""

    def __init__(self, model, ids, max_new_tokens, policy, temperature, top_p, stop, seed, stats):
        self.model, self.ids, self.policy, self.stop, self.stats = model, ids, policy, stop, stats
        self.temperature, self.top_p = temperature, top_p
        self.limit = min(max_new_tokens, model.config.max_position_embeddings - len(ids) + 1)
        self.device = model.embed_in.weight.device
        self.generator = torch.Generator(self.device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.frontier = Frontier(model, policy, len(ids) + self.limit, stats)
        self.pending, self.emitted = [], 0                                # pending: drafts (token, depth, q)

    def prefill(self):
        """The whole prompt to full depth; the full model's first token."""
        seconds, f = stopwatch(self.device), self.frontier
        f.stats = Stats()                                                 # the prompt counts in seconds only
        last = f.prompt(self.ids)[:, -1:]                                 # (1, 1, D)
        f.stats = self.stats
        _, token = verify_drafts(self.model.unembed(last)[0], [], self.temperature, self.top_p, self.generator)
        self.stats.prefills += 1
        self.stats.prefill_seconds += seconds()
        return token

    def draft(self, deep):
        """Advance the newest position exit by exit until a head is certain: (token, depth, q). None if none is.

        `deep`: nothing more is drafted this round, so no head is asked but for the veto.
        """
        f, pending = self.frontier, self.pending
        for s, threshold in enumerate(f.thresholds):
            fresh = f.advance(s)
            vetoing = self.policy.veto and not self.temperature and pending and fresh
            if deep and not vetoing:
                continue
            logits = f.ask(s, fresh if vetoing else 1)                    # (rows, V)
            answers = answers_of(logits, threshold)
            if vetoing:                                                   # row i predicts the draft `first + i`
                first = f.reached[s + 1] - fresh - f.reached[-1]
                for i, (uncertainty, guess) in enumerate(zip(*answers), start=first):
                    if i < len(pending) and guess != pending[i][0] and is_certain(uncertainty, threshold):
                        f.cut(f.reached[-1] + i + 1)                      # verification would most likely end there
                        del pending[i:]
                        deep = True
                        break
            if not deep and is_certain(answers[0][-1], threshold):
                if not self.temperature:
                    return int(answers[1][-1]), f.bounds[s + 1], None
                q = distribution(logits[-1], self.temperature, self.top_p)
                return draw(q, self.generator), f.bounds[s + 1], q
        return None

    def full_depth(self):
        """Everything that waits goes to depth L; returns the tokens this settles, [(token, depth)]."""
        f, model, stats, L = self.frontier, self.model, self.stats, self.model.config.num_hidden_layers
        verified = f.reached[-1]                                          # positions at full depth so far
        f.advance(len(f.bounds) - 2)
        rows = f.take() if self.policy.verify else f.take()[:, -1:]       # (1, n, D)
        f.spend(rows.shape[1], f.unembed_cost)
        kept, token = verify_drafts(model.unembed(rows)[0], self.pending, self.temperature, self.top_p, self.generator)
        if kept < len(self.pending):
            f.cut(verified + kept + 1)
        settled = [draft[:2] for draft in self.pending[:kept]] + ([(token, L)] if token is not None else [])
        if self.policy.verify:
            stats.rounds, stats.accepted = stats.rounds + 1, stats.accepted + kept
            stats.draft_lengths[self.drafted] += 1
            stats.drafted += self.drafted
        self.pending, self.drafted = [], 0
        return settled

    @torch.inference_mode()
    def __iter__(self):
        stats, self.drafted = self.stats, 0
        settled = [(self.prefill(), self.model.config.num_hidden_layers)]
        while True:
            for token, depth in settled:
                self.emitted += 1
                stats.emitted += 1
                stats.exits[depth] += 1
                yield token, depth
                if token == self.stop or self.emitted == self.limit:
                    return
            seconds = stopwatch(self.device)                              # the caller's time does not count
            settled = self.step(token)
            stats.decode_seconds += seconds()

    def step(self, last):
        """One more position after the newest token; returns the tokens that are settled by it, [(token, depth)]."""
        f, policy = self.frontier, self.policy
        newest = self.pending[-1][0] if self.pending else last
        ended = bool(self.pending) and newest == self.stop                # a drafted end needs no position of its own
        if not ended:
            f.push([newest])
        deep = ended or policy.verify and (len(self.pending) >= policy.max_draft
                                           or self.emitted + len(self.pending) + 1 >= self.limit)
        draft = self.draft(deep)
        if draft is None:
            return self.full_depth()
        if policy.verify:
            self.pending.append(draft)
            self.drafted += 1
            return []
        if policy.fill == "copy":
            f.copy_state(f.bounds.index(draft[1]))
        return [draft[:2]]


def generate(model, ids, max_new_tokens, policy, *, temperature=0.0, top_p=1.0, stop=None, seed=None, stats=None):
    """Continue the prompt `ids` by at most max_new_tokens tokens under a policy -> Generation.

    Greedy at temperature 0, else sampled from the top_p nucleus. Ends with the token `stop` (kept), or when the
    context is full: context - len(ids) + 1 new tokens. `stats`, where given, is added to. Raises InputError.
    """
    stats = Stats() if stats is None else stats
    tokens, depths = [], []
    for token, depth in stream(model, ids, max_new_tokens, policy, temperature=temperature, top_p=top_p, stop=stop,
                               seed=seed, stats=stats):
        tokens.append(token)
        depths.append(depth)
    return Generation(tokens, depths, stats)


def stream(model, ids, max_new_tokens, policy, *, temperature=0.0, top_p=1.0, stop=None, seed=None, stats=None):
    """As generate(), but yields (token, depth that produced it) as they are settled."""
    context = model.config.max_position_embeddings
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    if len(ids) > context:
        raise InputError(f"the prompt has {len(ids)} tokens, the context holds {context}; shorten it")
    if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise InputError("max_new_tokens must be at least 1, temperature at least 0, and top_p in (0, 1]")
    if policy.heads and len(policy.thresholds) != len(policy.heads.layers):
        raise InputError(f"{len(policy.thresholds)} thresholds were given for {len(policy.heads.layers)} heads")
    return iter(Decoder(model, list(ids), max_new_tokens, policy, temperature, top_p, stop, seed,
                        Stats() if stats is None else stats))


