"""The shape of the source code, read from its syntax trees: who imports whom, and what must not be in it."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("util", "diffusion", "models", "heads", "sampling", "training", "scripts", "tests")
FILES = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))])
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]

# The rooms of the house from the ground up: each may import those below it, but for what NOT_FROM says.
ROOMS = ["util", "diffusion", "models", "heads", "sampling", "training", "engine_mar", "main_mar", "sample"]
ROOMS += ["scripts", "tests"]
PROGRAMS = {"main_mar", "sample", "scripts"}  # no program imports a program
NOT_FROM = {"heads": {"models"}} | {room: PROGRAMS for room in PROGRAMS}
FOR_TYPES_ONLY = {"heads": {"models"}}
# pure functions of a family's published schedule
ALSO = {"heads": {"models.mask_schedules"}}
MAY_IMPORT = {room: set(ROOMS[:i]) - NOT_FROM.get(room, set()) for i, room in enumerate(ROOMS)}
GROUND = ("util/images/", "util/evaluation/")  # stand on the files of util, which do not know them
LAZY = {"diffusers", "transformers", "timm", "torchvision", "torch_fidelity", "tensorboard", "sklearn", "matplotlib"}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "torch_fidelity": "torch-fidelity"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> list[tuple[str, bool, bool]]:
    """(dotted name, is it under TYPE_CHECKING, does it run when the file is imported) of every import in a file.

    `from a.b import c` counts as a.b and as a.b.c, since c may be a module.
    """
    found = []

    def visit(node, for_types, at_once):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).parts[:-1])
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names = [ast.literal_eval(node.args[0])] if isinstance(node.args[0], ast.Constant) else ["?"]
        else:
            names = []
        found.extend((name, for_types, at_once) for name in names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_once = False
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, True, False)
            for child in node.orelse:
                visit(child, for_types, at_once)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, for_types, at_once)

    visit(tree_of(path), False, True)
    return found


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def calls(path: Path) -> set[str]:
    """Last name of everything that a file calls: `cuda` for `model.cuda()`."""
    functions = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in functions}


def test_every_part_has_its_place():
    """A new package or program must be added to the tables above before anything else here can judge it."""
    assert {part_of(path) for path in FILES} <= MAY_IMPORT.keys()
    hidden = {"output_dir", "build", "dist", "node_modules"}
    folders = {p.parent.relative_to(ROOT).parts[0] for p in ROOT.glob("[!.]*/*.py")} - hidden
    assert folders == set(PACKAGES)
    assert {path.stem for path in ROOT.glob("*.py")} == {"engine_mar", "main_mar", "sample"}


def test_imports_point_upwards():
    wrong = []
    for path in FILES:
        part = part_of(path)
        allowed = MAY_IMPORT[part] | {part} - {"scripts"}  # no script imports a script either
        for name, for_types, _ in imports(path):
            target = name.split(".")[0]
            more = FOR_TYPES_ONLY.get(part, set()) if for_types else set()
            also = name.startswith(tuple(ALSO.get(part, ())))
            if target in MAY_IMPORT and target not in allowed | more and not also:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_ground_of_util_knows_nothing_that_stands_on_it():
    files = [path for path in FILES if path.relative_to(ROOT).parent == Path("util")]
    assert len(files) >= 5
    above = tuple(room.strip("/").replace("/", ".") for room in GROUND)
    assert not [(path.name, name) for path in files for name, *_ in imports(path) if name.startswith(above)]


CHAINS = [
    ("main_mar.py", "import sample"),
    ("sample.py", "from main_mar import run"),
    ("scripts/x.py", "import sample"),
]


@pytest.mark.parametrize("program, source", [*CHAINS, ("scripts/x.py", "from scripts import bench")])
def test_a_program_that_imports_a_program_is_seen(monkeypatch, program, source):
    monkeypatch.setattr(sys.modules[__name__], "tree_of", lambda path: ast.parse(source))
    monkeypatch.setattr(sys.modules[__name__], "FILES", [ROOT / program])
    with pytest.raises(AssertionError):
        test_imports_point_upwards()


def test_the_reader_of_imports_sees_all_kinds(monkeypatch):
    source = """
import a.b, c as d
from e.f import g
from . import h
from ..i import j
try:
    import k
except ImportError:
    pass
if TYPE_CHECKING:
    from models import mar
else:
    import l
class M:
    import n
    def method(self):
        import o
        importlib.import_module("p")
