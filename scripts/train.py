"""Train the bundled demo model: a small DeepSeek-V3 on the corpus of `make_corpus.py`.

The network is `model.reference` (naive attention, every expert on every token) with float32 master
weights and bfloat16 arithmetic. Experts are balanced without an auxiliary loss, by DeepSeek-V3's
rule (arXiv:2412.19437, section 2.1.2): after each step the router's correction bias moves a fixed
amount against the load error. Stops by the clock or after --steps, resumes from its last checkpoint,
and exports a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from safetensors.numpy import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import reference
from model.checkpoint import export_tensors, parameter_path
from model.config import ModelConfig
from model.transformer import Transformer
from scripts.demo.data import Shard, mixture, pack_rows

HF_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 320,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "kv_lora_rank": 64,
    "max_position_embeddings": 1024,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
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
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": True,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 4096,
}
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
}
WARMUP_STEPS = 200
DECAY_FROM = 0.5
"""The learning rate falls linearly to a fiftieth over the last part of the run, from here on."""


class TrainState(NamedTuple):
    """What a checkpoint holds: float32 weights by path, Adam's moments, steps and minutes done."""

    params: Any
    opt_state: Any
    step: jax.Array
    minutes: jax.Array


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True, help="folder made by make_corpus.py")
    p.add_argument("--out", type=Path, required=True, help="model folder to write")
    p.add_argument("--work", type=Path, required=True, help="checkpoints and log; to resume from")
    p.add_argument("--steps", type=int, default=100_000, help="stop after as many steps")
    p.add_argument("--max-minutes", type=float, default=60.0, help="or after as many minutes")
    p.add_argument("--batch", type=int, default=64, help="rows a step")
    p.add_argument("--length", type=int, default=1024, help="tokens a row (and the context)")
    p.add_argument("--learning-rate", type=float, default=3e-3, help="peak")
    p.add_argument("--weight-decay", type=float, default=0.1, help="of matrices")
    p.add_argument("--bias-speed", type=float, default=1e-3, help="router bias change a step")
    p.add_argument("--prose-share", type=float, default=0.12, help="of all tokens")
    p.add_argument("--save-minutes", type=float, default=2.0, help="between checkpoints")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument(
        "--override", type=json.loads, default={}, help="JSON merged into config.json (small tests)"
    )
    return p


def rows_forever(rows: np.ndarray, batch: int, seed: int, skip: int) -> Iterator[np.ndarray]:
    """Batches i32 [batch, length], every row once a pass; `skip` batches were used before."""
    per_pass = len(rows) // batch
    if not per_pass:
        raise SystemExit(f"train.py: error: the data has {len(rows)} rows, --batch is {batch}.")
    number = skip
    while True:
        order = np.random.default_rng(seed + number // per_pass).permutation(len(rows))
        for at in range(number % per_pass, per_pass):
            yield rows[order[at * batch : (at + 1) * batch]].astype(np.int32)
            number += 1


def is_bias(path: tuple[Any, ...]) -> bool:
    return parameter_path(path).endswith("router.bias")


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW with clipping, without the learning rate: the step scales by it (it follows a clock)."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            weight_decay, mask=lambda params: {path: v.ndim > 2 for path, v in params.items()}
        ),
    )


def make_step(config: ModelConfig, optimizer: optax.GradientTransformation, bias_speed: float):  # noqa: ANN201
    """(state, rows i32 [B, T], learning rate) -> (state, loss, expert counts i32 [L_moe, E])."""
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, jnp.dtype(jnp.float32), nnx.Rngs(0))), nnx.Param
    )
    paths = [path for path, _ in nnx.to_flat_state(abstract)]
    bias_paths = [parameter_path(path) for path in paths if is_bias(path)]

    def merge(params: dict[str, jax.Array]) -> Transformer:
        """bfloat16 everywhere but in the router, whose decisions are taken in float32."""
        values = [
            params[parameter_path(path)]
            if "router" in path
            else params[parameter_path(path)].astype(jnp.bfloat16)
            for path in paths
        ]
        leaves, tree = jax.tree.flatten(abstract)
        assert len(leaves) == len(values)
        return nnx.merge(graph, jax.tree.unflatten(tree, values))

    def loss_fn(params: dict[str, jax.Array], rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, counts = reference.forward(merge(params), rows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return losses.mean(), counts

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, rows: jax.Array, rate: jax.Array):  # noqa: ANN202
        (loss, counts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, rows)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = {path: value - rate * updates[path] for path, value in state.params.items()}
        first = 0
        for path in bias_paths:
            old = state.params[path]  # [layers, E]
            load = counts[first : first + old.shape[0]].astype(jnp.float32)
            first += old.shape[0]
            error = load.mean(axis=-1, keepdims=True) - load
            params[path] = old + bias_speed * jnp.sign(error)
        state = TrainState(params, opt_state, state.step + 1, state.minutes)
        return state, loss, counts

    return step


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Warm-up by steps, then flat, then linear decay by `progress` (0 to 1) of steps or clock."""
    decay = 1.0 - (1 - 1 / 50) * max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * max(decay, 1 / 50)


def fresh_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Newly drawn float32 weights by path."""

    @jax.jit
    def draw() -> dict[str, jax.Array]:
        model = Transformer(config, jnp.dtype(jnp.float32), nnx.Rngs(seed))
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {parameter_path(path): variable[...] for path, variable in flat}

    params = draw()
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.float32(0))


