"""What this machine can run, and how to get what is missing: `vla-rl doctor`.

What can be tried is tried: a picture is rendered with each back end, the CPU engine makes steps, Warp looks for its
device; each in a process of its own, because a broken GL driver ends the process that loads it.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import json as json_module
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vla_rl.cpu import cpu_limit
from vla_rl.envs.install import SIMULATORS, environments_folder, is_installed
from vla_rl.vulkan import PROBE, driver_environment

Status = Literal["ok", "missing", "warning", "failed"]

_PROBE_TIMEOUT_S = 90
_GL_PACKAGES = "apt-get install libegl1 libgl1 libosmesa6 libgles2"
_LOW_DISK_GB = 5.0
_LOW_MEMORY_GB = 4.0

_SCENE = """
import json, os, time
import mujoco
XML = '''<mujoco><option timestep=".005"/><visual><quality shadowsize="0" offsamples="0"/></visual><worldbody>
<light pos="0 0 2"/><camera name="c" pos="0 -1 .8" euler="50 0 0"/>
<geom type="plane" size="1 1 .1" rgba=".6 .6 .6 1"/>
<body pos="0 0 .3"><freejoint/><geom type="box" size=".1 .1 .1" rgba=".8 .1 .1 1"/></body></worldbody></mujoco>'''
model = mujoco.MjModel.from_xml_string(XML)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
def per_second(work, count, seconds=0.5):
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += count
    return done / (time.perf_counter() - start)
"""

_RENDER_PROBE = (
    _SCENE
    + """
renderer = mujoco.Renderer(model, 64, 64)
def work():
    renderer.update_scene(data, camera="c")
    return renderer.render()
picture = work()
assert picture.shape == (64, 64, 3) and picture.std() > 1, "the picture is empty"
name = ""
try:
    from OpenGL import GL
    name = GL.glGetString(GL.GL_RENDERER).decode()
except Exception:
    pass
print(json.dumps({"rate": per_second(work, 1), "name": name}), flush=True)
os._exit(0)  # tearing a GL context down is what drivers do worst, and nothing here needs it
"""
)

_BATCH_PROBE = (
    _SCENE
    + """
import mujoco.batch
batch = mujoco.batch.Batch(model, nsim=64)
print(json.dumps({"rate": per_second(batch.step, 64), "name": ""}))
"""
)

_WARP_PROBE = (
    _SCENE
    + """
