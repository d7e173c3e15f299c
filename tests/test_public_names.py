"""What the package and its rooms export: complete, importable, documented."""

import ast
import importlib
import inspect
import itertools
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("broker", "codecs", "algorithms", "nodes")
PACKAGES = ("fedmq", *(f"fedmq.{room}" for room in ROOMS))


def source(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def parts(package: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the module of each name: as type checkers see it, and as it is imported lazily."""
    body = source(importlib.import_module(package)).body
    (branch,) = [node for node in body if isinstance(node, ast.If)]
    seen = {
        each.asname or each.name: node.module or ""
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }
    (table,) = [node for node in ast.walk(branch) if isinstance(node, ast.Dict)]
    lazy = {
        name: module for module, names in ast.literal_eval(table).items() for name in names.split()
    }
    return seen, lazy


def constants_with_a_text(module: ModuleType) -> set[str]:
    """Return the names to which a module assigns, and that a string on the next line documents."""
    found = set()
    body = source(module).body
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(after, ast.Expr):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            found |= {each.id for each in targets if isinstance(each, ast.Name)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_list_the_imports_and_the_table_agree(package: str) -> None:
    module = importlib.import_module(package)
    seen, lazy = parts(package)
    assert seen == lazy
    assert sorted(module.__all__) == sorted({*lazy} | ({"__version__"} & {*module.__all__}))
    assert {*module.__all__} <= {*dir(module)}
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


@pytest.mark.parametrize("package", PACKAGES)
def test_each_name_is_there_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    for name, home in parts(package)[0].items():
        value, defining = getattr(module, name), importlib.import_module(home)
        assert value is getattr(defining, name)
        if callable(value):
            text = value.__doc__ or ""
            assert text, name
            assert not text.startswith(f"{name}("), name  # what @dataclass writes by itself
        else:
            assert name in constants_with_a_text(defining), name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_hides_a_module(package: str) -> None:
    module = importlib.import_module(package)
    (folder,) = module.__path__
    assert not {path.stem for path in Path(folder).iterdir()} & {*module.__all__}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_all_its_errors(room: str) -> None:
    errors = importlib.import_module(f"fedmq.{room}.errors")
    own = {
        name
        for name, each in vars(errors).items()
        if inspect.isclass(each) and issubclass(each, Exception) and not name.startswith("_")
        if each.__module__ == errors.__name__
    }
    assert own <= {*importlib.import_module(f"fedmq.{room}").__all__}


@pytest.mark.parametrize(
    "package",
    sorted(
        "fedmq." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).glob("*/**/__init__.py")
    ),
)
def test_each_name_of_a_sub_package_is_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name
