"""Write docs/howto/openai.md: code of the `openai` client with the output of a served model.

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
IMAGE = Path("../pictures/asked.png")
PAGE = """# The openai client, a transcript

This page has the code and output of `runs/openai_transcript.py` with the server
`instructblip serve --model out/quickstart/run --before starter`. The image is from Scenes:

![The image of the questions]({image})

{steps}

`reply.usage.prompt_tokens_lost` is 0 unless the prompt, such as a conversation of many turns, is
too long for the model: then it is the number of tokens cut at the beginning.
"""
STEPS = (
    """import base64
from pathlib import Path
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="any", max_retries=0)
print([model.id for model in client.models.list()])
""",
    """image = base64.b64encode(Path("asked.png").read_bytes()).decode()
url = {"url": f"data:image/png;base64,{image}"}


def with_image(text):
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]
    return [{"role": "user", "content": parts}]


reply = client.chat.completions.create(
    model="instructblip", messages=with_image("A short image description.")
)
print(reply.choices[0].message.content)
print(reply.choices[0].finish_reason, reply.usage.completion_tokens, "tokens")
""",
    """stream = client.chat.completions.create(
    model="instructblip", messages=with_image("A short image description."), stream=True
)
print("|".join(chunk.choices[0].delta.content or "" for chunk in stream))
""",
    """question = "Question: how many shapes are there? Short answer:"
for model in ("instructblip", "blip2"):
    reply = client.chat.completions.create(
        model=model, messages=with_image(question), max_tokens=8, extra_body={"num_beams": 5}
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

for wrong in ({"n": 2}, {"max_tokens": 0}, {"model": "gpt"}):
    try:
        body = {"model": "instructblip", **wrong}
        client.chat.completions.create(messages=with_image("What is this?"), **body)
    except OpenAIError as error:
        print(error.status_code, error.body["message"])
""",
)


def transcript(address: str, folder: Path) -> str:
    """Run the steps against the server at ``address``; return them with their output."""
    names: dict[str, Any] = {}
    blocks = []
    with contextlib.chdir(folder):
        for step in STEPS:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(step.replace(ADDRESS, address), names)
            blocks.append(f"```python\n{step}```\n\n```text\n{output.getvalue()}```")
    return "\n\n".join(blocks)


def write_page(address: str, out: Path) -> None:
    """Render the image into the folder of the docs' images and write the page."""
    file = (out.parent / IMAGE).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    render(sample_scene(random.Random(30)), 192).save(file)
    text = PAGE.format(image=IMAGE.as_posix(), steps=transcript(address, file.parent))
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
