"""A study on a real Slurm of two nodes: preempted, over its time limit, killed, interrupted; the bits are the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from small import one_size, profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study.study import Study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not()),
]
STEP = 0.15  # seconds that a step is made to last on a node, so that a run is surely over one minute
SLEEPS = f"""
import os
if "SLURM_JOB_ID" in os.environ:
    import time, torch
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda *args, **options: (time.sleep({STEP}), step(*args, **options))[1]
"""
SHORT = """
import sys
from sparsity_utils.study import slurm
from sparsity_utils.__main__ import main
slurm.POLL, slurm.LAG = 0.5, 2.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def study(tmp_path):
    """Start `study` on a profile with a store; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen] = []

    def start(profile: str, build: Path, environment: dict[str, str], *options: str) -> subprocess.Popen:
        variables = {"SPARSITY_BUILD": str(build), "PYTHONPATH": f"{tmp_path}:{paths.ROOT}"}
        command = [sys.executable, "-c", SHORT, "study", "--profile", profile, "--questions", "relu_vs_silu", *options]
        pipe = subprocess.PIPE
        everything = os.environ | environment | variables
        started.append(subprocess.Popen(command, env=everything, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def hashes(build: Path) -> dict[str, dict]:
    """Of every finished run the SHA-256 of its files."""
    files = (build / "runs").glob("[!.]*/manifest.json")
    return {file.parent.name: json.loads(file.read_text())["files"] for file in files}


def test_a_study_on_slurm_survives_all_that_happens_there(cluster, study, tmp_path):
    content = profile_content(write_text(tmp_path / "text"))
    content["study"] = {
        "sizes": [
            one_size("8x1", 11_000, batch_tokens=32),  # of most steps, and cheapest, so that it starts first
            one_size("8x2", 40_000),
            one_size("12x3", 40_000),
        ],
        "activations": ["relu"],
    }
    content["train"]["checkpoints"] = 24
    content["cluster"] = {"partition": "low", "minutes": 1}
    profile, build = write_profile(tmp_path, content), tmp_path / "build"
    (tmp_path / "sitecustomize.py").write_text(SLEEPS)
    first = study(profile, build, cluster)
    tasks = build / "slurm" / "tiny" / "tasks.json"
    slurm_cluster.until(
        lambda: tasks.exists() and len(json.loads(tasks.read_text())) == 3, "nothing was submitted", 120
    )
    given = json.loads(tasks.read_text())
    over, preempted, killed = given  # in order of cost

    def saved(task: str) -> bool:
        return any((build / "runs").glob(f".{given[task][0].split()[0]}.working/checkpoints/*"))

    slurm_cluster.until(lambda: saved(over) and saved(preempted), "the first tasks did not start", 120)
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "the same command waits for it again, `scancel 1` stops it" in out, errors
    second = study(profile, build, cluster)
    node = slurm_cluster.run(cluster, "squeue", "--noheader", f"--jobs={preempted}", "--format=%N").strip()
    slurm_cluster.run(cluster, "srun", "--partition=high", f"--nodelist={node}", "true")
    slurm_cluster.until(lambda: saved(killed), "the third task did not start", 120)
    slurm_cluster.run(cluster, "scancel", "--signal=KILL", killed)
    out, errors = second.communicate(timeout=300)
    assert second.returncode == 2, out + errors
    assert "1 of 3 runs were lost" in errors and f"12x3 relu seed 0: task {killed} said last:" in errors
    local = study(profile, tmp_path / "local", {}, "--engine", "local")
    third = study(profile, build, cluster)
    out, errors = third.communicate(timeout=200)
    assert third.returncode == 0 and "relu_vs_silu:" in out, errors
    assert len(json.loads(tasks.read_text())) == 1  # the one that was lost
    logs = {task: (tasks.parent / f"{task}_0_log.err").read_text() for task in (preempted, over)}
    assert "DUE TO PREEMPTION" in logs[preempted] and "timed-out" in logs[over]
    assert local.wait(timeout=200) == 0
    assert hashes(build) == hashes(tmp_path / "local") and len(hashes(build)) == 3


def test_a_partition_that_is_not_there_is_told(cluster, tmp_path, monkeypatch):
    for name, value in cluster.items() | {("SPARSITY_BUILD", str(tmp_path / "build"))}:
        monkeypatch.setenv(name, value)
    content = profile_content(write_text(tmp_path / "text")) | {"cluster": {"partition": "nowhere"}}
    with pytest.raises(InputError, match=r"sbatch refused the tasks \(.*[Ii]nvalid partition.*; correct the section"):
        Study.from_profile(write_profile(tmp_path, content)).complete("relu_vs_silu")
