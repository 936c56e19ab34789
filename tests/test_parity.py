"""Each fast path gives what the plain one gives: the hook, the prefix cache, the padding, the losses."""
import copy

import pytest
import torch
import torch.nn.functional as F

from conftest import SENTENCES

PROMPT = [{"role": "system", "content": "You are the old captain. Answer in two short sentences, and never name your ship."}]


def plain_hidden(model, ids, learned=None, embed=None):
    """Last hidden states of one row, no cache, no padding, no mask -> (T, d)."""
    ids = torch.tensor([ids])
    inputs = {"input_ids": ids} if learned is None else {"inputs_embeds": embed(model, ids, learned)}
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def plain_greedy(model, row, stop, limit):
    """The reference: the whole row again for every token."""
    said, hidden = [], []
    while len(said) < limit and not (said and said[-1] in stop):
        hidden.append(plain_hidden(model, row + said)[-1])
        said.append((model.get_output_embeddings().weight @ hidden[-1]).argmax().item())
    return said, torch.stack(hidden)


@pytest.fixture(scope="module")
def rows(loaded, scripts):
    """40 prompts with questions of 1 to 25 words: more than one batch of generate()."""
    name, model, tokenizer = loaded
    words = " ".join(SENTENCES).split()
    return [scripts.kd.chat_ids(tokenizer, PROMPT + [{"role": "user", "content": " ".join(words[3 * i:][:1 + 5 * i % 25])}]) for i in range(40)]


@pytest.fixture(scope="module")
def greedy(loaded, rows):
    """Plain greedy answers of 10 tokens to all rows, with no stop token -> [(tokens, hidden)]."""
    return [plain_greedy(loaded[1], row, [], 10) for row in rows]


@pytest.fixture(scope="module")
def answered(loaded, scripts, rows):
    """The same from generate()."""
    out = {i: (said, hidden) for i, said, hidden in scripts.kd.generate(loaded[1], rows, torch.tensor([-1]), 10)}
    return [out[i] for i in range(len(rows))]


# --- the hook

def test_a_slot_with_a_tokens_embedding_gives_the_logits_of_that_token(loaded, scripts):
    name, model, tokenizer = loaded
    ids = torch.tensor([tokenizer("The baker sells 120 loaves a day.", add_special_tokens=False)["input_ids"]] * 2)
    slots = ids.clone()
    slots[0, 4], slots[1, 0] = -1, -2                                       # another place and another vector in each row
    for model in (model, copy.deepcopy(model).bfloat16()):
        learned = model.get_input_embeddings().weight[torch.stack([ids[0, 4], ids[1, 0]])].float()
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=scripts.kd.embed(model, slots, learned)).logits, model(input_ids=ids).logits)
            assert not torch.allclose(model(inputs_embeds=scripts.kd.embed(model, slots, learned + 1)).logits, model(input_ids=ids).logits)


