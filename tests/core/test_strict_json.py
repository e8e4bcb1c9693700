import pytest

from mmjax.core import strict_json
from mmjax.core.errors import InputError


def loads(text, **limits):
    return strict_json.loads(text.encode(), "a.json", **{"max_bytes": 1000} | limits)


def test_known_values():
    assert loads('{"a": [1, -2, 2.5, 1e3, true, null, "é\\u00e9\\ud83d\\ude00"], "b": {}}') == {
        "a": [1, -2, 2.5, 1e3, True, None, "éé😀"],
        "b": {},
    }
    assert loads("18446744073709551615") == 2**64 - 1
    assert loads(" 0.1 ") == 0.1


@pytest.mark.parametrize(
    ("text", "limits", "says"),
    [
        ("[[1]]", {"max_depth": 1}, "nested more than 1 levels"),
        ("[1,2,3]", {"max_items": 2}, "more than 2 entries"),
        ("[1]", {"max_bytes": 2}, "has 3 bytes, where 2 are allowed"),
        ('{"a":1,"b":2,"a":3}', {}, "the key 'a' twice"),
        ('[{"x":{"":1,"":1}}]', {}, "the key '' twice"),
        ("[NaN]", {}, "number NaN"),
        ("-1e400", {}, "number -1e400"),
        ("9" * 41, {}, "41 digits"),
        ('"\\udc00"', {}, "half a surrogate"),
        ('{"a":[{"\\uD9ff":1}]}', {}, "half a surrogate"),
        ('["[", [{"a": {}}], "]"]', {"max_depth": 3}, "nested more than 3 levels"),
        ("1 2", {}, "not JSON"),
    ],
)
def test_refusals(text, limits, says):
    with pytest.raises(InputError, match=rf"^a\.json .*{says}"):
        loads(text, **limits)


def test_limits_are_the_last_that_are_allowed():
    assert loads("[[1]]", max_depth=2, max_bytes=5, max_items=2) == [[1]]
    assert loads('["[[[", "\\ud83d\\ude00"]', max_depth=1) == ["[[[", "😀"]


def test_what_strangers_wrote_is_shown_short():
    assert strict_json.shown("a\n\ud800") == r"'a\n\ud800'"
    assert len(strict_json.shown("x" * 10**6)) == 81