"""
    monkeypatch.setattr(sys.modules[__name__], "tree_of", lambda path: ast.parse(source))
    found = imports(ROOT / "models" / "tokenizers" / "x.py")
    at_once = {name for name, _, now in found if now}
    assert at_once == {"a.b", "c", "e.f", "e.f.g", "models.tokenizers", "models.tokenizers.h", "models.i",
                       "models.i.j", "k", "l", "n"}  # fmt: skip
    assert {name for name, for_types, _ in found if for_types} == {"models", "models.mar"}
    assert {name for name, for_types, now in found if not now and not for_types} == {"o", "p"}


def loaded_by(program: str) -> set[str]:
    """Dotted names imported, directly or through the repository's own modules, by importing a program."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    seen, queue = set(), [program]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in modules:
            queue += [imported for imported, _, now in imports(modules[name]) if now]
        queue += [name.rpartition(".")[0]] if "." in name else []  # the package's own __init__.py
    return seen


@pytest.mark.parametrize("program", ["main_mar", "sample", "engine_mar", "models.loading"])
def test_heavy_libraries_are_imported_where_they_are_used(program):
    names = loaded_by(program)
    assert {"util.args", "models.mar", "torch", "models.vit"} <= names  # the walk went through
    assert not {name for name in names if LAZY & set(name.split("."))}


def test_no_fixed_device_and_no_sleeping():
    """`.cuda()` ties code to one kind of device; a sleep is no barrier."""
    assert "make_parser" in calls(ROOT / "scripts" / "train_classifier.py")  # it does see calls
    assert not [path for path in SOURCES if calls(path) & {"cuda", "sleep"}]


def test_files_are_short_enough_to_read():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: length for path, length in lengths.items() if length > 380}


# their parameters are published names (DESIGN.md section 6)
MANY_PARAMETERS = {"DiffLoss.sample", "decode", "generate", "build_rules"}


def functions(path: Path):
    """(name with its class, node) of every function in a file."""
    for node in ast.walk(tree_of(path)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (f"{node.name}." if isinstance(node, ast.ClassDef) else "") + child.name, child


def test_functions_fit_on_a_screen():
    """At most 60 lines, the docstring apart, and 8 parameters."""
    wrong = []
    for path in SOURCES:
        for name, node in functions(path):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(parameters) - (parameters[:1] == ["self"])
            if lines > 60 or (count > 8 and name not in MANY_PARAMETERS):
                wrong.append(f"{path.relative_to(ROOT)} {name}: {lines} lines, {count} parameters")
    assert not wrong


def test_the_loop_knows_no_family_and_no_token_head():
    names = {name for file in ("loop.py", "canvas.py") for name, *_ in imports(ROOT / "sampling" / file)}
    assert {"heads.step", "sampling.canvas"} <= names and not [
        name for name in names if name.split(".")[0] in ("models", "diffusion")
    ]


def test_settings_travel_as_parts():
    """A dict of all settings is read in the parser (training/config.py) and nowhere else."""
    assert not [path for path in SOURCES if 'values["' in path.read_text() and path.parts[-2:] != ("util", "args.py")]


def test_the_reading_guide_is_short_and_names_files_that_are_there():
    text = (ROOT / "docs" / "reading.md").read_text()
    paths = re.findall(r"`([\w/]+\.(?:py|md|sh))`", text)
    assert len(text.splitlines()) <= 60 and len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists() and path != "__init__.py"]


PROGRAM_FILES = [*sorted((ROOT / "scripts").glob("*.py")), ROOT / "main_mar.py", ROOT / "sample.py"]


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: path.name)
def test_programs_can_be_called_in_process(path):
    """`main(argv=None) -> int`, run only when the file is the program."""
    body = tree_of(path).body
    (main,) = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert ast.unparse(main.args) == "argv=None" and main.returns is not None and ast.unparse(main.returns) == "int"
    guard = body[-1]
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == '__main__'"
    assert re.search(r"sys\.exit\((main\(|run_main\(main)|raise SystemExit\(", ast.unparse(guard))


def test_requirements_name_every_library():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower() for line in lines if line and line[0] != "#"}
    used = {}
    for path in FILES:
        for name, _, _ in imports(path):
            first = name.split(".")[0]
            if first not in sys.stdlib_module_names and first not in MAY_IMPORT:
                used[DISTRIBUTIONS.get(first, first)] = path.name
            if name.startswith("torch.utils.tensorboard"):
                used["tensorboard"] = path.name
    assert {"torch", "timm", "scikit-learn", "pillow", "torch-fidelity", "tensorboard"} <= used.keys()
    assert not {name: where for name, where in used.items() if name not in required}
