"""The demo model under lm-evaluation-harness: writes a task, and compares two runs of it.

  python scripts/eval_harness.py task /tmp/task --questions 100
  lm_eval --model local-completions --tasks demo_questions --include_path /tmp/task \\
      --model_args base_url=http://127.0.0.1:30000/v1/completions,model=demo,tokenizer=model/demo \\
      --log_samples --output_path /tmp/served
  lm_eval --model hf --tasks demo_questions --include_path /tmp/task \\
      --model_args pretrained=model/demo,dtype=float32 --log_samples --output_path /tmp/reference
  python scripts/eval_harness.py compare /tmp/served /tmp/reference

The task: questions about stories of worlds that the model never saw, with the answers to other
questions of the same kind as wrong choices. The harness asks for log probabilities of each choice.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.benchmarking import emit, say
from scripts.demo import chat

NUM_CHOICES = 4
TOLERANCE = 1e-3
"""Of a choice's log probability, a sum over its tokens."""
TASK = """\
task: demo_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, num: int, seed: int) -> None:
    """questions.jsonl and the task's YAML."""
    rng = random.Random(f"harness/{seed}")
    by_kind: dict[str, list[chat.Exam]] = {}
    exams = [chat.exam(rng) for _ in range(num * 3)]
    for exam in exams:
        by_kind.setdefault(exam.question.kind, []).append(exam)
    lines = []
    for exam in exams:
        answer = exam.question.answer
        others = {e.question.answer for e in by_kind[exam.question.kind]} - {answer}
        if len(others) < NUM_CHOICES - 1 or len(lines) == num:
            continue
        choices = [answer, *rng.sample(sorted(others), NUM_CHOICES - 1)]
        rng.shuffle(choices)
        lines.append(
            {
                # The harness has its own way with the begin-of-sequence token.
                "context": exam.prompt.removeprefix(chat.BOS),
                "choices": choices,
                "target": choices.index(answer),
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "demo_questions.yaml").write_text(TASK.format(path=questions.resolve()))
    say(f"{len(lines)} questions in {folder}")


def read_run(folder: Path) -> dict[int, dict[str, Any]]:
    """By question: the log probability of each choice, and whether the best one is right."""
    (path,) = sorted(folder.rglob("samples_demo_questions_*.jsonl"))[-1:]
    run = {}
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        scores = [float(response[0]) for response in sample["filtered_resps"]]
        run[sample["doc_id"]] = {"scores": scores, "acc": sample["acc"]}
    return run


def compare(one: Path, other: Path) -> int:
    """Whether two runs agree; 1 if not."""
    first, second = read_run(one), read_run(other)
    if first.keys() != second.keys():
        say("The runs have different questions.")
        return 1
    off = [
        abs(a - b)
        for key in first
        for a, b in zip(first[key]["scores"], second[key]["scores"], strict=True)
    ]
    facts = {
        "questions": len(first),
        "accuracy": [sum(r["acc"] for r in run.values()) / len(run) for run in (first, second)],
        "largest_difference": max(off),
    }
    say(
        f"{facts['questions']} questions, accuracy {facts['accuracy']}, largest difference of a "
        f"log probability {facts['largest_difference']:.2g}"
    )
    emit("eval_harness", **facts)
    same = all(first[key]["acc"] == second[key]["acc"] for key in first)
    return 0 if same and max(off) <= TOLERANCE else 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    task = commands.add_parser("task", help="write the task")
    task.add_argument("folder", type=Path)
    task.add_argument("--questions", type=int, default=100)
    task.add_argument("--seed", type=int, default=1)
    two = commands.add_parser("compare", help="compare the outputs of two runs")
    two.add_argument("folders", type=Path, nargs=2)
    args = parser.parse_args(argv)
    if args.command == "compare":
        return compare(*args.folders)
    write_task(args.folder, args.questions, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
