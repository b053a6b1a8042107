"""Builds the Bento of a release with BentoML, in a process of its own, and makes it the same for the same inputs.

The process sees nothing but the files that go into the release, so that one that is missing stops the build and not
the server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import yaml

from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE, RELEASE_FOLDER, ReleaseManifest
from pipelines.errors import PerchError
from pipelines.release.archive import pack_folder
from pipelines.release.service_code import REQUIREMENTS, SERVICE, ServiceCode

_PYTHON_VERSION = "3.11"  # of the Dockerfile that `bentoml containerize` would use; not that of this process
_BUILD = """
import json, sys
import bentoml
options = json.load(sys.stdin)
bento = bentoml.build(**options)
print(bento.path)
"""


def build_release(manifest: ReleaseManifest, model: Path, code: ServiceCode, file: Path) -> None:
    """Write the release unit of a model.

    Args:
        manifest: what it is.
        model: the ONNX file.
        code: the service.
        file: to write.

    Raises:
        PerchError: BentoML could not build it; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="perch-package-") as folder:
        context, home = Path(folder) / "context", Path(folder) / "bentoml"
        _lay_out(context, manifest, model, code)
        bento = _build(context, home, manifest)
        _settle(bento, manifest)
        pack_folder(bento, file, modified=datetime.fromisoformat(manifest.registered_at))


def _lay_out(context: Path, manifest: ReleaseManifest, model: Path, code: ServiceCode) -> None:
    for name in code.files:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(code.root / name, context / name)
    release = context / RELEASE_FOLDER
    release.mkdir()
    shutil.copyfile(model, release / MODEL_FILE)
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    (release / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _build(context: Path, home: Path, manifest: ReleaseManifest) -> Path:
    name = re.sub(r"[^a-z0-9._-]+", "-", manifest.model.lower()).strip("._-") or "model"
    options = {
        "service": SERVICE,
        "name": name,
        "version": f"v{manifest.version}",
        "description": f"{manifest.model} v{manifest.version}, trained in run {manifest.run_id}.",
        "labels": {
            "model": manifest.model,
            "mlflow_version": manifest.version,
            "run_id": manifest.run_id,
            "git_sha": manifest.git_sha,
            "service_git_sha": manifest.service_git_sha,
            "data_sha256": manifest.data_sha256,
            "onnx_sha256": manifest.onnx_sha256,
        },
        "include": ["**/*"],
        "docker": {"python_version": _PYTHON_VERSION},
        # Locked already, and without the network.
        "python": {"requirements_txt": REQUIREMENTS, "lock_packages": False},
        "build_ctx": str(context),
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PERCH_", "BENTOML_", "PYTHON"))}
    environment = {
        **kept,
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        "PERCH_SERVING_WORKERS": "1",  # the service's configuration is written down, and cores differ
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
    }
    # `-c` puts the working directory first on the path, before any installed copy of the same packages.
    done = subprocess.run(
        [sys.executable, "-c", _BUILD],
        cwd=context,
        env=environment,
        input=json.dumps(options),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = "\n  ".join(done.stderr.strip().splitlines()[-8:])
        raise PerchError(f"BentoML could not build {name}:v{manifest.version}\n  {said}")
    return Path(done.stdout.strip().splitlines()[-1])


def _settle(bento: Path, manifest: ReleaseManifest) -> None:
    """Replace the times of this build by the version's."""
    file = bento / "bento.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["creation_time"] = datetime.fromisoformat(manifest.registered_at)
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
