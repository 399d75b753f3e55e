"""Every key of a run, with its default. A config file starts from `get_config()` and states only differences.

The config is locked: a key that is not here is an error, both in a config file and on the command line.
"""

import dataclasses
import typing

from ml_collections import ConfigDict as _ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from ops.registry import OPS
from qwen3.config import Qwen3Config


class ConfigDict(_ConfigDict):
    """A ConfigDict in which true and false are no numbers: ml_collections would make 1 and 0 of them."""

    def __setitem__(self, key, value):
        if isinstance(value, bool) and key in self and self.get_type(key) in (int, float):
            raise TypeError(f"{key}={value} is true or false, and a number is needed")
        super().__setitem__(key, value)


def get_config():
    """Returns a locked ConfigDict of defaults."""
    c = ConfigDict()
    c.model = "tiny"  # a name in qwen3.config.SIZES, or a Hugging Face folder, whose config.json gives the sizes
    c.model_args = _model_args()  # changes to fields of Qwen3Config; None keeps the model's value
    c.yarn = ConfigDict()  # YaRN scaling of the rotary angles, for longer rows
    c.yarn.factor = 0.0  # new length / original length; 0 = the model's own setting
    c.yarn.original_max_position = 0  # positions before scaling; 0 = the model's max_position
    # Where a new run gets its weights. A run whose own folder has a checkpoint continues from that. Flags: --resume_from, --init_from,
    # --partial
    c.resume_from = ""  # run or checkpoint to continue, with its optimizer state, step and position in the data
    c.init_from = ""  # Hugging Face folder, run or checkpoint from which only the weights are loaded; empty = random weights
    c.partial = False  # from another model's checkpoint, load the arrays that fit, and list the others

    c.train = ConfigDict()
    c.train.steps = 1000  # optimizer steps
    c.train.batch_size = 16  # rows per optimizer step, over all ranks
    c.train.batch_ramp = ""  # smaller steps at first, such as "4:100,8:300": of 4 rows until step 100, of 8 until step 300; empty = none
    c.train.seq_len = 1024  # tokens per row
    c.train.log_every = 10  # steps between lines of metrics
    c.train.eval_every = 0  # steps between evaluations on held-out rows; 0 = only before the first step and after the last
    c.train.eval_rows = 64  # the most held-out rows of an evaluation; 0 = all. At the end final_loss is that of all rows
    # files of tasks, separated by commas, that each evaluation scores by log-likelihood, see experiments/evaluate/tasks.py; empty = none
    c.train.eval_tasks = ""
    c.train.seed = 0  # seed of the initial weights and of the order of the data
    # unroll = all layers are compiled; scan = one layer is compiled, run in a loop, and recomputed in the backward pass; auto = scan for
    # more than 8 layers of one kind
    c.train.layer_loop = "auto"
    # which part of a layer the backward pass computes again, to save memory: none, attention, or full (scan always recomputes in full)
    c.train.recompute = "none"
    # chunks of the vocabulary, or of a rank's shard of it, in which the head and the loss are computed one after another, so that the
    # logits do not stand in memory whole; 1 = all at once; 0 = on Ascend as few as keep a chunk's logits within 128 MiB, on CPU 1
    c.train.loss_chunks = 1
    c.train.save_hf_every = 0  # steps between Hugging Face folders of the weights, hf_steps/step_N; 0 = none. LoRA: its adapters
    c.train.sample_tokens = 64  # tokens of the sample printed at the end; 0 = no sample
    c.train.sample_prompt = ""  # text that the sample continues; empty = the start of a document
    # steps between monitored steps, of which these are written for each layer: norms of weights, gradients and activations, relative size
    # of the update, largest attention logit, router entropy; and the loss of each source of a blend; 0 = off
    c.train.monitor_every = 0
    c.train.profile_steps = ""  # such as 10:15: profile these steps; writes a trace and a table of op times to the run's profile/
    c.train.save_hf = True  # write the final weights as a Hugging Face folder
    # fine-tuning: number of held-out questions answered greedily at the end, to report the fraction of exact matches; 0 = none
    c.train.exact_match_rows = 200

    # decay of an exponential moving average of the weights, such as 0.999, which is evaluated beside them and saved as hf_ema; 0 = none
    c.train.ema_decay = 0.0
    # muP: the hidden_size at which optim.lr and initializer_range hold as they are; at other widths both follow from it, docs/ladder.md;
    # 0 = no muP
    c.train.mup_base_width = 0

    # Patterns of parameter paths, separated by commas. Parameters that match freeze_include and not freeze_exclude are not trained.
    c.train.freeze_include = ""  # such as "embed,layers.0.*,*norm"
    c.train.freeze_exclude = ""
    # in which dtype a rank keeps frozen matrices, and the base of adapters: float32, bfloat16, float16, or auto = the base of adapters in
    # the compute dtype, in which it is used, and what freeze_include freezes in float32
    c.train.frozen_dtype = "auto"

    c.lora = _lora()
    c.prefer = _prefer()
    c.rl = _rl()
    c.optim = _optim()
    c.checkpoint = _checkpoint()
    c.data = _data()

    c.watch = ConfigDict()
    # where metrics go beside metrics.jsonl and TensorBoard: wandb, mlflow, or both, separated by commas; docs/ablations.md; empty = nowhere
    c.watch.trackers = ""
    c.watch.project = "qwen3"  # the project of W&B, the experiment of MLflow

    c.ops = ConfigDict({op: "auto" for op in OPS})  # for each op: reference, cpu, vendor, ascendc, or auto = the fastest that works here

    c.parallel = _parallel()  # also --dp, --tp, ... on the command line
    return c.lock()


