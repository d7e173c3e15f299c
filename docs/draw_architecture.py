"""Draw the rooms of fedmq and their parts from the imports: ``python docs/draw_architecture.py``.

Writes ``docs/architecture.svg``, and in ``docs/architecture.md`` the table of parts and the tables
of `fedmq.broker.core.lifecycles` and `fedmq.broker.link.contact`: the lives of messages, sessions
and links. A part is a folder of a room, or a module beside the folders. It stands above all that
it imports; an arrow leads to each part that it imports, unless another arrow leads there by way
of a third part.
"""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmq.broker.core import lifecycles
from fedmq.broker.link import contact

ROOT = Path(__file__).parent.parent
ROOMS = {
    "nodes": "programs and the command line",
    "algorithms": "what is learned, and how",
    "broker": "messages and the ledger",
    "codecs": "tensors as bytes",
}
BOX_HEIGHT, FLOOR_HEIGHT, GAP, MARGIN = 34, 62, 12, 16
BEGIN, END = "<!-- {}: written by draw_architecture.py -->", "<!-- end of {} -->"


@dataclass(frozen=True)
class Part:
    """A folder of a room, or a module beside the folders.

    about: the first sentence of its docstring.
    modules: how many it has.
    below: names of the parts of its room that it imports.
    """

    name: str
    about: str
    modules: int
    below: frozenset[str]


def read_room(room: str) -> dict[str, Part]:
    """Return the parts of a room by name."""
    folder = ROOT / room
    folders = {path.parent for path in folder.glob("*/__init__.py")}
    files = {path for path in folder.glob("*.py") if not path.stem.startswith("__")}
    names = {path.stem for path in folders | files}
    parts = {}
    for path in sorted(folders | files):
        modules = sorted(path.glob("*.py")) if path.is_dir() else [path]
        head = path / "__init__.py" if path.is_dir() else path
        text = ast.get_docstring(ast.parse(head.read_text())) or ""
        below = {part for module in modules for part in _imported(module, room)}
        about = " ".join(text.split("\n\n")[0].split())
        count = sum(module.name != "__init__.py" for module in modules)
        parts[path.stem] = Part(path.stem, about, count, frozenset(below & names - {path.stem}))
    return parts


def _imported(path: Path, room: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            words = name.split(".")
            if words[:2] == ["fedmq", room]:
                yield words[2]


def floors_of(parts: dict[str, Part]) -> list[list[str]]:
    """Return the parts floor by floor, from the bottom; each stands on what it imports."""
    height: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((floor(each) for each in parts[name].below), default=-1)
        return height[name]

    floors: list[list[str]] = [[] for _ in range(1 + max(map(floor, parts)))]
    for name in sorted(parts):
        floors[height[name]].append(name)
    return floors


def arrows_of(parts: dict[str, Part]) -> list[tuple[str, str]]:
    """Return who imports whom, without what a longer way shows already."""

    def reach(name: str) -> set[str]:
        return {name} | {far for each in parts[name].below for far in reach(each)}

    return [
        (name, each)
        for name, part in parts.items()
        for each in sorted(part.below)
        if not any(each in reach(other) for other in part.below - {each})
    ]


def width_of(name: str) -> int:
    """Return the width of a part's box, in pixels."""
    return 26 + round(7.4 * len(name))


def draw_room(room: str, left: int, top: int, width: int) -> tuple[list[str], int]:
    """Return the SVG elements of a room, and its height."""
    parts = read_room(room)
    floors = floors_of(parts)
    height = 46 + len(floors) * FLOOR_HEIGHT
    out = [
        f'<rect class="room" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="{left + MARGIN}" y="{top + 27}">{room}/</text>',
        (
            f'<text class="about" x="{left + MARGIN + 11 * len(room) + 16}" y="{top + 27}">'
            f"{ROOMS[room]}</text>"
        ),
    ]
    place: dict[str, tuple[float, int]] = {}
    for floor, names in enumerate(floors):
        names = _sorted_by_neighbours(names, parts, place)
        used = sum(map(width_of, names))
        gap = min(56.0, (width - 2 * MARGIN - used) / max(1, len(names) - 1))
        x = left + (width - used - gap * (len(names) - 1)) / 2
        y = top + height - (floor + 1) * FLOOR_HEIGHT + GAP
        for name in names:
            place[name] = (x + width_of(name) / 2, y)
            x += width_of(name) + gap
    for upper, lower in arrows_of(parts):
        (x1, y1), (x2, y2) = place[upper], place[lower]
        bend = (y2 - y1 - BOX_HEIGHT) / 2
        out.append(
            f'<path class="arrow" d="M{x1:.0f},{y1 + BOX_HEIGHT} '
            f"C{x1:.0f},{y1 + BOX_HEIGHT + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2 - 3}"
            f'" marker-end="url(#head)"/>'
        )
    for name, (x, y) in place.items():
        kind = "folder" if (ROOT / room / name).is_dir() else "module"
        half = width_of(name) / 2
        out += [
            (
                f'<rect class="{kind}" x="{x - half:.0f}" y="{y}" width="{2 * half:.0f}" '
                f'height="{BOX_HEIGHT}" rx="5"><title>{_escaped(parts[name].about)}</title></rect>'
            ),
            f'<text class="name" x="{x:.0f}" y="{y + 22}">{name}</text>',
        ]
    return out, height


def _sorted_by_neighbours(
    names: list[str], parts: dict[str, Part], place: dict[str, tuple[float, int]]
) -> list[str]:
    """Put each box over the middle of what it imports, so that few arrows cross."""

    def middle(name: str) -> float:
        below = [place[each][0] for each in parts[name].below if each in place]
        return sum(below) / len(below) if below else 0.0

    return sorted(names, key=lambda name: (middle(name), name))


def draw() -> str:
    """Return the picture: nodes above algorithms and broker, and codecs at the bottom."""
    width = 1240
    body: list[str] = []
    top = 10
    found, high = draw_room("nodes", 10, top, width - 20)
    body += found
    top += high + 34
    half = (width - 20 - 34) // 2
    left_part, left_high = draw_room("algorithms", 10, top, half)
    right_part, right_high = draw_room("broker", 10 + half + 34, top, half)
    body += [*left_part, *right_part]
    codecs, codecs_high = draw_room("codecs", 10, top + left_high + 34, half)
    body += codecs
    centre, other = 10 + half // 2, 10 + half + 34 + half // 2
    bottom = max(top + left_high + 34 + codecs_high, top + right_high)
    for x, y in ((centre, top - 34), (other, top - 34), (centre, top + left_high)):
        body.append(f'<path class="between" d="M{x},{y} L{x},{y + 28}" marker-end="url(#big)"/>')
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 10}" '
                f'viewBox="0 0 {width} {bottom + 10}" font-family="sans-serif">'
            ),
            (
                "<style>.room{fill:#f6f8fa;stroke:#57606a}.folder{fill:#fff;stroke:#0550ae}"
                ".module{fill:#fff;stroke:#8c959f;stroke-dasharray:4 3}.title{font-size:18px;"
                "font-weight:bold}.about{font-size:14px;fill:#57606a}.name{font-size:13px;"
                "text-anchor:middle}.arrow{fill:none;stroke:#8c959f}.between{stroke:#57606a;"
                "stroke-width:3}</style>"
            ),
            (
                '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" '
                'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#8c959f"/></marker>'
                '<marker id="big" markerWidth="5" markerHeight="5" refX="2" refY="2.5" '
                'orient="auto"><path d="M0,0 L5,2.5 L0,5 z" fill="#57606a"/></marker></defs>'
            ),
            '<rect width="100%" height="100%" fill="#fff"/>',
            *body,
            "</svg>\n",
        ]
    )


