"""The course: what it names exists, every exercise has its folded answer, and the answers are code.
"""
import importlib
import math
import re
import sys
from types import ModuleType

import pytest

import dssd
from conftest import ROOT, run, shaken, tiny
from test_house import CHAPTERS

PAGE = (ROOT / "appendix" / "exercises.md").read_text("utf-8")
EXERCISES = re.split(r"^### ", PAGE, flags=re.M)[1:]
NAMES = sorted(set(re.findall(r"`([\w./-]+)`", PAGE)))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def answer(number, folder):
    """The answer to an exercise, run in the repository's root -> what it printed."""
    text = next(e for e in EXERCISES if e.startswith(number))
    path = folder / "answer.py"
    path.write_text(blocks(text, "python")[0], "utf-8")
    status, out, errors = run(path, PYTHONPATH=str(ROOT))
    assert status == 0, errors
    return out, blocks(text, "text")[0]


def test_there_are_three_exercises_a_week_with_a_folded_answer_each():
    assert re.findall(r"^## Week (\d):", PAGE, re.M) == list("1234")
    numbers = [text.split()[0] for text in EXERCISES]
    assert numbers == [f"{week}.{i}" for week in (1, 2, 3, 4) for i in (1, 2, 3)]
    for text in EXERCISES:
        question, start, folded = text.partition("<details><summary>Answer</summary>\n\n")
        assert start and folded.count("</details>") == 1 and "details" not in question, text[:40]
        assert "**Measure** " in question and "**Effort:** " in question, text[:40]
        assert len(blocks(folded, "python")) == len(blocks(folded, "text")) == 1, text[:40]
    assert max(map(len, PAGE.splitlines())) <= 120


def test_every_file_and_function_that_is_named_exists():
    seen = 0
    for name in NAMES:
        first, *rest = name.removeprefix("appendix.").split(".")
        if "/" in name or name.endswith(".py") and name != "answer.py":
            assert (ROOT / name).exists(), name
        elif rest and (first in CHAPTERS or name.startswith("appendix.")):
            place = importlib.import_module(first if first in CHAPTERS else f"appendix.{first}")
            for part in rest:
                place = getattr(place, part, None) or place.__dataclass_fields__[part]
            seen += 1
    assert seen > 25


def test_the_answers_compile_and_are_short():
    for text in EXERCISES:
        code = blocks(text, "python")[0]
        compile(code, text[:3], "exec")
        assert 5 <= len([line for line in code.splitlines() if line]) <= 30, text[:40]


def test_the_change_to_a_chapter_still_fits_it(monkeypatch):
    """The lines around the veto stand in dssd.py, once and together, and with it the text is the
    same."""
    lines = blocks(PAGE, "diff")[0].splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] == " ")
    new = "\n".join(line[1:] for line in lines)
    chapter = (ROOT / "dssd.py").read_text("utf-8")
    assert chapter.count(old) == 1
    changed = ModuleType("changed")
    monkeypatch.setitem(sys.modules, "changed", changed)
    exec(compile(chapter.replace(old, new), "dssd.py", "exec"), vars(changed))
    model = tiny()
    veto = changed.Policy("veto", shaken(model), (math.inf, None, -math.inf), 8)
    out = changed.generate(model, [1, 2, 3], 30, veto)
    assert out.tokens == dssd.generate(model, [1, 2, 3], 30, dssd.Plain()).tokens
    # where the exit at depth 3 vetoes, fewer drafts are left than the 8 that depth 1 made
    assert {drafts for drafts, _ in out.log.rounds} - {8}


@pytest.mark.slow
@pytest.mark.parametrize("number", ["1.3", "3.2"])
def test_an_answer_prints_the_numbers_below_it(number, tmp_path):
    printed, said = answer(number, tmp_path)
    words = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
    assert words.sub("", printed).split() == words.sub("", said).split()
    numbers = [[float(n.replace(",", "")) for n in words.findall(text)] for text in (printed, said)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.03)
