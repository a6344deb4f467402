"""Who imports whom, what `import trl_atropos` loads, and how errors are raised."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import trl_atropos
from trl_atropos import errors


PACKAGE = "trl_atropos"
ROOT = Path(trl_atropos.__file__).parent
ALARM_FILE_LINES = 600
"""Above this a file is probably two things. It is never cut to meet the number."""

GROUND = {"errors", "types", "options", "distributed", "network", "progress"}

# A package imports itself, the ground, and:
IMPORTS_OF = {
    "wire": set(),
    "policy": set(),
    "loss": {"policy"},
    "weight_sync": {"policy"},
    "serving": {"wire.rollout_key", "weight_sync.transports.backends"},
    "checks": {"wire", "weight_sync"},
    "data": {"wire", "policy", "loss", "checks"},
    "report": {"data", "loss", "weight_sync.weights"},
    "trainer": {"wire", "policy", "loss", "weight_sync", "checks", "data", "report"},
    "api": set(),
    "envs": set(),
    "gateway": {"api.http", "api.refusals", "serving.asgi", "serving.generate_endpoint", "wire.rollout_key"},
    "verl": {"wire", "policy", "loss", "weight_sync", "data", "trainer"},
    "cli": {"wire", "weight_sync", "checks", "report", "trainer", "api", "envs", "gateway"},
}
"""Package -> the packages, or single modules, that it may import. docs/architecture.md shows the same table."""

LIBRARIES_OF = {
    "ground": {"torch", "accelerate"},
    "wire": {"torch", "requests", "urllib3", "datasets"},
    "policy": {"torch", "transformers", "accelerate", "peft", "trl"},
    "loss": {"torch"},
    "weight_sync": {
        *(
            "torch",
            "transformers",
            "trl",
            "peft",
            "deepspeed",
            "bitsandbytes",
            "safetensors",
            "requests",
            "urllib3",
            "vllm",
        ),
    },
    "serving": {"vllm", "torch"},
    "checks": set(),
    "api": {"isal", "msgspec", "uvicorn"},
    "envs": {
        *(
            "aiohttp",
            "atroposlib",
            "gem",
            "pydantic",
            "reasoning_core",
            "reasoning_gym",
            "textarena",
            "uvicorn",
            "verifiers",
            "websockets",
        ),
    },
    "gateway": {"aiohttp", "atroposlib", "msgspec", "pydantic", "uvicorn"},
    "data": {"torch"},
    "verl": {"torch", "transformers", "verl", "hydra", "omegaconf"},
    "report": {
        *("torch", "transformers", "trl", "huggingface_hub", "jinja2", "markupsafe", "matplotlib", "pandas"),
        *("prometheus_client", "rich", "yaml"),
    },
}
"""Package -> libraries outside of the standard library that it may import; `trainer` and `cli`: any."""

PURE = ("loss", "data", "policy", "wire.parse", "wire.fields", "wire.options", "wire.teacher")
"""Numbers in, numbers out: what stands here neither reads nor writes anything, but for what `DOES_IO` names."""
DOES_IO = {
    "data.history",
    "data.policy_versions",
    "data.quarantine",
    "data.sources",
    "data.steps",
    "policy.load",
    "policy.plan",
}

ENGINE_FILES = {f"weight_sync.transports.{name}_engine" for name in ("layerwise", "twin", "shm", "gloo")}
VLLM_FILES = ENGINE_FILES | {"weight_sync.transports.nccl", "serving.plugin", "serving.generate_endpoint"}


@dataclass(frozen=True)
class Import:
    """One imported module, as seen from `importer` (dotted, without the package's name)."""

    importer: str
    module: str
    name: str
    line: int
    is_ours: bool
    is_lazy: bool
    is_for_annotations: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def where(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module or PACKAGE}.{self.name}"


def dotted(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MODULES = {name.partition(".")[0] for name in FILES if name}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def resolve(importer: str, node: ast.ImportFrom) -> tuple[str, bool]:
    """Absolute name of the module of a `from` import, and whether it is ours (then without the package's name)."""
    if node.level == 0:
        top, _, rest = (node.module or "").partition(".")
        return (rest, True) if top == PACKAGE else (node.module or "", False)
    is_package = FILES[importer].name == "__init__.py"
    parts = importer.split(".") if importer else []
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])]), True


