"""The wheel, and what stands beside the package: the Dockerfile, GitHub's files. What they say must hold together."""

import re
import shutil
import subprocess
import sys
import zipfile
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


def test_every_library_that_is_needed_has_a_lowest_and_a_highest_version():
    from packaging.requirements import Requirement

    extras = [one for name, listed in PROJECT["optional-dependencies"].items() if name != "dev" for one in listed]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert {one.operator for one in requirement.specifier} == {">=", "<"}, requirement


def test_the_tested_versions_are_in_the_ranges():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {}
    for one in map(Requirement, (line for line in lines if line and not line.startswith("#"))):
        tested.setdefault(one.name, []).append(str(one.specifier).removeprefix("=="))
    extras = [one for listed in PROJECT["optional-dependencies"].values() for one in listed]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert tested[requirement.name], requirement
        assert all(version in requirement.specifier for version in tested[requirement.name]), requirement


def test_the_wheel_has_every_file_of_the_package_and_the_recipes_and_no_more(tmp_path):
    """Built without the net, as pip does it, in a folder with spaces and letters that are not ASCII."""
    source, out = tmp_path / "Mein Ördner" / "source", tmp_path / "out put"
    out.mkdir()
    for name in ("qlora", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))

    def files(folder):
        return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}

    here = {f"qlora/{name}" for name in files("qlora") if "__pycache__" not in name}
    assert packed == here | {f"qlora/shipped/{name}" for name in files("recipes")}
    assert packed > {"qlora/evaluation/general_text.jsonl", "qlora/pages/style.css", "qlora/shipped/quickstart.yaml"}
    assert f"qlora = {PROJECT['scripts']['qlora']}" in entry


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
