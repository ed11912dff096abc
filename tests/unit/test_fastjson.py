"""Encoders that are made once write what the standard library's write: ids, seeds and digests depend on each character."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfactory.fastjson import dumps, dumps_ascii, dumps_ids, dumps_sorted, loads

TEXTS = st.text(st.characters(exclude_categories=[])) | st.sampled_from(["\ud800", "é", "\u2028", '"\\\n', ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(VALUES)
def test_texts_are_those_of_the_standard_library(value):
    assert dumps(value) == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    assert dumps_ascii(value) == json.dumps(value)
    assert dumps_sorted(value) == json.dumps(value, sort_keys=True)


@given(st.recursive(st.none() | st.booleans() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20))
def test_what_was_written_is_read_again(value):
    assert loads(dumps_ascii(value)) == value


@pytest.mark.parametrize("encode", [dumps, dumps_ascii, dumps_sorted])
@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object()])
def test_what_is_no_json_is_refused(encode, value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        encode({"a": [value]})


def test_ids_in_the_quick_form():
    assert json.loads(dumps_ids({"state": "succeeded", "jobs": ["job_a", "job_b"], "n": 2, "share": 0.5})) == {
        "state": "succeeded", "jobs": ["job_a", "job_b"], "n": 2, "share": 0.5,
    }  # fmt: skip
