"""Speed and memory: every figure is a pair that alternates in one run on one machine, ours against what it replaces.

    teacher      packed answers, against the prompt's cache repeated over a batch, and against no sharing at all
    step         a step of stage 2, against a bare forward and input-gradient pass over the same rows, padded
    memory       of a step at batch 16 with answers of 128 tokens, against full logits, both in one pass
    serving      time to first token, throughput, keys and values: [BE] against the full prompt
    gsm8k        questions after 8 worked ones: packed, against the prompt's cache repeated

    python results/bench.py                                      # all, hours on two cores -> out/bench.json
    python results/bench.py --only step serving --model Qwen/Qwen3-4B-Instruct-2507 --out bench-gpu.json
    python results/bench.py --quick --out /tmp/bench.json                   # does it run? its numbers mean nothing

A row has the median, range and n of each way, and how many times better ours is, pair by pair. It replaces the row of
the same item, model and prompt in --out. How soon a training is good: results/quality.py, into the same file.
"""
import argparse, concurrent.futures, copy, json, multiprocessing, os, platform, re, statistics, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

# what is measured is the code that runs, not a copy of it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from stage2_kd import (
    HeadKL, answer, answer_hidden, chat_ids, embed, fail, load_frozen, read_prompt, read_queries)


QUERIES = "prompts/pirate.queries.txt"                  # asked of every prompt
WORDING = ("Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\nYour "
           'response should end with "The final answer is [answer]" where [answer] is the response to the problem.')


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--only", nargs="+", default=[*ITEMS], choices=[*ITEMS], help="the items to measure")
    add("--model", default="models/smollm2-135m", help="hub name or folder of a Llama or Qwen chat model")
    add("--prompts", nargs="+", default=["prompts/pirate.txt", "prompts/gsm8k_8shot.json", "prompts/styleguide.txt"],
        help="about 340, 1,700 and 3,000 tokens; teacher takes the first two, gsm8k the second")
    add("--repeats", type=int, default=3, help="pairs of each item; step takes four times as many")
    add("--out", default="out/bench.json", help="the figures")
    add("--device", default="auto", help="cuda, mps or cpu")
    add("--quick", action="store_true", help="one small measurement of each, to see that it runs")
    p.set_defaults(count=64, limit=64, batch=16, length=128, problems="data/gsm8k/test.jsonl", new=16)
    args = p.parse_args()
    if args.quick:
        vars(args).update(count=3, limit=4, batch=2, length=6, problems=QUERIES, new=2, repeats=1,
                          prompts=args.prompts[:1])
    return args


# --- how it is measured

def fed(tokenizer, path, chats):
    """What stands before an answer: rows with the prompt, and rows with [BE]."""
    messages = read_prompt(path)
    return ([chat_ids(tokenizer, messages + chat) for chat in chats],
            [chat_ids(tokenizer, [{"role": "system", "content": [-1]}] + chat) for chat in chats])


def noise(model, seed=0):
    """Where stage 2 starts without stage 1 -> (1, d) fp32."""
    torch.manual_seed(seed)
    table = model.get_input_embeddings().weight.float()
    return table.mean(0) + table.std(0) * torch.randn(1, table.shape[1]).to(table)


def clock(model):
    """Seconds, once a GPU has done all that it was asked."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def pairs(repeats, ways, warm=0, **more):
    """ways: {name: function -> {figure: number}}, ours first. They take turns, in an order that turns round each time;
    warm rounds do not count -> a row for each figure. What is counted "a second" is better high, all else low."""
    found, rows = {name: [] for name in ways}, []
    for n in range(-warm, repeats):
        for name in list(ways)[::1 if n % 2 == 0 else -1]:
            numbers = ways[name]()
            print(f"  {name}: {numbers}", flush=True)
            if n >= 0:
                found[name].append(numbers)
    ours, *others = ways
    for figure in found[ours][0]:
        values = {name: [numbers[figure] for numbers in found[name]] for name in ways}
        row = {"what": figure, **more, **{name: spread(v) for name, v in values.items()}}
        for other in others:
            ratios = [a / b for a, b in zip(values[ours], values[other])]
            times = ratios if figure.endswith("a second") else [1 / r for r in ratios]
            row[f"times better than {other}"] = spread(times)
            print(f"{figure}: {statistics.median(times):.2f} times better than {other}; {more}", flush=True)
        rows.append(row)
    return rows


def in_child(function, *args):
    """In a process of its own, which starts as a user's does: the imports, then the model."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# --- what ours is measured against

