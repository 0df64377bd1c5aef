#!/usr/bin/env python3
"""Trains the demo model on make_corpus.py's shards and exports it as a Hugging Face model folder:
Flax NNX, AdamW, bfloat16 compute over float32 weights, DeepSeek-V3's bias-only router balancing
(arXiv:2412.19437, section 2.1.2), Orbax checkpoints. Started again it goes on where it was
killed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from model.checkpoint import export_tensors
from model.config import ModelConfig
from model.reference import forward
from model.transformer import Transformer
from scripts.demo import scoring
from scripts.demo.data import Shard, mixture, pack_rows

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "kv_lora_rank": 64,
    "max_position_embeddings": 2048,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 2,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 4096,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
ASSISTANT_ID = 4
LOG_EVERY = 20
METRICS = ("step", "tokens", "loss", "held_out", "answers", "imbalance", "minutes")

Params = nnx.State


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--corpus", type=Path, required=True, help="folder made by make_corpus.py")
    p.add_argument("--out", type=Path, required=True, help="model folder to write")
    p.add_argument("--checkpoints", type=Path, required=True, help="Orbax folder; resumes from it")
    p.add_argument("--steps", type=int, default=12_000, help="optimiser steps")
    p.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        help="end after this much training time (kills and resumes counted together); the learning"
        " rate follows whichever of steps and minutes is further",
    )
    p.add_argument("--stop-after", type=int, help="leave at this step, as if killed (for tests)")
    p.add_argument("--batch-tokens", type=int, default=65_536, help="tokens in a step")
    p.add_argument("--row", type=int, default=512, help="row length")
    p.add_argument("--long-row", type=int, default=2048, help="row length in the last part")
    p.add_argument("--long-share", type=float, default=0.2, help="part of training with long rows")
    p.add_argument("--prose-share", type=float, default=0.12, help="prose among the tokens")
    p.add_argument("--answer-weight", type=float, default=3.0, help="loss weight of replies")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=200, help="steps to the peak")
    p.add_argument("--weight-decay", type=float, default=0.1, help="on matrices")
    p.add_argument("--bias-speed", type=float, default=2e-3, help="router bias movement in a step")
    p.add_argument("--seed", type=int, default=1, help="of weights and order")
    p.add_argument(
        "--save-minutes", type=float, default=2.0, help="between checkpoints and exports"
    )
    p.add_argument("--eval-steps", type=int, default=500, help="between held-out measurements")
    p.add_argument("--tiny", action="store_true", help="a toy size, for trying the machinery")
    p.add_argument("--float32", action="store_true", help="compute in float32")
    return p


@dataclass
class Progress:
    """What a checkpoint stores beside arrays: where training is, and its curve."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies: not to norms, the router's bias and the embedding."""
    name = ".".join(map(str, path))
    return not ("norm" in name or name.endswith("router.bias") or name.startswith("embedding"))


def in_replies(tokens: jax.Array) -> jax.Array:
    """bool [B, T]: tokens of the assistant's replies, their EOS included."""
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    opened = jax.lax.cummax(jnp.where(tokens == ASSISTANT_ID, at, -1), axis=1)
    ends = (tokens == scoring.EOS) | (tokens == scoring.BOS)
    closed = jax.lax.cummax(jnp.where(ends, at, -1), axis=1)
    before = jnp.pad(closed, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return (opened > before) & (tokens != ASSISTANT_ID) & (tokens != scoring.BOS)


class Trainer:
    """Owns the weights, the optimiser's state and the jitted step."""

    def __init__(self, a: argparse.Namespace, config: dict[str, Any]) -> None:
        self.a, self.config = a, config
        self.compute = jnp.float32 if a.float32 else jnp.bfloat16
        model = Transformer(ModelConfig.from_hf(config), jnp.float32, nnx.Rngs(a.seed))
        self.graph, self.params = nnx.split(model, nnx.Param)
        paths = [path for path, _ in nnx.to_flat_state(self.params)]
        mask = nnx.from_flat_state(
            [(p, v.replace(is_matrix(p))) for p, v in nnx.to_flat_state(self.params)]
        )
        self.bias_paths = [p for p in paths if p[-2:] == ("router", "bias")]
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(a.weight_decay, mask),
        )
        self.opt_state = self.optimizer.init(self.params)
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def model(self, params: Params | None = None) -> Transformer:
        return nnx.merge(self.graph, self.params if params is None else params)

    def _cast(self, params: Params) -> Params:
        """Matrices in the compute dtype; the router stays float32."""
        flat = [
            (p, v if "router" in p else v.replace(v[...].astype(self.compute)))
            for p, v in nnx.to_flat_state(params)
        ]
        return nnx.from_flat_state(flat)

    def _step(
        self, params: Params, opt_state: Any, rows: jax.Array, lr: jax.Array, speed: jax.Array
    ) -> tuple[Params, Any, jax.Array, jax.Array]:
        """One step over rows u16 [B, T]; also the mean loss and expert counts [layers, E]."""
        rows = rows.astype(jnp.int32)
        weights = jnp.where(in_replies(rows)[:, 1:], self.a.answer_weight, 1.0)

        def loss_of(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits, counts = forward(self.model(self._cast(params)), rows[:, :-1])
            picked = jnp.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
            losses = jax.nn.logsumexp(logits, axis=-1) - picked
            return (losses * weights).sum() / weights.sum(), (losses.mean(), counts)

        grads, (loss, counts) = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
        return self._balance(params, counts, speed), opt_state, loss, counts

    def _balance(self, params: Params, counts: jax.Array, speed: jax.Array) -> Params:
        """Moves each expert's bias by `speed` against its load error, outside the loss."""
        flat = dict(nnx.to_flat_state(params))
        first = 0
        for path in self.bias_paths:
            bias = flat[path][...]
            load = counts[first : first + bias.shape[0]].astype(jnp.float32)
            error = load.mean(axis=-1, keepdims=True) - load
            flat[path] = flat[path].replace(bias + speed * jnp.sign(error))
            first += bias.shape[0]
        return nnx.from_flat_state(list(flat.items()))


class Checkpoints:
    """Orbax checkpoints of arrays and progress, newest two kept."""

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, trainer: Trainer, progress: Progress) -> None:
        arrays = jax.tree.leaves((trainer.params, trainer.opt_state))
        self.manager.save(
            progress.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave({str(i): x for i, x in enumerate(arrays)}),
                progress=ocp.args.JsonSave(vars(progress)),
            ),
        )
        self.manager.wait_until_finished()

    def restore(self, trainer: Trainer) -> Progress:
        """Loads the newest checkpoint into the trainer; a fresh start if there is none."""
        if (step := self.manager.latest_step()) is None:
            return Progress()
        arrays, structure = jax.tree.flatten((trainer.params, trainer.opt_state))
        like = {str(i): x for i, x in enumerate(arrays)}
        found = self.manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
            ),
        )
        leaves = [found["arrays"][str(i)] for i in range(len(arrays))]
        trainer.params, trainer.opt_state = jax.tree.unflatten(structure, leaves)
        return Progress(**found["progress"])


