"""Images: networks against torchvision and closed forms, data readers against files by hand."""
import hashlib
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch

from appendix import images
from conftest import assert_refused, call
from eero import cost_of_exits

# ---------------------------------------------------------------- networks


def torchvision_models():
    try:
        import torchvision.models as models
    except (ImportError, RuntimeError) as error:     # RuntimeError: built for another torch
        pytest.skip(f"torchvision is not usable here: {error}")
    return models


@torch.no_grad()
def test_torchvision_state_dict_gives_torchvision_outputs():
    models = torchvision_models()
    for name, network in (("resnet18", images.ResNet18), ("convnext_tiny", images.ConvNeXt)):
        reference = getattr(models, name)(weights=None).eval()
        for p in reference.parameters():                       # so that every part matters
            torch.nn.init.normal_(p, 0.5 if p.dim() == 1 else 0, 0.05)
        ours = network(1000, small=False).eval()
        missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
        assert unexpected == [] and all(key.startswith("exits.") for key in missing)
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        expected = reference(x)
        assert expected.std() > 1e-3
        assert torch.allclose(ours(x)[-1], expected, atol=1e-4, rtol=1e-4)


def test_exit_costs_of_resnet18_in_closed_form():
    w, S, C = 64, 32, 10
    # the four convolutions of a stage; the stem
    stage, expected, total = 4 * 9 * w * w * S * S, [], 27 * w * S * S
    for i in range(4):
        if i:       # the first of them sees half the channels, the shortcut is a 1x1 convolution
            total += stage - stage / 8 + stage / 72
        else:
            total += stage
        expected.append(total)
    cost, outputs = images.exit_costs(images.ResNet18(C), S)
    assert cost.tolist() == expected
    assert outputs.tolist() == [w * 2 ** i * C for i in range(4)]
    assert cost_of_exits(cost, outputs)[-1] == pytest.approx(556e6, rel=0.01)   # as is well known


def test_exit_costs_equal_pytorchs_counter():
    from torch.utils.flop_counter import FlopCounterMode
    for net, side in ((images.ResNet18(5, 8), 16), (images.ResNet18(5, 8, small=False), 64),
                      (images.ConvNeXt(5, 8, depths=(1, 1, 2, 1)), 32)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net.eval()(torch.zeros(1, 3, side, side))
        costs = cost_of_exits(*images.exit_costs(net, side))
        assert 2 * costs[-1] == counter.get_total_flops()
        assert (np.diff(costs) > 0).all() and len(costs) == 4


@pytest.mark.slow
def test_training_learns_and_repeats():
    x, y, _ = images.make_shapes(256, seed=3)
    for network, options in ((images.ResNet18, {"width": 8}),
                             (images.ConvNeXt, {"width": 16, "depths": (1, 1, 1, 1)})):
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            net = network(8, **options)
            untrained = images.evaluate(net, x, y)
            images.train(net, x, y, epochs=3, batch=32, seed=1)
            results.append(images.evaluate(net, x, y, batch=100))
        first, second = results
        assert (first["uncertainty"] == second["uncertainty"]).all()
        with torch.no_grad():
            p = torch.stack(net(images.normalized(x)), 1).softmax(-1)   # (n, M, C), all at once
        assert np.allclose(first["uncertainty"], -(p * p.log()).sum(-1), atol=1e-4)
        assert (first["wrong"] == (p.argmax(-1) != y[:, None]).numpy()).all()
        surer = untrained["uncertainty"].mean() - first["uncertainty"].mean()
        better = untrained["wrong"].mean() - first["wrong"].mean()
        assert surer > 0.01 or better > 0.05
        with pytest.raises(ValueError, match="fewer than one batch"):
            images.train(net, x, y, epochs=1, batch=1000)


def test_augment_is_a_shift_and_a_mirror():
    x = torch.arange(16 * 16 * 3).remainder(251).to(torch.uint8).view(1, 3, 16, 16) + 1
    x = x.repeat(64, 1, 1, 1)
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2))
    shifts = [padded[:, r:r + 16, c:c + 16] for r in range(5) for c in range(5)]
    mirrored = shifts + [p.flip(2) for p in shifts]
    for mirror, possible in ((True, mirrored), (False, shifts)):
        out = images.augment(x, torch.Generator().manual_seed(0), mirror)
        found = set()
        for image in out:
            found.add(next(i for i, p in enumerate(possible) if torch.equal(p, image)))
        assert out.is_contiguous()       # channels-last backward crashes on some CPUs
        assert len(found) > (20 if mirror else 15)
        assert not mirror or max(found) >= 25


# ---------------------------------------------------------------- data


