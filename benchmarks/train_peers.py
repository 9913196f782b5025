"""The same small Llama trained here and by its peers on a CPU, in turn, and the ratios of time and memory.

    python benchmarks/train_peers.py --rounds 3 --json results.json

Every arm starts from one frozen init.safetensors (random, Hugging Face names, tied embedding) and takes the
same batches of one tokens.npy [steps, B, S+1] in the same order, float32, AdamW, gradients clipped at 1.0,
constant learning rate, one process. Each arm runs in a process of its own, in interleaved rounds.

    slm, slm_compiled          this project: its engine and model over DeepSpeed, as `slm train` uses them
    hf_ds, hf_ds_compiled      Hugging Face Trainer + DeepSpeed (the same ZeRO JSON), torch_compile=True
    plain                      transformers' LlamaForCausalLM and torch AdamW in a bare loop
    floor                      only the matrix products of the step: forward, dgrad and wgrad of each linear

How the work is kept equal. Transformers shifts `labels` inside its loss, so S tokens give S-1 targets, or S+1
tokens cost one position more. Its loss also takes `shift_labels`, already shifted: the peers get S input
tokens and the S next tokens as `shift_labels` (and as `labels`, which only switches the loss on). So all
arms compute S positions with S targets. Trainer: sequential sampling, no logging, saving, evaluation or
data workers inside the run. The peers get what makes them fast: SDPA attention, no KV cache, and torch's
fused AdamW. (DeepSpeed's own "optimizer" block with torch_adam would merge Trainer's decay groups into one,
which is other work; so Trainer makes the optimizer, as it does by default.) One-dimensional weights are
not decayed in any arm; each arm reports its groups and they must agree.

Time: a step ends when its weights are updated; the figure is the median distance of two such ends after
the warm-up, so data loading and all overhead count and compilation does not. Memory: peak resident memory
above the resident memory after the imports (VmHWM, cleared through /proc/self/clear_refs).
If the losses differ from the plain loop's (1e-5 relative at step 1, 1e-3 at step 30), no ratio is printed
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from side_by_side import (
    REPOSITORY,
    ArmFailed,
    Meter,
    Results,
    Spread,
    loss_problems,
    machine,
    ratio,
    run_arm,
    run_rounds,
    slm_batches,
    slm_engine,
    slm_step,
)

BATCH, SEQ_LEN = 4, 512
MODEL: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024, "max_position_embeddings": SEQ_LEN,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
OPTIM: dict[str, Any] = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, grad_clip=CLIP)
ARMS = ["slm", "slm_compiled", "hf_ds", "hf_ds_compiled", "plain", "floor"]
PAIRS = [  # ours, peer, the tokens/s ratio and the memory ratio that this project aims at
    ("slm", "hf_ds", 1.15, 0.6), ("slm_compiled", "hf_ds_compiled", 1.3, 0.6),
    ("slm", "plain", None, None), ("slm_compiled", "plain", None, None),
]  # fmt: skip
FULL_CHECK_STEP = 30


# --- what the arms are given ------------------------------------------------------------------------------


def make_tokens(steps: int, seed: int = 0) -> Any:
    """int32 [steps, BATCH, SEQ_LEN + 1] of text-like data that can be learned: frequencies after Zipf, and
    each token is followed by its own fixed successor six times out of ten."""
    import numpy as np

    rng = np.random.default_rng(seed)
    vocab, rows = MODEL["vocab_size"], steps * BATCH
    frequency = 1.0 / np.arange(1, vocab + 1)
    names = rng.permutation(vocab)  # so that a token's id does not tell its rank
    drawn = names[rng.choice(vocab, size=(rows, SEQ_LEN + 1), p=frequency / frequency.sum())]
    follows = rng.random((rows, SEQ_LEN + 1)) < 0.6
    successor = rng.permutation(vocab)
    for t in range(1, SEQ_LEN + 1):
        drawn[:, t] = np.where(follows[:, t], successor[drawn[:, t - 1]], drawn[:, t])
    return drawn.reshape(steps, BATCH, SEQ_LEN + 1).astype(np.int32)


def prepare(work: Path, steps: int) -> dict[str, Any]:
    """Write init/ (config.json, model.safetensors) and tokens.npy, once for all arms."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, bos_token_id=None, eos_token_id=None, dtype="float32"))
    model.save_pretrained(work / "init")
    np.save(work / "tokens.npy", make_tokens(steps))
    return {"num_parameters": sum(p.numel() for p in model.parameters())}


