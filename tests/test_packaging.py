"""What gets installed: passes/ and kernels/ stand at the top here and inside the package there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("passes", "kernels")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "hsap_compile", *MAPPED)

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(kind: str, tree: Path, out: Path) -> Path:
    """Runs the build backend itself: neither an environment nor an index is needed."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because building writes next to the sources."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, tree / name)
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the source distribution, as an index's users get it."""
    tree = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (root,) = tree.iterdir()
    return zipfile.ZipFile(build("wheel", root, tmp_path_factory.mktemp("wheel")))


def modules(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}


def test_the_wheel_holds_every_module_and_nothing_else_at_the_top(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    wanted = {f"hsap_compile/{name}" for name in modules(ROOT / "hsap_compile")}
    for mapped in MAPPED:
        wanted |= {f"hsap_compile/{mapped}/{name}" for name in modules(ROOT / mapped)}
    assert {name for name in names if name.endswith(".py")} == wanted
    assert {"hsap_compile/py.typed"} <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hsap_compile"}


def test_the_wheel_registers_the_backend_and_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    parsed = ConfigParser()
    parsed.read_string(wheel.read(entry_points).decode())
    assert dict(parsed["torch_dynamo_backends"]) == {"hsap": "hsap_compile.backend:hsap"}
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_the_installed_package_finds_its_mapped_parts(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Neither symlinks nor the repository's own directories help here."""
    wheel.extractall(tmp_path)
    found = "[*importlib.util.find_spec('hsap_compile.' + name).submodule_search_locations]"
    code = f"import importlib.util\nfor name in {MAPPED}: print(*{found})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == [str(tmp_path / "hsap_compile" / name) for name in MAPPED], done.stderr


@pytest.mark.parametrize("name", MAPPED)
def test_the_layout_of_the_repository(name: str) -> None:
    link = ROOT / "hsap_compile" / name
    assert link.is_symlink() and link.readlink() == Path("..") / name
    assert not (ROOT / name / "__init__.py").exists(), f"would shadow another project's {name} package"
    assert any((ROOT / name).glob("*.py"))


def test_transformers_is_not_misled_by_our_kernels_directory() -> None:
    """Run at the top of the repository, where ``import kernels`` would find ours."""
    code = "from transformers.utils import is_kernels_available as a; import sys; print(a(), sys.path[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False"], done.stdout + done.stderr
