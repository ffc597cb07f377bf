"""The house: who imports whom, how wide and long code is, and that chapters run without the
appendix."""
import ast
import importlib
import re
import shutil
import subprocess
import sys

from conftest import ROOT, TOY, call

CHAPTERS = ("model", "heads", "confidence", "eero", "dssd", "train", "bench")
DOORS = {"model": set(), "confidence": set(), "eero": set(),
         "heads": {"model"}, "dssd": {"model", "confidence"},
         "train": {"model", "heads", "confidence"},
         "bench": {"model", "heads", "confidence", "dssd"}}
FILES = [*(ROOT / f"{name}.py" for name in CHAPTERS), *sorted((ROOT / "appendix").glob("*.py"))]
# characters; lines of a function
WIDTH, LENGTH = 100, 50

# What is let through, and why. Keep it short.
FROM_A_FUNCTION = {
    # an official name is fetched by the hub
    ("model", "locate", "appendix.hub"),
    # a text of one's own is read by the corpus
    ("heads", "held_out", "appendix.corpus")}
LONG_FUNCTIONS = set()


def names_of(node):
    if isinstance(node, ast.ImportFrom):
        if node.module == "appendix":
            return [f"appendix.{alias.name}" for alias in node.names]
        return [node.module]
    return [alias.name for alias in node.names]


def imports(path):
    """[(function it stands in, or None; module)] of all imports of this repository's own files."""
    tree, found = ast.parse(path.read_text("utf-8")), []
    inside = {}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                inside.setdefault(node, function.name)
    # if __name__ == "__main__": is main's
    for start in tree.body:
        if isinstance(start, ast.If) and "__name__" in ast.unparse(start.test):
            inside.update(dict.fromkeys(ast.walk(start), "main"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in names_of(node):
                if name.split(".")[0] in (*CHAPTERS, "appendix"):
                    found.append((inside.get(node), name))
    return found


def test_chapters_open_only_their_doors():
    for name in CHAPTERS:
        for function, module in imports(ROOT / f"{name}.py"):
            allowed = function is None and module in DOORS[name] or function == "main"
            assert allowed or (name, function, module) in FROM_A_FUNCTION, (name, function, module)


def test_no_function_is_long():
    for path in FILES:
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (path.name, node.name) not in LONG_FUNCTIONS:
                assert node.end_lineno - node.lineno < LENGTH, (path.name, node.name)


def test_no_line_is_wide():
    for path in [*FILES, *(ROOT / "tests").glob("*.py")]:
        lines = path.read_text("utf-8").splitlines()
        assert not [line for line in lines if len(line) > WIDTH], path.name


def test_every_file_teaches_first():
    for path in FILES:
        if path.name != "__init__.py":
            assert len(ast.get_docstring(ast.parse(path.read_text("utf-8")))) > 200, path.name


def test_dssd_runs_in_another_project_with_four_chapters(tmp_path):
    """model, heads, confidence and dssd, copied with the toy: DSSD runs, on the readable model,
    without the appendix."""
    for name in ("model", "heads", "confidence", "dssd"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(TOY, tmp_path / "toy")
    command = [sys.executable, "dssd.py", "--prompts", "1", "--max-new-tokens", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "LayerSkip 4x8" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "model.py", "--model", "pythia-70m"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "appendix" in done.stderr


def commands():
    """What follows "python" in the command lines of README.md and of the results page, in code or
    on lines of their own."""
    found = []
    for page in ("README.md", "assets/README.md", "toy/README.md"):
        text = (ROOT / page).read_text("utf-8")
        found += re.findall(r"(?:^|`|bin/)python ((?:-m )?[\w.]+[^`\n]*)", text, re.M)
    return found


def test_the_readmes_files_exist_and_its_options_are_known():
    """Every command of the pages names a file that is there and options that its parser knows."""
    assert len(commands()) > 20
    helps = {}
    for command in commands():
        words = command.split("#")[0].split()
        start = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        if start == "pytest":
            continue
        if start not in helps:
            status, helps[start], errors = call(importlib.import_module(start), "--help")
            assert status == 0, (start, errors)
        for word in words:
            if word.startswith("--"):
                assert word in helps[start], command


def test_the_map_names_what_exists():
    """Every file, function and line count that README.md names; no page is wide, and it stays a
    README."""
    text = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(r"`((?:appendix\.)?\w+)\.(\w+)`", text)
    named = [(module, name) for module, name in named
             if module.split(".")[0] in (*CHAPTERS, "appendix") and name != "py"]
    assert len(named) >= 30
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), (module, name)
    counts = re.findall(r"`(\w+\.py)` \| (\d+) \|", text)
    assert {name for name, _ in counts} == {path.name for path in FILES} - {"__init__.py"}
    for name, count in counts:
        path = ROOT / name if (ROOT / name).exists() else ROOT / "appendix" / name
        assert (abs(len(path.read_text("utf-8").splitlines()) - int(count))
                <= 0.05 * int(count)), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    assert len(text.splitlines()) < 180
    for page in ("README.md", "toy/README.md", "appendix/exercises.md"):
        assert all(len(line) <= 120 for line in (ROOT / page).read_text("utf-8").splitlines()), page
