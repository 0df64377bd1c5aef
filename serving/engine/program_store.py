"""Compiled programs on disk: a start loads what an earlier one compiled, and lowers none of it.

XLA's own cache can only be asked once a program is traced and lowered, which holds the
interpreter's lock and was most of a warm start. A file here is found by what a program is made
from: its `Definition` and its `environment`. Files are pickles, which can run code: the folder is
the user's alone, and not used where somebody else could have written to it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

import model
import serving
import sharding
from sharding.mesh import is_gpu
from sharding.step import sharded

log = logging.getLogger("meshserve.engine")

FOLDER = "programs"
"""Where programs are inside the compilation cache."""
NAME = re.compile("[0-9a-f]{64}")
PART = ".part-"
"""How a kept program's file is named, and how one begins that is being written."""
KEPT_DAYS = 30
"""A program that no start has used for so long is deleted."""
PACKAGES = ("jax", "flax", "numpy", "ml_dtypes", "ml-dtypes", "nvidia", "libtpu")
"""How the names begin of installed packages that have a part in programs."""
VARIABLES = re.compile("(JAX|XLA|LIBTPU|MOSAIC|TRITON|TF|NVIDIA_TF32)_(?!COMPILATION_CACHE)")
"""Environment variables that JAX, XLA and their compilers read."""
CACHE_HIT = "/jax/compilation_cache/cache_hits"

_thread = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A program before it is traced: all it is made from beside code, settings and devices.

    Attributes:
        name: for logs, unique in an engine.
        fn: per device, as `sharded` takes it; a plain function, or a `functools.partial` of one
            whose bound arguments tell all they hold by their `repr`.
        args: abstract, with their shardings.
        options: what XLA is told beside what it is told for all programs.
    """

    name: str
    fn: Callable[..., Any]
    mesh: Mesh
    in_specs: Any
    out_specs: Any
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    options: Mapping[str, Any] | None = None

    def lower(self) -> jax.stages.Lowered:
        """The program, ready to compile."""
        program = sharded(self.fn, self.mesh, self.in_specs, self.out_specs, self.donate)
        return program.lower(*self.args)

    def __str__(self) -> str:
        """All of it but the name.

        Raises:
            ValueError: something bound tells its address instead of what it holds.
        """
        fn, bound = self.fn, ()
        if isinstance(fn, functools.partial):
            fn, bound = fn.func, (fn.args, sorted(fn.keywords.items()))
        specs = (self.in_specs, self.out_specs, self.donate)
        options = sorted((self.options or {}).items())
        text = repr((fn.__module__, fn.__qualname__, bound, specs, self.args, options))
        if address := re.search(r"<[^<]* at 0x", text):
            raise ValueError(f"{self.name} depends on what has no repr: {address[0]}...")
        return text


class ProgramStore:
    """Compiled programs of one mesh in a folder; with None for a folder, nothing is kept."""

    def __init__(self, folder: Path | None, mesh: Mesh) -> None:
        self._devices = list(mesh.devices.flat)
        self._folder = folder
        self._writes = True
        if folder is None:
            return
        try:
            _prepare(folder)
            self._writes = os.access(folder, os.W_OK)
        except OSError as error:
            log.warning("compiled programs are not kept: %s", error)
            self._folder = None
        self._environment = environment(mesh)

    @classmethod
    def within(cls, cache: str | None, mesh: Mesh) -> ProgramStore:
        """The store inside a compilation cache. It keeps nothing if that is off, or where several
        processes share the mesh: each has but a part of a program."""
        on = jax.config.jax_enable_compilation_cache and jax.process_count() == 1
        return cls(Path(cache) / FOLDER if cache and on else None, mesh)

    def load(self, definition: Definition) -> jax.stages.Compiled | None:
        """The compiled program; None if it is not there, or (which is logged) not usable."""
        if self._folder is None:
            return None
        path = self._path(definition)
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() != content[:32]:
                raise ValueError("the file is damaged")
            program = deserialize_and_load(
                *pickle.loads(content[32:]),
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with a file, the program can be compiled
            log.warning("the kept program %s is of no use: %s", definition.name, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return program

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """While this lasts, XLA's own cache is off if this store takes its place.

        On GPUs it does: what XLA's cache gives is not kept (see `compile`), and would have to be
        lowered at every start. On CPU, where lowering costs little, both are asked.
        """
        enabled = jax.config.jax_enable_compilation_cache
        keeps = self._folder is not None and self._writes
        if not (enabled and keeps and is_gpu(self._devices[0].platform)):
            yield
            return
        try:
            _enable_xla_cache(False)
            yield
        finally:
            _enable_xla_cache(enabled)

    def compile(self, definition: Definition, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compile and keep a program; that it cannot be kept is only logged."""
        _thread.hit = False
        program = lowered.compile(definition.options)
        # What comes from XLA's cache lacks functions when it is written once more (seen on CPU).
        if self._folder is None or not self._writes or _thread.hit:
            return program
        try:
            data = pickle.dumps(serialize(program))
            _write(self._path(definition), hashlib.sha256(data).digest() + data)
        except OSError as error:  # a full disk
            log.warning("compiled programs are not kept from here on: %s", error)
            self._writes = False
        except Exception as error:  # what JAX or XLA cannot write
            log.warning("the compiled program %s is not kept: %s", definition.name, error)
        return program

    def _path(self, definition: Definition) -> Path:
        assert self._folder is not None
        key = f"{self._environment}\n{definition}"
        return self._folder / hashlib.sha256(key.encode()).hexdigest()


