"""Builds the mesh of a run from config.parallel, and checks the layout against the model and the batch before any process starts.

It does not import MindSpore, so that the launcher checks a layout quickly. parallel/placement.py later checks that each parameter can be
split.
"""

from types import SimpleNamespace

from experiments.data import batch_ramp
from experiments.posttrain.settings import caches_reference
from ops.registry import LENGTHS
from parallel.context import split as context
from parallel.hints import divisors
from parallel.mesh import AXES, Mesh, axis_sizes
from parallel.pipeline.schedule import check as check_schedule
from parallel.pipeline.schedule import stage_ranges
from qwen3.schema import LARGEST

MASKED = 8192  # tokens of a row up to which the mask of documents is small: 64 MiB


def check(config, cfg, world=None):
    """Returns {axis: size} for a job of `world` ranks; None: as many ranks as the layout has. Raises ValueError naming key, value and
    fix."""
    parallel = config.parallel
    sizes = axis_sizes(parallel, world)
    if parallel.lowering == "shard":
        check_partitioned(config, cfg)
    if parallel.zero not in (0, 1, 2, 3):
        raise ValueError(f"parallel.zero={parallel.zero} must be 0, 1, 2 or 3")
    _check_model(cfg, config, sizes)
    _check_context(cfg, config, sizes)
    if config.prefer.loss:
        _check_preferences(config, sizes)
    if config.rl.loss:
        _check_rewards(config, sizes)
    if config.train.eval_tasks:
        _check_tasks(config, sizes)
    made = mesh(cfg, {**parallel, **sizes})
    _check_batch(config, sizes, made)
    _check_pipeline(config, cfg, sizes)
    made.size(("tp", "cp"))  # raises ValueError if the sub-axes of an axis do not fit
    return sizes


def check_partitioned(config, cfg):
    """Raises ValueError, naming the key, for a config that --lowering=shard cannot train."""
    if config.parallel.pp > 1:
        _check_partitioned_stages(config, cfg)
    refused = {
        "parallel.cp": (1, "MindSpore has no rule for a ring"),
        "prefer.loss": ("", "preferences are not supported there"),
        "rl.loss": ("", "rewards are not supported there"),
        "optim.lr_groups": ("", "groups of learning rates are not supported there"),
        "train.mup_base_width": (0, "learning rates by parameter are not supported there"),
        "optim.skip_spikes": (0.0, "skipping of updates is not supported there"),
        "train.ema_decay": (0.0, "an average of the weights is not supported there"),
        "train.batch_ramp": ("", "its step is compiled for one size"),
    }
    for name, (only, why) in refused.items():
        section, key = name.split(".")
        if (value := config[section][key]) != only:
            raise ValueError(f"{name}={value} with parallel.lowering=shard: {why}; use {name}={only}, or --lowering=manual")
    if config.parallel.seq_gather_again == "on":
        raise ValueError(
            "parallel.seq_gather_again=on with parallel.lowering=shard: MindSpore's partitioner decides what it gathers; use"
            " parallel.seq_gather_again=auto, or --lowering=manual"
        )
    if config.optim.name == "muon":
        raise ValueError(
            "optim.name=muon with parallel.lowering=shard: it needs whole matrices; use optim.name=adamw, or --lowering=manual"
        )
    if config.train.layer_loop == "scan":
        raise ValueError("train.layer_loop=scan with parallel.lowering=shard: its layers are unrolled; use --config.train.layer_loop=auto")
    if config.train.monitor_every:
        raise ValueError(
            "train.monitor_every with parallel.lowering=shard: monitors read gradients that stay inside MindSpore's graph;"
            " use train.monitor_every=0, or --lowering=manual"
        )


def _check_partitioned_stages(config, cfg):
    """Raises ValueError for what MindSpore's pipeline cannot train, see experiments/train/partitioned_stages.py."""
    pp = f"parallel.pp={config.parallel.pp} with parallel.lowering=shard"
    if cfg.moe_layers:
        raise ValueError(f"{pp}: a stage of MindSpore's sends one tensor, a mixture of experts has two; use --pp=1, or --lowering=manual")
    if cfg.tie_embeddings:
        raise ValueError(
            f"{pp}: MindSpore does not sum the gradient of tied embeddings over the first and the last stage; use"
            " --config.model_args.tie_embeddings=false, --pp=1, or --lowering=manual"
        )
    if (zero := config.parallel.zero) in (1, 2):
        raise ValueError(f"{pp} and parallel.zero={zero}: MindSpore's compiler fails; use --zero=0 or 3, --pp=1, or --lowering=manual")
    if (schedule := config.parallel.pp_schedule) != "1f1b":
        raise ValueError(f"parallel.pp_schedule={schedule} with parallel.lowering=shard: MindSpore's is 1f1b; use it, or --lowering=manual")