def _parallel():
    p = ConfigDict()
    p.dp = 1  # data parallel ranks
    p.tp = 1  # tensor parallel ranks
    p.pp = 1  # pipeline parallel ranks
    p.pp_schedule = "1f1b"  # gpipe, 1f1b, or interleaved, which needs virtual stages
    p.virtual_stages = 1  # pipeline stages per rank
    p.stage_layers = ()  # layers of each pipeline stage, such as (7,9); empty = as equal as possible
    p.cp = 1  # context parallel ranks
    p.cp_attention = "ring"  # ring, ulysses, or hybrid = ulysses within groups of cp_ulysses ranks, and rings across the groups
    p.cp_ulysses = 1  # hybrid: number of neighbouring cp ranks that exchange heads for tokens
    p.ep = 1  # expert parallel ranks, cut from dp x cp x tp
    p.micro_batches = 1  # number of slices of a data rank's rows, for gradient accumulation and for the pipeline
    p.zero = 0  # ZeRO stage; 0 = parameters and optimizer state are replicated over data ranks
    p.seq_parallel = False  # sequence parallel: activations outside of attention and ffn are sharded over tp ranks by rows
    # the gathered inputs of the products of a layer, with sequence parallel: on = the backward gathers them again instead of keeping them;
    # auto = on where layers are not recomputed
    p.seq_gather_again = "off"
    p.lowering = "manual"  # manual = our collectives on local shards; shard = MindSpore's partitioner, for training on Ascend
    return p


def _lora():
    a = ConfigDict()  # adapters beside frozen weights
    a.rank = 0  # 0 = no adapters
    a.alpha = 16.0  # the scale is alpha / rank
    a.rslora = False  # true = the scale is alpha / sqrt(rank)
    a.dropout = 0.0  # dropout rate of an adapter's input
    a.init = "kaiming"  # initial values of A: kaiming, PEFT's default, or gaussian; B starts at 0
    # names or patterns, separated by commas, of: embed, q, k, v, o, gate, up, down, router, experts.gate, experts.up, experts.down;
    # "experts" means all three of the experts
    a.targets = "q,k,v,o,gate,up,down"
    a.adapter = ""  # folder of an adapter in PEFT's format from which training starts
    return a