def linear_shapes() -> list[tuple[int, int]]:
    """(out, in) of every linear of one step, the tied head included."""
    E, F, D = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["head_dim"]
    q, kv = MODEL["num_attention_heads"] * D, MODEL["num_key_value_heads"] * D
    block = [(q, E), (kv, E), (kv, E), (E, q), (F, E), (F, E), (E, F)]
    return block * MODEL["num_hidden_layers"] + [(MODEL["vocab_size"], E)]


def product_flops() -> int:
    return 6 * BATCH * SEQ_LEN * sum(out * into for out, into in linear_shapes())


def zero_json(stage: int) -> Path:
    """The ZeRO strategy that both DeepSpeed arms run: this project's own JSON."""
    return REPOSITORY / "ds_configs" / f"zero{stage}.json"


# --- the arms ---------------------------------------------------------------------------------------------


def next_token_batch(tokens: Any, step: int) -> dict[str, Any]:
    """One batch as transformers takes it (see the module's docstring about shift_labels)."""
    import torch

    tokens_BS1 = torch.from_numpy(tokens[step].astype("int64"))
    labels_BS = tokens_BS1[:, 1:].contiguous()
    return {"input_ids": tokens_BS1[:, :-1].contiguous(), "labels": labels_BS, "shift_labels": labels_BS}


def decay_groups(named_parameters: Any, decayed: set[str]) -> dict[str, int]:
    """Numbers that weight decay applies to, and that it does not."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in named_parameters}  # ZeRO-3 empties p
    return {
        "decayed": sum(n for name, n in sizes.items() if name in decayed),
        "not_decayed": sum(n for name, n in sizes.items() if name not in decayed),
    }


def load_hf(work: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        work / "init", dtype=torch.float32, attn_implementation="sdpa", use_cache=False
    )


def arm_plain(job: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """transformers' model, torch's fused AdamW, nothing else."""
    import numpy as np
    import torch

    tokens, model = np.load(job.work / "tokens.npy", mmap_mode="r"), load_hf(job.work).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip
    for step in range(job.steps):
        loss = model(**next_token_batch(tokens, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(loss.item())
    decayed = {name for name, p in model.named_parameters() if p.ndim >= 2}
    return meter.result(decay_groups(model.named_parameters(), decayed))


def arm_hf_ds(job: argparse.Namespace, meter: Meter, compiled: bool) -> dict[str, Any]:
    """Hugging Face Trainer over DeepSpeed."""
    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens = np.load(job.work / "tokens.npy", mmap_mode="r")

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return job.steps * BATCH

        def __getitem__(self, i: int) -> dict[str, Any]:
            batch = next_token_batch(tokens, i // BATCH)
            return {name: value[i % BATCH] for name, value in batch.items()}

    class StepEnds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.step(trainer.last_loss.item())

    class KeepsLoss(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    deepspeed_config = {
        "zero_optimization": json.loads(zero_json(job.zero).read_text())["zero_optimization"],
        "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1, "gradient_clipping": CLIP,
        "steps_per_print": 10**9, "wall_clock_breakdown": False,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(job.work / "hf_output"), use_cpu=True,
        deepspeed=deepspeed_config, torch_compile=compiled,
        per_device_train_batch_size=BATCH, max_steps=job.steps, train_sampling_strategy="sequential",
        optim="adamw_torch_fused", learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_num_workers=0, dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    model = load_hf(job.work)
    trainer = KeepsLoss(model=model, args=arguments, train_dataset=Rows(), callbacks=[StepEnds()])
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = decay_groups(model.named_parameters(), decayed)
    trainer.train()
    engine: Any = trainer.model_wrapped
    return meter.result(groups, engine=type(engine).__name__, optimizer=type(engine.optimizer).__name__)


def arm_floor(job: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """The matrix products of one step and nothing else; outputs are allocated once."""
    import torch

    N = BATCH * SEQ_LEN
    weights = [torch.randn(shape) * 0.02 for shape in linear_shapes()]
    widths = {n for shape in linear_shapes() for n in shape}
    activations = {n: torch.randn(N, n) for n in widths}  # inputs and output gradients, by width
    products = {n: torch.empty(N, n) for n in widths}
    weight_grads = {shape: torch.empty(shape) for shape in linear_shapes()}
    for _ in range(job.steps):
        for w in weights:
            torch.mm(activations[w.shape[1]], w.t(), out=products[w.shape[0]])  # forward
        for w in reversed(weights):
            dy = activations[w.shape[0]]
            torch.mm(dy, w, out=products[w.shape[1]])  # dgrad
            torch.mm(dy.t(), activations[w.shape[1]], out=weight_grads[w.shape[0], w.shape[1]])  # wgrad
        meter.step(None)
    return meter.result(None)


def arm_slm(job: argparse.Namespace, meter: Meter, compiled: bool) -> dict[str, Any]:
    """This project's engine, as train.py steps it."""
    import numpy as np

    from slm.optim import parameter_groups
    from slm.recipe import Optim

    tokens, optim = np.load(job.work / "tokens.npy", mmap_mode="r"), Optim(**OPTIM)
    engine = slm_engine(
        job.work / "init", optim=optim, zero_json=zero_json(job.zero), batch=BATCH, micro_batch=BATCH,
        seq_len=SEQ_LEN, precision="float32", compiled=compiled,
    )  # fmt: skip
    for step in range(job.steps):
        rows = tokens[step]
        meter.step(slm_step(engine, slm_batches(rows[:, :-1], rows[:, -1], BATCH), LR))
    groups = parameter_groups(engine.module, optim)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in engine.module.named_parameters() if id(p) in decayed}
    return meter.result(decay_groups(engine.module.named_parameters(), names))


