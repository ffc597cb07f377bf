"""Image classifiers with exits, and their budgets: the networks of the EERO paper, small.

A ResNet-18 and a ConvNeXt, with a head after each of their four stages. All heads learn at once:
the loss is the mean of their cross-entropies. Half of the test images calibrate EERO, the other
half is reported, in the table of eero.py. A head here costs next to nothing beside a stage. Its
multiply-adds are still counted, and charged in the same way as those of a language model's head.

    python -m appendix.images                                       shapes, half a minute
    python -m appendix.images --data DIR --download cifar-10        CIFAR, fetched first
    python -m appendix.images --data DIR --no-mirror                DIR/train/CLASS/*.png, DIR/val
Expect accuracy against budget, and every realised budget beside its target.

Letters: n images, M heads (the last is the full network's), C classes, S image side in pixels.
"""
import argparse
import hashlib
import io
import tarfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps           # Pillow comes with matplotlib
from torch.optim.lr_scheduler import OneCycleLR

from model import InputError, command_line, seed_number, written_whole

# ---------------------------------------------------------------- two networks with exits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: ResNet-18's unit."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Identity()
        if stride > 1 or before != width:
            shortcut = nn.Conv2d(before, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class MultiExit(nn.Module):
    """A backbone in stages with a head after each. Its names are torchvision's; `exits` are ours.

    So a torchvision state dict loads with load_state_dict(state, strict=False).
    """

    def heads(self, x):
        """Yield the logits of each exit as soon as it is reached."""
        for stage, head in zip(self.stages(), self.output_heads()):
            x = stage(x)
            yield head(x.mean((2, 3)))

    def forward(self, x):
        """Images (n, 3, S, S) -> list of M logits (n, C), the cheapest head first."""
        return list(self.heads(x))


class ResNet18(MultiExit):
    """ResNet-18 with exits after three stages. small: the stem for images of about 32 pixels."""

    def __init__(self, classes=10, width=64, small=True):
        super().__init__()
        widths, before = [width, 2 * width, 4 * width, 8 * width], width
        side, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, width, side, stride, side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        for i, w in enumerate(widths, 1):
            stage = nn.Sequential(BasicBlock(before, w, 1 if i == 1 else 2), BasicBlock(w, w, 1))
            self.add_module(f"layer{i}", stage)
            before = w
        self.fc = nn.Linear(before, classes)
        self.exits = nn.ModuleList(nn.Linear(w, classes) for w in widths[:-1])

    def stages(self):
        stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.maxpool)
        return [nn.Sequential(stem, self.layer1), self.layer2, self.layer3, self.layer4]

    def output_heads(self):
        return [*self.exits, self.fc]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (n, channels, S, S)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CNBlock(nn.Module):
    """ConvNeXt's unit: 7x7 depthwise convolution, LayerNorm, wide MLP, learnt scale, shortcut."""

    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.Identity(),                                     # torchvision permutes here
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width))
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x):
        y = self.block[0](x).permute(0, 2, 3, 1)               # (n, S, S, width)
        y = self.block[1:](y).permute(0, 3, 1, 2)              # (n, width, S, S)
        return x + self.layer_scale * y


