"""Which part may import which: the rooms, the folders within them, and what a node's link loads.

The tables list, for each folder and each module beside the folders, what it may import of its
own room. A folder's modules may import one another, without a circle.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "codecs": set(),
    "broker": set(),
    "algorithms": {"codecs"},
    "nodes": {"codecs", "broker", "algorithms"},
}
PARTS = {
    "codecs": {
        "errors": "",
        "text": "",
        "extensions": "",
        "base": "errors",
        "kernels": "",
        "spec": "errors text",
        "formats": "errors text base",
        "stages": "errors base kernels",
        "raw": "errors text base formats",
        "cast": "errors text base raw",
        "features": "errors text base formats raw",
        "logits": "errors text base formats raw",
        "pipeline": "errors text base formats kernels stages raw",
        "registry": "errors text base extensions spec stages raw cast features logits pipeline",
    },
    "broker": {
        "settings": "",
        "process": "",
        "open_files": "",
        "file_modes": "",
        "rejections": "",
        "errors": "rejections",
        "wire": "errors rejections",
        "ledger": "settings errors rejections wire open_files file_modes",
        "access": "settings errors rejections open_files file_modes wire",
        "transport": "settings errors open_files wire access",
        "core": "settings errors rejections wire ledger access",
        "link": "errors rejections wire ledger access transport",
        "enrolment": "errors wire access transport",
        "recovery": "settings errors wire ledger access core",
        "inspection": "settings errors wire ledger core recovery file_modes",
        "blob_locations": "wire ledger core",
        "log_limit": "",
        "driver": "settings errors wire ledger access core blob_locations recovery file_modes "
        "log_limit",
        "virtual": "settings errors wire ledger access core link recovery driver",
        "router": "settings errors wire access transport open_files core driver",
    },
    "algorithms": {
        "errors": "",
        "seeds": "",
        "rng": "seeds",
        "allowed": "errors",
        "values": "errors",
        "hyperparameters": "errors",
        "problems": "errors rng allowed values hyperparameters",
        "tasks": "errors problems",
        "toolkit": "errors rng values problems tasks",
        "base": "problems hyperparameters tasks toolkit",
        "schedules": "errors hyperparameters tasks toolkit",
        "fedavg": "errors rng values problems base toolkit",
        "fedsgd": "base toolkit fedavg",
        "fedprox": "rng base fedavg",
        "personal": "errors rng problems base toolkit fedavg",
        "feddropout": "errors rng problems base toolkit fedavg",
        "distillation": "errors rng problems base toolkit",
        "faug": "errors rng problems base toolkit distillation fedavg",
        "fedgkt": "errors rng problems base toolkit",
        "pfedhn": "errors rng problems base toolkit",
        "mocha": "errors rng problems base toolkit",
        "registry": "errors allowed base fedavg fedsgd fedprox personal feddropout distillation "
        "faug fedgkt pfedhn mocha",
    },
    "nodes": {
        "process": "",
        "errors": "process",
        "messages": "errors process",
        "population": "errors",
        "run": "errors process messages population",
        "keys": "errors process run",
        "history": "messages run",
        "run_folder": "errors process messages run history",
        "aggregator": "errors process messages run run_folder",
        "worker": "errors process messages run",
        "trace": "errors process messages history",
        "replay": "errors process messages run history trace aggregator worker",
        "cluster": "errors process keys messages population run history run_folder aggregator "
        "worker",
        "simulation": "errors process messages population run history run_folder aggregator worker "
        "cluster",
        "api": "errors process run history run_folder trace cluster",
        "cli": "errors process keys run history run_folder aggregator worker cluster trace replay "
        "simulation api population",
        "__main__": "cli",
    },
}
MAY_IMPORT_ZMQ = {
    "broker/router.py",
    "broker/link/dealer.py",
    "broker/enrolment.py",  # a loop of its own: it hands in a key before a node has a link
    "broker/wire/sockets.py",
    "broker/access/curve.py",  # for key pairs, no traffic
    # Options of the sockets, and what libzmq reports of their connections.
    "broker/transport/connections.py",
    "broker/transport/dealer_socket.py",
    "broker/transport/listening.py",
    "broker/transport/monitor.py",
    "broker/transport/zap.py",
}
LONGEST_FILE = 400
MOST_MODULES = 12
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fedmq", *(part for part in parts if part != "__init__")))


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Return what a file imports, at its head or inside functions: modules, and names in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def part_of(name: str) -> str:
    """Return the folder, or the module beside the folders, that a dotted name belongs to."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 else ""


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_the_rooms_below_it(name: str) -> None:
    room = name.split(".")[1]
    rooms = {each.split(".")[1] for each in IMPORTS[name] if each.startswith("fedmq.")}
    assert rooms <= ROOMS[room] | {room, "_lazy"}  # with which a room exports its names


