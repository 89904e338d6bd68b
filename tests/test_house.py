"""The house rules that no type checker sees: layers, sizes, no pickle, no torch at the coordinator."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedoap", "coordinator", "node")
LONGEST_FILE = 400
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "multiprocessing"}
"""`multiprocessing` pickles what its processes say to each other."""
IMPORT_SECONDS = 0.5
BLOCKED_IMPORT = """
import sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "monai", "triton", "scipy", "matplotlib", "nibabel", "pydicom", "PIL"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
wall, cpu = time.perf_counter(), time.process_time()
import fedoap_coordinator.cli, fedoap_coordinator.daemon
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def test_every_import_keeps_to_its_layer() -> None:
    """Planted bug: `import fedoap.cli` in fedoap/config.py."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


def test_the_coordinator_starts_quickly_and_without_torch(record_property: Callable[[str, object], None]) -> None:
    """Planted bugs: `import fedoap.segmentation.network` in the coordinator's command line; a second's work there."""
    runs = [_seconds() for _ in range(5)]
    wall, cpu = min(wall for wall, _ in runs), min(cpu for _, cpu in runs)  # other programs slow down either

    assert min(wall, cpu) < IMPORT_SECONDS
    record_property("said", f"import fedoap_coordinator: {wall:.2f} s, {cpu:.2f} s of one core")


def test_nothing_is_ever_pickled() -> None:
    """Planted bugs: `torch.save` in the worker; `import pickle` in fedoap/tensors.py."""
    found = [f"{file.relative_to(ROOT)}:{line}: {what}" for file in _sources() for line, what in _pickling(file)]

    assert found == []


def test_no_file_is_longer_than_the_stop() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for folder in (*PACKAGES, "tests", "benchmarks", "examples")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }

    assert long == {}


def test_every_function_but_triton_kernels_is_annotated() -> None:
    """Linters are told to look away there. Planted bug: a function without types beside a kernel."""
    files = [*(ROOT / "fedoap/kernels").rglob("*.py"), *(ROOT / "tests/kernels").rglob("*.py")]
    found = [f"{file.relative_to(ROOT)}:{line}" for file in sorted(files) for line in _unannotated(file)]

    assert found == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_map_of_the_code_names_all_packages_and_only_what_is_there() -> None:
    """Planted bugs: fedoap/report left out; a file that moved."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./]+/[\w./]*)`", text))
    packages = {f"fedoap/{file.parent.name}/" for file in (ROOT / "fedoap").glob("*/__init__.py")}

    assert sorted(name for name in named if not (ROOT / name).exists()) == []
    assert packages <= named


def test_the_source_archive_holds_what_make_reads() -> None:
    """Planted bugs: no `constraints.txt`; no `deploy`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    needed = ("Makefile", "deploy", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")

    assert [name for name in needed if not any(fnmatch(name, pattern) for pattern in included)] == []


def test_every_link_of_the_pages_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]

    assert broken == []


def _seconds() -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-Ic", BLOCKED_IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wall, cpu = done.stdout.split()
    return float(wall), float(cpu)


def _sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _unannotated(file: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            typed = all(a.annotation or a.arg in ("self", "cls", "_") for a in arguments)
            if node.returns is None or not typed:
                yield node.lineno


def _pickling(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names if name.name.split(".")[0] in PICKLERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLERS:
                yield node.lineno, module
            case ast.Attribute(value=ast.Name(id="torch"), attr="save" | "load" as name):
                yield node.lineno, f"torch.{name}"
            case ast.keyword(arg="allow_pickle"):
                yield node.value.lineno, "allow_pickle"
            case _:
                continue
