"""A Slurm cluster of two nodes with one core each, in the processes of this machine, for tests on the real thing."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=3
MaxArraySize=4
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why this machine cannot run the cluster, or an empty string."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root"
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"{', '.join(missing)} not installed; on Debian .ci/run installs Slurm" if missing else ""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment_of(folder: Path) -> dict[str, str]:
    """The environment in which commands find the cluster of `folder`, whether it runs yet or not."""
    return {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run the cluster; yield the environment in which its commands find it.

    `folder` holds its configuration, state and logs. slurmd and munged start without systemd and stop with the block.
    """
    for name in ("munge", "state", "spool/n1", "spool/n2", "run"):
        (folder / name).mkdir(parents=True)
    shutil.chown(folder / "munge", "munge", "munge")
    for parent in (folder, *folder.parents):  # the socket is reached by munge's own user
        if parent != Path("/tmp") and parent.stat().st_uid == os.geteuid() and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o011)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder, ports=free_ports(3)))
    environment = environment_of(folder)
    version = run(environment, "sbatch", "--version")
    old = tuple(int(part) for part in version.split()[1].split(".")[:2]) < (23, 11)
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")
    daemons: list[subprocess.Popen] = []
    try:
        start_munge(folder, daemons)
        commands = {"slurmctld": ["-D"], "slurmd": ["-D", "-N", "n1"]}, {"slurmd": ["-D", "-N", "n2"]}
        for name, options in (item for group in commands for item in group.items()):
            log = (folder / f"{name}{options[-1]}.log").open("w")
            daemons.append(subprocess.Popen([name, *options], env=os.environ | environment, stdout=log, stderr=log))
        wait_for_nodes(environment)
        yield environment
    finally:
        run(environment, "scancel", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=15)
            daemon.kill()


def run(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    ).stdout


def start_munge(folder: Path, daemons: list[subprocess.Popen]) -> None:
    home = folder / "munge"
    key = home / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    shutil.chown(key, "munge", "munge")
    options = [f"--{name}={home}/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    command = ["munged", "--foreground", f"--key-file={key}", *options]
    daemons.append(
        subprocess.Popen(command, user="munge", group="munge", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    )
    until(lambda: (home / "socket").exists(), "munged made no socket")


def wait_for_nodes(environment: dict[str, str]) -> None:
    def idle() -> bool:
        return (
            run(environment, "sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * 4
        )  # in two partitions

    until(idle, "the nodes did not come up")


def until(condition, otherwise: str, seconds: float = 30.0) -> None:
    """Wait for `condition()`; AssertionError with `otherwise` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
