"""Running the stages: checkpoints, resumption, the log."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv32_jax import convert
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.reading import progress
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.train_demo.batches import Batches
from dsv32_jax.experiments.train_demo.sizes import SIZES, Stage
from dsv32_jax.experiments.train_demo.training import (
    Params,
    from_model,
    initial_params,
    learning_rate,
    make_step,
    optimizer_state,
    to_model,
)
from dsv32_jax.files import locked, replace_directory

LOG_EVERY = 20
SAVE_SECONDS = 120.0
RUN = "run.json"


class Training:
    """One run in one folder: `log.jsonl`, `checkpoint/` (this machine's exact state), a bfloat16 checkpoint a stage.

    A run goes on from its last checkpoint with the very numbers it would have had. `weights` starts a stage from the
    bfloat16 checkpoint of another machine instead, with a fresh optimiser.
    """

    def __init__(self, size: str, folder: Path, data: Path, seed: int = 0, compute_dtype: str = "bfloat16"):
        if size not in SIZES:
            raise UserError(f"--size {size}: unknown; it is one of {', '.join(SIZES)}")
        self.config = SIZES[size].config.replace(quantization_config=None)
        self.stages = SIZES[size].stages
        self.folder, self.compute_dtype, self.seed = folder, compute_dtype, seed
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"size": size, "seed": seed, "compute_dtype": compute_dtype}
        self.check_same_run(settings)
        self.data = data
        if (data / "manifest.json").exists():
            shutil.copyfile(data / "manifest.json", folder / "corpus.json")
        self.batches = Batches(data, seed)
        self.checkpoints = ocp.CheckpointManager(
            (folder / "checkpoint").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def check_same_run(self, settings: dict[str, Any]) -> None:
        """Refuses to mix two runs in one folder."""
        file = self.folder / RUN
        if not file.exists():
            write_json(file, settings)
        elif (found := json.loads(file.read_text())) != settings:
            raise UserError(f"{self.folder}: holds another run ({found}); give another --run or remove it")

    def stage_number(self, name: str) -> int:
        """The place of a stage."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise UserError(f"stage {name}: unknown; it is one of {', '.join(names)}")
        return names.index(name)

    def train(self, until: str | None = None, weights: Path | None = None, first: str | None = None) -> Params:
        """Runs all stages that are not done, up to and including `until`.

        Args:
          until: name of the last stage to run; all where None.
          weights: a bfloat16 checkpoint in the Hugging Face layout to begin with.
          first: the stage that begins with `weights`.

        Raises:
          UserError: another process trains in this folder.
        """
        with locked(self.folder):
            return self.run(until, weights, first)

    def run(self, until: str | None, weights: Path | None, first: str | None) -> Params:
        """`train` in a folder that is this process's alone."""
        last = len(self.stages) - 1 if until is None else self.stage_number(until)
        number, step = 0, 0
        state = None
        if weights is not None:
            number = self.stage_number(first or self.stages[0].name)
            params = from_model(convert.load_hf(weights))
        elif (saved := self.checkpoints.latest_step()) is not None:
            number, step, params, state = self.restore(saved)
        else:
            params = initial_params(self.config, self.seed)
        while number <= last:
            stage = self.stages[number]
            if state is None:
                state = optimizer_state(stage, params)
            params = self.run_stage(stage, number, step, params, state)
            number, step, state = number + 1, 0, None
        self.checkpoints.wait_until_finished()
        return params

    def run_stage(self, stage: Stage, number: int, first: int, params: Params, state: Any) -> Params:
        """Steps `first` .. of one stage; ends with its bfloat16 checkpoint."""
        step_function = make_step(self.config, stage, self.compute_dtype)
        started = saved = time.monotonic()
        tokens = recall = 0
        pending: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []
        if first < stage.steps:
            with progress() as bar:
                task = bar.add_task(stage.name, total=stage.steps, completed=first)
                for step, batch in enumerate(self.batches.stream(stage, number, first), first):
                    rate = learning_rate(stage, step)
                    params, state, log = step_function(params, state, batch.ids, batch.weights, np.float32(rate))
                    tokens += batch.ids.size
                    recall += batch.recall_tokens
                    bar.advance(task)
                    done = step + 1 == stage.steps
                    if step % LOG_EVERY == 0 or done:
                        chat = bool(stage.chat_every) and step % stage.chat_every == 0
                        row = {"stage": stage.name, "step": step, "chat": chat, "tokens": tokens, "learning_rate": rate}
                        pending.append((row | {"seconds": round(time.monotonic() - started, 2)}, log))
                        # The device is asked for numbers that it has long finished: the loop never waits for it.
                        while len(pending) > (0 if done else 1):
                            self.write_log(*pending.pop(0))
                    if time.monotonic() - saved > SAVE_SECONDS and not done:
                        self.save(number, step + 1, params, state)
                        saved = time.monotonic()
            self.write_summary(stage, tokens, recall, time.monotonic() - started, first)
        # An end is also the start of the next stage, whose optimiser is fresh: only the parameters are kept.
        self.save(number + 1, 0, params, None)
        self.export(params, stage.name)
        return params

    def write_log(self, row: dict[str, Any], log: dict[str, jax.Array]) -> None:
        """One line of `log.jsonl`."""
        row |= {name: round(float(value), 5) for name, value in log.items()}
        if not np.isfinite(row["loss"]):
            raise UserError(
                f"stage {row['stage']}, step {row['step']}: the loss is {row['loss']}; lower its learning rate"
            )
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = (
            f"{name} {row[name]:.4f}" for name in ("loss", "mtp_loss", "index_kl", "gradient_norm") if name in row
        )
        print(f"{row['stage']:9} {row['step']:5} {row['seconds']:7.1f} s ", *numbers, sep="  ", flush=True)

    def write_summary(self, stage: Stage, tokens: int, recall: int, seconds: float, first: int) -> None:
        """`<stage>.json`: settings, device and time of a stage, from step `first` on if it was resumed."""
        summary = {
            "settings": dataclasses.asdict(stage),
            "seed": self.seed,
            "compute_dtype": self.compute_dtype,
            "first_step": first,
            "tokens": tokens,
            "recall_share_of_tokens": round(recall / tokens, 4),
            "seconds": round(seconds, 1),
            "environment": environment(),
        }
        write_json(self.folder / f"{stage.name}.json", summary)

    def save(self, number: int, step: int, params: Params, state: Any) -> None:
        """The exact state: before `step` of stage `number`."""
        leaves = [] if state is None else jax.tree.leaves(state)
        where = {"number": np.int32(number), "step": np.int32(step)}
        total = sum(stage.steps for stage in self.stages[:number]) + number + step
        kept = {"where": where, "params": params, "state": {str(n): leaf for n, leaf in enumerate(leaves)}}
        self.checkpoints.save(total, args=ocp.args.StandardSave(kept))

    def restore(self, saved: int) -> tuple[int, int, Params, Any]:
        """What `save` wrote: stage, step, parameters and the optimiser's state (None at a stage's start)."""
        kept = self.checkpoints.restore(saved, args=ocp.args.StandardRestore())
        number, step = int(kept["where"]["number"]), int(kept["where"]["step"])
        if not kept.get("state"):
            return number, step, kept["params"], None
        leaves = [kept["state"][str(n)] for n in range(len(kept["state"]))]
        structure = jax.tree.structure(optimizer_state(self.stages[number], kept["params"]))
        return number, step, kept["params"], jax.tree.unflatten(structure, leaves)

    def export(self, params: Params, name: str) -> Path:
        """The bfloat16 checkpoint of a stage, in the Hugging Face layout."""
        directory = self.folder / name
        fresh = directory.with_name(name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted run
        convert.export_model(to_model(self.config, params), fresh, tokenizer_files=self.data)
        replace_directory(fresh, directory)
        return directory
