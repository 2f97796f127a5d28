"""What stands beside the package: the Dockerfile, GitHub's files. Nothing is built here; what they say must hold together."""

import re
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", one)]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def lines(name):
    return [line.strip() for line in DOCKERFILE.splitlines() if line.startswith(f"{name} ")]


def yaml(path):
    return YAML(typ="safe", pure=True).load((ROOT / ".github" / path).read_text(encoding="utf-8"))


def test_the_classifiers_are_the_versions_that_may_install_it():
    from packaging.specifiers import SpecifierSet

    required = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}" in required] == PYTHONS


def test_the_changelog_begins_with_this_version():
    import qlora

    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M).group(1)
    assert newest == qlora.__version__
    assert PROJECT["dynamic"] == ["version"]  # it stands in qlora/__init__.py alone


def test_the_workflow_runs_what_ci_runs_on_each_python():
    job = yaml("workflows/ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    setup = next(step for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    assert all((ROOT / name).is_file() for name in setup["with"]["cache-dependency-path"].split())
    assert job["env"]["PYTHON"] == "python"
    assert "${PYTHON:-" in (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "required"), [("bug.yml", True), ("idea.yml", False)])
def test_issue_templates_ask_for_the_doctor(name, required):
    form = yaml(f"ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    asked = next(field for field in form["body"] if "qlora doctor --json" in field["attributes"]["label"])
    assert asked.get("validations", {}).get("required", False) == required


def test_the_dockerfile_names_no_version_of_its_own():
    installs = [part for line in lines("RUN") for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("-c constraints.txt" in install for install in installs)
    assert not re.search(r"[=<>~]=|:latest", DOCKERFILE)
    assert re.search(r"^ARG PYTHON_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[1] in PYTHONS


def test_the_dockerfile_builds_for_either_device_and_starts_our_command():
    stages = [line.split()[-1] for line in lines("FROM") if " AS " in line]
    assert {"torch-cpu", "torch-cuda"} <= set(stages)
    assert lines("FROM")[-1] == "FROM torch-${DEVICE}"
    assert "ARG DEVICE=cuda" in lines("ARG")
    assert DOCKERFILE.index("ARG DEVICE") < DOCKERFILE.index("FROM ")  # else it is empty in a FROM
    assert lines("ENTRYPOINT") == [f'ENTRYPOINT ["{next(iter(PROJECT["scripts"]))}"]']
    assert lines("USER")[-1] not in ("USER root", "USER 0")


def test_a_user_that_the_image_does_not_know_can_run_it():
    """torch asks for a name and a home at the first step: pytorch/pytorch 140765, KeyError: getpwuid(): uid not found."""
    given = dict(pair.split("=") for line in lines("ENV") for pair in line.split()[1:])
    assert given["USER"]
    assert given["HOME"] in " ".join(lines("RUN")).partition("mkdir -m 1777")[2].split()


def test_what_the_image_is_made_of_is_sent_to_docker_and_nothing_else():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    named = {
        PROJECT["readme"],
        *PROJECT["license-files"],
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "recipes",
        "qlora",
    }
    copied = {source for line in lines("COPY") for source in line.split()[1:-1]} - {"."}
    assert sent == named | copied


def test_no_message_names_an_optional_package_without_the_versions_that_were_tested():
    """system/extras.py has them of the extras."""
    extras = PROJECT["optional-dependencies"].values()
    named = {re.match(r"[\w-]+", requirement)[0] for extra in extras for requirement in extra}
    for path in {*(ROOT / "qlora").rglob("*.py")} - {ROOT / "qlora" / "system" / "extras.py"}:
        for packages in re.findall(r"pip install ([^\"{]*)", path.read_text(encoding="utf-8")):
            assert not named & set(re.findall(r"[\w-]+", packages)), path
