"""Two ranks compute what one process does, on PyTorch's own engines: the cases of `distributed_samples`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from filelock import FileLock

# Accelerate starts two processes, and each of them PyTorch's compiler.
pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1] / "samples"
CASES = (
    "ddp", "ddp_that_accumulates", "fsdp_that_accumulates", "fsdp_by_layer", "fsdp_by_leaf", "fsdp_of_a_16_bit_base",
    "fsdp_with_a_mixed_precision_policy", "peft_ddp", "peft_fsdp_by_layer", "peft_fsdp_by_leaf", "peft_fsdp_by_base",
    "accelerate", "tensor_parallel", "tensor_parallel_training", "tensor_parallel_in_layouts",
    "tensor_parallel_beside_linear", "tensor_parallel_over_fsdp", "tensor_parallel_compiled", "column_wise_dropout",
    "row_wise_dropout", "small_calls", "rules", "refused", "checkpoints", "page",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """Where the ranks left what they found. They are started once, whichever worker of pytest-xdist comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            launch(folder)
    return folder


def launch(folder):
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    command = [sys.executable, *launcher.split(), "--mixed_precision", "no", "--dynamo_backend", "no"]
    with (folder / "log").open("w") as log:
        subprocess.run(
            [*command, str(TESTS / "distributed_samples.py"), str(folder)],
            stdout=log, stderr=log, timeout=1000, check=False, cwd=TESTS,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(case, folder):
    for rank in range(2):
        path = folder / f"rank{rank}.json"
        assert path.exists(), (folder / "log").read_text()[-3000:]
        found = json.loads(path.read_text())
        assert case in found, f"rank {rank} did not come to it: " + (folder / "log").read_text()[-1000:]
        assert "error" not in found[case], found[case]["error"]
        assert {name: d for name, d in found[case]["differences"].items() if not d <= 1e-6} == {}


def test_every_case_is_asked_for(folder):
    assert set(json.loads((folder / "rank0.json").read_text())) == set(CASES)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", ["fsdp", "tensor_parallel"])
def test_a_checkpoint_of_two_ranks_loads_on_one(name, folder):
    import torch.distributed.checkpoint as dcp
    from distributed_samples import make_model
    from safetensors.torch import load_file

    model = make_model(seed=3)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / name, no_dist=True)
    model.load_state_dict(state)
    expected = load_file(folder / f"{name}.safetensors")
    assert model.state_dict().keys() == expected.keys()
    for key, t in model.state_dict().items():
        assert torch.equal(t, expected[key]), key
