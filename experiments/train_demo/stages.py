"""Running the stages: checkpoints, resumption, the log."""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv32_jax import convert
from dsv32_jax.common.files import locked, replace_directory
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.experiments.train_demo.batches import Batches, has_questions, load
from dsv32_jax.experiments.train_demo.sizes import Stage, size_named
from dsv32_jax.experiments.train_demo.training import (
    TIED,
    Params,
    from_model,
    initial_params,
    learning_rate,
    make_step,
    mean_loss,
    optimizer_state,
    to_model,
)
from dsv32_jax.model.model import abstract_model
from dsv32_jax.model.params import named_parameters

LOG_EVERY = 20
HELD_OUT_WINDOWS = 16
SAVE_SECONDS = 120.0
RUN = "run.json"


class Training:
    """One run in one folder: `log.jsonl`, `checkpoint/` (this machine's exact state), a bfloat16 checkpoint a stage.

    A run resumes from its last checkpoint with the same numbers as without an interruption. `weights` starts a stage
    from the bfloat16 checkpoint of another machine instead, with a fresh optimiser.
    """

    def __init__(self, size: str, folder: Path, data: Path, seed: int = 0, compute_dtype: str = "bfloat16"):
        chosen = size_named(size)
        if not has_questions(data):
            without_chat = tuple(stage for stage in chosen.stages if not stage.chat_every)
            chosen = dataclasses.replace(chosen, stages=without_chat)
        self.name, self.size, self.stages = size, chosen, chosen.stages
        self.config = chosen.config.replace(quantization_config=None)
        self.folder, self.compute_dtype, self.seed = folder, compute_dtype, seed
        self.data = data
        self.batches = Batches(data, seed)
        for stage in self.stages:
            self.batches.windows(stage)
        settings = {"size": size, "seed": seed, "compute_dtype": compute_dtype, "data": self.batches.fingerprint()}
        self.check_same_run(settings)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, settings)
        if (data / "manifest.json").exists():
            shutil.copyfile(data / "manifest.json", folder / "corpus.json")
        self.checkpoints = ocp.CheckpointManager(
            (folder / "checkpoint").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def check_same_run(self, settings: dict[str, Any]) -> None:
        """Refuses to mix two runs in one folder."""
        file = self.folder / RUN
        if not file.exists():
            return
        present = json.loads(file.read_text())
        # A run of an older version does not know its data.
        if {**settings, **present} != settings:
            raise UserError(
                f"{self.folder}: holds another run ({named(present)}; asked for is {named(settings)}); give another "
                f"--run or remove it"
            )

    def tell_plan(self) -> None:
        """Prints the model, the data, the stages and the folder of the run."""
        shapes = named_parameters(abstract_model(self.config))
        count = sum(math.prod(leaf.shape) for path, leaf in shapes.items() if path not in TIED)
        print(f"model: {count / 1e6:.1f} million parameters")
        print(f"data: {self.data}, {len(self.batches.tokens):,} tokens")
        for stage in self.stages:
            tokens = stage.steps * stage.batch * stage.length
            print(f"stage {stage.name}: {stage.steps} steps, {tokens:,} tokens, trains {stage.trains}")
        if len(self.stages) < len(size_named(self.name).stages):
            print("no questions and answers in a text of one's own: the stages that learn to chat are left out")
        print(f"run: {self.folder}; the same command goes on where it is interrupted", flush=True)

    def tell_end(self, params: Params) -> None:
        """Prints the loss on held-out text and a command that tries the last checkpoint."""
        loss = self.held_out_loss(params)
        if loss is not None:
            print(f"held-out text: {loss:.4f} nats a token")
        finished = [self.folder / stage.name for stage in self.stages if (self.folder / stage.name).exists()]
        print(f"checkpoints: {', '.join(map(str, finished))}")
        print(f"try: dsv32 generate --model {finished[-1]} --prompt 'The'")

    def train(self, until: str | None = None, weights: Path | None = None, first: str | None = None) -> Params:
        """Runs all stages that are not finished, up to and including `until`.

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
        last = len(self.stages) - 1 if until is None else self.size.stage_number(until)
        number, step = 0, 0
        state = None
        if weights is not None:
            number = self.size.stage_number(first or self.stages[0].name)
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
        if first < stage.steps:
            print(
                f"{stage.name}: {stage.steps - first} steps of {stage.batch} x {stage.length} tokens, after compiling",
                flush=True,
            )
        step_function = make_step(self.config, stage, self.compute_dtype)
        started = saved = time.monotonic()
        tokens = recall = 0
        pending: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []
        if first < stage.steps:
            with progress_bar(stage.name, stage.steps, "steps") as advance:
                advance(first)
                for step, batch in enumerate(self.batches.stream(stage, number, first), first):
                    rate = learning_rate(stage, step)
                    params, state, log = step_function(params, state, batch.ids, batch.weights, np.float32(rate))
                    tokens += batch.ids.size
                    recall += batch.recall_tokens
                    advance(1)
                    is_last = step + 1 == stage.steps
                    if step % LOG_EVERY == 0 or is_last:
                        chat = bool(stage.chat_every) and step % stage.chat_every == 0
                        row = {"stage": stage.name, "step": step, "chat": chat, "tokens": tokens, "learning_rate": rate}
                        pending.append((row | {"seconds": round(time.monotonic() - started, 2)}, log))
                        # The device is asked for numbers that it has long finished: the loop never waits for it.
                        while len(pending) > (0 if is_last else 1):
                            self.write_log(*pending.pop(0))
                    if time.monotonic() - saved > SAVE_SECONDS and not is_last:
                        self.save(number, step + 1, params, state)
                        saved = time.monotonic()
            self.write_summary(stage, tokens, recall, time.monotonic() - started, first)
        # The end of a stage is the start of the next, whose optimiser is fresh: only the parameters are saved.
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
        """Saves the exact state before `step` of stage `number`."""
        leaves = [] if state is None else jax.tree.leaves(state)
        place = {"number": np.int32(number), "step": np.int32(step)}
        total = sum(stage.steps for stage in self.stages[:number]) + number + step
        content = {"where": place, "params": params, "state": {str(n): leaf for n, leaf in enumerate(leaves)}}
        self.checkpoints.save(total, args=ocp.args.StandardSave(content))

    def restore(self, saved: int) -> tuple[int, int, Params, Any]:
        """Reads a saved state: stage, step, parameters and the optimiser's state (None at a stage's start)."""
        content = self.checkpoints.restore(saved, args=ocp.args.StandardRestore())
        number, step = int(content["where"]["number"]), int(content["where"]["step"])
        if not content.get("state"):
            return number, step, content["params"], None
        leaves = [content["state"][str(n)] for n in range(len(content["state"]))]
        structure = jax.tree.structure(optimizer_state(self.stages[number], content["params"]))
        return number, step, content["params"], jax.tree.unflatten(structure, leaves)

    def export(self, params: Params, name: str) -> Path:
        """Writes the bfloat16 checkpoint of a stage, in the Hugging Face layout."""
        directory = self.folder / name
        fresh = directory.with_name(name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)  # of an interrupted run
        convert.export_model(to_model(self.config, params), fresh, tokenizer_files=self.data)
        replace_directory(fresh, directory)
        return directory

    def held_out_loss(self, params: Params) -> float | None:
        """Nats a token of the data's held-out text, as far as `HELD_OUT_WINDOWS` go; None where there is none.

        With the last stage's selection and length; written to `held_out.json`.
        """
        path, stage = self.data / "held_out.npz", self.stages[-1]
        tokens = load(path)["tokens"] if path.exists() else np.zeros(0, np.uint16)
        width = min(stage.length - 1, len(tokens))
        if width < 1:
            return None
        rows = tokens[: len(tokens) // width * width].reshape(-1, width)[:HELD_OUT_WINDOWS].astype(np.int32)
        ids = np.concatenate([np.full((len(rows), 1), self.batches.bos, np.int32), rows], axis=1)
        loss = float(mean_loss(self.config, stage.attention, self.compute_dtype, params, ids))
        result = {"tokens": rows.size, "loss": round(loss, 5), "selection": stage.selection}
        write_json(self.folder / "held_out.json", result)
        return loss


def named(settings: dict[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())