def _prefer():
    p = ConfigDict()  # training on preferences, for experiments.prefer; experiments/posttrain/losses.py has the formulas
    p.loss = ""  # dpo, ipo, kto, simpo, or reward = a reward model; empty = no preferences
    p.beta = 0.1  # how strongly the reference model holds the policy back; simpo: the scale of the score, usually 2 to 2.5
    p.margin = 0.0  # simpo and reward: by how much the chosen answer should win; simpo: usually 0.3 to 1.6
    p.label_smoothing = 0.0  # dpo: the share of pairs that are assumed to be the wrong way round
    p.length_normalised = False  # dpo, ipo, kto: divide the log-probability of an answer by its number of tokens; simpo always does
    p.desirable_weight = 1.0  # kto: weight of the loss of desirable answers
    p.undesirable_weight = 1.0  # kto: weight of the loss of the other answers
    p.row_pairs = 8  # the most pairs that are packed into a row
    return p


def _rl():
    r = ConfigDict()  # reinforcement learning on rewards, for experiments.rl; experiments/posttrain/losses.py has the formulas
    r.loss = ""  # grpo, dapo, dr_grpo or gspo; empty = no rewards
    # the reward of an answer: module:function, called with (prompt, text, record) in a process of its own; docs/posttraining.md
    r.reward = "experiments.posttrain.rewards:exact_match"
    r.reward_timeout_s = 10.0  # seconds after which a reward that is not there is given up, and its answer left out
    r.reward_processes = 2  # processes that compute rewards, on each data rank
    r.group_size = 8  # answers to each prompt, which are compared with each other; train.batch_size counts answers
    r.max_new_tokens = 64  # the most tokens of an answer; the prompt has the rest of train.seq_len
    r.updates = 1  # updates by the answers of a step, before new answers are sampled
    r.deviation = True  # divide the advantages of a group by the standard deviation of its rewards; Dr. GRPO does not
    r.clip_low = 0.2  # a probability that has fallen below 1 - clip_low times that of sampling is not lowered further
    r.clip_high = 0.2  # a probability that has risen above 1 + clip_high times that of sampling is not raised further
    r.kl_coef = 0.0  # weight of the divergence from the reference model, the one that training starts from; 0 = no reference model
    r.slots = 64  # answers that are sampled at a time, on each data rank
    r.log_samples = 4  # answers of each logged step that are written to samples.jsonl
    return r


def _optim():
    o = ConfigDict()
    # adamw; lion (usual: b1=0.9, b2=0.99, and a third to a tenth of AdamW's lr); sgd (b1 is its momentum); or muon for matrices in layers,
    # with AdamW for all other parameters
    o.name = "adamw"
    o.lr = 3e-4  # the highest learning rate
    # factors of the learning rate by patterns of parameter paths, such as "embed=0.1,layers.3.*=0.5"; the last pattern that matches counts
    o.lr_groups = ""
    o.schedule = "cosine"  # constant, linear, cosine, or wsd (warm up, stay, decay)
    o.warmup_steps = 100  # steps in which the learning rate rises linearly from 0 to lr
    o.warmup_ratio = 0.0  # instead of warmup_steps, as a fraction of train.steps; 0 = warmup_steps
    o.decay_fraction = 0.2  # wsd: fraction of the steps, at the end, in which the learning rate decays
    o.min_lr_ratio = 0.1  # last learning rate / lr
    o.b1 = 0.9  # decay of the first moment, or momentum
    o.b2 = 0.95  # decay of AdamW's second moment, or of Lion's moment
    o.muon_momentum = 0.95  # momentum of Muon
    o.eps = 1e-8  # AdamW's epsilon
    o.weight_decay = 0.1  # decay of matrices, per step times the learning rate
    o.clip_norm = 1.0  # gradients with a larger global norm are scaled down to this; 0 = no clipping
    o.skip_spikes = 0.0  # skip an update whose gradient norm exceeds this multiple of the running mean; 0 = off
    o.router_bias_rate = 1e-3  # step size of the router's bias, with model_args.router_bias=True
    return o


