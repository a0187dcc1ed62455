"""The shape of the code: packages import downwards only, without circles, and no folder shows too many files."""

import ast
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From what stands on everything to what everything stands on. A line may import itself and those after it.
ORDER = (
    ("launchers",),
    ("benchmarks",),
    ("extract_activations", "create_dataset_streams", "analyze_activations", "prepare"),
    ("parquet_cache",),
    ("fleet",),
    ("analysis.fleet_status", "analysis.certificate", "analysis.hook_table", "analysis.mean_vectors"),
    ("analysis.commands",),
    ("analysis.text_whitening",),
    ("analysis.exporting", "analysis.importing"),
    ("analysis.verification",),
    ("analysis.whitened",),
    ("analysis.stats",),
    ("analysis.whitening",),
    ("analysis.moments",),
    ("analysis.passes",),
    ("core.pricing",),
    ("core.in_memory",),
    ("core.run",),
    ("core.claims",),
    ("core.reading",),
    ("core.activation_storage",),
    ("core.commit",),
    ("core.shards",),
    ("core.reduce",),
    ("core.backends",),
    ("torch_models",),
    ("core.jax_utils",),
    ("core.step",),
    ("core.samples",),
    ("core.dataset_utils",),
    ("core.streams",),
    ("core.hosts",),
    ("core.object_store",),
    ("qwen2_jax.__init__",),
    ("qwen2_jax.checkpoints",),
    ("qwen2_jax.families",),
    ("qwen2_jax.mapping",),
    ("qwen2_jax.decoder",),
    ("qwen2_jax.layers", "qwen2_jax.block"),
    ("qwen2_jax.attention",),
    ("qwen2_jax",),
    ("arc24",),
    ("core.base",),
)
MOST_FILES = 12


def files() -> list[Path]:
    """Every Python file of the repository."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in (ROOT / line for line in listed.stdout.splitlines()) if path.exists()]


def modules() -> dict[str, Path]:
    """Every module of the project outside of the tests, by its dotted name."""
    kept = [path for path in files() if path.relative_to(ROOT).parts[0] not in _APART]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in kept}


_APART = ("tests", "archived_old", "scripts")
MODULES = modules()
_TOPS = {name.partition(".")[0] for name in MODULES}


def rank(module: str) -> int:
    """The line of ORDER that `module` belongs to: the one that names most of it."""
    fitting = {
        name: line
        for line, names in enumerate(ORDER)
        for name in names
        if module == name or module.startswith(f"{name}.")
    }
    assert fitting, f"{module} is in no line of ORDER"
    return fitting[max(fitting, key=len)]


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of the project that a file imports anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES or f"{name}.__init__" in MODULES else str(node.module) for name in inside]
        else:
            continue
        for name in names:
            if name.partition(".")[0] in _TOPS:
                yield (f"{name}.__init__" if f"{name}.__init__" in MODULES else name), node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_an_import_points_down(module):
    up = [
        f"{module}:{line} imports {imported}"
        for imported, line in imports_of(MODULES[module])
        if rank(imported) < rank(module)
    ]
    assert up == []


def room(module: str) -> str:
    """The folder of a module; a file beside packages, such as `core/jax_utils.py`, is a room of its own."""
    name = module.removesuffix(".__init__")
    parent = name.rpartition(".")[0]
    is_beside_packages = any(other.startswith(f"{parent}.") and other.count(".") > 1 for other in MODULES)
    return name if is_beside_packages and name.count(".") == 1 else module.rpartition(".")[0]


def circle_in(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when everything that imports nothing else of what is left is taken away, again and again."""
    left = {name: imported - {name} for name, imported in edges.items()}
    while leaves := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in leaves:
            del left[name]
    return left


def test_modules_do_not_import_each_other_in_a_circle():
    assert circle_in({module: {name for name, _ in imports_of(path)} for module, path in MODULES.items()}) == {}


def test_folders_do_not_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        edges[room(module)] |= {room(name) for name, _ in imports_of(path)}
    assert circle_in(edges) == {}


def test_no_folder_has_more_than_twelve_files():
    """The tests' too."""
    shown = (path.parent.relative_to(ROOT) for path in files() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in Counter(shown).items() if count > MOST_FILES} == {}


def test_no_two_public_classes_have_one_name():
    names = Counter(
        node.name
        for module, path in MODULES.items()
        if not module.startswith("benchmarks")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []
