"""The environment: its lists and groups agree, each room needs its own group alone, the Makefile brings it up once."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import readme
import yaml
from blocked import block
from make import dry, make, targets
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparsity_utils import paths
from sparsity_utils.__main__ import command_parser

LOCK_LINE = re.compile(r"[a-zA-Z0-9._-]+==[0-9][0-9a-zA-Z.]*( ; sys_platform == '(linux|darwin)')?")


def by_name(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by canonical name, each name once."""
    requirements = [Requirement(line) for line in lines]
    named = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    assert len(named) == len(requirements)
    return named


def project() -> dict:
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]


def groups() -> dict[str, dict[str, Requirement]]:
    """The dependencies by group: `core` is what `pip install .` takes, the others are its extras."""
    found = {"core": project()["dependencies"], **project()["optional-dependencies"]}
    return {group: by_name(lines) for group, lines in found.items()}


def dependencies() -> dict[str, Requirement]:
    """Of all groups, each in one group alone."""
    return by_name([str(line) for group in groups().values() for line in group.values()])


def lock_lines() -> list[str]:
    return [line for line in paths.LOCK.read_text().splitlines() if not line.startswith("#")]


def conda() -> tuple[list[str], list[str]]:
    """The conda entries and the pip entries of environment.yml."""
    entries = yaml.safe_load((paths.ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, str)], pip


# The three lists


def test_the_lock_file_is_pins_alone():
    """name==version with at most a platform marker: no hash, address or local version, one version for all Pythons."""
    assert [line for line in lock_lines() if not LOCK_LINE.fullmatch(line)] == []
    assert len(by_name(lock_lines())) > 100


@pytest.mark.parametrize(
    "line", ["a>=1", "a==1+cpu", "a==1 --hash=sha256:0", "a @ https://x.y/a.whl", "-i https://x.y"]
)
def test_the_pattern_of_a_pin_refuses(line):
    assert not LOCK_LINE.fullmatch(line)


def test_the_lock_file_pins_every_dependency_within_its_range():
    lock = by_name(lock_lines())
    for name, wanted in dependencies().items():
        (pin,) = lock[name].specifier
        assert pin.version in wanted.specifier, f"{wanted} is pinned to {pin.version}"
        assert str(lock[name].marker) == str(wanted.marker)


def test_the_pins_that_a_gpu_machine_needs_together():
    lock = by_name(lock_lines())
    assert str(lock["torch"]) == "torch==2.13.0"
    assert str(lock["triton"].specifier) == "==3.7.1"
    on = {name: {**default_environment(), "sys_platform": name} for name in ("linux", "darwin")}
    assert lock["triton"].marker.evaluate(on["linux"]) and not lock["triton"].marker.evaluate(on["darwin"])
    assert not [name for name in lock if name.startswith(("nvidia", "cuda"))], "a machine without a GPU would fetch it"


def test_environment_yml_installs_the_lock_file_and_names_the_dependencies():
    packages, pip = conda()
    options = [line for line in pip if line.startswith("-")]
    named = by_name([line for line in pip if not line.startswith("-")])
    assert options == ["-r requirements.lock", "-e ."]
    assert set(named) == set(dependencies())
    lock = by_name(lock_lines())
    assert {name: str(line) for name, line in named.items()} == {name: str(lock[name]) for name in named}
    assert f"python {project()['requires-python']}" in packages


