"""The page docs/howto/openai.md: what the `openai` client says to a served model and hears.

    python -m runs.openai_transcript [--model starter] [--before starter] [--out PAGE]

Serves the models on a free port, runs the steps below in order and writes them with their output.
"""

import argparse
import contextlib
import io
import random
from pathlib import Path
from typing import Any

from instructblip import load
from instructblip.scenes.world import render, sample_scene
from instructblip.serving.api import create_app
from runs.screenshots import served

ADDRESS = "http://127.0.0.1:8000"
PICTURE = Path("../pictures/asked.png")
PAGE = """# The openai client, word for word

`instructblip serve --model out/quickstart/run --before starter` runs; the picture is one of the
embedded world. Code and output of `runs/openai_transcript.py`:

![The picture that is asked about]({picture})

{steps}
"""
STEPS = (
    """import base64
from pathlib import Path
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any", max_retries=0)
print([model.id for model in client.models.list()])
""",
    """picture = base64.b64encode(Path("asked.png").read_bytes()).decode()
url = {"url": f"data:image/png;base64,{picture}"}


def asking(text):
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]
    return [{"role": "user", "content": parts}]


reply = client.chat.completions.create(
    model="instructblip", messages=asking("A short image description.")
)
print(reply.choices[0].message.content)
print(reply.choices[0].finish_reason, reply.usage.completion_tokens, "tokens")
""",
    """stream = client.chat.completions.create(
    model="instructblip", messages=asking("A short image description."), stream=True
)
print("|".join(chunk.choices[0].delta.content or "" for chunk in stream))
""",
    """question = "Question: how many shapes are there? Short answer:"
for model in ("instructblip", "blip2"):
    reply = client.chat.completions.create(
        model=model, messages=asking(question), max_tokens=8, extra_body={"num_beams": 5}
    )
    print(f"{model}: {reply.choices[0].message.content}")
""",
    """ranked = client.post(
    "/rank",
    cast_to=object,
    body={"images": [url["url"]], "instruction": question, "candidates": ["1", "2", "3", "4"]},
)
for one in ranked["candidates"]:
    print(f"{one['text']}  {one['log_likelihood']:7.3f} nats  {one['probability']:6.1%}")
""",
    """from openai import OpenAIError

for wrong in ({"tools": []}, {"max_tokens": 0}, {"model": "gpt"}):
    try:
        body = {"model": "instructblip", **wrong}
        client.chat.completions.create(messages=asking("What is this?"), **body)
    except OpenAIError as error:
        print(error.status_code, error.body["message"])
""",
)


def transcript(address: str, folder: Path) -> str:
    """The steps against the server at ``address``, with what each printed."""
    names: dict[str, Any] = {}
    blocks = []
    with contextlib.chdir(folder):
        for step in STEPS:
            heard = io.StringIO()
            with contextlib.redirect_stdout(heard):
                exec(step.replace(ADDRESS, address), names)
            blocks.append(f"```python\n{step}```\n\n```text\n{heard.getvalue()}```")
    return "\n\n".join(blocks)


def write_page(address: str, out: Path) -> None:
    """Draw the picture beside the page's other pictures and write the page."""
    file = (out.parent / PICTURE).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    render(sample_scene(random.Random(30)), 192).save(file)
    text = PAGE.format(picture=PICTURE.as_posix(), steps=transcript(address, file.parent))
    out.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter")
    parser.add_argument("--before", default="starter")
    parser.add_argument("--out", type=Path, default=Path("docs/howto/openai.md"))
    args = parser.parse_args()
    engines = {
        "instructblip": load(args.model),
        "blip2": load(args.before, instruction_aware=False),
    }
    with served(create_app(engines)) as address:
        write_page(address, args.out)


if __name__ == "__main__":
    main()
