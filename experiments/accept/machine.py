"""The stages `versions` and `devices`: what this machine has."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from experiments.accept.outcome import Failed, NotHere
from ops.ascendc import build as ascendc
from parallel import host_memory
from parallel.launch.job import device_count

# The one table of versions: (what it is, the versions that the project is written for, those that it was run with). A version is in a list
# if it begins with an entry of it. The driver and the firmware only have to fit CANN, whose release notes say which do.
VERSIONS = (
    ("Python", ("3.10", "3.11"), ("3.11",)),
    ("MindSpore", ("2.10",), ("2.10.0",)),
    ("numpy", ("1.26",), ("1.26",)),
    ("CANN", ascendc.WRITTEN_FOR, ()),
    ("driver", (), ()),
    ("firmware", (), ()),
)
LIBRARIES = ("einops", "ml_collections", "tokenizers", "tensorstore", "ml_dtypes", "safetensors", "pydantic", "jinja2", "pyarrow")
VERSION_FILES = {  # in the folder of the driver, which CANN's installer writes to /etc/ascend_install.info
    "driver": ("driver/version.info",),
    "firmware": ("firmware/version.info",),
}
ASCEND = "/usr/local/Ascend"
PRODUCT = 512  # rows and columns of the product on each rank


def versions_checks(job):
    return {
        **{name: partial(_version, name, written, tested) for name, written, tested in VERSIONS},
        "libraries": _libraries,
        "C++ compiler": _compiler,
    }


def _version(name, written, tested):
    found = version_of(name)
    if not found:
        raise NotHere(f"{name} was not found: {_why_missing(name)}")
    facts = {"found": found}
    facts |= {"written for": ", ".join(written)} if written else {}
    facts["tested with"] = ", ".join(tested) or "none: nobody has run this project with it"
    if written and not _among(found, written):
        raise Failed(f"{name} {found} is not what this project is written for; use {' or '.join(written)}", facts)
    return facts


def _among(found, listed):
    return any(found == one or found.startswith(f"{one}.") for one in listed)


def version_of(name):
    """Returns the version of a part of the machine's software as text; "" if it is not there or does not say it."""
    if name == "Python":
        return platform.python_version()
    if name == "CANN":
        return ascendc.version()
    if name not in VERSION_FILES:
        return importlib.metadata.version(name.lower())
    for place in VERSION_FILES[name]:
        path = Path(_install_folder(), place)
        if path.is_file() and (found := re.search(r"(?im)^\s*(?:package_)?version\s*=\s*\[?([\w.+-]+)", path.read_text(errors="replace"))):
            return found[1]
    return ""


def _install_folder():
    """Returns the folder that the driver's installer has noted, by default /usr/local/Ascend."""
    note = Path("/etc/ascend_install.info")
    found = re.search(r"(?m)^Driver_Install_Path_Param=(.+)$", note.read_text(errors="replace")) if note.is_file() else None
    return found[1].strip() if found else ASCEND


def _why_missing(name):
    if name == "CANN":
        return f"none of its version files is in {ascendc.home()}; source its set_env.sh, which sets ASCEND_HOME_PATH"
    return f"{VERSION_FILES[name][0]} is not in {_install_folder()}, where the {name} of an NPU would say it"


def _libraries():
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _compiler():
    from ops import build

    if build.compiler() is None:
        raise NotHere("there is no g++, so the C++ kernels for CPU and the emulator cannot be built")
    line = subprocess.run([build.compiler(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {"version": line}


def devices_checks(job):
    return {
        "device": partial(_device, job),
        "product": _product,
        "links between NPUs": partial(_links, job),
        "place of each rank": partial(_places, job),
    }


def _device(job):
    import mindspore as ms

    target = ms.get_context("device_target")
    facts = {"device": device_name(), "devices": device_count() or 1, "cores": os.cpu_count()}
    facts["system"] = f"{platform.system()} {platform.machine()}"
    if target == "CPU":
        return {**facts, "memory_gib": round((host_memory.machine_bytes() or 0) / 2**30, 1)}
    facts["host_memory_gib"] = round((host_memory.machine_bytes() or 0) / 2**30, 1)
    if ms.hal.device_count(target):
        facts["device"] = f"{target} {ms.hal.get_device_name(0)}"
        facts["memory_gib"] = round(ms.hal.get_device_properties(0).total_memory / 2**30, 1)
    if facts["devices"] > job.world:
        facts["unused"] = f"{facts['devices'] - job.world} of them; start the kit with experiments.launch --nproc={facts['devices']}"
    return facts


def device_name():
    """Returns what computes here, without MindSpore, which alone knows the kind of an NPU."""
    return "Ascend" if device_count() else _cpu_name()


def _cpu_name():
    try:
        found = re.search(r"(?m)^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        found = None
    return f"CPU {found[1] if found else platform.machine()}"


def _product():
    """A product whose numbers are known exactly: of small integers."""
    import mindspore as ms
    import numpy as np

    from ops import matmul

    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, (PRODUCT, PRODUCT)).astype(np.float32) for _ in range(2))
    wrong = int((matmul.reference()(ms.Tensor(a), ms.Tensor(b)).asnumpy() != a @ b).sum())
    facts = {"elements": PRODUCT * PRODUCT, "wrong": wrong}
    if wrong:
        raise Failed(f"{wrong} of {PRODUCT * PRODUCT} elements of a product of small integers are wrong", facts)
    return facts


def _links(job):
    import mindspore as ms

    if ms.get_context("device_target") == "CPU":
        raise NotHere("this job runs on CPU; HCCL connects NPUs")
    if job.world == 1:
        raise NotHere("the job has one rank; start the kit with experiments.launch --nproc=N")
    facts, tool = {}, shutil.which("hccn_tool")
    if shutil.which("npu-smi"):
        said = subprocess.run(["npu-smi", "info", "-t", "topo"], capture_output=True, text=True, timeout=60).stdout
        facts["topology"] = " / ".join(line.strip() for line in said.splitlines() if line.strip())[:1500]
    if tool is None:
        raise NotHere("PATH has no hccn_tool, which the driver's package brings; the stage `collectives` tries the links themselves")
    device = os.environ.get("DEVICE_ID", "0")
    said = subprocess.run([tool, "-i", device, "-link", "-g"], capture_output=True, text=True, timeout=60).stdout
    facts["link"] = said.strip()[:200]
    if "down" in said.lower():
        raise Failed(f"the network link of device {device} is down: {said.strip()[:200]}", facts)
    return facts


def _places(job):
    """Each rank has a device of its own."""
    if job.world == 1:
        raise NotHere("the job has one rank; start the kit with experiments.launch --nproc=N")
    from parallel import collectives
    from parallel.mesh import Mesh

    mesh = Mesh(dp=job.world, rank=job.rank)
    mine = [0.0] * job.world
    mine[job.rank] = float(job.rank) + 1
    found = [round(float(x)) for x in collectives.host_sum(mesh, ("dp",), mine)]
    if found != list(range(1, job.world + 1)):
        raise Failed(f"ranks told each other {found} instead of their numbers from 1 to {job.world}", {"ranks": job.world})
    return {"ranks": job.world, "device of rank 0": os.environ.get("DEVICE_ID", "0")}