def test_shapes_are_seeded_and_harder_ones_are_harder():
    (x, y, d), (x2, y2, _), (x3, _, _) = (images.make_shapes(400, seed=s) for s in (0, 0, 1))
    assert torch.equal(x, x2) and torch.equal(y, y2) and not torch.equal(x, x3)
    assert x.shape == (400, 3, 16, 16) and x.dtype == torch.uint8
    assert set(y.tolist()) == set(range(8))
    roughness = (x[..., 1:].float() - x[..., :-1].float()).abs().mean((1, 2, 3)).numpy()
    assert np.corrcoef(roughness, d)[0, 1] > 0.5               # noise and clutter grow with d


def test_shapes_stay_the_published_ones():
    """The results page is about these very images: every pixel of 400 of them."""
    x, y, _ = images.make_shapes(400, seed=0)
    content = x.numpy().tobytes() + y.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "6192f107c6199923"


def write_cifar(folder, hundred=False):
    """Three records per file, each pixel byte a function of its place."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    if hundred:
        names = ["train.bin", "test.bin"]
    records = {}
    for name in names:
        label = rng.integers(0, 100 if hundred else 10, 3)
        pixels = rng.integers(0, 256, (3, 3, 32, 32))
        records[name] = label, pixels
        content = []
        for i in range(3):
            content += [7] * hundred + [label[i]] + pixels[i].ravel().tolist()
        (folder / name).write_bytes(bytes(int(b) for b in content))
    return records


def test_read_cifar(tmp_path):
    for hundred in (False, True):
        outer = tmp_path / str(hundred)
        inner = outer / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
        records = write_cifar(inner, hundred)
        name = "test.bin" if hundred else "test_batch.bin"
        for folder in (outer, inner):
            x, y, x_test, y_test, classes = images.read_cifar(folder)
            labels, pixels = records[name]
            assert classes == (100 if hundred else 10)
            assert x.shape == (3 if hundred else 15, 3, 32, 32)
            assert (x_test.numpy() == pixels).all() and (y_test.numpy() == labels).all()
            assert (y.numpy() == np.concatenate([r[0] for r in records.values()][:-1])).all()
        assert images.load_images(inner, 0).name == inner.name
        assert images.load_images(outer, 0).name == str(hundred)
        # an empty file, one cut short, a label beyond the classes: refused by name,
        # in any of the files
        first = next(iter(records))
        for path in (inner / name, inner / first):
            whole = path.read_bytes()
            wrong_label = bytes([7] * hundred + [200]) + whole[1 + hundred:]
            for content, words in ((b"", "0 bytes"), (whole[:-1], "no multiple of"),
                                   (wrong_label, "no label 200")):
                path.write_bytes(content)
                with pytest.raises(ValueError, match=f"{path.name}.*{words}"):
                    images.read_cifar(outer)
            path.write_bytes(whole)
    with pytest.raises(ValueError, match="no CIFAR binaries"):
        images.read_cifar(tmp_path / "nowhere")


def test_download_checks_the_hash_and_unpacks_inside_the_folder(tmp_path, monkeypatch):
    write_cifar(tmp_path / "source")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in (tmp_path / "source").iterdir():
            tar.add(path, f"../../evil/{path.name}")
    content = buffer.getvalue()
    monkeypatch.setattr(images.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))
    with pytest.raises(ValueError, match="the hash is"):
        images.download_cifar("cifar-10", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    known = "cifar-10-batches-bin", hashlib.md5(content).hexdigest()
    monkeypatch.setitem(images.CIFAR, "cifar-10", known)
    images.download_cifar("cifar-10", tmp_path / "data")
    assert images.read_cifar(tmp_path / "data")[0].shape == (15, 3, 32, 32)
    assert not (tmp_path.parent / "evil").exists() and not (tmp_path / "evil").exists()
    assert not list((tmp_path / "data").rglob("*.tmp"))


def write_folder(folder, mode, size, classes=("a", "b"), n=1, seed=0):
    """PNG files by class, of random pixels."""
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(seed)
    channels = () if mode == "L" else (3,)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
            Image.fromarray(pixels, mode).save(folder / name / f"{i}.png")


def test_image_folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("b", (0, 200, 0)), ("a", (200, 0, 0))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (60, 40), colour).save(tmp_path / name / "1.png")
    folder = images.ImageFolder(tmp_path, 24)
    assert folder.classes == ["a", "b"] and folder.labels.tolist() == [0, 1]
    batch = folder[torch.tensor([1, 0])]
    assert batch.shape == (2, 3, 24, 24) and batch.dtype == torch.uint8
    assert batch[0, :, 5, 5].tolist() == [0, 200, 0] and batch[1, :, 5, 5].tolist() == [200, 0, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no CLASS"):
        images.ImageFolder(tmp_path / "empty", 24)


def test_small_and_grey_images_keep_their_side_and_every_pixel(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for mode in ("L", "RGB"):
        write_folder(tmp_path / mode, mode, (16, 16), n=3)
        folder = images.ImageFolder(tmp_path / mode)
        assert folder.side == 16
        for i, file in enumerate(folder.files):
            expected = np.array(Image.open(file).convert("RGB")).transpose(2, 0, 1)
            assert (folder[torch.tensor([i])][0].numpy() == expected).all()
    # the shorter edge counts, and 224 is the most; --side overrides both
    write_folder(tmp_path / "wide", "L", (40, 20))
    write_folder(tmp_path / "large", "RGB", (300, 320))
    assert images.ImageFolder(tmp_path / "wide").side == 20
    assert images.ImageFolder(tmp_path / "large").side == 224
    assert images.ImageFolder(tmp_path / "large", 32)[torch.tensor([0])].shape == (1, 3, 32, 32)
    # the middle of a wide image, unscaled
    wide = images.ImageFolder(tmp_path / "wide")
    pixels = np.array(Image.open(wide.files[0]))[:, 10:30]
    assert (wide[torch.tensor([0])][0, 0].numpy() == pixels).all()


def png_of_16_bits(levels):
    """A PNG file's bytes, written by hand: levels (h, w, channels) of 16 bits; 1 to 4 channels."""
    h, w, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]                  # grey, grey + alpha, RGB, RGBA
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in levels)
    header = struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += (struct.pack(">I", len(data)) + name + data
                    + struct.pack(">I", zlib.crc32(name + data)))
    return content