@torch.no_grad()
def greedy(model, rows, learned, limit, stop, prompt=None):
    """Plain greedy answers of a batch, padded on the left. prompt: the cache of what all rows begin with, repeated for
    each; without it each row reads all of its ids. Yields for a token: ids (B,), hidden states (B, d), the cache."""
    body, weight = model.get_decoder(), model.get_output_embeddings().weight
    n, cache, width = 0, transformers.DynamicCache(), max(map(len, rows))
    ended = torch.zeros(len(rows), dtype=torch.bool)
    if prompt:
        n, cache = prompt.get_seq_length(), copy.deepcopy(prompt)
        cache.batch_repeat_interleave(len(rows))
    pads = [width - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + row[n:] for row, pad in zip(rows, pads)], device=model.device)      # (B, w - n)
    mask = torch.tensor([[1] * n + [0] * pad + [1] * (width - n - pad) for pad in pads], device=model.device)
    embeds = embed(model, ids, learned)
    for _ in range(limit):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1]:]                # pads do not count
        hidden = body(None, mask, positions, cache, embeds).last_hidden_state[:, -1]        # (B, d)
        ids = (hidden @ weight.T).argmax(-1)                                                # (B,)
        yield ids, hidden, cache
        ended |= torch.isin(ids.cpu(), torch.tensor(stop))
        if ended.all():
            return
        embeds, mask = embed(model, ids[:, None], learned), F.pad(mask, (0, 1), value=1)