def walk_imports(importer: str, node: ast.AST, is_lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            module, is_ours = resolve(importer, child)
            for alias in child.names:
                # `from . import x` and `from .. import x` name the module in the alias.
                target = ".".join([*([module] if module else []), alias.name])
                inner = target if is_ours and target in FILES else module
                yield Import(importer, inner, alias.name, child.lineno, is_ours, is_lazy, typing)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                top, _, rest = alias.name.partition(".")
                is_ours = top == PACKAGE
                module = rest if is_ours else alias.name
                yield Import(importer, module, "", child.lineno, is_ours, is_lazy, typing)
        else:
            in_function = is_lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk_imports(importer, child, in_function, typing or is_type_checking(child))


IMPORTS = [imported for name, tree in TREES.items() for imported in walk_imports(name, tree)]


def test_every_package_has_its_line():
    assert GROUND | IMPORTS_OF.keys() == MODULES


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def test_packages_import_what_their_line_says():
    broken = []
    for imported in IMPORTS:
        if not imported.is_ours or not imported.importer:
            continue
        top = imported.importer.partition(".")[0]
        allowed = GROUND if top in GROUND else GROUND | {top} | IMPORTS_OF[top]
        if imported.module and not is_allowed(imported.module, allowed):
            broken.append(imported.where)
    assert broken == []


def test_nothing_is_allowed_that_nobody_needs():
    needed = {
        (imported.importer.partition(".")[0], name)
        for imported in IMPORTS
        for name in IMPORTS_OF.get(imported.importer.partition(".")[0], ())
        if imported.is_ours and is_allowed(imported.module, {name})
    }
    assert needed == {(package, name) for package, names in IMPORTS_OF.items() for name in names}


def test_no_file_imports_itself_through_others():
    """Also not for types only: files that need each other are one thing, or lack a third one below both."""
    imports: dict[str, set[str]] = {name: set() for name in FILES}
    for imported in IMPORTS:
        if imported.is_ours and imported.module in FILES and imported.importer:
            imports[imported.importer].add(imported.module)
    circles = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
            return
        if name in done:
            return
        for other in sorted(imports[name]):
            visit(other, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in sorted(FILES):
        visit(name, ())
    assert circles == []


def test_the_walk_sees_the_imports_that_the_rules_are_about():
    # Guards the guard: an empty walk would pass every rule above.
    seen = {(imported.importer, imported.module) for imported in IMPORTS if imported.is_ours}
    assert {
        ("loss.losses", "loss.metrics"),
        ("data.steps", "wire.journal"),
        ("weight_sync.probe", "policy.logprobs"),
        ("weight_sync.transports.shm", "weight_sync.transports.shm_segment"),
        ("trainer.preflight", "checks.server"),
        ("trainer.servers", "weight_sync.probe"),
        ("cli.launch.run", "cli.launch.summary"),
    } <= seen


def test_packages_use_the_libraries_of_their_line():
    broken = []
    for imported in IMPORTS:
        top = imported.importer.partition(".")[0]
        allowed = LIBRARIES_OF.get("ground" if top in GROUND else top)
        if imported.is_ours or allowed is None or imported.top in sys.stdlib_module_names:
            continue
        if imported.top not in allowed:
            broken.append(imported.where)
    assert broken == []


def test_pure_modules_do_no_io():
    pure = {name for name in FILES if is_allowed(name, set(PURE))} - DOES_IO
    forbidden = {"logging", "requests", "os", "pathlib", "socket", "subprocess", "io", "vllm"}
    broken = [imported.where for imported in IMPORTS if imported.importer in pure and imported.top in forbidden]
    opened = [
        f"{name}:{node.lineno}"
        for name in pure
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"open", "print"}
    ]
    assert broken + opened == []


def test_types_use_torch_for_annotations_only():
    assert all(
        imported.is_for_annotations
        for imported in IMPORTS
        if imported.importer in {"errors", "types", "options"} and imported.top == "torch"
    )


def test_vllm_is_imported_in_few_places_and_not_before_it_is_needed():
    places = [imported for imported in IMPORTS if imported.top == "vllm" and not imported.is_ours]
    assert {imported.importer for imported in places} == VLLM_FILES
    # vLLM itself imports the engine files, inside its worker; every other file must load without vLLM.
    eager = {imported.importer for imported in places if not (imported.is_lazy or imported.is_for_annotations)}
    assert eager == ENGINE_FILES


def test_verl_is_imported_by_its_own_package_only():
    importers = {imported.importer for imported in IMPORTS if imported.top == "verl" and not imported.is_ours}
    assert importers == {f"verl.{name}" for name in ("atropos_sft_trainer", "cpu", "train")}


def test_nothing_imports_the_worker_side_of_a_transport():
    assert {name for name in FILES if name.endswith("_engine")} == ENGINE_FILES
    broken = [imported.where for imported in IMPORTS if imported.is_ours and imported.module in ENGINE_FILES]
    assert [where for where in broken if where.partition(":")[0] not in ENGINE_FILES] == []


def test_examples_use_public_names_only():
    public = set(trl_atropos.__all__)
    broken = []
    for path in sorted((ROOT.parent / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
                private = [alias.name for alias in node.names if node.module != PACKAGE or alias.name not in public]
                broken += [f"{path.name}:{node.lineno} imports {name}" for name in private]
    assert broken == []


def test_print_is_for_the_command_line_only():
    calls = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        if name.partition(".")[0] != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


@pytest.mark.parametrize("statement", ["import trl_atropos", "import trl_atropos; dir(trl_atropos)"])
def test_importing_the_package_loads_nothing_heavy(statement):
    code = f"{statement}\nimport sys; print(sorted({{'torch', 'vllm', 'transformers', 'trl'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_exports_are_the_public_names_and_all_of_them_resolve():
    # What `if TYPE_CHECKING:` shows to type checkers and what `__getattr__` finds must not drift apart.
    (shown,) = [node.body for node in ast.walk(TREES[""]) if is_type_checking(node)]
    names = [alias.asname for statement in shown for alias in statement.names]
    assert sorted(trl_atropos.__all__) == sorted(["__version__", *names])
    assert set(trl_atropos.__all__) <= set(dir(trl_atropos))
    for name in trl_atropos.__all__:
        exported = getattr(trl_atropos, name)
        if name != "__version__":
            assert inspect.isclass(exported) or inspect.isfunction(exported)
            assert exported.__name__ == name
            assert getattr(importlib.import_module(exported.__module__), name) is exported


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'trl_atropos' has no attribute 'AtroposTrainr'"):
        _ = trl_atropos.AtroposTrainr


def test_no_file_is_so_long_that_it_is_two_things():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > ALARM_FILE_LINES} == {}


ERROR_NAMES = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}


def error_calls() -> list[tuple[str, ast.Call]]:
    names = set(ERROR_NAMES)
    for tree in TREES.values():
        for node in ast.walk(tree):
            bases = {base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)}
            if isinstance(node, ast.ClassDef) and bases & ERROR_NAMES:
                names.add(node.name)
    return [
        (f"{module}:{node.lineno}", node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def num_arguments(call: ast.Call) -> int:
    # `*_HELP[name]` unpacks the pair (why, fix).
    keywords = [keyword for keyword in call.keywords if keyword.arg in ("what", "why", "fix")]
    return sum(2 if isinstance(argument, ast.Starred) else 1 for argument in call.args) + len(keywords)


def test_every_error_says_what_happened_why_and_how_to_mend_it():
    calls = error_calls()
    assert len(calls) > 30
    assert [where for where, call in calls if num_arguments(call) != 3] == []


def test_every_part_of_an_error_is_a_sentence():
    broken = []
    for where, call in error_calls():
        for part in call.args:
            pieces = part.values if isinstance(part, ast.JoinedStr) else [part]
            last = pieces[-1]
            if (
                isinstance(last, ast.Constant)
                and isinstance(last.value, str)
                and last.value.rstrip()[-1:] not in ".?!"
            ):
                broken.append(f"{where}: {last.value!r}")
    assert broken == []


def test_no_exception_is_swallowed_whole():
    # `except BaseException` is allowed where the error is kept for another thread or rank and raised there.
    broken = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception"))
    ]
    assert broken == []