import warp
import mujoco_warp
warp.init()
device = warp.get_preferred_device()
print(json.dumps({"rate": 0.0, "name": str(device) + " " + device.name}))
"""
)


@dataclass(frozen=True)
class Check:
    """One line of the table. `how`: what to do about it, empty where nothing is to be done."""

    group: str
    name: str
    status: Status
    detail: str
    how: str = ""
    required: bool = False


def run_doctor(json: bool = False) -> int:
    """Print what this machine can run, as a table or as one JSON object. Returns 0 when training can run, else 1."""
    checks = examine()
    ready = is_ready(checks)
    if json:
        print(json_module.dumps({"ready": ready, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(format_table(checks))
    return 0 if ready else 1


def examine() -> list[Check]:
    """All checks. Takes some seconds: pictures are rendered and engines make steps."""
    return [*_machine(), *_gpus(), *_engines(), *_rendering(), *_simulators(), *_more()]


def is_ready(checks: Sequence[Check]) -> bool:
    """Training can run: nothing required fails, and at least one back end renders."""
    required = all(check.status in ("ok", "warning") for check in checks if check.required)
    return required and any(check.status == "ok" for check in checks if check.group == "rendering")


def format_table(checks: Sequence[Check]) -> str:
    """The checks by group, and what to do about each that is not ok."""
    width = max(len(check.name) for check in checks)
    mark = {"ok": "ok", "missing": "-", "warning": "!", "failed": "FAILED"}
    lines: list[str] = []
    for group in dict.fromkeys(check.group for check in checks):
        lines.append(f"{group}:")
        for check in checks:
            if check.group == group:
                lines.append(f"  {mark[check.status]:6}  {check.name:{width}}  {check.detail}".rstrip())
                if check.how:
                    lines.append(f"  {'':6}  {'':{width}}  -> {check.how}")
    ready = is_ready(checks)
    lines.append("")
    lines.append("This machine can train and evaluate." if ready else "Something required is missing: see above.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ machine
def _machine() -> list[Check]:
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    cpu = f"{threads} threads" + (f", limited to {limit:g} cores" if limit and limit < threads else "")
    cpu += f", {_cpu_model()}" if _cpu_model() else ""
    memory = _memory_gb()
    disk = shutil.disk_usage(Path.cwd())
    free = disk.free / 1e9
    return [
        Check(
            "machine",
            "Python",
            "ok" if supported else "failed",
            f"{version} ({sys.executable})",
            "" if supported else "use Python 3.11, 3.12 or 3.13",
            required=True,
        ),
        Check("machine", "CPU", "ok", cpu),
        Check(
            "machine",
            "memory",
            "ok" if memory >= _LOW_MEMORY_GB else "warning",
            f"{memory:.1f} GB",
            "" if memory >= _LOW_MEMORY_GB else "lower the number of environments, or train without pictures",
        ),
        Check(
            "machine",
            "disk",
            "ok" if free >= _LOW_DISK_GB else "warning",
            f"{free:.0f} GB free of {disk.total / 1e9:.0f} GB here",
            "" if free >= _LOW_DISK_GB else "free some space: runs with pictures take some GB",
        ),
    ]


def _gpus() -> list[Check]:
    if torch.cuda.is_available():
        checks = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            name = torch.cuda.get_device_name(i)
            checks.append(Check("machine", f"GPU {i}", "ok", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"))
        return checks
    if shutil.which("nvidia-smi") and _run(["nvidia-smi", "-L"])[0] == 0:
        return [
            Check(
                "machine",
                "GPU",
                "warning",
                f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it",
                "install a CUDA build of torch (see https://pytorch.org/get-started/locally/)",
            )
        ]
    return [Check("machine", "GPU", "missing", "none found; everything runs on the CPU")]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _memory_gb() -> float:
    """Physical memory, or less where a container is limited (cgroup v2)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    file = Path("/sys/fs/cgroup/memory.max")
    limit = file.read_text(encoding="utf-8").strip() if file.exists() else "max"
    return total if limit == "max" else min(total, int(limit) / 1e9)


# ----------------------------------------------------------------------------------------- engines, pictures, the rest
def _engines() -> list[Check]:
    return [
        Check("engines", "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads", required=True),
        _package("engines", "mujoco", "mujoco", "pip install 'mujoco>=4.0,<5'", required=True),
        _probed(
            "engines",
            "mujoco.batch",
            _BATCH_PROBE,
            lambda out: f"CPU threads, {out['rate']:,.0f} steps/s of one falling box",
            "pip install 'mujoco>=4.0,<5'",
            required=True,
        ),
        _probed(
            "engines",
            "mujoco_warp",
            _WARP_PROBE,
            lambda out: f"{_version('mujoco-warp')} on {out['name']}" + _slow_on_cpu(out["name"]),
            ".venv/bin/pip install -e '.[gpu]'; it needs an NVIDIA GPU to be of use",
        ),
    ]


def _slow_on_cpu(device: str) -> str:
    return " (correct, but slow without a GPU)" if device.startswith("cpu") else ""


def _rendering() -> list[Check]:
    return [_back_end("egl", "EGL"), _back_end("osmesa", "OSMesa")]


