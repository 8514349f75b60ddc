"""How decoders of transformers read, and the CPU time that it takes to find out (decision 0021).

python benchmarks/decoders.py [TYPE...]
"""

import json
import sys
import time

import transformers

from instructblip.model.language.fast import probe

TYPES = (
    *("llama", "qwen2", "qwen3", "gemma", "smollm3", "phi3", "mistral", "gemma3_text"),
    *("opt", "gpt2", "phi", "gpt_neox", "cohere", "olmo2", "starcoder2", "glm4", "mixtral"),
    *("bloom", "falcon", "mpt", "gptj", "stablelm", "gemma2", "mamba"),
)


def main(types: list[str]) -> None:
    print(f"transformers {transformers.__version__}")
    for kind in types or TYPES:
        values = transformers.AutoConfig.for_model(kind).to_dict()
        start = time.process_time()
        able, reason = probe._probe(json.dumps(values, sort_keys=True, default=str))
        seconds = time.process_time() - start
        ways = ", ".join(name for name, yes in able._asdict().items() if yes)
        print(f"{kind:12s} {seconds:5.2f} s  {ways or reason[:80]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