def export(config: ModelConfig, hf: dict[str, Any], params: dict[str, Any], out: Path) -> None:
    """Weights (bfloat16, the router's bias float32) and configuration as a checkpoint folder."""
    model = Transformer(config, jnp.dtype(jnp.bfloat16), nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = parameter_path(path)
        variable[...] = params[name].astype(variable[...].dtype)
        nnx.update(model, nnx.from_flat_state([(path, variable)]))
    out.mkdir(parents=True, exist_ok=True)
    tensors = export_tensors(model)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")


def plot(log: list[dict[str, float]], file: Path) -> None:
    """Loss over steps, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=100)
    axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


class Trainer:
    """One run: the state, its checkpoints, its log, the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        vocab = json.loads((args.data / "corpus.json").read_text())["vocab_size"]
        sizes = {"vocab_size": vocab, "max_position_embeddings": args.length}
        self.hf = {**HF_CONFIG, **sizes, **args.override}
        self.config = ModelConfig.from_hf(self.hf)
        optimizer = make_optimizer(args.weight_decay)
        self.step_fn = make_step(self.config, optimizer, args.bias_speed)
        self.state = fresh_state(self.config, optimizer, args.seed)
        self.log: list[dict[str, float]] = []
        self.manager = ocp.CheckpointManager(
            (args.work / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
        )
        if (latest := self.manager.latest_step()) is not None:
            restored = self.manager.restore(
                latest, args=ocp.args.StandardRestore(self.state._asdict())
            )
            self.state = TrainState(**restored)
            lines = (args.work / "log.jsonl").read_text().splitlines()
            self.log = [e for e in map(json.loads, lines) if e["step"] <= latest]
            print(f"resumed at step {latest}", flush=True)

    @property
    def num_parameters(self) -> int:
        return sum(value.size for value in self.state.params.values())

    def save(self, minutes: float) -> None:
        self.state = self.state._replace(minutes=jnp.float32(minutes))
        step = int(self.state.step)
        if self.manager.latest_step() != step:
            self.manager.save(step, args=ocp.args.StandardSave(self.state._asdict()))
            self.manager.wait_until_finished()
        text = "".join(json.dumps(entry) + "\n" for entry in self.log)
        (self.args.work / "log.jsonl").write_text(text)

    def export(self) -> None:
        args = self.args
        export(self.config, self.hf, self.state.params, args.out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(args.data / name, args.out / name)
        plot(self.log, args.out / "loss.png")

    def run(self, rows: np.ndarray) -> None:
        """Train until the steps or the minutes are used up; save and export at the end."""
        args, before = self.args, float(self.state.minutes)
        started = last_save = time.monotonic()
        first = step = int(self.state.step)
        batches = rows_forever(rows, args.batch, args.seed, skip=step)
        pending: list[tuple[int, jax.Array, jax.Array]] = []
        bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=5, smoothing=0.05)
        while step < args.steps:
            minutes = before + (time.monotonic() - started) / 60
            progress = max(step / args.steps, minutes / args.max_minutes)
            if minutes >= args.max_minutes:
                break
            rate = learning_rate(step, progress, args.learning_rate)
            self.state, loss, counts = self.step_fn(self.state, next(batches), rate)
            step += 1
            bar.update()
            pending.append((step, loss, counts))
            if len(pending) == 20 or step == args.steps:
                self._note(pending, bar)
                pending = []
            if step == first + 1:
                loss.block_until_ready()
                started += time.monotonic() - started  # compiling is not training
            if time.monotonic() - last_save > args.save_minutes * 60:
                self.save(minutes)
                last_save = time.monotonic()
        bar.close()
        if pending:
            self._note(pending, bar)
        self.save(before + (time.monotonic() - started) / 60)
        self.export()

    def _note(self, pending: list[tuple[int, jax.Array, jax.Array]], bar: tqdm) -> None:
        """Log the mean loss and the expert balance of the last steps (waits for them)."""
        loss = float(np.mean([float(loss) for _, loss, _ in pending]))
        counts = np.sum([np.asarray(c) for _, _, c in pending], axis=0)
        balance = float((counts.max(axis=1) / counts.mean(axis=1)).max())
        self.log.append({"step": pending[-1][0], "loss": loss, "max_over_mean": balance})
        bar.set_postfix(loss=f"{loss:.3f}", balance=f"{balance:.2f}")


def main() -> None:
    args = arguments().parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    shard, ids = mixture(
        Shard.load(args.data, "world-train"), Shard.load(args.data, "prose-train"), args.prose_share
    )
    rows = pack_rows(shard, ids, args.length + 1, args.seed)
    print(
        f"{trainer.num_parameters / 1e6:.2f} M parameters, {len(rows)} rows of {args.length} tokens"
        f" ({rows.size / 1e6:.1f} M tokens a pass) on {jax.devices()[0].device_kind}",
        flush=True,
    )
    trainer.run(rows)
    step = int(trainer.state.step)
    summary = {
        "steps": step,
        "tokens": step * args.batch * args.length,
        "minutes": round(float(trainer.state.minutes), 2),
        "parameters": trainer.num_parameters,
        "loss": trainer.log[-1]["loss"],
        "max_over_mean": trainer.log[-1]["max_over_mean"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
