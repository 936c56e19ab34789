"""Time to quality: stage 2 from its command line to --target of the held-out gap, against the recipe that one writes
first: one question a step, which the teacher answers anew, full logits, a fixed rate, a vector in the model's dtype.

    python results/quality.py --prompt data/rolellm/Jack_Sparrow.txt --target 0.45            # -> out/bench.json
    python results/quality.py --quick --out /tmp/bench.json                 # does it run? its numbers mean nothing

Both are judged on the same held-out queries, by the answers of the same teacher. In --out stand, for each seed, the
curve of each (seconds, steps, best gap closed so far) and how many times sooner ours was done.
"""
import argparse, random, re, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from bench import fed, greedy, in_child, measure, noise, spread, step           # it puts the stages on the path, too
from stage2_kd import HeadKL, answer_hidden, chat_ids, fail, load_frozen, read_queries


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--prompt", default="prompts/pirate.txt", help="the system prompt")
    add("--queries", help="None is NAME.queries.txt beside the prompt")
    add("--model", default="models/smollm2-135m", help="hub name or folder of a Llama or Qwen chat model")
    add("--target", type=float, default=0.5, help="the share of the held-out gap to close")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a pair for each")
    add("--stage2", default="--init noise --lam 1 --eval-every 20", help="what stage2_kd.py is told")
    add("--naive-lr", type=float, nargs="+", default=[0.01, 0.03, 0.1], help="short runs of each choose one")
    add("--naive-minutes", type=float, default=20, help="after so many the naive recipe gives up")
    add("--out", default="out/bench.json", help="the figures, beside those of bench.py")
    add("--device", default="auto", help="cuda, mps or cpu")
    add("--quick", action="store_true", help="two steps of each, to see that it runs")
    p.set_defaults(tune=40)
    args = p.parse_args()
    args.queries = args.queries or re.sub(r"\.(txt|json|md)$", "", args.prompt) + ".queries.txt"
    if args.quick:
        vars(args).update(seeds=[0], naive_lr=[0.1], naive_minutes=0, tune=2,
                          stage2="--init noise --lam 1 --steps 2 --answer-tokens 4")
    return args


def held_out(args, model, tokenizer, folder, seed, n):
    """On the teacher's answers that stage 2 has left in folder -> all rows with the prompt, all rows with [BE], and how
    a vector is judged: the share of the gap that it closes on the first n queries, held out."""
    chats, weight = read_queries(args.queries), model.get_output_embeddings().weight
    random.Random(seed).shuffle(chats)
    full, rows = fed(tokenizer, args.prompt, chats)
    answers, target = torch.load(next(Path(folder).glob("teacher-*.pt")), weights_only=True).values()

    @torch.no_grad()
    def kl(some, vector):
        student = answer_hidden(model, some[:n], answers[:n], vector)
        return HeadKL.apply(student, torch.cat(target[:n]).to(student), weight, 1.0).sum().item()

    none = kl([chat_ids(tokenizer, [{"role": "system", "content": []}] + chat) for chat in chats], noise(model))
    return full, rows, lambda vector: 1 - kl(rows, vector) / none


def ours(args, folder, seed):
    """stage2_kd.py from its command line on, stopped at the target -> seconds, steps and gap closed at each save."""
    out, seen, curve, began = Path(folder) / "be.pt", 0, [], time.time()
    script = Path(__file__).resolve().parent.parent / "stage2_kd.py"
    command = [sys.executable, script, "--prompt", args.prompt, "--queries", args.queries, "--out", out,
               "--model", args.model, "--device", args.device, "--seed", str(seed), *args.stage2.split()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while not curve or curve[-1][2] < args.target:
            running = run.poll() is None                    # asked first: a save after it is not missed
            if out.exists() and out.stat().st_mtime_ns != seen:
                seen, seconds, saved = out.stat().st_mtime_ns, time.time() - began, torch.load(out, weights_only=True)
                gap = 1 - saved["metrics"]["held-out KL"] / saved["metrics"]["no prompt"]
                curve.append((seconds, saved["run"]["step"], gap))
                print(f"  ours, seed {seed}: seconds, steps, gap closed: {curve[-1]}", flush=True)
            elif not running:
                break
            time.sleep(0.01)
        run.kill()
    return curve, saved if curve else fail("stage2_kd.py did not come to its first save; see above")


def naive(args, folder, seed, n, lr, steps, began):
    """In a process of its own. At each step the teacher answers one question anew and reads all of the prompt for it;
    full logits, a fixed rate, a vector of the model's own dtype. The clock stands while it is judged -> as ours."""
    model, tokenizer = load_frozen(args.model, args.device)
    now = time.time()
    full, rows, gap = held_out(args, model, tokenizer, folder, seed, n)
    began += time.time() - now
    be, stop, curve = torch.nn.Parameter(noise(model, seed).to(model.dtype)), model.generation_config.eos_token_id, []
    optimizer, rng = torch.optim.AdamW([be], lr=lr, weight_decay=0), random.Random(seed)
    for done in range(1, steps + 1):
        i = rng.randrange(n, len(rows))
        ids, hidden, _ = zip(*greedy(model, [full[i]], be.detach(), 32, stop))
        step(model, [rows[i]], [torch.cat(ids).tolist()], hidden, be, optimizer, full=True)
        if done % min(20, args.tune) == 0:
            now = time.time()
            curve.append((now - began, done, max([gap(be.detach())] + [c[2] for c in curve])))      # the best, as ours
            print(f"  naive, seed {seed}, lr {lr}: seconds, steps, gap closed: {curve[-1]}", flush=True)
            if steps > args.tune and (curve[-1][2] >= args.target or now - began > 60 * args.naive_minutes):
                break
            began += time.time() - now
    return curve


def quality(args, model, tokenizer):
    """The naive recipe's rate is the best of short runs on the first seed, which are not counted."""
    rows, more = [], {"what": "seconds to quality", "prompt": args.prompt, "target": args.target}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            mine, saved = ours(args, folder, seed)
            n, vector = saved["metrics"]["n"], saved["vector"].to(model.device)
            again = held_out(args, model, tokenizer, folder, seed, n)[2](vector)
            if seed == args.seeds[0]:
                tuned = {lr: in_child(naive, args, folder, seed, n, lr, args.tune, time.time()) for lr in args.naive_lr}
                lr = max(tuned, key=lambda lr: tuned[lr][-1][2])
            theirs = in_child(naive, args, folder, seed, n, lr, 10 ** 6, time.time())
        rows.append({**more, "seed": seed, "held_out": n, "ours": mine, "ours judged here": again, "naive": theirs,
                     "naive lr": lr, "reached": [curve[-1][2] >= args.target for curve in (mine, theirs)],
                     "times faster than naive": theirs[-1][0] / mine[-1][0]})
        print({k: v for k, v in rows[-1].items() if k not in ("ours", "naive")}, flush=True)
    return rows + [{**more, "times faster than naive": spread([row["times faster than naive"] for row in rows])}]


if __name__ == "__main__":
    measure(settings(), {"quality": quality})
