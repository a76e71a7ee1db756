from __future__ import annotations

import json
import math

import pytest

from scalabl_pyro.files import json_text


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_no_number_is_null(bad, indent):
    text = json_text({"a": bad, "b": [1.5, bad, (bad, {"c": bad})], "d": None}, indent=indent)
    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": None, "b": [1.5, None, [None, {"c": None}]], "d": None}


def test_finite_values_are_written_as_by_json():
    value = {"a": [1, 2.5, True, "é"], "b": {}}
    assert json_text(value) == json.dumps(value)
    assert json_text(value, indent=1) == json.dumps(value, indent=1)