class Rows:
    """Packed rows of one length, an endless shuffled stream; its position is a step number."""

    def __init__(
        self, shard: Shard, ids: np.ndarray, length: int, batch_tokens: int, seed: int
    ) -> None:
        self.rows = pack_rows(shard, ids, length + 1, seed)
        self.batch = max(1, batch_tokens // length)
        self.seed, self.order, self.epoch = seed, np.zeros(0, np.int64), -1
        if len(self.rows) < self.batch:
            raise ValueError(
                f"The corpus has {len(self.rows)} rows of {length} tokens and a step takes"
                f" {self.batch}: make it larger or lower --batch-tokens."
            )

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, at = divmod(step, len(self.rows) // self.batch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.order, self.epoch = rng.permutation(len(self.rows)), epoch
        return self.rows[self.order[at * self.batch : (at + 1) * self.batch]]


def schedule(progress: float, step: int, a: argparse.Namespace) -> float:
    """Linear warm-up by steps, then a cosine over the whole of training to 2 % of the peak."""
    warm = min(1.0, (step + 1) / max(1, a.warmup))
    return a.lr * warm * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(1.0, progress))))


def export(trainer: Trainer, corpus: Path, out: Path, progress: Progress) -> None:
    """Writes the model folder: weights in bfloat16 (the router's bias in float32), config,
    tokenizer and loss plot."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.ascontiguousarray(
            t if name.endswith("e_score_correction_bias") else t.astype(ml_dtypes.bfloat16)
        )
        for name, t in export_tensors(trainer.model()).items()
    }
    part = out / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(out / "model.safetensors")
    write_json(out / "config.json", trainer.config)
    ids = {k: trainer.config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", {**ids, "do_sample": False})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((corpus / name).read_bytes())
    plot(progress, out / "loss.png")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def plot(progress: Progress, path: Path) -> None:
    """Loss over tokens; held-out loss and answer accuracy where they were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), dpi=90)
    for key, label in (("loss", "training"), ("held_out", "held-out worlds")):
        points = [(h["tokens"] / 1e6, h[key]) for h in progress.history if key in h]
        if points:
            ax.plot(*zip(*points, strict=True), label=label)
    ax.set(xlabel="million tokens", ylabel="loss per token (nats)", yscale="log")
    points = [(h["tokens"] / 1e6, h["answers"]) for h in progress.history if "answers" in h]
    if points:
        right = ax.twinx()
        right.plot(*zip(*points, strict=True), "k.-", lw=0.8, label="answers exactly right")
        right.set(ylim=(0, 1.02), ylabel="share of held-out questions")
        right.legend(loc="center right")
    ax.legend(loc="upper right")
    ax.grid(alpha=0.3, which="both")
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


