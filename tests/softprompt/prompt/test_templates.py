"""The texts of every template, word for word, and templates that cannot be filled in."""

import pytest

from softprompt.errors import InputError
from softprompt.prompt.templates import TEMPLATES, VIEWS, Template, is_prompt_file, view_texts

SPELLED = ("front", "front right", "right", "back", "left", "front left")
EXPECTED = {
    "facelift": [f"a rendering image of 3D models, {v} view, color map." for v in VIEWS],
    "elevated": [f"a rendering image of 3D models, {v} view, color map, from above at an angle." for v in VIEWS],
    "realistic": [f"a photograph of a mouse, {v} view, from above at an angle." for v in SPELLED],
    "hybrid": [f"a multi-view image of a mouse, {v} view, elevated camera angle." for v in SPELLED],
    "simple": [f"a mouse, {v} view." for v in SPELLED],
}


def test_views_are_facelift_s_in_its_order() -> None:
    assert VIEWS == ("front", "front_right", "right", "back", "left", "front_left")


def test_the_texts_of_every_template_are_these_word_for_word() -> None:
    assert {name: view_texts(name) for name in TEMPLATES} == EXPECTED


def test_subject_and_angle_are_filled_in() -> None:
    texts = view_texts("realistic", subject="white rat", angle="seen from 20 degrees above")
    assert texts[1] == "a photograph of a white rat, front right view, seen from 20 degrees above."
    assert view_texts("elevated", angle="high up")[5] == "a rendering image of 3D models, front_left view, color map, high up."


def test_a_user_s_own_text_is_filled_in_likewise() -> None:
    texts = view_texts("{subject} from the {view}, {angle}", subject="cat", angle="high")
    assert texts == [f"cat from the {view}, high" for view in SPELLED]
    assert view_texts("the {view}") == [f"the {view}" for view in SPELLED]


def test_a_template_spells_its_views_one_way_or_the_other_and_other_views_can_be_named() -> None:
    for spelling, expected in [("underscores", ["x top_left", "x top"]), ("spaces", ["x top left", "x top"])]:
        assert Template("x {view}", spelling).texts(subject="", angle="", views=("top_left", "top")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a mouse from above", r"template 'a mouse from above': has no \{view\}, so all views would get the same prompt"),
        ("a {veiw} view", r"has no \{view\}"),
        (
            "{view}, {colour}",
            r"'\{view\}, \{colour\}': cannot be filled in \(KeyError: 'colour'\); its fields may be \{view\}, \{subject\}",
        ),
        ("{view} {}", r"cannot be filled in"),
        ("{view} {", r"cannot be filled in"),
        ("{view} }", r"cannot be filled in"),
        ("{view} {subject.name}", r"cannot be filled in"),
        ("{view} {subject[name]}", r"cannot be filled in"),
    ],
)
def test_a_text_that_cannot_be_filled_in_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        view_texts(text)


def test_what_names_a_prompt_is_a_file_or_a_text() -> None:
    files = ("clr_embeds.pt", "$DATA/x.safetensors", "${DATA}/x", "${DATA}/clr_embeds.pt", "mine.npy", "folder", "~/folder")
    texts = ("facelift", "a ${view} of 5$ mice", "$HOME, {view} view", "a {subject}, {view}")
    assert [name for name in (*files, *texts) if is_prompt_file(name)] == list(files)
