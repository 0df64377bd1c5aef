"""Who may import whom (the table of the design), by reading every import and by importing.

The first half walks the source of the packages; a rule is found by the longest module prefix. The
second half imports in a fresh interpreter what must work without JAX, which also covers what is
imported indirectly.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "sharding", "serving", "router")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
NUMERICS = ("jax", "flax", "numpy", "ml_dtypes")
HTTP = ("starlette", "uvloop", "httptools", "prometheus_client", "msgspec")
PURE_SERVING = ("serving.scheduler", "serving.request", "serving.config", "router.policies")
AXIS_NAMES = {"dp", "ep", "tp", "attn_dp", "attn_tp", "moe_ep", "moe_tp"}
MESH_NAMES = {"PartitionSpec", "NamedSharding", "shard_map"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the modules under a prefix may import beside the standard library.

    `only` is a closed list; where it is None everything is allowed that `never` does not name.
    """

    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()


RULES = {
    "model": Rule(only=(*NUMERICS, "model"), never=("jax.sharding",)),
    "model.formats.gguf_file": Rule(only=("numpy", "model", "gguf")),
    "sharding": Rule(only=(*NUMERICS, "model", "sharding")),
    "sharding.layout": Rule(only=()),
    "sharding.exchange_choice": Rule(only=("sharding.layout",)),
    "sharding.orbax_folder": Rule(only=(*NUMERICS, "model", "sharding", "orbax")),
    "serving": Rule(never=("starlette", *JAX, "model", "sharding")),
    "serving.request": Rule(only=()),
    "serving.config": Rule(only=("numpy", "serving.parsers", *PURE_SERVING)),
    "serving.parsers": Rule(only=("serving.parsers",)),
    "serving.template_features": Rule(only=()),
    "serving.messages": Rule(only=("numpy", "msgspec", *PURE_SERVING)),
    "serving.grammar": Rule(only=("numpy", "llguidance", "serving.tokenizer", *PURE_SERVING)),
    "serving.scheduler": Rule(only=("numpy", *PURE_SERVING)),
    "serving.engine": Rule(never=("starlette", "uvicorn", "serving.http")),
    "serving.http": Rule(never=(*JAX, "model", "sharding")),
    "serving.tokenizer": Rule(never=(*JAX, "model", "sharding")),
    "serving.engine_client": Rule(never=(*JAX, "model", "sharding")),
    "router": Rule(only=(*HTTP, "router")),
    "router.policies": Rule(only=()),
}


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rule_of(module: str) -> Rule:
    return RULES[max((prefix for prefix in RULES if under(module, (prefix,))), key=len)]


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_module(name: str) -> bool:
    """Whether a dotted name inside the packages is a file or folder (not a class or function)."""
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions and type checks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                inside = base.split(".")[0] in (*PACKAGES, "scripts")
                yield node.lineno, base if inside and not is_module(name) else name


