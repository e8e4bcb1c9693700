from dataclasses import fields

import pytest

from mmjax.core.errors import InputError
from mmjax.tokenizers.vocab import CONTROLS, Vocab

IDS = {control.name: i for i, control in enumerate(CONTROLS)}


def test_every_control_has_a_field_and_its_own_symbol():
    more = ["size", "image_newline", "video", "audio", "numbered"]
    assert [field.name for field in fields(Vocab)] == [control.name for control in CONTROLS] + more
    assert len({control.symbol for control in CONTROLS}) == len(CONTROLS)


@pytest.mark.parametrize(("name", "token"), [("pad", -1), ("image_end", 9), ("user", 1000)])
def test_an_id_outside_the_vocabulary_is_refused(name, token):
    with pytest.raises(InputError, match=rf"'{name}' is {token}, outside 0 to 8"):
        Vocab(**{**IDS, name: token}, size=9)


def test_the_image_placeholder_shares_its_id_with_no_other():
    with pytest.raises(InputError, match=r"'image' and 'end' share the id 2"):
        Vocab(**{**IDS, "image": 2}, size=9)
    with pytest.raises(InputError, match=r"'video' and 'user' share the id 4"):
        Vocab(**IDS, video=4, size=9)
    assert Vocab(**IDS, video=6, size=9).placeholders == (6,)  # one placeholder for all media
    assert Vocab(**{**IDS, "pad": 2}, size=9).pad == 2  # many published models pad with their end token
