"""A step of reinforcement learning: samples groups of answers from the weights that train, rewards them, and updates by them.

The engine and the trainer have one tree of parameters, the arrays of the state. Before it samples, the engine forgets the keys and values
of earlier weights. A draw depends on train.seed, on the number of the answer in the run and on the number of the token alone.

    RUN/samples.jsonl   some answers of each logged step: step, prompt, text, reward, and reason where there is no reward
"""

import json
import math
import os
import time
from concurrent.futures import wait

import numpy as np

from experiments.data import loader
from experiments.generate.batch import TOGETHER, Together
from experiments.posttrain import losses
from experiments.posttrain.reward_pool import Pool
from experiments.posttrain.settings import keeps_reference
from experiments.train.state import uses_scan
from experiments.train.weights import initial_params
from experiments.watch.records import read_records
from layers.lora import without_dropout
from parallel import collectives
from parallel.checkpoint.files import write_text
from parallel.sharding import Sharding
from parallel.trees import tree_map
from qwen3.engine import Engine, Request

SAMPLES = "samples.jsonl"
NO_LOGITS = "the logits are not finite"
LOOK_S = 0.5  # seconds between two looks at the rewards that are not there yet


class Answer:
    """A sampled answer. ids: its tokens, with the one that ends it. logprobs: of each when it was sampled. reason: why it has no text."""

    def __init__(self):
        self.ids, self.logprobs, self.ended, self.reason = [], [], False, ""


