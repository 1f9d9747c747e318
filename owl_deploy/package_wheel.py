"""A wheel of owl-deploy made from its installed files: the same in a wheel's installation and in an editable one.

In: what is installed here. Out: a wheel file with its operator library, so that who installs it needs no compiler. It
does not know what the wheel is for.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from owl_deploy.errors import OwlDeployError
from owl_deploy.kernels import library_path

__all__ = ["library_glibc", "write_wheel"]

_METADATA = ("METADATA", "WHEEL", "entry_points.txt")
_KERNEL_SOURCES = {".cc", ".h", ".so"}
"""Under kernels/, as in the project's own wheels; the library comes from where it is really installed."""
_MIDNIGHT = (1980, 1, 1, 0, 0, 0)
"""The first time that a zip file knows: the same files give the same wheel."""


def write_wheel(folder: Path) -> Path:
    """Write a wheel of the running owl-deploy into a folder and return its path.

    Raises:
        OwlDeployError: the installation does not know its project's dependencies, or lacks what a wheel needs.
        EngineUnavailableError: the operator library was not built.
    """
    try:
        installed = distribution("owl-deploy")
    except PackageNotFoundError as error:
        raise OwlDeployError("owl-deploy runs without being installed: pip install it first") from error
    _check_dependencies(installed)
    metadata = {name: installed.read_text(name) for name in _METADATA}
    missing = [name for name, text in metadata.items() if text is None]
    if missing:
        raise OwlDeployError(f"this installation of owl-deploy has no {missing[0]}: install it again with pip")
    tag = re.search(r"^Tag: (\S+)$", metadata["WHEEL"] or "", re.MULTILINE)
    if tag is None:
        raise OwlDeployError("this installation of owl-deploy does not say what it was built for: install it again")
    stem = f"owl_deploy-{installed.version}"
    path = folder / f"{stem}-{tag[1]}.whl"
    records: list[tuple[str, str, int | str]] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:

        def add(name: str, content: bytes, *, is_recorded: bool = True) -> None:
            entry = zipfile.ZipInfo(name, _MIDNIGHT)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, content)
            if is_recorded:
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                records.append((name, f"sha256={digest}", len(content)))

        for name, file in sorted(_package_files()):
            add(name, file.read_bytes())
        for name, text in metadata.items():
            add(f"{stem}.dist-info/{name}", (text or "").encode())
        license_text = installed.read_text("licenses/LICENSE")
        if license_text is not None:
            add(f"{stem}.dist-info/licenses/LICENSE", license_text.encode())
        record = io.StringIO()
        csv.writer(record, lineterminator="\n").writerows([*records, (f"{stem}.dist-info/RECORD", "", "")])
        add(f"{stem}.dist-info/RECORD", record.getvalue().encode(), is_recorded=False)
    return path


def library_glibc() -> tuple[int, ...]:
    """Return the version of the C library that the operator library needs at least, such as (2, 34)."""
    found = re.findall(rb"GLIBC_(\d+(?:\.\d+)+)", library_path().read_bytes())
    return max((tuple(map(int, version.split(b"."))) for version in found), default=(0,))


def _check_dependencies(installed: Distribution) -> None:
    """Refuse an editable installation that was made when its project had other dependencies."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return
    project = Path(unquote(urlparse(origin["url"]).path)) / "pyproject.toml"
    if not project.is_file():
        return
    text = project.read_text(encoding="utf-8")
    known = {"".join(requirement.split()) for requirement in installed.requires or ()}
    wanted = {*_listed(text, "dependencies"), *(f'{name};extra=="serve"' for name in _listed(text, "serve"))}
    lacking = sorted(wanted - known)
    if lacking:
        raise OwlDeployError(
            f"owl-deploy was installed from {project.parent} before that asked for {lacking[0].partition(';')[0]}: run "
            f"pip install --no-deps --editable {project.parent} first, so that the image gets what it needs"
        )


def _listed(project: str, key: str) -> list[str]:
    """Return the strings of a list in pyproject.toml, read without tomllib, which Python 3.10 lacks."""
    found = re.search(rf'^{key} = \[((?:[^\]"]|"[^"]*")*)\]', project, re.MULTILINE)
    return [] if found is None else re.findall(r'"([^"]+)"', found[1])


def _package_files() -> Iterator[tuple[str, Path]]:
    """Yield every file of the package with its name in a wheel; symlinks count as what they lead to."""
    root = Path(__file__).resolve().parent
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        place = Path(folder)
        in_kernels = place == root / "kernels"
        for name in files:
            file = place / name
            is_source = in_kernels and (file.suffix in _KERNEL_SOURCES or name in ("CMakeLists.txt", ".clang-format"))
            if not is_source and file.suffix != ".pyc":
                yield f"owl_deploy/{file.relative_to(root).as_posix()}", file
    library = library_path()
    yield f"owl_deploy/kernels/{library.name}", library
