"""Preferences from files of records to rows: the forms of a record, what has loss, packing of pairs, and what is refused."""

import json

import numpy as np
import pytest

from experiments.configs import common
from experiments.data import corpus, instructions, preferences
from experiments.data.preferences import CHOSEN, OTHER, REJECTED, PreferenceRows
from qwen3.tokenizer import train_bpe

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
PROMPT = [{"role": "user", "content": "say a"}]
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def said(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["say a b c A B hello hi user assistant"] * 20, 300)


def settings(folder, records, **changes):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = common.get_config()
    config.data.path, config.data.format = str(path), "pairs"
    config.data.update(changes)
    return config.data


def loaded(folder, tokenizer, records, loss="dpo", **changes):
    return preferences.load(settings(folder, records, **changes), tokenizer, loss)


def test_each_form_of_a_record_gives_the_same_pair(tokenizer, tmp_path):
    dialogue = HUMAN + "hi" + ASSISTANT + "hello" + HUMAN + "say a"
    forms = [
        {"prompt": EARLIER + PROMPT, "chosen": "A", "rejected": "b"},
        {"prompt": EARLIER + PROMPT, "chosen": said("A"), "rejected": said("b")},
        {"prompt": EARLIER + PROMPT, "chosen": EARLIER + PROMPT + said("A"), "rejected": EARLIER + PROMPT + said("b")},
        {"chosen": EARLIER + PROMPT + said("A"), "rejected": EARLIER + PROMPT + said("b")},
        {"chosen": dialogue + ASSISTANT + "A", "rejected": dialogue + ASSISTANT + "b"},
        {"prompt": dialogue + ASSISTANT, "chosen": "A", "rejected": "b"},
    ]
    found = loaded(tmp_path, tokenizer, forms)
    assert len(found) == len(forms) and found.signs.tolist() == [CHOSEN, REJECTED] * len(forms)
    for i in range(2, 2 * len(forms)):
        assert [a.tolist() for a in found.answers[i]] == [a.tolist() for a in found.answers[i % 2]], forms[i // 2]
    simple = loaded(tmp_path, tokenizer, [{"prompt": "say a", "chosen": "A", "rejected": "b"}])
    assert simple.answers[0][0].tolist() == tokenizer.encode(
        "<|im_start|>user\nsay a<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n", allow_special=True
    )


def test_only_the_answer_has_loss(tokenizer, tmp_path):
    found = loaded(tmp_path, tokenizer, [{"prompt": EARLIER + PROMPT, "chosen": "A", "rejected": "b"}])
    for i, text in ((0, "A<|im_end|>"), (1, "b<|im_end|>")):
        ids, mask = found.answers[i]
        assert tokenizer.decode(ids[mask == 1]) == text


def test_of_a_reward_model_the_target_after_the_last_token_counts(tokenizer, tmp_path):
    record = [{"prompt": "say a", "chosen": "A", "rejected": "b"}]
    (ids, mask), (plain, _) = (loaded(tmp_path, tokenizer, record, loss).answers[0] for loss in ("reward", "dpo"))
    assert ids.tolist() == [*plain.tolist(), tokenizer.eod_id] and mask.tolist() == [0] * len(plain) + [1]


def test_unpaired_answers_have_an_answer_to_another_prompt_beside_them(tokenizer, tmp_path):
    records = [{"prompt": f"say {c}", "completion": c, "label": c == "a"} for c in "abc"]
    found = loaded(tmp_path, tokenizer, records, "kto", format="unpaired")
    assert found.signs.tolist() == [CHOSEN, OTHER, REJECTED, OTHER, REJECTED, OTHER]
    texts = [tokenizer.decode(found.answers[i][0]) for i in range(6)]
    assert ["say a" in text for text in texts] == [True, True, False, False, False, False]
    assert [text.split("assistant\n")[1][0] for text in texts] == ["a", "b", "b", "c", "c", "a"]


def test_kto_takes_pairs_apart(tokenizer, tmp_path):
    records = [{"prompt": f"say {c}", "chosen": c.upper(), "rejected": c} for c in "ab"]
    found = loaded(tmp_path, tokenizer, records, "kto")
    assert found.signs.tolist() == [CHOSEN, OTHER, REJECTED, OTHER] * 2


def rows_of(tokenizer, tmp_path, seq_len, most=8, **options):
    found = loaded(tmp_path, tokenizer, instructions.preferences(30, "pairs"))
    return found, PreferenceRows(found, seq_len, tokenizer.eod_id, most=most, **options)


@pytest.mark.parametrize("most", [1, 2, 8])
def test_both_answers_of_a_pair_are_neighbours_in_a_row_of_at_most_so_many_pairs(tokenizer, tmp_path, most):
    found, source = rows_of(tokenizer, tmp_path, 400, most)
    seen, counts = [], []
    for i in range(len(source)):
        row = source.row(i)
        count = row["segment_ids"].max()
        counts.append(count // 2)
        signs = [row["signs"][row["segment_ids"] == k] for k in range(1, count + 1)]
        assert [s[0] for s in signs] == [1, -1] * (count // 2) and not any(s[1:].any() for s in signs)
        for k in range(1, count + 1):
            inside = row["segment_ids"] == k
            seen.append((row["tokens"][inside].tolist(), row["targets"][inside].tolist(), row["loss_weights"][inside].tolist()))
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
    assert max(counts) <= most and (most == 8 or max(counts) == most)
    want = [found.answers[i] for i in range(60)]
    assert sorted(seen) == sorted((ids[:-1].tolist(), ids[1:].tolist(), mask[1:].tolist()) for ids, mask in want)


def test_pairs_that_are_too_long_are_cut_dropped_or_an_error(tokenizer, tmp_path):
    record = {"prompt": "say a", "chosen": "A" * 40, "rejected": "b"}
    found = loaded(tmp_path, tokenizer, [record, {"prompt": "say a", "chosen": "A", "rejected": "b"}])
    sizes = [len(found.answers[i][0]) - 1 for i in range(4)]
    seq_len = sizes[2] + sizes[3] + 6
    assert sizes[0] + sizes[1] > seq_len
    plan, report = preferences.plan(found, seq_len, "truncate", 8)
    assert report["truncated"] == 1 and plan.size[plan.example == 0] == seq_len // 2
    assert preferences.plan(found, seq_len, "drop", 8)[1]["packed"] == 1
    with pytest.raises(ValueError, match="pair 0 takes .* raise train.seq_len, or use data.too_long"):
        preferences.plan(found, seq_len, "error", 8)
    with pytest.raises(ValueError, match="part has no pair whose answers have a target"):
        PreferenceRows(found, 8, tokenizer.eod_id, most=8)


WRONG = [
    ({"prompt": "a", "chosen": "A"}, "key 'rejected' is missing; the keys are prompt, chosen"),
    ({"prompt": "a", "chosen": "A", "rejected": "A"}, "chosen and rejected are equal"),
    ({"prompt": "a", "chosen": 3, "rejected": "A"}, "'chosen' is int; give text, or a list of messages"),
    ({"chosen": "A", "rejected": "b"}, "the record has no prompt"),
    ({"chosen": PROMPT + said("A"), "rejected": EARLIER[:1] + said("A")}, "the record has no prompt"),
    ({"chosen": EARLIER + PROMPT, "rejected": EARLIER + said("A")}, "an answer must begin with the assistant's turn, and not with 'user'"),
]


@pytest.mark.parametrize("record, message", WRONG)
def test_a_wrong_record_is_named_or_left_out(tokenizer, tmp_path, record, message):
    records = [{"prompt": "say a", "chosen": "A", "rejected": "b"}, record]
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        loaded(tmp_path, tokenizer, records)
    assert len(loaded(tmp_path, tokenizer, records, skip_bad=True)) == 1


def test_a_label_is_true_or_false(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'label' is 'good'; give true for a desirable answer, or false"):
        loaded(tmp_path, tokenizer, [{"prompt": "a", "completion": "b", "label": "good"}], "kto", format="unpaired")


def test_a_corpus_of_made_up_preferences_holds_some_out():
    config = common.get_config()
    config.data.format, config.data.vocab_size, config.prefer.loss, config.train.seq_len = "pairs", 300, "dpo", 256
    found = corpus.load(config, 512)
    held = found.held_out["signs"]
    assert (held == 1).sum() == (held == -1).sum() > 40 and "<|im_start|>user" in found.held_text
    assert np.abs(found.train.row(0)["signs"]).sum() == 8
