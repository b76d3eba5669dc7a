"""One run on several devices: FSDP2 under torchrun, one process for each device.

Every process takes its part of each batch. Parameters, gradients and moments of the optimizer are sharded: a layer's
weights are gathered for the time that it computes, on a GPU in bfloat16. A state is written by all processes, in
safetensors, and read by any number of them. Which number trains a run decides the order of its sums, so that another
one gives weights that differ in the last digits.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import GraniteForCausalLM

from sparsity_utils import paths
from sparsity_utils.console import check

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, per parameter
LOG = "log.json"


class Group:
    """The processes that train one run together."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This process's windows of a batch, (windows / size, context). Raises InputError for parts of unequal size."""
        check(
            len(batch) % self.size == 0,
            f"A batch has {len(batch)} windows, which {self.size} devices cannot share equally; change train.devices "
            "or train.batch_tokens.",
        )
        return batch.chunk(self.size)[self.rank]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        dist.all_reduce(values)
        return values / self.size

    def told(self, value: Any) -> Any:
        """What the leading process calls this with."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def written_aside(self, target: Path) -> Iterator[Path]:
        """`paths.written_aside` for a folder that all processes write into."""
        if not self.leads:
            yield Path(self.told(None))
            dist.barrier()
            return
        with paths.written_aside(target) as aside:
            aside.mkdir()
            self.told(str(aside))
            yield aside
            dist.barrier()


class Gathering(nn.Module):
    """The root of a sharded model: FSDP gathers weights around a forward, so that the loss is computed in this one."""

    def __init__(self, model: GraniteForCausalLM, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(inputs, targets)


def shard(model: GraniteForCausalLM, loss: Callable[[Tensor, Tensor], Tensor], half: bool) -> Gathering:
    """Shard a model in place; calling what is returned computes `loss` with it. Reductions are in float32.

    half: layers compute with weights in bfloat16; the tied embedding does not, since the loss sums gradients on it.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.model.layers:
        if model.device.type == "cuda":
            layer.compile()
        fully_shard(layer, mp_policy=policy)
    root = Gathering(model, loss)
    fully_shard(root)
    return root


def whole_tensors(model: nn.Module, kept: bool) -> dict[str, Tensor]:
    """Weights gathered on the CPU, but for the tied head. All processes call it; those with `kept` keep them."""
    whole = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            full = tensor.full_tensor()
            if kept:
                whole[name] = full.cpu().contiguous()
    return whole


def states(folder: Path) -> list[Path]:
    """The states of a run on several devices, the newest last."""
    return sorted(folder.glob("state-*"), key=state_step)


def state_step(state: Path) -> int:
    """The steps that were done when a state was written."""
    return int(state.name.removeprefix("state-"))


def trained_by(folder: Path) -> list[int]:
    """With how many devices the run in `folder` was trained: one number, or several where it went on with others."""
    return json.loads((states(folder)[-1] / LOG).read_text(encoding="utf-8"))["devices"]


def save_sharded(group: Group, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, log: dict) -> None:
    """Write the state of a run aside, rename it, then delete older ones."""
    older = states(folder)
    with group.written_aside(folder / f"state-{log['step']:06d}") as aside:
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        dcp.save(_tensors(model, optimizer, log["step"]), storage_writer=writer)
        if group.leads:
            (aside / LOG).write_text(json.dumps(log), encoding="utf-8")
    for state in older if group.leads else ():
        shutil.rmtree(state, ignore_errors=True)


def load_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Bring the newest state of a run into model and optimizer; return its log, or None where there is no state."""
    found = states(folder)
    if not found:
        return None
    log = json.loads((found[-1] / LOG).read_text(encoding="utf-8"))
    dcp.load(_tensors(model, optimizer, log["step"]), storage_reader=HuggingFaceStorageReader(str(found[-1])))
    return log


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """This process's shards of weights and moments by name; moments that are not there are made, to be read into."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(float(step), device=parameter.device)
            state.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
        tensors[f"model.{name}"] = parameter.detach()
        tensors.update({f"{moment}.{name}": state[moment] for moment in MOMENTS})
    return tensors
