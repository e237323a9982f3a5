"""Reasoning and answer apart."""

import pytest

from dsv32_jax.generate.reasoning import ReasoningSplit


class Words:
    """Single tokens for the tags, as text or as special tokens, whose text is left out of what is decoded."""

    def encode(self, text):
        return {"<think>": [5], "</think>": [6]}.get(text, [1, 2])


class Letters:
    """No tokens for the tags."""

    def encode(self, text):
        return list(text.encode())


def split(pieces, prompt="<think>", thinking=True, tokenizer=None):
    """(reasoning, answer), which are also what the pieces bring one by one."""
    parts = ReasoningSplit(tokenizer or Words(), prompt, thinking)
    additions = [parts.add(*piece) for piece in pieces] + [parts.finish()]
    shown = tuple("".join(column) for column in zip(*additions, strict=True))
    assert "".join(shown) == parts.reasoning + parts.answer
    return parts.reasoning, parts.answer


@pytest.mark.parametrize("tag", ["", "</think>"])
def test_the_tag_is_a_token_special_or_not(tag):
    assert split([(9, "a "), (9, "b"), (6, tag), (9, "c</think>")]) == ("a b", "c</think>")


def test_the_tag_comes_in_letters():
    text = "so <</thin</think>yes"
    assert split([(0, letter) for letter in text], tokenizer=Letters()) == ("so <</thin", "yes")
    assert split([(0, letter) for letter in "never </thin"], tokenizer=Letters()) == ("never </thin", "")


def test_the_model_may_open_the_reasoning_itself():
    assert split([(5, ""), (9, "a"), (6, ""), (9, "b")], prompt="<assistant>") == ("a", "b")
    assert split([(9, "<think>a</think>b")], prompt="<assistant>") == ("a", "b")


def test_what_comes_before_an_unannounced_end_is_reasoning():
    assert split([(9, "a"), (6, ""), (9, "b")], prompt="<assistant>") == ("a", "b")


def test_all_is_answer_where_nobody_asked_for_reasoning():
    assert split([(9, "a</think>"), (6, "")], prompt="</think>", thinking=False) == ("", "a</think>")
    assert split([(9, "a"), (9, "b")], prompt="<assistant>") == ("", "ab")