def test_16_bits_equal_8_bits_within_one_level(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    ramp = np.linspace(0, 65535, 32 * 32).round().reshape(32, 32)
    files = {str(n): png_of_16_bits(np.repeat(ramp[:, :, None], n, 2)) for n in (1, 2, 3, 4)}
    # Pillow's modes of 16 bits
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", np.int32)):
        buffer = io.BytesIO()
        Image.fromarray(ramp.astype(kind)).save(buffer, "TIFF")
        files[mode] = buffer.getvalue()
        assert Image.open(buffer).mode == mode
    expected = np.array(
        Image.fromarray((ramp / 256).astype(np.uint8)).convert("RGB")).transpose(2, 0, 1)
    for name, content in files.items():
        path.write_bytes(content)
        pixels = images.ImageFolder(tmp_path)[torch.tensor([0])][0].numpy()
        assert np.abs(pixels.astype(int) - expected).max() <= 1, name
    Image.fromarray(ramp.astype(np.float32)).save(path, "TIFF")
    with pytest.raises(ValueError, match="1.png.*no known range"):
        images.ImageFolder(tmp_path)


def test_kinds_of_images_that_are_read(tmp_path):
    """One pixel, a long line, CMYK, an animation, palettes, a photograph taken with the camera
    turned."""
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    red, green = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 255, 0))
    red.resize((1, 1)).save(tmp_path / "a" / "1.png")
    red.resize((1, 5000)).save(tmp_path / "a" / "2.png")
    red.convert("CMYK").save(tmp_path / "a" / "3.jpg")
    red.save(tmp_path / "a" / "4.png", format="GIF", save_all=True, append_images=[green])
    red.convert("P").save(tmp_path / "a" / "5.png")
    batch = images.ImageFolder(tmp_path, 8)[torch.arange(5)]
    assert (batch[:, 0] > 250).all() and (batch[:, 1:] < 5).all()
    # red above green; turned by the camera's note it lies on the right
    turned = Image.new("RGB", (16, 16), (0, 255, 0))
    turned.paste((255, 0, 0), (0, 0, 16, 8))
    note = Image.Exif()
    note[0x112] = 6
    turned.save(tmp_path / "a" / "0.jpg", exif=note)
    image = images.ImageFolder(tmp_path, 16)[torch.tensor([0])][0]
    assert (image[0, 8, 13] > 200 > 50 > image[0, 8, 2]
            and image[1, 8, 2] > 200 > 50 > image[1, 8, 13])


def test_hidden_names_are_left_out_and_an_empty_class_is_said(tmp_path):
    write_folder(tmp_path / "train", "RGB", (16, 16))
    for place in (tmp_path / "train", tmp_path / "train" / "a"):
        (place / ".ipynb_checkpoints").mkdir()
        (place / ".DS_Store").write_bytes(b"x")
        (place / "._0.png").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    # a linked folder is a class like others
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    # only hidden files are left in it
    with pytest.raises(ValueError, match="train/a has no .jpeg"):
        images.ImageFolder(tmp_path / "train")
    write_folder(tmp_path / "train", "RGB", (16, 16), "a")
    folder = images.ImageFolder(tmp_path / "train")
    assert folder.classes == ["a", "b", "c"] and [p.name for p in folder.files] == ["0.png"] * 3


