"""The bill of materials of an image, as CycloneDX: every Python and every Debian package with its version and licence.

In: a folder of installed Python packages and the status file of dpkg. Out: a JSON document on stdout. The Dockerfile
runs this file as a script with cyclonedx-python-lib beside it, which neither the image nor owl-deploy itself needs; so
it imports nothing of owl_deploy. It does not know how an image is built.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

__all__ = ["bill_of_materials"]

_PRODUCT = "owl-deploy"


def bill_of_materials(site_packages: Path, dpkg_status: Path) -> str:
    """Return a CycloneDX 1.6 document in JSON.

    Args:
        site_packages: folder with the Python packages, owl-deploy among them.
        dpkg_status: dpkg's file of installed packages, /var/lib/dpkg/status.

    Raises:
        ValueError: owl-deploy is not among the packages.
    """
    components = list(_python_packages(site_packages))
    products = [component for component in components if component.name == _PRODUCT]
    if len(products) != 1:
        raise ValueError(f"{site_packages} holds {_PRODUCT} {len(products)} times: give the folder it is installed in")
    product = products[0]
    bom = Bom(components=[component for component in components if component is not product])
    bom.components.add(_interpreter())
    bom.components.update(_debian_packages(dpkg_status))
    bom.metadata.component = product
    bom.register_dependency(product, bom.components)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)


def _python_packages(site_packages: Path) -> Iterator[Component]:
    """Yield a component per installed distribution."""
    licenses = LicenseFactory()
    for distribution in distributions(path=[str(site_packages)]):
        name, version = distribution.metadata["Name"], distribution.version
        expression = distribution.metadata.json.get("license_expression")
        yield Component(
            type=ComponentType.APPLICATION if name == _PRODUCT else ComponentType.LIBRARY,
            name=name,
            version=version,
            bom_ref=f"pypi/{name}",
            licenses=[licenses.make_from_string(str(expression))] if expression else None,
            purl=PackageURL("pypi", None, name.lower().replace("_", "-"), version),
        )


def _interpreter() -> Component:
    """Return the component of Python, which official Python images hold outside dpkg."""
    version = platform.python_version()
    return Component(
        type=ComponentType.PLATFORM,
        name="python",
        version=version,
        bom_ref="interpreter",
        cpe=f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*",
        purl=PackageURL("generic", None, "python", version),
    )


def _debian_packages(dpkg_status: Path) -> Iterator[Component]:
    """Yield a component per package that dpkg has installed; those removed leave stanzas too."""
    for stanza in dpkg_status.read_text(encoding="utf-8").split("\n\n"):
        package: Message = message_from_string(stanza)
        if not str(package["Status"]).endswith(" installed"):
            continue
        name, version, architecture = package["Package"], package["Version"], package["Architecture"]
        yield Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=version,
            bom_ref=f"deb/{name}/{architecture}",
            purl=PackageURL("deb", "debian", name, version, {"arch": architecture}),
        )


if __name__ == "__main__":
    sys.stdout.write(bill_of_materials(Path(sys.argv[1]), Path(sys.argv[2])) + "\n")
