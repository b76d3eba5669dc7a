"""A run of the store that several devices train together: torchrun is started on this module, a process each.

    build/runs/.<key>.working/torchrun/request.json   what the processes train on, and how
    build/runs/.<key>.working/torchrun/result.json    the rows of its checkpoints, or why it diverged or failed
    build/runs/.<key>.working/torchrun/log            what they said

An unfinished run goes on with another number of devices by hand, on a machine that has them:
`torchrun --standalone --nproc-per-node 4 -m sparsity_utils.study.torchrun build/runs/.<key>.working`. `study` then
takes what is finished into the store; the manifest names every number that trained it.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsity_utils import paths
from sparsity_utils.console import InputError
from sparsity_utils.models.training import LAUNCH, Diverged, Schedule, saved_step, train
from sparsity_utils.study.runs import RunConfig, validation_batches
from sparsity_utils.text.corpus import Corpus, open_corpus

REQUEST, RESULT, LOG = (f"{LAUNCH}/{name}" for name in ("request.json", "result.json", "log"))
PARENT = "SPARSITY_PARENT"
SIGNALS = (
    "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"  # without USR2, which Slurm sends, torchrun would leave workers behind
)


def train_on_devices(
    config: RunConfig, corpus: Corpus, working: Path, on_progress: Callable[[float], None]
) -> list[dict]:
    """`training.train` by as many processes as the run has devices; they end when this one does.

    Raises Diverged, and InputError for too few devices and for what a process says of its input.
    """
    devices = config.train.devices
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise InputError(
            f"{config.title} is to be trained by {devices} devices, this machine shows {torch.cuda.device_count()}; "
            "ask for more (cluster.gpus), or change train.devices, which makes it another run."
        )
    with paths.written_aside(working / REQUEST) as aside:
        aside.write_text(json.dumps({"config": config.identity(), "corpus": str(corpus.folder)}), encoding="utf-8")
    (working / RESULT).unlink(missing_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--signals-to-handle={SIGNALS}"]
    command = [*launcher, f"--nproc-per-node={devices}", "-m", __spec__.name, str(working)]
    environment = os.environ | {PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(config.threads)}
    steps = Schedule(config.train).steps
    with (
        (working / LOG).open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(0.2)
                on_progress(saved_step(working) / steps)
        finally:
            process.terminate()
    return _result(working, process.returncode)


def _result(working: Path, status: int) -> list[dict]:
    try:
        result = json.loads((working / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        result = {
            "error": f"The processes of a run on several devices ended with status {status}; see {working / LOG}."
        }
    if result.get("diverged"):
        raise Diverged(result["diverged"])
    if result.get("error"):
        raise InputError(result["error"])
    return result["rows"]


def main(working: Path) -> int:
    """A process of a run: train what `working` asks for; the leading one writes the result."""
    _follow(os.environ.get(PARENT))
    if not (working / REQUEST).exists():
        sys.exit(f"{working} holds no unfinished run of several devices; name one of build/runs/.*.working.")
    request = json.loads((working / REQUEST).read_text(encoding="utf-8"))
    config, corpus = RunConfig.from_identity(request["config"]), open_corpus(Path(request["corpus"]))
    torch.set_num_threads(config.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    leads = dist.get_rank() == 0
    result: dict[str, Any]
    try:
        validation = validation_batches(config, corpus)
        result = {"rows": train(config.model, config.train, corpus.tokens("train"), validation, working)}
    except Diverged as error:
        result = {"diverged": str(error)}
    except InputError as error:
        result, leads = {"error": str(error)}, True  # of whichever process: the others hang and are ended
    if leads:
        with paths.written_aside(working / RESULT) as aside:
            aside.write_text(json.dumps(result), encoding="utf-8")
    if "error" in result:
        os._exit(1)  # not waiting for the others
    dist.destroy_process_group()
    return 0


def _follow(parent: str | None) -> None:
    """End this process soon after the one that asked for the run has ended."""

    def watch() -> None:
        while True:
            try:
                os.kill(int(parent), 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1.0)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
