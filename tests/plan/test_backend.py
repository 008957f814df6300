"""Which backend serves a call, and why: what the device, Triton and the environment decide."""

import logging

import pytest
import torch

from lora_kernels import lora_linear, plan

CPU = torch.device("cpu")


def test_without_triton_one_line_is_logged(fresh_plan, monkeypatch, caplog):
    problem = "Triton not importable (No module named 'triton')"
    monkeypatch.setattr(plan.backend, "triton_problem", lambda: problem)
    monkeypatch.setattr(plan.backend.triton_problem, "cache_clear", lambda: None, raising=False)
    with caplog.at_level(logging.INFO, "lora_kernels"):
        for _ in range(3):
            assert plan.choose(torch.device("cuda", 0), torch.float16, 8, False, "auto") == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        f'lora_kernels: {problem}; using backend="torch". Set LORA_KERNELS_BACKEND=torch to silence.'
    ]


def test_triton_needs_cuda(fresh_plan, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r'lora_linear: backend="triton" needs CUDA tensors \(x is on cpu\)\.'):
        lora_linear(torch.randn(3, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2), backend="triton")


def test_old_gpus_take_pytorch(fresh_plan, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    choice = plan.backend.automatic(torch.device("cuda", 0), torch.float16)
    assert choice.backend == "torch"
    assert "8.0" in choice.reason
    assert "7.0" in choice.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert plan.backend.automatic(torch.device("cuda", 0), torch.float16).backend == "triton"
    assert plan.backend.automatic(torch.device("cuda", 0), torch.float64).backend == "torch"
    assert plan.backend.automatic(torch.device("cuda", 0), torch.float16, 513).backend == "torch"


def test_sm_100_takes_pytorch_where_triton_misses_a_fence(fresh_plan, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for capability, version, backend in (
        ((10, 0), "3.6.0", "torch"), ((10, 3), "3.7.0", "torch"), ((10, 0), "3.7.1+git12", "triton"),
        ((10, 0), "3.10.0", "triton"), ((9, 0), "3.6.0", "triton"), ((12, 0), "3.6.0", "triton"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr("triton.__version__", version)
        choice = plan.backend.automatic(torch.device("cuda", 0), torch.bfloat16)
        assert choice.backend == backend
        assert backend == "triton" or choice.reason == (
            f"compute capability {capability[0]}.{capability[1]} needs Triton 3.7.1, older ones miss a fence, "
            f"and this is {version}"
        )


def test_the_environment_overrides_auto(fresh_plan, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "tritn")
    with pytest.raises(ValueError, match="LORA_KERNELS_BACKEND='tritn' is not one of: auto, torch, triton"):
        plan.choose(CPU, torch.float32, 8, False, "auto")
    plan.backend._environment_backend.cache_clear()
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "triton")
    assert plan.choose(CPU, torch.float32, 8, False, "auto") == "triton"
    assert plan.choose(CPU, torch.float32, 8, False, "torch") == "torch"