def for_inference(asked, cfg, model, world):
    """Returns {axis: size} for inference on `world` ranks. asked: {axis: size or None}. model: its name, for messages. Raises ValueError
    naming key, value and fix."""
    sizes = axis_sizes({axis: asked.get(axis) or 1 for axis in AXES}, world)
    check_only_computes(sizes, cfg)
    of_tp = Mesh(**sizes).size(("tp/ep",))
    if of_tp > 1:
        raise ValueError(
            f"parallel.ep={sizes['ep']} uses {of_tp} of the tp={sizes['tp']} ranks, which have the same tokens when they generate, so"
            f" experts can only be sharded over data ranks; use --dp={sizes['ep']}, or a smaller --ep"
        )
    _check_model(cfg, SimpleNamespace(model=model, parallel=SimpleNamespace(seq_parallel=False)), sizes)
    sizes.update(cp_attention="ring", cp_ulysses=1)
    mesh(cfg, sizes).size(("tp",))
    return sizes


def check_only_computes(sizes, cfg):
    """Raises ValueError for sizes of axes that only training supports."""
    if sizes["cp"] > 1:
        raise ValueError(f"parallel.cp={sizes['cp']} splits rows, which only training supports; use --cp=1, and --tp, --pp, --ep or --dp")
    if sizes["pp"] > cfg.num_layers:
        raise ValueError(
            f"parallel.pp={sizes['pp']} is more than the {cfg.num_layers} layers of the model; use --pp={cfg.num_layers} or less"
        )


def _check_pipeline(config, cfg, sizes):
    parallel, pp = config.parallel, sizes["pp"]
    if pp == 1:
        if parallel.virtual_stages > 1 or parallel.stage_layers:
            key = "virtual_stages" if parallel.virtual_stages > 1 else "stage_layers"
            raise ValueError(f"parallel.{key}={parallel[key]} needs a pipeline, but parallel.pp=1; use --pp=2, or leave it out")
        return
    check_schedule(parallel.pp_schedule, pp, parallel.micro_batches, parallel.virtual_stages)
    stage_ranges(cfg.num_layers, pp, parallel.virtual_stages, tuple(parallel.stage_layers))
    if config.train.layer_loop == "scan":
        raise ValueError("train.layer_loop=scan: the layers of a pipeline stage are unrolled; use --config.train.layer_loop=auto")


