"""A run's checkpoints: which one it starts from, when it saves, and how SIGTERM ends it."""

import dataclasses
import os
import signal
import threading
from functools import partial

from experiments import run_tokenizer
from experiments.posttrain import reference
from experiments.posttrain.settings import has_reference
from experiments.train import adapter, run_folder, weights
from parallel import collectives
from parallel.checkpoint.arrays import pieces
from parallel.checkpoint.files import step_folder, steps
from parallel.checkpoint.read import Reader, find
from parallel.checkpoint.save import Saver, Settings
from parallel.mesh import is_simulated

SIGNALS = (signal.SIGTERM,)


def start(workdir, cfg, config, mesh, program):
    """Returns the weights.Start of a run. All ranks call it.

    The start is the newest checkpoint in the run's own folder, else that of --resume_from, else the weights of --init_from, else random
    weights. Raises ValueError for a folder that belongs to another run or model; see run_folder.own_step.
    """
    own = run_folder.agreed(mesh, run_folder.own_step(workdir, config) if mesh.rank == 0 else 0)
    if not own and not config.resume_from:
        return weights.initial(cfg, config)
    folder, partial_ = (step_folder(workdir, own), False) if own else (_other(config, mesh), config.partial)
    if own:
        _check_own(workdir, folder, config)
    fresh = weights.initial_params(cfg, config)[0] if cfg.lora else weights.random(cfg, config)
    if cfg.lora:
        adapter.check_base(Reader(folder).meta.get("base"), adapter.base_of(cfg, config, fresh), folder)
    if has_reference(config):
        reference.check(Reader(folder).meta.get("reference"), cfg, config, folder)
    found = weights.from_checkpoint(folder, program, partial_, fresh)
    if found.step > config.train.steps:
        last = f"after the last of train.steps={config.train.steps}; ask for at least {found.step} steps"
        raise ValueError(f"{folder} is of step {found.step}, {last}")
    return found


def _check_own(workdir, folder, config):
    """Raises ValueError for a run's checkpoint that was saved with another config than config.json says, or with another tokenizer."""
    meta = Reader(folder).meta
    if changed := run_folder.differences(meta.get("config"), run_folder.to_dict(config), run_folder.MAY_CHANGE):
        raise ValueError(
            f"{folder} was saved with {changed[0]}, other than {os.path.join(workdir, run_folder.CONFIG)} says; put the run's own"
            " config.json back, or use another folder"
        )
    run_tokenizer.check(workdir, meta.get("tokenizer"))


def _other(config, mesh):
    """Returns the checkpoint that --resume_from names, or the newest of the run there. Raises ValueError if the run's config differs."""
    path = config.resume_from
    last = run_folder.agreed(mesh, max([0, *steps(path)]) if mesh.rank == 0 else 0)
    folder = step_folder(path, last) if last else find(path)
    if folder is None:
        raise FileNotFoundError(f"resume_from={path} has no checkpoint; give the folder of a run that has saved one, or of a checkpoint")
    free, saved = run_folder.MAY_CHANGE_ELSEWHERE + ("model", "model_args.") * config.partial, Reader(folder).meta.get("config", {})
    changed = run_folder.differences(saved, run_folder.to_dict(config), free)
    if changed:
        raise ValueError(f"resume_from={path} was saved with {changed[0]}; use the same, or --init_from={path} for its weights alone")
    return folder


class Stopped(BaseException):
    """SIGTERM came while a run was finishing."""


class Saving:
    """Saves checkpoints during training. Use it in a `with`: inside it, SIGTERM makes the run save and stop after the current step.

    The training loop calls after_step() after each step. stopped: whether SIGTERM stopped the run.
    """

    def __init__(self, workdir, cfg, config, mesh, program, loader, writer, begun):
        """begun: (steps done, targets seen) at the start."""
        self.workdir, self.mesh, self.program, self.loader, self.writer = workdir, mesh, program, loader, writer
        self.done, self.tokens = begun
        self.settings, self.stopped, self._asked, self._before = config.checkpoint, False, False, {}
        self._ends_at_once = False
        self.kept = {"config": run_folder.to_dict(config), "model": cfg.to_hf()}
        if mesh.rank == 0:  # whose metadata is saved
            self.kept["tokenizer"] = run_tokenizer.digests(workdir)
        if cfg.lora:
            self.kept["lora"] = dataclasses.asdict(cfg.lora)
            self.kept["base"] = adapter.base_of(cfg, config, weights.initial_params(cfg, config)[0])
        if has_reference(config):
            self.kept["reference"] = adapter.base_of(cfg, config, weights.initial_params(cfg, config)[0])
        c, token = config.checkpoint, run_folder.agreed(mesh, int.from_bytes(os.urandom(3), "big"))
        settings = Settings(c.keep_last, c.keep_every, c.compression, c.async_save, c.on_error, c.timeout_s)
        agree = None if is_simulated() else self._sums  # simulated ranks exchange files alone
        self.saver = Saver(workdir, mesh.rank, mesh.world, f"{token:06x}", settings, agree, begun[0] or None)

    def _sums(self, numbers):
        return numbers if self.mesh.world == 1 else collectives.host_sum(self.mesh, tuple(self.mesh.sizes), numbers).tolist()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python runs signal handlers in the main thread alone
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number, frame):
        self._asked = True
        if self._ends_at_once:
            self._ends_at_once = False
            raise Stopped

    def __exit__(self, kind, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is not None:
            self.saver.close()

    def after_step(self, state, done, tokens):
        """Saves if a checkpoint is due. Returns whether to stop; all ranks agree. Raises CheckpointError as Saver.save does."""
        asked, failed = self._sums([float(self._asked), float(self.saver.failed())])
        if failed:
            self.saver.wait()
        self.done, self.tokens, self.stopped = done, tokens, bool(asked)
        if self.stopped or (self.settings.every and done % self.settings.every == 0):
            self._save(state)
        return self.stopped

    def _save(self, state):
        self.writer.sync()
        norm = state["norm"].asnumpy().tolist()
        meta = {"step": self.done, "tokens_seen": self.tokens, "norm": norm, "loader": self.loader.state(), **self.kept}
        self.saver.save(self.done, partial(pieces, self.mesh, self.program.held(state)), meta)

    def end(self, state):
        """Saves the last checkpoint, and waits until every checkpoint is written. Returns whether the last one was."""
        (asked,) = self._sums([float(self._asked)])
        self._asked = self._asked or bool(asked)
        if (self.settings.on_exit or asked) and not self.stopped:
            self._save(state)
        safe = self.saver.wait()
        if self.stopped and self.mesh.rank == 0:
            how = (
                f"saved in {step_folder(self.workdir, self.done)}; the same command goes on from there" if safe else "it could not be saved"
            )
            print(f"stopped    after step {self.done}, by SIGTERM; {how}", flush=True)
        return safe

    def finish(self, work):
        """Calls work(), which is what comes after end() and takes no part in checkpoints. SIGTERM ends it at once, and what is saved is
        printed."""
        try:
            self._ends_at_once = True
            if self._asked:  # while the last checkpoint was saved
                raise Stopped
            work()
        except BaseException:  # MindSpore makes another error of an exception that passes through its compiler
            if not self._asked:
                raise
            self.stopped = True
            if self.mesh.rank == 0:
                saved = self.saver.saved == self.done
                where = f"which is saved in {step_folder(self.workdir, self.done)}" if saved else "which is not saved"
                print(f"stopped    by SIGTERM after step {self.done}, {where}, before all results were written;", flush=True)
                print("           the same command goes on from the newest checkpoint and writes them", flush=True)
        finally:
            self._ends_at_once = False
