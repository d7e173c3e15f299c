"""``src/fedmq`` with its links to the rooms is one package, in a wheel and editable."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("broker", "codecs", "algorithms", "nodes")
CHECK = """
import fedmq.algorithms.problems, fedmq.broker.router, fedmq.codecs.registry, fedmq.nodes.cli.main
from fedmq.algorithms.problems import load_problem
print(len(load_problem({"name": "mnist-mini", "clients": 4}, 0).test()))
print(fedmq.broker.__file__)
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_subpackage_is_listed() -> None:
    """A forgotten one works editable and is missing from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        "fedmq." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(settings["packages"]) == there | {"fedmq"}
    assert settings["package-dir"] == {"": "src"}


def test_the_package_links_to_the_rooms() -> None:
    for room in ROOMS:
        assert (ROOT / "src" / "fedmq" / room).readlink() == Path("../..", room)


def test_every_folder_with_code_is_a_package() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert (path.parent / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and from it the wheel; return the folder that holds both."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in (*ROOMS, "src", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = (sys.executable, "-m", "build", "--no-isolation", "-o", str(folder))
    run(*command, str(source), cwd=folder, PATH="/usr/bin:/bin")
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.mark.end_to_end
def test_the_wheel_works_away_from_the_source(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    printed = run(sys.executable, "-P", "-c", CHECK, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    size, where = printed.split()
    assert size == "1000"
    assert Path(where).is_relative_to(tmp_path)


@pytest.mark.end_to_end
def test_the_wheel_holds_no_tests_and_says_where_the_data_are_from(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fedmq/algorithms/problems/ATTRIBUTION.md" in names
    assert all(name.startswith("fedmq") for name in names)


@pytest.mark.end_to_end
def test_the_wheel_and_the_sdist_hold_the_licence_and_the_type_marker(
    built: Path, wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        licence = next(name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "fedmq/py.typed" in names
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Author: The fedmq authors\n" in metadata
    shutil.unpack_archive(next(built.glob("*.tar.gz")), tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "LICENSE").is_file()
    assert (source / "src" / "fedmq" / "py.typed").is_file()


@pytest.mark.end_to_end
def test_the_editable_install_is_the_source(tmp_path: Path) -> None:
    size, where = run(sys.executable, "-P", "-c", CHECK, cwd=tmp_path).split()
    assert size == "1000"
    assert Path(where).resolve() == ROOT / "broker" / "__init__.py"


@pytest.mark.end_to_end
def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, fedmq.nodes.cli.main, fedmq.nodes.cluster.supervisor;"
        "import fedmq.nodes.cluster.view, fedmq.nodes.run.session;"
        "print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-P", "-c", code, cwd=tmp_path).strip() == "False"


@pytest.mark.end_to_end
def test_the_public_names_are_there_and_imported_late(tmp_path: Path) -> None:
    code = (
        "import sys, fedmq, fedmq.algorithms, fedmq.broker, fedmq.codecs, fedmq.nodes;"
        "early = 'torch' in sys.modules or 'zmq' in sys.modules;"
        "print(early, all(hasattr(fedmq, name) for name in fedmq.__all__), fedmq.Problem.__name__)"
    )
    assert run(sys.executable, "-P", "-c", code, cwd=tmp_path).split() == [
        "False",
        "True",
        "Problem",
    ]


@pytest.mark.end_to_end
def test_a_users_type_checker_follows_the_package(wheel: Path, tmp_path: Path) -> None:
    """A name that is not there is an error, and `py.typed` is in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        assert "fedmq/py.typed" in archive.namelist()
        archive.extractall(tmp_path / "site")
    (tmp_path / "mine.py").write_text("import fedmq\nfedmq.Problem\nfedmq.Nonsense\n")
    done = subprocess.run(
        (sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "mine.py"),
        cwd=tmp_path, env={"MYPYPATH": "site"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Nonsense" in done.stdout
    assert "Problem" not in done.stdout


def test_each_pre_commit_hook_names_a_tool_of_the_virtual_environment() -> None:
    """They are local, and run without network: each entry is `.venv/bin/TOOL ...`."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"- repo: (.*)", text) == ["local"]
    entries = [entry.split() for entry in re.findall(r"^ +entry: (.*)$", text, re.MULTILINE)]
    assert len(entries) == text.count("- id: ") == text.count("language: system")
    here = Path(sys.executable).parent
    for tool, *arguments in entries:
        assert Path(tool).parent == Path(".venv/bin")
        assert (here / Path(tool).name).exists()
        if arguments[:1] == ["-m"]:
            assert importlib.util.find_spec(arguments[1])