def mesh(cfg, parallel, rank=0):
    """Returns the Mesh of a rank. parallel: config.parallel, whose axes check() has filled in."""
    sizes = {axis: parallel[axis] for axis in AXES}
    ulysses = {"ring": 1, "ulysses": sizes["cp"], "hybrid": parallel["cp_ulysses"]}[parallel["cp_attention"]]
    return Mesh(**sizes, kv_repeat=max(1, sizes["tp"] // cfg.num_kv_heads), ulysses=ulysses, rank=rank)


def documents(config, device):
    """Returns the most documents of a row of which attention takes the lengths, see data.max_documents; 0: it compares segments. device:
    MindSpore's name. config.parallel: as check() has filled it in."""
    asked, parallel = config.data.max_documents, config.parallel
    if asked != -1:
        return asked
    ring = parallel.cp > 1 and parallel.cp_attention != "ulysses"
    if device != "Ascend" or config.ops.attention not in ("auto", "vendor") or (config.train.seq_len <= MASKED and not ring):
        return 0
    return max(2, LENGTHS // (config.train.batch_size // (parallel.dp * parallel.micro_batches)))


def _check_documents(config, rows):
    """rows: of a rank's micro-batch."""
    most = config.data.max_documents
    if most > 0 and rows * most > LENGTHS and config.ops.attention in ("auto", "vendor"):
        raise ValueError(
            f"data.max_documents={most} for each of the {rows} rows of a rank's micro-batch is more than the {LENGTHS} documents that"
            f" MindSpore's attention takes; use --config.data.max_documents={max(2, LENGTHS // rows)} or less, or more micro-batches"
        )


def _check_model(cfg, config, sizes):
    tp, ep, model = sizes["tp"], sizes["ep"], f"model={config.model}"

    def need(ok, axis, rule, fix):
        if not ok:
            raise ValueError(f"parallel.{axis}={sizes[axis]} {rule} of {model}; use {fix}")

    heads, kv = cfg.num_heads, cfg.num_kv_heads
    need(heads % tp == 0, "tp", f"must divide num_heads={heads}", divisors(heads))
    fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0))
    need(kv % tp == 0 or tp % kv == 0, "tp", f"must divide num_kv_heads={kv} or be a multiple of it, for the kv heads", fits)
    if len(cfg.moe_layers) < cfg.num_layers:
        need(cfg.ffn_size % tp == 0, "tp", f"must divide ffn_size={cfg.ffn_size}", divisors(cfg.ffn_size))
    if ep > 1 and not cfg.num_experts:
        raise ValueError(f"parallel.ep={ep} splits experts, and {model} is dense; use --ep=1")
    if not cfg.num_experts:
        return
    need(cfg.num_experts % ep == 0, "ep", f"must divide num_experts={cfg.num_experts}", divisors(cfg.num_experts))
    of_tp = Mesh(**sizes).size(("tp/ep",))
    if of_tp > 1 and not config.parallel.seq_parallel:
        raise ValueError(
            f"parallel.ep={ep} uses {of_tp} of the tp={tp} ranks, which then must have different tokens; use --seq_parallel, or a"
            " larger --dp"
        )
    left = tp // of_tp
    what = f"leaves {left} ranks beside ep={ep}, which must divide moe_ffn_size={cfg.moe_ffn_size}"
    need(cfg.moe_ffn_size % left == 0, "tp", what, divisors(cfg.moe_ffn_size))


def _check_context(cfg, config, sizes):
    parallel, tp, cp = config.parallel, sizes["tp"], sizes["cp"]
    ulysses, how = parallel.cp_ulysses, f"parallel.cp_attention={parallel.cp_attention}"
    if parallel.cp_attention != "hybrid":
        if ulysses != 1:
            raise ValueError(f"parallel.cp_ulysses={ulysses} needs parallel.cp_attention=hybrid, but {how}; leave it out")
        ulysses = cp if parallel.cp_attention == "ulysses" else 1
    elif cp % ulysses or ulysses in (1, cp):
        fits = [n for n in range(2, cp) if cp % n == 0]
        fix = f"use {', '.join(map(str, fits))}" if fits else f"parallel.cp={cp} has none; use parallel.cp_attention=ring or ulysses"
        raise ValueError(f"parallel.cp_ulysses={ulysses} must divide parallel.cp={cp}, and must not be 1 or {cp}, for {how}; {fix}")
    heads, kv = cfg.num_heads // tp, max(1, cfg.num_kv_heads // tp)
    if heads % ulysses or (kv % ulysses and ulysses % kv):
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0))
        raise ValueError(
            f"{how} shares {heads} heads over {ulysses} ranks of cp, which must divide them, and divide {kv} kv heads or be a multiple"
            f" (num_heads={cfg.num_heads} and num_kv_heads={cfg.num_kv_heads} of model={config.model}, tp={tp}); share them over {fits},"
            " or use parallel.cp_attention=ring"
        )


def _check_preferences(config, sizes):
    """Raises ValueError for what training on preferences cannot do. parallel.lowering=shard: see check_partitioned."""
    if sizes["pp"] > 1:
        raise ValueError(
            f"parallel.pp={sizes['pp']} with prefer.loss={config.prefer.loss} is not supported; use --pp=1, with more --tp or --zero"
        )
    if sizes["cp"] > 1 and caches_reference(config):
        raise ValueError(
            f"parallel.cp={sizes['cp']} with prefer.loss={config.prefer.loss} of all weights: the cache of the reference model needs whole"
            " rows on a rank; use --cp=1, or adapters by --config.lora.rank"
        )
    if config.prefer.loss == "reward":
        for key, only in (("lora.rank", 0), ("train.sample_tokens", 0)):
            section, name = key.split(".")
            if (value := config[section][name]) != only:
                why = "adapters would leave its head as it was drawn" if name == "rank" else "it writes no text"
                raise ValueError(f"{key}={value} with prefer.loss=reward, a reward model: {why}; use --config.{key}={only}")
    if config.train.monitor_every:
        raise ValueError("train.monitor_every with prefer.loss: the monitors know the loss of next tokens alone; use train.monitor_every=0")


