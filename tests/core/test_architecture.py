"""Imports run one way, each vendor library has one room, and the core stays pure."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for package in ("schemas", "worker")
    for path in sorted((ROOT / package).rglob("*.py"))
}

# What a room may import besides itself.
INNER = {"schemas", "worker.errors", "worker.core", "worker.ports"}
NAMES = {
    "worker.ops.logs",
    "worker.ops.metrics",
}  # log names and metrics are one list each, written in one place for all
OUTER = {"worker.flow", "worker.amqp", "worker.avatar", "worker.stores", "worker.ops"}
COMMANDS = {"worker.operate", "worker.doctor", "worker.parking", "worker.explain", "worker.tail"}
MAY_IMPORT = {
    "schemas": set[str](),
    "worker": set[str](),
    "worker.errors": {"schemas"},
    "worker.core": {"schemas", "worker.errors"},
    "worker.ports": {"schemas", "worker.errors", "worker.core"},
    "worker.settings": {"schemas", "worker.errors", "worker.core"},
    **dict.fromkeys(OUTER, INNER | NAMES),
    "worker.local": {"schemas"},
    "worker.app": {*INNER, *OUTER, "worker.settings"},
    "worker.operate": {*INNER, *OUTER, "worker.settings"},
    "worker.doctor": {*INNER, *OUTER, "worker.settings", "worker.app", "worker.operate"},
    "worker.parking": {*INNER, *OUTER, "worker.settings", "worker.operate"},
    "worker.explain": {*INNER, *OUTER, "worker.settings", "worker.operate", "worker.parking"},
    "worker.tail": {*INNER, *OUTER, "worker.settings", "worker.operate"},
    "worker.cli": {*INNER, *OUTER, *COMMANDS, "worker.settings", "worker.app", "worker.local"},
    "worker.__main__": {"worker.cli"},
}

# The only rooms that know a library.
ROOMS_OF = {
    "aio_pika": {"worker.amqp"},
    "aiormq": {"worker.amqp"},
    "pamqp": {"worker.amqp"},
    "aiohttp": {"worker.amqp", "worker.avatar", "worker.ops", "worker.local"},
    "sqlalchemy": {"worker.stores"},
    "asyncpg": {"worker.stores"},
    "prometheus_client": {"worker.ops"},
    "sqlite3": {"worker.stores"},
}

# The core computes. What is not listed here may reach a clock, chance, the machine or a vendor.
PURE = {
    "abc",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "html",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "regex",
    "sentencex",
    "typing",
}
VAGUE = {"common", "helpers", "misc", "util", "utils"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "worker" else ".".join(parts[:2])


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            # `from worker import errors` imports a module, `from worker.errors import WorkerError` a name in one.
            yield from (
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            )


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in {"schemas", "worker", "examples", "tests", "tools"}


def belongs_to(module: str, rooms: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    here = room(module)
    assert here in MAY_IMPORT, f"{here} has no place in the order of imports"
    forbidden = {
        name for name in imports(MODULES[module]) if is_ours(name) and not belongs_to(name, MAY_IMPORT[here] | {here})
    }
    assert not forbidden


@pytest.mark.parametrize("library", ROOMS_OF)
def test_each_vendor_library_has_its_room(library: str) -> None:
    users = {module for module, tree in MODULES.items() if any(belongs_to(name, {library}) for name in imports(tree))}
    assert {module for module in users if not belongs_to(module, ROOMS_OF[library])} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if belongs_to(module, {"schemas"})])
def test_the_contract_needs_only_pydantic(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "pydantic", "pydantic_core", "schemas"}
    assert {name.split(".")[0] for name in imports(MODULES[module])} <= allowed


@pytest.mark.parametrize(
    "module", [module for module in MODULES if belongs_to(module, {"worker.flow", "worker.ports"})]
)
def test_the_shell_knows_no_vendor(module: str) -> None:
    allowed = {*sys.stdlib_module_names, "structlog"}
    assert {name.split(".")[0] for name in imports(MODULES[module]) if not is_ours(name)} <= allowed


@pytest.mark.parametrize("module", [module for module in MODULES if belongs_to(module, {"worker.core"})])
def test_the_core_is_pure(module: str) -> None:
    tree = MODULES[module]
    assert {name.split(".")[0] for name in imports(tree) if not is_ours(name)} <= PURE
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, asynchronous)]
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {func.id for func in calls if isinstance(func, ast.Name)} & {
        "open",
        "print",
        "input",
        "exec",
        "eval",
        "__import__",
    }


@pytest.mark.parametrize("module", [module for module in MODULES if belongs_to(module, {"worker.amqp"})])
def test_nothing_is_handed_back_to_the_broker(module: str) -> None:
    """No requeue, which loses the order, or the partition for good; nothing is left by cancelling its consumer."""
    calls = [node.func for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)]
    assert not {func.attr for func in calls if isinstance(func, ast.Attribute)} & {
        "nack",
        "process",
        "recover",
        "basic_nack",
        "basic_reject",
        "basic_recover",
        "basic_cancel",
    }


@pytest.mark.parametrize("module", [module for module in MODULES if belongs_to(module, {"worker.amqp"})])
def test_no_queue_is_short_lived_and_shared_and_no_prefetch_for_a_whole_connection(module: str) -> None:
    """RabbitMQ 4.3 denies both."""
    calls = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)]
    for call in calls:
        given = {keyword.arg for keyword in call.keywords}
        assert not given & {"global_"}
        if isinstance(call.func, ast.Attribute) and call.func.attr in {"declare_queue", "queue_declare"}:
            assert given & {"durable", "exclusive", "passive"}, call.lineno


def test_no_module_has_a_vague_name() -> None:
    assert not [module for module in MODULES if VAGUE & set(module.split("."))]


def test_the_rules_see_what_they_forbid() -> None:
    source = "import aio_pika.abc\nfrom worker.flow import x\ndef f() -> None:\n    from worker import errors\n"
    assert set(imports(ast.parse(source))) >= {"aio_pika.abc", "worker.flow"}
    assert belongs_to("worker.flow.lanes", {"worker.flow"})
    assert not belongs_to("worker.flowers", {"worker.flow"})
