"""The loop around the training step."""

import contextlib
import math
import time

from tqdm import tqdm

from experiments.data import batch_ramp
from experiments.train import optim as optimizer
from experiments.train.ema import averaged
from experiments.watch.metrics import held_out


def train(
    program, state, batches, eval_batches, config, writer, mfu_of, begun=(0, 0.0), after_step=None, bytes_per_target=None, tasks=None
):
    """Trains up to train.steps steps, logs to `writer`, and returns the last state.

    batches: an iterator over dicts of [rows, S], this data rank's rows of each global batch; eval_batches: a list of such dicts, on which
    it evaluates before the first step, every train.eval_every steps and after the last step, so that the losses can be compared.
    mfu_of(tokens per second) -> MFU. begun: (steps done, targets seen) at the start. after_step(state, steps done, targets seen) -> whether
    to stop. bytes_per_target: mean bytes of a held-out target, for bits_per_byte. tasks(state) -> further metrics of an evaluation.

    Raises FloatingPointError if the loss or the gradient norm is not finite, before the state is replaced or anything is written.
    """
    steps = config.train.steps
    rate, rows_of, (first, targets) = optimizer.learning_rate(config.optim, steps), batch_ramp.rows_of(config.train), begun
    # Also compiles evaluate now: MindSpore reads source files when it compiles, so an edit during the run would change the result.
    found = evaluated(program, state, eval_batches, config, bytes_per_target, tasks)
    if first == 0:
        writer.write(0, found)
    timer = Timer()
    with tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=writer.silent) as bar:
        for done in range(first + 1, steps + 1):
            batch = next(batches)
            new_state, metrics = program.step(state, batch, rate(done - 1), done - 1)
            _stop_if_wrong(metrics, done)
            state, targets = new_state, targets + metrics["tokens"]
            timer.tick(rows_of(done - 1))
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            bar.update()
            if done in (1, steps) or done % config.train.log_every == 0:
                step_time_s, rows = timer.lap()
                speed = rows * config.train.seq_len / step_time_s
                times = {"step_time_s": step_time_s, "tokens_per_s": speed, "mfu": mfu_of(speed)}
                writer.write(done, {**metrics, "tokens_seen": targets, **times})
            if done == steps or (config.train.eval_every and done % config.train.eval_every == 0):
                with timer.paused():
                    writer.write(done, evaluated(program, state, eval_batches, config, bytes_per_target, tasks))
            if after_step and after_step(state, done, targets):
                break
    return state


def evaluated(program, state, batches, config, bytes_per_target=None, tasks=None):
    """Returns the metrics of an evaluation; those of the average of the weights, if there is one, begin with ema_."""
    found = held_out(program.evaluate(state, batches), bytes_per_target)
    if tasks:
        found.update(tasks(state))
    if config.train.ema_decay:
        average = held_out(program.evaluate(averaged(state), batches), bytes_per_target)
        found.update({f"ema_{name}": value for name, value in average.items()})
    return found


class Timer:
    """Measures seconds and rows per step from one lap() to the next."""

    def __init__(self):
        self.start, self.steps, self.rows = time.perf_counter(), 0, 0

    def tick(self, rows):
        self.steps, self.rows = self.steps + 1, self.rows + rows

    def lap(self):
        now = time.perf_counter()
        found = (now - self.start) / self.steps, self.rows / self.steps
        self.start, self.steps, self.rows = now, 0, 0
        return found

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


def _stop_if_wrong(metrics, step):
    if lost := metrics.get("expert_overflow"):
        raise FloatingPointError(
            f"step {step}: {lost:.0f} assignments of tokens to experts found no place in the buffers between expert parallel ranks; the run"
            " stops and keeps the checkpoints that it has saved. Raise model_args.moe_capacity_factor, or leave it out for the worst case"
        )
    # an infinite norm may be a spike, whose update is skipped; NaN is a mistake, and so is either before the running mean is known
    spike = metrics.get("skipped") and not math.isnan(metrics["grad_norm"]) and step > optimizer.SPIKE_WARMUP_STEPS
    for name in ("objective",) if spike else ("objective", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"step {step}: {name}={metrics[name]} is not finite; the run stops and keeps the checkpoints that it has saved."
                " Lower optim.lr, lengthen optim.warmup_steps, or look at this step's batch"
            )
