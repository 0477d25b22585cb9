"""Class names as CLIP reads them: which it can tell apart, and which are no text at all."""

import os

import pytest

from lamp_fast.clip.prompts import check_distinct, tokenise
from lamp_fast.errors import InputError

TEMPLATE = "a photo of a {}."


def check(clip, *names, allowed=()):
    check_distinct(tokenise(clip, names, TEMPLATE), "classes", allowed)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("Cat", "cat"),
        ("caf\u00e9", "cafe\u0301"),
        ("red\u00a0fox", "red fox"),
        ("red  fox ", "red fox"),
        ("dog\u2019s", "dog's"),
        ("salt &amp; pepper", "salt & pepper"),
    ],
)
def test_names_of_the_same_tokens_are_refused(small_clip, name, other):
    clip = small_clip()
    # What the message claims, by the tokenizer itself.
    ids = clip.tokenizer([TEMPLATE.format(name), TEMPLATE.format(other)])
    assert ids[0].tolist() == ids[1].tolist()
    with pytest.raises(InputError, match=r"classes: .* and .* give the same tokens") as error:
        check(clip, "ox", name, other)
    assert str(error.value).isascii()  # two that look the same do not in the message
    check(clip, "ox", name)


def test_what_differs_in_one_token_passes(small_clip):
    check(small_clip(), "cat", "cats", "cat s", "chat", "1", "01")


def test_a_name_given_twice(small_clip):
    with pytest.raises(InputError, match="classes: 'ox' is named 3 times, expected distinct"):
        check(small_clip(), "ox", "cat", "ox", "ox")


def test_a_runs_own_names_may_be_alike(small_clip):
    clip, own = small_clip(), ("missile", "ox", "missile", "Cat", "cat")
    check(clip, *own, allowed=own)
    check(clip, "Cat", "cat", "zebra", allowed=own)
    with pytest.raises(InputError, match="named 3 times"):
        check(clip, "missile", "missile", "missile", allowed=own)
    with pytest.raises(InputError, match="'Cat' and 'CAT' give the same tokens"):
        check(clip, "Cat", "CAT", allowed=own)


def test_a_name_that_is_not_utf_8(small_clip):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(InputError, match="is not UTF-8, expected text") as error:
        tokenise(small_clip(), ["ox", name], TEMPLATE)
    assert "'caf\\udce9'" in str(error.value)
    assert str(error.value).isascii()
