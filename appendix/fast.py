"""Side room: the same numbers in less time. Twins of blocks and heads for decoding one sequence.

Decoding runs few rows at a time: one token, or one with its drafts. Then arithmetic costs little.
The time goes into reading weights, and into calling the library. This room saves both and changes
no result beyond rounding.

Why folding. A block of Pythia normalises its input twice, with two affine maps (scale g, offset c),
before two matrices. An affine map before a matrix is part of that matrix:

    W (g x + c) + b = (W g) x + (W c + b)

So one plain normalisation x = (h - mean) / deviation serves both, and a block is two products:

    z  = x w1 + b1                        (T, 3D + I)    q, k, v and the MLP's hidden layer at once
    h' = h + [attention, GELU] w2 + b2    (T, D)         both outputs at once, added to the stream

Constants go into the weights too: attention's scale 1 / sqrt(K) into the queries, GELU's factors
1 / sqrt(2) into the MLP. All this is computed once, in float64. Only parallel residuals allow it:
there, both halves of a block read the same h.

Why other products. PyTorch's product of few rows reads its matrix at half the memory's speed or
less. oneDNN, a library behind PyTorch, has a layout of its own that it reads at nearly full speed.
For small models NumPy is faster still: see appendix/small.py.

Why static shapes. On a GPU a small kernel is over before Python has launched the next one. A CUDA
graph records all launches of a pass once and replays them with one call. It replays fixed kernels
on fixed addresses, so no shape and no address may depend on the position (`Graphed`).

    decoder, twins = fast(model, heads)     has the doors of Pythia and of ExitHeads for decoding
    generate(decoder, ids, 100, DSSD(twins, twins.thresholds(0.8)))

    python -m appendix.fast                 time of one token on the toy, readable and fast
Expect the fast one to take a quarter to a third of the time on a CPU.

Limits: one sequence at a time, without gradients. Models with sequential residuals or an odd
rotated width stay readable.
Letters: T rows, N cached positions, D hidden size, I the MLP's width, H heads, K head size, R the
rotated part of K.
"""
import argparse
import functools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from heads import BlockHead, ExitHead, ExitHeads, TiedHead
from model import TOY, InputError, Pythia, check_room, command_line, locate

MOST_ROWS = 17      # rows of one graphed pass: a token and up to 16 drafts; longer ones are prompts
KEPT_STEPS = 32     # buffers are kept for passes of up to so many rows

# ---------------------------------------------------------------- the door


@torch.no_grad()
def fast(model, heads=None, graphs=False):
    """The twins (decoder, heads) of a Pythia and its ExitHeads; without heads (decoder, None).

    graphs=True asks for static shapes, and on a GPU for CUDA graphs. Such a decoder has one cache:
    it serves one generation at a time. Where there is no twin, the model and the heads themselves
    are returned. Policies are made from the twins: a decoder may have streams that other heads
    cannot read.
    """
    rotated = rotated_width(model.config)
    if not model.config.use_parallel_residual or rotated % 2 or rotated == 0:
        return model, heads
    from appendix.small import Small, is_small                            # which imports this room
    if graphs:
        decoder = Graphed(model)
    elif is_small(model, heads):
        decoder = Small(model)
    else:
        decoder = Fused(model)
    if heads is None:
        return decoder, None
    return decoder, FusedHeads(decoder, heads)


