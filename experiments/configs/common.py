"""Every key of a run, with its default. A config file starts from `get_config()` and states only differences.

The config is locked: a key that is not here is an error, in a file as on the command line.
"""

import dataclasses
import typing

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from ops.registry import OPS
from qwen3.config import Qwen3Config


def get_config():
    """A locked ConfigDict of defaults."""
    c = ConfigDict()
    c.model = "tiny"  # a name in qwen3.config.SIZES, or a Hugging Face folder, of which config.json gives the sizes
    c.model_args = _model_args()  # changes to the model's fields, named as in Qwen3Config; None keeps
    c.yarn = ConfigDict()  # rotary angles stretched for longer rows
    c.yarn.factor = 0.0  # by how much; 0 = as the model has it
    c.yarn.original_max_position = 0  # positions that the model was trained with; 0 = its max_position
    # Where a new run begins; one whose own folder has a checkpoint goes on from that. Also --resume_from, --init_from, --partial
    c.resume_from = ""  # run, or checkpoint of one, to go on from, with its optimizer state, step and place in the data
    c.init_from = ""  # Hugging Face folder, run or checkpoint to take the weights from, and nothing else; empty = random weights
    c.partial = False  # load what fits of a checkpoint of another model, and list what does not

    c.train = ConfigDict()
    c.train.steps = 1000  # optimizer steps
    c.train.batch_size = 16  # rows per optimizer step, over all ranks
    c.train.seq_len = 1024  # tokens per row
    c.train.log_every = 10  # steps between lines of metrics
    c.train.eval_every = 0  # steps between evaluations on held-out rows; 0 = only before the first step and after the last
    c.train.eval_rows = 64  # most held-out rows per evaluation; 0 = all. At the end final_loss is that of all
    c.train.seed = 0  # of the initial weights and of the order of the data
    # unroll = every layer is compiled; scan = one is, looped over and recomputed in the backward; auto = scan above 8 layers of a kind
    c.train.layer_loop = "auto"
    # what of each layer the backward computes again instead of keeping: none, attention, or full = all of it, as scan does in any case
    c.train.recompute = "none"
    c.train.save_hf_every = 0  # steps between Hugging Face folders of the weights, hf_steps/step_N; 0 = none. LoRA: its adapters
    c.train.sample_tokens = 64  # tokens of the sample printed at the end; 0 = no sample
    c.train.sample_prompt = ""  # text the sample continues; empty = the model's start of text
    # steps between those of which each layer's norms of weights, gradients and activations are written, how far weights moved, the largest
    # attention logit, the router's entropy, and the loss by source of a blend; 0 = off
    c.train.monitor_every = 0
    c.train.profile_steps = ""  # such as 10:15: a trace and a table of the time of each op, of these steps, in the run's profile/
    c.train.save_hf = True  # write the final weights as a Hugging Face folder
    # fine-tuning: held-out questions answered at the end, greedily, for the share of exact matches; 0 = none
    c.train.exact_match_rows = 200

    # Patterns of parameter paths, separated by commas: what the first match and the second do not stays as it is, without gradients
    c.train.freeze_include = ""  # such as "embed,layers.0.*,*norm"
    c.train.freeze_exclude = ""

    c.lora = _lora()
    c.optim = _optim()
    c.checkpoint = _checkpoint()
    c.data = _data()

    c.ops = ConfigDict({op: "auto" for op in OPS})  # of each: reference, cpu, vendor, ascendc, or auto = the fastest that serves

    c.parallel = _parallel()  # also --dp, --tp, ... on the command line
    return c.lock()


def _parallel():
    p = ConfigDict()
    p.dp = 1  # data parallel ranks
    p.tp = 1  # tensor parallel ranks
    p.pp = 1  # pipeline parallel ranks
    p.pp_schedule = "1f1b"  # gpipe, 1f1b, or interleaved, which goes with virtual stages
    p.virtual_stages = 1  # pipeline stages of a rank
    p.stage_layers = ()  # layers of each pipeline stage, such as (7,9); empty = as even as can be
    p.cp = 1  # context parallel ranks
    p.cp_attention = "ring"  # ring, ulysses, or hybrid = rings of the cp_ulysses ranks that exchange heads
    p.cp_ulysses = 1  # of hybrid: neighbouring cp ranks that exchange heads for tokens
    p.ep = 1  # expert parallel ranks, cut from dp x cp x tp
    p.micro_batches = 1  # slices each data rank cuts its rows into: gradient accumulation, pipeline micro-batches
    p.zero = 0  # ZeRO stage; 0 = every data rank holds all
    p.seq_parallel = False  # sequence parallel: activations between the matmuls are split over the tp ranks
    p.lowering = "manual"  # manual = our collectives on local shards; shard = MindSpore's own partitioning
    return p