# --- one arm's process ------------------------------------------------------------------------------------


def import_everything() -> None:
    """All that any arm imports, in all arms alike, so that no arm's peak contains its imports."""
    import deepspeed
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch._inductor.codegen.cpp
    import torch._inductor.compile_fx  # noqa: F401
    from transformers import Trainer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    # An operator for inference that init_distributed would compile for a minute; no training step uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_as_arm(job: argparse.Namespace) -> None:
    if job.arm == "prepare":
        result = prepare(job.work, job.steps)
    else:
        import_everything()
        import torch

        from slm.runtime import free_port

        os.environ["MASTER_PORT"] = str(free_port())
        torch.manual_seed(0)
        arm, compiled = job.arm.removesuffix("_compiled"), job.arm.endswith("_compiled")
        meter = Meter(job.warmup_steps, BATCH * SEQ_LEN)
        if arm == "slm":
            result = arm_slm(job, meter, compiled)
        elif arm == "hf_ds":
            result = arm_hf_ds(job, meter, compiled)
        else:
            result = {"plain": arm_plain, "floor": arm_floor}[arm](job, meter)
        result["threads"] = torch.get_num_threads()
    job.out.write_text(json.dumps(result))


def arm_environment(work: Path) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip


# --- the comparison ---------------------------------------------------------------------------------------


def problems_of(results: Results, reference: str, steps: int) -> list[str]:
    """Why these runs are not the same work."""
    problems = loss_problems(results, reference, {1: 1e-5, min(FULL_CHECK_STEP, steps): 1e-3})
    wanted = results[reference][0]["decay_groups"]
    for arm, rounds in results.items():
        groups, graphs = rounds[0]["decay_groups"], rounds[0]["graphs_compiled"]
        if groups not in (None, wanted):
            problems.append(f"{arm}: weight decay groups {groups}, {reference} has {wanted}")
        if bool(graphs) != arm.endswith("_compiled"):
            problems.append(f"{arm}: torch.compile made {graphs} graphs, which its name denies")
    return problems


