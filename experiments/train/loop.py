"""The loop around the training step."""

import contextlib
import math
import time

from tqdm import tqdm

from experiments.train import optim as optimizer
from experiments.watch.metrics import held_out


def train(program, state, batches, eval_batches, config, writer, mfu_of, begun=(0, 0.0), after_step=None, bytes_per_target=None):
    """Up to train.steps steps, logged to `writer`; returns the last state. mfu_of: tokens per second -> MFU. bytes_per_target: of the
    held-out rows, for their bits per byte.

    batches: an iterator over dicts of [rows, S], a data rank's part of each batch; eval_batches: a list of such. begun: the steps that are
    done, and the targets they saw. after_step(state, steps done, targets seen) -> whether to stop there.

    Raises FloatingPointError at a loss or gradient norm that is not finite, before the state is replaced or anything is written.
    """
    steps = config.train.steps
    rate, (first, targets) = optimizer.learning_rate(config.optim, steps), begun
    # Also compiles it now: MindSpore reads the source when it compiles, so a file edited during the run would go into the result.
    eval_loss = program.evaluate(state, eval_batches)
    if first == 0:
        writer.write(0, held_out(eval_loss, bytes_per_target))
    timer = Timer()
    with tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True, disable=writer.silent) as bar:
        for done in range(first + 1, steps + 1):
            batch = next(batches)
            new_state, metrics = program.step(state, batch, rate(done - 1), done - 1)
            _stop_if_wrong(metrics, done)
            state, targets = new_state, targets + metrics["tokens"]
            timer.tick()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            bar.update()
            if done in (1, steps) or done % config.train.log_every == 0:
                step_time_s = timer.lap()
                speed = config.train.batch_size * config.train.seq_len / step_time_s
                times = {"step_time_s": step_time_s, "tokens_per_s": speed, "mfu": mfu_of(speed)}
                writer.write(done, {**metrics, "tokens_seen": targets, **times})
            if config.train.eval_every and done % config.train.eval_every == 0 and done < steps:
                with timer.paused():
                    writer.write(done, held_out(program.evaluate(state, eval_batches), bytes_per_target))
            if after_step and after_step(state, done, targets):
                break
    return state


class Timer:
    """Seconds per step between laps."""

    def __init__(self):
        self.start, self.steps = time.perf_counter(), 0

    def tick(self):
        self.steps += 1

    def lap(self):
        now = time.perf_counter()
        took, self.start, self.steps = (now - self.start) / self.steps, now, 0
        return took

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began


def _stop_if_wrong(metrics, step):
    if lost := metrics.get("expert_overflow"):
        raise FloatingPointError(
            f"step {step}: {lost:.0f} assignments of tokens to experts found no place in the buffers between expert parallel ranks; the run"
            " stops and what it had saved stays as it is. Raise model_args.moe_capacity_factor, or leave it out for the worst case"
        )
    for name in ("objective",) if metrics.get("skipped") else ("objective", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"step {step}: {name}={metrics[name]} is not finite; the run stops and what it had saved stays as it is."
                " Lower optim.lr, lengthen optim.warmup_steps, or look at this step's batch"
            )
