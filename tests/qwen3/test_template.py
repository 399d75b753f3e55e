"""Chat templates are foreign code: whatever they do, they end with words, and the next text is rendered."""

import os
import signal
import threading
import time

import pytest

from qwen3 import template

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "text, message",
    [
        (ENDLESS, "it takes longer than 1 s; look for a loop without an end"),
        ("{{ 9 ** (9 ** 9) }}", "it takes longer than 1 s"),
        ("{{ 'x'.center(3000000000) }}", "memory"),
        ("{{ 'x' * 3000000000 }}", "memory"),
        ("{{ [1] | tojson(indent=2000000000) }}", "memory"),
        ("{{ 'x' | slice(2000000000) | list }}", "memory|longer than"),
        ("{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "its text is longer than 67,108,864 characters"),
        ("{{ ''.__class__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no tools') }}", "no tools"),
    ],
)
def test_a_template_without_measure_ends_with_words(text, message):
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        template.render(text, {}, limit_s=1)
    assert time.monotonic() - began < 30
    assert template.render("{{ a }}!", {"a": "é\ud800"}) == "é\ud800!"


def test_one_process_renders_many_texts_and_threads_have_one_each():
    template.end()
    template.render("{{ 1 }}", {})
    (first,) = template._all
    assert [template.render("{{ a }}", {"a": i}) for i in range(20)] == [str(i) for i in range(20)]
    assert set(template._all) == {first}
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(template.render("{{ a }}", {"a": i}))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list("0123")
    os.kill(first.pid, signal.SIGKILL)  # as where memory runs out
    first.wait()
    assert template.render("{{ 5 }}", {}) == "5"


def test_end_stops_what_is_rendered():
    """So a server that is told to end does not wait for a template."""
    found = []

    def loop():
        try:
            template.render(ENDLESS, {}, limit_s=60)
        except ValueError as error:
            found.append(str(error))

    thread = threading.Thread(target=loop)
    thread.start()
    end = time.monotonic() + 20
    while not template._all - set(template._idle) and time.monotonic() < end:
        time.sleep(0.01)
    template.end()
    thread.join(20)
    assert not thread.is_alive() and "ended with status -9" in found[0]