def _check_rewards(config, sizes):
    """Raises ValueError for what reinforcement learning cannot do. parallel.lowering=shard: see check_partitioned."""
    rl, train, loss = config.rl, config.train, f"rl.loss={config.rl.loss}"
    for axis in ("tp", "pp", "cp", "ep"):
        if sizes[axis] > 1:
            raise ValueError(f"parallel.{axis}={sizes[axis]} with {loss} is not supported; use --{axis}=1, with more --dp")
    if config.parallel.zero == 3:
        raise ValueError(f"parallel.zero=3 with {loss}: the engine needs whole parameters on each data rank; use --zero=2 or less")
    if train.batch_size % rl.group_size:
        raise ValueError(
            f"train.batch_size={train.batch_size} counts answers, and must be a multiple of rl.group_size={rl.group_size};"
            f" use --config.train.batch_size={rl.group_size * (train.batch_size // rl.group_size + 1)}"
        )
    if rl.max_new_tokens > train.seq_len:
        raise ValueError(
            f"rl.max_new_tokens={rl.max_new_tokens} is more than train.seq_len={train.seq_len}, which holds the prompt too; lower it, or"
            " raise train.seq_len"
        )
    if config.prefer.loss:
        raise ValueError(f"{loss} with prefer.loss={config.prefer.loss}: a run has one objective; leave one out")
    if train.monitor_every:
        raise ValueError("train.monitor_every with rl.loss: the monitors know the loss of next tokens alone; use train.monitor_every=0")
    for key, off in (("ema_decay", 0.0), ("batch_ramp", "")):
        if train[key] != off:
            raise ValueError(f"train.{key}={train[key]} with {loss} is not supported; use --config.train.{key}={off}")


def _check_tasks(config, sizes):
    """Raises ValueError where tasks cannot be scored on a run's own state."""
    for axis in ("pp", "cp"):
        if sizes[axis] > 1:
            raise ValueError(
                f"train.eval_tasks with parallel.{axis}={sizes[axis]} is not supported; use --{axis}=1, or experiments.evaluate"
            )
    for key, value in (("parallel.lowering", "manual"), ("prefer.loss", ""), ("rl.loss", "")):
        section, name = key.split(".")
        if config[section][name] != value:
            raise ValueError(f"train.eval_tasks with {key}={config[section][name]} is not supported; use experiments.evaluate afterwards")


def _check_batch(config, sizes, mesh):
    tokens = config.train.batch_size * config.train.seq_len
    if tokens > LARGEST:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} rows of train.seq_len={config.train.seq_len} are {tokens} tokens, and an int32"
            f" counts up to {LARGEST}; lower one of them"
        )
    train, micro, dp = config.train, config.parallel.micro_batches, sizes["dp"]
    for size in batch_ramp.sizes(train):
        key = "batch_size" if size == train.batch_size else "batch_ramp"
        if size > train.batch_size:
            raise ValueError(
                f"train.batch_ramp={train.batch_ramp!r} has steps of {size} rows, more than train.batch_size={train.batch_size}"
            )
        if size % (dp * micro):
            fix = dp * micro * (size // (dp * micro) + 1)
            raise ValueError(
                f"train.{key}={size} must be a multiple of parallel.dp={dp} times parallel.micro_batches={micro};"
                f" use {f'--config.train.batch_size={fix}' if key == 'batch_size' else fix}"
            )
        _check_rows(config, sizes, mesh, size // (dp * micro))


def _check_rows(config, sizes, mesh, count):
    """count: the rows of a data rank's micro-batch."""
    train, tp = config.train, sizes["tp"]
    _check_documents(config, count)
    rows = count * context.padded(mesh, train.seq_len) // sizes["cp"]
    if config.parallel.seq_parallel and rows % tp:
        raise ValueError(
            f"parallel.seq_parallel splits the {rows} tokens of a data rank's micro-batch over tp={tp} ranks, which must divide them;"
            f" use --config.train.seq_len={sizes['cp'] * tp * -(-train.seq_len // (sizes['cp'] * tp))}"
        )