@pytest.mark.parametrize("room", ROOMS)
def test_each_part_of_a_room_imports_only_the_parts_that_the_table_lists(room: str) -> None:
    allowed = {part: set(below.split()) for part, below in PARTS[room].items()}
    used: dict[str, set[str]] = {}
    for name in MODULES:
        if name.split(".")[1] != room or name == f"fedmq.{room}":
            continue
        own = used.setdefault(part_of(name), set())
        own |= {part_of(each) for each in IMPORTS[name] if each.startswith(f"fedmq.{room}.")}
    assert used.keys() == allowed.keys()
    for part, found in used.items():
        assert found - {part, ""} <= allowed[part], part


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_of_a_room_has_no_circle(room: str) -> None:
    lower: set[str] = set()
    for part, below in PARTS[room].items():
        assert set(below.split()) <= lower, part
        lower.add(part)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count, too: they hide a circle, they do not cut it."""
    waiting = {}
    for name, path in MODULES.items():
        below = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                below |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = full & MODULES.keys()
                below |= modules if modules == full else modules | {node.module}
        waiting[name] = below & MODULES.keys() - {name}
    while free := [name for name, below in waiting.items() if not below & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert waiting == {}


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fedmq.broker.link.node_link", ("fedmq.broker.core", "fedmq.broker.ledger.writer")),
        ("fedmq.nodes.worker.program", ("fedmq.broker.core", "fedmq.broker.ledger.writer")),
        ("fedmq.nodes.aggregator.program", ("fedmq.broker.core", "fedmq.broker.ledger.writer")),
        ("fedmq.broker.router", ("fedmq.broker.link", "torch")),
        ("fedmq.nodes.cli.main", ("fedmq.broker.core", "torch")),
    ],
)
def test_what_a_program_does_not_load(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    command = (sys.executable, "-P", "-c", code)
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    for each in unwanted:
        assert [name for name in loaded if name == each or name.startswith(f"{each}.")] == []


@pytest.mark.end_to_end
def test_what_a_nodes_link_loads() -> None:
    """All that a node needs of the broker's room to take part in a run."""
    code = "import sys, fedmq.broker.link.node_link; print(*sys.modules)"
    command = (sys.executable, "-P", "-c", code)
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ours = {name.removeprefix("fedmq.broker.") for name in loaded if name.startswith("fedmq.b")}
    wire = {
        "batching",
        "chunked_transfer",
        "clock",
        "encoding",
        "endpoints",
        "inbox",
        "schema",
        "sockets",
        "window",
    }
    reading = {"disk", "entries", "lock", "records", "segments"}
    own = {path.stem for path in (ROOT / "broker" / "link").glob("*.py")} - {"__init__"}
    assert ours == {
        *("fedmq.broker", "errors", "rejections", "wire", "ledger", "link"),
        *("open_files", "file_modes", "access", "access.curve"),
        *("transport", "transport.dealer_socket", "transport.monitor"),
        *(f"wire.{name}" for name in wire),
        *(f"ledger.{name}" for name in reading),
        *(f"link.{name}" for name in own),
    }


def test_only_the_loops_and_their_sockets_import_zmq() -> None:
    users = {str(MODULES[name].relative_to(ROOT)) for name in MODULES if "zmq" in IMPORTS[name]}
    assert users == MAY_IMPORT_ZMQ


def test_the_broker_imports_no_torch_and_nothing_unpickles() -> None:
    for name, found in IMPORTS.items():
        names = {each.split(".")[0] for each in found}
        assert "pickle" not in names
        if name.startswith("fedmq.broker"):
            assert "torch" not in names


def test_files_hold_one_idea_each() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FILE} == {}


def test_no_folder_has_more_modules_than_a_reader_can_hold() -> None:
    folders = {path.parent for path in FILES}
    sizes = {
        str(folder.relative_to(ROOT)): len(set(folder.glob("*.py")) - {folder / "__init__.py"})
        for folder in folders
    }
    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}