def test_a_damaged_image_is_named_before_the_training(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        write_folder(tmp_path / split, "RGB", (16, 16), n=64)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    bomb = bytearray(buffer.getvalue())
    bomb[16:24] = struct.pack(">II", 30000, 30000)             # the size in its header
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    jpeg = io.BytesIO()
    Image.effect_noise((16, 16), 100).save(jpeg, "JPEG")
    # not among the first, and not for training
    path = tmp_path / "val" / "b" / "50.png"
    for content in (b"", b"<html>", jpeg.getvalue()[:-40], buffer.getvalue()[:45], bytes(bomb)):
        path.write_bytes(content)
        result = call(images, "--data", tmp_path)
        assert_refused(result, f"{path} cannot be read", "replace or remove it")
        assert result[1] == "" and result[2].count("\n") == 1


def test_a_folder_gives_its_name_and_one_side_to_train_and_val(tmp_path):
    digits = tmp_path / "digits"
    write_folder(digits / "train", "L", (16, 16))
    write_folder(digits / "val", "L", (28, 28))
    data = images.load_images(digits, 0)
    assert data.name == "digits" and data.side == 16 and data.classes == 2
    assert data.x[torch.tensor([0])].shape == data.x_test[torch.tensor([0])].shape == (1, 3, 16, 16)
    assert images.load_images(digits, 0, side=20).side == 20
    write_folder(digits / "val", "L", (28, 28), classes=("c",))
    with pytest.raises(ValueError, match="same names"):
        images.load_images(digits, 0)


# ---------------------------------------------------------------- the command line


def table_rows(out):
    lines = [line.split() for line in out.splitlines() if line.count("|") == 1]
    return [line for line in lines if line[0][0].isdigit()]


@pytest.mark.slow
def test_command_line_on_a_small_data_set(tmp_path):
    """A CIFAR-like folder from end to end: one table row per budget, the figure, no other file."""
    names = ["test_batch.bin"] + [f"data_batch_{i}.bin" for i in range(1, 6)]
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(names):
        x, y, _ = images.make_shapes(100, 32, seed)
        labels = y.numpy().astype(np.uint8)[:, None]
        np.concatenate([labels, x.numpy().reshape(100, -1)], 1).tofile(tmp_path / "data" / name)
    status, out, errors = call(images, "--data", tmp_path / "data", "--width", 2, "--epochs", 1,
                               "--seeds", 2, "--figure", tmp_path / "images.png")
    assert status == 0, errors
    rows = table_rows(out)
    assert len(rows) == 9 and rows[0][0] == rows[0][1] and rows[-1][0] == "100.00"
    assert "accuracy on data" in out and "CIFAR" not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "images.png"]
    assert (tmp_path / "images.png").read_bytes()[:4] == b"\x89PNG"


def test_command_line_on_a_folder_of_small_grey_images(tmp_path):
    # matplotlib would read formulas, and refuses what is no UTF-8
    name = "digits $b_^$ caf\udce9"
    for split, n in (("train", 70), ("val", 30)):
        write_folder(tmp_path / name / split, "L", (16, 16), n=n)
    status, out, errors = call(images, "--data", tmp_path / name, "--width", 2, "--epochs", 1,
                               "--no-mirror", "--beta", 5, "--figure", tmp_path / "images.svg")
    assert status == 0, errors
    assert out.startswith(f"{name}, 16 pixels") and len(table_rows(out)) == 9


def test_bad_input_is_refused_before_any_work():
    for arguments, words in (
            (("--data", "nowhere"), "no CIFAR binaries"),
            (("--download", "cifar-10"), "needs --data"),
            (("--seeds", "0"), "at least 1"), (("--epochs", "0"), "at least 1"),
            (("--side", "0"), "at least 1"), (("--beta", "-1"), "at least 0"),
            (("--seed", "-1"), "whole number"),
            (("--seed", str(2 ** 64)), "whole number"),
            (("--figure", "nowhere/eero.png"), "folder"), (("--figure", "eero.exe"), ".png")):
        result = call(images, *arguments)
        assert_refused(result, words)
        assert result[1] == ""           # it has not begun to train


def test_bad_input_is_one_line_and_status_2():
    status, out, errors = call(images, "--data", "nowhere")
    assert status == 2 and out == ""
    assert errors.count("\n") == 1 and errors.startswith("error: nowhere has no CIFAR binaries")
