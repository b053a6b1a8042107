"""Lists what is in an image, as CycloneDX; called with ROOT NAME VERSION OUT.json.

ROOT is the image's root folder: its Python packages are read from their own metadata, its Debian packages from dpkg's
list, so that what is listed is what is there, not what a lock file asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL


def main(root: Path, name: str, version: str, out: Path) -> None:
    """Write the list, and refuse to write one that is no valid CycloneDX or has nothing in it."""
    bom = Bom()
    bom.metadata.component = Component(name=f"perch-{name}", version=version, type=ComponentType.CONTAINER)
    components = [*_python_packages(root), *_debian_packages(root)]
    if not components:
        sys.exit(f"{root}: no packages found; is it the root folder of an image?")
    for component in components:
        bom.components.add(component)
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        sys.exit(f"{out}: {problem}")
    out.write_text(text + "\n", encoding="utf-8")


def _python_packages(root: Path) -> Iterator[Component]:
    for folder in sorted(root.glob("opt/perch/lib/python3*/site-packages")):
        for found in distributions(path=[str(folder)]):
            name, version = found.metadata["Name"], found.version
            purl = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
            yield Component(name=name, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl))


def _debian_packages(root: Path) -> Iterator[Component]:
    status = root / "var/lib/dpkg/status"
    for paragraph in status.read_text(encoding="utf-8").split("\n\n") if status.is_file() else ():
        fields = Parser().parsestr(paragraph.strip())
        if fields["Package"] and fields["Status"] == "install ok installed":
            purl = PackageURL("deb", "debian", fields["Package"], fields["Version"], {"arch": fields["Architecture"]})
            yield Component(
                name=fields["Package"],
                version=fields["Version"],
                type=ComponentType.LIBRARY,
                purl=purl,
                bom_ref=str(purl),
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