def environment(mesh: Mesh) -> str:
    """What every program of a mesh depends on: code, versions, settings, devices."""
    client = mesh.devices.flat[0].client
    flags = os.environ.get("XLA_FLAGS", "")  # may name a file
    installed = [(str(d.name).lower(), d.version) for d in importlib.metadata.distributions()]
    return repr(
        (
            SOURCE,
            sorted(package for package in installed if package[0].startswith(PACKAGES)),
            sorted((k, repr(v)) for k, v in jax.config.values.items() if "cache" not in k),
            sorted((k, v) for k, v in os.environ.items() if VARIABLES.match(k)),
            Path(flags).read_text() if os.path.isfile(flags) else None,
            (client.platform, client.platform_version, len(client.devices())),
            (mesh.axis_names, mesh.devices.shape),
            [(d.id, d.device_kind) for d in mesh.devices.flat],
            _processor() if client.platform == "cpu" else None,
        )
    )


def _digest_of_source() -> str:
    """Of all modules of the packages that programs are written in."""
    digest = hashlib.sha256()
    for package in (model, sharding, serving):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root.parent)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


SOURCE = _digest_of_source()
"""Taken when this is imported: a file may be edited while weights load."""


def _processor() -> str:
    """The instructions that this machine's processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return str(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _prepare(folder: Path) -> None:
    """Make the folder, and delete old programs in it; what else is there is not ours.

    Raises:
        OSError: it cannot be made, is a link, or others could have written to it.
    """
    if folder.is_symlink():
        raise PermissionError(f"{folder} is a link")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_mode & 0o022 or status.st_uid not in (0, os.getuid()):
        raise PermissionError(f"others than you can write to {folder}")
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for file in folder.iterdir():
        if not (NAME.fullmatch(file.name) or file.name.startswith(PART)):
            continue
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()


def _write(path: Path, content: bytes) -> None:
    """All of a file or nothing, however many write it at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=PART, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _enable_xla_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # else it goes by what it once found


def _listen(event: str, **_: Any) -> None:
    """Whether what this thread compiles came from XLA's cache."""
    if event == CACHE_HIT:
        _thread.hit = True


monitoring.register_event_listener(_listen)
