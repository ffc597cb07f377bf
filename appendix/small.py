"""Side room: the fast twin of a small model, in NumPy.

In a small model a matrix is read in a few microseconds, about what a call of PyTorch costs. So the
calls count, and the cold ones most: a pass fills the processor's cache with weights, and then the
first call of a function takes 3 to 10 times as long as the next. NumPy's functions are shorter, and
views of its arrays cost next to nothing. Its library multiplies a row by a small matrix in a third
of the time of PyTorch's, and four rows take little longer, if four things are as it likes them:

    the matrix     cut into panels of 64 columns, each in one piece, read in order
    the rows       not one or three: two take less time than one, and four less than three
    the keys       transposed, K x N, so that q k is a sum of K rows of length N
    the sizes      below ONE_THREAD multiplications: from there on it starts threads of its own,
                   and those of the two libraries collide; longer products are PyTorch's

Normalisation, attention's softmax and GELU stay PyTorch's, on the same memory: its calls are warm
where every block makes them. After the pass, `SmallChoice` reads tokens and uncertainty off the
logits.

`appendix.fast.fast` takes this twin for a model in float32 on a CPU whose folded matrices have at
most LARGEST entries. Wider models read their weights for longer than a call takes: there oneDNN is
as fast, and its threads share the work.
Letters: B batch, T rows, N cached positions, D hidden size, I the MLP's width, H heads, K head
size, V vocabulary.
"""
import math

import numpy as np
import torch

from appendix.fast import (MOST_ROWS, Fused, FusedBlockHead, FusedHead, Product,
                           prompt_attention)
from dssd import Choice
from heads import BlockHead, ExitHead, TiedHead
from model import check_numbers

ONE_THREAD = 2 ** 19    # multiplications of one product from which on NumPy starts threads
LARGEST = 2 ** 19       # entries of a matrix that is cut into panels: up to D = 256 and I = 4 D
WIDTH = 64              # columns of a panel


def is_small(model, heads=None):
    """Whether Small is the twin to take for a model and its heads."""
    D, I = model.config.hidden_size, model.config.intermediate_size
    parameters = [*model.parameters(), *(heads.parameters() if heads is not None else ())]
    here = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
    return here and D * (3 * D + I) <= LARGEST                            # entries of w1: see fold


