"""The operators of owl-deploy as a library for ONNX Runtime: where it is. Loads nothing.

`owl_deploy.SparseMatMul` takes the matrices that FORMAT.md in this folder lays out; `GroupQueryAttention` and
`GatedLinearUnit` are what an artifact needs around it. The files named `*_operator.cc` say what each takes.
"""

import importlib.resources
import platform
import struct
from pathlib import Path

from owl_deploy.errors import EngineUnavailableError

__all__ = ["library_path"]

_LIBRARY = "libowl_deploy_kernels.so"

# e_machine of an ELF header, by what platform.machine() calls the same thing.
_MACHINES = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183}


def library_path() -> Path:
    """Return the path of the operator library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        EngineUnavailableError: It was not built, or was built for another machine.
    """
    path = Path(str(importlib.resources.files(__name__) / _LIBRARY))
    if not path.is_file():
        raise EngineUnavailableError(
            f"the operator library {path} is missing: this installation was made with wheel.cmake=false or its "
            "library was not built; install g++ and then owl-deploy again, without that setting"
        )
    machine = platform.machine()
    found = _elf_machine(path)
    if found != _MACHINES.get(machine.lower(), found):
        names = [name for name, number in _MACHINES.items() if number == found]
        built_for = names[0] if names else f"ELF machine {found}"
        raise EngineUnavailableError(
            f"the operator library {path} was built for {built_for} and this machine is {machine}: "
            "install owl-deploy again, built here"
        )
    return path


def _elf_machine(path: Path) -> int:
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise EngineUnavailableError(
            f"the operator library {path} is damaged: it begins with {header[:4]!r} and not as an ELF file does; "
            "install owl-deploy again"
        )
    is_big_endian = header[5] == 2
    (machine,) = struct.unpack_from(">H" if is_big_endian else "<H", header, 18)
    return int(machine)