class ConvNeXt(MultiExit):
    """ConvNeXt with exits after three stages; the defaults at small=False are convnext_tiny.

    Stochastic depth is left out: it has no parameters and does nothing at test time.
    """

    def __init__(self, classes=10, width=96, small=True, depths=(3, 3, 9, 3)):
        super().__init__()
        widths, patch = [width, 2 * width, 4 * width, 8 * width], 2 if small else 4
        stem = nn.Conv2d(3, width, patch, patch)
        features = [nn.Sequential(stem, LayerNorm2d(width, eps=1e-6))]
        for i, (w, depth) in enumerate(zip(widths, depths)):
            if i:
                halve = nn.Conv2d(w // 2, w, 2, 2)
                features.append(nn.Sequential(LayerNorm2d(w // 2, eps=1e-6), halve))
            features.append(nn.Sequential(*(CNBlock(w) for _ in range(depth))))
        self.features = nn.Sequential(*features)
        heads = [nn.Sequential(nn.LayerNorm(w, eps=1e-6), nn.Flatten(1), nn.Linear(w, classes))
                 for w in widths]
        self.exits, self.classifier = nn.ModuleList(heads[:-1]), heads[-1]
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def stages(self):
        """The stem, or a halving of the side, and the blocks behind it."""
        return [self.features[i:i + 2] for i in (0, 2, 4, 6)]

    def output_heads(self):
        return [*self.exits, self.classifier]


NETWORKS = {"resnet18": ResNet18, "convnext": ConvNeXt}


@torch.no_grad()
def exit_costs(net, side):
    """Multiply-adds per image, counted on one image of side pixels: (cost (M,), outputs (M,)).

    cost: of the network up to each head, cumulative, without the heads. outputs: of each head.
    """
    inside_heads = {m for head in net.output_heads() for m in head.modules()}
    backbone, outputs, cost = [0], [0], []

    def count(module, _, out):           # every output is a sum over the fan-in
        total = outputs if module in inside_heads else backbone
        total[-1] += out[0].numel() * module.weight[0].numel()

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(count) for m in layers]
    device = next(net.parameters()).device
    for _ in net.eval().heads(torch.zeros(1, 3, side, side, device=device)):
        cost.append(backbone[0])
        outputs.append(0)
    for hook in hooks:
        hook.remove()
    return np.array(cost, float), np.array(outputs[:-1], float)


# ---------------------------------------------------------------- training and evaluation


def augment(x, generator, mirror=True):
    """Random shift by up to an eighth of the side, random mirror image. x uint8 (n, 3, S, S)."""
    n, _, S, _ = x.shape
    pad = S // 8
    corner = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
    rows, columns = corner + torch.arange(S)                   # (n, S) each
    if mirror:
        flipped = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(x, (pad,) * 4)                              # (n, 3, S + 2 pad, S + 2 pad)
    image = torch.arange(n)[:, None, None, None]
    channel = torch.arange(3)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def normalized(x, device="cpu"):
    """uint8 (n, 3, S, S) -> float in about [-2, 2]."""
    return x.to(device).float().sub(128).div(64)


def optimizer_of(net, lr, steps):
    """As these networks are usually trained: SGD for ResNet, AdamW for ConvNeXt, one cycle."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if isinstance(net, ConvNeXt):
        lr = lr / 50
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return optimizer, OneCycleLR(optimizer, lr, steps, pct_start=0.2, cycle_momentum=False)


def paced(total, size=1):
    """Count 0, 1, ... below total, steps of `size` images: (i, its pace every 10 s, else "")."""
    begin = shown = time.perf_counter()
    for i in range(total):
        now, pace = time.perf_counter(), ""
        if now - shown > 10:
            shown, rate = now, i * size / (now - begin)
            pace = f"{rate:,.0f} images/s  {(total - i) * size / rate:.0f} s left"
        yield i, pace


def train(net, x, y, epochs, batch=128, lr=0.1, seed=0, device="cpu", mirror=True):
    """Train all heads jointly: the mean of their cross-entropies, with augmentation.

    x needs x[indices] -> uint8 (n, 3, S, S) only, so that a folder read on demand will do.
    """
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(y) // batch
    steps = epochs * per_epoch
    if not steps:
        raise InputError(f"{len(y)} images are fewer than one batch of {batch}, or epochs is 0")
    optimizer, schedule = optimizer_of(net, lr, steps)
    net.train()
    for step, pace in paced(steps, batch):
        # the next images in this epoch's order
        if step % per_epoch == 0:
            order = torch.randperm(len(y), generator=generator)
        i = order[step % per_epoch * batch:][:batch]
        # one step on all heads
        logits = net(normalized(augment(x[i], generator, mirror), device))
        loss = torch.stack([F.cross_entropy(z, y[i].to(device)) for z in logits]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if pace:
            epoch = 1 + step // per_epoch
            print(f"  epoch {epoch}/{epochs}  loss {loss.item():.3f} nats  {pace}", flush=True)


@torch.no_grad()
def evaluate(net, x, y, device="cpu", batch=500):
    """What EERO needs of every head: uncertainty (entropy in nats), wrong, predictions (n, M)."""
    net.eval()
    uncertainty, predictions = [], []
    for i in range(0, len(y), batch):
        indices = torch.arange(i, min(i + batch, len(y)))
        logits = torch.stack(net(normalized(x[indices], device)), 1)   # (n, M, C)
        log_p = logits.log_softmax(-1)
        uncertainty.append(-(log_p.exp() * log_p).sum(-1).cpu())
        predictions.append(logits.argmax(-1).cpu())
    predictions = torch.cat(predictions)                       # (n, M)
    return {"uncertainty": torch.cat(uncertainty).double().numpy(),
            "predictions": predictions.numpy(), "wrong": (predictions != y[:, None]).numpy()}


# ---------------------------------------------------------------- data: generated shapes

SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "bar", "half disc")


def masks_of(u, v):
    """Where each of the SHAPES is: bool (n, S, S). u, v (n, S, S): coordinates of the shape."""
    radius, square = np.hypot(u, v), np.maximum(abs(u), abs(v))
    return [radius < 1,
            (radius < 1) & (radius > .5),
            square < .9,
            (square < .9) & (square > .45),
            (v < .8) & (v > 2 * abs(u) - 1),
            (np.minimum(abs(u), abs(v)) < .3) & (square < 1),
            (abs(v) < .35) & (abs(u) < 1),
            (radius < 1) & (v < 0)]


def make_shapes(n, side=16, seed=0):
    """Generated images of eight shapes whose difficulty varies from one to the next.

    Difficulty d, uniform in [0, 1], lowers the contrast and raises noise, clutter and occlusion.
    Returns images uint8 (n, 3, side, side), labels (n,) and d (n,).
    """
    rng = np.random.default_rng(seed)

    def between(low, high):
        return rng.uniform(low, high, (n, 1, 1))

    label, d = rng.integers(len(SHAPES), size=n), between(0, 1)
    # the shape: moved, turned and scaled
    grid = np.linspace(-1, 1, side)
    x, y = grid[None, None, :] - between(-.3, .3), grid[None, :, None] - between(-.3, .3)
    turn, size = between(-.4, .4), between(.5, .8)
    u = (np.cos(turn) * x + np.sin(turn) * y) / size           # (n, side, side)
    v = (np.cos(turn) * y - np.sin(turn) * x) / size
    mask = np.choose(label[:, None, None], masks_of(u, v))     # (n, side, side)
    # the ink is brighter than the background, less so where it is hard
    background, tint = rng.normal(0, .3, (2, n, 3, 1, 1))
    ink = background + (1.5 - d[..., None]) * (1 + tint)
    image = np.where(mask[:, None], ink, background)           # (n, 3, side, side)
    # rectangles behind the shape, the first before it; the harder, the more
    for k in range(4):
        left, top, w, h = between(-1, 1), between(-1, 1), between(.1, .5), between(.1, .5)
        across = abs(grid[None, None, :] - left) < w
        patch = across & (abs(grid[None, :, None] - top) < h) & (d > (k + 1) / 5)
        seen = patch & (~mask | (k == 0))
        image = np.where(seen[:, None], rng.normal(0, .5, (n, 3, 1, 1)), image)
    image += rng.normal(0, 1, image.shape) * (.05 + .5 * d[..., None])
    pixels = np.clip(128 + 48 * image, 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(label), d.ravel()


# ---------------------------------------------------------------- data: CIFAR

# the folder in the archive, and the MD5 sum of the official page
CIFAR = {"cifar-10": ("cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530"),
         "cifar-100": ("cifar-100-binary", "03b5dce01913d631647c71ecec9e9cb8")}


def download_cifar(name, folder):
    """Fetch the official archive of a key of CIFAR, check its hash, unpack its .bin files."""
    folder, (inner, md5) = Path(folder), CIFAR[name]
    folder.mkdir(parents=True, exist_ok=True)
    url = f"https://www.cs.toronto.edu/~kriz/{name}-binary.tar.gz"
    with urllib.request.urlopen(url, timeout=60) as answer:
        content = answer.read(1 << 28)                         # the archives have 170 MB
    digest = hashlib.md5(content).hexdigest()
    if digest != md5:
        raise InputError(f"{url}: the hash is {digest}, not {md5}; try again")
    (folder / inner).mkdir(exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".bin"):
                place = folder / inner / Path(member.name).name   # nothing lands elsewhere
                with written_whole(place) as temporary:
                    temporary.write_bytes(tar.extractfile(member).read())


def read_records(path, first, classes):
    """A CIFAR file: (images uint8 (n, 3, 32, 32), labels (n,)).

    `first` bytes precede the pixels of an image; the last of them is its label.
    """
    raw, size = np.fromfile(path, np.uint8), first + 3072
    if not len(raw) or len(raw) % size:
        raise InputError(f"{path}: {len(raw):,} bytes are no multiple of {size}; download it again")
    records = raw.reshape(-1, size)
    labels = records[:, first - 1].astype(np.int64)
    if labels.max() >= classes:
        raise InputError(f"{path}: no label {labels.max()} in CIFAR-{classes}; download it again")
    pixels = records[:, first:].reshape(-1, 3, 32, 32).copy()
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def read_cifar(folder):
    """CIFAR-10 or -100 in the official binary layout, in `folder` or in its usual subfolder.

    Returns (train images uint8 (n, 3, 32, 32), their labels (n,), test images, labels, classes).
    """
    places = [Path(folder), *(Path(folder) / inner for inner, _ in CIFAR.values())]
    tests = [place / name for place in places for name in ("test_batch.bin", "test.bin")]
    test = next((path for path in tests if path.exists()), None)
    if test is None:
        raise InputError(f"{folder} has no CIFAR binaries (test_batch.bin, test.bin) and no train/ "
                         "and val/; --download cifar-10 fetches CIFAR-10")
    train, first, classes = ["train.bin"], 2, 100              # coarse label, then fine label
    if test.name == "test_batch.bin":
        train, first, classes = [f"data_batch_{i}.bin" for i in range(1, 6)], 1, 10
    parts = [read_records(test.parent / name, first, classes) for name in train]
    x, y = map(torch.cat, zip(*parts))
    return x, y, *read_records(test, first, classes), classes


# ---------------------------------------------------------------- data: folders of images


def open_image(path):
    """An image file, upright, in RGB of 8 bits each. InputError with its name if it is damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)              # turned as the camera was held
        if image.mode[0] in "IF":
            # grey beyond 8 bits, which Pillow would cut off at 255 instead of scaling it
            levels = np.asarray(image)
            if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
                raise ValueError("its grey levels have no known range; save it in 8 bits")
            image = Image.fromarray((levels / 257).round().astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:                                 # Pillow raises many kinds
        raise InputError(f"{path} cannot be read ({error}); replace or remove it") from None


class ImageFolder:
    """DIR/CLASS/*.jpeg (ImageNet's layout), read on demand: images[indices] -> uint8 (n, 3, S, S).

    side=None takes the side from the images: the middle one of the first images' shorter edges, at
    most 224. Grey images get three equal channels. Hidden names are left out.
    """

    def __init__(self, folder, side=None):
        shown = [p for p in sorted(Path(folder).iterdir()) if p.name[0] != "."]
        folders = [p for p in shown if p.is_dir()]
        if not folders:
            raise InputError(f"{folder} has no CLASS/*.jpeg images")
        self.classes, self.files, labels = [p.name for p in folders], [], []
        for label, path in enumerate(folders):
            shown = [p for p in sorted(path.iterdir()) if p.name[0] != "."]
            files = [p for p in shown if p.suffix.lower() in (".jpeg", ".jpg", ".png")]
            if not files:
                raise InputError(f"{path} has no .jpeg, .jpg or .png images; add some or remove it")
            self.files += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)
        edges = sorted(min(open_image(file).size) for file in self.files[:25])
        self.side = side or min(224, edges[len(edges) // 2])

    def look(self):
        """Read every file once: a damaged one is met now, and not after hours of training."""
        for i, pace in paced(len(self.files)):
            self.read(self.files[i])
            if pace:
                print(f"  looked at {i:,} of {len(self.files):,} images  {pace}", flush=True)

    def __getitem__(self, indices):
        return torch.stack([self.read(self.files[i]) for i in indices])

    def read(self, path):
        """The middle square, (3, side, side): as wide as the shorter edge of a small image.

        Of an image larger than the side it has 7/8 of that edge, ImageNet's usual 224 of 256.
        """
        image = open_image(path)
        square = min(image.size)
        if square > self.side:
            square *= 7 / 8
        left, top = ((length - square) // 2 for length in image.size)
        box = left, top, left + square, top + square
        image = image.resize((self.side, self.side), Image.BILINEAR, box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Data(NamedTuple):
    name: str
    x: object                # training images, x[indices] -> uint8 (n, 3, S, S)
    y: torch.Tensor          # their labels (n,)
    x_test: object
    y_test: torch.Tensor
    classes: int
    side: int                # pixels


def load_images(folder, seed, side=None):
    """The images of --data DIR, named by that folder, or generated shapes."""
    if folder is None:
        x, y, _ = make_shapes(6000, seed=2 * seed)
        x_test, y_test, _ = make_shapes(20000, seed=2 * seed + 1)
        return Data("shapes", x, y, x_test, y_test, len(SHAPES), 16)
    folder = Path(folder)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        x = ImageFolder(folder / "train", side)
        test = ImageFolder(folder / "val", x.side)
        if x.classes != test.classes:
            raise InputError(f"{folder}: train/ and val/ must hold folders of the same names")
        x.look()
        test.look()
        return Data(folder.resolve().name, x, x.labels, test, test.labels, len(x.classes), x.side)
    if side is not None:
        raise InputError("--side is for folders of images; CIFAR and the shapes have their own")
    return Data(folder.resolve().name, *read_cifar(folder), 32)


# ---------------------------------------------------------------- the command


def one_network(args, data, seed, device):
    """Train a network of this seed: (its answers on the test images, cost, outputs), costs in %."""
    epochs, width, batch = args.epochs or 5, args.width or 8, 64
    if args.data:
        epochs, width, batch = args.epochs or 30, args.width or 64, 128
    torch.manual_seed(seed)
    net = NETWORKS[args.net](data.classes, width, small=data.side < 64).to(device)
    cost, outputs = exit_costs(net, data.side)
    full = cost[-1] + outputs[-1]
    print(f"{data.name}, {data.side} pixels, {args.net} of width {width}: {full / 1e6:.1f} M "
          f"multiply-adds per image; {epochs} epochs of {len(data.y):,} images, seed {seed}",
          flush=True)
    train(net, data.x, data.y, epochs, batch, seed=seed, device=device, mirror=not args.no_mirror)
    answers = evaluate(net, data.x_test, data.y_test, device)
    return answers, 100 * cost / full, 100 * outputs / full


def options():
    parser = argparse.ArgumentParser(description="Image classifiers with exits, under a budget.")
    option = parser.add_argument
    option("--data", metavar="DIR", help="CIFAR binaries, or train/ and val/ by class")
    option("--download", choices=CIFAR, help="first fetch its binaries into --data DIR")
    option("--side", type=int, help="pixels, for folders (default: from the images)")
    option("--no-mirror", action="store_true", help="train without mirror images (digits)")
    option("--net", choices=NETWORKS, default="resnet18")
    option("--width", type=int, help="channels of the first stage (default 64; shapes 8)")
    option("--epochs", type=int, help="over the training images (default 30; shapes 5)")
    option("--seeds", type=int, default=1, help="networks to train and average (default 1)")
    option("--seed", type=seed_number, default=0, help="the first seed (default 0)")
    option("--beta", type=float, help="of EERO, per unit of error rate (default: chosen)")
    option("--figure", metavar="PATH", help="also draw accuracy and cost by budget")
    args = parser.parse_args()
    numbers = [args.side, args.width, args.epochs, args.seeds]
    if args.download and not args.data:
        raise InputError("--download needs --data DIR, the folder to write to")
    if any(number is not None and number < 1 for number in numbers):
        raise InputError("--side, --width, --epochs and --seeds must be at least 1")
    if args.beta is not None and not args.beta >= 0:
        raise InputError("--beta must be at least 0")
    return args


def main():
    from appendix.budgets import compare, report, report_misses
    args = options()
    if args.figure:
        from appendix import figures
        figures.check(args.figure)
    if args.download:
        download_cifar(args.download, args.data)
    runs, device = [], "cuda" if torch.cuda.is_available() else "cpu"
    for seed in range(args.seed, args.seed + args.seeds):
        if not (args.data and runs):                           # a folder's are the same again
            data = load_images(args.data, seed, args.side)
        answers, cost, outputs = one_network(args, data, seed, device)
        # half of the test images calibrate, the other half is reported
        order = np.random.default_rng(seed).permutation(len(data.y_test))
        halves = [{name: values[i] for name, values in answers.items()}
                  for i in np.array_split(order, 2)]
        budgets = np.linspace(cost[0] + outputs[0], 100, 9)
        runs.append((compare(*halves, cost, budgets, outputs, args.beta, seed), halves[1]))
    title, unit = f"accuracy on {data.name}", "% of the full network"
    scores = report(runs, "wrong", cost, budgets, outputs, unit, title)
    report_misses(runs, 100)
    if args.figure:
        # a folder's name may hold what matplotlib would refuse
        title = title.replace("$", r"\$").encode("utf-8", "replace").decode()
        figures.budget(args.figure, runs, scores, budgets, 100, unit, title)
        print(f"figure: {args.figure}")


if __name__ == "__main__":
    command_line(main)