class HeldOut:
    """What is measured now and then on held-out worlds: loss, exact answers, expert use."""

    def __init__(self, corpus: Path, config: dict[str, Any], row: int) -> None:
        shard = Shard.load(corpus, "world-heldout")
        self.rows = pack_rows(shard, np.arange(len(shard)), row, 0)[:64]
        self.batch = min(32, len(self.rows))
        tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
        longest = min(512, config["max_position_embeddings"])
        n = 256 if config["hidden_size"] > 100 else 16
        exams = scoring.exams(1, n, longest=longest, tokenizer=tokenizer)
        self.prompts = [tokenizer.encode(e.prompt).ids for e in exams]
        self.gold = [[*tokenizer.encode(e.question.answer).ids, scoring.EOS] for e in exams]
        self.exam_rows = np.zeros((n, longest), np.int32)
        for row_, p, g in zip(self.exam_rows, self.prompts, self.gold, strict=True):
            row_[: len(p) + len(g)] = p + g

    def measure(self, model: Transformer) -> dict[str, float]:
        loss, counts = scoring.mean_loss(model, self.rows, self.batch)
        best = np.asarray(scoring.best_tokens(model, jnp.asarray(self.exam_rows)))
        exact = [
            best[i, len(p) - 1 : len(p) + len(g) - 1].tolist() == g
            for i, (p, g) in enumerate(zip(self.prompts, self.gold, strict=True))
        ]
        return {
            "held_out": loss,
            "answers": float(np.mean(exact)),
            "imbalance": max(scoring.imbalance(counts)),
        }


def batches(a: argparse.Namespace, progress: Progress) -> Iterator[tuple[np.ndarray, float]]:
    """The rows of every further step and how far training is (0 to 1); stops at the end."""
    world, prose = Shard.load(a.corpus, "world-train"), Shard.load(a.corpus, "prose-train")
    both, ids = mixture(world, prose, a.prose_share)
    short = Rows(both, ids, a.row, a.batch_tokens, a.seed)
    long = Rows(both, ids, a.long_row, a.batch_tokens, a.seed + 1) if a.long_share > 0 else short
    while True:
        done = max(progress.step / a.steps, progress.seconds / 60 / a.max_minutes)
        if done >= 1:
            return
        yield (short if done < 1 - a.long_share else long)[progress.step], done


def train(a: argparse.Namespace) -> None:
    config = CONFIG | (TINY if a.tiny else {})
    tokenizer = Tokenizer.from_file(str(a.corpus / "tokenizer.json"))
    config["vocab_size"] = -(-tokenizer.get_vocab_size() // 8) * 8
    trainer, checkpoints = Trainer(a, config), Checkpoints(a.checkpoints)
    progress = checkpoints.restore(trainer)
    size = sum(x.size for x in jax.tree.leaves(trainer.params))
    print(f"{size / 1e6:.2f}M parameters, step {progress.step}, {jax.devices()[0].device_kind}")
    held_out = HeldOut(a.corpus, config, a.row)
    stream = batches(a, progress)
    first = next(stream, None)
    begin, saved = time.monotonic() - progress.seconds, time.monotonic()
    with tqdm(total=a.steps, initial=progress.step, unit="step", mininterval=5) as bar:
        while first is not None:
            rows, done = first
            lr, speed = schedule(done, progress.step, a), a.bias_speed * (1.02 - done)
            trainer.params, trainer.opt_state, loss, _ = trainer.step(
                trainer.params, trainer.opt_state, rows, np.float32(lr), np.float32(speed)
            )
            progress.step += 1
            progress.tokens += rows.shape[0] * (rows.shape[1] - 1)
            measure = progress.step % a.eval_steps == 0
            if measure or progress.step % LOG_EVERY == 0 or progress.step == 1:
                point = {"step": progress.step, "tokens": progress.tokens, "loss": float(loss)}
                if measure:
                    point |= held_out.measure(trainer.model())
                    tqdm.write(json.dumps(point))
                progress.history.append(point)
                bar.set_postfix(loss=f"{point['loss']:.3f}", tokens=f"{progress.tokens / 1e6:.0f}M")
            progress.seconds = time.monotonic() - begin  # the host runs only few steps ahead
            bar.update()
            if progress.step == a.stop_after:
                checkpoints.save(trainer, progress)
                print(f"Left at step {progress.step}.")
                return
            if time.monotonic() - saved > a.save_minutes * 60:
                checkpoints.save(trainer, progress)
                export(trainer, a.corpus, a.out, progress)
                saved = time.monotonic()
            first = next(stream, None)
    progress.seconds = time.monotonic() - begin
    if not progress.history or "held_out" not in progress.history[-1]:
        last = {"step": progress.step, "tokens": progress.tokens}
        progress.history.append(last | held_out.measure(trainer.model()))
    if checkpoints.manager.latest_step() != progress.step:
        checkpoints.save(trainer, progress)
    export(trainer, a.corpus, a.out, progress)
    last = {k: round(v, 4) for k, v in progress.history[-1].items() if k in METRICS}
    print(json.dumps(last | {"minutes": round(progress.seconds / 60, 2), "parameters": size}))


if __name__ == "__main__":
    train(arguments().parse_args())
