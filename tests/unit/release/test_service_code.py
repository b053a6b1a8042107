"""Which code goes into a release, in which versions of others' code, and of which commit it is."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.errors import PerchError
from pipelines.release.service_code import REQUIREMENTS, find_service_code

PROJECT = Path(__file__).parents[3]
NEVER = {
    *(
        "torch",
        "apache-airflow",
        "apache-airflow-core",
        "mlflow",
        "mlflow-skinny",
        "pandas",
        "pytorch-lightning",
        "dvc",
    ),
    *("great-expectations", "scikit-learn", "transformers", "matplotlib", "sqlalchemy", "onnx", "evidently"),
}


def pins(file: Path) -> dict[str, set[str]]:
    """Package to its versions; one with markers may have several."""
    found: dict[str, set[str]] = {}
    for line in file.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line):
            found.setdefault(match[1].lower(), set()).add(match[2])
    return found


def test_find_service_code__of_this_project__is_what_the_service_imports_and_no_more() -> None:
    code = find_service_code()
    assert code.root == PROJECT
    modules = {file for file in code.files if file != REQUIREMENTS}
    assert {"serving/__init__.py", "serving/service.py", "serving/settings.py", "pipelines/__init__.py"} <= modules
    assert {"pipelines/core/contract.py", "pipelines/core/image_decoding.py", "pipelines/errors.py"} <= modules
    # What fetches, verifies and unpacks a release cannot be inside it.
    outside = {
        "serving/__main__.py",
        "serving/fetching.py",
        "serving/unpacking.py",
        "pipelines/core/release_signing.py",
    }
    assert not outside & modules
    assert {file for file in modules if not file.startswith(("serving/", "pipelines/core/"))} == {
        "pipelines/__init__.py",
        "pipelines/environment.py",
        "pipelines/errors.py",
        "pipelines/object_storage/__init__.py",
        "pipelines/object_storage/client.py",
        "pipelines/object_storage/settings.py",
    }


def test_requirements__of_a_release__hold_no_training_and_every_version_that_was_tested() -> None:
    packed, tested = pins(PROJECT / REQUIREMENTS), pins(PROJECT / "requirements.lock")
    assert {"bentoml", "onnxruntime", "pillow", "uvloop"} <= packed.keys()
    assert not NEVER & packed.keys()
    assert {name: versions for name, versions in packed.items() if not versions <= tested.get(name, set())} == {}


def test_requirements__of_a_release__cover_the_extra_that_the_project_declares() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["serving"]]
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0].lower() for line in asked}  # type: ignore[index]
    assert names <= pins(PROJECT / REQUIREMENTS).keys(), "run `make lock`"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small project under Git, with one commit that touches the service and a later one that does not."""
    root = tmp_path / "project"
    for name, text in {
        "pipelines/__init__.py": "",
        "pipelines/core/__init__.py": "",
        "pipelines/core/contract.py": "",
        "pipelines/core/unused.py": "",
        "serving/__init__.py": "",
        "serving/service.py": "def load():\n    from pipelines.core import contract\n",
        "serving/__main__.py": "",
        REQUIREMENTS: "numpy==2.4.6\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", root, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(root: Path) -> str:
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "change", "--allow-empty")
    return git(root, "rev-parse", "HEAD")


def test_find_service_code__import_inside_a_function__is_followed(repository: Path) -> None:
    code = find_service_code(repository)
    assert code.files == (
        *("pipelines/__init__.py", "pipelines/core/__init__.py", "pipelines/core/contract.py"),
        *("serving/__init__.py", REQUIREMENTS, "serving/service.py"),
    )


@pytest.mark.parametrize("name", ["pipelines.core.unused", "pipelines.core.unused:Thing"])
def test_find_service_code__module_named_in_a_string__is_followed(repository: Path, name: str) -> None:
    """As a server is told which class speaks its protocol."""
    (repository / "serving/service.py").write_text(f"protocol = {name!r}\n")
    assert "pipelines/core/unused.py" in find_service_code(repository).files


def test_find_service_code__commit_that_leaves_the_service_alone__does_not_count(repository: Path) -> None:
    before = find_service_code(repository).git_sha
    (repository / "pipelines/core/unused.py").write_text("edited = True\n")
    assert commit(repository) != before
    assert find_service_code(repository).git_sha == before


def test_find_service_code__service_edited__says_so_until_it_is_committed(repository: Path) -> None:
    before = find_service_code(repository).git_sha
    (repository / "pipelines/core/contract.py").write_text("edited = True\n")
    assert find_service_code(repository).git_sha == f"{before}+changes"
    after = commit(repository)
    assert find_service_code(repository).git_sha == after != before


def test_find_service_code__without_git__takes_the_commit_of_the_environment(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(repository / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    assert find_service_code(repository).git_sha == "unknown"
    monkeypatch.setenv("PERCH_GIT_SHA", "3e9d1c2")
    assert find_service_code(repository).git_sha == "3e9d1c2"


def test_find_service_code__no_service_there__is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PerchError, match=r"holds no module serving\.service"):
        find_service_code(tmp_path)
