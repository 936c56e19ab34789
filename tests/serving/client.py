"""Chat completions with the openai package, which stands in the server's venv: jobs as json on stdin, answers as json on stdout."""
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import openai

work = json.load(sys.stdin)
client = openai.OpenAI(base_url=work["url"], api_key="none", timeout=300, max_retries=0)


def create(job):
    row = {"text": None, "ids": None, "prompt_ids": None, "pieces": [], "reason": None, "usage": None, "status": 200, "error": None}
    try:
        if job.get("stream"):
            for chunk in client.chat.completions.create(**job):
                for choice in chunk.choices:
                    row["pieces"] += [choice.delta.content] if choice.delta.content else []
                    row["reason"] = choice.finish_reason or row["reason"]
            return row | {"text": "".join(row["pieces"])}
        answer = client.chat.completions.create(**job)
    except openai.APIStatusError as e:
        return row | {"status": e.status_code, "error": str(e)}
    choice = answer.choices[0]
    return row | {"text": choice.message.content, "reason": choice.finish_reason, "usage": answer.usage.model_dump(),
                  "ids": getattr(choice, "token_ids", None), "prompt_ids": getattr(answer, "prompt_token_ids", None)}


with ThreadPoolExecutor(work["at_once"]) as pool:
    json.dump(list(pool.map(create, work["jobs"])), sys.stdout)