def rotated_width(config):
    """R: how many of a head's K dimensions are rotated."""
    return int(config.hidden_size // config.num_attention_heads * config.rotary_pct)


# ---------------------------------------------------------------- products of few rows


@functools.cache
def packs(dtype):
    """Whether oneDNN's packed products work here in this type.

    torch.compile uses them, but torch has no public name for them. So we try a small matrix.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x = torch.ones(1, 8, dtype=dtype)
        w = torch.ops.mkldnn._reorder_linear_weight(torch.eye(8, dtype=dtype), 16)
        alone = torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], "")
        total = torch.ops.mkldnn._linear_pointwise.binary(x, x, w, None, "add")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(alone, x) and torch.equal(total, 2 * x)


class Product:
    """x -> x w + b for rows x (T, n), with w (n, m) and b (m,) or None: PyTorch's own."""

    def __init__(self, w, b):
        # 16 bits are faster as the transposed view
        self.w = w.contiguous() if w.dtype == torch.float32 else w.T.contiguous().T
        self.b = b

    def __call__(self, x):
        """x w + b, a new tensor (T, m)."""
        if self.b is None:
            return x @ self.w
        return torch.addmm(self.b, x, self.w)

    def into(self, out, x):
        """out = x w + b, in place."""
        if self.b is None or out.dtype != x.dtype:
            out.copy_(self(x))
        else:
            torch.addmm(self.b, x, self.w, out=out)

    def onto(self, rest, x):
        """rest + x w + b, a new tensor (T, m)."""
        return self(x).add_(rest)


class PackedProduct(Product):
    """By oneDNN, with w packed. Its threads share a large matrix."""

    def __init__(self, w, b):
        # measured on an EPYC: four rows of a large packed product are faster than one or two
        self.least_rows = 4 if w.numel() >= 2 ** 20 else 1
        self.w, self.b = torch.ops.mkldnn._reorder_linear_weight(w.T.contiguous(), 16), b

    def __call__(self, x):
        linear = torch.ops.mkldnn._linear_pointwise.default
        return linear(self.padded(x), self.w, self.b, "none", [], "")[:len(x)]

    def into(self, out, x):
        out.copy_(self(x))

    def onto(self, rest, x):
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(self.padded(x), self.padded(rest), self.w, self.b, "add")[:len(x)]

    def padded(self, x):
        """x with rows of zeros below, up to least_rows."""
        missing = self.least_rows - len(x)
        return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


def product(w, b, dtype):
    """x -> x w + b as what is fastest here for few rows.

    In float32 two rows of PyTorch's own product cost twice one. Of oneDNN's, four rows cost little
    more than one.
    """
    w, b = w.detach().to(dtype), None if b is None else b.detach().to(dtype)
    # narrower ones stay in the processor's cache, and oneDNN's call costs more than it saves
    wide = min(w.shape) >= 256 or dtype != torch.float32
    if w.device.type == "cpu" and wide and packs(dtype):
        return PackedProduct(w, b)
    return Product(w, b)


# ---------------------------------------------------------------- folding


def absorb(linear, norm):
    """A norm's affine part, into the matrix behind it: W (g x + c) + b = (W g) x + (W c + b)."""
    W = linear.weight.double()
    w, b = W * norm.weight.double(), W @ norm.bias.double()
    if linear.bias is not None:
        b = b + linear.bias.double()
    return w, b


def fold(block, R, product):
    """A parallel block as two products, w1 (D, 3D + I) and w2 (D + I, D), with their offsets."""
    w, b = fold_attention(block.attention, block.input_layernorm, R)      # (3D, D), (3D,)
    # GELU(h) = h (1 + erf(h / sqrt 2)) / 2. With g = h / sqrt 2 it is (g + g erf g) / sqrt 2:
    # one constant before it and one after it
    half = 0.5 ** 0.5
    up, up_b = absorb(block.mlp.dense_h_to_4h, block.post_attention_layernorm)   # (I, D), (I,)
    w1 = torch.cat((w, up * half)).T                                      # (D, 3D + I)
    b1 = torch.cat((b, up_b * half))                                      # (3D + I,)
    # attention's output stands beside the MLP's hidden layer, and one product reads both
    down, dense = block.mlp.dense_4h_to_h, block.attention.dense
    w2 = torch.cat((dense.weight.double(), down.weight.double() * half), 1).T    # (D + I, D)
    dtype = dense.weight.dtype
    return product(w1, b1, dtype), product(w2, dense.bias + down.bias, dtype)


def fold_attention(attention, norm, R):
    """Weights (3D, D) and offsets (3D,) of all queries, then all keys, then all values.

    The rotated dimensions i and i + R/2 of a head become neighbours. Then the rotation is a product
    of complex numbers. The order is the same in q and k, so q.k does not change.
    """
    H, D = attention.heads, attention.dense.weight.shape[0]
    K = D // H
    w, b = absorb(attention.query_key_value, norm)
    w, b = w.view(H, 3, K, D), b.view(H, 3, K)
    # 0, R/2, 1, R/2 + 1, .., and the rest as it is
    pairs = torch.arange(R, device=w.device).view(2, R // 2).T.flatten()
    order = torch.cat((pairs, torch.arange(R, K, device=w.device)))
    w[:, :2], b[:, :2] = w[:, :2, order], b[:, :2, order]
    # from "per head: q, k, v" to "all q, all k, all v"
    w, b = w.transpose(0, 1).reshape(3 * D, D), b.transpose(0, 1).reshape(3 * D)
    # attention's scale, into the queries
    w[:D] *= K ** -0.5
    b[:D] *= K ** -0.5
    return w, b


def fold_output(norm, linear, product):
    """A LayerNorm and a matrix D -> V as one product, to be used after a plain normalisation."""
    w, b = absorb(linear, norm)
    return product(w.T, b, linear.weight.dtype)


# ---------------------------------------------------------------- the fused twin


class Step(NamedTuple):
    """One buffer for a pass of T rows, and the views of it that a block needs."""
    z: torch.Tensor           # (T, 3D + I): q, k, v, the MLP's hidden layer
    pairs: torch.Tensor       # rotated pairs of q and k: complex (T, 2H, R/2), or real (.., 2)
    q: torch.Tensor           # (H, T, K)
    new: torch.Tensor         # (2, H, T, K): keys and values
    y: torch.Tensor           # (H, T, K): attention's output, over v, which is in the cache by then
    hidden: torch.Tensor      # (T, I): the MLP's hidden layer
    both: torch.Tensor        # (T, D + I): attention's output and the hidden layer, what w2 reads


class Fused:
    """A Pythia with folded blocks, for one sequence: same doors, same values up to rounding.

    The views of a step depend only on the number of rows T, so they are made once per T. A block is
    then a dozen calls.
    """

    def __init__(self, model):
        config = model.config
        self.model, self.config, self.embed_in = model, config, model.embed_in
        self.width, self.eps = (config.hidden_size,), config.layer_norm_eps
        self.R = rotated_width(config)
        self.blocks = [fold(block, self.R, self.product) for block in model.layers]
        self.out = fold_output(model.final_layer_norm, model.embed_out, self.product)
        cos, sin = model.angles(0, config.max_position_embeddings, model.embed_in.weight.float())
        self.turn = torch.complex(cos, sin)[..., :self.R // 2]            # (context, 1, R / 2)
        self.steps = {}                                                   # (T, type) -> Step

    def product(self, w, b, dtype):
        return product(w, b, dtype)

    def new_cache(self, batch=1, max_len=None):
        return self.placed(self.model.new_cache(batch, max_len), None)

    def placed(self, cache, owner):
        """A new cache, as and where this decoder wants it: see Small and Graphed. Its owner is a
        block head, or None: the decoder."""
        return cache

    def twin(self, head):
        """The twin of an exit head, or the head itself."""
        twin = TWINS.get(type(head))
        return head if twin is None else twin(self, head)

    def new_states(self, depths, room):
        return self.model.new_states(depths, room)

    def embed(self, ids):
        return self.model.embed(ids)

    def run(self, x, start, stop, cache, between=None):
        """As Pythia.run, for B = 1 and with a cache. x is not changed."""
        return self.run_folded(x[0], self.blocks[start:stop], cache, start, between)[None]

    def unembed(self, x):
        return self.output(x, self.out)

    def output(self, x, matrix):
        """A plain normalisation of x (1, T, D), then a folded norm and matrix: (1, T, V)."""
        return matrix(self.normalised(x[0]))[None]

    def normalised(self, x):
        """Mean 0 and variance 1 for every row of x (T, D), without an affine part."""
        return torch.layer_norm(x, self.width, None, None, self.eps)

    def keys_values(self, x, block, cache):
        """As Pythia.keys_values, for x (1, T, D). The whole first product runs, and the rest of it
        is not used."""
        x, n = x[0], cache.length[block]
        step = self.step(len(x), x)
        up, _ = self.blocks[block]
        up.into(step.z, self.normalised(x))
        rotate_pairs(step.pairs, self.turn[n:n + len(x)])
        cache.append(block, step.new[:, None])

    def check_room(self, n, cache):
        """InputError unless n positions fit into the cache and into the context."""
        check_room(n, min(cache.max_len, len(self.turn)))

    def run_folded(self, x, blocks, cache, start, between=None):
        """Rows x (T, D) through folded blocks -> (T, D). The cache holds their keys and values from
        its block `start` on."""
        T, n, stop = len(x), cache.length[start], start + len(blocks)
        self.check_room(n + T, cache)
        z, pairs, q, new, y, hidden, both = self.step(T, x)
        turn = self.turn[n:n + T]                                         # (T, 1, R / 2)
        # the views of all blocks at once: one call each, not one per block
        kv = cache.kv[start:stop, :, 0, :, :n + T]                        # (blocks, 2, H, n + T, K)
        slots = kv[..., n:, :].unbind(0)                                  # (2, H, T, K) per block
        keys, values = kv.unbind(1)
        keys = keys.mT.unbind(0)                                          # (H, K, n + T) per block
        values = values.unbind(0)                                         # (H, n + T, K) per block
        mask, first_rows, widen = None, n == 0 and T > 1, cache.kv.dtype != z.dtype
        if T > 1 and not first_rows:
            # row i sees positions 0 .. n + i
            mask = z.new_full((T, n + T), float("-inf")).triu(n + 1)
        depth = start
        for slot, k, v, (up, down) in zip(slots, keys, values, blocks):
            up.into(z, self.normalised(x))
            rotate_pairs(pairs, turn)
            slot.copy_(new)
            if widen:
                k, v = k.to(z.dtype), v.to(z.dtype)
            if first_rows:
                y.copy_(prompt_attention(q, k.mT, v))
            else:
                # a few rows: two small products are faster
                scores = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)
                y.copy_(torch.bmm(scores.softmax(-1), v))
            hidden.addcmul_(hidden, torch.erf(hidden))                    # sqrt(2) GELU: see fold
            x = down.onto(x, both.to(x.dtype) if widen else both)         # (T, D), a new tensor
            depth += 1
            if between and depth in between:
                between[depth].copy_(x)
        cache.length[start:stop] = [n + T] * len(blocks)
        return x

    def step(self, T, like):
        """The Step of T rows.

        On a CPU it is float32 whatever the type of the weights: the small steps between products
        are faster so.
        """
        key = T, like.dtype
        if key in self.steps:
            return self.steps[key]
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        # a buffer made inside inference mode could not be used outside
        with torch.inference_mode(False):
            step = self.new_step(T, dtype, like.device)
        if T <= KEPT_STEPS:
            self.steps[key] = step
        return step

    def new_step(self, T, dtype, device):
        D, H, R = self.config.hidden_size, self.config.num_attention_heads, self.R
        K, W = D // H, 3 * D + self.config.intermediate_size
        z = torch.empty(T, W, dtype=dtype, device=device)
        # as_strided(sizes, strides, offset): row t begins at t W, head h of q, k or v at h K
        pairs = z.as_strided((T, 2 * H, R // 2, 2), (W, K, 2, 1))
        if dtype == torch.float32 and K % 2 == 0 and W % 2 == 0:
            pairs = torch.view_as_complex(pairs)
        return Step(z, pairs,
                    q=z.as_strided((H, T, K), (K, W, 1)),
                    new=z.as_strided((2, H, T, K), (D, K, W, 1), D),
                    y=z.as_strided((H, T, K), (K, W, 1), 2 * D),
                    hidden=z[:, 3 * D:],
                    both=z[:, 2 * D:])


def prompt_attention(q, k, v):
    """Causal attention of a prompt (H, T, K) by the library, which never holds all scores."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0]


def rotate_pairs(pairs, turn):
    """Rotate the pairs of q and k in place: a complex number times e^(i angle)."""
    if pairs.is_complex():
        pairs.mul_(turn)
    else:
        # there are no complex bfloat16 numbers
        turned = torch.view_as_complex(pairs.float().contiguous()) * turn
        pairs.copy_(torch.view_as_real(turned))


# ---------------------------------------------------------------- the twins of the heads


class FusedHead:
    """A linear, tied or block head as Products. body, output, new_cache and cost are ExitHead's."""

    def __init__(self, decoder, head):
        self.decoder, self.head = decoder, head
        self.dtype = head.norm.weight.dtype   # heads may be float32 on a bfloat16 model
        matrix = head.out if head.owns_matrix else head.backbone[0].embed_out
        self.out = fold_output(head.norm, matrix, decoder.product)

    def body(self, h, cache=None):
        return h.to(self.dtype)               # the norm is in `output`

    def output(self, x):
        return self.decoder.output(x, self.out)

    def new_cache(self, batch=1, max_len=None):
        return self.head.new_cache(batch, max_len)

    def cost(self):
        return self.head.cost()


class FusedBlockHead(FusedHead):
    """The twin of a BlockHead: shift, block, norm and matrix. It needs a cache."""

    def __init__(self, decoder, head):
        super().__init__(decoder, head)
        self.shift = decoder.product(head.shift.weight.T, None, head.shift.weight.dtype)
        self.blocks = [fold(head.block, decoder.R, decoder.product)]

    def body(self, h, cache):
        if h.dtype != self.dtype:
            h = h.to(self.dtype)
        x = self.shift.onto(h[0], cache.push(h)[0])                       # (T, D)
        return self.decoder.run_folded(x, self.blocks, cache, 0)[None]

    def new_cache(self, batch=1, max_len=None):
        return self.decoder.placed(self.head.new_cache(batch, max_len), self.head)


TWINS = {ExitHead: FusedHead, TiedHead: FusedHead, BlockHead: FusedBlockHead}


class FusedHeads:
    """The twin of ExitHeads: what decoding asks of it. Heads without a twin run as they are."""

    def __init__(self, decoder, heads):
        self.layers, self.kind, self.measure = heads.layers, heads.kind, heads.measure
        self.calibration, self.thresholds = heads.calibration, heads.thresholds
        self.heads = [decoder.twin(head) for head in heads.heads]


# ---------------------------------------------------------------- static shapes


class Graphed(Fused):
    """Fused with static shapes, so that a pass of T rows through some blocks is one CUDA graph.

    The position is a tensor. Keys and values are stored by index. Attention reads the whole cache
    under a mask. The caches of all generations are the same memory. Without CUDA the same steps run
    one by one: slower, for tests.
    """

    def __init__(self, model):
        super().__init__(model)
        self.buffers = {}                     # owner -> the memory of its cache
        self.passes = {}                      # (memory, T, start, stop) -> what capture returns

    def placed(self, cache, owner):
        """Move a cache into its owner's fixed memory. Owner: a block head, or None (the model)."""
        if owner not in self.buffers:
            L, two, _, H, _, K = cache.kv.shape
            shape = L, two, 1, H, self.config.max_position_embeddings, K
            # zeros: attention multiplies unseen values by 0, and 0 times NaN is NaN
            with torch.inference_mode(False):
                memory = torch.zeros(shape, dtype=cache.kv.dtype, device=cache.kv.device)
            self.buffers[owner] = memory
        cache.kv = self.buffers[owner]
        return cache

    def run(self, x, start, stop, cache, between=None):
        # a graph ends where streams are left
        for depth in sorted(between or ()):
            x = super().run(x, start, depth, cache)
            between[depth].copy_(x)
            start = depth
        return super().run(x, start, stop, cache)

    def run_folded(self, x, blocks, cache, start, between=None):
        T, n, stop = len(x), cache.length[start], start + len(blocks)
        if n == 0 or T > MOST_ROWS:                                       # a prompt
            return super().run_folded(x, blocks, cache, start)
        self.check_room(n + T, cache)
        key = cache.kv.data_ptr(), T, start, stop
        if key not in self.passes:
            self.passes[key] = self.capture(x, blocks, cache.kv[start:stop, :, 0])
        rows, position, out, replay = self.passes[key]
        rows.copy_(x)
        position.fill_(n)
        replay()
        cache.length[start:stop] = [n + T] * len(blocks)
        return out.clone()                    # the next replay overwrites it

    @torch.inference_mode(False)
    @torch.no_grad()
    def capture(self, x, blocks, kv):
        """Fixed memory of one pass and what computes it: (input rows, position, output, replay)."""
        rows, position = x.clone(), torch.zeros(1, dtype=torch.long, device=x.device)
        out = torch.empty_like(rows)

        def compute():
            out.copy_(self.static(rows, position, blocks, kv))

        if x.device.type != "cuda":
            return rows, position, out, compute
        # CUDA graphs want a warm-up on another stream. It writes at position 0: keep what is there
        kept = kv[..., :len(x), :].clone()
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream().wait_stream(side)
        kv[..., :len(x), :] = kept
        with torch.cuda.graph(graph):
            compute()
        return rows, position, out, graph.replay

    def static(self, x, position, blocks, kv):
        """Rows x (T, D) at `position`, .. through folded blocks; kv (blocks, 2, H, N, K)."""
        z, pairs, q, new, y, hidden, both = self.step(len(x), x)
        at = position + torch.arange(len(x), device=x.device)             # (T,)
        turn = self.turn.index_select(0, at)                              # (T, 1, R / 2)
        unseen = torch.arange(kv.shape[-2], device=x.device) > at[:, None]
        mask = torch.zeros_like(unseen, dtype=z.dtype)
        mask.masked_fill_(unseen, float("-inf"))                          # (T, N)
        for cache, (up, down) in zip(kv.unbind(0), blocks):
            up.into(z, self.normalised(x))
            rotate_pairs(pairs, turn)
            cache.index_copy_(2, at, new.to(cache.dtype))
            k, v = cache.to(z.dtype)                                      # (H, N, K) each
            scores = torch.baddbmm(mask, q, k.mT)                         # (H, T, N)
            y.copy_(torch.bmm(scores.softmax(-1), v))
            hidden.addcmul_(hidden, torch.erf(hidden))
            x = down.onto(x, both.to(x.dtype))
        return x


# ---------------------------------------------------------------- the room's demonstration


def pass_ms(decoder, rows, cached):
    """Milliseconds of one pass of `rows` tokens through the whole model, after `cached` others."""
    device, L = decoder.embed_in.weight.device, decoder.config.num_hidden_layers
    cache = decoder.new_cache(1, cached + rows)
    ids = torch.arange(cached, device=device)[None] % decoder.config.vocab_size   # (1, cached)
    decoder.run(decoder.embed(ids), 0, L, cache)

    def step():
        x = decoder.run(decoder.embed(ids[:, :rows]), 0, L, cache)        # (1, rows, D)
        decoder.unembed(x).argmax(-1).tolist()
        cache.truncate(cached)
    return least_ms(step)


def answer_ms(decoder, head, cached):
    """Milliseconds in which an exit head answers at one position, after `cached` others."""
    w = decoder.embed_in.weight
    h = torch.randn(1, cached, w.shape[1], device=w.device, dtype=w.dtype)   # (1, cached, D)
    cache = head.new_cache(1, cached + 1)
    head.body(h, cache)

    def step():
        head.output(head.body(h[:, :1], cache)).argmax(-1).tolist()
        if cache is not None:
            cache.truncate(cached)
    return least_ms(step)


def least_ms(step, repeats=3):
    """The least milliseconds of a few calls, after one that warms up. `step` must end in .tolist(),
    which waits for a GPU."""
    step()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description="Time of one token, readable and fast.")
    parser.add_argument("--model", default=TOY, help="folder or official name (default: the toy)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cuda also shows CUDA graphs")
    parser.add_argument("--cached", type=int, default=128, help="tokens that came before")
    parser.add_argument("--repeats", type=int, default=8, help="times in turn; the median is shown")
    args = parser.parse_args()
    if args.repeats < 1 or args.cached < 16:
        raise InputError("--repeats must be at least 1, --cached at least 16")
    folder = locate(args.model)
    model, heads = Pythia.from_pretrained(folder, args.device), None
    if (folder / "heads-fast.safetensors").exists():
        heads = ExitHeads.load(folder / "heads-fast.safetensors", model)
    columns = {"readable": (model, heads), "fast": fast(model, heads)}
    if args.device != "cpu":
        columns["graphs"] = fast(model, heads, graphs=True)
    threads = torch.get_num_threads()
    print(f"milliseconds after {args.cached} tokens, {threads} threads, {args.device}")
    print(f"{'':<28}" + "".join(f"{name:>10}" for name in columns) + f"{'times':>8}")
    for rows in (1, 2, 4, 8, 16):
        what = "one token" if rows == 1 else f"{rows} tokens in one pass"
        compare(what, columns, args.repeats, functools.partial(pass_of, rows, args.cached))
    for m, layer in enumerate(heads.layers if heads else ()):
        what = f"the {heads.kind} head at depth {layer}"
        compare(what, columns, args.repeats, functools.partial(answer_of, m, args.cached))


def pass_of(rows, cached, decoder, heads):
    return pass_ms(decoder, rows, cached)


def answer_of(m, cached, decoder, heads):
    return answer_ms(decoder, heads.heads[m], cached)


def compare(what, columns, repeats, measure):
    """Print one line: the median of measure(decoder, heads) for every column, measured in turn."""
    times = {name: [] for name in columns}
    for _ in range(repeats):
        for name, twins in columns.items():
            times[name].append(measure(*twins))
    middle = [sorted(own)[repeats // 2] for own in times.values()]
    row = "".join(f"{ms:>10.3f}" for ms in middle)
    print(f"{what:<28}{row}{middle[0] / middle[-1]:>8.2f}", flush=True)


if __name__ == "__main__":
    command_line(main)
