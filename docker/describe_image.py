"""Lists what is in an image, as CycloneDX; called with ROOT NAME VERSION OUT.json.

ROOT is the image's root folder: its Python packages are read from their own metadata, its Debian packages from dpkg's
list, and the interpreter from its virtual environment, so that what is listed is what is there, not what a lock file
asked for.
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
    """Write the list, and refuse to write one that is no valid CycloneDX or lacks a kind of packages."""
    bom = Bom()
    bom.metadata.component = Component(name=f"perch-{name}", version=version, type=ComponentType.CONTAINER)
    kinds = {
        "Python packages": _python_packages(root),
        "Debian packages": _debian_packages(root),
        "Python": _python(root),
    }
    for kind, found in kinds.items():
        components = list(found)
        if not components:
            sys.exit(f"{root}: no {kind} found; is it the root folder of an image that has a Debian for its base?")
        bom.components.update(components)
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


def _python(root: Path) -> Iterator[Component]:
    """The interpreter: a base may have compiled its own, which no package manager lists."""
    for settings in root.glob("opt/perch/pyvenv.cfg"):
        lines = (line.partition("=") for line in settings.read_text(encoding="utf-8").splitlines())
        version = {name.strip(): value.strip() for name, _, value in lines}["version"]
        purl = PackageURL("generic", name="python", version=version)
        yield Component(name="python", version=version, type=ComponentType.PLATFORM, purl=purl, bom_ref=str(purl))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
