"""What a GPU would meet, on a CPU: bf16 under autocast, and no tensor left on the other device."""
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from conftest import TINY, before, main, opened, script

kd, aten = script("stage2_kd"), torch.ops.aten
GPU = torch.device("mps", 0)                # any that torch does not start on being named, as it does CUDA
MOVED = {aten._to_copy, aten.copy_, aten.index, aten.index_put, aten.index_put_}       # torch itself brings these over


class Far(torch.Tensor):
    """A tensor that says it is on the GPU. Its numbers are in .near, on the CPU, so that a loop can read them."""
    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, near.stride(), dtype=near.dtype, device="meta")

    def __init__(self, near):
        self.near = near

    device, is_meta = property(lambda self: GPU), False

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """A result lies where its first tensor does, or where device= says; tensors of both places may not meet."""
        given, to = (args, kwargs or {}), (kwargs or {}).get("device")
        far = [isinstance(x, Far) for x in tree_flatten(given)[0] if isinstance(x, torch.Tensor) and x.dim()]
        assert len({*far}) < 2 or func.overloadpacket in MOVED, f"{func}: tensors on two devices"
        there = to.type in (GPU.type, "meta") if to else any(isinstance(x, Far) for x in tree_flatten(given)[0])
        args, kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, given)
        out = func(*args, **kwargs | ({"device": "cpu"} if to else {}))
        if func._schema.is_mutable:
            return given[0][0]
        return tree_map(lambda x: Far(x) if isinstance(x, torch.Tensor) and there else x, out)


class TwoDevices(TorchDispatchMode):
    """So that what has no Far in it, such as torch.zeros(2, device=GPU), is seen, too."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Far.__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def two_devices():
    torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor(..., device=GPU), too, comes by the mode
    with TwoDevices():
        yield
    torch._C._set_only_lift_cpu_tensors(False)


def test_no_tensor_is_left_on_the_other_device(loaded, two_devices):
    """embed, pack, answer and one step of stage 2."""
    (model, tokenizer), found = loaded, []
    asked = [[{"role": "user", "content": text}] for text in ("Why?", "How is it made?")]
    rows = [before(tokenizer, [-1], turns) for turns in asked]
    noise = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for somewhere, start in ((model, noise), (copy.deepcopy(model)._apply(Far), Far(noise))):
        be = torch.nn.Parameter(start)
        answers, hidden = kd.answer(somewhere, rows, be, 5)
        student = kd.answer_hidden(somewhere, rows, answers, be)
        weight, teacher = somewhere.get_output_embeddings().weight, 2 * torch.cat(hidden).to(student)
        kd.HeadKL.apply(student, teacher, weight, 2.0).mean().backward()
        found.append((answers, be.grad))
    here, there = found
    assert here[0] == there[0] and there[1].device == GPU
    assert torch.allclose(here[1], there[1].near, atol=1e-6) and here[1].norm() > 0


def test_every_stage_runs_in_bf16_under_autocast(checkpoints, vectors, work, monkeypatch):
    """As on CUDA: weights in bf16, the learned vector in fp32, a loss that falls."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: autocast(kind, dtype))
    tiny = ["--model", checkpoints["smol"], "--steps", 12, *TINY]
    for name, arguments, loss in (("stage0_ae", ["--data", "corpus.jsonl", "--held-out", 4, "--batch", 2], "L_AE"),
                                  ("stage1_recon", ["--prompt", "p.txt", "--ae", "out/ae.pt"], "L_recon"),
                                  ("stage2_kd", ["--prompt", "p.txt"], "L_KD")):
        r = main(name, *arguments, *tiny)
        assert r.code == 0 and "bfloat16" in r.out, r.err
        out = opened(f"out/{dict(stage0_ae='ae', stage1_recon='recon').get(name, 'be')}.pt")
        losses = [row[loss] for row in out["history"] if loss in row]
        assert out["vector"].dtype == torch.float32 and min(losses[-3:]) < losses[0]
