"""Record what transformers answers with the bundled demo model (float32, greedy).

    python tests/record_demo.py        # needs torch and transformers, which no test does

Writes tests/data/demo_expected.json: chats, their prompt ids, 48 greedy tokens each.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

ROOT = Path(__file__).resolve().parent
STORY = (
    "Tom had a red kite. One windy day he took it to the hill. The kite flew into a tree. Tom was "
    "sad. His sister Mia climbed up and found the kite. Tom was happy again."
)
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "user", "content": "Tell me a story about a dog."}],
    [{"role": "user", "content": "Tell me a short story about a boat."}],
    [{"role": "user", "content": f"{STORY} Who found the kite?"}],
    [
        {"role": "user", "content": f"{STORY} Where did Tom take the kite?"},
        {"role": "assistant", "content": "Tom took the kite to the hill."},
        {"role": "user", "content": "What color was the kite?"},
    ],
]


def main() -> None:
    folder = ROOT.parent / "model" / "demo"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    recorded = []
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=1
            )
        tokens = out[0, len(prompt) :].tolist()
        answer = tokenizer.decode(tokens, skip_special_tokens=True)
        print(repr(answer))
        recorded.append(
            {"messages": messages, "prompt": prompt, "tokens": tokens, "answer": answer}
        )
    text = json.dumps({"chats": recorded}, ensure_ascii=False, indent=1)
    (ROOT / "data" / "demo_expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
