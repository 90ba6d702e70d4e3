"""Which Vulkan driver ManiSkill gets, and whether one will do.

SAPIEN needs a Vulkan device with descriptor indexing, for states too. Mesa's software driver has it from version 23 on;
Debian 12's is 22.3. `make vulkan` puts a newer one into `runs/vulkan` of a checkout, and nothing of the system changes.
"""

from __future__ import annotations

import os
from pathlib import Path

FETCHED = Path(__file__).resolve().parents[1] / "runs" / "vulkan"


def driver_environment(folder: Path = FETCHED) -> dict[str, str]:
    """Variables with which a process finds the driver in `folder`; none where there is no such driver, or where the
    user has chosen one (VK_DRIVER_FILES or VK_ICD_FILENAMES)."""
    descriptions = sorted((folder / "usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not descriptions or os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES"):
        return {}
    libraries = [str(path) for path in sorted((folder / "usr/lib").glob("*-linux-gnu"))]
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        "VK_ICD_FILENAMES": str(descriptions[0]),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *([before] if before else [])]),
    }


# Asks the loader itself, through its C interface: there is no Python binding among our packages. The two structures are
# VkPhysicalDeviceProperties (824 bytes: versions, then the name from byte 20 on) and, chained to
# VkPhysicalDeviceFeatures2 (16 bytes and 55 flags), VkPhysicalDeviceVulkan12Features, whose tenth flag is
# descriptorIndexing (Vulkan 1.2 specification, "Features").
PROBE = r"""
import ctypes, json, os
vk = ctypes.CDLL("libvulkan.so.1")
def check(code, what):
    if code:
        raise RuntimeError(f"{what}: error {code}")
class Application(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("next", ctypes.c_void_p), ("name", ctypes.c_char_p),
                ("version", ctypes.c_uint32), ("engine", ctypes.c_char_p),
                ("engine_version", ctypes.c_uint32), ("api", ctypes.c_uint32)]
class Create(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("next", ctypes.c_void_p), ("flags", ctypes.c_uint32),
                ("application", ctypes.c_void_p), ("layers", ctypes.c_uint32), ("layer_names", ctypes.c_void_p),
                ("extensions", ctypes.c_uint32), ("extension_names", ctypes.c_void_p)]
application = Application(0, None, b"probe", 1, b"probe", 1, (1 << 22) | (2 << 12))
create = Create(1, None, 0, ctypes.addressof(application), 0, None, 0, None)
instance = ctypes.c_void_p()
check(vk.vkCreateInstance(ctypes.byref(create), None, ctypes.byref(instance)), "no Vulkan 1.2 instance")
count = ctypes.c_uint32()
check(vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None), "no device list")
devices = (ctypes.c_void_p * count.value)()
if count.value:
    check(vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices), "no device list")
class Features12(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("next", ctypes.c_void_p), ("flags", ctypes.c_uint32 * 47)]
class Features2(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("next", ctypes.c_void_p), ("flags", ctypes.c_uint32 * 55)]
found = []
for device in devices:
    properties = ctypes.create_string_buffer(2048)
    vk.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), properties)
    name = properties.raw[20:276].split(b"\0")[0].decode(errors="replace")
    features = Features12(51, None)
    chain = Features2(1000059000, ctypes.addressof(features))
    vk.vkGetPhysicalDeviceFeatures2(ctypes.c_void_p(device), ctypes.byref(chain))
    found.append((bool(features.flags[9]), name))
good = [name for fine, name in found if fine]
if not good:
    raise RuntimeError(f"no device has descriptor indexing; there are {[name for _, name in found]}")
print(json.dumps({"name": good[0]}), flush=True)
os._exit(0)
"""