def _checkpoint():
    k = ConfigDict()
    k.every = 500  # steps between checkpoints; 0 = none during training
    k.on_exit = True  # save at the end of the run
    k.keep_last = 3  # number of newest checkpoints to keep; 0 = all
    k.keep_every = 0  # also keep checkpoints of steps that are multiples of this; 0 = no others
    k.async_save = True  # write a copy in memory to disk while training continues
    k.compression = "none"  # none or zstd
    k.on_error = "stop"  # if a checkpoint cannot be written: stop, or continue with a warning
    k.timeout_s = 1800.0  # seconds in which all ranks must have written their files
    return k


def _data():
    d = ConfigDict()
    # One of:
    #   a text file, or a folder of text files; empty = the source files of Python's own library
    #   the prefix of a .bin/.idx pair, or a blend of pairs: [weight, prefix, ...] or "weight,prefix,..."
    #   with data.stream: a jsonl, parquet or other file of records, a folder of them, or hf:FOLDER, a dataset of Hugging Face's `datasets`
    #   (hf:FOLDER#SPLIT, hf:FOLDER#CONFIG/SPLIT)
    #   with data.format: a file or folder of conversations; empty = generated instructions
    d.path = FieldReference("", field_type=object)
    d.tokenizer = ""  # folder with tokenizer.json; empty = train a byte-level BPE on the data, if that is plain text
    d.vocab_size = 512  # tokens of the trained BPE
    d.held_out = 0.05  # fraction of the text, or of a stream's records, kept for evaluation
    d.split = "95,5,0"  # relative sizes of the train, valid and test splits of a pair
    d.max_bytes = 0  # the most bytes of text, or of conversations as JSON, to read; 0 = all
    d.max_samples = 0  # the most conversations, or records of a stream, to read, the first ones; 0 = all
    d.reset_at_eod = True  # tokens attend only within their document, and positions start at 0 in each; False = a row is one text
    # the most documents of a row, padding counted as one; a row with more is an error. Attention then takes the lengths of documents, in
    # memory linear in train.seq_len. 0 = any number: attention compares segments, on Ascend by a mask of seq_len^2 bytes a row. -1 = 0, but
    # on Ascend, where MindSpore's attention computes rows above 8,192 tokens or a ring, as many as it takes
    d.max_documents = -1
    # the pair contains conversations, written by preprocess --format: no conversation is split, and the loss mask beside the pair is used
    d.conversations = False
    # format of records that are tokenised at the start; for experiments.finetune: alpaca, sharegpt or messages (OpenAI's); for
    # experiments.prefer: pairs (prompt, chosen, rejected) or unpaired (prompt, completion, label); for experiments.rl: prompts;
    # empty = text
    d.format = ""
    d.enable_thinking = "none"  # value for the chat template: none = not set, true or false
    # loss on the empty think block that a thinking model's template puts before answers without reasoning; false = none, as Qwen recommends
    d.train_empty_think = False
    d.packing = "packed"  # of conversations: packed = several per row, with a document mask; padded = one per row
    d.too_long = "truncate"  # conversations longer than a row: truncate, drop, or error
    d.stream = False  # read and tokenise while training
    d.json_key = "text"  # key of the text in a stream's records
    d.shuffle_buffer = 0  # number of a stream's records that are shuffled together; 0 = the order of the files
    d.skip_bad = False  # leave out a stream's unusable records and report their number; False = an error
    d.cache_dir = ""  # folder for index files of pairs, which processes share; empty = keep the indices in memory
    return d


def _model_args():
    """Returns a typed placeholder for each field of Qwen3Config, except those that other keys set."""
    by_others = ("rope_scaling", "lora", "frozen", "frozen_dtype", "mup_base_width", "num_labels")
    hints = {f.name: f.type for f in dataclasses.fields(Qwen3Config) if f.name not in by_others}
    return ConfigDict({name: placeholder(next(iter(typing.get_args(hint)), hint)) for name, hint in hints.items()})