def test_the_python_range_is_the_same_everywhere():
    assert project()["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info < (3, 14)" in (paths.ROOT / "Makefile").read_text()
    assert (3, 11) <= sys.version_info < (3, 14)


def test_this_environment_holds_the_pinned_versions():
    """What runs here is what the lock file names, up to a local version such as +cpu."""
    wanted = {name: pin for name, pin in by_name(lock_lines()).items() if not pin.marker or pin.marker.evaluate()}
    other = {
        name: found
        for name, pin in wanted.items()
        if (found := distribution(name).version.split("+")[0]) not in pin.specifier
    }
    assert other == {}


# The groups

CORE_ROOMS = ("neurons", "text", "models", "sparsity", "decoding", "study")
OURS = {"sparsity_utils", "kernels"}


def imports(files: Iterable[Path]) -> set[str]:
    """The packages that Python files import, the standard library and this project left out."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS


def undeclared(modules: set[str], declared: Iterable[str]) -> set[str]:
    """The modules that no declared package holds."""
    holders = packages_distributions()
    return {name for name in modules if not {canonicalize_name(of) for of in holders.get(name, [])} & set(declared)}


def closure(names: Iterable[str]) -> set[str]:
    """The packages with all that they need, as they are installed here."""
    found, left = set(), list(names)
    while left:
        if (name := canonicalize_name(left.pop())) in found:
            continue
        found.add(name)
        needed = [Requirement(line) for line in distribution(name).requires or []]
        left += [line.name for line in needed if not line.marker or line.marker.evaluate({"extra": ""})]
    return found


def test_core_rooms_and_kernels_import_only_the_core_group():
    package = paths.ROOT / "sparsity_utils"
    files = [*package.glob("*.py"), *(paths.ROOT / "kernels").glob("*.py")]
    files += [file for room in CORE_ROOMS for file in (package / room).rglob("*.py")]
    files.remove(package / "study" / "slurm.py")  # needs the extra `cluster`, and is imported where it is used
    files.remove(package / "study" / "makers" / "digits_images.py")  # imports scikit-learn where images are asked for
    found = imports(files)
    assert {"torch", "numba", "pyarrow"} <= found
    assert undeclared(found, groups()["core"]) == set()


def test_everything_that_is_imported_is_declared():
    rooms = imports((paths.ROOT / "sparsity_utils").rglob("*.py"))
    assert undeclared(rooms, [*groups()["core"], *groups()["notebooks"], *groups()["cluster"]]) == set()
    tests = imports((paths.ROOT / "tests").rglob("*.py"))
    helpers = {file.stem for file in (paths.ROOT / "tests" / "helpers").glob("*.py")}
    assert undeclared(tests - helpers - {"docs"}, dependencies()) == set()  # docs/ lies in the checkout


def test_the_core_group_comes_without_jupyter_and_pytest():
    core = closure(name for name, line in groups()["core"].items() if not line.marker or line.marker.evaluate())
    assert "torch" in core and "kiwisolver" in core
    unwanted = (
        "jupyter",
        "ipython",
        "ipykernel",
        "nb",
        "papermill",
        "notebook",
        "pytest",
        "statsmodels",
        "ruff",
        "mypy",
    )
    assert [name for name in core if name.startswith(unwanted)] == []


@pytest.mark.slow
def test_installed_with_the_core_group_alone_it_measures_and_decodes(tmp_path):
    """The wheel outside the checkout, every package hidden that the core group does not bring."""
    source, installed, folder = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    for name in OURS:
        shutil.copytree(paths.ROOT / name, source / name)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(paths.ROOT / name, source)
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", installed, source])
    core = closure(name for name, line in groups()["core"].items() if not line.marker or line.marker.evaluate())
    holders = packages_distributions().items()
    hidden = {name for name, of in holders if not {canonicalize_name(one) for one in of} & core} - OURS
    assert {"submitit", "statsmodels", "papermill", "IPython", "pytest"} <= hidden
    block(installed, hidden)
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "SPARSITY_BUILD"}
    environment["PYTHONPATH"] = str(installed)
    python = [sys.executable, "-m", "sparsity_utils"]
    model, text = paths.RECORDED_MODELS / "relu", paths.ROOT / "README.md"
    run([*python, "measure", model, "--text", text], cwd=folder, env=environment)
    assert (folder / "build" / "measure" / "relu" / "heatmap.png").exists()
    pages = readme.read(paths.ROOT / "docs" / "decode.md")
    (decode,) = [block.code for block in pages if "sparse_kernels" in block.code]
    code = decode.replace('paths.RECORDED_MODELS / "relu"', repr(str(model)))
    run([sys.executable, "-c", f"{code}\nassert paths.ROOT.name == 'installed'"], cwd=folder, env=environment)
    done = subprocess.run([*python, "notebooks"], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: No module named 'nbformat'; install this project with all its extras.\n"


def run(command: list, **options) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


# The Makefile


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that decide about the environment, in a folder of their own."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(paths.ROOT / name, tmp_path)
    return tmp_path


def stamp(folder: Path, age: float) -> None:
    """An installed .venv, `age` seconds older than the lock file."""
    file = folder / ".venv" / ".installed"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    installed = (folder / "requirements.lock").stat().st_mtime - age
    os.utime(file, (installed, installed))
    os.utime(folder / "pyproject.toml", (installed - 60, installed - 60))


def test_help_explains_every_target():
    printed = make("help").stdout
    told = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    assert sorted(words[1] for words in told) == sorted(targets())
    assert all(len(words) > 3 for words in told)
    readers, others = printed.split("\n\n")
    assert "make reproduce " in readers and "make test " in readers and "make lock " in others
    assert make().stdout == printed


def test_every_target_brings_up_the_environment(copy):
    for target in sorted(targets() - {"help", "clean"}):
        assert "pip install" in dry(target, cwd=copy), target


def test_a_second_call_installs_nothing_until_the_lock_file_changes(copy):
    stamp(copy, age=-1)
    assert "pip" not in dry("env", cwd=copy)
    assert "pip" not in dry("test", cwd=copy)
    stamp(copy, age=+1)
    assert "--requirement requirements.lock" in dry("env", cwd=copy)


def test_an_active_conda_environment_is_used_as_it_is(copy):
    commands = dry("test", cwd=copy, CONDA_DEFAULT_ENV="activation-sparsity", CONDA_PREFIX="/conda/envs/one")
    assert "/conda/envs/one/bin/python -m pytest" in commands
    assert "pip" not in commands and ".venv" not in commands
    assert "pip install" in dry("test", cwd=copy, CONDA_DEFAULT_ENV="base", CONDA_PREFIX="/conda")


def test_without_a_suitable_python_one_sentence_says_what_to_do(copy):
    done = make("env", "PYTHON=python2 no-such-python", cwd=copy)
    assert done.returncode != 0
    assert "No suitable Python among: python2 no-such-python. Install Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (copy / ".venv").exists()


def test_an_unusable_python_is_passed_over(copy):
    """A name on the path that does not run, as some version managers leave, does not stop the next candidate."""
    (copy / "bin").mkdir()
    broken, good = copy / "bin" / "broken", copy / "bin" / "good"
    broken.write_text("#!/bin/sh\nexit 127\n")
    good.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo "venv by good" && exit 1\nexec {sys.executable} "$@"\n')
    for file in (broken, good):
        file.chmod(0o755)
    assert "venv by good" in make("env", f"PYTHON={broken} {good}", cwd=copy).stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["reproduce"], "reproduce"),
        (["reproduce", "PROFILE=smoke"], 'reproduce --profile "smoke"'),
        (["reproduce", "PROFILE=my own.yaml"], 'reproduce --profile "my own.yaml"'),
        (["reproduce", "NOTEBOOKS=02 03"], "reproduce  --notebooks 02 03"),
        (["figures"], "figures"),
        (["figures", "FROM=build/laptop"], 'figures --from "build/laptop"'),
        (["notebooks"], "notebooks"),
        (["test"], "reproduce --profile smoke"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_targets_call_commands_that_exist(arguments, expected):
    (command,) = re.findall(r"-m sparsity_utils (\S.*)$", dry(*arguments, "ENV="), re.MULTILINE)
    assert command.strip() == expected
    command_parser().parse_args(shlex.split(command))


def test_test_runs_all_proofs_and_with_test_slow_every_test():
    checks, (smoke, tests, stored) = (lines := dry("test", "ENV=", "PY=python").splitlines())[:-3], lines[-3:]
    assert checks == dry("check", "ENV=", "PY=python").splitlines()
    assert [check.split()[2] for check in checks] == ["ruff", "ruff", "mypy", "pytest"]
    assert "reproduce --profile smoke" in smoke and "--nbval-lax" in stored
    assert dry("test-slow", "ENV=", "PY=python").strip() == tests.replace('"not slow"', "slow")


@pytest.mark.slow
def test_the_lock_file_is_what_make_lock_writes(copy):
    """From the package index: nothing to add, and what is locked stays."""
    run(["make", "lock", "ENV=", f"PY={sys.executable}"], cwd=copy)
    assert (copy / "requirements.lock").read_text() == paths.LOCK.read_text()


# Who calls the Makefile

TWO_PROOFS = ["make test", "make test-slow"]


def test_ci_calls_both_proofs():
    script = paths.ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-2:] == TWO_PROOFS


def test_the_workflow_calls_both_proofs_on_every_python():
    (job,) = yaml.safe_load((paths.ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == TWO_PROOFS
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}"


def test_pre_commit_fetches_nothing_and_calls_make_check():
    (local,) = yaml.safe_load((paths.ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [(hook["language"], hook["entry"]) for hook in local["hooks"]] == [("system", "make --silent check")]


def test_help_and_a_wrong_argument_answer_without_loading_torch():
    """Loading torch and transformers takes seconds."""
    commands = [["--help"], ["measure", "--help"], ["study", "--profile", "labtop"], ["study", "--wrong"]]
    code = f"""
import contextlib, io, sys
import sparsity_utils
from sparsity_utils.__main__ import main
for command in {commands}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(command)
heavy = {{"torch", "transformers", "pandas", "numba"}} & set(sys.modules)
assert not heavy, heavy
for name in sparsity_utils.__all__:
    assert getattr(sparsity_utils, name) is not None and name in dir(sparsity_utils)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT)
    assert done.returncode == 0, done.stderr