def _lora():
    a = ConfigDict()  # adapters beside frozen weights
    a.rank = 0  # 0 = no adapters
    a.alpha = 16.0  # the scale is alpha / rank
    a.rslora = False  # it is alpha / sqrt(rank) instead
    a.dropout = 0.0  # of what goes into an adapter
    a.init = "kaiming"  # of A, as PEFT's default, or gaussian; B is 0
    # patterns of embed, q, k, v, o, gate, up, down, router, experts.gate, experts.up, experts.down (experts: all three), by commas
    a.targets = "q,k,v,o,gate,up,down"
    a.adapter = ""  # folder of an adapter in PEFT's format to begin with
    return a


def _optim():
    o = ConfigDict()
    # adamw; lion, for which b1=0.9, b2=0.99 and a third to a tenth of AdamW's lr are usual; sgd, with b1 as its momentum; or muon, of
    # matrices inside layers, with AdamW for the rest
    o.name = "adamw"
    o.lr = 3e-4  # highest learning rate
    o.schedule = "cosine"  # constant, linear, cosine, or wsd (warm up, stay, decay)
    o.warmup_steps = 100  # steps from 0 to lr, in a straight line
    o.warmup_ratio = 0.0  # instead of warmup_steps, the fraction of train.steps; 0 = warmup_steps
    o.decay_fraction = 0.2  # wsd: the last fraction of the steps, in which lr decays
    o.min_lr_ratio = 0.1  # last learning rate over lr
    o.b1 = 0.9  # decay of the first moment, or momentum
    o.b2 = 0.95  # of AdamW's second moment, or of Lion's first
    o.muon_momentum = 0.95  # of matrices
    o.eps = 1e-8  # of AdamW
    o.weight_decay = 0.1  # of matrices, times lr a step
    o.clip_norm = 1.0  # largest global gradient norm; 0 = no clipping
    o.skip_spikes = 0.0  # skip an update whose gradient norm exceeds this multiple of the running mean; 0 = off
    o.router_bias_rate = 1e-3  # step of the router's bias, when model_args.router_bias is on
    return o


def _checkpoint():
    k = ConfigDict()
    k.every = 500  # steps between checkpoints; 0 = none on the way
    k.on_exit = True  # save at the end of the run
    k.keep_last = 3  # newest checkpoints that are kept; 0 = all
    k.keep_every = 0  # checkpoints of steps that are multiples of this are kept too; 0 = none
    k.async_save = True  # write while training goes on, from a copy in memory
    k.compression = "none"  # none or zstd
    k.on_error = "stop"  # when a checkpoint cannot be written: stop, or continue with a warning
    k.timeout_s = 1800.0  # seconds for all ranks to write their parts
    return k


def _data():
    d = ConfigDict()
    # a text file, or a folder of them; the prefix of a .bin/.idx pair; a blend [weight, prefix, ...], or "weight,prefix,..."; or, with
    # data.stream, a jsonl, parquet or other file of records, a folder of them, or hf:FOLDER, a dataset of Hugging Face's `datasets`
    # (hf:FOLDER#SPLIT, hf:FOLDER#CONFIG/SPLIT); with data.format, a file or folder of conversations; empty = Python's own library, and with
    # data.format made-up instructions
    d.path = FieldReference("", field_type=object)
    d.tokenizer = ""  # folder with tokenizer.json; empty = train a byte-level BPE on the data, if that is plain text
    d.vocab_size = 512  # tokens of the trained BPE
    d.held_out = 0.05  # fraction of the text, or of a stream's records, kept for evaluation
    d.split = "95,5,0"  # weights of train, valid and test in a pair
    d.max_bytes = 0  # most bytes of text, or of conversations as JSON, to read; 0 = all
    d.max_samples = 0  # most conversations to read, the first ones; 0 = all
    d.reset_at_eod = True  # each document of a row has its own attention and positions; false = a row is read as one text
    # a pair is of conversations, as preprocess --format makes them: whole in a row, loss where the pair of loss masks beside it says
    d.conversations = False
    # records are conversations, to be tokenised at the start: alpaca, sharegpt or messages (OpenAI's); "" = none. For experiments.finetune
    d.format = ""
    d.enable_thinking = "none"  # given to the chat template with those: none, true or false
    d.packing = "packed"  # those conversations: packed = several to a row, masked from each other; padded = one a row
    d.too_long = "truncate"  # conversations longer than a row: truncate, drop, or error
    d.stream = False  # read and tokenise while training
    d.json_key = "text"  # where a stream's records have their text
    d.shuffle_buffer = 0  # records of a stream that are shuffled at a time; 0 = in the order of the files
    d.skip_bad = False  # count and leave out a stream's records that cannot be used, instead of an error
    d.cache_dir = ""  # folder for the index files of pairs, shared by processes; empty = made in memory
    return d


def _model_args():
    """An empty place, typed, for each field of Qwen3Config but rope_scaling, which comes with a config.json, and what trains."""
    hints = {f.name: f.type for f in dataclasses.fields(Qwen3Config) if f.name not in ("rope_scaling", "lora", "frozen")}
    return ConfigDict({name: placeholder(next(iter(typing.get_args(hint)), hint)) for name, hint in hints.items()})