def _back_end(backend: str, library: str) -> Check:
    how = f"as root: {_GL_PACKAGES}"
    if ctypes.util.find_library(library) is None:
        return Check("rendering", f"MUJOCO_GL={backend}", "missing", f"the library {library} is not installed", how)
    return _probed(
        "rendering",
        f"MUJOCO_GL={backend}",
        _RENDER_PROBE,
        lambda out: f"{out['rate']:,.0f} frames/s of 64x64 in one process" + _renderer(out["name"]),
        how,
        environment={"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend},
    )


def _renderer(name: str) -> str:
    return f", {name}" if name else ""


def _simulators() -> list[Check]:
    return [
        Check("simulators", "tabletop", "ok", "built in"),
        _package("simulators", "gymnasium", "gymnasium", "pip install gymnasium"),
        _package("simulators", "OGBench", "ogbench", "pip install ogbench"),
        *(_own_environment(name) for name in SIMULATORS),
        _vulkan(),
    ]


def _own_environment(name: str) -> Check:
    if is_installed(name):
        where = str(environments_folder() / name)
        if name == "libero" and not os.environ.get("VLA_RL_LIBERO_ASSETS"):
            how = "scene assets come from a model hub at first use; or set VLA_RL_LIBERO_ASSETS to their folder"
            return Check("simulators", name, "warning", f"{where}, no VLA_RL_LIBERO_ASSETS", how)
        return Check("simulators", name, "ok", where)
    return Check("simulators", name, "missing", "no environment of its own", f"vla-rl env install {name}")


def _vulkan() -> Check:
    how = "make vulkan in a checkout (Debian), or your system's Mesa 23 or newer; ManiSkill needs it, for states too"
    environment = driver_environment()
    if not environment and ctypes.util.find_library("vulkan") is None:
        return Check("simulators", "Vulkan", "missing", "the library vulkan is not installed", how)
    return _probed(
        "simulators", "Vulkan", PROBE, lambda out: f"{out['name']}, for maniskill", how, environment=environment
    )


def _more() -> list[Check]:
    ros = "install ROS 2 (Humble or newer) and source /opt/ros/<distribution>/setup.bash before starting"
    return [
        _package("more", "JAX (off-policy agents)", "jax", "pip install jax flax optax", required=True),
        _package("more", "Ray (many machines)", "ray", "pip install ray"),
        _package("more", "tokenizers of VLAs", "sentencepiece", "pip install 'vla-rl[vla]'"),
        _package("more", "Hugging Face VLMs", "transformers", "pip install 'vla-rl[vla]'"),
        _package("more", "LoRA", "peft", "pip install 'vla-rl[vla]'"),
        _package("more", "ROS 2 (rclpy)", "rclpy", ros),
        _package("more", "PyAV (videos)", "av", "pip install av", required=True),
    ]


def _package(group: str, name: str, module: str, how: str, *, required: bool = False) -> Check:
    if importlib.util.find_spec(module) is None:
        return Check(group, name, "failed" if required else "missing", "not installed", how, required)
    return Check(group, name, "ok", _version(module), required=required)


def _version(module: str) -> str:
    for name in (module, module.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "installed"


def _probed(
    group: str,
    name: str,
    script: str,
    describe: Callable[[dict[str, Any]], str],
    how: str,
    *,
    environment: dict[str, str] | None = None,
    required: bool = False,
) -> Check:
    """Run `script` in a process of its own; its last line is a JSON object, else its error is the reason."""
    code, output, errors = _run([sys.executable, "-c", script], environment)
    if code == 0 and output.strip():
        return Check(group, name, "ok", describe(json_module.loads(output.strip().splitlines()[-1])), required=required)
    return Check(group, name, "failed", _reason(code, errors), how, required)


def _reason(code: int, errors: str) -> str:
    """The error that ended a probe; tidying up after it may have raised others, which explain nothing."""
    lines = [line.strip() for line in errors.strip().splitlines()]
    raised = [
        line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and " " not in line.split(":")[0]
    ]
    if code == -1 and not lines:
        return f"no answer within {_PROBE_TIMEOUT_S} s"
    return (raised or lines or [f"ended with status {code}"])[-1][:160]


def _run(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit status (-1: it did not end in time), output and errors of a process."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, "", ""
    return done.returncode, done.stdout, done.stderr
