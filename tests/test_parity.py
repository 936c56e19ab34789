"""Each fast path gives what the plain one gives: the hook, the packed batch, the loss and its gradient. And what a GPU
would meet, on a CPU: no tensor left on the other device, and bf16 under autocast."""
import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from conftest import PROMPT, ROOT, SENTENCES, TINY, before, main, opened, plain_greedy, script

kd, aten = script("stage2_kd"), torch.ops.aten
SYSTEM = [{"role": "system", "content": PROMPT}]
LEARNED = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 0.1


def plain_hidden(model, ids, learned=LEARNED):
    """Last hidden states of one row: no cache, no mask, nothing packed -> (T, d)."""
    embeds = kd.embed(model, torch.tensor([ids]), learned)
    return model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]


def cases(tokenizer):
    """name -> rows as the teacher, the student and odd callers give them."""
    words = " ".join(SENTENCES).split()
    asked = [[{"role": "user", "content": " ".join(words[3 * i:][:1 + 7 * i % 23])}] for i in range(6)]
    student = [before(tokenizer, [-1, -2], turns) for turns in asked[:5]]
    return {"one prompt": [kd.chat_ids(tokenizer, SYSTEM + turns) for turns in asked],
            "the slot in the shared beginning": student,
            "two rows the same": [student[0], student[1], student[0]],
            "all rows the same": [student[2]] * 3,
            "a single row": student[3:4],
            "one row the beginning of another": [student[4], student[4] + [9, 8], student[4][:-1]],
            "nothing shared": [[7, 8, 9, 10], [300], [20, -1, 8]]}


def test_a_slot_with_a_tokens_embedding_is_that_token(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([kd.text_ids(tokenizer, "The baker sells 120 loaves a day.")] * 2)
    slots = ids.clone()
    slots[0, 4], slots[1, 0] = -1, -2                       # another place and another vector in each row
    learned = model.get_input_embeddings().weight[torch.stack([ids[0, 4], ids[1, 0]])].clone()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        assert torch.equal(model(inputs_embeds=kd.embed(model, slots, learned)).logits, plain)
        assert not torch.allclose(model(inputs_embeds=kd.embed(model, slots, learned + 1)).logits, plain)


def test_packed_answers_are_the_plain_greedy_ones(loaded, monkeypatch):
    """Every answer, of every kind of rows: all in one pack, or some, whose places others take when they have ended."""
    model, tokenizer = loaded
    rows = cases(tokenizer)
    plain = {tuple(row): plain_greedy(model, row, LEARNED, 8, []) for batch in rows.values() for row in batch}
    first, second, *_ = (plain[tuple(row)] for row in rows["one prompt"])
    lengths = set()
    for ends, size in [([], 4096)] + [([first[2], second[5]], size) for size in (4096, 100, 40)]:
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        for name, batch in rows.items():
            answers, hidden = kd.answer(model, batch, LEARNED, 8, size)
            assert len(answers) == len(hidden) == len(batch)
            for row, said, states in zip(batch, answers, hidden):
                expected = plain[tuple(row)]
                length = next((t + 1 for t, token in enumerate(expected) if token in ends), 8)
                assert said == expected[:length], name
                with torch.no_grad():
                    kept = plain_hidden(model, row + said[:-1])[len(row) - 1:]
                torch.testing.assert_close(states, kept, atol=2e-4, rtol=0)
                lengths.add(length)
    assert 8 in lengths and len(lengths) > 1                # some row ended early


def test_packed_states_and_their_gradient_are_those_of_single_rows(loaded):
    model, tokenizer = loaded
    for name, rows in cases(tokenizer).items():
        answers = [[9, 8, 7, 6], [5], [4, 3, 2, 10, 11, 12], [5], [9, 8, 7, 6]][:len(rows)]
        rows, packed, single = rows[:5], LEARNED.clone().requires_grad_(), LEARNED.clone().requires_grad_()
        states = kd.answer_hidden(model, rows, answers, packed)
        # token t is chosen from the state one before it
        plain = torch.cat([plain_hidden(model, row + a[:-1], single)[len(row) - 1:] for row, a in zip(rows, answers)])
        torch.testing.assert_close(states, plain, atol=2e-5, rtol=1e-4, msg=name)
        for hidden in (states, plain):
            hidden.pow(2).mul(torch.arange(64)).sum().backward()
        assert (single.grad.abs().max() > 1) == (name != "one prompt")
        torch.testing.assert_close(packed.grad, single.grad, atol=2e-3, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_pack_that_would_be_too_long_is_split(smol, monkeypatch):
    (model, _), pack, packed = smol, kd.pack, []
    monkeypatch.setattr(kd, "pack", lambda rows, n: packed.append(len(rows)) or pack(rows, n))
    rows, answers = [[5 + i] * 1000 for i in range(9)], [[9, 8, 7], [4]] * 4 + [[5, 6]]
    plain = torch.cat([plain_hidden(model, row + a[:-1])[len(row) - 1:] for row, a in zip(rows, answers)])
    torch.testing.assert_close(kd.answer_hidden(model, rows, answers, LEARNED), plain, atol=2e-5, rtol=1e-4)
    assert len(packed) > 1


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_loss_and_its_gradient_equal_autograds_over_full_logits(tau):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(300, 32, generator=g), torch.randn(300, 32, generator=g)     # three chunks
    weight = torch.randn(500, 32, generator=g) * 0.3
    fast, slow = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = kd.HeadKL.apply(fast, teacher, weight, tau)
    logp, logq = F.log_softmax(slow @ weight.T / tau, -1), F.log_softmax(teacher @ weight.T / tau, -1)
    naive = tau ** 2 * (logq.exp() * (logq - logp)).sum(-1)
    outer = torch.rand(300, generator=g)                    # each token's own factor from above must arrive
    (loss * outer).sum().backward()
    (naive * outer).sum().backward()
    assert loss.shape == (300,) and fast.grad.abs().max() > 0.1
    torch.testing.assert_close(loss, naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models/smollm2-135m/config.json").exists(), reason="python models/prepare.py")
def test_64_packed_answers_of_the_default_model_are_those_of_generate():
    model, tokenizer = kd.load_frozen("models/smollm2-135m", "cpu")
    messages = kd.read_prompt("prompts/pirate.txt")
    rows = [kd.chat_ids(tokenizer, messages + chat) for chat in kd.read_queries("prompts/pirate.queries.txt")[:64]]
    answers, _ = kd.answer(model, rows, torch.zeros(1, 576), 16)
    ends = model.generation_config.eos_token_id             # as in infer.py: these alone
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=ends[0], max_new_tokens=16)
    for row, answer in zip(rows, answers):
        ids = torch.tensor([row])
        assert model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(row):].tolist() == answer


# --- what a GPU would meet

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