def show_runs(results: Results, console: Console) -> None:
    """Each arm by itself; medians over the rounds."""
    table = Table(title="Each arm (median over the rounds, least–most)", title_justify="left")
    for column in (
        "arm",
        "step, s",
        "tokens/s",
        "GFLOP/s in products",
        "peak MiB above imports",
        "of it in timed steps",
        "time / bare products",
        "loss first",
        "last",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, rounds in results.items():
        seconds = Spread.of([r["median_seconds"] for r in rounds])
        over_floor = ratio(results, "median_seconds", arm, "floor").show() if "floor" in results else "-"
        losses = [f"{rounds[0]['losses'][i]:.6f}" for i in (0, -1)] if rounds[0]["losses"] else ["-", "-"]
        table.add_row(
            arm, seconds.show(3), f"{BATCH * SEQ_LEN / seconds.median:,.0f}",
            f"{product_flops() / seconds.median / 1e9:.0f}",
            f"{Spread.of([r['peak_bytes'] for r in rounds]).median / 2**20:,.0f}",
            f"{Spread.of([r['peak_timed_bytes'] for r in rounds]).median / 2**20:,.0f}",
            over_floor, *losses,
        )  # fmt: skip
    console.print(table)


def ratios_of(results: Results) -> list[dict[str, Any]]:
    return [
        {"ours": ours, "peer": peer,
         "tokens_per_second": ratio(results, "tokens_per_second", ours, peer), "speed_aim": speed_aim,
         "peak_memory": ratio(results, "peak_bytes", ours, peer), "memory_aim": memory_aim,
         "peak_memory_timed_steps": ratio(results, "peak_timed_bytes", ours, peer)}
        for ours, peer, speed_aim, memory_aim in PAIRS if ours in results and peer in results
    ]  # fmt: skip


def show_ratios(ratios: list[dict[str, Any]], console: Console) -> None:
    def aim(value: float | None, sign: str, met: bool) -> str:
        return "-" if value is None else f"{sign} {value}: {'met' if met else 'not met'}"

    table = Table(title="Ours / peer (ratio in each round: median, least–most)", title_justify="left")
    for column in ("ours / peer", "tokens/s", "aim", "peak memory", "aim", "peak memory, timed steps"):
        table.add_column(column)
    for r in ratios:
        speed, memory = r["tokens_per_second"], r["peak_memory"]
        table.add_row(
            f"{r['ours']} / {r['peer']}",
            speed.show(), aim(r["speed_aim"], ">=", speed.median >= (r["speed_aim"] or 0)),
            memory.show(), aim(r["memory_aim"], "<=", memory.median <= (r["memory_aim"] or 0)),
            r["peak_memory_timed_steps"].show(),
        )  # fmt: skip
    console.print(table)


def compare(job: argparse.Namespace, work: Path, console: Console) -> int:
    host = machine()
    console.print(
        f"[bold]{host}[/bold]\nmodel {MODEL}\n{BATCH} x {SEQ_LEN} tokens, float32, ZeRO stage {job.zero}, "
        f"2 threads; {job.warmup_steps} warm-up + {job.steps - job.warmup_steps} timed steps, "
        f"{job.rounds} rounds",
        highlight=False,
    )
    arguments = ["--steps", str(job.steps), "--warmup-steps", str(job.warmup_steps), "--zero", str(job.zero)]
    try:
        run_arm(Path(__file__), "prepare", work, "prepare", arguments, arm_environment(work))
        results = run_rounds(Path(__file__), job.arms, job.rounds, work, arguments, arm_environment(work))
    except ArmFailed as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    trained = [arm for arm in results if results[arm][0]["losses"]]
    reference = "plain" if "plain" in trained else next(iter(trained), None)
    problems = problems_of(results, reference, job.steps) if reference else []
    ratios = [] if problems else ratios_of(results)
    if job.json:
        shown = [{k: vars(v) if isinstance(v, Spread) else v for k, v in r.items()} for r in ratios]
        job.json.write_text(json.dumps(
            {"machine": host, "model": MODEL, "batch": BATCH, "seq_len": SEQ_LEN, "zero_stage": job.zero,
             "steps": job.steps, "warmup_steps": job.warmup_steps, "problems": problems, "ratios": shown,
             "runs": results}, indent=1))  # fmt: skip
    if problems:
        listing = "\n  ".join(["No ratios: the arms did not do the same work.", *problems])
        console.print(listing, style="red", markup=False, highlight=False)
        return 1
    show_runs(results, console)
    if ratios:
        show_ratios(ratios, console)
    if job.steps < FULL_CHECK_STEP:
        console.print(f"A trial, not a result: the losses were compared at steps 1 and {job.steps} only, "
                      f"the protocol asks for step {FULL_CHECK_STEP}.")  # fmt: skip
    for arm, rounds in results.items():
        if any(r["graphs_compiled_while_timed"] for r in rounds):
            console.print(f"{arm} compiled again within the timed steps: raise --warmup-steps.")
        if not all(r["peak_was_reset"] for r in rounds):
            console.print(f"{arm}: no right to clear_refs, so its peak includes that of the imports.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that every arm runs, order alternating")
    parser.add_argument("--steps", type=int, default=35, help="optimiser steps of each run, warm-up included")
    parser.add_argument("--warmup-steps", type=int, default=5, help="steps before the timing starts")
    parser.add_argument("--arms", type=lambda x: x.split(","), default=ARMS, help=",".join(ARMS))
    parser.add_argument("--zero", type=int, default=1, choices=range(4), help="ZeRO stage of both sides")
    parser.add_argument("--json", type=Path, help="also write every run and ratio to this file")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it (logs, init, tokens)")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # the rest: how this file calls itself
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    job = parser.parse_args()
    if unknown := set(job.arms) - set(ARMS):
        parser.error(f"unknown arms {sorted(unknown)}; there are {ARMS}")
    if not 0 < job.warmup_steps < job.steps:
        parser.error("--steps must be greater than --warmup-steps, and that at least 1")
    if job.zero == 3 and "slm_compiled" in job.arms and not job.arm:
        parser.error("this project compiles no blocks under ZeRO-3: leave slm_compiled out of --arms")
    if job.arm:
        run_as_arm(job)
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)  # a log file has room for the whole table
    if job.keep:
        job.keep.mkdir(parents=True, exist_ok=True)
        return compare(job, job.keep.resolve(), console)
    with tempfile.TemporaryDirectory(prefix="train_peers-") as work:
        return compare(job, Path(work), console)


if __name__ == "__main__":
    sys.exit(main())
