"""appendix/toy.py: the tokenizer's training, the model's, and the measuring text."""
import json
import re
import sys
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from appendix import toy as A
from conftest import TOY, assert_refused, call
from model import Pythia, Tokenizer, byte_letters
from train import split_of, stdlib_documents, tokens_of


@pytest.fixture(scope="session")
def library():
    return stdlib_documents()


def contents(path):
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()


def test_bpe_by_hand():
    """The textbook example: 'ab' is the most frequent pair, then 'abab' comes from 'ab' + 'ab'."""
    spec = A.train_bpe(["abab abab abab cab"], 2 + 243 + 23 + 3)
    assert spec["model"]["merges"][:2] == ["a b", "ab ab"]
    tokenizer = Tokenizer(spec)
    line = "  abab cab\n<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert len(tokenizer.encode("abab")) == 1 and tokenizer.vocab_size == 271


def test_bpe_equals_a_naive_trainer(library):
    texts = [text[:3000] for _, text in library[:3]]
    merges = A.train_bpe(texts, 2 + 243 + 23 + 40)["model"]["merges"]
    letters = byte_letters()
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    words = Counter()
    for text in texts:
        for part in re.split(" {2,24}", text):
            words.update(re.findall(pattern, part))
    pieces = {w: [letters[b] for b in w.encode()] for w in words}
    assert len(merges) == 40
    for joined in merges:
        count = Counter()
        for w, p in pieces.items():
            for pair in zip(p, p[1:]):
                count[pair] += words[w]
        best = min(count, key=lambda pair: (-count[pair], pair))
        assert joined == " ".join(best)
        for p in pieces.values():
            i = 0
            while i < len(p) - 1:
                if (p[i], p[i + 1]) == best:
                    p[i:i + 2] = ["".join(best)]
                i += 1


@pytest.mark.slow
def test_backbone_training_writes_a_loadable_folder(tmp_path, library, capsys):
    few = [d for d in library if split_of(d[0]) == "train"][:12]      # so that it takes seconds
    few.append(next(d for d in library if split_of(d[0]) == "test" and len(d[1]) > 8000))
    A.train_backbone(tmp_path / "toy", few, few, 1024, 0, False, batch_tokens=1024)
    model, tokenizer = Pythia.from_pretrained(tmp_path / "toy"), Tokenizer.load(tmp_path / "toy")
    assert model.config.num_hidden_layers == 16 and tokenizer.vocab_size == 2048
    printed = capsys.readouterr().out
    assert "nats per token" in printed and "bits per byte" in printed
    files = sorted(p.name for p in (tmp_path / "toy").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]


def test_pieces_are_spread_evenly_and_named(toy_tokenizer):
    documents = [(f"{i}.py", f"x{i} = {i}\n" * (i + 1)) for i in range(12)]
    ids, names = A.spread_pieces(documents, toy_tokenizer, pieces=3, length=8)
    stream = tokens_of(documents, toy_tokenizer)
    n = len(stream) // 8
    starts = [n * i // 3 * 8 for i in range(3)]
    assert ids.tolist() == [t for s in starts for t in stream[s:s + 8].tolist()]
    owner = []                                        # of each token, its document's name
    for document in documents:
        owner += [document[0]] * len(tokens_of([document], toy_tokenizer))
    assert set(names) == {name for s in starts for name in owner[s:s + 8]}
    assert len(names) == len(set(names))


def test_the_measuring_text_is_written_with_its_licence(tmp_path, toy_tokenizer):
    documents = [(f"{i}.py", f"value_{i} = {i}\n" * 9) for i in range(200)]
    A.write_text(tmp_path / "text.safetensors", documents, toy_tokenizer, pieces=4, length=16)
    mine, about = contents(tmp_path / "text.safetensors")
    shipped, about_shipped = contents(TOY / "text.safetensors")
    assert set(mine) == set(shipped) == {"calibration", "test"}
    assert set(about) == set(about_shipped)
    assert about["licence"] == about_shipped["licence"]
    for split in mine:
        assert mine[split].shape == (64,) and shipped[split].shape == (65536,)
        assert mine[split].dtype == shipped[split].dtype == torch.int16
        names = json.loads(about[f"{split}_files"])
        assert names and all(split_of(name) == split for name in names)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the shipped text is of 3.11.7")
def test_the_shipped_text_is_made_by_this_command(tmp_path):
    assert call(A, "--text", tmp_path / "text.safetensors")[0] == 0
    mine, about = contents(tmp_path / "text.safetensors")
    shipped, about_shipped = contents(TOY / "text.safetensors")
    assert about == about_shipped
    for split in shipped:
        assert torch.equal(mine[split], shipped[split])


def test_bad_options(tmp_path, toy_tokenizer):
    short = ("--out", tmp_path / "b", "--tokens", 100)
    assert_refused(call(A, *short), "at least 4,096")
    assert_refused(call(A), "one of the arguments --out --text is required")
    assert_refused(call(A, "--text", tmp_path / "absent" / "text"), "there is no folder")
    with pytest.raises(ValueError, match="32 pieces of 2,048"):
        A.write_text(tmp_path / "text.safetensors", [("a.py", "x = 1\n")], toy_tokenizer)
    with pytest.raises(ValueError, match="too small"):
        A.train_bpe(["abc"], 400)
    assert not list(tmp_path.iterdir())
