"""The bill of materials: what dpkg and Python say is installed, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from owl_deploy.package_bill import bill_of_materials

STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u10
Description: C library
 that goes on
 .
 for some lines

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1
"""


def installed(site: Path, name: str, version: str, *lines: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines])
    (folder / "METADATA").write_text(f"{text}\n\n")


@pytest.fixture
def status(tmp_path: Path) -> Path:
    path = tmp_path / "status"
    path.write_text(STATUS)
    return path


def test_bill_is_valid_and_names_packages_of_both_kinds(tmp_path: Path, status: Path) -> None:
    installed(tmp_path / "site", "owl-deploy", "0.1.0", "License-Expression: Apache-2.0")
    installed(tmp_path / "site", "Typing_Extensions", "4.0", "License-Expression: PSF-2.0")
    text = bill_of_materials(tmp_path / "site", status)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["purl"] == "pkg:pypi/owl-deploy@0.1.0"
    components = {component["purl"]: component for component in bill["components"]}
    assert "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64" in components
    assert components["pkg:pypi/typing-extensions@4.0"]["licenses"] == [{"license": {"id": "PSF-2.0"}}]
    assert sorted(purl.partition("@")[0] for purl in components) == [
        "pkg:deb/debian/libc6",
        "pkg:generic/python",
        "pkg:pypi/typing-extensions",
    ]


def test_product_depends_on_everything_else(tmp_path: Path, status: Path) -> None:
    installed(tmp_path / "site", "owl-deploy", "0.1.0")
    bill = json.loads(bill_of_materials(tmp_path / "site", status))
    (product,) = [entry for entry in bill["dependencies"] if entry["ref"] == "pypi/owl-deploy"]
    assert set(product["dependsOn"]) == {component["bom-ref"] for component in bill["components"]}


def test_folder_without_owl_deploy_is_refused(tmp_path: Path, status: Path) -> None:
    with pytest.raises(ValueError, match="holds owl-deploy 0 times"):
        bill_of_materials(tmp_path, status)