def table() -> str:
    """Return the table of all parts: what each is, and how many modules it has."""
    lines = ["| part | modules | what it is |", "|---|---|---|"]
    for room in ROOMS:
        parts = read_room(room)
        for names in reversed(floors_of(parts)):
            lines += [_row(room, parts[each]) for each in names]
    return "\n".join(lines)


def _row(room: str, part: Part) -> str:
    path = f"{room}/{part.name}" + ("/" if (ROOT / room / part.name).is_dir() else ".py")
    about = part.about.replace("``", "`").replace("|", "\\|")
    return f"| `{path}` | {part.modules} | {about} |"


def life_table(
    transitions: Mapping[enum.IntEnum, Mapping[enum.IntEnum, enum.IntEnum]],
) -> str:
    """Return the table of a life: its states, and what each event leads to; then the events."""
    states = meanings(type(next(iter(transitions))))
    events: dict[enum.IntEnum, str] = {}
    lines = ["| state | meaning | what may happen: next state |", "|---|---|---|"]
    for state, after in transitions.items():
        if after:
            events |= meanings(type(next(iter(after))))
        ways = [
            f"{lifecycles.word(event)}: **{lifecycles.word(there)}**"
            for event, there in after.items()
        ]
        lines.append(
            f"| **{lifecycles.word(state)}** | {states[state]} | {', '.join(ways) or 'nothing'} |"
        )
    return "\n".join(
        [*lines, "", *(f"- {lifecycles.word(each)}: {text}" for each, text in events.items())]
    )


def meanings(kind: type[enum.IntEnum]) -> dict[enum.IntEnum, str]:
    """Return the docstring below each member of an enumeration."""
    tree = ast.parse(inspect.getsource(kind))
    found = {}
    for member, text in itertools.pairwise(ast.walk(tree)):
        match member, text:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(ast.Constant(str(about))):
                found[kind[name]] = " ".join(about.split())
    return found


def with_tables(text: str) -> str:
    """Return the page with its tables as of now."""
    for name, content in (
        ("life of a message", life_table(lifecycles.MESSAGE)),
        ("life of a session", life_table(lifecycles.SESSION)),
        ("life of a link", life_table(contact.LINK)),
        ("parts", table()),
    ):
        before, _, rest = text.partition(BEGIN.format(name))
        _, _, after = rest.partition(END.format(name))
        text = f"{before}{BEGIN.format(name)}\n{content}\n{END.format(name)}{after}"
    return text


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def main() -> None:
    """Write the picture and the table."""
    (ROOT / "docs" / "architecture.svg").write_text(draw())
    page = ROOT / "docs" / "architecture.md"
    page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
