"""Guards of the layout: root folders are sub-packages of vla_rl, and the wheel holds all of them and nothing else."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import vla_rl

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGE_DIR: dict[str, str] = SETUPTOOLS["package-dir"]
ROOT_FOLDERS = sorted(folder for folder in PACKAGE_DIR.values() if folder != "vla_rl")
GENERATED = {"__pycache__"}
COLCON = (ROOT / "real_robot/ros2", ROOT / "real_robot/ros2_interfaces")  # packages of ROS 2, which colcon builds


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def source_files() -> dict[str, Path]:
    """Path in the wheel ("vla_rl/envs/gym.py") to the file in the tree, of everything in the package folders."""
    files = {}
    for package, folder in PACKAGE_DIR.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not GENERATED & set(path.parts) and not set(COLCON) & set(path.parents):
                files[f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def module_files() -> dict[str, Path]:
    """Dotted name to file, of every module of vla_rl."""
    modules = {}
    for name, path in source_files().items():
        if path.suffix == ".py":
            modules[re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")] = path
    return modules


MODULES = module_files()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load_tool("check_wheel").build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


# ----------------------------------------------------------------------------------------------- the list of packages
def test_packages_list_equals_tree():
    in_tree = {name.rsplit(".", 1)[0] for name, path in MODULES.items() if path.name != "__init__.py"}
    in_tree |= {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert sorted(SETUPTOOLS["packages"]) == sorted(in_tree), "bring `packages` in pyproject.toml up to date"


def test_every_package_has_an_init():
    without = [package for package in SETUPTOOLS["packages"] if MODULES.get(package, Path()).name != "__init__.py"]
    assert not without, "without __init__.py it is a namespace package, which type checkers treat apart"


def test_root_folder_with_modules_is_mapped():
    not_packages = {"tests", "tools", "runs", "build", "dist", "docs"}
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert folders - not_packages == set(PACKAGE_DIR.values())


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(source_files())


def test_report_assets_are_in_the_wheel_and_whole(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        for name in ("report.html", "report.css", "report.js", "eval.schema.json"):
            path = f"vla_rl/evaluation/{name}"
            assert archive.read(path) == (ROOT / path).read_bytes()


def test_wheel_is_built_apart_from_the_checkout(tmp_path: Path):
    """A `build` folder of an earlier build must not bring a deleted module back."""
    checkout, work = tmp_path / "checkout", tmp_path / "work"
    (checkout / "vla_rl").mkdir(parents=True)
    (checkout / "vla_rl" / "__init__.py").touch()
    stale = checkout / "build" / "lib" / "vla_rl" / "deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    (checkout / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "vla-rl"\nversion = "0"\n[tool.setuptools]\npackages = ["vla_rl"]\n'
    )
    work.mkdir()
    tool = load_tool("check_wheel")
    wheel = tool.build_wheel(checkout, work)
    assert tool.modules_of(wheel) == ["vla_rl"]


def test_installed_apart_the_checkout_is_out_of_reach(wheel: Path, tmp_path: Path):
    """In the isolated environment a module that the wheel lacks does not come from the editable install instead."""
    tool = load_tool("check_wheel")
    short = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(short, "w") as archive:
        for name in full.namelist():
            if name not in ("vla_rl/core.py",):
                archive.writestr(name, full.read(name))
    python = tool.install_apart(short, tmp_path)
    assert tool.import_all(python, ["vla_rl", "vla_rl.envs"], tmp_path)["vla_rl"].startswith(str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError):
        tool.import_all(python, ["vla_rl.core"], tmp_path)


def test_console_script_is_declared(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "vla-rl = vla_rl.cli:main" in archive.read(entry_points).decode()


# ------------------------------------------------------------------------------------------------------------- imports
def imported_names(path: Path, package: str, at_run_time: bool = False) -> set[str]:
    """Absolute dotted names that a file imports; with `at_run_time`, only what runs when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    names = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if at_run_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return names