@torch.no_grad()
def in_batches(model, rows, learned, limit, share):
    """greedy over batches of like length -> answers. share: the prompt is read once, and its cache repeated."""
    stop, answers, prompt = model.generation_config.eos_token_id, {}, None
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)       # each row keeps an id of its own
    if share:
        prompt = transformers.DynamicCache()
        model.get_decoder()(torch.tensor([rows[0][:n]], device=model.device), None, None, prompt)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size = max(1, min(32, 16000 // (len(rows[order[-1]]) + limit)))         # 16,000 tokens of cache: 740 MB on SmolLM2
    for part in tqdm([order[i:i + size] for i in range(0, len(order), size)], desc="in batches", leave=False):
        said = [ids for ids, _, _ in greedy(model, [rows[i] for i in part], learned, limit, stop, prompt)]
        for i, row in zip(part, torch.stack(said, 1).tolist()):
            answers[i] = row[:next((t for t, token in enumerate(row, 1) if token in stop), len(row))]
    return [answers[i] for i in range(len(rows))]


def step(model, rows, answers, target, be, optimizer, full=False):
    """A step of stage 2 at lambda 1 and tau 2; full: all logits at once, as one would write it first."""
    weight = model.get_output_embeddings().weight
    optimizer.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        student = answer_hidden(model, rows, answers, be)                                   # (sum T, d)
        teacher = torch.cat(target).to(student)
        if full:
            logp, logq = (F.log_softmax((h @ weight.T).float() / 2, -1) for h in (student, teacher))    # (sum T, V)
            kd = 4 * F.kl_div(logp, logq, reduction="none", log_target=True).sum() / len(student)
        else:
            kd = HeadKL.apply(student, teacher, weight, 2.0).sum() / len(student)
    kd.backward()
    optimizer.step()


# --- the items, each of which returns its rows

def answering(args, model, path, rows, limit, unshared):
    """All ways must give the same answers; in bf16 a near tie may fall either way."""
    said, half, start = {}, rows[:(len(rows) + 1) // 2], noise(model)

    def timed(name, function):
        began = clock(model)
        said[name] = function()
        seconds = clock(model) - began
        return {"tokens a second": sum(map(len, said[name])) / seconds, "seconds a question": seconds / len(said[name])}

    ways = {"packed": lambda: timed("packed", lambda: answer(model, rows, start, limit)[0]),
            "cache repeated": lambda: timed("cache repeated", lambda: in_batches(model, rows, start, limit, True))}
    if unshared:                                            # so slow, and the same for each: half of them will do
        ways["nothing shared"] = lambda: timed("nothing shared", lambda: in_batches(model, half, start, limit, False))
    n = len(os.path.commonprefix(rows))
    found = pairs(args.repeats, ways, prompt=path, prompt_tokens=n, questions=len(rows), limit=limit)
    same = {name: statistics.mean(a == b for a, b in zip(said["packed"], said[name])) for name in ways}
    print(f"share of answers identical to the packed ones: {same}")
    return [row | {"identical": same} for row in found]


def teacher(args, model, tokenizer):
    chats = (read_queries(QUERIES) * args.count)[:args.count]
    return [row for path in args.prompts[:2]
            for row in answering(args, model, path, fed(tokenizer, path, chats)[0], args.limit, unshared=True)]


def gsm8k(args, model, tokenizer):
    problems = [WORDING.format(question=chat[0]["content"]) for chat in read_queries(args.problems)[:args.count // 2]]
    path = args.prompts[:2][-1]
    rows, _ = fed(tokenizer, path, [[{"role": "user", "content": text}] for text in problems])
    return answering(args, model, path, rows, 4 * args.limit, unshared=False)


def step_speed(args, model, tokenizer):
    """At stage 2's own batch. The bound makes no logits, and reads its pads."""
    body, be = model.get_decoder(), torch.nn.Parameter(noise(model))
    full, rows = fed(tokenizer, args.prompts[0], read_queries(QUERIES)[:4])
    answers, target = answer(model, full, be, 32)
    optimizer = torch.optim.AdamW([be], lr=1e-3, weight_decay=0)
    whole = [row + a[:-1] for row, a in zip(rows, answers)]
    ids = torch.tensor([row + [0] * (max(map(len, whole)) - len(row)) for row in whole], device=model.device)
    embeds = embed(model, ids, be.detach()).requires_grad_()                                # (B, T, d)

    def bare():
        hidden = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        torch.autograd.grad(hidden, embeds, torch.ones_like(hidden))

    def timed(function):
        began = clock(model)
        function()
        return {"rows a second": len(rows) / (clock(model) - began)}

    return pairs(4 * args.repeats, {"stage 2": lambda: timed(lambda: step(model, rows, answers, target, be, optimizer)),
                                    "bare pass": lambda: timed(bare)}, warm=1, prompt=args.prompts[0], batch=len(rows))


def peak(args, full):
    """One step, in a process of its own -> the bytes it takes beyond what was held before, and the most held."""
    model, tokenizer = load_frozen(args.model, args.device)
    _, rows = fed(tokenizer, args.prompts[0], (read_queries(QUERIES) * args.batch)[:args.batch])
    be, answers = torch.nn.Parameter(noise(model)), [list(range(args.length)) for _ in rows]
    target, optimizer = [torch.randn(args.length, be.shape[1]) for _ in rows], torch.optim.AdamW([be], lr=1e-3)

    def held():
        """Bytes, at most and now: of the allocator, or as Linux counts this process."""
        if model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        lines = re.findall(r"Vm(?:HWM|RSS):\s+(\d+)", Path("/proc/self/status").read_text())
        return [1024 * int(line) for line in lines]

    step(model, rows[:1], [answers[0][:2]], [target[0][:2]], be, optimizer, full)           # weights leave their file
    before = held()[1]
    step(model, rows, answers, target, be, optimizer, full)
    return {"bytes of a step": held()[0] - before, "bytes with weights and all": held()[0]}


def memory(args, model, tokenizer):
    return pairs(args.repeats, {"stage 2": lambda: in_child(peak, args, False),
                                "full logits": lambda: in_child(peak, args, True)},
                 prompt=args.prompts[0], batch=args.batch, answer_tokens=args.length)


def serving(args, model, tokenizer):
    """Nothing is shared between the rows of a batch, as in a server without a prefix cache."""
    rows, be = [], noise(model)
    model.set_attn_implementation(model.long_rows)

    def serve(some):
        began = clock(model)
        stamps, caches = zip(*((clock(model), cache) for _, _, cache in greedy(model, some, be, args.new, stop=[])))
        size = sum(x.nbytes for layer in caches[-1].layers for x in (layer.keys, layer.values))
        return {"seconds to the first token": stamps[0] - began,
                "tokens a second": len(some) * args.new / (stamps[-1] - began), "bytes of cache": size}

    for path in args.prompts:
        for batch in (1, 8):
            full, short = fed(tokenizer, path, read_queries(QUERIES)[:batch])
            rows += pairs(args.repeats, {"[BE]": lambda s=short: serve(s), "full prompt": lambda f=full: serve(f)},
                          warm=batch == 1, prompt=path, prompt_tokens=len(full[0]) - len(short[0]) + 1, batch=batch)
    model.set_attn_implementation("sdpa")
    return rows


ITEMS = {"teacher": teacher, "step": step_speed, "memory": memory, "serving": serving, "gsm8k": gsm8k}


def measure(args, items):
    """items: {name: function -> rows}. Each one's rows go into --out as they come, beside what is there."""
    out, cpu = Path(args.out), Path("/proc/cpuinfo")
    try:
        results = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        fail(f"--out {out}: expected a place to write, or figures of an earlier run: {e}; give another --out")
    model, tokenizer = load_frozen(args.model, args.device)
    cpu = re.search(r"model name\s*:\s*(.+)|$", cpu.read_text() if cpu.exists() else "")[1] or platform.processor()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(model.device),
               "gpu": torch.cuda.is_available() and torch.cuda.get_device_name(), "dtype": str(model.dtype),
               "torch": torch.__version__, "transformers": transformers.__version__}
    for name, item in items.items():
        print(f"\n{name}", flush=True)
        about = {"model": args.model, "machine": machine, "load before": os.getloadavg()[0], "quick": args.quick}
        new = [row | about for row in item(args, model, tokenizer)]
        same = {(row["model"], row["prompt"]) for row in new}
        old = [row for row in results.get(name, []) if (row["model"], row["prompt"]) not in same]
        results[name] = old + new
        Path(f"{out}.tmp").write_text(json.dumps(results, indent=1) + "\n")
        os.replace(f"{out}.tmp", out)                       # whole or not at all
    print(f"\nwrote {out}")


if __name__ == "__main__":
    args = settings()
    measure(args, {name: ITEMS[name] for name in args.only})
