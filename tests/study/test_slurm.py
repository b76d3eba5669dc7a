"""A study on a real Slurm of two nodes: preempted, over its time limit, killed, interrupted; the bits are the same."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import slurm_cluster
from small import one_size, profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study import slurm
from sparsity_utils.study.study import Study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not()),
]
STEP = 0.5  # seconds that a step lasts on a node while a file is there: every run is then over one minute
SLOW = """
import os
if "SLURM_JOB_ID" in os.environ:
    import time, torch
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda *args, **options: (
        time.sleep({step} * os.path.exists({file!r})), step(*args, **options)
    )[1]
"""
WAITS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # of a shell's background job it is ignored
from sparsity_utils.study import slurm, study
from sparsity_utils.__main__ import main
print("imported", flush=True)
sys.stdin.readline()
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(place):
    with slurm_cluster.slurm(place) as environment:
        yield environment


def waiting(profile: str, build: Path, environment: dict[str, str]) -> subprocess.Popen:
    """A process of `study`, which imports and waits for a line."""
    command = [sys.executable, "-c", WAITS, "study", "--profile", profile, "--questions", "relu_vs_silu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    variables = os.environ | environment | {"SPARSITY_BUILD": str(build)}
    return subprocess.Popen(command, env=variables, text=True, **pipes)


def local(profile: str) -> Study:
    """The study of a profile, by this machine."""
    study = Study.from_profile(profile)
    study.profile = study.profile.on("local")
    return study


def hashes(build: Path) -> dict[str, dict]:
    """Of every finished run the SHA-256 of its files."""
    files = (build / "runs").glob("[!.]*/manifest.json")
    return {file.parent.name: json.loads(file.read_text())["files"] for file in files}


@pytest.mark.filterwarnings("ignore:.*perplexity did not rise")  # of a model this small
def test_a_study_on_slurm_survives_all_that_happens_there(place, request, tmp_path, monkeypatch):
    content = profile_content(write_text(tmp_path / "text"))
    content["study"] = {"sizes": [one_size(shape, 40_000) for shape in ("8x1", "8x2", "12x3")], "activations": ["relu"]}
    content["train"]["checkpoints"] = 24
    content["workers"] = 1
    content["cluster"] = {"partition": "low", "minutes": 1}
    profile, build, slow = write_profile(tmp_path, content), tmp_path / "build", tmp_path / "slow"
    slow.touch()
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(step=STEP, file=str(slow)))
    environment = slurm_cluster.environment_of(place)
    first = waiting(profile, build, environment | {"PYTHONPATH": f"{tmp_path}:{paths.ROOT}"})
    request.addfinalizer(first.kill)
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "local"))
    local(profile).complete("relu_vs_silu")
    for name, value in (environment | {"SPARSITY_BUILD": str(build)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "POLL", 0.5)
    monkeypatch.setattr(slurm, "LAG", 2.0)
    assert first.stdout.readline() == "imported\n", first.stderr.read()

    # Slurm looks every 30 s after its start for tasks whose limit comes near. A task that begins in the first five is
    # told at the first look, any later one at the second.
    cluster = request.getfixturevalue("cluster")
    first.stdin.write("\n")
    first.stdin.flush()
    tasks = build / "slurm" / "tiny" / "tasks.json"
    slurm_cluster.until(
        lambda: tasks.exists() and len(json.loads(tasks.read_text())) == 3, "nothing was submitted", 120
    )
    given = json.loads(tasks.read_text())
    over, preempted, killed = given  # in order of cost

    def queued(field: str, *options: str) -> str:
        return slurm_cluster.run(cluster, "squeue", "--noheader", f"--format={field}", *options).strip()

    def saved(task: str) -> bool:
        return any((build / "runs").glob(f".{given[task][0].split()[0]}.working/checkpoints/*"))

    def said(task: str) -> str:
        return (tasks.parent / f"{task}_0_log.err").read_text()

    slurm_cluster.until(lambda: saved(over) and saved(preempted), "the first tasks did not start", 120)
    before = said(over).count("timed-out")  # none, unless the machine is so slow that nothing was saved in time
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "the same command waits for it again, `scancel 1` stops it" in out, errors
    with ThreadPoolExecutor() as pool:
        second = pool.submit(Study.from_profile(profile).complete, "relu_vs_silu")
        node = queued("%N", f"--jobs={preempted}")
        slurm_cluster.run(cluster, "srun", "--partition=high", f"--nodelist={node}", "true")
        slurm_cluster.until(lambda: saved(killed), "the third task did not start", 120)
        slurm_cluster.run(cluster, "scancel", "--signal=KILL", killed)
        # Slurm begins with TERM, which submitit ignores, and sends KILL some seconds later.
        slurm_cluster.until(lambda: not queued("%i", f"--jobs={killed}"), "the third task was not killed")
        slurm_cluster.until(lambda: said(over).count("timed-out") > before, "no task was over its time limit", 120)
        slow.unlink()
        lost = rf"(?s)1 of 3 runs were lost.*12x3 relu seed 0: task {killed} said last:"
        with pytest.raises(InputError, match=lost):
            second.result(timeout=300)
    assert len(Study.from_profile(profile).table("relu_vs_silu"))
    again = [names for task, names in json.loads(tasks.read_text()).items() if task not in given]
    assert again == [given[killed]]
    assert "DUE TO PREEMPTION" in said(preempted)
    assert hashes(build) == hashes(tmp_path / "local") and len(hashes(build)) == 3
    slurm_cluster.until(lambda: not queued("%i"), "a task did not end")


def test_a_partition_that_is_not_there_is_told(cluster, tmp_path, monkeypatch):
    for name, value in cluster.items() | {("SPARSITY_BUILD", str(tmp_path / "build"))}:
        monkeypatch.setenv(name, value)
    content = profile_content(write_text(tmp_path / "text")) | {"cluster": {"partition": "nowhere"}}
    with pytest.raises(InputError, match=r"sbatch refused the tasks \(.*[Ii]nvalid partition.*; correct the section"):
        Study.from_profile(write_profile(tmp_path, content)).complete("relu_vs_silu")