def test_nobody_imports_a_root_folder():
    others = [path for folder in ("tests", "tools") for path in (ROOT / folder).rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*MODULES.values(), *others]
        for name in imported_names(path, "")
        if name.split(".")[0] in ROOT_FOLDERS
    ]
    assert not wrong, "write vla_rl.envs, not envs"


@pytest.mark.parametrize("folder", ROOT_FOLDERS)
def test_root_folder_refuses_to_be_imported_bare(folder: str):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import vla_rl.{folder}, not {folder}" in done.stderr


@pytest.mark.parametrize("folder", ROOT_FOLDERS)
def test_linter_bans_the_bare_name(folder: str):
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert banned[folder]["msg"] == f"import vla_rl.{folder}"


def import_graph() -> dict[str, set[str]]:
    """Which modules of vla_rl each one imports when it is imported itself."""
    graph = {}
    for name, path in MODULES.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = (imported_names(path, package, at_run_time=True) & MODULES.keys()) - {name}
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(graph[start])
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending.extend(graph[name])
    return seen


def test_import_graph_sees_what_is_known():
    graph = import_graph()
    assert "vla_rl.core" in graph["vla_rl.envs.vector"] | graph["vla_rl.protocols"]
    assert "vla_rl.core" in reachable(graph, "vla_rl.evaluation.evaluate")


def test_no_import_cycle():
    graph = import_graph()
    # A package's __init__ that lists its modules, which import from the package's own other modules, is no cycle here:
    # an edge stands only where a statement names the module.
    cycles = sorted(name for name in graph if name in reachable(graph, name))
    assert not cycles


def test_core_imports_nothing_of_the_project_that_imports_it():
    graph = import_graph()
    assert all("vla_rl.core" not in reachable(graph, name) for name in graph["vla_rl.core"])
    algorithms = {name for name in MODULES if name.startswith(("vla_rl.onpolicy", "vla_rl.train", "vla_rl.sim"))}
    assert not reachable(graph, "vla_rl.core") & algorithms


def test_no_module_shadows_the_standard_library_when_run_by_path():
    direct = {name: name.rpartition(".") for name in MODULES}
    shadows = [
        n for n, (package, _, last) in direct.items() if package in PACKAGE_DIR and last in sys.stdlib_module_names
    ]
    assert not shadows


# ------------------------------------------------------------------------------------------------------------ versions
def test_version_is_the_same_everywhere():
    version = PYPROJECT["project"]["version"]
    assert vla_rl.__version__ == version
    assert importlib.metadata.version("vla-rl") == version


def test_changelog_knows_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?v?(\d+\.\d+\.\d+)", changelog, flags=re.MULTILINE)
    assert versions, "headings are `## 0.1.0 ...` or `## [0.1.0] ...`"
    assert versions[0] == PYPROJECT["project"]["version"]


def test_supported_pythons_are_the_same_everywhere():
    ((low, high),) = re.findall(r"^>=3\.(\d+),<3\.(\d+)$", PYPROJECT["project"]["requires-python"])
    supported = [f"3.{minor}" for minor in range(int(low), int(high))]
    script = (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")
    assert re.findall(r'^SUPPORTED="(.*)"', script, flags=re.MULTILINE) == [" ".join(supported)]
    assert PYPROJECT["tool"]["pyright"]["pythonVersion"] == supported[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == supported[0].replace("3.", "py3")


def test_no_dependency_is_imported_without_being_declared():
    """Every import at module level of the package is of the standard library, of the project or of a dependency."""
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    declared = [*PYPROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    distributions = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in declared}
    providers = importlib.metadata.packages_distributions()
    missing = {
        f"{name}: {top}"
        for name, path in MODULES.items()
        for top in {imported.split(".")[0] for imported in imported_names(path, "vla_rl", at_run_time=True)}
        if top not in sys.stdlib_module_names and top not in ("vla_rl", "__future__")
        if not distributions & {provider.lower().replace("_", "-") for provider in providers.get(top, [])}
    }
    assert not missing