class Rollouts:
    """step and evaluate take the places of those of `program`. Use it in a `with`: it holds the processes of rewards.

    workdir: the run's folder; begun: the step from which the run goes on. Raises ValueError for a config that cannot sample.
    """

    def __init__(self, workdir, cfg, config, sharding, program, data, begun):
        if uses_scan(cfg, config.train.layer_loop):
            raise ValueError(
                f"train.layer_loop={config.train.layer_loop} stacks the layers of this model, and sampling needs them one by one; use"
                " --config.train.layer_loop=unroll"
            )
        self.cfg, self.config, self.program, self.data = without_dropout(cfg), config, program, data
        # The engine needs whole rows, so it has no sequence parallel; its parameters are sharded alike.
        self.mesh, self.sharding, self.engine = sharding.mesh, Sharding(sharding.mesh), None
        rl, tokenizer = config.rl, data.tokenizer
        self.pool, self.stop_ids = Pool(rl.reward, rl.reward_processes, rl.reward_timeout_s), self._stop_ids(tokenizer)
        self.reference = None
        if keeps_reference(config):
            self.reference = program.init(initial_params(cfg, config)[0])["params"]
        self.samples = os.path.join(workdir, SAMPLES) if self.mesh.rank == 0 else None
        if self.samples:
            kept = [record for record in read_records(self.samples) if record["step"] <= begun]
            write_text(self.samples, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))

    def _stop_ids(self, tokenizer):
        found = {tokenizer.eod_id, tokenizer.eos_id, *self.cfg.eos_ids}
        return tuple(sorted(i for i in found if i is not None))

    def __enter__(self):
        self.pool.__enter__()
        return self

    def __exit__(self, *error):
        self.pool.__exit__(*error)

    def step(self, state, rows, lr, at):
        """Samples an answer to each of the rows (see prompts.PromptRows), and makes rl.updates updates by all of them -> (state, metrics).
        The metrics of training are those of the last update."""
        rl, mesh = self.config.rl, self.mesh
        began = time.perf_counter()
        answers = self.sample(state, rows, rl.max_new_tokens, temperature=1.0)
        rewards = self.reward(rows, answers, self.data.train.prompts.records)
        took = time.perf_counter() - began
        size = self.config.train.batch_size
        mine = loader.rank_rows(size, mesh.index(("dp",)), mesh.dp, self.config.parallel.micro_batches)
        found = self._gathered(size, mine, answers, rewards)
        advantage, kept = losses.advantages(found["reward"], found["good"], rl.group_size, rl.deviation)
        batch = self._batch(rows, answers, advantage[mine], kept[mine])
        if rl.kl_coef:
            batch["reference"] = -self.program.score(self._reference_state(state), batch)
        for update in range(rl.updates):
            state, metrics = self.program.step(state, batch, lr, at * rl.updates + update)
            if not (math.isfinite(metrics["objective"]) and math.isfinite(metrics["grad_norm"])):
                break  # the loop stops the run
        if (at + 1) % self.config.train.log_every == 0:
            self._log(at + 1, rows, answers, rewards)
        groups = kept.reshape(-1, rl.group_size).max(1)
        return state, {**metrics, **summary(found), "dropped": 1 - float(groups.mean()), "rollout_s": took}

    def evaluate(self, state, batches):
        """Returns the metrics of the most likely answers to all rows of the batches of all ranks: reward, length, bad_rewards."""
        total = dict.fromkeys(("reward", "good", "length", "counts", "bad"), 0.0)
        for rows in batches:
            answers = self.sample(state, rows, self.config.rl.max_new_tokens, temperature=0.0)
            rewards = self.reward(rows, answers, [record for _, record in self.data.held_questions])
            size = self.config.train.batch_size
            mine = loader.rank_rows(size, self.mesh.index(("dp",)), self.mesh.dp)
            found = self._gathered(size, mine, answers, rewards)
            total = {key: value + float(found[key].sum()) for key, value in total.items()}
        good, counts = max(total["good"], 1.0), max(total["counts"], 1.0)
        return {"reward": total["reward"] / good, "length": total["length"] / counts, "bad_rewards": total["bad"]}

    def sample(self, state, rows, most, temperature):
        """Returns the Answer to each row; None for rows that fill up a batch. With a temperature, logprobs are there too."""
        params = self.program.tree(state)
        if self.engine is None:
            length = self.config.train.seq_len
            slots = min(self.config.rl.slots, len(rows["size"]))
            self.engine = Engine(params, self.cfg, slots=slots, length=length, sharding=self.sharding)
            if self.mesh.world > 1:
                self.engine.warm_up(by_host=True)  # all ranks compile now, so that none waits for another one inside a collective
        self.engine.use(params)
        answers, running = [None] * len(rows["size"]), {}
        for i, record in enumerate(rows["record"][:, 0]):
            if record:
                options = {"temperature": temperature, "seed": self.config.train.seed, "sample": int(rows["draw"][i, 0])}
                logprobs = 0 if temperature else None
                prompt = rows["tokens"][i, : rows["size"][i, 0]].tolist()
                number = self.engine.submit(Request(prompt, most, self.stop_ids, logprobs=logprobs, **options))
                answers[i] = running[number] = Answer()
        together = Together(self.sharding)
        while together(self.engine.busy()):
            for event in self.engine.step():
                take(running[event.id], event)
        return answers

    def reward(self, rows, answers, records):
        """Returns [(reward, reason)] of the answers. Of the ranks that sample the same answers, the first alone asks for their rewards, and
        the others return (0.0, ""). All ranks wait here until all rewards are there."""
        asks, jobs = not self.mesh.index(TOGETHER), [None] * len(answers)
        for i, answer in enumerate(answers):
            if asks and answer is not None and not answer.reason:
                found = records[rows["record"][i, 0] - 1]
                jobs[i] = self.pool.submit(found["prompt"], self.text(answer), found)
        left = {job for job in jobs if job}
        while self._on_any_rank(bool(left)):  # asked often, as a collective on CPU fails after 30 s
            left = wait(left, timeout=LOOK_S).not_done
        return [job.result() if job else (0.0, answer.reason if answer else "") for job, answer in zip(jobs, answers)]

    def _on_any_rank(self, busy):
        if self.mesh.world == 1:
            return busy
        return bool(collectives.host_sum(self.mesh, tuple(self.mesh.sizes), [busy])[0])

    def text(self, answer):
        """Returns an answer's text, without the token that ends it."""
        return self.data.tokenizer.decode(answer.ids[: len(answer.ids) - answer.ended], skip_special=True)

    def _gathered(self, size, mine, answers, rewards):
        """Returns {name: float32 [size]} of the answers of all ranks. mine: the places of this rank's answers in the batch. reward; good, 1
        for one with a reward; bad, 1 for one without; counts, 1 for each; length; nats, minus the sum of its log-probabilities; cut, 1 for
        one that did not end."""
        found = {name: np.zeros(size, np.float32) for name in ("reward", "good", "bad", "counts", "length", "nats", "cut")}
        for i, answer, (reward, reason) in zip(mine, answers, rewards):
            if answer is not None and not self.mesh.index(TOGETHER):
                good = not reason
                values = reward * good, good, not good, 1, len(answer.ids), -sum(answer.logprobs), not answer.ended
                for name, value in zip(found, values):
                    found[name][i] = value
        if self.mesh.world > 1:
            names, values = list(found), np.concatenate(list(found.values()))
            found = dict(zip(names, collectives.host_sum(self.mesh, tuple(self.mesh.sizes), values).reshape(len(names), size)))
        return found

    def _batch(self, rows, answers, advantages, kept):
        """Returns the batch of policy.loss_of_answers: in each row a prompt and its answer."""
        count, S = rows["tokens"].shape
        ints = ("tokens", "targets", "positions", "segment_ids")
        batch = {name: np.zeros((count, S), np.int32) for name in ints}
        batch.update({name: np.zeros((count, S), np.float32) for name in ("loss_weights", "advantages", "sampled", "denominators")})
        for i, answer in enumerate(answers):
            size = int(rows["size"][i, 0])
            ids = np.concatenate([rows["tokens"][i, :size], answer.ids]).astype(np.int32)
            end = len(ids) - 1
            batch["tokens"][i, :end], batch["targets"][i, :end] = ids[:-1], ids[1:]
            batch["positions"][i, :end], batch["segment_ids"][i, :end] = np.arange(end), 1
            if kept[i]:
                batch["loss_weights"][i, size - 1 : end] = 1
                batch["advantages"][i, size - 1 : end] = advantages[i]
                batch["sampled"][i, size - 1 : end] = answer.logprobs
                batch["denominators"][i, size - 1] = losses.denominators(self.config.rl.loss, len(answer.ids))
        return batch

    def _reference_state(self, state):
        """Returns the state of the reference model. Under LoRA its adapters are 0, which makes it the base."""
        if self.reference is None:
            self.reference = tree_map(lambda x: x * 0, state["params"])
        return {**state, "params": self.reference}

    def _log(self, step, rows, answers, rewards):
        if not self.samples:
            return
        lines = []
        for record, answer, (reward, reason) in list(zip(rows["record"][:, 0], answers, rewards))[: self.config.rl.log_samples]:
            prompt = self.data.train.prompts.records[record - 1]["prompt"]
            line = {"step": step, "prompt": prompt, "text": self.text(answer), "reward": None if reason else reward}
            lines.append({**line, "reason": reason} if reason else line)
        with open(self.samples, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def take(answer, event):
    """Adds the token of an engine's Event to an Answer."""
    if event.finish_reason == "error":
        answer.reason = NO_LOGITS
        return
    answer.ids.append(event.token)
    if event.logprob is not None:
        answer.logprobs.append(event.logprob)
    answer.ended = event.finish_reason == "stop"


def summary(found):
    """Returns the metrics of the sampled answers of a step. found: see Rollouts._gathered.

    reward: the mean of the answers that have one; bad_rewards: the number of the others. length: mean number of tokens; cut: the share of
    answers that reached rl.max_new_tokens. entropy: the mean of -log p of the sampled tokens, an unbiased estimate of the policy's entropy.
    """
    count = max(float(found["counts"].sum()), 1.0)
    return {
        "reward": float(found["reward"].sum()) / max(float(found["good"].sum()), 1.0),
        "length": float(found["length"].sum()) / count,
        "entropy": float(found["nats"].sum()) / max(float(found["length"].sum()), 1.0),
        "cut": float(found["cut"].sum()) / count,
        "bad_rewards": float(found["bad"].sum()),
    }
