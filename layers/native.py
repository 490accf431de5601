"""C++ files that lie beside the modules: compiled once per user and machine, called by ctypes.

Environment, read when a kernel is wanted:
    MOE_ZOO_KERNELS   auto (default: native where it builds, else torch, which computes the same),
                      native (fail where it does not build), torch (never)
    MOE_ZOO_CACHE     folder for built kernels; default: the user's cache folder
    CXX               the compiler; default: the first of c++, g++, clang++
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from layers.names import check_choice

# no -ffast-math: what is not a number, and the order of sums, stay as the source says
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared",
         "-fPIC")  # fmt: skip
_INCLUDED = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_log = logging.getLogger(__name__)
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Source:
    """One C++ file of plain C functions, without torch headers, and the flags that it adds.

    It may include headers that lie beside it.
    """

    path: Path
    flags: tuple[str, ...] = ()

    def wanted(self) -> bool:
        """Whether CPU tensors take these kernels. Builds them when first asked."""
        mode = os.environ.get("MOE_ZOO_KERNELS", "auto")
        check_choice("MOE_ZOO_KERNELS", mode, ("auto", "native", "torch"))
        if mode == "torch":
            return False
        built = self.library() is not None
        if not built and mode == "native":
            raise RuntimeError(f"MOE_ZOO_KERNELS=native, but {self.path.name} does not build here")
        return built

    def library(self) -> ctypes.CDLL | None:
        """The loaded library, or None where it cannot be built (said once, in one logged line)."""
        with _lock:
            return _load(self)

    def call(self, function: str, job: ctypes.Structure) -> int:
        """Run one function on one job and return its code. The job holds raw addresses."""
        library = self.library()
        if library is None:
            raise RuntimeError(f"{self.path.name} is not built here: see MOE_ZOO_KERNELS")
        return getattr(library, function)(ctypes.byref(job))

    def build(self, cache: Path | None = None) -> Path:
        """Compile unless this machine already did, and return the shared library.

        Several processes may build at once: each writes a file of its own and renames it.

        Raises:
            OSError, subprocess.SubprocessError: no compiler, no writable folder, a failed build.
        """
        compiler = _compiler()
        command = [compiler, *FLAGS, *self.flags, str(self.path), "-o"]
        target = (cache or _cache_folder()) / f"{self.path.stem}-{self._key(compiler)}.so"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            try:
                _run([*command, name, "-fopenmp"])
            except subprocess.CalledProcessError:
                _run([*command, name])  # a compiler without OpenMP: one thread
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)
        return target

    def files(self) -> list[Path]:
        """The file and, in the order first met, every header that it includes from its folder."""
        found = [self.path]
        for path in found:  # which grows meanwhile
            names = _INCLUDED.findall(path.read_text())
            found += [p for n in names if (p := path.with_name(n)).exists() and p not in found]
        return found

    def _key(self, compiler: str) -> str:
        """A hash of all that decides the bytes of the library."""
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
        names = ("model name", "flags", "Features")
        cpu = sorted({line for line in lines if line.startswith(names)})
        version = _run([compiler, "--version"])
        texts = [path.read_text() for path in self.files()]
        parts = [*texts, *FLAGS, *self.flags, version, platform.machine(), *cpu]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _load(source: Source) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(source.build()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        _log.warning(
            "%s not built, torch ops do the same slower: %s",
            source.path.name, (reason or ["?"])[0],
        )  # fmt: skip
        return None


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"no C++ compiler, looked for {', '.join(names)}")
    return found


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _cache_folder() -> Path:
    """A folder that only this user can write: what lies in it is loaded as code."""
    if given := os.environ.get("MOE_ZOO_CACHE"):
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_zoo"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    private = Path(tempfile.gettempdir()) / f"moe_zoo-{os.getuid()}"
    private.mkdir(exist_ok=True, mode=0o700)
    owner = private.lstat()
    if owner.st_uid != os.getuid() or stat.S_IMODE(owner.st_mode) & 0o022:
        raise PermissionError(f"{private} is writable by others: set MOE_ZOO_CACHE")
    return private
