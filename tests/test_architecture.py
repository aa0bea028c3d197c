"""The rules of the house: what may import what, how long things are, that nothing reads a pickle, that public names are explained."""

import ast
import doctest
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"distributions", "schedules", "noise"},
    {"likelihoods", "priors", "aggregation", "terms", "objectives", "metrics"},
    {"nn", "recurrent", "density", "densities", "direction", "pose", "angles", "folder"},
    {"models"},
    {"data", "processing", "joint_processing", "charts", "pictures", "templates", "negatives", "vectorizer"},
    {"tree", "checkpoint", "snapshot", "processes", "optimization", "loop", "training", "record", "hub", "phases", "options"}
    | {"evaluation", "experiment", "density_fitting", "coherence", "classifiers", "baselines", "judge", "modalities"}
    | {"sentences", "study", "topics"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / "mmvae").rglob("*.py"))
UNSAFE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "torch.save",
    "numpy.load",
}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> tuple[str, ...]:
    """("models", "text_vae") for mmvae/models/text_vae.py; () for mmvae/__init__.py."""
    parts = path.relative_to(ROOT / "mmvae").with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, as a dotted name; the names taken from a package count as its modules."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inner_imports(path: Path) -> set[tuple[str, ...]]:
    """The mmvae modules among them: {("models", "base"), ("noise",)}."""
    modules = {name_of(file) for file in FILES}
    found = set()
    for name in imports_of(path):
        parts = tuple(name.split("."))
        if parts[0] == "mmvae":
            known = [parts[1:n] for n in range(len(parts), 0, -1) if parts[1:n] in modules]
            found.add(known[0])
    return found


def show(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_has_a_floor():
    rooms = {name_of(path)[0] for path in FILES if name_of(path)}
    assert {"distributions", "models", "data"} <= rooms
    assert rooms <= set(FLOOR), "a new file finds its floor in FLOORS, at the head of this file"


def test_imports_do_not_climb():
    climbing = [
        f"{show(path)} (floor {FLOOR[here[0]]}) imports {'.'.join(there)} (floor {FLOOR[there[0]]})"
        for path in FILES
        if (here := name_of(path))  # mmvae/__init__.py names everything
        for there in inner_imports(path)
        if there and FLOOR[there[0]] > FLOOR[here[0]]
    ]
    assert not climbing


def test_no_import_cycles():
    graph = {name_of(path): inner_imports(path) - {name_of(path)} for path in FILES if name_of(path)}
    graph = {name: {there for there in found if there} for name, found in graph.items()}
    while graph:
        leaves = {name for name, found in graph.items() if not found}
        assert leaves, f"a cycle among {sorted('.'.join(name) for name in graph)}"
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}


def test_models_know_their_place():
    """A modality imports only what all share, and what all share and the joint model no modality; nobody imports the heads."""
    for path in (ROOT / "mmvae" / "models").glob("*.py"):
        siblings = {there[1] for there in inner_imports(path) if len(there) == 2 and there[0] == "models"} - {path.stem}
        assert not siblings & {"heads", "segmentation"} or path.stem == "__init__", show(path)
        if path.stem not in ("heads", "segmentation", "__init__"):
            lower = {"base", "unimodal"} if path.stem not in ("base", "configuration", "pretrained") else set()
            of_classes = ("image_vae", "image_configuration", "text_vae", "text_generation", "stacked")
            modality = {"classes"} if path.stem in of_classes else set()
            parts = {"base": {"pretrained"}, "headed": {"pretrained"}, "configuration": {"inherited"}}
            parts |= {"mmvae": {"joint_generation"}, "image_vae": {"tiling", "image_configuration"}, "text_vae": {"text_generation"}}
            lower |= modality | parts.get(path.stem, set())
            assert siblings <= {"configuration", "inherited"} | lower, show(path)


def test_lower_floors_need_torch_alone():
    low = [path for path in FILES if name_of(path) and FLOOR[name_of(path)[0]] <= 2]
    roots = {show(path): {name.split(".")[0] for name in imports_of(path)} for path in low}
    assert "mmvae/nn.py" in roots
    heavy = {"transformers", "accelerate", "datasets", "huggingface_hub"}
    assert not {name: found & heavy for name, found in roots.items() if found & heavy}


def test_imports_are_absolute():
    relative = [
        f"{show(path)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


@pytest.mark.parametrize("folder", ["mmvae", "recipes", "examples"])
def test_nothing_reads_pickles_or_runs_text(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE:
                found.append(f"{path.name}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                found.append(f"{path.name}:{node.value.lineno} says {node.arg}")
        found += [f"{path.name} imports {name}" for name in imports_of(path) if name.split(".")[0] in PICKLES]
    assert not found


def public_parts(node: ast.Module | ast.ClassDef, prefix: str = ""):
    """Public functions and classes of a module and the public methods of its public classes."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and not part.name.startswith("_"):
            yield prefix + part.name, part
            if isinstance(part, ast.ClassDef):
                yield from public_parts(part, f"{part.name}.")


def test_public_names_are_explained():
    silent = [show(path) for path in FILES if not ast.get_docstring(tree_of(path))]
    for path in FILES:
        silent += [f"{show(path)}: {name}" for name, part in public_parts(tree_of(path)) if "." not in name and not ast.get_docstring(part)]
    assert not silent


@pytest.mark.parametrize("path", [path for path in FILES if ">>>" in path.read_text(encoding="utf-8")], ids=show)
def test_examples_in_docstrings(path):
    done = doctest.testmod(importlib.import_module(".".join(("mmvae", *name_of(path)))))
    assert done.attempted > 0
    assert done.failed == 0


def test_files_are_short():
    sizes = {show(path): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert not {name: size for name, size in sizes.items() if size > 350}


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return node.end_lineno - first.lineno + 1


def test_nine_functions_in_ten_are_short():
    sizes = {}
    for path in FILES:
        functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
        sizes |= {f"{show(path)}:{node.lineno}: {node.name}": body_lines(node) for node in functions}
    long = {name: size for name, size in sizes.items() if size >= 30}
    assert len(long) <= len(sizes) / 10, long


def test_import_is_light():
    """``import mmvae`` brings nothing heavy beyond what transformers brings by itself."""
    script = """
import json, sys
from transformers import AutoModel, AutoProcessor, PreTrainedModel
before = set(sys.modules)
import mmvae
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    added = set(json.loads(done.stdout.splitlines()[-1]))
    assert "mmvae" in added
    assert not added & {"torchvision", "datasets", "accelerate", "matplotlib", "torchmetrics", "sklearn", "zuko", "gradio"}
