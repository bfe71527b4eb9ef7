"""The rules of the house: twelve files, each a leaf that works when it is copied alone, and twins that stay alike."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TWELVE = "bpe model optim train flash_attn_triton ddp sharded_optim scaling data_filter dedup sft grpo".split()
FILES = [name for name in TWELVE if (ROOT / f"{name}.py").exists()]
LONG = {"model": 778, "train": 823, "scaling": 788, "data_filter": 801}   # to be cut
DRIVERS = {"train", "scaling", "sft", "grpo"}
PACKAGES = {"torch", "triton", "numpy", "regex", "vllm", "matplotlib"} | set(sys.stdlib_module_names)


def imports(tree: ast.AST) -> set[str]:
    """First names of every import anywhere below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else node.module.split(".")[0])
    return names


def test_no_thirteenth():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(TWELVE)


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])
    assert not imports(top) & set(TWELVE), "a sibling is imported at module level"
    siblings = imports(tree) & set(TWELVE)
    assert not siblings or name in DRIVERS, f"{name} is a leaf, and imports {siblings}"
    assert imports(tree) - siblings <= PACKAGES, "a package that is not on the list"
    assert not {"matplotlib", "vllm"} & imports(top), "an optional package is imported at module level"


@pytest.mark.parametrize("name", FILES)
def test_form(name):
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    for part in ("What:", "Source:", "Deviations:", "Copy:", "Run:"):
        assert part in docstring, f"the docstring of {name} has no {part}"
    long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not long, f"lines over 120 columns: {long[:5]}"
    lines = text.count("\n")
    assert lines < LONG.get(name, 700), f"{lines} lines; a file is one sitting: 500 are the aim, 700 too many"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_columns_of_tests(path):
    long = [i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"lines over 120 columns: {long[:5]}"


@pytest.mark.parametrize("name", FILES)
def test_copied_alone(name, tmp_path):
    """The file in an empty folder: importing it prints nothing and needs no sibling; leaves pass their self-check."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import {name}\n" + (f"{name}.self_check()\n" if name not in DRIVERS else "")
    environment = {**os.environ, "PYTHONPATH": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if name != "flash_attn_triton":
        environment.pop("TRITON_INTERPRET")
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    done = subprocess.run([sys.executable, "-c", f"import {name}"], **options)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr


def functions(name: str) -> dict[str, ast.AST]:
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def body_without_docstring(node: ast.AST) -> str:
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return "\n".join(ast.dump(statement) for statement in body)


def test_twins_are_alike():
    for name in FILES:
        for line in (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines():
            if mark := re.search(r"(?:def|class) (\w+).*# twin: (\w+)\.py", line):
                function, other = mark.groups()
                assert function in functions(other), f"{name}.{function} says it has a twin in {other}.py"
                mine, theirs = (body_without_docstring(functions(file)[function]) for file in (name, other))
                assert mine == theirs, f"the twins {name}.{function} and {other}.{function} have grown apart"


def test_a_file_written_whole_replaces_files_alone(tmp_path):
    """A folder is named before the work, not after it; a device (a pipe stands in) is not taken for an old file."""
    import train
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(FileExistsError, match=name), train.write_whole(tmp_path / name):
            pytest.fail("it went to work")
    assert (tmp_path / "pipe").is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_speaks_of_itself_alone():
    """What is tracked names no path of the machine it was written on."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    home = re.compile("/" + "(?:work|root|home)" + r"/[\w.]")
    for path in tracked:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        assert not home.search(text), f"{path} names a path of somebody's machine: {home.search(text)}"