def test_two_slots_land_in_order(smol, scripts):
    model, tokenizer = smol
    learned = torch.stack([torch.full((64,), 1.0), torch.full((64,), 2.0)])
    embeds = scripts.kd.embed(model, torch.tensor([[5, -1, -2, 7, -2]]), learned)
    assert embeds[0, 1:3].mean(-1).tolist() == [1, 2] and embeds[0, 4].mean() == 2
    assert torch.equal(embeds[0, [0, 3]], model.get_input_embeddings().weight[[5, 7]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_reaches_learned_only(dtype, checkpoints, scripts):
    model, tokenizer = scripts.kd.load_frozen(str(checkpoints["qwen"]), torch.device("cpu"), dtype, "eager")
    learned = torch.randn(2, 64, requires_grad=True)
    hidden = model.get_decoder()(inputs_embeds=scripts.kd.embed(model, torch.tensor([[5, -1, -2, 7]]), learned)).last_hidden_state
    scripts.kd.token_loss(hidden[0], model.get_output_embeddings().weight, torch.tensor([1, 2, 3, 4])).mean().backward()
    assert learned.grad.dtype == torch.float32 and (learned.grad.norm(dim=1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


# --- the teacher

def test_generate_over_the_shared_prefix_equals_plain_greedy(answered, greedy, rows):
    assert len({len(r) for r in rows}) > 10                                 # different lengths, so there is left padding
    for (said, hidden), (expected, states) in zip(answered, greedy):
        assert said == expected
        torch.testing.assert_close(hidden, states, atol=1e-4, rtol=0)


def test_generate_ends_each_row_at_its_own_stop_token(loaded, scripts, rows, greedy):
    stop = [greedy[0][0][3], greedy[1][0][6]]
    expected = [next((s[:t + 1] for t in range(10) if s[t] in stop), s) for s, _ in greedy]
    assert len({len(s) for s in expected}) > 1
    said = {i: (answer, len(hidden)) for i, answer, hidden in scripts.kd.generate(loaded[1], rows, torch.tensor(stop), 10)}
    assert [said[i] for i in range(40)] == [(s, len(s)) for s in expected]


def test_generate_without_a_shared_prefix_and_with_equal_rows(smol, scripts):
    model, tokenizer = smol
    different, stop = [[7, 8, 9, 10, 11], [300], [20, 8]], torch.tensor([-1])
    for case in (different, [different[0]] * 3, [different[1]]):
        said = {i: answer for i, answer, _ in scripts.kd.generate(model, case, stop, 6)}
        assert said == {i: plain_greedy(model, row, [], 6)[0] for i, row in enumerate(case)}


def test_generate_leaves_out_a_batch_of_which_all_is_done(smol, scripts):
    model, tokenizer = smol
    case, stop = [[7, 8, 9], [7, 8], [7, 30, 31, 32]], torch.tensor([-1])
    for skip, made in [([], {0, 1, 2}), ([1], {0, 1, 2}), ([0, 1, 2], set())]:      # a batch of which a part is missing is made as a whole: the same states, to the last bit
        assert {i for i, *_ in scripts.kd.generate(model, case, stop, 3, skip=skip)} == made


def test_a_sampled_row_does_not_depend_on_its_neighbours(loaded, scripts, rows):
    name, model, tokenizer = loaded

    def sample(seed, count=12):
        return {i: said for i, said, _ in scripts.kd.generate(model, rows[:count], torch.tensor([-1]), 8, temperature=0.9, seed=seed)}
    everyone, some = sample(1), sample(1, count=7)
    assert some == {i: everyone[i] for i in some} and len(some) == 7
    assert everyone != sample(2)


def test_samples_follow_the_softmax(smol, scripts):
    """1,024 first tokens of one row against the model's own probabilities at that temperature."""
    model, tokenizer = smol
    row = [7, 8, 9, 10]
    with torch.no_grad():
        chance = torch.softmax(model(input_ids=torch.tensor([row])).logits[0, -1] / 0.5, -1)
    said = torch.tensor([answer for _, answer, _ in scripts.kd.generate(model, [row] * 1024, torch.tensor([-1]), 1, temperature=0.5)]).flatten()
    top = chance.topk(5).indices
    assert chance[top].sum() > 0.1
    for t in top:
        p = chance[t].item()
        assert abs((said == t).float().mean().item() - p) < 4 * (p * (1 - p) / 1024) ** 0.5


# --- the student

def test_answer_hidden_of_a_padded_batch_equals_its_single_rows(loaded, scripts):
    name, model, tokenizer = loaded
    learned, embed = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 0.1, scripts.kd.embed
    students = [[1, -1, -2, 50, 51], [1, -1, -2, 60, 61, 62, 63, 64, 65], [1, -1, -2, 70]]
    answers = [[9, 8, 7, 6], [5], [4, 3, 2, 10, 11, 12, 13]]
    with torch.no_grad():
        together = scripts.kd.answer_hidden(model, students, answers, learned).split([4, 1, 7])
        for got, row, answer in zip(together, students, answers):
            plain = plain_hidden(model, row + answer, learned, embed)[len(row) - 1:-1]              # the states that stand one before each answer token
            torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)


def test_the_teacher_against_itself_has_no_divergence(loaded, scripts, rows, answered):
    """True KL at tau 1, between the cached, left-padded teacher and the right-padded student that is fed the same ids."""
    name, model, tokenizer = loaded
    scores = scripts.kd.evaluate(model, rows, [a for a, _ in answered], [h for _, h in answered], torch.zeros(1, 64))
    kl, same, tokens = scores.sum(0).tolist()
    assert scores.shape == (40, 3) and tokens == 400 and same == tokens
    assert abs(kl / tokens) < 1e-5


@pytest.mark.parametrize("begin", [[], [30], [30, -1, 31], [*range(30, 90)] * 8 + [-1]])
def test_evaluate_is_the_plain_kl(loaded, scripts, begin):
    """The rows' common beginning, [BE] in it or not, runs once for a batch of them: as if each ran by itself."""
    name, model, tokenizer = loaded
    weight, learned = model.get_output_embeddings().weight, torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    rows = [begin + [20, 7], begin + [21], *([begin + [22, i] for i in range(20)])]
    answers, teachers = [[9, 8, 7], [4], *([[i, 5] for i in range(20)])], []
    scores = []
    with torch.no_grad():
        for row, answer in zip(rows, answers):
            teacher = plain_hidden(model, [5, 6, 7] + answer)[2:-1]
            p, q = F.log_softmax(teacher @ weight.T, -1), F.log_softmax(plain_hidden(model, row + answer, learned, scripts.kd.embed)[len(row) - 1:-1] @ weight.T, -1)
            teachers.append(teacher)
            scores.append([F.kl_div(q, p, log_target=True, reduction="sum").item(), (p.argmax(-1) == q.argmax(-1)).sum().item(), len(answer)])
    found = scripts.kd.evaluate(model, rows, answers, teachers, learned)
    torch.testing.assert_close(found[:, 0], torch.tensor(scores)[:, 0], atol=1e-5, rtol=1e-4)
    assert found[:, 0].min() > 0.001 and found[:, 1:].tolist() == [s[1:] for s in scores]


def test_infer_answers_as_plain_greedy_does(loaded, scripts, rows, greedy):
    name, model, tokenizer = loaded
    for row, (expected, _) in list(zip(rows, greedy))[:4]:
        assert list(scripts.infer.answer(model, row, torch.zeros(1, 64), {-1}, 10, 0, None)) == expected
        assert list(scripts.infer.answer(model, row, torch.zeros(1, 64), {expected[5]}, 10, 0, None)) == expected[:expected.index(expected[5])]


# --- stages 0 and 1

def test_the_copy_over_a_cached_text_equals_one_plain_forward(loaded, scripts):
    """[start, X, AE, X]: states and gradient of [AE]; and without [AE]: [start, X, X]."""
    name, model, tokenizer = loaded
    ids, start = torch.tensor([[40, 41, 42, 43, 44], [9, 8, 7, 6, 300]]), [1, 77, 78]
    opened = torch.cat([torch.tensor([start] * 2), ids], 1)
    ae = (torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 0.1).requires_grad_()
    slow = ae.detach().clone().requires_grad_()
    got = scripts.ae.copy_hidden(model, ids, ae, start)
    embeds = scripts.ae.embed(model, torch.cat([opened, torch.full((2, 1), -1), ids], 1), slow)
    plain = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -6:]
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    (got ** 3).sum().backward(), (plain ** 3).sum().backward()
    torch.testing.assert_close(ae.grad, slow.grad, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        plain = model.get_decoder()(input_ids=torch.cat([opened, ids], 1), use_cache=False).last_hidden_state[:, -6:]
        torch.testing.assert_close(scripts.ae.copy_hidden(model, ids, None, start), plain, atol=1e-5, rtol=1e-5)


def test_give_back_is_plain_greedy_decoding(smol, scripts):
    model, tokenizer = smol
    embedding = model.get_input_embeddings().weight[[33]]
    assert scripts.recon.give_back(model, torch.tensor([[5, -1, 6]]), embedding, 8) == plain_greedy(model, [5, 33, 6], [], 8)[0]


# --- the loss

@pytest.mark.parametrize("kind, tau", [("tokens", 1.0), ("tokens", 2.0), ("teacher", 1.0), ("teacher", 2.0)])
def test_the_chunked_loss_and_its_gradient_equal_the_naive_ones(scripts, kind, tau):
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher = torch.randn(37, 32, generator=g), torch.randn(500, 32, generator=g) * 0.3, torch.randn(37, 32, generator=g)
    tokens = torch.randint(500, (37,), generator=g)
    fast, slow = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    if kind == "tokens":
        naive = tau ** 2 * F.cross_entropy(slow @ weight.T / tau, tokens)
    else:
        naive = tau ** 2 * F.kl_div(F.log_softmax(slow @ weight.T / tau, -1), F.log_softmax(teacher @ weight.T / tau, -1), log_target=True, reduction="batchmean")
    row, entropy = (tokens, 0) if kind == "tokens" else scripts.kd.soft_target(weight, teacher, tau)
    loss = scripts.kd.token_loss(fast, weight, row, tau, chunk=8) - entropy
    assert loss.shape == (37,)
    loss = loss.mean()
    (0.3 * loss).backward(), (0.3 * naive).backward()                       # 0.3: the factor from above must arrive
    torch.testing.assert_close(loss, naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-5)
    assert fast.grad.abs().max() > 1e-3
