"""A cluster that is not there or says no, and tasks on its nodes; Slurm is a set of scripts here, see test_slurm."""

import errno
import fcntl
import json
import platform
from dataclasses import dataclass

import pytest
from small import one_size, profile_content, write_profile, write_text

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.study import slurm
from sparsity_utils.study.engines import do_jobs
from sparsity_utils.study.jobs import OutOfTime
from sparsity_utils.study.profiles import ClusterConfig
from sparsity_utils.study.schedule import in_order
from sparsity_utils.study.slurm import Task, grouped, versions
from sparsity_utils.study.study import Study


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def study(tmp_path, text, monkeypatch):
    """A study of two runs on a cluster, with a store of its own."""
    monkeypatch.setenv("SPARSITY_BUILD", str(tmp_path / "build"))
    content = profile_content(text)
    content["study"] = {"sizes": [one_size("8x1", seeds=(0, 1))], "activations": ["relu"]}
    content["cluster"] = {"partition": "nowhere", "options": {"qos": "high"}}
    return Study.from_profile(write_profile(tmp_path, content))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Put scripts in place of Slurm's commands: `commands(squeue="exit 1")`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "POLL", 0.01)
    monkeypatch.setattr(slurm, "LAG", 0.05)

    def write(**scripts):
        defaults = {"srun": "", "scontrol": "echo MaxArraySize = 1001", "squeue": "", "sbatch": "echo Submitted job 7"}
        for name, script in (defaults | scripts).items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return write


def test_without_slurm_other_ways_are_named(study, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"There is no sbatch on the path; .*--engine local.* --share"):
        study.complete("metrics")
    here = study.profile.on("local")
    assert here.cluster is None and here.on("slurm").cluster == ClusterConfig() and here.side_by_side == here.workers
    assert study.profile.on("slurm").cluster.partition == "nowhere" == study.profile.on(None).cluster.partition


def test_what_sbatch_refuses_is_told(study, commands):
    commands(sbatch="echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1")
    with pytest.raises(
        InputError, match=r"refused the tasks \(invalid partition specified: nowhere\); .*cluster of profile tiny"
    ):
        study.complete("metrics")
    assert slurm._read_tasks(paths.cluster_tasks("tiny")) == {}


def test_lost_jobs_are_named_with_their_log_and_submitted_again(study, commands):
    commands(sbatch='cp "$1" "$0.seen"; echo Submitted batch job 7')
    with pytest.raises(InputError, match=r"2 of 2 runs were lost.*\n  8x1 relu seed 0: task 7_0 left no .*7_0_0_log"):
        study.complete("metrics")
    script = next(paths.build().parent.glob("bin/sbatch.seen")).read_text()
    for option in (
        "--partition=nowhere",
        "--qos=high",
        "--time=240",
        "--requeue",
        "--array=0-1%2",
        "--cpus-per-task=1",
    ):
        assert f"#SBATCH {option}\n" in script
    folder = paths.cluster_tasks("tiny")
    (folder / "7_0_0_log.err").write_text("Traceback\nsparsity_utils.console.InputError: The disk is full\nsrun: bye\n")
    commands(sbatch="echo Submitted batch job 8")
    (folder / "8_1_0_log.err").write_text("Traceback\nsparsity_utils.console.InputError: The disk is full\nsrun: bye\n")
    with pytest.raises(
        InputError, match=r"seed 1: task 8_1 said last: .*InputError: The disk is full \(.*8_1_0_log.err"
    ):
        study.complete("metrics")


def test_arrays_are_no_longer_than_the_cluster_allows(study, commands, tmp_path):
    commands(
        scontrol="echo 'MaxArraySize            = 2'",
        sbatch=f"echo x >> {tmp_path}/calls; echo Submitted batch job $(wc -l < {tmp_path}/calls)",
    )
    jobs = in_order(study, ["metrics"])
    given = slurm._submit([(job,) for job in (*jobs, *jobs, jobs[0])], study.profile, paths.cluster_tasks("tiny"))
    assert list(given) == ["1_0", "1_1", "2_0", "2_1", "3"]  # arrays of two, and what is left alone


def test_what_the_queue_has_is_waited_for_and_not_submitted_again(study, commands):
    jobs, folder = in_order(study, ["metrics"]), paths.cluster_tasks("tiny")
    commands(squeue="echo '7_0|RUNNING|None'; echo '7_1|PENDING|Resources'", sbatch="exit 9")
    slurm._write_tasks(folder, {f"7_{number}": [slurm._name(job)] for number, job in enumerate(jobs)})
    with pytest.raises(OutOfTime, match="0 of 2 runs done"):
        do_jobs(jobs, study.profile, deadline=0.0)
    assert len(json.loads((folder / "tasks.json").read_text())) == 2
    assert slurm._states(slurm._queue(), {"7_0": [], "7_1": []}) == "1 running, 1 pending (Resources)"


def test_a_silent_controller_is_told(study, commands, monkeypatch):
    commands(squeue="exit 1")
    with pytest.raises(InputError, match="squeue does not answer; call this again"):
        study.complete("metrics")


def test_a_store_without_locks_is_refused(study, commands, monkeypatch):
    def missing(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    commands()
    jobs = in_order(study, ["metrics"])
    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(
        InputError, match=r"The file system of .*slurm has no locks .*mounted with them \(Lustre: flock\)"
    ):
        do_jobs(jobs, study.profile)


@dataclass(frozen=True)
class Counted:
    """In place of a job: what it costs, and a file that counts how often it was done."""

    seconds: float
    failure: str = ""

    def cost(self):
        return self.seconds

    def share(self):
        return 0.5

    def do(self):
        DONE.append(self.seconds)
        if self.failure:
            raise InputError(self.failure)


DONE: list[float] = []


@pytest.mark.parametrize(
    ("seconds", "parallel", "sizes"),
    [
        ([10] * 12, 1, [6, 6]),  # a minute is worth a task
        ([10] * 12, 4, [3, 3, 3, 3]),  # but not at the price of idle nodes
        ([1] * 3, 64, [1, 1, 1]),
        ([1, 1, 300, 300], 2, [3, 1]),
        ([], 4, []),
    ],
)
def test_short_jobs_share_a_task(seconds, parallel, sizes):
    jobs = [Counted(each) for each in seconds]
    tasks = grouped(jobs, parallel)
    assert [len(task) for task in tasks] == sizes and [job for task in tasks for job in task] == jobs


def test_a_job_that_fails_does_not_keep_the_others_of_its_task():
    DONE.clear()
    with pytest.raises(InputError, match="The disk is full"):
        Task((Counted(1, "The disk is full"), Counted(2)), 1, versions())()
    assert DONE == [1, 2]


def test_a_node_with_other_versions_is_refused():
    told = rf"The node {platform.node()} has torch .*, the study was submitted with 1\.0; give the nodes the same"
    with pytest.raises(InputError, match=told):
        Task((), 1, versions() | {"torch": "1.0"})()


def test_a_task_that_never_gets_further_is_not_requeued_for_ever(capsys):
    task, starts = Task((Counted(1),), 1, versions()), 0
    while task is not None:
        task()
        again = task.checkpoint()
        task, starts = again and again.function, starts + 1
    assert starts == slurm.FRUITLESS + 1 and "raise cluster.minutes" in capsys.readouterr().err
