"""The compiled block quantisers of kernels.cpp: built once per machine, called through ctypes.

Environment, read when a kernel is first wanted:
    MOE_ZOO_KERNELS   auto (default: native where it builds, else torch, same numbers), native
                      (fail where it does not build), torch (never)
    MOE_ZOO_CACHE     folder for built kernels; default: the user's cache folder
    CXX               the compiler; default: the first of c++, g++, clang++
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from layers.names import check_choice
from layers.precision.blocks import Grid

SOURCE = Path(__file__).with_name("kernels.cpp")
# no -ffast-math, no fused multiply-add: the bits must be those of blocks.py
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-shared", "-fPIC")  # fmt: skip
RULES = {"floor": 0, "rceil": 1, "ceil": 2, "even": 3, "max": 4}  # enum Rule of kernels.cpp
DTYPES = (torch.float32, torch.bfloat16)  # what kernels.cpp reads and writes
VALUES_PER_THREAD = 1 << 15  # below this another thread costs more than it brings
_log = logging.getLogger(__name__)
_lock = threading.Lock()


class Job(ctypes.Structure):
    """One call: struct MoeZooJob of kernels.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "ends", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "stride", "segments")),
        *((name, ctypes.c_int32) for name in ("block_rows", "block_cols", "rule")),
        *((name, ctypes.c_int32) for name in ("mantissa_bits", "min_exponent", "max_exponent")),
        ("largest", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("x_bf16", "out_bf16", "fold", "threads")),
    )


def quantize_rows(
    x: Tensor, out: Tensor, scale: Tensor, ends: Tensor, block: tuple[int, int], grid: Grid,
    rule: str, fold: bool,
) -> None:  # fmt: skip
    """Write the decoded values of x into out, and the tensor scales into scale.

    Args:
        x: [R, C] float32 or bfloat16 on the CPU, rows contiguous, any row stride.
        out: [R, C] float32 or bfloat16, contiguous.
        scale: [E] float32, written where the rule has a tensor scale.
        ends: [E] int64, inclusive cumulative row counts; no block crosses one.
        block: rows and columns of one block: (1, b), (b, 1) or (b, b).
        grid: of the elements.
        rule: a key of RULES.
        fold: multiply the values by their tensor scale.

    Raises:
        ValueError: ends that fall or leave the rows.
    """
    rows, cols = x.shape
    job = Job(
        x=x.data_ptr(), out=out.data_ptr(), ends=ends.data_ptr(), scale=scale.data_ptr(),
        rows=rows, cols=cols, stride=x.stride(0), segments=ends.shape[0],
        block_rows=block[0], block_cols=block[1], rule=RULES[rule],
        mantissa_bits=grid.mantissa_bits, min_exponent=grid.min_exponent,
        max_exponent=grid.max_exponent, largest=grid.largest,
        x_bf16=x.dtype == torch.bfloat16, out_bf16=out.dtype == torch.bfloat16, fold=fold,
        threads=min(torch.get_num_threads(), 1 + x.numel() // VALUES_PER_THREAD),
    )  # fmt: skip
    kernel = library()
    if kernel is None:
        raise RuntimeError("native kernels are not available here: see MOE_ZOO_KERNELS")
    if (code := kernel(ctypes.byref(job))) == 1:
        raise ValueError(f"ends must rise from 0 to at most {rows} rows, got {ends.tolist()}")
    assert code == 0, f"kernels.cpp refused block {block} or rule {rule}"


def wanted() -> bool:
    """Whether CPU tensors take the native kernels. Builds them when first asked."""
    mode = os.environ.get("MOE_ZOO_KERNELS", "auto")
    check_choice("MOE_ZOO_KERNELS", mode, ("auto", "native", "torch"))
    if mode == "torch":
        return False
    if library() is None and mode == "native":
        raise RuntimeError("MOE_ZOO_KERNELS=native, but kernels.cpp does not build here")
    return library() is not None


# What torch.compiler.assume_constant_result does, without importing torch._dynamo (1.4 s) for it.
wanted._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def library():
    """The loaded kernel, or None where it cannot be built (said once, in one logged line)."""
    with _lock:
        return _load()


@functools.cache
def _load():
    try:
        kernel = ctypes.CDLL(str(build())).moe_zoo_quantize
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        _log.warning(
            "native kernels not built, torch ops do the same slower: %s", (reason or ["?"])[0]
        )
        return None
    kernel.argtypes, kernel.restype = (ctypes.c_void_p,), ctypes.c_int
    return kernel


def build(cache: Path | None = None) -> Path:
    """Compile kernels.cpp unless this machine already did, and return the shared library.

    Several processes may build at once: each writes a file of its own and renames it.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, no writable folder, a failed build.
    """
    compiler = _compiler()
    target = (cache or _cache_folder()) / f"kernels-{_key(compiler)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, str(SOURCE), "-o", name]
        try:
            _run([*command, "-fopenmp"])
        except subprocess.CalledProcessError:
            _run(command)  # a compiler without OpenMP: one thread
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"no C++ compiler, looked for {', '.join(names)}")
    return found


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _key(compiler: str) -> str:
    """A hash of all that decides the bytes of the library."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    parts = [SOURCE.read_text(), *FLAGS, _run([compiler, "--version"]), platform.machine(), *cpu]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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