def offences(tree: ast.Module, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of a module that its rule forbids, each with its line."""
    rule = rule_of(module)
    found = []
    for line, name in imports(tree, module, is_package=is_package):
        if name == "__future__" or name.split(".")[0] in sys.stdlib_module_names:
            continue
        allowed = rule.only is None or under(name, rule.only)
        if not allowed or under(name, (*rule.never, "scripts", "tests")):
            found.append(f"{module}:{line} imports {name}")
    return found


def mesh_offences(tree: ast.Module, module: str) -> list[str]:
    """Where a module of `model` speaks of the mesh: axis names, specs, jax.sharding."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if text in AXIS_NAMES:
                found.append(f"{module}:{node.lineno} names the mesh axis or role {text!r}")
            case ast.Name(id=name) | ast.alias(name=name) if name in MESH_NAMES:
                found.append(f"{module}:{node.lineno} uses {name}")
            case ast.Attribute(attr=name) if name in MESH_NAMES:
                found.append(f"{module}:{node.lineno} uses {name}")
            case ast.Attribute(value=ast.Name(id="jax"), attr="sharding"):
                found.append(f"{module}:{node.lineno} uses jax.sharding")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_allowed(package):
    paths = [path for path in sources() if path.relative_to(ROOT).parts[0] == package]
    assert paths, f"no source found in {package}"
    found = [
        offence
        for path in paths
        for offence in offences(
            tree_of(path), module_name(path), is_package=path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


def test_the_model_never_speaks_of_the_mesh():
    found = [
        offence
        for path in sources()
        if path.relative_to(ROOT).parts[0] == "model"
        for offence in mesh_offences(tree_of(path), module_name(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.mla", "import sharding.mesh"),
        ("model.mla", "from sharding import mesh"),
        ("model.mla", "from jax.sharding import Mesh"),
        ("model.mla", "from jax import sharding"),
        ("model.mla", "def f():\n    import torch"),
        ("sharding.mesh", "from serving.request import Request"),
        ("sharding.layout", "import numpy"),
        ("serving.scheduler.rank", "import jax.numpy as jnp"),
        ("serving.scheduler.rank", "import msgspec"),
        ("serving.scheduler.rank", "from serving.grammar import GrammarSet"),
        ("serving.scheduler.rank", "from router.registry import WorkerRegistry"),
        ("serving.scheduler.rank", "from ..engine import runner"),
        ("serving.grammar", "import jax"),
        ("serving.request", "import numpy"),
        ("serving.messages", "from serving.engine import engine"),
        ("serving.engine.engine", "from starlette.requests import Request"),
        ("serving.http.app", "from jax import numpy"),
        ("serving.http.app", "from flax import nnx"),
        ("serving.tokenizer", "import jax"),
        ("serving.engine_client", "import jax"),
        ("serving.anything_new", "import jax"),
        ("serving.engine.engine", "import scripts.serve"),
        ("router.policies", "import starlette"),
        ("router.proxy", "from serving.request import Request"),
        ("router.proxy", "import numpy as np"),
        ("router.proxy", "import httpx"),
    ],
)
def test_the_rules_catch_what_they_forbid(module, source):
    assert offences(ast.parse(source), module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model.mla", "import jax\nfrom model.comm import Comm\nfrom flax import nnx"),
        ("sharding.comm", "from jax.sharding import PartitionSpec\nfrom model.comm import Comm"),
        ("serving.scheduler.rank", "from router.policies import Load\nimport numpy as np"),
        ("serving.scheduler.rank", "from .plan import StepPlan\nfrom bisect import insort"),
        ("serving.engine.engine", "import jax\nfrom sharding.step import x\nimport model.mla"),
        ("serving.http.app", "from starlette.requests import Request\nimport serving.messages"),
        ("router.proxy", "import httptools\nimport msgspec\nfrom router.policies import Load"),
    ],
)
def test_the_rules_allow_what_they_should(module, source):
    assert not offences(ast.parse(source), module)


@pytest.mark.parametrize(
    "source",
    [
        'x = psum(x, "tp")',
        'AXES = ("ep",)',
        "s = jax.sharding.Mesh",
        "from jax.sharding import PartitionSpec as P",
        "f = jax.shard_map(g)",
    ],
)
def test_the_mesh_is_noticed_in_a_model(source):
    assert mesh_offences(ast.parse(source), "model.mla")


def without_jax() -> list[str]:
    modules = [
        "router.policies",
        "router.app",
        "serving.scheduler.scheduler",
        "serving.config",
        "serving.messages",
        "sharding.layout",
    ]
    optional = ("serving.http.app", "serving.tokenizer", "serving.engine_client", "serving.grammar")
    return modules + [name for name in optional if is_module(name)]


@pytest.mark.parametrize("module", without_jax())
def test_importing_it_does_not_load_jax(module):
    code = (
        f"import sys, {module}\n"
        "loaded = {'jax', 'jaxlib', 'flax'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