class PanelProduct(Product):
    """x -> x w + b by NumPy, with w (n, m) cut into panels of columns. For tensors; `fill` is for
    arrays.

    One row and three stand in buffers with a row more: see above. The buffers are the same for all
    products of one shape.
    """

    def __init__(self, w, b, buffers):
        super().__init__(w, b)
        n, m = w.shape
        self.width = WIDTH if m % WIDTH == 0 else m
        panels = self.w.numpy().reshape(n, -1, self.width).swapaxes(0, 1)
        self.panels = np.ascontiguousarray(panels)                        # (m / width, n, width)
        self.bias = np.zeros(m, np.float32) if b is None else b.numpy()
        self.most = min(MOST_ROWS, (ONE_THREAD - 1) // (n * self.width))  # rows, on one thread
        if (n, m) not in buffers:
            buffers[n, m] = {T: self.with_a_row_more(T) for T in (1, 3) if T < self.most}
        self.padded = buffers[n, m]

    def with_a_row_more(self, T):
        """Buffers with a row more -> views: x (T, n), all of x, all products as panels, products
        (T, m)."""
        x = np.zeros((T + 1, self.w.shape[0]), np.float32)
        products = np.zeros((T + 1, self.w.shape[1]), np.float32)
        return x[:T], x, self.parts(products), products[:T]

    def parts(self, products):
        """A view of products (T, m) as panels (m / width, T, width)."""
        return products.reshape(len(products), -1, self.width).swapaxes(0, 1)

    def __call__(self, x):
        out = np.empty((len(x), self.w.shape[1]), np.float32)             # (T, m)
        self.fill(out, x.numpy())
        return torch.from_numpy(out)

    def fill(self, out, x):
        """out (T, m) = x w + b, for arrays."""
        T = len(x)
        # with a row more
        if T in self.padded:
            rows, padded, parts, products = self.padded[T]
            rows[:] = x
            np.matmul(padded, self.panels, out=parts)
            np.add(products, self.bias, out=out)
        # as they are
        elif T <= self.most:
            np.matmul(x, self.panels, out=self.parts(out))
            out += self.bias
        # in pieces that stay on one thread
        elif T <= MOST_ROWS and self.most:
            for i in range(0, T, self.most):
                self.fill(out[i:i + self.most], x[i:i + self.most])
        # by PyTorch
        else:
            out[:] = super().__call__(torch.from_numpy(x)).numpy()


def multiply(a, b, out):
    """out = a b for arrays of H small matrices each."""
    if a[0].size * b.shape[2] < ONE_THREAD:
        np.matmul(a, b, out=out)
    else:
        torch.from_numpy(out).copy_(torch.bmm(torch.from_numpy(a), torch.from_numpy(b)))


def causal_mask(T):
    """-inf where a new row (T, T) would see a later one, else 0."""
    if T <= MOST_ROWS:
        return MASK[:T, :T]                   # a corner of a mask is a smaller mask
    return np.triu(np.full((T, T), -np.inf, np.float32), 1)


MASK = causal_mask(MOST_ROWS + 1)


def negative_margin(z):
    """confidence.negative_margin of the logits (V,) of one position."""
    best = z.argmax()
    p = np.exp(z - z[best])                   # of the most likely token 1, before it is scaled
    total = np.add.reduce(p)
    p[best] = 0
    return (np.maximum.reduce(p) - 1) / total


class SmallChoice(Choice):
    """Choice in arrays. Ids and probabilities are arrays, logits tensors.

    All its calls are cold. np.add.reduce(p), not p.sum(): an array's method passes through Python.
    """

    def of(self, logits):
        if self.temperature > 0 and self.top_p < 1:
            return super().of(logits).numpy()
        z = logits.numpy()
        if z.ndim == 1:
            return self.of_one(z)
        return np.array([self.of_one(row) for row in z])

    def of_one(self, z):
        """What the logits (V,) of one position say."""
        best = z.argmax()                     # NaN is larger than all
        if not math.isfinite(z[best]):
            check_numbers(torch.from_numpy(z).amax())                     # it says what is wrong
        if self.temperature == 0:
            return best
        p = z - z[best]                                                   # (V,)
        p /= np.float32(max(self.temperature, 1e-20))
        np.exp(p, out=p)
        p /= np.add.reduce(p)
        return p

    def draw(self, p):
        upto = np.add.accumulate(p.astype(np.float64))                    # (V,)
        return int(upto.searchsorted(self.random() * upto[-1], "right"))

    def uncertainty(self, measure, logits):
        if measure != "margin" or logits.ndim > 1:
            return super().uncertainty(measure, logits)
        u = negative_margin(logits.numpy())
        return u if u <= 0 else np.float32(np.inf)                        # NaN is never certain

    def residual(self, weight, p, q):
        residual = np.maximum(weight * p - q, 0)
        return residual, float(np.add.reduce(residual))

    def chance_kept(self, full, head):
        if self.temperature == 0:
            return full == head
        return np.add.reduce(np.minimum(full, head), -1)


class Small(Fused):
    """Fused in arrays: residual streams are arrays, and products of few rows NumPy's. Logits are
    tensors. A cache is two arrays, keys (blocks, H, K, room) and values (blocks, H, room, K).
    """
    Choice = SmallChoice

    def __init__(self, model):
        self.buffers = {}                     # of the products, by their shape
        super().__init__(model)
        self.like = model.embed_in.weight.detach()    # at hand: a module looks names up slowly
        self.table = self.like.numpy()                                    # (V, D)
        self.turn = self.turn.numpy()                                     # (context, 1, R / 2)

    def product(self, w, b, dtype):
        if w.numel() > LARGEST:
            return super().product(w, b, dtype)
        b = None if b is None else b.detach().to(dtype)
        return PanelProduct(w.detach().to(dtype), b, self.buffers)

    def twin(self, head):
        return TWINS.get(type(head), OtherHead)(self, head)

    def new_states(self, depths, room):
        return self.model.new_states(depths, room).numpy()

    def placed(self, cache, owner):
        blocks, _, _, H, room, K = cache.kv.shape
        cache.kv = (np.empty((blocks, H, K, room), np.float32),
                    np.empty((blocks, H, room, K), np.float32))
        if owner is not None:                 # a block head's
            cache.seen = cache.seen.numpy()
        return cache

    def new_step(self, T, dtype, device):
        """A Step whose `hidden` is a tensor, and all else arrays."""
        step = super().new_step(T, dtype, device)
        arrays = {name: getattr(step, name).numpy() for name in ("z", "q", "new", "y", "both")}
        # complex numbers at any address, so that a K may be odd
        (H, _, K), W = step.q.shape, step.z.shape[1]
        shape, strides = (T, 2 * H, self.R // 2), (4 * W, 4 * K, 8)       # bytes
        pairs = np.ndarray(shape, np.complex64, arrays["z"], 0, strides)
        return step._replace(pairs=pairs, **arrays)

    def embed(self, ids):
        if len(ids) == len(ids[0]) == 1 and 0 <= ids[0][0] < len(self.table):
            return self.table[None, ids[0][0]:ids[0][0] + 1]              # (1, 1, D), a view
        return self.model.embed(ids).detach().numpy()                     # it refuses wrong ones

    # NaN and infinity need no warning here: check_numbers finds them in the logits
    @np.errstate(all="ignore")
    def output(self, x, matrix):
        return matrix(self.normalised(torch.from_numpy(np.asarray(x)[0])))[None]

    @np.errstate(all="ignore")
    def run(self, x, start, stop, cache, between=None):
        return self.run_folded(np.asarray(x), self.blocks[start:stop], cache, start, between)

    def run_folded(self, x, blocks, cache, start, between=None):
        """Streams x (1, T, D) through folded blocks -> a new array (1, T, D)."""
        T, n = x.shape[1], cache.length[start]
        end = n + T
        self.check_room(end, cache)
        z, pairs, q, new, y, hidden, both = self.step(T, self.like)
        turn = self.turn[n:end]                                           # (T, 1, R / 2)
        prompt = n == 0 and T > 1
        if not prompt:
            mask = causal_mask(T)
            scores = np.empty((len(q), T, end), np.float32)               # (H, T, n + T)
        x, added = x.copy(), np.empty(x.shape[1:], np.float32)
        stream = torch.from_numpy(x)                                      # the same memory
        for depth, (up, down) in enumerate(blocks, start):
            up.fill(z, self.normalised(stream).numpy()[0])
            pairs *= turn
            k, v = self.store(new, cache, depth)
            if prompt:
                y[:] = prompt_attention(*map(torch.from_numpy, (q, *new))).numpy()
            else:
                multiply(q, k, scores)
                if T > 1:
                    newest = scores[:, :, n:]                             # (H, T, T)
                    newest += mask
                multiply(torch.from_numpy(scores).softmax(-1).numpy(), v, y)
            hidden.addcmul_(hidden, torch.erf(hidden))                    # sqrt(2) GELU: see fold
            down.fill(added, both)
            x += added
            if between and depth + 1 in between:
                between[depth + 1][:] = x
        return x

    def store(self, new, cache, block):
        """Keep new keys and values (2, H, T, K) -> the block's (H, K, n + T) and (H, n + T, K)."""
        n = cache.length[block]
        end = n + new.shape[2]
        k, v = cache.kv[0][block, :, :, :end], cache.kv[1][block, :, :end]
        k[:, :, n:], v[:, n:] = new[0].swapaxes(1, 2), new[1]
        cache.length[block] = end
        return k, v

    @np.errstate(all="ignore")
    def keys_values(self, x, block, cache):
        x, n = torch.from_numpy(np.asarray(x)[0]), cache.length[block]
        step = self.step(len(x), x)
        up, _ = self.blocks[block]
        up.fill(step.z, self.normalised(x).numpy())
        pairs = step.pairs
        pairs *= self.turn[n:n + len(x)]
        self.store(step.new, cache, block)


class SmallHead(FusedHead):
    """A linear or tied head of a Small."""

    def body(self, h, cache=None):
        return h                              # the norm is in `output`


class SmallBlockHead(FusedBlockHead):
    """A block head of a Small."""

    @np.errstate(all="ignore")
    def body(self, h, cache):
        h = np.asarray(h)
        before, x = cache.push(h), np.empty(h.shape, np.float32)          # (1, T, D)
        self.shift.fill(x[0], before[0])
        x += h
        return self.decoder.run_folded(x, self.blocks, cache, 0)


class OtherHead(FusedHead):
    """Any other head, as it is: it reads tensors."""

    def __init__(self, decoder, head):
        self.head = head

    def body(self, h, cache=None):
        return self.head.body(torch.from_numpy(np.asarray(h)), cache)

    def output(self, x):
        return self.head.output(x)


TWINS = {ExitHead: SmallHead, TiedHead: SmallHead, BlockHead: SmallBlockHead}
