"""Rewards of answers, for rl.reward: functions of (prompt, text, record) that return a number.

prompt: that of the record, a text or a list of messages. text: the answer. record: the whole record of the data, a dict.
"""


def exact_match(prompt, text, record):
    """1 if the answer is the record's `answer`, without spaces around it, else 0."""
    return float(text.strip() == str(record["answer"]).strip())
